"""``automatch demo``: a checkpoint, its class refactored, and the way back."""

from __future__ import annotations

from pathlib import Path

import click

from automatch.cli import OK, REFUSED, console


@click.command()
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("automatch-demo"),
    show_default=True,
    help="Folder for the checkpoint and the HTML report.",
)
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True, help="Epochs of training.")
@click.pass_context
def demo(ctx: click.Context, output: Path, epochs: int) -> None:
    """Train a small network, refactor its class, load the old checkpoint.

    Takes some seconds and needs no network. Exits with 0 if the metric survives to the last digit and another
    architecture is refused.
    """
    from automatch.demo import run

    result = run(output, epochs=epochs, say=console.say, working=console.working)
    ctx.exit(OK if result.succeeded else REFUSED)
