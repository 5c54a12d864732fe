"""A speckle phantom of the fetal heart: synthetic ultrasound clips for trying everything out.

Point scatterers that are fixed to the tissue move with it, are summed with their carrier phase
on a polar grid, blurred by the beam, and shown as a machine would show them:

    scatterers --splat--> complex field --PSF--> echo --|.|, log--> grey --sector--> frame

    depth_s, angle_s = where scatterer s is now (beat, fetal movement, probe drift)
    field = sum_s w_s exp(-2i k depth_s) delta(depth - depth_s, angle - angle_s)
    echo  = (field * pulse(depth) * beam(angle; depth)) shadow + reverberation + noise
    grey  = clip((20 log10 |echo| + gain - black) / dynamic range)

So speckle is Rayleigh because many scatterers share a resolution cell, and it travels with the
wall it belongs to. Everything is a pure function of the settings and the clip's number.

Lengths are mm, angles radians, levels dB relative to the mean echo of myocardium. Three frames
of reference: the probe's (x to the right, z down, origin on the probe's face), the fetus' (x to
its left, y to its front, origin in the middle of the section) and the heart's (p from the crux to
the apex, q from the septum to the left ventricle, in heart lengths).
"""

import concurrent.futures
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import av
import numba
import numpy as np

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError, Interrupted

VERSION = 1  # goes up when the same settings no longer give the same clips

PLANES = ("4CH", "LVOT", "RVOT", "3VV", "non-heart")

# Echo level in dB and whether sound passes almost without loss.
TISSUES = {
    "fluid": (-42.0, True),  # amniotic fluid, stomach, liquor
    "blood": (-29.0, True),
    "myocardium": (-5.0, False),
    "septum": (0.0, False),
    "lung": (4.5, False),
    "muscle": (-5.0, False),
    "fat": (1.0, False),
    "mediastinum": (6.0, False),
    "thymus": (-4.0, False),
    "liver": (0.0, False),
    "brain": (-8.0, False),
    "plexus": (9.0, False),
    "placenta": (4.0, False),
    "uterus": (-4.0, False),
    "bone": (17.0, False),
    "airway": (10.0, False),
}
NAMES = tuple(TISSUES)
LEVEL = np.array([10 ** (TISSUES[n][0] / 20) for n in NAMES], np.float32)
CLEAR = np.array([TISSUES[n][1] for n in NAMES])
FLUID, OUTSIDE = NAMES.index("fluid"), -1

MARGIN_MM = 2.0  # echoes just outside the shown sector still blur into it
MARGIN_ANGLE = 0.04
REACH = 1.9  # a chamber's pull ends at this multiple of its semi-axes
ROUGH_MM = 0.1  # of walls: about a third of a wavelength, so that they glint but do not mirror
SOUND_MM_PER_US = 1.54


@dataclass(frozen=True)
class Settings:
    """What `sslus synth` was asked for; with a clip's number it fixes every byte of the clip."""

    videos: int = 40
    patients: int = 10
    seed: int = 0
    size: int | None = None  # pixels of the longer side; None: each machine's own
    seconds: tuple[float, float] = (2.0, 6.0)

    def __post_init__(self):
        if self.videos < 1 or self.patients < 1:
            raise InputError(
                f"synth: want at least one video and one patient, got {self.videos} and"
                f" {self.patients}"
            )
        if self.patients > self.videos:
            raise InputError(
                f"synth: {self.patients} patients need at least as many videos, got {self.videos}"
            )
        if self.seed < 0:
            raise InputError(f"synth: the seed must be 0 or larger, got {self.seed}")
        if self.size is not None and not 64 <= self.size <= 2048:
            raise InputError(f"synth: the size must be 64 to 2048 pixels, got {self.size}")
        low, high = self.seconds
        if not 0.1 <= low <= high <= 60:
            raise InputError(
                f"synth: the seconds must be 0.1 <= LOW <= HIGH <= 60, got {low:g} {high:g}"
            )


@dataclass(frozen=True)
class Clip:
    number: int
    name: str
    label: str
    patient: str


def clips(settings: Settings) -> list[Clip]:
    """What each clip shows: planes cycle through the patients, so both are balanced."""
    order = np.random.default_rng([settings.seed, 0]).permutation(len(PLANES))
    digits = max(3, len(str(settings.videos - 1)))
    patient_digits = max(2, len(str(settings.patients - 1)))
    out = []
    for i in range(settings.videos):
        patient = i * settings.patients // settings.videos
        label = PLANES[order[i % len(PLANES)]]
        out.append(Clip(i, f"clip-{i:0{digits}d}.mp4", label, f"p{patient:0{patient_digits}d}"))
    return out


# ---------------------------------------------------------------- machines


@dataclass(frozen=True)
class Machine:
    """How one maker's scanner shows an echo."""

    logo: str
    width: int
    height: int
    radius_mm: float  # of the probe's curved face
    view_angle: float  # between the outer beams
    mhz: float
    dynamic_range_db: float
    curve: float  # gamma of the grey map; above 1 darker
    smooth: float  # weight of the two neighbour beams after log compression
    persistence: float  # weight of the frame before
    header: str  # "left" or "right": where the text stands
    bar: bool  # grey wedge


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
    """The polar grid of one machine at one depth, and the way from it to the picture.

    Row i of the grid is the depth `depth[i]` below the probe's face, column j the beam at
    `angle[j]`. One row is as high as one pixel.
    """

    def __init__(self, machine: Machine, depth_mm: float, size: int | None = None):
        scale = 1.0 if size is None else size / max(machine.width, machine.height)
        self.width = 2 * round(machine.width * scale / 2)  # 4:2:0 wants even sides
        self.height = 2 * round(machine.height * scale / 2)
        self.radius_mm, self.depth_mm, self.machine = machine.radius_mm, depth_mm, machine
        half = machine.view_angle / 2
        drop = machine.radius_mm * (1 - math.cos(half))  # the face's middle hangs below its edges
        self.mm = max(  # of one pixel
            (depth_mm + drop) / (self.height * 0.92),
            2 * (machine.radius_mm + depth_mm) * math.sin(half) / (self.width * 0.94),
        )
        self.depth = np.arange(-MARGIN_MM, depth_mm + MARGIN_MM, self.mm, dtype=np.float32)
        # Close enough that the narrowest beam covers 2.5 columns.
        num_beams = max(32, int(machine.view_angle / self._beam_width(depth_mm) * 2.5))
        step = machine.view_angle / num_beams
        margin = math.ceil(MARGIN_ANGLE / step)
        self.angle = (np.arange(-margin, num_beams + margin + 1) * step - half).astype(np.float32)
        self.step = step

        # A pulse shorter than the pixels would not be sampled: a small picture is a coarse one.
        pulse_mm = max(2.2 * SOUND_MM_PER_US / machine.mhz / 2 * 1.6, 2.6 * self.mm)
        self.pulse = _gaussian(pulse_mm / self.mm)
        beam = [_gaussian(self._beam_width(float(d)) / step) for d in self.depth]
        self.beam = np.zeros((len(beam), max(map(len, beam))), np.float32)
        for row, kernel in zip(self.beam, beam, strict=True):
            row[: len(kernel)] = kernel

        self.top = self.height * 0.03 + drop / self.mm  # pixel row of the face's middle
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
        """Full width at half maximum of the beam, as an angle: narrowest at the focus."""
        focus, length = 0.6 * self.depth_mm, 0.45 * self.depth_mm
        width_mm = 1.25 * 5.0 / self.machine.mhz * math.hypot(1, (depth - focus) / length)
        return max(width_mm, 3.2 * self.mm) / (self.radius_mm + max(depth, 0.0))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.depth), len(self.angle)

    def echo(self, points, weights, wavenumber: float) -> np.ndarray:
        """(2, rows, beams) float32: real and imaginary part of the echo of point scatterers.

        points (N, 2) in the probe's frame, weights (N,) complex64. With one scatterer of unit
        mean power a grid cell, the mean power of the echo is about 0.9 at every depth: the rest is
        lost between the grid points.
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
    """Right half of a bell of unit energy, `width` samples wide at half maximum."""
    sigma = max(width, 1.0) / 2.355
    half = np.exp(-0.5 * (np.arange(math.ceil(3 * sigma) + 1) / sigma) ** 2)
    energy = half[0] ** 2 + 2 * np.sum(half[1:] ** 2)
    return (half / math.sqrt(energy)).astype(np.float32)


@numba.njit(cache=True, fastmath=True, nogil=True)
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


@numba.njit(cache=True, fastmath=True, nogil=True)
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


@numba.njit(cache=True, fastmath=True, nogil=True)
def _scan_convert(grey, row, column, pixels, canvas):
    for n in range(len(pixels)):
        i, j = int(row[n]), int(column[n])
        fi, fj = row[n] - i, column[n] - j
        upper = grey[i, j] * (1 - fj) + grey[i, j + 1] * fj
        lower = grey[i + 1, j] * (1 - fj) + grey[i + 1, j + 1] * fj
        canvas[pixels[n]] = np.uint8(upper * (1 - fi) + lower * fi + np.float32(0.5))


# ---------------------------------------------------------------- anatomy


@dataclass(frozen=True)
class Ellipse:
    centre: np.ndarray
    axis: np.ndarray  # unit vector of the first semi-axis
    semi: tuple[float, float]
    taper: float = 0.0  # narrower towards the end of the first semi-axis: an egg

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance to the contour, inside negative; exact only for circles."""
        u, v = self._local(points)
        a, b = self.semi
        bulge = b * (1 - self.taper * np.clip(u / a, -1, 1))
        return (np.sqrt((u / a) ** 2 + (v / bulge) ** 2) - 1) * min(a, b)

    def _local(self, points):
        x, y = points[:, 0] - self.centre[0], points[:, 1] - self.centre[1]
        return x * self.axis[0] + y * self.axis[1], y * self.axis[0] - x * self.axis[1]

    def contour(self, spacing: float) -> tuple[np.ndarray, np.ndarray]:
        """Points about `spacing` mm apart and the unit normals there."""
        a, b = self.semi
        n = max(8, int(math.pi * (a + b) / spacing))
        s = np.arange(n) * (2 * math.pi / n)
        u, v = a * np.cos(s), b * (1 - self.taper * np.cos(s)) * np.sin(s)
        across = np.array([-self.axis[1], self.axis[0]])
        points = self.centre + u[:, None] * self.axis + v[:, None] * across
        return points, _normals(np.roll(points, -1, 0) - np.roll(points, 1, 0))


@dataclass(frozen=True)
class Tube:
    path: np.ndarray  # (n, 2), densely sampled
    radius: float

    def distance(self, points: np.ndarray) -> np.ndarray:
        return _nearest(points, self.path) - self.radius

    def contour(self, spacing: float):
        length = np.r_[0, np.cumsum(np.linalg.norm(np.diff(self.path, axis=0), axis=1))]
        t = np.arange(0, length[-1], spacing)
        path = np.stack([np.interp(t, length, self.path[:, k]) for k in range(2)], 1)
        normals = _normals(np.gradient(path, axis=0))
        points = np.concatenate([path + side * self.radius * normals for side in (-1, 1)])
        return points, np.concatenate([-normals, normals])


@numba.njit(cache=True, fastmath=True, nogil=True)
def _nearest(points, path):
    out = np.empty(len(points))
    for s in range(len(points)):
        best = np.inf
        for k in range(len(path)):
            dx, dy = points[s, 0] - path[k, 0], points[s, 1] - path[k, 1]
            best = min(best, dx * dx + dy * dy)
        out[s] = math.sqrt(best)
    return out


def _normals(tangents):
    n = np.stack([tangents[:, 1], -tangents[:, 0]], 1)
    return n / np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-9)


@dataclass(frozen=True)
class Beat:
    """A chamber that pulls its surroundings towards its middle, as far as `wave` says."""

    shape: Ellipse
    along: float  # shortening of the first semi-axis at the wave's height 1
    across: float
    wave: str


@dataclass(frozen=True)
class Valve:
    """Two leaflets between two hinges that open towards `ahead`."""

    hinges: np.ndarray  # (2, 2)
    ahead: np.ndarray  # unit vector
    wave: str
    thickness: float


@dataclass
class Scene:
    """One section through the fetus, painted in order: later shapes cover earlier ones."""

    shapes: list = field(default_factory=list)  # (shape, tissue index, wall level in dB or None)
    beats: list[Beat] = field(default_factory=list)
    valves: list[Valve] = field(default_factory=list)
    bones: list = field(default_factory=list)  # (x, y, radius, sound amplitude let through)
    pushes: list = field(default_factory=list)  # (centre, unit vector, amount, sigma): valve plane

    def tissue(self, points: np.ndarray) -> np.ndarray:
        """(N,) tissue index at points in the fetus' frame, or OUTSIDE its skin."""
        out = np.full(len(points), OUTSIDE, np.int8)
        for shape, tissue, _ in self.shapes:
            out[shape.distance(points) < 0] = tissue
        return out


class Pen:
    """Draws into a scene in units and axes of its own: `at` + scale (p e1 + q e2)."""

    def __init__(self, scene: Scene, at, e1, e2, scale):
        self.scene, self.scale = scene, float(scale)
        self.at, self.e1, self.e2 = (np.asarray(v, float) for v in (at, e1, e2))

    def point(self, pq):
        pq = np.asarray(pq, float)
        return self.at + self.scale * (pq[..., :1] * self.e1 + pq[..., 1:] * self.e2)

    def vector(self, degrees: float):
        """Unit vector, turned from the first axis towards the second."""
        a = math.radians(degrees)
        return math.cos(a) * self.e1 + math.sin(a) * self.e2

    def ellipse(self, tissue, at, semi, degrees=0.0, taper=0.0, wall=None) -> Ellipse:
        semi = (semi[0] * self.scale, semi[1] * self.scale)
        shape = Ellipse(self.point(at), self.vector(degrees), semi, taper)
        self.scene.shapes.append((shape, NAMES.index(tissue), wall))
        return shape

    def chamber(self, at, semi, along, across, wave, degrees=0.0, taper=0.0, wall=5.0):
        shape = self.ellipse("blood", at, semi, degrees, taper, wall)
        self.scene.beats.append(Beat(shape, along, across, wave))
        return shape

    def tube(self, tissue, path, radius, wall=None) -> None:
        knots = self.point(np.asarray(path))
        t = np.linspace(0, len(knots) - 1, max(2, int(8 * len(knots) * self.scale / 10) + 40))
        curve = np.stack([_smooth_path(t, knots[:, k]) for k in range(2)], 1)
        self.scene.shapes.append((Tube(curve, radius * self.scale), NAMES.index(tissue), wall))

    def valve(self, first, second, degrees, wave, thickness=0.013) -> None:
        self.scene.valves.append(
            Valve(
                self.point(np.array([first, second])),
                self.vector(degrees),
                wave,
                thickness * self.scale,
            )
        )

    def bone(self, at, radius, through=0.15) -> None:
        """A round bone: bright in front, dark behind."""
        self.ellipse("bone", at, (radius, radius), wall=8.0)
        x, y = self.point(at)
        self.scene.bones.append((x, y, radius * self.scale, through))

    def bone_arc(self, centre, semi, start, stop, thickness, through) -> None:
        """A rib or a piece of skull: part of an ellipse, degrees from the first axis."""
        s = np.radians(np.linspace(start, stop, max(3, int(abs(stop - start) / 3))))
        path = np.stack([centre[0] + semi[0] * np.cos(s), centre[1] + semi[1] * np.sin(s)], 1)
        self.tube("bone", path, thickness, wall=8.0)
        for x, y in self.point(path):
            self.scene.bones.append((x, y, thickness * self.scale * 1.5, through))


def _smooth_path(t, knots):
    """Catmull-Rom curve through `knots`."""
    k = np.concatenate([[2 * knots[0] - knots[1]], knots, [2 * knots[-1] - knots[-2]]])
    i = np.minimum(t.astype(int), len(knots) - 2)
    f = t - i
    a, b, c, d = k[i], k[i + 1], k[i + 2], k[i + 3]
    return b + 0.5 * f * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * (b - c) + d - a)))


def _trunk(scene, rng, chest_mm, cavity) -> Pen:
    """Skin, ribs, spine and what fills the inside of a section of the trunk."""
    pen = Pen(scene, (0, 0), (1, 0), (0, 1), chest_mm)
    pen.ellipse("muscle", (0, 0), (1.0, 0.94), wall=14.0)
    pen.ellipse("fat", (0, 0), (0.97, 0.91))
    pen.ellipse("muscle", (0, 0), (0.94, 0.88))
    pen.ellipse(cavity, (0, 0.0), (0.84, 0.78), wall=5.0)
    for side in (0, 180):
        for low, high in ((-48, -18), (-2, 16), (30, 44)):
            start, stop = (
                side + (1 if side == 0 else -1) * (a + rng.uniform(-5, 5)) for a in (low, high)
            )
            pen.bone_arc((0, 0), (0.89, 0.83), start, stop, 0.022, rng.uniform(0.2, 0.4))
    pen.ellipse("muscle", (0, -0.82), (0.24, 0.20))
    pen.ellipse("fluid", (0, -0.83), (0.07, 0.055), wall=4.0)  # spinal canal
    pen.bone((0, -0.69), 0.085, 0.08)
    for side in (-1, 1):
        pen.bone((side * 0.115, -0.88), 0.045, 0.2)
    return pen


def _aorta(pen, at=(0.17, -0.52), radius=0.075):
    pen.chamber(at, (radius, radius), -0.10, -0.10, "vessel", wall=9.0)


def _heart_pen(body: Pen, rng, origin, degrees=45.0, size=1.22) -> Pen:
    a = math.radians(degrees + rng.uniform(-5, 5))
    pen = Pen(
        body.scene,
        body.point(np.asarray(origin) + rng.uniform(-0.02, 0.02, 2)),
        (math.sin(a), math.cos(a)),
        (math.cos(a), -math.sin(a)),
        body.scale * size,
    )
    # A tilted plane foreshortens one axis.
    pen.e1 = pen.e1 * rng.uniform(0.94, 1.03)
    pen.e2 = pen.e2 * rng.uniform(0.94, 1.06)
    return pen


def four_chambers(rng, chest_mm: float) -> Scene:
    """Two atria, two ventricles, the crux between them; the apex to the left and front."""
    scene = Scene()
    body = _trunk(scene, rng, chest_mm, "lung")
    heart = _heart_pen(body, rng, (0.07, 0.08))
    heart.ellipse("myocardium", (0.05, 0), (0.525, 0.375), taper=0.16, wall=17.0)
    heart.ellipse("mediastinum", (-0.43, 0.0), (0.05, 0.16))
    heart.chamber((-0.180, 0.150), (0.138, 0.124), 0.16, 0.16, "atrium")
    heart.chamber((-0.170, -0.155), (0.150, 0.132), 0.16, 0.16, "atrium")
    heart.chamber((0.225, 0.140), (0.250, 0.116), 0.16, 0.34, "ventricle", -8, 0.22)
    heart.chamber((0.195, -0.152), (0.220, 0.126), 0.14, 0.28, "ventricle", 9, 0.20)
    heart.ellipse("blood", (-0.01, 0.142), (0.10, 0.092))  # mitral and tricuspid openings
    heart.ellipse("blood", (0.02, -0.148), (0.11, 0.098))
    for path in ([(-0.30, 0.20), (-0.37, 0.26)], [(-0.31, 0.10), (-0.39, 0.07)]):  # lung veins
        heart.tube("blood", path, 0.024, wall=4.0)
    heart.tube("septum", [(-0.36, 0.0), (-0.25, 0.005)], 0.014)  # atrial septum, foramen between
    heart.tube("septum", [(-0.11, 0.0), (0.0, 0.0)], 0.016)
    heart.tube("septum", [(-0.25, 0.01), (-0.18, 0.055), (-0.11, 0.03)], 0.008)  # its flap
    heart.tube("septum", [(0.0, 0.0), (0.2, -0.006), (0.42, 0.0)], 0.020)
    heart.ellipse("mediastinum", (0.005, 0.0), (0.035, 0.032), wall=6.0)  # crux
    heart.tube("septum", [(0.24, -0.02), (0.28, -0.10), (0.27, -0.21)], 0.019)  # moderator band
    heart.valve((0.0, 0.028), (0.005, 0.236), 0, "inlet")
    heart.valve((0.035, -0.028), (0.022, -0.246), 0, "inlet")
    scene.pushes.append(
        (heart.point((0.0, 0.0)), heart.e1, 0.055 * heart.scale, 0.17 * heart.scale)
    )
    _aorta(body)
    return scene


def left_outflow(rng, chest_mm: float) -> Scene:
    """The aorta leaves the left ventricle: its front wall goes on from the septum."""
    scene = Scene()
    body = _trunk(scene, rng, chest_mm, "lung")
    heart = _heart_pen(body, rng, (0.05, 0.08), 52)
    heart.ellipse("myocardium", (0.08, 0.02), (0.50, 0.345), taper=0.20, wall=17.0)
    heart.ellipse("mediastinum", (-0.30, -0.12), (0.20, 0.20))
    heart.chamber((-0.165, 0.205), (0.135, 0.110), 0.15, 0.15, "atrium")
    heart.chamber((0.235, 0.105), (0.245, 0.108), 0.16, 0.34, "ventricle", -5, 0.20)
    heart.chamber((0.170, -0.165), (0.225, 0.090), 0.14, 0.28, "ventricle", 12, 0.15)
    heart.ellipse("blood", (-0.01, 0.185), (0.10, 0.075))
    heart.tube(
        "blood", [(0.10, 0.06), (-0.02, 0.03), (-0.18, -0.07), (-0.40, -0.20)], 0.062, wall=10.0
    )
    heart.tube("septum", [(0.03, -0.055), (0.2, -0.022), (0.44, 0.0)], 0.024)
    heart.chamber((-0.20, -0.22), (0.085, 0.085), 0.15, 0.15, "atrium")  # right atrial appendage
    heart.valve((-0.005, 0.105), (0.0, 0.268), 0, "inlet")
    heart.valve((-0.075, 0.065), (-0.025, -0.045), 215, "outlet", 0.011)
    scene.pushes.append((heart.point((0.0, 0.1)), heart.e1, 0.05 * heart.scale, 0.16 * heart.scale))
    _aorta(body)
    return scene


def right_outflow(rng, chest_mm: float) -> Scene:
    """The pulmonary artery leaves the right ventricle in front and crosses to the left back."""
    scene = Scene()
    body = _trunk(scene, rng, chest_mm, "lung")
    heart = Pen(
        scene, body.point((0.05 + rng.uniform(-0.03, 0.03), 0.08)), (1, 0), (0, 1), body.scale
    )
    heart.ellipse("mediastinum", (-0.02, 0.05), (0.42, 0.40))
    heart.ellipse("myocardium", (0.02, 0.34), (0.46, 0.27), -6, wall=17.0)
    heart.chamber((-0.06, 0.35), (0.34, 0.155), 0.20, 0.30, "ventricle", -4, -0.1)
    heart.chamber((-0.34, 0.06), (0.13, 0.16), 0.15, 0.15, "atrium")
    heart.tube("blood", [(-0.20, 0.22), (-0.30, 0.12)], 0.07)  # tricuspid opening
    heart.tube(
        "blood",
        [(0.16, 0.36), (0.27, 0.20), (0.27, 0.0), (0.22, -0.22), (0.17, -0.46)],
        0.093,
        wall=10.0,
    )
    heart.tube(
        "blood", [(0.22, -0.10), (0.05, -0.17), (-0.16, -0.15), (-0.36, -0.12)], 0.042, wall=8.0
    )
    heart.chamber((0.02, 0.04), (0.105, 0.105), -0.08, -0.08, "vessel", wall=11.0)  # aorta
    heart.chamber((-0.17, -0.03), (0.062, 0.062), -0.05, -0.05, "vessel", wall=8.0)  # SVC
    heart.valve((0.155, 0.27), (0.33, 0.30), 285, "outlet", 0.012)
    heart.valve((-0.19, 0.12), (-0.31, 0.22), 40, "inlet", 0.012)
    _aorta(body)
    return scene


def three_vessels(rng, chest_mm: float) -> Scene:
    """Pulmonary artery, aorta and superior vena cava in a row, largest to smallest."""
    scene = Scene()
    body = _trunk(scene, rng, chest_mm, "lung")
    turn = math.radians(rng.uniform(-8, 8))
    e1, e2 = (math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))
    pen = Pen(scene, body.point((0.02, 0.10)), e1, e2, 1.15 * body.scale)
    pen.ellipse("mediastinum", (0.0, -0.02), (0.40, 0.36))
    pen.ellipse("thymus", (0.0, 0.38), (0.36, 0.20), wall=6.0)
    pen.tube("blood", [(0.20, 0.22), (0.22, 0.02), (0.20, -0.18), (0.16, -0.40)], 0.085, wall=10.0)
    pen.chamber((0.215, 0.13), (0.20, 0.132), -0.08, -0.08, "vessel", 85, 0.25, wall=10.0)
    pen.chamber((-0.06, 0.10), (0.100, 0.094), -0.09, -0.09, "vessel", wall=11.0)
    pen.chamber((-0.29, 0.02), (0.066, 0.062), -0.04, -0.04, "vessel", wall=9.0)
    pen.ellipse("airway", (-0.05, -0.25), (0.06, 0.055), wall=8.0)  # trachea
    pen.ellipse("fluid", (-0.05, -0.25), (0.035, 0.030))
    _aorta(body)
    return scene


def _abdomen(rng, chest_mm: float) -> Scene:
    scene = Scene()
    body = _trunk(scene, rng, chest_mm, "liver")
    body.ellipse("fluid", (0.40, -0.10), (0.24, 0.15), rng.uniform(30, 80), wall=8.0)  # stomach
    body.tube("blood", [(0.02, 0.78), (0.0, 0.42), (-0.06, 0.20), (-0.22, 0.06)], 0.062, wall=9.0)
    body.ellipse("blood", (-0.16, -0.36), (0.062, 0.058), wall=7.0)  # inferior vena cava
    _aorta(body, (0.10, -0.48), 0.068)
    for at in ((-0.5, 0.05), (-0.35, 0.4), (-0.45, -0.3)):
        body.ellipse("blood", at, (0.03, 0.02), rng.uniform(0, 180), wall=4.0)
    return scene


def _head(rng, chest_mm: float) -> Scene:
    scene = Scene()
    pen = Pen(scene, (0, 0), (1, 0), (0, 1), chest_mm * 1.12)
    pen.ellipse("muscle", (0, 0), (1.06, 0.84), wall=8.0)
    pen.ellipse("brain", (0, 0), (0.97, 0.75))
    gaps = np.sort(rng.uniform(0, 360, 3))  # sutures
    for start, stop in zip(gaps, [gaps[1], gaps[2], gaps[0] + 360], strict=True):
        pen.bone_arc((0, 0), (0.99, 0.77), start + 3, stop - 3, 0.022, 0.72)
    for side in (-1, 1):
        pen.ellipse("fluid", (-0.42, side * 0.33), (0.30, 0.10), side * 14, wall=7.0)
        pen.ellipse("plexus", (-0.36, side * 0.33), (0.20, 0.07), side * 14)
        pen.ellipse("thymus", (0.10, side * 0.13), (0.17, 0.11), side * 12, wall=1.0)
    pen.tube("plexus", [(-0.92, 0.0), (-0.2, 0.01)], 0.011, wall=8.0)  # falx
    pen.tube("plexus", [(0.52, 0.0), (0.92, 0.0)], 0.011, wall=8.0)
    pen.ellipse("fluid", (0.40, 0.0), (0.11, 0.045), wall=8.0)  # cavum septi pellucidi
    return scene


def _limb(rng, chest_mm: float) -> Scene:
    scene = Scene()
    pen = Pen(scene, (0, 0), (1, 0), (0, 1), chest_mm)
    for at, degrees, length in (((0.0, 0.25), rng.uniform(-15, 15), 0.85), ((0.1, -0.45), 50, 0.6)):
        limb = Pen(scene, pen.point(at), pen.vector(degrees), pen.vector(degrees + 90), chest_mm)
        limb.ellipse("muscle", (0, 0), (1.0 * length, 0.27), taper=0.2, wall=10.0)
        limb.ellipse("fat", (0, 0), (0.97 * length, 0.24), taper=0.2)
        limb.ellipse("muscle", (0, 0), (0.95 * length, 0.21), taper=0.2)
        shaft = [(p * length, 0.02 * math.sin(3 * p)) for p in np.linspace(-0.65, 0.65, 30)]
        limb.tube("bone", shaft, 0.035, wall=9.0)
        for x, y in limb.point(np.array(shaft)):
            scene.bones.append((x, y, 0.05 * chest_mm, 0.12))
    return scene


def not_heart(rng, chest_mm: float) -> Scene:
    """A section that a sweep to the heart passes: mostly abdomen, else head or limb."""
    return (_abdomen, _abdomen, _head, _limb)[rng.integers(4)](rng, chest_mm)


SECTIONS = dict(
    zip(PLANES, (four_chambers, left_outflow, right_outflow, three_vessels, not_heart), strict=True)
)


# ---------------------------------------------------------------- motion


def wave(name: str, phase: float) -> float:
    """How far a movement is at this part of the heart cycle (0..1, systole first).

    ventricle, vessel, atrium: contraction. inlet, outlet: opening of the valves, 0..1.
    """

    def bump(start, peak, stop):
        x = (phase - start) % 1.0
        if x < peak - start:
            return 0.5 - 0.5 * math.cos(math.pi * x / (peak - start))
        if x < stop - start:
            return 0.5 + 0.5 * math.cos(math.pi * (x - (peak - start)) / (stop - peak))
        return 0.0

    if name == "ventricle":
        return bump(0.0, 0.36, 0.72)
    if name == "vessel":
        return bump(0.06, 0.24, 0.75)
    if name == "atrium":
        return bump(0.70, 0.93, 1.15) - 0.5 * bump(0.05, 0.42, 0.75)
    if name == "inlet":  # early filling, then the atria's kick
        return min(1.0, bump(0.44, 0.56, 0.80) + 0.8 * bump(0.66, 0.84, 1.02))
    return min(1.0, 1.6 * bump(0.04, 0.20, 0.42))


@numba.njit(cache=True, fastmath=True, nogil=True)
def _deform(rest, chambers, pushes, out):
    """Pull points towards the chambers and push them with the valve plane.

    chambers (n, 8): centre, first axis, semi-axes, shortening along and across now.
    pushes (m, 5): centre, displacement now, sigma.
    """
    for s in range(len(rest)):
        x, y = rest[s, 0], rest[s, 1]
        dx, dy = np.float32(0), np.float32(0)
        for c in range(len(chambers)):
            cx, cy, ex, ey, a, b, along, across = chambers[c]
            u = (x - cx) * ex + (y - cy) * ey
            v = (y - cy) * ex - (x - cx) * ey
            rho = math.sqrt((u / a) ** 2 + (v / b) ** 2)
            if rho >= REACH:
                continue
            pull = np.float32(1)
            if rho > 1:
                t = (rho - 1) / np.float32(REACH - 1)
                pull = 1 - t * t * (3 - 2 * t)
            u, v = -along * pull * u, -across * pull * v
            dx += u * ex - v * ey
            dy += u * ey + v * ex
        for m in range(len(pushes)):
            px, py, mx, my, sigma = pushes[m]
            pull = math.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma * sigma))
            dx += mx * pull
            dy += my * pull
        out[s, 0], out[s, 1] = x + dx, y + dy


@numba.njit(cache=True, fastmath=True, nogil=True)
def _place(points, turn, shift, out):
    for s in range(len(points)):
        x, y = points[s, 0], points[s, 1]
        out[s, 0] = turn[0, 0] * x + turn[0, 1] * y + shift[0]
        out[s, 1] = turn[1, 0] * x + turn[1, 1] * y + shift[1]


@numba.njit(cache=True, fastmath=True, nogil=True)
def _glint(points, normals, turn, radius):
    """How much of a wall's echo comes back to the probe: all of it at right angles."""
    out = np.empty(len(points), np.float32)
    for s in range(len(points)):
        x, z = points[s, 0], points[s, 1] + radius
        nx = turn[0, 0] * normals[s, 0] + turn[0, 1] * normals[s, 1]
        nz = turn[1, 0] * normals[s, 0] + turn[1, 1] * normals[s, 1]
        facing = abs(nx * x + nz * z) / math.sqrt(x * x + z * z)
        out[s] = np.float32(0.12) + np.float32(0.88) * facing**3
    return out


class Beating:
    """The scene's movement: where points of the resting fetus are at a part of the cycle."""

    def __init__(self, scene: Scene):
        self.beats, self.pushes = scene.beats, scene.pushes

    def moves(self, points: np.ndarray) -> np.ndarray:
        """(N,) whether the beat reaches a point at all."""
        near = np.zeros(len(points), bool)
        for b in self.beats:
            near |= b.shape.distance(points) < (REACH - 1) * max(b.shape.semi)
        for centre, _, _, sigma in self.pushes:
            near |= ((points - centre) ** 2).sum(1) < (3 * sigma) ** 2
        return near

    def __call__(self, rest: np.ndarray, phase: float) -> np.ndarray:
        chambers = np.zeros((len(self.beats), 8), np.float32)
        for row, b in zip(chambers, self.beats, strict=True):
            w = wave(b.wave, phase)
            row[:] = *b.shape.centre, *b.shape.axis, *b.shape.semi, b.along * w, b.across * w
        w = wave("ventricle", phase)
        pushes = np.zeros((len(self.pushes), 5), np.float32)
        for row, (centre, direction, amount, sigma) in zip(pushes, self.pushes, strict=True):
            row[:] = *centre, *(direction * amount * w), sigma
        out = np.empty_like(rest)
        _deform(rest, chambers, pushes, out)
        return out


def _leaflets(valve: Valve, hinges: np.ndarray, along: np.ndarray, off: np.ndarray, opening: float):
    """Points of both leaflets between displaced `hinges`; `along` 0..1, `off` mm across."""
    span = hinges[1] - hinges[0]
    width = np.linalg.norm(span)
    out = []
    for hinge, inward in ((hinges[0], span / width), (hinges[1], -span / width)):
        # Closed leaflets lean a little forward and meet; open ones lie along the wall.
        lean = math.radians(12 + 62 * opening)
        bend = lean + math.radians(20) * opening * (along - 0.5)
        reach = 0.54 * width * along
        path = np.cos(bend)[:, None] * inward + np.sin(bend)[:, None] * valve.ahead
        out.append(hinge + reach[:, None] * path + off[:, None] * valve.ahead)
    return np.concatenate(out)


# ---------------------------------------------------------------- patients and clips


@dataclass(frozen=True)
class Patient:
    machine: Machine
    weeks: float  # gestational age
    chest_mm: float  # half the width of the chest
    lie: float  # turn of the fetus; 0: spine away from the probe
    mirror: int
    heart_hz: float
    gain_db: float
    tgc_db: tuple[float, ...]  # what the sonographer's sliders get wrong, top to bottom
    wall_mm: float  # mother's tissue in front of the uterus
    placenta_mm: float
    gap_mm: float  # amniotic fluid in front of the fetus
    spare_mm: float  # depth shown behind the fetus
    aside_mm: float
    rate_hz: int

    @classmethod
    def draw(cls, seed: int, patient: str) -> "Patient":
        number = int(patient[1:])
        rng = np.random.default_rng([seed, 1, number])
        # Golden-ratio steps: even a few patients differ in size.
        weeks = 19 + 12 * ((number * 0.618034 + np.random.default_rng(seed).random()) % 1)
        chest_mm = (7.8 * weeks - 5) / (2 * math.pi)  # thoracic circumference by age
        machine = MACHINES[(number + seed) % len(MACHINES)]
        # The sonographer narrows the sector until the chest fills it.
        shown_mm = rng.uniform(1.25, 1.6) * chest_mm
        view = 2 * math.asin(shown_mm / (machine.radius_mm + 20 + chest_mm))
        return cls(
            machine=replace(machine, view_angle=min(machine.view_angle, view)),
            weeks=weeks,
            chest_mm=chest_mm,
            lie=math.radians(rng.uniform(-115, 115)),
            mirror=int(rng.choice((-1, 1))),
            heart_hz=rng.uniform(120, 160) / 60,
            gain_db=rng.uniform(-3, 3),
            tgc_db=tuple(rng.uniform(-2.5, 2.5, 6)),
            wall_mm=rng.uniform(8, 16),
            placenta_mm=float(rng.choice((0, 0, 1))) * rng.uniform(7, 13),
            gap_mm=rng.uniform(2, 9),
            spare_mm=rng.uniform(-3, 9),
            aside_mm=rng.uniform(-3, 3),
            rate_hz=int(rng.choice((25, 30, 36, 40, 50))),
        )


class _Drift:
    """Slow random movement, 0 at the start: a few sines of 0.1 to 0.6 Hz."""

    def __init__(self, rng, amount):
        self.hz, self.at = rng.uniform(0.1, 0.6, 3), rng.uniform(0, 2 * math.pi, 3)
        self.amount = rng.dirichlet(np.ones(3)) * amount

    def __call__(self, t: float) -> float:
        s = np.sin(2 * math.pi * self.hz * t + self.at) - np.sin(self.at)
        return float(self.amount @ s)


class Film:
    """One clip: iterate for (H, W) uint8 frames, full-range grey."""

    def __init__(self, settings: Settings, clip: Clip):
        self.patient = patient = Patient.draw(settings.seed, clip.patient)
        self.rng = rng = np.random.default_rng([settings.seed, 2, clip.number])
        machine = patient.machine
        near = patient.wall_mm + patient.placenta_mm + patient.gap_mm
        self.sector = sector = Sector(
            machine, near + 2 * patient.chest_mm + patient.spare_mm, settings.size
        )
        self.rate_hz = patient.rate_hz
        self.num_frames = max(2, round(rng.uniform(*settings.seconds) * self.rate_hz))
        self.start = rng.uniform(0, 1)
        self.scene = SECTIONS[clip.label](rng, patient.chest_mm * rng.uniform(0.97, 1.03))
        self.beating = Beating(self.scene)

        self.lie = patient.lie + math.radians(rng.uniform(-10, 10))
        self.home = np.array([patient.aside_mm + rng.uniform(-3, 3), near + patient.chest_mm])
        self.drift = [_Drift(rng, a) for a in (2.5, 1.8, math.radians(3.5), 1.2, 0.6)]
        self.wavenumber = 2 * math.pi * machine.mhz / SOUND_MM_PER_US
        self._layers(rng)
        self._scatter(rng)
        self._walls(rng)
        self._loss(rng)
        self.canvas = overlay(sector, patient)

    def pose(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and shift that take the fetus' frame to the probe's at a time in seconds."""
        a = self.lie + self.drift[2](t)
        c, s = math.cos(a), math.sin(a)
        turn = np.array([[c, -s], [s, c]]) @ np.array([[self.patient.mirror, 0], [0, -1.0]])
        return turn, self.home + np.array([self.drift[0](t), self.drift[1](t)])

    def phase(self, t: float) -> float:
        return (self.start + self.patient.heart_hz * t) % 1.0

    # The mother's tissue lies in layers along the probe's face.
    def _layers(self, rng):
        p = self.patient
        self.ripple = rng.uniform(0, 2 * math.pi, 4)
        skin, uterus = 0.45 * p.wall_mm, 0.8 * p.wall_mm
        self.layers = [(1.5, "muscle"), (skin, "fat"), (uterus, "muscle"), (p.wall_mm, "uterus")]
        if p.placenta_mm:
            self.layers.append((p.wall_mm + p.placenta_mm, "placenta"))
        self.womb = Ellipse(
            self.home + rng.uniform(-0.25, 0.25, 2) * p.chest_mm,
            np.array([1.0, 0.0]),
            tuple(p.chest_mm * rng.uniform(1.08, 1.45, 2)),
        )

    def _wavy(self, depth, angle):
        """Height of a layer that is nominally at `depth`, so that none is a perfect arc."""
        r = self.ripple
        return depth + 0.06 * depth * (
            np.sin(7 * angle + r[0] + 0.1 * depth) + 0.5 * np.sin(17 * angle + r[1])
        )

    def tissue(self, points):
        """Tissue index of points in the probe's frame, and whether they belong to the mother.

        At the clip's start, with the heart at rest.
        """
        depth = np.hypot(points[:, 0], points[:, 1] + self.sector.radius_mm) - self.sector.radius_mm
        angle = np.arctan2(points[:, 0], points[:, 1] + self.sector.radius_mm)
        tissue = self.scene.tissue(self._to_fetus(points))
        mother = depth < self._wavy(self.layers[-1][0], angle)
        swell = 0.08 * self.patient.chest_mm * np.sin(9 * angle + self.ripple[2] + 0.05 * depth)
        behind = (tissue == OUTSIDE) & (self.womb.distance(points) > swell)
        tissue[behind] = NAMES.index("uterus")
        tissue[tissue == OUTSIDE] = FLUID
        for bottom, name in reversed(self.layers):
            tissue[depth < self._wavy(bottom, angle)] = NAMES.index(name)
        return tissue, mother | behind

    def _to_fetus(self, points):
        """From the probe's frame to the fetus', at the clip's start."""
        turn, shift = self.pose(0.0)
        out = np.empty_like(points)
        _place(points - shift, np.linalg.inv(turn), np.zeros(2), out)
        return out

    def _scatter(self, rng):
        """One scatterer in every grid cell, at random inside it, fixed to what it lies in."""
        sector = self.sector
        reach = 4.0  # mm and 1/40 rad that drift may bring into view
        depth = np.arange(sector.depth[0] - reach, sector.depth[-1] + reach, sector.mm)
        angle = np.arange(sector.angle[0] - reach / 40, sector.angle[-1] + reach / 40, sector.step)
        depth, angle = np.meshgrid(depth, angle, indexing="ij")
        depth = depth.ravel() + rng.uniform(0, sector.mm, depth.size)
        angle = angle.ravel() + rng.uniform(0, sector.step, angle.size)
        points = sector.at(depth, angle)
        tissue, mother = self.tissue(points)
        body = np.where(mother[:, None], points, self._to_fetus(points))
        moves = self.beating.moves(body) & ~mother
        order = np.lexsort((moves, ~mother))  # mother | fetus out of the heart's reach | beating
        body, tissue = body[order], tissue[order]
        self.num_mother, self.num_rest = int(mother.sum()), int((~moves).sum())
        level = (LEVEL[tissue] * _texture(rng, body)).astype(np.float32)
        self.points = body.astype(np.float32)
        self.weights = [_random_complex(rng, len(body)) * level for _ in range(2)]
        self.flows = np.flatnonzero(CLEAR[tissue])
        self.flow_level = level[self.flows]
        self.flow_weights = _random_complex(rng, len(self.flows)) * self.flow_level

    def _walls(self, rng):
        """Smooth interfaces: bright where they face the beam, with the roughness of tissue."""
        sector = self.sector
        spacing = sector.mm / 2
        walls = [(s.contour(spacing), w) for s, _, w in self.scene.shapes if w is not None]
        points = np.concatenate([p for (p, _), _ in walls])
        normals = np.concatenate([n for (_, n), _ in walls])
        level = np.concatenate([np.full(len(p), 10 ** (w / 20)) for (p, _), w in walls])
        # A contour is a wall only where the tissue changes: chambers that open into each other
        # have none between them.
        outer, inner = (self.scene.tissue(points + side * normals) for side in (0.5, -0.5))
        edge = outer != inner
        points = points[edge] + rng.normal(0, ROUGH_MM, (edge.sum(), 2))
        self.wall_points = points.astype(np.float32)
        self.wall_normals = normals[edge].astype(np.float32)
        self.wall_weights = (_random_complex(rng, len(points)) * level[edge]).astype(np.complex64)

        # Fascia between the mother's layers.
        angle = np.arange(sector.angle[0], sector.angle[-1], spacing / sector.radius_mm)
        points, weights = [], []
        for bottom, _ in self.layers:
            depth = self._wavy(bottom, angle) + rng.normal(0, 1.5 * ROUGH_MM, len(angle))
            points.append(sector.at(depth, angle))
            weights.append(_random_complex(rng, len(angle)) * 10 ** (rng.uniform(4, 12) / 20))
        self.fascia = np.concatenate(points).astype(np.float32)
        self.fascia_weights = np.concatenate(weights).astype(np.complex64)

        num = int(50 / sector.mm)  # enough for speckle in a leaflet
        self.leaflets = [
            (
                valve,
                rng.uniform(0, 1, num),
                rng.normal(0, valve.thickness / 2.5, num),
                _random_complex(rng, 2 * num) * np.float32(1.9),
            )
            for valve in self.scene.valves
        ]

    def _loss(self, rng):
        """(rows, beams) amplitude: liquids take less than the TGC gives back; sliders; noise."""
        sector = self.sector
        depth, angle = sector.depth[::4], sector.angle[::3]
        d, a = np.meshgrid(depth, angle, indexing="ij")
        tissue, _ = self.tissue(sector.at(d.ravel(), a.ravel()))
        clear = CLEAR[tissue].reshape(d.shape).astype(float)
        db = np.cumsum(clear, 0) * (sector.mm * 4) * 0.16  # dB a mm of liquid
        kernel = np.hanning(9)[1:-1]
        kernel /= kernel.sum()
        pad = np.pad(db, ((0, 0), (3, 3)), "edge")
        db = sum(k * pad[:, i : i + db.shape[1]] for i, k in enumerate(kernel))
        rows = np.array([np.interp(sector.angle, angle, line) for line in db])
        db = np.array([np.interp(sector.depth, depth, line) for line in rows.T]).T
        knots = np.linspace(0, sector.depth_mm, len(self.patient.tgc_db))
        slider = np.interp(sector.depth, knots, self.patient.tgc_db)
        db = db - db.mean() + slider[:, None]
        # Poor contact at the outer beams, and less power outside the focus.
        edge = np.abs(sector.angle) / (sector.machine.view_angle / 2)
        db -= 3.0 * edge**4
        self.gain = (10 ** (db / 20)).astype(np.float32)
        # The electronics' noise is flat; TGC lifts it with depth.
        x = np.clip(sector.depth / sector.depth_mm, 0, None)
        self.noise = (10 ** ((-50 + 17 * x**1.5 + slider) / 20)).astype(np.float32)

    def echo(self, n: int) -> np.ndarray:
        """(2, rows, beams) float32: the complex echo of frame `n`; ask for frames in order."""
        sector, t = self.sector, n / self.rate_hz
        phase = self.phase(t)
        turn, shift = self.pose(t)
        turn, shift = turn.astype(np.float32), shift.astype(np.float32)

        mother, rest = self.num_mother, self.num_rest
        fetus = self.points[mother:]
        fetus = np.concatenate(
            [fetus[: rest - mother], self.beating(fetus[rest - mother :], phase)]
        )
        walls = self.beating(self.wall_points, phase)
        leaflets = [
            _leaflets(
                v, self.beating(v.hinges.astype(np.float32), phase), s, o, wave(v.wave, phase)
            )
            for v, s, o, _ in self.leaflets
        ]
        own = np.concatenate([fetus, walls, *leaflets]).astype(np.float32)
        placed = np.empty_like(own)
        _place(own, turn, shift, placed)
        creep = np.array([self.drift[3](t), 0.3 * self.drift[3](t)], np.float32)
        points = np.concatenate([self.points[:mother] + creep, placed, self.fascia + creep])

        # The plane drifts out of the section: scatterers fade into their neighbours.
        away = self.drift[4](t)
        bulk = self.weights[0] * np.float32(math.cos(away))
        bulk += self.weights[1] * np.float32(math.sin(away))
        # Liquids flow: half of their speckle's amplitude is new in every frame.
        fresh = _random_complex(self.rng, len(self.flows)) * self.flow_level
        self.flow_weights = np.float32(0.5) * self.flow_weights + np.float32(0.75**0.5) * fresh
        bulk[self.flows] = self.flow_weights
        glint = _glint(
            placed[len(fetus) : len(fetus) + len(walls)], self.wall_normals, turn, sector.radius_mm
        )
        weights = np.concatenate(
            [bulk, self.wall_weights * glint, *(w for *_, w in self.leaflets), self.fascia_weights]
        )

        echo = sector.echo(points, weights, self.wavenumber)
        bones = np.array(self.scene.bones, np.float32)
        centres = np.empty((len(bones), 2), np.float32)
        _place(bones[:, :2].copy(), turn, shift, centres)
        loss = _shadow(centres, bones[:, 2:], sector.depth, sector.angle, sector.radius_mm)
        echo *= loss * self.gain
        # Sound that goes twice between skin and probe shows the near tissue again, deeper.
        again = round(self.patient.wall_mm / sector.mm)
        echo[:, again : 2 * again] += 0.03 * echo[:, :again]
        noise = self.rng.standard_normal(echo.shape, dtype=np.float32)
        echo += noise * self.noise[:, None]
        return echo

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        machine, before = self.patient.machine, None
        white = 24.0 - self.patient.gain_db
        for n in range(self.num_frames):
            grey = _compress(
                self.echo(n), white, machine.dynamic_range_db, machine.curve, machine.smooth
            )
            if before is not None:
                grey += machine.persistence * (before - grey)
            before = grey
            frame = self.canvas.copy()
            self.sector.show(grey, frame)
            yield frame


def _texture(rng, points):
    """(N,) amplitude: tissue is not even, but varies slowly by about 1.5 dB."""
    db = np.zeros(len(points))
    for _ in range(7):
        kx, ky = rng.normal(0, 0.35, 2)
        db += np.sin(kx * points[:, 0] + ky * points[:, 1] + rng.uniform(0, 2 * math.pi))
    return 10 ** (0.8 * db / 20)


def _random_complex(rng, n: int) -> np.ndarray:
    """(n,) complex64 normal, mean power 1."""
    return (rng.standard_normal((n, 2), dtype=np.float32) * np.float32(0.5**0.5)).view(
        np.complex64
    )[:, 0]


@numba.njit(cache=True, fastmath=True, nogil=True)
def _shadow(centres, bones, depth, angle, radius):
    """(rows, beams) share of the amplitude that passes the bones (radius, through)."""
    out = np.ones((len(depth), len(angle)), np.float32)
    step = angle[1] - angle[0]
    mm = depth[1] - depth[0]
    for n in range(len(centres)):
        x, z = centres[n, 0], centres[n, 1] + radius
        r = math.sqrt(x * x + z * z)
        half = bones[n, 0] / r
        soft = half * 0.5 + 0.006  # penumbra
        middle = math.atan2(x, z)
        first = max(0, int((middle - half - soft - angle[0]) / step))
        last = min(len(angle), int((middle + half + soft - angle[0]) / step) + 2)
        top = max(0, int((r - radius - depth[0]) / mm))
        for j in range(first, last):
            t = (half + soft - abs(angle[j] - middle)) / (2 * soft)
            t = min(max(t, np.float32(0)), np.float32(1))
            through = 1 - (1 - bones[n, 1]) * t * t * (3 - 2 * t)
            for i in range(top, len(depth)):
                # The bone itself is seen; behind it the shadow deepens over a few mm.
                deep = min(np.float32(1), (i - top) * mm / (2 * bones[n, 0]))
                out[i, j] = min(out[i, j], 1 - (1 - through) * deep)
    return out


@numba.njit(cache=True, fastmath=True, nogil=True)
def _compress(echo, white, dynamic_range, curve, smooth):
    """Log compression: (rows, beams) float32 grey 0..255 of a (2, rows, beams) echo."""
    rows, beams = echo.shape[1], echo.shape[2]
    out = np.empty((rows, beams), np.float32)
    line = np.empty(beams, np.float32)
    for i in range(rows):
        for j in range(beams):
            power = echo[0, i, j] ** 2 + echo[1, i, j] ** 2 + np.float32(1e-12)
            g = 1 + (np.float32(10) * math.log10(power) - white) / dynamic_range
            line[j] = min(max(g, np.float32(0)), np.float32(1)) ** curve * 255
        out[i] = line
        for j in range(1, beams - 1):
            out[i, j] += smooth * (line[j - 1] + line[j + 1] - 2 * line[j])
    return out


# ---------------------------------------------------------------- overlay


def overlay(sector: Sector, patient: Patient) -> np.ndarray:
    """(H, W) uint8: what the machine writes around the sector. The sector itself is 0."""
    from PIL import Image, ImageDraw, ImageFont

    machine, h, w = sector.machine, sector.height, sector.width
    image = Image.new("L", (w, h))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(6, round(h / 42)))
    line = round(h / 34)
    pad = round(h / 60)
    weeks, days = int(patient.weeks), int(patient.weeks % 1 * 7)
    left = machine.header == "left"
    x, anchor = (pad, "la") if left else (w - pad, "ra")
    rows = [
        machine.logo,
        "OB FETAL HEART",
        f"GA {weeks}w{days}d",
        f"MI {0.6 + machine.mhz / 12:.1f}  TIs 0.3",
    ]
    for n, text in enumerate(rows):
        draw.text((x, pad + n * line), text, 235 if n == 0 else 170, font, anchor)
    x, anchor = (w - pad, "ra") if left else (pad, "la")
    rows = [f"{machine.mhz:.1f} MHz", f"{sector.depth_mm / 10:.1f} cm", f"{patient.rate_hz} Hz",
            f"DR {machine.dynamic_range_db:.0f}  P{round(10 * machine.persistence)}"]  # fmt: skip
    for n, text in enumerate(rows):
        draw.text((x, pad + n * line), text, 170, font, anchor)
    edge = w - pad if left else pad
    for cm in range(int(sector.depth_mm / 10) + 1):  # depth scale
        y = sector.top + cm * 10 / sector.mm
        long = pad * (1.2 if cm % 5 == 0 else 0.6)
        if y > pad + 4.5 * line:
            draw.line([(edge, y), (edge - long if left else edge + long, y)], 200)
    if machine.bar:
        x0 = pad if left else w - 2 * pad
        for n in range(h // 3):
            draw.line([(x0, h * 0.9 - n), (x0 + pad, h * 0.9 - n)], int(255 * n / (h // 3)))
    draw.text((w / 2, h - pad), "SYNTHETIC IMAGE", 120, font, "md")
    canvas = np.array(image)
    canvas[sector.inside] = 0
    return canvas


# ---------------------------------------------------------------- files


def write_clip(settings: Settings, clip: Clip, folder: Path) -> int:
    """Write one clip as H.264 in MP4, atomically; the number of its frames."""
    film = Film(settings, clip)
    h, w = film.canvas.shape
    # Studio range, neutral colour: what every player and every machine's export expects.
    studio = np.round(16 + np.arange(256) * (219 / 255)).astype(np.uint8)
    encoded = io.BytesIO()
    with av.open(encoded, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=film.rate_hz)
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        stream.codec_context.color_range = 1
        # One thread: the same bytes on every machine.
        stream.options = {"crf": "20", "preset": "veryfast", "threads": "1"}
        planes = np.full((h * 3 // 2, w), 128, np.uint8)
        for image in film:
            planes[:h] = studio[image]
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    with atomic_file(folder / clip.name) as f:
        f.write(encoded.getbuffer())
    return len(film)


def synth(
    out: Path,
    settings: Settings,
    jobs: int = 1,
    report: Callable[[int, int, str], None] | None = None,
) -> int:
    """Write all clips and `labels.csv` into `out`; the number of clips that were still missing.

    The bytes depend on `settings` alone, not on `jobs`. A folder that an interrupted run with
    the same settings left is completed. Raises InputError for any other folder that is not
    empty, Interrupted after Ctrl-C or SIGTERM.
    """
    out = Path(out)
    wanted = json.dumps({"phantom": VERSION, **asdict(settings)}, indent=1) + "\n"
    note = out / "synth.json"
    if out.exists():
        if not out.is_dir():
            raise InputError(f"synth {out}: is a file; name a new folder")
        there = note.read_text() if note.is_file() else None
        if there != wanted and any(out.iterdir()):
            raise InputError(
                f"synth {out}: the folder is not empty and holds no clips of these settings;"
                " name a new one"
            )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(note, "w") as f:
        f.write(wanted)
    todo = clips(settings)
    missing = [c for c in todo if not (out / c.name).exists()]
    done, frames = len(todo) - len(missing), 0
    if report:
        report(done, len(todo), "")
    try:
        with _stop_on_sigterm():
            for n in _write_all(settings, missing, out, jobs):
                done, frames = done + 1, frames + n
                if report:
                    report(done, len(todo), f"{frames:,} frames")
    except (KeyboardInterrupt, Interrupted) as e:
        raise Interrupted(
            f"synth {out}: {sum((out / c.name).exists() for c in todo)} of {len(todo)} clips are"
            " kept; the same command goes on from there",
            getattr(e, "signum", signal.SIGINT),
        ) from None
    with atomic_file(out / "labels.csv", "w") as f:
        f.write("path,label,patient\n")
        f.writelines(f"{c.name},{c.label},{c.patient}\n" for c in todo)
    return len(missing)


def _write_all(settings, missing, out, jobs) -> Iterator[int]:
    if jobs == 1 or len(missing) < 2:
        for clip in missing:
            yield write_clip(settings, clip, out)
        return
    # The first clip is made here, so that the compiled kernels are cached for all workers.
    yield write_clip(settings, missing[0], out)
    todo = iter(missing[1:])
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(missing) - 1), multiprocessing.get_context("spawn"), _worker_starts
    )
    with pool:
        # No clip waits in the pool's queue: after Ctrl-C only those in work are finished.
        working = {pool.submit(write_clip, settings, c, out) for c in itertools.islice(todo, jobs)}
        while working:
            done, working = concurrent.futures.wait(
                working, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                working.update(
                    pool.submit(write_clip, settings, c, out) for c in itertools.islice(todo, 1)
                )
                yield future.result()


def _worker_starts() -> None:
    """Ctrl-C is the parent's business; a worker ends with its clip, or with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def _stop_on_sigterm():
    def stop(signum, frame):
        raise Interrupted("terminated", signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
