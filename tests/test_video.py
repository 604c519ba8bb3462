"""video.py is the published function, causal but for its norms, and an inflated image tokenizer on one
frame."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import runtime
import tokenizer as tok
import train_tokenizer as stage1
import video
from helpers import ROOT, fill_module, golden, logged, newest, run_script

CHECKPOINTS = ROOT.parent / "shared" / "spec" / "checkpoints.json"
TINY = video.VideoTokenizerConfig(resolution=16, channels=32, channel_multipliers=(1, 2, 2, 2), blocks=1,
                                  mid_blocks=1, bits=6, frames=5)
TINY_IMAGE = tok.TokenizerConfig(resolution=16, channels=32, channel_multipliers=(1, 2, 2, 2), blocks=1,
                                 mid_blocks=1, bits=6)


def official(name):
    """Our parameter names to the official ones: a `.conv_1` inside each convolution."""
    parts = name.split(".")
    is_conv = parts[-2] in ("conv_in", "conv_out", "conv1", "conv2", "nin_shortcut", "downsample")
    return ".".join([*parts[:-1], "conv_1", parts[-1]]) if is_conv else name


def random_model(kind, config, seed=0):
    """A model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def clip(frames, height=16, width=16, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


# ---- the published function -------------------------------------------------------------------------------

def test_encoder_codes_and_decoder_equal_the_official_ones():
    expected = golden("video_tokenizer")
    config = video.VideoTokenizerConfig(resolution=16, channels=32, blocks=1, mid_blocks=1)
    model = fill_module(video.VideoTokenizer(config), "", official)
    with torch.no_grad():
        reconstruction, z, _, ids = model(expected["x"])
    torch.testing.assert_close(z, expected["encoder_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(reconstruction, expected["reconstruction"], atol=1e-5, rtol=0)
    assert torch.equal(ids.flatten(), expected["index"].flatten())
    torch.testing.assert_close(model.decode(ids), reconstruction, atol=1e-5, rtol=0)


def test_3d_patchgan_equals_the_official_one():
    expected = golden("gan")
    critic = fill_module(video.patchgan_3d(), "loss.discriminator.")
    with torch.no_grad():
        torch.testing.assert_close(critic(expected["x3d"]), expected["patchgan3d"], atol=1e-5, rtol=0)


@pytest.mark.skipif(not CHECKPOINTS.exists(), reason="the list of published names is not here")
def test_ucf_128_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model, critic = video.VideoTokenizer(video.PRESETS["ucf-128"]), video.patchgan_3d()
    published = json.loads(CHECKPOINTS.read_text())["video_128_262144.ckpt"]["state_dict"]
    ours = {official(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
    ours.update({f"loss.discriminator.{name}": list(t.shape) for name, t in critic.state_dict().items()})
    assert ours == published


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        model = video.VideoTokenizer(video.PRESETS["ucf-128"])
    for part, millions in ((model.encoder, 144.87), (model.decoder, 225.68)):
        assert round(sum(p.numel() for p in part.parameters()) / 1e6, 2) == millions


# ---- shapes -----------------------------------------------------------------------------------------------

def test_17_frames_become_5_steps_of_codes_and_17_frames_again():
    config = video.VideoTokenizerConfig(resolution=16, channels=32, blocks=1, mid_blocks=0, bits=6)
    assert config.time_stride == 4 and config.downsampling == 8
    model, sizes, handles = random_model(video.VideoTokenizer, config), {}, []
    for part, levels in (("encoder", model.encoder.down), ("decoder", model.decoder.up)):
        for i, level in enumerate(levels):
            handles.append(level.block[0].register_forward_hook(
                lambda m, x, y, key=(part, i): sizes.update({key: tuple(y.shape[2:])})))
    ids = model.encode(clip(17))
    assert ids.shape == (1, 5, 2, 2) and model.decode(ids).shape == (1, 3, 17, 16, 16)
    # T 17 -> 17 -> 9 -> 5, and 5 -> 9 -> 17 -> 17: levels are numbered from the shallowest in both.
    for part in ("encoder", "decoder"):
        assert [sizes[part, i] for i in range(4)] == [(17, 16, 16), (17, 8, 8), (9, 4, 4), (5, 2, 2)]


@pytest.mark.parametrize("config", [TINY, video.PRESETS["toy"]])
def test_every_1_plus_4k_frames_come_back(config):
    model = random_model(video.VideoTokenizer, config)
    for frames in (1, 5, 9, 13, 17):
        x = clip(frames, 32, 16)
        ids = model.encode(x)
        assert ids.shape[1] == 1 + (frames - 1) // 4
        assert model.decode(ids).shape == x.shape


@pytest.mark.parametrize("changes", [
    {"upsampler": "nearest"}, {"downsampler": "average"}, {"patch": 2}, {"adaptive_norm": False},
    {"quantizer": "vq", "codebook_size": 100}, {"channel_multipliers": (1, 1, 2), "time_strides": (1, 1)}])
def test_switches_keep_the_length_of_a_clip_and_train_all_parameters(changes):
    config = video.VideoTokenizerConfig(**{**vars(TINY), "time_strides": (), **changes})
    model = random_model(video.VideoTokenizer, config)
    x = clip(5)
    reconstruction, z, q, _ = model(x)
    assert reconstruction.shape == x.shape
    (reconstruction.square().mean() + (q - z).square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_wrong_clips_and_configs_are_clear_errors():
    model = video.VideoTokenizer(TINY)
    for x in (clip(4), clip(5, 12), clip(1)[:, :, 0], clip(5)[:, :1], clip(1, 8, 8)):
        with pytest.raises(runtime.UserError):
            model.encode(x)
    with pytest.raises(runtime.UserError, match="t, h, w"):
        model.decode(torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(runtime.UserError, match="another tokenizer"):
        model.decode(torch.full((1, 2, 2, 2), 64))
    for changes in ({"frames": 6}, {"time_strides": (2,)}, {"time_strides": (3, 2, 2)}, {"frames": 0}):
        with pytest.raises(runtime.UserError):
            video.VideoTokenizerConfig(**{**vars(TINY), **changes})


# ---- depth to space in three dimensions -------------------------------------------------------------------

def test_depth_to_space_is_in_the_order_dt_dy_dx_and_the_second_frame_is_dropped():
    channels, block = 3, (2, 2, 2)
    x = torch.randn(1, 8 * channels, 3, 2, 2)
    y = tok.depth_to_space(x, block)
    for dt, dy, dx, c in itertools.product(*map(range, (*block, channels))):
        assert torch.equal(y[:, c, dt::2, dy::2, dx::2], x[:, ((dt * 2 + dy) * 2 + dx) * channels + c])
    frames = torch.arange(6.0).view(1, 1, 6, 1, 1)
    assert video.drop_second_frame(frames).flatten().tolist() == [0, 2, 3, 4, 5]
    assert video.drop_second_frame(frames[:, :, :2]).flatten().tolist() == [0]


# ---- causality --------------------------------------------------------------------------------------------

class FixedNorm(nn.Module):
    """A norm whose statistics are held fixed: one scale and shift a channel, whatever comes in."""

    def __init__(self, channels):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))

    def forward(self, x, q=None):
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def with_fixed_norms(model):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, tok.AdaptiveGroupNorm):
                setattr(parent, name, FixedNorm(child.norm.num_channels))
            elif isinstance(child, nn.GroupNorm):
                setattr(parent, name, FixedNorm(child.num_channels))
    return model


CAUSAL = {"published": {}, "nearest": {"upsampler": "nearest"}, "average": {"downsampler": "average"}}


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_changing_a_frame_leaves_all_earlier_codes_bit_identical(changes):
    model = with_fixed_norms(random_model(video.VideoTokenizer, video.VideoTokenizerConfig(
        **{**vars(TINY), "frames": 17, **changes})))
    with torch.no_grad():
        x = clip(17)
        z = model.encoder(x)
        for t in range(17):
            changed = x.clone()
            changed[:, :, t] = -changed[:, :, t]
            z_changed, first = model.encoder(changed), math.ceil(t / 4)    # token i ends with frame 4 i
            assert torch.equal(z_changed[:, :, :first], z[:, :, :first])
            assert not torch.equal(z_changed[:, :, first], z[:, :, first])


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_changing_a_code_leaves_all_earlier_frames_bit_identical(changes):
    model = with_fixed_norms(random_model(video.VideoTokenizer, video.VideoTokenizerConfig(
        **{**vars(TINY), "frames": 17, **changes})))
    with torch.no_grad():
        q = torch.where(torch.randn(1, 6, 5, 2, 2) > 0, 1.0, -1.0)
        x = model.decoder(q)
        for t in range(5):
            changed = q.clone()
            changed[:, :, t] = -changed[:, :, t]
            x_changed, first = model.decoder(changed), max(0, 4 * t - 3)   # token i begins with frame 4 i - 3
            assert torch.equal(x_changed[:, :, :first], x[:, :, :first])
            assert not torch.equal(x_changed[:, :, first], x[:, :, first])


def test_group_norm_does_couple_frames_as_the_docstring_says():
    model = random_model(video.VideoTokenizer, TINY)
    x = clip(5)
    changed = x.clone()
    changed[:, :, 4] = 0
    with torch.no_grad():
        assert not torch.equal(model.encoder(x)[:, :, 0], model.encoder(changed)[:, :, 0])
    assert "GroupNorm" in video.__doc__


def test_the_first_frame_alone_takes_the_short_way_to_the_same_numbers():
    torch.manual_seed(0)
    for stride in (1, (2, 2, 2)):
        conv, x = video.CausalConv3d(4, 5, 3, stride=stride, padding=1), torch.randn(2, 4, 1, 6, 6)
        padded = torch.cat([torch.zeros(2, 4, 2, 6, 6), x], dim=2)
        torch.testing.assert_close(conv(x), nn.Conv3d.forward(conv, padded))


# ---- inflation --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"upsampler": "nearest"}, {"downsampler": "average"}, {"patch": 2},
                                     {"quantizer": "vq", "codebook_size": 50, "codebook_channels": 8}])
def test_an_inflated_model_on_one_frame_is_the_image_model(changes):
    image = random_model(tok.Tokenizer, tok.TokenizerConfig(**{**vars(TINY_IMAGE), **changes}))
    model = random_model(video.VideoTokenizer, video.VideoTokenizerConfig(
        **{**vars(TINY), **changes}), seed=1)
    video.inflate(image.state_dict(), model)
    x = clip(1, 16, 32, batch=2)
    with torch.no_grad():
        expected, got = image(x[:, :, 0]), model(x)
    for a, b in zip(expected, got):
        torch.testing.assert_close(b[:, :, 0] if b.dim() == 5 else b[:, 0], a, atol=1e-5, rtol=0)
    assert any(p[:, :, :-1].abs().max() == 0 for p in model.parameters() if p.dim() == 5)


def test_in1k_128_inflates_to_ucf_128_and_the_toys_fit_each_other():
    toy_image = stage1.config_from_args(stage1.get_args(["--channel-multipliers", "1", "1", "2"]))
    for image, preset in ((tok.PRESETS["in1k-128"], "ucf-128"), (toy_image, "toy")):
        with torch.device("meta"):
            image_model, model = tok.Tokenizer(image), video.VideoTokenizer(video.PRESETS[preset])
        video.inflate(image_model.state_dict(), model)                    # would raise with a list of names


def our_checkpoint(path, kind, config, seed=0):
    """A checkpoint of ours with raw weights of `seed` and averages of `seed` + 1."""
    raw, averages = random_model(kind, config, seed), random_model(kind, config, seed + 1)
    runtime.save_checkpoint(path, {
        "format": kind.format, "config": tok.config_to_dict(config), "step": 5, "model": raw.state_dict(),
        "ema": dict(averages.named_parameters())})
    return raw, averages


@pytest.mark.parametrize("source", ["ours", "published"])
def test_raw_and_averaged_weights_of_both_kinds_of_image_file_are_inflated(tmp_path, source):
    path = tmp_path / "image.ckpt"
    if source == "ours":
        raw, averages = our_checkpoint(path, tok.Tokenizer, TINY_IMAGE)
    else:
        raw, averages = random_model(tok.Tokenizer, TINY_IMAGE), random_model(tok.Tokenizer, TINY_IMAGE, 1)
        torch.save({"state_dict": {
            **raw.state_dict(),
            **{f"model_ema.{n.replace('.', '')}": p.detach() for n, p in averages.named_parameters()},
            "model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}}, path)
    x = clip(1, 16, 24)
    for ema, image in ((True, averages), (False, raw)):
        model = video.VideoTokenizer(TINY).eval()
        loaded, info = tok.load_tokenizer(path, ema)
        video.inflate(loaded.state_dict(), model)
        assert info["weights"] == ("EMA" if ema else "raw")
        with torch.no_grad():
            torch.testing.assert_close(model(x)[0][:, :, 0], image(x[:, :, 0])[0], atol=1e-5, rtol=0)


def test_inflation_of_another_architecture_is_an_error_that_lists_the_names():
    wide = tok.Tokenizer(tok.TokenizerConfig(**{**vars(TINY_IMAGE), "blocks": 2}))
    with pytest.raises(runtime.UserError, match=r"not expected: .*down\.0\.block\.1"):
        video.inflate(wide.state_dict(), video.VideoTokenizer(TINY))
    other_bits = tok.Tokenizer(tok.TokenizerConfig(**{**vars(TINY_IMAGE), "bits": 7}))
    with pytest.raises(runtime.UserError, match="wrong shapes"):
        video.inflate(other_bits.state_dict(), video.VideoTokenizer(TINY))


# ---- loading ----------------------------------------------------------------------------------------------

def lightning_file(path, config, change=lambda state: None):
    """A published video file: raw weights of seed 0, averages of seed 1, LPIPS and the 3D PatchGAN beside."""
    raw, averages = random_model(video.VideoTokenizer, config), random_model(video.VideoTokenizer, config, 1)
    critic = video.patchgan_3d()
    state = {official(name): t for name, t in raw.state_dict().items()}
    state.update({f"loss.discriminator.{name}": t for name, t in critic.state_dict().items()})
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    parameters = [*((official(name), p) for name, p in averages.named_parameters()),
                  *((f"loss.discriminator.{name}", p) for name, p in critic.named_parameters())]
    state.update({f"model_ema.{name.replace('.', '')}": p.detach() for name, p in parameters})
    state.update({"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)})
    change(state)
    torch.save({"state_dict": state, "global_step": 1234, "optimizer_states": []}, path)
    return raw, averages


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_published_file_loads_ema_by_default_and_raw_on_request(tmp_path):
    config = video.VideoTokenizerConfig(channels=32, blocks=1, mid_blocks=1, bits=6)
    raw, averages = lightning_file(tmp_path / "v.ckpt", config)
    model, info = video.load_video_tokenizer(tmp_path / "v.ckpt")
    assert model.config == config and not model.training and same_weights(model, averages)
    assert (info["weights"], info["source"], info["step"]) == ("EMA", "published", 1234)
    model, info = video.load_video_tokenizer(tmp_path / "v.ckpt", ema=False)
    assert info["weights"] == "raw" and same_weights(model, raw)


def test_missing_and_unexpected_names_of_a_published_file_are_errors_that_list_them(tmp_path):
    config = video.VideoTokenizerConfig(channels=32, blocks=1, mid_blocks=1, bits=6)
    for name in ("encoder.down.1.block.0.conv1.conv_1.weight", "loss.discriminator.main.5.weight",
                 "model_ema.encoderconv_inconv_1weight"):
        lightning_file(tmp_path / "v.ckpt", config, lambda state, name=name: state.pop(name))
        with pytest.raises(runtime.UserError, match="missing|without|lacks|not whole"):
            video.load_video_tokenizer(tmp_path / "v.ckpt")
    lightning_file(tmp_path / "v.ckpt", config, lambda state: state.update({"decoder.new": torch.zeros(1)}))
    with pytest.raises(runtime.UserError, match=r"decoder\.new"):
        video.load_video_tokenizer(tmp_path / "v.ckpt")


def test_our_checkpoint_round_trips_with_ema_and_raw(tmp_path):
    raw, averages = our_checkpoint(tmp_path / "a.pt", video.VideoTokenizer, TINY)
    for ema, source in ((True, averages), (False, raw)):
        model, info = video.load_video_tokenizer(tmp_path / "a.pt", ema)
        assert same_weights(model, source) and model.config == TINY and info["source"] == "ours"


def test_image_and_video_files_are_told_apart(tmp_path):
    our_checkpoint(tmp_path / "image.pt", tok.Tokenizer, TINY_IMAGE)
    our_checkpoint(tmp_path / "video.pt", video.VideoTokenizer, TINY)
    with pytest.raises(runtime.UserError, match="is an image tokenizer"):
        video.load_video_tokenizer(tmp_path / "image.pt")
    with pytest.raises(runtime.UserError, match="is a video tokenizer"):
        tok.load_tokenizer(tmp_path / "video.pt")
    torch.save({"format": "of something else"}, tmp_path / "other.pt")
    for load in (tok.load_tokenizer, video.load_video_tokenizer, video.load_any_tokenizer):
        with pytest.raises(runtime.UserError, match="no tokenizer checkpoint.*of something else"):
            load(tmp_path / "other.pt")
    for name, kind in (("image", tok.Tokenizer), ("video", video.VideoTokenizer)):
        assert type(video.load_any_tokenizer(tmp_path / f"{name}.pt")[0]) is kind
    torch.save({"state_dict": tok.Tokenizer(TINY_IMAGE).state_dict()}, tmp_path / "image.ckpt")
    with pytest.raises(runtime.UserError, match="is an image tokenizer"):
        video.load_video_tokenizer(tmp_path / "image.ckpt")


# ---- training ---------------------------------------------------------------------------------------------

FAST = ["--image-size", 16, "--frames", 5, "--bits", 6, "--global-batch-size", 4, "--grid-size", 2,
        "--lr", 1e-4, "--warmup", 1, "--log-every", 1, "--checkpoint-every", 1, "--perceptual-weight", 0,
        "--entropy-weight", 0.1]
GAN = ["--gan-weight", 0.3, "--lecam-weight", 0.05]
# For comparing runs that round differently: two channels a group. Where a norm has one, it removes what
# biases add, their true gradient is 0, and Adam makes steps of full size of the rounding errors in its place.
WIDE = ["--channels", 64]


def train(directory, *flags):
    """Train in this process: starting Python and torch anew would take longer than these runs."""
    video.main(video.get_args(["train", "--results-dir", directory, *FAST, *flags]))


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path):
    train(tmp_path / "whole", *GAN, "--length", 2, "--checkpoint-every", 2)
    train(tmp_path / "cut", *GAN, "--length", 2)
    (tmp_path / "cut" / "step-00000002.pt").unlink()
    train(tmp_path / "cut", *GAN, "--length", 2, "--resume")
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")
    whole, cut = newest(tmp_path / "whole"), newest(tmp_path / "cut")
    for part in ("model", "ema", "discriminator"):
        assert whole[part].keys() == cut[part].keys() and whole[part]
        assert all(torch.equal(whole[part][name], cut[part][name]) for name in whole[part])


def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path):
    # Without the GAN: PatchGAN's BatchNorm statistics are those of one rank, as published.
    flags = [*FAST, *WIDE, "--length", 3, "--grid-every", 3]
    train(tmp_path / "one", *flags)
    run_script("video.py", "train", "--results-dir", tmp_path / "two", *flags, ranks=2)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert one.keys() == two.keys()
    for step in one:
        for name in one[step]:
            assert one[step][name] == pytest.approx(two[step][name], rel=1e-4, abs=1e-5), (step, name)
    one, two = newest(tmp_path / "one")["model"], newest(tmp_path / "two")["model"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)


def test_two_ranks_with_the_gan_equal_one_process_with_two_micro_batches(tmp_path):
    # BatchNorm then sees the same halves of a batch. (Entropy and LeCAM join ranks, but not micro-batches.)
    flags = [*FAST, *WIDE, "--gan-weight", 0.3, "--lecam-weight", 0, "--entropy-weight", 0, "--length", 3]
    train(tmp_path / "one", *flags, "--accumulation", 2)
    run_script("video.py", "train", "--results-dir", tmp_path / "two", *flags, ranks=2)
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    for part in ("model", "ema", "discriminator_ema"):                   # buffers are each rank's own
        assert one[part]
        for name in one[part]:
            torch.testing.assert_close(two[part][name], one[part][name], atol=1e-5, rtol=0)
    for step, values in logged(tmp_path / "one").items():
        for name in ("loss/gan", "loss/discriminator", "D(real)", "grad_norm/discriminator"):
            assert logged(tmp_path / "two")[step][name] == pytest.approx(values[name], rel=1e-4), (step, name)


@pytest.mark.parametrize("animation", ["webp", "gif"])
def test_previews_are_an_animation_and_a_strip(tmp_path, animation):
    train(tmp_path, "--length", 1, "--animation", animation)
    with Image.open(tmp_path / f"reconstructions-00000001.{animation}") as picture:
        assert picture.n_frames == 5 and picture.info.get("loop", 0) == 0
        assert picture.size == (2 * 66 + 2, 2 * 66 + 2)          # 2 clips of 16 x 16, enlarged 4 times
    with Image.open(tmp_path / "reconstructions-00000001.png") as picture:
        assert picture.size == (5 * 66 + 2, 4 * 66 + 2)          # 5 frames; 2 x (clip, reconstruction)


def test_a_strip_shows_first_and_last_frame_of_clip_over_reconstruction():
    clips = torch.arange(17, dtype=torch.uint8).view(1, 1, 17, 1, 1).expand(2, 3, 17, 4, 4).contiguous()
    picture = video.strip(video.above_each_other(clips, clips + 100), columns=3)
    assert [int(picture[3, 3 + 6 * i, 0]) for i in range(3)] == [0, 8, 16]
    assert [int(picture[9, 3 + 6 * i, 0]) for i in range(3)] == [100, 108, 116]


def test_training_starts_from_the_inflated_image_tokenizer_and_resumes_without_its_file(tmp_path):
    image_config = tok.TokenizerConfig(resolution=16, channels=32, channel_multipliers=(1, 1, 2), blocks=1,
                                       mid_blocks=0, patch=2, bits=6)
    raw, averages = our_checkpoint(tmp_path / "image.pt", tok.Tokenizer, image_config)
    for name, flags, image in (("ema", [], averages), ("raw", ["--raw-weights"], raw)):
        train(tmp_path / name, "--inflate-from", tmp_path / "image.pt", "--length", 1, "--lr", 0, *flags)
        model, _ = video.load_video_tokenizer(tmp_path / name / "step-00000001.pt", ema=False)
        x = clip(1, 16, 32)
        with torch.no_grad():
            torch.testing.assert_close(model(x)[0][:, :, 0], image.eval()(x[:, :, 0])[0], atol=1e-5, rtol=0)
    (tmp_path / "image.pt").unlink()
    train(tmp_path / "ema", "--inflate-from", tmp_path / "image.pt", "--length", 2, "--resume")
    assert newest(tmp_path / "ema")["step"] == 2
    with pytest.raises(runtime.UserError, match="does not exist"):
        train(tmp_path / "new", "--inflate-from", tmp_path / "image.pt")


def test_clips_are_judged_frame_by_frame_by_the_perceptual_loss():
    class Judge(nn.Module):
        def forward(self, x, y):
            assert x.dim() == 4 and x.shape[0] == 2 * 5
            return (x - y).square().mean((1, 2, 3))
    args = video.get_args(["train", *FAST, "--perceptual-weight", 1])
    model, x = random_model(video.VideoTokenizer, TINY), clip(5, batch=2)
    outputs = model(x)
    terms = stage1.generator_terms(args, x, outputs, Judge(), 0)
    assert terms["perceptual"][0].item() == pytest.approx((x - outputs[0]).square().mean().item(), rel=1e-5)


def test_ucf_128_carries_the_published_hyper_parameters():
    args = video.get_args(["train", "--preset", "ucf-128"])
    assert stage1.config_from_args(args, video.VideoTokenizerConfig) == video.PRESETS["ucf-128"]
    assert (args.gan_weight, args.lecam_weight, args.lr, args.warmup, args.final_lr, args.lr_schedule) == (
        0.3, 0.05, 1e-4, "2ep", 0.01, "cosine")
    assert (args.global_batch_size, args.length, args.perceptual_weight, args.entropy_weight, args.beta1) == (
        128, "2000ep", 1, 0.1, 0.5)


def test_other_multipliers_on_the_command_line_bring_their_own_strides_in_time():
    args = video.get_args(["train", "--preset", "ucf-128", "--channel-multipliers", "1", "1", "2", "2", "4"])
    assert stage1.config_from_args(args, video.VideoTokenizerConfig).strides == [
        (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]


def test_activation_checkpointing_changes_no_gradient():
    model, x, grads = random_model(video.VideoTokenizer, TINY), clip(5), []
    for checkpointing in (False, True):
        model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
        model.zero_grad()
        model(x)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_wrong_flags_are_one_line_errors_of_status_2(tmp_path):
    for flags in (["--frames", 6], ["--time-strides", 2], ["--image-size", 20], ["--data-path", "nowhere"],
                  ["--split-list", "trainlist01.txt"]):
        with pytest.raises(runtime.UserError, match=flags[0]):
            train(tmp_path, *flags)
    result = run_script("video.py", "train", "--frames", 6, "--results-dir", tmp_path, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: --frames 6")
    assert len(result.stderr.splitlines()) == 1


# ---- reconstruction ---------------------------------------------------------------------------------------

def test_clips_of_any_length_come_back_window_by_window():
    model = random_model(video.VideoTokenizer, TINY)                      # windows of 5 frames
    whole = runtime.to_uint8(clip(23)[0])
    for frames in (1, 2, 5, 6, 9, 23):
        assert video.reconstruct_clip(model, whole[:, :frames]).shape == (3, frames, 16, 16)
    got = video.reconstruct_clip(model, whole)
    for first in (0, model.config.frames):
        window = data.to_float(whole[None, :, first:first + model.config.frames])
        expected = runtime.to_uint8(model.decode(model.encode(window)))[0]
        assert torch.equal(got[:, first:first + model.config.frames], expected)


def test_reconstruct_writes_each_clip_beside_its_original(tmp_path):
    model, _ = our_checkpoint(tmp_path / "video.pt", video.VideoTokenizer, TINY)
    frames = np.random.default_rng(0).integers(0, 256, (7, 16, 20, 3), dtype=np.uint8)
    data.write_video(tmp_path / "clip.webp", frames, fps=20)              # lossless, and 20 cut to 16 pixels
    video.main(video.get_args(["reconstruct", "--ckpt", tmp_path / "video.pt", "--raw-weights",
                               "--input", tmp_path / "clip.webp", "--output", tmp_path / "out.webp"]))
    both, cut = data.read_video(tmp_path / "out.webp"), frames[:, :, 2:18]
    assert both.shape == (7, 16, 16 + 4 + 16, 3) and np.array_equal(both[:, :, :16], cut)
    expected = video.reconstruct_clip(model, torch.from_numpy(cut.copy()).permute(3, 0, 1, 2))
    assert np.array_equal(both[:, :, 20:], video.as_frames(expected))
    assert data.frame_rate(tmp_path / "out.webp") == 20


@pytest.mark.parametrize("kind", ["avi", "mp4", "gif"])
def test_a_folder_of_clips_is_reconstructed_and_a_broken_one_skipped(tmp_path, kind, capsys):
    if kind != "gif":
        pytest.importorskip("av")
    our_checkpoint(tmp_path / "video.pt", video.VideoTokenizer, TINY)
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), dtype=np.uint8)
    for name in ("a", "b"):
        data.write_video(tmp_path / "in" / "class" / f"{name}.{kind}", frames)
    (tmp_path / "in" / f"broken.{kind}").write_bytes(b"no clip")
    flags = ["reconstruct", "--ckpt", tmp_path / "video.pt", "--format", kind, "--output", tmp_path / "out"]
    video.main(video.get_args([*flags, "--input", tmp_path / "in"]))
    for name in ("a", "b"):
        assert data.read_video(tmp_path / "out" / "class" / f"{name}.{kind}.{kind}").shape == (6, 16, 52, 3)
    out, err = capsys.readouterr()
    assert f"broken.{kind}" in err and "over 2 clips, 1 broken" in out
    with pytest.raises(runtime.UserError, match="none of the clips"):
        video.main(video.get_args([*flags, "--input", tmp_path / "in" / f"broken.{kind}"]))


def test_wrong_inputs_of_reconstruct_are_clear_errors(tmp_path):
    our_checkpoint(tmp_path / "video.pt", video.VideoTokenizer, TINY)
    (tmp_path / "empty").mkdir()
    data.write_video(tmp_path / "in" / "a.gif", np.zeros((2, 16, 16, 3), np.uint8))
    for flags in (["--input", tmp_path / "empty"], ["--input", tmp_path / "nowhere"], ["--image-size", 20],
                  ["--input", tmp_path / "in", "--output", tmp_path / "a.gif"],
                  ["--input", tmp_path / "in" / "a.gif", "--output", tmp_path / "in" / "a.gif"],
                  ["--input", tmp_path / "in" / "a.gif", "--output", tmp_path / "a.webm"]):
        with pytest.raises(runtime.UserError, match="--input|--output|--image-size"):
            video.main(video.get_args(["reconstruct", "--ckpt", tmp_path / "video.pt", *flags]))
