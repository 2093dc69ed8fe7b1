"""What `import automatch` costs, and that what is promised is there."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import automatch

ROOT = Path(__file__).parents[1]
HEAVY = {"lightning", "pytorch_lightning", "rich", "jinja2", "IPython", "torch", "numpy", "scipy", "click", "transformers"}


def _modules_after(code: str) -> set[str]:
    code += "; import json, sys; print(json.dumps(sorted(sys.modules)), file=sys.__stdout__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_automatch_loads_nothing_heavy() -> None:
    assert not HEAVY & _modules_after("import automatch; dir(automatch)")


def test_proposing_loads_no_renderer_and_no_framework() -> None:
    modules = _modules_after("import automatch; automatch.propose_mapping")
    assert not {"lightning", "pytorch_lightning", "rich", "jinja2", "IPython", "click", "transformers"} & modules


def test_help_loads_neither_torch_nor_numpy_nor_rich() -> None:
    code = "from automatch.cli import main; main(['--help'], standalone_mode=False)"
    assert not (HEAVY - {"click"}) & _modules_after(code)


@pytest.mark.parametrize("name", automatch.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(automatch, name).__doc__
    assert name in dir(automatch)


def test_load_stays_a_function_after_its_module_was_imported() -> None:
    code = "from automatch.load import LoadReport; import automatch; print(callable(automatch.load))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        automatch.lod  # noqa: B018


def test_the_version_is_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == automatch.__version__
    assert f"## {automatch.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_constraints_pin_torch_and_every_test_tool() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {requirement.partition(";")[0].partition(">")[0].partition("[")[0].strip() for requirement in wanted}
    assert names - {"automatch"} <= pinned
