"""The report says what the numbers say, from any part of a run, and hostile text stays text."""

import math
import random
import re
from html.parser import HTMLParser

import pytest

from pipeline.errors import ConfigError
from pipeline.report import big, duration, visible, write_report
from pipeline.report_charts import training_charts
from pipeline.report_data import StepView, chosen_samples
from pipeline.report_plots import number, percent, ticks
from pipeline.settings.rollout import RolloutSettings
from tests.unit.fake_run import CONFIG, HOSTILE, comparisons, make_run


class Page(HTMLParser):
    """Tags and attributes as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("run"))).read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_outside_itself(page):
    fetching = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "background"}
    targets = [value for _, name, value in Page(page).attributes if name in fetching]
    assert targets
    assert all(re.fullmatch(r"#[a-z]+", target) for target in targets)
    # the address of a vLLM server is a setting, shown as text
    shown = page.replace(RolloutSettings().vllm_url, "")
    assert not re.search(r"url\(|@import|https?://", shown)
    assert "default-src 'none'" in page


def test_hostile_text_is_shown_and_never_becomes_markup(page):
    seen = Page(page)
    assert not {"script", "img", "iframe", "object", "link", "form"} & set(seen.tags)
    assert not [name for _, name, _ in seen.attributes if name.startswith("on") or name == "style"]
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page
    assert not re.search("[\x00\x1b\u202a-\u202e\u2066-\u2069]", page)
    assert visible("a\u202eb\x1b") == "a⟨U+202E⟩b⟨U+001B⟩"


@pytest.mark.parametrize(
    ("low", "high", "word", "meaning"),
    [
        (0.7, 0.8, "Yes", "lies above"),
        (0.45, 0.55, "Not shown", "may be chance"),
        (0.2, 0.4, "No", "got worse"),
        (None, None, "Unclear", "Without an interval"),
    ],
)
def test_the_headline_says_what_the_interval_says(tmp_path, low, high, word, meaning):
    page = write_report(make_run(tmp_path, win_rate_low=low, win_rate_high=high)).read_text()
    assert re.search(rf'<h2 class="\w+">{word}</h2>', page)
    assert meaning in page
    assert "in 78.3\u202f% of the cases" in page
    assert "On 300 held-out prompts, the demo’s hidden rubric" in page
    assert (low is None) or f"(95\u202f% interval {percent(low)} to {percent(high)})" in page


@pytest.mark.parametrize(
    "stage", ["tokenizer", "pretrain", "sft", "rank", "reward", "ppo", "evaluate"]
)
def test_an_unfinished_run_has_a_page_that_says_not_yet(tmp_path, stage):
    page = write_report(make_run(tmp_path, stop_after=stage)).read_text()
    assert "Not yet" in page
    assert f"{stage} (partial (update 12 of 42))" in page


def test_damaged_files_and_strange_metrics_do_not_stop_the_page(tmp_path):
    strange = {
        "win_rate_low": HOSTILE,
        "judge": HOSTILE,
        "mean_tokens": [],
        "quality_sft": {HOSTILE: "x"},
        "prompts": None,
    }
    run = make_run(tmp_path, **strange)
    for path in run.glob("*/*/*.jsonl"):
        path.write_bytes(
            b'\xff\xfe{\n[1]\nnull\n{"step": "x", "loss": NaN, "prompt": 5, "winner": {}}\n'
        )
    assert "Unclear" in write_report(run).read_text()
    for path in run.glob("*/*/manifest.json"):
        path.write_text('{"schema": 1, "metrics": 5')
    page = write_report(run).read_text()
    assert "Not yet" in page
    assert "tokenizer (damaged: manifest.json)" in page


def test_a_changed_setting_is_shown_as_stale_with_its_reason(tmp_path):
    run = make_run(tmp_path)
    config = run / "config.yaml"
    config.write_text(re.sub(r"(epochs): 2\b", r"\1: 3", config.read_text()))
    page = write_report(run).read_text()
    assert "reward (stale: reward.epochs 2 -&gt; 3)" in page
    assert "But this result is not current (stale: reward.epochs 2 -&gt; 3)." in page
    assert "78.3\u202f%" in page


def test_two_rounds_and_a_pipeline_without_pretraining_have_their_page(tmp_path):
    two = write_report(
        make_run(tmp_path / "two", config=CONFIG | {"run": {"rounds": 2}})
    ).read_text()
    assert "Round 2" in two
    assert "evaluate-2" in two
    assert two.count('class="winrow"') == 2
    for name in ("m.txt", "r.jsonl"):
        (tmp_path / name).write_text("{}")
    config = {
        "model": {"base": str(tmp_path / "m.txt")},
        "rank": {"data": [str(tmp_path / "r.jsonl")]},
    }
    assert (
        "pretrain</b>" not in write_report(make_run(tmp_path / "short", config=config)).read_text()
    )


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_the_notes_name_what_is_doubtful(tmp_path, page):
    assert (
        "One quality fell: hero, from 0.55 (sft) to 0.53 (policy)" not in page
    )  # 0.02 is within the margin
    assert "PPO was better at update 36 than at its end" in page
    assert "rank left rows out (rows dropped)" in page
    run = make_run(
        tmp_path,
        win_rate_low=0.48,
        mean_tokens=120,
        judge="reward_model",
        judge_accuracy=0.6,
        prompts=40,
    )
    doubtful = write_report(run).read_text()
    for text in (
        "includes 50\u202f%",
        "much longer: 120 tokens",
        "judge is a reward model",
        "Only 40 prompts",
    ):
        assert text in doubtful


def test_samples_are_drawn_by_hash_and_defeats_are_not_hidden():
    rows = list(comparisons(random.Random(1)))
    groups = dict(chosen_samples(rows))
    assert len(groups["Drawn at random"]) == 8
    assert all(row["winner"] == "sft" for row in groups["Where the policy lost most clearly"])
    assert chosen_samples(rows[::-1])[0] == chosen_samples(rows)[0]


def test_numbers_read_well():
    assert [number(v) for v in (0, 0.12345, 1234567, -2.5, math.nan, True, "7")] == [
        "0",
        "0.123",
        "1\u202f234\u202f567",
        "−2.50",
        None,
        None,
        None,
    ]
    assert (duration(9.84), duration(107), duration(3725)) == ("9.8 s", "1 min 47 s", "1 h 2 min")
    assert (big(1_500_000), big(2.5e12, "FLOP"), big(0), big(None)) == (
        "1.5 M",
        "2.5 TFLOP",
        None,
        None,
    )
    assert ticks(0.12, 0.93) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(5, 5)[0] <= 5 <= ticks(5, 5)[-1]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("stage", "row", "captions"),
    [
        (
            "dpo",
            {"loss": 0.6, "rewards/accuracies": 0.7, "rewards/margins": 0.2, "rewards/chosen": 0.1},
            ["dpo: loss", "dpo: accuracy", "dpo: margin", "dpo: implicit reward"],
        ),
        (
            "kto",
            {"loss": 0.4, "kl": 0.1, "heldout_accuracy": 0.6, "rewards/margins": 0.2}
            | {"rewards/chosen": 0.1},
            ["kto: loss", "kto: accuracy", "kto: reference point", "kto: margin", "desirable"],
        ),
        (
            "grpo",
            {"score": 0.1, "kl": 0.3, "reward": 0.0, "equal_groups": 0.2, "entropy": 1.0},
            ["Reward", "KL from the reference", "Prompts that teach nothing", "Entropy"],
        ),
    ],
)
def test_every_way_to_a_policy_has_its_curves(stage, row, captions):
    rows = [{"step": n, **{key: value + n / 10 for key, value in row.items()}} for n in range(1, 9)]
    view = StepView(stage, stage, 1, "done", "done", None, {}, rows)
    drawn = "".join(map(str, training_charts(view)))
    for caption in captions:
        assert caption in drawn
