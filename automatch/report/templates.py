"""The templates and assets inside the package, autoescaped, with the filters that keys go through."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from automatch.report.wording import count, percent, short

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> Environment:
    """The template environment; undefined names are errors, every value is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("automatch.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"short": short, "percent": percent}
    return env


def render(name: str, **values: Any) -> str:
    """Fill the template ``name``."""
    return environment().get_template(name).render(count=count, **values)


@cache
def asset(*names: str) -> str:
    """The text of assets, one after the other."""
    folder = files("automatch.report") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)
