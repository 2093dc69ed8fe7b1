"""The group: help, exit codes, errors instead of tracebacks."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import click
import pytest

from automatch import __version__
from automatch.cli import COMMANDS, main


def test_help_names_every_command_and_the_exit_codes(cli) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)
    assert "Exit codes: 0" in result.stdout


def test_version(cli) -> None:
    assert cli("--version").stdout == f"automatch {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_an_unknown_command_is_wrong_usage(cli) -> None:
    result = cli("propse")
    assert result.exit_code == 2
    assert "No such command 'propse'" in result.stderr


def test_an_interrupt_ends_with_130(cli, folder: Path) -> None:
    result = cli("propose", "net.ckpt", "--model", "models_here.py:interrupted")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


def test_python_dash_m_writes_the_report_to_stdout_and_nothing_else(folder: Path) -> None:
    command = [sys.executable, "-m", "automatch", "propose", "net.ckpt", "--model", "models_here:Net"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "net.ckpt" in done.stdout


def test_bad_input_is_a_message_on_stderr_not_a_traceback(folder: Path) -> None:
    command = [sys.executable, "-m", "automatch", "propose", "gone.ckpt", "--model", "models_here:Net"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "gone.ckpt" in done.stderr
    assert "Traceback" not in done.stderr


def test_review_serves_the_page_until_it_is_interrupted(folder: Path) -> None:
    command = [sys.executable, "-u", "-m", "automatch", "review", "net.ckpt", "--model", "net.ckpt", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with build_opener(ProxyHandler({})).open(address, timeout=30) as page:
            assert b"layers.0.weight" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
