"""Sets of samples, as evaluate.py compares them: read in order, seen by a network, their statistics kept.

An npz file is what ADM's evaluator reads: `arr_0`, uint8 images (N, H, W, 3) or here also clips (N, T, H, W,
3); of a reference set also `mu` and `sigma`, mean and covariance of Inception's features, and `mu_s` and
`sigma_s` of its spatial ones. Ours add `n`, `features` and `settings`, of what these are. Axis letters: B
samples of a batch, N of a set, T frames, H W their size, D features.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import weakref
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from support import data, layouts, loops, metrics, pictures, runtime, sources
from support.checkpoints import RANDOM_LABEL
from support.reading import (IMAGE_SUFFIXES, VIDEO_SUFFIXES, Unreadable, decoding, is_moving,
                             video_frames)
from support.runtime import require

WIDTHS = {"inception": (2048, 2023), "i3d": (400,)}        # networks that see sets: D of what they give
MOMENTS = ("mu", "sigma")
SPATIAL = ("mu_s", "sigma_s")
# The Frechet distances: of which moments.
FRECHET = {"rfid": MOMENTS, "rfid-reference": MOMENTS, "rfvd": MOMENTS, "fid": MOMENTS, "fvd": MOMENTS,
           "sfid": SPATIAL}

# ---- 1. Samples, read a batch at a time --------------------------------------------------------------------


def read_npz(path):
    """({name: array} of an npz file but for arr_0, a file of arr_0 or None). Raises `UserError`."""
    what = "is a folder" if os.path.isdir(path) else "does not exist"
    require(os.path.isfile(path), f"{path} {what}; check the path (or try make-reference)")
    try:
        archive = zipfile.ZipFile(path)
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name != "arr_0"}
        arrays["settings"] = dict(json.loads(str(arrays.get("settings", "{}"))))
    except (zipfile.BadZipFile, EOFError, ValueError, TypeError) as error:
        raise runtime.UserError(f"{path} is truncated or no npz file ({error}); copy it again") from None
    for name in arrays.keys() & {*MOMENTS, *SPATIAL, "features"}:
        require(np.isfinite(arrays[name]).all(), f"{path}: {name} is not finite; make it again")
    return arrays, archive.open("arr_0.npy") if "arr_0.npy" in archive.namelist() else None


class Npz(sources.Samples):
    """arr_0 of an npz file as a data set; `arrays` are the others.

    A sample is read when it is asked for, best in order: 50,000 images of 256 x 256 are 9.8 GB."""

    def __init__(self, path):
        self.arrays, self.file = read_npz(path)
        require(self.file, f"{path} holds no array arr_0, only {', '.join(self.arrays)}; statistics alone do "
                           f"not tell by which network and resize rule they were made")
        weakref.finalize(self, self.file.close)            # an error's traceback would hold it open
        try:
            np.lib.format.read_magic(self.file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.file)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise runtime.UserError(f"{path}: header of arr_0 is damaged ({error}); copy it again") from None
        N, *self.shape = shape or [0]
        self.start = self.file.tell()
        require(dtype == np.uint8 and not fortran and len(self.shape) in (3, 4) and self.shape[-1] == 3,
                f"{path}: arr_0 is {dtype} {[N, *self.shape]}; make it uint8 (N, [T,] H, W, 3) in C order by "
                f"(x * 255).round().astype('uint8') or .transpose(0, 2, 3, 1)")
        *frames, _, width, _ = self.shape
        view = data.View(width, *frames, crop="original")
        super().__init__(str(path), [], [f"{path}[{i}]" for i in range(N)], [0] * N, view)
        self.axes = tuple(self.shape[:-1])

    def read(self, index, rng):
        size = math.prod(self.shape)
        with decoding():
            self.file.seek(self.start + index * size)
            pixels = torch.frombuffer(bytearray(self.file.read(size)), dtype=torch.uint8)
        return pixels.view(self.shape).movedim(-1, 0)


@dataclasses.dataclass
class Chosen:
    """What is measured: the `samples` of a data set at the indices `order`; `about` is their record."""
    samples: sources.Samples
    order: list
    about: dict
    batch_size: int
    num_workers: int = 0

    def batches(self, title):
        """This rank's batches: (uint8 (B, 3, [T,] H, W), how many count, their indices). A collective.

        All of one shape, the last filled up by repetition, as convolutions of other shapes add in another
        order: a sample's numbers have the same last bits on any number of ranks."""
        workers = 0 if isinstance(self.samples, Npz) else self.num_workers       # its file has one position
        batches = data.eval_batches(self.samples, self.order, self.batch_size, workers)
        for x, _, indices in loops.watched(batches, title, unit="batches"):
            yield torch.cat([x, x[-1:].expand(self.batch_size - len(x), *x.shape[1:])]), len(x), indices
        self.samples.raise_if_broken(all_ranks=True)


def open_samples(path, of_clips=False):
    """(data set, what identifies it) of the samples in an npz file, or in a folder of images, or of
    clips, of one size. of_clips: folders of numbered pictures are meant as clips."""
    if not os.path.isdir(path):
        return Npz(path), runtime.on_main(loops.sha256_of, path)
    names = layouts.files_to_see(path, IMAGE_SUFFIXES + VIDEO_SUFFIXES, of_clips)
    files = [os.path.join(path, name) for name in names]
    require(files, f"--samples {path} holds no images or clips; check the path")
    sizes = set()
    for file in loops.watched(files, f"looking through {path}"):
        try:
            sizes.add(axes_of(file))
        except (OSError, Unreadable):
            raise runtime.UserError(f"--samples: {file} is empty or no image; make it again") from None
    require(len(sizes) < 2, f"--samples {path} mixes the sizes {sorted(sizes)[:2]}; all must have one")
    axes = sizes.pop()
    frames = axes[0] if len(axes) == 3 else None
    samples = sources.Folder(path, data.View(1, frames, "original"), typed=f"unlabelled:{path}")
    samples.axes = axes
    places = {os.path.dirname(name) for name in names}
    if not frames and "" not in places and all(os.path.basename(name)[:1].isdigit() for name in names):
        runtime.print_main(f"{path}: numbered pictures in {len(places)} subfolders are taken for single "
                           f"images; if these are clips, say so by --metrics fvd")
    if samples.paths[0].lower().endswith((".jpg", ".jpeg", ".jfif", ".mp4", ".avi", ".mkv")):
        runtime.print_main(f"warning: --samples {path}: JPEG and most videos are lossy, and metrics see that "
                           f"loss, too; save PNG, animated WebP, or an npz")
    return samples, runtime.on_main(data.fingerprint, samples, range(len(samples)))


def axes_of(file):
    """([T,] H, W) of an image or a clip. Raises `Unreadable` or OSError."""
    if file.lower().endswith(IMAGE_SUFFIXES):
        with decoding(), Image.open(file) as image:
            if not is_moving(image):
                return image.size[::-1]
    frames = video_frames(file)
    first = next(frames, None)
    if first is None:
        raise Unreadable("it has no frames")
    size = first().size[::-1]
    return 1 + sum(1 for _ in frames), *size


def reference(path, axes, batch_size):
    """`Chosen`: all of an npz file, to be compared with samples of these axes ([T,] H, W)."""
    samples = Npz(path)
    require(samples.axes == tuple(axes), f"--reference {path} is of images of {samples.axes}, not {axes}; "
                                         f"give one of that size (make-reference has --image-size)")
    about = {**samples.arrays["settings"], "path": path, "sha256": runtime.on_main(loops.sha256_of, path)}
    return Chosen(samples, range(len(samples)), about, batch_size)


def part_of(samples, trained_on):
    """Which part of a data set `samples` are, in words that promise no more than is known of a model that was
    trained on the paths `trained_on`. What it has learned is known by what is in it, not by a name."""
    path = trained_on["data_path"]
    learned = None                                         # unknown: published, or the data have moved away
    with contextlib.suppress(runtime.UserError):
        if path is not None:
            own = sources.build_dataset(path, "train", samples.view, trained_on["split_list"])
            learned = runtime.on_main(data.same_samples, own, samples)
    if learned:
        return f"training {samples.kind}s"
    if samples.part in ("val", "test"):
        return f"{samples.part} split"
    doubt = "not the training set as a whole" if learned is False else "which the model may have seen"
    return f"{samples.part} split, {doubt}" if samples.part else f"not parted, {doubt}"


# ---- 2. What a network makes of them -----------------------------------------------------------------------

def gathered(parts):
    """All ranks' `parts`, dicts of tensors (n, ...), joined, in the order of their "index": {name: tensor
    (N, ...)} on rank 0, elsewhere {}. A collective."""
    ranks = [None] * runtime.world_size() if runtime.is_main() else None
    dist.gather_object(parts, ranks)
    parts = [part for rank in ranks or () for part in rank]
    joined = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    return {name: tensor[joined["index"].argsort(stable=True)] for name, tensor in joined.items()}


@dataclasses.dataclass
class FeatureStream:
    """Sends samples through the network of a metric of sets, and keeps what distances of sets need."""
    network: torch.nn.Module
    rule: str = "tf1"                  # of `metrics.inception_input`
    kept: object = ()                  # of which indices to keep features and logits
    pixels: bool = False               # and the images themselves

    def __post_init__(self):
        self.device = next(self.network.parameters()).device
        self.moments = [metrics.Moments(D, self.device) for D in WIDTHS[self.network.name]]
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
        if self.pixels:
            found["arr_0"] = samples.movedim(1, -1)
        kept = torch.tensor([index in self.kept for index in indices.tolist()])
        self.parts.append({name: each[:n].cpu()[kept] for name, each in found.items()})

    def finish(self):
        """{name: array} on rank 0, elsewhere {}: n, the moments under ADM's names, and what was kept. A
        collective."""
        arrays = {name: tensor.numpy() for name, tensor in gathered(self.parts).items()}
        for names, moments in zip((MOMENTS, SPATIAL), self.moments):   # of I3D there are no spatial ones
            moments.n = int(runtime.all_reduce_sum(torch.tensor(moments.n)))
            moments.total = runtime.all_reduce_sum(moments.total)
            moments.outer = runtime.all_reduce_sum(moments.outer)
            if runtime.is_main():
                arrays.update(zip(names, moments.mean_and_covariance()), n=moments.n)
        return arrays


# ---- 3. Statistics that are made once ----------------------------------------------------------------------

def short_hash(value):
    """Eight hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def statistics_of(real, network, rule, official, folder, path=None):
    """The statistics of real samples as of `FeatureStream.finish`, made once and kept in `path`, or in a file
    in `folder` named after all that they depend on; on rank 0. A collective.

    With features, and of images these, of up to 10,000, for ADM's own evaluator to read. ADM's files bring
    statistics of ImageNet's training set, and 10,000 images, whose features are computed here. rule: of
    `metrics.inception_input`; not "tf1" where originals are compared with their reconstructions."""
    given = real.samples.arrays if isinstance(real.samples, Npz) else {}
    if given.get("settings"):
        require(given["settings"]["network"] == network.source,
                f"--reference {real.samples.name} is of other Inception weights; make it again")
        return given
    stream = FeatureStream(network, rule, pixels=not given and rule == "tf1" and network.name == "inception")
    key = {**real.about, "network": network.source, "protocol": "official" if official else "clean",
           "resize_rule": rule, "device": stream.device.type}          # whose convolutions differ
    del key["path"]                                                    # wherever they lie
    path = pathlib.Path(path or f"{folder}/references/{short_hash(key)}.npz")
    known = runtime.on_main(path.exists)
    runtime.print_main(f"cached   {path} ({'found' if known else 'made now'})")
    if not known:
        runtime.check_writable(path.parent)
        stream.kept = {real.order[k] for k in data.evenly_spaced(None if given else 10_000, len(real.order))}
        for x, n, indices in real.batches("real"):
            if official and rule != "tf1":                             # as it sees reconstructions
                x = pictures.to_float(x.to(stream.device))
                x = (x + 1) / 2 if network.name == "inception" else pictures.to_uint8(x, truncate=True)
            stream.add(x, n, indices)
        arrays = stream.finish()
        if runtime.is_main():
            with runtime.atomic(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, settings=np.array(json.dumps(key)), **arrays)
    if not runtime.is_main():
        return {}
    arrays, _ = read_npz(path)
    runtime.check_same(arrays["settings"], key, f"{path} exists, and")
    # ADM's statistics belong to the published network. Without any, it takes those of arr_0; so do we.
    if network.source != RANDOM_LABEL and {*MOMENTS, *SPATIAL} <= given.keys():
        return {**given, "features": arrays["features"]}
    return arrays


# ---- 4. Distances ------------------------------------------------------------------------------------------

def frechet(key, reference, made, official):
    """{metric `key`: Frechet distance of two sets}, whose statistics are as of `FeatureStream.finish`."""
    statistics = [arrays[name] for arrays in (reference, made) for name in FRECHET[key]]
    values = {key: metrics.frechet_distance(*statistics)}
    if official and key in ("fvd", "rfvd"):
        features = [torch.tensor(arrays["features"]) for arrays in (reference, made)]
        values[f"{key}-float32"] = metrics.frechet_distance_official(*features)
    return values


def distances(asked, reference, made, official, device, seed):
    """({metric: value}, facts about them) of samples and real ones, by what `FeatureStream.finish` gives."""
    n = made["n"]
    real = int(reference["n"]) if "n" in reference else "an unknown number of"
    if real != n:
        print(f"warning: {n} samples are compared with {real} real ones; distances depend on both")
    if n != 50_000:
        print(f"warning: published numbers are of 50,000 samples, these are of {n}")
    features = [torch.tensor(arrays["features"], device=device) for arrays in (reference, made)]
    facts = {"real": real, "near": len(features[0]), "pairs": min(map(len, features)),
             "digits": "fp16" if official else "fp32"}                 # fp16 as in ADM's evaluator
    values = {}
    both = None
    for key in loops.watched(asked, "distances", unit="metrics"):
        if key in FRECHET:
            values.update(frechet(key, reference, made, official))
        elif key == "inception_score":
            logits = torch.from_numpy(made["logits"])
            blocks = "blocks of 5,000 in file order"
            if not official:
                blocks = f"equal parts, shuffled with seed {seed}"
                logits = logits[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
            values[key], deviation, parts = metrics.inception_score(logits, equal_parts=not official)
            facts["blocks"] = f"{parts} {blocks}, std {deviation:.2f}"
        elif key in ("precision", "recall"):
            both = both or metrics.precision_recall(*features, half=official)
            values[key] = both[key == "recall"]
        elif key == "kid":
            values[key], deviation = metrics.kid(*features)
            facts["subsets"] = f"100 subsets of {min(1000, facts['pairs'])}, std {deviation:.5f}"
        elif key == "mind":
            values[key] = metrics.mind(*features)
    return values, facts


@torch.no_grad()
def token_distances(tokenizer, made, real, seed):
    """({metric: total variation}, facts) of the ids of samples and of as many real ones, and of these and as
    many others: what the best samples would have. A collective."""
    each = min(len(made.order), len(real.samples) // 2)
    mixed = np.random.default_rng(seed).permutation(len(real.samples))[:2 * each].tolist()
    spread = [made.order[k] for k in data.evenly_spaced(each, len(made.order))]
    device = next(tokenizer.parameters()).device
    counts = []
    for chosen, order in ((made, spread), (real, sorted(mixed[:each])), (real, sorted(mixed[each:]))):
        counts.append(tokenizer.quantizer.count(torch.zeros(0, dtype=torch.long, device=device)))
        for x, n, _ in dataclasses.replace(chosen, order=order).batches("tokens"):
            x = pictures.to_float(x[:n].to(device))
            for part in x.split(4 if x.dim() == 5 else n):               # clips are large
                counts[-1] += tokenizer.quantizer.count(tokenizer.encode(part))
    drawn, first, second = map(runtime.all_reduce_sum, counts)
    values = {"tokens": metrics.total_variation(drawn, first),
              "tokens-real": metrics.total_variation(second, first)}
    return values, {"each": each, "tokens": int(drawn[0].sum())}
