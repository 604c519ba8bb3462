"""A report: all that lies in the folders of runs on one HTML page, which needs no other file.

    make report                                                # or: python results/report.py runs
    python results/report.py runs/a runs/b --output both.html
"""
import base64
import contextlib
import html
import io
import json
import math
import os
import pathlib
import sys

import numpy as np
from PIL import Image, ImageSequence

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent)]

from support import checkpoints, pictures, runtime, tokens                 # noqa: E402
from support.curves import read_metrics                                    # noqa: E402
from support.runtime import require                                        # noqa: E402

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What the runs made</title><style>
body { max-width: 1100px; margin: auto; padding: 12px; font: 15px/1.4 sans-serif; overflow-wrap: anywhere }
img, svg { display: block; max-width: 100%; height: auto } figure { margin: 0 0 8px } small { color: #555 }
svg { width: 100%; height: 80px; background: #f4f4f4; fill: none; stroke: #06c }
polyline { vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-width: 2px }
pre, .wide { overflow-x: auto } td, th { padding-right: 16px; text-align: left; overflow-wrap: normal }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 0 16px }
.bits { display: flex; flex-wrap: wrap; gap: 4px; font-size: 12px } .bit { width: 18px; text-align: center }
.bit i { display: block; height: 60px; background: linear-gradient(#06c, #06c) bottom no-repeat #f4f4f4 }
.dead { color: #c00; font-weight: bold } .bit.dead i { background-color: #fcc }
</style></head><body><h1>What the runs made</h1>
"""


def chart(name, *curves):
    """HTML of curves {x: y}, the second one dashed; its numbers stand beside it as text."""
    curves = [{x: y for x, y in curve.items() if math.isfinite(y)} for curve in curves]
    xs = [x for curve in curves for x in curve]
    ys = [y for curve in curves for y in curve.values()]
    if not ys:
        return ""
    lines = ""
    for curve, dashes in zip(curves, ("none", "5 3")):
        points = [f"{1 + 98 * (x - min(xs)) / (max(xs) - min(xs) or 1):.2f},"
                  f"{38 - 36 * (y - min(ys)) / (max(ys) - min(ys) or 1):.2f}" for x, y in curve.items()]
        lines += f'<polyline points="{" ".join(points[:1] + points)}" stroke-dasharray="{dashes}"/>'
    last = ", held out ".join(f"{list(curve.values())[-1]:.4g}" for curve in curves if curve)
    return (f'<figure><b>{html.escape(name)}</b> {last}<svg viewBox="0 0 100 40" preserveAspectRatio="none">'
            f"{lines}</svg><small>{min(ys):.4g} to {max(ys):.4g}</small></figure>")


def bit_bars(balance):
    """HTML of a bar for each bit, as high as it is often set. What (almost) never changes is dead."""
    page = '<h3>How often each bit is set</h3><div class="bits">'
    dead = [k for k, fraction in enumerate(balance) if not 0.01 <= fraction <= 0.99]
    for k, fraction in enumerate(balance):
        page += (f'<span class="bit{" dead" if k in dead else ""}" title="{fraction:.2%}">'
                 f'<i style="background-size: 100% {fraction:.2%}"></i>{k}</span>')
    return page + f'</div><p class="{"dead" if dead else "alive"}">Dead bits: {str(dead)[1:-1] or "none"}</p>'


def id_histogram(path):
    """HTML of how often each id occurs, the most frequent first, in the tokens that train_ar.py stored."""
    header = runtime.read_json(path.with_suffix(".json"))
    require({"shape", "missing"} <= header.keys(), f"{path.with_suffix('.json')} is not of stored tokens")
    ids = tokens.open_ids(path, header)
    rows = tokens.stored_rows(path, header)
    counts = ids[rows[::math.ceil(ids.nbytes / 2 ** 26)]]                            # 64 MiB tell enough
    counts = np.sort(np.unique(counts, return_counts=True)[1])[::-1]
    ranks = np.linspace(0, len(counts) - 1, min(300, len(counts))).astype(int).tolist()
    return (f"<h3>How often each id occurs</h3><p>{len(counts):,} ids in {counts.sum():,} tokens, the most "
            f"frequent first</p>" + chart("tokens", {rank: int(counts[rank]) for rank in ranks}))


def embed(path, errors=False):
    """HTML of an image or animation; with errors: also of four times what the rows below differ by."""
    files = {f"{path.parent.name}/{path.stem}": path.read_bytes()}
    if errors:
        with Image.open(path) as image:                    # originals above reconstructions, white between
            frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(image)]
        half = len(frames[0]) // 2 - 1
        frames = [(4 * abs(x[:half + 2] - x[half:])).clip(0, 255).astype(np.uint8) for x in frames]
        first, *others = map(Image.fromarray, frames)
        file = io.BytesIO()
        first.save(file, path.suffix[1:], save_all=bool(others), append_images=others, lossless=True, loop=0,
                   duration=round(1000 / pictures.PREVIEW_FPS))
        files["4 x the error"] = file.getvalue()
    page = ""
    for name, content in files.items():
        name = html.escape(name)
        source = f"data:image/{path.suffix[1:]};base64,{base64.b64encode(content).decode()}"
        page += f'<figure><small>{name}</small><img alt="{name}" src="{source}"></figure>'
    return page


def newest(folder, pattern):
    """A list of the newest picture, if any; of a grid that moves, not the strip of frames beside it."""
    paths = [*folder.glob(f"{pattern}.webp"), *folder.glob(f"{pattern}.png")]
    paths = [path for path in paths if path.suffix == ".webp" or path.with_suffix(".webp") not in paths]
    return sorted(paths, key=os.path.getmtime)[-1:]


def folded(values):
    """HTML of a dict that is seen when one asks for it."""
    text = html.escape(json.dumps(values, indent=1))
    return f"<details><summary>Settings</summary><pre>{text}</pre></details>"


def run_section(folder):
    """HTML of a training run: its curves, newest pictures, bits, ids, settings."""
    curves = read_metrics(folder, (int, float, list))
    balances = curves.pop("bit_balance", {})               # the only list
    page = f'<h2>Training: {html.escape(folder.name)}, step {max(curves.pop("step", [0]))}</h2>'
    for path in newest(folder, "reconstructions-*") + newest(folder, "samples-*"):
        page += embed(path, errors=path.name.startswith("reconstructions"))
    page += '<div class="panels">'
    for name in curves:
        values = {**curves[name], **curves.get(f"val_{name}", {})}.values()
        constant = len(values) > 2 and len(set(values)) == 1             # as the number of dead bits, 0
        if not constant and name.removeprefix("val_") not in curves.keys() - {name}:
            page += chart(name, curves[name], curves.get(f"val_{name}", {}))
    page += "</div>"
    for balance in list(balances.values())[-1:]:
        page += bit_bars(balance)
    with contextlib.suppress(runtime.UserError, OSError):                # one of its files may be deleted
        page += id_histogram(folder / "tokens.bin")
    for path in runtime.list_checkpoints(folder)[-1:]:
        with contextlib.suppress(runtime.UserError, OSError):            # damaged: as may be after a crash
            page += folded(checkpoints.read(path).get("args"))           # tensors stay on the disk
    return page


def evaluation_section(path):
    """HTML of what evaluate.py has measured: a table, its grid, and how it was measured."""
    record = runtime.read_json(path)
    measured = record.get("checkpoint", {}).get("path") or path.stem
    title = f"{record.get('command', 'measurement')} of {measured}".capitalize()
    page = f"<h2>{html.escape(title)}</h2>"
    page += "".join(embed(grid, errors=True) for grid in newest(path.parent, path.stem))
    page += '<div class="wide"><table>'
    for name, entry in record.pop("metrics", {}).items():
        cells = (name, f"{float(entry['value']):.5g}", f"{entry['measured_on']} {entry['label']}")
        page += f"<tr><td>{'</td><td>'.join(map(html.escape, cells))}</td></tr>"
    return page + "</table></div>" + folded(record)


def main(args):
    """Write a page of what lies in the folders `args.runs`: measurements, samples, training runs."""
    page = PAGE
    for folder in map(pathlib.Path, args.runs):
        require(folder.is_dir(), f"{folder} is no folder; name that of your runs, such as runs")
        sections = [f"<h2>Samples</h2>{embed(path)}" for path in newest(folder / "samples", "*")]
        measured = sorted(folder.glob("evaluation/*.json"), key=lambda path: path.name[:5] != "recon")
        sections += [evaluation_section(path) for path in measured]
        logs = sorted(folder.rglob("metrics.jsonl"), key=os.path.getmtime)
        sections += [run_section(path.parent) for path in logs]
        page += "\n".join(sections) or f"<p>There is nothing in {html.escape(str(folder))} yet.</p>"
    with runtime.atomic(args.output) as temporary:
        temporary.write_text(f"{page}</body></html>\n", "utf-8")
    print(f"report: {args.output}")


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--output", default="runs/report.html", help="page to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
