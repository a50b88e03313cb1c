import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch.testing import assert_close

from fisher_reg import bound_versus_empirical
from fisher_reg.figures import sensitive_examples


def _entry(epoch, bound, value):
    values = {f"fisher/lambda_max_{name}": value for name in ("mean", "median", "p95", "max")}
    return {"epoch": epoch, "fisher/log10_bound_global": bound} | values


def test_every_curve_is_drawn_with_its_numbers():
    figure = bound_versus_empirical([_entry(0, 5.0, 10.0), _entry(2, 6.0, 0.1)])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert len(lines) == 5
    assert list(lines["global upper bound"].get_ydata()) == [5.0, 6.0]
    assert list(lines[r"$\lambda_{\max}(F)$, max"].get_ydata()) == [1.0, -1.0]
    assert list(lines[r"$\lambda_{\max}(F)$, max"].get_xdata()) == [0, 2]


def test_values_without_a_logarithm_leave_a_gap():
    figure = bound_versus_empirical([_entry(0, 5.0, 0.0), _entry(1, math.inf, math.nan)])
    (line,) = [line for line in figure.axes[0].lines if line.get_label().endswith("mean")]
    assert all(math.isnan(value) for value in line.get_ydata())


def test_a_history_without_bounds_is_drawn():
    entry = _entry(0, 5.0, 1.0)
    del entry["fisher/log10_bound_global"]
    assert len(bound_versus_empirical([entry]).axes[0].lines) == 4


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="history is empty"):
        bound_versus_empirical([])


def test_measurements_that_share_an_epoch_are_drawn_over_optimiser_steps():
    history = [_entry(epoch, 5.0, 1.0) | {"step": step} for epoch, step in ((0, 5), (0, 10), (1, 15))]
    (axes,) = bound_versus_empirical(history).axes
    assert axes.get_xlabel() == "optimiser step"
    assert all(list(line.get_xdata()) == [5, 10, 15] for line in axes.lines)
    (axes,) = bound_versus_empirical(history[1:]).axes
    assert axes.get_xlabel() == "epoch"
    assert all(list(line.get_xdata()) == [0, 1] for line in axes.lines)


def test_a_single_measurement_has_no_fractions_of_an_epoch_on_its_axis():
    (axes,) = bound_versus_empirical([_entry(3, 5.0, 1.0)]).axes
    assert [tick for tick in axes.get_xticks() if 2 <= tick <= 4] == [2, 3, 4]


@pytest.mark.parametrize(("bound", "label"), [(5.0, "$10^{3}$"), (0.05, "1.04")])
def test_the_vertical_axis_has_powers_of_ten_or_plain_numbers(bound, label):
    (axes,) = bound_versus_empirical([_entry(0, bound, 1.0)]).axes
    FigureCanvasAgg(axes.figure).draw()
    assert label in [text.get_text() for text in axes.get_yticklabels()]


def _pairs(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=generator), torch.randn(count, *shape, generator=generator)


def test_pairs_are_titled_with_their_eigenvalues_and_drawn_as_they_are():
    images, vectors = _pairs(2, (3, 4, 4))
    vectors[1] = 0.0
    figure = sensitive_examples(list(images), list(vectors), [12.34, 0.0])
    (axes,) = figure.axes
    titles = [text.get_text() for text in (*figure.texts, *axes.texts)]
    assert titles == ["input and top eigenvector", r"$\lambda$ = 12.3", r"$\lambda$ = 0"]
    shown = axes.images
    assert_close(torch.from_numpy(shown[1].get_array().data), vectors[0].double().sum(0))
    stretched = (images[0] - images[0].min()) / (images[0].max() - images[0].min())
    assert_close(torch.from_numpy(shown[0].get_array().data), stretched.movedim(0, -1))
    low, high = shown[1].get_clim()
    assert low == -high < 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 64), (1, 64, 8), (1, 1, 100)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_images_and_titles_lie_on_the_figure_beside_each_other(shape, count):
    images, vectors = _pairs(count, shape)
    figure = sensitive_examples(list(images), list(vectors), [1.2345e-12] * count)
    FigureCanvasAgg(figure).draw()
    assert figure.get_figwidth() <= 12
    (axes,) = figure.axes
    assert len(axes.images) == 2 * count
    boxes = [one.get_window_extent() for one in (*axes.images, *figure.texts, *axes.texts)]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        sensitive_examples([], [], [])
