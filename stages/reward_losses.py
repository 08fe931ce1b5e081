"""Losses over the scores of one ranking: pure functions on tensors.

Shapes: K responses of one prompt, Q pairs, H heads of an ensemble. Scores are `[K]` or `[K, H]` and the loss
has no dimension or `[H]`: everything works along the first dimension. ranks_K: 1 is best, equal
numbers are ties. Scores are nats on the scale of a Bradley-Terry (logistic) model.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_TIED = 12
"""Most responses in one tie above others that `plackett_luce_loss` takes: it sums over 2^12 sets."""


def pairwise_loss(
    scores_K: Tensor,
    ranks_K: Tensor,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    ties_count: bool = False,
) -> Tensor:
    """Mean of -log sigmoid(better - worse) over the strict pairs of one ranking.

    InstructGPT (arXiv 2203.02155), eq. 1: all pairs of a prompt are one batch element.

    margin: subtracted inside the sigmoid, times the levels between the two (Llama 2, arXiv
        2307.09288, eq. 2, where it grows with how much better the one was said to be).
    label_smoothing: probability that a label is the wrong way round (Bradley-Terry with that noise;
        Christiano et al. 2017, arXiv 1706.03741, section 2.2.3 allow for such errors).
    ties_count: a tie is a pair whose label is one half (same section); else ties are left out.
        Needed where a ranking may have no strict pair.
    """
    better_Q, worse_Q = (ranks_K.unsqueeze(1) < ranks_K).nonzero(as_tuple=True)
    difference_Q = scores_K[better_Q] - scores_K[worse_Q]
    if margin:
        # ranks without gaps: 1, 2, 2, 4 and 1, 2, 2, 3 say the same
        level_K = ranks_K.unique(return_inverse=True)[1]
        margin_Q = margin * (level_K[worse_Q] - level_K[better_Q])
        difference_Q = difference_Q - margin_Q.view(-1, *(1 for _ in scores_K.shape[1:]))
    losses_Q = -logsigmoid(difference_Q)
    if label_smoothing:
        flipped_Q = -logsigmoid(-difference_Q)
        losses_Q = (1 - label_smoothing) * losses_Q + label_smoothing * flipped_Q
    if ties_count:
        equal_KK = (ranks_K.unsqueeze(1) == ranks_K).triu(diagonal=1)
        first_Q, second_Q = equal_KK.nonzero(as_tuple=True)
        difference_Q = scores_K[first_Q] - scores_K[second_Q]
        halves_Q = -0.5 * (logsigmoid(difference_Q) + logsigmoid(-difference_Q))
        losses_Q = torch.cat([losses_Q, halves_Q])
    return losses_Q.mean(0)


def plackett_luce_loss(scores_K: Tensor, ranks_K: Tensor) -> Tensor:
    """-log P(ranking) where P(i is chosen first among S) = exp(s_i) / sum_{j in S} exp(s_j).

    Plackett 1975; Luce 1959. A ranking with ties is an order of which less is known: its likelihood
    is the sum over all orders that agree with it, the exact treatment of ties in the partial
    likelihood that this model shares with Cox regression (Kalbfleisch and Prentice 1973, Biometrika
    60(2), 267-278). A "top 2 of 9", whose rest is one tie, is the product of its two choices. By
    Luce's axiom a ranking of some of the responses is right without the others. K = 2 is
    Bradley-Terry.

    Raises:
        ValueError: more than MAX_TIED responses share a rank that is not the last.
    """
    loss = torch.zeros_like(scores_K[0])
    for rank in ranks_K.unique()[:-1]:
        tied_M, rest_L = scores_K[ranks_K == rank], scores_K[ranks_K > rank]
        loss = loss - _log_all_before(tied_M, rest_L.logsumexp(0))
    return loss


def _log_all_before(tied_M: Tensor, log_rest: Tensor) -> Tensor:
    """log P(all of `tied_M` are chosen, in any order, before any of the rest), `[]` or `[H]`.

    Sums over orders by dynamic programming over the sets chosen so far: P(S) is the sum over the last
    one i of S of P(S - i) exp(s_i) / (what was left before i). 2^M sets instead of M! orders.
    """
    if len(tied_M) > MAX_TIED:
        raise ValueError(f"{len(tied_M)} tied responses, at most {MAX_TIED}")
    log_p_S = torch.zeros_like(log_rest).unsqueeze(0)
    for left_SJ, last_CI, from_CI in _sets(len(tied_M)):
        log_left_S = torch.logaddexp(tied_M[left_SJ].logsumexp(1), log_rest)
        log_p_S = (log_p_S[from_CI] + tied_M[last_CI] - log_left_S[from_CI]).logsumexp(1)
    return log_p_S[0]


@lru_cache(maxsize=MAX_TIED)
def _sets(M: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """How the sets C of 1, 2 ... M of `range(M)` follow from the sets S of one less.

    left_SJ: what is not in S. last_CI: the elements of C; from_CI: the S that is C without that one.
    """
    steps = []
    before: list[tuple[int, ...]] = [()]
    for size in range(1, M + 1):
        sets = list(combinations(range(M), size))
        at = {chosen: index for index, chosen in enumerate(before)}
        left = [[i for i in range(M) if i not in chosen] for chosen in before]
        source = [[at[chosen[:k] + chosen[k + 1 :]] for k in range(size)] for chosen in sets]
        steps.append((torch.tensor(left), torch.tensor(sets), torch.tensor(source)))
        before = sets
    return steps


def centering_penalty(scores_K: Tensor) -> Tensor:
    """Mean of (s_i + s_j)^2 over the pairs i < j: the loss does not fix the level of scores, this does.

    Eisenstein et al. 2023 (arXiv 2312.09244); for K = 2 it is what TRL adds to its loss.
    """
    i_Q, j_Q = torch.triu_indices(len(scores_K), len(scores_K), offset=1, device=scores_K.device)
    return (scores_K[i_Q] + scores_K[j_Q]).square().mean(0)


def off_prompt_loss(on_prompt: Tensor, off_prompt: Tensor) -> Tensor:
    """-log sigmoid(on - off) of one response behind its own prompt and behind another one.

    Rankings compare responses to the same prompt, which are mostly alike in how they fit it, so a
    small model can learn to score without reading the prompt. Here all but the fit is equal.
    """
    return -logsigmoid(on_prompt - off_prompt)


def correct_pairs(scores_K: Tensor, ranks_K: Tensor) -> Tensor:
    """(pairs in the right order, strict pairs); equal scores count half. Scores without heads."""
    difference_KK = scores_K.unsqueeze(1) - scores_K.unsqueeze(0)
    is_better_KK = ranks_K.unsqueeze(1) < ranks_K.unsqueeze(0)
    right_KK = (difference_KK > 0).float() + 0.5 * (difference_KK == 0).float()
    return torch.stack([(right_KK * is_better_KK).sum(), is_better_KK.sum().float()])
