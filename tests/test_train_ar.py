"""Stage II: tokens are stored once and verified; the loop trains as published, and learns."""
import json
import math
import pathlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
from support import checkpoints, data, pictures, runtime, sources
import tokenizer as tok
import train_ar
import video
from helpers import call, error_line, logged, newest, refused, stored

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
    """(codes (rows, n, N), header) of a tokens file, read without the code under test."""
    header = json.loads((folder / f"{name}.json").read_text())
    return np.fromfile(folder / f"{name}.bin", "<i8").reshape(header["shape"]), header


def codes_of(path, x):
    """Codes (B, N) of uint8 images or clips."""
    return checkpoints.load_tokenizer(path)[0].encode(pictures.to_float(x)).flatten(1).numpy()


# ---- numbers of the paper ---------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, lr, warmup, epochs, tera", [
    ("AR-B", 3e-4, 6, 300, 0.569), ("AR-L", 3e-4, 6, 300, 1.337), ("AR-XL", 2.4e-4, 7, 350, 2.474)])
def test_presets_carry_the_published_recipe(preset, lr, warmup, epochs, tera, monkeypatch):
    args = train_ar.get_args(["--preset", preset, "--device", "cpu"])
    assert (args.lr, args.warmup, args.length) == (lr, f"{warmup}ep", f"{epochs}ep")
    assert (args.global_batch_size, args.weight_decay, args.final_lr, args.ema_decay) == (768, 0.05, 0.1, 0)
    config = runtime.config_from_args(ar_model.PRESETS[args.preset], args, bits=args.split)
    assert config == ar_model.PRESETS[preset]
    assert train_ar.flops_per_image(config) / 1e12 == pytest.approx(tera, abs=5e-4)
    assert "mfu" not in train_ar.in_units({"samples/s": 600}, config, args)
    args.device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    mfu = train_ar.in_units({"samples/s": 600}, config, args)["mfu"]
    assert mfu == pytest.approx(600 * tera / 989, rel=1e-3)


def test_all_parameters_decay_and_rate_changes_every_step(tmp_path, stage1):
    train(tmp_path, "--tokenizer", stage1[0], "--length", "0.4ep", "--warmup", "0.1ep", "--lr", 1e-3)
    group, = newest(tmp_path)["optimizer"]["param_groups"]               # one: even the norms' scales decay
    assert group["weight_decay"] == 0.05 and tuple(group["betas"]) == (0.9, 0.95)
    assert len(group["params"]) == len(newest(tmp_path)["model"])
    rates = [line["lr"] for _, line in sorted(logged(tmp_path).items())]
    assert rates == [1e-3 * runtime.learning_rate_factor(step, 12, 3, "plateau", 0.0) for step in range(12)]


# ---- tokens -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_stored_tokens_are_the_codes_of_images(tmp_path, stage1):
    path, images = stage1
    train(tmp_path / "a", "--tokenizer", path, "--length", 1, "--val-size", 4)
    some = data.evenly_spaced(4, 15)
    for name, split, rows in (("tokens", "train", range(120)), ("tokens-val", "val", some)):
        codes, header = tokens_in(tmp_path / "a", name)
        dataset = sources.build_dataset(images, split, data.View(16))
        expected = codes_of(path, torch.stack([dataset[i][0] for i in rows]))
        assert codes.shape == (len(rows), 1, 16) and (codes[:, 0] == expected).mean() > 0.999
        assert header["grid"] == [4, 4] and header["origin"] == f"{path} of {dataset.name}"
    train(tmp_path / "ten", "--tokenizer", path, "--length", 1, "--ten-crop")
    codes, _ = tokens_in(tmp_path / "ten")
    dataset = sources.build_dataset(images, "train", data.View(16, crop="ten"))
    assert codes.shape == (120, 10, 16) and (codes[77] == codes_of(path, dataset[77][0])).mean() > 0.99
    tokens = train_ar.Tokens(codes, dataset, range(120), [], 10 ** 6)
    drawn = {tuple(tokens.__getitems__([(77, (0, seed))])[0][0].tolist()) for seed in range(60)}
    assert drawn == {tuple(row) for row in codes[77].tolist()}


@pytest.mark.slow
def test_tokens_of_clips_come_in_t_y_x_order(tmp_path):
    folder = save_data(tmp_path / "clips", train=6, val=2, frames=12)
    path = save_tokenizer(tmp_path / "video.pt", folder, **CLIP_SHAPE)
    train(tmp_path / "a", "--tokenizer", path, "--length", 1)
    codes, header = tokens_in(tmp_path / "a")
    x = sources.build_dataset(folder, "train", data.View(16, 9))[4][0][None]
    ids = checkpoints.load_tokenizer(path)[0].encode(pictures.to_float(x))[0]          # (3, 2, 2)
    assert header["grid"] == [3, 2, 2] and codes.shape == (18, 1, 12)
    assert codes[4, 0].tolist() == [ids[t, y, x] for t in range(3) for y in range(2) for x in range(2)]
    # A clip has 12 tokens of 6 bits for 9 frames of 16 x 16 pixels, and training starts at all of them.
    assert logged(tmp_path / "a")[1]["bits_per_pixel"] == pytest.approx(12 * 6 / (9 * 16 * 16))
    assert (tmp_path / "a" / "samples-00000001.webp").exists()
    train(tmp_path / "b", "--tokenizer", path, "--frames", 5, "--length", 1, "--ten-crop")
    assert tokens_in(tmp_path / "b")[0].shape == (18, 10, 8)
    assert newest(tmp_path / "b")["config"]["grid"] == (2, 2, 2)
    for flags, message in ((["--frames", 10], "frames 10"), (["--split-list", "a.txt"], "--val-split-list"),
                           (["--data-path", "generated", "--ten-crop"], "mirror|--ten-crop")):
        refused(message, train, tmp_path / "d", "--tokenizer", path, *flags, kind=ValueError)


@pytest.mark.slow
def test_broken_images_stay_missing_and_are_skipped(tmp_path):
    images = pathlib.Path(save_data(tmp_path / "images"))
    (images / "train" / "bee" / "03.png").write_bytes(b"no image")
    flags = ["--tokenizer", save_tokenizer(tmp_path / "a.pt"), "--data-path", images, "--length", 30]
    train(tmp_path / "run", *flags)                                      # an epoch: every image is asked for
    codes, header = tokens_in(tmp_path / "run")
    assert header["missing"] == [43] and (codes[43] == train_ar.MISSING).all() and codes[44].max() < 64
    (images / "train" / "bee" / "04.png").write_bytes(b"no image")
    refused("broken, more than 1 %", train, tmp_path / "other", *flags)
    assert tokens_in(tmp_path / "other")[1]["missing"] is None           # not complete


def test_tokens_of_32_bits_are_stored_and_the_largest_is_not_missing(tmp_path, stage1):
    path = save_tokenizer(tmp_path / "a.pt", stage1[1], bits=32, groups=4)
    stored = torch.load(path)
    stored["model"]["encoder.conv_out.bias"].fill_(1e3)                  # every bit on
    torch.save(stored, path)
    flags = ["--tokenizer", path, "--length", 2, "--tokens", tmp_path / "tokens.bin"]
    train(tmp_path / "run", *flags, "--split", 8, 8, 8, 8)
    codes, header = tokens_in(tmp_path)
    assert (codes == 2 ** 32 - 1).all() and header["missing"] == []
    log = logged(tmp_path / "run")
    assert log[1]["bits"] == pytest.approx(32) and math.isfinite(log[2]["val_loss"])
    assert (tmp_path / "run" / "samples-00000002.png").exists()          # drawn ids fit the tokenizer
    refused("24 bits at most", train, tmp_path / "other", *flags, "--split", 25, 7, kind=ValueError)


def test_damaged_codes_are_not_trained_on(tmp_path, stage1):
    flags = ["--tokenizer", stage1[0], "--tokens", tmp_path / "tokens.bin", "--length", 1]
    train(tmp_path / "a", *flags)
    codes = np.fromfile(tmp_path / "tokens.bin", np.int64)
    codes[:] = 64                                                        # of 2^6 codes, none has this number
    codes.tofile(tmp_path / "tokens.bin")
    refused("more than 1 %", train, tmp_path / "b", *flags)


@pytest.mark.slow
def test_other_tokens_and_runs_are_refused_with_both_names(tmp_path, stage1):
    path, images = stage1
    tokens = tmp_path / "tokens.bin"
    flags = ["--tokenizer", path, "--tokens", tokens, "--length", 1]
    train(tmp_path / "a", *flags)
    other = save_tokenizer(tmp_path / "other.pt", images, seed=1)
    others = save_data(tmp_path / "others", seed=1)
    for folder, more, message in (
            ("b", ["--tokenizer", other], f"{re.escape(path)}.*{re.escape(other)}.*tokenizer: "),
            ("b", ["--data-path", others], f"{re.escape(images)}.*{re.escape(others)}.*data: "),
            ("b", ["--image-size", 8], "grid: .4, 4. there"), ("b", ["--ten-crop"], "crops: 'center' there"),
            ("b", ["--token-precision", "bf16"], "precision: 'fp32' there, 'bf16' here"),
            ("a", [], "--resume"), ("a", ["--resume", path], "not a training checkpoint"),
            ("a", ["--resume", "--inter-blocks", 2], "inter_blocks: 1 there"),
            ("a", ["--resume", "--global-batch-size", 8], "global_batch_size: 4"),
            ("a", ["--resume", "--ema-decay", 0.9, "--weight-decay", 0], "ema_decay.*weight_decay"),
            ("a", ["--resume", "--tokenizer", other], "the tokenizer differs"),
            ("a", ["--resume", "--data-path", others], "the dataset differs")):
        refused(message, train, tmp_path / folder, *flags, *more)
    moved = pathlib.Path(images).rename(tmp_path / "moved")              # the same images in another place
    train(tmp_path / "a", *flags, "--data-path", moved, "--resume", "--length", 2)
    moved.rename(images)
    tokens.write_bytes(tokens.read_bytes()[:-1])
    refused("tokens.*not what it claims to be", train, tmp_path / "d", *flags)


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
def test_images_are_learned_by_heart(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "a.pt", save_data(tmp_path / "images", train=2, val=1))
    train(tmp_path / "run", "--label-dropout", 0, "--tokenizer", tokenizer, "--length", 300, "--lr", 1e-2,
          "--warmup", 10, "--global-batch-size", 6)
    log = logged(tmp_path / "run")
    assert log[1]["loss"] == pytest.approx(6 * math.log(2)) and log[1]["bits"] == pytest.approx(6)
    assert log[1]["loss/1"] + log[1]["loss/2"] == pytest.approx(log[1]["loss"])
    assert log[1]["perplexity"] == pytest.approx(64)
    assert log[1]["bits_per_pixel"] == pytest.approx(6 * 16 / 256)
    assert log[300]["bits"] < 0.5 < 6 < log[300]["val_bits"]             # noise held out cannot be known


def test_validation_is_of_the_ema_on_all_held_out(tmp_path, stage1):
    train(tmp_path, *DROPOUT, "--tokenizer", stage1[0], "--length", 5, "--ema-decay", 0.9, "--lr", 1e-2)
    codes, _ = tokens_in(tmp_path, "tokens-val")
    subtokens = ar_model.ids_to_subtokens(torch.from_numpy(codes[:, 0].astype(np.int64)), (3, 3))
    losses = []
    for ema in (True, False):
        model, _, info = checkpoints.load_ar(runtime.latest_checkpoint(tmp_path), ema=ema)
        losses.append(model(subtokens, torch.arange(15) // 5, return_loss=True)[0].item())
    assert logged(tmp_path)[5]["val_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4


def test_non_finite_steps_are_skipped_and_stop_with_their_name(tmp_path, stage1, monkeypatch):
    true_loss, calls = ar_model.loss, []

    def loss(logits, subtokens):
        calls.append(1)
        factor = math.nan if len(calls) in (3, 5) or len(calls) > 8 else 1.0
        return true_loss([logits[0], logits[1] * factor], subtokens)
    monkeypatch.setattr(ar_model, "loss", loss)
    with pytest.raises(runtime.UserError, match="loss/2 was not finite in 10 steps in a row"):
        train(tmp_path, "--tokenizer", stage1[0], "--length", 30, "--checkpoint-every", 1)
    saved, log = newest(tmp_path), logged(tmp_path)
    assert saved["skipped"] == 2 and log[8]["skipped_steps"] == 2
    assert "loss" not in log[5] and math.isfinite(log[6]["loss"])
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.slow
def test_fine_tuning_keeps_what_fits_of_another_model(tmp_path, stage1, capsys):
    train(tmp_path / "a", "--tokenizer", stage1[0], "--length", 2)
    start = runtime.latest_checkpoint(tmp_path / "a")
    old = newest(tmp_path / "a")["model"]
    others = pathlib.Path(save_data(tmp_path / "others"))
    for part in ("train", "val"):
        (others / part / "bee").rename(others / part / "zebra")
    flags = ["--tokenizer", stage1[0], "--init-from", start, "--length", 1, "--lr", 0]
    train(tmp_path / "b", *flags, "--data-path", others)
    new = newest(tmp_path / "b")["model"]
    classes = [newest(tmp_path / name)["classes"] for name in "ab"]
    assert classes == [["ant", "bee", "cat"], ["ant", "cat", "zebra"]]
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"class_embedding.weight"}
    rows = new["class_embedding.weight"]
    assert torch.equal(rows[[0, 1, 3]], old["class_embedding.weight"][[0, 2, 3]])
    train(tmp_path / "c", *flags, "--image-size", 24, "--split", 2, 4)
    assert "anew: heads.0, heads.1, token_embeddings.0, token_embeddings.1" in capsys.readouterr().out
    assert torch.equal(newest(tmp_path / "c")["model"]["norm.weight"], old["norm.weight"])
    with pytest.raises(runtime.UserError, match="not expected: inter_blocks|missing: inter_blocks"):
        train(tmp_path / "d", *flags, "--inter-blocks", 2)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--mixed-precision", "bf16", *DROPOUT], ["--online", "--flip", "--num-workers", 1],
    ["--mixed-precision", "fp16", "--ema-decay", 0.9, "--weight-decay", 0], ["--split", 6, "--unconditional"],
    ["--separate-heads", "--token-precision", "bf16", "--val-size", 3],
    ["--preset", "AR-B", "--split", 2, 2, 2, "--intra-blocks", 2, "--warmup", 1]])
def test_every_training_flag_runs(tmp_path, stage1, flags):
    train(tmp_path, "--tokenizer", stage1[0], "--length", 3, "--val-every", 2, *flags)
    assert all(math.isfinite(v) for v in logged(tmp_path)[3].values() if isinstance(v, float))
    assert (tmp_path / "samples-00000003.png").stat().st_size > 100


def test_no_flags_take_the_newest_tokenizer_and_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused("no tokenizer .*runs/tokenizer", call, train_ar)
    pathlib.Path("runs/tokenizer").mkdir(parents=True)
    save_tokenizer("runs/tokenizer/step-00000001.pt", "nowhere")
    save_tokenizer("runs/tokenizer/step-00000002.pt", "generated-plain", bits=10, resolution=32)
    call(train_ar, "--dry-run")
    plan = capsys.readouterr().out
    assert "8 x 8 of 5 + 5 bits, by runs/tokenizer/step-00000002.pt" in plan
    assert "generated-plain, 20,000" in plan
    assert not pathlib.Path("runs/ar").exists()


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "/no/such.pt"], "/no/such.pt"), (["--data-path", "/no/folder"], "/no/folder"),
    (["--split", 3, 4], "--split 3 + 4 are 7 bits"), (["--width", 33], "width 33"),
    (["--image-size", 18], "image-size 18"), (["--global-batch-size", 1000], "--global-batch-size 1000"),
    (["--length", "ten"], "--length"), (["--accumulation", 3], "--accumulation"), (["--flip"], "--flip"),
    (["--online", "--ten-crop"], "--ten-crop"), (["--resume", "/no/such.pt"], "/no/such.pt"),
    (["--token-dropout", 2], "token_dropout"), (["--preset", "AR-S"], "--preset"),
    (["--frames", 9], "--frames"), (["--nonsense"], "--nonsense")])
def test_mistakes_are_one_line_and_exit_status_2(tmp_path, stage1, flags, message):
    flags = ["--results-dir", tmp_path / "run", *TINY, "--tokenizer", stage1[0], *flags]
    assert message in error_line(train_ar, *flags)
    assert not list(tmp_path.glob("run/*.pt"))


def test_codes_must_be_a_power_of_two(tmp_path, stage1):
    for entries in (64, 60):
        path = save_tokenizer(tmp_path / f"{entries}.pt", quantizer="vq", codebook_size=entries)
        flags = ["--tokenizer", path, "--length", 2, "--data-path", pathlib.Path(stage1[1]) / "train"]
        if entries == 64:
            train(tmp_path / "run", *flags)
    assert "val_loss" not in logged(tmp_path / "run")[2]                 # a flat folder: nothing is held out
    refused("60 codes .*have 5.907", train, tmp_path / "other", *flags)
