"""What a network sees of images and clips, their order, and the shares of ranks (sources.py: from where).

What a network sees of a file is decided by a `View`: PIL's antialiased bilinear resize of the shorter side,
then a square crop, the same in training, evaluation and the reference of FID. Samples stay uint8 until
`pictures.to_float` maps them to [-1, 1] on the device that computes with them. A clip is T consecutive frames
of a video, each treated like an image, all with the same crop; what is said of images here holds for clips.

Nothing depends on how many workers or ranks read the data. Order, crops and flips are functions of (seed,
epoch, index), so a run can be resumed at any step and repeated on another number of GPUs.

Axis letters: B samples, 3 colours, H and W as stored, S the side after cropping, T frames.

    python -m support.data  # the generated set, 10 classes
    python -m support.data --data-path imagenet --split val --image-size 256  # train/ and val/ of classes
    python -m support.data --data-path torchvision:CIFAR10  # downloaded on first use
    python -m support.data --data-path 'shards-{000..127}.tar' --check-all  # read all, list the broken
    python -m support.data --data-path ucf101 --frames 17 --image-size 128  # clips

Each prints a summary and writes a labelled grid of what the networks would see to runs/data.png (.webp).
"""
import sys

if not __package__:
    print("error: in the folder above, type: python -m support.data", file=sys.stderr)
    sys.exit(2)

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time

import numpy as np
import torch
import torchvision.transforms.functional as TF
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from support import loops, pictures, runtime
from support.reading import MAX_PIXELS, Unreadable
from support.runtime import require
from support.shapes import SPLITS
from support.sources import build_dataset

# ---- 1. What a network sees of a file ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """How samples are looked at: images (3, S, S), or clips (3, T, S, S) where `frames` are given.

    crop: "center" (evaluation), "random" (training), "ten" (for stage II: (10, 3, [T,] S, S), corners and
    centre at 1.1 x the size, or five clips from the first frame to the last, and their mirror images), or
    "original", images neither cropped nor resized.
    """
    image_size: int                             # S
    frames: int = None                          # T
    crop: str = "center"
    flip: bool = False                          # mirror half of the samples (published: no)
    resize: int = None                          # the shorter side before the crop (None: S)
    seed: int = 0                               # of crops and flips, where nobody gives another
    start: str = None                           # of clips in their video: center, random (None: as crop)
    frame_stride: int = 1                       # of clips: every n-th frame of the video
    drop_alpha: bool = False                    # what is transparent: not on white, but as if it were opaque

    def __post_init__(self):
        require(self.resize is None or self.resize >= self.image_size, f"--resize {self.resize} is smaller "
                f"than --image-size {self.image_size}: the crop would not fit")
        side = self.resize or self.image_size
        require(side ** 2 * (self.frames or 1) <= MAX_PIXELS, f"--image-size, --resize or --frames: "
                f"{self.frames or 1} images of {side} pixels a side would not fit into memory")

    def pixels(self, image, rng=None):
        """PIL RGB image (H, W) to uint8 (3, S, S), or (10, 3, S, S) of ten crops, as this view says.

        Resizing a tensor, or cropping as the ADM evaluator does, moves pixels by up to a level on average:
        FID then compares other images. Raises `Unreadable` where a side would not fit into memory.
        """
        if self.crop == "original":
            return TF.pil_to_tensor(image)
        size = self.image_size
        shorter = int(1.1 * size) if self.crop == "ten" else self.resize or size
        if shorter ** 2 * max(image.size) / min(image.size) > MAX_PIXELS:
            raise Unreadable(f"{image.width} x {image.height} pixels are too unequal to be resized")
        image = TF.resize(image, shorter, TF.InterpolationMode.BILINEAR)
        if self.crop == "ten":
            crops = torch.stack(TF.five_crop(TF.pil_to_tensor(image), size))
            return torch.cat([crops, crops.flip(-1)])
        if self.crop == "random":
            top = int(rng.integers(image.height - size + 1))
            left = int(rng.integers(image.width - size + 1))
            image = TF.crop(image, top, left, size, size)
        else:
            image = TF.center_crop(image, size)
        if self.flip and rng.random() < 0.5:
            image = TF.hflip(image)
        return TF.pil_to_tensor(image)


# ---- 2. Order, shares of ranks, batches --------------------------------------------------------------------

def evenly_spaced(count, length):
    """`count` of the indices 0 .. length - 1 (None: all): of as many equal parts one each, always the same.

    So a set sorted by class keeps every class; drawn at random, as one whose classes take turns would lose
    nine of ten to a step of 10. All of them are a range, which takes no memory.
    """
    count = min(count or length, length)
    if count == length:
        return range(length)
    edges = np.arange(count + 1) * length // count
    return np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist()


def fingerprint(dataset, indices, like="2:"):
    """What identifies `dataset[indices]`, wherever the data lie, in under a second.

    "2:" and a sha256 of the view, all names in the set, the indices and their labels, the sizes of 1,000
    files, and 16 of the samples. So it misses a file that has changed under its name, unless it is one of the
    1,000 and has another size now, or one of the 16.
    like: a recorded one. Older versions wrote another kind, without "2:"; for such a one, that is returned.
    """
    indices = np.asarray(indices, np.int64)
    if not like.startswith("2:"):
        return older_fingerprint(dataset, indices)
    some = indices[list(evenly_spaced(1000, len(indices)))]
    view = {field.name: getattr(dataset.view, field.name) for field in dataclasses.fields(View)
            if getattr(dataset.view, field.name) != field.default}       # so that new fields change nothing
    digest = hashlib.sha256(json.dumps([view, sizes_of_files(dataset, some)]).encode())
    for facts in (dataset.paths.text, torch.from_numpy(indices), dataset.labels[torch.from_numpy(indices)]):
        digest.update(facts.numpy())
    return "2:" + with_samples(digest, dataset, indices)


def older_fingerprint(dataset, indices):
    """The same in the form of older versions: of all files' sizes, which takes a while, and of no names."""
    labels = dataset.labels[torch.from_numpy(indices)].tolist()
    facts = [dataclasses.astuple(dataset.view)[:7], len(dataset), labels, sizes_of_files(dataset, indices)]
    return with_samples(hashlib.sha256(json.dumps(facts).encode()), dataset, indices)


def sizes_of_files(dataset, indices):
    """The bytes of each file, where a sample is one (of a folder, each disk has its own): a list."""
    paths = [dataset.paths[i] for i in indices]
    return [os.path.getsize(path) for path in paths if os.path.isfile(path)]


def with_samples(digest, dataset, indices):
    """The hexadecimal digits of `digest` after 16 of the samples."""
    for i in evenly_spaced(16, len(indices)):
        sample = dataset[indices[i]]
        digest.update(sample[0].numpy().tobytes() if sample else b"broken")
    return digest.hexdigest()


def same_samples(first, second):
    """Whether two sets hold the same, wherever it lies and however it is looked at, or the second's files (16
    are looked up) are all among the first's: then none is held out."""
    if first.paths.prefix:
        start, folder = [os.path.join(os.path.realpath(each.paths.prefix), "") for each in (first, second)]
        some = [second.paths[i] for i in evenly_spaced(16, len(second))]
        paths = [folder + name.removeprefix(second.paths.prefix) for name in some]
        known = b"\0" + first.paths.text.numpy().tobytes()
        found = sum(any(b"\0%b\0" % os.fsencode(each.removeprefix(start)) in known
                        for each in (path, os.path.realpath(path))) for path in paths)    # or links to them
        if found == len(paths):
            return True
        if found:
            runtime.print_main(f"warning: {found} of {len(paths)} {second.kind}s of {second.name} that were "
                               f"looked up are among those of {first.name}, too: they are not held out")
    if not torch.equal(first.paths.text, second.paths.text):
        return False
    prints = []
    for dataset in (first, second):
        alike = copy.copy(dataset)
        alike.view = View(16, first.view.frames)
        prints.append(fingerprint(alike, range(len(alike))))
    return prints[0] == prints[1]


@functools.lru_cache(maxsize=2)
def epoch_order(length, seed, epoch):
    """All indices of a data set in the order of this epoch, int64 (length,)."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def train_loader(dataset, global_batch_size, seed, start_step=0, accumulation=1, num_workers=0):
    """Endless micro-batches (x uint8 (b, 3, ...), labels, indices (b,)) of this rank, `accumulation` a step.

    The global batch of a step depends on (data set, size, seed, step) alone. It is cut into `accumulation`
    parts and each of these into a share for each rank; joined in this order, the shares of any cut are the
    same batch. What remains of an epoch's permutation after its last whole batch is dropped. Raises
    `UserError` for a batch that cannot be cut so or is too large, and later when more than 1 % are broken.
    """
    rank = runtime.rank()
    world_size = runtime.world_size()
    require(global_batch_size <= len(dataset), f"--global-batch-size {global_batch_size} is more than the "
            f"{len(dataset)} {dataset.kind}s of {dataset.name}; lower it")
    share = loops.micro_batch_size(global_batch_size, accumulation)

    def shares_of_this_rank():
        for step in itertools.count(start_step):
            epoch, position = divmod(step, len(dataset) // global_batch_size)
            batch = epoch_order(len(dataset), seed, epoch)[position * global_batch_size:][:global_batch_size]
            for first in range(rank * share, global_batch_size, world_size * share):
                yield [(index, (seed, epoch, index)) for index in batch[first:first + share].tolist()]

    return batches(dataset, shares_of_this_rank(), num_workers)


class eval_batches:
    """One pass over `dataset[indices]` in batches as of `train_loader`; its `len` is their number.

    Batch k goes to rank k mod R, so that a sample's neighbours, and the last bits of its results, do not
    depend on R. Ranks may differ in number (do not communicate inside the loop). Broken samples are left out.
    """

    def __init__(self, dataset, indices, batch_size, num_workers=0):
        self.dataset = dataset
        self.num_workers = num_workers
        self.indices = np.asarray(indices, np.int64)
        self.batch_size = batch_size
        self.firsts = range(0, len(indices), batch_size)[runtime.rank()::runtime.world_size()]

    def __len__(self):
        return len(self.firsts)

    @property
    def parts(self):
        """The indices of each batch, int64 arrays, which are cut one by one."""
        return (self.indices[first:first + self.batch_size] for first in self.firsts)

    def __iter__(self):
        seed = self.dataset.view.seed
        requests = ([(index, (seed, index)) for index in part.tolist()] for part in self.parts)
        found = batches(self.dataset, requests, self.num_workers)
        for (x, labels, indices), part in zip(found, self.parts):
            asked = indices == torch.from_numpy(part)     # others stand in for broken ones
            if asked.any():
                yield x[asked], labels[asked], indices[asked]


def batches(dataset, requests, num_workers):
    """The batches for each list of (index, seed) in `requests`, with an eye on the broken samples."""
    asked, requests = itertools.tee(requests)
    loader = DataLoader(dataset, batch_sampler=requests, collate_fn=collate, num_workers=num_workers,
                        worker_init_fn=runtime.follow_trainer, pin_memory=torch.cuda.is_available(),
                        generator=torch.Generator())      # its own: the global one must not depend on loaders
    found = runtime.start_workers(loader)
    try:
        for batch, request in zip(found, asked):
            if batch is None or batch[2].tolist() != [index for index, _ in request]:
                dataset.raise_if_broken()                 # others stand in: only then is it time to count
            yield batch
    finally:
        del found                                         # ends the workers now, not with a traceback's cycle


def collate(items):
    """[x, labels, indices] of items; None where too many are broken, for then `batches` stops."""
    if isinstance(items, tuple):                          # one batch already: tokens
        return items
    return None if None in items else default_collate(items)


# ---- 3. Looking at a data set ------------------------------------------------------------------------------

def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    count = runtime.positive_int
    parser.add_argument("--data-path", default="generated", help="folder of images or videos, tar files as "
                        "in 'shards-{000..127}.tar', or the built-in sets generated and generated-plain")
    parser.add_argument("--frames", type=count, help="look at clips of so many frames")
    parser.add_argument("--frame-stride", type=count, default=1, help="of clips: every n-th frame")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which part of the data")
    parser.add_argument("--image-size", type=count, default=64, help="side of the square crop")
    parser.add_argument("--resize", type=count, help="shorter side before the crop (--image-size)")
    parser.add_argument("--crop", choices=("center", "random"), default="center", help="where it is taken")
    parser.add_argument("--flip", action="store_true", help="mirror every second sample at random")
    parser.add_argument("--output", default="runs/data.png", help="the grid; of clips webp or gif, and a PNG")
    parser.add_argument("--check-all", action="store_true", help="read every sample, not just those shown")
    parser.add_argument("--num-workers", type=runtime.non_negative_int, default=0, help="processes that read")
    return parser.parse_args(argv)


def main(args):
    """Write the grid and print what the data set holds."""
    view = View(args.image_size, args.frames, args.crop, args.flip, args.resize,
                frame_stride=args.frame_stride)
    dataset = build_dataset(args.data_path, args.split, view)
    require(args.frames or args.output.lower().endswith(".png"), f"--output {args.output} is no .png")
    by_class = dataset.labels.argsort(stable=True)        # a row for each of ten
    chosen = by_class[list(evenly_spaced(40 if args.frames else 80, len(dataset)))].tolist()
    start = time.perf_counter()
    shown = [dataset[index] for index in chosen]
    milliseconds = (time.perf_counter() - start) / len(chosen) * 1000
    if args.check_all:
        everything = eval_batches(dataset, range(len(dataset)), 64, args.num_workers)
        for _ in tqdm(everything, "reading", disable=None):
            pass
    dataset.raise_if_broken()
    counts = dataset.labels.bincount(minlength=10).tolist()
    classes = [f"{name} {count}" for name, count in zip(dataset.classes[:10], counts)]
    runtime.print_facts(
        ("data", dataset.name),
        (f"{dataset.kind}s", f"{len(dataset)}, {milliseconds:.2f} ms to read one, "
                             f"{dataset.count_broken()} known to be broken"),
        ("classes", f"{len(dataset.classes)}: {', '.join(classes)}"),
        ("seen as", f"{' x '.join(map(str, dataset.axes))}, {view.crop} crop"))
    captions = [dataset.classes[label] if dataset.classes else str(index) for _, label, index in shown]
    images = torch.stack([x for x, _, _ in shown])
    written = pictures.save_samples(args.output, images, max(1, len(chosen) // 10), captions)
    print(f"wrote    {', '.join(map(str, written))}")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
