"""A small text world for the demo: animals with a trait and a problem, told in short stories. Stdlib only.

Everything is a pure function of (count, seed): document i of a seed is the same whatever the count.

    stories(count, seed)         pretraining documents; a share carries a request in front of the story
    demonstrations(count, seed)  prompt and completion for sft, of MIXED quality: see FLAW_RATES
    prompts(split)               instructions for sampling, ranking, PPO and evaluation
    parse(text), skeleton(text)  the world's grammar, backwards: sentences, and text without its names and things

What is held out. A request names a hero, an animal, a trait, an object and a problem. The three pairs
(animal, object), (animal, trait) and (animal, hero) each belong to exactly one split, and all three pairs of a
request belong to the same one. So no pair of a validation or test prompt occurs in a train prompt, in a
demonstration's prompt, in a pretraining document's request, or in the other held-out split. Every single word and
every phrasing does occur in training: what is tested is putting known parts together anew.
A story that is told wrongly on purpose (wrong_hero, wrong_animal, wrong_problem) may contain any pair.
"""

import random
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import NamedTuple

VERSION = 3  # raised when the same calls give other text; a test pins the text

# A word stands in one list only and is never a fixed word of a sentence: parse() depends on it.
SLOTS = {
    slot: words.split()
    for slot, words in {
        "hero": "Mia Tom Lily Ben Rosa Max Nora Sam Ruby Leo Zoe Finn "
        "Clara Hugo Tess Otto Maya Jack Nina Paul Vera Gus Dora Karl",
        "animal": "fox rabbit bear mouse frog hen duck goat cat wolf pig deer mole badger turtle squirrel",
        "trait": "shy brave curious lazy clumsy proud hungry polite",
        "object": "kite drum lamp bell cup boat clock flute basket ring mirror bowl whistle puppet sled ladder",
        "place": "forest meadow valley hill garden village farm lake beach mountain",
        "helper": "owl crow beaver heron moose toad otter robin",
    }.items()
}

PROBLEMS = {  # problem -> how a request says it
    "lost": "lost a {object}",
    "broke": "broke a {object}",
    "dropped": "dropped a {object} in the water",
    "wanted": "wanted a {object}",
    "stuck": "got a {object} stuck in a tree",
}
PROMPT_TEMPLATES = (
    "Write a story about a {trait} {animal} named {hero} who PROBLEM.",
    "Tell me a story about {hero}, a {trait} {animal} who PROBLEM.",
    "Please write a short story: a {trait} {animal} called {hero} PROBLEM.",
    "I want a story about {hero} the {animal}. {hero} is {trait} and PROBLEM.",
    "Can you tell a tale of {hero}, who PROBLEM? {hero} is a {trait} {animal}.",
    "Story time! A {animal} named {hero} PROBLEM. Make {hero} {trait}.",
)
TITLE_TEMPLATES = (  # how requests look in the pretraining text, besides the prompts' own phrasings
    "A story about {hero} the {trait} {animal} who PROBLEM.",
    "The tale of a {trait} {animal} named {hero} who PROBLEM.",
    "How {hero} the {trait} {animal} PROBLEM.",
)

SENTENCES = {  # kind -> the ways to say it; no sentence has a sentence end inside, and no slot twice
    "opening": (  # none begins with the hero: a name without a space in front is another, rare token
        "Once there was a {animal} named {hero}.",
        "Long ago a {animal} named {hero} lived in the {place}.",
        "Near the {place} lived a {animal} called {hero}.",
        "A {animal} called {hero} had a home by the {place}.",
        "In the {place} lived a {animal} named {hero}.",
        "There once was a little {animal} called {hero}.",
    ),
    "trait:shy": (
        "{hero} hid behind a tree when others came by.",
        "{hero} always spoke in a very small voice.",
        "{hero} looked at the ground and turned red.",
    ),
    "trait:brave": (
        "{hero} was never afraid of the dark.",
        "{hero} stood tall when the thunder came.",
        "{hero} walked first into every cave.",
    ),
    "trait:curious": (
        "{hero} looked under every stone.",
        "{hero} asked a hundred questions each day.",
        "{hero} had to peek into every hole.",
    ),
    "trait:lazy": (
        "{hero} slept until noon every day.",
        "{hero} let the others do all the work.",
        "{hero} lay in the grass and did nothing.",
    ),
    "trait:clumsy": (
        "{hero} always tripped over every root.",
        "{hero} bumped into the gate twice a day.",
        "{hero} fell into the mud again and again.",
    ),
    "trait:proud": (
        "{hero} told all that nobody was better.",
        "{hero} walked with the nose in the air.",
        "{hero} loved to win and to be seen.",
    ),
    "trait:hungry": (
        "{hero} thought about food all the time.",
        "{hero} ate three cakes before noon.",
        "{hero} could smell a pie from far away.",
    ),
    "trait:polite": (
        "{hero} always said please and thank you.",
        "{hero} held the door for everyone.",
        "{hero} let all the others go first.",
    ),
    "problem:lost": (
        "One day {hero} lost a {object} in the {place}.",
        "One morning {hero} could not find the {object}.",
        "On the way home {hero} lost a {object}.",
    ),
    "problem:broke": (
        "One day {hero} broke a {object}.",
        "By mistake {hero} stepped on a {object} and broke it.",
        "Then {hero} shook the {object} too hard and broke it.",
    ),
    "problem:dropped": (
        "One day {hero} dropped a {object} into the pond.",
        "By mistake {hero} let a {object} fall into the river.",
        "Then {hero} slipped and the {object} sank in the well.",
    ),
    "problem:wanted": (
        "One day {hero} saw a {object} and wanted one too.",
        "More than anything {hero} wanted a {object}.",
        "All week {hero} dreamed of a new {object}.",
    ),
    "problem:stuck": (
        "One day {hero} got a {object} stuck in a tree.",
        "Then {hero} threw the {object} up and it got stuck.",
        "By mistake {hero} left a {object} high in a tree.",
    ),
    "feeling": (
        "{hero} felt very sad.",
        "{hero} sat down and cried.",
        "{hero} was worried all day long.",
        "{hero} sighed and felt all alone.",
        "The poor {animal} felt like crying.",
    ),
    "dialogue": (
        '"I will help you," said the {helper}.',
        '"Do not give up, {hero}," said the {helper}.',
        '"What is wrong, {hero}?" asked the {helper}.',
        '"Please help me," said {hero} to the {helper}.',
        '"We can do it together," said the {helper}.',
        '"I will try again," said {hero}.',
    ),
    "solution:lost": (
        "At last {hero} found the {object} under a leaf.",
        "The {helper} found the {object} behind a rock.",
        "Together they found the {object} in the tall grass.",
    ),
    "solution:broke": (
        "At last {hero} mended the {object} with string.",
        "The {helper} fixed the {object} with some glue.",
        "Together they made the {object} as good as new.",
    ),
    "solution:dropped": (
        "At last {hero} pulled the {object} out with a stick.",
        "The {helper} dived down and got the {object} back.",
        "Together they lifted the {object} out with a net.",
    ),
    "solution:wanted": (
        "At last {hero} made a {object} out of wood.",
        "The {helper} gave {hero} a {object} as a gift.",
        "Together they built a {object} from old boxes.",
    ),
    "solution:stuck": (
        "At last {hero} climbed up and got the {object} down.",
        "The {helper} shook the branch until the {object} fell.",
        "Together they reached the {object} with a long pole.",
    ),
    "failed": (
        "{hero} tried and tried but it was no use.",
        "{hero} looked at the {object} and did nothing.",
        "In the end {hero} forgot about the {object}.",
        "The {helper} came by but could not help.",
    ),
    "ending": (
        "{hero} learned that friends make hard things easy.",
        "From then on {hero} never gave up.",
        "That night {hero} slept with a smile.",
        "And {hero} was happy ever after.",
        "{hero} learned to ask for help.",
        "{hero} laughed with joy and danced home.",
        "It was the best day ever for the happy {animal}.",
    ),
    "filler": (
        "The sun was warm and bright.",
        "A soft wind moved the leaves.",
        "Small clouds drifted over the {place}.",
        "Bees hummed among the flowers.",
        "Rain had made the path wet.",
        "The {place} was quiet that day.",
        "Birds sang in the trees.",
        "Snow lay on the {place}.",
        "The grass smelled sweet and green.",
        "It was the first day of spring.",
    ),
}

# How often a demonstration has each flaw; the flaws are independent of each other.
FLAW_RATES = {
    "wrong_hero": 0.12,  # the story is about somebody else
    "wrong_animal": 0.12,  # the hero is another animal
    "wrong_problem": 0.20,  # another object and another problem
    "no_trait": 0.40,  # the trait is never shown
    "no_feeling": 0.40,  # nobody minds the problem
    "no_dialogue": 0.45,  # nobody speaks
    "unsolved": 0.40,  # the problem stays
    "no_ending": 0.40,  # the story just stops
    "repeats": 0.30,  # a sentence stands there twice
    "changes_hero": 0.20,  # the hero has another name from some sentence on
}
LEAVES_OUT = {  # flaw -> the part that it takes out of the story
    "no_trait": "trait",
    "no_feeling": "feeling",
    "no_dialogue": "dialogue",
    "unsolved": "solution",
    "no_ending": "ending",
}
REQUEST_SHARE = 0.8  # share of the pretraining documents that carry a request
LEFT_OUT_SHARE = 0.25  # how often a pretraining story does without each part of LEAVES_OUT
REPLACED_SHARE = 0.9  # how often a part left out is replaced: keeps length and quality apart
SPLIT_SIZES = {"train": 2000, "validation": 160, "test": 480}
_SPLIT_OF_CELL = ("train",) * 6 + ("validation", "test")

_SLOT_OF_WORD = {word: slot for slot, words in SLOTS.items() for word in words}
_KIND_OF_PATTERN = {pattern: kind for kind, patterns in SENTENCES.items() for pattern in patterns}
_PROBLEM_OF_PATTERN = {
    template.replace("PROBLEM", phrase): problem
    for template in PROMPT_TEMPLATES + TITLE_TEMPLATES
    for problem, phrase in PROBLEMS.items()
}


class Request(NamedTuple):
    """What a story is asked to be about."""

    hero: str
    animal: str
    trait: str
    object: str
    problem: str


class Sentence(NamedTuple):
    """A sentence as the world's grammar sees it; kind is "" when it is not a sentence of this world."""

    text: str
    pattern: str
    kind: str
    slots: dict[str, str]


def stories(count: int, seed: int) -> Iterator[str]:
    """Pretraining documents: sound stories that differ in their parts, most of them with their request in front."""
    for index in range(count):
        rng = random.Random(f"{VERSION}/stories/{seed}/{index}")
        request = _draw_request(rng, "train")
        left_out = frozenset(flaw for flaw in LEAVES_OUT if rng.random() < LEFT_OUT_SHARE)
        text = tell(request, rng, left_out)
        if rng.random() < REQUEST_SHARE:
            text = f"{phrase(request, rng.choice(TITLE_TEMPLATES + PROMPT_TEMPLATES))}\n{text}"
        yield text


def demonstrations(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Prompts of the train split, each with a completion that has every flaw of FLAW_RATES at its rate."""
    for index in range(count):
        rng = random.Random(f"{VERSION}/demonstrations/{seed}/{index}")
        request = _draw_request(rng, "train")
        flaws = frozenset(flaw for flaw, rate in FLAW_RATES.items() if rng.random() < rate)
        yield {
            "prompt": phrase(request, rng.choice(PROMPT_TEMPLATES)),
            "completion": tell(request, rng, flaws),
        }


def prompts(split: str) -> list[dict[str, str]]:
    """The distinct instructions of one split: train, validation or test."""
    if split not in SPLIT_SIZES:
        raise ValueError(
            f"no split {split!r} in the demo world; there are: {', '.join(SPLIT_SIZES)}"
        )
    rng = random.Random(f"{VERSION}/prompts/{split}")
    texts: dict[str, None] = {}
    while len(texts) < SPLIT_SIZES[split]:
        texts[phrase(_draw_request(rng, split), rng.choice(PROMPT_TEMPLATES))] = None
    return [
        {"id": f"{split}-{index:04d}", "prompt": text, "split": split}
        for index, text in enumerate(texts)
    ]


def phrase(request: Request, template: str) -> str:
    """The request in words."""
    return template.replace("PROBLEM", PROBLEMS[request.problem]).format(**request._asdict())


def tell(request: Request, rng: random.Random, flaws: AbstractSet[str] = frozenset()) -> str:
    """A story that answers the request, with exactly the flaws given (names of FLAW_RATES)."""
    told = _misread(request, rng, flaws)
    patterns = _choose_patterns(told, rng, flaws)
    names = [told.hero] * len(patterns)
    if "changes_hero" in flaws:
        naming = [index for index, pattern in enumerate(patterns) if index and "{hero}" in pattern]
        change = rng.choice(naming)
        names[change:] = [_another(SLOTS["hero"], told.hero, rng)] * (len(patterns) - change)
    if "repeats" in flaws:
        twice = rng.randrange(1, len(patterns))
        patterns.insert(twice, patterns[twice])
        names.insert(twice, names[twice])
    slots = {"animal": told.animal, "object": told.object}
    slots |= {slot: rng.choice(SLOTS[slot]) for slot in ("place", "helper")}
    return " ".join(
        pattern.format(hero=name, **slots) for pattern, name in zip(patterns, names, strict=True)
    )


def parse_request(text: str) -> Request | None:
    """The request that a prompt or a title makes, or None when it is not one of this world's."""
    pattern, slots = _mask(text.strip())
    problem = _PROBLEM_OF_PATTERN.get(pattern)
    if problem is None or any(len(set(words)) > 1 for words in slots.values()):
        return None
    return Request(problem=problem, **{slot: words[0] for slot, words in slots.items()})


def parse(text: str) -> list[Sentence]:
    """The sentences of any text, each with its kind."""
    sentences = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if text.strip() else ():
        pattern, words = _mask(sentence)
        slots = {slot: first for slot, (first, *_) in words.items()}
        sentences.append(Sentence(sentence, pattern, _KIND_OF_PATTERN.get(pattern, ""), slots))
    return sentences


def skeleton(text: str) -> str:
    """The text with its heroes, animals, objects, places and helpers taken out: what is left is how it is told."""
    return " ".join(sentence.pattern for sentence in parse(text))


def _mask(text: str) -> tuple[str, dict[str, list[str]]]:
    """The text with each word of a list replaced by {list}, and the words that were replaced."""
    slots: dict[str, list[str]] = {}

    def replace(match: re.Match[str]) -> str:
        word = match.group()
        slot = _SLOT_OF_WORD.get(word)
        if slot is None:
            return word
        slots.setdefault(slot, []).append(word)
        return f"{{{slot}}}"

    # a brace in the text must not look like one of ours
    return re.sub(r"\w+", replace, text.replace("{", "(")), slots


def _draw_request(rng: random.Random, split: str) -> Request:
    """A request whose three pairs all belong to the split: the animal first, then what may go with it."""
    animal = rng.randrange(len(SLOTS["animal"]))

    def fitting(slot: str) -> str:
        return rng.choice(
            [
                word
                for i, word in enumerate(SLOTS[slot])
                if _SPLIT_OF_CELL[(animal + i) % 8] == split
            ]
        )

    problem = rng.choice(list(PROBLEMS))
    return Request(
        fitting("hero"), SLOTS["animal"][animal], fitting("trait"), fitting("object"), problem
    )


def _misread(request: Request, rng: random.Random, flaws: AbstractSet[str]) -> Request:
    """The request as a careless teller remembers it."""
    told = request
    if "wrong_hero" in flaws:
        told = told._replace(hero=_another(SLOTS["hero"], told.hero, rng))
    if "wrong_animal" in flaws:
        told = told._replace(animal=_another(SLOTS["animal"], told.animal, rng))
    if "wrong_problem" in flaws:
        thing, problem = (
            _another(SLOTS["object"], told.object, rng),
            _another(list(PROBLEMS), told.problem, rng),
        )
        told = told._replace(object=thing, problem=problem)
    return told


def _choose_patterns(told: Request, rng: random.Random, flaws: AbstractSet[str]) -> list[str]:
    """The sentence patterns of a story, in order: its parts, what stands in for those left out, and scenery."""
    early, late = ["trait", "problem"], ["feeling", "dialogue"]
    rng.shuffle(early)
    rng.shuffle(late)
    left_out = {LEAVES_OUT[flaw] for flaw in flaws if flaw in LEAVES_OUT}
    kinds = ["opening"]
    for part in (*early, *late, "solution", "ending"):
        if part not in left_out:
            kinds.append({"trait": f"trait:{told.trait}"}.get(part, part))
        elif rng.random() < REPLACED_SHARE:
            kinds.append(
                rng.choice(("failed", "failed", "filler")) if part == "solution" else "filler"
            )
    for _ in range(rng.choice((0, 0, 1, 1))):
        # never behind the ending: a story that has one stops there
        kinds.insert(rng.randrange(1, len(kinds)), "filler")
    scenery = iter(rng.sample(SENTENCES["filler"], len(SENTENCES["filler"])))
    patterns = []
    for kind in kinds:
        if kind in ("problem", "solution"):
            kind = f"{kind}:{told.problem}"
        patterns.append(next(scenery) if kind == "filler" else rng.choice(SENTENCES[kind]))
    return patterns


def _another(words: list[str], word: str, rng: random.Random) -> str:
    return rng.choice([other for other in words if other != word])
