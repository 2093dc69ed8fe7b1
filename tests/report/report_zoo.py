"""Small mappings that show every part of a report; confidences and questions are written by hand."""

from __future__ import annotations

from automatch.mapping import Alternative, Evidence, KeyMapping, Match, Option, Question, Side, Verdict
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import Adapt, Concat, Copy, Permute

HOSTILE = (
    "</script><script>alert(1)</script>.weight",
    "\"'><img src=x onerror=alert(1)>.weight",
    "<!--.weight",
    "]]>&amp;{{7*7}}{% raw %}.weight",
    "esc\x1b[31mred\x07\x00\r\n\t.weight",
    "bidi\u202egnp.exe\u2066.weight",
    "zero\u200bwidth\u2028line.weight",
    "back`tick``s|pipe.weight",
    "[bold red]markup[/].weight",
    "lone\ud800surrogate.weight",
    "\\x1b not an escape.weight",
    " ",
    "",
    "__proto__",
    "constructor.prototype",
    "x" * 10_000 + ".weight",
)


def transformer(layers: int = 4) -> KeyMapping:
    """A transformer whose q, k and v are fused, with a doubtful pair, a question, and leftovers of every kind."""
    source, target, matches = [], [], []
    for i in range(layers):
        s, t = f"bert.encoder.layer.{i}", f"model.blocks.{i}"
        for part in ("weight", "bias"):
            wide = (8, 8) if part == "weight" else (8,)
            qkv = tuple(f"{s}.attention.self.{name}.{part}" for name in ("query", "key", "value"))
            source += [TensorSpec(key, wide) for key in qkv]
            target.append(TensorSpec(f"{t}.attn.qkv.{part}", (24, *wide[1:]), kind="parameter", owner="Linear"))
            matches.append(Match(target[-1].key, qkv, Concat(0), 0.8, 0.97, Evidence(0.6, 1.0, 1.0, 0.9, 0.95)))
        source += [TensorSpec(f"{s}.dense.weight", (16, 8)), TensorSpec(f"{s}.norm_a.weight", (8,)), TensorSpec(f"{s}.norm_b.weight", (8,))]
        target += [TensorSpec(f"{t}.fc.weight", (8, 16), kind="parameter"), TensorSpec(f"{t}.norm1.weight", (8,), kind="parameter")]
        target += [
            TensorSpec(f"{t}.norm2.weight", (8,), kind="parameter"),
            TensorSpec(f"{t}.bn.num_batches_tracked", (), "int64", "buffer"),
        ]
        matches.append(Match(f"{t}.fc.weight", (f"{s}.dense.weight",), Permute((1, 0)), 0.7, 0.991, Evidence(0.5, 1.0, 1.0, 0.9, 0.9)))
        for n, m in ((1, "a"), (2, "b")):
            other = Alternative((f"{s}.norm_{'b' if m == 'a' else 'a'}.weight",), Copy(), 0.38)
            evidence = Evidence(0.4, 1.0, 1.0, 0.8, None)
            matches.append(Match(f"{t}.norm{n}.weight", (f"{s}.norm_{m}.weight",), Copy(), 0.5, 0.61, evidence, (other,)))
    source += [TensorSpec("bert.embeddings.weight", (30, 8)), TensorSpec("bert.embeddings.position_ids", (1, 16), "int64")]
    source += [TensorSpec("cls.head.weight", (10, 8)), TensorSpec("loss_fn.class_weight", (10,))]
    source += [TensorSpec("pooler.dense.weight", (8, 8)), TensorSpec("pooler.dense.bias", (8,))]
    target += [TensorSpec("model.embed.weight", (30, 8), kind="parameter"), TensorSpec("head.weight", (5, 8), kind="parameter")]
    target += [TensorSpec("lm_head.weight", (30, 8), kind="parameter", alias_of="model.embed.weight")]
    target += [TensorSpec("adapter.down.weight", (4, 8), kind="parameter"), TensorSpec("adapter.up.weight", (8, 4), kind="parameter")]
    matches.append(Match("model.embed.weight", ("bert.embeddings.weight",), Copy(), 0.9, 0.998, Evidence(0.8, 1.0, 1.0, 1.0, 1.0)))
    matches.append(Match("head.weight", ("cls.head.weight",), Adapt("resize_head", (5, 8)), 0.6, 0.9, Evidence(0.7, 0.0, 0.5, 1.0, 0.6)))
    norms = tuple(f"model.blocks.{i}.norm{n}.weight" for i in range(layers) for n in (1, 2))
    question = Question("q1", f"Which norm comes first in each block? ({len(norms)} keys)", _norm_options(layers), norms)
    mapping = KeyMapping(
        Side.of(StateSpec(tuple(source), "bert.ckpt", ("state_dict",))),
        Side.of(StateSpec(tuple(target), "Encoder")),
        (),
        questions=(question,),
        warnings=("EMA weights stand beside the raw ones; the raw ones were taken",),
        verdict=Verdict("renamed", "Same architecture, other names; the head has another size.", ("prefix 'bert.'", "q, k, v fused")),
    )
    return mapping.with_matches(matches)


def _norm_options(layers: int) -> tuple[Option, Option]:
    def option(label: str, first: str, second: str, confidence: float) -> Option:
        pairs = [(1, first), (2, second)]
        matches = [
            Match(f"model.blocks.{i}.norm{n}.weight", (f"bert.encoder.layer.{i}.norm_{m}.weight",)) for i in range(layers) for n, m in pairs
        ]
        return Option(label, tuple(matches), confidence)

    return option("norm_a is norm1", "a", "b", 0.61), option("norm_b is norm1", "b", "a", 0.38)


def hostile() -> KeyMapping:
    """Keys that try to break out of whatever they are written into, on both sides and in every text."""
    source = StateSpec(tuple(TensorSpec("s" + key, (2,)) for key in HOSTILE), HOSTILE[0])
    target = StateSpec(tuple(TensorSpec(key, (2,), owner=HOSTILE[1]) for key in HOSTILE), HOSTILE[1])
    matches = [
        Match(key, ("s" + key,), Copy(), 0.5, 0.6, Evidence(0.5), (Alternative(("s" + HOSTILE[0],), Copy(), 0.2),)) for key in HOSTILE[:-2]
    ]
    question = Question(HOSTILE[0], HOSTILE[1], (Option(HOSTILE[0], tuple(matches[:1])), Option("neither", ())), HOSTILE[:1])
    verdict = Verdict("partial", HOSTILE[0], HOSTILE[1:3])
    mapping = KeyMapping(Side.of(source), Side.of(target), (), questions=(question,), warnings=HOSTILE[:9], verdict=verdict)
    return mapping.with_matches(matches)
