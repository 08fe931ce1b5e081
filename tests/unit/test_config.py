"""Reading settings: every problem is one message that names key, place and remedy."""

import pytest

from pipeline.config import load_settings, read_yaml
from pipeline.errors import ConfigError
from pipeline.settings import Settings


def problem(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(Settings, path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_all_problems_are_reported_at_once_each_with_its_place(tmp_path):
    text = "pretrain:\n  data: t.txt\n  stepz: 3\n  lr: fast\nppo:\n  kl_coeff: 1\n"
    message = problem(tmp_path, text, "ppo.updates=0")
    assert message.startswith("4 problems in the configuration:")
    assert "pretrain.stepz: unknown key; did you mean 'pretrain.steps'?  [c.yaml:3]" in message
    assert "pretrain.lr: input should be a valid number" in message
    assert "got 'fast'  [c.yaml:4]" in message
    assert "ppo.kl_coeff: unknown key; did you mean 'ppo.kl_coef'?  [c.yaml:6]" in message
    assert "ppo.updates:" in message
    assert "[command line]" in message


def test_an_unknown_section_on_the_command_line_is_placed_there(tmp_path):
    message = problem(tmp_path, "model: {base: ./m}\n", "0.lr=1")
    assert "0: unknown key  [command line]" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: the configuration is empty"),
        ("# nothing but a comment\n", "c.yaml: the configuration is empty"),
        ("- a\n- b\n", "c.yaml: expected a mapping of settings such as 'ppo:' at the top level"),
        ("just text", "c.yaml: expected a mapping"),
        ("ppo:\n  lr: 1\n  lr: 2\n", "c.yaml:3: key 'ppo.lr' appears twice"),
        ("ppo: {}\nppo: {}\n", "c.yaml:2: key 'ppo' appears twice"),
        ("ppo: !!python/object:os.system {}\n", "c.yaml:1: tags such as"),
        ("run: {name: !env HOME}\n", "c.yaml:1: tags such as '!env' are not allowed"),
        ("ppo: [1,\n", "c.yaml:2: not valid YAML"),
        ("a: &x {b: 1}\nc: *x\n", "c.yaml:2: aliases are not allowed; write the value out"),
        ("1: {a: 2}\n", "unknown key"),
        ("? [a, b]\n: 1\n", "c.yaml:1: a key must be a word"),
    ],
)
def test_what_is_no_configuration_is_refused_in_one_sentence(tmp_path, text, message):
    assert message in problem(tmp_path, text)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"run:\n  name: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_yaml(path)


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.yaml: cannot read the configuration"):
        read_yaml(tmp_path / "gone.yaml")


def test_an_override_without_equals_sign_is_refused_with_an_example(tmp_path):
    message = problem(tmp_path, "pretrain: {data: t}", "ppo.kl_coef")
    assert "command line: 'ppo.kl_coef' is not of the form key=value" in message
    assert "Example: ppo.kl_coef=0.1" in message


def test_an_override_wins_over_the_file_and_says_so(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("pretrain: {data: demo:stories, lr: 1e-2}\n")
    settings = load_settings(Settings, path, ["pretrain.lr=2e-3", "sft.lora.rank=4"])
    assert settings.pretrain.lr == 2e-3
    assert settings.sft.lora.rank == 4


def test_a_line_with_nothing_to_start_from_is_refused(tmp_path):
    message = problem(tmp_path, "run: {name: x}\n")
    assert "there is nothing to start from: set model.base to a model" in message


def test_a_masked_encoder_cannot_feed_sft(tmp_path):
    text = "pretrain: {data: t.txt, objective: masked}\nsft: {data: s.jsonl}\n"
    assert "trains an encoder, which cannot feed sft or sample" in problem(tmp_path, text)
