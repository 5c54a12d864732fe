"""Whether a video file was cut off, as by a full disk or a broken connection."""

import os
import re
import struct
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the object that tells its size


def breaks_off(f: BinaryIO | None, container, last: list) -> bool:
    """Whether a file ends too early, so that its last packet may be damaged.

    last: the last two packets of the video; most demuxers flag those of which bytes are missing.
    In other formats the end of the file shows it, in some nothing does: raw H.264 and HEVC, or an
    MPEG-TS that is cut between two of its packets. f: the file, opened when the container was, for
    its path may lead nowhere by now; None if the video is only a part of it, and its end tells
    nothing.
    """
    if any(packet.is_corrupt for packet in last):
        return True
    rules = [CUT_SHORT[name] for name in container.format.name.split(",") if name in CUT_SHORT]
    if f is None or not rules:
        return False
    return rules[0](f, f.seek(0, os.SEEK_END), last[-1])


def cut_asf(f: BinaryIO, size: int, packet=None) -> bool:
    """Whether the file is shorter than its header says."""
    f.seek(0)
    head = f.read(1 << 16)
    at = head.find(ASF_PROPERTIES)
    if at < 0 or len(head) < at + 92 or head[at + 88] & 1:  # live: its size was not yet known
        return False
    return size < int.from_bytes(head[at + 40 : at + 48], "little")


def cut_flv(f: BinaryIO, size: int) -> bool:
    """Whether the file is shorter than its header says; or may be, where that says nothing."""
    f.seek(0)
    said = re.search(rb"\0\x08filesize\0(.{8})", f.read(1 << 16), re.DOTALL | re.IGNORECASE)
    return said is None or size < struct.unpack(">d", said[1])[0]


def _cut_dv(f: BinaryIO, size: int, packet) -> bool:
    return packet.pos + packet.size > size  # FFmpeg fills up the last frame


def _cut_gif(f: BinaryIO, size: int, packet) -> bool:
    """It ends in ";" behind an image; behind that there may be zeros and an ID3 tag."""
    tail = _tail(f, size).rstrip(b"\0")
    return bool(tail) and b"\0;" not in tail[-130:]


def _cut_jpeg(f: BinaryIO, size: int, packet) -> bool:
    return b"\xff\xd9" not in bytes(packet)  # the mark of its end, which image data cannot hold


def _cut_mp4(f: BinaryIO, size: int, packet) -> bool:
    return not packet.stream.frames and _ends_inside(f, size, packet, 0, _mp4_box)


def _cut_ts(f: BinaryIO, size: int, packet) -> bool:
    """Its packets are 188 bytes long, begin with 0x47, and in some files have 4 or 16 more."""
    tail = _tail(f, size)
    for length in (188, 192, 204):
        for phase in range(length):
            starts = tail[phase::length]
            if starts[-6:] == 6 * b"\x47":
                return (len(tail) - phase - 1) % length < 187
    return False


def _cut_y4m(f: BinaryIO, size: int, packet) -> bool:
    f.seek(packet.pos + packet.size)
    rest = f.read(5)  # of a further frame, or anything
    return rest != b"" and b"FRAME".startswith(rest)


def _tail(f: BinaryIO, size: int) -> bytes:
    f.seek(max(0, size - (1 << 16)))
    return f.read()


def _ends_inside(f: BinaryIO, size: int, packet, at: int, length: Callable[[bytes], int]) -> bool:
    """Whether a file that is a row of items from `at` on ends inside one. length(head): that of
    the item which begins so, 0 if it is none: what follows the last one."""
    while at < size:
        f.seek(at)
        step = length(f.read(ITEM_HEAD_BYTES).ljust(ITEM_HEAD_BYTES, b"\0"))
        if not step:
            return False
        at += step
    return at > size


def _flv_tag(head: bytes) -> int:
    """With the length of the tag before, which comes first."""
    return 15 + int.from_bytes(head[5:8]) if head[4] in (8, 9, 18) else 0


def _mp4_box(head: bytes) -> int:
    if head[4:8] not in MP4_BOXES:
        return 0
    length = int.from_bytes(head[:4])
    return length if length != 1 else int.from_bytes(head[8:16])


def _ogg_page(head: bytes) -> int:
    return 27 + head[26] + sum(head[27 : 27 + head[26]]) if head[:4] == b"OggS" else 0


def _matroska_element(head: bytes) -> int:
    """RFC 8794, sections 4 to 6. Of a segment, and a cluster of unknown length, only the head."""
    at = 9 - head[0].bit_length()  # bytes of its name
    end = at + 9 - head[at].bit_length()
    name, mark = head[:at].hex(), 1 << 7 * (end - at)
    if name not in MATROSKA_ELEMENTS or not head[at]:
        return 0
    length = int.from_bytes(head[at:end]) - mark
    return end if name == "18538067" or length == mark - 1 else end + length


ITEM_HEAD_BYTES = 27 + 255  # of an Ogg page
MP4_BOXES = frozenset(b"ftyp styp moov moof mdat sidx mfra free skip wide uuid prft emsg".split())
MATROSKA_ELEMENTS = frozenset(
    "1a45dfa3 18538067 114d9b74 1549a966 1654ae6b 1f43b675 1c53bb6b 1254c367 1043a770 1941a469"
    " ec bf e7 a7 ab a3 a0".split()
)
# By format, rule(f, size, packet): whether the file is cut short; packet is the last one.
CUT_SHORT = {
    "asf": cut_asf,
    "dv": _cut_dv,
    "flv": partial(_ends_inside, at=9, length=_flv_tag),
    "gif": _cut_gif,
    "matroska": partial(_ends_inside, at=0, length=_matroska_element),
    "mjpeg": _cut_jpeg,
    "mp4": _cut_mp4,
    "mpegts": _cut_ts,
    "ogg": partial(_ends_inside, at=0, length=_ogg_page),
    "yuv4mpegpipe": _cut_y4m,
}
