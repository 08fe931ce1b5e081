"""What an import looks at before people do: size, characters that cannot be seen, and identity words.

Responses are ranked blind. One that says which model wrote it is kept, because models do say so,
and the lead is told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.formats import Unusable, clean_text
from pipeline.records import Message

MAX_RESPONSE = 50_000
MAX_PROMPT = 200_000
"""Characters of one response, and of all turns of a prompt."""

# those that no text needs: a page cannot show them, and databases refuse the first
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# they turn the direction of the text around them: honest in Hebrew, a disguise elsewhere
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
_PHRASES = (
    r"as an? (?:ai|artificial intelligence)(?: language)?(?: model| assistant)?",
    r"as a (?:large )?language model",
    r"i(?: am|'m|’m) an? (?:ai|artificial intelligence|(?:large )?language model)",
    r"my (?:knowledge cut-?off|training data)",
)
# no ordinary words: each says who wrote it wherever it stands
_NAMES = (
    r"chat ?gpt|gpt-?[2345](?:\.\d)?(?:-?turbo|o)?|openai|anthropic|google ai|deepmind|"
    r"mistral ai|deepseek|qwen\d*|tongyi qianwen|open ?assistant|vicuna|alpaca-\d+b|"
    r"llama-?[234]|meta ai|microsoft copilot|hugging ?face|cohere|baidu|ernie bot|chatglm\d*|xai"
)
# ordinary words and first names: only where the text introduces itself
_FIRST_NAMES = r"claude|gemini|bard|llama|mistral|falcon|phi|grok|copilot|bing|alpaca|command"
_INTRODUCTION = r"(?:i am|i'm|i’m|my name is|this is|call me|you can call me)"
_IDENTITY = re.compile(
    rf"(?<!\w)(?:{'|'.join(_PHRASES)}|{_NAMES}|{_INTRODUCTION} (?:{_FIRST_NAMES}))(?!\w)",
    re.IGNORECASE,
)


def clean(text: object, what: str, longest: int) -> str:
    """A text that a database keeps and a page shows; control characters become U+FFFD.

    Raises:
        Unusable: no text, empty, no valid Unicode, or too long.
    """
    kept = clean_text(text, what)
    if len(kept) > longest:
        raise Unusable(f"{what} has more than {longest:,} characters")
    return _CONTROL.sub("\ufffd", kept.replace("\r\n", "\n"))


def identity_words(response: str, messages: Sequence[Message]) -> list[str]:
    """What gives away which model wrote `response`; words that the prompt itself has do not."""
    asked = " ".join(message["content"] for message in messages).lower()
    found = dict.fromkeys(match.group().lower() for match in _IDENTITY.finditer(response))
    return [word for word in found if word not in asked]


def warnings(messages: Sequence[Message], responses: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, sentence for the lead) of everything that is odd about the texts of one task."""
    found = []
    for number, text in enumerate(responses, 1):
        if words := identity_words(text, messages):
            sentence = f"response {number} may say what wrote it: {', '.join(words)}"
            found.append(("identity words", sentence))
    texts = [("the prompt", "\n".join(message["content"] for message in messages))]
    texts += [(f"response {number}", text) for number, text in enumerate(responses, 1)]
    for what, text in texts:
        if _BIDI.search(text):
            sentence = f"{what} has characters that turn the direction of the text"
            found.append(("direction characters", sentence))
        if "\ufffd" in text:
            found.append(("broken characters", f"{what} has characters that cannot be shown"))
    return found
