"""Facts that an utterance names in so many words: degree, subject, term, test, year, amount, date."""

from __future__ import annotations

import re
from typing import Final

_MONTHS: Final = "january|february|march|april|may|june|july|august|september|october|november|december"

_PATTERNS: Final[tuple[tuple[str, re.Pattern[str]], ...]] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("degree", r"\b(bachelor|master|doctora(?:l|te)|ph\.?d|undergraduate|graduate)(?:'?s)?\b"),
        (
            "subject",
            r"\b(computer science|mechanical engineering|engineering|business administration"
            r"|international business|business|psychology|biology|architecture|medicine|data science|robotics"
            r"|public health)\b",
        ),
        ("term", r"\b(fall|autumn|spring|summer|winter)\b(?: (?:semester|term))?"),
        ("test", r"\b(ielts|toefl|gmat|gre|sat|duolingo)\b"),
        ("applicant", r"\b(international|transfer|exchange|first[- ]year|part[- ]time)\b"),
        ("amount", r"(\$ ?\d[\d,.]*\d|\b\d[\d,.]*\d? (?:dollars|euros)\b)"),
        ("score", r"\b(\d{1,3}\.\d)\b"),
        ("date", rf"\b((?:{_MONTHS}) \d{{1,2}})\b"),
        ("year", r"\b(20\d\d)\b"),
    )
)


def entities(text: str) -> dict[str, str]:
    """The first mention of each kind, lower case; kinds that are not mentioned are absent."""
    found: dict[str, str] = {}
    for name, pattern in _PATTERNS:
        match = pattern.search(text)
        if match:
            found[name] = match.group(1).lower()
    return found
