"""What a careful reader should know before believing the report. Each note says the figure it stands on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.report_behaviour import alarms
from pipeline.report_data import StepView, mapping
from pipeline.report_judges import BASIS, judge_notes
from pipeline.report_plots import Row, finite, number, percent, points
from pipeline.settings import Settings

# Rules of thumb of ours, to start a look and not to end one; none is a test.
FEW_PROMPTS = 150  # +-8 points of win rate
FEW_RANKINGS = 300
LENGTH_CHANGE = 1.3
LENGTH_CORRELATION = 0.4
DEGENERATE = 0.02
DUPLICATES = 0.1
FAR_KL = 10.0  # nats a response
LEAST_VARIETY = 0.5  # story skeletons against sft
OVERFIT = 1.02  # held-out loss at the end against its lowest
QUALITY_LOSS = 0.02
WEAK_GOLD = 0.55


def careful_notes(
    settings: Settings, steps: Sequence[StepView], comparisons: Sequence[Row]
) -> list[str]:
    """Automatic warnings of the run, the gravest first."""
    notes = [*_unfinished(steps)]
    last = {step.stage: step for step in steps if step.manifest}
    if "evaluate" in last:
        notes += alarms(last["evaluate"].metrics)
        notes += _win_rate(last["evaluate"].metrics, comparisons)
        notes += judge_notes(last["evaluate"].metrics)
        notes += _best_of_n(last["evaluate"].metrics)
        notes += _behaviour(last["evaluate"].metrics)
    if "reward" in last:
        notes += _reward_model(last["reward"].metrics)
    notes += [note for step in steps for note in forced_gate(step)]
    if "rank" in last:
        notes += _rankings(last["rank"].metrics, settings)
    notes += [
        note
        for name in ("ppo", "grpo", "rloo")
        if name in last
        for note in _kept(last[name], name == "ppo" and settings.ppo.keep == "best_gold")
    ]
    if "ppo" in last:
        judge = last["evaluate"].metrics.get("judge") if "evaluate" in last else None
        notes += _over_optimised(last["ppo"], settings, judge)
    notes += [note for step in steps for note in (*_overfit(step), *_dropped(step))]
    if "evaluate" in last:
        notes.append(
            f"This is one seed ({settings.run.seed}). The interval speaks of the prompts only:"
            " other seeds give other figures, so repeat the run before a close decision."
        )
    return notes


def _unfinished(steps: Sequence[StepView]) -> Iterator[str]:
    missing = [f"{step.name} ({step.state_text})" for step in steps if step.state != "done"]
    if missing:
        yield f"The line is not finished: {', '.join(missing)}."


def _win_rate(metrics: Row, comparisons: Sequence[Row]) -> Iterator[str]:
    low, high, rate = (finite(metrics.get(f"win_rate_{key}")) for key in ("low", "high", "vs_sft"))
    if low is not None and high is not None and low <= 0.5 <= high:
        yield (
            f"The interval of the win rate, {percent(low)} to {percent(high)}, includes 50\u202f%:"
            " the difference may be chance."
        )
    prompts = finite(metrics.get("prompts"))
    if prompts is not None and prompts < FEW_PROMPTS:
        yield f"Only {number(prompts)} prompts were compared; raise evaluate.max_prompts for a narrower interval."
    if metrics.get("judge") == "reward_model":
        agreed = percent(metrics.get("judge_reward_model_agreement"))
        whom = BASIS.get(str(metrics.get("labels_by")), "the annotators")
        yield "The judge is a reward model, not people" + (
            f"; on rankings that are new to it, it agrees with {whom} in {agreed} of the pairs."
            if agreed
            else "."
        )
    if rate is not None and comparisons and len(comparisons) == prompts:
        points_of = {"policy": 1.0, "tie": 0.5}
        counted = sum(points_of.get(str(row.get("winner")), 0.0) for row in comparisons) / len(
            comparisons
        )
        if abs(counted - rate) > 0.005:
            yield (
                f"The listed comparisons give {percent(counted)}, the manifest says {percent(rate)}:"
                " they do not belong together."
            )


def _best_of_n(metrics: Row) -> Iterator[str]:
    """A policy that does not beat its sampler's best of n was not worth its training."""
    rate, low = (finite(metrics.get(f"best_of_n_win_rate_{key}")) for key in ("vs_sft", "low"))
    own = finite(metrics.get("win_rate_vs_sft"))
    n = number(metrics.get("best_of_n"))
    if rate is not None and low is not None and own is not None and own < low:
        yield (
            f"The best of {n} sft responses, which needs no training, wins more often against sft"
            f" ({percent(rate)}) than the policy ({percent(own)})."
        )


def _behaviour(metrics: Row) -> Iterator[str]:
    policy, sft = finite(metrics.get("mean_tokens")), finite(metrics.get("sft_mean_tokens"))
    if policy and sft and not 1 / LENGTH_CHANGE < policy / sft < LENGTH_CHANGE:
        word = "longer" if policy > sft else "shorter"
        yield (
            f"Responses became much {word}: {number(policy)} tokens instead of {number(sft)}."
            " Length may be what was rewarded."
        )
    degenerate, duplicates = (
        finite(metrics.get("degenerate_rate")),
        finite(metrics.get("duplicate_rate")),
    )
    worse = (finite(metrics.get("sft_degenerate_rate")) or 0.0) < (degenerate or 0.0)
    if degenerate is not None and degenerate > DEGENERATE and worse:
        yield (
            f"{percent(degenerate)} of the policy\u2019s responses are degenerate"
            " (empty, looping, or said to another prompt too)."
        )
    if duplicates is not None and duplicates > DUPLICATES:
        yield f"{percent(duplicates)} of the policy\u2019s responses repeat an answer given to another prompt."
    now, then = finite(metrics.get("skeletons")), finite(metrics.get("sft_skeletons"))
    if now and then and now < LEAST_VARIETY * then:
        yield f"Variety fell: {number(now)} different story skeletons instead of {number(then)}."
    kl = finite(metrics.get("kl_nats"))
    if kl is not None and kl > FAR_KL:
        yield (
            f"The policy is {number(kl)} nats a response away from its reference:"
            " look for over-optimisation in the samples."
        )
    before, after = mapping(metrics.get("quality_sft")), mapping(metrics.get("quality_policy"))
    for name in before:
        a, b = finite(before[name]), finite(after.get(name))
        if a is not None and b is not None and b < a - QUALITY_LOSS:
            yield f"One quality fell: {str(name).replace('_', ' ')}, from {number(a)} (sft) to {number(b)} (policy)."


def _reward_model(metrics: Row) -> Iterator[str]:
    low = finite(metrics.get("heldout_accuracy_low"))
    if low is not None and low <= 0.5:
        yield f"The reward model may know nothing: its held-out accuracy could be {percent(low)}, a coin has 50\u202f%."
    length = finite(metrics.get("length_correlation"))
    if length is not None and abs(length) > LENGTH_CORRELATION:
        yield f"The reward model\u2019s score follows length (correlation {number(length, 2)})."


def forced_gate(step: StepView) -> Iterator[str]:
    gate = mapping(mapping(step.manifest.get("derived")).get("gate"))
    reasons = gate.get("reasons")
    if gate.get("forced") is True and isinstance(reasons, list) and reasons:
        yield (
            f"{step.name} went on through a closed gate (reward.gate.force):"
            f" {'; '.join(map(str, reasons))}."
        )


def _rankings(metrics: Row, settings: Settings) -> Iterator[str]:
    rankings, ties = finite(metrics.get("rankings")), finite(metrics.get("ties_fraction"))
    if rankings is not None and rankings < FEW_RANKINGS:
        yield f"The reward model learned from few rankings: {number(rankings)}."
    if ties is not None and ties > 0.5:
        yield f"{percent(ties)} of the ranked pairs are ties, which teach the reward model nothing."
    if settings.rank.by == "simulated":
        yield "The annotators were simulated: this shows that the machinery works, not what people like."


def _kept(step: StepView, by_gold: bool) -> Iterator[str]:
    best = finite(step.metrics.get("best_update"))
    curve = points(step.rows, "validation_reward")
    if best == 0:
        yield (
            f"No {step.stage.upper()} update beat the start on the validation prompts: the kept"
            " policy is its starting point."
        )
    elif curve and best == curve[-1][0]:
        yield (
            "The best policy was the last one that was checked: more updates"
            f" ({step.stage}.updates) might still help."
        )
    elif curve and best is not None:
        figures = f"{number(dict(curve).get(best))} against {number(curve[-1][1])}"
        # gold is smoothed over its neighbours: two of its values alone may say otherwise
        why = "by gold" if by_gold else f"validation reward {figures}"
        yield (
            f"{step.stage.upper()} was better at update {number(best)} than at its end ({why}); the"
            " better one was kept."
        )
    ended = points(step.rows, "eos_rate")
    if ended and ended[-1][1] < 0.9:
        yield f"Only {percent(ended[-1][1])} of the last responses ended by themselves; the others were cut off."


def _over_optimised(step: StepView, settings: Settings, judge: object) -> Iterator[str]:
    ppo, peak = settings.ppo, number(step.metrics.get("gold_peak_update"))
    right = finite(mapping(step.manifest.get("derived")).get("gold_accuracy"))
    if right is not None and right < WEAK_GOLD:
        yield (
            f"The gold that watched PPO orders only {percent(right)} of the pairs that it has not seen as people"
            " do: it shows nothing, whatever it says."
        )
    elif step.metrics.get("gold_fell") is True and ppo.keep != "best_gold":
        yield (
            f"PPO was optimised too far: gold was highest at update {peak} and fell while the score rose;"
            " ppo.keep=best_gold publishes that policy."
        )
    learnt = ppo.gold == "reward_model" and not ppo.gold_model
    if learnt and ppo.keep == "best_gold" and judge == "reward_model":
        yield (
            "The gold that chose the policy and the judge learned from the same held-out rankings:"
            " the judge is kinder to this policy than people may be."
        )


def _overfit(step: StepView) -> Iterator[str]:
    curve = points(step.rows, "heldout_loss")
    if len(curve) > 1:
        at, lowest = min(curve, key=lambda point: point[1])
        if curve[-1][1] > lowest * OVERFIT:
            yield (
                f"{step.name} overfits: held-out loss {number(lowest)} at step {number(at)},"
                f" {number(curve[-1][1])} at the end."
            )


def _dropped(step: StepView) -> Iterator[str]:
    """Rows that a stage could not use, with its reasons."""
    found = {**mapping(step.manifest.get("derived")), **step.metrics}
    for key, value in found.items():
        if (
            not any(word in str(key) for word in ("dropped", "left_out", "too_long", "too_few"))
            or not value
        ):
            continue
        if isinstance(value, dict):
            value = ", ".join(
                f"{reason} ({number(count) or count})" for reason, count in value.items()
            )
        yield f"{step.name} left rows out ({str(key).replace('_', ' ')}): {value}."
