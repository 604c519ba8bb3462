"""The learning curves of training runs, drawn from their logs.

    python -m support.pictures runs/a runs/b                # the curves that matter, in runs/curves.png
    python -m support.pictures runs/ar --values loss grad_norm --output ar.pdf
"""
import contextlib
import json
import os
import pathlib

from support import runtime
from support.runtime import UserError, require

CURVE_FORMATS = (".png", ".pdf", ".svg")
# Of what a run logs, that which matters: of a tokenizer, and of a transformer, which alone logs a "loss".
TOKENIZER_CURVES = ("grid_psnr", "loss/l1", "loss/perceptual", "usage", "perplexity", "codebook_bits",
                    "dead_bits")
AR_CURVES = ("loss", "bits_per_pixel", "grad_norm")


def import_pyplot():
    """matplotlib.pyplot, set to draw into files: needed for curves only, and so not at the top."""
    try:
        import matplotlib.pyplot
    except ImportError:
        raise UserError("curves need matplotlib; install it with: pip install matplotlib") from None
    matplotlib.use("Agg")
    return matplotlib.pyplot


def read_metrics(results_dir, kinds=(int, float)):
    """metrics.jsonl of a run as {name: {step: value}}, of these kinds; torn or foreign lines are left out."""
    path = pathlib.Path(results_dir) / "metrics.jsonl"
    require(path.exists(), f"{path} does not exist; name the --results-dir of a training run")
    curves = {}
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):
            values = json.loads(line)
            for name, value in values.items():
                if isinstance(value, kinds):
                    curves.setdefault(name, {})[int(values["step"])] = value
    return curves


def panels_of(runs, wanted=()):
    """{quantity: [(label, style, {step: value})]} of `runs`, {label: `read_metrics`}: a line for training and
    one for what is held out, of those `wanted`, or of those that matter and are not constant."""
    panels = {}
    for i, (label, curves) in enumerate(runs.items()):
        for name in wanted or (AR_CURVES if "loss" in curves else TOKENIZER_CURVES):
            for key, said, style in ((name, "", "-"), (f"val_{name}", ", held out", "--")):
                if key in curves:
                    panels.setdefault(name, []).append((label + said, f"C{i % 10}{style}", curves[key]))
    vary = [name for name in panels if len({y for *_, line in panels[name] for y in line.values()}) > 1]
    return panels if wanted else {name: panels[name] for name in vary or panels}


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser("Draw the learning curves of training runs.")
    parser.add_argument("runs", nargs="+", help="--results-dir of each run")
    parser.add_argument("--values", nargs="+", default=[],
                        help="names logged, a panel each; without it, those that matter and vary")
    parser.add_argument("--output", default="runs/curves.png", help="file to write, .png, .pdf or .svg")
    return parser.parse_args(argv)


def main(args):
    """Draw the panels, with the lines of each run."""
    require(args.output.lower().endswith(CURVE_FORMATS), f"--output {args.output}: curves are written as "
                                                         f"{', '.join(CURVE_FORMATS)}")
    pyplot = import_pyplot()
    paths = [pathlib.Path(os.path.abspath(run)) for run in args.runs]
    root = os.path.commonpath([path.parent for path in paths])     # what tells runs apart comes after it
    runs = {str(path.relative_to(root)): read_metrics(path) for path in paths}
    known = sorted({name for curves in runs.values() for name in curves})
    unknown = [name for name in args.values if name not in known]
    require(not unknown, f"--values {' '.join(unknown)}: not logged; choose of {' '.join(known)}")
    panels = panels_of(runs, dict.fromkeys(name.removeprefix("val_") for name in args.values))
    require(panels, f"{' '.join(args.runs)}: nothing is logged there yet")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = pyplot.figure(figsize=(4.2 * columns, 3 * rows))
    for k, (name, lines) in enumerate(panels.items(), 1):
        panel = figure.add_subplot(rows, columns, k)
        for label, style, line in lines:
            marker = "o" if len(line) == 1 else ""             # a line through one point would be invisible
            panel.plot(list(line), list(line.values()), style, marker=marker, label=label)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.tight_layout()
    with runtime.atomic(args.output) as temporary:
        figure.savefig(temporary, dpi=110)
    print(f"curves: {args.output}")
