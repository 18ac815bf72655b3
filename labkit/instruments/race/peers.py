"""Contestants: what tests/benchmarks/requirements.txt installs, set up as each one's documentation
says for a function that makes whole batches.

PyTorch: torch.utils.data, "Loading Batched and Non-Batched Data" (batch_size=None). Grain:
`ReadOptions` and `IterDataset.mp_prefetch`. SPDL: "Parallelism" and "Execution Models". Ray Data:
"Transforming Data" and "Iterating over Data".
"""

from typing import Any

from labkit.instruments.race.entry import contestant


@contestant("PyTorch DataLoader", package="torch", processes=True, before=2.0)
def dataloader(row: Any, n: int, lap: Any) -> None:
    """batch_size=None, num_workers=n, prefetch_factor=2, fork; tensors by .numpy()"""
    import torch

    class Batches(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return lap.most

        def __getitem__(self, number: int) -> Any:
            return row.make(number)

    loader = torch.utils.data.DataLoader(
        Batches(), batch_size=None, num_workers=n, prefetch_factor=2
    )
    for batch in loader:
        lap.step(*(part.numpy() for part in batch))


@contestant("Grain threads", package="grain")
def grain_threads(row: Any, n: int, lap: Any) -> None:
    """MapDataset to_iter_dataset, num_threads=n, prefetch_buffer_size=max(16, 2 n)"""
    import grain

    options = grain.ReadOptions(num_threads=n, prefetch_buffer_size=max(16, 2 * n))
    for batch in grain.MapDataset.range(lap.most).map(row.make).to_iter_dataset(options):
        lap.step(*batch)


@contestant("Grain processes", package="grain", processes=True)
def grain_processes(row: Any, n: int, lap: Any) -> None:
    """mp_prefetch(num_workers=n), num_threads=1, prefetch_buffer_size=2 in each"""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    data = grain.MapDataset.range(lap.most).map(row.make).to_iter_dataset(options)
    batches = iter(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=n)))
    try:
        for batch in batches:
            lap.step(*batch)
    finally:
        batches.close()


@contestant("SPDL threads", package="spdl")
def spdl_threads(row: Any, n: int, lap: Any) -> None:
    """one stage, concurrency=n, num_threads=n, buffer_size=max(3, n)"""
    from spdl.pipeline import PipelineBuilder

    stages = PipelineBuilder().add_source(range(lap.most)).pipe(row.make, concurrency=n)
    pipeline = stages.add_sink(buffer_size=max(3, n)).build(num_threads=n)
    with pipeline.auto_stop():
        for batch in pipeline:
            lap.step(*batch)


@contestant("SPDL subprocesses", package="spdl", processes=True)
def spdl_processes(row: Any, n: int, lap: Any) -> None:
    """one stage in a ProcessPoolExecutor(n) of forkserver, concurrency=n,
    buffer_size=max(3, n)"""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from spdl.pipeline import PipelineBuilder

    with ProcessPoolExecutor(n, multiprocessing.get_context("forkserver")) as pool:
        stages = PipelineBuilder().add_source(range(lap.most))
        stages = stages.pipe(row.make, concurrency=n, executor=pool)
        pipeline = stages.add_sink(buffer_size=max(3, n)).build(num_threads=n)
        with pipeline.auto_stop():
            for batch in pipeline:
                lap.step(*batch)


@contestant("Ray Data", package="ray", needs="pyarrow", processes=True, before=15.0)
def ray_data(row: Any, n: int, lap: Any) -> None:
    """range, map_batches(batch_size=1, compute=TaskPoolStrategy(n)),
    iter_batches(prefetch_batches=2)"""
    import ray

    def make(numbers: Any) -> Any:
        return {str(i): part for i, part in enumerate(row.make(int(numbers["id"][0])))}

    ray.init(
        "local", num_cpus=n + 1, include_dashboard=False, log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.range(lap.most, override_num_blocks=lap.most // 100)
    data = data.map_batches(make, batch_size=1, compute=ray.data.TaskPoolStrategy(n))
    for batch in data.iter_batches(batch_size=row.batch_size, prefetch_batches=2):
        lap.step(*batch.values())
