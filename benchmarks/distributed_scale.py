"""What planning costs when there are 100,000 keys and hundreds of ranks, measured in one process, in processor time.

One rank of a world is simulated: torch's fake process group stands for the other ranks, and tensors are on the meta
device. `distributed.py` prints the tables.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ABOUT = (
    "Processor time, which other work on the machine changes little. What grows with the number of ranks is the broadcast alone, which",
    "every rank takes, compressed, from the process group's key-value store (measured with real TCP connections, server and ranks in one",
    "process). Each rank plans for itself, and none gathers the plans of the others.",
)
KEYS = 100_000
SHAPE = (1024, 64)


def scale_tables(folder: Path, keys: int) -> list[str]:
    """The costs for worlds of several sizes."""
    global KEYS
    KEYS = keys
    lines = [f"### {KEYS:,} keys, one rank of many simulated in one process", "", *ABOUT, ""]
    lines += ["| chunks per tensor (ranks that saved) | ranks that load | step | processor seconds | megabytes |", "|---|---|---|---|---|"]
    for chunks, ranks in ((1, 256), (8, 256)):
        for step, seconds, size in costs(folder, chunks, ranks):
            shown = ("" if seconds is None else f"{seconds:.2f}", "" if size is None else f"{size / 1e6:.1f}")
            lines.append(f"| {chunks} | {ranks} | {step} | {shown[0]} | {shown[1]} |")
            print(lines[-1], flush=True)
    return [*lines, ""]


def costs(folder: Path, chunks: int, ranks: int) -> Iterator[tuple[str, float | None, int | None]]:
    """(step, seconds, bytes) of loading on one rank of many."""
    from automatch.distributed.planner import MappedLoadPlanner
    from automatch.distributed.storage import DirectoryReader, identity

    metadata = make_metadata(chunks)
    path = folder / f"metadata{chunks}"
    path.mkdir(exist_ok=True)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    size = (path / ".metadata").stat().st_size
    seconds, _ = timed(lambda: pickle.loads((path / ".metadata").read_bytes()))
    yield "every rank of plain DCP: unpickle `.metadata`", seconds, size
    seconds, _ = timed(lambda: DirectoryReader(path).read_metadata())
    yield "rank 0: read `.metadata` without executing anything", seconds, size
    seconds, _ = timed(lambda: identity(path))
    yield "every rank: digest of the checkpoint", seconds, None
    mapping = make_mapping()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    seconds, _ = timed(lambda: crew_on(store).hand_out((mapping.matches, metadata)))
    size = int(store.get("value"))
    yield "rank 0: pickle, compress and store mapping and metadata for the broadcast", seconds, size
    seconds, _ = timed(crew_on(store).receive)
    yield "every rank: take, decompress and unpickle the broadcast", seconds, size
    seconds, _ = timed(lambda: take(store, ranks, size))
    yield f"store and ranks: bring the broadcast to {ranks} ranks", seconds, size * ranks
    spec = mapping.target.spec
    assert spec is not None
    seconds, _ = timed(lambda: type(spec)(spec.tensors).fingerprint)
    yield "every rank: fingerprint of its model", seconds, None
    state = make_state(ranks)
    planner = MappedLoadPlanner(mapping)
    seconds, _ = timed(lambda: planner.set_up_planner(state, metadata))
    yield "every rank: find what feeds each entry", seconds, None
    seconds, plan = timed(planner.create_local_plan)
    yield f"every rank: plan its {len(plan.items):,} reads", seconds, None
    seconds, nbytes = plain_plan(metadata, ranks)
    yield "every rank of plain DCP, right names: plan the reads", seconds, None
    yield f"rank 0 of plain DCP: gathers the plans of {ranks} ranks (automatch does not)", None, nbytes * ranks
    torch.distributed.destroy_process_group()


def crew_on(store: dist.Store) -> Any:
    """A rank as far as the broadcast goes."""
    from automatch.distributed.crew import Crew

    crew = Crew()
    crew._store = store
    return crew


def take(store: dist.TCPStore, ranks: int, size: int) -> None:
    """What the store sends to all ranks, each over a connection of its own."""
    from automatch.distributed.crew import _PIECE

    clients = [dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False) for _ in range(ranks)]
    with ThreadPoolExecutor(32) as pool:
        taken = pool.map(lambda client: sum(len(client.get(f"value/{start}")) for start in range(0, size, _PIECE)), clients)
        assert sum(taken) == size * ranks


def make_metadata(chunks: int) -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

    rows = SHAPE[0] // chunks
    described: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for i in range(KEYS):
        key = old_key(i)
        boxes = [ChunkStorageMetadata(torch.Size([c * rows, 0]), torch.Size([rows, SHAPE[1]])) for c in range(chunks)]
        described[key] = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size(SHAPE), boxes)
        for c, box in enumerate(boxes):
            storage[MetadataIndex(key, box.offsets, c)] = _StorageInfo(f"__{c}_0.distcp", i * rows * SHAPE[1] * 2, rows * SHAPE[1] * 2)
    return Metadata(described, planner_data={key: (key,) for key in described}, storage_data=storage)


def old_key(i: int) -> str:
    return f"model.layers.{i // 768}.mlp.experts.{i % 768 // 3}.{('gate_proj', 'up_proj', 'down_proj')[i % 3]}.weight"


def new_key(i: int) -> str:
    return f"layers.{i // 768}.ffn.experts.{i % 768 // 3}.{('w1', 'w3', 'w2')[i % 3]}.weight"


def make_mapping() -> Any:
    from automatch.mapping import KeyMapping, Match, Side
    from automatch.specs import StateSpec, TensorSpec

    sides = [Side.of(StateSpec(tuple(TensorSpec(name(i), SHAPE, "bfloat16") for i in range(KEYS)))) for name in (old_key, new_key)]
    return KeyMapping(*sides, tuple(Match(new_key(i), (old_key(i),)) for i in range(KEYS)))


def make_state(ranks: int, name: Callable[[int], str] = new_key) -> dict[str, Any]:
    """One rank's part of a model that is sharded over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=ranks // 2, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    local = torch.empty(SHAPE[0] // ranks, SHAPE[1], dtype=torch.bfloat16)
    shape, stride = torch.Size(SHAPE), (SHAPE[1], 1)
    return {name(i): DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride) for i in range(KEYS)}


def plain_plan(metadata: Any, ranks: int) -> tuple[float, int]:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    planner = DefaultLoadPlanner()
    planner.set_up_planner(make_state(ranks, old_key), metadata)
    seconds, plan = timed(planner.create_local_plan)
    return seconds, len(pickle.dumps(plan))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    clock = time.process_time()
    result = run()
    seconds = time.process_time() - clock
    return seconds, result
