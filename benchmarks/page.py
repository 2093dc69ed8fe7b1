"""The review page in headless Chromium: screenshots for the README, and how fast it is with 45,395 keys.

    python benchmarks/page.py               # writes benchmarks/screenshots/*.png and benchmarks/results/page.json
    python benchmarks/page.py --pictures    # the pictures alone

Needs chromium and chromedriver on PATH, selenium and pillow. The times of rules, of writing
and of the first paint are wall times: leave the machine alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from corpus_cases import case_paths, load_case, skeleton, state_dict
from PIL import Image
from selenium import webdriver

import automatch
from automatch.demo import after, before

HERE = Path(__file__).parent
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
ASKING = "mistral-orig-to-hf-seqcls"
MANY = "deepseek-v3-original-to-hf4"
ACTS = {
    "search_cpu_ms": [f"app.searchFor({text!r})" for text in ("experts.1", "gate_proj", "layers.7 w1", "nothing", "")],
    "filter_cpu_ms": [f"app.filterBy({name!r})" for name in ("open", "same", "unmatched", "all")],
    "sort_cpu_ms": [f"app.rows.sort = {name!r}; app.list.rebuild(false)" for name in ("sure", "key", "checkpoint", "rule")],
    "scroll_cpu_ms": [f"app.list.port.scrollTop = {top}; app.list.draw(true)" for top in (200_000, 500_000, 900_000)],
    "export_cpu_ms": ["JSON.stringify(exportMapping(app.review))"],
}
FIRST_PAINT = "return Math.round(performance.getEntriesByName('first-contentful-paint')[0].startTime)"


def measure(browser: Any, page: Path) -> dict[str, Any]:
    """What a page costs: wall times to the first paint of three visits, and processor time of what a person does.

    The processor time is that of the page's main thread, layout included.
    """
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    found: dict[str, Any] = {"first_paint_ms": []}
    for _ in range(3):
        browser.get(page.as_uri())
        time.sleep(3)
        found["first_paint_ms"].append(browser.execute_script(FIRST_PAINT))

    def spent() -> float:
        metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    for name, acts in ACTS.items():
        found[name] = []
        for act in acts:
            start = spent()
            browser.execute_script(f"const app = window.automatchReview; {act}; void document.body.offsetHeight;")
            found[name].append(round((spent() - start) * 1000))
    found["elements"] = browser.execute_script("return document.querySelectorAll('*').length")
    return found


def open_chromium(folder: Path) -> Any:
    """A Chromium with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or sys.exit("needs chromium on PATH: apt-get install chromium chromium-driver")
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def picture(browser: Any, page: Path, name: str, *, size: tuple[int, int] = (1280, 900), dark: bool = False, script: str = "") -> None:
    """Write screenshots/``name``.png of ``page`` after ``script``."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    time.sleep(1)
    if script:
        browser.execute_script(script)
        time.sleep(0.5)
    (HERE / "screenshots").mkdir(exist_ok=True)
    image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(HERE / "screenshots" / f"{name}.png", optimize=True)


def corpus_mapping(name: str) -> automatch.KeyMapping:
    """The proposal for one case of the corpus."""
    case = load_case(next(path for path in case_paths([name]) if path.name.startswith(f"{name}.")))
    return automatch.propose_mapping(skeleton(case), state_dict(case))


def write_pictures(browser: Any, folder: Path, many: Path) -> None:
    """The four pictures: overview, a question in the dark, a phone, and the keys of a large model."""
    refactored = automatch.propose_mapping(after.MedicalSegmentationModel(), before.MedicalSegmentationModel().state_dict())
    demo = refactored.to_html(folder / "demo.html")
    asking = corpus_mapping(ASKING).to_html(folder / "asking.html")
    picture(browser, demo, "light", size=(1280, 1290))
    picture(browser, asking, "dark", size=(1280, 1640), dark=True)
    picture(browser, asking, "narrow", size=(400, 1290))
    show_keys = "document.querySelector('.am-keys').scrollIntoView(); automatchReview.list.select(0, {toggle: true});"
    picture(browser, many, "many", size=(1280, 860), script=f"{show_keys} automatchReview.list.select(2)")


def main() -> None:
    """Write the pictures, and without ``--pictures`` measure and store the times as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="write the pictures alone, measure nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        many = corpus_mapping(MANY)
        start = time.perf_counter()
        many.rules  # noqa: B018 - worked out once, and measured apart
        rules_s = time.perf_counter() - start
        start = time.perf_counter()
        page = many.to_html(folder / "many.html")
        write_s = time.perf_counter() - start
        browser = open_chromium(folder / "profile")
        try:
            write_pictures(browser, folder, page)
            if arguments.pictures:
                return
            times = measure(browser, page)
        finally:
            browser.quit()
        result = {"case": MANY, "keys": len(many), "file_mb": round(page.stat().st_size / 1e6, 2), "load": round(os.getloadavg()[0], 1)}
        result |= {"rules_s": round(rules_s, 1), "write_s": round(write_s, 1), **times}
    (HERE / "results" / "page.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
