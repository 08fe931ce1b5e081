"""Shaded tokens: the strength says the figure, hostile text stays text, rows that are torn are left out."""

from pipeline.report import visible
from pipeline.report_tokens import token_views


def test_strength_follows_the_figure_and_the_figure_is_told():
    row = {
        "prompt": "p",
        "tokens": ["a", "b", "<script>", "\u202e"],
        "kl": [0.05, 0.5, -2.0, None],
        "scores": [0.0, 0.05, -0.9, -0.5],
    }
    (found,) = token_views([row], visible).values()
    spans = str(found).split("</span>")
    assert spans[0] == '<span title="log p/q 0.0500 nats; score here 0">a'
    assert spans[1] == '<span class="ku2" title="log p/q 0.500 nats; score here 0.0500">b'
    assert spans[2].startswith('<span class="kd3 sd3"')
    assert spans[2].endswith(">&lt;script&gt;")
    assert spans[3] == '<span class="su2" title="log p/q ? nats; score here \u22120.500">⟨U+202E⟩'


def test_rows_that_are_not_whole_are_left_out():
    rows = [
        {"prompt": "a", "tokens": ["x"], "kl": [1.0, 2.0]},
        {"prompt": "b", "tokens": "x", "kl": [1.0]},
        {"prompt": 1, "tokens": ["x"], "kl": [1.0]},
        {"prompt": "c", "tokens": ["x"], "kl": [1.0], "scores": [1.0, 2.0]},
    ]
    found = token_views(rows, visible)
    assert list(found) == ["c"]
    assert "score" not in found["c"]
