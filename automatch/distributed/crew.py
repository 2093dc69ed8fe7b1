"""The ranks of one call: they agree before anything is changed, and none waits for one that is gone.

Votes, decisions, signs of life and what rank 0 tells the others go through the process group's key-value store, not
through collectives: a collective hangs until its own time-out when a rank is gone, and holds up every rank for the
slowest. A decision is one atomic `compare_set`, so that all ranks see the same one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import threading
import time
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from automatch.collector import no_collection
from automatch.errors import AutomatchError, LoadError

T = TypeVar("T")
_SILENT = "no sign of life"
_HOLDER_DIED = "the rank that holds it has died"
_TOLD = "told: "  # a rank that stops because of another one repeats what that one said
_PATIENCE = 10  # a rank that lives but finishes nothing for this many time-outs is lost, too
_PIECE = 1 << 20  # bytes of a value that is handed out; a store takes 8 MB at once, and holds a piece per rank while it sends them
_RUNS: dict[str, int] = {}


class RankLostError(LoadError):
    """A rank died or got stuck while ranks worked together; the others changed nothing."""


class Crew:
    """All ranks of a process group in one call; a context manager.

    Args:
        group: the process group; None for the default one. Without torch.distributed there is one rank.
        timeout: seconds after which a rank without a sign of life counts as lost, > 0. A rank that has not begun yet,
            or that lives but finishes no read, counts as lost after ten times as long.
        outcome: what errors say about what is left when ranks fail.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout: float = 60.0, outcome: str = "Nothing was changed on any rank"
    ) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        self.group, self.timeout, self.outcome = group, float(timeout), outcome
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if together else 0
        self.size = dist.get_world_size(group) if together else 1
        self._store: Any = _store_of(group) if self.size > 1 else None
        self._stop = threading.Event()
        self._progress = 0
        self._failure: str | None = None
        self._steps = itertools.count()
        self._lost = 0
        self._pieces: list[str] = []
        self._beating: threading.Thread | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank proposes, decides and speaks."""
        return self.rank == 0

    def __enter__(self) -> Crew:
        if self._store is not None:
            name = self.group.group_name if self.group is not None else ""
            _RUNS[name] = _RUNS.get(name, 0) + 1  # every rank of a group makes the same calls, so the numbers agree
            self._store = PrefixStore(f"automatch/{_RUNS[name]}", self._store)
            self._beating = threading.Thread(target=self._beat, name="automatch-beat", daemon=True)
            self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that held it; there is nobody left to wait for
            self._leave()
        self._stop.set()
        if self._beating is not None:
            self._beating.join()

    def advance(self) -> None:
        """Note that this rank has finished a piece of work.

        Raises:
            LoadError: another rank has failed or is lost; there is no use in going on.
        """
        self._progress += 1
        if self._failure is not None:
            raise RankLostError(self._failure)

    def agree(self, step: str, error: BaseException | None = None) -> None:
        """Wait until every rank has come this far; raise on all of them if one has failed.

        Args:
            step: what the ranks have done, for messages, e.g. "reading".
            error: what went wrong on this rank.

        Raises:
            LoadError: a rank has failed or is lost.
        """
        if self._store is None:
            if error is not None:
                raise _as_own(error)
            return
        name = f"{next(self._steps)}"
        try:
            decision = self._decide(name, step, error)
        except RuntimeError as gone:
            if error is not None and not isinstance(error, RankLostError | dist.DistError):
                raise _as_own(error) from error
            raise RankLostError(f"lost the store that the ranks share while {step}; {_HOLDER_DIED}. {self.outcome}") from gone
        if decision == "go":
            return
        failures: dict[str, str] = json.loads(decision)
        self._lost = sum(_SILENT in text for text in failures.values())
        if error is not None and not isinstance(error, RankLostError):
            raise _as_own(error) from error
        raise _joint_error(step, failures, self.outcome)

    def together(self, step: str, action: Callable[[], T]) -> T:
        """Do something on this rank, and give its result once every rank has done it; raise on all if one fails.

        Raises:
            LoadError: another rank has failed or is lost; on the failing rank, what it raised.
        """
        try:
            result = action()
        except Exception as error:
            self.alarm(error)
            self.agree(step, error)
            raise
        self.agree(step)
        return result

    def hand_out(self, value: T) -> T:
        """On rank 0: leave a value for the others, who `receive` it once all have agreed on what they did meanwhile."""
        if self._store is not None:
            with no_collection():
                data = zlib.compress(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), 1)  # metadata shrinks to a twentieth
            self._store.set("value", str(len(data)))
            for start in range(0, len(data), _PIECE):
                self._pieces.append(f"value/{start}")
                self._store.set(self._pieces[-1], data[start : start + _PIECE])
                self.advance()
        return value

    def receive(self) -> Any:
        """On the others: what rank 0 has handed out."""
        pieces: list[bytes] = []
        for start in range(0, int(self._store.get("value")), _PIECE):
            pieces.append(self._store.get(f"value/{start}"))
            self.advance()
        with no_collection():
            return pickle.loads(zlib.decompress(b"".join(pieces)))

    def count(self, name: str, amount: int) -> int:
        """Add to a counter that all ranks share and return what it stands at."""
        return amount if self._store is None else int(self._store.add(f"count/{name}", amount))

    def leave_word(self, name: str, text: str) -> None:
        """Leave a text for rank 0."""
        if self._store is not None:
            self._store.set(f"word/{name}/{self.rank}", text)

    def words(self, name: str) -> list[str]:
        """What the other ranks have left; complete once all have agreed on what they did meanwhile."""
        keys = [f"word/{name}/{rank}" for rank in range(self.size) if rank != self.rank]
        return [self._store.get(key).decode() for key in keys if self._store.check([key])]

    # ---- deciding -----------------------------------------------------------------------------------------

    def _decide(self, name: str, step: str, error: BaseException | None) -> str:
        if error is not None:
            told = f"{_TOLD}{error}" if isinstance(error, RankLostError) else f"{type(error).__name__}: {error}"
            self._store.set(f"{name}/failed/{self.rank}", told[:4000])
        self._store.add(f"{name}/votes" if error is None else f"{name}/failures", 1)
        watch = _Watch(self, range(self.size) if self.leads else (0,))
        pause = 0.001
        while True:
            if self._store.check([f"{name}/decision"]):
                return self._store.get(f"{name}/decision").decode()
            verdict = self._verdict(name) if self.leads else None
            lost = watch.lost()
            if verdict is None and lost:
                verdict = json.dumps({str(rank): f"{_SILENT} for {self.timeout:g} s" for rank in lost})
            if verdict is not None:
                return self._store.compare_set(f"{name}/decision", "", verdict).decode()
            time.sleep(pause)
            pause = min(pause * 2, 0.1)
            self._progress += 1

    def _verdict(self, name: str) -> str | None:
        if self._store.add(f"{name}/failures", 0):
            failed = [rank for rank in range(self.size) if self._store.check([f"{name}/failed/{rank}"])]
            return json.dumps({str(rank): self._store.get(f"{name}/failed/{rank}").decode() for rank in failed})
        return "go" if self._store.add(f"{name}/votes", 0) == self.size else None

    def _leave(self) -> None:
        """Rank 0 may hold the store: it stays until the others have read the last decision."""
        self._store.add("left", 1)
        deadline = time.monotonic() + self.timeout
        while self.leads and self._store.add("left", 0) < self.size - self._lost and time.monotonic() < deadline:
            time.sleep(0.005)
        for key in self._pieces:
            self._store.delete_key(key)

    # ---- signs of life ------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Show that this rank lives, as long as it gets on; and see whether others do."""
        interval = min(1.0, self.timeout / 5)
        seen, since = -1, time.monotonic()
        watch = _Watch(self, range(self.size) if self.leads else (0,))
        for beat in itertools.count(1):
            if self._progress != seen:
                seen, since = self._progress, time.monotonic()
            try:
                if time.monotonic() - since < _PATIENCE * self.timeout:
                    self._store.set(f"beat/{self.rank}", str(beat))
                self._notice(watch.lost())
            except RuntimeError:
                self._failure = self._failure or f"lost the store that the ranks share; {_HOLDER_DIED}"
                return
            if self._stop.wait(interval):
                return

    def _notice(self, lost: list[int]) -> None:
        if self._failure is None and self._store.check(["alarm"]):
            self._failure = self._store.get("alarm").decode()
        if self._failure is None and lost:
            ranks = ", ".join(map(str, lost))
            self._failure = f"rank {ranks}: {_SILENT} for {self.timeout:g} s"
            self._store.set("alarm", self._failure)

    def alarm(self, error: BaseException) -> None:
        """Tell the other ranks at once that this one has failed; they stop at their next read."""
        if self._store is not None and not isinstance(error, RankLostError):
            try:
                self._store.set("alarm", f"rank {self.rank} has failed: {error}"[:4000])
            except RuntimeError:
                return


class _Watch:
    """Remembers when the beats of some ranks last changed."""

    def __init__(self, crew: Crew, ranks: Any) -> None:
        self._crew, self._ranks = crew, [rank for rank in ranks if rank != crew.rank]
        self._store: Any = crew._store  # pyright: ignore[reportPrivateUsage]
        now = time.monotonic()
        self._last = dict.fromkeys(self._ranks, ("", now))
        self._next = now

    def lost(self) -> list[int]:
        """The ranks that were silent for too long."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + min(1.0, self._crew.timeout / 5)
        keys = [f"beat/{rank}" for rank in self._ranks]
        started = [rank for rank, key in zip(self._ranks, keys, strict=True) if self._last[rank][0] or self._store.check([key])]
        beats = self._store.multi_get([f"beat/{rank}" for rank in started]) if started else []
        for rank, beat in zip(started, beats, strict=True):
            if beat.decode() != self._last[rank][0]:
                self._last[rank] = (beat.decode(), now)
        limits = {rank: self._crew.timeout * (1 if self._last[rank][0] else _PATIENCE) for rank in self._ranks}
        return [rank for rank in self._ranks if now - self._last[rank][1] > limits[rank]]


def _store_of(group: dist.ProcessGroup | None) -> Any:
    from torch.distributed import distributed_c10d

    if group is None:
        return distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    return distributed_c10d._get_process_group_store(group)  # pyright: ignore[reportPrivateUsage]


def _as_own(error: BaseException) -> BaseException:
    """What a rank raises for its own failure: automatch's errors as they are, others as a LoadError."""
    if isinstance(error, AutomatchError) or not isinstance(error, Exception):
        return error
    return LoadError(f"{type(error).__name__}: {error}")


def _joint_error(step: str, failures: dict[str, str], outcome: str) -> LoadError:
    first = {rank: text for rank, text in failures.items() if not text.startswith(_TOLD)}
    listed = "; ".join(f"rank {rank}: {text}" for rank, text in first.items()) or next(iter(failures.values())).removeprefix(_TOLD)
    kind = RankLostError if any(_SILENT in text for text in failures.values()) else LoadError
    return kind(f"while {step}, {listed}. {outcome}")
