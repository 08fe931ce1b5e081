"""Rows with file and line, counted rows, and ids that depend on content only."""

import json
import zipfile
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.records import (
    Prompt,
    Ranking,
    Response,
    SampleGroup,
    Tally,
    UnknownFile,
    hash_fraction,
    read_rows,
    write_jsonl,
)

MESSAGES = ({"role": "user", "content": "Q"},)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.json", b'[\n {"a": 1},\n oops]', r"a\.json:3: not valid JSON"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: JSON is nested too deeply"),
        ("a.jsonl", b"1" * 5000, r"a\.jsonl:1: not valid JSON"),
        ("a.txt", b"fine\nna\xefve\n", r"a\.txt:2: not UTF-8 text"),
        ("a.parquet", b"PAR1 torn", r"a\.parquet"),
        ("a.zip", b"not a zip", r"a\.zip: not a readable zip"),
        ("a.docx", b"x", r"unknown kind of file '\.docx'"),
    ],
)
def test_a_file_that_does_not_parse_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert caught.value.exit_code == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read \(No such file"):
        list(read_rows(tmp_path / "gone.jsonl"))


def test_a_line_separator_inside_a_json_string_does_not_end_the_row(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"t": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert [row for _, row in read_rows(tmp_path / "a.jsonl")] == [{"t": "a\u2028b"}]


def test_a_folder_reads_known_files_and_shows_unknown_ones(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "a.bin").write_text("?")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("not data")
    rows = [row for _, row in read_rows(tmp_path)]
    assert rows == [UnknownFile(".bin"), {"n": 1}]


def test_a_zip_shows_what_it_cannot_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("d/one.txt", "text")
        archive.writestr("d/two.neg", "text")
        archive.writestr("__MACOSX/d/one.txt", "junk")
    rows = dict(read_rows(tmp_path / "a.zip"))
    assert [type(row) for row in rows.values()] == [str, UnknownFile]


def test_csv_rows_carry_their_line(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"two\nlines"\nplain\n')
    assert [
        (where.rpartition(":")[2], row["text"]) for where, row in read_rows(tmp_path / "a.csv")
    ] == [
        ("3", "two\nlines"),
        ("4", "plain"),
    ]


def test_parquet_rows_come_back(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert [row["text"] for _, row in read_rows(tmp_path / "a.parquet")] == ["a", "b"]


def test_too_many_bad_rows_end_with_reasons_counts_and_the_first_place():
    tally = Tally()
    for _ in range(8):
        tally.use()
    tally.drop("the prompt is empty", "f:3")
    tally.drop("the prompt is empty", "f:9")
    tally.check("data", 0.2)
    with pytest.raises(DataError, match=r"2 of 10 .*2 x the prompt is empty \(first: f:3\)"):
        tally.check("data", 0.19)


def test_no_usable_row_is_an_error_whatever_is_allowed():
    with pytest.raises(DataError, match="no usable row"):
        Tally().check("data", 1.0)


def test_repeats_are_neither_bad_nor_new():
    tally = Tally(used=1, merged=99)
    tally.drop("bad", "f:1")
    tally.check("data", 0.01)
    assert "99 repeats merged" in tally.summary()


def test_records_survive_a_file(tmp_path: Path):
    group = SampleGroup(Prompt(MESSAGES, "test"), (Response("a\nb", False, 3), Response("c")))
    ranking = Ranking(MESSAGES, ("x", "y", "z"), (1, 1, 2), "ann", "heldout", 2)
    write_jsonl(tmp_path / "g.jsonl", [group.to_row(), ranking.to_row()])
    rows = [row for _, row in read_rows(tmp_path / "g.jsonl")]
    assert SampleGroup.from_row(rows[0]) == group
    assert Ranking.from_row(rows[1]) == ranking


def test_ties_give_no_pair():
    assert Ranking(MESSAGES, ("x", "y", "z"), (2, 1, 2), "ann").strict_pairs == [(1, 0), (1, 2)]


def test_the_identity_of_a_ranking_does_not_depend_on_the_order_shown():
    one = Ranking(MESSAGES, ("x", "y"), (1, 2), "ann")
    other = Ranking(MESSAGES, ("y", "x"), (2, 1), "ann")
    assert one.id == other.id
    assert one.id != Ranking(MESSAGES, ("x", "y"), (2, 1), "ann").id


def test_hash_fractions_spread_evenly():
    share = sum(hash_fraction("x", i) < 0.3 for i in range(4000)) / 4000
    # four standard deviations
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
