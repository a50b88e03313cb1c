"""Every call draws the same random numbers, whatever was drawn in between, and leaves no trace."""

import random

import numpy as np
import torch

from fisher_reg.evaluation import Noise


def _draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


def test_each_replay_begins_at_the_state_that_was_kept():
    noise = Noise(torch.device("cpu"))
    with noise.replayed():
        first = _draw()
    between = _draw()
    assert between == first  # the replay has left no trace
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with noise.replayed():
        assert _draw() == first
    assert torch.equal(torch.get_rng_state(), after[0])
    assert random.getstate() == after[1]
    assert np.array_equal(np.random.get_state()[1], after[2])
    assert noise.has_drawn
