"""``automatch demo``: a checkpoint, its class refactored, and the way back."""

from __future__ import annotations

from pathlib import Path

import click

from automatch.cli import console


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
def demo(output: Path, epochs: int) -> None:
    """Train a small network, refactor its class, and load the old checkpoint into the new one. Takes some seconds."""
    from automatch.demo import run

    run(output, epochs=epochs, say=console.say, working=console.working)
