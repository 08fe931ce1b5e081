"""What every page is held to: nothing serious for axe, nothing that sticks out."""

from pathlib import Path

import axe_core_python

AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page):
    """What axe calls serious or critical: rule, and the elements."""
    if page.run("return typeof axe") == "undefined":
        page.run(AXE)
    found = page.driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations), done)"
    )
    return [
        (rule["id"], [node["html"][:160] for node in rule["nodes"]])
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]


def sticks_out(page):
    return page.run(
        "const width = document.documentElement.clientWidth;"
        "return document.documentElement.scrollWidth > width ? [...document.querySelectorAll('*')]"
        ".filter(x => x.getBoundingClientRect().right > width + 1).map(x => x.outerHTML.slice(0, 120))"
        ".slice(0, 5).concat(['document']) : []"
    )


def is_dark(page):
    return page.run("return document.body.classList.contains('dark')")


def outside_requests(page):
    """Requests since the last call to anything but the server under test."""
    own = (page.site.url, "data:", "blob:")
    return [url for url in page.requests() if not url.startswith(own)]
