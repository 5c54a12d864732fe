"""The processes of one run: one per GPU, started by torchrun, or this one alone."""

import functools
import importlib.metadata
import os
import re
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from sslus.engine.errors import InputError

# Rank 0 may decode for hours while the others wait; dead processes are noticed anyway.
WAIT = timedelta(days=1)
LEAST_FOR_BF16 = 32  # pixels, on a CPU; see pays_bf16


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    rank: 0 .. size - 1; only rank 0 prints and writes. `control` is a process group on the CPU, so
    that agreeing on something never waits for a GPU.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.control)

    def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The CPU tensors of all ranks, in rank order; all must have the same shape."""
        if self.size == 1:
            return [value]
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value, group=self.control)
        return parts

    def join(self, features: torch.Tensor) -> torch.Tensor:
        """(V, N, F) -> (V, size N, F): the features of all ranks, in rank order, on their device,
        for which no rank waits."""
        if self.size == 1:
            return features
        parts = [torch.empty_like(features) for _ in range(self.size)]
        dist.all_gather(parts, features)
        return torch.cat(parts, dim=1)


class Agreement:
    """What one rank learns, all ranks know one step later, in the same step.

    A signal reaches the ranks at different times; if each stopped at once, the others would wait
    for it forever. This does not wait, since the answer is that of the previous step.
    """

    def __init__(self, world: World):
        self.world = world
        self.asked: tuple | None = None

    def __call__(self, value: int) -> int:
        """The largest value of any rank in the previous step (with one process: `value`)."""
        if self.world.size == 1:
            return value
        answer = 0
        if self.asked is not None:
            tensor, work = self.asked
            work.wait()
            answer = int(tensor)
        tensor = torch.tensor(value)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, self.world.control, async_op=True)
        self.asked = tensor, work
        return answer

    def settle(self) -> None:
        """Wait for the last exchange before the process group is destroyed."""
        if self.asked is not None:
            self.asked[1].wait()
            self.asked = None


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> a device; raises InputError if it is not available."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {name!r}: want auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: not available here (`sslus doctor` says why); use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        _refuse_wrong_code()
    return torch.device(name)


def _refuse_wrong_code() -> None:
    """Triton 3.6 omits a product in the losses when compiling for sm_100; 3.8 does not."""
    major, minor = torch.cuda.get_device_capability()
    if major < 10:
        return
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return  # without Triton nothing is compiled
    if tuple(map(int, re.findall(r"\d+", triton)[:2])) < (3, 8):
        raise InputError(
            f"device cuda: Triton {triton} compiles wrong code for such a GPU"
            f" (sm_{major}{minor}); pip install --upgrade torch torchvision triton, or use cpu"
        )


def pays_bf16(device: torch.device, backbone: str, image_size: int) -> bool:
    """Whether mixed precision is faster: on GPUs, and for ResNets on CPUs that multiply bf16.

    Measured at 96 px: with AMX, ResNets are 1.3 to 2 times faster, ViT and ConvNeXt 1.1 times
    slower; with AVX-512 bf16 alone (Zen 4), ResNets are 1.5 to 1.7 times faster; without either, a
    ResNet-18 is 15 times slower. Not below 32 px on a CPU: there oneDNN (torch 2.14) returns
    uninitialised memory as the weight gradient of a strided convolution whose feature map is a
    single pixel.
    """
    large = image_size >= LEAST_FOR_BF16
    on_cpu = multiplies_bf16() and backbone.startswith("resnet") and large
    return device.type == "cuda" or on_cpu


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16: AMX, or those of AVX-512. Not those of
    ARM, which have not been measured. False if an older PyTorch cannot tell."""
    tells = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(tells.get("amx_bf16") or tells.get("avx512_bf16"))


@functools.cache
def enter(device: str) -> World:
    """Join the processes that torchrun started; one process alone needs none of it.

    device: auto, cpu or cuda; with cuda each process uses the GPU of its local rank. Further calls
    return the same World, until `leave`. Raises InputError if a device is not available.
    """
    where = pick_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(where)
    needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"] + ["LOCAL_RANK"] * (where.type == "cuda")
    missing = [name for name in needed if name not in os.environ]
    if missing and not dist.is_initialized():
        raise InputError(
            f"WORLD_SIZE is {size}, but without {', '.join(missing)}: start the processes by --gpus"
            " or torchrun, which set them, or unset it"
        )
    if where.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(
                f"process {local} of this machine has no GPU: there are {gpus};"
                f" start {gpus} processes per machine, or use --device cpu"
            )
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        # torchrun may give a restarted process the store of the previous attempt, with addresses
        # where nobody listens any more: so each attempt gets its own part of the store.
        store, rank, size = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=size,
            timeout=WAIT,
        )  # fmt: skip
    control = dist.new_group(backend="gloo", timeout=WAIT)
    return World(where, dist.get_rank(), size, control)


def leave() -> None:
    """Leave the process group at the end of the command."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    enter.cache_clear()
