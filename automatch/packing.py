"""JSON and tensors as short texts, and back, within bounds; nothing is executed."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

_MAX_BYTES = 256 * 2**20


def pack(data: Any) -> str:
    """JSON data as compressed text."""
    return base64.b64encode(zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 9)).decode()


def unpack(text: str) -> Any:
    """What `pack` was given.

    Raises:
        ValueError: the text is damaged, or unpacks to more than 256 MB.
    """
    try:
        raw = base64.b64decode(text, validate=True)
        unzip = zlib.decompressobj()
        content = unzip.decompress(raw, _MAX_BYTES)
        if unzip.unconsumed_tail or not unzip.eof:
            raise ValueError(f"it is cut short, or unpacks to more than {_MAX_BYTES} bytes")
        return json.loads(content)
    except (binascii.Error, zlib.error, RecursionError) as error:
        raise ValueError(str(error)) from error


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Tensors as text, in the safetensors format."""
    from safetensors.torch import save

    return base64.b64encode(save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()})).decode()


def unpack_tensors(text: str) -> dict[str, torch.Tensor]:
    """What `pack_tensors` was given.

    Raises:
        ValueError: the text is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(base64.b64decode(text, validate=True))
    except (binascii.Error, SafetensorError) as error:
        raise ValueError(str(error)) from error


def flatten(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A tree of tensors as JSON, its tensors put into ``tensors`` by name.

    Raises:
        TypeError: the tree holds something that is neither a tensor, a plain value, a list, tuple nor dict.
    """
    import torch

    if isinstance(tree, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = tree
        return {"tensor": name}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    if isinstance(tree, tuple):
        return {"tuple": [flatten(item, tensors) for item in cast("tuple[Any, ...]", tree)]}
    if isinstance(tree, list):
        return {"list": [flatten(item, tensors) for item in cast("list[Any]", tree)]}
    if isinstance(tree, Mapping):
        return {"dict": [[str(key), flatten(value, tensors)] for key, value in cast("Mapping[Any, Any]", tree).items()]}
    raise TypeError(f"a {type(tree).__name__} cannot be kept; use tensors, plain values, lists, tuples and dicts")


def restore(data: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `flatten` was given.

    Raises:
        ValueError: the data is damaged.
    """
    ((kind, content),) = data.items()
    match kind:
        case "tensor":
            return tensors[str(content)]
        case "value" if content is None or isinstance(content, bool | int | float | str):
            return content
        case "tuple":
            return tuple(restore(item, tensors) for item in content)
        case "list":
            return [restore(item, tensors) for item in content]
        case "dict":
            return {str(key): restore(value, tensors) for key, value in content}
        case _:
            raise ValueError(f"unknown kind {kind!r}")


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree, in order; objects with attributes (model outputs) count as dicts."""
    import torch

    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [leaf for value in cast("Mapping[Any, Any]", tree).values() for leaf in leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in cast("list[Any]", tree) for leaf in leaves(value)]
    if hasattr(tree, "__dataclass_fields__"):
        return [leaf for value in vars(tree).values() for leaf in leaves(value)]
    return []
