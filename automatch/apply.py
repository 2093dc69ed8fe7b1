"""`apply_mapping`: a checkpoint and its mapping in, a state_dict with the model's keys out; no model is touched."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from automatch.adapt import apply_adapted, is_adapted
from automatch.errors import CheckpointError, MappingError, TransformError
from automatch.mapping import KeyMapping, Match, Side
from automatch.readers import Checkpoint, open_checkpoint
from automatch.specs import StateSpec, shape_of
from automatch.transforms import apply_transform, output_shape, to_dict

if TYPE_CHECKING:
    import torch


def apply_mapping(mapping: KeyMapping, ckpt: Any, *, trust: bool = False) -> dict[str, torch.Tensor]:
    """Compute the model's state_dict from the checkpoint that ``mapping`` was made for.

    Plain renames and cuts are views of the checkpoint's tensors; only joined and reordered ones are new.

    Args:
        mapping: what feeds each model key; every match of it is applied, whatever its confidence.
        ckpt: a path, an open checkpoint, or a loaded checkpoint dict.
        trust: allow a pickle to execute code while it is read.

    Returns:
        Model key to tensor, in the model's order; keys that nothing feeds are left out.

    Raises:
        MappingError: the checkpoint is not the one the mapping was made for, or a match does not fit its tensors.
        CheckpointError: the checkpoint cannot be read.
    """
    with open_source(mapping, ckpt, trust=trust) as checkpoint:
        return dict(convert(mapping.matches, checkpoint, mapping.target.spec))


@contextmanager
def open_source(mapping: KeyMapping, ckpt: Any, *, trust: bool = False) -> Generator[Checkpoint]:
    """Open the checkpoint of ``mapping`` at the place it was made for, and make sure it is that one."""
    with _open(mapping, ckpt, trust) as checkpoint:
        check_side(mapping.source, checkpoint.spec, "checkpoint")
        yield checkpoint


def _open(mapping: KeyMapping, ckpt: Any, trust: bool) -> Checkpoint:
    if isinstance(ckpt, StateSpec):
        raise MappingError("a StateSpec holds no values; pass the checkpoint itself (a path or a loaded dict)")
    like, spec = mapping.target.spec, mapping.source.spec
    if spec is not None and spec.wrapper:
        try:
            return open_checkpoint(ckpt, like=like, wrapper=spec.wrapper, trust=trust)
        except CheckpointError:  # the inner state_dict may have been passed, without its wrapper
            if not isinstance(ckpt, Mapping):
                raise
    return open_checkpoint(ckpt, like=like, trust=trust)


def check_side(side: Side, spec: StateSpec, what: str) -> None:
    """Make sure that ``spec`` is what one side of a mapping was made for; floating dtypes and order may differ.

    Args:
        side: the side of the mapping.
        spec: what is there now.
        what: "checkpoint" or "model", for the message.

    Raises:
        MappingError: keys or shapes differ; the message names the first difference.
    """
    if side.fingerprint == spec.fingerprint:
        return
    made_for = side.spec
    if made_for is None or made_for.fingerprint != side.fingerprint:
        difference = f"fingerprint {side.fingerprint[:19]}… there, {spec.fingerprint[:19]}… here"
    else:
        found = first_difference(made_for, spec)
        if found is None:
            return
        difference = found
    raise MappingError(
        f"this mapping was made for another {what}: {side.origin or what} with {side.n_keys} keys, "
        f"not {spec.origin or what} with {len(spec)} keys ({difference}); propose a new mapping with automatch.propose_mapping(model, ckpt)"
    )


def first_difference(made_for: StateSpec, now: StateSpec) -> str | None:
    """How the layout ``now`` differs from ``made_for``, in words; None where keys, shapes and kinds of dtype agree."""
    for tensor in made_for:
        if tensor.key not in now:
            return f"key {tensor.key!r} is not there"
        other = now[tensor.key]
        if tensor.shape != other.shape:
            return f"{tensor.key!r} has shape {other.shape}, not {tensor.shape}"
        if tensor.dtype != other.dtype and not (is_floating(tensor.dtype) and is_floating(other.dtype)):
            return f"{tensor.key!r} is {other.dtype}, not {tensor.dtype}"
    extra = next((key for key in now.keys if key not in made_for), None)
    return None if extra is None else f"key {extra!r} is new"


def is_floating(dtype: str) -> bool:
    """Whether torch's dtype name is a real floating type, e.g. ``"bfloat16"``."""
    return dtype.startswith(("float", "bfloat"))


def convert(
    matches: Iterable[Match], checkpoint: Checkpoint, target: StateSpec | None, initial: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give (model key, tensor) for every match; a checkpoint tensor that feeds several keys is read once and held while it is needed.

    Args:
        matches: what to convert, in this order.
        checkpoint: the open checkpoint.
        target: the model, or None to leave its shapes unchecked.
        initial: the model's own values, from which adapted tensors are completed; None refuses to adapt.

    Raises:
        MappingError: a source is missing, or the result does not have the model's shape.
    """
    matches = tuple(matches)
    pending: dict[str, int] = {}
    for match in matches:
        _check_match(match, checkpoint.spec, target)
        for key in match.sources:
            stored = checkpoint.spec[key].alias_of or key
            pending[stored] = pending.get(stored, 0) + 1
    held: dict[str, torch.Tensor] = {}
    for match in matches:
        stored = [checkpoint.spec[key].alias_of or key for key in match.sources]
        tensors = [held[key] if key in held else held.setdefault(key, read_tensor(checkpoint, key)) for key in stored]
        for key in stored:
            pending[key] -= 1
            if not pending[key]:
                held.pop(key, None)
        yield match.target, _transformed(match, tensors, None if initial is None else initial.get(match.target))


def read_tensor(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    """One tensor of an open checkpoint, as torch's; it must still have the shape that its header promised.

    Raises:
        CheckpointError: the file changed, or holds no torch or numpy tensor under this key.
    """
    import torch

    value = checkpoint.tensor(key)
    tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    if shape_of(tensor, key) != checkpoint.spec[key].shape:
        raise CheckpointError(
            f"{key!r} of {checkpoint.spec.origin} has shape {tuple(tensor.shape)}, its header says {checkpoint.spec[key].shape}; "
            "was the file replaced while it was read?"
        )
    return tensor


def _transformed(match: Match, tensors: list[torch.Tensor], initial: torch.Tensor | None) -> torch.Tensor:
    try:
        if initial is None or not is_adapted(match.transform):
            return apply_transform(match.transform, tensors)
        if initial.is_meta:
            raise TransformError("the model is on the meta device and has no initial values to complete it with")
        return apply_adapted(match.transform, tensors, initial)
    except TransformError as error:
        raise MappingError(f"{match.target!r} cannot be made from {', '.join(map(repr, match.sources))}: {error}") from error


def _check_match(match: Match, source: StateSpec, target: StateSpec | None) -> None:
    named = ", ".join(map(repr, match.sources))
    for key in match.sources:
        if key not in source:
            raise MappingError(
                f"the mapping feeds {match.target!r} from {key!r}, which is not a key of {source.origin or 'the checkpoint'}"
            )
    if target is not None and match.target not in target:
        raise MappingError(f"the mapping feeds {match.target!r} from {named}, which is not a key of the model ({target.origin})")
    try:
        shape = output_shape(match.transform, [source[key].shape for key in match.sources])
    except TransformError as error:
        raise MappingError(f"{match.target!r} cannot be made from {named}: {error}") from error
    if target is not None and shape != target[match.target].shape:
        raise MappingError(
            f"size mismatch for {match.target!r}: {named} with {to_dict(match.transform)} gives {shape}, "
            f"the model wants {target[match.target].shape}; correct the match with mapping.decide({match.target!r}, ...)"
        )
