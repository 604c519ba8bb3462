"""The image tokenizer of Open-MAGVIT2: an image becomes a small grid of 18-bit codes, and codes an image.

A convolutional encoder shrinks the image, lookup-free quantisation keeps only the sign of each of its K
output channels, and a convolutional decoder paints the image back from those signs. K signs are a code out
of 2^K, so a vocabulary of 262,144 costs no codebook at all. In reading order:

    1. quantisation    codes as ids and bits, the exact entropy term (eq. 3), LFQ (eq. 1, 2); its rivals
    2. layers          residual block, adaptive GroupNorm, down- and upsampler
    3. model           encoder, decoder, Tokenizer, presets

    python tokenizer.py reconstruct photo.jpg --ckpt in1k-256          # beside the original: support/codec.py
    python tokenizer.py encode photos --output ids.npz                 # and: decode ids.npz --output decoded

    from support import checkpoints
    model, info = checkpoints.load_tokenizer("in1k-256")               # or runs/tokenizer/step-00001200.pt
    ids = model.encode(torch.zeros(1, 3, 256, 256))                    # (1, 16, 16), each 0 .. 2^18 - 1
    images = model.decode(ids)                                         # (1, 3, 256, 256) in about [-1, 1]

It is trained by train_tokenizer.py and judged by `evaluate.py reconstruction`. Axis letters: B batch, C
channels, H W height and width of an image, h w of the latent grid, N tokens, K bits of a code. *S: all axes
in space (and time). Images are RGB in [-1, 1]. Module names are those of the published files, so weights load
unmapped.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- 1. Quantisation ---------------------------------------------------------------------------------------

def ids_to_bits(ids, bits):
    """Token ids (...), int64 in 0 .. 2^bits - 1, to bits (..., bits), int64 0 or 1, bit 0 first (eq. 2)."""
    return ids.unsqueeze(-1) >> torch.arange(bits, device=ids.device) & 1


def bits_to_ids(bits):
    """Bits (..., K), 0/1 or bool, bit 0 first, to token ids (...), int64: sum over k of 2^k bit_k (eq. 2)."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def bit_products(p, q):
    """Joint distribution (N, 2^k), bit 0 fastest, of k bits that are 1 and 0 with chances p, q (N, k)."""
    joint = p.new_ones(len(p), 1)
    for k in range(p.shape[1]):
        joint = torch.cat([joint * q[:, k:k + 1], joint * p[:, k:k + 1]], dim=1)
        # Far below fp32's resolution of a mean over tokens. Left alone, such products become denormal
        # numbers, which made the whole term 11 times slower on a CPU.
        joint = joint.masked_fill(joint < 1e-18, 0.0)
    return joint


def lfq_entropies(z, tau=0.01, eps=0.0, mean_over_ranks=None, widths=None):
    """Both terms of the entropy loss (eq. 3), exact over all 2^K codes, in nats.

    z: (N, K) encoder outputs of N tokens. Returns two scalars; the loss is the first minus the second:
      per_token  mean over tokens of H(f(z)): small when every token is sure of its code
      codebook   H(mean over tokens of f(z)): large when the codebook is used evenly. At most K ln 2.
    f(z) = softmax over codes c in {-1, 1}^K of 2 <z, c> / tau: an N x 2^K table, 1 GiB at N = 1024, K = 18.
    But the exponent is a sum over channels, so the softmax is a product of K independent bits with p_k =
    sigmoid(4 z_k / tau). Then (1) the entropy of a token is a sum of K binary entropies, and (2) the mean
    over tokens of a product of two half-codes is ONE matrix product, (2^(K/2) x N)(N x 2^(K/2)).

    mean_over_ranks: averages a tensor over all ranks, without gradient; None for one process.
    eps: added inside the logarithm of the codebook term, as the official code does with 1e-5. That reads
    11.19 instead of 12.48 nats for a uniform 2^18 codebook, so the default is the true entropy.
    widths: the bits of each part of a code, K in all; None: one part. Parts are taken for independent, so
    that `codebook` is the sum of their entropies: at least the exact one, and equal to it where they are.
    Half precision would be wrong by up to 100 % in the gradient (4 z / tau reaches hundreds, where bf16 steps
    by whole units), so everything here is fp32, whatever autocast says.
    """
    with torch.autocast(z.device.type, enabled=False):
        a = 4 * z.float() / tau                                              # (N, K) log-odds of each bit
        p, q = torch.sigmoid(a), torch.sigmoid(-a)                           # (N, K); 1 - p would cancel
        per_token = (p * F.softplus(-a) + q * F.softplus(a)).sum(1).mean()   # K binary entropies a token

        widths = widths or [z.shape[1]]
        means = []
        for p, q in zip(p.split(widths, dim=1), q.split(widths, dim=1)):     # a part of k bits
            half = p.shape[1] // 2
            low = bit_products(p[:, :half], q[:, :half])                     # (N, 2^(k//2))
            high = bit_products(p[:, half:], q[:, half:])                    # (N, 2^(k - k//2))
            means.append((high.T @ low / len(z)).flatten())                  # all its 2^k codes, by id
        mean = torch.cat(means)                        # of all parts: their entropies are one sum, below
        if mean_over_ranks:
            # The value of the global mean with the gradient of the local one. DDP averages gradients, so R
            # ranks with batch b then have exactly the loss and the gradient of one rank with batch R * b.
            # 1 MiB for K = 18.
            mean = mean + (mean_over_ranks(mean.detach()) - mean.detach())
        # A code that no token touches underflows to 0; clamped, its 0 log 0 is 0, with a finite gradient.
        log_mean = (mean + eps).clamp_min(torch.finfo(torch.float32).tiny).log()
        return per_token, -(mean * log_mean).sum()


class Quantizer(nn.Module):
    """What all quantisers share. A token is a number below `group_vocabulary` for each of its groups (one but
    for --groups), and its id, below `vocabulary`, is all of them in ONE int64, the first group lowest."""

    def __init__(self, channels, group_vocabulary, groups=1):
        super().__init__()
        self.channels = channels                   # of z and q
        self.groups = groups
        self.group_vocabulary = group_vocabulary
        self.vocabulary = group_vocabulary ** groups

    def bound(self, z):
        """The encoder's z (B, C, *S) to the z, of the same shape, that is quantised and that losses see."""
        return z

    def count(self, ids):
        """How often each of the V codes of each of the G groups is in `ids` (any shape): (G, V) int64."""
        V = self.group_vocabulary
        group = torch.arange(self.groups, device=ids.device)[:, None]
        codes = ids.flatten() // V ** group % V + V * group                # (G, N), for one bincount of all
        return codes.flatten().bincount(minlength=V * self.groups).view(-1, V)

    def losses(self, z, q, tau, eps, mean_over_ranks, entropy="exact"):
        """Two dicts of scalars: terms to minimise, and what to report."""
        return {}, {}


# --entropy: how many bits at most its codebook term takes together. No group has more than 24.
JOINT_BITS = {"exact": 24, "groups": 9, "bits": 1}


class LFQ(Quantizer):
    """Lookup-free quantisation (eq. 1): each channel of z becomes +1 where z > 0, else -1. No parameters.

    With groups (WeTok, Zhuang et al., 2025) each K / G bits are a codebook of their own in the entropy term.
    It costs no more than a code of K / G bits, so K can be larger.
    """
    amplitude = 1.0                                # of the codes

    def __init__(self, config):
        super().__init__(config.bits, 2 ** (config.bits // config.groups), config.groups)

    def forward(self, z):
        """z (B, K, *S) to q (B, K, *S) in {-1, +1} * amplitude without gradient, and ids (B, *S) int64."""
        positive = z > 0
        q = torch.where(positive, self.amplitude, -self.amplitude)
        return q, bits_to_ids(positive.movedim(1, -1))

    def codes(self, ids):
        """ids (B, *S) to q (B, K, *S) in {-1.0, +1.0} * amplitude."""
        return ((ids_to_bits(ids, self.channels).movedim(-1, 1) * 2.0 - 1.0) * self.amplitude).contiguous()

    def losses(self, z, q, tau, eps, mean_over_ranks, entropy="exact"):
        """As of `Quantizer`; both entropies are of whole tokens, reported in bits (at most K)."""
        bits = self.channels // self.groups
        joint = min(bits, JOINT_BITS[entropy])
        widths = [min(joint, bits - first) for first in range(0, bits, joint)] * self.groups
        per_token, codebook = lfq_entropies(z.movedim(1, -1).flatten(0, -2), tau / self.amplitude, eps,
                                            mean_over_ranks, widths)
        terms = {"commitment": (z - q.detach()).square().mean(), "entropy": per_token - codebook}
        return terms, {"token_bits": per_token.detach() / math.log(2),
                       "codebook_bits": codebook.detach() / math.log(2)}


class BSQ(LFQ):
    """Binary spherical quantisation (Zhao et al., 2024): LFQ on the unit sphere, z and codes of length 1.

    f(z) = softmax over codes c in {-1, 1}^K / sqrt(K) of -|z - c|^2 / tau. In |z|^2 + |c|^2 - 2 <z, c>, the
    first two are the same for all codes, which leaves 2 <z, c> / tau, a sum over bits as in LFQ. Bit k makes
    a difference of 4 z_k / (sqrt(K) tau) in it, its log-odds: those of `lfq_entropies` at the temperature
    sqrt(K) tau, which is thus as exact here. With groups, a token still has length 1 as a whole.
    """

    def __init__(self, config):
        super().__init__(config)
        self.amplitude = config.bits ** -0.5

    def bound(self, z):
        """z (B, K, *S) to length 1. Gradients come back through the division: none is along z."""
        return F.normalize(z, dim=1)


class FSQ(Quantizer):
    """Finite scalar quantisation (Mentzer et al., 2023): tanh, then each channel goes to the nearest level.

    Levels are evenly spaced from -1 to 1 (the paper shifts an even number of them, so that one is 0). Few
    channels of few levels get used by themselves, so there is no loss.
    """

    def __init__(self, config):
        super().__init__(len(config.levels), math.prod(config.levels))
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels)                             # (C,) L_k
        self.register_buffer("places", levels.cumprod(0) // levels)        # (C,) value of a digit in the id

    def bound(self, z):
        """z (B, C, *S) to -1 .. 1."""
        return z.tanh()

    def forward(self, z):
        """z (B, C, *S) in -1 .. 1 to the nearest levels q (B, C, *S) without gradient, and ids (B, *S)."""
        z = z.detach().movedim(1, -1).nan_to_num()                         # NaN as an integer is no id
        digits = ((z + 1) / 2 * (self.levels - 1)).round().long()          # (B, *S, C) in 0 .. L_k - 1
        ids = (digits * self.places).sum(-1)
        return self.codes(ids), ids

    def codes(self, ids):
        """ids (B, *S) to levels (B, C, *S) in -1 .. 1."""
        digits = ids.unsqueeze(-1) // self.places % self.levels
        return (digits / (self.levels - 1) * 2 - 1).movedim(-1, 1).contiguous()


class VQ(Quantizer):
    """The classical alternative (table 3, "LFQ" off): each vector takes the nearest entry of a codebook.

    Entries that no vector chooses get no gradient and stay dead: why large codebooks need LFQ.
    """

    def __init__(self, config):
        super().__init__(config.codebook_channels, config.codebook_size)
        self.codebook = nn.Embedding(self.vocabulary, self.channels)
        nn.init.uniform_(self.codebook.weight, -1 / self.vocabulary, 1 / self.vocabulary)    # VQ-VAE's start

    def entries(self):
        """The codebook (V, C)."""
        return self.codebook.weight

    def forward(self, z):
        """z (B, C, *S) to the nearest entries q (B, C, *S), with gradient to the codebook; ids (B, *S)."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            table = self.entries().float()
            # |z - e|^2 = |z|^2 - 2 <z, e> + |e|^2, and |z|^2 is the same for every entry.
            ids = (table.square().sum(1) - 2 * z.movedim(1, -1).float() @ table.T).argmin(-1)
        return self.codes(ids), ids

    def codes(self, ids):
        """ids (B, *S) to codebook entries (B, C, *S)."""
        return F.embedding(ids, self.entries()).movedim(-1, 1).contiguous()

    def losses(self, z, q, tau, eps, mean_over_ranks, entropy="exact"):
        """As of `Quantizer`. Entries move to vectors that chose them; nothing else trains the codebook."""
        terms = {"commitment": (z - q.detach()).square().mean(), "codebook": (q - z.detach()).square().mean()}
        return terms, {}


class SimVQ(VQ):
    """VQ of frozen noise times ONE learned matrix (Zhu et al., 2024): a chosen entry moves all others too."""

    def __init__(self, config):
        super().__init__(config)
        nn.init.normal_(self.codebook.weight, std=self.channels ** -0.5).requires_grad_(False)
        self.linear = nn.Linear(self.channels, self.channels, bias=False)

    def entries(self):
        """The codebook (V, C), with gradient to the matrix."""
        return self.linear(self.codebook.weight)


# A new quantiser is a class like these and an entry here. Its terms are weighed by --NAME-weight, or 1.
QUANTIZERS = {"lfq": LFQ, "bsq": BSQ, "fsq": FSQ, "vq": VQ, "simvq": SimVQ}

# ---- 2. Layers. `conv` is nn.Conv2d here; video.py builds the same layers from causal 3D convolutions. -----

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

    def forward(self, x):                                                  # (B, C, *S)
        h = self.conv1(F.silu(self.norm1(x)))                              # (B, C', *S)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm, scaled and shifted by the codes: gamma(std of q) * GN(x) + beta(mean of q) (section 2.2).

    Mean and std over the latent grid, of each sample and code channel, tell all layers of the decoder what
    the whole image is about (how often each bit is on), which a stack of 3x3 convolutions would learn late.
    """

    def __init__(self, code_channels, channels):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.gamma = nn.Linear(code_channels, channels)
        self.beta = nn.Linear(code_channels, channels)

    def forward(self, x, q):                                               # (B, C, *S), codes (B, K, *s)
        flat = q.flatten(2)
        std = (flat.var(dim=2) + 1e-6).sqrt()                              # (B, K), unbiased variance
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))                       # (B, C, 1, 1)
        return self.gamma(std).view(shape) * self.norm(x) + self.beta(flat.mean(dim=2)).view(shape)


def depth_to_space(x, block):
    """Trade channels for resolution, in 2D and 3D: (B, prod(block) * C, *S) to (B, C, *(S * block)).

    The order is DCR: output channel c at (dy, dx) comes from input channel (dy * block_x + dx) * C + c.
    `nn.PixelShuffle` is the other order (CRD), and published weights turn to noise with it.
    """
    for axis, size in enumerate(block, start=2):                           # (B, dy * dx * C, H, W)
        x = x.unflatten(1, (size, -1)).movedim(1, axis + 1)                # (B, dx * C, H, dy, W)
        x = x.flatten(axis, axis + 1)                                      # (B, dx * C, H * dy, W)
    return x


def space_to_depth(x, block):
    """The inverse of `depth_to_space`: (B, C, *(S * block)) to (B, prod(block) * C, *S)."""
    for axis, size in reversed(list(enumerate(block, start=2))):
        x = x.unflatten(axis, (-1, size)).movedim(axis + 1, 1).flatten(1, 2)
    return x


class Upsample(nn.Module):
    """A conv to prod(block) * C channels, then depth-to-space: each output pixel has its own kernel."""

    def __init__(self, channels, block=(2, 2), conv=nn.Conv2d):
        super().__init__()
        self.block = block
        self.conv1 = conv(channels, channels * math.prod(block), 3, padding=1)

    def forward(self, x):                                                  # (B, C, H, W) to (B, C, 2H, 2W)
        return depth_to_space(self.conv1(x), self.block)


class NearestUpsample(nn.Module):
    """The baseline of table 3: repeat each pixel, then a 3x3 conv."""

    def __init__(self, channels, block=(2, 2), conv=nn.Conv2d):
        super().__init__()
        self.block = block
        self.conv1 = conv(channels, channels, 3, padding=1)

    def forward(self, x):                                                  # (B, C, H, W) to (B, C, 2H, 2W)
        return self.conv1(F.interpolate(x, scale_factor=tuple(map(float, self.block)), mode="nearest"))


UPSAMPLERS = {"depth-to-space": Upsample, "nearest": NearestUpsample}

# ---- 3. The model ------------------------------------------------------------------------------------------

def flag(default, text, **options):
    """A dataclass field with the help text, and perhaps the choices, of its command-line flag."""
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class TokenizerConfig:
    """The shape of a tokenizer. Defaults: Open-MAGVIT2-I-In1k, 256 x 256 (table 1). Switches: table 3.

    Raises ValueError for shapes that cannot be.
    """
    resolution: int = flag(256, "side of the crops; any multiple of the stride works", flag="--image-size")
    channels: int = flag(128, "width of the first level")
    channel_multipliers: tuple = flag((1, 1, 2, 2, 4), "width of each level over the first; each but the "
                                                       "last halves the resolution")
    blocks: int = flag(4, "residual blocks a level (deeper model)")
    mid_blocks: int = 4                            # residual blocks at the latent grid's resolution
    patch: int = flag(1, "fold patch x patch pixels into channels first: cheap on a CPU")
    quantizer: str = flag("lfq", "of signs, levels (fsq) or codebooks (vq, simvq)", choices=QUANTIZERS)
    bits: int = flag(18, "bits K of a code of lfq or bsq, so 2^K codes")
    groups: int = flag(1, "of K / G bits, each with an entropy term of its own: then K is up to 32")
    levels: tuple = flag((8, 5, 5, 5), "levels of each channel of fsq; their product is the vocabulary")
    codebook_size: int = flag(1024, "entries of the codebook of vq or simvq")
    codebook_channels: int = 64                    # length of such an entry
    adaptive_norm: bool = flag(True, "adaptive GroupNorm in the decoder")
    upsampler: str = flag("depth-to-space", "a conv and depth-to-space, or nearest neighbours and a conv",
                          choices=UPSAMPLERS)
    downsampler: str = flag("strided", "strided conv, or average pooling", choices=("strided", "average"))

    def __post_init__(self):
        def check(condition, text):
            if not condition:
                raise ValueError(text)
        check(self.channels > 0 and self.channels % 32 == 0,
              f"channels {self.channels}: GroupNorm has 32 groups; use a multiple of 32")
        check(self.channel_multipliers and min(self.channel_multipliers) >= 1,
              f"channel-multipliers {self.channel_multipliers}: give positive integers, such as 1 2 2 4")
        check(self.groups >= 1 and self.bits % self.groups == 0,
              f"groups {self.groups} do not divide bits {self.bits}: use a divisor")
        check(1 <= self.bits <= min(24 * self.groups, 32), f"bits {self.bits}, groups {self.groups}: a code "
                                                           f"has 1 to 32 bits, and a group 24 at most")
        check(min(self.levels, default=0) >= 2 and math.prod(self.levels) <= 2 ** 24,
              f"levels {self.levels}: give 2 or more for each channel, with a product of 2^24 at most")
        check(1 <= self.blocks <= 1000 and 0 <= self.mid_blocks <= 1000 and self.patch >= 1,
              "blocks and mid-blocks must lie between 1 (or 0) and 1000, and patch be 1 or more")
        check(self.codebook_size >= 2 and self.codebook_channels >= 1, "a codebook has 2 entries or more")
        check(self.quantizer in QUANTIZERS and self.upsampler in UPSAMPLERS and self.downsampler in (
            "strided", "average"), f"{self.quantizer}, {self.upsampler} or {self.downsampler} is unknown")
        check(self.resolution > 0 and self.resolution % self.downsampling == 0,
              f"image-size {self.resolution} is no multiple of the tokenizer's stride {self.downsampling}")

    @property
    def downsampling(self):
        """Pixels along a side that one token stands for."""
        return self.patch * 2 ** (len(self.channel_multipliers) - 1)

    def latent_grid(self, height, width):
        """The axes (h, w) of the ids of an image."""
        return height // self.downsampling, width // self.downsampling

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
    # For a laptop: 32 x 32 images, 8 x 8 tokens. Folding 2 x 2 pixels first makes a step three times faster
    # than a full-resolution level, at no loss in quality at this size.
    "toy": TokenizerConfig(resolution=32, channels=32, channel_multipliers=(1, 2), blocks=1, mid_blocks=0,
                           patch=2, bits=10)}


class Level(nn.Module):
    """The residual blocks at one resolution, the first from `width` to `out_width` channels."""

    def __init__(self, width, out_width, count, conv):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(out_width if i else width, out_width, conv) for i in range(count))


def run(blocks, x, checkpointing):
    """x through `blocks`; with checkpointing, activations are recomputed in the backward pass, not stored."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)       # no dropout in here
        else:
            x = block(x)
    return x


class Encoder(nn.Module):
    """Images to z, K channels for each token, not yet quantised."""

    def __init__(self, config, code_channels, conv=nn.Conv2d, pool=nn.AvgPool2d):
        super().__init__()
        self.checkpointing = False
        self.patch = config.folds
        width = config.channels
        self.conv_in = conv(3 * math.prod(self.patch), width, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i, multiplier in enumerate(config.channel_multipliers):
            level = Level(width, config.channels * multiplier, config.blocks, conv)
            width = config.channels * multiplier
            if i < len(config.strides) and config.downsampler == "strided":
                level.downsample = conv(width, width, 3, stride=config.strides[i], padding=1)
            elif i < len(config.strides):
                level.downsample = pool(config.strides[i])
            self.down.append(level)
        self.mid_block = nn.ModuleList(ResBlock(width, width, conv) for _ in range(config.mid_blocks))
        self.norm_out = group_norm(width)
        self.conv_out = conv(width, code_channels, 1)

    def forward(self, x):                                                 # (B, 3, H, W) in [-1, 1]
        h = self.conv_in(space_to_depth(x, self.patch) if max(self.patch) > 1 else x)
        for level in self.down:
            h = run(level.block, h, self.checkpointing)                   # (B, width, H / 2^i, W / 2^i)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = run(self.mid_block, h, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(h)))                    # (B, K, h, w)


class Decoder(nn.Module):
    """Codes q to images. Levels are stored shallowest first, as in the encoder, and run deepest first."""

    def __init__(self, config, code_channels, conv=nn.Conv2d, upsamplers=UPSAMPLERS):
        super().__init__()
        self.checkpointing = False
        self.patch = config.folds
        width = config.channels * config.channel_multipliers[-1]
        self.conv_in = conv(code_channels, width, 3, padding=1)
        self.mid_block = nn.ModuleList(ResBlock(width, width, conv) for _ in range(config.mid_blocks))
        self.up = nn.ModuleList()
        self.adaptive = nn.ModuleList()                                   # empty with adaptive_norm off
        for i, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            if config.adaptive_norm:
                self.adaptive.insert(0, AdaptiveGroupNorm(code_channels, width))
            level = Level(width, config.channels * multiplier, config.blocks, conv)
            width = config.channels * multiplier
            if i > 0:
                level.upsample = upsamplers[config.upsampler](width, config.strides[i - 1], conv)
            self.up.insert(0, level)
        self.norm_out = group_norm(width)
        self.conv_out = conv(width, 3 * math.prod(self.patch), 3, padding=1)

    def forward(self, q):                                                 # (B, K, h, w)
        h = run(self.mid_block, self.conv_in(q), self.checkpointing)
        for i in reversed(range(len(self.up))):
            if len(self.adaptive):
                h = self.adaptive[i](h, q)
            h = run(self.up[i].block, h, self.checkpointing)              # (B, width, H / 2^i, W / 2^i)
            if hasattr(self.up[i], "upsample"):
                h = self.up[i].upsample(h)
        h = self.conv_out(F.silu(self.norm_out(h)))                       # in about [-1, 1]: there is no tanh
        return depth_to_space(h, self.patch) if max(self.patch) > 1 else h


class Tokenizer(nn.Module):
    """Encoder, quantiser and decoder (figure 2, stage I)."""
    grid_axes = "h, w"                             # of its ids

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.quantizer = QUANTIZERS[config.quantizer](config)
        self.encoder, self.decoder = self.build_networks(config, self.quantizer.channels)

    def build_networks(self, config, code_channels):
        """(encoder, decoder); a tokenizer of other things has other ones."""
        return Encoder(config, code_channels), Decoder(config, code_channels)

    def check_images(self, images):
        """Raise ValueError unless `images` is (B, 3, H, W), divides into tokens, and makes two or more."""
        stride = self.config.downsampling
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"the tokenizer takes RGB images (B, 3, H, W), not {list(images.shape)}")
        height, width = images.shape[2:]
        if height % stride or width % stride or height * width <= stride ** 2:
            raise ValueError(f"an image of {height} x {width} does not divide into tokens of {stride} x "
                             f"{stride}; use multiples of {stride} that make at least two tokens")

    def forward(self, images):
        """Everything that training needs of a batch.

        images (B, 3, H, W) in [-1, 1]. Returns reconstruction (B, 3, H, W) and z (B, K, h, w), before
        quantisation but bounded for it, both in fp32; q of z's shape, after it; ids (B, h, w). The decoder
        sees q, while its gradient reaches z as if quantisation had been the identity (straight-through).
        """
        self.check_images(images)
        z = self.quantizer.bound(self.encoder(images).float())            # (B, K, h, w)
        q, ids = self.quantizer(z)                                        # (B, K, h, w), (B, h, w)
        reconstruction = self.decoder(q.detach() + (z - z.detach()))      # exactly q, with the gradient of z
        return reconstruction.float(), z, q, ids

    @torch.no_grad()
    def encode(self, images):
        """Float images (B, 3, H, W) in [-1, 1] to token ids (B, h, w), int64 in 0 .. vocabulary - 1."""
        self.check_images(images)
        if not images.is_floating_point() or (images.abs() > 2).any():
            raise ValueError(f"the tokenizer takes floats in [-1, 1], not {images.dtype} in "
                             f"{images.min().item():g} .. {images.max().item():g}; see pictures.to_float")
        z = self.encoder(images).float()
        if not z.isfinite().all():                 # NaN has a sign, so the ids would look like any others
            raise ValueError("the encoder's output is not finite, nor perhaps its weights; use bf16 or fp32")
        return self.quantizer(self.quantizer.bound(z))[1]

    @torch.no_grad()
    def decode(self, ids):
        """Token ids (B, h, w) of any integer dtype to images (B, 3, H, W), in about [-1, 1], not clamped."""
        if ids.is_floating_point() or ids.dim() != 1 + len(self.config.folds) or math.prod(ids.shape[1:]) < 2:
            raise ValueError(f"token ids must be integers (B, {self.grid_axes}) with two tokens or more, not "
                             f"{ids.dtype} {list(ids.shape)}")
        ids = ids.long()                           # of uint32, torch knows no minimum
        if int(ids.min()) < 0 or int(ids.max()) >= self.quantizer.vocabulary:
            raise ValueError(f"token ids must lie in 0 .. {self.quantizer.vocabulary - 1}, but reach from "
                             f"{int(ids.min())} to {int(ids.max())}; they belong to another tokenizer")
        return self.decoder(self.quantizer.codes(ids).to(next(self.decoder.parameters()).dtype))


if __name__ == "__main__":                         # files through a tokenizer: support/codec.py
    import runpy
    runpy.run_module("support.codec", run_name="__main__")
