"""What the playground asks of models, one function for each question: plain values in, JSON out.

A text is given as `text`, read as it is or, with `chat`, as the user's turn in the model's template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import DataError
from pipeline.records import Message
from pipeline.settings.ppo import PpoSettings
from stages import probe, probe_attention, probe_policy
from stages.chat import encode_completion, encode_prompt
from stages.common import seed_for
from stages.loaded import Loaded, Models
from stages.models import positions
from stages.probe import MAX_TOKENS, Shaping
from stages.probe_policy import Absent
from stages.speaking import speak

Answer = dict[str, Any]
_MOST_NEW_TOKENS = 1024


def load(models: Models, model: str) -> Answer:
    """Have a model ready; what it is."""
    loaded = models.model(model)
    return {**probe.shape_of(loaded.model), "tokenizer": loaded.vocabulary.kind}


def tokens(models: Models, model: str, text: str, chat: bool = False) -> Answer:
    """The text as tokens."""
    loaded = models.model(model)
    ids = _ids(loaded, text, chat)
    return {"tokens": _described(loaded, ids)}


def merges(models: Models, model: str, token: int) -> Answer:
    """How a token came to be, and its neighbours among the embeddings."""
    vocabulary = models.model(model).vocabulary
    return {"token": vocabulary.describe(token), **vocabulary.merges(token)}


def neighbours(models: Models, model: str, token: int) -> Answer:
    """The tokens whose embeddings are nearest to a token's."""
    loaded = models.model(model)
    weights = loaded.model.get_input_embeddings().weight
    if not 0 <= token < len(weights):
        raise DataError(f"there is no token {token}")
    with loaded.lock:
        found = probe.neighbours(weights.detach(), token)
    rows = [{**loaded.vocabulary.describe(i), "cosine": cosine} for i, cosine in found]
    return {"token": loaded.vocabulary.describe(token), "rows": rows}


def odds(
    models: Models, model: str, text: str, at: int, shaping: Answer, chat: bool = False
) -> Answer:
    """What comes behind token `at`, before and after shaping."""
    loaded = models.model(model)
    ids = _ids(loaded, text, chat)
    _check_place(ids, at)
    found = probe.odds(loaded.logits(ids)[at], ids[: at + 1], Shaping(**shaping))
    for row in found["rows"]:
        row |= loaded.vocabulary.describe(row["id"])
    follows = ids[at + 1] if at + 1 < len(ids) else None
    return {**found, "follows": follows, "tokens": _described(loaded, ids)}


def attention(
    models: Models, model: str, text: str, layer: int, head: int, at: int, to: int,
    chat: bool = False,
) -> Answer:  # fmt: skip
    """One head over the text, how much each head of each layer looks from `at` to `to`, and the
    arithmetic of that pair.

    layer -1: the head that looks hardest at a token further back. to -1: what it looks at most.
    """
    loaded = models.model(model)
    ids = _ids(loaded, text, chat)
    _check_place(ids, at)
    if len(ids) > probe_attention.MAX_TOKENS:
        raise DataError(
            f"attention is drawn of at most {probe_attention.MAX_TOKENS} tokens; these are {len(ids)}"
        )
    found = loaded.attention(ids)
    if not len(found):
        raise DataError(f"{loaded.model.config.model_type}: this model does not show attention")
    if layer < 0:
        layer, head = probe_attention.hardest(found, at)
    layer = min(layer, len(found) - 1)
    weights_ATT = found.weights_of(layer)
    head = min(head, weights_ATT.shape[0] - 1)
    to = probe_attention.most_seen(weights_ATT[head, at], at) if to < 0 else min(to, at)
    by_hand = probe_attention.by_hand(found.layers[layer], head, at, to) if found.layers else None
    return {
        "tokens": _described(loaded, ids),
        "layers": len(found),
        "heads": weights_ATT.shape[0],
        "layer": layer,
        "head": head,
        "at": at,
        "to": to,
        "weights": [[round(w, 4) for w in row] for row in weights_ATT[head].tolist()],
        "grid": [found.weights_of(i)[:, at, to].tolist() for i in range(len(found))],
        "by_hand": by_hand,
    }


def losses(models: Models, model: str, text: str, chat: bool = False) -> Answer:
    """How surprised the model is by each token."""
    loaded = models.model(model)
    ids = _ids(loaded, text, chat)
    vocabulary = loaded.vocabulary
    sizes = [len(vocabulary.raw(token)) for token in ids]
    found = probe.losses(loaded.logits(ids), ids, sizes)
    for row in found["rows"]:
        row["guess"] = None if row["guess"] is None else vocabulary.describe(row["guess"])
    return {**found, "tokens": _described(loaded, ids)}


def policy(
    models: Models, model: str, prompt: str, response: str | None = None, seed: int = 0,
    max_tokens: int = 120,
) -> Answer:  # fmt: skip
    """A response token by token as PPO sees it. response None: the policy writes it."""
    loaded = models.model(model)
    offered = loaded.offered
    absent: dict[str, str] = {}
    try:
        ppo = probe_policy.settings_of(offered)
    except Absent as error:
        absent["value"] = error.message
        ppo = PpoSettings()
    messages: list[Message] = [{"role": "user", "content": prompt}]
    ids = encode_prompt(loaded.tokenizer, messages)
    start = len(ids)
    if response is None:
        ids = ids + _written(loaded, ids, Shaping(ppo.temperature), seed, max_tokens)[0]
    else:
        ids = ids + encode_completion(loaded.tokenizer, response, eos=True)
    _check_length(loaded, ids)
    columns: dict[str, list[float]] = {}
    if offered.reference is None or offered.reference not in models.offered:
        absent["kl"] = f"{offered.name} has no reference model: only a policy is held near one"
    else:
        reference = models.model(offered.reference)
        kl = probe_policy.token_kl(
            loaded.logits(ids), reference.logits(ids), ids, start, ppo.temperature
        )
        columns |= {name: values.tolist() for name, values in kl.items()}
    own_score = None
    try:
        reward = models.reward(model)
        clip = ppo.score_clip
        own_score = probe_policy.score(reward, loaded.tokenizer, ids, start, clip)
    except Absent as error:
        absent["score"] = error.message
    critic_update = None
    if "value" not in absent:
        try:
            critic = models.critic(model)
            critic_update = critic.update
            columns["value"] = critic.values(ids, start, int(loaded.tokenizer.pad_token_id))
        except Absent as error:
            absent["value"] = error.message
    if "value" in columns and "k1" in columns and own_score is not None:
        columns |= probe_policy.ppo_numbers(
            ppo, kl["k1"], columns["value"], own_score["clipped"], bool(own_score["is_cut"])
        )
    others = [*ppo.rules, *(ppo.reward_models or ())]
    return {
        "tokens": _described(loaded, ids),
        "prompt_tokens": start,
        "columns": columns,
        "score": own_score,
        "absent": absent,
        "reference": offered.reference,
        "critic_update": critic_update,
        "other_rewards": len(others),
        "kl_coef": ppo.kl_coef,
        "gamma": ppo.gamma,
        "lam": ppo.lam,
    }


def stages(
    models: Models, names: list[str], text: str, shaping: Answer, seed: int, max_tokens: int,
    chat: bool = False,
) -> Answer:  # fmt: skip
    """The same text before each of several models: the likeliest next tokens, and how they go on."""
    rows = []
    for name in names:
        loaded = models.model(name)
        ids = _ids(loaded, text, chat)
        found = probe.odds(loaded.logits(ids)[-1], ids, Shaping(), count=5)
        top = [{**row, **loaded.vocabulary.describe(row["id"])} for row in found["rows"]]
        continued, said, ended = _written(loaded, ids, Shaping(**shaping), seed, max_tokens)
        rows.append(
            {
                "model": name,
                "top": top,
                "entropy": found["entropy_before"],
                "text": said,
                "tokens": len(continued),
                "ended": ended,
            }
        )
    return {"rows": rows}


def chat(
    models: Models, model: str, messages: list[Message], shaping: Answer, seed: int,
    max_tokens: int,
) -> Iterator[Answer]:  # fmt: skip
    """An assistant's turn as it is written: one answer after each token."""
    loaded = models.model(model)
    prompt = encode_prompt(loaded.tokenizer, messages)
    room = _room(loaded, len(prompt), max_tokens)
    turn = sum(message["role"] == "user" for message in messages)
    said = speak(
        loaded.model, loaded.tokenizer, prompt, Shaping(**shaping),
        seed_for(seed, "chat", turn), room, loaded.lock,
    )  # fmt: skip
    for so_far in said:
        yield {
            "text": so_far.text,
            "tokens": len(so_far.tokens),
            "ended": so_far.ended,
            "seconds": round(so_far.seconds, 3),
            "prompt_tokens": len(prompt),
            "full": room < max_tokens,
        }


QUESTIONS: dict[str, Callable[..., Answer]] = {
    question.__name__: question
    for question in (load, tokens, merges, neighbours, odds, attention, losses, policy, stages)
}
STREAMS: dict[str, Callable[..., Iterator[Answer]]] = {"chat": chat}


# ---- parts ---------------------------------------------------------------------------------


def _ids(loaded: Loaded, text: str, chat: bool) -> list[int]:
    if chat:
        ids = encode_prompt(loaded.tokenizer, [{"role": "user", "content": text}])
    else:
        ids = list(loaded.tokenizer(text)["input_ids"])
    if not ids:
        raise DataError("There is no text to look at.")
    _check_length(loaded, ids)
    return ids


def _check_length(loaded: Loaded, ids: list[int]) -> None:
    most = min(MAX_TOKENS, positions(loaded.model) or MAX_TOKENS)
    if len(ids) > most:
        raise DataError(f"The text has {len(ids)} tokens; at most {most} can be looked at.")


def _check_place(ids: list[int], at: int) -> None:
    if not 0 <= at < len(ids):
        raise DataError(f"There is no token {at}: the text has {len(ids)}.")


def _described(loaded: Loaded, ids: list[int]) -> list[Answer]:
    return [loaded.vocabulary.describe(token) for token in ids]


def _room(loaded: Loaded, prompt_tokens: int, max_tokens: int) -> int:
    limit = positions(loaded.model)
    wanted = min(max_tokens, _MOST_NEW_TOKENS)
    room = wanted if limit is None else min(wanted, limit - prompt_tokens)
    if room < 1:
        raise DataError(
            f"The conversation has {prompt_tokens} tokens, and {loaded.offered.name} reads {limit}:"
            " there is no room for an answer. Begin anew."
        )
    return room


def _written(
    loaded: Loaded, prompt: list[int], shaping: Shaping, seed: int, max_tokens: int
) -> tuple[list[int], str, bool]:
    """Tokens, text, and whether it ended by itself."""
    room = _room(loaded, len(prompt), max_tokens)
    said = None
    seed = seed_for(seed, "chat", 1)
    for so_far in speak(loaded.model, loaded.tokenizer, prompt, shaping, seed, room, loaded.lock):
        said = so_far
    assert said is not None
    return said.tokens, said.text, said.ended
