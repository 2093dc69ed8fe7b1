"""A model as a tree that can be refactored: modules in registration order, and where each tensor comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Truth = dict[str, Any]


@dataclass(slots=True)
class Leaf:
    """A parameter or buffer.

    Args:
        name: its own name, e.g. ``"weight"``.
        shape: its dimensions.
        dtype: torch's name without the prefix.
        kind: "param" or "buffer".
        truth: which tensors of the original it is made of, in the corpus form; None if it is new.
    """

    name: str
    shape: list[int]
    dtype: str
    kind: str
    truth: Truth | None


@dataclass(slots=True)
class Node:
    """A module: its name under its parent, its class, its own tensors, and its children in registration order."""

    name: str
    cls: str
    leaves: list[Leaf] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def child(self, name: str) -> Node | None:
        """The child called ``name``, if there is one."""
        return next((child for child in self.children if child.name == name), None)

    def names(self) -> set[str]:
        """Every name that is taken under this module."""
        return {child.name for child in self.children} | {leaf.name for leaf in self.leaves}

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """(path, module) of this module and all below it, parents first."""
        yield path, self
        for child in self.children:
            yield from child.walk(f"{path}.{child.name}" if path else child.name)

    def signature(self) -> tuple[Any, ...]:
        """The shapes below, whatever their names: what nobody can tell apart has the same."""
        own = tuple(tuple(leaf.shape) for leaf in self.leaves)
        return own, tuple(child.signature() for child in self.children)


def tree_of(target: dict[str, Any]) -> Node:
    """The tree of a case's target; every tensor is its own origin."""
    classes = target.get("modules", {})
    root = Node("", classes.get("", "Model"))
    nodes = {"": root}

    def at(path: str) -> Node:
        if path not in nodes:
            parent, _, name = path.rpartition(".")
            nodes[path] = Node(name, classes.get(path, "Module"))
            at(parent).children.append(nodes[path])
        return nodes[path]

    for path in classes:
        at(path)
    for key, shape, dtype, kind in target["entries"]:
        path, _, name = key.rpartition(".")
        at(path).leaves.append(Leaf(name, list(shape), dtype, kind, {"op": "copy", "sources": [key]}))
    return root


def entries_of(root: Node) -> tuple[list[list[Any]], dict[str, str], dict[str, Truth]]:
    """Entries, module classes and truth of a tree, in the corpus form."""
    entries: list[list[Any]] = []
    modules: dict[str, str] = {}
    truth: dict[str, Truth] = {}
    for path, node in root.walk():
        modules[path] = node.cls
        for leaf in node.leaves:
            key = f"{path}.{leaf.name}" if path else leaf.name
            entries.append([key, leaf.shape, leaf.dtype, leaf.kind])
            if leaf.truth is not None:
                truth[key] = leaf.truth
    return entries, modules, truth


def template(path: str) -> str:
    """A path with its index numbers hidden: modules of one template are one piece of code."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "#", path)


def by_template(root: Node) -> dict[str, list[Node]]:
    """The modules of each template."""
    found: dict[str, list[Node]] = {}
    for path, node in root.walk():
        found.setdefault(template(path), []).append(node)
    return found
