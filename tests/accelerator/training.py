"""Cases: a training with both callbacks, by what is logged and by the trained parameters."""

from __future__ import annotations

from functools import partial
from tempfile import TemporaryDirectory

import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import fisher_reg as fr
from tests import cases
from tests.accelerator import networks
from tests.accelerator.lightning import trainer


def _batches():
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(8, 3, 8, 8, generator=generator), torch.randint(0, 12, (8,), generator=generator)
    return DataLoader(TensorDataset(images.double(), labels), batch_size=4)


def _trained(place, make, network=networks.convolutional, **options):
    """Train with a callback; return what was logged, and the sum of each parameter.

    Args:
        place: Where.
        make: The class of the callback.
        network: Builds the network.
        options: Of the callback.
    """
    module = cases.Plain(network().double())
    run = trainer(place.device, [make(**options)])
    run.fit(module, _batches(), _batches())
    # Lightning has moved the parameters to the CPU
    return _logged(run), [float(parameter.detach().sum()) for parameter in module.parameters()]


def _with_both(place):
    module = cases.Plain(networks.convolutional().double())
    run = trainer(place.device, [fr.FisherRegularizer(), fr.FisherMonitor(bounds=_BOUNDS)])
    run.fit(module, _batches(), _batches())
    return _logged(run)


def _with_pictures(place):
    with TemporaryDirectory() as folder:
        logger, monitor = TensorBoardLogger(folder), fr.FisherMonitor(bounds=())
        run = trainer(place.device, [monitor], logger=logger)
        run.fit(cases.Plain(networks.convolutional().double()), _batches(), _batches())
        logger.experiment.flush()
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        return sorted(events.Tags()["images"]), sorted(events.Tags()["scalars"])


def _validated(place):
    run = trainer(place.device, [fr.FisherMonitor()])
    run.validate(cases.Plain(networks.convolutional().double()), _batches(), verbose=False)
    return _logged(run)


def _logged(run):
    """Return the names and the values of what was logged, but for times."""
    logged = {key: float(value) for key, value in sorted(run.callback_metrics.items()) if "seconds" not in key}
    assert logged.get("fisher/num_left_out", 0.0) == 0.0, "The monitor could not measure its examples."
    assert logged.get("fisher/penalty_skipped", 0.0) == 0.0, "A penalty was left out."
    return list(logged), list(logged.values())


_PENALTIES = {
    "kl": fr.KLPenalty(),
    "kl_linf": fr.KLPenalty(step=0.03, geometry=fr.LInf()),
    "spectral": fr.SpectralPenalty(),
    "trace": fr.TracePenalty(),
    "label_contrast": fr.LabelContrastPenalty(),
    "gradient_norm": fr.GradientNormPenalty(),
    "nuclear_norm": fr.NuclearNormPenalty(),
    "bound": fr.BoundPenalty(),
}
_OPTIONS = {
    "of_the_whole_batch": {"batch_fraction": 1.0},
    "of_the_deployed_function": {"use_running_statistics": True},
    "with_a_target": {"target_lambda": 0.01},
    "with_a_largest_gradient": {"max_gradient_ratio": 0.1},
}
_BOUNDS = (fr.fisher_bound, fr.local_fisher_bound)

ROUGH = ()

CASES = (
    {
        f"regularizer_{name}": partial(_trained, make=fr.FisherRegularizer, penalty=penalty)
        for name, penalty in _PENALTIES.items()
    }
    | {
        f"regularizer_{name}": partial(_trained, make=fr.FisherRegularizer, **options)
        for name, options in _OPTIONS.items()
    }
    | {
        "regularizer_of_attention": partial(_trained, make=fr.FisherRegularizer, network=networks.Attention),
        "regularizer_beside_a_monitor": _with_both,
        "monitor": partial(_trained, make=fr.FisherMonitor, bounds=_BOUNDS),
        "monitor_linf": partial(_trained, make=fr.FisherMonitor, geometry=fr.LInf(), input_std=[0.2, 0.3, 0.4]),
        "monitor_of_attention": partial(_trained, make=fr.FisherMonitor, network=networks.Attention, bounds=()),
        "monitor_in_validation": _validated,
        "monitor_with_pictures": _with_pictures,
    }
)
