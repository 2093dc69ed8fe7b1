"""A small model in two versions: renamed, fused, transposed and reordered between them, with sizes that do not divide evenly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import spec_of_model
from automatch.transforms import Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack, Transform, apply_transform, chain

WIDTH, HEADS, VOCABULARY, LAYERS = 16, 4, 13, 2


class OldBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH + 3)
        self.down = nn.Linear(2 * WIDTH + 3, WIDTH)
        self.expert0, self.expert1 = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.out(torch.tanh(self.query(x)) * self.key(x) + self.value(x))
        return self.norm(x + mixed + self.down(nn.functional.gelu(self.up(x))) + self.expert0(x) - self.expert1(x))


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(OldBlock() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.stats = nn.BatchNorm1d(VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.stats(self.head(x).mean(1))


class Transposed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class NewBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc = Transposed(WIDTH, 2 * WIDTH + 3)
        self.fc_out = nn.Linear(2 * WIDTH + 3, WIDTH)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH))


class New(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stats = nn.BatchNorm1d(VOCABULARY)
        self.blocks = nn.ModuleList(NewBlock() for _ in range(LAYERS))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.stats(self.lm_head(x).mean(1))


def matches() -> list[Match]:
    """What feeds each key of `New` from `Old`; q, k and v are interleaved by head, as Megatron does."""
    pairs: list[tuple[str, tuple[str, ...], Transform]] = [("tokens.weight", ("embed.weight",), Copy())]
    pairs += [(f"lm_head.{leaf}", (f"head.{leaf}",), Copy()) for leaf in ("weight", "bias")]
    pairs += [
        (f"stats.{leaf}", (f"stats.{leaf}",), Copy()) for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    for i in range(LAYERS):
        old, new = f"layers.{i}", f"blocks.{i}"
        for leaf in ("weight", "bias"):
            pairs += [
                (f"{new}.qkv.{leaf}", tuple(f"{old}.{part}.{leaf}" for part in ("query", "key", "value")), interleaved()),
                (f"{new}.proj.{leaf}", (f"{old}.out.{leaf}",), Copy()),
                (f"{new}.ln.{leaf}", (f"{old}.norm.{leaf}",), Copy()),
                (f"{new}.fc_out.{leaf}", (f"{old}.down.{leaf}",), Copy()),
            ]
        pairs += [
            (f"{new}.fc.weight", (f"{old}.up.weight",), Permute((1, 0))),
            (f"{new}.fc.bias", (f"{old}.up.bias",), Copy()),
            (f"{new}.experts", (f"{old}.expert0.weight", f"{old}.expert1.weight"), Stack(0)),
        ]
    return [Match(target, sources, transform, confidence=1.0, decided=True) for target, sources, transform in pairs]


def interleaved() -> Transform:
    """From q, k and v to one tensor of (head, 3, rows of a head)."""
    return chain(Concat(0), PermuteElements(0, (3, HEADS, WIDTH // HEADS), (1, 0, 2)))


def mapping_of(old: nn.Module, new: nn.Module, found: list[Match] | None = None) -> KeyMapping:
    """The mapping as a person has reviewed it."""
    empty = KeyMapping(Side.of(spec_of_model(old)), Side.of(spec_of_model(new)), ())
    return empty.with_matches(found if found is not None else matches())


def old_model(seed: int = 0) -> Old:
    """`Old` with values that depend on the seed alone."""
    torch.manual_seed(seed)
    model = Old()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape) * 100 if tensor.is_floating_point() else torch.full(tensor.shape, 7))
    return model


def new_model(seed: int = 1) -> New:
    """`New` with other values."""
    torch.manual_seed(seed)
    return New()


def expected(old: nn.Module, found: list[Match] | None = None) -> dict[str, torch.Tensor]:
    """What one process computes from the whole tensors."""
    state = old.state_dict()
    return {m.target: apply_transform(m.transform, [state[s] for s in m.sources]).contiguous() for m in found or matches()}


def split_back() -> list[Match]:
    """What feeds each key of `Old` from `New`: q, k and v are cut out again."""
    back: list[Match] = []
    for match in matches():
        if len(match.sources) == 1:
            back.append(Match(match.sources[0], (match.target,), match.transform, confidence=1.0, decided=True))
        elif match.target.endswith("experts"):
            for i, source in enumerate(match.sources):
                back.append(Match(source, (match.target,), chain(Slice(0, i, 1), Reshape((WIDTH, WIDTH))), confidence=1.0, decided=True))
        else:
            undo = PermuteElements(0, (HEADS, 3, WIDTH // HEADS), (1, 0, 2))
            for i, source in enumerate(match.sources):
                back.append(Match(source, (match.target,), chain(undo, Slice(0, i * WIDTH, WIDTH)), confidence=1.0, decided=True))
    return back


class Tied(nn.Module):
    """Two keys of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def shard(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """FSDP2 on one dimension of the mesh, tensor parallel on the other if there is one."""
    if len(shape) == 2:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        for block in model.blocks if isinstance(model, New) else ():
            parallelize_module(block, mesh["tp"], {"qkv": ColwiseParallel(), "fc_out": RowwiseParallel()})
        dp = mesh["dp"]
    else:
        dp = init_device_mesh("cpu", shape)
    for block in model.blocks if isinstance(model, New) else model.layers:
        fully_shard(block, mesh=dp)
    return fully_shard(model, mesh=dp)


def full(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Whole tensors on every rank."""
    return {key: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for key, value in state.items()}


def check_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal keys and, bit for bit, equal values."""
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


def trained_old() -> tuple[Old, torch.optim.Optimizer]:
    """`Old` and its optimizer after two steps; the head has settings of its own."""
    model = old_model()
    optimizer = torch.optim.AdamW(
        [{"params": [*model.head.parameters()], "lr": 0.5}, {"params": [p for n, p in model.named_parameters() if "head" not in n]}]
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randint(0, 13, (4, 5))).pow(2).mean().backward()
        optimizer.step()
    return model, optimizer
