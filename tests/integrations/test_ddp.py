"""Resuming on several processes, as torchrun starts them: every rank maps the checkpoint for itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from handmade import mapping_of
from refactored import FEEDS, batches, modules

pl = pytest.importorskip("lightning.pytorch")
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]
_SECONDS = 600  # a run takes about ten on a quiet machine: this ends one that waits for ever


def run_two_ranks(folder: Path) -> None:
    script = Path(__file__).with_name("resume_in_ranks.py")
    world = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]  # which picks a free port by itself
    command = [sys.executable, "-m", "torch.distributed.run", *world, str(script), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            code: object = process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            code = f"none after {_SECONDS} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert code == 0, f"exit code {code}\n{(folder / 'log.txt').read_text(errors='replace')[-4000:]}"


def test_ranks_resume_step_for_step_or_refuse_together(tmp_path):
    v1, v2 = modules(pl, "adam", 2)
    pl.seed_everything(7, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(v1(), batches())
    trainer.save_checkpoint(tmp_path / "v1.ckpt")
    mapping = mapping_of(v2(), torch.load(tmp_path / "v1.ckpt", weights_only=False)["state_dict"], FEEDS)
    mapping.save(tmp_path / "mapping.json")
    mapping.decide("head.classifier.weight", None).save(tmp_path / "partial.json")
    run_two_ranks(tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        unchanged = rank["unchanged"]
        assert (len(unchanged["losses"]), unchanged["world"]) == (9, 2)  # three epochs of three batches, which two ranks share
        for name in ("callback", "mixin"):
            assert rank[name]["losses"] == pytest.approx(unchanged["losses"], rel=1e-9)
            assert torch.allclose(torch.tensor(rank[name]["output"]), torch.tensor(unchanged["output"]), rtol=1e-6)
            assert (rank[name]["lr"], rank[name]["steps"]) == (unchanged["lr"], unchanged["steps"])
        assert "'head.classifier.weight': nothing sure feeds it" in rank["refused"]
    assert ranks[0]["callback"]["losses"] != ranks[1]["callback"]["losses"]  # each rank has seen its own batches
