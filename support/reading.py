"""From a file to RGB images: pictures by Pillow, videos by PyAV, and what to do about damaged ones."""
import contextlib
import functools
import os
import pathlib
import sys
import traceback

from PIL import Image, ImageOps

from support import pictures

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".avi", ".mp4", ".webm", ".mkv", ".gif")
OURS = pathlib.Path(__file__).parents[:2]        # support/ and the folder above it
MAX_PIXELS = 2 ** 28                            # 0.8 GB as RGB: a larger image is an accident or an attack
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2        # PIL warns above this number and raises above twice as many


class Unreadable(ValueError):
    """A file is to blame, not the code: it is damaged, or not what it should be."""


@contextlib.contextmanager
def decoding():
    """Stands around calls of decoders and nothing else: what they raise becomes `Unreadable`.

    On damaged bytes they raise almost anything. But what a line of ours raises, say a TypeError, is a bug.
    """
    try:
        yield
    except Exception as error:
        last = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, (OSError, Unreadable)) or last.parent in OURS:
            raise
        raise Unreadable(str(error) or type(error).__name__) from error


def decode(file, upright=False):
    """The RGB PIL image in `file`, a path or a binary file. Raises `Unreadable` or OSError if there is none.

    Transparency is dropped, not composited. EXIF rotation is ignored, as for the published models, unless
    `upright` says to apply it.
    """
    if isinstance(file, (str, os.PathLike)) and not os.path.isfile(file):
        raise Unreadable("no regular file, or none at all")               # a named pipe would hang for ever
    with decoding(), Image.open(file) as image:
        return as_rgb(ImageOps.exif_transpose(image) if upright else image)


def as_rgb(image):
    """A PIL image in RGB. Raises `Unreadable` for 16 or 32 bits, which PIL would clip to white."""
    if image.mode[0] in "IF":
        raise Unreadable(f"pixels of type {image.mode}; convert them to 8 bits")
    return image.convert("RGB")


print_once = functools.cache(print)


def video_frames(path):
    """Yield the frames of a video as functions that give them as PIL RGB images.

    A frame that is skipped is so decoded, but not converted. Rotation by metadata and the frames' times are
    ignored. Raises `Unreadable` or OSError, also for a video that has lost a tenth of its frames.
    """
    if str(path).lower().endswith(pictures.PILLOW_FORMATS):
        with decoding(), Image.open(path) as image:
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                yield decoding()(functools.partial(image.convert, "RGB"))
        return
    av = pictures.import_av()
    with decoding(), av.open(str(path)) as container:
        if not container.streams.video:
            raise Unreadable("there is no video in it")
        stream = container.streams.video[0]
        packets = 0
        expected = 0
        count = 0
        started = False
        for packet in container.demux(stream):
            packets += packet.size > 0
            started = started or packet.is_keyframe
            if not started:                               # a frame without one to build on would be grey
                print_once(f"{path}: frames before the first key frame are left out", file=sys.stderr)
                continue
            expected += packet.size > 0 and not packet.is_discard      # which an editor cut off: unseen
            for frame in packet.decode():
                count += 1
                yield decoding()(frame.to_image)
        # Encoders miscount by one or two; 0 is "unknown".
        if packets < 0.9 * stream.frames or count < 0.9 * expected:
            raise Unreadable(f"truncated: {count} of {max(expected, stream.frames)} frames")


def frame_rate(path):
    """Frames a second, as the file says (25 where it says nothing). Raises `Unreadable` or OSError."""
    if str(path).lower().endswith(pictures.PILLOW_FORMATS):
        with decoding(), Image.open(path) as image:
            image.load()                                  # WebP tells durations only after decoding
            return 1000 / (image.info.get("duration") or 40)
    av = pictures.import_av()
    with decoding(), av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 25)
