"""What determines the bytes of the shards."""

from collections.abc import Callable
from dataclasses import dataclass

from sslus.engine.errors import InputError
from sslus.engine.region import WHOLE
from sslus.engine.region import parse as parse_region

FRAMES_PER_SHARD = 1000  # some 20 MB at 256 px: enough shards to spread over ranks
# Most formats round timestamps, so the difference of two (a frame's and the first one's) is off by
# up to a tick. Half a millisecond more absorbs our own rounding.
GRACE_SECONDS = 0.5e-3


@dataclass(frozen=True)
class Settings:
    """What determines the bytes of the shards. Raises InputError for values out of range."""

    size: int = 256
    stride: int | None = 5  # every stride-th frame ...
    rate_hz: float | None = None  # ... or at most this many per second
    quality: int = 95
    region: str = WHOLE  # see region.parse
    frames_per_shard: int = FRAMES_PER_SHARD

    def __post_init__(self):
        if not 16 <= self.size <= 4096:
            raise InputError(f"--size: want 16 to 4096 pixels, got {self.size}")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality: want 1 to 100, got {self.quality}")
        parse_region(self.region)
        if (self.stride is None) == (self.rate_hz is None):
            raise InputError("choose one of --stride, --rate and --all")
        if self.stride is not None and self.stride < 1:
            raise InputError(f"--stride: want at least 1, got {self.stride}")
        if self.rate_hz is not None and not 0 < self.rate_hz < float("inf"):
            raise InputError(f"--rate: want a rate above 0 Hz, got {self.rate_hz}")
        if self.frames_per_shard < 1:
            raise InputError(f"--frames-per-shard: want at least 1, got {self.frames_per_shard}")

    def selector(self, tick_seconds: float = 1e-3) -> Callable[[int, float], bool]:
        """A new keep(index, time_seconds) for one video, to be called in frame order.

        tick_seconds: what the video's times are rounded to.
        """
        if self.stride is not None:
            return lambda index, time_seconds: index % self.stride == 0
        last = -1
        grace = min((tick_seconds + GRACE_SECONDS) * self.rate_hz, 0.5)  # in periods

        def keep(index: int, time_seconds: float) -> bool:
            # The first frame in each period of the clock, whatever the video's own rate. Without
            # grace, a timestamp that was rounded down would fall into the period before.
            nonlocal last
            period = int(time_seconds * self.rate_hz + grace)
            due, last = period > last, max(period, last)
            return due

        return keep
