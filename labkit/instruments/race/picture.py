"""The race as a picture: a few rows as bars with their spread, more of them as a board."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from labkit.instruments.plots import BOUND, COMPUTE, _figure, _with_texts

_MOST = 3  # rows as bars, of some 20 each

Shares = Mapping[str, Mapping[str, tuple[float, float, float]]]


def picture(shares: Shares, machine: Mapping[str, Any], tie: float) -> Figure:
    """Each contestant's steps/s over those of the first, row by row; labkit's in blue.

    Args:
        shares: of each row, each contestant's median ratio to the first, the least and the most.
        tie: the ratio from which on it counts as a tie.
    """
    figure = _bars(shares) if len(shares) <= _MOST else _board(shares, tie)
    return _with_texts(figure, "The race: labkit (blue) beside the others", machine)


def _bars(shares: Shares) -> Figure:
    figure, axes = _figure(9, 0.9 + 0.24 * sum(len(row) + 2 for row in shares.values()),
                           nrows=len(shares), squeeze=False, sharex=True,
                           height_ratios=[len(row) + 1 for row in shares.values()])  # fmt: skip
    for ax, (place, row) in zip(axes.ravel(), shares.items(), strict=True):
        middles, lows, highs = (np.array(values) for values in zip(*row.values(), strict=True))
        colours = [COMPUTE if name.startswith("labkit") else "0.75" for name in row]
        spread = [np.maximum(middles - lows, 0), np.maximum(highs - middles, 0)]
        ax.barh(range(len(row)), middles, color=colours, xerr=spread, ecolor="0.3", capsize=2)
        ax.set_yticks(range(len(row)), list(row), fontsize=8)
        ax.invert_yaxis()
        ax.axvline(1, color=BOUND, linewidth=0.8)
        ax.set_title(place, loc="left", fontsize=9)
    np.ravel(axes)[-1].set_xlabel("steps per second, over the first's; median and spread of rounds")
    return figure


def _board(shares: Shares, tie: float) -> Figure:
    ratios: dict[str, list[float]] = {name: [] for row in shares.values() for name in row}
    for name, its in ratios.items():
        its += [row[name][0] if name in row else np.nan for row in shares.values()]
    names = sorted(ratios, key=lambda n: (not n.startswith("labkit"), -np.nansum(ratios[n])))
    height = 1.4 + 0.08 * max(map(len, shares)) + 0.27 * len(names)
    figure, ax = _figure(3.2 + 0.5 * len(shares), height)
    values = np.array([ratios[name] for name in names])
    ax.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            weight = "bold" if round(value, 2) >= tie else "normal"
            colour = "white" if value > 0.6 else "black"
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour,
                    weight=weight)  # fmt: skip
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(shares)), list(shares), rotation=90, fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    for label in ax.get_yticklabels():
        label.set_color(COMPUTE if label.get_text().startswith("labkit") else "black")
    ax.set_xlabel(
        f"steps per second, over the first's, the median of rounds; bold: {tie:g} or more"
    )
    return figure
