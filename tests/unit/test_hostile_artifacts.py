"""A model, an artifact or a file of somebody else: no code of theirs is run, and nothing outside is read.

Everything that could run something makes a folder, the marker, if it does; it must never appear.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipeline import artifacts, manifest, records
from pipeline.cli import app
from pipeline.errors import ArtifactError, ConfigError, DataError, ToolkitError
from pipeline.job import Input, Out
from pipeline.manifest import FileRecord
from stages import checkpoints, trl_checkpoints
from stages.models import load_causal_lm, load_reward_model, load_tokenizer
from tests.dist.small_jobs import make_base, make_job


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def base(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    place = tmp_path / "marker"
    yield place
    assert not place.exists(), "code of somebody else was run"


def given(base: Path) -> list[Input]:
    """As `model.base`, and as an artifact of ours."""
    return [Input("model", "", sources=(str(base),)), Input("model", "", path=base)]


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---- models --------------------------------------------------------------------------------


def test_the_marker_would_be_seen(tmp_path: Path) -> None:
    torch.save(Evil(tmp_path / "seen"), tmp_path / "evil.bin")
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert (tmp_path / "seen").is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_pickle_in_place_of_weights_is_refused(
    name: str, index: int, base: Path, marker: Path
) -> None:
    (base / "model.safetensors").unlink()
    torch.save(Evil(marker), base / name)
    with pytest.raises((ConfigError, ArtifactError), match="cannot be loaded as a model"):
        load_causal_lm(given(base)[index])


def test_an_index_that_leads_to_pickles_is_refused(base: Path, marker: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save(Evil(marker), base / "shard.bin")
    for name in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        text = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "shard.bin"}}
        (base / name).write_text(json.dumps(text))
    for item in given(base):
        with pytest.raises((ConfigError, ArtifactError), match="cannot be loaded as a model"):
            load_causal_lm(item)


def test_a_pickle_beside_the_weights_is_not_read(base: Path, marker: Path) -> None:
    torch.save(Evil(marker), base / "pytorch_model.bin")
    torch.save(Evil(marker), base / "training_args.bin")
    for item in given(base):
        load_causal_lm(item)


@pytest.mark.parametrize("weights", ["adapter_model.bin", None])
def test_adapters_that_lie_in_the_folder_run_nothing(
    weights: str | None, base: Path, marker: Path
) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config["base_model_name_or_path"] = str(base)
    (base / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        torch.save(Evil(marker), base / weights)
    for item in given(base):
        with pytest.raises((ConfigError, ArtifactError), match="cannot be loaded as a model"):
            load_causal_lm(item)


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_that_a_configuration_names_is_never_run(
    model_type: str, base: Path, marker: Path
) -> None:
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    (base / "evil.py").write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    change(base / "config.json", model_type=model_type, auto_map=dict.fromkeys(names, "evil.C"))
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    for item in given(base):
        for load in (load_tokenizer, load_causal_lm):
            with contextlib.suppress(ConfigError, ArtifactError):
                load(item)
    if model_type == "evil":
        with pytest.raises(ArtifactError, match="cannot be loaded as a model"):
            load_reward_model(given(base)[1])


def test_a_chat_template_cannot_reach_python(base: Path, marker: Path) -> None:
    reach = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
    for file in base.glob("chat_template*"):
        file.unlink()
    change(base / "tokenizer_config.json", chat_template=reach)
    tokenizer = load_tokenizer(given(base)[1])
    with pytest.raises(Exception, match=r"unsafe|undefined|security"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


# ---- artifacts and checkpoints -------------------------------------------------------------


def publish(work: Path) -> manifest.Manifest:
    folder = artifacts.prepare(work)
    (folder / "config.json").write_text("{}")
    draft = {"stage": "sft", "stage_version": 1, "kind": "model", "step": "sft", "round": 1}
    return artifacts.publish(
        work, manifest.Manifest.model_validate({**draft, "fingerprint": "f", "digest": ""})
    )


def forge(made: manifest.Manifest, work: Path, name: str) -> manifest.Manifest:
    """A manifest that agrees with itself and lists one more file."""
    path = work / artifacts.FOLDER / name
    row = FileRecord(path=name, bytes=path.stat().st_size, sha256=artifacts.sha256(path))
    files = (*made.files, row)
    return made.model_copy(update={"files": files, "digest": artifacts.digest(files)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.json", "leads out of the artifact"),
        ("sub/../../secret.json", "leads out of the artifact"),
        ("ABSOLUTE", "leads out of the artifact"),
        ("link.json", "is a link"),
        ("folder/secret.json", "is a link"),
        ("model.pt", "may not be in an artifact"),
        ("evil.py", "may not be in an artifact"),
    ],
)
def test_what_a_manifest_lists_is_looked_at_before_it_is_read(
    name: str, message: str, tmp_path: Path, marker: Path
) -> None:
    work = tmp_path / "work"
    made = publish(work)
    folder = work / artifacts.FOLDER
    (work / "secret.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "link.json").symlink_to(work / "secret.json")
    (folder / "folder").symlink_to(work)
    torch.save(Evil(marker), folder / "model.pt")
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    name = str(work / "secret.json") if name == "ABSOLUTE" else name
    with pytest.raises(ArtifactError, match=f"sft: damaged: .*{message}"):
        artifacts.verify(work, forge(made, work, name))


def test_a_link_that_no_manifest_lists_is_damage(tmp_path: Path) -> None:
    made = publish(tmp_path / "work")
    (tmp_path / "work" / artifacts.FOLDER / "more").symlink_to("/nowhere")
    with pytest.raises(ArtifactError, match="more does not belong to the artifact"):
        artifacts.verify(tmp_path / "work", made)


def test_a_checkpoint_with_a_pickle_in_it_runs_nothing(
    good: Path, tmp_path: Path, marker: Path
) -> None:
    out = Out(make_job("pretrain", tmp_path / "work", good))
    out.checkpoints.mkdir()
    saver = checkpoints.Checkpointer(out, 2)
    saver.save(1, {"model": {"weight": torch.ones(1)}}, {})
    saver.save(2, {"model": {"weight": torch.ones(1)}}, {})
    folder = out.checkpoints / "step-00000002"
    torch.save(Evil(marker), folder / "model.safetensors")
    sums = json.loads((folder / "MANIFEST.json").read_text())
    sums["model.safetensors"] = checkpoints.sha256(folder / "model.safetensors")
    (folder / "MANIFEST.json").write_text(json.dumps(sums))
    with pytest.raises(Exception, match="header"):
        saver.load_latest()


@pytest.mark.parametrize(
    "name",
    [
        "rng_state.pth",
        pytest.param("optimizer.pt", marks=pytest.mark.slow),
        pytest.param("scheduler.pt", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_the_trainer_with_a_pickle_in_it_runs_nothing(
    name: str, good: Path, tmp_path: Path, marker: Path
) -> None:
    """Those of sft hold pickles of transformers'; sums that somebody has made to fit do not help."""
    from pipeline.settings import Settings
    from stages import sft

    work = tmp_path / "work"
    job = make_job("sft", work, good, checkpoint_every_steps=1)
    job = type(job)(**{**vars(job), "inputs": {**job.inputs}})

    def run() -> None:
        out = Out(job)
        artifacts.prepare(work)
        out.checkpoints.mkdir(exist_ok=True)
        sft.run(Settings.model_validate(job.settings), job.inputs, out)

    run()
    for folder in (work / "checkpoints").glob("checkpoint-*"):
        assert (folder / name).exists()
        torch.save(Evil(marker), folder / name)
        (folder / trl_checkpoints.COMMITTED).unlink()
        trl_checkpoints.commit(folder, 9)
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        run()


# ---- configurations and data ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.mkdir ['MARKER']\n",
        "run:\n  name: !!python/object/apply:os.mkdir [MARKER]\n",
        "run: &a [*a, *a]\n",
        "run:\n  name: ../x\n",
        "run:\n  name: /etc/x\n",
        "run:\n  name: .hidden\n",
    ],
)
def test_a_configuration_runs_nothing_and_names_no_place_outside(
    text: str, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.yaml"
    file.write_text(text.replace("MARKER", str(marker)))
    before = sorted(tmp_path.rglob("*"))
    answer = CliRunner().invoke(app, ["run", str(file)])
    assert answer.exit_code == 2 or isinstance(answer.exception, ToolkitError), answer.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_is_read_in_place_and_never_unpacked(tmp_path: Path, marker: Path) -> None:
    file = tmp_path / "data.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../marker/x.txt", "hello")
        archive.writestr("/etc/prefline.txt", "hello")
    before = sorted(tmp_path.rglob("*"))
    list(records.read_rows(file))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_LARGEST_MEMBER", 2**20)
    file = tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text.txt", bytes(2**22))
    assert file.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"bomb.zip/text.txt: unpacks to more than 1 MiB"):
        list(records.read_rows(file))
