"""What the demo does and says, act by act."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor, nn

import automatch
from automatch.demo.after import MedicalSegmentationModel as Refactored
from automatch.demo.before import MedicalSegmentationModel
from automatch.demo.other import PatchTransformer
from automatch.demo.training import dice, save_checkpoint, train

SEED = 7
WIDTH = 76  # with the indent it fits 80 columns
CHANGES = (
    "the decoder's blocks are nested lists now, their layers have other names",
    "a dropout was inserted, so that bottleneck.2 is another layer than it was",
    "the encoder lies one prefix deeper",
    "head, decoder, bottleneck, encoder are registered in the opposite order",
)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo measured; all metrics are Dice coefficients in [0, 1] on the same held-out images.

    Args:
        before: the trained model.
        not_strict: the refactored class after ``load_state_dict(..., strict=False)``.
        after: the refactored class after ``automatch.load``; None if loading was refused.
        refused: the message with which the other architecture was refused; None if it was not.
        checkpoint: the file that was written.
        html: the HTML report.
    """

    before: float
    not_strict: float
    after: float | None
    refused: str | None
    checkpoint: Path
    html: Path

    @property
    def succeeded(self) -> bool:
        """Whether the metric survived to the last digit and the other architecture was refused."""
        return self.after == self.before and self.refused is not None


def run(
    folder: Path,
    *,
    epochs: int = 12,
    say: Callable[[str], None] = print,
    working: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> DemoResult:
    """Play both acts and return what was measured.

    Args:
        folder: where the checkpoint and the HTML report are written; made if it is not there.
        epochs: epochs of training, at least 1; twelve take some seconds.
        say: takes one line or paragraph of the story.
        working: makes a context manager that shows what is going on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, html = folder / "medical-segmentation.ckpt", folder / "report.html"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is so small that more threads only wait for one another
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            before = _train(checkpoint, epochs, say, working)
            not_strict = _fail(checkpoint, say)
            after = _load(checkpoint, html, say, working)
            refused = _refuse(checkpoint, say, working)
    finally:
        torch.set_num_threads(threads)
    result = DemoResult(before, not_strict, after, refused, checkpoint, html)
    _conclude(result, say)
    return result


def _train(path: Path, epochs: int, say: Callable[[str], None], working: Callable[[str], AbstractContextManager[None]]) -> float:
    say("1. A U-Net++ is trained on synthetic scans and saved as Lightning saves it.\n")
    model = MedicalSegmentationModel()
    with working(f"Training for {epochs} epochs"):
        optimizer = train(model, epochs=epochs, seed=SEED)
    save_checkpoint(model, optimizer, path, epochs=epochs)
    metric = dice(model, seed=SEED)
    say(f"   {path}: {len(model.state_dict())} tensors, e.g. model.decoder.blocks.x_0_0.conv1.1.bias")
    say(f"   Dice on held-out scans: {metric!r}\n")
    return metric


def _fail(path: Path, say: Callable[[str], None]) -> float:
    say("2. The class is refactored; the network is the same, hardly any key is:\n")
    for change in CHANGES:
        say(f"   - {change}")
    state_dict = torch.load(path, weights_only=True)["state_dict"]
    model = Refactored()
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        say("\n   model.load_state_dict(state_dict) says:\n")
        for line in str(error).splitlines()[:4]:
            say("   " + shorten(line, WIDTH, placeholder=" …"))
    model.load_state_dict(state_dict, strict=False)
    metric = dice(model, seed=SEED)
    kept = sum(key in state_dict for key in model.state_dict())
    say(f"\n   With strict=False it is silent: {kept} of {len(model.state_dict())} tensors are loaded,")
    say("   some of them into the wrong layer, and the rest is random.")
    say(f"   Dice: {metric!r}\n")
    return metric


def _load(path: Path, html: Path, say: Callable[[str], None], working: Callable[[str], AbstractContextManager[None]]) -> float | None:
    say("3. automatch.load(model, checkpoint):\n")
    model = Refactored()
    with working("Matching"):
        mapping = automatch.propose_mapping(model, path)
    mapping.to_html(html)
    say(_indented(mapping.report(width=WIDTH)))
    try:
        report = automatch.load(model, path, mapping=mapping)
    except automatch.LoadError as error:
        say(_refusal(error))
        return None
    metric = dice(model, seed=SEED)
    say(f"   {report!r}")
    say(f"   Dice: {metric!r}\n")
    return metric


def _refuse(path: Path, say: Callable[[str], None], working: Callable[[str], AbstractContextManager[None]]) -> str | None:
    say("4. The same checkpoint and another architecture, a vision transformer:\n")
    model = PatchTransformer()
    untouched = _copies(model)
    try:
        with working("Matching"):
            automatch.load(model, path)
    except automatch.LoadError as error:
        if not _unchanged(model, untouched):
            raise AssertionError("a refused load changed the model") from error
        say(_refusal(error))
        say("   Not one value of the model was changed.\n")
        return str(error)
    return None


def _conclude(result: DemoResult, say: Callable[[str], None]) -> None:
    verdict = "equal to the last digit" if result.after == result.before else "NOT equal"
    say(f"Dice before the refactoring {result.before!r}, after it {result.after!r}:\n{verdict}.")
    say(f"The other architecture was {'refused' if result.refused else 'NOT refused'}.")
    say(f"Report: {result.html}. To look yourself:\n")
    say(f"  automatch inspect {result.checkpoint}")
    say(f"  automatch propose {result.checkpoint} \\")
    say("    --model automatch.demo.after:MedicalSegmentationModel --all")


def _refusal(error: automatch.LoadError) -> str:
    lines = f"LoadError: {error}".splitlines()
    shown = lines if len(lines) <= 8 else [*lines[:6], "  …"]
    return _indented("\n".join(line if len(line) <= WIDTH else line[: WIDTH - 2] + " …" for line in shown))


def _indented(text: str) -> str:
    return "\n".join(f"   {line}".rstrip() for line in text.splitlines()) + "\n"


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _unchanged(model: nn.Module, copies: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == copies.keys() and all(bool((state[key] == value).all()) for key, value in copies.items())
