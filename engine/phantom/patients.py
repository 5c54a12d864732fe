"""Patients: fetus, mother and examination, which are the same in all clips of a patient."""

import math
from dataclasses import dataclass, replace

import numpy as np

from sslus.engine.phantom.machines import MACHINES, Machine


@dataclass(frozen=True)
class Patient:
    machine: Machine
    weeks: float  # gestational age
    chest_mm: float  # half the width of the chest
    lie: float  # rotation of the fetus; 0: spine away from the probe
    mirror: int
    heart_hz: float
    gain_db: float
    tgc_db: tuple[float, ...]  # errors of the TGC sliders, top to bottom
    wall_mm: float  # depth of the mother's tissue, down to the inside of the uterine wall
    placenta_mm: float
    gap_mm: float  # amniotic fluid in front of the fetus
    spare_mm: float  # depth shown behind the fetus
    aside_mm: float
    rate_hz: int

    @classmethod
    def draw(cls, seed: int, patient: str) -> "Patient":
        number = int(patient[1:])
        rng = np.random.default_rng([seed, 1, number])
        # Golden-ratio steps, so that even a few patients differ in size.
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
