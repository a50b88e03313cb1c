"""Penalties of the sensitivity, differentiable with respect to the parameters.

Public: all of ``__all__``. A user-defined penalty is any function with the signature of :class:`Penalty`. A penalty
that needs the model only near the inputs of the training step should derive from :class:`PointPenalty`, whose ``at``
gets a :class:`TrainingPoint`: the regularizer can then reuse the forward of the step.
"""

from fisher_reg.penalty.bound import BoundPenalty
from fisher_reg.penalty.contrast import LabelContrastPenalty
from fisher_reg.penalty.divergence import KLPenalty
from fisher_reg.penalty.gradient_norm import GradientNormPenalty
from fisher_reg.penalty.nuclear_norm import NuclearNormPenalty
from fisher_reg.penalty.point import Penalty, PointPenalty, TrainingPoint, squared_length
from fisher_reg.penalty.spectral import SpectralPenalty, mean_log1p
from fisher_reg.penalty.trace import TracePenalty

__all__ = [
    "BoundPenalty",
    "GradientNormPenalty",
    "KLPenalty",
    "LabelContrastPenalty",
    "NuclearNormPenalty",
    "Penalty",
    "PointPenalty",
    "SpectralPenalty",
    "TracePenalty",
    "TrainingPoint",
    "mean_log1p",
    "squared_length",
]
