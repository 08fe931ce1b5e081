"""For everybody: axe finds nothing serious, nothing sticks out, light and dark, small and large."""

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.checks import is_dark, sticks_out, violations

pytestmark = pytest.mark.browser

LONG = "A rather long answer that goes on. " * 20
CODE = (
    "```python\n"
    + "value = some_function(with_many, arguments, and_more)  # "
    + "x" * 120
    + "\n```"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(site, page, scheme):
    turns = [{"role": role, "content": LONG} for role in ("user", "assistant") * 2]
    site.ask([*turns, {"role": "user", "content": "and?"}], [LONG, CODE, "# c", "- d"], priority=2)
    site.ask("Write.", [], priority=1)
    site.guide(1, "# Fair\n\n- one\n- two")
    page.scheme(scheme)
    page.open(site.person())
    assert is_dark(page) == (scheme == "dark")
    assert violations(page) == []
    page.press("m", "1", "o", "5", Keys.ESCAPE, "n", Keys.ESCAPE, "s")
    page.all("#marks-1 .box input")[0].click()
    assert violations(page) == []
    page.press(Keys.ESCAPE, "?")
    page.until(lambda: page.seen("dialog.help"))
    assert violations(page) == []
    page.press(Keys.ESCAPE)
    page.find(".notice.news button").click()
    assert violations(page) == []
    page.press(Keys.ESCAPE, "1", "1", "1", Keys.ENTER)
    page.until(lambda: page.find(".submit").text == "All tied: submit")
    page.press("2", "b", "2", Keys.ENTER)
    page.until(lambda: page.prompt() == "Write.")
    assert violations(page) == []
    page.run("document.activeElement.blur()")
    page.find(".tools button:nth-of-type(3)").click()
    page.until(lambda: page.seen(".side.last .answer"))
    assert violations(page) == []
    page.find(".side.last .again button").click()
    page.until(lambda: "You are changing" in page.notices())
    assert violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_the_login_page(site, page, scheme):
    page.scheme(scheme)
    page.driver.get("about:blank")
    page.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    page.driver.get(site.url + "/login")
    assert violations(page) == []
    page.type("#name", "nobody")
    page.type("#password", "wrong words" + Keys.ENTER)
    page.until(lambda: page.seen("[role=alert]"))
    assert violations(page) == []


def test_a_person_logs_in_with_name_and_password(site, page):
    site.ask_for_four()
    name = site.person()
    page.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    page.driver.get(site.url + "/login")
    page.type("#name", name)
    page.type("#password", "correct horse" + Keys.ENTER)
    page.ready()
    assert page.prompt() == "prompt 0"


# 360: a small phone. 640: 1280 at 200 %. 320: 1280 at 400 %, as WCAG 1.4.10 asks
@pytest.mark.parametrize(("width", "height"), [(320, 640), (360, 740), (640, 450), (1280, 900)])
def test_nothing_sticks_out_at_any_width(site, page, width, height):
    site.ask(
        LONG, [CODE, LONG, "| a | b |\n|---|---|\n| " + "c" * 200 + " | d |", *"456789"], priority=1
    )
    site.ask("Write.", [])
    site.guide(1, CODE)
    page.resize(width, height, mobile=width < 500)
    page.open(site.person())
    for act in ("m", "o", Keys.ESCAPE + "n", Keys.ESCAPE + "s", "?"):
        page.press(*act)
        assert sticks_out(page) == [], act
    page.press(Keys.ESCAPE, Keys.ESCAPE)
    box = page.run("return document.querySelector('.submit').getBoundingClientRect().toJSON()")
    assert 0 < box["top"] < box["bottom"] <= height
    assert 0 <= box["left"] < box["right"] <= width
    # the board leaves room to read
    assert page.find("#board").size["height"] <= height * 0.62
    page.find(".notice.news button").click()
    assert sticks_out(page) == []
    page.press(Keys.ESCAPE, "x", Keys.ENTER)
    page.until(lambda: page.prompt() == "Write.")
    assert sticks_out(page) == []


def test_a_page_with_little_on_it_is_as_wide_as_one_with_much(site, page):
    site.ask("?", ["a", "b"])
    page.open(site.person())
    assert page.find("#cards").size["width"] > 1200
