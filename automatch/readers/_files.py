"""Which reader opens a path: told by the content of a file, not by its name."""

from __future__ import annotations

from pathlib import Path

from automatch.errors import CheckpointError
from automatch.readers._base import OpenCheckpoint, SourceFile
from automatch.readers._dcp import open_dcp
from automatch.readers._entries import Wrapper, open_flat
from automatch.readers._flax import open_flax
from automatch.readers._folders import find_in_folder, open_index, tensorflow_message
from automatch.readers._gguf import open_gguf
from automatch.readers._keras import WEIGHTS, open_hdf5, open_keras_archive
from automatch.readers._live import open_dict
from automatch.readers._npz import open_npz
from automatch.readers._safetensors import read_header
from automatch.readers._torch import open_torch_legacy, open_torch_zip, open_trusted
from automatch.readers._zip import Archive
from automatch.specs import StateSpec

_HDF5 = b"\x89HDF\r\n\x1a\n"


def open_path(path: Path, *, like: StateSpec | None, wrapper: Wrapper, trust: bool) -> OpenCheckpoint:
    """Open a checkpoint file or folder.

    Raises:
        CheckpointError: it is missing, damaged, or of no known format.
    """
    if path.is_dir():
        if (path / ".metadata").is_file():
            return open_dcp(path, like, wrapper)
        return open_path(find_in_folder(path), like=like, wrapper=wrapper, trust=trust)
    if not path.exists() and path.with_name(f"{path.name}.index").is_file():
        raise CheckpointError(tensorflow_message(str(path)))
    if path.name.endswith(".index.json"):
        return open_index(path, lambda shard: open_path(shard, like=None, wrapper=(), trust=trust), wrapper)
    file = SourceFile(path)
    try:
        return _open_file(file, like, wrapper, trust)
    except BaseException:
        file.close()
        raise


def _open_file(file: SourceFile, like: StateSpec | None, wrapper: Wrapper, trust: bool) -> OpenCheckpoint:
    if file.size == 0:
        raise CheckpointError(f"{str(file.path)!r} is empty; fetch or save it again")
    head = file.read(0, min(file.size, 512)).tobytes()
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _open_zip(file, like, wrapper, trust)
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        if trust:
            return open_dict(open_trusted(file.path), like, wrapper, str(file.path))
        return open_torch_legacy(file, like, wrapper)
    if head[:4] == b"GGUF":
        return open_gguf(file, wrapper)
    if head[:8] == _HDF5:
        return open_hdf5(file, file, like, wrapper)
    if head[8:9] == b"{" or file.path.suffix == ".safetensors":
        entries, metadata = read_header(file)
        return open_flat(entries, str(file.path), [file], metadata=metadata, wrapper=wrapper)
    if file.path.suffix == ".msgpack" or head[0] in (0xDE, 0xDF) or 0x80 < head[0] < 0x90:
        return open_flax(file, like, wrapper)
    raise CheckpointError(_unknown(file, head))


def _unknown(file: SourceFile, head: bytes) -> str:
    if head[257:262] == b"ustar":
        return f"{str(file.path)!r} is a tar file of torch 0.1; if you trust it, load it with torch.load and save it again"
    if file.path.suffix == ".index" or ".data-0" in file.path.name:
        return tensorflow_message(str(file.path).rpartition(".")[0])
    if head.startswith(b"version https://git-lfs"):
        return f"{str(file.path)!r} is a Git LFS pointer, not the checkpoint; run git lfs pull"
    if head.lstrip()[:1] == b"<":
        return f"{str(file.path)!r} is a web page, not a checkpoint; fetch it again"
    return f"{str(file.path)!r} is of no known format (it begins with {head[:8]!r}); pass a checkpoint file"


def _open_zip(file: SourceFile, like: StateSpec | None, wrapper: Wrapper, trust: bool) -> OpenCheckpoint:
    archive = Archive(file)
    names = archive.members
    if any(name.endswith("data.pkl") for name in names):
        if trust:
            return open_dict(open_trusted(file.path), like, wrapper, str(file.path))
        return open_torch_zip(file, archive, like, wrapper)
    if WEIGHTS in names:
        return open_keras_archive(file, archive, like, wrapper)
    if any(name.endswith(".npy") for name in names):
        return open_npz(file, archive, wrapper)
    raise CheckpointError(f"{str(file.path)!r} is a zip archive, but not a checkpoint; pass the checkpoint in it")
