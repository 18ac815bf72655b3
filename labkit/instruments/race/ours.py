"""Contestants: loops without workers, and labkit. Each is what a user would write."""

from typing import Any

from labkit.instruments.race.entry import contestant


@contestant("serial loop", alone=True)
def serial(row: Any, n: int, lap: Any) -> None:
    """each batch when it is needed"""
    for batch in row.factory():
        lap.step(*batch)


@contestant("feed_dict", alone=True, graph=True)
def feed_dict(row: Any, n: int, lap: Any) -> None:
    """a graph, a session, placeholders"""
    import tensorflow as tf

    batches = row.factory()
    with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
        places = [tf.compat.v1.placeholder(a.dtype, (None, *a.shape[1:])) for a in next(batches)]
        train_op = lap.model(*places)
        sess.run(tf.compat.v1.global_variables_initializer())
        lap.train = lambda *batch: sess.run(train_op, dict(zip(places, batch, strict=True)))
        for batch in batches:
            lap.step(*batch)


@contestant("labkit threads")
def threads(row: Any, n: int, lap: Any) -> None:
    """workers="thread", shuffle=False"""
    import labkit

    with labkit.QueueRunner(row.factory, row.batch_size, n, **row.queue) as runner:
        for batch in runner.dataset():
            lap.step(*batch)


@contestant("labkit processes", processes=True)
def processes(row: Any, n: int, lap: Any) -> None:
    """workers="process", shuffle=False"""
    import labkit

    with labkit.QueueRunner(row.factory, row.batch_size, n, "process", **row.queue) as runner:
        for batch in runner.dataset():
            lap.step(*batch)


@contestant("labkit fixed order")
def fixed(row: Any, n: int, lap: Any) -> None:
    """threads, order="fixed", seed=0, shuffle=False"""
    import labkit

    options = {"order": "fixed", "seed": 0, **row.queue}
    with labkit.QueueRunner(row.factory, row.batch_size, n, **options) as runner:
        for batch in runner.dataset():
            lap.step(*batch)


@contestant("labkit auto", own_number=True, before=5.0)
def auto(row: Any, n: int, lap: Any) -> None:
    """n_workers="auto", workers="auto", shuffle=False"""
    import labkit

    with labkit.QueueRunner(row.factory, row.batch_size, "auto", "auto", **row.queue) as runner:
        for batch in runner.dataset():
            lap.step(*batch)


@contestant("labkit as diagnosed", own_number=True, before=20.0)
def diagnosed(row: Any, n: int, lap: Any) -> None:
    """diagnose(factory, step), about 10 s, and then its runner"""
    import labkit

    report = labkit.diagnose(row.factory, lap.train, lap.task.settle + 2, progress=False)
    with report.runner(**row.queue) as runner:
        for batch in runner.dataset():
            lap.step(*batch)


@contestant("labkit threads in fit", in_fit=True)
def in_fit(row: Any, n: int, lap: Any) -> None:
    """workers="thread"; model.fit takes the steps"""
    import labkit

    with labkit.QueueRunner(row.factory, row.batch_size, n, **row.queue) as runner:
        lap.keras.fit(runner.dataset(), steps_per_epoch=lap.most, callbacks=[lap.callback()])
