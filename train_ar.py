"""Stage II: train the auto-regressive transformer on the tokens of a frozen tokenizer.

    python train_ar.py                                                # toy preset, on what stage I has left
    python train_ar.py --tokenizer runs/video/step-00000900.pt --results-dir runs/video_ar        # of clips
    torchrun --nproc-per-node=8 train_ar.py --preset AR-B --tokenizer in1k-256 --data-path imagenet \\
        --mixed-precision bf16 --compile --resume                     # the published recipe

The tokenizer does not change any more, so every image is encoded once, before training: 256 codes cost
nothing to read, while encoding costs half as much as a training step of AR-B. (--online: random crops in
every step.) The objective is the likelihood of these codes (eq. 7), each in its M sub-tokens:

    loss = mean over tokens t of the sum over m of -log p(x_t^m | class, x_1 .. x_{t-1}, x_t^1 .. x_t^{m-1})

in nats. Divided by log 2, these are the bits that an ideal compressor would need for a token: at most K.

The tokens of a clip are a sequence too: with a tokenizer of clips, all of this trains a model of clips, which
the paper leaves as future work. In reading order: 1. tokens; 2. recipes and flags; 3. the loop, in `main`;
4. what it reports. B batch, N tokens of an image, M sub-tokens of a token, S side of an image, n its crops.
"""
import copy
import dataclasses
import json
import math
import pathlib

import numpy as np
import torch
from tqdm import tqdm

import ar_model
import sample
from support import checkpoints, data, pictures, runtime, sources

# ---- 1. Tokens: the data set, encoded once -----------------------------------------------------------------

MISSING = -1                          # stands where codes are not there yet, or where an image is unreadable


class Tokens(sources.Samples):
    """Stored codes in the form of a data set (see data.py): an item is (codes (N,) int64, label, index).

    So the loaders of images serve tokens too: the same order, shares of ranks, position after resuming. Row i
    of `codes`, int64 (rows, n, N), belongs to item indices[i] of `dataset`. Of ten crops, any one is given.
    """

    def __init__(self, codes, dataset, indices, missing, vocabulary):
        view = dataclasses.replace(dataset.view, crop="random" if codes.shape[1] > 1 else "center")
        paths = [dataset.paths[i] for i in indices]
        super().__init__(dataset.name, dataset.classes, paths, [dataset.labels[i] for i in indices], view)
        self.codes = codes
        self.vocabulary = vocabulary
        self.broken[torch.tensor(missing, dtype=torch.long)] = True

    def read(self, index, rng):
        """Codes (N,), int64."""
        crops = self.codes[index]                                                         # (n, N)
        codes = crops[rng.integers(len(crops)) if len(crops) > 1 else 0]
        if codes.min() < 0 or codes.max() >= self.vocabulary:
            raise ValueError(f"codes beyond the {self.vocabulary} of the tokenizer: the file is damaged")
        return torch.from_numpy(codes.astype(np.int64))


def encode(tokenizer, x, precision):
    """uint8 images (B, 3, S, S) or clips (B, 3, T, S, S) to codes (B, N), int64 on the tokenizer's device.

    `precision` is fp32 by default, even where training's is not: a code consists of the signs of z, and many
    a z is close to 0. bf16 would flip some, and the transformer learn codes that the decoder does not know.
    """
    device = next(tokenizer.parameters()).device
    with torch.no_grad(), runtime.autocast(device, precision):
        return tokenizer.encode(pictures.to_float(x.to(device, non_blocking=True))).flatten(1)


def stored_tokens(path, dataset, made_with, tokenizer, args, limit=None):
    """`Tokens` of `dataset`, at most `limit` of them, encoded first unless that is done. A collective.

    path: of one memory map of all codes, int64 (rows, n, N). The JSON file beside it says what they are and,
    when all is done, which rows are missing. Raises `UserError` that names both sides if it holds others.
    made_with: the record of the tokenizer and, if it is known, the fingerprint of the "data".
    """
    indices = data.evenly_spaced(limit, len(dataset))
    fingerprint = made_with.get("data") or runtime.on_main(data.fingerprint, dataset, indices)
    grid = tokenizer.config.latent_grid(*dataset.axes)
    shape = (len(indices), 10 if dataset.view.crop == "ten" else 1, math.prod(grid))
    wanted = {"tokenizer": made_with["sha256"], "data": fingerprint, "grid": list(grid), "shape": list(shape),
              "crops": dataset.view.crop, "precision": args.token_precision,
              "origin": f"{made_with['path']} of {dataset.name}"}
    header = path.with_suffix(".json")
    if runtime.is_main() and not header.exists():
        # Made whole, full of MISSING, and its header last: a kill leaves what can be continued, or no header.
        with runtime.atomic(path) as temporary, open(temporary, "wb") as file:
            for _ in indices:
                file.write(b"\xff" * (8 * shape[1] * shape[2]))
        runtime.write_json(header, {**wanted, "missing": None})
    runtime.barrier()
    with checkpoints.guard(f"{header}, or {path}, which it describes,"):
        stored = json.loads(header.read_text())
        runtime.check_same(stored, wanted, f"{path} holds tokens by {stored['origin']}, not by "
                           f"{wanted['origin']}; delete it and {header} to have them made anew, or choose "
                           f"another --tokens: what they are", wanted.keys() - {"origin"})
        codes = np.memmap(path, "<i8", "r+" if stored["missing"] is None else "r", shape=shape)
    if stored["missing"] is None:
        runtime.print_main(f"encoding {len(indices):,} {dataset.kind}s of {dataset.name} to {path}")
        fill(codes, dataset, indices, tokenizer, args)
        stored["missing"] = np.flatnonzero(codes[:, 0, 0] == MISSING).tolist()
        runtime.write_json(header, stored)
    return Tokens(codes, dataset, indices, stored["missing"], tokenizer.quantizer.vocabulary)


def fill(codes, dataset, indices, tokenizer, args):
    """Encode what is MISSING in the memory map `codes`, which all ranks share; each rank fills its batches.

    A batch has the same rows whoever encodes it, and after any kill: with the same neighbours, an image has
    the same codes, to the last bit."""
    rows, n, N = codes.shape
    size = max(1, (16 if dataset.view.frames else 64) // n)              # images or clips of 1 or 10 crops
    todo = [row for first in range(0, rows, size) if (codes[first:first + size] == MISSING).any()
            for row in range(first, min(first + size, rows))]
    runtime.barrier()                                     # nobody writes while others look for MISSING
    loader = data.eval_batches(dataset, [indices[row] for row in todo], size, args.num_workers)
    for x, _, found in tqdm(loader, "encoding", unit="batch", disable=not runtime.is_main() or None):
        ids = encode(tokenizer, x.reshape(-1, 3, *dataset.axes), args.token_precision)    # (b * n, N)
        codes[np.searchsorted(indices, found.numpy())] = ids.reshape(-1, n, N).cpu().numpy()
    codes.flush()
    runtime.barrier()                                     # what is MISSING now is broken
    dataset.raise_if_broken(all_ranks=True)               # more than 1 %


# ---- 2. Recipes and flags ----------------------------------------------------------------------------------

# What `get_args` takes as defaults, beside the preset's model. Published settings: section 4.1 of the paper.
PUBLISHED_AR_RECIPE = dict(lr=3e-4, length="300ep", warmup="6ep", final_lr=0.1, global_batch_size=768)
AR_RECIPES = {
    "AR-B": PUBLISHED_AR_RECIPE, "AR-L": PUBLISHED_AR_RECIPE,
    "AR-XL": dict(PUBLISHED_AR_RECIPE, lr=2.4e-4, length="350ep", warmup="7ep"),
    # Minutes on two cores: a large learning rate that decays to 0.
    "toy": dict(lr=3e-3, length="1800", warmup="50", final_lr=0.0, global_batch_size=32)}


def get_args(argv=None):
    """Parse the command line. The preset chooses the defaults of what its recipe and its model fix."""
    first = runtime.ArgumentParser("", add_help=False)
    first.add_argument("--preset", choices=ar_model.PRESETS, default="toy", help="see below")
    preset = first.parse_known_args(argv)[0].preset
    parser = runtime.ArgumentParser(__doc__)
    count, count0, number = runtime.positive_int, runtime.non_negative_int, runtime.non_negative_float
    precisions = runtime.AUTOCAST_DTYPES
    group = parser.add_argument_group("data and preset")
    group.add_argument("--preset", choices=ar_model.PRESETS, default="toy", help="model and recipe")
    group.add_argument("--tokenizer", help="file, or published name as in1k-256 (newest of runs/tokenizer)")
    group.add_argument("--data-path", help="folder, tar shards, generated, generated-plain (the tokenizer's)")
    group.add_argument("--val-data-path", help="held-out images, if --data-path has no val/ or test/")
    group.add_argument("--split-list", help="of clips: official UCF-101 list of those to train on")
    group.add_argument("--val-split-list", help="of clips: official UCF-101 list of the held-out ones")
    group.add_argument("--val-size", type=count, default=5000, help="held-out images used, at most")
    group.add_argument("--image-size", type=count, help="side of the crops (the tokenizer's resolution)")
    group.add_argument("--resize", type=count, help="shorter side before the crop (--image-size)")
    group.add_argument("--frames", type=count, help="of a clip (the tokenizer's)")
    group.add_argument("--init-from", help="start from this AR model, a file or a published name as AR-B")
    group.add_argument("--unconditional", action="store_true", help="ignore the classes of the data set")
    group.add_argument("--tokens", help="file for stored tokens (tokens.bin in --results-dir)")
    crops = group.add_mutually_exclusive_group()
    crops.add_argument("--ten-crop", action="store_true", help="store ten crops, or of a video ten clips")
    crops.add_argument("--online", action="store_true", help="encode random crops in every step instead")
    group.add_argument("--flip", action="store_true", help="with --online: mirror half of the images")
    group.add_argument("--token-precision", choices=precisions, default="fp32", help="tokenizer's autocast")
    group.add_argument("--results-dir", default="runs/ar", help="for checkpoints, logs and grids of samples")
    group = parser.add_argument_group("model")
    group.add_argument("--split", type=count, nargs="+", metavar="BITS", help="bits of each sub-token")
    runtime.add_config_flags(group, ar_model.PRESETS[preset])
    group = parser.add_argument_group("optimisation")
    group.add_argument("--length", type=runtime.duration, help="steps, or epochs as in 300ep")
    group.add_argument("--global-batch-size", type=count, help="images a step, over all ranks")
    group.add_argument("--accumulation", type=count, default=1, help="micro-batches a step")
    group.add_argument("--lr", type=number, help="peak learning rate of AdamW")
    group.add_argument("--warmup", type=runtime.duration, help="steps, or epochs as in 6ep")
    group.add_argument("--weight-decay", type=number, default=0.05, help="of all parameters")
    group.add_argument("--ema-decay", type=runtime.fraction, default=0.0, help="of an EMA to draw with")
    group = parser.add_argument_group("speed and memory")
    group.add_argument("--mixed-precision", choices=precisions, default="fp32", help="autocast dtype")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    group.add_argument("--activation-checkpointing", action="store_true", help="recompute them in backward")
    group.add_argument("--num-workers", type=count0, default=0, help="image loading processes a rank")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    group = parser.add_argument_group("run")
    group.add_argument("--global-seed", type=count0, default=0, help="weights, order, crops and dropout")
    group.add_argument("--resume", nargs="?", const="latest", help="continue --results-dir, or this file")
    group.add_argument("--log-every", type=count, default=50, help="steps between status lines")
    group.add_argument("--val-every", type=count, default=500, help="steps between validations, with samples")
    group.add_argument("--checkpoint-every", type=count, default=500, help="steps between checkpoints")
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.set_defaults(**AR_RECIPES[preset], split=list(ar_model.PRESETS[preset].bits))
    return parser.parse_args(argv)


def prepare(args):
    """(tokenizer on the CPU, record of it, training data, held-out data or None, `ARConfig`). Fills in flags
    that were not given from the tokenizer. Raises ValueError for what does not fit together."""
    args.tokenizer = args.tokenizer or str(runtime.latest_checkpoint("runs/tokenizer", "tokenizer"))
    tokenizer, info = checkpoints.load_tokenizer(args.tokenizer)
    tokenizer.requires_grad_(False)
    made_with = {**{name: info[name] for name in ("path", "weights", "preset")},
                 "sha256": checkpoints.weights_hash(tokenizer)}
    frames = getattr(tokenizer.config, "frames", None)                   # None: it is a tokenizer of images
    runtime.require(frames or not (args.frames or args.split_list), f"--tokenizer {args.tokenizer} is of "
                    f"images, but --frames and --split-list are for clips; leave them out")
    if args.data_path is None:
        for name, value in info["trained_on"].items():
            if getattr(args, name) is None and not (name == "resize" and args.ten_crop and not frames):
                setattr(args, name, value)                               # ten crops of images bring their own
    args.image_size = args.image_size or tokenizer.config.resolution
    args.frames = args.frames or frames
    sizes = {"frames": args.frames} if frames else {}
    dataclasses.replace(tokenizer.config, resolution=args.image_size, **sizes)    # raises if it cannot be
    runtime.require(args.online or not args.flip, "--flip goes with --online; stored tokens have --ten-crop")
    runtime.require(bool(args.split_list) == bool(args.val_split_list), "--split-list and --val-split-list "
                    "are a pair, such as trainlist01.txt and testlist01.txt; give both or neither")
    view = data.View(args.image_size, args.frames, resize=args.resize)
    held_out = sources.build_dataset(args.val_data_path or args.data_path, "val", view, args.val_split_list)
    crop = "random" if args.online else "ten" if args.ten_crop else "center"
    view = dataclasses.replace(view, crop=crop, flip=args.flip)
    dataset = sources.build_dataset(args.data_path, "train", view, args.split_list)
    if held_out.name == dataset.name and not args.split_list and not dataset.name.startswith("generated"):
        runtime.print_main(f"no validation: {dataset.name} has no val/ or test/; see --val-data-path")
        held_out = None
    if not args.unconditional:
        runtime.require(dataset.classes, f"--data-path {dataset.name} has no classes; make a subfolder for "
                        f"each, or add --unconditional")
        runtime.require(held_out is None or held_out.classes == dataset.classes, "the held-out images have "
                        f"other class folders than {dataset.name}, or none; sort them alike, name others "
                        f"with --val-data-path, or add --unconditional")
    vocabulary = tokenizer.quantizer.vocabulary
    runtime.require(2 ** sum(args.split) == vocabulary, f"--split {' + '.join(map(str, args.split))} are "
                    f"{sum(args.split)} bits, but {vocabulary} codes of --tokenizer {args.tokenizer} have "
                    f"{math.log2(vocabulary):.4g}; split these (if no integer: use other --levels or "
                    f"--codebook-size)")
    grid = tokenizer.config.latent_grid(*dataset.axes)
    config = runtime.config_from_args(ar_model.PRESETS[args.preset], args, bits=args.split, grid=grid,
                                      num_classes=0 if args.unconditional else len(dataset.classes))
    return tokenizer, made_with, dataset, held_out, config


def start_from(path, model, classes, made_with):
    """Give `model` the weights of any AR model, ours or published, as far as they fit.

    Classes of equal names keep their row of the table. Other sub-tokens start with new embeddings and heads;
    another grid has another rotary table, which is no weight.
    """
    source, _, info = checkpoints.load_ar(path)
    state = source.state_dict()
    known = info["classes"] or []
    if known != classes and (known or source.config.num_classes != len(classes)):
        table = model.class_embedding.weight.detach().clone()
        old = state["class_embedding.weight"]
        for label, name in enumerate(classes):
            if name in known:
                table[label] = old[known.index(name)]
        table[-1] = old[-1]                                              # of "no class"
        state["class_embedding.weight"] = table
        runtime.print_main(f"start    {len(set(classes) & set(known))} of {len(classes)} classes are known")
    if (info["tokenizer"] or {}).get("sha256") != made_with["sha256"]:
        runtime.print_main("start    these are tokens of another tokenizer: their meaning is learned anew")
    checkpoints.load_partly(model, state, ("token_embeddings.", "heads."),
                            f"the {info['weights']} weights of {path} ({info['preset']})")


# ---- 3. The training loop ----------------------------------------------------------------------------------

# Flags that a resumed run cannot change.
MUST_STAY = ("global_batch_size", "global_seed", "mixed_precision", "online", "ten_crop", "flip",
             "token_precision", "weight_decay", "ema_decay")


def main(args):
    """Train an AR model as `args` (from `get_args`) say."""
    device = runtime.setup_process_group(args.device)
    tokenizer, made_with, dataset, held_out, config = prepare(args)
    classes = dataset.classes[:config.num_classes]                       # none, if --unconditional
    length, warmup = print_plan(args, config, made_with, dataset, held_out)
    if args.dry_run:
        return
    # ---- everything that the loop changes, and that a checkpoint must therefore hold ----
    torch.manual_seed(args.global_seed)                                  # equal initial weights on every rank
    with device:
        model = ar_model.ARModel(config)
    if args.init_from and not runtime.list_checkpoints(args.results_dir):
        start_from(args.init_from, model, classes, made_with)
    model.checkpointing = args.activation_checkpointing
    # One group of parameters: the published schedule lets all of them decay, even the scales of the norms.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), fused=device.type == "cuda",
                                  weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    shown = model                                                        # what is validated and drawn with
    if args.ema_decay:
        shown = state["ema"] = copy.deepcopy(model).requires_grad_(False)
    seed = np.random.default_rng((args.global_seed, runtime.rank())).integers(2 ** 63)
    torch.manual_seed(int(seed))                                         # for dropout, a rank's own
    record = {"length": len(dataset),
              "fingerprint": runtime.on_main(data.fingerprint, dataset, range(len(dataset)))}
    saved = checkpoints.resume(args, state, MUST_STAY, config=dataclasses.asdict(config), dataset=record,
                               tokenizer={"sha256": made_with["sha256"]})
    step = saved.get("step", 0)
    skipped = saved.get("skipped", 0)                                    # steps that were not finite
    lock = runtime.lock(args.results_dir)                                # held until `main` ends
    # With the tokenizer inside, a checkpoint alone is enough to draw images, as the published files are.
    first_stage = {"format": checkpoints.format_of(tokenizer), "config": dataclasses.asdict(tokenizer.config),
                   "model": tokenizer.state_dict()}                      # stays on the CPU
    tokenizer.to(device)
    path = pathlib.Path(args.tokens or f"{args.results_dir}/tokens.bin")
    if not args.online:
        dataset = stored_tokens(path, dataset, {**made_with, "data": record["fingerprint"]}, tokenizer, args)
    if held_out:
        path = path.with_name(f"{path.stem}-val.bin")
        held_out = stored_tokens(path, held_out, made_with, tokenizer, args, args.val_size)
    # The order of the data is a function of (seed, step), so the loader has no state to be saved.
    loader = data.train_loader(dataset, args.global_batch_size, args.global_seed, step, args.accumulation,
                               args.num_workers if args.online else 0)
    if args.compile:
        # Block by block: one small graph serves all layers, while the whole model would compile for minutes.
        for block in [*model.inter_blocks, *model.intra_blocks]:
            block.compile(dynamic=False)
    ddp_model = runtime.distributed(model, device)
    logger = runtime.Logger(args.results_dir, length, step)
    meters = runtime.Meters()                                            # means since the last log line
    in_a_row = 0                                                         # steps skipped just now
    stop = runtime.StopRequest()
    while step < length and not stop.agreed:
        lr = args.lr * runtime.learning_rate_factor(step, length, warmup, "plateau", args.final_lr)
        optimizer.param_groups[0]["lr"] = lr

        # ---- forward and backward: the likelihood of the true codes, eq. 7 ----
        logs = []                                                        # of this step, for the meters
        for micro in range(args.accumulation):
            ids, labels, _ = next(loader)                                # stored codes (B, N), or images
            if args.online:
                ids = encode(tokenizer, ids, args.token_precision)       # (B, N)
            # A code of K bits is too many classes for one softmax: it becomes M sub-tokens.
            subtokens = ar_model.ids_to_subtokens(ids.to(device), config.bits)            # M x (B, N)
            labels = labels.to(device).clamp(max=config.num_classes)     # (B,); --unconditional: all 0
            with runtime.micro_batch(ddp_model, micro, args):            # autocast; see there
                # All true tokens enter at once (teacher forcing), and each position sees those before it.
                # The loss is a scalar, and `terms` (M,) are the shares of the sub-tokens in it.
                loss, terms = ddp_model(subtokens, labels, return_loss=True)
                scaler.scale(loss / args.accumulation).backward()
            logs.append({**{f"loss/{m + 1}": term for m, term in enumerate(terms)}, "loss": loss})

        # ---- the optimizer's step ----
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        logs.append({"grad_norm": norm})
        # DDP has averaged the gradients, so their norm, and what follows from it, is the same on every rank.
        finite = bool(norm.isfinite())                                   # the step's one wait for the device
        if finite:
            scaler.step(optimizer)                                       # optimizer.step(), but for fp16
        scaler.update()                                                  # fp16: smaller after an overflow
        optimizer.zero_grad(set_to_none=True)

        # ---- the EMA follows; a step that was not finite has changed no weight ----
        step += 1
        if finite:
            in_a_row = 0
            meters.update(*logs)
            if args.ema_decay:
                decay = min(args.ema_decay, step / (step + 9))           # follows faster in the first steps
                now = [p.detach() for p in model.parameters()]           # or the EMA would grow a graph
                torch._foreach_lerp_(list(shown.parameters()), now, 1 - decay)
        else:
            skipped += 1
            in_a_row += 1
            runtime.report_skipped(step, in_a_row, logs, args.results_dir)   # stops after ten in a row

        # ---- logs and checkpoints. A checkpoint's step is always logged, so that no mean is cut in two ----
        stopping = stop.requested(step)                                  # a collective: every rank, every step
        saving = stopping or step == length or finite and step % args.checkpoint_every == 0
        if saving or step % args.log_every == 0:
            log = in_units(meters.pop(args.global_batch_size), config, args)
            logger.log(step, {**log, "lr": lr, "skipped_steps": skipped}, SHOWN)
        if step % args.val_every == 0 or step == length:
            shown.eval()                                                 # no dropout
            if held_out:
                log = in_units(validate(shown, held_out, device, args), config, args)
                logger.log(step, {f"val_{name}": value for name, value in log.items()}, SHOWN)
            if runtime.is_main():                                        # the other ranks wait for it
                draw_samples(shown, tokenizer, classes, step, args)
            model.train()
        if saving:
            path = runtime.save_checkpoint(args.results_dir, step, {
                "format": checkpoints.format_of(model), "preset": args.preset, "step": step,
                "config": dataclasses.asdict(config), "ema": {},         # or what the next line has of it
                **{name: part.state_dict() for name, part in state.items()},
                "skipped": skipped, "rng": runtime.rng_states(), "classes": classes, "tokenizer": made_with,
                "dataset": record, "first_stage": first_stage, "args": vars(args)})
        if stopping:
            runtime.print_main(f"saved {path}; --resume continues from here")
    return stop.agreed                                                   # 0, or the signal


# ---- 4. What it reports ------------------------------------------------------------------------------------

SHOWN = ("loss", "bits/1", "bits/2", "grad_norm", "lr", "samples/s", "mfu", "val_loss", "val_perplexity")
# Peak bf16 FLOP/s of the data sheets, without sparsity. A large matrix product alone reaches 70 to 80 %.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def flops_per_image(config):
    """Operations of a training step for one image: 0.569, 1.337, 2.474 TFLOP for AR-B, AR-L, AR-XL.

    A product with a matrix of P entries takes 2 P for a token, and backward twice as much as forward: 6 P.
    The matrices of an inter block see each token once, those of an intra block M times, a head's once.
    Attention adds, at position t, two products of D numbers with each of t + 1 positions. What activation
    checkpointing computes again is no progress and is not counted.
    """
    D = config.width
    block = 4 * D * D + 3 * D * config.ffn_hidden                        # wqkv and wo; w1, w2 and w3
    runs = config.inter_blocks + (0 if config.separate_heads else config.intra_blocks * len(config.bits))
    attention = config.inter_blocks * D * (config.tokens + 1)            # on average over t
    return 6 * config.tokens * (runs * block + sum(D * 2 ** bits for bits in config.bits) + attention)


def in_units(numbers, config, args):
    """The means `numbers`, and what the losses and the speed among them say in other units.

    bits and bits/m: of a token and of its sub-tokens; perplexity: the number of equally likely codes between
    which one hesitates as much; bits_per_pixel: what the tokens of a sample can be compressed to; mfu, model
    FLOPs utilisation: `flops_per_image` times images/s of a rank, over the peak of its GPU if that is known.
    """
    report = dict(numbers)
    if "loss" in numbers:                                                # not if all steps were skipped
        report.update({name.replace("loss", "bits"): value / math.log(2)
                       for name, value in numbers.items() if name.startswith("loss")})
        report["perplexity"] = math.exp(min(numbers["loss"], 700))
        report["bits_per_pixel"] = report["bits"] * config.tokens / args.image_size ** 2 / (args.frames or 1)
    if "samples/s" in numbers:
        flops = numbers["samples/s"] * flops_per_image(config) / runtime.world_size()
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else ""
        report.update({"mfu": flops / peak for name, peak in PEAK_FLOPS.items() if name in gpu})
    return report


def validate(model, held_out, device, args):
    """The mean losses over all `held_out` tokens, {"loss": nats, ..}. A collective."""
    bits = model.config.bits
    sums = torch.zeros(len(bits) + 1, dtype=torch.float64, device=device)                 # terms; images
    micro_batch = runtime.micro_batch_size(args.global_batch_size, args.accumulation)
    for ids, labels, _ in data.eval_batches(held_out, range(len(held_out)), micro_batch):
        labels = labels.to(device).clamp(max=model.config.num_classes)
        with torch.no_grad(), runtime.autocast(device, args.mixed_precision):
            _, terms = model(ar_model.ids_to_subtokens(ids.to(device), bits), labels, return_loss=True)
        sums += len(labels) * torch.cat([terms.double(), sums.new_ones(1)])
    sums = runtime.all_reduce_sum(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    return {"loss": sum(means), **{f"loss/{m + 1}": mean for m, mean in enumerate(means)}}


def draw_samples(model, tokenizer, classes, step, args):
    """Save a grid of samples: a column for each of up to ten classes, always drawn from the same seeds."""
    columns = min(10, len(classes) or 10)
    labels = [i % columns * len(classes) // columns for i in range(4 * columns)]
    # Guidance of 2 is mild, and every model gains from it; without classes there is nothing to guide towards.
    settings = ar_model.sampling_settings(len(model.config.bits), cfg_scale=2.0 if classes else 1.0)
    seeds = [(args.global_seed, i) for i in range(len(labels))]
    batches = sample.generate(model, tokenizer, labels, seeds, sample.How(len(labels), settings))
    captions = [classes[label] for label in labels] if classes else None
    path = f"{args.results_dir}/samples-{step:08d}.png"
    pictures.save_samples(path, torch.cat(list(batches)), columns, captions)


def print_plan(args, config, made_with, dataset, held_out):
    """Say what is about to happen, before anything takes time. Returns (steps, those of the warm-up)."""
    batch = args.global_batch_size
    micro_batch = runtime.micro_batch_size(batch, args.accumulation)
    epoch = len(dataset) // batch                                        # steps
    runtime.require(epoch, f"--global-batch-size {batch} is more than the {len(dataset)} {dataset.kind}s of "
                           f"{dataset.name}; lower it")
    length = runtime.to_steps(args.length, epoch)
    warmup = runtime.to_steps(args.warmup, epoch)
    with torch.device("meta"):                                           # shapes without memory
        model = ar_model.ARModel(config)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    grid = " x ".join(map(str, config.grid))
    bits = " + ".join(map(str, config.bits))
    runtime.print_facts(
        ("model", f"{args.preset}: {parameters:.2f} M parameters, {config.num_classes or 'no'} classes"),
        ("tokens", f"{grid} of {bits} bits, by {made_with['path']} ({made_with['weights']} weights)"),
        ("data", f"{dataset.name}, {len(dataset):,} {dataset.kind}s, {len(held_out or ()):,} held out"),
        ("batch", f"{batch} = {runtime.world_size()} ranks x {args.accumulation} x {micro_batch}, a step of "
                  f"{batch * flops_per_image(config) / 1e12:.3g} TFLOP"),
        ("length", f"{length:,} steps = {length / epoch:.1f} epochs, {warmup:,} of them warm-up"))
    if args.dry_run:
        runtime.print_facts(("cost", cost_of_step(args, model)))
    return length, warmup


def cost_of_step(args, model):
    """The line of `runtime.describe_cost`."""
    batch = runtime.micro_batch_size(args.global_batch_size, args.accumulation)

    def loss(model):
        ids = torch.zeros(batch, model.config.tokens, dtype=torch.long)
        return model(ar_model.ids_to_subtokens(ids, model.config.bits), ids[:, 0], return_loss=True)[0]

    model.checkpointing = args.activation_checkpointing
    return runtime.describe_cost((model,), loss, 20 if args.ema_decay else 16, args)    # with Adam's two


if __name__ == "__main__":
    runtime.run_script(main, get_args)
