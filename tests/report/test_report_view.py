from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import report_zoo as zoo
import torch
from torch import nn

import automatch
from automatch.mapping import KeyMapping, Match, Side
from automatch.refusal import is_harmless
from automatch.report.html import render_html
from automatch.report.leftovers import missing_leftovers, unexpected_leftovers
from automatch.report.markdown import render_markdown
from automatch.report.terminal import print_report, render_text
from automatch.report.view import build_view
from automatch.specs import StateSpec, TensorSpec


def mapping_between(source: list[TensorSpec], target: list[TensorSpec], pairs: dict[str, str]) -> KeyMapping:
    empty = KeyMapping(Side.of(StateSpec(tuple(source), "a.pt")), Side.of(StateSpec(tuple(target), "Net")), ())
    return empty.with_matches(Match(t, (s,), confidence=0.99) for t, s in pairs.items())


def test_every_model_key_is_in_the_report_once() -> None:
    view = build_view(zoo.transformer())
    assert sum(number for _, number, _ in view.stats) == view.n_target
    assert sum(number for _, number in view.bins) == len(view.rows)
    assert sorted(row for group in view.groups for row in group.rows) == list(range(len(view.rows)))


@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", ["transformer", "hostile"])
def test_the_terminal_report_keeps_to_its_width(name: str, width: int, all_keys: bool) -> None:
    text = render_text(getattr(zoo, name)(), all_keys=all_keys, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text


def test_all_keys_lists_every_key() -> None:
    mapping = zoo.transformer()
    text = render_text(mapping, all_keys=True, width=200)
    assert all(key in text for match in mapping.matches for key in (match.target, *match.sources))


@pytest.mark.parametrize(("colour", "no_colour", "expected"), [(True, "", True), (True, "1", False), (False, "", False)])
def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch, colour: bool, no_colour: str, expected: bool) -> None:
    from rich.console import Console

    monkeypatch.setenv("TERM", "xterm-256color")
    if no_colour:
        monkeypatch.setenv("NO_COLOR", no_colour)
    stream = io.StringIO()
    print_report(zoo.transformer(), Console(file=stream, force_terminal=colour, width=80))
    assert ("\x1b[32m" in stream.getvalue() or "\x1b[33m" in stream.getvalue()) is expected


def test_a_pipe_gets_plain_text() -> None:
    code = "import report_zoo; from automatch.report.terminal import print_report; print_report(report_zoo.transformer())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert b"\x1b" not in done.stdout
    assert b"Rules" in done.stdout


def test_leftovers_of_batch_norm_are_harmless_and_its_statistics_are_not() -> None:
    spec = automatch.specs.spec_of_model(nn.BatchNorm1d(4))
    mapping = mapping_between([TensorSpec("w", (1,))], list(spec), {})
    harmless = {key: left.harmless for left in missing_leftovers(mapping) for key in left.keys}
    assert "counter" in harmless.pop("num_batches_tracked")
    assert set(harmless.values()) == {""}


def test_tied_keys_are_harmless_when_one_of_them_is_fed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    spec = automatch.specs.spec_of_model(Tied())
    fed = mapping_between([TensorSpec("e", (5, 3))], list(spec), {"embed.weight": "e"})
    assert [left.harmless for left in missing_leftovers(fed)] == ["tied to embed.weight, which is fed"]
    unfed = mapping_between([TensorSpec("e", (5, 3))], list(spec), {})
    assert {left.harmless for left in missing_leftovers(unfed)} == {""}


@pytest.mark.parametrize("key", ["loss_fn.weight", "criterion.pos_weight", "val_metrics.confmat", "perceptual_loss.net.0.weight"])
def test_what_belongs_to_a_loss_is_harmless_in_a_checkpoint(key: str) -> None:
    mapping = mapping_between([TensorSpec(key, (3,))], [TensorSpec("w", (1,))], {})
    assert ["loss or a metric" in left.harmless for left in unexpected_leftovers(mapping)] == [True]


@pytest.mark.parametrize(
    ("leaf", "dtype", "harmless"),
    [
        ("pos_ids", "int64", True),
        ("rel_attn_mask", "bool", True),
        ("relative_bucket", "int32", True),
        ("relative_table", "float32", False),
        ("indices", "int64", False),
        ("attention_scale", "int8", False),
    ],
)
def test_whole_numbers_about_positions_are_harmless(leaf: str, dtype: str, harmless: bool) -> None:
    mapping = mapping_between([TensorSpec(f"net.{leaf}", (4, 4), dtype)], [TensorSpec("w", (1,))], {})
    assert [bool(left.harmless) for left in unexpected_leftovers(mapping)] == [harmless]


@pytest.mark.parametrize("key", ["flosses.weight", "glossy.bias", "closs.0.weight", "backbone.conv.weight"])
def test_other_parameters_are_not_called_harmless(key: str) -> None:
    mapping = mapping_between([TensorSpec(key, (3,))], [TensorSpec(key, (4,), kind="parameter")], {})
    assert [left.harmless for left in (*missing_leftovers(mapping), *unexpected_leftovers(mapping))] == ["", ""]


def test_missing_keys_are_harmless_exactly_where_load_does_not_refuse() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))
            self.register_buffer("position_ids", torch.arange(4))
            self.register_buffer("inv_freq", torch.rand(4))
            self.register_buffer("codebook", torch.rand(4))

    spec = automatch.specs.spec_of_model(Mixed())
    mapping = mapping_between([TensorSpec("w", (9,))], list(spec), {})
    harmless = {key: bool(left.harmless) for left in missing_leftovers(mapping) for key in left.keys}
    assert harmless == {tensor.key: is_harmless(tensor) for tensor in spec}


def test_an_open_question_withholds_its_keys() -> None:
    mapping = zoo.transformer()
    sure = mapping.with_matches([*mapping.matches])
    keys = mapping.questions[0].keys
    view = build_view(sure)
    assert {view.rows[row].target for group in view.withheld for row in group.rows} >= set(keys)
    answered = build_view(sure.answer("q1", 0))
    assert not {answered.rows[row].target for group in answered.withheld for row in group.rows} & set(keys)


@pytest.mark.parametrize("key", zoo.HOSTILE)
def test_no_key_leaves_its_code_span(key: str) -> None:
    text = render_markdown(mapping_between([TensorSpec("s", (3,))], [TensorSpec(key, (3,))], {key: "s"}))
    table = [line for line in text.splitlines() if line.startswith("| 1 |")]
    assert len(table) == 1
    assert table[0].replace("\\|", "").count("|") == 6


def test_a_mapping_without_specs_can_be_shown() -> None:
    data = zoo.transformer().to_dict()
    del data["source"]["entries"], data["target"]["entries"], data["verdict"]
    mapping = KeyMapping.from_dict(data)
    assert "22 of 29 model keys" in render_text(mapping)
    assert "22 of 29 model keys" in mapping._repr_html_()


def test_nothing_matched_can_be_shown() -> None:
    mapping = mapping_between([TensorSpec("a", (3,))], [TensorSpec("b", (4,), kind="parameter")], {})
    assert "nothing fits" in mapping.report()
    assert "0 of 1 model key fed" in mapping._repr_html_()


def test_a_notebook_fragment_has_no_script_and_no_request() -> None:
    for mapping in (zoo.transformer(), zoo.hostile()):
        fragment = mapping._repr_html_()
        assert "<script" not in fragment
        assert "<img" not in fragment
        assert "http" not in fragment
        assert "url(" not in fragment


def test_warnings_that_differ_in_keys_and_numbers_alone_are_one_line() -> None:
    repeated = [f"index shift: {n} keys like 'layers.{n}.w' take 'layers.{n + 1}.w'" for n in range(1, 6)]
    mapping = dataclasses.replace(zoo.transformer(), warnings=(repeated[0], "something else", *repeated[1:]))
    lines = [line.strip() for line in mapping.report().splitlines() if line.startswith("  ! ")]
    assert lines == [f"! {repeated[0]} (and 4 more like it:", "! something else"]
    assert sum(line.startswith("  ! index shift") for line in render_text(mapping, all_keys=True).splitlines()) == 5
    assert render_markdown(mapping).count("index shift") == 1
    for fragment in (mapping._repr_html_(), render_html(mapping).partition("<script")[0]):
        assert fragment.count("index shift") == 5
        assert "and 4 more like it</summary>" in fragment


def test_a_long_value_table_is_cut_short() -> None:
    keys = [f"a.{i}.w" for i in range(200)]
    pairs = {f"b.{i * 7 % 211}.w": key for i, key in enumerate(keys)}
    mapping = mapping_between([TensorSpec(key, (3,)) for key in keys], [TensorSpec(key, (3,)) for key in pairs], pairs)
    assert len(str(mapping.rules[0])) > 1000
    assert len(mapping.report()) < 3000
