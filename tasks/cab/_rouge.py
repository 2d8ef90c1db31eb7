"""ROUGE as CAB reports it: F1 of ROUGE-1, ROUGE-2 and summary-level ROUGE-L, with Porter's stemmer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attnbench.tasks.data.extras import require

NAMES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeLsum": "rougeL"}
"""Scores of rouge-score, by what a row calls them. ``rougeLsum`` is ROUGE-L of the original scorer."""

_ABBREVIATIONS = (
    "mr mrs ms dr prof sen rep gov gen col lt sgt st jr sr inc corp co ltd vs etc e.g i.e u.s u.k u.n no jan "
    "feb mar apr jun jul aug sep sept oct nov dec"
)
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 in percent over pairs of texts whose sentences stand on lines of their own.

    Raises UsageError without the library rouge-score.
    """
    library = require("rouge_score.rouge_scorer", "rouge-score", "ROUGE")
    scorer = library.RougeScorer(list(NAMES), use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {
        name: 100.0 * sum(score[key].fmeasure for score in scores) / len(scores)
        for key, name in NAMES.items()
    }


def sentences(text: str) -> list[str]:
    """Split running text after . ! ? before a capital or a digit, unless an abbreviation ends there."""
    found: list[str] = []
    for piece in _END.split(text.strip()):
        if found and _abbreviated(found[-1]):
            found[-1] += " " + piece
        else:
            found.append(piece)
    return [sentence for sentence in found if sentence]


def _abbreviated(text: str) -> bool:
    """Whether ``text`` ends with an abbreviation or an initial and its full stop."""
    last = text.split()[-1:]
    word = last[0].removesuffix(".").lower() if last and last[0].endswith(".") else ""
    return word in _ABBREVIATIONS.split() or re.fullmatch("[a-z]", word) is not None
