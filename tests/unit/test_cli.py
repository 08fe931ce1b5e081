"""The command: what it prints, where, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli, launch
from tests import fake_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path, monkeypatch):
    fake_line.install(monkeypatch)
    monkeypatch.setattr("pipeline.report.write_report", lambda path: path / "report.html")
    return fake_line.write_config(tmp_path)


@pytest.fixture
def prefline(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return caught.value.code, said.out, said.err

    return call


def test_a_run_ends_with_what_was_achieved_and_the_report(config, prefline):
    code, out, err = prefline("run", config)
    assert code == 0
    assert out.splitlines()[-1] == f"report: {config.parent / 'run' / 'report.html'}"
    assert "time: tokenizer 0" in out
    assert "sft: missing, will train" in err
    assert prefline("resume", config.parent / "run")[0] == 0


def test_status_json_has_the_promised_shape(config, prefline):
    prefline("run", config, "--until", "sft")
    code, out, _ = prefline("status", config.parent / "run", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["run"] == str(config.parent / "run")
    assert [row["step"] for row in told["steps"]][:4] == ["tokenizer", "pretrain", "sft", "sample"]
    sft = told["steps"][2]
    assert list(sft) == [
        *("step", "round", "stage", "state", "reason"),
        *("fingerprint", "digest", "path", "metrics", "seconds", "cost"),
    ]
    assert (sft["state"], sft["reason"], sft["round"]) == ("done", None, 1)
    assert sft["digest"].startswith("sha256:")
    assert Path(sft["path"]).is_dir()
    assert told["steps"][3]["state"] == "missing"
    _, out, _ = prefline("status", config.parent / "run")
    assert out.splitlines()[0].split() == ["step", "state", "seconds", "result"]


def test_a_dry_run_writes_nothing(config, prefline):
    code, out, _ = prefline("run", config, "--dry-run")
    assert code == 0
    assert "ppo: missing, will train" in out
    assert not (config.parent / "run").exists()


def test_when_people_are_needed_the_command_says_how_to_ask_them(config, prefline, monkeypatch):
    monkeypatch.setenv("FAKE_RANK", "people")
    code, _, err = prefline("run", config)
    assert code == 3
    run = config.parent / "run"
    assert "waiting: 83 more rankings are needed (37 of 120)" in err
    assert f"prefline users {run} add NAME" in err
    assert f"prefline rank {run}" in err
    _, out, _ = prefline("status", run)
    assert "waiting for people: 37 of 120 rankings" in out


def test_a_missing_path_is_found_before_anything_is_written(config, prefline):
    (config.parent / "sft.jsonl").unlink()
    code, _, err = prefline("run", config)
    assert code == 2
    assert f"error: sft.data: {config.parent / 'sft.jsonl'} does not exist" in err
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "gone.yaml"], "error: gone.yaml: no such file or directory"),
        (["status", "/"], "error: /: not a run directory"),
        (["stf"], "Did you mean 'sft'?"),
        (["run"], "Missing argument 'CONFIG|RUN'"),
        (["config"], "error: config: give a configuration or a run directory, or --fields"),
    ],
)
def test_wrong_words_are_refused_with_exit_code_2(prefline, arguments, message):
    code, _, err = prefline(*arguments)
    assert code == 2
    assert message in err


def test_a_wrong_setting_is_refused_before_anything_is_written(config, prefline):
    code, _, err = prefline("run", config, "ppo.kl_coeff=1")
    assert code == 2
    assert "ppo.kl_coeff: unknown key; did you mean 'ppo.kl_coef'?  [command line]" in err
    assert not (config.parent / "run").exists()


def test_verify_reads_every_byte_and_names_the_damaged_file(config, prefline):
    prefline("run", config, "--until", "sft")
    code, out, _ = prefline("verify", config.parent / "run")
    assert (code, out.count(": ok, 1 files")) == (0, 3)
    file = next((config.parent / "run" / "sft").glob("*/artifact/result.json"))
    file.write_text("{}")
    code, out, err = prefline("verify", config.parent / "run")
    assert code == 4
    assert "damaged: result.json has 2 bytes instead of" in out
    assert "error: 1 of 3 artifacts are damaged" in err


def test_config_shows_each_value_with_its_origin(config, prefline):
    _, out, _ = prefline("config", config, "ppo.lr=1e-5")
    assert "lr: 1.0e-05  # command line" in out
    assert f"steps: 3  # {config}:4" in out
    assert not (config.parent / "run").exists()
    _, out, _ = prefline("config", "--fields")
    assert "  ppo.kl_coef = 0.05\n" in out
    assert "  launch.processes = 1 *\n" in out


def test_lineage_prints_a_tree_and_json(config, prefline):
    prefline("run", config)
    run = config.parent / "run"
    assert prefline("lineage", run)[1].startswith("ppo  ")
    assert json.loads(prefline("lineage", run, "--json")[1])["name"] == "ppo"
    assert "  evaluate  " in prefline("lineage", run, "--label", "abcdef")[1]


def test_the_commands_for_people_get_the_rest_of_the_words(config, prefline, monkeypatch):
    called = []
    monkeypatch.setattr(launch, "call", lambda module, words: called.append((module, words)) or 7)
    prefline("run", config, "--until", "tokenizer")
    run = str(config.parent / "run")
    assert prefline("users", run, "add", "ada", "--role", "lead")[0] == 7
    prefline("labels", run, "export", "--help")
    prefline("rank", run, "--port", "8000")
    assert called == [
        ("labeling_ui.accounts", [run, "add", "ada", "--role", "lead"]),
        ("labeling_ui.labels", [run, "export", "--help"]),
        ("labeling_ui.server", [run, "--host", "127.0.0.1", "--port", "8000"]),
    ]


def test_a_foreign_package_with_our_name_is_refused(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").write_text("")
    code = "import sys; sys.path.insert(0, sys.argv.pop()); from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help", str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"the name 'stages' belongs to another package (in {tmp_path})" in done.stderr


def started(run):
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["event"] == "started"]


def test_another_policy_from_the_same_labels_runs_nothing_else_again(config, prefline):
    run = config.parent / "run"
    prefline("run", config)
    before = started(run)
    code, _, err = prefline("run", run, "run.policy=grpo")
    assert code == 0
    assert "changed: run.policy" in err
    assert started(run)[len(before) :] == ["grpo", "evaluate"]
    assert prefline("lineage", run)[1].startswith("grpo  ")
    # dpo reads no reward model; and back again nothing is missing
    prefline("run", run, "run.policy=dpo")
    assert started(run)[len(before) + 2 :] == ["dpo", "evaluate"]
    assert "reward" not in prefline("status", run)[1]
    prefline("run", run, "run.policy=ppo")
    assert len(started(run)) == len(before) + 4
    assert prefline("lineage", run)[1].startswith("ppo  ")


def test_the_command_of_a_policy_chooses_it(config, prefline):
    run = config.parent / "run"
    prefline("run", config)
    before = started(run)
    code, _, err = prefline("rloo", run, "rloo.lr=1e-4")
    assert code == 0
    assert "changed: run.policy" in err
    assert started(run)[len(before) :] == ["rloo"]
    assert [row for row in prefline("status", run)[1].splitlines() if row.startswith("rloo")]
    assert prefline("dpo", run, "run.policy=ppo")[0] == 2


def test_the_commands_of_the_policies_are_those_of_the_setting():
    from typing import get_args

    from pipeline.plan import STAGES
    from pipeline.settings.run import RunSettings

    known = get_args(RunSettings.model_fields["policy"].annotation)
    assert known == cli._POLICIES
    assert set(known) == {name for name, stage in STAGES.items() if stage.kind == "policy"}


def test_a_stage_that_is_refused_changes_no_setting(config, prefline):
    run = config.parent / "run"
    prefline("run", config, "--until", "pretrain")
    before = (run / "config.yaml").read_bytes(), (run / "events.jsonl").read_bytes()
    # pretrain is stale with it, so sft has nothing to begin from
    code, _, err = prefline("sft", run, "pretrain.lr=0.5")
    assert code != 0
    assert "sft: needs the result of pretrain, which is stale" in err
    assert (run / "config.yaml").read_bytes() == before[0]
    assert (run / "events.jsonl").read_bytes() == before[1]
    assert prefline("sft", run)[0] == 0
