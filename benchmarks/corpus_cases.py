"""The corpus as live objects: module skeletons on the meta device and dicts of meta tensors.

Built by hand, not through `nn.Module.__setattr__`, so that a case of 45,000 keys takes a second or two.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

CORPUS = Path(__file__).parent / "corpus"
CASES = CORPUS / "cases"
ORDERS = ("file", "sorted", "shuffled")
Case = dict[str, Any]

_CLASSES: dict[str, type[nn.Module]] = {}


def case_paths(patterns: Sequence[str] = (), *, directory: Path = CASES) -> list[Path]:
    """The corpus files whose id contains one of ``patterns`` (all, if there are none), by name."""
    paths = sorted(directory.glob("*.json.gz"))
    return [path for path in paths if not patterns or any(pattern in path.name.removesuffix(".json.gz") for pattern in patterns)]


def load_case(path: Path) -> Case:
    """Read one case."""
    return json.loads(gzip.decompress(path.read_bytes()))


def load_cases(patterns: Sequence[str] = (), *, directory: Path = CASES) -> Iterator[Case]:
    """Read the cases whose id contains one of ``patterns``, one at a time."""
    return map(load_case, case_paths(patterns, directory=directory))


def ordered_entries(case: Case, order: str = "file", seed: int = 0) -> list[list[Any]]:
    """The source's entries: in the file's own order, sorted by key, or shuffled (seeded by case and ``seed``)."""
    entries = list(case["source"]["entries"])
    if order == "sorted":  # what a safetensors file of one dtype holds
        return sorted(entries, key=lambda entry: entry[0])
    if order == "shuffled":
        random.Random(f"{seed}:{case['id']}").shuffle(entries)
        return entries
    if order != "file":
        raise ValueError(f"unknown order {order!r}; expected one of {', '.join(ORDERS)}")
    return entries


def state_dict(case: Case, order: str = "file", seed: int = 0) -> dict[str, torch.Tensor]:
    """The source as a checkpoint holds it: keys to meta tensors."""
    return {key: meta_tensor(shape, dtype) for key, shape, dtype, _ in ordered_entries(case, order, seed)}


def skeleton(case: Case, *, tied: bool = False) -> nn.Module:
    """The target as a module on the meta device: recorded classes, parameters and buffers in order.

    Args:
        case: the case.
        tied: register each group of ``target.aliases`` as one parameter, as the real model does.
    """
    target = case["target"]
    classes = target.get("modules", {})
    root = _class(classes.get("", "Model"))()
    modules: dict[str, nn.Module] = {"": root}
    for path in classes:
        _module_at(path, modules, classes)
    shared = {key: group[0] for group in target.get("aliases", []) for key in group} if tied else {}
    made: dict[str, torch.Tensor] = {}
    for key, shape, dtype, kind in target["entries"]:
        path, _, leaf = key.rpartition(".")
        owner = _module_at(path, modules, classes)
        first = shared.get(key, key)
        if first not in made:
            tensor = meta_tensor(shape, dtype)
            made[first] = tensor if kind == "buffer" else nn.Parameter(tensor, requires_grad=False)
        (owner._buffers if kind == "buffer" else owner._parameters)[leaf] = made[first]
    return root


def _module_at(path: str, modules: dict[str, nn.Module], classes: Mapping[str, str]) -> nn.Module:
    if path not in modules:
        parent, _, name = path.rpartition(".")
        modules[path] = _class(classes.get(path, "Module"))()
        _module_at(parent, modules, classes)._modules[name] = modules[path]
    return modules[path]


def _class(name: str) -> type[nn.Module]:
    if name not in _CLASSES:
        _CLASSES[name] = type(name, (nn.Module,), {})
    return _CLASSES[name]


def meta_tensor(shape: Sequence[int], dtype: str) -> torch.Tensor:
    """An empty tensor on the meta device."""
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")
