"""The text and scales that a machine draws around the sector."""

import numpy as np

from sslus.engine.phantom.machines import Sector
from sslus.engine.phantom.patients import Patient


def overlay(sector: Sector, patient: Patient) -> np.ndarray:
    """(H, W) uint8: the text and scales around the sector. The sector itself is 0."""
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
