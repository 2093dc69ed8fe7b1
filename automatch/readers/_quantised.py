"""Recognising weights that bitsandbytes, GPTQ, AWQ or an 8-bit format has packed: they are no plain weights."""

from __future__ import annotations

from collections import Counter

from automatch.specs import StateSpec


def quantised_note(spec: StateSpec) -> str | None:
    """One sentence on the packed tensors of a checkpoint, or None if it has none."""
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for tensor in spec:
        kind = _kind(tensor.key, tensor.dtype, spec)
        if kind is not None:
            kinds[kind] += 1
            example.setdefault(kind, tensor.key)
    if not kinds:
        return None
    listed = ", ".join(f"{count} by {kind} (e.g. {example[kind]!a})" for kind, count in kinds.items())
    return f"the checkpoint is quantised: {listed}; packed tensors are no plain weights; dequantise it first"


def _kind(key: str, dtype: str, spec: StateSpec) -> str | None:
    owner, _, leaf = key.rpartition(".")
    if leaf == "qweight" and f"{owner}.qzeros" in spec and f"{owner}.scales" in spec:
        return "GPTQ" if f"{owner}.g_idx" in spec else "AWQ"
    if leaf != "weight":
        return None
    if dtype == "uint8" and (f"{key}.quant_map" in spec or f"{key}.absmax" in spec):
        return "bitsandbytes 4-bit"
    if dtype == "int8" and (f"{owner}.SCB" in spec or f"{owner}.weight_format" in spec):
        return "bitsandbytes 8-bit"
    if dtype.startswith("float8") and (f"{owner}.weight_scale" in spec or f"{owner}.weight_scale_inv" in spec):
        return "8-bit floats with scales"
    return None
