"""Lightning callbacks: they need one line in the Trainer and no change of the LightningModule."""

from fisher_reg.callbacks.monitor import FisherMonitor
from fisher_reg.callbacks.regularizer import FisherRegularizer
from fisher_reg.callbacks.schedules import ConstantSchedule, CosineSchedule, LinearSchedule

__all__ = ["ConstantSchedule", "CosineSchedule", "FisherMonitor", "FisherRegularizer", "LinearSchedule"]
