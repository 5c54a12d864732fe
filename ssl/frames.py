"""The frames of shards as a PyTorch Dataset, for a training loop of one's own."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset

from sslus.engine.errors import InputError
from sslus.engine.store import FrameStore


class Frames(Dataset):
    """Frames with their labels, from a frame store; frames[i] is (image, label).

    >>> frames = Frames("shards", transform=v2.RandomHorizontalFlip())
    >>> for images, labels in DataLoader(frames, batch_size=64, shuffle=True, num_workers=4):
    ...     x = (images / 255 - frames.store.mean) / frames.store.std

    image: (1, S, S) uint8, a copy that may be written to, or what `transform` makes of it. label:
    index into store.label_names, or -1 without a label. `store` is the FrameStore, whose arrays
    video, patient and time_seconds have an entry for each frame, so that a
    Subset(frames, np.flatnonzero(frames.store.patient != 3)) leaves a patient out.

    The store is built on the first call, as for training; the errors are those of
    FrameStore.open. A worker process of a DataLoader opens it again instead of getting a copy,
    and raises InputError if the shards have been replaced meanwhile.
    """

    def __init__(self, shards: str | Path, transform: Callable | None = None):
        self.shards, self.transform = Path(shards).absolute(), transform
        self.store = FrameStore.open(self.shards)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple]:
        """Several at once: what a DataLoader calls for a batch."""
        images = torch.from_numpy(self.store.frames[indices]).unsqueeze(1)
        labels = self.store.label[indices].tolist()
        if self.transform:
            images = map(self.transform, images)
        return list(zip(images, labels, strict=True))

    def __getstate__(self) -> dict:
        # A memory map would be pickled as the frames themselves.
        return vars(self) | {"store": self.store.digest}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.store = FrameStore.open(self.shards)
        if self.store.digest != state["store"]:
            raise InputError(
                f"{self.shards}: were replaced after this dataset was opened; open it again"
            )
