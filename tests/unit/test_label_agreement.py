"""Agreement and bias against hand-worked values, scipy, published tables and slow second ways."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from labeling_ui.aggregate import group_rankings
from labeling_ui.agreement import (
    agreement,
    kendall_tau,
    length_preference,
    ordinal_alpha,
    pairwise_agreement,
    position_bias,
    ranks_alpha,
)
from labeling_ui.exporting import snapshot
from labeling_ui.importing import import_rankings
from labeling_ui.judgements import Judgement, Task, bootstrap, ratio, wilson
from labeling_ui.store import Store

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def judgements(task, *ranks, shown=None, lengths=(), prompt=None):
    """Annotators a, b, ... of one task."""
    of = Task(task, prompt or f"prompt of {task}", lengths)
    return [Judgement(of, name, r, shown) for name, r in zip("abcdefgh", ranks, strict=False)]


def dense(scores):
    """Ranks of scores, the greatest first, without gaps."""
    order = sorted(set(scores), reverse=True)
    return tuple(order.index(score) + 1 for score in scores)


def crowd(seed, prompts, sizes=(4,), annotators=3, signal=0.0, levels=None):
    """Annotators who see signal * quality + noise of each response, some missing at random."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(prompts):
        size = int(rng.choice(sizes))
        quality = rng.normal(size=size)
        task = Task(f"t{i}", f"p{i // 2}", tuple(int(x) for x in rng.integers(1, 9, size)))
        for name in "abcdefgh"[:annotators]:
            if annotators > 2 and rng.random() < 0.2:
                continue
            seen = signal * quality + rng.normal(size=size)
            if levels:
                seen = np.floor(seen * levels)
            shown = tuple(int(x) for x in rng.permutation(size))
            made.append(Judgement(task, name, dense(seen.tolist()), shown))
    return made


def couples(made):
    """Every two annotators' judgements of the same task."""
    return [
        (a, b)
        for a, b in combinations(made, 2)
        if a.task.id == b.task.id and None not in (a.ranks, b.ranks)
    ]


# ---- pairwise agreement --------------------------------------------------------------------


def test_pairwise_agreement_is_counted_by_hand_in_a_small_case():
    # ab, ac, bc; a against b: they differ on ab only. The third ties ac, agrees with a on bc,
    # differs on ab; with b it agrees on both that it prefers
    made = judgements("t", (1, 2, 3), (2, 1, 3), (2, 1, 2))
    found = pairwise_agreement(made)
    assert (found.value, found.count, found.prompts) == (5 / 7, 7, 1)


def test_pairwise_agreement_is_that_of_every_two_annotators():
    made = crowd(1, 60, sizes=(2, 3, 5, 7), annotators=5, signal=0.7, levels=2)
    same = total = 0
    for a, b in couples(made):
        for i, j in combinations(range(len(a.ranks)), 2):
            product = (a.ranks[i] - a.ranks[j]) * (b.ranks[i] - b.ranks[j])
            same += product > 0
            total += product != 0
    found = pairwise_agreement(made)
    assert (found.value, found.count) == (same / total, total)
    assert found.low < found.value < found.high


def test_without_two_annotators_of_a_task_nothing_is_measured():
    alone = judgements("t", (1, 2)) + judgements("u", (2, 1))
    again = [replace(alone[0], repeat=True)]
    skipped = [replace(alone[0], annotator="b", ranks=None)]
    for made in ([], alone, alone + again, alone + skipped):
        found = agreement(made)
        assert (found.pairwise, found.tau, found.alpha) == (None, None, None)
        assert (found.tasks, found.annotators) == (0, 0)


def test_one_annotator_twice_in_a_task_is_our_mistake():
    twice = judgements("t", (1, 2)) * 2
    with pytest.raises(AssertionError, match="a twice in t"):
        pairwise_agreement(twice)


def test_the_order_of_the_input_changes_nothing():
    made = crowd(2, 40, sizes=(3, 4), signal=1.0)
    assert agreement(made) == agreement(made[::-1])


# ---- tau -----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 1])
def test_tau_is_the_mean_of_scipys_over_every_two_annotators(levels):
    made = crowd(3, 60, sizes=(2, 3, 6), annotators=4, signal=0.7, levels=levels)
    taus = [kendalltau(a.ranks, b.ranks).statistic for a, b in couples(made)]
    defined = [tau for tau in taus if not np.isnan(tau)]
    assert (len(defined) < len(taus)) == (levels == 1)
    found = kendall_tau(made)
    assert found.value == pytest.approx(np.mean(defined), abs=1e-12)
    assert found.count == len(defined)


def test_tau_is_of_rank_vectors_and_not_of_ordered_ids():
    # from best to worst: a c d b, and b c d a. The two agree on c before d alone
    made = judgements("t", (1, 4, 2, 3), (4, 1, 2, 3))
    assert kendall_tau(made).value == pytest.approx((1 - 5) / 6)
    # what comes out when lists of ids are compared as if they were ranks
    assert kendalltau([0, 2, 3, 1], [1, 2, 3, 0]).statistic == pytest.approx(4 / 6)


def test_rankings_that_tie_everything_are_counted_and_have_no_tau():
    made = judgements("t", (1, 2, 3), (1, 2, 3), (1, 1, 1))
    found = agreement(made)
    assert found.all_tied == 1
    assert (found.tau.value, found.tau.count) == (pytest.approx(1.0), 1)


# ---- alpha ---------------------------------------------------------------------------------

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C: 4 observers, 12 units
OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


def long_form(table):
    rows = [line.split() for line in table.strip().splitlines()]
    cells = [(float(cell), unit) for row in rows for unit, cell in enumerate(row) if cell != "."]
    values, units = zip(*cells, strict=True)
    return np.array(values), np.array(units)


def slow_alpha(values, units):
    """By the definition: coincidences of every two values of a unit, ordinal differences."""
    names, count = np.unique(values, return_counts=True)
    paired = {u for u in units if (units == u).sum() > 1}
    kept = [(v, u) for v, u in zip(values, units, strict=True) if u in paired]
    names = sorted({v for v, _ in kept})
    count = {v: sum(w == v for w, _ in kept) for v in names}

    def difference(v, w):
        v, w = min(v, w), max(v, w)
        between = sum(count[x] for x in names if v <= x <= w)
        return (between - (count[v] + count[w]) / 2) ** 2

    observed = 0.0
    for unit in paired:
        of_unit = [v for v, u in kept if u == unit]
        apart = sum(difference(v, w) for v, w in combinations(of_unit, 2))
        observed += 2 * apart / (len(of_unit) - 1)
    expected = 2 * sum(difference(v, w) for (v, _), (w, _) in combinations(kept, 2))
    return 1 - observed / len(kept) / (expected / len(kept) / (len(kept) - 1))


def test_alpha_of_krippendorffs_own_example_is_what_he_prints():
    values, units = long_form(OBSERVERS)
    found = ordinal_alpha(values, units, units)
    assert found.value == pytest.approx(0.815, abs=5e-4)
    assert found.count == 40  # of 41 values; the unit with one value cannot be paired
    assert found.prompts == 11
    assert found.value == pytest.approx(slow_alpha(values, units), abs=1e-12)


def test_alpha_of_ranks_is_that_of_the_definition():
    made = crowd(4, 25, sizes=(2, 3, 5), annotators=4, signal=1.0, levels=2)
    values, units = [], []
    for voice in made:
        size = len(voice.ranks)
        for place, rank in enumerate(voice.ranks):
            better = sum(other < rank for other in voice.ranks)
            equal = voice.ranks.count(rank)
            values.append((better + equal / 2) / size)
            units.append(int(voice.task.id[1:]) * 100 + place)
    assert ranks_alpha(made).value == pytest.approx(
        slow_alpha(np.array(values), np.array(units)), abs=1e-10
    )


def test_alpha_of_two_annotators_without_ties_is_spearmans_up_to_the_small_sample_factor():
    made = crowd(5, 600, sizes=(5,), annotators=2, signal=1.0)
    rhos = [
        spearmanr(a.ranks, b.ranks).statistic for a, b in zip(made[::2], made[1::2], strict=True)
    ]
    assert ranks_alpha(made).value == pytest.approx(np.mean(rhos), abs=1e-3)


def test_values_that_are_all_equal_have_no_alpha():
    assert ranks_alpha(judgements("t", (1, 1), (1, 1))) is None


def test_random_annotators_give_chance_with_any_mixture_of_sizes_and_ties():
    for sizes, levels in (((4,), None), ((2, 9), None), ((2, 3, 8), 1)):
        made = crowd(6, 1200, sizes=sizes, annotators=3, levels=levels)
        found = agreement(made)
        assert found.pairwise.value == pytest.approx(0.5, abs=0.02)
        assert found.tau.value == pytest.approx(0, abs=0.03)
        assert found.alpha.value == pytest.approx(0, abs=0.03)
        assert found.pairwise.low < 0.5 < found.pairwise.high
    # what the scaling of ranks is for: with bare ranks the mixture seems to agree
    made = crowd(6, 1200, sizes=(2, 9), annotators=2)
    values = np.concatenate([voice.ranks for voice in made])
    units = np.concatenate([100 * int(v.task.id[1:]) + np.arange(len(v.ranks)) for v in made])
    assert ordinal_alpha(values, units, units).value > 0.1


@pytest.mark.parametrize(
    ("correlation", "simulated"),
    [(0.156, (0.55, 0.10, 0.13)), (0.426, (0.64, 0.28, 0.33)), (0.729, (0.76, 0.52, 0.59))],
)
def test_the_three_measures_of_one_crowd_belong_together(correlation, simulated):
    """Two annotators of 4 responses whose impressions are normal with this correlation."""
    signal = (correlation / (1 - correlation)) ** 0.5
    found = agreement(crowd(7, 3000, annotators=2, signal=signal))
    values = (found.pairwise.value, found.tau.value, found.alpha.value)
    # Greiner's relation for tau; Spearman's rho of n values is (3 tau + (n - 2) rho) / (n + 1)
    tau = 2 / np.pi * np.arcsin(correlation)
    rho = 6 / np.pi * np.arcsin(correlation / 2)
    expected = ((1 + tau) / 2, tau, (3 * tau + 2 * rho) / 5)
    assert expected == pytest.approx(simulated, abs=0.015)
    assert values == pytest.approx(expected, abs=0.03)
    assert values[1] == pytest.approx(2 * values[0] - 1)


# ---- intervals -----------------------------------------------------------------------------


def test_the_interval_of_a_share_of_independent_prompts_is_the_normal_one():
    sums = np.stack([np.arange(400) < 280, np.ones(400)], axis=1).astype(float)
    found = ratio(sums, 0)
    half = 1.96 * (0.7 * 0.3 / 400) ** 0.5
    assert found.value == 0.7
    assert found.low == pytest.approx(0.7 - half, abs=0.005)
    assert found.high == pytest.approx(0.7 + half, abs=0.005)


def test_more_pairs_of_the_same_prompts_do_not_narrow_the_interval():
    one = np.stack([np.arange(100) < 70, np.ones(100)], axis=1).astype(float)
    assert ratio(one, 0) == replace(ratio(one * 36, 0), count=100)


def test_prompts_that_say_nothing_are_not_drawn():
    one = np.array([[1.0, 2.0], [2.0, 3.0], [0.0, 1.0]])
    padded = np.concatenate([one, np.zeros((50, 2))])
    assert ratio(padded, 3) == ratio(one, 3)
    assert ratio(np.zeros((5, 2)), 0) is None


def test_intervals_depend_on_the_seed_alone():
    made = crowd(8, 50, signal=1.0)
    assert agreement(made, 1) == agreement(made, 1)
    assert agreement(made, 1).pairwise.low != agreement(made, 2).pairwise.low


@pytest.mark.parametrize("prompts", [1500, 30_000])
def test_the_interval_of_many_prompts_drawn_in_bags_is_the_normal_one(prompts):
    rng = np.random.default_rng(12)
    pairs = rng.integers(1, 8, prompts)
    wins = pairs * (rng.random(prompts) < 0.7)
    found = ratio(np.stack([wins, pairs], axis=1).astype(float), 0)
    # all pairs of a prompt agree, so the error is that of the prompts, weighted by their pairs
    half = 1.96 * (0.7 * 0.3 * (pairs**2).sum()) ** 0.5 / pairs.sum()
    assert (found.count, found.prompts) == (pairs.sum(), prompts)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.low < found.value < found.high


def test_alphas_interval_is_that_of_computing_it_anew_in_every_draw():
    made = crowd(9, 60, sizes=(3, 5), annotators=3, signal=1.0, levels=3)
    prompts = sorted({voice.task.prompt_id for voice in made})
    of_prompt = {p: [v for v in made if v.task.prompt_id == p] for p in prompts}
    rng = np.random.default_rng(0)
    values = []
    for _ in range(120):
        drawn = []
        for i, pick in enumerate(rng.integers(0, len(prompts), len(prompts))):
            for voice in of_prompt[prompts[pick]]:
                task = replace(voice.task, id=f"{i} {voice.task.id}", prompt_id=str(i))
                drawn.append(replace(voice, task=task))
        values.append(_alpha_value(drawn))
    low, high = np.percentile(values, [2.5, 97.5])
    found = ranks_alpha(made)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def _alpha_value(made):
    values, units = [], []
    unit_of = {}
    for voice in made:
        for place, rank in enumerate(voice.ranks):
            better = sum(other < rank for other in voice.ranks)
            values.append((better + voice.ranks.count(rank) / 2) / len(voice.ranks))
            units.append(unit_of.setdefault((voice.task.id, place), len(unit_of)))
    # the interval of this one is thrown away, its value is the definition's (see above)
    return ordinal_alpha(np.array(values), np.array(units), np.zeros(len(units), int)).value


def test_draws_without_a_value_are_left_out():
    found = bootstrap(
        np.array([[1.0], [3.0]]), lambda sums: np.where(sums > 2, sums, np.nan)[:, 0], 2, 0
    )
    assert (found.value, found.low, found.high) == (4.0, 4.0, 6.0)


def test_wilsons_interval_by_hand():
    # z^2 = 3.8415; 8 of 10: (0.8 + 0.19207) / 1.38415 -+ sqrt(0.016 + 0.0096037) * 1.96 / 1.38415
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


# ---- bias ----------------------------------------------------------------------------------


def test_position_bias_is_counted_by_hand():
    # shown: c a b. First ranks c < a < b by place: (1, 2, 3) of a, b, c shown as 3, 1, 2
    made = judgements("t", (1, 2, 3), (1, 2, 1), shown=(2, 0, 1))
    # a's pairs by shown place: 3>1 no, 3>2 no, 1<2 yes; b's 1 1 2: tie, yes, yes
    found = position_bias(made)
    assert (found.earlier_wins.value, found.earlier_wins.count) == (3 / 5, 5)
    means = [place.value for place in found.rank_by_place]
    assert means == [(1 + 0.25) / 2, (0 + 0.25) / 2, (0.5 + 1) / 2]
    assert [place.count for place in found.rank_by_place] == [2, 2, 2]


def test_position_bias_leaves_out_what_nobody_knows():
    made = [*judgements("t", (1, 2), (2, 1)), Judgement(Task("u", "u"), "a", None, (0, 1))]
    found = position_bias(made)
    assert found.earlier_wins is None
    assert found.rank_by_place == ()


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_bias_to_the_first_place_is_found_and_none_is_not(bias):
    rng = np.random.default_rng(10)
    made = []
    for i in range(1500):
        size = int(rng.integers(2, 6))
        shown = rng.permutation(size)
        seen = rng.normal(size=size)
        seen[shown[0]] += bias
        made.append(
            Judgement(Task(f"t{i}", f"p{i}"), "a", dense(seen.tolist()), tuple(shown.tolist()))
        )
    found = position_bias(made)
    assert (found.earlier_wins.low > 0.5) == bool(bias)
    assert (found.rank_by_place[0].high < 0.5) == bool(bias)
    assert len(found.rank_by_place) == 5
    if not bias:
        assert found.earlier_wins.low < 0.5 < found.earlier_wins.high


def test_length_preference_against_a_slow_second_way():
    made = crowd(11, 100, sizes=(2, 4, 6), annotators=2, levels=1)
    wins = total = 0
    for voice in made:
        for i, j in combinations(range(len(voice.ranks)), 2):
            longer = np.sign(voice.task.lengths[i] - voice.task.lengths[j])
            better = np.sign(voice.ranks[j] - voice.ranks[i])
            wins += longer * better > 0
            total += longer * better != 0
    found = length_preference(made)
    assert (found.value, found.count) == (wins / total, total)
    assert length_preference(judgements("t", (1, 2))) is None
    assert length_preference(judgements("t", (1, 2), lengths=(9, 3))).value == 1.0


REAL = {"oasst/rank_groups.jsonl": 356, "hh-rlhf/harmless-base_test_first200.jsonl": 199}


@pytest.mark.parametrize(("file", "pairs"), REAL.items(), ids=REAL.keys())
def test_the_length_preference_of_real_people(tmp_path, file, pairs):
    if not (DATA / file).exists():
        pytest.skip(f"needs {DATA / file}")
    store = Store(tmp_path / "labels.db")
    import_rankings(store, [str(DATA / file)], 0.1)
    rankings = snapshot(store, 0.15)
    groups, dropped = group_rankings(rankings)
    assert not dropped
    wins = equal = 0
    for ranking in rankings:
        for better, worse in ranking.strict_pairs:
            lengths = [len(ranking.responses[i]) for i in (better, worse)]
            wins += lengths[0] > lengths[1]
            equal += lengths[0] == lengths[1]
    found = length_preference([voice for group in groups for voice in group.judgements()])
    assert found.count == pairs - equal
    assert found.value == wins / (pairs - equal)
    assert found.low < found.value < found.high
