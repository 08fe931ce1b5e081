"""What leaves the store: the same files for the same work, and nobody's name."""

import json

import pyarrow.parquet
import pytest
import sqlalchemy as sa

from labeling_ui import labels
from labeling_ui.assignments import claim, skip, submit
from labeling_ui.export_files import FILES, Options, export_file, export_folder
from labeling_ui.exporting import snapshot
from labeling_ui.schema import queues, rankings, tasks, users
from labeling_ui.store import Store, insert_new, log_event, task_row
from pipeline.errors import DataError
from pipeline.records import Ranking, is_heldout, read_jsonl

NOW = 1_000_000.0


@pytest.fixture
def run(tmp_path):
    """A run directory with four prompts, ranked by two people in an order of their own."""
    (tmp_path / "config.yaml").write_text("model: {base: ./m}\n")
    store = Store(tmp_path / "labels.db")
    fill(store, ["alice", "bob"])
    return tmp_path


def fill(store, people):
    rows = [
        task_row(
            [{"role": "user", "content": f"prompt {i}"}], ["x", "yy", "zzz"],
            round=1, origin="test", step="rank",
        )
        for i in range(4)
    ]  # fmt: skip
    queue = {"step": "rank", "by": "people", "overlap": 2, "lease_minutes": 30, "open": True}
    with store.write() as tx:
        insert_new(tx, queues, [queue])
        insert_new(tx, tasks, rows)
        for name in people:
            insert_new(tx, users, [{"kind": "person", "name": name, "created": NOW}])
        ids = tx.execute(sa.select(users.c.id)).scalars().all()
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
    assert (stats["rankings"], stats["skipped"], stats["prompts"]) == (8, 1, 5)
