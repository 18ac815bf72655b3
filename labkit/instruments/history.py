"""What a training run did, epoch by epoch, kept as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Epoch:
    """One epoch. Times are seconds, losses nats per sample, accuracies 0..1."""

    seconds: float
    steps: int
    waiting: float
    computing: float
    train_accuracy: float
    train_loss: float
    valid_accuracy: float | None = None
    valid_loss: float | None = None

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds


@dataclass
class History:
    """What a run did: its settings, the machine, and an `Epoch` for each epoch.

    Attributes:
        settings: the arguments of `train`.
        machine: processor, cores, versions.
        epochs: list of `Epoch`.
        start_seconds: from the start of the workers to the end of the first step, compiling
            included.
        steps: (waiting, computing) seconds of each step of the last epoch, for timelines.
        complete: False if the run was interrupted or failed; then the last epoch may be a part.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    epochs: list[Epoch] = field(default_factory=list)
    start_seconds: float = 0.0
    steps: list[tuple[float, float]] = field(default_factory=list)
    complete: bool = True

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        data = asdict(self)
        for row, epoch in zip(data["epochs"], self.epochs, strict=True):
            row["steps_per_second"] = epoch.steps_per_second
        Path(path).write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Reads what `save` wrote. Raises ValueError if the file is something else."""
        try:
            data = json.loads(Path(path).read_text())
            for row in data["epochs"]:
                row.pop("steps_per_second")
            data["epochs"] = [Epoch(**row) for row in data["epochs"]]
            data["steps"] = [(wait, compute) for wait, compute in data["steps"]]
            return cls(**data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"History.load: expected a file written by History.save, got {path} "
                f"({type(error).__name__}: {error})."
            ) from error
