"""A language model behind an endpoint as the judge: which of two answers is better, asked in both orders.

Models prefer a place (Zheng et al. 2023, arXiv 2306.05685, section 3.3; Wang et al. 2023, arXiv
2305.17926), so every comparison is asked twice, with the answers exchanged, and counts as won only
where both say so; a judge who contradicts itself has called a tie. Equal texts are a tie without a
question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from accelerate import Accelerator

from pipeline.errors import StageError
from pipeline.job import Metrics, Out
from pipeline.records import Prompt, hash_fraction
from pipeline.settings import Settings
from pipeline.statistics import Estimate
from stages.common import gather_list, own_share, seed_for, stop_if_asked
from stages.endpoint_client import Endpoint, Row
from stages.label_agreement import Labels, Pair, agreement, strict_pairs
from stages.verdicts import Models, Verdict

# "B", "**B**", "Answer: B.", "[[B]]", "tie"
_LAST_LINE = re.compile(
    r"(?:(?:final )?(?:answer|verdict|better|winner)\b(?: is)?\s*:?\s*)?(a|b|tie)", re.IGNORECASE
)
_DECORATION = re.compile(r"[*_`\[\](){}.!\"'#]")
_SLOT = re.compile(r"\{(prompt|first|second)\}")
# the verdict with the one as A, and with the one as B; None where it cannot be read
Told = tuple[str | None, str | None]


class Comparison(NamedTuple):
    """Two different answers to a prompt."""

    prompt: Prompt
    one: str
    other: str


def by_endpoint(
    settings: Settings,
    prompts: list[Prompt],
    texts: dict[str, list[str]],
    compared: list[Models],
    labels: Labels | None,
    accelerator: Accelerator,
    out: Out,
) -> Verdict:
    """What the model behind evaluate.endpoint says of each two models, and of ranked pairs.

    Raises:
        StageError: it cannot be asked, or said nothing that can be read.
    """
    endpoint = Endpoint(settings.evaluate.endpoint)
    template = settings.evaluate.endpoint.template
    wanted = {
        models: [
            Comparison(prompt, one, other)
            for prompt, one, other in zip(prompts, *(texts[model] for model in models), strict=True)
        ]
        for models in compared
    }
    pairs = _some_pairs(labels, settings.evaluate.endpoint.agreement_pairs)
    ranked = [Comparison(*pair) for pair in pairs]
    everything = [item for items in (*wanted.values(), ranked) for item in items]
    out.say(f"judge: asking {endpoint.settings.model} about {len(everything)} comparisons")
    answers = _ask(endpoint, _questions(everything, template), accelerator, out)

    def read(text: str) -> str | None:
        return verdict_in(answers.get(endpoint.id_of(text), {}).get("answer"))

    def told(items: list[Comparison]) -> list[Told]:
        return [(read(a), read(b)) for a, b in (both_orders(item, template) for item in items)]

    said = {models: told(items) for models, items in wanted.items()}
    outcomes = {
        models: [_outcome(item, *two) for item, two in zip(items, said[models], strict=True)]
        for models, items in wanted.items()
    }
    agreed = _agreement(ranked, pairs, told(ranked), settings)
    asked = [
        two
        for models, items in wanted.items()
        for item, two in zip(items, said[models], strict=True)
        if item.one != item.other
    ]
    verdict = Verdict("endpoint", endpoint.settings.model or "", outcomes, agreement=agreed)
    verdict.metrics = {**habits(asked), **_asked(answers)}
    _check_readable(verdict, answers, out)
    return verdict


def both_orders(item: Comparison, template: str) -> tuple[str, str]:
    """The question with the one first, and with the other first."""
    prompt = shown_prompt(item.prompt)
    return (
        _filled(template, prompt, item.one, item.other),
        _filled(template, prompt, item.other, item.one),
    )


def _filled(template: str, prompt: str, first: str, second: str) -> str:
    # in one go: an answer may hold "{second}" itself
    slots = {"prompt": prompt, "first": first, "second": second}
    return _SLOT.sub(lambda found: slots[found[1]], template)


def shown_prompt(prompt: Prompt) -> str:
    """A request as it is, a conversation with the speakers before their turns."""
    if len(prompt.messages) == 1:
        return prompt.text
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt.messages)


def verdict_in(answer: str | None) -> str | None:
    """`A`, `B` or `tie` on the last line of an answer; None where it cannot be read."""
    # what a model thought before it answered
    lines = [line for line in (answer or "").rpartition("</think>")[2].splitlines() if line.strip()]
    found = _LAST_LINE.fullmatch(_DECORATION.sub("", lines[-1]).strip()) if lines else None
    if found is None:
        return None
    return "tie" if found[1].lower() == "tie" else found[1].upper()


def outcome_of(straight: str | None, exchanged: str | None) -> float | None:
    """1 where the one won in both orders, 0 where the other did, else a tie; None if one is unread.

    straight: the verdict with the one as A. exchanged: with the one as B.
    """
    if straight is None or exchanged is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((straight, exchanged), 0.5)


def habits(asked: Sequence[Told]) -> Metrics:
    """Whether the place decides. Over comparisons that can be read in both orders:

    position_bias: share in which the same place won twice. first_place_rate: of those, how often it
    was the first; None without any. unreadable: share of the comparisons with an answer that is none.
    """
    read = [two for two in asked if None not in two]
    first, second = (sum(two == (name, name) for two in read) for name in "AB")
    return {
        "position_bias": (first + second) / len(read) if read else None,
        "first_place_rate": first / (first + second) if first + second else None,
        "unreadable": 1 - len(read) / len(asked) if asked else 0.0,
    }


# ---- parts ---------------------------------------------------------------------------------


def _some_pairs(labels: Labels | None, most: int) -> list[Pair]:
    """At most so many strict pairs of the held-out rankings, drawn by a hash of their content."""
    pairs = strict_pairs(labels.heldout) if labels else []
    drawn = sorted(pairs, key=lambda p: hash_fraction("agreement", p.prompt.id, p.better, p.worse))
    return drawn[:most]


def _questions(items: Iterable[Comparison], template: str) -> list[str]:
    return list(
        dict.fromkeys(
            text for item in items if item.one != item.other for text in both_orders(item, template)
        )
    )


def _ask(
    endpoint: Endpoint, questions: list[str], accelerator: Accelerator, out: Out
) -> dict[str, Row]:
    """Every rank asks a part of the questions; all get all answers."""
    out.checkpoints.mkdir(parents=True, exist_ok=True)
    own = [questions[i] for i in own_share(len(questions), accelerator)]
    kept = out.checkpoints / f"endpoint-{accelerator.process_index}-of-{out.world_size}.jsonl"
    rows = endpoint.ask_all(own, kept, lambda done, all: out.progress(done, all, "question"))
    stop_if_asked(accelerator, out, lambda: None)
    return {row["id"]: row for row in gather_list(list(rows.values()), accelerator)}


def _outcome(item: Comparison, straight: str | None, exchanged: str | None) -> float | None:
    return 0.5 if item.one == item.other else outcome_of(straight, exchanged)


def _agreement(
    ranked: list[Comparison],
    pairs: list[Pair],
    said: list[Told],
    settings: Settings,
) -> Estimate | None:
    found = [
        (pair, outcome)
        for pair, item, two in zip(pairs, ranked, said, strict=True)
        if (outcome := _outcome(item, *two)) is not None
    ]
    seed = seed_for(settings.run.seed, "evaluate", "agreement")
    return agreement([pair for pair, _ in found], [outcome for _, outcome in found], seed)


def _asked(answers: dict[str, Row]) -> Metrics:
    """What it took, as far as the server counts it; answers of an earlier start of the step included."""
    tokens = ("prompt_tokens", "completion_tokens")
    return {
        "questions": len(answers),
        "refused": sum("refused" in row for row in answers.values()),
        **{name: sum(row.get(name, 0) for row in answers.values()) for name in tokens},
    }


def _check_readable(verdict: Verdict, answers: dict[str, Row], out: Out) -> None:
    share = verdict.metrics["unreadable"]
    if not share:
        return
    unread = [
        str(row.get("answer", row.get("refused")))[-80:]
        for row in answers.values()
        if verdict_in(row.get("answer")) is None
    ]
    if share == 1:
        raise StageError(
            f"evaluate: no answer of {verdict.title} can be read; the first ends {unread[0]!r}",
            "The last line must be A, B or tie: change evaluate.endpoint.template, or raise"
            " evaluate.endpoint.max_tokens.",
        )
    out.say(f"judge: {share:.1%} of the comparisons cannot be read, for example {unread[0]!r}")
