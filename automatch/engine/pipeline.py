"""The stages of matching on one page: items, reduction, solving, expansion, assembly, ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from automatch.engine.assemble import Fed, assemble
from automatch.engine.columns import ColumnsOf
from automatch.engine.items import Item, items_of
from automatch.engine.mirror import keep_directions
from automatch.engine.named import keep_names, keep_series
from automatch.engine.numbered import keep_numbers
from automatch.engine.parts import with_virtual_items
from automatch.engine.reduction import Reduction, expand, reduce_repeats
from automatch.engine.registration import Precedence
from automatch.engine.sides import Order, Side, order_kind
from automatch.engine.solve import Solution, Weights, assign, solve
from automatch.engine.tables import Tables
from automatch.engine.ties import with_padded, with_ties
from automatch.engine.whole import keep_whole
from automatch.keys import segments_of, template_of
from automatch.specs import StateSpec

PINNED = 10.0  # of the score, out of about 25


@dataclass(slots=True)
class Outcome:
    """Everything the stages found, for confidence, questions and the verdict to be read off.

    Args:
        source, target: the specs.
        source_items, target_items: what was matched.
        reduction: which of them took part in solving.
        sides: arrays over those that did.
        solution: candidate pairs with their scores.
        weights: what the scores were made with.
        pair_of: kept target position to index of its pair in the solution.
        decided_by: target item to (source item, kept target position that decided it).
        fed: what feeds each real target key.
        tied: keys of `fed` that repeat another key's source.
        agreed: target to source templates that pins have decided.
        straightened: kept target positions in lists that were fed in no one direction before, or of norms that were fed out of order.
    """

    source: StateSpec
    target: StateSpec
    source_items: list[Item]
    target_items: list[Item]
    reduction: Reduction
    sides: tuple[Side, Side]
    solution: Solution
    weights: Weights
    pair_of: dict[int, int]
    decided_by: dict[int, tuple[int, int]]
    fed: list[Fed]
    tied: dict[str, str]
    agreed: Mapping[str, str]
    straightened: frozenset[int]


def run_stages(
    source: StateSpec,
    target: StateSpec,
    tables: Tables,
    weights: Weights,
    *,
    without_sources: Sequence[str] = (),
    without_targets: Sequence[str] = (),
    agreed: Mapping[str, str] | None = None,
    exhaustive: bool = False,
) -> Outcome:
    """Match two specs, leaving out keys that are decided already; what they decided (`agreed` templates) holds for their like."""
    aliases = [t.key for t in target if t.alias_of is not None and t.alias_of in target]
    columns = ColumnsOf()
    items = items_of(source, without_sources), items_of(target, [*without_targets, *aliases])
    source_items, target_items = with_virtual_items(*items, columns)
    reduction = reduce_repeats(source_items, target_items, columns, exhaustive=exhaustive)
    kept = [source_items[i] for i in reduction.source_kept], [target_items[j] for j in reduction.target_kept]
    left, right = _sides(kept, (_order_of(source), _order_of(target)), tables.precedence)
    solution = solve(left, right, tables.lexicon, weights)
    if agreed:
        _follow(agreed, solution, left, right)
    index = solution.index
    first = assign(solution, right.n, left.n, weights.none)
    named = keep_names(first, index, left, right)
    chosen, moved = keep_series(keep_numbers(named, index, left, right), index, left, right)
    chosen, torn = keep_directions(chosen, index, left, right)
    solution.exchange([(index[j, first[j]], index[j, i]) for j, i in chosen.items() if first.get(j, i) != i])
    chosen = keep_whole(chosen, index, left, right, (source, target))
    pair_of = {reduction.target_kept[j]: index[j, i] for j, i in chosen.items()}
    solved = {reduction.target_kept[j]: reduction.source_kept[i] for j, i in chosen.items()}
    decided_by = expand(reduction, solved)
    pairs = {j: i for j, (i, _) in decided_by.items()}
    transposed = square_votes(source_items, target_items, pairs)
    fed = assemble(source_items, target_items, pairs, transposed)
    fed, tied = with_ties(source, target, with_padded(source, target, fed, set(without_targets)), set(without_targets))
    return Outcome(
        source,
        target,
        source_items,
        target_items,
        reduction,
        (left, right),
        solution,
        weights,
        pair_of,
        decided_by,
        fed,
        tied,
        agreed or {},
        frozenset(reduction.target_kept[j] for j in torn | moved),
    )


def _sides(items: tuple[list[Item], list[Item]], orders: tuple[Order, Order], precedence: Precedence) -> tuple[Side, Side]:
    """Both sides; where one alone is in order of registration, its names help to restore the other's."""
    sides: list[Side] = []
    for own, other, order, example in zip(items, items[::-1], orders, orders[::-1], strict=True):
        learns = order != "registered" and example == "registered"
        sides.append(Side(own, precedence.with_order_of(item.key for item in other) if learns else precedence, order))
    return sides[0], sides[1]


def _order_of(spec: StateSpec) -> Order:
    return order_kind(spec.keys, [segments_of(key) for key in spec.keys])


def _follow(agreed: Mapping[str, str], solution: Solution, left: Side, right: Side) -> None:
    """Lift the pairs that agree with a pinned pair of their template above all others of their target."""
    wanted = [agreed.get(template_of(key)) for key in right.keys]
    templates = [template_of(key) for key in left.keys]
    for k, (t, s) in enumerate(zip(solution.t.tolist(), solution.s.tolist(), strict=True)):
        if wanted[t] is not None:
            solution.score[k] += PINNED if wanted[t] == templates[s] else -PINNED


# ---- square matrices ------------------------------------------------------------------------------------------


class square_votes:  # noqa: N801 - used like a function
    """Whether a square matrix is transposed: as most oblong matrices are that lie in the same kind of module."""

    def __init__(self, source: Sequence[Item], target: Sequence[Item], pairs: Mapping[int, int]) -> None:
        self._source, self._target = source, target
        self._votes: dict[tuple[int, str], list[int]] = {}
        for j, i in pairs.items():
            a, b = source[i].shape, target[j].shape
            if len(a) == len(b) == 2 and a[0] != a[1] and 1 not in a and not self._embeds(j, i):
                for group in self._groups(j, i):
                    vote = self._votes.setdefault(group, [0, 0])
                    vote[a != b] += 1

    def _embeds(self, j: int, i: int) -> bool:
        return "emb" in self._source[i].key.lower() or "emb" in self._target[j].key.lower()

    def _groups(self, j: int, i: int) -> list[tuple[int, str]]:
        leaf = self._source[i].key.replace("/", ".").rpartition(".")
        return [(1, leaf[0].rpartition(".")[2] + leaf[2]), (2, leaf[2])]

    def __call__(self, j: int, i: int) -> bool:
        a, b = self._source[i].shape, self._target[j].shape
        if len(a) != 2 or a != b or a[0] != a[1] or self._embeds(j, i):
            return False
        for group in self._groups(j, i):
            plain, transposed = self._votes.get(group, (0, 0))
            if plain + transposed:
                return transposed > plain
        return False
