"""What pairs that the engine had never seen taught it, each on the pair that showed it: every one of these failed before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import corpus_cases
import pytest

from automatch import KeyMapping, propose_mapping
from automatch.mapping import CONFIDENT

EXTRA = Path(__file__).parents[2] / "benchmarks" / "corpus_extra" / "cases"


def case_of(name: str) -> dict[str, Any]:
    return corpus_cases.load_case(EXTRA / f"{name}.json.gz")


def proposed(name: str, order: str = "file") -> KeyMapping:
    case = case_of(name)
    return propose_mapping(corpus_cases.skeleton(case), corpus_cases.state_dict(case, order))


@pytest.mark.parametrize(
    ("name", "order", "target", "source"),
    [
        # Two fused tensors in one module: the parts of each keep what its name says beyond being fused.
        ("genmo-mochi1-to-diffusers", "file", "transformer_blocks.2.attn1.to_q.weight", "blocks.2.attn.qkv_x.weight"),
        ("tencent-hunyuanvideo-to-diffusers", "file", "transformer_blocks.2.attn.add_k_proj.weight", "double_blocks.2.txt_attn_qkv.weight"),
        # Queries, keys, values and the first matrix of the mlp in one tensor.
        (
            "lodestones-chroma-to-diffusers",
            "file",
            "single_transformer_blocks.0.proj_mlp.weight",
            "model.diffusion_model.single_blocks.0.linear1.weight",
        ),
        # A bias is cut as its matrix is, however many vectors of other lengths the model has.
        (
            "omlab-omdet-turbo-tiny-to-hf",
            "file",
            "vision_backbone.vision_backbone.encoder.layers.1.blocks.0.attention.self.query.bias",
            "backbone.layers.1.blocks.0.attn.qkv.bias",
        ),
        # Of two fused tensors of one shape, that stays whole whose like is whole.
        (
            "facebook-mask2former-swin-tiny-coco-to-hf",
            "file",
            "model.transformer_module.decoder.layers.0.cross_attn.in_proj_bias",
            "sem_seg_head.predictor.transformer_cross_attention_layers.0.multihead_attn.in_proj_bias",
        ),
        # diffusers' attn1 and attn2 are two things, not a list of one.
        ("pixart-alpha-xl2-ms-to-diffusers", "sorted", "transformer_blocks.3.attn1.to_q.weight", "blocks.3.attn.qkv.weight"),
        # A decoder whose first layer alone holds a bias has no class of its length, beside an encoder that has.
        (
            "google-pix2struct-base-t5x-to-hf",
            "file",
            "decoder.layer.2.self_attention.attention.query.weight",
            "target/decoder/layers_2/self_attention/query/kernel",
        ),
        # A list that leaves out its last member runs forwards beside one that leaves out its first.
        ("taoruijie-ecapa-tdnn-to-speechbrain", "file", "blocks.1.tdnn1.conv.conv.weight", "layer1.conv1.weight"),
        # Keras counts blocks with letters.
        (
            "kakaobrain-align-base-tf-to-hf",
            "sorted",
            "vision_model.encoder.blocks.6.projection.project_conv.weight",
            "block4b_project_conv/kernel:0",
        ),
        # The norm that is registered behind the cross attention is the cross attention's, whatever its number.
        (
            "fundamentalvision-deformable-detr-to-hf",
            "file",
            "model.decoder.layers.0.encoder_attn_layer_norm.weight",
            "transformer.decoder.layers.0.norm1.weight",
        ),
        # Siblings that are called the same on both sides are not exchanged, although the file holds them in another order.
        ("perceiver-io-0.2.1-to-0.6.0-encoder", "file", "self_attn_1.0.0.module.norm.weight", "self_attn_1.0.module.0.module.norm.weight"),
        # Numbered norms take named ones in order of registration where nothing shows what each of them belongs to; of four, two come after.
        (
            "idea-dab-detr-r50-to-hf",
            "file",
            "model.decoder.layers.0.mlp.final_layer_norm.weight",
            "transformer.decoder.layers.0.norm3.weight",
        ),
        (
            "hf-gemma4-vision-to-timm-gemma4-vit",
            "sorted",
            "blocks.0.norm2.weight",
            "model.vision_tower.encoder.layers.0.post_attention_layernorm.weight",
        ),
        # All shapes stand in one order on both sides: the unit after a list of five is the last of six.
        (
            "facenet-pytorch-inceptionresnetv1-to-pytorchcv",
            "file",
            "features.stage3.unit7.branches.branch1.conv.conv.weight",
            "block8.branch0.conv.weight",
        ),
        # Three equal projections in a list of an attention are queries, keys and values.
        ("magicleap-superglue-to-hf", "sorted", "gnn.layers.0.attention.self.value.weight", "gnn.layers.0.attn.proj.2.weight"),
        # The shapes of w1, w2 and w3 say which of them is the way down.
        ("baai-eva02-clip-b16-to-timm", "sorted", "blocks.0.mlp.fc2.weight", "visual.blocks.0.mlp.w3.weight"),
        # A backbone of seven shapes of matrices does not agree by accident.
        ("tv-vgg16-to-lpips-vgg", "sorted", "net.slice5.28.weight", "features.28.weight"),
        # Keys and values fused, out of queries, keys and values fused; linear1 has their shape, and a decoder is no vocabulary.
        (
            "lightning-minimal-detr-mha-to-own-projections",
            "file",
            "encoder.0.attn.kv_proj.weight",
            "model.transformer.encoder.layers.0.self_attn.in_proj_weight",
        ),
        # A part of a composed model is all there: what stands beside it in other parts does not count.
        ("audiocraft-musicgen-melody-to-hf", "file", "decoder.model.decoder.layers.0.fc1.weight", "transformer.layers.0.linear1.weight"),
    ],
)
def test_the_source_of_a_key(name: str, order: str, target: str, source: str) -> None:
    assert case_of(name)["truth"][target]["sources"] == [source]
    assert proposed(name, order)[target].sources == (source,)


def test_numbered_norms_beside_two_attentions_are_asked_about_where_order_is_lost() -> None:
    mapping = proposed("fundamentalvision-deformable-detr-to-hf", "sorted")
    key = "model.decoder.layers.0.encoder_attn_layer_norm.weight"
    assert mapping[key].confidence < CONFIDENT
    (question,) = [question for question in mapping.questions if key in question.keys]
    answered, truth = mapping.answer(question.id, 1), case_of("fundamentalvision-deformable-detr-to-hf")["truth"]
    assert all(list(answered[key].sources) == truth[key]["sources"] for key in question.keys)


def test_numbered_norms_that_went_to_modules_of_their_own_are_one_question() -> None:
    name = "lightning-torch-encoder-to-user-rewrite"
    mapping, truth = proposed(name), case_of(name)["truth"]
    (question,) = mapping.questions
    assert {key.partition(".")[0] for key in question.keys} == {"pre", "ffn"}
    answered = mapping.answer(question.id, 1)
    assert all(list(answered[key].sources) == truth[key]["sources"] for key in question.keys)


def test_one_decision_is_one_question() -> None:
    """Which of FLAVA's two heads for masked images is which decides every key of both."""
    mapping = proposed("facebook-flava-full-to-hf")
    heads = [question for question in mapping.questions if any(key.startswith("mim_head") for key in question.keys)]
    assert len(heads) == 1
    assert {key.partition(".")[0] for key in heads[0].keys} == {"mim_head", "mmm_image_head"}
    assert heads[0].text.startswith("Do 'cmd' and 'imagenet' go to 'mim_head' and 'mmm_image_head' (for instance ")


def test_the_rows_of_another_head_are_no_padding() -> None:
    assert "answer_head.logit_fc.3.weight" not in proposed("fabric-lxmert-pretrain-to-hf-vqa")


def test_a_norm_of_one_name_in_two_architectures_says_nothing() -> None:
    other = next(case for case in corpus_cases.load_cases(["timm-mixer_b16_224-to-mmpretrain-mlp_mixer"]))
    mapping = propose_mapping(corpus_cases.skeleton(other), corpus_cases.state_dict(case_of("microsoft-focalnet-tiny-to-hf"), "sorted"))
    assert all(match.confidence < CONFIDENT for match in mapping.matches)


@pytest.mark.parametrize("name", ["neg-lstm-lm-to-speaker-encoder", "neg-timm-esevovnet39-to-cspdarknet53"])
def test_one_layer_of_a_library_in_both_says_nothing(name: str) -> None:
    assert all(match.confidence < CONFIDENT for match in proposed(name).matches)
