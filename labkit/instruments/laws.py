"""What workers can bring, predicted from what a batch and a step cost, and said in words.

The prediction is the operational laws of queueing (P. J. Denning, J. P. Buzen, "The operational
analysis of queueing network models", 1978): no rate can exceed any of its asymptotic bounds. Where
workers and training step get into each other's way the laws are too hopeful, so each kind of
worker is also run together with the model, in a few numbers, and that corrects them. A bound that
a measurement has passed was wrong, and is not stated any more.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

GIL, TURNS = "Python's lock", "taking turns"  # why a second worker cannot go on
CROWDED, HANDING = "each other", "handing over"  # less is reached than any bound says
MOVING, MEMORY = "moving the bytes", "memory"
FREE = 5e-4  # seconds of a batch, below which handing it over is what costs
_A_CORE, _AT_MOST = 2, 32  # workers worth considering where they wait
_WITHDRAWN = 1.15  # times a bound that was inferred: passed by so much, it does not exist
# What adds to the scatter within a diagnosis, as logarithms: the machine's drift until later, and
# not to have tried a setting. tests/benchmarks/sweep.py counts what the ranges hold.
_DRIFT, _UNTRIED = 0.06, 0.08


@dataclass
class Demands:
    """What a batch, a step and a worker cost, in seconds and bytes: all that predictions need.

    Attributes:
        wall: of the generator, per batch, alone in one worker.
        cpu: processor seconds of the generator per batch.
        lock: seconds per batch during which no second worker of this kind can go on, see `turn`;
            0 where none was found.
        step: of the model, per step, on a repeated batch.
        step_cpu: processor seconds of the model per step.
        cores: that this process may use, or its cluster has.
        lock_name: "Python's lock"; or "taking turns", if something else keeps a second one waiting.
        moved: bytes that are copied to bring a batch to the model: its own x copies.
        bandwidth: bytes/s that the machine copies, in arrays as large as a batch.
        memory: bytes that each worker takes.
        free: bytes of memory that there are for them.
        handed: seconds, of `wall`, that go into handing a batch over: copies, store, network; None
            if unknown.
    """

    wall: float
    cpu: float
    lock: float
    step: float
    step_cpu: float
    cores: int
    lock_name: str = GIL
    moved: float = 0.0
    bandwidth: float = np.inf
    memory: float = 0.0
    free: float = np.inf
    handed: float | None = None


def bounds(n: int, demands: Demands) -> dict[str, float]:
    """Steps/s that n workers cannot exceed, by what sets each bound; the least of them governs.

    the generator       n / wall
    the lock            1 / lock, of two and more
    the cores           cores / (cpu + step_cpu)
    moving the bytes    bandwidth / (bytes of a batch x copies)
    the model           1 / step
    """
    d = demands
    return {
        "the generator": n / d.wall,
        d.lock_name: 1 / d.lock if n > 1 and d.lock > 0 else np.inf,
        "the cores": d.cores / max(d.cpu + d.step_cpu, 1e-9),
        MOVING: d.bandwidth / max(d.moved, 1),
        "the model": 1 / d.step,
    }


def fits(n: int, demands: Demands) -> bool:
    """Whether there is memory for n workers."""
    return n * demands.memory <= demands.free


def turn(wall: float, cpu: float, gain: float, shares_lock: bool) -> tuple[float, str]:
    """Seconds per batch in which workers wait for one another, and what for; 0.0 for none.

    From `gain`, the rate of two workers over that of one, alone. Two that meet by chance at
    something which serves one at a time make 2 / (1 + share²) times the rate of one, if it has the
    share of a batch's time (mean value analysis); two that meet always, fewer. The more hopeful is
    taken: a bound has to hold.
    """
    if gain > 1.6:
        return 0.0, GIL if shares_lock else TURNS
    found = wall * math.sqrt(2 / gain - 1) if gain > 1 else wall / gain
    # Whoever holds Python's lock computes: it is not held for longer than that.
    if shares_lock and found < 1.5 * cpu:
        return min(found, cpu), GIL
    # Processes that compute have the cores to share, which is a bound of its own.
    return (0.0 if not shares_lock and cpu > 0.5 * wall else found), TURNS


def corrected(
    demands: dict[str, Demands], measured: dict[tuple[str, int], float]
) -> dict[str, Demands]:
    """Each kind's demands without what steps/s that were measured, by kind and number of workers,
    contradict: no bound is below one of these. What was measured too high is lowered; the lock,
    which was only inferred, is withdrawn where it was passed by far. What a kind reaches on more
    cores contradicts nothing of the others but the step."""
    best = max(measured.values(), default=0.0)
    found = {}
    for kind, need in demands.items():
        few = [rate for (k, _), rate in measured.items() if demands[k].cores <= need.cores]
        own = {n: rate for (k, n), rate in measured.items() if k == kind}
        found[kind] = _corrected(need, best, max(few, default=0.0), own)
    return found


def _corrected(need: Demands, best: float, here: float, own: dict[int, float]) -> Demands:
    busy = min(1.0, need.cores / max(here * (need.cpu + need.step_cpu), 1e-9))
    several = max((rate for n, rate in own.items() if n > 1), default=0.0)
    passed = need.lock * several
    # Two that wait for one another leave less to gain than this, however slow the machine was.
    grew = several > 1.3 * own.get(2, np.inf)
    return replace(
        need,
        wall=min([need.wall, *(n / rate for n, rate in own.items())]),
        cpu=need.cpu * busy,
        lock=0.0 if grew or passed > _WITHDRAWN else need.lock / max(1.0, passed),
        step=min(need.step, 1 / best) if best else need.step,
        step_cpu=need.step_cpu * busy,
        bandwidth=max([need.bandwidth, *(need.moved * rate for rate in own.values())]),
    )


def counts(limit: int, need: Demands) -> list[int]:
    """Numbers of workers to predict: the powers of two up to the limit, and the limit; 2 at least,
    since the second worker shows what sharing costs. More than the limit, up to two a core, where
    the generator waits so much that they are of use."""
    # Without the lock, which four workers may refute: they have to be tried.
    useful = min(math.ceil(_ceiling(1, need) * need.wall), _A_CORE * need.cores, _AT_MOST)
    most = max(2, limit, 2 ** math.ceil(math.log2(max(1, useful))) if useful > limit else 0)
    return sorted({*(2**k for k in range(most.bit_length())), max(2, limit)})


def _ceiling(n: int, need: Demands) -> float:
    return min(value for name, value in bounds(n, need).items() if name != "the generator")


def contended(n: int, need: Demands) -> bool:
    """Whether more than the generator's own time may decide with n workers."""
    return n > 1 and n / need.wall > 0.7 * _ceiling(n, need)


def to_try(numbers: list[int], need: Demands) -> list[int]:
    """The settings that are worth running together with the model: the first and the last in which
    workers only wait, and those in which they get into each other's way, up to twice as many as the
    law finds useful: more bring no news. None for which there is no memory, but for 1 and 2, which
    have run alone."""
    numbers = [n for n in numbers if n <= 2 or fits(n, need)]
    free = [n for n in numbers if not contended(n, need)]
    useful = next((n for n in numbers if n / need.wall >= _ceiling(n, need)), numbers[-1])
    most = 2 * max(2, useful)
    return sorted({1, *free[-1:], *(n for n in numbers if n not in free and n <= most)})


def noise(repeated: Iterable[list[float]]) -> float:
    """Half the width, as a logarithm, that holds 90 % of single measurements around their mean;
    `repeated`: rates that were measured several times each, once at least."""
    logs = [np.log(rates) for rates in repeated]
    freedom = sum(len(rates) - 1 for rates in logs)
    squares = sum(float(((rates - rates.mean()) ** 2).sum()) for rates in logs)
    # Student's t for 5 % on either side: few measurements tell little of their own scatter.
    student = {1: 6.31, 2: 2.92, 3: 2.35}.get(freedom, 1.645 * (1 + 1.1 / freedom))
    return student * math.sqrt(squares / freedom)


def predict(
    numbers: list[int],
    need: Demands,
    measured: dict[int, list[float]],
    calm: float,
    crowd: float,
) -> Iterator[tuple[int, float, float, float]]:
    """The law for every number of workers, corrected by the rates that were measured together.

    Yields number, steps/s, and the range that a later measurement is in with 90 %: `calm` and
    `crowd` are the `noise` of settings that are not `contended`, and of those that are.
    """
    law = {n: min(bounds(n, need).values()) for n in numbers}
    factors = {n: fmean(rates) / law[n] for n, rates in sorted(measured.items())}
    for n in numbers:
        crowded = contended(n, need)
        # What was tried with other demands in mind may have nothing of the sort: then all of it.
        known = [k for k in factors if contended(k, need) == crowded] or list(factors)
        factor = float(np.interp(np.log2(n), np.log2(known), [factors[k] for k in known]))
        scatter = (crowd if crowded else calm) * math.sqrt(1 + 1 / len(measured.get(n, [0])))
        half = math.hypot(scatter, _DRIFT, 0.0 if n in measured else _UNTRIED)
        rate = law[n] * factor
        yield n, rate, rate * math.exp(-half), rate * math.exp(half)


def limit(n: int, need: Demands, rate: float) -> str:
    """What limits n workers at `rate`: the least bound, or what keeps them away from it; memory,
    where there is too little to start them."""
    if not fits(n, need):
        return MEMORY
    found = bounds(n, need)
    least = min(found, key=lambda name: found[name])
    if rate > 0.85 * found[least]:
        return least
    return HANDING if least == "the model" else CROWDED


def nature(own: float, busy: float, sharing: float | None, apart: float | None, cores: int) -> str:
    """What the generator does, as the end of "a generator, which …".

    Args:
        own: seconds that it takes for a batch, without what handing it over takes.
        busy: cores that it uses in one worker.
        sharing, apart: the gain of further workers that share Python's lock, and of such as do
            not; None where not measured.
        cores: that there are.
    """
    if own < FREE:
        return "costs next to nothing"
    if busy > 0.7 * cores:
        return "uses all cores"
    waits, alike = busy < 0.5, apart is not None and apart < 1.3
    if sharing is None:
        return "makes workers take turns" if alike else "waits" if waits else "computes"
    if sharing > 1.4:
        return "waits" if waits else "computes without holding Python's lock"
    if alike:
        return "makes workers take turns"
    return "makes threads take turns" if waits else "holds Python's lock"


def leaves(rate: float, model: float, serial: float) -> bool:
    """Whether no workers are worth it: what they reach, the model alone, a serial loop."""
    return serial > 0.95 * model or rate < 1.05 * serial


def verdict(
    nature: str, setting: str, rate: float, bound_by: str, model: float, serial: float, wall: float
) -> str:
    """A few sentences: what bounds the training, and by how much. `rate`, `model` and `serial`, in
    steps/s, are of the setting, of the model alone and of a serial loop; `wall` as in Demands."""
    turns = ""
    if nature == "makes threads take turns":
        turns = " Threads take turns at it, as under a lock of its own; processes do not."
    if leaves(rate, model, serial):
        lost = 1 - rate / serial
        loss = f" {setting} would make about {rate:.1f} steps/s"
        loss += f": handing the batches over costs {lost:.0%}." if lost > 0.02 else ", no more."
        if serial > 0.95 * model:
            return (
                f"Model-bound: the model takes {model:.1f} steps/s, and the generator, which "
                f"{nature}, keeps up with {1 / wall:.0f} batches/s. Speed-up to be had: none, the "
                f"model is the bottleneck. Leave your loop as it is.{loss}"
            )
        return (
            f"Input-bound, but not by a lack of workers: the model could take {model:.1f} steps/s, "
            f"but with this generator, which {nature}, a serial loop makes {serial:.1f}."
            f"{turns} Speed-up to be had from workers: none. Leave your loop as it is, and make "
            f"the generator cheaper.{loss}"
        )
    left = ""
    if rate < 0.9 * model:
        then = f"{bound_by} will be the limit"
        if bound_by == CROWDED:
            then = "workers and step will be in each other's way"
        left = f" Then {then}, at {rate / model:.0%} of the model's own rate."
    return (
        f"Input-bound: the model could take {model:.1f} steps/s, but with this generator, "
        f"which {nature}, a serial loop makes {serial:.1f} ({model / serial:.1f}x less).{turns} "
        f"{setting}: about {rate:.1f} steps/s, {rate / serial:.1f}x faster.{left}"
    )


def headroom(setting: str, gain: float, rate: float) -> str:
    """A sentence: the gain and the steps/s that a perfect input would give the setting."""
    return (
        f"Headroom {gain:.2f}x: with its batches cached, as a perfect input would have them, "
        f"{setting} would make {rate:.1f} steps/s."
    )


def handing(demands: dict[str, Demands]) -> str:
    """A sentence: what it costs to hand a batch over, by each kind; "" where that is not known."""
    known = {kind: need.handed for kind, need in demands.items() if need.handed is not None}
    each = (f"{1e3 * handed:.2g} ms by one {kind}" for kind, handed in known.items())
    return f"Handing a batch over, as measured alone: {', '.join(each)}." if known else ""


def memory(demands: dict[str, Demands], most: dict[str, int]) -> str:
    """A sentence: what a worker of each kind takes, and the most that are considered; "" where
    that is not known."""
    said = ""
    for kind, need in demands.items():
        if need.memory:
            n, one = most[kind], f"a{'n' * (kind[0] in 'aeiou')} {kind}"
            said += f"{one} takes {_bytes(need.memory)}, {n} take {_bytes(n * need.memory)}; "
    free = min(need.free for need in demands.values())
    return f"Memory: {said}{_bytes(free)} are free." if said else ""


def _bytes(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else "under 1 MB"
