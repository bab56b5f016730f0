import pytest
import torch

from hfprune.compensation import LeastSquares, MeanCompensation, OutputRegression
from hfprune.utils.errors import ConfigError
from hfprune.utils.least_squares import ridge
from tests.reference import least_squares as reference
from tests.unit.utils.test_least_squares import KEEP, moments_of, problem

BIAS = torch.linspace(-1, 1, 5, dtype=torch.float64)


def test_least_squares_with_a_bias_fits_an_intercept():
    x, weight = problem()
    moments = moments_of(x)
    fit = LeastSquares(damping=0.05).fit(weight, BIAS, moments, KEEP)
    lam = ridge(moments.centred(), 0.05)
    expected, constant = reference.fit_with_intercept(weight, x, x @ weight.T, KEEP, lam)
    torch.testing.assert_close(fit.weight, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(fit.bias, BIAS + constant, atol=1e-9, rtol=1e-9)


def test_least_squares_adds_no_bias():
    x, weight = problem()
    fit = LeastSquares().fit(weight, None, moments_of(x), KEEP)
    assert fit.bias is None


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("paired", [False, True])
def test_output_regression_is_a_line_per_output(bias, paired):
    x, weight = problem()
    y = x + 0.3 * torch.randn_like(x) if paired else None
    target = (x if y is None else y) @ weight.T
    fit = OutputRegression(target="dense" if paired else "module").fit(weight, bias, moments_of(x, y), KEEP)
    factors, constants = reference.output_regression(weight, x, target, KEEP, intercept=bias is not None)
    torch.testing.assert_close(fit.weight, factors[:, None] * weight[:, KEEP], atol=1e-9, rtol=1e-9)
    if bias is not None:
        torch.testing.assert_close(fit.bias, bias + constants, atol=1e-9, rtol=1e-9)


def test_output_regression_where_nothing_varies():
    x, weight = problem()
    x[:, KEEP] = 0
    fit = OutputRegression().fit(weight, None, moments_of(x), KEEP)
    torch.testing.assert_close(fit.weight, weight[:, KEEP])


def test_mean_compensation_keeps_the_mean_output():
    x, weight = problem()
    fit = MeanCompensation().fit(weight, BIAS, moments_of(x), KEEP)
    gone = [c for c in range(12) if c not in KEEP]
    torch.testing.assert_close(fit.weight, weight[:, KEEP])
    torch.testing.assert_close(fit.bias, BIAS + weight[:, gone] @ x[:, gone].mean(0))


def test_what_cannot_be():
    x, weight = problem()
    with pytest.raises(ConfigError, match="requires projections with a bias"):
        MeanCompensation().fit(weight, None, moments_of(x), KEEP)
    with pytest.raises(ConfigError, match="target='teacher' is unknown"):
        LeastSquares(target="teacher")
    with pytest.raises(ConfigError, match="tokens='all' is unknown"):
        LeastSquares(tokens="all")
    with pytest.raises(ConfigError, match="sequential=True"):
        LeastSquares(target="dense", sequential=False)
    with pytest.raises(ConfigError, match="damping=0"):
        LeastSquares(damping=0)
