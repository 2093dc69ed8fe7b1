"""safetensors files: the header, in its own order, and each tensor by its bytes."""

from __future__ import annotations

from typing import Any, cast

from automatch.errors import CheckpointError
from automatch.readers._base import SourceFile
from automatch.readers._dtypes import ITEM_BYTES, SAFETENSORS
from automatch.readers._entries import FileEntry
from automatch.readers._limits import MAX_JSON_BYTES, check_count, check_shape, parse_json


def read_header(file: SourceFile) -> tuple[dict[str, FileEntry], dict[str, str]]:
    """The entries of a file in header order, and its metadata.

    Raises:
        CheckpointError: the header is damaged, or an entry lies outside the file or on another one.
    """
    origin = str(file.path)
    if file.size < 8:
        raise CheckpointError(f"{origin} is too short for a safetensors file ({file.size} bytes); fetch it again")
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > MAX_JSON_BYTES or 8 + length > file.size:
        raise CheckpointError(f"the header of {origin} declares {length} bytes, but the file has {file.size}; it is truncated or damaged")
    header = parse_json(file.read(8, length).tobytes(), origin)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in cast("dict[str, Any]", metadata).values()):
        raise CheckpointError(f"the metadata of {origin} is not text; the file is damaged")
    check_count(len(header), origin)
    entries = {key: _entry(file, key, value, 8 + length) for key, value in header.items()}
    _check_layout(entries, 8 + length, file)
    return entries, cast("dict[str, str]", metadata)


def _entry(file: SourceFile, key: str, value: Any, base: int) -> FileEntry:
    match value:
        case {"dtype": str(code), "shape": list(sizes), "data_offsets": [int(start), int(stop)]} if code in SAFETENSORS:
            shape = check_shape(sizes, key, str(file.path))
        case {"dtype": str(code)} if code not in SAFETENSORS:
            raise CheckpointError(f"{key!r} of {file.path} has dtype {code[:40]!r}, which this automatch does not know")
        case _:
            raise CheckpointError(f"the header entry of {key[:200]!a} in {file.path} is malformed; the file is damaged")
    dtype = SAFETENSORS[code]
    if dtype == "float4_e2m1fn_x2" and shape:
        shape = (*shape[:-1], shape[-1] // 2)
    nbytes = ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= size
    if not 0 <= start <= stop or stop - start != nbytes or base + stop > file.size:
        raise CheckpointError(
            f"{key[:200]!a} of {file.path} needs {nbytes} bytes, but its header gives it {start} to {stop} "
            f"of {file.size - base}; the file is truncated or damaged"
        )
    return FileEntry(file, base + start, nbytes, dtype, shape)


def _check_layout(entries: dict[str, FileEntry], base: int, file: SourceFile) -> None:
    end = base
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            kind = "overlaps another tensor" if entry.offset < end else "follows a hole"
            raise CheckpointError(f"{key[:200]!a} of {file.path} {kind} at byte {entry.offset}; the file is damaged")
        end += entry.nbytes
    if end != file.size:
        raise CheckpointError(f"{file.path} has {file.size} bytes, but its header describes {end}; the file is damaged")
