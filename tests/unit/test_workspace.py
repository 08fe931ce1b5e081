"""The run directory: created whole, opened with care, one writer."""

import json
import os
import socket

import pytest
import yaml

from pipeline import launch, workspace
from pipeline.errors import ArtifactError, ConfigError, LockedError


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words")
    path = tmp_path / "c.yaml"
    path.write_text("run: {name: mine}\npretrain:\n  data: text.txt\n  lr: 1e-3\n")
    return path


def create(config, *overrides):
    with workspace.writer(workspace.draft_run(config, overrides)) as (run, changes):
        return run, changes


def test_a_run_is_created_below_the_current_folder_with_absolute_sources(config, tmp_path):
    run, changes = create(config)
    assert run.path == tmp_path / "runs" / "mine"
    assert changes == []
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    assert stored["pretrain"]["data"] == [str(tmp_path / "text.txt")]
    identity = json.loads((run.path / "run.json").read_text())
    assert (identity["schema"], identity["name"]) == (1, "mine")
    assert [row["event"] for row in run.events()] == ["created"]


def test_the_stored_settings_are_read_back_unchanged(config):
    run, _ = create(config, "model.extra={rope_theta: 1.0e-6, note: 'a # b'}")
    again = workspace.open_run(run.path)
    assert again.settings == run.settings
    assert again.settings.model.extra == {"rope_theta": 1e-6, "note": "a # b"}


def test_each_value_keeps_its_origin(config):
    run, _ = create(config, "sft.lr=0.5")
    text = (run.path / "config.yaml").read_text()
    assert f"lr: 0.001  # {config}:4" in text
    assert "lr: 0.5  # command line" in text
    assert "seed: 0  # default" in text
    again = workspace.open_run(run.path)
    assert workspace.config_text(again.settings, again.origins) == text


def test_precision_is_decided_once(config, monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: (("H100", 9.0),))
    run, _ = create(config)
    assert run.settings.model.precision == "bf16"
    monkeypatch.setattr(launch, "gpus", lambda: ())
    assert create(config)[0].settings.model.precision == "bf16"
    assert create(config, "run.name=other")[0].settings.model.precision == "fp32"


def test_an_old_gpu_gets_full_precision(config, monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: (("T4", 7.5),))
    assert create(config)[0].settings.model.precision == "fp32"


@pytest.mark.parametrize(("speedup", "precision"), [(1.9, "bf16"), (1.05, "fp32"), (0.7, "fp32")])
def test_auto_precision_is_what_a_probe_of_the_machine_finds_faster(
    config, monkeypatch, speedup, precision
):
    asked = []
    monkeypatch.setattr(launch, "gpus", lambda: (("H100", 9.0),))
    monkeypatch.setattr(launch, "bf16_speedup", lambda width, _: asked.append(width) or speedup)
    run, _ = create(config, "model.precision=auto", "model.hidden_size=96")
    assert run.settings.model.precision == precision
    assert asked == [96]
    # what was decided stays, whatever the machine is like later
    monkeypatch.setattr(launch, "bf16_speedup", lambda *_: pytest.fail("probed a second time"))
    assert create(config, "model.precision=auto")[0].settings.model.precision == precision
    assert create(config)[0].settings.model.precision == precision


def test_the_machine_is_not_probed_unless_asked_to(config, monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: ())
    monkeypatch.setattr(launch, "bf16_speedup", lambda *_: pytest.fail("probed"))
    assert create(config)[0].settings.model.precision == "fp32"


def test_changed_settings_are_named_and_stored(config):
    run, _ = create(config)
    _, changes = create(run.path, "pretrain.lr=2e-4", "run.seed=5")
    assert changes == ["run.seed 0 -> 5", "pretrain.lr 0.001 -> 2e-4"]
    assert workspace.open_run(run.path).settings.run.seed == 5
    assert run.events()[-1]["changes"] == changes
    # the configuration again: back to what it says
    _, changes = create(config)
    assert changes == ["run.seed 5 -> 0", "pretrain.lr 2e-4 -> 0.001"]


def test_a_run_is_found_by_its_own_config_file_too(config):
    run, _ = create(config)
    assert workspace.open_run(run.path / "config.yaml").path == run.path
    assert workspace.open_run(config).path == run.path


def test_looking_at_a_configuration_creates_nothing(config, tmp_path):
    workspace.draft_run(config)
    with pytest.raises(ConfigError, match="this configuration has not been run yet"):
        workspace.open_run(config)
    assert not (tmp_path / "runs").exists()


def test_a_run_of_a_newer_version_is_refused(config):
    run, _ = create(config)
    (run.path / "run.json").write_text('{"schema": 2, "name": "mine"}')
    for look in (workspace.open_run, workspace.draft_run):
        with pytest.raises(ArtifactError, match="made by a newer version of prefline"):
            look(run.path)


def test_a_directory_that_is_no_run_is_refused(tmp_path, config):
    with pytest.raises(ConfigError, match=r"not a run directory \(it has no run.json\)"):
        workspace.open_run(tmp_path)
    with pytest.raises(ConfigError, match="exists and is not a run"):
        create(config, f"run.dir={tmp_path}")
    assert not (tmp_path / "config.yaml").exists()


def test_a_creation_that_was_killed_can_be_repeated(config):
    run, _ = create(config)
    (run.path / "run.json").unlink()
    again, changes = create(config)
    assert changes == []
    assert (again.path / "run.json").exists()


def test_one_writer_at_a_time_and_the_lock_is_freed(config):
    run, _ = create(config)
    with workspace.writer(run):
        assert workspace.is_locked(run.path)
        with pytest.raises(LockedError) as caught:
            create(config)
        message = caught.value.message
        assert f"process {os.getpid()} on {socket.gethostname()} since 20" in message
    assert not workspace.is_locked(run.path)
    create(config)


def test_a_dead_writer_locks_nothing(config):
    run, _ = create(config)
    owner = {"pid": 2**22 + 1, "host": socket.gethostname(), "since": "x", "started": "1"}
    (run.path / "lock.json").write_text(json.dumps(owner))
    assert not workspace.is_locked(run.path)
    # a later process with the same id is not the writer
    (run.path / "lock.json").write_text(json.dumps({**owner, "pid": os.getpid()}))
    assert not workspace.is_locked(run.path)


def test_a_torn_line_in_the_history_is_left_out(config):
    run, _ = create(config)
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"event": "sta')
    assert [row["event"] for row in run.events()] == ["created"]
    assert run.latest("sft") is None
