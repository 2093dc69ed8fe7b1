"""What the speed benchmark runs on: corpus cases, grown expert models, and keys without any structure."""

from __future__ import annotations

import random
from typing import Any

import corpus_cases

Case = dict[str, Any]
WIDTH = 64


def case_of(name: str) -> Case:
    """A case by name: ``corpus:ID``, ``experts:LAYERS:EXPERTS`` or ``random:KEYS``."""
    kind, _, rest = name.partition(":")
    if kind == "corpus":
        return next(case for case in corpus_cases.load_cases([rest]) if case["id"] == rest)
    if kind == "experts":
        layers, experts = map(int, rest.split(":"))
        return _experts(layers, experts)
    return _random(int(rest))


def _experts(layers: int, experts: int) -> Case:
    """A mixture-of-experts decoder under Meta's names (source) and transformers' (target); the experts all have one shape."""
    names = [
        ("attention_norm.weight", "input_layernorm.weight", [WIDTH]),
        ("attention.wq.weight", "self_attn.q_proj.weight", [WIDTH, WIDTH]),
        ("attention.wk.weight", "self_attn.k_proj.weight", [WIDTH // 4, WIDTH]),
        ("attention.wv.weight", "self_attn.v_proj.weight", [WIDTH // 4, WIDTH]),
        ("attention.wo.weight", "self_attn.o_proj.weight", [WIDTH, WIDTH]),
        ("ffn_norm.weight", "post_attention_layernorm.weight", [WIDTH]),
        ("feed_forward.gate.weight", "mlp.gate.weight", [experts, WIDTH]),
    ]
    for e in range(experts):
        names += [
            (f"feed_forward.experts.{e}.w1.weight", f"mlp.experts.{e}.gate_proj.weight", [24, WIDTH]),
            (f"feed_forward.experts.{e}.w2.weight", f"mlp.experts.{e}.down_proj.weight", [WIDTH, 24]),
            (f"feed_forward.experts.{e}.w3.weight", f"mlp.experts.{e}.up_proj.weight", [24, WIDTH]),
        ]
    rows = [("tok_embeddings.weight", "model.embed_tokens.weight", [1000, WIDTH])]
    rows += [(f"layers.{i}.{source}", f"model.layers.{i}.{target}", shape) for i in range(layers) for source, target, shape in names]
    rows += [("norm.weight", "model.norm.weight", [WIDTH]), ("output.weight", "lm_head.weight", [1000, WIDTH])]
    return _case(f"experts:{layers}:{experts}", rows)


def _random(keys: int) -> Case:
    """Keys of one shape whose names mean nothing and do not agree: nothing can be known."""
    rng = random.Random(keys)

    def words() -> list[str]:
        found: dict[str, None] = {}
        while len(found) < keys:
            found[".".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(rng.choice((2, 3, 4))))] = None
        return list(found)

    rows = [(source, target, [8, 8]) for source, target in zip(words(), words(), strict=True)]
    return _case(f"random:{keys}", rows) | {"truth": {}}


def _case(name: str, rows: list[tuple[str, str, list[int]]]) -> Case:
    return {
        "id": name,
        "family": "speed",
        "source": {"entries": [[source, shape, "float32", "tensor"] for source, _, shape in rows]},
        "target": {"entries": [[target, shape, "float32", "param"] for _, target, shape in rows], "modules": {}},
        "truth": {target: {"op": "copy", "sources": [source]} for source, target, _ in rows},
    }
