"""Weighted k nearest neighbours: what features are worth without training on them."""

import numpy as np

NEIGHBOURS = 20
TEMPERATURE = 0.07
BLOCK = 1 << 22  # cosines at a time; a block takes some 130 MB


def knn(x: np.ndarray, y: np.ndarray, query: np.ndarray, num_classes: int) -> np.ndarray:
    """The class with most `votes`: (Q,) int64; of equal ones, the first."""
    return votes(x, y, query, num_classes).argmax(1)


def votes(x: np.ndarray, y: np.ndarray, query: np.ndarray, num_classes: int) -> np.ndarray:
    """The votes of the most similar training frames: (Q, num_classes) float64.

        votes_c = sum of exp(cosine(query, x_i) / 0.07) over the 20 nearest i with y_i = c

    x: (N, F) features with labels y, (N,) int64; query: (Q, F). If N < 20, all frames vote. Of
    equally near frames, the first ones vote. Needs memory for x and query in float64. Wu et al.
    2018, arXiv:1805.01978, section 3.4.
    """
    x, query = _unit(x), _unit(query)
    k, rows = min(NEIGHBOURS, len(x)), max(1, BLOCK // len(x))
    total = np.zeros((len(query), num_classes))
    for start in range(0, len(query), rows):
        cosine = query[start : start + rows] @ x.T
        # Rounding distances to multiples of 2^-29 gives equal frames equal distances, whatever the
        # order of summation in float64. The frame's number in the low bits makes all keys
        # different, so that a partial sort has only one result.
        key = np.rint((1 - cosine) * 2**29).astype(np.int64) << 32 | np.arange(len(x))
        near = np.sort(np.partition(key, k - 1, axis=1)[:, :k], axis=1) & 0xFFFFFFFF
        weight = np.exp(np.take_along_axis(cosine, near, 1) / TEMPERATURE)
        np.add.at(total, (start + np.arange(len(cosine))[:, None], y[near]), weight)
    return total


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x
