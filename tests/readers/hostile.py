"""Builds hostile files: each is small, and asks for what a reader must not give."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

DATA = Path(__file__).with_name("data")


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header, as an object or as raw text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object, start: object, stop: object, dtype: object = "F32") -> dict[str, object]:
    """One entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def torch_zip(pickled: bytes, **members: bytes) -> bytes:
    """A torch archive around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": pickled, "data/0": bytes(16), "version": b"3\n", **members}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%sQ"


def tensor(shape: bytes, stride: bytes, *, offset: bytes = b"K\x00", elements: bytes = b"K\x04t") -> bytes:
    """The pickle of ``{"w": tensor}``, with shape, stride and offset as raw operations."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % elements + offset + shape + stride + b"\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s."


HUGE = b"\x8a\x08" + struct.pack("<q", 2**62)

SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "header beyond the file": (safetensors({}, length=1000), "header .* declares 1000 bytes"),
    "header of 2^63 bytes": (safetensors({}, length=2**63), "declares 9223372036854775808 bytes"),
    "too short": (b"\0\0", "too short"),
    "header is a list": (safetensors([]), "not a|known format"),
    "header is no JSON": (safetensors(b"{not json}"), "valid JSON"),
    "header is no UTF-8": (safetensors(b'{"\xff\xfe": 1}'), "valid JSON"),
    "deep nesting": (safetensors(b'{"a":' * 100_000), "nested too deeply"),
    "key stands twice": (safetensors(b'{"a":' + json.dumps(entry([1], 0, 4)).encode() + b',"a":1}', bytes(4)), "'a' stands twice"),
    "overlap": (safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "'b' .* overlaps another tensor"),
    "hole": (safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "follows a hole"),
    "bytes that nobody describes": (safetensors({"a": entry([1], 0, 4)}, bytes(12)), "its header describes"),
    "offsets beyond the file": (safetensors({"a": entry([4], 0, 16)}, bytes(4)), "needs 16 bytes"),
    "offsets backwards": (safetensors({"a": entry([1], 4, 0)}, bytes(4)), "needs 4 bytes"),
    "negative offset": (safetensors({"a": entry([1], -4, 0)}, bytes(4)), "needs 4 bytes"),
    "offset of 2^64": (safetensors({"a": entry([1], 2**64, 2**64 + 4)}, bytes(4)), "needs 4 bytes"),
    "offset as text": (safetensors({"a": entry([1], "0", "4")}, bytes(4)), "malformed"),
    "offset not finite": (safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,Infinity]}}'), "malformed"),
    "negative size": (safetensors({"a": entry([-1], 0, 4)}, bytes(4)), "negative"),
    "sizes that overflow": (safetensors({"a": entry([2**40, 2**40], 0, 0)}), "2\\^60 elements"),
    "sizes times zero": (safetensors({"a": entry([2**40, 2**40, 0], 0, 0)}), "2\\^60 elements"),
    "size as text": (safetensors({"a": entry(["1"], 0, 4)}, bytes(4)), "list of integers"),
    "a thousand dimensions": (safetensors({"a": entry([1] * 1000, 0, 4)}, bytes(4)), "1000 dimensions"),
    "shape does not fit": (safetensors({"a": entry([3], 0, 4)}, bytes(4)), "needs 12 bytes"),
    "unknown dtype": (safetensors({"a": entry([1], 0, 4, "Q99")}, bytes(4)), "'Q99', which this automatch does not know"),
    "entry is no table": (safetensors({"a": 3}), "malformed"),
    "metadata is no text": (safetensors({"__metadata__": {"a": 1}}), "metadata .* not text"),
    "control characters in a key": (safetensors({"a\x1b[2J": entry([1], 0, 4)}, bytes(4)), "control characters"),
    "lone surrogate in a key": (
        safetensors(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "control characters",
    ),
    "text that turns around": (safetensors({"a\u202eb": entry([1], 0, 4)}, bytes(4)), "control characters"),
    "keys alike in Unicode": (safetensors({"é": entry([1], 0, 4), "e\u0301": entry([1], 4, 8)}, bytes(8)), "Unicode form"),
    "a key of a megabyte": (safetensors({"a" * 2**20: entry([1], 0, 4)}, bytes(4)), "1048576 characters"),
}
TORCH: dict[str, tuple[bytes, str]] = {
    "negative size": (torch_zip(tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85")), "negative"),
    "huge size": (torch_zip(tensor(HUGE + b"\x85", b"K\x01\x85")), "2\\^60 elements"),
    "size beyond its storage": (torch_zip(tensor(b"K\x05\x85", b"K\x01\x85")), "beyond its storage"),
    "offset beyond its storage": (torch_zip(tensor(b"K\x02\x85", b"K\x01\x85", offset=b"K\x03")), "beyond its storage"),
    "negative offset": (torch_zip(tensor(b"K\x02\x85", b"K\x01\x85", offset=b"J\xff\xff\xff\xff")), "impossible offset"),
    "negative stride": (torch_zip(tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85")), "negative"),
    "one number repeated 2^40 times": (
        torch_zip(tensor(b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85", b"K\x00\x85")),
        "repeats a storage",
    ),
    "storage larger than its member": (
        torch_zip(tensor(b"K\x08\x85", b"K\x01\x85", elements=b"K\x08t")),
        "beyond its storage",
    ),
    "storage that is missing": (
        torch_zip(tensor(b"K\x04\x85", b"K\x01\x85").replace(b"\x01\x00\x00\x000X", b"\x01\x00\x00\x007X")),
        "'7' is missing",
    ),
    "key stands twice": (torch_zip(b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u."), "'a' stands twice"),
    "text of 2^62 bytes": (torch_zip(b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x."), "longer than|damaged"),
    "memo of 2^31": (torch_zip(b"\x80\x02}r\xff\xff\xff\x7f."), "nothing at all"),
    "number of a million digits": (torch_zip(b"\x80\x02L" + b"9" * 10**6 + b"L\n."), "damaged"),
    "nested a hundred thousand deep": (torch_zip(b"\x80\x02" + b")" + b"\x85" * 10**5 + b"."), "tuple, not a mapping|no tensors"),
    "lists a hundred thousand deep": (torch_zip(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "list, not a mapping"),
    "nested key": (torch_zip(b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"K\x01s."), "used as a key"),
    "two to the hundredth": (torch_zip(b"\x80\x02]" + b"2\x86" * 100 + b"."), "no tensors|not a mapping"),
    "stack runs empty": (torch_zip(b"\x80\x020."), "damaged"),
    "extension registry": (torch_zip(b"\x80\x02\x82\x01."), "EXT1 is not used"),
    "no end": (torch_zip(b"\x80\x02}"), "damaged"),
    "two members of one name": (torch_zip(b"\x80\x02}.", **{"data/1": b""}).replace(b"data/1", b"data/0"), "two members"),
    "big-endian": (torch_zip(b"\x80\x02}.", byteorder=b"big"), "big-endian"),
}


def bomb(size: int = 100 * 2**20) -> bytes:
    """A zip archive that inflates a thousandfold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(size))
    return buffer.getvalue()


def overlapping(copies: int = 50) -> bytes:
    """A zip archive whose members all lie on one another."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/000", bytes(1000))
    whole = buffer.getvalue()
    at = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 4)
    end = whole.index(b"PK\x05\x06")
    last = whole[at:end]
    more = b"".join(last.replace(b"data/000", f"data/{i:03d}".encode()) for i in range(copies))
    first = whole[whole.index(b"PK\x01\x02") : at]
    directory = first + more
    tail = bytearray(whole[end:])
    struct.pack_into("<HHII", tail, 8, copies + 1, copies + 1, len(directory), len(whole[:end]) - len(first) - len(last))
    return whole[: end - len(first) - len(last)] + directory + bytes(tail)


def valid() -> dict[str, bytes]:
    """One small valid file of each format, to damage."""
    state = {"a.weight": torch.ones(3, 2), "b.bias": torch.arange(4), "c": torch.tensor(1.0)}
    found = {"model.safetensors": save(state, metadata={"a": "b"})}
    for name, options in {"zip.pt": {}, "legacy.pt": {"_use_new_zipfile_serialization": False}, "new.pt": {"pickle_protocol": 4}}.items():
        buffer = io.BytesIO()
        torch.save({"state_dict": state, "hyper_parameters": {"x": {1, 2}, "p": Path("x")}}, buffer, **options)
        found[name] = buffer.getvalue()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{key: value.numpy() for key, value in state.items()})
    found["model.npz"] = buffer.getvalue()
    for name in ("flax.msgpack", "flax_chunked.msgpack", "small.gguf"):
        found[name] = (DATA / name).read_bytes()
    found["plain.pkl"] = pickle.dumps({"a": 1, "b": [2.0, (3, "x")]}, protocol=4)
    return found
