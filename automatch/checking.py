"""`check`: does today's model still load the project's reference checkpoint? For continuous integration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from automatch.apply import first_difference
from automatch.errors import MappingError
from automatch.migrations import reviewed_mapping
from automatch.readers import open_checkpoint
from automatch.refusal import needed_keys, shorten
from automatch.specs import StateSpec, spec_of_model

if TYPE_CHECKING:
    from torch import nn


class Check(NamedTuple):
    """Whether a model still loads a checkpoint.

    Args:
        ok: it does.
        how: "direct" (the keys fit), "migrated" (through reviewed migrations), or "broken".
        text: one sentence for a person.
    """

    ok: bool
    how: Literal["direct", "migrated", "broken"]
    text: str


def check(model: nn.Module, ckpt: Any, *, trust: bool = False) -> Check:
    """Say whether ``model`` still loads a checkpoint, directly or through reviewed migrations; nothing is guessed or loaded.

    Args:
        model: today's model (also on the meta device).
        ckpt: the reference checkpoint.
        trust: allow a pickle to execute code while it is read.
    """
    target = spec_of_model(model)
    with open_checkpoint(ckpt, like=target, trust=trust) as checkpoint:
        source = checkpoint.spec
    difference = _strict_difference(source, target)
    try:
        migration = reviewed_mapping(model, source, target)
    except MappingError as error:
        return Check(False, "broken", str(error))
    if migration is not None:
        unfed = needed_keys(target, (match.target for match in migration.mapping.matches))
        if unfed:
            return Check(
                False, "broken", f"migration {migration.names} leaves {len(unfed)} tensors of the model without values: {shorten(unfed)}"
            )
        return Check(True, "migrated", f"{source.origin} loads into {target.origin} through {migration.names}")
    if difference is None:
        return Check(True, "direct", f"{source.origin} loads into {target.origin} as it is ({len(source)} keys)")
    advice = "map it with automatch propose, and accept the mapping with automatch accept"
    return Check(False, "broken", f"{source.origin} no longer loads into {target.origin}: {difference}; {advice}")


def _strict_difference(source: StateSpec, target: StateSpec) -> str | None:
    """Why `load_state_dict` would refuse, or None if it would not."""
    counters = {key for key in target.keys if key.endswith("num_batches_tracked") and key not in source}
    present = StateSpec(tuple(tensor for tensor in target if tensor.key not in counters), target.origin)
    return first_difference(source, present)
