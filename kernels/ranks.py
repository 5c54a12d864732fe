"""Communication between the processes that share one batch, for losses over the global batch.

Every rank holds N rows; the joint batch is their concatenation in rank order. A kernel works on its
rank's share (of the rows or columns), sums over the ranks, and returns the joint loss together with
its gradient with respect to the rank's own rows. Autograd sees none of these sums, so no gradient
may have to pass through one: it would come out too small by a factor of the number of ranks.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

# {group: {(op, D): N}}: the shapes that were compared between ranks; used on a GPU.
_CHECKED: WeakKeyDictionary[dist.ProcessGroup, dict[tuple, int]] = WeakKeyDictionary()


def group_name(group: dist.ProcessGroup | None) -> str:
    """A name to pass to custom ops: that of the group, or of all ranks; "" for one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = dist.group.WORLD if group is None else group
    return group.group_name if dist.get_world_size(group) > 1 else ""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group; by default only this process, for which every call is free."""

    group: dist.ProcessGroup | None = None

    @classmethod
    def named(cls, name: str) -> "Ranks":
        return cls(dist.distributed_c10d._resolve_process_group(name)) if name else cls()

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group) if self.group else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.group else 0

    def same_rows(self, name: str, z: Tensor) -> None:
        """Raises ValueError, on every rank, unless all ranks hold equally many rows and columns.

        Statistics of an uneven batch would be right, but its loss would be a mean of unequal
        shares. On a GPU, reading the result waits for the device, so the ranks compare their shapes
        only once per op and width. Later, a rank with another number of rows raises on its own:
        comparing again would wait, and hang if the other ranks, whose number has not changed, do
        not take part.
        """
        if not self.group:
            return
        checked, key = _CHECKED.setdefault(self.group, {}), (name, *z.shape[1:2])
        if _asks_once(z) and key in checked:
            if checked[key] != len(z):
                raise ValueError(
                    f"{name}: want {checked[key]} rows on every rank, as in the first call, got"
                    f" {len(z)}: drop the last, uneven batch (or use another group for other sizes)"
                )
            return
        shapes = self._gathered(torch.tensor(z.shape[:2], device=z.device))
        if len({tuple(s.tolist()) for s in shapes}) > 1:
            raise ValueError(
                f"{name}: want the same (N, D) on every rank, got"
                f" {', '.join(str(tuple(s.tolist())) for s in shapes)}: drop the last, uneven batch"
            )
        checked[key] = len(z)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in-place; the result has the same bits on every rank."""
        if self.group:
            dist.all_reduce(x, group=self.group)
        return x

    def join(self, x: Tensor) -> Tensor:
        """(N, ...) -> (world N, ...): the rows of all ranks, without a gradient."""
        return torch.cat(self._gathered(x.detach())) if self.group else x

    def join_with_gradient(self, x: Tensor) -> Tensor:
        """Like `join`, but with a gradient for this rank's rows; the others are constants."""
        if not self.group:
            return x
        parts = self._gathered(x.detach())
        parts[self.rank] = x
        return torch.cat(parts)

    def own(self, joined: Tensor) -> Tensor:
        """This rank's rows of a joined tensor."""
        n = len(joined) // self.world
        return joined[self.rank * n : (self.rank + 1) * n]

    def to_columns(self, x: Tensor) -> Tensor:
        """(N, D) -> (world N, D / world): all rows of this rank's share of the columns."""
        if not self.group:
            return x
        n, widths = len(x), self._widths(x.shape[1])
        out = x.new_empty(self.world * n, widths[self.rank])
        dist.all_to_all_single(
            out.view(-1),
            torch.cat([part.reshape(-1) for part in x.split(widths, 1)]),
            [n * widths[self.rank]] * self.world,
            [n * w for w in widths],
            group=self.group,
        )
        return out

    def to_rows(self, x: Tensor, d: int) -> Tensor:
        """The inverse of `to_columns`: (world N, D / world) -> (N, D)."""
        if not self.group:
            return x
        n, widths = len(x) // self.world, self._widths(d)
        out = x.new_empty(n * d)
        dist.all_to_all_single(
            out,
            x.reshape(-1),
            [n * w for w in widths],
            [n * widths[self.rank]] * self.world,
            group=self.group,
        )
        parts = out.split([n * w for w in widths])
        return torch.cat([p.view(n, w) for p, w in zip(parts, widths, strict=True)], 1)

    def _widths(self, d: int) -> list[int]:
        return [d // self.world + (r < d % self.world) for r in range(self.world)]

    def _gathered(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x, group=self.group)
        return parts


def _asks_once(z: Tensor) -> bool:
    """Whether reading a value waits for z's device, so that shapes are compared only once."""
    return z.is_cuda
