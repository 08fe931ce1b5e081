"""What was typed and placed is never lost: reload, restart, lost session, no network, two tabs."""

import time

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.site import Page

pytestmark = pytest.mark.browser


@pytest.fixture
def me(site):
    site.ask_for_four(2)
    return site.person()


def offline(page, off):
    page.driver.execute_cdp_cmd("Network.enable", {})
    conditions = {"offline": off, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def test_all_that_was_said_survives_a_reload(site, page, me):
    page.open(me)
    page.press("2", "1")
    page.click("[aria-controls=marks-1]")
    page.click("#marks-1 input[value='6']")
    page.all("#marks-1 .box input")[0].click()
    page.press("n")
    page.type("#text-comment", "a ${b} {{c}} <i>d</i> 'e'")
    page.type("#text-ideal", "like this")
    page.click("input[name=confidence][value='3']")
    page.wait_saved()
    texts = {letter: page.text_of(letter) for letter in "ABCD"}

    page.reload()
    assert page.tiers() == ["CD", "B", "A", "", ""]
    assert page.text_of("B") == texts["B"]
    assert page.all(".card .marks")[1].text == "6 of 7 · ⚑ unsafe"
    assert page.find("#text-comment").get_attribute("value") == "a ${b} {{c}} <i>d</i> 'e'"
    assert page.find("#text-ideal").get_attribute("value") == "like this"
    assert page.find("input[name=confidence][value='3']").is_selected()

    page.press("3", "3", Keys.ENTER)
    page.until(lambda: page.prompt() == "prompt 1")
    [saved] = site.saved()
    assert saved["marks"][texts["B"]] == {"flags": ["unsafe"], "score": 6}
    assert saved["comment"] == "a ${b} {{c}} <i>d</i> 'e'"
    assert (saved["ideal"], saved["confidence"]) == ("like this", 3)
    assert saved["active_seconds"] > 0


def test_what_is_set_can_be_taken_back(site, page, me):
    page.open(me)
    page.press("o", "5")
    page.until(lambda: page.all(".card .marks")[0].text == "5 of 7")
    page.find("#marks-0 .clear").click()
    assert page.all(".card .marks")[0].text == ""
    page.press(Keys.ESCAPE, "x")
    page.chord("z")
    page.until(lambda: not page.find(".all-bad input").is_selected())
    page.wait_saved()
    assert site.draft()["marks"][0]["score"] is None
    assert site.draft()["all_bad"] is False


def test_a_restart_of_the_server_loses_nothing(site, page, me):
    page.open(me)
    page.press("1")
    page.wait_saved()
    site.stop()
    try:
        page.press("2", "n")
        page.type("#text-comment", "while it was away")
        page.until(lambda: "cannot be reached" in page.notices())
    finally:
        site.start()
    # the page comes back by itself
    page.until(lambda: (site.draft() or {}).get("comment") == "while it was away")
    page.until(lambda: not page.seen(".notice"))
    assert page.tiers() == ["CD", "A", "B", "", ""]
    assert page.find("#text-comment").get_attribute("value") == "while it was away"
    page.press(Keys.ESCAPE, "c", "3", "3", Keys.ENTER)
    page.until(lambda: page.prompt() == "prompt 1")
    assert len(site.saved()) == 1


def test_an_answer_pressed_while_the_network_is_away_is_saved_once(site, page, me):
    page.open(me)
    page.press("1234")
    page.wait_saved()
    offline(page, True)
    try:
        page.press(Keys.ENTER)
        page.until(lambda: "Your answer is kept" in page.notices())
        page.press(Keys.ENTER)
    finally:
        offline(page, False)
    page.until(lambda: page.prompt() == "prompt 1")
    page.until(lambda: not page.seen(".notice"))
    assert len(site.saved()) == 1


def test_what_was_typed_without_network_survives_a_reload(site, page, me):
    page.open(me)
    page.press("n")
    offline(page, True)
    try:
        page.type("#text-comment", "typed in a tunnel")
        page.until(lambda: "kept on this device" in page.notices())
        assert page.find(".saved").text == "Not saved"
        page.run("window.stop()")
    finally:
        offline(page, False)
    page.reload()
    page.until(lambda: page.find("#text-comment").get_attribute("value") == "typed in a tunnel")
    page.until(lambda: (site.draft() or {}).get("comment") == "typed in a tunnel")


def test_a_lost_session_is_told_and_logging_in_again_saves_what_waited(site, page, me):
    page.open(me)
    page.press("1")
    page.wait_saved()
    site.end_logins()
    page.press("2")
    page.until(lambda: "You are logged out." in page.notices())
    assert page.seen(".notice a")[0].get_attribute("href") == site.url + "/login"
    assert site.draft()["ranks"].count(None) == 3
    page.sign_in(me)
    page.until(lambda: not page.seen(".notice"))
    page.until(lambda: site.draft()["ranks"].count(None) == 2)


def test_two_tabs_of_one_person_are_told_of_each_other(site, page, me):
    page.open(me)
    page.driver.switch_to.new_window("tab")
    second = page.driver.current_window_handle
    [first] = set(page.driver.window_handles) - {second}
    try:
        page.driver.get(site.url + "/ui/")
        page.ready()
        page.press("a", "2")
        page.wait_saved()
        page.driver.switch_to.window(first)
        page.press("a", "1")
        page.until(lambda: "open in another tab" in page.notices())
        assert site.draft()["ranks"] == [2, None, None, None]
        page.all(".notice.bad button")[1].click()
        page.until(lambda: site.draft()["ranks"] == [1, None, None, None])
        page.press("b", "2", "3", "4", Keys.ENTER)
        page.until(lambda: page.prompt() == "prompt 1")

        page.driver.switch_to.window(second)
        page.press("b", "3")
        page.until(lambda: "finished in another tab" in page.notices())
        page.find(".notice.bad button").click()
        page.until(lambda: page.prompt() == "prompt 1")
        assert len(site.saved()) == 1
    finally:
        page.driver.switch_to.window(second)
        page.driver.close()
        page.driver.switch_to.window(first)


def test_two_people_at_once_get_different_prompts(site, page, me):
    other = Page(site)
    try:
        page.open(me)
        other.open(site.person())
        assert {page.prompt(), other.prompt()} == {"prompt 0", "prompt 1"}
        for window in (page, other):
            window.press("1", "2", "3", "4")
        for window in (page, other):
            window.press(Keys.ENTER)
        for window in (page, other):
            window.until(lambda window=window: window.seen(".nothing"))
        assert len(site.saved()) == 2
        assert len({saved["user_id"] for saved in site.saved()}) == 2
    finally:
        other.driver.quit()


def test_typing_is_sent_after_a_pause_and_not_with_each_letter(site, page, me):
    page.open(me)
    page.press("n")
    page.requests()
    page.type("#text-comment", "twenty letters typed")
    page.wait_saved()
    time.sleep(0.6)
    log = [url for url in page.requests() if "/gradio_api/" in url]
    assert 1 <= len(log) <= 3
    assert site.draft()["comment"] == "twenty letters typed"
