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
    python evaluate.py generation --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc-per-node=8 evaluate.py generation --ckpt AR-B --data-path imagenet
    python evaluate.py make-reference --data-path imagenet --image-size 256
    python evaluate.py table 4 --imagenet imagenet

Images and clips go the same way: an image is a clip of one frame. No number of ranks changes a result. Some
metrics need networks to be downloaded; --allow-random-weights tries the machinery out without, and marks what
it prints as not comparable. metrics.py explains the metrics. Axis letters: B samples of a batch, N of a set,
T frames, H W their size, D features, V codes.
"""
import argparse
import datetime
import hashlib
import json
import math
import os
import pathlib
import sys
import typing
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from tqdm import tqdm

import checkpoints
import data
import metrics
import pictures
import runtime
import sample
from checkpoints import RANDOM_LABEL
from runtime import require

# ---- 1. The metrics, and the record of a measurement -------------------------------------------------------


class Metric(typing.NamedTuple):
    """All that is known of a metric here. A new one of images is a function in metrics.py and a row below."""
    name: str
    measure: object                # a function of uint8 originals and reconstructions, or a network's name
    format: str
    measured_on: str               # filled in by the facts of a run


METRICS = {
    "psnr": Metric("PSNR (dB)", metrics.psnr, "{:.2f}", "{pixels}, {mean}"),
    "ssim": Metric("SSIM", metrics.ssim, "{:.4f}", "{pixels}, {mean}, 7 x 7 windows"),
    "lpips-vgg": Metric("LPIPS (VGG)", "lpips-vgg", "{:.4f}", "{floats}, mean over all"),
    "lpips-alex": Metric("LPIPS (Alex)", "lpips-alex", "{:.4f}", "{floats}, mean over all"),
    "usage": Metric("codebook usage", None, "{:.2%}", "{tokens} tokens of {codes}"),
    "perplexity": Metric("perplexity", None, "{:.1f}", "at most {codes}"),
    "bits_per_pixel": Metric("bits per pixel", None, "{:.4f}", "{bits:g} bits a token"),
    "rfid": Metric("rFID", "inception", "{:.3f}", "{floats}, {resize_rule} to 299, {n} images"),
    "rfvd": Metric("rFVD", "i3d", "{:.2f}", "{pixels}, {n} clips of {frames} frames, float64"),
    "rfvd-float32": Metric("rFVD, float32", "i3d", "{:.2f}", "the same with the official script's roundings"),
    "fid": Metric("FID", "inception", "{:.3f}", "{n} samples, {real} images, resize tf1"),
    "sfid": Metric("sFID", "inception", "{:.3f}", "{n} samples, {real} images, resize tf1"),
    "inception_score": Metric("Inception Score", "inception", "{:.2f}", "blocks of 5,000: {blocks}, {order}"),
    "precision": Metric("precision", "inception", "{:.4f}", "{n} samples, {near} images, k = 3, {digits}"),
    "recall": Metric("recall", "inception", "{:.4f}", "{n} samples, {near} images, k = 3, {digits}"),
    "fvd": Metric("FVD", "i3d", "{:.2f}", "{n} samples, {real} clips of {frames} frames, float64"),
    "fvd-float32": Metric("FVD, float32", "i3d", "{:.2f}", "the same with the official script's roundings")}
OF_SETS = {"inception": (2048, 2023, 1008), "i3d": (400,)}            # networks of sets: D of their outputs
OF_SAMPLES = [key for key, metric in METRICS.items() if metric.measure and metric.measure not in OF_SETS]
OF_RECONSTRUCTIONS = (*OF_SAMPLES, "usage", "rfid", "rfvd")           # for --metrics; usage brings two others
# Flags of `generation` that only make sense where it draws the samples itself.
DRAWING = ("ckpt", "num_samples", "tokenizer", "raw_weights", "trust_checkpoint", "cfg_scale", "temperature",
           "top_k", "top_p", "compile")


def load_network(name, args):
    """The network of a metric, with its `name` and its `source`: what its weights are."""
    eps = 1e-5 if args.protocol == "official" else 1e-3    # of I3D: in the official script's port, or in TF
    network, source = checkpoints.load_network(name, args.weights_dir, args.allow_random_weights, eps)
    network.name = name
    network.source = source
    return network.to(args.device)


def report(subject, values, facts, record, args):
    """Print `values` {metric: number} and write them to a JSON with their `record`; returns its path. Rank 0.

    facts: what fills in the registry's `measured_on`. Other settings give another file.
    """
    n = facts["n"]
    entries = {}
    rows = []
    for key in [key for key in METRICS if key in values]:
        metric = METRICS[key]
        label = RANDOM_LABEL if record["networks"].get(metric.measure) == RANDOM_LABEL else ""
        note = metric.measured_on.format(**facts)
        rows.append([metric.name, metric.format.format(values[key]), note, label])
        value = values[key] if math.isfinite(values[key]) else str(values[key])
        entries[key] = {"value": value, "measured_on": note, "label": label}
        if key in ("rfid", "rfvd", "fid", "fvd") and n < 2 * OF_SETS[metric.measure][0]:
            print(f"warning: {metric.name} of {n} samples is biased upwards (it wants two for each of "
                  f"{OF_SETS[metric.measure][0]} features); compare it only with that of equally many")
    print()
    runtime.print_table(rows, ["metric", "value", "measured on", ""])
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    record = {"command": args.command, "protocol": args.protocol, "n": n, **record, "arguments": vars(args),
              "versions": versions}
    path = pathlib.Path(args.output, f"{args.command}-{pathlib.Path(subject).stem}-{short_hash(record)}.json")
    runtime.write_json(path, {"metrics": entries, **record, "date": datetime.datetime.now().isoformat()})
    print(f"\nwritten to {path}")
    return path


def short_hash(value):
    """Eight hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


# ---- 2. Sets of samples, and their statistics --------------------------------------------------------------

def read_npz(path):
    """{name: array} of an npz file, mapped into memory if stored as np.savez does: samples may have 10 GB."""
    require(pathlib.Path(path).is_file(), f"{path} does not exist; check the path")
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
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise runtime.UserError(f"{path} is truncated or no npz file ({error}); copy it again") from None
    return arrays


def sample_array(path):
    """The samples in an npz file, ADM's format: uint8 (N, H, W, 3), or for clips (N, T, H, W, 3)."""
    arrays = read_npz(path)
    require("arr_0" in arrays, f"{path} holds no array arr_0, only {', '.join(arrays)}")
    array = arrays["arr_0"]
    shape = list(array.shape)
    require(array.dtype == np.uint8, f"{path}: arr_0 is {array.dtype}, expected uint8; convert floats in "
            f"[0, 1] with (x * 255).round().astype('uint8')")
    hint = "; use arr_0.transpose(0, 2, 3, 1)" if len(shape) == 4 and shape[1] == 3 else ""
    require(len(shape) in (4, 5) and shape[-1] == 3,
            f"{path}: arr_0 has the shape {shape}, not (N, H, W, 3) or (N, T, H, W, 3){hint}")
    return array


def batches_of(samples, order, args, title):
    """This rank's batches of samples[order]: (uint8 (B, 3, [T,] H, W), how many count, their indices).

    samples: a data set, or an array of `sample_array`. Ranks share out whole batches, all of one shape, the
    last filled up by repetition, as convolutions of other shapes add in another order. So a sample always has
    the same neighbours, and its numbers the same last bits.
    """
    size = args.batch_size
    batches = data.eval_batches(samples, order, size, args.num_workers)
    total = len(batches)
    if isinstance(samples, np.ndarray):
        batches = ((torch.from_numpy(samples[part]).movedim(-1, 1), None, torch.tensor(part))
                   for part in batches.parts)
    silent = None if runtime.is_main() else True
    for x, _, indices in tqdm(batches, title, total, unit="batch", disable=silent):
        yield torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]), len(x), indices


def gather_rows(rows, indices):
    """The `rows` (n, ...) of all ranks, sorted by `indices` (n,): (N, ...) on rank 0, elsewhere None."""
    parts = [None] * runtime.world_size() if runtime.is_main() else None
    dist.gather_object((rows.cpu(), indices.cpu()), parts)
    if parts:
        rows, indices = [torch.cat(each) for each in zip(*parts)]
        return rows[indices.argsort(stable=True)]


class FeatureStream:
    """Sends samples through the network of a metric of sets, and keeps what distances of sets need.

    kept: of which indices to keep features and logits; axes (H, W): also the images themselves.
    """

    def __init__(self, network, kept=(), rule="tf1", axes=None):
        lengths = OF_SETS[network.name]
        self.network = network
        self.device = next(network.parameters()).device
        self.kept = kept
        self.rule = rule                                               # of `metrics.inception_input`
        self.moments = [metrics.Moments(D, self.device) for D in lengths[:2]]       # the second for sFID
        self.rows = {"features": [torch.empty(0, lengths[0])], "logits": [torch.empty(0, lengths[-1])]}
        if axes:
            self.rows["arr_0"] = [torch.empty(0, *axes, 3, dtype=torch.uint8)]
        self.indices = [torch.empty(0, dtype=torch.long)]

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
        kept = torch.tensor([index in self.kept for index in indices.tolist()])
        found = {"features": outputs[0], "logits": outputs[-1], "arr_0": samples.movedim(1, -1)}
        for name, parts in self.rows.items():
            parts.append(found[name][:n].cpu()[kept])
        self.indices.append(indices[kept])

    def finish(self):
        """{name: array} on rank 0, under ADM's names, elsewhere None: n, mean and covariance of features (mu,
        sigma) and of spatial features (mu_s, sigma_s), and what was kept. A collective."""
        indices = torch.cat(self.indices)
        arrays = {name: gather_rows(torch.cat(parts), indices) for name, parts in self.rows.items()}
        for suffix, moments in zip(("", "_s"), self.moments):
            moments.n = int(runtime.all_reduce_sum(torch.tensor(moments.n)))
            moments.total = runtime.all_reduce_sum(moments.total)
            moments.outer = runtime.all_reduce_sum(moments.outer)
            if runtime.is_main():
                arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = moments.mean_and_covariance()
        if runtime.is_main():
            return {"n": self.moments[0].n, **{name: np.asarray(array) for name, array in arrays.items()}}

    def run(self, samples, order, args, title):
        """Send all of samples[order] through it, and `finish`. A collective."""
        for x, n, indices in batches_of(samples, order, args, title):
            self.add(x, n, indices)
        if isinstance(samples, data.Samples):
            samples.raise_if_broken(all_ranks=True)
        return self.finish()


def cache_path(key, args):
    """Where `cached` keeps arrays that depend on `key`."""
    return pathlib.Path(args.output, "references", f"{short_hash(key)}.npz")


def cached(args, key, make, path=None):
    """The {name: array} of `make()`, on rank 0, elsewhere None, kept in an npz file. A collective.

    key: all that they depend on, a JSON value. path: the file; a name that belongs to the key if None.
    """
    key = {**key, "device": args.device}                   # convolutions differ
    path = pathlib.Path(path) if path else cache_path(key, args)
    known = runtime.on_main(path.exists)
    runtime.print_main(f"cached   {path} ({'found' if known else 'made now'})")
    arrays = None if known else make()
    if not runtime.is_main():
        return None
    if not known:
        with runtime.atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, settings=np.array(json.dumps(key)), **arrays)
    arrays = read_npz(path)
    require("settings" in arrays, f"{path} is of another program; choose another --reference")
    runtime.check_same(json.loads(str(arrays["settings"])), key, f"{path} exists, and")
    return arrays


def distances(key, reference, made, args):
    """{key: Frechet distance of two sets, given as by `FeatureStream.finish`}, and what belongs beside it."""
    values = {}
    for name, suffix in [(key, ""), ("sfid", "_s")][:2 if key == "fid" else 1]:
        statistics = [arrays[part + suffix] for arrays in (reference, made) for part in ("mu", "sigma")]
        values[name] = metrics.frechet_distance(*statistics)
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
    other = "rfid" if about["frames"] else "rfvd"
    require(other not in args.metrics, f"--metrics {other} is not for a tokenizer of {samples.kind}s")
    possible = [key for key in OF_RECONSTRUCTIONS if key != other]
    if "all" in args.metrics:
        args.metrics = possible
    require("rfvd" not in args.metrics or about["frames"] >= 9,
            f"--metrics rfvd: I3D needs 9 frames or more, {path} has {about['frames']}; leave it out")
    size = about["size"]
    require(size == "original" or size >= 32 or not any("lpips" in key for key in args.metrics),
            f"--metrics: LPIPS needs images of 32 x 32 or more, not {size} x {size}; leave it out")
    needed = {METRICS[key].measure for key in args.metrics if isinstance(METRICS[key].measure, str)}
    networks = {name: load_network(name, args) for name in sorted(needed)}
    # Clean departs from the official resize rule only where a side exceeds Inception's 299 pixels.
    antialias = args.protocol == "clean" and (size == "original" or size > 299)
    info["sha256"] = runtime.on_main(checkpoints.weights_hash, model)
    record = {"checkpoint": info, "data": about,
              "networks": {name: network.source for name, network in networks.items()},
              "resize_rule": "half-pixel-antialiased" if antialias else "half-pixel"}
    runtime.print_facts(
        ("model", f"{path}: {info['preset']}, {info['weights']} weights, step {info['step']}"),
        ("data", f"{len(order)} {samples.kind}s of {samples.name}, {args.split} split, size {size}"),
        ("protocol", f"{args.protocol}, tokenizer in {args.mixed_precision}, metrics in fp32, "
                     f"{runtime.world_size()} x {args.device}"))
    if left_out := [key for key in possible if key not in args.metrics]:
        runtime.print_main(f"left out {', '.join(left_out)}; add --metrics all (networks are downloaded)")
    found = measure(model.to(args.device), samples, order, networks, record, args)
    if runtime.is_main():
        summarise(found, record, args)


def held_out(config, trained_on, args):
    """(data set, indices, record): samples that a tokenizer has not seen, of what it has learned from.

    Protocol official, for clips: the training split, random crops, filled up to 10,000 with randomly chosen
    ones of the same (463 of UCF-101's 9,537), as in the script that the published rFVD of 16 came from.
    """
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
    samples = data.build_dataset(args.data_path, args.split, view, args.split_list)
    order = data.evenly_spaced(10_000 if seen else None, len(samples))
    if seen:
        shuffled = np.random.default_rng(args.global_seed).permutation(len(samples)).tolist()
        order += shuffled[:10_000 - len(order)]
    order = [order[k] for k in data.evenly_spaced(args.max_samples, len(order))]
    require(len(order) > 1, f"{samples.name} has {len(order)} {samples.kind}s; two or more are needed")
    return samples, order, {"path": args.data_path, "name": samples.name, "split": args.split, "crop": crop,
                            "resize": args.resize, "size": "original" if args.original_resolution else size,
                            "frames": frames, "n": len(order), "repeated": len(order) - len(set(order)),
                            "fingerprint": runtime.on_main(data.fingerprint, samples, order)}


def reconstruct(model, x, args):
    """x (B, 3, [T,] H, W) in [-1, 1] through the tokens: (reconstructions as x, ids (B, [t,] h, w)).

    At their original resolution images are padded with 0, mid-grey, to whole tokens, and cropped again.
    """
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
    collective.
    """
    official = args.protocol == "official"
    judges = {key: METRICS[key].measure for key in OF_SAMPLES if key in args.metrics}
    distance = next((key for key in ("rfid", "rfvd") if key in args.metrics), None)
    if distance:                                           # the originals' half is that of all tokenizers
        network = networks[METRICS[distance].measure]
        kept = range(len(samples)) if distance == "rfvd" else ()
        streams = [FeatureStream(network, kept, record["resize_rule"]) for _ in range(2)]
        key = {"data": record["data"], "protocol": args.protocol, "network": network.source,
               "resize_rule": record["resize_rule"], "device": args.device}
        known = runtime.on_main(cache_path(key, args).exists)
    rows = [torch.empty(0, 1 + len(judges), dtype=torch.float64)]
    numbers = [torch.empty(0, dtype=torch.long)]
    counts = model.quantizer.count(torch.zeros(0, dtype=torch.long, device=args.device))
    examples = {}
    for originals, n, indices in batches_of(samples, order, args, "measuring"):
        x = pictures.to_float(originals.to(args.device))                 # (B, 3, [T,] H, W)
        y, ids = reconstruct(model, x, args)                             # as x, (B, [t,] h, w)
        # clean: every metric sees the pixels that an image file would hold. official: truncated ones, the
        # originals too (levels 1 to 95 lose one: up to 0.04 dB), and networks see floats.
        real = pictures.to_uint8(x, truncate=official)
        made = pictures.to_uint8(y, truncate=official)
        if not official:
            y = pictures.to_float(made)
        columns = [torch.full((len(x),), x[0, 0].numel(), dtype=torch.float64)]
        for judge in judges.values():
            if callable(judge):
                each = judge(metrics.as_frames(real), metrics.as_frames(made))       # (B * T,)
            else:
                each = networks[judge](metrics.as_frames(x), metrics.as_frames(y))
            columns.append(each.double().view(len(x), -1).mean(1).cpu())
        rows.append(torch.stack(columns, 1)[:n])
        numbers.append(indices)
        counts += model.quantizer.count(ids[:n])
        if distance:
            pair = [(x + 1) / 2, (y + 1) / 2] if official and distance == "rfid" else [real, made]
            for stream, seen in list(zip(streams, pair))[known:]:
                stream.add(seen, n, indices)
        for j, index in enumerate(indices.tolist()):
            if index in order[:8]:
                examples[index] = [originals[j], made[j].cpu()]
    samples.raise_if_broken(all_ranks=True)
    found = {"counts": runtime.all_reduce_sum(counts), "examples": runtime.gather_objects(examples)}
    rows = gather_rows(torch.cat(rows), torch.cat(numbers))
    if runtime.is_main():
        found.update(zip(("pixels", *judges), rows.T))
    if distance:
        original = cached(args, key, streams[0].finish)
        own = streams[1].finish()
        if runtime.is_main():
            found.update(distances(distance, original, own, args))
    return found


def summarise(found, record, args):
    """Report what `measure` has found, and paint originals above their reconstructions. Rank 0 only."""
    official = args.protocol == "official"
    counts = found["counts"]
    groups, codes = counts.shape
    tokens = int(counts[0].sum())
    bits = groups * math.log2(codes)
    # The official script averages PSNR and SSIM over its batches, of four images or of one.
    batch = 4 if official and not record["data"]["frames"] and not args.original_resolution else 1
    pixels = "truncated uint8" if official else "rounded uint8"
    facts = {**record["data"], "n": len(found["pixels"]), "resize_rule": record["resize_rule"], "bits": bits,
             "mean": f"mean over batches of {batch}" if batch > 1 else "mean over all", "tokens": tokens,
             "codes": f"{codes} codes in each of {groups} groups" if groups > 1 else f"{codes} codes",
             "pixels": pixels, "floats": "floats" if official else pixels}
    record["skipped"] = record["data"]["n"] - facts["n"]
    values = {key: found[key] for key in METRICS if key in found}
    for key in values.keys() & set(OF_SAMPLES):
        means = [part.mean() for part in values[key].split(batch if callable(METRICS[key].measure) else 1)]
        values[key] = float(torch.stack(means).mean())
    if "usage" in args.metrics:
        values.update(metrics.codebook_usage(counts))
        values["bits_per_pixel"] = float(bits * tokens / found["pixels"].sum())
    path = report(record["checkpoint"]["path"], values, facts, record, args)
    pairs = [pair for _, pair in sorted(pair for part in found["examples"] for pair in part.items())]
    sides = [min(256, *[original.shape[axis] for original, _ in pairs]) for axis in (-2, -1)]
    shown = torch.stack([TF.center_crop(pair[k], sides) for k in (0, 1) for pair in pairs])
    written = pictures.save_samples(path.with_suffix(".png"), shown, len(pairs))
    print(f"originals above reconstructions: {', '.join(map(str, written))}")


# ---- 4. Generation: do samples look like real ones, and like all of them (table 5)? ------------------------

def newest_samples(folder="runs/samples"):
    """The newest npz file in `folder`, None where there is none."""
    return max(pathlib.Path(folder).glob("**/*.npz"), key=lambda path: path.stat().st_mtime, default=None)


def choose_samples(args):
    """The path of the samples to judge: given, drawn now as flags say, the newest there are, or drawn now."""
    how = {name: getattr(args, name) for name in DRAWING if getattr(args, name)}
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in how)
    require(not (args.samples and how), f"--samples {args.samples} is drawn already, without {flags}")
    if path := args.samples or (None if how else runtime.on_main(newest_samples)):
        return pathlib.Path(path)
    what = "samples (*.npz) in runs/samples and no AR model"
    args.ckpt = str(args.ckpt or runtime.latest_checkpoint("runs/ar", what))
    n = args.num_samples or (50_000 if args.ckpt in checkpoints.PUBLISHED else 5_000)
    how = [n, *[getattr(args, name) for name in (*DRAWING, "global_seed", "batch_size", "mixed_precision")]]
    path = pathlib.Path("runs/samples") / f"drawn-{short_hash(how)}.npz"
    sample.main(argparse.Namespace(**{**vars(args), "output": path, "num_fid_samples": n, "classes": None,
                                      "num_images": 1, "save_images": False}))
    runtime.barrier()                                      # rank 0 has joined the parts
    return path


def open_samples(path):
    """(samples in an npz file or a folder of images, their axes ([T,] H, W), what identifies them)."""
    if not path.is_dir():
        samples = sample_array(path)
        return samples, samples.shape[1:-1], runtime.on_main(runtime.sha256_of, path)
    samples = data.Folder(path, data.View(1, crop="original"))
    sizes = set()
    for i in range(len(samples)):
        with Image.open(samples.path(i)) as image:
            sizes.add(image.size[::-1])
    require(len(sizes) == 1, f"--samples {path} mixes the sizes {sorted(sizes)[:2]}; all must have one")
    return samples, sizes.pop(), runtime.on_main(data.fingerprint, samples, range(len(samples)))


def generation(args):
    """Judge generated samples: FID, sFID, Inception Score, precision and recall of images, FVD of clips."""
    path = choose_samples(args)
    samples, axes, identity = open_samples(path)
    n = len(samples)
    clips = len(axes) == 3
    require(n > 3, f"{path} holds {n} samples; generation metrics need four or more")
    require(not (clips and args.reference), "--reference is for images; give real clips with --data-path")
    require(args.reference or axes[-1] == axes[-2], f"{path} holds samples of {list(axes)}, real ones are "
            f"cropped to squares; make square ones, or give a --reference")
    require(not clips or axes[0] >= 9, f"{path}: I3D needs clips of 9 frames or more, these have {axes[0]}")
    network = load_network("i3d" if clips else "inception", args)
    runtime.print_facts(("samples", f"{path}, {n} of {' x '.join(map(str, axes))}"),
                        ("protocol", f"{args.protocol}, {runtime.world_size()} x {args.device}"))
    if args.reference:
        reference = stored_statistics(args, network, axes)
    else:
        reference = real_statistics(args, network, axes, args.max_samples or n)
    made = FeatureStream(network, range(n)).run(samples, range(n), args, "samples")
    if not runtime.is_main():
        return
    require(made["n"] == n, f"{n - made['n']} of the {n} samples in {path} are broken; make them again")
    real = int(reference["n"]) if "n" in reference else "the stored statistics'"
    if real != n:
        print(f"warning: {n} samples are compared with {real} real ones; distances depend on both numbers")
    facts = {"n": n, "real": real, "frames": axes[0]}
    values = distances("fvd" if clips else "fid", reference, made, args)
    if not clips:
        values.update(image_metrics(reference, made, facts, args))
    beside = path.with_suffix(".json")
    report(path, values, facts, {
        "samples": {"path": str(path), "axes": list(axes), "sha256": identity},
        "sampling": json.loads(beside.read_text()) if beside.is_file() else None,
        "reference": {"path": args.reference or args.data_path, "n": real,
                      **json.loads(str(reference.get("settings", "{}")))},
        "networks": {network.name: network.source}}, args)


def image_metrics(reference, made, facts, args):
    """{metric: value} of Inception Score, precision and recall; adds to `facts`. Rank 0 only."""
    n = facts["n"]
    if n != 50_000:
        print(f"warning: published numbers are of 50,000 samples, these are of {n}")
    logits = torch.from_numpy(made["logits"])
    facts["order"] = "file order"
    if args.protocol == "clean":
        facts["order"] = f"shuffled with seed {args.global_seed}"
        logits = logits[torch.randperm(n, generator=torch.Generator().manual_seed(args.global_seed))]
    score, deviation, blocks = metrics.inception_score(logits)
    half = args.protocol == "official"                     # as in ADM's evaluator
    features = [torch.tensor(arrays["features"], device=args.device) for arrays in (reference, made)]
    precision, recall = metrics.precision_recall(*features, half=half)
    facts.update(blocks=f"{blocks}, std {deviation:.2f}", near=len(features[0]),
                 digits="fp16" if half else "fp32")
    return {"inception_score": score, "precision": precision, "recall": recall}


def real_statistics(args, network, axes, count, path=None):
    """The statistics of `count` (None: all) samples of --data-path, of these axes, cached. A collective.

    With features, and of images the pixels, of up to 10,000, so that ADM's own evaluator can read the file.
    """
    view = data.View(axes[-1], axes[0] if len(axes) == 3 else None, resize=args.resize)
    samples = data.build_dataset(args.data_path, args.split or "train", view, args.split_list)
    order = data.evenly_spaced(count, len(samples))
    require(len(order) > 3, f"{samples.name} has {len(order)} {samples.kind}s; a reference needs four")
    key = {"name": samples.name, "split": args.split or "train", "n": len(order), "protocol": args.protocol,
           "fingerprint": runtime.on_main(data.fingerprint, samples, order), "network": network.source}
    kept = {order[k] for k in data.evenly_spaced(10_000, len(order))}
    stream = FeatureStream(network, kept, axes=axes if len(axes) == 2 else None)
    return cached(args, key, lambda: stream.run(samples, order, args, "reference"), path)


def stored_statistics(args, network, axes):
    """The statistics in the npz --reference, ours or ADM's. A collective.

    ADM's files bring statistics of ImageNet's training set by the TensorFlow network, and 10,000 images, of
    which precision and recall need the features; these are computed once, and cached.
    """
    path = args.reference
    require(pathlib.Path(path).is_file(), f"--reference {path} does not exist; download it, or make one with "
                                          f"`python evaluate.py make-reference`")
    stored = read_npz(path)
    require("arr_0" in stored, f"--reference {path} holds {', '.join(stored)} but no images (arr_0), so it "
            f"is not ADM's: statistics do not tell by which network and resize rule they were made")
    images = sample_array(path)
    require(images.shape[1:-1] == axes, f"--reference {path} is of images of {images.shape[1:-1]}, the "
            f"samples have {axes}; compare sets of one size (make-reference has --image-size)")
    if "settings" in stored:
        made_by = json.loads(str(stored["settings"]))["network"]
        require(made_by == network.source, f"--reference {path} is of other Inception weights; make it again")
        return stored
    key = {"sha256": runtime.on_main(runtime.sha256_of, path), "network": network.source}
    stream = FeatureStream(network, range(len(images)))
    computed = cached(args, key, lambda: stream.run(images, range(len(images)), args, "reference"))
    # ADM's statistics belong to the published network. Without any, it takes those of arr_0; so do we.
    if computed and network.source != RANDOM_LABEL and {"mu", "sigma", "mu_s", "sigma_s"} <= stored.keys():
        return {**stored, "features": computed["features"]}
    return computed


def make_reference(args):
    """Statistics of real images for `generation` to compare with, in ADM's format."""
    network = load_network("inception", args)
    real_statistics(args, network, (args.image_size, args.image_size), args.max_samples, args.reference)


# ---- 5. The paper's tables: their rows lie in tables.json; those of ours name what measures them -----------

def configuration(name):
    """What a preset of this code has, for tables 1 and 2: computed, not copied."""
    kind, _, presets = next(entry for entry in checkpoints.FORMATS.values() if name in entry[2])
    config = presets[name]
    with torch.device("meta"):                             # shapes without memory
        model = kind(config)
    if hasattr(config, "inter_blocks"):
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        numbers = [config.inter_blocks, config.intra_blocks, config.width, config.heads]
        return f"{parameters:.2f}M, {', '.join(map(str, numbers))}"
    side = config.resolution
    return f"{model.quantizer.vocabulary} codes, {side}x{side}, {config.downsampling}x"


def measured(what, results, args):
    """(cell, command) of a measurement in a table: its newest values here, and how to get what is missing."""
    path = getattr(args, what["data"])

    def fits(result):                                      # of this checkpoint, or our training of its preset
        made = result.get("checkpoint") or (result["sampling"] or {}).get("checkpoint", {})
        on = result.get("data") or result["reference"]
        return (made.get("preset") == what["checkpoint"] and result["protocol"] == args.protocol
                and on["path"] and os.path.abspath(on["path"]) == os.path.abspath(path)
                and on.get("size", what["size"]) == what["size"]
                and RANDOM_LABEL not in result["networks"].values())

    cell = ""
    found = {}
    if newest := max(filter(fits, results), key=lambda result: result["date"], default=None):
        found = newest["metrics"]
        shown = [METRICS[key].format.format(float(found[key]["value"])) if key in found else "-"
                 for key in what["metrics"]]
        cell = f"{what['data']} {' / '.join(shown)} ({newest['n']}, {args.protocol})"
    if all(key in found for key in what["metrics"]):
        return cell, None
    command = f"python evaluate.py generation --ckpt {what['checkpoint']} --reference {path}"
    if what["data"] != "reference":
        size = "--original-resolution" if what["size"] == "original" else f"--image-size {what['size']}"
        command = (f"python evaluate.py reconstruction --ckpt {what['checkpoint']} --data-path {path} {size} "
                   f"--metrics {' '.join(what['metrics'])}")
    return cell, f"{command} --protocol {args.protocol}"


def table(args):
    """One of the paper's tables, and beside our rows what was measured here, or how to measure it."""
    content = json.loads((pathlib.Path(__file__).parent / "tables.json").read_text())[str(args.number)]
    results = [json.loads(path.read_text()) for path in pathlib.Path(args.output).glob("*.json")]
    rows = []
    commands = []
    for row in content["rows"]:
        cells = [measured(what, results, args) for what in row.get("measure", ())]
        commands += [command for _, command in cells if command]
        own = configuration(row["preset"]) if "preset" in row else "-"
        if cells:
            own = "; ".join(cell for cell, _ in cells if cell) or "not yet"
        rows.append([*row["cells"], own])
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
    group.add_argument("--split", choices=data.SPLITS, help="part of the data set")
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
    p.add_argument("--image-size", type=count, help="side of the crops (the tokenizer's)")
    p.add_argument("--original-resolution", action="store_true", help="no resizing; pads to whole tokens")
    p.add_argument("--batch-size", type=count, help="at once on a rank (16 images, 4 clips)")
    add_flags(p, "what --ckpt was trained on, held out", "all")

    p = commands.add_parser("generation", help="judge generated samples", description=generation.__doc__)
    p.add_argument("--samples", help="npz with arr_0, or folder; not given: drawn from --ckpt, or else the "
                                     "newest npz of runs/samples, or else drawn from the newest of runs/ar")
    p.add_argument("--reference", help="npz, ADM's or of make-reference; made of --data-path if not given")
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
    """Run the command, in exact fp32: TF32 keeps 10 bits of each factor."""
    if args.command == "table":
        return table(args)
    args.device = runtime.setup_process_group(args.device).type
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    commands = {"reconstruction": reconstruction, "generation": generation, "make-reference": make_reference}
    commands[args.command](args)
    if args.command == "reconstruction" and newest_samples():
        runtime.print_main("runs/samples holds generated samples too: python evaluate.py generation (which "
                           "downloads 96 MB)")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
