"""Pictures from an auto-regressive checkpoint: labelled grids to look at, and large sets for evaluators.

    python sample.py                                            # a grid of what train_ar.py has learned
    python sample.py --ckpt AR_256_B.ckpt --classes 207,otter --num-images 8 --mixed-precision bf16
    torchrun --nproc-per-node=8 sample.py --ckpt AR_256_B.ckpt --num-fid-samples 50000 \\
        --mixed-precision bf16 --compile                        # 50 a class; then: evaluate.py generation

A checkpoint of ours and a published AR file contain the tokenizer that goes with them: one file is enough.
A model of clips (train_ar.py on a tokenizer of video.py) makes animated grids, and npz files of clips.

Pictures are numbered. Number n shows class n mod C and is drawn from the seed (--global-seed, n). So a set of
N has N / C pictures of every class (where C does not divide N, the first classes have one more), and
`--classes` shows the first pictures of just these classes. Batches, and with them parts on disk, hold
consecutive numbers: which ones depends neither on the number of ranks nor on interruptions, and so neither
does the set. The order is this fixed one; an evaluator that needs a random one (Inception Score) shuffles.

In reading order: 1. from labels to pixels; 2. flags; 3. grids and sets. Axis letters: B batch, C classes, H W
picture, M sub-tokens of a token, N pictures, T frames of a clip.
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
import video

# ------------------------------------------------------------------------------------------------------------
# 1. From labels to pixels
# ------------------------------------------------------------------------------------------------------------


def to_pixels(images, rounding):
    """Float pictures in [-1, 1], any shape, to uint8.

    "truncate" is how the published sets were made; it darkens a picture by half a level on average. "round"
    takes the nearest level.
    """
    if rounding == "truncate":
        return ((images.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
    return runtime.to_uint8(images)


@torch.no_grad()
def generate(model, tokenizer, labels, seeds, batch_size=64, rounding="round", mixed_precision="fp32",
             compile=False, **settings):
    """Yield pictures, uint8 (b, 3, H, W), or clips (b, 3, T, H, W), on the CPU, `batch_size` at once, in the
    order of `labels`.

    model: an ARModel on the device to use (`ar_model.prepare_for_sampling` makes it faster); tokenizer: that
    of its tokens, there too. labels (N,): ints or a tensor; seeds: as many, each an int >= 0 or a tuple of
    such. mixed_precision: of the decoder; the transformer computes in the precision of its weights.
    settings: cfg_scale, temperature, top_k, top_p, each one value or one for each sub-token.

    The last batch is filled up to `batch_size` and cut again, because matrix products of another size round
    differently: a picture depends on its label, its seed, the batch size and its place in the batch alone.
    """
    labels, config = torch.as_tensor(labels), model.config
    if not len(labels):
        return
    device = model.class_embedding.weight.device
    at_once = batch_size if tokenizer.unit == "images" else 4  # a clip's activations take 20 times the memory
    sampler = ar_model.Sampler(model, batch_size, compile=compile, **settings)
    if compile:
        tokenizer.to(memory_format=torch.channels_last).decoder.compile(dynamic=False)
    for first in range(0, len(labels), batch_size):
        chosen = [min(i, len(labels) - 1) for i in range(first, first + batch_size)]
        subtokens = sampler(labels[chosen], [seeds[i] for i in chosen])        # M x (B, tokens)
        ids = tok.subtokens_to_ids(subtokens, config.bits)                     # (B, tokens)
        images = []
        for part in ids.unflatten(1, config.grid).split(at_once):
            with runtime.autocast(device, mixed_precision):
                part = tokenizer.decode(part)                                  # (b, 3, [T,] H, W)
            images.append(to_pixels(part, rounding).cpu())
        yield torch.cat(images)[:len(labels) - first]


def load(ckpt, tokenizer=None, raw_weights=False, trust=False):
    """(ARModel, Tokenizer, info) of our checkpoint or published AR file `ckpt`: on the CPU, in eval mode.

    tokenizer: path of a tokenizer, for a published file that contains none; for one of ours, it must be the
    one that made its tokens. info: what `ar_model.load_ar` says, and "path", "name", "classes" (their names)
    and "tokenizer" ("path", "sha256", "weights"). Raises `UserError` where the two do not fit each other.
    """
    model, info = ar_model.load_ar(ckpt, trust, ema=not raw_weights)
    ours, origin, classes = info["source"] == "ours", info["tokenizer"], None
    if ours:
        stored = runtime.load_checkpoint(ckpt, trust, mmap=True)
        classes, info["preset"], first_stage = (stored[key] for key in ("classes", "preset", "first_stage"))
    if tokenizer:
        decoder, its = video.load_any_tokenizer(tokenizer, not raw_weights, trust)
        runtime.require(
            not ours or its["sha256"] == origin["sha256"],
            f"--tokenizer {tokenizer} (sha256 {its['sha256'][:12]}) is not the one that {ckpt} was trained "
            f"with, {ours and origin['path']} (sha256 {ours and origin['sha256'][:12]}); leave the flag out, "
            f"as the checkpoint contains its tokenizer")
        origin = {"path": str(tokenizer), "sha256": its["sha256"], "weights": its["weights"]}
    elif ours:
        # Checkpoints from before there were models of clips name no format.
        clips = first_stage.get("format") == video.VideoTokenizer.format
        kind = video.VideoTokenizer if clips else tok.Tokenizer
        decoder = kind(tok.config_from_dict(first_stage["config"], ckpt, kind.config_type)).eval()
        runtime.load_state_strictly(decoder, first_stage["model"], f"the tokenizer inside {ckpt}")
    else:
        try:
            decoder, its = tok.load_tokenizer(ckpt, not raw_weights, trust)
        except runtime.UserError as error:
            raise runtime.UserError(f"{ckpt} contains no whole tokenizer ({str(error)[:200]}); name the file "
                                    f"of one with --tokenizer") from None
        origin = {"path": str(ckpt), "sha256": its["sha256"], "weights": its["weights"]}
    bits, grid = model.config.bits, model.config.grid
    runtime.require(len(grid) == len(decoder.config.folds),
                    f"{ckpt} draws {' x '.join(map(str, grid))} tokens, but its tokenizer {origin['path']} "
                    f"has maps {decoder.code_map}")
    runtime.require(
        decoder.config.vocabulary == 2 ** sum(bits),
        f"{ckpt} draws tokens of {' + '.join(map(str, bits))} bits, but its tokenizer {origin['path']} has "
        f"{decoder.config.vocabulary} codes, not {2 ** sum(bits)}; give the right one with --tokenizer")
    info.update(path=str(ckpt), name=pathlib.Path(ckpt).name, tokenizer=origin,
                classes=class_names(classes, model.config.num_classes))
    return model, decoder, info


def class_names(stored, count):
    """The names of `count` classes: those `stored` in our checkpoint, else numbers.

    A thousand classes without names, or named after WordNet (n01440764, ...), are ImageNet's.
    """
    if count == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in stored or []):
        return list(_IMAGENET_CATEGORIES)
    return list(stored or map(str, range(count)))


# ------------------------------------------------------------------------------------------------------------
# 2. Flags
# ------------------------------------------------------------------------------------------------------------

# Where nothing is published: mild guidance, from which every model gains.
OWN_SETTINGS = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
# Of ImageNet: golden retriever, otter, panda, geyser, balloon, macaw, valley, arctic fox.
WELL_KNOWN = (207, 360, 388, 974, 417, 88, 979, 279)


def numbers(kind):
    """argparse type: "1.9,2.0" to (1.9, 2.0), a value for each sub-token; "2" to (2,), for all of them."""
    def parse(text):
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers as in 2 or 1.9,2.0, not {text}") from None
    return parse


def add_drawing_flags(parser, batch_size_flag):
    """The flags that decide what a model draws, here and in `evaluate.py generation`."""
    group = parser.add_argument_group("model to draw from")
    group.add_argument("--ckpt", help="AR checkpoint, ours or published; not given: the newest of runs/ar")
    group.add_argument("--tokenizer", help="tokenizer checkpoint, for an AR file that contains none")
    group.add_argument("--raw-weights", action="store_true", help="use no averaged weights, even if stored")
    group.add_argument("--trust-checkpoint", action="store_true", help="unpickle classes (can run code)")

    group = parser.add_argument_group(
        "how to draw: one value, or one for each sub-token as in 1.9,2.0. Defaults: for AR-B, L and XL those "
        "of table 5 for an npz, and what the authors show pictures with for a grid; else guidance 2")
    group.add_argument("--cfg-scale", type=numbers(float), help="classifier-free guidance (1: none)")
    group.add_argument("--temperature", type=numbers(float), help="divides the logits (0: greedy)")
    group.add_argument("--top-k", type=numbers(int), help="draw among the k likeliest entries (0: all)")
    group.add_argument("--top-p", type=numbers(float), help="draw among the likeliest that reach p (1: all)")
    group.add_argument("--rounding", choices=("truncate", "round"),
                       help="from float pixels to uint8; not given: truncate for published files, as their "
                            "numbers were measured that way, else round")
    group.add_argument(batch_size_flag, type=runtime.positive_int, default=64,
                       help="samples drawn at once on a rank (another size moves the last bit of logits)")
    group.add_argument("--mixed-precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                       help="dtype of the transformer's weights, and of autocast in the decoder")
    group.add_argument("--compile", action="store_true", help="compiled blocks in CUDA graphs (GPU only)")


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    group = parser.add_argument_group("what to draw")
    group.add_argument("--classes", help="a grid of these classes, numbers or names as in 207,otter; not "
                                         "given: all classes, or eight if there are more than 16")
    group.add_argument("--num-images", type=runtime.positive_int, default=8, help="pictures of each class")
    group.add_argument("--save-images", action="store_true", help="also save each picture of the grid alone")
    group.add_argument("--num-fid-samples", type=runtime.positive_int,
                       help="no grid, but an npz of so many pictures, equally many of every class")
    group.add_argument("--output", help="PNG or npz to write, of clips an animation (with a PNG of some "
                                        "frames beside it), its settings beside it as .json; not given: a "
                                        "name in runs/samples that tells the model and the settings")
    group.add_argument("--global-seed", type=runtime.non_negative_int, default=0,
                       help="another seed, other pictures")

    add_drawing_flags(parser, "--batch-size")
    group = parser.add_argument_group("speed")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to sample")
    return parser.parse_args(argv)


def settings_from_args(args, model, info):
    """cfg_scale, temperature, top_k and top_p, each a list with a value for each sub-token.

    Raises `UserError` for values that mean nothing, or for another number of them.
    """
    settings = dict(ar_model.SAMPLING.get(info["preset"], OWN_SETTINGS))
    if info["preset"] in ar_model.SAMPLING and not args.num_fid_samples:
        settings = {name: pair[0] for name, pair in ar_model.SAMPLING["looking"].items()}    # fits any M
    if model.config.num_classes == 0:
        settings["cfg_scale"] = 1.0                       # there is nothing to guide towards
    settings.update({name: getattr(args, name) for name in settings if getattr(args, name) is not None})
    columns = zip(*ar_model.sampling_settings(len(model.config.bits), **settings))
    return dict(zip(ar_model.Settings._fields, map(list, columns)))


def plan(args, model, info, n, batch_size, device):
    """What decides the pixels of `n` samples: (keyword arguments for `generate`, the record to store)."""
    rounding = args.rounding or ("truncate" if info["source"] == "published" else "round")
    how = {**settings_from_args(args, model, info), "rounding": rounding, "batch_size": min(batch_size, n),
           "mixed_precision": args.mixed_precision, "compile": args.compile}
    record = {"command": "sample", "n": n, **how, "global_seed": args.global_seed, "device": device.type,
              "torch": torch.__version__, "tokenizer": info["tokenizer"],
              "checkpoint": {key: info[key] for key in info if key not in ("tokenizer", "classes")}}
    return how, record


def find_classes(text, names):
    """The class numbers behind --classes. Raises `UserError` for unknown ones, and for ambiguous names."""
    if text is None and len(names) <= 16:
        return list(range(len(names)))
    if text is None:
        return list(WELL_KNOWN) if len(names) == 1000 else [i * len(names) // 8 for i in range(8)]
    labels = []
    for part in (part.strip().lower() for part in text.split(",")):
        # Names first: the folders of a data set may be called after numbers that are not their positions.
        found = [label for label, name in enumerate(names) if name.lower() == part]
        if not found and part.isdecimal() and int(part) < len(names):
            found = [int(part)]
        close = [name for name in names if part and part in name.lower()] or names
        runtime.require(found, f"--classes: {part!r} is none of the {len(names)} classes; give a number "
                               f"below {len(names)}, or a name such as {', '.join(close[:5])}")
        runtime.require(len(found) == 1, f"--classes: {part!r} names the classes {found}; give a number")
        labels += found
    return labels


# ------------------------------------------------------------------------------------------------------------
# 3. Grids and sets
# ------------------------------------------------------------------------------------------------------------

def main(args):
    """Draw what `args` (from `get_args`) ask for, and write it down with all settings."""
    device = runtime.setup_process_group(args.device)
    for_grid = args.num_fid_samples is None
    runtime.require(for_grid or not (args.classes or args.save_images),
                    "--num-fid-samples makes an npz of all classes, but --classes and --save-images belong "
                    "to a grid; leave one or the other out")
    ckpt = args.ckpt or runtime.latest_checkpoint("runs/ar", "AR model")
    model, tokenizer, info = load(ckpt, args.tokenizer, args.raw_weights, args.trust_checkpoint)
    names = info["classes"]
    C = max(1, len(names))                                # an unconditional model has one nameless class
    runtime.require(names or not args.classes, f"--classes: {ckpt} is an unconditional model; leave it out")
    labels = range(C) if not for_grid or not names else find_classes(args.classes, names)
    N = args.num_fid_samples or len(labels) * args.num_images
    how, record = plan(args, model, info, N, args.batch_size, device)
    suffixes = [".npz"] if not for_grid else [".png"] if tokenizer.unit == "images" else [
        f".{name}" for name in video.FORMATS]
    output = pathlib.Path(args.output or default_output(info, how, args, suffixes[0]))
    runtime.require(output.suffix in suffixes,
                    f"--output {output}: this writes a {' or '.join(suffixes)} file")
    runtime.print_facts(
        ("model", f"{ckpt}: {info['preset'] or 'custom'}, {info['weights']} weights, step {info['step']}"),
        ("pictures", f"{N:,} of {len(labels):,} classes, seed {args.global_seed}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in how.items())),
        ("running", f"{device}, {runtime.world_size()} ranks"),
    )

    dtype = runtime.AUTOCAST_DTYPES[args.mixed_precision] or torch.float32
    ar_model.prepare_for_sampling(model.to(device), dtype)
    tokenizer.to(device)

    def pictures(chosen):
        """Batches of the pictures with the numbers `chosen`: the rule of the module docstring."""
        return generate(model, tokenizer, [n % C for n in chosen], [(args.global_seed, n) for n in chosen],
                        **how)

    if not for_grid:
        draw_set(output, pictures, record)
    elif runtime.is_main():                               # so few that it is not worth sharing them out
        chosen = [i * C + label for label in labels for i in range(args.num_images)]
        draw_grid(output, chosen, pictures, record, names, args)
    runtime.print_main(f"samples  {output}")


def default_output(info, settings, args, suffix):
    """A file in runs/samples, its name telling what differs: model, what was asked for, settings, seed."""
    path = pathlib.Path(info["path"]).resolve()
    parts = [f"{path.parent.name}-{path.stem}" if info["source"] == "ours" else path.stem,
             str(args.num_fid_samples or "grid")]
    for short, name in (("cfg", "cfg_scale"), ("t", "temperature"), ("k", "top_k"), ("p", "top_p")):
        parts.append(short + "_".join(f"{value:g}" for value in dict.fromkeys(settings[name])))
    parts.append(f"seed{args.global_seed}")
    return f"runs/samples/{'-'.join(parts)}{suffix}"


def draw_grid(output, chosen, pictures, record, names, args):
    """One row of pictures for each class, its name under each; if wanted, every picture on its own, too.

    Clips move in the grid, and the PNG beside it shows frames of the first clip of each class.
    """
    size = record["batch_size"]
    bar = tqdm(pictures(chosen), "drawing", math.ceil(len(chosen) / size), disable=None, unit="image",
               unit_scale=size)
    images = torch.cat(list(bar))                                              # (N, 3, [T,] H, W)
    captions = [names[n % len(names)] for n in chosen] if names else None
    scale = max(1, 96 // images.shape[-1])                # toy pictures are too small to see, and to caption
    if images.dim() == 4:
        runtime.save_png(output, runtime.image_grid(images, args.num_images, captions, scale))
    else:
        video.save_animation(output, video.animated_grid(images, args.num_images, captions, scale))
        first = captions and captions[::args.num_images]
        runtime.save_png(output.with_suffix(".png"),
                         video.strip(images[::args.num_images], labels=first, scale=scale))
    shown = {"classes": list(dict.fromkeys(captions)) if captions else None, "numbers": chosen}
    runtime.write_json(output.with_suffix(".json"), {**record, **shown})
    for n, image in zip(chosen, images.movedim(1, -1).numpy() if args.save_images else ()):
        i, label = divmod(n, max(1, len(names)))
        path = output.with_suffix("") / f"class-{label:04d}-{i:03d}{output.suffix}"
        (runtime.save_png if image.ndim == 3 else video.save_animation)(path, image)


def write_npz(path, shape, arrays):
    """Write uint8 `arrays`, which joined have the shape `shape`, as `arr_0` of an npz file, atomically.

    `np.savez` needs the whole array in memory: 9.8 GB for 50,000 pictures of 256 x 256. But an npz is a zip
    of npy files, and an npy is a short header before the raw bytes, so parts can follow each other into it.
    Nothing is compressed, because evaluators map the file and pictures hardly shrink. A bare `ZipInfo` holds
    no time of day, so equal pictures make equal files.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (zipfile.ZipFile(temporary, "w") as archive,
          archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member):
        np.lib.format.write_array_header_1_0(member, header)
        for array in arrays:
            member.write(array.tobytes())
    os.replace(temporary, path)


def draw_set(output, pictures, record):
    """The npz of pictures 0 .. N - 1. Every rank draws parts of one batch each; then rank 0 joins them."""
    if output.exists():
        path = output.with_suffix(".json")
        made_with = json.loads(path.read_text()) if path.exists() else {}
        runtime.check_same(made_with, json.loads(json.dumps(record)), f"{output} exists; delete it, or "
                           f"choose another --output: what it was made with")
        runtime.print_main(f"{output} exists already, made with these settings")
        return
    N, size, folder = record["n"], record["batch_size"], pathlib.Path(f"{output}.parts")
    count = math.ceil(N / size)
    todo = runtime.open_parts(folder, count, record)
    missing, start = sum(map(len, runtime.gather_objects(todo))), time.perf_counter()
    if missing < count:
        runtime.print_main(f"found    {count - missing} of {count} parts of an interrupted run")
    chosen = [n for part in todo for n in range(part * size, min((part + 1) * size, N))]
    # The bar of rank 0 counts for all ranks, which are equally fast.
    bar = tqdm(todo, "drawing", unit="image", unit_scale=size * runtime.world_size(),
               disable=None if runtime.is_main() else True)
    for part, images in zip(bar, pictures(chosen)):
        runtime.save_part(folder, part, images.movedim(1, -1).numpy())                 # (b, [T,] H, W, 3)
    runtime.barrier()
    speed = min(N, missing * size) / (time.perf_counter() - start)
    runtime.print_main(f"speed    {speed:.1f} samples/s")
    if runtime.is_main():
        shape = (N, *np.load(runtime.part_path(folder, 0), mmap_mode="r").shape[1:])
        runtime.write_json(output.with_suffix(".json"), record)
        write_npz(output, shape, runtime.read_parts(folder, count))
        shutil.rmtree(folder)
    runtime.barrier()


if __name__ == "__main__":
    runtime.run_script(main, get_args)
