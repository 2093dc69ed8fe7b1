"""Which names in a pickle no checkpoint needs: a file that has them was made to run something."""

from __future__ import annotations

from automatch.errors import UnsafeCheckpointError

_KNOWN_MODULES = frozenset(
    ("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.nn.parameter", "collections", "builtins", "__builtin__", "_codecs")
)
# A pickle that names one of these was made to run something: no checkpoint needs them, so not even the
# weights of such a file are read. Other unknown names are left as descriptions and never called.
_HOSTILE_MODULES = frozenset(
    (
        "os", "posix", "nt", "posixpath", "ntpath", "sys", "subprocess", "pty", "shutil", "socket", "ssl", "http", "urllib",
        "requests", "ftplib", "smtplib", "webbrowser", "runpy", "importlib", "pkgutil", "codeop", "pdb", "bdb", "timeit",
        "ctypes", "cffi", "_ctypes", "multiprocessing", "signal", "asyncio", "threading", "_thread", "marshal", "pickle", "_pickle",
        "cloudpickle", "dill", "shelve", "zipimport", "ensurepip", "fileinput", "types", "pydoc", "linecache", "operator", "_operator",
    )
)  # fmt: skip
_HOSTILE_BUILTINS = frozenset(
    (
        "eval", "exec", "execfile", "compile", "__import__", "open", "file", "input", "raw_input", "getattr", "setattr",
        "delattr", "globals", "locals", "vars", "dir", "apply", "breakpoint", "exit", "quit", "help", "memoryview",
    )
)  # fmt: skip


def is_known(name: str) -> bool:
    """Whether a name belongs to torch's own way to write tensors and containers."""
    module, _, attribute = name.rpartition(".")
    return module in _KNOWN_MODULES or (module == "numpy.core.multiarray" and attribute.startswith("_reconstruct"))


def refuse_hostile(names: frozenset[str], origin: str) -> None:
    """Refuse a pickle that was made to run something.

    Raises:
        UnsafeCheckpointError: it names a function that no checkpoint needs.
    """
    found = sorted(name for name in names if _is_hostile(name))
    if found:
        raise UnsafeCheckpointError(
            f"{origin} is not read: its pickle would run {', '.join(map(ascii, found[:5]))}; "
            "trust=True runs it, so pass that only if you know who made the file"
        )


def _is_hostile(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return attribute in _HOSTILE_BUILTINS
    if name in ("operator.itemgetter", "types.SimpleNamespace", "operator.attrgetter"):
        return False
    return module.split(".")[0] in _HOSTILE_MODULES or module == "code"
