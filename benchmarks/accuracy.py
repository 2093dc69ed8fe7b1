#!/usr/bin/env python3
"""How right automatch is on the corpus, beside what people use today.

    python benchmarks/accuracy.py                          # as shipped: own, sorted and shuffled order, and the baselines
    python benchmarks/accuracy.py --loo                    # the same, and every learnt table refitted without the group under test
    python benchmarks/accuracy.py --generated 400          # and on 400 random refactorings of real models
    python benchmarks/accuracy.py --merge other.json       # take over runs that were measured elsewhere
    python benchmarks/accuracy.py --directory benchmarks/corpus_extra/cases   # other cases; nothing is written
    python benchmarks/accuracy.py llama bert --print       # only cases whose id has one of these words; nothing is written

Each case goes through the public `propose_mapping` alone: a module skeleton on the meta device and a dict
of meta tensors. The figures are those of `scoring.py`, and:

perfect, <= 1 answer   for every question, a person who knows the truth takes the option that agrees with it most (or passes,
                       if none agrees at all); the case counts if one such answer, alone, makes it perfect
op right               of the pairs with the right sources: the transform's op, and its axes and lengths, are the truth's too
no answer              the tool raised, refused, or reached the time limit: all keys count as missed

Leave-one-family-out leaves out whole groups of related families: see `families.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import baselines
import corpus_cases
import figures
from families import group_of

RESULTS = Path(__file__).parent / "results"
TOOLS = ("automatch", *baselines.BASELINES)


@dataclass(frozen=True, slots=True)
class Job:
    """One tool on one case.

    Args:
        tool: "automatch" or a name of `baselines.BASELINES`.
        order: "file", "sorted", "shuffled" or "generated".
        case: path of a corpus case, or the seed of a generated one.
        tables: file of learnt tables to use in place of the shipped ones; None for those.
        timeout: seconds of processor time.
    """

    tool: str
    order: str
    case: Path | int
    tables: Path | None
    timeout: float

    @property
    def run(self) -> tuple[str, str, str]:
        """The run it belongs to: tool, tables, order."""
        return self.tool, "left-out" if self.tables else "shipped", self.order


def run_job(job: Job) -> dict[str, Any]:
    """Run one job in a worker process."""
    import evaluate

    case = _case(job.case)
    order = "file" if job.order == "generated" else job.order
    if job.tool != "automatch":
        return evaluate.baseline_record(job.tool, case, order, timeout=job.timeout)
    with _using(job.tables):
        return evaluate.engine_record(case, order, timeout=job.timeout)


@lru_cache(maxsize=2)
def _case(case: Path | int) -> dict[str, Any]:
    if isinstance(case, Path):
        return corpus_cases.load_case(case)
    import generator

    return generator.generate(case)


def _using(tables: Path | None) -> AbstractContextManager[Any]:
    if tables is None:
        return nullcontext()
    from automatch.engine import tables as engine_tables  # learnt data; no public face, for it is fitted here only

    return engine_tables.use(_unpickled(tables))


@lru_cache(maxsize=2)
def _unpickled(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def fit_without(group: str, directory: Path) -> Path:
    """Fit every learnt table on the corpus without ``group`` and keep the result in ``directory``."""
    from fit import fit

    path = directory / f"{group}.pickle"
    path.write_bytes(pickle.dumps(fit([case for case in corpus_cases.load_cases() if group_of(case["family"]) != group])))
    return path


def jobs_for(args: argparse.Namespace, run_all: Callable[..., Iterable[Path]], directory: Path) -> list[Job]:
    """Every job that the command line asks for, heaviest cases first."""
    paths = sorted(corpus_cases.case_paths(args.cases, directory=args.directory), key=lambda path: -path.stat().st_size)
    cases: list[tuple[str, Path | int]] = [(order, path) for order in args.orders for path in paths]
    cases += [("generated", seed) for seed in range(args.generated)]
    jobs = [Job("automatch", order, case, None, args.timeout) for order, case in cases]
    jobs += [Job(tool, order, case, None, args.tool_timeout) for tool in args.tools if tool != "automatch" for order, case in cases]
    if args.loo:
        groups = {case: group_of(_case(case)["family"]) for _, case in cases}
        names = sorted(set(groups.values()))
        fitted = dict(zip(names, run_all(fit_without, names, [directory] * len(names)), strict=True))
        jobs += [
            Job("automatch", order, case, fitted[groups[case]], args.timeout) for order, case in sorted(cases, key=lambda c: groups[c[1]])
        ]
    return [job for job in jobs if job.tool in args.tools]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all jobs and gather them by run."""
    records: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as directory, _pool(args.processes) as pool:
        run_all = pool.map if pool else map
        jobs = jobs_for(args, run_all, Path(directory))
        for job, record in zip(jobs, _progress(run_all(run_job, jobs), len(jobs)), strict=True):
            records.setdefault(job.run, []).append(record)
    for members in records.values():
        members.sort(key=lambda record: record["id"])
    return [figures.run_data(*run, members) for run, members in records.items()]


def _pool(processes: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    return ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) if processes > 1 else nullcontext()


def _progress(results: Iterable[dict[str, Any]], total: int) -> Iterable[dict[str, Any]]:
    for done, result in enumerate(results, 1):
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True)
        yield result
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new``, with those runs of ``old`` that were not run again: the slow baselines need not be repeated."""
    again = {(run["tool"], run["tables"], run["order"]) for run in new["runs"]}
    kept = [run for run in old.get("runs", []) if (run["tool"], run["tables"], run["order"]) not in again]
    rank = {tool: place for place, tool in enumerate(TOOLS)}
    orders = (*corpus_cases.ORDERS, "generated")
    runs = sorted([*kept, *new["runs"]], key=lambda r: (orders.index(r["order"]), rank.get(r["tool"], 99), r["tables"]))
    return new | {"runs": runs}


def _versions() -> str:
    found = []
    for package in ("automatch", "torch", "numpy", "scipy", "rapidfuzz", "weightbridge", "lit-wsl"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("cases", nargs="*", help="only cases whose id contains one of these words")
    result.add_argument("--orders", nargs="*", choices=corpus_cases.ORDERS, default=list(corpus_cases.ORDERS), help="default: all three")
    result.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS), help="default: automatch and all baselines")
    result.add_argument("--loo", action="store_true", help="also leave-one-family-out")
    result.add_argument("--generated", type=int, default=0, metavar="N", help="also N random refactorings (generator.py)")
    result.add_argument("--processes", type=int, default=2, help="default 2; 1 runs everything in this process")
    result.add_argument("--timeout", type=float, default=120, help="processor seconds per case for automatch (default 120)")
    result.add_argument("--tool-timeout", type=float, default=20, help="processor seconds per case for each baseline (default 20)")
    result.add_argument(
        "--merge", nargs="*", type=Path, default=[], metavar="JSON", help="take over runs from other results; measure nothing"
    )
    result.add_argument("--directory", type=Path, default=corpus_cases.CASES, help="folder of the cases; another one implies --print")
    result.add_argument("--print", action="store_true", dest="only_print", help="print the page, write nothing")
    result.add_argument("--output", type=Path, default=RESULTS / "accuracy.json", help="the .json to write; the .md goes beside it")
    return result


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, and write both files."""
    args = parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.merge:
        _write(args.output, _merged_files(args.output, args.merge))
        return
    command = " ".join(["python benchmarks/accuracy.py", *(sys.argv[1:] if argv is None else argv)])
    data: dict[str, Any] = {"versions": _versions(), "runs": [run | {"command": command} for run in measure(args)]}
    if args.only_print or args.directory != corpus_cases.CASES:
        print(figures.markdown(data, baselines.TITLES))
        return
    if args.output.exists() and not args.cases:
        data = merged(json.loads(args.output.read_text()), data)
    _write(args.output, data)


def _merged_files(output: Path, others: list[Path]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"runs": []}
    for other in others:
        found = json.loads(other.read_text())
        data = {"versions": found["versions"]} | data
        data["runs"] = merged(data, found)["runs"]
    return data


def _write(output: Path, data: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(figures.dumps(data))
    page = figures.markdown(data, baselines.TITLES)
    output.with_suffix(".md").write_text(page)
    print(page.split("## Per ")[0])


if __name__ == "__main__":
    main()
