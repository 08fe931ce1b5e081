"""The hidden rubric of the demo world: what its simulated annotators like, and what the demo is judged by.

HIDDEN: only labeling_ui.simulate and stages.evaluate import it; no training stage sees it.
Nothing here looks at length.

The rules, for any text:
- A prompt that is not one of the demo world's has no request, so every adherence quality is 0.
- A response without a single sentence has every quality 0, so its score is 0.
- A sentence that is not one of the world's counts for nothing, except against well_formed and,
  said twice, against no_repeats.
"""

from pipeline.demo_world import Request, Sentence, parse, parse_request

QUALITIES: dict[str, float] = {  # name -> weight
    "hero": 1.5,  # the first hero named is the one asked for
    "animal": 1.5,  # the first hero's animal is the one asked for
    "trait": 1.5,  # a sentence shows the trait asked for, and none shows another
    "problem": 1.5,  # the problem is the one asked for (half), with the object asked for (half)
    "feeling": 1.0,  # somebody minds
    "dialogue": 1.5,  # somebody speaks
    "solved": 1.5,  # the story's own problem is solved, after it came up
    "ending": 1.5,  # the last sentence is a lesson or a happy end
    "no_repeats": 1.5,  # no sentence and no step of the plot comes twice
    "consistent": 1.0,  # one hero, one animal, one thing from start to end
    "well_formed": 1.0,  # the share of sentences that belong to the world's grammar
}
PROMPT_ADHERENCE: tuple[str, ...] = ("hero", "animal", "trait", "problem")


def score(prompt: str, response: str) -> float:
    """The weighted mean of the qualities, in [0, 1]."""
    values = qualities(prompt, response)
    total = sum(weight * values[name] for name, weight in QUALITIES.items())
    return total / sum(QUALITIES.values())


def qualities(prompt: str, response: str) -> dict[str, float]:
    """Each quality of QUALITIES in [0, 1], for any two texts."""
    sentences = parse(response)
    if not sentences:
        return dict.fromkeys(QUALITIES, 0.0)
    request = parse_request(prompt)
    known = [sentence for sentence in sentences if sentence.kind]
    kinds = [sentence.kind for sentence in known]
    adherence = _adherence(request, known) if request else dict.fromkeys(PROMPT_ADHERENCE, 0.0)
    return adherence | {
        "feeling": float("feeling" in kinds),
        "dialogue": float("dialogue" in kinds),
        "solved": float(_is_solved(known)),
        "ending": float(sentences[-1].kind == "ending"),
        "no_repeats": float(bool(known) and not _repeats(sentences)),
        "consistent": float(_is_consistent(known)),
        "well_formed": len(known) / len(sentences),
    }


def well_formed(response: str) -> bool:
    """Whether the response is sentences of the world's grammar and nothing else."""
    sentences = parse(response)
    return bool(sentences) and all(sentence.kind for sentence in sentences)


def _adherence(request: Request, known: list[Sentence]) -> dict[str, float]:
    shown = {sentence.kind for sentence in known if sentence.kind.startswith("trait:")}
    problem = _first_problem(known)
    right_problem = problem is not None and problem.kind == f"problem:{request.problem}"
    right_object = problem is not None and problem.slots["object"] == request.object
    return {
        "hero": float(_first("hero", known) == request.hero),
        "animal": float(_first("animal", known) == request.animal),
        "trait": float(shown == {f"trait:{request.trait}"}),
        "problem": (right_problem + right_object) / 2,
    }


def _first(slot: str, known: list[Sentence]) -> str | None:
    return next((sentence.slots[slot] for sentence in known if slot in sentence.slots), None)


def _first_problem(known: list[Sentence]) -> Sentence | None:
    return next((sentence for sentence in known if sentence.kind.startswith("problem:")), None)


def _is_solved(known: list[Sentence]) -> bool:
    """A solution counts only for the problem and the object that the story told of, and only after them."""
    problem = _first_problem(known)
    if problem is None:
        return False
    solution = problem.kind.replace("problem:", "solution:")
    return any(
        sentence.kind == solution and sentence.slots["object"] == problem.slots["object"]
        for sentence in known[known.index(problem) :]
    )


def _repeats(sentences: list[Sentence]) -> bool:
    """Scenery may come several times in different words; every other step of the plot only once."""
    steps = [s.pattern if s.kind in ("filler", "") else s.kind.split(":")[0] for s in sentences]
    return len(set(steps)) < len(steps)


def _is_consistent(known: list[Sentence]) -> bool:
    def told(slot: str) -> int:
        return len({sentence.slots[slot] for sentence in known if slot in sentence.slots})

    return told("hero") == 1 and told("animal") <= 1 and told("object") <= 1
