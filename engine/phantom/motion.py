"""The heartbeat: where points of the resting fetus are at a phase of the cardiac cycle."""

import math

import numpy as np

from sslus.engine.phantom.anatomy import Scene, Valve
from sslus.engine.phantom.compiled import compiled

REACH = 1.9  # a chamber's pull ends at this multiple of its semi-axes


def wave(name: str, phase: float) -> float:
    """How far a movement has gone at a phase of the cardiac cycle (0..1, starting with systole).

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
    if name == "inlet":  # early filling, then atrial contraction
        return min(1.0, bump(0.44, 0.56, 0.80) + 0.8 * bump(0.66, 0.84, 1.02))
    return min(1.0, 1.6 * bump(0.04, 0.20, 0.42))


@compiled
def _deform(rest, chambers, pushes, out):
    """Pull points towards the chambers and push them with the valve plane.

    chambers (n, 8): centre, first axis, semi-axes, current shortening along and across.
    pushes (m, 5): centre, current displacement, sigma.
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


@compiled
def place(points, turn, shift, out):
    for s in range(len(points)):
        x, y = points[s, 0], points[s, 1]
        out[s, 0] = turn[0, 0] * x + turn[0, 1] * y + shift[0]
        out[s, 1] = turn[1, 0] * x + turn[1, 1] * y + shift[1]


@compiled
def glint_of(points, normals, turn, radius):
    """The share of a wall's echo that returns to the probe: all of it at normal incidence."""
    out = np.empty(len(points), np.float32)
    for s in range(len(points)):
        x, z = points[s, 0], points[s, 1] + radius
        nx = turn[0, 0] * normals[s, 0] + turn[0, 1] * normals[s, 1]
        nz = turn[1, 0] * normals[s, 0] + turn[1, 1] * normals[s, 1]
        facing = abs(nx * x + nz * z) / math.sqrt(x * x + z * z)
        out[s] = np.float32(0.12) + np.float32(0.88) * facing**3
    return out


class Beating:
    """A scene's movement: calling it moves points of the resting fetus to a phase of the cycle."""

    def __init__(self, scene: Scene):
        self.beats, self.pushes = scene.beats, scene.pushes

    def moves(self, points: np.ndarray) -> np.ndarray:
        """(N,) whether the beat may move a point at all."""
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


def leaflet_points(
    valve: Valve, hinges: np.ndarray, along: np.ndarray, off: np.ndarray, opening: float
):
    """Points of both leaflets between displaced `hinges`; `along` is 0..1, `off` in mm across."""
    span = hinges[1] - hinges[0]
    width = np.linalg.norm(span)
    out = []
    for hinge, inward in ((hinges[0], span / width), (hinges[1], -span / width)):
        # Closed leaflets tilt slightly forward and meet; open ones lie along the wall.
        lean = math.radians(12 + 62 * opening)
        bend = lean + math.radians(20) * opening * (along - 0.5)
        reach = 0.54 * width * along
        path = np.cos(bend)[:, None] * inward + np.sin(bend)[:, None] * valve.ahead
        out.append(hinge + reach[:, None] * path + off[:, None] * valve.ahead)
    return np.concatenate(out)
