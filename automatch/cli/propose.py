"""``automatch propose``: which checkpoint tensors feed which model key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from automatch.cli import OK, REFUSED, console
from automatch.cli.models import model_options, resolve_model

if TYPE_CHECKING:
    from automatch import KeyMapping


@click.command()
@click.argument("ckpt", type=click.Path())
@model_options
@click.option("--pin", "pins", multiple=True, metavar="KEY=SOURCE", help="Decide what feeds a model key; an empty SOURCE means nothing.")
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Confidence from which a match counts.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write the mapping (JSON) here.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as one HTML file here.")
@click.option("--all", "all_keys", is_flag=True, help="List every key.")
@click.option("--json", "as_json", is_flag=True, help="Print the mapping as JSON instead of the report.")
@click.option("--markdown", is_flag=True, help="Print the report as Markdown, for a pull request.")
@click.option("--trust", is_flag=True, help="Allow a pickle to execute code while it is read.")
@click.pass_context
def propose(
    ctx: click.Context,
    ckpt: str,
    model: str,
    kwargs: str,
    pins: tuple[str, ...],
    threshold: float,
    output: Path | None,
    html: Path | None,
    all_keys: bool,
    as_json: bool,
    markdown: bool,
    trust: bool,
) -> None:
    """Propose which tensors of CKPT feed which key of the model. Nothing is changed.

    Exits with 0 if every parameter of the model is fed with confidence and no question is open, else with 1.
    """
    from automatch import propose_mapping

    with console.working(f"Matching {ckpt} with {model}"):
        mapping = propose_mapping(resolve_model(model, kwargs), ckpt, pins=parse_pins(pins), trust=trust)
    _print(mapping, all_keys=all_keys, as_json=as_json, markdown=markdown)
    if output:
        console.note(f"Mapping written to {mapping.save(output)}")
    if html:
        console.note(f"Report written to {mapping.to_html(html)}")
    ctx.exit(REFUSED if mapping.questions or unfed_keys(plan_of(mapping, threshold)) else OK)


def _print(mapping: KeyMapping, *, all_keys: bool, as_json: bool, markdown: bool) -> None:
    if not as_json and not markdown:
        console.say_report(mapping, all_keys=all_keys)
        return
    if as_json:
        console.say_json(mapping.to_dict())
    else:
        from automatch.report.markdown import render_markdown

        console.say(render_markdown(mapping, all_keys=all_keys))
    for warning in mapping.warnings:
        console.note(f"Warning: {warning}")


def parse_pins(pins: tuple[str, ...]) -> dict[str, str | None]:
    """``KEY=SOURCE`` texts as the ``pins`` of `propose_mapping`."""
    parsed: dict[str, str | None] = {}
    for pin in pins:
        key, equals, source = pin.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pin!r} is not KEY=SOURCE", param_hint="--pin")
        parsed[key] = source or None
    return parsed


def plan_of(mapping: KeyMapping, threshold: float) -> KeyMapping:
    """What would be loaded: decided matches, and sure ones that hang on no open question."""
    from automatch.refusal import without_open_questions

    return without_open_questions(mapping.confident(threshold))


def unfed_keys(mapping: KeyMapping) -> tuple[str, ...]:
    """Model keys that would keep an initial value which training has to replace."""
    from automatch.refusal import needed_keys

    if mapping.target.spec is None:
        return mapping.missing_keys
    return needed_keys(mapping.target.spec, (match.target for match in mapping.matches))
