"""256^2 grey frames -> two normalised 224^2 float views per sample, on one thread

Crop .2-1, flip, brightness and contrast .6-1.4 with p .8, Gaussian blur sigma .1-2 with p .5,
from decoded frames and from JPEG. Against torchvision v2, DALI on the CPU and AlbumentationsX, each
with the fastest settings found that do the same; a library that is not installed is left out.
Floors: writing as many bytes; decoding alone; for the gain from two threads, arithmetic alone. With
--device cuda the same for a batch that is already on the GPU, against kornia and torchvision there;
floor: a copy that reads and writes as many bytes.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from harness import QUALITY, SIZE, Bench, Often, Work

VIEW = 224
MEAN, STD = 0.2, 0.2
AREA, ASPECT = (0.2, 1.0), (3 / 4, 4 / 3)
FACTOR, JITTER = (0.6, 1.4), 0.8
SIGMA, BLUR = (0.1, 2.0), 0.5


def measure(bench: Bench) -> None:
    folder = bench.scratch / "augment"
    folder.mkdir(exist_ok=True)
    num = 4 if bench.quick else 256
    save(bench, num, folder)
    if bench.device == "cuda":
        for times in (1, 4):
            on_gpu(bench, np.tile(frames_of(folder), (times, 1, 1)))
    else:
        on_cpu(bench, folder, num)


def on_cpu(bench: Bench, folder: Path, num: int) -> None:
    for source in ("frames", "JPEG"):
        case = f"{num} samples from {source}, {bench.kind} videos"
        jpeg = source == "JPEG"
        works = {
            "sslus": Work(often(ours, num, folder, jpeg, 1), fresh=False),
            "sslus|two": Work(often(ours, num, folder, jpeg, 2), threads=2, fresh=False),
            "floor: write the views": Work(often(write, num, num), fresh=False),
            "floor: arithmetic": Work(often(hashes, num, num, 1), fresh=False),
            "floor: arithmetic|two": Work(often(hashes, num, num, 2), threads=2, fresh=False),
        }
        if jpeg:
            works["floor: decode alone"] = Work(partial(decode_all, folder), fresh=False)
        for taps in (13, 23):
            key = f"torchvision v2, {taps} taps"
            works[key] = Work(partial(by_torchvision, folder, jpeg, taps), fresh=False)
        if importlib.util.find_spec("nvidia.dali"):
            works["DALI CPU, automatic window"] = Work(partial(by_dali, folder, jpeg), fresh=False)
        if importlib.util.find_spec("albumentations"):
            for taps, name in ((0, "automatic window"), (13, "13 taps"), (23, "23 taps")):
                key = f"AlbumentationsX, {name}"
                works[key] = Work(partial(by_albumentations, folder, jpeg, taps), fresh=False)
        else:
            print("left out, not installed: pip install albumentationsx[headless]")
        rows = bench.compare("two views", case, "samples/s", works)
        judge(bench, rows, source)
    extras(bench, folder, num)


def often(run, num: int, *args, **options) -> Often:
    """Turns as long as those of slower works, so that noise of the machine affects all alike."""
    return Often(partial(run, *args, **options), amount=num, seconds=0.3)


def judge(bench: Bench, rows: dict, source: str) -> None:
    wide, mine = vbmi(), rows["sslus"]
    want = {"torchvision v2, 13 taps": (80, 13), "DALI CPU, automatic window": (25, 6)}
    for key, row in rows.items():
        if key in want:
            bench.ratio(f"from {source}: sslus / {key}", mine, row,
                        at_least=want[key][source == "JPEG"])  # fmt: skip
        elif key.startswith("AlbumentationsX"):
            # The wanted ratios were set with 23 taps, a tenth of the view as in SimCLR's paper;
            # 13 taps are the fewest that do the same.
            least = (18 if wide else 13) if source == "frames" else (4.5 if wide else 4)
            bench.ratio(f"from {source}: sslus / {key}", mine, row, at_least=least)
    bench.ratio(f"from {source}: two threads / one", rows["sslus|two"], mine, at_least=1.9)
    # What the machine's two cores can give at that time.
    bench.ratio(f"from {source}: two threads / one, arithmetic alone",
                rows["floor: arithmetic|two"], rows["floor: arithmetic"])  # fmt: skip


def vbmi() -> bool:
    """Whether the processor has AVX-512 VBMI, without which the views are made with AVX2."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512vbmi" in flags.read_text().split()


def extras(bench: Bench, folder: Path, num: int) -> None:
    """The cost of single steps and of another size; sslus only."""
    kinds = {
        "sslus, bfloat16": {"half": True}, "sslus, no blur": {"blur": 0.0},
        "sslus, with gamma": {"gamma": True}, "sslus, speckle": {"speckle": 0.2},
        "sslus, all 96^2": {"view": 96},
    }  # fmt: skip
    works = {
        key: Work(often(ours, num, folder, False, 1, **options), fresh=False)
        for key, options in kinds.items()
    }
    bench.compare(
        "two views", f"{num} samples from frames, {bench.kind} videos", "samples/s", works
    )


def on_gpu(bench: Bench, frames: np.ndarray, device: str = "cuda") -> None:
    """Two views of every frame of a batch; sslus draws their parameters beforehand."""
    import torch

    num = len(frames)
    frames = torch.from_numpy(frames).to(device)
    works, copies = {}, {}
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        out_bytes = 2 * num * VIEW**2 * dtype.itemsize
        half = torch.zeros((frames.numel() + out_bytes) // 2, dtype=torch.uint8, device=device)
        copies[name] = f"floor: a copy|{name}"
        works[f"sslus, {name}"] = resident(frames, dtype)
        works[copies[name]] = partial(torch.empty_like(half).copy_, half)
    if num <= 256:  # it goes frame by frame: more would take seconds
        works["torchvision v2, 13 taps"] = partial(torchvision_resident, frames)
    if importlib.util.find_spec("kornia"):
        works["kornia, 13 taps"] = partial(kornia_resident, frames)
    else:
        print("left out, not installed: pip install kornia")
    rows = bench.compare(
        "two views, resident", f"{num} samples, {bench.kind} videos", "samples/s",
        {
            key: Work(Often(run, device, num, seconds=0.1), device=device, fresh=False)
            for key, run in works.items()
        },
    )  # fmt: skip
    for name, copy in copies.items():
        mine = rows[f"sslus, {name}"]
        bench.ratio(f"{num} samples, {name}: bytes/s, sslus / a copy", mine, rows[copy],
                    at_least=0.6)  # fmt: skip
    # In float32, as kornia works in it.
    for key, least in (("kornia, 13 taps", 20), ("torchvision v2, 13 taps", None)):
        if key in rows:
            bench.ratio(f"{num} samples: sslus / {key}", rows["sslus, float32"], rows[key],
                        at_least=least)  # fmt: skip


# ---------------------------------------------------------------- inputs


def save(bench: Bench, num: int, folder: Path) -> None:
    """`num` frames of the shards, raw and as JPEG."""
    import simplejpeg

    from sslus.engine.store import FrameStore

    store = FrameStore.open(bench.shards)
    frames = np.asarray(store.frames[np.arange(num) * len(store) // num])
    np.save(folder / "frames.npy", frames)
    jpegs = [simplejpeg.encode_jpeg(f[..., None], QUALITY, "GRAY") for f in frames]
    np.save(folder / "jpegs.npy", np.array(jpegs, dtype=object), allow_pickle=True)


@functools.cache
def frames_of(folder: Path) -> np.ndarray:
    return np.load(folder / "frames.npy")


@functools.cache
def jpegs_of(folder: Path) -> list[bytes]:
    return list(np.load(folder / "jpegs.npy", allow_pickle=True))


def decode(jpeg: bytes) -> np.ndarray:
    import simplejpeg

    return simplejpeg.decode_jpeg(jpeg, "GRAY")


def decode_into(frames: np.ndarray, jpegs: list[bytes], share: slice) -> None:
    from sslus.engine.jpeg import decode

    decode(jpegs[share], frames[share])


def samples(folder: Path, jpeg: bool):
    """(256, 256, 1) uint8 frames, one by one, as from a data set."""
    if jpeg:
        yield from map(decode, jpegs_of(folder))
    else:
        yield from frames_of(folder)[..., None]


@functools.cache
def views_of(num: int, view: int = VIEW, half: bool = False):
    """Output memory like the loader's. It is reused, so that no work pays for page faults."""
    import torch

    from sslus.ssl.memory import large_pages

    out = torch.from_numpy(large_pages(2 * num * view * view))
    if half:
        out = out.view(torch.bfloat16)[: len(out)]
    return out.view(2 * num, 1, view, view)


@functools.cache
def decoded(num: int) -> np.ndarray:
    """Memory for decoded JPEGs; reused, as the loader's and DALI's memory is."""
    return np.zeros((num, SIZE, SIZE), np.uint8)


# ---------------------------------------------------------------- works


def table(rng: np.random.Generator, num_views: int, blur: float, gamma: bool, speckle: float):
    import torch

    from sslus.kernels.augment import COLUMNS, identity

    params = identity(num_views, SIZE).numpy()
    column = {name: params[:, i] for i, name in enumerate(COLUMNS)}
    area = rng.uniform(*AREA, num_views) * SIZE**2
    aspect = np.exp(rng.uniform(*map(math.log, ASPECT), num_views))
    height = np.minimum(np.rint(np.sqrt(area / aspect)), SIZE)
    width = np.minimum(np.rint(np.sqrt(area * aspect)), SIZE)
    column["height"][:], column["width"][:] = height, width
    column["top"][:] = np.floor(rng.random(num_views) * (SIZE - height + 1))
    column["left"][:] = np.floor(rng.random(num_views) * (SIZE - width + 1))
    column["flip"][:] = rng.random(num_views) < 0.5
    jitter = rng.random(num_views) < JITTER
    for name in ("brightness", "contrast"):
        column[name][jitter] = rng.uniform(*FACTOR, num_views)[jitter]
    if gamma:
        column["gamma"][jitter] = np.exp(rng.uniform(-0.3, 0.3, num_views))[jitter]
    blurred = rng.random(num_views) < blur
    column["sigma"][blurred] = rng.uniform(*SIGMA, num_views)[blurred]
    column["speckle"][:] = speckle
    return torch.from_numpy(params)


def ours(
    folder: Path, jpeg: bool, threads: int, *, blur=BLUR, gamma=False, speckle=0.0, half=False,
    view=VIEW,
) -> int:  # fmt: skip
    import torch

    from sslus.kernels.augment import views

    frames = frames_of(folder)
    if jpeg:
        frames = decoded(len(frames))
        with ThreadPoolExecutor(threads) as pool:  # small shares, so that threads end together
            shares = [slice(i, i + 8) for i in range(0, len(frames), 8)]
            list(pool.map(partial(decode_into, frames, jpegs_of(folder)), shares))
    num = len(frames)
    views(
        torch.from_numpy(frames), torch.arange(num).repeat(2),
        table(np.random.default_rng(0), 2 * num, blur, gamma, speckle), size=view,
        mean=MEAN, std=STD, dtype=torch.bfloat16 if half else torch.float32,
        out=views_of(num, view, half), threads=threads,
    )  # fmt: skip
    return num


def by_torchvision(folder: Path, jpeg: bool, taps: int) -> int:
    import torch

    torch.set_num_threads(1)
    pipe, num = torchvision_pipe(taps), len(jpegs_of(folder))
    out = views_of(num)
    for i, frame in enumerate(samples(folder, jpeg)):
        x = torch.from_numpy(frame[..., 0])[None]
        out[i], out[num + i] = pipe(x), pipe(x)
    return num


@functools.cache
def torchvision_pipe(taps: int):
    import torch
    from torchvision.transforms import v2

    return v2.Compose([  # uint8 until the end: its fastest way
        v2.RandomResizedCrop(VIEW, scale=AREA, ratio=ASPECT, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(brightness=FACTOR, contrast=FACTOR)], JITTER),
        v2.RandomApply([v2.GaussianBlur(taps, SIGMA)], BLUR),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([MEAN], [STD]),
    ])  # fmt: skip


def by_albumentations(folder: Path, jpeg: bool, taps: int) -> int:
    pipe, num = albumentations_pipe(taps), len(jpegs_of(folder))
    out = views_of(num).numpy()
    for i, frame in enumerate(samples(folder, jpeg)):
        for v in (i, num + i):
            out[v, 0] = pipe(image=frame)["image"][..., 0]
    return num


@functools.cache
def albumentations_pipe(taps: int):
    import os

    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no search for updates on the network
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    # Its sum of bytes (NumKong 7.8) crashes with an illegal instruction or hangs for flipped
    # images, whose strides are negative; OpenCV's mean is as fast.
    stats = importlib.import_module("albucore.stats")
    stats._global_mean_uint8_only = lambda x: cv2.mean(np.ascontiguousarray(x))[0]
    change = (FACTOR[0] - 1, FACTOR[1] - 1)
    return A.Compose([
        A.RandomResizedCrop((VIEW, VIEW), scale=AREA, ratio=ASPECT),
        A.HorizontalFlip(p=0.5),
        A.RandomBrightnessContrast(brightness_range=change, contrast_range=change, p=JITTER),
        A.GaussianBlur(blur_range=(taps, taps), sigma_range=SIGMA, p=BLUR),
        A.Normalize(mean=(MEAN,), std=(STD,)),
    ])  # fmt: skip


def by_dali(folder: Path, jpeg: bool) -> int:
    va, _ = dali_pipe(folder, jpeg).run()
    return len(va)


@functools.cache
def dali_pipe(folder: Path, jpeg: bool):
    from nvidia.dali import fn, pipeline_def, types

    data = (
        [np.frombuffer(x, np.uint8) for x in jpegs_of(folder)]
        if jpeg
        else list(samples(folder, False))
    )

    @pipeline_def(
        batch_size=len(data), num_threads=1, device_id=None, enable_conditionals=True,
        prefetch_queue_depth=1, exec_async=False, exec_pipelined=False,
    )  # fmt: skip
    def pipe():
        frames = fn.external_source(lambda: data, layout=None if jpeg else "HWC")
        if jpeg:
            frames = fn.decoders.image(frames, output_type=types.GRAY)
        out = []
        for _ in range(2):
            x = fn.random_resized_crop(
                frames, size=(VIEW, VIEW), random_area=AREA, random_aspect_ratio=ASPECT
            )
            if fn.random.coin_flip(probability=JITTER, dtype=types.BOOL):
                x = fn.brightness_contrast(
                    x, brightness=fn.random.uniform(range=FACTOR),
                    contrast=fn.random.uniform(range=FACTOR),
                )  # fmt: skip
            if fn.random.coin_flip(probability=BLUR, dtype=types.BOOL):
                x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=SIGMA))
            out.append(fn.crop_mirror_normalize(
                x, mirror=fn.random.coin_flip(), mean=255 * MEAN, std=255 * STD,
                dtype=types.FLOAT, output_layout="CHW",
            ))  # fmt: skip
        return tuple(out)

    built = pipe()
    built.build()
    return built


def resident(frames, dtype):
    import torch

    from sslus.kernels.augment import views

    num, device = len(frames), frames.device
    return partial(
        views, frames, torch.arange(num, device=device).repeat(2),
        table(np.random.default_rng(0), 2 * num, BLUR, False, 0.0).to(device), size=VIEW,
        mean=MEAN, std=STD, dtype=dtype,
    )  # fmt: skip


def torchvision_resident(frames) -> None:
    """Frame by frame, because for a batch it draws only once."""
    pipe = torchvision_pipe(13)
    for frame in frames:
        pipe(frame[None]), pipe(frame[None])


def kornia_resident(frames) -> None:
    pipe, x = kornia_pipe(), frames[:, None].float() / 255
    pipe(x), pipe(x)


@functools.cache
def kornia_pipe():
    import kornia.augmentation as K
    import torch
    from torch import nn

    return nn.Sequential(
        K.RandomResizedCrop((VIEW, VIEW), scale=AREA, ratio=ASPECT),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomBrightness(FACTOR, p=JITTER),
        K.RandomContrast(FACTOR, p=JITTER),
        K.RandomGaussianBlur((13, 13), SIGMA, p=BLUR),
        K.Normalize(torch.tensor([MEAN]), torch.tensor([STD])),
    )  # fmt: skip


def decode_all(folder: Path) -> int:
    jpegs = jpegs_of(folder)
    decode_into(decoded(len(jpegs)), jpegs, slice(None))
    return len(jpegs)


def write(num: int) -> int:
    """By the C library, whose stores of large blocks do not read the memory first."""
    out = views_of(num)
    ctypes.memset(out.data_ptr(), 0, out.nbytes)
    return num


def hashes(num: int, threads: int) -> int:
    """Pure computation, shared among threads in the same way as JPEGs."""
    block = bytes(1 << 19)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: hashlib.sha256(block).digest(), range(num // 8)))
    return num
