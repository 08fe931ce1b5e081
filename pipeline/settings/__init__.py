"""Every knob of the toolkit: one typed tree, a file per top-level key."""

from __future__ import annotations

from pydantic import model_validator

from pipeline.config import Strict
from pipeline.settings.cost import CostSettings
from pipeline.settings.dpo import DpoSettings
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.grpo import GrpoSettings
from pipeline.settings.kto import KtoSettings
from pipeline.settings.launch import LaunchSettings
from pipeline.settings.model import LoraSettings, ModelSettings
from pipeline.settings.online import OnlineSettings
from pipeline.settings.ppo import PpoSettings
from pipeline.settings.pretrain import PretrainSettings
from pipeline.settings.rank import RankSettings
from pipeline.settings.reward import RewardSettings
from pipeline.settings.rloo import RlooSettings
from pipeline.settings.run import RunSettings
from pipeline.settings.sample import SampleSettings
from pipeline.settings.select import SelectSettings
from pipeline.settings.sft import SftSettings
from pipeline.settings.tokenizer import TokenizerSettings

__all__ = ["LoraSettings", "Settings"]


class Settings(Strict):
    """The whole tree. A section that is not given keeps its defaults."""

    run: RunSettings = RunSettings()
    """Identity, seed, rounds."""
    model: ModelSettings = ModelSettings()
    """The language model."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """The tokenizer of a new model."""
    pretrain: PretrainSettings = PretrainSettings()
    """Pretraining."""
    sft: SftSettings = SftSettings()
    """Supervised fine-tuning."""
    sample: SampleSettings = SampleSettings()
    """Sampling responses to rank."""
    select: SelectSettings = SelectSettings()
    """Which prompts are ranked."""
    rank: RankSettings = RankSettings()
    """Ranking."""
    reward: RewardSettings = RewardSettings()
    """The reward model."""
    ppo: PpoSettings = PpoSettings()
    """Policy optimisation."""
    dpo: DpoSettings = DpoSettings()
    """DPO instead of ppo (run.policy: dpo)."""
    kto: KtoSettings = KtoSettings()
    """KTO instead of ppo (run.policy: kto)."""
    grpo: GrpoSettings = GrpoSettings()
    """GRPO instead of ppo (run.policy: grpo)."""
    rloo: RlooSettings = RlooSettings()
    """RLOO instead of ppo (run.policy: rloo)."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Evaluation."""
    launch: LaunchSettings = LaunchSettings()
    """Processes."""
    cost: CostSettings = CostSettings()
    """What time, energy and people are worth."""

    @model_validator(mode="after")
    def _a_pipeline_can_start(self) -> Settings:
        if self.model.base is None and self.pretrain.data is None:
            raise ValueError(
                "there is nothing to start from: set model.base to a model, or pretrain.data to text"
            )
        if self.pretrain.objective == "masked":
            if self.sft.data or self.sample.prompts or self.rank.data:
                raise ValueError(
                    "pretrain.objective: masked trains an encoder, which cannot feed sft or sample, nor"
                    " reward; use causal, or remove sft.data, sample.prompts and rank.data"
                )
            if self.model.base and self.pretrain.data:
                raise ValueError(
                    "pretrain.objective: masked trains from scratch only; remove model.base"
                )
        invented = all(s.startswith("demo:") for s in self.sample.prompts or ("",))
        if self.rank.by == "simulated" and self.sample.prompts and not invented:
            raise ValueError(
                "rank.by: simulated annotators know the demo world's rubric only, so they need"
                " sample.prompts: demo:prompts; use rank.by: people, or import rankings (rank.data)"
            )
        judged = self.evaluate.prompts or self.sample.prompts or ("",)
        if "rubric" in self.evaluate.judges and not all(s.startswith("demo:") for s in judged):
            raise ValueError(
                "evaluate.judges: rubric knows the demo world's prompts only; use"
                " evaluate.judges: reward_model"
            )
        if self.is_rewarded_otherwise:
            if "reward_model" in self.evaluate.judges:
                raise ValueError(
                    "without rankings (sample.prompts or rank.data) no reward model can be trained to"
                    " judge: set evaluate.judges: rule and evaluate.rule, or endpoint, or people"
                )
            if self.evaluate.best_of:
                raise ValueError("evaluate.best_of needs the reward step, and so rankings")
        if self.run.policy == "ppo":
            self._check_gold()
        if self.run.rounds > 1 and self.sample.prompts is None:
            raise ValueError("run.rounds above 1 needs sample.prompts to sample from")
        if self.select.by != "random":
            self._check_selection()
        if self.ppo.ptx_coef > 0 and not (self.ppo.ptx_data or self.pretrain.data):
            raise ValueError(
                "ppo.ptx_coef needs text: set ppo.ptx_data, for instance to a text file"
            )
        rows, parts, key = self._policy_rows()
        # the policy comes last: hours later would be too late to say so
        if (self.has_rankings or self.is_rewarded_otherwise) and rows % parts:
            raise ValueError(
                f"launch.processes {self.launch.processes} does not divide the {rows} rows of a"
                f" minibatch of {self.run.policy} ({key})"
            )
        if self.run.policy == "kto" and rows == parts:
            raise ValueError(
                "kto compares each prompt with the response to another one: it needs two rows in every"
                f" micro-batch, and has one ({key})"
            )
        return self

    def _check_gold(self) -> None:
        asked = self.ppo.prompts or self.sample.prompts or ("",)
        if self.ppo.gold == "rubric" and not all(source.startswith("demo:") for source in asked):
            raise ValueError("ppo.gold: rubric knows the demo world's prompts only")
        if self.ppo.gold == "reward_model" and not (self.ppo.gold_model or self.has_rankings):
            raise ValueError(
                "ppo.gold: reward_model needs rankings to hold out (sample.prompts or rank.data), or"
                " ppo.gold_model: the folder of a reward model"
            )

    def _check_selection(self) -> None:
        by = self.select.by
        if (self.sample.max_prompts or 0) < 2:
            raise ValueError(
                f"select.by: {by} chooses which prompts are ranked; set sample.max_prompts (2 or more) to"
                " how many"
            )
        if self.run.policy == "dpo" and not self.evaluate.best_of:
            raise ValueError(
                f"select.by: {by} asks the reward model, which run.policy: dpo does without; use random,"
                " or set evaluate.best_of"
            )
        if by == "disagreement" and self.reward.heads == 1:
            raise ValueError(
                "select.by: disagreement compares the heads of the reward model, and one has nothing to"
                " disagree with; set reward.heads: 4"
            )

    @property
    def has_rankings(self) -> bool:
        """Whether responses are ranked, by people or before, and a reward model can learn from it."""
        return bool(self.sample.prompts or self.rank.data)

    @property
    def is_rewarded_otherwise(self) -> bool:
        """Whether the policy has prompts and a reward (rules, the user's reward models) without rankings."""
        if self.run.learns_from_rankings or self.has_rankings:
            return False
        own: PpoSettings | OnlineSettings = getattr(self, self.run.policy)
        return own.reward_weight == 0 and own.prompts is not None

    def _policy_rows(self) -> tuple[int, int, str]:
        """Rows of one optimiser step of the policy's stage, into how many parts they are divided,
        and the settings that say so."""
        processes, name = self.launch.processes, self.run.policy
        if name == "ppo":
            rows = self.ppo.minibatch_rows or self.ppo.prompts_per_step
            return rows, processes, "ppo.minibatch_rows, or else ppo.prompts_per_step"
        if self.run.learns_from_rankings:
            ranked = self.dpo if name == "dpo" else self.kto
            key = f"{name}.minibatch_rows, with {name}.accumulation_steps"
            return ranked.minibatch_rows, processes * ranked.accumulation_steps, key
        own = self.grpo if name == "grpo" else self.rloo
        key = f"{name}.prompts_per_step x {name}.responses_per_prompt"
        rows = own.prompts_per_step * own.responses_per_prompt
        return rows, processes * own.accumulation_steps, f"{key}, with {name}.accumulation_steps"
