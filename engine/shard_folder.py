"""The folder of shards: what is in it, what it was made from, and how all of it is replaced.

OUT/manifest.json, shard-*    what is shared; with the manifest, the folder is complete
OUT/store/                    made by training, from the shards
OUT/local/                    the shards' key, ledger and request (what was asked for); mode 700
OUT/local/work/               the key and the ledger of the next shards, and their videos' spools
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from sslus.engine import manifest as manifests
from sslus.engine.atomic import atomic_file, sync_folder
from sslus.engine.errors import InputError
from sslus.engine.ids import keep_key
from sslus.engine.lock import alone
from sslus.engine.manifest import Manifest, read_manifest
from sslus.engine.tar import index_path

LEDGER = "ledger.jsonl"
REQUEST = "request.json"


class ShardFolder:
    """A request is a dict of what determines the shards, and must be the same after JSON:

    {"settings": the fields of Settings, "decoder": [names], "decoding": its version,
     "sources": {name: [id, size, modification time]}, "labels": a digest or None}

    local/request.json adds the manifest's "digest", which says to which shards local/ belongs.
    Merged shards (engine/merge.py) have no key, and a request of "merged", the digests of the
    shards that they come from, and "sources".
    """

    def __init__(self, out: Path):
        self.out, self.local, self.work = out, out / "local", out / "local" / "work"

    def refuse_strangers(self) -> None:
        """Only what an earlier run has made is ever replaced: `-o .` may be anybody's folder."""
        keys = (folder / "key" for folder in (self.local, self.work))
        if any(key.exists() for key in keys) or self._is_ours() or self.is_merging():
            return
        patterns = (manifests.NAME, "shard-*.tar", "shard-*.idx", "store", "local/*")
        for path in (path for pattern in patterns for path in self.out.glob(pattern)):
            # A run that ended before it did anything leaves the lock, and a merge an empty folder.
            if path != self.local / "lock" and (path != self.work or self._is_anything_in_work()):
                raise InputError(
                    f"{path}: is in the way, and nothing here says that `sslus shard` made it;"
                    " move it away, or name another folder with -o"
                )

    def _is_ours(self) -> bool:
        """Whether shards are there, of any version, damaged or not, and the manifest says so."""
        try:
            return '"frames_per_shard"' in (self.out / manifests.NAME).read_text(errors="replace")
        except OSError:
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold its lock, so that two runs cannot mix."""
        self.local.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # of a shared folder: see `is_private`
            self.local.chmod(0o700)
        busy = f"{self.out}: another `sslus shard` is writing here; wait for it"
        with alone(self.local / "lock", busy):
            yield

    def is_private(self) -> bool:
        """Whether nobody else can read local/. Some file systems keep no permissions."""
        return not self.local.stat().st_mode & 0o077

    # ------------------------------------------------------------ the shards that are there

    def has_shards(self) -> bool:
        return (self.out / manifests.NAME).exists()

    def request(self):
        """What the shards were made from; None if that is missing or damaged."""
        return _read_json(self.local / REQUEST)

    def is_merged(self) -> bool:
        """Whether the shards there come from `sslus merge`."""
        return self.has_shards() and _is_merged(self.request())

    def ledger(self) -> list[dict]:
        """Raises OSError or ValueError if it is missing or damaged."""
        return [json.loads(line) for line in (self.local / LEDGER).read_text().splitlines()]

    def finished(self, request: dict) -> tuple[Manifest, list[dict]] | None:
        """Manifest and ledger, if the folder is complete and holds exactly what is asked for."""
        was = self.request()
        try:
            manifest, ledger = read_manifest(self.out), self.ledger()
        except PermissionError:  # no reason for --force, which would replace them
            raise
        except (OSError, ValueError):  # ValueError: InputError, or neither UTF-8 nor JSON
            return None
        if was != request | {"digest": manifest.digest} or len(ledger) != len(request["sources"]):
            return None
        return (manifest, ledger) if self.is_whole(manifest) else None

    def is_whole(self, manifest: Manifest) -> bool:
        """Whether all shards are there, with their lengths, and their indexes."""
        paths = ((self.out / entry["name"], entry["bytes"]) for entry in manifest.shards)
        return all(
            path.exists() and path.stat().st_size == length and index_path(path).exists()
            for path, length in paths
        )

    def refusal(self, request: dict) -> str:
        """Why the shards that are there are not those of the request."""
        was = self.request()
        if not (self.local / REQUEST).exists():
            return f"has shards, but what they were made from is not in {self.local}; put that back"
        if what := _differences(was, request):
            return f"the shards there are of other videos, labels or settings ({what})"
        return f"the shards there are damaged, of another version, or not those of {self.local}"

    def record(self, ledger: list[dict], request: dict, digest: str) -> None:
        """What is known of the files behind the shards that are there."""
        _write_ledger(self.local / LEDGER, ledger)
        self._write_request(request, digest)

    def _write_request(self, request: dict, digest: str) -> None:
        with atomic_file(self.local / REQUEST, "w", private=True) as f:
            json.dump(request | {"digest": digest}, f)

    def record_moves(self, ledger: list[dict], places: dict[str, str]) -> list[dict]:
        """The ledger with the current paths of the videos, by id: evaluation looks them up."""
        now = [line | {"source": places[line["id"]]} for line in ledger]
        if now != ledger:
            _write_ledger(self.local / LEDGER, now)
        return now

    # ------------------------------------------------------------ the next ones

    def begin(self, request: dict, anew: bool) -> None:
        """Make the work folder. Spools with other frames are deleted; so are, when a finished
        folder is made `anew`, spools that do not come from an earlier attempt at that."""
        made_for, wanted = self.work / REQUEST, frames_by(request)
        usable = [wanted | {"anew": a} for a in {True, anew}]
        if self.work.exists() and _read_json(made_for) not in usable:
            shutil.rmtree(self.work)
        self.work.mkdir(exist_ok=True)
        self.remove_halves()  # of a run that was killed
        with atomic_file(made_for, "w") as f:
            json.dump(wanted | {"anew": anew}, f)

    def is_merging(self) -> bool:
        """Whether the work folder is that of `sslus merge`."""
        return _is_merged(_read_json(self.work / REQUEST))

    def _is_anything_in_work(self) -> bool:
        """Anything but what `begin_merging` was writing when it was killed."""
        return any(path.name != f"{REQUEST}.tmp" for path in self.work.iterdir())

    def begin_merging(self, request: dict) -> None:
        """Make the work folder anew."""
        self.give_up()
        self.work.mkdir()
        with atomic_file(self.work / REQUEST, "w", private=True) as f:
            json.dump(request, f)

    def remove_halves(self) -> None:
        """Delete files of the work folder that were interrupted while they were written."""
        for half in self.work.rglob("*.tmp"):
            half.unlink()

    def write_ledger(self, ledger: list[dict]) -> Path:
        """In the work folder: it replaces the old one with the shards."""
        _write_ledger(self.work / LEDGER, ledger)
        return self.work / LEDGER

    def replace(self, manifest: Manifest, request: dict, key: bytes | None) -> None:
        """Put what is in the work folder in the place of the old shards, and delete that folder.

        Until the manifest is written, last, the folder counts as unfinished and the spools still
        exist: a crash in here costs only the second pass.
        """
        (self.out / manifests.NAME).unlink(missing_ok=True)
        shutil.rmtree(self.out / "store", ignore_errors=True)  # training makes one of the new
        for old in [*self.out.glob("shard-*.tar"), *self.out.glob("shard-*.idx")]:
            old.unlink()
        for path in sorted((self.work / "new").iterdir()):
            path.rename(self.out / path.name)
        if key:
            keep_key(self.local, key)
        (self.work / LEDGER).replace(self.local / LEDGER)
        sync_folder(self.local)
        sync_folder(self.out)
        self._write_request(request, manifest.digest)
        manifest.write(self.out)
        shutil.rmtree(self.work)

    def give_up(self) -> None:
        """Delete the work folder, of a run that was stopped."""
        shutil.rmtree(self.work, ignore_errors=True)


def _is_merged(request) -> bool:
    return isinstance(request, dict) and "merged" in request


def frames_by(request: dict) -> dict:
    """The part of a request that determines the frames of a video."""
    settings = {k: v for k, v in request["settings"].items() if k != "frames_per_shard"}
    return {"settings": settings} | {k: request[k] for k in ("decoder", "decoding")}


def _differences(old, new: dict) -> str:
    """In what a request differs from the one that made the shards; "" if that cannot be said."""
    try:
        was, now = old["settings"], new["settings"]
        before, after = old["sources"], new["sources"]
        found = [f"{k} was {was[k]}, now {v}" for k, v in now.items() if was[k] != v]
        if old["labels"] != new["labels"]:
            state = "none before" if old["labels"] is None else "now none"
            found.append("labels" + f": {state}" * (None in (old["labels"], new["labels"])))
        if old["decoder"] != new["decoder"]:
            found.append(f"decoder was {'+'.join(old['decoder'])}, now {'+'.join(new['decoder'])}")
        both = before.keys() & after.keys()
        changed = sum(before[name] != after[name] for name in both)
        for num, word in (
            (len(after) - len(both), "added"), (len(before) - len(both), "gone"),
            (changed, "changed"),
        ):  # fmt: skip
            if num:
                found.append(f"{num} of the videos {word}")
    except (KeyError, TypeError, AttributeError):
        return ""
    return "; ".join(found)


def _read_json(path: Path):
    """None if the file does not exist or is damaged. Raises PermissionError."""
    try:
        return json.loads(path.read_text())
    except PermissionError:
        raise
    except (OSError, ValueError):
        return None


def _write_ledger(path: Path, ledger: list[dict]) -> None:
    with atomic_file(path, "w", private=True) as f:
        f.writelines(json.dumps(line) + "\n" for line in ledger)
