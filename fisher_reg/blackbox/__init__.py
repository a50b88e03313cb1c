"""The Fisher spectral norm of a black-box classifier: from predictions only, without gradients."""

from fisher_reg.blackbox.interface import blackbox_spectral_norm
from fisher_reg.blackbox.quotient import BlackBoxMax
from fisher_reg.blackbox.result import BlackBoxEstimator, BlackBoxResult
from fisher_reg.blackbox.sketch import BlackBox

__all__ = ["BlackBox", "BlackBoxEstimator", "BlackBoxMax", "BlackBoxResult", "blackbox_spectral_norm"]
