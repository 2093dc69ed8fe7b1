"""A rank is killed while it converts: the others stop with a clear error, and the next call goes on where it stopped."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from conversions import LIMIT, TIMEOUT, contents, convert_some
from sharded_models import New, Old, mapping_of, matches, new_model
from worlds import run_ranks, values

import automatch.distributed.shard_files
from automatch.distributed import convert, load
from automatch.errors import CheckpointError, LoadError
from automatch.mapping import Match

pytestmark = pytest.mark.distributed


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


def test_a_conversion_that_ended_before_it_began_is_begun(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(automatch.distributed.shard_files, "write_atomically", None)
        with pytest.raises(LoadError):
            convert(trained, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.incomplete").rglob("*")] == [".automatch"]
    assert convert(trained, tmp_path / "out").n_reused == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
