"""Worlds of real processes: gloo ranks on this machine, forked from a server that has imported torch once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANG = 600.0  # seconds after which a rank hangs, whatever the load of the machine
PORT = "port"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "safetensors.torch",
        "pytest",
        "automatch.distributed.loading",
    ]
)


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: its result, the error it raised, or the signal that ended it."""

    value: Any = None
    error: str | None = None
    trace: str = ""
    signal: int | None = None


def run_ranks(size: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Outcome]:
    """Call ``function(rank, *args)`` on ``size`` ranks and say what became of each; ``folder`` holds what they leave."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [_CONTEXT.Process(target=_rank, args=(rank, size, folder, function, args), daemon=True) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(HANG)
    stuck = [i for i, rank in enumerate(ranks) if rank.is_alive()]
    for rank in ranks:
        rank.kill()
        rank.join()
    (folder / PORT).unlink(missing_ok=True)
    assert not stuck, f"ranks {stuck} of {size} still ran after {HANG} s"
    return [_outcome(folder / f"rank{i}.pickle", rank.exitcode or 0) for i, rank in enumerate(ranks)]


def values(outcomes: list[Outcome]) -> list[Any]:
    """The results of ranks that all must have succeeded."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}: {outcome.trace}"
        assert outcome.signal is None, f"rank {rank} died of signal {outcome.signal}"
    return [outcome.value for outcome in outcomes]


def save_alone(state_dict: dict[str, Any], path: Path) -> Path:
    """Save a checkpoint from this process; torch warns that no ranks take part."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        from torch.distributed.checkpoint import save

        save(state_dict, checkpoint_id=path, no_dist=True)
    return path


def _outcome(path: Path, code: int) -> Outcome:
    if code < 0:
        return Outcome(signal=-code)
    outcome = pickle.loads(path.read_bytes())
    path.unlink()
    return outcome


def _rank(rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    try:
        dist.init_process_group("gloo", store=_shared_store(rank, folder / PORT), rank=rank, world_size=size)
        outcome = Outcome(function(rank, *args))
        with contextlib.suppress(RuntimeError):  # rank 0 holds the store and stays until the others are done; some may be dead
            dist.barrier()
    except BaseException as error:
        outcome = Outcome(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(outcome))
    os._exit(0)  # a dead rank leaves the group in a state that its destructor would wait for


def _shared_store(rank: int, note: Path) -> Any:
    """The store of the process group: rank 0 holds it, on a port that the system chooses, and notes which."""
    from torch.distributed import TCPStore

    if rank:
        while not note.exists():
            time.sleep(0.01)
        return TCPStore("127.0.0.1", int(note.read_text()), is_master=False)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    written = note.with_suffix(".written")
    written.write_text(str(store.port))
    written.rename(note)
    return store
