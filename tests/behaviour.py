"""Small models made by hand, other keys for them, and what to expect of their mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from automatch import KeyMapping

CONFIDENT = 0.95
Pairs = Mapping[str, str | Sequence[str] | None]


def renamed(state_dict: Mapping[str, torch.Tensor], *rules: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The same tensors under other keys: each rule is a regular expression and what stands in its place."""
    result = {}
    for key, value in state_dict.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        result[key] = value
    return result


def pairs_of(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Which key of ``new`` holds which tensor of ``old``, by identity."""
    return {target: source for target in old for source in new if new[source] is old[target]}


def expect(mapping: KeyMapping, pairs: Pairs, *, sure: bool = True) -> None:
    """Every pair is found (and surely, unless told otherwise), and nothing that contradicts them is."""
    for target, sources in pairs.items():
        match = mapping.get(target)
        if sources is None:
            assert match is None or match.confidence < CONFIDENT, f"{target} <- {match.sources}"
            continue
        assert match is not None, f"nothing feeds {target}"
        assert list(match.sources) == ([sources] if isinstance(sources, str) else list(sources)), f"{target} <- {match.sources}"
        assert not sure or match.confidence >= CONFIDENT, f"{target} is right, but only {match.confidence:.2f} sure"


def sure(mapping: KeyMapping) -> dict[str, tuple[str, ...]]:
    """The confident part of a mapping."""
    return {match.target: match.sources for match in mapping.matches if match.confidence >= CONFIDENT}


class Attention(nn.Module):
    def __init__(self, dim: int, names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "out_proj")) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(dim, dim))


class FusedAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    def __init__(self, dim: int, names: Sequence[str] = ("fc1", "fc2")) -> None:
        super().__init__()
        self.add_module(names[0], nn.Linear(dim, 4 * dim))
        self.add_module(names[1], nn.Linear(4 * dim, dim))


class Gated(nn.Module):
    def __init__(self, dim: int, names: Sequence[str]) -> None:
        super().__init__()
        for name, (inputs, outputs) in zip(names, ((dim, 3 * dim), (dim, 3 * dim), (3 * dim, dim)), strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))


class Block(nn.Module):
    def __init__(self, dim: int, attention: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention or Attention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp or Mlp(dim)


class Transformer(nn.Module):
    def __init__(self, depth: int = 3, dim: int = 16, classes: int = 10, block: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, dim)
        self.blocks = nn.ModuleList((block or Block)(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)


class ConvNet(nn.Module):
    """Stages of conv-norm pairs; ``extra`` puts a dropout before the second pair of each stage."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64), extra: bool = False, classes: int = 10) -> None:
        super().__init__()
        before, stages = 3, []
        for width in widths:
            layers: list[nn.Module] = [nn.Conv2d(before, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Dropout()] if extra else []
            layers += [nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)]
            stages.append(nn.Sequential(*layers))
            before = width
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(before, classes)


def gated_model(names: Sequence[str]) -> Transformer:
    return Transformer(block=lambda dim: Block(dim, mlp=Gated(dim, names)))  # type: ignore[arg-type]


def shuffled_gates(model: nn.Module) -> dict[str, torch.Tensor]:
    """Sorted by key, so that not even the order says which of the two is the gate."""
    return dict(sorted(renamed(model.state_dict(), ("^", "model.")).items()))


def fused_model() -> Transformer:
    return Transformer(block=lambda dim: Block(dim, attention=FusedAttention(dim)))  # type: ignore[arg-type]


class Segmenter(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = ConvNet()
        self.decoder = decoder
        self.head = nn.Conv2d(16, 2, 1)


class TwoTowers(nn.Module):
    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, ConvNet())


class Tied(Transformer):
    def __init__(self) -> None:
        super().__init__(classes=50)
        self.head.weight = self.embed.weight


class Experts(nn.Module):
    def __init__(self, count: int, stacked: bool) -> None:
        super().__init__()
        if stacked:
            self.up, self.down = nn.Parameter(torch.ones(count, 24, 8)), nn.Parameter(torch.ones(count, 8, 24))
        else:
            self.experts = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 24, bias=False), "down": nn.Linear(24, 8, bias=False)}) for _ in range(count)
            )
