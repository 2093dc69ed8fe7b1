"""`convert_checkpoint`: a checkpoint under a model's keys, written tensor by tensor, larger than memory if need be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from automatch.apply import open_source
from automatch.conversion import Conversion, Progress
from automatch.convert.content import Content
from automatch.convert.live_file import write_live
from automatch.convert.output import check_output, check_space, forget_cached, staged
from automatch.convert.plan import Planned, plan_conversion
from automatch.convert.safetensors_file import write_folder, write_safetensors
from automatch.convert.torch_file import write_torch
from automatch.errors import CheckpointError
from automatch.mapping import KeyMapping
from automatch.readers import OpenCheckpoint, as_open_checkpoint, open_checkpoint
from automatch.readers._quantised import packing_of

__all__ = ["Conversion", "Progress", "convert_checkpoint"]

SHARD_BYTES = 5 * 10**9
_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def convert_checkpoint(
    mapping: KeyMapping,
    ckpt: Any,
    out: str | Path,
    *,
    verify: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    trust: bool = False,
) -> Conversion:
    """Write the checkpoint that ``mapping`` was made for under the model's keys.

    Tensors are read, converted and written one at a time; those that are only renamed are moved as
    bytes. The output appears under its name when it is complete and on the disk, or not at all.

    Args:
        mapping: what feeds each model key; every match of it is applied, whatever its confidence.
        ckpt: a path, an open checkpoint, or a loaded checkpoint dict.
        out: a ``.safetensors`` file, a torch file (``.pt``, ``.pth``, ``.ckpt``, ``.bin``; whatever else a torch
            checkpoint holds is kept in it), or a folder that does not exist yet (safetensors, in shards if need be).
        verify: read the output again before it gets its name, and compare every tensor with its source.
        max_shard_bytes: the largest shard of a folder, in bytes (at least 1); a tensor is never cut.
        progress: called with (bytes done, bytes in all) as the work goes on.
        trust: allow a pickle to execute code while it is read.

    Raises:
        MappingError: the checkpoint is not the one the mapping was made for, or a match does not fit its tensors.
        CheckpointError: the checkpoint cannot be read, or the output cannot be written.
    """
    path = Path(out)
    suffix = path.suffix.lower()
    if suffix not in ("", ".safetensors", *_TORCH_SUFFIXES):
        raise CheckpointError(f"{str(path)!r} does not say its format; name it .safetensors, .pt, .pth, .ckpt, .bin, or a new folder")
    with open_source(mapping, ckpt, trust=trust) as opened:
        source = as_open_checkpoint(opened)
        plan = plan_conversion(mapping, source)
        check_output(path, source.files, folder=not suffix)
        total = sum(item.nbytes for item in plan)
        check_space(path, total)
        content = Content(mapping, source, total * (2 if verify else 1), progress)
        with staged(path, folder=not suffix) as temporary:
            wrapper = _write(temporary, suffix, plan, mapping, source, content, max_shard_bytes)
            if verify:
                _verify(temporary, wrapper, plan, content)
            source.check_unchanged()
    moved = sum(item.regions is not None for item in plan)
    notes = (*_notes(suffix, source), *_packed_notes(plan, source))
    return Conversion(path, len(plan), total, moved, verify, notes)


def _write(
    path: Path, suffix: str, plan: tuple[Planned, ...], mapping: KeyMapping, source: OpenCheckpoint, content: Content, limit: int
) -> tuple[str, ...]:
    """Write the output, and say where in it the weights are."""
    if not suffix:
        write_folder(path, plan, source.metadata, content, max(limit, 1))
    elif suffix == ".safetensors":
        write_safetensors(path, plan, source.metadata, content)
    elif source.live:
        return write_live(path, plan, mapping, source, content)
    else:
        return write_torch(path, plan, mapping, source, content)
    return ()


def _verify(path: Path, wrapper: tuple[str, ...], plan: tuple[Planned, ...], content: Content) -> None:
    """Open what was written, as anybody would, and compare every tensor with its source."""
    with as_open_checkpoint(open_checkpoint(path, wrapper=wrapper)) as written:
        forget_cached(written.files)
        if set(written.spec.keys) != {item.key for item in plan}:
            raise CheckpointError(f"{path.name!r} reads back with other keys than were written; the disk or its memory is failing")
        for item in plan:
            tensor, region = written.spec[item.key], written.region(item.key)
            if (tensor.shape, tensor.dtype) != (item.shape, item.dtype):
                raise CheckpointError(f"{item.key!r} reads back as {tensor.dtype} {tensor.shape}, not {item.dtype} {item.shape}")
            content.compare(item, region, written)


def _notes(suffix: str, source: OpenCheckpoint) -> tuple[str, ...]:
    if not source.spec.wrapper or (suffix in _TORCH_SUFFIXES and source.tree is not None):
        return ()
    if source.tree is None:
        held = ".".join(source.spec.wrapper)
        return (f"only the weights at {held!a} were converted: whatever else {source.spec.origin} holds (an optimizer, …) is not in it",)
    return ("safetensors holds tensors only: whatever else the checkpoint held is not in it; write a .ckpt to keep it",)


def _packed_notes(plan: tuple[Planned, ...], source: OpenCheckpoint) -> tuple[str, ...]:
    packed = [item.key for item in plan if any(packing_of(key, source.spec) for key in item.match.sources)]
    if not packed:
        return ()
    return (f"{len(packed)} tensors are quantised and were written as they are packed (e.g. {packed[0]!a}); they need their scales",)
