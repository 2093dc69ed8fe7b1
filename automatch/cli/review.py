"""``automatch review``: the page that takes a person's decisions, served on this machine alone."""

from __future__ import annotations

from pathlib import Path

import click

from automatch.cli import OK, REFUSED, console
from automatch.cli.models import model_options, resolve_model
from automatch.cli.propose import plan_of, unfed_keys


@click.command()
@click.argument("ckpt", type=click.Path())
@model_options
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("mapping.json"),
    show_default=True,
    help="Where the page writes the decided mapping.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; any free one by default.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option("--trust", is_flag=True, help="Allow a pickle to execute code while it is read.")
@click.pass_context
def review(ctx: click.Context, ckpt: str, model: str, kwargs: str, output: Path, port: int, no_browser: bool, trust: bool) -> None:
    """Review a proposal in the browser: accept, reject, re-point, answer; the page writes the mapping.

    Ends with Ctrl-C; exits with 0 if the mapping as last saved would load, else with 1.
    """
    from automatch import propose_mapping
    from automatch.mapping import CONFIDENT
    from automatch.review_server import review as serve

    with console.working(f"Matching {ckpt} with {model}"):
        mapping = propose_mapping(resolve_model(model, kwargs), ckpt, trust=trust)
    console.note(f"Decisions are written to {output}; Ctrl-C ends the review.")
    decided = serve(mapping, output, port=port, open_browser=not no_browser, announce=console.say)
    ctx.exit(REFUSED if decided.questions or unfed_keys(plan_of(decided, CONFIDENT)) else OK)
