"""Shape adaptation: what to do with a tensor whose shape has changed; only for keys that are named with ``adapt=``.

``adapt`` maps patterns of model keys (as in `fnmatch`, e.g. ``"head.*"``) to methods:

- ``"keep"``: the model's initial value stays.
- ``"rows"``: the first rows are copied, as many as both have; new rows keep their initial values (head, vocabulary).
- ``"overlap"``: the same along every axis.
- ``"interpolate"``: position embeddings over a square grid, class tokens kept in front, bicubic as timm does (with antialiasing);
  ``"interpolate:14x14->14x28"`` for other grids, or ``"interpolate:14x28"`` from a square one.
- ``"interpolate_plain"``: the same without antialiasing, as transformers does.
- ``"interpolate_1d"``: position embeddings over a sequence, linear.
- ``"relative_position"``: relative position bias tables, ``((2h-1)(2w-1) [+ 3], heads)``, bicubic as timm does.
- ``"center"``: kernels are cropped to, or padded with zeros around, their centre.
- ``"average"``: kernels are averaged to 1×1, or spread evenly from 1×1, with the same sum.
- ``"resize_kernel"``: kernels are interpolated, with the same sum (patch embeddings).
- ``"channels"``: input channels are repeated and scaled, or summed, so that a grey image gives the same result (RGB ↔ grey).
- ``"inflate"``: 2-D kernels are repeated along a new depth axis, with the same sum (video, volumes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from automatch.counterparts import Counterparts
from automatch.errors import MappingError, TransformError
from automatch.mapping import KeyMapping, Match
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import Adapt, Chain, Transform, apply_transform, chain, output_shape

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
KEEP = "keep"
_FEW = 100  # of more keys that share their last word alone, none stands out
_POSITION = re.compile(r"(^|[._])(abs(olute)?_)?(pos|position(s|al)?)(_?(emb|enc|table)[a-z]*)?([._]|$)|(^|[._])(wpe|posemb)([._]|$)")
_TOKENS = re.compile(r"embed|wte|tok|vocab")


@dataclass(frozen=True)
class Adaptations:
    """What ``adapt=`` asks for: matches to apply, the method of each of them, and keys that stay as they are."""

    matches: tuple[Match, ...] = ()
    methods: dict[str, str] = field(default_factory=dict[str, str])
    kept: frozenset[str] = frozenset()


def plan_adaptations(whole: KeyMapping, sure: KeyMapping, adapt: Mapping[str, str], pins: Mapping[str, Any]) -> Adaptations:
    """Find, for every key that ``adapt`` names and nothing sure feeds, the source that is adapted to it.

    Raises:
        MappingError: a method or pattern is unknown, or no source, or more than one, fits.
    """
    _check_methods(adapt)
    source, target = whole.source.spec, whole.target.spec
    if not adapt or source is None or target is None:
        return Adaptations()
    matches: list[Match] = []
    methods: dict[str, str] = {}
    kept: set[str] = set()
    exact = {m.target for m in sure.matches if not is_adapted(m.transform)}
    counterparts = Counterparts(sure)
    for pattern, method in adapt.items():
        named = [t for t in target if fnmatchcase(t.key, pattern)]
        if not named:
            raise MappingError(f"adapt: no key of the model is like {pattern!r}; patterns are whole keys, e.g. 'head.*'")
        for tensor in {t.alias_of or t.key: target[t.alias_of or t.key] for t in named}.values():
            if tensor.key in exact or tensor.key in methods or tensor.key in kept:
                continue
            if method == KEEP:
                kept.add(tensor.key)
                continue
            sources, before = _sources_of(tensor, method, whole, counterparts, pins)
            shape = _shape(before, sources, source)
            step = chain() if shape == tensor.shape else Adapt(method, tensor.shape)
            matches.append(Match(tensor.key, sources, chain(before, step), confidence=1.0, decided=True))
            if shape == tensor.shape:  # e.g. the bias of a kernel that has changed
                continue
            methods[tensor.key] = f"{method}: {_cause(tensor.key, shape, tensor.shape)[0]} (checkpoint {shape}, model {tensor.shape})"
    return Adaptations(tuple(matches), methods, frozenset(kept))


def pins_to_adapt(pins: Mapping[str, Any], adapt: Mapping[str, str]) -> set[str]:
    """The pinned keys whose source is adapted, and so may have another shape."""
    return {key for key, source in pins.items() if source is not None and any(fnmatchcase(key, pattern) for pattern in adapt)}


def _check_methods(adapt: Mapping[str, str]) -> None:
    from automatch.resize import METHODS, method_of

    for pattern, method in adapt.items():
        if method != KEEP and method_of(method) is None:
            raise MappingError(f"adapt: unknown method {method!r} for {pattern!r}; methods are: {', '.join([KEEP, *METHODS])}")


def _shape(before: Transform, sources: Iterable[str], source: StateSpec) -> Shape:
    return output_shape(before, [source[key].shape for key in sources])


def _sources_of(
    tensor: TensorSpec, method: str, whole: KeyMapping, counterparts: Counterparts, pins: Mapping[str, Any]
) -> tuple[tuple[str, ...], Transform]:
    """The source keys of an adapted tensor, and what is done to them before it is adapted."""
    target = whole.target.spec
    assert target is not None
    for key, pinned in pins.items():
        if pinned is not None and key in target and (target[key].alias_of or key) == tensor.key:
            return ((pinned,) if isinstance(pinned, str) else tuple(pinned)), chain()
    for match in (whole.get(tensor.key), *_alternatives(whole.get(tensor.key))):
        if match is not None and is_adapted(match.transform):
            return match.sources, _before_adapting(match.transform)
    from automatch.resize import method_of

    known = method_of(method)
    assert known is not None
    named = counterparts.renamed(tensor.key)
    if named is not None and counterparts.free[named].shape == tensor.shape:
        return (named,), chain()
    for group in counterparts.groups(tensor.key):
        candidates = [t for t in group if t.shape != tensor.shape and known.fits(t.shape, tensor.shape)]
        if len(candidates) == 1:
            return (candidates[0].key,), chain()
        if candidates:
            raise MappingError(
                f"adapt: {len(candidates)} checkpoint keys may feed {tensor.key!r}: {', '.join(repr(t.key) for t in candidates[:8])}; "
                f"choose one with pins={{{tensor.key!r}: key}}"
            )
    raise MappingError(
        f"adapt: nothing in the checkpoint can feed {tensor.key!r} {tensor.shape} with {method!r}; "
        f"name its source with pins={{{tensor.key!r}: key}}, or keep its initial value with {KEEP!r}"
    )


def resized_sources(keys: Iterable[str], mapping: KeyMapping) -> dict[str, TensorSpec]:
    """The checkpoint tensors that would feed model keys if their shapes had not changed; keys for which none stands out are left out."""
    source, target = mapping.source.spec, mapping.target.spec
    if source is None or target is None:
        return {}
    counterparts = Counterparts(mapping)
    found: dict[str, TensorSpec] = {}
    for key in keys:
        match = mapping.get(key)
        resized = next((m for m in (match, *_alternatives(match)) if m is not None and is_adapted(m.transform)), None)
        if resized is not None:
            found[key] = source[resized.sources[0]]
        elif match is None and (free := _resized_counterpart(target[key], counterparts)) is not None:
            found[key] = free
    return found


def _resized_counterpart(tensor: TensorSpec, counterparts: Counterparts) -> TensorSpec | None:
    renamed, longer, alike = counterparts.groups(tensor.key)
    if any(t.shape == tensor.shape for t in renamed):
        return None  # its shape is what it was
    near = [t for t in alike if _differ_in_one_axis(t.shape, tensor.shape)] if len(alike) <= _FEW else []
    for group in (renamed, longer, near):
        close = [t for t in group if t.shape != tensor.shape]
        if close:
            return close[0] if len(close) == 1 else None
    return None


def _differ_in_one_axis(source: Shape, target: Shape) -> bool:
    return len(source) == len(target) and sum(old != new for old, new in zip(source, target, strict=True)) == 1


def _alternatives(match: Match | None) -> list[Match]:
    return [] if match is None else [Match(match.target, a.sources, a.transform, confidence=a.confidence) for a in match.alternatives]


def is_adapted(transform: Transform) -> bool:
    """Whether a transform invents or drops values."""
    return any(isinstance(step, Adapt) for step in (transform.steps if isinstance(transform, Chain) else (transform,)))


def _before_adapting(transform: Transform) -> Transform:
    steps = transform.steps if isinstance(transform, Chain) else (transform,)
    return chain(*(step for step in steps if not isinstance(step, Adapt)))


def apply_adapted(transform: Transform, tensors: list[torch.Tensor], initial: torch.Tensor) -> torch.Tensor:
    """Apply a transform that ends in an `Adapt`; what the checkpoint cannot give is taken from ``initial``.

    Raises:
        TransformError: the method does not fit the shapes.
    """
    from automatch.resize import METHODS, method_of

    steps = transform.steps if isinstance(transform, Chain) else (transform,)
    last = steps[-1]
    method = method_of(last.method) if isinstance(last, Adapt) else None
    if not isinstance(last, Adapt) or method is None:
        raise TransformError(f"unknown adaptation {last!r}; methods are: {', '.join(METHODS)}")
    tensor = apply_transform(_before_adapting(transform), tensors)
    if not method.fits(tuple(tensor.shape), last.shape):
        raise TransformError(f"{last.method!r} cannot turn {tuple(tensor.shape)} into {last.shape}: {method.needs}")
    return method.run(tensor, initial)


def explain_mismatch(key: str, source: Shape, target: Shape) -> str:
    """Why the shape of a tensor may have changed, in a sentence, with what `adapt` can do.

    Args:
        key: the model key.
        source: its shape in the checkpoint.
        target: its shape in the model.
    """
    from automatch.resize import METHODS

    why, methods = _cause(key, source, target)
    fitting = [method for method in methods if METHODS[method].fits(source, target)]
    return f"{why} (checkpoint {source}, model {target}); adapt: {' or '.join([*fitting, KEEP])}"


def _cause(key: str, source: Shape, target: Shape) -> tuple[str, tuple[str, ...]]:
    """Why a shape may have changed, and the methods that may help."""
    name = key.lower()
    if len(source) == len(target) - 1 and len(target) == 5 and source[:2] == target[:2]:
        return "a 2-D kernel in a 3-D model", ("inflate",)
    if len(source) != len(target):
        return "another layout", ()
    changed = [axis for axis, (old, new) in enumerate(zip(source, target, strict=True)) if old != new]
    if "relative_position" in name or "rel_pos" in name:
        return "another window size", ("relative_position", "interpolate_1d")
    if _POSITION.search(name):
        return "another patch grid or sequence length", ("interpolate", "interpolate_1d")
    if len(source) >= 3 and changed and min(changed) >= 2:
        return "another kernel", ("center", "average", "resize_kernel")
    if len(source) >= 3 and changed == [1]:
        return "another number of input channels", ("channels", "overlap")
    if changed == [0] and _TOKENS.search(name):
        return "another vocabulary", ("rows",)
    if changed == [0]:
        return "another number of classes, or another width", ("rows",)
    return "another width", ("overlap",)
