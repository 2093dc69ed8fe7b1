"""What a person expects of the matching: each test is one situation from real life.

Everything goes through `propose_mapping` and `load`; nothing here depends on how the engine works.
"""

from __future__ import annotations

import re

import pytest
import torch
from behaviour import ConvNet, Segmenter, Tied, Transformer, TwoTowers, expect, gated_model, pairs_of, renamed, shuffled_gates, sure
from torch import nn

from automatch import LoadError, load, propose_mapping

# ---- same tensors under other keys ------------------------------------------------------------------------


def test_model_maps_onto_itself_whatever_the_order_of_the_file():
    model = Transformer()
    state_dict = dict(reversed(model.state_dict().items()))
    expect(propose_mapping(model, state_dict), {key: key for key in state_dict})


def test_nested_wrappers_cost_nothing():
    model = Transformer()
    own = model.state_dict(keep_vars=True)
    ckpt = renamed(own, (r"^", "module._orig_mod.model."), (r"blocks\.(\d+)\.", r"blocks.\1._fsdp_wrapped_module."))
    expect(propose_mapping(model, ckpt), pairs_of(own, ckpt))


def test_renamed_and_renested_decoder():
    model = Transformer()
    own = model.state_dict(keep_vars=True)
    ckpt = renamed(
        own,
        (r"^blocks", "encoder.layer"),
        (r"\.attn\.", ".attention.self."),
        (r"norm1", "layernorm_before"),
        (r"^embed", "word_embeddings"),
    )
    expect(propose_mapping(model, ckpt), pairs_of(own, ckpt))


def test_sorted_file_of_twelve_renamed_layers():
    model = Transformer(depth=12)
    own = model.state_dict(keep_vars=True)
    ckpt = dict(sorted(renamed(own, (r"^blocks", "layers"), (r"\.attn\.", ".self_attention."), (r"fc(\d)", r"linear\1")).items()))
    assert list(ckpt).index("layers.10.norm1.weight") < list(ckpt).index("layers.2.norm1.weight")
    expect(propose_mapping(model, ckpt), pairs_of(own, ckpt))


def test_names_decide_between_twins_that_changed_places():
    model = Transformer()
    own = model.state_dict(keep_vars=True)
    ckpt = dict(sorted(own.items(), key=lambda item: ("v_proj" not in item[0], "k_proj" not in item[0])))
    ckpt = renamed(ckpt, (r"^", "model."), ("blocks", "layers"))
    expect(propose_mapping(model, ckpt), pairs_of(own, ckpt))


def test_statistics_and_affine_parameters_of_a_norm_are_told_apart():
    model = ConvNet()
    own = model.state_dict(keep_vars=True)
    ckpt = renamed(
        own,
        (r"running_mean", "moving_mean"),
        (r"running_var", "moving_variance"),
        (r"stages\.(\d)\.(1|4|7)\.weight", r"stages.\1.\2.gamma"),
        (r"stages\.(\d)\.(1|4|7)\.bias", r"stages.\1.\2.beta"),
    )
    expected = {target: source for target, source in pairs_of(own, ckpt).items() if "num_batches" not in target}
    expect(propose_mapping(model, ckpt), expected)


# ---- the same name is the wrong tensor ----------------------------------------------------------------------


def test_inserted_layer_shifts_indices():
    old, new = ConvNet(), ConvNet(extra=True)
    ckpt = old.state_dict()
    moved = {i: i + (i > 2) for i in (0, 1, 3, 4, 6, 7)}
    shifted = {
        f"stages.{s}.{i}.{leaf}": f"stages.{s}.{old}.{leaf}" for s in range(3) for old, i in moved.items() for leaf in ("weight", "bias")
    }
    mapping = propose_mapping(new, ckpt)
    expect(mapping, shifted)
    assert any("stages" in warning for warning in mapping.warnings), "an overruled name is worth a warning"


def test_counting_from_one():
    model = Transformer(depth=4)
    own = model.state_dict(keep_vars=True)
    ckpt = {re.sub(r"blocks\.(\d)", lambda found: f"blocks.{int(found[1]) + 1}", key): value for key, value in own.items()}
    expect(propose_mapping(model, ckpt), pairs_of(own, ckpt))


def test_first_layers_of_a_deeper_model():
    own, ckpt = Transformer(depth=3).state_dict(), Transformer(depth=6).state_dict()
    expect(propose_mapping(Transformer(depth=3), renamed(ckpt, ("^", "encoder."))), {key: f"encoder.{key}" for key in own}, sure=False)


# ---- nothing there to match ---------------------------------------------------------------------------------


def test_unrelated_architectures_abstain():
    model, ckpt = Transformer(dim=64), ConvNet().state_dict()
    mapping = propose_mapping(model, ckpt)
    assert not sure(mapping)
    assert mapping.verdict is not None
    assert mapping.verdict.kind == "different"


def test_unrelated_checkpoint_is_not_loaded():
    model = Transformer(dim=64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(LoadError):
        load(model, ConvNet().state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shared_backbone_under_another_decoder():
    old = Segmenter(nn.Sequential(nn.ConvTranspose2d(64, 32, 2), nn.ConvTranspose2d(32, 16, 2)))
    aspp = nn.ModuleDict({"aspp": nn.ModuleList(nn.Conv2d(64, 16, 1) for _ in range(3)), "project": nn.Conv2d(48, 16, 3)})
    new = Segmenter(aspp)
    mapping = propose_mapping(new, renamed(old.state_dict(), (r"^encoder", "backbone")))
    expect(mapping, {key: key.replace("encoder", "backbone") for key in new.state_dict() if key.startswith("encoder.")})
    expect(mapping, {key: None for key in new.state_dict() if key.startswith("decoder.")})


def test_loss_keys_stay_out():
    model = Transformer()
    own = model.state_dict(keep_vars=True)
    ckpt = {"criterion.weight": torch.ones(10), "metric.total": torch.ones(())} | renamed(own, ("^", "net."))
    mapping = propose_mapping(model, ckpt)
    expect(mapping, pairs_of(own, ckpt))
    assert set(mapping.unexpected_keys) == {"criterion.weight", "metric.total"}


def test_resized_head_is_never_a_confident_copy():
    model, ckpt = Transformer(classes=3), renamed(Transformer(classes=10).state_dict(), ("^", "module."))
    mapping = propose_mapping(model, ckpt)
    expect(mapping, {key: f"module.{key}" for key in model.state_dict() if not key.startswith("head.")})
    expect(mapping, {"head.weight": None, "head.bias": None})
    assert mapping.verdict is not None
    assert mapping.verdict.kind == "resized"


# ---- equals ---------------------------------------------------------------------------------------------------


def test_conventional_names_of_a_gated_mlp_are_known():
    model = gated_model(("gate_proj", "up_proj", "down_proj"))
    ckpt = shuffled_gates(gated_model(("w1", "w3", "w2")))
    mlp = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    expect(
        propose_mapping(model, ckpt),
        {f"blocks.{i}.mlp.{new}.weight": f"model.blocks.{i}.mlp.{old}.weight" for i in range(3) for new, old in mlp.items()},
        sure=False,
    )


def test_equals_that_nothing_tells_apart_become_a_question():
    model = gated_model(("zeta", "omega", "out"))
    mapping = propose_mapping(model, shuffled_gates(gated_model(("foo", "bar", "baz"))))
    twins = {f"blocks.{i}.mlp.{name}.weight" for i in range(3) for name in ("zeta", "omega")}
    assert not twins & sure(mapping).keys()
    asked = [question for question in mapping.questions if twins <= set(question.keys)]
    assert len(asked) == 1, "one decision for all layers"
    for option in asked[0].options:
        answered = mapping.answer(asked[0].id, option.label)
        assert twins <= sure(answered).keys()


def test_one_pin_settles_all_layers():
    model = gated_model(("zeta", "omega", "out"))
    ckpt = shuffled_gates(gated_model(("foo", "bar", "baz")))
    mapping = propose_mapping(model, ckpt, pins={"blocks.0.mlp.zeta.weight": "model.blocks.0.mlp.bar.weight"})
    expected = {"zeta": "bar", "omega": "foo"}
    expect(
        mapping, {f"blocks.{i}.mlp.{new}.weight": f"model.blocks.{i}.mlp.{old}.weight" for i in range(3) for new, old in expected.items()}
    )


def test_two_identical_encoders_are_told_apart_by_name():
    model = TwoTowers(("encoder_q", "encoder_k"))
    own = model.state_dict(keep_vars=True)
    ckpt = dict(sorted(renamed(own, ("encoder_q", "query_encoder"), ("encoder_k", "key_encoder")).items()))
    expect(propose_mapping(model, ckpt), pairs_of(own, ckpt))


def test_one_of_two_identical_encoders_is_asked_for():
    model = ConvNet()
    mapping = propose_mapping(model, TwoTowers(("left", "right")).state_dict())
    assert not sure(mapping), "left or right: nobody can know"
    assert any(len(question.keys) >= 10 for question in mapping.questions)


# ---- tied, nested, repeatable -------------------------------------------------------------------------------------


def test_tied_weights_load_from_a_file_that_holds_them_once():
    old, model = Tied(), Tied()
    ckpt = renamed({key: value for key, value in old.state_dict().items() if key != "head.weight"}, ("^", "module."))
    report = load(model, ckpt)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, old.embed.weight)
    assert not report.missing_keys


def test_tied_weights_load_from_a_file_that_holds_them_twice():
    old, model = Tied(), Tied()
    load(model, renamed(old.state_dict(), ("^", "module.")))
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in model.state_dict().items())


def test_averaged_weights_beside_the_raw_ones_are_mentioned():
    own = Transformer().state_dict()
    mapping = propose_mapping(Transformer(), {"model": dict(own), "model_ema": dict(own), "epoch": 3})
    expect(mapping, {key: key for key in own})
    assert any("ema" in warning for warning in mapping.warnings)


def test_loading_gives_back_what_was_trained():
    torch.manual_seed(0)
    old, new = ConvNet(), ConvNet(extra=True)
    for tensor in old.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape)) if tensor.is_floating_point() else tensor.fill_(7)
    load(new, renamed(old.state_dict(), ("^", "net."), ("stages", "levels")))
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


def test_same_answer_every_time():
    ckpt = shuffled_gates(gated_model(("w1", "w3", "w2")))
    first, second = (propose_mapping(gated_model(("gate_proj", "up_proj", "down_proj")), ckpt).to_dict() for _ in range(2))
    assert first == second
