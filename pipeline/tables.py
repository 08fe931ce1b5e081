"""What the commands print: plain aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline import ledger
from pipeline.config import field_paths
from pipeline.manifest import defaults, is_hashed, show
from pipeline.settings import Settings
from pipeline.states import StepState

# stage -> the metric that says most about it, and its unit for people
_HEADLINES = {
    "tokenizer": ("bytes_per_token", "{:.2f} bytes a token"),
    "pretrain": ("heldout_loss", "held-out loss {:.3f}"),
    "sft": ("heldout_loss", "held-out loss {:.3f}"),
    "sample": ("responses", "{:.0f} responses"),
    "rank": ("rankings", "{:.0f} rankings"),
    "reward": ("heldout_accuracy", "held-out accuracy {:.3f}"),
    "ppo": ("kl_nats", "KL {:.2f} nats"),
    "dpo": ("heldout_accuracy", "held-out accuracy {:.3f}"),
    "kto": ("heldout_accuracy", "held-out accuracy {:.3f}"),
    "grpo": ("validation_reward", "validation reward {:.3f}"),
    "rloo": ("validation_reward", "validation reward {:.3f}"),
    "answers": ("prompts", "{:.0f} prompts"),
    "judge": ("judgements", "{:.0f} judgements"),
    "evaluate": ("win_rate_vs_sft", "win rate {:.3f}"),
}


def align(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Columns of equal width, two spaces apart; `right` are the columns set to the right."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = set(right)
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def status_lines(states: Sequence[StepState]) -> list[str]:
    """One line a step: state, seconds, the metric that says most; and what it all has cost."""
    rows = [("step", "state", "seconds", "result")]
    for state in states:
        made = state.manifest if state.word in ("done", "damaged") else None
        seconds = f"{made.seconds:.1f}" if made else ""
        rows.append((state.step.name, state.text, seconds, _headline(state)))
    return align(rows, right=(2,)) + _cost_lines(states)


def _cost_lines(states: Sequence[StepState]) -> list[str]:
    made = [s.manifest for s in states if s.manifest and s.word in ("done", "damaged")]
    if not made:
        return []
    currencies = {str(m.unhashed.get("cost.currency", "")) for m in made}
    currency = currencies.pop() if len(currencies) == 1 else ""
    return ["", f"together: {ledger.line(ledger.total(m.cost for m in made), currency)}"]


def _headline(state: StepState) -> str:
    name, form = _HEADLINES[state.step.stage.name]
    if state.manifest is None or state.word != "done":
        return ""
    value = state.manifest.metrics.get(name)
    return form.format(value) if isinstance(value, int | float) else ""


def achieved_lines(states: Sequence[StepState]) -> list[str]:
    """What the line has achieved: base, sft and policy side by side, and what each step cost."""
    made = {state.step.stage.name: state.manifest for state in states if state.manifest}
    lines: list[str] = []
    if made.get("evaluate"):
        lines += [*_comparison(made["evaluate"].metrics), ""]
    reward = made.get("reward")
    accuracy = reward.metrics.get("heldout_accuracy") if reward else None
    if isinstance(accuracy, int | float):
        lines.append(f"reward model: held-out accuracy {accuracy:.3f}")
    costs = [
        f"{state.step.name} {state.manifest.seconds:.1f} s" for state in states if state.manifest
    ]
    total = sum(state.manifest.seconds for state in states if state.manifest)
    lines.append(f"time: {', '.join(costs)}; together {total:.1f} s")
    return lines


def _comparison(metrics: dict[str, Any]) -> list[str]:
    """The models as rows: win rate of the policy against each, KL, perplexity, length."""
    rows = [("", "policy wins against it", "KL from sft", "perplexity", "tokens", "degenerate")]
    interval = f"{_cell(metrics, 'win_rate_low', 3)} to {_cell(metrics, 'win_rate_high', 3)}"
    wins = {
        "base": _cell(metrics, "win_rate_vs_base", 3),
        "sft": f"{_cell(metrics, 'win_rate_vs_sft', 3)} ({interval})",
        "policy": "",
    }
    for role, win in wins.items():
        prefix = "" if role == "policy" else f"{role}_"
        if role != "policy" and f"{prefix}perplexity" not in metrics and win == "-":
            continue
        rows.append(
            (
                role,
                win,
                f"{_cell(metrics, 'kl_nats', 2)} nats" if role == "policy" else "",
                _cell(metrics, f"{prefix}perplexity", 2),
                _cell(metrics, f"{prefix}mean_tokens", 1),
                _cell(metrics, f"{prefix}degenerate_rate", 3),
            )
        )
    judge = metrics.get("judge")
    return [
        *align(rows),
        *_best_of_n(metrics),
        *([f"judge: {judge}; ties count one half"] if judge else []),
        *_judges(metrics),
    ]


def _judges(metrics: dict[str, Any]) -> list[str]:
    """A row for each judge: where there are several, or labels to compare one with."""
    rows = [("judge", "policy wins against sft", "at equal length", "agrees with annotators")]
    names = metrics.get("judges") or []
    for name, title in zip(names, metrics.get("judge_titles") or [], strict=False):
        found = f"judge_{name}_win_rate_vs_sft"
        keys = (found, f"{found}_length_controlled", f"judge_{name}_agreement")
        won, equal, agreed = (_estimate(metrics, key) for key in keys)
        rows.append((str(title), won, equal, agreed))
    if "annotator_agreement" in metrics:
        rows.append(("annotators", "", "", _estimate(metrics, "annotator_agreement")))
    return align(rows) if len(rows) > 1 else []


def _estimate(metrics: dict[str, Any], name: str) -> str:
    if name not in metrics:
        return "-"
    value, low, high = (_cell(metrics, name + end, 3) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def _best_of_n(metrics: dict[str, Any]) -> list[str]:
    if "best_of_n_win_rate_vs_sft" not in metrics:
        return []
    rate, low, high = (
        _cell(metrics, f"best_of_n_win_rate_{key}", 3) for key in ("vs_sft", "low", "high")
    )
    return [
        f"best of {metrics.get('best_of_n')} sft responses by the reward model: wins against sft {rate}"
        f" ({low} to {high}), at most {_cell(metrics, 'best_of_n_kl_nats', 2)} nats,"
        f" {_cell(metrics, 'best_of_n_mean_tokens', 1)} tokens"
    ]


def _cell(metrics: dict[str, Any], name: str, digits: int) -> str:
    value = metrics.get(name)
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def field_lines() -> list[str]:
    """Every setting: its default and what it means. `*` marks what no fingerprint covers."""
    lines: list[str] = []
    default = defaults()
    section = ""
    for key, field in field_paths(Settings).items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            about = Settings.model_fields[section].description or ""
            lines += ["", f"{section}: {about}"]
        mark = "" if is_hashed(field) else " *"
        lines.append(f"  {key} = {show(default[key])}{mark}")
        lines.append(f"      {' '.join((field.description or '').split())}")
    return [
        *lines[1:],
        "",
        "* recorded, but no part of a fingerprint: changing it runs nothing again",
    ]
