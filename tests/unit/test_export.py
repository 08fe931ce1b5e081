"""What leaves the house: loads without us, says what it is, and overwrites nothing of anybody's."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl.data_utils import is_conversational

from pipeline import cli, export
from pipeline.errors import ArtifactError, ConfigError
from pipeline.records import Ranking
from pipeline.workspace import open_run
from stages import export as adapters
from tests.unit.exported_run import adapted_model, make_run
from tests.unit.fake_run import CONFIG, HOSTILE
from tests.unit.tiny_policy import conversation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return make_run(tmp_path_factory.mktemp("run"), patch)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    to = tmp_path_factory.mktemp("out") / "policy"
    own, inputs = export.parse_licences(["apache-2.0", "sft.data=cc-by-4.0"])
    request = export.Request(licence=own, input_licences=inputs)
    return export.export_folder(open_run(run), to, request)


def export_to(run, to, what="policy", **more):
    return export.export_folder(open_run(run), to, export.Request(what=what, **more))


def example(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


def artifact(run: Path, step: str) -> Path:
    return run / step / (run / step / "latest").read_text().strip() / "artifact"


# One process reads all folders: importing transformers costs more than everything else here.
ALONE = """
import json, os, sys, torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
def logits(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    said = [{"role": "user", "content": "Say red 1"}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        return ids, model(input_ids=torch.tensor([ids])).logits.double().flatten().tolist()
folders = json.loads(sys.argv[1])
found = {name: logits(folders[name]) for name in ("policy", "ppo artifact", "sft artifact")}
for name in ("policy", "reward"):
    os.chdir(folders[name])
    print("EXAMPLE", name)
    exec(json.loads(sys.argv[2])[name], {})
print("END")
pairs, groups = load_dataset(folders["rankings"]), load_dataset(folders["rankings"], "groups")
row = pairs["train"][0]
found["pairs"] = {split: len(rows) for split, rows in pairs.items()}
found["groups"] = {split: len(rows) for split, rows in groups.items()}
found |= {"row": row, "group": groups["heldout"][0]}
assert not {"pipeline", "stages", "labeling_ui"} & set(sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(run, exported, tmp_path_factory):
    out = tmp_path_factory.mktemp("others")
    made = {what: export_to(run, out / what, what) for what in ("reward", "rankings", "sft")}
    own = {f"{step} artifact": artifact(run, step) for step in ("ppo", "sft")}
    return {"policy": exported, **made, **own}


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """What a Python that has no package of ours on its path finds in the exported folders: its output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("cache"))}
    names = {name: str(folder) for name, folder in folders.items()}
    examples = {name: example(folders[name]) for name in ("policy", "reward")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(names), json.dumps(examples)],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(alone):
    return json.loads(alone.splitlines()[-1])


# ---- the model -----------------------------------------------------------------------------


def test_plain_transformers_computes_the_logits_of_the_artifact(found):
    assert found["policy"] == found["ppo artifact"]
    assert found["policy"] != found["sft artifact"]


def test_the_examples_of_the_cards_run_as_they_stand(alone):
    policy, reward = re.fullmatch(
        r"EXAMPLE policy\n(.*)EXAMPLE reward\n(.*)END\n.*", alone, re.DOTALL
    ).groups()
    assert policy.endswith("\n")
    float(reward)


def test_generation_samples_as_the_policy_was_trained(exported):
    held = json.loads((exported / "generation_config.json").read_text())
    expected = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 128, "use_cache": True}
    assert held | expected == held
    assert held["eos_token_id"] != held["pad_token_id"]


def test_reward_and_sft_models_say_what_they_are(run, folders):
    card = ModelCard.load(folders["reward"] / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    held = (folders["sft"] / "model.safetensors").read_bytes()
    assert held == (artifact(run, "sft") / "model.safetensors").read_bytes()
    text = (folders["sft"] / "README.md").read_text()
    assert "None: no rankings went into this model." in text


def test_the_same_run_gives_the_same_bytes(run, exported, tmp_path):
    again = export_to(
        run,
        tmp_path / "again",
        licence="apache-2.0",
        input_licences={"sft.data": "cc-by-4.0"},
    )
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in exported.iterdir()
    }


# ---- the adapter ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_on_its_base_is_the_policy(kind, tmp_path):
    base, policy = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in adapted_model(kind)
    )
    adapters.save(adapters.extract(policy, copy.deepcopy(base), rank=4), tmp_path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, wanted = base(ids).logits, policy(ids).logits
        found = PeftModel.from_pretrained(base, tmp_path)(ids).logits
    assert (wanted - before).abs().max() > 0.05
    assert torch.allclose(found, wanted, atol=1e-5)


def test_more_than_the_rank_can_say_is_refused_and_less_is_not():
    base, policy = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in adapted_model()
    )
    with pytest.raises(ConfigError, match="more than adapters of rank 3"):
        adapters.extract(policy, copy.deepcopy(base), rank=3)
    assert adapters.largest_difference(policy, adapters.extract(policy, base, rank=9)) < 1e-6
    with torch.no_grad():
        policy.get_input_embeddings().weight[5] += 0.1
    base, _ = adapted_model()
    base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"embed_tokens.*differs from the model below"):
        adapters.extract(policy, base, rank=4)


@pytest.mark.slow
def test_the_adapter_of_a_run_and_its_card(monkeypatch, tmp_path):
    base, policy = adapted_model()
    config = {**CONFIG, "ppo": {**CONFIG["ppo"], "lora": {"rank": 4}}}
    run = make_run(tmp_path, monkeypatch, models={"sft": base, "ppo": policy}, config=config)
    folder = export_to(run, tmp_path / "out", adapter=True)
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "export.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert "the result of step sft of the same run" in card.text
    compile(example(folder), "README.md", "exec")


def test_without_lora_there_is_no_adapter(run, tmp_path):
    with pytest.raises(ConfigError, match=r"ppo was trained whole \(ppo\.lora\.rank is 0\)"):
        export_to(run, tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()


# ---- the card ------------------------------------------------------------------------------


def test_the_front_matter_is_what_the_hub_reads(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert {"prefline", "rlhf", "ppo"} == set(card.data.tags)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"win_rate_vs_sft": 0.783, "win_rate_vs_base": 0.961}


def test_the_card_says_what_the_manifests_say(exported):
    text = (exported / "README.md").read_text().replace("\u202f", " ")
    for figure in (
        "24 rankings",
        "import-1 | 24",
        "63.1 % (58.7 % to 67.4 %)",
        "78.3 % | 73.7 % to 82.4 %",
        "3.21 nats",
        "4.62",
        "Kendall τ with the rankings | 0.262",
        "| sft.data | demo:demonstrations | cc-by-4.0 |",
        "| pretrain.data | demo:stories | apache-2.0 |",
        "Agreement of two annotators about a pair (chance is 50 %): 71.0 %",
        "| energy in Wh (an estimate) |",
    ):
        assert figure in text, figure
    bias, hallucination = text.split("### Bias")[1].split("### Hallucination")
    assert bias.strip() == "Not measured."
    assert hallucination.strip().startswith("Not measured.")
    digest = json.loads((exported / "export.json").read_text())["digest"]
    assert digest.removeprefix("sha256:")[:12] in text


def test_bias_and_hallucination_stand_in_the_card_where_they_were_measured(monkeypatch, tmp_path):
    figures = {"benchmarks": {"bbq_accuracy": 0.41, "truthfulqa_mc2": 0.377}}
    run = make_run(tmp_path, monkeypatch, **figures)
    text = (export_to(run, tmp_path / "out") / "README.md").read_text()
    bias, rest = text.split("### Bias")[1].split("### Hallucination")
    assert "bbq\\_accuracy | 0.410" in bias
    assert "truthfulqa\\_mc2 | 0.377" in rest.split("## Limits")[0]
    assert "Nobody has measured what it does to groups" not in text


def test_hostile_names_stay_text_and_people_stay_unknown(monkeypatch, tmp_path):
    private = tmp_path / "of Grace"
    private.mkdir()
    data = private / "in|<b>[x](y).jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    rows = [
        Ranking(conversation(i), ("a", "b"), (1, 2), name, split, source=source).to_row()
        for i, (name, source) in enumerate(
            [
                ("p-0123456789ab", "app"),
                ("grace@example.org", "import:pairs"),
                (HOSTILE, "import:pairs"),
            ]
        )
        for split in ("heldout" if i else "train",)
    ]
    config = {
        "run": {"name": "mine"},
        "pretrain": {"data": ["demo:stories"]},
        "sft": {"data": [str(data)]},
        "sample": {"prompts": [str(data)]},
        "evaluate": {"judge": "reward_model"},
    }
    run = make_run(tmp_path, monkeypatch, rows, config=config)
    text = (export_to(run, tmp_path / "out") / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "Grace" not in text
    assert "in\\|\\<b\\>\\[x\\](y).jsonl" in text
    assert "p-0123456789ab | 1" in text
    assert "grace@" not in text
    assert "<script>" not in text
    assert not re.search("[\x00\x1b\u202a-\u202e]", text)
    assert "| sft.data |" in text
    assert "unknown" in text
    # nor in the files of the data set
    folder = export_to(run, tmp_path / "set", "rankings")
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"grace@" not in path.read_bytes(), path


def test_a_licence_that_the_hub_does_not_list_goes_by_name(run, tmp_path):
    text = (export_to(run, tmp_path / "out", licence="House rules 1") / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "other"
    assert front["license_name"] == "House rules 1"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["mit", "apache-2.0"], "both"),
        (["sftdata=mit"], "no setting"),
        (["sft.data="], "no setting"),
    ],
)
def test_a_licence_of_nothing_is_refused(given, part):
    with pytest.raises(ConfigError, match=part):
        export.parse_licences(given)


# ---- rankings ------------------------------------------------------------------------------


def test_rankings_load_with_plain_datasets_in_trls_format(found, folders):
    # 24 rankings of 3 responses, the last two tied: 2 pairs each; every fifth prompt is held out
    assert found["pairs"] == {"train": 38, "heldout": 10}
    assert found["groups"] == {"train": 19, "heldout": 5}
    assert is_conversational(found["row"])
    assert found["row"]["chosen"][0]["content"].endswith(" it is")
    assert found["row"]["rejected"][0]["role"] == "assistant"
    assert sorted(found["group"]["ranks"][0]) == [1, 2, 2]
    card = DatasetCard.load(folders["rankings"] / "README.md")
    assert [c["config_name"] for c in card.data.to_dict()["configs"]] == ["pairs", "groups"]
    assert "24 ties" in (folders["rankings"] / "README.md").read_text()


# ---- refusals ------------------------------------------------------------------------------


def test_a_stale_policy_is_exported_by_force_only_and_the_card_says_so(monkeypatch, tmp_path):
    run = make_run(tmp_path, monkeypatch)
    config = run / "config.yaml"
    config.write_text(re.sub(r"updates: 42", "updates: 43", config.read_text()))
    with pytest.raises(ArtifactError, match=r"stale: ppo.updates 42 -> 43") as caught:
        export_to(run, tmp_path / "out")
    assert "--force" in caught.value.hint
    assert not (tmp_path / "out").exists()
    text = (export_to(run, tmp_path / "out", force=True) / "README.md").read_text()
    assert "stale: ppo.updates 42 -\\> 43" in text


def test_a_damaged_policy_is_named_even_if_size_and_time_are_as_before(monkeypatch, tmp_path):
    run = make_run(tmp_path, monkeypatch)
    export.inspect(open_run(run))  # now the hash is remembered by size and time
    weights = artifact(run, "ppo") / "model.safetensors"
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match=r"damaged: model\.safetensors"):
        export_to(run, tmp_path / "out")


def test_what_is_not_there_cannot_be_exported(monkeypatch, tmp_path):
    run = make_run(tmp_path, monkeypatch, stop_after="ppo")
    for force in (False, True):
        with pytest.raises(ArtifactError, match="ppo: there is nothing to export"):
            export_to(run, tmp_path / "out", force=force)
    with pytest.raises(ConfigError, match="known are policy, sft"):
        export_to(run, tmp_path / "out", "value")


def test_an_earlier_export_is_replaced_and_anything_else_is_not(run, tmp_path):
    to = tmp_path / "out"
    to.mkdir()
    export_to(run, to)
    export_to(run, to, "sft")
    assert json.loads((to / "export.json").read_text())["what"] == "sft"
    notes = to / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt does not belong to the export"):
        export_to(run, to)
    notes.unlink()
    (to / "README.md").write_text("better words")
    with pytest.raises(ConfigError, match=r"README\.md was changed since"):
        export_to(run, to)
    assert (to / "README.md").read_text() == "better words"
    other = tmp_path / "other"
    (other / "empty").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not empty and is no export"):
        export_to(run, other)
    with pytest.raises(ConfigError, match="no such folder"):
        export_to(run, tmp_path / "no" / "where")
    with pytest.raises(ConfigError, match="is a file"):
        export_to(run, notes if notes.exists() else _file(tmp_path))


def _file(folder):
    path = folder / "a-file"
    path.write_text("")
    return path


def test_a_failure_leaves_nothing_behind_and_the_old_export_in_place(run, tmp_path, monkeypatch):
    to = export_to(run, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in to.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(OSError, match="No space"):
        export_to(run, to, "sft")
    assert {p.name: p.read_bytes() for p in to.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command_prints_where_it_is_and_asks_nothing(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(run), "--to", str(tmp_path / "out")])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(run), "--to", "hub:nobody"])
    assert end.value.code == 2
    assert "hub:OWNER/NAME" in capsys.readouterr().err
