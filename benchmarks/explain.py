"""What `automatch explain` says of real messages, and how often the pairs that it reads out of an error text are right.

    python benchmarks/explain.py [PATTERN ...] [--write]

For every case of the corpus the text is made that PyTorch would print for it: keys that one side lacks, and size
mismatches of keys that both have; whole, and cut off after 600 characters of each list as people paste it. The pairs
are compared with the truth, per kind of change; a pair of keys that the truth maps by a transform counts as wrong.

The real messages are those of public issue threads in ``tests/data/messages``; an answer is right if it pairs the keys that
belong together and no others, and if the cause that the thread ended with (`MAIN`) is among those it gives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from corpus_cases import Case, load_cases

from automatch.explain import explain

RESULT = Path(__file__).parent / "results" / "explain.md"
MESSAGES = Path(__file__).parents[1] / "tests" / "data" / "messages"
MAIN = {
    "cyclegan-461-conv-block": "shift",
    "deeplabs-3-extra-layer": "architecture",
    "generated-smp-unetplusplus-into-deeplabv3plus": "architecture",
    "midas-236-swin2-downsample": "shift",
    "pia-13-clip-position-ids": "buffers",
    "pytorch-classification-27-alexnet": "wrapper",
    "pytorch-classification-35-bottleneck": "architecture",
    "sd-dreambooth-6-text-model-prefix": "prefix",
    "tadaconv-24-head-classes": "classes",
    "timm-pr2003-orig-mod": "wrapper",
}
KINDS = ("wrapper", "prefix", "renamed", "shift", "matched")


def message_of(case: Case, cut: int | None = None) -> str:
    """The text of the error that loading the case's source into its target raises.

    Args:
        case: the case.
        cut: characters after which each list breaks off; None for the whole text.
    """
    source, target = ({key: tuple(shape) for key, shape, *_ in case[side]["entries"]} for side in ("source", "target"))
    lines = ["RuntimeError: Error(s) in loading state_dict for Model:"]
    for title, one, other in (("Missing", target, source), ("Unexpected", source, target)):
        names = ", ".join(f'"{key}"' for key in one if key not in other)
        if names:
            lines.append(f"\t{title} key(s) in state_dict: " + (names + ". " if cut is None or len(names) < cut else names[:cut] + " ..."))
    lines.extend(
        f"\tsize mismatch for {key}: copying a param with shape torch.Size({list(source[key])}) from checkpoint, "
        f"the shape in current model is torch.Size({list(shape)})."
        for key, shape in target.items()
        if key in source and source[key] != shape
    )
    return "\n".join(lines)


def measure(case: Case, cut: int | None = None) -> tuple[Counter[str], Counter[str]]:
    """Pairs per kind of change, and how many of them are right."""
    found: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for kind, source, target in explain(message_of(case, cut)).pairs:
        true = case["truth"].get(target, {"op": None, "sources": []})
        found[kind] += 1
        right[kind] += true["op"] == "copy" and [source] in [true["sources"], *true.get("alt", [])]
    return found, right


def messages() -> list[str]:
    """What is said of every real message, as Markdown."""
    lines = ["| message | causes | pairs right / told / true | answer |", "|-|-|-|-|"]
    for path in sorted(MESSAGES.glob("*.json")):
        known = json.loads(path.read_text(encoding="utf-8"))
        explanation = explain(known["error"])
        kinds = [cause.kind for cause in explanation.causes]
        told = {match.target: match.sources[0] for match in explanation.mapping.matches}
        right = told.items() & known["truth"].items()
        answer = "right" if told == known["truth"] and MAIN[path.stem] in kinds else "cannot tell" if kinds[0] == "unknown" else "wrong"
        lines.append(f"| {path.stem} | {', '.join(kinds)} | {len(right)} / {len(told)} / {len(known['truth'])} | {answer} |")
    return lines


def table(rows: list[tuple[str, Counter[str], Counter[str], Counter[str]]], failed: list[str]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Explaining error texts",
        "",
        "Written by `python benchmarks/explain.py --write`; how it is measured stands there. Names alone are known, no shapes.",
        "",
        "## Real messages",
        "",
        *messages(),
        "",
        "## Texts made of the corpus",
        "",
        f"Texts on which `explain` failed: {', '.join(failed) or 'none'}.",
        "",
        "| text | change | cases | pairs | right |",
        "|-|-|-|-|-|",
    ]
    for text, cases, found, right in rows:
        lines.extend(f"| {text} | {kind} | {cases[kind]} | {found[kind]} | {right[kind] / max(1, found[kind]):.2%} |" for kind in KINDS)
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, and with ``--write`` store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="measure the cases whose id contains one of these")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--show", action="store_true", help="print the cases with wrong pairs")
    arguments = parser.parse_args()
    rows: list[tuple[str, Counter[str], Counter[str], Counter[str]]] = []
    failed: list[str] = []
    for text, cut in (("whole", None), ("cut off", 600)):
        cases, found, right = Counter[str](), Counter[str](), Counter[str]()
        for case in load_cases(arguments.patterns):
            try:
                one_found, one_right = measure(case, cut)
            except Exception as error:  # whatever it is, it is counted, and the other cases are measured
                failed.append(f"{case['id']} ({text}: {error!r})")
                continue
            cases.update(dict.fromkeys(one_found, 1))
            found += one_found
            right += one_right
            if arguments.show and one_found != one_right:
                print(case["id"], text, {kind: (one_right[kind], count) for kind, count in one_found.items()})
        rows.append((text, cases, found, right))
    print(table(rows, failed))
    if arguments.write:
        RESULT.write_text(table(rows, failed), encoding="utf-8")


if __name__ == "__main__":
    main()
