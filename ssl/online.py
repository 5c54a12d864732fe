"""Online evaluation during training: kNN and a linear probe on labelled frames.

It serves to watch a run and to choose the best checkpoint; use `sslus evaluate` for results. The
frames are a fixed sample, split by patient, and the backbone is not changed.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from sslus.engine.errors import InputError
from sslus.engine.store import FrameStore
from sslus.ssl.linear import probe
from sslus.ssl.neighbours import knn
from sslus.ssl.scores import confusion_matrix, scores
from sslus.ssl.splits import LabelledFrames, folds, testable
from sslus.ssl.views import whole

NUM_FRAMES = 2000  # takes a ResNet-18 at 96 px a few seconds on two cores
BATCH = 64  # a signal is seen between two batches


class Online:
    """Call it with the backbone to get the scores of its features.

    store: must have labels and patients, else `why_not` says why it cannot be used. Uses at most
    NUM_FRAMES labelled frames, evenly spaced; the test part is the fold by patient that has most
    classes.
    """

    def __init__(self, store: FrameStore, image_size: int, seed: int, device: torch.device):
        self.store, self.image_size, self.device = store, image_size, device
        self.why_not: str | None = None
        labelled = np.flatnonzero((store.label >= 0) & (store.patient >= 0))
        if not len(labelled):
            self.why_not = "the shards hold no labels; add them with sslus shard --labels"
            return
        index = labelled[:: -(-len(labelled) // NUM_FRAMES)]
        frames = LabelledFrames(
            index=index,
            y=store.label[index].astype(np.int64),
            video=store.video[index],
            patient=store.patient[index],
            test=None,
            names=list(store.label_names),
            num_unlabelled=0,
            num_without_frames=0,
        )
        try:
            self.frames, _ = testable(frames)
        except InputError as e:
            self.why_not = f"the labels in the shards cannot be used: {e}"
            return
        # A class without a test frame would always have an F1 of 0.
        self.train, self.test = max(
            folds(self.frames, seed), key=lambda pair: len(np.unique(self.frames.y[pair[1]]))
        )

    def __call__(
        self, backbone: nn.Module, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """knn_accuracy, knn_macro_f1 and probe_macro_f1 on the test part, 0 to 1; None if `stop`
        has become true."""
        x, y = self.features(backbone, stop), self.frames.y
        if x is None:
            return None
        num, seen = len(self.frames.names), y[self.test]
        guess = knn(x[self.train], y[self.train], x[self.test], num)
        found = {"knn_accuracy": float((guess == seen).mean())}
        for name, predicted in (
            ("knn", guess),
            ("probe", probe(x[self.train], y[self.train], x[self.test], num)[0]),
        ):
            found[f"{name}_macro_f1"], *_ = scores(confusion_matrix(seen, predicted, num))
        return found

    @torch.no_grad()
    def features(self, backbone: nn.Module, stop: Callable[[], bool]) -> np.ndarray | None:
        """(n, F) float32, with the running statistics of BatchNorm, which are not updated."""
        training = backbone.training
        backbone.eval()
        parts = []
        for start in range(0, len(self.frames), BATCH):
            if stop():
                break
            frames = self.store.frames[self.frames.index[start : start + BATCH]]
            x = whole(frames, self.image_size, self.store.mean, self.store.std)
            parts.append(backbone(x.clone().to(self.device)).float().cpu().numpy())
        backbone.train(training)
        return None if stop() else np.concatenate(parts)
