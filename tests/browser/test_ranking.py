"""Ranking with keys, mouse and touch; ties, undo, submitting."""

import time

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.browser


@pytest.fixture
def work(site, page):
    """Somebody with two prompts of four responses before them."""
    site.ask_for_four(2)
    page.open(site.person())
    return page


def test_nothing_is_ranked_until_a_person_ranks_it(site, work):
    assert work.tiers() == ["ABCD", "", "", "", ""]
    assert work.prompt() == "prompt 0"
    work.press(Keys.ENTER)
    work.until(lambda: "4 responses are not ranked" in work.said())
    work.click(".submit")
    assert work.tiers() == ["ABCD", "", "", "", ""]
    assert site.saved() == []


def test_a_prompt_is_ranked_with_five_keys(site, work):
    texts = {letter: work.text_of(letter) for letter in "ABCD"}
    work.press("2", "1", "3", "3", Keys.ENTER)
    work.until(lambda: work.prompt() == "prompt 1")
    assert work.tiers() == ["ABCD", "", "", "", ""]
    assert "Saved." in work.said()
    [saved] = site.saved()
    assert saved["ranks"] == {texts["A"]: 2, texts["B"]: 1, texts["C"]: 3, texts["D"]: 3}
    assert saved["status"] == "ranked"
    assert len(saved["submission"]) >= 32
    # in the reading order of who hears the page
    assert work.run("return document.activeElement.id") == "prompt"


def test_letters_choose_and_digits_zero_and_undo_place(work):
    work.press("c", "1")
    work.wait_for(["ABD", "C", "", "", ""])
    work.press("2")
    work.wait_for(["AB", "C", "D", "", ""])
    work.press("c", "0")
    work.wait_for(["ABC", "", "D", "", ""])
    work.press("d", Keys.BACKSPACE)
    work.wait_for(["ABCD", "", "", "", ""])
    work.chord("z")
    work.wait_for(["ABC", "", "D", "", ""])
    work.chord("z")
    work.wait_for(["AB", "C", "D", "", ""])
    work.press("9")
    assert "There are 4 ranks" in work.said()
    work.click(".undo")
    work.wait_for(["ABD", "C", "", "", ""])


def test_a_letter_is_dragged_with_the_mouse_from_the_board_and_from_its_card(work):
    slots = work.all(".slot")
    work.drag(work.all(".slot .chip")[2], slots[1])
    work.wait_for(["ABD", "C", "", "", ""])
    work.drag(work.all(".card .letter")[3], slots[1])
    work.wait_for(["AB", "CD", "", "", ""])
    # back, and within one place: nothing else moves
    work.drag(work.find(".slot [data-i='2']"), slots[0])
    work.wait_for(["ABC", "D", "", "", ""])
    work.drag(work.find(".slot [data-i='3']"), slots[1])
    work.wait_for(["ABC", "D", "", "", ""])


def test_a_letter_is_chosen_and_placed_with_clicks(work):
    work.find(".slot [data-i='3']").click()
    work.all(".place")[2].click()
    work.wait_for(["ABC", "", "D", "", ""])
    work.seen("#cards .card .block.text")[1].click()
    work.all(".place")[1].click()
    work.wait_for(["AC", "B", "D", "", ""])


def test_a_letter_is_dragged_with_a_finger(site, page):
    site.ask_for_four()
    page.resize(390, 844, mobile=True)
    page.open(site.person())
    page.touch_drag(page.all(".slot .chip")[1], page.all(".slot")[2])
    page.wait_for(["ACD", "", "B", "", ""])
    page.touch_drag(page.all(".slot .chip")[0], page.all(".slot")[2])
    page.wait_for(["CD", "", "AB", "", ""])
    assert page.run("return window.scrollY") == 0


def test_all_on_one_rank_is_asked_about_once(site, work):
    work.press("1", "1", "1", "1")
    # the second half of a double press does not answer
    ActionChains(work.driver).send_keys(Keys.ENTER, Keys.ENTER).perform()
    work.until(lambda: "All on one rank" in work.said())
    assert site.saved() == []
    assert work.find(".submit").text == "All tied: submit"
    work.press("d", "2")
    assert work.find(".submit").text == "Submit"
    work.press("d", "1", Keys.ENTER)
    work.until(lambda: "All on one rank" in work.said())
    time.sleep(0.6)
    work.press(Keys.ENTER)
    work.until(lambda: work.prompt() == "prompt 1")
    assert set(site.saved()[0]["ranks"].values()) == {1}


def test_many_presses_save_one_ranking(site, work):
    work.press("1234")
    ActionChains(work.driver).send_keys(Keys.ENTER * 4).perform()
    work.until(lambda: work.prompt() == "prompt 1")
    work.press("1234")
    ActionChains(work.driver).double_click(work.find(".submit")).perform()
    work.until(lambda: work.seen(".nothing"))
    assert len(site.saved()) == 2
    assert "You finished 2" in work.find(".nothing").text


def test_a_skip_needs_a_reason(site, work):
    work.press("s")
    work.until(lambda: work.seen(".reasons"))
    work.press(Keys.ESCAPE)
    assert not work.seen(".reasons")
    work.press("s")
    # these digits are reasons now, not ranks
    work.press("2")
    work.until(lambda: work.prompt() == "prompt 1")
    [saved] = site.saved()
    assert (saved["status"], saved["reason"]) == ("skipped", "unclear")
    work.click(".skip")
    work.click("[data-reason=harmful]")
    work.until(lambda: work.seen(".nothing"))


def test_all_bad_needs_no_ranks(site, work):
    work.press("x", Keys.ENTER)
    work.until(lambda: work.prompt() == "prompt 1")
    [saved] = site.saved()
    assert (saved["status"], saved["all_bad"]) == ("all_bad", True)


def test_the_number_of_responses_differs_from_prompt_to_prompt(site, page):
    for place, count in enumerate((2, 9, 3)):
        site.ask(f"{count} of them", [f"{i} of {count}" for i in range(count)], priority=-place)
    page.open(site.person())
    for count in (2, 9, 3):
        page.until(lambda count=count: page.prompt() == f"{count} of them")
        assert page.tiers() == ["ABCDEFGHI"[:count]] + [""] * count
        assert len(page.seen("#cards .card")) == count
        page.press(*[str(i + 1) for i in range(count)])
        page.press(Keys.ENTER)
    page.until(lambda: page.seen(".nothing"))
    assert [len(saved["ranks"]) for saved in site.saved()] == [2, 9, 3]


def test_nothing_fires_while_somebody_writes_or_sets_a_control(site, work):
    work.press("n")
    work.press("a1bs?x")
    assert work.find("#text-comment").get_attribute("value") == "a1bs?x"
    work.chord("z")
    work.press("o", Keys.ENTER, "2")
    assert work.tiers() == ["ABCD", "", "", "", ""]
    assert not work.seen("dialog")
    work.press(Keys.ESCAPE)
    work.press("o", "3", "a")
    assert work.tiers() == ["ABCD", "", "", "", ""]
    assert site.saved() == []
    work.press(Keys.ESCAPE, "1")
    work.wait_for(["BCD", "A", "", "", ""])


def test_help_opens_with_a_key_and_keeps_the_others_from_the_board(work):
    work.press("?")
    work.until(lambda: work.seen("dialog.help"))
    assert "How to rank" in work.find("dialog.help").text
    work.press("1")
    assert work.tiers() == ["ABCD", "", "", "", ""]
    work.press(Keys.ESCAPE)
    work.until(lambda: not work.seen("dialog.help"))
    work.press("1")
    work.wait_for(["BCD", "A", "", "", ""])


def test_everything_is_reached_with_the_tab_key(site, work):
    work.find(".slot [data-i='1']").send_keys(Keys.SPACE)
    assert "Rank of B" in work.said()
    work.press("1")
    work.wait_for(["ACD", "B", "", "", ""])
    # a letter that moved keeps the focus
    assert work.run("return document.activeElement.textContent") == "B"
    assert work.run("return document.activeElement.getAttribute('aria-label')") == (
        "Response B, rank 1"
    )
    reached = set()
    for _ in range(60):
        work.press(Keys.TAB)
        reached.add(work.run("return document.activeElement.textContent.slice(0, 16)"))
    assert {"A", "B", "C", "D", "Submit", "Skip", "Undo", "Guidelines"} - reached <= {"Guidelines"}
    assert "Score, flags" in reached
