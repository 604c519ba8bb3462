"""data.py: pixels as published, an order that no worker or rank changes, broken files, the generated set."""
import io
import itertools
import os
import signal
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import runtime
from helpers import ROOT, environment, run_script
from runtime import UserError

REAL = ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real pictures are not here")


def noise_image(width, height, seed=0):
    """A picture with detail at every scale, so that a wrong filter or offset shows."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_image(path, seed=0, size=(24, 20)):
    """Save a noise picture under `path`, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_image(*size, seed).save(path)


def make_folder(root, count=12, classes=("ants", "bees", "cows"), suffix=".png"):
    """`count` pictures, dealt out to class subfolders, or flat where `classes` is empty."""
    for i in range(count):
        folder = root / classes[i % len(classes)] if classes else root
        write_image(folder / f"{i:04d}{suffix}", seed=i)
    return root


def make_shard(path, members):
    """A tar file of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def encoded(seed=0, form="PNG", size=(24, 20)):
    """The bytes of a noise picture."""
    file = io.BytesIO()
    noise_image(*size, seed).save(file, form)
    return file.getvalue()


def take(iterator, count):
    """The first `count` batches."""
    return list(itertools.islice(iterator, count))


def same_batches(first, second):
    """Whether two lists of batches are equal bit for bit."""
    pairs = [pair for batches in zip(first, second) for pair in zip(*batches)]
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------------------------------
# Pixels
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height", [(640, 427), (427, 640), (333, 333), (64, 64), (65, 64), (64, 67),
                                           (70, 64), (10, 7), (1, 1), (500, 20), (641, 353)])
@pytest.mark.parametrize("size", [64, 37])
def test_preprocess_gives_the_pixels_of_torchvision_resize_and_center_crop(width, height, size):
    image = noise_image(width, height)
    transforms = torchvision.transforms
    expected = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])(image)
    ours = data.preprocess(image, size)
    assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_center_crop_rounds_halves_to_even():
    for height, top in ((67, 2), (69, 2), (65, 0), (71, 4)):           # spare 3, 5, 1, 7: round(2.5) = 2
        image = noise_image(64, height)
        expected = np.asarray(image)[top:top + 64].transpose(2, 0, 1)
        assert np.array_equal(data.preprocess(image, 64), expected)


def test_random_crop_is_a_window_of_the_resized_image_and_reaches_every_position():
    image = noise_image(34, 32)
    resized = data.image_to_tensor(data.resize_shorter_side(image, 32))
    seen = set()
    for seed in range(40):
        crop = data.preprocess(image, 32, "random", data.seeded_generator(seed))
        again = data.preprocess(image, 32, "random", data.seeded_generator(seed))
        places = [left for left in range(3) if torch.equal(crop, resized[:, :, left:left + 32])]
        assert len(places) == 1 and torch.equal(crop, again)
        seen.update(places)
    assert seen == {0, 1, 2}


def test_flip_mirrors_about_half_of_the_images_and_is_off_by_default():
    image = noise_image(16, 16)
    plain = data.preprocess(image, 16)
    generators = map(data.seeded_generator, range(200))
    flipped = [data.preprocess(image, 16, generator=generator, flip=True) for generator in generators]
    mirrored = sum(torch.equal(pixels, plain.flip(-1)) for pixels in flipped)
    assert mirrored + sum(torch.equal(pixels, plain) for pixels in flipped) == 200 and 70 < mirrored < 130
    for seed in range(20):
        assert torch.equal(data.preprocess(image, 16, "random", data.seeded_generator(seed)), plain)


@pytest.mark.parametrize("width, height, size", [(300, 200, 64), (200, 301, 64), (97, 64, 32), (40, 40, 37)])
def test_ten_crop_gives_torchvisions_five_crops_at_one_tenth_more_and_their_mirrors(width, height, size):
    image = noise_image(width, height)
    transforms = torchvision.transforms
    expected = transforms.FiveCrop(size)(transforms.Resize(int(1.1 * size))(image))
    ours = data.ten_crop(image, size)
    assert ours.shape == (10, 3, size, size) and ours.dtype == torch.uint8
    for number, crop in enumerate(expected):
        crop = np.asarray(crop).transpose(2, 0, 1)
        assert np.array_equal(ours[number], crop) and np.array_equal(ours[number + 5], crop[:, :, ::-1])


def test_to_float_is_exactly_k_over_127_5_minus_1_and_invertible():
    levels = torch.arange(256, dtype=torch.uint8)
    expected = (levels.double() / 127.5 - 1).float()
    assert torch.equal(data.to_float(levels), expected) and data.to_float(levels).dtype == torch.float32
    assert torch.equal(runtime.to_uint8(data.to_float(levels)), levels)


def test_hash64_separates_arguments_and_broadcasts():
    grid = data.hash64(7, np.arange(100)[:, None], np.arange(100))
    assert grid.shape == (100, 100) and len(np.unique(grid)) == 10000
    assert grid[3, 5] == data.hash64(7, 3, 5)[0] != data.hash64(7, 5, 3)[0] != data.hash64(-7, 5, 3)[0]
    bits = np.unpackbits(grid.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert abs(bits - 0.5).max() < 0.03


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------

def test_folder_of_classes_is_sorted_labelled_and_equal_to_preprocess(tmp_path):
    names = ["b/2.JPG", "b/10.jpeg", "a/z.webp", "a/sub/deep.BMP", "c/x.Png", "a-b/q.png"]
    for number, name in enumerate(names):
        write_image(tmp_path / name, seed=number)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "a" / "._z.png").write_bytes(b"a file that macOS leaves behind")
    (tmp_path / ".cache").mkdir()
    dataset = data.build_dataset(tmp_path, "train", 16)
    assert dataset.classes == ["a", "a-b", "b", "c"] and len(dataset) == 6 and dataset.name == str(tmp_path)
    assert dataset.files == ["a/sub/deep.BMP", "a/z.webp", "a-b/q.png", "b/10.jpeg", "b/2.JPG", "c/x.Png"]
    assert [dataset.label(i) for i in range(6)] == [0, 0, 1, 2, 2, 3]
    for index, (image, label, position) in enumerate(dataset):
        assert (label, position) == (dataset.label(index), index) and type(label) is type(position) is int
        assert torch.equal(image, data.preprocess(dataset.load(index), 16))
    with pytest.raises(IndexError):
        dataset[6]


def test_flat_folder_has_no_classes_and_label_zero(tmp_path):
    make_folder(tmp_path, 4, classes=())
    (tmp_path / "empty").mkdir()
    dataset = data.build_dataset(str(tmp_path), "val", 16)
    assert dataset.classes == [] and [dataset[i][1] for i in range(4)] == [0] * 4


def test_split_folders_are_picked_and_share_their_class_names(tmp_path):
    for name in ("train/ants/1", "train/bees/2", "train/cows/3", "val/cows/4", "val/dogs/5"):
        write_image(tmp_path / f"{name}.png")
    train, val = (data.build_dataset(tmp_path, split, 16) for split in ("train", "val"))
    assert train.classes == val.classes == ["ants", "bees", "cows", "dogs"]
    assert [val.label(i) for i in range(2)] == [2, 3] and val.files == ["cows/4.png", "dogs/5.png"]
    assert data.build_dataset(tmp_path, "test", 16).files == val.files      # val stands in for a missing test
    assert data.build_dataset(tmp_path / "val", "train", 16).classes == ["cows", "dogs"]


@pytest.mark.parametrize("files, split, problem", [
    ([], "train", "holds no images"),
    (["a.txt", "sub/b.gif"], "train", "holds no images"),
    (["1.png", "ants/2.png"], "train", "in class subfolders and 1 beside them"),
    (["train/ants/1.png"], "val", "has train but no val or test folder"),
    (["val/1.png"], "train", "has val but no train folder"),
    (["train/1.png", "bus/2.png"], "train", "is it a split or a class"),
    (["0.tar"], "train", "give a pattern such as"),
])
def test_folder_mistakes_are_one_clear_line(tmp_path, files, split, problem):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=problem) as error:
        data.build_dataset(tmp_path, split, 16)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path, split, options, problem", [
    ("nowhere", "train", {}, "does not exist"),
    ("file.txt", "train", {}, "is a single file"),
    ("pictures", "train", {"length": 5}, "only the generated sets"),
    ("pictures", "training", {}, "split 'training' is unknown"),
    ("pictures", "train", {"crop": "centre"}, "crop 'centre' is unknown"),
])
def test_other_mistakes_are_one_clear_line(tmp_path, path, split, options, problem):
    make_folder(tmp_path / "pictures", 2)
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match=problem):
        data.build_dataset(tmp_path / path, split, 16, **options)


# ------------------------------------------------------------------------------------------------------------
# Tar shards
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern, expected", [
    ("a.tar", ["a.tar"]),
    ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
    ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
    ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
    ("a-{0..2}.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
    ("a-{2..0}.tar", ["a-2.tar", "a-1.tar", "a-0.tar"]),
    ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
    ("{x,y{1..2}}.tar", ["x.tar", "y1.tar", "y2.tar"]),
    ("{0..1,7}.tar", ["0.tar", "1.tar", "7.tar"]),
    ("{a,b,a}.tar", ["a.tar", "b.tar"]),
])
def test_braces_expand_as_in_bash(pattern, expected):
    assert data.expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["a-{000-127}.tar", "a-{0..}.tar", "a-{0.tar", "a-0}.tar", "a-{x}.tar"])
def test_wrong_braces_are_named(pattern):
    with pytest.raises(UserError, match="brace|neither a range"):
        data.build_dataset(pattern, "train", 16)


def test_shards_give_the_images_and_classes_of_their_members(tmp_path):
    kinds = (("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPG", "JPEG"))
    contents = {}
    for shard in range(2):
        members = []
        for i, (suffix, form) in enumerate(kinds):
            name = f"part/{shard}.{i}.{suffix}"
            contents[f"{tmp_path}/s-{shard}.tar:{name}"] = content = encoded(10 * shard + i, form)
            pair = [(name, content), (f"part/{shard}.{i}.cls", b" 3\n" if i == 2 else b"%d" % i)]
            members += pair[::-1] if i % 2 else pair + [(f"part/{shard}.{i}.json", b"{}")]
        make_shard(tmp_path / f"s-{shard}.tar", members)
    dataset = data.build_dataset(f"{tmp_path}/s-{{0..1}}.tar", "train", 16)
    assert len(dataset) == 10 and dataset.classes == ["0", "1", "2", "3", "4"]
    assert [dataset.label(i) for i in range(10)] == [0, 1, 3, 3, 4] * 2
    for i in (3, 9, 0, 5, 9):                                                    # in any order, twice
        expected = Image.open(io.BytesIO(contents[dataset.path(i)])).convert("RGB")
        assert np.array_equal(dataset.load(i), expected) and dataset[i][1:] == (dataset.label(i), i)


def test_shards_without_cls_members_are_unlabelled(tmp_path):
    make_shard(tmp_path / "s.tar", [("a.png", encoded())])
    dataset = data.build_dataset(tmp_path / "s.tar", "train", 16)
    assert dataset.classes == [] and dataset[0][1:] == (0, 0)


@pytest.mark.parametrize("members, problem", [
    ([("a.txt", b"x")], "holds no images"),
    ([("a.png", encoded()), ("a.cls", b"cat")], "a.cls holds 'cat'"),
    ([("a.png", encoded()), ("a.cls", b"-1")], "a.cls holds '-1'"),
    ([("a.png", encoded()), ("a.cls", b"1"), ("b.png", encoded())], "1 of 2 images have no .cls.*b.png"),
])
def test_mistakes_in_shards_are_one_clear_line(tmp_path, members, problem):
    make_shard(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=problem):
        data.build_dataset(tmp_path / "s.tar", "train", 16)


def test_missing_shards_are_listed(tmp_path):
    make_shard(tmp_path / "s-1.tar", [("a.png", encoded())])
    with pytest.raises(UserError, match=r"9 of 10 shards missing \(.*s-0.tar, .*s-2.tar, .*, \.\.\.\)"):
        data.build_dataset(tmp_path / "s-{0..9}.tar", "train", 16)


def test_truncated_shards_are_named_wherever_they_are_cut(tmp_path):
    path = make_shard(tmp_path / "s.tar", [(f"{i}.png", encoded(i)) for i in range(3)])
    whole, member = path.read_bytes(), 512 + -(-len(encoded()) // 512) * 512     # header and padded content
    assert len(data.build_dataset(path, "train", 16)) == 3
    for cut in (0, 100, 512, 700, member, member + 100, member + 512, 2 * member - 1, 2 * member, 3 * member):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"shard .*s.tar is truncated"):
            data.build_dataset(path, "train", 16)
    path.write_bytes(whole[:member] + b"garbage!" * 64 + whole[member + 512:])
    with pytest.raises(UserError, match=r"shard .*s.tar is truncated or damaged after 1 images"):
        data.build_dataset(path, "train", 16)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(ROOT / "pyproject.toml", "a.png")
    with pytest.raises(UserError, match="unpack it if it is compressed"):
        data.build_dataset(path, "train", 16)


# ------------------------------------------------------------------------------------------------------------
# Broken images
# ------------------------------------------------------------------------------------------------------------

def break_file(path, how):
    """Damage an image file in one of several ways."""
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:len(content) // 2], "empty": b"", "text": b"not a picture" * 20,
                      "header only": content[:12]}[how])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
@pytest.mark.parametrize("how", ["truncated", "empty", "text", "header only"])
def test_every_kind_of_broken_image_is_reported_once_with_its_path(tmp_path, capfd, suffix, how):
    make_folder(tmp_path, 3, suffix=suffix)
    break_file(tmp_path / "bees" / f"0001{suffix}", how)
    dataset = data.build_dataset(tmp_path, "train", 16)
    assert [dataset[i] is None for i in (0, 1, 2, 1, 1)] == [False, True, False, True, True]
    report = capfd.readouterr().err
    assert report.count("broken image skipped") == 1 and report.count("\n") == 1
    assert str(tmp_path / "bees" / f"0001{suffix}") in report
    assert dataset.broken.tolist() == [False, True, False]


def test_images_that_would_decode_to_nonsense_or_fill_the_memory_count_as_broken(tmp_path, capfd):
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "a-16-bit.png")
    Image.new("L", (1, 60000)).save(tmp_path / "b-thin.png")
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)    # 30 GB once decoded
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "c-bomb.png").write_bytes(png + encoded()[33:])
    dataset = data.build_dataset(tmp_path, "train", 256)
    assert [dataset[i] for i in range(3)] == [None] * 3
    report = capfd.readouterr().err
    assert "convert them to 8 bits" in report and "too unequal" in report and "decompression bomb" in report


def test_transparency_and_palettes_become_rgb_as_pil_converts_them(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 200                                           # red, hidden by its alpha of 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    noise_image(16, 16).convert("P").save(tmp_path / "b.png")
    noise_image(16, 16).convert("L").save(tmp_path / "c.png")
    noise_image(16, 16).convert("CMYK").save(tmp_path / "d.jpg")
    dataset = data.build_dataset(tmp_path, "train", 16)
    for index, name in enumerate(("a.png", "b.png", "c.png", "d.jpg")):
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(dataset[index][0], expected)
    assert dataset[0][0].float().mean((1, 2)).tolist() == [200, 0, 0]


def test_one_percent_may_be_broken_and_more_is_an_error(tmp_path, capfd):
    make_folder(tmp_path, 200, classes=())
    dataset = data.build_dataset(tmp_path, "train", 16)
    for name in ("0030.png", "0060.png"):
        break_file(tmp_path / name, "truncated")
    assert len([item for item in dataset if item]) == 198
    dataset.raise_if_broken()
    break_file(tmp_path / "0090.png", "empty")
    assert dataset[90] is None
    with pytest.raises(UserError, match="3 of the 200 images .* broken, more than 1 %, such as .*0030.png"):
        dataset.raise_if_broken()


def test_broken_images_of_all_ranks_are_counted_together(tmp_path, capfd, monkeypatch):
    make_folder(tmp_path, 100, classes=())
    dataset = data.build_dataset(tmp_path, "train", 16)
    dataset.broken[3] = True
    monkeypatch.setattr(runtime, "all_reduce_sum", lambda flags: flags + torch.arange(100).eq(3).int())
    dataset.raise_if_broken(all_ranks=True)                        # the same image, met by both ranks
    monkeypatch.setattr(runtime, "all_reduce_sum", lambda flags: flags + torch.arange(100).eq(4).int())
    with pytest.raises(UserError, match="2 of the 100 images"):
        dataset.raise_if_broken(all_ranks=True)


@pytest.fixture(scope="module")
def folder_with_two_broken(tmp_path_factory):
    """300 images, of which numbers 17 and 18 are broken."""
    folder = make_folder(tmp_path_factory.mktemp("broken"), 300, classes=())
    break_file(folder / "0017.png", "truncated")
    break_file(folder / "0018.png", "text")
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_train_loader_replaces_broken_images_by_the_next_readable(folder_with_two_broken, capfd, num_workers):
    dataset = data.build_dataset(folder_with_two_broken, "train", 16, crop="random")
    whole = data.build_dataset(folder_with_two_broken, "train", 16, crop="random")
    batches = take(data.train_loader(dataset, 30, seed=1, num_workers=num_workers), 20)          # two epochs
    for step, (images, _, indices) in enumerate(batches):
        requests = data.global_batch(300, 30, 1, step)
        expected = [19 if index in (17, 18) else index for index, _ in requests]
        assert indices.tolist() == expected and images.shape == (30, 3, 16, 16)
        assert all(torch.equal(image, whole[index, seed][0])
                   for image, index, (_, seed) in zip(images, expected, requests))
    assert dataset.broken.nonzero().flatten().tolist() == [17, 18]
    report = capfd.readouterr().err
    assert report.count("0017.png") == report.count("0018.png") == 1 and report.count("\n") == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_loader_leaves_broken_images_out(folder_with_two_broken, capfd, num_workers):
    dataset = data.build_dataset(folder_with_two_broken, "val", 16)
    indices = torch.cat([batch[2] for batch in data.eval_loader(dataset, 1, num_workers=num_workers)])
    assert indices.tolist() == [i for i in range(300) if i not in (17, 18)]
    assert dataset.broken.sum() == 2 and capfd.readouterr().err.count("broken image skipped") == 2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("broken", [6, 100])
def test_both_loaders_stop_when_more_than_one_percent_is_broken(tmp_path, capfd, num_workers, broken):
    make_folder(tmp_path, 100, classes=())
    for i in range(broken):
        break_file(tmp_path / f"{i:04d}.png", "empty")
    dataset = data.build_dataset(tmp_path, "train", 16)
    with pytest.raises(UserError, match="broken, more than 1 %") as error:
        take(data.train_loader(dataset, 10, seed=0, num_workers=num_workers), 10)
    assert "\n" not in str(error.value)
    dataset = data.build_dataset(tmp_path, "val", 16)
    with pytest.raises(UserError, match="broken, more than 1 %"):
        take(data.eval_loader(dataset, 10, num_workers=num_workers), 10)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_any_kind_count_broken_images_and_may_persist(folder_with_two_broken, capfd, method):
    dataset = data.build_dataset(folder_with_two_broken, "val", 16)
    loader = torch.utils.data.DataLoader(dataset, 50, collate_fn=data.collate, num_workers=1,
                                         multiprocessing_context=method, persistent_workers=True,
                                         worker_init_fn=data.leave_process_group)
    sizes = [[len(images) for images, _, _ in loader] for _ in range(2)]
    assert sizes == [[48, 50, 50, 50, 50, 50]] * 2
    assert dataset.broken.sum() == 2 and capfd.readouterr().err.count("broken image skipped") == 2


# ------------------------------------------------------------------------------------------------------------
# Order
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """50 images that are larger than their crops."""
    return make_folder(tmp_path_factory.mktemp("pictures"), 50)


def random_crops(folder):
    """The data set of `folder` as training sees it."""
    return data.build_dataset(folder, "train", 12, crop="random", flip=True)


def test_the_global_batch_does_not_depend_on_ranks_accumulation_or_workers(pictures):
    dataset, steps = random_crops(pictures), 6
    reference = take(data.train_loader(dataset, 12, seed=5), steps)
    cuts = (2, 1, 0), (1, 2, 0), (1, 3, 2), (2, 2, 0), (2, 3, 1), (12, 1, 0)
    for world_size, accumulation, num_workers in cuts:
        ranks = [take(data.train_loader(dataset, 12, 5, 0, rank, world_size, accumulation, num_workers),
                      steps * accumulation) for rank in range(world_size)]
        shares = [ranks[rank][micro] for micro in range(steps * accumulation) for rank in range(world_size)]
        count = world_size * accumulation
        parts = [shares[first:first + count] for first in range(0, len(shares), count)]
        joined = [tuple(map(torch.cat, zip(*part))) for part in parts]
        assert same_batches(joined, reference), (world_size, accumulation, num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 9])
def test_starting_at_a_step_continues_the_run_bit_for_bit(pictures, num_workers, start):
    dataset = random_crops(pictures)
    whole = take(data.train_loader(dataset, 12, seed=5, accumulation=2), 24)
    loader = data.train_loader(dataset, 12, 5, start, accumulation=2, num_workers=num_workers)
    resumed = take(loader, 24 - 2 * start)
    assert same_batches(resumed, whole[2 * start:])


def test_an_epoch_is_a_permutation_without_its_last_partial_batch(pictures):
    batches = take(data.train_loader(random_crops(pictures), 12, seed=3), 8)     # 50 = 4 x 12 + 2
    epochs = [torch.cat([batch[2] for batch in part]).tolist() for part in (batches[:4], batches[4:])]
    for epoch, indices in enumerate(epochs):
        assert len(set(indices)) == 48 and indices == data.epoch_order(50, 3, epoch)[:48].tolist()
        assert sorted(data.epoch_order(50, 3, epoch)) == list(range(50))
    assert epochs[0] != epochs[1] and data.epoch_order(50, 4, 0)[:48].tolist() != epochs[0]


def test_crops_change_with_seed_and_epoch_and_nothing_else(pictures):
    def seeds(seed, epoch, batch_size):                            # index -> seed, over a whole epoch
        steps = range(epoch * 50 // batch_size, (epoch + 1) * 50 // batch_size)
        return dict(request for step in steps for request in data.global_batch(50, batch_size, seed, step))

    dataset, crops = random_crops(pictures), {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        items = seeds(seed, epoch, 10)
        assert items == seeds(seed, epoch, 25)                     # another batch size, the same crops
        crops[seed, epoch] = torch.stack([dataset[index, items[index]][0] for index in range(50)])
    different = [(crops[0, 0] != crops[other]).flatten(1).any(1).float().mean() for other in ((0, 1), (1, 0))]
    assert min(different) > 0.6                                    # 3 positions and 2 mirrors: 5/6 by chance
    torch.manual_seed(1)
    before = dataset[7][0]
    torch.manual_seed(2)
    assert torch.equal(before, dataset[7][0])


def test_loaders_leave_the_global_generators_alone(pictures):
    torch.manual_seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for num_workers in (0, 1):
        take(data.train_loader(random_crops(pictures), 10, seed=0, num_workers=num_workers), 3)
        take(data.eval_loader(random_crops(pictures), 10, num_workers=num_workers), 3)
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.parametrize("options, problem", [
    ({"global_batch_size": 51}, "--global-batch-size 51 is more than the 50 images"),
    ({"global_batch_size": 10, "world_size": 2, "accumulation": 2}, "choose a multiple of 4"),
])
def test_a_batch_that_does_not_fit_is_refused_at_once(pictures, options, problem):
    with pytest.raises(UserError, match=problem):
        data.train_loader(random_crops(pictures), seed=0, **options)


@pytest.mark.parametrize("world_size", [1, 2, 3, 60])
def test_eval_shards_hold_every_image_once_in_order(pictures, world_size):
    dataset = data.build_dataset(pictures, "val", 12)
    for rank in range(world_size):
        batches = list(data.eval_loader(dataset, 8, rank, world_size))
        indices = [index for batch in batches for index in batch[2].tolist()]
        assert indices == list(range(rank, 50, world_size))
        assert all(len(images) == 8 for images, _, _ in batches[:-1])
    images, labels, indices = next(data.eval_loader(dataset, 8))
    assert images.dtype == torch.uint8 and labels.dtype == indices.dtype == torch.int64
    assert labels.tolist() == [dataset.label(i) for i in range(8)]


def test_ctrl_c_reaches_the_trainer_but_not_its_workers(tmp_path):
    program = """if True:
        import data, runtime, time
        dataset = data.build_dataset(None, "train", 32)
        loader = data.train_loader(dataset, 50, seed=0, num_workers=2)
        next(loader)
        stop = runtime.StopRequest()
        print("ready", flush=True)
        while not stop.agreed():
            time.sleep(0.05)
        for step in range(20):
            next(loader)
        print("saved", flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", program], text=True, env=environment(), cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert output == "saved\n" and process.returncode == 0 and errors == ""


# ------------------------------------------------------------------------------------------------------------
# The generated set
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variety", data.VARIETIES)
@pytest.mark.parametrize("size", [32, 50, 128])
def test_a_picture_drawn_alone_equals_the_one_in_a_batch(variety, size):
    dataset = data.Generated("train", size, variety)
    indices = [*range(40), 19_999, 3, 12_345]
    batch = dataset.__getitems__(indices)
    for index, (image, label, position) in zip(indices, batch):
        assert image.shape == (3, size, size) and image.dtype == torch.uint8
        assert (label, position) == (index % 10, index)
        assert torch.equal(image, dataset[index][0])
        assert torch.equal(image, data.image_to_tensor(dataset.load(index)))


def test_pictures_are_the_same_on_every_machine_and_release():
    drawn = {variety: data.Generated("train", 32, variety).draw(np.arange(50)) for variety in data.VARIETIES}
    checksums = {variety: zlib.crc32(images.tobytes()) for variety, images in drawn.items()}
    assert checksums == {"full": 436570980, "plain": 1891327997}


def test_train_and_val_and_seeds_share_no_picture():
    sets = [data.build_dataset(None, "train", 16, length=1000), data.build_dataset(None, "val", 16),
            data.build_dataset(None, "test", 16), data.build_dataset(None, "train", 16, length=1000, seed=1)]
    pictures = [image.tobytes() for dataset in sets for image in dataset.draw(np.arange(1000))]
    assert len(set(pictures)) == 4000
    keys = {split: data.hash64(0, np.arange(20000) * 3 + i) for i, split in enumerate(data.SPLITS)}
    assert len(np.unique(np.concatenate(list(keys.values())))) == 60000


def test_names_lengths_and_labels_of_the_generated_sets():
    train, val = data.build_dataset(None, "train", 32), data.build_dataset("generated-plain", "val", 32)
    assert (len(train), train.name, len(val), val.name) == (20_000, "generated", 1_000, "generated-plain")
    names = "ball ring triangle square star heart moon cross flower arrow"
    assert train.classes == val.classes == names.split()
    assert np.bincount([val.label(i) for i in range(1000)]).tolist() == [100] * 10
    short = data.build_dataset("generated", "train", 32, length=30)
    assert len(short) == 30 and torch.equal(short[29][0], train[29][0])
    assert not torch.equal(train[29][0], data.build_dataset(None, "train", 32, seed=1)[29][0])
    with pytest.raises(IndexError):
        short[30]


def test_another_resolution_shows_the_same_scene():
    small, large = (data.Generated("train", size).draw(np.arange(50)).astype(float) for size in (32, 128))
    averaged = large.reshape(50, 3, 32, 4, 32, 4).mean((3, 5))
    assert abs(small - averaged).mean() < 2 and abs(small - averaged[::-1]).mean() > 40


def test_figures_stay_in_about_the_unit_disc_and_inside_the_picture():
    angle, radius = np.linspace(0, 2 * np.pi, 721), np.linspace(0, 2, 201)[:, None]
    for shape in data.SHAPES:
        inside = shape(radius * np.cos(angle), radius * np.sin(angle)).min(axis=1) < 0
        assert 0.85 < radius[inside].max() <= 1.02, shape.__name__


def test_ground_and_figure_colours_do_not_tell_the_class():
    pictures = data.Generated("train", 16).draw(np.arange(6000)).astype(np.float64)
    corners = pictures[:, :, ::15, ::15].reshape(6000, -1) / 255
    average = pictures.mean((2, 3)) / 255
    features = np.concatenate([corners, corners ** 2, average, np.ones((6000, 1))], axis=1)
    targets = np.eye(10)[np.arange(6000) % 10]
    weights = np.linalg.lstsq(features[:4000], targets[:4000], rcond=None)[0]
    right = ((features[4000:] @ weights).argmax(1) == np.arange(4000, 6000) % 10).mean()
    assert right < 0.16                                            # chance: 0.10


def test_the_plain_variety_has_less_to_tell_than_the_full_one():
    sizes = {}
    for variety in data.VARIETIES:
        images = data.Generated("train", 32, variety).draw(np.arange(200))
        sizes[variety] = len(zlib.compress(images.tobytes(), 9))
    assert sizes["plain"] < 0.6 * sizes["full"]


def test_generated_pictures_flip_with_the_seed_only():
    plain, flipping = data.Generated("train", 16), data.Generated("train", 16, flip=True)
    same = [torch.equal(plain[5][0], flipping[5, seed][0]) for seed in range(100)]
    assert 30 < sum(same) < 70
    for seed in range(100):
        assert torch.equal(flipping[5, seed][0], plain[5][0] if same[seed] else plain[5][0].flip(-1))


@pytest.mark.parametrize("options, problem", [(("train", 32, "simple"), "variety 'simple' is unknown"),
                                              (("dev", 32), "split 'dev' is unknown")])
def test_unknown_names_of_generated_sets_are_refused(options, problem):
    with pytest.raises(UserError, match=problem):
        data.Generated(*options)


# ------------------------------------------------------------------------------------------------------------
# The script, and real pictures
# ------------------------------------------------------------------------------------------------------------

def test_script_without_flags_draws_the_generated_set(tmp_path):
    result = run_script("data.py", cwd=tmp_path)
    assert "20000" in result.stdout and "classes  10: ball 2000" in result.stdout
    with Image.open(tmp_path / "runs" / "data.png") as grid:
        assert grid.width > 10 * 64 and grid.height > 8 * 64


def test_script_checks_every_image_and_keeps_counting(tmp_path, capfd):
    make_folder(tmp_path / "set", 300)
    break_file(tmp_path / "set" / "ants" / "0201.png", "empty")
    args = data.get_args(["--data-path", str(tmp_path / "set"), "--output", str(tmp_path / "grid.png"),
                          "--image-size", "16", "--crop", "random", "--rows", "3", "--check-all"])
    data.main(args)
    output = capfd.readouterr().out
    assert "1 broken of 300 read" in output and "classes  3: ants 100, bees 100, cows 100" in output
    assert "24 x 20" in output and (tmp_path / "grid.png").exists()


def test_script_shows_sets_of_one_image_of_many_classes_and_without_classes(tmp_path):
    make_folder(tmp_path / "one", 1, classes=())
    make_folder(tmp_path / "many", 40, classes=[f"class-{i:02d}" for i in range(25)])
    make_folder(tmp_path / "flat", 7, classes=())
    for name in ("one", "many", "flat"):
        output = tmp_path / f"{name}.png"
        data.main(data.get_args(["--data-path", str(tmp_path / name), "--output", str(output)]))
        assert output.exists()


@pytest.mark.parametrize("flags, problem", [
    (("--data-path", "nowhere"), "--data-path nowhere does not exist"),
    (("--data-path", "x-{0..3}.tar"), "4 of 4 shards missing"),
    (("--image-size", "0"), "argument --image-size"),
    (("--output", "/dev/null/grid.png"), "--output /dev/null/grid.png cannot be written"),
])
def test_script_mistakes_exit_with_status_2_and_one_line(capsys, flags, problem):
    with pytest.raises(SystemExit) as end:
        runtime.run_script(data.main, lambda: data.get_args(flags))
    errors = capsys.readouterr().err
    assert end.value.code == 2 and problem in errors and errors.count("\n") == 1


@needs_real_data
@pytest.mark.parametrize("name, split, count, classes", [
    ("emoji128", "train", 1673, 9), ("emoji128", "val", 181, 9),
    ("photos256", "train", 1163, 25), ("photos256", "val", 126, 25)])
def test_real_pictures_are_read_as_published(name, split, count, classes):
    dataset = data.build_dataset(REAL / name, split, 64)
    assert len(dataset) == count and len(dataset.classes) == classes
    transforms = torchvision.transforms
    transform = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64)])
    reference = torchvision.datasets.ImageFolder(REAL / name / split, transform)
    assert [(dataset.path(i), dataset.label(i)) for i in range(count)] == reference.samples
    for index in range(0, count, count // 20):
        assert np.array_equal(dataset[index][0].permute(1, 2, 0), np.asarray(reference[index][0]))
    dataset.raise_if_broken()


def test_resize_makes_small_crops_of_large_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    dataset = data.build_dataset(tmp_path, "train", 16, "center", resize=60)    # 60 x 90 stays as it is
    assert torch.equal(dataset[0][0], torch.from_numpy(pixels[22:38, 37:53]).permute(2, 0, 1))
    cropped = data.build_dataset(tmp_path, "train", 16, "random", resize=60)
    corners = {tuple(cropped[0, seed][0][:, 0, 0].tolist())
               for seed in range(20)}
    assert len(corners) > 10
    with pytest.raises(runtime.UserError, match="--resize 8"):
        data.build_dataset(tmp_path, "train", 16, resize=8)


# ---- clips ------------------------------------------------------------------------------------------------

def noise_video(count=20, width=32, height=24, seed=0):
    """Frames (N, H, W, 3) that all differ, of blocks large enough to survive a lossy codec."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def write_exactly(path, frames):
    """A video file from which every decoder must get exactly `frames`: FFV1 in RGB."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="bgr0")))
        container.mux(stream.encode())
    return path


def make_videos(root, classes=("fall", "jump"), count=3, frames=20):
    """`count` videos of each class under train/ and test/ of `root`."""
    for i, split in enumerate(("train", "test")):
        for j, name in enumerate(classes):
            for k in range(count):
                write_exactly(root / split / name / f"v_{name}_g01_c{k:02d}.avi",
                              noise_video(frames, seed=100 * i + 10 * j + k))
    return root


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_decoding_gives_exactly_the_frames_that_were_stored(tmp_path, suffix):
    frames = noise_video()
    path = write_exactly(tmp_path / f"a{suffix}", frames)
    assert np.array_equal(data.read_video(path), frames) and data.frame_rate(path) == 25


@pytest.mark.parametrize("suffix, error", [(".webp", 0), (".gif", 6), (".mp4", 10), (".avi", 10),
                                           (".mkv", 10)])
def test_a_written_video_is_read_back_with_all_its_frames_in_order(tmp_path, suffix, error):
    if suffix not in data.PILLOW_SUFFIXES:
        pytest.importorskip("av")
    frames = noise_video(9, 40, 32)
    path = tmp_path / "deep" / f"a{suffix}"
    data.write_video(path, frames, fps=20)
    back = data.read_video(path)
    assert back.shape == frames.shape and data.frame_rate(path) == 20
    assert abs(back.astype(int) - frames).mean() <= error
    assert os.listdir(path.parent) == [path.name]                        # nothing temporary is left


def test_odd_sides_are_padded_and_wrong_suffixes_refused(tmp_path):
    pytest.importorskip("av")
    data.write_video(tmp_path / "a.mp4", noise_video(3)[:, :23, :31])
    assert data.read_video(tmp_path / "a.mp4").shape == (3, 24, 32, 3)
    with pytest.raises(UserError, match="a.mov: videos are written as .mp4"):
        data.write_video(tmp_path / "a.mov", noise_video(3))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not here")
def test_real_clips_have_the_frames_that_their_headers_promise():
    av = pytest.importorskip("av")
    train, test = (data.build_clips(REAL / "clips", split, 64) for split in ("train", "test"))
    assert train.classes == test.classes == ["bikes", "carphone", "pedestrians", "tree"]
    assert len(train) + len(test) == 27 and {test.label(i) for i in range(len(test))} == {0, 1, 2, 3}
    for i in range(len(test)):
        clip, label, index = test[i]
        assert clip.shape == (3, 17, 64, 64) and clip.dtype == torch.uint8 and index == i
        with av.open(test.path(i)) as container:
            promised, times = container.streams.video[0].frames, []
            for frame in container.decode(video=0):
                times.append(frame.pts)
        assert int(test.lengths[i]) == promised == len(test.load(i)) and times == sorted(set(times))


def test_a_clip_in_evaluation_is_the_central_frames_each_preprocessed_like_a_picture(tmp_path):
    make_videos(tmp_path, frames=22)
    dataset = data.build_clips(tmp_path, "val", 16, frames=5)            # no val/, so test/
    assert len(dataset) == 6 and dataset.classes == ["fall", "jump"]
    clip, label, index = dataset[4]
    assert (label, index) == (1, 4) and clip.dtype == torch.uint8
    frames = noise_video(22, seed=111)[22 // 2 - 2:22 // 2 + 3]
    assert torch.equal(clip, torch.stack([data.preprocess(Image.fromarray(f), 16) for f in frames], 1))
    images, labels, _ = next(data.eval_loader(dataset, 4))
    assert images.shape == (4, 3, 5, 16, 16) and labels.tolist() == [0, 0, 0, 1]


def test_training_draws_start_and_crop_from_the_seed_and_one_crop_for_all_frames(tmp_path):
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(24, 1).repeat(48, 2).repeat(3, 3) * 4
    frames = frames + np.arange(48, dtype=np.uint8)[:, None] * np.array([0, 4, 0], np.uint8)
    write_exactly(tmp_path / "fall" / "a.avi", frames)
    dataset = data.build_clips(tmp_path, "train", 24, frames=5, crop="random")
    seen = set()
    for seed in range(60):
        clip = dataset[0, seed][0]
        assert torch.equal(clip, dataset[0, seed][0])
        start, left = int(clip[0, 0, 0, 0]) // 4, int(clip[1, 0, 0, 0]) - int(clip[0, 0, 0, 0])
        assert (clip[0, :, 0, 0] == 4 * torch.arange(start, start + 5)).all()      # consecutive frames
        assert (clip[1] - clip[0] == (clip[1] - clip[0])[:1]).all()                # the same window in all
        seen.add((start, left // 4))
    assert {start for start, _ in seen} == set(range(16)) and len({left for _, left in seen}) > 15
    centred = data.build_clips(tmp_path, "train", 24, frames=5, crop="random", start="center")
    assert {int(centred[0, seed][0][0, 0, 0, 0]) for seed in range(9)} == {4 * 8}


def test_the_clips_of_a_training_step_do_not_depend_on_ranks_or_workers(tmp_path):
    dataset = data.build_clips(make_videos(tmp_path), "train", 16, frames=5, crop="random")
    whole = take(data.train_loader(dataset, 4, seed=3), 3)
    halves = [take(data.train_loader(dataset, 4, seed=3, rank=rank, world_size=2, num_workers=rank), 3)
              for rank in (0, 1)]
    for step, (clips, labels, indices) in enumerate(whole):
        assert torch.equal(clips, torch.cat([halves[rank][step][0] for rank in (0, 1)]))
        assert labels.tolist() == [dataset.label(i) for i in indices.tolist()]


def test_official_split_lists_choose_the_clips(tmp_path):
    root = make_videos(tmp_path) / "train"
    (tmp_path / "trainlist01.txt").write_text("jump/v_jump_g01_c02.avi 2\nfall/v_fall_g01_c00.avi 1\n\n")
    (tmp_path / "testlist01.txt").write_text("jump/v_jump_g01_c00.avi\r\n")
    train = data.build_clips(root, "train", 16, 5, split_list=tmp_path / "trainlist01.txt")
    assert train.files == ["fall/v_fall_g01_c00.avi", "jump/v_jump_g01_c02.avi"]
    assert [train[i][1] for i in range(2)] == [0, 1] and len(train) == len(train.lengths) == 2
    test = data.build_clips(root, "test", 16, 5, split_list=tmp_path / "testlist01.txt")
    assert test.classes == ["fall", "jump"] and test[0][1] == 1
    with pytest.raises(UserError, match="lacks 1 of the 1 clips of --split-list, such as .*jump_g01_c00"):
        data.build_clips(tmp_path, "test", 16, 5, split_list=tmp_path / "testlist01.txt")


def test_broken_and_short_clips_are_reported_counted_and_skipped(tmp_path, capfd):
    for i in range(150):
        write_exactly(tmp_path / "train" / "fall" / f"v_fall_g01_c{i:02d}.avi", noise_video(9, 16, 16))
    folder = tmp_path / "train" / "fall"
    whole = (folder / "v_fall_g01_c05.avi").read_bytes()
    (folder / "v_fall_g01_c05.avi").write_bytes(b"RIFF, but no video")
    write_exactly(folder / "v_fall_g01_c07.avi", noise_video(4))
    dataset = data.build_clips(tmp_path, "train", 16, frames=5)
    for _ in range(2):
        assert dataset[5] is None and dataset[7] is None and dataset[6] is not None
    printed = capfd.readouterr().err
    assert printed.count("broken clip skipped") == 2
    assert "c05.avi (" in printed and "c07.avi (too short: 4 frames, 5 are needed)" in printed
    assert int(dataset.broken.sum()) == 2
    with pytest.raises(UserError, match="2 of the 150 clips"):
        dataset.raise_if_broken()
    (folder / "v_fall_g01_c05.avi").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="c05.avi cannot be read as a video"):
        data.read_video(folder / "v_fall_g01_c05.avi")


def test_without_pyav_the_error_asks_for_it_by_name_and_gifs_work(tmp_path, monkeypatch):
    data.write_video(tmp_path / "gifs" / "a.gif", noise_video(6))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    assert data.build_clips(tmp_path / "gifs", "train", 16, frames=5)[0][0].shape == (3, 5, 16, 16)
    for call in (lambda: data.build_clips(tmp_path / "videos", "train", 16),
                 lambda: data.read_video(tmp_path / "videos" / "a.mp4"),
                 lambda: data.write_video(tmp_path / "b.mp4", noise_video(2))):
        with pytest.raises(UserError, match="pip install av"):
            call()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options, problem", [
    ({"data_path": "nowhere"}, "nowhere is no folder of videos"),
    ({"data_path": "."}, "holds no clips .*.avi"),
    ({"flip": True}, "left is one that moves right"),
    ({"split_list": "list.txt"}, "--split-list is for a folder"),
    ({"data_path": ".", "split_list": "list.txt"}, "list.txt does not exist"),
    ({"data_path": ".", "length": 5}, "only the generated clips"),
    ({"start": "end"}, "'end' is unknown"), ({"resize": 8}, "--resize 8")])
def test_mistakes_about_clips_are_one_clear_line(tmp_path, monkeypatch, options, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem) as error:
        data.build_clips(**{"data_path": None, "split": "train", "image_size": 16, **options})
    assert "\n" not in str(error.value)


def figure_of(clip):
    """(x, y, area) of the figure, which is not like the ground, in each frame of a clip (3, T, S, S)."""
    mask = (clip.float() - clip[:, :, :1, :1].float()).abs().sum(0) > 90   # more than the ground's gradients
    grid = torch.arange(clip.shape[-1]).float()
    area = mask.sum((1, 2)).float()
    x, y = (mask.sum(axis) * grid for axis in (1, 2))
    return x.sum(1) / area, y.sum(1) / area, area


def test_generated_clips_move_as_their_class_says():
    dataset = data.build_clips(None, "train", 64, length=40)
    assert dataset.classes == ["right", "left", "up", "down", "grow", "shrink", "turn-left", "turn-right",
                               "bounce", "blink"]
    for index in range(40):
        clip, label, _ = dataset[index]
        motion = dataset.classes[label]
        x, y, area = figure_of(clip)
        right, down = float(x[-1] - x[0]), float(y[-1] - y[0])
        expected = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}.get(motion)
        if expected:
            assert right * expected[0] + down * expected[1] > 20, (motion, right, down)
            assert abs(right * expected[1]) + abs(down * expected[0]) < 4
        if motion in ("grow", "shrink"):
            assert area[-1] > 6 * area[0] if motion == "grow" else area[0] > 6 * area[-1]
        if motion == "bounce":
            assert abs(down) < 3 and y[4] < y[0] - 15 and y[12] < y[0] - 15 and y[8] > y[4] + 15
        if motion == "blink":
            assert (area > 0).tolist() == [0 <= (t + 2) % 8 < 4 for t in range(17)]
        if motion.startswith("turn"):
            assert area.max() < 1.2 * area.min() and not torch.equal(clip[:, 0], clip[:, 8])


def test_a_turn_to_the_right_is_one_to_the_left_backwards():
    left, right = (data.MOTIONS[name] for name in ("turn-left", "turn-right"))
    assert left(0.25, 0, 1)[3] == -right(0.25, 0, 1)[3] == 0.25
    keys, shapes = np.array([5], np.uint64), np.array([data.SHAPES.index(data.arrow)])
    upright = data.dataclasses.replace(data.MOVING, turn=0)
    pictures = [data.draw_in_blocks(keys, shapes, 64, upright, np.array([[0], [0], [2.0], [turn], [1]]))[0]
                for turn in (0, 0.25)]
    ys, xs = (np.nonzero(abs(picture.astype(int) - picture[:, :1, :1]).sum(0) > 90) for picture in pictures)
    # The head of the arrow is wider than its shaft: it points up, and after a quarter turn to the left, left.
    assert np.bincount(ys[0], minlength=64).argmax() < 32 and np.bincount(xs[1], minlength=64).argmax() < 32


def test_the_script_shows_clips_in_motion_and_counts_them(tmp_path, capsys):
    for name, suffix in (("a", "webp"), ("b", "gif")):
        data.write_video(tmp_path / "clips" / name / "1.gif", noise_video(6, 32, 24))
        output = tmp_path / f"grid.{suffix}"
        data.main(data.get_args(["--frames", "5", "--image-size", "16", "--output", str(output),
                                 "--data-path", str(tmp_path / "clips")]))
    printed = capsys.readouterr().out
    assert "clips    2," in printed and "32 x 24, seen as 5 x 16 x 16" in printed
    assert data.read_video(output).shape == (5, 96 + 18, 2 * 98 + 2, 3)
    with pytest.raises(UserError, match="--output a.png: a grid of clips"):
        data.main(data.get_args(["--frames", "5", "--output", "a.png"]))


def test_a_generated_clip_is_the_same_alone_in_a_batch_and_at_any_time():
    dataset = data.build_clips("generated", "val", 32, frames=9)
    assert len(dataset) == 1000 and dataset.name == "generated"
    together = dataset.draw(np.arange(23))
    assert together.shape == (23, 3, 9, 32, 32) and together.dtype == np.uint8
    for index in (0, 7, 22):
        assert np.array_equal(dataset[index][0], together[index])
        assert np.array_equal(dataset.load(index).transpose(3, 0, 1, 2), together[index])
    others = [data.build_clips(None, "train", 32, 9), data.build_clips(None, "val", 32, 9, seed=1)]
    assert len({clip.tobytes() for d in (dataset, *others) for clip in d.draw(np.arange(30))}) == 90
    long = data.build_clips(None, "val", 32, frames=17).draw(np.arange(6))
    assert np.array_equal(long[:, :, ::2], together[:6])                 # the same scene at twice the rate
    one = data.build_clips(None, "val", 32, frames=1)[3][0]
    assert np.array_equal(one[:, 0], together[3][:, 0])
