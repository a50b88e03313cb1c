import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import Exact, MarginTempered, fisher_bound, fisher_spectral_norm, fisher_trace
from recipes.competitors.clever import Clever
from recipes.competitors.measurement import METRICS, Effort, measure, predict

EFFORT = Effort(Clever(num_batches=5, batch_size=4, pool_factor=2), num_clever=3, num_blockwise=2)


@pytest.fixture
def images(digits):
    return tuple(part[:6] for part in digits.splits["test"].tensors)


def test_every_metric_is_a_number_per_image_in_the_order_of_the_tables(trained, images):
    network = copy.deepcopy(trained).train()
    state = copy.deepcopy(network.state_dict())
    found = measure(network, *images, EFFORT)
    assert list(found.values) == list(METRICS)
    known = {"clever": 3, "log10_blockwise": 2}
    for name, values in found.values.items():
        assert values.isfinite().sum() == known.get(name, 6)
        assert values[: known.get(name, 6)].isfinite().all()
    assert found.missing == {}
    assert set(found.seconds) == set(METRICS)
    assert network.training
    assert_close(network.state_dict(), state, rtol=0, atol=0)
    network.eval()
    exact = fisher_spectral_norm(network, images[0], solver=Exact()).eigenvalue.double()
    assert_close(found.values["lambda"], exact, rtol=1e-2, atol=0)
    assert_close(found.values["trace"], fisher_trace(network, images[0], estimator=Exact()).double())
    tempered = fisher_spectral_norm(network, images[0], likelihood=MarginTempered(), solver=Exact()).eigenvalue.double()
    assert_close(found.values["lambda_tempered"], tempered, rtol=1e-2, atol=0)
    assert_close(
        found.values["log10_global"][0].item(), fisher_bound(network, images[0]).log10_value, rtol=1e-6, atol=0
    )
    assert found.extra["correct"].tolist() == (predict(network, images[0]).argmax(1) == images[1]).tolist()
    assert (found.values["lambda"] <= 10 ** found.values["log10_local"]).all()


def test_scaling_the_logits_changes_lambda_and_not_the_one_at_equal_margins(trained, images):
    found = measure(trained, *images, EFFORT)
    confident = fisher_spectral_norm(lambda x: 8 * trained(x), images[0], solver=Exact()).eigenvalue.double()
    assert_close(found.values["lambda_confident"], confident, rtol=1e-2, atol=0)
    eight = fisher_spectral_norm(lambda x: 8 * trained(x), images[0], likelihood=MarginTempered(), solver=Exact())
    assert_close(found.values["lambda_tempered"], eight.eigenvalue.double(), rtol=1e-2, atol=0)


def test_a_bound_that_is_not_known_is_missing_with_its_reason(images):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.i0e(x)

    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 10), Odd()).eval()
    found = measure(network, *images, EFFORT)
    assert "i0e" in found.missing["log10_global"]
    assert found.values["log10_global"].isnan().all()
    assert found.values["lambda"].isfinite().all()
    assert found.lists()["missing"] == found.missing
