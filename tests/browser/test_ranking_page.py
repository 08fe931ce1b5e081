"""The ranking page in a real browser: keys, drag, drafts, and hostile text that stays text."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import sqlalchemy as sa

from labeling_ui.accounts import add_user
from labeling_ui.exporting import snapshot
from labeling_ui.schema import queues, tasks
from labeling_ui.store import Store, insert_new, task_row

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

# 198.51.100.0/24 is reserved for documentation: a request there is always a leak
EVIL = "http://198.51.100.7"
HOSTILE = [
    f"<script>window.pwned=1</script><img src={EVIL}/a.png onerror='window.pwned=2'><b>tag</b>",
    f"${{window.pwned=3}} {{{{constructor.constructor('window.pwned=4')()}}}} \\x \\u{{zz}} ![i]({EVIL}/b.png)",
    f"<form action='{EVIL}/f'><input name=q></form><style>*{{background:url({EVIL}/c)}}</style>"
    f"<iframe src='{EVIL}/i'></iframe><svg onload=window.pwned=5>",
    f"```mermaid\ngraph TD; A-->B\n```\n[x]({EVIL}/d) {EVIL}/e &lt;img src={EVIL}/g&gt; `````",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A running server with two prompts."""
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text("model: {base: ./m}\n")
    store = Store(run / "labels.db")
    rows = [
        task_row([{"role": "user", "content": text}], HOSTILE, round=1, origin="t", step="rank")
        for text in (HOSTILE[0], f"second {HOSTILE[1]}", "third")
    ]
    with store.write() as tx:
        queue = {"step": "rank", "by": "people", "overlap": 1, "lease_minutes": 30, "open": True}
        insert_new(tx, queues, [queue])
        insert_new(tx, tasks, rows)
    add_user(store, "ann", "correct horse")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "labeling_ui.server", str(run), "--port", str(port)]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    process = subprocess.Popen(command, cwd=root)
    url = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(url + "/healthz")
            break
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.5)
    yield url, store
    process.terminate()
    process.wait()


@pytest.fixture
def page(base):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(base[0] + "/login")
    driver.find_element(By.ID, "name").send_keys("ann")
    driver.find_element(By.ID, "password").send_keys("correct horse", Keys.ENTER)
    until(driver, lambda: chips(driver))
    yield driver
    driver.quit()


def until(driver, condition):
    return WebDriverWait(driver, 30).until(lambda _: condition())


def chips(driver):
    return driver.find_elements(By.CSS_SELECTOR, ".board .chip")


def tiers(driver):
    """The letters on each place: not ranked, 1, 2, ..."""
    script = """return [...document.querySelectorAll('.slot')].map(
        slot => [...slot.querySelectorAll('.chip')].map(chip => chip.textContent).join(''))"""
    return driver.execute_script(script)


def press(driver, keys):
    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def outside_requests(driver, base):
    urls = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(message["params"]["request"]["url"])
    return {url for url in urls if not url.startswith((base, "data:", "blob:"))}


def test_nothing_is_ranked_until_a_person_ranks_it(page):
    assert tiers(page) == ["ABCD", "", "", "", ""]
    assert not page.find_element(By.CSS_SELECTOR, ".submit").is_enabled()
    press(page, [Keys.ENTER])
    assert tiers(page) == ["ABCD", "", "", "", ""]


def test_digits_letters_and_undo_place_responses_and_a_reload_keeps_them(page):
    press(page, "21")
    until(page, lambda: tiers(page) == ["CD", "B", "A", "", ""])
    press(page, "d4")
    until(page, lambda: tiers(page) == ["C", "B", "A", "", "D"])
    ActionChains(page).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    until(page, lambda: tiers(page) == ["CD", "B", "A", "", ""])
    time.sleep(1)  # the draft is on its way
    page.refresh()
    until(page, lambda: chips(page))
    assert tiers(page) == ["CD", "B", "A", "", ""]
    press(page, "b0a0")
    until(page, lambda: tiers(page) == ["ABCD", "", "", "", ""])
    time.sleep(1)


def test_a_letter_can_be_dragged_and_placed_by_clicks(page):
    slots = page.find_elements(By.CSS_SELECTOR, ".slot")
    ActionChains(page).drag_and_drop(chips(page)[2], slots[1]).perform()
    until(page, lambda: tiers(page)[1] == "C")
    next(chip for chip in chips(page) if chip.text == "D").click()
    page.find_elements(By.CSS_SELECTOR, ".place")[2].click()
    until(page, lambda: tiers(page)[2] == "D")


def test_hostile_text_is_shown_exactly_and_does_nothing(page, base):
    until(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".card .model-text code")) == 4)
    shown = [
        element.get_attribute("textContent").rstrip("\n")
        for element in page.find_elements(By.CSS_SELECTOR, ".card .model-text code")
    ]
    assert sorted(shown) == sorted(HOSTILE)
    page.find_element(By.CSS_SELECTOR, "input[type=checkbox]").click()
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, ".rendered"))
    time.sleep(1)
    for where in ("#prompt", "#cards"):
        for tag in ("img", "script", "iframe", "form", "a", "style", "b", "input"):
            assert not page.find_elements(By.CSS_SELECTOR, f"{where} .prose {tag}"), (where, tag)
    assert page.execute_script("return window.pwned") is None
    assert outside_requests(page, base[0]) == set()


def test_a_prompt_is_ranked_in_five_keys_and_saved_once(page, base):
    _, store = base
    before = len(snapshot(store, 0.15))
    for digit in "0000":
        press(page, digit)
    press(page, "a1b2c3d3")
    until(page, lambda: tiers(page) == ["", "A", "B", "CD", ""])
    ActionChains(page).send_keys(Keys.ENTER, Keys.ENTER, Keys.ENTER).perform()
    until(page, lambda: tiers(page) == ["ABCD", "", "", "", ""])
    time.sleep(1)
    assert len(snapshot(store, 0.15)) == before + 1
    assert "Saved" in page.find_element(By.ID, "status").text


def test_a_lost_session_is_told(page, base):
    _, store = base
    with store.write() as tx:
        tx.execute(sa.text("UPDATE users SET session = session + 1"))
    press(page, "1")
    bar = until(page, lambda: page.find_elements(By.ID, "lost"))[0]
    assert "logged out" in bar.text


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_the_board_stays_in_sight(page, width, scheme):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.refresh()
    until(page, lambda: chips(page))
    time.sleep(1)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    box = page.execute_script("return document.querySelector('.submit').getBoundingClientRect()")
    assert 0 < box["bottom"] <= 800
    assert page.execute_script("return document.body.classList.contains('dark')") == (
        scheme == "dark"
    )
