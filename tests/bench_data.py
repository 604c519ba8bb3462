"""What a data set of ImageNet's size costs, beside torchvision's ImageFolder in the same run:

    python tests/bench.py data --images 1281000                            # a quarter of an hour, 3 GB

The files are hard links, in 1,000 folders, to a hundred JPEGs of 500 x 375, in a temporary folder. Memory is
what a worker has to itself (/proc/PID/smaps_rollup, Linux), above that for a set of 100 images.
"""
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np                                                         # noqa: E402
import torch                                                               # noqa: E402
import torchvision.transforms as transforms                                # noqa: E402
from PIL import Image                                                      # noqa: E402
from torch.utils.data import DataLoader                                    # noqa: E402
from torchvision.datasets import ImageFolder                               # noqa: E402

from support import data, loops, runtime, sources                          # noqa: E402

VIEW = data.View(256, crop="random", flip=True)
TRANSFORM = transforms.Compose([transforms.Resize(256), transforms.RandomCrop(256),
                                transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def make_images(root, count, folders):
    """`count` hard links, in `folders` class folders below root/set, to 100 JPEGs of a photo's detail."""
    originals = []
    for i in range(min(100, count)):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        pixels = smooth + rng.normal(0, 8, smooth.shape)
        originals.append(root / f"{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(originals[-1], quality=90)
    for label in range(folders):
        folder = root / "set" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for i in range(label, count, folders):
            os.link(originals[i % len(originals)], folder / f"n{label:08d}_{i}.JPEG")
    return str(root / "set")


def make_shards(root, count, shards):
    """A pattern of `shards` tar files of count / shards small images, hard links to one."""
    with tarfile.open(root / "0.tar", "w") as tar:
        for i in range(count // shards):
            for suffix, content in (("jpg", b"x" * 400), ("cls", b"0")):
                member = tarfile.TarInfo(f"n00000000_{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (root / "shards").mkdir()
    for i in range(shards):
        os.link(root / "0.tar", root / "shards" / f"{i:04d}.tar")
    return f"{root}/shards/{{0000..{shards - 1:04d}}}.tar"


def seconds(function):
    """(what `function()` returns, the time it took)."""
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def loader_of(kind, folder, size=4, workers=1):
    """Endless batches, shuffled, read by ImageFolder or by us."""
    if kind == "ImageFolder":
        return iter(DataLoader(ImageFolder(folder, TRANSFORM), size, shuffle=True, num_workers=workers))
    return data.train_loader(sources.build_dataset(folder, "train", VIEW), size, 0, num_workers=workers)


def own_memory(kind, folder, method, batches):
    """MiB of a worker's own after its first batch and after `batches`; in a fresh process."""
    multiprocessing.set_start_method(method)
    loader = loader_of(kind, folder)
    found = []
    for count in (1, batches - 1):
        for _ in range(count):
            next(loader)
        rollup = pathlib.Path(f"/proc/{multiprocessing.active_children()[0].pid}/smaps_rollup").read_text()
        found.append(sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")))
    return [kib / 1024 for kib in found]


def in_fresh_process(function, *values):
    """What `function(*values)` of this file returns in a process of its own."""
    done = subprocess.run([sys.executable, __file__, function.__name__, json.dumps(values)], text=True,
                          stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def speed(folder):
    """Images a second of ImageFolder and of us, and our share of the time that is no decoding or resizing."""
    loaders = {kind: loader_of(kind, folder, 32, 0) for kind in ("ImageFolder", "here")}
    times = {kind: [] for kind in loaders}
    for _ in range(25):                                                    # in turns: a machine has moods
        for kind, loader in loaders.items():
            start = time.process_time()
            next(loader)
            times[kind].append(time.process_time() - start)
    dataset = sources.build_dataset(folder, "train", VIEW)
    nothing = torch.zeros(3, 256, 256, dtype=torch.uint8)
    dataset.read = lambda index, rng: nothing
    requests = [(index, (0, 0, index)) for index in range(32)]
    around = min(seconds(lambda: data.collate(dataset.__getitems__(requests)))[1] for _ in range(50))
    rates = [32 / np.median(times[kind]) for kind in loaders]
    return *rates, around * rates[1] / 32


def get_args(argv):
    """How large."""
    parser = runtime.ArgumentParser(__doc__)
    count = runtime.bounded(int, 2, 6_000_000)
    parser.add_argument("--images", type=count, default=20_000, help="how many the set has, 1,000 or more")
    parser.add_argument("--batches", type=count, default=500, help="how many a worker reads")
    return parser.parse_args(argv)


def main(args):
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        (root / "few").mkdir()
        few = make_images(root / "few", 100, 10)
        folder = make_images(root, args.images, 1000)
        rows = []
        ours, times = None, {"ImageFolder": [], "here": []}
        for _ in range(3):
            peer, elapsed = seconds(lambda: ImageFolder(folder))
            times["ImageFolder"].append(elapsed)
            ours, elapsed = seconds(lambda: sources.build_dataset(folder, "train", VIEW))
            times["here"].append(elapsed)
        peer_s, our_s = map(min, times.values())
        rows.append(["building the set, s", f"{peer_s:.2f}", f"{our_s:.2f} ({our_s / peer_s:.2f} x)"])
        sizes = [len(pickle.dumps(peer)), len(multiprocessing.reduction.ForkingPickler.dumps(ours))]
        rows.append(["pickled for a worker, bytes", *[f"{size:,}" for size in sizes]])
        del peer
        for method in ("spawn", "forkserver", "fork"):
            least, *found = [in_fresh_process(own_memory, kind, path, method, args.batches)
                             for kind, path in (("here", few), ("ImageFolder", folder), ("here", folder))]
            rows.append([f"a worker's memory, {method}, MiB: first batch, batch {args.batches}",
                         *[f"{start - least[0]:.0f}, {end - least[1]:.0f}" for start, end in found]])
        _, elapsed = seconds(lambda: [ours.raise_if_broken() for _ in range(1000)])
        rows.append(["counting the broken, where one was found, ms", "", f"{elapsed:.3f}"])
        _, elapsed = seconds(lambda: data.fingerprint(ours, range(len(ours))))
        rows.append(["fingerprint, s", "", f"{elapsed:.2f}"])
        peer_rate, our_rate, around = speed(folder)
        rows.append(["reading, images a second of one core", f"{peer_rate:.0f}", f"{our_rate:.0f}"])
        rows.append(["not decoding or resizing, of the time", "", f"{around:.1%}"])
        shards = make_shards(root, args.images, 1000)
        starts = [seconds(lambda: sources.build_dataset(shards, "train", VIEW))[1] for _ in range(2)]
        rows.append(["1,000 tar shards, first and later starts, s", "", f"{starts[0]:.1f}, {starts[1]:.2f}"])
    print(f"{args.images:,} images")
    loops.print_table(rows, ["", "ImageFolder", "here"])


if __name__ == "__main__":                                                 # see `in_fresh_process`
    print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
