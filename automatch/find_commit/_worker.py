"""The other side of the search: a process that imports torch once and builds each old model in a fork of its own.

It is given one JSON request a line and answers with one line; what the old code prints goes nowhere.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve requests until stdin ends; without fork, serve one."""
    for module in ("torch", "automatch.specs"):  # imported here, so that no fork has to
        import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(os, "fork"):
            child = os.fork()
            if not child:
                _serve(request)
            os.waitpid(child, 0)
            print("done", flush=True)
        else:
            _serve(request)


def _serve(request: dict[str, Any]) -> None:
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        result: dict[str, Any] = {"entries": _entries(request)}
    except BaseException as error:  # old code may raise anything, SystemExit included
        result = {"error": _short(error)}
    Path(request["answer"]).write_text(json.dumps(result))
    if not hasattr(os, "fork"):
        os.write(answer, b"done\n")
    os._exit(0)


def _short(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:300]


def _entries(request: dict[str, Any]) -> list[Any]:
    import torch

    from automatch.specs import spec_of_model

    root = Path(request["folder"])
    os.chdir(root)
    factory: Any = _module(root, request["path"])
    for name in request["name"].split("."):
        factory = getattr(factory, name)
    try:
        with torch.device("meta"):
            model = factory(**request["kwargs"])
    except Exception:  # some constructors compute with their weights, which the meta device cannot
        model = factory(**request["kwargs"])
    return [[tensor.key, list(tensor.shape), tensor.dtype] for tensor in spec_of_model(model)]


def _module(root: Path, path: str) -> Any:
    """Import a file of the old tree under its dotted name, or alone where its path is none."""
    file = root / path
    base = root / "src" if path.startswith("src/") else root
    sys.path[:0] = list(dict.fromkeys([str(base), str(root), str(file.parent)]))
    parts = file.relative_to(base).with_suffix("").parts
    if all(part.isidentifier() for part in parts):
        return import_module(".".join(parts).removesuffix(".__init__"))
    spec = spec_from_file_location("automatch_old_model", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module at {path}")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
