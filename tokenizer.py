"""The image tokenizer of Open-MAGVIT2: an image becomes a small grid of 18-bit tokens, and tokens an image.

A convolutional encoder shrinks the image, lookup-free quantisation keeps only the sign of each of its K
output channels, and a convolutional decoder paints the image back from those signs. K signs are one of 2^K
patterns: a vocabulary of 262,144 costs no codebook at all. In reading order: 1. quantisation: LFQ, eq. 1 to
3, and VQ, table 3; 2. rivals of these two, and groups: skip at first; 3. layers; 4. the model, presets.

    python tokenizer.py reconstruct photo.jpg --ckpt in1k-256          # beside the original: support/codec.py
    python tokenizer.py encode photos --output ids.npz                 # and: decode ids.npz --output decoded

    from support import checkpoints
    model, info = checkpoints.load_tokenizer("in1k-256")               # or runs/tokenizer/step-00001200.pt
    ids = model.encode(torch.zeros(1, 3, 256, 256))                    # (1, 16, 16), each 0 .. 2^18 - 1
    images = model.decode(ids)                                         # (1, 3, 256, 256) in about [-1, 1]

A token is a place in the grid: z is the encoder's vector there, q what quantisation makes of it, the id q as
a number. Axis letters: B batch, C channels, H W height and width of an image, h w of the grid, N tokens, K
bits of a token, V ids; *S all axes in space (and time). Images: RGB in [-1, 1]. Modules: the published names.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- 1. Quantisation ---------------------------------------------------------------------------------------

def ids_to_bits(ids, bits):
    """Ids (...), int64 in 0 .. 2^bits - 1, to bits (..., bits), int64 0 or 1, bit 0 first (eq. 2)."""
    return ids.unsqueeze(-1) >> torch.arange(bits, device=ids.device) & 1


def bits_to_ids(bits):
    """Bits (..., K), 0/1 or bool, bit 0 first, to ids (...), int64: the sum over k of 2^k bit_k (eq. 2)."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def reverse_bits(ids, bits):
    """Ids of `bits` bits to those of libraries whose channel 0 is the highest bit, or back."""
    return bits_to_ids(ids_to_bits(ids, bits).flip(-1))


class Quantizer(nn.Module):
    """What all quantisers share. An id is below `vocabulary`, made of one below `group_vocabulary` for each
    group, the first lowest. There is ONE group but for --groups."""
    own_terms = {}                                 # weights of those of its `losses` that have no flag

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
        """How often each of the V ids of each group is among `ids` (any shape): (groups, V) int64."""
        V = self.group_vocabulary
        group = torch.arange(self.groups, device=ids.device)[:, None]
        parts = ids.flatten() // V ** group % V + V * group                # (groups, N), for one bincount
        return parts.flatten().bincount(minlength=V * self.groups).view(-1, V)

    def losses(self, z, q, tau, eps, mean_over_ranks, entropy="exact"):
        """Two dicts of scalars: terms to minimise, and what to report."""
        return {}, {}


class LFQ(Quantizer):
    """Lookup-free quantisation (eq. 1): each channel of z becomes +1 where z > 0, else -1. No parameters."""
    amplitude = 1.0                                # of q; a rival has another

    def __init__(self, config):
        super().__init__(config.bits, 2 ** (config.bits // config.groups), config.groups)

    def forward(self, z):
        """z (B, K, *S) to q (B, K, *S) in {-1, +1} * amplitude without gradient, and ids (B, *S) int64."""
        positive = z > 0
        return torch.where(positive, self.amplitude, -self.amplitude), bits_to_ids(positive.movedim(1, -1))

    def ids_to_q(self, ids):
        """ids (B, *S) to q (B, K, *S) in {-1.0, +1.0} * amplitude."""
        return ((ids_to_bits(ids, self.channels).movedim(-1, 1) * 2.0 - 1.0) * self.amplitude).contiguous()

    def losses(self, z, q, tau, eps, mean_over_ranks, entropy="exact"):
        """As of `Quantizer`; both entropies are of whole tokens, reported in bits (at most K)."""
        widths = part_widths(self.channels, self.groups, entropy)          # None, but for rivals
        per_token, codebook = lfq_entropies(z.movedim(1, -1).flatten(0, -2), tau / self.amplitude, eps,
                                            mean_over_ranks, widths)
        terms = {"commitment": (z - q.detach()).square().mean(), "entropy": per_token - codebook}
        return terms, {"token_bits": per_token.detach() / math.log(2),
                       "codebook_bits": codebook.detach() / math.log(2)}


def mean_over_tokens(p1, p0):
    """The distribution over all 2^K ids, averaged over N tokens of K independent bits, 1 and 0 with chances
    p1, p0 (N, K): (2^K,). A token's is the outer product of those of its high and of its low bits. A mean of
    these is ONE matrix product, (2^(K - K/2) x N)(N x 2^(K/2)); no N x 2^K table, 1 GiB for N 1024, K 18."""
    def joint(first, last):                        # of these bits of each token: (N, 2^(last - first))
        table = p1.new_ones(len(p1), 1)
        for k in range(first, last):               # one more bit, and twice the ids
            table = torch.cat([table * p0[:, k:k + 1], table * p1[:, k:k + 1]], dim=1)
            # Far below fp32's resolution of the mean. As denormals, they made all this 11 times slower.
            table = table.masked_fill(table < 1e-18, 0.0)
        return table
    N, K = p1.shape
    return (joint(K // 2, K).T @ joint(0, K // 2) / N).flatten()           # by id: low bits change fastest


def lfq_entropies(z, tau=0.01, eps=0.0, mean_over_ranks=None, widths=None):
    """Both terms of the entropy loss (eq. 3), exact over the whole codebook {-1, 1}^K, in nats.

    z: (N, K) encoder outputs of N tokens. Returns two scalars; the loss is the first minus the second:
      per_token  mean over tokens of H(f(z)): small when every token is sure of its id
      codebook   H(mean over tokens of f(z)): large when all ids are used evenly. At most K ln 2.
    f(z) is the softmax over all c in {-1, 1}^K of 2 <z, c> / tau. That is a sum over channels of
    2 z_k c_k / tau, so f is a product: of K independent bits. From c_k = -1 to c_k = 1 the exponent grows by
    4 z_k / tau, the log-odds of bit k, so that p_k = sigmoid(4 z_k / tau). Then H(f) is a sum of K binary
    entropies, and the mean of f one matrix product: `mean_over_tokens`.

    mean_over_ranks: averages a tensor over all ranks, without gradient; None for one process. widths: None,
    or as of `mean_over_parts`, for a bound. eps: added inside the logarithm of the codebook term; 0 is the
    true entropy. With the published 1e-5, a uniform codebook of 2^18 reads 11.19 of 12.48 nats: it stops
    pulling where ids are rarer than 1e-5. All is fp32, whatever autocast says: 4 z / tau reaches hundreds,
    where bf16 steps by whole units, and the gradient would be wrong by up to 100 %."""
    with torch.autocast(z.device.type, enabled=False):
        a = 4 * z.float() / tau                                            # (N, K) log-odds of each bit
        p1, p0 = torch.sigmoid(a), torch.sigmoid(-a)                       # (N, K); 1 - p1 would cancel
        per_token = (p1 * F.softplus(-a) + p0 * F.softplus(a)).sum(1).mean()
        own = mean_over_tokens(p1, p0) if widths is None else mean_over_parts(p1, p0, widths)
        # The value of the global mean with the gradient of the local one. DDP averages gradients, so R ranks
        # with batch b have exactly the loss and the gradient of one with batch R * b. It is 1 MiB for K = 18.
        mean = own + (mean_over_ranks(own.detach()) - own.detach()) if mean_over_ranks else own
        # An id that no token comes near underflows to 0; clamped, its 0 log 0 is 0, with a finite gradient.
        log_mean = (mean + eps).clamp_min(torch.finfo(torch.float32).tiny).log()
        return per_token, -(mean * log_mean).sum()


class VQ(Quantizer):
    """The classical alternative (table 3, "LFQ" off): each z takes the nearest entry of a codebook. Entries
    that none takes get no gradient and stay dead: why large codebooks need LFQ."""
    own_terms = {"codebook": 1.0}

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
        return self.ids_to_q(ids), ids

    def ids_to_q(self, ids):
        """ids (B, *S) to entries of the codebook (B, C, *S)."""
        return F.embedding(ids, self.entries()).movedim(-1, 1).contiguous()

    def losses(self, z, q, tau, eps, mean_over_ranks, entropy="exact"):
        """As of `Quantizer`. Entries move to those z that took them; nothing else trains the codebook."""
        terms = {"commitment": (z - q.detach()).square().mean(), "codebook": (q - z.detach()).square().mean()}
        return terms, {}


# ---- 2. Rivals: skip at first ------------------------------------------------------------------------------

# --entropy: how many bits its codebook term takes together, at most. Groups (WeTok, Zhuang et al., 2025) have
# a codebook each in it: K / G bits cost less, so that K can be larger. No group has more than 24.
JOINT_BITS = {"exact": 24, "groups": 9, "bits": 1}


def part_widths(bits, groups, entropy):
    """The bits of each part that the codebook term takes together; None: all are one part, as is exact."""
    group = bits // groups
    joint = min(group, JOINT_BITS[entropy])
    return None if joint == bits else [min(joint, group - k) for k in range(0, group, joint)] * groups


def mean_over_parts(p1, p0, widths):
    """`mean_over_tokens` of each part by itself, one after another: (sum of 2^width,). Its entropy is the sum
    of theirs, which takes parts for independent: at least the exact one, and equal to it where they are."""
    return torch.cat([mean_over_tokens(*part) for part in zip(p1.split(widths, 1), p0.split(widths, 1))])


class BSQ(LFQ):
    """Binary spherical quantisation (Zhao et al., 2024): LFQ on the unit sphere, z and q of length 1.
    f(z) = softmax over all c in {-1, 1}^K / sqrt(K) of -|z - c|^2 / tau, where |z| and |c| are the same for
    all c. That leaves 2 <z, c> / tau, so bit k has the log-odds 4 z_k / (sqrt(K) tau): `lfq_entropies` at
    the temperature sqrt(K) tau is as exact here. With groups, a token still has length 1 as a whole."""

    def __init__(self, config):
        super().__init__(config)
        self.amplitude = config.bits ** -0.5

    def bound(self, z):
        """z (B, K, *S) to length 1. Gradients come back through the division: none is along z."""
        return F.normalize(z, dim=1)


class FSQ(Quantizer):
    """Finite scalar quantisation (Mentzer et al., 2023): tanh, then each channel goes to the nearest level.
    These are even from -1 to 1 (the paper shifts an even number of them, so that one is 0). Few channels of
    few levels get used by themselves, so there is no loss."""

    def __init__(self, config):
        super().__init__(len(config.levels), math.prod(config.levels))
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels)                             # (C,) L_c
        self.register_buffer("places", levels.cumprod(0) // levels)        # (C,) value of a digit in the id

    def bound(self, z):
        """z (B, C, *S) to -1 .. 1."""
        return z.tanh()

    def forward(self, z):
        """z (B, C, *S) in -1 .. 1 to the nearest levels q (B, C, *S) without gradient, and ids (B, *S)."""
        z = z.detach().movedim(1, -1).nan_to_num()                         # NaN as an integer is no id
        digits = ((z + 1) / 2 * (self.levels - 1)).round().long()          # (B, *S, C) in 0 .. L_c - 1
        ids = (digits * self.places).sum(-1)
        return self.ids_to_q(ids), ids

    def ids_to_q(self, ids):
        """ids (B, *S) to levels (B, C, *S) in -1 .. 1."""
        digits = ids.unsqueeze(-1) // self.places % self.levels
        return (digits / (self.levels - 1) * 2 - 1).movedim(-1, 1).contiguous()


class SimVQ(VQ):
    """VQ of frozen noise times ONE learned matrix (Zhu et al., 2024): a chosen entry moves all others too."""

    def __init__(self, config):
        super().__init__(config)
        nn.init.normal_(self.codebook.weight, std=self.channels ** -0.5).requires_grad_(False)
        self.linear = nn.Linear(self.channels, self.channels, bias=False)

    def entries(self):
        """The codebook (V, C), with gradient to the matrix."""
        return self.linear(self.codebook.weight)


# A new quantiser is a class like these and an entry here. Its terms have flags --NAME-weight, or own_terms.
QUANTIZERS = {"lfq": LFQ, "bsq": BSQ, "fsq": FSQ, "vq": VQ, "simvq": SimVQ}

# ---- 3. Layers. `conv` is nn.Conv2d here; video.py builds the same layers from causal 3D convolutions. -----

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
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else conv(in_channels, out_channels, 1, bias=False)

    def forward(self, x):                                                  # (B, C, *S)
        y = self.conv1(F.silu(self.norm1(x)))                              # (B, C', *S)
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.nin_shortcut(x)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm, scaled and shifted by all tokens: gamma(std of q) * GN(x) + beta(mean of q) (section 2.2).
    Mean and std over the latent grid, of each channel of q, tell all layers of the decoder what the whole
    image is about (how often each bit is 1), which a stack of 3x3 convolutions would learn late."""

    def __init__(self, z_channels, channels):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def forward(self, x, q):                                               # (B, C, *S), (B, K, *s)
        tokens = q.flatten(2)                                              # (B, K, N)
        std = (tokens.var(dim=2) + 1e-6).sqrt()                            # (B, K), unbiased variance
        all_of_it = (..., *[None] * (x.dim() - 2))                         # [..., None, None] for images
        return self.gamma(std)[all_of_it] * self.norm(x) + self.beta(tokens.mean(dim=2))[all_of_it]


def depth_to_space(x, block):
    """Trade channels for resolution, in 2D and 3D: (B, prod(block) * C, *S) to (B, C, *(S * block)). The
    order is DCR: channel c at (dy, dx) comes from input channel (dy * block_x + dx) * C + c. That of
    `nn.PixelShuffle` is another (CRD), and published weights turn to noise with it."""
    n = len(block)
    x = x.unflatten(1, (*block, -1))                                       # (B, dy, dx, C, H, W)
    x = x.permute(0, n + 1, *[j for i in range(n) for j in (n + 2 + i, 1 + i)])        # (B, C, H, dy, W, dx)
    return x.reshape(*x.shape[:2], *map(math.prod, zip(x.shape[2::2], block)))         # (B, C, H dy, W dx)


def space_to_depth(x, block):
    """The inverse of `depth_to_space`: (B, C, *(S * block)) to (B, prod(block) * C, *S)."""
    n = len(block)
    pairs = [size for side, d in zip(x.shape[2:], block) for size in (side // d, d)]
    x = x.view(*x.shape[:2], *pairs)                                                   # (B, C, H, dy, W, dx)
    x = x.permute(0, *range(3, 2 * n + 2, 2), 1, *range(2, 2 * n + 2, 2))              # (B, dy, dx, C, H, W)
    return x.flatten(1, n + 1)                                                         # (B, dy dx C, H, W)


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

# ---- 4. The model ------------------------------------------------------------------------------------------

def flag(default, text, **options):
    """A dataclass field with the help text, and perhaps the choices, of its command-line flag."""
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class TokenizerConfig:
    """The shape of a tokenizer, or ValueError. Defaults: Open-MAGVIT2-I-In1k (table 1). Switches: table 3."""
    frames = None                                  # what only clips have; no field, and so in no file
    time_stride = 1
    grid_axes = "hw"                               # of ids
    resolution: int = flag(256, "side of the crops; any multiple of the stride works", flag="--image-size")
    channels: int = flag(128, "width of the first level")
    channel_multipliers: tuple = flag((1, 1, 2, 2, 4), "width of levels; all but the last halve the sides")
    blocks: int = flag(4, "residual blocks a level (deeper model)")
    mid_blocks: int = 4                            # residual blocks at the latent grid's resolution
    patch: int = flag(1, "fold patch x patch pixels into channels first: cheap on a CPU")
    quantizer: str = flag("lfq", "of signs, levels (fsq) or codebooks (vq, simvq)", choices=QUANTIZERS)
    bits: int = flag(18, "bits K of a token of lfq or bsq, so 2^K ids")
    groups: int = flag(1, "of K / G bits, each with an entropy term of its own: then K is up to 32")
    levels: tuple = flag((8, 5, 5, 5), "levels of each channel of fsq; their product is the vocabulary")
    codebook_size: int = flag(1024, "entries of the codebook of vq or simvq")
    codebook_channels: int = 64                    # length of such an entry
    adaptive_norm: bool = flag(True, "adaptive GroupNorm in the decoder")
    upsampler: str = flag("depth-to-space", "after a conv, or nearest before one", choices=UPSAMPLERS)
    downsampler: str = flag("strided", "strided conv, or average pooling", choices=("strided", "average"))

    def __post_init__(self):
        def check(condition, text):
            if not condition:
                raise ValueError(text)
        check(self.channels > 0 and self.channels % 32 == 0,
              f"channels {self.channels}: GroupNorm has 32 groups; use a multiple of 32")
        check(self.channel_multipliers and min(self.channel_multipliers) >= 1,
              f"channel-multipliers {self.channel_multipliers}: give positive integers, such as 1 2 2 4")
        check(self.groups > 0 and self.bits % self.groups == 0 and 0 < self.bits <= min(24 * self.groups, 32),
              f"groups {self.groups} of bits {self.bits}: groups divide 1 to 32 bits, into 24 at most each")
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


PRESETS = {
    "in1k-256": TokenizerConfig(),
    "in1k-128": TokenizerConfig(resolution=128, channel_multipliers=(1, 2, 2, 4)),
    "pt-256-2^18": TokenizerConfig(),
    "pt-256-2^14": TokenizerConfig(bits=14),
    # For a laptop: 32 x 32 images, 8 x 8 tokens. Folding 2 x 2 pixels makes a step three times faster.
    "toy": TokenizerConfig(resolution=32, channels=32, channel_multipliers=(1, 2), blocks=1, mid_blocks=0,
                           patch=2, bits=10)}


class Blocks(nn.ModuleList):
    """Residual blocks, the first from `width` to `out_width` channels."""

    def __init__(self, width, out_width, count, conv):
        super().__init__(ResBlock(out_width if i else width, out_width, conv) for i in range(count))

    def forward(self, x, checkpointing):
        """checkpointing: activations are recomputed in the backward pass, not stored. There is no dropout."""
        again = checkpointing and torch.is_grad_enabled()
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
        return x


class Encoder(nn.Module):
    """Images to z, K channels for each token, not yet quantised."""

    def __init__(self, config, z_channels, conv, pool):
        super().__init__()
        self.checkpointing = False
        self.patch = (1, config.patch, config.patch)[-len(config.grid_axes):]         # (dy, dx): no frames
        width = config.channels
        self.conv_in = conv(3 * math.prod(self.patch), width, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i, multiplier in enumerate(config.channel_multipliers):
            blocks = Blocks(width, config.channels * multiplier, config.blocks, conv)
            width = config.channels * multiplier
            if i == len(config.strides):
                downsample = nn.Identity()
            elif config.downsampler == "strided":
                downsample = conv(width, width, 3, stride=config.strides[i], padding=1)
            else:
                downsample = pool(config.strides[i])
            self.down.append(nn.ModuleDict({"block": blocks, "downsample": downsample}))
        self.mid_block = Blocks(width, width, config.mid_blocks, conv)
        self.norm_out = group_norm(width)
        self.conv_out = conv(width, z_channels, 1)

    def forward(self, x):                                                 # (B, 3, H, W) in [-1, 1]
        x = self.conv_in(space_to_depth(x, self.patch))
        for level in self.down:
            x = level.downsample(level.block(x, self.checkpointing))      # (B, width, H / 2^i, W / 2^i)
        x = self.mid_block(x, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(x)))                    # (B, K, h, w)


class Decoder(nn.Module):
    """q to images. Levels are stored shallowest first, as in the encoder, and run deepest first."""

    def __init__(self, config, z_channels, conv, upsampler):
        super().__init__()
        self.checkpointing = False
        self.patch = (1, config.patch, config.patch)[-len(config.grid_axes):]         # (dy, dx): no frames
        width = config.channels * config.channel_multipliers[-1]
        self.conv_in = conv(z_channels, width, 3, padding=1)
        self.mid_block = Blocks(width, width, config.mid_blocks, conv)
        self.up = nn.ModuleList()
        self.adaptive = nn.ModuleList()                                   # empty with adaptive_norm off
        for i, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            if config.adaptive_norm:
                self.adaptive.insert(0, AdaptiveGroupNorm(z_channels, width))
            blocks = Blocks(width, config.channels * multiplier, config.blocks, conv)
            width = config.channels * multiplier
            upsample = upsampler(width, config.strides[i - 1], conv) if i > 0 else nn.Identity()
            self.up.insert(0, nn.ModuleDict({"block": blocks, "upsample": upsample}))
        self.norm_out = group_norm(width)
        self.conv_out = conv(width, 3 * math.prod(self.patch), 3, padding=1)

    def forward(self, q):                                                 # (B, K, h, w)
        x = self.mid_block(self.conv_in(q), self.checkpointing)
        for i, level in reversed(list(enumerate(self.up))):
            x = self.adaptive[i](x, q) if len(self.adaptive) else x
            x = level.upsample(level.block(x, self.checkpointing))        # (B, width, H / 2^i, W / 2^i)
        x = self.conv_out(F.silu(self.norm_out(x)))                       # in about [-1, 1]: there is no tanh
        return depth_to_space(x, self.patch)


class Tokenizer(nn.Module):
    """Encoder, quantiser and decoder (figure 2, stage I)."""
    conv = nn.Conv2d                               # for clips, these three are others
    pool = nn.AvgPool2d
    upsamplers = UPSAMPLERS

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.quantizer = QUANTIZERS[config.quantizer](config)
        self.encoder = Encoder(config, self.quantizer.channels, self.conv, self.pool)
        self.decoder = Decoder(config, self.quantizer.channels, self.conv, self.upsamplers[config.upsampler])

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
        """Of images (B, 3, H, W) in [-1, 1]: reconstruction (B, 3, H, W) and z (B, K, h, w), bounded but not
        yet quantised, both in fp32; q of z's shape; ids (B, h, w). The decoder sees q, while its gradient
        reaches z as if quantisation had been the identity (straight-through)."""
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
        axes = ", ".join(["B", *self.config.grid_axes])
        if ids.is_floating_point() or ids.dim() != len(axes.split()) or math.prod(ids.shape[1:]) < 2:
            raise ValueError(f"token ids must be integers ({axes}) with two tokens or more, not {ids.dtype} "
                             f"{list(ids.shape)}")
        ids = ids.long()                           # of uint32, torch knows no minimum
        if int(ids.min()) < 0 or int(ids.max()) >= self.quantizer.vocabulary:
            raise ValueError(f"token ids must lie in 0 .. {self.quantizer.vocabulary - 1}, but reach from "
                             f"{int(ids.min())} to {int(ids.max())}; they belong to another tokenizer")
        return self.decoder(self.quantizer.ids_to_q(ids).to(next(self.decoder.parameters()).dtype))


if __name__ == "__main__":                         # files through a tokenizer: support/codec.py
    import runpy
    runpy.run_module("support.codec", run_name="__main__")
