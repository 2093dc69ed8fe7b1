"""Items: what is matched. A key of its own, a part of a fused tensor, or a stack of repeated tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from automatch.keys import segments_of
from automatch.specs import StateSpec
from automatch.transforms import Copy, Transform

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a part in a fused target: the ``index``-th of ``count`` along ``dim`` of ``key``."""

    key: str
    dim: int
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to match.

    Args:
        key: the key, or an invented one for a virtual item.
        shape: its shape.
        kind: parameter, buffer, or None where unknown.
        owner: class name of the owning module, or None.
        reals: the keys it stands for.
        how: on the source side, from the tensors of `reals` to this item.
        spread: on the target side, from this item to each tensor of `reals`.
        slot: on the target side, the place in a fused tensor (then `reals` holds that tensor's key).
    """

    key: str
    shape: Shape
    kind: str | None
    owner: str | None
    reals: tuple[str, ...]
    how: Transform = Copy()  # noqa: RUF009 - a frozen value
    spread: tuple[Transform, ...] = (Copy(),)
    slot: Slot | None = None


def items_of(spec: StateSpec, without: Iterable[str] = ()) -> list[Item]:
    """One item per entry; an ending that all keys share (TensorFlow's ``/.ATTRIBUTES/VARIABLE_VALUE``) is left out."""
    skipped = set(without)
    entries = [tensor for tensor in spec if tensor.key not in skipped]
    ending = _common_ending([tensor.key for tensor in entries])
    keys = _numbered_from_zero(_nested(_lettered(_uncounted([_plain(t.key[: len(t.key) - len(ending)]) for t in entries]))))
    return [Item(key, t.shape, t.kind, t.owner, (t.key,)) for key, t in zip(keys, entries, strict=True)]


_FLAT = re.compile(r"_(?=[A-Za-z]*\d+(?:_|$))|(?<=\d)_")  # before a piece that ends in a number, and behind one


def _nested(keys: list[str]) -> list[str]:
    """Keys whose modules are written into one segment (Keras: ``conv2_block1_1_bn/gamma``), taken apart at the numbers."""
    if 10 * sum(key.count(".") + key.count("/") > 1 for key in keys) > len(keys):
        return keys
    segments = [segments_of(key) for key in keys]
    flat = sum(len(_FLAT.findall(parts[0])) > 1 for parts in segments if len(parts) == 2)
    if 2 * flat < len(keys):
        return keys
    return [".".join([*_FLAT.split(parts[0]), *parts[1:]]) if len(parts) == 2 else key for key, parts in zip(keys, segments, strict=True)]


_LETTER = re.compile(r"(?<=\d)([a-z])(?:_|(?=[./]|$))")


def _lettered(keys: list[str]) -> list[str]:
    """Keys whose blocks are counted with letters (Keras: ``block4b_expand_bn``; Caffe: ``res4b``), with numbers in their place."""
    found = [_LETTER.search(key) for key in keys]
    letters: dict[str, set[str]] = defaultdict(set)
    for key, letter in zip(keys, found, strict=True):
        if letter:
            letters[key[: letter.start()]].add(letter[1])
    counted = all(sorted(some) == [chr(ord("a") + i) for i in range(len(some))] for some in letters.values())
    if not counted or sum(len(some) > 1 for some in letters.values()) < 2:
        return keys
    return [
        f"{key[: letter.start()]}.{ord(letter[1]) - ord('a')}.{key[letter.end() :]}".rstrip(".") if letter else key
        for key, letter in zip(keys, found, strict=True)
    ]


def _uncounted(keys: list[str]) -> list[str]:
    """Keys without the count that Keras gives to weights without a name (``variable_7`` is the eighth of the whole model)."""
    if not any(key.endswith("/variable") for key in keys):
        return keys
    plain = [re.sub(r"/variable_\d+$", "/variable", key) for key in keys]
    return plain if len(set(plain)) == len(keys) else keys


_UNIQUE = re.compile(r"(.*[^\d_])_1$")


def _numbered_from_zero(keys: Sequence[str]) -> list[str]:
    """Keys in which a module that Keras or TensorFlow made unique (``dense``, ``dense_1``) has the number 0 it was not given."""
    if not any("_1" in key for key in keys):
        return list(keys)
    modules = {tuple(segments[:depth]) for segments in map(segments_of, keys) for depth in range(1, len(segments))}
    plain = {(*path[:-1], found[1]) for path in modules if (found := _UNIQUE.fullmatch(path[-1])) and (*path[:-1], found[1]) in modules}
    if not plain:
        return list(keys)
    result = []
    for key in keys:
        segments = segments_of(key)
        named = [f"{s}_0" if tuple(segments[: d + 1]) in plain else s for d, s in enumerate(segments)]
        result.append("/".join(named) if "/" in key else ".".join(named))
    return result


# What torch.nn.utils.parametrizations stores, under the names of the older torch.nn.utils functions.
_PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.(original[01]?)$")
_OLDER = {"original0": "_g", "original1": "_v", "original": "_orig"}


def _plain(key: str) -> str:
    return _PARAMETRIZED.sub(lambda found: f".{found[1]}{_OLDER[found[2]]}", key) if "parametrizations" in key else key


def shared_ending(keys: Sequence[str]) -> int:
    """How many characters at the end all keys share."""
    low, high = min(keys, key=_backwards), max(keys, key=_backwards)
    count = 0
    for a, b in zip(reversed(low), reversed(high), strict=False):
        if a != b:
            break
        count += 1
    return count


def _backwards(key: str) -> str:
    return key[::-1]


def _common_ending(keys: list[str]) -> str:
    """The whole segments at the end that all of more than two keys share, beyond which every key has two segments left."""
    if len(keys) < 3:
        return ""
    ending = keys[0][len(keys[0]) - shared_ending(keys) :]
    cut = min((i for i in (ending.find("."), ending.find("/")) if i >= 0), default=-1)
    ending = ending[cut:] if cut >= 0 else ""
    return ending if all(len(segments_of(key[: len(key) - len(ending)])) > 1 for key in keys) else ""


@lru_cache(maxsize=1 << 14)
def canonical(shape: Shape) -> Shape:
    """The dimensions above 1 in ascending order: equal for tensors that are a reshape by 1s or a permutation apart."""
    return tuple(sorted(size for size in shape if size != 1))


def squeezed(shape: Shape) -> Shape:
    """The dimensions above 1, in order."""
    return tuple(size for size in shape if size != 1)
