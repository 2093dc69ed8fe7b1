"""Converting and opening large checkpoints: speed beside cp, memory, and bytes read to propose.

    python benchmarks/convert.py --gigabytes 2 --to benchmarks/results/convert.md

Each figure is of a process of its own: its wall time with everything brought to the disk (fsync), and its
peak memory (VmHWM, which does not count what the process before it used). The ways take turns, three rounds
each, and the median is shown. On a disk shared with others, or one that is fast only in bursts, the ratios say little:
--folder /dev/shm leaves the disk out. The 10 GB folder is sparse: its headers are real, its tensors are holes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LAYERS = 48


def state_dict(gigabytes: float) -> dict[str, torch.Tensor]:
    """A transformer's keys and shapes, of so many bytes in bfloat16."""
    width = int((gigabytes * 0.8 * 2**30 / 2 / LAYERS / 12) ** 0.5) // 64 * 64
    shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width), "up": (4 * width, width)}
    shapes["down"] = (width, 4 * width)
    every = {f"layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    # The largest tensor is turned too, where every second one is: it decides the peak memory.
    every = {"norm.weight": (width,), "embed.weight": (int(gigabytes * 0.2 * 2**30 / 2 / width), width), **every}
    return {key: torch.randint(0, 2**15, shape, dtype=torch.int16).view(torch.bfloat16) for key, shape in every.items()}


def mapping_of(path: Path, turn: bool):
    """Rename every key; with `turn`, transpose every second one, so that it has to be decoded."""
    from automatch import KeyMapping, Match, StateSpec, TensorSpec, open_checkpoint
    from automatch.mapping import Side
    from automatch.transforms import Copy, Permute

    source = open_checkpoint(path).spec
    matches, target = [], []
    for number, tensor in enumerate(source):
        turned = turn and len(tensor.shape) == 2 and (number % 2 == 1 or tensor.key == "embed.weight")
        matches.append(Match(f"model.{tensor.key}", (tensor.key,), Permute((1, 0)) if turned else Copy(), confidence=1.0))
        target.append(TensorSpec(f"model.{tensor.key}", tensor.shape[::-1] if turned else tensor.shape, tensor.dtype))
    return KeyMapping(Side.of(source), Side.of(StateSpec(tuple(target), "model")), tuple(matches))


STEPS = {
    "convert": "from automatch import KeyMapping\nKeyMapping.load(sys.argv[3]).convert(src, out)",
    "verified": "from automatch import KeyMapping\nKeyMapping.load(sys.argv[3]).convert(src, out, verify=True)",
    "naive safetensors": """
from safetensors.torch import load_file, save_file
save_file({'model.' + key: value for key, value in load_file(src).items()}, out)
with open(out, 'rb') as file: os.fsync(file.fileno())""",
    "naive torch": """
import torch
content = torch.load(src, weights_only=True)
content['state_dict'] = {'model.' + key: value for key, value in content['state_dict'].items()}
torch.save(content, out)
with open(out, 'rb') as file: os.fsync(file.fileno())""",
}
PROLOGUE = "import os, sys\nsrc, out = sys.argv[1:3]\n"
EPILOGUE = "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"


def run(way: str, source: Path, out: Path, mapping: Path) -> tuple[float, float]:
    """Seconds and peak MB of one way to write ``out``."""
    for path in (out, *out.parent.glob(f"{out.name}*")):
        path.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    if way == "cp":
        subprocess.run(["cp", "--reflink=never", source, out], check=True)
        subprocess.run(["sync", out], check=True)
        return time.perf_counter() - start, 0.0
    if way == "cp, not synced":
        subprocess.run(["cp", "--reflink=never", source, out], check=True)
        return time.perf_counter() - start, 0.0
    command = [sys.executable, "-c", PROLOGUE + STEPS[way] + EPILOGUE, str(source), str(out), str(mapping)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024


def throughput(folder: Path, gigabytes: float, rounds: int) -> list[str]:
    """A table of every way to rename the keys of one file."""
    from safetensors.torch import save_file

    state = state_dict(gigabytes)
    largest = max(value.nbytes for value in state.values()) / 2**20
    files = {"safetensors": folder / "source.safetensors", "torch": folder / "source.ckpt"}
    save_file(state, files["safetensors"])
    torch.save({"state_dict": state, "epoch": 3}, files["torch"])
    del state
    rows = []
    for kind, source in files.items():
        renamed, turned = folder / "renamed.json", folder / "turned.json"
        mapping_of(source, False).save(renamed)
        mapping_of(source, True).save(turned)
        out = folder / f"out{source.suffix}"
        ways = {
            "`cp` and `sync`": ("cp", renamed),
            "automatch, pure rename": ("convert", renamed),
            "automatch, every second tensor transposed": ("convert", turned),
            "automatch, pure rename, `verify=True`": ("verified", renamed),
            "load everything, rename, save": (f"naive {kind}", renamed),
            "`cp`, not synced": ("cp, not synced", renamed),
        }
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(rounds):  # another way begins each round: a disk gives the first ones more than it can keep up
            for name, (way, mapping) in (list(ways.items()) * 2)[turn : turn + len(ways)]:
                results[name].append(run(way, source, out, mapping))
        size = source.stat().st_size
        base = statistics.median(seconds for seconds, _ in results["`cp` and `sync`"])
        for name, measured in results.items():
            seconds, memory = statistics.median(s for s, _ in measured), max(m for _, m in measured)
            speed = size / seconds / 1e6
            rows.append(f"| {kind} | {name} | {seconds:.1f} | {speed:.0f} | {base / seconds:.2f} | {f'{memory:.0f}' if memory else '–'} |")
            print(rows[-1], flush=True)
        out.unlink(missing_ok=True)
    head = f"One file of {gigabytes:g} GB, {LAYERS * 6 + 2} tensors, the largest {largest:.0f} MiB; median of {rounds} rounds.\n"
    return [head, "| file | way | seconds | MB/s | speed of `cp` = 1 | peak MiB |", "|-|-|-|-|-|-|", *rows, ""]


def sparse_folder(folder: Path, gigabytes: float, shards: int = 5) -> None:
    """A sharded safetensors folder of a transformer whose tensors are holes."""
    folder.mkdir()
    width = max(int((gigabytes * 2**30 / 2 / LAYERS / 12) ** 0.5) // 8 * 8, 8)
    shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width), "up": (4 * width, width)}
    shapes["down"] = (width, 4 * width)
    shapes |= {"norm1": (width,), "norm2": (width,)}
    weight_map = {}
    for shard in range(shards):
        name, header, at = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors", {}, 0
        for i in range(shard, LAYERS, shards):
            for leaf, shape in shapes.items():
                size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
                header[f"layers.{i}.{leaf}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
                weight_map[f"layers.{i}.{leaf}.weight"] = name
                at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


PROPOSE = """
import os, sys, time
from automatch import propose_mapping, open_checkpoint
from automatch.specs import StateSpec, TensorSpec
import scipy.optimize, rapidfuzz
def number(path, name):
    return int(next(line.split()[1] for line in open(path) if line.startswith(name)))
source = open_checkpoint(sys.argv[1]).spec
model = StateSpec(tuple(TensorSpec('model.' + t.key.replace('layers', 'blocks'), t.shape, t.dtype) for t in source))
before = number('/proc/self/io', 'rchar')
start = time.perf_counter()
with open_checkpoint(sys.argv[1]) as checkpoint:
    opened, read = time.perf_counter() - start, number('/proc/self/io', 'rchar') - before
start = time.perf_counter()
before = number('/proc/self/io', 'rchar')
mapping = propose_mapping(model, sys.argv[1])
took, read_too = time.perf_counter() - start, number('/proc/self/io', 'rchar') - before
print(len(mapping), opened, read, took, read_too, number('/proc/self/status', 'VmHWM'))
"""


def headers_only(folder: Path) -> list[str]:
    """What opening and proposing read, for folders of the same keys and other sizes."""
    rows = ["| folder | keys fed | open, ms | bytes read | propose, s | bytes read | peak MiB |", "|-|-|-|-|-|-|-|"]
    for gigabytes in (0.01, 1, 10):
        path = folder / f"sparse-{gigabytes}"
        sparse_folder(path, gigabytes)
        size = sum(part.stat().st_size for part in path.iterdir())
        done = subprocess.run([sys.executable, "-c", PROPOSE, str(path)], check=True, capture_output=True, text=True)
        keys, opened, read, proposed, read_too, memory = map(float, done.stdout.split())
        figures = [f"{keys:.0f}", f"{opened * 1000:.0f}", f"{read:,.0f}", f"{proposed:.2f}", f"{read_too:,.0f}", f"{memory / 1024:.0f}"]
        rows.append(f"| {size / 1e9:.2f} GB | {' | '.join(figures)} |")
        print(rows[-1], flush=True)
        shutil.rmtree(path)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the large files are made (default: the temporary folder)")
    parser.add_argument("--to", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        lines = ["# Large checkpoints\n", f"`python benchmarks/convert.py {' '.join(sys.argv[1:])}`\n", "## Headers only\n"]
        lines += ["A sparse sharded safetensors folder; bytes are those that the process read.\n", *headers_only(Path(name))]
        lines += ["\n## Throughput and memory\n", *throughput(Path(name), options.gigabytes, options.rounds)]
    text = "\n".join(lines)
    if options.to:
        options.to.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
