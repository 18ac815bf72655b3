"""The laws of `diagnose` as a picture that moves, with a slider for each part of a bound."""

import base64
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from labkit.instruments import plots
from labkit.instruments.laws import Demands, bounds

_MOST = 32
# Name, the least and the most that the slider goes to, in milliseconds or pieces.
_RANGES = {
    "workers": (1, _MOST),
    "ms a batch": (0.5, 200.0),
    "of it processor": (0.0, 200.0),
    "of it Python's lock": (0.0, 200.0),
    "ms a step": (0.5, 200.0),
    "cores": (1, 64),
}


class Law:
    """What n workers can bring at most, drawn over n, beside sliders for what decides.

    In a notebook the sliders move the curve. Where no kernel runs, as in a saved page, the picture
    is there as it was first drawn.

    Attributes:
        values: of the sliders, by name: milliseconds, workers, cores.

    Args:
        demands: where the sliders begin, as `Report.demands` has it for each kind of worker.
        n_workers: how many at first, 1 to 32.
        machine: that measured the demands, as `Report.about.machine` has it; the picture names it
            as long as no slider has moved.

    Raises:
        ValueError: for a number of workers that the slider does not have.
    """

    def __init__(
        self, demands: Demands, n_workers: int = 4, machine: Mapping[str, Any] | None = None
    ) -> None:
        if not 1 <= n_workers <= _MOST:
            raise ValueError(f"Law: expected n_workers from 1 to {_MOST}, got {n_workers}")
        self._demands = demands
        found = (n_workers, 1e3 * demands.wall, 1e3 * demands.cpu, 1e3 * demands.lock,
                 1e3 * demands.step, demands.cores)  # fmt: skip
        self.values: dict[str, float] = {
            name: min(max(value, least), most)
            for (name, (least, most)), value in zip(_RANGES.items(), found, strict=True)
        }
        self._measured = dict(self.values), machine

    def figure(self) -> Any:
        """The picture for `values`, a matplotlib Figure."""
        n, wall, cpu, lock, step, cores = self.values.values()
        need = replace(
            self._demands,
            wall=wall / 1e3,
            # No part of a batch takes longer than the whole.
            cpu=min(cpu, wall) / 1e3,
            lock=min(lock, wall) / 1e3,
            step=step / 1e3,
            step_cpu=min(self._demands.step_cpu * step / 1e3 / self._demands.step, cores),
            cores=int(cores),
        )
        rows = [bounds(k, need) for k in range(1, _MOST + 1)]
        first, machine = self._measured
        named = machine if self.values == first else None
        return plots.law(int(n), {name: [row[name] for row in rows] for name in rows[0]}, named)

    def _png(self) -> bytes:
        page = io.BytesIO()
        self.figure().savefig(page, format="png")
        return page.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> Mapping[str, Any]:
        png = self._png()
        still = {"image/png": base64.b64encode(png).decode(), "text/plain": repr(self)}
        try:
            import ipywidgets
        except ImportError:
            return still
        return {**still, **self._box(ipywidgets, png)._repr_mimebundle_()}

    def _box(self, widgets: Any, png: bytes) -> Any:
        picture = widgets.Image(value=png, format="png")
        sliders = []
        for name, value in self.values.items():
            least, most = _RANGES[name]
            kind = widgets.IntSlider if isinstance(most, int) else widgets.FloatSlider
            slider = kind(value, min=least, max=most, description=name)
            slider.style.description_width = "initial"
            slider.layout.width = "95%"  # of its column: else it ends on the next one's name

            def moved(change: Any, name: str = name) -> None:
                self.values[name] = change["new"]
                picture.value = self._png()

            slider.observe(moved, "value")
            sliders.append(slider)
        three = widgets.Layout(grid_template_columns="repeat(3, 32%)")
        return widgets.VBox([widgets.GridBox(sliders, layout=three), picture])
