"""Every transform under every placement, on one mesh and on two dimensions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sharded_models import (
    full,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from worlds import run_ranks, save_alone, values

from automatch.distributed import load
from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import spec_of_state_dict
from automatch.transforms import (
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
