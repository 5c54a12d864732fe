"""Random numbers of views and masks: a function of counter and key, the same on every machine."""

import torch
from torch import Tensor


def philox(c0: Tensor, c1: Tensor, k0: Tensor) -> list[Tensor]:
    """Philox4x32-10 with counter (c0, c1, 0, 0) and key (k0, 0): four words in int64.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; `tl.philox` of Triton.
    """
    mask = 0xFFFFFFFF
    a, b, c, d = *torch.broadcast_tensors(c0, c1, torch.zeros_like(k0)), torch.zeros_like(k0)
    k1 = torch.zeros_like(k0)
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # int64 wraps around, with the right 64 bits
        a, b, c, d = (q >> 32) & mask ^ b ^ k0, q & mask, (p >> 32) & mask ^ d ^ k1, p & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [a, b, c, d]
