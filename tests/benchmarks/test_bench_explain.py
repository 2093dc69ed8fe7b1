"""Messages made of the corpus read like torch's, and their pairs are right at the stored rate."""

from __future__ import annotations

from corpus_cases import case_paths, load_case
from explain import measure, message_of, messages

from automatch.explain import parse_error


def test_the_made_text_is_read_back_whole_and_cut() -> None:
    case = load_case(case_paths(["tv-resnet"])[0])
    source, target = ({key for key, *_ in case[side]["entries"]} for side in ("source", "target"))
    parsed = parse_error(message_of(case))
    assert (set(parsed.missing), set(parsed.unexpected)) == (target - source, source - target)
    assert not parsed.missing_cut
    cut = parse_error(message_of(case, 600))
    assert cut.missing_cut
    assert set(cut.missing) < set(parsed.missing)


def test_wrappers_are_right() -> None:
    found, right = measure(load_case(case_paths(["ddp-roberta-seqcls-to-plain"])[0]))
    assert found == right
    assert sum(found.values()) > 100


def test_every_real_message_is_answered_rightly() -> None:
    _, _, *rows = messages()
    assert len(rows) == 10
    assert all(row.endswith("| right |") for row in rows)
