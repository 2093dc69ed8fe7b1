"""`propose_mapping`: the stages from two specs to a mapping, composed on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from automatch.collector import no_collection
from automatch.engine import match_specs
from automatch.mapping import KeyMapping, Side
from automatch.readers import open_checkpoint
from automatch.specs import StateSpec, spec_of_model, spec_of_state_dict

Pins = Mapping[str, str | Sequence[str] | None]


def propose_mapping(model: Any, ckpt: Any, *, pins: Pins | None = None, trust: bool = False) -> KeyMapping:
    """Propose which checkpoint tensors feed which model key; nothing is changed and nothing is run.

    Args:
        model: an ``nn.Module`` (also on the meta device), a state_dict, or a `StateSpec`.
        ckpt: a path, an open checkpoint, a loaded checkpoint dict, or a `StateSpec`.
        pins: pairs that a person has decided, ``{target: source}``, ``{target: [sources]}`` or
            ``{target: None}`` for "nothing feeds it"; all else is solved around them.
        trust: allow a pickle to execute code while it is read.

    Returns:
        The mapping, with a calibrated confidence in [0, 1] for every match.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelError: the model cannot be described.
        MappingError: a pin names a key that does not exist.
    """
    with no_collection():
        target = target_spec(model)
        with open_checkpoint(ckpt, like=target, trust=trust) as checkpoint:
            source = checkpoint.spec
        result = match_specs(source, target, pins or {})
        mapping = KeyMapping(Side.of(source), Side.of(target), (), verdict=result.verdict, warnings=(*source.notes, *result.warnings))
        return mapping.with_matches(result.matches, questions=result.questions)


def target_spec(model: Any) -> StateSpec:
    """The spec of whatever stands for a model: a module, a state_dict, or a spec."""
    if isinstance(model, StateSpec):
        return model
    if hasattr(model, "named_modules"):
        return spec_of_model(model)
    return spec_of_state_dict(model, origin="model")
