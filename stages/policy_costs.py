"""What the policy stages and evaluate take: see `stages.stage_costs`."""

from __future__ import annotations

from typing import Any

from pipeline import scaling
from pipeline.scaling import Memory
from stages.bench import Bench, StageCost
from stages.policy_probe import Probe, make_agent
from stages.probes import DecodeCost, Seconds
from stages.reward_costs import reward_probe
from stages.stage_costs import NO_LORA, evaluations, mean, storage

_PERPLEXITY_TOKENS = 512
_TRL = "the trainer's own overhead is not measured"
# the demo's rubric, of one answer; measured on one core of 2024
_RUBRIC = Seconds(0.0006, 0.0006, 0.0006)


def ppo(bench: Bench, decode: DecodeCost) -> StageCost:
    own, work = bench.settings.ppo, bench.work
    kind = own.critic or ("lora" if own.lora.rank else "separate")
    probe = Probe(bench, own.max_response_tokens, own.rows_per_rank, own.lora)
    agent = make_agent(bench, kind, own.lora)
    read, experience = probe.rollout(agent, own)
    trained, stepped = probe.step(agent, own.rows_per_rank, experience)
    minibatch = own.minibatch_rows or own.prompts_per_step
    validations = evaluations(own.updates, own.eval_every_updates) + 1
    held = min(own.eval_prompts, work.prompts.get("validation", own.eval_prompts))
    rollouts = float(own.updates * own.prompts_per_step)
    rows = rollouts + validations * held
    sources = (own.reward_weight != 0) + len(own.reward_models or ())
    steps = own.updates * own.epochs * (own.prompts_per_step / minibatch)
    at_once = min(own.rows_per_rank, own.prompts_per_step // bench.processes or 1)
    share = 1.0 / bench.processes
    answered = decode.all(probe.lengths, rows, at_once) * (bench.scale / rows)
    parts = [
        *storage(bench, loads=3 + (kind == "separate")),
        ("response", rows * share, answered),
        ("response read by reference, critic and reward models", rows * share, read),
        ("response trained on", rollouts * own.epochs * share, trained),
        ("optimiser step", steps, stepped),
    ]
    models = 1 if kind == "shared" else 2
    size = bench.sized(own.lora)
    read_flops = scaling.forward_flops(bench.size, rows * probe.row, probe.row / 2)
    flops = rows * scaling.generation_flops(bench.size, probe.prompt, mean(probe.lengths))
    flops += read_flops * (1 + sources + (kind != "shared"))
    passed = rollouts * own.epochs * probe.row
    flops += models * scaling.train_flops(size, passed, probe.row / 2)
    critics = {
        "separate": size.scorer,
        "shared": size.hidden + 1,
        "lora": size.adapters + size.hidden,
    }
    watching = sources + bool(own.gold)
    return StageCost(
        parts,
        rows * mean(probe.lengths),
        flops,
        lambda: _ppo_memory(bench, probe, kind, watching, at_once),
        trainable=size.trainable + critics[kind],
    )


def _ppo_memory(bench: Bench, probe: Probe, kind: str, reward_models: int, at_once: int) -> Memory:
    """Policy, critic, reference and reward models, with the fuller of rollout and optimisation."""
    adapters = probe.adapters
    held = [bench.trained(adapters)]
    if kind == "separate":
        held.append(bench.trained(NO_LORA))
    elif kind == "lora":
        size = bench.sized(adapters)
        held.append(Memory(gradients=4.0 * size.adapters, optimizer=8.0 * size.adapters))
    if not adapters.rank:
        held.append(bench.frozen())  # the reference; adapters are switched off for it
    held += [bench.frozen()] * reward_models
    best = Memory(kept=scaling.FP32_BYTES * float(bench.sized(adapters).trainable))
    rows = bench.micro_batch(probe.longest, at_once)
    responding = rows * max(probe.lengths)
    phases = [
        bench.kept(rows, probe.longest, adapters, logits=responding),
        bench.decoding(at_once, probe.longest),
    ]
    fullest = max(phases, key=lambda memory: memory.total)
    return scaling.together(*held, best, fullest)


def online(bench: Bench, decode: DecodeCost) -> StageCost:
    """grpo and rloo: groups of responses, no critic."""
    own: Any = getattr(bench.settings, bench.settings.run.policy)
    probe = Probe(bench, own.max_response_tokens, own.rows_per_rank, own.lora)
    agent = make_agent(bench, "shared", own.lora)
    read = probe.logprobs(agent.policy, own.rows_per_rank)
    scored = probe.scores(own.rows_per_rank)
    trained, stepped = probe.step(agent, own.rows_per_rank)
    each = own.prompts_per_step * own.responses_per_prompt
    rollouts = float(own.updates * each)
    held = min(own.eval_prompts, bench.work.prompts.get("validation", own.eval_prompts))
    rows = rollouts + (evaluations(own.updates, own.eval_every_updates) + 1) * held
    share = 1.0 / bench.processes
    at_once = min(own.rows_per_rank, each // bench.processes or 1)
    answered = decode.all(probe.lengths, rows, at_once) * (bench.scale / rows)
    sources = (own.reward_weight != 0) + len(own.reward_models or ())
    parts = [
        *storage(bench, loads=3),
        ("response", rows * share, answered),
        ("row read by the reference", rows * share, read),
        ("row scored", rows * sources * share, scored),
        ("row trained on", rollouts * own.epochs * share, trained),
        ("optimiser step", float(own.updates * own.epochs), stepped),
    ]
    size = bench.sized(own.lora)
    flops = rows * scaling.generation_flops(bench.size, probe.prompt, mean(probe.lengths))
    flops += scaling.forward_flops(bench.size, rows * probe.row, probe.row / 2) * (1 + sources)
    flops += scaling.train_flops(size, rollouts * own.epochs * probe.row, probe.row / 2)
    return StageCost(
        parts,
        rows * mean(probe.lengths),
        flops,
        lambda: _ppo_memory(bench, probe, "shared", sources, at_once),
        [_TRL],
        size.trainable,
    )


def offline(bench: Bench, rankings: int) -> StageCost:
    """dpo and kto: the responses of the rankings, read by policy and reference."""
    name = bench.settings.run.policy
    own: Any = getattr(bench.settings, name)
    work = bench.work
    K = max(2.0, work.responses_per_ranking)
    train = rankings * (1 - bench.settings.rank.heldout_fraction)
    is_dpo = name == "dpo"
    pairs = K * (K - 1) / 2 if is_dpo and own.pairs == "all" else 1.0
    examples = train * (pairs if is_dpo else K)
    steps = own.max_steps or -(-int(own.epochs * examples) // own.minibatch_rows)
    # a pair is two rows; kto reads every prompt with another response too
    rows = steps * own.minibatch_rows * (2.0 if is_dpo else 1.0)
    probe = Probe(bench, own.max_length, own.minibatch_rows, own.lora)
    agent = make_agent(bench, "shared", own.lora)
    read = probe.logprobs(agent.policy, own.minibatch_rows)
    trained, stepped = probe.step(agent, own.minibatch_rows)
    readings = 1.0 if is_dpo else 3.0
    held = min(own.eval_pairs, rankings - train) * 2.0 * 2.0
    looked = evaluations(steps, own.eval_every_steps)
    share = 1.0 / bench.processes
    parts = [
        *storage(bench, loads=2),
        ("row read without gradient", (rows * readings + held * looked) * share, read),
        ("row trained on", rows * share, trained),
        ("optimiser step", float(steps), stepped),
    ]
    size = bench.sized(own.lora)
    flops = scaling.train_flops(size, rows * probe.row, probe.row / 2)
    flops += readings * scaling.forward_flops(bench.size, rows * probe.row, probe.row / 2)
    micro = own.minibatch_rows // (own.accumulation_steps * bench.processes) or 1

    def memory() -> Memory:
        models = [bench.trained(own.lora)] + ([] if own.lora.rank else [bench.frozen()])
        kept = bench.kept(micro * (2 if is_dpo else 1), probe.longest, own.lora)
        return scaling.together(*models, kept)

    return StageCost(parts, rows * probe.row, flops, memory, [_TRL], size.trainable)


def answers(bench: Bench, decode: DecodeCost, roles: int) -> StageCost:
    """The step of its own in which models answer, where people judge them."""
    own = bench.settings.evaluate
    probe = Probe(bench, own.max_response_tokens, own.rows_per_rank, NO_LORA)
    count = _prompts(bench)
    return StageCost(
        [
            *storage(bench, loads=roles, saves=0),
            _answering(bench, decode, probe, count * roles, min(own.rows_per_rank, count)),
        ],
        count * roles * mean(probe.lengths),
        count * roles * scaling.generation_flops(bench.size, probe.prompt, mean(probe.lengths)),
        lambda: scaling.together(
            bench.frozen(), bench.decoding(min(own.rows_per_rank, count), probe.longest)
        ),
    )


def _prompts(bench: Bench) -> int:
    most = bench.settings.evaluate.max_prompts
    return min(most, bench.work.prompts.get("test", most))


def _answering(
    bench: Bench, decode: DecodeCost, probe: Probe, count: int, rows: int
) -> tuple[str, float, Seconds]:
    answered = decode.all(probe.lengths, count, rows) * (bench.scale / max(1, count))
    return "answer", count / bench.processes, answered


def evaluate(bench: Bench, decode: DecodeCost, roles: int, rankings: int) -> StageCost:
    """roles: models that are judged: policy, sft and, where there is one, base."""
    own, work = bench.settings.evaluate, bench.work
    probe = Probe(bench, own.max_response_tokens, own.rows_per_rank, NO_LORA)
    count = _prompts(bench)
    model = bench.policy()
    read = probe.logprobs(model, own.rows_per_rank)
    texts = min(own.max_documents, work.heldout_documents) if work.documents else own.max_documents
    text = min(
        _PERPLEXITY_TOKENS, mean(work.document_lengths) or mean([len(i) for i, _ in work.rows])
    )
    share = 1.0 / bench.processes
    judged = count * (roles + own.best_of)
    # where people judge, all but the best of n have answered in a step before
    said = count * own.best_of if "people" in own.judges else judged
    rows = min(own.rows_per_rank, count)
    # until enough held-out documents are found
    searched = min(1.0, texts / max(1, work.heldout_documents))
    parts = [
        *storage(bench, loads=roles, saves=0),
        ("read the text", searched, work.read_texts),
        *([_answering(bench, decode, probe, said, rows)] if said else []),
        ("answer read by sft", count * share, read),
        # a reading of so many tokens
        ("document read", texts * roles * (text / probe.row), read),
    ]
    flops = said * scaling.generation_flops(bench.size, probe.prompt, mean(probe.lengths))
    flops += scaling.forward_flops(
        bench.size, count * probe.row + texts * roles * text, probe.row / 2
    )
    held = [bench.frozen(), bench.decoding(rows, probe.longest)]
    if own.best_of:
        parts.append(("answer scored", float(count * own.best_of), probe.scores(own.rows_per_rank)))
    if "rubric" in own.judges:
        # qualities, form, skeleton and two scores of each answer
        parts.append(("answer judged", float(judged) * 3, _RUBRIC))
    if "reward_model" in own.judges and rankings:
        heldout = rankings * bench.settings.rank.heldout_fraction
        once, checked, _ = reward_probe(bench)
        epochs = bench.settings.reward.epochs
        parts += [
            ("ranking the judge learns from", heldout * epochs * share, once),
            ("ranking the judge is measured on", rankings - heldout, checked),
        ]
        size = bench.sized(bench.settings.reward.lora)
        tokens = heldout * epochs * work.responses_per_ranking * probe.row
        flops += scaling.train_flops(size, tokens, probe.row / 2)
        held.append(bench.trained(bench.settings.reward.lora))
    tokens = said * mean(probe.lengths)
    return StageCost(parts, tokens, flops, lambda: scaling.together(*held))
