"""Several folders of shards -> one: of several clinics, say, that share neither videos nor names.

Shards describe their frames themselves, so they are taken as they are, under new numbers.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError
from sslus.engine.labels import real
from sslus.engine.manifest import Manifest, read_manifest
from sslus.engine.shard_folder import REQUEST, ShardFolder
from sslus.engine.stream import StreamStore, fetch_shard
from sslus.engine.tar import write_index
from sslus.engine.urls import is_url, shown


@dataclass(frozen=True)
class MergeReport:
    out: Path
    manifest: Manifest
    num_folders: int
    num_named: int  # folders whose local/ tells which file a video is
    num_linked: int = 0  # shards that take no space of their own
    already: bool = False  # there was nothing to do
    seconds: float = 0.0


def merge(
    folders: list[str | Path],
    out: Path,
    *,
    report: Callable[[int, int, str], None] | None = None,
) -> MergeReport:
    """Merge folders or URLs of shards, with frames of one size, into the folder `out`.

    Shards are hard links where the file system can, else copies; all are verified. Their order, and
    so the result, does not depend on that of the folders. What their local/ folders tell of files
    is merged too, where there are any; a second call brings that up to date. `report(frames, total,
    note)` is called after each shard.

    Raises InputError for folders that share a video, for a damaged shard, and if `out` holds
    anything else; OSError, as of a full disk. No shards are left then.
    """
    start = time.monotonic()
    target = ShardFolder(Path(out))
    stores = _open(folders, target.out)
    manifest = _joined(stores)
    target.refuse_strangers()
    with target.locked():
        ledger, sources, num_named = _names(stores)
        request = {"merged": [s.digest for s in stores], "sources": sources}
        told = MergeReport(target.out, manifest, len(stores), num_named, already=True)
        shards_begun = (target.work / REQUEST).exists() and not target.is_merging()
        if target.has_shards():
            if read_manifest(target.out).digest != manifest.digest:
                raise InputError(
                    f"{target.out}: has other shards; remove them, or name another folder with -o"
                )
            if target.is_whole(manifest):
                if not shards_begun:  # what is there is of a run killed while it deleted that
                    target.give_up()
                target.record(ledger, request, manifest.digest)
                return told
        if shards_begun:
            raise InputError(
                f"{target.out}: has videos of an unfinished `sslus shard`; finish it, or name"
                " another folder with -o"
            )
        try:
            target.begin_merging(request)
            num_linked = _write(stores, manifest, target.work / "new", report)
            target.write_ledger(ledger)
        except BaseException:
            target.give_up()
            raise
        target.replace(manifest, request, key=None)
    return MergeReport(
        target.out, manifest, len(stores), num_named, num_linked,
        seconds=time.monotonic() - start,
    )  # fmt: skip


def _open(folders: list[str | Path], out: Path) -> list[StreamStore]:
    """In the order of their digests."""
    if len(folders) < 2:
        raise InputError("want two folders of shards or more")
    stores = []
    for where in folders:
        if not is_url(str(where)) and real(where) == real(out):
            raise InputError(f"{where}: is also the folder to write to; name another one with -o")
        stores.append(StreamStore.open(where))
        if not len(stores[-1]):
            raise InputError(f"{_name(stores[-1])}: holds no frames")
    stores.sort(key=attrgetter("digest"))
    for a, b in zip(stores, stores[1:], strict=False):
        if a.digest == b.digest:
            raise InputError(f"{_name(a)} and {_name(b)} are the same shards; name them once")
    small, large = min(stores, key=attrgetter("size")), max(stores, key=attrgetter("size"))
    if small.size != large.size:
        raise InputError(
            f"{_name(small)} has frames of {small.size} pixels, but {_name(large)} of"
            f" {large.size}; make one of them again with sslus shard --size"
        )
    return stores


def _name(store: StreamStore) -> str:
    return shown(store.where)


def _joined(stores: list[StreamStore]) -> Manifest:
    """The manifest of all shards, which follows from theirs."""
    parts = [s.manifest for s in stores]
    num = sum(m.num_frames for m in parts)
    mean = sum(m.num_frames * m.mean for m in parts) / num
    square = sum(m.num_frames * (m.mean**2 + m.std**2) for m in parts) / num
    entries = [entry for m in parts for entry in m.shards]
    known = dict.fromkeys(key for m in parts for key in m.settings)
    return Manifest(
        settings={key: _common([m.settings.get(key) for m in parts]) for key in known},
        num_videos=sum(m.num_videos for m in parts),
        num_frames=num,
        mean=round(mean, 9),
        std=round(max(square - mean**2, 0.0) ** 0.5, 9),
        labels=sorted({label for m in parts for label in m.labels}),
        decoders=dict(sorted(sum((Counter(m.decoders) for m in parts), Counter()).items())),
        shards=[entry | {"name": f"shard-{i:06d}.tar"} for i, entry in enumerate(entries)],
    ).with_digest()


def _common(values: list):
    """The value that all have, or a text that lists them; some may be such texts already."""
    if all(value == values[0] for value in values):
        return values[0]
    return " | ".join(sorted({x for value in values for x in str(value).split(" | ")}))


def _names(stores: list[StreamStore]) -> tuple[list[dict], dict, int]:
    """Ledger and sources (see ShardFolder) of all, and how many folders have a ledger."""
    ledger, sources, where = [], {}, {}
    for store in stores:
        folder = ShardFolder(Path(store.where))
        if is_url(store.where) or not folder.local.is_dir():
            continue
        try:
            lines = folder.ledger()
            for path in {real(line["source"]) for line in lines if line["id"]}:
                if path in where:
                    raise InputError(
                        f"{path} is a file of both {where[path]} and {_name(store)}: labels.csv"
                        " could not tell them apart, if they are not one and the same. Move one of"
                        " the two local/ folders away, or make one of the two shards without it"
                    )
                where[path] = _name(store)
        except (OSError, ValueError, KeyError, TypeError) as e:
            if isinstance(e, InputError | PermissionError):
                raise
            raise InputError(
                f"{folder.local}: its ledger is missing or damaged ({e}); put it back, or move this"
                " folder away: then no labels.csv finds these videos"
            ) from e
        ledger += lines
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # sizes are only a check
            of = folder.request()["sources"]
            sources |= {f"{store.digest[:16]}/{name}": facts for name, facts in of.items()}
    return ledger, sources, len(set(where.values()))


def _write(stores: list[StreamStore], manifest: Manifest, new: Path, report) -> int:
    """Verify all shards and put them into the folder `new`; returns how many are links."""
    new.mkdir()
    names, owner = iter(manifest.shards), {}
    done = num_linked = 0
    for store in stores:
        for entry in store.manifest.shards:
            shard = fetch_shard(store.where, entry)
            for video in {sample.key.rpartition("-")[0] for sample in shard.samples}:
                if owner.setdefault(video, store) is not store:
                    raise InputError(
                        f"{_name(owner[video])} and {_name(store)} both hold the video {video}:"
                        " they were made of the same videos with the same key; make one of them"
                        " again without those that both have"
                    )
            path = new / next(names)["name"]
            num_linked += _place(Path(store.where) / entry["name"], shard.data, path)
            write_index(path, [(s.key, {"jpg": s.jpg, "json": s.json}) for s in shard.samples])
            done += entry["num_frames"]
            if report:
                report(done, manifest.num_frames, _name(store))
    return num_linked


def _place(source: Path, data: memoryview, path: Path) -> bool:
    """Make `path` a link to the file `source`, or a file with this data; whether it is a link."""
    try:
        os.link(real(source), path)
        return True
    except OSError:  # another file system, one without links, somebody else's file, a URL
        with atomic_file(path) as f:
            f.write(data)
        return False
