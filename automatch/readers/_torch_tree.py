"""What the pickle of a torch file says of tensors and storages, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from automatch.errors import CheckpointError
from automatch.readers._base import Entry
from automatch.readers._dtypes import ITEM_BYTES, TORCH_STORAGES
from automatch.readers._limits import FREE_EXPANSION_ELEMENTS, check_shape
from automatch.readers._pickle_nodes import Call, Global, Persistent
from automatch.readers._unwrap import Node


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that a pickle refers to."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True)
class TorchTree:
    """The whole content of a torch file, so that it can be written again around other weights.

    Args:
        root: what the pickle describes.
        nodes: the nodes of the weights, by key.
        attributes: what hangs on the weights' own mapping, such as ``_metadata``.
        storage: how a storage is read.
    """

    root: Any
    nodes: Mapping[str, Any]
    attributes: Any
    storage: Callable[[Storage], Entry]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that a pickle describes: a strided view of a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def identity(self) -> tuple[Any, ...]:
        """What two keys of one tensor share."""
        return (self.storage.key, self.dtype, self.offset, self.shape, self.stride)

    @property
    def span(self) -> int:
        """Number of elements from the first to the last one used."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


def walk(tree: Any) -> Iterator[Any]:
    """Every node of a pickle's tree, once each, without recursion."""
    stack, seen = [tree], {id(tree)}
    while stack:
        node = stack.pop()
        yield node
        for child in _children(node):
            if not isinstance(child, str | int | float | bool | bytes | None) and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        table = cast("dict[Any, Any]", node)
        return [*table.values(), *table, getattr(table, "attributes", None)]
    if isinstance(node, list | tuple | set | frozenset):
        return list(cast("list[Any]", node))
    if isinstance(node, Call):
        return [node.function, node.args, node.kwargs, *node.state, *node.items, *node.pairs, *node.pairs.values()]
    return [node.id] if isinstance(node, Persistent) else []


def storage_of(node: Any) -> Storage | None:
    """What a persistent id says of a storage, or None if it is not one of torch's."""
    match node:
        case Persistent(id=("storage", Global(name=name), key, _, int(elements), *_)) if elements >= 0 and name in TORCH_STORAGES:
            return Storage(str(key), TORCH_STORAGES[name], elements)
        case _:
            return None


def tensor_ref(node: Any, key: str, origin: str) -> TensorRef | None:
    """What a call says of the tensor ``key``, or None if it is not one of torch's ways to build a plain tensor.

    Raises:
        CheckpointError: it says what cannot be.
    """
    if not isinstance(node, Call) or not isinstance(node.args, tuple):
        return None
    args = cast("tuple[Any, ...]", node.args)
    match node.path:
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" if args:
            return tensor_ref(args[0], key, origin)
        case "torch._tensor._rebuild_from_type_v2" if len(args) >= 3 and _is_parameter(args[1]) and isinstance(args[2], tuple):
            return tensor_ref(Call(args[0], args[2]), key, origin)
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" if len(args) >= 4:
            storage = storage_of(args[0])
            return storage and _strided(storage, storage.dtype, args[1:4], key, origin)
        case "torch._utils._rebuild_tensor_v3" if len(args) >= 7 and isinstance(args[6], Global):
            storage, dtype = storage_of(args[0]), args[6].name
            return _strided(storage, dtype, args[1:4], key, origin) if storage and dtype in ITEM_BYTES else None
        case _:
            return None


def _is_parameter(node: Any) -> bool:
    return isinstance(node, Global) and node.path in ("torch.nn.parameter.Parameter", "torch.Tensor", "torch.nn.parameter.Buffer")


def _strided(storage: Storage, dtype: str, layout: tuple[Any, ...], key: str, origin: str) -> TensorRef:
    offset, size, stride = layout
    shape, steps = sizes(size, key, origin), sizes(stride, key, origin)
    if type(offset) is not int or offset < 0 or len(shape) != len(steps):
        raise CheckpointError(f"{key!a} of {origin} has an impossible offset or stride; the file is damaged")
    ref = TensorRef(storage, dtype, offset, shape, steps)
    held = storage.elements * ITEM_BYTES[storage.dtype] // ITEM_BYTES[dtype]
    if offset + ref.span > held:
        raise CheckpointError(
            f"{key!a} of {origin} has shape {list(shape)} and reaches beyond its storage of {held} elements; the file is damaged"
        )
    if math.prod(shape) > max(held, FREE_EXPANSION_ELEMENTS):
        raise CheckpointError(f"{key!a} of {origin} has shape {list(shape)} and repeats a storage of only {held} elements; it is not read")
    return ref


def sizes(value: Any, key: str, origin: str) -> tuple[int, ...]:
    """The shape of ``key`` as a pickle holds it: a tuple, a list, or torch's own."""
    if isinstance(value, Call) and value.path == "torch.Size" and isinstance(value.args, tuple) and value.args:
        value = cast("tuple[Any, ...]", value.args)[0]
    return check_shape(value, key, origin)


class TreeNode(Node):
    """How `pick_state` looks into the tree of a pickle."""

    @staticmethod
    def tensor(value: Any, key: str, origin: str) -> TensorRef | None:
        return tensor_ref(value, key, origin)

    @staticmethod
    def shape(tensor: TensorRef) -> tuple[int, ...]:
        return tensor.shape

    @staticmethod
    def mapping(value: Any) -> Mapping[Any, Any] | None:
        if isinstance(value, dict):
            return cast("dict[Any, Any]", value)
        if isinstance(value, Call) and value.pairs:
            return value.pairs
        return None
