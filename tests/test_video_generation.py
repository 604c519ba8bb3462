"""Stage II on clips: the same transformer, trainer and sampler on tokens with a third axis, and FVD."""
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
import data
import evaluate
import runtime
import sample
import tokenizer as tok
import video
from helpers import assert_same, logged, newest
from test_evaluate import QuickI3D, call, results, values
from test_train_ar import NO_DROPOUT, TINY, run_ranks, tokens_in, train
from test_train_ar import one_thread                                     # noqa: F401, for all tests here, too

# 9 frames of 16 x 16 to 3 x 2 x 2 tokens of 6 bits: no two axes of a clip are equally long.
CONFIG = video.VideoTokenizerConfig(resolution=16, channels=32, channel_multipliers=(1, 1, 1), blocks=1,
                                    mid_blocks=0, patch=2, bits=6, frames=9, time_strides=(2, 2))


def save_video_tokenizer(path, seed=0, args=None, config=CONFIG):
    """A checkpoint as `video.py train` leaves it, untrained; biases and norms are random, too."""
    torch.manual_seed(seed)
    model = video.VideoTokenizer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    runtime.save_checkpoint(path, {"format": model.format, "config": tok.config_to_dict(config), "step": 7,
                                   "model": model.state_dict(), "ema": {}, "args": args or {}})
    return str(path)


def save_clips(folder, train=6, val=2, frames=12):
    """Noise of 18 x 20 pixels in three classes, in train/ and test/."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", val)):
        for name in ("run", "sit", "walk"):
            for i in range(count):
                pixels = generator.integers(0, 256, (frames, 18, 20, 3), dtype=np.uint8)
                data.write_video(folder / split / name / f"v_{name}_{i:02d}.gif", pixels)
    return str(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """(path of a video tokenizer, folder of the clips that it says it was trained on)."""
    folder = tmp_path_factory.mktemp("clips")
    path = save_clips(folder / "clips")
    return save_video_tokenizer(folder / "video.pt", args={"data_path": path}), path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clips):
    """(checkpoint of an AR model of clips of three classes, that of its tokenizer), hardly trained."""
    folder = tmp_path_factory.mktemp("trained") / "ar"
    train(folder, *TINY, "--tokenizer", clips[0], "--length", 20, "--lr", 1e-2)
    return str(runtime.latest_checkpoint(folder)), clips[0]


def draw(*flags):
    """Run sample.py in this process."""
    sample.main(sample.get_args([str(flag) for flag in flags]))


# ---- tokens and training ----------------------------------------------------------------------------------

def test_stored_tokens_are_the_codes_of_the_central_clip_of_every_video_in_t_y_x_order(tmp_path, clips):
    train(tmp_path, *TINY, "--tokenizer", clips[0], "--length", 1)
    codes, header = tokens_in(tmp_path / "tokens.bin")
    dataset, model = data.build_clips(clips[1], "train", 16, 9), video.load_video_tokenizer(clips[0])[0]
    assert header["grid"] == [3, 2, 2] and codes.shape == (18, 1, 12)
    assert header["classes"] == ["run", "sit", "walk"]
    for i in range(18):
        ids = model.encode(data.to_float(dataset[i][0][None]))                        # (1, 3, 2, 2)
        assert codes[i, 0].tolist() == [ids[0, t, y, x] for t in range(3) for y in range(2) for x in range(2)]
    assert len(tokens_in(tmp_path / "tokens-val.bin")[0]) == 6
    state = newest(tmp_path)
    assert state["config"]["grid"] == (3, 2, 2) and state["classes"] == header["classes"]
    # A clip has 12 tokens of 6 bits for 9 frames of 16 x 16 pixels, and training starts at all of them.
    assert logged(tmp_path)[1]["bits_per_pixel"] == pytest.approx(12 * 6 / (9 * 16 * 16))


def test_ten_crops_of_a_video_are_five_clips_from_its_first_frame_to_its_last_and_mirrored(tmp_path, clips):
    train(tmp_path, *TINY, "--tokenizer", clips[0], "--length", 1, "--ten-crop")
    codes, header = tokens_in(tmp_path / "tokens.bin")
    model = video.load_video_tokenizer(clips[0])[0]
    assert codes.shape == (18, 10, 12) and header["flips"]
    folder = data.build_clips(clips[1], "train", 16, 12)                 # the whole videos
    whole = folder[4][0]
    for i, first in enumerate((0, 1, 2, 2, 3)):                          # of 3 spare frames
        part = data.to_float(whole[None, :, first:first + 9])
        for k, x in ((i, part), (i + 5, part.flip(-1))):
            assert codes[4, k].tolist() == model.encode(x).flatten().tolist()


def test_a_short_or_broken_video_is_skipped_in_training_and_counted(tmp_path):
    folder = pathlib.Path(save_clips(tmp_path / "clips", train=40))
    data.write_video(folder / "train" / "run" / "v_run_07.gif", np.zeros((8, 18, 20, 3), np.uint8))
    path = save_video_tokenizer(tmp_path / "video.pt", args={"data_path": str(folder)})
    train(tmp_path / "run", *TINY, "--tokenizer", path, "--length", 1)
    assert tokens_in(tmp_path / "run" / "tokens.bin")[1]["missing"] == [7]


@pytest.mark.parametrize("flags", [[], ["--online"]], ids=["stored", "online"])
def test_resumed_is_bit_identical_and_two_ranks_equal_one(tmp_path, clips, flags):
    flags = [*TINY, *NO_DROPOUT, *flags, "--tokenizer", clips[0]]
    train(tmp_path / "whole", *flags, "--length", 6, "--checkpoint-every", 3)
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole" / "step-00000003.pt", tmp_path / "cut")
    train(tmp_path / "cut", *flags, "--length", 6, "--resume")
    for part in ("model", "optimizer", "rng"):
        assert_same(newest(tmp_path / "whole")[part], newest(tmp_path / "cut")[part])
    run_ranks("train_ar", *flags, "--length", 6, "--results-dir", tmp_path / "two", ranks=2)
    one, two = newest(tmp_path / "whole")["model"], newest(tmp_path / "two")["model"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)


def test_clips_of_three_classes_are_learned_by_heart_and_drawn_again(tmp_path):
    folder = save_clips(tmp_path / "clips", train=1, val=1, frames=9)
    path = save_video_tokenizer(tmp_path / "video.pt", args={"data_path": folder})
    train(tmp_path / "run", *TINY, *NO_DROPOUT, "--tokenizer", path, "--length", 200, "--lr", 1e-2,
          "--global-batch-size", 3)
    assert logged(tmp_path / "run")[200]["bits"] < 0.05
    ckpt = runtime.latest_checkpoint(tmp_path / "run")
    draw("--ckpt", ckpt, "--num-fid-samples", 3, "--temperature", 0, "--cfg-scale", 1,
         "--output", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        drawn = file["arr_0"]                                            # (3, 9, 16, 16, 3)
    model, dataset = video.load_video_tokenizer(path)[0], data.build_clips(folder, "train", 16, 9)
    for i in range(3):
        expected = runtime.to_uint8(model.decode(model.encode(data.to_float(dataset[i][0][None]))))[0]
        assert np.abs(drawn[i].astype(int) - video.as_frames(expected)).max() <= 1
    assert not np.array_equal(drawn[0], drawn[1])


def test_the_tokenizers_data_and_split_lists_are_the_default(tmp_path, clips):
    folder = pathlib.Path(clips[1]) / "train"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gif"))
    (tmp_path / "train.txt").write_text("".join(f"{file} 1\n" for file in files if "_00" not in file))
    (tmp_path / "test.txt").write_text("".join(f"{file}\n" for file in files if "_00" in file))
    path = save_video_tokenizer(tmp_path / "video.pt", args={
        "data_path": str(folder), "split_list": str(tmp_path / "train.txt"),
        "val_split_list": str(tmp_path / "test.txt")})
    train(tmp_path / "run", *TINY, "--tokenizer", path, "--length", 1)
    assert tokens_in(tmp_path / "run" / "tokens.bin")[1]["shape"] == [15, 1, 12]
    assert tokens_in(tmp_path / "run" / "tokens-val.bin")[1]["shape"] == [3, 1, 12]


def test_longer_clips_than_the_tokenizers_can_be_learned(tmp_path, clips):
    path = save_clips(tmp_path / "clips", frames=14)
    train(tmp_path / "run", *TINY, "--tokenizer", clips[0], "--data-path", path, "--frames", 13,
          "--length", 1)
    assert newest(tmp_path / "run")["config"]["grid"] == (4, 2, 2)


@pytest.mark.parametrize("flags, message", [
    (["--frames", 10], "--frames 10: must be 1 [+] a multiple of 4"),
    (["--image-size", 20], "--image-size 20"),
    (["--split", 3, 4], "7 bits.*has 6"), (["--data-path", "nowhere"], "nowhere"),
    (["--split-list", "a.txt"], "--split-list and --val-split-list"),
    (["--data-path", "generated", "--ten-crop"], "--ten-crop: mirrored"),
    (["--data-path", "generated", "--online", "--flip"], "--flip: mirrored")])
def test_mistakes_with_clips_name_the_flag(tmp_path, clips, flags, message):
    with pytest.raises(runtime.UserError, match=message):
        train(tmp_path, *TINY, "--tokenizer", clips[0], "--length", 1, *flags)


def test_flags_of_clips_are_refused_for_images(tmp_path):
    from test_train_ar import save_images, save_tokenizer
    path = save_tokenizer(tmp_path / "a.pt", save_images(tmp_path / "images", train=2, val=1))
    for flags in (["--frames", 9], ["--split-list", "a", "--val-split-list", "b"]):
        with pytest.raises(runtime.UserError, match=f"{flags[0]} is for clips"):
            train(tmp_path / "run", *TINY, "--tokenizer", path, "--length", 1, *flags)


# ---- sampling ---------------------------------------------------------------------------------------------

def test_previews_and_grids_are_animations_with_a_strip_beside(tmp_path, trained):
    run = pathlib.Path(trained[0]).parent
    with Image.open(run / "samples-00000020.webp") as picture:
        assert picture.n_frames == 9
    assert Image.open(run / "samples-00000020.png").size == (6 * 66 + 2, 3 * 80 + 2)
    for suffix in (".gif", ".webp"):
        draw("--ckpt", trained[0], "--num-images", 2, "--output", tmp_path / f"a{suffix}", "--save-images")
        frames = data.read_video(tmp_path / f"a{suffix}")
        assert frames.shape == (9, 3 * 112 + 2, 2 * 98 + 2, 3)           # 3 classes x 2 of 96, with captions
        assert Image.open(tmp_path / "a.png").size == (6 * 98 + 2, 3 * 112 + 2)
        assert json.loads((tmp_path / "a.json").read_text())["classes"] == ["run", "sit", "walk"]
        assert len(list((tmp_path / "a").glob(f"class-000?-00?{suffix}"))) == 6
    # The grid's third clip is the first of class 1: number 1 of the set, alone in its file, and in the PNG.
    alone = data.read_video(tmp_path / "a" / "class-0001-000.webp")
    grid = data.read_video(tmp_path / "a.webp")
    assert np.array_equal(grid[:, 2 + 112:2 + 112 + 96, 2:98], alone.repeat(6, axis=1).repeat(6, axis=2))
    row = np.asarray(Image.open(tmp_path / "a.png"))[2 + 112:2 + 112 + 96]
    assert np.array_equal(row[:, 2 + 5 * 98:98 + 5 * 98], grid[8, 2 + 112:2 + 112 + 96, 2:98])


def test_a_set_of_clips_is_the_same_on_one_and_two_ranks(tmp_path, trained):
    flags = ["--ckpt", trained[0], "--num-fid-samples", 10, "--batch-size", 4]
    draw(*flags, "--output", tmp_path / "1.npz")
    run_ranks("sample", *flags, "--output", tmp_path / "2.npz", ranks=2)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    with np.load(tmp_path / "1.npz") as file:
        drawn = file["arr_0"]
    assert drawn.shape == (10, 9, 16, 16, 3) and len({clip.tobytes() for clip in drawn}) == 10
    model, decoder, _ = sample.load(trained[0])
    ar_model.prepare_for_sampling(model)
    first, = sample.generate(model, decoder, [0, 1, 2, 0], [(0, n) for n in range(4)], 4, cfg_scale=2.0)
    assert np.array_equal(first.movedim(1, -1), drawn[:4])


def test_images_are_not_mistaken_for_clips(tmp_path, trained, monkeypatch):
    for name in ("a.png", "a.npz"):
        with pytest.raises(runtime.UserError, match="this writes a .webp or .gif or .mp4"):
            draw("--ckpt", trained[0], "--output", tmp_path / name)
    from test_train_ar import save_tokenizer
    other = save_tokenizer(tmp_path / "image.pt")
    with pytest.raises(runtime.UserError, match="is not the one that"):
        draw("--ckpt", trained[0], "--tokenizer", other)


# ---- FVD --------------------------------------------------------------------------------------------------

def test_fvd_is_the_distance_of_features_of_samples_and_of_as_many_real_clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "I3D", QuickI3D)
    drawn = np.random.default_rng(0).integers(0, 256, (7, 9, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "clips.npz", drawn)
    (tmp_path / "clips.json").write_text('{"cfg_scale": 2}')
    for size in (3, 4):
        call("video-generation", "--samples", "clips.npz", "--allow-random-weights", "--protocol", "seed",
             "--batch-size", size)
    first, second = results()
    assert values(first) == pytest.approx(values(second), rel=1e-6)
    real = data.build_clips(None, "train", 32, frames=9)
    real = torch.stack([real[10_000 * k // 7][0] for k in range(7)])
    i3d = evaluate.randomise(QuickI3D(0))
    with torch.no_grad():
        features = [i3d(evaluate.i3d_input(c)).double().numpy()
                    for c in (real.transpose(1, 2), torch.from_numpy(drawn).permute(0, 1, 4, 2, 3))]
    statistics = [array for f in features for array in (f.mean(0), np.cov(f.T))]
    expected = evaluate.frechet_distance(*statistics, 7, 7)
    assert values(first)["fvd"] == pytest.approx(expected, rel=1e-5)
    assert values(first)["fvd-float32"] == pytest.approx(expected, rel=0.05)
    assert first["n"] == 7 and first["sampling"] == {"cfg_scale": 2} and first["data"]["split"] == "train"
    assert first["metrics"]["fvd"]["label"] == evaluate.RANDOM_LABEL


def test_samples_of_another_kind_are_clear_errors(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    for name, shape in (("images", (5, 16, 16, 3)), ("clips", (5, 9, 16, 16, 3)),
                        ("short", (5, 8, 16, 16, 3)), ("wide", (5, 9, 16, 24, 3))):
        np.savez(tmp_path / f"{name}.npz", np.zeros(shape, np.uint8))
    for flags, message in (
            (["video-generation", "--samples", "images.npz"], r"not \(N, T, H, W, 3\)"),
            (["video-generation", "--samples", "short.npz"], "9 frames or more, these have 8"),
            (["video-generation", "--samples", "wide.npz"], "make square ones"),
            (["video-generation", "--samples", "none.npz"], "does not exist"),
            (["video-generation"], "no samples"),
            (["generation", "--samples", "clips.npz", "--allow-random-weights"], "with video-generation"),
            (["generation", "--ckpt", trained[0], "--allow-random-weights"], "with video-generation")):
        with pytest.raises(runtime.UserError, match=message):
            call(*flags)
