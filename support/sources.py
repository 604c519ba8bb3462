"""Where images and clips come from: folders, tar shards, videos, torchvision's sets and the generated world.

What the networks see of a file is decided by a `data.View`, which every set is given. What is said of images
here holds for clips. Axis letters: 3 colours, H and W as stored, S the side after cropping, T frames.
"""
import collections
import contextlib
import copy
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import tarfile
import zipfile

import numpy as np
import torch
import torchvision
import torchvision.transforms.functional as TF

from support import layouts, loops, pictures, runtime, shapes
from support.layouts import PARTS
from support.reading import (IMAGE_SUFFIXES, Samples, Strings, TooShort, as_rgb, decode, decoding,
                             video_frames)
from support.runtime import UserError, require

# ---- 1. Folders --------------------------------------------------------------------------------------------

class Folder(Samples):
    """A folder with a subfolder for each class, or one without labels: see `layouts.find_samples`.

    Images, or clips where the view has frames: videos, moving images, or folders of numbered pictures.
    classes: names that decide on labels, those of a training set; by default those of the subfolders, of
    `train` if that is given. split_list: an official UCF-101 list of the files to use. A collective: rank 0
    looks for all.
    """

    def __init__(self, folder, view, part=None, classes=(), train=None, split_list=None, typed=""):
        folder = str(pathlib.Path(folder))
        of_clips = bool(view.frames)
        if train and not classes:
            classes = runtime.on_main(layouts.find_samples, str(train), of_clips, typed)[0]
        own, names, labels = runtime.on_main(layouts.find_samples, folder, of_clips, typed, bool(classes))
        paths = Strings(names, os.path.join(folder, ""))
        classes = list(classes) if own and classes else own
        strange = [name for name in own if name not in classes]
        require(not strange, f"--data-path: {folder} has classes that the training set lacks, which decides "
                             f"on labels: {', '.join(strange[:5])}; rename or remove them, or do "
                             f"without labels, by 'unlabelled:' before the folder of --data-path")
        if split_list:
            classes, listed = layouts.read_split_list(split_list, classes)
            every = layouts.listed(names)
            found = [i for i, name in enumerate(every) if name in listed]
            missing = sorted(listed.difference(every))
            require(not missing, f"--data-path {folder} lacks {len(missing)} of the {len(listed)} clips of "
                    f"--split-list, such as {missing[:1]}; give the folder that holds the class folders")
            paths = Strings([every[i] for i in found], paths.prefix)
            labels = labels[found]
        number = np.array([classes.index(name) for name in own] or [0])
        super().__init__(folder, classes, paths, number[labels], view, part)
        if of_clips:
            plain = (*IMAGE_SUFFIXES, ".gif")             # what needs no PyAV
            if not all(path.lower().endswith(plain) or os.path.isdir(path) for path in paths):
                pictures.import_av()                      # to miss it now, not in the middle of an epoch
            # Numbers of frames, once known. A file's own index may be wrong, so the first visit decodes all.
            self.lengths = torch.zeros(len(self), dtype=torch.int32).share_memory_()

    def read(self, index, rng):
        """A (3, S, S) image or (3, T, S, S) clip, ten with `view.crop` "ten"."""
        view = self.view
        if view.frames is None:
            return view.pixels(decode(self.paths[index], drop_alpha=view.drop_alpha), rng)
        if not self.lengths[index]:
            self.lengths[index] = sum(1 for _ in video_frames(self.paths[index]))
        length = int(self.lengths[index])
        needed = (view.frames - 1) * view.frame_stride + 1
        spare = length - needed
        if spare < 0:
            raise TooShort(f"too short: {length} frames, {needed} are needed")
        if view.crop == "ten":
            plain = dataclasses.replace(view, crop="center", flip=False)
            clips = torch.stack([self.clip(index, round(spare * i / 4), plain) for i in range(5)])
            return torch.cat([clips, clips.flip(-1)])
        first = length // 2 - needed // 2
        if (view.start or view.crop) == "random":
            first = int(rng.integers(spare + 1))
        return self.clip(index, first, view, rng)

    def clip(self, index, first, view, rng=None):
        """The clip that starts at frame `first`, (3, T, S, S); a copy of `rng` crops each frame alike."""
        stride = self.view.frame_stride
        last = first + (view.frames - 1) * stride
        chosen = itertools.islice(video_frames(self.paths[index]), first, last + 1, stride)
        return torch.stack([view.pixels(frame(), copy.deepcopy(rng)) for frame in chosen], 1)


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
        if not len(paths):
            raise UserError(f"--data-path {pattern} holds no images ({' '.join(IMAGE_SUFFIXES)}); unpack tar "
                            f"files of videos or arrays, and see what --data-path says of the folder")
        unlabelled = np.flatnonzero(labels < 0)
        require(len(unlabelled) in (0, len(paths)), f"--data-path {pattern}: {len(unlabelled)} of "
                f"{len(paths)} images have no .cls member, such as {paths[int(unlabelled[:1].sum())]}; label "
                f"all or none")
        if len(unlabelled):
            runtime.print_main(f"{pattern}: no classes; they would be given by a .cls member for each image")
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
            content = io.BytesIO(file.read(size))
        return self.view.pixels(decode(content, drop_alpha=self.view.drop_alpha), rng)


def index_of(pattern):
    """(shards, their folder, where their images are) of a pattern such as 'imagenet/shards-{000..127}.tar'.

    Where: {"names": for `Strings`, "places": shard number, offset and bytes, int64 (N, 3), "labels": int64,
    -1 without}. To read all headers takes minutes for the 150 GB of ImageNet. So the index is kept beside the
    shards, or in the cache if that cannot be written to, in a file that is named after the names, sizes and
    times of all shards: once these are others, it is not found.
    """
    shards = []
    for path in [pattern] if os.path.exists(pattern) else expand_braces(pattern):
        is_pattern = re.search(r"[*?[]", path) and not os.path.exists(path)
        found = sorted(glob.glob(path)) if is_pattern else [path]
        mixed = layouts.like_parts(found)
        require(not mixed, f"--data-path {path} means {' and '.join([*mixed[:1], *mixed[-1:]])}: if they are "
                           f"parts of the data set, give each its own pattern; else join two by {{a,b}}")
        shards += found
    require(shards, f"--data-path {pattern}: no file has such a name; check the path and the pattern")
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
    left_out = collections.Counter()
    folders = set()
    for number, shard in enumerate(loops.watched(shards, "reading the headers of", unit="shards")):
        images = index_shard(shard, left_out)
        paths.append("".join(f"{names[number]}:{member}\0" for member, *_ in images))
        places += [(number, offset, size) for _, offset, size, _ in images]
        labels += [label for *_, label in images]
        folders.update(os.path.dirname(member) for member, *_ in images)
    mixed = layouts.like_parts(sorted(folders))
    require(not mixed, f"--data-path: {names[0]} holds {' and '.join([*mixed[:1], *mixed[-1:]])}, which look "
                       f"like parts of a data set; unpack it, and give the folder")
    layouts.say_left_out(f"{names[0]} and the like" if names[1:] else names[0], left_out)
    return {"names": np.frombuffer(os.fsencode("".join(paths)), np.uint8),
            "places": np.array(places, np.int64).reshape(-1, 3), "labels": np.array(labels, np.int64)}


def index_shard(shard, left_out):
    """The images of a tar file: a list of (name, offset, bytes, class or -1). left_out: counts the other
    files, by suffix."""
    images = []
    classes = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                stem, suffix = os.path.splitext(member.name)
                if member.islnk() or member.issym():
                    left_out["links"] += 1
                if not member.isfile() or layouts.HIDDEN.search(member.name):
                    continue
                require(suffix != ".tar", f"shard {shard} holds tar files, as ImageNet's: "
                                          f"{layouts.UNTAR_ALL}")
                if suffix.lower() in IMAGE_SUFFIXES:
                    images.append((stem, member))
                elif suffix.lower() == ".cls":
                    text = tar.extractfile(member).read().decode(errors="replace").strip()
                    require(re.fullmatch(r"\d{1,6}", text), f"{shard}:{member.name} holds {text[:20]!r}, but "
                            f"should hold a class number from 0 to 999999 as text")
                    classes[stem] = int(text)
                else:
                    left_out[suffix.lower() or "without suffix"] += 1
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
    """'a-{00..02}.tar' to ['a-00.tar', 'a-01.tar', 'a-02.tar'], and '{a,b}.tar' to two, as bash does."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        require("{" not in pattern and "}" not in pattern,
                f"--data-path {pattern}: a range is {{000..127}}, a choice {{a,b}}")
        return [pattern]
    choices = (found[3] or "").split(",")
    if found[3] is None:
        numbers = range(int(found[1]), int(found[2]) + 1)
        require(len(numbers) <= 100_000, f"--data-path {pattern}: more than 100,000 shards; check the range")
        require(numbers, f"--data-path {pattern}: the range {found[0]} is empty")
        choices = [str(number).zfill(len(found[1])) for number in numbers]
    return [path for choice in choices
            for path in expand_braces(pattern[:found.start()] + choice + pattern[found.end():])]


class Zip(Samples):
    """The images of a zip with dataset.json, as EDM and StyleGAN write it, with its labels if it has any."""

    def __init__(self, path, view):
        try:
            with zipfile.ZipFile(path) as file:
                names = [name for name in file.namelist() if name.lower().endswith(IMAGE_SUFFIXES)
                         and not layouts.HIDDEN.search(name)]
                text = file.read("dataset.json") if "dataset.json" in file.namelist() else None
        except zipfile.BadZipFile as error:
            raise UserError(f"--data-path {path} is damaged ({error}); copy or download it again") from None
        if text is None or not names:
            raise layouts.no_samples(path, IMAGE_SUFFIXES)
        classes, labels = layouts.labels_of_json(f"{path}/dataset.json", text, names)
        super().__init__(path, classes, names, labels, view)

    def read(self, index, rng):
        """A (3, S, S) image, or ten."""
        with decoding():
            content = opened_zip(self.name, os.getpid()).read(self.paths[index])
        return self.view.pixels(decode(io.BytesIO(content), drop_alpha=self.view.drop_alpha), rng)


@functools.lru_cache(maxsize=4)
def opened_zip(path, process):
    """A zip file, opened once in each process: workers must not share a position."""
    return zipfile.ZipFile(path)


# ---- 3. Sets that come with the program, or with torchvision -----------------------------------------------

class Generated(Samples):
    """The drawn images and clips of shapes.py, as many and as large as you like; the classes take turns."""

    def __init__(self, split, view, plain=False, length=None):
        require(not (view.frames and (view.flip or view.crop == "ten")), "--flip and --ten-crop: mirrored, a "
                "generated clip that moves left is one that moves right; leave the flag out")
        require(view.frame_stride == 1, "--frame-stride is for videos, not for generated clips; leave it out")
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
        require(not view.frames, f"--data-path torchvision:{name} has images: leave --frames out")
        require(name in TORCHVISION, f"--data-path torchvision:{name} is no set of "
                f"images that is read so, as are {', '.join(TORCHVISION)}; unpack it, and give the folder")
        folder = os.path.join(runtime.cache_dir(), "torchvision")
        parts = TORCHVISION[name]
        part = next((part for part in PARTS[split] if part in parts), None)
        layouts.say_part(f"torchvision:{name}'s {part} part", part, split)

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
        return self.view.pixels(as_rgb(image, self.view.drop_alpha), rng)


# ---- 4. What --data-path means -----------------------------------------------------------------------------

def build_dataset(data_path, split, view, split_list=None, length=None, classes=()):
    """The data set behind `--data-path`, of images or clips as `view` says.

    * None or "generated": the generated set, "generated-plain" its easier images; `length` of them (None:
      20,000 images or 10,000 clips to train on, 1,000 otherwise).
    * a folder: if it has subfolders train/ and val/ (or test/), `split` picks one; else it is used as it is.
      With `split_list`, the path of an official UCF-101 list such as trainlist01.txt, the folder of classes.
      "classes:FOLDER" and "unlabelled:FOLDER" say what its subfolders are where they could be either.
    * "torchvision:CIFAR10" and the like: one of ten data sets of torchvision, with its own splits.
    * 'shards-{000..127}.tar', 'shards-*.tar': tar files; `split` has no meaning, give each its own pattern.
    * a zip with dataset.json, as EDM and StyleGAN write it.

    classes: the names of a training set's, so that a label means the same here, where some may be missing (by
    default those of train/ beside val/). Raises `UserError` for a path that is missing, empty or ambiguous. A
    collective.
    """
    typed = "generated" if data_path is None else str(data_path)
    meant, path = re.fullmatch(r"(classes:|unlabelled:)?(.*)", typed, re.DOTALL).groups()
    path = os.path.expanduser(path)
    require(not split_list or (view.frames and not path.startswith("generated")),
            "--split-list is for a folder of videos; leave it out, or give the folder with --data-path")
    if path == "generated" or (path == "generated-plain" and not view.frames):
        return Generated(split, view, path == "generated-plain", length)
    if path.startswith("torchvision:"):
        return Torchvision(path.partition(":")[2], split, view)
    require(length is None, f"--data-path {path}: only the generated sets can be given a number of samples")
    if os.path.isdir(path):
        if split_list:
            return Folder(path, view, split, classes, split_list=split_list, typed=f"classes:{path}")
        folder, part, train = runtime.on_main(layouts.choose_split, pathlib.Path(path), split, meant)
        return Folder(folder, view, part, classes, train, typed=typed)
    require(not meant, f"--data-path {typed} is no folder; check the path")
    require(not view.frames, f"--data-path {path} is no folder of videos; check the path")
    if path.lower().endswith(".tar") or re.search(r"[*?{]", path):
        return TarShards(path, view)
    require(os.path.exists(path), f"--data-path {path} does not exist; check the path")
    if zipfile.is_zipfile(path) and path.lower().endswith(".zip"):
        return Zip(path, view)
    raise layouts.no_samples(path, IMAGE_SUFFIXES)


def build_held_out(args, view, classes=()):
    """The held-out set of a trainer's flags: that of --val-data-path, or else the val part of --data-path.
    Raises `UserError` as `build_dataset` does, by the name of the flag that was given."""
    try:
        return build_dataset(args.val_data_path or args.data_path, "val", view, args.val_split_list,
                             classes=classes)
    except UserError as error:
        text = str(error).replace("--split-list", "--val-split-list")
        if args.val_data_path:
            text = text.replace("--data-path", "--val-data-path")
        raise UserError(text) from None
