"""An export needs the memory of a few rows, however many there are: each place where they could pile up."""

import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from labeling_ui import exporting, row_files
from labeling_ui.export_files import Options, export_folder
from labeling_ui.row_files import open_rows
from labeling_ui.store import Store
from tests.benchmarks.labels_million import build


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of 300 and of four times as many rankings."""
    folder = tmp_path_factory.mktemp("stores")
    for rankings in (300, 1200):
        build(folder / f"{rankings}.db", rankings)
    return [Store(folder / f"{rankings}.db") for rankings in (300, 1200)]


def peaks(store, to, options):
    """(bytes of Python, bytes of arrow) that an export needs at most."""
    pool = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    before = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        export_folder(store, to, options)
        return tracemalloc.get_traced_memory()[1], pool.max_memory()
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(before)


@pytest.mark.parametrize(("mode", "everything"), [("all", True), ("soft", False)])
def test_four_times_the_rankings_need_no_more_memory(
    stores, tmp_path, monkeypatch, mode, everything
):
    # everything that waits for company is full with the smaller store, too
    monkeypatch.setattr(exporting, "_ROWS_AT_ONCE", 50)
    monkeypatch.setattr(row_files, "_BATCH_ROWS", 50)
    monkeypatch.setattr(row_files, "_GROUP_ROWS", 150)
    options = Options(0.15, mode, everything)
    export_folder(stores[0], tmp_path / "first", options)  # what is imported and made once
    small, large = (peaks(store, tmp_path / str(i), options) for i, store in enumerate(stores))
    written = (tmp_path / "1" / "rankings.jsonl").stat().st_size
    # to keep the texts of 900 rankings more would take a megabyte; what waits varies by a tenth of it
    assert written > 1.2e6
    assert large[0] - small[0] < 300_000, (small, large)
    assert large[1] - small[1] < 300_000, (small, large)


def pair(i, text):
    turns = {
        "prompt": [{"role": "user", "content": f"{i} {text}"}],
        "chosen": [{"role": "assistant", "content": f"{i} {text}"}],
        "rejected": [{"role": "assistant", "content": f"{i} {text}"}],
    }
    ids = dict.fromkeys(("group_id", "prompt_id", "ranking_id"), f"{i:016x}")
    return {**turns, **ids, "weight": 1.0, "soft_label": 1.0, "votes": 2, "annotator": "a",
            "split": "train"}  # fmt: skip


def test_what_a_parquet_file_keeps_to_its_end_is_less_than_three_bytes_a_row(tmp_path):
    path = tmp_path / "pairs.parquet"
    with open_rows(path.name, path) as file:
        for i in range(102_500):
            file.write(pair(i, "text"))
    found = pyarrow.parquet.read_metadata(path)
    assert (found.num_rows, found.num_row_groups) == (102_500, 3)
    assert found.serialized_size < 3 * found.num_rows
    ids = pyarrow.parquet.read_table(path, columns=["group_id"])["group_id"].to_pylist()
    assert ids == [f"{i:016x}" for i in range(102_500)]


def test_long_texts_make_smaller_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "_GROUP_BYTES", 2**20)
    path = tmp_path / "pairs.parquet"
    with open_rows(path.name, path) as file:
        for i in range(4_000):
            file.write(pair(i, "x" * 200))
    found = pyarrow.parquet.read_metadata(path)
    # 600 bytes of text a row: after two batches of 1,000 there is more than a megabyte
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [2000, 2000]
