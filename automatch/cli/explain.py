"""``automatch explain``: what a pasted loading error says."""

from __future__ import annotations

from dataclasses import asdict
from typing import TextIO

import click

from automatch.cli import console


@click.command("explain")
@click.argument("message", type=click.File(encoding="utf-8", errors="replace"), default="-")
@click.option("--json", "as_json", is_flag=True, help="Print causes, pairs and code as JSON.")
@click.pass_context
def command(ctx: click.Context, message: TextIO, as_json: bool) -> None:
    """Explain a load_state_dict error: its causes, what names show of the mapping, and code to paste.

    MESSAGE is a file with the text, or - (the default) for stdin: paste the error and press Ctrl-D.

    Exits with 1 where the text alone does not tell.
    """
    from automatch.explain import explain

    if message.isatty():
        console.note("Paste the error message, then press Ctrl-D:")
    explanation = explain(message.read())
    if as_json:
        causes = [asdict(cause) for cause in explanation.causes]
        pairs = [{"change": kind, "source": source, "target": target} for kind, source, target in explanation.pairs]
        console.say_json({"causes": causes, "pairs": pairs, "code": explanation.code})
    else:
        for line in str(explanation).split("\n"):
            console.say("".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line))
    ctx.exit(1 if explanation.causes[0].kind == "unknown" else 0)
