"""Fixtures that several test files share."""

import importlib.util
import json
import os
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def load_sibling(name: str):
    """tests/NAME.py, which `import` does not find."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    load_sibling("interpreter").prepare()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real ultrasound files, which are not part of the repository."""
    folder = Path(os.environ.get("SSLUS_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real ultrasound files at {folder} (set SSLUS_REAL_DATA)")
    return folder


def moving_pattern(num: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(num, height, width) uint8 frames that all differ: smooth noise that drifts."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (height // 8 + 3, width // 8 + num // 2 + 3))
    fine = np.kron(coarse, np.ones((8, 8)))
    kernel = np.ones(9) / 9
    fine = np.apply_along_axis(np.convolve, 1, fine, kernel, mode="same")
    fine = np.apply_along_axis(np.convolve, 0, fine, kernel, mode="same")
    frames = [fine[:height, 3 * i % (width // 2 + 1) :][:, :width] for i in range(num)]
    return np.stack(frames).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def pattern():
    return moving_pattern


def write_clip(
    path: Path,
    luma: np.ndarray,
    *,
    codec: str = "mpeg4",
    pixel_format: str = "yuv420p",
    rate: int = 25,
    times: list[int] | None = None,
    options: dict | None = None,
    audio: bool = False,
    full_range: bool = False,
) -> Path:
    """Encode (T, H, W) uint8 luma planes as they are: no conversion on the way in.

    `times` are time stamps in milliseconds (variable frame rate).
    """
    from fractions import Fraction

    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = luma.shape[1:]
        stream.pix_fmt = pixel_format
        stream.options = options or {}
        if full_range:
            stream.codec_context.color_range = 2
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for i, plane in enumerate(luma):
            frame = av.VideoFrame(plane.shape[1], plane.shape[0], pixel_format)
            for component in frame.planes:
                rows = np.frombuffer(component, np.uint8).reshape(-1, component.line_size)
                rows[:] = 128
            rows = np.frombuffer(frame.planes[0], np.uint8).reshape(-1, frame.planes[0].line_size)
            rows[: plane.shape[0], : plane.shape[1]] = plane
            if full_range:
                frame.color_range = 2
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            silence.sample_rate = 16000
            for i in range(16):
                silence.pts = 1024 * i
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return path


@pytest.fixture(scope="session")
def clip():
    return write_clip


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder of six short clips with the same name twice, and labels.csv."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    rows = []
    for i, name in enumerate(["a/x", "b/x", "a/y", "b/z", "u", "v"]):
        write_clip(folder / f"{name}.mp4", moving_pattern(20 + 5 * i, 96, 128, seed=i))
        rows.append(f"{name}.mp4,{'left' if i % 2 else 'right'},p{i // 2}")
    (folder / "labels.csv").write_text("path,label,patient\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def fixed_key(tmp_path_factory) -> Path:
    """A key for shards, the same at each run of the tests: so are orders, draws and what is lost
    to rounding."""
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text("5e" * 32)
    return path


@pytest.fixture(scope="session")
def shards(clips, fixed_key, tmp_path_factory) -> Path:
    """The clips in shards of 32 x 32 with their labels, and their frame store."""
    from sslus.engine.shard import Settings, shard
    from sslus.engine.store import FrameStore

    out, settings = tmp_path_factory.mktemp("shards") / "shards", Settings(size=32, stride=2)
    shard([clips], out, settings, labels=clips / "labels.csv", device="cpu", jobs=1, key=fixed_key)
    FrameStore.open(out)
    return out


@pytest.fixture(scope="session")
def many_shards(clips, fixed_key, tmp_path_factory) -> Path:
    """Every frame of the clips at 64 x 64, in several shards, with labels. Not to be changed."""
    from sslus.engine.shard import Settings, shard

    out = tmp_path_factory.mktemp("many") / "shards"
    settings = Settings(size=64, stride=1, frames_per_shard=30)
    shard([clips], out, settings, labels=clips / "labels.csv", device="cpu", jobs=1, key=fixed_key)
    return out


@pytest.fixture(scope="session")
def by_hand():
    """by_hand(shards): image and json of each frame, in their order, read without this code."""
    import simplejpeg

    def read(shards: Path) -> list[tuple[np.ndarray, dict]]:
        found = []
        for path in sorted(shards.glob("*.tar")):
            with tarfile.open(path) as archive:
                parts = [archive.extractfile(member).read() for member in archive]
            for jpeg, facts in zip(parts[::2], parts[1::2], strict=True):
                found.append((simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0], json.loads(facts)))
        return found

    return read


def run_rank(rank: int, work, *args) -> None:
    """In the new process, where importing this file has prepared the interpreter."""
    work(rank, *args)


@pytest.fixture(scope="session")
def start_ranks():
    """start_ranks(work, args, num): work(rank, *args) in `num` processes, to their end.

    They are forked from a process that has imported once what takes seconds.
    """
    import torch.multiprocessing as mp

    mp.get_context("forkserver").set_forkserver_preload(
        ["sslus.tools.train", "sslus.tools.training"]
    )

    def start(work, args, num):
        mp.start_processes(run_rank, (work, *args), num, start_method="forkserver")

    return start


@pytest.fixture
def no_curves(monkeypatch):
    """No curves.png at the end of a run, which takes longer than a few steps."""
    monkeypatch.setattr("sslus.ssl.curves.draw", lambda metrics, path: None)


@pytest.fixture(scope="session")
def others_run():
    """others_run(work, places): whether other threads run during `work`, of 10 ms or more.

    places: a numpy view of one number in each part of what `work` writes, none of which becomes 77.
    Where it keeps the GIL, this thread sees none of the parts written or all, but never some.
    """

    def stages(work, places) -> set[int]:
        places[:] = 77
        other = threading.Thread(target=work)
        other.start()
        seen = set()
        while other.is_alive():
            seen.add(int((places != 77).sum()))
        return seen - {0, len(places)}

    # On a busy machine one of the threads may have to wait for long: another try.
    return lambda work, places: any(stages(work, places) for _ in range(100))


@pytest.fixture
def reads():
    """A mode that counts where a value is read from a tensor: on a GPU a step would wait there."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        num_calls = num_reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.num_calls += 1
            self.num_reads += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    return Reads()


@pytest.fixture
def largest():
    """A mode that notes the number of entries of the largest tensor that anything makes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return out

    return Largest()


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of 4 MB, to be filled; a test may remount it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
