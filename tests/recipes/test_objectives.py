import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from recipes.data.sources import Digits
from recipes.models.objectives import LambdaAtAccuracy, RobustAccuracy
from recipes.runtime.command import composed


def test_of_two_accurate_networks_that_of_the_smaller_lambda_is_better():
    objective = LambdaAtAccuracy(floor=0.9)
    values = [
        objective({"test_accuracy": accuracy, "lambda_max_mean": value}, nn.Identity(), None)
        for accuracy, value in ((0.99, 0.1), (0.91, 1.0), (0.89, 1.0), (0.5, 1e-6), (0.1, 0.0))
    ]
    assert values == sorted(values)
    assert values[:2] == [-1.0, 0.0]
    assert values[2] == pytest.approx(1.0)  # a hundredth below counts as a factor of ten


def test_robust_accuracy_is_what_the_attack_leaves():
    data = Digits(image_size=8)
    data.setup()
    labels = data.splits["test"].tensors[1]

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(10))

        def forward(self, images):
            return self.logits.expand(len(images), 10) + 0 * images.flatten(1)[:, :1]

    network = Constant()
    network.logits.data[3] = 1.0
    objective = RobustAccuracy(instantiate(composed("train", ["objective=robust_accuracy"]).objective.attack), 10_000)
    share = float(np.mean(labels.numpy() == 3))
    assert objective({}, network, data) == pytest.approx(-share)


def test_the_objective_is_chosen_and_changed_on_the_command_line():
    assert instantiate(composed("train").objective) == LambdaAtAccuracy()
    assert instantiate(composed("train", ["objective.floor=0.5"]).objective) == LambdaAtAccuracy(0.5)
    robust = instantiate(composed("train", ["objective=robust_accuracy", "objective.num_images=5"]).objective)
    assert (type(robust), robust.num_images) == (RobustAccuracy, 5)
