"""The playground in a browser: answers stream, seeds repeat, comparisons are saved, pictures are drawn."""

import json
import time

import pytest
import sqlalchemy as sa
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from labeling_ui.schema import tasks
from labeling_ui.store import open_run_store
from tests.browser.checks import is_dark, outside_requests, sticks_out, violations
from tests.browser.site import free_port, serve
from tests.browser.test_hostile import HOSTILE
from tests.tiny_run import make_run

# the first test waits until two processes have loaded their libraries
pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
PROMPT = "Say red 1 please"


class Playground:
    """A playground over a tiny run."""

    def __init__(self, folder):
        self.run = make_run(folder / "run")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process = serve("labeling_ui.playground", self.run.path, port)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Playground(tmp_path_factory.mktemp("playground"))
    yield made
    made.process.kill()
    made.process.wait()


def go(page, path):
    page.driver.get(page.site.url + path)
    ready = ".pg-tok" if path == "/inspect/" else "#prompt textarea"
    page.until(lambda: page.seen(ready))


def write(page, selector, text):
    """A new text in a box."""
    box = page.find(selector)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    if text.isascii() and "\n" not in text:
        box.send_keys(text)
    else:
        page.run(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            box, text,
        )  # fmt: skip


def cards(page):
    """(model, state, text) of every answer."""
    return page.run(
        "return [...document.querySelectorAll('.pg-card[data-model]')].map(c => [c.dataset.model,"
        " c.dataset.state, c.querySelector('.pg-said').textContent])"
    )


def send(page, prompt, count=3):
    """Send a prompt and wait for all answers; those of this turn."""
    before = len(cards(page))
    write(page, "#prompt textarea", prompt)
    page.click("#send")
    page.until(
        lambda: (
            len(cards(page)) == before + count
            and all(state != "writing" for _, state, _ in cards(page))
        )
    )
    return cards(page)[before:]


def tab(page, name):
    page.run("window.scrollTo(0, 0)")
    next(b for b in page.seen("button[role=tab]") if b.text.strip() == name).click()


def saved(server):
    store = open_run_store(server.run.path)
    try:
        with store.read() as tx:
            return tx.execute(sa.select(tasks).where(tasks.c.origin == "chat")).all()
    finally:
        store.close()


# ---- chat ----------------------------------------------------------------------------------


def test_all_models_answer_and_the_same_seed_gives_the_same_text(page):
    go(page, "/chat/")
    first = send(page, PROMPT)
    assert [name for name, _, _ in first] == ["pretrain", "sft", "ppo"]
    assert {state for _, state, _ in first} <= {"done", "cut"}
    assert len({text for _, _, text in first}) == 3
    page.click("#clear")
    page.until(lambda: not cards(page))
    assert send(page, PROMPT) == first
    page.click("#clear")
    page.until(lambda: not cards(page))
    page.find("#sampling button").click()
    page.until(lambda: page.seen("#sampling input[type=number]"))
    label = page.driver.find_element(By.XPATH, "//span[contains(., 'Seed')]/ancestor::label//input")
    label.send_keys(Keys.CONTROL, "a")
    label.send_keys("7", Keys.TAB)
    assert send(page, PROMPT) != first


def test_an_answer_appears_while_it_is_written_and_stops_when_asked(page, server):
    go(page, "/chat/")
    page.until(lambda: page.seen("#prompt textarea"))
    seen = set()
    write(page, "#prompt textarea", PROMPT)
    page.run(
        "window.lengths = new Set(); new MutationObserver(() => { const c ="
        " document.querySelector('.pg-card[data-model=sft] .pg-said');"
        " if (c) window.lengths.add(c.textContent.length); })"
        ".observe(document.querySelector('#board'), {subtree: true, childList: true, characterData: true})"
    )
    page.click("#send")
    page.until(lambda: cards(page))
    page.click("#stop")
    page.until(lambda: all(state != "writing" for _, state, _ in cards(page)))
    stopped = cards(page)
    time.sleep(1)
    assert cards(page) == stopped
    seen = page.run("return [...window.lengths]")
    assert seen
    # and the next prompt is answered as if nothing had been; anew, since two turns only fit into the
    # 64 tokens of these models if stop came early
    page.click("#clear")
    page.until(lambda: not cards(page))
    again = send(page, "Say blue")
    assert {state for _, state, _ in again} <= {"done", "cut"}


def test_a_comparison_is_saved_once_as_a_task_for_people(page, server):
    go(page, "/chat/")
    page.click("#save")
    page.until(lambda: "nothing to save" in page.find("#told").text)
    # the tiny models read 64 tokens: two turns must fit
    page.find("#sampling button").click()
    page.until(lambda: page.seen("#longest input[type=number]"))
    box = page.find("#longest input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("8", Keys.TAB)
    answers = send(page, "Say green 3")
    page.click("#save")
    page.until(lambda: "Saved" in page.find("#told").text)
    page.click("#save")
    page.until(lambda: "already" in page.find("#told").text)
    (task,) = saved(server)
    assert task.step == "extra"
    assert len(json.loads(task.responses)) == len({text for _, _, text in answers})
    assert "@" in task.models
    send(page, "Say two")
    page.click("#save")
    page.until(lambda: "different conversations" in page.find("#told").text)
    assert len(saved(server)) == 1


# ---- inspect -------------------------------------------------------------------------------


def test_the_page_shows_tokens_and_the_chosen_one_is_the_same_in_every_picture(page):
    go(page, "/inspect/")
    before = page.run(
        "const chips = [...document.querySelectorAll('#pic-strip .pg-tok')];"
        "const at = chips.findIndex(x => x.getAttribute('aria-pressed') === 'true');"
        "return chips.slice(0, at + 1).map(x => x.textContent).join('')"
    )
    assert before.endswith("because·it")
    page.until(lambda: "How token" in page.find("#pic-tokens").text)
    strip = page.run(
        "return [...document.querySelectorAll('#pic-strip .pg-tok')].map(x => x.textContent)"
    )
    assert "".join(strip).endswith("The·cat·sat·on·the·mat·because·it·was·soft")
    tab(page, "Attention")
    page.until(lambda: page.seen("#pic-attention .pg-heat"))
    # what is drawn adds up
    below = page.run(
        "return [...document.querySelectorAll('#pic-attention .pg-chips small')].map(x => +x.textContent)"
    )
    assert sum(below) == pytest.approx(100, abs=len(below) / 2)
    before = page.find("#pic-attention .pg-title").text
    page.run("document.querySelectorAll('#pic-attention .pg-head[aria-pressed=false]')[0].click()")
    page.until(lambda: page.find("#pic-attention .pg-title").text != before)
    page.seen("#pic-strip .pg-tok")[3].click()
    page.until(lambda: page.seen("#pic-strip .pg-tok")[3].get_attribute("aria-pressed") == "true")
    page.until(lambda: "The arithmetic" in page.find("#pic-attention").text)
    tab(page, "Surprise")
    page.until(lambda: "Perplexity" in page.find("#pic-losses").text)
    tab(page, "Neighbours")
    page.until(lambda: "Nearest to" in page.find("#pic-neighbours").text)


def test_top_k_cuts_in_the_picture(page):
    go(page, "/inspect/")
    tab(page, "Next token")
    page.until(lambda: "can be drawn" in page.find("#pic-odds").text)
    assert not page.seen("#pic-odds .pg-cut")
    box = page.find("#top-k input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("3", Keys.TAB)
    page.until(lambda: len(page.seen("#pic-odds .pg-cut")) == 17)
    assert "3 of" in page.find("#pic-odds").text
    # key by key: what is half typed is no error
    box = page.find("#top-p input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("0.5", Keys.TAB)
    page.until(lambda: "top-p" in page.find("#pic-odds").text)
    assert not page.seen(".toast-wrap .error")


def test_stages_and_what_ppo_sees_are_drawn(page):
    go(page, "/inspect/")
    tab(page, "Stage by stage")
    page.until(lambda: page.seen("#go-on"))
    page.click("#go-on")
    page.until(lambda: len(page.seen("#pic-stages .pg-card")) == 3)
    tab(page, "What PPO sees")
    page.until(lambda: page.seen("#ppo-go"))
    page.click("#ppo-go")
    page.until(lambda: "update 7" in page.find("#pic-policy").text)
    titles = [x.text for x in page.seen("#pic-policy .pg-title")]
    assert titles == ["KL", "Log ratio", "Reward", "Value", "Advantage"]


def test_hostile_text_runs_nothing_and_loads_nothing(page):
    go(page, "/inspect/")
    page.requests()
    evil = " ".join(HOSTILE)[:600]
    for part in (evil[:40], "${window.pwned=1}{{pwned}}", "<img src=http://198.51.100.7/x>\u202e"):
        write(page, "#text textarea", part)
        page.click("#look")
        page.until(
            lambda part=part: (
                page.run("return document.querySelectorAll('#pic-strip .pg-tok').length") > 3
            )
        )
        for name in ("Tokens", "Next token", "Surprise"):
            tab(page, name)
            time.sleep(0.3)
    go(page, "/chat/")
    send(page, "<img src=http://198.51.100.7/x onerror=window.pwned=2>${pwned}")
    assert page.run("return window.pwned") is None
    assert not [url for url in outside_requests(page) if "198.51.100" in url]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/chat/", "/inspect/"])
def test_the_pages_fit_a_phone_in_both_schemes_and_are_accessible(page, path, scheme):
    page.resize(360, 780, mobile=True)
    page.scheme(scheme)
    go(page, path)
    assert is_dark(page) == (scheme == "dark")
    if path == "/chat/":
        send(page, PROMPT)
    else:
        tab_names = [b.text for b in page.seen("button[role=tab]")]
        assert "Tokens" in tab_names[0]
    assert sticks_out(page) == []
    found = violations(page)
    assert found == []
