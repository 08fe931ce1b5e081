"""What the reward model takes: see `stages.stage_costs`."""

from __future__ import annotations

from torch import nn

from pipeline import scaling
from pipeline.scaling import Memory
from stages.bench import Bench, StageCost
from stages.models import add_lora
from stages.probes import Seconds, measure, spread
from stages.ranked_data import EncodedRanking, Vote
from stages.reward_heads import add_heads
from stages.reward_measures import measure as measure_ranking
from stages.reward_training import train_reward_model
from stages.shared_prefix import PromptGroup, decide_sharing
from stages.stage_costs import evaluations, mean, round_up, storage


def groups(bench: Bench, count: int) -> list[EncodedRanking]:
    """Rankings of real prompts with random responses of the lengths that are expected."""
    work = bench.work
    K = max(2, round(work.responses_per_ranking))
    most = bench.settings.sample.max_response_tokens if bench.settings.sample.prompts else 10**9
    limit = min(bench.settings.reward.max_length, bench.full.max_position_embeddings or 10**9)
    lengths = spread(work.expected(most), count * K)
    end = work.tokenizer.eos_token_id
    vocabulary = len(work.tokenizer)
    found = []
    for i in range(count):
        prompt = work.prompt_ids[i * len(work.prompt_ids) // count][: limit - 8]
        # long and short ones in every group, as samples of one prompt are
        own = [min(lengths[k * count + i], limit - len(prompt)) for k in range(K)]
        # different ones: equal responses would share what they cost
        responses = [
            [(5 + i * 31 + k * 17 + t * 7) % vocabulary for t in range(max(1, n - 1))] + [end]
            for k, n in enumerate(own)
        ]
        votes = [Vote(list(range(1, K + 1)))]
        found.append(EncodedRanking(PromptGroup(prompt, responses), votes, f"{i}"))
    return found


def reward(bench: Bench, rankings: int) -> StageCost:
    """rankings: of all rounds so far."""
    own, work = bench.settings.reward, bench.work
    train_count = max(1, round(rankings * (1 - bench.settings.rank.heldout_fraction)))
    heldout_count = max(1, rankings - train_count)
    steps = -(-train_count // own.prompts_per_step) * own.epochs
    once, checked, share = reward_probe(bench)
    K = work.responses_per_ranking
    looked = evaluations(steps, own.eval_every_steps)
    normalised = min(own.normalise_on, rankings * K) / K
    parts = [
        *storage(bench, loads=1),
        ("ranking trained on", float(train_count * own.epochs) / bench.processes, once),
        ("ranking measured", (looked + 1.0) * heldout_count + train_count + normalised, checked),
    ]
    lengths = work.expected(bench.settings.sample.max_response_tokens)
    prompt = mean([len(ids) for ids in work.prompt_ids])
    row = prompt + mean(lengths)
    read = (prompt + K * mean(lengths)) if share else K * row
    read += row if own.off_prompt else 0.0
    tokens = train_count * own.epochs * read
    size = bench.sized(own.lora)
    longest = round_up(prompt) + (round_up(K * mean(lengths)) if share else max(lengths))
    rows = bench.micro_batch(longest, own.prompts_per_step * round_up(K))

    def memory() -> Memory:
        kept = bench.kept(rows, longest, own.lora, logits=0, attention_mask=share)
        return scaling.together(bench.trained(own.lora), kept)

    flops = scaling.train_flops(size, tokens, row / 2)
    flops += scaling.forward_flops(size, parts[-1][1] * read, row / 2)
    trainable = size.adapters + size.hidden if size.adapters else size.scorer
    return StageCost(parts, tokens, flops, memory, trainable=trainable)


def reward_probe(bench: Bench) -> tuple[Seconds, Seconds, bool]:
    """The stage's own loop on a few rankings: one trained on, one measured, whether prompts are shared."""
    own = bench.settings.reward
    K = max(2, round(bench.work.responses_per_ranking))
    each = K * mean(bench.work.expected(bench.settings.sample.max_response_tokens))
    count = bench.affordable_rows(own.prompts_per_step, each)
    model: nn.Module = bench.classifier()
    add_heads(model, own.heads, 0)
    model = add_lora(model, own.lora, "reward")
    pad_id = bench.work.tokenizer.pad_token_id
    out = bench.out("reward")
    some = groups(bench, count * 2)
    share = decide_sharing(own.share_prefix, model, [r.group for r in some], pad_id, out)
    few = own.model_copy(
        update={"prompts_per_step": count, "epochs": 1, "accumulation_steps": 1,
                "eval_every_steps": 10**9, "checkpoint_every_steps": 10**9}
    )  # fmt: skip

    def train(rankings: list[EncodedRanking]) -> None:
        train_reward_model(
            model, rankings, few, bench.accelerator, out, pad_id=pad_id, seed=0,
            keep_checkpoints=1, share_prefix=share, evaluate=lambda _: {},
        )  # fmt: skip

    # off_prompt chooses among other prompts: at least one of them
    once = measure(lambda: train(some), bench.device, 1.0) * (bench.scale / len(some))
    checked = measure(lambda: measure_ranking(model, some, pad_id, 0, share), bench.device, 0.4)
    return once, checked * (bench.scale / len(some)), share
