"""Pictures from an auto-regressive checkpoint: labelled grids to look at, and large sets for evaluators.

    python sample.py                                                   # every class of what train_ar.py left
    python sample.py --ckpt AR_256_B.ckpt --classes 207,otter --num-images 8 --mixed-precision bf16 --compile
    torchrun --nproc-per-node=8 sample.py --ckpt AR_256_B.ckpt --num-fid-samples 50000 --batch-size 64 \\
        --mixed-precision bf16 --compile                               # then: evaluate.py generation

A checkpoint of ours and a published AR file contain the tokenizer that goes with them: one file is enough.

Pictures are numbered. Number n shows class n mod C, the next in turn, and is drawn from the seed (--global-seed,
n). So a set of N has N / C pictures of every class (one more of the first classes where C does not divide N), and
`--classes` shows the first pictures of just these classes. Batches, and with them parts on disk, hold
consecutive numbers: which ones depends on neither the number of ranks nor on interruptions, and so neither
does the set. The order is this fixed one; an evaluator that needs chance order (Inception Score) shuffles.

In reading order: 1. from labels to pixels; 2. parts on disk; 3. flags; 4. grids and sets. Axis letters: B
batch, C classes, H W picture, M sub-tokens of a token, N pictures of a set (tokens of a picture in section 1).
"""
import argparse
import json
import math
import os
import pathlib
import re
import shutil
import time
import zipfile

import numpy as np
import torch
from torchvision.models._meta import _IMAGENET_CATEGORIES
from tqdm import tqdm

import ar_model
import runtime
import tokenizer as tok

# ------------------------------------------------------------------------------------------------------------
# 1. From labels to pixels
# ------------------------------------------------------------------------------------------------------------


def to_pixels(images, rounding):
    """Float pictures in [-1, 1], any shape, to uint8.

    "truncate" is how the published sets were made: it darkens every picture by half a level on average.
    "round" takes the nearest level.
    """
    if rounding == "truncate":
        return ((images.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
    return runtime.to_uint8(images)


@torch.no_grad()
def generate(model, tokenizer, labels, seeds, batch_size=64, rounding="round", mixed_precision="fp32",
             compile=False, **settings):
    """Yield pictures, uint8 (b, 3, H, W) on the CPU, in batches of `batch_size` in the order of `labels`.

    model: an ARModel on the device to be used (`ar_model.prepare_for_sampling` makes it faster); tokenizer: the
    one of its tokens, there too. labels (N,): ints or a tensor; seeds: as many, each an int >= 0 or a tuple of
    them. mixed_precision: of the decoder; the transformer computes in the precision of its weights.
    settings: cfg_scale, temperature, top_k, top_p, one value or one for each sub-token.

    The last batch is filled up to `batch_size` and cut again, because matrix products of another size round
    differently: a picture depends on its label, its seed, `batch_size` and its place in the batch alone.
    """
    labels, config = torch.as_tensor(labels), model.config
    if not len(labels):
        return
    device = model.class_embedding.weight.device
    sampler = ar_model.Sampler(model, batch_size, compile=compile, **settings)
    if compile:
        tokenizer.to(memory_format=torch.channels_last).decoder.compile(dynamic=False)
    for first in range(0, len(labels), batch_size):
        chosen = [min(i, len(labels) - 1) for i in range(first, first + batch_size)]
        subtokens = sampler(labels[chosen], [seeds[i] for i in chosen])                   # M x (B, N)
        ids = tok.subtokens_to_ids(subtokens, config.bits)                                # (B, N)
        with runtime.autocast(device, mixed_precision):
            images = tokenizer.decode(ids.unflatten(1, config.grid))                      # (B, 3, H, W)
        yield to_pixels(images, rounding)[:len(labels) - first].cpu()


def load(ckpt, tokenizer=None, raw_weights=False, trust=False):
    """(ARModel, Tokenizer, info) of one of our checkpoints or of a published AR file, on the CPU, in eval mode.

    tokenizer: path of a tokenizer, for a published file without one; for one of ours it must be the very one
    that made its tokens. info: that of `ar_model.load_ar`, with "path", "name", "classes" (their names) and
    "tokenizer" ("path", "sha256", "weights"). Raises `UserError` where the two do not fit each other.
    """
    model, info = ar_model.load_ar(ckpt, trust, ema=not raw_weights)
    made_with, classes = info["tokenizer"], None
    if info["source"] == "ours":
        stored = runtime.load_checkpoint(ckpt, trust)
        first_stage, classes = stored["first_stage"], stored["classes"]
        info["preset"] = stored["preset"]
    if tokenizer:
        decoder, its = tok.load_tokenizer(tokenizer, not raw_weights, trust)
        runtime.require(made_with is None or made_with["sha256"] == its["sha256"],
                        f"--tokenizer {tokenizer} (sha256 {its['sha256'][:12]}) is not the tokenizer of {ckpt}, which "
                        f"was {(made_with or its)['path' if made_with else 'sha256']} (sha256 "
                        f"{(made_with or its)['sha256'][:12]}); leave the flag out, as the checkpoint contains it")
        made_with = {"path": str(tokenizer), "sha256": its["sha256"], "weights": its["weights"]}
    elif info["source"] == "ours":
        decoder = tok.Tokenizer(tok.config_from_dict(first_stage["config"], ckpt)).eval()
        runtime.load_state_strictly(decoder, first_stage["model"], f"the tokenizer inside {ckpt}")
    else:
        try:
            decoder, its = tok.load_tokenizer(ckpt, not raw_weights, trust)
        except runtime.UserError as error:
            raise runtime.UserError(f"{ckpt} contains no whole tokenizer ({str(error)[:200]}); name the file of "
                                    f"one with --tokenizer") from None
        made_with = {"path": str(ckpt), "sha256": its["sha256"], "weights": its["weights"]}
    codes = 2 ** sum(model.config.bits)
    runtime.require(codes == decoder.config.vocabulary,
                    f"{ckpt} draws tokens of {codes} codes ({' + '.join(map(str, model.config.bits))} bits), but "
                    f"its tokenizer {made_with['path']} has {decoder.config.vocabulary}; give the one it was "
                    f"trained with as --tokenizer")
    return model, decoder, {**info, "path": str(ckpt), "name": pathlib.Path(ckpt).name, "tokenizer": made_with,
                            "classes": class_names(classes, model.config.num_classes)}


def class_names(stored, count):
    """Names of `count` classes: the `stored` ones of our checkpoints; ImageNet's for 1000 nameless classes, or
    where the data set's folders were called after WordNet (n01440764, ...)."""
    if count == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in stored or []):
        return list(_IMAGENET_CATEGORIES)
    return list(stored or map(str, range(count)))


# ------------------------------------------------------------------------------------------------------------
# 2. Parts on disk: long work that can be interrupted, by any number of ranks
# ------------------------------------------------------------------------------------------------------------

# The work is cut into numbered parts, the same ones whoever does them. A part is a file that appears
# whole (it is renamed when finished), so that "is it done?" is "does it exist?", also after a kill or on
# another number of ranks, and no list of what is done can go out of step with the files.

def open_parts(folder, count, settings):
    """The parts, of 0 .. count - 1, that this rank has to make: every R-th of those missing. A collective.

    settings: all that decides what the parts hold (a dict for JSON). Raises `UserError` if `folder` holds
    parts of other settings.
    """
    folder, settings = pathlib.Path(folder), json.loads(json.dumps(settings))
    path = folder / "settings.json"
    if not path.exists():
        runtime.write_json(path, settings)
    runtime.barrier()
    runtime.check_same(json.loads(path.read_text()), settings,
                       f"{folder} holds what an interrupted run left; delete that folder, or continue with the "
                       f"settings of that run: what it was made with")
    missing = [part for part in range(count) if not part_path(folder, part).exists()]
    return runtime.gather_objects(missing)[0][runtime.rank()::runtime.world_size()]      # rank 0 looked first


def part_path(folder, part):
    """The file of a part."""
    return pathlib.Path(folder) / f"{part:06d}.npy"


def save_part(folder, part, array):
    """Write `array` as the finished part `part`."""
    path = part_path(folder, part)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_parts(folder, count):
    """The arrays of all parts in order, one at a time."""
    return (np.load(part_path(folder, part)) for part in range(count))


def write_npz(path, shape, arrays):
    """Write the uint8 `arrays`, which make one of `shape` when joined, as `arr_0` of an npz file, atomically.

    `np.savez` needs the whole array in memory: 9.8 GB for 50,000 pictures of 256 x 256. But an npz is a zip of
    npy files, and an npy is a short header before the raw bytes, so the parts can follow each other into
    it. Nothing is compressed: evaluators map the file, and pictures hardly shrink. A `ZipInfo` has no time of
    day, so equal pictures make equal files.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for array in arrays:
                member.write(array.tobytes())
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------
# 3. Flags
# ------------------------------------------------------------------------------------------------------------

# Settings of a set where nothing was published: our own models. Mild guidance, since every model gains by it.
OWN_SETTINGS = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
# A few classes of ImageNet that everybody knows: golden retriever, otter, panda, geyser, balloon, macaw, ...
SHOWN = (207, 360, 388, 974, 417, 88, 979, 279)


def numbers(kind):
    """argparse type: "1.9,2.0" to (1.9, 2.0), one value for each sub-token, and "2" to (2,), for all of them."""
    def parse(text):
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, or numbers as in 1.9,2.0, not {text}") from None
    return parse


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--ckpt", help="AR checkpoint, ours or a published file; not given: the newest of runs/ar")
    group.add_argument("--tokenizer", help="tokenizer checkpoint, for an AR file that contains none")
    group.add_argument("--raw-weights", action="store_true", help="not the averaged weights, where there are any")
    group.add_argument("--trust-checkpoint", action="store_true", help="unpickle classes too (can run code)")

    group = parser.add_argument_group("what to draw")
    group.add_argument("--classes", help="a grid of these classes: numbers or names, as in 207,otter; not given: "
                                         "all classes if they are 16 at most, else a well-known few")
    group.add_argument("--num-images", type=runtime.positive_int, default=8, help="pictures a class in the grid")
    group.add_argument("--save-images", action="store_true", help="the grid's pictures as single PNGs, too")
    group.add_argument("--num-fid-samples", type=runtime.positive_int,
                       help="instead of a grid: an npz of so many pictures, equally many of every class")
    group.add_argument("--output", help="the PNG or npz to write, with its settings beside it as .json; not given: "
                                        "a name in runs/samples that says the model and the settings")
    group.add_argument("--global-seed", type=runtime.non_negative_int, default=0, help="another seed, other pictures")

    group = parser.add_argument_group(
        "how to draw: one value for all sub-tokens or one for each, as in 1.9,2.0. Defaults: for a grid what the "
        "authors take to show pictures; for an npz table 5's settings of a published preset, else guidance 2")
    group.add_argument("--cfg-scale", type=numbers(float), help="classifier-free guidance, 1: none")
    group.add_argument("--temperature", type=numbers(float), help="divides the logits, 0: greedy")
    group.add_argument("--top-k", type=numbers(int), help="draw among the k likeliest, 0: all")
    group.add_argument("--top-p", type=numbers(float), help="draw among the likeliest of probability p, 1: all")
    group.add_argument("--rounding", choices=("truncate", "round"), help="float pixels to uint8; not given: truncate "
                       "for published files, whose numbers were measured so, else round")

    group = parser.add_argument_group("speed")
    group.add_argument("--batch-size", type=runtime.positive_int, default=64,
                       help="pictures drawn at once on a rank; another size moves the last bit of some logits")
    group.add_argument("--mixed-precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                       help="precision of the transformer's weights and autocast dtype of the decoder")
    group.add_argument("--compile", action="store_true", help="compiled blocks in CUDA graphs (GPU only)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to sample")
    return parser.parse_args(argv)


def sampling_defaults(info, for_grid):
    """cfg_scale, temperature, top_k and top_p where the command line is silent."""
    if for_grid:                                             # of any model: one value, as it fits any M
        return {name: values[0] for name, values in ar_model.SAMPLING["looking"].items()}
    return ar_model.SAMPLING.get(info["preset"], OWN_SETTINGS)


def find_classes(text, names):
    """The class numbers behind --classes. Raises `UserError` for unknown numbers and unknown or shared names."""
    if text is None:
        shown = [label for label in SHOWN if label < len(names)]
        return shown if len(names) > 16 else list(range(len(names)))
    labels, by_name = [], {}
    for label, name in enumerate(names):
        by_name.setdefault(name.lower(), []).append(label)
    for part in (part.strip() for part in text.split(",")):
        # Names first: a data set's folders may be called after numbers that are not their positions.
        found = by_name.get(part.lower()) or ([int(part)] if part.isdecimal() and int(part) < len(names) else [])
        close = [name for name in names if part and part.lower() in name.lower()][:5]
        runtime.require(found, f"--classes: {part!r} is none of the model's {len(names)} classes; give a number "
                               f"below {len(names)}, or a name such as {', '.join(close or names[:5])}")
        runtime.require(len(found) == 1, f"--classes: {part!r} is the name of the classes {found}; give a number")
        labels += found
    return labels


# ------------------------------------------------------------------------------------------------------------
# 4. Grids and sets
# ------------------------------------------------------------------------------------------------------------

def main(args):
    """Draw what `args` (from `get_args`) ask for, and write it with all its settings."""
    device = runtime.setup_process_group(args.device)
    for_grid = args.num_fid_samples is None
    runtime.require(for_grid or not (args.classes or args.save_images), "--classes and --save-images belong to a "
                    "grid, but --num-fid-samples makes an npz of all classes; leave one of them out")
    ckpt = args.ckpt or runtime.latest_checkpoint("runs/ar", "AR model")
    model, tokenizer, info = load(ckpt, args.tokenizer, args.raw_weights, args.trust_checkpoint)
    C = model.config.num_classes
    settings = {name: value if getattr(args, name) is None else getattr(args, name)
                for name, value in sampling_defaults(info, for_grid).items()}
    if C == 0 and args.cfg_scale is None:
        settings["cfg_scale"] = 1.0                          # nothing to guide towards
    columns = zip(*ar_model.sampling_settings(len(model.config.bits), **settings))       # checked, one for each
    settings = {name: list(column) for name, column in zip(settings, columns)}
    labels = [0]
    if C == 0:
        runtime.require(not args.classes, f"--classes {args.classes}: {ckpt} is an unconditional model; leave it out")
    elif for_grid:
        labels = find_classes(args.classes, info["classes"])
    wanted = args.num_fid_samples or len(labels) * args.num_images
    how = dict(settings, batch_size=min(args.batch_size, wanted), mixed_precision=args.mixed_precision,
               rounding=args.rounding or ("truncate" if info["source"] == "published" else "round"),
               compile=args.compile)
    record = {"command": "sample", "n": wanted, **how, "global_seed": args.global_seed, "device": device.type,
              "grid": list(model.config.grid), "torch": torch.__version__,
              "checkpoint": {name: value for name, value in info.items() if name not in ("tokenizer", "classes")},
              "tokenizer": info["tokenizer"]}
    output = pathlib.Path(args.output or default_output(info, settings, args))
    wrong = output.suffix != (".png" if for_grid else ".npz")
    runtime.require(not wrong, f"--output {output} must end in {'.png' if for_grid else '.npz'}")
    for name, value in (
        ("model", f"{ckpt}: {info['preset'] or 'custom'}, {info['weights']} weights, step {info['step']}"),
        ("pictures", f"{wanted:,} of {max(1, C if not for_grid else len(labels)):,} classes, seed {args.global_seed}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in how.items())),
        ("running", f"{device}, {runtime.world_size()} ranks"),
        ("output", output),
    ):
        runtime.print_main(f"{name:<8} {value}")

    ar_model.prepare_for_sampling(model.to(device), runtime.AUTOCAST_DTYPES[args.mixed_precision] or torch.float32)
    tokenizer.to(device)
    start = time.perf_counter()

    def pictures(chosen):
        """Batches of the pictures with these numbers: the rule of the module docstring."""
        return generate(model, tokenizer, [n % max(1, C) for n in chosen], [(args.global_seed, n) for n in chosen],
                        **how)

    if for_grid:
        if runtime.is_main():                                # so few that sharing them out is not worth it
            chosen = [label + i * max(1, C) for label in labels for i in range(args.num_images)]
            draw_grid(output, chosen, pictures, record, info["classes"], how["batch_size"], args)
    elif not already_made(output, record):
        draw_set(output, pictures, record, how["batch_size"])
    runtime.print_main(f"wrote    {output} ({runtime.format_seconds(time.perf_counter() - start)})")


def default_output(info, settings, args):
    """A file in runs/samples whose name tells apart what differs: model, what was asked for, settings, seed."""
    path = pathlib.Path(info["path"])
    model = f"{path.resolve().parent.name}-{path.stem}" if info["source"] == "ours" else path.stem
    what = f"{args.num_fid_samples}" if args.num_fid_samples else "grid"
    values = "-".join(f"{short}{'_'.join(f'{value:g}' for value in dict.fromkeys(settings[name]))}" for short, name in
                      (("cfg", "cfg_scale"), ("t", "temperature"), ("k", "top_k"), ("p", "top_p")))
    return f"runs/samples/{model}-{what}-{values}-seed{args.global_seed}{'.npz' if args.num_fid_samples else '.png'}"


def draw_grid(output, chosen, pictures, record, names, batch_size, args):
    """One row of pictures for each class, its name under each, and if wanted every picture on its own."""
    bar = tqdm(pictures(chosen), "drawing", math.ceil(len(chosen) / batch_size), disable=None, unit="image",
               unit_scale=batch_size)
    images = torch.cat(list(bar))                                                         # (N, 3, H, W)
    captions = [names[n % len(names)] for n in chosen] if names else None
    scale = max(1, 96 // images.shape[-1])                   # toy pictures are too small to see, and to caption
    runtime.save_png(output, runtime.image_grid(images, args.num_images, captions, scale))
    runtime.write_json(output.with_suffix(".json"), {**record, "classes": captions and list(dict.fromkeys(captions))})
    if args.save_images:
        for n, image in zip(chosen, images):
            label, i = n % max(1, len(names)), n // max(1, len(names))
            runtime.save_png(output.with_suffix("") / f"class-{label:04d}-{i:03d}.png", image.permute(1, 2, 0).numpy())


def draw_set(output, pictures, record, batch_size):
    """The npz of pictures 0 .. N - 1: every rank draws parts of one batch each, then rank 0 joins them."""
    N, parts = record["n"], pathlib.Path(f"{output}.parts")
    count = math.ceil(N / batch_size)
    todo = open_parts(parts, count, record)
    if len(todo) < count:
        runtime.print_main(f"found    {count - sum(map(len, runtime.gather_objects(todo)))} of {count} parts finished")
    chosen = [n for part in todo for n in range(part * batch_size, min((part + 1) * batch_size, N))]
    bar = tqdm(todo, "drawing", unit="image", unit_scale=batch_size * runtime.world_size(),
               disable=None if runtime.is_main() else True)  # counts for all ranks: they are equally fast
    for part, images in zip(bar, pictures(chosen)):
        save_part(parts, part, images.permute(0, 2, 3, 1).numpy())
    runtime.barrier()
    if runtime.is_main():
        shape = (N, *np.load(part_path(parts, 0), mmap_mode="r").shape[1:])
        runtime.write_json(output.with_suffix(".json"), record)
        write_npz(output, shape, read_parts(parts, count))
        shutil.rmtree(parts)
    runtime.barrier()


def already_made(output, record):
    """True if `output` exists and was made with just these settings. Raises `UserError` if with others."""
    if not output.exists():
        return False
    path = output.with_suffix(".json")
    made = json.loads(path.read_text()) if path.exists() else {}
    runtime.check_same(made, json.loads(json.dumps(record)), f"{output} exists; delete it, or choose another "
                       f"--output: what it was made with")
    runtime.print_main("it exists already, made with these settings")
    return True


if __name__ == "__main__":
    runtime.run_script(main, get_args)
