"""Broken configurations and broken data: a message that says where, never a traceback.

`-m slow` tries ten times as many: 1,000 configurations and 1,000 files or more of each kind.
"""

import io
import json
import os
import re
import zipfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from labeling_ui.importing import found_in
from pipeline.cli import main
from pipeline.config import field_paths
from pipeline.errors import DataError
from pipeline.records import ROW_SUFFIXES, Tally
from pipeline.settings import Settings
from stages.data import read_demonstrations, read_prompts, read_texts

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
KEYS = sorted(field_paths(Settings))
QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=1000)


# ---- configurations ------------------------------------------------------------------------


@st.composite
def damaged(draw, whole):
    """Some bytes with a few of them left out, doubled, replaced or put in."""
    raw = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        length = draw(st.sampled_from([1, 1, 2, 10, 200]))
        how = draw(st.sampled_from(["cut", "replace", "insert", "double", "truncate"]))
        if how == "cut":
            del raw[at : at + length]
        elif how == "replace":
            raw[at : at + 1] = draw(st.binary(min_size=1, max_size=3))
        elif how == "insert":
            raw[at:at] = draw(
                st.sampled_from([b"\t", b":", b"- ", b"{", b'"', b"\xff", b"&a ", b"\n"])
            )
        elif how == "double":
            raw[at:at] = raw[at : at + length]
        else:
            del raw[at:]
    return bytes(raw)


VALUES = st.one_of(
    st.sampled_from(
        ["", "null", "true", "-1", "0", "1e400", "nan", "1e-400", "[]", "{}", "[1, [2]]"]
    ),
    st.sampled_from(
        ["!!python/object:os.system x", "*a", "&a [*a]", "0x1F", "1_000", "2026-11-22"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12),
)


def dry_run(*arguments):
    """(exit code, what was printed) of `prefline run ... --dry-run`."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as ended:
        main(["run", *arguments, "--dry-run"])
    return ended.value.code, out.getvalue()


def check_told(code, text, *places):
    """Success, or exit code 2 with a message that names one of the places or a setting."""
    assert "Traceback" not in text
    assert code in (0, None, 2), text
    if code == 2:
        said = [place for place in places if place in text]
        keys = re.findall(r"[a-z_]+(?:\.[a-z_]+)+", text)
        assert text.startswith("error: "), text
        assert said or keys or re.search(r"\b(section|setting)\b", text), text


def try_config(folder, raw):
    path = folder / "broken.yaml"
    path.write_bytes(raw)
    # what depends on the machine, or takes long, is not what is tried here
    assume(b"auto" not in raw)
    code, text = dry_run(str(path), f"run.dir={folder / 'run'}")
    check_told(code, text, "broken.yaml")
    assert not (folder / "run").exists()


def try_override(folder, key, value):
    assume(not (key == "model.precision" and value == "auto") and not key.startswith("-"))
    path = folder / "tiny.yaml"
    path.write_text(CONFIGS["tiny.yaml"])
    code, text = dry_run(str(path), f"run.dir={folder / 'run'}", f"{key}={value}")
    check_told(code, text, key.strip(), "command line")
    assert not (folder / "run").exists()


files = st.sampled_from(sorted(CONFIGS)).flatmap(lambda name: damaged(CONFIGS[name].encode()))
keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=15).filter(lambda key: "\0" not in key))


@QUICK
@given(raw=files)
def test_a_damaged_configuration_is_told(tmp_path_factory, raw):
    try_config(tmp_path_factory.mktemp("fuzz"), raw)


@QUICK
@given(key=keys, value=VALUES)
def test_a_setting_of_any_value_is_told(tmp_path_factory, key, value):
    try_override(tmp_path_factory.mktemp("fuzz"), key, value)


@pytest.mark.slow
@LONG
@given(raw=files)
def test_many_damaged_configurations(tmp_path_factory, raw):
    try_config(tmp_path_factory.mktemp("fuzz"), raw)


@pytest.mark.slow
@LONG
@given(key=keys, value=VALUES)
def test_many_settings_of_any_value(tmp_path_factory, key, value):
    try_override(tmp_path_factory.mktemp("fuzz"), key, value)


# ---- data ----------------------------------------------------------------------------------

ROWS = [
    {"text": "Once upon a time there was a fox."},
    {"prompt": "Tell me a story.", "completion": "There was a fox."},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
    {"prompt": "p", "chosen": "yes", "rejected": "no"},
    {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2], "annotator": "ann"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
]
FIELDS = sorted(
    {key for row in ROWS for key in row} | {"conversations", "question", "answer", "split"}
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["user", "assistant", "\ud800", "\0", "<|endoftext|>", "‮", "train", "test"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from([*FIELDS, "role", "content"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
rows = st.lists(
    st.one_of(
        st.sampled_from(ROWS),
        st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5),
        JSON,
        st.tuples(st.sampled_from(ROWS), st.sampled_from(FIELDS), JSON).map(
            lambda made: {**made[0], made[1]: made[2]}
        ),
    ),
    max_size=6,
)


def as_parquet(table):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), buffer)
    return buffer.getvalue()


def as_zip(text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", text)
        archive.writestr("b.txt", "A story.")
    return buffer.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
WHOLE = {
    ".jsonl": LINES.encode(),
    ".json": json.dumps(ROWS).encode(),
    ".csv": b'prompt,completion\n"Tell me, now","A ""fox"""\nhi,ho\n',
    ".txt": b"Once upon a time.\n\nThe end.\n" * 90,
    ".parquet": as_parquet([{"prompt": "a", "completion": "b", "text": "c"}] * 3),
    ".zip": as_zip(LINES),
}
assert set(WHOLE) < set(ROW_SUFFIXES), "a new kind of file: add it"


def texts(path):
    found, tally = read_texts([str(path)])
    return list(found), tally


def rankings(path):
    tally = Tally()
    return list(found_in(str(path), tally, Counter())), tally


READERS = {
    "texts": texts,
    "demonstrations": lambda path: read_demonstrations([str(path)]),
    "prompts": lambda path: read_prompts([str(path)], 0.1, 0.1),
    "rankings": rankings,
}


def try_file(path, raw):
    """Every reader: all rows are counted, or the message names the file and the place in it."""
    path.write_bytes(raw)
    for name, read in READERS.items():
        try:
            found, tally = read(path)
            tally.check(name, 0.0)
        except DataError as error:
            told = str(error)
            assert path.name in told or "no usable row in 0" in told, name
            continue
        assert len(found) <= tally.used
        assert tally.dropped == 0


@QUICK
@given(rows=rows)
@example(rows=[{"prompt": "p", "responses": ["a", "b"], "ranks": [True, False]}])
def test_rows_of_any_json_are_used_or_counted(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    try_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


@QUICK
@given(data=st.data())
def test_a_damaged_file_is_told(tmp_path_factory, data):
    suffix = data.draw(st.sampled_from(sorted(WHOLE)))
    try_file(tmp_path_factory.mktemp("fuzz") / f"rows{suffix}", data.draw(damaged(WHOLE[suffix])))


@pytest.mark.slow
@LONG
@given(rows=rows)
def test_many_rows_of_any_json(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    try_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_many_damaged_files(tmp_path_factory, data):
    suffix = data.draw(st.sampled_from(sorted(WHOLE)))
    try_file(tmp_path_factory.mktemp("fuzz") / f"rows{suffix}", data.draw(damaged(WHOLE[suffix])))


def test_the_fuzz_sees_what_it_looks_for(tmp_path):
    with pytest.raises(AssertionError):
        check_told(1, "Traceback (most recent call last)")
    with pytest.raises(AssertionError):
        check_told(2, "error: something is wrong")
    assert os.path.exists(ROOT / "configs" / "tiny.yaml")
