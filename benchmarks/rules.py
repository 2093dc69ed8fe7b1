"""How few rules explain a mapping: every case's true mapping, its rules, and the proof that they reproduce it.

    python benchmarks/rules.py [PATTERN ...] [--write] [--show]

The corpus says of some row orders (rotary rows, per-head grouping) that there is one, not which: a fixed order
stands for them here, so that the count of rules is that of a mapping which has found the same order everywhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from corpus_cases import Case, load_cases

from automatch.mapping import KeyMapping, Match, Side
from automatch.rules import RenameRule, apply_rules, infer_rules
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import Chain, Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack, Transform

RESULT = Path(__file__).parent / "results" / "rules.md"
_ROWS = PermuteElements(0, (2, 2), (1, 0))


@dataclass(frozen=True)
class Record:
    """The rules of one case."""

    id: str
    family: str
    keys: int
    rules: int
    in_shared_rules: int
    exact: bool
    seconds: float


def true_mapping(case: Case) -> KeyMapping:
    """The mapping that the corpus says is right, every match with confidence 1."""
    source, target = (
        StateSpec(tuple(TensorSpec(key, tuple(shape), dtype) for key, shape, dtype, _ in case[side]["entries"]), case[side]["library"])
        for side in ("source", "target")
    )
    matches = (
        Match(tensor.key, tuple(case["truth"][tensor.key]["sources"]), _transform(case["truth"][tensor.key], tensor), confidence=1.0)
        for tensor in target
        if tensor.key in case["truth"]
    )
    return KeyMapping(Side.of(source), Side.of(target), ()).with_matches(matches)


def _transform(true: Mapping[str, Any], target: TensorSpec) -> Transform:
    match true["op"]:
        case "copy":
            return Copy()
        case "reshape":
            return Reshape(target.shape)
        case "permute":
            return Permute(tuple(true["dims"]))
        case "slice":
            return Slice(true["dim"], true["start"], true["length"])
        case "slice_transpose":
            return Chain((Slice(true["dim"], true["start"], true["length"]), Permute((1, 0))))
        case "concat":
            return Concat(true["dim"])
        case "stack":
            return Stack(true["dim"])
        case "permute_elements":
            return _ROWS
        case "slice_elements":
            return Chain((_ROWS, Slice(0, 0, 2)))
        case "interleave":
            return Chain((Concat(0), _ROWS))
        case op:
            raise ValueError(f"no transform stands for op {op!r}")


def reproduces(rules: Iterable[RenameRule], mapping: KeyMapping) -> bool:
    """Whether the rules, applied to all source keys, give the mapping: same targets, sources and transforms."""
    spec = mapping.source.spec
    made = apply_rules(rules, spec.keys if spec else ())
    return {m.target: (m.sources, m.transform) for m in made} == {m.target: (m.sources, m.transform) for m in mapping.matches}


def measure(case: Case) -> tuple[Record, tuple[RenameRule, ...]]:
    """Infer the rules of one case and check them."""
    mapping = true_mapping(case)
    start = time.perf_counter()
    rules = infer_rules(mapping)
    seconds = time.perf_counter() - start
    shared = sum(rule.n_keys for rule in rules if rule.targets and rule.n_keys > 1)
    return Record(case["id"], case["family"], len(mapping), len(rules), shared, reproduces(rules, mapping), seconds), rules


def table(records: list[Record]) -> str:
    """The figures as Markdown."""
    fed = [record for record in records if record.keys]
    shares = [record.in_shared_rules / record.keys for record in fed]
    largest = max(records, key=lambda record: record.keys)
    lines = [
        "# Rename rules over the corpus",
        "",
        "Written by `python benchmarks/rules.py --write`. Every case's true mapping is explained by rules; the rules are applied to",
        "all source keys (also those that feed nothing) and the result is compared with the mapping: targets, sources, transforms.",
        "",
        "| figure | value | goal |",
        "|-|-|-|",
        f"| cases reproduced exactly | {sum(r.exact for r in records)} of {len(records)} | all |",
        f"| median rules per case | {statistics.median(r.rules for r in fed):g} | ≤ 12 |",
        f"| mean rules per case | {statistics.mean(r.rules for r in fed):.1f} | |",
        f"| cases with more than 12 rules | {sum(r.rules > 12 for r in fed)} | |",
        f"| keys explained by rules of more than one key | {sum(r.in_shared_rules for r in fed) / sum(r.keys for r in fed):.2%} | ≥ 95 % |",
        f"| the same, mean over cases | {statistics.mean(shares):.2%} | ≥ 95 % |",
        f"| cases below 95 % | {sum(share < 0.95 for share in shares)} | |",
        f"| largest case | {largest.keys} keys, {largest.rules} rules | |",
        "",
        "The cases with most rules, and why:",
        "",
        "| case | keys | rules | in rules of more than one key |",
        "|-|-|-|-|",
    ]
    worst = sorted(fed, key=lambda record: (-record.rules, record.id))[:12]
    lines.extend(f"| {r.id} | {r.keys} | {r.rules} | {r.in_shared_rules / r.keys:.0%} |" for r in worst)
    lines.extend(
        ["", "TensorFlow's keys separate segments by `/` and name every leaf otherwise (`kernel`, `gamma`), so no prefix is shared.", ""]
    )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and with ``--write`` store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="measure the cases whose id contains one of these")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(Path(__file__).parent.parent)}")
    parser.add_argument("--show", action="store_true", help="print every rule")
    arguments = parser.parse_args()
    records: list[Record] = []
    for case in load_cases(arguments.patterns):
        record, rules = measure(case)
        records.append(record)
        mark = "" if record.exact else "  NOT EXACT"
        print(f"{record.id:50} {record.keys:6} keys {record.rules:4} rules {record.seconds:6.2f} s{mark}")
        for rule in rules if arguments.show else ():
            print(f"  {rule.n_keys:6}  {rule}")
    print(table(records))
    if arguments.write:
        RESULT.write_text(table(records), encoding="utf-8")
    return 0 if all(record.exact for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
