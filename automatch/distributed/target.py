"""What ranks load into: a module, with its optimizer or without, or a state_dict; staged first, then changed at once."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint._traverse import set_element  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from automatch.distributed.chunks import local_chunks
from automatch.distributed.entries import sections
from automatch.distributed.handover import HandOver, is_live, storages
from automatch.errors import LoadError, ModelError
from automatch.specs import StateSpec, TensorSpec, dtype_name, shape_of, spec_of_model

MODEL, OPTIM = "model", "optim"


class Target:
    """Something to load into.

    Args:
        model: a module, or a state_dict, nested or flat, as torch.distributed.checkpoint takes it.
        optimizer: the module's optimizer, whose state is loaded as well.
        device: where tensors of a meta module are made; None for the device of their mesh, or the CPU.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer | None = None, device: torch.device | str | None = None) -> None:
        self._model = model if isinstance(model, nn.Module) else None
        self._optimizer, self._device = optimizer, device
        self._fresh = optimizer is not None and not optimizer.state
        self._before: Any = None
        self._groups = [_settings(group) for group in optimizer.param_groups] if optimizer is not None else []
        self._handed: HandOver | None = None
        self.nested: dict[str, Any] = {} if isinstance(model, nn.Module) else cast("dict[str, Any]", model)
        self.flat: dict[str, Any] = {}
        self.spec = StateSpec(())
        self._paths: dict[str, Any] = {}

    def describe(self) -> None:
        """Find out what there is to load into; gives an optimizer without state an empty one, which `forget` takes away.

        Raises:
            ModelError: it is no module or state_dict, or an optimizer comes without a materialised module.
        """
        if self._model is not None:
            if any(isinstance(module, FullyShardedDataParallel) for module in self._model.modules()):
                raise ModelError(
                    "an FSDP1 module gives copies of its weights; load into get_model_state_dict(model), then call set_model_state_dict"
                )
            self.nested[MODEL] = get_model_state_dict(self._model)
            self.spec = _module_spec(self._model, self.nested[MODEL])
            if self._optimizer is not None:
                self.nested[OPTIM] = self._optimizer_state(self._optimizer)
        elif isinstance(cast(Any, self.nested), dict) and self._optimizer is None:
            _refuse_stateful(self.nested)
            self.spec = _plain_spec(_tensors(model_part(self.nested)), "state_dict")
        else:
            what = type(self.nested).__name__ + (" with an optimizer" if self._optimizer else "")
            raise ModelError(f"cannot load into {what}; pass a module or a state_dict")
        self.flat, self._paths = flatten_state_dict(self.nested)

    def _optimizer_state(self, optimizer: torch.optim.Optimizer) -> Any:
        assert self._model is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.is_meta for p in parameters):
            raise ModelError(
                "the optimizer holds parameters on the meta device; load the model first, then build its optimizer and load again"
            )
        if self._fresh and any(p.grad is not None for p in parameters):
            raise ModelError("the optimizer has no state yet and its parameters have gradients; call optimizer.zero_grad() first")
        return get_optimizer_state_dict(self._model, optimizer)

    def stage(self, keys: Sequence[str], *, in_place: bool = False) -> dict[str, Any]:
        """What is read into, for the given flat keys: new, empty tensors of the same kind, placement and dtype; objects as they are.

        The state that `describe` gave an optimizer holds nothing to keep, and is read into as it is.

        Args:
            keys: flat keys.
            in_place: read into whatever has memory already; of tied tensors, which have one memory, into the first.
        """
        own = storages(self._model) if self._model is not None else None
        again = {other for _, other in self._tied(dict.fromkeys(keys))}

        def room(key: str, value: torch.Tensor) -> torch.Tensor:
            of_optimizer = self._optimizer is not None and self._paths[key][0] == OPTIM
            over = (in_place or (of_optimizer and self._fresh)) and not value.is_meta and key not in again
            lives = over and (of_optimizer or own is None or is_live(value, own))
            return value.detach() if lives else self._empty_like(value)

        return {key: room(key, value) if isinstance(value := self.flat[key], torch.Tensor) else value for key in keys}

    def _empty_like(self, value: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        if not isinstance(value, DTensor):
            device = (self._device or "cpu") if value.is_meta else value.device
            return torch.empty_like(value, device=device, requires_grad=False)
        local = value.to_local()
        device = (self._device or value.device_mesh.device_type) if local.is_meta else local.device
        empty = torch.empty_like(local, device=device, requires_grad=False)
        return DTensor.from_local(empty, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())

    def check(self, staged: Mapping[str, Any]) -> None:
        """Make sure that keys which are one tensor in the model were given equal values.

        Raises:
            LoadError: two tied keys would get different values.
        """
        for first, other in self._tied(staged):
            pairs = zip(local_chunks(staged[first]), local_chunks(staged[other]), strict=True)
            if any(not torch.equal(a, b) for (a, _), (b, _) in pairs):
                raise LoadError(
                    f"{first!r} and {other!r} are one tensor in the model, and the checkpoint feeds them different values; map one of them"
                )

    def _tied(self, staged: Collection[str]) -> Iterable[tuple[str, str]]:
        for tensor in self.spec:
            first, other = (self._model_key(key) for key in (tensor.alias_of, tensor.key))
            if first in staged and other in staged:
                yield first, other
        seen: dict[Any, str] = {}
        for key in staged:
            value = self.flat[key]
            if isinstance(value, torch.Tensor) and not value.is_meta:
                parts = tuple((part.data_ptr(), part.shape, part.stride()) for part, _ in local_chunks(value.detach()) if part.numel())
                if parts and seen.setdefault(parts, key) != key:
                    yield seen[parts], key

    def name(self, flat: str) -> str:
        """How a person knows a flat key: a module's entries have no prefix."""
        return flat.removeprefix(f"{MODEL}.") if self._model is not None else flat

    def _model_key(self, key: str | None) -> str:
        return f"{MODEL}.{key}" if self._model is not None else str(key)

    # ---- changing it --------------------------------------------------------------------------------------

    def commit_optimizer(self, staged: dict[str, Any]) -> None:
        """Give the optimizer its state; `forget` takes it back."""
        if self._optimizer is None or self._model is None:
            return
        self._before = None if self._fresh else self._optimizer.state_dict()
        state: dict[str, Any] = {}
        for key in [key for key in self.flat if self._paths[key][0] == OPTIM]:
            set_element(state, self._paths[key], staged.pop(key, self.flat[key]))
        set_optimizer_state_dict(self._model, self._optimizer, state[OPTIM], options=StateDictOptions(strict=False))

    def hand_over(self, staged: dict[str, Any]) -> None:
        """Give the module what its own code has to take, which may fail: values for meta tensors, extra state, what hooks convert."""
        if self._model is None:
            return
        own = storages(self._model)
        meta: dict[str, Any] = {}
        other: dict[str, Any] = {}
        before: dict[str, Any] = {}
        for key in list(staged):
            old, path = self.flat[key], self._paths[key]
            if isinstance(old, torch.Tensor) and not old.is_meta and is_live(old, own):
                continue
            name, new = str(path[1]), staged.pop(key)
            if isinstance(old, torch.Tensor) and old.is_meta:
                meta[name] = new
                continue
            before.setdefault(name, copy.deepcopy(self.nested[MODEL][name]))
            if len(path) > 2:  # an entry of a dict of extra state; what is not fed keeps its value
                other.setdefault(name, copy.deepcopy(before[name]))
            set_element(other, path[1:], new)
        if meta or other:
            self._handed = HandOver(self._model, list(self.nested[MODEL]), before)
            self._handed.give(meta, other)

    def forget(self) -> None:
        """Leave optimizer and module as they were found; not to be called once `commit` has begun."""
        if self._handed is not None:
            self._handed.take_back()
        if self._optimizer is not None and self._fresh:
            self._optimizer.state.clear()
            for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
                for name in set(group) - set(settings) - {"params"}:
                    del group[name]
                group.update(settings)
        elif self._optimizer is not None and self._before is not None:
            self._optimizer.load_state_dict(self._before)

    def commit(self, staged: dict[str, Any]) -> None:
        """Write the values that are left into the model (or the state_dict); nothing that can fail for want of data is left."""
        with torch.no_grad():
            for key in list(staged):
                old, new = self.flat[key], staged.pop(key)
                if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and not old.is_meta:
                    for (to, _), (values, _) in zip(local_chunks(old.detach()), local_chunks(new), strict=True):
                        if to.data_ptr() != values.data_ptr():
                            to.copy_(values)
                else:
                    set_element(self.nested, self._paths[key], new)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def model_part(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's entries of a nested state_dict: the dict of tensors that is not an optimizer's.

    Raises:
        ModelError: there is none, or there are several.
    """
    if any(isinstance(value, torch.Tensor) for value in state_dict.values()):
        return state_dict
    inner = {key: value for key, value in state_dict.items() if isinstance(value, Mapping) and not _is_optimizer(value)}
    if MODEL in inner:
        return model_part(inner[MODEL])
    found = [part for part in inner.values() if any(isinstance(v, torch.Tensor | Mapping) for v in part.values())]
    if len(found) != 1:
        raise ModelError(f"which of {', '.join(map(repr, state_dict)) or 'no entries'} is the model's state_dict? Name it 'model'")
    return model_part(found[0])


def _refuse_stateful(state_dict: Mapping[str, Any]) -> None:
    for key, value in state_dict.items():
        if isinstance(value, Stateful):
            raise ModelError(f"entry {key!r} is {type(value).__name__}, which may fail half way; pass module and optimizer, or state_dicts")


def _is_optimizer(part: Mapping[str, Any]) -> bool:
    flat = [f"{key}." for key in part]
    return {"state", "param_groups"} <= set(part) or any(next(sections(key, "param_groups"), None) for key in flat)


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in flatten_state_dict(dict(state_dict))[0].items() if isinstance(value, torch.Tensor)}


def _plain_spec(tensors: Mapping[str, torch.Tensor], origin: str) -> StateSpec:
    return StateSpec(tuple(TensorSpec(key, shape_of(value, key), dtype_name(value.dtype)) for key, value in tensors.items()), origin)


def _module_spec(model: nn.Module, state_dict: Mapping[str, Any]) -> StateSpec:
    """The module's spec under the keys of torch.distributed.checkpoint, which leaves wrappers' prefixes out."""
    spec = spec_of_model(model)
    keys = [key for key, value in state_dict.items() if isinstance(value, torch.Tensor)]
    if list(spec.keys) == keys:
        return spec
    if len(spec) != len(keys):
        return _plain_spec({key: state_dict[key] for key in keys}, type(model).__name__)
    renamed = dict(zip(spec.keys, keys, strict=True))
    tensors = tuple(replace(t, key=renamed[t.key], alias_of=renamed.get(t.alias_of or "")) for t in spec)
    return StateSpec(tensors, spec.origin, modules=spec.modules)
