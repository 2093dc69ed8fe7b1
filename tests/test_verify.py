from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from handmade import assert_unchanged, mapping_of, snapshot_of
from torch import nn

import automatch
from automatch.errors import MappingError, ModelError
from automatch.golden import record_golden
from automatch.mapping import Match, Option, Question
from automatch.rotary import rotary_questions
from automatch.transforms import PermuteElements


class Gated(nn.Module):
    """A gated layer: which weight is the gate cannot be told from shapes, and hardly from names like w1 and w3."""

    def __init__(self, first: str = "w1", second: str = "w3", down: str = "w2") -> None:
        super().__init__()
        self.names = (first, second, down)
        setattr(self, first, nn.Linear(4, 6, bias=False))
        setattr(self, second, nn.Linear(4, 6, bias=False))
        setattr(self, down, nn.Linear(6, 3, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


@pytest.fixture
def old() -> Gated:
    torch.manual_seed(0)
    return Gated()


@pytest.fixture
def new() -> Gated:
    torch.manual_seed(1)
    return Gated("gate", "up", "down")


SAMPLE = torch.linspace(-1, 1, 8).reshape(2, 4)
FEEDS = {"gate.weight": "w1.weight", "up.weight": "w3.weight", "down.weight": "w2.weight"}


def pair(gate: str, up: str) -> tuple[Match, ...]:
    return (Match("gate.weight", (f"{gate}.weight",)), Match("up.weight", (f"{up}.weight",)))


def gate_question(crossed_first: bool = True) -> Question:
    options = (Option("w3 is the gate", pair("w3", "w1"), 0.6), Option("w1 is the gate", pair("w1", "w3"), 0.4))
    return Question("q1", "which is the gate?", options if crossed_first else options[::-1], ("gate.weight", "up.weight"))


def likely_first(question: Question) -> Question:
    """The same question, with the right answer thought the likelier one."""
    wrong, right = question.options
    return replace(question, options=(replace(wrong, confidence=0.1), replace(right, confidence=0.9)))


def test_a_right_mapping_is_proven(old, new, tmp_path):
    path = automatch.save_snapshot(old, tmp_path / "old.pt", sample=SAMPLE)
    before = snapshot_of(new)
    result = mapping_of(new, path, FEEDS).verify(new, path)
    assert result
    assert result.proven is True
    assert result.error < 1e-6
    assert result.text.startswith("proven")
    assert_unchanged(new, before)
    assert result.mapping.apply(path).keys() == new.state_dict().keys()


def test_a_wrong_mapping_is_found_out_and_where(old, new, tmp_path):
    path = automatch.save_snapshot(old, tmp_path / "old.pt", sample=SAMPLE)
    crossed = mapping_of(new, path, FEEDS | {"gate.weight": "w3.weight", "up.weight": "w1.weight"})
    result = crossed.verify(new, path)
    assert not result
    assert result.proven is False
    assert result.first_difference == "down"  # each of the two layers before it gives what its source gave
    assert "the first module that differs is 'down'" in result.text


def test_a_golden_batch_may_be_given_by_hand(old, new):
    ckpt = old.state_dict()
    mapping = mapping_of(new, ckpt, FEEDS)
    with torch.no_grad():
        assert mapping.verify(new, ckpt, golden=(SAMPLE, old(SAMPLE)))
        assert not mapping.verify(new, ckpt, golden=(SAMPLE, old(SAMPLE) + 1))
    assert mapping.verify(new, ckpt, golden=record_golden(old, (SAMPLE,)))


def test_open_questions_are_answered_by_the_golden_batch(old, new):
    ckpt = old.state_dict()
    mapping = mapping_of(new, ckpt, {"down.weight": "w2.weight"}, questions=(gate_question(),))
    result = mapping.verify(new, ckpt, golden=record_golden(old, SAMPLE))
    assert result.proven
    assert result.mapping.questions == ()
    assert result.mapping["gate.weight"].sources == ("w1.weight",)
    assert result.mapping["gate.weight"].decided
    automatch.load(new, ckpt, mapping=result.mapping)
    assert torch.allclose(new(SAMPLE), old(SAMPLE))


def test_a_question_that_the_batch_cannot_answer_stays_open(new):
    torch.manual_seed(0)
    old = Gated()
    with torch.no_grad():
        old.w3.weight.copy_(old.w1.weight)  # both answers are the same
    mapping = mapping_of(new, old.state_dict(), {"down.weight": "w2.weight"}, questions=(gate_question(),))
    result = mapping.verify(new, old.state_dict(), golden=record_golden(old, SAMPLE))
    assert result.proven is None
    assert "whatever the answer to q1" in result.text
    assert [question.id for question in result.mapping.questions] == ["q1"]


def test_a_batch_that_no_weight_changes_proves_nothing(old, new):
    zeros = {key: torch.zeros_like(value) for key, value in old.state_dict().items()}
    with torch.no_grad():
        for parameter in (*old.parameters(), *new.parameters()):
            parameter.zero_()
    result = mapping_of(new, zeros, FEEDS).verify(new, zeros, golden=(torch.zeros(2, 4), torch.zeros(2, 3)))
    assert result.proven is None
    assert "does not depend on the weights" in result.text


def test_questions_are_answered_by_a_score(old, new):
    ckpt = old.state_dict()
    mapping = mapping_of(new, ckpt, {"down.weight": "w2.weight"}, questions=(gate_question(),))
    wanted = old(SAMPLE).detach()
    before = snapshot_of(new)
    result = mapping.verify(new, ckpt, score=lambda model: -float((model(SAMPLE) - wanted).abs().sum()))
    assert result.proven is None
    assert result.mapping["gate.weight"].sources == ("w1.weight",)
    assert result.text == "1 of 1 questions answered by the score, 2 loads tried"
    assert_unchanged(new, before)
    undecided = mapping.verify(new, ckpt, score=lambda model: 0.5)
    assert undecided.mapping.questions == mapping.questions


@pytest.mark.parametrize("crossed_first", [True, False])
def test_a_score_that_is_no_number_is_the_worst(old, new, crossed_first):
    ckpt = old.state_dict()
    mapping = mapping_of(new, ckpt, {"down.weight": "w2.weight"}, questions=(gate_question(crossed_first),))

    def score(model: Gated) -> float:
        return -7.0 if torch.equal(model.gate.weight, old.w1.weight) else float("nan")

    assert mapping.verify(new, ckpt, score=score).mapping["gate.weight"].sources == ("w1.weight",)
    assert mapping.verify(new, ckpt, score=lambda model: float("nan")).mapping.questions == mapping.questions


def test_a_compiled_model_is_run_as_it_is_written(old, new):
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        calls.append(1)
        return graph

    compiled = torch.compile(new, backend=backend)
    feeds = {f"_orig_mod.{target}": source for target, source in FEEDS.items()}
    golden = record_golden(torch.compile(old, backend=backend), SAMPLE)
    assert mapping_of(compiled, old.state_dict(), feeds).verify(compiled, old.state_dict(), golden=golden)
    assert calls == []


def test_the_budget_is_kept(old, new):
    ckpt = old.state_dict()
    mapping = mapping_of(new, ckpt, {"down.weight": "w2.weight"}, questions=(gate_question(),))
    golden = record_golden(old, SAMPLE)
    result = mapping.verify(new, ckpt, golden=golden, budget=1)
    assert (result.proven, result.tried) == (None, 1)
    assert result.text.startswith("not settled: no answer tried gives the golden output")
    assert result.first_difference == "down"
    likely = mapping_of(new, ckpt, {"down.weight": "w2.weight"}, questions=(replace(gate_question(), options=gate_question().options[1:]),))
    first_right = mapping_of(new, ckpt, {"down.weight": "w2.weight"}, questions=(likely_first(gate_question()),))
    result = first_right.verify(new, ckpt, golden=golden, budget=1)
    assert (result.proven, result.tried, result.mapping.questions) == (None, 1, first_right.questions)
    assert "other answers to q1 were not tried within the budget of 1" in result.text
    result = first_right.verify(new, ckpt, golden=golden, budget=2)
    assert (result.proven, result.tried) == (True, 2)
    assert likely.verify(new, ckpt, golden=golden, budget=1).proven
    many = mapping.verify(new, ckpt, score=lambda model: 0.0, budget=1)
    assert (many.tried, many.mapping.questions) == (1, mapping.questions)
    with pytest.raises(MappingError, match="budget must be at least 1, got 0"):
        mapping.verify(new, ckpt, golden=record_golden(old, SAMPLE), budget=0)


class Rotary(nn.Module):
    """Attention over one head group with rotary positions, interleaved or in halves."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.interleaved = interleaved

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.3])
        heads = x.unflatten(-1, (-1, 4))
        first, second = (heads[..., ::2], heads[..., 1::2]) if self.interleaved else heads.chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned = (first * cos - second * sin, first * sin + second * cos)
        return torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.turn(self.q_proj(x)), self.turn(self.k_proj(x)).repeat_interleave(2, 2)
        return torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_row_orders_are_found(interleaved):
    torch.manual_seed(0)
    old, new = Rotary(interleaved), Rotary(not interleaved)
    ckpt = old.state_dict()
    x = torch.randn(2, 5, 16)
    result = mapping_of(new, ckpt, {key: key for key in ckpt}).verify(new, ckpt, golden=record_golden(old, x))
    assert result.proven
    split = (4, 2, 2)
    assert result.mapping["q_proj.weight"].transform == PermuteElements(0, split, (0, 2, 1))
    automatch.load(new, ckpt, mapping=result.mapping)
    assert torch.allclose(new(x), old(x), atol=1e-6)


def test_rotary_questions_are_only_asked_where_there_are_queries_and_keys(old, new):
    assert rotary_questions(mapping_of(new, old.state_dict(), FEEDS)) == ()
    ckpt = Rotary(True).state_dict()
    (question,) = rotary_questions(mapping_of(Rotary(False), ckpt, {key: key for key in ckpt}))
    assert question.keys == ("q_proj.weight", "k_proj.weight")


def test_what_is_missing_for_a_proof_is_named(old, new):
    ckpt = old.state_dict()
    mapping = mapping_of(new, ckpt, FEEDS)
    with pytest.raises(MappingError, match=r"holds no golden batch; pass golden=\(sample, output\) or score="):
        mapping.verify(new, ckpt)
    with pytest.raises(ModelError, match="meta device and cannot be run"):
        mapping.verify(new.to("meta"), ckpt, golden=(SAMPLE, SAMPLE))
    with pytest.raises(ModelError, match="failed on the sample batch"):
        mapping.verify(Gated("gate", "up", "down"), ckpt, golden=(torch.ones(2, 99), SAMPLE))


def test_tied_weights_are_proven_under_either_key():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    torch.manual_seed(0)
    old, new = Tied(), Tied()
    for feeds in ({"embed.weight": "embed.weight"}, {"head.weight": "head.weight"}):
        assert mapping_of(new, old.state_dict(), feeds).verify(new, old.state_dict(), golden=record_golden(old, torch.arange(5)))
