"""Refactorings as people do them: each changes a tree in place, wherever one piece of code was used.

A refactoring returns what it did in words, or None where the model has no place for it. Those that
would leave equals which nothing could tell apart are not done: a case must have an answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from module_tree import Leaf, Node, by_template
from vocabulary import FUSED, GATE, SYNONYMS, UP, K, Q, V

Refactoring = Callable[[Node, random.Random], str | None]


def synonyms(root: Node, rng: random.Random) -> str | None:
    """Call modules what another author would call them, the same everywhere."""
    share, changes = rng.choice((0.3, 0.6, 1.0)), {}
    for name in sorted(_names(root)):
        others = [other for words in SYNONYMS if name in words for other in words if other != name]
        if others and rng.random() < share:
            changes[name] = rng.choice(others)
    return _rename(root, changes)


def style(root: Node, rng: random.Random) -> str | None:
    """Another spelling for every name: camel case, numbers set off, or the vowels left out."""
    spell = rng.choice((_camel, _spaced, _short))
    return _rename(root, {name: spell(name) for name in sorted(_names(root))})


def nonsense(root: Node, rng: random.Random) -> str | None:
    """Call modules something that means nothing, the same everywhere; names of tensors stay."""
    share = rng.choice((0.2, 0.5, 1.0))
    return _rename(root, {name: _word(rng) for name in sorted(_names(root)) if rng.random() < share})


def wrap(root: Node, rng: random.Random) -> str | None:
    """Put the whole model under one or two attributes."""
    words = rng.sample(("module", "model", "net", "_orig_mod", "backbone", "network", "wrapped", "student"), rng.choice((1, 1, 2)))
    for word in words:
        inner = Node(word, root.cls, root.leaves, root.children)
        root.cls, root.leaves, root.children = "Wrapper", [], [inner]
    return f"wrapped in {words}"


def flatten(root: Node, rng: random.Random) -> str | None:
    """Dissolve a module into its parent, with or without its name as a prefix of its children's."""
    keep_name = rng.random() < 0.6
    places = [(p, [c for c in p.children if c.children and not c.leaves and not c.name.isdigit()]) for _, p in root.walk()]
    names = sorted({c.name for _, children in places for c in children})
    if not names:
        return None
    name, done = rng.choice(names), 0
    for parent, children in places:
        for child in children:
            if child.name != name:
                continue
            renamed = [f"{name}_{grand.name}" if keep_name or grand.name.isdigit() else grand.name for grand in child.children]
            if set(renamed) & (parent.names() - {name}):
                continue
            for grand, new in zip(child.children, renamed, strict=True):
                grand.name = new
            at = parent.children.index(child)
            parent.children[at : at + 1] = child.children
            done += 1
    return f"dissolved {name} in {done} places" if done else None


def nest(root: Node, rng: random.Random) -> str | None:
    """Move neighbouring children into a new module, in every place of that code."""
    groups = [nodes for nodes in by_template(root).values() if len(nodes[0].children) >= 3 and not nodes[0].children[0].name.isdigit()]
    if not groups:
        return None
    nodes = rng.choice(groups)
    names = [child.name for child in nodes[0].children]
    start = rng.randrange(len(names) - 1)
    moved, new = names[start : start + rng.choice((2, 3))], rng.choice(("inner", "core", "sub", "stem", "parts"))
    for node in nodes:
        kept = [child for child in node.children if child.name not in moved]
        inner = [child for child in node.children if child.name in moved]
        if inner and new not in node.names():
            at = node.children.index(inner[0])
            node.children = [*kept[:at], Node(new, "Sequential", [], inner), *kept[at:]]
    return f"nested {moved} under {new}"


def insert(root: Node, rng: random.Random) -> str | None:
    """A layer more in a numbered container, which shifts what follows: a dropout, or a small layer with new parameters."""
    places = [node for _, node in root.walk() if len(node.children) >= 2 and all(child.name.isdigit() for child in node.children)]
    if not places:
        return None
    node = rng.choice(places)
    at = rng.randrange(len(node.children))
    first = int(node.children[at].name)
    for child in node.children[at:]:
        child.name = str(int(child.name) + 1)
    fresh = Node(str(first), "Dropout")
    if rng.random() < 0.6:
        fresh = Node(str(first), "Adapter", [Leaf("scale", [rng.choice((5, 7, 11))], "float32", "param", None)])
    node.children.insert(at, fresh)
    return f"inserted {fresh.cls} as number {first} of a {node.cls}"


def delete(root: Node, rng: random.Random) -> str | None:
    """Drop a part that is like no other, or the last layers of a stack."""
    stacks = [node for _, node in root.walk() if len(node.children) >= 3 and all(child.name.isdigit() for child in node.children)]
    if stacks and rng.random() < 0.4:
        node = rng.choice(stacks)
        n = rng.randrange(1, max(2, len(node.children) // 3))
        del node.children[-n:]
        return f"dropped the last {n} of a {node.cls}"
    parts = [(p, c) for _, p in root.walk() for c in p.children if not c.name.isdigit() and (c.leaves or c.children)]
    counts: dict[tuple[object, ...], int] = {}
    for _, child in parts:
        counts[child.signature()] = counts.get(child.signature(), 0) + 1
    unique = [(p, c) for p, c in parts if counts[c.signature()] == 1 and len(list(c.walk())) < 30]
    if not unique:
        return None
    parent, child = rng.choice(unique)
    parent.children.remove(child)
    return f"dropped {child.name}"


def reorder(root: Node, rng: random.Random) -> str | None:
    """Register the children of a module in another order, everywhere; equals keep theirs."""
    groups = [nodes for nodes in by_template(root).values() if len(nodes[0].children) >= 2 and not nodes[0].children[0].name.isdigit()]
    groups = [nodes for nodes in groups if len({child.signature() for child in nodes[0].children}) > 1]
    if not groups:
        return None
    for nodes in rng.sample(groups, min(len(groups), rng.choice((1, 2, 4)))):
        ranks = {child.name: rng.random() for child in nodes[0].children}
        for node in nodes:
            order = sorted(node.children, key=lambda child: ranks.get(child.name, 0.5))
            equals = {child.signature(): [c for c in node.children if c.signature() == child.signature()] for child in order}
            node.children = [equals[child.signature()].pop(0) for child in order]
    return "registered siblings in another order"


def shift(root: Node, rng: random.Random) -> str | None:
    """Count from one, or write the number into the name (`layers.3` → `layer3`)."""
    places = [(p, c) for _, p in root.walk() for c in p.children if len(c.children) >= 2 and all(g.name.isdigit() for g in c.children)]
    if not places:
        return None
    names = sorted({child.name for _, child in places})
    name, inline, offset = rng.choice(names), rng.random() < 0.4, rng.choice((0, 1))
    for parent, child in places:
        if child.name != name:
            continue
        for grand in child.children:
            grand.name = f"{name.rstrip('s')}{int(grand.name) + offset}" if inline else str(int(grand.name) + 1)
        if inline and not ({grand.name for grand in child.children} & (parent.names() - {name})):
            at = parent.children.index(child)
            parent.children[at : at + 1] = child.children
    return f"numbers of {name} {'written into the names' if inline else 'count from one'}"


def fuse(root: Node, rng: random.Random) -> str | None:
    """Make one projection of q, k and v, or of gate and up, everywhere."""
    families = [((Q, K, V), ("qkv", "qkv_proj", "Wqkv", "in_proj", "c_attn")), ((GATE, UP), ("gate_up_proj", "w13", "gate_up"))]
    rng.shuffle(families)
    for words, names in families:
        new = rng.choice(names)
        done = sum(_fuse_in(node, words, new) for _, node in root.walk())
        if done:
            return f"fused {len(words)} projections to {new} in {done} places"
    return None


def _fuse_in(node: Node, words: Iterable[set[str]], new: str) -> bool:
    found = [next((child for child in node.children if child.name in names), None) for names in words]
    parts = [part for part in found if part is not None and not part.children]
    if len(parts) < len(found) or new in node.names() or len({tuple(leaf.name for leaf in part.leaves) for part in parts}) > 1:
        return False
    leaves = [_fused([part.leaves[i] for part in parts]) for i in range(len(parts[0].leaves))]
    if not leaves or any(leaf is None for leaf in leaves):
        return False
    at = min(node.children.index(part) for part in parts)
    node.children = [child for child in node.children if child not in parts]
    node.children.insert(at, Node(new, parts[0].cls, [leaf for leaf in leaves if leaf is not None]))
    return True


def _fused(leaves: list[Leaf]) -> Leaf | None:
    first = leaves[0]
    copies = [leaf.truth["sources"][0] for leaf in leaves if leaf.truth is not None and leaf.truth["op"] == "copy"]
    if len(copies) < len(leaves) or not first.shape or any(leaf.shape[1:] != first.shape[1:] for leaf in leaves):
        return None
    shape = [sum(leaf.shape[0] for leaf in leaves), *first.shape[1:]]
    return Leaf(first.name, shape, first.dtype, first.kind, {"op": "concat", "dim": 0, "sources": copies})


def split(root: Node, rng: random.Random) -> str | None:
    """Make three projections of a fused one, everywhere."""
    words = rng.choice((("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("wq", "wk", "wv")))
    done = 0
    for _, node in root.walk():
        for child in [child for child in node.children if child.name in FUSED and child.leaves and not child.children]:
            parts = [Node(word, child.cls, _thirds(child.leaves, i)) for i, word in enumerate(words)]
            if set(words) & node.names() or len(parts[0].leaves) < len(child.leaves):
                continue
            at = node.children.index(child)
            node.children[at : at + 1] = parts
            done += 1
    return f"split q, k, v into {', '.join(words)} in {done} places" if done else None


def _thirds(leaves: Iterable[Leaf], i: int) -> list[Leaf]:
    parts = []
    for leaf in leaves:
        axis = next((d for d, n in enumerate(leaf.shape) if n % 3 == 0 and (len(leaf.shape) == 1 or n == 3 * leaf.shape[1 - d])), None)
        if leaf.truth is None or leaf.truth["op"] != "copy" or axis is None or len(leaf.shape) > 2:
            continue
        n = leaf.shape[axis] // 3
        truth = {"op": "slice", "dim": axis, "start": i * n, "length": n, "sources": leaf.truth["sources"]}
        parts.append(Leaf(leaf.name, [*leaf.shape[:axis], n, *leaf.shape[axis + 1 :]], leaf.dtype, leaf.kind, truth))
    return parts


def stack(root: Node, rng: random.Random) -> str | None:
    """Keep numbered experts as one parameter each, with the number as its first axis."""
    name, done = rng.choice(("{}", "{}_weight", "w_{}")), 0
    for _, node in root.walk():
        experts = node.children
        if "experts" not in node.name.lower() or len(experts) < 2 or not all(e.name.isdigit() for e in experts):
            continue
        lists = [[(child.name, leaf) for child in e.children for leaf in child.leaves] for e in experts]
        if len({tuple((part, leaf.name, tuple(leaf.shape)) for part, leaf in leaves) for leaves in lists}) > 1:
            continue
        node.children, columns = [], list(zip(*lists, strict=True))
        node.leaves += [_stacked(name.format(column[0][0]), [leaf for _, leaf in column]) for column in columns if column[0][1].truth]
        done += 1
    return f"stacked the experts in {done} places" if done else None


def _stacked(name: str, leaves: list[Leaf]) -> Leaf:
    first = leaves[0]
    sources = [leaf.truth["sources"][0] for leaf in leaves if leaf.truth is not None]
    return Leaf(name, [len(leaves), *first.shape], first.dtype, first.kind, {"op": "stack", "dim": 0, "sources": sources})


def transpose(root: Node, rng: random.Random) -> str | None:
    """Keep the weights of every linear layer the other way round, as Conv1D and JAX do."""
    oblong = (
        node.cls
        for _, node in root.walk()
        for leaf in node.leaves
        if leaf.name == "weight" and len(set(leaf.shape)) == len(leaf.shape) == 2
    )
    kinds = sorted({cls for cls in oblong if "Embedding" not in cls})
    if not kinds:
        return None
    cls, done = rng.choice(kinds), 0
    for _, node in root.walk():
        for leaf in node.leaves if node.cls == cls else ():
            if leaf.name == "weight" and len(leaf.shape) == 2 and leaf.truth is not None and leaf.truth["op"] == "copy":
                leaf.shape = leaf.shape[::-1]
                leaf.truth = {"op": "permute", "dims": [1, 0], "sources": leaf.truth["sources"]}
                done += 1
    return f"transposed {done} weights of {cls}" if done else None


def _names(root: Node) -> set[str]:
    return {node.name for _, node in root.walk() if node.name and not node.name.isdigit()}


def _rename(root: Node, changes: dict[str, str]) -> str | None:
    done = 0
    for _, parent in root.walk():
        for child in parent.children:
            new = changes.get(child.name, child.name)
            if new != child.name and new not in parent.names():
                child.name, done = new, done + 1
    return f"renamed {len(changes)} names in {done} places" if done else None


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _spaced(name: str) -> str:
    return "".join(f"_{c}" if c.isdigit() and before.isalpha() else c for before, c in zip(" " + name, name, strict=False))


def _short(name: str) -> str:
    return name[:1] + "".join(c for c in name[1:] if c not in "aeiou") if len(name) > 4 else name


def _word(rng: random.Random) -> str:
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3)))]
    return "".join(syllables) + rng.choice(("", "0", "1", "2"))


REFACTORINGS: dict[str, Refactoring] = {
    f.__name__: f for f in (synonyms, style, nonsense, wrap, flatten, nest, insert, delete, reorder, shift, fuse, split, stack, transpose)
}
