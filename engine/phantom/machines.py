"""Scanners: the grid of beams, the echo of point scatterers in it, and scan conversion."""

import math
from dataclasses import dataclass

import numpy as np

from sslus.engine.phantom.compiled import compiled

MARGIN_MM = 2.0  # echoes just outside the visible sector still blur into it
MARGIN_ANGLE = 0.04
SOUND_MM_PER_US = 1.54


@dataclass(frozen=True)
class Machine:
    """How one manufacturer's scanner displays an echo."""

    logo: str
    width: int
    height: int
    radius_mm: float  # of the probe's curved face
    view_angle: float  # between the outer beams
    mhz: float
    dynamic_range_db: float
    curve: float  # gamma of the grey map; above 1 darker
    smooth: float  # weight of each neighbouring beam, after log compression
    persistence: float  # weight of the previous frame
    header: str  # "left" or "right": the position of the text
    bar: bool  # whether there is a grey wedge


MACHINES = (
    Machine(
        "SYNTHETIC S8", 640, 480, 50, math.radians(50), 5.0, 58, 1.05, 0.10, 0.25, "left", True
    ),
    Machine(
        "SYNTHETIC Vx", 800, 600, 60, math.radians(54), 4.5, 64, 1.25, 0.20, 0.35, "right", True
    ),
    Machine(
        "SYNTHETIC 3", 512, 512, 40, math.radians(44), 5.5, 54, 0.95, 0.05, 0.15, "left", False
    ),
    Machine(
        "SYNTHETIC e-5", 720, 540, 22, math.radians(62), 4.8, 60, 1.15, 0.15, 0.30, "right", False
    ),
)


class Sector:
    """The polar grid of one machine at one depth setting, and its conversion to an image.

    Row i of the grid is at `depth[i]` below the probe's face, column j is the beam at `angle[j]`.
    One row is as high as one pixel.
    """

    def __init__(self, machine: Machine, depth_mm: float, size: int | None = None):
        scale = 1.0 if size is None else size / max(machine.width, machine.height)
        self.width = 2 * round(machine.width * scale / 2)  # 4:2:0 needs even sides
        self.height = 2 * round(machine.height * scale / 2)
        self.radius_mm, self.depth_mm, self.machine = machine.radius_mm, depth_mm, machine
        half = machine.view_angle / 2
        drop = machine.radius_mm * (1 - math.cos(half))  # from the face's edges to its centre
        self.mm = max(  # size of one pixel
            (depth_mm + drop) / (self.height * 0.92),
            2 * (machine.radius_mm + depth_mm) * math.sin(half) / (self.width * 0.94),
        )
        self.depth = np.arange(-MARGIN_MM, depth_mm + MARGIN_MM, self.mm, dtype=np.float32)
        # So close that the beam at full depth covers 2.5 columns.
        num_beams = max(32, int(machine.view_angle / self._beam_width(depth_mm) * 2.5))
        step = machine.view_angle / num_beams
        margin = math.ceil(MARGIN_ANGLE / step)
        self.angle = (np.arange(-margin, num_beams + margin + 1) * step - half).astype(np.float32)
        self.step = step

        # A pulse shorter than the pixels would be undersampled, so small images have long pulses.
        pulse_mm = max(2.2 * SOUND_MM_PER_US / machine.mhz / 2 * 1.6, 2.6 * self.mm)
        self.pulse = _gaussian(pulse_mm / self.mm)
        beam = [_gaussian(self._beam_width(float(d)) / step) for d in self.depth]
        self.beam = np.zeros((len(beam), max(map(len, beam))), np.float32)
        for row, kernel in zip(self.beam, beam, strict=True):
            row[: len(kernel)] = kernel

        self.top = self.height * 0.03 + drop / self.mm  # pixel row of the face's centre
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        x = (x - (self.width - 1) / 2) * self.mm
        z = (y - self.top) * self.mm + machine.radius_mm
        r, a = np.hypot(x, z), np.arctan2(x, z)
        self.inside = (
            (r >= machine.radius_mm) & (r <= machine.radius_mm + depth_mm) & (np.abs(a) <= half)
        )
        self.pixels = np.flatnonzero(self.inside).astype(np.int32)
        self.row = ((r[self.inside] - machine.radius_mm - self.depth[0]) / self.mm).astype("f4")
        self.column = ((a[self.inside] - self.angle[0]) / step).astype("f4")

    def _beam_width(self, depth: float) -> float:
        """Full width at half maximum of the beam, as an angle; in mm, narrowest at the focus."""
        focus, length = 0.6 * self.depth_mm, 0.45 * self.depth_mm
        width_mm = 1.25 * 5.0 / self.machine.mhz * math.hypot(1, (depth - focus) / length)
        return max(width_mm, 3.2 * self.mm) / (self.radius_mm + max(depth, 0.0))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.depth), len(self.angle)

    def echo(self, points, weights, wavenumber: float) -> np.ndarray:
        """(2, rows, beams) float32: real and imaginary part of the echo of point scatterers.

        points (N, 2) in the probe's frame, weights (N,) complex64. With one scatterer of unit
        mean power per grid cell, the mean power of the echo is about 0.9 at every depth: the rest
        is lost by interpolation between the grid points.
        """
        reach = self.beam.shape[1]
        rows, beams = self.shape
        raw = np.zeros((2, rows + 2 * len(self.pulse), beams + 2 * reach), np.float32)
        depth0 = self.depth[0] - len(self.pulse) * self.mm
        angle0 = self.angle[0] - reach * self.step
        # float32 throughout: double precision halves the speed and changes no pixel.
        numbers = (wavenumber, self.radius_mm, depth0, self.mm, angle0, self.step)
        _splat(raw, points, weights, *map(np.float32, numbers))
        return _blur(raw, self.pulse, self.beam, rows, beams)

    def at(self, depth: np.ndarray, angle: np.ndarray) -> np.ndarray:
        """(N, 2) points in the probe's frame."""
        r = depth + self.radius_mm
        return np.stack([r * np.sin(angle), r * np.cos(angle) - self.radius_mm], 1)

    def show(self, grey: np.ndarray, canvas: np.ndarray) -> None:
        """Draw (rows, beams) float32 grey levels 0..255 into the sector of `canvas` (H, W)."""
        _scan_convert(grey, self.row, self.column, self.pixels, canvas.reshape(-1))


def _gaussian(width: float) -> np.ndarray:
    """Right half of a Gaussian of unit energy, `width` samples wide at half maximum."""
    sigma = max(width, 1.0) / 2.355
    half = np.exp(-0.5 * (np.arange(math.ceil(3 * sigma) + 1) / sigma) ** 2)
    energy = half[0] ** 2 + 2 * np.sum(half[1:] ** 2)
    return (half / math.sqrt(energy)).astype(np.float32)


@compiled
def _splat(raw, points, weights, wavenumber, radius, depth0, depth_step, angle0, angle_step):
    rows, columns = raw.shape[1], raw.shape[2]
    for s in range(len(points)):
        x, z = points[s, 0], points[s, 1] + radius
        depth = math.sqrt(x * x + z * z) - radius
        u = (depth - depth0) / depth_step
        v = (math.atan2(x, z) - angle0) / angle_step
        if not (0 <= u < rows - 1 and 0 <= v < columns - 1):
            continue
        i, j = int(u), int(v)
        fu, fv = u - np.float32(i), v - np.float32(j)
        gu, gv = np.float32(1) - fu, np.float32(1) - fv
        phase = np.float32(-2) * wavenumber * depth
        c, d = math.cos(phase), math.sin(phase)
        re = weights[s].real * c - weights[s].imag * d
        im = weights[s].real * d + weights[s].imag * c
        for part, value in ((0, re), (1, im)):
            raw[part, i, j] += value * gu * gv
            raw[part, i, j + 1] += value * gu * fv
            raw[part, i + 1, j] += value * fu * gv
            raw[part, i + 1, j + 1] += value * fu * fv


@compiled
def _blur(raw, pulse, beam, rows, beams):
    pad, reach = len(pulse), beam.shape[1]
    out = np.empty((2, rows, beams), np.float32)
    line = np.empty(raw.shape[2], np.float32)
    for part in range(2):
        for i in range(rows):
            line[:] = pulse[0] * raw[part, i + pad]
            for k in range(1, pad):
                line += pulse[k] * (raw[part, i + pad - k] + raw[part, i + pad + k])
            row = out[part, i]
            row[:] = beam[i, 0] * line[reach : reach + beams]
            for k in range(1, reach):
                if beam[i, k] == 0:
                    break
                for j in range(beams):
                    row[j] += beam[i, k] * (line[reach + j - k] + line[reach + j + k])
    return out


@compiled
def _scan_convert(grey, row, column, pixels, canvas):
    for n in range(len(pixels)):
        # At the edge of a small sector, the last row and column have no next neighbour.
        i = min(int(row[n]), grey.shape[0] - 2)
        j = min(int(column[n]), grey.shape[1] - 2)
        fi, fj = min(row[n] - i, np.float32(1)), min(column[n] - j, np.float32(1))
        upper = grey[i, j] * (1 - fj) + grey[i, j + 1] * fj
        lower = grey[i + 1, j] * (1 - fj) + grey[i + 1, j + 1] * fj
        canvas[pixels[n]] = np.uint8(upper * (1 - fi) + lower * fi + np.float32(0.5))
