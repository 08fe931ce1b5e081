"""The demo world keeps its promises: what is held out, how demonstrations are flawed, and what the rubric sees."""

import hashlib
import random
import re
import statistics
from itertools import combinations

import pytest

from pipeline import demo_world
from pipeline.demo_rubric import PROMPT_ADHERENCE, QUALITIES, qualities, score, well_formed
from pipeline.demo_world import FLAW_RATES, Request, parse, parse_request, prompts, skeleton, tell

REQUEST = Request("Mia", "fox", "shy", "kite", "lost")
PROMPT = "Write a story about a shy fox named Mia who lost a kite."
FLAWLESS = (
    "Once there was a fox named Mia. Mia always spoke in a very small voice. "
    "On the way home Mia lost a kite. Mia felt very sad. "
    '"I will help you," said the owl. The owl found the kite behind a rock. Mia learned to ask for help.'
)
LOWERED_BY = {  # flaw -> the one quality it lowers
    "wrong_hero": "hero",
    "wrong_animal": "animal",
    "wrong_problem": "problem",
    "no_trait": "trait",
    "no_feeling": "feeling",
    "no_dialogue": "dialogue",
    "unsolved": "solved",
    "no_ending": "ending",
    "repeats": "no_repeats",
    "changes_hero": "consistent",
}


def requests_of(texts):
    return [parse_request(text) for text in texts]


def pairs_of(texts):
    requests = requests_of(texts)
    return {(r.animal, other) for r in requests for other in (r.object, r.trait, r.hero)}


def demonstrations(count=2000, seed=7):
    return list(demo_world.demonstrations(count, seed))


def test_the_version_pins_the_text():
    """Raise VERSION and change the digest together: old runs must not look as if they were made from this text."""
    texts = [*demo_world.stories(50, 0), *(str(row) for row in demo_world.demonstrations(50, 0))]
    texts += [row["prompt"] for split in ("train", "validation", "test") for row in prompts(split)]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    assert (demo_world.VERSION, digest) == (3, "8140aece44ccd851")


def test_a_longer_list_begins_with_the_shorter_one_and_another_seed_gives_other_text():
    assert list(demo_world.stories(20, 3)) == list(demo_world.stories(40, 3))[:20]
    assert demonstrations(20) == demonstrations(40)[:20]
    assert not set(demo_world.stories(50, 3)) & set(demo_world.stories(50, 4))


def test_words_of_a_list_are_never_fixed_words_of_a_sentence():
    words = [word for words in demo_world.SLOTS.values() for word in words]
    assert len(words) == len(set(words))
    patterns = [pattern for patterns in demo_world.SENTENCES.values() for pattern in patterns]
    patterns += (
        demo_world.PROMPT_TEMPLATES
        + demo_world.TITLE_TEMPLATES
        + tuple(demo_world.PROBLEMS.values())
    )
    for pattern in patterns:
        assert not set(re.findall(r"\w+", re.sub(r"\{\w+\}", "", pattern))) & set(words), pattern
    assert not [
        word for word in words if word[0] in "aeiou" and word not in demo_world.SLOTS["helper"]
    ]


def test_every_sentence_is_recognised_as_its_kind():
    for kind, patterns in demo_world.SENTENCES.items():
        for pattern in patterns:
            slots = {
                slot: words[-1]
                for slot, words in demo_world.SLOTS.items()
                if f"{{{slot}}}" in pattern
            }
            (sentence,) = parse(pattern.format(**slots))
            assert (sentence.kind, sentence.pattern, sentence.slots) == (kind, pattern, slots)


def test_every_prompt_and_title_gives_its_request_back():
    rng = random.Random(0)
    for template in demo_world.PROMPT_TEMPLATES + demo_world.TITLE_TEMPLATES:
        for problem in demo_world.PROBLEMS:
            slots = {
                slot: rng.choice(demo_world.SLOTS[slot])
                for slot in ("hero", "animal", "trait", "object")
            }
            request = Request(problem=problem, **slots)
            assert parse_request(demo_world.phrase(request, template)) == request


def test_splits_have_distinct_prompts_in_the_promised_numbers():
    rows = {split: prompts(split) for split in ("train", "validation", "test")}
    assert len(rows["train"]) >= 1500
    assert len(rows["validation"]) >= 128
    assert len(rows["test"]) >= 400
    every = [row for split in rows for row in rows[split]]
    assert len({row["prompt"] for row in every}) == len({row["id"] for row in every}) == len(every)
    assert all(row["split"] == split for split in rows for row in rows[split])
    with pytest.raises(ValueError, match="train, validation, test"):
        prompts("dev")


def test_no_pair_of_a_held_out_prompt_occurs_in_training_or_in_another_split():
    train = [row["prompt"] for row in prompts("train")]
    train += [row["prompt"] for row in demonstrations()]
    train += [story.split("\n")[0] for story in demo_world.stories(4000, 0) if "\n" in story]
    pairs = {"train": pairs_of(train)}
    for split in ("validation", "test"):
        pairs[split] = pairs_of([row["prompt"] for row in prompts(split)])
    for one, other in combinations(pairs, 2):
        assert not pairs[one] & pairs[other], (one, other)


def test_every_word_of_a_held_out_prompt_occurs_in_training():
    train = set(" ".join(row["prompt"] for row in prompts("train")).split())
    assert set(" ".join(row["prompt"] for row in prompts("test")).split()) <= train


def test_most_pretraining_documents_carry_their_request():
    documents = list(demo_world.stories(1000, 0))
    carrying = [document.split("\n") for document in documents if "\n" in document]
    assert 0.75 < len(carrying) / len(documents) < 0.85
    for title, story in carrying:
        assert all(
            qualities(title, story)[name] == 1
            for name in ("hero", "animal", "problem", "well_formed")
        )


def test_stories_are_told_in_many_ways():
    assert len({skeleton(story) for story in demo_world.stories(1000, 0)}) > 950
    assert (
        skeleton("Mia felt very sad.")
        == skeleton("Tom felt very sad.")
        != skeleton("Tom sat down and cried.")
    )


def test_each_flaw_of_the_demonstrations_has_its_published_rate():
    rows = demonstrations(3000)
    values = [qualities(row["prompt"], row["completion"]) for row in rows]
    for flaw, quality in LOWERED_BY.items():
        assert statistics.mean(v[quality] < 1 for v in values) == pytest.approx(
            FLAW_RATES[flaw], abs=0.03
        ), flaw
    assert all(value["well_formed"] == 1 for value in values)


def test_a_score_says_next_to_nothing_about_length():
    rows = demonstrations()
    scores = [score(row["prompt"], row["completion"]) for row in rows]
    for length in (len, lambda text: len(text.split()), lambda text: len(parse(text))):
        assert (
            abs(statistics.correlation(scores, [length(row["completion"]) for row in rows])) < 0.15
        )


@pytest.mark.parametrize("flaw", FLAW_RATES)
def test_a_flaw_lowers_its_own_quality_and_no_other(flaw):
    for seed in range(100):
        values = qualities(PROMPT, tell(REQUEST, random.Random(seed), frozenset({flaw})))
        assert [name for name in QUALITIES if values[name] < 1] == [LOWERED_BY[flaw]]


def test_a_story_without_flaws_scores_one():
    assert score(PROMPT, FLAWLESS) == pytest.approx(1)
    for seed in range(200):
        story = tell(REQUEST, random.Random(seed))
        assert set(qualities(PROMPT, story).values()) == {1.0}, story
        assert well_formed(story)


@pytest.mark.parametrize(
    ("old", "new", "lowered"),
    [
        ("Mia", "Tom", ["hero"]),
        ("fox", "hen", ["animal"]),
        ("kite", "drum", ["problem"]),
        ("always spoke in a very small voice", "slept until noon every day", ["trait"]),
        ("Mia felt very sad. ", "", ["feeling"]),
        ('"I will help you," said the owl. ', "", ["dialogue"]),
        (
            "The owl found the kite behind a rock.",
            "The owl fixed the kite with some glue.",
            ["solved"],
        ),
        ("The owl found the kite", "The owl found the drum", ["solved", "consistent"]),
        (" Mia learned to ask for help.", "", ["ending"]),
        ("to ask for help.", "to ask for help. Birds sang in the trees.", ["ending"]),
        ("felt very sad.", "felt very sad. Mia sat down and cried.", ["no_repeats"]),
        ("Mia felt", "Tom felt", ["consistent"]),
        ("felt very sad", "felt sad very", ["feeling", "well_formed"]),
        ("to ask for help.", "to ask for", ["ending", "well_formed"]),
    ],
)
def test_the_rubric_sees_each_change_to_a_flawless_story(old, new, lowered):
    values = qualities(PROMPT, FLAWLESS.replace(old, new))
    assert [name for name in QUALITIES if values[name] < 1] == lowered


def test_a_problem_solved_before_it_came_up_is_not_solved():
    assert (
        qualities(
            PROMPT, "At last Mia found the kite under a leaf. On the way home Mia lost a kite."
        )["solved"]
        == 0
    )


def test_half_the_problem_counts_half():
    assert qualities(PROMPT, FLAWLESS.replace("kite", "drum"))["problem"] == 0.5


def test_without_a_known_prompt_there_is_no_adherence_but_still_craft():
    for prompt in (
        "",
        "Write a poem about the sea.",
        PROMPT.replace("Mia", "Zorro"),
        PROMPT + " Now!",
    ):
        values = qualities(prompt, FLAWLESS)
        assert [name for name in QUALITIES if values[name] < 1] == list(PROMPT_ADHERENCE)


@pytest.mark.parametrize(
    "gibberish",
    [
        "",
        "   \n ",
        "....",
        "mia felt very sad.",
        "Mia felt very sad",
        "Mia felt very very sad.",
        "Mia felt very sad.Mia felt very sad.",
        "The the the kite. Fox fox.",
        "{hero} felt very sad.",
        "One day {hero} broke a {object}.",
        "\ud800 \x00 \U0001f98a?! {} %s {0}",
        "Mia " * 3000,
    ],
)
def test_gibberish_never_passes_and_never_raises(gibberish):
    assert not well_formed(gibberish)
    assert score(PROMPT, gibberish) < 0.15
    assert score(gibberish, FLAWLESS) < 1
    assert all(0 <= value <= 1 for value in qualities(gibberish, gibberish).values())
