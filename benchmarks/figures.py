"""From records of single cases to the figures and tables of `accuracy.py`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

GOALS = {
    "perfect_share": ">= 0.85",
    "one_answer_share": ">= 0.95",
    "macro_recall": ">= 0.985",
    "confident_precision": ">= 0.9995",
    "confident_cover": ">= 0.93",
    "negative_confident_wrong": "0",
    "ece": "<= 0.01",
    "ops_share": ">= 0.99",
}
CASE_FIELDS = (
    *("id", "keys", "right", "wrong", "missed", "exact", "perfect", "one_answer", "all_answers", "questions"),
    *("confident", "confident_right", "seconds", "error", "faults"),
)
COLUMNS = {
    "perfect_share": "perfect",
    "one_answer_share": "perfect, ≤ 1 answer",
    "macro_recall": "macro recall",
    "confident_precision": "precision ≥ .95",
    "confident_cover": "cover ≥ .95",
    "macro_confident_cover": "cover, macro",
    "confident_wrong": "wrong ≥ .95",
    "negative_confident_wrong": "… on negatives",
    "ece": "ECE",
    "ops_share": "op right",
    "wrong": "wrong",
    "refused": "no answer",
}


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """The figures over ``records``: counts, shares over cases, and shares over pairs."""
    cases = max(1, len(records))
    with_truth = [r for r in records if r["keys"]]
    total = {name: sum(r[name] for r in records) for name in ("keys", "right", "wrong", "confident", "confident_right", "ops", "ops_right")}
    pairs = max(1, total["right"] + total["wrong"])
    bins = len(records[0]["gaps"]) if records else 0
    return {
        "cases": len(records),
        "perfect": sum(r["perfect"] for r in records),
        "perfect_share": sum(r["perfect"] for r in records) / cases,
        "one_answer_share": sum(r["one_answer"] for r in records) / cases,
        "all_answers_share": sum(r["all_answers"] for r in records) / cases,
        "macro_recall": _mean([r["right"] / r["keys"] for r in with_truth]),
        "keys": total["keys"],
        "right": total["right"],
        "wrong": total["wrong"],
        "recall": total["right"] / max(1, total["keys"]),
        "precision": total["right"] / pairs,
        "confident": total["confident"],
        "confident_wrong": total["confident"] - total["confident_right"],
        "confident_precision": total["confident_right"] / total["confident"] if total["confident"] else 1.0,
        "confident_cover": total["confident_right"] / max(1, total["keys"]),
        "macro_confident_cover": _mean([r["confident_right"] / r["keys"] for r in with_truth]),
        "negative_confident_wrong": sum(r["confident"] - r["confident_right"] for r in records if r["group"] == "negative"),
        "ece": sum(abs(sum(r["gaps"][i] for r in records)) for i in range(bins)) / pairs,
        "brier": sum(r["squared_error"] for r in records) / pairs,
        "ops_share": total["ops_right"] / max(1, total["ops"]),
        "questions_per_case": sum(r["questions"] for r in records) / cases,
        "refused": sum(bool(r["error"]) for r in records),
        "seconds": sum(r["seconds"] for r in records),
        "slowest": max((r["seconds"] for r in records), default=0.0),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def dumps(data: Mapping[str, Any]) -> str:
    """JSON with a line per run and per case, so that a diff shows what has changed."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return re.sub(r'(\{"(?:tool|id)":)', r"\n\1", text) + "\n"


def histogram(records: Sequence[Record]) -> list[list[float]]:
    """[confidence to 3 digits, right pairs, pairs] over all records, rising."""
    cells: dict[float, list[int]] = defaultdict(lambda: [0, 0])
    for record in records:
        for confidence, right, count in record["histogram"]:
            cells[confidence][0] += right
            cells[confidence][1] += count
    return [[confidence, *cell] for confidence, cell in sorted(cells.items())]


def run_data(tool: str, tables: str, order: str, records: Sequence[Record]) -> dict[str, Any]:
    """One run in the form of ``accuracy.json``."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["id"].split("-")[2] if order == "generated" else record["group"]].append(record)
    kept = CASE_FIELDS if tool == "automatch" else ("id", "right", "wrong", "missed")
    return {
        "tool": tool,
        "tables": tables,
        "order": order,
        "figures": figures(records),
        "groups": {group: figures(members) for group, members in sorted(groups.items())},
        "histogram": histogram(records),
        "cases": [{name: record[name] for name in kept} for record in records],
    }


def run_title(run: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The name of a run's row."""
    if run["tool"] == "automatch":
        return f"**automatch**, {'as shipped' if run['tables'] == 'shipped' else 'leave-one-family-out'}"
    return titles.get(run["tool"], run["tool"])


def markdown(data: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """``accuracy.json`` as a page: a table per order, one per group, and the cases that are still wrong."""
    runs = data["runs"]
    commands = dict.fromkeys(run["command"] for run in runs)
    parts = ["# Accuracy on the corpus", "", f"Made by {', '.join(f'`{command}`' for command in commands)}; {data['versions']}.", ""]
    parts += [
        "Goals, for leave-one-family-out in the file's own order: " + ", ".join(f"{COLUMNS[k]} {v}" for k, v in GOALS.items()) + ".",
        "",
    ]
    for order in dict.fromkeys(run["order"] for run in runs):
        parts += [f"## {_order_title(order)}", "", *_table([(run_title(r, titles), r["figures"]) for r in runs if r["order"] == order]), ""]
    own = [run for run in runs if run["tool"] == "automatch"]
    for run in own:
        name = f"{run_title(run, titles).replace('*', '')}, {_order_title(run['order']).lower()}"
        parts += [
            f"## Per {'refactoring' if run['order'] == 'generated' else 'group of families'}: {name}",
            "",
            *_table(list(run["groups"].items())),
            "",
        ]
    for run in own:
        name = f"{run_title(run, titles).replace('*', '')}, {_order_title(run['order']).lower()}"
        parts += [f"## Cases not perfect: {name}", "", *_faults(run["cases"]), ""]
    return "\n".join(parts)


def _order_title(order: str) -> str:
    return {
        "file": "Keys in the checkpoint's own order",
        "sorted": "Keys sorted, as in a safetensors file",
        "shuffled": "Keys shuffled",
        "generated": "Random refactorings of real models",
    }.get(order, order)


def _table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    lines = ["| | cases | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    return lines + [f"| {title} | {f['cases']} | " + " | ".join(_cell(name, f[name]) for name in COLUMNS) + " |" for title, f in rows]


def _cell(name: str, value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if name in ("perfect_share", "one_answer_share"):
        return f"{100 * value:.1f} %"
    return f"{value:.4f}"


def _faults(cases: Sequence[Record]) -> list[str]:
    wrong = sorted((c for c in cases if not c["perfect"]), key=lambda c: (c["one_answer"], -(c["wrong"] + c["missed"]), c["id"]))
    lines = ["| case | keys | wrong | missed | questions | after one answer | the first fault |", "|---|---:|---:|---:|---:|---|---|"]
    for c in wrong:
        fault = c["error"] or "; ".join(
            f"{conf:.2f} `{key}` ← {_keys(got)}, truth {_keys(true)}" for conf, key, got, true in c["faults"][:1]
        )
        answer = "perfect" if c["one_answer"] else "perfect with all" if c["all_answers"] else ""
        lines.append(f"| {c['id']} | {c['keys']} | {c['wrong']} | {c['missed']} | {c['questions']} | {answer} | {fault} |")
    return lines if wrong else ["None."]


def _keys(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys) or "none"
