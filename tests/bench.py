"""Benchmarks that anyone can run: `make bench`, or with flags

    python tests/bench.py entropy                    # the exact entropy term against others
    python tests/bench.py sampling --ar-preset AR-B --batch-size 4
    python tests/bench.py sampling train-ar --ar-preset AR-B --batch-size 64 --mixed-precision bf16 \\
        --compile                                                          # on a GPU
    python tests/bench.py tokenize train-tokenizer --tokenizer-preset in1k-256 --compile
    python tests/bench.py tokenize train-tokenizer --tokenizer-preset toy-video --batch-size 4
    python tests/bench.py cost --tokenizer-preset in1k-256 --batch-size 8  # counted, on any machine
    python tests/bench.py data --images 1281000      # a set of ImageNet's size, see bench_data.py

Weights are random, which does not change the time. Variants are timed in one process, but measurements of
memory run in a process of their own, because the peak of a process never falls.
"""
import json
import math
import pathlib
import resource
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch                                                               # noqa: E402

import ar_model                                                            # noqa: E402
import sample                                                              # noqa: E402
import tokenizer                                                           # noqa: E402
import train_ar                                                            # noqa: E402
import train_tokenizer                                                     # noqa: E402
import video                                                               # noqa: E402
from support import loops, metrics, runtime                                 # noqa: E402


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
    """The largest memory this process ever had, in MiB above `before` bytes (ru_maxrss: a parent's, too)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024 - before / 2 ** 20


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
    threads = torch.get_num_threads()
    print(f"entropy term, K = {args.bits}, forward and backward, fp32, CPU, {threads} threads")
    print("tokens N | form | time | memory | time of exact", flush=True)
    for tokens in args.tokens:
        found = {}                                                         # {form: of the last N}
        for form in (*tokenizer.JOINT_BITS, "dense"):
            if form != "dense" or tokens << args.bits <= 1 << 28:           # 5 GiB
                seconds, mib = in_own_process(measure_entropy, form=form, bits=args.bits, tokens=tokens,
                                              seed=args.global_seed)
                found[form] = {"ms": seconds * 1e3, "MiB": mib}
                print(f"{tokens} | {form} | {seconds * 1e3:.1f} ms | {mib:.0f} MiB | "
                      f"{found[form]['ms'] / found['exact']['ms']:.3g} x", flush=True)
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
    noise = sample.noise_of(list(range(batch)), config.tokens, len(config.bits)).to(device)
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
    loops.print_table(rows, ["sampler", "a token", "tokens/s", "images/s", "faster"])


# ---- the tokenizer ----------------------------------------------------------------------------------------

def random_batch(config, batch_size, device):
    """Noise of the shape that a tokenizer of `config` is trained on, images or clips."""
    frames = [config.frames] if config.frames else []
    return torch.rand(batch_size, 3, *frames, config.resolution, config.resolution, device=device) * 2 - 1


def tokenize(args, device):
    """Images or clips into tokens and back."""
    config = train_tokenizer.TOKENIZER_PRESETS[args.tokenizer_preset]
    kind = video.VideoTokenizer if config.frames else tokenizer.Tokenizer
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
    loops.print_table(rows, ["", "encode samples/s", "decode samples/s"])


# ---- training ---------------------------------------------------------------------------------------------

class Gradients:
    """A step's: called with its networks and a batch, it makes them, and returns the sum of all losses."""

    def __init__(self, losses, precision):
        self.losses = losses                                               # yields them: see `stage_one`
        self.precision = precision

    def __call__(self, networks, batch):
        total = 0.0
        with runtime.autocast(batch.device, self.precision):
            for loss in self.losses(networks, batch):
                loss.backward()
                total = total + loss.detach()
        return total


def stage_one(flags, device):
    """([tokenizer, discriminator, LPIPS], `Gradients` of a step, a batch of noise).

    flags: of train_tokenizer.py, whose step it is; what they leave out is None. LPIPS has random weights.
    """
    args = train_tokenizer.get_args([*flags, "--dry-run"])                 # or it would look for LPIPS's
    model, critic, _ = train_tokenizer.build_networks(args, device)
    perceptual = None
    if args.perceptual_weight:
        perceptual = metrics.randomise(metrics.LPIPS()).to(device)
        if args.compile:
            perceptual.compile(dynamic=False)

    def losses(networks, x):
        """That of the generator, and then that of the discriminator."""
        model, critic, perceptual = networks
        x_hat, z, q, _ = model(x)
        of_ids, _ = model.quantizer.losses(z, q, args.tau, args.entropy_eps, runtime.all_reduce_mean)
        terms = {**train_tokenizer.pixel_terms(x, x_hat, perceptual), **of_ids}
        if critic:
            critic.requires_grad_(False)
            terms["gan"] = train_tokenizer.non_saturating_loss(critic(x_hat))
        yield train_tokenizer.objective(terms, args, 0, model)
        if critic:
            critic.requires_grad_(True)
            yield train_tokenizer.hinge_loss(critic(x), critic(x_hat.detach()))
    batch = random_batch(model.config, args.global_batch_size, device)
    return [model, critic, perceptual], Gradients(losses, args.mixed_precision), batch


def stage_two(flags, device):
    """The same of train_ar.py: ([transformer], `Gradients`, a batch of stored tokens)."""
    args = train_ar.get_args(flags)
    config = runtime.config_from_args(ar_model.PRESETS[args.preset], args, bits=args.split)
    with device:
        model = ar_model.ARModel(config)
        ids = torch.randint(2 ** sum(config.bits), (args.global_batch_size, config.tokens))
    model.checkpointing = args.activation_checkpointing
    if args.compile:
        for block in [*model.inter_blocks, *model.intra_blocks]:
            block.compile(dynamic=False)

    def losses(networks, ids):
        """The one loss."""
        subtokens = ar_model.ids_to_subtokens(ids, config.bits)
        yield networks[0](subtokens, ids[:, 0] % config.num_classes, return_loss=True)[0]
    return [model], Gradients(losses, args.mixed_precision), ids


def measure_training(stage, flags, device):
    """Of a step of `stage`, called in a fresh process: time (s), peak memory and activations (both GiB).

    Memory is what PyTorch allocates on a GPU. On a CPU it is what the process needs more than before it had a
    model, and nothing tells activations apart.
    """
    device = runtime.setup_process_group(device)
    before = resident()
    networks, backward, batch = globals()[stage](flags, device)
    learning = [network for network in networks if network and next(network.parameters()).requires_grad]
    optimizers = [torch.optim.Adam(network.parameters(), fused=batch.is_cuda) for network in learning]
    weights = [p.detach() for p in networks[0].parameters()]
    ema = [p.clone() for p in weights] if stage == "stage_one" else None

    def step():
        backward(networks, batch)
        for network, optimizer in zip(learning, optimizers):
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            torch._foreach_lerp_(ema, weights, 0.001)
    step()
    if not batch.is_cuda:
        return best_time(step), peak_above(before) / 1024, math.nan
    kept = torch.cuda.memory_allocated()                                   # weights, Adam's states, EMA
    torch.cuda.reset_peak_memory_stats()
    seconds = best_time(step, device)
    peak = torch.cuda.max_memory_allocated()
    return seconds, peak / 2 ** 30, (peak - kept) / 2 ** 30


def counted(stage, flags):
    """(GiB, TFLOP, GiB of activations) of a step on a GPU, counted on tensors that have shapes but no values.

    Memory: 20 bytes for each parameter of stage I that learns, 16 in stage II, which has no EMA, 4 of others
    (LPIPS), and what autograd keeps for backward, eagerly; cuDNN's workspaces are not counted. Operations:
    backward is two forward passes, or one where nothing learns.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode               # here: imports that take a second
    from torch.utils.flop_counter import FlopCounterMode
    kept = {}                                                              # storages, each of them once

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    flags = [word for word in flags if word != "--compile"]
    networks, gradients, batch = globals()[stage](flags, torch.device("meta"))
    dtype = runtime.AUTOCAST_DTYPES[gradients.precision]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), \
            FlopCounterMode(display=False) as counter, \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast("cpu", enabled=False):          # at its end, all casts of weights are forgotten
        fakes = [network and network.to_empty(device="cuda") for network in networks]
        torch.set_autocast_dtype("cuda", dtype or torch.float16)
        torch.set_autocast_enabled("cuda", dtype is not None)              # torch.autocast wants a real one
        try:
            losses = list(gradients.losses(fakes, torch.zeros_like(batch, device="cuda")))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert all(loss.requires_grad for loss in losses)                      # they hold what is kept
    flops = 0
    state = 0
    for fake in filter(None, fakes):
        once = sum(counter.get_flop_counts()[type(fake).__name__].values())
        learns = any(p.requires_grad for p in fake.parameters())
        flops += once * (3 if learns else 1.5)
        bytes_each = 20 if stage == "stage_one" else 16
        state += sum(p.numel() * (bytes_each if p.requires_grad else 4) for p in fake.parameters())
        for p in fake.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
    activations = sum(storage.nbytes() for storage in kept.values())
    return (state + activations) / 2 ** 30, flops / 1e12, activations / 2 ** 30


def matmul_speed(device, precision):
    """TFLOP/s of one large matrix product: no step can be faster than its operations at this speed."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.rand(n, n, device=device)
    with runtime.autocast(device, precision):
        return 2 * n ** 3 / 1e12 / best_time(lambda: a @ a, device)


def step_flags(stage, preset, args):
    """Yield (name, flags) of a trainer's step as `args` say, without and with activation checkpointing."""
    for extra in ([], ["--activation-checkpointing"]):
        flags = ["--preset", preset, "--global-batch-size", str(args.batch_size), "--mixed-precision",
                 args.mixed_precision, *extra]
        if stage == "stage_one":
            flags.append("--channels-last")
        yield extra[0].strip("-") if extra else "plain", flags


def training_step(stage, preset, args, device):
    """Steps of a trainer, with and without activation checkpointing, beside what `counted` expects."""
    speed = matmul_speed(device, args.mixed_precision)
    rows = []
    for name, compile in variants(args):
        for how, flags in step_flags(stage, preset, args):
            compiled = ["--compile"] if compile else []
            seconds, gib, _ = in_own_process(measure_training, stage=stage, flags=[*flags, *compiled],
                                             device=device.type)
            expected, tflop, _ = counted(stage, flags)
            rows.append([f"{name}, {how}", f"{seconds:.3g} s", f"{args.batch_size / seconds:.3g}",
                         f"{tflop / speed:.2g} s", f"{gib:.2f} GiB", f"{expected:.2f} GiB"])
    print(f"step of {preset}, batch {args.batch_size}, {args.mixed_precision}, {device}; counted: see cost, "
          f"operations at the {speed:.3g} TFLOP/s of a large matrix product here")
    loops.print_table(rows, ["step", "time", "samples/s", "counted", "peak memory", "counted"])


def train_tokenizer_step(args, device):
    """Of train_tokenizer.py, images or clips."""
    training_step("stage_one", args.tokenizer_preset, args, device)


def train_ar_step(args, device):
    """Of train_ar.py, on stored tokens."""
    training_step("stage_two", args.ar_preset, args, device)


def cost(args, device):
    """What a step of both trainers takes of a GPU, counted on any machine."""
    rows = []
    for stage, preset, more in (("stage_one", args.tokenizer_preset, args.tokenizer_flags),
                                ("stage_two", args.ar_preset, args.ar_flags)):
        for how, flags in step_flags(stage, preset, args):
            gib, tflop, activations = counted(stage, [*flags, *shlex.split(more)])
            rows.append([f"{preset} of {stage}, {how}", f"{gib:.3g} GiB", f"{activations:.3g} GiB",
                         f"{tflop:.3g} TFLOP", f"{tflop / 400:.2g} s"])
    print(f"step at batch {args.batch_size}, {args.mixed_precision}; 400 TFLOP/s: 40 % of an H100's peak")
    loops.print_table(rows, ["step", "memory", "activations", "operations", "at 400 TFLOP/s"])


BENCHMARKS = {"entropy": entropy, "sampling": sampling, "train-ar": train_ar_step, "tokenize": tokenize,
              "train-tokenizer": train_tokenizer_step, "cost": cost}


def main(args):
    """Run the chosen benchmarks one after the other."""
    device = runtime.setup_process_group(args.device)
    unknown = set(args.names) - BENCHMARKS.keys()
    runtime.require(not unknown, f"no benchmark {', '.join(unknown)}; choose of {', '.join(BENCHMARKS)}")
    for name in args.names or BENCHMARKS:
        BENCHMARKS[name](args, device)
        print(flush=True)


def get_args(argv=None):
    """Which benchmarks, and how large; behind `data` the flags of bench_data.py."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["data"]:
        import bench_data
        return bench_data.get_args(argv[1:])
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--ar-preset", choices=ar_model.PRESETS, default="toy", help="transformer")
    parser.add_argument("--tokenizer-preset", choices=train_tokenizer.TOKENIZER_PRESETS, default="toy",
                        help="tokenizer, of images or clips")
    parser.add_argument("--tokenizer-flags", default="", help="of cost: more flags of train_tokenizer.py")
    parser.add_argument("--ar-flags", default="", help="of cost: more flags of train_ar.py")
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
    elif sys.argv[1:2] == ["data"]:
        import bench_data
        runtime.run_script(bench_data.main, get_args)
    else:
        runtime.run_script(main, get_args)
