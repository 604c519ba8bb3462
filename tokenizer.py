"""The image tokenizer of Open-MAGVIT2: a picture becomes a small grid of 18-bit codes, and codes become a
picture.

A convolutional encoder shrinks the picture, lookup-free quantisation keeps only the sign of each of its K
output channels, and a convolutional decoder paints the picture back from those signs. K signs are a code out
of 2^K, so a vocabulary of 262,144 costs no codebook at all. This file holds the whole model, in reading
order:

    1. quantisation    LFQ (eq. 1, 2), codes as ids, bits and sub-tokens, the exact entropy term (eq. 3)
    2. layers          residual block, adaptive GroupNorm, down- and upsampler
    3. model           encoder, decoder, Tokenizer, presets
    4. loading         our own checkpoints, and the ones that the authors published

It is trained by train_tokenizer.py and judged by `evaluate.py reconstruction`. To see one picture through it:

    import torch, tokenizer
    model, info = tokenizer.load_tokenizer("imagenet_256_L.ckpt")      # or runs/tokenizer/step-00001000.pt
    ids = model.encode(torch.zeros(1, 3, 256, 256))                    # (1, 16, 16), each 0 .. 2^18 - 1
    images = model.decode(ids)                                         # (1, 3, 256, 256) in about [-1, 1]

Axis letters: B batch, C channels, H W height and width of a picture, h w of the code map, N tokens, K bits of
a code, M sub-tokens. Pictures are RGB in [-1, 1]. Module names are those of the published files, so weights
load unmapped.
"""
import math
import re
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import runtime

# ------------------------------------------------------------------------------------------------------------
# 1. Quantisation
# ------------------------------------------------------------------------------------------------------------


def ids_to_bits(ids, bits):
    """Token ids (...), int64 in 0 .. 2^bits - 1, to bits (..., bits), int64 0 or 1, bit 0 first (eq. 2)."""
    return ids.unsqueeze(-1) >> torch.arange(bits, device=ids.device) & 1


def bits_to_ids(bits):
    """Bits (..., K), 0/1 or bool, bit 0 first, to token ids (...), int64: sum over k of 2^k bit_k (eq. 2)."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def ids_to_subtokens(ids, split):
    """Asymmetric token factorisation (section 2.3): ids (...) to one id tensor for each entry of `split`.

    `split` lists the bits of the sub-tokens in channel order: (6, 12) makes sub-token 1 (0 .. 63) of the
    first six bits and sub-token 2 (0 .. 4095) of the other twelve, each with its own first channel as bit 0.
    """
    subtokens = []
    for width in split:
        subtokens.append(ids & (1 << width) - 1)
        ids = ids >> width
    return subtokens


def subtokens_to_ids(subtokens, split):
    """The inverse of `ids_to_subtokens`: a list of M tensors (...) back to token ids (...), int64."""
    ids, shift = torch.zeros_like(subtokens[0]), 0
    for subtoken, width in zip(subtokens, split, strict=True):
        ids = ids | subtoken << shift
        shift += width
    return ids


class LFQ(nn.Module):
    """Lookup-free quantisation (eq. 1): each channel of z becomes +1 where z > 0, else -1. No parameters."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits

    def forward(self, z):
        """z (B, K, *S) to q (B, K, *S) in {-1, +1} without gradient, and ids (B, *S) int64."""
        positive = z > 0
        return torch.where(positive, 1.0, -1.0), bits_to_ids(positive.movedim(1, -1))

    def codes(self, ids):
        """ids (B, *S) to q (B, K, *S) in {-1.0, +1.0}."""
        return (ids_to_bits(ids, self.bits).movedim(-1, 1) * 2.0 - 1.0).contiguous()


class VQ(nn.Module):
    """The classical alternative (table 3, "LFQ" off): each vector takes the nearest entry of a codebook.

    Any codebook size works. Its entries learn from the codebook loss in train_tokenizer.py; entries that no
    vector chooses get no gradient and stay dead, which is the reason why large codebooks need LFQ.
    """

    def __init__(self, codebook_size, channels):
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, channels)
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)   # VQ-VAE's usual start

    def forward(self, z):
        """z (B, C, *S) to the nearest entries q (B, C, *S), with gradient to the codebook; ids (B, *S)."""
        with torch.no_grad():
            flat = z.movedim(1, -1).float()
            table = self.codebook.weight.float()
            # |z - e|^2 = |z|^2 - 2 <z, e> + |e|^2, and |z|^2 is the same for every entry.
            ids = (table.square().sum(1) - 2 * flat @ table.T).argmin(-1)
        return self.codes(ids), ids

    def codes(self, ids):
        """ids (B, *S) to codebook entries (B, C, *S)."""
        return self.codebook(ids).movedim(-1, 1).contiguous()


def bit_products(p, q):
    """Joint distribution (N, 2^k), bit 0 fastest, of k bits that are 1 and 0 with chances p, q (N, k)."""
    joint = p.new_ones(len(p), 1)
    for k in range(p.shape[1]):
        joint = torch.cat([joint * q[:, k:k + 1], joint * p[:, k:k + 1]], dim=1)
        # Far below fp32's resolution of a mean over tokens. Left alone, such products become denormal
        # numbers, which made the whole term 11 times slower on a CPU.
        joint = joint.masked_fill(joint < 1e-18, 0.0)
    return joint


def lfq_entropies(z, tau=0.01, eps=0.0):
    """Both terms of the entropy loss (eq. 3), exact over all 2^K codes, in nats.

    z: (N, K) encoder outputs of N tokens. Returns two scalars:
      per_token  mean over tokens of H(f(z)): small when every token is sure of its code
      codebook   H(mean over tokens of f(z)): large when the codebook is used evenly. At most K ln 2.
    The loss is per_token - codebook. f(z) = softmax over codes c in {-1, 1}^K of 2 <z, c> / tau.

    Written like that, f(z) is an N x 2^K table: 1 GiB at N = 1024, K = 18. But the exponent is a sum over
    channels, so the softmax is a product of K independent bits with p_k = sigmoid(4 z_k / tau). Then (1) the
    entropy of a token is a sum of K binary entropies, and (2) the mean over tokens of a product of two
    half-codes is ONE matrix product, (2^(K/2) x N)(N x 2^(K/2)). Nothing of size N x 2^K ever exists.

    eps: added inside the logarithm of the codebook term, as the official code does with 1e-5. That reads
    11.19 instead of 12.48 nats for a uniform 2^18 codebook, so the default is the true entropy.

    Half precision would be wrong by up to 100 % in the gradient (4 z / tau reaches hundreds, where bf16 steps
    by whole units), so everything here is fp32, whatever autocast says.
    """
    with torch.autocast(z.device.type, enabled=False):
        a = 4 * z.float() / tau                                              # (N, K) log-odds of each bit
        p, q = torch.sigmoid(a), torch.sigmoid(-a)                           # (N, K); 1 - p would cancel
        per_token = (p * F.softplus(-a) + q * F.softplus(a)).sum(1).mean()   # K binary entropies a token

        half = z.shape[1] // 2
        low = bit_products(p[:, :half], q[:, :half])                         # (N, 2^(K//2))
        high = bit_products(p[:, half:], q[:, half:])                        # (N, 2^(K - K//2))
        mean = high.T @ low / len(z)                                     # all 2^K codes; flattened = token id

        # Over ranks: the value of the global mean with the gradient of the local one. DDP averages gradients,
        # so R ranks with batch b then have exactly the loss and gradient of one rank with batch R * b. 1 MiB
        # for K = 18.
        mean = mean + (runtime.all_reduce_mean(mean) - mean.detach())
        # A code that no token touches underflows to 0; the clamp makes its 0 log 0 a 0 with a finite
        # gradient.
        log_mean = (mean + eps).clamp_min(torch.finfo(torch.float32).tiny).log()
        return per_token, -(mean * log_mean).sum()


# ------------------------------------------------------------------------------------------------------------
# 2. Layers. `conv` is nn.Conv2d here; video.py builds the same layers from causal 3D convolutions.
# ------------------------------------------------------------------------------------------------------------

def group_norm(channels, affine=True):
    """GroupNorm with 32 groups and eps 1e-6. torch's default eps, 1e-5, would shift activations by 5e-5."""
    return nn.GroupNorm(32, channels, eps=1e-6, affine=affine)


class ResBlock(nn.Module):
    """GN - SiLU - conv - GN - SiLU - conv, plus the input (through a 1x1 conv where the width changes)."""

    def __init__(self, in_channels, out_channels, conv=nn.Conv2d):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = conv(in_channels, out_channels, 1, bias=False)

    def forward(self, x):
        """x (B, C, *S) to (B, C', *S)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and shift come from the codes: gamma(std of q) * GN(x) + beta(mean of q) (section
    2.2).

    Mean and std are taken over the code map, for each sample and code channel. They tell every layer of the
    decoder what the whole picture is about (how often each bit is on), which a stack of 3x3 convolutions
    would learn late.
    """

    def __init__(self, code_channels, channels):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.gamma = nn.Linear(code_channels, channels)
        self.beta = nn.Linear(code_channels, channels)

    def forward(self, x, q):
        """x (B, C, *S), codes q (B, K, *s) to (B, C, *S)."""
        flat = q.flatten(2)
        std = (flat.var(dim=2) + 1e-6).sqrt()                              # (B, K), unbiased variance
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))                       # (B, C, 1, 1)
        return self.gamma(std).view(shape) * self.norm(x) + self.beta(flat.mean(dim=2)).view(shape)


def depth_to_space(x, block):
    """Trade channels for resolution: (B, prod(block) * C, *S) to (B, C, *(S * block)).

    The order is DCR: output channel c at offset (dy, dx) comes from input channel (dy * block_x + dx) * C +
    c. `nn.PixelShuffle` is the other order (CRD), and published weights turn to noise with it. Works in 2D
    and 3D.
    """
    batch, channels, *sizes = x.shape
    channels //= math.prod(block)
    axes = len(sizes)
    x = x.reshape(batch, *block, channels, *sizes)                         # (B, dy, dx, C, H, W)
    order = [0, 1 + axes]                                                  # (B, C, H, dy, W, dx)
    for axis in range(axes):
        order += [2 + axes + axis, 1 + axis]
    return x.permute(order).reshape(batch, channels, *[s * b for s, b in zip(sizes, block)])


def space_to_depth(x, block):
    """The inverse of `depth_to_space`: (B, C, *(S * block)) to (B, prod(block) * C, *S)."""
    batch, channels, *sizes = x.shape
    axes = len(sizes)
    split = [part for size, b in zip(sizes, block) for part in (size // b, b)]
    x = x.reshape(batch, channels, *split)                                 # (B, C, H, dy, W, dx)
    order = [0, *[3 + 2 * i for i in range(axes)], 1, *[2 + 2 * i for i in range(axes)]]
    return x.permute(order).reshape(batch, channels * math.prod(block), *split[::2])


class Upsample(nn.Module):
    """A conv to prod(block) * C channels, then depth-to-space: each output pixel has its own kernel."""

    def __init__(self, channels, block=(2, 2), conv=nn.Conv2d):
        super().__init__()
        self.block = block
        self.conv1 = conv(channels, channels * math.prod(block), 3, padding=1)

    def forward(self, x):
        """x (B, C, H, W) to (B, C, 2H, 2W)."""
        return depth_to_space(self.conv1(x), self.block)


class NearestUpsample(nn.Module):
    """The baseline of table 3: repeat each pixel, then a 3x3 conv."""

    def __init__(self, channels, block=(2, 2), conv=nn.Conv2d):
        super().__init__()
        self.block = block
        self.conv1 = conv(channels, channels, 3, padding=1)

    def forward(self, x):
        """x (B, C, H, W) to (B, C, 2H, 2W)."""
        return self.conv1(F.interpolate(x, scale_factor=tuple(map(float, self.block)), mode="nearest"))


UPSAMPLERS = {"depth-to-space": Upsample, "nearest": NearestUpsample}


# ------------------------------------------------------------------------------------------------------------
# 3. The model
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TokenizerConfig:
    """The shape of a tokenizer. Defaults: Open-MAGVIT2-I-In1k, 256 x 256 (table 1). Switches: table 3."""
    resolution: int = 256                    # of the training pictures; any multiple of the stride works
    channels: int = 128                      # width of the first level
    channel_multipliers: tuple = (1, 1, 2, 2, 4)   # width of each level; each but the last halves the map
    blocks: int = 4                          # residual blocks a level ("Deeper Model")
    mid_blocks: int = 4                      # residual blocks at the code map's resolution
    patch: int = 1                           # fold patch x patch pixels into channels first: cheap on a CPU
    quantizer: str = "lfq"                   # "lfq", or "vq" with a learned codebook
    bits: int = 18                           # lfq: K, so 2^K codes
    codebook_size: int = 1024                # vq: entries
    codebook_channels: int = 64              # vq: length of an entry
    adaptive_norm: bool = True               # adaptive GroupNorm in the decoder
    upsampler: str = "depth-to-space"        # or "nearest"
    downsampler: str = "strided"             # a learned conv of stride 2, or "average" pooling

    def __post_init__(self):
        runtime.require(self.channels % 32 == 0 and self.channels > 0,
                        f"--channels {self.channels}: GroupNorm has 32 groups; use a multiple of 32")
        runtime.require(self.channel_multipliers and min(self.channel_multipliers) >= 1,
                        "--channel-multipliers must be positive integers, such as 1 2 2 4")
        runtime.require(1 <= self.bits <= 24, f"--bits {self.bits}: a code has 1 to 24 bits")
        runtime.require(self.blocks >= 1 and self.mid_blocks >= 0 and self.patch >= 1,
                        "--blocks and --patch must be 1 or more and --mid-blocks 0 or more")
        runtime.require(self.codebook_size >= 2 and self.codebook_channels >= 1,
                        "--codebook-size must be 2 or more and --codebook-channels 1 or more")
        for value, choices, flag in ((self.quantizer, ("lfq", "vq"), "--quantizer"),
                                     (self.upsampler, ("depth-to-space", "nearest"), "--upsampler"),
                                     (self.downsampler, ("strided", "average"), "--downsampler")):
            runtime.require(value in choices, f"{flag} {value}: choose one of {', '.join(choices)}")
        runtime.require(
            self.resolution % self.downsampling == 0,
            f"--image-size {self.resolution} is no multiple of the tokenizer's stride {self.downsampling}",
        )

    @property
    def downsampling(self):
        """Pixels along a side that one token stands for."""
        return self.patch * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def token_size(self):
        """What one token stands for, in words."""
        return f"{self.downsampling} x {self.downsampling} pixels"

    def grid(self, height, width):
        """The axes (h, w) of the code map of a picture."""
        return height // self.downsampling, width // self.downsampling

    @property
    def vocabulary(self):
        """The number of codes."""
        return 2 ** self.bits if self.quantizer == "lfq" else self.codebook_size

    @property
    def code_channels(self):
        """Channels of the code map."""
        return self.bits if self.quantizer == "lfq" else self.codebook_channels

    @property
    def strides(self):
        """The factor between neighbouring levels along each axis, shallowest first."""
        return [(2, 2)] * (len(self.channel_multipliers) - 1)

    @property
    def folds(self):
        """How many samples along each axis `patch` folds into channels."""
        return self.patch, self.patch


PRESETS = {
    "in1k-256": TokenizerConfig(),
    "in1k-128": TokenizerConfig(resolution=128, channel_multipliers=(1, 2, 2, 4)),
    "pt-256-2^18": TokenizerConfig(),
    "pt-256-2^14": TokenizerConfig(bits=14),
    # For a laptop: 32 x 32 pictures, 8 x 8 tokens. Folding 2 x 2 pixels first makes a step three times faster
    # than a full-resolution level, at no loss in quality at this size.
    "toy": TokenizerConfig(resolution=32, channels=32, channel_multipliers=(1, 2), blocks=1, mid_blocks=0,
                           patch=2, bits=10),
}


class Encoder(nn.Module):
    """Pictures to z, K channels for each token, not yet quantised."""

    def __init__(self, config, conv=nn.Conv2d, pool=nn.AvgPool2d):
        super().__init__()
        self.checkpointing = False
        self.patch = config.folds
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = conv(3 * math.prod(self.patch), config.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        width = config.channels
        for i, out_width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.blocks):
                level.block.append(ResBlock(width, out_width, conv))
                width = out_width
            if i < len(widths) - 1:
                stride = config.strides[i]
                if config.downsampler == "strided":
                    level.downsample = conv(width, width, 3, stride=stride, padding=1)
                else:
                    level.downsample = pool(stride)
            self.down.append(level)
        self.mid_block = nn.ModuleList(ResBlock(width, width, conv) for _ in range(config.mid_blocks))
        self.norm_out = group_norm(width)
        self.conv_out = conv(width, config.code_channels, 1)

    def forward(self, x):
        """Pictures (B, 3, H, W) in [-1, 1] to z (B, K, h, w)."""
        h = self.conv_in(space_to_depth(x, self.patch) if max(self.patch) > 1 else x)
        for level in self.down:
            for block in level.block:
                h = run_block(block, h, self.checkpointing)               # (B, width, H / 2^i, W / 2^i)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        for block in self.mid_block:
            h = run_block(block, h, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(h)))                    # (B, K, h, w)


class Decoder(nn.Module):
    """Codes q to pictures. Levels are stored shallowest first, as in the encoder, and run deepest first."""

    def __init__(self, config, conv=nn.Conv2d, upsamplers=UPSAMPLERS):
        super().__init__()
        self.checkpointing = False
        self.patch = config.folds
        widths = [config.channels * m for m in config.channel_multipliers]
        width = widths[-1]
        self.conv_in = conv(config.code_channels, width, 3, padding=1)
        self.mid_block = nn.ModuleList(ResBlock(width, width, conv) for _ in range(config.mid_blocks))
        levels, norms = [], []
        for i in reversed(range(len(widths))):
            if config.adaptive_norm:
                norms.insert(0, AdaptiveGroupNorm(config.code_channels, width))
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.blocks):
                level.block.append(ResBlock(width, widths[i], conv))
                width = widths[i]
            if i > 0:
                level.upsample = upsamplers[config.upsampler](width, config.strides[i - 1], conv)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.adaptive = nn.ModuleList(norms)                              # empty with adaptive_norm off
        self.norm_out = group_norm(width)
        self.conv_out = conv(width, 3 * math.prod(self.patch), 3, padding=1)

    def forward(self, q):
        """Codes q (B, K, h, w) to pictures (B, 3, H, W), in about [-1, 1] (there is no tanh)."""
        h = self.conv_in(q)
        for block in self.mid_block:
            h = run_block(block, h, self.checkpointing)
        for i in reversed(range(len(self.up))):
            if len(self.adaptive):
                h = self.adaptive[i](h, q)
            for block in self.up[i].block:
                h = run_block(block, h, self.checkpointing)               # (B, width, H / 2^i, W / 2^i)
            if hasattr(self.up[i], "upsample"):
                h = self.up[i].upsample(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return depth_to_space(h, self.patch) if max(self.patch) > 1 else h


def run_block(block, x, checkpointing):
    """block(x); with checkpointing its activations are thrown away and recomputed in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)      # no dropout in here
    return block(x)


class Tokenizer(nn.Module):
    """Encoder, quantiser and decoder (figure 2, stage I). video.py gives it those of clips."""

    format = "open-magvit2-tokenizer"        # marks our own checkpoint files
    config_type, presets = TokenizerConfig, PRESETS                # what `load_tokenizer` builds and names
    unit = "images"                          # what a batch consists of
    code_map = "(B, h, w)"                   # the shape of its ids

    def __init__(self, config, encoder=None, decoder=None):
        super().__init__()
        self.config = config
        self.encoder = encoder or Encoder(config)
        self.decoder = decoder or Decoder(config)
        self.quantizer = LFQ(config.bits) if config.quantizer == "lfq" else VQ(config.codebook_size,
                                                                               config.codebook_channels)

    def check_images(self, images):
        """Raise `UserError` unless `images` is (B, 3, H, W), divides into tokens, and makes two or more."""
        stride = self.config.downsampling
        runtime.require(
            images.dim() == 4 and images.shape[1] == 3,
            f"the tokenizer takes RGB pictures (B, 3, H, W), not a tensor of {list(images.shape)}",
        )
        height, width = images.shape[2:]
        runtime.require(
            height % stride == 0 and width % stride == 0 and height * width > stride**2,
            f"a picture of {height} x {width} does not divide into tokens of {stride} x {stride}; "
            f"use multiples of {stride} that make at least two tokens",
        )

    def forward(self, images):
        """Everything that training needs of a batch.

        images (B, 3, H, W) in [-1, 1]. Returns reconstruction (B, 3, H, W); z (B, K, h, w) in fp32, before
        quantisation; q of the same shape, after it; ids (B, h, w). The decoder sees q, while its gradient
        reaches z as if quantisation had been the identity (straight-through).
        """
        self.check_images(images)
        z = self.encoder(images).float()                                  # (B, K, h, w)
        q, ids = self.quantizer(z)                                        # (B, K, h, w), (B, h, w)
        reconstruction = self.decoder(q.detach() + (z - z.detach()))      # exactly q, with the gradient of z
        return reconstruction, z, q, ids

    @torch.no_grad()
    def encode(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] to token ids (B, h, w), int64 in 0 .. vocabulary - 1."""
        self.check_images(images)
        return self.quantizer(self.encoder(images).float())[1]

    @torch.no_grad()
    def decode(self, ids):
        """Token ids (B, h, w) to pictures (B, 3, H, W), in about [-1, 1], not clamped."""
        runtime.require(
            ids.dim() == 1 + len(self.config.folds) and math.prod(ids.shape[1:]) > 1,
            f"token ids must be {self.code_map} with at least two tokens, not {list(ids.shape)}",
        )
        runtime.require(
            0 <= int(ids.min()) and int(ids.max()) < self.config.vocabulary,
            f"token ids must lie in 0 .. {self.config.vocabulary - 1}, but reach from {int(ids.min())} "
            f"to {int(ids.max())}; they belong to another tokenizer",
        )
        return self.decoder(self.quantizer.codes(ids))


# ------------------------------------------------------------------------------------------------------------
# 4. Loading
# ------------------------------------------------------------------------------------------------------------

# The discriminators in published files: PatchGAN, and the blur-pool one of pretrain256_16384.ckpt. They are
# not needed here, but a strict loader must know them to tell a damaged file from a whole one.
NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
PUBLISHED_DISCRIMINATORS = (
    {f"main.{i}.{n}" for i in (0, 11) for n in ("weight", "bias")} | {f"main.{i}.weight" for i in (2, 5, 8)}
    | {f"main.{i}.{n}" for i in (3, 6, 9) for n in ("weight", "bias", *NORM_BUFFERS)},
    {f"{layer}.{n}" for layer in ("block_in.0", "to_logits.0", "to_logits.2") for n in ("weight", "bias")}
    | {f"blocks.{i}.{n}" for i in range(3) for n in ("0.weight", "0.bias", "1.kernel", "2.weight", "2.bias")},
)


def config_from_names(state):
    """The `TokenizerConfig` behind the names and shapes of a published image tokenizer's encoder."""
    runtime.require(
        "encoder.conv_in.weight" in state and "encoder.conv_out.weight" in state,
        "the file lacks encoder.conv_in.weight or encoder.conv_out.weight: not a whole image tokenizer",
    )
    levels = sorted({int(m[1]) for name in state if (m := re.match(r"encoder\.down\.(\d+)\.", name))})
    blocks = len({m[1] for name in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))})
    mid_blocks = len({m[1] for name in state if (m := re.match(r"encoder\.mid_block\.(\d+)\.", name))})
    channels = state["encoder.conv_in.weight"].shape[0]
    first = [f"encoder.down.{i}.block.0.conv1.weight" for i in levels]
    missing = [name for name in first if name not in state]
    runtime.require(not missing, f"the file lacks {', '.join(missing)}")
    return TokenizerConfig(
        resolution={5: 256, 4: 128}.get(len(levels), 16 * 2 ** (len(levels) - 1)), channels=channels,
        channel_multipliers=tuple(state[name].shape[0] // channels for name in first),
        blocks=blocks, mid_blocks=mid_blocks, bits=state["encoder.conv_out.weight"].shape[0])


def published_groups(state_dict, source):
    """Sort the names of a published `state_dict`, of an image or video tokenizer, into three groups.

    Returns {"model": .., "discriminator": .., "ema": ..}, each name -> tensor without its prefix. What a file
    holds:
      encoder.*, decoder.*      the raw weights, "model"
      loss.discriminator.*      checked for completeness here, as nobody needs it to make tokens
      loss.perceptual_loss.*    a whole LPIPS, skipped
      model_ema.*               averages of all parameters above, their names without dots; decay; num_updates
      transformer.*             in an AR file; its tokenizer stands under first_stage_model.*, without
      averages
    Raises `UserError` that lists every other name, and what the discriminator lacks.
    """
    prefix = "first_stage_model." if any(name.startswith("first_stage_model.") for name in state_dict) else ""
    groups, extra = {"model": {}, "discriminator": {}, "ema": {}}, []
    for name, tensor in state_dict.items():
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(("encoder.", "decoder.")):
            groups["model"][name.removeprefix(prefix)] = tensor
        elif name.startswith("loss.discriminator."):
            groups["discriminator"][name.removeprefix("loss.discriminator.")] = tensor
        elif name.startswith("model_ema."):
            groups["ema"][name.removeprefix("model_ema.")] = tensor
        elif not name.startswith(
            ("loss.perceptual_loss.", "transformer.") if prefix else "loss.perceptual_loss."
        ):
            extra.append(name)
    runtime.require(
        not extra, f"{source} holds names that no published tokenizer has: {', '.join(sorted(extra))}"
    )
    found = groups["discriminator"].keys()
    if found:
        expected = min(PUBLISHED_DISCRIMINATORS, key=lambda names: len(names ^ found))
        runtime.require(found == expected, f"the discriminator in {source} is not whole; missing: "
                        f"{sorted(expected - found)}; not expected: {sorted(found - expected)}")
    return groups


def published_averages(groups, source):
    """The EMA weights among `published_groups`, under the names of the raw ones. Buffers have no average."""
    parameters = [*groups["model"], *(f"loss.discriminator.{name}" for name in groups["discriminator"]
                                      if not name.endswith((*NORM_BUFFERS, "kernel")))]
    dotless = {name.replace(".", ""): name for name in parameters}         # the way back to the dots
    missing = sorted(dotless[name] for name in dotless.keys() - groups["ema"].keys())
    extra = sorted(groups["ema"].keys() - dotless.keys() - {"decay", "num_updates"})
    runtime.require(
        not missing and not extra,
        f"the EMA weights in {source} do not match its raw weights; without an "
        f"average: {missing}; averages of nothing: {extra}; --raw-weights does without them",
    )
    return {name: groups["ema"][name.replace(".", "")] for name in groups["model"]}


def preset_name(config, presets):
    """The preset that has this config, or "custom". Presets of equal shape go by the first one's name."""
    return next((name for name, preset in presets.items() if preset == config), "custom")


# Flags of a tokenizer's training that say what it has seen; stage II and evaluation take them as defaults.
TRAINED_ON = ("data_path", "val_data_path", "resize", "split_list", "val_split_list")
# Each causal convolution of a published video tokenizer is a module around a `conv_1`; ours has no wrapper.
WRAPPER, VIDEO_FORMAT = ".conv_1.", "open-magvit2-video-tokenizer"


def without_wrapper(state):
    """The names of a published video tokenizer to ours; those of an image tokenizer stay as they are."""
    return {name.replace(WRAPPER, "."): tensor for name, tensor in state.items()}


def is_video(stored):
    """Whether `stored`, a checkpoint as `runtime.load_checkpoint` gives it, is of a tokenizer of clips."""
    names = stored.get("state_dict", ())
    return stored.get("format") == VIDEO_FORMAT or any(WRAPPER in name for name in names)


def load_tokenizer(path, ema=True, trust=False, kind=Tokenizer):
    """Load an image tokenizer from a checkpoint of ours, a published tokenizer, or a published AR file.

    ema: take the averaged weights where the file has them (published results are with EMA), else the raw
    ones. trust: unpickle foreign classes too (see `runtime.load_checkpoint`). kind: the class to load; see
    `video.load_video_tokenizer` for the other one.
    Returns (Tokenizer in eval mode on the CPU, info), where info says "preset", "weights" ("EMA" or "raw"),
    "step", "source" ("ours" or "published"), the "sha256" of the file, and what it was trained on, if ours
    (`TRAINED_ON`). Strict: raises `UserError` listing missing and unexpected names.
    """
    stored = runtime.load_checkpoint(path, trust, mmap=True)
    marked = f" (it is marked {stored['format']})" if "format" in stored else ""
    runtime.require(
        stored.get("format") in (Tokenizer.format, VIDEO_FORMAT) or "state_dict" in stored,
        f"{path} is no tokenizer checkpoint: it has neither our format mark nor a state_dict{marked}",
    )
    clips = is_video(stored)
    runtime.require(
        clips == (kind.format == VIDEO_FORMAT),
        f"{path} is " + ("a video tokenizer, but one of images is needed here; video.py and `evaluate.py "
                         "video` take it" if clips else
                         "an image tokenizer, but one of clips is needed here; it can only be the start of "
                         "one (video.py train --inflate-from)"))
    averages, ours = {}, "format" in stored
    if ours:
        config = config_from_dict(stored["config"], path, kind.config_type)
        raw, averages = stored["model"], stored["ema"] if ema else {}
    else:
        groups = published_groups(stored["state_dict"], path)
        raw = without_wrapper(groups["model"])
        config = kind.config_type(**vars(config_from_names(raw)))
    model = kind(config)
    runtime.load_state_strictly(model, raw, str(path))
    if not ours and ema and groups["ema"]:
        averages = without_wrapper(published_averages(groups, path))
    if averages:
        runtime.load_state_strictly(model, {**raw, **averages}, f"the EMA weights in {path}")
    info = {"preset": preset_name(config, kind.presets), "weights": "EMA" if averages else "raw",
            "step": stored.get("step" if ours else "global_step"), "source": "ours" if ours else "published",
            "sha256": runtime.sha256_of(path),
            **{name: stored.get("args", {}).get(name) for name in TRAINED_ON}}
    return model.eval(), info


def config_to_dict(config):
    """A config as a dict of primitives, for checkpoints and JSON."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()
    }


def config_from_dict(values, source, kind=TokenizerConfig):
    """The inverse of `config_to_dict`. Raises `UserError` for fields of another version of this project."""
    known = kind.__dataclass_fields__.keys()
    runtime.require(
        values.keys() == known,
        f"{source} was written by another version of this project: its config "
        f"differs in {sorted(values.keys() ^ known)}",
    )
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
