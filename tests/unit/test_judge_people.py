"""People as judges: from the answers to the queue, to what they said, and never into reward training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from labeling_ui import judge
from labeling_ui.assignments import claim
from labeling_ui.counting import count
from labeling_ui.exporting import snapshot
from labeling_ui.progress import my_progress
from labeling_ui.rank import queue_samples
from labeling_ui.schema import queues, tasks
from labeling_ui.store import Store
from labeling_ui.submitting import submit
from pipeline.errors import PeopleNeeded, StageError
from pipeline.job import Input, Job, Out
from pipeline.plan import plan
from pipeline.records import Prompt, Response, SampleGroup, read_jsonl, write_jsonl
from pipeline.runner import select
from pipeline.settings import Settings
from stages.judges import by_people, outcome_of_ranks
from tests.label_work import add_people

SAID = {"policy": "good {}", "sft": "fair {}", "base": "bad {}"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "labels.db")) as opened:
        yield opened


def settings(**people: object) -> Settings:
    evaluate = {"judges": ["people"], "people": people}
    return Settings.model_validate({"model": {"base": "b"}, "evaluate": evaluate})


def prompt(i: int) -> Prompt:
    return Prompt(({"role": "user", "content": f"question {i}"},), "test")


def answers(folder: Path, said: dict[str, list[str]]) -> Input:
    """An answers artifact as its stage writes it."""
    folder.mkdir(exist_ok=True)
    count = len(said["policy"])
    write_jsonl(folder / "prompts.jsonl", (prompt(i).to_row() for i in range(count)))
    for model, texts in said.items():
        write_jsonl(folder / f"{model}.jsonl", ({"text": text} for text in texts))
    return Input("answers", f"digest of {folder.name}", path=folder)


def three_models(folder: Path, prompts: int = 4) -> Input:
    said = {model: [text.format(i) for i in range(prompts)] for model, text in SAID.items()}
    return answers(folder, said)


def make_out(folder: Path, name: str = "work") -> Out:
    work = folder / name
    work.mkdir(exist_ok=True)
    return Out(Job("judge", "judge", "labeling_ui.judge", 1, "f", work, folder, {}, {}, {}))


def work(store: Store, who: int, likes: list[str]) -> int:
    """A person who orders answers by their first word; how many prompts they were given."""
    done = 0
    while (given := claim(store, who)) is not None:
        submit(store, who, given.token, [1 + likes.index(t.split()[0]) for t in given.responses])
        done += 1
    return done


def test_it_waits_and_then_writes_what_people_said(store: Store, tmp_path: Path) -> None:
    given, out = {"answers": three_models(tmp_path / "a")}, make_out(tmp_path)
    with pytest.raises(PeopleNeeded, match="judge: waiting for people: 0 of 4 judgements"):
        judge.judge_in(store, settings(), given, out)
    told = json.loads((tmp_path / "rank-progress.json").read_text())
    assert (told["judge"]["have"], told["judge"]["need"]) == (0, 4)
    (ann,) = add_people(store, "ann")
    assert my_progress(store, ann)[1] == 4
    assert work(store, ann, ["good", "fair", "bad"]) == 4
    metrics = judge.judge_in(store, settings(), given, out)
    assert metrics == {"judgements": 4, "prompts": 4, "annotators": 1, "same": 0, "agreement": None}
    rows = read_jsonl(out.artifact / "judgements.jsonl")
    assert len(rows) == 4
    assert "ann" not in (out.artifact / "judgements.jsonl").read_text().replace("annotator", "")
    ranks = {row["text"].split()[0]: row["rank"] for row in rows[0]["responses"]}
    assert ranks == {"good": 1, "fair": 2, "bad": 3}
    # nobody is asked once it is done
    with store.read() as tx:
        assert not tx.execute(sa.select(queues.c.open)).scalar()


def test_nobody_sees_which_model_said_what(store: Store, tmp_path: Path) -> None:
    with pytest.raises(PeopleNeeded):
        judge.judge_in(
            store, settings(), {"answers": three_models(tmp_path / "a")}, make_out(tmp_path)
        )
    with store.read() as tx:
        row = tx.execute(sa.select(tasks)).mappings().first()
    assert row is not None
    assert (row["kind"], row["origin"], row["models"]) == ("judge", "evaluation", None)


def test_judgements_are_no_rankings_to_learn_from(store: Store, tmp_path: Path) -> None:
    """The same responses were sampled for ranking: the two tasks stay apart."""
    given = three_models(tmp_path / "a", prompts=2)
    group = SampleGroup(prompt(0), tuple(Response(text.format(0)) for text in SAID.values()))
    folder = tmp_path / "samples"
    folder.mkdir()
    write_jsonl(folder / "samples.jsonl", [group.to_row()])
    ranked = Out(Job("rank", "rank", "", 1, "f", tmp_path, tmp_path, {}, {}, {}))
    queue_samples(store, settings(), Input("samples", "s", path=folder), ranked, {})  # type: ignore[arg-type]
    with pytest.raises(PeopleNeeded, match="0 of 2"):
        judge.judge_in(store, settings(), {"answers": given}, make_out(tmp_path))
    with store.read() as tx:
        kinds = sorted(tx.execute(sa.select(tasks.c.kind)).scalars())
        assert kinds == ["judge", "judge", "rank"]
    (ann,) = add_people(store, "ann")
    # the queue of the rank step is closed: its prompt is not handed out
    assert work(store, ann, ["good", "fair", "bad"]) == 2
    assert snapshot(store, 0.5) == []
    with store.read() as tx:
        found = count(tx, time.time())
    assert found.rankings == 0
    assert found.left_out == {"judge": 2}
    assert judge.judge_in(store, settings(), {"answers": given}, make_out(tmp_path))["prompts"] == 2


def test_answers_of_another_policy_are_asked_about_anew(store: Store, tmp_path: Path) -> None:
    (ann,) = add_people(store, "ann")
    first = {"answers": three_models(tmp_path / "a", prompts=2)}
    with pytest.raises(PeopleNeeded):
        judge.judge_in(store, settings(), first, make_out(tmp_path))
    work(store, ann, ["good", "fair", "bad"])
    other = answers(tmp_path / "b", {"policy": ["good 9", "good 1"], "sft": ["fair 0", "fair 1"]})
    with pytest.raises(PeopleNeeded, match="0 of 2"):
        judge.judge_in(store, settings(), {"answers": other}, make_out(tmp_path, "other"))
    work(store, ann, ["fair", "good"])
    assert judge.judge_in(store, settings(), {"answers": other}, make_out(tmp_path, "other"))
    # back to the first policy: what people said of it is still there
    assert judge.judge_in(store, settings(), first, make_out(tmp_path))["judgements"] == 2


def test_equal_answers_need_nobody(store: Store, tmp_path: Path) -> None:
    said = {"policy": ["good 0", "x y"], "sft": ["fair 0", "x y"]}
    with pytest.raises(PeopleNeeded, match="0 of 1 judgements"):
        judge.judge_in(
            store, settings(), {"answers": answers(tmp_path / "a", said)}, make_out(tmp_path)
        )
    alike = answers(tmp_path / "b", {"policy": ["x"], "sft": ["x"]})
    with pytest.raises(StageError, match="there is nothing to compare"):
        judge.judge_in(store, settings(), {"answers": alike}, make_out(tmp_path))


def test_two_people_and_a_minimum(store: Store, tmp_path: Path) -> None:
    given, out = {"answers": three_models(tmp_path / "a")}, make_out(tmp_path)
    wanted = settings(overlap=2, minimum=6)
    with pytest.raises(PeopleNeeded, match="0 of 6"):
        judge.judge_in(store, wanted, given, out)
    ann, bob = add_people(store, "ann", "bob")
    work(store, ann, ["good", "fair", "bad"])
    work(store, bob, ["fair", "good", "bad"])
    metrics = judge.judge_in(store, wanted, given, out)
    assert metrics["judgements"] == 8
    assert metrics["agreement"] == pytest.approx(2 / 3)
    texts = {model: [text.format(i) for i in range(4)] for model, text in SAID.items()}
    made = Input("judgements", "d", path=out.artifact)
    compared = [("policy", "sft"), ("policy", "base"), ("best_of_n", "sft")]
    found = by_people(made, [prompt(i) for i in range(4)], texts, compared, wanted)
    assert found.outcomes == {("policy", "sft"): [0.5] * 4, ("policy", "base"): [1.0] * 4}
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(2 / 3)
    assert found.metrics == {"judgements": 8, "annotators": 2}


def test_outcomes_of_ranks_by_hand() -> None:
    ranks = [{"a": 1, "b": 2, "c": 2}, {"a": 2, "b": 1, "c": 3}, {"a": 1, "b": 1, "c": 2}]
    assert outcome_of_ranks(ranks, "a", "b") == pytest.approx(0.5)
    assert outcome_of_ranks(ranks, "b", "c") == pytest.approx(2.5 / 3)
    assert outcome_of_ranks(ranks, "a", "a") == 0.5
    assert outcome_of_ranks([], "a", "b") is None
    assert outcome_of_ranks(ranks, "a", "z") is None


def test_people_add_two_steps_that_belong_to_evaluate() -> None:
    tree = {
        "pretrain": {"data": "demo:stories"},
        "sft": {"data": "demo:demonstrations"},
        "sample": {"prompts": "demo:prompts"},
        "run": {"rounds": 2},
    }
    alone = plan(Settings.model_validate(tree))
    judged = Settings.model_validate({**tree, "evaluate": {"judges": ["reward_model", "people"]}})
    found = {step.name: step for step in plan(judged)}
    names = [step.name for step in alone]
    places = [names.index("evaluate"), names.index("evaluate-2")]
    expected = [*names[: places[0]], "answers", "judge", "evaluate"]
    expected += [*names[places[0] + 1 : places[1]], "answers-2", "judge-2", "evaluate-2"]
    assert list(found) == expected
    assert found["judge-2"].inputs == {"answers": "answers-2"}
    assert found["evaluate-2"].inputs["judgements"] == "judge-2"
    assert found["evaluate-2"].inputs["policy_1"] == "ppo"
    assert "policy_1" not in found["evaluate"].inputs
    chosen = [step.name for step in select(judged, only="evaluate")]
    assert chosen == ["answers", "judge", "evaluate", "answers-2", "judge-2", "evaluate-2"]
    assert [step.name for step in select(judged, only="evaluate-2")] == ["evaluate-2"]
    assert [step.name for step in select(judged, until="answers")][-1] == "answers"
