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
    print("ready", flush=True)
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
    root = os.path.realpath(request["folder"])
    used = _record(root)
    try:
        result: dict[str, Any] = {"entries": _entries(request, Path(root))}
    except BaseException as error:  # old code may raise anything, SystemExit included
        result = {"error": _short(error), "lacks_name": isinstance(error, _NoNameError)}
        if isinstance(error, ModuleNotFoundError) and error.name:  # a commit that has it is another version
            place = error.name.replace(".", "/")
            used.update(f"{start}{place}{end}" for start in ("", "src/") for end in ("", ".py"))
    result["files"] = sorted(used)
    Path(request["answer"]).write_text(json.dumps(result))
    if not hasattr(os, "fork"):
        os.write(answer, b"done\n")
    os._exit(0)


class _NoNameError(AttributeError):
    """The file does not define the factory."""


def _record(root: str) -> set[str]:
    """A set that grows by the files and folders below ``root`` that are read from now on."""
    used: set[str] = set()
    start = root + os.sep

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.scandir") and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 - resolve() would ask the file system from inside the hook
            if path.startswith(start):
                used.add(path[len(start) :].replace(os.sep, "/"))

    sys.addaudithook(note)
    return used


def _short(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:300]


def _entries(request: dict[str, Any], root: Path) -> list[Any]:
    import torch

    from automatch.specs import spec_of_model

    os.chdir(root)
    factory: Any = _module(root, request["path"], request["module"])
    for name in request["name"].split("."):
        if not hasattr(factory, name):
            raise _NoNameError(f"{request['path']} does not define {request['name']!r}")
        factory = getattr(factory, name)
    try:
        with torch.device("meta"):
            model = factory(**request["kwargs"])
    except Exception:  # some constructors compute with their weights, which the meta device cannot
        model = factory(**request["kwargs"])
    return [[tensor.key, list(tensor.shape), tensor.dtype] for tensor in spec_of_model(model)]


def _module(root: Path, path: str, module: str) -> Any:
    """Import a file of the old tree under its dotted name, or alone where its path is none."""
    file = root / path
    base = root / "src" if path.startswith("src/") else root
    for end in (".py", "/__init__.py"):
        if module and f"/{path}".endswith(f"/{module}{end}"):
            base = root / path.removesuffix(f"{module}{end}")
    sys.path[:0] = list(dict.fromkeys([str(base), str(root), str(file.parent)]))
    parts = file.relative_to(base).with_suffix("").parts
    if all(part.isidentifier() for part in parts):
        return import_module(".".join(parts).removesuffix(".__init__"))
    spec = spec_from_file_location("automatch_old_model", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module at {path}")
    loaded = module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    main()
