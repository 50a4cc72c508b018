"""Figures: each draws what it was given, labels it, and becomes the same SVG every time."""

import inspect
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rkl import plots
from rkl.plots.style import PALETTE, line_style

STEPS = np.arange(5)
FALLING = np.array([0.5, 0.25, 0.15, 0.1])
PAIR = {"kl()": (STEPS, STEPS + 1.0), "<b>&amp; $x$": (STEPS, 2.0 * STEPS + 1)}
EXAMPLES = {
    "training_curves": lambda: plots.training_curves(PAIR, window=3, logarithmic=True),
    "head_tail": lambda: plots.head_tail(
        FALLING, {"kl()": {0: FALLING[::-1], 9: FALLING}}, head=1
    ),
    "divergence_by_rank": lambda: plots.divergence_by_rank(
        [0, 1, 4, 20_000], {"kl()": [0.1, 0.3, 0.2]}, errors={"kl()": [0.01, 0.01, 0.02]}
    ),
    "precision_recall": lambda: plots.precision_recall(
        {"kl()": ([1, 0.9, 0], [0, 0.9, 1])}, bands={"kl()": ([1, 0.8, 0], [1, 1, 0.1])}
    ),
    "head_tail_by_step": lambda: plots.head_tail_by_step(STEPS, PAIR),
    "bars": lambda: plots.bars(
        {"kl()": 1.5, "js()": np.inf},
        errors={"kl()": 0.1},
        label="perplexity",
        reference=("teacher", 1.2),
    ),
}


def public_figures():
    functions = inspect.getmembers(plots, inspect.isfunction)
    return {
        name
        for name, function in functions
        if function.__module__ == plots.__name__
        and inspect.signature(function).return_annotation is Figure
        and not name.startswith("_")
    }


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


def test_every_figure_has_an_example_here():
    assert set(EXAMPLES) == public_figures()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_figure_labels_its_axes_and_draws_inside_them(name):
    figure = EXAMPLES[name]()
    figure.draw_without_rendering()
    assert figure.axes[-1].get_xlabel()
    assert figure.axes[0].get_ylabel() or name == "bars"  # whose bars carry names
    assert all(axes.has_data() for axes in figure.axes)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_svg_is_well_formed_and_the_same_bytes_every_time(name):
    svg = plots.to_svg(EXAMPLES[name](), f"About {name}")
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert svg == plots.to_svg(EXAMPLES[name](), f"About {name}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_svg_takes_every_colour_and_font_from_the_page(name):
    svg = plots.to_svg(EXAMPLES[name](), "title")
    assert "currentColor" in svg
    assert re.findall(r"(?<!, )#[0-9a-f]{6}\b(?!\))", re.sub(r'href="#\w+"', "", svg)) == []
    assert "DejaVu" not in svg
    assert "<style" not in svg  # it would reach the rest of the page


def test_an_svg_keeps_only_the_ids_it_refers_to():
    svg = plots.to_svg(EXAMPLES["divergence_by_rank"](), "title")
    ids = set(re.findall(r' id="([^"]+)"', svg))
    assert ids == set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) != set()


def test_an_svg_says_its_title_escaped_to_a_screen_reader():
    svg = plots.to_svg(EXAMPLES["bars"](), 'a "title" & <more>')
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'a "title" & <more>'
    assert root.findtext("{*}title") == 'a "title" & <more>'


def test_names_are_drawn_as_they_are_spelt():
    assert "<b>&amp; $x$" in texts(plots.to_svg(EXAMPLES["training_curves"](), "title"))


def test_drawing_leaves_no_setting_behind():
    before = dict(matplotlib.rcParams)
    for draw in EXAMPLES.values():
        plots.to_svg(draw(), "title")
    assert dict(matplotlib.rcParams) == before


def test_a_run_keeps_its_colour_from_figure_to_figure():
    curves, gaps = plots.training_curves(PAIR), plots.head_tail_by_step(STEPS, PAIR)
    first, second = ([line.get_color() for line in f.axes[0].lines] for f in (curves, gaps))
    assert first == second == list(PALETTE[:2])


def test_28_runs_are_told_apart():
    looks = {(line["color"], str(line["linestyle"])) for line in map(line_style, range(28))}
    assert len(looks) == 28


def test_a_running_mean_is_drawn_over_the_values_it_averages():
    figure = plots.training_curves({"kl()": (STEPS, [0.0, 3.0, 6.0, 0.0, 0.0])}, window=3)
    raw, mean = figure.axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), [0, 3, 6, 0, 0])
    np.testing.assert_allclose(mean.get_ydata(), [3, 3, 2])
    np.testing.assert_allclose(mean.get_xdata(), [1, 2, 3])


@pytest.mark.parametrize("logarithmic", [True, False])
def test_a_long_vocabulary_is_averaged_over_neighbouring_ranks(logarithmic):
    """The mean of consecutive numbers is the middle one."""
    rank, mean = plots._bin_means(np.arange(1.0, 50_001), logarithmic)
    np.testing.assert_allclose(mean, rank)
    assert len(rank) <= 300
    assert rank[-1] > 49_000


def test_a_short_vocabulary_is_drawn_rank_by_rank():
    rank, mean = plots._bin_means(FALLING, logarithmic=False)
    np.testing.assert_array_equal(rank, [1, 2, 3, 4])
    np.testing.assert_allclose(mean, FALLING)


def test_the_head_ends_after_its_last_rank():
    figure = plots.head_tail(FALLING, {"kl()": {0: FALLING}}, head=2, logarithmic=False)
    assert list(figure.axes[0].lines[-1].get_xdata()) == [2.5, 2.5]


def test_bins_are_named_by_their_first_rank_counted_from_1():
    svg = plots.to_svg(EXAMPLES["divergence_by_rank"](), "title")
    assert {"1", "2", "5", "20k"} <= set(texts(svg))


def test_a_bar_that_is_infinite_says_so():
    svg = plots.to_svg(plots.bars({"kl()": np.inf, "js()": np.nan}, label="nats"), "title")
    assert {"infinite", "undefined"} <= set(texts(svg))


def test_an_infinite_value_leaves_a_gap():
    figure = plots.training_curves({"kl()": (STEPS, [1, 2, np.inf, 3, np.nan])})
    figure.draw_without_rendering()
    assert figure.axes[0].get_ylim()[1] < 4


def test_wide_logarithmic_axes_are_labelled_in_plain_powers_of_ten():
    figure = plots.training_curves({"kl()": (STEPS, 10.0 ** -(2 * STEPS))}, logarithmic=True)
    assert {"10⁻⁸", "10⁰"} <= set(texts(plots.to_svg(figure, "title")))


def test_narrow_logarithmic_axes_are_labelled_in_plain_numbers():
    figure = plots.training_curves({"kl()": (STEPS, 0.3 + STEPS / 10)}, logarithmic=True)
    assert {"0.3", "0.4"} <= set(texts(plots.to_svg(figure, "title")))


def test_tensors_are_drawn_like_arrays():
    tensor = torch.tensor(STEPS, dtype=torch.float32)
    figure = plots.training_curves({"kl()": (tensor, tensor)})
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), STEPS)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.training_curves({}), "runs is empty"),
        (lambda: plots.training_curves({"a": (STEPS, [1.0])}), r"runs\['a'\] steps must hold 1"),
        (
            lambda: plots.training_curves({"a": ([], [])}),
            r"runs\['a'\] values must be a non-empty",
        ),
        (lambda: plots.training_curves(PAIR, window=0), "window must be at least 1; got 0"),
        (lambda: plots.head_tail(FALLING, {}), "students is empty"),
        (lambda: plots.head_tail(FALLING, {"a": {}}), r"students\['a'\] is empty"),
        (lambda: plots.head_tail([FALLING], {"a": {0: FALLING}}), r"teacher must.*\(1, 4\)"),
        (lambda: plots.head_tail(FALLING, {"a": {7: [1]}}), r"students\['a'\]\[7\] must hold 4"),
        (lambda: plots.divergence_by_rank([0, 1], {}), "students is empty"),
        (lambda: plots.divergence_by_rank([0], {"a": []}), r"edges must be.*got \[0.0\]"),
        (lambda: plots.divergence_by_rank([0, 2, 2], {"a": [1, 1]}), "edges must be"),
        (lambda: plots.divergence_by_rank([0, 1], {"a": [1, 2]}), r"students\['a'\] must hold 1"),
        (
            lambda: plots.divergence_by_rank([0, 1], {"a": [1]}, errors={"a": [1, 2]}),
            r"errors\['a'\] must hold 1 values; got 2",
        ),
        (lambda: plots.precision_recall({}), "students is empty"),
        (
            lambda: plots.precision_recall({"a": ([1], [1, 2])}),
            r"recall must hold 1 values; got 2",
        ),
        (
            lambda: plots.precision_recall({"a": ([1], [1])}, bands={"a": ([1], [1, 2])}),
            r"bands\['a'\] must hold 1 values; got 2",
        ),
        (lambda: plots.head_tail_by_step(STEPS, {}), "runs is empty"),
        (lambda: plots.head_tail_by_step(STEPS, {"a": (STEPS, [1])}), r"runs\['a'\] tail must"),
        (lambda: plots.bars({}, label="nats"), "values is empty"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize(
    "name", ["", " + ".join(["0.25*jensen-shannon(beta=0.5)"] * 4), "x" * 200]
)
def test_a_name_of_any_length_leaves_room_for_the_figure(name):
    """A layout without room warns, and warnings are errors."""
    figures = [
        plots.training_curves({name: (STEPS, STEPS)}),
        plots.head_tail(FALLING, {name: {0: FALLING}}),
        plots.bars({name: 1.0}, label="nats", reference=(name, 0.5)),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        width, height = figure.axes[0].get_window_extent().size / figure.bbox.size
        assert width > 0.5
        assert height > 0.25
