"""Sections through a fetus: tissues, walls, valves, bones and beating chambers."""

import math
from dataclasses import dataclass, field

import numpy as np

from sslus.engine.phantom.clips import PLANES
from sslus.engine.phantom.compiled import compiled

# Echo level in dB, and whether sound passes with almost no loss.
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


@dataclass(frozen=True)
class Ellipse:
    centre: np.ndarray
    axis: np.ndarray  # unit vector of the first semi-axis
    semi: tuple[float, float]
    taper: float = 0.0  # above 0: narrower towards the end of the first semi-axis, like an egg

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
        """Points about `spacing` mm apart, and their unit normals."""
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


@compiled
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
    """A chamber that pulls its surroundings towards its centre, as far as `wave` says."""

    shape: Ellipse
    along: float  # relative shortening of the first semi-axis where the wave is 1
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
    bones: list = field(default_factory=list)  # (x, y, radius, transmitted sound amplitude)
    pushes: list = field(default_factory=list)  # valve plane: (centre, unit vector, amount, sigma)

    def tissue(self, points: np.ndarray) -> np.ndarray:
        """(N,) tissue indices of points in the fetus's frame; OUTSIDE beyond its skin."""
        out = np.full(len(points), OUTSIDE, np.int8)
        for shape, tissue, _ in self.shapes:
            out[shape.distance(points) < 0] = tissue
        return out


class Pen:
    """Draws into a scene in coordinates of its own: `at` + scale (p e1 + q e2)."""

    def __init__(self, scene: Scene, at, e1, e2, scale):
        self.scene, self.scale = scene, float(scale)
        self.at, self.e1, self.e2 = (np.asarray(v, float) for v in (at, e1, e2))

    def point(self, pq):
        pq = np.asarray(pq, float)
        return self.at + self.scale * (pq[..., :1] * self.e1 + pq[..., 1:] * self.e2)

    def vector(self, degrees: float):
        """Unit vector at an angle from the first axis towards the second."""
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
        """A rib or a piece of skull: an arc of an ellipse, in degrees from the first axis."""
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
    """Skin, ribs and spine of a section of the trunk, filled with the tissue `cavity`."""
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


def _heart_pen(body: Pen, rng, origin, degrees=45.0) -> Pen:
    a = math.radians(degrees + rng.uniform(-5, 5))
    pen = Pen(
        body.scene,
        body.point(np.asarray(origin) + rng.uniform(-0.02, 0.02, 2)),
        (math.sin(a), math.cos(a)),
        (math.cos(a), -math.sin(a)),
        body.scale * 1.22,
    )
    # A tilted plane foreshortens one axis.
    pen.e1 = pen.e1 * rng.uniform(0.94, 1.03)
    pen.e2 = pen.e2 * rng.uniform(0.94, 1.06)
    return pen


def four_chambers(rng, chest_mm: float) -> Scene:
    """Two atria, two ventricles and the crux between them; the apex is to the left and front."""
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
    for path in ([(-0.30, 0.20), (-0.37, 0.26)], [(-0.31, 0.10), (-0.39, 0.07)]):  # pulmonary veins
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
    """The aorta leaves the left ventricle: its front wall continues the septum."""
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
    """The pulmonary artery leaves the right ventricle in front and runs to the left and back."""
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
    """A section that a sweep to the heart passes: abdomen half of the time, else head or limb."""
    return (_abdomen, _abdomen, _head, _limb)[rng.integers(4)](rng, chest_mm)


SECTIONS = dict(
    zip(PLANES, (four_chambers, left_outflow, right_outflow, three_vessels, not_heart), strict=True)
)
