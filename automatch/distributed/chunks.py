"""The parts of a tensor that this rank holds, and views of them with the shape of what is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor

from automatch.distributed.boxes import Piece, sizes
from automatch.distributed.reshapes import Box, whole
from automatch.errors import LoadError
from automatch.transforms import Permute, Reshape, output_shape


def local_chunks(value: torch.Tensor) -> list[tuple[torch.Tensor, Box]]:
    """The parts of a tensor that this rank holds, each with its box in the whole."""
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed.checkpoint.planner_helpers import _create_chunk_list  # pyright: ignore[reportPrivateUsage]

    if isinstance(value, ShardedTensor):
        return [
            (shard.tensor, tuple(zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)))
            for shard in value.local_shards()
        ]
    if isinstance(value, DTensor):
        if value.device_mesh.get_coordinate() is None:
            return []
        boxes = [box_of(chunk) for chunk in _create_chunk_list(value)]
        if len(boxes) != 1:
            raise LoadError(
                f"a tensor of shape {tuple(value.shape)} with placements {value.placements} has {len(boxes)} local parts; reshard it first"
            )
        return [(value.to_local(), boxes[0])]
    return [(value, whole(tuple(value.shape)))]


def is_elsewhere(value: Any) -> bool:
    """Whether a tensor's mesh does not include this rank."""
    return isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None


def box_of(chunk: ChunkStorageMetadata) -> Box:
    """The box of a stored chunk."""
    return tuple(zip(chunk.offsets, chunk.sizes, strict=True))


def narrow(tensor: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """The view of a tensor that begins at ``starts`` and has ``lengths``."""
    for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def seen_as_target(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """What was read, with the shape of the target's part that it fills."""
    for step in piece.views:
        tensor = tensor.permute(step.dims) if isinstance(step, Permute) else tensor.reshape(step.shape)
    return tensor


def seen_as_source(target: torch.Tensor, piece: Piece) -> torch.Tensor | None:
    """The target's part seen with the source's shape; None where its memory does not allow that view."""
    shapes = [sizes(piece.box)]
    for step in piece.views:
        shapes.append(output_shape(step, shapes[-1:]))
    for step, shape in zip(reversed(piece.views), reversed(shapes[:-1]), strict=True):
        match step:
            case Permute(dims):
                target = target.permute(tuple(dims.index(i) for i in range(len(dims))))
            case Reshape():
                try:
                    target = target.view(shape)
                except RuntimeError:
                    return None
    return target
