"""The nodes of a pickle's tree: what would be looked up, called or fetched, as descriptions."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that the pickle refers to: never looked up."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A reference to something outside the pickle, e.g. a storage."""

    id: Any


@dataclass(slots=True, eq=False)
class Call:
    """An object that only code could build: what would be called, and what would be put into it."""

    function: Any
    args: Any
    kwargs: Any = None
    new: bool = False
    state: list[Any] = field(default_factory=list[Any])
    items: list[Any] = field(default_factory=list[Any])
    pairs: dict[Any, Any] = field(default_factory=dict[Any, Any])

    @property
    def path(self) -> str:
        """The full name of what would be called."""
        return self.function.path if isinstance(self.function, Global) else type(self.function).__name__


class Attributed(OrderedDict[Any, Any]):
    """An OrderedDict with the attributes that the pickle gave it (a state_dict carries ``_metadata``)."""

    attributes: Any = None
