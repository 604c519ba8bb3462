"""What lies in a folder: which files are samples, which label each has, which part of a data set it is.

Every layout is either read as what it is, or refused in a line that names the folder or the command to use.
"""
import bisect
import collections
import contextlib
import json
import os
import pathlib
import re
import sys
import zlib

import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from support import loops, runtime, shapes
from support.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Unreadable, is_clip
from support.runtime import UserError, require

# ---- 1. Parts: train, val, test ----------------------------------------------------------------------------

SPLITS = shapes.SPLITS
PARTS = {"train": ["train"], "val": ["val", "test"], "test": ["test", "val"]}    # what serves as which split
# Which part of a data set a folder of this name is. Others only look like one, as train2017 and seg_train do.
PART_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                "test": "test", "testing": "test"}
LIKE_A_PART = r"(?:.*[\W_])?(tra|val|tes)(?:in|ining|id|idation|t|ting)?(?:[ab]|set|data|images?|[\W_\d].*)?"
JUNK = ("@eaDir", "$RECYCLE.BIN", "__MACOSX", "lost+found")    # what systems and servers leave in any folder
HIDDEN = re.compile(rf"(?:^|/)(?:\.[^./]|(?:{'|'.join(map(re.escape, JUNK))})/)")  # in an archive


def like_parts(names):
    """Those of `names`, of folders or files, that look like parts, where they look like several."""
    looks = [match for name in names if (match := re.fullmatch(LIKE_A_PART, name, re.IGNORECASE))]
    several = len({match[1].lower() for match in looks}) > 1
    return [match[0] for match in looks if several]


def choose_split(folder, split, meant=None):
    """(the folder that holds `split`, which part of the data set it is or None, train/ beside it or None).
    meant: what stands before the folder, see `find_samples`."""
    folders = sorted(item.name for item in os.scandir(folder) if item.is_dir() and item.name[0] != "."
                     and item.name not in JUNK)
    found = [name for name in folders if name.lower() in PART_FOLDERS]
    parts = {PART_FOLDERS[name.lower()]: name for name in found}
    if not found:
        likely = like_parts(folders)
        require(meant == "classes:" or not likely, f"--data-path {folder} has {', '.join(likely[:4])}: if "
                f"these are no classes (else say so: classes:{folder}), call them train, val and test, or "
                f"give one, such as {os.path.join(folder, *likely[-1:])}")
        return folder, None, None
    advice = f"give the folder to read, such as {folder / found[0]}"
    require(len(found) == len(parts), f"--data-path {folder} has {', '.join(found)}, of which two are the "
                                      f"same part; {advice}")
    others = [name for name in folders if name not in found]
    require(len(parts) > 1 or not others, f"--data-path {folder} has {found[0]}/ beside "
            f"{', '.join(others[:3])}: is it a split or a class? Rename it, or {advice}")
    part = next((part for part in PARTS[split] if part in parts), None)
    require(part, f"--data-path {folder} has {' and '.join(found)} but no {' or '.join(PARTS[split])} "
                  f"folder; add one, or {advice}")
    say_part(folder / parts[part], part, split)
    train = folder / parts["train"] if "train" in parts and part != "train" else None
    return folder / parts[part], part, train


def say_part(name, part, split):
    """Say so where another part stands in for `split`."""
    if part and part != split:
        careful = ": a number that something was chosen by is no test result" if part == "test" else ""
        runtime.print_main(f"{name} serves as {split}, as there is no such part{careful}")


# ---- 2. What is not read -----------------------------------------------------------------------------------

UNTAR = "for f in n*.tar; do mkdir ${f%.tar} && tar -xf $f -C ${f%.tar} && rm $f; done"
UNTAR_ALL = f"mkdir train && tar -xf it -C train && cd train && {UNTAR}"
README = "README.md has the commands under 'ImageNet, from where you have it'"
# Names of files, as of glob; what they are; how they come into a form that is read.
FOREIGN = [
    ("ILSVRC2012_img_train*.tar", "ImageNet's tar of tars", UNTAR_ALL),
    ("n????????.tar", "ImageNet's tars, one for each class", f"in their folder, {UNTAR}"),
    ("*.tar", "tar files", "name them by a pattern, such as --data-path '{folder}/*.tar'"),
    ("*.tar.gz *.tgz *.tar.bz2 *.tar.xz", "packed tar files", "unpack them (tar -xf), and give the folder"),
    ("*.zip *.rar *.7z", "an archive", "unpack it, and give the folder (a zip with dataset.json is read so)"),
    ("*.parquet", "parquet files, as of Hugging Face", README),
    ("*.arrow dataset_dict.json", "what save_to_disk of Hugging Face's datasets wrote", README),
    ("data.mdb *.lmdb *.mdb", "an LMDB", "write its values out as files, class/name.jpg"),
    ("data_batch_* cifar-100*", "CIFAR's pickles", "give torchvision:CIFAR10 or torchvision:CIFAR100"),
    ("*-ubyte *-ubyte.gz", "MNIST's arrays", "give torchvision:MNIST or torchvision:FashionMNIST"),
    ("*.npz *.npy", "arrays of numpy", "write each out, by PIL's Image.fromarray(x).save('class/name.png')"),
    ("*.tfrecord* *.h5 *.hdf5 *.rec *.mat *.pkl *.pickle", "records of another library",
     "write them out as files, class/name.png"),
    (" ".join(f"*{suffix}" for suffix in VIDEO_SUFFIXES), "videos", "these are for clips: --frames")]


def no_samples(path, suffixes, left_out=()):
    """The `UserError` for a file or folder `path` in which no file is read: what it is, if that is known.
    left_out: the suffixes of its files."""
    path = pathlib.Path(path)
    for patterns, what, way_out in FOREIGN:
        for pattern in patterns.split():
            found = [path] if path.is_file() and path.match(pattern) else path.rglob(pattern)
            for file in found:
                return UserError(f"--data-path {path} holds no images or videos that are read, but {what} "
                                 f"({file.name}): {way_out.replace('{folder}', str(file.parent))}")
    require(not path.is_file(), f"--data-path {path} is a single file; give a folder of images, or tar files "
                                f"such as 'shards-{{000..127}}.tar'")
    others = f", but {', '.join(sorted(left_out)[:5])}" if left_out else ""
    return UserError(f"--data-path {path} holds no images or videos of the kind asked for "
                     f"({' '.join(suffixes)}){others}")


# ---- 3. Samples and their labels ---------------------------------------------------------------------------

PAGES = r"\d{5,}(_\d+)?"                         # 00000/ 01000/ .. as of FFHQ and WebVid: parts of one heap
PICTURES = r"(?i)(jpeg)?(images?|imgs?)(tr)?|rgb"    # the pictures themselves, beside their masks or the like


def find_samples(folder, of_clips, typed, known=False):
    """(classes, paths from `folder` on as a bytearray for `Strings`, labels int64) of images or clips.

    classes: [] where there are none, else the labels count them. typed: --data-path, where "classes:" before
    the folder says that its subfolders are classes, whatever they look like, "unlabelled:" that none are.
    known: the names of the classes will be compared with those of a training set. Raises `UserError` for what
    is no list of classes, or could be something else. Says what is left out.
    """
    suffixes = VIDEO_SUFFIXES if of_clips else IMAGE_SUFFIXES
    found, left_out = list_files(folder, suffixes)
    if of_clips and not any(number for *_, number in found):
        found, left_out = moving_or_frames(folder, *list_files(folder, IMAGE_SUFFIXES))
    places = [place for place, _, number in found if number]
    if not places:
        raise no_samples(folder, suffixes, left_out)
    say_left_out(folder, left_out)
    names = bytearray().join(text for _, text, _ in found)
    given = given_labels(folder, names)
    if given:
        return given[0], names, given[1]
    mixed = like_parts(place for place in places if os.sep in place)
    if mixed and typed.startswith(("classes:", "unlabelled:")):
        runtime.print_main(f"warning: {folder} holds {', '.join(mixed[:4])}, which are read as one: if these "
                           f"are parts of the data set, nothing is held out")
    counts = collections.Counter()
    for place, _, number in found:
        counts[place.split(os.sep)[0]] += number
    flat = counts.pop("", 0)
    if typed.startswith("unlabelled:") or not any(counts.values()):
        return [], names, np.zeros(flat + sum(counts.values()), np.int64)
    require(not flat, f"--data-path {folder} holds class subfolders and {flat} files beside them; move all "
                      f"into subfolders, or none")
    empty = [name for name in counts if not counts[name]]
    if empty:
        runtime.print_main(f"{folder}: {len(empty)} subfolders hold no file that can be read "
                           f"({' '.join(suffixes)}), so they are no classes: {', '.join(empty[:5])}")
    classes = [name for name in counts if counts[name]]
    if not typed.startswith("classes:"):
        check_classes(folder, classes, places, known, typed)
    return classes, names, np.repeat(np.arange(len(classes)), [counts[name] for name in classes])


def say_left_out(name, left_out):
    """Say in a line how many files of which suffixes {suffix: number} are not read."""
    if left_out:
        text = ", ".join(f"{left_out[suffix]:,} {suffix}" for suffix in sorted(left_out)[:8])
        runtime.print_main(f"{name}: files that are not read: {text}")


def check_classes(folder, classes, places, known, typed):
    """Raise `UserError` unless the subfolders `classes` can be meant as such. places: all that hold files."""
    anyway = (f"say what is meant: --data-path classes:{typed} (its subfolders, or those of its train/, are "
              f"classes) or unlabelled:{typed} (there are none)")
    common = os.path.commonpath(places)
    require(not common or (known and common == classes[0]), f"--data-path: all that {folder} holds lies in "
            f"one folder; give {os.path.join(folder, common)}, or {anyway}")
    pictures = [name for name in classes if re.fullmatch(PICTURES, name)]
    require(common or known or not pictures, f"--data-path: {', '.join(classes[:3])} in {folder} look like "
            f"pictures and what belongs to them; give {os.path.join(folder, *pictures[:1])}, or {anyway}")
    deep = [place for place in places if os.sep in place]
    require(not deep, f"--data-path: {os.path.join(folder, *deep[:1])} lies deeper than a class; give the "
                      f"folder whose subfolders are the classes, or {anyway}")
    require(not all(re.fullmatch(PAGES, name) for name in classes), f"--data-path: {', '.join(classes[:2])}, "
            f".. in {folder} look like parts of one heap, not like classes; {anyway}")


def given_labels(folder, names):
    """(classes, labels) by a file beside the images, None without. Two are read: dataset.json as EDM and
    StyleGAN write it, and of ImageNet's validation images Kaggle's list or the official devkit's."""
    path = pathlib.Path(folder, "dataset.json")
    if path.is_file():
        return labels_of_json(path, path.read_bytes(), listed(names))
    if not re.match(rb"ILSVRC2012_val_\d{8}\.\w+\0", names):
        return None
    names = listed(names)
    # Kaggle's list lies four folders up, of where the folder is or of where a link leads to.
    for place in (*path.absolute().parents[:5], *path.resolve().parents[:5]):
        wnids = wnids_beside(place)
        if wnids:
            missing = [name for name in names if name[:23] not in wnids]
            require(not missing, f"the list of labels in {place} lacks {missing[:1]} of {folder}")
            classes = sorted(set(wnids.values()))
            number = {name: i for i, name in enumerate(classes)}
            return classes, np.array([number[wnids[name[:23]]] for name in names])
    runtime.print_main(f"{folder} has no labels: where they are needed, put Kaggle's LOC_val_solution.csv or "
                       f"the folder ILSVRC2012_devkit_t12 beside it")
    return None


def listed(names):
    """The strings in a bytearray for `Strings`."""
    return os.fsdecode(bytes(names)).split("\0")[:-1]


def wnids_beside(place):
    """{image: class} of ImageNet's validation images by a list in the folder `place`, {} without."""
    kaggle = place / "LOC_val_solution.csv"
    if kaggle.is_file():
        text = kaggle.read_text(errors="replace")
        wnids = dict(re.findall(r"^(\w+),(n\d{8})\b", text, re.MULTILINE))
        require(wnids, f"{kaggle} is damaged (no line is as 'ILSVRC2012_val_00000001,n01751748 ..'); copy it "
                       f"again")
        return wnids
    for folder in (place, place / "data", place / "ILSVRC2012_devkit_t12" / "data"):
        truth = folder / "ILSVRC2012_validation_ground_truth.txt"
        meta = folder / "meta.mat"
        if truth.is_file() and meta.is_file():             # numbers, and what these mean
            try:
                synsets = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
                wnid = {str(int(one["ILSVRC2012_ID"])): str(one["WNID"]) for one in synsets}
            except (OSError, ValueError, LookupError, TypeError, zlib.error, MatReadError) as error:
                raise UserError(f"{meta} is damaged ({error}); unpack the devkit again") from None
            numbers = truth.read_text(errors="replace").split()
            strange = sorted(set(numbers) - wnid.keys())
            require(not strange, f"{truth} is damaged ({strange[:3]} are no classes of {meta}); unpack the "
                                 f"devkit again")
            return {f"ILSVRC2012_val_{i:08d}": wnid[number] for i, number in enumerate(numbers, 1)}
    return {}


def labels_of_json(path, text, names):
    """(classes, labels) of images `names` by the text of a dataset.json, whose "labels" null means none."""
    try:
        known = json.loads(text)["labels"]
        number = {name: int(label) for name, label in known or ()}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is no list of labels as EDM and StyleGAN write it ({error!r}); mend it, or "
                        f"remove it") from None
    if known is None:
        return [], np.zeros(len(names), np.int64)
    labels = [number.get(name.replace(os.sep, "/"), -1) for name in names]
    require(max(labels) < 10 ** 6, f"{path} has the label {max(labels)}, but should have numbers of classes, "
                                   f"from 0 to 999999")
    require(min(labels) >= 0, f"{path} has no label for {labels.count(-1)} images, such as "
                              f"{names[labels.index(min(labels))]}")
    return [str(i) for i in range(max(labels) + 1)], np.array(labels)


# ---- 4. All files below a folder ---------------------------------------------------------------------------

def list_files(folder, suffixes):
    """([(subfolder, the paths of its files with a NUL after each, their number)], {suffix: other files}).

    Sorted. Ignored is whatever is hidden (macOS leaves a "._name.jpg" beside "name.jpg"), and what links lead
    to a second time.
    """
    left_out = collections.Counter()
    walk = files_below(folder, suffixes, left_out)
    walk = loops.watched(walk, f"looking through {folder}", lambda item: item[2])
    found = [(place, os.fsencode(text), number) for place, text, number in walk]
    return sorted(found, key=lambda part: (part[0].split(os.sep)[0], part[0])), left_out


def files_to_see(folder, suffixes, of_clips):
    """The paths from `folder` on of all files with such suffixes; where clips are meant and no file is one,
    of folders of numbered pictures, as in `find_samples`. Pictures that are no clips stay pictures."""
    found, left_out = list_files(folder, suffixes)
    names = [name for _, text, _ in found for name in listed(text)]
    if of_clips and not any(name.lower().endswith(VIDEO_SUFFIXES) for name in names):
        with contextlib.suppress(UserError):
            found, _ = moving_or_frames(folder, found, left_out)
            names = [name for _, text, _ in found for name in listed(text)]
    return names


def moving_or_frames(folder, found, left_out):
    """What `list_files` found of pictures, as clips: each by itself where they move; else each folder of
    numbered ones, such as class/clip/00001.jpg. Raises `UserError` where they are neither."""
    found = [part for part in found if part[2]]
    if not found:
        return found, left_out
    for name in listed(found[0][1])[:9]:                  # the first may be damaged
        with contextlib.suppress(OSError, Unreadable):
            if is_clip(os.path.join(folder, name)):
                return found, left_out
    clips = []
    longest = max(number for *_, number in found)         # one clip of a single picture is only too short
    for place, text, number in found:
        numbers = re.findall(rb"(\d+)[^\d/]*\.\w+\0", text)
        numbered = longest > 1 and len(set(map(int, numbers))) == number
        require(place and numbered, f"--data-path {folder} holds no videos, and "
                f"{os.path.join(folder, place)} is no clip, which is a folder of numbered pictures below the "
                f"folder to give; for images, leave --frames out")
        clips.append((os.path.dirname(place), os.fsencode(place) + b"\0", 1))
    runtime.print_main(f"{folder}: {len(clips)} folders of numbered pictures are read as clips")
    return clips, left_out


def files_below(folder, suffixes, left_out):
    """Yield (path from `folder` on, the paths of its files, a NUL after each, their number) of all folders.

    Files are sorted; a folder that links lead to a second time has none then. No file is asked what it is,
    for its name tells; nor is each name looked at, where all have the same suffix. So this takes a third of
    the time of torchvision's ImageFolder. left_out: counts the other files, by suffix.
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
            names = [name for name in names if name[0] != "." and name not in JUNK]
            others = [name for name in names if not name.lower().endswith(suffixes)]
            names = [name for name in names if name.lower().endswith(suffixes)]
            text = "".join(f"{start}{name}\0" for name in names)
            for name in reversed(others):                 # so that the first is the next to be looked into
                path = os.path.join(folder, start + name)
                if os.path.isdir(path):
                    end = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
                    todo.append((start + name, end))
                else:
                    left_out[os.path.splitext(name)[1].lower() or "without suffix"] += 1
        yield place, text, len(names)


def read_split_list(path, classes):
    """(`classes` in UCF-101's order, the set of clips listed) of one of its official lists.

    A class is numbered by classInd.txt beside the list, or by its lines "Class/clip.avi 7". Without numbers,
    names decide, which is another order for four of them (HammerThrow, Hammering, ..).
    """
    path = pathlib.Path(path)
    require(path.is_file(), f"--split-list {path} does not exist; check the path")
    text = path.read_text("utf-8-sig", "surrogateescape")                 # as the names of files are decoded
    clips = re.findall(r"^(\S+\.\w+)", text, re.MULTILINE)
    require(clips, f"--split-list {path} names no clips")
    number = dict(re.findall(r"^(\S+)/\S+ +(\d+)", text, re.MULTILINE))
    index = path.with_name("classInd.txt")
    if index.exists():
        text = index.read_text("utf-8-sig", "surrogateescape")
        number = {name: i for i, name in re.findall(r"^(\d+) +(\S+)", text, re.MULTILINE)}
    return sorted(classes, key=lambda name: (int(number.get(name, sys.maxsize)), name)), set(clips)
