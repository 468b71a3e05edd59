"""What the packets of an H.264 stream say of references, before they are decoded.

libav skips pictures by the `nal_ref_idc` of each NAL unit alone, and while it may skip, it keeps
quiet about packets that give no picture. A reference whose bytes were destroyed would go by unseen.
So only packets that are whole in their outer form are skipped, and what is decoded tells by its
`frame_num` whether one of those was a reference. ITU-T H.264, 7.3 and 7.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_SLICE, _IDR, _PARAMETERS = 1, 5, 7
_NO_PICTURE = range(6, 13)  # SEI, parameter sets, delimiters, ends, filler data
_START = b"\0\0\1"
_HEADER = 24  # bytes that hold a slice header up to `frame_num`, with room to spare
_WITH_CHROMA = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244})  # profiles


class _Form(NamedTuple):
    """What a sequence parameter set says: bits of `frame_num`, of `colour_plane_id`, gaps."""

    bits: int
    plane: int
    gaps: bool


class References:
    """The packets of one run, in decode order.

    Args:
        extradata: of the stream; that of MP4 and Matroska is an `avcC` record (ISO 14496-15).
    """

    def __init__(self, extradata: bytes | None) -> None:
        data = extradata or b""
        record = len(data) > 6 and data[0] == 1
        self._size = (data[4] & 3) + 1 if record else 0  # bytes of the length before each unit
        self._forms: set[_Form | None] = set()
        self._last: int | None = None  # `frame_num` of the last reference
        self._skipped = False  # something, since then
        for unit in _sets(data) if record else _units(data, 0):
            self._learn(unit)

    def skips(self, packet: bytes) -> bool:
        """Whether a packet is of one picture that no other refers to, and of nothing unknown.

        A reference that was turned into such a picture is found by `lost` at the next one.
        """
        picture = False
        for unit in _units(packet, self._size):
            header = unit[0] if unit else 0x80
            kind = header & 0x1F
            if header & 0x80 or (kind != _SLICE and kind not in _NO_PICTURE):
                return False
            if kind == _SLICE:
                picture = True
                if header & 0x60:  # nal_ref_idc
                    return False
        self._skipped = self._skipped or picture
        return picture

    def lost(self, packet: bytes) -> bool:
        """Whether a packet that is decoded says that what was skipped before it was a reference.

        Counting from reference to reference, `frame_num` goes up by one. Where it cannot be known
        (parameter sets that differ, gaps that are allowed) the answer is no; so it is of a
        reference that the file does not have, which no decoder finds fault with.
        """
        for unit in _units(packet, self._size):
            self._learn(unit)
            kind = unit[0] & 0x1F if unit else 0
            if kind in (_SLICE, _IDR):
                return self._breaks_off(unit)
        return False

    def _learn(self, unit: bytes) -> None:
        if unit and unit[0] & 0x1F == _PARAMETERS:
            self._forms.add(_form(unit))

    def _breaks_off(self, unit: bytes) -> bool:
        """Whether a slice does not follow on the last reference."""
        form = next(iter(self._forms)) if len(self._forms) == 1 else None
        if form is None or form.gaps:
            return False
        try:
            bits = _Bits(unit[1:_HEADER])
            for _ in range(3):  # first macroblock, kind, picture parameter set
                bits.golomb()
            bits.take(form.plane)
            number = bits.take(form.bits)
        except EOFError:  # the decoder will say so
            return False
        last, skipped, idr = self._last, self._skipped, unit[0] & 0x1F == _IDR
        if unit[0] & 0x60:
            self._last, self._skipped = number, False
        if idr or last is None or not skipped:
            return False
        return (number - last) % (1 << form.bits) not in (0, 1)  # two fields have one number


class _Bits:
    """Bits of a NAL unit, without the bytes that keep start codes out of it."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\0\0\3", b"\0\0")
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        """An unsigned number of so many bits."""
        self._left -= count
        if self._left < 0:
            raise EOFError
        return (self._value >> self._left) & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned number as `ue(v)`."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def signed(self) -> int:
        """A number as `se(v)`."""
        code = self.golomb()
        return (code + 1) // 2 if code % 2 else -(code // 2)


def _form(unit: bytes) -> _Form | None:
    """What a sequence parameter set says; None where it is cut off."""
    bits = _Bits(unit[1:])
    try:
        profile, plane = bits.take(8), 0
        bits.take(16)
        bits.golomb()
        if profile in _WITH_CHROMA:
            chroma = bits.golomb()
            plane = 2 * bits.take(1) if chroma == 3 else 0
            bits.golomb()
            bits.golomb()
            bits.take(1)
            if bits.take(1):
                for i in range(12 if chroma == 3 else 8):
                    if bits.take(1):
                        _pass_scaling(bits, 16 if i < 6 else 64)
        number = bits.golomb() + 4
        order = bits.golomb()
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.take(1)
            bits.golomb()
            bits.golomb()
            for _ in range(bits.golomb()):
                bits.golomb()
        bits.golomb()
        return _Form(number, plane, bool(bits.take(1)))
    except EOFError:
        return None


def _pass_scaling(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


def _sets(record: bytes) -> Iterator[bytes]:
    """The sequence parameter sets of an `avcC` record."""
    at = 6
    for _ in range(record[5] & 31):
        length = int.from_bytes(record[at : at + 2], "big")
        yield record[at + 2 : at + 2 + length]
        at += 2 + length


def _units(data: bytes, size: int) -> Iterator[bytes]:
    """The NAL units of a packet; an empty one where they do not fill it.

    Args:
        data: the packet.
        size: bytes of the length before each unit, 0 where start codes are between them.
    """
    if not size:
        at = data.find(_START)
        while at >= 0:
            following = data.find(_START, at + 3)
            yield data[at + 3 : following if following >= 0 else len(data)]
            at = following
        return
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + size], "big")
        at += size
        yield data[at : at + length] if at + length <= len(data) else b""
        at += length
