"""What leaves the store: the same files for the same work, and nobody's name."""

import json
from collections import Counter

import datasets
import pyarrow.parquet
import pytest
import sqlalchemy as sa

from labeling_ui import labels
from labeling_ui.assignments import claim, claim_task
from labeling_ui.changes import reopen
from labeling_ui.export_files import FILES, Options, export_file, export_folder
from labeling_ui.exporting import snapshot
from labeling_ui.importing import import_rankings
from labeling_ui.schema import assignments, queues, rankings, tasks, users
from labeling_ui.store import Store, insert_new, log_event, task_row
from labeling_ui.submitting import skip, submit
from pipeline.errors import DataError
from pipeline.files import sha256
from pipeline.formats import demonstrations
from pipeline.records import Ranking, is_heldout, read_jsonl
from tests.label_work import add_people, queue_prompts

NOW = 1_000_000.0


@pytest.fixture
def run(tmp_path):
    """A run directory with four prompts, ranked by two people in an order of their own."""
    (tmp_path / "config.yaml").write_text("model: {base: ./m}\n")
    store = Store(tmp_path / "labels.db")
    fill(store, ["alice", "bob"])
    return tmp_path


def fill(store, people):
    queue_prompts(store, 4, ["x", "yy", "zzz"], overlap=2)
    ids = add_people(store, *people)
    for user in ids:
        while work := claim(store, user, NOW):
            submit(store, user, work.token, [len(text) for text in work.responses], NOW)


def test_a_snapshot_holds_each_ranking_with_its_order_and_no_name(run):
    found = snapshot(Store(run / "labels.db"), 0.15)
    assert len(found) == 8
    assert [r.id for r in found] == sorted(r.id for r in found)
    for ranking in found:
        assert [len(text) for text in ranking.responses] == list(ranking.ranks)
    text = json.dumps([ranking.to_row() for ranking in found])
    assert "alice" not in text
    assert "bob" not in text
    assert len({ranking.annotator for ranking in found}) == 2


def test_pseudonyms_last_in_one_store_and_differ_in_another(run, tmp_path):
    other = Store(tmp_path / "other.db")
    fill(other, ["alice", "bob"])
    names = [{r.annotator for r in snapshot(s, 0.15)} for s in (Store(run / "labels.db"), other)]
    assert names[0] == {r.annotator for r in snapshot(Store(run / "labels.db"), 0.15)}
    assert not names[0] & names[1]


def test_skipped_superseded_and_late_rankings_are_left_out(run):
    store = Store(run / "labels.db")
    with store.write() as tx:
        ids = tx.execute(sa.select(rankings.c.id)).scalars().all()
        for key, change in zip(
            ids, ({"late": True}, {"superseded_by": "x"}, {"status": "skipped"}), strict=False
        ):
            tx.execute(sa.update(rankings).where(rankings.c.id == key).values(**change))
    assert len(snapshot(store, 0.15)) == 5


def test_a_prompt_is_held_out_by_its_content_alone(run):
    store = Store(run / "labels.db")
    for ranking in snapshot(store, 0.5):
        assert (ranking.split == "heldout") == is_heldout(ranking.prompt_id, 0.5)
    by_prompt = {}
    for ranking in snapshot(store, 0.5):
        by_prompt.setdefault(ranking.prompt_id, set()).add(ranking.split)
    assert all(len(splits) == 1 for splits in by_prompt.values())
    # a larger fraction only ever adds prompts
    ids = [f"prompt{i}" for i in range(1000)]
    small, large = ({i for i in ids if is_heldout(i, f)} for f in (0.1, 0.3))
    assert small < large
    assert 60 < len(small) < 140


def test_each_format_holds_the_same_preferences(run):
    store = Store(run / "labels.db")
    found = snapshot(store, 0.15)
    options = Options(0.15)
    for name, format in (("r.jsonl", "rankings"), ("p.jsonl", "pairs"), ("p.parquet", "parquet")):
        counts = export_file(store, run / name, format, options)
        assert counts.rankings == 8
        assert list(counts.rows.values()) == [8 if format == "rankings" else 24]
    rows = [Ranking.from_row(row) for row in read_jsonl(run / "r.jsonl")]
    assert sorted(rows, key=lambda ranking: ranking.id) == found
    assert pyarrow.parquet.read_table(run / "p.parquet").to_pylist() == read_jsonl(run / "p.jsonl")


def test_an_empty_export_is_still_readable(tmp_path):
    store = Store(tmp_path / "labels.db")
    export_file(store, tmp_path / "p.parquet", "parquet", Options(0.15))
    assert pyarrow.parquet.read_table(tmp_path / "p.parquet").num_rows == 0
    export_folder(store, tmp_path / "all", Options(0.15))
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert [manifest["files"][name]["rows"] for name in FILES] == [0] * len(FILES)


# ---- the folder ---------------------------------------------------------------------------


def busy(tmp_path):
    """A store with everything in it that counts and that does not, by three people."""
    store = Store(tmp_path / "busy.db")
    fill(store, ["alice", "bob"])
    rows = [
        task_row(ask(f"{kind} {i}"), texts, round=1, origin="t", kind=kind,
                 step={"write": "write", "gold": None}.get(kind, "rank"), split=split)
        for i, (kind, texts, split) in enumerate([
            ("rank", ["a", "b", "c"], "train"), ("rank", ["a", "b", "c"], "test"),
            ("write", [], "train"), ("gold", ["a", "b"], "train"), ("rank", ["a", "b"], "train"),
        ])
    ]  # fmt: skip
    queue = {"by": "people", "overlap": 3, "lease_minutes": 30, "open": True}
    with store.write() as tx:
        tx.execute(sa.update(queues).values(overlap=3))
        insert_new(tx, queues, [{"step": "write", **queue}])
        insert_new(tx, tasks, rows)
        insert_new(tx, users, [{"kind": "person", "name": "carol", "created": NOW}])
        people = list(tx.execute(sa.select(users.c.id).order_by(users.c.id)).scalars())
    for number, user in enumerate(people):
        for row in rows[:3]:
            with store.write() as tx:
                work = claim_task(tx, user, row["id"], 30, NOW)
            said = {"ranks": [len(text) + i for i, text in enumerate(work.responses)]}
            if row["kind"] == "write":
                said = {"ranks": [], "ideal": f"answer {number // 2}"}
            elif row is rows[0]:
                said |= {"marks": [{"score": 5, "flags": ["unsafe"]}, {}, {}], "comment": "hm"}
                said |= {"confidence": 2, "ideal": f"better {number}"}
            submit(store, user, work.token, said, NOW + 60, active_seconds=9.6)
    first, second, third = people
    for row in rows[3:]:
        with store.write() as tx:
            work = claim_task(tx, first, row["id"], 30, NOW)
        if row is rows[4]:
            bad = {"ranks": [None, None], "all_bad": True, "ideal": "best of all"}
            submit(store, first, work.token, bad, NOW)
        else:
            submit(store, first, work.token, [1, 2], NOW)
    with store.write() as tx:
        work = claim_task(tx, second, rows[4]["id"], 30, NOW)
    skip(store, second, work.token, "broken", NOW)
    change(store, third, rows[0]["id"])
    return store


def ask(text):
    return [{"role": "user", "content": text}]


def change(store, user, task):
    where = assignments.c.task_id == task, assignments.c.user_id == user
    with store.write() as tx:
        token = tx.execute(sa.select(assignments.c.token).where(*where)).scalar_one()
    reopen(store, user, token, NOW + 70)
    submit(store, user, token, [1, 1, 2], NOW + 80)


def folder_of(store, to, **options):
    export_folder(store, to, Options(0.15, **options))
    return {name: rows_in(to / name) for name in FILES}, json.loads(
        (to / "manifest.json").read_text()
    )


def rows_in(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return read_jsonl(path)


def test_the_folder_holds_all_that_counts_and_says_what_does_not(tmp_path):
    store = busy(tmp_path)
    files, manifest = folder_of(store, tmp_path / "out")
    # 8 of `fill`, 3 + 3 of the two new prompts
    assert len(files["rankings.jsonl"]) == 14 == len(snapshot(store, 0.15))
    assert {row["left_out"] for row in files["rankings.jsonl"]} == {None}
    left_out = manifest["files"]["rankings.jsonl"]["left_out"]
    assert left_out == {
        "all_bad": 1, "gold": 1, "skipped": 1, "superseded": 1,
        "written answers (see demonstrations.jsonl)": 3,
    }  # fmt: skip
    assert manifest["read"]["answers"] == 14 + sum(left_out.values())
    everything, _ = folder_of(store, tmp_path / "all", everything=True)
    reasons = Counter(row["left_out"] for row in everything["rankings.jsonl"])
    assert reasons == {None: 14, "all_bad": 1, "gold": 1, "skipped": 1, "superseded": 1}
    skipped = next(r for r in everything["rankings.jsonl"] if r["left_out"] == "skipped")
    assert (skipped["skip_reason"], [r["rank"] for r in skipped["responses"]]) == (
        "broken",
        [None] * 2,
    )
    for name, recorded in manifest["files"].items():
        assert recorded["sha256"] == sha256(tmp_path / "out" / name)
        assert recorded["rows"] == len(files[name])
    text = "".join(str(rows) for rows in everything.values())
    assert not any(name in text for name in ("alice", "bob", "carol"))


def test_all_that_was_said_beside_the_order_is_there(tmp_path):
    store = busy(tmp_path)
    files, _ = folder_of(store, tmp_path / "out")
    marked = [row for row in files["rankings.jsonl"] if row["comment"]]
    # the third changed their mind, and took the comment back
    assert len(marked) == 2
    for row in marked:
        assert (row["confidence"], row["active_seconds"], row["revision"]) == (2, 10, 1)
        assert sorted(r["place"] for r in row["responses"]) == [1, 2, 3]
        scored = [r for r in row["responses"] if r["score"]]
        # the first that was shown got the marks, and ranks went up with the places
        assert [(r["place"], r["score"], r["flags"]) for r in scored] == [(1, 5, ["unsafe"])]
        assert [r["rank"] for r in sorted(row["responses"], key=lambda r: r["place"])] == [1, 2, 3]


def test_demonstrations_are_conversations_for_sft_and_none_is_of_a_heldout_prompt(tmp_path):
    files, _ = folder_of(busy(tmp_path), tmp_path / "out")
    every = files["demonstrations.jsonl"] + files["demonstrations_heldout.jsonl"]
    answers = sorted((row["messages"][-1]["content"], row["source"]) for row in every)
    # two people wrote the same answer; the ideal answer that was taken back is gone
    assert answers == [
        ("answer 0", "written"), ("answer 1", "written"),
        ("best of all", "ideal"), ("better 0", "ideal"), ("better 1", "ideal"),
    ]  # fmt: skip
    for row in every:
        (conversation,) = demonstrations(row)
        assert [turn["role"] for turn in conversation] == ["user", "assistant"]
    for row in files["demonstrations.jsonl"]:
        assert not is_heldout(row["prompt_id"], 0.15)
    for row in files["demonstrations_heldout.jsonl"]:
        assert is_heldout(row["prompt_id"], 0.15)


def test_the_split_is_that_of_the_rank_step(tmp_path):
    files, _ = folder_of(busy(tmp_path), tmp_path / "out")
    for name in ("rankings.jsonl", "pairs.parquet", "groups.parquet"):
        for row in files[name]:
            prompt = (row.get("prompt") or row.get("messages"))[0]["content"]
            kept_away = prompt == "rank 1"
            heldout = kept_away or is_heldout(row["prompt_id"], 0.15)
            assert row["split"] == ("heldout" if heldout else "train")


def test_pairs_by_mode_and_groups_agree_with_the_rankings(tmp_path):
    store = busy(tmp_path)
    files, _ = folder_of(store, tmp_path / "all")
    strict = sum(len(ranking.strict_pairs) for ranking in snapshot(store, 0.15))
    assert len(files["pairs.parquet"]) == strict
    assert {row["votes"] for row in files["pairs.parquet"]} == {2, 3}
    groups = {row["group_id"]: row for row in files["groups.parquet"]}
    assert len(groups) == 6
    for mode in ("soft", "majority", "unanimous"):
        merged, manifest = folder_of(store, tmp_path / mode, mode=mode)
        assert manifest["mode"] == mode
        assert merged["groups.parquet"] == files["groups.parquet"]
        for row in merged["pairs.parquet"]:
            group = groups[row["group_id"]]
            place = {text: i for i, text in enumerate(group["responses"])}
            better, worse = (place[row[side][0]["content"]] for side in ("chosen", "rejected"))
            signs = [(r[worse] > r[better]) - (r[worse] < r[better]) for r in group["ranks"]]
            share = sum((sign + 1) / 2 for sign in signs) / len(signs)
            if mode == "soft":
                assert row["soft_label"] == pytest.approx(share)
            else:
                assert signs.count(1) > len(signs) / 2 if mode == "majority" else share == 1
    pairs = [
        len(rows_in(tmp_path / mode / "pairs.parquet"))
        for mode in ("soft", "majority", "unanimous")
    ]
    assert pairs[0] == 6 * 3 >= pairs[1] >= pairs[2] > 0


def test_twice_and_from_a_backup_it_is_the_same_bytes(tmp_path):
    store = busy(tmp_path)
    store.backup(tmp_path / "copy.db")
    for name, of in (("one", store), ("two", store), ("three", Store(tmp_path / "copy.db"))):
        export_folder(of, tmp_path / name, Options(0.15, everything=True))
    for name in (*FILES, "manifest.json"):
        first, *others = ((tmp_path / to / name).read_bytes() for to in ("one", "two", "three"))
        assert others == [first, first], name


def test_an_export_is_whole_or_not_there_and_replaces_only_its_like(run, monkeypatch):
    store = Store(run / "labels.db")
    out = run / "out"
    export_folder(store, out, Options(0.15))
    with pytest.raises(DataError, match="exists already"):
        export_folder(store, out, Options(0.15))
    labels.forget(store, "bob")
    export_folder(store, out, Options(0.15), replace=True)
    assert len(rows_in(out / "rankings.jsonl")) == 4
    mine = run / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is no export"):
        export_folder(store, mine, Options(0.15), replace=True)
    before = sorted(path.name for path in run.iterdir())
    monkeypatch.setattr("labeling_ui.export_files._manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_folder(store, out, Options(0.15), replace=True)
    assert sorted(path.name for path in run.iterdir()) == before
    assert len(rows_in(out / "rankings.jsonl")) == 4


def test_our_own_export_comes_back_with_all_that_was_said(tmp_path):
    store = busy(tmp_path)
    files, _ = folder_of(store, tmp_path / "out", everything=True)
    other = Store(tmp_path / "other.db")
    report = import_rankings(other, [str(tmp_path / "out" / "rankings.jsonl")], 0.3)
    assert report.tally.reasons == {
        f"an answer that does not count ({reason})": 1
        for reason in ("all_bad", "gold", "skipped", "superseded")
    }
    again, _ = folder_of(other, tmp_path / "again")
    assert {r.id for r in snapshot(other, 0.15)} == {r.id for r in snapshot(store, 0.15)}
    kept = ("annotator", "comment", "confidence", "ideal", "all_bad")
    marks = [
        {
            row["id"]: [
                *(row[key] for key in kept),
                [(r["text"], r["rank"], r["score"], r["flags"]) for r in row["responses"]],
            ]
            for row in rows["rankings.jsonl"]
            if row["left_out"] is None
        }
        for rows in (files, again)
    ]
    assert marks[0] == marks[1]


def test_datasets_and_trl_read_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder_of(busy(tmp_path), tmp_path / "out")
    found = {
        name: datasets.load_dataset(
            "parquet" if name.endswith("parquet") else "json",
            data_files=str(tmp_path / "out" / name), cache_dir=str(tmp_path / "cache"),
            split="train",
        )
        for name in FILES[:4]
    }  # fmt: skip
    pairs = found["pairs.parquet"]
    # what TRL takes for a preference dataset with an explicit prompt, and for nothing else
    assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names)
    assert not {"label", "completion", "messages", "margin"} & set(pairs.column_names)
    for row in pairs:
        assert [turn["role"] for turn in row["prompt"]] == ["user"]
        for side in ("chosen", "rejected"):
            assert [turn["role"] for turn in row[side]] == ["assistant"]
    assert set(found["demonstrations.jsonl"].column_names) >= {"messages"}


# ---- the command ---------------------------------------------------------------------------


def test_export_and_import_by_command_are_inverse(run, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert labels.main([str(run), "export", "--to", str(out)]) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("model: {base: ./m}\n")
    assert labels.main([str(other), "import", str(out)]) == 0
    again = tmp_path / "again.jsonl"
    assert labels.main([str(other), "export", "--to", str(again)]) == 0
    ids = [{row["id"] for row in read_jsonl(path)} for path in (out, again)]
    assert ids[0] == ids[1]
    # and into the store it came from, it is known already
    assert labels.main([str(run), "import", str(out)]) == 0
    assert "0 new in the store" in capsys.readouterr().out


def test_forget_removes_a_person_and_leaves_the_others(run, capsys):
    assert labels.main([str(run), "forget", "alice"]) == 0
    assert "4 rankings" in capsys.readouterr().out
    store = Store(run / "labels.db")
    assert len(snapshot(store, 0.15)) == 4
    store.close()
    for file in run.glob("labels.db*"):
        assert b"alice" not in file.read_bytes()
    assert labels.main([str(run), "forget", "alice"]) == 2
    assert "no annotator 'alice'" in capsys.readouterr().err


def test_a_forgotten_number_is_not_given_to_the_next_person(run):
    store = Store(run / "labels.db")
    with store.read() as tx:
        old = set(tx.execute(sa.select(users.c.id)).scalars())
    labels.forget(store, "bob")
    with store.write() as tx:
        insert_new(tx, users, [{"kind": "person", "name": "carol", "created": NOW}])
        assert (
            tx.execute(sa.select(users.c.id).where(users.c.name == "carol")).scalar_one() not in old
        )


def test_a_backup_is_whole_while_others_write_and_overwrites_nothing(run, tmp_path):
    store = Store(run / "labels.db")
    copy = tmp_path / "copy.db"
    with store.write() as tx:
        log_event(tx, "not committed yet")
        Store(run / "labels.db").backup(copy)
    assert snapshot(Store(copy), 0.15) == snapshot(store, 0.15)
    with pytest.raises(DataError, match="exists already"):
        store.backup(copy)


def test_stats_count_what_people_did(run, capsys):
    store = Store(run / "labels.db")
    row = task_row(
        [{"role": "user", "content": "new"}], ["a", "b"], round=1, origin="t", step="rank"
    )
    with store.write() as tx:
        insert_new(tx, tasks, [row])
        user = tx.execute(sa.select(users.c.id).where(users.c.name == "alice")).scalar_one()
    skip(store, user, claim(store, user, NOW).token, "broken", NOW)
    assert labels.main([str(run), "stats"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["rankings"], stats["left_out"], stats["prompts"]) == (
        8,
        {"skipped: broken": 1},
        5,
    )
    (queue,) = stats["queues"]
    assert (queue["filled"], queue["unrankable"], queue["wanted"]) == (9, 1, 10)
    alice, bob = stats["people"]
    assert (alice["rankings"], alice["skipped"], bob["rankings"]) == (4, 1, 4)
