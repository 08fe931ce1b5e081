"""Publishing and verifying artifacts."""

import os

import pytest

from pipeline import artifacts, manifest
from pipeline.errors import ArtifactError, StageError
from pipeline.files import HashCache
from pipeline.manifest import Manifest


def publish(work):
    folder = artifacts.prepare(work)
    (folder / "sub").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "rows.jsonl").write_text("[1]\n")
    draft = Manifest(
        stage="sft",
        stage_version=1,
        kind="model",
        step="sft",
        round=1,
        fingerprint="f",
        digest="",
    )
    return artifacts.publish(work, draft)


def test_a_published_artifact_is_whole_and_named_by_latest(tmp_path):
    work = tmp_path / "sft" / "abc"
    made = publish(work)
    assert [file.path for file in made.files] == ["config.json", "sub/rows.jsonl"]
    assert manifest.read(work) == made
    assert (tmp_path / "sft" / "latest").read_text() == "abc\n"
    assert not (work / "artifact.tmp").exists()
    artifacts.verify(work, made)


def test_the_digest_depends_on_paths_and_bytes_only(tmp_path):
    first, second = publish(tmp_path / "a" / "x"), publish(tmp_path / "b" / "y")
    assert first.digest == second.digest
    assert first.digest.startswith("sha256:")


@pytest.mark.parametrize("moment", ["artifacts.os.rename", "manifest.write_atomic"])
def test_a_kill_during_publication_leaves_no_manifest_and_can_be_repeated(
    tmp_path, monkeypatch, moment
):
    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    work = tmp_path / "sft" / "abc"
    with monkeypatch.context() as patch:
        patch.setattr(f"pipeline.{moment}", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(work)
    assert not (work / "manifest.json").exists()
    artifacts.verify(work, publish(work))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json has changed bytes"),
        (lambda folder: (folder / "config.json").write_text("{ }"), "config.json has 3 bytes inst"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "more.json").write_text("{}"), "more.json does not belong to"),
    ],
)
def test_damage_is_named_by_file(tmp_path, harm, message):
    made = publish(tmp_path / "abc")
    harm(tmp_path / "abc" / "artifact")
    with pytest.raises(ArtifactError, match=f"sft: damaged: {message}"):
        artifacts.verify(tmp_path / "abc", made)


def test_files_that_run_code_when_read_are_refused(tmp_path):
    folder = artifacts.prepare(tmp_path)
    (folder / "model.pt").write_text("")
    with pytest.raises(StageError, match=r"model.pt may not be in an artifact"):
        artifacts.check_files(folder, "sft")


def test_links_and_empty_folders_are_refused(tmp_path):
    folder = artifacts.prepare(tmp_path)
    with pytest.raises(StageError, match="wrote nothing into its artifact folder"):
        artifacts.check_files(folder, "sft")
    (folder / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(StageError, match=r"link.json is a link"):
        artifacts.check_files(folder, "sft")


def test_a_cached_hash_is_trusted_until_size_or_time_change(tmp_path):
    made = publish(tmp_path / "abc")
    file = tmp_path / "abc" / "artifact" / "config.json"
    cache = HashCache(tmp_path / "hashes.json")
    artifacts.remember(tmp_path / "abc", made, cache)
    before = file.stat()
    file.write_text("[]")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert artifacts.find_damage(tmp_path / "abc", made, cache) is None
    assert artifacts.find_damage(tmp_path / "abc", made, None) == "config.json has changed bytes"
    os.utime(file, ns=(1, 1))
    assert artifacts.find_damage(tmp_path / "abc", made, cache) == "config.json has changed bytes"
