"""The law's sliders: what they draw, with a kernel and without."""

import base64
import sys

import numpy as np
import pytest

from labkit.instruments.laws import Demands, bounds
from labkit.instruments.slider import Law
from tests.figure_texts import boxes, cut, overlapping

DEMANDS = Demands(wall=0.04, cpu=0.01, lock=0.002, step=0.005, step_cpu=0.004, cores=1)


def test_the_sliders_begin_at_what_was_measured_and_move_the_bound():
    law = Law(DEMANDS, 4)
    assert list(law.values.values()) == [4, 40, 10, 2, 5, 1]
    box = law._box(__import__("ipywidgets"), law._png())
    grid, picture = box.children
    sliders = {slider.description: slider for slider in grid.children}
    assert {name: slider.value for name, slider in sliders.items()} == law.values
    least = min(bounds(4, DEMANDS).values())
    title = f"4 workers: at most {least:.3g} steps/s, set by the cores"
    assert law.figure().get_suptitle() == title
    (ax,) = law.figure().axes
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert told == [
        *(f"{name}: {rate:.3g}" for name, rate in bounds(4, DEMANDS).items() if rate < np.inf),
        "the least of them",
    ]
    before = picture.value
    sliders["cores"].value = 64
    assert picture.value != before
    assert law.figure().get_suptitle() == "4 workers: at most 100 steps/s, set by the generator"
    sliders["workers"].value = 32
    assert law.figure().get_suptitle() == "32 workers: at most 200 steps/s, set by the model"


def test_no_part_of_a_batch_takes_longer_than_the_batch():
    law = Law(DEMANDS)
    law.values["ms a batch"] = 1.0
    assert law.figure().get_suptitle().startswith("4 workers: at most 200 steps/s")


def test_without_a_kernel_or_widgets_there_is_the_picture(monkeypatch):
    bundle = Law(DEMANDS)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(Law(DEMANDS)._repr_mimebundle_()) == {"image/png", "text/plain"}


def test_nothing_is_cut_and_a_number_that_the_slider_lacks_is_refused():
    for workers in (1, 32):
        figure = Law(DEMANDS, workers).figure()
        found = boxes(figure)
        assert not cut(figure, found) and not overlapping(found)
    with pytest.raises(ValueError, match="expected workers from 1 to 32, got 0"):
        Law(DEMANDS, 0)
