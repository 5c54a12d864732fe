"""video file -> luma of every frame

Against a bare PyAV loop that decodes and drops the frames, and PyAV's own conversion to grey.
Floors: reading the files' bytes, copying the frames' bytes. For information also against DALI on
the CPU and, with --device cuda, on the GPU; and DICOM files against pydicom and Pillow.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from harness import QUALITY, SIZE, Bench, Work, copy_bytes, read_files


def sslus_decode(paths: list[Path]) -> int:
    from sslus.engine.video import decode

    return sum(1 for path in paths for _ in decode(path))


def bare_pyav(path: Path):
    """The frames of a file as FFmpeg decodes them, on one thread."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)


def pyav_decode(paths: list[Path]) -> int:
    return sum(1 for path in paths for _ in bare_pyav(path))


def pyav_grey(paths: list[Path]) -> int:
    return sum(
        frame.to_ndarray(format="gray").ndim > 0 for path in paths for frame in bare_pyav(path)
    )


def dali_decode(paths: list[Path], device: str) -> int:
    """DALI's reader alone. At the end of a file a chunk is padded; padding is not counted."""
    from nvidia import dali

    count = 0
    for path in paths:
        pipe = dali.Pipeline(
            batch_size=1, num_threads=1, device_id=0 if device == "cuda" else None,
            prefetch_queue_depth=1,
        )  # fmt: skip
        with pipe:
            frames, times = dali.fn.experimental.readers.video(
                name="video", device="gpu" if device == "cuda" else "cpu", filenames=[str(path)],
                sequence_length=16, pad_mode="constant", enable_timestamps=True,
                image_type=dali.types.YCbCr if device == "cuda" else dali.types.RGB,
            )  # fmt: skip
            pipe.set_outputs(frames, times)
        pipe.build()
        for _ in range(pipe.reader_meta("video")["epoch_size"]):
            _, times = pipe.run()
            count += int((times.as_cpu().as_array() >= 0).sum())
    return count


def measure(bench: Bench) -> None:
    if bench.device == "cuda":  # first, in case the time runs out
        on_gpu(bench)
    videos = bench.videos[:: 4 if len(bench.videos) > 16 else 1]  # short turns, with equal noise
    frames, pixels = 0, 0
    for path in videos:
        for frame in bare_pyav(path):
            frames += 1
            pixels += frame.height * frame.width
    case = f"{len(videos)} {bench.kind} videos, {frames:,} frames"
    rows = bench.compare(
        "file to luma", case, "frames/s",
        {
            "sslus": Work(partial(sslus_decode, videos)),
            "PyAV, no conversion": Work(partial(pyav_decode, videos)),
            "PyAV, to grey array": Work(partial(pyav_grey, videos)),
            "floor: read the files": Work(partial(read_files, videos, frames)),
            "floor: copy the luma": Work(partial(copy_bytes, pixels, frames)),
        },
    )  # fmt: skip
    bench.ratio(
        "sslus / PyAV, no conversion", rows["sslus"], rows["PyAV, no conversion"], at_least=0.8
    )
    bench.ratio("sslus / PyAV, to grey array", rows["sslus"], rows["PyAV, to grey array"])
    bench.ratio("sslus / floor: copy the luma", rows["sslus"], rows["floor: copy the luma"])
    against_dali(bench)
    against_pydicom(bench)


def against_dali(bench: Bench) -> None:
    """For information: DALI without a GPU, with codecs that it can read there."""
    for codec, encoder, extension in (("VP9", "libvpx-vp9", "webm"), ("MJPEG", "mjpeg", "avi")):
        clips = bench.clips(encoder, extension, 2)
        rows = bench.compare(
            "file to luma", f"{len(clips)} generated {codec} clips", "frames/s",
            {
                "sslus": Work(partial(sslus_decode, clips)),
                "DALI on the CPU, RGB": Work(partial(dali_decode, clips, "cpu")),
            },
            repeats=3,
        )  # fmt: skip
        bench.ratio(f"{codec}: sslus / DALI on the CPU", *rows.values())


# ---------------------------------------------------------------- DICOM


def dicom_clip(path: Path, frames: list, syntax: str) -> Path:
    """A colour clip, as ultrasound machines write it; frames: (H, W, 3) uint8 each."""
    import simplejpeg
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import (
        ExplicitVRLittleEndian,
        JPEGBaseline8Bit,
        RLELossless,
        UltrasoundMultiFrameImageStorage,
        generate_uid,
    )

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = UltrasoundMultiFrameImageStorage, generate_uid()
    ds.Modality, ds.FrameTime, ds.NumberOfFrames = "US", "40", len(frames)
    ds.Rows, ds.Columns, ds.SamplesPerPixel = frames[0].shape
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation, ds.PlanarConfiguration = 7, 0, 0
    ds.PhotometricInterpretation = "RGB"
    ds.PixelData = np.stack(frames).tobytes()
    ds["PixelData"].VR = "OB"
    if syntax == "RLE":
        ds.compress(RLELossless)
    elif syntax == "JPEG":
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        ds.PhotometricInterpretation = "YBR_FULL_422"
        jpegs = [simplejpeg.encode_jpeg(frame, 90, "RGB", "422") for frame in frames]
        ds.PixelData = encapsulate(jpegs)
        ds["PixelData"].is_undefined_length = True
    ds.save_as(path, enforce_file_format=True)
    return path


def sslus_dicom(path: Path) -> int:
    from sslus.engine.dicom import DicomBackend, probe

    return sum(1 for _ in DicomBackend().prepared(path, probe(path), keep_all, SIZE, QUALITY))


def pydicom_pillow(path: Path, height: int, width: int) -> int:
    from PIL import Image
    from pydicom.pixels import iter_pixels

    size = (SIZE, round(SIZE * height / width))
    count = 0
    for pixels in iter_pixels(path):
        Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.BILINEAR)
        count += 1
    return count


def against_pydicom(bench: Bench) -> None:
    """For information: every frame, scaled to the size of the shards."""
    from sslus.engine.video import decode

    clip = bench.clips("libx264", "mp4", 1)[0]
    frames = [np.repeat(frame.luma[..., None], 3, -1) for frame in decode(clip)]
    height, width, _ = frames[0].shape
    for syntax in ("JPEG", "RLE", "uncompressed"):
        path = dicom_clip(bench.scratch / f"{syntax}.dcm", frames, syntax)
        case = f"DICOM, {syntax}, {len(frames)} frames of {width} x {height}"
        rows = bench.compare(
            "file to prepared frame", case, "frames/s",
            {
                "sslus": Work(partial(sslus_dicom, path)),
                "pydicom and Pillow": Work(partial(pydicom_pillow, path, height, width)),
                "floor: read the file": Work(partial(read_files, [path], len(frames))),
            },
            repeats=3,
        )  # fmt: skip
        bench.ratio(f"{syntax}: sslus / pydicom and Pillow", *list(rows.values())[:2])


# ---------------------------------------------------------------- NVDEC

_backend = None  # of a worker process


def _start_backend() -> None:
    global _backend
    from sslus.engine.dali import DaliBackend

    _backend = DaliBackend("cuda")


def _prepared(path: Path) -> int:
    """As `sslus shard --device cuda --all`: decode, resize and encode JPEG, all on the GPU."""
    from sslus.engine.video import probe

    return sum(1 for _ in _backend.prepared(path, probe(path), keep_all, SIZE, QUALITY))


def keep_all(index: int, time_seconds: float) -> bool:
    return True


def _bare_nvdec(path: Path) -> int:
    return dali_decode([path], "cuda")


def _each(pool: ProcessPoolExecutor, function, paths: list[Path]) -> int:
    return sum(pool.map(function, paths))


def nvdec_videos(bench: Bench) -> list[Path]:
    """Up to 14 of the videos that this GPU can decode."""
    from sslus.engine.dali import DaliBackend
    from sslus.engine.video import probe

    backend = DaliBackend("cuda")
    able = [path for path in bench.videos if backend.refuses(probe(path)) is None]
    return able[:14]  # two for each of 7 pipelines


def on_gpu(bench: Bench) -> None:
    """One NVDEC session uses one engine, so several pipelines are run, each in its own process."""
    clips = nvdec_videos(bench)
    works = {}
    pools = []
    for pipelines in (1, 2) if bench.quick else (1, 2, 4, 7):
        pool = ProcessPoolExecutor(pipelines, get_context("spawn"), _start_backend)
        pools.append(pool)
        # The first call of each worker initialises CUDA; this happens in the warm-up run.
        for name, function in (
            ("sslus: NVDEC, resize, nvJPEG", _prepared),
            ("DALI on the GPU, decode only", _bare_nvdec),
        ):
            works[f"{name}|{pipelines}"] = Work(
                partial(_each, pool, function, clips),
                threads=pipelines, device="cuda", fresh=False,
            )  # fmt: skip
    try:
        rows = bench.compare(
            "file to prepared frame", f"{len(clips)} {bench.kind} videos", "frames/s", works,
            repeats=3,
        )  # fmt: skip
    finally:
        for pool in pools:
            pool.shutdown()
    for key, row in rows.items():
        name, _, pipelines = key.partition("|")
        if name.startswith("sslus"):
            bare = rows[f"DALI on the GPU, decode only|{pipelines}"]
            bench.ratio(f"pipelines {pipelines}: sslus / DALI, decode only", row, bare)
