"""Pushing to a hub: the bytes arrive in one commit, the token stays where it was, errors are one sentence.

Against a stand-in of the hub's API (tests/fake_hub.py), by the real huggingface_hub.
"""

import pytest
from huggingface_hub import constants

from pipeline import export
from pipeline.errors import ConfigError, StageError
from pipeline.workspace import open_run
from stages import hub
from tests.fake_hub import TOKEN, fake_hub
from tests.unit.exported_run import make_run

REPOSITORY = "ada/aligned"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return make_run(tmp_path_factory.mktemp("run"), patch)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    to = tmp_path_factory.mktemp("out") / "policy"
    return export.export_folder(open_run(run), to, export.Request())


@pytest.fixture
def site(monkeypatch):
    """The stand-in, and a client that knows it and its token."""
    with fake_hub() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # the stand-in speaks git LFS; Xet needs a store of chunks of its own
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_every_byte_arrives_in_one_commit_of_a_private_repository(site, folder):
    address = hub.push(folder, REPOSITORY, "model", private=True)
    assert address == f"{site.url}/{REPOSITORY}"
    held = dict(site.repositories["model", REPOSITORY])
    assert held.pop(".gitattributes")
    assert held == files_of(folder)
    assert len(held["model.safetensors"]) > 10_000
    assert site.private["model", REPOSITORY]
    [commit] = site.commits
    assert "sha256:" in commit["summary"]
    # the hub was asked whether the card's front matter is valid
    assert site.checked[0]["content"].encode() == held["README.md"]


def test_an_earlier_export_is_replaced_whole(site, folder, run, tmp_path):
    hub.push(folder, REPOSITORY, "model", private=False)
    assert not site.private["model", REPOSITORY]
    other = export.export_folder(open_run(run), tmp_path / "rm", export.Request(what="reward"))
    hub.push(other, REPOSITORY, "model", private=True)
    held = dict(site.repositories["model", REPOSITORY])
    del held[".gitattributes"]
    assert held == files_of(other)
    assert "generation_config.json" in files_of(folder)
    assert "generation_config.json" not in held


def test_a_repository_of_somebody_is_left_alone(site, folder):
    theirs = {".gitattributes": b"", "README.md": b"my work"}
    site.repositories["model", REPOSITORY] = dict(theirs)
    with pytest.raises(ConfigError, match="exists and is no export of prefline"):
        hub.push(folder, REPOSITORY, "model", private=True)
    assert site.repositories["model", REPOSITORY] == theirs


def one_sentence(error, *secrets):
    text = error.value.message
    assert "\n" not in text
    assert "Traceback" not in text
    for secret in (TOKEN, *secrets):
        assert secret not in str(error.value)
    return text


def test_a_wrong_token_is_told_and_never_shown(site, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_and_secret")
    with pytest.raises(ConfigError) as error:
        hub.push(folder, REPOSITORY, "model", private=True)
    assert "does not know this token" in one_sentence(error, "hf_wrong_and_secret")
    assert site.repositories == {}


def test_without_a_token_nothing_is_sent(site, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError) as error:
        hub.push(folder, REPOSITORY, "model", private=True)
    assert "there is no token" in one_sentence(error)


def test_the_house_of_somebody_else_is_told(site, folder):
    with pytest.raises(ConfigError) as error:
        hub.push(folder, "grace/aligned", "model", private=True)
    assert "may not write to grace" in one_sentence(error)


def test_a_network_that_is_down_is_told(site, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StageError) as error:
        hub.push(folder, REPOSITORY, "model", private=True)
    assert "does not answer" in one_sentence(error)


def test_offline_by_choice_is_told(site, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as error:
        hub.push(folder, REPOSITORY, "model", private=True)
    assert "HF_HUB_OFFLINE" in one_sentence(error)


@pytest.mark.parametrize("part", ["/preupload/", "/objects/batch", "/commit/"])
def test_a_hub_that_refuses_is_told_and_holds_no_half_export(site, folder, part):
    site.broken = part
    with pytest.raises(StageError) as error:
        hub.push(folder, REPOSITORY, "model", private=True)
    assert "status 400" in one_sentence(error)
    assert set(site.repositories["model", REPOSITORY]) == {".gitattributes"}


def test_the_command_pushes_rankings_as_a_dataset(site, run, monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    request = export.Request(what="rankings", licence="cc-by-4.0")
    code = export.export_hub(open_run(run), REPOSITORY, request, public=True)
    shown = capfd.readouterr()
    assert code == 0, shown.err
    assert shown.out.strip() == f"{site.url}/datasets/{REPOSITORY}"
    assert TOKEN not in shown.out + shown.err
    held = site.repositories["dataset", REPOSITORY]
    assert {"README.md", "export.json", "pairs/train.parquet", "groups/heldout.parquet"} <= set(
        held
    )
    # the token is in no file, here or there
    assert not [name for name, data in held.items() if TOKEN.encode() in data]


def test_the_run_holds_no_token(run):
    assert not [p for p in run.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
