"""The judge behind an endpoint, against a real server that is busy, broken, late, biased or unreadable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from pipeline import worker
from pipeline.config import load_settings
from pipeline.errors import ConfigError, StageError
from pipeline.job import Job, Out
from pipeline.records import Prompt, Ranking
from pipeline.settings import Settings
from pipeline.settings.judges import TEMPLATE
from stages import endpoint_client
from stages.endpoint_client import Endpoint
from stages.endpoint_judge import (
    Comparison,
    both_orders,
    by_endpoint,
    habits,
    outcome_of,
    shown_prompt,
    verdict_in,
)
from stages.label_agreement import Labels
from stages.verdicts import Verdict, verdict_metrics
from tests.judge_server import judge_server

SFT_POLICY = [("policy", "sft")]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "PAUSE_SECONDS", 0.001)


def settings_for(url: str, **endpoint: object) -> Settings:
    given = {"url": url, "model": "judge-1", "attempts": 3, **endpoint}
    return Settings.model_validate(
        {"model": {"base": "b"}, "evaluate": {"judges": ["endpoint"], "endpoint": given}}
    )


def prompt(text: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},))


def ask(
    url: str,
    folder: Path,
    asked: dict[str, tuple[str, str]],
    labels: Labels | None = None,
    **endpoint: object,
) -> Verdict:
    """asked: request -> (what the policy said, what sft said)."""
    texts = {name: [two[i] for two in asked.values()] for i, name in enumerate(("policy", "sft"))}
    job = Job("evaluate", "evaluate", "", 1, "f", folder, folder, {}, {}, {})
    prompts = [prompt(text) for text in asked]
    settings = settings_for(url, **endpoint)
    return by_endpoint(settings, prompts, texts, SFT_POLICY, labels, Accelerator(), Out(job))


LONG, SHORT = "one two three four", "one two"


def test_both_orders_are_asked_and_wins_ties_and_losses_counted(tmp_path: Path) -> None:
    asked = {
        "the policy is better": (LONG, SHORT),
        "sft is better": (SHORT, LONG),
        "both are alike": ("a b", "c d"),
        "the same text": (LONG, LONG),
    }
    with judge_server() as server:
        found = ask(server.url, tmp_path, asked)
        assert found.outcomes["policy", "sft"] == [1.0, 0.0, 0.5, 0.5]
        # two questions each, none about equal texts
        assert len(server.questions) == 6
        assert set(server.questions.values()) == {1}
        body = server.bodies[0]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0, 512)
    metrics = verdict_metrics(found, {"policy": ["", "", "", ""], "sft": ["", "", "", ""]}, seed=0)
    assert metrics["judge_endpoint_win_rate_vs_sft"] == 0.5
    assert metrics["judge_endpoint_win_rate_vs_sft_ties"] == 0.5
    assert metrics["judge_endpoint_position_bias"] == 0.0
    assert metrics["judge_endpoint_first_place_rate"] is None
    assert metrics["judge_endpoint_questions"] == 6
    assert metrics["judge_endpoint_prompt_tokens"] == 600


def test_a_judge_who_always_takes_the_first_decides_nothing(tmp_path: Path) -> None:
    asked = {f"FIRST {i}": (LONG, SHORT) for i in range(3)} | {"fair": (LONG, SHORT)}
    with judge_server() as server:
        found = ask(server.url, tmp_path, asked)
    assert found.outcomes["policy", "sft"] == [0.5, 0.5, 0.5, 1.0]
    assert found.metrics["position_bias"] == 0.75
    assert found.metrics["first_place_rate"] == 1.0


def test_a_busy_broken_or_late_server_is_asked_again(tmp_path: Path) -> None:
    asked = {f"{how} {i}": (LONG, SHORT) for how in ("BUSY", "BROKEN") for i in range(3)}
    asked["LATE"] = (SHORT, LONG)
    with judge_server() as server:
        found = ask(server.url, tmp_path, asked, timeout_seconds=0.5)
        server.let_go.set()
        assert set(server.questions.values()) == {2}
    assert found.outcomes["policy", "sft"] == [1.0] * 6 + [0.0]


def test_what_cannot_be_read_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"GARBAGE": (LONG, SHORT), "REFUSE": (LONG, SHORT), "a": (LONG, SHORT)}
    asked["b"] = (SHORT, LONG)
    with judge_server() as server:
        found = ask(server.url, tmp_path, asked)
    assert found.outcomes["policy", "sft"] == [None, None, 1.0, 0.0]
    assert found.metrics["unreadable"] == 0.5
    assert found.metrics["refused"] == 2
    assert "50.0% of the comparisons cannot be read" in capsys.readouterr().err
    lengths = {"policy": [""] * 4, "sft": [""] * 4}
    metrics = verdict_metrics(found, lengths, seed=0)
    assert metrics["judge_endpoint_win_rate_vs_sft_prompts"] == 2


def test_a_judge_of_whom_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    asked = {f"GARBAGE {i}": (LONG, SHORT) for i in range(3)}
    with (
        judge_server() as server,
        pytest.raises(StageError, match=r"no answer of judge-1 can be read.*I like both"),
    ):
        ask(server.url, tmp_path, asked)


def test_a_killed_evaluation_asks_for_the_rest_only(tmp_path: Path) -> None:
    asked = {f"question {i}": (LONG, SHORT) for i in range(8)}
    with judge_server() as server:
        half = dict(list(asked.items())[:4])
        ask(server.url, tmp_path, half)
        (kept,) = (tmp_path / "checkpoints").glob("endpoint*.jsonl")
        # killed within a line
        kept.write_bytes(kept.read_bytes()[:-20])
        found = ask(server.url, tmp_path, asked)
        assert found.outcomes["policy", "sft"] == [1.0] * 8
        assert server.questions.total() == 17
        ask(server.url, tmp_path, asked)
        assert server.questions.total() == 17
        # with another number of processes
        kept.rename(kept.with_name("endpoint-1-of-2.jsonl"))
        ask(server.url, tmp_path, asked)
        assert server.questions.total() == 17
        # another judge is asked anew
        ask(server.url, tmp_path, asked, model="judge-2")
        assert server.questions.total() == 33


def test_a_signal_ends_the_asking_and_keeps_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_signals_seen", [15])
    two = prompt("a"), LONG, SHORT
    texts = [both_orders(Comparison(*two), f"{i} {TEMPLATE}")[0] for i in range(9)]
    kept = tmp_path / "endpoint.jsonl"
    with judge_server() as server:
        endpoint = Endpoint(settings_for(server.url, requests_at_once=1).evaluate.endpoint)
        rows = endpoint.ask_all(texts, kept, lambda done, total: None)
    assert 1 <= len(rows) < 9
    assert len(kept.read_text().splitlines()) == len(rows)


def test_the_key_comes_from_the_environment_and_is_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"a": (LONG, SHORT)}
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with judge_server(key="sk-very-secret") as server:
        ask(server.url, tmp_path, asked, key_variable="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "sk-another-secret")
        with pytest.raises(StageError, match=r"401.*\(the key\)") as error:
            ask(server.url, tmp_path / "other", asked, key_variable="JUDGE_KEY")
    assert "$JUDGE_KEY" in str(error.value)
    told = str(error.value) + "".join(capsys.readouterr())
    files = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "secret" not in told + files
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="the environment has no JUDGE_KEY"):
        ask(server.url, tmp_path, asked, key_variable="JUDGE_KEY")


@pytest.mark.parametrize("url", ["http://name:sk-secret@host/v1", "http://host/v1?key=sk-secret"])
def test_a_key_in_the_address_is_refused_and_not_repeated(url: str) -> None:
    values = ["model.base=b", f"evaluate.endpoint.url={url}"]
    with pytest.raises(ConfigError, match="no key belongs here") as error:
        load_settings(Settings, None, values)
    assert "sk-secret" not in str(error.value)


def test_a_server_that_is_not_there_or_refuses_everything_is_told(tmp_path: Path) -> None:
    with judge_server() as server:
        url = server.url
        with pytest.raises(StageError, match=r"every question is refused.*content policy"):
            ask(url, tmp_path, {f"REFUSE {i}": (LONG, SHORT) for i in range(4)})
        with pytest.raises(StageError, match="404") as error:
            ask(url.removesuffix("/v1"), tmp_path, {"a": (LONG, SHORT)})
        assert "evaluate.endpoint.url" in str(error.value)
    with pytest.raises(StageError, match=r"3 attempts"):
        ask(url, tmp_path, {"a": (LONG, SHORT)})


def test_agreement_is_asked_about_in_both_orders_too(tmp_path: Path) -> None:
    """The judge likes more words: so does the annotator of two prompts, and not the one of the third."""

    def ranked(text: str, ranks: tuple[int, int]) -> Ranking:
        return Ranking(prompt(text).messages, (LONG, SHORT), ranks, "ada", "heldout")

    learned = [Ranking(prompt("x").messages, (LONG, SHORT), (2, 1), "ada", "train")]
    rankings = [ranked("p", (1, 2)), ranked("q", (1, 2)), ranked("r", (2, 1)), ranked("s", (1, 1))]
    labels = Labels(rankings + learned, "people")
    with judge_server() as server:
        found = ask(server.url, tmp_path, {"a": (LONG, SHORT)}, labels)
        assert found.agreement is not None
        assert found.agreement.value == pytest.approx(2 / 3)
        assert found.agreement.n == 3
        assert len(server.questions) == 8
        few = ask(server.url, tmp_path, {"a": (LONG, SHORT)}, labels, agreement_pairs=0)
        assert few.agreement is None


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", "A"),
        ("Both are good.\n\n**B**", "B"),
        ("Answer: A.", "A"),
        ("The rest.\nFinal answer: tie\n\n", "tie"),
        ("[[b]]", "B"),
        ("<think>A or B? A.</think>\nB", "B"),
        ("A is better than B", None),
        ("A\nno, wait", None),
        ("C", None),
        ("", None),
        (None, None),
    ],
)
def test_verdicts_are_read_from_the_last_line(answer: str | None, verdict: str | None) -> None:
    assert verdict_in(answer) == verdict


def test_only_two_wins_are_a_win() -> None:
    outcomes = {(s, e): outcome_of(s, e) for s in ("A", "B", "tie") for e in ("A", "B", "tie")}
    assert {key for key, value in outcomes.items() if value == 1} == {("A", "B")}
    assert {key for key, value in outcomes.items() if value == 0} == {("B", "A")}
    assert outcome_of("A", None) is None
    told = [("A", "A"), ("B", "B"), ("A", "A"), ("A", "B"), ("tie", "A"), (None, "A")]
    found = habits(told)
    assert found["position_bias"] == pytest.approx(3 / 5)
    assert found["first_place_rate"] == pytest.approx(2 / 3)
    assert found["unreadable"] == pytest.approx(1 / 6)


def test_slots_in_an_answer_are_text(tmp_path: Path) -> None:
    with judge_server() as server:
        found = ask(server.url, tmp_path, {"say {second}": ("{first} and {second} {x}", "no")})
        assert found.outcomes["policy", "sft"] == [1.0]
        assert any("{first} and {second} {x}" in text for text in server.questions)


def test_settings_take_keys_of_the_request_out_and_add_others(tmp_path: Path) -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 9, "temperature": None}
    with judge_server() as server:
        ask(server.url, tmp_path, {"a": (LONG, SHORT)}, extra=extra)
        assert set(server.bodies[0]) == {"model", "messages", "max_completion_tokens"}


def test_a_conversation_is_shown_with_its_speakers() -> None:
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"})
    shown = shown_prompt(Prompt((*turns, {"role": "user", "content": "Bye"})))
    assert shown == "user: Hi\n\nassistant: Yes?\n\nuser: Bye"
    assert json.dumps(shown_prompt(prompt("Hi"))) == '"Hi"'
