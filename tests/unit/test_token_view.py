"""The policy's answers token by token: the text of each, how far it is from sft, what the score was there."""

import pytest
import torch

from pipeline.job import Input
from pipeline.records import Prompt
from stages.answering import Answers
from stages.chat import encode_prompt
from stages.models import load_reward_model, load_tokenizer
from stages.prompts import PromptIds
from stages.rollout import score_all
from stages.token_view import pieces, token_rows
from tests.unit.tiny_policy import conversation, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_pieces_make_the_text_again_and_no_character_is_torn(world):
    tokenizer = load_tokenizer(Input("model", "sha256:0", path=world["base"]))
    ids = tokenizer.encode("a caf\u00e9, \u4f60\u597d!", add_special_tokens=False)
    ids = [*ids, tokenizer.eos_token_id]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in found)
    # a character of several tokens stands at the last of them
    assert "" in found
    assert found[-1] == tokenizer.eos_token
    # what ends inside a character is shown as such
    assert "".join(pieces(tokenizer, ids[:-3])).endswith("\ufffd")


def test_the_numbers_are_those_of_each_prefix(world):
    item = Input("model", "sha256:0", path=world["base"])
    tokenizer = load_tokenizer(item)
    reward = Input(
        "reward_model",
        "sha256:1",
        path=world["reward_model"],
        contract={"score_mean": 0.5, "score_std": 2.0},
    )
    prompts = [
        PromptIds(prompt, encode_prompt(tokenizer, list(prompt.messages)))
        for prompt in (Prompt(conversation(i), "test") for i in range(3))
    ]
    eos = tokenizer.eos_token_id
    # ended; cut; the end alone
    responses = [[5, 6, eos], [7, 8, 9, 10], [eos]]
    said = Answers(["", "", ""], responses, [[-1.0] * 3, [-2.0] * 4, [-0.5]], [True, False, True])
    ref_BR = torch.tensor([[-1.5, -1.0, -3.0, 0.0], [-1.0] * 4, [-0.5, 0.0, 0.0, 0.0]])
    rows = token_rows(prompts, said, ref_BR, tokenizer, reward)
    assert [row["kl"] for row in rows] == [[0.5, 0.0, 2.0], [-1.0] * 4, [0.0]]
    assert [row["prompt"] for row in rows] == [p.prompt.text for p in prompts]
    model = load_reward_model(reward)
    for prompt, response, row in zip(prompts, responses, rows, strict=True):
        # the last is asked as the policy's reward was: with an end token
        prefixes = [response[: n + 1] for n in range(len(response) - 1)]
        prefixes.append(response if response[-1] == eos else [*response, eos])
        raw = [
            score_all(model, [prompt.ids + prefix], tokenizer.pad_token_id, torch.device("cpu"))
            for prefix in prefixes
        ]
        assert row["scores"] == pytest.approx([(float(x) - 0.5) / 2 for x in raw], abs=2e-4)
    assert "scores" not in token_rows(prompts, said, ref_BR, tokenizer, None)[0]
