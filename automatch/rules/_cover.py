"""The fewest prefix rules that explain keys with one source each.

Every key has one label: the prefix that is replaced and what replaces it, cut to the shortest form
(``module. → ``). A rule for a prefix passes its label to all keys below it that no longer prefix claims,
so this is the smallest routing table for a tree (Draves et al., "Constructing optimal IP routing
tables", 1999) with one change: a rule that repeats over layers counts once, because it becomes one rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from automatch.rules._components import Component, Made, head
from automatch.rules._patterns import shape_of_transform, split_numbers

_NOTHING = 0
_UNIT = 10**9  # shares are rounded up, so that many rules below never look cheaper than one above


@dataclass(slots=True)
class Literal:
    """A rule without variables: the heads of its keys, whether a tail follows, and what it explains."""

    sources: tuple[str, ...]
    outputs: tuple[Made, ...]
    star: bool
    explains: list[Component] = field(default_factory=list[Component])


@dataclass(slots=True)
class _Node:
    path: str
    depth: int
    parent: _Node | None = None
    leaves: list[tuple[Component, int]] = field(default_factory=list[tuple[Component, int]])
    cost: int = 0
    savings: dict[int, int] = field(default_factory=dict[int, int])
    choice: int | None = None


class _Labels:
    """Labels by number; 0 is "feeds nothing"."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {("", ()): _NOTHING}
        self._templates: dict[Hashable, int] = {}
        self.prefixes = [""]
        self.outputs: list[tuple[Made, ...]] = [()]
        self.lengths = [0]
        self.templates = [self.template(((), ()))]

    def number(self, component: Component) -> int:
        """The number of a component's label: the shortest prefix that is replaced, and what replaces it."""
        if not component.outputs:
            return _NOTHING
        (prefix,), outputs = component.heads(component.common)
        number = self._numbers.setdefault((prefix, outputs), len(self.prefixes))
        if number == len(self.prefixes):
            self.prefixes.append(prefix)
            self.outputs.append(outputs)
            self.lengths.append(len(prefix))
            texts = tuple((split_numbers(key)[0], shape_of_transform(transform)) for key, transform, _ in outputs)
            self.templates.append(self.template((split_numbers(prefix)[0], texts)))
        return number

    def template(self, value: Hashable) -> int:
        """A number for a template: equal for what differs in numbers alone."""
        return self._templates.setdefault(value, len(self._templates))

    def star(self, path: str, label: int) -> Literal:
        """The rule that gives everything below ``path`` this label."""
        rest = path[self.lengths[label] :]
        return Literal((path,), tuple((key + rest, transform, takes) for key, transform, takes in self.outputs[label]), True)


def cover(parts: Iterable[Component]) -> list[Literal]:
    """Explain components of one source each with as few literal rules as possible."""
    labels = _Labels()
    nodes = sorted(_tree(parts, labels), key=lambda node: -node.depth)
    _solve(nodes, labels)
    return _collect(nodes[::-1], labels)


def _tree(parts: Iterable[Component], labels: _Labels) -> list[_Node]:
    nodes = {"": _Node("", 0)}
    for part in parts:
        path = head(part.sources[0], 1)
        missing: list[str] = []
        while path not in nodes:
            missing.append(path)
            path = head(path[:-1], 1)
        node = nodes[path]
        for below in reversed(missing):
            node = nodes[below] = _Node(below, node.depth + 1, node)
        node.leaves.append((part, labels.number(part)))
    return list(nodes.values())


def _costs(nodes: Iterable[_Node], labels: _Labels) -> Counter[tuple[int, int]]:
    """How many literal rules would differ from (template of a prefix or key, template of a label) in numbers alone."""
    counts: Counter[tuple[int, int]] = Counter()
    below: dict[str, set[int]] = {}
    for node in nodes:
        found = below.pop(node.path, set[int]())
        for part, label in node.leaves:
            counts[labels.template(split_numbers(part.sources[0])[0]), labels.templates[label]] += 1
            found.add(label)
        template = labels.template(split_numbers(node.path)[0])
        found = {label for label in found if labels.lengths[label] <= len(node.path)}
        for label in found:
            counts[template, labels.templates[label]] += 1
        if node.parent is not None:
            below.setdefault(node.parent.path, set()).update(found)
    return counts


def _solve(nodes: Sequence[_Node], labels: _Labels) -> None:
    """Deepest nodes first: the least cost of all below a node, and what each inherited label would save of it."""
    counts = _costs(nodes, labels)
    for node in nodes:
        for part, label in node.leaves:
            cost = -(-_UNIT // counts[labels.template(split_numbers(part.sources[0])[0]), labels.templates[label]])
            node.cost += cost
            node.savings[label] = node.savings.get(label, 0) + cost
        savings = {label: saved for label, saved in node.savings.items() if labels.lengths[label] <= len(node.path)}
        template = labels.template(split_numbers(node.path)[0])
        best: tuple[int, bool, int, int] | None = None
        for label, saved in savings.items():
            own = -(-_UNIT // counts[template, labels.templates[label]])
            total = own + node.cost - saved
            if total < node.cost or (saved == node.cost and own <= node.cost):
                # of equal totals a rule that renames is preferred to one that drops, then the longer prefix
                best = min(best or (total + 1, False, 0, 0), (total, label == _NOTHING, -labels.lengths[label], label))
        gain = 0
        if best is not None:
            node.choice, gain = best[3], node.cost - best[0]
        node.savings = {label: saved - gain for label, saved in savings.items() if saved >= gain}
        node.cost -= gain
        if node.parent is not None:
            node.parent.cost += node.cost
            for label, saved in node.savings.items():
                node.parent.savings[label] = node.parent.savings.get(label, 0) + saved


def _collect(nodes: Sequence[_Node], labels: _Labels) -> list[Literal]:
    """Root first: keep the inherited label where that is no worse, else take the node's own choice."""
    literals: list[Literal] = []
    stars: dict[str, Literal] = {}
    in_force: dict[str, tuple[int, str | None]] = {}
    for node in nodes:
        label, owner = in_force[node.parent.path] if node.parent is not None else (_NOTHING, None)
        if node.choice is not None and node.choice != label and label not in node.savings:
            label, owner = node.choice, node.path
        in_force[node.path] = (label, owner)
        for part, wanted in node.leaves:
            if wanted != label:
                literals.append(Literal(part.sources, part.outputs, False, [part]))
            elif owner is not None:
                if owner not in stars:
                    stars[owner] = labels.star(owner, label)
                stars[owner].explains.append(part)
    return [*stars.values(), *literals]


def cover_joint(parts: Iterable[Component]) -> list[Literal]:
    """Explain components of several sources: by module where a whole module's keys agree, else by key."""
    groups: dict[tuple[str, ...], list[Component]] = {}
    for part in parts:
        groups.setdefault(part.heads(min(1, part.common))[0], []).append(part)
    literals: list[Literal] = []
    for sources, group in groups.items():
        outputs = {part.heads(1)[1] for part in group if part.common}
        if len(outputs) == 1 and len(group) > 1:
            literals.append(Literal(sources, outputs.pop(), True, group))
        else:
            literals.extend(Literal(part.sources, part.outputs, False, [part]) for part in group)
    return literals
