"""One side of the problem as arrays: items (keys), their tokens, ancestors, numbers and shapes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import scipy.sparse as sp

from automatch.engine.items import Item
from automatch.engine.registration import SURE, Precedence, restored
from automatch.keys import pieces_of, segments_of, template_of

Order = Literal["registered", "sorted", "none"]

NEAR = 3  # modules around an item whose order decides how far its place is trusted


class Node:
    """A node of the key tree while it is built."""

    __slots__ = ("children", "id", "keys", "literal")

    def __init__(self, node_id: int) -> None:
        self.id = node_id
        self.children: dict[str, Node] = {}
        self.keys: list[int] = []


class Side:
    """Arrays over the items of one side, in order.

    `segments[i]` are the segments of item i; `loops[i]` says for each segment whether its number is a
    loop index (the same submodule repeated) rather than part of a name.
    """

    def __init__(self, items: Sequence[Item], precedence: Precedence | None = None, order: Order | None = None) -> None:
        self.items = list(items)
        self.n = len(self.items)
        self._owner_runs: tuple[np.ndarray, np.ndarray, sp.csr_matrix] | None = None
        self.keys = [item.key for item in self.items]
        self.shapes = [item.shape for item in self.items]
        self.segments = [segments_of(key) for key in self.keys]
        self.order = order or order_kind(self.keys, self.segments)
        self.precedence = precedence or Precedence()
        self._grow()
        self.position, self.order_trust = (
            (np.arange(self.n, dtype=np.float64), np.ones(self.n)) if self.order == "registered" else self._restored_order()
        )
        self._loops()
        self._words()

    # ---- the tree -----------------------------------------------------------------------------------

    def _grow(self) -> None:
        self.root = Node(0)
        self.paths: list[list[int]] = []
        self.nodes = [self.root]
        for i, segments in enumerate(self.segments):
            node, path = self.root, [0]
            node.keys.append(i)
            for segment in segments[:-1]:
                child = node.children.get(segment)
                if child is None:
                    child = Node(len(self.nodes))
                    self.nodes.append(child)
                    node.children[segment] = child
                child.keys.append(i)
                path.append(child.id)
                node = child
            self.paths.append(path)
        self.node_size = np.array([len(node.keys) for node in self.nodes], dtype=np.float64)
        rows = [i for i, path in enumerate(self.paths) for _ in path[1:]]
        cols = [node for path in self.paths for node in path[1:]]
        self.ancestors = sp.csr_matrix((np.ones(len(rows)), (rows, cols)), shape=(self.n, len(self.nodes)))

    def _restored_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions as the model would have registered the items, and how much is known of each one's, in [0, 1]."""
        known: dict[tuple[str, ...], tuple[dict[str, int], float]] = {}
        found: list[tuple[dict[str, int], float]] = []
        for depth, node in zip(self._depths(), self.nodes, strict=True):
            siblings = tuple(dict.fromkeys(self.segments[i][depth] for i in node.keys))
            if siblings not in known:
                order, sure = restored(siblings, self.precedence)
                known[siblings] = ({segment: rank for rank, segment in enumerate(order)}, sure)
            found.append(known[siblings])
        ways = [
            tuple(found[node][0][s] for node, s in zip(path, segs, strict=True))
            for path, segs in zip(self.paths, self.segments, strict=True)
        ]
        position = np.empty(self.n)
        position[sorted(range(self.n), key=ways.__getitem__)] = np.arange(self.n)
        return position, np.array([float(np.mean([found[node][1] for node in path[-NEAR:]])) for path in self.paths])

    def _depths(self) -> list[int]:
        depths = [0] * len(self.nodes)
        for path in self.paths:
            for depth, node in enumerate(path):
                depths[node] = depth
        return depths

    def order_is_sure(self, one: int, two: int) -> bool:
        """Whether it is known which of two items comes first."""
        if self.order == "registered":
            return True
        for a, b in zip(self.segments[one], self.segments[two], strict=False):
            if a != b:
                return abs(self.precedence.odds(a, b)) >= SURE
        return False

    def _loops(self) -> None:
        """Find which numbered children repeat one structure; only nodes whose children are numbered matter."""
        self.loop_nodes: set[int] = set()
        self.strict_nodes: set[int] = set()
        self.sibling_rank: dict[int, tuple[int, int]] = {}
        stack = [(self.root, 0)]
        while stack:
            node, depth = stack.pop()
            groups: dict[str, list[tuple[tuple[int, ...], Node]]] = defaultdict(list)
            for segment, child in node.children.items():
                stack.append((child, depth + 1))
                numbers = tuple(piece for piece in pieces_of(segment) if isinstance(piece, int))
                if numbers:
                    groups[template_of(segment)].append((numbers, child))
            for members in groups.values():
                members.sort(key=lambda m: m[0])
                for rank, (_, child) in enumerate(members):
                    self.sibling_rank[child.id] = (rank, len(members))
                if len(members) > 1 and self._repeats([child for _, child in members], depth + 1):
                    self.loop_nodes.update(child.id for _, child in members)
                    if max(len({tuple(self.paths[i]) for i in child.keys}) for _, child in members) > 2:
                        self.strict_nodes.update(child.id for _, child in members)

    def _repeats(self, children: list[Node], depth: int) -> bool:
        relative = [frozenset(template_of(".".join(self.segments[i][depth:])) for i in child.keys) for child in children]
        modules = [len({tuple(self.segments[i][depth:-1]) for i in child.keys}) for child in children]
        counts = Counter(relative)
        twins = sum(1 for keys, n in zip(relative, modules, strict=True) if n > 1 and (counts[keys] > 1 or _near(keys, relative)))
        return 2 * twins >= len(children)

    def loop_template(self, i: int) -> str:
        """The key of an item with the numbers of repeated modules taken out."""
        return self._template(i, self.loop_nodes)

    def strict_template(self, i: int) -> str:
        """The same, for modules only that hold more than two modules of their own."""
        return self._template(i, self.strict_nodes)

    def bare_template(self, i: int) -> str:
        """The key of an item with all numbers taken out."""
        return template_of(self.keys[i])

    def _template(self, i: int, repeated: set[int]) -> str:
        path = self.paths[i]
        parts = [
            template_of(segment) if depth + 1 < len(path) and path[depth + 1] in repeated else segment
            for depth, segment in enumerate(self.segments[i])
        ]
        return "/".join(parts)

    def owner_runs(self) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
        """The owner (module) of each item, the owners before and after each owner, and the incidence of items on owners."""
        if self._owner_runs is None:
            self._owner_runs = self._find_owner_runs()
        return self._owner_runs

    def _find_owner_runs(self) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
        order = np.argsort(self.position, kind="stable")
        ids: dict[int, int] = {}
        for i in order:
            ids.setdefault(self.paths[i][-1], len(ids))
        of = np.array([ids[path[-1]] for path in self.paths])
        count = len(ids)
        beside = np.array([[i - 1 if i else count, i + 1] for i in range(count)])
        return of, beside, sp.csr_matrix((np.ones(self.n), (np.arange(self.n), of)), shape=(self.n, count))

    # ---- words ---------------------------------------------------------------------------------------

    def _words(self) -> None:
        """Word lists per item without loop numbers, and the numbers with their sibling ranks."""
        self.words: list[tuple[tuple[str, ...], ...]] = []
        self.leaf: list[str] = []
        self.numbers: list[tuple[tuple[int, int, int, bool], ...]] = []
        leaf_groups: dict[tuple[int, str], list[tuple[tuple[int, ...], int]]] = defaultdict(list)
        cache: dict[tuple[str, bool], tuple[str, ...]] = {}
        for i, segments in enumerate(self.segments):
            numbers: list[tuple[int, int, int, bool]] = []
            words: list[tuple[str, ...]] = []
            for depth, segment in enumerate(segments[:-1], start=1):
                node = self.paths[i][depth]
                loop = node in self.loop_nodes
                if (segment, loop) not in cache:
                    cache[segment, loop] = tokens_of(segment, loop)
                words.append(cache[segment, loop])
                if node in self.sibling_rank:
                    rank, size = self.sibling_rank[node]
                    numbers.append((next(p for p in pieces_of(segment) if isinstance(p, int)), rank, size, loop))
            leaf = segments[-1]
            found = tuple(p for p in pieces_of(leaf) if isinstance(p, int))
            if found:
                leaf_groups[self.paths[i][-1], template_of(leaf)].append((found, i))
            words.append(tokens_of(leaf, False))
            self.words.append(tuple(words))
            self.leaf.append(leaf)
            self.numbers.append(tuple(numbers))
        for members in leaf_groups.values():
            members.sort()
            for rank, (found, i) in enumerate(members):
                self.numbers[i] = (*self.numbers[i], (found[-1], rank, len(members), False))


def _near(keys: frozenset[str], others: Sequence[frozenset[str]]) -> bool:
    return any(other is not keys and 2 * len(keys & other) >= len(keys | other) for other in others)


def tokens_of(segment: str, loop: bool) -> tuple[str, ...]:
    """Words of a segment; a number that is part of a name is glued to its word (``fc1``, ``ln1``)."""
    tokens: list[str] = []
    pieces = pieces_of(segment)
    for piece in pieces:
        if isinstance(piece, str):
            tokens.append(piece)
        elif not loop and piece < 10:
            tokens.append(f"{tokens[-1] if tokens and tokens[-1][-1:].isalpha() else ''}{piece}")
    return tuple(tokens)


def order_kind(keys: Sequence[str], segments: Sequence[Sequence[str]]) -> Order:
    """Whether the order of keys is the module's own, an alphabetical sort, or says nothing.

    In registration order the keys of one module stand together; shuffled keys break nearly every module apart.
    """
    if len(keys) < 3:
        return "registered"
    if all(a < b for a, b in pairwise(keys)):
        return "sorted"
    owners = [".".join(s[:-1]) for s in segments]
    runs = 1 + sum(a != b for a, b in pairwise(owners))
    distinct = len(set(owners))
    return "none" if runs > 1.5 * distinct + 2 else "registered"
