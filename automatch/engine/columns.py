"""Repeated structure: identical sibling submodules are solved by a few of them and expanded afterwards.

A *class* is a set of numbered siblings (``layers.0``, ``layers.1``, …) whose subtrees are identical in
keys and shapes. A key's *column* is the key with the numbers of such siblings taken out; its
*coordinates* are the ranks of those siblings in their classes. Of a long class only the first two and
the last two members take part in matching; the answer for the others follows from theirs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from automatch.engine.items import canonical
from automatch.keys import natural_order, segments_of, template_of

Shape = tuple[int, ...]
Coordinates = tuple[int, ...]
KEEP = 2  # members kept at either end of a class
LONG = 2 * KEEP + 1


class _Node:
    __slots__ = ("children", "shape", "signature")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.shape: Shape | None = None
        self.signature = 0


class Columns:
    """Columns and coordinates of a list of keys with shapes."""

    def __init__(self, keys: Sequence[str], shapes: Sequence[Shape]) -> None:
        self.keys = list(keys)
        self._segments = [segments_of(key) for key in keys]
        self._root = _Node()
        for segments, shape in zip(self._segments, shapes, strict=True):
            node = self._root
            for segment in segments:
                child = node.children.get(segment)
                if child is None:
                    child = node.children[segment] = _Node()
                node = child
            node.shape = shape
        _sign(self._root)
        self._ranks: dict[int, tuple[int, int, str]] = {}  # child id -> (rank, size of its class, name of the class)
        self._find_classes()

    def _find_classes(self) -> None:
        stack = [self._root]
        while stack:
            node = stack.pop()
            classes: dict[tuple[str, int], list[tuple[str, _Node]]] = defaultdict(list)
            for segment, child in node.children.items():
                stack.append(child)
                template = template_of(segment)
                if template != segment and child.shape is None:
                    classes[template, child.signature].append((segment, child))
            for number, ((template, _), members) in enumerate(classes.items()):
                if len(members) >= LONG or (len(members) > 1 and all(segment.isdigit() for segment, _ in members)):
                    members.sort(key=lambda m: natural_order(m[0]))
                    for rank, (_, child) in enumerate(members):
                        self._ranks[id(child)] = (rank, len(members), f"{template}~{number}")

    def long_classes(self) -> dict[int, list[Counter[Shape]]]:
        """By size, the shapes in a member of every class that is long enough to be reduced."""
        first = {node: size for node, (rank, size, _) in self._ranks.items() if rank == 0 and size >= LONG}
        found: dict[int, Counter[Shape]] = defaultdict(Counter)
        for segments in self._segments:
            node, inside = self._root, []
            for segment in segments:
                node = node.children[segment]
                if id(node) in first:
                    inside.append(id(node))
            if node.shape is not None:
                for member in inside:
                    found[member][canonical(node.shape)] += 1
        result: dict[int, list[Counter[Shape]]] = defaultdict(list)
        for member, shapes in found.items():
            size = first[member]
            if shapes not in result[size]:
                result[size].append(shapes)
        return result

    def place(self, sizes: set[int] | None = None) -> list[tuple[str, Coordinates, tuple[int, ...]]]:
        """For every key its column, coordinates and the column's dimensions, reducing classes of these sizes only."""
        return [self._place(segments, sizes) for segments in self._segments]

    def _place(self, segments: Sequence[str], sizes: set[int] | None) -> tuple[str, Coordinates, tuple[int, ...]]:
        node, column, coordinates, dims = self._root, [], [], []
        for segment in segments:
            node = node.children[segment]
            found = self._ranks.get(id(node))
            if found is not None and (sizes is None or found[1] in sizes):
                coordinates.append(found[0])
                dims.append(found[1])
                column.append(found[2])
            else:
                column.append(segment)
        return "/".join(column), tuple(coordinates), tuple(dims)


def _sign(root: _Node) -> None:
    """Give every node a signature of the keys and shapes below it, children first."""
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(node.children.values())
    for node in reversed(order):
        node.signature = hash((node.shape, frozenset((segment, child.signature) for segment, child in node.children.items())))


def is_kept(coordinates: Coordinates, dims: tuple[int, ...]) -> bool:
    """Whether a key with these coordinates takes part in matching."""
    return all(c < KEEP or c >= n - KEEP for c, n in zip(coordinates, dims, strict=True))
