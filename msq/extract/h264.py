"""Which H.264 packets a decoder may skip: those of pictures that certainly nothing refers to.

libav decides that by `nal_ref_idc` of each NAL unit alone, and while it may skip, it keeps quiet
about packets that give no picture. A reference whose bytes were destroyed would go by unseen, so
only packets that are whole in their outer form are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

_SLICE = 1  # of a picture that is no IDR; other kinds of slices are decoded, whatever they say
_NO_PICTURE = range(6, 13)  # SEI, parameter sets, delimiters, ends, filler data
_START = b"\0\0\1"


def length_size(extradata: bytes | None) -> int:
    """Bytes of the length before each NAL unit, 0 for a stream with start codes (ITU-T H.264 B).

    Args:
        extradata: of the stream; that of MP4 and Matroska is an `avcC` record (ISO 14496-15).
    """
    if not extradata or len(extradata) < 7 or extradata[0] != 1:
        return 0
    return (extradata[4] & 3) + 1


def nothing_refers_to(data: bytes, size: int) -> bool:
    """Whether a packet is of one picture that no other picture refers to, and of nothing unknown.

    Args:
        data: bytes of the packet.
        size: see `length_size`.
    """
    picture = False
    for header in _headers(data, size):
        kind = header & 0x1F
        if header & 0x80 or (kind != _SLICE and kind not in _NO_PICTURE):
            return False
        if kind == _SLICE:
            picture = True
            if header & 0x60:  # nal_ref_idc
                return False
    return picture


def _headers(data: bytes, size: int) -> Iterator[int]:
    """First byte of each NAL unit; 0x80, which none may have, where they do not fill the packet."""
    if not size:
        at = data.find(_START)
        while at >= 0:
            yield data[at + 3] if at + 3 < len(data) else 0x80
            at = data.find(_START, at + 3)
        return
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + size], "big")
        at += size
        yield data[at] if length and at + length <= len(data) else 0x80
        at += length
