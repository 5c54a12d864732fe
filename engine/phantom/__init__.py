"""A speckle phantom of the fetal heart: synthetic ultrasound clips for trying everything out.

Point scatterers move with the tissue to which they are fixed. They are summed with their carrier
phase on a polar grid, blurred by the point spread function, and displayed as a scanner does:

    scatterers --splat--> complex field --PSF--> echo --|.|, log--> grey --sector--> frame

    depth_s, angle_s = where scatterer s is now (beat, fetal movement, probe drift)
    field = sum_s w_s exp(-2i k depth_s) delta(depth - depth_s, angle - angle_s)
    echo  = (field * pulse(depth) * beam(angle; depth)) shadow + reverberation + noise
    grey  = clip((20 log10 |echo| + gain - black) / dynamic range)

Speckle is Rayleigh-distributed because many scatterers share a resolution cell, and it moves with
the wall it belongs to. A clip is a pure function of the settings and its number.

Lengths are in mm, angles in radians, levels in dB relative to the septum. Three frames of
reference are used: the probe's (x to the right, z down, origin on the probe's face), the fetus's
(x to its left, y to its front, origin in the middle of the section) and the heart's (p from the
crux to the apex, q from the septum to the left ventricle, in heart lengths).
"""
