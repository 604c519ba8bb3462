"""Benchmarks that anyone can run: `make bench`, or `python tests/bench.py NAME [flags]`.

    entropy     the exact entropy term against the dense softmax over all 2^18 codes: time and peak memory

Every measurement that reports memory runs in a process of its own, because a process's peak never falls.
"""
import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch                                                               # noqa: E402

import runtime                                                             # noqa: E402
import tokenizer as tok                                                    # noqa: E402


def best_time(function, seconds=1.0, device="cpu"):
    """Shortest of several runs of `function`, in seconds: at least three, for about `seconds` in all."""
    times, began = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


# ---- entropy ----------------------------------------------------------------------------------------------

def dense_entropies(z, tau=0.01):
    """Eq. 3 as it is written and as other implementations compute it: a softmax over an N x 2^K table."""
    codes = tok.ids_to_bits(torch.arange(2 ** z.shape[1], device=z.device), z.shape[1]).float() * 2 - 1
    logits = 2 * z @ codes.T / tau
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    mean = p.mean(0)
    return -(p * log_p).sum(1).mean(), -(mean * (mean + 1e-30).log()).sum()


def measure_entropy(method, tokens, bits=18):
    """Time (s) and peak memory above the start (MiB) of forward and backward; called in a fresh process."""
    terms = {"exact": tok.lfq_entropies, "dense": dense_entropies}[method]
    z = (torch.randn(tokens, bits, generator=torch.Generator().manual_seed(0)) * 0.1).requires_grad_()

    def step():
        per_token, codebook = terms(z)
        (per_token - codebook).backward()

    terms(z[:1].detach())                                                  # libraries load their kernels once
    before = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": best_time(step), "mib": peak / 2 ** 20}


def entropy(args):
    """Table: exact against dense for growing N at K = 18."""
    rows = []
    for tokens in (64, 256, 1024, 65536):
        exact, dense = (
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "measure-entropy", method, str(tokens)],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            if method == "exact" or tokens <= 1024
            else None
            for method in ("exact", "dense")
        )
        rows.append(
            [tokens, f"{exact['seconds'] * 1e3:.1f} ms", f"{exact['mib']:.0f} MiB"]
            + (
                [
                    f"{dense['seconds'] * 1e3:.0f} ms",
                    f"{dense['mib']:.0f} MiB",
                    f"{dense['seconds'] / exact['seconds']:.0f} x",
                    f"{dense['mib'] / exact['mib']:.0f} x",
                ]
                if dense
                else ["-"] * 4
            )
        )
    print(f"entropy term, K = 18, forward and backward, fp32, {torch.get_num_threads()} threads")
    runtime.print_table(rows, ["tokens N", "exact", "memory", "dense", "memory", "faster", "smaller"])


def main(args):
    """Run the chosen benchmarks."""
    for name in args.names:
        {"entropy": entropy}[name](args)


def get_args(argv=None):
    """Which benchmarks, and how large."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=["entropy"], help="which benchmarks to run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure-entropy"]:
        print(json.dumps(measure_entropy(sys.argv[2], int(sys.argv[3]))))
    else:
        runtime.run_script(main, get_args)
