"""Pictures and clips: folders, tar shards, and generated labelled sets that need no files.

One function, `preprocess`, stands between a file and every network of this project: training, evaluation and
the reference of FID see the same pixels (PIL's antialiased bilinear resize of the shorter side, then a square
crop). A picture stays uint8 until `to_float` maps it to [-1, 1] on the device that computes with it.

Nothing here depends on how many workers or ranks read the data. Order, crops and flips are functions of
(seed, epoch, index), so a run can be resumed at any step and repeated on another number of GPUs.

A clip is T consecutive frames of a video, each treated like a picture, all with the same crop; what is said
of pictures here holds for clips.

Axis letters: B pictures, 3 colours, H and W as stored, S the side after cropping, T frames, N a video's.

    python data.py                                                     # the generated set, 10 classes
    python data.py --data-path generated-plain --image-size 32         # its easier variety
    python data.py --data-path imagenet --split val --image-size 256   # train/ and val/ with class subfolders
    python data.py --data-path 'shards-{000..127}.tar' --check-all     # read all, list the broken images
    python data.py --data-path ucf101 --frames 17 --image-size 128     # clips; without a path, generated ones

Each prints a summary and writes a labelled grid of what the networks would see to runs/data.png, or for clips
an animated one to runs/data.webp.
"""
import dataclasses
import fractions
import functools
import io
import itertools
import math
import os
import pathlib
import re
import sys
import tarfile
import time

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import runtime
from runtime import UserError, require

SPLITS = ("train", "val", "test")
CROPS = ("center", "random")
FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHARD_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
VIDEO_SUFFIXES = (".avi", ".mp4", ".webm", ".mkv", ".gif")
PILLOW_SUFFIXES = (".gif", ".webp")             # animated pictures, for which PyAV is not needed
BROKEN_LIMIT = 0.01                             # the part of a data set that may be unreadable
MAX_PIXELS = 2 ** 28                            # 0.8 GB as RGB: a larger image is an accident or an attack
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2        # PIL warns above this number and raises above twice as many


# ------------------------------------------------------------------------------------------------------------
# From a file to pixels, and from a seed to random numbers
# ------------------------------------------------------------------------------------------------------------

def resize_shorter_side(image, size):
    """PIL image (H, W) with its shorter side at `size`: antialiased bilinear, the longer side truncated.

    The same pixels as `torchvision.transforms.Resize(size)` on a PIL image. Resizing a tensor, or cropping
    as the ADM evaluator does, moves pixels by up to a level or more on average: FID then compares other
    images. Raises ValueError where one side is so much longer that the result would not fit into memory.
    """
    if image.width <= image.height:
        width, height = size, int(size * image.height / image.width)
    else:
        width, height = int(size * image.width / image.height), size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too unequal to be resized")
    return image.resize((width, height), Image.Resampling.BILINEAR)


def image_to_tensor(image):
    """PIL RGB image to a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def mirror(pixels, generator):
    """`pixels` (3, H, W), with left and right exchanged with probability 1/2."""
    return pixels.flip(-1) if torch.rand((), generator=generator) < 0.5 else pixels


def preprocess(image, size, crop="center", generator=None, flip=False, resize=None):
    """PIL RGB image of any size to a uint8 tensor (3, S, S), S = `size`: resize the shorter side, then crop.

    `crop` is "center" (evaluation) or "random" (training). The published models were trained without `flip`.
    Crop and flip are drawn from `generator`, a torch.Generator. Small images are enlarged. `resize` is the
    shorter side before the crop where that is larger than `size`, for small crops of large pictures.
    """
    assert crop in CROPS and (generator is not None or (crop == "center" and not flip))
    image = resize_shorter_side(image, resize or size)
    spare_x, spare_y = image.width - size, image.height - size
    if crop == "random":
        left = int(torch.randint(spare_x + 1, (), generator=generator))
        top = int(torch.randint(spare_y + 1, (), generator=generator))
    else:
        left, top = int(round(spare_x / 2)), int(round(spare_y / 2))     # halves to even, as torchvision does
    pixels = image_to_tensor(image.crop((left, top, left + size, top + size)))
    return mirror(pixels, generator) if flip else pixels


def ten_crop(image, size):
    """PIL RGB image to uint8 (10, 3, S, S): four corners and the centre at 1.1 x S, then their mirror images.

    The augmentation with which stage II may store its tokens: ten token maps an image instead of one.
    """
    pixels = image_to_tensor(resize_shorter_side(image, int(1.1 * size)))
    down, right = pixels.shape[1] - size, pixels.shape[2] - size
    corners = [(0, 0), (0, right), (down, 0), (down, right), (int(round(down / 2)), int(round(right / 2)))]
    crops = torch.stack([pixels[:, top:top + size, left:left + size] for top, left in corners])
    return torch.cat([crops, crops.flip(-1)])


def to_float(images):
    """uint8 images, any shape and device, to float32 k / 127.5 - 1 in [-1, 1].

    In the form (2k - 255) / 255 only the division rounds, so the result is exactly float32(k / 127.5 - 1).
    The divisor is a tensor because a GPU turns division by a plain number into a less exact multiplication.
    """
    return (images.float() * 2 - 255) / torch.full((), 255.0, device=images.device)


def hash64(*values):
    """Mix integers, or arrays of integers that broadcast, into uint64 (n,): SplitMix64, value after value.

    Random numbers without a state: they depend on what they are for, not on who asks first. With all but the
    last value fixed, different last values give different hashes (each round of mixing is a bijection).
    """
    state = np.zeros(1, np.uint64)
    for value in values:
        state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def seeded_generator(seed):
    """A torch.Generator on the CPU that starts from the integer `seed`."""
    return torch.Generator().manual_seed(int(seed))


# ------------------------------------------------------------------------------------------------------------
# Sets of files: folders and tar shards
# ------------------------------------------------------------------------------------------------------------

class Images(Dataset):
    """What all data sets share: how an item is asked for, and what happens when a file is broken.

    `dataset[index]` and `dataset[(index, seed)]` give (image uint8 (3, S, S), label, index). The seed
    decides a random crop or flip; its default is a function of the data set's seed and the index. A file
    that cannot be read gives None: it is reported once on stderr and counted in `broken`, one flag for each
    image, in shared memory, so that what a worker process finds counts in the process that trains.

    A subclass provides `load(index)`, `label(index)` and `path(index)`. `classes` are the names in label
    order, [] without labels.
    """
    kind = "image"                                        # what messages call an item

    def __init__(self, name, classes, length, image_size, crop, flip, seed, resize=None):
        require(crop in CROPS, f"the crop {crop!r} is unknown; choose one of {', '.join(CROPS)}")
        self.name, self.classes = name, classes
        self.image_size, self.crop, self.flip, self.seed = image_size, crop, flip, seed
        self.resize = resize                              # shorter side before the crop; None: image_size
        self.broken = torch.zeros(length, dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.broken)

    @property
    def axes(self):
        """The axes of an item behind the colours: (S, S)."""
        return self.image_size, self.image_size

    def __getitem__(self, request):
        return self.__getitems__([request])[0]

    def __getitems__(self, requests):
        """The items of a whole batch, in the order of `requests`; this is what a DataLoader calls."""
        return [self.read(*self.index_and_seed(request)) for request in requests]

    def index_and_seed(self, request):
        """(index, seed) of an index or such a pair. Raises IndexError, which also ends a plain `for` loop."""
        pair = isinstance(request, (tuple, list))
        index = int(request[0] if pair else request)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        return index, int(request[1] if pair else hash64(self.seed, index)[0])

    def read(self, index, seed):
        """(image, label, index), or None for a broken image."""
        if self.broken[index]:
            return None
        try:
            image = self.pixels(index, seed)
        except Exception as error:  # decoders raise almost anything on damaged bytes
            self.report_broken(index, error)
            return None
        return image, self.label(index), index

    def pixels(self, index, seed):
        """uint8 (3, S, S): the file's picture, cropped and mirrored by `seed`."""
        return self.preprocess(self.load(index), seed)

    def preprocess(self, image, seed):
        """`preprocess` with the settings of this data set."""
        generator = seeded_generator(seed)
        return preprocess(image, self.image_size, self.crop, generator, self.flip, self.resize)

    def ten_crops(self, index):
        """uint8 (10, 3, S, S) of image `index`: see `ten_crop`. Raises what `load` raises."""
        return ten_crop(self.load(index), self.image_size)

    def report_broken(self, index, error):
        """Count image `index` as broken and say so, unless another worker was faster."""
        reason = " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        if not self.broken[index]:
            self.broken[index] = True
            print(f"broken {self.kind} skipped: {self.path(index)} ({reason or type(error).__name__})",
                  file=sys.stderr, flush=True)

    def too_many_broken(self):
        """True once more than 1 % of the data set is known to be broken."""
        return int(self.broken.sum()) > BROKEN_LIMIT * len(self)

    def raise_if_broken(self, all_ranks=False):
        """Raise `UserError` if more than 1 % of the images are broken, as far as this rank has met them.

        With `all_ranks`, as far as any rank has: a collective, to be called at the end of an evaluation.
        """
        if all_ranks:
            self.broken |= runtime.all_reduce_sum(self.broken.int()) > 0
        if self.too_many_broken():
            first = int(self.broken.int().argmax())
            raise UserError(f"{int(self.broken.sum())} of the {len(self)} {self.kind}s of {self.name} are "
                            f"broken, more than 1 %, such as {self.path(first)}; copy or download the data "
                            f"again, or remove the broken files")


def decode(file):
    """The RGB PIL image in `file`, a path or a binary file. Raises what PIL raises where it cannot be read.

    Transparency is dropped, not composited, and EXIF rotation is ignored, as for the published models.
    Pixels of 16 or 32 bits are refused: PIL would clip them to white.
    """
    with Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"pixels of type {image.mode}; convert them to 8 bits")
        return image.convert("RGB")


class ImageFolder(Images):
    """A folder with a subfolder for each class (images at any depth below it), or a flat one without labels.

    Class names are the sorted names of the subfolders, labels their positions; images are sorted by class,
    then path. `classes` gives the names where other folders share them. Hidden files are ignored (macOS
    leaves a "._name.jpg" beside "name.jpg"). Raises `UserError` where there are no images, or both readings
    are possible.
    """

    suffixes = FOLDER_SUFFIXES

    def __init__(self, folder, image_size, crop="center", flip=False, seed=0, classes=None, resize=None):
        self.folder, found = pathlib.Path(folder), []                    # found: paths, each a tuple of parts
        for directory, subfolders, files in os.walk(self.folder, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            parts = pathlib.Path(directory).relative_to(self.folder).parts
            found += [(*parts, name) for name in files
                      if name.lower().endswith(self.suffixes) and not name.startswith(".")]
        require(found, f"--data-path {folder} holds no {self.kind}s ({' '.join(self.suffixes)})"
                + "; for its tar files, give a pattern such as 'shards-{000..127}.tar'"
                * any(self.folder.glob("*.tar")))
        flat = [parts[0] for parts in found if len(parts) == 1]
        require(len(flat) in (0, len(found)),
                f"--data-path {folder} holds {self.kind}s in class subfolders and {len(flat)} beside them, "
                f"such as {flat[:1]}; move all into subfolders, or none")
        names = [] if flat else classes or subfolder_names(self.folder)
        number = {name: i for i, name in enumerate(names)}
        self.files = ["/".join(parts) for parts in sorted(found)]
        self.labels = [0 if flat else number[file.split("/")[0]] for file in self.files]
        super().__init__(str(folder), names, len(found), image_size, crop, flip, seed, resize)

    def path(self, index):
        """Where image `index` lies."""
        return str(self.folder / self.files[index])

    def load(self, index):
        """The RGB PIL image as stored."""
        return decode(self.path(index))

    def label(self, index):
        """The class of image `index`, 0 where there are no classes."""
        return self.labels[index]


def subfolder_names(folder):
    """Sorted names of the subfolders of `folder`, without hidden ones."""
    return sorted(item.name for item in os.scandir(folder) if item.is_dir() and not item.name.startswith("."))


class TarShards(Images):
    """Images in plain tar files, each with an optional class number in a text member `.cls` of the same name.

    The positions of the members are read once, at start-up; then any image is one seek away, and the order
    is as random as that of a folder. Classes are called "0", "1", ... . Raises `UserError` for a missing or
    truncated shard, and where only some images have a class.
    """

    def __init__(self, pattern, image_size, crop="center", flip=False, seed=0, resize=None):
        self.shards = expand_braces(str(pattern))
        missing = [shard for shard in self.shards if not os.path.isfile(shard)]
        require(not missing, f"--data-path {pattern}: {len(missing)} of {len(self.shards)} shards missing "
                f"({', '.join(missing[:5])}{', ...' * (len(missing) > 5)}); check the path and the range")
        self.members, labels = [], []                                  # members: (shard, name, offset, bytes)
        silent = None if runtime.is_main() else True                      # None: a progress bar on a terminal
        for i, shard in enumerate(tqdm(self.shards, "reading shards", leave=False, disable=silent)):
            images, classes = index_shard(shard)
            self.members += [(i, *image) for image in images]
            labels += [classes.get(os.path.splitext(name)[0]) for name, _, _ in images]
        require(self.members, f"--data-path {pattern} holds no images ({' '.join(SHARD_SUFFIXES)})")
        unlabelled = labels.count(None) == len(labels)
        if not unlabelled and None in labels:
            raise UserError(f"--data-path {pattern}: {labels.count(None)} of {len(labels)} images have no "
                            f".cls member, such as {self.path(labels.index(None))}; label all images or none")
        self.labels = [0] * len(labels) if unlabelled else labels
        names = [] if unlabelled else [str(i) for i in range(max(labels) + 1)]
        super().__init__(str(pattern), names, len(labels), image_size, crop, flip, seed, resize)

    def path(self, index):
        """The shard of image `index` and its name there."""
        shard, name, _, _ = self.members[index]
        return f"{self.shards[shard]}:{name}"

    def load(self, index):
        """The RGB PIL image as stored."""
        shard, _, offset, size = self.members[index]
        with open(self.shards[shard], "rb") as file:      # opened anew: workers must not share a position
            file.seek(offset)
            return decode(io.BytesIO(file.read(size)))

    def label(self, index):
        """The class of image `index`, 0 where there are no classes."""
        return self.labels[index]


def index_shard(shard):
    """What a tar file holds: ([(name, offset, bytes)] of its images, {name without suffix: class})."""
    images, classes = [], {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                stem, suffix = os.path.splitext(member.name)
                if not member.isfile() or os.path.basename(stem).startswith("."):
                    continue
                if suffix.lower() in SHARD_SUFFIXES:
                    images.append((member.name, member.offset_data, member.size))
                elif suffix.lower() == ".cls":
                    text = tar.extractfile(member).read().decode(errors="replace").strip()
                    require(re.fullmatch(r"\d{1,6}", text), f"{shard}:{member.name} holds {text[:20]!r}, but "
                            f"should hold a class number from 0 to 999999 as text")
                    classes[stem] = int(text)
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"shard {shard} is truncated or is no plain tar file ({error}); copy or download it "
                        f"again, or unpack it if it is compressed") from None
    with open(shard, "rb") as file:                       # tarfile takes a cut between members for the end
        file.seek(end)
        require(file.read(512) == bytes(512), f"shard {shard} is truncated or damaged after {len(images)} "
                f"images; copy or download it again")
    return images, classes


def expand_braces(pattern):
    """'a-{00..02}.tar' to ['a-00.tar', 'a-01.tar', 'a-02.tar'], like bash; also several, and lists {a,b}."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        require("{" not in pattern and "}" not in pattern, f"--data-path {pattern}: a brace is not closed")
        return [pattern]
    options = []
    for part in braces[1].split(","):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        require(ends or "," in braces[1], f"--data-path {pattern}: {braces[0]} is neither a range like "
                f"{{000..127}} nor a list like {{a,b}}")
        if ends:
            first, last, step = int(ends[1]), int(ends[2]), 1 if int(ends[1]) <= int(ends[2]) else -1
            padded = any(end.startswith("0") and end != "0" for end in ends.groups())
            width = max(len(ends[1]), len(ends[2])) if padded else 0
            options += [str(i).zfill(width) for i in range(first, last + step, step)]
        else:
            options.append(part)
    before, after = pattern[:braces.start()], pattern[braces.end():]
    expanded = itertools.chain(*(expand_braces(before + option + after) for option in options))
    return list(dict.fromkeys(expanded))                  # no shard twice, in the order given


# ------------------------------------------------------------------------------------------------------------
# The generated set: ten shapes that a person can tell apart, and everything else at random
# ------------------------------------------------------------------------------------------------------------

# A shape is a signed distance: negative inside, positive outside, in a plane where x points right and y up,
# and the figure fills about the unit disc. The minimum of two distances joins their shapes; the maximum
# keeps what they share; a minus sign turns a shape inside out. Pixels meet only + - * /, square roots,
# minima and maxima, which IEEE arithmetic rounds alike everywhere: a picture is the same, bit for bit,
# alone or in a batch, and on any machine. Sines of pixel arrays would not be.

def disc(x, y, radius):
    """Signed distance to a disc around the origin."""
    return np.sqrt(x * x + y * y) - radius


def box(x, y, half_width, half_height):
    """Signed distance to a rectangle around the origin (somewhat short outside its corners)."""
    return np.maximum(abs(x) - half_width, abs(y) - half_height)


def half_plane(x, y, point, degrees):
    """Signed distance to a half plane with an edge through `point` and the outward normal at `degrees`."""
    angle = math.radians(degrees)
    return (x - point[0]) * math.cos(angle) + (y - point[1]) * math.sin(angle)


def ball(x, y):
    """A full disc."""
    return disc(x, y, 0.9)


def ring(x, y):
    """A disc with a wide hole."""
    return abs(disc(x, y, 0.68)) - 0.24


def triangle(x, y):
    """Equilateral, standing on its base."""
    return np.maximum(half_plane(abs(x), y, (0, 1.0), 30), -0.5 - y)


def square(x, y):
    """Four equal sides."""
    return box(x, y, 0.72, 0.72)


def star(x, y):
    """Five points. Folding the plane along the star's mirror lines lays all ten edges onto one."""
    for degrees in (108, 144):                            # the directions towards which the folds go
        x, toward = abs(x), math.radians(degrees)
        beyond = 2 * np.minimum(x * math.cos(toward) + y * math.sin(toward), 0)
        x, y = x - beyond * math.cos(toward), y - beyond * math.sin(toward)
    return half_plane(x, y, (0, 1.0), 24)


def heart(x, y):
    """A square on its corner, with a half disc on each upper side."""
    x, y = abs(x), y + 0.2
    tilted = box((x - y) * math.sqrt(0.5), (x + y) * math.sqrt(0.5), 0.545, 0.545)
    return np.minimum(tilted, disc(x - 0.385, y - 0.385, 0.545))


def moon(x, y):
    """A crescent: a disc less another disc. The half plane through its horns keeps shadows out of the gap."""
    x = x + 0.1
    return np.maximum(np.maximum(disc(x, y, 0.9), -disc(x - 0.42, y, 0.72)), x - 0.56)


def cross(x, y):
    """Two equal bars."""
    return np.minimum(box(x, y, 0.92, 0.31), box(x, y, 0.31, 0.92))


def flower(x, y):
    """Six petals around a hole."""
    x, y = abs(x), abs(y)
    petals = np.minimum(disc(x, y - 0.58, 0.34), disc(x - 0.502, y - 0.29, 0.34))
    return np.maximum(np.minimum(petals, disc(x, y, 0.45)), -disc(x, y, 0.2))


def arrow(x, y):
    """A head on a shaft, pointing up."""
    head = np.maximum(half_plane(abs(x), y, (0, 1.0), 41), 0.1 - y)
    return np.minimum(head, box(x, y + 0.4, 0.24, 0.55))


SHAPES = (ball, ring, triangle, square, star, heart, moon, cross, flower, arrow)
LARGEST_TURN = {heart: 0.12}                              # upside down, people call it a leaf or a spade


@dataclasses.dataclass(frozen=True)
class Variety:
    """How much the pictures of a class differ. Pairs are ranges; `_odds` are the chances of each kind."""
    hues: int = 0                                         # how many hues there are; 0: any
    scale: tuple = (0.60, 0.88)                           # size of the figure, of half the picture's width
    turn: float = 0.5                                     # largest rotation either way, in full turns
    dark_ground: float = 0.4                              # chance of a light figure on a dark ground
    ground_luma: tuple = (0.66, 0.95)                     # brightness of a light ground
    contrast: tuple = (0.34, 0.5)                         # brightness between the figure and the ground
    ground_saturation: tuple = (0.15, 0.75)
    figure_saturation: tuple = (0.6, 1.0)
    ground_odds: tuple = (0.30, 0.35, 0.17, 0.18)         # plain, gradient, broad stripes, soft noise
    fill_odds: tuple = (0.62, 0.20, 0.18)                 # one colour, stripes, dots
    shade_odds: tuple = (0.2, 0.4, 0.4)                   # flat, linear, round
    outline_odds: tuple = (0.5, 0.25, 0.25)               # none, black, white
    shadow: tuple = (0.0, 0.5)                            # how dark the figure's shadow is


VARIETIES = {
    "full": Variety(),
    # For a transformer that trains for minutes: what its tokens tell must be mostly the shape.
    "plain": Variety(hues=6, scale=(0.70, 0.88), turn=0.04, dark_ground=0, ground_luma=(0.90, 0.93),
                     contrast=(0.45, 0.50), ground_saturation=(0.25, 0.25), figure_saturation=(0.9, 1.0),
                     ground_odds=(0.8, 0.2, 0, 0), fill_odds=(1, 0, 0), shade_odds=(0.6, 0.4, 0),
                     outline_odds=(1, 0, 0), shadow=(0, 0)),
}
DIRECTIONS = np.exp(2j * np.pi * np.arange(4096) / 4096).astype(np.complex64)        # cos + i sin, tabulated


class Generated(Images):
    """Drawn pictures of ten classes, as many and as large as you like; picture `index` has class index % 10.

    Whatever is not the shape (colours, contrast, position, scale, rotation, shading, texture, outline,
    shadow, ground) comes from a hash of (seed, split, index), independently of the class. Different (split,
    index) have different hashes, so train and val are disjoint by construction. The same index at another
    resolution is the same scene. `variety`: "full" gives a tokenizer something to learn; "plain" (few hues,
    plain grounds, little shading, almost upright) suits auto-regressive models too small for more.
    """

    def __init__(self, split, image_size, variety="full", length=None, flip=False, seed=0):
        require(split in SPLITS, f"the split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
        require(variety in VARIETIES, f"the variety {variety!r} is unknown; choose {' or '.join(VARIETIES)}")
        self.split, self.variety = split, variety
        name = "generated" if variety == "full" else f"generated-{variety}"
        length = (20_000 if split == "train" else 1_000) if length is None else length
        super().__init__(name, [shape.__name__ for shape in SHAPES], length, image_size, "center", flip, seed)

    def __getitems__(self, requests):
        requests = [self.index_and_seed(request) for request in requests]
        images = torch.from_numpy(self.draw(np.array([index for index, _ in requests])))
        return [(mirror(image, seeded_generator(seed)) if self.flip else image, self.label(index), index)
                for image, (index, seed) in zip(images, requests)]

    def draw(self, indices):
        """uint8 array (B, 3, S, S) of the pictures `indices` (B,)."""
        keys = hash64(self.seed, indices * len(SPLITS) + SPLITS.index(self.split))
        return draw_in_blocks(keys, indices % len(SHAPES), self.image_size, VARIETIES[self.variety])

    def path(self, index):
        """A name for the picture."""
        return f"{self.name}[{index}]"

    def load(self, index):
        """The picture as a PIL image."""
        return Image.fromarray(self.draw(np.array([index]))[0].transpose(1, 2, 0))

    def label(self, index):
        """The class of picture `index`: the classes take turns."""
        return index % len(SHAPES)


def draw_in_blocks(keys, labels, size, variety, poses=None):
    """`draw_pictures`, so few at a time that their arrays stay in the cache."""
    block = max(1, 2 ** 17 // size ** 2)
    return np.concatenate([
        draw_pictures(keys[i:i + block], labels[i:i + block], size, variety,
                      None if poses is None else poses[:, i:i + block])
        for i in range(0, len(keys), block)])


def draw_pictures(keys, labels, size, variety, poses=None):
    """Paint a picture for each of the hashes `keys` (B,) and classes `labels` (B,): uint8 (B, 3, S, S).

    S = `size`. Lengths are in half widths of the picture; colours and brightness (luma) lie in 0..1.
    `poses` (5, B) moves the figures: two coordinates in -1..1 of the room that there is, a factor of the
    size, full turns to the left, and 1 or 0 for a figure that is there or not. None: where chance puts them.
    """
    bits = hash64(keys[:, None], np.arange(80)) >> np.uint64(40)
    numbers = iter(bits.T.astype(np.float32) * np.float32(2 ** -24))   # 80 x (B,) in [0, 1), for one use each

    def uniform(low=0.0, high=1.0):                       # (B, 1, 1): a number for each picture
        return (low + (high - low) * next(numbers))[:, None, None]

    def one_of(odds):                                     # for each kind, (B, 1, 1): 1 where it is chosen
        kind = np.searchsorted(np.cumsum(odds), uniform(), side="right")
        return [(kind == i).astype(np.float32) for i in range(len(odds))]

    def direction(turns):                                 # (cos, sin) of angles given in full turns
        vector = DIRECTIONS[(turns * len(DIRECTIONS)).astype(np.int64) % len(DIRECTIONS)]
        return vector.real, vector.imag

    def inside(distance):                                 # 1 inside, 0 outside, anti-aliased over one pixel
        return np.clip(0.5 - distance * (size / 2), 0, 1)

    def stripes(x, y, frequency):                         # signed distance, periodic in a random direction
        cos, sin = direction(uniform())
        phase = (x * cos + y * sin) * frequency + uniform()
        return (abs(2 * (phase - np.floor(phase)) - 1) - 0.5) / (2 * frequency)

    def dots(x, y, frequency):                            # signed distance, periodic along both axes
        x, y = x * frequency + uniform(), y * frequency + uniform()
        return disc(x - np.floor(x) - 0.5, y - np.floor(y) - 0.5, 0.3) / frequency

    # Where the figure is: inside the picture, turned as far as its shape allows.
    at = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1
    x, y = at[None, None, :], -at[None, :, None]          # (1, 1, S) and (1, S, 1): pixel centres
    scale = uniform(*variety.scale)
    place_x, place_y = uniform(-1, 1), uniform(-1, 1)
    spin, shown = np.float32(0), np.float32(1)
    if poses is not None:
        place_x, place_y, zoom, spin, shown = poses.astype(np.float32)[:, :, None, None]
        scale = scale * zoom
    x0, y0 = place_x * (1 - scale), place_y * (1 - scale)
    u, v = (x - x0) / scale, (y - y0) / scale             # the same in the figure's own, unturned plane
    turn = np.array([min(variety.turn, LARGEST_TURN.get(SHAPES[label], 0.5)) for label in labels], np.float32)
    cos, sin = direction(uniform(-1, 1) * turn[:, None, None] + spin)

    def distance_to_figure(u, v):                         # (B, S, S), in half widths of the picture
        u, v = u * cos + v * sin, v * cos - u * sin
        distance = np.empty(u.shape, np.float32)
        for label in np.unique(labels):
            distance[labels == label] = SHAPES[label](u[labels == label], v[labels == label])
        return distance * scale

    # Colours: figure and ground differ by `contrast` in brightness, whatever their hues.
    dark = uniform() < variety.dark_ground
    ground_luma = np.where(dark, uniform(0.10, 0.30), uniform(*variety.ground_luma))
    sign = np.where(dark, np.float32(1), np.float32(-1))  # from the ground's brightness to the figure's
    figure_luma = ground_luma + sign * uniform(*variety.contrast)
    ground_hue = uniform()
    figure_hue = ground_hue + uniform(0.2, 0.8)
    if variety.hues:
        ground_hue, figure_hue = ((np.floor(hue * variety.hues) + 0.5) / variety.hues
                                  for hue in (ground_hue, figure_hue))
    ground = colour(ground_hue, uniform(*variety.ground_saturation), ground_luma)
    other_ground = colour(ground_hue + uniform(-0.1, 0.1), uniform(*variety.ground_saturation),
                          ground_luma - sign * uniform(-0.10, 0.22))
    figure = colour(figure_hue, uniform(*variety.figure_saturation), figure_luma)
    other_figure = colour(figure_hue + uniform(-0.12, 0.12), uniform(0.5, 1.0),
                          figure_luma + sign * uniform(0.12, 0.30))

    # The ground: two colours, mixed by a gradient, stripes or noise; on it the figure's soft shadow.
    _, gradient, striped, noisy = one_of(variety.ground_odds)
    toward_x, toward_y = direction(uniform())
    mix = gradient * np.clip(0.5 + 0.5 * (x * toward_x + y * toward_y), 0, 1)
    mix = mix + striped * 0.6 * inside(stripes(x, y, uniform(0.9, 1.6)))
    nodes = np.concatenate([uniform() for _ in range(25)], axis=1).reshape(-1, 5, 5)
    mix = mix + noisy * soft_noise(nodes, size)
    canvas = ground + (other_ground - ground) * mix[:, None]                                    # (B, 3, S, S)
    shadow = uniform(*variety.shadow) * np.clip(0.5 - distance_to_figure(u - 0.1, v + 0.16) / 0.35, 0, 1)
    canvas = canvas * (1 - shown * shadow)[:, None]

    # The figure: two colours, mixed by stripes or dots; lit from the upper left; outlined; laid on top.
    _, striped, dotted = one_of(variety.fill_odds)
    frequency = uniform(1.2, 1.8)
    mix = striped * inside(stripes(u, v, frequency) * scale) + dotted * inside(dots(u, v, frequency) * scale)
    paint = figure + (other_figure - figure) * mix[:, None]
    _, linear, rounded = one_of(variety.shade_odds)
    light_u, light_v = u + 0.3, v - 0.35
    light = linear * (0.6 * v - 0.4 * u) + rounded * (1 - 1.3 * (light_u * light_u + light_v * light_v))
    paint = paint + (uniform(0.12, 0.25) * light)[:, None]
    _, black, white = one_of(variety.outline_odds)
    distance = distance_to_figure(u, v)
    outline = (black + white) * inside(-distance - 0.11 * scale)
    paint = paint + ((0.05 * black + 0.97 * white)[:, None] - paint) * outline[:, None]
    canvas = canvas + (paint - canvas) * (shown * inside(distance))[:, None]
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def colour(hue, saturation, luma):
    """RGB (B, 3, 1, 1) of a hue (in turns), mixed with black or white until its brightness is `luma`."""
    sector = (np.array([5, 3, 1], np.float32)[:, None, None] + 6 * hue[:, None]) % 6
    rgb = 1 - saturation[:, None] * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    own = 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]
    luma = np.clip(luma[:, None], 0.03, 0.97)
    return np.where(luma < own, rgb * (luma / own), 1 + (rgb - 1) * ((1 - luma) / np.maximum(1 - own, 1e-3)))


def soft_noise(nodes, size):
    """The values `nodes` (B, 5, 5) of a coarse lattice, interpolated smoothly to (B, S, S)."""
    at = (4 * np.arange(size, dtype=np.float32) + 2) / size
    near = np.clip(1 - abs(at - np.arange(5, dtype=np.float32)[:, None]), 0, 1)
    weight = near * near * (3 - 2 * near)                 # (5, S): smoothstep; each pixel's weights sum to 1
    rows = sum(nodes[:, :, i, None] * weight[i] for i in range(5))                               # (B, 5, S)
    return sum(rows[:, i, None, :] * weight[i][:, None] for i in range(5))                       # (B, S, S)


# ------------------------------------------------------------------------------------------------------------
# Clips: decoding and writing videos, folders of them, and generated scenes that move
# ------------------------------------------------------------------------------------------------------------

def import_av():
    """PyAV, the bindings of FFmpeg's decoders: needed for real videos only, and so not at the top."""
    try:
        import av
    except ImportError:
        raise UserError(f"videos other than {' and '.join(PILLOW_SUFFIXES)} need PyAV, which is not "
                        f"installed: pip install av") from None
    return av


def video_frames(path):
    """Yield the frames of a video as functions that give them as PIL RGB images.

    A frame that is skipped is then decoded, as the next ones depend on it, but not converted to RGB. Rotation
    by metadata and the frames' times are ignored. Raises ValueError or what the decoder raises for files that
    cannot be read, also for one that has lost a tenth of the frames that its header promises.
    """
    if str(path).lower().endswith(PILLOW_SUFFIXES):
        with Image.open(path) as image:
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                yield functools.partial(image.convert, "RGB")
        return
    with import_av().open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
        stream, count = container.streams.video[0], 0
        for count, frame in enumerate(container.decode(stream), 1):
            yield frame.to_image
        if count < 0.9 * stream.frames:                   # encoders miscount by one or two; 0 is "unknown"
            raise ValueError(f"truncated: {count} of {stream.frames} frames")


def read_video(path):
    """All frames of a video or animated picture: uint8 array (N, H, W, 3).

    Raises `UserError` for a file that is missing, damaged or no video.
    """
    require(os.path.isfile(path), f"{path} does not exist; check the path")
    try:
        return np.stack([np.asarray(convert()) for convert in video_frames(path)])
    except UserError:
        raise
    except Exception as error:                            # decoders raise almost anything on damaged bytes
        raise UserError(f"{path} cannot be read as a video ({error}); copy it again") from None


def frame_rate(path):
    """Frames a second, as the file says (25 where it says nothing)."""
    if str(path).lower().endswith(PILLOW_SUFFIXES):
        with Image.open(path) as image:
            image.load()                                  # WebP tells durations only after decoding
            return 1000 / (image.info.get("duration") or 40)
    with import_av().open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 25)


def write_video(path, frames, fps=25):
    """Write frames, uint8 (N, H, W, 3), atomically, in the format of the suffix.

    .mp4 and .mkv are H.264, .avi is MPEG-4, both close to what is seen but not exact, and padded to even
    sides (their colours have half the resolution); .webp is exact; .gif has 256 colours a frame. The last two
    show equal frames in a row as one that lasts longer. Raises `UserError` for other suffixes.
    """
    path, frames = pathlib.Path(path), np.asarray(frames)
    codecs = {".mp4": ("libx264", {"crf": "16"}), ".mkv": ("libx264", {"crf": "16"}),
              ".avi": ("mpeg4", {"qmin": "2", "qmax": "3"})}
    suffix = path.suffix.lower()
    require(suffix in (*codecs, *PILLOW_SUFFIXES), f"{path}: videos are written as "
            f"{', '.join((*codecs, *PILLOW_SUFFIXES))}, not as {suffix or 'a file without suffix'}")
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and len(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{suffix}")
    try:
        if suffix in PILLOW_SUFFIXES:
            first, *others = map(Image.fromarray, frames)
            exact = {"lossless": True} if suffix == ".webp" else {}
            first.save(temporary, save_all=True, append_images=others, duration=round(1000 / fps), loop=0,
                       **exact)
        else:
            av, (codec, options) = import_av(), codecs[suffix]
            odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
            frames = np.pad(frames, odd, "edge")
            with av.open(str(temporary), "w") as container:
                rate = fractions.Fraction(fps).limit_denominator(1000)
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class VideoFolder(ImageFolder):
    """Clips of `frames` frames out of a folder of videos, arranged as in `ImageFolder`.

    `start`: "random", anywhere in the video by the item's seed, or "center". Every frame is resized and
    cropped like a picture (`preprocess`), all with the same crop and mirroring. Items are (clip uint8
    (3, T, S, S), label, index); a video of less than T frames counts as broken. `files`: paths below the
    folder to use (None: all).
    """
    kind, suffixes = "clip", VIDEO_SUFFIXES

    def __init__(self, folder, image_size, frames, crop="center", start="center", flip=False, seed=0,
                 classes=None, resize=None, files=None):
        super().__init__(folder, image_size, crop, flip, seed, classes, resize)
        if files is not None:
            label = dict(zip(self.files, self.labels))
            missing = [file for file in files if file not in label]
            require(not missing, f"--data-path {folder} lacks {len(missing)} of the {len(files)} clips of "
                    f"--split-list, such as {missing[:1]}; give the folder that holds the class folders")
            self.files, self.labels = files, [label[file] for file in files]
            self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()
        if not all(file.lower().endswith(PILLOW_SUFFIXES) for file in self.files):
            import_av()                                   # to miss it now, not in the middle of an epoch
        self.frames, self.start = frames, start
        # Numbers of frames, once known: an index of a file is not reliable, so the first visit decodes all.
        self.lengths = torch.zeros(len(self), dtype=torch.int32).share_memory_()

    def load(self, index):
        """All frames as stored, uint8 (N, H, W, 3)."""
        return read_video(self.path(index))

    @property
    def axes(self):
        """The axes of an item behind the colours: (T, S, S)."""
        return self.frames, self.image_size, self.image_size

    def spare_frames(self, index):
        """How many frames more than T a video has. Raises ValueError where it has less."""
        if not self.lengths[index]:
            self.lengths[index] = sum(1 for _ in video_frames(self.path(index)))
        N = int(self.lengths[index])
        if N < self.frames:
            raise ValueError(f"too short: {N} frames, {self.frames} are needed")
        return N - self.frames

    def cut(self, index, first, seed):
        """The clip that starts at frame `first`, uint8 (3, T, S, S); `seed` decides crop and mirroring."""
        chosen = itertools.islice(video_frames(self.path(index)), first, first + self.frames)
        return torch.stack([self.preprocess(convert(), seed) for convert in chosen], 1)

    def pixels(self, index, seed):
        """The clip that `seed` chooses, uint8 (3, T, S, S)."""
        spare = self.spare_frames(index)
        # A number of its own, as that of the crop would tie where a clip is cut to when it starts.
        drawn = int(hash64(seed, 1)[0]) % (spare + 1)
        middle = (spare + self.frames) // 2 - self.frames // 2
        return self.cut(index, drawn if self.start == "random" else middle, seed)

    def ten_crops(self, index):
        """uint8 (10, 3, T, S, S): five clips from the first frame to the last, and all of them mirrored."""
        spare = self.spare_frames(index)
        clips = torch.stack([self.cut(index, round(spare * i / 4), 0) for i in range(5)])
        return torch.cat([clips, clips.flip(-1)])


def read_split_list(path):
    """The videos named in an official UCF-101 list: lines "Class/v_Class_g01_c01.avi", some with a number.

    The numbers are those of the sorted class names, from 1: nothing new, so they are not used.
    """
    require(os.path.isfile(path), f"--split-list {path} does not exist; check the path")
    with open(path) as file:
        files = [re.sub(r"\s+\d+$", "", line.strip()) for line in file if line.strip()]
    require(files, f"--split-list {path} names no clips")
    return sorted(set(files))


# Where the figure is after the part p of the clip: (x, y, size, turns, shown), with chance in a and b.
# Only + - * / and floor, as for the shapes.
MOTIONS = {
    "right": lambda p, a, b: (b * (2 * p - 1), a, 1, 0, 1),
    "left": lambda p, a, b: (b * (1 - 2 * p), a, 1, 0, 1),
    "up": lambda p, a, b: (a, b * (2 * p - 1), 1, 0, 1),
    "down": lambda p, a, b: (a, b * (1 - 2 * p), 1, 0, 1),
    "grow": lambda p, a, b: (a, b - 0.85, 0.5 + 1.4 * p, 0, 1),
    "shrink": lambda p, a, b: (a, b - 0.85, 1.9 - 1.4 * p, 0, 1),
    "turn-left": lambda p, a, b: (a, b - 0.85, 1.6, p, 1),
    "turn-right": lambda p, a, b: (a, b - 0.85, 1.6, -p, 1),
    "bounce": lambda p, a, b: (a, 2 * b * (1 - (4 * p - np.floor(2 * p) * 2 - 1) ** 2) - 1, 1, 0, 1),
    "blink": lambda p, a, b: (a, b - 0.85, 1.6, 0, np.floor(4 * p + 0.5) % 2 == 0),
}
MOVING = dataclasses.replace(VARIETIES["plain"], scale=(0.32, 0.44), turn=0.5, contrast=(0.40, 0.50))
# Round ones and the flower hardly show that they turn.
MOVING_SHAPES = [i for i, shape in enumerate(SHAPES) if shape not in (ball, ring, flower)]


class GeneratedClips(Images):
    """Drawn clips of ten motions; clip `index` has motion index % 10, its figure and colours are chance.

    As in `Generated`, a clip is a function of (seed, split, index); other sizes and numbers of frames show
    the same scene. A motion takes the whole clip, except that a turn takes at most 18 degrees a frame: more
    could be seen as a turn of a square or a star the other way round.
    """
    kind = "clip"

    def __init__(self, split, image_size, frames=17, length=None, seed=0):
        self.split, self.frames = split, frames
        length = (10_000 if split == "train" else 1_000) if length is None else length
        super().__init__("generated", list(MOTIONS), length, image_size, "center", False, seed)

    @property
    def axes(self):
        """The axes of an item behind the colours: (T, S, S)."""
        return self.frames, self.image_size, self.image_size

    def __getitems__(self, requests):
        indices = [self.index_and_seed(request)[0] for request in requests]
        clips = torch.from_numpy(self.draw(np.array(indices)))
        return [(clip, self.label(index), index) for clip, index in zip(clips, indices)]

    def draw(self, indices):
        """uint8 array (B, 3, T, S, S) of the clips `indices` (B,)."""
        T, S = self.frames, self.image_size
        keys = hash64(self.seed, indices * len(SPLITS) + SPLITS.index(self.split), 1)
        shapes = np.array(MOVING_SHAPES)[hash64(keys, 1) % np.uint64(len(MOVING_SHAPES))]
        a, b = (hash64(keys, i) >> np.uint64(40) for i in (2, 3))
        a, b = 1.4 * a.astype(np.float32) * 2 ** -24 - 0.7, 0.7 + 0.3 * b.astype(np.float32) * 2 ** -24
        p = np.arange(T) / max(1, T - 1)
        poses = np.zeros((5, len(indices), T))
        for i, index in enumerate(indices):
            for row, value in zip(poses[:, i], list(MOTIONS.values())[index % len(MOTIONS)](p, a[i], b[i])):
                row[:] = value
        poses[3] *= min(0.75, 0.05 * (T - 1))                                      # full turns in all
        pictures = draw_in_blocks(keys.repeat(T), shapes.repeat(T), S, MOVING, poses.reshape(5, -1))
        return pictures.reshape(-1, T, 3, S, S).swapaxes(1, 2)

    def path(self, index):
        """A name for the clip."""
        return f"{self.name}[{index}]"

    def load(self, index):
        """All frames, uint8 (T, S, S, 3)."""
        return self.draw(np.array([index]))[0].transpose(1, 2, 3, 0)

    def label(self, index):
        """The motion of clip `index`: they take turns."""
        return index % len(MOTIONS)


# ------------------------------------------------------------------------------------------------------------
# From a path to batches: which data set, in which order, to which rank
# ------------------------------------------------------------------------------------------------------------

def build_dataset(data_path, split, image_size, crop="center", flip=False, length=None, seed=0, resize=None):
    """The data set behind `--data-path`, ready for `train_loader` and `eval_loader`.

    * None or "generated": the generated set, "generated-plain" its easier variety; `length` pictures (None:
      20,000 to train on, 1,000 otherwise).
    * a folder: if it has subfolders train/ and val/ (or test/), `split` picks one; else it is used as it is.
    * 'shards-{000..127}.tar': tar files; `split` has no meaning, give each split its own pattern.

    `resize` makes small crops of large pictures: the shorter side before the crop (None: `image_size`, as
    published). `seed` selects the generated pictures, and the crops of items that are asked for without a
    seed. Raises `UserError` for a path that is missing, empty or ambiguous.
    """
    require(resize is None or resize >= image_size,
            f"--resize {resize} is smaller than --image-size {image_size}: the crop would not fit")
    require(split in SPLITS, f"the split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    path = "generated" if data_path is None else os.path.expanduser(str(data_path))
    if path in ("generated", "generated-plain"):
        return Generated(split, image_size, "plain" if path.endswith("plain") else "full", length, flip, seed)
    require(length is None, f"--data-path {path}: only the generated sets can be given a number of images")
    if os.path.isdir(path):
        folder, classes = choose_split(pathlib.Path(path), split)
        return ImageFolder(folder, image_size, crop, flip, seed, classes, resize)
    if path.endswith(".tar") or "{" in path:
        return TarShards(path, image_size, crop, flip, seed, resize)
    require(os.path.exists(path), f"--data-path {path} does not exist; check the path")
    raise UserError(f"--data-path {path} is a single file; give a folder of images, or tar files such as "
                    f"'shards-{{000..127}}.tar'")


def build_clips(data_path, split, image_size, frames=17, crop="center", flip=False, length=None, seed=0,
                resize=None, start=None, split_list=None):
    """The clips behind `--data-path`: a data set of (clip uint8 (3, T, S, S), label, index), T = `frames`.

    * None or "generated": scenes of ten motions, `length` of them (None: 10,000 to train on, else 1,000).
    * a folder: train|test/<class>/*.avi (mp4, webm, mkv, gif), or classes alone, or videos alone. With
      `split_list`, the path of an official UCF-101 list such as trainlist01.txt, the folder of the classes.

    `start` is where in the video a clip starts, "random" or "center" (None: what `crop` says, random to train
    and centre to evaluate). The rest is as in `build_dataset`. Raises `UserError` as that does, and where
    videos are to be read without PyAV.
    """
    require(resize is None or resize >= image_size,
            f"--resize {resize} is smaller than --image-size {image_size}: the crop would not fit")
    require(split in SPLITS, f"the split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    require(crop in CROPS and start in (None, *CROPS), f"the crop {crop!r} or the start {start!r} is "
            f"unknown; choose of {', '.join(CROPS)}")
    if data_path in (None, "generated"):
        require(not flip, "--flip: mirrored, a generated clip that moves left is one that moves right; leave "
                "the flag out")
        require(not split_list, "--split-list is for a folder of videos; give it with --data-path")
        return GeneratedClips(split, image_size, frames, length, seed)
    folder = pathlib.Path(data_path).expanduser()
    require(length is None, f"--data-path {folder}: only the generated clips can be given a number")
    require(folder.is_dir(), f"--data-path {folder} is no folder of videos; check the path")
    folder, classes = (folder, None) if split_list else choose_split(folder, split)
    files = read_split_list(split_list) if split_list else None
    return VideoFolder(folder, image_size, frames, crop, start or crop, flip, seed, classes, resize, files)


def choose_split(folder, split):
    """(the folder that holds `split`, its class names or None for "as found there").

    The splits of a folder share the class names of all of them, so that a label means the same in each.
    """
    folders = subfolder_names(folder)
    present = [name for name in SPLITS if name in folders]
    if not present:
        return folder, None
    others = [name for name in folders if name not in present]
    require(len(present) > 1 or not others, f"--data-path {folder} has {present[0]}/ beside "
            f"{', '.join(others[:3])}: is it a split or a class? Give the folder to read, such as "
            f"{folder / present[0]}, or rename it")
    wanted = {"train": ["train"], "val": ["val", "test"], "test": ["test", "val"]}[split]
    chosen = [name for name in wanted if name in present]
    require(chosen, f"--data-path {folder} has {' and '.join(present)} but no {' or '.join(wanted)} folder; "
            f"add one, or give the folder to read, such as {folder / present[0]}")
    return folder / chosen[0], sorted({name for part in present for name in subfolder_names(folder / part)})


@functools.lru_cache(maxsize=2)
def epoch_order(length, seed, epoch):
    """All indices of a data set in the order of this epoch, int64 (length,)."""
    return torch.randperm(length, generator=seeded_generator(hash64(seed, epoch)[0])).numpy()


def global_batch(length, global_batch_size, seed, step):
    """What all ranks together see in training step `step` (from 0): a list of (index, seed of crop and flip).

    Every epoch is a new permutation. What remains of it after its last whole batch is dropped: an epoch has
    length // global_batch_size steps, and no batch asks for an image twice.
    """
    epoch, position = divmod(step, length // global_batch_size)
    first = position * global_batch_size
    indices = epoch_order(length, seed, epoch)[first:first + global_batch_size]
    return list(zip(indices.tolist(), hash64(seed, epoch, indices).tolist()))


def train_loader(dataset, global_batch_size, seed, start_step=0, rank=0, world_size=1, accumulation=1,
                 num_workers=0):
    """Endless micro-batches (images uint8 (b, 3, S, S), labels (b,), indices (b,)), `accumulation` a step.

    The global batch of a step depends on (data set, size, seed, step) alone. It is cut into `accumulation`
    parts and each part into `world_size` shares of b images; joined in this order, the shares of any cut
    are the same batch. `start_step` continues as if the steps before had been run. The next readable image
    replaces a broken one, so that all shares keep their size. Raises `UserError` for a batch that cannot be
    cut so or is larger than the data set, and while iterating when more than 1 % of the images are broken.
    """
    require(global_batch_size <= len(dataset), f"--global-batch-size {global_batch_size} is more than the "
            f"{len(dataset)} {dataset.kind}s of {dataset.name}; lower it")
    require(global_batch_size % (world_size * accumulation) == 0,
            f"--global-batch-size {global_batch_size} cannot be shared by {world_size} ranks with "
            f"{accumulation} accumulation steps; choose a multiple of {world_size * accumulation}")
    share = global_batch_size // (world_size * accumulation)

    def shares_of_this_rank():
        for step in itertools.count(start_step):
            requests = global_batch(len(dataset), global_batch_size, seed, step)
            for part in range(accumulation):
                first = (part * world_size + rank) * share
                yield requests[first:first + share]

    return batches(dataset, Replacing(dataset), shares_of_this_rank(), num_workers)


def eval_loader(dataset, batch_size, rank=0, world_size=1, num_workers=0):
    """One pass over the images rank, rank + world_size, ... in batches as of `train_loader`.

    No padding and no repetition: the last batch may be smaller, ranks may have different numbers of batches
    (so do not communicate inside the loop), and broken images are left out.
    """
    mine = range(rank, len(dataset), world_size)
    parts = [list(mine[first:first + batch_size]) for first in range(0, len(mine), batch_size)]
    return batches(dataset, dataset, parts, num_workers)


def batches(dataset, source, requests, num_workers):
    """The batches of `source` for each list in `requests`, with an eye on the broken images of `dataset`."""
    loader = DataLoader(source, batch_sampler=requests, collate_fn=collate, num_workers=num_workers,
                        worker_init_fn=leave_process_group, pin_memory=torch.cuda.is_available(),
                        generator=torch.Generator())      # its own: the global one must not depend on loaders
    for batch in loader:
        dataset.raise_if_broken()
        if batch is not None:
            yield batch


def collate(items):
    """A batch of the readable items, None if there are none."""
    items = [item for item in items if item is not None]
    if not items:
        return None
    images, labels, indices = zip(*items)
    return torch.stack(images), torch.tensor(labels), torch.tensor(indices)


def leave_process_group(worker):
    """Ctrl-C goes to a whole process group; a worker that it killed would stop the trainer from saving."""
    os.setpgrp()


class Replacing:
    """A view of a data set in which the next readable image, by index, stands in for a broken one."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, requests):
        items = self.dataset.__getitems__(requests)
        return [item or self.next_readable(*request) for item, request in zip(items, requests)]

    def next_readable(self, index, seed):
        """The first readable item after `index`; None once too many are broken, for then training stops."""
        item = None
        while item is None and not self.dataset.too_many_broken():
            index = (index + 1) % len(self.dataset)
            item = self.dataset[index, seed]
        return item


# ------------------------------------------------------------------------------------------------------------
# Looking at a data set
# ------------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    """Command-line flags."""
    parser = runtime.ArgumentParser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", default="generated", help="a folder of images, tar files such as "
                       "'shards-{000..127}.tar', or the built-in sets generated and generated-plain")
    group.add_argument("--frames", type=runtime.positive_int,
                       help="look at clips of so many frames: a folder of videos, or generated")
    group.add_argument("--split", choices=SPLITS, default="train", help="which part of the data")
    group.add_argument("--image-size", type=runtime.positive_int, default=64, help="side of the square crop")
    group.add_argument(
        "--resize", type=runtime.positive_int, help="shorter side before the crop (--image-size)"
    )
    group.add_argument("--crop", choices=CROPS, default="center", help="where the crop is taken")
    group.add_argument("--flip", action="store_true", help="mirror every second image at random")
    group.add_argument("--global-seed", type=int, default=0, help="seed of pictures, crops and flips")
    group = parser.add_argument_group("output")
    group.add_argument("--output", help="the grid to write, PNG, or of clips webp or gif (runs/data.png or "
                                        "runs/data.webp)")
    group.add_argument("--rows", type=runtime.positive_int, default=8, help="rows of the grid, of 10 columns")
    group.add_argument("--check-all", action="store_true", help="read every image, not just those shown")
    group.add_argument("--num-workers", type=runtime.non_negative_int, default=0,
                       help="processes that read images for --check-all")
    return parser.parse_args(argv)


def choose_for_grid(dataset, rows, columns=10):
    """(indices of images row by row, number of columns): a column for each of up to `columns` classes."""
    by_class = {}
    for index in range(len(dataset)):
        by_class.setdefault(dataset.label(index), []).append(index)
    groups = [by_class[label] for label in sorted(by_class)]
    if len(groups) == 1:                                  # no classes: deal the images out to the columns
        groups = [groups[0][i::columns] for i in range(min(columns, len(groups[0])))]
    if len(groups) > columns:
        groups = [groups[i * len(groups) // columns] for i in range(columns)]
    rows = min(rows, max(map(len, groups)))               # a smaller class shows some image twice
    return [group[row * len(group) // rows] for row in range(rows) for group in groups], len(groups)


def main(args):
    """Write the grid and print what the data set holds."""
    options = dict(crop=args.crop, flip=args.flip, seed=args.global_seed, resize=args.resize)
    if args.frames:
        dataset = build_clips(args.data_path, args.split, args.image_size, args.frames, **options)
    else:
        dataset = build_dataset(args.data_path, args.split, args.image_size, **options)
    output = args.output or f"runs/data{'.webp' if args.frames else '.png'}"
    require(not args.frames or output.lower().endswith(PILLOW_SUFFIXES),
            f"--output {output}: a grid of clips is written as {' or '.join(PILLOW_SUFFIXES)}")
    chosen, columns = choose_for_grid(dataset, args.rows)
    start = time.perf_counter()
    shown = [item for item in dataset.__getitems__(chosen) if item]
    milliseconds = (time.perf_counter() - start) / len(chosen) * 1000
    dataset.raise_if_broken()
    require(shown, f"none of the {len(chosen)} {dataset.kind}s chosen from {dataset.name} can be read")
    if args.check_all:
        parts = eval_loader(dataset, 64, num_workers=args.num_workers)
        for _ in tqdm(parts, "reading", math.ceil(len(dataset) / 64), disable=None):
            pass
    stored = (np.asarray(dataset.load(index)).shape[-3:-1] for _, _, index in shown)      # (H, W)
    sizes = sorted({(width, height) for height, width in stored}, key=math.prod)
    labels = [dataset.label(index) for index in range(len(dataset))]
    counts = np.bincount(labels, minlength=len(dataset.classes))
    names = [f"{name} {count}" for name, count in zip(dataset.classes, counts)]
    print(f"data     {dataset.name}\n"
          f"{dataset.kind + 's':<8} {len(dataset)}, {milliseconds:.2f} ms to read one, "
          f"{int(dataset.broken.sum())} broken of {len(dataset) if args.check_all else len(chosen)} read\n"
          f"classes  {len(names)}{': ' * bool(names)}{', '.join(names[:10])}{', ...' * (len(names) > 10)}\n"
          f"sizes    {' to '.join(f'{w} x {h}' for w, h in dict.fromkeys([sizes[0], sizes[-1]]))}, "
          f"seen as {' x '.join(map(str, dataset.axes))}, {dataset.crop} crop")
    captions = [dataset.classes[label] if dataset.classes else str(index) for _, label, index in shown]
    images, scale = torch.stack([image for image, _, _ in shown]), max(1, 96 // args.image_size)
    try:
        if args.frames:
            grids = [runtime.image_grid(frame, columns, captions, scale) for frame in images.unbind(2)]
            write_video(output, np.stack(grids), fps=10)
        else:
            runtime.save_png(output, runtime.image_grid(images, columns, captions, scale))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error}); choose another path") from None
    print(f"wrote    {output}")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
