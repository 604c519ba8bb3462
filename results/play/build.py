"""A page to play with: tokenizer and transformer alive in the browser, in one HTML file that needs no other.

    make play                                                  # or: python results/play/build.py
    python results/play/build.py --ckpt runs/ar/step-00001800.pt --photo runs/photos/step-00009000.pt

play.html has the words, play.js computes; the page is both of them with weights and pictures, and asks nobody
for anything. Weights are half floats, channels last, in base64.
"""
import ast
import base64
import dataclasses
import html
import io
import json
import pathlib
import re
import sys

import numpy as np
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from support import checkpoints, pictures, runtime, shapes                 # noqa: E402
from support.runtime import require                                        # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
TOY = ROOT / "assets" / "toy.pt"
PHOTO = ROOT / "assets" / "photo.pt"
TILES = ROOT / "assets" / "photos.png"             # its first row: eight tiles of 64 x 64 pixels, enlarged twice
LARGEST_PAGE = 8 * 2 ** 20                         # bytes
OWN_SIDE = 96                                      # of a user's photograph: a quarter of a second to decode


def base64_of(array):
    """The bytes of a numpy array as text."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def weights_of(model, source):
    """A model as play.js reads it: its config, the names and shapes of its weights, and these one after another
    as half floats. Convolutions (O, C, k, k) become (O, k, k, C), matrices (O, C) become (O, 1, 1, C)."""
    layout = []
    halves = []
    for name, weight in model.state_dict().items():
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        if weight.dim() == 4:
            weight = weight.movedim(1, -1)
        require(weight.abs().max() < 65504, f"{source}: {name} does not fit into half precision")  # nor does NaN
        layout.append((name, list(weight.shape)))
        halves.append(weight.flatten().half().numpy())
    return {"config": dataclasses.asdict(model.config), "layout": layout,
            "halves": base64_of(np.concatenate(halves))}


def tokenizer_of(model, source, images, own_side):
    """A tokenizer as play.js reads it, with uint8 images (B, 3, S, S) to begin with."""
    config = model.config
    require(config.grid_axes == "hw" and config.quantizer == "lfq" and config.bits <= 24,
            f"{source}: the page shows tokenizers of images with --quantizer lfq and 24 bits at most")
    require(config.upsampler == "depth-to-space" and config.downsampler == "strided",
            f"{source}: the page has no layers for --upsampler {config.upsampler}, --downsampler "
            f"{config.downsampler}; name a tokenizer with depth-to-space and strided ones")
    own_side -= own_side % config.downsampling
    return {**weights_of(model, source), "side": images.shape[-1], "ownSide": own_side,
            "pictures": [base64_of(image.movedim(0, -1).numpy()) for image in images]}


def photographs():
    """uint8 (8, 3, 64, 64): the originals that `TILES` shows."""
    with Image.open(TILES) as image:
        row = torch.from_numpy(np.array(image.convert("RGB"))[4:132:2, 4::2]).movedim(-1, 0)       # (3, 64, 528)
    return torch.stack([row[:, :, 66 * i:66 * i + 64] for i in range(8)])


def buttons(images, names, tokenizer):
    """HTML of a button for each of uint8 images (B, 3, S, S), pictures to begin with."""
    page = ""
    for i, (image, name) in enumerate(zip(images, names)):
        file = io.BytesIO()
        Image.fromarray(image.movedim(0, -1).numpy()).save(file, "png")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        page += f'<button onclick="lookAt({tokenizer}, {i})"><img alt="" src="{source}">{name}</button>\n'
    return page


def named(match):
    """HTML for {{FILE NAME}}: a function or class of ours, and the line where it stands today."""
    file, name = match.groups()
    body = ast.parse((ROOT / file).read_text("utf-8")).body
    for part in name.split("."):
        [node] = [node for node in body if getattr(node, "name", None) == part]
        body = node.body
    return f"<code>{name}</code> in {file}, line {node.lineno}"


def main(args):
    """Write the page of the models that `args` (from `get_args`) name."""
    source = f"--ckpt {args.ckpt}"
    model, toy, info = checkpoints.load_ar(args.ckpt)
    config = model.config
    require(toy and config.num_classes and len(config.grid) == 2 and not config.separate_heads,
            f"{source}: the page draws images of classes, without --separate-heads; name such a model, with its "
            "tokenizer in the same file")
    require(len(config.bits) == 2 and max(config.bits) <= 6,
            f"{source}: the page has room for two sub-tokens of 64 entries, but this model has {config.bits} bits")
    side = config.grid[0] * toy.config.downsampling
    images = torch.from_numpy(shapes.draw_images(range(10), "val", side, plain=True))
    tokenizers = [tokenizer_of(toy, source, images, side)]
    transformer = {**weights_of(model, source), "rope": model.rope.flatten(1).tolist()}
    names = [html.escape(name) for name in info["classes"] or map(str, range(config.num_classes))]
    fields = {"classes": "".join(f"<option value={n}>{name}</option>" for n, name in enumerate(names)),
              "pictures": buttons(images, shapes.SHAPES, 0),
              "own": f"It becomes {side} x {side} pixels, and this toy has seen nothing but such shapes: look what "
                     "is left.",
              **{f"bars {m}": "<button></button>" * 2 ** bits for m, bits in enumerate(config.bits)}}
    if args.photo or PHOTO.exists():
        photo, _ = checkpoints.load_tokenizer(args.photo or PHOTO)
        tokenizers.append(tokenizer_of(photo, f"--photo {args.photo or PHOTO}", photographs(), OWN_SIDE))
        fields["pictures"] += buttons(photographs(), [f"photo {n}" for n in range(1, 9)], 1)
        fields["own"] = (f"Of it the largest square, made {OWN_SIDE} x {OWN_SIDE} pixels. The eight tiles shown are "
                         "by Aitzol Berasategi, Sander Klootwijk, Jakub Mede and others (results/README.md).")
    fields["data"] = json.dumps({"tokenizers": tokenizers, "transformer": transformer})
    fields["script"] = (HERE / "play.js").read_text("utf-8")
    page = re.sub(r"{{(\S+\.py) (\S+)}}", named, (HERE / "play.html").read_text("utf-8"))
    page = re.sub(r"{{([a-z]+( \d)?)}}", lambda match: fields[match[1]], page)
    require(len(page) <= LARGEST_PAGE, f"the page would have {len(page) / 2 ** 20:.1f} of at most 8 MiB; name "
                                       "smaller models")
    with runtime.atomic(args.output) as temporary:
        temporary.write_text(page, "utf-8")
    print(f"page  {args.output}, {len(page) / 2 ** 20:.1f} MiB")


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("--ckpt", default=str(TOY), help="transformer, with its tokenizer")
    parser.add_argument("--photo", help="tokenizer for photographs; not given: assets/photo.pt, if it is there")
    parser.add_argument("--output", default="runs/play.html", help="page to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
