"""Held-out pictures and phrasings: what training never shows."""

from __future__ import annotations

from demo_data import phrases, pictures

STYLE = pictures.TRAINING
QUESTIONS: dict[str, tuple[str, ...]] = {"unknown": phrases.UNKNOWN}
