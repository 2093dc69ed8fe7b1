from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import report_zoo as zoo

anywidget = pytest.importorskip("anywidget", reason="needs anywidget: pip install anywidget")

from automatch.report.widget import ReviewWidget  # noqa: E402

NORM = "model.blocks.0.norm1.weight"


def test_decisions_change_the_mapping() -> None:
    widget = ReviewWidget(zoo.transformer())
    seen = []
    widget.observe(lambda change: seen.append(change["new"]), "mapping")
    widget.decisions = {"answers": [["q1", 1]], "decisions": [["model.embed.weight", None, None]]}
    assert widget.mapping[NORM].sources == ("bert.encoder.layer.0.norm_b.weight",)
    assert "model.embed.weight" in widget.mapping.missing_keys
    assert seen == [widget.mapping]
    widget.decisions = {"answers": [], "decisions": []}
    assert widget.mapping == zoo.transformer()


def test_decisions_that_do_not_fit_change_nothing() -> None:
    widget = ReviewWidget(zoo.transformer())
    widget.decisions = {"answers": [["q9", 0]], "decisions": []}
    assert "no question 'q9'" in widget.error
    assert widget.mapping == zoo.transformer()
    widget.decisions = {"answers": [["q1", 0]], "decisions": []}
    assert widget.error == ""


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><style>%s</style><body><div id="cell"></div></body></html>"""
FRONT_END = """
    const [esm, state, done] = arguments;
    const listeners = {};
    window.sent = [];
    window.model = {
      get: (name) => state[name],
      set: (name, value) => (state[name] = value),
      save_changes: () => sent.push(JSON.parse(JSON.stringify(state.decisions))),
      on: (event, call) => (listeners[event] = call),
      off: (event) => delete listeners[event],
    };
    window.fromPython = (name, value) => { state[name] = value; listeners["change:" + name](); };
    import("data:text/javascript;base64," + esm).then(async (widget) => {
      window.stop = await widget.default.render({ model, el: document.querySelector("#cell") });
      done();
    });
"""


@pytest.mark.browser
def test_the_widget_in_a_browser_speaks_with_python(browser: Any, tmp_path: Path) -> None:
    widget = ReviewWidget(zoo.transformer())
    page = tmp_path / "cell.html"
    page.write_text(PAGE % ReviewWidget._css, encoding="utf-8")
    browser.get(page.as_uri())
    esm = base64.b64encode(ReviewWidget._esm.encode()).decode()
    state = {name: getattr(widget, name) for name in ("_html", "_data", "decisions", "error")}
    browser.execute_async_script(FRONT_END, esm, state)

    browser.find_elements("css selector", "fieldset input")[1].click()
    sent = json.loads(browser.execute_script("return JSON.stringify(sent.at(-1))"))
    widget.decisions = sent
    assert widget.mapping[NORM].sources == ("bert.encoder.layer.0.norm_b.weight",)

    browser.execute_script("fromPython('decisions', {answers: [['q1', 0]], decisions: []})")
    assert browser.find_elements("css selector", "fieldset input")[0].is_selected()
    browser.execute_script("fromPython('error', 'that does not fit')")
    assert browser.find_element("css selector", ".am-said").text == "that does not fit"
    browser.execute_script("stop()")
