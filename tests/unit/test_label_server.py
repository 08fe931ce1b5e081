"""The ranking app over HTTP: who gets in, what is refused, and what a browser is told."""

import asyncio
import contextlib
import json
import re
import socket

import httpx
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from labeling_ui import accounts, app, board, display, guard, server
from labeling_ui.database import Unavailable
from labeling_ui.forms import Refused
from labeling_ui.progress import write_progress
from labeling_ui.schema import assignments, guidelines, rankings, tasks, users
from labeling_ui.store import Store, insert_new, task_row
from tests.label_work import queue_prompts

LOCAL = "http://127.0.0.1:7860"
HOSTILE = (
    "<script>alert(1)</script>${alert(2)}{{alert(3)}}\\x<img src=//evil.example onerror=alert(4)>"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with three prompts and two people, and its server."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("model: {base: ./m}\n")
    store = Store(folder / "labels.db")
    prompts = [f"prompt {i} {HOSTILE}" for i in range(3)]
    queue_prompts(store, prompts, [f"{j} {HOSTILE}" for j in range(3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "_SCRYPT", (2**4, 8, 1))
        patch.setattr(accounts, "_NOBODY", [])
        for name in ("alice", "bob"):
            accounts.add_user(store, name, "correct horse")
        yield folder, store, server.create_app(store, folder)


@pytest.fixture
def client(run):
    return TestClient(run[2], base_url=LOCAL, follow_redirects=False)


def log_in(client, name="alice", password="correct horse"):
    return client.post("/login", data={"name": name, "password": password})


# ---- logging in ----------------------------------------------------------------------------


def test_strangers_see_the_login_page_and_nothing_else(client):
    assert client.get("/healthz").text == "ok\n"
    assert client.get("/").headers["location"] == "/login"
    assert client.get("/ui/").headers["location"] == "/login"
    for path in ("/ui/config", "/ui/gradio_api/info", "/ui/gradio_api/file=labels.db"):
        assert client.get(path).status_code in (401, 403), path
    for path in ("/ui/gradio_api/queue/join", "/ui/gradio_api/run/on_submit"):
        assert client.post(path, json={"data": [], "fn_index": 0}).status_code == 401, path
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert client.get(path).status_code == 404, path


def test_the_right_password_opens_and_the_cookie_is_out_of_reach_of_scripts(client):
    answer = log_in(client)
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert client.get("/ui/").status_code == 200
    assert client.get("/ui/config").json()["username"] == "alice"


def test_a_login_behind_tls_is_only_ever_sent_over_tls(run):
    client = TestClient(run[2], base_url="https://127.0.0.1:7860", follow_redirects=False)
    assert "secure" in log_in(client).headers["set-cookie"].lower()


def test_a_login_survives_a_restart(run, client):
    log_in(client)
    folder, _, _ = run
    again = TestClient(
        server.create_app(Store(folder / "labels.db"), folder),
        base_url=LOCAL,
        cookies=client.cookies,
    )
    assert again.get("/ui/config").status_code == 200


def test_logging_out_makes_a_stolen_cookie_worthless(run, client):
    log_in(client)
    stolen = dict(client.cookies)
    assert client.post("/logout").headers["location"] == "/login"
    thief = TestClient(run[2], base_url=LOCAL, cookies=stolen)
    assert thief.get("/ui/config").status_code == 401


def test_wrong_passwords_are_told_so_and_then_stopped(run):
    client = TestClient(run[2], base_url=LOCAL, client=("10.0.0.9", 1))
    codes = [log_in(client, "bob", "wrong").status_code for _ in range(6)]
    assert codes == [401] * 4 + [429] * 2
    assert "Too many failed logins" in log_in(client, "bob", "correct horse").text


def test_the_login_page_shows_no_input_back_and_runs_no_script(client):
    answer = log_in(client, "<script>alert(1)</script>", "x")
    assert "<script" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_forged_and_expired_cookies_are_worthless():
    secret = b"s" * 32
    good = guard.sign(secret, 1, 0, now=1000)
    assert guard.read(secret, good, now=1001) == (1, 0)
    assert guard.read(secret, good, now=1000 + guard.SESSION_SECONDS) is None
    assert guard.read(b"t" * 32, good, now=1001) is None
    for forged in (
        "",
        ".",
        "1.0.99999999999",
        good.replace("1.", "2.", 1),
        good[:-1] + "ä",
        "a.b.c.d",
    ):
        assert guard.read(secret, forged, now=1001) is None


# ---- the door ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:7860", True),
        ("localhost:1234", True),
        ("[::1]:7860", True),
        ("192.168.1.5:7860", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("", False),
        ("[", False),
    ],
)
def test_only_our_own_names_are_answered_to(client, host, allowed):
    status = client.get("/login", headers={"host": host}).status_code
    assert status == (200 if allowed else 400)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999"])
@pytest.mark.parametrize("path", ["/ui/config", "/login", "/ui/gradio_api/queue/join", "/logout"])
def test_requests_from_other_sites_are_refused_whatever_they_do(client, origin, path):
    log_in(client)
    for method in ("GET", "POST"):
        answer = client.request(method, path, headers={"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_a_cross_site_post_without_an_origin_is_refused_by_its_fetch_metadata(client):
    answer = client.post("/login", data={}, headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 403


def test_uploads_and_large_or_unmeasured_bodies_are_refused(client):
    log_in(client)
    assert client.post("/ui/gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert client.post("/login", content=b"x" * (guard.MAX_BODY_BYTES + 1)).status_code == 413
    assert client.post("/login", content=iter([b"x"])).status_code == 411


@pytest.mark.parametrize("path", ["/login", "/healthz", "/ui/", "/ui/config", "/ui/nothing"])
def test_every_answer_carries_the_security_headers(client, path):
    log_in(client)
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "form-action 'self'" in policy
    assert "http:" not in policy
    assert "*" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"


def test_files_of_the_machine_are_not_served(client, run):
    log_in(client)
    for file in ("/etc/passwd", f"{run[0]}/labels.db", "labels.db", "../labels.db"):
        assert client.get(f"/ui/gradio_api/file={file}").status_code in (403, 404)


# ---- the page ------------------------------------------------------------------------------


def test_the_page_knows_no_prompt_before_it_is_claimed_and_asks_nobody_else(client):
    log_in(client)
    page = client.get("/ui/").text
    assert "prompt 0" not in page
    hosts = set(re.findall(r"(?:src|href)=[\"']?https?://([^/\"']+)", page))
    assert hosts <= {"127.0.0.1:7860"}
    config = client.get("/ui/config").json()
    assert config["analytics_enabled"] is False
    assert all(dependency["api_visibility"] == "private" for dependency in config["dependencies"])


def test_passwords_are_checked_one_after_the_other(run, monkeypatch):
    now, most = [], []

    def check(*_):
        now.append(1)
        most.append(len(now))
        accounts.hash_password("a moment's work, in which another thread could come")
        now.pop()

    monkeypatch.setattr(accounts, "_SCRYPT", (2**12, 8, 1))
    monkeypatch.setattr(accounts, "check_login", check)

    async def many():
        transport = httpx.ASGITransport(run[2])
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
            form = {"name": "alice", "password": "correct horse"}
            await asyncio.gather(*(client.post("/login", data=form) for _ in range(8)))

    asyncio.run(many())
    assert most == [1] * 8


@pytest.fixture
def handlers(run):
    """The page's handlers, as for a person with nothing done yet."""
    folder, store, _ = run
    with store.write() as tx:
        tx.execute(sa.delete(rankings))
        tx.execute(sa.delete(assignments))
        tx.execute(sa.update(tasks).values(filled=0))
    logins = server.Logins(store)
    return app.Handlers(store, logins.user_id, lambda: write_progress(folder, store, "rank"))


def filled(view, ranks, **more):
    """What the browser sends when the board was filled in."""
    return {**view.board, **view.board["form"], "ranks": ranks, "do": "submit", **more}


def test_ranking_all_prompts_with_the_handlers_of_the_page(run, handlers):
    folder, _, _ = run
    view = handlers.show("alice")
    assert (view.board["done"], view.board["left"]) == (0, 3)
    for done in (1, 2, 3):
        assert view.board["kind"] == "rank"
        assert view.board["form"]["ranks"] == (None, None, None)
        assert len(view.responses) == 3
        view = handlers.act("alice", filled(view, [1, 2, 2]))
        assert (view.board["said"], view.board["done"]) == ("Saved.", done)
        assert json.loads((folder / "rank-progress.json").read_text()) == {
            "rank": {"have": done, "need": 3, "labels": {"rankings": done, "rows": done}}
        }
    assert (view.board["kind"], view.board["busy"]) == ("none", False)
    assert (view.turns, view.responses) == ([], [])


def test_a_double_submission_is_saved_once_and_does_not_touch_the_next_prompt(handlers):
    first = filled(handlers.show("alice"), [1, 2, 3], submission="press 1")
    following = handlers.act("alice", first)
    again = handlers.act("alice", first)
    assert again.board["said"] == "Already saved."
    assert again.board["token"] == following.board["token"]
    assert again.board["done"] == 1


def test_all_that_was_said_is_stored_with_the_ranking(run, handlers):
    view = handlers.show("alice")
    marks = [
        {"score": 7, "flags": ["unsafe"]},
        {"score": None, "flags": []},
        {"score": 1, "flags": []},
    ]
    said = {"marks": marks, "comment": "${alert(1)} <b>", "confidence": 2, "ideal": "better"}
    handlers.act("alice", filled(view, [3, 1, 1], submission="x", active=0.25, **said))
    with run[1].read() as tx:
        found = tx.execute(sa.select(rankings)).one()
    assert (found.comment, found.confidence, found.ideal) == ("${alert(1)} <b>", 2, "better")
    assert found.submission == "x"
    # never more than has passed
    assert 0 <= found.active_seconds <= 0.25
    texts = [shown.exact for shown in view.responses]
    with run[1].read() as tx:
        row = tx.execute(sa.select(tasks).where(tasks.c.id == found.task_id)).one()
    of_text = dict(
        zip(map(display.exact, json.loads(row.responses)), json.loads(found.marks), strict=True)
    )
    assert [of_text[text]["score"] for text in texts] == [7, None, 1]


def test_a_draft_comes_back_with_the_page(handlers):
    view = handlers.show("alice")
    token = view.board["token"]
    said = {"marks": [{"score": 4}, {}, {}], "comment": "so far", "revision": 1}
    answer = handlers.draft("alice", filled(view, [2, None, None], **said))
    assert (answer["outcome"], answer["revision"], answer["token"]) == ("saved", 1, token)
    again = handlers.show("alice").board
    assert (again["token"], again["revision"]) == (token, 1)
    assert again["form"]["ranks"] == (2, None, None)
    assert again["form"]["comment"] == "so far"
    assert again["form"]["marks"][0]["score"] == 4


def test_a_draft_tells_what_became_of_it(handlers):
    view = handlers.show("alice")
    assert handlers.draft("alice", filled(view, [1, 1, 1], revision=5))["outcome"] == "saved"
    behind = handlers.draft("alice", filled(view, [2, 2, 2], revision=4))
    assert (behind["outcome"], behind["newest"]) == ("behind", 5)
    refused = handlers.draft("alice", filled(view, [2, 2, 99], revision=6))
    assert (refused["outcome"], "from 1 to 3" in refused["said"]) == ("refused", True)
    handlers.act("alice", filled(view, [1, 2, 3]))
    assert handlers.draft("alice", filled(view, [2, 2, 2], revision=7))["outcome"] == "gone"
    stolen = handlers.draft("bob", filled(view, [2, 2, 2], revision=8))
    assert (stolen["outcome"], "not yours" in stolen["said"]) == ("refused", True)


def test_one_of_the_last_answers_is_changed_or_left(run, handlers):
    first = handlers.show("alice")
    second = handlers.act("alice", filled(first, [1, 2, 3], comment="first"))
    [recent] = handlers.recent("alice")
    assert recent.token == first.board["token"]
    # what was begun on the second is kept when the first is taken up
    reopen = filled(second, [3, None, None], do="reopen", target=recent.token, revision=1)
    editing = handlers.act("alice", reopen)
    assert (editing.board["editing"], editing.board["token"]) == (True, recent.token)
    assert editing.board["form"]["ranks"] == (1, 2, 3)
    assert editing.board["form"]["comment"] == "first"
    left = handlers.act("alice", filled(editing, [1, 1, 1], do="leave"))
    assert (left.board["said"], left.board["editing"]) == ("Left as it was.", False)
    assert left.board["form"]["ranks"] == (3, None, None)
    editing = handlers.act("alice", filled(left, [3, None, None], do="reopen", target=recent.token))
    done = handlers.act("alice", filled(editing, [3, 2, 1]))
    assert (done.board["said"], done.board["token"]) == ("Changed.", second.board["token"])
    with run[1].read() as tx:
        stands = tx.execute(sa.select(rankings).where(rankings.c.superseded_by.is_(None))).all()
    assert [row.revision for row in stands] == [2]
    refused = handlers.act("bob", {"do": "reopen", "token": "", "target": recent.token})
    assert "not yours" in refused.board["said"]


def test_a_prompt_without_responses_waits_for_an_answer(run, handlers):
    row = task_row(
        [{"role": "user", "content": "write!"}],
        [],
        round=1,
        origin="t",
        step="rank",
        kind="write",
        priority=9,
    )
    with run[1].write() as tx:
        insert_new(tx, tasks, [row])
    try:
        view = handlers.show("alice")
        assert (view.board["kind"], view.board["form"]["ranks"]) == ("write", ())
        nothing = handlers.act("alice", filled(view, [], ideal=" "))
        assert (nothing.board["refused"], nothing.board["said"]) == (True, "Write an answer first.")
        assert handlers.act("alice", filled(view, [], ideal="done")).board["said"] == "Saved."
    finally:
        with run[1].write() as tx:
            for table in (rankings, assignments):
                tx.execute(sa.delete(table))
            tx.execute(sa.delete(tasks).where(tasks.c.kind == "write"))


def test_guidelines_are_sent_once_and_their_changes_are_told(run, handlers):
    store = run[1]
    view = handlers.show("alice", {"guidelines": 0})
    assert (view.board["guidelines"]["state"], view.guidelines) == ("none", None)
    try:
        with store.write() as tx:
            insert_new(tx, guidelines, [{"version": 1, "text": HOSTILE, "created": 1.0}])
        view = handlers.show("alice")
        assert view.board["guidelines"] == {"version": 1, "state": "first"}
        assert view.guidelines == display.rendered(HOSTILE)
        view = handlers.act("alice", filled(view, [1, 2, 3], guidelines=1))
        assert (view.board["guidelines"]["state"], view.guidelines) == ("known", None)
        with store.write() as tx:
            insert_new(tx, guidelines, [{"version": 2, "text": "two", "created": 2.0}])
        view = handlers.act("alice", {"do": "look", "guidelines": 1})
        assert view.board["guidelines"] == {"version": 2, "state": "changed"}
        assert view.guidelines == "two"
    finally:
        with store.write() as tx:
            tx.execute(sa.delete(guidelines))


def test_a_person_without_work_is_told_that_others_are_still_busy(handlers):
    view = handlers.show("alice")
    for _ in range(2):
        view = handlers.act("alice", filled(view, [1, 1, 1]))
    waiting = handlers.show("bob").board
    assert (waiting["kind"], waiting["busy"]) == ("none", True)


def test_a_skip_moves_on_and_needs_a_reason(handlers):
    view = handlers.show("alice")
    same = handlers.act("alice", filled(view, [None] * 3, do="skip")).board
    assert (same["refused"], same["token"]) == (True, view.board["token"])
    assert "Choose a reason" in same["said"]
    other = handlers.act("alice", filled(view, [None] * 3, do="skip", reason="broken")).board
    assert other["token"] != view.board["token"]


@pytest.mark.parametrize(
    "value",
    [
        None, "x", [], {}, {"token": 5, "ranks": "123", "revision": "x"}, {"do": "submit"},
        {"do": ["submit"], "token": {}}, {"do": "skip", "reason": ["broken"]},
        {"do": "reopen", "target": 3}, {"do": "leave", "token": None}, {"do": "look", "ask": {}},
    ],
)  # fmt: skip
def test_whatever_a_browser_sends_nothing_is_saved(run, handlers, value):
    handlers.show("alice")
    with contextlib.suppress(Refused):
        handlers.draft("alice", value)
    assert handlers.act("alice", value).board["kind"] == "rank"
    with run[1].read() as tx:
        assert tx.execute(sa.select(rankings)).all() == []


def test_a_disabled_person_is_refused_by_every_handler(run, handlers):
    _, store, _ = run
    value = filled(handlers.show("bob"), [1, 2, 3])
    change = sa.update(users).where(users.c.name == "bob")
    with store.write() as tx:
        tx.execute(change.values(active=False))
    for act in (
        lambda: handlers.show("bob"),
        lambda: handlers.draft("bob", value),
        lambda: handlers.act("bob", value),
        lambda: handlers.recent("bob"),
    ):
        with pytest.raises(Refused, match="not active"):
            act()
    with store.write() as tx:
        tx.execute(change.values(active=True))


def test_the_board_never_holds_model_text(handlers):
    value = handlers.show("alice").board
    assert "script" not in json.dumps(value)
    assert value["turns"] == ["User"]
    assert re.fullmatch(r"[\w-]+", value["token"])
    assert board.board_value(None, [])["kind"] == "none"


def test_no_template_of_the_page_shows_a_value(client):
    log_in(client)
    parts = client.get("/ui/config").json()["components"]
    templates = {part["props"]["html_template"] for part in parts if part["type"] == "html"}
    # the one that shows its value has a constant one
    assert templates == {"", '<div class="room"></div>', "${value}"}
    shown = [p["props"] for p in parts if p["props"].get("html_template") == "${value}"]
    assert [props["value"] for props in shown] == [app._LOG_OUT]


# ---- conversations -------------------------------------------------------------------------


def test_a_long_conversation_keeps_its_last_turns_and_puts_the_first_together():
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i}"} for i in range(7)
    ]
    turns = display.turns(messages, most=7)
    assert [turn.role for turn in turns] == ["User", "Assistant"] * 3 + ["User"]
    assert turns[2].exact == display.exact("turn 2")
    turns = display.turns(messages, most=3)
    assert [turn.role for turn in turns] == ["5 earlier turns", "Assistant", "User"]
    assert all(f"turn {i}" in turns[0].exact for i in range(5))
    assert "turn 5" not in turns[0].exact


# ---- hostile text --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "plain", "``` x", "a\n````\nb\n`````", "`" * 50, HOSTILE, "\n\n```\n# x"]
)
def test_exact_text_cannot_leave_its_fence(text):
    opening, *body, closing = display.exact(text).split("\n")
    assert opening == closing
    assert set(opening) == {"`"}
    assert not any(line.strip().startswith(opening) for line in body)
    assert "\n".join(body) == (text or "(empty)")


def test_rendered_text_holds_no_html_image_link_or_diagram():
    evil = (
        HOSTILE
        + "![a](http://x/y.png) [b](http://x) [c]: http://x\n[d][c] <http://x> www.x.com a@b.c\n"
        "```mermaid\ngraph\n```\n~~~ mermaid\n~~~\n&lt;img&gt; &#60;b&#62; </p> <!-- --> <?x?>"
    )
    shown = display.rendered(evil)
    for mark in (
        r"<[A-Za-z/!?]",
        r"!\[",
        r"\][(\[:]",
        r"\w://",
        r"www\.",
        r"\w@\w",
        r"[`~]{3} ?\w",
        r"&(?!amp;)",
    ):
        assert not re.search(mark, shown), mark
    assert "".join(shown.replace("\u2060", "").replace("&amp;", "&")) == evil


def test_characters_that_cannot_be_seen_are_made_visible():
    assert display.visible("a\u202eb\x00c\u200bd\ud800") == "a⟨U+202E⟩b⟨U+0000⟩c⟨U+200B⟩d⟨U+D800⟩"
    assert display.visible("tab\t line\n end\r\n") == "tab\t line\n end\n"


# ---- the command ---------------------------------------------------------------------------


def test_without_an_account_the_server_says_how_to_make_one(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {base: ./m}\n")
    assert server.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "nobody can log in" in said
    assert f"prefline users {tmp_path} add NAME" in said


def test_a_port_that_is_taken_is_told_before_anything_starts(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert server.main([str(run[0]), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_server_on_the_network_also_goes_by_its_public_name():
    assert server.names_of("127.0.0.1", None) == list(server.LOCAL_NAMES)
    assert "rank.example.org" in server.names_of("0.0.0.0", "https://rank.example.org/x")


def test_a_database_that_cannot_serve_is_said_in_plain_words(run, client, monkeypatch):
    _, store, _ = run
    log_in(client)

    def gone():
        raise Unavailable("The label store is busy. Try again in a moment.")

    monkeypatch.setattr(type(store), "read", lambda _: gone())
    monkeypatch.setattr(type(store), "write", lambda _: gone())
    for answer in (client.get("/"), client.get("/ui/"), client.post("/logout"), log_in(client)):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "Try again in a moment" in answer.text
    assert client.get("/healthz").text == "ok\n"
