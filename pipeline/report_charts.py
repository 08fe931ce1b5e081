"""Which curves the report draws for which stage. Units stand in the caption of every plot."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from pipeline.report_data import StepView
from pipeline.report_plots import Look, Mark, Row, Series, chart, finite, histogram, points, smooth


def training_charts(step: StepView) -> list[Markup]:
    """The plots of one step, from its metrics.jsonl; empty where there is nothing to draw."""
    if step.stage in ("pretrain", "sft"):
        plots = _language_model(step.name, step.rows)
    elif step.stage == "reward":
        plots = _reward(step.name, step.rows)
    elif step.stage in ("ppo", "grpo", "rloo"):
        plots = _against_reward(step.rows, step.metrics)
    elif step.stage == "dpo":
        plots = _dpo(step.name, step.rows)
    elif step.stage == "kto":
        plots = _kto(step.name, step.rows)
    else:
        plots = []
    return [plot for plot in plots if plot is not None]


def _language_model(name: str, rows: Sequence[Row]) -> list[Markup | None]:
    return [
        _beside_heldout(rows, "loss", "heldout_loss", f"{name}: loss", "nats per token"),
        _one(
            rows,
            "heldout_bits_per_byte",
            f"{name}: compression",
            "bits per byte",
            "step",
            look="dotted",
        ),
        _one(rows, "grad_norm", f"{name}: gradient norm", "before clipping", "step"),
    ]


def _reward(name: str, rows: Sequence[Row]) -> list[Markup | None]:
    return [
        chart(
            f"{name}: loss",
            "nats per pair; a coin has 0.69",
            "step",
            [Series("training", smooth(points(rows, "loss")), "blue")],
        ),
        _beside_heldout(
            rows, "accuracy", "heldout_accuracy", f"{name}: accuracy", "of pairs; a coin has 0.5"
        ),
    ]


def _dpo(name: str, rows: Sequence[Row]) -> list[Markup | None]:
    return [
        _beside_heldout(
            rows, "loss", "heldout_loss", f"{name}: loss", "nats per pair; a coin has 0.69"
        ),
        _beside_heldout(
            rows,
            "rewards/accuracies",
            "heldout_accuracy",
            f"{name}: accuracy",
            "of pairs; a coin has 0.5",
        ),
        *_implicit_rewards(name, rows, "chosen", "rejected"),
    ]


def _kto(name: str, rows: Sequence[Row]) -> list[Markup | None]:
    return [
        _beside_heldout(
            rows, "loss", "heldout_loss", f"{name}: loss", "value lost; the reference has 0.5"
        ),
        _one(
            rows,
            "heldout_accuracy",
            f"{name}: accuracy",
            "of held-out pairs; a coin has 0.5",
            "step",
            look="dotted",
        ),
        _beside_heldout(
            rows, "kl", "heldout_kl", f"{name}: reference point", "KL estimate, nats per response"
        ),
        *_implicit_rewards(name, rows, "desirable", "undesirable"),
    ]


def _implicit_rewards(
    name: str, rows: Sequence[Row], better: str, worse: str
) -> list[Markup | None]:
    return [
        _beside_heldout(
            rows,
            "rewards/margins",
            "heldout_margin",
            f"{name}: margin",
            f"implicit reward, {better} \u2212 {worse}",
        ),
        chart(
            f"{name}: implicit reward",
            "beta x log ratio to the reference",
            "step",
            [
                Series(better, smooth(points(rows, "rewards/chosen")), "blue"),
                Series(worse, smooth(points(rows, "rewards/rejected")), "orange", "thin"),
            ],
        ),
        _one(rows, "entropy", f"{name}: entropy", "nats per token", "step"),
    ]


def _beside_heldout(
    rows: Sequence[Row], key: str, heldout_key: str, title: str, unit: str
) -> Markup | None:
    """The same measure in training and on held-out data."""
    return chart(
        title,
        unit,
        "step",
        [
            Series("training", smooth(points(rows, key)), "blue"),
            Series("held-out", points(rows, heldout_key), "orange", "dotted"),
        ],
    )


def _against_reward(rows: Sequence[Row], metrics: Row) -> list[Markup | None]:
    return [
        chart(
            "Reward",
            "normalised score",
            "update",
            [
                Series("score", points(rows, "score"), "blue"),
                Series("score \u2212 KL penalty", points(rows, "reward"), "orange", "thin"),
            ],
        ),
        _validation(rows, metrics),
        frontier(rows, metrics),
        _one(
            rows,
            "validation_gold",
            "Gold",
            "watched on validation prompts, not optimised",
            "update",
            look="dotted",
        ),
        _one(rows, "kl", "KL from the reference", "nats per response", "update"),
        _one(rows, "entropy", "Entropy", "nats per token", "update"),
        _one(rows, "response_tokens", "Response length", "tokens, mean", "update"),
        _one(rows, "eos_rate", "Responses that end by themselves", "share", "update"),
        _one(
            rows,
            "equal_groups",
            "Prompts that teach nothing",
            "share whose responses all score the same",
            "update",
        ),
        _one(rows, "explained_variance", "Explained variance", "values; 1 is perfect", "update"),
        _one(rows, "clip_fraction", "Clipped ratios", "share of tokens", "update"),
        _one(rows, "kl_coef", "KL coefficient", "per nat", "update")
        if _moves(rows, "kl_coef")
        else None,
    ]


def _validation(rows: Sequence[Row], metrics: Row) -> Markup | None:
    reward = points(rows, "validation_reward")
    return chart(
        "Validation prompts",
        "normalised score",
        "update",
        [
            Series("score", points(rows, "validation_score"), "blue", "thin"),
            Series("score \u2212 KL penalty, which decides", reward, "orange", "dotted"),
        ],
        _kept(reward, rows, "step", metrics),
    )


def frontier(rows: Sequence[Row], metrics: Row) -> Markup | None:
    """What the reward cost in distance from the reference: up and to the left is better."""
    validated = points(rows, "validation_score", "validation_kl")
    return chart(
        "Reward against KL",
        "score; upper left is better",
        "KL from the reference, nats per response",
        [
            Series("training, one dot an update", points(rows, "score", "kl"), "grey", "dots"),
            Series("validation, in order", validated, "orange", "dotted"),
        ],
        _kept(validated, rows, "validation_kl", metrics),
    )


def _kept(
    curve: list[tuple[float, float]], rows: Sequence[Row], x: str, metrics: Row
) -> Mark | None:
    """A ring at the update whose policy was kept."""
    best = finite(metrics.get("best_update"))
    at = next(
        (finite(row.get(x)) for row in rows if best is not None and row.get("step") == best), None
    )
    return next((Mark(a, b, "kept") for a, b in curve if a == at), None)


def _one(
    rows: Sequence[Row], metric: str, title: str, unit: str, x_label: str, look: Look = "line"
) -> Markup | None:
    # the name is for the tooltip; a lone curve needs no legend, and its caption names it
    curve = points(rows, metric)
    return chart(title, unit, x_label, [Series("", smooth(curve), "blue", look)])


def _moves(rows: Sequence[Row], metric: str) -> bool:
    return len({y for _, y in points(rows, metric)}) > 1


def score_histograms(steps: Sequence[StepView], comparisons: Sequence[Row]) -> list[Markup]:
    """How the judge's scores are spread, by model."""
    groups = {
        name: (
            colour,
            [
                y
                for _, y in points(
                    [{"step": 0, "score": row.get(f"score_{name}")} for row in comparisons], "score"
                )
            ],
        )
        for name, colour in (("base", "grey"), ("sft", "blue"), ("policy", "orange"))
    }
    plot = histogram("Scores of the compared responses", "score", groups)
    return [plot] if plot else []
