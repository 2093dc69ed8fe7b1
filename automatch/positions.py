"""Which checkpoint key stands at each position of a list that is ordered like the checkpoint's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from automatch.mapping import KeyMapping
from automatch.specs import StateSpec, TensorSpec

Shape = tuple[int, ...]


class NoUniqueOrder(Exception):  # noqa: N818 - it is caught and reworded by its callers
    """There is no way, or more than one, to lay the keys onto the positions."""


def place_keys(mapping: KeyMapping, targets: Iterable[str], shapes: Sequence[Shape | None]) -> dict[str, int]:
    """Lay checkpoint keys onto positions, in the checkpoint's order.

    Args:
        mapping: what feeds each model key; its source spec gives order and shapes.
        targets: model keys whose sources must stand somewhere in the list.
        shapes: the parameter's shape at each position, None where it is not known (any shape then fits).

    Returns:
        The position of each source of ``targets``. Keys that feed nothing may stand between them.

    Raises:
        NoUniqueOrder: no order fits, or several do.
    """
    spec = mapping.source.spec
    if spec is None:
        raise NoUniqueOrder("the mapping does not hold the checkpoint's keys")
    wanted = set(targets)
    model = mapping.target.spec
    required: set[str] = set()
    elsewhere: set[str] = set()
    for match in mapping.matches:
        (required if first_key(model, match.target) in wanted else elsewhere).update(first_key(spec, key) for key in match.sources)
    keys = [t for t in spec if t.alias_of is None and (t.key in required or (t.key not in elsewhere and _may_be_parameter(t)))]
    if len(required) == len(shapes) and len(keys) != len(required):
        keys = [t for t in keys if t.key in required]  # nothing else has room
    if len(required) > len(shapes):
        raise NoUniqueOrder(f"{len(shapes)} positions, but {len(required)} keys")
    return _align(keys, required, shapes)


def first_key(spec: StateSpec | None, key: str) -> str:
    """The key under which a tensor is listed first: the key itself, unless it is tied to an earlier one."""
    return key if spec is None or key not in spec else spec[key].alias_of or key


def _may_be_parameter(tensor: TensorSpec) -> bool:
    leaf = tensor.key.rpartition(".")[2]
    return tensor.dtype.startswith(("float", "bfloat", "complex")) and leaf not in ("running_mean", "running_var", "inv_freq")


def _align(keys: Sequence[TensorSpec], required: set[str], shapes: Sequence[Shape | None]) -> dict[str, int]:
    """Keys in order onto positions in order; every position is taken, and optional keys may be left out."""
    after = [{len(shapes)}]  # after[i]: numbers of positions that keys before i may have filled, seen from the end
    for tensor in reversed(keys):
        after.append(_before(tensor, required, shapes, after[-1]))
    after.reverse()
    reached = {0}
    placed: dict[str, int] = {}
    for i, tensor in enumerate(keys):
        reached &= after[i]
        takes = {at for at in reached if _fits(tensor, shapes, at) and at + 1 in after[i + 1]}
        skips = set() if tensor.key in required else {at for at in reached if at in after[i + 1]}
        if tensor.key in required:
            if len(takes) != 1:
                found = "no position" if not takes else f"{len(takes)} positions"
                raise NoUniqueOrder(f"{found} for {tensor.key!r}")
            placed[tensor.key] = next(iter(takes))
        reached = {at + 1 for at in takes} | skips
    if len(shapes) not in reached:
        raise NoUniqueOrder(f"{len(shapes)} positions, but {len(required)} keys")
    return placed


def _before(tensor: TensorSpec, required: set[str], shapes: Sequence[Shape | None], after: set[int]) -> set[int]:
    found = {at - 1 for at in after if at > 0 and _fits(tensor, shapes, at - 1)}
    return found if tensor.key in required else found | after


def _fits(tensor: TensorSpec, shapes: Sequence[Shape | None], at: int) -> bool:
    return at < len(shapes) and shapes[at] in (None, tensor.shape)
