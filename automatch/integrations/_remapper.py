"""A loaded Lightning checkpoint, put under a model's keys in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from automatch.apply import open_source
from automatch.errors import AutomatchError, LoadError
from automatch.load import LoadReport, report_of, values_of
from automatch.optimizer import remap_optimizer_state
from automatch.planning import LoadPlan, plan_load
from automatch.snapshot import read_snapshot
from automatch.training import complete_state, remap_copies

if TYPE_CHECKING:
    import torch

Checkpoint = dict[str, Any]
_OTHER_WAYS = (
    "In Lightning the names are read from the checkpoint's snapshot: the callback SaveSnapshot keeps it there, and "
    "automatch.save_snapshot(old_model, path, optimizers=[...]) adds it. load_from_checkpoint, and fit without ckpt_path, begin with a "
    "new optimizer."
)


class Remapper:
    """Puts a loaded Lightning checkpoint under a model's keys; the options are those of `automatch.load`."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.report: LoadReport | None = None
        self.plan: LoadPlan | None = None
        self.checkpoint: Checkpoint | None = None
        self.before: dict[str, torch.Tensor] = {}

    def weights(self, model: Any, checkpoint: Checkpoint, *, fitting: bool = False) -> None:
        """Replace the weights in ``checkpoint``, and every copy of them; nothing is changed when it is refused.

        With ``fitting``, `optimizers` is expected to follow.
        """
        state: dict[str, torch.Tensor] = checkpoint["state_dict"]
        options: dict[str, Any] = dict(self.options)
        if options.get("strict") is None:
            options["strict"] = model.strict_loading
        plan = plan_load(model, state, **options)
        with open_source(plan.whole, state) as opened:
            current = model.state_dict()
            values = complete_state(values_of(plan, current, opened), plan.target, current)
        others = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        moved = remap_copies(others, plan.chosen, model)
        if fitting and checkpoint.get("optimizer_states"):  # they are moved later: should that fail, the weights are put back
            self.before = {key: value.detach().clone() for key, value in model.state_dict().items()}
        checkpoint.update(moved)
        checkpoint["state_dict"] = values
        self.plan, self.checkpoint, self.report = plan, checkpoint if fitting else None, report_of(plan, model)

    def forget(self) -> None:
        """Let go of a checkpoint whose run ended before its optimizers were there."""
        self.checkpoint, self.before = None, {}

    def optimizers(self, model: Any, optimizers: list[Any]) -> None:
        """Replace the optimizer states in the checkpoint, once the model's new optimizers are there."""
        checkpoint, plan = self.checkpoint, self.plan
        if checkpoint is None or plan is None:
            return
        from automatch.atomic import replace_values

        before = self.before
        self.forget()
        saved: list[Any] = checkpoint.get("optimizer_states") or []
        if not saved or not optimizers:
            return
        try:
            checkpoint["optimizer_states"] = self._moved(plan, model, checkpoint, saved, optimizers)
        except AutomatchError as error:
            replace_values(model, before)
            error.add_note(_OTHER_WAYS)
            raise

    @staticmethod
    def _moved(plan: LoadPlan, model: Any, checkpoint: Checkpoint, saved: list[Any], optimizers: list[Any]) -> list[Any]:
        if len(saved) != len(optimizers):
            raise LoadError(f"the checkpoint holds the states of {len(saved)} optimizers, the module configures {len(optimizers)}")
        found = read_snapshot(checkpoint)
        known = found is not None and len(found.optimizers) == len(saved)
        orders: list[Any] = list(found.optimizers) if found is not None and known else [None] * len(saved)
        return [
            remap_optimizer_state(state, plan.chosen, getattr(optimizer, "optimizer", optimizer), model, names=names)
            for state, optimizer, names in zip(saved, optimizers, orders, strict=True)
        ]
