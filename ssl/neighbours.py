"""Weighted k nearest neighbours: what features are worth without training on them."""

import numpy as np

NEIGHBOURS = 20
TEMPERATURE = 0.07
BLOCK = 1 << 22  # cosines at a time; a block takes some 130 MB


def knn(x: np.ndarray, y: np.ndarray, query: np.ndarray, num_classes: int) -> np.ndarray:
    """The class with most votes among the most similar training frames: (Q,) int64.

        votes_c = sum of exp(cosine(query, x_i) / 0.07) over the 20 nearest i with y_i = c

    x: (N, F) features with labels y, (N,) int64; query: (Q, F). If N < 20, all frames vote. Ties
    between frames or classes go to the first ones. Needs memory for x and query in float64. Wu et
    al. 2018, arXiv:1805.01978, section 3.4.
    """
    x, query = _unit(x), _unit(query)
    k, rows = min(NEIGHBOURS, len(x)), max(1, BLOCK // len(x))
    guess = np.empty(len(query), np.int64)
    for start in range(0, len(query), rows):
        cosine = query[start : start + rows] @ x.T
        # Rounding distances to multiples of 2^-29 gives equal frames equal distances, whatever the
        # order of summation in float64. The frame's number in the low bits makes all keys
        # different, so that a partial sort has only one result.
        key = np.rint((1 - cosine) * 2**29).astype(np.int64) << 32 | np.arange(len(x))
        near = np.sort(np.partition(key, k - 1, axis=1)[:, :k], axis=1) & 0xFFFFFFFF
        weight = np.exp(np.take_along_axis(cosine, near, 1) / TEMPERATURE)
        votes = np.zeros((len(cosine), num_classes))
        np.add.at(votes, (np.arange(len(cosine))[:, None], y[near]), weight)
        guess[start : start + rows] = votes.argmax(1)
    return guess


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x
