"""What is left after a conversion that fails: the input as it was, and no output, or the one before."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from automatch import CheckpointError, KeyMapping, Match, open_checkpoint
from automatch.mapping import Side
from automatch.transforms import Permute


@pytest.fixture(params=["a.safetensors", "a.pt"])
def ckpt(request, tmp_path):
    state = {f"layers.{i}.weight": torch.randn(64, 64) for i in range(8)}
    path = tmp_path / request.param
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 1}, path)
    return path


def mapping_of(path) -> KeyMapping:
    source = open_checkpoint(path).spec
    matches = [Match(f"net.{key}", (key,)) for key in source.keys]
    matches[3] = Match("net.turned", (source.keys[3],), Permute((1, 0)))
    target = [type(t)(m.target, t.shape, t.dtype) for m, t in zip(matches, source, strict=True)]
    return KeyMapping(Side.of(source), Side.of(type(source)(tuple(target), "model")), tuple(matches))


FAULTS = [("write", errno.ENOSPC), ("copy_file_range", errno.ENOSPC), ("fsync", errno.EIO), ("preadv", errno.EIO)]
outputs = pytest.mark.parametrize("out", ["b.safetensors", "b.pt", "b"])


def check_left(ckpt, before, out):
    assert ckpt.read_bytes() == before
    assert sorted(path.name for path in ckpt.parent.iterdir()) == sorted({ckpt.name, out.name} if out.exists() else {ckpt.name})


@outputs
@pytest.mark.parametrize(("function", "fault"), FAULTS)
@pytest.mark.parametrize("moment", [0, 5])
def test_a_full_or_failing_disk(ckpt, out, function, fault, moment, monkeypatch):
    before, mapping, out = ckpt.read_bytes(), mapping_of(ckpt), ckpt.parent / out
    real, calls = getattr(os, function), []

    def failing(*args):
        calls.append(args)
        if len(calls) > moment:
            raise OSError(fault, os.strerror(fault))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        if function == "copy_file_range" and ckpt.suffix == out.suffix == ".pt" and moment == 5:
            pytest.skip("the archive is written with fewer calls")
        with contextlib.suppress(CheckpointError):
            mapping.convert(ckpt, out)
        assert out.exists() is (len(calls) <= moment)
    check_left(ckpt, before, out)


def test_a_disk_without_room_is_known_beforehand(ckpt, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"needs 131072 bytes, but its disk has 1000 left; nothing was written"):
        mapping_of(ckpt).convert(ckpt, ckpt.parent / "b.pt")


@outputs
@pytest.mark.parametrize("change", ["truncate", "append", "overwrite"])
def test_a_file_that_changes_while_it_is_read(ckpt, out, change):
    mapping, out = mapping_of(ckpt), ckpt.parent / out

    def progress(done: int, _: int) -> None:
        if done < 40_000:
            return
        with ckpt.open("r+b") as file:
            match change:
                case "truncate":
                    file.truncate(30_000)
                case "append":
                    file.seek(0, os.SEEK_END)
                    file.write(b"more")
                case _:
                    file.seek(20_000)
                    file.write(b"other")

    time.sleep(0.02)  # a file system keeps times in steps of a few milliseconds
    with pytest.raises(CheckpointError, match=r"changed while it was read|cut short while it was read|truncated"):
        mapping.convert(ckpt, out, progress=progress)
    assert not out.exists()
    assert sorted(path.name for path in ckpt.parent.iterdir()) == [ckpt.name]


@outputs
def test_a_file_that_is_replaced_is_read_to_its_end(ckpt, out, tmp_path_factory):
    """Its name belongs to another file then, but the one that was opened is whole."""
    mapping, out = mapping_of(ckpt), ckpt.parent / out
    expected = mapping.apply(ckpt)
    other = tmp_path_factory.mktemp("other") / "x"

    def progress(done: int, _: int) -> None:
        other.write_bytes(b"something else")
        other.replace(ckpt)

    mapping.convert(ckpt, out, progress=progress, verify=True)
    with open_checkpoint(out) as written:
        assert all(torch.equal(written.tensor(key), value) for key, value in expected.items())


@outputs
def test_an_interrupt_leaves_nothing_behind(ckpt, out):
    before, out = ckpt.read_bytes(), ckpt.parent / out

    def progress(done: int, _: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapping_of(ckpt).convert(ckpt, out, progress=progress)
    check_left(ckpt, before, out)


def test_the_output_before_stays_when_a_new_one_fails(ckpt, monkeypatch):
    out = ckpt.parent / "b.safetensors"
    out.write_bytes(b"the one before")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CheckpointError, match=r"writing .*b\.safetensors' failed: Input/output error; nothing was left behind"):
        mapping_of(ckpt).convert(ckpt, out)
    assert out.read_bytes() == b"the one before"


@outputs
def test_bytes_that_come_back_changed_are_found_by_verify(ckpt, out, monkeypatch):
    from automatch.convert.output import Output

    real = Output.sync

    def sync(self):
        if self.position > 20_000:
            self.rewrite(20_000, bytes(reversed(range(64))))
        real(self)

    monkeypatch.setattr(Output, "sync", sync)
    with pytest.raises(CheckpointError, match="reads back other than it was written"):
        mapping_of(ckpt).convert(ckpt, ckpt.parent / out, verify=True)
    assert not (ckpt.parent / out).exists()


KILLED = """
import sys
from pathlib import Path
from automatch import KeyMapping
mapping = KeyMapping.load(sys.argv[1])
print("ready", flush=True)
mapping.convert(sys.argv[2], sys.argv[3])
"""


def test_what_a_killed_conversion_left_is_swept_by_the_next_one(ckpt):
    out = ckpt.parent / "b.safetensors"
    old, young, other = (ckpt.parent / f".{name}.tmp" for name in ("b.safetensors.old", "b.safetensors.young", "c.safetensors.old"))
    for folder in (old, young, other):
        folder.mkdir()
        (folder / "part").write_bytes(b"x")
    for folder in (old, other):
        os.utime(folder, (0, 0))
    mapping_of(ckpt).convert(ckpt, out)
    assert [folder.exists() for folder in (old, young, other)] == [False, True, True]


def test_killed_at_any_moment_the_output_is_absent_or_whole(ckpt):
    """Five moments here; a hundred in benchmarks/robustness_faults.py."""
    before, mapping, out = ckpt.read_bytes(), mapping_of(ckpt), ckpt.parent / "b.safetensors"
    expected = mapping.apply(ckpt)
    mapping.save(ckpt.parent / "m.json")
    moments = random.Random(0)
    for _ in range(5):
        command = [sys.executable, "-c", KILLED, str(ckpt.parent / "m.json"), str(ckpt), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
        assert ckpt.read_bytes() == before
        if out.exists():
            written = load_file(out)
            assert all(torch.equal(written[key], value) for key, value in expected.items())
            out.unlink()
