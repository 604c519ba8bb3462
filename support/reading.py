"""From files to RGB images and to data sets that survive damaged files: what all of sources.py share."""
import contextlib
import functools
import os
import pathlib
import re
import struct
import sys
import traceback

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch.utils.data import Dataset

from support import pictures, runtime
from support.runtime import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
                  *([".avif"] if features.check("avif") else []))
VIDEO_SUFFIXES = (".avi", ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".mpg", ".mpeg", ".wmv", ".flv", ".ts",
                  ".gif")
MOVING = ("GIF", "WEBP", "PNG", "AVIF")         # formats of images that can move; a phone's MPO cannot
OURS = pathlib.Path(__file__).parents[:2]        # support/ and the folder above it
MAX_PIXELS = 2 ** 28                            # 0.8 GB as RGB: a larger image is an accident or an attack
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2        # PIL warns above this number and raises above twice as many
BROKEN_LIMIT = 0.01                             # the fraction of a data set that may be unreadable

# ---- 1. From a file to images ------------------------------------------------------------------------------

class Unreadable(ValueError):
    """A file is to blame, not the code: it is damaged, or not what it should be."""


class TooShort(Unreadable):
    """A clip is whole, but has fewer frames than are asked for."""


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


def decode(file, upright=False, drop_alpha=False):
    """The RGB PIL image in `file`, a path or a binary file. Raises `Unreadable` or OSError if there is none.

    upright: apply the EXIF rotation, which training and the published models ignore. drop_alpha: of `as_rgb`.
    """
    if isinstance(file, (str, os.PathLike)) and not os.path.isfile(file):
        raise Unreadable("no regular file, or none at all")               # a named pipe would hang for ever
    with decoding(), Image.open(file) as image:
        if is_moving(image):
            raise Unreadable(f"it moves, in {image.n_frames} frames: that is for tokenizers of clips")
        return as_rgb(ImageOps.exif_transpose(image) if upright else image, drop_alpha)


def is_clip(path):
    """Whether a file is a video, or an image that moves. Raises `Unreadable` or OSError."""
    if not str(path).lower().endswith(IMAGE_SUFFIXES):
        return True
    with decoding(), Image.open(path) as image:
        return is_moving(image)


def is_moving(image):
    """Whether an open PIL image has more than one frame, or stands for a clip of `write_video`."""
    return image.format in MOVING and (getattr(image, "is_animated", False) or written_as(image) is not None)


def as_rgb(image, drop_alpha=False):
    """A PIL image in RGB. What is transparent shows white; with drop_alpha what it hides, as in the official
    loader. Raises `Unreadable` for 16 or 32 bits, which PIL would clip to white."""
    if image.mode[0] in "IF":
        raise Unreadable(f"pixels of type {image.mode}; convert them to 8 bits")
    image.load()
    if image.has_transparency_data and not drop_alpha:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")        # which would copy an RGB one


print_once = functools.cache(print)


def video_frames(path, upright=False):
    """Yield the frames of a video as functions that give them as PIL RGB images.

    A video is a file, a moving image, or a folder of numbered pictures. A frame that is skipped is decoded,
    but not converted. The frames' times are ignored, and, unless `upright`, the rotation that phones write.
    Colours are as the file's tag says (BT.601 where it says nothing, as everywhere; PyAV 17 or newer). Raises
    `Unreadable` or OSError, also for a video that has lost a tenth of its frames.
    """
    if os.path.isdir(path):
        for name in numbered(os.listdir(path)):
            yield functools.partial(decode, os.path.join(path, name), upright)
        return
    if str(path).lower().endswith(IMAGE_SUFFIXES):
        yield from moving_frames(path)
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
                yield decoding()(functools.partial(to_image, frame, upright))
        lost = packets < 0.9 * stream.frames              # encoders miscount by one or two; 0 is "unknown"
        if str(path).lower().endswith(".avi"):
            lost = is_cut_avi(path)
        if lost or count < 0.9 * expected:
            raise Unreadable(f"truncated: {count} of {max(expected, stream.frames)} frames")


def numbered(names):
    """The pictures among `names` in the order of their last numbers: 2.png before 10.png."""
    names = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    return sorted(names, key=lambda name: int(re.findall(r"\d+", os.path.splitext(name)[0])[-1]))


def moving_frames(path):
    """`video_frames` of a moving image, those too that `write_video` found equal and Pillow wrote as one."""
    with decoding(), Image.open(path) as image:
        total, milliseconds = written_as(image) or (0, 0)
        left = total
        for i in range(image.n_frames):
            image.seek(i)
            image.load()                                  # WebP tells durations only after decoding
            times = round(image.info.get("duration", 0) / milliseconds) if total else 1
            if i == image.n_frames - 1:
                times = max(left, 1)
            for _ in range(times):
                yield decoding()(lambda: as_rgb(image.copy()))
            left -= times


def written_as(image):
    """(frames, milliseconds of each) that `write_video` noted in a moving image; None of one by others."""
    note = image.info.get("comment") or image.info.get("xmp") or ""
    found = re.fullmatch(pictures.NOTE.format(r"([1-9]\d{0,5})", r"([1-9]\d{0,5})"), os.fsdecode(note))
    return tuple(map(int, found.groups())) if found else None


def to_image(frame, upright):
    """A frame of PyAV as a PIL image."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if upright and frame.rotation else image


def is_cut_avi(path):
    """Whether a file ends before its own header says. (The frames that the header of an AVI counts may be
    slots in time, of which many are empty: 40 for 27 frames.)"""
    with open(path, "rb") as file:
        size, = struct.unpack("<4xI", file.read(8))
    return size + 8 > os.path.getsize(path) and size != 2 ** 32 - 1        # which stands for unknown


def frame_rate(path):
    """Frames a second, as the file says (25 where it says nothing). Raises `Unreadable` or OSError."""
    if os.path.isdir(path):                               # of numbered pictures
        return 25.0
    if str(path).lower().endswith(IMAGE_SUFFIXES):
        with decoding(), Image.open(path) as image:
            image.load()
            return 1000 / (written_as(image) or (0, image.info.get("duration") or 40))[1]
    av = pictures.import_av()
    with decoding(), av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 25)


# ---- 2. What all data sets share ---------------------------------------------------------------------------

class Strings:
    """A million strings in one tensor; `strings[i]` makes one of them.

    In a list, the paths of ImageNet are 80 MB to pickle and 500 MiB in every worker that is not forked; and a
    forked one copies them bit by bit, as whoever looks at a Python object counts that in it. The memory of a
    tensor is shared by all workers.
    """

    def __init__(self, strings, prefix=""):
        """strings: a list, or a bytearray with a NUL after each. prefix: what all begin with besides."""
        if not isinstance(strings, bytearray):
            strings = bytearray().join(os.fsencode(string) + b"\0" for string in strings)
        text = np.frombuffer(strings, np.uint8)
        self.prefix = prefix
        self.text = torch.from_numpy(text)
        self.starts = torch.from_numpy(np.append(0, np.flatnonzero(text == 0) + 1))

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]                   # its IndexError ends a `for` loop, too
        if isinstance(index, range):
            return [self[i] for i in index]
        first, end = self.starts[index:index + 2].tolist()
        return self.prefix + os.fsdecode(self.text[first:end - 1].numpy().tobytes())


class Samples(Dataset):
    """What all data sets share: how a sample is asked for, and what happens when a file is broken.

    `dataset[index]` is (uint8 tensor as `view` says, label, index). A file that cannot be read is reported
    once on stderr and counted in `broken`, one flag a sample, in memory that worker processes share. The next
    readable one stands in for it, with its own index, so that who wants no other can tell; or None once more
    than 1 % are broken: then `raise_if_broken` says so.

    A subclass knows `paths` and `labels` (0 without classes) of all samples, and `classes`, the names in
    label order; its `read(index, rng)` returns what the view shows of a sample. Where the file is to blame
    it raises `Unreadable` or OSError, as `decode` does; anything else is a bug, and keeps its traceback.

    part: of the whole that the set was divided into, "train", "val" or "test"; None where nobody has done so.
    """

    def __init__(self, name, classes, paths, labels, view, part=None):
        self.name = name
        self.classes = classes
        self.paths = paths if isinstance(paths, Strings) else Strings(paths)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.view = view
        self.part = part
        self.kind = "clip" if view.frames else "image"     # what messages call a sample
        side = view.image_size
        self.axes = (view.frames, side, side) if view.frames else (side, side)
        self.broken = torch.zeros(len(paths), dtype=torch.bool).share_memory_()
        self.short = torch.zeros(len(paths), dtype=torch.bool).share_memory_()     # of these, only too short

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        index = range(len(self))[index]                   # its IndexError also ends a plain `for` loop
        return self.__getitems__([(index, (self.view.seed, index))])[0]

    def __getitems__(self, requests):
        """Samples for (index, seed) pairs, a seed being a tuple of integers; what a DataLoader calls."""
        return [self.readable(index, seed) for index, seed in requests]

    def readable(self, index, seed):
        """(tensor, label, index) of this or the next readable sample; None once too many are broken."""
        random = self.view.crop == "random" or self.view.flip
        while True:
            try:
                if not self.broken[index]:
                    rng = np.random.default_rng(seed) if random else None
                    return self.read(index, rng), int(self.labels[index]), index
            except (Unreadable, OSError) as error:
                self.report_broken(index, error)
            if self.too_many_broken():                    # asked only here: it counts all flags
                return None
            index = (index + 1) % len(self)

    def report_broken(self, index, error):
        """Count sample `index` as broken and say so, unless another worker was faster."""
        reason = " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        if not self.broken[index]:
            self.broken[index] = True
            self.short[index] = isinstance(error, TooShort)
            word = "short" if self.short[index] else "broken"
            print(f"{word} {self.kind} skipped: {self.paths[index]} ({reason})", file=sys.stderr, flush=True)

    def count_broken(self):
        """How many are known to be broken. A flag that two workers set at once is counted once."""
        return int(np.count_nonzero(self.broken.numpy()))

    def too_many_broken(self):
        """Whether more than 1 % are known to be broken."""
        return self.count_broken() > BROKEN_LIMIT * len(self)

    def raise_if_broken(self, all_ranks=False):
        """Raise `UserError` if more than 1 % are known to be broken, here or (a collective) on any rank."""
        if all_ranks:
            self.broken |= runtime.all_reduce_sum(self.broken.int()) > 0
            self.short |= runtime.all_reduce_sum(self.short.int()) > 0
        if not self.too_many_broken():
            return
        short = int(self.short.sum())
        broken = self.count_broken() - short
        some = self.broken & ~self.short if broken else self.short
        such = f"of the {len(self)} {self.kind}s of {self.name}"
        first = f"more than 1 %, such as {self.paths[int(some.int().argmax())]}, for the reasons above"
        if short > broken:
            raise UserError(f"{short} {such} are too short, {first}; lower --frames or --frame-stride, or "
                            f"remove them ({broken} others are broken)")
        raise UserError(f"{broken} {such} are broken, {first}; copy or download the data again, or "
                        f"convert or remove these files ({short} others are too short)")
