"""How well a reward model orders rankings, and how well its heads know it.

Shapes: K responses of one prompt, N responses of all rankings, H heads, Q strict pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from pipeline.job import Metrics
from pipeline.statistics import ratio_interval
from stages.ranked_data import EncodedRanking
from stages.reward_losses import correct_pairs
from stages.shared_prefix import GroupScorer, score_groups


def measure(
    model: nn.Module,
    rankings: list[EncodedRanking],
    pad_id: int,
    seed: int,
    share_prefix: bool = False,
) -> Metrics:
    """How well the model orders rankings, of which one at least has a strict pair.

    With several heads, their mean is measured.

    accuracy over strict pairs with its 95 % interval (bootstrap over prompts: pairs of one prompt are
    not independent), kendall_tau (tau-b on rank vectors, mean over rankings), length_correlation
    (Pearson, score against response tokens, both centred within each ranking). With several heads
    also `disagreement` and `disagreement_error_correlation` (see `pair_disagreement`).
    """
    was_training = model.training
    model.eval()
    scorer = GroupScorer(model, pad_id, share_prefix)
    scores_NH = score_groups(scorer, [ranking.group for ranking in rankings]).cpu()
    model.train(was_training)
    counts: dict[str, Tensor] = {}
    taus, centred_scores, centred_lengths, spreads, wrongs = [], [], [], [], []
    sizes = [len(ranking.group.responses) for ranking in rankings]
    for ranking, scores_KH in zip(rankings, scores_NH.split(sizes), strict=True):
        own = scores_KH.mean(1)
        lengths = np.array([len(ids) for ids in ranking.group.responses], dtype=float)
        centred_scores.append(own.numpy() - own.numpy().mean())
        centred_lengths.append(lengths - lengths.mean())
        for ranks, _ in ranking.votes:
            ranks_K = torch.tensor(ranks)
            pair_counts = correct_pairs(own, ranks_K)
            counts[ranking.prompt_id] = counts.get(ranking.prompt_id, torch.zeros(2)) + pair_counts
            tau = kendalltau(own.numpy(), -np.array(ranks)).statistic
            taus.append(0.0 if np.isnan(tau) else float(tau))
            if pair_counts[1] > 0:
                spread_Q, wrong_Q = pair_disagreement(scores_KH, ranks_K)
                spreads.append(spread_Q)
                wrongs.append(wrong_Q)
    # a prompt whose responses all tie says nothing of the order
    table = torch.stack([count for count in counts.values() if count[1] > 0]).numpy()
    low, high = ratio_interval(table[:, 0], table[:, 1], seed)
    found = {
        "accuracy": float(table[:, 0].sum() / table[:, 1].sum()),
        "accuracy_low": low,
        "accuracy_high": high,
        "kendall_tau": float(np.mean(taus)),
        "length_correlation": correlation(
            np.concatenate(centred_scores), np.concatenate(centred_lengths)
        ),
        "pairs": int(table[:, 1].sum()),
    }
    if scores_NH.shape[1] > 1:
        spread, wrong = torch.cat(spreads).numpy(), torch.cat(wrongs).numpy()
        found["disagreement"] = float(spread.mean())
        found["disagreement_error_correlation"] = correlation(spread, wrong)
    return found


def pair_disagreement(scores_KH: Tensor, ranks_K: Tensor) -> tuple[Tensor, Tensor]:
    """For each strict pair how far the heads are apart, and whether their mean is wrong, both `[Q]`.

    Apart: the standard deviation over the heads of P(better wins) = sigmoid(difference), as Christiano
    et al. 2017 (arXiv 1706.03741, section 2.2.4) measure it. Wrong: 1, or 0.5 for equal scores.
    """
    better_Q, worse_Q = (ranks_K.unsqueeze(1) < ranks_K).nonzero(as_tuple=True)
    difference_QH = scores_KH[better_Q] - scores_KH[worse_Q]
    mean_Q = difference_QH.mean(1)
    wrong_Q = (mean_Q < 0).float() + 0.5 * (mean_Q == 0).float()
    return difference_QH.sigmoid().std(1, correction=0), wrong_Q


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one side does not vary."""
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
