"""Files through a tokenizer: images and clips to reconstructions, to ids, and ids back to files.

    python tokenizer.py reconstruct photo.jpg --ckpt in1k-256          # beside it, and what changed
    python tokenizer.py encode photos --output ids.npz
    python tokenizer.py decode ids.npz --output decoded

Without files, held-out generated images or clips. tokenizer.py hands its command line over to here. Axis
letters: 3 colours, T frames, H W height and width of an image or clip, t h w of a part of it.
"""
import sys

if not __package__:
    print("error: in the folder above, type: python tokenizer.py", file=sys.stderr)
    sys.exit(2)

import json
import math
import pathlib
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import pil_to_tensor

from support import checkpoints, data, layouts, metrics, pictures, reading, runtime, sources
from support.runtime import require

# ---- 1. Of any size: in parts ------------------------------------------------------------------------------

def parts_of(shape, frames, tile):
    """Cut (3, [T,] H, W) into parts that go through the model one by one, of `frames` and `tile` at most.

    Yields (index, weight): slices of (3, T, H, W), and how much the part counts, (h, w). Tiles overlap by a
    quarter, along which one fades into the next. frames, tile None: not cut.
    """
    *time, H, W = shape[1:]
    T = math.prod(time)
    overlap = (tile or 0) // 4

    def spans(length):                                     # [(start, end, weights)], which add up to 1
        step = (tile or length) - overlap
        for start in range(0, max(1, length - overlap), step):
            end = min(start + step + overlap, length)
            fade = (torch.arange(overlap) + 0.5) / max(1, overlap)
            weight = torch.ones(end - start)
            if start > 0:
                weight[:overlap] = fade
            if end < length:
                weight[end - start - overlap:] *= fade.flip(0)
            yield slice(start, end), weight

    for first in range(0, T, frames or T):
        for rows, down in spans(H):
            for columns, across in spans(W):
                window = slice(first, first + (frames or T))
                yield (slice(None), window, rows, columns), down[:, None] * across


def to_tokens(model, x, tile=None):
    """uint8 (3, H, W) or (3, T, H, W) of any size to a list of ids, a tensor for each of `parts_of` it.

    Parts are filled up to whole tokens, two at least, with their last pixels, and in time with their last
    frame. An image is a clip of one frame.
    """
    frames = model.config.frames
    stride = model.config.downsampling
    device = next(model.parameters()).device
    ids = []
    for index, _ in parts_of(x.shape, frames, tile):
        part = pictures.to_float(x.view(3, -1, *x.shape[-2:])[index].to(device))[None]    # (1, 3, t, h, w)
        t, h, w = part.shape[2:]
        spare = [0, -w % stride, 0, -h % stride, 0, (1 - t) % model.config.time_stride]
        if max(h, w) <= stride:
            spare[1] += stride
        part = F.pad(part, spare, mode="replicate")
        ids.append(model.encode(part if frames else part[:, :, 0]))
    return ids


def from_tokens(model, ids, shape, tile=None):
    """The inverse: uint8 of this `shape`, (3, H, W) or (3, T, H, W)."""
    canvas = torch.zeros(3, math.prod(shape[1:-2]), *shape[-2:])
    for (index, weight), part in zip(parts_of(shape, model.config.frames, tile), ids):
        t, h, w = canvas[index].shape[1:]
        y = model.decode(part)[0].float().clamp(-1, 1).cpu()
        canvas[index] += weight * y.view(3, -1, *y.shape[-2:])[:, :t, :h, :w]
    return pictures.to_uint8(canvas).view(*shape)


# ---- 2. Files ----------------------------------------------------------------------------------------------

def read_files(files, config):
    """Yield (name, path below the folder given, uint8 (3, [T,] H, W), frames a second) of files and folders;
    broken ones, and moving ones for a tokenizer of images, are left out."""
    suffixes = reading.IMAGE_SUFFIXES + (reading.VIDEO_SUFFIXES if config.frames else ())
    if not files:
        held_out = sources.build_dataset("generated", "val", data.View(config.resolution, config.frames))
        for i in range(8):
            yield f"generated-{i}", f"generated-{i}", held_out[i][0], 10
    paths = []
    for path in map(pathlib.Path, files):
        require(path.exists(), f"{path} does not exist; check the path")
        found = [path] if path.suffix.lower() in suffixes else []
        if path.is_dir():                                  # the same files as --data-path would read
            found = [path / name for name in layouts.files_to_see(path, suffixes, bool(config.frames))]
        require(found, f"{path}: this tokenizer takes {' '.join(suffixes)}, or a folder of them")
        paths += [(file, file.relative_to(path if path.is_dir() else path.parent)) for file in found]
    for i, (path, below) in enumerate(paths):              # numbered: two folders may hold the same name
        try:
            x, fps = read_file(path, bool(config.frames))
        except (reading.Unreadable, OSError) as error:     # anything else is a bug
            print(f"broken file left out: {path} ({error})")
        else:
            yield f"{i}-{path.stem}", below.as_posix(), x, fps


def read_file(path, clips=False):
    """(uint8 (3, H, W) or (3, T, H, W), frames a second or 0) of an image or, where `clips` are meant, a
    video, turned upright. Raises `Unreadable`."""
    if not (clips and reading.is_clip(path)):
        return pil_to_tensor(reading.decode(path, upright=True)), 0
    frames = [pil_to_tensor(frame()) for frame in reading.video_frames(path, upright=True)]
    if len({frame.shape for frame in frames}) != 1:
        raise reading.Unreadable("it has no frames, or frames of several sizes")
    return torch.stack(frames, dim=1), reading.frame_rate(path)


def write_file(folder, name, x, fps):
    """Write uint8 (3, H, W) as FOLDER/NAME.png, (3, T, H, W) as FOLDER/NAME.webp; returns the path."""
    if x.dim() == 3:
        pictures.save_image(f"{folder}/{name}.png", x.movedim(0, -1).numpy())
        return f"{folder}/{name}.png"
    pictures.write_video(f"{folder}/{name}.webp", x.movedim(0, -1).numpy(), fps)
    return f"{folder}/{name}.webp"


def read_ids(path, identity):
    """What `encode` wrote to `path`: ([name, shape, frames a second, parts, tile] of each file, all arrays).

    The arrays "0-0", "0-1", .. hold the ids of the first file's parts, "paths" and "classes" the files' paths
    and the folders that these begin with. identity: the hash of the tokenizer's weights, which must have been
    the same. Raises `UserError`.
    """
    require(pathlib.Path(path).is_file(), f"{path} does not exist; check the path")
    require(zipfile.is_zipfile(path), f"{path} is damaged or no npz; give one that encode wrote")
    with checkpoints.guard(path), np.load(path) as file:
        arrays = dict(file)
    require("about" in arrays, f"{path} holds no ids of ours; give an npz that encode wrote")
    with checkpoints.guard(path):
        about = dict(json.loads(str(arrays["about"])))
    require(about.get("tokenizer") == identity, f"{path} was encoded by another tokenizer, "
            f"{about.get('ckpt')}; name it with --ckpt")
    return about["samples"], arrays


# ---- 3. The command line -----------------------------------------------------------------------------------

PHOTO = pathlib.Path(__file__).parent.parent / "assets" / "photo.pt"

def compare(model, x, y, tile):
    """(uint8 original, reconstruction and four times their difference side by side, what to say of them)."""
    psnr = metrics.psnr(metrics.as_frames(x[None]), metrics.as_frames(y[None])).mean()
    error = (4 * (x.int() - y.int()).abs()).clamp(max=255).to(torch.uint8)
    line = torch.full_like(x[..., :4], 255)
    text = f", PSNR {psnr:.2f} dB"
    if tile and x[0].numel() <= 2 ** 22:                   # the whole fits into memory, too
        whole = from_tokens(model, to_tokens(model, x), x.shape)
        text += f", at most {int((whole.int() - y.int()).abs().max())} levels from the image in one piece"
    return torch.cat([x, line, y, line, error], dim=-1), text


def get_args(argv=None):
    """Parse the command line; no command at all means "reconstruct"."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("command", nargs="?", default="reconstruct",
                        choices=("reconstruct", "encode", "decode"),
                        help="files beside their reconstructions and errors; files to ids; ids to files")
    parser.add_argument("files", nargs="*", help="images, clips or folders; for decode the npz of encode")
    parser.add_argument("--ckpt", help="a file or a published name; not given: the newest of runs/tokenizer, "
                        "or where there is none assets/photo.pt")
    parser.add_argument("--output", help="folder, or for encode the npz (runs/reconstructions, runs/ids.npz)")
    parser.add_argument("--tile", type=runtime.bounded(int, 64), help="cut images into tiles of so many "
                        "pixels, for less memory; GroupNorm sees a tile's mean, so that tones can differ")
    parser.add_argument("--raw-weights", action="store_true", help="the raw weights, not their EMA")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return parser.parse_intermixed_args(argv)              # files may stand behind flags


def main(args):
    """Run the command."""
    device = runtime.setup_process_group(args.device)
    ckpt = args.ckpt or next(reversed(runtime.list_checkpoints("runs/tokenizer")), PHOTO)
    if ckpt == PHOTO:
        print("runs/tokenizer is empty, so this is assets/photo.pt, a small tokenizer of photographs (18 "
              "bits for 2 x 2 pixels); the published ones are 160 times larger: --ckpt in1k-256")
    model, info = checkpoints.load_tokenizer(ckpt, not args.raw_weights)
    model.to(device)
    print(f"{ckpt}: {info['preset']}, {info['weights']} weights")
    identity = checkpoints.weights_hash(model)
    encoding = args.command == "encode"
    output = pathlib.Path(args.output or ("runs/ids.npz" if encoding else "runs/reconstructions"))
    runtime.check_writable(output.parent if encoding else output)
    require(not (encoding and output.is_dir()), f"--output {output} is a folder; name a file in it")
    if args.command == "decode":
        require(args.files, "decode needs files: the npz that encode wrote")
        for j, path in enumerate(args.files):
            encoded, arrays = read_ids(path, identity)
            for k, (name, shape, fps, parts, tile) in enumerate(encoded):
                ids = [torch.from_numpy(arrays[f"{k}-{i}"]).to(device) for i in range(parts)]
                # A file cannot say where else to write, and two may hold the same name.
                name = (f"{j}-" if args.files[1:] else "") + pathlib.PurePath(name).name
                print(write_file(output, name, from_tokens(model, ids, shape, tile), fps))
        return
    arrays = {}
    encoded, paths = [], []
    for k, (name, path, x, fps) in enumerate(read_files(args.files, model.config)):
        ids = to_tokens(model, x, args.tile)
        encoded.append([name, list(x.shape), fps, len(ids), args.tile])
        paths.append(path)
        tokens = sum(part.numel() for part in ids)
        bits = tokens * math.log2(model.quantizer.vocabulary) / x[0].numel()
        line = f"{name}: {' x '.join(map(str, x.shape[1:]))}, {tokens:,} tokens, {bits:.4f} bits a pixel"
        if encoding:
            arrays.update({f"{k}-{i}": part.cpu().numpy().astype(np.uint32) for i, part in enumerate(ids)})
        else:
            beside, text = compare(model, x, from_tokens(model, ids, x.shape, args.tile), args.tile)
            line += f"{text}: {write_file(output, name, beside, fps)}"
        print(line)
    require(encoded, "none of the files could be read")
    if encoding:
        about = {"tokenizer": identity, "ckpt": str(ckpt), "samples": encoded}
        with runtime.atomic(output) as temporary, open(temporary, "wb") as file:
            classes = [path.split("/")[0] if "/" in path else "" for path in paths]
            np.savez(file, about=np.array(json.dumps(about)), paths=paths, classes=classes, **arrays)
        print(f"wrote {output}")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
