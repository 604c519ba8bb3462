"""Measuring: how faithful is a tokenizer, how good are generated samples, and the paper's tables.

A number without its protocol is no result. Most disputes over "your FID" are about the resize rule, the
reference set, the rounding or the number of images, so these are printed beside each number and stored in a
JSON. Where the official scripts have a quirk, there are two protocols:

    clean      what one would do today: pixels rounded to uint8 as an image file holds them, means over images
    official   what produced the published numbers, quirks included

    python evaluate.py                                       # what the earlier stages left in runs/
    python evaluate.py reconstruction --ckpt in1k-256 --data-path imagenet --metrics all --protocol official
    python evaluate.py reconstruction --ckpt ucf-128 --data-path ucf101 --metrics all --protocol official
    python evaluate.py generation                            # of the newest of runs/ar; downloads nothing
    python evaluate.py generation --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc-per-node=8 evaluate.py generation --ckpt AR-B --data-path imagenet --metrics all
    python evaluate.py make-reference --data-path imagenet --image-size 256
    python evaluate.py table 4 --imagenet imagenet

An image is a clip of one frame. Results of any number of ranks agree to 12 digits. Some metrics need networks
to be downloaded; --allow-random-weights tries the machinery out without, and marks what it prints as not
comparable. support/metrics.py explains the metrics, support/sets.py compares sets with them. Axis letters: B
samples of a batch, N of a set, T frames, H W their size.
"""
import argparse
import contextlib
import dataclasses
import datetime
import math
import os
import pathlib
import re
import shlex
import sys

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

import sample
from support import checkpoints, data, loops, metrics, pictures, runtime, sets, shapes, sources
from support.checkpoints import RANDOM_LABEL
from support.runtime import require
from support.sets import FRECHET, Chosen

# ---- 1. The metrics, and the record of a measurement -------------------------------------------------------

REC = "reconstruction"
GEN = "generation"
NOTHING = dict.fromkeys(checkpoints.TRAINED_ON)            # is known of what a model has learned from


@dataclasses.dataclass(frozen=True)
class Metric:
    """All that is known of a metric. A new one of images is a function in metrics.py and a row below."""
    name: str                          # as printed; facts of the run fill in its braces, and the note's
    format: str
    command: str                       # whose --metrics has it (None: it comes along with another)
    judge: object                      # function of uint8 originals and reconstructions, or a network's name
    note: str                          # measured on what, and by which definition where others have another
    least: int = 1                     # pixels a side that it needs; of clips, if I3D judges, frames


KINDS = {"inception": "image", "i3d": "clip"}              # what networks of sets see; other judges see both
SETS = "{n} samples, {real} {others}, "
NEAR = "{n} samples, {near} {others}, "
METRICS = {
    "psnr": Metric("PSNR (dB)", "{:.2f}", REC, metrics.psnr, "{pixels}, {mean}, of dB, not of errors"),
    "ssim": Metric("SSIM", "{:.4f}", REC, metrics.ssim, "{pixels}, {mean}, uniform 7 x 7 windows", 7),
    "lpips-vgg": Metric("LPIPS (VGG)", "{:.4f}", REC, "lpips-vgg", "{floats}, mean over all", 32),
    "lpips-alex": Metric("LPIPS (Alex)", "{:.4f}", REC, "lpips-alex", "{floats}, mean over all", 32),
    "usage": Metric("codebook usage", "{:.2%}", REC, None, "{tokens} tokens, {codebook}, {over}"),
    "perplexity": Metric("perplexity", "{:.1f}", None, None, "e^entropy of the ids, {codebook}"),
    "bits_per_pixel": Metric("bits per pixel", "{:.4f}", None, None, "{bits:g} bits a token"),
    "rfid": Metric("rFID", "{:.3f}", REC, "inception",
                   "{floats}, {n} images, resize {resize_rule} (pytorch-fid's, not ADM's)"),
    "rfid-reference": Metric("FID of reconstructions against {reference}", "{:.3f}", None, "inception",
                             "{pixels}, {n} images, resize tf1 (ADM's, not pytorch-fid's)"),
    "rfvd": Metric("rFVD", "{:.2f}", REC, "i3d",
                   "{pixels}, {n} clips of {frames} frames, logits, float64", 9),
    "rfvd-float32": Metric("rFVD, float32", "{:.2f}", None, "i3d", "with the official script's roundings"),
    "fid": Metric("FID", "{:.3f}", GEN, "inception", SETS + "resize tf1 (ADM's, not pytorch-fid's)"),
    "sfid": Metric("sFID", "{:.3f}", GEN, "inception", SETS + "resize tf1 (ADM's)"),
    "inception_score": Metric("Inception Score", "{:.2f}", GEN, "inception", "{blocks}, logits without bias"),
    "precision": Metric("precision", "{:.4f}", GEN, "inception", NEAR + "k = 3, {digits}"),
    "recall": Metric("recall", "{:.4f}", GEN, "inception", NEAR + "k = 3, {digits}"),
    "kid": Metric("KID", "{:.5f}", GEN, "inception", NEAR + "{subsets}, not times 1,000"),
    "mind": Metric("MIND", "{:.3f}", GEN, "inception", "{pairs} samples, as many {others}, 1,000 directions"),
    "fvd": Metric("FVD", "{:.2f}", GEN, "i3d", SETS + "{frames} frames, logits, float64", 9),
    "fvd-float32": Metric("FVD, float32", "{:.2f}", None, "i3d", "with the official script's roundings"),
    "tokens": Metric("token distance", "{:.4f}", GEN, None,
                     "{each} samples, as many {others}, {tokens} tokens, half the sum of |p - q|"),
    "tokens-real": Metric("the same if real", "{:.4f}", None, None, "others of these as samples: the bias")}


def metrics_for(command, kind, wanted=("all",)):
    """Those of --metrics `wanted`, in the order above. Says which there would be, too."""
    possible = [key for key, metric in METRICS.items()
                if metric.command == command and KINDS.get(metric.judge, kind) == kind]
    strange = sorted(set(wanted) - {*possible, "all"})
    require(not strange, f"--metrics {' '.join(strange)} is not for {kind}s; take {' '.join(possible)}")
    asked = [key for key in possible if key in wanted or "all" in wanted]
    left_out = [key for key in possible if key not in asked and METRICS[key].judge]
    if left_out:
        runtime.print_main(f"left out {', '.join(left_out)}; add --metrics all (networks are downloaded)")
    return asked


def check_size(axes, what, asked):
    """Raise `UserError` unless images or clips `what`, of axes ([T,] H, W), suffice for metrics `asked`."""
    for key in asked:
        least = METRICS[key].least
        size, unit = (axes[0], "frames") if METRICS[key].judge == "i3d" else (min(axes[-2:]), "pixels a side")
        require(size >= least, f"{what}: --metrics {key} needs {least} {unit} or more, not {size}")


def load_networks(asked, args, device):
    """{name: network} that metrics `asked` need, each with its `name` and the `source` of its weights."""
    networks = {}
    for name in sorted({METRICS[key].judge for key in asked if isinstance(METRICS[key].judge, str)}):
        eps = 1e-5 if args.protocol == "official" else 1e-3    # of I3D: in the official port, in TF
        network, source = checkpoints.load_network(name, args.weights_dir, args.allow_random_weights, eps)
        network.name = name
        network.source = source
        networks[name] = network.to(device)
    return networks


def report(args, subject, networks, values, facts, **record):
    """Print `values` {metric: number} about `subject`, a path, and write them to a JSON, of which the path is
    returned: other settings, other names. Rank 0 only.

    facts: what fills in the texts of `METRICS`, and "n", the number of samples. record: further settings."""
    entries = {}
    rows = []
    for key in [key for key in METRICS if key in values]:
        metric = METRICS[key]
        name = metric.name.format(**facts)
        note = metric.note.format(**facts)
        random = metric.judge in networks and networks[metric.judge].source == RANDOM_LABEL
        label = RANDOM_LABEL if random else ""
        rows.append([name, metric.format.format(values[key]), note, label])
        value = values[key] if math.isfinite(values[key]) else str(values[key])
        entries[key] = {"value": value, "measured_on": note, "label": label}
        if key in FRECHET and facts["n"] < 2 * sets.WIDTHS[metric.judge][0]:
            print(f"warning: {name} of {facts['n']} samples, fewer than two for each feature, is biased "
                  f"upwards; compare it with that of equally many")
    print()
    loops.print_table(rows, ["metric", "value", "measured on", ""])
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    record = {"command": args.command, "protocol": args.protocol, **record, "arguments": vars(args),
              "networks": {name: network.source for name, network in networks.items()}, "versions": versions}
    name = re.sub(r"[^\w.^-]", "_", pathlib.Path(os.path.abspath(subject)).stem, flags=re.ASCII)[:80]
    path = pathlib.Path(args.output, f"{args.command}-{name}-{sets.short_hash(record)}.json")
    date = datetime.datetime.now().isoformat()
    runtime.write_json(path, {"metrics": entries, "n": facts["n"], **record, "date": date})
    print(f"\nwritten to {path}")
    return path


# ---- 2. Reconstruction: what a sample loses on its way through the tokens (tables 3, 4 and 6) --------------

def reconstruction(args, device):
    """Judge a tokenizer, of images or of clips, by its reconstructions."""
    path = args.ckpt or runtime.latest_checkpoint("runs/tokenizer", "tokenizer checkpoint")
    model, info = checkpoints.load_tokenizer(path, not args.raw_weights)
    runtime.print_facts(("model", f"{info['path']}: {info['preset']}, {info['weights']} weights"))
    chosen = held_out(args, model.config, info["trained_on"])
    samples = chosen.samples
    size = chosen.about["size"]
    asked = metrics_for(REC, samples.kind, args.metrics)
    compared = {"rfid": chosen, "rfvd": chosen}                          # with reconstructions, as sets
    if args.reference:
        require(size != "original" and samples.kind == "image", "--reference is for images of one size")
        compared["rfid-reference"] = sets.reference(args.reference, samples.axes, chosen.batch_size)
        asked.append("rfid-reference")
    if size != "original":
        check_size(samples.axes, f"size {size} of {info['path']}", asked)
    networks = load_networks(asked, args, device)
    # Clean departs from the official resize rule only where a side exceeds Inception's 299 pixels.
    official = args.protocol == "official"
    antialias = not official and (size == "original" or size > 299)
    rule = "half-pixel-antialiased" if antialias else "half-pixel"
    part = sets.part_of(samples, info["trained_on"])
    info["sha256"] = runtime.on_main(checkpoints.weights_hash, model)
    runtime.print_facts(
        ("data", f"{len(chosen.order)} {samples.kind}s of {samples.name}, {part}, size {size}"),
        ("protocol", f"{args.protocol}, tokenizer in {args.mixed_precision}, metrics in fp32, "
                     f"{runtime.world_size()} x {device.type}"))
    judges = {}
    streams = {}
    references = {}
    for key in asked:
        judge = networks.get(METRICS[key].judge, METRICS[key].judge)
        if key in FRECHET:
            its = "tf1" if key == "rfid-reference" else rule             # ADM's rule beside ADM's file
            references[key] = sets.statistics_of(compared[key], judge, its, official, args.output)
            streams[key] = sets.FeatureStream(judge, its, range(len(samples)) if key == "rfvd" else ())
        elif judge:
            judges[key] = judge
    found = measure(model.to(device), chosen, judges, streams, official, args.mixed_precision)
    if runtime.is_main():
        values, facts = summarise(found, asked, chosen.about, part, official)
        for key, real in references.items():
            values.update(sets.frechet(key, real, found[key], official))
        facts.update(resize_rule=rule, reference=args.reference)
        path = report(args, info["path"], networks, values, facts, checkpoint=info, data=chosen.about,
                      part=part, resize_rule=rule)
        pairs = [found["examples"][index] for index in sorted(found["examples"])]
        sides = [min(256, *[original.shape[axis] for original, _ in pairs]) for axis in (-2, -1)]
        cropped = torch.stack([TF.center_crop(pair[k], sides) for k in (0, 1) for pair in pairs])
        written = pictures.save_samples(path.with_suffix(".png"), cropped, len(pairs))
        print(f"originals above reconstructions: {', '.join(map(str, written))}")


def held_out(args, config, trained_on):
    """`Chosen`: samples that a tokenizer has not seen, of what it has learned from.

    Protocol official, for clips: random crops of the training split, filled up to 10,000 with randomly chosen
    ones of the same (463 of UCF-101's 9,537), as in the script that the published rFVD of 16 came from."""
    require(not (config.frames and args.original_resolution), "--original-resolution is for images")
    crop = "original" if args.original_resolution else "center"
    split = args.split or "val"
    if config.frames and args.protocol == "official":
        crop = "random"
        split = args.split or "train"
    view = data.View(args.image_size or config.resolution, config.frames, crop, resize=args.resize,
                     seed=args.global_seed, start="center")
    batch_size = 1 if crop == "original" else args.batch_size or (4 if config.frames else 16)
    return choose(args, trained_on, split, view, args.num_samples, batch_size)


def choose(args, trained_on, split, view, count, batch_size):
    """`Chosen`: `count` (None: all) of --data-path or, without, of what a model was trained on."""
    path = args.data_path
    split_list = args.split_list
    resize = view.resize
    frame_stride = args.frame_stride
    if path is None and split_list is None:
        prefix = "" if split == "train" else "val_"
        path = trained_on[f"{prefix}data_path"] or trained_on["data_path"]
        split_list = trained_on[f"{prefix}split_list"]
        resize = resize or trained_on["resize"]
        frame_stride = frame_stride or trained_on["frame_stride"]
    view = dataclasses.replace(view, resize=resize, frame_stride=frame_stride or 1,
                               drop_alpha=args.protocol == "official")       # as the official loader does
    try:
        samples = sources.build_dataset(path, split, view, split_list)
    except runtime.UserError as error:
        if args.data_path or args.split_list:
            raise
        raise runtime.UserError(f"{error}. That is what the model was trained on: say with --data-path where "
                                f"it lies now") from None
    order = range(len(samples))
    if view.crop == "random":
        more = np.random.default_rng(view.seed).permutation(len(samples)).tolist()
        order = [*data.evenly_spaced(10_000, len(samples)), *more][:10_000]
    order = [order[k] for k in data.evenly_spaced(count, len(order))]
    about = {"path": path, "name": samples.name, "split": split, "split_list": split_list, "crop": view.crop,
             "resize": view.resize, "size": "original" if view.crop == "original" else view.image_size,
             "frames": view.frames, "n": len(order),
             "fingerprint": runtime.on_main(data.fingerprint, samples, order)}
    return Chosen(samples, order, about, batch_size, args.num_workers)


def reconstruct(model, x, multiple, precision):
    """x (B, 3, [T,] H, W) in [-1, 1] through the tokens: (reconstructions as x, ids (B, [t,] h, w)).

    H and W are padded with 0, mid-grey, to multiples of `multiple`, and cropped again."""
    height, width = x.shape[-2:]
    top = -height % multiple // 2
    left = -width % multiple // 2
    padded = F.pad(x, (left, -width % multiple - left, top, -height % multiple - top))
    with runtime.autocast(x.device, precision):
        ids = model.encode(padded)
        y = model.decode(ids)[..., top:top + height, left:left + width].float()
    require(bool(y.isfinite().all()), f"the tokenizer's output is not finite with --mixed-precision "
                                      f"{precision}; use bf16 or fp32")
    return y.clamp(-1, 1), ids


@torch.no_grad()
def measure(model, chosen, judges, streams, official, precision):
    """The measuring loop: every sample goes through the tokenizer once and is seen by every metric.

    Returns on rank 0 {metric: its value for each readable sample (n,), or what its stream finds}, "pixels" of
    samples (n,), "counts" of ids, and "examples", {index: uint8 original, reconstruction}. A collective."""
    multiple = 1
    if chosen.samples.view.crop == "original":             # officially 16 whatever the stride is
        multiple = math.lcm(16 if official else 1, model.config.downsampling)
    device = next(model.parameters()).device
    counts = model.quantizer.count(torch.zeros(0, dtype=torch.long, device=device))
    parts = []
    examples = {}                                                        # from all over the set, to look at
    to_show = [chosen.order[k] for k in data.evenly_spaced(8, len(chosen.order))]
    for originals, n, indices in chosen.batches("measuring"):
        check_size(originals.shape, chosen.samples.paths[int(indices[0])], judges)
        x = pictures.to_float(originals.to(device))                      # (B, 3, [T,] H, W)
        y, ids = reconstruct(model, x, multiple, precision)              # as x, (B, [t,] h, w)
        # clean: every metric sees the pixels that an image file would hold. official: truncated ones, the
        # originals too (levels 1 to 95 lose one: up to 0.04 dB), and LPIPS and rFID see floats.
        real = pictures.to_uint8(x, truncate=official)
        made = pictures.to_uint8(y, truncate=official)
        if not official:
            y = pictures.to_float(made)
        parts.append({"index": indices, "pixels": torch.full((n,), x[0, 0].numel())})
        for key, judge in judges.items():
            pair = (x, y) if isinstance(judge, torch.nn.Module) else (real, made)
            each = judge(*map(metrics.as_frames, pair))                  # (B * T,)
            parts[-1][key] = each.double().view(len(x), -1).mean(1)[:n].cpu()
        counts += model.quantizer.count(ids[:n])
        for key, stream in streams.items():
            stream.add((y + 1) / 2 if official and key == "rfid" else made, n, indices)
        for j, index in enumerate(indices.tolist()):
            if index in to_show:
                examples[index] = [originals[j].clone(), made[j].cpu().clone()]
    examples = {index: pair for some in runtime.gather_objects(examples) for index, pair in some.items()}
    return {"counts": runtime.all_reduce_sum(counts), "examples": examples, **sets.gathered(parts),
            **{key: stream.finish() for key, stream in streams.items()}}


def summarise(found, asked, about, part, official):
    """({metric: value}, facts for `report`) of what `measure` has found, distances of sets left out."""
    n = len(found["pixels"])
    groups, size = found["counts"].shape
    tokens = int(found["counts"][0].sum())
    bits = groups * math.log2(size)
    pixels = "truncated uint8" if official else "rounded uint8"
    # The official script averages PSNR and SSIM over its batches, of four images or of one.
    batch = 4 if official and not about["frames"] and about["size"] != "original" else 1
    facts = {"n": n, "frames": about["frames"], "bits": bits, "tokens": tokens, "pixels": pixels,
             "floats": "floats" if official else pixels,
             "mean": f"mean over batches of {batch}" if batch > 1 else "mean over all",
             "codebook": f"{groups} codebooks of {size}" if groups > 1 else f"a codebook of {size}",
             "over": f"{n} {'clip' if about['frames'] else 'image'}s of {about['name']}, {part}"}
    values = {}
    for key in [key for key in asked if METRICS[key].judge and key not in FRECHET]:
        means = [some.mean() for some in found[key].split(batch if callable(METRICS[key].judge) else 1)]
        values[key] = float(torch.stack(means).mean())
    if "usage" in asked:
        values.update(metrics.codebook_usage(found["counts"]))
        values["bits_per_pixel"] = float(bits * tokens / found["pixels"].double().sum())
    return values, facts


# ---- 3. Generation: do samples look like real ones, and like all of them (table 5)? ------------------------

def generation(args, device):
    """Judge generated samples: FID and the like of images, FVD of clips, the ids of both."""
    path = args.samples
    model, tokenizer, info = drawing_model(args)
    if path:
        of_clips = "fvd" in args.metrics or bool(tokenizer and tokenizer.config.frames)
        samples, sha256 = sets.open_samples(path, of_clips)
        axes = samples.axes
        count = args.num_samples or len(samples)
    else:
        *steps, rows, columns = model.config.grid
        frames = [1 + (t - 1) * tokenizer.config.time_stride for t in steps]
        axes = (*frames, rows * tokenizer.config.downsampling, columns * tokenizer.config.downsampling)
        count = args.num_samples or (50_000 if info["source"] == "published" else 5_000)
    real, others = real_samples(args, info["trained_on"], axes, count)
    untold = not model or args.reference and not args.metrics            # ids: nobody's, or not asked for
    asked = metrics_for(GEN, real.samples.kind, args.metrics or ["all" if untold else "tokens"])
    asked = [key for key in asked if not (untold and key == "tokens")]
    check_size(axes, path or info["path"], asked)
    networks = load_networks(asked, args, device)
    if not path:
        if not (args.num_samples or args.reference):
            count = len(real.order)                                      # no more than the model has seen
        path = draw(args, info["path"], count, device)
        samples, sha256 = sets.open_samples(path)
    order = data.evenly_spaced(args.num_samples, len(samples))
    n = len(order)
    require(min(n, len(real.order)) > 3, f"{path} holds {n} samples, there are {len(real.order)} {others}; "
                                         f"four or more of each are needed")
    about = {"path": path, "axes": list(axes), "sha256": sha256}
    made = Chosen(samples, order, about, args.batch_size, args.num_workers)
    runtime.print_facts(("samples", f"{path}, {n} of {' x '.join(map(str, axes))}"),
                        ("real", f"{len(real.order)} {others}"),
                        ("protocol", f"{args.protocol}, {runtime.world_size()} x {device.type}"))
    facts = {"n": n, "others": others, "frames": axes[0]}
    values = {}
    if "tokens" in asked:
        values, found = sets.token_distances(tokenizer.to(device), made, real, args.global_seed)
        facts.update(found)
    official = args.protocol == "official"
    for network in networks.values():                                    # one at most
        reference = sets.statistics_of(real, network, "tf1", official, args.output)
        stream = sets.FeatureStream(network, "tf1", range(len(samples)))
        for batch in made.batches("samples"):
            stream.add(*batch)
        drawn = stream.finish()
        if runtime.is_main():
            require(drawn["n"] == n, f"{n - drawn['n']} of {n} samples in {path} are broken; make them again")
            distances, found = sets.distances(asked, reference, drawn, official, device, args.global_seed)
            values.update(distances)
            facts.update(found)
    if runtime.is_main():
        report(args, path, networks, values, facts, samples=about, sampling=record_of(path),
               reference=real.about, tokenizer=info["tokenizer"] if "tokens" in asked else None)


def drawing_model(args):
    """(AR model, its tokenizer, info as of `checkpoints.load_pair`) that draws or, as --ckpt or their record
    says, has drawn the --samples. Where nothing tells: no models, and an info that knows no data."""
    ckpt = args.ckpt
    if args.samples:
        given = [f"--{name.replace('_', '-')}" for name in ("cfg_scale", "temperature", "top_k", "top_p")
                 if vars(args)[name] is not None]
        require(not given, f"--samples {args.samples} is drawn already, without {', '.join(given)}")
        drawn_by = record_of(args.samples).get("checkpoint")
        path = drawn_by.get("path", "") if isinstance(drawn_by, dict) else ""
        if not (ckpt or os.path.exists(path) or "tokens" in args.metrics):
            return None, None, {"trained_on": NOTHING}
        ckpt = ckpt or path
    return checkpoints.load_pair(ckpt, args.tokenizer, not args.raw_weights)


def record_of(path):
    """What sample.py has written down beside an npz file; {} where there is nothing."""
    beside = pathlib.Path(os.path.splitext(os.path.abspath(path))[0] + ".json")
    return runtime.read_json(beside) if beside.is_file() else {}


def real_samples(args, trained_on, axes, count):
    """(`Chosen`, its name) to compare samples of these axes with: --reference, or `count` as of `choose`."""
    if args.reference:
        return sets.reference(args.reference, axes, args.batch_size), f"in {args.reference}"
    require(axes[-1] == axes[-2], f"samples are of {list(axes)}; make square ones, or give a --reference")
    view = data.View(axes[-1], axes[0] if len(axes) == 3 else None, resize=args.resize)
    real = choose(args, trained_on, args.split or "train", view, count, args.batch_size)
    part = sets.part_of(real.samples, trained_on)
    return real, f"{real.samples.kind}s of {real.samples.name}, {part}"


def draw(args, ckpt, n, device):
    """The path of an npz file of n samples by `ckpt`, drawn now unless they are there already."""
    how = vars(sample.get_args([]))
    how.update({name: value for name, value in vars(args).items() if name in how})
    how.update(ckpt=ckpt, num_fid_samples=n, output=None)
    made_with = [how, os.stat(ckpt).st_mtime, device.type, torch.__version__]
    how["output"] = f"runs/samples/drawn-{sets.short_hash(made_with)}.npz"
    if not runtime.on_main(os.path.exists, how["output"]):
        sample.main(argparse.Namespace(**how))
        runtime.barrier()                                                # rank 0 has joined the parts
    return how["output"]


def make_reference(args, device):
    """Statistics of real images for `generation` to compare with, in ADM's format."""
    view = data.View(args.image_size, resize=args.resize)
    real = choose(args, NOTHING, args.split or "train", view, args.num_samples, args.batch_size)
    network = load_networks(["fid"], args, device)["inception"]
    sets.statistics_of(real, network, "tf1", args.protocol == "official", args.output, args.reference)


# ---- 4. The paper's tables: support/tables.json has their rows, and of ours the flags that measure them ----

def measured(flags, results):
    """(cell of a table, whether it is complete): the newest values here of what these flags would measure."""
    wanted = get_args(flags)
    path = wanted.reference or wanted.data_path
    size = "original" if "--original-resolution" in flags else vars(wanted).get("image_size")
    found = []
    for result in results:                                 # of this checkpoint, or our training of its preset
        made = result.get("checkpoint") or result.get("sampling", {}).get("checkpoint")
        on = result.get("data") or result["reference"]
        if (isinstance(made, dict) and made.get("preset") == wanted.ckpt
                and on["path"] and os.path.abspath(on["path"]) == os.path.abspath(path)
                and size in (None, on.get("size")) and result["protocol"] == wanted.protocol
                and RANDOM_LABEL not in result["networks"].values()):
            found.append((set(wanted.metrics) <= result["metrics"].keys(), result["date"], result))
    if not found:
        return "", False
    complete, _, best = max(found, key=lambda entry: entry[:2])
    values = [METRICS[key].format.format(float(best["metrics"][key]["value"]))
              if key in best["metrics"] else "-" for key in wanted.metrics]
    return f"{pathlib.Path(path).name} {' / '.join(values)} ({best['n']}, {wanted.protocol})", complete


def table(args):
    """One of the paper's tables, and beside our rows what was measured here, or how to measure it."""
    content = runtime.read_json(pathlib.Path(__file__).parent / "support/tables.json")[str(args.number)]
    results = []
    for path in pathlib.Path(args.output).glob("*.json"):
        with contextlib.suppress(runtime.UserError):       # torn; what has other keys is another program's
            results.append(runtime.read_json(path))
    results = [each for each in results if {"metrics", "n", "protocol", "networks", "date"} <= each.keys()]
    rows = []
    commands = []
    for row in content["rows"]:
        cells = []
        for text in row.get("measure", ()):
            flags = [word.format(**vars(args)) for word in f"{text} --protocol {args.protocol}".split()]
            cell, complete = measured(flags, results)
            cells.append(cell)
            if not complete:
                commands.append(f"python evaluate.py {shlex.join(flags)}")
        own = row.get("own", "not yet" if cells else "-")              # of tables 1 and 2: what presets have
        rows.append([*row["cells"], "; ".join(filter(None, cells)) or own])
    print(f"Table {args.number}. {content['title']}\n")
    loops.print_table(rows, content["header"])
    if content["note"]:
        print(f"\n{content['note']}")
    if commands:
        print("\nTo measure what is missing (checkpoints are downloaded):\n  " + "\n  ".join(commands))


# ---- 5. Flags ----------------------------------------------------------------------------------------------

def add_flags(parser, data_default, count_default):
    """Flags of every command that measures. The texts say what holds if a flag is not given."""
    group = parser.add_argument_group("real samples")
    group.add_argument("--data-path", help=f"folder, tar files or generated[-plain] ({data_default})")
    group.add_argument("--split", choices=shapes.SPLITS, help="part of the data set")
    group.add_argument("--split-list", help="official UCF-101 list of the clips to use, as testlist01.txt")
    group.add_argument("--num-samples", type=runtime.positive_int, help=f"how many ({count_default})")
    group.add_argument("--resize", type=runtime.positive_int, help="shorter side before the crop")
    group.add_argument("--frame-stride", type=runtime.positive_int, help="of clips: every n-th frame")
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
    """Parse the command line; without a command, it is `reconstruction`."""
    parser = runtime.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    count = runtime.positive_int
    names = {command: [key for key, metric in METRICS.items() if metric.command == command] + ["all"]
             for command in (REC, GEN)}
    p = commands.add_parser(REC, help="judge a tokenizer", description=reconstruction.__doc__)
    p.add_argument("--ckpt", help="tokenizer, a file or a published name; the newest of runs/tokenizer")
    p.add_argument("--raw-weights", action="store_true", help="the raw weights, not their EMA")
    p.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="fp32", help="tokenizer's")
    p.add_argument("--metrics", nargs="+", choices=names[REC], default=["psnr", "ssim", "usage"],
                   help="usage brings perplexity and bits per pixel")
    p.add_argument("--reference", help="npz as for generation: also the FID of reconstructions against it")
    p.add_argument("--image-size", type=count, help="side of the crops (the tokenizer's)")
    p.add_argument("--original-resolution", action="store_true", help="no resizing; pads to whole tokens")
    p.add_argument("--batch-size", type=count, help="at once on a rank (16 images, 4 clips)")
    add_flags(p, "what --ckpt was trained on, held out", "all of them")
    p = commands.add_parser(GEN, help="judge generated samples", description=generation.__doc__)
    p.add_argument("--samples", help="npz with arr_0, or folder of images; not given: drawn from --ckpt")
    p.add_argument("--reference", help="npz, ADM's or of make-reference; not given: made of --data-path")
    p.add_argument("--metrics", nargs="+", choices=names[GEN], default=[], help="not given: tokens; the rest"
                   " with --reference. Without tokens where nothing tells which model has drawn --samples")
    sample.add_drawing_flags(p)                            # with --batch-size
    add_flags(p, "what the model was trained on", "of both: those in --samples, or 5,000 drawn, but no more "
              "than the model learned from; of a published one 50,000")
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
    p.add_argument("--protocol", choices=("official", "clean"), default="official", help="of what is shown")
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("--") and argv[0] != "--help":
        argv = [REC, *argv]
    return parser.parse_args(argv)


def main(args):
    """Run the command, in exact fp32: TF32 keeps 10 bits of each factor. Convolutions have it off already."""
    if args.command == "table":
        return table(args)
    device = runtime.setup_process_group(args.device)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic = True
    runtime.check_writable(args.output)
    {REC: reconstruction, GEN: generation, "make-reference": make_reference}[args.command](args, device)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
