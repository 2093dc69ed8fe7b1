"""The demo's promises: the same metric to the last digit, and a refusal that changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from automatch import propose_mapping
from automatch.cli import main
from automatch.demo import DemoResult, after, run
from automatch.demo.after import MedicalSegmentationModel as Refactored
from automatch.demo.before import MedicalSegmentationModel
from automatch.demo.training import dice, synthetic_scans


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, str]:
    lines: list[str] = []
    result = run(tmp_path_factory.mktemp("demo"), epochs=4, say=lines.append)
    return result, "\n".join(lines)


def test_the_metric_survives_the_refactoring_to_the_last_digit(told: tuple[DemoResult, str]) -> None:
    result, text = told
    assert result.after == result.before
    assert result.not_strict < result.before
    assert "equal to the last digit" in text


def test_the_other_architecture_is_refused(told: tuple[DemoResult, str]) -> None:
    result, text = told
    assert result.refused is not None
    assert "Not one value of the model was changed." in text


def test_the_story_shows_what_pytorch_says(told: tuple[DemoResult, str]) -> None:
    assert "Missing key(s) in state_dict" in told[1]
    assert [line for line in told[1].splitlines() if len(line) > 80 and told[0].html.parent.name not in line] == []


def test_the_checkpoint_is_laid_out_as_lightnings(told: tuple[DemoResult, str]) -> None:
    checkpoint = torch.load(told[0].checkpoint, weights_only=True)
    assert {"state_dict", "optimizer_states", "hyper_parameters", "epoch", "pytorch-lightning_version"} <= checkpoint.keys()
    assert "model.decoder.blocks.x_0_0.conv1.1.bias" in checkpoint["state_dict"]
    assert told[0].html.stat().st_size > 1000


def test_the_two_classes_compute_the_same_and_share_hardly_a_key() -> None:
    old, new = MedicalSegmentationModel(), Refactored()
    with torch.no_grad():
        new.load_state_dict(dict(zip(new.state_dict(), _in_the_order_of_the_new(old), strict=True)))
        images, _ = synthetic_scans(2, seed=0)
        assert torch.equal(old.eval()(images), new.eval()(images))
    assert len(old.state_dict().keys() & new.state_dict().keys()) < 0.2 * len(old.state_dict())
    assert 0 <= dice(old, seed=0) <= 1


def _in_the_order_of_the_new(old: MedicalSegmentationModel) -> list[torch.Tensor]:
    """The old tensors in the new class's order of registration, written down by hand."""
    net = old.model
    units = [unit for row in range(3) for column in range(3 - row) for unit in net.decoder.blocks[f"x_{row}_{column}"].children()]
    tensors = [*net.segmentation_head.state_dict().values()]
    for unit in units:
        tensors += unit.state_dict().values()
    return [*tensors, *net.bottleneck.state_dict().values(), *net.encoder.state_dict().values()]


def true_source(target: str) -> str:
    """The key that fed a key of the refactored class before the refactoring."""
    key = target.replace("model.backbone.", "model.").replace("model.head.", "model.segmentation_head.0.")
    key = re.sub(r"bottleneck\.([23])", lambda found: f"bottleneck.{int(found[1]) - 1}", key)
    parts = {"conv": "0", "norm": "1"}
    pattern = r"levels\.(\d)\.(\d)\.(conv1|conv2)\.(conv|norm)"
    return re.sub(pattern, lambda found: f"blocks.x_{found[1]}_{found[2]}.{found[3]}.{parts[found[4]]}", key)


def wrong_pairs() -> list[tuple[str, tuple[str, ...], float]]:
    mapping = propose_mapping(Refactored(), MedicalSegmentationModel().state_dict())
    return [(m.target, m.sources, m.confidence) for m in mapping.matches if m.sources != (true_source(m.target),)]


def test_every_pair_is_right() -> None:
    assert wrong_pairs() == []


def test_no_sure_pair_is_wrong_where_a_layer_is_registered_before_its_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order then says that the norm of one unit belongs to the convolution of the one before."""
    monkeypatch.setattr(after, "ConvNormAct", NormFirst)
    assert [pair for pair in wrong_pairs() if pair[2] >= 0.95] == []


class NormFirst(after.ConvNormAct):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        norm, conv = self.norm, self.conv
        del self.norm, self.conv
        self.norm, self.conv = norm, conv


def test_the_command_exits_by_the_outcome(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--epochs", "1", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.html").exists()
