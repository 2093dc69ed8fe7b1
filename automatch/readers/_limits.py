"""The bounds on what a file may ask for, and the checks every reader shares.

A file beyond a bound is refused before the memory or time it asks for is spent. The bounds lie far
above every real checkpoint; they stand in `benchmarks/robustness.md` too.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from automatch.errors import CheckpointError

MAX_TENSORS = 500_000
MAX_JSON_BYTES = 100_000_000
MAX_JSON_VALUES = 8_000_000
MAX_PICKLE_BYTES = 256 * 2**20
MAX_PICKLE_OPCODES = 20_000_000
MAX_ZIP_DIRECTORY_BYTES = 64 * 2**20
MAX_KEY_LENGTH = 4096
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**60
MAX_DEPTH = 64
MAX_INFLATION = 100
FREE_INFLATION_BYTES = 64 * 2**20
FREE_EXPANSION_ELEMENTS = 2**24

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check_keys(keys: Iterable[str], origin: str) -> None:
    """Refuse keys that cannot be shown to a person as they are.

    Raises:
        CheckpointError: a key is too long, holds control characters, or two look the same on a screen.
    """
    seen: dict[str, str] = {}
    for key in keys:
        if len(key) > MAX_KEY_LENGTH:
            raise CheckpointError(f"key {key[:60]!a}… of {origin} has {len(key)} characters; at most {MAX_KEY_LENGTH} are allowed")
        if key.isascii():
            if key.isprintable():
                continue
        elif not _UNPRINTABLE.search(key):
            form = unicodedata.normalize("NFC", key)
            twin = seen.setdefault(form, key)
            if twin != key:
                raise CheckpointError(f"keys {twin!a} and {key!a} of {origin} differ only in Unicode form; rename one")
            continue
        raise CheckpointError(f"key {key!a} of {origin} holds control characters; rename it with the program that wrote the file")


def check_shape(shape: Any, key: str, origin: str) -> tuple[int, ...]:
    """The shape as a tuple of integers.

    Raises:
        CheckpointError: a dimension is no integer, negative, or the product is beyond any memory.
    """
    if not isinstance(shape, list | tuple) or not all(type(size) is int for size in cast(Sequence[Any], shape)):
        raise CheckpointError(f"the shape of {key!r} in {origin} is not a list of integers; the file is damaged")
    sizes = tuple(cast(Sequence[int], shape))
    count = 1
    for size in sizes:
        if size < 0:
            raise CheckpointError(f"the shape of {key!r} in {origin} is {list(sizes)}: a dimension is negative; the file is damaged")
        count = min(count * max(size, 1), MAX_ELEMENTS + 1)
    if count > MAX_ELEMENTS or len(sizes) > MAX_DIMENSIONS:
        raise CheckpointError(f"{key!r} in {origin} declares {len(sizes)} dimensions and more than 2^60 elements; the file is damaged")
    return sizes


def check_count(count: int, origin: str) -> None:
    """Refuse more entries than any real checkpoint has.

    Raises:
        CheckpointError: there are more than `MAX_TENSORS`.
    """
    if count > MAX_TENSORS:
        raise CheckpointError(f"{origin} declares {count} entries; at most {MAX_TENSORS} are read")


def parse_json(data: bytes | bytearray, origin: str) -> dict[str, Any]:
    """Parse a JSON object, refusing keys that stand twice.

    Raises:
        CheckpointError: it is too large, nested too deeply, not JSON, no object, or a key stands twice.
    """
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"the JSON of {origin} has {len(data)} bytes; at most {MAX_JSON_BYTES} are read")
    values = data.count(b",") + data.count(b":")
    if values > MAX_JSON_VALUES:
        raise CheckpointError(f"the JSON of {origin} holds some {values} values; at most {MAX_JSON_VALUES} are read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"key {twice[:200]!a} stands twice in {origin}; keys must be unique")
        return table

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise CheckpointError(f"{origin} does not hold valid JSON ({reason}); the file is damaged") from error
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the JSON of {origin} is not an object; the file is damaged")
    return cast("dict[str, Any]", value)
