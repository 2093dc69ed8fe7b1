"""The methods of `automatch.adapt`: tensors of one shape into another, with values dropped or invented."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to adapt: the shapes it fits, in code and words, and what it computes from (checkpoint, initial) values."""

    fits: Callable[[Shape, Shape], bool]
    needs: str
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _overlap(tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    result = initial.detach().clone()
    corner = tuple(slice(0, min(old, new)) for old, new in zip(tensor.shape, initial.shape, strict=True))
    result[corner] = tensor[corner].to(result.dtype)
    return result


def grid_of(tokens: int) -> tuple[int, int] | None:
    """(class tokens, side) of a square grid behind 0, 1 or 2 class tokens; None when there is no such grid."""
    for extra in (0, 1, 2):
        side = math.isqrt(max(tokens - extra, 0))
        if side and side * side == tokens - extra:
            return extra, side
    return None


Resize = Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
Grid = tuple[int, int] | None


def _split(tokens: int, grid: Grid) -> tuple[int, int, int] | None:
    """(class tokens, height, width) of a grid behind 0, 1 or 2 class tokens; a square one unless its size is given."""
    if grid is None:
        found = grid_of(tokens)
        return found and (found[0], found[1], found[1])
    extra = tokens - math.prod(grid)
    return (extra, *grid) if extra in (0, 1, 2) and min(grid) > 0 else None


def _grids(source: Shape, target: Shape, old: Grid = None, new: Grid = None) -> bool:
    if len(source) != len(target) or len(source) not in (2, 3, 4) or (source[-1] != target[-1] and len(source) != 4):
        return False
    if len(source) == 4:
        return source[:2] == target[:2] or (source[0], source[3]) == (target[0], target[3])
    return source[:-2] == target[:-2] and _split(source[-2], old) is not None and _split(target[-2], new) is not None


def _interpolate(tensor: torch.Tensor, initial: torch.Tensor, resize: Resize, old: Grid = None, new: Grid = None) -> torch.Tensor:
    if tensor.ndim == 4 and tensor.shape[:2] == initial.shape[:2]:
        return resize(tensor, tuple(initial.shape[2:]))
    if tensor.ndim == 4:  # channels last
        return resize(tensor.permute(0, 3, 1, 2), tuple(initial.shape[1:3])).permute(0, 2, 3, 1).contiguous()
    before, after = _split(tensor.shape[-2], old), _split(initial.shape[-2], new)
    assert before is not None
    assert after is not None
    tokens = tensor.reshape(-1, *tensor.shape[-2:])
    front, grid = tokens[:, : before[0]], tokens[:, before[0] :]
    grid = grid.reshape(len(grid), *before[1:], -1).permute(0, 3, 1, 2)
    grid = resize(grid, after[1:]).flatten(2).transpose(1, 2)
    begin = initial.detach().reshape(-1, *initial.shape[-2:])[:, : after[0]].clone().to(grid.dtype)
    begin[:, : min(before[0], after[0])] = front[:, : after[0]]
    return torch.cat([begin, grid], 1).reshape(initial.shape)


def _bicubic(grid: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return functional.interpolate(grid.float(), size=size, mode="bicubic", antialias=True).to(grid.dtype)


def _plain_bicubic(grid: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return functional.interpolate(grid.float(), size=size, mode="bicubic", align_corners=False).to(grid.dtype)


def _interpolate_1d(tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    rows = tensor.reshape(-1, *tensor.shape[-2:]).transpose(1, 2).float()
    longer = functional.interpolate(rows, size=initial.shape[-2], mode="linear", align_corners=True)
    return longer.transpose(1, 2).to(tensor.dtype).reshape(initial.shape)


def _window_of(rows: int) -> tuple[int, int] | None:
    """(extra rows, side) of a square table of relative positions, whose side is odd."""
    for extra in (0, 3):
        side = math.isqrt(max(rows - extra, 0))
        if side % 2 and side * side == rows - extra:
            return extra, side
    return None


def _relative_position(tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    old, new = _window_of(tensor.shape[0]), _window_of(initial.shape[0])
    assert old is not None
    assert new is not None
    square = new[1] * new[1]
    table = tensor[: old[1] * old[1]].T.reshape(1, -1, old[1], old[1])
    grown = functional.interpolate(table.float(), size=(new[1], new[1]), mode="bicubic", align_corners=False).to(tensor.dtype)
    resized = grown.reshape(-1, square).T
    rest = tensor[old[1] * old[1] :] if new[0] <= old[0] else initial.detach()[square:].to(tensor.dtype)
    return torch.cat([resized, rest[: new[0]]])


def _center(tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(initial.shape, dtype=tensor.dtype)
    inner: list[slice] = []
    outer: list[slice] = []
    for old, new in zip(tensor.shape, initial.shape, strict=True):
        size = min(old, new)
        inner.append(slice((old - size) // 2, (old - size) // 2 + size))
        outer.append(slice((new - size) // 2, (new - size) // 2 + size))
    result[tuple(outer)] = tensor[tuple(inner)]
    return result


def _average(tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    window = tuple(range(2, tensor.ndim))
    total = tensor.sum(window, keepdim=True)
    return (total / math.prod(initial.shape[2:])).expand(initial.shape).contiguous()


def _resize_kernel(tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    modes = {3: "linear", 4: "bicubic", 5: "trilinear"}
    resized = functional.interpolate(tensor.float(), size=tuple(initial.shape[2:]), mode=modes[tensor.ndim], align_corners=False)
    return (resized * (math.prod(tensor.shape[2:]) / math.prod(initial.shape[2:]))).to(tensor.dtype)


def _channels(tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    old, new = tensor.shape[1], initial.shape[1]
    if new < old:
        return tensor.reshape(tensor.shape[0], old // new, new, *tensor.shape[2:]).sum(1)
    copies = math.ceil(new / old)
    return torch.cat([tensor] * copies, 1)[:, :new] * (old / new)


def _inflate(tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    return (tensor.unsqueeze(2) / initial.shape[2]).expand(initial.shape).contiguous()


def _same_rank(source: Shape, target: Shape) -> bool:
    return len(source) == len(target) and len(source) > 0


def _kernels(source: Shape, target: Shape) -> bool:
    return len(source) == len(target) and len(source) in (3, 4, 5) and source[:2] == target[:2]


def _one_by_one(source: Shape, target: Shape) -> bool:
    return _kernels(source, target) and (math.prod(source[2:]) == 1 or math.prod(target[2:]) == 1)


def _channel_counts(source: Shape, target: Shape) -> bool:
    if len(source) != len(target) or len(source) < 2 or source[0] != target[0] or source[2:] != target[2:]:
        return False
    return 0 < source[1] < target[1] or (0 < target[1] and source[1] % target[1] == 0)


def _sequences(source: Shape, target: Shape) -> bool:
    return _same_rank(source, target) and len(source) in (2, 3) and (source[:-2], source[-1]) == (target[:-2], target[-1])


def _tables(source: Shape, target: Shape) -> bool:
    same_heads = len(source) == len(target) == 2 and source[1] == target[1]
    return same_heads and _window_of(source[0]) is not None and _window_of(target[0]) is not None


def _rows(source: Shape, target: Shape) -> bool:
    return _same_rank(source, target) and source[1:] == target[1:]


def _flat_kernels(source: Shape, target: Shape) -> bool:
    return len(source) == 4 and len(target) == 5 and source == (*target[:2], *target[3:])


def _interpolation(resize: Resize, old: Grid, new: Grid) -> Method:
    sizes = [f"{grid[0]}x{grid[1]}" if grid else "square" for grid in (old, new)]
    needs = (
        f"they must be grids ({sizes[0]} and {sizes[1]}), with up to two class tokens, of one width; name others as interpolate:HxW->HxW"
    )
    return Method(partial(_grids, old=old, new=new), needs, partial(_interpolate, resize=resize, old=old, new=new))


METHODS: dict[str, Method] = {
    "rows": Method(_rows, "all axes but the first must agree", _overlap),
    "overlap": Method(_same_rank, "the number of axes must agree", _overlap),
    "interpolate": _interpolation(_bicubic, None, None),
    "interpolate_plain": _interpolation(_plain_bicubic, None, None),
    "interpolate_1d": Method(_sequences, "all axes but the last but one must agree", _interpolate_1d),
    "relative_position": Method(_tables, "both must be ((2h-1)(2w-1) [+ 3], heads) with square windows", _relative_position),
    "center": Method(_kernels, "the channels must agree", _center),
    "average": Method(_one_by_one, "one of the kernels must be 1×1", _average),
    "resize_kernel": Method(_kernels, "the channels must agree", _resize_kernel),
    "channels": Method(
        _channel_counts, "the checkpoint's number of input channels must be smaller, or a multiple of the model's", _channels
    ),
    "inflate": Method(_flat_kernels, "the checkpoint's kernel must be the model's without its depth", _inflate),
}
_GRID = re.compile(r"(interpolate|interpolate_plain):(?:(\d{1,5})x(\d{1,5})->)?(\d{1,5})x(\d{1,5})")


def method_of(name: str) -> Method | None:
    """The method of a name, e.g. ``"rows"``, or ``"interpolate:14x14->14x28"`` with the sizes of the grids; None if there is none."""
    match = _GRID.fullmatch(name)
    if match is None:
        return METHODS.get(name)
    old = (int(match[2]), int(match[3])) if match[2] else None
    return _interpolation(_bicubic if match[1] == "interpolate" else _plain_bicubic, old, (int(match[4]), int(match[5])))
