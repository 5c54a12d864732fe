"""Nearest neighbours and fine-tuning: what they compute, and that nothing but training labels
reaches it."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.class_weight import compute_class_weight

from sslus.engine.errors import InputError, Interrupted
from sslus.ssl import backbones, finetune, neighbours
from sslus.ssl.neighbours import knn, votes

SIZE = 32
CPU = torch.device("cpu")
SETTINGS = dataclasses.replace(finetune.Settings.of(3, CPU, "test_resnet", 32), lr=2e-3)


def oracle(x, y, query, num_classes, k=20):
    """The formula, a frame and a query at a time."""
    guess = []
    for q in query.astype(np.float64):
        cosine = [float(q @ v / np.sqrt((q @ q) * (v @ v))) for v in x.astype(np.float64)]
        near = sorted(range(len(x)), key=lambda i: (-cosine[i], i))[:k]
        votes = [
            sum(np.exp(cosine[i] / 0.07) for i in near if y[i] == c) for c in range(num_classes)
        ]
        guess.append(int(np.argmax(votes)))
    return np.array(guess)


def features(num, seed=0, width=24):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, num)
    centres = np.random.default_rng(9).normal(size=(4, width))
    return (centres[y] + 1.5 * rng.normal(size=(num, width))).astype(np.float32), y


@pytest.mark.parametrize("num", [1, 19, 20, 211])
@pytest.mark.parametrize("block", [neighbours.BLOCK, 500])
def test_knn_follows_its_formula(num, block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)  # 500: one to a few queries at a time
    (x, y), (query, _) = features(num), features(60, seed=1)
    assert np.array_equal(knn(x, y, query, 4), oracle(x, y, query, 4))
    assert np.array_equal(knn(100 * x, y, query / 100, 4), oracle(x, y, query, 4))
    if num >= 20:
        theirs = KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(x, y)
        assert np.array_equal(knn(x, y, query, 4), theirs.predict(query))


@pytest.mark.parametrize("width", [3, 100, 512])
def test_of_equal_neighbours_the_first_ones_vote(width):
    """Wherever in the product they are, whose sums differ in the last bits."""
    x = np.tile(np.random.default_rng(0).normal(size=width).astype(np.float32), (999, 1))
    query = np.concatenate([x[:7] * 3, -x[:1]])
    for ones in (9, 10, 11):
        y = np.repeat([1, 0], [ones, 990 + 9 - ones])
        assert set(knn(x, y, query, 2)) == {int(ones > 10)}  # 10 to 10: the first class


def test_knn_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 2110)  # of 211 cosines each: ten queries
    (x, y), (query, _), told = features(211), features(25, seed=1), []
    votes(x, y, query, 4, report=told.append)
    assert told == [10, 20, 25]


def striped(num_each=20, seed=0):
    """A store of frames with stripes along or across, of random strength in noise; and classes."""
    rng = np.random.default_rng(seed)
    y = np.tile([0, 1], num_each)
    wave = 128 + 60 * np.sign(np.sin(np.arange(SIZE) * 1.6))
    frames = np.where(y[:, None, None] == 0, wave[:, None], wave)
    frames = (frames + rng.normal(0, 40, (len(y), SIZE, SIZE))).clip(0, 255).astype(np.uint8)
    return SimpleNamespace(frames=frames, size=SIZE, digest="toy"), y


@pytest.fixture(scope="module")
def toy():
    store, y = striped()
    start = backbones.build("test_resnet", SIZE, 0)
    pictures = finetune.Pictures(store, SIZE, 0.5, 0.25, CPU)
    return SimpleNamespace(store=store, y=y, start=start, pictures=pictures)


def job(toy, num_train=20, **changes):
    """Learns from the first frames, is asked about the second half."""
    train, test = np.arange(num_train), np.arange(20, 40)
    return dataclasses.replace(finetune.Job("toy", 0, 2, train, toy.y[train], test), **changes)


def tune(toy, steps, lr=SETTINGS.lr, **changes):
    settings = dataclasses.replace(SETTINGS, steps=steps, lr=lr)
    logits = finetune.tune(job(toy, **changes), toy.start, toy.pictures, settings, lambda _: None)
    assert logits.dtype == np.float32 and np.isfinite(logits).all()
    return logits.argmax(1)


def test_fine_tuning_learns_what_its_start_does_not_know(toy, monkeypatch):
    weights = {k: v.clone() for k, v in toy.start.state_dict().items()}
    random = torch.get_rng_state()
    y = toy.y[20:]
    guess = tune(toy, 15)
    assert (tune(toy, 1) == y).mean() < 0.8 and (guess == y).mean() > 0.95
    # A head of 16 classes that stays as it began judges by its random weights, the seed's.
    first, again, other = (tune(toy, 1, lr=0.0, num_classes=16, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    # From the labels it is given, and nothing else: the other way round it learns the other way.
    assert (tune(toy, 15, y=1 - toy.y[:20]) == y).mean() < 0.05
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(weights[k], v) for k, v in toy.start.state_dict().items())
    monkeypatch.setattr(finetune, "class_weights", lambda *a: torch.zeros(2))
    # Frames of no weight teach nothing: the other way round it learns the same.
    assert np.array_equal(tune(toy, 15), tune(toy, 15, y=1 - toy.y[:20]))


def test_every_share_has_the_same_steps_and_batch_norm_learns_only_in_training(toy):
    met = []

    def hook(module, inputs, output):
        (x,) = inputs
        met.append((module.training, len(x), len({t.numpy().tobytes() for t in x})))

    handle = toy.start.register_forward_hook(hook)  # a copy of the backbone has it too
    try:
        for num_train in (3, 20):
            met.clear()
            tune(toy, 4, num_train=num_train)
            # Every view is another one, also where three frames fill a batch of 32.
            assert met == 4 * [(True, 32, 32)] + [(False, 20, 20)]
    finally:
        handle.remove()


def test_the_seed_draws_the_views(toy, monkeypatch):
    """Of the same frames in the same order."""
    order = finetune.batches(20, 32, 1, 0)
    monkeypatch.setattr(finetune, "batches", lambda *a: order)
    met = []

    def hook(module, inputs):
        if module.training:
            met.append(inputs[0].clone())

    handle = toy.start.register_forward_pre_hook(hook)
    try:
        for seed in (0, 0, 1):
            tune(toy, 1, seed=seed)
    finally:
        handle.remove()
    first, again, other = met
    assert torch.equal(first, again)
    assert (first - other).abs().flatten(1).amax(1).min() > 0.1  # every view is another one


def test_batches_are_epochs_without_gaps():
    at, epoch = finetune.batches(5, 8, 10, seed=3)
    assert at.shape == epoch.shape == (10, 8)
    for e in range(16):
        assert sorted(at[epoch == e]) == [0, 1, 2, 3, 4]
    assert len({tuple(at[epoch == e]) for e in range(16)}) > 8
    assert not np.array_equal(at, finetune.batches(5, 8, 10, seed=4)[0])


def test_classes_are_weighted_as_in_the_probe():
    y = np.repeat([0, 2, 3], [9, 1, 5])
    weight = finetune.class_weights(y, 5)
    theirs = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=y)
    assert weight[[0, 2, 3]].tolist() == pytest.approx(theirs.tolist())
    assert weight[[1, 4]].tolist() == [0, 0]


def test_what_was_interrupted_goes_on_with_the_same_bytes(toy, tmp_path):
    jobs = [job(toy, seed=seed) for seed in (0, 1, 2, 1)]  # the last has been done by then
    starts = {"toy": toy.start}

    def run(folder, report=lambda *a: None, jobs=jobs, settings=SETTINGS):
        folder.mkdir(exist_ok=True)
        guesses, num = finetune.finetune(jobs, starts, toy.pictures, settings, folder, {}, report)
        assert np.array_equal(guesses[1], guesses[3]) and num == 3
        return guesses

    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    whole = run(tmp_path / "whole")
    assert [len(guess) for guess in whole] == [20] * 4 and len(files(tmp_path / "whole")) == 3
    told = []

    def stop(done, total, note):
        told.append((done, total, note))
        if done == 5:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped after 1 of 3 trainings, which are kept") as e:
        run(tmp_path / "parts", stop)
    assert e.value.signum == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert len(files(tmp_path / "parts")) == 1  # and nothing half-written
    assert told[0] == (0, 9, "") and told[-1] == (5, 9, "training 2 of 3")
    told.clear()
    run(tmp_path / "parts", lambda *a: told.append(a))
    assert told[0] == (3, 9, "") and told[-1] == (9, 9, "training 3 of 3")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    told.clear()
    os.truncate(next((tmp_path / "parts").iterdir()), 0)  # by a copy that was stopped
    run(tmp_path / "parts", lambda *a: told.append(a))
    assert told[0] == (6, 9, "") and files(tmp_path / "parts") == files(tmp_path / "whole")


def test_on_a_full_disk_no_training_seems_finished(toy, small_disk):
    (small_disk / "filler").write_bytes(bytes(4 << 20))
    with pytest.raises(OSError, match="No space left"):
        finetune.finetune(
            [job(toy)], {"toy": toy.start}, toy.pictures, SETTINGS, small_disk, {}, lambda *a: None
        )
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_training_follows_its_settings(toy, monkeypatch):
    """A tenth of the steps warms up, and the last is at a thousandth of the peak."""
    make, set_lr, decays, rates = finetune.optimizers.make, finetune.optimizers.set_lr, [], []
    monkeypatch.setattr(finetune.optimizers, "make", lambda *a: (decays.append(a[3]), make(*a))[1])
    monkeypatch.setattr(
        finetune.optimizers, "set_lr", lambda *a: (rates.append(a[1]), set_lr(*a))[1]
    )
    settings = finetune.Settings.of(20, CPU, "test_resnet", 32)
    finetune.tune(job(toy), toy.start, toy.pictures, settings, lambda _: None)
    peak = settings.lr
    assert rates[:2] == [peak / 2, peak] and rates[2] < peak
    assert len(rates) == 20 and rates[-1] == pytest.approx(peak / 1000)
    assert decays == [settings.weight_decay] and decays[0] > 0


def test_a_kept_result_is_that_of_the_same_training_only(toy, monkeypatch):
    def name(job, settings=SETTINGS, start=toy.start, pictures=toy.pictures):
        (name,) = finetune._names([job], {"toy": start}, pictures, settings)
        return name

    one = job(toy)
    other = backbones.build("test_resnet", SIZE, 1)
    names = [
        name(one), name(one, start=other), name(job(toy, seed=1)), name(job(toy, y=1 - one.y)),
        name(job(toy, num_train=19)), name(job(toy, test=one.test[1:])),
        name(job(toy, num_classes=3)),
        name(one, dataclasses.replace(SETTINGS, steps=4)),
        name(one, dataclasses.replace(SETTINGS, backbone="other")),
        name(one, pictures=dataclasses.replace(toy.pictures, mean=0.4)),
        name(one, pictures=dataclasses.replace(toy.pictures, std=0.4)),
        name(one, pictures=dataclasses.replace(toy.pictures, size=16)),
        name(one, pictures=dataclasses.replace(
            toy.pictures, store=SimpleNamespace(digest="other"))),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert name(job(toy)) == names[0]
    monkeypatch.setattr(finetune, "parse", lambda text: "what the words mean in another version")
    assert name(one) not in names


def test_a_loss_that_is_not_finite_is_one_line(toy, tmp_path, monkeypatch):
    broken = backbones.build("test_resnet", SIZE, 0)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    line = r"fine-tuning of toy: the loss is no longer finite \(by step 3 of seed 1\); if it"
    with pytest.raises(InputError, match=line):
        finetune.finetune(
            [job(toy)], {"toy": broken}, toy.pictures, SETTINGS, tmp_path, {}, lambda *a: None
        )
    assert not list(tmp_path.iterdir())
    long = dataclasses.replace(SETTINGS, steps=50)  # not known only at its end
    with pytest.raises(InputError, match=r"no longer finite \(by step 10 of seed 1\)"):
        finetune.tune(job(toy), broken, toy.pictures, long, lambda step: None)
    with pytest.raises(InputError, match="--steps 0: want at least 1"):
        finetune.Settings.of(0, CPU, "test_resnet", 32)
    alone = job(toy, train=np.array([1]), y=np.array([1]))  # of one class, which needs no training
    assert finetune.tune(alone, broken, toy.pictures, SETTINGS, None).tolist() == 20 * [
        [-np.inf, 0]
    ]
    monkeypatch.setattr(finetune, "_train", lambda *a: None)
    with pytest.raises(InputError, match="of toy: the model's outputs are not finite after the la"):
        finetune.tune(job(toy), broken, toy.pictures, SETTINGS, lambda step: None)
