"""Converting with several ranks: equal values under new keys, and a killed run that is taken up again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded_models import New, Old, expected, mapping_of, matches, new_model, old_model, split_back
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from worlds import HANG, run_ranks, save_alone, values

import automatch.distributed.conversion
import automatch.distributed.shard_files
import automatch.distributed.shards
from automatch.cli import main
from automatch.cli.convert_distributed import size
from automatch.distributed import convert, load
from automatch.distributed.shards import Output, assign
from automatch.errors import CheckpointError, LoadError, MappingError
from automatch.mapping import Match
from automatch.transforms import apply_transform

pytestmark = pytest.mark.distributed
TIMEOUT = 4  # seconds without a sign of life after which the tests' ranks give a killed one up
LIMIT = 3000  # bytes: small files, so that there are many


def trained_old() -> tuple[Old, torch.optim.Optimizer]:
    model = old_model()
    optimizer = torch.optim.AdamW(
        [{"params": [*model.head.parameters()], "lr": 0.5}, {"params": [p for n, p in model.named_parameters() if "head" not in n]}]
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randint(0, 13, (4, 5))).pow(2).mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, optimizer = trained_old()
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    return save_alone(state | {"epoch": 3}, tmp_path_factory.mktemp("trained") / "old")


@pytest.fixture(scope="module")
def old_state(trained: Path) -> dict[str, torch.Tensor]:
    model = old_model()
    load(model, trained, mapping_of(Old(), Old(), [replace(m, target=m.sources[0]) for m in identity_matches()]))
    return dict(model.state_dict())


def identity_matches() -> list[Match]:
    return [Match(key, (key,), decided=True) for key in Old().state_dict()]


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_where(where: str) -> None:
    """Let this rank kill itself: in its third file (when that has begun), or at a step of rank 0 when all files are there."""
    files = automatch.distributed.shard_files
    write, count = files.ShardFiles.write, 0

    def dying_write(*args: Any) -> None:
        nonlocal count
        count += 1
        write(*args[:-1], map(die, args[-1]) if count == 3 else args[-1])

    if where == "file":
        files.ShardFiles.write = dying_write  # type: ignore[method-assign]
    elif where == "index":
        files.ShardFiles._write_index = files.ShardFiles._write_metadata = die  # type: ignore[method-assign]
    elif where == "name":
        files.shutil = SimpleNamespace(rmtree=die)  # type: ignore[assignment]


def convert_some(rank: int, source: Path, out: Path, to: str, victim: int | None, where: str = "file") -> Any:
    """Convert; rank ``victim`` kills itself on the way."""
    if rank == victim:
        die_where(where)
    seen: list[tuple[int, int]] = []
    mapping = mapping_of(Old(), New())
    report = convert(
        source,
        out,
        mapping,
        to=to,
        max_shard_bytes=LIMIT,
        timeout=60 if victim is None else TIMEOUT,
        progress=lambda *done: seen.append(done),
    )
    return report, seen


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(names.values())}
    return {key: files[name][key] for key, name in names.items()}


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir() if file.is_file()}


def test_a_dcp_directory_becomes_a_folder(trained: Path, old_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (report, seen), (other, unseen) = values(run_ranks(2, convert_some, tmp_path, trained, tmp_path / "hf", "safetensors", None))
    assert report == other
    assert report.n_tensors == len(New().state_dict())
    assert seen[-1][1] == report.n_bytes
    assert unseen == []
    assert "epoch" in report.left_out
    got = read_folder(tmp_path / "hf")
    for match in matches():
        assert torch.equal(got[match.target], apply_transform(match.transform, [old_state[key] for key in match.sources])), match.target
    for name in (tmp_path / "hf").glob("*.safetensors"):
        with safe_open(name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("victim", "where", "to"),
    [(0, "file", "safetensors"), (1, "file", "safetensors"), (1, "file", "dcp"), (0, "index", "safetensors"), (0, "index", "dcp")],
)
def test_a_killed_conversion_is_taken_up_where_it_stopped(trained: Path, tmp_path: Path, victim: int, where: str, to: str) -> None:
    """Rank 0 holds the store of the process group, so its death is noticed in another way than that of rank 1."""
    before, out, work = contents(trained), tmp_path / "out", tmp_path / "out.incomplete"
    outcomes = run_ranks(2, convert_some, tmp_path, trained, out, to, victim, where)
    assert outcomes[victim].signal == signal.SIGKILL
    error = outcomes[1 - victim].error or ""
    noticed = f"rank {victim}: no sign of life for {TIMEOUT} s" + ("" if victim else "|the rank that holds it has died")
    assert re.match(rf"RankLostError: .*({noticed})", error)
    assert error.endswith("Complete shards are kept for the next call")
    assert not out.exists()
    files = contents(work)
    complete = {json.loads(path.read_text())["file"] for path in (work / ".automatch").glob("[0-9]*.json")}
    kept = {name: files[name] for name in complete}
    assert len(kept) >= 2
    (work / "model-00099-of-00099.safetensors").write_bytes(b"half a file")
    results = values(run_ranks(4, convert_some, tmp_path, trained, out, to, None))
    assert results[0][0].n_reused == len(kept)
    after = contents(out)
    assert {name: after[name] for name in kept} == kept, "complete shards were written again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert contents(trained) == before
    check_converted(out, trained)


def check_converted(out: Path, source: Path) -> None:
    """All values of a converted directory are those that a load of its source gives."""
    got, wanted = new_model(), new_model(seed=2)
    load(got, out, mapping_of(New(), New(), [Match(key, (key,), decided=True) for key in New().state_dict()]))
    load(wanted, source, mapping_of(Old(), New()))
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), wanted.state_dict().values(), strict=True))


def test_a_conversion_killed_when_it_had_its_name_is_complete(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcomes = run_ranks(2, convert_some, tmp_path, trained, out, "safetensors", 0, "name")
    assert outcomes[0].signal == signal.SIGKILL
    before = {name: state for name, state in contents(out).items() if name.endswith(".safetensors")}
    other = mapping_of(Old(), New(), matches()[1:])
    with pytest.raises(CheckpointError, match="out' exists; name a new directory"):
        convert(trained, out, other, max_shard_bytes=LIMIT)
    results = values(run_ranks(2, convert_some, tmp_path, trained, out, "safetensors", None))
    assert results[0][0].n_reused == results[0][0].n_shards == len(before)
    assert contents(out).items() >= before.items()
    assert not (out / ".automatch").exists()
    check_converted(out, trained)


def test_a_dcp_directory_keeps_optimizer_and_objects(trained: Path, tmp_path: Path) -> None:
    values(run_ranks(2, convert_some, tmp_path, trained, tmp_path / "dcp", "dcp", None))
    model = new_model()
    optimizer = torch.optim.AdamW(
        [{"params": [*model.lm_head.parameters()]}, {"params": [p for n, p in model.named_parameters() if "lm_head" not in n]}]
    )
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)) | {"epoch": 0}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=tmp_path / "dcp")  # torch reads it as one of its own
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert state["epoch"] == 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]
    reference = new_model()
    again = torch.optim.AdamW(
        [{"params": [*reference.lm_head.parameters()]}, {"params": [p for n, p in reference.named_parameters() if "lm_head" not in n]}]
    )
    load(reference, trained, mapping_of(Old(), New()), optimizer=again)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(optimizer.state[a]["exp_avg"], again.state[b]["exp_avg"]), name


def test_a_folder_becomes_a_dcp_directory_and_returns(tmp_path: Path) -> None:
    state = dict(old_model().state_dict())
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    forth = convert(tmp_path / "hf", tmp_path / "dcp", mapping_of(Old(), New()), to="dcp", max_shard_bytes=LIMIT)
    back = convert(tmp_path / "dcp", tmp_path / "again", mapping_of(New(), Old(), split_back()))
    assert (forth.n_shards > 3, back.n_shards) == (True, 1)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again[key], value), key
    assert expected(old_model()).keys() == {match.target for match in matches()}


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_a_rank_holds_a_portion_and_no_shard(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    made: list[tuple[weakref.ref[torch.Tensor], int]] = []
    held: list[int] = []

    def placeholder(output: Output) -> Any:
        value = automatch.distributed.shards.placeholder(output)
        if value is not None:
            made.append((weakref.ref(value), value.nbytes))
        held.append(sum(nbytes for tensor, nbytes in made if tensor() is not None))
        return value

    monkeypatch.setattr(automatch.distributed.conversion, "placeholder", placeholder)
    monkeypatch.setattr(automatch.distributed.shards, "PORTION_BYTES", 4000)
    report = convert(trained, tmp_path / "out", mapping_of(Old(), New()), to=to)
    assert report.n_shards == 1
    assert max(nbytes for _, nbytes in made) <= max(held) <= 4000 < report.n_bytes / 4


def test_a_dtype_that_the_format_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = save_alone({"z": torch.zeros(3, dtype=torch.complex128)}, tmp_path / "old")
    with pytest.raises(MappingError, match=r"'z' is torch\.complex128, which safetensors has not; write a dcp directory instead"):
        convert(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_keys_stay_without_a_mapping(trained: Path, old_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    convert(trained, tmp_path / "same")
    got = load_file(tmp_path / "same" / "model.safetensors")
    assert got.keys() == old_state.keys()


def test_what_exists_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out' exists; name a new directory"):
        convert(trained, tmp_path / "out")
    (tmp_path / "other.incomplete").mkdir()
    with pytest.raises(CheckpointError, match="unfinished conversion of something that is not recorded"):
        convert(trained, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not a directory; create it first"):
        convert(trained, tmp_path / "nowhere" / "out")
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        convert(trained, tmp_path / "zero", max_shard_bytes=0)


def stopped(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion to a folder that ended after two files."""
    write, count = automatch.distributed.shard_files.ShardFiles.write, 0

    def some(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError("the disk is full")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(automatch.distributed.shard_files.ShardFiles, "write", some)
        with pytest.raises(LoadError, match="the disk is full"):
            convert(source, out, mapping_of(Old(), New()), max_shard_bytes=LIMIT)
    return out.with_name(f"{out.name}.incomplete")


def test_only_the_same_conversion_is_taken_up(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = Path(shutil.copytree(trained, tmp_path / "source")), tmp_path / "out"
    kept = contents(stopped(source, out, monkeypatch))
    other = mapping_of(
        Old(), New(), [replace(m, sources=("layers.1.norm.bias",)) if m.target == "blocks.0.ln.bias" else m for m in matches()]
    )
    for mapping, limit in ((other, LIMIT), (mapping_of(Old(), New()), 2 * LIMIT)):
        with pytest.raises(
            CheckpointError, match=r"out\.incomplete' holds an unfinished conversion of this checkpoint with another mapping"
        ):
            convert(source, out, mapping, max_shard_bytes=limit)
    (source / "__0_0.distcp").touch()  # a checkpoint that was saved again has the same keys and sizes
    with pytest.raises(CheckpointError, match="of this one before it was written again; finish that one or remove the directory"):
        convert(source, out, mapping_of(Old(), New()), max_shard_bytes=LIMIT)
    assert contents(tmp_path / "out.incomplete") == kept


def test_a_checkpoint_that_is_written_to_meanwhile_is_not_converted(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    write = automatch.distributed.shard_files.ShardFiles.write

    def saved_again(*args: Any) -> None:
        (source / "__0_0.distcp").touch()
        write(*args)

    monkeypatch.setattr(automatch.distributed.shard_files.ShardFiles, "write", saved_again)
    with pytest.raises(CheckpointError, match="source' was written to while it was converted"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mapping_for_another_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="is not a key of the checkpoint"):
        convert(trained, tmp_path / "out", mapping_of(New(), Old(), split_back()))
    assert list(tmp_path.iterdir()) == []


def test_work_is_split_by_bytes() -> None:
    assert assign({0: 5, 1: 3, 2: 3, 3: 1}, 2) == [[0, 3], [1, 2]]
    assert assign({}, 3) == [[], [], []]


def test_torchrun_speaks_with_one_voice(trained: Path, tmp_path: Path) -> None:
    mapping = mapping_of(Old(), New()).save(tmp_path / "mapping.json")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "automatch", "convert-distributed"]
    arguments = [str(trained), "--mapping", str(mapping), "-o", str(tmp_path / "out"), "--max-shard-size", "3kB"]
    done = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=HANG, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "30 tensors, 24,356 bytes in" in done.stdout
    assert done.stderr.count("Note: ") == 1


def command_line(rank: int, *arguments: str) -> tuple[int, str, str]:
    os.environ["RANK"] = str(rank)
    done = CliRunner().invoke(main, ["convert-distributed", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_errors_are_said_once(trained: Path, tmp_path: Path) -> None:
    first, second = values(run_ranks(2, command_line, tmp_path, str(trained), "-o", str(tmp_path)))
    assert first[:2] == (2, "")
    assert "exists; name a new directory" in first[2]
    assert second == (1, "", "")


def test_an_incomplete_mapping_is_refused(trained: Path, tmp_path: Path) -> None:
    path = mapping_of(Old(), New(), matches()[1:]).save(tmp_path / "mapping.json")
    command = ["convert-distributed", str(trained), "--mapping", str(path), "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "Refused: 1 tensor of the model would stay without a source" in refused.stderr
    assert "tokens.weight" in refused.stderr
    written = CliRunner().invoke(main, [*command, "--partial", "--json"])
    assert json.loads(written.stdout)["n_tensors"] == len(New().state_dict()) - 1


@pytest.mark.parametrize(("text", "wanted"), [("7", 7), ("1.5kB", 1500), ("2GiB", 2**31), ("3 M", 3 * 10**6)])
def test_sizes(text: str, wanted: int) -> None:
    assert size(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1", "2TB", "1i"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="500MB or 2GiB"):
        size(text)
