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

from sslus.engine.phantom.anatomy import NAMES, SECTIONS
from sslus.engine.phantom.clips import PLANES, Clip, Settings, clips
from sslus.engine.phantom.files import synth
from sslus.engine.phantom.film import Film
from sslus.engine.phantom.machines import MACHINES, Sector
from sslus.engine.phantom.overlay import overlay
from sslus.engine.phantom.patients import Patient

__all__ = [
    "MACHINES", "NAMES", "PLANES", "SECTIONS", "Clip", "Film", "Patient", "Sector", "Settings",
    "clips", "overlay", "synth",
]  # fmt: skip
