"""The models behind HTTP: who is answered, that people do not mix, and PPO's numbers by hand."""

import concurrent.futures
import http.client
import json
import math
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from pipeline import inventory, launch
from pipeline.job import Input
from stages import questions
from stages.common import seed_for
from stages.generation import generate
from stages.loaded import Models
from stages.models import (
    backbone_and_head,
    decode_response,
    encode_prompt,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
)
from stages.probe_policy import Absent
from stages.serve import Server
from tests.tiny_run import MEAN, PPO, STD, make_run

PROMPT = "Say red 1 please"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def offered(run):
    return inventory.of_run(run)


@pytest.fixture(scope="module")
def models(offered):
    return Models(offered)


@pytest.fixture(scope="module")
def server(offered):
    made = Server(offered, "secret")
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def post(server, question, secret="secret", **given):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    try:
        headers = {"authorization": f"Bearer {secret}"}
        connection.request("POST", f"/{question}", json.dumps(given), headers)
        answer = connection.getresponse()
        lines = [json.loads(line) for line in answer.read().splitlines()]
        return answer.status, lines
    finally:
        connection.close()


def say(server, name="sft", messages=MESSAGES, seed=0, max_tokens=20, **shaping):
    status, lines = post(
        server,
        "chat",
        model=name,
        messages=messages,
        shaping=shaping,
        seed=seed,
        max_tokens=max_tokens,
    )
    assert status == 200, lines
    return lines


# ---- what is offered -----------------------------------------------------------------------


def test_every_model_of_a_run_is_offered_with_what_belongs_to_it(run, offered):
    assert [one.name for one in offered] == ["pretrain", "sft", "ppo"]
    policy = offered[2]
    assert policy.reference == "sft"
    assert policy.start.path == run.step_dir("sft", "1" * 64) / "artifact"
    assert policy.reward.contract["score_mean"] == MEAN
    assert policy.version == "ppo@444444444444"
    again = inventory.from_rows(json.loads(inventory.to_json(offered)))
    assert again == offered


def test_a_folder_and_an_unfinished_run_are_told_apart(run, tmp_path):
    folder = run.step_dir("sft", "1" * 64) / "artifact"
    found, none = inventory.of(str(folder))
    assert none is None
    assert found[0].item.sources == (str(folder),)
    assert inventory.of(str(run.path))[1].path == run.path
    with pytest.raises(inventory.ConfigError, match="not a run directory"):
        inventory.of(str(tmp_path))
    with pytest.raises(inventory.ConfigError, match="no such file"):
        inventory.of(str(tmp_path / "nothing"))


def test_prompts_of_the_run_are_offered(run):
    found = inventory.example_prompts(run)
    assert len(found) == 6
    assert all(text.startswith("Say ") for text in found)


# ---- the door ------------------------------------------------------------------------------


def test_without_the_token_nothing_is_answered(server):
    for secret in ("", "wrong", "secrets"):
        assert post(server, "load", secret=secret, model="sft") == (
            401,
            [{"error": "a token is needed"}],
        )
    assert post(server, "load", model="sft")[0] == 200


def test_what_people_can_mend_is_told_and_nothing_else_is_there(server):
    assert post(server, "etc")[0] == 404
    for question, given, said in (
        ("load", {"model": "gpt"}, "there is no model 'gpt'"),
        ("tokens", {"model": "sft", "text": "a " * 400}, "at most 64"),
        ("odds", {"model": "sft", "text": "a", "at": 9, "shaping": {}}, "There is no token 9"),
        ("neighbours", {"model": "sft", "token": -1}, "there is no token"),
        (
            "chat",
            {"model": "sft", "messages": [{"role": "user", "content": "a " * 400}], "seed": 0,
             "shaping": {}, "max_tokens": 5},
            "no room for an answer",
        ),
    ):  # fmt: skip
        status, lines = post(server, question, **given)
        assert status == 422
        assert said in lines[0]["error"]


# ---- talking -------------------------------------------------------------------------------


def test_a_stream_grows_token_by_token_and_ends_as_the_whole(server):
    lines = say(server)
    assert [line["tokens"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["ended"] or len(lines) == 20


def test_the_same_seed_gives_the_text_of_the_sample_step_another_seed_another(server, models):
    loaded = models.model("sft")
    prompt = encode_prompt(loaded.tokenizer, MESSAGES)
    for seed in (0, 5):
        one = generate(
            loaded.model, [prompt], [seed_for(seed, "chat", 1)],
            eos_id=loaded.tokenizer.eos_token_id, pad_id=loaded.tokenizer.pad_token_id,
            max_response_tokens=20, temperature=0.9, top_p=0.8,
        )[0]  # fmt: skip
        found = say(server, seed=seed, temperature=0.9, top_p=0.8)[-1]
        assert found["tokens"] == len(one.tokens)
        assert found["text"] == decode_response(loaded.tokenizer, one.tokens)
        assert found["text"] == say(server, seed=seed, temperature=0.9, top_p=0.8)[-1]["text"]
    assert say(server, seed=1)[-1]["text"] != say(server, seed=2)[-1]["text"]


def test_people_who_talk_at_the_same_time_do_not_mix(server):
    asked = [
        (name, [{"role": "user", "content": f"Say {word}"}], seed)
        for name in ("pretrain", "sft", "ppo")
        for seed, word in enumerate(["red", "blue", "two three"])
    ]
    alone = [say(server, *one, temperature=1.2, top_k=40)[-1]["text"] for one in asked]
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        # somebody looks at attention meanwhile, which changes how the model computes it
        looks = [
            pool.submit(post, server, "attention", model="sft", text=f"Say red {i}", layer=0,
                        head=0, at=1, to=0)
            for i in range(4)
        ]  # fmt: skip
        found = list(
            pool.map(lambda one: say(server, *one, temperature=1.2, top_k=40)[-1]["text"], asked)
        )
    assert found == alone
    assert all(look.result()[0] == 200 for look in looks)


def test_leaving_a_stream_stops_the_model(server):
    calls, left = [], threading.Event()

    def count(*_):
        calls.append(1)
        if len(calls) > 2:
            left.wait(120)

    hook = server.models.model("sft").model.register_forward_pre_hook(count)
    before = set(threading.enumerate())
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    try:
        asked = {"model": "sft", "messages": MESSAGES, "shaping": {}, "seed": 1, "max_tokens": 40}
        connection.request("POST", "/chat", json.dumps(asked), {"authorization": "Bearer secret"})
        answer = connection.getresponse()
        assert json.loads(answer.readline())["tokens"] == 1
        handlers = set(threading.enumerate()) - before
        answer.close()
        connection.close()
        left.set()
        for handler in handlers:
            handler.join(120)
        assert not any(handler.is_alive() for handler in handlers)
        assert len(calls) < 10
    finally:
        left.set()
        hook.remove()


def test_an_answer_stops_at_what_the_model_can_read(server):
    last = say(server, max_tokens=500, repetition_penalty=1.5)[-1]
    assert last["ended"] or (last["full"] and last["prompt_tokens"] + last["tokens"] == 64)


def test_top_k_one_and_temperature_zero_both_take_the_likeliest(server):
    assert say(server, top_k=1)[-1]["text"] == say(server, temperature=0.0)[-1]["text"]


# ---- memory --------------------------------------------------------------------------------


def test_what_was_not_used_for_long_is_let_go_when_there_is_no_room(offered):
    models = Models(offered, limit_bytes=1)
    for name in ("pretrain", "sft", "ppo"):
        models.model(name)
        assert models.names() == [f"model {name}"]
    roomy = Models(offered, limit_bytes=2**40)
    first = roomy.model("sft")
    roomy.reward("sft")
    roomy.reward("ppo")
    assert roomy.model("sft") is first
    assert len(roomy.names()) == 2


def test_models_that_are_asked_for_at_the_same_time_are_all_there(offered):
    for _ in range(5):
        models = Models(offered)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(models.model, 2 * ["pretrain", "sft", "ppo"]))
        assert found[:3] == found[3:]


# ---- what PPO sees -------------------------------------------------------------------------


def by_hand(run, ids, start, critic_values):
    """KL, rewards and advantages with plain loops."""
    folder = run.path
    logprobs = {}
    for name, number in (("sft", "1"), ("ppo", "4")):
        model = load_causal_lm(Input("m", "", path=folder / name / (number * 12) / "artifact"))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double() / PPO["temperature"]
        logprobs[name] = logits.log_softmax(-1)
    spots = range(start - 1, len(ids) - 1)
    k1 = [float(logprobs["ppo"][t, ids[t + 1]] - logprobs["sft"][t, ids[t + 1]]) for t in spots]
    rows = [(logprobs["ppo"][t].tolist(), logprobs["sft"][t].tolist()) for t in spots]
    kl = [sum(math.exp(p) * (p - q) for p, q in zip(*row, strict=True)) for row in rows]
    reward = load_reward_model(Input("r", "", path=folder / "reward" / ("3" * 12) / "artifact"))
    with torch.no_grad():
        backbone, head = backbone_and_head(reward)
        raw = head(backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item()
    score = max(-2.0, min(2.0, (raw - MEAN) / STD))
    rewards = [-PPO["kl_coef"] * x for x in k1]
    rewards[-1] += score
    advantages, after, value_after = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + PPO["gamma"] * value_after - critic_values[t]
        after = advantages[t] = delta + PPO["gamma"] * PPO["lam"] * after
        value_after = critic_values[t]
    return {"k1": k1, "kl": kl, "reward": rewards, "advantage": advantages, "raw": raw}


def check_policy(run, models, critic):
    found = questions.policy(models, "ppo", PROMPT, "green it is")
    tokenizer = load_tokenizer(Input("m", "", path=run.path / "sft" / ("1" * 12) / "artifact"))
    ids = [row["id"] for row in found["tokens"]]
    start = found["prompt_tokens"]
    assert ids[:start] == encode_prompt(tokenizer, MESSAGES)
    assert ids[-1] == tokenizer.eos_token_id
    columns = found["columns"]
    assert columns["value"] == pytest.approx(critic(ids)[start - 1 : -1], abs=1e-4)
    expected = by_hand(run, ids, start, columns["value"])
    for name in ("k1", "kl", "reward", "advantage"):
        assert columns[name] == pytest.approx(expected[name], abs=1e-4), name
    assert found["score"]["raw"] == pytest.approx(expected["raw"], abs=1e-4)
    assert min(columns["kl"]) > 0
    assert found["critic_update"] == 7
    assert found["absent"] == {}


def test_kl_value_reward_and_advantage_are_those_of_plain_loops(run, models):
    saved = load_file(
        run.path / "ppo" / ("4" * 12) / "checkpoints" / "step-00000007" / "value.safetensors"
    )
    reward = load_reward_model(Input("r", "", path=run.path / "reward" / ("3" * 12) / "artifact"))
    backbone, head = backbone_and_head(reward)
    changed = {f"backbone.{k}": v for k, v in backbone.named_parameters()}
    changed |= {f"head.{k}": v for k, v in head.named_parameters()}
    assert changed.keys() == saved.keys()
    assert not torch.equal(changed["head.weight"], saved["head.weight"])
    with torch.no_grad():
        for name, parameter in changed.items():
            parameter.copy_(saved[name])

    def critic(ids):
        with torch.no_grad():
            states = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
            return ((head(states).squeeze(-1) - MEAN) / STD).tolist()

    check_policy(run, models, critic)


def test_a_critic_on_the_policys_trunk_is_read_from_its_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", "gpt2", critic="shared")
    folder = run.path / "ppo" / ("4" * 12) / "checkpoints" / "step-00000007"
    head = load_file(folder / "value.safetensors")
    # the checkpoint's policy is the sft model that PPO began with
    trunk = load_causal_lm(Input("m", "", path=run.path / "sft" / ("1" * 12) / "artifact"))

    def critic(ids):
        with torch.no_grad():
            states = trunk.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            return (states @ head["head.weight"][0] + head["head.bias"]).tolist()

    check_policy(run, Models(inventory.of_run(run)), critic)


def test_what_a_model_does_not_have_is_said_with_its_reason(run, models):
    found = questions.policy(models, "sft", PROMPT, seed=3)
    assert set(found["absent"]) == {"value", "kl"}
    assert found["score"] is not None
    assert set(found["columns"]) == set()
    step = run.path / "ppo" / ("4" * 12) / "checkpoints"
    hidden = step.rename(step.with_name("elsewhere"))
    try:
        with pytest.raises(Absent, match="in no checkpoint any more"):
            Models(list(models.offered.values())).critic("ppo")
    finally:
        hidden.rename(step)


def test_each_stage_says_its_own_next_tokens(models):
    found = questions.stages(
        models, ["pretrain", "sft", "ppo"], "Say red", {"temperature": 0.0}, 0, 5
    )
    for row in found["rows"]:
        loaded = models.model(row["model"])
        ids = loaded.tokenizer("Say red")["input_ids"]
        with torch.no_grad():
            probs = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        expected = probs.topk(5)
        assert [item["id"] for item in row["top"]] == expected.indices.tolist()
        assert [item["before"] for item in row["top"]] == pytest.approx(
            expected.values.tolist(), abs=1e-6
        )
        assert row["tokens"] <= 5
    assert len({row["text"] for row in found["rows"]}) > 1


# ---- the process ---------------------------------------------------------------------------


def test_the_child_answers_and_ends_with_its_parent(offered):
    child = subprocess.Popen(
        [sys.executable, "-m", "stages.serve"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=launch.environment(),
    )  # fmt: skip
    try:
        asked = {"token": "t", "models": json.loads(inventory.to_json(offered))}
        child.stdin.write(json.dumps(asked) + "\n")
        child.stdin.flush()
        port = json.loads(child.stdout.readline())["port"]

        class Where:
            server_port = port

        status, lines = post(Where, "tokens", secret="t", model="ppo", text="Say red")
        assert status == 200
        assert "".join(row["text"] for row in lines[0]["tokens"]).endswith("Say red")
        # what a parent does that ends, however it ends
        child.stdin.close()
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
