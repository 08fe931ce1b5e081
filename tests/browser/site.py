"""A ranking server, a browser, and what a person does with them."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import sqlalchemy as sa
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from labeling_ui import accounts, guard
from labeling_ui.schema import assignments, guidelines, queues, rankings, tasks, users
from labeling_ui.store import Store, insert_new, task_row

ROOT = Path(__file__).parents[2]
PASSWORD = "correct horse"


def program(name):
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing; on Debian: apt install chromium chromium-driver")
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(module, run, port):
    """A server of ours in a process of its own, once it answers."""
    command = [sys.executable, "-m", module, str(run), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz")
            return process
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.25)
    process.kill()
    process.wait()
    pytest.fail("the server does not answer")


class Site:
    """A server over a store of its own. `clear` makes it as new for the next test."""

    def __init__(self, folder):
        self.run = folder
        (folder / "config.yaml").write_text("model: {base: ./m}\n")
        self.store = Store(folder / "labels.db")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None
        self.person()

    def start(self):
        self.process = serve("labeling_ui.server", self.run, self.port)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def person(self, role="annotator"):
        """A new person's name."""
        name = f"person-{secrets.token_hex(4)}"
        full, accounts._SCRYPT = accounts._SCRYPT, (2**4, 8, 1)
        try:
            accounts.add_user(self.store, name, PASSWORD, role)
        finally:
            accounts._SCRYPT = full
        return name

    def clear(self):
        with self.store.write() as tx:
            for table in (rankings, assignments, tasks, queues, guidelines):
                tx.execute(sa.delete(table))

    def ask(self, prompt, responses, priority=0.0, overlap=1):
        """Put a prompt into the queue; without responses it waits for an answer."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        kind = "rank" if responses else "write"
        row = task_row(messages, responses, round=1, origin="t", step=kind, kind=kind)
        queue = {"step": kind, "by": "people", "overlap": overlap, "lease_minutes": 30}
        with self.store.write() as tx:
            insert_new(tx, queues, [{**queue, "open": True}])
            insert_new(tx, tasks, [{**row, "priority": priority}])

    def ask_for_four(self, prompts=1):
        """Prompts 0, 1, ... in this order, each with the responses `say A0` to `say D0`."""
        for i in range(prompts):
            self.ask(f"prompt {i}", [f"say {letter}{i}" for letter in "ABCD"], priority=-i)

    def guide(self, version, text):
        row = {"version": version, "text": text, "created": time.time()}
        with self.store.write() as tx:
            insert_new(tx, guidelines, [row])

    def draft(self):
        """The newest draft in the store."""
        query = sa.select(assignments.c.draft).where(assignments.c.draft.is_not(None))
        with self.store.read() as tx:
            found = tx.execute(query.order_by(assignments.c.draft_revision.desc())).scalar()
        return json.loads(found) if found else None

    def saved(self):
        """The rankings that stand, with what each response got by its text."""
        query = (
            sa.select(rankings, tasks.c.responses)
            .join(tasks, tasks.c.id == rankings.c.task_id)
            .where(rankings.c.superseded_by.is_(None))
            .order_by(rankings.c.created)
        )
        with self.store.read() as tx:
            rows = [dict(row) for row in tx.execute(query).mappings()]
        for row in rows:
            texts = json.loads(row["responses"])
            for column in ("ranks", "marks"):
                row[column] = dict(zip(texts, json.loads(row[column] or "[]"), strict=False))
        return rows

    def end_logins(self):
        with self.store.write() as tx:
            tx.execute(sa.update(users).values(session=users.c.session + 1))


class Page:
    """One browser window."""

    def __init__(self, site):
        self.site = site
        options = webdriver.ChromeOptions()
        options.binary_location = program("chromium")
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        service = webdriver.ChromeService(program("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.run = self.driver.execute_script
        self.resize(1280, 900)

    # ---- the window ------------------------------------------------------------------------

    def resize(self, width, height, mobile=False, scale=1):
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        touch = {"enabled": mobile, "maxTouchPoints": 5}
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", touch)

    def scheme(self, name):
        feature = {"name": "prefers-color-scheme", "value": name}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def sign_in(self, name):
        """Give the browser a login of this person, as /login would."""
        with self.site.store.read() as tx:
            found = accounts.find_user(tx, name)
        value = guard.sign(self.site.store.secret("sessions"), found.id, found.session)
        cookie = {"name": guard.COOKIE, "value": value, "url": self.site.url, "httpOnly": True}
        self.driver.execute_cdp_cmd("Network.setCookie", cookie)

    def open(self, name, path="/ui/"):
        """A page as a person sees it who has just logged in, in a browser that knows nothing."""
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        clear = {"origin": self.site.url, "storageTypes": "local_storage"}
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", clear)
        self.sign_in(name)
        self.driver.get(self.site.url + path)
        self.ready()

    def reload(self):
        self.driver.refresh()
        self.ready()

    def ready(self):
        shown = ".board:not([hidden]), .nothing:not([hidden]) button, .lead-tiles"
        self.until(lambda: self.all(shown))

    def until(self, condition, seconds=60):
        # the page may be drawn again, or come anew, between a look and the next
        moving = (StaleElementReferenceException, NoSuchElementException)
        wait = WebDriverWait(self.driver, seconds, 0.1, ignored_exceptions=moving)
        return wait.until(lambda _: condition())

    # ---- what is on it ---------------------------------------------------------------------

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def seen(self, selector):
        return [element for element in self.all(selector) if element.is_displayed()]

    def tiers(self):
        """The letters on each place: not ranked, 1, 2, ..."""
        script = """return [...document.querySelectorAll('.slot')].map(slot =>
            [...slot.querySelectorAll('.chip')].map(chip => chip.textContent).join(''))"""
        return self.run(script)

    def wait_for(self, tiers):
        self.until(lambda: self.tiers() == tiers)

    def prompt(self):
        return " ".join(element.text for element in self.seen("#prompt .block.text"))

    def text_of(self, letter):
        """What a response says, as it is shown."""
        return self.seen("#cards .card .block.text")["ABCDEFGHI".index(letter)].text

    def said(self):
        return self.find(".said").text

    def wait_saved(self):
        self.until(lambda: self.find(".saved").text == "Saved")

    def notices(self):
        return " ".join(element.text for element in self.seen(".notice"))

    # ---- hands -----------------------------------------------------------------------------

    def press(self, *keys):
        for key in keys:
            for sign in key if key.isascii() and len(key) > 1 else [key]:
                ActionChains(self.driver).send_keys(sign).perform()

    def chord(self, key, with_key=Keys.CONTROL):
        ActionChains(self.driver).key_down(with_key).send_keys(key).key_up(with_key).perform()

    def click(self, selector):
        self.find(selector).click()

    def type(self, selector, text):
        self.find(selector).send_keys(text)

    def drag(self, what, to):
        ActionChains(self.driver).drag_and_drop(what, to).perform()

    def touch_drag(self, what, to):
        box, goal = (self.run("return arguments[0].getBoundingClientRect()", x) for x in (what, to))
        start = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        end = {"x": goal["x"] + goal["width"] - 8, "y": goal["y"] + goal["height"] / 2}
        steps = [
            {axis: start[axis] + (end[axis] - start[axis]) * i / 5 for axis in "xy"}
            for i in range(1, 6)
        ]
        self._touch("touchStart", [start])
        for point in steps:
            self._touch("touchMove", [point])
        self._touch("touchEnd", [])

    def _touch(self, kind, points):
        event = {"type": kind, "touchPoints": points}
        self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", event)

    def requests(self):
        """URLs asked for since the last call, in order."""
        urls = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.append(message["params"]["request"]["url"])
        return urls

    def complaints(self):
        """What the browser logged since the last call, without what Gradio's shell lacks."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if "manifest" not in entry["message"] and "favicon" not in entry["message"]
        ]
