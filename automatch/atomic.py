"""Replacing the values of a model all at once: either every tensor is loaded, or the model is as it was."""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from automatch.errors import LoadError

# A copy between two plain tensors of one shape does not fail, and undoing it costs memory; up to this many
# bytes the old values are kept all the same.
_UNDO_BYTES = 16 * 2**20
# Libraries whose loading hooks only read, or only exchange tensors.
_TRUSTED = {"torch", "torchmetrics"}

Table = dict[str, torch.Tensor | None]


def replace_values(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load ``state`` into ``model`` through its own `load_state_dict`, all or nothing.

    Parameters and buffers stay the same objects in the same memory, with their dtype and device; those on the meta
    device are replaced by the given tensors. Where only PyTorch's own code takes part, it runs on references first,
    and values are written when every module has agreed, so that no second copy of the model is needed; otherwise
    the old values are kept until the end.

    Raises:
        LoadError: a module refused its tensors; the model is bit for bit as it was.
    """
    undo = _Undo(model)
    given: OrderedDict[str, Any] = OrderedDict(state)
    given._metadata = getattr(model.state_dict(keep_vars=True), "_metadata", OrderedDict())  # type: ignore[attr-defined]
    foreign = not undo.complete or _takes_part(model)
    if foreign:
        undo.keep_values(undo.tensors)
    assign = any(tensor.is_meta for tensor in undo.tensors) or not foreign
    try:
        _run_hooks(model, given, assign)
    except BaseException as error:
        with _interrupts_deferred():
            undo()
        if isinstance(error, LoadError) or not isinstance(error, Exception):
            raise
        raise LoadError(f"{type(model).__name__} refused the tensors and is unchanged: {error}") from error
    if assign:
        _write(undo)


def _run_hooks(model: nn.Module, given: OrderedDict[str, Any], assign: bool) -> None:
    incompatible: Any = model.load_state_dict(given, strict=False, **({"assign": True} if assign else {}))
    ignored: list[str] = list(getattr(incompatible, "unexpected_keys", ()))
    if ignored:
        raise LoadError(f"{type(model).__name__} did not take {', '.join(map(repr, ignored[:5]))}; the model is unchanged")


class _Undo:
    """What puts a model back: its tensors as objects, and the old values of those that are written to."""

    def __init__(self, model: nn.Module) -> None:
        tables: list[Any] = [vars(module).get(name) for module in model.modules() for name in ("_parameters", "_buffers")]
        self.slots: list[tuple[Table, Table]] = [(table, dict(table)) for table in tables if isinstance(table, dict)]
        self.complete = len(self.slots) == len(tables)  # scripted modules keep their tensors elsewhere
        self.tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        self.values: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep_values(self, tensors: list[torch.Tensor]) -> None:
        self.values.extend((tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta)

    def __call__(self) -> None:
        for table, old in self.slots:
            table.clear()
            table.update(old)
        with torch.no_grad():
            for tensor, value in reversed(self.values):
                with suppress(RuntimeError):  # what cannot be written to (an expanded buffer) has not been changed either
                    tensor.copy_(value)


def _write(undo: _Undo) -> None:
    """Put the values of the tensors that the hooks have assigned into the tensors that were there before."""
    settled: dict[int, torch.Tensor] = {}
    kept = 0
    with _interrupts_deferred(), torch.no_grad():
        try:
            for old, new in _assigned(undo):
                if id(old) in settled:
                    continue
                size = new.numel() * new.element_size()
                if not (_is_plain(old) and _is_plain(new)) or kept + size <= _UNDO_BYTES:
                    kept += size
                    undo.keep_values([old])
                settled[id(old)] = new if old.is_meta or old.shape != new.shape else old.copy_(new)
            for table, before in undo.slots:  # tied slots too, of which the state may have named one only
                table.update({name: settled[id(old)] for name, old in before.items() if old is not None and id(old) in settled})
        except BaseException as error:
            undo()
            if not isinstance(error, Exception):
                raise
            raise LoadError(f"writing the tensors failed, the model is unchanged: {error}") from error


def _assigned(undo: _Undo) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for table, before in undo.slots:
        for name, old in before.items():
            new = table.get(name)
            if old is not None and new is not None and new is not old:
                yield old, new


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.layout is torch.strided


def _takes_part(model: nn.Module) -> bool:
    """Whether anything but PyTorch's plain loading of plain tensors happens while ``model`` is loaded."""
    kinds = {type(tensor) for tensor in (*model.parameters(), *model.buffers())}
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    return swapping or not kinds <= {torch.Tensor, nn.Parameter} or any(_runs_foreign_code(module) for module in model.modules())


def _runs_foreign_code(module: nn.Module) -> bool:
    """Whether code that PyTorch does not bring runs while this module is loaded; it may write anywhere."""
    hooks: list[Any] = [hook for when in ("pre", "post") for hook in getattr(module, f"_load_state_dict_{when}_hooks").values()]
    kind: Any = type(module)
    code = [kind._load_from_state_dict, kind.load_state_dict, *(getattr(hook, "hook", hook) for hook in hooks)]
    return not all(_is_trusted(function) for function in code)


def _is_trusted(function: Callable[..., Any]) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] in _TRUSTED


@contextmanager
def _interrupts_deferred() -> Generator[None]:
    """Hold back Ctrl-C until the model is whole again."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            signal.raise_signal(signal.SIGINT)
