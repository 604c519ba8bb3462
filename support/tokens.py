"""The tokens of a whole data set in one file, which all ranks fill once and then draw from at random.

    runs/ar/tokens.bin         ids, uint32 (rows, crops, N): 13 GB for ten crops of ImageNet
    runs/ar/tokens.json        what they are; "missing": rows of unreadable images, null until all is done
    runs/ar/tokens.bin.done    until then: a byte for each row, 1 as soon as its ids are stored

Nothing reads the file through to learn what is in it. A machine may go on seeing what it once read of a
network disk, so ranks open a file when the others have closed it. B batch, N tokens of an image, S its side.
"""
import dataclasses
import functools
import math
import os
import pathlib

import numpy as np
import torch
from tqdm import tqdm

from support import data, pictures, runtime, sources


class Tokens(sources.Samples):
    """Stored tokens in the form of a data set (see sources.py): an item is (ids (N,) int64, label, row).

    So the loaders of images serve tokens too: the same order, shares of ranks, position after resuming. Row i
    of `ids` (rows, crops, N) belongs to item indices[i] of `dataset`; of ten crops, an epoch gives any one.
    """

    def __init__(self, ids, dataset, indices, header):
        view = dataclasses.replace(dataset.view, crop="random" if ids.shape[1] > 1 else "center")
        paths = dataset.paths
        labels = dataset.labels
        if len(indices) < len(dataset):
            paths = [paths[i] for i in indices]
            labels = labels[list(indices)]
        super().__init__(dataset.name, dataset.classes, paths, labels, view)
        self.ids = ids
        self.vocabulary = header["vocabulary"]
        self.broken[torch.tensor(header["missing"], dtype=torch.long)] = True

    def __getitem__(self, row):
        row = range(len(self))[row]                       # its IndexError also ends a plain `for` loop
        ids, labels, rows = self.__getitems__([(row, (self.view.seed, row))])
        return ids[0], int(labels[0]), int(rows[0])

    def __getitems__(self, requests):
        """A whole batch, (ids (B, N), labels, rows (B,)): one by one, 768 would take ten times as long."""
        rows = np.array([row for row, _ in requests])
        crops = chosen_crops(requests[0][1][:-1], *self.ids.shape[:2])      # of an epoch: a batch is of one
        while True:
            ids = self.ids[rows, crops[rows]]                                             # (B, N)
            for row in rows[ids.max(1) >= self.vocabulary].tolist():
                self.report_broken(row, f"damaged: an id beyond the {self.vocabulary:,} of the tokenizer")
            broken = self.broken[torch.from_numpy(rows)].numpy()
            if not broken.any():
                rows = torch.from_numpy(rows)
                return torch.from_numpy(ids.astype(np.int64)), self.labels[rows], rows
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
    a z is close to 0. bf16 would flip some, and the transformer learn ids that the decoder does not know.
    """
    device = next(tokenizer.parameters()).device
    with torch.no_grad(), runtime.autocast(device, precision):
        return tokenizer.encode(pictures.to_float(x.to(device, non_blocking=True))).flatten(1)


def header_of(path, count):
    """What the JSON file beside `path`, of `count` ids, says of it; {} where one of the two is not there, so
    that both are made anew. Raises `UserError` for files that are not ours to write over. A collective.
    """
    header = path.with_suffix(".json")
    runtime.require(path.suffix == ".bin", f"--tokens {path}: give it a name that ends in .bin")

    def look():
        found = runtime.read_json(header) if header.exists() else {}
        ours = "tokenizer" in found
        if not header.exists():
            ours = not path.exists() or path.stat().st_size in (4 * count, 8 * count)
        runtime.require(ours, f"{header if found else path} is not of these tokens; move it away, or choose "
                              f"another --tokens, so that it is not written over")
        return found if path.exists() else {}

    return runtime.on_main(look)        # the caches of other machines may hold an older answer


def stored(dataset, records, tokenizer, args, held_out=False):
    """`Tokens` of `dataset`, of a held-out one --val-size at most, encoded first unless a file has them: that
    of --tokens, or tokens.bin in --results-dir, and tokens-val.bin beside it. None for --dry-run: a check.

    records: of the "tokenizer" and the training "dataset". Raises `UserError` for a file of other tokens, and
    if more than 1 % of the images are broken. A collective.
    """
    path = pathlib.Path(args.tokens or f"{args.results_dir}/tokens.bin")
    made_with = records["tokenizer"]
    fingerprint = records["dataset"]["fingerprint"]
    limit = None
    if held_out:
        path = path.with_name(f"{path.stem}-val.bin")
        fingerprint = ""
        limit = args.val_size
    indices = data.evenly_spaced(limit, len(dataset))
    grid = tokenizer.config.latent_grid(*dataset.axes)
    shape = [len(indices), 10 if dataset.view.crop == "ten" else 1, math.prod(grid)]
    found = header_of(path, math.prod(shape))
    like = str(found.get("data", "2:"))                   # an older kind, in a file by an older version
    if fingerprint[:2] != like[:2]:
        fingerprint = runtime.on_main(data.fingerprint, dataset, indices, like)
    wanted = {"tokenizer": made_with["sha256"], "data": fingerprint, "grid": list(grid),
              "shape": shape, "crops": dataset.view.crop, "precision": args.token_precision}
    facts = {**wanted, "vocabulary": tokenizer.quantizer.vocabulary,
             "origin": f"{made_with['path']} of {dataset.name}", "missing": found.get("missing")}
    if found:
        runtime.check_same(found, wanted, f"{path} holds tokens by {found.get('origin')}, not by "
                           f"{facts['origin']}; delete it and {path.with_suffix('.json')} to have them made "
                           f"anew, or choose another --tokens: what they are", wanted)
    if args.dry_run:
        return None
    if facts["missing"] is None:
        make_room(path, facts)
        try:
            facts["missing"] = fill(path, dataset, indices, tokenizer, args)
        except runtime.Stopped as stopped:
            stopped.kept = f"{path} keeps what is encoded; the same command continues"
            raise
        runtime.write_json(path.with_suffix(".json"), facts)
        if runtime.is_main():
            record_of(path).unlink()
    return Tokens(open_ids(path, facts), dataset, indices, facts)


def open_ids(path, header):
    """The ids in `path`, a memory map (rows, crops, N): uint32, or of older versions 8 bytes each."""
    count = math.prod(header["shape"])
    size = path.stat().st_size
    runtime.require(size in (4 * count, 8 * count), f"{path} has {size:,} bytes, not {4 * count:,} as its "
                    f"JSON file says: it is not what it claims to be; delete both to have them made anew")
    return np.memmap(path, f"<u{size // count}", "r", shape=tuple(header["shape"]))


def record_of(path):
    """Where it stands which rows of `path` are stored, as long as some are not."""
    return path.with_name(f"{path.name}.done")


def make_room(path, facts):
    """Make the file of ids and its record whole, unless they are; the JSON file last. A collective."""
    record = record_of(path)
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
    runtime.require(record.exists(), f"rank {runtime.rank()} does not see {record}, which rank 0 has made: "
                    f"--results-dir, or --tokens, must lie on a disk that all machines share")


def fill(path, dataset, indices, tokenizer, args):
    """Encode the rows that the record has not, each rank its batches; returns those that are missing then, as
    their images are broken. A collective.

    A batch has the same rows whoever encodes it, and after any kill: with the same neighbours, an image has
    the same ids, to the last bit.
    """
    runtime.print_main(f"encoding {len(indices):,} {dataset.kind}s of {dataset.name} to {path}")
    done = np.fromfile(record_of(path), np.uint8)
    size = max(1, (16 if dataset.view.frames else 64) // (10 if dataset.view.crop == "ten" else 1))
    todo = [row for first in range(0, len(done), size) if not done[first:first + size].all()
            for row in range(first, min(first + size, len(done)))]
    indices = np.array(indices)
    runtime.barrier()                                     # nobody writes while others look
    loader = data.eval_batches(dataset, indices[todo].tolist(), size, args.num_workers)
    with open_to_write(path) as file, open_to_write(record_of(path)) as record:
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


def open_to_write(path):
    """`path`, opened to write into it, and neither emptied nor read: of a page of a network disk into which
    two machines write, each then sends its own bytes alone."""
    return open(path, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC))


def stored_rows(path, header):
    """The rows of `path` whose ids are there, of a file that is being filled, too: (rows,)."""
    if header["missing"] is None:
        return np.flatnonzero(np.fromfile(record_of(path), np.uint8, header["shape"][0]))
    return np.delete(np.arange(header["shape"][0]), header["missing"])
