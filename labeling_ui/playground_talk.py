"""Conversations with several models at once, and how a comparison becomes a task for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from labeling_ui.candidates import to_rank
from labeling_ui.forms import Refused
from labeling_ui.queueing import queue_row
from labeling_ui.store import Store
from pipeline.formats import Unusable
from pipeline.records import Message

OWN = "its own answers"
ORIGIN = "chat"
"""`tasks.origin` of what was saved here; tasks of a sample step have the digest of the samples."""


@dataclass
class Answer:
    """What one model said in a turn. messages: what it answered. state: writing | done | cut (by the
    limit of tokens) | stopped (by the person) | failed."""

    messages: list[Message]
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    state: str = "writing"
    note: str = ""


@dataclass
class Turn:
    """What a person said, and what each model answered, by its name."""

    prompt: str
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def writing(self) -> bool:
        return any(answer.state == "writing" for answer in self.answers.values())


@dataclass
class Talk:
    """A conversation of one person with several models; sampling: of the last turn, for the record."""

    turns: list[Turn] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)

    def messages_for(self, name: str, prompt: str, shared: str = OWN) -> list[Message]:
        """What model `name` reads: its earlier turns, or those of model `shared`, and the new prompt.

        Turns in which that model said nothing are left out.
        """
        whose = name if shared == OWN else shared
        messages: list[Message] = []
        for turn in self.turns:
            answer = turn.answers.get(whose)
            if answer is not None and answer.text:
                messages.append({"role": "user", "content": turn.prompt})
                messages.append({"role": "assistant", "content": answer.text})
        return [*messages, {"role": "user", "content": prompt}]

    def stop(self) -> None:
        """What is being written stays as it is."""
        for turn in self.turns:
            for answer in turn.answers.values():
                if answer.state == "writing":
                    answer.state = "stopped"

    def clear(self) -> None:
        """Begin anew; whoever still writes into the old turns is stopped."""
        self.stop()
        self.turns.clear()
        self.sampling.clear()

    def comparison(self, version_of: Any) -> dict[str, Any]:
        """The last turn as a row of prompt and responses.

        version_of: model name -> the name that the store keeps, which people who rank never see.

        Raises:
            Refused: there is nothing to compare; why.
        """
        if not self.turns:
            raise Refused("There is nothing to save yet: send a prompt first.")
        answers = self.turns[-1].answers
        if any(answer.state == "writing" for answer in answers.values()):
            raise Refused("The models are still writing. Save when they are done, or stop them.")
        said = {
            name: answer
            for name, answer in answers.items()
            if answer.state in ("done", "cut") and answer.text.strip()
        }
        if len(said) < 2:
            raise Refused("A comparison takes finished answers of at least two models.")
        prompts = [answer.messages for answer in said.values()]
        if any(messages != prompts[0] for messages in prompts):
            raise Refused(
                "The models have read different conversations, so that their answers cannot be ranked"
                " against each other. Choose one model's answers under “Earlier turns” before you"
                " send, or begin anew."
            )
        if len({answer.text for answer in said.values()}) < 2:
            raise Refused("The answers are all the same: there is nothing to rank.")
        responses = [
            {"text": answer.text, "model": version_of(name)} for name, answer in said.items()
        ]
        return {"messages": prompts[0], "responses": responses}


def save(store: Store, row: dict[str, Any], sampling: dict[str, Any]) -> bool:
    """Queue a comparison for people, beside other prompts brought by hand; whether it is new.

    It waits in the standing queue `extra`, so that people who rank are handed it whatever the round,
    and it says where it comes from by its `origin`. What is ranked counts like every ranking of that
    queue: exports hold it, and the next rank step learns from it. Saving it again changes nothing.

    Raises:
        Refused: the texts cannot be ranked; why.
    """
    notes: Counter[str] = Counter()
    try:
        found = to_rank(row, notes)
    except Unusable as error:
        raise Refused(f"This cannot be ranked: {error}.") from None
    return queue_row(store, found, ORIGIN, sampling)
