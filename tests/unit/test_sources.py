"""What the user gives: which kind it is, whether it is there, whether it changed."""

import os

import pytest

from pipeline import demo_world, sources
from pipeline.config import field_paths
from pipeline.errors import ConfigError, DataError
from pipeline.files import HashCache
from pipeline.settings import Settings


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("demo:stories", "demo"),
        ("/data/x", "path"),
        ("./x", "path"),
        ("~/x", "path"),
        ("rows.jsonl", "path"),
        ("sub/rows.PARQUET", "path"),
        ("model.gguf", "path"),
        ("a/b/c", "path"),
        ("two words", "path"),
        ("gpt2", "hub"),
        ("HuggingFaceTB/SmolLM2-135M", "hub"),
        ("Anthropic/hh-rlhf", "hub"),
    ],
)
def test_the_kind_of_a_source_is_seen_from_its_text(source, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.kind(source) == kind


def test_a_folder_that_exists_is_a_path_whatever_its_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.kind("owner/name") == "path"
    assert sources.resolve("owner/name") == str(tmp_path / "owner" / "name")


def test_local_paths_become_absolute_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.resolve("a.txt") == str(tmp_path / "a.txt")
    assert sources.resolve("../a.txt") == str(tmp_path.parent / "a.txt")
    assert sources.resolve("~/a.txt") == os.path.expanduser("~/a.txt")
    assert sources.resolve("demo:stories") == "demo:stories"
    assert sources.resolve("gpt2") == "gpt2"


def test_a_missing_path_is_named_with_its_key():
    with pytest.raises(DataError) as caught:
        sources.check("/no/such/file.txt", "pretrain.data")
    assert str(caught.value).startswith("pretrain.data: /no/such/file.txt does not exist")
    assert "Correct pretrain.data" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_mistyped_demo_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'demo:stories'"):
        sources.check("demo:storys", "pretrain.data")


def test_all_missing_paths_are_reported_at_once():
    settings = Settings.model_validate(
        {"pretrain": {"data": ["/a.txt", "demo:stories"]}, "sft": {"data": "/b.jsonl"}}
    )
    with pytest.raises(DataError) as caught:
        sources.check_all(settings)
    assert "2 sources cannot be used" in str(caught.value)
    assert "pretrain.data: /a.txt does not exist" in str(caught.value)
    assert "sft.data: /b.jsonl does not exist" in str(caught.value)


def test_the_digest_follows_the_bytes_not_the_name_or_the_time(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("x")
    second.write_text("x")
    cache = HashCache()
    assert sources.digest(str(first), cache) == sources.digest(str(second), cache)
    second.write_text("y")
    assert sources.digest(str(first), cache) != sources.digest(str(second), cache)


def test_the_digest_of_a_folder_covers_names_and_contents(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("x")
    digests = {sources.digest(str(tmp_path / "d"), HashCache())}
    (tmp_path / "d" / "a.txt").rename(tmp_path / "d" / "b.txt")
    digests.add(sources.digest(str(tmp_path / "d"), HashCache()))
    (tmp_path / "d" / "c.txt").write_text("")
    digests.add(sources.digest(str(tmp_path / "d"), HashCache()))
    assert len(digests) == 3


def test_a_new_version_of_the_demo_is_new_data(monkeypatch):
    before = sources.digest("demo:stories", HashCache())
    monkeypatch.setattr(demo_world, "VERSION", demo_world.VERSION + 1)
    assert sources.digest("demo:stories", HashCache()) != before


def test_an_unchanged_file_is_hashed_once(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("x")
    cache = HashCache(tmp_path / "hashes.json")
    before = sources.digest(str(file), cache)
    cache.save()
    monkeypatch.setattr("pipeline.files.sha256", lambda path: pytest.fail("read again"))
    assert sources.digest(str(file), HashCache(tmp_path / "hashes.json")) == before


def test_every_setting_that_holds_sources_is_known():
    found = {k for k, f in field_paths(Settings).items() if "tuple[str" in str(f.annotation)}
    assert found | {"model.base"} == set(sources.KEYS)


def test_a_task_file_stands_for_its_data_too(tmp_path):
    data, task = tmp_path / "rows.csv", tmp_path / "task.yaml"
    data.write_text("a,b\n1,2\n")
    task.write_text('name: t\nscorer: pair\ndata: ./rows.csv\nmore: "{a}"\nless: "{b}"\n')
    before = sources.digest(str(task), HashCache())
    assert sources.digest(str(task), HashCache()) == before
    data.write_text("a,b\n1,3\n")
    assert sources.digest(str(task), HashCache()) != before
    assert sources.kind("task.yaml") == "path"
