"""The playground without a browser: who is let in, what is drawn of hostile text, what is saved."""

import asyncio
import html.parser
import itertools
import json

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from labeling_ui import guard, playground, playground_chat, playground_inspect, playground_talk
from labeling_ui import playground_heads as heads
from labeling_ui import playground_parts as parts
from labeling_ui import playground_pictures as pictures
from labeling_ui import playground_policy as policies
from labeling_ui.exporting import snapshot
from labeling_ui.forms import Refused
from labeling_ui.playground_models import Models
from labeling_ui.playground_talk import OWN, Answer, Talk, Turn
from labeling_ui.schema import events, queues, tasks
from labeling_ui.store import EXTRA
from pipeline.inventory import Offered
from pipeline.job import Input

LOCAL = "http://127.0.0.1:7861"
HOSTILE = (
    "<script>alert(1)</script>${alert(2)}{{alert(3)}}\\x`<img src=//evil.example onerror=alert(4)>"
    "\u202e\u200b\x00\U000e0041\"'&amp;</p></button><!-- "
)


def offer(*names):
    item = Input("model", "sha256:1", sources=("m",))
    stages = {"sft": "sft", "ppo": "ppo"}
    return [Offered(name, f"{name} {HOSTILE}", item, stages.get(name, "")) for name in names]


@pytest.fixture(scope="module")
def client():
    models = Models(offer("base", "sft", "ppo"), 1, "token")
    return TestClient(playground.create_app(models, None), base_url=LOCAL, follow_redirects=False)


# ---- the door ------------------------------------------------------------------------------


def test_both_pages_open_without_a_login_and_the_first_is_the_one_asked_for(client):
    assert client.get("/healthz").text == "ok\n"
    assert client.get("/").headers["location"] == "/chat/"
    for path in ("/chat/", "/inspect/"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["content-security-policy"] == guard.PAGE_CSP


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", ""])
def test_other_names_and_other_sites_are_refused(client, host):
    assert client.get("/chat/", headers={"host": host}).status_code == 400
    for path in ("/chat/config", "/inspect/gradio_api/queue/join"):
        answer = client.post(path, json={}, headers={"origin": "https://evil.example"})
        assert answer.status_code == 403


def test_nothing_is_uploaded_or_served_from_the_disk(client):
    for page in ("chat", "inspect"):
        answer = client.post(f"/{page}/gradio_api/upload", files={"files": b"x"})
        assert answer.status_code == 403
        for file in ("/etc/passwd", "labels.db", "../config.yaml"):
            found = client.get(f"/{page}/gradio_api/file={file}")
            assert found.status_code in (403, 404)


def test_no_handler_is_public_and_values_of_texts_stand_in_templates_that_only_show_them(client):
    for page in ("chat", "inspect"):
        config = client.get(f"/{page}/config").json()
        assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}
        shown = [part["props"] for part in config["components"] if part["type"] == "html"]
        assert {props["html_template"] for props in shown} == {"${value}"}


# ---- hostile text --------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}


def check_harmless(drawn):
    found = Tags()
    found.feed(drawn)
    assert not found.seen & {"script", "img", "iframe", "a", "form", "object", "link", "meta"}
    assert not [
        name for name in found.attributes if name.startswith("on") or name in ("href", "src")
    ]
    # what Gradio's templates would evaluate, and signs that turn the text around them
    for mark in ("${", "{{", "`", "\\x", "\u202e", "\u200b", "\x00", "\U000e0041", "<!--"):
        assert mark not in drawn, mark


def tok(text=HOSTILE, **more):
    raw = text.encode().hex(" ")
    return {"id": 3, "piece": text, "text": text, "bytes": raw, "special": False, **more}


def attention_of(text):
    row = {"product": 1.0, "scaled": 0.5, "logit": 0.5, "exp": 1.0, "weight": 0.5}
    told = {
        "rows": [row, row, {**row, "logit": None}], "scaling": 0.5, "head_size": 4, "softcap": None,
        "sink": None, "group": 0, "groups": 1, "largest": 0.5, "total": 2.0,
        "query": [1.0, 2.0], "key": [1.0, 2.0], "products": [1.0, -4.0],
    }  # fmt: skip
    return {
        "tokens": [tok(text)] * 3, "layers": 1, "heads": 2, "layer": 0, "head": 1, "at": 1, "to": 0,
        "weights": [[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]], "grid": [[0.5, 0.1]],
        "by_hand": told,
    }  # fmt: skip


ODDS = {
    "rows": [tok(before=0.5, after=0.7, cut=None), tok(before=0.2, after=0.0, cut="top-k")],
    "tokens": [tok()], "follows": 3, "kept": 1, "vocabulary": 9, "cut_mass": 0.2, "rest": 0.3,
    "entropy_before": 1.0, "entropy_after": 0.1,
}  # fmt: skip
LOSSES = {
    "rows": [
        {"loss": None, "rank": None, "guess": None, "guess_prob": None},
        {"loss": 2.0, "rank": 4, "guess": tok(), "guess_prob": 0.4},
    ],
    "tokens": [tok(), tok()], "mean": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0, "uniform": 6.0,
    "total": 2.0,
}  # fmt: skip
POLICY = {
    "tokens": [tok()] * 3, "prompt_tokens": 1, "columns": {"kl": [0.1, 0.2], "k1": [0.1, -0.2]},
    "score": {"raw": 1.0, "normalised": 2.0, "clipped": 2.0, "is_cut": False},
    "absent": {"value": HOSTILE}, "reference": HOSTILE, "critic_update": 3, "other_rewards": 1,
    "kl_coef": 0.1, "gamma": 1.0, "lam": 0.95,
}  # fmt: skip
STAGES = {
    "rows": [
        {"model": "m", "top": [tok(before=0.5)], "entropy": 1.0, "text": HOSTILE, "tokens": 3,
         "ended": True}
    ]
}  # fmt: skip
MERGES = {"token": tok(), "steps": [{"parts": [HOSTILE, "b"], "rank": None}], "why": HOSTILE}


@pytest.mark.parametrize(
    "drawn",
    [
        pictures.tokens([tok(), tok()], 1, MERGES),
        pictures.odds(ODDS, 0),
        pictures.losses(LOSSES),
        pictures.neighbours({"token": tok(), "rows": [tok(cosine=0.4)]}),
        pictures.stages(STAGES, lambda _: HOSTILE),
        pictures.facts(
            {"architecture": HOSTILE, "parameters": 3, "layers": 1, "heads": 1, "kv_heads": 1,
             "hidden_size": 4, "vocabulary": 5, "positions": 6, "tokenizer": "BPE"},
            HOSTILE,
        ),
        heads.attention(attention_of(HOSTILE)),
        heads.attention({**attention_of(HOSTILE), "by_hand": None}),
        policies.policy(POLICY),
        parts.refused(HOSTILE),
        playground_chat._drawn(
            Talk([Turn(HOSTILE, {HOSTILE: Answer([], HOSTILE, 1, 1.0, "failed", HOSTILE)})]),
            Models(offer("base"), 1, "t"),
        ),
    ],
    ids=["tokens", "odds", "losses", "neighbours", "stages", "facts", "heads", "weights", "policy", "refused", "chat"],
)  # fmt: skip
def test_no_text_of_a_model_or_a_person_is_more_than_text(drawn):
    check_harmless(drawn)
    assert "alert" in drawn


def test_what_cannot_be_seen_is_shown():
    assert parts.token(tok(" a\n\tb")) == "&#183;a&#8629;&#8677;b"
    assert "U&#43;202E" in parts.token(tok("\u202e"))
    assert "U&#43;E0041" in parts.shown("\U000e0041")
    assert parts.shown("a\nb") == "a&#10;b"
    assert "e2" in parts.token({**tok("\ufffd"), "bytes": "e2 82"})


def test_what_a_browser_sends_as_a_choice_is_read_with_care():
    place = playground_inspect._Place(at=1, to=2, layer=3, head=4)
    for data in (
        None,
        7,
        {},
        {"pick": "at,x"},
        {"pick": "pair,1"},
        {"pick": ["at", 1]},
        {"pick": "at,-1"},
    ):
        playground_inspect._pick(place, data)
        assert (place.at, place.to, place.layer, place.head) == (1, 2, 3, 4)
    playground_inspect._pick(place, {"pick": "head,0,5"})
    playground_inspect._pick(place, {"pick": "pair,6,2"})
    assert (place.at, place.to, place.layer, place.head) == (6, 2, 0, 5)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["The", " mat", " it", " was"], 2),
        (["<s>", "The", " i", "t", " was", " it", " sof", "t"], 5),
        (["bit", " by", " b", "it"], 3),
        (["so i", "t is"], 1),
        (["a"], 0),
    ],
)
def test_the_page_begins_at_the_last_it(words, place):
    assert playground_inspect._first_place([tok(word) for word in words]) == place


# ---- conversations -------------------------------------------------------------------------


def talk(*turns, state="done"):
    """(prompt, {model: text}) of each turn."""
    made = Talk(sampling={"seed": 3, "temperature": 0.5})
    for prompt, said in turns:
        answers = {
            name: Answer(made.messages_for(name, prompt), text, 4, 1.0, state)
            for name, text in said.items()
        }
        made.turns.append(Turn(prompt, answers))
    return made


def test_each_model_reads_its_own_turns_or_those_of_one_of_them():
    made = talk(("one", {"sft": "S1", "ppo": "P1"}), ("two", {"sft": "S2"}))
    contents = [m["content"] for m in made.messages_for("ppo", "three")]
    assert contents == ["one", "P1", "three"]
    assert [m["content"] for m in made.messages_for("sft", "three")] == [
        "one",
        "S1",
        "two",
        "S2",
        "three",
    ]
    shared = made.messages_for("ppo", "three", "sft")
    assert shared == made.messages_for("sft", "three", OWN)
    assert [m["role"] for m in shared] == ["user", "assistant"] * 2 + ["user"]


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (talk(), "nothing to save"),
        (talk(("p", {"sft": "a"})), "at least two models"),
        (talk(("p", {"sft": "a", "ppo": "a"})), "all the same"),
        (talk(("p", {"sft": "a", "ppo": " "})), "at least two models"),
        (talk(("p", {"sft": "a", "ppo": "b"}), state="writing"), "still writing"),
        (talk(("p", {"sft": "a", "ppo": "b"}), state="stopped"), "at least two models"),
        (talk(("p", {"sft": "a", "ppo": "b"}), ("q", {"sft": "c", "ppo": "d"})), "different conversations"),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked_is_not_saved_and_says_why(made, why):
    with pytest.raises(Refused, match=why):
        made.comparison(str)


def test_stopping_keeps_what_was_written():
    made = talk(("p", {"sft": "a", "ppo": "b"}), state="writing")
    made.turns[0].answers["ppo"].state = "done"
    made.stop()
    assert [answer.state for answer in made.turns[0].answers.values()] == ["stopped", "done"]
    assert made.turns[0].answers["sft"].text == "a"


class SlowModels:
    """Models that write a word at a time and never end; one breaks."""

    def __init__(self):
        self.left = []

    async def stream(self, question, *, model, **given):
        try:
            for number in itertools.count(1):
                if model == "broken":
                    raise ValueError("no JSON")
                yield {"text": "a" * number, "tokens": number, "seconds": 1.0}
                await asyncio.sleep(0.01)
        finally:
            self.left.append(model)


@pytest.mark.parametrize("end", ["stop", "clear"])
def test_who_is_stopped_ends_by_himself_and_the_last_thing_drawn_is_the_truth(end):
    made, models = Talk(), SlowModels()
    turn = playground_chat._begun(made, "p", ["sft", "ppo"], playground_talk.OWN)
    drawn = []

    async def watch():
        async for _ in playground_chat._written(models, turn, 0, {}, 9):
            drawn.append([(a.state, a.text) for t in made.turns for a in t.answers.values()])
            if len(drawn) == 2:
                getattr(made, end)()
                stopped_at.append([a.text for a in turn.answers.values()])

    stopped_at = []
    asyncio.run(asyncio.wait_for(watch(), 30))
    texts = [answer.text for answer in turn.answers.values()]
    assert texts == stopped_at[0]
    assert all(texts)
    assert [answer.state for answer in turn.answers.values()] == ["stopped", "stopped"]
    assert drawn[-1] == ([] if end == "clear" else [("stopped", text) for text in texts])
    assert sorted(models.left) == ["ppo", "sft"]


def test_what_nobody_foresaw_is_a_failed_answer_and_not_one_that_is_written_for_ever(capsys):
    made = Talk()
    turn = playground_chat._begun(made, "p", ["broken"], playground_talk.OWN)

    async def watch():
        return [None async for _ in playground_chat._written(SlowModels(), turn, 0, {}, 9)]

    assert asyncio.run(asyncio.wait_for(watch(), 30))
    assert turn.answers["broken"].state == "failed"
    assert "ValueError: no JSON" in capsys.readouterr().err


# ---- saving --------------------------------------------------------------------------------


def test_a_comparison_becomes_one_task_however_often_it_is_saved(new_store):
    store = new_store()
    made = talk(("Say red", {"sft": "red", "ppo": "red!", "base": "red"}))
    row = made.comparison(lambda name: f"{name}@123")
    assert playground_talk.save(store, row, made.sampling)
    assert not playground_talk.save(store, row, {"seed": 9})
    other = {**row, "responses": row["responses"][::-1]}
    assert not playground_talk.save(store, other, made.sampling)
    with store.read() as tx:
        task = tx.execute(sa.select(tasks)).one()
        queue = tx.execute(sa.select(queues)).one()
        logged = [json.loads(d) for d in tx.execute(sa.select(events.c.detail)).scalars()]
    assert (task.origin, task.step, task.kind, task.active) == ("chat", EXTRA, "rank", True)
    assert (queue.step, queue.by, queue.open) == (EXTRA, "people", True)
    # equal answers are one response of two models
    models = dict(zip(json.loads(task.responses), json.loads(task.models), strict=True))
    assert models == {"red": ["base@123", "sft@123"], "red!": ["ppo@123"]}
    assert json.loads(task.messages) == [{"role": "user", "content": "Say red"}]
    assert [d for d in logged if d.get("origin") == "chat"] == [
        {"step": EXTRA, "tasks": 1, "origin": "chat", "seed": 3, "temperature": 0.5}
    ]
    # nobody has ranked it: no export holds a ranking of it
    assert snapshot(store, 0.0) == []


def test_a_prompt_that_ranking_cannot_show_is_refused_and_leaves_nothing(new_store):
    store = new_store()
    row = talk(("p \ud800", {"sft": "a", "ppo": "b"})).comparison(str)
    with pytest.raises(Refused, match="cannot be ranked"):
        playground_talk.save(store, row, {})
    with store.read() as tx:
        assert tx.execute(sa.select(sa.func.count()).select_from(tasks)).scalar() == 0


# ---- the command ---------------------------------------------------------------------------


def test_what_is_no_model_is_told_before_anything_starts(tmp_path, capsys):
    assert playground.main([str(tmp_path / "nothing")]) == 2
    assert "no such file or directory" in capsys.readouterr().err
    assert playground.main([str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
