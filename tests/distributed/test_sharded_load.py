"""Saving under one class and mesh, loading into the other class under another mesh, in real processes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from sharded_models import (
    VOCABULARY,
    WIDTH,
    New,
    Old,
    Tied,
    check_equal,
    expected,
    full,
    mapping_of,
    new_model,
    old_model,
    shard,
    split_back,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from worlds import run_ranks, save_alone, values

import automatch.distributed.loading
import automatch.distributed.storage
from automatch.distributed import MappedLoadPlanner, load
from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import StateSpec, TensorSpec, spec_of_model, spec_of_state_dict
from automatch.transforms import (
    Chain,
    Permute,
    Reshape,
    Slice,
    apply_transform,
    chain,
)

pytestmark = pytest.mark.distributed


def save_old(rank: int, path: Path, wrap: bool) -> None:
    model = shard(old_model(), (torch.distributed.get_world_size(),))
    state = get_model_state_dict(model)
    dcp.save({"model": state, "step": 5} if wrap else state, checkpoint_id=path)


def load_new(rank: int, path: Path, mesh: tuple[int, ...], meta: bool) -> tuple[dict[str, torch.Tensor], int]:
    if meta:
        with torch.device("meta"):
            model = shard(New(), mesh)
    else:
        model = shard(new_model(), mesh)
    report = load(model, path, mapping_of(old_model(), new_model()), timeout=60)
    assert report.missing_keys == report.unexpected_keys == report.whole_reads == ()
    return full(get_model_state_dict(model)), report.bytes_read


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The old model as saved by 1 and by 4 ranks."""
    root = tmp_path_factory.mktemp("saved")
    for size in (1, 4):
        values(run_ranks(size, save_old, root, root / f"by{size}", size == 4))
    return {size: root / f"by{size}" for size in (1, 4)}


# On four ranks, some shards are uneven and some are empty.
@pytest.mark.parametrize(
    ("writers", "mesh", "meta"),
    [(1, (2,), True), (4, (2,), False), (1, (2, 2), False), (4, (2, 2), True), (4, (1,), False), (1, (4,), True)],
)
def test_other_class_and_mesh_get_the_values_of_one_process(
    saved: dict[int, Path], tmp_path: Path, writers: int, mesh: tuple[int, ...], meta: bool
) -> None:
    size = mesh[0] * (mesh[1] if len(mesh) == 2 else 1)
    results = values(run_ranks(size, load_new, tmp_path, saved[writers], mesh, meta))
    for got, _ in results:
        check_equal(got, expected(old_model()))


def test_one_process_without_a_group_loads_what_four_ranks_saved(saved: dict[int, Path]) -> None:
    with torch.device("meta"):
        model = New()
    load(model, saved[4], mapping_of(Old(), New()))
    check_equal(dict(model.state_dict()), expected(old_model()))


def test_each_rank_reads_its_share_of_the_bytes(saved: dict[int, Path], tmp_path: Path) -> None:
    total = sum(tensor.nbytes for tensor in old_model().state_dict().values())
    buffers = sum(tensor.nbytes for tensor in old_model().buffers())
    read = [nbytes for _, nbytes in values(run_ranks(2, load_new, tmp_path, saved[1], (2,), True))]
    # Buffers are not sharded: both ranks hold them. Columns of these small tensors are cut from rows that were read whole.
    assert total + buffers <= sum(read) < 1.25 * (total + buffers)
    assert max(read) - min(read) < 0.1 * total


def load_folder(rank: int, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    forth = shard(new_model(), (2,))
    load(forth, path, mapping_of(old_model(), new_model()), timeout=60)
    back_path = path.parent / "new_dcp"
    dcp.save(get_model_state_dict(forth), checkpoint_id=back_path)
    back = shard(old_model(seed=5), (2,))
    load(back, back_path, mapping_of(new_model(), old_model(), split_back()), timeout=60)
    return full(get_model_state_dict(forth)), full(get_model_state_dict(back))


def test_a_safetensors_folder_loads_sharded_and_splits_again(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    state = dict(old_model().state_dict())
    names = {key: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: value for key, value in state.items() if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    save_file({"embed.weight": torch.zeros(1)}, folder / "not-in-the-index.safetensors")
    for forth, back in values(run_ranks(2, load_folder, tmp_path, folder)):
        check_equal(forth, expected(old_model()))
        check_equal(back, state)


def load_with_a_proposal(rank: int, path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    calls = 0

    def propose(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        return mapping_of(Old(), New())

    automatch.distributed.loading.propose_mapping = propose
    model = shard(new_model(), (2,))
    load(model, path, timeout=60)
    return calls, full(get_model_state_dict(model))


def test_rank_0_alone_proposes(saved: dict[int, Path], tmp_path: Path) -> None:
    (first, _), (second, got) = values(run_ranks(2, load_with_a_proposal, tmp_path, saved[4]))
    assert (first, second) == (1, 0)
    check_equal(got, expected(old_model()))


class Renamed(nn.Module):
    """`Old` as a rename leaves it."""

    def __init__(self, old: Old) -> None:
        super().__init__()
        self.wte, self.lm_head, self.stats = old.embed, old.head, old.stats
        self.blocks = nn.ModuleList(nn.ModuleDict({f"{name}_proj": part for name, part in layer.named_children()}) for layer in old.layers)


def load_what_is_proposed(rank: int, path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    with torch.device("meta"):
        model = fully_shard(Renamed(Old()), mesh=init_device_mesh("cpu", (2,)))
    report = load(model, path, timeout=60)
    return full(get_model_state_dict(model)), report.mapping.source.spec is not None and len(report.mapping.source.spec) > 0


def test_a_renamed_class_loads_without_a_mapping(saved: dict[int, Path], tmp_path: Path) -> None:
    wanted = dict(Renamed(old_model()).state_dict())
    for rank, (got, knows_the_source) in enumerate(values(run_ranks(2, load_what_is_proposed, tmp_path, saved[4]))):
        check_equal(got, wanted)
        assert knows_the_source == (rank == 0)


def save_new_with_tensor_parallel(rank: int, path: Path) -> None:
    model = shard(new_model(seed=3), (2, 2))
    dcp.save(get_model_state_dict(model), checkpoint_id=path)


def load_old(rank: int, path: Path) -> dict[str, torch.Tensor]:
    model = shard(old_model(seed=5), (2,))
    load(model, path, mapping_of(New(), Old(), split_back()), timeout=60)
    return full(get_model_state_dict(model))


def test_what_a_2d_mesh_saved_is_split_again_on_two_ranks(tmp_path: Path) -> None:
    values(run_ranks(4, save_new_with_tensor_parallel, tmp_path, tmp_path / "new"))
    wanted = expected(new_model(seed=3), split_back())
    for got in values(run_ranks(2, load_old, tmp_path, tmp_path / "new")):
        check_equal(got, wanted)


def load_tied(rank: int, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.device("meta"):
        model = fully_shard(Tied(), mesh=init_device_mesh("cpu", (2,)))
    sides = [Side.of(spec_of_state_dict({"tokens": torch.empty(VOCABULARY, WIDTH)})), Side.of(spec_of_model(model))]
    load(model, path, KeyMapping(*sides, ()).with_matches([Match("embed.weight", ("tokens",), decided=True)]), timeout=60)
    assert model.head.weight is model.embed.weight
    return model.embed.weight.full_tensor().detach(), model(torch.arange(5)).detach()


def test_tied_weights_stay_tied_when_sharded(tmp_path: Path) -> None:
    tokens = torch.randn(VOCABULARY, WIDTH)
    path = save_alone({"tokens": tokens}, tmp_path / "tied")
    for got, output in values(run_ranks(2, load_tied, tmp_path, path)):
        assert torch.equal(got, tokens)
        assert torch.allclose(output, tokens[:5] @ tokens.T, atol=1e-5)


def load_state_dict_with_odd_reshape(rank: int, path: Path, odd: Chain, log: Path, whole_on: int | None) -> tuple[torch.Tensor, Any]:
    logging.getLogger("automatch").addHandler(logging.FileHandler(log / f"log{rank}"))
    mesh = init_device_mesh("cpu", (2,))
    state = {"odd": DTensor.from_local(torch.zeros(6, 4), mesh, [Shard(1)], run_check=False)}
    if rank == whole_on:  # all of it needs no slice
        state = {"odd": torch.zeros(6, 8)}
    empty = mapping_of(old_model(), new_model(), [])
    target = Side.of(StateSpec((TensorSpec("odd", (6, 8)),)))
    mapping = replace(empty, target=target).with_matches([Match("odd", ("layers.0.query.weight",), odd, decided=True)])
    report = load(state, path, mapping, timeout=60)
    part = state["odd"]
    return part.to_local() if isinstance(part, DTensor) else part, [(read.key, read.nbytes) for read in report.whole_reads]


@pytest.mark.parametrize("whole_on", [None, 0])
def test_what_cannot_be_sliced_is_read_whole_and_said_by_rank_0(saved: dict[int, Path], tmp_path: Path, whole_on: int | None) -> None:
    odd = chain(Slice(0, 0, 12), Slice(1, 0, 4), Permute((1, 0)), Reshape((6, 8)))
    weight = old_model().state_dict()["layers.0.query.weight"]
    results = values(run_ranks(2, load_state_dict_with_odd_reshape, tmp_path, saved[1], odd, tmp_path, whole_on))
    wanted = apply_transform(odd, [weight])
    for rank, (got, whole) in enumerate(results):
        assert torch.equal(got, wanted if rank == whole_on else wanted[:, 4 * rank : 4 * rank + 4])
        assert whole == ([] if rank == whole_on else [("odd", WIDTH * WIDTH * 4)])
    said = (tmp_path / "log0").read_text()
    assert said.count("'odd' cannot be read in slices") == said.count("\n") == 1
    assert "0.0 MiB of memory" in said
    assert (tmp_path / "log1").read_text() == ""


def test_the_planner_serves_torch_as_it_is(saved: dict[int, Path]) -> None:
    model = new_model()
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(model.state_dict(), checkpoint_id=saved[4], planner=MappedLoadPlanner(mapping_of(Old(), New())))
    check_equal(dict(model.state_dict()), expected(old_model()))
