"""What each judge said: the table of comparisons, and how far a judge can be trusted."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.job import win_rate_metric
from pipeline.report_data import StepView
from pipeline.report_plots import Row, finite, interval_bar, number, percent

TITLES = {
    "rubric": "the demo\u2019s hidden rubric",
    "reward_model": "a second reward model",
    "people": "people",
}
# where a table has many rows
_SHORT = {"rubric": "hidden rubric", "reward_model": "second reward model"}
BASIS = {"people": "people", "simulated": "the simulated annotators"}
MUCH_BIAS = 0.2  # comparisons that the place decides
MUCH_UNREAD = 0.05


def judge_tables(evaluate: StepView | None) -> Row:
    """comparisons: one row each judge and two models. trust: one row a judge, and the ceiling."""
    metrics = evaluate.metrics if evaluate else {}
    known = judges(metrics)
    return {
        # judges of the same two models stand together
        "comparisons": [
            row
            for models in compared(metrics)
            for judge in known
            if (row := _comparison(metrics, *models, *judge))
        ],
        "trust": [row for judge in known if (row := _trust(metrics, *judge))],
        "ceiling": _interval(metrics, "annotator_agreement"),
        "ceiling_pairs": finite(metrics.get("annotator_agreement_pairs")),
        "by": BASIS.get(str(metrics.get("labels_by")), "the annotators"),
    }


def judge_notes(metrics: Row) -> Iterator[str]:
    """What speaks against believing a judge."""
    if not (known := judges(metrics)):
        return
    first, title = known[0]
    rate, low, high = (
        finite(metrics.get(f"judge_{first}_win_rate_vs_sft{end}")) for end in ("", "_low", "_high")
    )
    name = f"judge_{first}_win_rate_vs_sft_length_controlled"
    equal, equal_low, equal_high = (
        finite(metrics.get(name + end)) for end in ("", "_low", "_high")
    )
    told = None not in (low, high, equal_low, equal_high)
    if told and _above(low, high) != _above(equal_low, equal_high):
        yield (
            f"Length decides: at equal length the win rate is {percent(equal)} ({percent(equal_low)} to"
            f" {percent(equal_high)}) instead of {percent(rate)}."
        )
    for judge, other in known[1:]:
        ends = [
            finite(metrics.get(f"judge_{judge}_win_rate_vs_sft_{end}")) for end in ("low", "high")
        ]
        if None not in (low, high, *ends) and _above(low, high) * _above(*ends) < 0:
            yield f"The judges disagree: {title} and {other} prefer different models."
    for judge, title in known:
        bias = finite(metrics.get(f"judge_{judge}_position_bias"))
        if bias is not None and bias > MUCH_BIAS:
            yield (
                f"{title} contradicts itself in {percent(bias)} of the comparisons when the answers are"
                " exchanged; these count as ties."
            )
        unread = finite(metrics.get(f"judge_{judge}_unreadable"))
        if unread is not None and unread > MUCH_UNREAD:
            yield f"{percent(unread)} of the comparisons of {title} cannot be read and are left out."


def _above(low: float | None, high: float | None) -> int:
    """1 where an interval lies above one half, -1 below, 0 where it includes it."""
    assert low is not None
    assert high is not None
    return (low > 0.5) - (high < 0.5)


def judges(metrics: Row) -> list[tuple[str, str]]:
    """(name, title) of each, in the order of the settings; none in evaluations of before."""
    names, titles = metrics.get("judges"), metrics.get("judge_titles")
    if not isinstance(names, list) or not isinstance(titles, list) or len(names) != len(titles):
        return []
    return [(str(n), _SHORT.get(str(t), str(t))) for n, t in zip(names, titles, strict=True)]


def compared(metrics: Row) -> list[tuple[str, str]]:
    found = metrics.get("compared")
    rows = found if isinstance(found, list) else []
    return [(str(row[0]), str(row[1])) for row in rows if isinstance(row, list) and len(row) == 2]


def _comparison(metrics: Row, first: str, second: str, judge: str, title: str) -> Row | None:
    name = f"judge_{judge}_{win_rate_metric(first, second)}"
    rate, low, high = _interval(metrics, name)
    if rate is None:
        return None
    equal, equal_low, equal_high = _interval(metrics, f"{name}_length_controlled")
    return {
        "judge": title,
        "models": f"{_model(first, metrics)} vs {_model(second, metrics)}",
        "rate": rate,
        "interval": _words(low, high),
        "bar": interval_bar(rate, low, high),
        "ties": finite(metrics.get(f"{name}_ties")),
        "equal": equal,
        "equal_interval": _words(equal_low, equal_high),
        "p": _p(finite(metrics.get(f"{name}_p"))),
        "prompts": finite(metrics.get(f"{name}_prompts")),
    }


def _trust(metrics: Row, judge: str, title: str) -> Row | None:
    rate, low, high = _interval(metrics, f"judge_{judge}_agreement")
    bias = finite(metrics.get(f"judge_{judge}_position_bias"))
    unread = finite(metrics.get(f"judge_{judge}_unreadable"))
    if rate is None and bias is None:
        return None
    return {
        "judge": title,
        "rate": rate,
        "interval": _words(low, high),
        "bar": interval_bar(rate, low, high) if rate is not None else None,
        "pairs": finite(metrics.get(f"judge_{judge}_agreement_pairs")),
        "bias": bias,
        "unread": unread,
    }


def _interval(metrics: Row, name: str) -> tuple[float | None, float | None, float | None]:
    rate, low, high = (finite(metrics.get(name + end)) for end in ("", "_low", "_high"))
    return rate, low, high


def _words(low: float | None, high: float | None) -> str | None:
    if low is None or high is None:
        return None
    return f"{100 * low:.1f}\u2009\u2013\u2009{percent(high)}"


def _p(value: float | None) -> str | None:
    if value is None:
        return None
    return "< 0.001" if value < 0.001 else number(value, 2)


def _model(name: str, metrics: Row) -> str:
    if name == "best_of_n":
        return f"best of {number(metrics.get('best_of_n')) or 'n'}"
    return name.replace("policy_", "round ")
