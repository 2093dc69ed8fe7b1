"""``automatch export``: a mapping as code for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from automatch.cli import console

# The names of `automatch.export.KINDS`, which is not imported before the command runs.
KINDS = ("script", "revise_keys", "key_mapping", "weight_conversions", "pre_hook", "on_load_checkpoint")


@click.command("export")
@click.argument("mapping", type=click.Path())
@click.option("--kind", "-k", type=click.Choice(KINDS), default="script", show_default=True, help="What to write.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write it here instead of to stdout.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Least confidence of a match that is exported."
)
def command(mapping: str, kind: str, output: Path | None, threshold: float) -> None:
    """Write MAPPING (what `propose -o` or a review wrote) as code that does not need automatch.

    \b
    script              convert_checkpoint_keys(state_dict), a readable function
    revise_keys         the argument of mmengine's load_checkpoint
    key_mapping         the argument of transformers' from_pretrained
    weight_conversions  transformers' WeightRenaming and WeightConverter
    pre_hook            a load_state_dict pre-hook for any PyTorch module
    on_load_checkpoint  a mixin for a LightningModule
    """
    from automatch import KeyMapping

    whole = KeyMapping.load(mapping)
    kept = whole.confident(threshold)
    text = kept.export(kind, output)
    if len(kept) < len(whole):
        console.note(f"{len(whole) - len(kept)} of {len(whole)} matches are below confidence {threshold} and left out.")
    if output:
        console.note(f"Export written to {output}")
    else:
        console.say(text.rstrip("\n"))
