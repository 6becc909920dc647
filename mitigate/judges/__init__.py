"""Judges: language models behind an OpenAI-compatible endpoint that grade answers, and the verdicts they gave."""

from __future__ import annotations

from mitigate.judges.cache import CACHE, graded, verdicts
from mitigate.judges.client import Judge, Message, Reply, judge_of

__all__ = ["CACHE", "Judge", "Message", "Reply", "graded", "judge_of", "verdicts"]
