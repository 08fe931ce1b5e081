"""Work that people bring: responses to rank, prompts to answer, known answers; and the same again."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import sqlalchemy as sa

from labeling_ui import labels
from labeling_ui.accounts import add_user
from labeling_ui.assignments import claim
from labeling_ui.exporting import snapshot
from labeling_ui.gold import import_gold
from labeling_ui.importing import import_rankings
from labeling_ui.queueing import queue
from labeling_ui.schema import queues, tasks, users
from labeling_ui.screening import clean, identity_words, warnings
from labeling_ui.store import EXTRA, WRITE, Store, insert_new
from labeling_ui.submitting import submit
from pipeline.errors import DataError
from pipeline.formats import Unusable
from pipeline.records import Prompt, Response, SampleGroup, write_jsonl

ASK = {"role": "user", "content": "Say hello."}
ROW = {"prompt": "Say hello.", "responses": ["Hello!", "Hi."]}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "labels.db")


def written(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def put(store, tmp_path, rows, kind="rank", bad=0.0, **more):
    return queue(store, [written(tmp_path, rows)], kind, bad, **more)


def stored(store):
    with store.read() as tx:
        return tx.execute(sa.select(tasks).order_by(tasks.c.id)).all()


def a_person(store):
    with store.write() as tx:
        insert_new(tx, users, [{"kind": "person", "name": "ann", "created": 0.0}])
        return tx.execute(sa.select(users.c.id).where(users.c.name == "ann")).scalar_one()


def test_responses_are_queued_ranked_and_exported(store, tmp_path):
    report = put(store, tmp_path, [ROW], overlap=2)
    assert (report.new, report.tally.used) == (1, 1)
    ann = a_person(store)
    work = claim(store, ann)
    assert set(work.responses) == {"Hello!", "Hi."}
    submit(store, ann, work.token, [1 if text == "Hi." else 2 for text in work.responses])
    (ranking,) = snapshot(store, 0.0)
    assert dict(zip(ranking.responses, ranking.ranks, strict=True)) == {"Hi.": 1, "Hello!": 2}
    with store.read() as tx:
        row = tx.execute(sa.select(queues)).one()
    assert (row.step, row.by, row.overlap, row.open) == (EXTRA, "people", 2, True)


def test_a_prompt_to_answer_is_answered(store, tmp_path):
    put(
        store,
        tmp_path,
        [{"prompt": "Say hello."}, {"messages": [ASK, {"role": "assistant", "content": "x"}]}],
        "write",
    )
    (row,) = stored(store)
    assert (row.step, row.kind, row.responses) == (WRITE, "write", "[]")
    ann = a_person(store)
    work = claim(store, ann)
    assert work.messages == (ASK,)
    submit(store, ann, work.token, {"ranks": [], "ideal": "Hello!"})
    assert snapshot(store, 0.0) == []


def test_the_same_source_twice_queues_nothing_twice(store, tmp_path):
    rows = [ROW, {"prompt": "Other.", "responses": ["a", "b"]}]
    assert put(store, tmp_path, rows).new == 2
    before = stored(store)
    again = put(store, tmp_path, rows)
    assert (again.new, again.notes["there already"]) == (0, 2)
    assert stored(store) == before


def test_a_dry_run_says_the_same_and_writes_nothing(store, tmp_path):
    for kind, row in (("rank", ROW), ("write", ROW), ("gold", {**ROW, "ranks": [1, 2]})):
        dry = put(store, tmp_path, [row], kind, dry_run=True)
        assert stored(store) == []
        assert dry.new == 1
    with store.read() as tx:
        assert tx.execute(sa.select(queues)).all() == []
    pairs = written(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c", "annotator": "x"}])
    dry = import_rankings(store, [pairs], 0.0, dry_run=True)
    assert (dry.stored, stored(store)) == (1, [])
    real = import_rankings(store, [pairs], 0.0)
    assert real.summary() == dry.summary()


UNUSABLE = {
    "the row is not an object": ["a"],
    "no list of responses (prompts without any: queue them with --write)": {"prompt": "a"},
    "fewer than 2 different responses": {"prompt": "a", "responses": ["x", "x"]},
    "more than 9 responses": {"prompt": "a", "responses": list("abcdefghij")},
    "a response is empty": {"prompt": "a", "responses": ["x", " "]},
    "a response has more than 50,000 characters": {"prompt": "a", "responses": ["x", "y" * 50_001]},
    "a response holds a broken character (lone surrogate)": {"prompt": "a", "responses": ["\ud800", "y"]},
    "a response is not a text": {"prompt": "a", "responses": [{"model": "m"}, "y"]},
    "the prompt does not end with a user turn": {
        "messages": [ASK, {"role": "assistant", "content": "x"}],
        "responses": ["x", "y"],
    },
}  # fmt: skip


def test_what_cannot_be_ranked_is_counted_by_reason_with_its_first_place(store, tmp_path):
    rows = [ROW, *UNUSABLE.values(), *UNUSABLE.values()]
    report = put(store, tmp_path, rows, bad=0.99)
    assert report.tally.reasons == dict.fromkeys(UNUSABLE, 2)
    places = {reason: int(where.split(":")[-1]) for reason, where in report.tally.first.items()}
    assert places == {reason: i for i, reason in enumerate(UNUSABLE, 2)}
    assert len(stored(store)) == 1
    with pytest.raises(DataError, match="18 of 19 rows cannot be used"):
        put(Store(tmp_path / "other.db"), tmp_path, rows, bad=0.5)
    assert stored(Store(tmp_path / "other.db")) == []


def test_equal_responses_and_equal_prompts_are_merged(store, tmp_path):
    rows = [
        {"prompt": "q", "responses": [{"text": "a", "model": "m1"}, "b", {"text": "a", "model": "m2"}]},
        {"prompt": "other", "responses": ["x", "y"]},
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["b", "c"], "split": "test"},
    ]  # fmt: skip
    report = put(store, tmp_path, rows)
    assert report.notes["equal responses merged"] == 1
    assert report.notes["rows of one prompt merged"] == 1
    row = next(row for row in stored(store) if "other" not in row.messages)
    models = dict(zip(json.loads(row.responses), json.loads(row.models), strict=True))
    assert models == {"a": ["m1", "m2"], "b": [], "c": []}
    assert row.split == "test"
    many = [{"prompt": "q", "responses": [f"{i}", f"{i}!"]} for i in range(5)]
    report = put(Store(tmp_path / "other.db"), tmp_path, many)
    assert report.notes["prompts left out: more than 9 responses in all rows"] == 1
    assert report.new == 0


def test_imported_rankings_can_be_ranked_again_by_people(store, tmp_path):
    pair = {"prompt": "Say hello.", "chosen": "Hi.", "rejected": "Hello!"}
    import_rankings(store, [written(tmp_path, [pair], "pairs.jsonl")], 0.0)
    assert put(store, tmp_path, [ROW]).new == 1
    assert len(stored(store)) == 1
    assert claim(store, a_person(store)) is not None


def test_what_waits_in_the_queue_of_a_step_stays_there(store, tmp_path):
    put(store, tmp_path, [ROW])
    with store.write() as tx:
        tx.execute(sa.update(tasks).values(step="rank"))
    report = put(store, tmp_path, [ROW])
    assert report.notes["left where they are: in the queue of rank"] == 1
    assert stored(store)[0].step == "rank"


def test_known_answers_keep_their_order_by_place_and_wait_in_no_queue(store, tmp_path):
    row = {"prompt": "q", "responses": ["worst", "best", "same"], "ranks": [9, 1, 1]}
    assert put(store, tmp_path, [row, row], "gold").new == 1
    put(store, tmp_path, [{"prompt": "q", "responses": ["worst", "best", "same"]}])
    gold = next(task for task in stored(store) if task.kind == "gold")
    ranks = dict(zip(json.loads(gold.responses), json.loads(gold.gold), strict=True))
    assert ranks == {"worst": 2, "best": 1, "same": 1}
    assert (gold.step, gold.active, len(stored(store))) == (None, True, 2)
    other = put(store, tmp_path, [{**row, "ranks": [1, 2, 2]}], "gold")
    assert (other.new, other.notes["there already with other ranks: replaced"]) == (0, 1)
    gold = next(task for task in stored(store) if task.kind == "gold")
    ranks = dict(zip(json.loads(gold.responses), json.loads(gold.gold), strict=True))
    assert ranks == {"worst": 1, "best": 2, "same": 2}
    with pytest.raises(DataError, match="all responses are tied"):
        put(store, tmp_path, [{**row, "ranks": [1, 1, 1]}], "gold")


# ---- where it comes from -------------------------------------------------------------------


def test_each_kind_of_source_is_read(store, tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([{"prompt": "json", "responses": ["x", "y"]}]))
    (folder / "b.csv").write_text('prompt,response_1,response_2\ncsv,x,y\n"cell",,\n')
    (folder / "c.csv").write_text('prompt,responses\nlist,"[""x"", ""y""]"\n')
    table = pyarrow.Table.from_pylist(
        [{"prompt": "parquet", "responses": [{"text": "x"}, {"text": "y"}]}]
    )
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    datasets.Dataset.from_list([{"prompt": "saved", "responses": ["x", "y"]}]).save_to_disk(
        tmp_path / "saved"
    )
    report = queue(store, [str(folder), str(tmp_path / "saved")], "rank", 0.5)
    prompts = {json.loads(row.messages)[0]["content"] for row in stored(store)}
    assert prompts == {"json", "csv", "list", "parquet", "saved"}
    assert report.tally.dropped == 1


def test_the_folder_of_a_sample_step_is_read_with_its_splits(store, tmp_path):
    step = tmp_path / "sample" / "abc"
    (step / "artifact").mkdir(parents=True)
    prompts = [Prompt(({"role": "user", "content": split},), split) for split in ("train", "test")]
    groups = [SampleGroup(prompt, (Response("x"), Response("y"))) for prompt in prompts]
    write_jsonl(step / "artifact" / "samples.jsonl", (group.to_row() for group in groups))
    write_jsonl(step / "artifact" / "prompts.jsonl", (prompt.to_row() for prompt in prompts))
    for source in (step, step / "artifact"):
        report = queue(store, [str(source)], "rank", 0.0)
        assert report.tally.used == 2
    found = {json.loads(row.messages)[0]["content"]: row.split for row in stored(store)}
    assert found == {"train": "train", "test": "test"}


# ---- what is noticed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("As an AI language model, I cannot.", ["as an ai language model"]),
        ("I'm ChatGPT, made by OpenAI.", ["chatgpt", "openai"]),
        ("My name is Claude and GPT-4 is another.", ["my name is claude", "gpt-4"]),
        ("Claude Monet painted; a gemini is a twin; llamas spit.", []),
        ("He wore a xaimaican hat, openairport.", []),
    ],
)
def test_words_that_say_what_wrote_it(text, found):
    assert identity_words(text, [ASK]) == found


def test_a_word_that_the_prompt_has_gives_nothing_away():
    asked = [{"role": "user", "content": "Who made ChatGPT?"}]
    assert identity_words("ChatGPT was made by OpenAI.", asked) == ["openai"]


def test_warnings_name_the_stored_place_and_keep_the_response(store, tmp_path):
    row = {
        "prompt": "q",
        "responses": ["fine", "As an AI, no.", "turn \u202e around", "nul \x00 here"],
    }
    report = put(store, tmp_path, [row])
    (task,) = stored(store)
    texts = json.loads(task.responses)
    assert "nul \ufffd here" in texts
    words = json.loads(task.warnings)
    for text, part in (
        ("As an AI, no.", "what wrote it: as an ai"),
        ("turn \u202e around", "direction"),
    ):
        assert next(w for w in words if part in w).startswith(f"response {texts.index(text) + 1} ")
    assert len(words) == 3
    assert report.notes["prompts or responses with identity words (kept)"] == 1
    assert warnings([ASK], ["fine", "שלום"]) == []


def test_what_a_page_and_a_database_cannot_show_is_replaced():
    assert clean("a\x00b\tc\r\nd\x1b[0m\u202ee", "it", 100) == "a\ufffdb\tc\nd\ufffd[0m\u202ee"
    with pytest.raises(Unusable, match="more than 3 characters"):
        clean("abcd", "it", 3)


# ---- the command ---------------------------------------------------------------------------


def test_the_command_queues_and_reports(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {base: ./m}\nrank: {overlap: 3}\n")
    source = written(tmp_path, [ROW, *({"prompt": "q"},) * 2])
    assert labels.main([str(tmp_path), "queue", source]) == 2
    assert "2 of 3 rows cannot be used" in capsys.readouterr().err
    most = ["--max-bad-fraction", "0.9"]
    assert labels.main([str(tmp_path), "queue", source, *most, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("nothing is stored: 1 new prompts to rank")
    assert labels.main([str(tmp_path), "queue", source, *most]) == 0
    assert "2 rows left out: no list of responses" in capsys.readouterr().out
    assert labels.main([str(tmp_path), "queue", source, "--write", "--overlap", "2"]) == 0
    with Store(tmp_path / "labels.db").read() as tx:
        rows = tx.execute(sa.select(queues).order_by(queues.c.step)).all()
    assert [(row.step, row.overlap) for row in rows] == [(EXTRA, 3), (WRITE, 2)]
    assert labels.main([str(tmp_path), "queue", source, *most, "--overlap", "4"]) == 0
    assert labels.main([str(tmp_path), "queue", source, *most]) == 0
    assert labels.main([str(tmp_path), "stats"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert [(row["step"], row["overlap"], row["tasks"]) for row in found["queues"]] == [
        ("extra", 4, 1), ("write", 2, 2),
    ]  # fmt: skip


def test_a_known_answer_is_one_whether_it_was_queued_or_given_on_the_leads_page(store, tmp_path):
    lead = add_user(store, "lea", "correct horse", "lead")
    row = {**ROW, "ranks": [2, 1]}
    put(store, tmp_path, [row], "gold")
    again = import_gold(store, lead, json.dumps(row))
    assert (again.stored, again.unchanged) == (0, 1)
    assert len(stored(store)) == 1
