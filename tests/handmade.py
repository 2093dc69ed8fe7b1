"""Mappings written by hand, so that tests of loading do not depend on what the engine is sure of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from automatch.mapping import KeyMapping, Match, Question, Side
from automatch.matching import target_spec
from automatch.readers import open_checkpoint
from automatch.transforms import Transform

Feeds = Mapping[str, str | tuple[tuple[str, ...] | str, Transform]]


def mapping_of(model: Any, ckpt: Any, feeds: Feeds, *, questions: tuple[Question, ...] = (), **confidences: float) -> KeyMapping:
    """A mapping with the given pairs, each with confidence 1; ``confidence=`` lowers all of them."""
    target = target_spec(model)
    with open_checkpoint(ckpt, like=target) as checkpoint:
        source = checkpoint.spec
    matches = [match_of(key, feed, **confidences) for key, feed in feeds.items()]
    return KeyMapping(Side.of(source), Side.of(target), ()).with_matches(matches, questions=questions)


def match_of(target: str, feed: Any, confidence: float = 1.0) -> Match:
    """One match from a source key, or from (source keys, transform)."""
    if isinstance(feed, str):
        return Match(target, (feed,), confidence=confidence)
    sources, transform = feed
    return Match(target, (sources,) if isinstance(sources, str) else tuple(sources), transform, confidence=confidence)


def snapshot_of(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Every parameter and buffer of a model: the object, and a copy of its values."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {key: (id(tensor), tensor.detach().clone()) for key, tensor in tensors}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    """Every parameter and buffer is the same object and has the same bits as before."""
    after = snapshot_of(model)
    assert after.keys() == before.keys()
    for key, (identity, value) in before.items():
        assert after[key][0] == identity, key
        assert torch.equal(
            after[key][1].view(torch.uint8) if value.dim() else after[key][1], value.view(torch.uint8) if value.dim() else value
        ), key
