"""What automatch knows of a model or a checkpoint: names, shapes, dtypes and order, never values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from automatch.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch

Kind = Literal["parameter", "buffer"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One entry of a state_dict.

    Args:
        key: its full name, e.g. ``"encoder.layers.0.norm.weight"``.
        shape: its dimensions; ``()`` for a scalar.
        dtype: torch's name without the prefix, e.g. ``"float32"``.
        kind: parameter or buffer; None where a file cannot say.
        alias_of: the first key that is the same tensor (tied weights), or None.
        owner: class name of the module that registered it; None where a file cannot say.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: Kind | None = None
    alias_of: str | None = None
    owner: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class StateSpec:
    """The entries of one model or checkpoint, in registration (or file) order.

    Args:
        tensors: the entries; keys are unique.
        origin: where it came from, for messages: a path or a class name.
        wrapper: the path of dict keys that was unwrapped, e.g. ``("state_dict",)``.
        modules: (module path, class name) of every module, in registration order; empty for a file.
        notes: what the reader wants a person to know, e.g. which of two nested state dicts was taken.
    """

    tensors: tuple[TensorSpec, ...]
    origin: str = ""
    wrapper: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self._index) != len(self.tensors):
            seen: set[str] = set()
            twice = next(t.key for t in self.tensors if t.key in seen or seen.add(t.key))
            raise CheckpointError(f"key {twice!r} stands twice in {self.origin or 'the state_dict'}; keys must be unique")

    @cached_property
    def _index(self) -> dict[str, TensorSpec]:
        return {tensor.key: tensor for tensor in self.tensors}

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __getitem__(self, key: str) -> TensorSpec:
        return self._index[key]

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, in order."""
        return tuple(self._index)

    @cached_property
    def fingerprint(self) -> str:
        """``sha256:...`` over (key, shape, dtype) of every entry, in order."""
        digest = hashlib.sha256()
        ends: dict[tuple[tuple[int, ...], str], str] = {}  # few shapes and dtypes stand under many keys
        for tensor in self.tensors:
            end = ends.get((tensor.shape, tensor.dtype))
            if end is None:
                end = ends[tensor.shape, tensor.dtype] = json.dumps([list(tensor.shape), tensor.dtype])[1:]
            digest.update(f"[{json.dumps(tensor.key)}, {end}\n".encode("utf-8", "surrogatepass"))
        return "sha256:" + digest.hexdigest()


def spec_of_state_dict(state_dict: Mapping[str, Any], *, origin: str = "state_dict") -> StateSpec:
    """Describe a flat mapping of keys to tensors; anything with ``shape`` and ``dtype`` counts as one.

    Raises:
        CheckpointError: a key is not a string, or a value is not a tensor.
    """
    first: dict[object, str] = {}
    tensors: list[TensorSpec] = []
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"key {key!r} of {origin} is {type(key).__name__}, not a string; pass the mapping of names to tensors")
        if not is_tensor(value):
            raise CheckpointError(
                f"entry {key!r} of {origin} is {type(value).__name__}, not a tensor; pass the mapping of names to tensors"
            )
        identity = _identity(value)
        alias = first.setdefault(identity, key) if identity is not None else key
        tensors.append(TensorSpec(key, shape_of(value, key), dtype_name(value.dtype), alias_of=None if alias == key else alias))
    return StateSpec(tuple(tensors), origin)


def spec_of_model(model: torch.nn.Module, *, origin: str | None = None) -> StateSpec:
    """Describe a model: every entry of its state_dict, with kind, alias and owner.

    Raises:
        ModelError: the model has uninitialised (lazy) parameters, whose shape nobody knows yet.
    """
    from torch.nn.parameter import Parameter, UninitializedBuffer, UninitializedParameter

    modules = tuple((path, type(module).__name__) for path, module in model.named_modules(remove_duplicate=False))
    classes = dict(modules)
    first: dict[int, str] = {}
    tensors: list[TensorSpec] = []
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, UninitializedBuffer | UninitializedParameter):
            raise ModelError(f"parameter {key!r} is not initialised yet (lazy module); run one batch through the model first")
        if not is_tensor(value):  # get_extra_state() may return anything
            continue
        alias = first.setdefault(id(value), key)
        tensors.append(
            TensorSpec(
                key,
                shape_of(value, key),
                dtype_name(value.dtype),
                kind="parameter" if isinstance(value, Parameter) else "buffer",
                alias_of=None if alias == key else alias,
                owner=classes.get(key.rpartition(".")[0]),
            )
        )
    return StateSpec(tuple(tensors), origin or type(model).__name__, modules=modules)


def is_tensor(value: object) -> bool:
    """Whether ``value`` looks like a tensor: it has a shape, a dtype and a number of dimensions."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "ndim")


@cache
def dtype_name(dtype: object) -> str:
    """torch's name of a torch or numpy dtype without the prefix, e.g. ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def shape_of(value: Any, key: str) -> tuple[int, ...]:
    """The shape of a tensor as plain integers.

    Raises:
        CheckpointError: a dimension is not a non-negative integer.
    """
    try:
        shape = tuple(map(int, value.shape))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the shape of {key!r} is {value.shape!r}, not a tuple of integers") from error
    if min(shape, default=0) < 0:
        raise CheckpointError(f"the shape of {key!r} is {shape}: a dimension is negative")
    return shape


def owners(spec: StateSpec) -> Iterable[str]:
    """Module paths that own at least one entry, in order of first appearance."""
    return dict.fromkeys(tensor.key.rpartition(".")[0] for tensor in spec)


def _identity(value: Any) -> object | None:
    """What two keys of one tensor share; None where that cannot be known (meta device, empty tensors)."""
    storage = getattr(value, "untyped_storage", None)
    if storage is None or value.is_meta or not value.numel():
        return None
    try:
        pointer = storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # e.g. sparse or wrapper tensors have no storage
        return None
    return (str(value.device), pointer, value.storage_offset(), tuple(value.shape), tuple(value.stride()), value.dtype)
