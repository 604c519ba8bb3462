"""Stage II: tokens are stored once and verified; the loop trains as published, and learns."""
import argparse
import dataclasses
import json
import math
import pathlib
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
from support import checkpoints, data, drawn, pictures, runtime, sources, tokens
import tokenizer as tok
import train_ar
import video
from helpers import call, error_line, logged, newest, published_ar_name, refused, stored
from test_checkpoints import lightning

# A model so small that a step takes milliseconds, for tokens of 4 x 4 and 3 + 3 bits.
TINY = ["--split", 3, 3, "--width", 32, "--heads", 2, "--inter-blocks", 1, "--global-batch-size", 4,
        "--warmup", 2, "--log-every", 1]
DROPOUT = ["--token-dropout", 0.1, "--attention-dropout", 0.1, "--ffn-dropout", 0.1]
SHAPE = dict(resolution=16, channels=32, channel_multipliers=(1, 2), blocks=1, mid_blocks=0, patch=2, bits=6)
# 9 frames of 16 x 16 to 3 x 2 x 2 tokens: no two axes of a clip are equally long.
CLIP_SHAPE = dict(SHAPE, channel_multipliers=(1, 1, 1), frames=9, time_strides=(2, 2))


def save_tokenizer(path, data_path=None, seed=0, **changes):
    """A checkpoint as train_tokenizer.py leaves it, with random weights."""
    torch.manual_seed(seed)
    if "frames" in changes:
        model = video.VideoTokenizer(video.VideoTokenizerConfig(**changes))
    else:
        model = tok.Tokenizer(tok.TokenizerConfig(**{**SHAPE, **changes}))
    torch.save(stored(model, args={"data_path": data_path}), path)
    return str(path)


def save_data(folder, train=40, val=5, seed=0, frames=1):
    """Noise of 20 x 18 pixels in three classes, in train/ and val/: images, or clips of so many frames."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for i in range(3 * count):
            path = folder / split / ("ant", "bee", "cat")[i // count] / f"{i % count:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (frames, 18, 20, 3), dtype=np.uint8)
            if frames == 1:
                Image.fromarray(pixels[0]).save(path)
            else:
                pictures.write_video(path.with_suffix(".gif"), pixels)
    return str(folder)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """(path of a tokenizer, folder of the images that it says it was trained on)."""
    folder = tmp_path_factory.mktemp("stage1")
    return save_tokenizer(folder / "tokenizer.pt", save_data(folder / "images")), str(folder / "images")


def train(directory, *flags):
    """A run in this process, of a tiny model."""
    call(train_ar, "--results-dir", directory, *TINY, *flags)


def tokens_in(folder, name="tokens"):
    """(ids (rows, crops, N), header) of a tokens file, read without the code under test."""
    header = json.loads((folder / f"{name}.json").read_text())
    return np.fromfile(folder / f"{name}.bin", "<u4").reshape(header["shape"]), header


def ids_of(path, x, ema=True):
    """Ids (B, N) of uint8 images or clips."""
    return checkpoints.load_tokenizer(path, ema)[0].encode(pictures.to_float(x)).flatten(1).numpy()


# ---- numbers of the paper ---------------------------------------------------------------------------------

# The training of all three sizes as published: in configuration files, and from "betas" on in training code.
OFFICIAL = {
    "global_batch_size": 768, "accumulation": 1, "split": [6, 12], "separate_heads": False, "flip": False,
    "token_dropout": 0.1, "attention_dropout": 0.1, "ffn_dropout": 0.1, "label_dropout": 0.1,
    "unconditional": False, "betas": (0.9, 0.95), "weight_decay": 0.05, "max_grad_norm": 1.0, "final_lr": 0.1,
    "ema_decay": 0.0, "online": True, "ten_crop": False, "center_crop": False, "raw_weights": True}
OF_EACH = {                                    # lr, warm-up, length; width, heads, blocks; TFLOP an image
    "AR-B": (3e-4, "6ep", "300ep", 1024, 16, 24, 2, 0.569),
    "AR-L": (3e-4, "6ep", "300ep", 1280, 20, 36, 3, 1.337),
    "AR-XL": (2.4e-4, "7ep", "350ep", 1536, 24, 48, 4, 2.474)}
# What no recipe says: data, files, the speed, and the precision, which the paper does not tell.
OURS = """preset tokenizer data_path val_data_path split_list val_split_list val_size image_size resize frames
    frame_stride init_from tokens token_precision results_dir mixed_precision compile activation_checkpointing
    num_workers device global_seed resume log_every val_every checkpoint_every keep dry_run warmup
    ema_warmup""".split()


@pytest.mark.parametrize("preset", OF_EACH)
def test_every_flag_of_a_published_recipe_is_the_official_one(preset, tmp_path, monkeypatch):
    args = train_ar.get_args(["--preset", preset, "--device", "cpu", "--results-dir", str(tmp_path)])
    train_ar.settle(args)
    names = ("lr", "warmup", "length", "width", "heads", "inter_blocks", "intra_blocks", "tera")
    own = dict(zip(names, OF_EACH[preset]))
    tera = own.pop("tera")
    assert train_ar.AR_RECIPES[preset]["warmup"] == own.pop("warmup") and args.warmup is None
    assert {name: value for name, value in vars(args).items() if name not in OURS} == {**OFFICIAL, **own}
    config = runtime.config_from_args(ar_model.PRESETS[args.preset], args, bits=args.split)
    assert config == ar_model.PRESETS[preset] and (config.grid, config.num_classes) == ((16, 16), 1000)
    # Steps of warm-up, of the twentieth that follows it at the peak, and of the fall.
    at = [train_ar.learning_rate(step, 1101, 100, args) / args.lr for step in (0, 50, 100, 150, 575, 1100)]
    assert at == pytest.approx([0.005, 0.5025, 1, 1, 1 - 0.9 * 0.425 / 0.95, 0.1])
    assert train_ar.flops_per_image(config) / 1e12 == pytest.approx(tera, abs=5e-4)
    assert "mfu" not in train_ar.in_units({"samples/s": 600}, config, args)
    args.device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    mfu = train_ar.in_units({"samples/s": 600}, config, args)["mfu"]
    assert mfu == pytest.approx(600 * tera / 989, rel=1e-3)


@pytest.mark.parametrize("preset, size", [("AR-B", "342.56"), ("AR-L", "803.10"), ("AR-XL", "1485.16")])
def test_a_published_preset_is_planned_without_any_file(tmp_path, monkeypatch, capsys, preset, size):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPEN_MAGVIT2_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    for flags in ([], ["--center-crop"], ["--tokenizer", preset, "--init-from", preset]):
        call(train_ar, "--preset", preset, "--length", 9000, *flags, "--dry-run")
        plan = capsys.readouterr().out
        assert f"{preset}: {size} M parameters" in plan and "16 x 16 of 6 + 12 bits" in plan
        assert "196,608 tokens" in plan and "9,000 steps" in plan and "not downloaded yet (raw" in plan
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "pt-256-2^14"], "16384 ids"), (["--image-size", 250], "250"),
    (["--global-batch-size", 30000], "--global-batch-size 30000 is more than"),
    (["--frames", 5], "is of images"), (["--init-from", "none.pt"], "none.pt")])
def test_a_plan_that_does_not_fit_a_published_preset_is_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)                            # where no runs/ decides on the defaults
    monkeypatch.setenv("OPEN_MAGVIT2_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    refused(message, call, train_ar, "--preset", "AR-B", *flags, "--dry-run", kind=ValueError)


def test_all_parameters_decay_and_rate_changes_every_step(tmp_path, stage1):
    flags = ["--tokenizer", stage1[0], "--length", "0.4ep", "--warmup", "0.1ep", "--lr", 1e-3]
    train(tmp_path, *flags, "--checkpoint-every", 1, "--keep", 2, "--final-lr", 0.5, "--betas", 0.8, 0.9)
    group, = newest(tmp_path)["optimizer"]["param_groups"]               # one: even the norms' scales decay
    assert group["weight_decay"] == 0.05 and tuple(group["betas"]) == (0.8, 0.9)
    assert len(group["params"]) == len(newest(tmp_path)["model"])
    rates = [line["lr"] for _, line in sorted(logged(tmp_path).items())]
    args = argparse.Namespace(lr=1e-3, final_lr=0.5)
    assert rates == [train_ar.learning_rate(step, 12, 3, args) for step in range(12)] and rates[-1] == 5e-4
    assert len(runtime.list_checkpoints(tmp_path)) == 2
    train(tmp_path, *flags, "--length", 13, "--resume")
    assert tuple(newest(tmp_path)["optimizer"]["param_groups"][0]["betas"]) == (0.9, 0.95)


def test_a_short_run_has_a_short_warmup_and_no_step_is_no_run(tmp_path, monkeypatch, stage1, capsys):
    monkeypatch.chdir(tmp_path)
    same = ["--tokenizer", stage1[0], "--global-batch-size", 4, "--split", 3, 3, "--dry-run", "--length"]
    for flags, steps in (([1800], 50), ([400], 20), ([400, "--warmup", 90], 90), (["1ep"], 1)):
        call(train_ar, *same, *flags)
        assert f"warm-up {steps} steps\n" in capsys.readouterr().out
    assert "--length 0.01ep is 0 steps of 4 images; give at least 1" in error_line(train_ar, *same, "0.01ep")


def test_gradients_are_clipped_as_the_flag_says(tmp_path, stage1):
    moved = []
    for norm in (0, 1, 1e-12):                                           # Adam divides by it, but for its eps
        train(tmp_path / str(norm), "--tokenizer", stage1[0], "--length", 2, "--max-grad-norm", norm,
              "--weight-decay", 0)
        moved.append(newest(tmp_path / str(norm))["model"]["heads.0.weight"].abs().max().item())
    assert moved[0] == pytest.approx(moved[1], rel=0.1) and moved[2] < 1e-2 * moved[1]


# ---- tokens -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_stored_tokens_are_the_ids_of_images(tmp_path, stage1):
    path, images = stage1
    train(tmp_path / "a", "--tokenizer", path, "--length", 1, "--val-size", 4)
    some = data.evenly_spaced(4, 15)
    for name, split, rows in (("tokens", "train", range(120)), ("tokens-val", "val", some)):
        ids, header = tokens_in(tmp_path / "a", name)
        dataset = sources.build_dataset(images, split, data.View(16))
        expected = ids_of(path, torch.stack([dataset[i][0] for i in rows]))
        assert ids.shape == (len(rows), 1, 16) and (ids[:, 0] == expected).mean() > 0.999
        assert header["grid"] == [4, 4] and header["origin"] == f"{path} of {dataset.name}"
    train(tmp_path / "ten", "--tokenizer", path, "--length", 1, "--ten-crop")
    ids, header = tokens_in(tmp_path / "ten")
    dataset = sources.build_dataset(images, "train", data.View(16, crop="ten"))
    assert ids.shape == (120, 10, 16) and (ids[77] == ids_of(path, dataset[77][0])).mean() > 0.99
    stored = tokens.Tokens(ids, dataset, range(120), header)
    drawn, _, rows = stored.__getitems__([(row, (0, 3, row)) for row in range(120)])       # in epoch 3
    for part in (rows[7:50], rows[77:78]):                               # whoever shares its batch
        assert torch.equal(stored.__getitems__([(row, (0, 3, row)) for row in part.tolist()])[0], drawn[part])
    epochs = [stored.__getitems__([(77, (0, epoch, 77))])[0][0].tolist() for epoch in range(60)]
    assert {tuple(row) for row in epochs} == {tuple(row) for row in ids[77].tolist()}


@pytest.mark.slow
def test_tokens_of_clips_come_in_t_y_x_order(tmp_path):
    folder = save_data(tmp_path / "clips", train=6, val=2, frames=12)
    path = save_tokenizer(tmp_path / "video.pt", folder, **CLIP_SHAPE)
    train(tmp_path / "a", "--tokenizer", path, "--length", 1)
    stored, header = tokens_in(tmp_path / "a")
    x = sources.build_dataset(folder, "train", data.View(16, 9))[4][0][None]
    ids = checkpoints.load_tokenizer(path)[0].encode(pictures.to_float(x))[0]          # (3, 2, 2)
    assert header["grid"] == [3, 2, 2] and stored.shape == (18, 1, 12)
    assert stored[4, 0].tolist() == [ids[t, y, x] for t in range(3) for y in range(2) for x in range(2)]
    # A clip has 12 tokens of 6 bits for 9 frames of 16 x 16 pixels, and training starts at all of them.
    assert logged(tmp_path / "a")[1]["bits_per_pixel"] == pytest.approx(12 * 6 / (9 * 16 * 16))
    assert (tmp_path / "a" / "samples-00000001.webp").exists()
    train(tmp_path / "b", "--tokenizer", path, "--frames", 5, "--length", 1, "--ten-crop")
    assert tokens_in(tmp_path / "b")[0].shape == (18, 10, 8)
    assert newest(tmp_path / "b")["config"]["grid"] == (2, 2, 2)
    for flags, message in ((["--frames", 10], "frames 10"), (["--split-list", "a.txt"], "--val-split-list")):
        refused(message, train, tmp_path / "d", "--tokenizer", path, *flags, kind=ValueError)


@pytest.mark.slow
def test_broken_images_stay_missing_and_are_skipped(tmp_path):
    images = pathlib.Path(save_data(tmp_path / "images"))
    (images / "train" / "bee" / "03.png").write_bytes(b"no image")
    flags = ["--tokenizer", save_tokenizer(tmp_path / "a.pt"), "--data-path", images, "--length", 30]
    train(tmp_path / "run", *flags)                                      # an epoch: every image is asked for
    ids, header = tokens_in(tmp_path / "run")
    assert header["missing"] == [43] and not ids[43].any() and ids[44].any()
    (images / "train" / "bee" / "04.png").write_bytes(b"no image")
    refused("broken, more than 1 %", train, tmp_path / "other", *flags)
    assert tokens_in(tmp_path / "other")[1]["missing"] is None           # not complete


def test_tokens_of_32_bits_are_stored_and_the_largest_is_one_of_them(tmp_path, stage1):
    path = save_tokenizer(tmp_path / "a.pt", stage1[1], bits=32, groups=4)
    stored = torch.load(path)
    stored["model"]["encoder.conv_out.bias"].fill_(1e3)                  # every bit on
    torch.save(stored, path)
    flags = ["--tokenizer", path, "--length", 2, "--tokens", tmp_path / "tokens.bin"]
    train(tmp_path / "run", *flags, "--split", 8, 8, 8, 8)
    ids, header = tokens_in(tmp_path)
    assert (ids == 2 ** 32 - 1).all() and header["missing"] == []
    log = logged(tmp_path / "run")
    assert log[1]["bits"] == pytest.approx(32) and math.isfinite(log[2]["val_loss"])
    assert (tmp_path / "run" / "samples-00000002.png").exists()          # drawn ids fit the tokenizer
    refused("24 bits at most", train, tmp_path / "other", *flags, "--split", 25, 7, kind=ValueError)


def unfinished(folder, done):
    """Let a tokens file be one that was being filled when a kill came, with the rows `done` stored."""
    header = json.loads((folder / "tokens.json").read_text())
    runtime.write_json(folder / "tokens.json", {**header, "missing": None})
    (folder / "tokens.bin.done").write_bytes(bytes(row in done for row in range(120)))


def test_only_what_the_record_lacks_is_encoded_again(tmp_path, stage1):
    flags = ["--tokenizer", stage1[0], "--tokens", tmp_path / "tokens.bin", "--length", 1]
    train(tmp_path / "a", *flags)
    ids, _ = tokens_in(tmp_path)
    np.zeros_like(ids).tofile(tmp_path / "tokens.bin")
    unfinished(tmp_path, done=range(100))                                # two batches: 64 and 56 rows
    train(tmp_path / "b", *flags)
    again, header = tokens_in(tmp_path)
    assert not again[:64].any() and (again[64:] == ids[64:]).all() and header["missing"] == []
    assert not (tmp_path / "tokens.bin.done").exists()
    np.full((120, 16), 64, "<u4").tofile(tmp_path / "tokens.bin")        # of 2^6 ids, none has this number
    refused("more than 1 %", train, tmp_path / "c", *flags)
    (tmp_path / "tokens.bin").write_bytes(bytes(7))
    refused("tokens.*not what it claims to be", train, tmp_path / "d", *flags)


@pytest.mark.parametrize("how", ["no tokens", "no header", "no record", "8 bytes", "8 bytes, unfinished"])
def test_deleted_and_old_tokens_never_stop_a_run(tmp_path, stage1, how):
    flags = ["--tokenizer", stage1[0], "--length", 2]
    train(tmp_path, *flags)
    ids, _ = tokens_in(tmp_path)
    path = tmp_path / "tokens.bin"
    if how in ("no header", "no tokens"):
        path.with_suffix(".json" if how == "no header" else ".bin").unlink()
    if "8 bytes" in how:                                                 # of an older version
        ids.astype("<i8").tofile(path)
    if how in ("no record", "8 bytes, unfinished"):
        unfinished(tmp_path, done=())
        (tmp_path / "tokens.bin.done").unlink()
    train(tmp_path, *flags, "--resume", "--length", 3)
    assert path.stat().st_size == ids.nbytes * (2 if how == "8 bytes" else 1)
    assert how == "8 bytes" or (tokens_in(tmp_path)[0] == ids).all()
    assert newest(tmp_path)["step"] == 3


def test_a_file_for_ten_crops_of_imagenet_is_made_at_once(tmp_path):
    path = tmp_path / "tokens.bin"
    tokens.make_room(path, {"shape": [1_281_167, 10, 256]})
    assert path.stat().st_size == 4 * 1_281_167 * 2560 and path.stat().st_blocks < 1000


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tokenizer and an AR model in files as the authors published theirs, with shapes of presets: raw and
    EMA weights differ, and the AR file holds the raw ones."""
    monkeypatch.setitem(tok.PRESETS, "tiny", tok.TokenizerConfig(**SHAPE))
    monkeypatch.setitem(ar_model.PRESETS, "tiny", dataclasses.replace(
        ar_model.PRESETS["toy"], width=32, heads=2, inter_blocks=1, bits=(3, 3), grid=(4, 4), num_classes=3))
    state, raw, _ = lightning(tok.PRESETS["tiny"], discriminator=torch.nn.Identity)
    torch.save({"state_dict": state}, tmp_path / "tokenizer.ckpt")
    model = ar_model.ARModel(ar_model.PRESETS["tiny"])
    state = {published_ar_name(name): tensor for name, tensor in model.state_dict().items()}
    state.update({f"first_stage_model.{name}": tensor for name, tensor in raw.state_dict().items()})
    torch.save({"state_dict": state}, tmp_path / "ar.ckpt")
    return tmp_path / "tokenizer.ckpt", tmp_path / "ar.ckpt"


@pytest.mark.parametrize("flags, raw", [
    ([], False), (["--raw-weights"], True), (["--preset", "AR-B", "--center-crop"], True),
    (["--preset", "AR-B", "--center-crop", "--no-raw-weights"], False),
    (["--init-from", "ar.ckpt"], True), (["--init-from", "ar.ckpt", "--no-raw-weights"], False),
    (["--tokenizer", "ours.pt"], False), (["--tokenizer", "ours.pt", "--raw-weights"], True)])
def test_tokens_are_by_ema_or_raw_weights(tmp_path, stage1, published, capsys, monkeypatch, flags, raw):
    monkeypatch.chdir(tmp_path)
    models = [checkpoints.load_tokenizer("tokenizer.ckpt", ema)[0] for ema in (False, True)]
    torch.save(stored(models[0], ema=models[1].state_dict()), "ours.pt")
    train("run", "--split", 3, 3, "--intra-blocks", 1, "--tokenizer", "tokenizer.ckpt", "--data-path",
          stage1[1], *flags, "--length", 1)
    said = capsys.readouterr().out
    dataset = sources.build_dataset(stage1[1], "train", data.View(16))
    x = torch.stack([dataset[i][0] for i in range(120)])
    by = [model.encode(pictures.to_float(x)).flatten(1).numpy() for model in models]
    assert (by[0] != by[1]).mean() > 0.5
    assert (tokens_in(tmp_path / "run")[0][:, 0] == by[not raw]).mean() > 0.999
    assert f"({'raw' if raw else 'EMA'} weights)" in said
    assert ("learned tokens by other weights" in said) == ("--init-from" in flags and not raw)
    inside = newest(tmp_path / "run")["first_stage"]["model"]            # what images are drawn by
    own = models[not raw].state_dict()
    assert all(torch.equal(inside[name], own[name]) for name in own)


def test_the_published_recipe_is_online_but_an_old_run_goes_on(tmp_path, published, stage1, capsys):
    flags = ["--preset", "AR-B", "--split", 3, 3, "--intra-blocks", 1, "--tokenizer", published[0],
             "--data-path", stage1[1], "--length", 2]
    train(tmp_path / "new", *flags)
    assert "random crops" in capsys.readouterr().out and not (tmp_path / "new" / "tokens.bin").exists()
    old = tmp_path / "old"
    train(old, *flags, "--center-crop", "--no-raw-weights")
    saved = dict(torch.load(runtime.latest_checkpoint(old), weights_only=True))
    for name in ("raw_weights", "center_crop", "betas", "max_grad_norm", "keep", "ema_warmup"):
        del saved["args"][name]                                          # older versions had no such flags
    torch.save(saved, runtime.latest_checkpoint(old))
    for choice, message in (("--online", "online: False there, True here"),
                            ("--raw-weights", "weights: 'EMA' there, 'raw' here")):
        refused(message, train, old, *flags, choice, "--resume")
    train(old, *flags, "--length", 3, "--resume")
    assert newest(old)["step"] == 3 and newest(old)["tokenizer"]["weights"] == "EMA"


@pytest.mark.slow
def test_other_tokens_and_runs_are_refused_with_both_names(tmp_path, stage1):
    path, images = stage1
    tokens = tmp_path / "tokens.bin"
    flags = ["--tokenizer", path, "--tokens", tokens, "--length", 1]
    train(tmp_path / "a", *flags)
    other = save_tokenizer(tmp_path / "other.pt", images, seed=1)
    others = save_data(tmp_path / "others", seed=1)
    (tmp_path / "foreign.bin").write_bytes(b"something")
    (tmp_path / "config.json").write_text('{"model": 1}')
    for folder, more, message in (
            ("b", ["--tokenizer", other], f"{re.escape(path)}.*{re.escape(other)}.*tokenizer: "),
            ("b", ["--data-path", others], f"{re.escape(images)}.*{re.escape(others)}.*data: "),
            ("b", ["--image-size", 8], "grid: .4, 4. there"), ("b", ["--ten-crop"], "crops: 'center' there"),
            ("b", ["--tokens", tmp_path / "other.pt"], "other.pt: give it a name that ends in .bin"),
            ("b", ["--tokens", tmp_path / "foreign.bin"], "foreign.bin is not of these tokens; move it away"),
            ("b", ["--tokens", tmp_path / "config.bin"], "config.json is not of these tokens; move it away"),
            ("b", ["--token-precision", "bf16"], "precision: 'fp32' there, 'bf16' here"),
            ("a", [], "--resume"), ("a", ["--resume", path], "not a training checkpoint"),
            ("a", ["--resume", "--inter-blocks", 2], "inter_blocks: 1 there"),
            ("a", ["--resume", "--global-batch-size", 8], "global_batch_size: 4"),
            ("a", ["--resume", "--ema-decay", 0.9, "--weight-decay", 0], "ema_decay.*weight_decay"),
            ("a", ["--resume", "--tokenizer", other], "the tokenizer differs"),
            ("a", ["--resume", "--data-path", others], "the dataset differs")):
        for dry in ([], ["--dry-run"]):                                  # refuses what a run would
            refused(message, train, tmp_path / folder, *flags, *more, *dry)
    moved = pathlib.Path(images).rename(tmp_path / "moved")              # the same images in another place
    train(tmp_path / "a", *flags, "--data-path", moved, "--resume", "--length", 2)
    moved.rename(images)


# ---- training ---------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--accumulation", 2], ["--compile"], ["--activation-checkpointing"]])
def test_same_gradient_however_it_is_computed(tmp_path, stage1, monkeypatch, flags):
    compile = torch.nn.Module.compile                                    # inductor would take a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile(self, backend="eager", **kw))
    same = ["--tokenizer", stage1[0], "--length", 3, "--lr", 1e-4, "--label-dropout", 0]
    train(tmp_path / "plain", *same)
    train(tmp_path / "other", *same, *flags)
    other = newest(tmp_path / "other")["model"]
    for name, tensor in newest(tmp_path / "plain")["model"].items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_images_are_learned_and_the_ema_is_validated_on_all_held_out(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "a.pt", save_data(tmp_path / "images", train=2, val=5))
    train(tmp_path, "--label-dropout", 0, "--tokenizer", tokenizer, "--length", 200, "--lr", 1e-2,
          "--warmup", 10, "--global-batch-size", 6, "--ema-decay", 0.9)
    log = logged(tmp_path)
    assert log[1]["loss"] == pytest.approx(6 * math.log(2)) == log[1]["loss/1"] + log[1]["loss/2"]
    units = [log[1][name] for name in ("bits", "perplexity", "bits_per_pixel")]
    assert units == pytest.approx([6, 64, 6 / 16])
    assert log[200]["bits"] < 0.5 < 6 < log[200]["val_bits"]             # noise held out cannot be known
    ids, _ = tokens_in(tmp_path, "tokens-val")
    subtokens = ar_model.ids_to_subtokens(torch.from_numpy(ids[:, 0].astype(np.int64)), (3, 3))
    models = [checkpoints.load_ar(tmp_path, ema)[0] for ema in (True, False)]
    ema, raw = [model(subtokens, torch.arange(15) // 5, return_loss=True)[0].item() for model in models]
    assert log[200]["val_loss"] == pytest.approx(ema, rel=1e-5) and abs(ema - raw) > 1e-4


def test_non_finite_steps_are_skipped_and_stop_with_their_name(tmp_path, stage1, monkeypatch):
    true_loss, calls = ar_model.loss, []

    def loss(logits, subtokens):
        calls.append(1)
        factor = math.nan if len(calls) in (3, 5) or len(calls) > 8 else 1.0
        return true_loss([logits[0], logits[1] * factor], subtokens)
    monkeypatch.setattr(ar_model, "loss", loss)
    refused("loss/2 was not finite in 10 steps in a row", train, tmp_path, "--tokenizer", stage1[0],
            "--length", 30, "--checkpoint-every", 1)
    saved, log = newest(tmp_path), logged(tmp_path)
    assert len(calls) == 18 and saved["skipped"] == 2 and log[8]["skipped_steps"] == 2
    assert "loss" not in log[5] and math.isfinite(log[6]["loss"])
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.slow
def test_fine_tuning_keeps_what_fits_of_another_model(tmp_path, stage1, capsys):
    train(tmp_path / "a", "--tokenizer", stage1[0], "--length", 2)
    others = pathlib.Path(save_data(tmp_path / "others"))
    for part in ("train", "val"):
        (others / part / "bee").rename(others / part / "zebra")
    flags = ["--tokenizer", stage1[0], "--init-from", tmp_path / "a", "--length", 1, "--lr", 0]
    train(tmp_path / "b", *flags, "--data-path", others)
    a, b = newest(tmp_path / "a"), newest(tmp_path / "b")
    old, new = a["model"], b["model"]
    assert [a["classes"], b["classes"]] == [["ant", "bee", "cat"], ["ant", "cat", "zebra"]]
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"class_embedding.weight"}
    rows = new["class_embedding.weight"]
    assert torch.equal(rows[[0, 1, 3]], old["class_embedding.weight"][[0, 2, 3]])
    train(tmp_path / "c", *flags, "--image-size", 24, "--split", 2, 4)
    assert "anew: heads.0, heads.1, token_embeddings.0, token_embeddings.1" in capsys.readouterr().out
    assert torch.equal(newest(tmp_path / "c")["model"]["norm.weight"], old["norm.weight"])
    refused("; give --inter-blocks 1", train, tmp_path / "d", *flags, "--inter-blocks", 2)
    few = ["--data-path", save_data(tmp_path / "few", train=3), "--global-batch-size", 64]
    train(tmp_path / "e", *flags, *few)
    assert "--global-batch-size 64 is lowered to 9, as " in capsys.readouterr().out
    refused("64 is more than the 9", train, tmp_path / "f", "--tokenizer", stage1[0], *few)


@pytest.mark.parametrize("classes, kept", [([f"dir{i}" for i in range(1000)], 0), (None, 1000)],
                         ids=["numbers", "names"])
def test_a_thousand_classes_are_those_of_imagenet_by_name_alone(monkeypatch, classes, kept):
    small = ar_model.ARConfig(width=32, heads=2, inter_blocks=1, intra_blocks=1, bits=(2, 2), grid=(2, 2))
    published, model = ar_model.ARModel(small), ar_model.ARModel(small)
    info = {"classes": None, "tokenizer": None, "weights": "raw", "preset": "AR-B"}
    monkeypatch.setattr(checkpoints, "load_ar", lambda path: (published, None, info))
    train_ar.start_from("AR-B", model, classes or drawn.class_names(None, 1000), {"sha256": "x"})
    same = (model.class_embedding.weight == published.class_embedding.weight).all(1)
    assert int(same[:-1].sum()) == kept and same[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--mixed-precision", "bf16", *DROPOUT], ["--online", "--flip", "--num-workers", 1],
    ["--mixed-precision", "fp16", "--ema-decay", 0.9, "--weight-decay", 0, "--no-ema-warmup"],
    ["--split", 6, "--unconditional"],
    ["--separate-heads", "--token-precision", "bf16", "--val-size", 3],
    ["--preset", "AR-B", "--split", 2, 2, 2, "--intra-blocks", 2, "--warmup", 1]])
def test_every_training_flag_runs(tmp_path, stage1, flags):
    train(tmp_path, "--tokenizer", stage1[0], "--length", 3, "--val-every", 2, *flags)
    assert all(math.isfinite(v) for v in logged(tmp_path)[3].values() if isinstance(v, float))
    assert (tmp_path / "samples-00000003.png").stat().st_size > 100


def test_no_flags_take_the_newest_tokenizer_and_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for dry in ([], ["--dry-run"]):
        refused("no tokenizer .*runs/tokenizer", call, train_ar, *dry)
    pathlib.Path("runs/tokenizer").mkdir(parents=True)
    save_tokenizer("runs/tokenizer/step-00000001.pt", "nowhere")
    save_tokenizer("runs/tokenizer/step-00000002.pt", "generated-plain", bits=10, resolution=32)
    call(train_ar, "--dry-run")
    plan = capsys.readouterr().out
    assert "8 x 8 of 5 + 5 bits, by runs/tokenizer/step-00000002.pt" in plan
    assert "generated-plain, center crops of 20,000" in plan and not pathlib.Path("runs/ar").exists()


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "/no/such.pt"], "/no/such.pt"), (["--data-path", "/no/folder"], "/no/folder"),
    (["--split", 3, 4], "have 6; give --split 3 3"), (["--width", 33], "width 33"),
    (["--image-size", 18], "image-size 18"), (["--global-batch-size", 1000], "--global-batch-size 1000"),
    (["--length", "ten"], "--length"), (["--accumulation", 3], "--accumulation"), (["--flip"], "--flip"),
    (["--online", "--ten-crop"], "--ten-crop"), (["--resume", "/no/such.pt"], "/no/such.pt"),
    (["--token-dropout", 2], "token_dropout"), (["--preset", "AR-S"], "--preset"),
    (["--frames", 9], "--frames"), (["--nonsense"], "--nonsense"), (["--betas", 0.9, 1], "--betas"),
    (["--center-crop", "--online"], "--online"), (["--init-from", "/no/such.pt"], "/no/such.pt"),
    (["--results-dir", "/dev/null/x", "--dry-run"], "--results-dir: /dev/null may not be written to")])
def test_mistakes_are_one_line_and_exit_status_2(tmp_path, stage1, flags, message):
    flags = ["--results-dir", tmp_path / "run", *TINY, "--tokenizer", stage1[0], *flags]
    assert message in error_line(train_ar, *flags)
    assert not list(tmp_path.glob("run/*.pt"))


def test_the_vocabulary_must_be_a_power_of_two(tmp_path, stage1):
    for entries in (64, 60):
        save_tokenizer(tmp_path / f"{entries}.pt", quantizer="vq", codebook_size=entries)
    flags = ["--length", 2, "--data-path", pathlib.Path(stage1[1]) / "train", "--tokenizer"]
    train(tmp_path / "run", *flags, tmp_path / "64.pt")
    assert "val_loss" not in logged(tmp_path / "run")[2]                 # a flat folder: nothing is held out
    refused("60 ids .*have 5.907; train one", train, tmp_path / "other", *flags, tmp_path / "60.pt")


# ---- held out ---------------------------------------------------------------------------------------------

def build(*flags):
    """`build_datasets` of flags for images of 16 pixels."""
    return train_ar.build_datasets(train_ar.get_args([*map(str, flags), "--image-size", "16"]))


def test_held_out_classes_are_found_by_name(tmp_path, stage1):
    others = pathlib.Path(save_data(tmp_path / "others")) / "val"
    (others / "ant").rename(tmp_path / "gone")                           # bee and cat are left
    flags = ["--data-path", stage1[1], "--val-data-path", others]
    dataset, held_out = build(*flags)
    assert dataset.classes == held_out.classes == ["ant", "bee", "cat"] and len(held_out) == 10
    assert [int(held_out[i][1]) for i in range(10)] == [1] * 5 + [2] * 5
    (others / "cat").rename(others / "zebra")
    refused("lacks.*: zebra", build, *flags)
    assert build(*flags, "--unconditional")[1]
    shutil.move(others / "zebra" / "00.png", others / "00.png")
    for name in ("bee", "zebra"):
        shutil.rmtree(others / name)
    refused(r"has no classes, but", build, *flags)


@pytest.mark.parametrize("how, held", [("link", False), ("copy", False), ("other", True)])
def test_held_out_is_what_is_in_it_whatever_its_name(tmp_path, stage1, capsys, how, held):
    images = pathlib.Path(stage1[1]) / "train"
    other = tmp_path / "other"
    if how == "link":
        other.symlink_to(images)
    elif how == "copy":
        shutil.copytree(images, other)
    else:
        other = pathlib.Path(save_data(other, seed=1)) / "train"         # other pictures, of the same names
    assert bool(build("--data-path", images, "--val-data-path", other)[1]) == held
    assert ("no validation" in capsys.readouterr().out) == (not held)
