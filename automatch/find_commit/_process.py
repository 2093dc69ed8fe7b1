"""Asking the worker with a time limit; one that exceeds it is ended with all it started, and a new one takes over."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_START = "import sys; sys.path.append({root!r}); from automatch.find_commit._worker import main; main()"
_PATIENCE = 120.0


class Worker:
    """A context manager around the worker process.

    Args:
        folder: an empty folder to start it in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def build(self, folder: Path, path: str, module: str, name: str, kwargs: dict[str, Any], limit: float) -> dict[str, Any]:
        """The entries of the model that ``name`` in file ``path`` below ``folder`` builds, or why there are none.

        Args:
            folder: where the old tree is.
            path: the file in it.
            module: the module that the factory is imported from today, with slashes; empty where a file was named.
            name: the factory.
            kwargs: its arguments.
            limit: seconds it may take, from when the process is ready.
        """
        answer = self._folder / "answer.json"
        answer.unlink(missing_ok=True)
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None
        request = {"folder": str(folder), "path": path, "module": module, "name": name, "kwargs": kwargs, "answer": str(answer)}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self._end()
            return {"error": f"took longer than {limit:g} s"}
        except OSError:
            line = ""
        if not line:
            self._end()
        if not answer.exists():
            return {"error": "the process that built it crashed"}
        return json.loads(answer.read_text())

    def _start(self) -> subprocess.Popen[str]:
        code = _START.format(root=str(Path(__file__).parents[2]))
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self._folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._process, self._lines = process, queue.Queue()
        threading.Thread(target=_forward, args=(process, self._lines), daemon=True).start()
        with suppress(queue.Empty):
            self._lines.get(timeout=_PATIENCE)  # it says so when it has imported torch
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()


def _forward(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    with suppress(ValueError):  # closed while it was read
        for line in process.stdout:
            lines.put(line)
    lines.put("")
