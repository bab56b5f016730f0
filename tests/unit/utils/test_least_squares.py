import pytest
import torch

from hfprune.utils.errors import CalibrationError
from hfprune.utils.least_squares import eliminate, reconstruction_error, refit, ridge
from hfprune.utils.second_moments import Moments
from tests.reference import least_squares as reference


def problem(tokens=60, inputs=12, outputs=5, seed=0):
    """Correlated inputs, of different sizes and with means, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix + 0.5
    return x * torch.linspace(0.3, 2, inputs), torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def moments_of(x, y=None):
    found = Moments(x.shape[1], device=x.device, paired=y is not None)
    for part in torch.arange(len(x)).split(7):  # sums do not care how tokens come
        found.add(x[part], None if y is None else y[part])
    return found


KEEP = torch.tensor([0, 2, 3, 7, 11])


@pytest.mark.parametrize("damping", [1e-6, 0.01, 10.0])
def test_refit_is_ridge_regression(damping):
    x, weight = problem()
    moments = moments_of(x)
    expected = reference.fit(weight, x, x @ weight.T, KEEP, ridge(moments, damping))
    torch.testing.assert_close(refit(weight, moments, KEEP, damping=damping), expected, atol=1e-9, rtol=1e-9)


def test_refit_to_a_second_input():
    x, weight = problem()
    y = x + 0.3 * torch.randn_like(x)
    moments = moments_of(x, y)
    expected = reference.fit(weight, x, y @ weight.T, KEEP, ridge(moments, 0.01))
    torch.testing.assert_close(refit(weight, moments, KEEP, damping=0.01), expected, atol=1e-9, rtol=1e-9)


def test_keeping_everything_changes_nothing():
    x, weight = problem()
    every = torch.arange(12)
    torch.testing.assert_close(refit(weight, moments_of(x), every, damping=0.01), weight, atol=1e-12, rtol=0)


def test_large_damping_leaves_the_kept_weights():
    x, weight = problem()
    new = refit(weight, moments_of(x), KEEP, damping=1e9)
    torch.testing.assert_close(new, weight[:, KEEP], atol=1e-6, rtol=0)


def test_reconstruction_error_is_what_is_lost():
    x, weight = problem()
    new = refit(weight, moments_of(x), KEEP, damping=0.01)
    lost = (x @ weight.T - x[:, KEEP] @ new.T).square().sum() / (x @ weight.T).square().sum()
    assert reconstruction_error(weight, moments_of(x), new, KEEP) == pytest.approx(float(lost), rel=1e-9)
    assert reconstruction_error(weight, moments_of(x), weight[:, KEEP], KEEP) > float(lost)  # the fit helps


@pytest.mark.parametrize("unit_width", [1, 2, 3])
def test_elimination_removes_what_costs_least(unit_width):
    x, weight = problem()
    moments = moments_of(x)
    keep, costs = eliminate(weight, moments, 2, unit_width=unit_width, damping=0.01)
    assert keep.tolist() == reference.greedy(weight, x, 2, unit_width, ridge(moments, 0.01))
    assert (costs >= 0).all()
    assert costs.isfinite().all()


@pytest.mark.parametrize("unit_width", [1, 3])
def test_costs_are_increases_of_the_loss(unit_width):
    x, weight = problem()
    moments = moments_of(x)
    units = 12 // unit_width
    keep, costs = eliminate(weight, moments, units - 1, unit_width=unit_width, damping=0.01)
    (gone,) = set(range(units)) - set(keep.tolist())
    lam = ridge(moments, 0.01)
    before = reference.loss(weight, x, range(units), unit_width, lam)
    after = reference.loss(weight, x, keep.tolist(), unit_width, lam)
    assert float(costs[gone]) == pytest.approx(after - before, rel=1e-7)
    without = [u for u in keep.tolist() if u != keep[0]]
    more = reference.loss(weight, x, without, unit_width, lam)
    assert float(costs[keep[0]]) == pytest.approx(more - after, rel=1e-7)  # of a kept unit: at the end


def test_larger_steps_remove_as_many():
    x, weight = problem()
    keep, _ = eliminate(weight, moments_of(x), 3, unit_width=1, damping=0.01, step=4)
    assert len(keep) == 3
    assert keep.tolist() == sorted(set(keep.tolist()))


def test_dead_and_duplicate_inputs():
    """Inputs that are zero, or equal, make the moments singular: the ridge decides, and nothing is NaN."""
    x, weight = problem()
    x[:, 4] = 0
    x[:, 5] = x[:, 6]
    keep, costs = eliminate(weight, moments_of(x), 10, unit_width=1, damping=0.01)
    assert 4 not in keep
    assert not {5, 6} <= set(keep.tolist())
    assert refit(weight, moments_of(x), keep, damping=0.01).isfinite().all()
    assert costs.isfinite().all()


@pytest.mark.parametrize("centred", [False, True])
def test_a_weighted_token_counts_as_often(centred):
    x, _ = problem()
    y, times = x + 0.3 * torch.randn_like(x), torch.arange(len(x)) % 4
    weighted, repeated = (Moments(12, device=x.device, paired=True) for _ in range(2))
    weighted.add(x.view(6, 10, 12), y.view(6, 10, 12), times.view(6, 10))
    repeated.add(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
    if centred:
        weighted, repeated = weighted.centred(), repeated.centred()
    for a, b in zip(weighted.tensors(), repeated.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_moments_that_are_not_finite():
    x, weight = problem()
    x[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        refit(weight, moments_of(x), KEEP, damping=0.01)
