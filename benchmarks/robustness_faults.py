"""Conversions that are killed, or whose disk is full: what is left is counted. Results stand in robustness.md.

    python benchmarks/robustness_faults.py --kills 100

The full disk is a tmpfs of 24 MB and needs the right to mount one; without it that row is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from convert import mapping_of
from safetensors.torch import save_file

from automatch import CheckpointError, KeyMapping, open_checkpoint


def digest(path: Path) -> str:
    return hashlib.file_digest(path.open("rb"), "sha256").hexdigest()


def whole(out: Path, mapping: KeyMapping, source: Path) -> bool:
    """Whether every tensor of ``out`` can be read and is what it must be."""
    expected = mapping.apply(source)
    with open_checkpoint(out) as written:
        return all(torch.equal(written.tensor(key).view(torch.int16), value.view(torch.int16)) for key, value in expected.items())


def kills(folder: Path, source: Path, out: Path, count: int) -> str:
    """Kill conversions, each in a process of its own, at random moments of their run."""
    mapping = mapping_of(source, True)
    before, took = digest(source), []
    for _ in range(3):
        start = time.perf_counter()
        os.waitpid(_fork(mapping, source, out), 0)
        took.append(time.perf_counter() - start)
        _remove(out)
    moments, outcome = random.Random(0), Counter[str]()
    while outcome["killed"] < count:
        child = _fork(mapping, source, out)
        time.sleep(moments.uniform(0, 1.1 * statistics.median(took)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        outcome["killed" if os.WIFSIGNALED(status) else "ended before"] += 1
        outcome["input changed"] += digest(source) != before
        outcome["output absent" if not out.exists() else "output whole" if whole(out, mapping, source) else "output broken"] += 1
        _remove(out)
    left = sum(1 for _ in folder.glob(".*.tmp"))
    order = ("killed", "ended before", "output absent", "output whole", "output broken", "input changed")
    return f"| {source.name} → {out.name} | {' | '.join(str(outcome[name]) for name in order)} | {left} |"


def _fork(mapping: KeyMapping, source: Path, out: Path) -> int:
    child = os.fork()
    if child == 0:
        mapping.convert(source, out)
        os._exit(0)
    return child


def _remove(path: Path) -> None:
    if path.is_dir():
        for part in path.iterdir():
            part.unlink()
        path.rmdir()
    path.unlink(missing_ok=True)


def full_disk(folder: Path, source: Path) -> list[str]:
    """Convert onto disks that are too small by ever less; the check beforehand is switched off."""
    import automatch.convert as module

    small = folder / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], check=False, capture_output=True).returncode:
        return []
    mapping, before, outcome = mapping_of(source, True), digest(source), Counter[str]()
    check, module.check_space = module.check_space, lambda path, needed: None
    try:
        for filler in range(0, 24, 1):
            (small / "filler").write_bytes(bytes(filler * 2**20))
            for name in ("out.safetensors", "out.pt", "out"):
                try:
                    mapping.convert(source, small / name)
                    outcome["whole" if whole(small / name, mapping, source) else "broken"] += 1
                    _remove(small / name)
                except CheckpointError as error:
                    outcome["refused" if "No space left on device" in str(error) else "refused otherwise"] += 1
                outcome["left behind"] += [path.name for path in small.iterdir()] != ["filler"]
        outcome["input changed"] += digest(source) != before
    finally:
        module.check_space = check
        subprocess.run(["umount", small], check=False)
    return [f"| {' | '.join(str(outcome[name]) for name in ('refused', 'whole', 'broken', 'left behind', 'input changed'))} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other threads
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        state = {f"layers.{i}.weight": torch.randint(0, 2**15, (512, 512), dtype=torch.int16).view(torch.bfloat16) for i in range(40)}
        save_file(state, folder / "a.safetensors")
        torch.save({"state_dict": state, "epoch": 1}, folder / "a.ckpt")
        print("| conversion | killed | ended before | output absent | whole | broken | input changed | temporary folders left |")
        print("|-|-|-|-|-|-|-|-|")
        for source, out in (("a.safetensors", "b.safetensors"), ("a.ckpt", "b.ckpt"), ("a.safetensors", "b")):
            print(kills(folder, folder / source, folder / out, options.kills), flush=True)
        rows = full_disk(folder, folder / "a.safetensors")
        if rows:
            print("\n| full disk: refused | whole | broken | left behind | input changed |\n|-|-|-|-|-|", *rows, sep="\n")


if __name__ == "__main__":
    main()
