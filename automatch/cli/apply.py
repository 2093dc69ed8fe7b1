"""``automatch apply``: write the checkpoint under the model's keys."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import click

from automatch.cli import REFUSED, console
from automatch.cli.propose import unfed_keys

if TYPE_CHECKING:
    import torch


@click.command()
@click.argument("ckpt", type=click.Path())
@click.option("--mapping", required=True, type=click.Path(), help="The mapping: what `propose -o` or a review wrote.")
@click.option(
    "--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The new checkpoint (.safetensors or .pt)."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    help="Least confidence of a match that is applied.",
)
@click.option("--partial", is_flag=True, help="Write it although parameters of the model stay without a source.")
@click.pass_context
def apply(ctx: click.Context, ckpt: str, mapping: str, output: Path, threshold: float, partial: bool) -> None:
    """Write the tensors of CKPT under the model's keys, converted as a mapping says.

    Refuses (1) if a parameter of the model would stay without a source, unless --partial is given.
    """
    from automatch import KeyMapping

    whole = KeyMapping.load(mapping)
    kept = whole.confident(threshold)
    unfed = unfed_keys(kept)
    if unfed and not partial:
        listed = "\n".join(f"  {key}" for key in unfed[:20]) + (f"\n  and {len(unfed) - 20} more" if len(unfed) > 20 else "")
        console.note(f"Refused: {len(unfed)} parameters would stay without a source; review the mapping, or give --partial:\n{listed}")
        ctx.exit(REFUSED)
    with console.working(f"Writing {output}"):
        _save(kept.apply(ckpt), output)
    console.say(f"{len(kept)} tensors written to {output} ({len(whole) - len(kept)} withheld, {len(kept.missing_keys)} missing)")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from automatch.files import write_atomically

    if path.suffix == ".safetensors":
        from safetensors.torch import save

        own = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
        write_atomically(path, save(own, metadata={"format": "pt"}))
        return
    import torch

    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomically(path, buffer.getvalue())
