"""Judging the answers of models: the page is the ranking page, and tells nothing of the models."""

import pytest
from selenium.webdriver.common.keys import Keys

from labeling_ui import judge
from pipeline.errors import PeopleNeeded
from pipeline.job import Input, Job, Out
from pipeline.records import Prompt, write_jsonl
from pipeline.settings import Settings

pytestmark = pytest.mark.browser


def judged(site, folder):
    """Judge one prompt that three models have answered; the error, or the metrics."""
    prompt = Prompt(({"role": "user", "content": "Say hello."},), "test")
    said = {"policy": "Hello!", "sft": "Hm, hello.", "base": "the the"}
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "prompts.jsonl", [prompt.to_row()])
    for model, text in said.items():
        write_jsonl(folder / f"{model}.jsonl", [{"text": text}])
    out = Out(Job("judge", "judge", "", 1, "f", folder, folder, {}, {}, {}))
    tree = {"model": {"base": "b"}, "evaluate": {"judges": ["people"]}}
    given = {"answers": Input("answers", "digest", path=folder)}
    return judge.judge_in(site.store, Settings.model_validate(tree), given, out)


def test_answers_of_models_are_judged_like_any_prompt(site, page, tmp_path):
    with pytest.raises(PeopleNeeded, match="0 of 1 judgements"):
        judged(site, tmp_path / "answers")
    page.open(site.person())
    page.until(lambda: page.prompt() == "Say hello.")
    whole = page.driver.page_source
    assert not [name for name in ("policy", "sft", "evaluation") if name in whole]
    best = {page.text_of(letter): letter for letter in "ABC"}["Hello!"]
    page.press(*("1" if letter == best else "2" for letter in "ABC"), Keys.ENTER)
    page.until(site.saved)
    assert judged(site, tmp_path / "answers")["judgements"] == 1
