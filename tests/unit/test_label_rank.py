"""The rank step: what it waits for, what it writes, and when it refuses."""

import json
from dataclasses import replace

import pytest
import sqlalchemy as sa

from labeling_ui import rank
from labeling_ui.assignments import claim
from labeling_ui.exporting import pseudonyms
from labeling_ui.importing import import_rankings
from labeling_ui.progress import tell_progress
from labeling_ui.schema import queues, tasks, users
from labeling_ui.store import Store, insert_new, task_row
from labeling_ui.submitting import submit
from pipeline import demo_world
from pipeline.errors import DataError, PeopleNeeded, StageError
from pipeline.job import Input, Job, Out
from pipeline.records import Prompt, Ranking, Response, SampleGroup, read_jsonl, write_jsonl
from pipeline.settings import Settings

STORIES = [row["completion"] for row in demo_world.demonstrations(200, seed=3)]


def settings(seed=0, **given):
    return Settings.model_validate(
        {"model": {"base": "./m"}, "run": {"seed": seed}, "rank": {"by": "simulated", **given}}
    )


def make_out(tmp_path, step="rank", round=1, name="work"):
    work = tmp_path / name
    work.mkdir(exist_ok=True)
    return Out(Job(step, "rank", "labeling_ui.rank", round, "f" * 12, work, tmp_path, {}, {}, {}))


def samples(tmp_path, prompts=30, responses=4, name="samples", texts=STORIES):
    """A samples artifact as the sample stage writes it."""
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    rows = [row["prompt"] for row in demo_world.demonstrations(prompts, seed=5)]
    train = [Prompt(({"role": "user", "content": f"{text} {i}"},)) for i, text in enumerate(rows)]
    test = [Prompt(({"role": "user", "content": f"test {i}"},), "test") for i in range(3)]
    groups = [
        SampleGroup(p, tuple(Response(texts[(i + j) % len(texts)]) for j in range(responses)))
        for i, p in enumerate(train)
    ]
    write_jsonl(folder / "samples.jsonl", (group.to_row() for group in groups))
    write_jsonl(folder / "prompts.jsonl", (prompt.to_row() for prompt in train + test))
    return Input("samples", f"digest of {name}", folder)


def data(tmp_path, rows, name="data.jsonl"):
    write_jsonl(tmp_path / name, rows)
    return Input("data", "d", sources=(str(tmp_path / name),))


def pairs(count):
    return [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(count)]


def written(out):
    return [Ranking.from_row(row) for row in read_jsonl(out.artifact / "rankings.jsonl")]


def files(out):
    return {path.name: path.read_bytes() for path in out.artifact.iterdir()}


# ---- simulated annotators ------------------------------------------------------------------


def test_simulated_rankings_of_samples_become_an_artifact(tmp_path):
    out = make_out(tmp_path)
    metrics = rank.run(settings(), {"samples": samples(tmp_path)}, out)
    found = written(out)
    assert metrics["rankings"] == metrics["prompts"] == len(found) == 30
    assert metrics["train"] + metrics["heldout"] == 30
    assert metrics["heldout"] > 0
    assert metrics["mean_responses"] == 4
    assert metrics["strict_pairs"] == sum(len(r.strict_pairs) for r in found)
    assert metrics["agreement"] is None
    assert {r.source for r in found} == {"simulated"}


def test_the_prompts_of_the_samples_keep_their_splits(tmp_path):
    given, out = samples(tmp_path), make_out(tmp_path)
    rank.run(settings(), {"samples": given}, out)
    rows = {row["id"]: row for row in read_jsonl(out.artifact / "prompts.jsonl")}
    assert rows == {row["id"]: row for row in read_jsonl(given.path / "prompts.jsonl")}


def test_the_same_work_gives_the_same_files_in_a_new_store_and_in_the_old_one(tmp_path):
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        out = make_out(tmp_path / name)
        rank.run(settings(overlap=2), {"samples": samples(tmp_path)}, out)
        results.append(files(out))
    again = make_out(tmp_path / "two", name="again")
    rank.run(settings(overlap=2), {"samples": samples(tmp_path)}, again)
    assert results[0] == results[1] == files(again)


def test_an_old_store_does_not_leak_into_the_result_of_other_settings(tmp_path):
    """Fewer annotators, another seed, other samples: as if the store were new."""
    first = samples(tmp_path, prompts=30, name="first")
    second = samples(tmp_path, prompts=25, name="second")
    rank.run(settings(overlap=3), {"samples": first}, make_out(tmp_path))
    used = make_out(tmp_path, name="used")
    rank.run(settings(seed=9, overlap=1), {"samples": second}, used)
    (tmp_path / "clean").mkdir()
    clean = make_out(tmp_path / "clean")
    rank.run(settings(seed=9, overlap=1), {"samples": second}, clean)
    assert files(used) == files(clean)


def test_agreement_of_annotators_without_noise_is_perfect_and_with_much_noise_is_chance(tmp_path):
    agreements = []
    for i, noise in enumerate((0.0, 100.0)):
        (tmp_path / str(i)).mkdir()
        given = settings(overlap=2, noise=noise, tie_margin=0)
        metrics = rank.run(given, {"samples": samples(tmp_path)}, make_out(tmp_path / str(i)))
        agreements.append(metrics["agreement"])
    assert agreements[0] == 1.0
    assert 0.4 < agreements[1] < 0.6


def test_prompts_with_one_response_only_are_counted_and_left_out(tmp_path):
    given = samples(tmp_path)
    rows = read_jsonl(given.path / "samples.jsonl")
    rows[0]["responses"] = rows[0]["responses"][:1]
    write_jsonl(given.path / "samples.jsonl", rows)
    metrics = rank.run(settings(), {"samples": given}, make_out(tmp_path))
    assert metrics["dropped"] == {"prompts with fewer than 2 different responses": 1}
    assert metrics["rankings"] == 29


def test_only_equal_responses_are_refused_in_one_sentence(tmp_path):
    given = samples(tmp_path, texts=["the same"])
    with pytest.raises(StageError, match="no prompt has two different responses"):
        rank.run(settings(), {"samples": given}, make_out(tmp_path))


def test_rankings_that_are_all_ties_are_refused_and_nothing_is_written(tmp_path):
    out = make_out(tmp_path)
    with pytest.raises(StageError, match="all 30 rankings are ties"):
        rank.run(settings(tie_margin=100.0), {"samples": samples(tmp_path)}, out)
    assert not out.artifact.exists()


# ---- people --------------------------------------------------------------------------------


def work_as(store, user, count):
    for _ in range(count):
        task = claim(store, user)
        submit(store, user, task.token, list(range(1, len(task.responses) + 1)))


def test_people_are_waited_for_until_there_are_enough(tmp_path):
    given, out = {"samples": samples(tmp_path)}, make_out(tmp_path)
    # the queue has no order: of 20 of 30 prompts some must be held out whichever they are
    # a repeat would be no new ranking
    people = settings(by="people", minimum=20, heldout_fraction=0.5, repeat_rate=0.0)
    with pytest.raises(PeopleNeeded, match="0 of 20 rankings"):
        rank.run(people, given, out)
    store = Store(tmp_path / "labels.db")
    with store.write() as tx:
        insert_new(tx, users, [{"kind": "person", "name": "alice", "created": 0.0}])
        alice = tx.execute(sa.select(users.c.id)).scalar_one()
    work_as(store, alice, 19)
    with pytest.raises(PeopleNeeded, match="19 of 20"):
        rank.run(people, given, out)
    progress = json.loads((tmp_path / "rank-progress.json").read_text())
    assert progress["rank"] == {
        "have": 19,
        "need": 20,
        "labels": {"rankings": 19, "rows": 19},
    }
    work_as(store, alice, 1)
    metrics = rank.run(people, given, out)
    assert metrics["rankings"] == 20
    assert metrics["annotators"] == 1
    assert "alice" not in (out.artifact / "rankings.jsonl").read_text()
    assert out.derived["labels"] == {"rankings": 20, "rows": 20}
    # the line has gone on; people may, too, and what they add is noticed
    work_as(store, alice, 5)
    tell_progress(tmp_path, store)
    progress = json.loads((tmp_path / "rank-progress.json").read_text())
    assert progress["rank"]["labels"] == {"rankings": 25, "rows": 25}
    # until the next round asks about other responses
    later = {"samples": samples(tmp_path, name="later", texts=STORIES[50:])}
    with pytest.raises(PeopleNeeded):
        rank.run(people, later, make_out(tmp_path, "rank-2", 2))
    with store.read() as tx:
        opened = dict(tx.execute(sa.select(queues.c.step, queues.c.open)).all())
    assert opened == {"rank": False, "rank-2": True}


def test_how_probable_the_choice_of_a_prompt_was_is_kept_and_orders_nothing(tmp_path):
    given = samples(tmp_path, prompts=4)
    groups = [SampleGroup.from_row(row) for row in read_jsonl(given.path / "samples.jsonl")]
    wanted = [
        replace(group, priority=float(i), selection_probability=0.3 + i / 10)
        for i, group in enumerate(groups)
    ]
    write_jsonl(given.path / "samples.jsonl", (group.to_row() for group in wanted))
    with pytest.raises(PeopleNeeded):
        rank.run(settings(by="people"), {"samples": given}, make_out(tmp_path))
    with Store(tmp_path / "labels.db").read() as tx:
        kept = tx.execute(sa.select(tasks.c.prompt_id, tasks.c.selection_probability)).all()
        priorities = set(tx.execute(sa.select(tasks.c.priority)).scalars())
    assert dict(kept) == {g.prompt.id: g.selection_probability for g in wanted}
    assert priorities == {0.0}


def test_need_is_overlap_times_prompts(tmp_path):
    with pytest.raises(PeopleNeeded, match="0 of 90"):
        rank.run(
            settings(by="people", overlap=3), {"samples": samples(tmp_path)}, make_out(tmp_path)
        )


def test_simulated_rankings_never_pass_for_those_of_people(tmp_path):
    given = {"samples": samples(tmp_path)}
    rank.run(settings(), given, make_out(tmp_path))
    with pytest.raises(PeopleNeeded, match="0 of 30"):
        rank.run(settings(by="people"), given, make_out(tmp_path, name="people"))


# ---- imported rankings ---------------------------------------------------------------------


def test_imported_rankings_alone_need_no_people_and_bring_their_prompts(tmp_path):
    out = make_out(tmp_path)
    metrics = rank.run(settings(by="people"), {"data": data(tmp_path, pairs(80))}, out)
    assert metrics["rankings"] == 80
    split = {row["id"]: row["split"] for row in read_jsonl(out.artifact / "prompts.jsonl")}
    for ranking in written(out):
        assert split[ranking.prompt_id] == {"train": "train", "heldout": "test"}[ranking.split]
    assert set(split.values()) == {"train", "test"}


def test_a_changed_file_does_not_bring_back_what_it_no_longer_holds(tmp_path):
    rank.run(settings(), {"data": data(tmp_path, pairs(80))}, make_out(tmp_path))
    out = make_out(tmp_path, name="again")
    assert rank.run(settings(), {"data": data(tmp_path, pairs(60))}, out)["rankings"] == 60


def test_rankings_imported_by_hand_count_in_every_rank_step(tmp_path):
    write_jsonl(tmp_path / "hand.jsonl", pairs(5))
    import_rankings(Store(tmp_path / "labels.db"), [str(tmp_path / "hand.jsonl")], 0, by_hand=True)
    out = make_out(tmp_path)
    assert rank.run(settings(), {"samples": samples(tmp_path)}, out)["rankings"] == 35


def test_a_ranking_of_a_test_prompt_is_never_trained_on(tmp_path):
    given, out = samples(tmp_path), make_out(tmp_path)
    rows = [{"prompt": f"test {i}", "chosen": "yes", "rejected": "no"} for i in range(3)]
    rank.run(settings(), {"samples": given, "data": data(tmp_path, rows)}, out)
    imported = [r for r in written(out) if r.source.startswith("import")]
    assert [r.split for r in imported] == ["heldout"] * 3


def test_dirt_is_counted_in_the_metrics_and_too_much_of_it_stops(tmp_path):
    rows = [*pairs(60), {"prompt": "x", "chosen": "", "rejected": "y"}]
    metrics = rank.run(settings(), {"data": data(tmp_path, rows)}, make_out(tmp_path))
    assert metrics["dropped"] == {"chosen is empty": 1}
    with pytest.raises(DataError, match=r"data\.jsonl.*chosen is empty.*data\.jsonl:61"):
        rank.run(settings(max_bad_fraction=0), {"data": data(tmp_path, rows)}, make_out(tmp_path))


def test_too_few_rankings_to_hold_any_out_are_refused(tmp_path):
    with pytest.raises(StageError, match=r"leave no pair to (hold out|train on)"):
        rank.run(settings(), {"data": data(tmp_path, pairs(1))}, make_out(tmp_path))


# ---- rounds --------------------------------------------------------------------------------


def test_labels_add_up_over_rounds(tmp_path):
    first = make_out(tmp_path)
    rank.run(settings(), {"samples": samples(tmp_path)}, first)
    before = Input("rankings", "x", first.artifact)
    again = samples(tmp_path, name="second")
    second = make_out(tmp_path, step="rank-2", round=2, name="work2")
    metrics = rank.run(settings(), {"samples": again, "rankings": before}, second)
    assert metrics["rankings"] == 60
    assert {r.id for r in written(first)} < {r.id for r in written(second)}
    splits = {}
    for ranking in written(second):
        splits.setdefault(ranking.prompt_id, set()).add(ranking.split)
    assert all(len(found) == 1 for found in splits.values())


def test_agreement_is_counted_by_hand_in_a_small_case():
    base = Ranking(({"role": "user", "content": "q"},), ("a", "b", "c"), (1, 2, 3), "one")
    # of the pairs ab, ac, bc: `other` disagrees on ab only; `tied` has no opinion on ac,
    # agrees that b beats c and disagrees on ab
    other = replace(base, responses=("b", "a", "c"), ranks=(1, 2, 3), annotator="two")
    tied = replace(base, ranks=(2, 1, 2), annotator="three")
    assert rank.agreement([base, other]) == pytest.approx(2 / 3)
    assert rank.agreement([base, tied]) == pytest.approx(1 / 2)
    assert rank.agreement([base]) is None


def gold_tasks(store, count):
    """Known answers: `best` before `good` before `bad`."""
    texts = ["best", "good", "bad"]
    rows = []
    for i in range(count):
        ask = [{"role": "user", "content": f"known {i}"}]
        row = task_row(ask, texts, round=1, origin="import", kind="gold")
        ranks = [texts.index(text) + 1 for text in json.loads(row["responses"])]
        rows.append({**row, "gold": json.dumps(ranks)})
    with store.write() as tx:
        insert_new(tx, tasks, rows)


def rank_gold(store, name, order):
    """Rank all there is as `name`: known answers by `order`, the rest by length."""
    with store.write() as tx:
        insert_new(tx, users, [{"kind": "person", "name": name, "created": 0.0}])
        user = tx.execute(sa.select(users.c.id).where(users.c.name == name)).scalar_one()
    while (work := claim(store, user)) is not None:
        if set(work.responses) == set(order):
            ranks = [order.index(text) + 1 for text in work.responses]
        else:
            ranks = [sorted(work.responses, key=len).index(text) + 1 for text in work.responses]
        submit(store, user, work.token, ranks)


def test_annotators_weigh_by_how_often_known_answers_prove_them_right(tmp_path):
    given, out = {"samples": samples(tmp_path)}, make_out(tmp_path)
    people = {"by": "people", "overlap": 3, "minimum": 1, "gold_rate": 0.5, "repeat_rate": 0}
    with pytest.raises(PeopleNeeded):
        rank.run(settings(**people), given, out)
    store = Store(tmp_path / "labels.db")
    gold_tasks(store, 12)
    for name in ("careful", "as careful"):
        rank_gold(store, name, ["best", "good", "bad"])
    rank_gold(store, "careless", ["bad", "good", "best"])
    shown = pseudonyms(store)
    rank.run(settings(**people, min_gold_accuracy=0.6), given, out)
    rows = {
        row["annotator"]: row for row in json.loads((out.artifact / "annotators.json").read_text())
    }
    careful, careless = (rows[shown("person", name)] for name in ("careful", "careless"))
    assert (careful["gold_accuracy"], careless["gold_accuracy"]) == (1.0, 0.0)
    assert careful["gold_items"] > 3
    assert careless["weight"] == 0
    text = (out.artifact / "annotators.json").read_text()
    assert '"careful"' not in text
    # known answers are no rankings of this round
    assert not any(r.messages[0]["content"].startswith("known") for r in written(out))
    rank.run(settings(**people, weigh_by="none"), given, out)
    rows = json.loads((out.artifact / "annotators.json").read_text())
    assert {row["weight"] for row in rows} == {1.0}


def test_without_known_answers_everybody_weighs_the_same(tmp_path):
    out = make_out(tmp_path)
    rank.run(settings(overlap=2), {"samples": samples(tmp_path)}, out)
    rows = json.loads((out.artifact / "annotators.json").read_text())
    assert {row["annotator"]: row["weight"] for row in rows} == {f"sim-{i}": 1.0 for i in (1, 2, 3)}
    assert all(row["gold_accuracy"] is None and row["agreement"] > 0.5 for row in rows)
