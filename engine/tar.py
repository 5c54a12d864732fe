"""Reproducible USTAR archives and their DALI index.

Written by hand because the bytes must depend only on the frames (not on clock, user or umask), and
because a header costs 4 us here but 40 us in the standard library, twice per frame.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError
from sslus.engine.manifest import REMEDY

BLOCK = 512
RECORD = 10240  # the length of an archive is a multiple of this
NAME_BYTES = 100  # what a USTAR header holds without a prefix field
INDEX_VERSION = "v1.2"


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: regular file, mode 644, no owner, time 0."""
    raw = name.encode("ascii")
    if len(raw) > NAME_BYTES:
        raise ValueError(f"tar: a member's name has at most {NAME_BYTES} bytes, got {name!r}")
    if not 0 <= size < 8**11:
        raise ValueError(f"tar: a member has 0 to 8 GiB, got {size} bytes")
    out = bytearray(BLOCK)
    out[: len(raw)] = raw
    out[100:108] = b"0000644\0"
    out[108:124] = b"0000000\0" * 2  # uid, gid
    out[124:136] = b"%011o\0" % size
    out[136:148] = b"00000000000\0"  # mtime
    out[148:156] = b" " * 8  # the checksum counts its own field as spaces
    out[156] = ord("0")
    out[257:265] = b"ustar\x0000"
    out[148:156] = b"%06o\0 " % sum(out)
    return bytes(out)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> tuple[int, str]:
    """Write samples (key, {extension: bytes}) as `path` and the DALI index `path`.idx.

    Both files are written atomically. Returns the archive's length in bytes and its sha256.
    """
    digest, offset, samples_at = hashlib.sha256(), 0, []
    with atomic_file(path) as f:

        def put(data: bytes) -> None:
            nonlocal offset
            f.write(data)
            digest.update(data)
            offset += len(data)

        for key, members in samples:
            places = {}
            for extension, data in members.items():
                put(header(f"{key}.{extension}", len(data)))
                places[extension] = offset, len(data)
                put(data + b"\0" * (-len(data) % BLOCK))
            samples_at.append((key, places))
        put(b"\0" * (2 * BLOCK))
        put(b"\0" * (-offset % RECORD))
    write_index(path, samples_at)
    return offset, digest.hexdigest()


def write_index(shard: Path, samples: list[tuple[str, dict[str, tuple[int, int]]]]) -> None:
    """Write the DALI index of a shard, atomically; samples: as `read_index` gives them."""
    with atomic_file(index_path(shard), "w") as f:
        f.write(f"{INDEX_VERSION} {len(samples)}\n")
        for key, members in samples:
            parts = (f"{x} {offset} {size} {key}.{x}" for x, (offset, size) in members.items())
            f.write(" ".join(parts) + "\n")


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx")


def read_index(shard: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """The samples of a shard: (key, {extension: (offset, size)}), without reading the archive.

    Raises InputError if the index is missing or invalid, or points past the end of the archive.
    """
    path = index_path(shard)
    samples = []
    try:
        length = shard.stat().st_size
        first, *lines = path.read_text().splitlines()
        version, count = first.split()
        for line in lines:
            words, members = line.split(), {}
            for i in range(0, len(words), 4):
                offset, size = int(words[i + 1]), int(words[i + 2])
                members[words[i]] = offset, size
                if offset + size > length:
                    raise InputError(
                        f"{shard}: shorter than its index says: truncated or replaced; {REMEDY}"
                    )
            key = words[3].partition(".")[0]
            samples.append((key, members))
        if version != INDEX_VERSION or len(samples) != int(count):
            raise ValueError
    except InputError:
        raise
    except OSError as e:
        raise InputError(f"{e.filename}: {e.strerror}; {REMEDY}") from e
    except (ValueError, IndexError) as e:
        raise InputError(f"{path}: not a {INDEX_VERSION} index; {REMEDY}") from e
    return samples


@dataclass(frozen=True)
class Sample:
    key: str
    jpg: tuple[int, int]  # offset, length
    json: tuple[int, int]


class Archive:
    """A shard, in memory or memory-mapped, and where its samples are by its own headers.

    Raises InputError if it is damaged, or does not hold `num_frames` samples.
    """

    def __init__(self, name: str, data, num_frames: int):
        self.name, self.data, self.samples = name, memoryview(data), []
        found: dict[str, dict[str, tuple[int, int]]] = {}
        offset = 0

        def damaged(why: str) -> InputError:
            return InputError(f"{name}: {why}; {REMEDY}")

        while offset + BLOCK <= len(data) and data[offset]:
            raw, _, _ = bytes(data[offset : offset + NAME_BYTES]).partition(b"\0")
            member = raw.decode("ascii", "replace")
            try:
                length = int(bytes(data[offset + 124 : offset + 136]).strip(b"\0 "), 8)
            except ValueError as e:
                raise damaged(f"no valid tar header at {member!r}") from e
            offset += BLOCK
            if not 0 <= length <= len(data) - offset:
                raise damaged(f"ends inside {member}")
            key, _, extension = member.partition(".")
            if extension in ("jpg", "json"):  # nothing else is read, let alone unpickled
                found.setdefault(key, {})[extension] = (offset, length)
            offset += -(-length // BLOCK) * BLOCK
        for key, parts in found.items():
            if len(parts) < 2:
                raise damaged(f"{key} has no {'json' if 'jpg' in parts else 'jpg'}")
            self.samples.append(Sample(key, parts["jpg"], parts["json"]))
        if len(self.samples) != num_frames:
            raise damaged(f"holds {len(self.samples)} frames, but the manifest says {num_frames}")

    def part(self, place: tuple[int, int]) -> memoryview:
        return self.data[place[0] : sum(place)]
