"""The rules: a word list, which PPO optimises, and a classifier, which only watches.

Both read what `python -m prefline_reviews.prepare` wrote, from the folder that the environment
variable PREFLINE_REVIEWS names.
"""

from __future__ import annotations

import json
import math
import os
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
FOLDER = "PREFLINE_REVIEWS"


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def features(text: str) -> set[str]:
    """The different words and pairs of neighbours."""
    found = words(text)
    return {*found, *(f"{a} {b}" for a, b in pairwise(found))}


def lexicon(messages: list[dict[str, Any]], response: str) -> float:
    """Positive minus negative words of the response, in the word list of Hu and Liu (2004)."""
    sign = _read("lexicon.json")
    return float(sum(sign.get(word, 0) for word in words(response)))


def classifier(messages: list[dict[str, Any]], response: str) -> float:
    """Log-odds that a sentence is praise, by a logistic regression on words and pairs of words."""
    model = _read("classifier.json")
    known = [model["weights"][f] for f in features(response) if f in model["weights"]]
    return float(model["bias"] + sum(known) / math.sqrt(max(1, len(known))))


@cache
def _read(name: str) -> Any:
    folder = os.environ.get(FOLDER)
    if not folder:
        raise RuntimeError(f"set {FOLDER} to the folder that prefline_reviews.prepare wrote")
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))
