"""The metrics in TensorBoard, where it is installed."""

from pathlib import Path


class Board:
    """Writes the lines of metrics.jsonl as scalars into <run>/tensorboard; else does nothing."""

    def __init__(self, run: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # an extra that a user may install
            self.writer = None
            return
        self.writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, line: dict) -> None:
        if self.writer:
            for name, value in line.items():
                if name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        if self.writer:
            self.writer.close()
