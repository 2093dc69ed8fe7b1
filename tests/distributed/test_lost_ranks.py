"""One rank fails or is killed: the others stop with a clear error, and no model is changed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_models import WIDTH, mapping_of, matches, new_model, old_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from worlds import Outcome, run_ranks, save_alone, values

import automatch.distributed.crew
import automatch.distributed.loading
import automatch.distributed.storage
from automatch.distributed import RankLostError, load
from automatch.errors import LoadError, MappingError
from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import spec_of_model, spec_of_state_dict

pytestmark = pytest.mark.distributed
TIMEOUT = 4  # seconds without a sign of life after which the tests' ranks give a killed one up


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_alone({"model": old_model(seed=1).state_dict() | {"more": torch.zeros(1)}}, folder / "other")
    return save_alone({"model": old_model().state_dict()}, folder / "old")


def failing_read(after: int, kill: bool) -> Any:
    """A `read_slice` that works ``after`` times and then ends its rank."""
    read, count = automatch.distributed.storage.read_slice, 0

    def read_slice(*args: Any) -> int:
        nonlocal count
        count += 1
        if count > after and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if count > after:
            raise OSError("the disk is on fire")
        return read(*args)

    return read_slice


class DyingStore:
    """A store whose rank dies at its second piece of what rank 0 tells the others: writing it on rank 0, reading it elsewhere."""

    def __init__(self, prefix: str, store: Any) -> None:
        self._store = torch.distributed.PrefixStore(prefix, store)
        self._pieces = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def set(self, key: str, value: Any) -> None:
        self._count(key)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self._count(key)
        return self._store.get(key)

    def _count(self, key: str) -> None:
        self._pieces += key.startswith("value/")
        if self._pieces == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def load_with(rank: int, path: Path, trouble: int, what: str) -> tuple[str, str, bool, int]:
    """Load while rank ``trouble`` has some; what was raised, and whether model and optimizer are as they were."""
    width = 2 * WIDTH if what == "model" and rank == trouble else None
    model = new_model()
    if width:
        model.lm_head = nn.Linear(WIDTH, width)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    before = {key: local(value).clone() for key, value in get_model_state_dict(model).items()}
    mapping = mapping_of(old_model(), new_model())
    if what == "mapping" and rank == trouble:
        mapping = mapping.with_matches(matches()[:-1])
    if what == "checkpoint" and rank == trouble:
        path = path.with_name("other")
    if what == "kill at planning" and rank == trouble:
        automatch.distributed.loading.find_entries = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill at the broadcast":
        automatch.distributed.crew._PIECE = 100
        if rank == trouble:
            automatch.distributed.crew.PrefixStore = DyingStore
    if what in ("kill", "raise") and rank == trouble:
        automatch.distributed.storage.read_slice = failing_read(5, what == "kill")
    if what == "optimizer" and rank == trouble:
        optimizer.load_state_dict = None  # type: ignore[assignment]
    try:
        load(
            model,
            path,
            mapping,
            optimizer=optimizer if what == "optimizer" else None,
            strict=False,
            timeout=TIMEOUT if "kill" in what else 60,
        )
    except Exception as error:
        same = all(torch.equal(local(value), before[key]) for key, value in get_model_state_dict(model).items())
        return type(error).__name__, str(error), same, len(optimizer.state)
    return "nothing", "", False, 0


class Touchy(nn.Linear):
    """A layer whose extra state may be refused."""

    count = 1

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]
        if self.touchy and self.count == 7:
            raise RuntimeError("seven is too many")

    touchy = False


def load_touchy(rank: int, path: Path, meta: bool) -> tuple[str, bool, int]:
    """Load a layer that refuses its extra state on rank 1, when its values have been read already."""
    with torch.device("meta" if meta else "cpu"):
        model = fully_shard(nn.Sequential(Touchy(4, 4)), mesh=init_device_mesh("cpu", (2,)))
    model[0].touchy = rank == 1
    weight = model[0].weight
    before = None if meta else local(weight).clone()
    state = {"old.weight": torch.empty(4, 4), "old.bias": torch.empty(4)}
    mapping = KeyMapping(Side.of(spec_of_state_dict(state)), Side.of(spec_of_model(model)), ())
    mapping = mapping.with_matches([Match(key.replace("old", "0"), (key,), decided=True) for key in state])
    try:
        load(model, path, mapping, timeout=60)
    except LoadError as error:
        same = model[0].weight is weight and (weight.is_meta if before is None else torch.equal(local(weight), before))
        return str(error), same, model[0].count
    return "nothing", False, 0


@pytest.mark.parametrize("meta", [False, True])
def test_a_module_that_refuses_on_one_rank_is_unchanged_on_all(tmp_path: Path, meta: bool) -> None:
    old = nn.ModuleDict({"old": Touchy(4, 4)})
    old["old"].count = 7
    path = save_alone(old.state_dict(), tmp_path / "touchy")
    for message, same, count in values(run_ranks(2, load_touchy, tmp_path, path, meta)):
        assert "seven is too many" in message
        assert same
        assert count == 1


def load_refused_optimizer(rank: int, path: Path) -> tuple[str, float, int]:
    """Load an optimizer that takes its state on rank 0 and does not on rank 1."""
    model = fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if rank == 1:
        optimizer.load_state_dict = None  # type: ignore[assignment]
    spec = spec_of_model(model)
    mapping = KeyMapping(Side.of(spec), Side.of(spec), ()).with_matches([Match(key, (key,), decided=True) for key in spec.keys])
    try:
        load(model, path, mapping, optimizer=optimizer, timeout=60)
    except LoadError as error:
        return str(error), optimizer.param_groups[0]["lr"], len(optimizer.state)
    return "nothing", 0.0, 0


def test_an_optimizer_that_refuses_on_one_rank_is_fresh_on_all(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    path = save_alone(dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)), tmp_path / "trained")
    for message, lr, entries in values(run_ranks(2, load_refused_optimizer, tmp_path, path)):
        assert "TypeError" in message
        assert (lr, entries) == (1e-3, 0)


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def run(saved: Path, folder: Path, size: int, trouble: int, what: str) -> list[Outcome]:
    before = [(file.name, file.read_bytes()) for file in sorted(saved.iterdir())]
    outcomes = run_ranks(size, load_with, folder, saved, trouble, what)
    assert [(file.name, file.read_bytes()) for file in sorted(saved.iterdir())] == before
    for rank, outcome in enumerate(outcomes):
        if outcome.signal is None and outcome.value is not None:
            assert outcome.value[2], f"rank {rank}: the model was changed"
            assert outcome.value[3] == 0, f"rank {rank}: the optimizer was changed"
    return outcomes


def test_a_failing_rank_stops_all_and_is_named(saved: Path, tmp_path: Path) -> None:
    outcomes = run(saved, tmp_path, 4, 2, "raise")
    assert outcomes[2].value[:2] == ("LoadError", "OSError: the disk is on fire")
    for rank in (0, 1, 3):
        kind, message, *_ = outcomes[rank].value
        assert kind in ("LoadError", "RankLostError")
        assert "rank 2" in message
        assert "the disk is on fire" in message


@pytest.mark.parametrize("when", ["kill", "kill at planning", "kill at the broadcast"])
@pytest.mark.parametrize("trouble", [0, 1])
def test_a_killed_rank_stops_the_other(saved: Path, tmp_path: Path, trouble: int, when: str) -> None:
    """Rank 0 holds the store of the process group, so its death is noticed in another way than that of rank 1."""
    outcomes = run(saved, tmp_path, 2, trouble, when)
    assert outcomes[trouble].signal == signal.SIGKILL
    kind, message, *_ = outcomes[1 - trouble].value
    assert kind == "RankLostError"
    assert re.search(f"rank {trouble}: no sign of life for {TIMEOUT} s" + ("" if trouble else "|the rank that holds it has died"), message)
    assert message.endswith("Nothing was changed on any rank")


def test_a_rank_killed_at_the_broadcast_stops_all(saved: Path, tmp_path: Path) -> None:
    outcomes = run(saved, tmp_path, 4, 2, "kill at the broadcast")
    assert outcomes[2].signal == signal.SIGKILL
    for rank in (0, 1, 3):
        kind, message, *_ = outcomes[rank].value
        assert kind == "RankLostError"
        assert re.search(rf"while receiving the mapping, .*rank 2: no sign of life for {TIMEOUT} s", message)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("model", "this rank's model has fingerprint sha256:.*, rank 0's sha256:.*; build the same model on all ranks"),
        ("mapping", "another mapping than rank 0"),
        ("checkpoint", "other' is another checkpoint here .* than on rank 0 .*; pass a path that all ranks share"),
        ("optimizer", "TypeError"),
    ],
)
def test_ranks_that_disagree_load_nothing(saved: Path, tmp_path: Path, what: str, message: str) -> None:
    outcomes = run(saved, tmp_path, 2, 1, what)
    assert outcomes[1].value[0] in ("MappingError", "LoadError")
    assert re.search(message, outcomes[1].value[1])
    assert "rank 1: " in outcomes[0].value[1]


def test_one_process_needs_no_group(saved: Path) -> None:
    model = new_model()
    report = load(model, saved, mapping_of(old_model(), new_model()))
    assert repr(report) == "DistributedReport(30 entries loaded, 8 converted, 0 missing, 0 unexpected, 24356 bytes read on this rank)"


def test_a_time_out_must_be_positive(saved: Path) -> None:
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got 0"):
        load(new_model(), saved, timeout=0)


def test_errors_are_those_that_users_catch() -> None:
    assert issubclass(RankLostError, LoadError)
    assert not issubclass(RankLostError, MappingError)
