"""Best-of-n: which response is given, how far it is from its sampler, and that it is asked once."""

import math

import pytest
import torch

from pipeline.job import Input, Out
from pipeline.records import Prompt
from pipeline.settings import Settings
from stages import answering
from stages.chat import encode_prompt
from stages.common import seed_for, start
from stages.generation import generate
from stages.models import load_causal_lm, load_reward_model, load_tokenizer
from stages.prompts import PromptIds
from tests.unit.tiny_policy import conversation, make_job, make_world


def test_the_first_of_the_highest_scores_is_taken():
    assert answering.best_places([1.0, 3.0, 2.0, 5.0, 5.0, 4.0], 3) == [1, 3]
    assert answering.best_places([0.5, -1.0], 1) == [0, 1]


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_kl_is_that_of_the_best_of_many_equally_likely_responses(n):
    """M responses, all different and equally likely: the k-th best is given with (k^n-(k-1)^n)/M^n."""
    M = 4000
    chances = [(k / M) ** n - ((k - 1) / M) ** n for k in range(1, M + 1)]
    kl = math.fsum(p * math.log(p * M) for p in chances)
    assert kl <= answering.best_of_n_kl(n) + 1e-9
    assert answering.best_of_n_kl(n) == pytest.approx(kl, abs=2e-3)


def test_the_best_by_the_reward_model_is_given_and_never_asked_for_twice(tmp_path, monkeypatch):
    world = make_world(tmp_path / "world")
    job = make_job("grpo", tmp_path / "run", world)
    settings = Settings.model_validate(
        {**job.settings, "evaluate": {"best_of": 3, "max_response_tokens": 6}}
    )
    out = Out(job)
    accelerator = start(settings, out)
    item = Input("model", "sha256:0", path=world["base"])
    tokenizer, model = load_tokenizer(item), load_causal_lm(item)
    reward_model = load_reward_model(Input("r", "sha256:1", path=world["reward_model"]))
    prompts = [
        PromptIds(prompt, encode_prompt(tokenizer, list(prompt.messages)))
        for prompt in (Prompt(conversation(i), "test") for i in range(4))
    ]
    eos = tokenizer.eos_token_id

    def ask():
        return answering.best_of_n(
            settings, "best_of_n", model, reward_model, tokenizer, prompts, accelerator, out
        )

    given = ask()
    written = 0
    for prompt, tokens, text in zip(prompts, given.tokens, given.texts, strict=True):
        scored = []
        for k in range(3):
            seed = seed_for(0, "evaluate", "best_of", prompt.prompt.id, k)
            [one] = generate(
                model, [prompt.ids], [seed], eos_id=eos, pad_id=0, max_response_tokens=6
            )
            ids = prompt.ids + one.tokens + ([] if one.ended else [eos])
            written += len(ids) - len(prompt.ids)
            with torch.no_grad():
                scored.append((reward_model(torch.tensor([ids])).logits.item(), one.tokens))
        assert tokens == max(scored)[1]
        assert text == answering.decode_response(tokenizer, tokens)
    assert out.cost["tokens"] == written
    spent = dict(out.cost)

    monkeypatch.setattr(answering, "generate", None)
    out.cost |= {"tokens": 0, "flops": 0.0}
    assert ask() == given
    assert out.cost == spent
