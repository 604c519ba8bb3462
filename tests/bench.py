"""Benchmarks that anyone can run: `make bench`, or with flags

    python tests/bench.py entropy                    # the exact entropy term against others
    python tests/bench.py sampling --ar-preset AR-B --batch-size 4
    python tests/bench.py sampling train-ar --ar-preset AR-B --batch-size 64 --mixed-precision bf16 \\
        --compile                                                          # on a GPU
    python tests/bench.py tokenize train-tokenizer --tokenizer-preset in1k-256 --compile
    python tests/bench.py tokenize train-tokenizer --tokenizer-preset toy-video --batch-size 4

Weights are random, which does not change the time. Variants are timed in one process, but measurements of
memory run in a process of their own, because the peak of a process never falls.
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
import metrics                                                             # noqa: E402
import runtime                                                             # noqa: E402
import sample                                                              # noqa: E402
import tokenizer                                                           # noqa: E402
import train_tokenizer                                                     # noqa: E402
import video                                                               # noqa: E402


def best_time(function, device=torch.device("cpu"), seconds=1.0):
    """Shortest of several runs of `function`, in seconds: at least three, for about `seconds` in all."""
    times = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def resident():
    """Bytes of memory that this process has now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_above(before):
    """The largest memory this process ever had, in MiB above `before` bytes."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2 ** 20


def in_own_process(function, **arguments):
    """What `function(**arguments)` of this file returns in a fresh process."""
    command = [sys.executable, __file__, "measure", function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def variants(args):
    """(name, whether to compile) of what is timed."""
    return [("eager", False), ("compiled", True)] if args.compile else [("eager", False)]


# ---- entropy ----------------------------------------------------------------------------------------------

def dense_entropies(z, tau=0.01):
    """Eq. 3 as it is written and as other implementations compute it: a softmax over an N x 2^K table."""
    codes = tokenizer.ids_to_bits(torch.arange(2 ** z.shape[1], device=z.device), z.shape[1]).float() * 2 - 1
    logits = 2 * z @ codes.T / tau
    p = logits.softmax(1)
    mean = p.mean(0)
    return -(p * logits.log_softmax(1)).sum(1).mean(), -(mean * (mean + 1e-30).log()).sum()


def measure_entropy(form, bits, tokens, seed):
    """Time (s) and peak memory above the start (MiB) of forward and backward; called in a fresh process."""
    joint = tokenizer.JOINT_BITS.get(form)

    def terms(z):
        if form == "dense":
            return dense_entropies(z)
        widths = [min(joint, bits - first) for first in range(0, bits, joint)]
        return tokenizer.lfq_entropies(z, widths=widths)

    def step():
        per_token, codebook = terms(z)
        (per_token - codebook).backward()

    z = (torch.randn(tokens, bits, generator=torch.Generator().manual_seed(seed)) * 0.1).requires_grad_()
    terms(z[:1].detach())                                                  # libraries load their kernels once
    before = resident()
    step()
    mib = peak_above(before)
    return best_time(step), mib


def entropy(args, device):
    """The exact term, its approximations and the dense softmax: time and memory of forward and backward."""
    rows = []
    for tokens in args.tokens:
        found = {}                                                         # {form: of the last N}
        for form in (*tokenizer.JOINT_BITS, "dense"):
            if form != "dense" or tokens << args.bits <= 1 << 28:           # 5 GiB
                seconds, mib = in_own_process(measure_entropy, form=form, bits=args.bits, tokens=tokens,
                                              seed=args.global_seed)
                found[form] = {"ms": seconds * 1e3, "MiB": mib}
                rows.append([tokens, form, f"{seconds * 1e3:.1f} ms", f"{mib:.0f} MiB",
                             f"{found[form]['ms'] / found['exact']['ms']:.3g} x"])
    threads = torch.get_num_threads()
    print(f"entropy term, K = {args.bits}, forward and backward, fp32, CPU, {threads} threads")
    runtime.print_table(rows, ["tokens N", "form", "time", "memory", "time of exact"])
    if args.output:
        runtime.write_json(args.output, found)


# ---- the transformer --------------------------------------------------------------------------------------

def sampling(args, device):
    """Tokens and images a second, of the plain sampler and the fast one."""
    config = ar_model.PRESETS[args.ar_preset]
    batch = args.batch_size
    steps = min(args.steps or config.tokens, config.tokens)
    settings = ar_model.sampling_settings(len(config.bits), cfg_scale=2.0)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    noise = sample.image_noise(list(range(batch)), config.tokens, len(config.bits)).to(device)
    times = {}
    torch.manual_seed(0)
    for kind in dict.fromkeys(("fp32", args.mixed_precision)):
        model = ar_model.ARModel(config).to(device).eval()
        if kind == "fp32":
            plain = best_time(lambda: ar_model.sample(model, labels, noise[:steps], settings), device)
            times["plain fp32"] = plain
        sample.prepare_for_sampling(model, runtime.AUTOCAST_DTYPES[kind] or torch.float32)
        for name, compile in variants(args):
            sampler = sample.Sampler(model, batch, settings, compile=compile)
            sampler.lengths = sampler.lengths[:steps]
            times[f"{kind}, {name}"] = best_time(lambda: sampler(labels, list(range(batch))), device)
    rows = [[name, f"{seconds / steps * 1e3:.2f} ms", f"{batch * steps / seconds:.0f}",
             f"{batch * steps / seconds / config.tokens:.2f}", f"{plain / seconds:.2f} x"]
            for name, seconds in times.items()]
    print(f"sampling {args.ar_preset}, batch {batch}, guided, {device}, {steps} of {config.tokens} tokens")
    runtime.print_table(rows, ["sampler", "a token", "tokens/s", "images/s", "faster"])


def train_ar_step(args, device):
    """One optimizer step of stage II on stored tokens."""
    config = ar_model.PRESETS[args.ar_preset]
    batch = args.batch_size
    rows = []
    for name, compile in variants(args):
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
        rows.append([name, f"{seconds * 1e3:.1f} ms", f"{batch / seconds:.1f}",
                     f"{batch * config.tokens / seconds:.0f}"])
    print(f"training step of {args.ar_preset}, batch {batch}, {args.mixed_precision}, {device}")
    runtime.print_table(rows, ["step", "time", "images/s", "tokens/s"])


# ---- the tokenizer ----------------------------------------------------------------------------------------

def random_batch(config, batch_size, device):
    """Noise of the shape that a tokenizer of `config` is trained on, images or clips."""
    frames = [config.frames] if hasattr(config, "frames") else []
    return torch.rand(batch_size, 3, *frames, config.resolution, config.resolution, device=device) * 2 - 1


def tokenize(args, device):
    """Images or clips into tokens and back."""
    config = train_tokenizer.TOKENIZER_PRESETS[args.tokenizer_preset]
    kind = video.VideoTokenizer if hasattr(config, "frames") else tokenizer.Tokenizer
    x = random_batch(config, args.batch_size, device)
    rows = []
    for name, compile in variants(args):
        model = kind(config).to(device).eval()
        if compile:
            model.encoder.compile(dynamic=False)
            model.decoder.compile(dynamic=False)
        with runtime.autocast(device, args.mixed_precision):
            ids = model.encode(x)
            times = [best_time(lambda: model.encode(x), device), best_time(lambda: model.decode(ids), device)]
        rows.append([name, *[f"{args.batch_size / seconds:.1f}" for seconds in times]])
    print(f"tokenizer {args.tokenizer_preset}, batch {args.batch_size}, {args.mixed_precision}, {device}")
    runtime.print_table(rows, ["", "encode samples/s", "decode samples/s"])


def stage1_step(preset, batch_size, precision, device, options):
    """A function that makes one step of stage I, generator and discriminator, as train_tokenizer.py does.

    options: of its flags, such as --compile or --activation-checkpointing. LPIPS has random weights.
    """
    flags = train_tokenizer.get_args(["--preset", preset, "--channels-last", *options])
    perceptual = metrics.LPIPS().to(device) if flags.perceptual_weight else None
    flags.perceptual_weight = 0.0                                          # its weights are no use here
    model, critic, _ = train_tokenizer.build_networks(flags, device)
    ema = [p.detach().clone() for p in model.parameters()]
    optimizers = [train_tokenizer.adam(network, flags) for network in (model, critic) if network]
    x = random_batch(model.config, batch_size, device)

    def step():
        with runtime.autocast(device, precision):
            x_hat, z, q, _ = model(x)
            terms, _ = model.quantizer.losses(z, q, flags.tau, 0.0, runtime.all_reduce_mean)
            terms.update(l1=(x - x_hat).abs().mean(), l2=(x - x_hat).square().mean())
            if perceptual:
                terms["perceptual"] = perceptual(metrics.as_frames(x), metrics.as_frames(x_hat)).mean()
            if critic:
                critic.requires_grad_(False)
                terms["gan"] = train_tokenizer.non_saturating_loss(critic(x_hat))
            weights = {**train_tokenizer.loss_weights(terms, flags, 0, None), "perceptual": 1.0}
            sum(weights[name] * terms[name] for name in terms).backward()
        if critic:
            critic.requires_grad_(True)
            with runtime.autocast(device, precision):
                train_tokenizer.hinge_loss(critic(x), critic(x_hat.detach())).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 0.001)
    return step


def measure_stage1(preset, batch_size, precision, device, options):
    """Time (s) of a training step of stage I, and its peak memory (GiB); run in a fresh process.

    The memory is what PyTorch allocates on a GPU, and on a CPU what the process needs more than before it had
    a model: weights, EMA, gradients, Adam's states and the activations.
    """
    device = torch.device(device)
    before = resident()
    step = stage1_step(preset, batch_size, precision, device, options)
    step()
    seconds = best_time(step, device)
    return seconds, (torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else
                     peak_above(before) / 1024)


def estimate(args, options):
    """The memory that train_tokenizer.py --dry-run expects of such a step, as text."""
    flags = train_tokenizer.get_args([
        "--preset", args.tokenizer_preset, "--dry-run", "--mixed-precision", args.mixed_precision,
        "--global-batch-size", str(args.batch_size), *options])
    flags.compile = False
    model, critic, _ = train_tokenizer.build_networks(flags, torch.device("cpu"))
    axes = random_batch(model.config, 1, "meta").shape[2:]
    return train_tokenizer.cost_of_step(flags, model, critic, axes).partition(" a rank")[0]


def train_tokenizer_step(args, device):
    """One step of train_tokenizer.py, of images or clips, with and without activation checkpointing."""
    rows = []
    for _, compile in variants(args):
        for options in (["--activation-checkpointing"], []):
            if compile:
                options = ["--compile", *options]
            seconds, gib = in_own_process(measure_stage1, preset=args.tokenizer_preset, device=device.type,
                                          batch_size=args.batch_size, precision=args.mixed_precision,
                                          options=options)
            rows.append([" ".join(options) or "plain", f"{seconds:.3g} s", f"{args.batch_size / seconds:.3g}",
                         f"{gib:.2f} GiB", estimate(args, options)])
    print(f"step of {args.tokenizer_preset}, batch {args.batch_size}, {args.mixed_precision}, {device}")
    runtime.print_table(rows, ["step", "time", "samples/s", "peak memory", "--dry-run says"])


BENCHMARKS = {"entropy": entropy, "sampling": sampling, "train-ar": train_ar_step, "tokenize": tokenize,
              "train-tokenizer": train_tokenizer_step}


def main(args):
    """Run the chosen benchmarks one after the other."""
    device = runtime.setup_process_group(args.device)
    unknown = set(args.names) - BENCHMARKS.keys()
    runtime.require(not unknown, f"no benchmark {', '.join(unknown)}; choose of {', '.join(BENCHMARKS)}")
    for name in args.names or BENCHMARKS:
        BENCHMARKS[name](args, device)
        print(flush=True)


def get_args(argv=None):
    """Which benchmarks, and how large."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--ar-preset", choices=ar_model.PRESETS, default="toy", help="transformer")
    parser.add_argument("--tokenizer-preset", choices=train_tokenizer.TOKENIZER_PRESETS, default="toy",
                        help="tokenizer, of images or clips")
    parser.add_argument("--batch-size", type=runtime.positive_int, default=8, help="images or clips at once")
    parser.add_argument("--tokens", type=runtime.positive_int, nargs="+", default=[64, 1024, 65536],
                        help="N of the entropy term")
    parser.add_argument("--bits", type=runtime.bounded(int, 1, 24), default=18, help="K of the entropy term")
    parser.add_argument("--output", help="JSON to write what entropy found for the last N to")
    parser.add_argument("--global-seed", type=int, default=0, help="of the entropy term's z")
    parser.add_argument("--steps", type=runtime.positive_int, help="tokens to sample (all of an image)")
    parser.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="bf16",
                        help="precision of the fast variant, beside fp32 where both are timed")
    parser.add_argument("--compile", action="store_true", help="time compiled variants too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:                                       # see `in_own_process`
        print(json.dumps(globals()[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        runtime.run_script(main, get_args)
