"""One rank of a world that torchrun starts: resumes the checkpoint in FOLDER, and writes there what came of it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from refactored import batches, modules

import automatch


def resumed(model: Any, folder: Path, callbacks: list[Any]) -> dict[str, Any]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=6, accelerator="cpu", devices=2, strategy="ddp", default_root_dir=folder, callbacks=callbacks, **quiet)
    trainer.fit(model, batches(), ckpt_path=folder / "v1.ckpt")
    x = torch.ones(3, 6, dtype=torch.float64)
    state = trainer.optimizers[0].state_dict()
    return {
        "losses": model.losses,
        "output": model.eval()(x).tolist(),
        "lr": [group["lr"] for group in state["param_groups"]],
        "world": trainer.world_size,
        "steps": trainer.global_step,
    }


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    v1, v2 = modules(pl, "adam", 2)
    mixed = modules(pl, "adam", 2, automatch.lightning.AutoMatchMixin)[1]
    mixed.automatch_options = {"mapping": folder / "mapping.json"}
    found: dict[str, Any] = {
        "unchanged": resumed(v1(), folder, []),
        "callback": resumed(v2(), folder, [automatch.lightning.AutoMatch(mapping=folder / "mapping.json")]),
        "mixin": resumed(mixed(), folder, []),
    }
    try:
        resumed(v2(), folder, [automatch.lightning.AutoMatch(mapping=folder / "partial.json")])
    except automatch.LoadError as error:
        found["refused"] = str(error)
    torch.distributed.barrier()
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Gloo's threads may take the interpreter's lock while it is being finalised, which aborts or hangs the process.
    os._exit(0)
