"""video.py is the published function, causal but for its norms, and inflated the image tokenizer."""
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn as nn

import tokenizer
import video
from support import checkpoints
from helpers import fill_module, golden, published_video_name, refused

SHAPE = dict(resolution=16, channels=32, channel_multipliers=(1, 2, 2, 2), blocks=1, mid_blocks=1, bits=6)
TINY = video.VideoTokenizerConfig(**SHAPE, frames=5)
TINY_IMAGE = tokenizer.TokenizerConfig(**SHAPE)


def random_model(config, seed=0):
    """A model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    kind = video.VideoTokenizer if config.frames else tokenizer.Tokenizer
    model = kind(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def clip(frames, height=16, width=16, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


# ---- the published function -------------------------------------------------------------------------------

def test_encoder_ids_and_decoder_equal_the_official_ones():
    expected = golden("video_tokenizer")
    config = video.VideoTokenizerConfig(resolution=16, channels=32, blocks=1, mid_blocks=1)
    model = fill_module(video.VideoTokenizer(config), "", published_video_name)
    with torch.no_grad():
        reconstruction, z, _, ids = model(expected["x"])
    torch.testing.assert_close(z, expected["encoder_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(reconstruction, expected["reconstruction"], atol=1e-5, rtol=0)
    assert torch.equal(ids.flatten(), expected["index"].flatten())
    torch.testing.assert_close(model.decode(ids), reconstruction, atol=1e-5, rtol=0)


# ---- shapes -----------------------------------------------------------------------------------------------

def test_17_frames_become_5_steps_and_17_frames():
    config = video.VideoTokenizerConfig(resolution=16, channels=32, blocks=1, mid_blocks=0, bits=6)
    assert config.time_stride == 4 and config.downsampling == 8
    others = dataclasses.replace(TINY, channel_multipliers=(1, 1, 2, 2), time_strides=())
    assert [stride[0] for stride in others.strides] == [1, 1, 2]           # other multipliers bring their own
    model, sizes = random_model(config), {}
    for part, levels in (("encoder", model.encoder.down), ("decoder", model.decoder.up)):
        for i, level in enumerate(levels):
            level.block[0].register_forward_hook(
                lambda m, x, y, key=(part, i): sizes.update({key: tuple(y.shape[2:])}))
    ids = model.encode(clip(17))
    assert ids.shape == (1, 5, 2, 2) and model.decode(ids).shape == (1, 3, 17, 16, 16)
    # T 17 -> 17 -> 9 -> 5, and 5 -> 9 -> 17 -> 17: levels are numbered from the shallowest in both.
    for part in ("encoder", "decoder"):
        assert [sizes[part, i] for i in range(4)] == [(17, 16, 16), (17, 8, 8), (9, 4, 4), (5, 2, 2)]


@pytest.mark.parametrize("config", [TINY, video.PRESETS["toy-video"]])
def test_every_1_plus_4k_frames_come_back(config):
    model = random_model(config)
    for frames in (1, 5, 9, 13, 17):
        x = clip(frames, 32, 16)
        ids = model.encode(x)
        assert ids.shape[1] == 1 + (frames - 1) // 4 and model.decode(ids).shape == x.shape


@pytest.mark.parametrize("changes", [
    {"upsampler": "nearest"}, {"downsampler": "average"}, {"patch": 2}, {"adaptive_norm": False},
    {"quantizer": "vq", "codebook_size": 100}, {"channel_multipliers": (1, 1, 2), "time_strides": (1, 1)}])
def test_switches_keep_the_length_of_a_clip_and_train_all_parameters(changes):
    config = dataclasses.replace(TINY, **{"time_strides": (), **changes})
    model = random_model(config)
    x = clip(5)
    reconstruction, z, q, _ = model(x)
    assert reconstruction.shape == x.shape
    (reconstruction.square().mean() + (q - z).square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_wrong_clips_and_configs_are_clear_errors():
    model = video.VideoTokenizer(TINY)
    for x, problem in ((clip(4), "4 frames"), (clip(5, 12), "12 x 16"), (clip(1)[:, :, 0], "T, H, W"),
                       (clip(5)[:, :1], "RGB"), (clip(1, 8, 8), "two tokens")):
        refused(problem, model.encode, x, kind=ValueError)
    refused("t, h, w", model.decode, torch.zeros(1, 4, 4, dtype=torch.long), kind=ValueError)
    refused("another tokenizer", model.decode, torch.full((1, 2, 2, 2), 64), kind=ValueError)
    for changes in ({"frames": 6}, {"time_strides": (2,)}, {"time_strides": (3, 2, 2)}, {"frames": 0}):
        refused("frames|time-strides", dataclasses.replace, TINY, **changes, kind=ValueError)


# ---- depth to space in three dimensions -------------------------------------------------------------------

def test_depth_to_space_is_in_the_order_dt_dy_dx():
    channels, block = 3, (2, 2, 2)
    x = torch.randn(1, 8 * channels, 3, 2, 2)
    y = tokenizer.depth_to_space(x, block)
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
            if isinstance(child, tokenizer.AdaptiveGroupNorm):
                setattr(parent, name, FixedNorm(child.norm.num_channels))
            elif isinstance(child, nn.GroupNorm):
                setattr(parent, name, FixedNorm(child.num_channels))
    return model


@pytest.mark.parametrize("changes", [{}, {"upsampler": "nearest"}, {"downsampler": "average"}])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_changed_frame_or_token_changes_nothing_before_it(part, changes):
    model = with_fixed_norms(random_model(dataclasses.replace(TINY, frames=9, **changes)))
    half = getattr(model, part)
    x = clip(9) if part == "encoder" else torch.randn(1, 6, 3, 2, 2).sign()
    with torch.no_grad():
        y = half(x)
        for t in range(x.shape[2]):
            changed = x.clone()
            changed[:, :, t] = -changed[:, :, t]
            # Token i stands for frames 4 i - 3 to 4 i.
            first = math.ceil(t / 4) if part == "encoder" else max(0, 4 * t - 3)
            y_changed = half(changed)
            assert torch.equal(y_changed[:, :, :first], y[:, :, :first])
            assert not torch.equal(y_changed[:, :, first], y[:, :, first])


def test_group_norm_couples_frames_as_documented():
    model = random_model(TINY)
    x = clip(5)
    with torch.no_grad():
        z, changed = model.encoder(x), model.encoder(torch.cat([x[:, :, :4], 0 * x[:, :, 4:]], dim=2))
    assert not torch.equal(z[:, :, 0], changed[:, :, 0])


def test_one_frame_takes_the_short_way_to_the_same():
    torch.manual_seed(0)
    for stride in (1, (2, 2, 2)):
        conv, x = video.CausalConv3d(4, 5, 3, stride=stride, padding=1), torch.randn(2, 4, 1, 6, 6)
        padded = torch.cat([torch.zeros(2, 4, 2, 6, 6), x], dim=2)
        torch.testing.assert_close(conv(x), nn.Conv3d.forward(conv, padded))


# ---- inflation --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"upsampler": "nearest"}, {"downsampler": "average"}, {"patch": 2},
                                     {"quantizer": "vq", "codebook_size": 50, "codebook_channels": 8}])
def test_an_inflated_model_on_one_frame_is_the_image_model(changes):
    image = random_model(dataclasses.replace(TINY_IMAGE, **changes))
    model = random_model(dataclasses.replace(TINY, **changes), seed=1)
    model.load_state_dict(video.inflate(image.state_dict(), model))
    x = clip(1, 16, 32, batch=2)
    with torch.no_grad():
        expected, got = image(x[:, :, 0]), model(x)
    for a, b in zip(expected, got):
        torch.testing.assert_close(b[:, :, 0] if b.dim() == 5 else b[:, 0], a, atol=1e-5, rtol=0)
    assert any(p[:, :, :-1].abs().max() == 0 for p in model.parameters() if p.dim() == 5)


def test_published_and_toy_image_tokenizers_inflate():
    toy = tokenizer.TokenizerConfig(**{**vars(tokenizer.PRESETS["toy"]), "channel_multipliers": (1, 1, 2)})
    for image, preset in ((tokenizer.PRESETS["in1k-128"], "ucf-128"), (toy, "toy-video")):
        with torch.device("meta"):
            image_model, model = tokenizer.Tokenizer(image), video.VideoTokenizer(video.PRESETS[preset])
        inflated = video.inflate(image_model.state_dict(), model)
        assert not checkpoints.differences(model.state_dict(), inflated)


def test_inflation_of_another_architecture_lists_the_names():
    model = video.VideoTokenizer(TINY)
    for changes, problem in (({"blocks": 2}, r"not expected: decoder\.up\.0\.block\.1"),
                             ({"bits": 7}, "wrong shapes")):
        image = tokenizer.Tokenizer(dataclasses.replace(TINY_IMAGE, **changes))
        with pytest.raises(ValueError, match=problem):
            checkpoints.load_state(model, video.inflate(image.state_dict(), model), "the image tokenizer")
