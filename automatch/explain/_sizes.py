"""Why the shapes of one key differ, as far as names and shapes say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from automatch.explain._causes import Cause, Kind
from automatch.explain._parse import Mismatch

_HEAD = re.compile(
    r"head|classif|(^|\.)fc\d*\.|(^|\.)out(put)?\.|logit|cls|score|linear|last_layer|bbox|(^|\.)predict|conv_seg", re.IGNORECASE
)
_VOCABULARY = re.compile(
    r"(^|[._])emb(ed(ding)?s?)?(_\w{1,30})?\.weight|embed_tokens|(^|\.)wte\.|lm_head|shared\.weight|vocab", re.IGNORECASE
)
_POSITIONS = re.compile(r"pos(ition)?_?(al)?_?(embed|enc)|embed(ding)?_?pos|(^|\.)wpe\.|relative_position|rel_pos|abs_pos", re.IGNORECASE)
_TEXTS = {
    "classes": "Another number of classes: {} in the checkpoint, {} in the model. The classifier has to be trained again.",
    "vocabulary": "Another vocabulary (tokens, symbols, speakers): {} entries in the checkpoint, {} in the model.",
    "positions": "Another number of positions (input size, context length); automatch.load(..., adapt=...) can interpolate the table.",
    "size": "Layers of another size: the model was built with other settings (width, kernel, channels) than the checkpoint's.",
}
_ADAPTERS = "Adapters of another rank, or for another base model: build the model with the adapter's own settings (r, target modules)."
_EMPTY_MODEL = (
    "The model's tensors are empty: its parameters are partitioned (DeepSpeed ZeRO-3), and this process holds none of them. "
    "Load before the model is partitioned, or inside deepspeed.zero.GatheredParameters."
)
_EMPTY_CHECKPOINT = (
    "The checkpoint's tensors are empty: it was saved while parameters were partitioned (DeepSpeed ZeRO-3), so it does not hold them. "
    "Gather them with zero_to_fp32.py, or save with stage3_gather_16bit_weights_on_model_save."
)


def of_mismatched(mismatched: Sequence[Mismatch]) -> list[Cause]:
    """Why shapes differ, as far as name and shape say."""
    if partitioned := _partitioned(mismatched):
        return [partitioned]
    groups: dict[Kind, list[Mismatch]] = {}
    tables = {_rows(mismatch) for mismatch in mismatched if _by_name(mismatch) == "vocabulary"}
    for mismatch in mismatched:  # what has the rows of a vocabulary, before and after, is its output layer
        kind = "vocabulary" if tables and _rows(mismatch) in tables and _same_rest(mismatch) else _by_name(mismatch)
        groups.setdefault(kind, []).append(mismatch)
    if len(groups.get("size", ())) > 1:  # with other widths inside, the head says nothing of its own
        groups = {"size": list(mismatched)}
    return [_resized(kind, group) for kind, group in groups.items()]


def _partitioned(mismatched: Sequence[Mismatch]) -> Cause | None:
    """Empty tensors; older versions of DeepSpeed left one element in each."""
    for side, text in (("source", _EMPTY_CHECKPOINT), ("target", _EMPTY_MODEL)):
        empty = [mismatch for mismatch in mismatched if getattr(mismatch, side) == (0,)]
        left = [mismatch for mismatch in mismatched if getattr(mismatch, side) == (1,)]
        if not empty and len(left) > 1 and any(max(map(len, (mismatch.source, mismatch.target))) > 1 for mismatch in left):
            empty = left
        if empty:
            return replace(_resized("size", empty), kind="partitioned", text=f"{text} {_shapes(empty)}.")
    return None


def _rows(mismatch: Mismatch) -> tuple[int, int]:
    return (*mismatch.source[:1], 1)[0], (*mismatch.target[:1], 1)[0]


def _same_rest(mismatch: Mismatch) -> bool:
    return len(mismatch.source) == len(mismatch.target) and mismatch.source[1:] == mismatch.target[1:]


def _by_name(mismatch: Mismatch) -> Kind:
    if _POSITIONS.search(mismatch.key) and mismatch.source[-1:] == mismatch.target[-1:]:
        return "positions"
    if _same_rest(mismatch) and len(mismatch.source) == 2 and _VOCABULARY.search(mismatch.key):
        return "vocabulary"
    return "classes" if _same_rest(mismatch) and _HEAD.search(mismatch.key) else "size"


def _shapes(group: Sequence[Mismatch]) -> str:
    return "; ".join(f"{m.key!r} is {list(m.source)} in the checkpoint, {list(m.target)} in the model" for m in group[:3])


def _resized(kind: Kind, group: Sequence[Mismatch]) -> Cause:
    keys = tuple(mismatch.key for mismatch in group)
    adapters = kind == "size" and all("lora" in key.lower() for key in keys)
    text = _ADAPTERS if adapters else _TEXTS[kind].format(*_rows(group[0]))
    code = (
        f"for key in {list(keys)!r}:",
        "    del state_dict[key]  # keeps its initial values: train it again, and load with strict=False",
    )
    return Cause(kind, f"{text} {_shapes(group)}.", keys, () if kind == "size" else code)
