"""Ask a GPU whether it computes what the CPU does, and how fast it is:

    python tests/gpu.py             # 15 minutes; exit status 1 where a result is wrong, 2 without a GPU
    python tests/gpu.py --skip-figures            # equal results only, 3 minutes
    python tests/gpu.py --device cpu --tiny       # tries this script itself out

Weights are random. fp32 results may differ from the CPU's by 1e-4 of the largest value. The floors beside the
figures are estimates for an H100 or H200, about half of what computing and reading memory would allow.
"""
import copy
import dataclasses
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch                                                               # noqa: E402
import torch.distributed as dist                                           # noqa: E402

import ar_model                                                            # noqa: E402
import helpers                                                             # noqa: E402
import metrics                                                             # noqa: E402
import runtime                                                             # noqa: E402
import sample                                                              # noqa: E402
import tokenizer                                                           # noqa: E402
import train_ar                                                            # noqa: E402
import train_tokenizer                                                     # noqa: E402
import video                                                               # noqa: E402

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


def stage_one(preset):
    """(networks, function of them and a batch to the objective) of a step of stage I, without LPIPS."""
    critic = "patchgan-3d" if preset in video.PRESETS else "blurpool"
    flags = train_tokenizer.get_args(["--preset", preset, "--perceptual-weight", "0", "--gan-weight", "0.1",
                                      "--discriminator", critic])
    model, critic, _ = train_tokenizer.build_networks(flags, CPU)

    def loss(networks, x):
        model, critic = networks
        x_hat, z, q, _ = model(x)
        terms, _ = model.quantizer.losses(z, q, flags.tau, 0.0, None)
        judged = train_tokenizer.hinge_loss(critic(x), critic(x_hat))
        return sum(terms.values()) + (x - x_hat).abs().mean() + judged
    return torch.nn.ModuleList([model, critic]), loss


def stage_two(config):
    """The same of stage II; a batch is ids."""
    def loss(networks, ids):
        subtokens = ar_model.ids_to_subtokens(ids, config.bits)
        return networks[0](subtokens, ids[:, 0] % config.num_classes, return_loss=True)[0]
    model = ar_model.ARModel(dataclasses.replace(config, token_dropout=0.0, attention_dropout=0.0,
                                                 ffn_dropout=0.0, label_dropout=0.0))
    for head in model.heads:
        torch.nn.init.normal_(head.weight, std=0.02)
    return torch.nn.ModuleList([model]), loss


def gradients(networks, loss, batch, device, backend=None):
    """The loss and all gradients on `device`; backend: the compiler's, for what --compile compiles."""
    networks = copy.deepcopy(networks).to(device)
    regions = [*networks[1:], *[getattr(networks[0], name) for name in ("encoder", "decoder")
                                if hasattr(networks[0], name)],
               *getattr(networks[0], "inter_blocks", [])[:1], *getattr(networks[0], "intra_blocks", [])[:1]]
    for region in regions if backend else ():
        region.compile(dynamic=False, fullgraph=True, backend=backend)
    value = loss(networks, batch.to(device))
    value.backward()
    return [value, *[p.grad for p in networks.parameters() if p.grad is not None]]


def compare_networks(device, tiny):
    """Yield (what, difference) of networks on `device` and on the CPU, then of steps, plain and compiled."""
    for preset in ("toy", "toy-video") if tiny else ("toy", "toy-video", "in1k-128"):
        config = train_tokenizer.TOKENIZER_PRESETS[preset]
        networks, loss = stage_one(preset)
        frames = [5] if preset in video.PRESETS else []
        x = torch.rand(2, 3, *frames, config.resolution, config.resolution) * 2 - 1
        there = copy.deepcopy(networks[0]).to(device)
        yield f"{preset}: z of the encoder", difference(there.encoder(x.to(device)), networks[0].encoder(x))
        ids = networks[0].encode(x)
        yield f"{preset}: decoded ids", difference(there.decode(ids.to(device)), networks[0].decode(ids))
        yield from compare_steps(f"{preset}: step of stage I", networks, loss, x, device, tiny)
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    perceptual = metrics.randomise(metrics.LPIPS())
    expected = perceptual(x, y)
    yield "LPIPS", difference(perceptual.to(device)(x.to(device), y.to(device)), expected)
    config = ar_model.PRESETS["toy"]
    networks, loss = stage_two(config)
    ids = torch.randint(2 ** sum(config.bits), (4, config.tokens))
    yield from compare_steps("toy: step of stage II", networks, loss, ids, device, tiny)


def compare_steps(name, networks, loss, batch, device, tiny):
    """Yield the differences of loss and gradients: device and CPU; compiled and not."""
    plain = gradients(networks, loss, batch, device)
    yield name, difference(plain, gradients(networks, loss, batch, CPU))
    torch._dynamo.reset()
    backend = "aot_eager" if tiny else "inductor"
    yield f"{name}, compiled", difference(gradients(networks, loss, batch, device, backend), plain)


def compare_samplers(device):
    """Yield (what, fraction of other tokens than those of the plain sampler)."""
    model = stage_two(ar_model.PRESETS["toy"])[0][0].to(device).eval()
    settings = ar_model.sampling_settings(2, cfg_scale=2.0, top_p=0.9)
    labels = torch.arange(4, device=device)
    noise = sample.image_noise(range(4), model.config.tokens, 2).to(device)
    expected = torch.stack(ar_model.sample(model, labels, noise, settings))
    for compile in (False, True) if device.type == "cuda" else (False,):
        sampler = sample.Sampler(model, 4, settings, compile)
        for again in ("", ", again"):
            drawn = torch.stack(sampler(labels, range(4)))
            other = float((drawn != expected).double().mean())
            yield f"{'CUDA graphs' if compile else 'eager sampler'}{again}: other tokens", other


def two_ranks(rank, port, device, networks, loss, batch, queue):
    """One of two processes on one device: its half of the batch; rank 0 reports the mean gradients."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    networks = networks.to(device)
    model = runtime.distributed(networks[0], device)
    loss([model], batch[rank::2].to(device)).backward()
    if rank == 0:
        queue.put([p.grad.cpu().numpy() for p in networks.parameters()])
    dist.barrier()
    dist.destroy_process_group()


def compare_two_ranks(device):
    """Yield (what, difference) of two processes that share `device`, over gloo, and of one."""
    networks, loss = stage_two(ar_model.PRESETS["toy"])
    batch = torch.randint(2 ** 10, (4, 64))
    expected = gradients(networks, loss, batch, device)[1:]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    port = 20000 + time.time_ns() % 20000
    arguments = port, device, networks, loss_of_toy, batch, queue
    spawned = torch.multiprocessing.spawn(two_ranks, arguments, 2, join=False)
    found = [torch.from_numpy(gradient) for gradient in queue.get()]
    spawned.join()
    yield "gradients of two ranks on one device", difference(found, expected)


def loss_of_toy(networks, ids):
    """`stage_two`'s, by a name that another process can find."""
    return stage_two(ar_model.PRESETS["toy"])[1](networks, ids)


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

def seconds(function, device, least=3):
    """The shortest of a few runs, after one to warm up."""
    times = []
    for _ in range(1 + least):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def gib(device):
    """The largest memory so far of what PyTorch has allocated."""
    return torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else float("nan")


# Images a second at batch 1 and 64, guided, bf16: half of what reading weights and cache once a token allows.
SAMPLING_FLOORS = {"AR-B": (5, 250), "AR-L": (3.3, 135), "AR-XL": (2.5, 75), "toy": (0, 0)}


@torch.no_grad()
def sampling_figures(device, tiny):
    """Yield (what, images/s, floor)."""
    for preset in ("toy",) if tiny else ("AR-B", "AR-L", "AR-XL"):
        with device:
            model = sample.prepare_for_sampling(ar_model.ARModel(ar_model.PRESETS[preset]), torch.bfloat16)
        settings = ar_model.sampling_settings(2, cfg_scale=2.0)
        for batch, floor in zip((1, 2 if tiny else 64), SAMPLING_FLOORS[preset]):
            for compile in (False, True) if device.type == "cuda" else (False,):
                sampler = sample.Sampler(model, batch, settings, compile)
                speed = batch / seconds(lambda: sampler([0] * batch, range(batch)), device, 1)
                yield f"sampling {preset}, batch {batch}{', graphs' if compile else ''}: images/s", speed, \
                    floor if compile else 0


def training_figures(device, tiny):
    """Yield (what, figure, floor) of training steps in bf16, and of their memory."""
    config = ar_model.PRESETS["toy" if tiny else "AR-B"]
    ids = torch.randint(2 ** sum(config.bits), (2 if tiny else 64, config.tokens))
    ar_step = (*stage_two(config), ids, 0 if tiny else 690)
    steps = {"toy" if tiny else "AR-B": ar_step}
    for preset, batch, floor in (("toy-video", 1, 0),) if tiny else (("in1k-256", 8, 120), ("ucf-128", 1, 6)):
        shape = train_tokenizer.TOKENIZER_PRESETS[preset]
        axes = [shape.frames] if hasattr(shape, "frames") else []
        x = torch.rand(batch, 3, *axes, shape.resolution, shape.resolution)
        steps[preset] = (*stage_one(preset), x, floor)
    for name, (networks, loss, batch, floor) in steps.items():
        networks.to(device)
        batch = batch.to(device)
        optimizer = torch.optim.AdamW(networks.parameters(), fused=device.type == "cuda")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def step():
            with runtime.autocast(device, "bf16"):
                loss(networks, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        speed = len(batch) / seconds(step, device)
        yield f"training {name}: samples/s", speed, floor
        if name == "AR-B":
            flops = speed * train_ar.flops_per_image(config)
            yield "training AR-B: MFU of an H100's bf16", flops / 989e12, 0.3
        yield f"training {name}, batch {len(batch)}: GiB", gib(device), 0
        networks.to("cpu")


def other_figures(device, tiny):
    """Yield (what, figure, floor) of the entropy term and of the networks of metrics."""
    z = torch.randn(1024 if tiny else 65536, 18, device=device, requires_grad=True)

    def entropy():
        per_token, codebook = tokenizer.lfq_entropies(z)
        (per_token - codebook).backward()
    yield f"entropy term and gradient, N = {len(z):,}: times a second", 1 / seconds(entropy, device), 50
    batch = 1 if tiny else 64
    with torch.no_grad():
        inception, i3d = metrics.FIDInception().eval().to(device), metrics.I3D().eval().to(device)
        x = torch.rand(batch, 3, 299, 299, device=device)
        yield "Inception, fp32: images/s", batch / seconds(lambda: inception(x), device), 1000
        x = torch.rand(1 if tiny else 8, 3, 9 if tiny else 16, 224, 224, device=device)
        yield "I3D, fp32: clips/s", len(x) / seconds(lambda: i3d(x), device), 50


def main(args):
    """Print a line for each result and figure; the exit status says whether all results agree."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise runtime.UserError("no CUDA GPU is visible; --device cpu --tiny tries this script out")
    device = runtime.setup_process_group(args.device)
    torch.manual_seed(0)
    wrong = 0
    for part in (compare_networks(device, args.tiny), compare_samplers(device), compare_two_ranks(device),
                 compare_resumed(device)):
        for name, error in part:
            equal = error <= 1e-4                                          # NaN is wrong, too
            wrong += not equal
            print(f"{'equal' if equal else 'WRONG'}  {error:8.1e}  {name}", flush=True)
    for part in () if args.skip_figures else (sampling_figures, training_figures, other_figures):
        for name, figure, floor in part(device, args.tiny):
            below = device.type == "cuda" and figure < floor
            verdict = "BELOW" if below else "     "
            print(f"{verdict}  {figure:8.3g}  {name} (floor: {floor or 'none'})", flush=True)
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
