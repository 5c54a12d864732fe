"""InfoNCE with a queue (MoCo): tell a sample's key from the keys of earlier batches.

    L = mean_i  log( exp(q_i . k_i / T) + sum_m exp(q_i . queue_m / T) ) - q_i . k_i / T

q, k: (N, D) float, scaled to unit length by the op; queue: (M, D) float, used as given: unit keys
of earlier batches, without those of this batch, the same on every rank. k and queue are constants
(stop-gradient); only q gets a gradient. T: temperature, greater than 0.

He, Fan, Wu, Xie, Girshick 2020, arXiv:1911.05722, equation 1.
"""

from sslus.kernels.infonce_queue import cpu, reference
from sslus.kernels.op import Op


def _gpu(*tensors, **scalars):  # imports triton only when needed; it may be missing
    from sslus.kernels.infonce_queue import gpu

    return gpu.infonce_queue(*tensors, **scalars)


infonce_queue_loss = Op(
    "infonce_queue",
    reference=reference.infonce_queue,
    cpu=cpu.infonce_queue,
    gpu=_gpu,
    wide=True,
    num_gradients=1,
    num_batched=2,
    cases=tuple(
        {"tensors": [(n, d), (n, d), (m, d)], "scalars": {"temperature": t}}
        for n, d, m, t in [
            (1, 1, 1, 0.2), (7, 5, 3, 0.07), (5, 300, 9, 0.2), (33, 64, 257, 0.01), (16, 31, 130, 1)
        ]
    ),
)  # fmt: skip
