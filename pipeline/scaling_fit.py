"""A scaling law from runs of one's own: L(N, D) = E + A / N^alpha + B / D^beta.

As arXiv 2203.15556, appendix D.2, fits it: the Huber loss (delta 1e-3) of log L against the log-sum-exp of
(a - alpha log N, b - beta log D, e), minimised by L-BFGS from a grid of starts. Intervals are a residual
bootstrap, the percentiles of fits to L with the residuals drawn anew: a sweep of a dozen runs has one run
at each place, which a bootstrap over runs would leave empty.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from pipeline import states
from pipeline.errors import ConfigError
from pipeline.ledger import big
from pipeline.scaling import Law
from pipeline.tables import align
from pipeline.workspace import Run

LEAST = 6
"""Different runs; five numbers are fitted."""
_DELTA = 1e-3
_BOOTSTRAPS = 200
_STARTS = 24
# runs of one sweep repeat themselves within a per cent or two
_DOUBTFUL = 0.05
_LEVEL = (2.5, 97.5)
_NAMES = ("E", "A", "B", "alpha", "beta")
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Point:
    """One run: parameters, tokens read, held-out loss in nats a token."""

    name: str
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Fitted:
    """The law, those of the bootstrap, and the runs behind it."""

    points: list[Point]
    law: Law
    draws: list[Law]
    rms: float
    """Root of the mean square of the residuals of log L."""

    def interval(self, name: str) -> tuple[float, float]:
        """95 % of one of the five numbers."""
        low, high = np.percentile([getattr(law, name) for law in self.draws], _LEVEL)
        return float(low), float(high)

    def predict(self, parameters: float, tokens: float) -> tuple[float, float, float]:
        """The loss of a model, with its 95 % interval."""
        losses = [law.loss(parameters, tokens) for law in self.draws]
        low, high = np.percentile(losses, _LEVEL)
        return self.law.loss(parameters, tokens), float(low), float(high)

    def to_row(self) -> dict[str, Any]:
        return {
            "law": {name: getattr(self.law, name) for name in _NAMES},
            "intervals": {name: self.interval(name) for name in _NAMES},
            "rms_log_residual": self.rms,
            "runs": [point.__dict__ for point in self.points],
            "extrapolated": [
                dict(zip(("parameters", "tokens", "loss", "low", "high"), row, strict=True))
                for row in extrapolated(self)
            ],
        }


def read_point(run: Run) -> Point:
    """What the pretraining of a run has reached.

    Raises:
        ConfigError: it is not done, or did not begin from nothing.
    """
    state = next((s for s in states.inspect(run) if s.step.stage.name == "pretrain"), None)
    made = state.manifest if state and state.word == "done" else None
    if made is None:
        raise ConfigError(
            f"{run.path}: its pretraining is not done",
            f"prefline run {run.path} --until pretrain",
        )
    loss = made.metrics.get("heldout_loss")
    if run.settings.model.base or not isinstance(loss, int | float):
        raise ConfigError(f"{run.path}: only models that were trained from scratch tell of scaling")
    return Point(run.path.name, float(made.metrics["parameters"]), made.cost["tokens"], float(loss))


# ---- fit -----------------------------------------------------------------------------------


def fit(points: list[Point], bootstraps: int = _BOOTSTRAPS, seed: int = 0) -> Fitted:
    """The law of these runs with its bootstrap."""
    log_n, log_d, log_l = (
        np.log([getattr(p, name) for p in points]) for name in ("parameters", "tokens", "loss")
    )
    theta = _best(log_n, log_d, log_l, _starts(log_n, log_d, log_l))
    fitted = _log_loss(theta, log_n, log_d)
    residuals = log_l - fitted
    rms = float(np.sqrt(np.mean(residuals**2)))
    # five numbers were fitted: what is left is smaller than the noise
    spread = residuals * np.sqrt(len(points) / max(1, len(points) - 5))
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(bootstraps):
        again = fitted + rng.choice(spread - spread.mean(), len(points))
        # from the best fit and from places around it: a local minimum is not an interval
        near = [theta, *(theta * (1 + 0.3 * rng.standard_normal(5)) for _ in range(2))]
        draws.append(_law(_best(log_n, log_d, again, near)))
    return Fitted(points, _law(theta), draws, rms)


def _starts(log_n: Array, log_d: Array, log_l: Array) -> list[Array]:
    """The best of the grid of arXiv 2203.15556, appendix D.2."""
    halves, fives = (0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
    grid = np.array(
        list(itertools.product(fives, fives, (-1.0, -0.5, 0.0, 0.5, 1.0), halves, halves))
    )
    losses = [_objective(theta, log_n, log_d, log_l)[0] for theta in grid]
    return list(grid[np.argsort(losses, kind="stable")[:_STARTS]])


def _best(log_n: Array, log_d: Array, log_l: Array, starts: list[Array]) -> Array:
    found = [
        minimize(
            _objective, start, args=(log_n, log_d, log_l), jac=True, method="L-BFGS-B",
            # exponents below 0 would let a larger model be worse
            bounds=[(None, None)] * 3 + [(0.0, 3.0)] * 2, options={"maxiter": 2000},
        )
        for start in starts
    ]  # fmt: skip
    best = min(found, key=lambda result: float(result.fun))
    return np.asarray(best.x)


def _parts(theta: Array, log_n: Array, log_d: Array) -> Array:
    a, b, e, alpha, beta = theta
    return np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])


def _log_loss(theta: Array, log_n: Array, log_d: Array) -> Array:
    parts = _parts(theta, log_n, log_d)
    top = parts.max(0)
    return np.asarray(top + np.log(np.exp(parts - top).sum(0)))


def _objective(theta: Array, log_n: Array, log_d: Array, log_l: Array) -> tuple[float, Array]:
    """Sum of the Huber losses, and its gradient by (a, b, e, alpha, beta)."""
    parts = _parts(theta, log_n, log_d)
    top = parts.max(0)
    weights = np.exp(parts - top)
    total = weights.sum(0)
    off = top + np.log(total) - log_l
    small = np.abs(off) <= _DELTA
    loss = np.where(small, 0.5 * off**2, _DELTA * (np.abs(off) - 0.5 * _DELTA)).sum()
    slope = np.where(small, off, _DELTA * np.sign(off)) * weights / total
    gradient = np.array(
        [slope[0].sum(), slope[1].sum(), slope[2].sum(),
         -(slope[0] * log_n).sum(), -(slope[1] * log_d).sum()]
    )  # fmt: skip
    # of order one, so that the stopping rules of L-BFGS mean something
    return float(loss) / _DELTA, gradient / _DELTA


def _law(theta: Array) -> Law:
    a, b, e, alpha, beta = (float(x) for x in theta)
    with np.errstate(over="ignore"):
        A, B, E = (float(np.exp(x)) for x in (a, b, e))
    return Law(E=E, A=A, B=B, alpha=alpha, beta=beta)


# ---- say -----------------------------------------------------------------------------------


def extrapolated(fitted: Fitted) -> list[tuple[float, float, float, float, float]]:
    """(N, D, loss, low, high) of models larger than the largest run, with tokens in proportion."""
    largest = max(fitted.points, key=lambda p: (p.parameters, p.tokens))
    return [
        (n, d, *fitted.predict(n, d))
        for n, d in (
            (largest.parameters * factor, largest.tokens * factor) for factor in (1, 2, 4, 10)
        )
    ]


def lines(fitted: Fitted, flops: float | None) -> list[str]:
    """The law, how well it fits, what it says of larger models."""
    law, points = fitted.law, fitted.points
    rows: list[tuple[str, ...]] = [("", "fitted", "95 % interval")]
    for name in _NAMES:
        low, high = fitted.interval(name)
        rows.append((name, f"{getattr(law, name):.4g}", f"{low:.4g} to {high:.4g}"))
    table: list[tuple[str, ...]] = [("run", "parameters", "tokens", "loss", "fitted")]
    for p in sorted(points, key=lambda p: (p.parameters, p.tokens)):
        fit_loss = law.loss(p.parameters, p.tokens)
        size = (big(p.parameters), big(p.tokens))
        table.append((p.name, *size, f"{p.loss:.4f}", f"{fit_loss:.4f}"))
    ahead: list[tuple[str, ...]] = [("beyond the runs", "tokens", "loss", "95 % interval")]
    for n, d, loss, low, high in extrapolated(fitted)[1:]:
        cells = (big(n), big(d), f"{loss:.3f}", f"{low:.3f} to {high:.3f}")
        ahead.append((f"{cells[0]} parameters", *cells[1:]))
    budget = flops or 6 * max(p.parameters * p.tokens for p in points)
    return [
        f"L(N, D) = E + A / N^alpha + B / D^beta, in nats a token, from {len(points)} runs;"
        f" off by {fitted.rms:.2%} on average",
        *align(rows, right=(1, 2)),
        "",
        *align(table, right=(1, 2, 3, 4)),
        "",
        *align(ahead, right=(1, 2, 3)),
        "",
        optimum_line(fitted, budget),
        *_doubts(fitted),
    ]


def optimum_line(fitted: Fitted, flops: float) -> str:
    """The best use of a budget by the fitted law."""
    ratio = _ratio(fitted.law, flops)
    if ratio is None:
        return "no best size follows: the loss does not fall with parameters, or not with tokens"
    ratios = [found for law in fitted.draws if (found := _ratio(law, flops)) is not None]
    n, d = fitted.law.optimum(flops)
    known = "not known"
    if len(ratios) > 0.95 * len(fitted.draws):
        low, high = np.percentile(ratios, _LEVEL)
        known = f"{low:.2g} to {high:.2g}"
    return (
        f"best use of {big(flops, 'FLOP')} by this law: {big(n)} parameters, {big(d)} tokens:"
        f" {ratio:.3g} tokens a parameter (95 % interval: {known})"
    )


def _ratio(law: Law, flops: float) -> float | None:
    """Tokens a parameter at the best use of a budget; None where a law has none."""
    try:
        n, d = law.optimum(flops)
        return d / n
    except (ZeroDivisionError, OverflowError):
        return None


def _doubts(fitted: Fitted) -> list[str]:
    found = []
    if fitted.rms > _DOUBTFUL:
        found.append(
            f"WARNING the law misses the runs by {fitted.rms:.0%}: do not extrapolate. It holds for models that"
            " are past their first steep fall; leave out the smallest and the shortest runs"
        )
    for name in ("alpha", "beta"):
        low, high = fitted.interval(name)
        value = getattr(fitted.law, name)
        if high - low > 2 * value:
            what = "sizes" if name == "alpha" else "lengths"
            found.append(f"WARNING {name} is not known from these runs: more {what}, further apart")
    return found
