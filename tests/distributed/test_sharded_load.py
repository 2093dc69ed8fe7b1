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
from sharded_models import VOCABULARY, WIDTH, New, Old, expected, mapping_of, matches, new_model, old_model, split_back
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import run_ranks, save_alone, values

import automatch.distributed.loading
import automatch.distributed.storage
from automatch.distributed import MappedLoadPlanner, load
from automatch.distributed.target import Target
from automatch.errors import LoadError
from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import StateSpec, TensorSpec, spec_of_model, spec_of_state_dict
from automatch.transforms import (
    Chain,
    Concat,
    Copy,
    Permute,
    PermuteElements,
    Reshape,
    Slice,
    Stack,
    Transform,
    apply_transform,
    chain,
    output_shape,
)

pytestmark = pytest.mark.distributed


def shard(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """FSDP2 on one dimension of the mesh, tensor parallel on the other if there is one."""
    if len(shape) == 2:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        for block in model.blocks if isinstance(model, New) else ():
            parallelize_module(block, mesh["tp"], {"qkv": ColwiseParallel(), "fc_out": RowwiseParallel()})
        dp = mesh["dp"]
    else:
        dp = init_device_mesh("cpu", shape)
    for block in model.blocks if isinstance(model, New) else model.layers:
        fully_shard(block, mesh=dp)
    return fully_shard(model, mesh=dp)


def full(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for key, value in state.items()}


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


def check_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


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


ROWS, COLUMNS = 7, 10  # neither is a multiple of two or four parts
SOURCES = {name: torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("abc")}
TRANSFORMS: dict[str, tuple[str, Transform]] = {
    "copy": ("a", Copy()),
    "rows joined": ("abc", Concat(0)),
    "columns joined": ("abc", Concat(1)),
    "stacked": ("abc", Stack(1)),
    "rows cut out": ("a", Slice(0, 2, 4)),
    "columns cut out": ("a", Slice(1, 3, 5)),
    "transposed": ("a", Permute((1, 0))),
    "joined and transposed": ("abc", chain(Concat(0), Permute((1, 0)))),
    "transposed and cut out": ("a", chain(Permute((1, 0)), Slice(0, 1, 7))),
    "interleaved": ("ab", chain(Concat(1), PermuteElements(1, (2, COLUMNS), (1, 0)))),
    "reshaped": ("a", Reshape((ROWS, 2, COLUMNS // 2))),
}
PLACEMENTS = {
    (4,): [(Shard(0),), (Shard(1),), (Replicate(),)],
    (2, 2): [
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(0), Shard(0)),
        (Shard(1), Shard(1)),
        (Replicate(), Shard(1)),
        (Shard(0), Replicate()),
    ],
}


def load_every_placement(rank: int, path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    found: list[Match] = []
    for shape, placements in PLACEMENTS.items():
        mesh = init_device_mesh("cpu", shape)
        for placement in placements:
            for name, (keys, transform) in TRANSFORMS.items():
                key = f"{name}, {placement}"
                size = output_shape(transform, [SOURCES[k].shape for k in keys])
                state[key] = distribute_tensor(torch.zeros(size), mesh, placement)
                found.append(Match(key, tuple(keys), transform, decided=True))
    sides = [Side.of(spec_of_state_dict(tensors)) for tensors in (SOURCES, {k: torch.empty(v.shape) for k, v in state.items()})]
    report = load(state, path, KeyMapping(*sides, ()).with_matches(found), timeout=60)
    assert report.whole_reads == ()
    return full(state)


@pytest.mark.parametrize("folder", [False, True])
def test_every_transform_under_every_placement(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "sources"
    if folder:
        path.mkdir()
        save_file(SOURCES, path / "model.safetensors")
    else:
        save_alone(dict(SOURCES), path)
    for got in values(run_ranks(4, load_every_placement, tmp_path, path)):
        assert len(got) == 9 * len(TRANSFORMS)
        for key, value in got.items():
            keys, transform = TRANSFORMS[key.partition(", ")[0]]
            assert torch.equal(value, apply_transform(transform, [SOURCES[k] for k in keys])), key


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


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


def test_in_place_nothing_is_held_twice_and_a_failure_says_so(saved: dict[int, Path], tmp_path: Path) -> None:
    (got, same, message), (other, others_same, _) = values(run_ranks(2, load_in_place, tmp_path, saved[4]))
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


def test_the_planner_serves_torch_as_it_is(saved: dict[int, Path]) -> None:
    model = new_model()
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(model.state_dict(), checkpoint_id=saved[4], planner=MappedLoadPlanner(mapping_of(Old(), New())))
    check_equal(dict(model.state_dict()), expected(old_model()))
