#!/usr/bin/env python3
"""What each signal is worth: the corpus with one signal, or one group of them, switched off.

    python benchmarks/ablation.py                       # every signal and group, keys in the file's own order and sorted
    python benchmarks/ablation.py --only order context --orders file
    python benchmarks/ablation.py --extra --orders file # the cases of corpus_extra instead, into results/ablation_extra.*
    python benchmarks/ablation.py hf- timm --print      # only some cases; nothing is written

A switched-off signal weighs nothing, everything else stays as shipped (nothing is fitted again), so the
confidences are off too: read the perfect cases, the recall and the wrong pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import corpus_cases
import figures

from automatch.engine import assemble, conventions, items, pipeline, reduction, solve, splits, twins  # the signals have no public face
from automatch.engine.sides import Side

HERE = Path(__file__).parent
RESULTS, EXTRA = HERE / "results", HERE / "corpus_extra" / "cases"
GROUPS = {
    "names (spelling)": ("name", "contrast"),
    "conventions": ("concept", "region"),
    "order": ("rank", "sibling", "block", "position", "sequence", "neighbour", "beside"),
    "context": ("node", "template", "suffix", "neighbour", "beside", "owner", "direction", "consensus"),
    "everything but names": (
        "concept",
        "region",
        "role",
        "rank",
        "sibling",
        "block",
        "position",
        "sequence",
        "node",
        "template",
        "suffix",
        "neighbour",
        "beside",
        "owner",
        "direction",
        "consensus",
    ),
}
STEPS: dict[str, tuple[Any, str, Callable[..., Any]]] = {  # the module of each step, its name there, and what stands in its place
    "whole modules": (pipeline, "keep_whole", lambda chosen, *_: dict(chosen)),
    "numbers of siblings": (pipeline, "keep_numbers", lambda chosen, *_: dict(chosen)),
    "directions of lists": (pipeline, "keep_directions", lambda chosen, *_: (dict(chosen), set())),
    "order of registration": (
        pipeline,
        "_sides",
        lambda sides, orders, _: tuple(itertools.starmap(_unordered, zip(sides, orders, strict=True))),
    ),
    "padded vocabularies": (pipeline, "with_padded", lambda _source, _target, fed, _decided: list(fed)),
    "blocks counted with letters": (items, "_lettered", lambda keys: keys),
    "attn1 and attn2 apart": (conventions, "numbered_words", lambda _: frozenset()),
    "norms where they are registered": (conventions, "_turned", lambda *_: False),
    "numbered norms asked about": (twins, "numbered_norms", lambda *_: set()),
    "lists that are no class": (reduction, "_nearest", lambda *_: 0.0),
    "four parts in one": (splits, "_parallel", lambda *_: []),
    "fused tensors that stay whole": (splits, "_left_whole", lambda *_: []),
    "parts put together again": (assemble, "_rejoined", lambda parts, *_: [(source, part.shape) for _, part, source in parts]),
    "names of siblings": (pipeline, "keep_names", lambda chosen, *_: dict(chosen)),
    "norms in series": (pipeline, "keep_series", lambda chosen, *_: (dict(chosen), set())),
    "lists of projections": (conventions, "_is_listed_attention", lambda *_: False),
    "which way is down": (conventions, "_is_down_last", lambda *_: False),
    "all shapes in one order": (reduction, "_in_one_order", lambda *_: False),
}
COLUMNS = ("perfect_share", "one_answer_share", "macro_recall", "wrong", "confident_wrong")


def signals() -> tuple[str, ...]:
    """The names of the engine's signals."""
    return tuple(f.name for f in dataclasses.fields(solve.Weights) if isinstance(f.default, float) and f.name != "none")


def _unordered(found: list[Any], order: Any) -> Side:
    """A side whose order of registration is only known if its keys still have it."""
    return Side(found, order=order)


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Weigh the named signals nothing, and leave out the named steps."""
    unknown = set(names) - set(signals()) - STEPS.keys()
    if unknown:
        raise ValueError(f"unknown signals {sorted(unknown)}; there are {', '.join(signals())}")
    original = solve.Weights
    weights = functools.partial(original, **{name: 0.0 for name in names if name not in STEPS})
    users = [m for name, m in sys.modules.items() if name.startswith("automatch.engine") and getattr(m, "Weights", None) is original]
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "Weights", weights))
        for module, step, replacement in (STEPS[name] for name in names if name in STEPS):
            stack.enter_context(mock.patch.object(module, step, replacement))
        yield


def run_job(job: tuple[Path, str, tuple[str, ...]]) -> dict[str, Any]:
    """One case without some signals, in a worker process."""
    import evaluate

    path, order, names = job
    with without(*names):
        return evaluate.engine_record(corpus_cases.load_case(path), order)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per ablation and order, the whole engine first."""
    switched = {"nothing": ()} | {f"`{name}`": (name,) for name in signals()} | GROUPS | {step: (step,) for step in STEPS}
    switched = {title: names for title, names in switched.items() if not args.only or title == "nothing" or title.strip("`") in args.only}
    paths = corpus_cases.case_paths(args.cases, directory=EXTRA) if args.extra else corpus_cases.case_paths(args.cases)
    rows = []
    with ProcessPoolExecutor(args.processes, mp_context=get_context("forkserver")) as pool:
        for order in args.orders:
            for title, names in switched.items():
                records = list(pool.map(run_job, [(path, order, names) for path in paths], chunksize=4))
                found = figures.figures(records)
                rows.append({"off": title, "signals": names, "order": order} | {column: found[column] for column in (*COLUMNS, "cases")})
    return rows


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """The rows as tables, one per order, with the difference to the whole engine."""
    lines = ["# Ablation", "", f"Each row: the engine as shipped, without one signal or group. Made by `{command}`.", ""]
    for order in dict.fromkeys(row["order"] for row in rows):
        here = [row for row in rows if row["order"] == order]
        whole = here[0]
        lines += [f"## Source keys in {order} order, {whole['cases']} cases", ""]
        lines += ["| without | perfect | difference | perfect, ≤ 1 answer | macro recall | difference | wrong | wrong ≥ .95 |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
        for row in here:
            perfect, recall = 100 * (row["perfect_share"] - whole["perfect_share"]), row["macro_recall"] - whole["macro_recall"]
            cells = f"{100 * row['perfect_share']:.1f} % | {perfect:+.1f} | {100 * row['one_answer_share']:.1f} %"
            counts = f"{row['macro_recall']:.4f} | {recall:+.4f} | {row['wrong']} | {row['confident_wrong']}"
            lines.append(f"| {row['off']} | {cells} | {counts} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="only cases whose id contains one of these words")
    parser.add_argument(
        "--only", nargs="*", default=[], choices=[*signals(), *GROUPS, *STEPS], metavar="SIGNAL", help="only these signals or groups"
    )
    parser.add_argument("--orders", nargs="*", choices=corpus_cases.ORDERS, default=["file", "sorted"])
    parser.add_argument("--extra", action="store_true", help="the cases of corpus_extra")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--print", action="store_true", dest="only_print")
    args = parser.parse_args(argv)
    rows = measure(args)
    text = markdown(rows, shlex.join(["python", "benchmarks/ablation.py", *(sys.argv[1:] if argv is None else argv)]))
    if not args.only_print:
        RESULTS.mkdir(exist_ok=True)
        name = "ablation_extra" if args.extra else "ablation"
        (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=0) + "\n")
        (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
