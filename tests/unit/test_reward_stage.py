"""reward: what it learns, what it publishes, and that a stop and a start change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import worker
from pipeline.config import load_settings
from pipeline.errors import ConfigError, StageError, Stopped
from pipeline.job import Input, Job, Out
from pipeline.records import Ranking, write_jsonl
from pipeline.settings import Settings
from pipeline.settings.model import LoraSettings, ModelSettings
from pipeline.settings.reward import RewardSettings
from stages import reward, reward_training
from stages import tokenizer as tokenizer_stage
from stages.adapters import adapter_base, load_head
from stages.chat import encode_completion, encode_prompt
from stages.models import (
    add_lora,
    backbone_and_head,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    new_causal_lm,
    save_model,
)
from stages.ranked_data import encode_rankings
from stages.reward_heads import load_heads, score_with_uncertainty
from stages.rollout import last_token_scores
from stages.shared_prefix import GroupScorer, PromptGroup

WORDS = ["bad", "poor", "fair", "good", "great"]
BASE_DIGEST = "sha256:" + "1" * 64


def rankings(count: int) -> list[Ranking]:
    """More of the better words is better; every fifth prompt is held out."""
    found = []
    for number in range(count):
        texts = [f"{WORDS[(number + k) % 5]} {'so ' * (k * number % 4)}{number}" for k in range(4)]
        level = [5 - (number + k) % 5 for k in range(4)]
        found.append(
            Ranking(
                messages=({"role": "user", "content": f"Say {number % 7} of {number}"},),
                responses=tuple(texts),
                ranks=tuple(level),
                annotator=f"a{number % 2}",
                split="heldout" if number % 5 == 0 else "train",
            )
        )
    return found


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    texts = (f"{r.messages[0]['content']} {t}" for r in rankings(60) for t in r.responses)
    tokenizer = tokenizer_stage.train(texts, 320, 2)
    torch.manual_seed(0)
    shape = {
        "architecture": request.param,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_length": 64,
    }
    save_model(new_causal_lm(ModelSettings.model_validate(shape), tokenizer), tokenizer, folder)
    return folder


def job(work: Path, base: Path, rows: list[Ranking] | None = None, **settings: Any) -> Job:
    data = work / "rankings"
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(data / "rankings.jsonl", (r.to_row() for r in rows or rankings(40)))
    own = {"prompts_per_step": 8, "lr": 3e-3, "epochs": 2, "max_length": 64, **settings}
    tree = Settings.model_validate(
        {"model": {"base": str(base), "precision": "fp32"}, "reward": own}
    )
    inputs = {
        "model": Input("model", BASE_DIGEST, path=base),
        "rankings": Input("rankings", "sha256:2", path=data),
    }
    return Job(
        "reward", "reward", "stages.reward", 1, "0" * 12, work, work, tree.model_dump(), inputs, {}
    )


def run(job: Job) -> tuple[dict[str, Any], Out]:
    out = Out(job)
    out.artifact.mkdir(parents=True, exist_ok=True)
    return reward.run(Settings.model_validate(job.settings), job.inputs, out), out


def rows_of(out: Out) -> list[dict[str, Any]]:
    lines = (out.work / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def bytes_of(out: Out) -> dict[str, bytes]:
    files = [p for p in sorted(out.artifact.rglob("*")) if p.is_file()]
    return {p.relative_to(out.artifact).as_posix(): p.read_bytes() for p in files}


def score_rows(base: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(Input("model", BASE_DIGEST, path=base))
    return [
        encode_prompt(tokenizer, list(r.messages)) + encode_completion(tokenizer, text, eos=True)
        for r in rankings(6)
        for text in r.responses
    ]


def test_it_learns_the_order_and_publishes_a_plain_classifier(tmp_path: Path, base: Path) -> None:
    metrics, out = run(job(tmp_path, base, epochs=6))
    assert metrics["heldout_accuracy"] > 0.8
    assert set(metrics) == {
        "heldout_accuracy",
        "heldout_accuracy_low",
        "heldout_accuracy_high",
        "train_accuracy",
        "kendall_tau",
        "length_correlation",
        "heldout_pairs",
        "rankings_trained",
        "score_mean",
        "score_std",
        "human_agreement",
        "ece",
        "position_correlation",
        "eos_effect",
        "eos_gain",
        "eos_preferred",
    }
    # nobody ranked what another one did
    assert metrics["human_agreement"] is None
    # the score is read at the last token, which is another one without the end token
    assert metrics["eos_effect"] > 0.01
    diagnosis = json.loads((out.work / "diagnosis.json").read_text())
    assert diagnosis["length"]["score"] == pytest.approx(metrics["length_correlation"], abs=1e-4)
    # votes that no majority decides are no mistakes, and a model that is mostly right makes few
    mistakes = (out.work / "worst_mistakes.jsonl").read_text().splitlines()
    assert len(mistakes) < 8
    names = set(bytes_of(out))
    assert {"model.safetensors", "config.json", "reward.json"} <= names
    assert not any("head" in name or "adapter" in name for name in names)
    model = load_reward_model(Input("reward_model", "sha256:3", path=out.artifact))
    assert model(input_ids=torch.tensor(score_rows(base)[:1])).logits.shape == (1, 1)


def test_sharing_the_prompt_changes_the_work_and_not_the_numbers(
    tmp_path: Path, base: Path
) -> None:
    found, alone = (
        run(job(tmp_path / "a", base)),
        run(job(tmp_path / "b", base, share_prefix=False)),
    )
    for a, b in zip(rows_of(found[1]), rows_of(alone[1]), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    # pairs do not fix the level of scores, so rounding is free to move it
    for name, value in found[0].items():
        other = alone[0][name]
        assert value == (other if other is None else pytest.approx(other, rel=1e-3, abs=1e-2)), name
    assert found[1].cost["tokens"] < 0.7 * alone[1].cost["tokens"]


def test_micro_batches_change_nothing_but_memory(tmp_path: Path, base: Path) -> None:
    whole, parts = (
        run(job(tmp_path / "a", base)),
        run(job(tmp_path / "b", base, accumulation_steps=4)),
    )
    for a, b in zip(rows_of(whole[1]), rows_of(parts[1]), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "heads": 3,
        "dropout": 0.1,
        "lora": {"rank": 2},
        "soft_labels": True,
        "checkpoint_every_steps": 1,
    }
    whole = run(job(tmp_path / "a", base, **settings))
    stopping = job(tmp_path / "b", base, **settings)
    calls = []

    def stop(accelerator: Any, out: Out, save: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            save()
            raise Stopped("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(reward_training, "stop_if_asked", stop)
        with pytest.raises(Stopped):
            run(stopping)
    resumed = run(stopping)
    assert resumed[1].resumed_from == 3
    assert resumed[0] == whole[0]
    assert rows_of(resumed[1]) == rows_of(whole[1])
    assert bytes_of(resumed[1]) == bytes_of(whole[1])


def test_adapters_are_published_merged_and_apart(tmp_path: Path, base: Path) -> None:
    _, out = run(job(tmp_path, base, lora={"rank": 4, "alpha": 8}))
    files = bytes_of(out)
    assert {f"adapter/{n}" for n in ("adapter.json", "adapter_config.json")} <= files.keys()
    text = b"".join(data for name, data in files.items() if name.endswith(".json"))
    for word in (str(tmp_path), str(base), "peft_version", "/"):
        assert word.encode() not in files["adapter/adapter_config.json"], word
    assert str(tmp_path).encode() not in text

    # beside a policy's adapter on one frozen base, with the head, it scores like the merged classifier
    model = load_causal_lm(Input("model", BASE_DIGEST, path=base))
    policy: Any = add_lora(model, LoraSettings(rank=2), "causal")
    policy.load_adapter(out.artifact / "adapter", "value")
    head = load_head(out.artifact)["weight"]
    merged = load_reward_model(Input("reward_model", "sha256:3", path=out.artifact))
    for row in score_rows(base)[:5]:
        tokens = torch.tensor([row])
        hidden = {}
        with torch.no_grad():
            for name in ("default", "value"):
                policy.set_adapter(name)
                read = policy.get_base_model().base_model(input_ids=tokens)
                hidden[name] = read.last_hidden_state[0, -1]
            expected = merged(input_ids=tokens).logits.item()
        assert (hidden["value"] @ head[0]).item() == pytest.approx(expected, abs=1e-5)
        assert not torch.allclose(*hidden.values(), atol=1e-3), "the adapter must do something"

    assert adapter_base(out.artifact) == BASE_DIGEST
    assert adapter_base(base) is None


def test_several_heads_are_published_beside_their_mean(tmp_path: Path, base: Path) -> None:
    metrics, out = run(job(tmp_path, base, heads=4))
    assert 0 < metrics["heldout_disagreement"] < 0.5
    assert -1 <= metrics["disagreement_error_correlation"] <= 1
    model = load_reward_model(Input("reward_model", "sha256:3", path=out.artifact))
    heads = load_heads(out.artifact)
    assert load_file(out.artifact / "heads.safetensors")["weight_HD"].shape == (4, 32)
    torch.testing.assert_close(heads.weight_HD.mean(0), model.score.weight[0])
    tokenizer = load_tokenizer(Input("model", BASE_DIGEST, path=base))
    pad_id = tokenizer.pad_token_id
    groups = [item.group for item in encode_rankings(rankings(6), tokenizer, 64)[0]]
    score_N, spread_N = score_with_uncertainty(GroupScorer(model, pad_id, True), heads, groups)
    raw_N = last_token_scores(
        *backbone_and_head(model), score_rows(base), pad_id, torch.device("cpu")
    )
    normal = json.loads((out.artifact / "reward.json").read_text())
    expected_N = (raw_N - normal["score_mean"]) / normal["score_std"]
    torch.testing.assert_close(score_N, expected_N, atol=1e-4, rtol=1e-4)
    assert (spread_N > 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "plackett_luce", "centering": 0.01},
        {"soft_labels": True, "label_smoothing": 0.05, "margin": 0.1},
        {"off_prompt": 0.5},
    ],
)
def test_other_losses_learn_the_order_too(
    tmp_path: Path, base: Path, settings: dict[str, Any]
) -> None:
    metrics, _ = run(job(tmp_path, base, epochs=6, **settings))
    assert metrics["heldout_accuracy"] > 0.8


def test_rankings_that_no_other_prompt_fits_are_counted_across_a_stop(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a prompt of most rankings, which is therefore often drawn for itself
    rows = [
        replace(r, messages=rankings(1)[0].messages) if r.split == "train" and n % 3 else r
        for n, r in enumerate(rankings(40))
    ]
    own = {"off_prompt": 0.5, "epochs": 2, "prompts_per_step": 4, "checkpoint_every_steps": 1}
    counted: list[int] = []
    real = reward_training.OtherPrompts.groups

    def count(self: reward_training.OtherPrompts, order: list[int], step: int) -> list[PromptGroup]:
        groups = real(self, order, step)
        counted.append(sum(group.responses == [] for group in groups))
        return groups

    monkeypatch.setattr(reward_training.OtherPrompts, "groups", count)
    _, whole = run(job(tmp_path / "whole", base, rows, **own))
    assert whole.derived["off_prompt_skipped"] == sum(counted) > 0
    assert f"reward.off_prompt: left out {sum(counted)} of 64 times" in capsys.readouterr().err

    asked = iter([False] * 5 + [True])
    monkeypatch.setattr(worker, "stop_requested", lambda: next(asked, False))
    with pytest.raises(Stopped):
        run(job(tmp_path / "run", base, rows, **own))
    _, out = run(job(tmp_path / "run", base, rows, **own))
    assert out.resumed_from == 5
    assert out.derived["off_prompt_skipped"] == whole.derived["off_prompt_skipped"]
    # without it nothing is left out
    assert "off_prompt_skipped" not in run(job(tmp_path / "off", base, rows))[1].derived


def test_an_annotator_of_weight_zero_is_left_out_and_one_who_is_unknown_is_named(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, out = run(job(tmp_path, base, annotator_weights={"a0": 0, "a1": 2, "zoe": 1}))
    assert out.derived["train_rankings_dropped"] == {"annotator of weight 0": 16}
    assert metrics["rankings_trained"] == 16
    assert "reward.annotator_weights: no ranking is by zoe" in capsys.readouterr().err


def test_the_weights_that_the_rank_step_found_are_trained_with(tmp_path: Path, base: Path) -> None:
    given = job(tmp_path, base, annotator_weights={"a1": 3.0})
    folder = given.inputs["rankings"].path
    assert folder is not None
    rows = [{"annotator": "a0", "weight": 0.0}, {"annotator": "a1", "weight": 0.5}]
    (folder / "annotators.json").write_text(json.dumps(rows))
    metrics, out = run(given)
    assert out.derived["annotator_weights"] == {"a0": 0.0, "a1": 1.5}
    assert metrics["rankings_trained"] == 16


def test_rankings_without_an_order_are_refused(tmp_path: Path, base: Path) -> None:
    tied = [
        Ranking(r.messages, r.responses, (1, 1, 1, 1), r.annotator, r.split) for r in rankings(10)
    ]
    for soft in (False, True):
        with pytest.raises(StageError, match="no train ranking can be used"):
            run(job(tmp_path, base, tied, soft_labels=soft))


def test_scores_are_normalised_on_as_many_rows_as_asked_for(tmp_path: Path, base: Path) -> None:
    tokenizer = load_tokenizer(Input("model", BASE_DIGEST, path=base))
    inputs = job(tmp_path, base).inputs
    everything = rankings(40)
    sizes = {}
    for count in (2, 50, 1024):
        groups = reward._groups_to_normalise_on(inputs, everything, tokenizer, 64, count)
        sizes[count] = sum(len(group.responses) for group in groups)
    assert sizes == {2: 2, 50: 54, 1024: 160}


@pytest.mark.parametrize("name", ["soft_labels", "label_smoothing", "margin"])
def test_settings_of_pairs_are_refused_for_whole_orders(name: str) -> None:
    value = "true" if name == "soft_labels" else "0.1"
    with pytest.raises(ConfigError, match=f"{name} belongs to loss pairwise, not to plackett_luce"):
        load_settings(RewardSettings, None, ["loss=plackett_luce", f"{name}={value}"])
