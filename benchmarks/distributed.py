"""Loading and converting with several ranks beside plain `torch.distributed.checkpoint`; and what 100,000 keys cost.

    python benchmarks/distributed.py --folder /tmp/bench

writes `benchmarks/results/distributed.md`. Every measured load runs in processes of its own, one after the other, with the
files out of the page cache; the variants take turns, and the medians of the repeats are printed. The processes are forked
from one that has imported torch, so that the time goes into what is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from distributed_ranks import layers_for, rank_main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "automatch.distributed.conversion",
        "automatch.distributed.loading",
    ]
)
RESULTS = Path(__file__).parent / "results" / "distributed.md"


def run_world(work: str, ranks: int, path: Path, layers: int, folder: Path) -> list[dict[str, Any]]:
    """Run one piece of work on fresh processes, with the files out of the page cache."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in path.rglob("*") if path.exists() else ():
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    arguments = (ranks, out / "store", work, path, layers, out)
    processes = [FORKS.Process(target=rank_main, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{work} failed on {ranks} ranks")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


ABOUT = (
    "float32, files out of the page cache before each load, medians of the repeats, the slowest or largest rank of each. Bytes",
    "read are what read calls returned. Peak memory is that of the process, with 0.3 GB of Python and torch in it. The model is",
    "sharded with `fully_shard` and on the meta device before the load, but in the rows that say otherwise: there the shards are",
    "staged beside the values that the model holds until all ranks agree, which costs a rank its share of the model once more.",
    "That is the price of all or nothing: load into a model on the meta device where memory is short, or with `in_place=True` over",
    "values that need not survive a failure. Plain `dcp.load` reads stored chunks whole; automatch reads the slices that a shard needs.",
)
# label of each row, and the row of plain DCP that it is compared with
ROWS = {
    "plain": ("`dcp.load`, right names", "plain"),
    "renamed": ("automatch, renamed", "plain"),
    "fused": ("automatch, renamed and q, k, v fused", "plain"),
    "plain materialised": ("`dcp.load`, right names, into a model that holds values", "plain materialised"),
    "materialised": ("automatch, renamed, into a model that holds values", "plain materialised"),
    "in place": ("automatch, renamed, into a model that holds values, `in_place=True`", "plain materialised"),
}


def compare(folder: Path, gigabytes: float, ranks: int, repeats: int) -> list[str]:
    """The tables of loads and of the conversion."""
    layers = layers_for(gigabytes)
    lines: list[str] = []
    for writers, rows in ((1, list(ROWS)), (ranks, list(ROWS)[:3])):
        path = folder / f"by{writers}"
        if not (path / ".metadata").exists():
            run_world("save", writers, path, layers, folder)
        total = sum(file.stat().st_size for file in path.iterdir())
        lines += [f"### Saved by {writers} rank{'s' * (writers > 1)}, loaded by {ranks} ({total / 1e9:.2f} GB on disk)", ""]
        lines += load_table(rows, path, layers, folder, ranks, repeats, total)
    return [*lines, *convert_table(folder, layers, ranks, repeats)]


def load_table(rows: list[str], path: Path, layers: int, folder: Path, ranks: int, repeats: int, total: int) -> list[str]:
    runs: dict[str, list[list[dict[str, Any]]]] = {work: [] for work in rows}
    for _ in range(repeats):
        for work in rows:
            runs[work].append(run_world(work, ranks, path, layers, folder))
            print(
                work, [f"{r['seconds']:.1f} s, {r['peak'] / 1e9:.2f} GB, read {r['read'] / 1e9:.2f} GB" for r in runs[work][-1]], flush=True
            )

    def median(work: str, field: str) -> float:
        return statistics.median(max(rank[field] for rank in world) for world in runs[work])

    def ratio(work: str, field: str) -> str:
        return f"{median(work, field) / median(ROWS[work][1], field):.2f}"

    lines = [
        "| | seconds (slowest rank) | × plain | processor seconds | × plain | peak memory per rank | × plain | read per rank | of all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for work in rows:
        seconds, process, read = (median(work, field) for field in ("seconds", "process", "read"))
        cells = [f"{seconds:.2f}", ratio(work, "seconds"), f"{median(work, 'processor'):.2f}", ratio(work, "processor")]
        cells += [f"{process / 1e9:.2f} GB", ratio(work, "process"), f"{read / 1e9:.2f} GB", f"{read / total:.2f}"]
        lines.append(f"| {ROWS[work][0]} | {' | '.join(cells)} |")
    return [*lines, ""]


def convert_table(folder: Path, layers: int, ranks: int, repeats: int) -> list[str]:
    path = folder / f"by{ranks}"
    total = sum(file.stat().st_size for file in path.iterdir())
    lines = [f"### DCP directory to safetensors folder, renamed ({total / 1e9:.2f} GB, files of 0.5 GB)", ""]
    lines += ["| | seconds | GB/s | peak memory per rank |", "|---|---|---|---|"]
    worlds: dict[int, list[list[dict[str, Any]]]] = {1: [], ranks: []}
    copies: list[float] = []
    for _ in range(repeats):
        for count in worlds:
            worlds[count].append(run_world("convert", count, path, layers, folder))
            shutil.rmtree(folder / "converted")
            print("convert", count, worlds[count][-1], flush=True)
        clock = time.perf_counter()
        subprocess.run(["sh", "-c", f"cp -r {path} {folder / 'copied'} && sync -f {folder / 'copied'}"], check=True)
        copies.append(time.perf_counter() - clock)
        shutil.rmtree(folder / "copied")
    seconds = statistics.median(copies)
    lines.append(f"| `cp -r` and `sync` | {seconds:.2f} | {total / seconds / 1e9:.2f} | |")
    for count, found in worlds.items():
        seconds = statistics.median(max(rank["seconds"] for rank in world) for world in found)
        peak = statistics.median(max(rank["peak"] for rank in world) for world in found)
        lines.append(f"| automatch, {count} rank{'s' * (count > 1)} | {seconds:.2f} | {total / seconds / 1e9:.2f} | {peak / 1e9:.2f} GB |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints are kept")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keys", type=int, default=100_000, help="how many keys the simulated ranks plan for")
    options = parser.parse_args()
    from distributed_scale import scale_tables

    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    lines = compare(options.folder, options.gigabytes, options.ranks, options.repeats)
    lines += scale_tables(options.folder, options.keys)
    command = "python benchmarks/distributed.py " + " ".join(sys.argv[1:])
    machine = f"{os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}, gloo"
    head = [
        "# Distributed loading and conversion",
        "",
        f"`{command}` on {machine}; {time.perf_counter() - started:.0f} s in all.",
        f"Load average at the end: {os.getloadavg()[1]:.1f} over five minutes, of which this benchmark makes {options.ranks}.",
        "",
        *ABOUT,
        "",
    ]
    text = "\n".join([*head, *lines])
    print(text)
    (options.folder / "results.md" if options.gigabytes < 1 else RESULTS).write_text(text)


if __name__ == "__main__":
    main()
