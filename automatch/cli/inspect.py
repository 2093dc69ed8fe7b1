"""``automatch inspect``: what a checkpoint or a model holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from automatch.cli import console

if TYPE_CHECKING:
    from automatch import StateSpec, TensorSpec

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


@click.command()
@click.argument("target", metavar="CKPT|MODEL")
@click.option("--kwargs", metavar="JSON", default="{}", help="Arguments of a model's factory.")
@click.option("--all", "all_keys", is_flag=True, help="List every key instead of folding indices.")
@click.option("--json", "as_json", is_flag=True, help="Print every entry as JSON.")
@click.option("--trust", is_flag=True, help="Allow a pickle to execute code while it is read.")
def inspect(target: str, kwargs: str, all_keys: bool, as_json: bool, trust: bool) -> None:
    """Show what a checkpoint or a model (package.module:factory, file.py:Factory) holds: keys, shapes, dtypes."""
    with console.working(f"Reading {target}"):
        spec = _spec_of(target, kwargs, trust)
    if as_json:
        entries = [asdict(tensor) for tensor in spec]
        head = {"origin": spec.origin, "wrapper": spec.wrapper, "fingerprint": spec.fingerprint, "notes": spec.notes}
        console.say_json({**head, "entries": entries})
        return
    numel = sum(tensor.numel for tensor in spec if tensor.alias_of is None)
    nested = f", under {'.'.join(spec.wrapper)!r}" if spec.wrapper else ""
    console.say(f"{console.printable(spec.origin)}: {len(spec)} tensors, {numel:,} elements{nested}")
    for row in _rows(spec, folded=not all_keys):
        console.say(row)
    for text in spec.notes:
        console.note(f"Note: {text}")


def _spec_of(target: str, kwargs: str, trust: bool) -> StateSpec:
    from automatch import open_checkpoint
    from automatch.cli.models import is_factory, resolve_model
    from automatch.specs import StateSpec, spec_of_model

    if not is_factory(target):
        with open_checkpoint(target, trust=trust) as checkpoint:
            return checkpoint.spec
    model = resolve_model(target, kwargs)
    return model if isinstance(model, StateSpec) else spec_of_model(model)


def _rows(spec: StateSpec, *, folded: bool) -> Iterable[str]:
    """One line per key, or per run of keys that differ in their indices alone."""
    groups: dict[tuple[str, tuple[int, ...], str, bool], list[TensorSpec]] = {}
    for tensor in spec:
        template = _INDEX.sub("#", tensor.key) if folded else tensor.key
        groups.setdefault((template, tensor.shape, tensor.dtype, tensor.alias_of is None), []).append(tensor)
    for (template, shape, dtype, is_own), members in groups.items():
        key = template if len(members) > 1 else members[0].key
        count = f"  x{len(members)}" if len(members) > 1 else ""
        alias = "" if is_own else f"  alias of {members[0].alias_of}"
        yield console.printable(f"  {key}  {list(shape)} {dtype}{count}{alias}")
