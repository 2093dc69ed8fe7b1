"""``automatch apply``: write the checkpoint under the model's keys."""

from __future__ import annotations

from pathlib import Path

import click

from automatch.cli import REFUSED, console
from automatch.cli.propose import plan_of, unfed_keys


@click.command()
@click.argument("ckpt", type=click.Path())
@click.option("--mapping", required=True, type=click.Path(), help="The mapping: what `propose -o` or a review wrote.")
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="A .safetensors, .pt, .pth, .ckpt or .bin file, or a new folder."
)
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Least confidence of a match that is applied."
)
@click.option("--partial", is_flag=True, help="Write it although parameters of the model stay without a source.")
@click.option("--verify", is_flag=True, help="Read the output again and compare every tensor with its source.")
@click.option("--trust", is_flag=True, help="Allow a pickle to execute code while it is read.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.pass_context
def apply(
    ctx: click.Context, ckpt: str, mapping: str, output: Path, threshold: float, partial: bool, verify: bool, trust: bool, as_json: bool
) -> None:
    """Write the tensors of CKPT under the model's keys, converted as a mapping says.

    Tensor by tensor, also for checkpoints larger than memory; the output is whole or absent. Refuses (1) if a parameter
    of the model would stay without a source, unless --partial is given.
    """
    from automatch import KeyMapping
    from automatch.report.wording import count, short

    whole = KeyMapping.load(mapping)
    kept = plan_of(whole, threshold)
    unfed = unfed_keys(kept)
    if unfed and not partial:
        listed = [*(f"  {short(key)}" for key in unfed[:20]), *([f"  and {len(unfed) - 20} more"] if len(unfed) > 20 else [])]
        reason = f"{count(len(unfed), 'tensor')} of the model would stay without a source; review the mapping, or give --partial:"
        console.note("\n".join([f"Refused: {reason}", *listed]))
        ctx.exit(REFUSED)
    with console.transferring(f"Writing {output}") as progress:
        done = kept.convert(ckpt, output, verify=verify, progress=progress, trust=trust)
    for text in done.notes:
        console.note(f"Note: {text}")
    if as_json:
        console.say_json({**done._asdict(), "path": str(done.path), "withheld": len(whole) - len(kept), "missing": kept.missing_keys})
        return
    console.say(f"{done.path}: {count(done.n_keys, 'tensor')}, {count(done.n_bytes, 'byte')}{', verified' if verify else ''}")
    if kept.missing_keys:
        console.note(
            f"Warning: {count(len(kept.missing_keys), 'key')} of the model not in it, {len(whole) - len(kept)} withheld as not sure enough"
        )
