"""The auto-regressive transformer of Open-MAGVIT2 draws an image token by token, and each token in M steps.

A vocabulary of 2^18 is too large for one softmax, so a token is factorised into sub-tokens of 2^6 and 2^12
entries (asymmetric token factorisation, section 2.3). Predicting them with separate heads would ignore that
they belong together; instead a second, much shallower transformer predicts one sub-token after the other
("next sub-token prediction"). It is trained by train_ar.py and makes images in sample.py. From Python:

    model, tokenizer, info = checkpoints.load_ar("AR-B")          # published; or runs/ar/step-00001000.pt
    settings = ar_model.sampling_settings(2, cfg_scale=(1.9, 2.0))
    noise = torch.rand(256, 2, 1, dtype=torch.float64)            # (N, M, B)
    ar_model.sample(model, torch.tensor([207]), noise, settings)  # a golden retriever: 2 x (1, 256)

In reading order: 1. tokens; 2. layers; 3. model (eq. 5 to 7); 4. drawing, at the end a sampler as one writes
it first. B batch, N tokens of an image, M sub-tokens of a token, V = 2^(k_m) entries of a sub-vocabulary, D
width, H heads, d = D / H, L positions.
"""
import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- 1. Tokens ---------------------------------------------------------------------------------------------

def ids_to_subtokens(ids, bits):
    """Asymmetric token factorisation (section 2.3): ids (...) to a list of M sub-tokens (...), int64.

    bits: (6, 12) makes sub-token 1 (0 .. 63) of the first six channels of the tokenizer and sub-token 2
    (0 .. 4095) of the other twelve, each with its own first channel as bit 0."""
    subtokens = []
    for count in bits:
        subtokens.append(ids & (1 << count) - 1)
        ids = ids >> count
    return subtokens


def subtokens_to_ids(subtokens, bits):
    """The inverse of `ids_to_subtokens`: a list of M sub-tokens (...) back to token ids (...), int64."""
    ids = torch.zeros_like(subtokens[0])
    for subtoken, count in zip(reversed(subtokens), reversed(bits), strict=True):
        ids = ids << count | subtoken
    return ids


# ---- 2. Layers ---------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the norm in float32 whatever the precision around it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).type_as(x) * self.weight


def rope_table(grid, head_dim, base=10000.0):
    """Rotary positions (1 + N, 1, d/2, 2): cos and sin of the angle by which a pair of channels is turned.

    The axes of `grid` share the d/2 pairs of a head: on an image the first half turns with the row and the
    second with the column, pair i of p by base^(-i/p) radians a cell; the last axes get what is left over.
    Entry 1 + n is cell n in raster order. Entry 0, of the class token, is all zeros, cos too: not a rotation
    by nothing but a vanishing query and key, so that everybody attends to the class with the same score 0."""
    pairs = head_dim // 2
    cells = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in grid))
    angles = []
    for axis, coordinate in enumerate(cells.reshape(-1, len(grid)).unbind(1)):
        share = (pairs + axis) // len(grid)
        angles.append(coordinate[:, None] * base ** (-torch.arange(share) / share))
    angles = torch.cat(angles, dim=1)                                                     # (N, d/2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)                             # (N, d/2, 2)
    return F.pad(table, (0, 0, 0, 0, 1, 0))[:, None]


def rotate(x, rope):
    """Turn each pair of neighbouring channels of x (..., d) by its angle in `rope` (..., d/2, 2), in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():           # written out, because the compiler fuses real arithmetic only
        a, b = pairs.unbind(-1)
        cos, sin = rope.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:                                       # (a + ib)(cos + i sin): the same, much faster on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).type_as(x)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def attention(q, k, v):
    """Causal softmax(q k^T / sqrt(d)) v for each head, position t seeing 0 .. t: (..., L, H, d), all four.
    Written out for the few sub-tokens of a token: a kernel for long sequences takes twice as long over B x N
    of 2. (On a GPU it would pad each to 128 positions.)"""
    L, _, d = q.shape[-3:]
    if L > 8:
        q, k, v = (each.transpose(-3, -2) for each in (q, k, v))                          # (..., H, L, d)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2)
    attended = []
    for t in range(L):
        scores = (q[..., t:t + 1, :, :] * k[..., :t + 1, :, :]).sum(-1, keepdim=True, dtype=torch.float32)
        p = (scores * d ** -0.5).softmax(-3).type_as(v)                                   # (..., t + 1, H, 1)
        attended.append((p * v[..., :t + 1, :, :]).sum(-3))                               # (..., H, d)
    return torch.stack(attended, dim=-3)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)     # rows: all of q, all of k, all of v
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x, rope):
        return self.wo(attention(*self.project(x, rope)).flatten(-2))

    def project(self, x, rope):
        """x (..., D) to q, k, v (..., H, d), q and k turned by `rope`."""
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return rotate(q, rope), rotate(k, rope), v


class LlamaBlock(nn.Module):
    """Pre-norm Llama block without biases, the same between tokens (eq. 5) and within a token (eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.attention_dropout = nn.Dropout(config.attention_dropout)
        self.ffn_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config.width, config.ffn_hidden)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x, rope):
        """x (..., L, D) -> (..., L, D); rope: L entries of `rope_table`."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), rope))
        return x + self.ffn_dropout(self.feed_forward(self.ffn_norm(x)))


# ---- 3. Model ----------------------------------------------------------------------------------------------

def flag(default, text):
    """A field that has a flag in train_ar.py."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """The shape of a transformer, by default AR-B of table 2. Raises ValueError for impossible shapes."""
    bits: tuple = (6, 12)               # k_m of each sub-token; their sum is the tokenizer's K
    grid: tuple = (16, 16)              # (rows, columns) of an image's tokens, or (t, y, x) of a clip's
    num_classes: int = 1000             # 0: unconditional, the one entry of the class table means "no class"
    ffn_multiple: int = 256             # the hidden width of the feed-forward network is rounded up to this
    width: int = flag(1024, "width D of the residual stream")
    heads: int = flag(16, "attention heads")
    inter_blocks: int = flag(24, "blocks between tokens (N in table 2)")
    intra_blocks: int = flag(2, "blocks within a token (L in table 2)")
    separate_heads: bool = flag(False, "M heads on C_t and no intra blocks: the paper's intuitive solution")
    token_dropout: float = flag(0.1, "dropout of the input sequence, class embedding included")
    attention_dropout: float = flag(0.1, "dropout of attention's output, before the residual stream")
    ffn_dropout: float = flag(0.1, "dropout of the feed-forward network's output")
    label_dropout: float = flag(0.1, 'share of samples trained as "no class", for guidance')

    def __post_init__(self):
        for name in ("width", "heads", "inter_blocks", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of an AR model must be 1 or more")
        if max(self.inter_blocks, self.intra_blocks) > 1000:
            raise ValueError("an AR model has 1000 blocks at most")
        for name in ("token_dropout", "attention_dropout", "ffn_dropout", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1")
        if min(self.bits, default=0) < 1 or min(self.grid, default=0) < 1 or self.num_classes < 0:
            raise ValueError(f"bits {self.bits}, grid {self.grid}, num_classes {self.num_classes}: too small")
        if max(self.bits) > 24:
            raise ValueError(f"bits {self.bits}: a sub-token has 24 bits at most; split the token further")
        if self.width % (2 * self.heads) or self.width // self.heads < 2 * len(self.grid):
            raise ValueError(f"width {self.width} does not suit {self.heads} heads on {len(self.grid)} axes; "
                             f"make it an even multiple of the heads, with 2 channels an axis or more")
        if not self.separate_heads and self.intra_blocks < min(1, len(self.bits) - 1):
            raise ValueError("intra_blocks must be 1 or more: later sub-tokens see the context through them "
                             "alone (or set separate_heads)")
        if len(self.bits) > self.tokens + 1:    # sub-token m takes entry m of the rotary table
            raise ValueError(f"{len(self.bits)} sub-tokens need a larger grid")

    @property
    def tokens(self):
        """N, the number of tokens of an image."""
        return math.prod(self.grid)

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
                    token_dropout=0.0, attention_dropout=0.0, ffn_dropout=0.0)}


class ARModel(nn.Module):
    """p(x_t^m | class, x_1 .. x_{t-1}, x_t^1 .. x_t^{m-1}) for all tokens t, sub-tokens m (eq. 7)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False          # True: activations again in backward, a third slower, far smaller
        D = config.width
        self.token_embeddings = nn.ModuleList(nn.Embedding(2 ** bits, D) for bits in config.bits)
        self.class_embedding = nn.Embedding(config.num_classes + 1, D)         # the last entry is "no class"
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.inter_blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.inter_blocks))
        intra_blocks = 0 if config.separate_heads else config.intra_blocks
        self.intra_blocks = nn.ModuleList(LlamaBlock(config) for _ in range(intra_blocks))
        self.norm = RMSNorm(D)
        self.heads = nn.ModuleList(nn.Linear(D, 2 ** bits, bias=False) for bits in config.bits)
        self.register_buffer("rope", rope_table(config.grid, config.width // config.heads), persistent=False)
        self.initialise()

    def initialise(self):
        """All initial weights of the model. RMSNorm keeps its ones."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)    # small branches beside the residual stream
        for head in self.heads:
            nn.init.zeros_(head.weight)                     # uniform predictions: the loss starts at K log 2

    def forward(self, subtokens, labels, return_loss=False):
        """Logits of every sub-token, given the true ones before it (teacher forcing).

        subtokens: M int64 tensors (B, N) in raster order, the m-th in 0 .. 2^(k_m) - 1; labels (B,) int64, of
        which `num_classes` means "no class". Returns M logits (B, N, V), or with `return_loss` what `loss`
        makes of them. In training mode, labels and activations drop out by torch's global generator."""
        N = subtokens[0].shape[1]
        M = len(self.heads)
        if len(subtokens) != M or N > self.config.tokens:
            raise ValueError(f"{len(subtokens)} x {N} sub-tokens for a model of {M} x {self.config.tokens}")
        if self.training:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(dropped, self.config.num_classes)

        def run(block, *inputs):                        # under checkpointing, activations are not kept
            return checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing else block(*inputs)

        embeddings = [table(each) for table, each in zip(self.token_embeddings, subtokens)]   # M x (B, N, D)
        start = self.class_embedding(labels).unsqueeze(1)                                 # (B, 1, D)
        x = self.token_dropout(torch.cat([start, sum(embeddings)[:, :-1]], dim=1))        # (B, N, D)
        for block in self.inter_blocks:                 # eq. 5: position t becomes the context C_t
            x = run(block, x, self.rope[:N])                                              # (B, N, D)

        if self.config.separate_heads:                  # every head sees C_t and nothing of its token
            x = x.unsqueeze(2).expand(-1, -1, M, -1)                                      # (B, N, M, D)
        else:                                           # eq. 6: position m (from 0) predicts sub-token m + 1
            x = torch.stack([x, *embeddings[:-1]], dim=2)                                 # (B, N, M, D)
        for block in self.intra_blocks:
            x = run(block, x, self.rope[:M])                                              # (B, N, M, D)
        logits = [self.predict(m, h) for m, h in enumerate(self.norm(x).unbind(2))]       # M x (B, N, V)
        return loss(logits, subtokens) if return_loss else logits

    def predict(self, m, h):
        """Logits (..., V) of sub-token m (from 0), float32, from the normalised h (..., D)."""
        return self.heads[m](h.to(self.heads[m].weight.dtype)).float()


def loss(logits, subtokens):
    """The training objective: the cross entropies of the sub-tokens, added (eq. 7: -log p of a whole token).
    logits M x (B, N, V), subtokens M x (B, N). Returns, in nats, the sum, and M terms without gradient."""
    terms = [F.cross_entropy(guess.flatten(0, 1), true.flatten()) for guess, true in zip(logits, subtokens)]
    return sum(terms), torch.stack(terms).detach()


# ---- 4. Drawing --------------------------------------------------------------------------------------------

# How the rows of table 5 were sampled and, as "looking", what suits images of any model to look at.
SAMPLING = {
    "AR-B": {"cfg_scale": (1.9, 2.0)},
    "AR-L": {"cfg_scale": (1.9, 1.9), "temperature": (1.1, 1.0)},
    "AR-XL": {"cfg_scale": (1.75, 1.85), "temperature": (1.1, 1.0)},
    "looking": {"cfg_scale": 4.0, "top_p": 0.96},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one sub-token is drawn: guidance, then temperature, then top-k, then top-p."""
    cfg_scale: float = 1.0              # 1: no guidance; 0: the class is ignored
    temperature: float = 1.0            # 0: greedy
    top_k: int = 0                      # 0: all
    top_p: float = 1.0                  # 1: all


def sampling_settings(count, **values):
    """One `Settings` for each of `count` sub-tokens; a value is a sequence of that length, or one for all.
    Raises ValueError, in the words of the flags, for another number of values and for meaningless ones."""
    columns = []
    for name, column in vars(Settings(**values)).items():
        flag = "--" + name.replace("_", "-")
        column = column if isinstance(column, (tuple, list)) else [column]
        if len(column) not in (1, count):
            raise ValueError(f"{flag} has {len(column)} values for {count} sub-tokens; give {count}, or 1")
        for value in column:
            if not 0 <= value < math.inf or name == "top_k" and not isinstance(value, int):
                raise ValueError(f"{flag} {value}: must be a number of 0 or more; --top-k an integer")
            if name == "top_p" and not 0 < value <= 1:
                raise ValueError(f"{flag} {value}: must be above 0, and 1 (off) at most")
        columns.append(column if len(column) == count else [column[0]] * count)
    return [Settings(*row) for row in zip(*columns)]


def guide(logits, scale):
    """Classifier-free guidance: logits (2B, V), conditional ones first, to uncond + s (cond - uncond) (B, V),
    which is what `lerp` means; at s = 1 it returns the conditional logits to the last bit."""
    conditional, unconditional = logits.float().chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (..., V) to the probabilities (..., V), float32, from which a sub-token is drawn.

    The temperature divides the logits; the `top_k` likeliest entries are kept and normalised; of these the
    smallest set whose probability reaches `top_p`, one at least. Ties go to the lower index, greedily too."""
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

    Numbers fixed in advance make every sample a function of its own seed. In float64, noise < 1 stays below
    the last sum, and an entry of probability 0 adds nothing to it: none is ever drawn."""
    sums = p.cumsum(-1, dtype=torch.float64)
    return (sums <= noise.unsqueeze(-1) * sums[:, -1:]).sum(-1)


def draw_subtoken(logits, noise, setting):
    """Sub-tokens (B,) from logits (B, V), or from (2B, V) under guidance, at noise (B,) with a `Settings`."""
    if len(logits) == 2 * len(noise):
        logits = guide(logits, setting.cfg_scale)                                         # (B, V)
    return draw(probabilities(logits, setting.temperature, setting.top_k, setting.top_p), noise)


@torch.no_grad()
def sample(model, labels, noise, settings):
    """The sub-tokens of a sample for each of labels (B,) int64: a list of M int64 tensors (B, N).

    model: in eval mode; noise (N, M, B) float64 in [0, 1), a number a draw; settings: M `Settings`. This is
    what one writes first: a pass of the whole model for every draw, in 2B rows, of which the first B know the
    class and the others do not. What is not drawn yet is 0 and unseen. sample.py draws the same, faster."""
    N, M, B = noise.shape
    both = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])         # (2B,)
    subtokens = [labels.new_zeros(B, N) for _ in range(M)]
    for t in range(N):
        for m, setting in enumerate(settings):
            so_far = [each[:, :t + 1].repeat(2, 1) for each in subtokens]                 # M x (2B, t + 1)
            logits = model(so_far, both)[m][:, t]                                         # (2B, V)
            subtokens[m][:, t] = draw_subtoken(logits, noise[t, m], setting)              # (B,)
    return subtokens
