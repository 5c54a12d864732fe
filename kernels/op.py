"""One dispatcher for every op: reference, compiled CPU or Triton GPU.

An op is a scalar loss of float tensors. Its implementations share one signature,
`(*tensors, **scalars) -> (loss, *gradients)`, except the reference, which returns only the loss and
gets its gradient from autograd, so that no hand-written gradient is ever checked against itself.
Each of the others is registered as `torch.ops.sslus.<op>_<implementation>`, so that
torch.compile treats it as opaque.

If torch.distributed is initialised, a loss is that of the batch joined over all ranks (or those of
`group`), equal on every rank, and each rank gets the gradient of the joint loss with respect to its
own rows. All ranks must hold the same number of rows. On a GPU this number is fixed by the op's
first call, since comparing it again would wait for the GPU. DistributedDataParallel divides
gradients by the number of ranks: multiply the loss by it.

`SSLUS_KERNELS` picks the implementation: `auto` (the default), `reference`, `cpu` or `gpu`.
A named implementation that cannot run raises ValueError; there is no fallback.
"""

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from sslus.kernels.ranks import Ranks, group_name

CHOICES = ("auto", "reference", "cpu", "gpu")
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "gpu": (torch.float32, torch.bfloat16, torch.float16),
}

# On a GPU, the second axis of a grid has at most 65535 programs, each of at least 64 rows or
# columns. Kernels index rows, columns and small multiples of them in 32 bits, elements in 64.
LONGEST = 65535 * 64

OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Op:
    """A named loss with up to three implementations; call it like a function.

    >>> loss = vicreg_loss(za, zb, invariance=25.0, variance=25.0, covariance=1.0)
    >>> loss.backward()
    """

    name: str
    reference: Callable[..., Tensor]
    cpu: Callable[..., tuple[Tensor, ...]] | None = None
    gpu: Callable[..., tuple[Tensor, ...]] | None = None
    cases: tuple[dict, ...] = ()  # {"tensors": shapes, "scalars": ...}: parity test, benchmark
    defaults: dict[str, float] = field(default_factory=dict)  # of scalars that may be left out
    num_gradients: int = 2  # the first num_gradients tensors get a gradient; others are constants
    num_batched: int | None = None  # the first num_batched tensors hold rows of the batch; or all
    wide: bool = False  # kernels return gradients in float32, whatever the dtype of the inputs
    fused: dict[str, Callable] = field(default_factory=dict, init=False, repr=False)
    inputs: dict[str, object] = field(default_factory=dict, init=False, repr=False)  # and defaults
    numbers: dict[str, type] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.name in OPS:
            raise ValueError(f"op {self.name!r} is already registered")
        for name, parameter in inspect.signature(self.reference).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                self.numbers[name] = parameter.annotation
            else:
                self.inputs[name] = parameter.default
        for which in ("cpu", "gpu"):
            if implementation := getattr(self, which):
                self.fused[which] = _register(self, which, implementation)
        OPS[self.name] = self

    def __reduce__(self):
        """Copied and pickled by its name, like a function: a module may hold an op."""
        return _named, (self.name,)

    def __call__(
        self, *tensors: Tensor | None, group: dist.ProcessGroup | None = None, **scalars: float
    ) -> Tensor:
        which = os.environ.get("SSLUS_KERNELS", "auto")
        return self.run(which, *tensors, group=group, **scalars)

    def why_not(self, which: str, *tensors: Tensor | None) -> str | None:
        """Why the implementation `which` cannot run on the tensors; None if it can."""
        if which == "reference":
            return None
        if getattr(self, which) is None:
            return "it is not written"
        x, *others = (t for t in tensors if t is not None)
        if any(t.device != x.device for t in others):
            return f"the tensors are on {', '.join(sorted({str(t.device) for t in (x, *others)}))}"
        if elsewhere := _elsewhere(which, x):
            return elsewhere
        for t in (x, *others):
            if t.ndim > 1 and t.dtype not in DTYPES[which]:  # not ids or weights
                types = ", ".join(str(d) for d in DTYPES[which])
                return f"it takes {types}, not {t.dtype}: convert the tensors to one of them"
        if which == "gpu" and any(n > LONGEST for n in x.shape):
            return f"it takes at most {LONGEST} rows and columns, not {tuple(x.shape)}"
        return None

    def choose(self, *tensors: Tensor | None) -> str:
        """The implementation that `auto` chooses: the one compiled for the device, or the reference
        if it is not written, and for float64."""
        native = "gpu" if tensors[0].is_cuda else "cpu"
        wide = any(t is not None and t.ndim > 1 and t.dtype == torch.float64 for t in tensors)
        return "reference" if wide or getattr(self, native) is None else native

    def run(
        self,
        which: str,
        *tensors: Tensor | None,
        group: dist.ProcessGroup | None = None,
        **scalars: float,
    ) -> Tensor:
        """The loss, shape (), float32 unless the tensors are float64, by the implementation
        `which` (one of CHOICES). group: the ranks that share the batch; None means all ranks.
        Raises TypeError for what is no tensor or number, and ValueError if it cannot run."""
        tensors, scalars = self._arguments(tensors, self.defaults | scalars)
        n = self.num_gradients
        for name, t in zip(list(self.inputs)[n:], tensors[n:], strict=True):
            # Weights; a teacher's rows or a queue are constants by the loss's definition.
            if t is not None and t.ndim == 1 and t.requires_grad:
                raise ValueError(f"{self.name}: {name} get no gradient; detach() them")
        x = tensors[0]
        _check_choice(which)
        if which == "auto":
            which = self.choose(*tensors)
        if why := self.why_not(which, *tensors):
            raise ValueError(f"op {self.name!r}: implementation {which!r} cannot run: {why}")
        name = group_name(group)
        # Ops choose their precision themselves; autocast would round their products.
        with torch.autocast(x.device.type, enabled=False):
            if which != "reference":
                if learned := _learned(scalars):  # a temperature, say, which would stay
                    raise RuntimeError(
                        f"op {self.name!r} has no derivative by {', '.join(learned)};"
                        " SSLUS_KERNELS=reference has, or detach() it"
                    )
                if not torch.compiler.is_compiling() and any(map(_has_tangent, tensors)):
                    raise RuntimeError(
                        f"op {self.name!r} has no forward-mode derivative; SSLUS_KERNELS=reference"
                        " has"
                    )
                return self.fused[which](*tensors, group=name, **scalars)[0]
            ranks = Ranks.named(name)
            ranks.same_rows(self.name, x)  # before others could wait for one that is refused
            _refuse_empty(self, x)
            if name:
                batched = tensors[: self.num_batched]
                joined = (t if t is None else ranks.join_with_gradient(t) for t in batched)
                tensors = *joined, *tensors[len(batched) :]
            return self.reference(*tensors, **scalars)

    def _arguments(self, tensors: tuple, scalars: dict) -> tuple[tuple[Tensor | None, ...], dict]:
        """The tensors, None where one is left out, and the scalars. Tensors may be among these."""
        given = dict(zip(self.inputs, tensors, strict=False)) | scalars
        found = tuple(given.get(name) for name in self.inputs)
        rest = {name: x for name, x in given.items() if name not in self.inputs}
        if torch.compiler.is_compiling():
            return found, rest
        pairs = zip(found, self.inputs.values(), strict=True)
        if (
            len(tensors) > len(self.inputs)
            or rest.keys() != self.numbers.keys()
            or not all(isinstance(x, Tensor) or x is default for x, default in pairs)
        ):
            optional = (f"{x}=None" if default is None else x for x, default in self.inputs.items())
            by_name = f", and by name {', '.join(self.numbers)}" if self.numbers else ""
            kinds = [type(x).__name__ for x in tensors]
            others = {name: x for name, x in scalars.items() if name not in self.defaults}
            kinds += [f"{name}={type(x).__name__}" for name, x in others.items()]
            raise TypeError(
                f"{self.name}: want the tensors {', '.join(optional)}{by_name};"
                f" got {', '.join(kinds) or 'nothing'}"
            )
        for name, x in rest.items():
            if self.numbers[name] is float:
                check_number(self.name, name, x)
        return found, rest


def _named(name: str) -> Op:
    return load_all()[name]


def check_number(who: str, name: str, x: object) -> None:
    if not isinstance(x, Real | Tensor):
        raise TypeError(f"{who}: want a number as {name}, got {x!r}")


def _check_choice(which: str) -> None:
    if which not in CHOICES:
        raise ValueError(f"SSLUS_KERNELS: want one of {', '.join(CHOICES)}, got {which!r}")


def _elsewhere(which: str, x: Tensor) -> str | None:
    """Why the implementation `which` cannot run where x is; None if it can."""
    # Triton's interpreter runs GPU kernels on CPU tensors, for tests without a GPU.
    here = (
        which == "reference"
        or (which == "cpu" and x.is_cpu)
        or (which == "gpu" and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"))
    )
    return None if here else f"the tensors are on {x.device}"


def _learned(scalars: dict[str, object]) -> list[str]:
    """The scalars that want a gradient."""
    if not torch.is_grad_enabled():
        return []
    return [name for name, x in scalars.items() if isinstance(x, Tensor) and x.requires_grad]


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def _refuse_empty(op: Op, x: Tensor) -> None:
    if 0 in x.shape:
        raise ValueError(f"op {op.name!r}: the batch is empty: {tuple(x.shape)}")


def _register(op: Op, which: str, implementation: Callable) -> Callable:
    """The implementation as a torch custom op: torch.compile calls it without looking inside.

    Its schema is that of the reference. Forward computes loss and gradient; backward scales it.
    """
    inputs = torch.library.infer_schema(op.reference, mutates_args=()).rpartition(" -> ")[0]
    separator = "" if ", *, " in inputs else ", *"
    schema = (
        f'{inputs[:-1]}{separator}, str group="") ->'
        f" ({', '.join(['Tensor'] * (1 + op.num_gradients))})"
    )

    def run(*tensors, group="", **scalars):
        ranks = Ranks.named(group)
        ranks.same_rows(op.name, tensors[0])
        _refuse_empty(op, tensors[0])
        # Compiled kernels refuse strided input, so it is copied explicitly, here.
        dense = (t if t is None else t.contiguous() for t in tensors)
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            return implementation(*dense, ranks=ranks, **scalars)

    def fake(*tensors, **_):
        loss = tensors[0].new_empty((), dtype=torch.float32)
        leaves = tensors[: op.num_gradients]
        return loss, *(
            t.new_empty(t.shape, dtype=torch.float32 if op.wide else t.dtype) for t in leaves
        )

    def save(ctx, inputs, keyword_only_inputs, output):
        ctx.num_constants = len(inputs) - op.num_gradients
        ctx.dtypes = [t.dtype for t in inputs[: op.num_gradients]]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros are allocated for gradients of gradients
        ctx.save_for_backward(*output[1:])

    def scale(ctx, grad_loss, *_):
        if (
            torch.is_grad_enabled()
        ):  # create_graph=True: the saved gradients would count as constant
            raise RuntimeError(
                f"op {op.name!r} has no second derivative; SSLUS_KERNELS=reference has"
            )
        grads = ctx.saved_tensors
        if which == "gpu":
            # A custom op takes 20 us by itself, and only what traces the backward needs one.
            scaled = _scaled_on_gpu if _is_real(grad_loss) else _scaled_when_traced
            grads = scaled(list(grads), grad_loss, ctx.dtypes[0], ctx.dtypes[-1])
        else:
            # The factor is 1 unless the loss is scaled. On a GPU, reading it would wait.
            one = _is_real(grad_loss) and grad_loss.item() == 1
            pairs = zip(grads, ctx.dtypes, strict=True)
            # Rounded to the dtype of the input only once, after the product.
            grads = [(g if one else g * grad_loss).to(dtype) for g, dtype in pairs]
        return *grads, *(None,) * ctx.num_constants

    registered = torch.library.custom_op(
        f"sslus::{op.name}_{which}", run, mutates_args=(), schema=schema
    )
    registered.register_fake(fake)
    registered.register_autograd(scale, setup_context=save)
    return registered


def _is_real(x: Tensor) -> bool:
    """Whether it has values: it has none while a backward is being compiled."""
    # In torch 2.11 is_compiling() is False while a backward is traced, where tensors are fake.
    return type(x) is Tensor and not torch.compiler.is_compiling()


def _scaled_on_gpu(grads, factor, first, last):
    from sslus.kernels import scale_gpu  # imports triton only when needed; it may be missing

    with torch.cuda.device_of(factor):
        return scale_gpu.scaled(grads, factor, (first, last))


# Two dtypes rather than a list of them, which torch 2.11 would pass as ints.
_scaled_when_traced = torch.library.custom_op(
    "sslus::scaled_gpu",
    _scaled_on_gpu,
    mutates_args=(),
    schema="(Tensor[] grads, Tensor factor, ScalarType first, ScalarType last) -> Tensor[]",
)


@_scaled_when_traced.register_fake
def _(grads, factor, first, last):
    return [torch.empty_like(g, dtype=d) for g, d in zip(grads, (first, last), strict=False)]


MAPS: dict[str, "Map"] = {}


@dataclass(frozen=True)
class Map:
    """A named function of tensors without a gradient, which writes to the last tensor.

    Random numbers are passed as tensors, so that implementations can be compared. Implementations
    share the signature `(*tensors, **scalars) -> None`; the device of the tensors or SSLUS_KERNELS
    selects one, as for an `Op`.
    """

    name: str
    reference: Callable[..., None]
    cpu: Callable[..., None]
    gpu: Callable[..., None]

    def __post_init__(self):
        if self.name in MAPS:
            raise ValueError(f"op {self.name!r} is already registered")
        MAPS[self.name] = self

    def __call__(self, *tensors: Tensor, **scalars: float) -> None:
        self.run(os.environ.get("SSLUS_KERNELS", "auto"), *tensors, **scalars)

    @torch.no_grad()
    def run(self, which: str, *tensors: Tensor, **scalars: float) -> None:
        """Run the implementation `which`, one of CHOICES. Raises ValueError if it cannot run."""
        _check_choice(which)
        x = tensors[0]
        if which == "auto":
            which = "gpu" if x.is_cuda else "cpu"
        if why := _elsewhere(which, x):
            raise ValueError(f"op {self.name!r}: implementation {which!r} cannot run: {why}")
        getattr(self, which)(*tensors, **scalars)


def load_all() -> dict[str, Op]:
    """Import every op folder and return the registry, for tests and benchmarks."""
    import sslus.kernels

    for info in pkgutil.iter_modules(sslus.kernels.__path__):
        if info.ispkg:
            importlib.import_module(f"sslus.kernels.{info.name}")
    return OPS
