"""Samples of an auto-regressive checkpoint: labelled grids to look at, and large sets for evaluators.

    python sample.py                                            # a grid of what train_ar.py has learned
    python sample.py --ckpt AR-B --classes 207,otter --num-images 8 --mixed-precision bf16
    python sample.py --ckpt AR-B --classes otter --keep photo.jpg --rows 8   # the lower half drawn anew
    torchrun --nproc-per-node=8 sample.py --ckpt AR-B --num-fid-samples 50000 --mixed-precision bf16 --compile

A checkpoint of ours and a published AR file contain their tokenizer. Sample number n is of class n modulo
their number, drawn from the seed (--global-seed, n): a set has as many of each class, or one more, and
depends neither on the number of ranks nor on interruptions; `--classes` shows the first of just these. Axis
letters: as in ar_model.py; R rows of a step (B, with guidance 2B, of which the first B know their class), h w
of the grid of tokens, H W of pixels, T frames.
"""
import dataclasses
import functools
import math
import pathlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import ar_model
from support import checkpoints, data, drawn, loops, pictures, reading, runtime
from support.runtime import require

# ---- 1. The same tokens, faster ----------------------------------------------------------------------------
# Each trick and its factor, for AR-B in fp32, batch 4 with guidance, the first 6 tokens, on one CPU core:
#     keys and values kept in static buffers, closed form within a token: 3.1, and more with every token
#     packed weights: 1.4; bfloat16 weights, half the bytes: 1.4 with units for it, 0.4 on this core, without
#     compiled blocks, and CUDA graphs in place of some 300 launches a step: not yet measured on any GPU

class Cache:
    """Keys and values of one block for all tokens so far: a slot for the class and each token but the last.

    Static buffers. One tensor a block, as compilers copy a stacked one at every write; zeros, as a masked
    slot that holds NaN would spoil the sum.
    """

    def __init__(self, like, rows, heads, slots, head_dim):
        self.keys = like.new_zeros(rows, heads, slots, head_dim)
        self.values = torch.zeros_like(self.keys)

    def write(self, position, k, v):
        """Put k and v (R, H, d) into the slot `position` (1,)."""
        self.keys[:, :, position] = k.unsqueeze(2)
        self.values[:, :, position] = v.unsqueeze(2)

    def attend(self, q, length, mask=None):
        """What the queries q (R, H, d) find in the first `length` slots: (R, H, d)."""
        keys = self.keys[:, :, :length]                                                   # (R, H, length, d)
        values = self.values[:, :, :length]
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, mask).squeeze(2)


def last_within_token(q, keys, values):
    """`ar_model.attention` for the last of [context, sub-token 1, .., sub-token m], in closed form.

    From its q, m keys and 1 + m values, each (R, H, d). The context's key is zero (its rotary entry is), so
    its score is 0 and its value v_0 the start. Every sub-token of score s then pulls the result towards its
    value by its share of the softmax so far, e^s / (e^total + e^s) = sigmoid(s - total). With M = 2 that is
    one gate a head and no kernel at all: v_0 + sigmoid(q k / sqrt(d)) (v_1 - v_0).
    """
    attended = values[0]
    total = 0.0                                 # log of the softmax's denominator: e^0 for the context
    for k, v in zip(keys, values[1:]):
        score = (q.float() * k.float()).sum(-1, keepdim=True) * q.shape[-1] ** -0.5 - total
        attended = attended + torch.sigmoid(score).type_as(v) * (v - attended)
        total = total + F.softplus(score)       # log(e^total + e^s)
    return attended


def pack(linear):
    """Give an nn.Linear on a CPU its weight in the order that oneDNN's kernels read; else every call sorts it
    anew. PyTorch offers this only through the two operators that torch.compile emits."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        torch.ops.mkldnn._linear_pointwise(linear.weight[:1], packed, None, "none", [], "")
    except (AttributeError, RuntimeError):      # no such operators, or a processor without such kernels
        return

    def forward(x):
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.forward = forward


def prepare_for_sampling(model, dtype=torch.float32):
    """Turn `model`, on its final device, into its fastest form for sampling: never to train or save again.

    Weights in `dtype`, packed on a CPU; rotary table and heads in float32, as logits of bfloat16 carry 8
    bits, and guidance magnifies their rounding. Returns the model, in eval mode.
    """
    rope = model.rope
    model.to(dtype).eval().requires_grad_(False)
    model.heads.float()
    model.rope = rope
    if model.rope.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                pack(module)
    return model


# LlamaBlock.forward in pieces of fixed shape, of which torch.compile makes one graph each for all layers.
# Attention over the cache stays outside: its length changes, and there is nothing in it left to fuse.

def store(block, x, rope, cache, position):
    """x (R, D) to its query (R, H, d); its key and value go into slot `position` (1,) of the cache."""
    q, k, v = block.attention.project(block.attention_norm(x), rope)
    cache.write(position, k, v)
    return q


def finish(block, x, attended):
    """x (R, D) and what attention found for it (R, H, d) -> (R, D)."""
    x = x + block.attention.wo(attended.flatten(1))
    return x + block.feed_forward(block.ffn_norm(x))


def step_within(block, x, rope, keys, values):
    """A block within a token, one sub-token: x (R, D) -> (R, D), and the lists of keys and values grown."""
    q, k, v = block.attention.project(block.attention_norm(x), rope)
    keys = [*keys, k] if values else []         # the context's key is zero: left out
    values = [*values, v]
    return finish(block, x, last_within_token(q, keys, values)), keys, values


def noise_of(seeds, tokens, count):
    """Uniform noise (tokens, count, B), float64; column b depends on all bits of seeds[b], ints or tuples."""
    noise = [np.random.default_rng(seed).random((tokens, count)) for seed in seeds]
    return torch.from_numpy(np.stack(noise, axis=-1))


class Sampler:
    """Draws batches of one size: `sampler(labels, seeds)`. All buffers are allocated here, none in the loop.

    Without guidance (every cfg_scale 1) there is no unconditional pass. A step reads the filled slots of the
    caches, rounded up to a multiple of `bucket`; with `compile` it is a CUDA graph for each of these lengths.
    """

    @torch.no_grad()
    def __init__(self, model, batch_size, settings, compile=False, bucket=None):
        config = model.config
        like = model.class_embedding.weight
        require(not compile or like.is_cuda, "--compile needs a CUDA GPU; leave it out here")
        self.guided = any(setting.cfg_scale != 1 for setting in settings)
        require(config.num_classes > 0 or not self.guided,
                "--cfg-scale: an unconditional model has no class to guide it; use --cfg-scale 1")
        self.model = model
        self.settings = settings
        self.bucket = bucket or (32 if compile else 1)
        N = config.tokens
        self.lengths = [min((t // self.bucket + 1) * self.bucket, N) for t in range(N)]
        rows = 2 * batch_size if self.guided else batch_size
        self.caches = [Cache(like, rows, config.heads, N, config.width // config.heads)
                       for _ in model.inter_blocks]
        self.mask = like.new_full((N, N), -math.inf).triu(1)    # additive: SDPA converts bools in every layer
        self.x = like.new_zeros(rows, config.width)             # the class, and then the newest token
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.noise = like.new_zeros(N, len(settings), batch_size, dtype=torch.float64)
        self.subtokens = torch.zeros_like(self.noise, dtype=torch.int64)
        self.kept = self.subtokens - 1                          # what is not drawn but given; -1: drawn
        self.finite = torch.ones((), dtype=torch.bool, device=like.device)
        self.pieces = [store, finish, step_within]
        self.graphs = {}
        if compile:                             # the pieces, and then the whole step for every length
            self.pieces = [torch.compile(piece, fullgraph=True, dynamic=False) for piece in self.pieces]
            # Warm-up: compiles, and lets libraries allocate their workspaces.
            for length in loops.watched(self.lengths, "compiling", unit="steps"):
                self.step(length)
            pool = torch.cuda.graph_pool_handle()               # the graphs share their scratch memory
            for length in sorted(set(self.lengths)):
                self.graphs[length] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[length], pool=pool):
                    self.step(length)

    def step(self, length):
        """One token, from and to static buffers; as a CUDA graph requires, nobody looks at what is drawn."""
        context = self.context_of(self.x, length)                                         # (R, D)
        subtokens, x = self.draw_token(context)
        self.subtokens[self.position] = torch.stack(subtokens).unsqueeze(0)
        self.x.copy_(x)
        self.position += 1

    def context_of(self, x, length):
        """Between tokens, eq. 5: the newest token x (R, D) to the context of the next (R, D)."""
        store, finish, _ = self.pieces
        rope = self.model.rope[self.position]
        mask = None
        if self.bucket > 1:                     # hides the slots behind the position
            mask = self.mask[self.position, :length].expand(len(x), 1, 1, length)
        for block, cache in zip(self.model.inter_blocks, self.caches):
            q = store(block, x, rope, cache, self.position)                               # (R, H, d)
            x = finish(block, x, cache.attend(q, length, mask))                           # (R, D)
        return x

    def draw_token(self, context):
        """Within a token, eq. 6: its context (R, D) to its M sub-tokens (B,), and their embeddings' sum."""
        model = self.model
        _, _, step_within = self.pieces
        noise = self.noise[self.position][0]                                              # (M, B)
        given = self.kept[self.position][0]                                               # (M, B)
        history = [([], [])] * len(model.intra_blocks)          # keys and values of each block
        x = context
        subtokens = []
        embeddings = []
        for m, setting in enumerate(self.settings):
            for i, block in enumerate(model.intra_blocks):
                x, *history[i] = step_within(block, x, model.rope[m], *history[i])        # (R, D)
            logits = model.predict(m, model.norm(x))                                      # (R, V)
            self.finite.logical_and_(logits.isfinite().all())   # a NaN would be drawn as 0, without a word
            drawn = ar_model.draw_subtoken(logits, noise[m], setting)                     # (B,)
            subtokens.append(torch.where(given[m] < 0, drawn, given[m]))
            rows = subtokens[m].repeat(2) if self.guided else subtokens[m]
            embeddings.append(model.token_embeddings[m](rows))                            # (R, D)
            x = context if model.config.separate_heads else embeddings[m]
        return subtokens, sum(embeddings)

    @torch.no_grad()
    def __call__(self, labels, seeds, kept=(), told=None):
        """A sample for each of labels (B,) and seeds (B,): its sub-tokens, M int64 tensors (B, N).

        kept: M int64 tensors (n,), sub-tokens that all begin with; the rest is drawn. told: called after each
        token. A sample depends on its label and seed, not on its neighbours; but products of another batch
        size differ in their last bits and can tip a draw.
        """
        no_class = self.model.config.num_classes
        labels = torch.as_tensor(labels, device=self.x.device)
        require(0 <= int(labels.min()) and int(labels.max()) <= no_class,
                f"--classes {labels.tolist()}: the model has {no_class} classes, from 0")
        if self.guided:
            labels = torch.cat([labels, torch.full_like(labels, no_class)])
        self.noise.copy_(noise_of(seeds, *self.noise.shape[:2]))
        self.x.copy_(self.model.class_embedding(labels))
        self.position.zero_()
        self.kept.fill_(-1)
        for m, given in enumerate(kept):
            self.kept[:len(given), m] = given[:, None]
        self.finite.fill_(True)
        with torch.autocast(self.x.device.type, enabled=False):     # the precision of weights and caches
            for length in self.lengths:
                if self.graphs:
                    self.graphs[length].replay()
                else:
                    self.step(length)
                if told:
                    told()
        require(self.finite, "the model's logits are not finite: its weights are damaged, or too large for "
                             "--mixed-precision fp16")
        return [subtokens.T.contiguous() for subtokens in self.subtokens.unbind(1)]


# ---- 2. From labels to pixels ------------------------------------------------------------------------------

@dataclasses.dataclass
class How:
    """How samples are drawn from a model."""
    batch_size: int                     # samples drawn at once
    settings: list                      # M `ar_model.Settings`
    truncate: bool = False              # see `pictures.to_uint8`
    mixed_precision: str = "fp32"       # of the decoder; the transformer computes in its weights' precision
    compile: bool = False               # blocks and decoder compiled, in CUDA graphs


@torch.no_grad()
def generate(model, tokenizer, labels, seeds, how, kept=()):
    """Yield uint8 images (b, 3, H, W) or clips (b, 3, T, H, W), on the CPU, batches in the order of `labels`.

    model: an ARModel, best of `prepare_for_sampling`; tokenizer: that of its tokens, on its device; labels,
    seeds and kept: see `Sampler`. The last batch is filled up and cut again, as products of another size
    round differently: a sample depends on label, seed, batch size and its place in the batch alone.
    """
    labels = torch.as_tensor(labels)
    device = model.class_embedding.weight.device
    at_once = 4 if tokenizer.config.frames else how.batch_size     # a clip's activations take 20 times more
    sampler = Sampler(model, how.batch_size, how.settings, how.compile)
    if how.compile:
        tokenizer.to(memory_format=torch.channels_last).decoder.compile(dynamic=False)
    tokens = math.ceil(len(labels) / how.batch_size) * model.config.tokens
    progress = loops.watched(range(tokens), "drawing", unit="steps")
    told = functools.partial(next, progress)
    for first in range(0, len(labels), how.batch_size):
        chosen = [min(i, len(labels) - 1) for i in range(first, first + how.batch_size)]
        subtokens = sampler(labels[chosen], [seeds[i] for i in chosen], kept, told)       # M x (B, N)
        ids = ar_model.subtokens_to_ids(subtokens, model.config.bits)                     # (B, N)
        samples = []
        for some in ids.unflatten(1, model.config.grid).split(at_once):                   # (b, [t,] h, w)
            with runtime.autocast(device, how.mixed_precision):
                decoded = tokenizer.decode(some)                                          # (b, 3, [T,] H, W)
            samples.append(pictures.to_uint8(decoded, how.truncate).cpu())
        yield torch.cat(samples)[:len(labels) - first]


# ---- 3. Flags and program ----------------------------------------------------------------------------------

def add_drawing_flags(parser):
    """The flags that decide what a model draws, here and in `evaluate.py generation`."""
    group = parser.add_argument_group("model to draw from")
    group.add_argument("--ckpt", help="AR checkpoint, ours or published; not given: the newest of runs/ar")
    group.add_argument("--tokenizer", help="tokenizer checkpoint, for an AR file that contains none")
    group.add_argument("--raw-weights", action="store_true", help="use no EMA weights, even if stored")
    group = parser.add_argument_group("how to draw (one value, or one for each sub-token as in 1.9 2.0)")
    group.add_argument("--cfg-scale", type=float, nargs="+", help="guidance (1: none)")
    group.add_argument("--temperature", type=float, nargs="+", help="divides the logits (0: greedy)")
    group.add_argument("--top-k", type=int, nargs="+", help="draw among the k likeliest entries (0: all)")
    group.add_argument("--top-p", type=float, nargs="+", help="draw among the likeliest reaching p (1: all)")
    group.add_argument("--batch-size", type=runtime.positive_int, default=64, help="drawn at once on a rank")
    group.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="fp32",
                       help="of the transformer's weights, and of autocast in the decoder")
    group.add_argument("--compile", action="store_true", help="compiled blocks in CUDA graphs (GPU only)")


def how_from_args(args, model, info, count, looking=False):
    """The `How` of the flags for so many samples to measure or (looking) to show, all defaults filled in."""
    values = {"cfg_scale": 2.0}                           # mild guidance, from which every model gains
    if info["preset"] in ar_model.SAMPLING:
        values = ar_model.SAMPLING["looking" if looking else info["preset"]]
    if model.config.num_classes == 0:
        values = {}                                       # there is nothing to guide towards
    fields = [field.name for field in dataclasses.fields(ar_model.Settings)]
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    settings = ar_model.sampling_settings(len(model.config.bits), **{**values, **given})
    truncate = info["source"] == "published"              # their numbers were measured that way
    return How(min(args.batch_size, count), settings, truncate, args.mixed_precision, args.compile)


def in_words(settings):
    """M `ar_model.Settings` as one says them, a value for all sub-tokens or one for each: text."""
    columns = []
    for setting in settings:
        entries = f"the {setting.top_k} likeliest entries" if setting.top_k else "all entries"
        if setting.top_p < 1:
            entries += f" up to a probability of {setting.top_p:g}"
        columns.append([f"{setting.cfg_scale:g}", f"{setting.temperature:g}", entries])
    said = [" / ".join(column if len(set(column)) > 1 else column[:1]) for column in zip(*columns)]
    return "guidance {}, temperature {}, {}".format(*said)


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    group = parser.add_argument_group("what to draw")
    group.add_argument("--classes", help="as in 207,otter; not given: all, or eight of more than 16")
    group.add_argument("--num-images", type=runtime.positive_int, help="of each class (8; 4 with --keep)")
    group.add_argument("--keep", metavar="FILE", help="complete this image: its upper --rows are kept")
    group.add_argument("--rows", type=runtime.positive_int, help="rows of tokens to keep (half of them)")
    group.add_argument("--save-images", action="store_true", help="also save each sample of the grid alone")
    group.add_argument("--num-fid-samples", type=runtime.positive_int, help="no grid, but an npz of so many")
    group.add_argument("--output", help="PNG, animation or npz; not given: a name in runs/samples")
    group.add_argument("--global-seed", type=runtime.non_negative_int, default=0, help="of the samples")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to sample")
    add_drawing_flags(parser)
    return parser.parse_args(argv)


def keep_rows(args, model, tokenizer):
    """The image --keep and the same with grey instead of what will be drawn, both uint8 (1, 3, H, W), and M
    int64 tensors (n,): the sub-tokens of its upper --rows. A raster model can only complete downwards."""
    require(len(model.config.grid) == 2, "--keep completes images, but this model draws clips")
    rows, columns = model.config.grid
    keep = args.rows or rows // 2
    require(0 < keep < rows, f"--rows {keep}: of the {rows} rows of tokens, one or more must be left to draw")
    stride = tokenizer.config.downsampling
    try:
        image = reading.decode(args.keep, upright=True)
    except (reading.Unreadable, OSError) as error:
        raise runtime.UserError(f"--keep {args.keep} cannot be read as an image ({error})") from None
    image = data.View(rows * stride).pixels(image)[None]
    device = next(tokenizer.parameters()).device
    ids = tokenizer.encode(pictures.to_float(image.to(device))).flatten()                # (rows * columns,)
    grey = image.clone()
    grey[:, :, keep * stride:] = 128
    return [image, grey], ar_model.ids_to_subtokens(ids[:keep * columns], model.config.bits)


def main(args):
    """Draw what `args` (from `get_args`) ask for, and write it down with all settings."""
    device = runtime.setup_process_group(args.device)
    runtime.warn_of_slow_half(device.type, args.mixed_precision)
    for_grid = args.num_fid_samples is None
    require(for_grid or not (args.num_images or args.save_images or args.keep), "--num-fid-samples makes an "
            "npz, but --num-images, --save-images and --keep belong to a grid; leave these out")
    require(args.keep or not args.rows, "--rows is for --keep FILE; add it, or leave --rows out")
    each = args.num_images or (4 if args.keep else 8)
    model, tokenizer, info = checkpoints.load_pair(args.ckpt, args.tokenizer, not args.raw_weights)
    tokenizer.to(device)
    names = drawn.class_names(info["classes"], model.config.num_classes)
    require(names or not args.classes, f"--classes: {info['path']} is an unconditional model; leave it out")
    classes = max(1, len(names))                          # an unconditional model has one nameless class
    chosen = names and (for_grid or args.classes)
    labels = drawn.find_classes(args.classes, names) if chosen else range(classes)
    count = args.num_fid_samples or len(labels) * each
    how = how_from_args(args, model, info, count, for_grid)
    beside, kept = keep_rows(args, model, tokenizer) if args.keep else ([], ())
    suffixes = [".npz"]
    what = count
    if for_grid:
        suffixes = pictures.VIDEO_FORMATS if tokenizer.config.frames else [".png"]
        what = f"keep-{pathlib.Path(args.keep).stem}" if args.keep else "grid"
    path = pathlib.Path(info["path"]).resolve()
    scales = "_".join(f"{setting.cfg_scale:g}" for setting in how.settings)
    name = f"{path.parent.name}-{path.stem}-{what}-cfg{scales}-seed{args.global_seed}"
    output = pathlib.Path(args.output or f"runs/samples/{name}{suffixes[0]}")
    drawn.check_output(output, suffixes, output.with_suffix("") if args.save_images else output.parent)
    record = {"n": count, **dataclasses.asdict(how), "global_seed": args.global_seed, "device": device.type,
              "torch": torch.__version__, "tokenizer": info["tokenizer"],
              "checkpoint": {name: info[name] for name in ("path", "preset", "weights", "step", "source")}}
    if args.classes and not for_grid:
        record["classes"] = list(labels)
    record["checkpoint"]["sha256"] = runtime.on_main(checkpoints.weights_hash, model)
    runtime.print_facts(("model", f"{info['path']}: {info['preset']}, {info['weights']} weights"),
                        ("samples", f"{count:,} of {len(labels):,} classes, seed {args.global_seed}"),
                        ("settings", in_words(how.settings)),
                        ("running", f"{how.batch_size} at once, {args.mixed_precision}, {device}, "
                                    f"{runtime.world_size()} ranks"))
    prepare_for_sampling(model.to(device), runtime.AUTOCAST_DTYPES[args.mixed_precision] or torch.float32)

    def draw(numbers):                                    # batches of the samples with these numbers
        turns = range(classes) if for_grid else labels    # of which classes come by turns
        seeds = [(args.global_seed, n) for n in numbers]
        return generate(model, tokenizer, [turns[n % len(turns)] for n in numbers], seeds, how, kept)

    if not for_grid:
        drawn.write_set(output, draw, record, labels)
    elif runtime.is_main():                               # so few that it is not worth sharing them out
        numbers = [i * classes + label for label in labels for i in range(each)]
        samples = torch.cat(list(draw(numbers))).split(each)         # classes x (k, 3, [T,] H, W)
        captions = [names[n % classes] for n in numbers] if names else None
        runtime.write_json(output.with_suffix(".json"), {**record, "numbers": numbers, "captions": captions,
                                                         "keep": args.keep, "rows": args.rows})
        drawn.write_grid(output, dict(zip(labels, samples)), names, beside, args.save_images)
    runtime.print_main(f"samples  {output}")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
