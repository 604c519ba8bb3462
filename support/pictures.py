"""What a person looks at: grids and animations of samples, video files, and the curves of curves.py.

Samples are uint8, images (N, 3, H, W) or clips (N, 3, T, H, W); what is drawn on is an array (h, w, 3).
"""
import sys

if not __package__:
    print("error: in the folder above, type: python -m support.pictures", file=sys.stderr)
    sys.exit(2)

import fractions
import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from support import runtime
from support.curves import get_args, main          # of python -m support.pictures
from support.runtime import UserError, require

PILLOW_FORMATS = (".webp", ".gif")                 # animated images, for which PyAV is not needed
VIDEO_CODECS = {".mp4": ("libx264", {"crf": "16"}), ".mkv": ("libx264", {"crf": "16"}),
                ".avi": ("mpeg4", {"qmin": "2", "qmax": "3"})}
VIDEO_FORMATS = (*PILLOW_FORMATS, *VIDEO_CODECS)
NOTE = "{} frames of {} ms"                        # of a moving image: Pillow writes equal frames as one
PREVIEW_FPS = 10                                   # half the speed of most videos: 17 frames are short


def to_float(images):
    """uint8 images, any shape and device, to float32 k / 127.5 - 1 in [-1, 1], exactly: of (2k - 255) / 255
    only the division rounds. By a plain number, a GPU would multiply instead, which is less exact."""
    return (images.float() * 2 - 255) / torch.full((), 255.0, device=images.device)


def to_uint8(images, truncate=False):
    """Float images in [-1, 1], any shape, to uint8: the nearest level; truncate: the fraction cut off, as for
    the published numbers, which is half a level darker on average."""
    images = images.float().clamp(-1, 1) + 1
    return (images / 2 * 255 if truncate else (images * 127.5).round()).to(torch.uint8)


def image_grid(images, columns, labels=None, scale=1):
    """uint8 images (N, 3, H, W) on white, `columns` to a row: a uint8 array (h, w, 3).
    labels: captions, printed under the images. scale: enlarges by repeating pixels."""
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = images.shape[2:]
    caption = 14 if labels else 0
    padded = torch.nn.functional.pad(images, (0, 0, 0, caption), value=255)
    canvas = make_grid(padded, nrow=columns, padding=2, pad_value=255)
    if len(images) == 1:                           # make_grid leaves a single image without its margin
        canvas = torch.nn.functional.pad(canvas, (2, 2, 2, 2), value=255)
    canvas = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=11)
    for i, text in enumerate(labels or ()):
        text = " ".join(text.split())              # a class may be called by anything, even lines
        while len(text) > 1 and draw.textlength(text, font=font) > width:
            text = text[:-1]
        x = 2 + i % columns * (width + 2) + width / 2
        y = 2 + i // columns * (height + caption + 2) + height + caption / 2
        draw.text((x, y), text, fill="black", font=font, anchor="mm")
    return np.asarray(canvas)


def save_image(path, array):
    """Write a uint8 array (h, w, 3) as PNG, atomically."""
    with runtime.atomic(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def save_samples(path, samples, columns, labels=None):
    """Write a grid of samples, `columns` to a row; small ones are enlarged. Returns the paths written.

    Images go to `path`, a PNG. A grid of clips moves, in a file with the suffix of `path` (.webp for .png);
    the PNG beside it has a row of frames for the first clip of each label, or for each of the first eight.
    """
    path = pathlib.Path(path)
    still = path.with_suffix(".png")
    scale = max(1, 96 // samples.shape[-1])
    if samples.dim() == 4:
        save_image(path, image_grid(samples, columns, labels, scale))
        return [path]
    moving = path.with_suffix(".webp") if path == still else path
    frames = [image_grid(frame, columns, labels, scale) for frame in samples.unbind(2)]
    write_video(moving, np.stack(frames), PREVIEW_FPS)
    names = list(dict.fromkeys(labels or ()))
    chosen = samples[[labels.index(name) for name in names] or slice(8)]
    shown = torch.linspace(0, samples.shape[2] - 1, min(6, samples.shape[2])).round().long()
    captions = [name for name in names for _ in shown]
    rows = chosen[:, :, shown].transpose(1, 2).flatten(0, 1)
    save_image(still, image_grid(rows, len(shown), captions, scale))
    return [moving, still]


def import_av():
    """PyAV, the bindings of FFmpeg: needed for real videos only, and so not at the top."""
    try:
        import av
        return av
    except ImportError:
        raise UserError(f"videos other than {' and '.join(PILLOW_FORMATS)} need PyAV, which is not "
                        f"installed: pip install av") from None


def write_video(path, frames, fps=25):
    """Write frames, uint8 array (T, H, W, 3), atomically, in the format of the suffix, or raise `UserError`.

    .webp is exact, .gif has 256 colours a frame; of both, equal frames become one that lasts longer, and a
    note in the file tells `video_frames` of them. .mp4 and .mkv are H.264, .avi is MPEG-4, both close to
    what is seen, and padded to even sides (their colours have half the resolution).
    """
    suffix = pathlib.Path(path).suffix.lower()
    require(suffix in VIDEO_FORMATS, f"{path}: videos are written as {', '.join(VIDEO_FORMATS)}, not as "
                                     f"{suffix or 'a file without suffix'}")
    with runtime.atomic(path) as temporary:
        if suffix in PILLOW_FORMATS:
            first, *others = [Image.fromarray(frame) for frame in frames]
            milliseconds = round(1000 / fps)
            note = NOTE.format(len(frames), milliseconds).encode()
            first.save(temporary, save_all=True, append_images=others, duration=milliseconds, loop=0,
                       lossless=True, **{"comment" if suffix == ".gif" else "xmp": note})
            return
        av = import_av()
        codec, options = VIDEO_CODECS[suffix]
        frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], "edge")
        with av.open(str(temporary), "w") as container:
            rate = fractions.Fraction(fps).limit_denominator(1000)
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


if __name__ == "__main__":
    runtime.run_script(main, get_args)
