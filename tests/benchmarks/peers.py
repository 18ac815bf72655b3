"""What labkit says it takes of PyTorch and Grain, tried with the real ones:
`python -m tests.benchmarks.peers`.

Each try whose peer is not installed is named as not run; one that fails ends the script with 1.
Needs tests/benchmarks/requirements.txt.
"""

import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np

import labkit

N, SIZE = 103, 8
X = np.arange(N, dtype=np.float32)


def numbers(batches: Any) -> list[float]:
    """All of each batch's first component, sorted: of whatever kind the array is."""
    firsts = (batch[0] if isinstance(batch, tuple | list) else batch for batch in batches)
    return sorted(float(x) for first in firsts for x in np.ravel(np.asarray(first)))


def once_a_pass(source: Any, passes: int = 2, **options: Any) -> None:
    with labkit.QueueRunner(source, SIZE, **options) as runner:
        for _ in range(passes):
            assert numbers(runner.dataset()) == X.tolist()


def torch_set(kind: str = "map") -> Any:
    import torch

    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            return torch.tensor([float(index)]), index % 2

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return (Pairs()[i] for i in range(N))

    return Pairs() if kind == "map" else Stream()


def torch_loader(**options: Any) -> Any:
    import torch

    return torch.utils.data.DataLoader(torch_set(), batch_size=SIZE, **options)


def keras_model() -> Any:
    from labkit.quiet import tf

    model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def watch_fit_on_a_torch_loader() -> None:
    with redirect_stdout(StringIO()) as said:
        fitted = keras_model().fit(
            torch_loader(shuffle=True), epochs=2, verbose=0, callbacks=[labkit.watch()]
        )
    assert len(fitted.history["loss"]) == 2
    assert "waiting for data" in said.getvalue(), said.getvalue()


def watch_a_torch_loader() -> None:
    with redirect_stdout(StringIO()) as said:
        assert numbers(labkit.watch(torch_loader(num_workers=2))) == X.tolist()
    assert "labkit.watch" in said.getvalue(), said.getvalue()


def torch_data_set_in_threads() -> None:
    once_a_pass(torch_set(), n_workers=3)


def torch_data_set_in_processes() -> None:
    once_a_pass(torch_set(), n_workers=2, workers="process")


def torch_loader_itself() -> None:
    once_a_pass(torch_loader(shuffle=True))


def torch_loader_with_workers() -> None:
    once_a_pass(torch_loader(num_workers=2))


def torch_loader_in_a_process() -> None:
    once_a_pass(torch_loader(), workers="process")


def torch_tensor_data_set() -> None:
    import torch

    once_a_pass(torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(X)))


def torch_subset_and_concat() -> None:
    import torch

    data = torch.utils.data
    first, rest = (data.Subset(torch_set(), part) for part in (range(50), range(50, N)))
    once_a_pass(data.ConcatDataset([first, rest]), n_workers=2)


def torch_stream_is_met_with_the_line_to_write() -> None:
    try:
        labkit.QueueRunner(torch_set("stream"))
    except TypeError as error:
        assert "DataLoader(dataset, batch_size=32)" in str(error)
    else:
        raise AssertionError("expected a TypeError, for it yields samples")


def diagnose_a_torch_loader() -> None:
    report = labkit.diagnose(torch_loader(), 0.002, seconds=3, progress=False)
    assert "cannot be split" in report.nature and report.best.predicted > 0


def diagnose_a_torch_data_set() -> None:
    report = labkit.diagnose(torch_set(), 0.002, 3, SIZE, progress=False, workers="thread")
    assert report.best.predicted > 0


def audit_a_torch_data_set() -> None:
    assert "each" in str(labkit.audit(torch_set(), samples=N)).lower()


def grain_map() -> Any:
    import grain

    return grain.MapDataset.source([(np.float32([i]), i % 2) for i in range(N)])


def watch_fit_on_grain() -> None:
    data = grain_map().shuffle(seed=1).batch(SIZE).to_iter_dataset()
    with redirect_stdout(StringIO()) as said:
        keras_model().fit(data, epochs=2, verbose=0, callbacks=[labkit.watch()])
    assert "waiting for data" in said.getvalue(), said.getvalue()


def watch_grain() -> None:
    with redirect_stdout(StringIO()) as said:
        batches = labkit.watch(grain_map().batch(SIZE).to_iter_dataset())
        assert numbers(batches) == X.tolist()
    assert "labkit.watch" in said.getvalue(), said.getvalue()


def grain_map_data_set() -> None:
    once_a_pass(grain_map().shuffle(seed=1), n_workers=3)


def grain_map_data_set_in_processes() -> None:
    once_a_pass(grain_map().map(lambda pair: pair), n_workers=2, workers="process")


def grain_data_source() -> None:
    import grain

    once_a_pass(grain.sources.RangeDataSource(0, N, 1), n_workers=2)


def grain_iter_data_set() -> None:
    once_a_pass(grain_map().shuffle(seed=1).batch(SIZE).to_iter_dataset())


def grain_loader() -> None:
    import grain

    once_a_pass(
        grain.DataLoader(
            data_source=grain.sources.RangeDataSource(0, N, 1),
            sampler=grain.samplers.IndexSampler(N, shuffle=True, seed=0, num_epochs=1),
            operations=[grain.transforms.Batch(SIZE)],
            worker_count=0,
        )
    )


def grain_loader_with_workers() -> None:
    import grain

    once_a_pass(
        grain.DataLoader(
            data_source=grain.sources.RangeDataSource(0, N, 1),
            sampler=grain.samplers.IndexSampler(N, shuffle=False, num_epochs=1),
            operations=[grain.transforms.Batch(1)],
            worker_count=2,
        ),
        passes=1,
    )


def diagnose_a_grain_iter_data_set() -> None:
    data = grain_map().batch(SIZE).to_iter_dataset()
    report = labkit.diagnose(data, 0.002, seconds=3, progress=False)
    assert "cannot be split" in report.nature


TRIES: dict[str, list[Callable[[], None]]] = {
    "torch": [
        watch_fit_on_a_torch_loader, watch_a_torch_loader, torch_data_set_in_threads,
        torch_data_set_in_processes, torch_loader_itself, torch_loader_with_workers,
        torch_loader_in_a_process, torch_tensor_data_set, torch_subset_and_concat,
        torch_stream_is_met_with_the_line_to_write, diagnose_a_torch_loader,
        diagnose_a_torch_data_set, audit_a_torch_data_set,
    ],
    "grain": [
        watch_fit_on_grain, watch_grain, grain_map_data_set, grain_map_data_set_in_processes,
        grain_data_source, grain_iter_data_set, grain_loader, grain_loader_with_workers,
        diagnose_a_grain_iter_data_set,
    ],
}  # fmt: skip


def main(wanted: list[str]) -> int:
    """Runs the tries whose names hold one of `wanted`, or all; returns 1 if one failed."""
    failed = 0
    for peer, tries in TRIES.items():
        for one in tries:
            if wanted and not any(part in one.__name__ for part in wanted):
                continue
            if find_spec(peer) is None:
                print(f"not run, {peer} is not installed: {one.__name__}")
                continue
            try:
                one()
                print(f"works, {peer} {version(peer)}: {one.__name__}", flush=True)
            except BaseException as error:
                failed = 1
                print(f"FAILS, {peer} {version(peer)}: {one.__name__}: {error!r}", flush=True)
                traceback.print_exc()
                if isinstance(error, KeyboardInterrupt):
                    raise
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
