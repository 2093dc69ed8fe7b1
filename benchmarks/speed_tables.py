"""The results of `speed.py` as a page, with the goals beside them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

NAMES = {"automatch": "automatch", "hungarian": "plain Hungarian", "weightbridge": "weightbridge 0.0.4", "lit_wsl": "lit-wsl 0.3.3"}


def seconds_of(row: Mapping[str, Any]) -> float | None:
    """Median seconds of a measurement, the first call left out where there were others; None where there is no answer."""
    seconds = row.get("seconds")
    if not seconds:
        return None
    return statistics.median(seconds[1:] or seconds)


def main_figures(data: Mapping[str, Any]) -> dict[str, float | None]:
    """The few figures that the history keeps."""
    found: dict[str, float | None] = {}
    for part in ("small", "moe", "adversarial"):
        for title, tools in data.get(part, {}).items():
            found[title] = seconds_of(tools.get("automatch", {}))
    found["slope"] = data.get("growth", {}).get("slope")
    found["import"] = data.get("importing", {}).get("import_automatch_after_torch")
    found["help"] = data.get("importing", {}).get("help")
    found["corpus"] = data.get("corpus", {}).get("wall")
    for way in ("copy", "assign"):
        found[f"load {way}"] = _ratio(data.get("loading", {}).get(way, {}), "seconds")
    return found


def markdown(data: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = ["# Speed", "", f"Made by `{data['command']}` on {data['machine']}. Times are medians: of the processor for proposing, "]
    lines[-1] += "of the clock for loading and start-up. Memory is the peak beyond torch."
    lines.append("")
    if "small" in data:
        lines += ["## A 200-key model", "", "Goal: ≤ 60 ms after import, ≤ 100 × the plain Hungarian, ≤ 1/30 of weightbridge.", ""]
        lines += _tool_table(data["small"])
    if "moe" in data:
        lines += ["## Mixtures of experts", "", "Goal: 46,000 keys ≤ 4 s and ≤ 600 MB; 100,000 keys ≤ 10 s.", ""]
        lines += _tool_table(data["moe"])
    if "growth" in data:
        lines += _growth(data["growth"])
    if "adversarial" in data:
        lines += [
            "## Nothing to go by",
            "",
            "Goal: ends, ≤ 30 s, ≤ 2 GB, no pair at confidence ≥ 0.95.",
            "",
            *_tool_table(data["adversarial"]),
        ]
    if "loading" in data:
        lines += _loading(data["loading"])
    if "importing" in data:
        lines += _importing(data["importing"])
    if "corpus" in data:
        found = data["corpus"]
        lines += ["## The whole corpus, two processes", "", f"{found['cases']} cases in {found['wall']:.1f} s (goal: ≤ 60 s); "]
        lines[-1] += f"the sum over cases is {found['sum']:.1f} s, the slowest took {found['slowest']:.2f} s."
    return "\n".join(lines).rstrip() + "\n"


def _tool_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| model | tool | time | first call | × automatch | memory | right of true | confident pairs | questions |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for title, tools in rows.items():
        own = seconds_of(tools.get("automatch", {}))
        for tool, row in tools.items():
            time = seconds_of(row)
            if time is None:
                lines.append(f"| {title} | {NAMES[tool]} | {row['status']} | | | | | | |")
                continue
            ratio = f"{time / own:.3g}" if own else ""
            refused = "" if row["status"] == "answered" else f" ({row['status'].split(':')[0]})"
            cells = f"{_seconds(time)}{refused} | {_seconds(row['seconds'][0])} | {ratio} | {row['peak_megabytes']:.0f} MB"
            counts = f"{row['right']} of {row['true']} | {row['confident']} | {row['questions'] if tool == 'automatch' else ''}"
            lines.append(f"| {title} | {NAMES[tool]} | {cells} | {counts} |")
    return [*lines, ""]


def _growth(found: Mapping[str, Any]) -> list[str]:
    slope = "not measured" if found["slope"] is None else f"{found['slope']:.2f}"
    lines = ["## Growth", "", f"Slope of log time over log keys: **{slope}** (goal: ≤ 1.1).", ""]
    lines += ["| keys | time | per key | memory | right of true |", "|---:|---:|---:|---:|---:|"]
    for keys, row in found["rows"].items():
        if "seconds" not in row:
            lines.append(f"| {keys} | {row['status']} | | | |")
            continue
        time = statistics.median(row["seconds"])
        rest = f"{row['peak_megabytes']:.0f} MB | {row['right']} of {row['true']}"
        lines.append(f"| {keys} | {_seconds(time)} | {1e6 * time / int(keys):.0f} µs | {rest} |")
    return [*lines, ""]


def _loading(found: Mapping[str, Any]) -> list[str]:
    size = found["file"].get("bytes", 0) / 2**30
    lines = [f"## Loading {size:.1f} GB", "", "`automatch.load` of renamed keys against `load_state_dict` of the right ones, both "]
    lines[-1] += "from a file mapped into memory. Goal: ≤ 1.1 × time, ≤ 1.05 × peak memory."
    lines += [
        "",
        "| into | tool | load | load and read once | peak memory | × time | × time, read | × memory |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way, title in (("copy", "a model with memory of its own"), ("assign", "a model on the meta device")):
        for tool, name in (("torch", "load_state_dict"), ("automatch", "automatch.load")):
            row = found[way][tool]
            if "seconds" not in row:
                lines.append(f"| {title} | {name} | {row['status']} | | | | | |")
                continue
            ratios = [_ratio(found[way], key) if tool == "automatch" else 1.0 for key in ("seconds", "used_seconds", "peak_megabytes")]
            cells = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
            times = f"{_seconds(row['seconds'])} | {_seconds(row['used_seconds'])}"
            lines.append(f"| {title} | {name} | {times} | {row['peak_megabytes']:.0f} MB | {cells} |")
    return [*lines, ""]


def _ratio(tools: Mapping[str, Any], key: str) -> float | None:
    own, torch = tools.get("automatch", {}).get(key), tools.get("torch", {}).get(key)
    return own / torch if own and torch else None


def _importing(found: Mapping[str, Any]) -> list[str]:
    lines = ["## Start-up", "", "| what | time | goal |", "|---|---:|---|"]
    rows = [
        ("`import torch`", "import_torch", ""),
        ("`import automatch` after it", "import_automatch_after_torch", "≤ 50 ms"),
        ("`automatch --help`, in all", "help", "≤ 300 ms"),
        ("a bare interpreter", "bare_interpreter", ""),
    ]
    lines += [f"| {title} | {_seconds(found[key])} | {goal} |" for title, key, goal in rows]
    return [*lines, ""]


def _seconds(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
