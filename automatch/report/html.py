"""The review as one self-contained HTML page: no network, opens from disk, no markup ever read from a key."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from markupsafe import Markup

from automatch.files import write_atomically
from automatch.mapping import KeyMapping
from automatch.report.pagedata import page_data, script_json
from automatch.report.templates import asset, render
from automatch.report.view import build_view

APP = tuple(f"js/{name}.js" for name in ("text", "model", "export", "rows", "list", "detail", "tangle", "glance", "app"))
STYLES = ("tokens.css", "page.css", "keys.css")
DOCUMENT = "document.css"


def render_html(mapping: KeyMapping, *, save: str = "") -> str:
    """The page as text.

    Args:
        mapping: what to review.
        save: address on the same host that takes the decisions; without one the page writes mapping.json itself.
    """
    view = build_view(mapping)
    script = f'"use strict";\n{asset(*APP, "js/page.js")}'
    css = asset(DOCUMENT, *STYLES)
    return render(
        "page.html.j2",
        view=view,
        uid="am",
        save=save,
        standalone=True,
        csp=content_policy(script, css, connect=bool(save)),
        css=Markup(css),
        script=Markup(script),
        data=Markup(script_json(page_data(mapping, view))),
    )


def write_html(mapping: KeyMapping, path: str | Path) -> Path:
    """Write the page to ``path`` and return it."""
    return write_atomically(Path(path), render_html(mapping).encode("utf-8"))


def content_policy(script: str, css: str, *, connect: bool) -> str:
    """A Content-Security-Policy that allows this script, this style sheet, and nothing else."""
    allowed = [
        "default-src 'none'",
        f"script-src '{_digest(script)}'",
        f"style-src '{_digest(css)}'",
        "connect-src 'self'" if connect else "connect-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return "; ".join(allowed)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
