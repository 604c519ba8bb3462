"""data.py: pixels as published, an order that no worker or rank changes, broken files, splits, the script."""
import collections
import contextlib
import functools
import io
import itertools
import json
import multiprocessing.context
import os
import pickle
import re
import struct
import sys
import tarfile
import types
from multiprocessing.reduction import ForkingPickler

import av
import numpy as np
import pytest
import scipy.io
import torch
import torchvision.transforms as transforms
from PIL import Image
from torch.utils.data import DataLoader

from support import data, layouts, loops, pictures, reading, runtime, shapes, sources
from support.data import View, build_dataset
from helpers import call, refused, run_script


def noise_image(width, height, seed=0):
    """An image with detail at every scale, so that a wrong filter or offset shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root, count=12, classes=("ants", "bees", "cows"), suffix=".png"):
    """`count` images, dealt out to class subfolders, or flat where `classes` is empty."""
    for i in range(count):
        folder = root / classes[i % len(classes)] if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        noise_image(24, 20, i).save(folder / f"{i:04d}{suffix}")
    return root


def make_videos(root, names=("a/1.gif", "a/2.gif", "b/3.gif"), frames=9):
    """Animated GIFs whose frame t is grey of level 20 t, 24 x 20."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        levels = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 20
        pictures.write_video(root / name, levels + np.zeros((frames, 20, 24, 3), np.uint8))
    return root


def encoded(seed=0):
    """The bytes of a PNG."""
    file = io.BytesIO()
    noise_image(24, 20, seed).save(file, "PNG")
    return file.getvalue()


def make_shard(path, members):
    """A tar file of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def refuse(problem, *what):
    """Assert that such a set is refused in one line."""
    refused(problem, build_dataset, *what)


def take(iterator, count):
    """The first `count` batches."""
    return list(itertools.islice(iterator, count))


def same_batches(first, second):
    """Whether two lists of batches are equal bit for bit."""
    pairs = [pair for batches in zip(first, second) for pair in zip(*batches)]
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in pairs)


# ---- pixels -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height", [(640, 427), (427, 640), (333, 333), (64, 67), (70, 64), (10, 7),
                                           (1, 1), (500, 20)])
@pytest.mark.parametrize("size", [64, 37])
def test_views_give_the_pixels_of_torchvision(width, height, size):
    image = noise_image(width, height)
    center = transforms.CenterCrop(size)(transforms.Resize(size)(image))
    five = transforms.FiveCrop(size)(transforms.Resize(int(1.1 * size))(image))
    center, *five = [transforms.functional.pil_to_tensor(crop) for crop in (center, *five)]
    ours = View(size).pixels(image)
    assert torch.equal(ours, center) and ours.dtype == torch.uint8
    five = torch.stack(five)
    assert torch.equal(View(size, crop="ten").pixels(image), torch.cat([five, five.flip(-1)]))


def test_random_crops_reach_every_position_and_flips_half():
    image = noise_image(34, 32)
    resized = transforms.functional.pil_to_tensor(image)
    places, mirrored = set(), 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        crop = View(32, crop="random", flip=True).pixels(image, rng)
        found = [(left, flipped) for left in range(3) for flipped in (False, True)
                 if torch.equal(crop.flip(-1) if flipped else crop, resized[:, :, left:left + 32])]
        assert len(found) == 1
        places.add(found[0][0])
        mirrored += found[0][1]
    assert places == {0, 1, 2} and 70 < mirrored < 130


def test_resize_makes_small_crops_and_original_makes_none(tmp_path):
    folder = make_folder(tmp_path, 1, ())
    image = noise_image(24, 20)
    expected = transforms.functional.pil_to_tensor(transforms.CenterCrop(8)(transforms.Resize(16)(image)))
    assert torch.equal(build_dataset(folder, "val", View(8, resize=16))[0][0], expected)
    assert build_dataset(folder, "val", View(8, crop="original"))[0][0].shape == (3, 20, 24)
    refused("--resize 4", View, 8, None, "center", False, 4)


def test_a_few_of_a_set_keep_all_its_classes():
    for count in (100, 1000, 5000):
        assert {i % 10 for i in data.evenly_spaced(count, 20_000)} == set(range(10))      # taking turns
        assert {i // 2000 for i in data.evenly_spaced(count, 20_000)} == set(range(10))   # sorted
    assert data.evenly_spaced(9, 5) == range(5) and data.evenly_spaced(None, 10 ** 12) == range(10 ** 12)


# ---- folders, shards, videos ------------------------------------------------------------------------------

def test_folders_of_classes_are_sorted_and_labelled(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "bees" / "._0001.png").write_bytes(b"of macOS")
    (tmp_path / "bees" / ".hidden").mkdir()
    noise_image(8, 8).save(tmp_path / "bees" / ".hidden" / "x.jpg")
    dataset = build_dataset(tmp_path, "train", View(16))
    assert dataset.classes == ["ants", "bees", "cows"] and len(dataset) == 12 and dataset.kind == "image"
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.paths[4].endswith("bees/0001.png") and dataset[4][1:] == (1, 4)
    flat = build_dataset(make_folder(tmp_path / "flat", 3, ()), "train", View(16))
    assert flat.classes == [] and [item[1] for item in flat] == [0, 0, 0]


def test_splits_are_picked_and_labels_are_those_of_training(tmp_path, capsys):
    make_folder(tmp_path / "train", 6)
    make_folder(tmp_path / "test", 2, ("bees", "cows"))
    train, val = [build_dataset(tmp_path, split, View(8)) for split in ("train", "val")]
    assert train.classes == val.classes == ["ants", "bees", "cows"]
    assert [val.labels[i] for i in range(2)] == [1, 2] and len(train) == 6
    (tmp_path / "test" / "cows").rename(tmp_path / "test" / "images")
    refuse("training set lacks.*images", tmp_path, "val", View(8))
    assert "is no test result" in capsys.readouterr().out
    cows = make_folder(tmp_path / "more", 3, ("cows",))
    assert build_dataset(cows, "val", View(8), classes=val.classes).labels.tolist() == [2, 2, 2]


def test_a_set_knows_its_part_and_another_that_is_the_same(tmp_path, capsys):
    make_folder(tmp_path / "a" / "train", 6)
    make_folder(tmp_path / "a" / "test", 6)
    make_folder(tmp_path / "b", 6)
    noise_image(24, 20, 99).save(tmp_path / "a" / "test" / "ants" / "0000.png")
    train, val, flat = [build_dataset(tmp_path / name, split, View(8, crop=crop)) for name, split, crop in (
        ("a", "train", "random"), ("a", "val", "center"), ("b", "val", "ten"))]
    generated = [build_dataset("generated", split, View(8)) for split in shapes.SPLITS]
    shard = build_dataset(str(make_shard(tmp_path / "s.tar", [("x.png", encoded())])), "val", View(8))
    assert [train.part, val.part, flat.part, shard.part] == ["train", "test", None, None]
    assert [dataset.part for dataset in generated] == list(shapes.SPLITS)
    assert data.same_samples(train, flat) and not data.same_samples(train, val)
    assert data.same_samples(generated[0], generated[0]) and not data.same_samples(*generated[1:3])
    some = build_dataset(tmp_path / "a" / "train" / "bees", "val", View(8))
    assert data.same_samples(train, some) and not data.same_samples(some, train)
    assert not data.same_samples(flat, some)                              # a copy under another name
    assert not data.same_samples(some, train)                             # but in part
    assert re.search("warning: 2 of 6 images of .* are not held out", capsys.readouterr().out)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "x.png").symlink_to(tmp_path / "b" / "ants" / "0000.png")
    assert data.same_samples(flat, build_dataset(tmp_path / "links", "val", View(8)))


def test_folders_that_hold_nothing_are_no_classes(tmp_path, capsys):
    make_folder(tmp_path, 4, ("ants", "valleys"))
    (tmp_path / "bees").mkdir()
    (tmp_path / "bees" / "x.heic").write_bytes(b"")
    assert build_dataset(tmp_path, "train", View(8)).classes == ["ants", "valleys"]
    out = capsys.readouterr().out
    assert "1 subfolders hold no file that can be read" in out and "not read: 1 .heic" in out


def test_links_that_lead_back_are_followed_once_and_pipes_never(tmp_path):
    make_folder(tmp_path, 4, ("ants", "bees"))
    (tmp_path / "ants" / "up").symlink_to("..")
    assert len(build_dataset(tmp_path, "train", View(8))) == 4
    os.mkfifo(tmp_path / "ants" / "x.png")
    refused("no regular file", reading.decode, tmp_path / "ants" / "x.png", kind=ValueError)


def stand_ins(name):
    """{path: content} of what torchvision reads as `name`: 5 images to train on and 2, all of one class."""
    def cifar(count, key):
        return pickle.dumps({"data": np.zeros((count, 3072), np.uint8), key: [1] * count})

    def ubyte(*shape):
        return np.array([0x800 + len(shape), *shape], ">i4").tobytes() + np.ones(shape, np.uint8).tobytes()

    def mat(**arrays):
        file = io.BytesIO()
        scipy.io.savemat(file, arrays)
        return file.getvalue()

    def food(count):
        return json.dumps({"a": [], "b": [f"b/{i}" for i in range(count)]}).encode()

    images = {"train": 5, "test": 2}
    return {
        "CIFAR10": {"batches.meta": pickle.dumps({"label_names": ["a", "b"]}),
                    **{f"data_batch_{i}": cifar(1, "labels") for i in range(1, 6)},
                    "test_batch": cifar(2, "labels")},
        "CIFAR100": {"meta": pickle.dumps({"fine_label_names": ["a", "b"]}),
                     **{part: cifar(images[part], "fine_labels") for part in images}},
        "MNIST": {"train-images-idx3-ubyte": ubyte(5, 28, 28), "train-labels-idx1-ubyte": ubyte(5),
                  "t10k-images-idx3-ubyte": ubyte(2, 28, 28), "t10k-labels-idx1-ubyte": ubyte(2)},
        "SVHN": {f"{part}_32x32.mat": mat(X=np.zeros((32, 32, 3, count), np.uint8), y=np.ones((count, 1)))
                 for part, count in images.items()},
        "STL10": {"train_X.bin": bytes(5 * 27648), "train_y.bin": b"\2" * 5, "test_X.bin": bytes(2 * 27648),
                  "test_y.bin": b"\2\2", "unlabeled_X.bin": b"", "class_names.txt": b"a\nb\n"},
        "Food101": {"meta/train.json": food(5), "meta/test.json": food(2),
                    **{f"images/b/{i}.jpg": encoded() for i in range(5)}},
        "Flowers102": {"setid.mat": mat(trnid=np.arange(1, 6), valid=[6, 7], tstid=[8]),
                       "imagelabels.mat": mat(labels=[2] * 8),
                       **{f"jpg/image_{i:05d}.jpg": encoded() for i in range(1, 9)}},
        "Imagenette": {**{f"train/n02102040/{i}.JPEG": encoded() for i in range(5)},
                       **{f"val/n02102040/{i}.JPEG": encoded() for i in range(2)}},
        "EuroSAT": {f"2750/b/{i}.jpg": encoded() for i in range(5)}}[name.removeprefix("Fashion")]


@pytest.mark.parametrize("name, folder, part, first", [
    ("CIFAR10", "cifar-10-batches-py", "test", "b"), ("CIFAR100", "cifar-100-python", "test", "b"),
    ("MNIST", "MNIST/raw", "test", "1 - one"), ("FashionMNIST", "FashionMNIST/raw", "test", "Trouser"),
    ("SVHN", "", "test", "1"), ("STL10", "stl10_binary", "test", "b"), ("Food101", "food-101", "test", "b"),
    ("Flowers102", "flowers-102", "val", "hard-leaved pocket orchid"), ("EuroSAT", "eurosat", None, "b"),
    ("Imagenette", "imagenette2", "val", "English springer")])
def test_torchvision_sets_come_by_name_with_their_parts(tmp_path, monkeypatch, name, folder, part, first):
    monkeypatch.setenv("OPEN_MAGVIT2_WEIGHTS", str(tmp_path))
    for module in ("cifar", "svhn", "stl10", "flowers102", "utils"):      # they know the true files' hashes
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity",
                            lambda path, md5=None: os.path.exists(path))
    for path, content in stand_ins(name).items():
        file = tmp_path / "torchvision" / folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    train, val = [build_dataset(f"torchvision:{name}", split, View(16)) for split in ("train", "val")]
    assert len(train) == 5 and len(val) == (2 if part else 5)
    assert (train.part, val.part) == ("train" if part else None, part)
    assert train.classes[train[4][1]] == val.classes[val[0][1]] == first
    assert train[4][0].shape == (3, 16, 16) and name in sources.TORCHVISION
    refuse("has images: leave --frames out", f"torchvision:{name}", "train", View(16, 5))


IMAGE = encoded()


@pytest.mark.parametrize("files, path, problem", [
    ({"a/1.heic": IMAGE}, "", "holds no images.*, but .heic"),
    ({"a/1.png": IMAGE, "2.png": IMAGE}, "", "beside them"),
    ({"train/a/1.png": IMAGE, "x/1.png": IMAGE}, "", "split or a class"), ({"1.tar": IMAGE}, "", r"/\*.tar'"),
    ({"val/a/1.png": IMAGE, "test/a/1.png": IMAGE}, "", "no train folder"),
    ({"seg_train/1.png": IMAGE, "seg_test/1.png": IMAGE}, "", "seg_test, seg_train: if these are no classes"),
    ({"x.txt": b""}, "a.tar", "holds no images"), ({"x.png": b"1", "x.cls": b"cat"}, "a.tar", "class number"),
    ({"x.png": b"1", "x.cls": b"1", "y.png": b"1"}, "a.tar", "have no .cls"),
    ({"0.input.jpg": IMAGE, "0.cls": b"3"}, "a.tar", "0.cls has no image"),
    ({}, "{0..999999999}.tar", "more than 100,000 shards"), ({}, "a-{000-127}.tar", "range"),
    ({}, "a-{0..}.tar", "range"), ({}, "a-{0.tar", "range"), ({}, "a-0}.tar", "range"),
    ({}, "a-{3..1}.tar", "range"), ({}, "b-{0..1}.tar", "2 of 2 shards missing.*b-0.tar"),
    ({}, "none", "does not exist"), ({"file.txt": b""}, "file.txt", "single file")])
def test_mistakes_in_files_are_one_clear_line(tmp_path, files, path, problem):
    if path == "a.tar":
        make_shard(tmp_path / path, files.items())
    else:
        for file, content in files.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(content)
    refuse(problem, f"{tmp_path}/{path}", "train", View(8))


@pytest.mark.parametrize("pattern, expected", [
    ("a.tar", ["a.tar"]), ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
    ("{8..10}", ["8", "9", "10"]), ("{0..1}-{0..1}", ["0-0", "0-1", "1-0", "1-1"])])
def test_braces_expand_as_in_bash(pattern, expected):
    assert sources.expand_braces(pattern) == expected


def test_shards_give_images_and_classes_of_their_members(tmp_path, capsys):
    make_shard(tmp_path / "s-0.tar", [("x.png", encoded(0)), ("x.cls", b"2"), ("y.json", b"{}")])
    make_shard(tmp_path / "s-1.tar", [("z.cls", b" 0\n"), ("z.png", encoded(1))])
    dataset = build_dataset(str(tmp_path / "s-{0..1}.tar"), "train", View(16))
    assert dataset.classes == ["0", "1", "2"] and [dataset.labels[i] for i in range(2)] == [2, 0]
    expected = View(16).pixels(noise_image(24, 20, 1))
    assert torch.equal(dataset[1][0], expected) and dataset.paths[1].endswith("s-1.tar:z.png")
    bare = build_dataset(str(make_shard(tmp_path / "b.tar", [("x.png", encoded())])), "train", View(16))
    assert bare.classes == [] and bare.labels[0] == 0
    out = capsys.readouterr().out
    assert "b.tar: no classes; they would be given by a .cls" in out and "not read: 1 .json" in out
    members = {"0.png": IMAGE, "0.cls": b"1", "1.png": IMAGE, "1.cls": b"1"}
    path = make_shard(tmp_path / "c.tar", members.items())
    assert build_dataset(str(path), "train", View(8)).labels.tolist() == [1, 1]
    assert "no image has the class 0" in capsys.readouterr().out
    path.write_bytes(path.read_bytes() * 2)
    refuse("joined by cat", str(path), "train", View(8))


def test_shards_of_several_parts_are_not_read_as_one(tmp_path, capsys):
    shards = [make_shard(tmp_path / f"set-{part}-0.tar", [("x.png", IMAGE)]) for part in ("train", "valid")]
    refuse("means .*/set-train-0.tar and .*/set-valid-0.tar: .* own", f"{tmp_path}/*.tar", "train", View(8))
    assert len(build_dataset(f"{tmp_path}/set-{{train,valid}}-*.tar", "train", View(8))) == 2
    make_shard(shards[0], [(f"set/{part}/a/x.png", IMAGE) for part in ("train", "val")])
    refuse("holds set/train/a and set/val/a, .* unpack it", str(shards[0]), "train", View(8))
    hidden = ("@eaDir/x.png/y.png", ".x/y.png", "a/._y.png", "./a/.x/y.png", "__MACOSX/y.png")
    make_shard(shards[0], [(name, IMAGE) for name in ("./a/..x.png", "a@eaDir/y.png", *hidden)])
    assert len(build_dataset(str(shards[0]), "train", View(8))) == 2      # as of a folder
    odd = tmp_path / "{a} [b]"                                            # a path, no pattern
    odd.mkdir()
    with tarfile.open(odd / "x.tar", "w") as tar:
        link = tarfile.TarInfo("y.png")
        link.type = tarfile.LNKTYPE
        tar.addfile(link)
        info = tarfile.TarInfo("x.png")
        info.size = len(IMAGE)
        tar.addfile(info, io.BytesIO(IMAGE))
    assert len(build_dataset(odd / "x.tar", "train", View(8))) == 1
    assert "not read: 1 links" in capsys.readouterr().out


def test_shards_are_indexed_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPEN_MAGVIT2_WEIGHTS", str(tmp_path / "cache"))
    path = make_shard(tmp_path / "a.tar", [("x.png", encoded(0)), ("y.png", encoded(1))])

    def indexed():
        dataset = build_dataset(str(path), "train", View(16))
        assert torch.equal(dataset[1][0], View(16).pixels(noise_image(24, 20, 1)))
        return "written" in capsys.readouterr().out

    assert indexed() and not indexed()
    index, = tmp_path.glob(".index*.npz")
    whole = index.read_bytes()
    for torn in (whole[:-30], whole[:300] + b"?" + whole[301:], b""):
        index.write_bytes(torn)
        assert indexed() and not indexed()
    os.utime(path, (1, 1))                                                # others of the same size
    assert indexed() and not indexed()
    for file in tmp_path.glob(".index*.npz"):                             # where nothing can be written
        file.unlink()
        file.mkdir()
    assert indexed() and not indexed() and len(list((tmp_path / "cache" / "shards").iterdir())) == 1


def test_truncated_shards_are_named(tmp_path):
    whole = make_shard(tmp_path / "a.tar", [(f"{i}.png", encoded(i)) for i in range(4)]).read_bytes()
    for size in (0, 100, 700, 4096, len(whole) // 2 // 512 * 512):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        refuse("cut.tar", str(tmp_path / "cut.tar"), "train", View(8))


def test_clips_are_cut_from_the_middle_or_at_random(tmp_path, monkeypatch):
    folder = make_videos(tmp_path)
    centre = build_dataset(folder, "val", View(16, frames=5))
    assert centre.axes == (5, 16, 16) and centre.kind == "clip" and centre.classes == ["a", "b"]
    assert centre[0][0].shape == (3, 5, 16, 16)
    assert (centre[0][0][0, :, 0, 0] - torch.arange(2, 7) * 20).abs().max() <= 2
    dataset = build_dataset(folder, "train", View(16, frames=5, crop="random"))
    starts = {int(dataset.__getitems__([(0, (seed,))])[0][0][0, 0, 0, 0]) // 18 for seed in range(40)}
    assert starts == {0, 1, 2, 3, 4}
    ten = build_dataset(folder, "train", View(16, frames=5, crop="ten"))[0][0]
    assert ten.shape == (10, 3, 5, 16, 16) and torch.equal(ten[5:], ten[:5].flip(-1))
    assert [int(clip[0, 0, 0, 0]) // 18 for clip in ten[:5]] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(sources, "video_frames", lambda path: [lambda: noise_image(24, 20)] * 9)
    still = build_dataset(folder, "train", View(12, 5, "random", True, 16))[0][0]
    assert torch.equal(still, still[:, :1].expand_as(still))             # all frames share crop and flip


def test_frames_of_a_lossless_video_come_exactly_in_order(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    with av.open(tmp_path / "a.mkv", "w") as file:
        stream = file.add_stream("ffv1", 25, width=16, height=16, pix_fmt="bgr0")
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame).reformat(format="bgr0")))
        file.mux(stream.encode())
    dataset = build_dataset(tmp_path, "val", View(16, frames=5))
    assert np.array_equal(dataset[0][0].movedim(0, -1).numpy(), frames[2:7])
    assert np.array_equal([frame() for frame in sources.video_frames(tmp_path / "a.mkv")], frames)


def test_official_split_lists_choose_the_clips(tmp_path):
    folder = make_videos(tmp_path / "clips")
    view = View(16, frames=5)
    (tmp_path / "list.txt").write_text("b/3.gif 2\na/2.gif 1\n")
    dataset = build_dataset(folder, "train", view, str(tmp_path / "list.txt"))
    assert [dataset.paths[i][-7:] for i in range(2)] == ["a/2.gif", "b/3.gif"] and dataset.labels[1] == 1
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfb/3.gif 2\r\na/2.gif 1\r\n\xff\r\n")    # of Windows
    assert build_dataset(folder, "train", view, str(tmp_path / "list.txt")).labels.tolist() == [0, 1]
    (tmp_path / "list.txt").write_text("c/9.gif\n")
    refuse("lacks 1 of the 1 clips", folder, "train", view, str(tmp_path / "list.txt"))
    refuse("folder of videos", "generated", "train", view, str(tmp_path / "list.txt"))


def test_short_clips_count_as_broken_and_pyav_is_asked_for(tmp_path, capfd, monkeypatch):
    folder = make_videos(tmp_path, [f"{i:03d}.gif" for i in range(101)], frames=2)
    make_videos(tmp_path, [f"{i:03d}.gif" for i in range(1, 101)], frames=3)
    dataset = build_dataset(folder, "train", View(16, frames=3))
    assert dataset[0][2] == 1 and "000.gif (too short: 2 frames, 3 are needed)" in capfd.readouterr().err
    (tmp_path / "x.avi").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    refuse("pip install av", folder, "train", View(16, frames=3))


@pytest.mark.parametrize("path, changes, problem", [
    ("/no/such", {"frames": 5}, "no folder of videos"),
    ("generated", {"frames": 5, "flip": True}, "leave the flag out"),
    ("generated", {"frames": 5, "crop": "ten"}, "leave the flag out"),
    ("torchvision:CIFAR11", {}, "CIFAR10, CIFAR100, .*EuroSAT; unpack it, and give the folder")])
def test_sets_that_there_are_not_are_one_clear_line(path, changes, problem):
    refuse(problem, path, "train", View(16, **changes))


def test_generated_sets_have_their_names_lengths_and_flips():
    train = build_dataset(None, "train", View(16))
    assert (train.name, len(train), len(train.classes)) == ("generated", 20_000, 10)
    plain = build_dataset("generated-plain", "val", View(16))
    assert (plain.name, len(plain)) == ("generated-plain", 1_000)
    clips = build_dataset("generated", "train", View(16, frames=5))
    assert (len(clips), clips.axes, clips.classes[0]) == (10_000, (5, 16, 16), "right")
    flipped = build_dataset(None, "train", View(16, flip=True))
    mirrored = sum(torch.equal(flipped[i][0], train[i][0].flip(-1)) for i in range(60))
    assert 15 < mirrored < 45 and train[13][1] == 3


def test_fingerprints_tell_other_data_but_not_moved_data(tmp_path):
    for name in "abc":
        make_folder(tmp_path / name)
    noise_image(24, 20, 99).save(tmp_path / "c" / "ants" / "0000.png")
    sets = [build_dataset(tmp_path / name, "train", View(16)) for name in "abc"]
    prints = [data.fingerprint(dataset, range(12)) for dataset in sets]
    assert prints[0] == prints[1] != prints[2] and prints[0] == data.fingerprint(sets[0], list(range(12)))
    os.rename(tmp_path / "b" / "bees" / "0001.png", tmp_path / "b" / "bees" / "0001a.png")
    renamed = build_dataset(tmp_path / "b", "train", View(16))
    assert data.fingerprint(renamed, range(12)) != prints[1]
    assert data.fingerprint(renamed, range(12), "0" * 64) == data.fingerprint(sets[0], range(12), "0" * 64)


def test_fingerprints_that_older_versions_recorded_can_be_compared(tmp_path):
    for i in range(12):
        (tmp_path / "abc"[i % 3]).mkdir(exist_ok=True)
        noise_image(24, 20, i).save(tmp_path / "abc"[i % 3] / f"{i:04d}.bmp")
    dataset = build_dataset(tmp_path, "train", View(16, crop="random", flip=True))
    assert data.fingerprint(dataset, range(12), "0" * 64).startswith("4266e5517d5ed0b508bc913071395dd6")
    assert data.fingerprint(dataset, [3, 5, 7], "0" * 64).startswith("5dbf3eebe069e19fdfdce2a2c3cdd728")


# ---- sets of any size --------------------------------------------------------------------------------------

def linked(root, folders, count):
    """`count` hard links to one image in each of so many class folders."""
    root.mkdir()
    (root / "x").write_bytes(encoded())
    for k in range(folders):
        (root / "set" / f"{k:02d}").mkdir(parents=True)
        for i in range(count):
            os.link(root / "x", root / "set" / f"{k:02d}" / f"{i}.PNG")
    return root / "set"


def test_nothing_but_the_listing_of_folders_grows_with_a_set(tmp_path, monkeypatch):
    passed = types.SimpleNamespace(DupFd=lambda fd: fd, duplicate_for_child=lambda fd: fd)
    monkeypatch.setattr(multiprocessing.context._tls, "spawning_popen", passed, raising=False)
    calls = collections.Counter()
    for place, name in ((os, "listdir"), (os, "scandir"), (os, "stat"), (os, "lstat"),
                        (sources.Samples, "count_broken")):
        def counted(*values, name=name, function=getattr(place, name), **named):
            calls[name] += 1
            return function(*values, **named)
        monkeypatch.setattr(place, name, counted)
    work = []
    for count in (100, 1000):                                             # 2,000 and 20,000 files
        calls.clear()
        dataset = build_dataset(linked(tmp_path / f"{count:4d}", 20, count), "train", View(16, crop="random"))
        assert len(dataset) == 20 * count and dataset.labels.bincount().tolist() == [count] * 20
        work.append([calls[name] for name in ("listdir", "scandir", "stat", "lstat")])
        calls.clear()
        data.fingerprint(dataset, range(len(dataset)))
        work[-1].append(calls["stat"])
        take(data.train_loader(dataset, 8, 0), 3)
        take(data.eval_batches(dataset, range(len(dataset)), 8), 3)
        work[-1].append(calls["count_broken"])                            # which reads all flags
        work[-1].append(len(ForkingPickler.dumps(dataset)))               # what a worker is sent
    assert work[0][:-1] == work[1][:-1] and max(work[1][:4]) < 300 and work[1][4:6] == [2 * 1000 + 16, 0]
    assert abs(work[0][-1] - work[1][-1]) < 50 and work[1][-1] < 10_000


def test_a_long_search_says_how_far_it_is(monkeypatch, capsys):
    now = iter([0.0, 0.5, 2.0, 3.0, 33.0, 34.0, 34.5, 35.0])
    monkeypatch.setattr(loops, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    assert list(loops.watched(iter("abcde"), "looking", lambda item: 500)) == list("abcde")
    assert capsys.readouterr().out == "looking: 1,000 files\nlooking: 2,000 files\n"


# ---- broken files -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder_with_two_broken(tmp_path_factory):
    """300 images of which 17 and 18 cannot be read."""
    folder = make_folder(tmp_path_factory.mktemp("broken"), 300, ())
    (folder / "0017.png").write_bytes(b"")
    (folder / "0018.png").write_bytes(encoded()[:100])
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_readable_image_replaces_a_broken_one(folder_with_two_broken, num_workers):
    dataset = build_dataset(folder_with_two_broken, "train", View(16))
    whole = build_dataset(folder_with_two_broken, "train", View(16))
    for step, (x, _, indices) in enumerate(take(data.train_loader(dataset, 30, 1, 0, 1, num_workers), 10)):
        order = data.epoch_order(300, 1, 0).reshape(10, 30)
        expected = [19 if index in (17, 18) else index for index in order[step].tolist()]
        assert indices.tolist() == expected
        assert all(torch.equal(image, whole[index][0]) for image, index in zip(x, expected))
    assert dataset.broken.nonzero().flatten().tolist() == [17, 18]


@pytest.mark.parametrize("num_workers, method", [(0, None), (2, None),
                                                 pytest.param(1, "spawn", marks=pytest.mark.slow)])
def test_evaluation_leaves_broken_images_out(folder_with_two_broken, capfd, monkeypatch, num_workers, method):
    monkeypatch.setattr(data, "DataLoader", functools.partial(DataLoader, multiprocessing_context=method))
    dataset = build_dataset(folder_with_two_broken, "val", View(16))
    found = [indices for _, _, indices in data.eval_batches(dataset, range(300), 7, num_workers)]
    assert torch.cat(found).tolist() == [i for i in range(300) if i not in (17, 18)]
    assert dataset.broken.sum() == 2 and capfd.readouterr().err.count("broken image skipped") == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_one_percent_broken_stops(tmp_path, num_workers):
    make_folder(tmp_path, 100, ())
    for i in range(6):
        (tmp_path / f"{i:04d}.png").write_bytes(b"")
    for split, loader in (("train", lambda images: data.train_loader(images, 10, 0, 0, 1, num_workers)),
                          ("val", lambda images: data.eval_batches(images, range(100), 10, num_workers))):
        refused("broken, more than 1 %", take, loader(build_dataset(tmp_path, split, View(16))), 10)


# The header of a BMP of 400 megapixels and 24 bits; nothing follows.
BOMB = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54, 0, 54, 40, 20_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0)


def test_damaged_files_of_every_format_are_reported_once_and_skipped(tmp_path, capfd):
    folder = tmp_path / "files"
    folder.mkdir()
    damaged = {"bomb.bmp": BOMB}
    for suffix in sources.IMAGE_SUFFIXES:
        noise_image(24, 20).save(tmp_path / f"whole{suffix}")
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        damaged.update({f"cut{suffix}": whole[:len(whole) // 2], f"empty{suffix}": b"",
                        f"random{suffix}": np.random.default_rng(0).bytes(500)})
    for name, content in {**damaged, **{f"x{i:04d}.png": IMAGE for i in range(4500)}}.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.zeros((20, 20), np.float32)).save(folder / "float.bmp", "TIFF")
    noise_image(20000, 1).save(folder / "wide.png")
    dataset = build_dataset(folder, "val", View(256))
    bad = len(damaged) + 3
    for _ in range(2):
        assert [dataset[i][2] for i in range(bad)] == [bad] * bad          # the first x
    assert dataset.broken.nonzero().flatten().tolist() == list(range(bad)) and bad > 30
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bad and all(line.startswith("broken image skipped: ") for line in lines)
    for name, reason in (("bomb.bmp", "decompression bomb"), ("deep.png", "convert them to 8 bits"),
                         ("float.bmp", "convert them to 8 bits"), ("wide.png", "too unequal")):
        assert any(name in line and reason in line for line in lines), name


@pytest.mark.parametrize("mode, pixel, rgb", [
    ("L", 90, (90, 90, 90)), ("1", 255, (255, 255, 255)), ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("RGBA", (200, 100, 50, 0), (200, 100, 50)), ("LA", (90, 0), (90, 90, 90)), ("P", 1, (7, 80, 200)),
    ("P+tRNS", 1, (7, 80, 200))])
def test_all_kinds_of_pixels_become_rgb_and_what_is_transparent_white(tmp_path, mode, pixel, rgb):
    image = Image.new(mode.split("+")[0], (20, 20), pixel)
    if image.mode == "P":
        image.putpalette([0, 0, 0, 7, 80, 200])
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path, quality=100, **{"transparency": 1} if "+" in mode else {})
    for drop_alpha in (False, True):
        shown = rgb if drop_alpha or mode not in ("RGBA", "LA", "P+tRNS") else (255, 255, 255)
        x = build_dataset(tmp_path, "val", View(16, drop_alpha=drop_alpha))[0][0]
        assert (x.flatten(1).T.int() - torch.tensor(shown)).abs().max() <= (2 if mode == "CMYK" else 0)


def odd_error(*values):
    """As decoders raise on damaged bytes; this file is none of support/."""
    raise IndexError("tuple index out of range")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("where, name, planted, bug", [
    (View, "pixels", lambda view, image, rng: image.sise, AttributeError),
    (sources.Folder, "read", lambda dataset, index, rng: dataset.view.pixels(index), AttributeError),
    (reading.Image, "open", lambda file: contextlib.nullcontext(file), AttributeError),
    (reading.Image, "open", odd_error, None)])
def test_bugs_keep_their_traceback_and_damaged_files_do_not(tmp_path, monkeypatch, where, name, planted, bug,
                                                            num_workers):
    dataset = build_dataset(make_folder(tmp_path, 101, ()), "val", View(16))
    monkeypatch.setattr(where, name, planted)
    loader = data.eval_batches(dataset, range(3), 3, num_workers)
    if bug:
        with pytest.raises(bug, match="in __getitems__" if num_workers else None):
            list(loader)
        assert not dataset.broken.any()
    else:
        refused("of the 101 images.*0000.png", list, loader)


@pytest.mark.slow
def test_rank_0_looks_for_all_and_the_broken_are_counted_over_all(tmp_path):
    folder = make_folder(tmp_path / "images", 100, ())
    for name in ("0000.png", "0010.png"):
        (folder / name).write_bytes(b"")
    (tmp_path / "job.py").write_text(f"""
import os, tempfile
from support import data, runtime, sources
def main(args):
    runtime.setup_process_group("cpu")
    listdir = os.listdir if runtime.rank() == 0 else None
    os.listdir = listdir
    dataset = sources.build_dataset("{folder}", "val", data.View(8))
    assert len(dataset) == 100 and dataset.paths[99] == "{folder}/0099.png"
    try:
        sources.build_dataset("{tmp_path}/none-{{0..1}}.tar", "val", data.View(8))
    except runtime.UserError:
        print("both are told", flush=True)
    dataset[10 * runtime.rank()]                           # each rank meets one of the two
    dataset.raise_if_broken()
    print("not alone", flush=True)
    dataset.raise_if_broken(all_ranks=True)
runtime.run_script(main, lambda: None)
""")
    done = run_script(str(tmp_path / "job.py"), ranks=2, check=False)
    assert done.stdout.count("not alone") == done.stdout.count("both are told") == 2
    assert "2 of the 100 images" in done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr


# ---- order, and the script --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """50 images that are larger than their crops, as training sees them."""
    folder = make_folder(tmp_path_factory.mktemp("images"), 50)
    return build_dataset(folder, "train", View(12, crop="random", flip=True))


def test_the_global_batch_depends_on_no_cut(images, monkeypatch):
    reference = take(data.train_loader(images, 12, 5), 6)
    for world_size, accumulation, num_workers in (2, 1, 0), (1, 3, 2), (2, 3, 1), (12, 1, 0):
        ranks = []
        for rank in range(world_size):
            monkeypatch.setattr(runtime, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(runtime, "world_size", lambda: world_size)
            loader = data.train_loader(images, 12, 5, 0, accumulation, num_workers)
            ranks.append(take(loader, 6 * accumulation))
        shares = [ranks[rank][micro] for micro in range(6 * accumulation) for rank in range(world_size)]
        count = world_size * accumulation
        parts = [shares[first:first + count] for first in range(0, len(shares), count)]
        joined = [tuple(map(torch.cat, zip(*part))) for part in parts]
        assert same_batches(joined, reference), (world_size, accumulation, num_workers)


@pytest.mark.parametrize("num_workers, start", [(0, 1), (2, 1), (0, 9), (2, 9)])
def test_starting_at_a_step_continues_bit_for_bit(images, num_workers, start):
    whole = take(data.train_loader(images, 12, 5, 0, 2), 24)
    resumed = take(data.train_loader(images, 12, 5, start, 2, num_workers), 24 - 2 * start)
    assert same_batches(resumed, whole[2 * start:])


def test_an_epoch_is_a_permutation_without_its_remainder(images):
    batches = take(data.train_loader(images, 12, 3), 8)                  # 50 = 4 x 12 + 2
    epochs = [torch.cat([batch[2] for batch in part]).tolist() for part in (batches[:4], batches[4:])]
    for epoch, indices in enumerate(epochs):
        assert len(set(indices)) == 48 and indices == data.epoch_order(50, 3, epoch)[:48].tolist()
    assert epochs[0] != epochs[1] and data.epoch_order(50, 4, 0)[:48].tolist() != epochs[0]


def test_crops_change_with_seed_and_epoch_and_nothing_else(images):
    crops = {}
    for seed in ((0, 0), (0, 1), (1, 0)):
        crops[seed] = torch.stack([images.__getitems__([(i, (*seed, i))])[0][0] for i in range(50)])
    different = [(crops[0, 0] != crops[other]).flatten(1).any(1).float().mean() for other in ((0, 1), (1, 0))]
    assert min(different) > 0.6
    before = images[7][0]
    torch.manual_seed(2)
    assert torch.equal(before, images[7][0])


def test_loaders_leave_the_global_generator_alone(images):
    state = torch.get_rng_state()
    for num_workers in (0, 1):
        take(data.train_loader(images, 10, 0, 0, 1, num_workers), 3)
        list(data.eval_batches(images, range(20), 10, num_workers))
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_that_does_not_fit_is_refused_at_once(images):
    refused("is more than the 50 images", data.train_loader, images, 51, 0)
    refused("choose a multiple of 4", data.train_loader, images, 10, 0, 0, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 60])
def test_evaluation_shares_hold_every_image_once(images, monkeypatch, world_size):
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr(runtime, "rank", lambda: rank)
        monkeypatch.setattr(runtime, "world_size", lambda: world_size)
        batches = data.eval_batches(images, range(50), 8)
        found = [indices.tolist() for _, _, indices in batches]
        assert len(batches) == len(found)
        seen += found
    assert sorted(seen) == [list(range(first, min(first + 8, 50))) for first in range(0, 50, 8)]


def test_the_script_draws_images_and_clips(tmp_path, capsys):
    call(data, "--output", tmp_path / "a.png", "--image-size", 16)
    call(data, "--output", tmp_path / "b.gif", "--image-size", 16, "--frames", 3)
    call(data, "--data-path", make_folder(tmp_path / "x", 12), "--output", tmp_path / "c.png", "--check-all")
    out = capsys.readouterr().out
    assert "ball 2000" in out and "right 1000" in out and "ants 4, bees 4, cows 4" in out
    assert all((tmp_path / name).exists() for name in ("a.png", "b.gif", "b.png", "c.png"))


def write_h264(path, first=0, shift=0):
    """50 grey frames of level 5 t, a key frame every 20; from packet `first` on, `shift` frames earlier."""
    av = pictures.import_av()
    frames = np.arange(50, dtype=np.uint8)[:, None, None, None] * 5 + np.zeros((50, 48, 64, 3), np.uint8)
    pictures.write_video(path.with_name("whole.mp4"), frames)
    with av.open(str(path.with_name("whole.mp4"))) as source, av.open(
            str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        for k, packet in enumerate(source.demux(stream)):
            if packet.size and k >= first:
                packet.pts -= int(shift / 25 / stream.time_base)
                packet.dts -= int(shift / 25 / stream.time_base)
                packet.stream = out
                target.mux(packet)


def test_trimmed_videos_are_whole_and_start_where_players_start(tmp_path):
    write_h264(tmp_path / "trim.mp4", shift=30)                            # as `ffmpeg -ss 1.2 -c copy` does
    frames = [np.asarray(frame()).mean() for frame in sources.video_frames(tmp_path / "trim.mp4")]
    assert len(frames) == 20 and abs(np.array(frames) - 5 * np.arange(30, 50)).max() < 6
