"""One old state_dict and mappings of it that need every form of rule, with the right answer computed by `apply`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from automatch.mapping import KeyMapping, Match, Side
from automatch.specs import StateSpec, TensorSpec, spec_of_state_dict
from automatch.transforms import Chain, Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack, apply_transform

Feeds = dict[str, Any]
State = dict[str, torch.Tensor]


def mapping_of(state: State, feeds: Feeds) -> KeyMapping:
    """A mapping of ``state`` with the given feeds: a source key, or (source keys, transform)."""
    matches = [_match(target, feed) for target, feed in feeds.items()]
    made = {m.target: apply_transform(m.transform, [state[key] for key in m.sources]) for m in matches}
    target = StateSpec(tuple(TensorSpec(key, tuple(tensor.shape)) for key, tensor in made.items()), "NewModel")
    return KeyMapping(Side.of(spec_of_state_dict(state, origin="old.ckpt")), Side.of(target), ()).with_matches(matches)


def _match(target: str, feed: Any) -> Match:
    sources, transform = (feed, Copy()) if isinstance(feed, str) else feed
    return Match(target, (sources,) if isinstance(sources, str) else tuple(sources), transform, confidence=1.0)


def answer(mapping: KeyMapping, state: State) -> State:
    """What the model's state_dict must be."""
    return {m.target: apply_transform(m.transform, [state[key] for key in m.sources]).contiguous() for m in mapping.matches}


def state_of(shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Distinct values under each key."""
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def renamed() -> tuple[State, Feeds]:
    """Wrapper, templates, shifted and irregular numbers, an exception, a swap, and keys in the way."""
    feeds: Feeds = {}
    for i in range(3):
        feeds[f"model.layers.{i}.self_attn.q_proj.weight"] = f"net.layers.{i}.attention.wq.weight"
        for leaf in ("weight", "bias"):
            feeds[f"model.layers.{i}.mlp.{leaf}"] = f"net.layers.{i}.mlp.{leaf}"
            feeds[f"stages.{i + 1}.down.{leaf}"] = f"stages.{i}.down.{leaf}"
            feeds[f"blocks.{i}.{leaf}"] = f"features.{3 * i + i % 2}.{leaf}"
        for j in range(2):
            feeds[f"model.layers.{i}.experts.{j}.up.weight"] = f"net.layers.{i}.moe.{j}.w{3 - 2 * j}.weight"
    feeds |= {"left.weight": "right.weight", "right.weight": "left.weight", "head.fc.weight": "net.head.weight"}
    state = state_of(dict.fromkeys(feeds.values(), (2, 2)) | {"net.layers.0.inv_freq": (2,), "net.layers.1.inv_freq": (2,)})
    state |= state_of({"stages.0.down.scale": (5,), 'odd "name"\n{i}.weight': (1,)})
    return state, feeds


def converted() -> tuple[State, Feeds]:
    """Every transform: joined, cut, stacked, unstacked, transposed, reshaped, reordered, tied, and one after another."""
    shapes: dict[str, tuple[int, ...]] = {"tok.weight": (6, 4)}
    feeds: Feeds = {"embed.weight": "tok.weight", "lm_head.weight": "tok.weight"}
    for i in range(2):
        old, new = f"layers.{i}", f"model.layers.{i}"
        for leaf, shape in (("weight", (4, 4)), ("bias", (4,))):
            shapes |= {f"{old}.{name}.{leaf}": shape for name in ("q", "k", "v")}
            feeds[f"{new}.attn.qkv.{leaf}"] = ([f"{old}.{name}.{leaf}" for name in ("q", "k", "v")], Concat(0))
        shapes |= {f"{old}.kv.weight": (8, 4), f"{old}.c_fc.weight": (3, 5), f"{old}.gamma": (4, 1, 1), f"{old}.rope.weight": (8, 4)}
        feeds |= {f"{new}.cross.{name}.weight": (f"{old}.kv.weight", Slice(0, 4 * place, 4)) for place, name in enumerate("kv")}
        feeds[f"{new}.fc.weight"] = (f"{old}.c_fc.weight", Permute((1, 0)))
        feeds[f"{new}.scale"] = (f"{old}.gamma", Reshape((4,)))
        feeds[f"{new}.rope.weight"] = (f"{old}.rope.weight", PermuteElements(0, (2, 2, 2), (0, 2, 1)))
        shapes |= {f"{old}.experts.{e}.{name}.weight": (3, 4) for e in range(4) for name in ("gate", "up", "down")}
        feeds[f"{new}.mlp.experts.down"] = ([f"{old}.experts.{e}.down.weight" for e in range(4)], Stack(0))
        both = [f"{old}.experts.{e}.{name}.weight" for e in range(4) for name in ("gate", "up")]
        feeds[f"{new}.mlp.experts.gate_up"] = (both, Chain((Stack(0), Reshape((4, 6, 4)))))
        shapes[f"{old}.w2"] = (6, 4)
        feeds |= {f"{new}.moe.{e}.w2.weight": (f"{old}.w2", Chain((Slice(0, 2 * e, 2), Permute((1, 0))))) for e in range(3)}
        shapes[f"{old}.uneven"] = (7 + i, 2)
        feeds |= {f"{new}.a": (f"{old}.uneven", Slice(0, 0, 2)), f"{new}.b": (f"{old}.uneven", Slice(0, 2, 5 + i))}
        shapes |= {f"blocks.{i}.norm.alpha": (4,), f"pool.{i}.scales.1": (3, 2)}
        feeds |= {
            f"blocks.{i}.norm.alpha": (f"blocks.{i}.norm.alpha", Reshape((1, 4))),
            f"lists.{i}": (f"pool.{i}.scales.1", Permute((1, 0))),
        }
    shapes |= {"norm.alpha": (4,), "temperature": (4,)}
    feeds |= {key: (key, Reshape((1, 4))) for key in ("norm.alpha", "temperature")}
    return state_of(shapes), feeds


class AnyModel(nn.Module):
    """A module whose state_dict has the given shapes, all zeros."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        register(self, shapes)


def register(root: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put parameters of these shapes below ``root``."""
    for key, shape in shapes.items():
        *path, leaf = key.split(".")
        owner = root
        for name in path:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner._modules[name]  # type: ignore[assignment]
        owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
