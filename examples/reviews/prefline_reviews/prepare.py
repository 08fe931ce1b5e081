"""Make the data of the example from the corpora of NLTK.

    python -m prefline_reviews.prepare NLTK_FOLDER OUT

NLTK_FOLDER holds movie_reviews.zip, sentence_polarity.zip and opinion_lexicon.zip. Into OUT:
sft.jsonl and prompts.jsonl, the first words of a review's sentence and how it goes on; lexicon.json;
classifier.json, trained on sentence_polarity, which is another corpus than the policy's.
"""

from __future__ import annotations

import json
import random
import sys
import zipfile
from collections import Counter
from pathlib import Path

import torch

from prefline_reviews.rules import features

_BEGINNING = 5  # words that the prompt gives
_PROMPTS = 4000  # sentences that are prompts, and no demonstrations


def main(corpora: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pairs = sentences(corpora / "movie_reviews.zip")
    random.Random(0).shuffle(pairs)
    cut = len(pairs) - _PROMPTS
    _write(
        out / "sft.jsonl",
        [
            {"messages": [_turn("user", beginning), _turn("assistant", rest)]}
            for beginning, rest in pairs[:cut]
        ],
    )
    _write(out / "prompts.jsonl", [{"prompt": beginning} for beginning, _ in pairs[cut:]])
    (out / "lexicon.json").write_text(json.dumps(lexicon(corpora / "opinion_lexicon.zip")))
    model, accuracy = classifier(corpora / "sentence_polarity.zip")
    (out / "classifier.json").write_text(json.dumps(model))
    print(f"{cut} demonstrations, {len(pairs) - cut} prompts")
    print(f"classifier: {accuracy:.3f} of the held-out sentences right")


def sentences(corpus: Path) -> list[tuple[str, str]]:
    """(first words, the rest) of every sentence of 12 to 40 words, each beginning once."""
    found: dict[str, str] = {}
    for name, text in _texts(corpus):
        if not name.endswith(".txt"):
            continue
        for line in text.splitlines():
            words = line.split()
            if 12 <= len(words) <= 40:
                found[" ".join(words[:_BEGINNING])] = " ".join(words[_BEGINNING:])
    return sorted(found.items())


def lexicon(corpus: Path) -> dict[str, int]:
    """word -> 1 or -1."""
    signs = {"positive-words.txt": 1, "negative-words.txt": -1}
    found: dict[str, int] = {}
    for name, text in _texts(corpus):
        sign = signs.get(name.split("/")[-1])
        if sign:
            rows = (row.strip() for row in text.splitlines())
            found |= {row: sign for row in rows if row and not row.startswith(";")}
    return found


def classifier(corpus: Path) -> tuple[dict[str, object], float]:
    """Logistic regression on words and pairs of words; and its accuracy on a tenth held back."""
    rows = [
        (features(line), float(name.endswith(".pos")))
        for name, text in _texts(corpus)
        if name.endswith((".pos", ".neg"))
        for line in text.splitlines()
    ]
    random.Random(0).shuffle(rows)
    held_back, train = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    counts = Counter(feature for found, _ in train for feature in found)
    index = {feature: i for i, feature in enumerate(sorted(f for f, n in counts.items() if n > 1))}
    weights = torch.zeros(len(index), requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    inputs, labels = _matrix([found for found, _ in train], index), _labels(train)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=60)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights + bias
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        value = value + 3e-6 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        logits = _matrix([found for found, _ in held_back], index) @ weights + bias
        accuracy = ((logits > 0).float() == _labels(held_back)).float().mean().item()
        by_feature = dict(zip(index, weights.tolist(), strict=True))
    return {"bias": bias.item(), "weights": by_feature}, accuracy


def _matrix(rows: list[set[str]], index: dict[str, int]) -> torch.Tensor:
    """One row for each set of features, scaled to length 1: long sentences count no more than short ones."""
    spots, values = [], []
    for row, found in enumerate(rows):
        known = [index[feature] for feature in found if feature in index]
        spots += [(row, column) for column in known]
        values += [max(1, len(known)) ** -0.5] * len(known)
    shape = (len(rows), len(index))
    return torch.sparse_coo_tensor(
        torch.tensor(spots).T, torch.tensor(values), shape, check_invariants=True
    )


def _labels(rows: list[tuple[set[str], float]]) -> torch.Tensor:
    return torch.tensor([label for _, label in rows])


def _texts(corpus: Path) -> list[tuple[str, str]]:
    with zipfile.ZipFile(corpus) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        return [(name, archive.read(name).decode("utf-8", errors="replace")) for name in names]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
