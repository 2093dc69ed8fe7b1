"""Old checkpoints in PyTorch Lightning: weights, optimizer states and averaged copies under the model's new keys.

Works with both packages, ``lightning`` and ``pytorch_lightning``.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from automatch.errors import MissingExtraError, ModelError
from automatch.integrations._remapper import Checkpoint, Remapper
from automatch.load import LoadReport
from automatch.mapping import CONFIDENT
from automatch.planning import MappingLike
from automatch.snapshot import KEY, snapshot

if TYPE_CHECKING:
    from automatch.matching import Pins


class _Hooks:
    """What the callback does, without Lightning; `AutoMatch` adds Lightning's own base class."""

    def __init__(
        self,
        *,
        mapping: MappingLike | None = None,
        threshold: float = CONFIDENT,
        strict: bool | None = None,
        pins: Pins | None = None,
        adapt: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._remapper = Remapper(mapping=mapping, threshold=threshold, strict=strict, pins=pins, adapt=adapt)

    @property
    def report(self) -> LoadReport | None:
        """What the last checkpoint gave, or None before one was loaded."""
        return self._remapper.report

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have the checkpoint put under the module's keys before the module sees it."""
        self._remapper.forget()
        before: Callable[[Checkpoint], None] = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: Checkpoint) -> None:
            self._remapper.weights(pl_module, checkpoint, fitting=stage == "fit")
            if trainer.strategy.restore_checkpoint_after_setup:
                self._remapper.optimizers(pl_module, trainer.optimizers)
            before(checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Move the optimizer states: optimizers are there now, and their states are restored next."""
        self._remapper.optimizers(pl_module, trainer.optimizers)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was; Lightning does not call `teardown` then."""
        vars(pl_module).pop("on_load_checkpoint", None)


class _SaveSnapshot:
    """What the callback `SaveSnapshot` does, without Lightning."""

    def __init__(self, sample: Any = None) -> None:
        from automatch.packing import flatten

        super().__init__()
        flatten(sample, {})  # what cannot be kept is said now, and not when the first checkpoint is written
        self.sample = sample

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Checkpoint) -> None:
        """Put the module's snapshot into the checkpoint, without the golden batch if the module fails on it."""
        optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
        try:
            checkpoint[KEY] = snapshot(pl_module, sample=self.sample, optimizers=optimizers)
        except ModelError as error:  # a run must not be lost to it
            warnings.warn(f"the checkpoint's snapshot has no golden batch: {error}", stacklevel=2)
            checkpoint[KEY] = snapshot(pl_module, optimizers=optimizers)


def _callback_bases() -> tuple[type[Any], ...]:
    """The callback class of every Lightning package in use (or, if none is, of one that is installed)."""
    names = ("lightning.pytorch", "pytorch_lightning")
    used = [name for name in names if name in sys.modules]
    if not used:
        for name in names:
            try:
                import_module(name)
            except ImportError:
                continue
            used.append(name)
            break
    if not used:
        raise MissingExtraError("automatch.lightning needs Lightning: pip install lightning")
    return tuple(sys.modules[name].Callback for name in used)


_CALLBACK_DOC = """Callback: ``Trainer(callbacks=AutoMatch())`` resumes, tests or predicts from a checkpoint with other keys.

    Weights, averaged copies of them, and optimizer states follow their parameters; loops and schedulers are Lightning's.

    Args:
        mapping: a reviewed mapping (or its file); without it one is proposed.
        threshold: matches are loaded from this confidence on, in [0, 1].
        strict: as for `automatch.load`; None takes the module's ``strict_loading``.
        pins: pairs that a person has decided.
        adapt: shape adaptations by key pattern.
    """


_SNAPSHOT_DOC = """Callback: stores a snapshot of the module in every checkpoint, for whoever loads it later; see `automatch.snapshot`.

    Args:
        sample: a small batch, to keep with the module's output in eval mode: a tensor, a tuple of positional or a dict
            of keyword arguments of ``forward``.
    """


class AutoMatchMixin:
    """Base class, before ``LightningModule``: the module loads its own old checkpoints, by whatever way it is loaded.

    Set the class attribute ``automatch_options`` to pass options of `automatch.load`.
    """

    automatch_options: Mapping[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Forget a checkpoint whose run ended before its optimizers were there."""
        self.__dict__.pop("_automatch", None)
        cast(Any, super()).setup(stage)

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Put the checkpoint under this module's keys."""
        remapper = Remapper(**{"strict": None, **self.automatch_options})
        fitting = _is_fitting(self)
        remapper.weights(self, checkpoint, fitting=fitting)
        if fitting:
            self.__dict__["_automatch"] = remapper
        cast(Any, super()).on_load_checkpoint(checkpoint)

    def on_fit_start(self) -> None:
        """Move the optimizer states, which are restored next."""
        remapper: Remapper | None = self.__dict__.pop("_automatch", None)
        if remapper is not None:
            remapper.optimizers(self, cast(Any, self).trainer.optimizers)
        cast(Any, super()).on_fit_start()


def _is_fitting(module: Any) -> bool:
    try:
        return module.trainer.state.fn == "fit"
    except (AttributeError, RuntimeError):  # no trainer is attached
        return False


def load_from_checkpoint(
    module_class: type[Any],
    checkpoint_path: Any,
    map_location: Any = None,
    hparams_file: Any = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    *,
    mapping: MappingLike | None = None,
    threshold: float = CONFIDENT,
    pins: Pins | None = None,
    adapt: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """What ``module_class.load_from_checkpoint`` does, with the checkpoint's keys mapped onto the module's.

    Args:
        module_class: the ``LightningModule``.
        checkpoint_path: path, URL or file.
        map_location: as in Lightning.
        hparams_file: as in Lightning.
        strict: refuse when a parameter would keep its initial value; None takes the module's ``strict_loading``.
        weights_only: as in Lightning.
        mapping: a reviewed mapping (or its file); without it one is proposed.
        threshold: matches are loaded from this confidence on, in [0, 1].
        pins: pairs that a person has decided.
        adapt: shape adaptations by key pattern.
        **kwargs: overrides of the hyper-parameters.

    Raises:
        LoadError: loading was refused, with the keys and how to go on.
    """
    remapper = Remapper(mapping=mapping, threshold=threshold, strict=strict, pins=pins, adapt=adapt)
    given = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict, **kwargs}
    if weights_only is not None:
        given["weights_only"] = weights_only
    with _hooked(module_class, remapper):
        return module_class.load_from_checkpoint(checkpoint_path, **given)


_hook_lock = threading.RLock()


@contextmanager
def _hooked(module_class: type[Any], remapper: Remapper) -> Generator[None]:
    """Have instances of the class that this thread loads see their checkpoint under their own keys."""
    before: Callable[[Any, Checkpoint], None] = module_class.on_load_checkpoint
    thread = threading.get_ident()

    def on_load_checkpoint(self: Any, checkpoint: Checkpoint) -> None:
        if threading.get_ident() == thread:
            remapper.weights(self, checkpoint)
        before(self, checkpoint)

    with _hook_lock:
        own = "on_load_checkpoint" in vars(module_class)
        module_class.on_load_checkpoint = on_load_checkpoint
        try:
            yield
        finally:
            if own:
                module_class.on_load_checkpoint = before
            else:
                del module_class.on_load_checkpoint


_CALLBACKS: dict[str, tuple[type[Any], str]] = {"AutoMatch": (_Hooks, _CALLBACK_DOC), "SaveSnapshot": (_SaveSnapshot, _SNAPSHOT_DOC)}


def __getattr__(name: str) -> Any:
    if name in _CALLBACKS:
        hooks, doc = _CALLBACKS[name]
        globals()[name] = type(name, (hooks, *_callback_bases()), {"__doc__": doc, "__module__": "automatch.lightning"})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
