"""The claims of the paper at the scale of a laptop: which of them come true, by how much, and how surely?

    make claims                                       # all of them, three seeds each
    python results/claims.py codebook --seeds 3       # one of them
    python results/claims.py draw                     # the figures, from the CSVs in results/ alone
    python results/claims.py draw --add mine.csv      # with your own rows on top

A claim is a sentence of the paper, a list of settings, the commands of this project's own scripts that measure
one setting, and what to read from what they write. Commands that two claims share run once; a finished one is
never run again, so this may be killed and started at any time. One row for each run goes to
results/CLAIM.csv, means and spreads to results/claims.md, figures to assets/claims/.
"""
import collections
import concurrent.futures
import csv
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np                                                         # noqa: E402

import checkpoints                                                         # noqa: E402
import pictures                                                            # noqa: E402
import runtime                                                             # noqa: E402

HEAD = """# The paper's claims at the scale of a laptop

Written by `make claims`: mean ± standard deviation over the seeds, from the CSVs beside. What they say, and what they cannot
say, is in [README.md](README.md). `frechet`, `agreement`, `precision`, `recall` and `mind` are of the small classifier of
`tests/judge.py`, and compare with nothing elsewhere.

"""

# ---- 1. The claims -----------------------------------------------------------------------------------------

# A command's {0}, {1} .. are the newest checkpoints, {0.samples}, {0.tokens} the files, of the commands before
# it. Where results go and the seed are added below. JUDGE and its features: see tests/judge.py.
TRAIN = "train_tokenizer.py --length 200 "
MEASURE = "evaluate.py reconstruction --ckpt {0}"
JUDGE = "tests/judge.py {0}"
TOKENS = "train_ar.py --length 1 --tokenizer {0}"                          # encodes the 20,000 images once
TRAIN_AR = "train_ar.py --length 300 --tokenizer {0} --tokens {1.tokens} "
DRAW = "sample.py --ckpt {2} --num-fid-samples 300 --cfg-scale "
JUDGE_DRAWN = "tests/judge.py {3.samples}"

QUANTIZERS = {"LFQ": "--quantizer lfq --bits {bits}", "VQ": "--quantizer vq --codebook-size {codes}",
              "SimVQ": "--quantizer simvq --codebook-size {codes}", "FSQ": "--quantizer fsq --levels {levels}"}
LEVELS = {6: "8 8", 8: "4 8 8", 10: "4 4 8 8", 12: "8 8 8 8", 14: "4 8 8 8 8"}
ENTROPY = {"weight 0": "--entropy-weight 0", "weight 0.02": "", "weight 0.1": "--entropy-weight 0.1",
           "annealed": "--entropy-anneal-steps 100", "groups": "--entropy groups", "bits": "--entropy bits"}
DESIGN = {"full model": "--blocks 2", "average pooling": "--blocks 2 --downsampler average",
          "nearest upsampling": "--blocks 2 --upsampler nearest",
          "no adaptive norm": "--blocks 2 --no-adaptive-norm", "half the blocks": "", "2^8 codes": "--blocks 2 --bits 8"}
LOSSES = {"L1": "--l2-weight 0", "L1 + L2": "",
          "and GAN": "--gan-weight 0.1",
          "and GAN with LeCAM": "--gan-weight 0.1 --lecam-weight 0.001",
          "and LPIPS": "--perceptual-weight 1"}
SPLITS = {"one softmax": ("", "--split 10"), "5 + 5": ("", "--split 5 5"), "3 + 7": ("", "--split 3 7"),
          "4 + 3 + 3": ("", "--split 4 3 3"), "5 + 5, separate heads": ("", "--split 5 5 --separate-heads"),
          "5 + 5, BSQ in 2 groups": ("--quantizer bsq --groups 2", "--split 5 5")}
CLIPS = {"generated": "generated", "real": "clips --resize 96 --image-size 32"}
SIZES = {"32, as trained": "", "64, without training": " --image-size 64"}

OF_TOKENIZERS = ["psnr", "ssim", "frechet", "usage", "perplexity", "dead_bits"]
OF_SAMPLES = ["agreement", "precision", "recall", "mind"]
Claim = collections.namedtuple("Claim", "sentence settings commands figures x lines")


def tokenizer_claim(sentence, name, table, figures=OF_TOKENIZERS):
    """A claim on tokenizers that differ in flags: one setting for each row of `table`, {setting: flags}."""
    return Claim(sentence, [{name: setting} for setting in table],
                 lambda row: [(TRAIN + table[row[name]]).strip(), MEASURE, JUDGE], figures, name, None)


CLAIMS = {
    "codebook": Claim(
        "Tables 3 and 4: with lookup-free quantisation a larger vocabulary gives better images; VQ collapses.",
        [{"quantizer": name, "bits": bits} for bits in LEVELS for name in QUANTIZERS],
        lambda row: [TRAIN + QUANTIZERS[row["quantizer"]].format(
            bits=row["bits"], codes=2 ** row["bits"], levels=LEVELS[row["bits"]]), MEASURE, JUDGE],
        OF_TOKENIZERS, "bits", "quantizer"),
    "entropy": tokenizer_claim("Equation 3: without the entropy term codes stay unused; its weight and its form "
                               "trade their use against the error.", "entropy term", ENTROPY,
                               ["psnr", "usage", "perplexity", "token_bits", "codebook_bits", "samples/s"]),
    "design": tokenizer_claim("Table 3: strided convolutions, depth-to-space, adaptive GroupNorm, depth and codes "
                              "each add something.", "model", DESIGN),
    "losses": tokenizer_claim("Section 3: the GAN pays in error for sharpness; LeCAM keeps the game close.", "loss",
                              LOSSES, ["psnr", "ssim", "frechet", "sharpness", "usage"]),
    "factorisation": Claim(
        "Section 2.3 and table 5: sub-tokens predicted one after the other replace one large softmax.",
        [{"factorisation": name} for name in SPLITS],
        lambda row: [(TRAIN + SPLITS[row["factorisation"]][0]).strip(), TOKENS,
                     TRAIN_AR + SPLITS[row["factorisation"]][1], DRAW + "2", JUDGE_DRAWN],
        ["val_bits", "agreement", "samples/s", "parameters"], "factorisation", None),
    "scaling": Claim(
        "Table 5: larger transformers have a lower loss and better samples.",
        [{"width": width, "steps": steps} for steps in (150, 300) for width in (48, 96, 160, 256)],
        lambda row: [TRAIN.strip(), TOKENS, f"train_ar.py --length {row['steps']} --tokenizer {{0}} --tokens "
                     f"{{1.tokens}} --width {row['width']} --lr {0.4 / row['width']:.3g}"],
        ["val_bits", "parameters", "flops"], "parameters", "steps"),
    "guidance": Claim(
        "Table 5's settings: guidance trades the variety of samples for their likeness to the class.",
        [{"guidance": scale} for scale in (1, 1.5, 2, 3, 4, 6)],
        lambda row: [TRAIN.strip(), TOKENS, TRAIN_AR + "--split 5 5", DRAW + str(row["guidance"]), JUDGE_DRAWN,
                     "evaluate.py generation --metrics tokens --data-path generated-plain --samples {3.samples}"],
        [*OF_SAMPLES, "tokens", "tokens-real"], "guidance", None),
    "memory": Claim(
        "arXiv 2605.06207, the entropy cliff: log2(N) / K tokens are enough to tell N training images apart.",
        [{"bits": bits, "images": n} for bits in (6, 10, 14) for n in (200, 2000, 20000)],
        lambda row: [TRAIN + QUANTIZERS["LFQ"].format(bits=row["bits"]),
                     TOKENS + " --split " + {6: "3 3", 10: "5 5", 14: "7 7"}[row["bits"]]],
        ["tokens to tell apart", "log2 N / K", "tokens shared with a new image"], "images", "bits"),
    "inflation": Claim(
        "Section 2.2: a tokenizer of clips that starts from one of images learns faster.",
        [{"clips": name, "start": start} for name in CLIPS for start in ("from scratch", "inflated")],
        lambda row: [TRAIN + "--channel-multipliers 1 1 2 --data-path generated",
                     "train_tokenizer.py --preset toy-video --length 150 --data-path " + CLIPS[row["clips"]]
                     + {"from scratch": "", "inflated": " --init-from {0}"}[row["start"]],
                     "evaluate.py reconstruction --max-samples 200 --ckpt {1}"],
        ["psnr", "ssim", "usage"], "start", "clips"),
    "resolution": Claim(
        "Table 4: a tokenizer trained at one size works at twice the size.",
        [{"size": size} for size in SIZES] + [{"size": "64, trained there"}],
        lambda row: [TRAIN.strip(), MEASURE + SIZES[row["size"]]] if row["size"] in SIZES else
        [TRAIN + "--image-size 64", MEASURE],
        ["psnr", "ssim", "usage"], "size", None),
}


# ---- 2. Runs -----------------------------------------------------------------------------------------------

OUTPUT = {"train_tokenizer.py": "--resume --results-dir {}", "train_ar.py": "--resume --results-dir {}",
          "evaluate.py": "--output {}", "sample.py": "--output {}/samples.npz",
          "tests/judge.py": "--classifier {0}/../classifier.pt --output {0}/judge.json"}


class Done:
    """What a command has left in its folder, for the commands after it."""

    def __init__(self, folder):
        self.folder = folder
        self.samples = folder / "samples.npz"
        self.tokens = folder / "tokens.bin"

    def __str__(self):
        return str(runtime.latest_checkpoint(self.folder))


def run_command(command, seed, args, locks):
    """Run one command of our scripts unless it has run; returns its `Done`. Its folder is called by its words."""
    script = command.split()[0]
    if script not in ("evaluate.py", "tests/judge.py"):
        command += f" --global-seed {seed}"
    if args.scale != 1:                                                   # a trial: everything shorter
        command = re.sub(r"(--length|--num-fid-samples) (\d+)",
                         lambda found: f"{found[1]} {max(4, int(float(found[2]) * args.scale))}", command)
    name = pathlib.Path(script).stem + "-" + hashlib.sha256(command.encode()).hexdigest()[:12]
    folder = pathlib.Path(args.runs_dir) / name
    with locks[folder]:                                                   # two settings may share a command
        finished = folder / "finished.json"
        if not finished.exists():
            folder.mkdir(parents=True, exist_ok=True)
            words = [sys.executable, *command.split(), *OUTPUT[script].format(folder).split()]
            began = time.time()
            with open(folder / "log.txt", "w") as log:
                code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
            runtime.require(code == 0, f"{command} failed; see {folder}/log.txt")
            runtime.write_json(finished, {"command": command, "seconds": time.time() - began})
    return Done(folder)


def figures_of(folder):
    """{name: figure} of all that a command wrote: JSONs, the last of what it logged, and its model's size."""
    figures = {}
    if (folder / "metrics.jsonl").exists():
        figures.update({name: list(curve.values())[-1] for name, curve in pictures.read_metrics(folder).items()})
    for path in folder.glob("*.json"):
        stored = json.loads(path.read_text())
        figures.update({name: value for name, value in stored.items() if isinstance(value, float)})
        figures.update({name: metric["value"] for name, metric in stored.get("metrics", {}).items()})
    return figures


def measure(name, row, seed, args, locks):
    """Run the commands of one setting with one seed; returns the row for the CSV."""
    claim = CLAIMS[name]
    done = []
    for command in claim.commands(row):
        done.append(run_command(command.format(*done), seed, args, locks))
    figures = {}
    for one in done:
        figures.update(figures_of(one.folder))
    seconds = sum(json.loads((one.folder / "finished.json").read_text())["seconds"] for one in done)
    figures.update(SPECIAL.get(name, lambda *_: {})(row, done))
    version = re.search(r'version = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    return {**row, "seed": seed, **{key: f"{figures[key]:.5g}" for key in claim.figures if key in figures},
            "seconds": f"{seconds:.0f}", "version": version}


def model_size(row, done):
    """Parameters of the transformer, and operations spent: 6 for each parameter and token (64 an image)."""
    model, _, _ = checkpoints.load_ar(str(done[2]))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "flops": 6 * parameters * row.get("steps", 300) * 32 * 64}


def prefixes(row, done):
    """How many tokens, read from the top left, it takes until no two of N images agree any more (mean), and how
    many an image that was not among them shares with its best match."""
    codes = np.fromfile(done[1].tokens, "<i8").reshape(-1, 64)            # (20000, 64)
    known = codes[:row["images"]]
    new = codes[-1000:]                                                   # of N = 20,000, these are left out
    if row["images"] == len(codes):
        known = codes[:-1000]
    apart = np.full(len(known), 64)
    shared = np.zeros(len(new))
    for t in range(64, 0, -1):
        _, inverse, count = np.unique(known[:, :t], axis=0, return_inverse=True, return_counts=True)
        apart[count[inverse.ravel()] == 1] = t
    for t in range(1, 65):
        seen = {prefix.tobytes() for prefix in known[:, :t]}
        shared[[prefix.tobytes() in seen for prefix in new[:, :t]]] = t
    return {"tokens to tell apart": apart.mean(), "log2 N / K": np.log2(len(known)) / row["bits"],
            "tokens shared with a new image": shared.mean()}


SPECIAL = {"factorisation": model_size, "scaling": model_size, "memory": prefixes}


def missing(name, setting):
    """What a setting needs that this machine has not, or None."""
    commands = " ".join(CLAIMS[name].commands(setting))
    if "--perceptual-weight" in commands and not any(pathlib.Path(runtime.cache_dir()).glob("*vgg16*")):
        return "VGG-16's weights, which any run with --perceptual-weight downloads"
    if "--data-path clips" in commands and not pathlib.Path("clips").exists():
        return "a folder clips/ of videos, with train/ and val/"
    return None


# ---- 3. CSVs, tables and figures ---------------------------------------------------------------------------

def columns(name):
    """Header of a claim's CSV: settings, seed, figures, seconds, version."""
    return [*CLAIMS[name].settings[0], "seed", *CLAIMS[name].figures, "seconds", "version"]


def read_rows(path, header):
    """The whole rows {column: text} of a CSV with this header; a last line that was cut off is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    lines = list(csv.reader(text[:text.rfind("\n") + 1].splitlines()))
    runtime.require(not lines or lines[0] == header, f"{path} has other columns than {', '.join(header)}; it is of "
                    f"another claim or version: move it away")
    return [dict(zip(header, line)) for line in lines[1:] if len(line) == len(header)]


def write_rows(path, header, rows):
    """Write a CSV, atomically."""
    with runtime.atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def means(name, rows):
    """{setting (a tuple of texts): {figure: (mean, standard deviation, runs)}} in the order of the claim."""
    claim = CLAIMS[name]
    found = {}
    for setting in claim.settings:
        key = tuple(str(value) for value in setting.values())
        own = [row for row in rows if tuple(row[column] for column in setting) == key]
        for figure in claim.figures:
            values = [float(row[figure]) for row in own if row[figure]]
            if values:
                spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
                found.setdefault(key, {})[figure] = (np.mean(values), spread, len(values))
    return found


def table(name, rows):
    """A claim's markdown: the sentence, mean +- standard deviation over seeds, and the figure."""
    claim = CLAIMS[name]
    lines = [f"## {name}", "", f"> {claim.sentence}", "",
             "| " + " | ".join([*claim.settings[0], *claim.figures, "runs"]) + " |",
             "|---" * (len(claim.settings[0]) + len(claim.figures) + 1) + "|"]
    for key, found in means(name, rows).items():
        cells = [f"{found[f][0]:.4g} ± {found[f][1]:.2g}" if f in found else "" for f in claim.figures]
        lines.append("| " + " | ".join([*key, *cells, str(max(n for _, _, n in found.values()))]) + " |")
    return "\n".join([*lines, "", f"![{name}](../assets/claims/{name}.png)", ""])


def draw(name, rows, extra, folder):
    """Write a claim's figure: a panel for each quantity, a line or dots for its settings, whiskers of 1 deviation.
    `extra` are the reader's own rows, drawn as crosses."""
    from matplotlib import pyplot
    claim = CLAIMS[name]
    names = list(claim.settings[0])
    stored = means(name, rows)
    quantities = [figure for figure in claim.figures if figure not in (claim.x, "flops")
                  and any(figure in found for found in stored.values())]
    figure, panels = pyplot.subplots(1, len(quantities), figsize=(3.1 * len(quantities), 3.4), squeeze=False)
    for panel, quantity in zip(panels[0], quantities):
        for source, mark in ((stored, "o"), (means(name, extra), "x")):
            groups = {}                                                   # {line: [(x, mean, deviation)]}
            for key, found in source.items():
                if quantity in found:
                    group = key[names.index(claim.lines)] if claim.lines else ""
                    x = found[claim.x][0] if claim.x in found else key[names.index(claim.x)]
                    groups.setdefault(group, []).append((x, *found[quantity][:2]))
            for number, (group, points) in enumerate(groups.items()):
                x, y, deviation = zip(*points)
                line = "none"
                if isinstance(claim.settings[0].get(claim.x, 0), (int, float)):
                    x = [float(value) for value in x]
                    line = "-"
                panel.errorbar(x, y, deviation, marker=mark, linestyle=line, capsize=3, color=f"C{number}",
                               label=f"{claim.lines} {group}" if claim.lines and mark == "o" else None)
        panel.set_title(quantity)
        panel.grid(alpha=0.3)
        if line == "-":
            panel.set_xlabel(claim.x)
        else:
            panel.tick_params("x", rotation=60)
            panel.margins(x=0.2)
        if claim.x in ("parameters", "images"):
            panel.set_xscale("log")
    if claim.lines:
        panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with runtime.atomic(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    pyplot.close(figure)


def power_law(points):
    """(exponent, its standard error) of loss ~ parameters^-exponent through (parameters, loss) points."""
    x, y = np.log(np.array(points, float)).T
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return -slope, covariance[0, 0] ** 0.5


# ---- 4. The command line -----------------------------------------------------------------------------------

def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, "draw", []], help="those to run (all), or draw")
    parser.add_argument("--seeds", type=runtime.positive_int, default=3, help="runs of each setting")
    parser.add_argument("--jobs", type=runtime.positive_int, default=os.cpu_count(), help="at once, a thread each")
    parser.add_argument("--add", help="CSV of your own runs, to be drawn beside the stored ones")
    parser.add_argument("--scale", type=runtime.bounded(float, 0), default=1.0, help="of all lengths, for a trial")
    parser.add_argument("--runs-dir", default="runs/claims", help="for checkpoints and logs")
    parser.add_argument("--csv-dir", default="results", help="for CSVs and claims.md")
    parser.add_argument("--figures-dir", default="assets/claims", help="for figures")
    return parser.parse_args(argv)


def main(args):
    """Run what has no row yet, then draw everything that has rows."""
    os.chdir(ROOT)
    csvs = pathlib.Path(args.csv_dir)
    rows = {name: read_rows(csvs / f"{name}.csv", columns(name)) for name in CLAIMS}
    writing = threading.Lock()
    locks = collections.defaultdict(threading.Lock)

    def job(name, setting, seed):
        row = measure(name, setting, seed, args, locks)
        with writing:
            rows[name].append(row)
            write_rows(csvs / f"{name}.csv", columns(name), rows[name])
            print(time.strftime("%H:%M"), name, row, flush=True)

    todo = []
    if "draw" not in args.claims:
        todo = [(name, setting, seed) for seed in range(args.seeds) for name in args.claims or CLAIMS
                for setting in CLAIMS[name].settings if not missing(name, setting)
                and not any(all(row[key] == str(value) for key, value in {**setting, "seed": seed}.items())
                            for row in rows[name])]
    print(f"{len(todo)} runs to do, {args.jobs} at a time, {sum(map(len, rows.values()))} are done", flush=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            for one in concurrent.futures.as_completed([pool.submit(job, *work) for work in todo]):
                one.result()
        except BaseException:                                             # a failure, or Ctrl-C: start no more
            pool.shutdown(cancel_futures=True)
            raise
    extra = {name: [] for name in CLAIMS}
    if args.add:
        with open(args.add) as file:
            header = file.readline().strip().split(",")
        name = next((name for name in CLAIMS if columns(name) == header), None)
        runtime.require(name, f"--add {args.add} has the columns of no claim; copy the header of one in {csvs}/")
        extra[name] = read_rows(pathlib.Path(args.add), header)
    shown = [name for name in CLAIMS if rows[name]]
    for name in shown:
        draw(name, rows[name], extra[name], pathlib.Path(args.figures_dir))
    with runtime.atomic(csvs / "claims.md") as temporary:
        temporary.write_text(HEAD + "\n".join(table(name, rows[name]) for name in shown))
    print(f"tables: {csvs}/claims.md, figures: {args.figures_dir}/")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
