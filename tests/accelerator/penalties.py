"""Cases: every penalty, with its gradient in the parameters."""

from __future__ import annotations

from functools import partial

import torch

import fisher_reg as fr
from tests.accelerator import networks

_LABELS = torch.tensor([0, 3, 7, 11, 2])

PENALTIES = {
    "kl": fr.KLPenalty(),
    "kl_linf": fr.KLPenalty(step=0.03, geometry=fr.LInf()),
    "kl_in_pixels": fr.KLPenalty(input_std=[0.2, 0.3, 0.4]),
    "spectral": fr.SpectralPenalty(),
    "spectral_of_three_steps": fr.SpectralPenalty(num_steps=3, reduction=fr.mean_log1p),
    "spectral_linf": fr.SpectralPenalty(num_steps=2, geometry=fr.LInf()),
    "spectral_gaussian": fr.SpectralPenalty(likelihood=fr.Gaussian()),
    "trace": fr.TracePenalty(num_samples=2),
    "label_contrast": fr.LabelContrastPenalty(),
    "gradient_norm": fr.GradientNormPenalty(),
    "gradient_norm_l2": fr.GradientNormPenalty(geometry=fr.L2()),
    "nuclear_norm": fr.NuclearNormPenalty(attack_share=1.0),
    "nuclear_norm_in_pixels": fr.NuclearNormPenalty(input_std=0.5, bounds=None),
    "bound": fr.BoundPenalty(),
}
_NETWORKS = ("convolutional", "attention", "lstm")
_FEW = ("kl", "spectral", "spectral_of_three_steps", "nuclear_norm")


def _penalty(place, penalty, network="convolutional", is_training=False, generator=None):
    build, inputs = networks.NETWORKS[network]
    inputs = place.put(inputs()).double()
    model = place.put(build()).double().train(is_training)
    if is_training:
        _turn_dropout_off(model)
    options = {"labels": place.put(_LABELS[: len(inputs)])} if getattr(penalty, "needs_labels", False) else {}
    value = penalty(model, inputs, generator=generator, **options)
    parameters = list(model.parameters())
    return value, torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)


def _turn_dropout_off(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _with_generator(place, penalty):
    return _penalty(place, penalty, generator=torch.Generator().manual_seed(3))


def _from_batch(place):
    inputs = place.put(networks.images())
    penalty = fr.KLPenalty.from_batch(inputs, place.put(_LABELS), input_std=[0.2, 0.3, 0.4])
    return penalty.step, penalty.tolerates(inputs, torch.bfloat16)


def _backward(place):
    model, inputs = place.put(networks.convolutional()).double(), place.put(networks.images()).double()
    fr.KLPenalty()(model, inputs).backward()
    return [parameter.grad for parameter in model.parameters()]


ROUGH = ()

CASES = (
    {name: partial(_penalty, penalty=penalty) for name, penalty in PENALTIES.items()}
    | {f"{name}_in_training": partial(_penalty, penalty=one, is_training=True) for name, one in PENALTIES.items()}
    | {
        f"{name}_of_{network}": partial(_penalty, penalty=PENALTIES[name], network=network)
        for name in _FEW
        for network in _NETWORKS[1:]
        if (name, network) != ("nuclear_norm", "lstm")  # its bounds are those of images
    }
    | {
        f"{name}_with_a_generator_of_the_cpu": partial(_with_generator, penalty=PENALTIES[name])
        for name in ("trace", "nuclear_norm", "spectral_of_three_steps")
    }
    | {"kl_from_batch": _from_batch, "kl_backward": _backward}
)
