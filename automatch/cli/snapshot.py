"""``automatch snapshot``: what a checkpoint says of the model that made it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from automatch.cli import OK, REFUSED, console

if TYPE_CHECKING:
    from automatch import Snapshot


@click.command("snapshot")
@click.argument("ckpt", type=click.Path())
@click.option("--extract", type=click.Path(file_okay=False, path_type=Path), help="Write the model's source files into this new folder.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.pass_context
def command(ctx: click.Context, ckpt: str, extract: Path | None, as_json: bool) -> None:
    """Show the snapshot inside CKPT: the model's class, commit, library versions, sources and golden batch.

    Nothing in it is executed. Exits with 1 if there is none; `automatch.save_snapshot` and the Lightning callback
    `SaveSnapshot` write it.
    """
    from automatch import read_snapshot

    found = read_snapshot(ckpt)
    if found is None:
        console.note(f"{ckpt} holds no snapshot")
        ctx.exit(REFUSED)
    facts = _facts(found)
    if as_json:
        console.say_json(facts)
    else:
        for name, value in facts.items():
            console.say(f"{name}: {_printable(', '.join(map(str, value)) if isinstance(value, list) else str(value))}")
    if extract:
        console.note(f"{_extract(found.sources, extract)} files written to {extract}; read them before you run them")
    ctx.exit(OK)


def _facts(found: Snapshot) -> dict[str, Any]:
    return {
        "model": found.model,
        "commit": found.commit or "unknown",
        "keys": len(found.spec),
        "fingerprint": found.spec.fingerprint,
        "versions": [f"{name} {version}" for name, version in found.versions.items()],
        "sources": list(found.sources),
        "golden batch": f"{len(found.golden.outputs)} output tensors" if found.golden else "none",
    }


def _printable(text: str) -> str:
    """The text with what steers a terminal written out, as the file may come from anybody."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _extract(sources: dict[str, str], folder: Path) -> int:
    """Write the sources below a new folder; a path that would leave it is an error before anything is written."""
    from automatch import CheckpointError

    paths = {PurePosixPath(name): text for name, text in sources.items()}
    folders = {parent for path in paths for parent in path.parents}
    for name in sources:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
            raise CheckpointError(f"the snapshot names a source file {name!a} outside of its folder; nothing is written")
        if path in folders or not name.isprintable():
            raise CheckpointError(f"the snapshot names a source file {name!a}, which cannot be a file's name here; nothing is written")
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise click.BadParameter(f"{folder} exists already; name a new folder", param_hint="--extract") from error
    for path, text in paths.items():
        target = folder.joinpath(*path.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return len(paths)
