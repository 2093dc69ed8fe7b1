"""torch output: the weights under their new keys, and everything else of the checkpoint as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, cast

from automatch.convert.content import Content
from automatch.convert.output import Output, writing
from automatch.convert.pickle_writer import write_pickle
from automatch.convert.plan import Planned
from automatch.convert.zip_writer import ZipWriter
from automatch.errors import CheckpointError
from automatch.mapping import KeyMapping
from automatch.readers import OpenCheckpoint
from automatch.readers._dtypes import ITEM_BYTES, TORCH_STORAGES
from automatch.readers._pickle_nodes import Attributed, Call, Global, Persistent
from automatch.readers._torch_tree import TorchTree, TreeNode, storage_of, walk
from automatch.readers._unwrap import JOINED
from automatch.readers._zip import ZipEntry
from automatch.transforms import Copy, to_dict

_STORAGE_OF = {dtype: name for name, dtype in TORCH_STORAGES.items() if name != "UntypedStorage"}


def write_torch(path: Path, plan: Sequence[Planned], mapping: KeyMapping, source: OpenCheckpoint, content: Content) -> tuple[str, ...]:
    """Write a file that `torch.load(weights_only=True)` reads, unless the source itself held classes.

    Returns:
        The path of dict keys to the weights in it.
    """
    tree = source.tree if isinstance(source.tree, TorchTree) else None
    fresh: dict[str, Planned] = {}
    state = _new_state(plan, mapping, source, tree, fresh)
    path_in, root = _replaced(tree.root, source.spec.wrapper, state) if tree else ((), state)
    order: dict[str, tuple[str, Persistent]] = {}
    for node in walk(root):
        if isinstance(node, Persistent) and (storage := storage_of(node)) is not None:
            order.setdefault(storage.key, (str(len(order)), node))

    def persistent(node: Persistent) -> Any:
        storage = storage_of(node)
        if storage is None:
            raise CheckpointError(f"{source.spec.origin} refers to something outside itself that is no storage; it cannot be written again")
        return ("storage", node.id[1], order[storage.key][0], "cpu", storage.elements)

    pickled = write_pickle(root, persistent)
    with writing(path) as output:
        archive = ZipWriter(output)
        archive.add_bytes("archive/data.pkl", pickled)
        archive.add_bytes("archive/byteorder", b"little")
        for key, (name, node) in order.items():
            _add_storage(archive, f"archive/data/{name}", key, node, fresh, tree, content)
        archive.add_bytes("archive/version", b"3\n")
        archive.finish()
    return path_in


def _add_storage(
    archive: ZipWriter, name: str, key: str, node: Persistent, fresh: Mapping[str, Planned], tree: TorchTree | None, content: Content
) -> None:
    if key in fresh:
        item = fresh[key]
        archive.add(name, item.nbytes, lambda output: content.write(item, output, checksum=True))
        return
    storage = storage_of(node)
    if storage is None or tree is None:
        raise CheckpointError(f"storage {key!r} has no content")
    entry = tree.storage(storage)
    size = storage.elements * ITEM_BYTES[storage.dtype]
    region = entry.region()

    def write(output: Output) -> int:
        if region is None:
            import zlib

            import torch

            data = entry.read().reshape(-1).view(torch.uint8).numpy().data
            output.write(data)
            return zlib.crc32(data)
        known = isinstance(entry, ZipEntry) and entry.start == 0 and entry.nbytes == entry.member.file_size
        crc = output.move(region, content.tick, checksum=not known)
        return entry.member.CRC if known and isinstance(entry, ZipEntry) else crc

    archive.add(name, size, write)


def _new_state(
    plan: Sequence[Planned], mapping: KeyMapping, source: OpenCheckpoint, tree: TorchTree | None, fresh: dict[str, Planned]
) -> Attributed:
    """The state_dict: plain renames keep their node, everything else gets a storage of its own."""
    state = Attributed()
    made: dict[str, Call] = {}
    for item in plan:
        match = item.match
        if tree is not None and isinstance(match.transform, Copy):
            state[item.key] = tree.nodes[match.sources[0]]
            continue
        stored = [source.spec[key].alias_of or key for key in match.sources]
        identity = json.dumps([stored, to_dict(match.transform)])
        if identity not in made:
            storage = f"fresh {len(made)}"
            fresh[storage] = item
            made[identity] = _tensor_call(item, storage)
        state[item.key] = made[identity]
    if tree is not None:
        state.attributes = _module_versions(tree.attributes, mapping)
    return state


def _tensor_call(item: Planned, storage: str) -> Call:
    stride: list[int] = []
    step = 1
    for size in reversed(item.shape):
        stride.insert(0, step)
        step *= size
    kind = _STORAGE_OF.get(item.dtype)
    count = item.nbytes // ITEM_BYTES[item.dtype] if kind else item.nbytes
    holder = Persistent(("storage", Global("torch" if kind else "torch.storage", kind or "UntypedStorage"), storage, "cpu", count))
    args = (holder, 0, item.shape, tuple(stride), False, Attributed())
    if kind:
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)
    return Call(Global("torch._utils", "_rebuild_tensor_v3"), (*args, Global("torch", item.dtype)))


def _module_versions(attributes: Any, mapping: KeyMapping) -> Any:
    """The versions that modules left in a state_dict, under the modules' new names."""
    versions = cast("dict[str, Any]", attributes).get("_metadata") if isinstance(attributes, dict) else None
    if not isinstance(versions, dict):
        return None
    table = cast("dict[str, Any]", versions)
    renamed = Attributed({"": table[""]} if "" in table else {})
    for match in mapping.matches:
        owner, old = match.target.rpartition(".")[0], match.sources[0].rpartition(".")[0]
        if old in table:
            renamed.setdefault(owner, table[old])
    return {"_metadata": renamed}


def _replaced(root: Any, path: tuple[str, ...], state: Attributed) -> tuple[tuple[str, ...], Any]:
    """The tree with other weights at ``path``; only the containers on the way are copied."""
    if path[-1:] == (JOINED,):
        return (), state
    if not path:
        others = TreeNode.mapping(root) or {}
        for key, value in others.items():
            if not _is_tensor(key, value) and key not in state:
                state[key] = value
        return (), state
    return path, _with_child(root, path, state)


def _with_child(node: Any, path: tuple[str, ...], state: Attributed) -> Any:
    if not path:
        others = TreeNode.mapping(node) or {}
        state.update({key: value for key, value in others.items() if not _is_tensor(key, value) and key not in state})
        return state
    head, rest = path[0], path[1:]
    if isinstance(node, list | tuple):
        items = list(cast("Sequence[Any]", node))
        items[int(head)] = _with_child(items[int(head)], rest, state)
        return items if isinstance(node, list) else tuple(items)
    changed = copy(node)
    if isinstance(changed, Call):
        changed.pairs = dict(changed.pairs)
        changed.pairs[head] = _with_child(changed.pairs[head], rest, state)
    else:
        changed[head] = _with_child(changed[head], rest, state)
    return changed


def _is_tensor(key: Any, value: Any) -> bool:
    return TreeNode.tensor(value, str(key), "the checkpoint") is not None
