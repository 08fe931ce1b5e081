"""The lead's page over HTTP and by its handlers: annotators are refused everywhere, changes are logged."""

import json

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from labeling_ui import accounts, server
from labeling_ui.dashboard import Dashboard
from labeling_ui.forms import Refused
from labeling_ui.guard import MAX_BODY_BYTES
from labeling_ui.lead import Handlers
from labeling_ui.schema import assignments, events, guidelines, queues, tasks, users
from labeling_ui.store import Store
from tests.label_work import queue_prompts

LOCAL = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(store, server) of a run with one prompt, a lead and an annotator."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("model: {base: ./m}\n")
    store = Store(folder / "labels.db")
    queue_prompts(store, ["p"], ["a", "b"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "_SCRYPT", (2**4, 8, 1))
        patch.setattr(accounts, "_NOBODY", [])
        accounts.add_user(store, "lea", "correct horse", role="lead")
        accounts.add_user(store, "ann", "correct horse")
        yield store, server.create_app(store, folder)


def browser(run, name=None):
    client = TestClient(run[1], base_url=LOCAL, follow_redirects=False)
    if name:
        client.post("/login", data={"name": name, "password": "correct horse"})
    return client


def handler_names(client):
    config = client.get("/lead/config").json()
    return [one["api_name"] for one in config["dependencies"]]


def count_events(store):
    with store.read() as tx:
        return tx.execute(sa.select(sa.func.count()).select_from(events)).scalar_one()


PAGES = (
    "/lead", "/lead/", "/lead/config", "/lead/stats.json", "/lead/info", "/lead/gradio_api/info",
    "/lead/gradio_api/startup-events", "/lead/gradio_api/queue/data?session_hash=x",
    "/lead/gradio_api/file=labels.db", "/lead/theme.css", "/lead/monitoring", "/lead/nothing",
)  # fmt: skip


@pytest.mark.parametrize("path", PAGES)
def test_annotators_and_strangers_get_nothing_of_it(run, path):
    answer = browser(run, "ann").get(path)
    assert answer.status_code == 403
    assert "for leads" in answer.text
    assert 'href="/ui/"' in answer.text
    stranger = browser(run).get(path)
    assert stranger.status_code == (303 if path.strip("/") == "lead" else 401)


def test_no_handler_runs_for_an_annotator_or_a_stranger(run):
    names = handler_names(browser(run, "lea"))
    assert len(names) > 20
    before = count_events(run[0])
    for client, code in ((browser(run), 401), (browser(run, "ann"), 403)):
        for name in names:
            for way in ("run", "call", "api"):
                body = {"data": ["rank", 2, None, 3, 0.1, 0.1], "session_hash": "x"}
                answer = client.post(f"/lead/gradio_api/{way}/{name}", json=body)
                assert answer.status_code == code, (way, name)
        joined = client.post(
            "/lead/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"}
        )
        assert joined.status_code == code
    # the login of ann
    assert count_events(run[0]) == before + 1


def test_without_the_first_door_the_second_holds(run, tmp_path):
    app = server.create_app(run[0], tmp_path)
    app.user_middleware.clear()
    client = TestClient(app, base_url=LOCAL, cookies=dict(browser(run, "ann").cookies))
    assert client.get("/lead/config").status_code == 401
    assert client.post("/lead/gradio_api/run/look", json={"data": []}).status_code == 401
    assert client.get("/lead/stats.json").status_code == 403
    assert client.get("/ui/config").status_code == 200


def handlers(run):
    logins = server.Logins(run[0])
    return Handlers(run[0], logins.user_id, lambda: None, Dashboard(run[0]))


def calls(own, name):
    """Every handler, called by `name` with something that makes sense."""
    with own.store.read() as tx:
        task = tx.execute(sa.select(tasks.c.id)).scalars().first()
    known = '{"prompt":"k","responses":[{"text":"x","rank":1},{"text":"y","rank":2}]}'
    return {
        "overview": lambda: own.overview(name),
        "prompts": lambda: own.prompts(name, "all", ""),
        "prompt": lambda: own.prompt(name, task),
        "audit": lambda: own.audit(name, "", 0, 100),
        "event_kinds": lambda: own.event_kinds(name),
        "people": lambda: own.people(name),
        "steps": lambda: own.steps(name),
        "guidelines": lambda: own.guidelines(name),
        "queue": lambda: own.queue(name, "rank"),
        "change_queue": lambda: own.change_queue(name, "rank", 2, None, 30, 0.1, 0.0),
        "freeze": lambda: own.freeze(name, "rank", False),
        "set_guidelines": lambda: own.set_guidelines(name, "be fair"),
        "pause": lambda: own.pause(name, 2, True),
        "release": lambda: own.release(name, "x"),
        "make_gold": lambda: own.make_gold(name, task, "1 2"),
        "import_gold": lambda: own.import_gold(name, known),
        "retire_gold": lambda: own.retire_gold(name, task, False),
    }


def test_every_handler_looks_up_who_asks(run):
    own = handlers(run)
    methods = {name for name in vars(Handlers) if not name.startswith("_")}
    fields = {"store", "user_id", "on_changed", "dashboard"}
    assert set(calls(own, "ann")) == methods - fields
    before = count_events(run[0])
    for name, call in calls(own, "ann").items():
        with pytest.raises(Refused, match="Only a lead"):
            call()
        assert count_events(run[0]) == before, name
    with pytest.raises(Refused, match="not active"):
        own.overview("nobody")


def test_a_lead_changes_a_queue_and_the_log_says_so(run):
    store, _ = run
    client = browser(run, "lea")
    data = ["rank", 3, None, 45, 0.1, 0.02]
    # a page that was open while the server was restarted sends the same
    answer = client.post("/lead/gradio_api/run/on_save_1", json={"data": data})
    assert answer.status_code == 200, answer.text
    with store.read() as tx:
        row = tx.execute(sa.select(queues)).one()
        query = sa.select(events).where(events.c.kind == "queue settings")
        event = tx.execute(query.order_by(events.c.id.desc())).first()
        lead = tx.execute(sa.select(users.c.id).where(users.c.name == "lea")).scalar_one()
    assert (row.overlap, row.lease_minutes, row.repeat_rate) == (3, 45, 0.02)
    assert event.user_id == lead
    assert json.loads(event.detail)["changes"]["lease_minutes"] == [30, 45]


def test_who_is_a_lead_no_more_is_refused_at_once(run):
    store, _ = run
    client = browser(run, "lea")
    assert client.get("/lead/stats.json").status_code == 200
    change = sa.update(users).where(users.c.name == "lea")
    with store.write() as tx:
        tx.execute(change.values(role="annotator"))
    try:
        assert client.get("/lead/stats.json").status_code == 403
        assert client.post("/lead/gradio_api/run/look", json={"data": []}).status_code == 403
    finally:
        with store.write() as tx:
            tx.execute(change.values(role="lead"))


def test_the_numbers_are_the_ones_of_the_page(run):
    found = browser(run, "lea").get("/lead/stats.json").json()
    (queue,) = found["counts"]["queues"]
    assert (queue["step"], queue["tasks"]) == ("rank", 1)
    assert found["statistics"]["agreement"]["tasks"] == 0
    assert {person["name"] for person in found["counts"]["people"]} == {"ann", "lea"}


def test_everybody_lands_on_their_own_page(run):
    for name, home in (("ann", "/ui/"), ("lea", "/lead/")):
        client = browser(run)
        answer = client.post("/login", data={"name": name, "password": "correct horse"})
        assert answer.headers["location"] == home
        assert client.get("/").headers["location"] == home
        assert client.get(home).status_code == 200
    assert browser(run, "lea").get("/ui/config").status_code == 200


def test_the_page_itself_holds_nothing_of_the_store(run):
    """What a config holds is built once, for everybody: numbers come by the handlers only."""
    told = browser(run, "lea").get("/lead/config").text
    assert '"ann"' not in told
    assert "correct horse" not in told


def test_a_long_text_of_guidelines_fits_through_the_door(run):
    client = browser(run, "lea")
    text = "規" * 20_000
    assert len(text.encode()) < MAX_BODY_BYTES
    answer = client.post("/lead/gradio_api/run/on_save", json={"data": [text]})
    assert answer.status_code == 200, answer.text
    with run[0].read() as tx:
        query = sa.select(guidelines.c.text).order_by(guidelines.c.version.desc())
        assert tx.execute(query).scalars().first() == text


def test_a_browser_may_send_anything(run):
    own = handlers(run)
    for value in (None, "", "x", [], {}, 1.5, float("nan"), -1, True, "1e9"):
        for call in (
            lambda value=value: own.pause("lea", value, True),
            lambda value=value: own.release("lea", value),
            lambda value=value: own.make_gold("lea", value, value),
            lambda value=value: own.retire_gold("lea", value, True),
            lambda value=value: own.queue("lea", value),
            lambda value=value: own.prompt("lea", value),
            lambda value=value: own.change_queue("lea", "rank", value, value, value, value, value),
            lambda value=value: own.audit("lea", "", "x", value),
        ):
            with pytest.raises(Refused) as refused:
                call()
            # Gradio shows refusals as HTML
            assert "<" not in refused.value.message
    with run[0].read() as tx:
        assert tx.execute(sa.select(assignments)).all() == []
