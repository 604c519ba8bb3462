"""The claims of the paper at the scale of a laptop: which of them come true, by how much, and how surely?

    make claims                                       # all of them, three seeds each: hours
    python results/claims.py codebook --seeds 3       # one of them
    python results/claims.py draw --add mine.csv      # figures from the CSVs alone, your own rows on top

A claim is a sentence of the paper, its settings, the commands of this project's own scripts that measure
one, and what to read from what they write. A command runs once, even if claims share it, and never again, so
this can be killed and started at any time. One row for each run goes to results/CLAIM.csv, means and spreads
to results/claims.md, figures to assets/claims/.
"""
import collections
import concurrent.futures
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

from support import curves, runtime                                # noqa: E402
from claims_figures import (append_row, entropy_cost, keep_images, model_size,    # noqa: E402
                            prefixes, read_rows, settings, write_results)

# ---- 1. The claims -----------------------------------------------------------------------------------------

# {0}, {1} .. are the newest checkpoints, {1.tokens} and {3.samples} files, of the commands before. Seeds and
# places for results are added below. tests/judge.py has a small classifier look at samples.
TRAIN = "train_tokenizer.py --length 200 --warmup 50 "
MEASURE = ["evaluate.py reconstruction --ckpt {0}", "tests/judge.py {0}"]
TRAIN_16 = TRAIN + "--channel-multipliers 1 1 2 "                # 16 tokens an image, for transformers
TOKENS = "train_ar.py --length 1 --tokenizer {0} "                         # encodes 20,000 images, once
TRAIN_AR = "train_ar.py --length 600 --warmup 50 --tokenizer {0} --tokens {1.tokens} "
TOKENS_DRAWN = "evaluate.py generation --metrics tokens --data-path generated-plain --samples {3.samples}"
DRAW = ["sample.py --num-fid-samples 300 --ckpt {2} --cfg-scale ", "tests/judge.py {3.samples}"]

LEVELS = {6: "8 8", 8: "4 8 8", 10: "4 4 8 8", 12: "8 8 8 8", 14: "4 8 8 8 8"}
QUANTIZERS = {"LFQ": lambda bits: f"--quantizer lfq --bits {bits}",
              "VQ": lambda bits: f"--quantizer vq --codebook-size {2 ** bits}",
              "SimVQ": lambda bits: f"--quantizer simvq --codebook-size {2 ** bits}",
              "FSQ": lambda bits: f"--quantizer fsq --levels {LEVELS[bits]}"}
ENTROPY = {"weight 0": "--entropy-weight 0", "weight 0.02": "", "weight 0.1": "--entropy-weight 0.1",
           "annealed": "--entropy-anneal-steps 100", "groups": "--entropy groups", "bits": "--entropy bits"}
DESIGN = {"full model": "--blocks 2", "average pooling": "--blocks 2 --downsampler average",
          "nearest upsampling": "--blocks 2 --upsampler nearest",
          "no adaptive norm": "--blocks 2 --no-adaptive-norm", "half the blocks": "",
          "2^8 codes": "--blocks 2 --bits 8"}
LOSSES = {"L1": "--l2-weight 0", "L1 + L2": "", "and GAN": "--gan-weight 0.1",
          "and GAN with LeCAM": "--gan-weight 0.1 --lecam-weight 0.001", "and LPIPS": "--perceptual-weight 1"}
SPLITS = {"one softmax": "--split 10", "5 + 5": "--split 5 5", "3 + 7": "--split 3 7",
          "4 + 3 + 3": "--split 4 3 3", "5 + 5, separate heads": "--split 5 5 --separate-heads",
          "5 + 5, BSQ in 2 groups": "--split 5 5"}
CLIPS = {"generated": "generated", "real": "clips --resize 96 --image-size 32"}
START = {"from scratch": "", "inflated": " --init-from {0}"}
SIZES = {"32, as trained": "", "64, without training": " --image-size 64", "64, trained there": ""}
TRAINED_AT = {**SIZES, "64, without training": "", "64, trained there": "--image-size 64"}
BSQ = {"5 + 5, BSQ in 2 groups": "--quantizer bsq --groups 2"}

# x: what the horizontal axis of drawings shows, a setting, or figures of which the first of all is a power
# law; lines: the setting of which each value gets a line; special: a function of a setting and its commands'
# results that computes further figures.
Claim = collections.namedtuple("Claim", "sentence settings commands figures x lines special",
                               defaults=[None, None])
IMAGES = ["psnr", "ssim", "frechet", "usage", "perplexity"]
CLAIMS = {
    "codebook": Claim(
        "Tables 3, 4: with lookup-free quantisation more ids give better images, while VQ collapses.",
        settings(quantizer=QUANTIZERS, bits=LEVELS),
        lambda row: [TRAIN + QUANTIZERS[row["quantizer"]](row["bits"]), *MEASURE],
        [*IMAGES, "dead_bits"], "bits", "quantizer"),
    "entropy": Claim(
        "Equation 3: the entropy term makes the ids used; more of it costs error.", settings(term=ENTROPY),
        lambda row: [TRAIN + ENTROPY[row["term"]], *MEASURE],
        ["psnr", "usage", "perplexity", "token_bits", "codebook_bits", "samples/s"], "term"),
    "entropy-cost": Claim(
        "Equation 3: the term is exact over all ids, and cheaper than the softmax over them.",
        settings(bits=(10, 18), form=("exact", "groups", "bits", "dense")),
        lambda row: [f"tests/bench.py entropy --tokens 1024 --bits {row['bits']}"], ["ms", "MiB"], "bits",
        "form", entropy_cost),
    "design": Claim(
        "Table 3: strided convolutions, depth-to-space, adaptive GroupNorm, depth and ids each help.",
        settings(model=DESIGN), lambda row: [TRAIN + DESIGN[row["model"]], *MEASURE], IMAGES, "model"),
    "losses": Claim(
        "Section 3: the GAN pays in error for sharpness; LeCAM keeps the game close.", settings(loss=LOSSES),
        lambda row: [TRAIN + LOSSES[row["loss"]], *MEASURE],
        ["psnr", "ssim", "frechet", "sharpness", "usage"], "loss", None, keep_images),
    "factorisation": Claim(
        "Section 2.3: sub-tokens, predicted one after the other, replace one large softmax.",
        settings(factorisation=SPLITS),
        lambda row: [TRAIN_16 + BSQ.get(row["factorisation"], ""), TOKENS,
                     TRAIN_AR + SPLITS[row["factorisation"]], DRAW[0] + "2", DRAW[1]],
        ["val_bits", "agreement", "samples/s", "parameters"], "factorisation", None, model_size),
    "scaling": Claim(
        "Table 5: larger transformers have a lower loss.",
        settings(steps=(300, 600), width=(48, 96, 160, 256)),
        lambda row: [TRAIN_16, TOKENS, f"train_ar.py --length {row['steps']} --warmup 50 --tokenizer {{0}} "
                     f"--tokens {{1.tokens}} --width {row['width']} --lr {0.4 / row['width']:.3g}"],
        ["val_bits", "parameters", "flops"], ["parameters", "flops"], "steps", model_size),
    "guidance": Claim(
        "Table 5's settings: guidance trades the variety of samples for their likeness to the class.",
        settings(guidance=(1, 1.5, 2, 3, 4, 6)),
        lambda row: [TRAIN_16, TOKENS, TRAIN_AR + SPLITS["5 + 5"], DRAW[0] + str(row["guidance"]), DRAW[1],
                     TOKENS_DRAWN],
        ["agreement", "precision", "recall", "mind", "tokens", "tokens-real"], "guidance"),
    "memory": Claim(
        "The entropy cliff (arXiv 2605.06207): log2(N) / K tokens tell N training images apart.",
        settings(bits=(6, 10, 14), images=(200, 2000, 19000)),
        lambda row: [TRAIN_16 + QUANTIZERS["LFQ"](row["bits"]),
                     TOKENS + f"--split {row['bits'] // 2} {row['bits'] // 2}"],
        ["tokens needed", "log2 N / K", "tokens shared"], "images", "bits", prefixes),
    "inflation": Claim(
        "Section 2.2: a tokenizer of clips that starts from one of images learns faster.",
        settings(clips=CLIPS, start=START),
        lambda row: [TRAIN_16 + "--data-path generated",
                     "train_tokenizer.py --preset toy-video --length 150 --warmup 50 --data-path "
                     + CLIPS[row["clips"]] + START[row["start"]],
                     "evaluate.py reconstruction --num-samples 200 --ckpt {1}"],
        ["psnr", "ssim", "usage"], "start", "clips"),
    "resolution": Claim(
        "Table 4: a tokenizer that was trained at one size works at twice the size.", settings(size=SIZES),
        lambda row: [TRAIN + TRAINED_AT[row["size"]], MEASURE[0] + SIZES[row["size"]]],
        ["psnr", "ssim", "usage"], "size"),
}


def missing(name, setting):
    """Whether a setting needs what this machine has not: VGG-16's weights, or a folder `clips` of videos."""
    commands = " ".join(CLAIMS[name].commands(setting))
    weights = pathlib.Path(runtime.cache_dir()).glob("*vgg16*")
    return ("--perceptual-weight" in commands and not any(weights)
            or "--data-path clips" in commands and not pathlib.Path("clips").exists())


# ---- 2. Runs -----------------------------------------------------------------------------------------------

OUTPUT = {"train_tokenizer.py": "--resume --results-dir {}", "train_ar.py": "--resume --results-dir {}",
          "evaluate.py": "--output {}", "sample.py": "--output {}/samples.npz",
          "tests/judge.py": "--classifier {0}/../classifier.pt --output {0}/judge.json",
          "tests/bench.py": "--output {}/bench.json"}


class Done:
    """What a command has left in its folder, for the commands after it."""

    def __init__(self, folder):
        self.folder = folder
        self.samples = folder / "samples.npz"
        self.tokens = folder / "tokens.bin"

    def __str__(self):
        return str(runtime.latest_checkpoint(self.folder))


def run_command(command, args, locks):
    """Run a command of our scripts unless it has run, in a folder that its words name; returns its `Done`."""
    if args.scale != 1:                                                   # a trial: everything is shorter
        command = re.sub(r"(--length|--num-fid-samples) (\d+)",
                         lambda found: f"{found[1]} {max(4, int(int(found[2]) * args.scale))}", command)
    script, *words = command.split()
    digest = hashlib.sha256(" ".join([script, *words]).encode()).hexdigest()
    folder = pathlib.Path(args.runs_dir) / f"{pathlib.Path(script).stem}-{digest[:12]}"
    with locks[folder]:                                              # another setting may need it just now
        if not (folder / "finished.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            began = time.time()
            with open(folder / "log.txt", "w") as log:
                words += OUTPUT[script].format(folder).split()
                done = subprocess.run([sys.executable, script, *words], stdout=log, stderr=log,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"})
            runtime.require(done.returncode == 0, f"{command} failed; see {folder}/log.txt")
            runtime.write_json(folder / "finished.json", {"command": command, "seconds": time.time() - began})
    return Done(folder)


def measure(name, setting, seed, args, locks):
    """Run the commands of one setting with one seed; returns the row for the CSV."""
    claim = CLAIMS[name]
    done = []
    figures = {}
    seconds = 0
    for command in claim.commands(setting):
        command = command.format(*done)
        if command.startswith(("train", "sample", "tests/bench")):
            command += f" --global-seed {seed}"
        done.append(run_command(command, args, locks))
        if (done[-1].folder / "metrics.jsonl").exists():             # of all that was logged, the last
            for figure, curve in curves.read_metrics(done[-1].folder).items():
                figures[figure] = curve[max(curve)]
        for path in done[-1].folder.glob("*.json"):
            stored = json.loads(path.read_text())
            figures.update({key: value for key, value in stored.items() if isinstance(value, float)})
            figures.update({key: metric["value"] for key, metric in stored.get("metrics", {}).items()})
        seconds += figures["seconds"]
    if claim.special:
        figures.update(claim.special(setting, done))
    version = re.search(r'version = "(.*)"', pathlib.Path("pyproject.toml").read_text())[1]
    row = {**setting, "seed": seed, "seconds": round(seconds), "version": version}
    row.update({figure: f"{figures[figure]:.5g}" for figure in claim.figures if figure in figures})
    return row


# ---- 3. The command line -----------------------------------------------------------------------------------

def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, "all", "draw"], default="all",
                        help="those to run; draw: none")
    parser.add_argument("--seeds", type=runtime.positive_int, default=3, help="runs of each setting")
    parser.add_argument("--jobs", type=runtime.positive_int, default=os.cpu_count(), help="at once")
    parser.add_argument("--add", help="CSV of your own runs, to be drawn beside the stored ones")
    parser.add_argument("--scale", type=runtime.bounded(float, 0), default=1, help="of lengths: for a trial")
    parser.add_argument("--runs-dir", default="runs/claims", help="for checkpoints and logs")
    parser.add_argument("--csv-dir", default="results", help="for CSVs and claims.md")
    parser.add_argument("--figures-dir", default="assets/claims", help="for figures")
    return parser.parse_args(argv)


def main(args):
    """Run what has no row yet, then draw everything that has rows."""
    curves.import_pyplot()                                          # missing after hours would be a pity
    os.chdir(ROOT)
    paths = {name: pathlib.Path(args.csv_dir) / f"{name}.csv" for name in CLAIMS}
    locks = collections.defaultdict(threading.Lock)

    def run(name, setting, seed):
        row = measure(name, setting, seed, args, locks)
        with locks["csv"]:
            append_row(CLAIMS[name], paths[name], row)
            print(time.strftime("%H:%M"), name, *row.values(), flush=True)

    known = {(name, *row.values())[:2 + len(claim.settings[0])]
             for name, claim in CLAIMS.items() for row in read_rows(claim, paths[name])}
    names = [name for name in CLAIMS if name in args.claims or "all" in args.claims]
    todo = [(name, setting, seed)
            for seed in range(args.seeds) for name in names for setting in CLAIMS[name].settings
            if (name, *map(str, setting.values()), str(seed)) not in known and not missing(name, setting)]
    print(f"{len(todo)} runs to do, {args.jobs} at a time; {len(known)} are done", flush=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            for one in concurrent.futures.as_completed([pool.submit(run, *work) for work in todo]):
                one.result()
        except BaseException:                                             # a failure or Ctrl-C: begin no more
            pool.shutdown(cancel_futures=True)
            raise
    write_results(CLAIMS, paths, args)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
