"""What the win rate would be if both models wrote equally long responses.

The regression of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475, eq. 1) for two
models: the log-odds that the first wins are

    theta + phi * tanh(d / std(d)),    d = its length - the other's, of each prompt

fitted to the outcomes (1, 0.5, 0) by logistic regression; the rate is that at d = 0, logistic(theta).

Where it differs from AlpacaEval 2. There is no term for the difficulty of an instruction: it is
learned there from hundreds of models, and two have nothing to learn it from. Nothing is added to the
data against gaming, and the fit is by Newton's method under one weak normal prior (below) instead of
an L1 penalty chosen by cross-validation. d is the policy's length less the other's, in characters.

Shapes: N prompts, D draws; the two coefficients (theta, phi) are the last dimension, F.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.statistics import Estimate, Floats, bootstrap

PRIOR_STD = 10.0
"""Standard deviation of the prior of theta and phi: it moves nothing that can be seen, and keeps a model
that always wins from an infinite theta."""
_STEPS = 100
_MOST = 2.0  # a longer Newton step may overshoot where all outcomes are nearly alike


def length_controlled(
    outcomes: Sequence[float], lengths: Sequence[int], other_lengths: Sequence[int], seed: int
) -> Estimate:
    """The rate at equal length with its 95 % interval (bootstrap over prompts, fitted anew each time)."""
    features_NF = design(lengths, other_lengths)
    outcomes_N = np.asarray(outcomes, dtype=np.float64)
    count = len(outcomes_N)
    value = _rate(fit(features_NF, outcomes_N, np.ones((1, count))))[0]
    low, high = bootstrap(
        lambda times_DN: _rate(fit(features_NF, outcomes_N, times_DN)), count, seed
    )
    return Estimate(float(value), low, high, count)


def design(lengths: Sequence[int], other_lengths: Sequence[int]) -> Floats:
    """One, and tanh of the normalised difference: `[N, 2]`. Without any difference the second is 0."""
    difference_N = np.subtract(lengths, other_lengths).astype(np.float64)
    spread = float(np.std(difference_N, ddof=1)) if len(difference_N) > 1 else 0.0
    squashed_N = np.tanh(difference_N / spread) if spread > 0 else np.zeros_like(difference_N)
    return np.stack([np.ones_like(difference_N), squashed_N], axis=1)


def fit(features_NF: Floats, outcomes_N: Floats, times_DN: Floats) -> Floats:
    """Coefficients of the weighted logistic regression of each draw, `[D, F]`.

    An outcome of 0.5 is half a win and half a loss, as a tie is.
    """
    beta_DF = np.zeros((len(times_DN), features_NF.shape[1]))
    prior_FF = np.eye(features_NF.shape[1]) / PRIOR_STD**2
    products_NFF = np.einsum("nf,ng->nfg", features_NF, features_NF).reshape(len(features_NF), -1)
    for _ in range(_STEPS):
        p_DN = _logistic(beta_DF @ features_NF.T)
        slope_DF = (times_DN * (outcomes_N - p_DN)) @ features_NF - beta_DF @ prior_FF
        curve_DN = times_DN * p_DN * (1 - p_DN)
        curve_DFF = (curve_DN @ products_NFF).reshape(len(times_DN), *prior_FF.shape) + prior_FF
        step_DF = np.linalg.solve(curve_DFF, slope_DF[..., None])[..., 0]
        beta_DF += np.clip(step_DF, -_MOST, _MOST)
        if np.abs(step_DF).max() < 1e-10:
            break
    return beta_DF


def _rate(beta_DF: Floats) -> Floats:
    return _logistic(beta_DF[:, 0])


def _logistic(x: Floats) -> Floats:
    p: Floats = np.exp(-np.logaddexp(0.0, -x))
    return p
