"""Coverage-guided fuzzing of every reader, with atheris; the results stand in robustness.md.

    pip install atheris "automatch[gguf,keras]"
    python benchmarks/robustness_fuzz.py --seconds 120          # every target, one after the other
    python benchmarks/robustness_fuzz.py --target flax          # one of them, until it is stopped
    python benchmarks/robustness_fuzz.py --target flax crash-…  # one input again

A reader may give tensors or raise `CheckpointError`; anything else (another exception, 60 seconds, 3 GB) is a finding.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "readers"))


def as_it_is(name: str) -> Callable[[Path, bytes], Path]:
    """The input is the whole file."""

    def build(folder: Path, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return build


def in_torch_zip(folder: Path, data: bytes) -> Path:
    from hostile import torch_zip

    return as_it_is("model.pt")(folder, torch_zip(data, **{f"data/{i}": bytes(64) for i in range(4)}))


def in_safetensors_header(folder: Path, data: bytes) -> Path:
    from hostile import safetensors

    return as_it_is("model.safetensors")(folder, safetensors(data, bytes(64)))


def in_npz(folder: Path, data: bytes) -> Path:
    import zipfile

    with zipfile.ZipFile(folder / "model.npz", "w") as archive:
        archive.writestr("w.npy", data)
    return folder / "model.npz"


def in_dcp(folder: Path, data: bytes) -> Path:
    (folder / "__0_0.distcp").write_bytes(bytes(2000))
    (folder / ".metadata").write_bytes(data)
    return folder


TARGETS: dict[str, Callable[[Path, bytes], Path]] = {
    "safetensors": as_it_is("model.safetensors"),
    "safetensors header": in_safetensors_header,
    "index": as_it_is("model.safetensors.index.json"),
    "torch zip": as_it_is("model.pt"),
    "torch pickle": in_torch_zip,
    "torch legacy": as_it_is("legacy.pt"),
    "dcp": in_dcp,
    "npz": in_npz,
    "flax": as_it_is("model.msgpack"),
    "gguf": as_it_is("model.gguf"),
    "keras": as_it_is("model.h5"),
}


def seeds(target: str) -> list[bytes]:
    """Valid inputs of a target, from which the fuzzer starts."""
    import io
    import zipfile

    from hostile import DATA, SAFETENSORS, TORCH, valid

    files = valid()
    match target:
        case "safetensors":
            return [files["model.safetensors"], *(content for content, _ in SAFETENSORS.values())]
        case "safetensors header":
            return [files["model.safetensors"][8:].partition(b"}}")[0] + b"}}"]
        case "torch zip":
            return [files["zip.pt"], files["new.pt"]]
        case "torch pickle":
            whole = [files["zip.pt"], files["new.pt"], *(content for content, _ in TORCH.values() if len(content) < 10_000)]
            return [_member(content) for content in whole]
        case "torch legacy":
            return [files["legacy.pt"], files["plain.pkl"]]
        case "dcp":
            return [(DATA / "dcp_two_ranks" / ".metadata").read_bytes()]
        case "npz":
            with zipfile.ZipFile(io.BytesIO(files["model.npz"])) as archive:
                return [archive.read(name) for name in archive.namelist()]
        case "flax":
            return [files["flax.msgpack"], files["flax_chunked.msgpack"]]
        case "gguf":
            return [files["small.gguf"]]
        case "keras":
            return [(DATA / "keras.weights.h5").read_bytes()]
        case _:
            return [b'{"metadata": {"total_size": 96}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}']


def _member(content: bytes) -> bytes:
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def fuzz(target: str, arguments: list[str]) -> None:
    """Run one target in this process until libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["automatch", "pickletools", "zipfile", "json", "numpy.lib"]):
        from automatch.errors import CheckpointError
        from automatch.readers import open_checkpoint

    build = TARGETS[target]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)

        def once(data: bytes) -> None:
            path = build(folder, data)
            try:
                with open_checkpoint(path) as checkpoint:
                    for spec in checkpoint.spec:
                        checkpoint.tensor(spec.key)
            except CheckpointError:
                pass

        for seed in seeds(target):  # what is imported late is imported now, and not within a measured run
            once(seed)
        atheris.Setup([sys.argv[0], *arguments], once)
        atheris.Fuzz()


def run_all(targets: list[str], seconds: int) -> None:
    """Run each target in a process of its own and print one row for each."""
    print("| target | seconds | executions | features covered | findings |\n|-|-|-|-|-|", flush=True)
    for target in targets:
        with tempfile.TemporaryDirectory() as corpus, tempfile.TemporaryDirectory() as crashes:
            for number, seed in enumerate(seeds(target)):
                (Path(corpus) / str(number)).write_bytes(seed)
            limits = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=3000", f"-artifact_prefix={crashes}/", "-max_len=65536"]
            command = [sys.executable, __file__, "--target", target, "--", corpus, *limits, "-print_final_stats=1"]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            found = sorted(path.name for path in Path(crashes).iterdir())
            for path in Path(crashes).iterdir():
                (HERE / "findings").mkdir(exist_ok=True)
                (HERE / "findings" / f"{target}-{path.name}").write_bytes(path.read_bytes())
            units = re.findall(r"number_of_executed_units: (\d+)", done.stderr) or re.findall(r"#(\d+)", done.stderr) or ["?"]
            features = re.findall(r"ft: (\d+)", done.stderr) or ["?"]
            print(f"| {target} | {seconds} | {units[-1]} | {features[-1]} | {', '.join(found) or 'none'} |", flush=True)
            if found:
                print("\n".join(done.stderr.splitlines()[-40:]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--only", nargs="+", choices=TARGETS, help="with no --target: these alone")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("rest", nargs="*")
    options, unknown = parser.parse_known_args()
    if options.target:
        fuzz(options.target, [*options.rest, *unknown])
    else:
        run_all(options.only or list(TARGETS), options.seconds)
