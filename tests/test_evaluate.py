"""evaluate.py as people use it: its commands on tiny data, on several ranks, with right and wrong input."""
import json
import pathlib
import shlex
import socket
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from helpers import ROOT, environment, run_script
from PIL import Image

import data
import evaluate
import runtime
import sample
import tokenizer
import train_ar
import video
from test_train_ar import TINY, save_images, save_tokenizer

REAL = ROOT.parent / "shared" / "data" / "photos256"


def call(*flags):
    """Run evaluate.py with these flags in this process."""
    evaluate.main(evaluate.get_args([str(flag) for flag in flags]))


def results(folder="runs/evaluation"):
    """The JSON files in `folder`, oldest first."""
    paths = sorted(pathlib.Path(folder).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]


def values(result):
    """{metric: value} of one JSON."""
    return {name: entry["value"] for name, entry in result["metrics"].items()}


def write_samples(path, count=8, size=32, seed=0, **arrays):
    """An npz file in ADM's format with random pictures."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(path, **(arrays or {"arr_0": pixels}))
    return pixels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small untrained tokenizer of stride 4 for pictures of 16 x 16, as train_tokenizer.py saves it."""
    torch.manual_seed(0)
    config = tokenizer.TokenizerConfig(resolution=16, channels=32, channel_multipliers=(1, 1), blocks=1,
                                       mid_blocks=0, patch=2, bits=6)
    model = tokenizer.Tokenizer(config)
    path = tmp_path_factory.mktemp("run") / "runs" / "tokenizer" / "step-00000003.pt"
    runtime.save_checkpoint(path, {"format": tokenizer.Tokenizer.format,
                                   "config": tokenizer.config_to_dict(config),
                                   "model": model.state_dict(), "ema": None, "step": 3})
    return path


@pytest.fixture(scope="module")
def ar_checkpoint(tmp_path_factory):
    """A hardly trained transformer with three classes and pictures of 16 x 16, as train_ar.py saves it."""
    folder = tmp_path_factory.mktemp("ar")
    stage1 = save_tokenizer(folder / "tokenizer.pt", save_images(folder / "images", train=4))
    train_ar.main(train_ar.get_args([str(flag) for flag in (
        *TINY, "--tokenizer", stage1, "--length", 2, "--results-dir", folder / "runs" / "ar")]))
    return runtime.latest_checkpoint(folder / "runs" / "ar")


class QuickInception(torch.nn.Module):
    """Random features of the right sizes in milliseconds, for tests of what surrounds the network."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 23 * 23, 2048 + 2023 + 1008)

    def forward(self, x):
        """x (B, 3, 299, 299) to features, spatial features and logits.

        Picture by picture: on some CPUs a row of a matrix product depends in its last bit on where it stands,
        and ranks share the pictures out to other places. (Inception's convolutions do not.)
        """
        rows = [self.layer(row).relu() for row in x[..., ::13, ::13].flatten(1)]
        return torch.stack(rows).split([2048, 2023, 1008], 1)


@pytest.fixture
def quick(monkeypatch):
    """A stand-in for Inception."""
    monkeypatch.setattr(evaluate, "FIDInception", QuickInception)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------
# reconstruction
# ------------------------------------------------------------------------------------------------------------

def test_without_flags_it_judges_what_training_left_and_names_what_it_lacks(checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parents[2])
    evaluate.main(evaluate.get_args([]))
    printed = capsys.readouterr().out
    result, = results()
    assert values(result).keys() == {"psnr", "ssim", "usage", "perplexity", "bits_per_pixel"}
    assert "left out    rfid, lpips-vgg, lpips-alex" in printed and "--metrics all" in printed
    assert result["n"] == 1000 and result["data"]["name"] == "generated" and result["protocol"] == "clean"
    assert result["checkpoint"]["sha256"] == runtime.sha256_of(checkpoint)
    assert (result["checkpoint"]["weights"], result["checkpoint"]["step"]) == ("raw", 3)
    assert result["metrics"]["bits_per_pixel"]["value"] == pytest.approx(6 / 16)
    assert {"seconds", "date", "arguments", "versions", "precision", "resize_rule"} <= result.keys()
    picture = Image.open(next(pathlib.Path("runs/evaluation").glob("*.png")))
    assert picture.size[0] > 3.5 * picture.size[1]                     # eight columns, two rows


RANKS = """
import os, sys
import torch.multiprocessing
import evaluate
from test_evaluate import QuickI3D, QuickInception

def job(rank, ranks, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    common = f" --allow-random-weights --feature-batch-size 2 --batch-size 3 --output out{ranks}"
    metrics = "--metrics psnr ssim usage rfid lpips-alex"
    first = f"reconstruction --ckpt {sys.argv[1]} --image-size 32 --max-images 5 {metrics}{common}"
    evaluate.main(evaluate.get_args(first.split()))
    evaluate.FIDInception = QuickInception
    second = f"generation --samples samples.npz --reference reference.npz{common}"
    evaluate.main(evaluate.get_args(second.split()))
    drawn = f"--ckpt {sys.argv[2]} --num-samples 10 --sampling-batch-size 3 --reference reference16.npz"
    evaluate.main(evaluate.get_args(f"generation {drawn}{common}".split()))
    evaluate.I3D = QuickI3D
    clips = f"video --ckpt {sys.argv[3]} --max-clips 5 --metrics psnr usage rfvd --protocol seed"
    evaluate.main(evaluate.get_args((clips + common).split()))

if __name__ == "__main__":
    for ranks in (1, 2, 3):                       # forked, so that torch is imported once and not six times
        torch.multiprocessing.start_processes(job, (ranks, sys.argv[3 + ranks]), ranks, start_method="fork")
"""


def test_one_two_and_three_ranks_measure_the_same_to_1e_9(checkpoint, ar_checkpoint, video_checkpoint, place):
    write_samples("samples.npz", 5, seed=1)
    write_samples("reference.npz", 7, seed=2)
    write_samples("reference16.npz", 10, size=16)
    pathlib.Path("job.py").write_text(RANKS)
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    done = subprocess.run([sys.executable, "job.py", checkpoint, ar_checkpoint, video_checkpoint, *ports],
                          env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    alone, two, three = [results(f"out{ranks}") for ranks in (1, 2, 3)]
    assert len(alone) == 4 and values(alone[3])["rfvd"] > 0
    assert values(alone[0])["rfid"] > 0 and values(alone[1])["fid"] > 0
    for run in (two, three):
        for expected, got in zip(alone, run, strict=True):
            assert got["n"] == expected["n"]
            assert values(got) == {name: pytest.approx(value, rel=1e-9, abs=1e-9)
                                   for name, value in values(expected).items()}


def test_without_data_path_it_takes_held_out_pictures_of_what_the_tokenizer_was_trained_on(checkpoint, place):
    for i in range(3):
        (place / "own" / "val").mkdir(parents=True, exist_ok=True)
        (place / "own" / "train").mkdir(exist_ok=True)
        for split in ("val", "train"):
            Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(place / "own" / split / f"{i}.png")
    Image.new("RGB", (40, 40)).save(place / "own" / "train" / "extra.png")
    stored = runtime.load_checkpoint(checkpoint)
    trained = {"data_path": str(place / "own"), "val_data_path": None, "resize": 24}
    runtime.save_checkpoint("trained.pt", {**stored, "args": trained})
    call("reconstruction", "--ckpt", "trained.pt")
    call("reconstruction", "--ckpt", "trained.pt", "--data-path", "generated", "--max-images", 4)
    own, generated = results()
    assert (own["n"], own["data"]["path"], own["data"]["resize"]) == (3, str(place / "own"), 24)
    assert (generated["n"], generated["data"]["name"], generated["data"]["resize"]) == (4, "generated", None)


def test_numbers_of_random_weights_are_marked_on_screen_and_in_the_json(checkpoint, place, quick, capsys):
    call("reconstruction", "--ckpt", checkpoint, "--image-size", 32, "--max-images", 2,
         "--allow-random-weights", "--metrics", "psnr", "rfid", "lpips-alex", "--feature-batch-size", 2)
    printed = capsys.readouterr().out
    result, = results()
    for name in ("rfid", "lpips-alex"):
        assert result["metrics"][name]["label"] == "NOT COMPARABLE (random weights)"
        line, = [line for line in printed.splitlines() if line.startswith(evaluate.METRICS[name][0])]
        assert line.endswith("NOT COMPARABLE (random weights)")
    assert "label" not in result["metrics"]["psnr"]                    # no network has looked at it
    assert "rFID of 2 pictures is biased upwards" in printed


def test_the_originals_statistics_are_reused_and_give_the_same_rfid(checkpoint, place, quick, monkeypatch):
    flags = ("reconstruction", "--ckpt", checkpoint, "--max-images", 2, "--metrics", "rfid",
             "--allow-random-weights", "--feature-batch-size", 2)
    call(*flags)
    forwards = []
    forward = QuickInception.forward
    monkeypatch.setattr(QuickInception, "forward",
                        lambda self, x: forwards.append(len(x)) or forward(self, x))
    before, = results()
    call(*flags)
    after, = results()                                                 # the same run has the same file
    assert forwards == [2] and values(after) == values(before)
    assert len(list(pathlib.Path("runs/evaluation/references").glob("*.npz"))) == 1


def test_the_protocols_give_different_numbers_and_different_files(checkpoint, place):
    for protocol in ("clean", "seed"):
        call("reconstruction", "--ckpt", checkpoint, "--max-images", 9, "--protocol", protocol)
    clean, seed = results()
    assert (clean["protocol"], seed["protocol"]) == ("clean", "seed")
    assert 0 < abs(values(clean)["psnr"] - values(seed)["psnr"]) < 0.2
    assert "truncated" in seed["metrics"]["psnr"]["measured_on"]


class Identity(torch.nn.Module):
    """A tokenizer that gives back what it gets, to test what surrounds it."""

    def __init__(self):
        super().__init__()
        self.config = tokenizer.TokenizerConfig(bits=4)
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def encode(self, images):
        """Remember the padded pictures; one token each 16 x 16 pixels."""
        self.seen.append(images)
        return torch.zeros(len(images), images.shape[2] // 16, images.shape[3] // 16, dtype=torch.long)

    def decode(self, ids):
        """The pictures that were encoded last."""
        return self.seen[-1]


@pytest.mark.parametrize("protocol", ["clean", "seed"])
def test_original_resolution_pads_with_grey_to_whole_tokens_and_crops_back(protocol, place):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
              for height, width in ((40, 33), (32, 48), (17, 21))]
    loader = [(image[None], torch.zeros(1), torch.tensor([i])) for i, image in enumerate(images)]
    args = evaluate.get_args(["reconstruction", "--original-resolution", "--protocol", protocol])
    model = Identity()
    measured, counts, pixels, grid = evaluate.measure_reconstruction(model, loader, {}, None, args, {1})
    assert [tuple(x.shape[2:]) for x in model.seen] == [(48, 48), (32, 48), (32, 32)]
    assert model.seen[0][..., :4, :].abs().max() == 0 and model.seen[0][..., 44:, :].abs().max() == 0
    assert model.seen[0][..., :7].abs().max() == 0 and model.seen[0][..., 40:].abs().max() == 0  # 15 = 7 + 8
    assert torch.isinf(measured["psnr"]).all() and measured["ssim"].tolist() == [1, 1, 1]
    assert counts.sum() == 3 * 3 + 2 * 3 + 2 * 2 and pixels == 40 * 33 + 32 * 48 + 17 * 21
    assert list(grid) == [1]


def test_infinite_psnr_is_written_as_valid_json(place):
    args = evaluate.get_args(["reconstruction"])
    evaluate.report("x", {"psnr": float("inf")}, {"psnr": "itself"}, {},
                    {"n": 1, "command": "reconstruction"}, 0, args)
    text = next(pathlib.Path("runs/evaluation").glob("*.json")).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"]["psnr"]["value"] == "inf"


def test_a_broken_picture_is_skipped_and_counted(checkpoint, place):
    folder = place / "pictures"
    folder.mkdir()
    for i in range(119):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(folder / f"{i:03}.png")
    (folder / "050-broken.png").write_bytes(b"no picture")
    call("reconstruction", "--ckpt", checkpoint, "--data-path", folder)
    result, = results()
    assert (result["n"], result["skipped"]) == (119, 1)


@pytest.mark.parametrize("flags, words", [
    (("--ckpt", "nowhere.pt"), ["nowhere.pt", "does not exist"]),
    (("--data-path", "nowhere"), ["--data-path", "nowhere"]),
    (("--image-size", "18"), ["18 x 18", "multiples of 4"]),
    (("--metrics", "lpips-alex", "--allow-random-weights", "--max-images", "2"), ["LPIPS", "32 x 32"]),
    (("--metrics", "rfid", "--max-images", "1"), ["--metrics rfid", "two pictures"]),
])
def test_a_wrong_flag_of_reconstruction_gets_an_error_that_names_it(checkpoint, place, flags, words):
    with pytest.raises(runtime.UserError) as error:
        call("reconstruction", *(() if "--ckpt" in flags else ("--ckpt", checkpoint)), *flags)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_no_checkpoint_at_all_is_one_line_and_exit_status_2(place):
    done = run_script("evaluate.py", check=False, cwd=place)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "runs/tokenizer" in done.stderr


def test_weights_that_are_not_the_published_ones_are_refused(checkpoint, place):
    name = evaluate.INCEPTION_FILE[0].rsplit("/", 1)[1]
    (place / name).write_bytes(b"something else")
    with pytest.raises(runtime.UserError, match="not the published file"):
        call("reconstruction", "--ckpt", checkpoint, "--metrics", "rfid", "--weights-dir", place)
    assert not results()


def test_without_a_connection_it_says_where_to_put_the_weights(checkpoint, place, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(runtime.UserError, match="pt_inception-2015-12-05-6726825d.pth.*--weights-dir"):
        call("reconstruction", "--ckpt", checkpoint, "--metrics", "rfid", "--weights-dir", place)


@pytest.mark.skipif(not REAL.exists(), reason="needs real photographs beside the repository")
def test_real_photographs_at_their_own_size(checkpoint, place):
    call("reconstruction", "--ckpt", checkpoint, "--data-path", REAL, "--original-resolution",
         "--max-images", 3)
    result, = results()
    assert result["n"] == 3 and 0 < values(result)["psnr"] < 50 and result["data"]["size"] == "original"


# ------------------------------------------------------------------------------------------------------------
# generation and make-reference
# ------------------------------------------------------------------------------------------------------------

RANDOM = ("--allow-random-weights", "--feature-batch-size", "4")


def test_samples_compared_with_themselves_have_fid_0_and_precision_and_recall_1(place, quick, capsys):
    write_samples("same.npz", 6)
    call("generation", "--samples", "same.npz", "--reference", "same.npz", *RANDOM)
    measured = values(results()[0])
    assert abs(measured["fid"]) < 1e-9 and abs(measured["sfid"]) < 1e-9
    assert measured["precision"] == measured["recall"] == 1 and measured["inception_score"] >= 1
    labels = {entry["label"] for entry in results()[0]["metrics"].values()}
    assert labels == {"NOT COMPARABLE (random weights)"}
    printed = capsys.readouterr().out
    assert "of 50,000 samples, these are of 6" in printed and "biased upwards" in printed


def test_another_number_of_reference_pictures_is_warned_about(place, quick, capsys):
    write_samples("samples.npz", 4)
    write_samples("reference.npz", 5, seed=1)
    call("generation", "--samples", "samples.npz", "--reference", "reference.npz", *RANDOM)
    assert "4 samples are compared with 5 reference pictures" in capsys.readouterr().out


def test_a_reference_is_made_once_read_back_and_has_the_format_of_adm(place, quick, capsys):
    flags = ("make-reference", "--image-size", 32, "--max-images", 5, "--split", "val", *RANDOM)
    call(*flags)
    path, = pathlib.Path("runs/evaluation/references").glob("*.npz")
    written = path.stat().st_mtime_ns
    call(*flags)
    assert "(cached)" in capsys.readouterr().out and path.stat().st_mtime_ns == written
    with np.load(path) as file:
        shapes = {name: (file[name].shape, str(file[name].dtype)) for name in file.files}
    assert shapes["arr_0"] == ((5, 32, 32, 3), "uint8")
    assert shapes["mu"] == ((2048,), "float64") and shapes["sigma"] == ((2048, 2048), "float64")
    assert shapes["mu_s"] == ((2023,), "float64") and shapes["sigma_s"] == ((2023, 2023), "float64")
    # The same pictures as samples: at distance 0 from the statistics, and from those made of arr_0.
    np.savez("samples.npz", np.load(path)["arr_0"])
    np.savez("plain.npz", np.load(path)["arr_0"])
    for reference in (path, "plain.npz"):
        call("generation", "--samples", "samples.npz", "--reference", reference, *RANDOM)
        assert abs(values(results()[-1])["fid"]) < 1e-9
    call("make-reference", "--image-size", 32, "--max-images", 4, "--split", "val", *RANDOM)
    assert len(list(path.parent.glob("reference-*.npz"))) == 2         # another number, another file


def test_without_reference_samples_are_compared_with_as_many_pictures_of_the_data_set(place, quick):
    pathlib.Path("runs/samples").mkdir(parents=True)
    write_samples("runs/samples/newest.npz", 5)
    pathlib.Path("runs/samples/newest.json").write_text('{"cfg_scale": [4, 4]}')
    call("generation", *RANDOM)
    result, = results()
    assert result["reference"]["n"] == result["n"] == 5 and result["sampling"] == {"cfg_scale": [4, 4]}
    assert values(result)["fid"] > 1                                   # noise is not like drawn shapes


def test_pictures_drawn_from_a_checkpoint_measure_like_the_npz_of_sample(ar_checkpoint, place, quick):
    how = ("--ckpt", ar_checkpoint, "--cfg-scale", "1.5,3", "--top-k", 20, "--global-seed", 5)
    drawn = sample.get_args([str(flag) for flag in (
        *how, "--num-fid-samples", 10, "--batch-size", 4, "--output", "samples.npz")])
    sample.main(drawn)
    write_samples("reference.npz", 6, size=16)
    call("generation", "--samples", "samples.npz", "--reference", "reference.npz", "--global-seed", 5,
         *RANDOM)
    call("generation", *how, "--num-samples", 10, "--sampling-batch-size", 4, "--batch-size", 3,
         "--reference", "reference.npz", *RANDOM)
    stored, streamed = results()
    assert values(streamed) == values(stored) and values(streamed)["fid"] > 0
    assert streamed["sampling"] == stored["sampling"] and streamed["sampling"]["cfg_scale"] == [1.5, 3]
    assert streamed["samples"] == {"path": str(ar_checkpoint), "size": [16, 16],
                                   "sha256": runtime.sha256_of(ar_checkpoint)}
    call("generation", *how[:-1], 6, "--num-samples", 10, "--reference", "reference.npz", *RANDOM)
    assert values(results()[-1])["fid"] != values(streamed)["fid"]     # another seed, other pictures


def test_without_flags_it_takes_the_newest_npz_else_draws_from_the_newest_model(ar_checkpoint, place, quick,
                                                                                monkeypatch):
    with pytest.raises(runtime.UserError, match="no samples .* no AR model .* in runs/ar"):
        call("generation", *RANDOM)
    monkeypatch.chdir(ar_checkpoint.parents[2])
    draw = evaluate.drawn_samples

    def draw_few(path, args, device):                                  # the default, 5,000, takes minutes
        args.num_samples = 5
        return draw(path, args, device)
    monkeypatch.setattr(evaluate, "drawn_samples", draw_few)
    call("generation", *RANDOM, "--output", place)
    result, = results(place)
    assert result["n"] == 5 and result["sampling"]["checkpoint"]["name"] == ar_checkpoint.name
    pathlib.Path("runs/samples").mkdir(parents=True)
    write_samples("runs/samples/new.npz", 5, size=16)
    call("generation", *RANDOM, "--output", place)
    assert results(place)[-1]["samples"]["path"] == "runs/samples/new.npz"


def test_flags_on_how_to_draw_do_not_go_with_stored_samples(place):
    write_samples("samples.npz", 4)
    with pytest.raises(runtime.UserError, match="--samples samples.npz is drawn already.*--ckpt, --top-p"):
        call("generation", "--samples", "samples.npz", "--ckpt", "some.pt", "--top-p", 0.9, *RANDOM)


def test_a_folder_and_an_npz_of_the_same_pictures_give_the_same_numbers(place, quick):
    pixels = write_samples("samples.npz", 4)
    write_samples("reference.npz", 4, seed=1)
    pathlib.Path("folder").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"folder/{i}.png")
    for samples in ("samples.npz", "folder"):
        call("generation", "--samples", samples, "--reference", "reference.npz", *RANDOM)
    assert values(results()[0]) == values(results()[1])


def test_samples_round_trip_through_npz_mapped_or_compressed(place):
    pixels = write_samples("plain.npz", 4)
    np.savez_compressed("packed.npz", arr_0=pixels)
    for path, mapped in (("plain.npz", True), ("packed.npz", False)):
        samples = evaluate.SampleArray(path)
        assert isinstance(samples.images, np.memmap) == mapped
        assert (len(samples), samples.size) == (4, (32, 32))
        image, _, index = samples[2]
        assert index == 2 and np.array_equal(image.permute(1, 2, 0).numpy(), pixels[2])


def broken_files(place):
    """name -> what is wrong with it."""
    good = np.zeros((4, 32, 32, 3), np.uint8)
    np.savez("float.npz", good.astype(np.float32))
    np.savez("channels-first.npz", good.transpose(0, 3, 1, 2))
    np.savez("grey.npz", good[..., 0])
    np.savez("other-name.npz", images=good)
    np.savez("few.npz", good[:3])
    np.savez("good.npz", good)
    np.savez("large.npz", np.zeros((4, 64, 64, 3), np.uint8))
    np.savez("statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    pathlib.Path("cut.npz").write_bytes(pathlib.Path("good.npz").read_bytes()[:-200])
    pathlib.Path("mixed").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, 8)).save(f"mixed/{size}.png")


@pytest.mark.parametrize("samples, reference, words", [
    ("float.npz", "good.npz", ["float32", "uint8"]),
    ("channels-first.npz", "good.npz", ["(N, H, W, 3)", "transpose"]),
    ("grey.npz", "good.npz", ["[4, 32, 32]", "(N, H, W, 3)"]),
    ("other-name.npz", "good.npz", ["arr_0", "images"]),
    ("few.npz", "good.npz", ["3 pictures", "four or more"]),
    ("cut.npz", "good.npz", ["cut.npz", "truncated"]),
    ("mixed", "good.npz", ["mixes sizes", "(8, 8)", "(8, 9)"]),
    ("nowhere.npz", "good.npz", ["nowhere.npz", "does not exist"]),
    ("good.npz", "nowhere.npz", ["--reference nowhere.npz", "make-reference"]),
    ("good.npz", "large.npz", ["(64, 64)", "(32, 32)"]),
    ("good.npz", "few.npz", ["3 pictures", "four or more"]),
    ("good.npz", "statistics.npz", ["mu, sigma", "arr_0", "resize rule"]),
    ("good.npz", "cut.npz", ["--reference cut.npz", "truncated"]),
])
def test_wrong_samples_and_references_get_errors_that_name_them(place, quick, samples, reference, words):
    broken_files(place)
    with pytest.raises(runtime.UserError) as error:
        call("generation", "--samples", samples, "--reference", reference, *RANDOM)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value) and not results()


def test_a_reference_of_other_weights_or_settings_is_refused(place, quick, monkeypatch):
    call("make-reference", "--image-size", 32, "--max-images", 4, "--reference", "own.npz", *RANDOM)
    with pytest.raises(runtime.UserError, match="own.npz exists already.*n: 4 there, 5 here"):
        call("make-reference", "--image-size", 32, "--max-images", 5, "--reference", "own.npz", *RANDOM)
    write_samples("samples.npz", 4)
    monkeypatch.setattr(evaluate, "RANDOM_LABEL", "other weights")
    with pytest.raises(runtime.UserError, match="other Inception weights"):
        call("generation", "--samples", "samples.npz", "--reference", "own.npz", *RANDOM)


# ------------------------------------------------------------------------------------------------------------
# video
# ------------------------------------------------------------------------------------------------------------

class QuickI3D(torch.nn.Module):
    """Random features of clips in milliseconds, for tests of what surrounds the network."""

    def __init__(self, eps):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 3 * 16 * 16, 400)

    def forward(self, x):
        """x (B, 3, T, 224, 224) to features (B, 400), clip by clip for the reason given above."""
        return torch.stack([self.layer(row) for row in x[:, :, ::4, ::14, ::14].flatten(1)])


@pytest.fixture(scope="module")
def video_checkpoint(tmp_path_factory):
    """A small untrained tokenizer of clips of 9 x 32 x 32, as video.py saves it."""
    torch.manual_seed(0)
    config = video.VideoTokenizerConfig(resolution=32, channels=32, channel_multipliers=(1, 1), blocks=1,
                                        mid_blocks=0, patch=2, bits=6, frames=9, time_strides=(2,))
    path = tmp_path_factory.mktemp("run") / "runs" / "video" / "step-00000003.pt"
    runtime.save_checkpoint(path, {
        "format": video.VideoTokenizer.format, "config": tokenizer.config_to_dict(config), "ema": None,
        "model": video.VideoTokenizer(config).state_dict(), "step": 3, "args": {}})
    return path


def test_video_metrics_are_those_of_the_frames_and_of_the_features(video_checkpoint, place, monkeypatch):
    monkeypatch.setattr(evaluate, "I3D", QuickI3D)
    call("video", "--ckpt", video_checkpoint, "--max-clips", 6, "--metrics", "psnr", "ssim", "usage", "rfvd",
         "lpips-alex", "--allow-random-weights")
    result, = results()
    measured = values(result)
    model, _ = video.load_video_tokenizer(video_checkpoint)
    clips = data.build_clips(None, "test", 32, frames=9)
    x = torch.stack([clips[1000 * k // 6][0] for k in range(6)])
    with torch.no_grad():
        ids = model.encode(data.to_float(x))
        y = runtime.to_uint8(model.decode(ids))
    pairs = [(a, b) for a, b in zip(x.transpose(1, 2).flatten(0, 1), y.transpose(1, 2).flatten(0, 1))]
    expected = np.mean([evaluate.psnr(a[None], b[None]).item() for a, b in pairs])
    assert measured["psnr"] == pytest.approx(expected, abs=1e-6) and 0 < measured["ssim"] < 1
    i3d = evaluate.randomise(QuickI3D(0))
    with torch.no_grad():
        features = [i3d(evaluate.i3d_input(c.transpose(1, 2))).double().numpy() for c in (x, y)]
    statistics = [array for f in features for array in (f.mean(0), np.cov(f.T))]
    assert measured["rfvd"] == pytest.approx(evaluate.frechet_distance(*statistics, 6, 6), rel=1e-5)
    assert measured["usage"] == len(ids.unique()) / 64
    assert measured["bits_per_pixel"] == pytest.approx(6 * ids[0].numel() / (9 * 32 * 32))
    assert (result["n"], result["data"]["split"], result["data"]["crop"]) == (6, "test", "center")
    assert result["metrics"]["rfvd"]["label"] == evaluate.RANDOM_LABEL
    assert next(pathlib.Path("runs/evaluation").glob("video-*.png"))


def write_clips(folder, counts):
    """`counts` animated pictures of 9 frames, of one class, in each split."""
    for split, count in counts.items():
        for i in range(count):
            frames = np.random.default_rng(i).integers(0, 256, (9, 36, 40, 3), dtype=np.uint8)
            data.write_video(folder / split / "wave" / f"{i}.gif", frames)
    return folder


def test_protocol_seed_takes_the_training_split_some_clips_twice_and_random_crops(video_checkpoint, place,
                                                                                 monkeypatch):
    monkeypatch.setattr(evaluate, "I3D", QuickI3D)
    write_clips(place / "clips", {"train": 5, "test": 3})
    flags = ("video", "--ckpt", video_checkpoint, "--data-path", place / "clips", "--allow-random-weights",
             "--metrics", "psnr", "rfvd")
    call(*flags)
    call(*flags, "--protocol", "seed")
    clean, seed = results()
    assert (clean["n"], clean["repeated"], clean["data"]["split"]) == (3, 0, "test")
    assert (seed["n"], seed["repeated"]) == (10, 5)
    assert (seed["data"]["split"], seed["data"]["crop"]) == ("train", "random")
    assert "rfvd-float32" not in values(clean)
    assert values(seed)["rfvd-float32"] == pytest.approx(values(seed)["rfvd"], rel=0.05)
    args = evaluate.get_args([*map(str, flags), "--protocol", "seed"])
    order = evaluate.choose_clips(9_537, args)                         # UCF-101's training split
    assert len(order) == 10_000 and order[:9_537] == list(range(9_537)) and len(set(order[9_537:])) == 463
    assert len(evaluate.choose_clips(20_000, args)) == 10_000


def test_clips_are_measured_alike_in_any_batches_and_broken_ones_left_out(video_checkpoint, place, capfd):
    folder = write_clips(place / "clips", {"test": 1}) / "test" / "wave"
    for i in range(101):
        (folder / f"{i:03d}.gif").write_bytes((folder / "0.gif").read_bytes() if i != 40 else b"GIF89a, cut")
    (folder / "0.gif").unlink()
    for size in (2, 3):                                                # numbers 0, 20, 40, 60 and 80 of 101
        call("video", "--ckpt", video_checkpoint, "--data-path", place / "clips", "--batch-size", size,
             "--metrics", "psnr", "usage", "--max-clips", 5)
    first, second = results()
    assert first["n"] == 4 and first["skipped"] == 1
    # Convolutions of another batch size add in another order, which may tip a pixel to the next level: one
    # did, 3e-7 of the PSNR. A clip counted twice, or a broken one, would change 1e-2 of it.
    assert values(first) == pytest.approx(values(second), rel=1e-6)
    assert "broken clip skipped" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# table
# ------------------------------------------------------------------------------------------------------------

def fake_result(**changes):
    """A stored result of the published 256 x 256 tokenizer on ImageNet, as `reconstruction` writes it."""
    result = {"command": "reconstruction", "n": 50_000, "protocol": "clean", "date": "2025-01-01",
              "data": {"path": "data/imagenet", "size": 256}, "networks": {"rfid": "6726825d"},
              "checkpoint": {"name": "imagenet_256_L.ckpt", "preset": "in1k-256"},
              "metrics": {"rfid": {"value": 1.234}, "psnr": {"value": 22.01}, "usage": {"value": 1.0}}}
    return {**result, **changes}


@pytest.mark.parametrize("number, rows, some", [
    (1, 5, ["262144 codes, 256x256, 16x", "16384 codes, 256x256, 16x"]),
    (2, 3, ["343.57M, 24, 2, 1024, 16", "1486.68M"]), (3, 2, ["1.18", "8.6"]),
    (4, 21, ["22.64", "27.02", "0.59", "162"]), (5, 24, ["258.26", "18.65", "323.7"]),
    (6, 9, ["6.76", "0.78", "11.97"])])
def test_every_table_has_all_its_rows_and_says_how_to_measure_ours(place, capsys, number, rows, some):
    call("table", number)
    printed = capsys.readouterr().out
    lines = printed.split("\n\n")[1].splitlines()
    assert len(lines) == rows + 2 and all(value in printed for value in some)
    assert len({len(row.split("|")) for row in evaluate.TABLES[number][2].strip().splitlines()}
               | {len(evaluate.TABLES[number][1].split("|"))}) == 1    # no cell is missing
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  python")]
    assert len(commands) == {1: 0, 2: 0, 3: 1, 4: 2, 5: 3, 6: 8}[number]
    for command in commands:                                           # it accepts what it prints
        script, *flags = shlex.split(command.split("&&")[-1])[1:]
        assert script == "evaluate.py"
        assert evaluate.get_args(flags).command in ("reconstruction", "generation")


@pytest.mark.parametrize("changes, shown", [
    ({}, True), ({"protocol": "seed"}, False), ({"networks": {"rfid": evaluate.RANDOM_LABEL}}, False),
    ({"data": {"path": "data/imagenet", "size": 128}}, False), ({"data": {"path": None, "size": 256}}, False),
    ({"checkpoint": {"name": "step-00001000.pt", "preset": "in1k-256"}}, True),
    ({"checkpoint": {"name": "step-00001000.pt", "preset": "toy"}}, False),
    ({"checkpoint": {"name": "pretrain256_262144.ckpt", "preset": "in1k-256"}}, False)])
def test_a_table_shows_only_results_of_its_checkpoint_data_size_and_protocol(place, capsys, changes, shown):
    runtime.write_json("runs/evaluation/one.json", fake_result(**changes))
    call("table", 4)
    printed = capsys.readouterr().out
    assert ("1.234 / 22.01 / 100.00% (50000 pictures, clean)" in printed) == shown
    assert ("imagenet_256_L.ckpt --data-path data/imagenet --image-size 256" in printed) != shown


def test_download_fetches_the_published_checkpoints_of_the_table(place, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda url, path, **kw: fetched.append(url) or pathlib.Path(path).write_bytes(b""))
    call("table", 4, "--download", "--weights-dir", place)
    assert fetched == [f"https://huggingface.co/TencentARC/Open-MAGVIT2-Tokenizer-{size}-resolution/resolve/"
                       f"main/imagenet_{size}_L.ckpt" for size in (256, 128)]
