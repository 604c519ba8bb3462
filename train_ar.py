"""Stage II: train the auto-regressive transformer on the tokens of a frozen tokenizer.

    python train_ar.py                                                # toy preset, on what stage I has left
    python train_ar.py --tokenizer photos.pt --split 6 8 --inter-blocks 6 --length 20ep
    python train_ar.py --tokenizer clips.pt --results-dir runs/video_ar              # of video.py: clips
    torchrun --nproc-per-node=8 train_ar.py --preset AR-B --tokenizer imagenet_256_L.ckpt \\
        --data-path imagenet --mixed-precision bf16 --compile --resume                # the published recipe

The tokenizer does not change any more, so every image is encoded once, before training: 256 codes take 1 kB
and cost nothing to read, while encoding costs half as much as a training step of AR-B. (--online encodes new
random crops in every step instead.) The objective is the likelihood of these codes (eq. 7), each in its M
sub-tokens:

    loss = mean over tokens t of the sum over m of -log p(x_t^m | class, x_1 .. x_{t-1}, x_t^1 .. x_t^{m-1})

in nats. Divided by log 2, these are the bits that an ideal compressor would need for a token: at most K.

The tokens of a clip are a sequence too, of (t, y, x) instead of (y, x): with a tokenizer of video.py, all of
this trains a model of clips (the paper leaves that as future work). What is said of images holds for clips.

In reading order: 1. tokens; 2. learning rate, weight decay, FLOPs; 3. recipes and flags; 4. the training
loop. Axis letters as in ar_model.py: B batch, N tokens of an image, M sub-tokens of a token, D width. S: side
of an image, n: its crops.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import time

import numpy as np
import torch
from tqdm import tqdm

import ar_model
import data
import runtime
import sample
import tokenizer as tok
import video

# ------------------------------------------------------------------------------------------------------------
# 1. Tokens: the data set, encoded once
# ------------------------------------------------------------------------------------------------------------

MISSING = 2 ** 32 - 1                 # stands where the codes of an unreadable image would be
TEN_CROPS = {"images": "four corners and the centre at 1.1 x the size",
             "clips": "five, from the first frame to the last"}
BATCHES_A_PART = 16                   # batches whose codes are saved together: what a kill can cost a rank


class Crops:
    """A view of a data set for encoding: item `row` is (crops uint8 (n, 3, S, S), whether readable, row).

    n is 1 (the centre) or 10; clips are (n, 3, T, S, S). An unreadable image becomes black crops, so that
    batches keep their size and every image its neighbours: then its codes are the same to the last bit on any
    number of ranks.
    """

    def __init__(self, dataset, chosen, ten_crop):
        self.dataset, self.chosen, self.ten_crop = dataset, chosen, ten_crop

    def __getitems__(self, rows):
        indices = [int(self.chosen[row]) for row in rows]
        if self.ten_crop:
            crops = [self.ten_crops(index) for index in indices]
        else:
            crops = [item and item[0][None] for item in self.dataset.__getitems__(indices)]
        black = torch.zeros(10 if self.ten_crop else 1, 3, *self.dataset.axes, dtype=torch.uint8)
        return [(black, 0, row) if c is None else (c, 1, row) for c, row in zip(crops, rows)]

    def ten_crops(self, index):
        """uint8 (10, 3, S, S), None for a broken image."""
        try:
            return self.dataset.ten_crops(index)
        except Exception as error:                            # as in data.py: reported, counted, skipped
            self.dataset.report_broken(index, error)
            return None


class Tokens(data.Images):
    """Stored codes in the form of a data set (see data.py): an item is (codes (N,) int64, label, index).

    So the loaders of images serve tokens too: the same order, the same shares of ranks, the same position
    after resuming. Of ten crops, the seed of a request chooses one.
    """

    def __init__(self, path, header):
        shape = tuple(header["shape"])                                                    # (images, n, N)
        super().__init__(header["data"]["name"], header["classes"], shape[0], header["image_size"], "center",
                         False, 0)
        self.codes, self.labels = np.memmap(path, "<u4", "r", shape=shape), header["labels"]
        self.broken[torch.tensor(header["missing"], dtype=torch.long)] = True

    def path(self, index):
        """A name for the item."""
        return f"{self.name}[{index}]"

    def label(self, index):
        """The class of item `index`."""
        return self.labels[index]

    def read(self, index, seed):
        """(codes (N,) int64, label, index), or None for a missing image."""
        if self.broken[index]:
            return None
        codes = self.codes[index, seed % self.codes.shape[1]]
        return torch.from_numpy(codes.astype(np.int64)), self.labels[index], index


def encode(tokenizer, images, device, precision):
    """uint8 images (B, 3, S, S) or clips (B, 3, T, S, S) to codes (B, N), int64 on `device`.

    `precision` is fp32 by default, even where training is not: a code consists of the signs of z, and many a
    z is close to 0. The 8 bits of bf16 would flip some of them, and the transformer would learn codes that
    the decoder was not trained on.
    """
    with runtime.autocast(device, precision):
        return tokenizer.encode(data.to_float(images.to(device, non_blocking=True))).flatten(1)


def fingerprint(dataset):
    """sha256 of all labels and of 16 images, evenly spread: the same for moved data, not for other data."""
    labels = np.array([dataset.label(index) for index in range(len(dataset))], np.int64)
    digest = hashlib.sha256(labels.tobytes())
    for index in np.linspace(0, len(dataset) - 1, 16).astype(int):
        try:
            digest.update(np.asarray(dataset.load(int(index))).tobytes())
        except Exception:                                     # encoding will report it
            digest.update(b"broken")
    return digest.hexdigest()


def stored_tokens(path, dataset, tokenizer, made_with, args, device, ten_crop=False, limit=None):
    """`Tokens` of `dataset` from the file `path`, encoded first if that is not done yet. A collective.

    path: for codes, uint32 (images, n, N); the JSON file of the same name says what they are. made_with:
    path, sha256 and weights of the tokenizer. limit: at most so many images, evenly spread. Raises
    `UserError` that names both sides, where the file was made with another tokenizer or of other data.
    """
    path = pathlib.Path(path)
    chosen = np.linspace(0, len(dataset) - 1, min(limit or len(dataset), len(dataset))).round().astype(int)
    grid = tokenizer.config.grid(*dataset.axes)
    header = {
        "format": "open-magvit2-tokens",
        "tokenizer": made_with,
        "vocabulary": tokenizer.config.vocabulary,
        "grid": list(grid),
        "image_size": dataset.image_size,
        "resize": dataset.resize or dataset.image_size,
        "crops": TEN_CROPS[tokenizer.unit] if ten_crop else "centre",
        "flips": ten_crop,
        "precision": args.token_precision,
        "data": {"name": dataset.name, "length": len(dataset), "fingerprint": fingerprint(dataset)},
        "dtype": "uint32, little endian",
        "shape": [len(chosen), 10 if ten_crop else 1, math.prod(grid)],
        "classes": dataset.classes,
    }
    if not path.with_suffix(".json").exists():
        labels = [dataset.label(int(index)) for index in chosen]
        make_tokens(path, header, labels, Crops(dataset, chosen, ten_crop), tokenizer, args, device)
    try:
        stored = json.loads(path.with_suffix(".json").read_text())
        check_tokens(path, stored, header)
        return Tokens(path, stored)
    except (KeyError, TypeError, ValueError) as error:
        raise runtime.UserError(f"{path.with_suffix('.json')} does not describe stored tokens ({error!r}); "
                                f"delete it and {path}, or choose another --tokens") from None


def check_tokens(path, stored, header):
    """Raise `UserError` unless the `stored` header describes the tokens that `header` asks for."""
    def identity(header):
        names = ("vocabulary", "grid", "image_size", "resize", "crops", "flips", "precision", "shape")
        return {"tokenizer": header["tokenizer"]["sha256"][:12], "weights": header["tokenizer"]["weights"],
                "data": header["data"]["fingerprint"][:12], **{name: header[name] for name in names}}

    def origin(header):
        return f"the tokenizer {header['tokenizer']['path']} of {header['data']['name']}"

    runtime.check_same(identity(stored), identity(header),
                       f"{path} was made with {origin(stored)}, but is wanted with {origin(header)}; delete "
                       f"it and its .json to have it made anew, or choose another --tokens: it")
    size = 4 * math.prod(stored["shape"])
    runtime.require(path.exists() and path.stat().st_size == size,
                    f"{path} does not have the {size:,} bytes that its header promises; delete {path} and "
                    f"{path.with_suffix('.json')} to have both made anew")


def make_tokens(path, header, labels, crops, tokenizer, args, device):
    """Encode all images, each rank its share, in parts that survive a kill; then join the parts to `path`."""
    images, n, N = header["shape"]
    parts, size = pathlib.Path(f"{path}.parts"), BATCHES_A_PART * args.encode_batch_size
    count, batch = math.ceil(images / size), max(1, args.encode_batch_size // n)
    todo = runtime.open_parts(parts, count, {**header, "encode_batch_size": args.encode_batch_size})
    requests = []                                             # rows of each batch, none of them in two parts
    for part in todo:
        rows = list(range(part * size, min((part + 1) * size, images)))
        requests += [rows[first:first + batch] for first in range(0, len(rows), batch)]
    kind = crops.dataset.kind
    runtime.print_main(f"encoding {images:,} {kind}s of {header['data']['name']} to {path}")
    codes, bar = [], tqdm(total=sum(map(len, requests)), desc="encoding", unit=kind,
                          disable=None if runtime.is_main() else True)
    loader = data.batches(crops.dataset, crops, requests, args.num_workers)
    for rows, (x, readable, _) in zip(requests, loader):                                  # (b, n, 3, S, S)
        ids = encode(tokenizer, x.flatten(0, 1), device, args.token_precision)            # (b * n, N)
        ids = ids.unflatten(0, (-1, n)).cpu().numpy().astype("<u4")                       # (b, n, N)
        ids[readable.numpy() == 0] = MISSING
        codes.append(ids)
        bar.update(len(rows))
        if (rows[-1] + 1) % size == 0 or rows[-1] + 1 == images:
            runtime.save_part(parts, rows[-1] // size, np.concatenate(codes))
            codes = []
    bar.close()
    runtime.barrier()
    if runtime.is_main():
        temporary, missing, row = path.with_name(f".{path.name}.tmp"), [], 0
        with open(temporary, "wb") as file:
            for codes in runtime.read_parts(parts, count):
                missing += (row + np.flatnonzero(codes[:, 0, 0] == MISSING)).tolist()
                codes.tofile(file)
                row += len(codes)
            file.flush()
            os.fsync(file.fileno())
        runtime.require(len(missing) <= data.BROKEN_LIMIT * images,
                        f"{len(missing)} of {images} {kind}s of {header['data']['name']} are broken, more "
                        f"than 1 %; copy or download the data again, delete {parts} and start anew")
        os.replace(temporary, path)
        runtime.write_json(path.with_suffix(".json"), {**header, "missing": missing, "labels": labels})
        shutil.rmtree(parts)
    runtime.barrier()


# ------------------------------------------------------------------------------------------------------------
# 2. Learning rate, weight decay, FLOPs
# ------------------------------------------------------------------------------------------------------------

def learning_rate_factor(step, length, warmup=0, start=0.005, constant=0.05, final=0.1):
    """What the peak learning rate is multiplied with in `step` (from 0) of `length`.

    Linear from `start` to 1 over `warmup`, then 1 for the part `constant` of the rest, then linear to
    `final`, which the last step has. The published schedule counts all three in epochs: it is a staircase.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup
    done = min(1, (step - warmup) / max(1, length - 1 - warmup))
    if done <= constant:
        return 1.0
    return 1 - (1 - final) * (done - constant) / (1 - constant)


def rate_is_per_epoch(args):
    """Whether the learning rate changes once an epoch, as published, and not in every step."""
    return args.lr_per_epoch and args.length.endswith("ep") and args.warmup.endswith("ep")


def parameter_groups(model, weight_decay):
    """AdamW's groups: matrices decay; vectors do not, as they are the norms' scales and belong near 1."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def flops_per_image(config):
    """Operations of a training step for one image: 0.569, 1.337, 2.474 TFLOP for AR-B, AR-L, AR-XL.

    A product with a matrix of P entries takes 2 P for a token, and backward twice as much as forward: 6 P.
    The matrices of an inter block see each token once, those of an intra block M times, a head's once;
    embeddings are looked up. Attention adds, at position t, two products of D numbers with each of t + 1
    positions. What activation checkpointing computes again is not counted: it is no progress.
    """
    N, D = config.tokens, config.width
    block = 4 * D * D + 3 * D * config.ffn_hidden                        # wqkv and wo; w1, w2 and w3
    runs = config.inter_blocks + (0 if config.separate_heads else config.intra_blocks * len(config.bits))
    attention = config.inter_blocks * D * (N + 1)                        # on average over t
    return 6 * N * (runs * block + sum(D * 2 ** bits for bits in config.bits) + attention)


# Peak bf16 FLOP/s (V100: fp16) of the data sheets, without sparsity; the first whose words are in the name of
# the device counts. One large matrix product alone reaches 70 to 80 % of them (an H200: 780 T).
PEAK_FLOPS = (("B200", 2250e12), ("GH200", 989e12), ("H200", 989e12), ("H100 PCIe", 756e12),
              ("H100 NVL", 835e12), ("H100", 989e12), ("H800", 989e12), ("H20", 148e12), ("A100", 312e12),
              ("A800", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("A40", 150e12),
              ("A6000", 155e12), ("A10", 125e12), ("V100", 125e12), ("4090", 165e12), ("3090", 71e12))


def speed_report(config, images_per_second, device, unit="images"):
    """Throughput over all ranks, and what a rank makes of its device, for the log. unit: "images" or "clips".

    mfu, model FLOPs utilisation: `flops_per_image` times images/s of a rank, over the peak of its device in
    bf16, if that is known. It tells how much faster the same model could at best be trained there.
    """
    tflops = flops_per_image(config) * images_per_second / runtime.world_size() / 1e12
    report = {f"{unit}/s": images_per_second, "tokens/s": images_per_second * config.tokens, "tflops": tflops}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for words, peak in PEAK_FLOPS if re.search(rf"\b{words}\b", name)), None)
    return {**report, "mfu": tflops * 1e12 / peak} if peak else report


# ------------------------------------------------------------------------------------------------------------
# 3. Recipes and flags
# ------------------------------------------------------------------------------------------------------------

PUBLISHED = dict(lr=3e-4, length="300ep", warmup="6ep", lr_per_epoch=True, warmup_start=0.005,
                 constant_part=0.05, final_lr=0.1, global_batch_size=768)
RECIPES = {                                                              # what get_args takes as defaults
    "AR-B": PUBLISHED,
    "AR-L": PUBLISHED,
    "AR-XL": dict(PUBLISHED, lr=2.4e-4, length="350ep", warmup="7ep"),
    # Minutes on two cores: a large learning rate that decays to 0.
    "toy": dict(PUBLISHED, lr=3e-3, length="1500", warmup="50", lr_per_epoch=False, final_lr=0.0,
                global_batch_size=32),
}
MODEL_FLAGS = ("width", "heads", "inter_blocks", "intra_blocks", "ffn_multiple", "separate_heads",
               "token_dropout", "attention_dropout", "ffn_dropout", "label_dropout")      # of ARConfig


def get_args(argv=None):
    """Parse the command line. The preset chooses the defaults of what its recipe and its model fix."""
    first = runtime.ArgumentParser("", add_help=False)
    first.add_argument("--preset", choices=ar_model.PRESETS, default="toy", help="see below")
    preset = first.parse_known_args(argv)[0].preset

    parser = runtime.ArgumentParser(__doc__)
    count, count0, part = runtime.positive_int, runtime.non_negative_int, runtime.probability
    group = parser.add_argument_group("data and preset")
    group.add_argument("--preset", choices=ar_model.PRESETS, default="toy",
                       help="model and recipe: other defaults")
    group.add_argument("--tokenizer", help="tokenizer checkpoint, of images or clips, ours or published; not "
                                           "given: the newest of runs/tokenizer")
    group.add_argument("--raw-weights", action="store_true", help="not the tokenizer's averaged weights")
    group.add_argument("--data-path", help="folder of images, tar shards as in 'shards-{000..127}.tar', "
                                           "generated or generated-plain; for clips, what video.py takes; "
                                           "not given: what the tokenizer was trained on, with its "
                                           "--val-data-path, --resize and split lists")
    group.add_argument("--val-data-path", help="held-out images, if --data-path has no val/")
    group.add_argument("--split-list", help="of clips: official UCF-101 list of those to train on")
    group.add_argument("--val-split-list", help="of clips: official UCF-101 list of the held-out ones")
    group.add_argument("--val-size", type=count, default=5000, help="held-out images used, at most")
    group.add_argument("--image-size", type=count, help="side of the crops (the tokenizer's resolution)")
    group.add_argument("--resize", type=count, help="shorter side before the crop, for small crops of large "
                                                    "images (--image-size)")
    group.add_argument("--frames", type=count, help="of a clip (the tokenizer's)")
    group.add_argument("--unconditional", action="store_true", help="ignore the classes of the data set")
    group.add_argument("--tokens", help="file of stored tokens, made if there is none, those of held-out "
                                        "images beside it; not given: tokens.bin in --results-dir")
    group.add_argument("--ten-crop", action="store_true",
                       help="store ten crops of an image: corners and centre, and all of them mirrored; of a "
                            "video, ten clips: five from its first frame to its last, and mirrored")
    group.add_argument("--online", action="store_true",
                       help="store no tokens for training: encode random crops in every step")
    group.add_argument("--flip", action="store_true", help="with --online: mirror half of the images")
    group.add_argument("--token-precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                       help="autocast dtype of the tokenizer; other than fp32 flips bits of some codes")
    group.add_argument("--encode-batch-size", type=count,
                       help="crops encoded at once on a rank (64 of images, 16 of clips)")
    group.add_argument("--results-dir", default="runs/ar", help="for checkpoints, logs and pictures")

    group = parser.add_argument_group("model: sizes, dropouts and the baseline")
    group.add_argument("--split", type=count, nargs="+", metavar="BITS",
                       help="bits of each sub-token; they add up to the tokenizer's")
    group.add_argument("--width", type=count, help="width D")
    group.add_argument("--heads", type=count, help="attention heads")
    group.add_argument("--inter-blocks", type=count, help="blocks between tokens")
    group.add_argument("--intra-blocks", type=count0, help="blocks within a token")
    group.add_argument("--ffn-multiple", type=count, help="the feed-forward width is a multiple of this")
    group.add_argument("--separate-heads", action="store_true",
                       help="baseline: no intra blocks, sub-tokens that do not know of each other")
    group.add_argument("--token-dropout", type=part, help="dropout of the input sequence")
    group.add_argument("--attention-dropout", type=part, help="dropout of attention's output")
    group.add_argument("--ffn-dropout", type=part, help="dropout of the feed-forward network's output")
    group.add_argument("--label-dropout", type=part, help="part of the labels hidden, for guidance")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--length", type=runtime.duration, help="steps, or epochs as in 300ep")
    group.add_argument("--global-batch-size", type=count, help="images a step, over all ranks")
    group.add_argument("--accumulation", type=count, default=1, help="micro-batches a step")
    group.add_argument("--lr", type=runtime.non_negative_float, help="peak learning rate of AdamW")
    group.add_argument("--warmup", type=runtime.duration, help="linear warm-up: steps, or epochs as in 6ep")
    group.add_argument("--warmup-start", type=part, help="start of the warm-up, as a part of the peak")
    group.add_argument("--constant-part", type=part, help="part of the steps after it that have the peak")
    group.add_argument("--final-lr", type=part, help="end of the linear decay, as a part of the peak")
    group.add_argument("--lr-per-epoch", action=argparse.BooleanOptionalAction,
                       help="change the rate once an epoch, if --length and --warmup are in epochs")
    group.add_argument("--beta1", type=part, default=0.9, help="AdamW's beta1")
    group.add_argument("--beta2", type=part, default=0.95, help="AdamW's beta2")
    group.add_argument("--weight-decay", type=runtime.non_negative_float, default=0.05,
                       help="weight decay of matrices")
    group.add_argument("--max-grad-norm", type=runtime.non_negative_float, default=1.0,
                       help="clip gradients to this norm (0: do not)")
    group.add_argument("--ema-decay", type=part, default=0.0,
                       help="moving average of the weights, to validate and sample (0: none, as published)")

    group = parser.add_argument_group("speed and memory")
    group.add_argument("--mixed-precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                       help="autocast dtype of the transformer")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    group.add_argument("--activation-checkpointing", action="store_true",
                       help="recompute activations in backward")
    group.add_argument("--num-workers", type=count0, default=0, help="image loading processes a rank")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")

    group = parser.add_argument_group("run")
    group.add_argument("--global-seed", type=count0, default=0, help="weights, order, crops and dropout")
    group.add_argument("--resume", nargs="?", const="latest",
                       help="continue the newest checkpoint of --results-dir, if any, or the file named here")
    group.add_argument("--trust-checkpoint", action="store_true", help="unpickle classes (can run code)")
    group.add_argument("--log-every", type=count, default=50, help="steps between status lines")
    group.add_argument("--val-every", type=count, default=500, help="steps between validations")
    group.add_argument("--grid-every", type=count, default=500, help="steps between grids of samples")
    group.add_argument("--grid-size", type=count, default=40, help="samples in the grid")
    group.add_argument("--cfg-scale", type=sample.numbers(float), default=(2.0,),
                       help="guidance of the grid's samples")
    group.add_argument("--checkpoint-every", type=count, default=500, help="steps between checkpoints")
    group.add_argument("--keep", type=count, default=3, help="checkpoints kept")
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop")

    model = dataclasses.asdict(ar_model.PRESETS[preset])
    parser.set_defaults(**RECIPES[preset], **{name: model[name] for name in MODEL_FLAGS},
                        split=list(model["bits"]))
    return parser.parse_args(argv)


def config_from_args(args, tokenizer, axes, classes):
    """The `ARConfig` of the flags, for samples of `axes` in the codes of `tokenizer` and `classes`, names.

    Raises `UserError` that names both sides where they do not fit.
    """
    config = tokenizer.config
    bits, split = config.vocabulary.bit_length() - 1, " + ".join(map(str, args.split))
    runtime.require(config.vocabulary == 2 ** bits,
                    f"--tokenizer {args.tokenizer}: {config.vocabulary} codes are no power of 2, so they do "
                    f"not consist of bits; train one with another --codebook-size")
    runtime.require(sum(args.split) == bits,
                    f"--split: {split} are {sum(args.split)} bits, but a code of --tokenizer "
                    f"{args.tokenizer} has {bits}; give parts that add up to {bits}")
    return ar_model.ARConfig(bits=tuple(args.split), grid=config.grid(*axes), num_classes=len(classes),
                             **{name: getattr(args, name) for name in MODEL_FLAGS})


def build_datasets(args, tokenizer):
    """(data to train on, held-out data or None) for a tokenizer of images or clips.

    Fills in the sizes that `args` leave out. Raises `UserError` for flags that exclude each other, and for
    sizes that `tokenizer` cannot take.
    """
    config, clips = tokenizer.config, isinstance(tokenizer, video.VideoTokenizer)
    for one, other in (("online", "ten_crop"), ("online", "tokens"), *[("ten_crop", "resize")] * (not clips)):
        runtime.require(not (getattr(args, one) and getattr(args, other)),
                        f"--{one} and --{other} exclude each other; leave one of them out".replace("_", "-"))
    runtime.require(args.online or not args.flip, "--flip goes with --online; stored tokens have --ten-crop")
    for flag in ("frames", "split_list", "val_split_list"):
        runtime.require(clips or not getattr(args, flag), f"--{flag.replace('_', '-')} is for clips, but "
                        f"--tokenizer {args.tokenizer} is of images; leave it out")
    args.image_size = size = args.image_size or config.resolution
    runtime.require(size % config.downsampling == 0, f"--image-size {size} is no multiple of "
                    f"{config.downsampling}, the stride of --tokenizer {args.tokenizer}")
    crop, val_path = "random" if args.online else "center", args.val_data_path or args.data_path
    if not clips:
        dataset = data.build_dataset(args.data_path, "train", size, crop, args.flip, resize=args.resize)
        held_out = data.build_dataset(val_path, "val", size, resize=args.resize)
    else:
        args.frames = args.frames or config.frames
        runtime.require(args.frames % config.time_stride == 1 % config.time_stride,
                        f"--frames {args.frames}: must be 1 + a multiple of {config.time_stride}, the stride "
                        f"in time of --tokenizer {args.tokenizer}")
        video.check_split_lists(args)
        dataset = data.build_clips(args.data_path, "train", size, args.frames, crop, args.flip,
                                   resize=args.resize, split_list=args.split_list)
        held_out = data.build_clips(val_path, "val", size, args.frames, resize=args.resize,
                                    split_list=args.val_split_list)
        runtime.require(not (args.ten_crop and isinstance(dataset, data.GeneratedClips)), "--ten-crop: "
                        "mirrored, a generated clip that moves left is one that moves right; leave it out")
    generated = isinstance(dataset, (data.Generated, data.GeneratedClips))
    if held_out.name == dataset.name and not generated and not args.split_list:
        runtime.print_main(f"no validation: {dataset.name} has no held-out part, such as val/ or test/, and "
                           f"there is no --val-data-path")
        held_out = None
    runtime.require(held_out is None or held_out.classes == dataset.classes,
                    f"--val-data-path {held_out and held_out.name} has other classes than {dataset.name}")
    return dataset, held_out


# ------------------------------------------------------------------------------------------------------------
# 4. The training loop
# ------------------------------------------------------------------------------------------------------------

def main(args):
    """Train an AR model on images as `args` (from `get_args`) say."""
    device = runtime.setup_process_group(args.device)
    args.tokenizer = str(args.tokenizer or runtime.latest_checkpoint("runs/tokenizer", "tokenizer"))
    tokenizer, info = video.load_any_tokenizer(args.tokenizer, not args.raw_weights,
                                               args.trust_checkpoint)
    made_with = {"path": args.tokenizer, **{key: info[key] for key in ("sha256", "weights", "preset")}}
    if args.data_path is None:
        args.data_path, args.val_data_path = info["data_path"], args.val_data_path or info["val_data_path"]
        if not (args.ten_crop and tokenizer.unit == "images"):           # ten crops bring their own resizing
            args.resize = args.resize or info["resize"]
        if not args.split_list and not args.val_split_list:
            args.split_list, args.val_split_list = info["split_list"], info["val_split_list"]
    args.encode_batch_size = args.encode_batch_size or {"images": 64, "clips": 16}[tokenizer.unit]
    dataset, held_out = build_datasets(args, tokenizer)
    classes = [] if args.unconditional else dataset.classes
    config = config_from_args(args, tokenizer, dataset.axes, classes)
    steps_per_epoch = len(dataset) // args.global_batch_size
    runtime.require(steps_per_epoch > 0,
                    f"--global-batch-size {args.global_batch_size} is larger than the data set "
                    f"({len(dataset)} {dataset.kind}s in {dataset.name}); lower it")
    resume_from = runtime.resume_path(args)
    print_plan(args, config, made_with, dataset, held_out, steps_per_epoch, device)
    if args.dry_run:
        return

    tokenizer = tokenizer.to(device).requires_grad_(False)
    # With the tokenizer inside, one file is enough to make pictures, as with the published ones.
    origin = {"classes": classes, "tokenizer": made_with,
              "dataset": {"name": dataset.name, "length": len(dataset), "fingerprint": fingerprint(dataset)},
              "first_stage": {"format": tokenizer.format, "config": tok.config_to_dict(tokenizer.config),
                              "model": {name: t.cpu() for name, t in tokenizer.state_dict().items()}}}
    path = pathlib.Path(args.tokens or pathlib.Path(args.results_dir) / "tokens.bin")
    if held_out is not None:
        held_out = stored_tokens(path.with_name(f"{path.stem}-val.bin"), held_out, tokenizer, made_with, args,
                                 device, limit=args.val_size)
    if not args.online:
        dataset = stored_tokens(path, dataset, tokenizer, made_with, args, device, args.ten_crop)
    train(args, device, config, tokenizer, dataset, held_out, steps_per_epoch, origin, resume_from)


def train(args, device, config, tokenizer, dataset, held_out, steps_per_epoch, origin, resume_from):
    """The loop of stage II. dataset: `Tokens`, or images to encode; held_out: `Tokens` or None."""
    world, rank, M = runtime.world_size(), runtime.rank(), len(config.bits)
    pixels = args.image_size ** 2 * (args.frames or 1)                   # of a sample
    length, warmup = (runtime.to_steps(text, steps_per_epoch) for text in (args.length, args.warmup))
    stair = steps_per_epoch if rate_is_per_epoch(args) else 1            # steps that share a learning rate

    torch.manual_seed(args.global_seed)                                  # equal initial weights on every rank
    with device:
        model = ar_model.ARModel(config)
    model.checkpointing = args.activation_checkpointing
    if args.compile:
        # Block by block: one small graph serves all layers, while the whole model would compile for minutes.
        for block in [*model.inter_blocks, *model.intra_blocks]:
            block.compile(dynamic=False)
    ddp_model = runtime.distributed(model, device)
    torch.manual_seed(int(data.hash64(args.global_seed, rank)[0] >> np.uint64(1)))   # a rank's own dropout

    def prepare(x, labels, _):
        """A batch of codes or images, and labels, to sub-tokens M x (B, N) and labels (B,) on the device."""
        if x.dtype == torch.uint8:
            ids = encode(tokenizer, x, device, args.token_precision)                      # (B, N)
        else:
            ids = x.to(device, non_blocking=True)
        labels = labels.to(device) if config.num_classes else torch.zeros_like(labels, device=device)
        return tok.ids_to_subtokens(ids, config.bits), labels

    # ---- everything that the loop changes, and that a checkpoint must therefore hold ----
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), args.lr,
                                  (args.beta1, args.beta2), fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    averages = {name: p.detach().clone() for name, p in model.named_parameters()} if args.ema_decay else {}
    meters, skipped, in_a_row, step = runtime.Meters(), 0, 0, 0

    if resume_from:
        saved = runtime.load_checkpoint(resume_from, args.trust_checkpoint)
        check_resumable(saved, args, config, origin, resume_from)
        step, skipped, in_a_row = saved["step"], saved["skipped"], saved["in_a_row"]
        runtime.load_state_strictly(model, saved["model"], resume_from)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        for name, average in averages.items():
            average.copy_(saved["ema"][name])
        if len(saved["meters"]) == world:
            meters.sums = saved["meters"][rank]
        runtime.restore_rng_state(saved["rng"])
        runtime.print_main(f"resumed {resume_from} at step {step}")
        del saved

    workers = args.num_workers if args.online else 0                     # stored codes take microseconds
    loader = iter(data.train_loader(dataset, args.global_batch_size, args.global_seed, step, rank, world,
                                    args.accumulation, workers))
    logger = runtime.Logger(args.results_dir, length, step)
    stop, window_start = runtime.StopRequest(), (time.perf_counter(), step)

    while step < length:
        lr = args.lr * learning_rate_factor(step // stair, length // stair, warmup // stair,
                                            args.warmup_start, args.constant_part, args.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        values = {}
        for micro in range(args.accumulation):
            subtokens, labels = prepare(*next(loader))                   # M x (B, N), (B,)
            with runtime.last_sync(ddp_model, micro, args), runtime.autocast(device, args.mixed_precision):
                loss, terms = ddp_model(subtokens, labels, return_loss=True)              # scalar, (M,)
                scaler.scale(loss / args.accumulation).backward()
            for name, value in (*((f"loss/{m + 1}", terms[m]) for m in range(M)), ("loss", loss)):
                runtime.add(values, name, value, 1 / args.accumulation)
        guilty, numbers = runtime.apply_gradients("model", values, list(model.parameters()), optimizer,
                                                  scaler, args.max_grad_norm)

        # ---- averages and counters; a step that was not finite has changed nothing ----
        step += 1
        if guilty:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            runtime.skip_or_stop(step, guilty, in_a_row, args.results_dir)
        else:
            in_a_row = 0
            meters.update(numbers)
            if averages:
                decay = min(args.ema_decay, step / (step + 9))           # follows faster in the first steps
                parameters = [p.detach() for p in model.parameters()]
                torch._foreach_lerp_(list(averages.values()), parameters, 1 - decay)

        # ---- logs, validation, pictures, checkpoints ----
        signal, last, pause = stop.agreed(), step == length, time.perf_counter()
        if step % args.log_every == 0 or last:
            images_per_second = args.global_batch_size * (step - window_start[1]) / (pause - window_start[0])
            window_start = pause, step
            log = {**in_bits(meters.pop(), config, pixels), "lr": lr, "skipped_steps": skipped,
                   "epoch": step / steps_per_epoch,
                   **speed_report(config, images_per_second, device, tokenizer.unit)}
            logger.log(step, log, show=("loss", *(f"bits/{m + 1}" for m in range(M)), "bits_per_pixel",
                                        "grad_norm/model", "lr", f"{tokenizer.unit}/s", "tokens/s", "mfu"))
        with runtime.averaged_weights(model, averages) if averages else contextlib.nullcontext():
            if held_out and (step % args.val_every == 0 or last):
                log = in_bits(validate(model, held_out, prepare, args, device), config, pixels)
                logger.log(step, {f"val_{name}": value for name, value in log.items()},
                           show=("val_loss", "val_perplexity", "val_bits_per_pixel"))
            if step % args.grid_every == 0 or last:
                preview(step, logger, model, tokenizer, origin["classes"], args)
        if step % args.checkpoint_every == 0 or last or signal:
            state = {
                "format": ar_model.FORMAT,
                "preset": args.preset,
                "config": dataclasses.asdict(config),
                "step": step,
                "model": model.state_dict(),
                "ema": averages,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "meters": runtime.gather_objects(meters.sums),
                "skipped": skipped,
                "in_a_row": in_a_row,
                "rng": runtime.rng_states(),
                **origin,
                "args": vars(args),
            }
            if runtime.is_main():
                runtime.save_checkpoint(runtime.checkpoint_path(args.results_dir, step), state)
                runtime.prune_checkpoints(args.results_dir, args.keep)
            runtime.barrier()
        if signal:
            runtime.print_main(f"stopped by signal {signal} after step {step}; --resume continues from here")
            break
        window_start = window_start[0] + time.perf_counter() - pause, window_start[1]     # speed of training
    stop.close()
    logger.close()
    runtime.print_main(f"AR model at step {step}: {runtime.checkpoint_path(args.results_dir, step)}")


def in_bits(numbers, config, pixels):
    """`numbers` and, where there is a loss among them, what it says in other units.

    bits and bits/m: of a token and of its sub-tokens; perplexity: the number of equally likely codes between
    which one hesitates as much; bits_per_pixel: what the tokens of a sample of `pixels` could be compressed
    to.
    """
    report = dict(numbers)
    if "loss" in numbers:                                                # not if all steps were skipped
        report.update({name.replace("loss", "bits"): value / math.log(2)
                       for name, value in numbers.items() if name.startswith("loss")})
        report["perplexity"] = math.exp(min(numbers["loss"], 700))
        report["bits_per_pixel"] = report["bits"] * config.tokens / pixels
    return report


@torch.no_grad()
def validate(model, held_out, prepare, args, device):
    """The mean losses over all `held_out` tokens, without dropout: {"loss": nats, ..}. A collective."""
    M, batch_size = len(model.config.bits), runtime.micro_batch_size(args)
    sums = torch.zeros(M + 1, dtype=torch.float64, device=device)        # of the terms, and of the images
    model.eval()
    for batch in data.eval_loader(held_out, batch_size, runtime.rank(), runtime.world_size()):
        subtokens, labels = prepare(*batch)
        with runtime.autocast(device, args.mixed_precision):
            _, terms = model(subtokens, labels, return_loss=True)
        sums += len(labels) * torch.cat([terms.double(), sums.new_ones(1)])
    model.train()
    sums = runtime.all_reduce_sum(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    return {"loss": sum(means), **{f"loss/{m + 1}": mean for m, mean in enumerate(means)}}


def preview(step, logger, model, tokenizer, classes, args):
    """Log a grid of samples: a column for each of up to ten classes, always drawn from the same seeds."""
    columns = min(10, len(classes) or 10, args.grid_size)
    count = args.grid_size // columns * columns
    labels = [i % columns * len(classes) // columns for i in range(count)]
    scale = args.cfg_scale if classes else 1.0                           # no class, nothing to guide towards
    seeds = [(args.global_seed, i) for i in range(count)]
    batches = sample.generate(model, tokenizer, labels, seeds, min(count, 64), cfg_scale=scale)
    samples = torch.cat(list(batches))                                   # (count, 3, [T,] S, S)
    captions = [classes[label] for label in labels] if classes else None
    scale = max(1, 64 // samples.shape[-1])
    if samples.dim() == 4:
        logger.image(step, "samples", runtime.image_grid(samples, columns, captions, scale))
    else:                                                                # frames of the first row; all moving
        logger.image(step, "samples", video.strip(samples[:columns], labels=captions, scale=scale))
        video.save_animation(pathlib.Path(args.results_dir) / f"samples-{step:08d}.webp",
                             video.animated_grid(samples, columns, captions, scale))


def print_plan(args, config, made_with, dataset, held_out, steps_per_epoch, device):
    """Say what is about to happen, before anything takes time."""
    with torch.device("meta"):                                           # shapes without memory
        parameters = sum(p.numel() for p in ar_model.ARModel(config).parameters()) / 1e6
    length, warmup = (runtime.to_steps(text, steps_per_epoch) for text in (args.length, args.warmup))
    micro_batch, batch = runtime.micro_batch_size(args), args.global_batch_size
    intra = "separate heads" if config.separate_heads else f"{config.intra_blocks} intra blocks"
    crops = "encoded in every step" if args.online else "ten crops" if args.ten_crop else "centre crop"
    val = min(len(held_out), args.val_size) if held_out is not None else 0
    sides = " x ".join(map(str, dataset.axes))
    grid, bits = " x ".join(map(str, config.grid)), " + ".join(map(str, config.bits))
    runtime.print_facts(
        ("model", f"{args.preset}: {parameters:.2f} M parameters, width {config.width}, "
                  f"{config.inter_blocks} inter blocks, {intra}, {config.num_classes or 'no'} classes"),
        ("tokens", f"{grid} of {bits} bits, by {made_with['path']} ({made_with['weights']} weights)"),
        ("data", f"{dataset.name}, {len(dataset):,} {dataset.kind}s, {sides}, {crops}, {val:,} held out"),
        ("batch", f"{batch} = {batch // micro_batch // args.accumulation} ranks x {args.accumulation} "
                  f"micro-batches x {micro_batch}"),
        ("a step", f"{batch * config.tokens:,} tokens, {batch * flops_per_image(config) / 1e12:.3g} TFLOP"),
        ("length", f"{length:,} steps = {length / steps_per_epoch:.1f} epochs"),
        ("lr", f"{args.lr:g}, warm-up {warmup:,} steps, changing every "
               f"{'epoch' if rate_is_per_epoch(args) else 'step'}"),
        ("running", f"{device}, {args.mixed_precision}{', compiled' * args.compile}"),
        ("results", args.results_dir),
    )


def check_resumable(saved, args, config, origin, source):
    """Raise `UserError` unless the checkpoint `saved` belongs to this model, tokenizer, data and order."""
    runtime.require(saved.get("format") == ar_model.FORMAT and "optimizer" in saved,
                    f"--resume {source}: not a training checkpoint of this script")
    runtime.check_same(saved["config"], dataclasses.asdict(config), f"--resume {source}: the model")
    theirs, ours = saved["tokenizer"], origin["tokenizer"]
    runtime.require(theirs["sha256"] == ours["sha256"],
                    f"--resume {source} was trained on tokens of {theirs['path']} (sha256 "
                    f"{theirs['sha256'][:12]}), not of --tokenizer {ours['path']} (sha256 "
                    f"{ours['sha256'][:12]}); give that one, or choose another --results-dir")
    runtime.check_same(saved["dataset"], origin["dataset"], f"--resume {source}: the data set",
                       ignore=("name",))
    fixed = ("global_batch_size", "global_seed", "mixed_precision", "online", "ten_crop", "flip",
             "weight_decay", "beta1", "beta2")                           # the last ones are the optimizer's
    runtime.check_flags(saved["args"], args, fixed, source)
    runtime.require(bool(saved["ema"]) == (args.ema_decay > 0),
                    f"--resume {source}: --ema-decay cannot be switched on or off in the middle of a run")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
