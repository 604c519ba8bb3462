"""Open-MAGVIT2-V: the tokenizer of clips. 17 frames of 128 x 128 become 5 x 16 x 16 tokens, and tokens become
frames.

It is the image tokenizer of tokenizer.py with a third axis (the design is MAGVIT-v2's): the same blocks, LFQ
and entropy (eq. 1-3), built from causal 3D convolutions. Causal means that a frame sees itself and earlier
frames only, so the first frame of a clip is an image by itself, an image is a clip of one frame, and the
weights of an image tokenizer are a start for this one. To be honest: only the convolutions are causal.
GroupNorm and adaptive GroupNorm take their statistics over T x H x W, and through them every frame has a
say, faintly, in all others. The published model is like that too.

    1. layers          causal convolution, down- and upsampling in time
    2. model           VideoTokenizer, presets
    3. inflation       of an image tokenizer

It is trained by `train_tokenizer.py --preset toy-video` or ucf-128. To see a clip through it:
`python tokenizer.py reconstruct clip.avi --ckpt ucf-128`, or from Python

    import torch
    from support import checkpoints
    model, info = checkpoints.load_tokenizer("ucf-128")                # or one of our own checkpoints
    ids = model.encode(torch.zeros(1, 3, 17, 128, 128))                # (1, 5, 16, 16), each 0 .. 2^18 - 1
    clips = model.decode(ids)                                          # (1, 3, 17, 128, 128) in about [-1, 1]

Axis letters: B clips, C channels, T frames, H W height and width, t h w of the grid, K bits of a token.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import tokenizer

# ---- 1. Layers ---------------------------------------------------------------------------------------------


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that never looks ahead: in time it is padded in front only, by kernel - 1 frames of
    zeros. Space is padded inside the convolution, at no cost.

    Padding time costs a copy (none with --compile, where the activation before it writes into the padded
    tensor). The backward pass keeps the copy instead of the original, not both."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, (0, padding, padding), bias=bias)

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C', T', H', W'), T' = T / stride rounded up."""
        past = self.kernel_size[0] - 1
        if past and x.shape[2] > 1:
            return super().forward(F.pad(x, (0, 0, 0, 0, past, 0)))
        # The economy: a kernel of one slice has no past, and for a clip of one frame all slices but the last
        # would meet zeros, so that an image needs a third of the work.
        return F.conv3d(x, self.weight[:, :, -1:], self.bias, self.stride, self.padding)


class CausalAvgPool(nn.AvgPool3d):
    """Average pooling with the first frame repeated in front, so that 1 + 2k frames become 1 + k."""

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C, T', H', W'), T' = T / stride rounded up."""
        past = self.kernel_size[0] - 1
        return super().forward(F.pad(x, (0, 0, 0, 0, past, 0), mode="replicate") if past else x)


def drop_second_frame(x):
    """x (B, C, 2T, H, W) to frames 0, 2, 3, ...: (B, C, 2T - 1, H, W).

    On the way down the first frame was alone under its kernel, so on the way up it becomes one frame, not
    two."""
    return torch.cat([x[:, :, :1], x[:, :, 2:]], dim=2)


class CausalUpsample(tokenizer.Upsample):
    """A causal conv, depth-to-space in the order (dt, dy, dx), and one frame less where time was doubled."""

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C, 2T - 1 or T, 2H, 2W)."""
        x = super().forward(x)
        return drop_second_frame(x) if self.block[0] == 2 else x


class CausalNearestUpsample(tokenizer.NearestUpsample):
    """The baseline of table 3 for clips: repeat, drop the first frame's repetition, then a causal conv."""

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C, 2T - 1 or T, 2H, 2W)."""
        x = F.interpolate(x, scale_factor=tuple(map(float, self.block)), mode="nearest")
        return self.conv1(drop_second_frame(x) if self.block[0] == 2 else x)


UPSAMPLERS = {"depth-to-space": CausalUpsample, "nearest": CausalNearestUpsample}


# ---- 2. The model ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VideoTokenizerConfig(tokenizer.TokenizerConfig):
    """The shape of a video tokenizer. Defaults: Open-MAGVIT2-V on UCF-101; the rest as for images."""
    grid_axes = "thw"
    resolution: int = tokenizer.flag(128, "side of the crops", flag="--image-size")
    channel_multipliers: tuple = tokenizer.flag(
        (1, 2, 2, 4), "width of each level over the first; each but the last halves the resolution")
    frames: int = tokenizer.flag(17, "of the training clips: 1 + k x the stride in time")
    time_strides: tuple = tokenizer.flag(
        (), "1 or 2 for each step between levels; none: 2 where the multiplier is above 1")

    def __post_init__(self):
        super().__post_init__()
        if len(self.strides) != len(self.channel_multipliers) - 1 or not set(self.time_strides) <= {1, 2}:
            raise ValueError(f"time-strides {self.time_strides}: give a 1 or 2 for each of the "
                             f"{len(self.channel_multipliers) - 1} steps between levels")
        if self.frames < 1 or (self.frames - 1) % self.time_stride:
            raise ValueError(f"frames {self.frames}: must be 1 + a multiple of {self.time_stride}, the "
                             f"stride in time")

    @property
    def time_stride(self):
        """Frames that one step of the latent grid stands for; the first step stands for one frame alone."""
        return math.prod(stride[0] for stride in self.strides)

    @property
    def strides(self):
        """The factor between neighbouring levels along T, H and W, shallowest first."""
        by_rule = [1 if multiplier == 1 else 2 for multiplier in self.channel_multipliers[:-1]]
        return [(stride, 2, 2) for stride in self.time_strides or by_rule]

    def latent_grid(self, frames, height, width):
        """The axes (t, h, w) of the ids of a clip of 1 + k * time_stride frames."""
        return 1 + (frames - 1) // self.time_stride, *super().latent_grid(height, width)


PRESETS = {
    "ucf-128": VideoTokenizerConfig(),
    # For a laptop: 17 frames of 32 x 32, 5 x 4 x 4 tokens. With --channel-multipliers 1 1 2 the toy image
    # tokenizer has the same names and shapes, and can be inflated.
    "toy-video": VideoTokenizerConfig(resolution=32, channels=32, channel_multipliers=(1, 1, 2), blocks=1,
                                      mid_blocks=0, patch=2, bits=10, time_strides=(2, 2)),
}


class VideoTokenizer(tokenizer.Tokenizer):
    """Encoder, quantiser and decoder of clips. An image is a clip of one frame: `images[:, :, None]`.

    Everything but shapes is inherited: `forward`, `encode` (clips to ids (B, t, h, w)) and `decode`."""
    conv = CausalConv3d
    pool = CausalAvgPool
    upsamplers = UPSAMPLERS

    def check_images(self, clips):
        """Raise ValueError unless `clips` is (B, 3, 1 + k * time_stride, H, W) with sides that the stride
        divides, of 2 tokens or more."""
        stride = self.config.downsampling
        time_stride = self.config.time_stride
        if clips.dim() != 5 or clips.shape[1] != 3:
            raise ValueError(f"the video tokenizer takes RGB clips (B, 3, T, H, W), not a tensor of "
                             f"{list(clips.shape)}; images are clips of one frame, images[:, :, None]")
        frames, height, width = clips.shape[2:]
        if frames < 1 or (frames - 1) % time_stride:
            raise ValueError(f"a clip of {frames} frames does not divide into tokens; use 1 + a multiple of "
                             f"{time_stride}")
        if height % stride or width % stride or frames * height * width <= stride ** 2:
            raise ValueError(f"frames of {height} x {width} do not divide into tokens of {stride} x "
                             f"{stride}; use multiples of {stride} that make at least two tokens")


# ---- 3. Inflation ------------------------------------------------------------------------------------------

def inflate(image_state, video_model):
    """The weights of an image tokenizer, made a start for `video_model`, of the same levels and widths.

    image_state: its state_dict, raw or EMA. A 2D kernel becomes the last slice in time of the 3D one, the
    slice that meets the present frame, and the past starts at zero. An upsampler that doubles time has twice
    the channels, as (dt, dy, dx, C): both of its frames start as the image's. All else is copied. On one
    frame the result is the image tokenizer; of a clip, it sees each frame by itself (but for the norms)."""
    own = video_model.state_dict()
    state = {}
    for name, tensor in image_state.items():
        target = own.get(name, tensor)
        if ".upsample." in name and len(target) == 2 * len(tensor):
            tensor = torch.cat([tensor, tensor])
        if target.dim() == 5 and tensor.dim() == 4:
            tensor = F.pad(tensor[:, :, None], (0, 0, 0, 0, target.shape[2] - 1, 0))
        state[name] = tensor
    return state
