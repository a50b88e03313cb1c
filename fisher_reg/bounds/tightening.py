"""Which certified improvements over the plain product of layer norms a bound uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tightening:
    """Improvements over the product of the layers' own norms; every one keeps the bound certified.

    Args:
        folded: A batch norm after a linear layer is part of it.
        merged: Any other diagonal map (a batch norm or the weight of a layer norm before a linear layer, a
            normalisation of the input) is part of the next linear layer, through all activations and poolings on the
            way, which commute with it.
        head: A last linear layer is bounded together with the softmax: the largest variance of its rows under any
            probabilities, instead of the product of two norms.
        dense: A convolution on a small image is bounded by its matrix, without a circular boundary.
        averaged: Two layers and the activation between them, with a shortcut around them if there is one, are bounded
            together (:mod:`fisher_reg.bounds.tighten.averaging`), for as many as 4096 inputs; up to half a minute per
            block of that size. It acts on bounds over all inputs only, so that a local bound may then lie above them.
        balancing_steps: Steps in the search for the coordinates of hidden channels in which the product of the norms is
            small (:mod:`fisher_reg.bounds.tighten.balance`); 0 takes them as they are. Each step costs as little as a
            pass over the weights.
    """

    folded: bool = True
    merged: bool = True
    head: bool = True
    dense: bool = True
    averaged: bool = False
    balancing_steps: int = 0

    def __post_init__(self) -> None:
        if self.balancing_steps < 0:
            raise ValueError(f"Tightening needs balancing_steps >= 0; got {self.balancing_steps}.")
