"""What a person expects of conversions: fused, split, transposed, stacked, and reparametrised tensors."""

from __future__ import annotations

import re
import warnings

import torch
from behaviour import Block, Experts, Transformer, expect, fused_model, renamed
from torch import nn

from automatch import propose_mapping
from automatch.transforms import Concat, Copy, Permute, Reshape, Slice, Stack, apply_transform

# ---- transforms -------------------------------------------------------------------------------------------------


def attention_pairs(depth: int, prefix: str = "") -> dict[str, list[str]]:
    return {
        f"blocks.{i}.attn.qkv.{leaf}": [f"{prefix}blocks.{i}.attn.{n}_proj.{leaf}" for n in "qkv"]
        for i in range(depth)
        for leaf in ("weight", "bias")
    }


def test_separate_q_k_v_are_fused():
    mapping = propose_mapping(fused_model(), renamed(Transformer().state_dict(), ("^", "model.")))
    expect(mapping, attention_pairs(3, "model."))
    assert all(mapping[key].transform == Concat(0) for key in attention_pairs(3))


def test_fused_q_k_v_is_split():
    mapping = propose_mapping(Transformer(), fused_model().state_dict())
    for fused, parts in attention_pairs(3).items():
        for i, part in enumerate(parts):
            expect(mapping, {part: fused})
            assert mapping[part].transform == Slice(0, 16 * i, 16)


def test_in_proj_of_multihead_attention_is_fused():
    model = Transformer(block=lambda dim: Block(dim, attention=nn.MultiheadAttention(dim, 4)))  # type: ignore[arg-type]
    mapping = propose_mapping(model, Transformer().state_dict())
    pairs = {
        f"blocks.{i}.attn.in_proj_{leaf}": [f"blocks.{i}.attn.{n}_proj.{leaf}" for n in "qkv"]
        for i in range(3)
        for leaf in ("weight", "bias")
    }
    expect(mapping, pairs)


class Pool(nn.Module):
    """Attention pooling over a latent query, its keys and values fused."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 1, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)


class Pooled(nn.Module):
    def __init__(self, trunk: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.trunk, self.pool = trunk, pool


def test_q_and_kv_become_the_in_proj_of_a_model_whose_trunk_is_split():
    checkpoint = Pooled(fused_model(), Pool(16)).state_dict()
    model = Pooled(Transformer(), nn.MultiheadAttention(16, 4))
    mapping = propose_mapping(model, checkpoint)
    expect(mapping, {f"pool.in_proj_{leaf}": [f"pool.{n}.{leaf}" for n in ("q", "kv")] for leaf in ("weight", "bias")})
    assert not any("pool.in_proj_weight" in question.keys for question in mapping.questions)
    fused = apply_transform(mapping["pool.in_proj_weight"].transform, [checkpoint[key] for key in mapping["pool.in_proj_weight"].sources])
    assert torch.equal(fused, torch.cat([checkpoint["pool.q.weight"], checkpoint["pool.kv.weight"]]))


def test_square_matrices_are_transposed_with_their_siblings():
    model = Transformer()
    own = model.state_dict()
    ckpt = {key: value.T.contiguous() if re.search(r"(attn|mlp).*weight", key) else value for key, value in own.items()}
    mapping = propose_mapping(model, renamed(ckpt, ("^", "transformer.")))
    expect(mapping, {key: f"transformer.{key}" for key in own if "blocks" in key})
    assert all(mapping[key].transform == Permute((1, 0)) for key in own if re.search(r"(attn|mlp).*weight", key))
    assert all(mapping[key].transform == Copy() for key in own if "norm" in key)


def test_pointwise_convolutions_become_linear():
    model = Transformer()
    own = model.state_dict()
    ckpt = {key: value[:, :, None, None] if re.search(r"mlp.*weight", key) else value for key, value in own.items()}
    mapping = propose_mapping(model, ckpt)
    expect(mapping, {key: key for key in own})
    assert mapping["blocks.0.mlp.fc1.weight"].transform == Reshape((64, 16))


def test_listed_experts_are_stacked_in_natural_order():
    ckpt = dict(sorted(Experts(12, stacked=False).state_dict().items()))
    mapping = propose_mapping(Experts(12, stacked=True), ckpt)
    expect(mapping, {name: [f"experts.{i}.{name}.weight" for i in range(12)] for name in ("up", "down")})
    assert mapping["up"].transform == Stack(0)


def test_weight_norm_of_both_generations():
    def generator(norm) -> nn.Module:
        return nn.Sequential(*(norm(nn.Conv1d(8, 8, 3)) for _ in range(4)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = generator(nn.utils.weight_norm)
    model = generator(nn.utils.parametrizations.weight_norm)
    pairs = {f"{i}.parametrizations.weight.original{n}": f"{i}.weight_{kind}" for i in range(4) for n, kind in enumerate("gv")}
    expect(propose_mapping(model, old.state_dict()), pairs)


def test_fused_tensor_holds_the_right_rows():
    old, new = Transformer(), fused_model()
    mapping = propose_mapping(new, old.state_dict())
    match = mapping["blocks.1.attn.qkv.weight"]
    found = apply_transform(match.transform, [old.state_dict()[key] for key in match.sources])
    assert torch.equal(found, torch.cat([old.state_dict()[f"blocks.1.attn.{n}_proj.weight"] for n in "qkv"]))
