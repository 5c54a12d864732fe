"""`sslus doctor`: what this machine has, how each stage will use it, and what is missing."""

import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from sslus.engine.system import usable_cores

# Import name -> name in the package registry. All are needed, except those below. Not click, since
# without it this would not run.
PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "triton": "triton",
    "nvidia.dali": "nvidia-dali-cuda130", "av": "av", "simplejpeg": "simplejpeg",
    "webdataset": "webdataset", "timm": "timm", "numpy": "numpy", "numba": "numba",
    "sklearn": "scikit-learn", "matplotlib": "matplotlib", "pydicom": "pydicom",
    "safetensors": "safetensors", "rich": "rich", "threadpoolctl": "threadpoolctl",
    "fsspec": "fsspec", "PIL": "pillow", "scipy": "scipy",
}  # fmt: skip
OPTIONAL = ("triton", "nvidia.dali")  # Linux only; without them the CPU does the work
SHOWN = ("torch", "torchvision", "triton", "nvidia.dali", "av", "simplejpeg", "webdataset", "timm")
# What the sources of ultrasound video use, by FFmpeg's names.
DECODERS = ("h264", "hevc", "mpeg2video", "mpeg4", "vp8", "vp9", "av1", "mjpeg",
            "jpeg2000", "jpegls", "gif")  # fmt: skip
ENCODER = "libx264"  # of `sslus synth`
VECTORS = {  # flag in /proc/cpuinfo -> its name
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX",
    "asimd": "NEON", "sve": "SVE", "sve2": "SVE2", "bf16": "bf16",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of the screen."""

    name: str
    says: str
    ok: bool = True  # False: something that sslus needs is missing
    data: dict | None = None  # more, for --json


@click.command("doctor", short_help="Show what this machine has and how sslus will use it.")
@click.option(
    "--json", "as_json", is_flag=True,
    help="Print JSON for a bug report, without names or paths.",
)  # fmt: skip
def command(as_json):
    """Show versions, CPU, GPU and codecs, and what each stage will run on, and why.

    The exit code is 1 if something that sslus needs is missing, else 0.

    \b
    sslus doctor
    sslus doctor --json > doctor.json
    """
    from sslus.tools.screen import summary, tell

    machine = [
        checked(name, check)
        for name, check in {
            "sslus": package, "packages": packages, "cpu": cpu, "memory": memory, "disk": disk,
            "gpu": gpu, "nvdec": nvdec, "decoders": decoders, "encoder": encoder,
        }.items()
    ]  # fmt: skip
    paths = [
        checked(name, check)
        for name, check in {
            "synth": synth, "shard": shard, "store": store, "views": views, "train": train,
            "evaluate": evaluate,
        }.items()
    ]  # fmt: skip
    missing = [c for c in machine + paths if not c.ok]
    if as_json:
        import json

        content = {"machine": machine, "stages": paths}
        text = json.dumps({k: [asdict(c) for c in v] for k, v in content.items()}, indent=1)
        tell(text, sys.stdout)
    else:
        summary({c.name: c.says for c in machine})
        tell("\nWhat each stage does on this machine", sys.stdout)
        warnings = [f"{c.name}: {c.says}" for c in missing]
        rows = {c.name: c.says for c in paths}
        if missing:
            summary(rows, warnings=warnings, next_command="sslus doctor   (once this is fixed)")
        else:
            summary(rows | {"missing": "nothing"}, next_command="sslus shard videos/")
    return 1 if missing else 0


def checked(name: str, check: Callable[[], Check | str]) -> Check:
    """A check that fails becomes a line that says so; the others still run."""
    try:
        with heeding_ctrl_c():
            found = check()
    except Exception as e:  # whatever a broken installation throws
        first = str(e).strip().splitlines()[0] if str(e).strip() else ""
        found = Check(name, f"failed: {type(e).__name__}: {private(first)[:160]}", ok=False)
    return found if isinstance(found, Check) else Check(name, found)


@contextlib.contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the block as ever, also where it hits an import that makes an error of it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def stop(signum, frame):
        nonlocal came
        came = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt


def private(text: str) -> str:
    """The text without folders: a report must not reveal the names of users or hospitals."""
    return re.sub(r"(?:[A-Za-z]:)?(?:[/\\][^/\\\s'\":;,()]+)+[/\\]", ".../", text)


def reason(error: Exception) -> str:
    return private(str(error).partition("\n")[0])


def because(why: str) -> str:
    """The cause alone: the remedy after it is for a command that was refused."""
    return private(why.removeprefix("dali: ").partition(";")[0])


def version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- the machine


def package() -> Check:
    import sslus

    says = f"{sslus.__version__}, Python {platform.python_version()}"
    says += f", {platform.system()} {platform.machine()}"
    try:
        from sslus.engine import _luma  # noqa: F401
    except ImportError as e:
        return Check(
            "sslus", f"{says}; missing: its compiled module ({reason(e)}): pip install .", False
        )
    return Check("sslus", says)


def packages() -> Check:
    found = {name: version(distribution) for name, distribution in PACKAGES.items()}
    needed = [PACKAGES[n] for n, v in found.items() if v is None and n not in OPTIONAL]
    without = [f"no {n}" for n in OPTIONAL if found[n] is None]
    says = ", ".join([f"{n} {found[n]}" for n in SHOWN if found[n]] + without)
    if needed:
        says = f"missing: pip install {' '.join(needed)}; {says}"
    return Check("packages", says, not needed, found)


def cpu() -> str:
    model, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            model = found[1]
        if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE):
            flags = set(found[1].split())
    vectors = [name for flag, name in VECTORS.items() if flag in flags]
    return f"{model}, {usable_cores()} cores usable, {', '.join(vectors) or 'no known vector unit'}"


def memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where none is set
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return f"{total / 2**30:.0f} GiB"


def disk() -> str:
    return f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free in this folder"


def gpu() -> str:
    import torch

    why = why_no_cuda()
    if why:
        return f"none: {why}"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    return f"{'; '.join(found)}; driver {driver()}, CUDA {torch.version.cuda}"


def why_no_cuda() -> str | None:
    """Why PyTorch has no GPU here; None if it has one."""
    import ctypes

    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        return reason(e)
    return "the driver finds no GPU"


def driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=2, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "of unknown version"
    return done.stdout.split()[0] if done.stdout.split() else "of unknown version"


def nvdec() -> str:
    """What this GPU decodes: asks its driver about the usual kind of video."""
    from sslus.engine import dali
    from sslus.engine.video import VideoInfo

    why = dali.why_not("cuda")
    if why:
        return f"not used: {because(why)}"
    backend = dali.DaliBackend("cuda")
    usual = {"pixel_format": "yuv420p", "height": 1080, "width": 1920}
    able = [
        codec
        for codec in dali.NVDEC_CODECS
        if backend.refuses(VideoInfo(codec=codec, rate_hz=25.0, num_frames=1, **usual)) is None
    ]
    jpeg = version("nvidia-nvimgcodec-cu13") or "of unknown version"
    return f"{' '.join(able) or 'nothing'} (8-bit 4:2:0); JPEG by nvImageCodec {jpeg}"


def _codecs(names: tuple[str, ...], mode: str) -> tuple[list[str], list[str]]:
    """Which of the names FFmpeg has, and which it lacks."""
    from av.codec import Codec

    have, lack = [], []
    for name in names:
        try:
            Codec(name, mode)
            have.append(name)
        except ValueError:
            lack.append(name)
    return have, lack


def decoders() -> Check:
    import av

    have, lack = _codecs(DECODERS, "r")
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    says = f"{' '.join(have)} (PyAV {av.__version__}, libavcodec {ffmpeg})"
    if lack:
        says = f"missing: {' '.join(lack)}; pip install --force-reinstall av; {says}"
    return Check("decoders", says, not lack)


def encoder() -> Check:
    have, _ = _codecs((ENCODER,), "w")
    if have:
        return Check("encoder", ENCODER)
    return Check("encoder", f"missing: {ENCODER}; pip install --force-reinstall av", False)


# ---------------------------------------------------------------- the stages


def synth() -> str:
    return f"CPU, {usable_cores()} processes"


def shard() -> str:
    """The decoders that `--device auto` chooses, asked of the code that chooses them."""
    from sslus.engine.dali import why_not
    from sslus.engine.spool import choose_backends

    names = {("pyav", "cpu"): "PyAV on the CPU", ("dali", "cuda"): "NVDEC on the GPU"}
    chosen = [names[b] for b in choose_backends("auto", "auto")]
    why = "" if len(chosen) > 1 else f", because {because(why_not('cuda'))}"
    return f"{', the rest '.join(chosen)}, {usable_cores()} processes{why}"


def store() -> str:
    import simplejpeg  # noqa: F401, decodes what is unusual

    from sslus.engine.jpeg import is_fast

    how = "JPEG decoding with AVX2" if is_fast() else "libjpeg-turbo"
    return f"{how} on the CPU, {usable_cores()} threads; a memory-mapped file"


def views() -> str:
    from sslus.kernels import _cpu  # noqa: F401, fails where the wheel was built wrongly
    from sslus.kernels.augment import _views
    from sslus.ssl.world import pick_device

    if pick_device("auto").type == "cuda" and _views.gpu:
        return "Triton on the GPU where its memory holds the frames, else C++ on the CPU"
    return "C++ on the CPU, one pass per view"


def train() -> str:
    from sslus.ssl.train import Settings
    from sslus.ssl.world import multiplies_bf16, pick_device

    device = pick_device("auto")
    s = Settings().resolved(device, num_frames=1_000_000)
    where, why = "GPU", "mixed precision"
    if device.type == "cpu":
        where = f"CPU, {why_no_cuda()}"
        why = "the CPU multiplies bf16" if multiplies_bf16() else "no AMX or AVX-512 bf16"
    return (
        f"{where}; {s.precision} ({why}); by default {s.backbone}, {s.image_size} px,"
        f" batch size {s.batch_size}"
    )


def evaluate() -> str:
    import sklearn.linear_model  # noqa: F401

    from sslus.ssl.world import pick_device

    where = "GPU" if pick_device("auto").type == "cuda" else "CPU"
    return f"features on the {where}, linear probe by scikit-learn on the CPU"
