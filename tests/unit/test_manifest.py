"""Fingerprints, and why something is stale."""

import json

import pytest

from pipeline import manifest, plan
from pipeline.errors import ArtifactError
from pipeline.manifest import InputRecord, Manifest
from pipeline.settings import Settings


def settings(**changes):
    tree = {"pretrain": {"data": "demo:stories"}, "sft": {"data": "demo:demonstrations"}}
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return Settings.model_validate(tree)


STEP = plan.plan(settings())[-1]
DIGESTS = {"model": "sha256:1", "data": "sha256:2"}


def fingerprint(**changes):
    return manifest.fingerprint(STEP, settings(**changes), DIGESTS)


def made(step=STEP, **changes):
    return Manifest(
        stage="sft",
        stage_version=step.stage.version,
        kind="model",
        step="sft",
        round=1,
        fingerprint=fingerprint(**changes),
        digest="sha256:0",
        inputs={role: InputRecord(digest=digest) for role, digest in DIGESTS.items()},
        settings=manifest.hashed_settings(settings(**changes), step.stage),
    )


@pytest.mark.parametrize(
    "change",
    [{"sft__lr": 0.5}, {"run__seed": 1}, {"model__precision": "bf16"}, {"sft__lora": {"rank": 2}}],
)
def test_what_changes_numbers_changes_the_fingerprint(change):
    assert fingerprint(**change) != fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"launch__processes": 2},
        {"sft__checkpoint_every_steps": 7},
        {"run__name": "other"},
        {"ppo__lr": 0.5},
        {"sft__lr": 1e-3},
    ],
)
def test_what_changes_no_numbers_of_the_stage_does_not(change):
    assert fingerprint(**change) == fingerprint()


def test_the_fingerprint_follows_the_inputs_and_the_version():
    other = manifest.fingerprint(STEP, settings(), {**DIGESTS, "model": "sha256:3"})
    assert other != fingerprint()


def test_a_setting_that_is_younger_than_a_manifest_makes_nothing_stale():
    old = made()
    fewer = {key: value for key, value in old.settings.items() if key != "sft.lora.dropout"}
    old = old.model_copy(update={"settings": fewer})
    assert manifest.why_stale(old, STEP, settings(), DIGESTS) is None
    # and at its default it is no part of the fingerprint
    assert fingerprint(sft__lora={"dropout": 0.0}) == fingerprint()


def test_the_reason_names_setting_version_seed_or_input():
    why = manifest.why_stale
    assert why(made(), STEP, settings(sft__lr=2e-4), DIGESTS) == "sft.lr 0.001 -> 2e-4"
    assert why(made(), STEP, settings(run__seed=1), DIGESTS) == "run.seed 0 -> 1"
    old = made().model_copy(update={"stage_version": 0})
    assert why(old, STEP, settings(), DIGESTS) == f"stage version 0 -> {STEP.stage.version}"
    changed = {**DIGESTS, "model": "sha256:9"}
    assert why(made(), STEP, settings(), changed) == "input pretrain changed"
    assert why(made(), STEP, settings(), {**DIGESTS, "model": None}) == "input pretrain changed"
    assert why(made(), STEP, settings(), DIGESTS) is None


def test_many_reasons_are_cut_short():
    many = settings(sft__lr=1.0, sft__epochs=9, sft__max_length=99, sft__weight_decay=0.5)
    assert manifest.why_stale(made(), STEP, many, DIGESTS).endswith(" and 1 more")


def test_a_manifest_survives_the_disk(tmp_path):
    made().write(tmp_path)
    assert manifest.read(tmp_path) == made()
    assert json.loads((tmp_path / "manifest.json").read_text())["schema"] == manifest.SCHEMA
    assert not list(tmp_path.glob("*.tmp"))


def test_a_manifest_of_a_newer_version_is_refused(tmp_path):
    made().write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(ArtifactError, match="made by a newer version of prefline") as caught:
        manifest.read(tmp_path)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "one"}', '{"schema": 1}'])
def test_a_torn_manifest_is_damaged_not_a_crash(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="damaged: not a readable manifest"):
        manifest.read(tmp_path)


def test_a_section_that_is_read_for_the_first_time_is_no_change_of_its_settings():
    tree = {
        "pretrain": {"data": "demo:stories"},
        "sample": {"prompts": "demo:prompts"},
        "reward": {"lr": 0.5},
    }
    before, now = (
        Settings.model_validate({**tree, "ppo": {"gold": gold}}) for gold in (None, "reward_model")
    )
    old, step = (next(s for s in plan.plan(t) if s.name == "ppo") for t in (before, now))
    manifest_of_old = Manifest(
        stage="ppo",
        stage_version=step.stage.version,
        kind="policy",
        step="ppo",
        round=1,
        fingerprint="0",
        digest="sha256:0",
        settings=manifest.hashed_settings(before, old.stage),
    )
    assert manifest.why_stale(manifest_of_old, step, now, {}) == "ppo.gold null -> reward_model"
