"""``automatch check``: does today's model still load the reference checkpoint?"""

from __future__ import annotations

import click

from automatch.cli import OK, REFUSED, console
from automatch.cli.models import model_options, resolve_model


@click.command("check")
@click.argument("ckpt", type=click.Path())
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--trust", is_flag=True, help="Allow a pickle to execute code while it is read.")
@click.pass_context
def command(ctx: click.Context, ckpt: str, model: str, kwargs: str, as_json: bool, trust: bool) -> None:
    """Say whether the model still loads CKPT, as it is or through accepted migrations; for continuous integration.

    Nothing is guessed and nothing is loaded. Exits with 1 if it does not.
    """
    from automatch import ModelError, StateSpec
    from automatch.checking import check

    built = resolve_model(model, kwargs)
    if isinstance(built, StateSpec):
        raise ModelError(f"{model} is a checkpoint; name the model as package.module:factory or file.py:Factory")
    result = check(built, ckpt, trust=trust)
    if as_json:
        console.say_json(result._asdict())
    else:
        console.say(f"{result.how}: {result.text}")
    ctx.exit(OK if result.ok else REFUSED)
