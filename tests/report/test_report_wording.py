from __future__ import annotations

import unicodedata

import pytest
import report_zoo as zoo
from hypothesis import given
from hypothesis import strategies as st

from automatch.report.collapse import collapse, ranges
from automatch.report.wording import percent, shape_text, short, transform_text, visible
from automatch.transforms import Adapt, Chain, Concat, Copy, Permute, PermuteElements, Reshape, Slice, Stack

KEYS = st.text(alphabet=st.sampled_from("ab01.\u202e<"), max_size=12)


@given(st.text(st.characters(exclude_categories=())))
def test_visible_text_has_no_character_that_cannot_be_seen(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert visible(shown) == shown


@given(st.text(max_size=400), st.integers(8, 100))
def test_short_text_keeps_to_its_limit(text: str, limit: int) -> None:
    assert 0 < len(short(text, limit)) <= limit + (2 if not text.strip() else 0) or not text.strip()


@pytest.mark.parametrize("key", zoo.HOSTILE)
def test_no_key_vanishes(key: str) -> None:
    assert short(key).strip()


@given(st.floats(0, 1))
def test_a_percentage_never_promises_more_than_there_is(confidence: float) -> None:
    shown = percent(confidence)
    if not shown.startswith("<"):
        assert int(shown.removesuffix("%")) / 100 <= confidence + 1e-9


def test_almost_certain_is_not_certain() -> None:
    assert [percent(c) for c in (1.0, 0.99999, 0.95, 0.004, 0.0)] == ["100%", "99%", "95%", "<1%", "0%"]


def test_shapes() -> None:
    assert [shape_text(shape) for shape in ((64, 3, 7, 7), (8,), (), None)] == ["64×3×7×7", "8", "scalar", "?"]


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (Copy(), ""),
        (Reshape((4, 6)), "reshape to 4×6"),
        (Permute((1, 0)), "transpose"),
        (Permute((2, 0, 1)), "permute axes to 2,0,1"),
        (Slice(0, 768, 768), "entries 768…1535 of axis 0"),
        (Concat(0), "join along axis 0"),
        (Stack(0), "stack on a new axis 0"),
        (PermuteElements(0, (12, 32, 2), (0, 2, 1)), "reorder axis 0 (12×32×2 read as 0,2,1)"),
        (Adapt("resize_head", (5, 8)), "adapt to 5×8 (resize_head; only when asked for)"),
        (Chain((Slice(0, 0, 4), Permute((1, 0)))), "entries 0…3 of axis 0, then transpose"),
    ],
)
def test_transforms_in_words(transform: object, words: str) -> None:
    assert transform_text(transform) == words


@given(st.lists(KEYS, unique=True))
def test_collapsing_loses_and_invents_no_key(keys: list[str]) -> None:
    assert sorted(key for group in collapse(keys) for key in group.keys) == sorted(keys)


def test_collapsing_merges_indices_and_leaves() -> None:
    keys = [f"layers.{i}.attn.{leaf}" for i in range(12) for leaf in ("weight", "bias")]
    assert [group.template for group in collapse([*keys, "head.weight"])] == ["layers.{0…11}.attn.{bias, weight}", "head.weight"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "3"), ([0, 1, 2], "{0…2}"), ([0, 2, 5, 6], "{0, 2, 5…6}"), ([0, 2, 4, 6, 8, 10], "{6 of 0…10}")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
