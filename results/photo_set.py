"""The photographs that assets/photo.pt learned from: square tiles, cut from free packages of Debian 12.

    mkdir packages && cd packages && apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 \\
        mate-backgrounds plasma-workspace-wallpapers gcompris-qt-data tuxpaint-stamps-default
    for package in *.deb; do dpkg-deb -x $package .; done
    python results/photo_set.py packages photo_set                       # of 96 x 96
    python results/photo_set.py packages photo_set_160 --side 160

gcompris keeps its pictures as WebP inside of Qt's resource files, which are searched for them. Stamps of Tux
Paint are cut out, and get a ground of some colour. Flat tiles are mostly left out.
"""
import argparse
import io
import pathlib
import random
import struct
import sys

import numpy as np
from PIL import Image

# (folder below the packages, suffix, shorter side before cutting: tiles at most)
SOURCES = [("usr/share/backgrounds", ".jpg", {256: 20, 512: 30}),
           ("usr/share/wallpapers", ".jpg", {128: 2, 256: 8, 512: 12}),
           ("usr/share/tuxpaint/stamps", ".png", {150: 2}),
           ("usr/share/gcompris-qt", ".rcc", {128: 2, 256: 5})]


def pictures_in(path):
    """Yield the pictures of a file as PIL RGB images, of a resource file all of the WebP files in it."""
    content = path.read_bytes()
    if path.suffix != ".rcc":
        image = Image.open(io.BytesIO(content)).convert("RGBA")
        ground = random.choice(["white", tuple(random.randrange(256) for _ in range(3))])
        yield Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
        return
    first = content.find(b"RIFF")
    while first >= 0:
        size, = struct.unpack("<I", content[first + 4:first + 8])
        if content[first + 8:first + 12] == b"WEBP":
            image = Image.open(io.BytesIO(content[first:first + 8 + size]))
            if image.mode == "RGB" and min(image.size) >= 200:
                yield image
        first = content.find(b"RIFF", first + 4)


def tiles_of(image, side, shorter, most):
    """Yield up to `most` tiles of `side` pixels of an image whose shorter side becomes `shorter` first."""
    scale = max(shorter, side) / min(image.size)
    if scale > 1:
        return
    image = image.resize([max(side, round(size * scale)) for size in image.size], Image.Resampling.LANCZOS)
    across = range(0, image.width - side + 1, side - 16)
    places = [(x, y) for x in across for y in range(0, image.height - side + 1, side - 16)]
    for x, y in random.sample(places, len(places)):
        tile = image.crop((x, y, x + side, y + side))
        if most and (np.asarray(tile).std() >= 12 or random.random() < 0.15):
            most -= 1
            yield tile


def main(args):
    """Write the tiles."""
    random.seed(0)
    args.target.mkdir(parents=True, exist_ok=True)
    count = 0
    for folder, suffix, sizes in SOURCES:
        paths = [path for path in sorted((args.packages / folder).rglob(f"*{suffix}"))
                 if not path.is_symlink() and not {"symbols", "cartoon"} & set(path.parts)]
        for path in paths:
            for image in pictures_in(path):
                for shorter, most in sizes.items():
                    for tile in tiles_of(image, args.side, shorter, most):
                        tile.save(args.target / f"{count:05d}.png")
                        count += 1
    if not count:
        print(f"error: {args.packages} holds none of the packages above; see --help", file=sys.stderr)
        sys.exit(2)
    print(f"{count} tiles in {args.target}")


def get_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("packages", type=pathlib.Path, help="folder in which the packages were unpacked")
    parser.add_argument("--side", type=int, default=96, help="of a tile, in pixels (96)")
    parser.add_argument("target", type=pathlib.Path, help="folder to write to")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(get_args())
