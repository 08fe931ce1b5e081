"""Settings -> the ordered steps of the line, as data.

A stage's `version` is raised when the same settings give other numbers. `sections` are the
settings that a stage may read (`rank.heldout_fraction`: a single one); they are what its fingerprint
covers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipeline.settings import Settings

# what sample reads where it chooses among prompts, and only there: else they make nothing stale
_SELECTING = ("select", "rank.heldout_fraction")

_ANSWERING = tuple(
    f"evaluate.{name}"
    for name in ("max_prompts", "max_prompt_tokens", "max_response_tokens", "temperature")
)
_JUDGING = tuple(f"evaluate.people.{name}" for name in ("overlap", "minimum", "lease_minutes"))
# steps that a command runs before its own, where the line has them
COMES_WITH = {"evaluate": ("answers", "judge")}


@dataclass(frozen=True)
class Stage:
    """What the core knows of a stage without importing it."""

    name: str
    module: str
    version: int
    kind: str
    """Kind of the artifact it makes."""
    sections: tuple[str, ...]


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("tokenizer", "stages.tokenizer", 1, "tokenizer", ("tokenizer",)),
        Stage("pretrain", "stages.pretrain", 2, "model", ("model", "pretrain")),
        Stage("sft", "stages.sft", 2, "model", ("model", "sft")),
        Stage("sample", "stages.sample", 2, "samples", ("model", "sample", *_SELECTING)),
        Stage("rank", "labeling_ui.rank", 1, "rankings", ("rank",)),
        Stage("reward", "stages.reward", 3, "reward_model", ("model", "reward")),
        Stage("ppo", "stages.ppo", 4, "policy", ("model", "pretrain", "sample", "reward", "ppo")),
        Stage("dpo", "stages.dpo", 1, "policy", ("model", "dpo")),
        Stage("kto", "stages.kto", 1, "policy", ("model", "kto")),
        Stage("grpo", "stages.grpo", 1, "policy", ("model", "sample", "grpo")),
        Stage("rloo", "stages.rloo", 1, "policy", ("model", "sample", "rloo")),
        Stage("answers", "stages.answers", 1, "answers", ("model", "sample", *_ANSWERING)),
        Stage("judge", "labeling_ui.judge", 1, "judgements", ("rank.store", *_JUDGING)),
        Stage(
            "evaluate",
            "stages.evaluate",
            4,
            "evaluation",
            ("model", "pretrain", "sft", "sample", "reward", "evaluate"),
        ),
    )
}


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: a stage in a round, and where its inputs come from."""

    name: str
    """Unique: `ppo`, then `ppo-2` in the second round."""
    stage: Stage
    round: int
    inputs: dict[str, str] = field(default_factory=dict)
    """role -> name of the step whose artifact is read."""
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """role -> data or model given by the user: paths, `demo:NAME`, hub ids."""


class _Steps(list[Step]):
    """The steps so far; `add` appends one and gives its name."""

    def add(
        self,
        stage: str,
        round: int,
        inputs: dict[str, str | None],
        sources: dict[str, tuple[str, ...] | None],
        without: tuple[str, ...] = (),
    ) -> str:
        """without: sections of the stage that this step does not read."""
        name = stage if round == 1 else f"{stage}-{round}"
        sections = tuple(name for name in STAGES[stage].sections if name not in without)
        self.append(
            Step(
                name,
                replace(STAGES[stage], sections=sections),
                round,
                {role: step for role, step in inputs.items() if step},
                {role: given for role, given in sources.items() if given},
            )
        )
        return name


def plan(settings: Settings) -> list[Step]:
    """The steps that this configuration asks for, each after everything it reads."""
    steps = _Steps()
    before_sft, sft = _model_steps(settings, steps)
    if settings.has_rankings or settings.is_rewarded_otherwise:
        _rounds(settings, steps, before_sft, sft)
    return list(steps)


def _base(settings: Settings) -> tuple[str, ...] | None:
    return (settings.model.base,) if settings.model.base else None


def _model_steps(settings: Settings, steps: _Steps) -> tuple[str | None, str | None]:
    """The steps up to sft; the names of the model before it and after it, None for the user's."""
    base = _base(settings)
    model: str | None = None
    # a role is either a step of ours or, where that is None, the user's model
    if settings.pretrain.data:
        tokenizer = None
        if base is None:
            text = settings.tokenizer.data or settings.pretrain.data
            tokenizer = steps.add("tokenizer", 1, {}, {"data": text})
        model = steps.add(
            "pretrain",
            1,
            {"tokenizer": tokenizer},
            {"base": base, "data": settings.pretrain.data},
        )
    before_sft = model
    if settings.sft.data:
        model = steps.add(
            "sft",
            1,
            {"model": model},
            {"model": None if model else base, "data": settings.sft.data},
        )
    return before_sft, model


def _rounds(settings: Settings, steps: _Steps, before_sft: str | None, sft: str | None) -> None:
    """sample, rank, reward, the policy, evaluate, as often as asked for.

    Without rankings only the policy, which rules or reward models of the user's then reward, and evaluate.
    """
    add, base = steps.add, _base(settings)
    samples = first_samples = rankings = reward = None
    policy = sft
    earlier: dict[str, str | None] = {}
    for round in range(1, settings.run.rounds + 1):
        if settings.sample.prompts:
            selecting: str | None = reward if settings.select.by != "random" else None
            samples = add(
                "sample",
                round,
                {"model": policy, "reward_model": selecting},
                {"model": None if policy else base, "prompts": settings.sample.prompts},
                without=() if selecting else _SELECTING,
            )
        first_samples = first_samples or samples
        if settings.has_rankings:
            rankings = add(
                "rank",
                round,
                {"samples": samples, "rankings": rankings},
                {"data": settings.rank.data if round == 1 else None},
            )
        if rankings and (not settings.run.learns_from_rankings or settings.evaluate.best_of):
            reward = add(
                "reward",
                round,
                # scores are normalised on sft samples in every round, so that kl_coef keeps its
                # meaning
                {"model": sft, "rankings": rankings, "samples": first_samples},
                {"model": None if sft else base},
            )
        inputs, sources = _policy_reads(settings, policy, sft, reward, samples, rankings)
        # ppo trains a reward model of its own where it watches one, and only there
        without = () if "rankings" in inputs else ("reward",)
        policy = add(settings.run.policy, round, inputs, sources, without)
        judged_on = settings.evaluate.prompts
        if not settings.has_rankings:
            judged_on = judged_on or sources["prompts"]
        models = {
            "policy": policy,
            "sft": sft,
            "base": before_sft if before_sft != sft else None,
            "prompts": None if judged_on else samples or rankings,
        }
        given = {
            "sft": None if sft else base,
            "base": base if (before_sft is None and sft) else None,
            "prompts": judged_on,
        }
        answers = judgements = None
        if "people" in settings.evaluate.judges:
            answers = add("answers", round, models, given)
            judgements = add("judge", round, {"answers": answers}, {})
        add(
            "evaluate",
            round,
            {
                **models,
                **earlier,
                "rankings": rankings,
                "reward_model": reward,
                "answers": answers,
                "judgements": judgements,
            },
            {
                **given,
                "text": settings.evaluate.text or settings.pretrain.data or settings.sft.data,
                **{
                    role: getattr(settings.evaluate, role)
                    for role in (
                        "tasks",
                        "refusal_prompts",
                        "refusal_annotations",
                        "toxicity_prompts",
                    )
                },
            },
        )
        earlier[f"policy_{round}"] = policy


def _policy_reads(
    settings: Settings,
    policy: str | None,
    sft: str | None,
    reward: str | None,
    samples: str | None,
    rankings: str | None,
) -> tuple[dict[str, str | None], dict[str, tuple[str, ...] | None]]:
    """What the stage of run.policy reads: steps by role, and what the user gave by role."""
    base = _base(settings)
    inputs: dict[str, str | None] = {"model": policy, "reference": sft}
    sources = {"model": None if policy else base, "reference": None if sft else base}
    if settings.run.learns_from_rankings:
        return {**inputs, "rankings": rankings}, sources
    own = getattr(settings, settings.run.policy)
    inputs |= {"reward_model": reward, "prompts": None if own.prompts else samples or rankings}
    sources |= {"prompts": own.prompts, "reward_models": own.reward_models}
    if settings.run.policy == "ppo":
        sources["gold_model"] = own.gold_model
        if own.gold == "reward_model" and not own.gold_model:
            inputs["rankings"] = rankings
        if own.ptx_coef > 0:
            sources["ptx"] = own.ptx_data or settings.pretrain.data
    return inputs, sources
