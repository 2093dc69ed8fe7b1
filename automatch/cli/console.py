"""What a command writes: its report to stdout, everything else to stderr, and from rank 0 alone under torchrun."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from automatch import KeyMapping


def is_main_rank() -> bool:
    """Whether this process is the one that speaks and writes: rank 0 of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


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


def say_report(mapping: KeyMapping, *, all_keys: bool = False) -> None:
    """Write the report to stdout: as wide as the terminal and in colour where there is one, else 80 columns of text."""
    if not is_main_rank():
        return
    if not sys.stdout.isatty():
        click.echo(mapping.report(all_keys=all_keys), nl=False)
        return
    from automatch.report.terminal import print_report

    print_report(mapping, all_keys=all_keys)


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


@contextmanager
def transferring(text: str) -> Generator[Callable[[int, int], None]]:
    """Give a function of (bytes done, bytes in all) that draws a bar with bytes, speed and time left on stderr."""
    if not (is_main_rank() and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
