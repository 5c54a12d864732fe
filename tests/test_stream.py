"""Streaming shards: an order that is arithmetic, frames as in the shards, errors of one line."""

import base64
import contextlib
import hashlib
import pickle
import re
import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import simplejpeg
from fsspec.implementations.local import LocalFileSystem

from sslus.engine import stream, tar
from sslus.engine.errors import InputError
from sslus.engine.manifest import REMEDY, read_manifest
from sslus.engine.shard import Settings, shard
from sslus.engine.store import FrameStore
from sslus.engine.stream import Reader, StreamPlan, StreamStore
from sslus.engine.urls import is_url, shown
from sslus.tools.cli import main


@pytest.fixture
def shards(many_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WAITS_SECONDS", (0, 0))
    return shutil.copytree(many_shards, tmp_path / "shards")


def read(where, indices=None, **options) -> np.ndarray:
    store = StreamStore.open(where)
    reader = Reader(store, **options)
    indices = np.arange(len(store)) if indices is None else indices
    try:
        reader.read_ahead(indices)
        return reader.read(indices)[0].copy()
    finally:
        reader.close()


COUNTS = [(1000, 999, 1000, 7), (5,) * 40, (20_000, 1, 3), (2,)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("batch_size", [2, 12, 64])
def test_a_plan_gives_every_frame_once_to_one_rank_from_few_shards(counts, batch_size):
    num = sum(counts)
    if num < batch_size:
        batch_size = 2
    plan = StreamPlan(num, batch_size, 3, shards=counts)
    order = plan.order(0)
    assert len(order) == plan.steps_per_epoch * batch_size == num // batch_size * batch_size
    assert len(np.unique(order)) == len(order) and order.min() >= 0 and order.max() < num
    batches = list(plan.epoch(0))
    np.testing.assert_array_equal(np.concatenate(batches), order)
    for start in {1, len(batches) // 2, len(batches)}:
        rest = list(plan.epoch(0, start))
        assert len(rest) == max(0, len(batches) - start)
        for one, other in zip(rest, batches[start:], strict=True):
            np.testing.assert_array_equal(one, other)
    for world in {w for w in (2, 4, 6) if batch_size % w == 0}:
        ranks = [list(replace(plan, rank=r, world=world).epoch(0)) for r in range(world)]
        for step, batch in enumerate(batches):
            np.testing.assert_array_equal(np.concatenate([r[step] for r in ranks]), batch)
    if num > 100:
        assert not np.array_equal(order, plan.order(1))
        assert not np.array_equal(order, replace(plan, seed=4).order(0))


def test_a_plan_mixes_a_buffer_and_ranks_read_their_own_shards():
    counts, world = (1000,) * 256, 8
    plan = StreamPlan(sum(counts), 256, 0, shards=counts)
    batches = np.stack(list(plan.epoch(0)))
    # A block of steps and its shards, a few more at the ends of the lanes; each frame anywhere.
    block = batches[: stream.BUFFER // 256]
    assert len(np.unique(block // 1000)) <= 3 * stream.LANES
    lane = block[:, :32].ravel() % 1000
    assert abs(np.corrcoef(np.arange(len(lane)), lane)[0, 1]) < 0.2
    read_by = [set((batches[:, 32 * r : 32 * (r + 1)] // 1000).ravel()) for r in range(world)]
    assert sum(map(len, read_by)) <= 256 + world
    assert set.union(*read_by) == set(range(256))


def test_frames_and_labels_are_the_shards(shards, by_hand):
    frames, facts = zip(*by_hand(shards), strict=True)
    frames, labels = np.stack(frames), [fact["label"] for fact in facts]
    store = StreamStore.open(shards)
    manifest = read_manifest(shards)
    assert len(store) == len(frames) == manifest.num_frames and store.size == 64
    assert (store.mean, store.std, store.digest) == (manifest.mean, manifest.std, manifest.digest)
    order = np.random.default_rng(0).permutation(len(frames))
    for threads in (1, 3):
        reader = Reader(store, threads)
        reader.read_ahead(order)
        for part in np.array_split(order, 5):
            got, numbers = reader.read(part)
            np.testing.assert_array_equal(got, frames[part])
            assert [store.label_names[n] for n in numbers] == [labels[i] for i in part]
        assert not reader.shards and not reader.wanted  # all that was named is read
        reader.close()


def test_only_what_is_needed_is_fetched_checked_and_decoded(shards, monkeypatch):
    """A shard that is fetched again has been checked."""
    store = StreamStore.open(shards)
    fetched, checked, decoded = [], [], []
    fetch, sha256, decode = stream._fetch, hashlib.sha256, stream.decode_jpeg
    monkeypatch.setattr(hashlib, "sha256", lambda data: (checked.append(1), sha256(data))[1])
    monkeypatch.setattr(stream, "_fetch", lambda *a: (fetched.append(a[1]), fetch(*a))[1])
    monkeypatch.setattr(stream, "decode_jpeg", lambda *a: (decoded.extend(a[0]), decode(*a))[1])
    reader = Reader(store)
    last = len(store) - 1
    for i in (last, last - 1):
        reader.read_ahead(np.array([i]))
        reader.read(np.array([i]))
    reader.close()
    assert fetched == [store.manifest.shards[-1]["name"]] * 2
    assert len(checked) == 1 and len(decoded) == 2


def test_labels_may_be_missing(clips, tmp_path):
    shard([clips / "a"], tmp_path, Settings(size=32), device="cpu", jobs=1)
    reader = Reader(StreamStore.open(tmp_path))
    reader.read_ahead(np.arange(4))
    assert (reader.read(np.arange(4))[1] == -1).all()
    reader.close()


def forge(shards, change) -> str:
    """Change the bytes of the first shard and make the manifest agree. Returns its path."""
    path = sorted(shards.glob("*.tar"))[0]
    data = change(bytearray(path.read_bytes()))
    path.write_bytes(data)
    manifest = read_manifest(shards)
    manifest.shards[0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.with_digest().write(shards)
    return str(path)


def first(shards, extension) -> tuple[str, int, int]:
    key, members = tar.read_index(sorted(shards.glob("*.tar"))[0])[0]
    return f"{key}.{extension}", *members[extension]


def test_members_of_other_kinds_are_never_opened(shards):
    bomb = pickle.dumps(partial(print, "unpickled"))
    frames = read(shards)

    def change(data):
        more = tar.header("000.pyd", len(bomb)) + bomb + b"\0" * (-len(bomb) % 512)
        return more + data

    forge(shards, change)
    np.testing.assert_array_equal(read(shards), frames)


def test_damage_is_one_line_that_names_shard_and_member(shards, many_shards):
    path = sorted(shards.glob("*.tar"))[0]
    name, offset, length = first(shards, "jpg")
    facts, at, _ = first(shards, "json")

    def cut(data):
        return data[: offset + length // 2]

    def header(data):
        return data[:offset] + b"\xff\xd8broken" + data[offset + 8 :]

    def larger(data):
        jpeg = simplejpeg.encode_jpeg(np.zeros((65, 64, 1), np.uint8), 1, "GRAY")
        return data[:offset] + jpeg + data[offset + len(jpeg) :]

    def wrong_label(data):
        return re.sub(rb'("label": ?")\w', rb"\1X", data)

    def wrong_json(data):
        return data[:at] + b"[" + data[at + 1 :]

    def no_header(data):
        return data[: offset - 512 + 124] + b"hello" + data[offset - 512 + 129 :]

    def renamed(data):
        return data.replace(name.encode(), name.replace("jpg", "jpe").encode(), 1)

    for change, words in [
        (cut, f"ends inside {name}"), (header, f"{name} is damaged"),
        (larger, rf"{name} is damaged \(its size is 65 x 64\)"), (wrong_label, "json is damaged"),
        (wrong_json, f"{facts} is damaged"), (no_header, f"no valid tar header at '{name}'"),
        (renamed, "has no jpg"),
    ]:  # fmt: skip
        forge(shards, change)
        with pytest.raises(InputError, match=words) as e:
            read(shards)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
        assert str(e.value).endswith(REMEDY)
        shutil.rmtree(shards)
        shutil.copytree(many_shards, shards)

    whole = path.read_bytes()
    for data, words in [
        (whole[:-1000], "was cut off or replaced"), (b"", "empty"),
        (whole[:offset] + b"x" + whole[offset + 1 :], "its digest is wrong"),
    ]:  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(InputError, match=words) as e:
            read(shards)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    path.unlink()
    with pytest.raises(InputError, match=f"{path}: No such file or directory"):
        read(shards)
    (shards / "manifest.json").unlink()
    with pytest.raises(InputError, match="no finished shards here"):
        StreamStore.open(shards)


@pytest.mark.parametrize(
    "facts", [b"[" * 10**5, b'{"label": %d}' % 10**400, b'{"label": ' + b"9" * 5000 + b"}"]
)
def test_json_beyond_all_bounds_is_damage(facts, shards):
    path = sorted(shards.glob("*.tar"))[0]
    data = path.read_bytes()
    samples = [
        (key, {name: data[at : at + size] for name, (at, size) in parts.items()})
        for key, parts in tar.read_index(path)
    ]
    samples[0][1]["json"] = facts
    tar.write_shard(path, samples)
    forge(shards, bytes)
    for reads in (read, partial(FrameStore.open, rebuild=True)):
        with pytest.raises(InputError, match="make the shards again") as e:
            reads(shards)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "where",
    ["pipe:cat x", "pipe://cat x", "s3://a|sh/b", "ssh://host/shards", "simplecache::s3://a/b",
     "file://a::pipe://b", "shell://ls"],
)  # fmt: skip
def test_what_could_be_a_shell_is_refused_by_name(where, monkeypatch):
    monkeypatch.setattr(stream, "_fetch", None)
    with pytest.raises(InputError) as e:
        StreamStore.open(where)
    assert where in str(e.value) and "\n" not in str(e.value)


def test_a_relative_url_is_refused(shards, monkeypatch):
    monkeypatch.chdir(shards.parent)
    for where in ("file://shards", "file://./shards"):
        with pytest.raises(InputError, match=f"^{where}: want file:// with the absolute path"):
            StreamStore.open(where)


def test_folders_are_no_urls(tmp_path):
    assert not is_url(tmp_path) and not is_url("shards") and not is_url("a:b")
    for where in (
        "s3://bucket/shards", "https://host/shards/", "https://me:a%2Fb@host:80/a",
        "https://host/a@b?c=d:e@f", "abfs://box@account.net/a@b", "http://host:80/a%40b",
        "file:///a:b/c@d", "https://***@host/a?***",
    ):  # fmt: skip
        assert is_url(where)


def test_urls_are_folders_elsewhere(shards, many_shards):
    frames = read(many_shards)
    memory = fsspec.filesystem("memory")
    for path in [*shards.glob("*.tar"), shards / "manifest.json"]:
        memory.pipe(f"/shards-of-the-test/{path.name}", path.read_bytes())
    for where in (f"file://{shards}", "memory://shards-of-the-test/"):
        np.testing.assert_array_equal(read(where, threads=2), frames)
    name = sorted(shards.glob("*.tar"))[1].name
    memory.rm(f"/shards-of-the-test/{name}")
    with pytest.raises(InputError, match=f"memory://shards-of-the-test/{name}: no such"):
        read("memory://shards-of-the-test")
    memory.pipe("/shards-of-the-test/manifest.json", b"{}")
    with pytest.raises(InputError, match="memory://shards-of-the-test/manifest.json: damaged"):
        read("memory://shards-of-the-test")
    with pytest.raises(InputError, match="memory://nothing/manifest.json: no such"):
        read("memory://nothing")


def test_a_network_that_fails_is_tried_again_and_then_one_line(shards, monkeypatch):
    calls, waits, cat = [], [], LocalFileSystem.cat_file
    monkeypatch.setattr(stream, "WAITS_SECONDS", (1, 5))
    monkeypatch.setattr("time.sleep", waits.append)

    def fails(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) < 3 or "000002.tar" in path:
            raise ConnectionResetError("reset by\nthe peer")
        return cat(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "cat_file", fails)
    where = f"file://{shards}"
    with pytest.raises(InputError, match="shard-000002.tar: cannot be read .*: reset by\\)") as e:
        read(where)  # the manifest came at the third attempt
    assert "\n" not in str(e.value) and sum("000002" in c for c in calls) == 3
    assert waits == [1, 5, 1, 5]  # and none behind the last attempt


def test_a_protocol_that_is_not_installed_says_what_to_install(monkeypatch):
    def missing(url):
        raise ImportError("Install what it needs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    extra = re.escape("pip install 'sslus[url]', or")
    for url, said in (("s3://b/s", extra), ("gs://b/s", "pip install it, or")):
        with pytest.raises(InputError, match=f"{url}/manifest.json: Install what .*; {said}"):
            StreamStore.open(url)


def test_over_http(shards, many_shards):
    pytest.importorskip("aiohttp")
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        where = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(read(where), read(many_shards))
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_may_be_slow_but_not_silent(shards, many_shards, monkeypatch):
    """A connection that is dead would stop training for a quarter of an hour, and Ctrl-C with it;
    a large shard may take long."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(stream, "SILENT_SECONDS", 1)
    pause_seconds = 0.3

    class Handler(SimpleHTTPRequestHandler):
        def copyfile(self, source, to):
            data = source.read()
            with contextlib.suppress(OSError):  # the client has left
                for part in (data[:99], data[99:500], data[500:900], data[900:1000], data[1000:]):
                    to.write(part)
                    to.flush()
                    if self.path.endswith("shard-000001.tar"):
                        time.sleep(pause_seconds)

        log_message = lambda *_: None  # noqa: E731

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        where = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(read(where), read(many_shards))
        pause_seconds = 2.5
        with pytest.raises(InputError, match="shard-000001.tar: cannot be read .*Timeout"):
            read(where)
    finally:
        server.shutdown()
        server.server_close()


def test_a_url_with_a_password_and_a_signature_works_and_neither_is_shown(shards, many_shards):
    pytest.importorskip("aiohttp")

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            user = base64.b64decode(self.headers["Authorization"].removeprefix("Basic "))
            if user != b"me:/secret" or "?sig=1f" not in self.path:
                self.send_error(403)
            else:
                super().do_GET()

        log_message = lambda *_: None  # noqa: E731

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = f"127.0.0.1:{server.server_port}"
        where = f"http://me:%2Fsecret@{host}/?sig=1f"
        np.testing.assert_array_equal(read(where), read(many_shards))
        for wrong in (where.replace("sig=1f", "sig=1e"), where.replace("/?", "/none?")):
            with pytest.raises(InputError) as e:
                read(wrong)
            told = wrong.replace("me:%2Fsecret", "***").partition("?")[0].rstrip("/")
            assert str(e.value).startswith(f"{told}/manifest.json?***: ")
            assert "secret" not in str(e.value) and "sig=" not in str(e.value)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "url, told",
    [
        ("https://me:password@host/shards?signature=1f", "https://***@host/shards?***"),
        ("s3://key:secret@bucket/a@b", "s3://***@bucket/a@b"),
        ("s3:/key:secret@bucket/a@b", "s3:/***@bucket/a@b"),  # as pathlib makes it
        ("abfs:/box@account.net/a", "abfs:/box@account.net/a"),
        ("https://token@host/shards", "https://***@host/shards"),
        ("https://host/a?b=c\n&signature=1f", "https://host/a?***"),  # as it was pasted
        ("https://to%2Fk%40en%3A@host/shards", "https://***@host/shards"),
        ("https://to/ken@host/shards", "https://***@host/shards"),
        ("HTTP://to/ken@host", "HTTP://***@host"),
        ("abfs://to%3Aken@account.net/a", "abfs://***@account.net/a"),
        ("abfs://box@account.net/a", "abfs://box@account.net/a"),
        ("abfs://box:key@account.net/a", "abfs://***@account.net/a"),
        ("403, url='https://host/a?b=c&d'", "403, url='https://host/a?***"),
        ("what?/shards@home", "what?/shards@home"),
        ("s3://bucket/shards", "s3://bucket/shards"),
    ],
)
def test_what_is_shown_of_a_url(url, told):
    assert shown(url) == told


@pytest.mark.parametrize(
    "where",
    ["https://me:SE/CRET@host/shards", "https://me:SE@CRET@host", "https://SE@CRET@host/shards",
     "s3://me:SE?CRET@bucket", "gs://me:SE#CRET@bucket/a", "ftp://me:SE/CRET@host",
     "https://me:SE CRET@host/a", "http://me:SE@CRET/CRET@host/a", "http://me:12/SECRET@host",
     "https://SE?CRET@host/a", "https://SE CRET@host/a", "https://SE\u2100CRET@host/a"],
)  # fmt: skip
def test_a_password_that_is_not_encoded_is_refused_and_not_repeated(where, capsys):
    assert main(["train", where]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "percent-encode" in err
    assert not re.search("SE|CRET", err)


@pytest.mark.parametrize("url", ["https://{}@host/shards", "http://{}:SE%2FCRET@host/a"])
@pytest.mark.parametrize("token", ["SECRET", "SE%2FCRET%3A", "SE/CRET"])
@pytest.mark.parametrize(
    "line", ["train a {}", "train {} --resume --run a", "shard {}", "views {} -o a", "evaluate {}",
             "evaluate {} --labels a", "evaluate a --labels a --shards {}", "doctor {}"],
)  # fmt: skip
def test_no_error_repeats_a_token(line, token, url, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(url.format(token)) for word in line.split()])
    err = capsys.readouterr().err
    assert "Error: " in err and "Traceback" not in err
    assert not re.search("SE|CRET", err)


def test_dali_decodes_what_simplejpeg_does(many_shards, by_hand):
    """The pipeline of the GPU, here with DALI's decoder on the CPU."""
    pytest.importorskip("nvidia.dali")
    frames = np.stack([frame for frame, _ in by_hand(many_shards)])
    jpegs = []
    for path in sorted(many_shards.glob("*.tar"))[:2]:
        data = memoryview(path.read_bytes())
        jpegs += [data[o : o + n] for o, n in (m["jpg"] for _, m in tar.read_index(path))]
    decode = stream._GpuDecoder(1, device="cpu")
    for part in (slice(0, 16), slice(16, 32), slice(3, 7)):
        got = np.array(decode(jpegs[part]))[..., 0]
        assert np.abs(got.astype(int) - frames[part]).max() <= 1


def test_a_gpu_without_dali_reads_as_the_cpu_does(many_shards, monkeypatch):
    monkeypatch.setattr(stream, "_has_dali", lambda: False)
    np.testing.assert_array_equal(read(many_shards, device="cuda"), read(many_shards))
