"""The synthetic clips: physics of the speckle, anatomy, movement, files, command."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import av
import numpy as np
import pytest
from scipy import ndimage

from sslus.engine.errors import InputError, Interrupted
from sslus.engine.labels import read_labels
from sslus.engine.phantom.anatomy import NAMES, SECTIONS
from sslus.engine.phantom.clips import PLANES, Clip, Settings, clips
from sslus.engine.phantom.compiled import compiled
from sslus.engine.phantom.files import synth
from sslus.engine.phantom.film import Film, random_complex
from sslus.engine.phantom.machines import MACHINES, Sector, _scan_convert
from sslus.engine.phantom.overlay import overlay
from sslus.engine.phantom.patients import Patient
from sslus.tools.cli import main

TINY = Settings(videos=6, patients=3, seed=5, size=96, seconds=(0.2, 0.3))


def still(label="4CH", patient="p02", size=256):
    """A film without heartbeat, drift and valves."""
    film = Film(Settings(seed=0, size=size), Clip(0, "x.mp4", label, patient))
    film.patient = replace(film.patient, heart_hz=0.0)
    film.drift = [lambda t: 0.0] * 5
    film.leaflets = []
    return film


def envelope(film, n):
    return np.hypot(*film.echo(n))


def tissue_on_grid(film):
    """(rows, beams) tissue name index at the start of the clip."""
    d, a = np.meshgrid(film.sector.depth, film.sector.angle, indexing="ij")
    return film.tissue(film.sector.at(d.ravel(), a.ravel()))[0].reshape(d.shape)


def inner(film, *names, margin=4):
    """Grid cells of these tissues that no other tissue's echo reaches."""
    mask = np.isin(tissue_on_grid(film), [NAMES.index(n) for n in names])
    mask = ndimage.binary_erosion(mask, iterations=margin)
    assert mask.sum() > 300
    return mask


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


# ---------------------------------------------------------------- physics


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.logo)
def test_speckle_of_even_tissue_is_rayleigh_with_the_same_power_at_every_depth(machine):
    sector = Sector(machine, 90.0)
    rng = np.random.default_rng(0)
    rows, beams = sector.shape
    i, j = np.meshgrid(np.arange(rows), np.arange(beams), indexing="ij")
    depth = sector.depth[0] + (i.ravel() + rng.uniform(0, 1, i.size)) * sector.mm
    angle = sector.angle[0] + (j.ravel() + rng.uniform(0, 1, i.size)) * sector.step
    weights = random_complex(rng, i.size)
    echo = sector.echo(sector.at(depth, angle).astype(np.float32), weights, 20.0)
    level = np.hypot(*echo)[20:-20, 20:-20]
    # Rayleigh: mean / std = sqrt(pi / (4 - pi)) = 1.913.
    assert level.mean() / level.std() == pytest.approx(1.913, rel=0.05)
    for part in np.array_split(level, 3):
        assert np.mean(part**2) == pytest.approx(0.9, rel=0.1)


def test_what_lies_beyond_the_last_row_and_column_is_not_read():
    around = np.full((6, 6), 255, np.float32)
    around[:4, :4] = 7
    at = np.array([0, 2.5, 3, 3.5], np.float32)
    canvas = np.zeros(4, np.uint8)
    _scan_convert(around[:4, :4], at, at[::-1].copy(), np.arange(4), canvas)
    assert canvas.tolist() == [7, 7, 7, 7]


def test_the_beam_widens_away_from_its_focus():
    sector = Sector(MACHINES[0], 90.0)

    def width_mm(depth):
        point = np.array([[0.0, depth]], np.float32)
        power = (sector.echo(point, np.ones(1, np.complex64), 20.0) ** 2).sum((0, 1))
        return np.sqrt((power * sector.angle**2).sum() / power.sum()) * (sector.radius_mm + depth)

    assert width_mm(54) < 0.75 * width_mm(8)
    assert width_mm(54) < 0.85 * width_mm(85)


def test_speckle_travels_with_the_tissue_and_blood_forgets():
    film = still()
    shift = 5  # rows
    film.drift[1] = lambda t: shift * film.sector.mm * (t > 0)
    middle = slice(film.sector.shape[1] // 2 - 8, film.sector.shape[1] // 2 + 8)
    tissue = inner(film, "lung", "myocardium", "septum")[:-shift, middle]
    blood = inner(film, "blood", margin=7)[:-shift]
    before, after = envelope(film, 0), envelope(film, 1)
    followed = correlation(before[:-shift, middle][tissue], after[shift:, middle][tissue])
    assert followed > 0.9
    assert correlation(before[:-shift, middle][tissue], after[:-shift, middle][tissue]) < 0.5
    assert correlation(before[:-shift][blood], after[shift:][blood]) < followed - 0.3


def test_blood_is_dark_and_bone_bright_with_a_shadow_behind():
    film = still(size=512)
    level = sum(envelope(film, n) ** 2 for n in range(3))

    def db(mask):
        return 10 * np.log10(level[mask].mean())

    assert db(inner(film, "blood", margin=7)) < db(inner(film, "myocardium", margin=2)) - 12
    bone = tissue_on_grid(film) == NAMES.index("bone")
    assert db(bone) > db(inner(film, "lung")) + 6
    film.scene.bones = [(x, y, r, 1.0) for x, y, r, _ in film.scene.bones]
    bare = still(size=512)
    bare.scene.bones = film.scene.bones  # sound passes all of them
    clear = sum(envelope(bare, n) ** 2 for n in range(3))
    behind = np.cumsum(bone, 0) > 4
    behind &= ndimage.binary_erosion(~bone, iterations=4)
    assert 10 * np.log10(level[behind].mean() / clear[behind].mean()) < -4


def test_the_heart_beats_at_the_patients_rate():
    film = Film(Settings(seed=0, size=192), Clip(0, "x.mp4", "4CH", "p02"))
    film.num_frames = round(6 * film.rate_hz)
    pixels = film.sector.inside
    dark = np.array([(image[pixels] < 40).mean() for image in film])
    t = np.arange(len(dark)) / film.rate_hz
    dark -= np.polyval(np.polyfit(t, dark, 5), t)  # drift
    power = np.abs(np.fft.rfft(dark * np.hanning(len(dark)), 8 * len(dark)))
    hz = np.fft.rfftfreq(8 * len(dark), 1 / film.rate_hz)
    band = (hz > 1) & (hz < 4)
    assert 2.0 <= film.patient.heart_hz <= 160 / 60
    assert hz[band][power[band].argmax()] == pytest.approx(film.patient.heart_hz, abs=0.1)


# ---------------------------------------------------------------- anatomy


def blood_areas(label):
    """Areas in mm2 and middles of the separate blood pools, largest first."""
    scene = SECTIONS[label](np.random.default_rng(1), 30.0)
    axis = np.arange(-30, 30, 0.2)
    x, y = np.meshgrid(axis, axis)
    blood = scene.tissue(np.stack([x.ravel(), y.ravel()], 1)) == NAMES.index("blood")
    pools, n = ndimage.label(blood.reshape(x.shape))
    area = ndimage.sum_labels(np.ones_like(pools), pools, range(1, n + 1)) * 0.04
    middle = np.array(ndimage.center_of_mass(pools > 0, pools, range(1, n + 1))) * 0.2 - 30
    order = np.argsort(-area)
    return area[order], middle[order][:, ::-1]


def test_four_chambers_are_two_halves_with_the_left_one_behind():
    scene = SECTIONS["4CH"](np.random.default_rng(1), 30.0)
    assert [b.wave for b in scene.beats].count("ventricle") == 2
    assert [b.wave for b in scene.beats].count("atrium") == 2
    assert len(scene.valves) == 2
    area, _ = blood_areas("4CH")
    assert area[1] > 0.6 * area[0] > 3 * area[2]  # right heart, left heart, then the aorta


def test_three_vessels_stand_in_a_row_largest_to_smallest():
    area, middle = blood_areas("3VV")
    pulmonary, aorta = middle[0], middle[1]
    rest = middle[2:]
    cava = rest[rest[:, 1].argmax()]  # the other one is the descending aorta, by the spine
    assert area[0] > 1.5 * area[1] > 1.5 * area[2]
    assert pulmonary[0] > aorta[0] > cava[0]  # from left to right


def test_outflow_planes_differ_in_which_ventricle_the_artery_leaves():
    left, _ = blood_areas("LVOT")
    right, _ = blood_areas("RVOT")
    for area in (left, right):
        assert area[0] > 1.8 * area[1]  # ventricle and artery are one pool


@pytest.mark.parametrize("label", PLANES)
def test_every_plane_gives_pictures_that_change(label):
    film = Film(TINY, Clip(0, "x.mp4", label, "p00"))
    images = list(film)
    assert len(images) == len(film) >= 2
    inside = film.sector.inside
    for image in images:
        assert image.dtype == np.uint8
        assert 25 < image[inside].mean() < 150
        assert np.array_equal(image[~inside], film.canvas[~inside])
    assert any((a != b).any() for a, b in zip(images, images[1:], strict=False))


@pytest.mark.parametrize("number", range(len(MACHINES)))
def test_the_overlay_stays_outside_a_sector_that_is_black_around(number):
    patient = Patient.draw(0, f"p{number:02d}")
    sector = Sector(patient.machine, 90.0)
    canvas = overlay(sector, patient)
    assert canvas.shape == (patient.machine.height, patient.machine.width)
    y, x = np.nonzero(sector.inside)
    # The sector by its definition: between two arcs about the same centre, left = right.
    x_mm = (x - (sector.width - 1) / 2) * sector.mm
    r = np.hypot(x_mm, (y - sector.top) * sector.mm + sector.radius_mm)
    assert r.min() == pytest.approx(sector.radius_mm, abs=sector.mm)
    assert r.max() == pytest.approx(sector.radius_mm + 90.0, abs=sector.mm)
    assert np.array_equal(sector.inside, sector.inside[:, ::-1])
    assert y.min() > 0 and y.max() < sector.height - 1 and x.min() > 0
    assert canvas[sector.inside].max() == 0
    assert (canvas[~sector.inside] > 150).sum() > 200  # text
    assert (canvas[~sector.inside] == 0).mean() > 0.9


# ---------------------------------------------------------------- files


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "videos"
    assert synth(out, TINY) == 6
    return out


def test_same_settings_same_bytes_on_any_number_of_jobs(made, tmp_path):
    synth(tmp_path / "two", TINY, jobs=2)
    assert digests(tmp_path / "two") == digests(made)
    synth(tmp_path / "other", replace(TINY, seed=6, videos=1, patients=1))
    assert digests(tmp_path / "other")["clip-000.mp4"] != digests(made)["clip-000.mp4"]


def test_labels_name_every_clip_and_patients_share_planes(made):
    labels = read_labels(made / "labels.csv")
    assert sorted(x.path.name for x in labels) == sorted(p.name for p in made.glob("*.mp4"))
    assert {x.label for x in labels} == set(PLANES)
    for settings in (Settings(), Settings(50, 10), Settings(10, 5), Settings(7, 3)):
        plan = clips(settings)
        count = [sum(c.label == p for c in plan) for p in PLANES]
        assert max(count) - min(count) <= 1
        for patient in {c.patient for c in plan}:
            planes = [c.label for c in plan if c.patient == patient]
            assert len(set(planes)) == min(5, len(planes)) >= 2
        assert len({c.patient for c in plan}) == settings.patients


def test_a_clip_is_h264_at_its_machines_size_and_rate(made):
    with av.open(str(made / "clip-000.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.pix_fmt == "yuv420p"
        assert max(stream.width, stream.height) == 96
        assert 25 <= stream.average_rate <= 50
        frames = list(container.decode(stream))
    film = Film(TINY, clips(TINY)[0])
    assert len(frames) == len(film)
    luma = frames[0].to_ndarray()[: stream.height].astype(float)
    grey = (luma - 16) * 255 / 219
    assert np.abs(grey - next(iter(film))).mean() < 6


def test_an_interrupted_run_is_completed_with_the_same_bytes(made, tmp_path):
    out = tmp_path / "videos"
    out.mkdir()
    (out / "synth.json.tmp").write_text("{")  # killed as it began

    def stop(done, total, note):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="2 of 6 clips are kept"):
        synth(out, TINY, report=stop)
    assert not (out / "labels.csv").exists()
    kept = (out / "clip-000.mp4").stat().st_mtime_ns
    (out / "clip-001.mp4").write_bytes(b"")
    assert synth(out, TINY) == 5
    assert (out / "clip-000.mp4").stat().st_mtime_ns == kept
    assert digests(out) == digests(made)
    with pytest.raises(InputError, match="not empty"):
        synth(out, replace(TINY, seed=9))
    assert digests(out) == digests(made)


def test_where_nothing_can_be_cached_the_loops_are_compiled_all_the_same():
    scope = {}
    exec("def double(x): return 2 * x", scope)  # without a file, numba has no place for its cache
    assert compiled(scope["double"])(21) == 42


def test_a_full_disk_is_one_line_and_no_clip_is_half_written(small_disk, capsys):
    filler, out = small_disk / "filler", small_disk / "v"
    filler.write_bytes(bytes((4 << 20) - 8192))  # room for synth.json
    command = ["synth", str(out), "--videos", "2", "--patients", "1", "--size", "96"]
    command += ["--seconds", "1", "1", "--jobs", "1"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"Error: no space left on the disk of {out}/clip-000.mp4; no partial")
    assert [path.name for path in out.iterdir()] == ["synth.json"]
    filler.unlink()
    assert main(command) == 0


def num_workers(pid: int) -> int:
    """Its worker processes, once they are Python interpreters."""
    children = subprocess.run(["ps", "--ppid", str(pid), "-o", "args="], capture_output=True)
    return children.stdout.count(b"multiprocessing.spawn")


def test_ctrl_c_while_the_workers_start_is_one_line(made, tmp_path):
    """A terminal sends it to the workers too, in which nothing of ours runs yet.

    They finish their clips all the same.
    """
    out = tmp_path / "videos"
    arguments = ["--videos", "6", "--patients", "3", "--seed", "5", "--size", "96",
                 "--seconds", "0.2", "0.3", "--jobs", "2"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "sslus.tools", "synth", str(out), *arguments],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # pytest's workers ignore it, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while num_workers(process.pid) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    errors = [x for x in stderr.splitlines() if x.startswith("Error: ")]
    assert len(errors) == 1 and "3 of 6 clips are kept" in errors[0], stderr
    assert "Traceback" not in stderr, stderr
    synth(out, TINY)
    assert digests(out) == digests(made)


def test_a_worker_that_is_killed_is_no_bug_and_costs_one_clip(made, tmp_path, monkeypatch):
    """As by the kernel, where memory runs out."""
    monkeypatch.setattr("sslus.engine.phantom.files.follow_parent", partial(os._exit, 9))
    with pytest.raises(InputError, match="a worker process was killed, .* with fewer --jobs"):
        synth(tmp_path, TINY, jobs=2)
    assert synth(tmp_path, TINY) == 5
    assert digests(tmp_path) == digests(made)


def test_as_many_processes_as_cores_that_may_be_used(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr("sslus.engine.phantom.files.synth", lambda *args: jobs.append(args[2]) or 0)
    assert main(["synth", str(tmp_path)]) == 0 and jobs == [1]


def test_command_says_what_next_and_refuses_in_one_line(tmp_path, capsys):
    out = tmp_path / "v"
    small = ["--videos", "1", "--patients", "1", "--size", "64", "--seconds", "0.1", "0.1"]
    assert main(["synth", str(out), *small]) == 0
    assert f"Next: sslus shard {out}" in capsys.readouterr().out
    for wrong in (
        ["--videos", "0"],
        ["--patients", "0"],
        ["--videos", "3", "--patients", "4"],
        ["--seed", "-1"],
        ["--size", "10"],
        ["--seconds", "3", "2"],
    ):
        assert main(["synth", str(tmp_path / "new"), *wrong]) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: synth: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="at most 1,000,000 videos, got 1,000,001"):
        Settings(videos=1_000_001)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert main(["synth", str(tmp_path / "full"), *small]) == 1
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
