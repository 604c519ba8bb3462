"""The tokens of a whole data set in one file, which all ranks fill once and then draw from at random.

    runs/ar/tokens.bin         ids, uint32 (rows, crops, N): 13 GB for ten crops of ImageNet
    runs/ar/tokens.json        what they are; "missing": rows of unreadable images, null until all is done
    runs/ar/tokens.bin.done    until then: a byte for each row, 1 as soon as its ids are stored

A machine may go on seeing what it once read of a network disk, so ranks open a file when the others have
closed it. B batch, N tokens of an image, S its side.
"""
import functools
import math
import os
import pathlib

import numpy as np
import torch
from tqdm import tqdm

from support import data, pictures, runtime, sources
from support.runtime import require


class Tokens(sources.Samples):
    """Stored tokens in the form of a data set (see sources.py), so that the loaders of images serve them too:
    the same order, shares of ranks, position after resuming. They ask for whole batches.

    Row i of `ids` (rows, crops, N) is of item indices[i] of `dataset`; of ten crops, an epoch gives any one.
    """

    def __init__(self, ids, dataset, indices, header):
        paths = dataset.paths
        if len(indices) < len(paths):
            paths = [paths[i] for i in indices]
        super().__init__(dataset.name, dataset.classes, paths, dataset.labels[list(indices)], dataset.view)
        self.ids = ids
        self.vocabulary = header["vocabulary"]
        self.broken[header["missing"]] = True

    def __getitems__(self, requests):
        """A batch (ids (B, N) int64, labels, rows (B,)): one by one, 768 would take ten times as long."""
        rows = np.array([row for row, _ in requests])
        crops = chosen_crops(requests[0][1][:-1], *self.ids.shape[:2])      # of an epoch: a batch is of one
        while True:
            ids = self.ids[rows, crops[rows]]                                             # (B, N)
            for row in rows[ids.max(1) >= self.vocabulary].tolist():
                self.report_broken(row, f"damaged: an id beyond the {self.vocabulary:,} of the tokenizer")
            broken = self.broken.numpy()[rows]
            if not broken.any():
                return torch.from_numpy(ids.astype(np.int64)), self.labels[rows], torch.from_numpy(rows)
            if self.too_many_broken():
                return [None]
            rows[broken] = (rows[broken] + 1) % len(self)                   # the next stands in, as of images


@functools.lru_cache(maxsize=2)
def chosen_crops(seed, rows, crops):
    """Which of its `crops` each row gives in the epoch of `seed`, a tuple: (rows,)."""
    return np.random.default_rng((*seed, 1)).integers(crops, size=rows)


def encode(tokenizer, x, precision):
    """uint8 images (B, 3, S, S) or clips (B, 3, T, S, S) to ids (B, N), int64 on the tokenizer's device.

    `precision` is fp32 by default, even where training's is not: an id consists of the signs of z, and many
    a z is close to 0. bf16 would flip some, and the transformer learn ids that the decoder does not know."""
    device = next(tokenizer.parameters()).device
    with torch.no_grad(), runtime.autocast(device, precision):
        return tokenizer.encode(pictures.to_float(x.to(device, non_blocking=True))).flatten(1)


def stored(dataset, made_with, tokenizer, args, limit=None, fingerprint=""):
    """`Tokens` of `dataset`, encoded first unless tokens.bin in --results-dir, or --tokens, has them; with a
    `limit`, that of held-out images, of so many at most and tokens-val.bin. None for --dry-run: a check.

    made_with: the record of the tokenizer; its "sha256" is None where that is not known. fingerprint: of the
    whole set, where it is known. Raises `UserError` for a file of other tokens, and if more than 1 % of the
    images are broken. A collective."""
    path = pathlib.Path(args.tokens or f"{args.results_dir}/tokens.bin")
    require(path.suffix == ".bin", f"--tokens {path}: give it a name that ends in .bin")
    if limit:
        path = path.with_name(f"{path.stem}-val.bin")
    header = path.with_suffix(".json")
    indices = data.evenly_spaced(limit, len(dataset))
    grid = tokenizer.config.latent_grid(*dataset.axes)
    shape = [len(indices), 10 if dataset.view.crop == "ten" else 1, math.prod(grid)]
    found = runtime.on_main(header_of, path, math.prod(shape))
    like = str(found.get("data", "2:"))                   # an older kind, in a file by an older version
    if fingerprint[:2] != like[:2]:
        fingerprint = runtime.on_main(data.fingerprint, dataset, indices, like)
    facts = {"tokenizer": made_with["sha256"], "grid": list(grid), "shape": shape, "crops": dataset.view.crop,
             "data": fingerprint, "precision": args.token_precision}
    origin = f"{made_with['path']} of {dataset.name}"
    if found:
        known = [name for name, value in facts.items() if value]
        runtime.check_same(found, facts, f"{path} holds tokens by {found.get('origin')}, not by {origin}; "
                           f"delete it and {header} to have them made anew, or choose another --tokens: what "
                           f"they are", known)
    if args.dry_run:
        return None
    facts.update(vocabulary=tokenizer.quantizer.vocabulary, origin=origin, missing=found.get("missing"))
    if facts["missing"] is None:
        make_room(path, facts)
        try:
            facts["missing"] = fill(path, dataset, indices, tokenizer, args)
        except runtime.Stopped as stopped:
            stopped.kept = f"{path} keeps what is encoded; the same command continues"
            raise
        runtime.write_json(header, facts)
        if runtime.is_main():
            pathlib.Path(f"{path}.done").unlink()
    return Tokens(open_ids(path, facts), dataset, indices, facts)


def header_of(path, count):
    """What the JSON file beside `path`, of `count` ids, says of it; {} where one of the two is missing, and
    both are made anew. Raises `UserError` for files that are not ours to write over."""
    header = path.with_suffix(".json")
    found = runtime.read_json(header) if header.exists() else {}
    blank = not header.exists() and (not path.exists() or path.stat().st_size in (4 * count, 8 * count))
    require(blank or "tokenizer" in found, f"{header if found else path} is not of these tokens; move it "
            f"away, or choose another --tokens, so that it is not written over")
    return found if path.exists() else {}


def open_ids(path, header):
    """The ids in `path`, a memory map (rows, crops, N): uint32, or of older versions 8 bytes each."""
    count = math.prod(header["shape"])
    size = path.stat().st_size
    require(size in (4 * count, 8 * count), f"{path} has {size:,} bytes, not {4 * count:,} as its JSON file "
            f"says: it is not what it claims to be; delete both to have them made anew")
    return np.memmap(path, f"<u{size // count}", "r", shape=tuple(header["shape"]))


def stored_rows(path, header):
    """The rows of `path` whose ids are there, of a file that is being filled, too: (rows,)."""
    if header["missing"] is None:
        return np.flatnonzero(np.fromfile(f"{path}.done", np.uint8, header["shape"][0]))
    return np.delete(np.arange(header["shape"][0]), header["missing"])


def make_room(path, facts):
    """Make the file of ids and its record whole, unless they are; the JSON file last. A collective."""
    record = pathlib.Path(f"{path}.done")
    header = path.with_suffix(".json")
    if runtime.is_main():
        sizes = {path: 4 * math.prod(facts["shape"]), record: facts["shape"][0]}
        whole = header.exists() and all(file.exists() and file.stat().st_size == size
                                        for file, size in sizes.items())
        for file in () if whole else sizes:
            header.unlink(missing_ok=True)
            with runtime.atomic(file) as temporary, open(temporary, "wb") as content:
                content.truncate(sizes[file])             # zeros, which take no room on the disk yet
        runtime.write_json(header, facts)
    runtime.barrier()
    require(record.exists(), f"rank {runtime.rank()} does not see {record}, which rank 0 has made: "
            f"--results-dir, or --tokens, must lie on a disk that all machines share")


def fill(path, dataset, indices, tokenizer, args):
    """Encode the rows that the record has not, each rank its batches; returns those whose images are broken.
    A batch has the same rows whoever encodes it and after any kill: so an image has the same ids, to the
    last bit. A collective."""
    runtime.print_main(f"encoding {len(indices):,} {dataset.kind}s of {dataset.name} to {path}")
    done = np.fromfile(f"{path}.done", np.uint8)
    size = max(1, (16 if dataset.view.frames else 64) // (10 if dataset.view.crop == "ten" else 1))
    todo = [row for first in range(0, len(done), size) if not done[first:first + size].all()
            for row in range(first, min(first + size, len(done)))]
    indices = np.array(indices)
    runtime.barrier()                                     # nobody writes while others look
    loader = data.eval_batches(dataset, indices[todo].tolist(), size, args.num_workers)
    # Neither emptied nor read: of a page of a network disk, two machines then send their own bytes alone.
    writing = {"mode": "wb", "opener": lambda name, flags: os.open(name, flags & ~os.O_TRUNC)}
    with open(path, **writing) as file, open(f"{path}.done", **writing) as record:
        for x, _, found in tqdm(loader, "encoding", unit="batch", disable=not runtime.is_main() or None):
            ids = encode(tokenizer, x.reshape(-1, 3, *dataset.axes), args.token_precision)
            ids = ids.reshape(len(found), -1).cpu().numpy().astype("<u4")                 # (B, crops * N)
            rows = np.searchsorted(indices, found.numpy()).tolist()
            for row, values in zip(rows, ids):
                file.seek(row * values.nbytes)
                file.write(values)
            file.flush()
            os.fsync(file.fileno())                       # ids first: the record never says too much
            for row in rows:
                record.seek(row)
                record.write(b"\1")
            record.flush()
    runtime.barrier()
    dataset.raise_if_broken(all_ranks=True)
    return np.flatnonzero(dataset.broken.numpy()[indices]).tolist()
