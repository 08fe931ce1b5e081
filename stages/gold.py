"""What ppo watches and never optimises: a reward model of its own, a rule, or the demo's rubric."""

from __future__ import annotations

import json
import shutil
from typing import Any

from accelerate import Accelerator

from pipeline import demo_rubric
from pipeline.files import replace_durably
from pipeline.job import Input, Inputs, Out
from pipeline.settings import Settings
from stages.common import seed_for
from stages.heldout_model import train_on_heldout
from stages.models import save_model
from stages.rewards import RewardModel, load_given
from stages.rules import Messages, Rule, load_rule

FOLDER = "gold"
# a rule of thumb of ours; a coin has 0.5
_WEAK = 0.55


def load_gold(
    settings: Settings,
    inputs: Inputs,
    contract: dict[str, Any],
    accelerator: Accelerator,
    out: Out,
) -> RewardModel | Rule | None:
    """The gold that `ppo.gold` names, trained first where it has to be; None where it names none.

    contract: of the policy.

    Raises:
        ConfigError, ArtifactError, StageError: it is not there, does not fit the policy, or there is
            nothing to train it on.
    """
    ppo = settings.ppo
    if ppo.gold is None:
        return None
    if ppo.gold == "rubric":
        return Rule("gold", _rubric, "the demo's rubric")
    if ppo.gold == "rule":
        assert ppo.gold_rule is not None
        rule = load_rule(ppo.gold_rule, "ppo.gold_rule")
        out.derived["gold_rule"] = rule.origin
        return rule
    if "gold_model" in inputs:
        path = inputs["gold_model"].sources[0]
        name = "gold_model"
    else:
        path, name = _trained(settings, inputs, accelerator, out), "gold"
    model = load_given(name, path, 0.0, contract, ppo.max_response_tokens, out)
    model.name = "gold"
    return model.to(accelerator.device)


def _rubric(messages: Messages, response: str) -> float:
    return demo_rubric.score(messages[-1]["content"], response)


def _trained(settings: Settings, inputs: Inputs, accelerator: Accelerator, out: Out) -> str:
    """The folder of a reward model trained on the held-out rankings; a start before this one may have
    left it there."""
    folder = out.work / FOLDER
    done = folder / "model"
    if not done.exists():
        own = out.below(FOLDER)
        seed = seed_for(settings.run.seed, "ppo", "gold", out.round)
        start_from: Input = inputs["reference"]
        found = train_on_heldout(
            settings, inputs["rankings"], start_from, accelerator, own, seed, "ppo.gold"
        )
        if out.rank == 0:
            temporary = folder / "model.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            save_model(found.model, found.tokenizer, temporary)
            accuracy = found.agreement.value if found.agreement else None
            row = {"score_mean": found.mean, "score_std": found.std, "accuracy": accuracy}
            (temporary / "reward.json").write_text(json.dumps(row, sort_keys=True))
            replace_durably(temporary, done)
            shutil.rmtree(own.checkpoints, ignore_errors=True)
        accelerator.wait_for_everyone()
        for name, value in own.cost.items():
            out.cost[name] = out.cost.get(name, 0.0) + value
    accuracy = json.loads((done / "reward.json").read_text(encoding="utf-8"))["accuracy"]
    out.derived["gold_accuracy"] = accuracy
    if accuracy is not None:
        weak = "" if accuracy > _WEAK else ": WARNING: too little to trust what it says"
        out.say(f"ppo.gold: right in {accuracy:.3f} of the pairs that it has not seen{weak}")
    return str(done)
