"""Recognising weights that bitsandbytes, GPTQ, AWQ or an 8-bit format has packed: they are no plain weights."""

from __future__ import annotations

from collections import Counter

from automatch.specs import StateSpec


def quantised_note(spec: StateSpec) -> str | None:
    """One sentence on the packed tensors of a checkpoint, or None if it has none."""
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for key in spec.keys:
        kind = packing_of(key, spec)
        if kind is not None:
            kinds[kind] += 1
            example.setdefault(kind, key)
    if not kinds:
        return None
    listed = ", ".join(f"{count} by {kind} (e.g. {example[kind]!a})" for kind, count in kinds.items())
    return f"the checkpoint is quantised: {listed}; packed tensors are no plain weights; dequantise it first"


def packing_of(key: str, spec: StateSpec) -> str | None:
    """How the tensor of ``key`` is packed, told by its dtype and what lies beside it; None for a plain tensor."""
    dtype = spec[key].dtype
    owner, dot, leaf = key.rpartition(".")
    if leaf == "qweight" and f"{owner}.qzeros" in spec and f"{owner}.scales" in spec:
        return "GPTQ" if f"{owner}.g_idx" in spec else "AWQ"
    if dtype == "uint8" and (f"{key}.quant_map" in spec or f"{key}.absmax" in spec):
        return "bitsandbytes 4-bit"
    if dtype == "int8" and leaf == "weight" and (f"{owner}.SCB" in spec or f"{owner}.weight_format" in spec):
        return "bitsandbytes 8-bit"
    if dtype == "uint8" and leaf.endswith("_blocks") and f"{key.removesuffix('blocks')}scales" in spec:
        return "4-bit blocks with scales"
    scales = (f"{key}_scale", f"{key}_scale_inv", f"{owner}{dot}scale_{leaf}")
    if (
        dtype.startswith("float8")
        and "scale" not in leaf
        and any(k in spec for k in (*scales, f"{owner}{dot}scale", f"{owner}{dot}scales"))
    ):
        return "8-bit floats with scales"
    if dtype in ("int8", "uint8") and any(k in spec for k in scales):
        return "integers with scales"
    return None
