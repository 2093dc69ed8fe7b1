"""The tasks of `speed.py`, each in an interpreter of its own: so that memory is its own, and a hang can be ended.

    python benchmarks/speed_tasks.py propose CASE TOOL REPEATS
    python benchmarks/speed_tasks.py write DIRECTORY GIGABYTES
    python benchmarks/speed_tasks.py load DIRECTORY automatch|torch copy|assign

Each prints one line of JSON. ``--limit SECONDS`` in front ends it after so much processor time.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WIDTH = 2048
SHORTEST = 0.2  # seconds that a measurement should last


def peak_megabytes() -> float:
    """The most memory this process has held so far (VmHWM; not ru_maxrss, which survives an exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def propose(name: str, tool: str, repeats: str) -> dict[str, Any]:
    """Time one tool on one case, ``repeats`` times; the first call is kept apart, for it imports and reads tables.

    Seconds are of processor time: on an idle machine the same as those of the clock, and on a busy one no more.
    """
    torch_only = peak_megabytes()
    import corpus_cases
    import scoring
    import speed_inputs

    case = speed_inputs.case_of(name)
    model, ckpt = corpus_cases.skeleton(case), corpus_cases.state_dict(case)
    with_inputs = peak_megabytes()
    found: dict[str, Any] = {}

    def call() -> None:
        found.update(_answer(tool, case, model, ckpt))

    seconds = [_seconds_of(call)]
    if int(repeats) > 1:
        start = time.perf_counter()
        call()  # the first call says nothing of how many make up a measurement: it imports
        calls = max(1, min(200, round(SHORTEST / max(time.perf_counter() - start, 1e-4))))
        seconds += [_seconds_of(call, calls) for _ in range(int(repeats) - 1)]
    matches = found["matches"]
    scored = scoring.score_case(case, {"matches": matches})
    return {
        "seconds": seconds,
        "status": found["status"],
        "keys": len(case["target"]["entries"]),
        "matches": len(matches),
        "confident": sum(match["confidence"] >= scoring.CONFIDENT for match in matches),
        "right": scored["right"],
        "true": scored["keys"],
        "questions": found["questions"],
        "torch_megabytes": torch_only,
        "input_megabytes": with_inputs - torch_only,
        "peak_megabytes": peak_megabytes() - torch_only,
    }


def _seconds_of(call: Callable[[], None], calls: int = 1) -> float:
    """Seconds of processor time of one of ``calls`` calls; that clock may tick but every 10 ms."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def _answer(tool: str, case: dict[str, Any], model: torch.nn.Module, ckpt: dict[str, torch.Tensor]) -> dict[str, Any]:
    if tool == "automatch":
        from automatch import propose_mapping

        mapping = propose_mapping(model, ckpt)
        matches = [{"target": m.target, "sources": list(m.sources), "confidence": m.confidence} for m in mapping.matches]
        return {"status": "answered", "matches": matches, "questions": len(mapping.questions)}
    import baselines

    try:
        pairs = baselines.BASELINES[tool](case, case["source"]["entries"])
    except baselines.RefusedError as error:
        return {"status": f"refused: {str(error)[:80]}", "matches": [], "questions": 0}
    return {"status": "answered", "matches": baselines.as_mapping(pairs)["matches"], "questions": 0}


class Block(torch.nn.Module):
    """A transformer block, of which only the tensors matter."""

    def __init__(self, words: tuple[str, ...], device: str) -> None:
        super().__init__()
        attention, mlp, q, k, v, out, up, down, norm = words
        self.add_module(norm, torch.nn.LayerNorm(WIDTH, device=device))
        self.add_module(attention, torch.nn.Module())
        for name in (q, k, v, out):
            self.get_submodule(attention).add_module(name, _linear(WIDTH, WIDTH, device))
        self.add_module(mlp, torch.nn.Module())
        self.get_submodule(mlp).add_module(up, _linear(WIDTH, 4 * WIDTH, device))
        self.get_submodule(mlp).add_module(down, _linear(4 * WIDTH, WIDTH, device))


OLD = ("attention", "feed_forward", "query", "key", "value", "output", "fc1", "fc2", "norm")
NEW = ("self_attn", "mlp", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "input_layernorm")


def _linear(inputs: int, outputs: int, device: str) -> torch.nn.Linear:
    return torch.nn.utils.skip_init(torch.nn.Linear, inputs, outputs, device=device)


def _model(words: tuple[str, ...], blocks: int, device: str) -> torch.nn.Module:
    model, old = torch.nn.Module(), words is OLD
    model.add_module("word_embeddings" if old else "embed_tokens", torch.nn.utils.skip_init(torch.nn.Embedding, 1000, WIDTH, device=device))
    model.add_module("layers" if old else "blocks", torch.nn.ModuleList(Block(words, device) for _ in range(blocks)))
    model.add_module("final_norm" if old else "norm", torch.nn.LayerNorm(WIDTH, device=device))
    model.add_module("output" if old else "lm_head", _linear(WIDTH, 1000, device))
    return model


def _blocks(gigabytes: float) -> int:
    each = sum(p.numel() for p in Block(OLD, "meta").parameters()) * 4
    return max(1, round(gigabytes * 2**30 / each))


def write(directory: str, gigabytes: str) -> dict[str, Any]:
    """Write one checkpoint twice: under the model's own keys, and under those of its older class."""
    blocks = _blocks(float(gigabytes))
    old = _model(OLD, blocks, "cpu").state_dict()
    for i, tensor in enumerate(old.values()):
        tensor.fill_(i + 1)
    torch.save(old, Path(directory, "renamed.pt"))
    new = dict(zip(_model(NEW, blocks, "meta").state_dict(), old.values(), strict=True))
    torch.save(new, Path(directory, "right.pt"))
    return {"blocks": blocks, "bytes": sum(t.numel() * 4 for t in old.values()), "keys": len(old)}


def load(directory: str, tool: str, way: str) -> dict[str, Any]:
    """Time a load into a model with memory of its own ("copy"), or on the meta device ("assign")."""
    blocks = _blocks_of(Path(directory, "right.pt"))
    model = _model(NEW, blocks, "cpu" if way == "copy" else "meta")
    names = {"automatch": "renamed.pt", "torch": "right.pt"}

    def call(model: torch.nn.Module, path: Path) -> None:
        if tool == "automatch":
            import automatch

            automatch.load(model, path)
        else:
            state_dict = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            model.load_state_dict(state_dict, assign=way == "assign")

    tiny = torch.nn.Linear(1, 1)
    torch.save(tiny.state_dict(), Path(directory, f"tiny {tool}.pt"))
    call(tiny, Path(directory, f"tiny {tool}.pt"))  # imports are measured elsewhere
    start = time.perf_counter()
    call(model, Path(directory, names[tool]))
    seconds = time.perf_counter() - start
    for tensor in model.state_dict().values():  # what was mapped into memory only is read when it is used
        tensor.sum()
    used = time.perf_counter() - start
    if [float(tensor.flatten()[-1]) for tensor in model.state_dict().values()] != [i + 1 for i in range(len(model.state_dict()))]:
        raise SystemExit("a tensor was loaded to the wrong place")
    return {"seconds": seconds, "used_seconds": used, "peak_megabytes": peak_megabytes()}


def _blocks_of(path: Path) -> int:
    keys = torch.load(path, mmap=True, weights_only=True)
    return 1 + max(int(number) for key in keys if (number := key.split(".")[1]).isdigit())


if __name__ == "__main__":
    if sys.argv[1] == "--limit":
        seconds = int(float(sys.argv[2]))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        del sys.argv[1:3]
    task, *arguments = sys.argv[1:]
    print(json.dumps({"propose": propose, "write": write, "load": load}[task](*arguments)))
