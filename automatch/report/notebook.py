"""The report inside a notebook: HTML that folds without scripts and follows the notebook's theme."""

from __future__ import annotations

from markupsafe import Markup

from automatch.mapping import KeyMapping
from automatch.report.templates import asset, render
from automatch.report.view import build_view

MAX_ROWS = 400


def render_notebook(mapping: KeyMapping) -> str:
    """The report as an HTML fragment: no scripts, no network, nothing that leaks into the notebook around it."""
    view = build_view(mapping)
    return render("notebook.html.j2", view=view, css=Markup(asset("notebook.css")), max_rows=MAX_ROWS)
