"""The settings of a data set, and what each of its clips shows."""

from dataclasses import dataclass

import numpy as np

from sslus.engine.errors import InputError

VERSION = 1  # incremented when the same settings no longer give the same clips

MOST_VIDEOS = 1_000_000  # the list of all clips is in memory: a number mistyped would fill it

PLANES = ("4CH", "LVOT", "RVOT", "3VV", "non-heart")


@dataclass(frozen=True)
class Settings:
    """The options of `sslus synth`; with a clip's number they determine every byte of the clip."""

    videos: int = 40
    patients: int = 10
    seed: int = 0
    size: int | None = None  # pixels of the longer side; None: each machine's own
    seconds: tuple[float, float] = (2.0, 6.0)

    def __post_init__(self):
        if self.videos < 1 or self.patients < 1:
            raise InputError(
                f"synth: want at least one video and one patient, got {self.videos} and"
                f" {self.patients}"
            )
        if self.videos > MOST_VIDEOS:
            raise InputError(f"synth: want at most {MOST_VIDEOS:,} videos, got {self.videos:,}")
        if self.patients > self.videos:
            raise InputError(
                f"synth: {self.patients} patients need at least as many videos, got {self.videos}"
            )
        if self.seed < 0:
            raise InputError(f"synth: the seed must be 0 or larger, got {self.seed}")
        if self.size is not None and not 64 <= self.size <= 2048:
            raise InputError(f"synth: the size must be 64 to 2048 pixels, got {self.size}")
        low, high = self.seconds
        if not 0.1 <= low <= high <= 60:
            raise InputError(
                f"synth: the seconds must be 0.1 <= LOW <= HIGH <= 60, got {low:g} {high:g}"
            )


@dataclass(frozen=True)
class Clip:
    number: int
    name: str
    label: str
    patient: str


def clips(settings: Settings) -> list[Clip]:
    """All clips: planes cycle and patients get equal shares, so both are balanced."""
    order = np.random.default_rng([settings.seed, 0]).permutation(len(PLANES))
    digits = max(3, len(str(settings.videos - 1)))
    patient_digits = max(2, len(str(settings.patients - 1)))
    out = []
    for i in range(settings.videos):
        patient = i * settings.patients // settings.videos
        label = PLANES[order[i % len(PLANES)]]
        out.append(Clip(i, f"clip-{i:0{digits}d}.mp4", label, f"p{patient:0{patient_digits}d}"))
    return out
