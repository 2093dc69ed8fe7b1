"""A golden batch: a small input and what a model made of it, in eval mode, with a trace of its modules."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from automatch import packing
from automatch.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

Trace = tuple[tuple[str, tuple[float, float, float]], ...]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Golden:
    """Inputs, and the outputs they must give.

    Args:
        sample: a tensor, a tuple of positional or a dict of keyword arguments.
        outputs: the output's tensors, in order.
        trace: (module path, figures of its output) of every module that holds parameters, in the order of calls.
    """

    sample: Any
    outputs: tuple[torch.Tensor, ...]
    trace: Trace = ()

    def pack(self) -> dict[str, Any]:
        """The batch as texts."""
        tensors: dict[str, torch.Tensor] = {}
        sample = packing.flatten(self.sample, tensors)
        outputs = [packing.flatten(output, tensors) for output in self.outputs]
        text = packing.pack({"sample": sample, "outputs": outputs, "trace": [[path, list(figures)] for path, figures in self.trace]})
        return {"content": text, "tensors": packing.pack_tensors(tensors)}

    @classmethod
    def unpack(cls, raw: Any) -> Golden:
        """Read what `pack` wrote.

        Raises:
            ValueError, KeyError, TypeError: it is damaged.
        """
        tensors = packing.unpack_tensors(raw["tensors"])
        content = packing.unpack(raw["content"])
        outputs = tuple(packing.restore(output, tensors) for output in content["outputs"])
        trace = tuple((str(path), (float(a), float(b), float(c))) for path, (a, b, c) in content["trace"])
        return cls(packing.restore(content["sample"], tensors), outputs, trace)

    def error(self, outputs: tuple[torch.Tensor, ...]) -> float:
        """The largest difference from the golden outputs, relative to their size; infinite where shapes differ or NaN appears."""
        if len(outputs) != len(self.outputs):
            return math.inf
        return max((relative_error(mine, golden) for mine, golden in zip(outputs, self.outputs, strict=True)), default=math.inf)


def relative_error(mine: torch.Tensor, golden: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value of the second."""
    if mine.shape != golden.shape:
        return math.inf
    if not mine.numel():
        return 0.0
    a, b = mine.detach().cpu().double(), golden.detach().cpu().double()
    if not bool((a.isfinite() == b.isfinite()).all()):
        return math.inf
    finite = b.isfinite()
    if not bool(finite.any()):
        return 0.0
    size = max(float(b[finite].abs().max()), 1e-12)
    return float((a[finite] - b[finite]).abs().max()) / size


def record_golden(model: nn.Module, sample: Any) -> Golden:
    """Run ``model`` on ``sample`` in eval mode and keep what it gives; the model is not changed.

    Raises:
        ModelError: the model failed on the sample.
    """
    trace: list[tuple[str, tuple[float, float, float]]] = []
    with traced(model, trace):
        outputs = run(model, sample)
    return Golden(sample, outputs, tuple(trace))


def run(model: nn.Module, sample: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that ``model`` gives for ``sample`` in eval mode, without gradients; modes and random state are put back.

    Raises:
        ModelError: the model failed on the sample, or gave no tensor.
    """
    import torch

    training = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _uncompiled():
            torch.manual_seed(0)
            output = _call(model, _to(sample, device))
    except Exception as error:
        raise ModelError(f"{type(model).__name__} failed on the sample batch: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in training:
            module.training = mode
    found = tuple(packing.leaves(output))
    if not found:
        raise ModelError(f"{type(model).__name__} gave a {type(output).__name__} without tensors for the sample batch")
    return found


def _uncompiled() -> AbstractContextManager[Any]:
    """A block in which compiled modules run as they are written: compiling for one batch, with hooks in it, takes minutes."""
    import torch

    stance: Any = getattr(torch.compiler, "set_stance", None)  # torch >= 2.6
    return nullcontext() if stance is None else stance("force_eager")


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, tuple | list):
        return model(*cast("tuple[Any, ...]", sample))
    if isinstance(sample, Mapping):
        return model(**cast("Mapping[str, Any]", sample))
    return model(sample)


def _to(tree: Any, device: torch.device) -> Any:
    import torch

    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, tuple | list):
        moved = [_to(item, device) for item in cast("list[Any]", tree)]
        return tuple(moved) if isinstance(tree, tuple) else moved
    if isinstance(tree, Mapping):
        return {key: _to(value, device) for key, value in cast("Mapping[str, Any]", tree).items()}
    return tree


@contextmanager
def traced(model: nn.Module, trace: list[tuple[str, tuple[float, float, float]]]) -> Generator[None]:
    """Note figures of the output of every module with parameters of its own, in the order in which they finish."""

    def hook_of(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            trace.extend((path, figures_of(leaf)) for leaf in packing.leaves(output)[:1])

        return hook

    handles = [
        module.register_forward_hook(hook_of(path))
        for path, module in model.named_modules()
        if next(iter(module.parameters(recurse=False)), None) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def figures_of(tensor: torch.Tensor) -> tuple[float, float, float]:
    """Sum, sum of magnitudes and number of elements: enough to tell two outputs apart, whatever their layout."""
    if not tensor.numel() or tensor.is_meta:
        return (0.0, 0.0, float(tensor.numel()))
    values = tensor.detach().double()
    return (float(values.real.sum()), float(values.abs().sum()), float(tensor.numel()))
