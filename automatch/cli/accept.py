"""``automatch accept``: keep a reviewed mapping beside the model's code."""

from __future__ import annotations

from pathlib import Path

import click

from automatch.cli import console
from automatch.cli.models import model_options, resolve_model


@click.command("accept")
@click.argument("mapping", type=click.Path(dir_okay=False, path_type=Path))
@model_options
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Save it here instead of beside the model's code.")
@click.option("--overwrite", is_flag=True, help="Replace a migration between the same two layouts that says something else.")
def command(mapping: Path, model: str, kwargs: str, folder: Path | None, overwrite: bool) -> None:
    """Save a reviewed MAPPING as a migration, so that the model loads its old checkpoint by itself from now on.

    Commit the file that is written. Its questions must have been answered.
    """
    from automatch import KeyMapping, MappingError, StateSpec
    from automatch.apply import check_side
    from automatch.matching import target_spec
    from automatch.migrations import accept

    reviewed = KeyMapping.load(mapping)
    built = resolve_model(model, kwargs)
    check_side(reviewed.target, target_spec(built), "model")
    if isinstance(built, StateSpec) and folder is None:
        raise MappingError(f"{model} is a checkpoint and has no code to put a migration beside; name a --folder")
    path = accept(reviewed, folder or built, overwrite=overwrite)  # type: ignore[arg-type]
    console.say(f"{path}: {len(reviewed)} keys; automatch.load uses it from now on")
