"""However a message was logged, coloured, wrapped, quoted or cut off, the same keys are read out of it."""

from __future__ import annotations

import html
import io
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from automatch.explain import ParsedError, explain, parse_error

MESSAGES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))["error"]
    for path in sorted((Path(__file__).parents[1] / "data" / "messages").glob("*.json"))
}


def each_line(before: str, after: str = "") -> Callable[[str], str]:
    return lambda text: "\n".join(f"{before}{line}{after}" for line in text.split("\n"))


def hard(width: int) -> Callable[[str], str]:
    """What is copied from a terminal of fixed width."""
    return lambda text: "\n".join(
        line[at : at + width] for line in text.expandtabs(8).split("\n") for at in range(0, max(1, len(line)), width)
    )


def by_rich(width: int) -> Callable[[str], str]:
    def printed(text: str) -> str:
        file = io.StringIO()
        Console(width=width, file=file).print(text, markup=False, highlight=False)
        return file.getvalue()

    return printed


def quoted(opening: str, closing: str) -> Callable[[str], str]:
    return lambda text: "".join(
        part if place == 0 else (opening if place % 2 else closing) + part for place, part in enumerate(text.split('"'))
    )


TRACE = 'Traceback (most recent call last):\n  File "/opt/x.py", line 3, in <module>\n    model.load_state_dict(state["a.b"])\n'
DAMAGE: dict[str, Callable[[str], str]] = {
    "crlf": lambda text: text.replace("\n", "\r\n"),
    "stripped": lambda text: "\n".join(map(str.strip, text.split("\n"))),
    "one line": lambda text: " ".join(text.split()),
    "indented": each_line("        "),
    "quoted twice": each_line("> > "),
    "torchrun": each_line("[default1]:"),
    "ray": each_line("(RayTrainWorker pid=1234, ip=10.0.0.1) "),
    "docker": each_line("trainer-1  | "),
    "kubernetes": each_line("2024-05-01T12:00:00.123456789Z "),
    "hydra": each_line("[2024-05-01 12:00:00,123][__main__][ERROR] - "),
    "loguru": each_line("2024-05-01 12:00:00.123 | ERROR    | __main__:main:12 - "),
    "logging": each_line("ERROR:root:"),
    "glog": each_line("E0501 12:00:00.000000 140 torch/x.py:12] "),
    "journal": each_line("May 01 12:00:00 host python[123]: "),
    "slurm": each_line("0: "),
    "mpi": each_line("[1,0]<stderr>:"),
    "pytest": each_line("E       "),
    "framed": each_line("│ ", "   │"),
    "coloured": lambda text: "\x1b[31m" + text.replace(":", "\x1b[39m:\x1b[0m").replace('"', '\x1b[38;5;28;01m"') + "\x1b[0m",
    "colour codes left": lambda text: "[0;31m" + text.replace(": ", ":[0m ") + "^[[0m",
    "repr": lambda text: repr(RuntimeError(text)),
    "html": html.escape,
    "typographic": quoted("“", "”"),
    "backticks": quoted("`", "`"),
    "hard 61": hard(61),
    "hard 80": hard(80),
    "hard, quoted": lambda text: each_line("> ")(hard(80)(text)),
    "rich 50": by_rich(50),
    "rich 80": by_rich(80),
    "textwrap": lambda text: "\n".join(textwrap.fill(line, 80, subsequent_indent="        ") for line in text.split("\n")),
    "traceback before": lambda text: TRACE + text,
    "traceback after": lambda text: text + "\n" + TRACE,
    "exit after": lambda text: text + '\nsrun: error: task 0: Exited\nE0501 x.py:2] failed (pid: 12) of binary: "/usr/bin/python3.10"\n',
    "fenced": lambda text: f"```\n{text}\n```",
    "twice": lambda text: f"{text}\n\n{text}",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_real_messages_survive(damage: str) -> None:
    for name, text in MESSAGES.items():
        assert _keys(parse_error(DAMAGE[damage](text))) == _keys(parse_error(text)), name


def _keys(parsed: ParsedError) -> tuple[object, ...]:
    return parsed.missing, parsed.unexpected, parsed.mismatched


LISTS = {
    "timm": (
        "Missing keys (net.0.weight, net.0.bias) discovered while loading pretrained weights. This is expected.\n"
        "Unexpected keys (body.0.weight, body.0.bias) found while loading pretrained weights. This may be expected."
    ),
    "diffusers": (
        "ValueError: Cannot load <class 'M'> from x because the following keys are missing: \n net.0.weight, net.0.bias. \n Please "
        "make sure to pass `low_cpu_mem_usage=False`\nSome weights of the model checkpoint were not used when initializing M: \n "
        "['body.0.weight, body.0.bias']"
    ),
    "peft": (
        "Loading adapter weights from state_dict led to unexpected keys not found in the model: body.0.weight, body.0.bias. \n"
        "Found missing adapter keys while loading the checkpoint: ['net.0.weight', 'net.0.bias']."
    ),
    "detectron2": (
        "[05/01 12:00:00 fvcore.common.checkpoint]: \x1b[5m\x1b[31mWARNING\x1b[0m Some model parameters or buffers are not found in the "
        "checkpoint:\n\x1b[34mnet.0.{weight, bias}\x1b[0m\n[05/01 12:00:00 fvcore.common.checkpoint]: The checkpoint state_dict contains "
        "keys that are not used by the model:\n  \x1b[35mbody.0.{weight, bias}\x1b[0m\n"
    ),
    "mmengine, logged, and more after it": (
        "05/01 12:00:00 - mmengine - WARNING - The model and loaded state dict do not match exactly\n\n"
        "unexpected key in source state_dict: body.0.weight, body.0.bias\n\nmissing keys in source state_dict: net.0.weight, net.0.bias\n"
        "05/01 12:00:01 - mmengine - INFO - Load checkpoint from work_dirs/epoch_1.pth, then a.b\n"
    ),
    "bare": "CLIPModel Missing: ['net.0.weight', 'net.0.bias']\nCLIPModel Unexpected: ['body.0.weight', 'body.0.bias']\n",
    "transformers 5, logged and coloured": (
        "12:00:00 INFO [transformers] \x1b[1mM LOAD REPORT\x1b[0m from: x\nKey | Status | \n---+---+-\nnet.0.{weight, bias} | "
        "\x1b[38;5;208mMISSING\x1b[0m | \nbody.0.weight | UNEXPECTED | \nbody.0.bias | UNEXPECTED | \n\nNotes:\n- UNEXPECTED: x\n"
    ),
}


@pytest.mark.parametrize("library", LISTS)
def test_lists_of_other_libraries(library: str) -> None:
    for text in (LISTS[library], LISTS[library].replace("\n", "\r\n"), f"[rank1]: {LISTS[library]}"):
        parsed = parse_error(text)
        assert (parsed.missing, parsed.unexpected) == (("net.0.weight", "net.0.bias"), ("body.0.weight", "body.0.bias"))


@pytest.mark.parametrize(
    "text",
    [
        "Cannot load x because head.weight expected shape torch.Size([3, 4]), but got torch.Size([10, 4]). If you want to",
        "Cannot load x because head.weight expected shape tensor(..., device='meta', size=(3, 4)), but got torch.Size([10, 4]).",
        "Skip loading parameter 'head.weight' to the model due to incompatible shapes: (10, 4) in the checkpoint but (3, 4) in the model!",
        "Unable to load 'head.weight' to the model due to incompatible shapes: (10, 4) in the checkpoint but (3, 4) in the model!",
        "'head.weight' has shape (10, 4) in the checkpoint but (3, 4) in the model! Skipped.",
        "ValueError: Size mismatch between saved torch.Size([10, 4]) and current: torch.Size([3, 4]) for head.weight",
        "size mismatch for head.weight: copying a param with\n        shape torch.Size([10, \n4]) from checkpoint, the shape in\ncurrent "
        "model is torch.Size([3, 4]).",
    ],
    ids=["diffusers", "diffusers old", "detectron2", "detectron2 0.1", "fvcore", "torch.distributed.checkpoint", "wrapped"],
)
def test_size_mismatches_of_other_libraries(text: str) -> None:
    (mismatch,) = parse_error(text).mismatched
    assert (mismatch.key, mismatch.source, mismatch.target) == ("head.weight", (10, 4), (3, 4))


def test_the_code_in_a_notebook_traceback_is_no_message(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    code = "from torch import nn\nnn.ModuleDict({'b': nn.Linear(2, 2)}).load_state_dict(nn.ModuleDict({'a': nn.Linear(2, 2)}).state_dict())"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path))
        nbclient.NotebookClient(notebook, allow_errors=True, kernel_name="python3").execute()
    traceback = notebook.cells[0].outputs[-1]["traceback"]
    assert any("\x1b[" in line for line in traceback)
    for text in ("\n".join(traceback), nbformat.writes(notebook)):  # as it is shown, and the file itself
        assert _keys(parse_error(text)) == (("b.weight", "b.bias"), ("a.weight", "a.bias"), ())


def test_a_list_that_breaks_off_is_cut_wherever_it_does() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).load_state_dict({"x.y": torch.zeros(1)})
    whole = str(caught.value)
    listed = parse_error(whole).missing
    end = whole.index(". \n\tUnexpected")
    for at in range(whole.index('",') + 1, end):
        parsed = parse_error(whole[:at])
        assert parsed.missing == listed[: len(parsed.missing)]
        assert parsed.missing_cut
    assert not parse_error(whole[: end + 1]).missing_cut


HOSTILE = {
    "spaces": " ",
    "tabs": "\t",
    "lines": "\n",
    "quotation marks": '"',
    "spaced quotation marks": "' ",
    "brackets": "[",
    "braces": "{",
    "bars": "| ",
    "dashes": "-",
    "dots": ".",
    "segments": "a.",
    "words": "a",
    "escapes": "\x1b[1;",
    "stamps": "2024-01-01 00:00:0",
    "digits": "0",
    "headings": "missing keys in ",
    "sizes": "size mismatch for a: copying a param with shape torch.Size([1",
    "libraries": "weights of the model checkpoint ",
}


@pytest.mark.parametrize("repeated", HOSTILE)
@pytest.mark.parametrize("begin", ["", "Missing key(s) in state_dict: ", "size mismatch for a: copying a param with shape ["])
def test_hostile_text_costs_no_more_than_its_length(repeated: str, begin: str) -> None:
    """With a pattern that goes back over what it has read this takes minutes, not milliseconds."""
    text = begin + HOSTILE[repeated] * (200_000 // len(HOSTILE[repeated]))
    assert explain(text).causes[0].kind in ("unknown", "architecture", "extra")


def test_braces_do_not_multiply_without_end() -> None:
    parsed = parse_error("a." + "{0...99999}." * 8 + "w | MISSING | ")
    assert len(parsed.missing) <= 50_000
