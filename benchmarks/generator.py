#!/usr/bin/env python3
"""Random refactorings of real models, as cases in the corpus form: training and test data that never run out.

    python benchmarks/generator.py 7                # show case 7: what was done, and some of its keys
    python benchmarks/generator.py 0 200 --to DIR   # write cases 0 to 199 as <id>.json.gz

The checkpoint is a model of the corpus as it is; the target is the same model after one refactoring, or
three to five of them ("combined"). A seed gives the same case every time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import corpus_cases
from module_tree import entries_of, tree_of
from refactorings import REFACTORINGS

LARGEST = 1500
KINDS = (*REFACTORINGS, "combined", "combined", "combined")


def generate(seed: int, kind: str | None = None) -> dict[str, Any]:
    """Case number ``seed``.

    Args:
        seed: any integer; neighbouring seeds give neighbouring kinds.
        kind: a name of `REFACTORINGS` or "combined"; by default the seed decides.
    """
    kind = kind or KINDS[seed % len(KINDS)]
    rng = random.Random(f"automatch:{seed}:{kind}")
    while True:
        base = corpus_cases.load_case(rng.choice(_bases()))
        case = _refactored(base, seed, kind, rng)
        if case is not None:
            return case


@lru_cache(maxsize=1)
def _bases() -> list[Path]:
    """The corpus cases whose target is a real model of moderate size, one per model."""
    found: dict[str, Path] = {}
    for path in corpus_cases.case_paths():
        case = corpus_cases.load_case(path)
        target = case["target"]
        if target.get("modules") and len(target["entries"]) <= LARGEST and case["family"] != "negative":
            found.setdefault(json.dumps([target["library"], target["version"], target["model"]]), path)
    return list(found.values())


def _refactored(base: dict[str, Any], seed: int, kind: str, rng: random.Random) -> dict[str, Any] | None:
    root = tree_of(base["target"])
    names = rng.sample(sorted(REFACTORINGS), rng.choice((3, 4, 5))) if kind == "combined" else [kind]
    if {"insert", "shift"} & set(names):  # which layer was dropped and which came in would be anybody's guess
        names = [name for name in names if name != "delete"]
    names.sort(key=lambda name: name in ("synonyms", "style", "nonsense", "wrap"))  # q, k, v are fused while they are called so
    done = [(name, note) for name in names if (note := REFACTORINGS[name](root, rng)) is not None]
    entries, modules, truth = entries_of(root)
    keys = {entry[0] for entry in entries}
    if len(done) < min(2, len(names)) or len(keys) < len(entries) or keys & set(modules) or not truth:
        return None
    source = base["target"]
    return {
        "id": f"gen-{seed:05d}-{kind}-{base['id']}",
        "family": base["family"],
        "title": f"{source['library']} {source['model']}, refactored",
        "verified": "definition",
        "notes": "; ".join(f"{name}: {note}" for name, note in done),
        "provenance": "random refactoring of a corpus target",
        "source": {
            "library": source["library"],
            "version": source["version"],
            "model": source["model"],
            "entries": [[key, shape, dtype, "tensor"] for key, shape, dtype, _ in source["entries"]],
            "aliases": source.get("aliases", []),
        },
        "target": {"library": "refactored", "version": "", "model": source["model"], "entries": entries, "modules": modules},
        "truth": truth,
    }


def main() -> None:
    """Show or write cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int, nargs="?", help="one past the last (default: only the first)")
    parser.add_argument("--kind", choices=sorted(set(KINDS)))
    parser.add_argument("--to", type=Path, help="directory to write to, instead of showing")
    args = parser.parse_args()
    for seed in range(args.first, args.first + 1 if args.end is None else args.end):
        case = generate(seed, args.kind)
        if args.to:
            args.to.mkdir(parents=True, exist_ok=True)
            (args.to / f"{case['id']}.json.gz").write_bytes(gzip.compress(json.dumps(case).encode(), mtime=0))
            continue
        print(f"{case['id']}: {len(case['truth'])} of {len(case['target']['entries'])} keys are fed\n  {case['notes']}")
        for key, true in list(case["truth"].items())[:: max(1, len(case["truth"]) // 12)]:
            print(f"  {key} <- {', '.join(true['sources'])}{'' if true['op'] == 'copy' else ' (' + true['op'] + ')'}")


if __name__ == "__main__":
    main()
