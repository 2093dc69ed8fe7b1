"""Rules reproduce a mapping exactly, are few, read well, and lead back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automatch.errors import MappingError
from automatch.mapping import KeyMapping, Match, Side
from automatch.rules import RenameRule, apply_rules, infer_rules, invert_rules
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import Adapt, Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack, Transform

Feeds = dict[str, str | tuple[tuple[str, ...] | str, Transform]]


def mapping_of(feeds: Feeds, unused: tuple[str, ...] = (), confidence: float = 1.0) -> KeyMapping:
    matches: list[Match] = []
    for target, feed in feeds.items():
        sources, transform = (feed, Copy()) if isinstance(feed, str) else feed
        matches.append(Match(target, (sources,) if isinstance(sources, str) else sources, transform, confidence=confidence))
    keys = dict.fromkeys([*(key for match in matches for key in match.sources), *unused])
    source = StateSpec(tuple(TensorSpec(key, (4, 4)) for key in keys), "checkpoint")
    target = StateSpec(tuple(TensorSpec(match.target, (4, 4)) for match in matches), "model")
    return KeyMapping(Side.of(source), Side.of(target), ()).with_matches(matches)


def what(matches: tuple[Match, ...]) -> dict[str, tuple[tuple[str, ...], Transform]]:
    return {match.target: (match.sources, match.transform) for match in matches}


def exact_rules(mapping: KeyMapping) -> tuple[RenameRule, ...]:
    rules = infer_rules(mapping)
    assert mapping.source.spec is not None
    assert what(apply_rules(rules, mapping.source.spec.keys)) == what(mapping.matches)
    assert sorted(key for rule in rules for key in rule.targets) == sorted(match.target for match in mapping.matches)
    return rules


def lines(mapping: KeyMapping) -> list[str]:
    return [str(rule) for rule in exact_rules(mapping)]


LEAVES = ("weight", "bias")


def test_same_keys_are_one_rule() -> None:
    assert lines(mapping_of({key: key for key in ("a.weight", "a.bias", "b")})) == ["* → *"]


def test_a_wrapper_is_one_rule() -> None:
    feeds: Feeds = {f"layer{i}.{leaf}": f"module.layer{i}.{leaf}" for i in range(3) for leaf in LEAVES}
    assert lines(mapping_of(feeds)) == ["module.* → *"]
    assert lines(mapping_of({f"model.{key}": key for key in feeds})) == ["* → model.*"]


def test_templates_with_numbers_and_exceptions_before_the_general_rule() -> None:
    feeds: Feeds = {"model.norm.weight": "norm.weight", "lm_head.weight": "output.weight"}
    for i in range(4):
        feeds[f"model.layers.{i}.self_attn.q_proj.weight"] = f"layers.{i}.attention.wq.weight"
        feeds |= {f"model.layers.{i}.mlp.up.{leaf}": f"layers.{i}.mlp.up.{leaf}" for leaf in LEAVES}
    assert lines(mapping_of(feeds)) == [
        "layers.{i}.attention.wq.weight → model.layers.{i}.self_attn.q_proj.weight",
        "output.weight → lm_head.weight",
        "* → model.*",
    ]


def test_arithmetic_and_value_tables() -> None:
    shifted: Feeds = {f"stages.{i + 1}.down.{leaf}": f"stages.{i}.down.{leaf}" for i in range(3) for leaf in LEAVES}
    assert lines(mapping_of(shifted)) == ["stages.{i}.* → stages.{i+1}.*"]
    irregular: Feeds = {f"blocks.{new}.{leaf}": f"features.{old}.{leaf}" for old, new in ((0, 0), (3, 1), (7, 2)) for leaf in LEAVES}
    assert lines(mapping_of(irregular)) == ["features.{i}.* → blocks.{a[i]}.*  (a[i]: 0→0, 3→1, 7→2)"]
    nested: Feeds = {f"stages.{i}.cells.{j}.weight": f"blocks.{3 * i + j + 4}.weight" for i in range(2) for j in range(3)}
    (rule,) = exact_rules(mapping_of(nested))
    assert rule.n_keys == 6
    assert rule.replacement == "stages.{a[i]}.cells.{b[i]}.weight"


def test_several_sources_and_several_targets() -> None:
    fused: Feeds = {
        f"blocks.{i}.qkv.{leaf}": (tuple(f"layer.{i}.{name}.{leaf}" for name in ("query", "key", "value")), Concat(0))
        for i in range(2)
        for leaf in LEAVES
    }
    assert lines(mapping_of(fused)) == ["layer.{i}.query.* + layer.{i}.key.* + layer.{i}.value.* → blocks.{i}.qkv.*  (concat dim 0)"]
    split: Feeds = {
        f"layer.{i}.{name}.weight": (f"blocks.{i}.qk.weight", Slice(0, 4 * n, 4)) for i in range(2) for n, name in enumerate("qk")
    }
    assert lines(mapping_of(split)) == [
        "blocks.{i}.qk.weight → layer.{i}.q.weight [slice dim 0, start 0, length 4] + layer.{i}.k.weight [slice dim 0, start 4, length 4]"
    ]


def test_experts_stacked_and_unstacked_are_one_rule() -> None:
    stacked: Feeds = {f"layers.{i}.experts.up": (tuple(f"layers.{i}.experts.{e}.up.weight" for e in range(8)), Stack(0)) for i in range(3)}
    assert lines(mapping_of(stacked)) == ["layers.{i}.experts.{n}.up.weight for n = 0…7 → layers.{i}.experts.up  (stack dim 0)"]
    cut: Feeds = {f"layers.{i}.experts.{e}.w2.weight": (f"layers.{i}.w2", Slice(0, 56 * e, 56)) for i in range(3) for e in range(8)}
    assert lines(mapping_of(cut)) == [
        "layers.{i}.w2 → layers.{i}.experts.{n}.w2.weight for n = 0…7  (slice dim 0, start {56*n}, length 56)"
    ]


def test_numbers_of_a_transform_follow_an_index() -> None:
    feeds: Feeds = {f"b.{i}.w": (f"a.{i}.w", Reshape((2**i, 3))) for i in range(4)}
    assert lines(mapping_of(feeds)) == ["a.{i}.w → b.{i}.w  (reshape shape {a[i]}×3; a[i]: 0→1, 1→2, 2→4, 3→8)"]


def test_what_feeds_nothing_is_kept_from_the_general_rule() -> None:
    feeds: Feeds = {f"model.layers.{i}.{leaf}": f"layers.{i}.{leaf}" for i in range(3) for leaf in (*LEAVES, "scale")}
    feeds["model.norm.weight"] = "norm.weight"
    mapping = mapping_of(feeds, unused=tuple(f"layers.{i}.inv_freq" for i in range(3)))
    assert lines(mapping) == ["layers.{i}.inv_freq → (dropped)", "* → model.*"]
    assert exact_rules(mapping)[0].dropped == ("layers.0.inv_freq", "layers.1.inv_freq", "layers.2.inv_freq")
    assert exact_rules(mapping)[0].confidence is None
    bounded = mapping_of({f"h.{i}.w": f"layers.{i}.weight" for i in range(3)}, unused=("layers.3.weight",))
    assert lines(bounded) == ["layers.{i}.weight → h.{i}.w  (i = 0…2)"]


def test_a_tied_tensor_feeds_two_keys_and_a_leftover_stands_alone() -> None:
    feeds: Feeds = {"embed.weight": "tok.weight", "head.weight": "tok.weight", "scale": "logit"}
    assert lines(mapping_of(feeds)) == ["tok.weight → embed.weight + head.weight", "logit → scale"]


def test_a_rule_tells_its_keys_its_lowest_confidence_and_an_example() -> None:
    mapping = mapping_of({"b.weight": "a.weight", "b.bias": "a.bias"})
    low, high = mapping.matches[1], mapping.matches[0]
    mapping = mapping.with_matches([high, Match(low.target, low.sources, confidence=0.7)])
    (rule,) = mapping.rules
    assert (rule.n_keys, rule.targets, rule.confidence) == (2, ("b.weight", "b.bias"), 0.7)
    assert rule.example == (("a.weight",), ("b.weight",))
    assert {match.confidence for match in apply_rules([rule], ["a.weight"])} == {0.7}


def test_keys_that_look_like_patterns_are_text() -> None:
    feeds: Feeds = {"x.{i}.*": "a.{i}.*", "x.{j}.*": "b.#.\\", "x.00": "c.007", "x.": ".", "y": "9" * 40 + "*", "z..": "z..q"}
    exact_rules(mapping_of(feeds))
    assert lines(mapping_of({"y*": "{n}"})) == [r"\{n\} → y\*"]


def test_a_rule_with_several_sources_waits_for_all_of_them() -> None:
    (rule,) = infer_rules(mapping_of({f"qk.{leaf}": ((f"q.{leaf}", f"k.{leaf}"), Concat(0)) for leaf in LEAVES}))
    assert [match.target for match in apply_rules([rule], ["q.weight", "q.bias", "k.bias"])] == ["qk.bias"]


words = st.sampled_from(["layers", "attn", "0", "1", "2", "11", "w1", "w2", "block_01", "weight", "bias", "norm"])
keys = st.lists(words, min_size=1, max_size=5).map(".".join)
transforms = st.sampled_from([Copy(), Copy(), Copy(), Permute((1, 0)), Reshape((16,)), Slice(0, 0, 2), PermuteElements(0, (2, 2), (1, 0))])


@given(st.data())
def test_any_mapping_is_reproduced(data: st.DataObject) -> None:
    targets = data.draw(st.lists(keys, unique=True, max_size=24))
    sources = data.draw(st.lists(keys, unique=True, min_size=3, max_size=24))
    feeds: Feeds = {}
    for target in targets:
        if data.draw(st.integers(0, 5)):
            feeds[target] = (data.draw(st.sampled_from(sources)), data.draw(transforms))
        else:
            feeds[target] = (tuple(data.draw(st.lists(st.sampled_from(sources), min_size=2, max_size=3))), Concat(0))
    exact_rules(mapping_of(feeds, unused=tuple(sources)))


@given(st.lists(keys, unique=True, min_size=1, max_size=20), st.sampled_from(["module.", "model.net.", "x.0."]))
def test_an_injected_prefix_is_one_rule(names: list[str], prefix: str) -> None:
    assert len(exact_rules(mapping_of({name: prefix + name for name in names}))) == 1


@given(st.lists(keys, unique=True, min_size=1, max_size=16), st.randoms(use_true_random=False))
def test_rules_lead_back(names: list[str], chance: object) -> None:
    others = list(names)
    chance.shuffle(others)  # type: ignore[attr-defined]
    mapping = mapping_of({target: (source, chance.choice([Copy(), Permute((1, 0))])) for target, source in zip(names, others, strict=True)})  # type: ignore[attr-defined]
    assert mapping.source.spec is not None
    back = invert_rules(infer_rules(mapping), {tensor.key: tensor.shape for tensor in mapping.source.spec})
    made = apply_rules(back, names)
    assert {match.target: match.sources[0] for match in made} == {source: target for target, source in zip(names, others, strict=True)}


def test_joined_and_cut_tensors_lead_back() -> None:
    fused: Feeds = {f"{i}.qkv": ((f"{i}.q", f"{i}.k", f"{i}.v"), Concat(0)) for i in range(3)}
    shapes = {f"{i}.{name}": (4, 4) for i in range(3) for name in "qkv"}
    back = invert_rules(infer_rules(mapping_of(fused)), shapes)
    assert [str(rule) for rule in back] == [
        "{i}.qkv → {i}.q [slice dim 0, start 0, length 4] + {i}.k [slice dim 0, start 4, length 4] + {i}.v [slice dim 0, start 8, length 4]"
    ]
    there = invert_rules(back, {f"{i}.qkv": (12, 4) for i in range(3)})
    assert what(apply_rules(there, shapes)) == what(mapping_of(fused).matches)


def test_what_loses_values_does_not_lead_back() -> None:
    lost = infer_rules(mapping_of({"b": ("a", Slice(0, 0, 2))}))
    with pytest.raises(MappingError, match=r"'a' of shape \(4, 4\) cannot be put together from b"):
        invert_rules(lost, {"a": (4, 4)})
    adapted = infer_rules(mapping_of({"b": ("a", Adapt("crop", (2, 2)))}))
    with pytest.raises(MappingError, match="the rule for 'b' has no inverse"):
        invert_rules(adapted, {"a": (4, 4)})


def test_chaotic_names_at_scale_are_still_exact() -> None:
    feeds: Feeds = {f"m.{i * 7919 % 5000}.x{i}y.w": f"s.{i}.z{i * 31 % 5000}.w" for i in range(5000)}
    exact_rules(mapping_of(feeds))
    exact_rules(mapping_of({f"m.{chr(97 + i % 26)}{i}q{i * 31 % 977}.w": f"s.a{i}b.w" for i in range(5000)}))


def experts(layers: int, each: int) -> Feeds:
    names = {"w1": "gate", "w2": "down"}
    return {
        f"model.layers.{i}.mlp.experts.{e}.{new}.weight": f"layers.{i}.ffn.{e}.{old}.weight"
        for i in range(layers)
        for e in range(each)
        for old, new in names.items()
    }


GENERAL = [
    "layers.{i}.ffn.{j}.w1.weight → model.layers.{i}.mlp.experts.{j}.gate.weight",
    "layers.{i}.ffn.{j}.w2.weight → model.layers.{i}.mlp.experts.{j}.down.weight",
]


@pytest.mark.parametrize(("layers", "each"), [(5, 6), (40, 64)])
def test_a_wrong_pair_among_many_stands_alone_and_first(layers: int, each: int) -> None:
    feeds = experts(layers, each)
    assert lines(mapping_of(feeds)) == GENERAL
    one, other = "model.layers.1.mlp.experts.2.gate.weight", "model.layers.3.mlp.experts.4.gate.weight"
    feeds[one], feeds[other] = feeds[other], feeds[one]
    assert lines(mapping_of(feeds)) == [
        "layers.3.ffn.4.w1.weight → model.layers.1.mlp.experts.2.gate.weight",
        "layers.1.ffn.2.w1.weight → model.layers.3.mlp.experts.4.gate.weight",
        *reversed(GENERAL),
    ]


def test_rules_of_very_many_keys_tell_all_that_they_explain() -> None:
    unsure = mapping_of(experts(40, 64))
    low = unsure["model.layers.7.mlp.experts.33.down.weight"]
    unsure = unsure.with_matches([*unsure.matches, Match(low.target, low.sources, confidence=0.7)])
    rules = {str(rule): rule for rule in exact_rules(unsure)}
    assert list(rules) == GENERAL
    assert [rule.n_keys for rule in rules.values()] == [2560, 2560]
    assert [rule.confidence for rule in rules.values()] == [1.0, 0.7]
    assert rules[GENERAL[1]].example == (("layers.0.ffn.0.w2.weight",), ("model.layers.0.mlp.experts.0.down.weight",))
