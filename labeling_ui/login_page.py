"""The login page: plain HTML, no script, light and dark."""

from __future__ import annotations

import html

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>prefline: log in</title>
<style>
:root {{--back: #f6f7f9; --card: #fff; --text: #1c1f24; --soft: #5a6270; --line: #c9ced6; --accent: #ea580c; --bad: #b3261e;}}
@media (prefers-color-scheme: dark) {{
  :root {{--back: #14161a; --card: #1f2228; --text: #eceef1; --soft: #a4acb8; --line: #454b55; --accent: #c2410c; --bad: #ff9a90;}}
}}
* {{box-sizing: border-box;}}
body {{margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 16px;
  background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;}}
form {{width: 100%; max-width: 360px; padding: 28px; background: var(--card); border: 1px solid var(--line); border-radius: 14px;}}
h1 {{margin: 0; font-size: 22px;}}
p {{margin: 2px 0 18px; color: var(--soft);}}
label {{display: block; margin: 12px 0 4px; font-weight: 600; font-size: 14px;}}
input {{width: 100%; padding: 10px 12px; font: inherit; color: inherit; background: var(--back); border: 1px solid var(--line); border-radius: 8px;}}
button {{width: 100%; margin-top: 20px; padding: 11px; font: inherit; font-weight: 600; color: #fff; background: var(--accent); border: 0; border-radius: 8px; cursor: pointer;}}
input:focus-visible, button:focus-visible {{outline: 3px solid var(--accent); outline-offset: 2px;}}
.bad {{margin: 0 0 8px; color: var(--bad); font-weight: 600;}}
</style></head>
<body><form method="post" action="/login">
<h1>prefline</h1><p>Rank responses</p>
{said}
<label for="name">Name</label>
<input id="name" name="name" autocomplete="username" required autofocus maxlength="64">
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required maxlength="1024">
<button type="submit">Log in</button>
</form></body></html>
"""


def login_page(said: str = "") -> str:
    message = f'<p class="bad" role="alert">{html.escape(said)}</p>' if said else ""
    return _PAGE.format(said=message)
