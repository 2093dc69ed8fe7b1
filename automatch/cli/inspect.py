"""``automatch inspect``: what a checkpoint or a model holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from automatch.cli import console

if TYPE_CHECKING:
    from automatch import StateSpec


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
    from automatch.report.wording import count, short

    numel = sum(tensor.numel for tensor in spec if tensor.alias_of is None)
    nested = f", under {short('.'.join(spec.wrapper))}" if spec.wrapper else ""
    console.say(f"{short(spec.origin)}: {count(len(spec), 'tensor')}, {count(numel, 'element')}{nested}")
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
    """One line per key, or per group of keys with one shape that differ in an index or in the last word alone."""
    from automatch.report.collapse import collapse
    from automatch.report.wording import shape_text, short

    groups: dict[tuple[tuple[int, ...], str, str | None], list[str]] = {}
    for position, tensor in enumerate(spec):
        alone = None if folded and tensor.alias_of is None else str(position)
        groups.setdefault((tensor.shape, tensor.dtype, alone), []).append(tensor.key)
    place = {key: position for position, key in enumerate(spec.keys)}
    folds = [(shape, dtype, fold) for (shape, dtype, _), keys in groups.items() for fold in collapse(keys)]
    folds.sort(key=lambda line: place[line[2].keys[0]])
    wide = max((len(shape_text(shape)) for shape, _, _ in folds), default=0)
    for shape, dtype, fold in folds:
        alias = spec[fold.keys[0]].alias_of
        times = f" ×{len(fold.keys)}" if len(fold.keys) > 1 else ""
        yield f"  {shape_text(shape):>{wide}}  {dtype:8}  {short(fold.template)}{times}{f' = {short(alias)}' if alias else ''}"
