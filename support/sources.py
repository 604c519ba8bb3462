"""Where images and clips come from: folders, tar shards, videos, torchvision's sets and the generated world.

What the networks see of a file is decided by a `data.View`, which every set is given. What is said of images
here holds for clips. Axis letters: 3 colours, H and W as stored, S the side after cropping, T frames.
"""
import copy
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import os
import pathlib
import re
import sys
import tarfile

import numpy as np
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from support import pictures, runtime, shapes
from support.runtime import UserError, require

SPLITS = shapes.SPLITS
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".avi", ".mp4", ".webm", ".mkv", ".gif")
BROKEN_LIMIT = 0.01                             # the fraction of a data set that may be unreadable
MAX_PIXELS = 2 ** 28                            # 0.8 GB as RGB: a larger image is an accident or an attack
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2        # PIL warns above this number and raises above twice as many

# ---- 1. From a file to images -----------------------------------------------------------------------------

def decode(file, upright=False):
    """The RGB PIL image in `file`, a path or a binary file. Raises anything where it cannot be read.

    Transparency is dropped, not composited. EXIF rotation is ignored, as for the published models, unless
    `upright` says to apply it.
    """
    if isinstance(file, (str, os.PathLike)) and not os.path.isfile(file):
        raise ValueError("no regular file, or none at all")               # a named pipe would hang for ever
    with Image.open(file) as image:
        return as_rgb(ImageOps.exif_transpose(image) if upright else image)


def as_rgb(image):
    """A PIL image in RGB. Raises ValueError for 16 or 32 bits, which PIL would clip to white."""
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of type {image.mode}; convert them to 8 bits")
    return image.convert("RGB")


print_once = functools.cache(print)


def video_frames(path):
    """Yield the frames of a video as functions that give them as PIL RGB images.

    A frame that is skipped is so decoded, but not converted. Rotation by metadata and the frames' times are
    ignored. Raises anything for damaged files, also for one that has lost a tenth of its frames.
    """
    if str(path).lower().endswith(pictures.PILLOW_FORMATS):
        with Image.open(path) as image:
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                yield functools.partial(image.convert, "RGB")
        return
    with pictures.import_av().open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
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
                yield frame.to_image
        # Encoders miscount by one or two; 0 is "unknown".
        if packets < 0.9 * stream.frames or count < 0.9 * expected:
            raise ValueError(f"truncated: {count} of {max(expected, stream.frames)} frames")


def frame_rate(path):
    """Frames a second, as the file says (25 where it says nothing)."""
    if str(path).lower().endswith(pictures.PILLOW_FORMATS):
        with Image.open(path) as image:
            image.load()                                  # WebP tells durations only after decoding
            return 1000 / (image.info.get("duration") or 40)
    with pictures.import_av().open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 25)


# ---- 2. Data sets ------------------------------------------------------------------------------------------

class Samples(Dataset):
    """What all data sets share: how a sample is asked for, and what happens when a file is broken.

    `dataset[index]` is (uint8 tensor as `view` says, label, index). A file that cannot be read is reported
    once on stderr and counted in `broken`, one flag a sample, in memory that worker processes share; the next
    readable one stands in for it, with its own index, or None once more than 1 % are broken.

    A subclass knows `paths` and `labels` (0 without classes) of all samples, and `classes`, the names in
    label order; its `read(index, rng)` returns what the view shows of a sample, or raises anything.
    """

    def __init__(self, name, classes, paths, labels, view):
        self.name = name
        self.classes = classes
        self.paths = paths
        self.labels = labels
        self.view = view
        self.kind = "clip" if view.frames else "image"     # what messages call a sample
        side = view.image_size
        self.axes = (view.frames, side, side) if view.frames else (side, side)
        self.broken = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

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
                    return self.read(index, rng), self.labels[index], index
            except Exception as error:                    # decoders raise almost anything on damaged bytes
                self.report_broken(index, error)
            if self.too_many_broken():                    # asked only here: it counts all flags
                return None
            index = (index + 1) % len(self)

    def report_broken(self, index, error):
        """Count sample `index` as broken and say so, unless another worker was faster."""
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        if not self.broken[index]:
            self.broken[index] = True
            print(f"broken {self.kind} skipped: {self.paths[index]} ({reason})", file=sys.stderr, flush=True)

    def too_many_broken(self):
        return int(self.broken.sum()) > BROKEN_LIMIT * len(self)

    def raise_if_broken(self, all_ranks=False):
        """Raise `UserError` if more than 1 % are known to be broken, here or (a collective) on any rank."""
        if all_ranks:
            self.broken |= runtime.all_reduce_sum(self.broken.int()) > 0
        require(not self.too_many_broken(),
                f"{int(self.broken.sum())} of the {len(self)} {self.kind}s of {self.name} are broken, more "
                f"than 1 %, such as {self.paths[int(self.broken.int().argmax())]}; copy or download the data "
                f"again, or remove the broken files")


class Folder(Samples):
    """A folder with a subfolder for each class (files at any depth below it), or a flat one without labels.

    Images, or videos where the view has frames. train: the folder that decides on the classes, if it is not
    this one. split_list: an official UCF-101 list of the files to use. Raises `UserError` where there is
    nothing, or both readings are possible.
    """

    def __init__(self, folder, view, train=None, split_list=None):
        folder = str(pathlib.Path(folder))
        kind = "videos" if view.frames else "images"
        suffixes = VIDEO_SUFFIXES if view.frames else IMAGE_SUFFIXES
        files = files_by_class(folder, suffixes)
        flat = files.pop(".", [])
        hint = ""
        if any(pathlib.Path(folder).glob("*.tar")):
            hint = "; for its tar files, give a pattern such as 'shards-{000..127}.tar'"
        require(files or flat, f"--data-path {folder} holds no {kind} ({' '.join(suffixes)}){hint}")
        require(not (files and flat), f"--data-path {folder} holds {kind} in class subfolders and "
                f"{len(flat)} beside them, such as {flat[:1]}; move all into subfolders, or none")
        classes = list(files)
        if files and train and str(train) != folder:
            classes = [name for name in files_by_class(train, suffixes) if name != "."] or classes
        strange = [name for name in files if name not in classes]
        require(not strange, f"--data-path: {folder} has class folders that train/ lacks, which decides on "
                             f"labels: {', '.join(strange[:5])}; rename or remove them")
        if split_list:
            classes, listed = read_split_list(split_list, classes)
            listed = {os.path.join(folder, name) for name in listed}
            missing = sorted(listed.difference(*files.values()))
            require(not missing, f"--data-path {folder} lacks {len(missing)} of the {len(listed)} clips of "
                    f"--split-list, such as {missing[:1]}; give the folder that holds the class folders")
            files = {name: [path for path in files[name] if path in listed] for name in files}
        paths = flat
        labels = [0] * len(flat)
        for name in files:
            paths += files[name]
            labels += [classes.index(name)] * len(files[name])
        super().__init__(folder, classes, paths, labels, view)
        if view.frames and not all(path.lower().endswith(pictures.PILLOW_FORMATS) for path in paths):
            pictures.import_av()                          # to miss it now, not in the middle of an epoch
        # Numbers of frames, once known: an index of a file is not reliable, so the first visit decodes all.
        self.lengths = torch.zeros(len(self), dtype=torch.int32).share_memory_()

    def read(self, index, rng):
        view = self.view
        if view.frames is None:
            return view.pixels(decode(self.paths[index]), rng)
        if not self.lengths[index]:
            self.lengths[index] = sum(1 for _ in video_frames(self.paths[index]))
        length = int(self.lengths[index])
        spare = length - view.frames
        if spare < 0:
            raise ValueError(f"too short: {length} frames, {view.frames} are needed")
        if view.crop == "ten":
            plain = dataclasses.replace(view, crop="center", flip=False)
            clips = torch.stack([self.clip(index, round(spare * i / 4), plain) for i in range(5)])
            return torch.cat([clips, clips.flip(-1)])
        first = length // 2 - view.frames // 2
        if (view.start or view.crop) == "random":
            first = int(rng.integers(spare + 1))
        return self.clip(index, first, view, rng)

    def clip(self, index, first, view, rng=None):
        """The clip that starts at frame `first`, (3, T, S, S); a copy of `rng` crops each frame alike."""
        chosen = itertools.islice(video_frames(self.paths[index]), first, first + view.frames)
        return torch.stack([view.pixels(frame(), copy.deepcopy(rng)) for frame in chosen], 1)


def subfolder_names(folder):
    """Sorted names of the subfolders of `folder`, without hidden ones."""
    return sorted(item.name for item in os.scandir(folder) if item.is_dir() and not item.name.startswith("."))


def files_by_class(folder, suffixes):
    """{class: paths of its files}, in order, "." for what is in no class folder; says which hold none.

    Ignored is whatever is hidden (macOS leaves a "._name.jpg" beside "name.jpg"), and what links lead to a
    second time.
    """
    def refuse(error):
        raise UserError(f"--data-path: {error.filename} may not be read; let it be")

    files = {}
    seen = set()                                          # links may lead back: each real folder once
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        subfolders[:] = [] if real in seen else sorted(name for name in subfolders if name[0] != ".")
        found = [name for name in names if name.lower().endswith(suffixes) and name[0] != "."]
        if found and real not in seen:
            name = os.path.relpath(place, folder).split(os.sep)[0]
            files.setdefault(name, []).extend(os.path.join(place, file) for file in found)
        seen.add(real)
    empty = [name for name in subfolder_names(folder) if name not in files]
    if empty:
        runtime.print_main(f"{folder}: {len(empty)} subfolders hold no file that can be read "
                           f"({' '.join(suffixes)}), so they are no classes: {', '.join(empty[:5])}")
    return {name: sorted(paths, key=os.path.split) for name, paths in files.items()}


def read_split_list(path, classes):
    """(`classes` in UCF-101's order, the clips listed) of one of its official lists.

    A class is numbered by classInd.txt beside the list, or by its lines "Class/clip.avi 7". Without numbers,
    names decide, which is another order for four of them (HammerThrow, Hammering, ..).
    """
    path = pathlib.Path(path)
    require(path.is_file(), f"--split-list {path} does not exist; check the path")
    clips = re.findall(r"^(\S+\.\w+)", path.read_text(), re.MULTILINE)
    require(clips, f"--split-list {path} names no clips")
    number = dict(re.findall(r"^(\S+)/\S+ +(\d+)", path.read_text(), re.MULTILINE))
    index = path.with_name("classInd.txt")
    if index.exists():
        number = {name: i for i, name in re.findall(r"^(\d+) +(\S+)", index.read_text(), re.MULTILINE)}
    return sorted(classes, key=lambda name: (int(number.get(name, sys.maxsize)), name)), clips


class TarShards(Samples):
    """Images in plain tar files, each with an optional class number in a text member `.cls` of the same name.

    Their positions are read once, at start-up; then any image is one seek away, in any order. Classes are
    called "0", "1", ... . Raises `UserError` for a damaged shard, and where only some images have a class.
    """

    def __init__(self, pattern, view):
        shards = expand_braces(pattern)
        missing = [shard for shard in shards if not os.path.isfile(shard)]
        require(not missing, f"--data-path {pattern}: {len(missing)} of {len(shards)} shards missing "
                             f"({', '.join(missing[:5])}); check the path and the range")
        progress = tqdm(shards, "reading shards", leave=False, disable=not runtime.is_main() or None)
        images = [image for shard in progress for image in index_shard(shard)]
        require(images, f"--data-path {pattern} holds no images ({' '.join(IMAGE_SUFFIXES)})")
        paths, self.places, labels = zip(*images)
        unlabelled = [path for path, label in zip(paths, labels) if label is None]
        require(len(unlabelled) in (0, len(paths)), f"--data-path {pattern}: {len(unlabelled)} of "
                f"{len(paths)} images have no .cls member, such as {unlabelled[:1]}; label all or none")
        labels = [label or 0 for label in labels]
        classes = [] if unlabelled else [str(i) for i in range(max(labels) + 1)]
        empty = sorted(set(range(len(classes))) - set(labels))
        if empty:
            runtime.print_main(f"{pattern}: no image has the class {', '.join(map(str, empty[:10]))}")
        super().__init__(pattern, classes, paths, labels, view)

    def read(self, index, rng):
        shard, offset, size = self.places[index]
        with open(shard, "rb") as file:                   # opened anew: workers must not share a position
            file.seek(offset)
            return self.view.pixels(decode(io.BytesIO(file.read(size))), rng)


def index_shard(shard):
    """The images of a tar file: a list of (path to show, (shard, offset, bytes), class or None)."""
    images = []
    classes = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                stem, suffix = os.path.splitext(member.name)
                if not member.isfile() or os.path.basename(stem).startswith("."):
                    continue
                if suffix.lower() in IMAGE_SUFFIXES:
                    place = (shard, member.offset_data, member.size)
                    images.append((stem, f"{shard}:{member.name}", place))
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
        rest = file.read(1 << 20)
        require(rest[:512] == bytes(512), f"shard {shard} is truncated or damaged after {len(images)} "
                f"images; copy or download it again")
        require(not any(rest), f"shard {shard} goes on after its end, as if joined by cat; join archives "
                               f"with tar --concatenate")
    orphans = sorted(classes.keys() - {stem for stem, *_ in images})
    require(not orphans, f"shard {shard}: {' '.join(orphans[:1])}.cls has no image of just this name")
    return [(path, place, classes.get(stem)) for stem, path, place in images]


def expand_braces(pattern):
    """'a-{00..02}.tar' to ['a-00.tar', 'a-01.tar', 'a-02.tar'], like bash; also several ranges."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        require("{" not in pattern and "}" not in pattern, f"--data-path {pattern}: a range is {{000..127}}")
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    require(len(numbers) <= 100_000, f"--data-path {pattern}: more than 100,000 shards; check the range")
    require(numbers, f"--data-path {pattern}: the range {found[0]} is empty")
    return [shard for number in numbers for shard in expand_braces(
        pattern[:found.start()] + str(number).zfill(len(found[1])) + pattern[found.end():])]


class Generated(Samples):
    """The drawn images and clips of shapes.py, as many and as large as you like; the classes take turns."""

    def __init__(self, split, view, plain=False, length=None):
        require(not (view.frames and (view.flip or view.crop == "ten")), "--flip and --ten-crop: mirrored, a "
                "generated clip that moves left is one that moves right; leave the flag out")
        self.split = split
        self.plain = plain
        length = length or (1_000 if split != "train" else 10_000 if view.frames else 20_000)
        name = "generated-plain" if plain else "generated"
        classes = list(shapes.MOTIONS if view.frames else shapes.SHAPES)
        paths = [f"{name}[{index}]" for index in range(length)]
        super().__init__(name, classes, paths, [index % len(classes) for index in range(length)], view)

    def __getitems__(self, requests):
        """Drawn together, which is faster."""
        view = self.view
        indices = [index for index, _ in requests]
        if view.frames:
            drawn = shapes.draw_clips(indices, self.split, view.image_size, view.frames, view.seed)
        else:
            drawn = shapes.draw_images(indices, self.split, view.image_size, view.seed, self.plain)
        samples = []
        for x, (index, seed) in zip(torch.from_numpy(drawn), requests):
            if view.crop == "ten":
                x = view.pixels(TF.to_pil_image(x))
            elif view.flip and np.random.default_rng((*seed, 1)).random() < 0.5:   # not the scene's own
                x = x.flip(-1)
            samples.append((x, self.labels[index], index))
        return samples


class Torchvision(Samples):
    """An image data set of torchvision by its name, such as CIFAR10, with its own splits and class names.

    It is downloaded on first use to `runtime.cache_dir()`. Raises `UserError` for an unknown name, and
    without a connection.
    """

    def __init__(self, name, split, view):
        kind = getattr(torchvision.datasets, name, None)
        close = difflib.get_close_matches(name, torchvision.datasets.__all__)
        require(isinstance(kind, type) and not view.frames, f"--data-path torchvision:{name} is no set of "
                f"images of torchvision; close names: {', '.join(close) or 'none'}")
        takes = inspect.signature(kind).parameters
        unknown = [key for key, value in takes.items() if value.default is value.empty and key != "root"]
        require(not unknown, f"--data-path torchvision:{name} needs more than a folder "
                             f"({', '.join(unknown)}); unpack it, and give the folder")
        folder = os.path.join(runtime.cache_dir(), "torchvision")
        parts = {"train": ("train", "trainval"), "val": ("val", "valid", "test"), "test": ("test", "val")}
        wishes = {"root": [folder], "download": [True], "train": [split == "train"], "split": parts[split]}
        wishes = {key: values for key, values in wishes.items() if key in takes}

        def opened():
            """The data set with the first options that it takes, downloaded unless it is there."""
            problems = []
            for values in itertools.product(*wishes.values()):
                try:
                    return kind(**dict(zip(wishes, values)))
                except (ValueError, OSError, RuntimeError) as problem:
                    problems.append(" ".join(str(problem).split())[:200])
            raise UserError(f"--data-path torchvision:{name} cannot be opened or downloaded ({problems[0]}); "
                            f"put its files into {folder}")

        self.source = source = runtime.main_first(opened)
        labels = [getattr(source, key) for key in ("targets", "labels", "_labels") if hasattr(source, key)]
        labels = [int(label) for label in (labels[0] if labels else (item[1] for item in source))]
        classes = getattr(source, "classes", None) or range(max(labels) + 1)
        paths = [f"torchvision:{name}[{i}]" for i in range(len(source))]
        super().__init__(f"torchvision:{name}", list(map(str, classes)), paths, labels, view)

    def read(self, index, rng):
        return self.view.pixels(as_rgb(self.source[index][0]), rng)


def build_dataset(data_path, split, view, split_list=None, length=None):
    """The data set behind `--data-path`, of images or clips as `view` says.

    * None or "generated": the generated set, "generated-plain" its easier images; `length` of them (None:
      20,000 images or 10,000 clips to train on, 1,000 otherwise).
    * a folder: if it has subfolders train/ and val/ (or test/), `split` picks one; else it is used as it is.
      With `split_list`, the path of an official UCF-101 list such as trainlist01.txt, the folder of classes.
    * "torchvision:CIFAR10" and the like: a data set of torchvision, with its own splits.
    * 'shards-{000..127}.tar': tar files; `split` has no meaning, give each split its own pattern.

    Raises `UserError` for a path that is missing, empty or ambiguous.
    """
    path = "generated" if data_path is None else os.path.expanduser(str(data_path))
    require(not split_list or (view.frames and not path.startswith("generated")),
            "--split-list is for a folder of videos; leave it out, or give the folder with --data-path")
    if path == "generated" or (path == "generated-plain" and not view.frames):
        return Generated(split, view, path == "generated-plain", length)
    if path.startswith("torchvision:"):
        return Torchvision(path.partition(":")[2], split, view)
    require(length is None, f"--data-path {path}: only the generated sets can be given a number of samples")
    if os.path.isdir(path):
        folder, train = (path, None) if split_list else choose_split(pathlib.Path(path), split)
        return Folder(folder, view, train, split_list)
    require(not view.frames, f"--data-path {path} is no folder of videos; check the path")
    if path.endswith(".tar") or "{" in path:
        return TarShards(path, view)
    require(os.path.exists(path), f"--data-path {path} does not exist; check the path")
    raise UserError(f"--data-path {path} is a single file; give a folder of images, or tar files such as "
                    f"'shards-{{000..127}}.tar'")


def choose_split(folder, split):
    """(the folder that holds `split`, train/ beside it or None).

    All splits have the class names of train/, so that a label means the same in each.
    """
    folders = subfolder_names(folder)
    present = [name for name in SPLITS if name in folders]
    likely = [name for name in folders if re.match("train|val|test|eval", name, re.IGNORECASE)]
    require(present or len(likely) < 2 or likely != folders, f"--data-path {folder} has "
            f"{', '.join(likely[:4])}: if these are no classes, call them train, val and test, or give one")
    if not present:
        return folder, None
    advice = f"give the folder to read, such as {folder / present[0]}"
    others = [name for name in folders if name not in present]
    require(len(present) > 1 or not others, f"--data-path {folder} has {present[0]}/ beside "
            f"{', '.join(others[:3])}: is it a split or a class? Rename it, or {advice}")
    wanted = {"train": ["train"], "val": ["val", "test"], "test": ["test", "val"]}[split]
    chosen = [name for name in wanted if name in present]
    require(chosen, f"--data-path {folder} has {' and '.join(present)} but no {' or '.join(wanted)} folder; "
            f"add one, or {advice}")
    return folder / chosen[0], folder / "train" if "train" in present else None
