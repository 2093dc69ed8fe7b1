"""Words in which siblings differ, their numbers, statistics, and one order of all shapes: each decides what the others leave open."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from automatch import KeyMapping, StateSpec, TensorSpec, propose_mapping
from automatch.transforms import Slice

EXTRA = Path(__file__).parent.parent / "benchmarks" / "corpus_extra" / "cases"
Shapes = dict[str, tuple[int, ...]]


def spec(shapes: Mapping[str, tuple[int, ...]], origin: str = "model") -> StateSpec:
    kind: Any = "parameter" if origin == "model" else None
    return StateSpec(tuple(TensorSpec(key, shape, "float32", kind) for key, shape in shapes.items()), origin)


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def sources(mapping: KeyMapping) -> dict[str, tuple[str, ...]]:
    return {match.target: match.sources for match in mapping.matches}


def test_the_words_in_which_siblings_differ_outweigh_their_order() -> None:
    """The norms of a conformer are registered in other orders by its two libraries; every name has its own word on either side."""
    model = {
        key: shape
        for i in range(3)
        for name in ("conv_layer_norm", "ff_layer_norm", "ff_macaron_layer_norm", "final_layer_norm", "self_attn_layer_norm")
        for key, shape in norm(f"decoder.conformer_layers.{i}.{name}", 48).items()
    }
    ckpt = {
        key: shape
        for i in range(3)
        for name in ("norm_ff", "norm_mha", "norm_ff_macaron", "norm_conv", "norm_final")
        for key, shape in norm(f"tts.decoder.encoders.{i}.{name}", 48).items()
    }
    found = sources(propose_mapping(spec(model), spec(ckpt, "checkpoint")))
    meant = {"conv": "conv", "ff": "ff", "ff_macaron": "ff_macaron", "final": "final", "self_attn": "mha"}
    for key in model:
        _, _, i, name, leaf = key.split(".")
        assert found[key] == (f"tts.decoder.encoders.{i}.norm_{meant[name.removesuffix('_layer_norm')]}.{leaf}",)


@pytest.mark.parametrize(
    ("case", "target", "source"),
    [
        # The first member became a module of its own: the others move up by one.
        ("pyg-1.7-to-2.6-attentivefp", "atom_convs.0.bias", "atom_convs.1.bias"),
        # `conv1` is not `conv.1`, as long as `conv2` would have to go to `conv.0`.
        ("yhenon-retinanet-to-torchvision", "head.classification_head.conv.0.0.weight", "classificationModel.conv1.weight"),
        # A convolution that widens has the shape of one inside a residual block; the sequence of all shapes tells them apart.
        ("pytorchyolo-yolov3-to-yolov5-yaml", "model.3.conv.weight", "module_list.5.conv_5.weight"),
        ("pytorchyolo-yolov3-to-yolov5-yaml", "model.4.1.cv2.conv.weight", "module_list.10.conv_10.weight"),
        # Haiku averages statistics under names of their own, beside a biased average and a counter that nobody else has.
        (
            "haiku-resnet50-to-torchvision",
            "layer4.2.bn1.running_mean",
            "state/res_net50/~/block_group_3/~/block_2/~/batchnorm_0/~/mean_ema/average",
        ),
        (
            "haiku-resnet50-to-torchvision",
            "layer4.2.bn3.running_var",
            "state/res_net50/~/block_group_3/~/block_2/~/batchnorm_2/~/var_ema/average",
        ),
    ],
)
def test_what_numbers_statistics_and_the_sequence_of_shapes_say(case: str, target: str, source: str) -> None:
    data = json.loads(gzip.decompress((EXTRA / f"{case}.json.gz").read_bytes()))
    model, ckpt = ({key: tuple(shape) for key, shape, *_ in data[side]["entries"]} for side in ("target", "source"))
    assert sources(propose_mapping(spec(model), spec(ckpt, "checkpoint")))[target] == (source,)


def test_an_output_layer_is_not_tied_where_the_checkpoint_has_one_of_its_own() -> None:
    body = {f"{i}.self_attn.q_proj.weight": (16, 16) for i in range(3)}
    model = {"embed_tokens.weight": (99, 16), **{f"layers.{k}": s for k, s in body.items()}, "lm_head.weight": (99, 16)}
    ckpt: Shapes = {"token_embedding/embeddings": (99, 16), "token_embedding/reverse_embeddings": (16, 99)}
    ckpt |= {f"transformer_layer_{i}/self_attention/query/kernel": (16, 16) for i in range(3)}
    found = sources(propose_mapping(spec(model), spec(ckpt, "checkpoint")))
    assert found["embed_tokens.weight"] == ("token_embedding/embeddings",)
    assert found.get("lm_head.weight", ("token_embedding/reverse_embeddings",)) == ("token_embedding/reverse_embeddings",)


def test_a_fused_bias_without_keys_is_split_into_equal_parts() -> None:
    """Swin's second version has no key bias; two of three equal parts are found; lengths of grouped queries are there by accident."""
    model: Shapes = {}
    ckpt: Shapes = {}
    for stage, width in enumerate((48, 96, 192)):
        for block in range(2):
            own, old = f"layers.{stage}.blocks.{block}", f"features.{2 * stage + 1}.{block}"
            model |= {f"{own}.attn.q_bias": (width,), f"{own}.attn.v_bias": (width,), f"{own}.attn.qkv.weight": (3 * width, width)}
            ckpt |= {f"{old}.attn.qkv.weight": (3 * width, width), f"{old}.attn.qkv.bias": (3 * width,)}
            for name, shape in {"attn.proj.weight": (width, width), "attn.proj.bias": (width,), "mlp.0.bias": (4 * width,)}.items():
                model[f"{own}.{name}"] = ckpt[f"{old}.{name}"] = shape
    mapping = propose_mapping(spec(model), spec(ckpt, "checkpoint"))
    for stage, width in enumerate((48, 96, 192)):
        for name, start in (("q_bias", 0), ("v_bias", 2 * width)):
            match = mapping[f"layers.{stage}.blocks.1.attn.{name}"]
            assert match.sources == (f"features.{2 * stage + 1}.1.attn.qkv.bias",)
            assert match.transform == Slice(0, start, width)
