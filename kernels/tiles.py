"""Tiles of a launch, counted on the host."""

import math


def cdiv(length: int, tile: int) -> int:
    """How many tiles cover a length. triton.cdiv is made for kernels: on the host, where a loss
    asks a dozen times, it takes 3 us each time."""
    return -(-length // tile)


def power_of_2(n: float) -> int:
    """The smallest power of 2 that is not below n, 1 or more: the side of a block."""
    return 1 << (math.ceil(n) - 1).bit_length()
