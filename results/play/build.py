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

from support import checkpoints, runtime, shapes                 # noqa: E402
from support.runtime import require                                        # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
TOY = ROOT / "assets" / "toy.pt"
PHOTO = ROOT / "assets" / "photo.pt"
TILES = ROOT / "assets" / "photos.png"             # its first row: five tiles of 64 x 64, enlarged twice
LARGEST_PAGE = 8 * 2 ** 20                         # bytes
OWN_SIDE = 96                                      # of a user's photograph: a quarter of a second to decode


def base64_of(array):
    """The bytes of a numpy array as text."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def weights_of(model, source):
    """A model as play.js reads it: config, names and shapes of weights, and all of them as half floats.
    Convolutions (O, C, k, k) become (O, k, k, C), matrices (O, C) become (O, 1, 1, C)."""
    layout = []
    halves = []
    for name, weight in model.state_dict().items():
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        if weight.dim() == 4:
            weight = weight.movedim(1, -1)
        fits = weight.abs().max() < 65504          # nor does NaN
        require(fits, f"{source}: {name} does not fit into half precision; name another checkpoint")
        layout.append((name, list(weight.shape)))
        halves.append(weight.flatten().half().numpy())
    return {"config": dataclasses.asdict(model.config), "layout": layout,
            "halves": base64_of(np.concatenate(halves))}


def tokenizer_of(model, source):
    """A tokenizer as play.js reads it."""
    config = model.config
    require(config.grid_axes == "hw" and config.quantizer == "lfq" and config.bits <= 24,
            f"{source}: the page shows tokenizers of images with --quantizer lfq and 24 bits at most")
    require(config.upsampler == "depth-to-space" and config.downsampler == "strided",
            f"{source}: the page has no layers for --upsampler {config.upsampler}, --downsampler "
            f"{config.downsampler}; name a tokenizer with depth-to-space and strided ones")
    return weights_of(model, source)


def photographs():
    """uint8 (5, 3, 64, 64): the originals that `TILES` shows."""
    with Image.open(TILES) as image:
        row = np.array(image.convert("RGB"))[4:132:2, 4::2]                                     # (64, 405, 3)
    return torch.stack([torch.from_numpy(row[:, 66 * i:66 * i + 64]).movedim(-1, 0) for i in range(5)])


def buttons(images, names, tokenizer, text):
    """HTML of a row of pictures to begin with, uint8 (B, 3, S, S), for tokenizer 0 or 1; `text` above it."""
    page = f'<small>{text}</small><div class="row pictures">'
    for i, (image, name) in enumerate(zip(images, names)):
        file = io.BytesIO()
        Image.fromarray(image.movedim(0, -1).numpy()).save(file, "png")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        guess = f"$('surprise-class').value = {i}; " if tokenizer == 0 else ""     # shapes are in class order
        page += (f'<button onclick="{guess}look(this.firstChild, tokenizers[{tokenizer}])">'
                 f'<img alt="" src="{source}">{name}</button>\n')
    return page + "</div>"


def named(match):
    """HTML for {{FILE NAME}}: a function or class of ours, and the line where it stands today."""
    file, name = match.groups()
    body = ast.parse((ROOT / file).read_text("utf-8")).body
    for part in name.split("."):
        [node] = [node for node in body if getattr(node, "name", None) == part]
        body = node.body
    return f"<code>{name}</code> in {file}, line {node.lineno}"


def check(config, toy, source):
    """Refuse transformers that the page has no room for."""
    require(toy and config.num_classes and len(config.grid) == 2 and not config.separate_heads,
            f"{source}: the page draws images of classes; name a transformer of such, without "
            "--separate-heads, with its tokenizer in the same file")
    require(config.grid[0] == config.grid[1], f"{source}: the page shows square images; name another")
    require(len(config.bits) == 2 and max(config.bits) <= 6,
            f"{source}: the page shows two sub-tokens of 6 bits at most, not {config.bits}; name another")


def main(args):
    """Write the page of the models that `args` (from `get_args`) name."""
    source = f"--ckpt {args.ckpt}"
    model, toy, info = checkpoints.load_ar(args.ckpt)
    config = model.config
    check(config, toy, source)
    h, w = config.grid
    side = h * toy.config.downsampling
    images = torch.from_numpy(shapes.draw_images(range(10), "val", side, plain=True))
    names = [html.escape(name) for name in info["classes"] or map(str, range(config.num_classes))]
    data = {"transformer": {**weights_of(model, source), "rope": model.rope.flatten(1).tolist()},
            "tokenizers": [tokenizer_of(toy, source)], "grid": {"h": h, "w": w, "N": h * w}, "ownSide": side}
    fields = {"classes": "".join(f"<option value={n}>{name}</option>" for n, name in enumerate(names)),
              "pictures": buttons(images, shapes.SHAPES, 0, f"Drawn shapes, {toy.config.bits} bits a token"),
              "own": f"It becomes {side} x {side} pixels. This toy has seen nothing but such shapes: look "
                     "what it makes of anything else."}
    for m, bits in enumerate(config.bits):
        before = "drawing.tokens[drawing.t][0], " if m else ""             # what the entry is given
        fields[f"bars {m}"] = "".join(f'<button onclick="turn(drawing.t, [{before}{entry}])">{entry}</button>'
                                      for entry in range(2 ** bits))
    if args.photo or PHOTO.exists():
        photo, _ = checkpoints.load_tokenizer(args.photo or PHOTO)
        source = f"--photo {args.photo or PHOTO}"
        data["tokenizers"].append(tokenizer_of(photo, source))
        require(64 % photo.config.downsampling == 0, f"{source}: its stride must divide 64; name another")
        data["ownSide"] = OWN_SIDE - OWN_SIDE % photo.config.downsampling
        fields["pictures"] += buttons(photographs(), [f"photo {n}" for n in range(1, 6)], 1,
                                      f"Photographs, another tokenizer, {photo.config.bits} bits a token")
        fields["own"] = (f"Of it the largest square, made {data['ownSide']} pixels wide. The tiles shown are "
                         "by Aitzol Berasategi, Sander Klootwijk, Jakub Mede and others (results/README.md).")
    fields["data"] = json.dumps(data)
    fields["script"] = (HERE / "play.js").read_text("utf-8")
    page = re.sub(r"{{(\S+\.py) (\S+)}}", named, (HERE / "play.html").read_text("utf-8"))
    page = re.sub(r"{{([a-z]+( \d)?)}}", lambda match: fields[match[1]], page)
    require(len(page) <= LARGEST_PAGE, f"the page would have {len(page) / 2 ** 20:.1f} MiB, more than "
                                       f"{LARGEST_PAGE // 2 ** 20}: too much to load; name smaller models")
    with runtime.atomic(args.output) as temporary:
        temporary.write_text(page, "utf-8")
    print(f"page  {args.output}, {len(page) / 2 ** 20:.1f} MiB")


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("--ckpt", default=str(TOY), help="transformer, with its tokenizer")
    parser.add_argument("--photo", help="tokenizer for photographs; not given: assets/photo.pt, if any")
    parser.add_argument("--output", default="runs/play.html", help="page to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
