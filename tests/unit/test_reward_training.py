"""What a reward model is trained on, how it is measured, and what its heads say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from pipeline.errors import ArtifactError
from pipeline.settings.reward import RewardSettings
from stages.common import micro_batches
from stages.models import backbone_and_head
from stages.ranked_data import EncodedRanking, Vote, _merge, _tied_above_others
from stages.reward_heads import (
    Heads,
    add_heads,
    bootstrap_weights,
    load_heads,
    mean_head,
    save_heads,
    score_with_uncertainty,
)
from stages.reward_losses import pairwise_loss
from stages.reward_measures import measure, pair_disagreement
from stages.reward_training import (
    OtherPrompts,
    best_response,
    ranking_loss,
    ranking_weights,
)
from stages.rollout import last_token_scores, score_all
from stages.shared_prefix import GroupScorer, PromptGroup, score_groups

CPU = torch.device("cpu")


def tiny_reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=1,
    )
    return LlamaForSequenceClassification(config).eval()


def ranking(ranks: list[int], prompt_id: str = "p", weight: float = 1.0) -> EncodedRanking:
    responses = [[5 + i, 6, 7, 2][i % 3 :] for i in range(len(ranks))]
    return EncodedRanking(PromptGroup([9, 8], responses), [Vote(ranks, weight)], prompt_id)


# ---- scores --------------------------------------------------------------------------------


def test_a_score_is_read_at_the_end_token_and_does_not_depend_on_padding() -> None:
    model = tiny_reward_model()
    rows = [[5, 6, 7, 2], [8, 9, 2], [5, 6, 7]]
    with torch.no_grad():
        together = last_token_scores(*backbone_and_head(model), rows, 0, CPU)
        alone = torch.cat(
            [last_token_scores(*backbone_and_head(model), [row], 0, CPU) for row in rows]
        )
        hidden = model.model(torch.tensor([rows[0]])).last_hidden_state[0, 3]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert together[0].item() == pytest.approx(model.score(hidden).item(), abs=1e-6)
    assert together[0] != together[2], "the end token must count"
    torch.testing.assert_close(score_all(model, rows, 0, CPU, 1), alone, atol=1e-6, rtol=1e-5)


# ---- votes and weights ---------------------------------------------------------------------


def test_rankings_of_the_same_responses_become_one_with_a_vote_each() -> None:
    a, b, c = [1, 2], [3], [0, 5]
    first = EncodedRanking(PromptGroup([7], [a, b, c]), [Vote([1, 2, 3])], "p")
    # the same responses in another order
    second = EncodedRanking(PromptGroup([7], [c, a, b]), [Vote([1, 2, 2], 0.5)], "p")
    other_prompt = EncodedRanking(PromptGroup([8], [a, b, c]), [Vote([1, 2, 3])], "q")
    other_responses = EncodedRanking(PromptGroup([7], [a, b]), [Vote([1, 2])], "p")
    merged = _merge([first, second, other_prompt, other_responses])
    assert [len(r.votes) for r in merged] == [2, 1, 1]
    both = merged[0]
    assert both.weight == 1.5
    by_vote = [
        {tuple(ids): rank for ids, rank in zip(both.group.responses, vote.ranks, strict=True)}
        for vote in both.votes
    ]
    assert by_vote == [
        {(1, 2): 1, (3,): 2, (0, 5): 3},
        {(1, 2): 2, (3,): 2, (0, 5): 1},
    ]


def test_soft_labels_are_cross_entropy_with_the_share_of_votes() -> None:
    scores = torch.tensor([0.7, -0.3, 0.1])
    votes = [Vote([1, 2, 3], 2.0), Vote([2, 1, 2], 1.0)]
    # P(i better than j) of the pairs 01, 02, 12: weights 2 and 1, a tie counts one half
    share = [2 / 3, (2 + 0.5) / 3, 1.0]
    p = torch.tensor([1.0, 0.6, -0.4]).sigmoid().tolist()
    expected = (
        -sum(s * math.log(q) + (1 - s) * math.log(1 - q) for s, q in zip(share, p, strict=True)) / 3
    )
    item = EncodedRanking(PromptGroup([1], [[2], [3], [4]]), votes, "p")
    found = ranking_loss(scores.unsqueeze(1), item, RewardSettings(soft_labels=True))
    assert found.item() == pytest.approx(expected)


def test_the_settings_reach_the_loss() -> None:
    item = ranking([2, 1, 3])
    scores = torch.tensor([[0.3], [0.9], [-0.5]])
    plain = ranking_loss(scores, item, RewardSettings())
    assert plain.item() == pytest.approx(
        pairwise_loss(scores[:, 0], torch.tensor([2, 1, 3])).item()
    )
    for changed in (
        {"loss": "plackett_luce"},
        {"margin": 0.1},
        {"label_smoothing": 0.1},
        {"centering": 0.1},
    ):
        settings = RewardSettings.model_validate(changed)
        assert ranking_loss(scores, item, settings).item() != pytest.approx(plain.item())
    # (1.2^2 + 0.2^2 + 0.4^2) / 3
    centred = ranking_loss(scores, item, RewardSettings(centering=0.5))
    assert (centred - plain).item() == pytest.approx(0.5 * (1.44 + 0.04 + 0.16) / 3)


def test_weights_of_annotators_have_mean_one() -> None:
    rankings = [ranking([1, 2], weight=w) for w in (1.0, 1.0, 4.0)]
    assert ranking_weights(rankings, 1, seed=0).squeeze(1).tolist() == [0.5, 0.5, 2.0]


def test_ties_above_others_are_counted_without_the_last_level() -> None:
    assert _tied_above_others([1, 1, 1, 2, 2, 2, 2]) == 3
    assert _tied_above_others([4, 4]) == 0


# ---- heads ---------------------------------------------------------------------------------


def test_heads_start_apart_and_the_first_is_the_models_own() -> None:
    one, several, again = tiny_reward_model(), tiny_reward_model(), tiny_reward_model()
    own = backbone_and_head(one)[1].weight.detach().clone()
    add_heads(one, 1, seed=5)
    torch.testing.assert_close(one.score.weight, own, rtol=0, atol=0)
    add_heads(several, 4, seed=5)
    add_heads(again, 4, seed=5)
    weights = several.score.weight
    torch.testing.assert_close(weights[:1], own, rtol=0, atol=0)
    assert len({tuple(row.tolist()) for row in weights}) == 4
    torch.testing.assert_close(weights, again.score.weight, rtol=0, atol=0)
    assert several(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 4)


def test_each_head_has_a_bootstrap_of_its_own() -> None:
    table = bootstrap_weights(4000, 3, seed=1)
    assert torch.equal(table, bootstrap_weights(4000, 3, seed=1))
    assert table.mean(0).tolist() == pytest.approx([1.0] * 3, abs=0.06)
    # a ranking is left out of a bootstrap with probability 1/e
    assert (table == 0).float().mean().item() == pytest.approx(math.exp(-1), abs=0.02)
    assert abs(torch.corrcoef(table.T)[0, 1].item()) < 0.06
    assert torch.equal(bootstrap_weights(7, 1, seed=1), torch.ones(7, 1))


def test_the_published_head_is_the_mean_and_the_spread_comes_from_the_file(tmp_path: Path) -> None:
    model = tiny_reward_model()
    add_heads(model, 3, seed=2)
    groups = [PromptGroup([4, 5], [[6, 2], [7, 8, 2]]), PromptGroup([9], [[3, 2]])]
    scorer = GroupScorer(model, 0, True)
    raw_NH = score_groups(scorer, groups)
    weight_HD, bias_H = mean_head(model)
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 1)
    plain_N = score_groups(scorer, groups).squeeze(1)
    torch.testing.assert_close(plain_N, raw_NH.mean(1), atol=1e-6, rtol=1e-5)

    save_heads(Heads(weight_HD, bias_H, raw_NH.mean(0), raw_NH.mean(1).std()), tmp_path)
    score_N, spread_N = score_with_uncertainty(scorer, load_heads(tmp_path), groups)
    expected_N = (plain_N - plain_N.mean()) / plain_N.std()
    torch.testing.assert_close(score_N, expected_N, atol=1e-5, rtol=1e-5)
    centred_NH = (raw_NH - raw_NH.mean(0)) / raw_NH.mean(1).std()
    torch.testing.assert_close(spread_N, centred_NH.std(1), atol=1e-5, rtol=1e-5)
    after_N = score_groups(scorer, groups).squeeze(1)
    torch.testing.assert_close(after_N, plain_N, rtol=0, atol=0)


def test_a_reward_model_of_one_head_has_no_uncertainty(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="one head"):
        load_heads(tmp_path)


def test_heads_that_agree_are_sure_and_their_mean_decides_what_is_wrong() -> None:
    ranks = torch.tensor([1, 2, 2])
    agree = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 4.0]])
    spread_Q, wrong_Q = pair_disagreement(agree, ranks)
    assert spread_Q.tolist() == [0.0, 0.0]
    assert wrong_Q.tolist() == [0.0, 1.0]
    split = torch.tensor([[0.0, 0.0], [math.log(3), -math.log(3)], [0.0, 0.0]])
    spread_Q, wrong_Q = pair_disagreement(split, ranks)
    # P is 1/4 by the one head and 3/4 by the other
    assert spread_Q.tolist() == pytest.approx([0.25, 0.0])
    assert wrong_Q.tolist() == [0.5, 0.5]


# ---- measures ------------------------------------------------------------------------------


def test_measures_of_a_perfect_and_of_a_reversed_order() -> None:
    model = tiny_reward_model()
    template = ranking([1, 2, 3, 4])
    scores = score_groups(GroupScorer(model, 0, False), [template.group]).squeeze(1)
    order: Tensor = scores.argsort(descending=True).argsort() + 1
    right = ranking(order.tolist(), "p")
    wrong = ranking((5 - order).tolist(), "q")
    best = measure(model, [right], 0, seed=0)
    assert best["accuracy"] == 1.0
    assert best["kendall_tau"] == pytest.approx(1.0)
    assert best["pairs"] == 6
    assert "disagreement" not in best
    assert measure(model, [wrong], 0, seed=0)["accuracy"] == 0.0
    both = measure(model, [right, wrong], 0, seed=0, share_prefix=True)
    assert both["accuracy"] == 0.5
    assert both["accuracy_low"] == 0.0
    assert both["accuracy_high"] == 1.0


def test_several_heads_are_measured_by_their_mean_and_their_disagreement() -> None:
    model = tiny_reward_model()
    add_heads(model, 4, seed=3)
    items = [ranking([1, 2, 3, 4], "p"), ranking([4, 3, 2, 1], "q"), ranking([1, 1, 1, 1], "r")]
    several = measure(model, items, 0, seed=0)
    assert 0 < several["disagreement"] < 0.5
    assert -1 <= several["disagreement_error_correlation"] <= 1
    assert several["pairs"] == 12
    mean_head(model)
    one: dict[str, Any] = measure(model, items, 0, seed=0)
    assert one["accuracy"] == several["accuracy"]
    assert one["kendall_tau"] == pytest.approx(several["kendall_tau"])


def test_micro_batches_cover_every_row_once_and_respect_both_limits() -> None:
    lengths = [5, 100, 7, 3, 64, 64, 9, 31]
    batches = micro_batches(lengths, max_rows=3, max_tokens=128)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 128
    assert micro_batches([500], max_rows=4, max_tokens=100) == [[0]]


def test_the_best_response_stands_behind_the_most_similar_other_prompt_that_fits() -> None:
    def of(prompt: list[int], *responses: list[int]) -> EncodedRanking:
        return EncodedRanking(PromptGroup(prompt, list(responses)), [Vote([2, 1])], str(prompt))

    rankings = [
        of([1, 5, 6], [10, 2], [11, 2]),
        of([1, 5, 6], [12, 2], [13, 2]),  # the same prompt is no other prompt
        of([1, 5, 7, 7], [14, 2], [15, 2]),
        of([1, 8, 9], [16, 2], [17, 2]),
    ]
    others = OtherPrompts(rankings, 6, seed=0)
    assert others._closest(0, [1, 2, 3]) == PromptGroup([1, 5, 7, 7], [[11, 2]])
    # too long with that prompt
    assert OtherPrompts(rankings, 5, seed=0)._closest(0, [1, 2, 3]) == PromptGroup(
        [1, 8, 9], [[11, 2]]
    )
    assert others._closest(0, [0, 1]).responses == []
    drawn = [others.groups([0], step)[0] for step in range(100)]
    assert {tuple(group.prompt) for group in drawn if group.responses} == {(1, 5, 7, 7), (1, 8, 9)}
    assert any(not group.responses for group in drawn)  # both candidates were the same prompt
    assert drawn == [others.groups([0], step)[0] for step in range(100)]


def test_the_best_response_is_the_one_that_most_weight_ranks_first() -> None:
    group = PromptGroup([1], [[10, 2], [11, 2], [12, 2]])
    votes = [Vote([1, 2, 3], 1.0), Vote([2, 1, 1], 0.75), Vote([2, 3, 1], 0.5)]
    assert best_response(EncodedRanking(group, votes, "p")) == 2
    assert best_response(EncodedRanking(group, votes[:1], "p")) == 0
