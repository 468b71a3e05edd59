"""Packets that an edit list hides: decoded since shown frames refer to them, and not shown.

libav throws their frames away inside the decoder, and with them the word that one is damaged. They
are decoded as if they were shown, so that they can be looked at.
"""

from __future__ import annotations

from typing import Any, cast

import av
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext

from msq.extract.packets import VideoPacket


class _Hidden:
    """What the frame of a hidden packet carries; PyAV loses one that several packets share."""


def revealed(context: VideoCodecContext, packet: VideoPacket | None) -> VideoPacket | None:
    """The packet to decode in the place of this one: its frame comes out, see `is_hidden`."""
    if packet is None or not packet.is_discard or packet.pts is None:
        return packet
    context.flags |= Flags.copy_opaque  # a frame says which packet it is of
    copy = av.Packet(packet.size)  # of bytes it would lack the padding that decoders read into
    copy.update(cast("Any", packet))
    for side in packet.iter_sidedata():  # parameter sets that change with the packet
        copy.set_sidedata(side, move=True)
    copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
    copy.is_keyframe = packet.is_keyframe
    copy.opaque = _Hidden()
    return cast("VideoPacket", copy)


def is_hidden(frame: av.VideoFrame) -> bool:
    """Whether a frame is one that no player shows."""
    return isinstance(frame.opaque, _Hidden)
