"""What artifacts must agree on."""

import pytest

from pipeline.contract import check_contract, check_contracts
from pipeline.errors import ArtifactError
from pipeline.job import Input

MODEL = {"tokenizer": "sha256:aaaa", "vocab_size": 10, "eos_id": 1, "pad_id": 0, "max_length": 64}


def given(role, step, **changes):
    return Input(role=role, digest="sha256:0", step=step, contract={**MODEL, **changes})


def test_inputs_that_agree_are_accepted_and_lengths_may_differ():
    check_contracts("ppo", [given("model", "sft"), given("reward_model", "reward", max_length=9)])


def test_a_mismatch_is_one_sentence_that_names_both_sides():
    with pytest.raises(ArtifactError) as caught:
        check_contracts(
            "ppo", [given("model", "sft"), given("reward_model", "reward", tokenizer="sha256:bb")]
        )
    assert caught.value.message == (
        "ppo: the reward model (step reward) has tokenizer sha256:bb, but the model (step sft) has"
        " tokenizer sha256:aaaa; they must be the same"
    )
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("key", ["chat_template", "vocab_size", "bos_id", "eos_id"])
def test_every_shared_key_is_compared(key):
    with pytest.raises(ArtifactError, match="they must be the same"):
        check_contracts("ppo", [given("a", "x", **{key: 5}), given("b", "y", **{key: 6})])


def test_what_claims_nothing_agrees_with_everything():
    nothing = Input(role="rankings", digest="sha256:0", step="rank")
    partly = Input(role="samples", digest="sha256:0", contract={"vocab_size": 10, "bos_id": None})
    check_contracts("reward", [nothing, given("model", "sft", bos_id=3), partly])


def test_padding_must_differ_from_the_end_token():
    with pytest.raises(ArtifactError, match=r"the padding token is the end token \(id 1\)"):
        check_contract("sft", {"eos_id": 1, "pad_id": 1})


def test_an_unknown_key_is_a_mistake_of_ours():
    with pytest.raises(ArtifactError, match="unknown contract key vocabulary"):
        check_contract("sft", {"vocabulary": 1})
