"""Reads the pictures of a recording by presentation time, with PyAV; sound.py reads its sound.

Everything counts on one clock: seconds from the recording's own start. A picture is on screen from
its presentation time to that of the next one. What a seek gives is believed only if it is checked:
the wanted picture itself must come out of the decoder. Where it does not, reading starts earlier,
at last from the start of the file.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import pathlib
import zlib
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData

from mm_jax.config.errors import UserError
from mm_jax.data.resampling import resize

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi")
VIDEO_SUFFIXES += (".mpg", ".mpeg", ".vob", ".ts", ".m2ts", ".mts", ".flv", ".wmv", ".asf")
VIDEO_SUFFIXES += (".ogv", ".mxf")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# PyAV raises IndexError where a damaged file shows another track on the way.
AV_ERRORS = (av.FFmpegError, OSError, ValueError, EOFError, IndexError)
# A recording holds its sound and pictures itself: formats that name other files or addresses
# (playlists, manifests, stream descriptions) are never read, whatever a file is called.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,live_flv,asf,ogg,mxf,gxf,"
    "wav,w64,mp3,flac,aac,ac3,eac3,dts,aiff,au,caf,amr,amrnb,amrwb,ape,wv,tta,mpc,mpc8,voc,sox,"
    "h264,hevc,av1,obu,ivf,vvc,m4v,h263,h261,vc1,dv,mjpeg,mjpeg_2000,nut,rm,wtv,swf,dirac,gif,apng,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
)
OPENING = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
Disposition = av.stream.Disposition
# Tracks that are not the programme itself: for the impaired, comments, cover pictures.
ASIDE = (
    Disposition.hearing_impaired
    | Disposition.visual_impaired
    | Disposition.comment
    | Disposition.descriptions
)
COVER = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
PICTURE_CODECS = ("mjpeg", "png", "bmp", "webp", "tiff")
TOGETHER = 0.1  # seconds: tracks that begin this close begin together (codecs' delays differ)
ROUND = 2**33 / 90_000  # seconds until the clock of a broadcast begins again
JUMP = 10.0  # seconds: in a broadcast, a longer gap is a new clock
LONGEST_GAP = 60.0  # seconds: in other files, a longer gap is damage and is not filled
EPSILON = 1e-3  # seconds: times in files are rounded, often to milliseconds
SEEK_EARLIER = (0.0, 2.0, 15.0)  # seconds before the wanted place; then the start of the file
MOST_MISSES = 4  # more failed than good seeks after which a file is read from its start
# What damaged headers go beyond.
MAX_PIXELS = 100_000_000
PIXEL_RATIOS = (0.1, 10.0)


class MediaError(UserError, ValueError):
    """Reports a clip that cannot be used; `reason` is short, so that it can be counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}{': ' if detail else ''}{detail}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Clip:
    """A file, or its seconds [start, end) from its own start; `end` None: to its end."""

    path: pathlib.Path
    start: float = 0.0
    end: float | None = None


def open_container(path: pathlib.Path):
    """Opens a media file. Raises MediaError if it is missing, empty or corrupt."""
    if not path.is_file():
        raise MediaError("missing", str(path))
    if path.stat().st_size == 0:
        raise MediaError("empty file", str(path))
    try:
        return av.open(str(path), metadata_errors="replace", container_options=OPENING)
    except AV_ERRORS as error:
        raise MediaError("corrupt", f"{path}: {error}") from error


def track(container, kind: str):
    """Chooses the "video" or "audio" track: the one marked default, or else the first.

    Cover pictures are never the video; single pictures and tracks for the impaired come last.
    Raises MediaError if there is none.
    """
    streams = getattr(container.streams, kind)
    able = [s for s in streams if not s.disposition & COVER and s.codec_context is not None]
    if not able:
        raise MediaError(f"no {kind} stream", container.name)

    def order(stream):
        picture = kind == "video" and stream.codec_context.name in PICTURE_CODECS
        aside, default = stream.disposition & ASIDE, stream.disposition & Disposition.default
        return picture, bool(aside), not default

    return min(able, key=order)


def has_video(path: pathlib.Path) -> bool:
    """Tells by the content of a file whether it has moving pictures. Raises MediaError."""
    with open_container(path) as container:
        return any(not s.disposition & COVER for s in container.streams.video)


def zero_of(container, stream) -> float:
    """Returns the time in the file, in seconds, that counts as 0 for this track."""
    start = max(0.0, (container.start_time or 0) / av.time_base)
    own = start if stream.start_time is None else float(stream.start_time * stream.time_base)
    lead = own - start
    if is_broadcast(container):  # its clock has 33 bits: just before 0 is the end of the last round
        lead = (lead + ROUND / 2) % ROUND - ROUND / 2
    return own if abs(lead) < TOGETHER else start


def steady(stamps: Sequence[float], broadcast: bool) -> bool:
    """Tells whether decoding times never run back or, in a broadcast, jump ahead."""
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    return all(0 <= s <= (JUMP if broadcast else np.inf) for s in steps)


def packets_of(container, stream) -> Iterator[av.Packet]:
    """Demuxes to the end, or to where the file is damaged."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except AV_ERRORS:
            return
        yield packet


def decoded(packet) -> tuple[list, bool]:
    """Decodes one packet. Returns its frames, and whether it is damaged."""
    try:
        return packet.decode(), False
    except AV_ERRORS:
        return [], True


class Clock:
    """Gives times that only grow: a clock that is set back, or jumps too far ahead, goes on."""

    def __init__(self, broadcast: bool):
        self.limit = JUMP if broadcast else LONGEST_GAP
        self.offset, self.last, self.next = 0.0, -np.inf, None

    def time(self, stamp: float | None, length: float) -> float:
        """Returns when the next frame, `length` seconds long and stamped `stamp`, is shown."""
        if self.next is None:
            self.next = 0.0 if stamp is None else stamp
        now = self.next if stamp is None else stamp + self.offset
        if not self.last <= now <= self.next + self.limit:
            self.offset += self.next - now
            now = self.next
        self.last, self.next = now, now + length
        return now


def is_broadcast(container) -> bool:
    return bool(container.format.flags & av.format.Flags.ts_discont.value)


@dataclasses.dataclass
class VideoIndex:
    """The pictures of a file in the order they are shown.

    stamps: the presentation times they are known by, in units of the track (AVI and damaged files
    may have them out of order, or not at all). times: seconds from the recording's start. keys: the
    places of key frames. prints: where times in the file are not to be trusted, and so all was
    decoded once, checksums of the pictures; otherwise empty. reach: how far before a key frame a
    seek must aim, as an index of SEEK_EARLIER (learnt while reading).
    """

    stamps: tuple[int | None, ...]
    times: tuple[float, ...]
    keys: tuple[int, ...]
    prints: tuple[int, ...] = ()
    reach: int = 0

    def __post_init__(self):
        self.missed, self.key_places = 0, frozenset(self.keys)
        self.places = {stamp: i for i, stamp in enumerate(self.stamps)}
        counts = collections.Counter(self.prints)
        self.by_print = {p: i for i, p in enumerate(self.prints) if counts[p] == 1}
        # Without key frames at known times, pictures are found by counting alone.
        self.seekable = len(self.keys) > 0 and all(self.stamps[k] is not None for k in self.keys)

    @property
    def end(self) -> float:
        """When the last picture leaves the screen, in seconds."""
        count = len(self.times)
        step = (self.times[-1] - self.times[0]) / (count - 1) if count > 1 else 1 / 25
        return self.times[-1] + step

    def place(self, frame: av.VideoFrame) -> int | None:
        """Returns which picture a decoded frame is, or None."""
        place = self.places.get(frame.pts)
        if not self.prints:
            return place
        found = checksum(frame)
        if found in self.by_print:  # times may be others after a seek, pictures are not
            return self.by_print[found]
        return place if place is not None and self.prints[place] == found else None


def checksum(frame: av.VideoFrame) -> int:
    """Returns the CRC of a picture's first plane, without the padding of its rows."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return zlib.crc32(np.ascontiguousarray(rows[:, : frame.width]))


@functools.lru_cache(maxsize=8)
def _video_index(path: pathlib.Path, size: int, modified: int) -> VideoIndex:
    with open_container(path) as container:
        stream = track(container, "video")
        base, zero = float(stream.time_base), zero_of(container, stream)
        packets = [
            (p.pts, p.dts, p.is_keyframe)
            for p in packets_of(container, stream)
            if p.size and not p.is_discard
        ]
        keys = [pts for pts, _, key in packets if key and pts is not None]
        # AVI has decoding times alone; program streams time some of their pictures.
        guessed = container.format.name == "avi" and any(pts != dts for pts, dts, _ in packets)
        guessed |= container.format.name == "mpeg"
        decoding = [dts * base for _, dts, _ in packets if dts is not None]
        shown = [pts for pts, _, _ in packets]
        if (
            keys
            and not guessed
            and None not in shown
            and len(set(shown)) == len(shown)
            and steady(decoding, is_broadcast(container))
        ):
            # Nothing before the first key frame can be decoded.
            stamps = tuple(sorted(pts for pts in shown if pts >= keys[0]))
            places = {pts: i for i, pts in enumerate(stamps)}
            times = tuple(pts * base - zero for pts in stamps)
            return VideoIndex(
                stamps, times, tuple(sorted({places[k] for k in keys if k in places}))
            )
    walked = [(time, f.pts, f.key_frame, checksum(f)) for time, f, _ in _walk(path)]
    if not walked:
        raise MediaError("corrupt", f"{path}: no frames")
    times, stamps, keys, prints = zip(*walked, strict=True)
    return VideoIndex(stamps, times, tuple(i for i, key in enumerate(keys) if key), prints)


def video_index(path: pathlib.Path) -> VideoIndex:
    """Finds when each picture of a file is shown. Raises MediaError.

    It reads packets, without decoding, where their times can be trusted. Results of recent files
    are kept, so that many cuts of one episode read it once.
    """
    if not path.is_file():
        raise MediaError("missing", str(path))
    stat = path.stat()
    return _video_index(path, stat.st_size, stat.st_mtime_ns)


def _walk(path: pathlib.Path) -> Iterator[tuple[float, av.VideoFrame, bool]]:
    """Decodes a file from its start. Yields (seconds, picture, damaged before it)."""
    with open_container(path) as container:
        stream = track(container, "video")
        stream.thread_type = "NONE"
        clock, zero = Clock(is_broadcast(container)), zero_of(container, stream)
        length = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        avi, first, damaged = container.format.name == "avi", None, False
        for packet in packets_of(container, stream):
            frames, bad = decoded(packet)
            damaged |= bad
            for frame in frames:
                stamp = None if frame.time is None else frame.time - zero
                if avi:  # its pictures come at decoding times
                    first = frame.dts if first is None else first
                    known = frame.dts is not None and first is not None
                    stamp = (frame.dts - first) * float(stream.time_base) if known else None
                yield clock.time(stamp, length), frame, damaged
                damaged = False


class VideoReader:
    """Finds the pictures of a clip, and decodes some of them in ascending order.

    times: float seconds of its pictures. damaged: whether the file was seen to be damaged.
    """

    def __init__(self, clip: Clip):
        self.path, self.index = clip.path, video_index(clip.path)
        times = self.index.times
        end = self.index.end if clip.end is None else clip.end
        if clip.start >= self.index.end or end <= times[0]:
            raise MediaError("outside the recording", f"{clip.path} from {clip.start} s")
        # From the picture on screen at the start to the last that comes before the end.
        self.first = max(0, bisect.bisect_right(times, clip.start + EPSILON) - 1)
        stop = max(self.first + 1, bisect.bisect_left(times, end - EPSILON))
        self.times = times[self.first : stop]
        self.damaged = False

    def decode(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Decodes pictures at ascending `indices` of `times` (repeats allowed), upright, as shown.

        Returns uint8[h, w, 3] each. Raises MediaError if nothing can be decoded.
        """
        places = [self.first + i for i in indices]
        pictures = self._seek(places) if self.index.seekable else None
        return self._walk_to(places) if pictures is None else pictures

    def _seek(self, places: Sequence[int]) -> list[np.ndarray] | None:
        """Decodes from the key frames before the wanted pictures; None if one does not come."""
        index, pictures = self.index, []
        with open_container(self.path) as container:
            stream = track(container, "video")
            stream.thread_type = "NONE"
            wanted = {index.stamps[place] for place in places}

            def read():
                for packet in packets_of(container, stream):
                    # Frames that no other frame refers to are decoded only if they are wanted.
                    shown = index.prints or packet.pts is None or packet.pts in wanted
                    stream.codec_context.skip_frame = "DEFAULT" if shown else "NONREF"
                    frames, bad = decoded(packet)
                    self.damaged |= bad
                    yield from frames

            def read_to(wanted, frames, first):
                for frame in frames:
                    place = index.place(frame)
                    # Program streams give a key frame another time after a seek.
                    begins = frame.key_frame and place in index.key_places
                    if place is None and index.prints and not first:
                        continue  # one of several pictures that are alike
                    if place is None or place > wanted or (first and not begins):
                        return None  # the seek came out late, or between key frames
                    if place == wanted:
                        return frame
                    first = False
                return None

            # The reach is learnt: the threads of a build share the index.
            frames, at, image, reach = read(), None, None, index.reach
            for place in places:
                if place != at:
                    key = index.keys[max(0, bisect.bisect_right(index.keys, place) - 1)]
                    frame = None
                    if key == index.keys[0] or (at is not None and key <= at):
                        frame = read_to(place, frames, at is None)
                    while frame is None and reach < len(SEEK_EARLIER):
                        earlier = round(SEEK_EARLIER[reach] / stream.time_base)
                        begin = index.stamps[index.keys[0]]
                        container.seek(max(index.stamps[key] - earlier, begin), stream=stream)
                        frames = read()
                        frame = read_to(place, frames, True)
                        reach += frame is None
                    if frame is None:
                        index.missed += 1
                        # Where most seeks fail, they only cost time.
                        index.seekable = index.missed < MOST_MISSES
                        return None
                    at, image = place, upright(frame, stream)
                pictures.append(image)
        index.reach, index.missed = reach, max(0, index.missed - 1)
        return pictures

    def _walk_to(self, places: Sequence[int]) -> list[np.ndarray]:
        """Decodes from the start of the file: the last picture at or before each wanted one."""
        index = self.index
        pictures: list[np.ndarray] = []
        with open_container(self.path) as container:
            stream = track(container, "video")
            shown, image = None, None
            for place, (_, frame, damaged) in enumerate(_walk(self.path)):
                self.damaged |= damaged
                if not index.prints:  # it was not counted, so it goes by its time
                    stamp = index.stamps[0] if frame.pts is None else frame.pts
                    place = bisect.bisect_right(index.stamps, stamp) - 1
                while len(pictures) < len(places) and place > places[len(pictures)] and shown:
                    image = upright(shown, stream) if image is None else image
                    pictures.append(image)
                if len(pictures) == len(places):
                    return pictures
                shown, image = frame, None
            if shown is None:
                raise MediaError("corrupt", f"{self.path}: no picture can be decoded")
            # The file ends early: its last good picture stays on screen.
            self.damaged |= place < places[-1]
            last = upright(shown, stream)
            return pictures + [last] * (len(places) - len(pictures))


def upright(frame: av.VideoFrame, stream) -> np.ndarray:
    """Returns a picture uint8[h, w, 3] as a player shows it: square pixels, turned and mirrored."""
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError("corrupt", f"a picture of {frame.width} x {frame.height} pixels")
    image = frame.to_ndarray(format="rgb24")
    ratio = stream.sample_aspect_ratio
    if ratio and ratio != 1 and PIXEL_RATIOS[0] <= ratio <= PIXEL_RATIOS[1]:
        h, w = image.shape[:2]
        size = (max(1, round(w * ratio)), h) if ratio > 1 else (w, max(1, round(h / ratio)))
        image = resize(image, *size)
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is not None:
        # A point (x, y) of the picture is shown at (a x + c y, b x + d y).
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(int)
        if abs(a) + abs(d) < abs(b) + abs(c):
            image, a, d = image.swapaxes(0, 1), c, b
        image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(image)
