from collections import UserList

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fisher_reg as fr
from fisher_reg.evaluation import check_input_std, standard_deviation

STD = [0.2, 0.3, 0.4]
CHANNELS = torch.tensor(STD).view(3, 1, 1)
IMAGES = torch.zeros(5, 3, 8, 6)


@pytest.mark.parametrize(
    "std",
    [
        STD,
        tuple(STD),
        UserList(STD),
        [torch.tensor(value) for value in STD],
        torch.tensor(STD),
        torch.tensor(STD, dtype=torch.float64),
        np.array(STD),
        CHANNELS,
        CHANNELS[None],
        CHANNELS.tolist(),
        nn.Parameter(torch.tensor(STD)),
    ],
)
def test_three_numbers_for_images_with_three_channels_are_one_per_channel(std):
    found = standard_deviation(std, IMAGES)
    assert_close(found.float(), CHANNELS)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "std", [0.5, torch.tensor(0.5), torch.tensor([0.5]), [0.5], np.float32(0.5), torch.full((1, 1, 1, 1), 0.5)]
)
def test_one_number_is_for_all(std):
    assert_close(standard_deviation(std, IMAGES).double(), torch.tensor(0.5).double())
    assert standard_deviation(1, IMAGES) == 1


def test_numbers_that_fit_the_last_axis_alone_are_for_its_entries():
    std = torch.rand(6) + 0.1
    assert_close(standard_deviation(std, IMAGES), std.view(1, 1, 6))
    assert_close(standard_deviation(std, torch.zeros(2, 6)), std)
    assert_close(standard_deviation(std[None], torch.zeros(2, 6)), std)
    assert_close(standard_deviation(STD, torch.zeros(2, 8, 8, 3)).float(), torch.tensor(STD).view(1, 1, 3))
    per_pixel = torch.rand(3, 8, 6) + 0.1
    assert_close(standard_deviation(per_pixel, IMAGES), per_pixel)
    assert_close(standard_deviation(per_pixel[0], IMAGES), per_pixel[:1])


@pytest.mark.parametrize("shape", [(2, 3, 8, 3), (2, 3, 3, 3), (2, 3, 3)])
@pytest.mark.parametrize("std", [STD, torch.tensor(STD), torch.tensor([STD])])
def test_numbers_that_fit_two_axes_are_refused_with_both_shapes(shape, std):
    x = torch.zeros(shape)
    if isinstance(std, torch.Tensor) and std.ndim == x.ndim - 1:
        assert standard_deviation(std, x).shape == (1, 3)  # says which axis it means
        return
    ones = ", ".join(["1"] * (len(shape) - 2))
    with pytest.raises(ValueError, match=rf"view\(3, {ones}\) for channels, .*view\({ones}, 3\) for the last axis"):
        standard_deviation(std, x)
    assert standard_deviation([0.5, 0.5, 0.5], x) == 0.5


@pytest.mark.parametrize(
    ("std", "given"), [([0.2, 0.3], r"\(2,\)"), (torch.ones(5, 3, 8, 6), r"\(5, 3, 8, 6\)"), (torch.ones(8), r"\(8,\)")]
)
def test_another_shape_is_refused_with_what_would_fit(std, given):
    with pytest.raises(ValueError, match=rf"{given} does not fit .*\(3, 8, 6\).* 3 numbers .*\(3, 1, 1\)"):
        standard_deviation(std, IMAGES)
    with pytest.raises(ValueError, match=r"does not fit .*\(4,\)\. Pass one number, 4 numbers for one per feature"):
        standard_deviation(std, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("std", "error", "match"),
    [
        (0.0, ValueError, "positive; its smallest value is 0"),
        ([0.2, -0.3, 0.4], ValueError, "positive; its smallest value is -0.3"),
        (float("nan"), ValueError, "positive and finite; got nan"),
        (torch.tensor([0.2, float("inf"), 0.1]), ValueError, "positive and finite; got"),
        ([], ValueError, "has no numbers"),
        ("imagenet", TypeError, "got 'imagenet'. Write input_std=0.5, or"),
        (["0.2"], TypeError, "a list of numbers"),
        ({"std": 0.2}, TypeError, "a list of numbers"),
        (True, TypeError, "got True"),
        (1j, TypeError, "got 1j"),
        (torch.Tensor, TypeError, "got <class"),
        ([[0.2, 0.3], [0.4]], TypeError, "a list of numbers"),
    ],
)
def test_what_can_never_be_right_is_refused_by_constructors_too(std, error, match):
    makers = [fr.FisherSpectralNorm, fr.FisherTrace, fr.FisherMonitor]
    makers += [fr.KLPenalty, fr.SpectralPenalty, fr.TracePenalty, fr.LabelContrastPenalty, fr.BoundPenalty]
    makers += [fr.GradientNormPenalty, fr.NuclearNormPenalty]
    for make in makers:
        with pytest.raises(error, match=match):
            make(input_std=std)
    with pytest.raises(error, match=match):
        check_input_std(std)


def _network():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 3 * 2, 3)).eval()


@pytest.mark.parametrize(
    "measure",
    [
        lambda net, x, std: fr.fisher_spectral_norm(net, x, input_std=std).eigenvalue,
        lambda net, x, std: fr.fisher_eigenpairs(net, x, 2, input_std=std).eigenvalue,
        lambda net, x, std: fr.fisher_trace(net, x, input_std=std),
        lambda net, x, std: fr.fisher_effective_rank(net, x, input_std=std),
        lambda net, x, std: fr.universal_spectral_norm(net, [x, x], input_std=std).eigenvalue,
        lambda net, x, std: fr.blackbox_spectral_norm(lambda z: net(z).softmax(1), x, input_std=std).eigenvalue,
        lambda net, x, std: fr.fisher_bound(net, x, input_std=std).log10_value,
        lambda net, x, std: fr.local_fisher_bound(net, x, input_std=std).value,
        lambda net, x, std: fr.local_fisher_bound(net, x, radius=0.1, input_std=std).value,
        lambda net, x, std: fr.certified_radius(net, x, input_std=std),
        lambda net, x, std: fr.certified_divergence(net, x, 0.1, input_std=std),
        lambda net, x, std: fr.blockwise_fisher_bound(net, x, input_std=std).value,
        lambda net, x, std: fr.KLPenalty(input_std=std)(net, x),
        lambda net, x, std: fr.SpectralPenalty(input_std=std)(net, x),
        lambda net, x, std: fr.TracePenalty(input_std=std)(net, x, generator=torch.Generator()),
        lambda net, x, std: fr.LabelContrastPenalty(input_std=std)(net, x, labels=torch.zeros(2, dtype=torch.long)),
        lambda net, x, std: fr.GradientNormPenalty(input_std=std)(net, x, labels=torch.zeros(2, dtype=torch.long)),
        lambda net, x, std: fr.NuclearNormPenalty(bounds=None, input_std=std)(
            net, x, labels=torch.zeros(2, dtype=torch.long), generator=torch.Generator()
        ),
        lambda net, x, std: fr.BoundPenalty(input_std=std)(net, x),
    ],
)
def test_every_function_takes_the_same_forms(measure):
    net, x = _network(), torch.randn(2, 3, 5, 4)
    expected = measure(net, x, CHANNELS)
    for std in (STD, tuple(STD), torch.tensor(STD), CHANNELS[None]):
        assert_close(measure(net, x, std), expected)
    assert_close(measure(net, x, 1), measure(net, x, None))
    with pytest.raises(ValueError, match="does not fit one example"):
        measure(net, x, [0.5, 0.4])
