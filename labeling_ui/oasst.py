"""Message trees of Open Assistant (OASST1 and OASST2, arXiv 2304.07327) as groups of ranked replies.

Either one tree a row (`prompt` with nested `replies`), or one message a row (`message_id`,
`parent_id`), as on the hub. What people answered to an assistant is ranked there too, but is no
response of a model: only the replies of the role `assistant` become a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipeline.records import Tally

_Rows = Iterator[tuple[str, Any]]


def expand(rows: _Rows, tally: Tally, notes: Counter[str]) -> _Rows:
    """The rows, with groups in the place of each tree; messages of a flat file come last.

    A flat file is held in memory: a reply may stand anywhere.
    """
    messages: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, row in rows:
        if _is_message(row):
            messages[row["message_id"]] = where, row
        elif _is_tree(row):
            yield from _groups(where, row["prompt"], notes)
        else:
            yield where, row
    for where, root in _trees(messages, tally):
        yield from _groups(where, root, notes)


def _is_message(row: Any) -> bool:
    return isinstance(row, dict) and {"message_id", "parent_id", "text", "role"} <= set(row)


def _is_tree(row: Any) -> bool:
    root = row.get("prompt") if isinstance(row, dict) else None
    return isinstance(root, dict) and isinstance(root.get("replies"), list)


def _trees(messages: dict[str, tuple[str, dict[str, Any]]], tally: Tally) -> _Rows:
    """The roots, each message with its `replies`."""
    nodes = {key: {**row, "replies": []} for key, (_, row) in messages.items()}
    roots = []
    for key, node in nodes.items():
        if node["parent_id"] is None:
            roots.append(key)
        elif node["parent_id"] in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
        else:
            tally.drop("its parent message is not in the file", messages[key][0])
    for key in roots:
        yield messages[key][0], nodes[key]


def _groups(where: str, root: dict[str, Any], notes: Counter[str]) -> _Rows:
    """A group for each message of a tree that has two ranked replies of an assistant."""
    waiting: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [(root, [])]
    while waiting:
        node, before = waiting.pop()
        prompt = [*before, {"role": node.get("role"), "content": node.get("text")}]
        replies = [reply for reply in node.get("replies") or [] if isinstance(reply, dict)]
        kept = [reply for reply in replies if reply.get("deleted") is not True]
        notes["deleted messages"] += len(replies) - len(kept)
        waiting += [(reply, prompt) for reply in reversed(kept)]
        answers = [reply for reply in kept if reply.get("role") == "assistant"]
        ranked = [reply for reply in answers if _rank(reply) is not None]
        if len(ranked) > 1:
            notes["replies without a rank"] += len(answers) - len(ranked)
            responses = [{"text": reply.get("text"), "rank": _rank(reply)} for reply in ranked]
            yield where, {"prompt": prompt, "responses": responses}
        elif answers:
            notes["messages whose replies are not ranked"] += 1


def _rank(reply: dict[str, Any]) -> int | None:
    rank = reply.get("rank")
    # a column with gaps is read as floating point
    if isinstance(rank, float) and rank.is_integer():
        return int(rank)
    return rank if type(rank) is int else None
