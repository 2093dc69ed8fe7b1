"""The last checks before loading: what PyTorch would cast, tie or share without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from automatch.apply import is_floating
from automatch.errors import LoadError
from automatch.specs import StateSpec, dtype_name

if TYPE_CHECKING:
    import torch


def prepare_state(target: StateSpec, state: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make tensors fit to be loaded: checked against the model's ``current`` ones, and ready to take the place of meta ones.

    Raises:
        LoadError: a tensor has no values, would lose its meaning in the model's dtype, or tied keys are to get
            different values; the message names the key.
    """
    prepared: dict[str, torch.Tensor] = {}
    taken: dict[int, list[tuple[int, int]]] = {}
    for key, tensor in state.items():
        first = target[key].alias_of
        _check(key, tensor, target[key].kind, current[key])
        if first is not None and first in state:
            _check_tied(first, key, state[first], tensor)
            continue
        prepared[key] = _to_assign(tensor, current[key], taken) if current[key].is_meta else tensor
    return prepared


def _check(key: str, tensor: torch.Tensor, kind: str | None, current: torch.Tensor) -> None:
    if tensor.is_meta:
        raise LoadError(f"the checkpoint's tensor for {key!r} is on the meta device and has no values; the model is unchanged")
    if type(current).__name__ == "DTensor":
        raise LoadError(f"{key!r} of the model is sharded over several processes; load it with automatch.distributed.load")
    if tuple(tensor.shape) != tuple(current.shape):
        raise LoadError(
            f"size mismatch for {key!r}: checkpoint {tuple(tensor.shape)}, model {tuple(current.shape)}; the model is unchanged"
        )
    have, want = dtype_name(tensor.dtype), dtype_name(current.dtype)
    if have == want or (is_floating(have) and is_floating(want)):
        return
    if tensor.is_complex() != current.is_complex() or (kind == "parameter" and not is_floating(have)) or not _survives(tensor, current):
        hint = "; are these quantised weights? Load them with the library that packed them" if is_floating(want) else ""
        raise LoadError(
            f"dtype mismatch for {key!r}: checkpoint {have}, model {want}; casting would change values, the model is unchanged{hint}"
        )


def _survives(tensor: torch.Tensor, current: torch.Tensor) -> bool:
    return bool((tensor.to(current.dtype).to(tensor.dtype) == tensor).all())


def _to_assign(tensor: torch.Tensor, current: torch.Tensor, taken: dict[int, list[tuple[int, int]]]) -> torch.Tensor:
    """The tensor in the model's dtype, contiguous, and in memory that no other key of the model uses."""
    tensor = tensor.detach().to(current.dtype).contiguous()
    ranges = taken.setdefault(tensor.untyped_storage().data_ptr(), [])
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    if any(start < other_end and other_start < end for other_start, other_end in ranges):
        return tensor.clone()
    ranges.append((start, end))
    return tensor


def _check_tied(first: str, key: str, kept: torch.Tensor, tensor: torch.Tensor) -> None:
    import torch

    if kept.data_ptr() != tensor.data_ptr() and not torch.equal(kept.to(tensor.dtype), tensor):
        raise LoadError(
            f"{first!r} and {key!r} are one tensor in the model (tied), but the checkpoint holds different values for them; "
            f"choose one with pins={{{key!r}: None}} or untie them in the model"
        )


def cast_warnings(state: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """One sentence per pair of dtypes in which values are rounded."""
    counts: dict[tuple[str, str], int] = {}
    for key, tensor in state.items():
        have, want = tensor.dtype, current[key].dtype
        if have != want and is_floating(dtype_name(have)) and tensor.element_size() > current[key].element_size():
            pair = (dtype_name(have), dtype_name(want))
            counts[pair] = counts.get(pair, 0) + 1
    return tuple(f"{number} tensors are rounded from {have} to the model's {want}" for (have, want), number in counts.items())
