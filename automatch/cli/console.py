"""What a command writes: its report to stdout, everything else to stderr, and from rank 0 alone under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import click


def is_main_rank() -> bool:
    """Whether this process is the one that speaks (rank 0, or no torchrun at all)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Write a line of the report to stdout."""
    if is_main_rank():
        click.echo(text)


def say_json(data: Any) -> None:
    """Write ``data`` to stdout as JSON."""
    say(json.dumps(data, indent=1, ensure_ascii=True))


def note(text: str) -> None:
    """Write a line to stderr: what was written where, a warning."""
    if is_main_rank():
        click.echo(text, err=True)


def printable(text: str) -> str:
    """``text`` with control characters escaped: a key of a hostile file must not drive the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


def width() -> int:
    """The columns of a report: the terminal's (60 to 120), or 80 in a pipe."""
    return min(120, max(60, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else 80


@contextmanager
def working(text: str) -> Generator[None]:
    """Show a spinner with the time elapsed on stderr while the block runs, where there is a terminal to show it."""
    if not (is_main_rank() and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(text, total=None)
        yield
