"""The README is run: its code, its report, its commands."""

from __future__ import annotations

import re
from pathlib import Path

import lightning
import pytest
import torch

import automatch
from automatch.cli import COMMANDS, EPILOG
from automatch.demo.after import MedicalSegmentationModel as Refactored
from automatch.demo.before import MedicalSegmentationModel
from automatch.demo.other import PatchTransformer
from automatch.demo.training import save_checkpoint, train

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REPORT = re.compile(r"<!-- report -->\n```text\n(.*?)```\n<!-- /report -->", re.DOTALL)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}


class LitModel(lightning.LightningModule, Refactored):
    """The refactored class as a LightningModule."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.classes = classes

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``old.ckpt`` in the current folder: the checkpoint that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    model = MedicalSegmentationModel()
    save_checkpoint(model, train(model, epochs=1, seed=0), Path("old.ckpt"), epochs=1)
    return "old.ckpt"


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # lightning's own use of torch's tree utilities
@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_code_runs(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"model": Refactored(), "other_model": PatchTransformer(), "torch": torch, "Trainer": lightning.Trainer}
    names |= {"LitModel": LitModel, "data": torch.utils.data.DataLoader(torch.zeros(2, 1, 32, 32)), "quiet": QUIET}
    names |= {"old_model": MedicalSegmentationModel(), "images": torch.randn(2, 1, 32, 32)}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "would keep their initial values" in capsys.readouterr().out
    assert len(names["report"].loaded) == 184
    assert names["proof"].proven
    assert names["migration"].is_file()
    assert len(names["optimizer"].state_dict()["state"]) == 106


def test_the_report_is_what_is_printed(old: str, request: pytest.FixtureRequest) -> None:
    report = automatch.propose_mapping(Refactored(), old).report()
    text = README.read_text(encoding="utf-8")
    if request.config.getoption("--overwrite-golden", default=False):
        text = REPORT.sub(lambda _: f"<!-- report -->\n```text\n{report}```\n<!-- /report -->", text)
        README.write_text(text, encoding="utf-8")
    found = REPORT.search(text)
    assert found is not None
    assert found[1] == report


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    assert f"| `automatch {command}" in README.read_text(encoding="utf-8")


def test_exit_codes_are_documented() -> None:
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert " ".join(EPILOG.partition(". Reports")[0].split()) in text


def test_ci_runs_the_command_of_the_readme() -> None:
    assert "bash .ci/test\n" in blocks("bash")
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec bash .ci/test")


def test_the_files_that_the_documents_link_to_are_there() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{name} links to {target}"
