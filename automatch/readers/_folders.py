"""Folders: Hugging Face models, shards behind an index, and what trainers write as a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

from automatch.errors import CheckpointError
from automatch.readers._base import Entry, OpenCheckpoint, SourceFile
from automatch.readers._entries import Wrapper, open_flat
from automatch.readers._limits import MAX_JSON_BYTES, MAX_KEY_LENGTH, parse_json

# In this order a folder is looked through; the first name that is there is the checkpoint.
PREFERRED = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "flax_model.msgpack",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".gguf", ".npz", ".h5", ".keras")
_BESIDE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "optimizer.bin", "scheduler.bin", "meta.pt")
MAX_FILES = 10_000

Open = Callable[[Path], OpenCheckpoint]


def find_in_folder(folder: Path) -> Path:
    """The one checkpoint in a folder.

    Raises:
        CheckpointError: there is none, or several that nothing tells apart.
    """
    names = sorted(entry.name for entry in _scan(folder))
    found = next((name for name in PREFERRED if name in names), None)
    if found is None:
        indices = [name for name in names if name.endswith(".index.json")]
        files = indices or [name for name in names if name.endswith(_SUFFIXES) and name not in _BESIDE]
        if len(files) > 1:
            raise CheckpointError(f"{str(folder)!r} holds several checkpoints: {', '.join(map(ascii, files[:10]))}; pass one of them")
        found = files[0] if files else _trainer_file(folder, names)
    return folder / found


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for _, entry in zip(range(MAX_FILES), entries, strict=False)]
    except OSError as error:
        raise CheckpointError(f"cannot read folder {str(folder)!r}: {error.strerror or error}") from error
    return found


def _trainer_file(folder: Path, names: list[str]) -> str:
    """The model's file in what DeepSpeed wrote, also through Lightning."""
    steps = [name for name in ("checkpoint", *(n for n in names if n.startswith("global_step"))) if (folder / name).is_dir()]
    latest = folder / "latest"
    if latest.is_file() and latest.stat().st_size < MAX_KEY_LENGTH:
        tag = latest.read_text("utf-8", "replace").strip()
        if tag in names and (folder / tag).is_dir():
            steps = [tag]
    parts = sorted(path.name for step in steps[-1:] for path in (folder / step).glob("*mp_rank_*_model_states.pt"))
    if len(parts) == 1 and not parts[0].startswith("zero_pp_rank"):
        return f"{steps[-1]}/{parts[0]}"
    if parts:
        raise CheckpointError(
            f"{str(folder)!r} is a DeepSpeed checkpoint in {len(parts)} partitions; join them with the zero_to_fp32.py "
            "that lies in it and pass the result"
        )
    if "saved_model.pb" in names or any(name.endswith(".index") for name in names):
        raise CheckpointError(tensorflow_message(str(folder)))
    if {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"} & set(names):
        raise CheckpointError(
            f"{str(folder)!r} is an Orbax checkpoint; restore it and save flax.serialization.to_bytes(params) as .msgpack"
        )
    held = ", ".join(map(ascii, names[:8])) or "nothing"
    raise CheckpointError(f"{str(folder)!r} holds no checkpoint, but {held}; pass a checkpoint file or a model folder")


def tensorflow_message(path: str) -> str:
    """What to do with a TensorFlow checkpoint: no kept library reads one without TensorFlow."""
    return (
        f"{path!r} is a TensorFlow checkpoint, which only TensorFlow reads; there, save "
        "numpy.savez(out, **{k: r.get_tensor(k) for k in r.get_variable_to_shape_map()}) with r = tf.train.load_checkpoint(path), "
        "and pass the .npz"
    )


def inside(folder: Path, name: str, origin: str) -> Path:
    """The path of a file that an index names, which must lie in the index's own folder.

    Raises:
        CheckpointError: the name is absolute, leads out of the folder, or is a link out of it.
    """
    path = folder / name
    if not name or len(name) > MAX_KEY_LENGTH or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise CheckpointError(f"{origin} names the file {name[:200]!a}, which does not lie in its own folder; it is not read")
    real, home = path.resolve(), folder.resolve()
    # In the Hugging Face cache every file of a snapshot is a link into the blobs beside it.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise CheckpointError(f"{origin} names the file {name[:200]!a}, a link out of its own folder; it is not read")
    return path


def open_index(path: Path, open_shard: Open, wrapper: Wrapper) -> OpenCheckpoint:
    """Open the shards behind a ``*.index.json``.

    Raises:
        CheckpointError: the index is damaged, or a shard or a key of it is missing.
    """
    origin = str(path)
    weight_map = _weight_map(path)
    shards: dict[str, OpenCheckpoint] = {}
    entries: dict[str, Entry] = {}
    notes: list[str] = []
    files: list[SourceFile] = []
    metadata: dict[str, str] = {}
    try:
        for name in dict.fromkeys(weight_map.values()):
            shard = inside(path.parent, name, origin)
            if shard.is_dir() or name.endswith(".index.json"):
                raise CheckpointError(f"{origin} names {name!a} as a shard, which is no file of tensors; it is damaged, fetch it again")
            shards[name] = open_shard(shard)
            files += shards[name].files
            metadata |= shards[name].metadata
            notes += _missing_in_index(name, shards[name], weight_map)
        for key, name in weight_map.items():
            if key not in shards[name].entries:
                raise CheckpointError(f"{origin} says that {key!a} lies in {name!a}, but it does not; fetch both again")
            entries[key] = shards[name].entries[key]
        return open_flat(entries, origin, files, metadata=metadata, notes=notes, wrapper=wrapper)
    except BaseException:
        for shard in shards.values():
            shard.close()
        raise


def _weight_map(path: Path) -> dict[str, str]:
    origin = str(path)
    file = SourceFile(path)
    try:
        if file.size > MAX_JSON_BYTES:
            raise CheckpointError(f"{origin} has {file.size} bytes; at most {MAX_JSON_BYTES} are read")
        data = parse_json(file.read(0, file.size).tobytes(), origin)
    finally:
        file.close()
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{origin} has no "weight_map"; it is not the index of a sharded checkpoint')
    table = cast("dict[str, str]", weight_map)
    if not all(isinstance(name, str) for name in cast("Iterable[object]", table.values())):
        raise CheckpointError(f"{origin} names a file by something else than text; it is damaged")
    if len(set(table.values())) > MAX_FILES:
        raise CheckpointError(f"{origin} names more than {MAX_FILES} files; it is not read")
    return table


def _missing_in_index(name: str, shard: OpenCheckpoint, weight_map: dict[str, str]) -> list[str]:
    unlisted = [key for key in shard.spec.keys if key not in weight_map]
    text = f"the index does not list {len(unlisted)} keys of {name!a}, e.g. {unlisted[0]!a}; they are left out" if unlisted else ""
    return [*shard.spec.notes, text] if text else [*shard.spec.notes]
