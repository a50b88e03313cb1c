"""The set of inputs for which a bound holds: all inputs, the given ones, a ball around each, or a box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_reg.printing import short_repr


@dataclass(frozen=True)
class Region:
    """A set of inputs around each example.

    Attributes:
        centre: ``(B, *S)`` in float64.
        width: Largest distance of an entry from that of the centre, broadcastable to ``(B, *S)``.
        radius: Largest Euclidean distance from the centre, ``(B,)``.
        name: Description for messages.
    """

    centre: Tensor
    width: Tensor
    radius: Tensor
    name: str

    @classmethod
    def ball(cls, centre: Tensor, radius: Tensor | float, input_std: Tensor | None = None) -> Region:
        """Return the Euclidean ball around each example.

        Args:
            centre: ``(B, *S)``.
            radius: ``()`` or ``(B,)``; with ``input_std`` in pixels.
            input_std: Standard deviation of the input normalisation, broadcastable to one example.
        """
        radii = torch.as_tensor(radius, dtype=torch.float64, device=centre.device).expand(len(centre))
        width = radii.view(-1, *[1] * (centre.ndim - 1))
        if input_std is None:
            return cls(centre, width, radii, "within the radius of the given inputs")
        std = input_std.double().to(centre.device)
        return cls(centre, width / std, radii / std.min(), "within the radius of the given inputs")

    @classmethod
    def box(cls, low: Tensor | float, high: Tensor | float, like: Tensor) -> Region:
        """Return one box with the given ends, broadcastable to one example of ``like``."""
        ends = [
            torch.as_tensor(end, dtype=torch.float64, device=like.device).expand(like.shape[1:]) for end in (low, high)
        ]
        centre, width = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
        name = f"inputs in [{float(ends[0].min()):g}, {float(ends[1].max()):g}]"
        return cls(centre[None], width[None], torch.linalg.vector_norm(width).reshape(1), name)


@dataclass(frozen=True)
class Box:
    """A domain: every entry of an input lies between two ends.

    Args:
        low: Broadcastable to one input.
        high: Broadcastable to one input, nowhere below ``low``.

    Raises:
        ValueError: If the ends are not finite or not in this order.
    """

    low: Tensor | float
    high: Tensor | float

    __repr__ = short_repr

    def __post_init__(self) -> None:
        try:
            low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (self.low, self.high))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"The ends of a domain must be numbers or tensors; got low={self.low!r}, high={self.high!r}."
            ) from None
        if not (low.isfinite().all() and high.isfinite().all() and (low <= high).all() and (low < high).any()):
            raise ValueError(
                f"A domain needs finite ends low <= high, not all equal; got low={self.low}, high={self.high}."
            )

    def region(self, inputs: Tensor) -> Region:
        """Return the box as a region for inputs ``(B, *S)``.

        Raises:
            ValueError: If one of the inputs lies outside, or the ends have another shape.
        """
        try:
            region = Region.box(self.low, self.high, inputs)
        except RuntimeError as error:
            raise ValueError(
                f"The ends of the domain must be broadcastable to one input of shape {tuple(inputs.shape[1:])}: {error}"
            ) from error
        outside = ((inputs.double() - region.centre).abs() > region.width * (1 + 1e-6) + 1e-12).flatten(1).any(1)
        if bool(outside.any()):
            raise ValueError(
                f"{int(outside.sum())} of the {len(inputs)} inputs leave the domain ({region.name}), for which the "
                f"bound would not hold; they lie in [{float(inputs.min()):g}, {float(inputs.max()):g}]. Pass a domain "
                "that contains them."
            )
        return region


@dataclass(frozen=True)
class L2Ball:
    """A domain: the inputs within a Euclidean distance of one input.

    Args:
        centre: One input ``S``.
        radius: Positive.

    Raises:
        ValueError: If the radius is not positive and finite.
    """

    centre: Tensor
    radius: float

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if not isinstance(self.centre, Tensor) or not bool(self.centre.isfinite().all()):
            raise ValueError("The centre of a domain must be a tensor without NaN or infinite values.")
        check_radius(self.radius, None)

    def region(self, inputs: Tensor) -> Region:
        """Return the ball as a region for inputs ``(B, *S)``.

        Raises:
            ValueError: If one of the inputs lies outside, or the centre has another shape.
        """
        if self.centre.shape != inputs.shape[1:]:
            raise ValueError(
                f"The centre of the domain has shape {tuple(self.centre.shape)}, one input {tuple(inputs.shape[1:])}."
            )
        centre = self.centre[None].to(inputs.device, torch.float64)
        distances = torch.linalg.vector_norm((inputs.double() - centre).flatten(1), dim=1)
        if bool((distances > self.radius * (1 + 1e-6)).any()):
            raise ValueError(
                f"The inputs leave the domain: they are up to {float(distances.max()):g} away from its centre, and its "
                f"radius is {self.radius:g}."
            )
        ball = Region.ball(centre, self.radius)
        return Region(ball.centre, ball.width, ball.radius, f"inputs within {self.radius:g} of the domain's centre")


Domain = Box | L2Ball | tuple[Any, Any]


def region_of(domain: Domain, inputs: Tensor) -> Region:
    """Return a domain as a region; a pair is a :class:`Box`.

    Raises:
        ValueError: As in the classes of domains, and for any other object.
    """
    if isinstance(domain, tuple) and len(domain) == 2:
        domain = Box(*domain)
    if not isinstance(domain, Box | L2Ball):
        raise ValueError(f"domain must be (low, high), Box(low, high) or L2Ball(centre, radius); got {domain!r}.")
    return domain.region(inputs)


def check_radius(radius: Any, size: int | None) -> None:
    """Raise an error unless the radius is positive and finite, one number or one per example.

    Args:
        radius: The argument of the user.
        size: Number of examples; None if only one number is allowed.

    Raises:
        ValueError: If it is not.
    """
    what = "a number" if size is None else f"a number or one for each of the {size} examples"
    advice = "" if size is None else " For a bound at the inputs themselves leave it out."
    error = ValueError(f"radius must be positive and finite, {what}; got {radius!r}.{advice}")
    try:
        radii = torch.as_tensor(radius, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise error from None
    if tuple(radii.shape) not in {(), (size,)} or not bool((radii.isfinite() & (radii > 0)).all()):
        raise error
