"""The situation this project was born from, for real: train, refactor the class, fail to load, load."""

from __future__ import annotations

from automatch.demo.story import DemoResult, run

__all__ = ["DemoResult", "run"]
