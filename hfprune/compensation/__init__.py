"""Compensation: closed-form fits of the kept weights that reduce the error of the removed units, by method."""

from hfprune.compensation.base import Compensation, ExpertCompensation, Fit
from hfprune.compensation.expert_least_squares import ExpertLeastSquares
from hfprune.compensation.least_squares import LeastSquares
from hfprune.compensation.mean import MeanCompensation
from hfprune.compensation.merge_experts import MergeExperts
from hfprune.compensation.output_regression import OutputRegression

__all__ = [
    "Compensation",
    "ExpertCompensation",
    "ExpertLeastSquares",
    "Fit",
    "LeastSquares",
    "MeanCompensation",
    "MergeExperts",
    "OutputRegression",
]
