"""Every message gets its right cause or an honest "cannot tell", and pasted code does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from automatch.explain import Explanation, explain, parse_error

MESSAGES = Path(__file__).parents[1] / "data" / "messages"
CAUSES = {
    "cyclegan-461-conv-block": ["shift", "buffers", "buffers"],
    "deeplabs-3-extra-layer": ["architecture"],
    "generated-smp-unetplusplus-into-deeplabv3plus": ["architecture", "buffers", "size"],
    "midas-236-swin2-downsample": ["renamed", "shift", "buffers"],
    "pia-13-clip-position-ids": ["buffers"],
    "pytorch-classification-27-alexnet": ["wrapper"],
    "pytorch-classification-35-bottleneck": ["architecture"],
    "sd-dreambooth-6-text-model-prefix": ["prefix"],
    "tadaconv-24-head-classes": ["classes"],
    "timm-pr2003-orig-mod": ["wrapper"],
}


def message(name: str) -> dict[str, Any]:
    return json.loads((MESSAGES / f"{name}.json").read_text(encoding="utf-8"))


def kinds(explanation: Explanation) -> list[str]:
    return [cause.kind for cause in explanation.causes]


def test_every_message_has_its_expected_cause_here() -> None:
    assert sorted(path.stem for path in MESSAGES.glob("*.json")) == sorted(CAUSES)


@pytest.mark.parametrize("name", CAUSES)
@pytest.mark.parametrize("logged", ["", "> ", "[rank0]: ", "2024-05-01 12:00:00,123 - ERROR - ", "E   ", "│ "])
def test_real_messages(name: str, logged: str) -> None:
    known = message(name)
    text = "\n".join(logged + line for line in known["error"].split("\n"))
    parsed = parse_error(text)
    assert (list(parsed.missing), list(parsed.unexpected)) == (known["missing"], known["unexpected"])
    explanation = explain(text)
    assert kinds(explanation) == CAUSES[name]
    assert {match.target: match.sources[0] for match in explanation.mapping.matches} == known["truth"]
    assert bool(explanation.code) == ("architecture" not in CAUSES[name])


def test_the_midas_message_does_not_pair_layers_over_names_in_between() -> None:
    explanation = explain(message("midas-236-swin2-downsample")["error"])
    assert "pretrained.model.layers.3.downsample.norm.bias" not in explanation.mapping
    shift = explanation.causes[1]
    assert "stands at {i+1} in the model" in shift.text
    assert "loading what has the same name is wrong" in shift.text


class Net(nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)


def failing(model: nn.Module, state: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    return str(caught.value)


def paste(code: str, model: nn.Module, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state}, "checkpoint.ckpt")
    exec(compile(code, "pasted", "exec"), {"model": model})


def assert_loaded(model: nn.Module, wanted: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[key], wanted[key]) for key in state if not key.startswith(but or ("-",)))


RENAMINGS = {
    "wrapper": lambda key: f"module._orig_mod.{key}",
    "prefix": lambda key: f"net.{key}",
    "renamed": lambda key: key.replace("head", "head.fc"),
    "shift": lambda key: key.replace("features.1", "features.2"),
}


@pytest.mark.parametrize("kind", RENAMINGS)
@pytest.mark.parametrize("back", [False, True])
def test_pasted_code_loads_the_checkpoint(kind: str, back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = RENAMINGS[kind]
    plain, renamed = Net(), nn.Module()
    for key, tensor in Net().state_dict().items():
        owner = renamed
        *path, leaf = rename(key).split(".")
        for name in path:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner._modules[name]  # type: ignore[assignment]
        owner.register_buffer(leaf, torch.zeros_like(tensor))
    state = plain.state_dict()
    source, model, wanted = (state, renamed, {rename(key): tensor for key, tensor in state.items()})
    if not back:
        source, model, wanted = wanted, Net(), state
    explanation = explain(failing(model, source))
    assert kinds(explanation) == [kind]
    assert {match.target: source[match.sources[0]] is wanted[match.target] for match in explanation.mapping.matches}
    paste(explanation.code, model, source, tmp_path, monkeypatch)
    assert_loaded(model, wanted)


def test_another_number_of_classes_loads_all_but_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, model = Net(10).state_dict(), Net(3)
    explanation = explain(failing(model, state))
    assert kinds(explanation) == ["classes"]
    assert "10 in the checkpoint, 3 in the model" in explanation.causes[0].text
    paste(explanation.code, model, state, tmp_path, monkeypatch)
    assert_loaded(model, state, but=("head.",))


def test_modules_renamed_beyond_simple_changes_are_matched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(names: tuple[str, str, str, str]) -> nn.Module:
        layers = [nn.ModuleDict({names[2]: nn.Linear(2, 2), names[3]: nn.Linear(2, 2)}) for _ in range(2)]
        return nn.ModuleDict({names[0]: nn.Linear(2, 2), names[1]: nn.ModuleList(layers), "head": nn.Linear(2, 2)})

    old, model = build(("embeddings", "encoder", "query", "key")), build(("embed", "enc", "q", "k"))
    explanation = explain(failing(model, old.state_dict()))
    assert kinds(explanation) == ["renamed"]
    paste(explanation.code, model, old.state_dict(), tmp_path, monkeypatch)
    words = {"embeddings": "embed", "encoder": "enc", "query": "q", "key": "k"}
    made = {".".join(words.get(part, part) for part in key.split(".")): tensor for key, tensor in old.state_dict().items()}
    assert_loaded(model, made)


def test_rows_that_may_stand_in_another_order_are_not_called_renamed() -> None:
    """Meta's Llama and transformers' keep the rotary rows of queries and keys in another order, which no name shows."""
    old = [f"layers.{i}.attention.{name}.weight" for i in range(2) for name in ("wq", "wk", "wv", "wo")] + ["tok_embeddings.weight"]
    new = [f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qkvo"] + ["model.embed_tokens.weight"]
    lists = [", ".join(f'"{key}"' for key in keys) for keys in (new, old)]
    explanation = explain(f"Missing key(s) in state_dict: {lists[0]}. \n\tUnexpected key(s) in state_dict: {lists[1]}. ")
    assert not any("q_proj" in match.target or "k_proj" in match.target for match in explanation.mapping.matches)


@pytest.mark.parametrize(
    ("text", "missing", "unexpected"),
    [
        ("_IncompatibleKeys(missing_keys=['a.b'], unexpected_keys=['c.d', 'c.e'])", ["a.b"], ["c.d", "c.e"]),
        (
            "The model and loaded state dict do not match exactly\n\nunexpected key in source state_dict: fc.weight, fc.bias\n\n"
            "missing keys in source state_dict: head.fc.weight, head.fc.bias\n",
            ["head.fc.weight", "head.fc.bias"],
            ["fc.weight", "fc.bias"],
        ),
        (
            "Found keys that are in the model state dict but not in the checkpoint: ['net.a.weight']\n"
            "Found keys that are not in the model state dict but in the checkpoint: ['a.weight']",
            ["net.a.weight"],
            ["a.weight"],
        ),
        (
            "Some weights of the model checkpoint at x were not used when initializing BertModel: ['cls.bias', 'cls.weight']\n"
            "- This IS expected if you are initializing BertModel from the checkpoint of a model\n"
            "Some weights of BertModel were not initialized from the model checkpoint at x and are newly initialized: ['pooler.weight']\n"
            "You should probably TRAIN this model",
            ["pooler.weight"],
            ["cls.bias", "cls.weight"],
        ),
        (
            "BertModel LOAD REPORT from: x\nKey | Status | \n----+---+--\n"
            "layers.{0...2}.w | MISSING | \nold.{0, 2}.inv_freq | UNEXPECTED | \n",
            ["layers.0.w", "layers.1.w", "layers.2.w"],
            ["old.0.inv_freq", "old.2.inv_freq"],
        ),
        ("KeyError: 'unexpected key \"module.conv1.weight\" in state_dict'", [], ["module.conv1.weight"]),
    ],
    ids=["returned", "mmengine", "lightning", "transformers4", "transformers5", "torch0.3"],
)
def test_other_libraries_say_it_otherwise(text: str, missing: list[str], unexpected: list[str]) -> None:
    parsed = parse_error(text)
    assert (list(parsed.missing), list(parsed.unexpected)) == (missing, unexpected)


@pytest.mark.parametrize(
    "text",
    [
        "size mismatch for head.weight: copying a param with shape torch.Size([10, 4]) from checkpoint, "
        "the shape in current model is torch.Size([3, 4]).",
        "size mismatch for head.weight: copying a param of torch.Size([10, 4]) from checkpoint, "
        "where the shape is torch.Size([3, 4]) in current model.",
        "While copying the parameter named head.weight, whose dimensions in the model are torch.Size([3, 4]) and whose dimensions in the "
        "checkpoint are torch.Size([10, 4])",
        "- head.weight: found shape torch.Size([10, 4]) in the checkpoint and torch.Size([3, 4]) in the model instantiated",
        "head.weight | MISMATCH | Reinit due to size mismatch - ckpt: torch.Size([10, 4]) vs model:torch.Size([3, 4])",
    ],
    ids=["torch", "torch0.4", "torch0.3", "transformers4", "transformers5"],
)
def test_size_mismatches(text: str) -> None:
    (mismatch,) = parse_error(text).mismatched
    assert (mismatch.key, mismatch.source, mismatch.target) == ("head.weight", (10, 4), (3, 4))
    assert kinds(explain(text)) == ["classes"]


@pytest.mark.parametrize(
    ("key", "source", "target", "kind"),
    [
        ("model.embed_tokens.weight", (32000, 8), (32001, 8), "vocabulary"),
        ("vit.pos_embed", (1, 197, 8), (1, 577, 8), "positions"),
        ("text.emb.weight", (35, 8), (50, 8), "vocabulary"),
        ("decoder.embed_positions.weight", (302, 8), (258, 8), "positions"),
        ("blocks.0.attn.rel_pos_h", (127, 8), (63, 8), "positions"),
        ("pos_embed", (1, 197, 768), (1, 197, 1024), "size"),
        ("embed_tokens.weight", (32000, 8), (32000, 16), "size"),
        ("stem.conv.weight", (8, 3, 3, 3), (8, 1, 3, 3), "size"),
        ("layers.0.k_proj.weight", (0,), (8, 8), "partitioned"),
        ("layers.0.k_proj.weight", (8, 8), (0,), "partitioned"),
    ],
)
def test_resized_layers(key: str, source: tuple[int, ...], target: tuple[int, ...], kind: str) -> None:
    shapes = f"torch.Size({list(source)}) from checkpoint, the shape in current model is torch.Size({list(target)})"
    assert kinds(explain(f"size mismatch for {key}: copying a param with shape {shapes}.")) == [kind]


def mismatches(*rows: tuple[str, tuple[int, ...], tuple[int, ...]]) -> str:
    return "\n".join(
        f"size mismatch for {key}: copying a param with shape torch.Size({list(source)}) from checkpoint, "
        f"the shape in current model is torch.Size({list(target)})."
        for key, source, target in rows
    )


@pytest.mark.parametrize(
    ("rows", "causes"),
    [
        ([("encoder.embed_tokens.weight", (99, 8), (50, 8)), ("projection.weight", (99, 8), (50, 8)), ("projection.bias", (99,), (50,))],
         ["vocabulary"]),
        ([("embed.weight", (99, 8), (50, 8)), ("pos_embed", (1, 5, 8), (1, 9, 8)), ("score.weight", (4, 8), (2, 8))],
         ["vocabulary", "positions", "classes"]),
        ([("embed.weight", (99, 8), (99, 16)), ("head.weight", (4, 8), (4, 16))], ["size"]),
        ([("layers.0.fc1.weight", (1,), (8, 8)), ("layers.0.fc1.bias", (1,), (8,))], ["partitioned"]),
        ([("h.0.attn.lora_A.default.weight", (32, 8), (16, 8)), ("h.0.attn.lora_B.default.weight", (8, 32), (8, 16))], ["size"]),
    ],
    ids=["output layer", "three causes", "width", "one element left", "adapter"],
)  # fmt: skip
def test_several_resized_layers(rows: list[tuple[str, tuple[int, ...], tuple[int, ...]]], causes: list[str]) -> None:
    assert kinds(explain(mismatches(*rows))) == causes


@pytest.mark.parametrize(
    "text",
    [
        'Unexpected key(s) in state_dict: "epoch", "global_step", "state_dict", "loops", "optimizer_states". ',
        'Missing key(s) in state_dict: "a.weight". \n\tUnexpected key(s) in state_dict: "state_dict". ',
        "unexpected key in source state_dict: epoch, state_dict, optimizer, args\n\nmissing keys in source state_dict: a.weight, a.bias\n",
    ],
)
def test_a_whole_checkpoint_in_place_of_the_state_dict(text: str) -> None:
    explanation = explain(text)
    assert kinds(explanation) == ["container"]
    assert 'state_dict = checkpoint["state_dict"]' in explanation.code


def test_pasted_code_takes_the_state_dict_out_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, model = Net().state_dict(), Net()
    whole = {"model": state, "epoch": 3, "optimizer": {}}
    code = explain(failing(model, whole)).code
    monkeypatch.chdir(tmp_path)
    torch.save(whole, "checkpoint.ckpt")
    exec(compile(code, "pasted", "exec"), {"model": model})
    assert_loaded(model, state)


def test_a_wrapper_is_seen_where_only_one_side_is_shown() -> None:
    assert kinds(explain('unexpected key "module.a.weight" in state_dict')) == ["wrapper"]
    assert kinds(explain('Error(s) in loading state_dict for Net:\n\tUnexpected key(s) in state_dict: "_orig_mod.a.weight", ...')) == [
        "wrapper"
    ]
    extra = 'Error(s) in loading state_dict for DataParallel:\n\tUnexpected key(s) in state_dict: "module.fc.weight". '
    assert kinds(explain(extra)) == ["extra"]


def test_a_text_that_breaks_off_before_the_checkpoints_keys_is_not_called_another_architecture() -> None:
    for text in (
        'Missing key(s) in state_dict: "module.a.weight", "module.b.weight"...',
        "Cannot load <class 'M'> from x because the following keys are missing: \n a.weight, b.weight. \n Please make sure to",
    ):
        assert kinds(explain(text)) == ["unknown"]
    shown = 'Missing key(s) in state_dict: "layer.12.weight", \n...\n\t' + mismatches(("token", (1, 768), (1, 1024)))
    assert kinds(explain(shown)) == ["size", "unknown"]


def test_what_the_text_does_not_tell_is_said() -> None:
    assert kinds(explain("CUDA out of memory")) == ["unknown"]
    assert "Paste the whole message" in explain("").causes[0].text
    elided = 'Missing key(s) in state_dict: "a.b.weight", ... Unexpected key(s) in state_dict: "c.d.weight", ...'
    assert kinds(explain(elided)) == ["unknown"]
    assert explain(elided).code == ""


def test_a_checkpoint_that_holds_more_is_not_called_another_architecture() -> None:
    assert kinds(explain('Unexpected key(s) in state_dict: "loss.weight", "teacher.fc.weight". ')) == ["extra"]


@pytest.mark.parametrize("key", ['a".b', "a{x}.b", "a\\.b", "a'; import os; '.b", "a.\u2028b"])
def test_hostile_keys_stay_text_in_the_code(key: str, tmp_path: Path) -> None:
    quote = "'" if '"' in key else '"'
    for old, new in ((f"m.5.{key}", f"m.6.{key}"), (f"x.{key}", key), (key, f"y.{key}")):
        code = explain(f"Missing key(s) in state_dict: {quote}{new}{quote}. \nUnexpected key(s) in state_dict: {quote}{old}{quote}. ").code
        compile(code, "pasted", "exec")
        assert not any(line.strip().startswith("import os") for line in code.splitlines())
