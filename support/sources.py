"""Where images and clips come from: folders, tar shards, videos, torchvision's sets and the generated world.

What the networks see of a file is decided by a `data.View`, which every set is given. What is said of images
here holds for clips. Axis letters: 3 colours, H and W as stored, S the side after cropping, T frames.
"""
import bisect
import collections
import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import sys
import tarfile
import time
import zipfile

import numpy as np
import torch
import torchvision
import torchvision.transforms.functional as TF
from tqdm import tqdm

from support import pictures, runtime, shapes
from support.reading import (IMAGE_SUFFIXES, VIDEO_SUFFIXES, Samples, Strings, Unreadable, as_rgb, decode,
                             decoding, video_frames)
from support.runtime import UserError, require

SPLITS = shapes.SPLITS
PARTS = {"train": ["train"], "val": ["val", "test"], "test": ["test", "val"]}    # what serves as which split

# ---- 1. Folders --------------------------------------------------------------------------------------------

class Folder(Samples):
    """A folder with a subfolder for each class (files at any depth below it), or a flat one without labels.

    Images, or videos where the view has frames. classes: names that decide on labels, those of a training
    set; by default those of the subfolders, of `train` if that is given. split_list: an official UCF-101 list
    of the files to use. Raises `UserError` where there is nothing, or both readings are possible. A
    collective: rank 0 looks for all.
    """

    def __init__(self, folder, view, part=None, classes=(), train=None, split_list=None):
        folder = str(pathlib.Path(folder))
        kind = "videos" if view.frames else "images"
        suffixes = VIDEO_SUFFIXES if view.frames else IMAGE_SUFFIXES
        files, names = runtime.on_main(find_files, folder, suffixes)
        paths = Strings(names, os.path.join(folder, ""))
        flat = files.get(".", 0)
        if not files:
            tars = any(pathlib.Path(folder).glob("*.tar"))
            hint = "; for its tar files, give a pattern such as 'shards-{000..127}.tar'" if tars else ""
            raise UserError(f"--data-path {folder} holds no {kind} ({' '.join(suffixes)}){hint}")
        require(flat in (0, len(paths)), f"--data-path {folder} holds {kind} in class subfolders and "
                f"{flat} beside them, such as {paths[:1]}; move all into subfolders, or none")
        own = [] if flat else list(files)
        if own and train and not classes:
            classes = runtime.on_main(class_names, str(train), suffixes)
        classes = list(classes) if own and classes else own
        strange = [name for name in own if name not in classes]
        require(not strange, f"--data-path: {folder} has class folders that the training set lacks, which "
                             f"decides on labels: {', '.join(strange[:5])}; rename or remove them")
        if split_list:
            classes, listed = read_split_list(split_list, classes)
            found = [name for name in os.fsdecode(bytes(names)).split("\0") if name in listed]
            missing = sorted(listed.difference(found))
            require(not missing, f"--data-path {folder} lacks {len(missing)} of the {len(listed)} clips of "
                    f"--split-list, such as {missing[:1]}; give the folder that holds the class folders")
            paths = Strings(found, paths.prefix)
            files = collections.Counter(name.split(os.sep)[0] for name in found)
        labels = [0] if flat else [classes.index(name) for name in files]
        labels = np.repeat(labels, list(files.values()))
        super().__init__(folder, classes, paths, labels, view, part)
        if view.frames:
            if not all(path.lower().endswith(pictures.PILLOW_FORMATS) for path in paths):
                pictures.import_av()                      # to miss it now, not in the middle of an epoch
            # Numbers of frames, once known. A file's own index may be wrong, so the first visit decodes all.
            self.lengths = torch.zeros(len(self), dtype=torch.int32).share_memory_()

    def read(self, index, rng):
        """A (3, S, S) image or (3, T, S, S) clip, ten with `view.crop` "ten"."""
        view = self.view
        if view.frames is None:
            return view.pixels(decode(self.paths[index]), rng)
        if not self.lengths[index]:
            self.lengths[index] = sum(1 for _ in video_frames(self.paths[index]))
        length = int(self.lengths[index])
        spare = length - view.frames
        if spare < 0:
            raise Unreadable(f"too short: {length} frames, {view.frames} are needed")
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


def watched(items, title, size=lambda item: 1, unit="files"):
    """Yield `items`, and show on rank 0 how many have passed: a bar on a terminal, elsewhere a line after a
    second and every half minute. size: how many of `unit` an item is."""
    total = len(items) if hasattr(items, "__len__") else None
    of = f" of {total:,}" if total else ""
    count = 0
    due = time.monotonic() + 1
    silent = None if runtime.is_main() else True          # None: silent if this is no terminal
    with tqdm(desc=title, total=total, unit=f" {unit}", leave=False, disable=silent) as bar:
        for item in items:
            count += size(item)
            bar.update(size(item))
            if bar.disable and time.monotonic() > due:
                runtime.print_main(f"{title}: {count:,}{of} {unit}")
                due = time.monotonic() + 30
            yield item


def find_files(folder, suffixes):
    """({class: how many files}, the files' paths from `folder` on, a bytearray for `Strings`), both in order.

    The class "." is that of files in no subfolder. Ignored is whatever is hidden (macOS leaves a "._name.jpg"
    beside "name.jpg"), and what links lead to a second time. Says which subfolders hold none.
    """
    found = collections.defaultdict(list)   # {class: [(subfolder, the paths of its files, their number)]}
    walk = files_below(folder, suffixes)
    for place, text, number in watched(walk, f"looking through {folder}", lambda item: item[2]):
        found[place.split(os.sep)[0] or "."].append((place, os.fsencode(text), number))
    counts = {name: sum(number for *_, number in parts) for name, parts in found.items()}
    empty = [name for name in counts if name != "." and not counts[name]]
    if empty:
        runtime.print_main(f"{folder}: {len(empty)} subfolders hold no file that can be read "
                           f"({' '.join(suffixes)}), so they are no classes: {', '.join(empty[:5])}")
    texts = [text for parts in found.values() for _, text, _ in sorted(parts)]
    return {name: count for name, count in counts.items() if count}, bytearray().join(texts)


def class_names(folder, suffixes):
    """Those subfolders of `folder` that hold files."""
    return [name for name in find_files(folder, suffixes)[0] if name != "."]


def files_below(folder, suffixes):
    """Yield (path from `folder` on, the paths of its files, a NUL after each, their number) of all folders.

    Files are sorted; a folder that links lead to a second time has none then. No file is asked what it is,
    for its name tells; nor is each name looked at, where all have the same suffix. So this takes a third of
    the time of torchvision's ImageFolder.
    """
    seen = set()
    todo = [("", os.path.realpath(folder))]
    while todo:
        place, real = todo.pop()
        if real in seen:                                  # a link has led here before
            yield place, "", 0
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(os.path.join(folder, place)))
        except OSError as error:
            raise UserError(f"--data-path: {error.filename} may not be read; let it be") from None
        start = os.path.join(place, "")
        text = "".join([start, f"\0{start}".join(names), "\0"])
        suffix = os.path.splitext(names[0])[1] if names else ""
        is_plain = suffix.lower() in suffixes and text.count(f"{suffix}\0") == len(names)
        if not is_plain or bisect.bisect(names, ".") < bisect.bisect(names, "/"):      # "." + 1: hidden ones
            names = [name for name in names if name[0] != "."]
            others = [name for name in names if not name.lower().endswith(suffixes)]
            names = [name for name in names if name.lower().endswith(suffixes)]
            text = "".join(f"{start}{name}\0" for name in names)
            for name in reversed(others):                 # so that the first is the next to be looked into
                path = os.path.join(folder, start + name)
                if os.path.isdir(path):
                    end = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
                    todo.append((start + name, end))
        yield place, text, len(names)


def read_split_list(path, classes):
    """(`classes` in UCF-101's order, the set of clips listed) of one of its official lists.

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
    return sorted(classes, key=lambda name: (int(number.get(name, sys.maxsize)), name)), set(clips)


# ---- 2. Tar shards -----------------------------------------------------------------------------------------

class TarShards(Samples):
    """Images in plain tar files, each with an optional class number in a text member `.cls` of the same name.

    Any image is one seek away, in any order: `index_of` says where. Classes are called "0", "1", ... . Raises
    `UserError` for a damaged shard, and where only some images have a class. A collective, like `Folder`.
    """

    def __init__(self, pattern, view):
        self.shards, folder, index = runtime.on_main(index_of, pattern)
        self.places = torch.from_numpy(index["places"])
        paths = Strings(bytearray(index["names"]), folder)
        labels = index["labels"]
        require(len(paths), f"--data-path {pattern} holds no images ({' '.join(IMAGE_SUFFIXES)})")
        unlabelled = np.flatnonzero(labels < 0)
        require(len(unlabelled) in (0, len(paths)), f"--data-path {pattern}: {len(unlabelled)} of "
                f"{len(paths)} images have no .cls member, such as {paths[int(unlabelled[:1].sum())]}; label "
                f"all or none")
        classes = [str(i) for i in range(labels.max() + 1)]
        empty = np.flatnonzero(np.bincount(labels.clip(0)) == 0)
        if len(empty):
            runtime.print_main(f"{pattern}: no image has the class {', '.join(map(str, empty[:10]))}")
        super().__init__(pattern, classes, paths, labels.clip(0), view)

    def read(self, index, rng):
        """A (3, S, S) image, or ten."""
        shard, offset, size = self.places[index].tolist()
        with open(self.shards[shard], "rb") as file:      # opened anew: workers must not share a position
            file.seek(offset)
            return self.view.pixels(decode(io.BytesIO(file.read(size))), rng)


def index_of(pattern):
    """(shards, their folder, where their images are) of a pattern such as 'imagenet/shards-{000..127}.tar'.

    Where: {"names": for `Strings`, "places": shard number, offset and bytes, int64 (N, 3), "labels": int64,
    -1 without}. To read all headers takes minutes for the 150 GB of ImageNet. So the index is kept beside the
    shards, or in the cache if that cannot be written to, in a file that is named after the names, sizes and
    times of all shards: once these are others, it is not found.
    """
    shards = expand_braces(pattern)
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    require(not missing, f"--data-path {pattern}: {len(missing)} of {len(shards)} shards missing "
                         f"({', '.join(missing[:5])}); check the path and the range")
    folder = os.path.join(os.path.commonpath([os.path.dirname(shard) for shard in shards]), "")
    names = [os.path.relpath(shard, folder or ".") for shard in shards]
    stats = [os.stat(shard) for shard in shards]
    facts = json.dumps([names, [(stat.st_size, stat.st_mtime_ns) for stat in stats]])
    file_name = f".index-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.npz"
    files = [os.path.join(folder, file_name), os.path.join(runtime.cache_dir(), "shards", file_name)]
    for path in files:
        index = read_index(path)
        if index:
            return shards, folder, index
    index = make_index(shards, names)
    for path in files:
        with contextlib.suppress(OSError):                # read-only, or full
            with runtime.atomic(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **index)
            runtime.print_main(f"index of {pattern} written to {path}")
            break
    return shards, folder, index


def read_index(path):
    """The dict of arrays in the file of an index; None where there is none, or a torn one."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in ("names", "places", "labels")}
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None


def make_index(shards, names):
    """The index of shards, called `names` in it; see `index_of`."""
    paths = []
    places = []
    labels = []
    for number, shard in enumerate(watched(shards, "reading the headers of", unit="shards")):
        images = index_shard(shard)
        paths.append("".join(f"{names[number]}:{member}\0" for member, *_ in images))
        places += [(number, offset, size) for _, offset, size, _ in images]
        labels += [label for *_, label in images]
    return {"names": np.frombuffer(os.fsencode("".join(paths)), np.uint8),
            "places": np.array(places, np.int64).reshape(-1, 3), "labels": np.array(labels, np.int64)}


def index_shard(shard):
    """The images of a tar file: a list of (name, offset, bytes, class or -1)."""
    images = []
    classes = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                stem, suffix = os.path.splitext(member.name)
                if not member.isfile() or os.path.basename(stem).startswith("."):
                    continue
                if suffix.lower() in IMAGE_SUFFIXES:
                    images.append((stem, member))
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
    orphans = sorted(classes.keys() - {stem for stem, _ in images})
    require(not orphans, f"shard {shard}: {' '.join(orphans[:1])}.cls has no image of just this name")
    return [(member.name, member.offset_data, member.size, classes.get(stem, -1)) for stem, member in images]


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


# ---- 3. Sets that come with the program, or with torchvision -----------------------------------------------

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
        labels = [index % len(classes) for index in range(length)]
        super().__init__(name, classes, paths, labels, view, split)

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
            samples.append((x, int(self.labels[index]), index))
        return samples


BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
# The sets of torchvision that are read by name: the parts of each, and torchvision's options for these.
TORCHVISION = {
    "CIFAR10": BY_TRAIN, "CIFAR100": BY_TRAIN, "MNIST": BY_TRAIN, "FashionMNIST": BY_TRAIN, "SVHN": BY_SPLIT,
    "STL10": BY_SPLIT, "Food101": BY_SPLIT, "Flowers102": {**BY_SPLIT, "val": {"split": "val"}},
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}}, "EuroSAT": {None: {}}}


class Torchvision(Samples):
    """An image data set of torchvision, by its name in TORCHVISION, with its own parts and class names.

    It is downloaded on first use to `runtime.cache_dir()`. Raises `UserError` for another name, and without a
    connection.
    """

    def __init__(self, name, split, view):
        require(name in TORCHVISION and not view.frames, f"--data-path torchvision:{name} is no set of "
                f"images that is read so, as are {', '.join(TORCHVISION)}; unpack it, and give the folder")
        folder = os.path.join(runtime.cache_dir(), "torchvision")
        parts = TORCHVISION[name]
        part = next((part for part in PARTS[split] if part in parts), None)

        def opened():
            """torchvision's data set, downloaded unless it is there."""
            try:
                return getattr(torchvision.datasets, name)(folder, download=True, **parts[part])
            except (ValueError, OSError, RuntimeError) as problem:
                text = " ".join(str(problem).split())[:200]
                raise UserError(f"--data-path torchvision:{name} cannot be opened or downloaded ({text}); "
                                f"put its files into {folder}") from None

        self.source = source = runtime.main_first(opened)
        if name == "Imagenette":
            labels = [label for _, label in source._samples]
        else:
            key = next(key for key in ("targets", "labels", "_labels") if hasattr(source, key))
            labels = getattr(source, key)
        classes = getattr(source, "classes", map(str, range(10)))         # SVHN: digits
        classes = [name[0] if isinstance(name, tuple) else name for name in classes]      # of synonyms, one
        paths = [f"torchvision:{name}[{i}]" for i in range(len(source))]
        super().__init__(f"torchvision:{name}", classes, paths, labels, view, part)

    def read(self, index, rng):
        """A (3, S, S) image, or ten."""
        with decoding():
            image = self.source[index][0]
        return self.view.pixels(as_rgb(image), rng)


# ---- 4. What --data-path means -----------------------------------------------------------------------------

def build_dataset(data_path, split, view, split_list=None, length=None, classes=()):
    """The data set behind `--data-path`, of images or clips as `view` says.

    * None or "generated": the generated set, "generated-plain" its easier images; `length` of them (None:
      20,000 images or 10,000 clips to train on, 1,000 otherwise).
    * a folder: if it has subfolders train/ and val/ (or test/), `split` picks one; else it is used as it is.
      With `split_list`, the path of an official UCF-101 list such as trainlist01.txt, the folder of classes.
    * "torchvision:CIFAR10" and the like: one of ten data sets of torchvision, with its own splits.
    * 'shards-{000..127}.tar': tar files; `split` has no meaning, give each split its own pattern.

    classes: the names of a training set's, so that a label means the same here, where some may be missing (by
    default those of train/ beside val/). Raises `UserError` for a path that is missing, empty or ambiguous. A
    collective.
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
        if split_list:
            return Folder(path, view, split, classes, split_list=split_list)
        folder, part, train = runtime.on_main(choose_split, pathlib.Path(path), split)
        return Folder(folder, view, part, classes, train)
    require(not view.frames, f"--data-path {path} is no folder of videos; check the path")
    if path.endswith(".tar") or "{" in path:
        return TarShards(path, view)
    require(os.path.exists(path), f"--data-path {path} does not exist; check the path")
    raise UserError(f"--data-path {path} is a single file; give a folder of images, or tar files such as "
                    f"'shards-{{000..127}}.tar'")


def choose_split(folder, split):
    """(the folder that holds `split`, which part of the data set it is or None, train/ beside it or None)."""
    folders = subfolder_names(folder)
    present = [name for name in SPLITS if name in folders]
    likely = [name for name in folders if re.match("train|val|test|eval", name, re.IGNORECASE)]
    require(present or len(likely) < 2 or likely != folders, f"--data-path {folder} has "
            f"{', '.join(likely[:4])}: if these are no classes, call them train, val and test, or give one")
    if not present:
        return folder, None, None
    advice = f"give the folder to read, such as {folder / present[0]}"
    others = [name for name in folders if name not in present]
    require(len(present) > 1 or not others, f"--data-path {folder} has {present[0]}/ beside "
            f"{', '.join(others[:3])}: is it a split or a class? Rename it, or {advice}")
    part = next((name for name in PARTS[split] if name in present), None)
    require(part, f"--data-path {folder} has {' and '.join(present)} but no {' or '.join(PARTS[split])} "
                  f"folder; add one, or {advice}")
    train = folder / "train" if "train" in present and part != "train" else None
    return folder / part, part, train
