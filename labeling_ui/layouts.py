"""The field's layouts of preference data, read as one kind of row: responses with ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.formats import Unusable, clean_text, conversation, hh_turns
from pipeline.records import Message, content_id

_MAX_RESPONSES = 64
_SAID = ("all_bad", "comment", "confidence", "ideal")


@dataclass(frozen=True)
class Found:
    """One usable row. ranks[i] belongs to responses[i]: 1 is best, without gaps."""

    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    layout: str
    annotator: str | None = None
    round: int = 1
    notes: tuple[str, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)
    """What else our own export holds of it: marks by place in `responses`, comment, ..."""

    def response_id(self, i: int) -> str:
        return content_id("response", content_id("prompt", list(self.messages)), self.responses[i])


def parse(row: Any) -> Found:
    """The ranking in a row of any known layout.

    Raises:
        Unusable: with a reason in a few words.
    """
    if not isinstance(row, dict):
        raise Unusable("the row is not an object")
    if isinstance(row.get("responses"), list):
        return _group(row)
    if "chosen_messages" in row and "rejected_messages" in row:
        chosen = conversation(row["chosen_messages"])
        return _whole_conversations(chosen, conversation(row["rejected_messages"]), "sharegpt")
    if "chosen" in row and "rejected" in row:
        return _pair(row)
    if "output_1" in row and "output_2" in row:
        return _llmbar(row)
    if isinstance(row.get("label", row.get("kto_tag")), bool) or {"completion", "label"} <= set(
        row
    ):
        raise Unusable("an unpaired label (kto): a ranking needs two responses to one prompt")
    raise Unusable("no known layout of rankings or pairs")


def _group(row: dict[str, Any]) -> Found:
    # our own export, made with --all, has answers that do not count
    if isinstance(row.get("left_out"), str):
        raise Unusable(f"an answer that does not count ({row['left_out'][:30]})")
    prompt = row.get("messages", row.get("prompt"))
    messages = _prompt(prompt)
    texts, ranks, notes = [], [], []
    marks: dict[str, dict[str, Any]] = {}
    for i, item in enumerate(row["responses"]):
        is_object = isinstance(item, dict)
        rank = item.get("rank") if is_object else _listed(row.get("ranks"), i)
        if type(rank) is not int:
            raise Unusable("a response has no whole number as rank")
        text = item.get("text", item.get("content")) if is_object else item
        try:
            text = clean_text(text, "a response")
        except Unusable as error:
            # the others of the group are still a ranking
            notes.append(f"responses left out of their group ({error})")
            continue
        texts.append(text)
        ranks.append(rank)
        if is_object and (item.get("score") is not None or item.get("flags")):
            marks[text] = {"score": item.get("score"), "flags": item.get("flags") or []}
    annotator = row.get("annotator")
    if isinstance(annotator, str):
        # no database keeps a NUL, and a lone half of a pair is no text
        annotator = annotator.replace("\0", "").encode("utf-8", "replace").decode()
    round = row.get("round", 1)
    said = {key: row[key] for key in _SAID if row.get(key)}
    found = _ranked(
        messages,
        texts,
        ranks,
        "groups",
        annotator=annotator if isinstance(annotator, str) and annotator else None,
        round=round if type(round) is int and round >= 1 else 1,
        notes=notes,
    )
    if marks:
        said["marks"] = [marks.get(text, {}) for text in found.responses]
    return replace(found, said=said)


def _listed(ranks: Any, i: int) -> Any:
    return ranks[i] if isinstance(ranks, list) and i < len(ranks) else None


def _pair(row: dict[str, Any]) -> Found:
    chosen, rejected = row["chosen"], row["rejected"]
    if "conversations" in row:
        messages = _prompt(row["conversations"])
        return _ranked(
            messages, [_answer(chosen, "chosen"), _answer(rejected, "rejected")], [1, 2], "sharegpt"
        )
    prompt = row.get("prompt", row.get("instruction", row.get("question")))
    if isinstance(chosen, list) and isinstance(rejected, list):
        before = conversation(prompt) if isinstance(prompt, list) else []
        ends = conversation(chosen), conversation(rejected)
        # with a prompt column the lists hold the answer alone, or the whole conversation
        first, second = (end if end[: len(before)] == before else before + end for end in ends)
        if (
            isinstance(prompt, str)
            and first[:1] != [{"role": "user", "content": prompt}]
            and len(first) == 1
        ):
            before = [{"role": "user", "content": clean_text(prompt, "the prompt")}]
            first, second = before + first, before + second
        return _whole_conversations(first, second, "trl")
    if prompt is None:
        chosen, rejected = clean_text(chosen, "chosen"), clean_text(rejected, "rejected")
        if "\n\nHuman:" in chosen and "\n\nHuman:" in rejected:
            return _whole_conversations(_turns(chosen), _turns(rejected), "hh-rlhf")
        return _implicit_prompt(chosen, rejected)
    texts = [_answer(chosen, "chosen"), _answer(rejected, "rejected")]
    return _ranked(_prompt(prompt), texts, [1, 2], "trl")


def _llmbar(row: dict[str, Any]) -> Found:
    label = row.get("label")
    if str(label) not in ("1", "2"):
        raise Unusable("the label is neither 1 nor 2")
    texts = [_answer(row["output_1"], "output_1"), _answer(row["output_2"], "output_2")]
    return _ranked(
        _prompt(row.get("input")), texts, [1, 2] if str(label) == "1" else [2, 1], "llmbar"
    )


def _turns(text: str) -> list[Message]:
    """The turns of an hh-rlhf text, the last of them a response."""
    messages = hh_turns(text)
    # an empty last turn is a prompt to formats.py, but a missing response here
    if messages and messages[-1]["role"] != "assistant":
        raise Unusable("a response is empty")
    return messages


def _whole_conversations(chosen: list[Message], rejected: list[Message], layout: str) -> Found:
    """Two conversations that differ in their last turn only."""
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("a conversation does not end with an assistant turn")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("the conversations differ before their last turn")
    return _ranked(
        _prompt(chosen[:-1]), [chosen[-1]["content"], rejected[-1]["content"]], [1, 2], layout
    )


def _implicit_prompt(chosen: str, rejected: str) -> Found:
    """TRL's implicit prompt: what two texts have in common at the start, up to a word's end."""
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while end > 0 and not chosen[end - 1].isspace():
        end -= 1
    if not chosen[:end].strip():
        raise Unusable("no prompt: chosen and rejected have no beginning in common")
    messages = [{"role": "user", "content": chosen[:end].strip()}]
    texts = [_answer(chosen[end:], "chosen"), _answer(rejected[end:], "rejected")]
    return _ranked(messages, texts, [1, 2], "trl")


def _prompt(value: Any) -> list[Message]:
    """The conversation that waits for an answer."""
    if isinstance(value, str):
        return [{"role": "user", "content": clean_text(value, "the prompt")}]
    if not isinstance(value, list):
        raise Unusable("no prompt")
    messages = conversation(value)
    if messages[-1]["role"] != "user":
        raise Unusable("the prompt does not end with a user turn")
    return messages


def _answer(value: Any, what: str) -> str:
    if isinstance(value, list):
        if len(value) != 1:
            raise Unusable(f"{what} is not one turn")
        value = value[0]
    if isinstance(value, dict):
        turns = conversation([value])
        if turns[0]["role"] != "assistant":
            raise Unusable(f"{what} is not an assistant turn")
        return turns[0]["content"]
    return clean_text(value, what)


def _ranked(
    messages: Sequence[Message],
    texts: list[str],
    ranks: list[int],
    layout: str,
    annotator: str | None = None,
    round: int = 1,
    notes: Sequence[str] = (),
) -> Found:
    """Merge equal responses, close gaps between ranks."""
    if len(set(texts)) < 2:
        raise Unusable("fewer than 2 different responses")
    rank_of: dict[str, int] = {}
    merged = list(notes)
    for text, rank in zip(texts, ranks, strict=True):
        if rank_of.get(text, rank) != rank:
            raise Unusable("the same response has two ranks")
        if text in rank_of:
            merged.append("equal responses merged")
        rank_of[text] = rank
    if len(rank_of) > _MAX_RESPONSES:
        raise Unusable(f"more than {_MAX_RESPONSES} responses")
    place = {rank: i for i, rank in enumerate(sorted(set(rank_of.values())), 1)}
    return Found(
        messages=tuple(messages),
        responses=tuple(rank_of),
        ranks=tuple(place[rank] for rank in rank_of.values()),
        layout=layout,
        annotator=annotator,
        round=round,
        notes=tuple(merged),
    )
