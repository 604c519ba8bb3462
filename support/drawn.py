"""What becomes of samples: those of the classes asked for on a grid to look at, or many in one npz file.

The npz holds uint8 (N, H, W, 3), of clips (N, T, H, W, 3), as arr_0, which evaluators take. It is made of
parts, a batch each, so that little is lost when drawing is ended. Letters: N samples, n of a class, T frames.
"""
import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import zipfile

import numpy as np
import torch
from torchvision.models import VGG16_Weights

from support import loops, pictures, runtime
from support.runtime import require

# ---- 1. Classes --------------------------------------------------------------------------------------------

# Of the sorted names n01440764 .. n15075141 of its thousand folders, a line each.
IMAGENET_FOLDERS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


def class_names(stored, count):
    """Those `stored` in our checkpoint, else numbers; ImageNet-1k's for its folders and published files."""
    folders = "\n".join(stored or []).encode()
    if count == 1000 and (not stored or hashlib.sha256(folders).hexdigest() == IMAGENET_FOLDERS):
        return VGG16_Weights.IMAGENET1K_V1.meta["categories"]
    return list(stored or map(str, range(count)))


def find_classes(text, names):
    """The class numbers behind --classes. Raises `UserError` for unknown ones, and for ambiguous names."""
    count = len(names)
    if text is None:                            # retriever, otter, panda, geyser, balloon, macaw, valley, fox
        if count == 1000:
            return [207, 360, 388, 974, 417, 88, 979, 279]
        return [i * count // 8 for i in range(8)] if count > 16 else list(range(count))
    labels = []
    text = text.strip().lower()
    lower = [name.lower() for name in names]
    words = [text] if text in lower else text.split(",")                   # a name may have commas
    for word in map(str.strip, words):
        # Names first: the folders of a data set may be called after numbers that are not their positions.
        found = [label for label, name in enumerate(lower) if name == word]
        if not found and word.isdecimal() and int(word) < count:
            found = [int(word)]
        close = [name for name in names if word and word in name.lower()] or names
        require(found, f"--classes: {word!r} is none of the {count} classes; give a number below {count}, or "
                       f"a name such as {', '.join(close[:5])}")
        require(len(found) == 1, f"--classes: {word!r} names the classes {found}; give a number")
        labels += found
    return labels


# ---- 2. Files ----------------------------------------------------------------------------------------------

def check_output(output, suffixes, folder):
    """Refuse an --output that could not be written, before anything is drawn for it; folder: of its files."""
    require(output.suffix in suffixes, f"--output {output}: this writes a {' or '.join(suffixes)} file")
    require(not output.is_dir(), f"--output {output} is a folder; name a file in it")
    if output.suffix in pictures.VIDEO_CODECS:
        pictures.import_av()
    runtime.check_writable(folder)


def write_grid(output, samples, names, beside, alone):
    """Save a grid with a row for each class of `samples`, {label: (n, 3, [T,] H, W)}, captioned by `names`
    and after the images `beside` (with --keep); alone: also save each sample by itself."""
    rows = []
    captions = []
    for label, row in samples.items():
        rows += [*beside, row]
        captions += ["original", "kept"][:len(beside)] + [names[label] if names else ""] * len(row)
        for i, array in enumerate(row.movedim(1, -1).numpy() if alone else ()):
            save = pictures.save_image if array.ndim == 3 else pictures.write_video
            save(output.with_suffix("") / f"class-{label:04d}-{i:03d}{output.suffix}", array)
    grid = torch.cat(rows)
    pictures.save_samples(output, grid, len(grid) // len(samples), captions if any(captions) else None)


def write_set(output, draw, record, labels):
    """The npz of the samples from number 0 on, in turn of the classes `labels`, which become its arr_1. Every
    rank draws parts of a batch each; rank 0 joins them.

    draw: a function of numbers that yields batches of the samples with these. A collective."""
    record = json.loads(json.dumps(record))               # as it will be read again
    size = record["batch_size"]
    folder = pathlib.Path(f"{output}.parts")              # of which each holds a batch, whoever draws it
    parts = [folder / f"{k:06d}.npy" for k in range(math.ceil(record["n"] / size))]
    try:
        with runtime.lock(folder, "--output") or contextlib.nullcontext():
            missing = runtime.on_main(missing_parts, output, parts, record)
            todo = missing[runtime.rank()::runtime.world_size()]
            batches = draw([n for k in todo for n in range(k * size, min((k + 1) * size, record["n"]))])
            for k, samples in zip(todo, batches):
                with runtime.atomic(parts[k]) as temporary:
                    np.save(temporary, samples.movedim(1, -1).numpy())         # (b, [T,] H, W, 3)
            runtime.barrier()
            if runtime.is_main():
                if output.exists():
                    print(f"{output} exists already, made with these settings")
                else:
                    join_parts(output, parts, record, labels)
                shutil.rmtree(folder)
    except runtime.Stopped as stopped:
        kept = sum(part.exists() for part in parts)
        stopped.kept = f"{kept} of {len(parts)} parts are kept in {folder}; the same command continues"
        raise


def missing_parts(output, parts, record):
    """The numbers of those `parts` that are still to be drawn, found on rank 0: none if there is `output`.
    Raises `UserError` where what is there was made in another way than `record` says."""
    folder = parts[0].parent
    settings = output.with_suffix(".json") if output.exists() else folder / "record.json"
    if not settings.exists():
        require(not output.exists(), f"{output} exists, without {settings} to say how it was made; choose "
                                     f"another --output")
        runtime.write_json(settings, record)
    made_with = runtime.read_json(settings)
    if made_with.get("cfg_schedule") == "constant":       # of an earlier version; as all guidance is now
        made_with = {name: made_with[name] for name in made_with if name not in ("cfg_schedule", "cfg_power")}
    runtime.check_same(made_with, record, f"{output} or {folder} exists; delete it, or choose another "
                                          f"--output: what it was made with")
    return [] if output.exists() else [k for k, part in enumerate(parts) if not part.exists()]


def join_parts(output, parts, record, labels):
    """Make of `parts`, files in a folder of their own, the npz and its JSON."""
    header = {"descr": "|u1", "fortran_order": False,
              "shape": (record["n"], *np.load(parts[0], mmap_mode="r").shape[1:])}
    whole = parts[0].with_name("joined.npz")              # in that folder, where a kill leaves no remains
    # As np.savez writes it, but a part at a time: 50,000 images of 256 x 256 are 9.8 GB.
    with runtime.atomic(whole) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in loops.watched(parts, "joining", unit="parts"):
                file.write(np.load(part).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.resize(np.array(labels, np.int64), record["n"]))
    runtime.write_json(output.with_suffix(".json"), record)
    os.replace(whole, output)
