"""The lead's page in a real browser: numbers, a known answer, hostile text that stays text, and
whether everybody can read it."""

import time

import pytest
import sqlalchemy as sa
from selenium.webdriver.common.keys import Keys

from labeling_ui.accounts import find_user
from labeling_ui.administration import set_guidelines
from labeling_ui.assignments import claim
from labeling_ui.schema import tasks
from labeling_ui.store import ensure_user
from labeling_ui.submitting import submit
from tests.browser.checks import is_dark, outside_requests, sticks_out, violations

pytestmark = pytest.mark.browser

# 198.51.100.0/24 is reserved for documentation: a request there is always a leak
EVIL = "http://198.51.100.7"
HOSTILE = (
    f"<script>window.pwned=1</script><img src={EVIL}/a.png onerror='window.pwned=2'>"
    f"${{window.pwned=3}} {{{{constructor.constructor('window.pwned=4')()}}}} \\x ` ![i]({EVIL}/b.png)"
    f"<form action='{EVIL}/f'><input name=q></form><svg onload=window.pwned=5>"
)
TABS = (
    "Overview", "Agreement", "Annotators", "Prompts & gold", "Guidelines & queues", "Audit log",
)  # fmt: skip


@pytest.fixture(scope="module")
def lead(server):
    """A lead, where every text in the store is hostile; two have ranked all, a third is at work."""
    server.clear()
    for i in range(3):
        server.ask(f"{i} {HOSTILE}", [f"{HOSTILE} {j}" for j in range(3)], overlap=3)
    name, *others = server.person("lead"), *(server.person() for _ in range(3))
    with server.store.write() as tx:
        ensure_user(tx, "imported", HOSTILE)
        lead, *annotators = (find_user(tx, one).id for one in (name, *others))
    set_guidelines(server.store, lead, f"**Be fair.** {HOSTILE}")
    for one in annotators[:2]:
        while (work := claim(server.store, one)) is not None:
            marks = [{"flags": ["unsafe"]}, {}, {}]
            form = {"ranks": [1, 2, 3], "comment": HOSTILE, "ideal": HOSTILE, "marks": marks}
            submit(server.store, one, work.token, form, active_seconds=1.0)
    claim(server.store, annotators[2])
    return name


def open_tab(page, name):
    # on a telephone the tabs that do not fit stand in a menu
    for tab in page.all("button[role=tab], .overflow-menu button"):
        if tab.get_attribute("textContent").strip() == name:
            page.run("arguments[0].click()", tab)
            time.sleep(0.7)
            return
    raise AssertionError(f"no tab {name}")


def cells(page):
    """The cells that can be seen, row by row."""
    page.run("window.scrollTo(0, 0)")
    return page.seen(".lead-table [role=gridcell]")


def open_prompt(page):
    """The first prompt with comments, in the tab of prompts."""
    open_tab(page, "Prompts & gold")
    box = page.seen("input[role=combobox]")[0]
    box.click()
    box.send_keys("with comments", Keys.ENTER)

    def chosen():
        # the table may be drawn again at any time
        found = cells(page)
        if len(found) >= 7 and HOSTILE[:30] in found[1].text:
            found[1].click()
        return page.seen("#one-prompt .lead-text code")

    page.until(chosen)


def test_a_lead_reads_a_prompt_and_makes_it_a_known_answer_and_nothing_hostile_acts(
    server, page, lead
):
    page.requests()
    page.open(lead, "/")
    assert page.driver.current_url == server.url + "/lead/"
    tiles = page.find(".lead-tiles").text
    assert "67% of 9 wanted" in tiles
    for name in TABS:
        open_tab(page, name)
    open_prompt(page)
    shown = [
        code.get_attribute("textContent").rstrip("\n")
        for code in page.all("#one-prompt .lead-text code")
    ]
    assert sorted(shown[1:]) == [f"{HOSTILE} {j}" for j in range(3)]
    page.type("#one-prompt textarea:not([disabled])", "2 1 3")
    [make] = [one for one in page.seen("button") if one.text == "Use as a known answer"]
    make.click()

    def gold():
        with server.store.read() as tx:
            return tx.execute(sa.select(tasks.c.gold).where(tasks.c.kind == "gold")).scalars().all()

    page.until(gold)
    assert gold() == ["[2,1,3]"]
    # the pictures on Gradio's own buttons are no [onload]
    for tag in ("img", "script", "iframe", "form", "input", "[onload]"):
        for where in (".lead-text", ".lead-table [role=gridcell]", ".lead-dots th"):
            assert not page.all(f"{where} {tag}"), (where, tag)
    assert page.run("return window.pwned") is None
    assert outside_requests(page) == []


# 360: a small phone
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_nothing_sticks_out_on_any_tab_and_axe_finds_nothing_serious(page, lead, width, scheme):
    page.resize(width, 844, mobile=width < 500)
    page.scheme(scheme)
    page.open(lead, "/lead/")
    assert is_dark(page) == (scheme == "dark")
    for name in TABS:
        open_tab(page, name)
        assert sticks_out(page) == [], name
        assert violations(page) == [], name
    open_prompt(page)
    assert sticks_out(page) == []
    assert violations(page) == []


def test_a_lead_goes_to_the_ranking_page_and_back_and_annotators_see_no_way(server, page, lead):
    page.open(lead, "/lead/")
    page.find(".lead-top a[href='/ui/']").click()
    # the way back is drawn with the first prompt, not while the page is loading
    page.until(lambda: page.seen(".tools a[href='/lead/']"))[0].click()
    page.until(lambda: page.all(".lead-tiles"))
    page.open(server.person())
    assert page.tiers()[0] == "ABC"
    assert not page.all("a[href*=lead]")
