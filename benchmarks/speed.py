#!/usr/bin/env python3
"""How fast automatch is, how its time grows, and what it costs in memory; beside the tools there are.

    python benchmarks/speed.py                      # everything (about 15 minutes, most of it the other tools' time-outs)
    python benchmarks/speed.py --only small moe     # some rows; those of earlier runs stay
    python benchmarks/speed.py --tools automatch hungarian --timeout 60
    python benchmarks/speed.py --profile corpus:timm-vit_base_patch16_224-to-hf-vit    # where the time goes

Every measurement runs in an interpreter of its own. Times are medians; ratios are of one run; proposing is
timed by the processor's clock, loading and start-up by the wall's. Memory is the peak beyond an interpreter
that has imported torch. Results go to results/speed.{json,md}, and the main
figures of every run are appended to results/speed_history.jsonl.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import os
import platform
import pstats
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import speed_tables

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TOOLS = ("automatch", "hungarian", "weightbridge", "lit_wsl")
SMALL = {"ViT-B": "corpus:timm-vit_base_patch16_224-to-hf-vit", "BERT": "corpus:bert-gamma-beta-to-hf-seqcls"}
MOE = {"DeepSeek-V3, 45,395 keys": "corpus:deepseek-v3-original-to-hf4", "experts, 100,000 keys": "experts:64:520"}
GROWTH = {1019: "experts:8:40", 3187: "experts:16:64", 10107: "experts:24:138", 30283: "experts:40:250", 100291: "experts:64:520"}
ADVERSARIAL = {"20,000 random names of one shape": "random:20000"}


def task(*arguments: str, timeout: float) -> dict[str, Any]:
    """Run one task of `speed_tasks` in its own interpreter; a time-out or a crash is a result too.

    Args:
        arguments: the task and what it takes.
        timeout: seconds of processor time, whole ones.
    """
    command = [sys.executable, str(HERE / "speed_tasks.py"), "--limit", str(timeout), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"status": f"no answer within {timeout:g} s"}
    if done.returncode:
        return {"status": (done.stderr.strip().splitlines() or ["failed"])[-1][:200]}
    return {"status": "answered"} | json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def propose(names: dict[str, str], tools: list[str], repeats: int, timeout: float) -> dict[str, Any]:
    """Every tool on every case."""
    rows: dict[str, Any] = {}
    for title, name in names.items():
        rows[title] = {}
        for tool in tools:
            rows[title][tool] = task("propose", name, tool, str(repeats if tool in ("automatch", "hungarian") else 1), timeout=timeout)
            _say(f"{title}: {tool} {speed_tables.seconds_of(rows[title][tool])}")
    return rows


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Time over keys from 1,000 to 100,000, and the slope of the logarithms (least squares)."""
    rows = {keys: task("propose", name, "automatch", "3", timeout=args.timeout) for keys, name in GROWTH.items()}
    points = [(math.log(keys), math.log(statistics.median(row["seconds"]))) for keys, row in rows.items() if "seconds" in row]
    slope = statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else None
    _say(f"growth: slope {slope}")
    return {"rows": rows, "slope": slope}


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint with renamed keys through `automatch.load`, and one with the right keys through `load_state_dict`."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="automatch-speed-") as directory:
        found["file"] = task("write", directory, str(args.gigabytes), timeout=600)
        for way in ("copy", "assign"):
            runs: dict[str, list[dict[str, Any]]] = {"torch": [], "automatch": []}
            for _ in range(2 * args.repeats + 1):  # turn and turn about: fresh memory costs up to three times as much from run to run
                for tool, done in runs.items():
                    done.append(task("load", directory, tool, way, timeout=600))
            found[way] = {tool: _medians(done) for tool, done in runs.items()}
            _say(f"load ({way}): {found[way]}")
    return found


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [run for run in runs if "seconds" not in run]
    if failed:
        return failed[0]
    return {"status": "answered"} | {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "status"}


def importing(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of ``import torch``, of ``import automatch`` after it, and of the command's help beside a bare interpreter."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import automatch; "
        "c = time.perf_counter(); print(b - a, c - b)"
    )
    torch_seconds, own = zip(*(map(float, _run(["-c", code]).split()) for _ in range(args.repeats)), strict=True)
    return {
        "import_torch": statistics.median(torch_seconds),
        "import_automatch_after_torch": statistics.median(own),
        "help": _wall(["-m", "automatch", "--help"], args.repeats),
        "bare_interpreter": _wall(["-c", "pass"], args.repeats),
    }


def _run(arguments: list[str]) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=_environment()).stdout


def _wall(arguments: list[str], repeats: int) -> float | None:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        try:
            _run(arguments)
        except subprocess.CalledProcessError:
            return None
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def corpus(args: argparse.Namespace) -> dict[str, Any]:
    """Wall clock of the whole corpus on two processes, and the sum over its cases."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "accuracy.json")
        start = time.perf_counter()
        _run([str(HERE / "accuracy.py"), "--tools", "automatch", "--orders", "file", "--output", str(output)])
        wall = time.perf_counter() - start
        figures = json.loads(output.read_text())["runs"][0]["figures"]
    return {"wall": wall, "cases": figures["cases"], "sum": figures["seconds"], "slowest": figures["slowest"]}


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "small": lambda args: propose(SMALL, args.tools, 2 * args.repeats + 1, args.timeout),
    "moe": lambda args: propose(MOE, args.tools, 1, args.timeout),
    "growth": growth,
    "adversarial": lambda args: propose(ADVERSARIAL, args.tools, 1, args.timeout),
    "loading": loading,
    "importing": importing,
    "corpus": corpus,
}


def profile(name: str) -> None:
    """Print where `propose_mapping` spends its time on one case."""
    import corpus_cases
    import speed_inputs

    from automatch import propose_mapping

    case = speed_inputs.case_of(name)
    model, ckpt = corpus_cases.skeleton(case), corpus_cases.state_dict(case)
    propose_mapping(model, ckpt)
    profiler = cProfile.Profile()
    profiler.runcall(propose_mapping, model, ckpt)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(40)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _machine() -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return f"{os.cpu_count()} cores {model or platform.machine()}, Python {platform.python_version()}"


def _commit() -> str:
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken (default 5)")
    parser.add_argument("--timeout", type=float, default=120, help="processor seconds per measurement (default 120)")
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the checkpoint that is loaded (default 2)")
    parser.add_argument("--profile", metavar="CASE", help="profile one case instead, e.g. experts:16:64")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json", help="the .json to write; the .md goes beside it")
    args = parser.parse_args(argv)
    if args.profile:
        profile(args.profile)
        return
    data: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    data |= {"command": "python benchmarks/speed.py", "machine": _machine()}
    for part in args.only:
        data[part] = PARTS[part](args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(data, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(speed_tables.markdown(data))
    with args.output.with_name("speed_history.jsonl").open("a") as history:
        stamp = {"when": datetime.now(UTC).isoformat(timespec="minutes"), "commit": _commit(), "parts": args.only}
        history.write(json.dumps(stamp | speed_tables.main_figures(data)) + "\n")
    print(speed_tables.markdown(data))


if __name__ == "__main__":
    main()
