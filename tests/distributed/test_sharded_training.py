"""Optimizer state, parameter groups and other entries; and what is read over instead of being held twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded_models import VOCABULARY, WIDTH, New, Old, Tied, check_equal, expected, full, mapping_of, matches, new_model, old_model, shard
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from worlds import run_ranks, save_alone, values

import automatch.distributed.loading
import automatch.distributed.storage
from automatch.distributed import load
from automatch.distributed.target import Target
from automatch.errors import LoadError
from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import spec_of_model, spec_of_state_dict
from automatch.transforms import (
    apply_transform,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_alone(dict(old_model().state_dict()), tmp_path_factory.mktemp("saved") / "old")


def train(rank: int, path: Path) -> tuple[Any, Any]:
    """Train the old class, save, load module and optimizer of the new class, and compare what both hold."""
    old = shard(old_model(), (2,))
    optimizer = torch.optim.AdamW(
        [
            {"params": [*old.head.parameters()], "lr": 0.5},
            {"params": [*old.layers.parameters(), *old.embed.parameters(), *old.stats.parameters()]},
        ]
    )
    for _ in range(3):
        optimizer.zero_grad()
        old(torch.randint(0, 13, (4, 5))).pow(2).mean().backward()
        optimizer.step()
    model_state, optimizer_state = get_state_dict(old, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state, "epoch": 3}, checkpoint_id=path)

    def build() -> tuple[New, torch.optim.Optimizer]:
        model = shard(new_model(), (2,))
        rest = [*model.blocks.parameters(), *model.tokens.parameters(), *model.stats.parameters()]
        return model, torch.optim.AdamW([{"params": rest}, {"params": [*model.lm_head.parameters()]}])

    model, fresh = build()
    mapping = mapping_of(old_model(), new_model())
    load(model, path, mapping, optimizer=fresh, timeout=60)
    loaded = get_optimizer_state_dict(model, fresh)

    other, other_optimizer = build()
    state = dict(zip(("model", "optim"), get_state_dict(other, other_optimizer), strict=True)) | {"epoch": 0}
    load(state, path, mapping, timeout=60)
    set_state_dict(other, other_optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    again = get_optimizer_state_dict(other, other_optimizer)

    def plain(state: Any) -> Any:
        moments = {f"{key}.{name}": value for key, entry in state["state"].items() for name, value in entry.items()}
        return full(moments), [(group["lr"], sorted(group["params"])) for group in state["param_groups"]]

    return (
        plain(optimizer_state),
        plain(loaded),
        plain(again),
        state["epoch"],
        full(get_model_state_dict(old)),
        full(get_model_state_dict(other)),
    )


def test_optimizer_state_groups_and_objects_follow(tmp_path: Path) -> None:
    results = values(run_ranks(2, train, tmp_path, tmp_path / "trained"))
    (moments, groups), (loaded, new_groups), again, epoch, old_state, other_state = results[0]
    assert epoch == 3
    assert [lr for lr, _ in groups] == [0.5, 1e-3]
    assert [lr for lr, _ in new_groups] == [1e-3, 0.5]  # the new optimizer lists its groups in another order
    assert [lr for lr, _ in again[1]] == [1e-3, 0.5]
    for match in matches():
        assert torch.equal(other_state[match.target], apply_transform(match.transform, [old_state[key] for key in match.sources]))
        for name in ("exp_avg", "exp_avg_sq"):
            if f"{match.sources[0]}.{name}" in moments:
                wanted = apply_transform(match.transform, [moments[f"{key}.{name}"] for key in match.sources])
                assert torch.equal(loaded[f"{match.target}.{name}"], wanted)
                assert torch.equal(again[0][f"{match.target}.{name}"], wanted)
                assert loaded[f"{match.target}.step"] == 3


def save_trained(rank: int, path: Path) -> None:
    model = shard(old_model(), (torch.distributed.get_world_size(),))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(20).reshape(4, 5) % VOCABULARY).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    dcp.save(dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=path)


def load_trained(rank: int, path: Path, mesh: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """What model and optimizer hold; on no mesh, what one process reads."""
    model = new_model() if mesh is None else shard(new_model(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)  # torch steps no list of tensors on several meshes
    load(model, path, mapping_of(Old(), New()), optimizer=optimizer, timeout=60)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    moments = {f"{key}.{name}": value for key, entry in state.items() for name, value in entry.items()}
    return full(get_model_state_dict(model) | moments)


@pytest.mark.parametrize(("writers", "mesh"), [(1, (2,)), (4, (2,)), (2, (2, 2))])
def test_optimizer_state_changes_its_mesh_too(tmp_path: Path, writers: int, mesh: tuple[int, ...]) -> None:
    path = tmp_path / "trained"
    values(run_ranks(writers, save_trained, tmp_path, path))
    wanted = load_trained(0, path, None)
    assert any(value.any() for key, value in wanted.items() if key.endswith(".exp_avg"))
    for got in values(run_ranks(2 * len(mesh), load_trained, tmp_path, path, mesh)):
        check_equal(got, wanted)


def test_what_describing_gave_an_optimizer_is_not_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    path = save_alone(dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)), tmp_path / "trained")
    staged: list[torch.Tensor] = []

    def empty_like(target: Target, value: torch.Tensor) -> torch.Tensor:
        staged.append(torch.empty_like(value))
        return staged[-1]

    monkeypatch.setattr(Target, "_empty_like", empty_like)
    mapping = mapping_of(model, model, [Match(key, (key,), decided=True) for key in model.state_dict()])
    for again in (torch.optim.AdamW(model.parameters()), optimizer):
        holds_values = bool(again.state)
        staged.clear()
        load(model, path, mapping, optimizer=again)
        assert len(staged) == (8 if holds_values else 2)  # weight and bias, each with its moments and step count
        for parameter in model.parameters():
            assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
            assert again.state[parameter]["step"] == 1


def load_in_place(rank: int, path: Path) -> tuple[dict[str, torch.Tensor], list[bool], str]:
    """Load over the values of a model, and then again from a file that is cut short under one rank."""
    model = shard(new_model(), (2,))
    places = [local.data_ptr() for local in locals_of(model)]
    Target._empty_like = None  # type: ignore[assignment]
    load(model, path, mapping_of(Old(), New()), in_place=True, timeout=60)
    got = full(get_model_state_dict(model))
    if rank == 1:
        automatch.distributed.storage.read_slice = None  # type: ignore[assignment]
    try:
        load(model, path, mapping_of(Old(), New()), in_place=True, timeout=60)
    except LoadError as error:
        return got, [local.data_ptr() == place for local, place in zip(locals_of(model), places, strict=True)], str(error)
    return got, [], "nothing"


def locals_of(model: nn.Module) -> list[torch.Tensor]:
    return [value.to_local() if isinstance(value, DTensor) else value for value in get_model_state_dict(model).values()]


def test_in_place_nothing_is_held_twice_and_a_failure_says_so(saved: Path, tmp_path: Path) -> None:
    (got, same, message), (other, others_same, _) = values(run_ranks(2, load_in_place, tmp_path, saved))
    check_equal(got, expected(old_model()))
    check_equal(other, expected(old_model()))
    assert all(same)
    assert all(others_same)
    assert "rank 1: " in message
    assert message.endswith("The values that were there may be overwritten on every rank")


def test_in_place_tied_weights_must_still_be_given_equal_values(tmp_path: Path) -> None:
    sources = {"a": torch.randn(VOCABULARY, WIDTH), "b": torch.randn(VOCABULARY, WIDTH)}
    path = save_alone(sources, tmp_path / "two")
    model = Tied()
    empty = KeyMapping(Side.of(spec_of_state_dict(sources)), Side.of(spec_of_model(model)), ())
    for second in "ba":
        found = [Match("embed.weight", ("a",), decided=True), Match("head.weight", (second,), decided=True)]
        if second == "b":
            with pytest.raises(LoadError, match="are one tensor in the model, and the checkpoint feeds them different values"):
                load(model, path, empty.with_matches(found), in_place=True)
        else:
            load(model, path, empty.with_matches(found), in_place=True)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, sources["a"])
