"""Siblings of one name on both sides, norms in series, lists: exchanged back, but never fed twice nor from what does not fit."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from automatch.engine.items import Item, canonical, items_of
from automatch.engine.mirror import keep_directions
from automatch.engine.named import keep_names, keep_series
from automatch.engine.sides import Side
from automatch.specs import StateSpec, TensorSpec

SEGMENTS = st.sampled_from(("enc", "dec", "0", "1", "norm1", "norm2", "norm3", "attn", "post_norm"))
KEYS = st.lists(st.tuples(SEGMENTS, SEGMENTS, st.sampled_from(("weight", "bias"))), min_size=2, max_size=14, unique=True)


def side(keys: list[str]) -> Side:
    shapes = {"weight": (4,), "bias": (3,)}
    tensors = tuple(TensorSpec(key, shapes[key.rpartition(".")[2]], "float32", None) for key in keys)
    items: list[Item] = items_of(StateSpec(tensors, "checkpoint"), ())
    return Side(items, order="registered")


@given(KEYS, KEYS, st.randoms(use_true_random=False))
def test_every_source_feeds_one_target_of_its_shape(ours: list[tuple[str, ...]], theirs: list[tuple[str, ...]], chance: Random) -> None:
    target, source = (side([".".join(parts) for parts in keys]) for keys in (ours, theirs))
    order = list(range(source.n))
    chance.shuffle(order)
    fits = {(j, i) for j in range(target.n) for i in range(source.n) if canonical(target.shapes[j]) == canonical(source.shapes[i])}
    chosen: dict[int, int] = {}
    for j in range(target.n):
        i = next((i for i in order if (j, i) in fits and i not in chosen.values()), None)
        if i is not None:
            chosen[j] = i
    named = keep_names(chosen, fits, source, target)
    result, moved = keep_series(named, fits, source, target)
    assert result.keys() == chosen.keys()
    assert set(result.items()) <= fits
    assert len(set(result.values())) == len(result)
    assert moved == {j for j in result if result[j] != named[j]}


def test_an_exchange_of_names_is_undone_and_one_of_numbers_is_not() -> None:
    target = side(["heads.seg.weight", "heads.box.weight", "norm1.weight", "norm2.weight", "x.bias"])
    source = side(["net.heads.box.weight", "net.heads.seg.weight", "net.norm1.weight", "net.norm2.weight", "x.bias"])
    fits = {(j, i) for j in range(4) for i in range(4)}
    assert keep_names({0: 0, 1: 1, 2: 3, 3: 2}, fits, source, target) == {0: 1, 1: 0, 2: 3, 3: 2}
    assert keep_names({0: 0, 1: 1}, fits - {(0, 1)}, source, target) == {0: 0, 1: 1}


def test_norms_beside_their_modules_may_run_against_their_numbers() -> None:
    """Every norm stands behind what it belongs to, on both sides: the first one is the cross attention's."""
    target = side(["a.weight", "a_norm.weight", "c.weight", "c_norm.weight", "fc.weight", "last_norm.weight"])
    apart = side(["cross.weight", "norm1.weight", "self.weight", "norm2.weight", "linear.weight", "norm3.weight"])
    together = side(["cross.weight", "self.weight", "linear.weight", "norm1.weight", "norm2.weight", "norm3.weight"])
    fits = {(j, i) for j in range(6) for i in range(6)}
    assert keep_series({0: 2, 1: 3, 2: 0, 3: 1, 4: 4, 5: 5}, fits, apart, target)[1] == set()
    assert keep_series({0: 1, 1: 4, 2: 0, 3: 3, 4: 2, 5: 5}, fits, together, target) == ({0: 1, 1: 3, 2: 0, 3: 4, 4: 2, 5: 5}, {1, 3})


def test_a_list_is_straightened_among_candidates_only() -> None:
    def stages(prefix: str) -> Side:
        widths = (4, 3, 3, 3)
        keys = [(f"{prefix}.{n}.{part}.weight", (width,)) for n, width in enumerate(widths) for part in ("a", "b")]
        tensors = tuple(TensorSpec(key, shape, "float32", None) for key, shape in [*keys, ("x.bias", (9,))])
        return Side(items_of(StateSpec(tensors, "checkpoint"), ()), order="registered")

    target, source = stages("up"), stages("blocks")
    torn = {0: 0, 1: 1, 2: 4, 3: 5, 4: 2, 5: 3, 6: 6, 7: 7}
    every = {(j, i) for j in range(9) for i in range(9)}
    assert keep_directions(torn, every, source, target) == ({n: n for n in range(8)}, set(range(8)))
    assert keep_directions(torn, every - {(2, 2)}, source, target) == (torn, set())
