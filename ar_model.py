"""The auto-regressive transformer of Open-MAGVIT2: it draws an image code by code, and each code in M steps.

A vocabulary of 2^18 is too large for one softmax, so a token is factorised into sub-tokens of 2^6 and 2^12
entries (asymmetric token factorisation, section 2.3). Predicting them with separate heads would ignore that
they belong to one code; instead a second, much shallower transformer predicts one sub-token after the other
("next sub-token prediction"). In reading order:

    1. layers     RMSNorm, rotary positions, SwiGLU, the Llama block between tokens and the one within a token
    2. model      ARConfig, presets, ARModel: C_t from all earlier tokens (eq. 5), sub-tokens from C_t (eq. 6)
    3. sampling   guidance, temperature, top-k, top-p, a draw; one token; a batch of images, eager or compiled
    4. loading    our own checkpoints, and the ones that the authors published

It is trained by train_ar.py and makes pictures in sample.py. To draw tokens from Python:

    import torch, ar_model
    model, info = ar_model.load_ar("AR_256_B.ckpt")               # or runs/ar/step-00001000.pt
    ar_model.prepare_for_sampling(model, torch.bfloat16)
    labels = torch.tensor([207, 360])                             # golden retriever, otter
    subtokens = ar_model.sample(model, labels, seeds=[0, 1], cfg_scale=(1.9, 2.0))        # 2 x (2, 256)

Axis letters: B batch, R rows of a sampling step (B, or 2B with guidance), N tokens of an image, M sub-tokens
of a token, V = 2^(k_m) entries of a sub-vocabulary, D width, H heads, d = D / H.
"""
import dataclasses
import math
import typing

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import runtime

# ------------------------------------------------------------------------------------------------------------
# 1. Layers
# ------------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the norm in float32 whatever the precision around it."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def rope_table(grid, head_dim, base=10000.0):
    """Rotary positions (1 + N, 1, 1, d/2, 2): cos and sin of the angle by which a pair of channels is turned.

    The d/2 pairs of a head are shared out over the axes of `grid`, in order: on an image the first half turns
    with the row and the second with the column, pair i of p by base^(-i/p) radians a cell. Three axes (t, y,
    x) get a third each, and the last ones what is left over. Entry 1 + n is cell n in raster order.

    Entry 0 belongs to the class token and is all zeros, cos too: not a rotation by nothing but a vanishing
    query and key, so that everybody attends to the class with the same score 0.
    """
    pairs = head_dim // 2
    cells = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in grid))
    angles = []
    for axis, coordinate in enumerate(cells.reshape(-1, len(grid)).unbind(1)):
        share = (pairs + axis) // len(grid)
        angles.append(coordinate[:, None] * base ** (-torch.arange(share) / share))
    angles = torch.cat(angles, dim=1)                                                     # (N, d/2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)                             # (N, d/2, 2)
    return F.pad(table, (0, 0, 0, 0, 1, 0))[:, None, None]


def rotate(x, rope):
    """Turn each pair of neighbouring channels of x (..., d) by its angle in `rope` (..., d/2, 2), in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():           # written out, because the compiler fuses real arithmetic only
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:                                       # (a + ib)(cos + i sin): the same, much faster on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).type_as(x)


class Attention(nn.Module):
    """The two matrices of attention, under Llama's names. The blocks below say who attends to what."""

    def __init__(self, width):
        super().__init__()
        self.wqkv = nn.Linear(width, 3 * width, bias=False)     # rows: all of q, all of k, all of v
        self.wo = nn.Linear(width, width, bias=False)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w13 = None

    def fuse(self):
        """Join w1 and w3 for sampling, where a step is a chain of small products, each with a fixed cost."""
        self.w13 = nn.Linear(self.w2.out_features, 2 * self.w2.in_features, bias=False, device="meta")
        self.w13.weight = nn.Parameter(torch.cat([self.w1.weight, self.w3.weight]), requires_grad=False)
        self.w1 = self.w3 = None

    def forward(self, x):
        gate, value = (self.w1(x), self.w3(x)) if self.w13 is None else self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


class LlamaBlock(nn.Module):
    """Pre-norm Llama block without biases, in three acts: `project` to q, k and v; attend; `finish`.

    Attending differs between tokens (InterBlock) and within a token (IntraBlock), in training and in
    sampling; the first and the last act are the same everywhere.
    """

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config.width)
        self.ffn_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config.width, config.ffn_hidden)
        self.attention_dropout = nn.Dropout(config.attention_dropout)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout)

    def project(self, x, rope):
        """x (..., D) to q, k, v (..., H, d), q and k turned by `rope`."""
        qkv = self.attention.wqkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k = rotate(qkv[..., :2, :, :], rope).unbind(-3)
        return q, k, qkv[..., 2, :, :]

    def finish(self, x, attended):
        """Output projection and feed-forward, each added to the residual stream x (..., D)."""
        x = x + self.attention_dropout(self.attention.wo(attended))
        return x + self.ffn_dropout(self.feed_forward(self.ffn_norm(x)))


class InterBlock(LlamaBlock):
    """Llama block between tokens (eq. 5): position t attends to the class and to the tokens before t."""

    def forward(self, x, rope):
        """All positions at once: x (B, N, D) -> (B, N, D)."""
        q, k, v = (z.transpose(1, 2) for z in self.project(x, rope))                      # (B, H, N, d)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.finish(x, attended.transpose(1, 2).flatten(2))

    def store(self, x, rope, keys, values, position):
        """x (R, D) to its query (R, H, d); its key and value go into slot `position` (1,) of the cache."""
        q, k, v = self.project(x, rope)
        keys[:, :, position] = k.unsqueeze(2)
        values[:, :, position] = v.unsqueeze(2)
        return q

    def step(self, x, rope, keys, values, position, length, mask):
        """One position: x (R, D) -> (R, D), reading the first `length` slots of the cache (R, H, N, d)."""
        q = self.store(x, rope, keys, values, position).unsqueeze(2)                      # (R, H, 1, d)
        keys, values = keys[:, :, :length], values[:, :, :length]
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.finish(x, attended.flatten(1))


def attend_within_token(q, keys, values):
    """Attention of the last position of the little sequence [context, sub-token 1, .., sub-token m].

    q (..., H, d), m keys and 1 + m values of that shape. The context's key is zero (its rotary entry is), so
    its score is 0 and its value v_0 the start. Every sub-token of score s then pulls the result towards its
    value by its share of the softmax so far, e^s / (e^total + e^s) = sigmoid(s - total). With M = 2 that is
    one gate a head, v_0 + sigmoid(q.k / sqrt(d)) (v_1 - v_0): no cache tensor, no mask, and no attention
    kernel that would have to run over B x N sequences of length 2.
    """
    attended, total = values[0], 0.0            # total: log of the softmax's denominator, e^0 for the context
    for k, v in zip(keys, values[1:]):
        score = (q.float() * k.float()).sum(-1, keepdim=True) * q.shape[-1] ** -0.5 - total
        attended = attended + torch.sigmoid(score).type_as(v) * (v - attended)
        total = total + F.softplus(score)       # log(e^total + e^s)
    return attended


class IntraBlock(LlamaBlock):
    """Llama block within a token (eq. 6): the sequence [C_t, sub-token 1, .., sub-token M - 1], causal."""

    def forward(self, x, rope):
        """All sub-tokens of all positions at once: x (B, N, M, D) -> (B, N, M, D)."""
        q, k, v = (z.unbind(2) for z in self.project(x, rope))                            # M x (B, N, H, d)
        attended = [attend_within_token(q[m], k[1:m + 1], v[:m + 1]) for m in range(len(q))]
        return self.finish(x, torch.stack(attended, dim=2).flatten(3))

    def step(self, x, rope, keys, values):
        """Sub-token step m: x (R, D) -> (R, D), and the lists of m keys and m + 1 values (R, H, d) so far."""
        q, k, v = self.project(x, rope)
        keys, values = [*keys, k] if values else [], [*values, v]       # the context's key is zero: left out
        return self.finish(x, attend_within_token(q, keys, values).flatten(1)), keys, values


# ------------------------------------------------------------------------------------------------------------
# 2. Model
# ------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class ARConfig:
    """The shape of a transformer, by default AR-B of table 2. Raises `UserError` for impossible shapes."""
    width: int = 1024
    heads: int = 16
    inter_blocks: int = 24              # N in table 2: blocks between tokens
    intra_blocks: int = 2               # L in table 2: blocks within a token
    bits: tuple = (6, 12)               # k_m of each sub-token; their sum is the tokenizer's K
    grid: tuple = (16, 16)              # (rows, columns) of an image's tokens, or (t, y, x) of a video's
    num_classes: int = 1000             # 0: unconditional, the one entry of the class table means "no class"
    token_dropout: float = 0.1          # on the input sequence, class embedding included
    attention_dropout: float = 0.1      # on the output of attention, before it joins the residual stream
    ffn_dropout: float = 0.1            # on the output of the feed-forward network
    label_dropout: float = 0.1          # how often training shows "no class", from which guidance leads away
    ffn_multiple: int = 256             # the hidden width of the feed-forward network is rounded up to this
    separate_heads: bool = False        # baseline: M heads on C_t, no intra blocks ("intuitive solution")

    def __post_init__(self):
        self.bits, self.grid = tuple(self.bits), tuple(self.grid)
        for name in ("width", "heads", "inter_blocks", "ffn_multiple"):
            runtime.require(getattr(self, name) >= 1, f"{name} of an AR model must be 1 or more")
        for name in ("token_dropout", "attention_dropout", "ffn_dropout", "label_dropout"):
            runtime.require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1")
        runtime.require(self.bits and min(self.bits) >= 1, f"bits {self.bits}: a sub-token needs 1 or more")
        runtime.require(self.grid and min(self.grid) >= 1, f"grid {self.grid}: an axis needs 1 cell or more")
        runtime.require(self.num_classes >= 0, "num_classes must be 0 (unconditional) or more")
        runtime.require(self.width % (2 * self.heads) == 0 and self.head_dim >= 2 * len(self.grid),
                        f"width {self.width} does not suit {self.heads} heads on {len(self.grid)} axes; make "
                        f"it an even multiple of the heads, with 2 channels an axis or more")
        runtime.require(self.separate_heads or self.intra_blocks >= (1 if len(self.bits) > 1 else 0),
                        "intra_blocks must be 1 or more: later sub-tokens see the context through them alone "
                        "(or set separate_heads)")
        # Sub-token m takes entry m of the rotary table, which has one entry more than the grid has cells.
        runtime.require(len(self.bits) <= self.tokens + 1, f"{len(self.bits)} sub-tokens need a larger grid")

    @property
    def tokens(self):
        """N, the number of tokens of an image."""
        return math.prod(self.grid)

    @property
    def head_dim(self):
        """d, the channels of a head."""
        return self.width // self.heads

    @property
    def ffn_hidden(self):
        """Two thirds of 4 D, as SwiGLU has three matrices in place of two, rounded up to `ffn_multiple`."""
        return -(-(8 * self.width // 3) // self.ffn_multiple) * self.ffn_multiple


PRESETS = {
    "AR-B": ARConfig(),
    "AR-L": ARConfig(width=1280, heads=20, inter_blocks=36, intra_blocks=3),
    "AR-XL": ARConfig(width=1536, heads=24, inter_blocks=48, intra_blocks=4),
    # Minutes on a laptop: a run this short never sees an image often enough to need dropout of activations.
    "toy": ARConfig(width=128, heads=4, inter_blocks=4, intra_blocks=1, bits=(5, 5), grid=(8, 8),
                    num_classes=10, ffn_multiple=32,
                    token_dropout=0.0, attention_dropout=0.0, ffn_dropout=0.0),
}

# How the rows of table 5 were sampled and, as "looking" (any model of M = 2), what suits pictures to look at.
SAMPLING = {
    "AR-B": {"cfg_scale": (1.9, 2.0), "temperature": (1.0, 1.0), "top_k": (0, 0), "top_p": (1.0, 1.0)},
    "AR-L": {"cfg_scale": (1.9, 1.9), "temperature": (1.1, 1.0), "top_k": (0, 0), "top_p": (1.0, 1.0)},
    "AR-XL": {"cfg_scale": (1.75, 1.85), "temperature": (1.1, 1.0), "top_k": (0, 0), "top_p": (1.0, 1.0)},
    "looking": {"cfg_scale": (4.0, 4.0), "temperature": (1.0, 1.0), "top_k": (0, 0), "top_p": (0.96, 0.96)},
}


class ARModel(nn.Module):
    """p(x_t^m | class, x_1 .. x_{t-1}, x_t^1 .. x_t^{m-1}) for all tokens t and their sub-tokens m (eq. 7).

    `checkpointing` = True computes the blocks' activations again in the backward pass instead of keeping
    them: a third more time for far less memory.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        D = config.width
        self.token_embeddings = nn.ModuleList(nn.Embedding(2 ** bits, D) for bits in config.bits)
        self.class_embedding = nn.Embedding(config.num_classes + 1, D)         # the last entry is "no class"
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.inter_blocks = nn.ModuleList(InterBlock(config) for _ in range(config.inter_blocks))
        self.intra_blocks = nn.ModuleList(
            IntraBlock(config) for _ in range(0 if config.separate_heads else config.intra_blocks))
        self.norm = RMSNorm(D)
        self.heads = nn.ModuleList(nn.Linear(D, 2 ** bits, bias=False) for bits in config.bits)
        self.register_buffer("rope", rope_table(config.grid, config.head_dim), persistent=False)
        self.initialise()

    def initialise(self):
        """All initial weights of the model. RMSNorm keeps its ones."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)    # small branches beside the residual stream
        for head in self.heads:
            nn.init.zeros_(head.weight)                     # uniform predictions: the loss starts at K log 2

    def run(self, block, x, rope):
        """`block(x, rope)`, its activations kept for the backward pass or, under `checkpointing`, not."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rope, use_reentrant=False)
        return block(x, rope)

    def forward(self, subtokens, labels, return_loss=False):
        """Logits of every sub-token, given the true ones before it (teacher forcing).

        subtokens: list of M int64 tensors (B, N) in raster order, the m-th in 0 .. 2^(k_m) - 1; labels (B,)
        int64, of which `num_classes` means "no class". Returns a list of M logits (B, N, V), or with
        `return_loss` what `loss` makes of them: so a call goes through DistributedDataParallel and
        torch.compile. In training mode, labels and activations drop out by torch's global generator.
        """
        N, M = subtokens[0].shape[1], len(self.heads)
        assert len(subtokens) == M and N <= self.config.tokens, "tokens of another factorisation or grid"
        if self.training:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(dropped, self.config.num_classes)

        embeddings = [table(ids) for table, ids in zip(self.token_embeddings, subtokens)] # M x (B, N, D)
        start = self.class_embedding(labels).unsqueeze(1)                                 # (B, 1, D)
        x = torch.cat([start, sum(embeddings)[:, :-1]], dim=1)                            # (B, N, D)
        x = self.token_dropout(x)
        for block in self.inter_blocks:                 # eq. 5: position t becomes the context C_t
            x = self.run(block, x, self.rope[:N])                                         # (B, N, D)

        if self.config.separate_heads:                  # every head sees C_t and nothing of its token
            x = x.unsqueeze(2).expand(-1, -1, M, -1)                                      # (B, N, M, D)
        else:                                           # eq. 6: position m (from 0) predicts sub-token m + 1
            x = torch.stack([x, *embeddings[:-1]], dim=2)                                 # (B, N, M, D)
        for block in self.intra_blocks:
            x = self.run(block, x, self.rope[:M])                                         # (B, N, M, D)
        logits = [self.predict(m, h) for m, h in enumerate(self.norm(x).unbind(2))]       # M x (B, N, V)
        return loss(logits, subtokens) if return_loss else logits

    def predict(self, m, h):
        """Logits (..., V) of sub-token m (from 0), float32, from the normalised h (..., D)."""
        head = self.heads[m]
        return head(h.to(head.weight.dtype)).float()

    def inter_step(self, x, cache, position, length, masked=False):
        """The context of one sequence position: x (R, D), the class or the token before, -> C_t (R, D).

        cache: see `allocate_cache`; position (1,) int64 on the model's device. The first `length` > position
        slots are read; `masked` hides those behind `position`, so that one length serves many positions.
        """
        rope, mask = self.rope[position], None
        if masked:                              # additive, made once: a bool mask is converted in every layer
            hidden = torch.arange(length, device=x.device) > position
            mask = torch.zeros(length, dtype=x.dtype, device=x.device).masked_fill(hidden, -math.inf)
            mask = mask.expand(x.shape[0], 1, 1, length)
        for block, (keys, values) in zip(self.inter_blocks, cache):
            x = block.step(x, rope, keys, values, position, length, mask)                 # (R, D)
        return x

    def intra_step(self, m, x, history):
        """Logits (R, V) of sub-token m (from 0) and the history for the step after.

        x (R, D): the context C_t for m = 0 (with separate heads always), else the embedding of the sub-token
        before. history: keys and values of every intra block as step m - 1 returned them, None for m = 0.
        """
        history, grown = history or [([], [])] * len(self.intra_blocks), []
        for block, (keys, values) in zip(self.intra_blocks, history):
            x, keys, values = block.step(x, self.rope[m], keys, values)                   # (R, D)
            grown.append((keys, values))
        return self.predict(m, self.norm(x)), grown


def loss(logits, subtokens):
    """The training objective: the cross entropies of the sub-tokens, added (eq. 7: -log p of a whole token).

    Takes what `ARModel.forward` returns and takes. Returns the sum, a scalar, and its M terms (M,) without
    gradient, in nats a token.
    """
    terms = [F.cross_entropy(z.flatten(0, 1), ids.flatten()) for z, ids in zip(logits, subtokens)]
    return sum(terms), torch.stack(terms).detach()


# ------------------------------------------------------------------------------------------------------------
# 3. Sampling
# ------------------------------------------------------------------------------------------------------------

class Settings(typing.NamedTuple):
    """How one sub-token is drawn: guidance, then temperature, then top-k, then top-p."""
    cfg_scale: float = 1.0              # 1: no guidance; 0: the class is ignored
    temperature: float = 1.0            # 0: greedy
    top_k: int = 0                      # 0: all
    top_p: float = 1.0                  # 1: all


def sampling_settings(count, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """One `Settings` for each of `count` sub-tokens; an argument is a sequence of that length or one value.

    Raises `UserError` for another number of values, and for values that mean nothing.
    """
    def spread(flag, values, valid, rule):
        values = tuple(values) if isinstance(values, (tuple, list)) else (values,)
        runtime.require(len(values) in (1, count), f"{flag} has {len(values)} values for {count} sub-tokens; "
                        f"give {count}, or one for all")
        for value in values:
            runtime.require(valid(value), f"{flag} {value}: must be {rule}")
        return values * count if len(values) == 1 else values

    def finite(value):
        return 0 <= value < math.inf

    columns = (spread("--cfg-scale", cfg_scale, finite, "0 or more (1 is no guidance)"),
               spread("--temperature", temperature, finite, "0 (greedy) or more"),
               spread("--top-k", top_k, lambda k: finite(k) and k == int(k), "an integer, 0 (off) or more"),
               spread("--top-p", top_p, lambda p: 0 < p <= 1, "above 0, and 1 (off) at most"))
    return [Settings(scale, t, int(k), p) for scale, t, k, p in zip(*columns)]


def guide(logits, scale):
    """Classifier-free guidance: logits (2B, V), conditional ones first, to uncond + s (cond - uncond) (B, V).

    `lerp` is that formula, and at s = 1 it returns the conditional logits to the last bit.
    """
    conditional, unconditional = logits.float().chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (..., V) to the probabilities (..., V), float32, from which a sub-token is drawn.

    The temperature divides the logits; the `top_k` likeliest entries are kept and normalised; of these the
    smallest set whose probability reaches `top_p`, one at least. Ties go to the lower index, greedily too.
    """
    if temperature < 1e-6:                      # 0 means greedy, and float32 logits hardly resolve more
        one_hot = torch.zeros_like(logits, dtype=torch.float32)
        return one_hot.scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits.float() / temperature
    limited = 0 < top_k < logits.shape[-1]
    if not limited and top_p == 1:
        return logits.softmax(-1)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if limited:
        logits[..., top_k:] = -math.inf
    p = logits.softmax(-1)
    if top_p < 1:
        before = p.cumsum(-1, dtype=torch.float64) - p          # the probability of all likelier entries
        p = p.masked_fill(before >= top_p, 0)
        p = p / p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, order, p)


def draw(p, noise):
    """An index (B,) int64 from each row of p (B, V): its cumulative sum inverted at `noise` (B,) in [0, 1).

    One number a draw makes 256 x 2 an image: few enough to fix in advance, which makes every image a function
    of its own seed. In float64, noise < 1 stays below the last sum, and an entry of probability zero adds
    nothing to the sum before: none is ever drawn. Nothing here waits for the GPU, as torch.multinomial may.
    """
    sums = p.cumsum(-1, dtype=torch.float64)
    return (sums <= noise.unsqueeze(-1) * sums[:, -1:]).sum(-1)


def image_noise(seeds, tokens, count):
    """Uniform noise (tokens, count, B), float64; column b depends on seeds[b] alone, an int >= 0 or a tuple.

    A seed such as (run, number of the image) gives every image of every run its own stream: NumPy's generator
    mixes all bits of all numbers, where torch's on the CPU looks at the last 32 bits of one.
    """
    seeds = seeds.tolist() if isinstance(seeds, torch.Tensor) else seeds
    noise = [np.random.default_rng(seed).random((tokens, count)) for seed in seeds]
    return torch.from_numpy(np.stack(noise, axis=-1))


def allocate_cache(model, rows):
    """Static key and value cache: one tensor of each, (rows, H, N, d), for every inter block.

    N slots hold the class and all tokens but the last, which nobody reads. One tensor a layer, since a
    compiler copies a stacked one at every write; zeros, since a masked slot holding NaN would spoil the sum.
    """
    config, like = model.config, model.class_embedding.weight
    shape = (rows, config.heads, config.tokens, config.head_dim)
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.inter_blocks]


def prefill(model, labels, guided):
    """The first input x (R, D): the class embeddings of labels (B,) and, if `guided`, B times "no class".

    The prompt is that single token: there is nothing to compute ahead, the first step puts it in the cache.
    """
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    return model.class_embedding(labels)


def decode_one_token(model, x, cache, position, length, settings, noise, masked=False):
    """One token: an inter step, then M sub-token steps, each drawn before the next.

    x (R, D): the embedding of the class or of the token before, conditional rows and, under guidance, as many
    unconditional ones; both halves go on with the same sub-tokens. settings: M `Settings`; noise (M, B); the
    rest as in `ARModel.inter_step`. Returns the sub-tokens (M, B) int64 and the next x (R, D).
    """
    guided = x.shape[0] == 2 * noise.shape[1]
    context = model.inter_step(x, cache, position, length, masked)                        # (R, D)
    subtokens, x, history, total = [], context, None, 0
    for m, setting in enumerate(settings):
        logits, history = model.intra_step(m, x, history)                                 # (R, V)
        logits = guide(logits, setting.cfg_scale) if guided else logits                   # (B, V)
        p = probabilities(logits, setting.temperature, setting.top_k, setting.top_p)      # (B, V)
        subtokens.append(draw(p, noise[m]))                                               # (B,)
        embedding = model.token_embeddings[m](subtokens[m])                               # (B, D)
        embedding = torch.cat([embedding, embedding]) if guided else embedding            # (R, D)
        total = total + embedding
        x = context if model.config.separate_heads else embedding
    return torch.stack(subtokens), total


class PackedLinear(nn.Module):
    """nn.Linear for sampling on a CPU, its weight kept in the order that oneDNN's kernels read.

    F.linear sorts it anew at every call, which for a few rows is most of the work: without, float32 on 8 rows
    (batch 4, guided) is twice as fast, bfloat16 on 2 rows 1.4 times. PyTorch offers this only through the two
    operators that torch.compile emits for frozen weights.
    """

    def __init__(self, linear):
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self(linear.weight[:1])                 # a processor without such kernels fails here, not in the loop

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def prepare_for_sampling(model, dtype=torch.float32):
    """Turn `model`, on its final device, into its fastest form for sampling: never to train or save again.

    Weights in `dtype`, w1 and w3 joined, packed on a CPU. The rotary table and the heads stay in float32:
    logits of bfloat16 carry 8 bits, and guidance magnifies their rounding. Returns the model, in eval mode.
    """
    model.to(dtype).eval().requires_grad_(False)
    model.heads.float()
    model.rope = rope_table(model.config.grid, model.config.head_dim).to(model.rope.device)
    for block in [*model.inter_blocks, *model.intra_blocks]:
        block.feed_forward.fuse()
    parents = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    try:
        for parent in parents if model.rope.device.type == "cpu" else []:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child))
    except (AttributeError, RuntimeError):      # no such operators or kernels: the rest stays F.linear
        pass
    return model


def compile_blocks(model, **options):
    """torch.compile the sampling steps of the blocks: regions of fixed shape, compiled once for all layers.

    Attention over the cache stays outside: its length changes, and there is nothing in it left to fuse.
    """
    options = {"fullgraph": True, "dynamic": False, **options}
    for block in model.inter_blocks:
        block.store = torch.compile(block.store, **options)
        block.finish = torch.compile(block.finish, **options)
    for block in model.intra_blocks:            # one graph for each sub-token, as its history is one longer
        block.step = torch.compile(block.step, **options)


class Sampler:
    """Draws batches of one size: `sampler(labels, seeds)`. All buffers are allocated here, none in the loop.

    The four settings are those of `sampling_settings`; if every cfg_scale is 1 there is no unconditional
    pass. A step reads the filled slots of the cache, rounded up to a multiple of `bucket`. With `compile` (on
    CUDA) the blocks are compiled and the whole step is recorded as a CUDA graph for each of those lengths, by
    default multiples of 32: some 300 kernels a step take longer to launch than to run at small batches.
    """

    @torch.no_grad()
    def __init__(self, model, batch_size, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, bucket=None,
                 compile=False):
        config, weight = model.config, model.class_embedding.weight
        N, M, device = config.tokens, len(config.bits), weight.device
        runtime.require(not compile or device.type == "cuda", "--compile needs a CUDA GPU; leave it out here")
        self.model, self.batch_size, self.bucket = model, batch_size, bucket or (32 if compile else 1)
        self.settings = sampling_settings(M, cfg_scale, temperature, top_k, top_p)
        self.guided = any(setting.cfg_scale != 1 for setting in self.settings)
        runtime.require(config.num_classes > 0 or not self.guided,
                        "--cfg-scale: an unconditional model has no class to guide it; use --cfg-scale 1")
        rows = 2 * batch_size if self.guided else batch_size
        self.cache = allocate_cache(model, rows)
        self.x = weight.new_zeros(rows, config.width)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.noise = torch.zeros(N, M, batch_size, dtype=torch.float64, device=device)
        self.subtokens = torch.zeros(N, M, batch_size, dtype=torch.int64, device=device)
        self.lengths = [min(-(-(t + 1) // self.bucket) * self.bucket, N) for t in range(N)]
        self.graphs = {}
        if compile:
            model.eval()
            compile_blocks(model)
            self.capture()

    def step(self, length):
        """One token, from and to the static buffers; the host neither awaits nor looks at what is drawn."""
        noise = self.noise[self.position][0]                                              # (M, B)
        with torch.autocast(noise.device.type, enabled=False):  # the weights' own precision, as the cache's
            subtokens, x = decode_one_token(self.model, self.x, self.cache, self.position, length,
                                            self.settings, noise, masked=self.bucket > 1)
        self.subtokens[self.position] = subtokens.unsqueeze(0)
        self.x.copy_(x)
        self.position += 1

    def capture(self):
        """Record `step` as a CUDA graph for every cache length; the graphs share a pool of scratch memory."""
        stream, pool = torch.cuda.Stream(), None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):         # warm-up: compiles, and lets libraries allocate workspaces
            for length in sorted(set(self.lengths)) * 2:
                self.position.zero_()
                self.step(length)
        torch.cuda.current_stream().wait_stream(stream)
        for length in sorted(set(self.lengths)):
            self.graphs[length] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[length], pool=pool):
                self.step(length)
            pool = self.graphs[length].pool()

    @torch.no_grad()
    def __call__(self, labels, seeds):
        """One image for each of labels (B,) and seeds (B,): its sub-tokens, a list of M int64 tensors (B, N).

        An image depends on its label and its seed (see `image_noise`), not on its place or its neighbours in
        the batch. Matrix products of another batch size, though, differ in their last bits and can tip a
        draw: to get the same images again, keep the batch size.
        """
        config, model, device = self.model.config, self.model, self.x.device
        labels = torch.as_tensor(labels, device=device)
        assert len(labels) == len(seeds) == self.batch_size, "a Sampler draws batches of one size"
        runtime.require(0 <= int(labels.min()) and int(labels.max()) <= config.num_classes,
                        f"--classes {labels.tolist()}: the model has {config.num_classes} classes, from 0, "
                        f"and the number {config.num_classes} for no class")
        training = model.training
        model.eval()
        self.noise.copy_(image_noise(seeds, config.tokens, len(config.bits)))
        self.x.copy_(prefill(model, labels, self.guided))
        self.position.zero_()
        for length in self.lengths:
            if self.graphs:
                self.graphs[length].replay()
            else:
                self.step(length)
        model.train(training)
        return [subtokens.T.contiguous() for subtokens in self.subtokens.unbind(1)]


def sample(model, labels, seeds, **settings):
    """One batch of images' sub-tokens, a list of M (B, N) int64: `Sampler` for those who need it once."""
    return Sampler(model, len(labels), **settings)(labels, seeds)


# ------------------------------------------------------------------------------------------------------------
# 4. Loading
# ------------------------------------------------------------------------------------------------------------

FORMAT = "open-magvit2-ar"              # the mark of our own checkpoints, under the key "format"

# Our names, after the paper, and the published ones. Inside a block and for the final norm they are the same.
PUBLISHED_NAMES = (("token_embeddings.0.", "pre_emb."), ("token_embeddings.1.", "post_emb."),
                   ("class_embedding.", "class_emb.embedding_table."), ("inter_blocks.", "spatial_blocks."),
                   ("intra_blocks.", "factorized_blocks."), ("heads.", "head."))


def published_name(name):
    """Our parameter name in the published files: "class_embedding.weight" is "transformer.class_emb. .."."""
    for ours, theirs in PUBLISHED_NAMES:
        if name.startswith(ours):
            return f"transformer.{theirs}{name[len(ours):]}"
    return f"transformer.{name}"


class PublishedView:
    """A model's parameters under the published names, to load or save; errors then speak of those names."""

    def __init__(self, model):
        self.model = model

    def state_dict(self):
        """The model's tensors as {published name: tensor}."""
        return {published_name(name): tensor for name, tensor in self.model.state_dict().items()}

    def load_state_dict(self, state):
        """The inverse: `state` has exactly the names of `state_dict`."""
        self.model.load_state_dict({name: state[published_name(name)] for name in self.model.state_dict()})


def published_config(state, source):
    """The `ARConfig` of a published state dict, read off its shapes. All have heads of 64 channels."""
    def block_count(name):
        numbers = [key.split(".")[2] for key in state if key.startswith(published_name(name))]
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)

    tables = [published_name(f"{table}.weight") for table in ("token_embeddings.0", "token_embeddings.1",
                                                              "class_embedding")]
    missing = [name for name in tables if name not in state]
    runtime.require(not missing, f"{source} is no published AR model; missing: {', '.join(missing)}")
    first, second, (classes, width) = (state[name].shape for name in tables)
    return ARConfig(width=width, heads=max(1, width // 64), grid=(16, 16), num_classes=classes - 1,
                    bits=(first[0].bit_length() - 1, second[0].bit_length() - 1),
                    inter_blocks=block_count("inter_blocks."), intra_blocks=block_count("intra_blocks."))


def config_from_dict(values, source):
    """An `ARConfig` from `dataclasses.asdict` of one. Raises `UserError` for another version's fields."""
    differing = {field.name for field in dataclasses.fields(ARConfig)} ^ values.keys()
    runtime.require(not differing, f"{source} was written by another version of this project: its config "
                    f"differs in {', '.join(sorted(differing))}")
    return ARConfig(**values)


def load_ar(path, trust=False, ema=True):
    """Load an AR model from one of our checkpoints or from a published file.

    trust: unpickle foreign classes too (see `runtime.load_checkpoint`).
    ema: take the averaged weights where the file has them, else the raw ones (published AR files have those).
    Returns (ARModel in eval mode on the CPU, info), where info says "preset" (or None), "weights" ("EMA" or
    "raw"), "step", "source" ("ours" or "published"), "sha256" of the file, and "tokenizer": what our
    checkpoints say of the tokenizer of their tokens, None for a published file, which contains it
    (`first_stage_model.*`). Strict: raises `UserError` listing missing, unexpected and misshapen names.
    """
    stored = runtime.load_checkpoint(path, trust, mmap=True)
    published = "format" not in stored and "state_dict" in stored
    runtime.require(published or stored.get("format") == FORMAT, f"{path} is no checkpoint of an AR model"
                    + (f" but of {stored['format']}" if "format" in stored else ""))
    weights = "raw"
    if published:
        state = {name: tensor for name, tensor in stored["state_dict"].items()
                 if not name.startswith("first_stage_model.")}
        config = published_config(state, path)
    else:
        config, state = config_from_dict(stored["config"], path), stored["model"]
        if ema and stored.get("ema"):
            state, weights = stored["ema"], "EMA"
    with torch.device("meta"):                  # no time for random weights that are overwritten at once
        model = ARModel(config)
    model.to_empty(device="cpu")
    model.rope = rope_table(config.grid, config.head_dim)       # a constant, and so in no checkpoint
    runtime.load_state_strictly(PublishedView(model) if published else model, state, str(path))
    info = {"preset": next((name for name, preset in PRESETS.items() if preset == config), None),
            "weights": weights, "step": stored.get("global_step" if published else "step"),
            "source": "published" if published else "ours", "tokenizer": stored.get("tokenizer"),
            "sha256": runtime.sha256_of(path)}
    return model.eval(), info
