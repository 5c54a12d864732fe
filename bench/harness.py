"""What the stages share: inputs, interleaved timing, peak memory, rows and ratios."""

import datetime
import functools
import gc
import importlib.metadata
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {  # name in a row's versions -> distribution
    "sslus": "sslus", "numpy": "numpy", "av": "av", "simplejpeg": "simplejpeg", "torch": "torch",
    "torchvision": "torchvision", "triton": "triton", "timm": "timm",
    "dali": "nvidia-dali-cuda130", "lightly": "lightly", "albumentationsx": "albumentationsx",
    "opencv": "opencv-python-headless", "kornia": "kornia",
}  # fmt: skip
SIZE, STRIDE, QUALITY = 256, 5, 95  # the defaults of `sslus shard`


@dataclass(frozen=True)
class Row:
    """One measurement. Peers and floors are rows like any other."""

    stage: str
    name: str  # what is done
    implementation: str  # by whom: "sslus", a peer, or "floor: ...", a physical limit
    case: str  # with which input
    median: float
    low: float
    high: float
    unit: str  # "s", "MiB": less is better; "frames/s", "samples/s": more is better
    threads: int  # number of threads or processes
    peak_mib: float | None  # of a fresh process that does it once, including its children
    device: str
    versions: dict[str, str]
    commit: str
    date: str


@dataclass(frozen=True)
class Ratio:
    """The ratio of two rows, as the median over their turns, and its target."""

    stage: str
    text: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    judged: bool = True  # False: the input is too small to judge it

    @property
    def want(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:.2f}"
        return f"<= {self.at_most:.2f}" if self.at_most is not None else ""

    @property
    def verdict(self) -> str:
        if not self.want or not self.judged:
            return "too small to tell" if self.want else ""
        low = self.at_least is not None and self.value < self.at_least
        high = self.at_most is not None and self.value > self.at_most
        return "missed" if low or high else "met"


@dataclass(frozen=True)
class Timed:
    """Returned by a work that excludes its own preparation from the time."""

    amount: float
    seconds: float


@dataclass(frozen=True)
class Work:
    """Something to time: `run()` returns the number of units (frames, samples) it processed."""

    run: Callable[[], float | Timed]
    threads: int = 1
    device: str = "cpu"
    fresh: bool = True  # whether to measure its peak memory in a process of its own
    peak_mib: float | None = None  # its peak memory, if already known


@dataclass
class Bench:
    """Passed to every stage: provides its inputs and collects its rows."""

    quick: bool
    device: str
    data: Path | None  # a folder of videos; None: generated clips
    scratch: Path
    save: Callable[["Bench"], None]  # called after every comparison, so an aborted run keeps rows
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    values: dict[int, list[float]] = field(default_factory=dict)  # id of a row -> its turns
    stage: str = ""
    failed: list[str] = field(default_factory=list)  # parts of the stage

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measure a part of a stage. If it fails, what comes after it is measured all the same."""
        try:
            measure()
        except Exception:
            traceback.print_exc()
            self.failed.append(f"{self.stage}: {what}")
        gc.collect()  # models are part of cycles of references, and hold a GPU's memory

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    def compare(
        self, name: str, case: str, unit: str, works: dict[str, Work], repeats: int = 5
    ) -> dict[str, Row]:
        """Time `works` in turns, A B A B, so that a noisy minute affects all of them alike.

        Before that, each runs once untimed, and if `fresh` once in a process of its own, for its
        peak memory.
        Returns their rows under the same keys. The part of a key after "|" only distinguishes
        works of the same implementation.
        """
        peaks = {k: peak_mib(w) if w.fresh else w.peak_mib for k, w in works.items()}
        amounts = {k: timed(w).amount for k, w in works.items()}
        if len(set(amounts.values())) > 1:
            raise RuntimeError(f"{self.stage}: unequal work is not compared: {amounts}")
        seconds: dict[str, list[float]] = {k: [] for k in works}
        for _ in range(1 if self.quick else repeats):
            for k, w in works.items():
                seconds[k].append(timed(w).seconds)
        rows = {
            k: self.add(
                name, k.partition("|")[0], case, unit,
                seconds[k] if unit == "s" else [amounts[k] / s for s in seconds[k]],
                threads=w.threads, device=w.device, peak=peaks[k],
            )
            for k, w in works.items()
        }  # fmt: skip
        self.save(self)
        return rows

    def add(
        self, name, implementation, case, unit, values, *, threads=1, device="cpu", peak=None
    ) -> Row:
        row = Row(
            self.stage, name, implementation, case,
            _digits(statistics.median(values)), _digits(min(values)), _digits(max(values)), unit,
            threads, None if peak is None else round(peak, 1), device_name(device),
            versions(), commit(),
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        self.rows.append(row)
        self.values[id(row)] = list(values)
        return row

    def ratio(
        self, text: str, row: Row, to: Row | None = None, *, at_least=None, at_most=None
    ) -> None:
        """Record the ratio of `row` to `to`, or the value of `row` alone, and its target.

        For rows measured in turns this is the median of the ratios of the turns: a slow minute
        affects both works of a turn, and thus their ratio little.
        """
        value = row.median
        if to is not None:
            mine, theirs = self.values[id(row)], self.values[id(to)]
            value /= to.median
            if len(mine) == len(theirs):
                value = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        self.ratios.append(Ratio(self.stage, text, value, at_least, at_most, not self.quick))

    def content(self) -> dict:
        return {
            "rows": [asdict(r) for r in self.rows],
            "ratios": [
                {"stage": r.stage, "text": r.text, "value": r.value, "want": r.want,
                 "verdict": r.verdict}
                for r in self.ratios
            ],
        }  # fmt: skip

    # ------------------------------------------------------------ inputs, made when first needed

    @functools.cached_property
    def videos(self) -> list[Path]:
        """The given videos, or H.264 clips of moving speckle."""
        if self.data:
            from sslus.engine.dicom_header import is_dicom
            from sslus.engine.sources import find_videos

            # PyAV alone, the peer, reads no DICOM file.
            return [s.path for s in find_videos([self.data])[0] if not is_dicom(s.path)]
        return self.clips("libx264", "mp4", 4 if self.quick else 14)

    @property
    def kind(self) -> str:
        return "given" if self.data else "generated"

    def clips(self, codec: str, extension: str, num: int) -> list[Path]:
        """Generated clips of speckle; existing ones are reused."""
        folder = self.scratch / f"clips-{codec}"
        folder.mkdir(exist_ok=True)
        paths = [folder / f"clip{i}.{extension}" for i in range(num)]
        num_frames, height, width = (16, 120, 160) if self.quick else (100, 480, 640)
        for i, path in enumerate(paths):
            if not path.exists():
                write_clip(path, codec, num_frames, height, width, seed=i)
        return paths

    @functools.cached_property
    def shards(self) -> Path:
        """Shards of `videos`, with the default settings."""
        from sslus.engine.shard import Settings, shard

        out = self.scratch / "shards"
        shard(self.videos, out, Settings(SIZE, STRIDE, quality=QUALITY), device="cpu")
        return out


# ---------------------------------------------------------------- measuring


def timed(work: Work) -> Timed:
    start = time.perf_counter()
    done = work.run()
    seconds = time.perf_counter() - start
    return done if isinstance(done, Timed) else Timed(done, seconds)


class Often:
    """Times as many calls as take about `seconds` together; the first time, it counts them."""

    def __init__(self, run, device="cpu", amount=1.0, seconds=0.0):
        self.run, self.device, self.amount, self.seconds = run, device, amount, seconds
        self.count = 1

    def __call__(self) -> Timed:
        each = self._each()
        if self.seconds:
            each = self._each()  # again, since the first call loads and compiles
            self.count = max(1, min(1000, round(self.seconds / each)))
            self.seconds = 0
        return Timed(self.amount, each)

    def _each(self) -> float:
        wait(self.device)
        start = time.perf_counter()
        for _ in range(self.count):
            self.run()
        wait(self.device)
        return (time.perf_counter() - start) / self.count


def wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_mib(work: Work) -> float:
    """Peak memory of a fresh process that does the work once.

    The kernel reports only the largest child; it is counted `threads` times.
    """
    own, child = in_a_process(_peak, work.run)
    return (own + child * work.threads) / 1024


def _peak(run) -> tuple[int, int]:
    run()
    # A process of its own would be reported with its parent's ru_maxrss, which survives exec.
    return status_kib("VmHWM"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def status_kib(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def in_a_process(function: Callable, *arguments):
    """What the function returns in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures memory died: {arguments}") from None
    finally:
        process.join()


def _send(pipe, function, arguments) -> None:
    pipe.send(function(*arguments))


def _digits(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str:
    """The checkout's commit, followed by + if files differ from it."""
    git = shutil.which("git")

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = ask("rev-parse", "--short=12", "HEAD") if git else ""
    return head + ("+" if head and ask("status", "--porcelain") else "") if head else "unknown"


@functools.cache
def device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(0)
    models = Path("/proc/cpuinfo")
    lines = models.read_text().splitlines() if models.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "cpu")


# ---------------------------------------------------------------- inputs and floors


def write_clip(path: Path, codec: str, num_frames: int, height: int, width: int, seed: int) -> None:
    """A clip of speckle that drifts and slowly changes, 25 frames per second."""
    import av

    rng = np.random.default_rng(seed)
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    field = rng.standard_normal((2, height, width), np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if codec == "libx264":
            stream.options = {"preset": "veryfast"}
        elif codec == "libvpx-vp9":
            stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}
        for t in range(num_frames):
            field = np.float32(0.97) * np.roll(field, 1 + t % 2, axis=1)
            # 0.243 = sqrt(1 - 0.97^2), so that the variance stays 1
            field += np.float32(0.243) * rng.standard_normal(field.shape, np.float32)
            smooth = (field + np.roll(field, 1, 1) + np.roll(field, 1, 2)) / 3**0.5
            grey = 110 + 28 * np.log10(smooth[0] ** 2 + smooth[1] ** 2 + np.float32(1e-6))
            frame = av.VideoFrame.from_ndarray(np.clip(grey, 0, 255).astype(np.uint8), "gray")
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode(None))


def copy_bytes(num_bytes: int, amount: float) -> float:
    """Copy `num_bytes` from memory to memory, the minimum cost of a result in an array.

    In blocks of 64 MiB, which do not fit into a cache."""
    block = min(num_bytes, 64 << 20)
    a, b = _blocks(block)
    for _ in range(max(1, round(num_bytes / block))):
        np.copyto(b, a)
    return amount


@functools.lru_cache(maxsize=1)
def _blocks(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(size, np.uint8), np.zeros(size, np.uint8)


def read_files(paths: list[Path], amount: float) -> float:
    """Read the files' bytes, from the page cache if they are there."""
    buffer = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return amount
