"""One clip, frame by frame: from the anatomy via scatterers, walls and noise to grey levels."""

import math
from collections.abc import Iterator

import numpy as np

from sslus.engine.phantom.anatomy import CLEAR, FLUID, LEVEL, NAMES, OUTSIDE, SECTIONS, Ellipse
from sslus.engine.phantom.clips import Clip, Settings
from sslus.engine.phantom.compiled import compiled
from sslus.engine.phantom.machines import SOUND_MM_PER_US, Sector
from sslus.engine.phantom.motion import Beating, glint_of, leaflet_points, place, wave
from sslus.engine.phantom.overlay import overlay
from sslus.engine.phantom.patients import Patient

ROUGH_MM = 0.1  # of walls: about a third of a wavelength, so that they are not perfect mirrors


class _Drift:
    """Slow random movement, 0 at the start: the sum of three sines of 0.1 to 0.6 Hz."""

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
        self._loss()
        self.canvas = overlay(sector, patient)

    def pose(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and shift from the fetus's frame to the probe's, at time t in seconds."""
        a = self.lie + self.drift[2](t)
        c, s = math.cos(a), math.sin(a)
        turn = np.array([[c, -s], [s, c]]) @ np.array([[self.patient.mirror, 0], [0, -1.0]])
        return turn, self.home + np.array([self.drift[0](t), self.drift[1](t)])

    def phase(self, t: float) -> float:
        return (self.start + self.patient.heart_hz * t) % 1.0

    # The mother's tissue consists of layers along the probe's face.
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
        """Depth of a layer that is nominally at `depth`: wavy, so that none is a perfect arc."""
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
        """From the probe's frame to the fetus's, at the clip's start."""
        turn, shift = self.pose(0.0)
        out = np.empty_like(points)
        place(points - shift, np.linalg.inv(turn), np.zeros(2), out)
        return out

    def _scatter(self, rng):
        """One scatterer at a random point of every grid cell, fixed to the tissue there."""
        sector = self.sector
        reach = 4.0  # mm, and in units of 1/40 rad: margin that drift may bring into view
        depth = np.arange(sector.depth[0] - reach, sector.depth[-1] + reach, sector.mm)
        angle = np.arange(sector.angle[0] - reach / 40, sector.angle[-1] + reach / 40, sector.step)
        depth, angle = np.meshgrid(depth, angle, indexing="ij")
        depth = depth.ravel() + rng.uniform(0, sector.mm, depth.size)
        angle = angle.ravel() + rng.uniform(0, sector.step, angle.size)
        points = sector.at(depth, angle)
        tissue, mother = self.tissue(points)
        body = np.where(mother[:, None], points, self._to_fetus(points))
        moves = self.beating.moves(body) & ~mother
        order = np.lexsort((moves, ~mother))  # mother | fetus, not reached by the beat | beating
        body, tissue = body[order], tissue[order]
        self.num_mother, self.num_rest = int(mother.sum()), int((~moves).sum())
        level = (LEVEL[tissue] * _texture(rng, body)).astype(np.float32)
        self.points = body.astype(np.float32)
        self.weights = [random_complex(rng, len(body)) * level for _ in range(2)]
        self.flows = np.flatnonzero(CLEAR[tissue])
        self.flow_level = level[self.flows]
        self.flow_weights = random_complex(rng, len(self.flows)) * self.flow_level

    def _walls(self, rng):
        """Rough walls, which are bright where they face the beam; fascia; valve leaflets."""
        sector = self.sector
        spacing = sector.mm / 2
        walls = [(s.contour(spacing), w) for s, _, w in self.scene.shapes if w is not None]
        points = np.concatenate([p for (p, _), _ in walls])
        normals = np.concatenate([n for (_, n), _ in walls])
        level = np.concatenate([np.full(len(p), 10 ** (w / 20)) for (p, _), w in walls])
        # A contour is a wall only where the tissue changes: there is none between chambers that
        # open into each other.
        outer, inner = (self.scene.tissue(points + side * normals) for side in (0.5, -0.5))
        edge = outer != inner
        points = points[edge] + rng.normal(0, ROUGH_MM, (edge.sum(), 2))
        self.wall_points = points.astype(np.float32)
        self.wall_normals = normals[edge].astype(np.float32)
        self.wall_weights = (random_complex(rng, len(points)) * level[edge]).astype(np.complex64)

        # Fascia between the mother's layers.
        angle = np.arange(sector.angle[0], sector.angle[-1], spacing / sector.radius_mm)
        points, weights = [], []
        for bottom, _ in self.layers:
            depth = self._wavy(bottom, angle) + rng.normal(0, 1.5 * ROUGH_MM, len(angle))
            points.append(sector.at(depth, angle))
            weights.append(random_complex(rng, len(angle)) * 10 ** (rng.uniform(4, 12) / 20))
        self.fascia = np.concatenate(points).astype(np.float32)
        self.fascia_weights = np.concatenate(weights).astype(np.complex64)

        num = int(50 / sector.mm)  # enough for speckle in a leaflet
        self.leaflets = [
            (
                valve,
                rng.uniform(0, 1, num),
                rng.normal(0, valve.thickness / 2.5, num),
                random_complex(rng, 2 * num) * np.float32(1.9),
            )
            for valve in self.scene.valves
        ]

    def _loss(self):
        """Sets gain (rows, beams) and noise (rows,), both amplitudes.

        Gain: behind liquids, which attenuate less than TGC compensates; errors of the TGC sliders;
        weak outer beams.
        """
        sector = self.sector
        depth, angle = sector.depth[::4], sector.angle[::3]
        d, a = np.meshgrid(depth, angle, indexing="ij")
        tissue, _ = self.tissue(sector.at(d.ravel(), a.ravel()))
        clear = CLEAR[tissue].reshape(d.shape).astype(float)
        db = np.cumsum(clear, 0) * (sector.mm * 4) * 0.16  # dB per mm of liquid
        kernel = np.hanning(9)[1:-1]
        kernel /= kernel.sum()
        pad = np.pad(db, ((0, 0), (3, 3)), "edge")
        db = sum(k * pad[:, i : i + db.shape[1]] for i, k in enumerate(kernel))
        rows = np.array([np.interp(sector.angle, angle, line) for line in db])
        db = np.array([np.interp(sector.depth, depth, line) for line in rows.T]).T
        knots = np.linspace(0, sector.depth_mm, len(self.patient.tgc_db))
        slider = np.interp(sector.depth, knots, self.patient.tgc_db)
        db = db - db.mean() + slider[:, None]
        # Poor contact at the outer beams.
        edge = np.abs(sector.angle) / (sector.machine.view_angle / 2)
        db -= 3.0 * edge**4
        self.gain = (10 ** (db / 20)).astype(np.float32)
        # Electronic noise is flat, but TGC amplifies it with depth.
        x = np.clip(sector.depth / sector.depth_mm, 0, None)
        self.noise = (10 ** ((-50 + 17 * x**1.5 + slider) / 20)).astype(np.float32)

    def echo(self, n: int) -> np.ndarray:
        """(2, rows, beams) float32: the complex echo of frame `n`. Frames must be asked for in
        order, since flow and noise depend on the previous ones."""
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
            leaflet_points(
                v, self.beating(v.hinges.astype(np.float32), phase), s, o, wave(v.wave, phase)
            )
            for v, s, o, _ in self.leaflets
        ]
        own = np.concatenate([fetus, walls, *leaflets]).astype(np.float32)
        placed = np.empty_like(own)
        place(own, turn, shift, placed)
        creep = np.array([self.drift[3](t), 0.3 * self.drift[3](t)], np.float32)
        points = np.concatenate([self.points[:mother] + creep, placed, self.fascia + creep])

        # As the plane drifts out of the section, scatterers fade into a second, independent set.
        away = self.drift[4](t)
        bulk = self.weights[0] * np.float32(math.cos(away))
        bulk += self.weights[1] * np.float32(math.sin(away))
        # Liquids flow: half of their speckle's amplitude is new in every frame.
        fresh = random_complex(self.rng, len(self.flows)) * self.flow_level
        self.flow_weights = np.float32(0.5) * self.flow_weights + np.float32(0.75**0.5) * fresh
        bulk[self.flows] = self.flow_weights
        glint = glint_of(
            placed[len(fetus) : len(fetus) + len(walls)], self.wall_normals, turn, sector.radius_mm
        )
        weights = np.concatenate(
            [bulk, self.wall_weights * glint, *(w for *_, w in self.leaflets), self.fascia_weights]
        )

        echo = sector.echo(points, weights, self.wavenumber)
        bones = np.array(self.scene.bones, np.float32)
        centres = np.empty((len(bones), 2), np.float32)
        place(bones[:, :2].copy(), turn, shift, centres)
        loss = _shadow(centres, bones[:, 2:], sector.depth, sector.angle, sector.radius_mm)
        echo *= loss * self.gain
        # Reverberation shows the near tissue again, deeper.
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
    """(N,) amplitude: tissue is not homogeneous, but varies slowly by about 1.5 dB."""
    db = np.zeros(len(points))
    for _ in range(7):
        kx, ky = rng.normal(0, 0.35, 2)
        db += np.sin(kx * points[:, 0] + ky * points[:, 1] + rng.uniform(0, 2 * math.pi))
    return 10 ** (0.8 * db / 20)


def random_complex(rng, n: int) -> np.ndarray:
    """(n,) complex64 normal, mean power 1."""
    return (rng.standard_normal((n, 2), dtype=np.float32) * np.float32(0.5**0.5)).view(
        np.complex64
    )[:, 0]


@compiled
def _shadow(centres, bones, depth, angle, radius):
    """(rows, beams) share of the amplitude that passes the bones, given by (radius, through)."""
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
                # The bone itself is visible: the shadow deepens over the bone's diameter.
                deep = min(np.float32(1), (i - top) * mm / (2 * bones[n, 0]))
                out[i, j] = min(out[i, j], 1 - (1 - through) * deep)
    return out


@compiled
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
