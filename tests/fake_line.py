"""A line whose stages do nothing, quickly: for tests of the core. No torch.

Every stage of the plan is this module. What a stage does is set by an environment variable, for
example FAKE_SFT=fail. `python -m tests.fake_line run CONFIG` is `prefline` with these stages.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from pipeline import plan, worker
from pipeline.errors import PeopleNeeded, StageError, Stopped

CONFIG = """
run: {{name: fake, dir: {run_dir}}}
model: {{precision: fp32}}
pretrain: {{data: {text}, steps: 3}}
sft: {{data: {sft}}}
sample: {{prompts: demo:prompts}}
rank: {{by: simulated}}
"""


def install(monkeypatch=None):
    """Replace every stage of the plan by this module."""
    for name, stage in list(plan.STAGES.items()):
        fake = dataclasses.replace(stage, module="tests.fake_line")
        if monkeypatch:
            monkeypatch.setitem(plan.STAGES, name, fake)
        else:
            plan.STAGES[name] = fake


def write_config(folder: Path) -> Path:
    """A configuration with data files, in `folder`."""
    (folder / "text.txt").write_text("Once upon a time.")
    (folder / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = folder / "fake.yaml"
    text = CONFIG.format(run_dir=folder / "run", text=folder / "text.txt", sft=folder / "sft.jsonl")
    config.write_text(text)
    return config


def run(settings, inputs, out):
    how = os.environ.get(f"FAKE_{out.step.upper()}", "")
    mark = out.checkpoints / "done-once"
    if mark.exists():
        out.resumed_from = 1
    out.say("working")
    if out.rank == 0:
        _misbehave(how, out, mark)
    elif how in ("rank-dies", "rank-stands-still"):
        (out.checkpoints / "gone").write_text("")
        os.kill(os.getpid(), signal.SIGKILL if how == "rank-dies" else signal.SIGSTOP)
    out.contract |= {"vocab_size": 7, "eos_id": 1, "pad_id": 0}
    if how == "other-vocabulary":
        out.contract["vocab_size"] = 8
    out.cost["tokens"] = 10
    out.progress(3, 3)
    if out.rank == 0:
        made = {
            "stage": out.stage,
            "inputs": {role: item.digest for role, item in inputs.items()},
            "seed": settings.run.seed,
            "lr": settings.sft.lr if out.stage == "sft" else None,
        }
        if out.stage == "rank":
            counted = out.run_dir / "rank-progress.json"
            if counted.exists():
                labels = json.loads(counted.read_text())[out.step].get("labels")
                out.derived["labels"] = made["labels"] = labels
            row = {"id": "abcdef0123456789", "annotator": "bot-1", "source": "simulated"}
            (out.artifact / "rankings.jsonl").write_text(json.dumps(row) + "\n")
        (out.artifact / "result.json").write_text(json.dumps(made, sort_keys=True))
    quality = json.loads(os.environ.get("FAKE_QUALITY", "{}")) if out.stage == "reward" else {}
    loss = float("nan") if how == "nan" else 0.5
    return {"loss": loss, "world_size": out.world_size, **quality}


def _misbehave(how, out, mark):
    if how == "fail":
        raise StageError("sft: the loss is NaN at step 2", "Lower sft.lr.")
    if how == "crash":
        raise ValueError("a bug of ours\nwith a second line")
    if how == "people":
        progress = {out.step: {"have": 37, "need": 120}}
        (out.run_dir / "rank-progress.json").write_text(json.dumps(progress))
        raise PeopleNeeded("83 more rankings are needed (37 of 120)")
    if how == "pickle":
        (out.artifact / "model.bin").write_bytes(b"\x80")
    if how == "kill" and not mark.exists():
        mark.write_text("")
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "full":
        (out.artifact / "much.json").write_bytes(bytes(2**24))
    if how == "memory":
        bytearray(2**60)
    if how in ("rank-dies", "rank-stands-still"):
        # what gloo says when another rank is gone
        while not (out.checkpoints / "gone").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:40512")
    if how == "deaf":
        out.progress(1, 3)
        time.sleep(60)
        time.sleep(60)
    if how == "wait" and not mark.exists():
        mark.write_text("")
        out.progress(1, 3)
        while not worker.stop_requested():
            time.sleep(0.01)
        raise Stopped(f"{out.step}: stopped at step 1 of 3; everything is saved")


if __name__ == "__main__":
    from pipeline.cli import main

    install()
    main()
