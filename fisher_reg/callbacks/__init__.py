"""Lightning callbacks: one line in an existing Trainer, no line in the LightningModule."""

from fisher_reg.callbacks.monitor import FisherMonitor
from fisher_reg.callbacks.regularizer import FisherRegularizer

__all__ = ["FisherMonitor", "FisherRegularizer"]
