"""Stage II: train the auto-regressive transformer on the tokens of a frozen tokenizer.

    python train_ar.py                                                # toy preset, on what stage I has left
    python train_ar.py --tokenizer runs/video/step-00000900.pt --results-dir runs/video_ar        # of clips
    python train_ar.py --preset AR-B --dry-run                        # the plan alone: needs no file at all
    torchrun --nproc-per-node=8 train_ar.py --preset AR-B --tokenizer in1k-256 --data-path imagenet \\
        --num-workers 8 --mixed-precision bf16 --compile --resume     # the published recipe

The published recipe encodes a random crop of every image anew in each step (--online). But the tokenizer does
not change any more: stored once, before training, the 256 ids of an image cost nothing to read, while to
encode it costs half as much as a training step of AR-B. Stored are centre crops (--center-crop, the toy's) or
ten of each image (--ten-crop): five places, mirrored or not, where a photograph of 4:3 has 86 random crops.
The objective is the likelihood of these ids (eq. 7), each in its M sub-tokens:

    loss = mean over tokens t of the sum over m of -log p(x_t^m | class, x_1 .. x_{t-1}, x_t^1 .. x_t^{m-1})

in nats. Divided by log 2, these are the bits that an ideal compressor would need for a token: at most K. In
reading order: 1. recipes and flags; 2. what it learns from; 3. the loop, in `main`; 4. what it reports.
B batch, N tokens of an image, M sub-tokens of a token, S side of an image, D width.
"""
import argparse
import contextlib
import copy
import dataclasses
import math
import os
import warnings

import numpy as np
import torch
import torch.nn as nn

import ar_model
import sample
from support import checkpoints, data, drawn, loops, pictures, runtime, sources, tokens
from support.pickles import PUBLISHED
from support.runtime import require

# ---- 1. Recipes and flags ----------------------------------------------------------------------------------

# What `get_args` takes as defaults, beside the preset's model. Published settings: section 4.1 of the paper.
# Epochs are of whole batches: 1,668 steps for ImageNet, where the official ones have 1,669, the last of 143.
PUBLISHED_AR_RECIPE = dict(lr=3e-4, length="300ep", warmup="6ep", final_lr=0.1, global_batch_size=768,
                           betas=(0.9, 0.95), ema_warmup=True, online=True, raw_weights=True)
AR_RECIPES = {
    "AR-B": PUBLISHED_AR_RECIPE, "AR-L": PUBLISHED_AR_RECIPE,
    "AR-XL": dict(PUBLISHED_AR_RECIPE, lr=2.4e-4, length="350ep", warmup="7ep"),
    # Minutes on two cores: a large learning rate that decays to 0.
    "toy": dict(PUBLISHED_AR_RECIPE, lr=3e-3, length="1800", warmup="50", final_lr=0.0, global_batch_size=32,
                online=False, raw_weights=False)}


def get_args(argv=None):
    """Parse the command line. The preset chooses the defaults of what its recipe and its model fix."""
    first = runtime.ArgumentParser("", add_help=False)
    first.add_argument("--preset", choices=ar_model.PRESETS, default="toy", help="see below")
    preset = first.parse_known_args(argv)[0].preset
    parser = runtime.ArgumentParser(__doc__)
    count = runtime.positive_int
    count0 = runtime.non_negative_int
    number = runtime.non_negative_float
    group = parser.add_argument_group("data and preset")
    group.add_argument("--preset", choices=ar_model.PRESETS, default="toy", help="model and recipe")
    group.add_argument("--tokenizer", help="file, or published name as in1k-256 (newest of runs/tokenizer)")
    group.add_argument("--raw-weights", action=argparse.BooleanOptionalAction, help="of the tokenizer, not "
                       "their EMA (published presets, and --init-from a published file: raw)")
    group.add_argument("--data-path", help="folder, tar shards, generated, generated-plain (the tokenizer's)")
    group.add_argument("--val-data-path", help="held-out images, if --data-path has no val/ or test/")
    group.add_argument("--split-list", help="of clips: official UCF-101 list of those to train on")
    group.add_argument("--val-split-list", help="of clips: official UCF-101 list of the held-out ones")
    group.add_argument("--val-size", type=count, default=5000, help="held-out images used, at most")
    group.add_argument("--image-size", type=count, help="side of the crops (the tokenizer's resolution)")
    group.add_argument("--resize", type=count, help="shorter side before the crop (--image-size)")
    group.add_argument("--frames", type=count, help="of a clip (the tokenizer's)")
    group.add_argument("--frame-stride", type=count, help="every n-th frame of a video (the tokenizer's)")
    group.add_argument("--init-from", help="start from this AR model, a file or a published name as AR-B")
    group.add_argument("--unconditional", action="store_true", help="ignore the classes of the data set")
    group.add_argument("--tokens", help="file for stored tokens (tokens.bin in --results-dir)")
    group.add_argument("--token-precision", choices=runtime.AUTOCAST_DTYPES, default="fp32", help="autocast")
    group.add_argument("--results-dir", default="runs/ar", help="for checkpoints, logs and grids of samples")
    crops = group.add_mutually_exclusive_group()
    crops.add_argument("--online", action="store_true", help="encode random crops in every step (AR-B, ..)")
    crops.add_argument("--ten-crop", action="store_true", help="store ten crops, or of a video ten clips")
    crops.add_argument("--center-crop", action="store_true", help="store one crop, of the centre (toy)")
    group.add_argument("--flip", action="store_true", help="with --online: mirror half of the images")
    group = parser.add_argument_group("model")
    group.add_argument("--split", type=count, nargs="+", metavar="BITS", help="bits of each sub-token")
    runtime.add_config_flags(group, ar_model.PRESETS[preset])
    group = parser.add_argument_group("optimisation")
    group.add_argument("--length", type=loops.duration, help="steps, or epochs as in 300ep")
    group.add_argument("--global-batch-size", type=count, help="images a step, over all ranks")
    group.add_argument("--accumulation", type=count, default=1, help="micro-batches a step")
    group.add_argument("--lr", type=number, help="peak learning rate of AdamW")
    group.add_argument("--final-lr", type=runtime.fraction, help="the last one, as a fraction of the peak")
    group.add_argument("--warmup", type=loops.duration, help="linear (the preset's; if short, a 20th)")
    group.add_argument("--betas", type=runtime.bounded(float, 0.0, 0.999999), nargs=2, help="of AdamW")
    group.add_argument("--weight-decay", type=number, default=0.05, help="of all parameters")
    group.add_argument("--max-grad-norm", type=number, default=1.0, help="clip gradients (0: do not)")
    group.add_argument("--ema-decay", type=runtime.fraction, default=0.0, help="of an EMA to draw with")
    group.add_argument("--ema-warmup", action=argparse.BooleanOptionalAction, help="follow faster at first")
    group = parser.add_argument_group("speed and memory")
    group.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="fp32", help="autocast")
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
    group.add_argument("--keep", type=count, default=3, help="newest checkpoints that stay, of all written")
    group.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    chosen_later = {"warmup": None, "online": False, "raw_weights": None}       # in `print_plan`, `settle`
    parser.set_defaults(**{**AR_RECIPES[preset], **chosen_later}, split=list(ar_model.PRESETS[preset].bits))
    return parser.parse_args(argv)


def is_missing(name, args):
    """Whether --dry-run does without the published file of this name, as it would have to be downloaded."""
    places = (name, os.path.join(runtime.cache_dir(), PUBLISHED.get(name, ("", name))[1]))
    return args.dry_run and name in PUBLISHED and not any(map(os.path.exists, places))


def settle(args):
    """Choose crops and weights of the tokenizer where no flag does: as the run that --resume continues, else
    as the recipe, or raw for --init-from a published model. Returns the fingerprint of that run's data."""
    existing = runtime.list_checkpoints(args.results_dir)
    made = AR_RECIPES[args.preset]
    raw = made["raw_weights"]
    like = "2:"
    for path in existing if args.resume == "latest" else filter(None, [args.resume]):
        with contextlib.suppress(runtime.UserError):                     # `checkpoints.resume` tells
            saved = checkpoints.read(path)
            if saved.get("format") == checkpoints.AR:
                made = saved.get("args") or made
                raw = (saved.get("tokenizer") or {}).get("weights") == "raw"
                like = str((saved.get("dataset") or {}).get("fingerprint", like))
    if args.init_from and not (existing or raw):
        raw = is_missing(args.init_from, args) or "source" in checkpoints.opened(args.init_from, False)[1]
    if args.raw_weights is None:
        args.raw_weights = raw
    if not (args.online or args.ten_crop or args.center_crop):
        args.online = made.get("online", False)
        args.ten_crop = made.get("ten_crop", False)
    return like


# ---- 2. What it learns from --------------------------------------------------------------------------------

def load_tokenizer(args):
    """(tokenizer on the CPU, its record for a checkpoint, the flags of its data) of --tokenizer. Of one that
    `is_missing`, the shape; where there is no other, AR-B, .. are planned with that of in1k-256."""
    if args.dry_run and args.preset != "toy" and not runtime.list_checkpoints("runs/tokenizer"):
        args.tokenizer = args.tokenizer or "in1k-256"
    args.tokenizer = args.tokenizer or str(runtime.latest_checkpoint("runs/tokenizer", "tokenizer"))
    if is_missing(args.tokenizer, args):
        name = "in1k-256" if args.tokenizer in ar_model.PRESETS else args.tokenizer      # that inside AR-B
        with torch.device("meta"):
            tokenizer = next(kind(presets[name]) for kind, _, presets in checkpoints.FORMATS.values()
                             if name in presets)
        return tokenizer, {"path": f"{args.tokenizer}, not downloaded yet", "sha256": None,
                           "weights": "raw" if args.raw_weights else "EMA"}, {}
    tokenizer, info = checkpoints.load_tokenizer(args.tokenizer, not args.raw_weights)
    made_with = {name: info[name] for name in ("path", "weights", "preset")}
    made_with["sha256"] = checkpoints.weights_hash(tokenizer)
    return tokenizer.requires_grad_(False), made_with, info["trained_on"]


def prepare(args):
    """(tokenizer on the CPU, training data, held-out data or None, `ARConfig`, records of both for a
    checkpoint). Fills in flags that were not given. Raises ValueError for what does not fit together."""
    like = settle(args)
    tokenizer, made_with, trained_on = load_tokenizer(args)
    frames = tokenizer.config.frames                                     # None: it is a tokenizer of images
    require(frames or not (args.frames or args.split_list), f"--tokenizer {args.tokenizer} is of images, but "
            f"--frames and --split-list are for clips; leave them out")
    for name, value in trained_on.items() if args.data_path is None else ():
        if getattr(args, name) is None and not (name == "resize" and args.ten_crop and not frames):
            setattr(args, name, value)                                   # ten crops of images bring their own
    args.image_size = args.image_size or tokenizer.config.resolution
    args.frames = args.frames or frames
    sizes = {"frames": args.frames} if frames else {}
    dataclasses.replace(tokenizer.config, resolution=args.image_size, **sizes)    # raises if it cannot be
    dataset, held_out = build_datasets(args)
    ids = tokenizer.quantizer.vocabulary
    bits = math.log2(ids)
    way = f"give --split {math.ceil(bits / 2)} {int(bits) // 2 or ''}" if bits.is_integer() else (
        "train one of whole bits, see --levels and --codebook-size of train_tokenizer.py")
    require(sum(args.split) == bits, f"--split {' + '.join(map(str, args.split))} are {sum(args.split)} "
            f"bits, but the {ids} ids of --tokenizer {args.tokenizer} have {bits:.4g}; {way}")
    config = runtime.config_from_args(ar_model.PRESETS[args.preset], args, bits=args.split,
                                      grid=tokenizer.config.latent_grid(*dataset.axes),
                                      num_classes=0 if args.unconditional else len(dataset.classes))
    fingerprint = runtime.on_main(data.fingerprint, dataset, range(len(dataset)), like)
    records = {"tokenizer": made_with, "dataset": {"length": len(dataset), "fingerprint": fingerprint}}
    return tokenizer, dataset, held_out, config, records


def build_datasets(args):
    """(training set, held-out set or None) of images or clips. Their labels are of the same classes. With
    --init-from, a set smaller than --global-batch-size lowers that."""
    require(args.online or not args.flip, "--flip goes with --online; stored tokens have --ten-crop")
    require(bool(args.split_list) == bool(args.val_split_list), "--split-list and --val-split-list are a "
            "pair, such as trainlist01.txt and testlist01.txt; give both or neither")
    crop = "random" if args.online else "ten" if args.ten_crop else "center"
    view = data.View(args.image_size, args.frames, crop, args.flip, args.resize,
                     frame_stride=args.frame_stride or 1)
    dataset = sources.build_dataset(args.data_path, "train", view, args.split_list)
    loops.fit_batch(args, dataset)
    classes = () if args.unconditional else dataset.classes
    require(classes or args.unconditional, f"--data-path {dataset.name} has no classes; make a subfolder for "
                                           f"each, or add --unconditional")
    view = dataclasses.replace(view, crop="center", flip=False)
    held_out = sources.build_held_out(args, view, classes)
    if runtime.on_main(data.same_samples, dataset, held_out):
        runtime.print_main(f"no validation: all of {held_out.name} is trained on; add val/ beside train/, or "
                           f"see --val-data-path")
        held_out = None
    elif classes:
        require(held_out.classes, f"{held_out.name}, held out, has no classes, but {dataset.name} has; sort "
                f"it into such, name others with --val-data-path, or add --unconditional")
        strange = set(held_out.classes).difference(classes)
        require(not strange, f"{held_out.name}, held out, has classes that {dataset.name} lacks: "
                f"{', '.join(sorted(strange)[:5])}; sort them alike, name others with --val-data-path, or "
                f"add --unconditional")
        held_out.labels = torch.tensor([classes.index(name) for name in held_out.classes])[held_out.labels]
        held_out.classes = classes
    return dataset, held_out


def start_from(path, model, classes, made_with):
    """Give `model` the weights of any AR model, ours or published, as far as they fit: classes of equal names
    keep their row of the table, other sub-tokens start with new embeddings and heads."""
    source, inner, info = checkpoints.load_ar(path)
    state = source.state_dict()
    known = drawn.class_names(info["classes"], source.config.num_classes)    # ImageNet's of published files,
    classes = drawn.class_names(classes, len(classes))                   # and of a set with its folders
    if known != classes:
        rows = {label: known.index(name) for label, name in enumerate(classes) if name in known}
        table = model.class_embedding.weight.detach().clone()
        old = state["class_embedding.weight"].to(table.device)
        table[[*rows, -1]] = old[[*rows.values(), -1]]                   # the last: "no class"
        state["class_embedding.weight"] = table
        runtime.print_main(f"start    {len(rows)} of {len(classes)} classes are known")
    # Of published files it is not recorded: they hold the tokenizer itself, with its raw weights.
    theirs = (info["tokenizer"] or {}).get("sha256") or inner and checkpoints.weights_hash(inner)
    if theirs and theirs != (made_with["sha256"] or theirs):
        runtime.print_main(f"start    warning: {path} learned tokens by other weights than the "
                           f"{made_with['weights']} ones of {made_with['path']}: what they mean is new to it")
    checkpoints.load_partly(model, state, ("token_embeddings.", "heads."),
                            f"the {info['weights']} weights of {path} ({info['preset']})", source.config)


# ---- 3. The training loop ----------------------------------------------------------------------------------

# Flags that a resumed run cannot change.
MUST_STAY = ("global_batch_size", "global_seed", "mixed_precision", "online", "ten_crop", "flip",
             "token_precision", "weight_decay", "ema_decay")


def build_model(config, device, args):
    """An `ARModel` as the flags say. For --dry-run its tensors have shapes, but take no memory."""
    if args.dry_run:
        device = torch.device("meta")
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta")     # what it loads is compared
    with device:
        model = ar_model.ARModel(config)
    model.checkpointing = args.activation_checkpointing
    if args.compile:
        # Block by block: one small graph serves all layers, while the whole model would compile for minutes.
        for block in [*model.inter_blocks, *model.intra_blocks]:
            block.compile(dynamic=False)
    return model


def learning_rate(step, length, warmup, args):
    """The rate in `step`, 0 .. length - 1: it rises from 0.005 of its peak, stays there for a twentieth of
    the other steps, and falls in a straight line. The last step has --final-lr."""
    if step < warmup:
        return args.lr * (0.005 + (1 - 0.005) * step / warmup)
    done = (step - warmup) / max(1, length - 1 - warmup)
    return args.lr * (1 - (1 - args.final_lr) * max(0, done - 0.05) / 0.95)


def main(args):
    """Train an AR model as `args` (from `get_args`) say."""
    device = runtime.setup_process_group(args.device)
    loops.check_results_dir(args.results_dir)
    tokenizer, dataset, held_out, config, records = prepare(args)
    classes = dataset.classes[:config.num_classes]                       # none, if --unconditional
    torch.manual_seed(args.global_seed)                                  # equal initial weights on every rank
    model = build_model(config, device, args)
    length, warmup = print_plan(args, model, records["tokenizer"], dataset, held_out)
    # ---- everything that the loop changes, and that a checkpoint must therefore hold ----
    is_new = not runtime.list_checkpoints(args.results_dir)
    if args.init_from and is_new and not is_missing(args.init_from, args):
        start_from(args.init_from, model, classes, records["tokenizer"])
    # One group of parameters: the published schedule lets all of them decay, even the scales of the norms.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, args.betas, weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    shown = model                                                        # what is validated and drawn with
    if args.ema_decay:
        shown = parts["ema"] = copy.deepcopy(model).requires_grad_(False)
    seed = np.random.default_rng((args.global_seed, runtime.rank())).integers(2 ** 63)
    torch.manual_seed(int(seed))                                         # for dropout, a rank's own
    made_with = {name: records["tokenizer"][name] for name in ("weights", "sha256")
                 if records["tokenizer"][name]}                          # --dry-run may not know the hash
    saved = checkpoints.resume(args, parts, MUST_STAY, config=dataclasses.asdict(config), tokenizer=made_with,
                               dataset=records["dataset"])
    step = saved.get("step", 0)
    skipped = saved.get("skipped", 0)                                    # steps that were not finite
    if not args.dry_run:
        lock = runtime.lock(args.results_dir)                            # held until `main` ends
        tokenizer.to(device)
    if not args.online:
        dataset = tokens.stored(dataset, records["tokenizer"], tokenizer, args,
                                fingerprint=records["dataset"]["fingerprint"])
    if held_out:
        held_out = tokens.stored(held_out, records["tokenizer"], tokenizer, args, limit=args.val_size)
    if args.dry_run:
        return
    loader = data.train_loader(dataset, args.global_batch_size, args.global_seed, step, args.accumulation,
                               args.num_workers if args.online else 0)   # of (seed, step) alone: no state
    ddp_model = loops.distributed(model, device)
    logger = loops.Logger(args.results_dir, length, step)
    meters = loops.Meters()                                            # means since the last log line
    last_finite = step
    stop = runtime.StopRequest()
    while step < length and not stop.agreed:
        lr = learning_rate(step, length, warmup, args)
        optimizer.param_groups[0].update(lr=lr, betas=args.betas)        # as the flags say, even if resumed
        # ---- forward and backward: the likelihood of the true ids, eq. 7 ----
        logs = []                                                        # of this step, for the meters
        for micro in range(args.accumulation):
            ids, labels, _ = next(loader)                                # stored ids (B, N), or images
            if args.online:
                ids = tokens.encode(tokenizer, ids, args.token_precision)                 # (B, N)
            # A token of K bits has too many ids for one softmax: it becomes M sub-tokens.
            subtokens = ar_model.ids_to_subtokens(ids.to(device), config.bits)            # M x (B, N)
            labels = labels.to(device).clamp(max=config.num_classes)     # (B,); --unconditional: all 0
            ddp_model.require_backward_grad_sync = micro == args.accumulation - 1  # ranks average once a step
            with runtime.autocast(device, args.mixed_precision):
                # All true tokens enter at once (teacher forcing), and each position sees those before it.
                # The loss is a scalar, and `terms` (M,) are the shares of the sub-tokens in it.
                loss, terms = ddp_model(subtokens, labels, return_loss=True)
                scaler.scale(loss / args.accumulation).backward()
            logs.append({**{f"loss/{m + 1}": term for m, term in enumerate(terms)}, "loss": loss})
        # ---- the optimizer's step, and the EMA that follows; a step that is not finite changes nothing ----
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)  # inf: measure it
        logs.append({"grad_norm": norm})
        finite = bool(norm.isfinite())                                   # averaged by DDP: equal on all ranks
        step += 1
        if finite:
            scaler.step(optimizer)                                       # optimizer.step(), but for fp16
            if args.ema_decay:
                decay = min(args.ema_decay, step / (step + 9)) if args.ema_warmup else args.ema_decay
                now = [p.detach() for p in model.parameters()]           # or the EMA would grow a graph
                torch._foreach_lerp_(list(shown.parameters()), now, 1 - decay)
            last_finite = step
            meters.update(*logs)                                         # a skipped step spoils no mean
        else:
            skipped += 1
            loops.report_skipped(step, step - last_finite, logs, args.results_dir)         # ten: stop
        scaler.update()                                                  # fp16: smaller after an overflow
        optimizer.zero_grad(set_to_none=True)
        # ---- logs and checkpoints. A checkpoint's step is always logged, so that no mean is cut in two ----
        stopping = stop.requested(step)                                  # collective: every rank, every step
        saving = stopping or step == length or finite and step % args.checkpoint_every == 0
        looking = step == length or step % args.val_every == 0
        if saving or step % args.log_every == 0:
            log = in_units(meters.pop(args.global_batch_size), config, args)
            logger.log(step, {**log, "lr": lr, "skipped_steps": skipped}, SHOWN)
        elif logger.early(step):                                         # a sign of life, on the screen alone
            logger.show(step, in_units(meters.means(args.global_batch_size), config, args), SHOWN)
        if looking and held_out:
            log = in_units(validate(shown, held_out, device, args), config, args)
            logger.log(step, {f"val_{name}": value for name, value in log.items()}, SHOWN)
        if saving:
            path = loops.save_checkpoint(args.results_dir, step, {
                "format": checkpoints.format_of(model),
                "preset": args.preset,
                "step": step,
                "ema": {},                                               # unless there is one among the parts
                **{name: part.state_dict() for name, part in parts.items()},
                "config": dataclasses.asdict(config),
                **records,                                               # "tokenizer" and "dataset"
                "first_stage": {"format": checkpoints.format_of(tokenizer), "model": tokenizer.state_dict(),
                                "config": dataclasses.asdict(tokenizer.config)},    # for drawing images
                "classes": classes,
                "skipped": skipped,
                "rng": loops.rng_states(),
                "args": vars(args)}, args.keep)
            stop.saved(path)                                             # says so, if a signal was the reason
        if looking and not stop.agreed:
            runtime.on_main(draw_samples, shown, tokenizer, classes, step, args)
        model.train()
    return stop.agreed                                                   # 0, or the signal


# ---- 4. What it reports ------------------------------------------------------------------------------------

SHOWN = ("loss", "bits/1", "bits/2", "grad_norm", "lr", "samples/s", "mfu", "val_loss", "val_perplexity")
# Peak bf16 FLOP/s of the data sheets, without sparsity. A large matrix product alone reaches 70 to 80 %.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def flops_per_image(config):
    """Operations of a training step for one image: 0.569, 1.337, 2.474 TFLOP for AR-B, AR-L, AR-XL. A product
    with a matrix of P entries takes 2 P for a token, and backward twice as much as forward: 6 P. The matrices
    of an inter block see each token once, those of an intra block M times, a head's once. Attention adds, at
    position t, two products of D numbers with each of t + 1 positions. Recomputed ones count once."""
    D = config.width
    block = 4 * D * D + 3 * D * config.ffn_hidden                        # wqkv and wo; w1, w2 and w3
    runs = config.inter_blocks + (0 if config.separate_heads else config.intra_blocks * len(config.bits))
    attention = config.inter_blocks * D * (config.tokens + 1)            # on average over t
    return 6 * config.tokens * (runs * block + sum(D * 2 ** bits for bits in config.bits) + attention)


def in_units(numbers, config, args):
    """The means `numbers`, and what the losses and the speed among them say in other units: bits and bits/m,
    of a token and of its sub-tokens; perplexity, the number of equally likely ids between which one hesitates
    as much; bits_per_pixel, what tokens can be compressed to; mfu, model FLOPs utilisation:
    `flops_per_image` times images/s of a rank, over the peak of its GPU if that is known."""
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
    model.eval()                                                         # no dropout
    bits = model.config.bits
    sums = torch.zeros(len(bits) + 1, dtype=torch.float64, device=device)                 # terms; images
    size = loops.micro_batch_size(args.global_batch_size, args.accumulation)
    for ids, labels, _ in data.eval_batches(held_out, range(len(held_out)), size):
        labels = labels.to(device).clamp(max=model.config.num_classes)
        with torch.no_grad(), runtime.autocast(device, args.mixed_precision):
            _, terms = model(ar_model.ids_to_subtokens(ids.to(device), bits), labels, return_loss=True)
        sums += len(labels) * torch.cat([terms.double(), sums.new_ones(1)])
    sums = runtime.all_reduce_sum(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    return {"loss": sum(means), **{f"loss/{m + 1}": mean for m, mean in enumerate(means)}}


def draw_samples(model, tokenizer, classes, step, args):
    """Save a grid of samples: a column for each of up to ten classes, always drawn from the same seeds."""
    model.eval()
    columns = min(10, len(classes) or 10)
    labels = [i % columns * len(classes) // columns for i in range(4 * columns)]
    # Guidance of 2 is mild, and every model gains from it; without classes there is nothing to guide towards.
    settings = ar_model.sampling_settings(len(model.config.bits), cfg_scale=2.0 if classes else 1.0)
    seeds = [(args.global_seed, i) for i in range(len(labels))]
    batches = sample.generate(model, tokenizer, labels, seeds, sample.How(len(labels), settings))
    pictures.save_samples(f"{args.results_dir}/samples-{step:08d}.png", torch.cat(list(batches)), columns,
                          [classes[label] for label in labels] if classes else None)


def print_plan(args, model, made_with, dataset, held_out):
    """Say what is about to happen, before anything takes time. Returns (steps, those of the warm-up)."""
    config = model.config
    batch = args.global_batch_size
    recipe = AR_RECIPES[args.preset]
    epoch = len(dataset) // batch                                        # steps
    require(epoch, f"--global-batch-size {batch} is more than the {len(dataset)} {dataset.kind}s of "
                   f"{dataset.name}; lower it")
    length = loops.to_steps(args.length, epoch)
    require(length, f"--length {args.length} is 0 steps of {batch} {dataset.kind}s; give at least 1")
    warmup = loops.to_steps(args.warmup or recipe["warmup"], epoch)
    if args.warmup is None and args.length != recipe["length"]:          # or a short run would only warm up
        warmup = min(warmup, length // 20)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    token = " x ".join(map(str, config.grid)) + " of " + " + ".join(map(str, config.bits)) + " bits"
    runtime.print_facts(
        ("model", f"{args.preset}: {parameters:.2f} M parameters, {config.num_classes or 'no'} classes"),
        ("tokens", f"{token}, by {made_with['path']} ({made_with['weights']} weights)"),
        ("data", f"{dataset.name}, {dataset.view.crop} crops of {len(dataset):,} {dataset.kind}s, "
                 f"{len(held_out or ()):,} held out"),
        ("batch", f"{batch} = {runtime.world_size()} ranks x {args.accumulation} micro-batches x "
                  f"{loops.micro_batch_size(batch, args.accumulation)}, {batch * config.tokens:,} tokens, "
                  f"{batch * flops_per_image(config) / 1e12:.3g} TFLOP a step"),
        ("length", f"{length:,} steps = {length * batch / len(dataset):.1f} epochs"),
        ("lr", f"{args.lr:g}, warm-up {warmup:,} steps"))
    return length, warmup


if __name__ == "__main__":
    runtime.run_script(main, get_args)
