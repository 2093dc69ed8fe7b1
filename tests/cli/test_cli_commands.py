"""propose, apply and inspect from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from handmade import mapping_of
from safetensors.torch import load_file
from zoo import Mlp

from automatch import KeyMapping


def test_propose_prints_the_report_and_writes_what_was_asked_for(cli, folder: Path) -> None:
    result = cli("propose", "net.ckpt", "--model", "models_here.py:Net", "-o", "m.json", "--html", "r.html")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "m.json" in result.stderr
    assert "r.html" in result.stderr
    assert len(KeyMapping.load("m.json")) == 8
    assert (folder / "r.html").read_text().startswith("<!")


def test_json_is_the_mapping_and_nothing_else(cli, folder: Path) -> None:
    result = cli("propose", "net.ckpt", "--model", "net.ckpt", "--json")
    assert result.exit_code == 0
    assert len(KeyMapping.from_dict(json.loads(result.stdout)).matches) == 8


def test_markdown_is_for_a_pull_request(cli, folder: Path) -> None:
    result = cli("propose", "net.ckpt", "--model", "net.ckpt", "--markdown")
    assert result.stdout.startswith("### ")
    assert "`net.ckpt`" in result.stdout


def test_what_is_left_to_decide_exits_with_1(cli, folder: Path) -> None:
    result = cli("propose", "net.ckpt", "--model", "models_here.py:Net", "--kwargs", '{"classes": 99}')
    assert result.exit_code == 1
    assert "head" in result.stdout


def test_pins_are_obeyed(cli, folder: Path) -> None:
    pins = ["--pin", "layers.0.weight=layers.2.weight", "--pin", "head.bias="]
    result = cli("propose", "net.ckpt", "--model", "net.ckpt", "--json", *pins)
    mapping = KeyMapping.from_dict(json.loads(result.stdout))
    assert mapping["layers.0.weight"].sources == ("layers.2.weight",)
    assert "head.bias" in mapping.missing_keys


def test_a_pin_without_an_equals_sign_is_wrong_usage(cli, folder: Path) -> None:
    result = cli("propose", "net.ckpt", "--model", "net.ckpt", "--pin", "head.bias")
    assert result.exit_code == 2
    assert "'head.bias' is not KEY=SOURCE" in result.stderr


def _write_mapping(folder: Path, **confidences: float) -> KeyMapping:
    model = Mlp()
    mapping = mapping_of(model, folder / "net.ckpt", {key: key for key in model.state_dict()}, **confidences)
    mapping.save(folder / "m.json")
    return mapping


def test_apply_writes_a_checkpoint_that_loads(cli, folder: Path) -> None:
    _write_mapping(folder)
    for name in ("new.safetensors", "new.pt"):
        result = cli("apply", "net.ckpt", "--mapping", "m.json", "-o", name)
        assert result.exit_code == 0, result.stderr
    old = torch.load("net.ckpt", weights_only=True)["state_dict"]
    for new in (load_file("new.safetensors"), torch.load("new.pt", weights_only=True)):
        state_dict = new.get("state_dict", new)
        assert state_dict.keys() == old.keys()
        assert all(torch.equal(state_dict[key], old[key]) for key in old)


def test_apply_writes_nothing_while_a_parameter_has_no_sure_source(cli, folder: Path) -> None:
    _write_mapping(folder, confidence=0.5)
    result = cli("apply", "net.ckpt", "--mapping", "m.json", "-o", "new.safetensors")
    assert result.exit_code == 1
    assert "layers.0.weight" in result.stderr
    assert not (folder / "new.safetensors").exists()


def test_apply_refuses_a_mapping_of_another_checkpoint(cli, folder: Path) -> None:
    _write_mapping(folder)
    torch.save({"state_dict": {"other": torch.zeros(2)}}, folder / "other.ckpt")
    result = cli("apply", "other.ckpt", "--mapping", "m.json", "-o", "new.safetensors")
    assert result.exit_code == 2
    assert "made for another checkpoint" in result.stderr
    assert not (folder / "new.safetensors").exists()


def test_apply_says_that_a_mapping_is_no_mapping(cli, folder: Path) -> None:
    (folder / "m.json").write_text("{}")
    result = cli("apply", "net.ckpt", "--mapping", "m.json", "-o", "new.safetensors")
    assert result.exit_code == 2
    assert "not a mapping" in result.stderr


def test_inspect_folds_indices_and_lists_them_on_request(cli, folder: Path) -> None:
    folded, listed = cli("inspect", "net.ckpt").stdout, cli("inspect", "net.ckpt", "--all").stdout
    assert "8 tensors, 243 elements, under state_dict" in folded
    assert "layers.{0…2}.weight ×3" in folded
    assert "layers.1.weight" in listed


def test_inspect_shows_a_model_and_its_json(cli, folder: Path) -> None:
    result = cli("inspect", "models_here.py:Net", "--kwargs", '{"depth": 1}', "--json")
    entries = json.loads(result.stdout)["entries"]
    assert [entry["key"] for entry in entries] == ["layers.0.weight", "layers.0.bias", "head.weight", "head.bias"]
    assert entries[0]["owner"] == "Linear"


def test_a_hostile_key_does_not_drive_the_terminal(cli, folder: Path) -> None:
    torch.save({"\x1b[2Jhead.weight": torch.zeros(2)}, folder / "hostile.pt")
    for command in (["inspect", "hostile.pt"], ["propose", "hostile.pt", "--model", "hostile.pt", "--all"]):
        assert "\x1b" not in cli(*command).output
