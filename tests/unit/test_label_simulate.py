"""Simulated annotators: like people at the door, like a formula behind it."""

import pytest
import sqlalchemy as sa

from labeling_ui.exporting import snapshot
from labeling_ui.schema import events, queues, rankings, tasks
from labeling_ui.simulate import annotators_of, noisy_ranks, rank_all
from labeling_ui.store import Store, insert_new, task_row
from pipeline import demo_rubric, demo_world
from pipeline.errors import ConfigError
from pipeline.settings.rank import RankSettings

PROMPTS = [row["prompt"] for row in demo_world.demonstrations(40, seed=1)]
STORIES = [row["completion"] for row in demo_world.demonstrations(200, seed=1)]


def settings(**given):
    return RankSettings(by="simulated", **given)


def make(path, prompts=10, responses=4, overlap=1):
    store = Store(path)
    rows = [
        task_row(
            [{"role": "user", "content": f"{PROMPTS[i % len(PROMPTS)]}{' ' * (i // len(PROMPTS))}"}],
            [STORIES[(i * responses + j) % 200] for j in range(responses)],
            round=1, origin="test", step="rank",
        )
        for i in range(prompts)
    ]  # fmt: skip
    queue = {
        "step": "rank",
        "by": "simulated",
        "overlap": overlap,
        "lease_minutes": 30,
        "open": True,
    }
    with store.write() as tx:
        insert_new(tx, queues, [queue])
        insert_new(tx, tasks, rows)
    return store


def test_without_noise_and_margin_the_order_is_the_rubrics():
    prompt, texts = PROMPTS[0], STORIES[:9]
    ranks = noisy_ranks(prompt, texts, "sim-1", settings(noise=0, tie_margin=0), 0)
    scores = [demo_rubric.score(prompt, text) for text in texts]
    for i in range(9):
        for j in range(9):
            assert (ranks[i] < ranks[j]) == (scores[i] > scores[j] + 1e-12)


def test_noise_depends_on_seed_annotator_and_text_and_on_nothing_else():
    quiet = settings(noise=10.0, tie_margin=0)
    first = noisy_ranks(PROMPTS[0], STORIES[:6], "sim-1", quiet, 0)
    assert first == noisy_ranks(PROMPTS[0], STORIES[:6], "sim-1", quiet, 0)
    # the order in which the responses are shown changes nothing
    assert first[::-1] == noisy_ranks(PROMPTS[0], STORIES[:6][::-1], "sim-1", quiet, 0)
    assert first != noisy_ranks(PROMPTS[0], STORIES[:6], "sim-2", quiet, 0)
    assert first != noisy_ranks(PROMPTS[0], STORIES[:6], "sim-1", quiet, 1)


def test_a_wide_margin_ties_everything_and_none_ties_only_equals():
    prompt, texts = PROMPTS[0], STORIES[:9]
    assert set(noisy_ranks(prompt, texts, "sim-1", settings(tie_margin=9.0), 0)) == {1}
    assert len(set(noisy_ranks(prompt, texts, "sim-1", settings(noise=0.5, tie_margin=0), 0))) == 9


def test_a_chain_of_near_equals_does_not_tie_best_and_worst(monkeypatch):
    monkeypatch.setattr(demo_rubric, "score", lambda _, text: float(text))
    texts = ["0.9", "0.86", "0.82", "0.78"]
    assert noisy_ranks("p", texts, "sim-1", settings(noise=0, tie_margin=0.05), 0) == [1, 1, 2, 2]


def test_work_is_shared_among_annotators_and_each_prompt_gets_its_overlap(tmp_path):
    store = make(tmp_path / "labels.db", prompts=20, overlap=2)
    done = rank_all(store, "rank", settings(overlap=2, annotators=4), 0)
    found = snapshot(store, 0.15)
    assert len(done) == len(found) == 40
    assert {r.annotator for r in found} == {"sim-1", "sim-2", "sim-3", "sim-4"}
    by_prompt = {}
    for ranking in found:
        by_prompt.setdefault(ranking.prompt_id, set()).add(ranking.annotator)
    assert all(len(names) == 2 for names in by_prompt.values())


def test_two_stores_with_the_same_seed_hold_the_same_rankings(tmp_path):
    found = []
    for name in ("a.db", "b.db"):
        store = make(tmp_path / name)
        rank_all(store, "rank", settings(), 7)
        found.append(snapshot(store, 0.15))
    assert found[0] == found[1]


def test_asking_again_changes_nothing_and_other_settings_supersede(tmp_path):
    store = make(tmp_path / "labels.db")
    rank_all(store, "rank", settings(noise=0.05), 0)
    before = snapshot(store, 0.15)
    rank_all(store, "rank", settings(noise=0.05), 0)
    assert snapshot(store, 0.15) == before
    rank_all(store, "rank", settings(noise=5.0), 0)
    after = snapshot(store, 0.15)
    assert len(after) == len(before)
    assert after != before
    fresh = make(tmp_path / "fresh.db")
    rank_all(fresh, "rank", settings(noise=5.0), 0)
    assert snapshot(fresh, 0.15) == after
    with store.read() as tx:
        old = tx.execute(sa.select(rankings).where(rankings.c.superseded_by.is_not(None))).all()
    assert old


def test_they_leave_the_same_traces_as_people(tmp_path):
    store = make(tmp_path / "labels.db", prompts=3)
    rank_all(store, "rank", settings(), 0)
    with store.read() as tx:
        kinds = tx.execute(sa.select(events.c.kind)).scalars().all()
    assert sorted(kinds) == ["claim"] * 3 + ["submit"] * 3


def test_more_overlap_than_annotators_is_refused_with_both_numbers(tmp_path):
    store = make(tmp_path / "labels.db", prompts=1)
    with pytest.raises(ConfigError, match=r"rank\.overlap: 4 .*rank\.annotators is 3"):
        rank_all(store, "rank", settings(overlap=4, annotators=3), 0)


def test_who_ranks_a_prompt_does_not_change_when_overlap_grows():
    for i in range(20):
        few = annotators_of(f"p{i}", settings(overlap=1), 0)
        assert annotators_of(f"p{i}", settings(overlap=3), 0)[:1] == few
