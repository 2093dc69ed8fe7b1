"""The page in a real browser: what a person does with it, and what hostile keys cannot."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import report_zoo as zoo
import torch
from torch import nn

import automatch
from automatch.report.collapse import ranges
from automatch.report.decisions import apply_decisions
from automatch.report.wording import percent, short
from automatch.review_server import ReviewServer

CONTROL_A, DELETE, END = "\ue009a\ue000", "\ue017", "\ue010"

pytestmark = pytest.mark.browser


def show(browser: Any, mapping: automatch.KeyMapping, path: Path) -> None:
    browser.get(mapping.to_html(path).as_uri())
    wait(browser, "return document.querySelector('.am-tangle.ready') !== null")


def wait(browser: Any, script: str) -> Any:
    for _ in range(200):
        if result := browser.execute_script(script):
            return result
        time.sleep(0.05)
    raise AssertionError(f"never true: {script}")


def texts(browser: Any, css: str) -> list[str]:
    """In one step: the page may draw its rows again between two questions of the driver."""
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(element => element.innerText)", css)


def click(browser: Any, css: str, text: str = "") -> None:
    exceptions = pytest.importorskip("selenium.common.exceptions")
    support = pytest.importorskip("selenium.webdriver.support.wait")
    find = """
        const found = [...document.querySelectorAll(arguments[0])].find(element => element.innerText.includes(arguments[1]));
        if (found) found.scrollIntoView({block: 'center'});
        return found;
    """

    def once(browser: Any) -> bool:
        element = browser.execute_script(find, css, text)
        assert element, f"no {css} with {text!r}"
        element.click()
        return True

    stale = exceptions.StaleElementReferenceException  # drawn again since it was found
    support.WebDriverWait(browser, 10, ignored_exceptions=[stale]).until(once)


def press(browser: Any, keys: str) -> None:
    browser.find_element("css selector", ".am-port").send_keys(keys)


def rows(browser: Any) -> list[str]:
    return texts(browser, ".am-sheet .am-row")


def search(browser: Any, text: str) -> None:
    field = browser.find_element("css selector", ".am-search")
    field.send_keys(CONTROL_A, DELETE, text)


def export(browser: Any) -> Path:
    click(browser, ".am-save")
    for _ in range(600):
        # Chromium reserves the name with an empty file, fills another, and renames that one when it is complete.
        for path in browser.downloads.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size:
                    return path
        time.sleep(0.05)
    raise AssertionError("nothing was downloaded")


def test_export_without_decisions_is_the_mapping(browser: Any, tmp_path: Path) -> None:
    mapping = zoo.transformer()
    show(browser, mapping, tmp_path / "page.html")
    assert automatch.KeyMapping.load(export(browser)) == mapping


def test_search_and_filters_narrow_the_rows(browser: Any, tmp_path: Path) -> None:
    show(browser, zoo.transformer(), tmp_path / "page.html")
    search(browser, "norm_a")
    assert sum("norm_a.weight" in row for row in rows(browser)) == 5
    search(browser, "")
    click(browser, ".chip", "Converted")
    assert browser.find_element("css selector", ".chip[aria-pressed=true]").text == "Converted 12"
    assert all("join" in row or "transpose" in row for row in rows(browser))
    click(browser, ".chip", "Unmatched")
    assert any("num_batches_tracked" in row and "harmless" in row for row in rows(browser))
    assert any("pooler.dense.weight" in row and "feeds nothing" in row for row in rows(browser))


def test_sorting_puts_the_least_sure_first(browser: Any, tmp_path: Path) -> None:
    show(browser, zoo.transformer(), tmp_path / "page.html")
    click(browser, ".am-sort option", "least sure first")
    assert "61%" in rows(browser)[0]


def test_an_answer_settles_its_keys(browser: Any, tmp_path: Path) -> None:
    mapping = zoo.transformer()
    show(browser, mapping, tmp_path / "page.html")
    click(browser, "fieldset label", "norm_b is norm1")
    exported = automatch.KeyMapping.load(export(browser))
    assert exported.questions == ()
    assert {m.target: m.sources for m in exported.matches} == {m.target: m.sources for m in mapping.answer("q1", 1).matches}
    assert all(exported[key].decided for key in mapping.questions[0].keys)


def test_keys_accept_reject_and_take_back(browser: Any, tmp_path: Path) -> None:
    show(browser, zoo.transformer(), tmp_path / "page.html")
    search(browser, "head.weight")
    press(browser, "jj")
    press(browser, "a")
    search(browser, "embed.weight")
    press(browser, "jjr")
    exported = automatch.KeyMapping.load(export(browser))
    assert exported["head.weight"].decided
    assert "model.embed.weight" in exported.missing_keys
    assert "bert.embeddings.weight" in exported.unexpected_keys
    click(browser, ".am-clear")
    assert browser.find_element("css selector", ".am-state").text == "No decisions yet"


def test_the_page_and_python_put_the_same_decisions_into_a_mapping(browser: Any, tmp_path: Path) -> None:
    mapping = zoo.transformer()
    show(browser, mapping, tmp_path / "page.html")
    click(browser, "fieldset label", "norm_b is norm1")
    search(browser, "head.weight")
    press(browser, "jja")
    payload = browser.execute_script("return automatchReview.review.payload()")
    expected = apply_decisions(mapping, payload)
    exported = automatch.KeyMapping.load(export(browser))
    assert exported.missing_keys == expected.missing_keys
    assert exported.unexpected_keys == expected.unexpected_keys
    assert [(m.target, m.sources, m.transform, m.decided) for m in exported.matches] == [
        (m.target, m.sources, m.transform, m.decided) for m in expected.matches
    ]


def glance(browser: Any) -> tuple[str, list[str], list[str]]:
    def texts(css: str) -> list[str]:
        found = browser.find_elements("css selector", f".am-glance {css}")
        return ["".join(element.get_attribute("textContent").split()) for element in found]

    rects = browser.find_elements("css selector", ".am-glance .bar rect")
    widths = [f"{float(rect.get_attribute('width')):.1f}" for rect in rects]
    return (
        browser.find_element("css selector", ".am-glance .bar").get_attribute("aria-label"),
        [*texts("h2"), *texts(".rest"), *widths],
        texts("li"),
    )


def test_coverage_and_confidence_follow_every_decision(browser: Any, tmp_path: Path) -> None:
    show(browser, zoo.transformer(), tmp_path / "page.html")
    first = glance(browser)
    click(browser, "fieldset label", "norm_b is norm1")
    search(browser, "embed.weight")
    press(browser, "jjr")
    changed = glance(browser)
    assert changed[0] == "21 of 29 model keys fed: 20 confident, 1 withheld, 4 missing, 4 missing but harmless"
    decided = automatch.KeyMapping.load(export(browser))
    click(browser, ".am-clear")
    assert glance(browser) == first
    page = decided.to_html(tmp_path / "decided.html").read_text(encoding="utf-8")
    static = page.partition('<section class="am-glance"')[2].partition("</section>")[0]
    browser.get("about:blank")
    browser.execute_script("document.body.innerHTML = `<section class='am-glance'>${arguments[0]}</section>`", static.partition(">")[2])
    assert glance(browser) == changed


def test_decisions_survive_closing_the_page(browser: Any, tmp_path: Path) -> None:
    show(browser, zoo.transformer(), tmp_path / "page.html")
    click(browser, "fieldset label", "norm_a is norm1")
    browser.get("about:blank")
    show(browser, zoo.transformer(), tmp_path / "page.html")
    assert browser.find_element("css selector", "fieldset input[value='0']").is_selected()
    assert "1 answer" in browser.find_element("css selector", ".am-state").text
    browser.execute_script("for (const name of Object.keys(localStorage)) localStorage.setItem(name, '{\"decisions\": 7}')")
    show(browser, zoo.transformer(), tmp_path / "page.html")
    assert browser.find_element("css selector", ".am-state").text == "No decisions yet"


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class New(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def test_a_repointed_mapping_loads_the_right_model(browser: Any, tmp_path: Path) -> None:
    old, new = Old(), New()
    proposed = automatch.propose_mapping(new, old.state_dict())
    wrong = proposed
    for part in ("weight", "bias"):
        wrong = wrong.decide(f"a.{part}", f"second.{part}").decide(f"b.{part}", f"first.{part}")
    show(browser, wrong, tmp_path / "page.html")
    browser.find_element("css selector", ".am-sort").send_keys("model order")
    for target, source in [
        ("a.weight", "first.weight"),
        ("a.bias", "first.bias"),
        ("b.weight", "second.weight"),
        ("b.bias", "second.bias"),
    ]:
        search(browser, target)
        press(browser, "j")
        click(browser, ".am-detail summary")
        browser.find_element("css selector", ".repoint").send_keys(source)
        click(browser, ".am-detail details .choice", source)
    automatch.load(new, old.state_dict(), mapping=export(browser))
    x = torch.randn(3, 4)
    assert torch.equal(new(x), old(x))


def test_the_module_picture_unfolds_and_lists_keys(browser: Any, tmp_path: Path) -> None:
    show(browser, zoo.transformer(), tmp_path / "page.html")
    labels = texts(browser, ".am-tangle ul:first-of-type .label")
    assert "encoder.layer.{0…3}" in labels
    click(browser, ".am-tangle button[aria-expanded=true]", "attention.self")
    assert "query" not in texts(browser, ".am-tangle .label")
    click(browser, ".am-tangle button", "norm_a")
    assert "norm_a" in browser.find_element("css selector", ".am-search").get_attribute("value")


def test_hostile_keys_stay_text(browser: Any, tmp_path: Path) -> None:
    mapping = zoo.hostile()
    show(browser, mapping, tmp_path / "page.html")
    assert browser.execute_script("return document.querySelectorAll('img, iframe, script').length") == 2
    for filtered in ("all", "open", "unmatched"):
        browser.execute_script("automatchReview.filterBy(arguments[0])", filtered)
        browser.execute_script("for (let i = 0; i < automatchReview.list.entries.length; i++) automatchReview.list.select(i)")
        text = browser.execute_script("return document.body.innerText")
        assert not set(text) & set("\x00\x07\x1b\u202e\u2066\u200b\u2028")
    assert automatch.KeyMapping.load(export(browser)) == automatch.KeyMapping.from_dict(mapping.to_dict())


def test_the_policy_blocks_every_script_and_request_but_its_own(browser: Any, tmp_path: Path) -> None:
    show(browser, zoo.transformer(), tmp_path / "page.html")
    script = """
        const done = arguments[0];
        const blocked = [];
        addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
        const element = document.createElement("style");
        element.textContent = "body { display: none }";
        document.head.append(element);
        try { document.body.innerHTML = "<b>" } catch (error) { blocked.push(error.name) }
        fetch("data:,x").catch(() => setTimeout(() => done(blocked), 100));
    """
    blocked = browser.execute_async_script(script)
    browser.get_log("browser")
    assert {"style-src-elem", "connect-src", "TypeError"} <= set(blocked)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_accessibility(browser: Any, tmp_path: Path, axe_script: str, theme: str, width: int) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    metrics = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    show(browser, zoo.transformer(), tmp_path / "page.html")
    press(browser, "jjj")
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": axe_script})
    result = browser.execute_async_script("axe.run().then(arguments[0])")
    serious = [(v["id"], [n["target"] for n in v["nodes"]]) for v in result["violations"] if v["impact"] in ("serious", "critical")]
    assert serious == []


def test_nothing_sticks_out_of_a_narrow_window(browser: Any, tmp_path: Path) -> None:
    metrics = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for name, mapping in (("zoo", zoo.transformer()), ("hostile", zoo.hostile())):
        show(browser, mapping, tmp_path / f"{name}.html")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400


def test_printing_shows_every_key(browser: Any, tmp_path: Path) -> None:
    mapping = zoo.transformer(layers=12)
    show(browser, mapping, tmp_path / "page.html")
    assert len(rows(browser)) < len(mapping)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert len(rows(browser)) > len(mapping)
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert len(rows(browser)) < len(mapping)


def test_many_keys_cost_few_elements(browser: Any, tmp_path: Path) -> None:
    mapping = zoo.transformer(layers=400)
    show(browser, mapping, tmp_path / "page.html")
    browser.execute_script("automatchReview.rows.sort = 'model'; automatchReview.list.rebuild(false)")
    press(browser, END)
    assert len(rows(browser)) < 100
    assert "pooler.dense.bias" in rows(browser)[-1]
    assert (tmp_path / "page.html").stat().st_size < 100_000 + 300 * len(mapping)


def test_without_scripts_the_essentials_are_there(tmp_path: Path) -> None:
    text = zoo.transformer().to_html(tmp_path / "page.html").read_text()
    static = text.partition("<script")[0]
    for words in ("Which norm comes first", "num_batches_tracked", "13</b> confident", "tied to model.embed.weight"):
        assert words in static
    data = text.partition('class="am-data">')[2].partition("</script>")[0]
    assert json.loads(data)["threshold"] == 0.95


def test_the_served_page_saves_by_itself(browser: Any, tmp_path: Path) -> None:
    mapping = zoo.transformer()
    with ReviewServer(mapping, tmp_path / "mapping.json") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            browser.get(server.url)
            click(browser, "fieldset label", "norm_b is norm1")
            click(browser, ".am-save")
            said = wait(browser, "return document.querySelector('.am-said').textContent.startsWith('Saved') && 'yes'")
        finally:
            server.close()
            thread.join()
    assert said
    saved = automatch.KeyMapping.load(tmp_path / "mapping.json")
    assert saved == automatch.KeyMapping.from_dict(mapping.answer("q1", 1).to_dict())


def test_the_page_words_things_as_python_does(browser: Any, tmp_path: Path) -> None:
    mapping = zoo.hostile()
    show(browser, mapping, tmp_path / "page.html")
    assert mapping.target.spec is not None
    shown = browser.execute_script("return automatchReview.review.target.keys.map((key) => short(key))")
    assert shown == [short(key) for key in mapping.target.spec.keys]
    values = [0, 0.004, 0.29, 0.57, 0.58, 0.95, 0.99999, 1]
    assert browser.execute_script("return arguments[0].map(percent)", values) == [percent(value) for value in values]
    numbers = [[0, 1, 2], [12, 14], [0, 2, 5, 6], [0, 2, 4, 6, 8, 10]]
    assert browser.execute_script("return arguments[0].map(ranges)", numbers) == [ranges(row) for row in numbers]
