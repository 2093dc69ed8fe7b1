"""Causes in words, each with the keys it settles and the lines of code that undo it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from automatch.explain._pairs import CONTAINERS, WRAPPERS, Renamed, jumps
from automatch.export import _text
from automatch.export._script import function
from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import StateSpec, TensorSpec

Kind = Literal[
    "container",
    "wrapper",
    "prefix",
    "renamed",
    "shift",
    "buffers",
    "partitioned",
    "classes",
    "vocabulary",
    "positions",
    "size",
    "architecture",
    "extra",
    "unknown",
]
_SHOWN = 6
_WRAPPING = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")
_OWN = "own = model.state_dict()"


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason why the checkpoint does not load.

    Args:
        kind: what sort of reason.
        text: one or two sentences for a person.
        keys: the keys that it is about.
        code: lines that change ``state_dict``; empty where there is nothing to change.
    """

    kind: Kind
    text: str
    keys: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


def listed(keys: Sequence[str]) -> str:
    """The first few keys, and how many more there are."""
    more = len(keys) - _SHOWN
    return ", ".join(repr(key) for key in keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _number(keys: Sequence[object]) -> str:
    return "1 key" if len(keys) == 1 else f"{len(keys)} keys"


def of_container(unexpected: Sequence[str]) -> list[Cause]:
    """The whole checkpoint where the state_dict inside it belongs: nothing that it holds has the name of a tensor."""
    inner = [key for key in unexpected if key in CONTAINERS]
    if not inner or any("." in key for key in unexpected):
        return []
    text = (
        f"The whole checkpoint was given, not the state_dict inside it: {listed(unexpected)} are what a training script saves. "
        f"The tensors are under {' or '.join(map(repr, inner))}."
    )
    return [Cause("container", text, tuple(unexpected), (f"state_dict = checkpoint[{_text.quote(inner[0])}]",))]


def of_wrapped(unexpected: Sequence[str], model: str) -> list[Cause]:
    """A wrapper before all keys of the checkpoint, where the text does not show the model's."""
    prefix = _wrapped(unexpected)
    if not prefix or model in _WRAPPING:
        return []
    return [_wrapper(Renamed("wrapper", prefix, "", ()), tuple(unexpected), ())]


def of_renamed(found: Renamed, missing: Sequence[str]) -> Cause:
    """The cause behind pairs of keys."""
    keys = tuple(key for pair in found.pairs for key in pair)
    if found.kind == "wrapper":
        return _wrapper(found, keys, missing)
    if found.kind == "prefix":
        return _prefix(found, keys)
    if found.kind == "shift":
        return _shift(found, keys)
    text = f"Modules were renamed or moved: {found.source}* is {found.target}* in the model ({_number(found.pairs)})."
    return Cause("renamed", text, keys, _rename_prefix(found.source, found.target))


def of_matched(matched: Mapping[str, str]) -> Cause:
    """Modules renamed in ways that only matching finds."""
    matches = [Match(target, (source,), confidence=1.0) for target, source in matched.items()]
    mapping = KeyMapping(_side(tuple(matched.values())), _side(tuple(matched)), ()).with_matches(matches)
    text = (
        f"Modules were renamed: {_number(tuple(matched))} have a counterpart by name and structure. The text holds no shapes, "
        "so a transposed or reordered tensor would not be noticed: prefer automatch.load where the files are at hand."
    )
    code = (
        _OWN,
        "",
        *function(mapping),
        "",
        "old = {key: value for key, value in state_dict.items() if key not in own}",
        "state_dict = {key: value for key, value in state_dict.items() if key in own} | convert_checkpoint_keys(old)",
    )
    return Cause("renamed", text, tuple(key for pair in matched.items() for key in pair), code)


def _side(keys: tuple[str, ...]) -> Side:
    return Side.of(StateSpec(tuple(TensorSpec(key, ()) for key in dict.fromkeys(keys))))


def _wrapper(found: Renamed, keys: tuple[str, ...], missing: Sequence[str]) -> Cause:
    used = [name for name in WRAPPERS if name in found.source.split(".") or name in found.target.split(".")]
    who = " and ".join(f"{WRAPPERS[name]} ({name}.)" for name in used)
    if sorted(found.source.split(".")) == sorted(found.target.split(".")):
        text = f"Another part of the model was wrapped by {who} when the checkpoint was saved: {found.source}* is {found.target}* here."
    else:
        where = "checkpoint" if len(found.source) > len(found.target) else "model"
        text = f"The {where} is wrapped by {who}: {found.source}* in the checkpoint is {found.target}* in the model."
    before = _wrapped(missing)
    if not before and any(name in found.target.split(".") for name in used):
        return Cause("wrapper", text, keys, _rename_prefix(found.source, found.target))
    kept = " and ".join(f"part != {_text.quote(name)}" for name in used)
    bare = f'".".join(part for part in key.split(".") if {kept})'
    return Cause("wrapper", text, keys, _rename(f"{_text.quote(before)} + {bare}" if before else bare))


def _wrapped(keys: Sequence[str]) -> str:
    """The wrappers around the whole model: what all its keys begin with, e.g. ``"module."``."""
    before = ""
    for segment in keys[0].split(".") if keys else ():
        if segment not in WRAPPERS or not all(key.startswith(f"{before}{segment}.") for key in keys):
            break
        before += f"{segment}."
    return before


def _rename(expression: str) -> tuple[str, ...]:
    return (f"state_dict = {{{expression}: value for key, value in state_dict.items()}}",)


def _rename_prefix(source: str, target: str) -> tuple[str, ...]:
    old, rest = _text.quote(source), f"key[{len(source)} :]"
    return _rename(f"{f'{_text.quote(target)} + ' if target else ''}{rest} if key.startswith({old}) else key")


def _prefix(found: Renamed, keys: tuple[str, ...]) -> Cause:
    if found.source:
        text = f"Keys of the checkpoint have the prefix {found.source!r}, which the model's lack: it was saved from inside a larger module."
        return Cause("prefix", text, keys, _rename(f"key.removeprefix({_text.quote(found.source)})"))
    text = f"Keys of the model have the prefix {found.target!r}, which the checkpoint's lack: it was saved from a part."
    longer = f"{_text.quote(found.target)} + key"
    return Cause("prefix", text, keys, (_OWN, *_rename(f"{longer} if {longer} in own else key")))


def _shift(found: Renamed, keys: tuple[str, ...]) -> Cause:
    expression = "".join(r"\d+" if part == "*" else re.escape(part) for part in re.split(r"(\*)", found.source.removesuffix("{i}")))
    numbers = re.search(r"\{i([+-]\d+)\}", found.target)
    by = int(numbers[1]) if numbers else 0
    if jumps(found):
        step = 1 if by > 0 else -1
        tails = sorted({source[match.end() :] for source, _ in found.pairs if (match := re.match(expression + r"\d+", source))})
        head = _common(tails)
        text = (
            f"The index of a repeated layer moved: {found.source}.{head} of the checkpoint stands at {{i{step:+d}}} in the model. The "
            "names in between exist on both sides and hold other layers, so loading what has the same name is wrong, and the message does "
            "not show it; compare the shapes before you rely on this."
        )
        return Cause("shift", text, keys, _renumber(expression, r"\d+", step, rf"{re.escape(head)}\." if head else ""))
    text = (
        f"The index of a layer moved: {found.source} is {found.target} in the model ({_number(found.pairs)}): a layer was put in before "
        "it or taken out, so a name that exists on both sides may hold another layer."
    )
    moved = "|".join(sorted({match[1] for source, _ in found.pairs if (match := re.match(expression + r"(\d+)", source))}))
    leaves = {source.rpartition(".")[2] for source, _ in found.pairs}
    tails = "|".join(sorted(map(re.escape, leaves | ({"num_batches_tracked"} if "running_mean" in leaves else set()))))
    return Cause("shift", text, keys, _renumber(expression, moved, by, rf"(?:.*\.)?(?:{tails})$"))


def _common(tails: Sequence[str]) -> str:
    """The path that all tails begin with, e.g. ``".downsample"``."""
    parts = [tail.split(".") for tail in tails]
    shared: list[str] = []
    for names in zip(*(part[:-1] for part in parts), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared).removeprefix(".")


def _renumber(expression: str, numbers: str, by: int, tail: str) -> tuple[str, ...]:
    pattern = rf"^({expression})({numbers})(?=\.{tail})"
    made = f'f"{{m[1]}}{{int(m[2]) {"+" if by > 0 else "-"} {abs(by)}}}"'
    return (f"moved = re.compile({_text.quote_regex(pattern)})", *_rename(f"moved.sub(lambda m: {made}, key)"))


def _buffers(keys: Sequence[str]) -> str:
    names = ", ".join(sorted({key.rpartition(".")[2] for key in keys}))
    return f"{len(keys)} {'buffer' if len(keys) == 1 else 'buffers'} ({names}; {listed(keys[:2])})"


def _drop(ends: str) -> tuple[str, ...]:
    kept = f"key in own or not key.endswith({ends})"
    return (_OWN, f"state_dict = {{key: value for key, value in state_dict.items() if {kept}}}")


def of_buffers(unexpected: Sequence[str], missing: Sequence[str]) -> list[Cause]:
    """Buffers that one side keeps and the other does not; libraries recompute them."""
    causes: list[Cause] = []
    if unexpected:
        text = (
            f"{_buffers(unexpected)} that the checkpoint stores and this version of the model no longer keeps. They are recomputed, "
            "so leaving them out is harmless."
        )
        names = sorted({key.rpartition(".")[2] for key in unexpected})
        ends = repr(tuple(names)) if len(names) > 1 else repr(names[0])
        causes.append(Cause("buffers", text, tuple(unexpected), _drop(ends)))
    if missing:
        text = f"{_buffers(missing)} that the model keeps and the checkpoint does not. Their initial values are right: strict=False."
        causes.append(Cause("buffers", text, tuple(missing)))
    return causes


def of_statistics(unexpected: Sequence[str]) -> list[Cause]:
    """Running statistics of normalisation layers that the model's keep none of."""
    text = (
        f"{len(unexpected)} running statistics of normalisation layers ({listed(unexpected[:2])}) that the model does not keep: "
        "its normalisation is of another kind, or the layer of that name is another one now."
    )
    return [Cause("buffers", text, tuple(unexpected), _drop("('running_mean', 'running_var')"))] if unexpected else []


def of_leftovers(missing: Sequence[str], unexpected: Sequence[str], *, certain: bool) -> list[Cause]:
    """What is to be said of keys that nothing explains.

    Args:
        missing: keys of the model without a counterpart.
        unexpected: keys of the checkpoint without one.
        certain: whether the lists show that they cannot all be renamed to one another.
    """
    if missing and not unexpected and not certain:
        text = f"Cannot tell: the model needs {listed(missing)}, and the text breaks off before it shows what the checkpoint holds instead."
        return [Cause("unknown", text, tuple(missing))]
    if missing and unexpected and not certain:
        text = (
            f"Cannot tell from names alone which of {listed(unexpected)} is which of {listed(missing)}. "
            "With the files at hand: automatch propose CKPT --model MODEL."
        )
        return [Cause("unknown", text, (*missing, *unexpected))]
    if missing:
        text = (
            f"Another architecture or variant: {_number(missing)} of the model that nothing feeds ({listed(missing)})"
            + (f", and {_number(unexpected)} of the checkpoint that the model does not know ({listed(unexpected)})" if unexpected else "")
            + ". No renaming helps; build the model that was saved (automatch find-commit searches the git history for it)."
        )
        return [Cause("architecture", text, (*missing, *unexpected))]
    if unexpected:
        text = (
            f"The checkpoint holds {_number(unexpected)} that the model does not have ({listed(unexpected)}), and the model lacks nothing: "
            "parts that were dropped, or a smaller variant. strict=False leaves them out; make sure that they are not needed."
        )
        return [Cause("extra", text, tuple(unexpected))]
    return []
