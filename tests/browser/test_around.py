"""What is around the ranking: writing, last answers, guidelines, conversations, ways to look."""

import json

import pytest
import sqlalchemy as sa
from selenium.webdriver.common.keys import Keys

from labeling_ui.schema import rankings

pytestmark = pytest.mark.browser


def test_a_prompt_without_responses_is_answered(site, page):
    site.ask("Write a haiku.", [], priority=1)
    site.ask("Write more.", [])
    page.open(site.person())
    assert page.prompt() == "Write a haiku."
    assert page.find("h1").get_attribute("textContent") == "Write an answer"
    assert not page.seen(".slots")
    assert not page.seen("#cards .card")
    page.chord(Keys.ENTER)
    assert "Write an answer first" in page.said()
    # the field has the focus: what is typed is text
    page.press("a 1 s")
    page.type("#text-ideal", " <b>${1}</b>")
    page.wait_saved()
    page.reload()
    assert page.find("#text-ideal").get_attribute("value") == "a 1 s <b>${1}</b>"
    page.find("#text-ideal").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.prompt() == "Write more.")
    [saved] = site.saved()
    assert (saved["status"], saved["ideal"]) == ("written", "a 1 s <b>${1}</b>")


def test_one_of_the_last_answers_is_changed(site, page):
    site.ask_for_four(3)
    page.open(site.person())
    for i in (1, 2):
        page.press("1", "2", "3", "4", Keys.ENTER)
        page.until(lambda i=i: page.prompt() == f"prompt {i}")
    page.press("2")
    page.wait_saved()
    page.find(".tools button:nth-of-type(3)").click()
    page.until(lambda: len(page.seen(".side.last .answer")) == 2)
    rows = page.seen(".side.last .answer")
    assert [row.text.split("\n")[0] for row in rows] == ["prompt 1", "prompt 0"]
    rows[1].find_element("css selector", "button:not([title])").click()
    page.until(lambda: page.prompt() == "prompt 0")
    assert "You are changing an answer" in page.notices()
    assert page.tiers() == ["", "A", "B", "C", "D"]
    assert not page.seen(".skip")
    assert page.find(".submit").text == "Save the change"
    page.press("d", "1")
    page.reload()
    assert "You are changing an answer" in page.notices()
    page.press(Keys.ENTER)
    # back where it was left
    page.until(lambda: page.prompt() == "prompt 2")
    assert "Changed." in page.said()
    assert not page.notices()
    assert page.tiers() == ["BCD", "", "A", "", ""]
    with site.store.read() as tx:
        rows = tx.execute(sa.select(rankings).order_by(rankings.c.created)).all()
    assert [row.revision for row in rows] == [1, 1, 2]
    assert rows[0].superseded_by == rows[2].id
    assert sorted(json.loads(rows[2].ranks)) == [1, 1, 2, 3]


def test_an_answer_that_was_taken_up_is_left_as_it_was(site, page):
    site.ask_for_four(2)
    page.open(site.person())
    page.press("1", "2", "3", "4", Keys.ENTER)
    page.until(lambda: page.prompt() == "prompt 1")
    before = site.saved()
    page.find(".tools button:nth-of-type(3)").click()
    page.until(lambda: page.seen(".side.last .answer"))
    page.find(".side.last .again button").click()
    page.until(lambda: page.prompt() == "prompt 0")
    page.press("a", "4")
    page.find(".notice.editing button").click()
    page.until(lambda: page.prompt() == "prompt 1")
    assert site.saved() == before


def test_guidelines_open_at_the_side_and_their_changes_are_told(site, page):
    site.ask_for_four(2)
    site.guide(1, "# Be **fair**")
    me = site.person()
    page.open(me)
    assert "Read the guidelines first" in page.notices()
    page.find(".notice.news button").click()
    page.until(lambda: page.seen(".side.guide"))
    assert page.find(".side.guide h2").text == "Guidelines, version 1"
    assert page.find(".side.guide h1").text == "Be fair"
    assert not page.notices()
    page.press(Keys.ESCAPE)
    assert not page.seen(".side.guide")
    page.press("1", "2", "3", "4")
    page.find(".tools button:nth-of-type(2)").click()
    # the keys belong to the ranking again: Enter submits, and does not press the button
    page.press(Keys.ESCAPE, Keys.ENTER)
    page.until(lambda: page.prompt() == "prompt 1")
    assert not page.seen(".side.guide")
    assert not page.notices()
    site.guide(2, "be *quick*")
    page.reload()
    assert "changed since your last answer (now version 2)" in page.notices()
    page.find(".tools button:nth-of-type(2)").click()
    page.until(lambda: "be quick" in page.find(".side.guide").text)
    assert not page.notices()


def test_earlier_turns_of_a_long_conversation_are_closed(site, page):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": f"turn {i} " + "word " * 90} for i in range(9)]
    site.ask(messages, ["x", "y"])
    page.open(site.person())
    heads = page.seen(".turn-head")
    assert [head.text for head in heads] == ["2 earlier turns", *["User", "Assistant"] * 3, "User"]
    closed = [head.get_attribute("aria-expanded") == "false" for head in heads]
    assert closed == [True] * 7 + [False]
    texts = page.seen("#prompt .block.text")
    assert all(text.size["height"] < 40 for text in texts[:-1])
    assert texts[-1].size["height"] > 40
    heads[-2].click()
    assert texts[-2].size["height"] > 40


def test_each_response_and_all_of_them_are_shown_as_text_or_markdown(site, page):
    site.ask("a *b*", ["one **bold**", "two **bold**"])
    page.open(site.person())
    assert page.text_of("A").endswith("**bold**")
    page.find(".card:nth-of-type(1) [aria-label='A as Markdown']").click()
    assert [page.text_of(letter)[4:] for letter in "AB"] == ["bold", "**bold**"]
    page.press("m")
    assert [page.text_of(letter)[4:] for letter in "AB"] == ["bold", "bold"]
    assert page.prompt() == "a b"
    # the choice is remembered
    page.reload()
    assert page.prompt() == "a b"
    page.press("m")
    assert page.prompt() == "a *b*"


def test_who_waits_is_told_and_can_look_again(site, page):
    page.open(site.person())
    assert "All done" in page.find(".nothing").text
    site.ask_for_four()
    page.find(".nothing button").click()
    page.until(lambda: page.prompt() == "prompt 0")


def test_a_server_that_fails_leaves_no_empty_page(site, page):
    site.ask_for_four()
    rename = "ALTER TABLE {} RENAME TO {}"
    with site.store.write() as tx:
        tx.exec_driver_sql(rename.format("guidelines", "away"))
    try:
        page.open(site.person())
        assert "The server did not send a prompt" in page.find(".nothing").text
    finally:
        with site.store.write() as tx:
            tx.exec_driver_sql(rename.format("away", "guidelines"))
    page.find(".nothing button").click()
    page.until(lambda: page.prompt() == "prompt 0")
    assert not page.seen(".nothing")


def test_progress_is_ones_own(site, page):
    site.ask_for_four(3)
    page.open(site.person())
    assert page.find(".counted").text == "0 done, 3 left"
    page.press("1", "2", "3", "4", Keys.ENTER)
    page.until(lambda: page.find(".counted").text == "1 done, 2 left")
    assert page.find("progress").get_attribute("value") == "1"
