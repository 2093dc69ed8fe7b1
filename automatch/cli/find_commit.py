"""``automatch find-commit``: the commit whose model class a checkpoint was saved from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from automatch.cli import console

if TYPE_CHECKING:
    from automatch.find_commit import Fit, Search

_WARNING = "This builds old versions of the model, which runs the old code of this repository on this machine."


@click.command("find-commit")
@click.argument("ckpt", type=click.Path())
@click.option(
    "--factory", "-f", required=True, metavar="FACTORY", help="Today's name of the model: `package.module:factory` or `file.py:Factory`."
)
@click.option(
    "--repo",
    type=click.Path(file_okay=False),
    default=".",
    show_default=True,
    help="A folder inside the repository; FACTORY is looked for below it first.",
)
@click.option("--kwargs", metavar="JSON", default="{}", help="Arguments of the factory, e.g. '{\"classes\": 3}'.")
@click.option("--time-limit", type=click.FloatRange(min=1), default=60.0, show_default=True, help="Seconds that one version may take.")
@click.option("--everywhere", is_flag=True, help="Search all branches and tags, not only what led to HEAD.")
@click.option("--yes", is_flag=True, help="Agree to running the old code.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--trust", is_flag=True, help="Allow a pickle to execute code while it is read.")
@click.pass_context
def command(
    ctx: click.Context,
    ckpt: str,
    factory: str,
    repo: str,
    kwargs: str,
    time_limit: float,
    everywhere: bool,
    yes: bool,
    as_json: bool,
    trust: bool,
) -> None:
    """Search the git history for the version of the model that CKPT was saved from, newest first.

    Follows the class where it moved to another file or was renamed. The working tree is not touched. Building old versions runs
    your own old code, so this asks first (or takes --yes).

    Exits with 0 for an exact fit, with 1 if there is only a closest one or none.
    """
    from automatch import open_checkpoint
    from automatch.find_commit import find_commit

    if not yes:
        console.note(_WARNING)
        if not sys.stdin.isatty():
            raise click.UsageError("give --yes to agree")
        click.confirm("Go on?", abort=True, err=True)
    with open_checkpoint(ckpt, trust=trust) as checkpoint, _progress() as progress:
        search = find_commit(
            checkpoint,
            factory,
            repo,
            run_old_code=True,
            kwargs=_arguments(kwargs),
            time_limit=time_limit,
            everywhere=everywhere,
            progress=progress,
        )
    if as_json:
        console.say_json(_data(search))
    else:
        for line in _lines(search):
            console.say("".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line))
    ctx.exit(0 if search.best is not None and search.best.exact else 1)


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}", param_hint="--kwargs") from error
    if not isinstance(arguments, dict):
        raise click.BadParameter(f"{text!r} is not a JSON object", param_hint="--kwargs")
    return arguments


@contextmanager
def _progress() -> Generator[Callable[[int, int, Fit], None] | None]:
    """A bar on stderr where there is a terminal to show it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Commits", total=None)
        yield lambda done, total, fit: bar.update(task, completed=done, total=total, description=fit.commits[0].id[:10])


def _lines(search: Search) -> Generator[str]:
    broken = sum(bool(fit.error) for fit in search.tried)
    yield (
        f"{search.n_commits} commits; {len(search.tried)} distinct versions of the model's code were tried, {broken} could not be built, "
        f"{sum(fit.seconds for fit in search.tried) / max(1, len(search.tried)):.1f} s each."
    )
    if search.shallow and not (search.best and search.best.exact):
        yield "This clone is shallow: older commits are not in it (git fetch --unshallow)."
    fit = search.best
    if fit is None:
        yield "No version could be built. The last error: " + (search.tried[-1].error if search.tried else "there was none to try")
        return
    newest, oldest = fit.commits[0], fit.commits[-1]
    yield f"{'Exact fit' if fit.exact else f'Closest, {fit.score:.0%} of all keys'}: {newest.id[:10]} {newest.date[:10]} {newest.subject}"
    if newest != oldest:
        yield f"  the same code since {oldest.id[:10]} {oldest.date[:10]} {oldest.subject} ({len(fit.commits)} commits)"
    yield f"  built as {fit.factory}"
    if fit.prefix:
        yield f"  after taking {fit.prefix!r} off the checkpoint's keys"
    for title, keys in (("missing", fit.missing), ("unexpected", fit.unexpected), ("other shape", fit.mismatched)):
        if keys:
            yield f"  {title}: {', '.join(keys[:8])}" + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def _data(search: Search) -> dict[str, Any]:
    tried = [
        {
            "commits": [commit.id for commit in fit.commits],
            "subject": fit.commits[0].subject,
            "exact": fit.exact,
            "score": round(fit.score, 6),
            "missing": list(fit.missing),
            "unexpected": list(fit.unexpected),
            "mismatched": list(fit.mismatched),
            "prefix": fit.prefix,
            "factory": fit.factory,
            "error": fit.error,
            "seconds": round(fit.seconds, 3),
        }
        for fit in search.tried
    ]
    best = None if search.best is None else search.tried.index(search.best)
    return {"commits": search.n_commits, "shallow": search.shallow, "best": best, "tried": tried}
