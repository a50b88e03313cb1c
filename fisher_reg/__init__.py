"""Input-space Fisher information of a classifier: estimate it, bound it, penalise it while training."""

from typing import TYPE_CHECKING

from fisher_reg.blackbox import BlackBox, BlackBoxMax, BlackBoxResult, blackbox_spectral_norm
from fisher_reg.blockwise import blockwise_fisher_bound
from fisher_reg.bounds import (
    Box,
    Gain,
    L2Ball,
    Layer,
    ScaledGain,
    Tightening,
    UpperBound,
    certified_divergence,
    certified_radius,
    fisher_bound,
    lipschitz_bound,
    local_fisher_bound,
    register_bound_rule,
)
from fisher_reg.check import Finding, ModelCheck, check_model
from fisher_reg.errors import (
    ForwardError,
    NoBoundError,
    NonFiniteError,
    NonFiniteJacobianError,
    NonFiniteLogitsError,
    NonFiniteWeightsError,
)
from fisher_reg.estimate import (
    evaluation_operator,
    fisher_effective_rank,
    fisher_eigenpairs,
    fisher_spectral_norm,
    fisher_spectral_norm_and_trace,
    fisher_trace,
)
from fisher_reg.evaluation import LogitsOf, deployed
from fisher_reg.figures import bound_versus_empirical, sensitive_examples
from fisher_reg.geometry import L2, LInf
from fisher_reg.lazy import lazy_names
from fisher_reg.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from fisher_reg.linf import fisher_linf_norm
from fisher_reg.measurement import fisher_kl_ratio
from fisher_reg.operator import InputFisher
from fisher_reg.penalty import (
    BoundPenalty,
    GradientNormPenalty,
    KLPenalty,
    LabelContrastPenalty,
    NuclearNormPenalty,
    SpectralPenalty,
    TracePenalty,
    mean_log1p,
)
from fisher_reg.probes import Rademacher, SampledLabels, StandardNormal
from fisher_reg.single_step import single_step_ratio
from fisher_reg.solvers import (
    EigenResult,
    Exact,
    HutchinsonMax,
    Interval,
    Lanczos,
    PowerIteration,
    SignIteration,
    SignResult,
)
from fisher_reg.summary import summarize
from fisher_reg.tempered import MarginTempered
from fisher_reg.trace import Hutchinson
from fisher_reg.universal import universal_spectral_norm

if TYPE_CHECKING:
    from fisher_reg.callbacks import (
        ConstantSchedule,
        CosineSchedule,
        FisherMonitor,
        FisherRegularizer,
        LinearSchedule,
    )
    from fisher_reg.metrics import FisherSpectralNorm, FisherTrace
    from fisher_reg.version import __version__
else:  # names that need Lightning or torchmetrics, whose imports take longer than that of torch
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "callbacks": ("ConstantSchedule", "CosineSchedule", "FisherMonitor", "FisherRegularizer", "LinearSchedule"),
            "metrics": ("FisherSpectralNorm", "FisherTrace"),
            "version": ("__version__",),
        },
    )

__all__ = [
    "Bernoulli",
    "BlackBox",
    "BlackBoxMax",
    "BlackBoxResult",
    "BoundPenalty",
    "Box",
    "Categorical",
    "ConstantSchedule",
    "CosineSchedule",
    "EigenResult",
    "Exact",
    "Finding",
    "FisherMonitor",
    "FisherRegularizer",
    "FisherSpectralNorm",
    "FisherTrace",
    "ForwardError",
    "Gain",
    "Gaussian",
    "GradientNormPenalty",
    "Hutchinson",
    "HutchinsonMax",
    "InputFisher",
    "Interval",
    "KLPenalty",
    "L2",
    "L2Ball",
    "LInf",
    "LabelContrastPenalty",
    "Lanczos",
    "Layer",
    "Likelihood",
    "LinearSchedule",
    "LogitsOf",
    "MarginTempered",
    "ModelCheck",
    "NoBoundError",
    "NonFiniteError",
    "NonFiniteJacobianError",
    "NonFiniteLogitsError",
    "NonFiniteWeightsError",
    "NuclearNormPenalty",
    "PowerIteration",
    "Rademacher",
    "SampledLabels",
    "ScaledGain",
    "SignIteration",
    "SignResult",
    "SpectralPenalty",
    "StandardNormal",
    "Tightening",
    "TracePenalty",
    "UpperBound",
    "__version__",
    "blackbox_spectral_norm",
    "blockwise_fisher_bound",
    "bound_versus_empirical",
    "certified_divergence",
    "certified_radius",
    "check_model",
    "deployed",
    "evaluation_operator",
    "fisher_bound",
    "fisher_effective_rank",
    "fisher_eigenpairs",
    "fisher_kl_ratio",
    "fisher_linf_norm",
    "fisher_spectral_norm",
    "fisher_spectral_norm_and_trace",
    "fisher_trace",
    "lipschitz_bound",
    "local_fisher_bound",
    "mean_log1p",
    "register_bound_rule",
    "sensitive_examples",
    "single_step_ratio",
    "summarize",
    "universal_spectral_norm",
]
