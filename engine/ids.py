"""Ids of videos and patients: keyed hashes, from which no name can be guessed."""

import hashlib
import secrets
from pathlib import Path

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError
from sslus.engine.sources import Source

KEY_BYTES = 32
ID_BYTES = 8  # a collision becomes likely at 2^32 videos; it is checked for all the same


def find_key(local: Path, given: Path | None, merged: bool = False) -> bytes:
    """The secret from which ids are made: the one given, the one kept in local/, or a new one.

    Not a new one if local/ still tells of videos with the old ids, which would change unnoticed;
    but of `merged` shards, which never had a key.
    """
    kept = (local / "key", local / "work" / "key")  # work: of new, incomplete shards
    path = given or next((p for p in kept if p.exists()), None)
    if path is None and not merged and (local / "ledger.jsonl").exists():
        raise InputError(
            f"{kept[0]}: is missing, and with another key all videos would get other ids; put it"
            f" back, give it with --key, or delete {local} to get new ids"
        )
    try:
        text = secrets.token_hex(KEY_BYTES) if path is None else Path(path).read_text().strip()
        key = bytes.fromhex(text)
    except OSError as e:
        name = f"--key {path}" if given else path
        raise InputError(f"{name}: cannot be read ({e.strerror or e})") from e
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        remedy = "" if given else "; put it back, or delete it to get a new key and new ids"
        raise InputError(f"{path}: want {2 * KEY_BYTES} hex digits{remedy}")
    return key


def keep_key(folder: Path, key: bytes) -> None:
    """Store the key, so that a second run makes the same ids."""
    path, text = folder / "key", key.hex() + "\n"
    if not path.exists() or path.read_bytes() != text.encode():
        with atomic_file(path, "w", private=True) as f:
            f.write(text)


def keyed_hash(key: bytes, kind: str, name: str) -> str:
    """A hash from which names cannot be guessed without the key (BLAKE2b in keyed mode)."""
    return hashlib.blake2b(
        name.encode("utf-8", "surrogateescape"),
        key=key,
        digest_size=ID_BYTES,
        person=kind.encode().ljust(16, b"\0"),
    ).hexdigest()


def video_ids(sources: list[Source], key: bytes) -> dict[str, str]:
    """The id of each source by its name."""
    ids = {s.name: keyed_hash(key, "video", s.name) for s in sources}
    if len(set(ids.values())) < len(ids):
        raise InputError("two videos got the same id; delete local/key and start again")
    return ids
