"""The settings tree as a whole."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import field_paths, load_settings
from pipeline.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def test_every_field_has_a_sentence():
    lacking = [
        key
        for key, field in field_paths(Settings).items()
        if not (field.description or "").strip().endswith(".")
    ]
    assert lacking == []


def test_every_section_has_a_sentence():
    assert all(field.description for field in Settings.model_fields.values())


def test_settings_cannot_be_changed_after_reading():
    settings = Settings.model_validate({"pretrain": {"data": "demo:stories"}})
    with pytest.raises(ValidationError, match="frozen"):
        settings.run.seed = 1


def test_settings_survive_the_way_through_json():
    settings = load_settings(Settings, ROOT / "configs" / "demo.yaml")
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_that_comes_with_prefline_is_valid(path):
    load_settings(Settings, path)


def test_a_single_source_may_be_written_without_a_list():
    one = Settings.model_validate({"pretrain": {"data": "a.txt"}})
    two = Settings.model_validate({"pretrain": {"data": ["a.txt"]}})
    assert one == two


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValidationError, match="minibatch_rows 7 does not divide"):
        Settings.model_validate(
            {"pretrain": {"data": "a"}, "ppo": {"minibatch_rows": 7, "prompts_per_step": 64}}
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrain": {"objective": "masked"}, "rank": {"data": "r"}}, "nor reward"),
        ({"pretrain": {"objective": "masked"}, "model": {"base": "b"}}, "from scratch only"),
        ({"ppo": {"lora": {"rank": 4, "dropout": 0.1}}}, "lora.dropout must be 0 in ppo"),
        (
            {"launch": {"processes": 3}, "rank": {"data": "r"}},
            "launch.processes 3 does not divide the 64 rows of a minibatch of ppo",
        ),
    ],
)
def test_settings_that_cannot_work_together_are_refused_before_anything_starts(given, message):
    given["pretrain"] = {"data": "a.txt", **given.get("pretrain", {})}
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate(given)


def test_the_older_spelling_of_judges_still_works_and_the_last_one_counts() -> None:
    def judges(**evaluate: object) -> tuple[str, ...]:
        return Settings.model_validate(
            {"model": {"base": "b"}, "evaluate": evaluate}
        ).evaluate.judges

    assert judges() == ("reward_model",)
    assert judges(judge="rule", rule="polite") == ("rule",)
    assert judges(judges="rule", rule="polite") == ("rule",)
    # a run of then, and an override of now; and the other way round
    assert judges(judge="rule", judges=["people", "rule"], rule="x") == ("people", "rule")
    assert judges(judges=["people"], judge="rule", rule="x") == ("rule",)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"judges": []}, "name one at least"),
        ({"judges": ["people", "people"]}, "each once"),
        ({"judges": ["rule"]}, "give both or neither"),
        ({"judges": ["endpoint"], "endpoint": {"url": "http://h/v1"}}, "endpoint.model"),
        ({"endpoint": {"template": "{prompt} {first}"}}, "the template lacks {second}"),
        ({"endpoint": {"url": "host/v1"}}, "give an address such as"),
    ],
)
def test_a_judge_needs_what_it_judges_with(evaluate: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.model_validate({"model": {"base": "b"}, "evaluate": evaluate})
