"""What a person looks at: grids, strips and animations of samples, video files, learning curves.

Samples are uint8, images (N, 3, H, W) or clips (N, 3, T, H, W); what is drawn on is an array (h, w, 3).

    python -m support.pictures runs/tokenizer --values loss/l1 codebook_bits     # draws runs/curves.png
"""
import sys

if not __package__:
    print("error: in the folder above, type: python -m support.pictures", file=sys.stderr)
    sys.exit(2)

import contextlib
import fractions
import json
import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from support import runtime
from support.runtime import require

PILLOW_FORMATS = (".webp", ".gif")                 # animated images, for which PyAV is not needed
VIDEO_CODECS = {".mp4": ("libx264", {"crf": "16"}), ".mkv": ("libx264", {"crf": "16"}),
                ".avi": ("mpeg4", {"qmin": "2", "qmax": "3"})}
VIDEO_FORMATS = (*PILLOW_FORMATS, *VIDEO_CODECS)
NOTE = "{} frames of {} ms"                        # of a moving image: Pillow writes equal frames as one
PREVIEW_FPS = 10                                   # half the speed of most videos: 17 frames are short


def to_float(images):
    """uint8 images, any shape and device, to float32 k / 127.5 - 1 in [-1, 1].

    In the form (2k - 255) / 255 only the division rounds, so the result is exactly float32(k / 127.5 - 1).
    The divisor is a tensor because a GPU turns division by a plain number into a less exact multiplication.
    """
    return (images.float() * 2 - 255) / torch.full((), 255.0, device=images.device)


def to_uint8(images, truncate=False):
    """Float images in [-1, 1], any shape, to uint8: the nearest level.

    truncate: cut the fraction off, as for the published numbers; half a level darker on average.
    """
    images = images.float().clamp(-1, 1)
    if truncate:
        return ((images + 1) / 2 * 255).to(torch.uint8)
    return ((images + 1) * 127.5).round().to(torch.uint8)


def image_grid(images, columns, labels=None, scale=1):
    """Lay out uint8 images (N, 3, H, W) on white, `columns` to a row: a uint8 array (h, w, 3).

    labels: one caption for each image, printed under it. scale: enlarges by repeating pixels.
    """
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


def strip(clips, labels=None, scale=1):
    """A row for each of N clips uint8 (N, 3, T, H, W), of up to six of its frames, the first and the last
    among them: a uint8 array (h, w, 3). labels: a caption for each clip."""
    shown = torch.linspace(0, clips.shape[2] - 1, min(6, clips.shape[2])).round().long()
    captions = [label for label in labels for _ in shown] if labels else None
    return image_grid(clips[:, :, shown].transpose(1, 2).flatten(0, 1), len(shown), captions, scale)


def save_image(path, array):
    """Write a uint8 array (h, w, 3) as PNG, atomically."""
    with runtime.atomic(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def save_samples(path, samples, columns, labels=None):
    """Write a grid of samples, `columns` to a row; small ones are enlarged. Returns the paths written.

    Images go to `path`, a PNG. A grid of clips moves, in a file with the suffix of `path` (.webp for .png),
    and the PNG beside it shows frames of one clip for each different label, or of the first eight.
    """
    path = pathlib.Path(path)
    scale = max(1, 96 // samples.shape[-1])
    if samples.dim() == 4:
        save_image(path, image_grid(samples, columns, labels, scale))
        return [path]
    moving = path.with_suffix(".webp") if path.suffix == ".png" else path
    write_video(moving, np.stack([image_grid(samples[:, :, t], columns, labels, scale)
                                  for t in range(samples.shape[2])]), PREVIEW_FPS)
    chosen = list(range(min(8, len(samples))))
    names = None
    if labels:
        names = list(dict.fromkeys(labels))
        chosen = [labels.index(name) for name in names]
    save_image(path.with_suffix(".png"), strip(samples[chosen], names, scale))
    return [moving, path.with_suffix(".png")]


def import_av():
    """PyAV, the bindings of FFmpeg: needed for real videos only, and so not at the top."""
    try:
        import av
    except ImportError:
        raise runtime.UserError(f"videos other than {' and '.join(PILLOW_FORMATS)} need PyAV, which is not "
                                f"installed: pip install av") from None
    return av


def import_pyplot():
    """matplotlib.pyplot, set to draw into files: needed for curves only, and so not at the top."""
    try:
        import matplotlib
    except ImportError:
        raise runtime.UserError("curves need matplotlib; install it with: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def write_video(path, frames, fps=25):
    """Write frames, uint8 array (T, H, W, 3), atomically, in the format of the suffix.

    .mp4 and .mkv are H.264, .avi is MPEG-4, both close to what is seen but not exact, and padded to even
    sides (their colours have half the resolution); .webp is exact; .gif has 256 colours a frame. Of these
    two, equal frames become one that lasts longer; by a note in the file `video_frames` knows all of them.
    Raises `UserError` for other suffixes.
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


def read_metrics(results_dir, kinds=(int, float)):
    """metrics.jsonl of a run as {name: {step: value}}, of these kinds; torn or foreign lines are left out."""
    path = pathlib.Path(results_dir) / "metrics.jsonl"
    require(path.exists(), f"{path} does not exist; name the --results-dir of a training run")
    curves = {}
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, AttributeError, KeyError):
            values = json.loads(line)
            for name, value in values.items():
                if isinstance(value, kinds):
                    curves.setdefault(name, {})[values["step"]] = value
    return curves


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser("Draw the learning curves of training runs.")
    parser.add_argument("runs", nargs="+", help="--results-dir of each run")
    parser.add_argument("--values", nargs="+", help="names logged, a panel each (the first loss)")
    parser.add_argument("--output", default="runs/curves.png", help="PNG to write")
    return parser.parse_args(argv)


def main(args):
    """Draw one panel for each of `args.values`, with a line for each run that has logged it."""
    pyplot = import_pyplot()
    runs = {pathlib.Path(path).name: read_metrics(path) for path in args.runs}
    known = sorted({name for curves in runs.values() for name in curves})
    require(known, f"{' '.join(args.runs)}: nothing is logged there yet")
    args.values = args.values or [next((name for name in known if name.startswith("loss")), known[0])]
    unknown = [name for name in args.values if name not in known]
    require(not unknown, f"--values {' '.join(unknown)}: not logged; choose of {' '.join(known)}")
    figure, panels = pyplot.subplots(1, len(args.values), figsize=(4.2 * len(args.values), 3), squeeze=False)
    for panel, name in zip(panels[0], args.values):
        for run, curves in runs.items():
            if name in curves:
                panel.plot(list(curves[name]), list(curves[name].values()), label=run)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.tight_layout()
    with runtime.atomic(args.output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    print(f"curves: {args.output}")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
