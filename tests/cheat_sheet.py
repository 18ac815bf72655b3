"""Draws figures/cheat_sheet.pdf and .png: one A4 page, black on white, to keep beside the keyboard.

python -m tests.cheat_sheet
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from labkit.instruments.waiting import HIGH, MODERATE

FOLDER = Path(__file__).resolve().parents[1] / "figures"
A4 = 8.27, 11.69
LEFT, RIGHT, SIZE = 0.06, 0.94, 9

# Where a box stands, on a grid of 12 columns: text, column, row, columns wide.
BOXES = {
    "watch": ("model.fit(..., callbacks=[labkit.watch()])\nHow much is waiting?", 3, 0, 6),
    "none": (f"under {MODERATE:.0%}\nThe model is the limit.\nLeave the input alone.", 0, 1, 4),
    "some": (
        f"{MODERATE:.0%} or more; over {HIGH:.0%}: highly input-bound\n"
        "labkit.diagnose(factory, model)\n"
        "What does the generator do?",
        4.5, 1, 7.5,
    ),
    "waits": ("It waits:\ndisk, network.\nMany threads", 0, 2, 2.8),
    "outside": ("It computes without\nholding the lock.\nAs many threads as cores", 3.05, 2, 2.8),
    "holds": ("It holds Python's\nlock (GIL).\nProcesses", 6.1, 2, 2.8),
    "turns": (
        "Workers wait for each\nother: one file, one lock.\nGive each its own", 9.15, 2, 2.85,
    ),
    "stage": (
        'Cores full, and still input-bound: with labkit.stage("decode"): ...  '
        "Make the slowest part cheaper.",
        0, 3, 12,
    ),
}  # fmt: skip
TOPS, HEIGHTS = (-0.05, -0.95, -2.15, -3.25), (0.6, 0.76, 0.76, 0.42)  # of the rows
ARROWS = (
    ("watch", "none"), ("watch", "some"), ("some", "waits"), ("some", "outside"), ("some", "holds"),
    ("some", "turns"), ("waits", "stage"), ("outside", "stage"), ("holds", "stage"),
)  # fmt: skip

TABLES = {
    "What n workers can bring, in steps/s: the least of these": [
        ("the generator", "n / (seconds a batch)"),
        ("Python's lock", "1 / (seconds a batch holds it), in threads"),
        ("the cores", "cores / (processor seconds of a batch + of a step)"),
        ("moving the bytes", "bandwidth / (bytes of a batch x copies)"),
        ("the model", "1 / (seconds a step on a repeated batch): compute-only"),
        ("enough workers", "compute-only x seconds a batch, and one or two more"),
    ],
    "What you see, and what it is": [
        ("queue stays at min_after_dequeue", "the input is slower: more workers, less work"),
        ("queue stays at capacity", "the model is slower: the input is fast enough"),
        ("slow steps, no waiting, cores free", "workers hold Python's lock: processes"),
        ("slow steps, no waiting, cores full", "fewer workers, or a cheaper generator"),
        ("low GPU use", "a symptom: compare with compute-only first"),
        ("training stands still", "WorkerError names the worker; timeout= for stalls"),
        ("limit: moving the bytes", "smaller types (uint8), made floats in the model"),
        ("limit: memory", "fewer processes, or threads; files read in parts"),
        ("two runs differ", "order=\"fixed\", seed=; draw from the factory's rng or seed"),
        ("odd accuracy", "labkit.audit(factory, samples=...): repeated, missed, alike?"),
    ],
    "Commands": [
        ("labkit.QueueRunner(factory, 32, 4)", "4 threads; \"process\", n_workers=\"auto\""),
        ("model.fit(runner.dataset(), shuffle=False)", "in `with runner:`; each pass an epoch"),
        ("report = labkit.diagnose(factory, model)", "report.runner() is the cure"),
        ("labkit.compare(before, after)", "a gain, or the machine's mood?"),
        ("labkit.keras.Resume(runner, path)", "goes on after a kill, with the next batch"),
        ("python -m labkit.diagnose my:factory", "--fail-if-waiting 0.2: for CI"),
        ("python -m labkit.train --n_thread 4", "the article's training; --help"),
    ],
}  # fmt: skip


def tree(figure: Figure) -> None:
    """The way from the symptom to the cure."""
    ax = figure.add_axes((LEFT, 0.645, RIGHT - LEFT, 0.285), xlim=(0, 12), ylim=(-4, 0))
    ax.axis("off")
    edges = {}
    for name, (text, column, row, wide) in BOXES.items():
        middle, top, low = column + wide / 2, TOPS[row], TOPS[row] - HEIGHTS[row]
        edges[name] = middle, top, low
        style = {"boxstyle": "round,pad=0.02", "facecolor": "white", "edgecolor": "black"}
        ax.add_patch(FancyBboxPatch((column + 0.05, low), wide - 0.1, top - low, **style))
        ax.text(middle, (top + low) / 2, text, ha="center", va="center", fontsize=SIZE - 0.5)
    for start, end in ARROWS:
        (x, _, low), (goal, top, _) = edges[start], edges[end]
        ends = (x if end == "stage" else goal, top + 0.02), (x, low - 0.02)
        ax.annotate("", *ends, arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 0.9})


def page() -> Figure:
    figure = Figure(figsize=A4)
    figure.text(
        LEFT,
        0.965,
        "labkit: is your training waiting for data?",
        fontsize=17,
        weight="bold",
        va="top",
    )
    tree(figure)
    at = 0.637
    for title, rows in TABLES.items():
        figure.text(LEFT, at, title, fontsize=SIZE + 2.5, weight="bold", va="top")
        at -= 0.027
        family = "monospace" if title == "Commands" else None
        for left, right in rows:
            figure.text(
                LEFT, at, left, fontsize=SIZE - (1 if family else 0), va="top", family=family
            )
            figure.text(0.46, at, right, fontsize=SIZE, va="top")
            at -= 0.0205
        at -= 0.019
    note = (
        "Thresholds as in TensorFlow's profiler. Bounds: operational laws, P. J. Denning and "
        "J. P. Buzen, 1978. Always compare with compute-only."
    )
    figure.text(LEFT, 0.02, note, fontsize=7.5, color="black", va="bottom")
    return figure


def main() -> None:
    figure = page()
    # Without a date, the same code gives the same file.
    figure.savefig(FOLDER / "cheat_sheet.pdf", metadata={"CreationDate": None})
    figure.savefig(FOLDER / "cheat_sheet.png", dpi=150)


if __name__ == "__main__":
    main()
