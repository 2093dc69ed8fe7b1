"""`load`: propose, keep what is confident, check every tensor, then load all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from automatch.adapt import explain_mismatch, resized_sources
from automatch.apply import convert, open_source
from automatch.errors import CheckpointError, LoadError, ModelError
from automatch.mapped import MappedCheckpoint
from automatch.mapping import CONFIDENT, KeyMapping
from automatch.planning import LoadPlan, MappingLike, plan_load
from automatch.prepare import cast_warnings, prepare_state
from automatch.readers import Checkpoint, as_open_checkpoint, open_checkpoint
from automatch.readers._quantised import packing_of
from automatch.refusal import shorten
from automatch.specs import StateSpec, dtype_name, spec_of_model
from automatch.transforms import Copy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from automatch.matching import Pins


_EXPLAINED = 20


class LoadReport(NamedTuple):
    """What `load` did; the first two fields are those of PyTorch's `load_state_dict`.

    Args:
        missing_keys: model keys that keep their initial value, tied and derived ones left out.
        unexpected_keys: checkpoint keys that were not used.
        loaded: model keys that were loaded, in the model's order.
        converted: those of them that are not a plain copy of one checkpoint tensor.
        withheld: model keys with a match that was not sure enough, or that hang on an open question.
        adapted: model keys whose shape was adapted with ``adapt=``, and how.
        to_train: the parameters that need training: not loaded, or adapted; for an optimizer group.
        mapping: the whole mapping, withheld matches included.
        warnings: what a person should know.
        to_train_keys: the keys of `to_train`.
        applied: the part of the mapping that was loaded.
        size_mismatches: for each model key that would have been loaded if its shape had not changed, why it may have
            changed and what ``adapt=`` can do.
    """

    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    loaded: tuple[str, ...]
    converted: tuple[str, ...]
    withheld: tuple[str, ...]
    adapted: dict[str, str]
    to_train: tuple[nn.Parameter, ...]
    mapping: KeyMapping
    warnings: tuple[str, ...]
    to_train_keys: tuple[str, ...]
    applied: KeyMapping
    size_mismatches: dict[str, str]

    def __repr__(self) -> str:
        parts = [f"{len(self.loaded)} of {self.mapping.target.n_keys} model keys loaded"]
        names = ("converted", "adapted", "withheld", "missing_keys", "unexpected_keys", "warnings")
        parts.extend(f"{len(getattr(self, name))} {name.removesuffix('_keys')}" for name in names if getattr(self, name))
        return f"LoadReport({', '.join(parts)})"


def load(
    model: nn.Module,
    ckpt: Any,
    *,
    mapping: MappingLike | None = None,
    threshold: float = CONFIDENT,
    strict: bool = True,
    pins: Pins | None = None,
    trust: bool = False,
    adapt: Mapping[str, str] | None = None,
) -> LoadReport:
    """Load a checkpoint whose keys do not fit into a model: propose, apply what is confident, all or nothing.

    A model on the meta device takes over the pages of the file (as with ``torch.load(mmap=True)`` and safetensors' own `load_file`): they
    are read when they are used. Writing to the model does not change the file, and the file may be deleted, or replaced by
    renaming another one over it; but whoever writes into it or cuts it short while the model lives (`torch.save` to the same
    path does) changes the weights or kills the process. ``load(model, torch.load(path))`` keeps them in memory. A
    model with memory of its own is independent of the file when ``load`` returns.

    Args:
        model: the module; its parameters stay the same objects, with their dtype and device (meta ones are replaced).
        ckpt: a path, an open checkpoint, or a loaded checkpoint dict.
        mapping: a reviewed mapping (or its file) to use instead of proposing one.
        threshold: matches are loaded from this confidence on, in [0, 1]; decided ones always.
        strict: refuse when a parameter of the model would keep its initial value.
        pins: pairs that a person has decided, as for `propose_mapping`; ``{target: None}`` also says that the
            initial value is meant to stay.
        trust: allow a pickle to execute code while it is read.
        adapt: ``{key pattern: method}`` for model keys whose shape has changed, see `automatch.adapt`.

    Raises:
        LoadError: loading was refused, with the keys and how to go on; the model is bit for bit unchanged.
        MappingError: the mapping was made for another model or checkpoint.
        CheckpointError: the checkpoint cannot be read, or was changed meanwhile.
    """
    if not hasattr(model, "load_state_dict") or not hasattr(model, "named_modules"):
        raise ModelError(f"load needs an nn.Module, got {type(model).__name__}; for a state_dict use mapping.apply(ckpt)")
    if mapping is None and not isinstance(ckpt, StateSpec):
        with open_checkpoint(ckpt, like=spec_of_model(model), trust=trust) as opened:
            return _load(model, opened, None, threshold, strict, pins, trust, adapt)
    return _load(model, ckpt, mapping, threshold, strict, pins, trust, adapt)


def _load(
    model: nn.Module,
    ckpt: Any,
    mapping: MappingLike | None,
    threshold: float,
    strict: bool,
    pins: Pins | None,
    trust: bool,
    adapt: Mapping[str, str] | None,
) -> LoadReport:
    from automatch.atomic import replace_values

    plan = plan_load(model, ckpt, mapping=mapping, threshold=threshold, strict=strict, pins=pins, trust=trust, adapt=adapt)
    with open_source(plan.whole, ckpt, trust=trust) as opened, MappedCheckpoint(as_open_checkpoint(opened)) as checkpoint:
        current = model.state_dict(keep_vars=True)
        prepared = values_of(plan, current, checkpoint)
        notes = cast_warnings(prepared, current)
        if any(tensor.is_meta for tensor in current.values()):
            checkpoint.check_unchanged()
        else:
            checkpoint.bring_in()
        replace_values(model, prepared)
        del prepared
        try:
            checkpoint.check_unchanged()
        except CheckpointError as error:
            raise CheckpointError(f"{error}; the model may hold values of both files now, load it again before it is used") from error
    return report_of(plan, model, notes)


def values_of(plan: LoadPlan, current: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read and check every tensor that ``plan`` feeds to the model whose own tensors are ``current``.

    Raises:
        LoadError: a tensor cannot be loaded without changing what its values mean.
    """
    _refuse_packed(plan, current, checkpoint.spec)
    return prepare_state(plan.target, dict(convert(plan.chosen.matches, checkpoint, plan.target, current)), current)


def _refuse_packed(plan: LoadPlan, current: Mapping[str, torch.Tensor], source: StateSpec) -> None:
    """Quantised values are numbers without their scales: PyTorch would cast 8-bit floats to the model's dtype as they are."""
    for match in plan.chosen.matches:
        for key in match.sources:
            dtype = source[key].dtype
            packing = packing_of(key, source) if dtype != dtype_name(current[match.target].dtype) else None
            if packing is not None:
                raise LoadError(
                    f"{key!r} of {source.origin or 'the checkpoint'} is quantised ({packing}, {dtype}), the model's {match.target!r} is "
                    f"{dtype_name(current[match.target].dtype)}; dequantise the checkpoint with the library that packed it, "
                    "the model is unchanged"
                )


def report_of(plan: LoadPlan, model: nn.Module, notes: tuple[str, ...] = ()) -> LoadReport:
    """What a load that followed ``plan`` has done."""
    fed = plan.fed
    missing = tuple(t.key for t in plan.target if t.key not in fed and not t.key.endswith("num_batches_tracked"))
    parameters = dict(model.named_parameters())
    to_train = tuple(key for key in parameters if key not in fed or key in plan.adapted)
    mismatches = {
        key: f"size mismatch for {key!r} with {resized.key!r}: {explain_mismatch(key, resized.shape, plan.target[key].shape)}"
        for key, resized in resized_sources(missing, plan.chosen).items()
    }
    return LoadReport(
        missing_keys=missing,
        unexpected_keys=plan.chosen.unexpected_keys,
        loaded=tuple(t.key for t in plan.target if t.key in fed),
        converted=tuple(m.target for m in plan.chosen.matches if not isinstance(m.transform, Copy)),
        withheld=tuple(m.target for m in plan.whole.matches if m.target not in fed),
        adapted=plan.adapted,
        to_train=tuple(parameters[key] for key in to_train),
        mapping=plan.whole,
        warnings=(*plan.whole.warnings, *plan.notes, *notes, *_left_warnings(model, missing, mismatches)),
        to_train_keys=to_train,
        applied=plan.chosen,
        size_mismatches=mismatches,
    )


def _left_warnings(model: nn.Module, missing: tuple[str, ...], mismatches: Mapping[str, str]) -> tuple[str, ...]:
    """What keeps its initial value, and what has no value at all."""
    found: list[str] = []
    if missing:
        found.append(f"{len(missing)} keys keep their initial values: {shorten(missing)}")
    found.extend(list(mismatches.values())[:_EXPLAINED])
    if len(mismatches) > _EXPLAINED:
        found.append(f"{len(mismatches) - _EXPLAINED} more size mismatches: report.size_mismatches")
    empty = [key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        found.append(
            f"{len(empty)} tensors are still on the meta device and have no values ({shorten(empty)}); "
            "compute them (e.g. non-persistent buffers) before running the model"
        )
    return tuple(found)
