"""Values that a module's own code has to take, which may fail: they are given before all others, and can be taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping
from typing import Any, cast

import torch
from torch import nn

from automatch.distributed.chunks import local_chunks
from automatch.errors import LoadError
from automatch.refusal import shorten


class HandOver:
    """A module that takes values through its own code, and can be put back.

    Args:
        model: the module.
        keys: the keys of its state_dict, in order, as torch.distributed.checkpoint names them.
        before: those entries that are not tensors on the meta device, and their values, for all that will be handed over.
    """

    def __init__(self, model: nn.Module, keys: list[str], before: dict[str, Any]) -> None:
        self._model = model
        names = list(model.state_dict())
        self._names = dict(zip(keys, names if len(keys) == len(names) else keys, strict=True))
        self._before = before
        tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]  # pyright: ignore[reportPrivateUsage]
        self._tables = [(cast("dict[str, Any]", table), dict(table)) for table in tables]

    def give(self, meta: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        """Load what stands on the meta device so far, and what is written through the module's own code."""
        tied = _ties(self._model)
        if meta:
            self._load(meta, assign=True)
        if other:
            self._load(other)
        for group in tied:
            _tie(self._model, group, {self._names[key] for key in meta})

    def take_back(self) -> None:
        """Leave the module as it was."""
        for table, old in self._tables:
            table.clear()
            table.update(old)
        if self._before:
            with contextlib.suppress(Exception):  # a module that refuses its own old state cannot be helped
                self._load(self._before)

    def _load(self, state: Mapping[str, Any], *, assign: bool = False) -> None:
        given = {self._names[key]: value for key, value in state.items()}
        result: Any = self._model.load_state_dict(given, strict=False, assign=assign)
        ignored: list[str] = list(getattr(result, "unexpected_keys", ()))
        if ignored:
            raise LoadError(f"{type(self._model).__name__} did not take {shorten(ignored)}")


def storages(model: nn.Module) -> set[int]:
    """Where a module's tensors stand in this rank's memory."""
    tensors = (*model.parameters(), *model.buffers())
    return {local.untyped_storage().data_ptr() for tensor in tensors for local, _ in local_chunks(tensor.detach())}


def is_live(value: torch.Tensor, own: set[int]) -> bool:
    """Whether writing into a state_dict's tensor changes the module: a hook may have made it a copy."""
    return all(local.untyped_storage().data_ptr() in own for local, _ in local_chunks(value.detach()))


def _ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(model: nn.Module, names: list[str], assigned: Container[str]) -> None:
    """Assigning to meta parameters makes one per key; make them one again, the one that was given a value."""
    kept = next((name for name in names if name in assigned), names[0])
    parameter = model.get_parameter(kept)
    for name in names:
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_parameter(leaf, parameter)
