"""answers: what the models say to the held-out prompts, before people compare it.

Only where evaluate.judges names people: then this step asks the models, `judge` asks people, and
`evaluate` reads both. Without people evaluate asks the models itself.

Reads: `policy`, `sft`, `base` where there is one, `prompts`.
Writes `answers`: `prompts.jsonl`, and a file of answers each model (policy.jsonl, sft.jsonl, base.jsonl).

    prefline evaluate RUN "evaluate.judges=[reward_model, people]"

Metrics: prompts, and different (prompts on which not all models say the same: what people are asked).
"""

from __future__ import annotations

import shutil

from pipeline import worker
from pipeline.job import Inputs, Metrics, Out
from pipeline.records import write_jsonl
from pipeline.settings import Settings
from stages.answering import answer, prompts_to_answer
from stages.common import start, stop_if_asked
from stages.models import load_causal_lm, load_tokenizer


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    prompts = prompts_to_answer(settings, inputs, out)
    models = [role for role in ("policy", "sft", "base") if role in inputs]
    texts = []
    for role in models:
        stop_if_asked(accelerator, out, lambda: None)
        model = load_causal_lm(inputs[role]).to(accelerator.device).eval()
        tokenizer = load_tokenizer(inputs[role])
        said = answer(settings, role, model, tokenizer, prompts, accelerator, out)
        texts.append(said.texts)
        out.progress(len(texts), len(models), "model")
        del model
    if out.rank == 0:
        for role in models:
            shutil.copyfile(out.checkpoints / f"{role}.jsonl", out.artifact / f"{role}.jsonl")
        rows = (prompt.prompt.to_row() for prompt in prompts)
        write_jsonl(out.artifact / "prompts.jsonl", rows)
    different = sum(len(set(said)) > 1 for said in zip(*texts, strict=True))
    return {"prompts": len(prompts), "different": different}


if __name__ == "__main__":
    worker.main()
