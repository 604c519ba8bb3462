"""evaluate.py as people use it: its commands on tiny data, on several ranks, with right and wrong input."""
import functools
import json
import math
import pathlib
import shlex
import shutil
import tracemalloc
import urllib.error
import zipfile

import helpers
import numpy as np
import pytest
import torch
from helpers import ROOT, refused, run_script
from PIL import Image

import ar_model
import evaluate
import sample
from support import checkpoints, data, metrics, pictures, runtime, sets, sources

RANDOM = ("--allow-random-weights", "--batch-size", "4")
LABEL = checkpoints.RANDOM_LABEL
call = functools.partial(helpers.call, evaluate)


def results(folder="runs/evaluation"):
    """The JSON files in `folder`, oldest first."""
    paths = sorted(pathlib.Path(folder).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]


def values(result):
    """{metric: value} of one JSON."""
    return {name: entry["value"] for name, entry in result["metrics"].items()}


def measured_on(result, metric):
    """What a JSON says that a metric was measured on."""
    return result["metrics"][metric]["measured_on"]


def reconstruct(ckpt, *flags):
    """Judge a tokenizer; the JSON."""
    call("reconstruction", "--ckpt", ckpt, *flags)
    return results()[-1]


def generate(samples, *flags):
    """Judge samples, with random networks; the JSON."""
    call("generation", "--samples", samples, *flags, *RANDOM)
    return results()[-1]


def write_samples(path, count=8, shape=(32, 32), seed=0):
    """An npz file in ADM's format with random images or clips."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape, 3), dtype=np.uint8)
    np.savez(path, pixels)
    return pixels


def write_images(folder, count, size=(20, 20)):
    """PNG files of different reds."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (10 * i, 0, 0)).save(f"{folder}/{i:02}.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of untrained tokenizers of images and of clips, and of a transformer for each."""
    folder = tmp_path_factory.mktemp("files")
    ar, images = helpers.save_pair(folder / "images")
    clips_ar, clips = helpers.save_pair(folder / "clips", clips=True)
    return {"images": images, "clips": clips, "ar": ar, "clips_ar": clips_ar}


class Quick(torch.nn.Module):
    """Random features of the right sizes in milliseconds, for tests of what surrounds a network.

    Sample by sample: on some CPUs a row of a matrix product depends in its last bit on where it stands."""

    def __init__(self, eps=None):
        super().__init__()
        self.layer = torch.nn.Linear(*((1587, 5079) if eps is None else (2304, 400)))

    def forward(self, x):
        """x (B, 3, 299, 299) to features, spatial features and logits; (B, 3, 9, 224, 224) to features."""
        thinned = x[..., ::13, ::13] if x.dim() == 4 else x[:, :, ::4, ::14, ::14]
        rows = torch.stack([self.layer(row).relu() for row in thinned.flatten(1)])
        return rows.split([2048, 2023, 1008], 1) if x.dim() == 4 else rows


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, and stand-ins for Inception and I3D."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "FIDInception", Quick)
    monkeypatch.setattr(metrics, "I3D", Quick)
    return tmp_path


# ---- the numbers, and what must not change them ------------------------------------------------------------

def expected_frechet(x, y):
    """The distance of features (N, D), (M, D) in plain numpy."""
    return metrics.frechet_distance(*[array for f in (x, y) for array in (f.double().numpy().mean(0),
                                                                         np.cov(f.double().numpy().T))])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "clips"])
@pytest.mark.parametrize("protocol", ["clean", "official"])
def test_metrics_are_those_of_frames_features_and_ids(files, place, kind, protocol):
    clips = kind == "clips"
    official = protocol == "official"
    distance = "rfvd" if clips else "rfid"
    reference = torch.from_numpy(write_samples("reference.npz", 6)).movedim(-1, 1)
    more = () if clips else ("--reference", "reference.npz")
    result = reconstruct(files[kind], "--num-samples", 6, "--metrics", "psnr", "ssim", "usage", distance,
                         "--protocol", protocol, "--split", "val", "--image-size", 32, *RANDOM[:-1], 6, *more)
    model, _ = checkpoints.load_tokenizer(files[kind])
    view = data.View(32, 9 if clips else None, "random" if official and clips else "center")
    dataset = sources.build_dataset(None, "val", view)
    order = list(range(1000))
    if official and clips:                                             # all 1,000, and all of them again
        order += np.random.default_rng(0).permutation(1000).tolist()
    x = pictures.to_float(torch.stack([dataset[order[k]][0] for k in data.evenly_spaced(6, len(order))]))
    with torch.no_grad():
        ids = model.encode(x)
        y = model.decode(ids).clamp(-1, 1)
    real, made = [pictures.to_uint8(each, truncate=official) for each in (x, y)]
    each = metrics.psnr(metrics.as_frames(real), metrics.as_frames(made)).view(6, -1).mean(1)
    if official and not clips:                                         # means over batches of four
        each = torch.stack([each[:4].mean(), each[4:].mean()])
    measured = values(result)
    assert measured["psnr"] == pytest.approx(each.mean().item(), abs=1e-6) and 0 < measured["ssim"] < 1
    network = metrics.randomise(Quick(1e-3 if clips else None))
    with torch.no_grad():
        if clips:
            features = [network(metrics.i3d_input(each)) for each in (real, made)]
        else:
            pair = [(x + 1) / 2, (y + 1) / 2] if official else [real, made]
            features = [network(metrics.inception_input(each, "half-pixel"))[0] for each in pair]
            both = [network(metrics.inception_input(each, "tf1"))[0] for each in (reference, made)]
            assert measured["rfid-reference"] == pytest.approx(expected_frechet(*both), rel=1e-5)
            assert "tf1" in measured_on(result, "rfid-reference")
    assert measured[distance] == pytest.approx(expected_frechet(*features), rel=1e-5)
    assert measured["usage"] == len(ids.unique()) / 64
    assert f"{ids.numel()} tokens, a codebook of 64, 6 {kind} of generated, val split" in measured_on(
        result, "usage")
    assert measured["bits_per_pixel"] == pytest.approx(6 * ids[0].numel() / x[0, 0].numel())
    assert result["metrics"][distance]["label"] == LABEL and result["metrics"]["psnr"]["label"] == ""
    assert result["n"] == 6 and ("truncated" in measured_on(result, "psnr")) == official
    if clips and official:
        assert measured["rfvd-float32"] == pytest.approx(measured["rfvd"], rel=0.05)
    assert Image.open(next(pathlib.Path("runs/evaluation").glob("*.png"))).size[0] > 96 * 6


RANKS = """
import sys
import evaluate
from support import metrics
from test_evaluate import Quick

def call(flags):
    evaluate.main(evaluate.get_args((flags + " --allow-random-weights --batch-size 2 --output out").split()))

images, clips, ar, _ = sys.argv[1:]
metrics.FIDInception = metrics.I3D = Quick
call(f"reconstruction --ckpt {images} --num-samples 5 --image-size 32 --metrics rfid lpips-alex")
call("generation --samples samples.npz --reference reference.npz")
call(f"generation --samples samples.npz --metrics tokens mind --ckpt {ar}")
call(f"generation --ckpt {ar} --num-samples 9 --reference reference16.npz")
call(f"reconstruction --ckpt {clips} --num-samples 5 --metrics psnr usage rfvd --protocol official")
call("generation --samples clips.npz --metrics fvd")
"""


@pytest.mark.slow
def test_one_and_three_ranks_measure_the_same(files, place):
    runs = []
    for ranks in (1, 3):
        folder = place / str(ranks)
        folder.mkdir()
        write_samples(folder / "samples.npz", 5, seed=1)
        write_samples(folder / "reference.npz", 7, seed=2)
        write_samples(folder / "reference16.npz", 10, (16, 16))
        write_samples(folder / "clips.npz", 5, (9, 32, 32))
        (folder / "job.py").write_text(RANKS)
        run_script(str(folder / "job.py"), *files.values(), ranks=ranks, cwd=folder)
        runs.append(results(folder / "out"))
    for name, alone, shared in zip(("rfid", "fid", "tokens", "kid", "rfvd", "fvd"), *runs, strict=True):
        assert values(alone)[name] > 0 and shared["n"] == alone["n"]
        assert values(shared) == pytest.approx(values(alone), rel=1e-12, abs=1e-12)


@pytest.mark.slow
def test_originals_statistics_are_reused_and_references_are_of_the_same_size(files, place, monkeypatch):
    seen = []
    forward = Quick.forward
    monkeypatch.setattr(Quick, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    flags = (files["images"], "--num-samples", 4, "--metrics", "rfid", *RANDOM)
    before, after = [reconstruct(*flags) for _ in range(2)]
    assert seen == [4, 4, 4] and values(after) == values(before)
    assert len(results()) == 1                                         # the same run has the same file
    assert len(list(pathlib.Path("runs/evaluation/references").glob("*.npz"))) == 1
    for size in (16, 32):
        call("make-reference", "--image-size", size, "--split", "val", "--num-samples", 5, "--reference",
             f"{size}.npz", *RANDOM)
    again = values(reconstruct(*flags, "--reference", "16.npz"))
    assert again["rfid"] == values(before)["rfid"] != again["rfid-reference"] > 0
    for more, words in ((("--original-resolution",), "--reference is for images of one size"),
                        ((), "32.npz is of images of .32, 32., not .16, 16.")):
        refused(words, reconstruct, *flags, *more, "--reference", "32.npz")


@pytest.mark.parametrize("trained, more, part, resize", [
    ("flat", (), "training images", 24), ("own", (), "val split", 24),
    ("own", ("--split", "train"), "training images", 24),
    ("own", ("--data-path", "own/train"), "training images", None),
    ("own", ("--data-path", "copy"), "training images", None),
    ("own/val", ("--data-path", "own"), "training images", None),
    ("own", ("--data-path", "flat"), "not parted, not the training set as a whole", None),
    ("gone", ("--data-path", "flat"), "not parted, which the model may have seen", None),
    (None, ("--data-path", "flat"), "not parted, which the model may have seen", None),
    ("generated", (), "val split", 24), ("generated", ("--split", "train"), "training images", 24)])
def test_default_data_are_what_was_learned_if_possible_held_out(files, place, capsys, trained, more, part,
                                                                resize):
    counts = {"flat": 3, "own/val": 2, "own/train": 4, "copy": 4}      # a copy is known by what is in it
    for folder, count in counts.items():
        write_images(folder, count)
    args = {"data_path": trained, "resize": 24}
    torch.save({**torch.load(files["images"]), "args": args}, "trained.pt")
    result = reconstruct("trained.pt", "--metrics", "psnr", "--num-samples", 5, *more)
    path = more[1] if "--data-path" in more else trained
    split = "train" if "--split" in more else "val"
    assert result["n"] == counts.get(path, counts.get(f"{path}/{split}", 5)) and result["part"] == part
    assert result["data"]["path"] == path and result["data"]["resize"] == resize
    assert f", {part}, size 16" in capsys.readouterr().out


def test_data_that_have_moved_are_said_to_be_those_of_training(files, place):
    torch.save({**torch.load(files["images"]), "args": {"data_path": "gone"}}, "trained.pt")
    refused("gone does not exist.* the model was trained on: say with --data-path", reconstruct, "trained.pt")


def test_the_grid_shows_samples_from_all_over_the_set(files, place):
    write_images("photos", 20)
    reconstruct(files["images"], "--data-path", "photos", "--metrics", "psnr")
    grid = np.asarray(Image.open(next(pathlib.Path("runs/evaluation").glob("*.png"))))
    assert grid[50, 50::98, 0].tolist() == [10 * k for k in data.evenly_spaced(8, 20)]      # tiles of 96 + 2


@pytest.mark.parametrize("protocol, multiple", [("clean", 8), ("official", 16)])
def test_original_resolution_pads_with_grey_and_crops_back(files, place, monkeypatch, protocol, multiple):
    sizes = ((40, 33), (32, 48), (17, 21))
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{i}.png")
    model, info = checkpoints.load_tokenizer(files["images"])
    seen = []

    def encode(x):
        seen.append(x)
        return torch.zeros(1, x.shape[2] // 8, x.shape[3] // 8, dtype=torch.long)
    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model, "decode", lambda ids: seen[-1])
    monkeypatch.setattr(checkpoints, "load_tokenizer", lambda *more: (model, info))
    result = reconstruct("x.pt", "--original-resolution", "--protocol", protocol, "--data-path", ".")
    padded = [tuple(math.ceil(side / multiple) * multiple for side in size) for size in sizes]
    assert [tuple(x.shape[2:]) for x in seen] == padded
    border = torch.ones(padded[0])
    border[(padded[0][0] - 40) // 2:, (padded[0][1] - 33) // 2:][:40, :33] = 0
    assert border.any() and not (seen[0] * border).any()
    tokens = sum(height * width // 64 for height, width in padded)
    assert values(result)["ssim"] == 1 and f"{tokens} tokens" in measured_on(result, "usage")
    assert values(result)["bits_per_pixel"] == pytest.approx(6 * tokens / (1320 + 1536 + 357))
    text = next(pathlib.Path("runs/evaluation").glob("*.json")).read_text()           # infinity is valid JSON
    assert json.loads(text, parse_constant=pytest.fail)["metrics"]["psnr"]["value"] == "inf"


# ---- what is measured: defaults, files, drawing ------------------------------------------------------------

@pytest.mark.slow
def test_without_flags_it_judges_what_training_left(files, place, capsys):
    pathlib.Path("runs/tokenizer").mkdir(parents=True)
    shutil.copy(files["images"], "runs/tokenizer/step-00000003.pt")
    evaluate.main(evaluate.get_args([]))
    result, = results()
    assert values(result).keys() == {"psnr", "ssim", "usage", "perplexity", "bits_per_pixel"}
    assert "left out lpips-vgg, lpips-alex, rfid; add --metrics all" in capsys.readouterr().out
    assert result["n"] == 1000 and result["data"]["name"] == "generated" and result["protocol"] == "clean"
    model, _ = checkpoints.load_tokenizer(files["images"])
    assert result["checkpoint"]["sha256"] == checkpoints.weights_hash(model)
    assert result["checkpoint"]["step"] == 3
    assert {"date", "arguments", "versions", "resize_rule", "networks"} <= result.keys()


def write_clips(folder, counts):
    """Animations of 9 frames, of one class, in each split."""
    for split, count in counts.items():
        for i in range(count):
            frames = np.random.default_rng(i).integers(0, 256, (9, 36, 40, 3), dtype=np.uint8)
            pictures.write_video(folder / split / "wave" / f"{i:03}.gif", frames)
    return folder


@pytest.mark.slow
def test_official_clips_are_10000_of_the_training_split(files, place, monkeypatch):
    write_clips(place / "clips", {"train": 5, "test": 3})
    clean, official = [reconstruct(files["clips"], "--data-path", "classes:clips", "--metrics", "psnr",
                                   "--protocol", protocol) for protocol in ("clean", "official")]
    assert (clean["n"], clean["data"]["crop"]) == (3, "center")
    assert (official["n"], official["data"]["crop"]) == (10, "random")                 # five clips twice
    assert official["data"]["split"] == "train" and values(clean) != values(official)
    args = evaluate.get_args(["reconstruction", "--protocol", "official", "--data-path", "generated"])
    monkeypatch.setattr(data, "fingerprint", lambda *more: "")
    build = sources.build_dataset
    config = checkpoints.load_tokenizer(files["clips"])[0].config
    for length, twice in ((9_537, 463), (20_000, 0)):                  # UCF-101's; a larger one
        monkeypatch.setattr(sources, "build_dataset", lambda *more: build(*more, length=length))
        order = evaluate.held_out(args, config, evaluate.NOTHING).order
        assert len(order) == 10_000 and len(set(order)) == 10_000 - twice


def test_a_broken_sample_is_left_out_and_counted(files, place, capfd):
    folder = write_clips(place / "clips", {"test": 1}) / "test" / "wave"
    chosen = data.evenly_spaced(6, 120)
    for i in range(120):
        content = b"GIF89a, cut" if i == chosen[2] else (folder / "000.gif").read_bytes()
        (folder / f"{i:03d}.gif").write_bytes(content)
    first, second = [reconstruct(files["clips"], "--data-path", "classes:clips", "--batch-size", size,
                                 "--metrics", "psnr", "usage", "--num-samples", 6) for size in (2, 3)]
    assert (first["n"], first["data"]["n"]) == (5, 6) and "broken clip skipped" in capfd.readouterr().err
    # Convolutions of another batch size add in another order, which may tip a pixel to the next level.
    assert values(first) == pytest.approx(values(second), rel=1e-6)
    for i in chosen[:2]:
        (folder / f"{i:03d}.gif").write_bytes(b"GIF89a, cut")
    refused("more than 1 %", reconstruct, files["clips"], "--data-path", "classes:clips", "--metrics",
            "psnr")


def test_tokens_tell_apart_without_a_network_and_say_what_real_ones_have(files, place, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    monkeypatch.setattr(metrics, "FIDInception", None)
    dataset = sources.build_dataset(None, "train", data.View(16))
    made = {"good": torch.stack([dataset[i][0] for i in range(60)]).movedim(1, -1),
            "bad": torch.zeros(60, 16, 16, 3, dtype=torch.uint8)}
    for name, samples in made.items():
        np.savez(f"{name}.npz", samples)
        record = {"checkpoint": {"path": str(files["ar"]), "preset": "custom"}}
        pathlib.Path(f"{name}.json").write_text(json.dumps(record))
        call("generation", "--samples", f"{name}.npz", "--metrics", "tokens")
    good, bad = results()
    assert good["metrics"].keys() == {"tokens", "tokens-real"} and good["networks"] == {}
    assert values(good)["tokens"] < 1.5 * values(good)["tokens-real"] < 0.5 * values(bad)["tokens"]
    _, model, _ = checkpoints.load_ar(files["ar"])
    chosen = np.random.default_rng(0).permutation(len(dataset))[:120]
    real = torch.stack([dataset[i][0] for i in chosen])
    with torch.no_grad():
        p, q, r = [model.encode(pictures.to_float(x)).flatten().bincount(minlength=64) / (60 * 4)
                   for x in (made["bad"].movedim(-1, 1), real[:60], real[60:])]
    assert values(bad) == pytest.approx({"tokens": float((p - q).abs().sum()) / 2,
                                         "tokens-real": float((r - q).abs().sum()) / 2}, rel=1e-5)
    assert "60 samples, as many images of generated, train split" in measured_on(bad, "tokens")
    np.savez("few.npz", real[:21].movedim(1, -1))                      # 10 and 10 real ones
    call("generation", "--samples", "bad.npz", "--metrics", "tokens", "--reference", "few.npz")
    assert "10 samples, as many in few.npz" in measured_on(results()[-1], "tokens")


def test_tokens_of_clips_and_of_unnamed_models(files, place):
    write_samples("clips.npz", 4, (9, 16, 16))
    flags = ("clips.npz", "--metrics", "tokens")
    refused("no AR model", generate, *flags)
    refused("image|clip", generate, *flags, "--ckpt", files["ar"], kind=ValueError)
    assert 0 < values(generate(*flags, "--ckpt", files["clips_ar"]))["tokens"] <= 1
    assert values(generate("clips.npz", "--metrics", "all")).keys() == {"fvd"}         # needs no model


@pytest.mark.slow
def test_any_path_can_be_measured(files, place, monkeypatch):
    long = "a" * 240
    for folder in ("here", long, "späße & co"):
        write_images(folder, 4)
    for folder in (long, "späße & co", "here/."):
        generate(folder, "--metrics", "fid")
    monkeypatch.chdir("here")
    generate(".", "--metrics", "fid")
    reconstruct(files["images"], "--data-path", ".", "--metrics", "psnr")
    assert len(results()) == 2 and len(results("../runs/evaluation")) == 3
    assert "generation-here-" in str(list(pathlib.Path("runs/evaluation").glob("*.json")))


@pytest.mark.slow
def test_samples_are_at_distance_0_from_themselves_in_whatever_file_they_are(place, capsys):
    pixels = write_samples("same.npz", 6)
    result = generate("same.npz", "--reference", "same.npz")
    measured = values(result)
    assert 0 <= measured["fid"] < 1e-9 and 0 <= measured["sfid"] < 1e-9 and measured["mind"] < 1e-9
    assert measured["kid"] < 0                    # unbiased: an image does not count as its own neighbour
    assert measured["precision"] == measured["recall"] == 1 and measured["inception_score"] >= 1
    assert {entry["label"] for entry in result["metrics"].values()} == {LABEL}
    printed = capsys.readouterr().out
    assert "of 50,000 samples, these are of 6" in printed and "biased upwards" in printed and LABEL in printed
    np.savez_compressed("packed.npz", arr_0=pixels)
    pathlib.Path("folder").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"folder/{i}.png")
    for path in ("packed.npz", "folder"):
        assert values(generate(path, "--reference", "same.npz")) == measured
    for asked in (("fid",), ("sfid", "recall"), ("precision", "kid"), ("mind",), ("inception_score",)):
        alone = values(generate("same.npz", "--reference", "same.npz", "--metrics", *asked))
        assert alone == {key: measured[key] for key in asked}
    write_samples("other.npz", 5, seed=1)
    result = generate("same.npz", "--reference", "other.npz", "--protocol", "official")
    assert "6 samples are compared with 5 real ones" in capsys.readouterr().out
    assert "fp16" in measured_on(result, "recall")


@pytest.mark.slow
def test_a_reference_is_made_once_and_has_adms_format(place, monkeypatch):
    flags = ("make-reference", "--image-size", 32, "--split", "val", *RANDOM, "--num-samples")
    call(*flags, 5)
    path, = pathlib.Path("runs/evaluation/references").glob("*.npz")
    written = path.stat().st_mtime_ns
    call(*flags, 5)
    assert path.stat().st_mtime_ns == written
    with np.load(path) as file:
        arrays = dict(file)
    assert arrays["arr_0"].shape == (5, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["mu"].shape == (2048,) and arrays["sigma_s"].shape == (2023, 2023) and arrays["n"] == 5
    # The same images as samples: at distance 0 from the statistics, and from those made of arr_0.
    np.savez("plain.npz", arrays["arr_0"])
    for reference in (path, "plain.npz"):
        assert abs(values(generate("plain.npz", "--reference", reference))["fid"]) < 1e-9
    call(*flags, 4, "--reference", "own.npz")
    refused("own.npz exists.*n: 4 there, 5 here", call, *flags, 5, "--reference", "own.npz")
    load = checkpoints.load_network
    monkeypatch.setattr(checkpoints, "load_network", lambda *more: (load(*more)[0], "6726825d"))
    refused("other Inception weights", generate, "plain.npz", "--reference", "own.npz")
    mean = np.full(2048, 1e3)                     # with real weights, statistics that ADM stores count
    np.savez("adm.npz", **{key: arrays[key] for key in ("arr_0", "sigma", "mu_s", "sigma_s")}, mu=mean)
    measured = values(generate("plain.npz", "--reference", "adm.npz"))
    assert measured["fid"] > 1e8 and measured["precision"] == 1


def test_fvd_is_the_distance_from_as_many_real_clips(place):
    drawn = write_samples("runs-clips.npz", 7, (9, 32, 32))
    pathlib.Path("runs-clips.json").write_text('{"cfg_scale": 2}')
    result = generate("runs-clips.npz", "--protocol", "official")
    dataset = sources.build_dataset(None, "train", data.View(32, 9))
    real = torch.stack([dataset[k][0] for k in data.evenly_spaced(7, 10_000)])
    with torch.no_grad():
        features = [metrics.randomise(Quick(1e-5))(metrics.i3d_input(clips))
                    for clips in (real, torch.from_numpy(drawn).movedim(-1, 1))]
    assert values(result)["fvd"] == pytest.approx(expected_frechet(*features), rel=1e-5)
    assert values(result)["fvd-float32"] == pytest.approx(values(result)["fvd"], rel=0.05)
    assert result["sampling"] == {"cfg_scale": 2} and result["reference"]["n"] == 7


@pytest.mark.slow
def test_samples_drawn_here_measure_like_those_of_sample(files, place):
    how = ("--ckpt", files["ar"], "--cfg-scale", 1.5, 3, "--top-k", 20, "--global-seed", 5)
    helpers.call(sample, *how, "--batch-size", 4, "--num-fid-samples", 10, "--output", "samples.npz")
    write_samples("reference.npz", 6, (16, 16))
    stored = generate("samples.npz", "--reference", "reference.npz", "--global-seed", 5)
    call("generation", *how, "--num-samples", 10, "--reference", "reference.npz", *RANDOM)    # not tokens
    drawn = results()[-1]
    assert values(drawn) == values(stored) and drawn["sampling"] == stored["sampling"]
    assert [setting["cfg_scale"] for setting in drawn["sampling"]["settings"]] == [1.5, 3]


@pytest.mark.slow
def test_without_flags_generation_draws_what_fits_the_training_set_and_downloads_nothing(
        files, place, monkeypatch, capsys):
    refused("no AR model .* in runs/ar", call, "generation")
    write_images("few", 5)
    stored = torch.load(files["ar"])
    pathlib.Path("runs/ar").mkdir(parents=True)
    torch.save({**stored, "args": {"data_path": "few"}}, "runs/ar/step-00000001.pt")
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    for _ in range(2):
        call("generation")
    call("generation", "--num-samples", 6, "--data-path", "generated")
    first, third = results()
    drawn = list(pathlib.Path("runs/samples").glob("*.npz"))
    assert values(first).keys() == {"tokens", "tokens-real"}
    assert (first["n"], third["n"], len(drawn)) == (5, 6, 2)
    assert first["reference"]["path"] == "few" and first["sampling"]["checkpoint"]["path"].endswith("01.pt")
    assert "as many images of few, training images" in measured_on(first, "tokens")
    assert "train split, not the training set as a whole" in measured_on(third, "tokens")
    assert "left out fid, sfid" in capsys.readouterr().out
    call("generation", "--samples", drawn[0], "--ckpt", "runs/ar")     # a folder: its newest checkpoint
    assert results()[-1]["reference"]["path"] == "few"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_sample_by_sample(place, save):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), np.uint8)
    save("large.npz", pixels)
    runtime.setup_process_group("cpu")
    samples = sets.Npz("large.npz")
    assert samples.axes == (64, 64) and len(samples) == 300 and samples.kind == "image"
    for order in (range(300), [7, 299, 0]):                            # backwards is slow, but right
        tracemalloc.start()
        for x, n, indices in sets.Chosen(samples, order, {}, 4, num_workers=2).batches(""):
            assert np.array_equal(x[:n].movedim(1, -1), pixels[indices]) and len(x) == 4
        assert len(order) < 300 or tracemalloc.get_traced_memory()[1] < pixels.nbytes / 4
        tracemalloc.stop()


# ---- mistakes, and tables ----------------------------------------------------------------------------------

def test_flags_without_a_command_are_those_of_reconstruction():
    flags = ["--num-samples", "3"]
    assert evaluate.get_args(flags) == evaluate.get_args(["reconstruction", *flags])


@pytest.mark.parametrize("kind, flags, words", [
    ("images", ("--data-path", "nowhere"), "--data-path nowhere"),
    ("images", ("--image-size", 18), "18.*multiple"),
    ("images", ("--metrics", "lpips-alex", *RANDOM, "--num-samples", 2), "lpips-alex needs 32 pixels"),
    ("images", ("--metrics", "rfvd"), "rfvd is not.*images; take psnr"),
    ("clips", ("--metrics", "rfid"), "--metrics rfid is not.*clips"),
    ("clips", ("--original-resolution",), "is for images"),
    ("images", ("--metrics", "rfid", "--weights-dir", "."),
     "pt_inception-2015-12-05-672.*OPEN_MAGVIT2_WEIGHTS.*--weights-dir")])
def test_wrong_flags_of_reconstruction_are_one_line(files, place, monkeypatch, kind, flags, words):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    refused(words, reconstruct, files[kind], *flags, kind=ValueError)


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory):
    """A folder of samples and references that have something wrong, each named after it, and good.npz."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, shape in {"first": (4, 3, 32, 32), "grey": (4, 32, 32), "few": (3, 32, 32, 3),
                        "good": (4, 32, 32, 3), "large": (4, 64, 64, 3), "short": (4, 8, 32, 32, 3),
                        "wide": (4, 9, 32, 40, 3), "clips": (4, 9, 32, 32, 3)}.items():
        np.savez(folder / f"{name}.npz", np.zeros(shape, np.uint8))
    good = np.zeros((4, 32, 32, 3), np.uint8)
    np.savez(folder / "float.npz", good.astype(np.float32))
    np.savez(folder / "named.npz", images=good)
    np.savez(folder / "foreign.npz", arr_0=good, settings=np.array(3))
    np.savez(folder / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "nan.npz", arr_0=good, mu=np.zeros(2048), sigma=np.full((2048, 2048), np.nan))
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:-200])
    for name, content in (("empty", b""), ("png", b"\x89PNG\r\n\x1a\n, cut"), ("gif", b"GIF89a, cut")):
        write_images(folder / name, 5)
        (folder / name / "3.png").write_bytes(content)
    np.savez(folder / "scalar.npz", np.uint8(3))
    with zipfile.ZipFile(folder / "header.npz", "w") as file:
        file.writestr("arr_0.npy", bytes(200))
    (folder / "hollow").mkdir()
    write_images(folder / "mixed", 4)
    Image.new("RGB", (20, 21)).save(folder / "mixed" / "4.png")
    return folder


@pytest.mark.parametrize("samples, flags, words", [
    ("float.npz", (), "float32.*uint8.*255"), ("first.npz", (), "H, W, 3.*transpose"),
    ("grey.npz", (), "4, 32, 32"), ("named.npz", (), "arr_0.*only images"),
    ("few.npz", (), "holds 3 samples.*four"),
    ("cut.npz", (), "cut.*truncated"), ("none.npz", (), "none.npz does not exist"),
    ("short.npz", (), "9 frames or more, not 8"), ("wide.npz", (), "make square ones"),
    ("mixed", (), "mixes the sizes.*20, 20.*21, 20"),
    *[(folder, (), f"{folder}/3.png is empty or no image") for folder in ("empty", "png", "gif")],
    ("good.npz", ("--reference", "none.npz"), "none.npz does not exist.*make-reference"),
    ("good.npz", ("--reference", "empty"), "empty is a folder.*make-reference"),
    ("scalar.npz", (), "arr_0 is uint8 .0.; make it"), ("header.npz", (), "header of arr_0 is damaged"),
    ("hollow", (), "^--samples hollow holds no images"),
    ("good.npz", ("--reference", "large.npz"), r"\(64, 64\).*\(32, 32\)"),
    ("good.npz", ("--reference", "few.npz"), "there are 3 in few.npz.*four or more"),
    ("good.npz", ("--reference", "statistics.npz"), "arr_0.*mu, sigma.*resize rule"),
    ("good.npz", ("--reference", "nan.npz"), "nan.npz: sigma is not finite"),
    ("good.npz", ("--reference", "cut.npz"), "cut.npz is truncated"),
    ("good.npz", ("--reference", "foreign.npz"), "foreign.npz is truncated or no npz file"),
    ("clips.npz", ("--reference", "good.npz"), r"images of \(32, 32\), not \(9, 32, 32\)"),
    ("good.npz", ("--metrics", "fvd"), "fvd is not for images; take fid sfid"),
    ("good.npz", ("--ckpt", "some.pt", "--top-p", 0.9), "good.npz is drawn already, without --top-p")])
def test_wrong_samples_and_references_are_named(place, wrong_files, monkeypatch, samples, flags, words):
    monkeypatch.chdir(wrong_files)
    if not flags and samples not in ("short.npz", "wide.npz"):
        flags = ("--reference", "good.npz")
    refused(words, generate, samples, *flags, "--output", place, kind=ValueError)
    assert not results(place)


@pytest.mark.parametrize("metric, least", [("ssim", 7), ("lpips-alex", 32)])
def test_an_image_that_is_too_small_is_named(files, place, metric, least):
    write_images(".", 3, (40, 40))
    Image.new("RGB", (40, least - 1)).save("1.png")
    refused(f"1.png: --metrics {metric} needs {least} .*not {least - 1}", reconstruct, files["images"],
            "--original-resolution", "--data-path", ".", "--metrics", metric, *RANDOM)


@pytest.mark.slow
@pytest.mark.parametrize("text", ['{"cfg_scale": 2', "[1, 2]", "\ud800"])
def test_torn_and_foreign_records_are_named_or_passed_over(place, capsys, text):
    write_samples("samples.npz", 4)
    pathlib.Path("samples.json").write_text(text, errors="surrogatepass")
    refused("samples.json is damaged", generate, "samples.npz")
    pathlib.Path("samples.json").write_text('{"checkpoint": "model.pt"}')            # of another program
    generate("samples.npz", "--metrics", "fid")
    pathlib.Path("runs/evaluation/torn.json").write_text(text, errors="surrogatepass")
    pathlib.Path("runs/evaluation/foreign.json").write_text('{"metrics": {}, "date": "2025"}')
    call("table", 5)
    assert "not yet" in capsys.readouterr().out


@pytest.mark.parametrize("number, rows, commands, some", [
    (1, 5, 0, ["262144 ids, 256x256, 16x", "16384 ids, 256x256, 16x", "262144 ids, 128x128, 8x"]),
    (2, 3, 0, ["343.57M, 24, 2, 1024, 16", "1486.68M"]), (3, 2, 2, ["1.18", "8.6"]),
    (4, 21, 3, ["22.64", "27.02", "0.59", "162"]), (5, 24, 3, ["258.26", "18.65", "323.7"]),
    (6, 9, 8, ["6.76", "0.78", "11.97"])])
def test_tables_have_all_rows_and_commands_for_ours(place, capsys, number, rows, commands, some):
    call("table", number)
    printed = capsys.readouterr().out
    content = json.loads((ROOT / "support/tables.json").read_text())[str(number)]
    assert len(content["rows"]) == rows and all(value in printed for value in some)
    assert {len(row["cells"]) + 1 for row in content["rows"]} == {len(content["header"])}
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  python")]
    assert len(lines) == commands
    for line in lines:                                                 # it accepts what it prints
        script, *flags = shlex.split(line)[1:]
        assert script == "evaluate.py" and evaluate.get_args(flags).ckpt in checkpoints.PUBLISHED


TABLES = json.loads((ROOT / "support/tables.json").read_text())


@pytest.mark.parametrize("row", TABLES["1"]["rows"] + TABLES["2"]["rows"], ids=lambda row: row["preset"])
def test_tables_1_and_2_say_what_presets_have(row):
    kind, _, presets = next(entry for entry in checkpoints.FORMATS.values() if row["preset"] in entry[2])
    config = presets[row["preset"]]
    with torch.device("meta"):                                         # shapes without memory
        model = kind(config)
    if kind is ar_model.ARModel:
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        own = f"{size:.2f}M, {config.inter_blocks}, {config.intra_blocks}, {config.width}, {config.heads}"
    else:
        side = config.resolution
        own = f"{model.quantizer.vocabulary} ids, {side}x{side}, {config.downsampling}x"
    assert row["own"] == own


@pytest.mark.parametrize("changes, shown", [
    ({}, True), ({"protocol": "clean"}, False), ({"networks": {"inception": LABEL}}, False),
    ({"data": {"path": "data/imagenet", "size": 128}}, False), ({"data": {"path": None, "size": 256}}, False),
    ({"checkpoint": {"preset": "toy"}}, False)])
def test_tables_show_complete_results_of_their_rows(place, capsys, changes, shown):
    result = {"command": "reconstruction", "n": 50_000, "protocol": "official", "date": "2025-01-01",
              "data": {"path": "data/imagenet", "size": 256}, "networks": {"inception": "6726825d"},
              "checkpoint": {"preset": "in1k-256"}, **changes,
              "metrics": {"rfid": {"value": 1.234}, "psnr": {"value": 22.01}, "usage": {"value": 1.0}}}
    runtime.write_json("runs/evaluation/one.json", result)
    newer = {**result, "date": "2026-01-01", "metrics": {"usage": {"value": 0.9}}}           # not complete
    runtime.write_json("runs/evaluation/two.json", newer)
    call("table", 4)
    printed = capsys.readouterr().out
    assert ("imagenet 1.234 / 22.01 / 100.00% (50000, official)" in printed) == shown
    assert ("--ckpt in1k-256 --data-path data/imagenet --image-size 256" in printed) != shown
    assert all("--protocol official" in line for line in printed.splitlines() if "  python" in line)


def test_folders_of_clips_are_samples_and_lossy_files_are_told(tmp_path, capsys):
    clips = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    for name, suffix in (("exact", ".webp"), ("lossy", ".mp4")):
        for i in range(2):
            pictures.write_video(tmp_path / name / f"{i}{suffix}", clips[i])
        (tmp_path / name / f"._0{suffix}").write_bytes(b"of macOS")
        samples, _ = sets.open_samples(tmp_path / name)
        assert samples.axes == (5, 16, 16) and samples[1][0].shape == (3, 5, 16, 16)
        assert np.array_equal(samples[1][0].movedim(0, -1).numpy(), clips[1]) == (name == "exact")
        assert ("are lossy" in capsys.readouterr().out) == (name == "lossy")
    pictures.write_video(tmp_path / "exact" / "2.webp", clips[0, :3])
    refused("mixes the sizes", sets.open_samples, tmp_path / "exact")


@pytest.mark.parametrize("of_clips", [True, False])
def test_folders_of_numbered_pictures_are_clips_where_these_are_meant_and_else_it_is_said(tmp_path, capsys,
                                                                                        of_clips):
    clips = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    for i, t in np.ndindex(2, 5):
        (tmp_path / f"clip{i}").mkdir(exist_ok=True)
        Image.fromarray(clips[i, t]).save(tmp_path / f"clip{i}" / f"{t:04}.png")
    samples, _ = sets.open_samples(tmp_path, of_clips)
    said = capsys.readouterr().out
    if of_clips:
        assert (samples.axes, len(samples)) == ((5, 16, 16), 2)
        assert np.array_equal(samples[1][0].movedim(0, -1).numpy(), clips[1])
    else:
        assert (samples.axes, len(samples)) == ((16, 16), 10) and "taken for single images" in said


@pytest.mark.parametrize("protocol, drop", [("clean", False), ("official", True)])
def test_data_are_seen_as_the_protocol_and_the_model_want(tmp_path, protocol, drop):
    for i in range(2):
        pictures.write_video(tmp_path / f"{i}.webp", np.zeros((9, 16, 16, 3), np.uint8))
    args = evaluate.get_args(["reconstruction", "--protocol", protocol])
    trained_on = {**evaluate.NOTHING, "data_path": f"unlabelled:{tmp_path}", "frame_stride": 2}
    view = data.View(16, 5)
    chosen = evaluate.choose(args, trained_on, "train", view, None, 2)
    assert (chosen.samples.view.frame_stride, chosen.samples.view.drop_alpha) == (2, drop)
