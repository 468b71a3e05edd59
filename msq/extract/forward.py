"""A file read once from its beginning to its end, beside a decoder that is opened on its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from msq.extract.packets import Damage, UndecodableVideo, VideoPacket, open_stream, read_packets
from msq.extract.plan import Run


def new_decoder(path: Path, decoding: ExitStack) -> VideoCodecContext:
    """A decoder that has decoded nothing; the one before it is closed."""
    decoding.close()
    context: VideoCodecContext = decoding.enter_context(open_stream(path))[1].codec_context
    return context


class Forward:
    """The packets of a file, read once from its beginning to its end.

    Args:
        path: for messages.
        container: open, of which nothing was read.
        stream: its video stream.
    """

    def __init__(self, path: Path, container: InputContainer, stream: VideoStream) -> None:
        self._path = path
        self._source = read_packets(container, stream, Damage())
        self._held: deque[VideoPacket] = deque()
        self._read = 0

    def along(self, run: Run) -> Iterator[VideoPacket]:
        """The packets of a run, which none before has reached; they are not held."""
        while self._read <= run.last:
            packet = self._next()
            if self._read > run.first:
                yield packet

    def packets(self, run: Run, later: int) -> list[VideoPacket]:
        """The packets of a run; those before it and before `later` are forgotten."""
        keep = min(run.first, later)
        while self._held and self._read - len(self._held) < keep:
            self._held.popleft()
        while self._read <= run.last:
            packet = self._next()
            if self._read > keep:
                self._held.append(packet)
        begin = run.first - (self._read - len(self._held))
        return list(islice(self._held, begin, begin + run.last - run.first + 1))

    def _next(self) -> VideoPacket:
        packet = next(self._source, None)
        if packet is None:
            raise changed(self._path)
        self._read += 1
        return packet


def changed(path: Path) -> UndecodableVideo:
    """The error of a file that has fewer frames than its survey found."""
    return UndecodableVideo(
        path, "expected the frames that were there a moment ago, found fewer: the file was changed"
    )
