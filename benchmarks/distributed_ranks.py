"""What runs on the ranks of `distributed.py`: a model under old and new keys, saved, loaded and converted, and what that took."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WIDTH = 2048


def layers_for(gigabytes: float) -> int:
    """How many layers of the model make up a checkpoint of that size in float32."""
    return max(1, round(gigabytes * 1e9 / 4 / (12 * WIDTH * WIDTH)))


def build(kind: str, layers: int) -> torch.nn.Module:
    """The model under its old keys, renamed, or renamed with q, k and v fused."""
    from torch import nn

    names = {
        "old": ("q", "k", "v", "o", "up", "down"),
        "renamed": ("wq", "wk", "wv", "wo", "fc1", "fc2"),
        "fused": ("qkv", "wo", "fc1", "fc2"),
    }[kind]
    shapes = {
        "up": (4 * WIDTH, WIDTH),
        "fc1": (4 * WIDTH, WIDTH),
        "down": (WIDTH, 4 * WIDTH),
        "fc2": (WIDTH, 4 * WIDTH),
        "qkv": (3 * WIDTH, WIDTH),
    }

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                rows, columns = shapes.get(name, (WIDTH, WIDTH))
                setattr(self, name, nn.Linear(columns, rows, bias=False))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, "layers" if kind == "old" else "blocks", nn.ModuleList(Block() for _ in range(layers)))

    with torch.device("meta"):
        return Model()


def mapping_between(old: torch.nn.Module, new: torch.nn.Module, kind: str) -> Any:
    """The reviewed mapping from the old keys."""
    from automatch.mapping import KeyMapping, Match, Side
    from automatch.specs import spec_of_model
    from automatch.transforms import Concat, Copy

    back = {"wq": ("q",), "wk": ("k",), "wv": ("v",), "wo": ("o",), "fc1": ("up",), "fc2": ("down",), "qkv": ("q", "k", "v")}
    empty = KeyMapping(Side.of(spec_of_model(old)), Side.of(spec_of_model(new)), ())
    matches: list[Match] = []
    for key in empty.target.spec.keys if empty.target.spec else ():
        _, index, name, leaf = key.split(".")
        sources = tuple(f"layers.{index}.{part}.{leaf}" for part in back[name])
        matches.append(Match(key, sources, Concat(0) if len(sources) > 1 else Copy(), decided=True))
    return empty.with_matches(matches)


def shard(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in next(iter(model.children())):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(path: Path, layers: int) -> dict[str, Any]:
    """Write the checkpoint under the old keys, sharded over the ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = shard(build("old", layers))
    model.to_empty(device="cpu")
    torch.manual_seed(torch.distributed.get_rank())
    for parameter in model.parameters():
        parameter.detach().to_local().random_(-1000, 1000)
    dcp.save(get_model_state_dict(model), checkpoint_id=path)
    return {}


def load_plain(path: Path, layers: int, materialised: bool = False) -> dict[str, Any]:
    """What one writes today for a class whose keys are the checkpoint's."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = shard(build("old", layers))
    if materialised:
        fill(model)

    def run() -> None:
        if not materialised:
            model.to_empty(device="cpu")
        dcp.load(get_model_state_dict(model), storage_reader=plain_reader(path))

    return measured(run)


def fill(model: torch.nn.Module) -> None:
    """Give the shards memory and values."""
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.detach().to_local().zero_()


def plain_reader(path: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader

    return FileSystemReader(path) if (path / ".metadata").exists() else HuggingFaceStorageReader(str(path))


def load_mapped(path: Path, layers: int, kind: str, materialised: bool = False, in_place: bool = False) -> dict[str, Any]:
    """The same checkpoint into the refactored class."""
    from automatch.distributed import load

    mapping = mapping_between(build("old", layers), build(kind, layers), kind)
    model = shard(build(kind, layers))
    if materialised:
        fill(model)

    def run() -> None:
        load(model, path, mapping, in_place=in_place)

    return measured(run)


def convert_all(path: Path, layers: int, out: Path) -> dict[str, Any]:
    """Convert to a safetensors folder under the renamed keys."""
    from automatch.distributed import convert

    mapping = mapping_between(build("old", layers), build("renamed", layers), "renamed")
    return measured(lambda: convert(path, out, mapping, max_shard_bytes=500_000_000))


def measured(run: Callable[[], Any]) -> dict[str, Any]:
    """Wall and processor seconds, peak memory over the start, and bytes that read calls returned, on this rank."""
    torch.distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start, read = status("VmRSS"), read_bytes()
    clock, processor = time.perf_counter(), time.process_time()
    run()
    seconds, processor = time.perf_counter() - clock, time.process_time() - processor
    peak = status("VmHWM")
    return {"seconds": seconds, "processor": processor, "peak": peak - start, "process": peak, "read": read_bytes() - read}


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "save": save,
    "plain": load_plain,
    "plain materialised": lambda path, layers: load_plain(path, layers, materialised=True),
    "renamed": lambda path, layers: load_mapped(path, layers, "renamed"),
    "fused": lambda path, layers: load_mapped(path, layers, "fused"),
    "materialised": lambda path, layers: load_mapped(path, layers, "renamed", materialised=True),
    "in place": lambda path, layers: load_mapped(path, layers, "renamed", materialised=True, in_place=True),
    "convert": lambda path, layers: convert_all(path, layers, path.with_name("converted")),
}


def rank_main(rank: int, ranks: int, store: Path, work: str, path: Path, layers: int, out: Path) -> None:
    """What each process of a world does."""
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    result = WORK[work](path, layers)
    (out / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
