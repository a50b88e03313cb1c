import warnings

import pytest
import torch
from torch import nn

from fisher_reg import Bernoulli, Categorical, Gaussian, KLPenalty, MarginTempered, fisher_spectral_norm
from fisher_reg.outputs import check_logits

SIGMOID = r"between 0 and 1.*like those of a sigmoid.*9 yes/no labels.*likelihood=Bernoulli\(\)"


def _network(*last):
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 9), *last).eval()


@pytest.mark.parametrize("likelihood", [Categorical(), MarginTempered()])
def test_outputs_of_a_sigmoid_are_warned_of_where_one_label_is_meant(likelihood):
    x = torch.randn(4, 6)
    with pytest.warns(UserWarning, match=SIGMOID):
        fisher_spectral_norm(_network(nn.Sigmoid()), x, likelihood=likelihood)
    with pytest.warns(UserWarning, match=SIGMOID):
        KLPenalty(likelihood=likelihood)(_network(nn.Sigmoid()), x)


def test_outputs_of_a_softmax_are_warned_of_in_estimates_and_penalties():
    x = torch.randn(4, 6)
    for use in (fisher_spectral_norm, KLPenalty()):
        with pytest.warns(UserWarning, match="probabilities and not logits"):
            use(_network(nn.Softmax(1)), x)


def test_logits_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(30):
            torch.manual_seed(seed)
            network, x = _network(), torch.randn(4, 6)
            for scale in (0.0, 0.01, 1.0, 10.0):
                check_logits(scale * network(x), 4, Categorical())
                check_logits(scale * network(x), 4, Bernoulli())
                check_logits(scale * network(x).relu(), 4, MarginTempered())
        check_logits(0.3 + torch.zeros(16, 9), 16, Categorical())  # an untrained head with a bias
        check_logits(torch.rand(16, 9), 16, Gaussian())
        check_logits(torch.rand(1, 9), 1, Categorical())  # too few numbers to tell
