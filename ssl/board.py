"""Metrics for TensorBoard, if it is installed."""

from pathlib import Path


class Board:
    """Writes the lines of metrics.jsonl after `step` as scalars into <run>/tensorboard.

    Does nothing if TensorBoard is not installed.
    """

    def __init__(self, run: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # an optional package
            self.writer = None
            return
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, line: dict) -> None:
        if self.writer:
            for name, value in line.items():
                if name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        if self.writer:
            self.writer.close()
