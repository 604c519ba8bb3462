"""Data sets as people have them: each layout is read as what it is, or refused with the way out."""
import io
import json
import re
import subprocess
import tarfile
import types
import zipfile

import av
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from support import data, layouts, pictures, reading, sources
from support.data import View, build_dataset
from helpers import refused


def picture(level=0, suffix="PNG", frames=1):
    """The bytes of an image, or of a moving one, of one colour a frame."""
    images = [Image.new("RGB", (24, 20), (level + 20 * t,) * 3) for t in range(frames)]
    file = io.BytesIO()
    images[0].save(file, suffix, save_all=frames > 1, append_images=images[1:], **{"lossless": True})
    return file.getvalue()


def unpack(root, *patterns):
    """Files with the names that patterns such as 'train/{ants,bees}/{0..2}.jpg' expand to."""
    for level, name in enumerate(name for pattern in patterns for name in sources.expand_braces(pattern)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_image = path.suffix.lower() in reading.IMAGE_SUFFIXES
        path.write_bytes(picture(level) if is_image else b"as large as nothing")
    return root


def refuse(problem, *what):
    """Assert that such a set is refused in one line."""
    refused(problem, build_dataset, *what)


# ---- read as what they are ---------------------------------------------------------------------------------

@pytest.mark.parametrize("names, split, count, classes, says", [
    (["train/{a,b}/{0..1}.jpg", "valid/{a,b}/0.jpg", "test/{a,b}/{0..3}.jpg"], "val", 2, ["a", "b"], ""),
    (["train/{a,b}/{0..1}.jpg", "validation/{a,b}/0.jpg", "README.md"], "val", 2, ["a", "b"], ""),
    (["Training/{a,b}/0.jpg", "Testing/{a,b}/{0..3}.jpg"], "val", 8, ["a", "b"], "Testing serves as val.*te"),
    (["train/{a,b}/0.jpg", "val/{a,b}/{0..1}.jpg"], "test", 4, ["a", "b"], "val serves as test"),
    (["test/{a,b}/0.jpg", "validation/{a,c}/0.jpg"], "val", 2, ["a", "c"], ""),
    (["{a,b,@eaDir,$RECYCLE.BIN,lost+found}/0.jpg", "a/@eaDir/0.jpg/x.jpg"], "val", 2, ["a", "b"], ""),
    (["{train_interior,train_station}/0.jpg"], "train", 2, ["train_interior", "train_station"], ""),
    (["{a,b}/0.{TIF,gif,jfif,ppm,JPEG}", "{a,b}/0.{heic,svg}", "x.txt"], "train", 10, ["a", "b"],
     r"2 \.heic, 2 \.svg, 1 \.txt")])
def test_parts_and_suffixes_that_people_use(tmp_path, capsys, names, split, count, classes, says):
    dataset = build_dataset(unpack(tmp_path, *names), split, View(8))
    assert (len(dataset), dataset.classes) == (count, classes)
    out = capsys.readouterr().out
    assert re.search(says, out) if says else not out


@pytest.mark.parametrize("names, typed, count, classes", [
    (["photos/{0..3}.jpg"], "classes:{}", 4, ["photos"]), (["photos/{0..3}.jpg"], "unlabelled:{}", 4, []),
    (["{a,b}/{x,y}/0.jpg"], "classes:{}", 4, ["a", "b"]), (["{a,b}/{x,y}/0.jpg"], "unlabelled:{}", 4, []),
    (["{00000,01000}/{0..1}.png", "x.png"], "unlabelled:{}", 5, []),
    (["train/images/0.jpg", "valid/images/{0..1}.jpg"], "unlabelled:{}", 1, []),
    (["{images,masks}/0.png"], "classes:{}", 2, ["images", "masks"]),
    (["{train station,test tube}/0.png"], "classes:{}", 2, ["test tube", "train station"])])
def test_what_could_be_meant_otherwise_can_be_said(tmp_path, names, typed, count, classes):
    dataset = build_dataset(typed.format(unpack(tmp_path, *names)), "train", View(8))
    assert (len(dataset), dataset.classes) == (count, classes)
    assert [item[2] for item in dataset] == list(range(count))


@pytest.mark.parametrize("typed", ["classes:{}", "unlabelled:{}"])
def test_parts_below_what_is_meant_as_one_are_said(tmp_path, capsys, typed):
    unpack(tmp_path, "{bottle,cable}/{train/good,test/{bent,good}}/0.png")
    assert len(build_dataset(typed.format(tmp_path), "train", View(8))) == 6
    assert re.search("warning: .* holds bottle/test/bent, .* nothing is held out", capsys.readouterr().out)


def make_imagenet(root, devkit):
    """Kaggle's layout, or the official one with its devkit: three classes, four images to validate on."""
    base = unpack(root, *(f"{'' if devkit else 'ILSVRC/Data/CLS-LOC/'}{name}" for name in (
        "train/{n01440764,n01443537,n01484850}/x_{0..1}.JPEG", "val/ILSVRC2012_val_{00000001..00000004}.JPEG",
        "test/ILSVRC2012_test_00000001.JPEG")), "ILSVRC/Annotations/CLS-LOC/val/x.xml")
    if not devkit:
        rows = [f"ILSVRC2012_val_0000000{i},{wnid} 1 2 3 4" for i, wnid in
                ((3, "n01484850"), (1, "n01443537"), (2, "n01440764"), (4, "n01484850"))]
        (base / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
        return base / "ILSVRC/Data/CLS-LOC"
    folder = base / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n7\n1\n1\n")
    synsets = np.array([(1, "n01484850"), (2, "n01443537"), (7, "n01440764"), (9, "n00000000")],
                       dtype=[("ILSVRC2012_ID", "i4"), ("WNID", object)])
    scipy.io.savemat(folder / "meta.mat", {"synsets": synsets})
    return base


@pytest.mark.parametrize("devkit", [False, True])
def test_imagenet_has_its_labels_from_kaggle_and_from_the_devkit(tmp_path, capsys, devkit):
    folder = make_imagenet(tmp_path, devkit)
    train, val = [build_dataset(folder, split, View(8)) for split in ("train", "val")]
    assert train.classes == val.classes == ["n01440764", "n01443537", "n01484850"]
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and val.labels.tolist() == [1, 0, 2, 2]
    assert (train.part, val.part) == ("train", "val")
    assert build_dataset(folder / "val", "val", View(8)).labels.tolist() == [1, 0, 2, 2]
    (tmp_path / "link").symlink_to(folder / "val")
    assert build_dataset(tmp_path / "link", "val", View(8)).labels.tolist() == [1, 0, 2, 2]
    for name in ("LOC_val_solution.csv", "ILSVRC2012_devkit_t12/data/meta.mat"):
        if (tmp_path / name).exists():
            (tmp_path / name).write_bytes(b"\xff")
            refuse(f"{name[-8:]} is damaged", folder, "val", View(8))
        (tmp_path / name).unlink(missing_ok=True)
    assert build_dataset(folder, "val", View(8)).classes == []
    assert "has no labels: where they are needed" in capsys.readouterr().out


@pytest.mark.parametrize("labels, classes, expected", [
    ([2, 0, 2], ["0", "1", "2"], [2, 0, 2]), (None, [], [0, 0, 0])])
def test_edm_and_stylegan_write_labels_into_a_json(tmp_path, labels, classes, expected):
    names = [f"0000{i}/img0000000{i}.png" for i in range(3)]
    known = labels and [[name, label] for name, label in zip(names, labels)]
    unpack(tmp_path / "set", *names)
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": known}))
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in [*names, "dataset.json"]:
            file.write(tmp_path / "set" / name, name)
        file.writestr("__MACOSX/x.png", b"")
    folder, packed = [build_dataset(tmp_path / name, "train", View(8)) for name in ("set", "set.zip")]
    assert folder.classes == packed.classes == classes
    assert folder.labels.tolist() == packed.labels.tolist() == expected
    assert all(torch.equal(folder[i][0], packed[i][0]) for i in range(3))
    if labels:
        known[0][1] = 10 ** 12
        (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": known}))
        refuse("label 1000000000000, .* from 0 to 999999", tmp_path / "set", "train", View(8))
        (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": known[1:]}))
        refuse("no label for 1 images, such as 00000/img00000000.png", tmp_path / "set", "train", View(8))
    for text in ("[]", '{"labels": [["x", 1e999]]}'):
        (tmp_path / "set" / "dataset.json").write_text(text)
        refuse("no list of labels", tmp_path / "set", "train", View(8))


@pytest.mark.parametrize("pattern", ["s-*.tar", "s-{a,b}.tar", "{s,t}-*.tar", "s-[ab].tar"])
def test_shards_come_by_any_pattern_of_the_shell(tmp_path, pattern):
    for number, name in enumerate("ab"):
        with tarfile.open(tmp_path / f"s-{name}.tar", "w") as tar:
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(picture(number))
            tar.addfile(info, io.BytesIO(picture(number)))
    dataset = build_dataset(f"{tmp_path}/{pattern}", "train", View(8))
    assert [path[-5:] for path in dataset.paths] == ["a.png", "b.png"]
    refuse("no file has such a name", f"{tmp_path}/t-*.tar", "train", View(8))
    tarfile.open(tmp_path / "t-0.TAR", "w").close()
    refuse("holds no images", f"{tmp_path}/t-0.TAR", "train", View(8))


# ---- refused, with the way out -----------------------------------------------------------------------------

@pytest.mark.parametrize("names, way_out", [
    (["ILSVRC/Data/CLS-LOC/{train/n01440764,val,test}/0.JPEG", "ILSVRC/Annotations/x.xml"],
     "give {}/ILSVRC/Data/CLS-LOC,"),
    (["img_align_celeba/img_align_celeba/{0..3}.jpg", "list.csv"],
     "give {}/img_align_celeba/img_align_celeba, or"),
    (["images/{001.Albatross,002.Auklet}/0.jpg", "attributes/x.txt"], "give {}/images, or"),
    (["pets/{cat,dog}/0.jpg"], "give {}/pets, or"), (["cats/0.jpg"], "classes:{} .*or unlabelled:{} "),
    (["images1024x1024/{00000,01000}/0.png", "thumbnails/{00000,01000}/0.png"], "deeper.*unlabelled:{} "),
    (["tiny/{train/{n1,n2}/images,val/images,test/images}/0.JPEG"], "give {}/tiny, or"),
    (["{train,val}/{n1,n2}/images/0.JPEG"], "deeper than a class.* classes:{} "),
    (["{a/abbey,a/airfield,z/zoo}/0.jpg"], "a/abbey lies deeper.*classes:{} .*unlabelled:{} "),
    (["{00000,01000,69000}/0.png"], "00000, 01000, .. in {} look like parts of one heap.*unlabelled:{} "),
    (["train2017/0.jpg", "val2017/0.jpg", "annotations/x.json"], "such as {}/val2017"),
    (["{trainA,trainB,testA,testB}/0.jpg"], "such as {}/trainB"), (["{trainset,testset}/0.png"], "/trainset"),
    (["{JPEGImages,SegmentationClass}/2007_000032.png"], "give {}/JPEGImages, or .* classes:{} "),
    (["{imagesTr,labelsTr}/0.png"], "give {}/imagesTr, or"), (["{depth,rgb}/0.png"], "give {}/rgb, or"),
    (["{images,annotations}/{training,validation}/ADE_1.png"], "give {}/images, or"),
    (["train/images/0.jpg", "valid/images/0.jpg"], "give {}/train/images, or"),
    (["val/{a,b}/0.jpg", "valid/{a,b}/0.jpg"], "val, valid, of which two are the same part"),
    (["{ILSVRC2012_img_train,ILSVRC2012_img_val}.tar"], "mkdir train .*for f in n"),
    (["{n01440764,n01443537}.tar"], "one for each class .*: in their folder, for f in n"),
    (["shards/{0..3}.tar"], "'{}/shards/\\*.tar'"), (["data/train-0-of-2.parquet"], "parquet.*README"),
    (["data-00000-of-00001.arrow", "dataset_info.json"], "save_to_disk.*README"),
    (["data.mdb", "lock.mdb"], "an LMDB"), (["data_batch_{1..5}", "test_batch"], "torchvision:CIFAR10"),
    (["x.npz"], "arrays of numpy.*fromarray"), (["x.npy"], "arrays"), (["x.zip"], "unpack it"),
    (["x.tar.gz"], "unpack them"), (["x.tfrecord-0-of-8"], "records"),
    (["train-images-idx3-ubyte.gz"], "torchvision:MNIST"), (["a/x.mp4"], "but videos .x.mp4.*--frames")])
def test_what_is_no_list_of_classes_is_refused_with_the_folder_to_give(tmp_path, names, way_out):
    unpack(tmp_path, *names)
    refuse(way_out.format(tmp_path, tmp_path), tmp_path, "train", View(8))


@pytest.mark.parametrize("name, way_out", [
    ("x.parquet", "README"), ("x.npz", "fromarray"), ("x.zip", "unpack"), ("x.tgz", "unpack"),
    ("x.png", "single file")])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, name, way_out):
    unpack(tmp_path, name)
    refuse(f"^--data-path.*{way_out}", tmp_path / name, "val", View(8))
    args = types.SimpleNamespace(data_path="generated", val_data_path=tmp_path / name, val_split_list=None)
    refused(f"^--val-data-path.*{way_out}", sources.build_held_out, args, View(8))


def test_the_tar_of_tars_names_the_commands_and_these_work(tmp_path):
    inner = unpack(tmp_path, "n01440764/{0..1}.JPEG", "n01443537/2.JPEG")
    for name in ("n01440764", "n01443537"):
        subprocess.run(f"tar -cf {name}.tar -C {name} . && rm -r {name}", shell=True, cwd=inner, check=True)
    subprocess.run("tar -cf all.tar n*.tar && rm n*.tar", shell=True, cwd=inner, check=True)
    refuse("holds tar files", tmp_path / "all.tar", "train", View(8))
    subprocess.run(layouts.UNTAR_ALL.replace(" it ", " all.tar "), shell=True, cwd=tmp_path, check=True)
    dataset = build_dataset(tmp_path, "train", View(8))
    assert dataset.classes == ["n01440764", "n01443537"] and dataset.labels.tolist() == [0, 0, 1]


# ---- clips -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names, classes", [
    (["{a/x,a/y,b/z}/img_{1..12}.jpg"], ["a", "b"]), (["{clip1,clip2,clip3}/{0..11}.png"], []),
    (["train/{a/x,a/y,b/z}/frame{000001..000012}.png", "val/a/v/{1..12}.png"], ["a", "b"])])
def test_folders_of_numbered_pictures_are_clips(tmp_path, capsys, names, classes):
    dataset = build_dataset(unpack(tmp_path, *names), "train", View(8, 5, frame_stride=2))
    assert len(dataset) == 3 and dataset.classes == classes
    assert "3 folders of numbered pictures are read as clips" in capsys.readouterr().out
    assert data.sizes_of_files(dataset, range(3)) == []     # each disk has its own of a folder
    levels = dataset[0][0][0, :, 0, 0].int()                # 12 frames, of which 9 in the middle are spanned
    assert levels.tolist() == [2, 4, 6, 8, 10]              # so 10 comes after 9, not after 1
    refuse("no clip, which is a folder of numbered",
           unpack(tmp_path / "no", "a/{x,y}.jpg"), "train", View(8, 5))


@pytest.mark.parametrize("suffix", ["webp", "png", "gif"])
def test_moving_images_are_clips_and_no_images(tmp_path, capfd, suffix):
    for name in "ab":
        (tmp_path / f"{name}.{suffix}").write_bytes(picture(10, suffix, 7))
    dataset = build_dataset(tmp_path, "train", View(8, 7))
    assert dataset[0][0][0, :, 0, 0].tolist() == [10, 30, 50, 70, 90, 110, 130] and len(dataset) == 2
    images = build_dataset(tmp_path, "train", View(8))
    assert images[0] is None
    refused("2 of the 2 images of .* are broken|1 of the 2", images.raise_if_broken)
    assert "it moves, in 7 frames" in capfd.readouterr().err


@pytest.mark.parametrize("suffix", pictures.VIDEO_FORMATS)
@pytest.mark.parametrize("levels", [[9] * 9, [9, 9, 90, 90, 90, 9, 9, 9, 9], [0] * 4 + [50] * 5])
def test_equal_frames_that_are_written_come_back(tmp_path, suffix, levels):
    frames = np.array(levels, np.uint8)[:, None, None, None] + np.zeros((9, 16, 16, 3), np.uint8)
    pictures.write_video(tmp_path / f"a{suffix}", frames, 24)
    back = [np.asarray(frame()).mean() for frame in reading.video_frames(tmp_path / f"a{suffix}")]
    assert np.abs(np.array(back) - levels).max() < 3
    assert abs(reading.frame_rate(tmp_path / f"a{suffix}") - 24) < 0.3


def make_avi(path, shown, slots):
    """An AVI of `shown` frames in so many slots of time, as of a source with a varying frame rate."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", 25, width=64, height=64, pix_fmt="yuv420p")
        for i in range(shown):
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(noise)
            frame.pts = i * slots // shown
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def test_an_avi_with_empty_slots_is_whole_and_a_cut_one_is_not(tmp_path):
    make_avi(tmp_path / "a.avi", 27, 40)
    with av.open(str(tmp_path / "a.avi")) as file:
        assert file.streams.video[0].frames > 27            # what its header counts
    assert len(list(reading.video_frames(tmp_path / "a.avi"))) == 27
    whole = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(whole[:len(whole) // 2])
    refused("truncated", list, reading.video_frames(tmp_path / "a.avi"), kind=ValueError)


def test_the_first_picture_does_not_decide_what_all_are(tmp_path):
    unpack(tmp_path, "{a,b}/{x,y}/{1..9}.png", "b/z/1.png")
    assert len(build_dataset(tmp_path, "train", View(8, 5))) == 5         # one of them is too short
    (tmp_path / "moving" / "a").mkdir(parents=True)
    for number in range(5):
        (tmp_path / "moving" / "a" / f"{number}.webp").write_bytes(picture(10, "webp", 7) if number else b"")
    assert len(build_dataset(f"classes:{tmp_path / 'moving'}", "train", View(8, 5))) == 5


def test_clips_that_are_too_short_are_counted_apart(tmp_path, capfd):
    unpack(tmp_path, "{0..3}/{1..9}.png")
    dataset = build_dataset(tmp_path, "train", View(8, 5, frame_stride=4))
    assert dataset[0] is None and "short clip skipped" in capfd.readouterr().err
    refused("1 of the 4 clips of .* are too short, .*lower --frames or ", dataset.raise_if_broken)


def test_a_phones_clip_is_turned_where_that_is_asked(tmp_path):
    darker_above = np.linspace(0, 255, 64).astype(np.uint8)[:, None, None]
    pictures.write_video(tmp_path / "a.mp4", np.broadcast_to(darker_above, (9, 64, 96, 3)))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44                       # of the track's header: a quarter turn clockwise
    data[matrix:matrix + 36] = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "b.mp4").write_bytes(data)
    plain, turned = [next(reading.video_frames(tmp_path / "b.mp4", upright))() for upright in (False, True)]
    assert plain.size == (96, 64) and turned.size == (64, 96)
    assert np.asarray(turned)[:, 55].mean() < np.asarray(turned)[:, 8].mean() - 100       # above is right


def test_video_that_says_bt709_has_its_colours(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", 25, width=64, height=64, pix_fmt="yuv420p", options={"crf": "0"})
        stream.codec_context.colorspace = 1                 # ITU-R BT.709
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (200, 30, 40), np.uint8))
            file.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        file.mux(stream.encode())
    colour = np.asarray(next(reading.video_frames(tmp_path / "a.mp4"))())[32, 32]
    assert np.abs(colour.astype(int) - (200, 30, 40)).max() <= 3


def test_official_loaders_drop_what_is_transparent(tmp_path):
    Image.new("RGBA", (20, 20), (200, 100, 50, 128)).save(tmp_path / "a.png")
    white, official = [build_dataset(tmp_path, "val", View(8, drop_alpha=drop))[0][0][:, 0, 0].tolist()
                       for drop in (False, True)]
    assert official == [200, 100, 50] and np.abs(np.array(white) - (227, 177, 152)).max() <= 1
