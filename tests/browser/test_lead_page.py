"""The lead's page in a real browser: numbers, a known answer, and hostile text that stays text."""

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

from labeling_ui.accounts import add_user, find_user
from labeling_ui.administration import set_guidelines
from labeling_ui.assignments import claim, submit
from labeling_ui.schema import queues, tasks
from labeling_ui.store import Store, ensure_user, insert_new, task_row

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

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
def base(tmp_path_factory):
    """A running server; every text in its store is hostile, two annotators have ranked all."""
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text("model: {base: ./m}\n")
    store = Store(run / "labels.db")
    rows = [
        task_row([{"role": "user", "content": f"{i} {HOSTILE}"}], [f"{HOSTILE} {j}" for j in range(3)],
                 round=1, origin="t", step="rank")
        for i in range(3)
    ]  # fmt: skip
    queue = {"step": "rank", "by": "people", "overlap": 2, "lease_minutes": 30, "open": True}
    with store.write() as tx:
        insert_new(tx, queues, [queue])
        insert_new(tx, tasks, rows)
        ensure_user(tx, "imported", HOSTILE)
    add_user(store, "lea", "correct horse", role="lead")
    for name in ("ann", "bob"):
        add_user(store, name, "correct horse")
    with store.read() as tx:
        ids = {name: find_user(tx, name).id for name in ("lea", "ann", "bob")}
    set_guidelines(store, ids["lea"], f"**Be fair.** {HOSTILE}")
    for name in ("ann", "bob"):
        while (work := claim(store, ids[name])) is not None:
            marks = [{"flags": ["unsafe"]}, {}, {}]
            form = {"ranks": [1, 2, 3], "comment": HOSTILE, "ideal": HOSTILE, "marks": marks}
            submit(store, ids[name], work.token, form, active_seconds=1.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "labeling_ui.server", str(run), "--port", str(port)]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    process = subprocess.Popen(command, cwd=root)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(url + "/healthz")
            break
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.5)
    else:
        process.kill()
        raise AssertionError("the server did not start in five minutes")
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
    driver.find_element(By.ID, "name").send_keys("lea")
    driver.find_element(By.ID, "password").send_keys("correct horse", Keys.ENTER)
    until(driver, lambda: driver.find_elements(By.CSS_SELECTOR, ".lead-tiles"))
    yield driver
    driver.quit()


def until(driver, condition):
    return WebDriverWait(driver, 120).until(lambda _: condition())


def open_tab(driver, name):
    # on a telephone the tabs that do not fit stand in a menu
    for where in ("button[role=tab]", ".overflow-menu button"):
        for tab in driver.find_elements(By.CSS_SELECTOR, where):
            if tab.get_attribute("textContent").strip() == name:
                driver.execute_script("arguments[0].click()", tab)
                return
    raise AssertionError(f"no tab {name}")


def cells(driver):
    """The cells that can be seen, row by row."""
    driver.execute_script("window.scrollTo(0, 0)")
    found = driver.find_elements(By.CSS_SELECTOR, ".lead-table [role=gridcell]")
    return [cell for cell in found if cell.is_displayed()]


def button(driver, text):
    return next(
        found
        for found in driver.find_elements(By.TAG_NAME, "button")
        if found.is_displayed() and found.text == text
    )


def outside_requests(driver, base):
    urls = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(message["params"]["request"]["url"])
    return {url for url in urls if not url.startswith((base, "data:", "blob:"))}


def test_a_lead_reads_a_prompt_and_makes_it_a_known_answer_and_nothing_hostile_acts(page, base):
    url, store = base
    assert page.current_url == url + "/lead/"
    tiles = page.find_element(By.CSS_SELECTOR, ".lead-tiles").text
    assert "6" in tiles
    assert "100%" in tiles
    for name in TABS:
        open_tab(page, name)
        time.sleep(1)
    open_tab(page, "Prompts & gold")
    for box in page.find_elements(By.CSS_SELECTOR, "input[role=listbox]"):
        if box.is_displayed():
            box.click()
            box.send_keys("with comments", Keys.ENTER)
            break
    until(page, lambda: len(cells(page)) >= 7)
    assert HOSTILE[:30] in " ".join(cell.text for cell in cells(page))
    cells(page)[1].click()
    until(page, lambda: page.find_element(By.ID, "one-prompt").is_displayed())
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "#one-prompt .lead-text code"))
    shown = [
        code.get_attribute("textContent").rstrip("\n")
        for code in page.find_elements(By.CSS_SELECTOR, "#one-prompt .lead-text code")
    ]
    assert sorted(shown[1:]) == [f"{HOSTILE} {j}" for j in range(3)]
    ranks = page.find_element(By.CSS_SELECTOR, "#one-prompt textarea:not([disabled])")
    ranks.send_keys("2 1 3")
    button(page, "Use as a known answer").click()

    def gold():
        with store.read() as tx:
            return tx.execute(sa.select(tasks.c.gold).where(tasks.c.kind == "gold")).scalars().all()

    until(page, gold)
    assert gold() == ["[2,1,3]"]
    # the pictures on Gradio's own buttons are no [onload]
    for tag in ("img", "script", "iframe", "form", "input", "[onload]"):
        for where in (".lead-text", ".lead-table [role=gridcell]", ".lead-dots th"):
            assert not page.find_elements(By.CSS_SELECTOR, f"{where} {tag}"), (where, tag)
    assert page.execute_script("return window.pwned") is None
    assert outside_requests(page, url) == set()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_on_any_tab(page, width, scheme):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.refresh()
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, ".lead-tiles"))
    for name in TABS:
        open_tab(page, name)
        time.sleep(0.7)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width, name
    assert page.execute_script("return document.body.classList.contains('dark')") == (
        scheme == "dark"
    )
