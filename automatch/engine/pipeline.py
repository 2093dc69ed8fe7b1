"""The stages of matching on one page: items, reduction, solving, expansion, assembly, ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from automatch.engine.assemble import Fed, assemble
from automatch.engine.conventions import concept, shipped_conventions, words_in_order
from automatch.engine.items import Item, items_of
from automatch.engine.names import Lexicon
from automatch.engine.parts import with_virtual_items
from automatch.engine.reduction import Reduction, expand, reduce_repeats
from automatch.engine.sides import Side
from automatch.engine.solve import Solution, Weights, assign, solve
from automatch.keys import template_of
from automatch.specs import StateSpec, TensorSpec
from automatch.transforms import Copy

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


def run_stages(
    source: StateSpec,
    target: StateSpec,
    lexicon: Lexicon,
    weights: Weights,
    *,
    without_sources: Sequence[str] = (),
    without_targets: Sequence[str] = (),
    agreed: Mapping[str, str] | None = None,
    exhaustive: bool = False,
) -> Outcome:
    """Match two specs, leaving out keys that are decided already; what they decided (`agreed` templates) holds for their like."""
    aliases = [t.key for t in target if t.alias_of is not None and t.alias_of in target]
    source_items, target_items = with_virtual_items(items_of(source, without_sources), items_of(target, [*without_targets, *aliases]))
    reduction = reduce_repeats(source_items, target_items, exhaustive=exhaustive)
    left = Side([source_items[i] for i in reduction.source_kept])
    right = Side([target_items[j] for j in reduction.target_kept])
    solution = solve(left, right, lexicon, weights)
    if agreed:
        _follow(agreed, solution, left, right)
    chosen = assign(solution, right.n, left.n, weights.none)
    index = {(int(a), int(b)): k for k, (a, b) in enumerate(zip(solution.t, solution.s, strict=True))}
    pair_of = {reduction.target_kept[j]: index[j, i] for j, i in chosen.items()}
    solved = {reduction.target_kept[j]: reduction.source_kept[i] for j, i in chosen.items()}
    decided_by = expand(reduction, solved)
    pairs = {j: i for j, (i, _) in decided_by.items()}
    transposed = square_votes(source_items, target_items, pairs)
    fed = assemble(source_items, target_items, pairs, transposed)
    outcome = Outcome(
        source, target, source_items, target_items, reduction, (left, right), solution, weights, pair_of, decided_by, fed, {}, agreed or {}
    )
    _follow_ties(outcome, set(without_targets))
    return outcome


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


# ---- ties ------------------------------------------------------------------------------------------------------

_TIED = {("embedding", "token"), ("head", "lm")}


def _follow_ties(outcome: Outcome, decided: set[str]) -> None:
    """Feed keys that repeat another tensor: aliases of the model, and vocabulary tensors that models tie."""
    fed = {f.target: f for f in outcome.fed}
    for tensor in outcome.target:
        if tensor.alias_of in fed and tensor.key not in fed and tensor.key not in decided:
            base = fed[tensor.alias_of]
            sources = _namesake(outcome.source, base, tensor) or base.sources
            outcome.fed.append(Fed(tensor.key, sources, base.transform, base.items))
            outcome.tied[tensor.key] = tensor.alias_of
    unfed = [t for t in outcome.target if t.key not in fed and t.key not in decided and t.alias_of is None and t.kind != "buffer"]
    if not unfed:
        return
    used = {key for f in outcome.fed for key in f.sources}
    spare = {t.shape for t in outcome.source if t.key not in used}
    vocabulary = _vocabulary(outcome, fed)
    for tensor in unfed:
        base = vocabulary.get(tensor.shape)
        if base is not None and tensor.shape not in spare and (len(tensor.shape) == 2 or _names_vocabulary(tensor.key)):
            outcome.fed.append(Fed(tensor.key, base.sources, base.transform, base.items))
            outcome.tied[tensor.key] = base.target


def _namesake(source: StateSpec, base: Fed, tensor: TensorSpec) -> tuple[str] | None:
    """The checkpoint's own copy of a tied tensor: the key that relates to it as the base's source does to the base."""
    key, found = base.target, base.sources[0]
    if isinstance(base.transform, Copy) and (found.endswith(key) or key.endswith(found)):
        own = found[: -len(key)] + tensor.key if found.endswith(key) else tensor.key.removeprefix(key[: -len(found)])
        if own in source and source[own].shape == tensor.shape:
            return (own,)
    return None


def _vocabulary(outcome: Outcome, fed: Mapping[str, Fed]) -> dict[tuple[int, ...], Fed]:
    """The fed vocabulary tensors by shape: the token embedding or output layer, and the bias of the latter."""
    result: dict[tuple[int, ...], Fed] = {}
    for key, f in fed.items():
        shape = outcome.target[key].shape
        if len(shape) == 2 and shape[0] > shape[1] > 1 and len(f.sources) == 1 and _names_vocabulary(key):
            result.setdefault(shape, f)
    rows = {shape[0] for shape in result}
    for key, f in fed.items():
        shape = outcome.target[key].shape
        if len(shape) == 1 and shape[0] in rows and len(f.sources) == 1:
            result.setdefault(shape, f)
    return result


def _names_vocabulary(key: str) -> bool:
    words = _plain_words(key)
    found = concept(words, shipped_conventions())
    return found in _TIED or any(word in ("decoder", "predictions", "shared", "embed", "head", "lm") for word in words)


def _plain_words(key: str) -> tuple[str, ...]:
    side = Side([Item(key, (), None, None, (key,))])
    return words_in_order(side, 0)
