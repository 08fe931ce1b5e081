"""The runner on a line of fake stages, with real child processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import artifacts, runner, waiting, workspace
from pipeline.errors import (
    ArtifactError,
    ConfigError,
    LockedError,
    PeopleNeeded,
    StageError,
)
from pipeline.plan import STAGES
from tests import fake_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path, monkeypatch):
    fake_line.install(monkeypatch)
    return fake_line.write_config(tmp_path)


def execute(config, *overrides, until=None, only=None):
    with workspace.writer(workspace.draft_run(config, overrides)) as (run, changes):
        return run, changes, runner.execute(run, until, only)


def states(config):
    opened = workspace.open_run(config)
    return {state.step.name: state for state in runner.inspect(opened)}


def test_a_line_runs_once_and_then_there_is_nothing_to_do(config, capsys):
    _, _, made = execute(config)
    names = ["tokenizer", "pretrain", "sft", "sample", "rank", "reward", "ppo", "evaluate"]
    assert [state.step.name for state in made] == names
    assert {state.word for state in made} == {"done"}
    assert "sft: missing, will train" in capsys.readouterr().err
    _, changes, again = execute(config)
    assert changes == []
    assert [state.fingerprint for state in again] == [state.fingerprint for state in made]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{name}: done, nothing to do" for name in names]


def test_the_same_work_in_another_directory_has_the_same_digests(config, tmp_path):
    _, _, first = execute(config)
    _, _, second = execute(config, f"run.dir={tmp_path / 'other'}")
    assert [s.manifest.digest for s in first] == [s.manifest.digest for s in second]


def test_a_manifest_tells_how_its_artifact_was_made(config):
    run, _, made = execute(config, until="sft")
    sft = made[-1].manifest
    assert (sft.kind, sft.metrics["loss"]) == ("model", 0.5)
    assert sft.stage_version == STAGES["sft"].version
    assert sft.inputs["model"].step == "pretrain"
    assert sft.inputs["data"].sources == (str(config.parent / "sft.jsonl"),)
    assert sft.settings["sft.lr"] == 1e-3
    assert "launch.processes" in sft.unhashed
    assert sft.cost["tokens"] == 10
    assert sft.cost["peak_memory_bytes"] > 1e6
    assert sft.environment["python"]
    assert run.latest("sft") == made[-1].work


def test_a_changed_setting_is_explained_and_never_overwrites(config):
    _, _, first = execute(config, until="sft")
    draft = workspace.draft_run(config, ["sft.lr=2e-3"])
    assert "sft: stale (sft.lr 0.001 -> 0.002), will train" in runner.dry_run(draft, "sft")
    run, changes, second = execute(config, "sft.lr=2e-3", until="sft")
    assert changes == ["sft.lr 0.001 -> 0.002"]
    assert second[-1].work != first[-1].work
    assert (first[-1].work / "manifest.json").exists()
    assert run.latest("sft") == second[-1].work
    # back again: the old result is still there
    run, _, third = execute(config, until="sft")
    assert run.latest("sft") == third[-1].work == first[-1].work


def test_what_follows_a_changed_step_is_stale_because_of_its_input(config):
    execute(config)
    opened = workspace.draft_run(config, ["sft.lr=2e-3"])
    found = {state.step.name: state.text for state in runner.inspect(opened)}
    assert found["pretrain"] == "done"
    assert found["sft"] == "stale: sft.lr 0.001 -> 0.002"
    assert found["sample"] == "stale: input sft changed"


def test_a_changed_data_file_makes_its_step_stale(config):
    execute(config, until="pretrain")
    (config.parent / "text.txt").write_text("Twice upon a time.")
    assert states(config)["tokenizer"].text == "stale: input data changed"
    (config.parent / "text.txt").unlink()
    assert states(config)["tokenizer"].text.startswith("stale: input data is gone")


def test_launch_settings_make_nothing_stale(config):
    execute(config, until="sft")
    _, changes, made = execute(config, "launch.threads=1", until="sft")
    assert changes == ["launch.threads null -> 1"]
    assert made[-1].word == "done"


def test_a_stage_error_is_remembered_with_its_reason(config, monkeypatch):
    monkeypatch.setenv("FAKE_SFT", "fail")
    with pytest.raises(StageError, match="the loss is NaN at step 2") as caught:
        execute(config)
    assert caught.value.hint == "Lower sft.lr."
    assert states(config)["sft"].text == "failed: sft: the loss is NaN at step 2"
    assert states(config)["sample"].text == "missing"
    monkeypatch.delenv("FAKE_SFT")
    assert execute(config, until="sft")[2][-1].word == "done"


def test_a_crash_is_one_line_for_the_user_and_a_traceback_in_the_log(config, monkeypatch):
    monkeypatch.setenv("FAKE_SFT", "crash")
    with pytest.raises(StageError) as caught:
        execute(config)
    assert caught.value.message == "sft: ValueError: a bug of ours"
    log = states(config)["sft"].work / "rank0.log"
    assert str(log) in caught.value.hint
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "sft: metric loss is nan; nothing was published"),
        ("pickle", "sft: model.bin may not be in an artifact"),
    ],
)
def test_what_no_later_step_could_trust_is_not_published(config, monkeypatch, how, message):
    monkeypatch.setenv("FAKE_SFT", how)
    with pytest.raises(StageError, match=message):
        execute(config, until="sft")
    assert states(config)["sft"].manifest is None


def test_a_killed_child_is_named_and_the_run_goes_on_afterwards(config, monkeypatch):
    monkeypatch.setenv("FAKE_SFT", "kill")
    with pytest.raises(StageError) as caught:
        execute(config)
    assert "was killed by SIGKILL" in caught.value.message
    assert "| the last words" in caught.value.message
    assert states(config)["sft"].word == "failed"
    made = execute(config)[2]
    assert made[-1].word == "done"
    assert made[2].manifest.resumed_from == 1


def test_out_of_memory_names_what_to_lower(config, monkeypatch):
    monkeypatch.setenv("FAKE_SFT", "memory")
    with pytest.raises(StageError, match="sft: out of memory") as caught:
        execute(config)
    assert "Raise sft.accumulation_steps" in caught.value.hint


def test_a_run_that_was_moved_and_whose_data_has_another_name_is_still_done(config, tmp_path):
    code, err = finished(config)
    assert code == 0, err
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    (config.parent / "run").rename(moved)
    for name in ("text.txt", "sft.jsonl"):
        (config.parent / name).rename(moved.parent / f"new-{name}")
    code, err = finished(moved)
    assert code == 2
    assert re.search(r"pretrain.data: \S+text.txt does not exist", err), err
    given = [f"pretrain.data={moved.parent}/new-text.txt", f"sft.data={moved.parent}/new-sft.jsonl"]
    code, err = finished(moved, *given)
    assert code == 0, err
    assert err.count("done, nothing to do") == len(states(moved))
    # a copy lives beside the original
    shutil.copytree(moved, tmp_path / "copy")
    code, err = finished(tmp_path / "copy")
    assert code == 0, err
    assert err.count("done, nothing to do") == len(states(moved))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def finished(*arguments, **environment):
    process = start(*arguments, **environment)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, err


def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(small_disk, tmp_path):
    config = fake_line.write_config(tmp_path)
    place = f"run.dir={small_disk / 'run'}"
    code, err = finished(config, place, FAKE_SFT="full")
    assert code == 1
    assert re.search(r"error: sft: the disk of \S+ is full \(0.\d MiB free\)\n +Free some", err)
    # the run cannot even be opened for writing now
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2**21))
    code, err = finished(config, place)
    assert code == 1
    assert re.search(
        r"error: No space left on device\n +Free|error: sft: the disk of \S+ is full", err
    )
    filler.unlink()
    for file in small_disk.rglob("much.json"):
        file.unlink()
    code, err = finished(config, place)
    assert code == 0, err
    assert "sft: done" in err


def test_a_run_directory_that_may_only_be_read_can_be_looked_at_and_no_more(small_disk, tmp_path):
    config = fake_line.write_config(tmp_path)
    place = f"run.dir={small_disk / 'run'}"
    assert finished(config, place)[0] == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, err = finished(config, place, "sft.lr=0.5")
    assert code == 1
    assert re.search(rf"error: Read-only file system: {small_disk}/run/\S+\n +See whose", err)
    look = subprocess.run(
        [sys.executable, "-m", "tests.fake_line", "status", small_disk / "run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert look.returncode == 0, look.stderr
    assert "evaluate" in look.stdout


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("rank-dies", "sft: rank 1 has died. Perhaps for lack of memory"),
        ("rank-stands-still", r"sft: rank 1 stands still \(stopped by a signal\)"),
    ],
)
def test_a_rank_that_others_wait_for_is_named_and_nothing_is_left_running(config, how, message):
    process = start(config, "launch.processes=2", FAKE_SFT=how)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert re.search(f"error: {message}", err), err
    folder = str(config.parent / "run")
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert folder not in lines


def test_a_changed_byte_stops_the_line_and_names_the_file(config):
    run, _, made = execute(config, until="sft")
    file = made[-1].work / "artifact" / "result.json"
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)
    assert states(config)["sft"].text == "damaged: result.json has changed bytes"
    with pytest.raises(ArtifactError, match=r"sft: damaged: result.json has changed bytes"):
        execute(config)
    with pytest.raises(ArtifactError, match=r"result.json has changed bytes"):
        artifacts.verify(made[-1].work, made[-1].manifest)
    assert run.latest("sample") is None


def test_a_byte_that_changed_with_the_old_time_stamp_is_found_before_use(config):
    _, _, made = execute(config, until="sft")
    file = made[-1].work / "artifact" / "result.json"
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"s", b"z", 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert states(config)["sft"].word == "done"
    with pytest.raises(ArtifactError, match=r"result.json has changed bytes"):
        execute(config)


def test_the_line_waits_for_people_and_says_how_many(config, monkeypatch):
    monkeypatch.setenv("FAKE_RANK", "people")
    with pytest.raises(PeopleNeeded, match="83 more rankings are needed"):
        execute(config)
    state = states(config)["rank"]
    assert state.text == "waiting for people: 37 of 120 rankings"
    assert (state.to_row()["state"], state.to_row()["reason"]) == ("waiting", "37 of 120 rankings")
    monkeypatch.delenv("FAKE_RANK")
    assert execute(config)[2][-1].word == "done"


def count_labels(config, rankings, rows=None, have=120):
    """What the ranking app writes after a ranking was saved."""
    labels = {"rankings": rankings, "rows": rows or rankings}
    progress = {"rank": {"have": have, "need": 120, "labels": labels}}
    (config.parent / "run" / "rank-progress.json").write_text(json.dumps(progress))


def test_rankings_that_come_after_an_export_make_it_stale_and_stay_in_the_history(config):
    execute(config, until="sample")
    count_labels(config, 120)
    first = {state.step.name: state for state in execute(config)[2]}
    assert {state.word for state in states(config).values()} == {"done"}
    count_labels(config, 132)
    now = states(config)
    assert now["rank"].text == "stale: 12 new rankings"
    assert now["reward"].text == "stale: input rank changed"
    again = {state.step.name: state for state in execute(config)[2]}
    assert again["rank"].manifest.derived["labels"] == {"rankings": 132, "rows": 132}
    assert again["rank"].work != first["rank"].work
    assert (first["rank"].work / "artifact" / "rankings.jsonl").is_file()
    assert {state.word for state in states(config).values()} == {"done"}
    # a change of mind and a person who is forgotten are no new rankings
    for rankings, rows in ((132, 133), (100, 101)):
        count_labels(config, rankings, rows)
        assert states(config)["rank"].text == "stale: rankings were changed"
        execute(config, until="rank")
        assert states(config)["rank"].word == "done"
    count_labels(config, 101, 102)
    assert states(config)["rank"].text == "stale: 1 new ranking"


def test_a_run_whose_labels_nobody_counted_is_not_stale(config):
    execute(config)
    count_labels(config, 12)
    assert states(config)["rank"].word == "done"


def test_an_export_that_was_killed_goes_on_and_damage_is_seen(config, monkeypatch):
    execute(config, until="sample")
    count_labels(config, 120)
    execute(config, until="rank")
    count_labels(config, 121)
    monkeypatch.setenv("FAKE_RANK", "fail")
    with pytest.raises(StageError):
        execute(config)
    assert states(config)["rank"].word == "failed"
    monkeypatch.delenv("FAKE_RANK")
    made = execute(config, until="rank")[2][-1]
    assert (made.word, made.manifest.derived["labels"]["rankings"]) == ("done", 121)
    (made.work / "artifact" / "rankings.jsonl").write_text("x")
    assert states(config)["rank"].word == "damaged"


def test_a_command_that_waits_shows_the_count_and_goes_on_by_itself(config, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_RANK", "people")
    with workspace.writer(workspace.draft_run(config)) as (run, _):
        rounds = []

        def work():
            rounds.append(1)
            return runner.execute(run)

        def people(seconds):
            # somebody ranks while the line stands still
            if len(rounds) == 1:
                monkeypatch.delenv("FAKE_RANK", raising=False)
                count_labels(config, 120, have=120)

        monkeypatch.setattr(waiting, "sleep", people)
        made = waiting.until_ranked(run, work, "HOW TO")
    assert made[-1].word == "done"
    assert len(rounds) == 2
    said = capsys.readouterr().err
    assert "83 more rankings are needed" in said
    assert "HOW TO" in said
    assert "rank: 37 of 120 rankings (31%)" in said
    assert "rank: 120 of 120 rankings (100%)" in said


def test_leaving_the_wait_loses_nothing(config, monkeypatch):
    monkeypatch.setenv("FAKE_RANK", "people")

    def leave(_):
        raise KeyboardInterrupt

    with workspace.writer(workspace.draft_run(config)) as (run, _):
        monkeypatch.setattr(waiting, "sleep", leave)
        with pytest.raises(PeopleNeeded, match="83 more"):
            waiting.until_ranked(run, lambda: runner.execute(run), "HOW TO")
    assert states(config)["rank"].text == "waiting for people: 37 of 120 rankings"


def test_inputs_that_do_not_fit_together_are_refused_before_the_step(config, monkeypatch):
    monkeypatch.setenv("FAKE_REWARD", "other-vocabulary")
    with pytest.raises(ArtifactError) as caught:
        execute(config)
    assert caught.value.message.startswith("ppo: the reward model (step reward) has vocabulary")
    assert "they must be the same" in caught.value.message
    assert not (config.parent / "run" / "ppo").exists()


def test_a_stage_alone_needs_its_inputs(config):
    with pytest.raises(ArtifactError) as caught:
        execute(config, only="sft")
    message = caught.value.message
    assert message == "sft: needs the result of pretrain, which is missing"
    execute(config, only="tokenizer")
    execute(config, only="pretrain")
    assert [state.step.name for state in execute(config, only="sft")[2]] == ["sft"]


def test_an_unknown_step_is_refused_with_a_suggestion(config):
    with pytest.raises(ConfigError, match="there is no step 'rewrd'; did you mean 'reward'"):
        execute(config, until="rewrd")


def test_a_second_round_samples_from_the_policy_of_the_first(config):
    made = execute(config, "run.rounds=2")[2]
    by_name = {state.step.name: state for state in made}
    assert by_name["sample-2"].manifest.inputs["model"].step == "ppo"
    assert by_name["ppo-2"].to_row()["round"] == 2
    assert by_name["ppo-2"].manifest.digest != by_name["ppo"].manifest.digest


def test_two_writers_on_one_run_are_refused(config):
    execute(config, until="tokenizer")
    draft = workspace.draft_run(config)
    with workspace.writer(draft), pytest.raises(LockedError) as caught:
        execute(config)
    assert f"in use by process {os.getpid()} on " in caught.value.message
    assert caught.value.exit_code == 73
    assert execute(config, until="tokenizer")[2][0].word == "done"


def start(config, *overrides, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fake_line", "run", str(config), *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_stops_the_line_at_a_safe_point(config, number):
    process = start(config, FAKE_SFT="wait")
    beats = lambda: list((config.parent / "run" / "sft").glob("*/heartbeat.json"))  # noqa: E731
    wait_for(beats)
    wait_for(lambda: states(config)["sft"].text == "running (step 1 of 3)")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stopped: sft: stopped at step 1 of 3; everything is saved" in err
    assert states(config)["sft"].text == "partial (step 1 of 3)"
    made = execute(config, until="sft")[2]
    assert made[-1].manifest.resumed_from == 1


def test_a_killed_parent_takes_its_child_along_and_frees_the_lock(config):
    process = start(config, FAKE_SFT="wait")
    run = config.parent / "run"
    wait_for(lambda: list((run / "sft").glob("*/heartbeat.json")))
    beat = json.loads(next((run / "sft").glob("*/heartbeat.json")).read_text())
    process.kill()
    process.communicate()
    wait_for(lambda: not Path(f"/proc/{beat['pid']}").exists())
    assert states(config)["sft"].text == "partial (step 1 of 3)"
    assert execute(config)[2][-1].word == "done"


def test_a_stage_that_does_not_stop_in_time_is_stopped_by_force(config):
    process = start(config, "launch.grace_seconds=1", FAKE_SFT="deaf")
    wait_for(lambda: list((config.parent / "run" / "sft").glob("*/heartbeat.json")))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "sft: stopped after 1 s by force; it goes on from its last checkpoint" in err


def test_a_second_interrupt_ends_everything_at_once(config):
    process = start(config, FAKE_SFT="deaf")
    beats = config.parent / "run" / "sft"
    wait_for(lambda: list(beats.glob("*/heartbeat.json")))
    pid = json.loads(next(beats.glob("*/heartbeat.json")).read_text())["pid"]
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "again stops at once" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "error: interrupted" in err
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_run_every_step_and_one_of_them_publishes(config):
    _, _, made = execute(config, "launch.processes=2", until="rank")
    sizes = {state.step.name: state.manifest.metrics["world_size"] for state in made}
    assert sizes == {"tokenizer": 2, "pretrain": 2, "sft": 2, "sample": 2, "rank": 1}


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_stop_together_on_a_signal(config):
    process = start(config, "launch.processes=2", FAKE_SFT="wait")
    wait_for(lambda: list((config.parent / "run" / "sft").glob("*/heartbeat.json")), 60)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
