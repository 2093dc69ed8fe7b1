"""The conversion where PyTorch and Lightning call it by themselves: a pre-hook, and an `on_load_checkpoint`."""

from __future__ import annotations

from automatch.errors import MappingError
from automatch.export import _text
from automatch.export._script import function
from automatch.mapping import KeyMapping

_PRE_HOOK = '''
def convert_before_loading(state_dict, prefix, *_):
    """Convert an old state_dict in place when load_state_dict is called; a new one is left alone."""
    own = {key[len(prefix) :]: state_dict[key] for key in list(state_dict) if key.startswith(prefix)}
    if is_old(own):
        for key in own:
            del state_dict[prefix + key]
        state_dict.update((prefix + key, tensor) for key, tensor in convert_checkpoint_keys(own).items())


def accept_old_checkpoints(model):
    """Call this once on the model (or in its __init__ on self); old and new checkpoints load from then on."""
    return model._register_load_state_dict_pre_hook(convert_before_loading)
'''
_ON_LOAD = '''
class AcceptOldCheckpoints:
    """Put this before LightningModule among the bases of the module; old and new checkpoints load from then on."""

    def on_load_checkpoint(self, checkpoint):
        if is_old(checkpoint["state_dict"]):
            checkpoint["state_dict"] = convert_checkpoint_keys(checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)
'''


def pre_hook(mapping: KeyMapping) -> str:
    """A `load_state_dict` pre-hook.

    Raises:
        MappingError: old and new state_dicts have the same keys, so that a hook could not tell them apart.
    """
    return _with(mapping, "A load_state_dict pre-hook", _PRE_HOOK)


def on_load_checkpoint(mapping: KeyMapping) -> str:
    """A mixin with an `on_load_checkpoint` override for Lightning.

    Raises:
        MappingError: old and new state_dicts have the same keys, so that a hook could not tell them apart.
    """
    return _with(mapping, "An on_load_checkpoint override", _ON_LOAD)


def _with(mapping: KeyMapping, what: str, code: str) -> str:
    lines = [*_text.header(mapping, what), "", *function(mapping), "", *_is_old(mapping), "", *code.splitlines()]
    return "\n".join(lines) + "\n"


def _is_old(mapping: KeyMapping) -> list[str]:
    """A test by one key that only the old state_dict has, or else one that only the new one has."""
    old = dict.fromkeys([*(key for match in mapping.matches for key in match.sources), *mapping.unexpected_keys])
    new = dict.fromkeys([*(match.target for match in mapping.matches), *mapping.missing_keys])
    only_old, only_new = (next((key for key in one if key not in other), None) for one, other in ((old, new), (new, old)))
    if only_old is not None:
        test = f"{_text.quote(only_old)} in state_dict"
    elif only_new is not None:
        test = f"{_text.quote(only_new)} not in state_dict"
    else:
        raise MappingError("old and new state_dict have the same keys, so a hook cannot tell which one it is given; export kind 'script'")
    return ["", "def is_old(state_dict):", '    """Whether the state_dict is one from before the change."""', f"    return {test}", ""]
