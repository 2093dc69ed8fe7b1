"""``python -m automatch``: the command line."""

from __future__ import annotations

from automatch.cli import main

if __name__ == "__main__":
    main(prog_name="automatch")
