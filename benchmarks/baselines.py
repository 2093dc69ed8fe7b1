"""What people use today, each as ``entries of both sides -> mapping in the JSON form``.

All are as sure of one pair as of another: their confidence is 1. A tool that raises has refused; that
is an answer too (nothing is loaded), and counts as all missed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import corpus_cases
import numpy as np
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from scipy.optimize import linear_sum_assignment

Case = dict[str, Any]
Entries = Sequence[Sequence[Any]]
Pairs = dict[str, str]

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "net.", "state_dict.")
LARGEST_BLOCK = 6000


class RefusedError(Exception):
    """The tool gave no mapping."""


def strict(case: Case, source: Entries) -> Pairs:
    """`load_state_dict`: the same key and the same shape."""
    shapes = {key: shape for key, shape, *_ in source}
    return {key: key for key, shape, *_ in case["target"]["entries"] if shapes.get(key) == shape}


def prefix(case: Case, source: Entries) -> Pairs:
    """Strip known wrappers, or strip or add the one prefix that makes most keys agree."""
    target = {key: shape for key, shape, *_ in case["target"]["entries"]}
    renamings: list[Callable[[str], str]] = [_without_wrappers]
    renamings += [lambda key, start=start: key.removeprefix(start) for start in sorted(_prefixes(key for key, *_ in source))]
    renamings += [lambda key, start=start: start + key for start in sorted(_prefixes(target))]
    best: Pairs = {}
    for rename in renamings:
        pairs = {rename(key): key for key, shape, *_ in source if target.get(rename(key)) == shape}
        best = max(best, pairs, key=len)
    return best


def _without_wrappers(key: str) -> str:
    while found := next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), None):
        key = key.removeprefix(found)
    return key


def _prefixes(keys: Any, depth: int = 3) -> set[str]:
    parts = [key.split(".") for key in keys]
    counts = Counter(".".join(p[: i + 1]) + "." for p in parts for i in range(min(depth, len(p) - 1)))
    return {"", *(start for start, _ in counts.most_common(12))}


def suffix(case: Case, source: Entries) -> Pairs:
    """detectron2's rule: the longest checkpoint key that is a dotted suffix of the model key."""
    shapes = {key: shape for key, shape, *_ in source}
    pairs: Pairs = {}
    taken: dict[str, str] = {}
    for key, shape, *_ in case["target"]["entries"]:
        parts = key.split(".")
        found = next((s for i in range(len(parts)) if (s := ".".join(parts[i:])) in shapes), None)
        if found is None or shapes[found] != shape:  # detectron2 warns of another shape and goes on
            continue
        if found in taken:
            raise RefusedError(f"{found!r} fits both {taken[found]!r} and {key!r}")
        taken[found] = key
        pairs[key] = found
    return pairs


def order(case: Case, source: Entries) -> Pairs:
    """timm's `remap_state_dict`: zip in order, every pair must have the same number of elements."""
    pairs: Pairs = {}
    for (target, wanted, *_), (key, shape, *_) in zip(case["target"]["entries"], source, strict=False):
        if np.prod(wanted) != np.prod(shape):
            raise RefusedError(f"{target!r} has {np.prod(wanted)} elements, {key!r} has {np.prod(shape)}")
        pairs[target] = key
    return pairs


def hungarian(case: Case, source: Entries) -> Pairs:
    """Plain Hungarian per shape: 0.7 × similarity of the whole keys + 0.3 × closeness of rank."""
    blocks: dict[tuple[int, ...], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, entries in enumerate((source, case["target"]["entries"])):
        for key, shape, *_ in entries:
            blocks[tuple(shape)][side].append(key)
    pairs: Pairs = {}
    for left, right in blocks.values():
        if not left or not right:
            continue
        if max(len(left), len(right)) > LARGEST_BLOCK:  # the dense matrix is out of reach
            raise RefusedError(f"{len(left)} × {len(right)} keys of one shape")
        names = cdist(left, right, scorer=Indel.normalized_similarity)
        ranks = 1 - np.abs(np.linspace(0, 1, len(left))[:, None] - np.linspace(0, 1, len(right))[None, :])
        rows, columns = linear_sum_assignment(-(0.7 * names + 0.3 * ranks))
        pairs |= {right[j]: left[i] for i, j in zip(rows, columns, strict=True)}
    return pairs


def weightbridge(case: Case, source: Entries) -> Pairs:
    """weightbridge 0.0.4, told to leave out what it cannot pair; its refusal is a ValueError."""
    from weightbridge import adapt

    def arrays(entries: Entries) -> dict[str, np.ndarray]:
        return {key: np.broadcast_to(np.float32(0), shape) for key, shape, *_ in entries}

    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "pairs.json"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                adapt(
                    arrays(source),
                    arrays(case["target"]["entries"]),
                    in_separator=_separator(source),
                    out_separator=_separator(case["target"]["entries"]),
                    cache=str(cache),
                    ignore_unmatched_inputs=True,
                    ignore_unmatched_outputs=True,
                )
        except TimeoutError:
            raise
        except Exception as error:
            if not cache.exists():  # the pairs are written before the tensors are converted
                raise RefusedError(f"{type(error).__name__}: {error}") from error
        pairs = json.loads(cache.read_text())["mapping"]
    return {out[len("load_prefix.") :]: into[len("load_prefix.") :] for out, into in pairs}


def _separator(entries: Entries) -> str:
    return max("./", key=lambda mark: sum(mark in key for key, *_ in entries))


def lit_wsl(case: Case, source: Entries) -> Pairs:
    """lit-wsl 0.3.3 in its recommended form: the optimal strategy, threshold 0.6, buffers left out."""
    from lit_wsl.mapper.weight_mapper import WeightMapper

    logging.disable(logging.CRITICAL)
    tensors = {key: corpus_cases.meta_tensor(shape, dtype) for key, shape, dtype, _ in source}
    try:
        mapper = WeightMapper.from_state_dict(tensors, corpus_cases.skeleton(case))
        result = mapper.suggest_mapping(threshold=0.6, strategy="optimal", validate_outputs=False)
        return {target: key for key, target in result.get_mapping().items()}
    except TimeoutError:
        raise
    except Exception as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)


BASELINES: dict[str, Callable[[Case, Entries], Pairs]] = {
    "strict": strict,
    "prefix": prefix,
    "suffix": suffix,
    "order": order,
    "hungarian": hungarian,
    "weightbridge": weightbridge,
    "lit_wsl": lit_wsl,
}
TITLES = {
    "strict": "`load_state_dict` (exact keys)",
    "prefix": "prefix stripping",
    "suffix": "longest dotted suffix (detectron2)",
    "order": "registration order (timm)",
    "hungarian": "plain name + order Hungarian",
    "weightbridge": "weightbridge 0.0.4",
    "lit_wsl": "lit-wsl 0.3.3",
}


def as_mapping(pairs: Pairs) -> dict[str, Any]:
    """Pairs in the JSON form of a mapping, as far as scoring reads it."""
    return {"matches": [{"target": t, "sources": [s], "transform": {"op": "copy"}, "confidence": 1.0} for t, s in pairs.items()]}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block after ``seconds`` of processor time, so that a busy machine cuts nobody short.

    In the main thread only; C code is interrupted when it returns.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
