"""Measuring: how faithful is a tokenizer, how good are generated samples, and the paper's tables.

A number without its protocol is no result. Most disputes over "your FID" are about the resize rule, the
reference set, the rounding or the number of images, so all of these are printed beside each number and stored
in a JSON. Where the official scripts have a quirk, there are two protocols:

    clean      what one would do today: pixels rounded to uint8 as an image file holds them, means over images
    official   what produced the published numbers, quirks included

    python evaluate.py                                       # what the earlier stages left in runs/
    python evaluate.py reconstruction --ckpt in1k-256 --data-path imagenet --metrics all --protocol official
    python evaluate.py reconstruction --ckpt pt-256-2^18 --data-path coco --original-resolution
    python evaluate.py reconstruction --ckpt ucf-128 --data-path ucf101 --metrics all --protocol official
    python evaluate.py generation --metrics tokens           # downloads nothing
    python evaluate.py generation --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc-per-node=8 evaluate.py generation --ckpt AR-B --data-path imagenet
    python evaluate.py make-reference --data-path imagenet --image-size 256
    python evaluate.py table 4 --imagenet imagenet

Images and clips go the same way: an image is a clip of one frame. Results of any number of ranks agree to 12
digits. Some metrics need networks to be downloaded; --allow-random-weights tries the machinery out without,
and marks what it prints as not comparable. metrics.py explains the metrics. Axis letters: B samples of a
batch, N of a set, T frames, H W their size, D features, V codes.
"""
import argparse
import collections
import contextlib
import datetime
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from tqdm import tqdm

import sample
from support import checkpoints, data, metrics, pictures, runtime, sources
from support.checkpoints import RANDOM_LABEL
from support.runtime import require

# ---- 1. The metrics, and the record of a measurement -------------------------------------------------------


# All that is known of a metric. measure: a function of uint8 originals and reconstructions, or a network's
# name; measured_on: with facts of a run. A new one of images is a function in metrics.py and a row here.
Metric = collections.namedtuple("Metric", "name measure format measured_on")
METRICS = {
    "psnr": Metric("PSNR (dB)", metrics.psnr, "{:.2f}", "{pixels}, {mean}"),
    "ssim": Metric("SSIM", metrics.ssim, "{:.4f}", "{pixels}, {mean}, 7 x 7 windows"),
    "lpips-vgg": Metric("LPIPS (VGG)", "lpips-vgg", "{:.4f}", "{floats}, mean over all"),
    "lpips-alex": Metric("LPIPS (Alex)", "lpips-alex", "{:.4f}", "{floats}, mean over all"),
    "usage": Metric("codebook usage", None, "{:.2%}", "{tokens} tokens of {codes}, {over}"),
    "perplexity": Metric("perplexity", None, "{:.1f}", "at most {codes}"),
    "bits_per_pixel": Metric("bits per pixel", None, "{:.4f}", "{bits:g} bits a token"),
    "rfid": Metric("rFID", "inception", "{:.3f}", "{floats}, {resize_rule} to 299, {n} images"),
    "rfid-reference": Metric("FID of reconstructions against {reference}", "inception", "{:.3f}",
                             "{pixels}, resize tf1, {n} images"),
    "rfvd": Metric("rFVD", "i3d", "{:.2f}", "{pixels}, {n} clips of {frames} frames, float64"),
    "rfvd-float32": Metric("rFVD, float32", "i3d", "{:.2f}", "the same with the official script's roundings"),
    "fid": Metric("FID", "inception", "{:.3f}", "{n} samples, {real} images, resize tf1"),
    "sfid": Metric("sFID", "inception", "{:.3f}", "{n} samples, {real} images, resize tf1"),
    "inception_score": Metric("Inception Score", "inception", "{:.2f}", "blocks of 5,000: {blocks}, {order}"),
    "precision": Metric("precision", "inception", "{:.4f}", "{n} samples, {near} images, k = 3, {digits}"),
    "recall": Metric("recall", "inception", "{:.4f}", "{n} samples, {near} images, k = 3, {digits}"),
    "kid": Metric("KID", "inception", "{:.5f}", "{n} samples, {near} images, {subsets}"),
    "mind": Metric("MIND", "inception", "{:.3f}", "{pairs} samples and as many images, 1,000 directions"),
    "fvd": Metric("FVD", "i3d", "{:.2f}", "{n} samples, {real} clips of {frames} frames, float64"),
    "fvd-float32": Metric("FVD, float32", "i3d", "{:.2f}", "the same with the official script's roundings"),
    "tokens": Metric("token distance", None, "{:.4f}", "{each} samples and as many {kind}s, {tokens} tokens"),
    "tokens-real": Metric("the same if real", None, "{:.4f}", "other {kind}s in place of samples: the bias")}
OF_SETS = {"inception": (2048, 2023), "i3d": (400,)}                  # networks of sets: D of their features
OF_SAMPLES = [key for key, metric in METRICS.items() if metric.measure and metric.measure not in OF_SETS]
OF_RECONSTRUCTIONS = (*OF_SAMPLES, "usage", "rfid", "rfvd")           # for --metrics; usage brings two others
OF_IMAGES = ("fid", "sfid", "inception_score", "precision", "recall", "kid", "mind")        # of samples
OF_FEATURES = {"precision", "recall", "kid", "mind"}                  # moments do not suffice for these
FRECHET = ("rfid", "rfid-reference", "rfvd", "fid", "sfid", "fvd")
SMALLEST = {"ssim": 7, "lpips-vgg": 32, "lpips-alex": 32, "rfvd": 9, "fvd": 9}     # pixels a side, or frames


def load_network(name, args):
    """The network of a metric, with its `name` and its `source`: what its weights are."""
    eps = 1e-5 if args.protocol == "official" else 1e-3    # of I3D: in the official script's port, or in TF
    network, source = checkpoints.load_network(name, args.weights_dir, args.allow_random_weights, eps)
    network.name = name
    network.source = source
    return network.to(args.device)


def check_size(axes, what, args):
    """Raise `UserError` unless images or clips `what`, of these axes ([T,] H, W), suffice for --metrics."""
    for key, least in SMALLEST.items():
        size, unit = (axes[0], "frames") if "fvd" in key else (min(axes[-2:]), "pixels a side")
        require(key not in args.metrics or size >= least, f"{what}: --metrics {key} needs {least} {unit} or "
                f"more, not {size}; leave one or the other out")


def plan(subject, args, **record):
    """(path, content so far) of the JSON about `subject`, a path: other settings, other names."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    record = {"command": args.command, "protocol": args.protocol, **record, "arguments": vars(args),
              "versions": versions}
    name = re.sub(r"[^\w.^-]", "_", pathlib.Path(os.path.abspath(subject)).stem, flags=re.ASCII)[:80]
    return pathlib.Path(args.output, f"{args.command}-{name}-{short_hash(record)}.json"), record


def report(path, values, facts, record):
    """Print `values` {metric: number} and write them to `path` with their `record`. Rank 0 only.

    facts: what fills in the registry's texts."""
    entries = {}
    rows = []
    for key in [key for key in METRICS if key in values]:
        metric = METRICS[key]
        label = RANDOM_LABEL if record["networks"].get(metric.measure) == RANDOM_LABEL else ""
        note = metric.measured_on.format(**facts)
        rows.append([metric.name.format(**facts), metric.format.format(values[key]), note, label])
        value = values[key] if math.isfinite(values[key]) else str(values[key])
        entries[key] = {"value": value, "measured_on": note, "label": label}
        if key in FRECHET and facts["n"] < 2 * OF_SETS[metric.measure][0]:
            print(f"warning: {rows[-1][0]} of {facts['n']} samples is biased upwards (it wants two for each "
                  f"of {OF_SETS[metric.measure][0]} features); compare it only with that of equally many")
    print()
    runtime.print_table(rows, ["metric", "value", "measured on", ""])
    record["date"] = datetime.datetime.now().isoformat()
    runtime.write_json(path, {"metrics": entries, "n": facts["n"], **record})
    print(f"\nwritten to {path}")


def short_hash(value):
    """Eight hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


# ---- 2. Sets of samples, and their statistics --------------------------------------------------------------

def read_npz(path):
    """{name: array} of an npz file, mapped into memory if stored as np.savez does: samples may have 10 GB."""
    require(pathlib.Path(path).is_file(), f"{path} does not exist; check the path (or try make-reference)")
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for entry in archive.infolist():
                array = None
                file.seek(entry.header_offset + 26)                    # lengths of name and extra field
                file.seek(int(np.frombuffer(file.read(4), "<u2").sum()), os.SEEK_CUR)
                if entry.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(file) == (1, 0):
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                    if not (fortran or dtype.hasobject or 0 in shape):
                        array = np.memmap(path, dtype, "r", file.tell(), shape)
                if array is None:
                    array = np.lib.format.read_array(archive.open(entry))
                arrays[entry.filename.removesuffix(".npy")] = array
        if "settings" in arrays:                                       # of `real_statistics`
            arrays["settings"] = dict(json.loads(str(arrays["settings"])))
    except (zipfile.BadZipFile, EOFError, ValueError, TypeError) as error:
        raise runtime.UserError(f"{path} is truncated or no npz file ({error}); copy it again") from None
    return arrays


def images_of(arrays, path):
    """arr_0 of the `arrays` in an npz file, ADM's format: uint8 (N, H, W, 3), for clips (N, T, H, W, 3)."""
    require("arr_0" in arrays, f"{path} holds no array arr_0 of images, only {', '.join(arrays)}; statistics "
            f"alone do not tell by which network and resize rule they were made")
    array = arrays["arr_0"]
    shape = list(array.shape)
    require(array.dtype == np.uint8, f"{path}: arr_0 is {array.dtype}, expected uint8; convert floats in "
            f"[0, 1] with (x * 255).round().astype('uint8')")
    hint = "; use arr_0.transpose(0, 2, 3, 1)" if len(shape) == 4 and shape[1] == 3 else ""
    require(len(shape) in (4, 5) and shape[-1] == 3,
            f"{path}: arr_0 has the shape {shape}, not (N, H, W, 3) or (N, T, H, W, 3){hint}")
    return array


def batches_of(samples, order, args, title):
    """This rank's batches of samples[order], a data set or array: (uint8 (B, 3, [T,] H, W), how many count,
    their indices). All of one shape, the last filled up by repetition, as convolutions of other shapes add in
    another order: a sample's numbers have the same last bits on any number of ranks."""
    size = args.batch_size
    batches = data.eval_batches(samples, order, size, args.num_workers)
    total = len(batches)
    if isinstance(samples, np.ndarray):
        batches = ((torch.from_numpy(samples[part]).movedim(-1, 1), None, torch.tensor(part))
                   for part in batches.parts)
    silent = None if runtime.is_main() else True
    for x, _, indices in tqdm(batches, title, total, unit="batch", disable=silent):
        yield torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]), len(x), indices


def gathered(parts):
    """All ranks' `parts`, dicts of tensors (n, ...), joined, and sorted by their "index": {name: tensor
    (N, ...)} on rank 0, elsewhere empty. A collective."""
    every = [None] * runtime.world_size() if runtime.is_main() else None
    dist.gather_object(parts, every)
    parts = [part for each in every or () for part in each]
    joined = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    return {name: tensor[joined["index"].argsort(stable=True)] for name, tensor in joined.items()}


class FeatureStream:
    """Sends samples through the network of a metric of sets, and keeps what distances of sets need.

    kept: of which indices to keep features and logits; images: and the images themselves."""

    def __init__(self, network, kept=(), rule="tf1", images=False):
        self.network = network
        self.device = next(network.parameters()).device
        self.kept = kept
        self.rule = rule                                               # of `metrics.inception_input`
        self.moments = [metrics.Moments(D, self.device) for D in OF_SETS[network.name]]    # [1]: for sFID
        self.images = images
        self.parts = []

    @torch.no_grad()
    def add(self, samples, n, indices):
        """Count in the first n samples: uint8 images or clips, or for rule half-pixel floats in [0, 1]."""
        inputs = samples.to(self.device)
        if self.network.name == "inception":
            outputs = self.network(metrics.inception_input(inputs, self.rule))
        else:                                                          # four at a time: clips are large
            outputs = [torch.cat([self.network(metrics.i3d_input(clips)) for clips in inputs.split(4)])]
        for moments, output in zip(self.moments, outputs):
            moments.add(output[:n])
        found = {"index": indices, "features": outputs[0], "logits": outputs[-1]}
        if self.images:
            found["arr_0"] = samples.movedim(1, -1)
        kept = torch.tensor([index in self.kept for index in indices.tolist()])
        self.parts.append({name: each[:n].cpu()[kept] for name, each in found.items()})

    def finish(self):
        """{name: array} on rank 0, under ADM's names, elsewhere None: n, mean and covariance of features (mu,
        sigma) and of spatial features (mu_s, sigma_s), and what was kept. A collective."""
        arrays = {name: tensor.numpy() for name, tensor in gathered(self.parts).items()}
        for suffix, moments in zip(("", "_s"), self.moments):
            moments.n = int(runtime.all_reduce_sum(torch.tensor(moments.n)))
            moments.total = runtime.all_reduce_sum(moments.total)
            moments.outer = runtime.all_reduce_sum(moments.outer)
            if runtime.is_main():
                arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = moments.mean_and_covariance()
        return {"n": self.moments[0].n, **arrays} if runtime.is_main() else None

    def run(self, samples, order, args, title):
        """Send all of samples[order] through it, and `finish`. A collective."""
        for x, n, indices in batches_of(samples, order, args, title):
            if self.rule != "tf1":                                     # as reconstructions are shown to it
                x = shown(pictures.to_float(x.to(self.device)), self.network, args)
            self.add(x, n, indices)
        if isinstance(samples, sources.Samples):
            samples.raise_if_broken(all_ranks=True)
        return self.finish()


def shown(x, network, args):
    """What a network of sets sees of x in [-1, 1]: uint8; officially truncated, or for rFID floats 0 .. 1."""
    if args.protocol == "official" and network.name == "inception":
        return (x + 1) / 2
    return pictures.to_uint8(x, truncate=args.protocol == "official")


def distances(keys, reference, made, args):
    """{key of FRECHET: distance of two sets}, which are given as by `FeatureStream.finish`."""
    values = {}
    for key in keys:
        names = ("mu_s", "sigma_s") if key == "sfid" else ("mu", "sigma")
        statistics = [arrays[name] for arrays in (reference, made) for name in names]
        values[key] = metrics.frechet_distance(*statistics)
        if METRICS[key].measure == "i3d" and args.protocol == "official":
            features = [torch.tensor(arrays["features"]) for arrays in (reference, made)]
            values[f"{key}-float32"] = metrics.frechet_distance_official(*features)
    return values


# ---- 3. Reconstruction: what a sample loses on its way through the tokens (tables 3, 4 and 6) --------------

def reconstruction(args):
    """Judge a tokenizer, of images or of clips, by its reconstructions."""
    path = args.ckpt or runtime.latest_checkpoint("runs/tokenizer", "tokenizer checkpoint")
    model, info = checkpoints.load_tokenizer(path, not args.raw_weights, args.trust_checkpoint)
    samples, order, about = held_out(model.config, info["trained_on"], args)
    size = about["size"]
    other = "rfid" if about["frames"] else "rfvd"
    require(other not in args.metrics, f"--metrics {other} is not for a tokenizer of {samples.kind}s")
    possible = [key for key in OF_RECONSTRUCTIONS if key != other]
    if "all" in args.metrics:
        args.metrics = possible
    if args.reference:
        require(size != "original" and not about["frames"], "--reference is for images of one size")
        args.metrics = [*args.metrics, "rfid-reference"]
    if size != "original":
        check_size(samples.axes, f"size {size} of {path}", args)
    needed = {METRICS[key].measure for key in args.metrics if isinstance(METRICS[key].measure, str)}
    networks = {name: load_network(name, args) for name in sorted(needed)}
    # Clean departs from the official resize rule only where a side exceeds Inception's 299 pixels.
    antialias = args.protocol == "clean" and (size == "original" or size > 299)
    info["sha256"] = runtime.on_main(checkpoints.weights_hash, model)
    learned = has_learned(samples, info["trained_on"], args)
    part = f"training {samples.kind}s" if learned else f"{args.split} split"
    output, record = plan(path, args, checkpoint=info, data=about, part=part,
                          networks={name: network.source for name, network in networks.items()},
                          resize_rule="half-pixel-antialiased" if antialias else "half-pixel")
    runtime.print_facts(
        ("model", f"{path}: {info['preset']}, {info['weights']} weights"),
        ("data", f"{len(order)} {samples.kind}s of {samples.name}, {part}, size {size}"),
        ("protocol", f"{args.protocol}, tokenizer in {args.mixed_precision}, metrics in fp32, "
                     f"{runtime.world_size()} x {args.device}"))
    if left_out := [key for key in possible if key not in args.metrics]:
        runtime.print_main(f"left out {', '.join(left_out)}; add --metrics all (networks are downloaded)")
    found = measure(model.to(args.device), samples, order, networks, record, args)
    if runtime.is_main():
        summarise(found, output, record, args)


def has_learned(samples, trained_on, args):
    """Whether a tokenizer was trained on `samples`: its train/, or a data set that is not parted at all."""
    path = os.path.expanduser(trained_on["data_path"] or os.devnull)   # which of a published one is not known
    folders = [os.path.realpath(os.path.join(path, part)) for part in ("", "train")]
    named = isinstance(samples, (sources.Folder, sources.TarShards))         # names say which part
    return (os.path.realpath(samples.name) in folders and args.split_list == trained_on["split_list"]
            and (named or args.split == "train"))


def held_out(config, trained_on, args):
    """(data set, indices, record): samples that a tokenizer has not seen, of what it has learned from.

    Protocol official, for clips: the training split, random crops, filled up to 10,000 with randomly chosen
    ones of the same (463 of UCF-101's 9,537), as in the script that the published rFVD of 16 came from."""
    frames = getattr(config, "frames", None)
    require(not (frames and args.original_resolution), "--original-resolution is for tokenizers of images")
    seen = args.protocol == "official" and frames is not None
    if args.data_path is None and args.split_list is None:
        prefix = "" if seen or not trained_on["val_data_path"] else "val_"
        args.data_path = trained_on[f"{prefix}data_path"]
        args.split_list = trained_on["split_list" if seen else "val_split_list"]
        args.resize = args.resize or trained_on["resize"]
    args.split = args.split or ("train" if seen else "val")
    args.batch_size = args.batch_size or (4 if frames else 16)
    crop = "random" if seen else "center"
    if args.original_resolution:
        args.batch_size = 1
        crop = "original"
    size = args.image_size or config.resolution
    view = data.View(size, frames, crop, resize=args.resize, seed=args.global_seed, start="center")
    samples = sources.build_dataset(args.data_path, args.split, view, args.split_list)
    order = data.evenly_spaced(10_000 if seen else None, len(samples))
    if seen:
        shuffled = np.random.default_rng(args.global_seed).permutation(len(samples)).tolist()
        order += shuffled[:10_000 - len(order)]
    order = [order[k] for k in data.evenly_spaced(args.max_samples, len(order))]
    fingerprint = runtime.on_main(data.fingerprint, samples, order)
    return samples, order, {"path": args.data_path, "name": samples.name, "split": args.split, "crop": crop,
                            "resize": args.resize, "size": "original" if args.original_resolution else size,
                            "frames": frames, "n": len(order), "fingerprint": fingerprint}


def reconstruct(model, x, args):
    """x (B, 3, [T,] H, W) in [-1, 1] through the tokens: (reconstructions as x, ids (B, [t,] h, w)).

    At their original resolution images are padded with 0, mid-grey, to whole tokens, and cropped again."""
    multiple = 1
    if args.original_resolution:                           # officially 16 whatever the stride is
        multiple = math.lcm(16 if args.protocol == "official" else 1, model.config.downsampling)
    height, width = x.shape[-2:]
    top = -height % multiple // 2
    left = -width % multiple // 2
    padded = F.pad(x, (left, -width % multiple - left, top, -height % multiple - top))
    with runtime.autocast(x.device, args.mixed_precision):
        ids = model.encode(padded)
        y = model.decode(ids)[..., top:top + height, left:left + width].float()
    require(bool(y.isfinite().all()), f"the tokenizer's output is not finite with --mixed-precision "
                                      f"{args.mixed_precision}; use bf16 or fp32")
    return y.clamp(-1, 1), ids


@torch.no_grad()
def measure(model, samples, order, networks, record, args):
    """The measuring loop: every sample goes through the tokenizer once and is seen by every metric.

    Returns on rank 0 {metric: its value for each sample (N,), or of the set}, the samples' "pixels" (N,), the
    "counts" of codes as of `Quantizer.count`, and "examples", {index: uint8 original and reconstruction}. A
    collective."""
    official = args.protocol == "official"
    judges = {key: networks.get(METRICS[key].measure, METRICS[key].measure)
              for key in OF_SAMPLES if key in args.metrics}
    streams = {}
    references = {}
    for key in set(args.metrics) & {"rfid", "rfvd", "rfid-reference"}:
        real = Real(samples, order, about=record["data"])
        rule = record["resize_rule"]
        if key == "rfid-reference":                                      # with the rule of its statistics
            real = real_samples(args, samples.axes, None, args.reference)
            rule = "tf1"
        network = networks[METRICS[key].measure]
        references[key] = real_statistics(args, network, real, rule)
        streams[key] = FeatureStream(network, range(len(samples)) if key == "rfvd" else (), rule)
    parts = []
    counts = model.quantizer.count(torch.zeros(0, dtype=torch.long, device=args.device))
    examples = {}                                                        # from all over the set, to look at
    to_show = [order[k] for k in data.evenly_spaced(8, len(order))]
    for originals, n, indices in batches_of(samples, order, args, "measuring"):
        if args.original_resolution:
            check_size(originals.shape, samples.paths[int(indices[0])], args)
        x = pictures.to_float(originals.to(args.device))                 # (B, 3, [T,] H, W)
        y, ids = reconstruct(model, x, args)                             # as x, (B, [t,] h, w)
        # clean: every metric sees the pixels that an image file would hold. official: truncated ones, the
        # originals too (levels 1 to 95 lose one: up to 0.04 dB), and networks see floats.
        real = pictures.to_uint8(x, truncate=official)
        made = pictures.to_uint8(y, truncate=official)
        if not official:
            y = pictures.to_float(made)
        parts.append({"index": indices, "pixels": torch.full((n,), float(x[0, 0].numel()),
                                                            dtype=torch.float64)})
        for key, judge in judges.items():
            pair = (x, y) if isinstance(judge, torch.nn.Module) else (real, made)
            each = judge(*map(metrics.as_frames, pair))                  # (B * T,)
            parts[-1][key] = each.double().view(len(x), -1).mean(1)[:n].cpu()
        counts += model.quantizer.count(ids[:n])
        for stream in streams.values():
            stream.add(made if stream.rule == "tf1" else shown(y, stream.network, args), n, indices)
        for j, index in enumerate(indices.tolist()):
            if index in to_show:
                examples[index] = [originals[j], made[j].cpu()]
    samples.raise_if_broken(all_ranks=True)
    found = {"counts": runtime.all_reduce_sum(counts), "examples": runtime.gather_objects(examples),
             **gathered(parts)}
    for key, stream in streams.items():
        own = stream.finish()
        if runtime.is_main():
            found.update(distances([key], references[key], own, args))
    return found


def summarise(found, output, record, args):
    """Report what `measure` has found, and paint originals above their reconstructions. Rank 0 only."""
    official = args.protocol == "official"
    about = record["data"]
    counts = found["counts"]
    n = len(found["pixels"])
    groups, codes = counts.shape
    tokens = int(counts[0].sum())
    bits = groups * math.log2(codes)
    # The official script averages PSNR and SSIM over its batches, of four images or of one.
    batch = 4 if official and not about["frames"] and not args.original_resolution else 1
    pixels = "truncated uint8" if official else "rounded uint8"
    facts = {**about, "n": n, "resize_rule": record["resize_rule"], "bits": bits, "tokens": tokens,
             "mean": f"mean over batches of {batch}" if batch > 1 else "mean over all", "pixels": pixels,
             "codes": f"{codes} codes in each of {groups} groups" if groups > 1 else f"{codes} codes",
             "floats": "floats" if official else pixels, "reference": args.reference,
             "over": f"{n} {'clip' if about['frames'] else 'image'}s of {about['name']}, {record['part']}"}
    values = {key: found[key] for key in METRICS if key in found}
    for key in values.keys() & set(OF_SAMPLES):
        means = [part.mean() for part in values[key].split(batch if callable(METRICS[key].measure) else 1)]
        values[key] = float(torch.stack(means).mean())
    if "usage" in args.metrics:
        values.update(metrics.codebook_usage(counts))
        values["bits_per_pixel"] = float(bits * tokens / found["pixels"].sum())
    report(output, values, facts, record)
    pairs = [pair for _, pair in sorted(pair for part in found["examples"] for pair in part.items())]
    sides = [min(256, *[original.shape[axis] for original, _ in pairs]) for axis in (-2, -1)]
    shown = torch.stack([TF.center_crop(pair[k], sides) for k in (0, 1) for pair in pairs])
    written = pictures.save_samples(output.with_suffix(".png"), shown, len(pairs))
    print(f"originals above reconstructions: {', '.join(map(str, written))}")


# ---- 4. Generation: do samples look like real ones, and like all of them (table 5)? ------------------------

def choose_samples(args):
    """The path of the samples to judge: given, drawn now as flags say, the newest there are, or drawn now."""
    defaults = vars(sample.get_args([]))
    how = {name: value for name, value in vars(args).items() if name in {*defaults, "num_samples"}
           and name not in ("device", "output")}
    given = [f"--{name.replace('_', '-')}" for name, value in how.items() if value != defaults.get(name)
             and name not in ("batch_size", "mixed_precision", "global_seed")]
    if args.samples:                                       # tokens need to know the tokenizer
        require(not given or "tokens" in args.metrics,
                f"--samples {args.samples} is drawn already, without {', '.join(given)}")
        return pathlib.Path(args.samples)
    if not given and (stored := runtime.on_main(list, pathlib.Path("runs/samples").glob("**/*.npz"))):
        return max(stored, key=os.path.getmtime)
    what = "samples (*.npz) in runs/samples and no AR model"
    args.ckpt = how["ckpt"] = str(args.ckpt or runtime.latest_checkpoint("runs/ar", what))
    most = 50_000 if args.ckpt in checkpoints.PUBLISHED else 5_000
    how["num_fid_samples"] = how.pop("num_samples") or most
    path = pathlib.Path("runs/samples") / f"drawn-{short_hash(how)}.npz"
    sample.main(argparse.Namespace(**{**defaults, **how, "device": args.device, "output": path}))
    runtime.barrier()                                      # rank 0 has joined the parts
    return path


def open_samples(path):
    """(samples in an npz file or a folder of images, their axes ([T,] H, W), what identifies them)."""
    if not path.is_dir():
        samples = images_of(read_npz(path), path)
        return samples, samples.shape[1:-1], runtime.on_main(runtime.sha256_of, path)
    samples = sources.Folder(path, data.View(1, crop="original"))
    sizes = set()
    for file in samples.paths:
        try:
            with Image.open(file) as image:
                sizes.add(image.size[::-1])
        except Exception:                                  # PIL raises almost anything
            raise runtime.UserError(f"--samples: {file} is empty or no image; make it again") from None
    require(len(sizes) == 1, f"--samples {path} mixes the sizes {sorted(sizes)[:2]}; all must have one")
    return samples, sizes.pop(), runtime.on_main(data.fingerprint, samples, range(len(samples)))


def generation(args):
    """Judge generated samples: FID and the like of images, FVD of clips, the tokens of both."""
    path = choose_samples(args)
    samples, axes, identity = open_samples(path)
    n = len(samples)
    clips = len(axes) == 3
    possible = ["fvd"] if clips else OF_IMAGES
    args.metrics = args.metrics or possible
    require(set(args.metrics) <= {*possible, "tokens"},
            f"--metrics: {', '.join(possible)} and tokens are for what {path} holds")
    require(n > 3, f"{path} holds {n} samples; generation metrics need four or more")
    require(args.reference or axes[-1] == axes[-2], f"{path} holds samples of {list(axes)}, real ones are "
            f"cropped to squares; make square ones, or give a --reference")
    check_size(axes, path, args)
    beside = pathlib.Path(os.path.splitext(os.path.abspath(path))[0] + ".json")
    sampling = runtime.read_json(beside) if beside.is_file() else {}
    real = real_samples(args, axes, args.max_samples or n, args.reference)
    output, record = plan(path, args, samples={"path": str(path), "axes": list(axes), "sha256": identity},
                          sampling=sampling, reference=real.about, networks={})
    runtime.print_facts(("samples", f"{path}, {n} of {' x '.join(map(str, axes))}"),
                        ("real", f"those of {real.about.get('name') or args.reference}"),
                        ("protocol", f"{args.protocol}, {runtime.world_size()} x {args.device}"))
    facts = {"n": n, "frames": axes[0], "kind": "clip" if clips else "image"}
    values = {}
    if "tokens" in args.metrics:
        values = token_distances(samples, real.samples, record, facts, args)
    if args.metrics != ["tokens"]:
        network = load_network("i3d" if clips else "inception", args)
        record["networks"] = {network.name: network.source}
        reference = real_statistics(args, network, real)
        made = FeatureStream(network, range(n)).run(samples, range(n), args, "samples")
        if runtime.is_main():
            require(made["n"] == n, f"{n - made['n']} of {n} samples in {path} are broken; make them again")
            values.update(compare(reference, made, facts, args))
    if runtime.is_main():
        report(output, values, facts, record)


def compare(reference, made, facts, args):
    """{metric: value} of samples against real ones, as `FeatureStream.finish` gives both; adds to `facts`."""
    asked = set(args.metrics)
    n = facts["n"]
    facts["real"] = int(reference["n"]) if "n" in reference else "an unknown number of"
    if facts["real"] != n:
        print(f"warning: {n} samples are compared with {facts['real']} real ones; distances depend on both")
    if n != 50_000:
        print(f"warning: published numbers are of 50,000 samples, these are of {n}")
    values = distances([key for key in FRECHET if key in asked], reference, made, args)
    if "inception_score" in asked:
        logits = torch.from_numpy(made["logits"])
        facts["order"] = "file order"
        if args.protocol == "clean":
            facts["order"] = f"shuffled with seed {args.global_seed}"
            logits = logits[torch.randperm(n, generator=torch.Generator().manual_seed(args.global_seed))]
        values["inception_score"], deviation, blocks = metrics.inception_score(logits)
        facts["blocks"] = f"{blocks}, std {deviation:.2f}"
    if asked & OF_FEATURES:
        features = [torch.tensor(arrays["features"], device=args.device) for arrays in (reference, made)]
        facts.update(near=len(features[0]), pairs=min(map(len, features)))
    if asked & {"precision", "recall"}:
        half = args.protocol == "official"                 # as in ADM's evaluator
        facts["digits"] = "fp16" if half else "fp32"
        found = zip(("precision", "recall"), metrics.precision_recall(*features, half=half))
        values.update({key: value for key, value in found if key in asked})
    if "kid" in asked:
        values["kid"], deviation = metrics.kid(*features)
        facts["subsets"] = f"100 subsets of {min(1000, facts['pairs'])}, std {deviation:.5f}"
    if "mind" in asked:
        values["mind"] = metrics.mind(*features)
    return values


@torch.no_grad()
def token_distances(samples, real, record, facts, args):
    """{metric: total variation} of the codes of samples and of as many `real` ones, and of these and as many
    others: what the best samples would have. All are encoded by the tokenizer in the AR model --ckpt, or the
    one that drew the samples, as their record says. Adds to `record` and `facts`. A collective."""
    made_by = record["sampling"].get("checkpoint")
    args.ckpt = args.ckpt or (made_by.get("path") if isinstance(made_by, dict) else None)
    _, tokenizer, info = checkpoints.load_pair(args.ckpt, args.tokenizer, not args.raw_weights,
                                                args.trust_checkpoint)
    sha256 = runtime.on_main(checkpoints.weights_hash, tokenizer.to(args.device))
    record["tokenizer"] = {"path": info["path"], "sha256": sha256}
    each = min(len(samples), args.max_samples or len(samples), len(real) // 2)
    chosen = np.random.default_rng(args.global_seed).permutation(len(real))[:2 * each].tolist()
    counts = []
    spread = data.evenly_spaced(each, len(samples))
    for some, order in ((samples, spread), (real, chosen[:each]), (real, chosen[each:])):
        counts.append(tokenizer.quantizer.count(torch.zeros(0, dtype=torch.long, device=args.device)))
        for x, n, _ in batches_of(some, order, args, "tokens"):
            x = pictures.to_float(x[:n].to(args.device))
            for part in x.split(4 if x.dim() == 5 else n):               # clips are large
                counts[-1] += tokenizer.quantizer.count(tokenizer.encode(part))
    made, first, second = map(runtime.all_reduce_sum, counts)
    facts.update(each=each, tokens=int(made[0].sum()))
    return {"tokens": metrics.total_variation(made, first),
            "tokens-real": metrics.total_variation(second, first)}


# What is compared with: samples[order], a data set or array; its record; all that its npz file holds, if any.
Real = collections.namedtuple("Real", "samples order about stored", defaults=({},))


def real_samples(args, axes, count, reference=None):
    """`Real`: the images in the npz file `reference`, or `count` (None: all) of --data-path."""
    if reference:
        stored = read_npz(reference)
        samples = images_of(stored, reference)
        require(samples.shape[1:-1] == axes, f"--reference {reference} is of images of {samples.shape[1:3]}, "
                f"not {axes}; compare sets of one size (make-reference has --image-size)")
        about = {**stored.get("settings", {}), "path": reference,
                 "sha256": runtime.on_main(runtime.sha256_of, reference)}
        return Real(samples, range(len(samples)), about, stored)
    view = data.View(axes[-1], axes[0] if len(axes) == 3 else None, resize=args.resize)
    samples = sources.build_dataset(args.data_path, args.split or "train", view, args.split_list)
    order = data.evenly_spaced(count, len(samples))
    return Real(samples, order, {
        "path": args.data_path, "name": samples.name, "split": args.split or "train", "n": len(order),
        "fingerprint": runtime.on_main(data.fingerprint, samples, order)})


def real_statistics(args, network, real, rule="tf1", path=None):
    """The statistics of `real` as of `FeatureStream.finish`, made once and kept in `path`, or in a file named
    after all that they depend on. A collective.

    With features, and of a data set of images these, of up to 10,000, for ADM's own evaluator to read. ADM's
    files bring statistics of ImageNet's training set, and 10,000 images, whose features are computed here.
    rule: of `metrics.inception_input`; not "tf1" where originals are compared with their reconstructions."""
    samples, order, about, stored = real
    if "settings" in stored:
        require(stored["settings"]["network"] == network.source,
                f"--reference {about['path']} is of other Inception weights; make it again")
        return stored
    key = {**about, "network": network.source, "device": args.device}  # convolutions differ
    del key["path"]                                                    # wherever they lie
    of_files = isinstance(samples, np.ndarray)
    if not of_files:
        key["protocol"] = args.protocol
    if rule != "tf1":
        key["resize_rule"] = rule
    path = pathlib.Path(path or f"{args.output}/references/{short_hash(key)}.npz")
    known = runtime.on_main(path.exists)
    runtime.print_main(f"cached   {path} ({'found' if known else 'made now'})")
    if not known:
        kept = {order[k] for k in data.evenly_spaced(None if of_files else 10_000, len(order))}
        images = not of_files and rule == "tf1" and samples.kind == "image"
        arrays = FeatureStream(network, kept, rule, images).run(samples, order, args, "real")
        if runtime.is_main():
            with runtime.atomic(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, settings=np.array(json.dumps(key)), **arrays)
    if not runtime.is_main():
        return None
    arrays = read_npz(path)
    require("settings" in arrays, f"{path} is of another program; choose another --reference")
    runtime.check_same(arrays["settings"], key, f"{path} exists, and")
    # ADM's statistics belong to the published network. Without any, it takes those of arr_0; so do we.
    if network.source != RANDOM_LABEL and {"mu", "sigma", "mu_s", "sigma_s"} <= stored.keys():
        return {**stored, "features": arrays["features"]}
    return arrays


def make_reference(args):
    """Statistics of real images for `generation` to compare with, in ADM's format."""
    real = real_samples(args, (args.image_size, args.image_size), args.max_samples)
    real_statistics(args, load_network("inception", args), real, path=args.reference)


# ---- 5. The paper's tables: their rows lie in support/tables.json; ours name what measures them ------------

def measured(what, results, args):
    """(cell, command) of a measurement in a table: its newest values here, and how to get what is missing."""
    path = getattr(args, what["data"])

    def fits(result):                                      # of this checkpoint, or our training of its preset
        made = result.get("checkpoint") or (result["sampling"] or {}).get("checkpoint")
        on = result.get("data") or result["reference"]
        return (isinstance(made, dict) and made.get("preset") == what["checkpoint"]
                and on["path"] and os.path.abspath(on["path"]) == os.path.abspath(path)
                and on.get("size", what["size"]) == what["size"] and result["protocol"] == args.protocol
                and RANDOM_LABEL not in result["networks"].values())

    def rank(result):                                      # the newest of those that have everything
        return set(what["metrics"]) <= result["metrics"].keys(), result["date"]

    cell = ""
    if best := max(filter(fits, results), key=rank, default=None):
        found = best["metrics"]
        shown = [METRICS[key].format.format(float(found[key]["value"])) if key in found else "-"
                 for key in what["metrics"]]
        cell = f"{what['data']} {' / '.join(shown)} ({best['n']}, {args.protocol})"
        if rank(best)[0]:
            return cell, None
    command = f"python evaluate.py generation --ckpt {what['checkpoint']} --reference {path}"
    if what["data"] != "reference":
        size = "--original-resolution" if what["size"] == "original" else f"--image-size {what['size']}"
        command = (f"python evaluate.py reconstruction --ckpt {what['checkpoint']} --data-path {path} {size} "
                   f"--metrics {' '.join(what['metrics'])}")
    return cell, f"{command} --protocol {args.protocol}"


def table(args):
    """One of the paper's tables, and beside our rows what was measured here, or how to measure it."""
    rows_of_all = pathlib.Path(__file__).parent / "support" / "tables.json"
    content = json.loads(rows_of_all.read_text())[str(args.number)]
    results = []
    for path in pathlib.Path(args.output).glob("*.json"):
        with contextlib.suppress(runtime.UserError):       # torn; what has other keys is another program's
            results.append(runtime.read_json(path))
    results = [each for each in results if {"metrics", "n", "protocol", "networks", "date"} <= each.keys()]
    rows = []
    commands = []
    for row in content["rows"]:
        cells = [measured(what, results, args) for what in row.get("measure", ())]
        commands += [command for _, command in cells if command]
        own = row.get("own", "not yet" if cells else "-")              # of tables 1 and 2: what presets have
        rows.append([*row["cells"], "; ".join(cell for cell, _ in cells if cell) or own])
    print(f"Table {args.number}. {content['title']}\n")
    runtime.print_table(rows, content["header"])
    if content["note"]:
        print(f"\n{content['note']}")
    if commands:
        print("\nTo measure what is missing (checkpoints are downloaded):\n  " + "\n  ".join(commands))


# ---- 6. Flags ----------------------------------------------------------------------------------------------

def add_flags(parser, data_default, count_default):
    """Flags of every command that measures. The texts say what holds if a flag is not given."""
    group = parser.add_argument_group("real samples")
    group.add_argument("--data-path", help=f"folder, tar files or generated[-plain] ({data_default})")
    group.add_argument("--split", choices=sources.SPLITS, help="part of the data set")
    group.add_argument("--split-list", help="official UCF-101 list of the clips to use, as testlist01.txt")
    group.add_argument("--max-samples", type=runtime.positive_int, help=f"evenly spaced ({count_default})")
    group.add_argument("--resize", type=runtime.positive_int, help="shorter side before the crop")
    group = parser.add_argument_group("computing")
    group.add_argument("--protocol", choices=("clean", "official"), default="clean",
                       help="official: what the published numbers were made with, quirks included")
    group.add_argument("--global-seed", type=runtime.non_negative_int, default=0, help="of draws and crops")
    group.add_argument("--weights-dir", help="where downloads go (~/.cache/open-magvit2)")
    group.add_argument("--allow-random-weights", action="store_true", help="tries metrics' networks out")
    group.add_argument("--num-workers", type=runtime.non_negative_int, default=0, help="reading processes")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    group.add_argument("--output", default="runs/evaluation", help="folder for JSON, grid and statistics")


def get_args(argv=None):
    """Parse the command line; no command at all means "judge what is in runs/"."""
    parser = runtime.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    count = runtime.positive_int

    p = commands.add_parser("reconstruction", help="judge a tokenizer", description=reconstruction.__doc__)
    p.add_argument("--ckpt", help="tokenizer, a file or a published name; the newest of runs/tokenizer")
    p.add_argument("--raw-weights", action="store_true", help="the raw weights, not their EMA")
    p.add_argument("--trust-checkpoint", action="store_true", help="unpickle foreign classes in --ckpt")
    p.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="fp32", help="tokenizer's")
    p.add_argument("--metrics", nargs="+", choices=(*OF_RECONSTRUCTIONS, "all"),
                   default=["psnr", "ssim", "usage"], help="usage brings perplexity and bits per pixel")
    p.add_argument("--reference", help="npz as for generation: also the FID of reconstructions against it")
    p.add_argument("--image-size", type=count, help="side of the crops (the tokenizer's)")
    p.add_argument("--original-resolution", action="store_true", help="no resizing; pads to whole tokens")
    p.add_argument("--batch-size", type=count, help="at once on a rank (16 images, 4 clips)")
    add_flags(p, "what --ckpt was trained on, held out", "all")

    p = commands.add_parser("generation", help="judge generated samples", description=generation.__doc__)
    p.add_argument("--samples", help="npz with arr_0, or folder; not given: drawn from --ckpt, or else the "
                                     "newest npz of runs/samples, or else drawn from the newest of runs/ar")
    p.add_argument("--reference", help="npz, ADM's or of make-reference; made of --data-path if not given")
    p.add_argument("--metrics", nargs="+", choices=(*OF_IMAGES, "fvd", "tokens"), default=(),
                   help="not given: all but tokens, the only one that needs no network but the tokenizer")
    p.add_argument("--num-samples", type=count, help="to draw (50,000 of a published name, else 5,000)")
    sample.add_drawing_flags(p)                            # with --batch-size
    add_flags(p, "generated", "as many as samples")

    p = commands.add_parser("make-reference", help="real statistics", description=make_reference.__doc__)
    p.add_argument("--reference", help="npz file to write; named after its content if not given")
    p.add_argument("--image-size", type=count, default=256, help="side of the crops")
    p.add_argument("--batch-size", type=count, default=64, help="at once on a rank")
    add_flags(p, "generated", "all")

    p = commands.add_parser("table", help="one of the paper's tables", description=table.__doc__)
    p.add_argument("number", type=int, choices=range(1, 7), help="1 to 6")
    p.add_argument("--imagenet", default="data/imagenet", help="folder of ImageNet, with val/")
    p.add_argument("--coco", default="data/coco/val2017", help="folder of MS-COCO val2017")
    p.add_argument("--ucf101", default="data/ucf101", help="folder of UCF-101, with train/ and test/")
    p.add_argument("--reference", default="VIRTUAL_imagenet256_labeled.npz", help="ADM's npz, for table 5")
    p.add_argument("--output", default="runs/evaluation", help="folder with the JSON files of earlier runs")
    p.add_argument("--protocol", choices=("clean", "official"), default="clean", help="of the values shown")
    return parser.parse_args((sys.argv[1:] if argv is None else list(argv)) or ["reconstruction"])


def main(args):
    """Run the command, in exact fp32: TF32 keeps 10 bits of each factor. Convolutions have it off already."""
    if args.command == "table":
        return table(args)
    args.device = runtime.setup_process_group(args.device).type
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic = True
    commands = {"reconstruction": reconstruction, "generation": generation, "make-reference": make_reference}
    commands[args.command](args)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
