"""The fit of a scaling law: on data whose law is known."""

import math

import numpy as np
import pytest

from pipeline import scaling_fit, scaling_plot
from pipeline.scaling import EPOCH, Law
from pipeline.scaling_fit import Point


def sweep(law, sizes, lengths, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Point(f"{n:g}-{d:g}", n, d, law.loss(n, d) * math.exp(noise * rng.standard_normal()))
        for n in sizes
        for d in lengths
    ]


WIDE = (np.geomspace(7e7, 1.6e10, 6), np.geomspace(5e9, 5e11, 5))


def test_a_law_without_noise_is_recovered():
    # the constants of arXiv 2404.10102 on the sizes and lengths of arXiv 2203.15556
    fitted = scaling_fit.fit(sweep(EPOCH, *WIDE), bootstraps=2)
    for name in ("E", "alpha", "beta"):
        assert getattr(fitted.law, name) == pytest.approx(getattr(EPOCH, name), rel=0.02)
    n, _ = fitted.law.optimum(5.88e23)
    best, _ = EPOCH.optimum(5.88e23)
    assert n == pytest.approx(best, rel=0.05)
    assert fitted.rms < 1e-3


def test_intervals_hold_the_truth_of_a_noisy_sweep_and_widen_beyond_it():
    law = Law(E=0.4, A=60.0, B=900.0, alpha=0.45, beta=0.55)
    sizes, lengths = np.geomspace(3e4, 1e6, 4), np.geomspace(5e4, 2e6, 4)
    fitted = scaling_fit.fit(sweep(law, sizes, lengths, noise=0.005, seed=1), bootstraps=12)
    inside = fitted.predict(3e5, 5e5)
    beyond = fitted.predict(1e7, 2e7)
    truth = law.loss(1e7, 2e7)
    assert inside[0] == pytest.approx(law.loss(3e5, 5e5), rel=0.02)
    assert beyond[1] < truth < beyond[2]
    assert (beyond[2] - beyond[1]) / beyond[0] > (inside[2] - inside[1]) / inside[0]


def test_the_gradient_is_that_of_differences():
    rng = np.random.default_rng(0)
    log_n, log_d, log_l = (
        np.log(rng.uniform(1e4, 1e6, (2, 7)))[0],
        np.full(7, 12.0),
        np.full(7, 0.3),
    )
    theta = np.array([3.0, 4.0, 0.1, 0.3, 0.4])
    _, gradient = scaling_fit._objective(theta, log_n, log_d, log_l)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        up = scaling_fit._objective(theta + step, log_n, log_d, log_l)[0]
        down = scaling_fit._objective(theta - step, log_n, log_d, log_l)[0]
        assert gradient[i] == pytest.approx((up - down) / 2e-6, rel=1e-4)


def test_one_run_that_went_wrong_does_not_bend_the_law():
    points = sweep(EPOCH, *WIDE)
    worst = points[7]
    points[7] = Point(worst.name, worst.parameters, worst.tokens, worst.loss * 1.3)
    fitted = scaling_fit.fit(points, bootstraps=1)
    assert fitted.law.loss(1e9, 1e11) == pytest.approx(EPOCH.loss(1e9, 1e11), rel=0.005)


def test_the_picture_and_the_lines_say_what_was_fitted(tmp_path):
    law = Law(E=0.4, A=60.0, B=900.0, alpha=0.45, beta=0.55)
    points = sweep(law, (3e4, 1e5, 4e5), (1e5, 3e5, 1e6), noise=0.003)
    fitted = scaling_fit.fit(points, bootstraps=4)
    text = "\n".join(scaling_fit.lines(fitted, None))
    assert "from 9 runs" in text
    assert "tokens a parameter" in text
    for name in ("one.svg", "two.svg"):
        scaling_plot.draw(fitted, tmp_path / name)
    first = (tmp_path / "one.svg").read_text()
    assert "training tokens" in first or "<svg" in first
    assert fitted.to_row()["law"]["E"] == fitted.law.E


def test_a_law_that_knows_no_best_size_says_so():
    points = [Point(f"{d}", n, d, 1.0) for n in (1e4, 1e5) for d in (1e5, 1e6)]
    flat = Law(E=1.0, A=0.0, B=0.0, alpha=0.0, beta=0.0)
    known = Law(E=0.4, A=60.0, B=900.0, alpha=0.45, beta=0.55)
    assert "no best size" in scaling_fit.optimum_line(
        scaling_fit.Fitted(points, flat, [flat], 0), 1e12
    )
    half = scaling_fit.Fitted(points, known, [flat, known], 0.2)
    assert "not known" in scaling_fit.optimum_line(half, 1e12)
    assert "misses the runs by 20%" in scaling_fit.lines(half, None)[-1]
