"""The certified improvements of a bound over the plain product of layer norms."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tightening:
    """Improvements over the product of the norms of the layers; with each of them the bound stays certified.

    Args:
        folded: Whether a batch norm after a linear layer is merged into the layer.
        merged: Whether any other diagonal map (a batch norm or the weight of a layer norm before a linear layer, a
            normalisation of the input) is merged into the next linear layer, through the activations and poolings
            between them, which commute with it.
        head: Whether a last linear layer is bounded together with the softmax: by the largest variance of its rows over
            all probabilities, instead of the product of two norms.
        dense: Whether a convolution on a small image is bounded by its matrix, without a circular boundary.
        averaged: Whether two layers and the activation between them, with an optional shortcut around them, are bounded
            together (:mod:`fisher_reg.bounds.tighten.averaging`), for up to 4096 inputs; up to half a minute per block
            of that size. It applies only to bounds over all inputs, so that a local bound may then be larger than them.
        balancing_steps: Number of steps in the search for diagonal scalings of hidden channels that make the product of
            the norms small (:mod:`fisher_reg.bounds.tighten.balance`); 0 for no search. Each step costs about one pass
            over the weights.
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
