"""Benchmarks that anyone can run: `make bench`, or with flags

    python tests/bench.py entropy                    # the exact entropy term against the dense softmax
    python tests/bench.py sampling --ar-preset AR-B --batch-size 4 python tests/bench.py sampling --ar-preset
    AR-B --batch-size 64 --mixed-precision bf16 --compile     # on a GPU python tests/bench.py train-ar
    --ar-preset AR-B --batch-size 64 --mixed-precision bf16 --compile python tests/bench.py tokenize
    train-tokenizer --tokenizer-preset in1k-256 --mixed-precision bf16 --compile

Weights are random, which does not change the time. Two variants are always timed in turns and in one process,
but measurements of memory run in a process of their own, because the peak of a process never falls.
"""
import json
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch                                                               # noqa: E402

import ar_model                                                            # noqa: E402
import plain_sampler                                                       # noqa: E402
import runtime                                                             # noqa: E402
import tokenizer as tok                                                    # noqa: E402
import train_tokenizer                                                     # noqa: E402

GUIDANCE = 2.0


def best_time(function, device=torch.device("cpu"), seconds=1.0):
    """Shortest of several runs of `function`, in seconds: at least three, for about `seconds` in all."""
    times, began = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def ratio(a, b):
    """How much faster b is than a."""
    return f"{a / b:.2f} x"


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


def in_own_process(method, tokens):
    """What `measure_entropy` says in a fresh process."""
    command = [sys.executable, __file__, "measure-entropy", method, str(tokens)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def entropy(args, device):
    """Exact against dense, K = 18, for growing N: time and memory of forward and backward."""
    rows = []
    for tokens in (64, 256, 1024, 65536):
        exact = in_own_process("exact", tokens)
        row = [tokens, f"{exact['seconds'] * 1e3:.1f} ms", f"{exact['mib']:.0f} MiB"]
        if tokens <= 1024:
            dense = in_own_process("dense", tokens)
            row += [f"{dense['seconds'] * 1e3:.0f} ms", f"{dense['mib']:.0f} MiB",
                    ratio(dense["seconds"], exact["seconds"]), ratio(dense["mib"], exact["mib"])]
        else:
            row += ["-"] * 4
        rows.append(row)
    print(f"entropy term, K = 18, forward and backward, fp32, CPU, {torch.get_num_threads()} threads")
    runtime.print_table(rows, ["tokens N", "exact", "memory", "dense", "memory", "faster", "smaller"])


# ---- the transformer --------------------------------------------------------------------------------------

def memory_bandwidth(device):
    """Bytes a second at which this machine reads memory, from summing 1 GiB (0.25 GiB on a CPU) of
    float32."""
    data = torch.ones(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)
    return data.numel() * 4 / best_time(lambda: data.sum(), device)


def sampling(args, device):
    """Tokens and images a second, beside the time it takes just to read all weights once a token."""
    config, batch = ar_model.PRESETS[args.ar_preset], args.batch_size
    labels, seeds = [0] * batch, list(range(batch))
    bandwidth, rows = memory_bandwidth(device), []
    steps = min(args.steps or config.tokens, config.tokens)

    def row(name, seconds, weight_bytes):
        # Inter blocks are read once a token, intra blocks once a sub-token; embeddings are looked up, not
        # read.
        floor = weight_bytes * steps / bandwidth
        rows.append([name, f"{seconds / steps * 1e3:.2f} ms", f"{batch * steps / seconds:.0f}",
                     f"{batch * steps / seconds / config.tokens:.2f}", f"{floor / seconds:.0%}",
                     ratio(base[0] if base else seconds, seconds)])
        base.append(seconds)

    base = []
    torch.manual_seed(0)
    for kind in dict.fromkeys(("fp32", args.mixed_precision)):
        dtype = runtime.AUTOCAST_DTYPES[kind] or torch.float32
        model = ar_model.ARModel(config).to(device).eval()
        if kind == "fp32" and device.type == "cpu" and len(config.grid) == 2 and not config.separate_heads:
            row("plain fp32", best_time(lambda: plain_sampler.plain_sample(
                model, torch.tensor(labels), [GUIDANCE] * len(config.bits), steps)), bytes_a_token(model))
        ar_model.prepare_for_sampling(model, dtype)
        for compile in dict.fromkeys((False, args.compile)):
            sampler = ar_model.Sampler(model, batch, cfg_scale=GUIDANCE, compile=compile)
            sampler.lengths = sampler.lengths[:steps]
            row(
                f"{kind}{' compiled, CUDA graphs' * compile}",
                best_time(lambda: sampler(labels, seeds), device),
                bytes_a_token(model),
            )
    print(
        f"sampling {args.ar_preset}, batch {batch}, guided, {device}, {steps} of {config.tokens} tokens; "
        f"memory reads {bandwidth / 1e9:.0f} GB/s"
    )
    runtime.print_table(rows, ["sampler", "a token", "tokens/s", "images/s", "of the roofline", "faster"])


def bytes_a_token(model):
    """Bytes of weights that one token needs: inter blocks once, intra blocks and heads once a sub-token."""
    def size(module):
        return sum(p.numel() * p.element_size() for p in module.parameters())
    return size(model.inter_blocks) + len(model.heads) * size(model.intra_blocks) + size(model.heads)


def train_ar_step(args, device):
    """One optimizer step of stage II on stored tokens."""
    config, batch = ar_model.PRESETS[args.ar_preset], args.batch_size
    rows = []
    for compile in dict.fromkeys((False, args.compile)):
        model = ar_model.ARModel(config).to(device).train()
        if compile:
            for block in [*model.inter_blocks, *model.intra_blocks]:
                block.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
        subtokens = [torch.randint(2 ** bits, (batch, config.tokens), device=device) for bits in config.bits]
        labels = torch.randint(max(1, config.num_classes), (batch,), device=device)

        def step():
            with runtime.autocast(device, args.mixed_precision):
                model(subtokens, labels, return_loss=True)[0].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step()
        seconds = best_time(step, device)
        # 6 FLOP a parameter and position (2 forward, 4 backward); intra blocks work on M positions a token.
        counts = [
            sum(p.numel() for p in part.parameters()) for part in (model.inter_blocks, model.intra_blocks)
        ]
        flop = 6 * batch * config.tokens * (counts[0] + len(config.bits) * counts[1])
        rows.append(["compiled" if compile else "eager", f"{seconds * 1e3:.1f} ms", f"{batch / seconds:.1f}",
                     f"{batch * config.tokens / seconds:.0f}", f"{flop / seconds / 1e12:.2f}"])
    print(f"training step of {args.ar_preset}, batch {batch}, {args.mixed_precision}, {device}")
    runtime.print_table(rows, ["step", "time", "images/s", "tokens/s", "TFLOP/s of the blocks"])


# ---- the tokenizer ----------------------------------------------------------------------------------------

def tokenize(args, device):
    """Pictures into tokens and back."""
    config, rows = tok.PRESETS[args.tokenizer_preset], []
    x = torch.rand(args.batch_size, 3, config.resolution, config.resolution, device=device) * 2 - 1
    x = x.to(memory_format=torch.channels_last)
    for compile in dict.fromkeys((False, args.compile)):
        model = tok.Tokenizer(config).to(device, memory_format=torch.channels_last).eval()
        if compile:
            model.encoder.compile(dynamic=False), model.decoder.compile(dynamic=False)
        with runtime.autocast(device, args.mixed_precision):
            ids = model.encode(x)
            times = [best_time(f, device) for f in (lambda: model.encode(x), lambda: model.decode(ids))]
        rows.append(["compiled" if compile else "eager", *(f"{args.batch_size / t:.1f}" for t in times)])
    print(f"tokenizer {args.tokenizer_preset}, batch {args.batch_size}, {args.mixed_precision}, {device}")
    runtime.print_table(rows, ["", "encode images/s", "decode images/s"])


def train_tokenizer_step(args, device):
    """One step of stage I, generator and discriminator, as train_tokenizer.py makes it. LPIPS is random
    here."""
    rows = []
    for compile in dict.fromkeys((False, args.compile)):
        flags = train_tokenizer.get_args(["--preset", args.tokenizer_preset])
        config = train_tokenizer.config_from_args(flags)
        model, critic = tok.Tokenizer(config), train_tokenizer.DISCRIMINATORS[flags.discriminator]()
        lpips = train_tokenizer.LPIPS().to(device) if flags.perceptual_weight else None
        for module in (model, critic):
            module.to(device, memory_format=torch.channels_last)
        if compile:
            for module in filter(None, (model.encoder, model.decoder, critic, lpips)):
                module.compile(dynamic=False)
        optimizers = [torch.optim.Adam(m.parameters(), fused=device.type == "cuda") for m in (model, critic)]
        x = torch.rand(args.batch_size, 3, config.resolution, config.resolution, device=device) * 2 - 1
        x = x.to(memory_format=torch.channels_last)

        def step():
            critic.requires_grad_(False)
            with runtime.autocast(device, args.mixed_precision):
                outputs = model(x)
                terms = train_tokenizer.generator_terms(flags, x, outputs, lpips, 0)
                loss = sum(t * w for t, w in terms.values())
                if flags.gan_weight:
                    loss = loss + flags.gan_weight * train_tokenizer.non_saturating_loss(critic(outputs[0]))
            loss.backward()
            optimizers[0].step(), optimizers[0].zero_grad(set_to_none=True)
            if flags.gan_weight:
                critic.requires_grad_(True)
                with runtime.autocast(device, args.mixed_precision):
                    train_tokenizer.hinge_loss(critic(x), critic(outputs[0].detach())).backward()
                optimizers[1].step(), optimizers[1].zero_grad(set_to_none=True)
        step()
        seconds = best_time(step, device)
        memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if device.type == "cuda" else "-"
        rows.append(["compiled" if compile else "eager", f"{seconds * 1e3:.0f} ms",
                     f"{args.batch_size / seconds:.1f}", memory])
    print(
        f"training step of {args.tokenizer_preset}, batch {args.batch_size}, {args.mixed_precision}, {device}"
    )
    runtime.print_table(rows, ["step", "time", "images/s", "peak memory"])


BENCHMARKS = {"entropy": entropy, "sampling": sampling, "train-ar": train_ar_step, "tokenize": tokenize,
              "train-tokenizer": train_tokenizer_step}


def main(args):
    """Run the chosen benchmarks one after the other."""
    device = runtime.setup_process_group(args.device)
    for name in args.names or BENCHMARKS:
        BENCHMARKS[name](args, device)
        print(flush=True)


def get_args(argv=None):
    """Which benchmarks, and how large."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--ar-preset", choices=ar_model.PRESETS, default="toy", help="transformer")
    parser.add_argument("--tokenizer-preset", choices=tok.PRESETS, default="toy", help="tokenizer")
    parser.add_argument("--batch-size", type=runtime.positive_int, default=8, help="images at once")
    parser.add_argument("--steps", type=runtime.positive_int, help="tokens to sample (all of an image)")
    parser.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="bf16",
                        help="precision of the fast variant, beside fp32 where both are timed")
    parser.add_argument("--compile", action="store_true", help="time compiled variants too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; choose of {', '.join(BENCHMARKS)}")
    return args


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure-entropy"]:
        print(json.dumps(measure_entropy(sys.argv[2], int(sys.argv[3]))))
    else:
        runtime.run_script(main, get_args)
