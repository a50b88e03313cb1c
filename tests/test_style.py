"""Figures can be told apart by colour-blind readers and in grey, and their legends cover nothing."""

import itertools

import matplotlib as mpl
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from fisher_reg.style import COLOURS, WIDTH, legend_below, legend_beside, legend_under, look, panels, plain_ticks, style

# Machado, Oliveira and Fernandes (2009), complete deficiency, on linear RGB
VISION = {
    "full": torch.eye(3),
    "deuteranopia": torch.tensor(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": torch.tensor(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}
# CIE Lab from linear RGB
TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = torch.tensor([0.9505, 1.0, 1.089])


def _lab(colour, vision):
    rgb = torch.tensor(to_rgb(colour))
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = ((TO_XYZ @ (vision @ linear).clamp(0, 1)) / WHITE).pow(1 / 3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart(vision):
    for one, other in itertools.combinations(COLOURS, 2):
        distance = (_lab(one, VISION[vision]) - _lab(other, VISION[vision])).norm()
        assert distance > 10, (one, other)  # four times what an eye just tells apart


def test_series_differ_in_colour_or_marker_and_neighbours_in_all():
    looks = [look(number) for number in range(70)]
    assert len({(one["color"], one["marker"]) for one in looks}) == 70
    for one, other in itertools.pairwise(looks):
        assert all(one[name] != other[name] for name in ("color", "marker", "linestyle"))


@pytest.mark.parametrize("place", [legend_below, lambda figure: [legend_under(axes) for axes in figure.axes][0]])
def test_legends_are_below_the_data_and_on_the_figure(place):
    with style():
        figure, grid = panels(1, 2, height=4)
        for number, axes in enumerate(grid.flat):
            axes.plot([1, 2], [number, 3], label=f"series {number}", **look(number))
            axes.set(xlabel="time, seconds", ylabel="value", title="title")
        legend = place(figure)
    FigureCanvasAgg(figure).draw()
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert all(box.y1 <= axes.get_window_extent().y0 for axes in grid.flat)
    assert figure.get_figwidth() == WIDTH
    sizes = [text.get_fontsize() for axes in grid.flat for text in (*axes.get_xticklabels(), axes.xaxis.label)]
    assert min(sizes) >= 9


def test_a_legend_beside_a_panel_is_on_the_figure():
    figure, ((axes,),) = panels(height=3)
    axes.plot([1, 2], [1, 2], label="a series with a name")
    legend = legend_beside(axes)
    FigureCanvasAgg(figure).draw()
    assert axes.get_window_extent().x1 <= legend.get_window_extent().x0
    assert legend.get_window_extent().x1 <= figure.bbox.width


def test_a_short_logarithmic_axis_has_plain_numbers():
    figure, ((axes,),) = panels(height=3)
    axes.plot([1, 2], [0.15, 3.0])
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [text.get_text() for tick, text in ticks if low <= tick <= high] == ["0.2", "0.5", "1", "2"]


def test_the_settings_of_matplotlib_are_left_as_they_were():
    before = dict(mpl.rcParams)
    with style():
        assert mpl.rcParams["font.size"] == 9
    panels(height=2)
    assert dict(mpl.rcParams) == before
