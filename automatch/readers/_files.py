"""Which reader opens a path: told by the content of a file, not by its name."""

from __future__ import annotations

from pathlib import Path

from automatch.errors import CheckpointError
from automatch.readers._base import OpenCheckpoint, SourceFile
from automatch.readers._limits import check_keys
from automatch.readers._live import open_dict
from automatch.readers._safetensors import read_header, specs_of
from automatch.readers._torch import open_torch_legacy, open_torch_zip, open_trusted
from automatch.readers._zip import Archive
from automatch.specs import StateSpec

Wrapper = tuple[str, ...] | None


def open_path(path: Path, *, like: StateSpec | None, wrapper: Wrapper, trust: bool) -> OpenCheckpoint:
    """Open a checkpoint file or folder.

    Raises:
        CheckpointError: it is missing, damaged, or of no known format.
    """
    if path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a folder; pass a checkpoint file")
    file = SourceFile(path)
    try:
        return _open_file(file, like, wrapper, trust)
    except BaseException:
        file.close()
        raise


def _open_file(file: SourceFile, like: StateSpec | None, wrapper: Wrapper, trust: bool) -> OpenCheckpoint:
    if file.size == 0:
        raise CheckpointError(f"{str(file.path)!r} is empty; fetch or save it again")
    head = file.read(0, min(file.size, 16)).tobytes()
    if head[:4] == b"PK\x03\x04" or head[:4] == b"PK\x05\x06":
        return _open_zip(file, like, wrapper, trust)
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        if trust:
            return open_dict(open_trusted(file.path), like, wrapper, str(file.path))
        return open_torch_legacy(file, like, wrapper)
    if head[8:9] == b"{" or file.path.suffix == ".safetensors":
        return open_safetensors(file)
    raise CheckpointError(f"{str(file.path)!r} is of no known format (it begins with {head[:8]!r}); pass a checkpoint file")


def _open_zip(file: SourceFile, like: StateSpec | None, wrapper: Wrapper, trust: bool) -> OpenCheckpoint:
    archive = Archive(file)
    names = archive.members
    if any(name.endswith("data.pkl") for name in names):
        if trust:
            archive.close()
            return open_dict(open_trusted(file.path), like, wrapper, str(file.path))
        return open_torch_zip(file, archive, like, wrapper)
    raise CheckpointError(f"{str(file.path)!r} is a zip archive, but not a checkpoint; pass the checkpoint in it")


def open_safetensors(file: SourceFile) -> OpenCheckpoint:
    """Open one safetensors file."""
    entries, metadata = read_header(file)
    check_keys(entries, str(file.path))
    return OpenCheckpoint(StateSpec(specs_of(entries), str(file.path)), entries, (file,), metadata=metadata)
