"""Ask a GPU whether it computes what the CPU does, and how fast it is:

    python tests/gpu.py             # 15 minutes; exit status 1 where a result is wrong, 2 without a GPU
    python tests/gpu.py --skip-figures            # equal results only, 3 minutes
    python tests/gpu.py --device cpu --tiny       # tries this script itself out

Weights are random. fp32 results may differ from the CPU's by 1e-4 of the largest value; of tokens, the figure
is the fraction that differs. A goal that is MISSED is no error: goals are estimates for an H100 or H200, of
about half of what computing and reading memory would allow; of memory, what `bench.py cost` counts.
"""
import copy
import math
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch                                                               # noqa: E402
import torch.distributed as dist                                           # noqa: E402

import ar_model                                                            # noqa: E402
import bench                                                               # noqa: E402
import helpers                                                             # noqa: E402
import sample                                                              # noqa: E402
import tokenizer                                                           # noqa: E402
import train_ar                                                            # noqa: E402
import train_tokenizer                                                     # noqa: E402
from support import loops, metrics, runtime                                 # noqa: E402

CPU = torch.device("cpu")
SMALL = ["--image-size", 16, "--bits", 6, "--blocks", 1, "--global-batch-size", 4, "--gan-weight", 0.1,
         "--discriminator", "blurpool", "--length", 6, "--checkpoint-every", 3, "--lr", 1e-4]


# ---- 1. Equal results -------------------------------------------------------------------------------------

def difference(a, b):
    """The largest difference of two tensors, or lists of them, over the largest value of the second."""
    if isinstance(a, (list, tuple)):
        return max(difference(x, y) for x, y in zip(a, b, strict=True))
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def gradients(networks, backward, batch, device, compiler=None):
    """The loss and all gradients on `device`; compiler: the backend for what --compile compiles."""
    networks = [network and copy.deepcopy(network).to(device) for network in networks]
    if compiler:
        torch._dynamo.reset()
        for region in regions(*filter(None, networks)):
            region.compile(dynamic=False, fullgraph=True, backend=compiler)
    loss = backward(networks, batch.to(device))
    parameters = [p for network in filter(None, networks) for p in network.parameters()]
    return [loss, *[p.grad for p in parameters if p.grad is not None]]


def regions(model, *others):
    """What --compile compiles of the networks of a step."""
    if isinstance(model, ar_model.ARModel):
        return [*model.inter_blocks, *model.intra_blocks]
    return [model.encoder, model.decoder, *others]


def transformer():
    """`bench.stage_two` of the toy preset, heads that predict something, nothing dropped."""
    networks, backward, ids = bench.stage_two(["--global-batch-size", "4"], CPU)
    for head in networks[0].heads:
        torch.nn.init.normal_(head.weight, std=0.02)
    return [networks[0].eval()], backward, ids


def compare_networks(device, tiny):
    """Yield (what, difference) of networks on `device` and on the CPU, then of steps, plain and compiled."""
    cases = [["toy", "--discriminator", "blurpool", "--perceptual-weight", "1"],
             ["toy-video", "--frames", "5"], ["in1k-128"]]
    for preset, *flags in cases[:2] if tiny else cases:
        networks, backward, x = bench.stage_one(["--preset", preset, "--global-batch-size", "2",
                                                 "--gan-weight", "0.1", *flags], CPU)
        model, _, perceptual = networks
        there = copy.deepcopy(model).to(device)
        yield f"{preset}: z of the encoder", difference(there.encoder(x.to(device)), model.encoder(x))
        ids = model.encode(x)
        yield f"{preset}: decoded ids", difference(there.decode(ids.to(device)), model.decode(ids))
        if perceptual:
            there = copy.deepcopy(perceptual).to(device)
            expected = perceptual(x, x.flip(0))
            yield f"{preset}: LPIPS", difference(there(x.to(device), x.flip(0).to(device)), expected)
        yield from compare_steps(f"{preset}: step of stage I", networks, backward, x, device, tiny)
    yield from compare_steps("toy: step of stage II", *transformer(), device, tiny)


def compare_steps(name, networks, backward, batch, device, tiny):
    """Yield the differences of loss and gradients: device and CPU; compiled and not."""
    plain = gradients(networks, backward, batch, device)
    yield name, difference(plain, gradients(networks, backward, batch, CPU))
    compiler = "aot_eager" if tiny else "inductor"
    yield f"{name}, compiled", difference(gradients(networks, backward, batch, device, compiler), plain)


def compare_samplers(device):
    """Yield (what, fraction of other tokens than those of the plain sampler)."""
    model = transformer()[0][0].to(device)
    settings = ar_model.sampling_settings(2, cfg_scale=2.0, top_p=0.9)
    labels = torch.arange(4, device=device)
    noise = sample.noise_of(range(4), model.config.tokens, 2).to(device)
    expected = torch.stack(ar_model.sample(model, labels, noise, settings))
    for compile in (False, True) if device.type == "cuda" else (False,):
        sampler = sample.Sampler(model, 4, settings, compile)
        for again in ("", ", again"):
            drawn = torch.stack(sampler(labels, range(4)))
            other = float((drawn != expected).double().mean())
            yield f"{'CUDA graphs' if compile else 'eager sampler'}{again}: other tokens", other


def two_ranks(rank, port, device, model, batch, queue):
    """One of two processes on one device: its half of the batch; rank 0 reports the mean gradients."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = model.to(device)
    backward = bench.stage_two([], CPU)[1]
    backward([loops.distributed(model, device)], batch[rank::2].to(device))
    if rank == 0:
        queue.put([p.grad.cpu().numpy() for p in model.parameters()])
    dist.barrier()
    dist.destroy_process_group()


def compare_two_ranks(device):
    """Yield (what, difference) of two processes that share `device`, over gloo, and of one."""
    networks, backward, ids = transformer()
    expected = gradients(networks, backward, ids, device)[1:]
    context = torch.multiprocessing.get_context("forkserver")                   # a fork has no CUDA
    context.set_forkserver_preload(["torch"])
    queue = context.SimpleQueue()
    port = 20000 + time.time_ns() % 20000
    arguments = port, device, networks[0], ids, queue
    ranks = torch.multiprocessing.start_processes(two_ranks, arguments, 2, False, start_method="forkserver")
    found = [torch.from_numpy(gradient) for gradient in queue.get()]
    ranks.join()
    yield "gradients of two ranks on one device", difference(found, expected)


def compare_resumed(device):
    """Yield (what, difference) of a run that is killed and resumed, and of one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = pathlib.Path(folder, "whole"), pathlib.Path(folder, "killed")
        flags = [*SMALL, "--device", device.type]
        how = {"forked": device.type == "cpu"}
        helpers.run_script("train_tokenizer.py", *flags, "--results-dir", whole, **how)
        helpers.kill_when("train_tokenizer.py", *flags, "--results-dir", killed,
                          until=(killed / "step-00000003.pt").exists, **how)
        helpers.run_script("train_tokenizer.py", *flags, "--results-dir", killed, "--resume", **how)
        a, b = [list(helpers.newest(path)["model"].values()) for path in (killed, whole)]
        yield "weights of a run after kill -9 and --resume", difference(a, b)


# ---- 2. Figures -------------------------------------------------------------------------------------------

# Images a second on an H200 at batch 1 and 64, guided, bf16, tokens only: two thirds of what reading weights
# and cache once a token allows at batch 1, and half of it at batch 64. An H100 reads 0.7 times as fast.
SAMPLING_GOALS = {"AR-B": (15, 250), "AR-L": (6.4, 135), "AR-XL": (3.4, 75), "toy": (0, 0)}


@torch.no_grad()
def sampling_figures(device, tiny):
    """Yield (what, figure, unit, goal or None)."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    first_stage = train_tokenizer.TOKENIZER_PRESETS["toy" if tiny else "in1k-256"]
    first_stage = tokenizer.Tokenizer(first_stage).to(device)
    for preset in ("toy",) if tiny else ("AR-B", "AR-L", "AR-XL"):
        with device:
            model = sample.prepare_for_sampling(ar_model.ARModel(ar_model.PRESETS[preset]), torch.bfloat16)
        settings = ar_model.sampling_settings(2, cfg_scale=2.0)
        for batch, goal in zip((1, 64), SAMPLING_GOALS[preset]):
            goal = goal * 0.7 if "H100" in gpu else goal
            for graphs in (False, True) if device.type == "cuda" else (False,):
                name = f"sampling {preset}, batch {batch}, {'CUDA graphs' if graphs else 'eager'}"
                sampler = sample.Sampler(model, batch, settings, graphs)
                seconds = bench.best_time(lambda: sampler([0] * batch, range(batch)), device, 0)
                yield name, batch / seconds, "images/s", goal if graphs else None
                how = sample.How(batch, settings, mixed_precision="bf16", compile=graphs)
                decoder = copy.deepcopy(first_stage)                       # is compiled for good
                drawn = sample.generate(model, decoder, [0] * 4 * batch, range(4 * batch), how)
                next(drawn)                                                # compiles
                seconds = bench.best_time(lambda: next(drawn), device, 0)
                yield f"{name}, with decoding", batch / seconds, "images/s", None


def training_figures(device, tiny):
    """Yield (what, figure, unit, goal or None) of steps in bf16, in a process of their own each."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = max([flops for name, flops in train_ar.PEAK_FLOPS.items() if name in gpu], default=math.nan)
    cases = [("stage_two", "AR-B", 64, 45), ("stage_one", "in1k-256", 8, 35),
             ("stage_one", "ucf-128", 2, None)]
    if tiny:
        cases = [("stage_two", "toy", 2, None), ("stage_one", "toy-video", 1, None)]
    for stage, preset, batch, goal in cases:
        flags = ["--preset", preset, "--global-batch-size", str(batch), "--mixed-precision", "bf16"]
        if stage == "stage_one":
            flags.append("--channels-last")
        if preset == "ucf-128":
            flags.append("--activation-checkpointing")
        counted, tflop, _ = bench.counted(stage, flags)
        for compiled in ([],) if tiny else ([], ["--compile"]):
            seconds, gib, activations = bench.in_own_process(
                bench.measure_training, stage=stage, flags=[*flags, *compiled], device=device.type)
            name = f"training {preset}, batch {batch}, {'compiled' if compiled else 'eager'}"
            yield name, batch / seconds, "samples/s", None
            yield f"{name}: MFU", 100 * tflop * 1e12 / seconds / peak, "%", goal if compiled else None
            yield f"{name}: memory; goal: counted", gib, "GiB", counted
            if preset == "in1k-256":
                yield f"{name}: activations of an image", activations / batch, "GiB", compiled and 1.5


def other_figures(device, tiny):
    """Yield (what, figure, unit, goal) of the entropy term and of the networks of metrics."""
    z = torch.randn(1024 if tiny else 65536, 18, device=device, requires_grad=True)

    def entropy():
        per_token, codebook = tokenizer.lfq_entropies(z)
        (per_token - codebook).backward()
    seconds = bench.best_time(entropy, device)
    yield f"entropy term and gradient, N = {len(z):,}", 1 / seconds, "times/s", 50
    with torch.no_grad():
        for name, network, shape, goal in (("Inception", metrics.FIDInception(), (64, 3, 299, 299), 1000),
                                           ("I3D", metrics.I3D(), (8, 3, 16, 224, 224), 50)):
            x = torch.rand(1 if tiny else shape[0], *shape[1:], device=device)
            network.eval().to(device)
            seconds = bench.best_time(lambda: network(x), device)
            yield f"{name}, fp32", len(x) / seconds, "samples/s", goal


def print_row(mark, figure, unit, goal, what):
    """Rows are printed as they come, so the widths of the columns are fixed."""
    print(f"{mark:<6}  {figure:>8}  {unit:<10}  {goal:>6}  {what}", flush=True)


def main(args):
    """Print a row for each result and figure; the exit status says whether all results agree."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise runtime.UserError("no CUDA GPU is visible; --device cpu --tiny tries this script out")
    device = runtime.setup_process_group(args.device)
    torch.manual_seed(0)
    wrong = 0
    print_row("", "figure", "unit", "goal", "what")
    for part in (compare_networks(device, args.tiny), compare_samplers(device), compare_two_ranks(device),
                 compare_resumed(device)):
        for name, error in part:
            equal = error <= 1e-4                                          # NaN is wrong, too
            wrong += not equal
            print_row("equal" if equal else "WRONG", f"{error:.1e}", "difference", "1e-4", name)
    for part in () if args.skip_figures else (sampling_figures, training_figures, other_figures):
        for name, figure, unit, goal in part(device, args.tiny):
            mark = ""
            if goal and device.type == "cuda" and (figure > goal if unit == "GiB" else figure < goal):
                mark = "MISSED"
            print_row(mark, f"{figure:.3g}", unit, f"{goal:.3g}" if goal else "-", name)
    if wrong:
        raise SystemExit(1)


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to ask")
    parser.add_argument("--tiny", action="store_true", help="toy presets only, and no real compiler")
    parser.add_argument("--skip-figures", action="store_true", help="equal results only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
