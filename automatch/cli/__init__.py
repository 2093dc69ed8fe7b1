"""The command line. A command is imported when it is called for, so that ``automatch --help`` answers at once."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from automatch.errors import AutomatchError, LoadError

OK, REFUSED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# name -> module:object. A command's module may import click and the standard library at its top, nothing heavier.
COMMANDS = {
    "propose": "automatch.cli.propose:propose",
    "review": "automatch.cli.review:review",
    "apply": "automatch.cli.apply:apply",
    "convert-distributed": "automatch.cli.convert_distributed:command",
    "accept": "automatch.cli.accept:command",
    "check": "automatch.cli.check:command",
    "snapshot": "automatch.cli.snapshot:command",
    "export": "automatch.cli.export:command",
    "explain": "automatch.cli.explain:command",
    "find-commit": "automatch.cli.find_commit:command",
    "inspect": "automatch.cli.inspect:inspect",
    "demo": "automatch.cli.demo:demo",
}

EPILOG = """Exit codes: 0 all is well; 1 refused, or something is left for a person to decide; 2 wrong usage or bad
input; 130 interrupted. Reports go to stdout; progress and warnings go to stderr."""


class _Refusal(click.ClickException):
    """Loading was refused; a message instead of a traceback."""

    exit_code = REFUSED


class _BadInput(click.ClickException):
    """Input that automatch cannot work with; a message instead of a traceback."""

    exit_code = BAD_INPUT


class LazyGroup(click.Group):
    """A group whose commands live in `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        return getattr(import_module(module), name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LoadError as error:
            raise _Refusal(str(error)) from error
        except AutomatchError as error:
            raise _BadInput(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from automatch import __version__

        click.echo(f"automatch {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit.")
def main() -> None:
    """This checkpoint does not load into this model: find out which tensor goes where."""
