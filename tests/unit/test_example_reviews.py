"""The example of rewards that are Python functions: its data, its rules, its configuration."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.plan import plan
from pipeline.settings import Settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "reviews"
REVIEW = "the film begins with a man who has lost everything he ever had .\ntoo short .\n"


def write_zip(path: Path, texts: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name, text)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from prefline_reviews import prepare

    monkeypatch.setattr(prepare, "_PROMPTS", 1)
    reviews = {"movie_reviews/pos/a.txt": REVIEW, "movie_reviews/README": "a b " * 10}
    reviews["movie_reviews/neg/b.txt"] = REVIEW.replace("the film", "this one")
    write_zip(tmp_path / "movie_reviews.zip", reviews)
    words = {
        "positive-words.txt": "; a comment\n\ngood\nwell-made\n",
        "negative-words.txt": "bad\n",
    }
    write_zip(tmp_path / "opinion_lexicon.zip", words)
    polarity = {"rt-polarity.pos": "a good film\n" * 40, "rt-polarity.neg": "a bad film\n" * 40}
    write_zip(tmp_path / "sentence_polarity.zip", polarity)
    prepare.main(tmp_path, tmp_path / "out")
    monkeypatch.setenv("PREFLINE_REVIEWS", str(tmp_path / "out"))
    return tmp_path / "out"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_beginnings_that_no_demonstration_shares(made: Path) -> None:
    prompts = [row["prompt"] for row in rows_of(made / "prompts.jsonl")]
    shown = [row["messages"] for row in rows_of(made / "sft.jsonl")]
    assert len(prompts) == len(shown) == 1
    assert {*prompts, shown[0][0]["content"]} == {
        "the film begins with a",
        "this one begins with a",
    }
    assert shown[0][1]["content"] == "man who has lost everything he ever had ."


def test_the_rules_count_words_and_weigh_them(made: Path) -> None:
    from prefline_reviews import rules

    rules._read.cache_clear()
    assert rules.lexicon([], "Good, GOOD and well-made; not bad at all") == 2.0
    model = json.loads((made / "classifier.json").read_text())
    known = ["good", "a good", "good film", "a", "film"]
    expected = model["bias"] + sum(model["weights"][word] for word in known) / math.sqrt(5)
    assert rules.classifier([], "A good film") == pytest.approx(expected)
    assert rules.classifier([], "a good film") > 0 > rules.classifier([], "a bad film")
    assert rules.classifier([], "") == pytest.approx(model["bias"])


def test_its_configuration_ranks_nothing() -> None:
    tree = yaml.safe_load((EXAMPLE / "reviews.yaml").read_text())
    steps = [step.name for step in plan(Settings.model_validate(tree))]
    assert steps == ["tokenizer", "pretrain", "sft", "ppo", "evaluate"]
