"""``automatch convert-distributed``: convert a checkpoint with many ranks, under torchrun or alone."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from automatch.cli import BAD_INPUT, REFUSED, console
from automatch.cli.propose import plan_of, unfed_keys

if TYPE_CHECKING:
    from automatch import KeyMapping

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size(text: str) -> int:
    """A number of bytes from ``500MB``, ``2GiB`` or the number itself."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b?)", text.strip().lower())
    unit = found[2].removesuffix("b") if found else "?"
    if found is None or unit not in _UNITS:
        raise click.BadParameter(f"{text!r} is not a size; write e.g. 500MB or 2GiB")
    return int(float(found[1]) * _UNITS[unit])


@click.command("convert-distributed")
@click.argument("ckpt", type=click.Path(exists=True))
@click.option(
    "--mapping", type=click.Path(exists=True), help="The mapping: what `propose -o` or a review wrote. Without it keys stay as they are."
)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The new directory.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Least confidence of a match that is applied."
)
@click.option("--partial", is_flag=True, help="Write it although parameters of the model stay without a source.")
@click.option("--to", type=click.Choice(["safetensors", "dcp"]), default="safetensors", show_default=True, help="The format to write.")
@click.option("--max-shard-size", type=size, default="2GB", show_default=True, help="The largest file; a larger tensor has one to itself.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds of silence after which a rank counts as lost.",
)
@click.option("--trust", is_flag=True, help="Allow a pickle to execute code while it is read.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    ckpt: str,
    mapping: str | None,
    output: Path,
    threshold: float,
    partial: bool,
    to: Any,
    max_shard_size: int,
    timeout: float,
    trust: bool,
    as_json: bool,
) -> None:
    """Write CKPT, a torch.distributed.checkpoint directory or a folder of safetensors files, under a mapping's keys.

    Every rank of torchrun writes its share of the bytes. Started again after a crash, with any number of ranks, it goes on
    with what is missing; the output gets its name when it is complete.
    """
    from automatch.distributed import RankLostError, convert
    from automatch.errors import AutomatchError, LoadError
    from automatch.report.wording import count

    kept = _kept(ctx, mapping, threshold, partial) if mapping else None
    with _process_group(), console.transferring(f"Writing {output}") as progress:
        try:
            done = convert(ckpt, output, kept, to=to, max_shard_bytes=max_shard_size, timeout=timeout, trust=trust, progress=progress)
        except AutomatchError as error:
            if console.is_main_rank() or (isinstance(error, RankLostError) and re.search(r"rank 0\b|has died", str(error))):
                raise
            ctx.exit(REFUSED if isinstance(error, LoadError) else BAD_INPUT)  # rank 0 says it for all
    if as_json:
        console.say_json({**done._asdict(), "path": str(done.path), "whole_reads": [read.key for read in done.whole_reads]})
        return
    reused = f", {count(done.n_reused, 'shard')} of an earlier run kept" if done.n_reused else ""
    console.say(f"{done.path}: {count(done.n_tensors, 'tensor')}, {count(done.n_bytes, 'byte')} in {count(done.n_shards, 'shard')}{reused}")
    if done.left_out:
        console.note(f"Note: {count(len(done.left_out), 'entry', 'entries')} of the checkpoint not in it, e.g. {done.left_out[0]!r}")


def _kept(ctx: click.Context, path: str, threshold: float, partial: bool) -> KeyMapping:
    """The matches that are sure; refuses when parameters of the model would have no source."""
    from automatch import KeyMapping
    from automatch.report.wording import count, short

    kept = plan_of(KeyMapping.load(path), threshold)
    unfed = unfed_keys(kept)
    if unfed and not partial:
        listed = "".join(f"\n  {short(key)}" for key in unfed[:20]) + (f"\n  and {len(unfed) - 20} more" if len(unfed) > 20 else "")
        reason = f"{count(len(unfed), 'tensor')} of the model would stay without a source; review the mapping, or give --partial:"
        console.note(f"Refused: {reason}{listed}")
        ctx.exit(REFUSED)
    return kept


@contextmanager
def _process_group() -> Generator[None]:
    """The process group of torchrun, where it has started this process."""
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ:
        yield
        return
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
