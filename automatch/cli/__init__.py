"""The command line. A command is imported when it is called for, so that ``automatch --help`` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

import click

from automatch.cli.console import is_main_rank
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
TOGETHER = {"convert-distributed"}  # every rank of torchrun takes part; all other commands are rank 0's

EPILOG = """Exit codes: 0 all is well; 1 refused, or something is left for a person to decide; 2 wrong usage or bad
input; 130 interrupted. Reports go to stdout; progress and warnings go to stderr. Under torchrun, rank 0
alone speaks and writes; convert-distributed shares the work among all ranks."""


class _Refusal(click.ClickException):
    """Loading was refused; a message instead of a traceback."""

    exit_code = REFUSED


class _BadInput(click.ClickException):
    """Input that automatch cannot work with; a message instead of a traceback."""

    exit_code = BAD_INPUT


class LazyGroup(click.Group):
    """A group whose commands live in `COMMANDS`."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        if is_main_rank():
            return super().main(args, *others, **settings)
        return self._follow(sys.argv[1:] if args is None else list(args))

    def _follow(self, args: list[str]) -> NoReturn:
        """What ranks other than 0 do: their share of the work, if there is one, and that silently."""
        if next((arg for arg in args if not arg.startswith("-")), None) not in TOGETHER:
            sys.exit(OK)
        try:
            with redirect_stdout(None):
                sys.exit(super().main(args, standalone_mode=False))
        except click.ClickException as error:
            if isinstance(error, _Refusal):  # a command raises it here only where rank 0 is lost and cannot say it
                error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(INTERRUPTED)

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
