"""InfoNCE with a queue on the CPU: the queue is read in bands, and never copied as a whole.

Each band's logits s update a running maximum top and the sums of exp(s - top) and of
exp(s - top) queue, which are rescaled when top grows: one pass, two products of N M D
multiplications. With x = lse over the queue - q.k / T, the loss is softplus(x), accurate where it
is small too, and dL/dq_i = sigmoid(x) (sum_m P_im queue_m - k_i) / (N T), with P the softmax over
the queue alone. Across ranks, each keeps its own rows. Extra floats: two bands of logits, two of a
queue in half precision, 4 N D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslus.kernels.infonce_queue.reference import check
from sslus.kernels.products import unit, unit_gradient, work
from sslus.kernels.ranks import Ranks

# Logits, or elements of the queue, which may be made float32, at a time: 4 MiB, to stay in a cache.
BAND = 1 << 20


def infonce_queue(
    q: Tensor, k: Tensor, queue: Tensor, *, temperature: float, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    check(q, k, queue, temperature)
    n = len(q) * ranks.world
    u, length = unit(work(q))
    key, _ = unit(work(k))
    positives = (u * key).sum(1, keepdim=True).div_(temperature)
    top = torch.full_like(positives, float("-inf"))
    total, mixed = torch.zeros_like(positives), torch.zeros_like(key)
    for negatives in queue.split(max(64, BAND // max(q.shape))):
        negatives = work(negatives)
        s = (u @ negatives.T).div_(temperature)
        higher = torch.maximum(top, s.amax(1, keepdim=True))
        old = (top - higher).exp_()
        p = s.sub_(higher).exp_()
        total = total * old + p.sum(1, keepdim=True)
        mixed.mul_(old).addmm_(p, negatives)
        top = higher
    x = total.log() + (top - positives)
    loss = ranks.sum_(F.softplus(x).sum(dtype=torch.float64)) / n
    grad = mixed.div_(total).sub_(key).mul_(x.sigmoid_().div_(n * temperature))
    return loss.to(torch.float32), unit_gradient(grad, u, length)
