"""How a model is named on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from automatch import ModelError, StateSpec
from automatch.cli.models import resolve_model


def test_a_file_with_arguments_is_built_on_the_meta_device(folder: Path) -> None:
    model = resolve_model("models_here.py:Net", '{"depth": 5}')
    assert isinstance(model, torch.nn.Module)
    assert len(model.state_dict()) == 12
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_module_of_the_current_folder_is_found(folder: Path) -> None:
    assert isinstance(resolve_model("models_here:Net"), torch.nn.Module)


def test_a_factory_that_computes_with_its_weights_is_built_for_real(folder: Path) -> None:
    model = resolve_model("models_here.py:Computing")
    assert isinstance(model, torch.nn.Module)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_another_checkpoint_stands_for_a_model(folder: Path) -> None:
    spec = resolve_model("net.ckpt")
    assert isinstance(spec, StateSpec)
    assert spec.keys[0] == "layers.0.weight"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing_here", "no model 'nothing_here'; name it as package.module:factory"),
        ("gone.py:Net", "no file 'gone.py'"),
        ("models_here.py", "name it as package.module:factory"),
        ("no_such_module_here:Net", "cannot import 'no_such_module_here': ModuleNotFoundError"),
        ("models_here.py:Nte", "no factory 'Nte'; it offers .*Net"),
        ("models_here.py:not_a_model", "returned dict, not a torch.nn.Module"),
        ("models_here.py:broken", "failed with ValueError: no such backbone; its arguments are --kwargs"),
    ],
)
def test_what_cannot_be_found_or_built_is_said(folder: Path, reference: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(reference)


@pytest.mark.parametrize(("kwargs", "message"), [("{depth: 5}", "is not JSON"), ("[5]", "is not a JSON object")])
def test_arguments_are_a_json_object(cli, folder: Path, kwargs: str, message: str) -> None:
    result = cli("propose", "net.ckpt", "--model", "models_here.py:Net", "--kwargs", kwargs)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_may_share_its_name_with_a_loaded_module(folder: Path) -> None:
    (folder / "torch.py").write_text((folder / "models_here.py").read_text().replace("class Net", "import dataclasses\nclass Net"))
    assert isinstance(resolve_model(str(folder / "torch.py") + ":Net"), torch.nn.Module)
    assert hasattr(torch, "Tensor")
