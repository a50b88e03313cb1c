"""A Trainer of Lightning on one device, whichever it is."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import SingleDeviceStrategy


class AnyDevice(Accelerator):
    """What Lightning has to know of a kind of device."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return devices

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "any"


def trainer(device: torch.device, callbacks, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = SingleDeviceStrategy(device=device, accelerator=AnyDevice())
    return pl.Trainer(strategy=strategy, callbacks=callbacks, max_epochs=2, **({"logger": False} | quiet | options))
