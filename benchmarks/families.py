"""Which families share conventions and are therefore left out together.

Two families are one group when code of one was written from code of the other, so that having seen the
one tells the names of the other: a lineage (llama → mistral → mixtral → deepseek), one converter for both
(fairseq's roberta and bart), or one backbone inside the other (upernet holds a swin). A library's house
style (`attention.self.query` in every transformers encoder) crosses groups on purpose: that is
knowledge that a new family profits from as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

GROUPS: dict[str, tuple[tuple[str, ...], str]] = {
    "llama": (
        ("llama", "mistral", "mixtral", "deepseek", "gemma", "gemma2", "gemma3"),
        "decoders descended from Meta's llama code: wq/wk/wv/wo, w1/w2/w3, gate/up/down, rotary q/k; one converter per library for all",
    ),
    "gpt": (
        ("gpt2", "gpt_neox"),
        "decoders descended from OpenAI's code: h, ln_1, c_attn, c_fc; fused qkv",
    ),
    "bert": (
        ("bert", "bert-gamma-beta", "albert", "electra", "distilbert", "roberta", "nystromformer", "bart"),
        "encoders descended from google-research/bert, and fairseq's rewriting of them, of which bart is a part",
    ),
    "t5": (("t5",), "mesh, t5x and transformers share names with each other and with nothing else"),
    "vit": (
        ("vit", "deit", "videomae", "pe", "clip", "clip_vit", "blip", "sam", "dpt"),
        "plain vision transformers and what is built around one; clip's towers share one block, which timm loads as a vit",
    ),
    "swin": (("swin", "swinv2", "upernet"), "hierarchical, windowed; upernet holds a swin"),
    "convnext": (("convnext", "convnextv2"), "v2 is v1 with another norm"),
    "metaformer": (
        ("metaformer", "poolformer", "mlp"),
        "patch embedding, token mixer and mlp per block",
    ),
    "resnet": (("resnet", "resnetv2", "seresnext"), "layer1..4 of bottlenecks with conv1/bn1/downsample"),
    "segmentation": (
        ("smp", "unet", "fpn", "linknet", "unetplusplus", "torchvision-seg"),
        "segmentation_models_pytorch's encoder/decoder/segmentation_head, and torchvision's backbone/classifier",
    ),
    "detection": (("maskrcnn", "keypointrcnn", "torchvision-det"), "torchvision's backbone/fpn/rpn/roi_heads"),
    "mobile": (("mobilenet", "mnasnet"), "inverted residuals in numbered Sequentials"),
    "regnet": (("regnet",), "s/b/f stages; pycls names"),
    "densenet": (("densenet",), "denseblock/denselayer/transition"),
    "dpn": (("dpn",), "conv1_1 … conv5_3 with c1x1_w"),
    "vgg": (("vgg", "squeezenet"), "one long `features` Sequential"),
    "xception": (("xception",), "block1 … block12 of separable convolutions"),
    "diffusion": (
        ("sd-unet", "sd-vae", "autoencoderkl", "unet2d", "monai"),
        "down/mid/up blocks of resnets and attentions: CompVis, diffusers, and MONAI's port of diffusers",
    ),
    "hifigan": (("hifigan",), "upsamples and residual blocks under weight_norm"),
    "cyclegan": (("cyclegan",), "one numbered Sequential with a dropout more or less"),
    "negative": (("negative",), "pairs of different architectures"),
}
_GROUP_OF = {family: group for group, (families, _) in GROUPS.items() for family in families}


def group_of(family: str) -> str:
    """The group that ``family`` is left out with; a family that is not listed stands alone."""
    return _GROUP_OF.get(family, family)


def by_group(cases: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The cases of each group, in order of appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(group_of(case["family"]), []).append(case)
    return groups
