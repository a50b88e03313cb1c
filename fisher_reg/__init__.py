"""Input-space Fisher information of a classifier: estimate it, bound it, penalise it while training."""

from fisher_reg.bounds import UpperBound, fisher_bound, lipschitz_bound, register_bound_rule
from fisher_reg.callbacks import FisherMonitor, FisherRegularizer
from fisher_reg.errors import (
    NoBoundError,
    NonFiniteError,
    NonFiniteJacobianError,
    NonFiniteLogitsError,
    NonFiniteWeightsError,
)
from fisher_reg.estimate import fisher_spectral_norm, fisher_trace
from fisher_reg.figures import bound_versus_empirical
from fisher_reg.forward import LogitsOf
from fisher_reg.likelihood import Bernoulli, Categorical, Gaussian
from fisher_reg.metrics import FisherSpectralNorm, FisherTrace
from fisher_reg.penalty import SpectralPenalty, TracePenalty, mean_log1p
from fisher_reg.solvers import EigenResult, Exact, Hutchinson, Lanczos, PowerIteration

__all__ = [
    "Bernoulli",
    "Categorical",
    "EigenResult",
    "Exact",
    "FisherMonitor",
    "FisherRegularizer",
    "FisherSpectralNorm",
    "FisherTrace",
    "Gaussian",
    "Hutchinson",
    "Lanczos",
    "LogitsOf",
    "NoBoundError",
    "NonFiniteError",
    "NonFiniteJacobianError",
    "NonFiniteLogitsError",
    "NonFiniteWeightsError",
    "PowerIteration",
    "SpectralPenalty",
    "TracePenalty",
    "UpperBound",
    "bound_versus_empirical",
    "fisher_bound",
    "fisher_spectral_norm",
    "fisher_trace",
    "lipschitz_bound",
    "mean_log1p",
    "register_bound_rule",
]
