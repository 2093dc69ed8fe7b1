"""The review as a notebook widget whose decisions change a mapping in Python; needs anywidget."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets

from automatch.errors import MappingError
from automatch.mapping import KeyMapping
from automatch.report.decisions import apply_decisions
from automatch.report.html import APP, STYLES
from automatch.report.pagedata import page_data, script_json
from automatch.report.templates import asset, render
from automatch.report.view import build_view


class ReviewWidget(anywidget.AnyWidget):
    """Review a mapping in a notebook: accept, reject, re-point and answer; ``widget.mapping`` follows.

    Args:
        mapping: what to review.
    """

    _esm = asset(*APP, "js/widget.js")
    _css = asset(*STYLES)
    _html = traitlets.Unicode().tag(sync=True)
    _data = traitlets.Unicode().tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)
    decisions: traitlets.Dict[str, Any] = traitlets.Dict().tag(sync=True)
    mapping = traitlets.Instance(KeyMapping)

    def __init__(self, mapping: KeyMapping) -> None:
        view = build_view(mapping)
        self._proposed = mapping
        super().__init__(
            mapping=mapping,
            _html=render("body.html.j2", view=view, uid=f"am-{id(self)}", save="", standalone=False),
            _data=script_json(page_data(mapping, view)),
            decisions={"answers": [], "decisions": []},
        )

    @traitlets.observe("decisions")
    def _decide(self, change: Any) -> None:
        try:
            self.mapping = apply_decisions(self._proposed, change["new"])
            self.error = ""
        except MappingError as error:
            self.error = str(error)
