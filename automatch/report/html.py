"""The report as one self-contained HTML file: no network, opens from disk."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from automatch.files import write_atomically
from automatch.mapping import KeyMapping
from automatch.report.templates import asset, render
from automatch.report.view import build_view


def render_html(mapping: KeyMapping) -> str:
    """The page as text."""
    return render("page.html.j2", view=build_view(mapping), css=Markup(asset("notebook.css")), max_rows=1000)


def write_html(mapping: KeyMapping, path: str | Path) -> Path:
    """Write the page to ``path`` and return it."""
    return write_atomically(Path(path), render_html(mapping).encode("utf-8"))
