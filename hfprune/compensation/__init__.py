"""Closed-form recovery: weights on the kept units that make up for the removed ones, one file per method."""

from hfprune.compensation.base import Compensation, Fit
from hfprune.compensation.least_squares import LeastSquares
from hfprune.compensation.mean import MeanCompensation
from hfprune.compensation.output_regression import OutputRegression

__all__ = ["Compensation", "Fit", "LeastSquares", "MeanCompensation", "OutputRegression"]
