"""Training a reward model on rankings of K = 4 and K = 9 responses, against TRL on all their pairs.

    python -m tests.benchmarks.reward_k        both, one after the other
    python -m tests.benchmarks.reward_k 9      one of them

Both sides train the same 7 M Llama (8 x 256, vocabulary 2048) from the same weights on the same
rankings, each seen once, in one optimiser step: forward, backward, clipping, AdamW, in fp32. Prompts
have 48 to 80 tokens (mean 64), responses 8 to 56 (mean 32), both evenly. The ratio depends on that:
longer prompts favour us, longer responses less so.

Ours is `train_reward_model` as the reward step calls it. The peer is TRL's RewardTrainer as it is
installed, gradient checkpointing off, on the K (K - 1) / 2 pairs of each ranking, since it knows no
rankings, in micro-batches of 4 pairs (K = 4, 4 rankings, once each: 4 pairs 4.4, 8 pairs 4.9, 12 pairs
4.7 CPU-seconds).
"""

from __future__ import annotations

import random
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.utils.logging import disable_progress_bar
from trl import RewardConfig, RewardTrainer

from pipeline.job import Job, Out
from pipeline.settings.reward import RewardSettings
from stages.ranked_data import EncodedRanking, Vote
from stages.reward_training import train_reward_model
from stages.shared_prefix import PromptGroup, cannot_share_prefix
from tests.benchmarks.common import Step, compare
from tests.benchmarks.limits import forward_flops

RANKINGS = {4: 8, 9: 2}
PAD, VOCABULARY, LR = 0, 2048, 1e-5
_PEER_PAIRS = 4


def new_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=512,
        pad_token_id=PAD,
        num_labels=1,
    )
    return LlamaForSequenceClassification(config)


def new_rankings(K: int) -> list[EncodedRanking]:
    rng = random.Random(K)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    found = []
    for number in range(RANKINGS[K]):
        group = PromptGroup(ids(48, 80), [ids(8, 56) for _ in range(K)])
        ranks = rng.sample(range(1, K + 1), K)
        found.append(EncodedRanking(group, [Vote(ranks)], str(number)))
    return found


def our_step(K: int) -> Step:
    model, rankings = new_model(), new_rankings(K)
    assert cannot_share_prefix(model, [r.group for r in rankings], PAD) is None
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    settings = RewardSettings(prompts_per_step=len(rankings), lr=LR, checkpoint_every_steps=1000)

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder:
            job = Job("reward", "reward", "", 1, "", Path(folder), Path(folder), {}, {}, {})
            train_reward_model(
                model,
                rankings,
                settings,
                accelerator,
                Out(job, rank=1),  # not the rank that writes to the screen
                pad_id=PAD,
                seed=0,
                keep_checkpoints=1,
                share_prefix=True,
                evaluate=lambda _: {},
            )

    return step


def peer_step(K: int) -> Step:
    pairs = []
    for (prompt, responses), votes, _ in new_rankings(K):
        for i, j in combinations(range(K), 2):
            better, worse = (i, j) if votes[0].ranks[i] < votes[0].ranks[j] else (j, i)
            pairs.append(
                {
                    "chosen_ids": prompt + responses[better],
                    "rejected_ids": prompt + responses[worse],
                }
            )
    words = {"[PAD]": PAD, **{str(i): i for i in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="1")), pad_token="[PAD]"
    )
    folder = tempfile.mkdtemp()
    assert len(pairs) % _PEER_PAIRS == 0
    arguments = RewardConfig(
        output_dir=folder,
        per_device_train_batch_size=_PEER_PAIRS,
        gradient_accumulation_steps=len(pairs) // _PEER_PAIRS,
        num_train_epochs=1,
        learning_rate=LR,
        max_grad_norm=1.0,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=new_model(),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)

    def step() -> None:
        done = trainer.train()
        assert done.global_step == 1

    return step


def floor(K: int) -> float:
    """FLOPs of forward and backward with each prompt read once and no padding."""
    model, total = new_model(), 0.0
    for (prompt, responses), _, _ in new_rankings(K):
        alone = forward_flops(model, [len(prompt)])
        total += alone
        total += sum(forward_flops(model, [len(prompt) + len(r)]) - alone for r in responses)
    return 3 * total


def main() -> None:
    disable_progress_bar()
    for K in map(int, sys.argv[1:] or RANKINGS):
        # the processes that measure memory are started with the same arguments
        sys.argv[1:] = [str(K)]
        compare(
            f"reward_k{K}",
            lambda: our_step(K),  # noqa: B023 - called in this turn only
            lambda: peer_step(K),  # noqa: B023
            floor_flops=floor(K),
            repeats=6,
            wall_repeats=2,
        )


if __name__ == "__main__":
    main()
