"""The law's sliders: what they draw, with a kernel and without."""

import base64
import sys
from dataclasses import replace

import numpy as np
import pytest

from labkit.instruments.laws import Demands, bounds
from labkit.instruments.slider import Law
from tests.figure_texts import boxes, cut, overlapping

DEMANDS = Demands(wall=0.04, cpu=0.01, lock=0.002, step=0.005, step_cpu=0.004, cores=1)


def test_the_sliders_begin_at_what_was_measured_and_move_the_bound():
    machine = {"processor": "AMD EPYC", "cores": 2, "tensorflow": "2.21.0"}
    law = Law(DEMANDS, n_workers=4, machine=machine)
    assert list(law.values.values()) == [4, 40, 10, 2, 5, 1]
    assert "Measured on AMD EPYC, 2 cores" in law.figure().get_supxlabel()
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
        *(
            f"{name}: {rate:.3g} steps/s"
            for name, rate in bounds(4, DEMANDS).items()
            if rate < np.inf
        ),
        "the least of them",
    ]
    before = picture.value
    sliders["cores"].value = 64
    assert picture.value != before and not law.figure().get_supxlabel()
    assert law.figure().get_suptitle() == "4 workers: at most 100 steps/s, set by the generator"
    sliders["workers"].value = 32
    assert law.figure().get_suptitle() == "32 workers: at most 200 steps/s, set by the model"


def test_a_rate_above_a_thousand_is_a_whole_number():
    (ax,) = Law(replace(DEMANDS, moved=1e6, bandwidth=98_612e6), 1).figure().axes
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "moving the bytes: 98,612 steps/s" in told
    quick = Law(replace(DEMANDS, wall=0.0005, cpu=0.0, step=0.0006, step_cpu=0.0), 1)
    assert quick.figure().get_suptitle() == "1 worker: at most 1,667 steps/s, set by the model"


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
    for n_workers in (1, 32):
        figure = Law(DEMANDS, n_workers).figure()
        found = boxes(figure)
        assert not cut(figure, found) and not overlapping(found)
    with pytest.raises(ValueError, match="expected n_workers from 1 to 32, got 0"):
        Law(DEMANDS, 0)
