"""Repeated structure: identical sibling submodules are solved by a few of them and expanded afterwards.

A *class* is a set of numbered siblings (``layers.0``, ``layers.1``, …) whose subtrees are identical in
keys and shapes. A key's *column* is the key with the numbers of such siblings taken out; its
*coordinates* are the ranks of those siblings in their classes. Of a long class only the first two and
the last two members take part in matching; the answer for the others follows from theirs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from functools import cached_property

from automatch.engine.items import Item, Shape, canonical
from automatch.keys import natural_order, template_of

Coordinates = tuple[int, ...]
Place = tuple[str, Coordinates, tuple[int, ...]]  # column, coordinates, dimensions
Kind = tuple[int, frozenset[tuple[Shape, int]]]  # of a class: how many members, and the shapes in one with their numbers
KEEP = 2  # members kept at either end of a class
LONG = 2 * KEEP + 1
LEAST = 0.5  # of a list's members that are alike for it to count as a list of these


class _Node:
    __slots__ = ("children", "keys", "shape", "signature")

    def __init__(self) -> None:
        self.children: dict[str, _Node] | None = None  # half of all nodes are leaves
        self.keys: tuple[int, ...] = ()
        self.shape: Shape | None = None
        self.signature = 0


class Columns:
    """Columns and coordinates of the keys of a list of items."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._n = len(items)
        self._root = _Node()
        nodes: dict[str, _Node] = {}
        for i, item in enumerate(items):
            node = self._node_at(item.key.replace("/", "."), nodes)
            node.shape, node.keys = item.shape, (*node.keys, i)
        _sign(self._root)
        # Child id to its rank, the size of its class, the name of the class among its siblings, and its number in all.
        self._ranks: dict[int, tuple[int, int, str, int]] = {}
        self._split: dict[int, int] = {}  # child id to the length of its list, for one of most of a list that is no class as a whole
        self._find_classes()

    def _node_at(self, path: str, nodes: dict[str, _Node]) -> _Node:
        """The node of a path, made with those above it where there is none; most keys find their module's."""
        missing: list[tuple[str, str]] = []
        node = nodes.get(path)
        while node is None:
            above, dot, name = path.rpartition(".")
            missing.append((path, name))
            path, node = above, nodes.get(above) if dot else self._root
        for whole, name in reversed(missing):
            if node.children is None:
                node.children = {}
            node.children[name] = nodes[whole] = node = _Node()
        return node

    def _find_classes(self) -> None:
        stack, count = [self._root], 0
        while stack:
            classes: dict[tuple[str, int], list[tuple[str, _Node]]] = {}
            for segment, child in (stack.pop().children or {}).items():
                if child.children is not None:
                    stack.append(child)
                if child.shape is None and not segment.isalpha():
                    template = template_of(segment)
                    if template != segment:
                        classes.setdefault((template, child.signature), []).append((segment, child))
            length = Counter[str]()
            for (template, _), members in classes.items():
                length[template] += len(members)
            for (template, _), members in classes.items():
                if length[template] >= LONG and length[template] > len(members) >= LEAST * length[template]:
                    self._split[id(members[0][1])] = length[template]
            for number, ((template, _), members) in enumerate(classes.items()):
                if len(members) >= LONG or (len(members) > 1 and all(segment.isdigit() for segment, _ in members)):
                    members.sort(key=lambda m: natural_order(m[0]))
                    for rank, (_, child) in enumerate(members):
                        self._ranks[id(child)] = (rank, len(members), f"{template}~{number}", count)
                    count += 1

    def long_lists(self) -> tuple[dict[Kind, list[int]], set[Kind]]:
        """Lists that are long enough to be reduced, by their length and the shapes in a member: the classes, and lists that are none."""
        classes = {node: (size, number) for node, (rank, size, _, number) in self._ranks.items() if rank == 0 and size >= LONG}
        watched = classes.keys() | self._split.keys()
        found: dict[int, Counter[Shape]] = defaultdict(Counter)
        stack: list[tuple[_Node, tuple[int, ...]]] = [(self._root, ())]
        while stack:
            node, inside = stack.pop()
            if node.shape is not None:
                for member in inside:
                    found[member][canonical(node.shape)] += len(node.keys)
            children = (node.children or {}).values()
            stack.extend((child, (*inside, id(child)) if id(child) in watched else inside) for child in children)
        whole: dict[Kind, list[int]] = defaultdict(list)
        split: set[Kind] = set()
        for member, shapes in found.items():
            if member in classes:
                size, number = classes[member]
                whole[size, frozenset(shapes.items())].append(number)
            if member in self._split:
                split.add((self._split[member], frozenset(shapes.items())))
        return whole, split

    @cached_property
    def all_places(self) -> list[Place]:
        """The places of all keys, with every class reduced."""
        return self.place(None)

    def place(self, numbers: Container[int] | None) -> list[Place]:
        """For every key its column, coordinates and the column's dimensions, reducing the classes with these numbers only (all without)."""
        result: list[Place] = [("", (), ())] * self._n
        stack: list[tuple[_Node, Place]] = [(self._root, ("", (), ()))]
        while stack:
            node, place = stack.pop()
            column, coordinates, dims = place
            for i in node.keys:
                result[i] = (column[:-1], coordinates, dims)
            for segment, child in (node.children or {}).items():
                rank = self._ranks.get(id(child))
                if rank is None or (numbers is not None and rank[3] not in numbers):
                    stack.append((child, (f"{column}{segment}/", coordinates, dims)))
                else:
                    stack.append((child, (f"{column}{rank[2]}/", (*coordinates, rank[0]), (*dims, rank[1]))))
        return result


class ColumnsOf:
    """The columns of lists of items, each worked out once: most steps leave a list as it is."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Sequence[Item], Columns]] = {}  # the list is held so that its id stays its own

    def __call__(self, items: Sequence[Item]) -> Columns:
        if id(items) not in self._known:
            self._known[id(items)] = (items, Columns(items))
        return self._known[id(items)][1]


def _sign(root: _Node) -> None:
    """Give every node a signature of the keys and shapes below it, children first."""
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        order.append(node)
        if node.children is not None:
            stack.extend(node.children.values())
    for node in reversed(order):
        below = frozenset((segment, child.signature) for segment, child in node.children.items()) if node.children else None
        node.signature = hash((node.shape, below))


def is_kept(coordinates: Coordinates, dims: tuple[int, ...]) -> bool:
    """Whether a key with these coordinates takes part in matching."""
    return all(c < KEEP or c >= n - KEEP for c, n in zip(coordinates, dims, strict=True))
