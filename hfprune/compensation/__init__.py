"""Compensation: closed-form fits of the kept weights that reduce the error of the removed units, by method."""

from hfprune.compensation.base import Compensation, Fit
from hfprune.compensation.least_squares import LeastSquares
from hfprune.compensation.mean import MeanCompensation
from hfprune.compensation.output_regression import OutputRegression

__all__ = ["Compensation", "Fit", "LeastSquares", "MeanCompensation", "OutputRegression"]
