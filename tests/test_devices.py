"""What a GPU would do, proven without one: places of tensors, graphs, compiled regions, half precision.

tests/gpu.py asks a real one.
"""
import contextlib
import dataclasses

import mock_gpu
import numpy as np
import pytest
import torch
from helpers import call, error_line, logged, newest
from mock_gpu import MOCK, Graph, Mock, OnMock, Undistributed

import ar_model
import checkpoints
import evaluate
import metrics
import runtime
import sample
import tokenizer
import train_ar
import train_tokenizer
import video

IMAGES = ["--image-size", 16, "--blocks", 1, "--bits", 6, "--global-batch-size", 4, "--warmup", 0, "--log-every",
          1, "--length", 2, "--lr", 1e-4, "--gan-weight", 0.1, "--discriminator", "blurpool", "--lecam-weight",
          0.05, "--entropy-weight", 0.1]
CLIPS = ["--preset", "toy-video", *IMAGES, "--frames", 5, "--discriminator", "patchgan-3d"]
AR = ["--split", 3, 3, "--width", 32, "--heads", 2, "--inter-blocks", 2, "--global-batch-size", 4, "--val-size",
      4, "--length", 2, "--log-every", 1, "--warmup", 0, "--token-dropout", 0.1, "--online"]
SHAPE = dataclasses.replace(ar_model.PRESETS["toy"], width=32, heads=2, inter_blocks=2, bits=(3, 4), grid=(3, 4))


@pytest.fixture
def mock(monkeypatch):
    """A function that lets all scripts run on the device "mock" from then on, in its context."""
    on_cpu = runtime.setup_process_group

    def use():
        monkeypatch.setattr(runtime, "setup_process_group", lambda device: on_cpu("cpu") and MOCK)
        monkeypatch.setattr(runtime, "distributed", Undistributed)
        return Mock()
    return use


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer and a transformer of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    call(train_tokenizer, *IMAGES, "--results-dir", folder / "tokenizer")
    tokens = str(runtime.latest_checkpoint(folder / "tokenizer"))
    call(train_ar, *AR, "--tokenizer", tokens, "--results-dir", folder / "ar")
    return tokens, str(runtime.latest_checkpoint(folder / "ar"))


# ---- no tensor is made on the wrong device ----------------------------------------------------------------

class Careless(torch.autograd.Function):
    """A backward pass that forgets the device."""

    @staticmethod
    def forward(ctx, x):
        """x"""
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        """Adds zeros that lie on the CPU."""
        return gradient + torch.zeros(3)


def test_the_mock_refuses_what_a_gpu_refuses():
    with Mock():
        x = torch.ones(3, device=MOCK, requires_grad=True)
        (x * torch.tensor(2.0)).sum().backward()                           # a scalar may lie on the CPU
        assert x.grad.tolist() == [2, 2, 2]
        for careless in (lambda: x + torch.arange(3), lambda: Careless.apply(x).sum().backward(),
                         lambda: torch.stack([x.sum(), torch.tensor(0.0)])):
            with pytest.raises(AssertionError, match="both devices"):
                careless()
        with pytest.raises((TypeError, RuntimeError), match="numpy|convert"):
            x.detach().numpy()
        for forbidden in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: x.cpu(),
                          lambda: x.detach().copy_(torch.ones(3)), lambda: torch.rand(3, device=MOCK),
                          lambda: x * torch.tensor(2.0), lambda: bool(x.max() > 0)):
            with pytest.raises(AssertionError, match="in a graph"), Graph.graph(Graph()):
                forbidden()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--image-size", 64, "--patch", 8, "--perceptual-weight", 1, "--adaptive-gan-weight", "--accumulation", 2],
    ["--quantizer", "bsq", "--groups", 2, "--upsampler", "nearest", "--downsampler", "average"],
    ["--quantizer", "vq", "--no-adaptive-norm"], ["--quantizer", "fsq"],
    ["--quantizer", "simvq", "--activation-checkpointing"], CLIPS],
    ids=["all", "bsq", "vq", "fsq", "simvq", "clips"])
def test_stage_one_stays_on_its_device(tmp_path, mock, monkeypatch, flags):
    monkeypatch.setattr(checkpoints, "load_network",
                        lambda *names: (metrics.randomise(metrics.LPIPS("alex")), None))
    with mock():
        for more in ([], ["--resume", "--length", 3]):
            call(train_tokenizer, *IMAGES, *flags, *more, "--results-dir", tmp_path)
    assert logged(tmp_path)[3]["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--ema-decay", 0.9], ["--separate-heads", "--activation-checkpointing"], ["--split", 2, 2, 2]],
    ids=["two", "separate", "three"])
def test_stage_two_stays_on_its_device(tmp_path, mock, trained, flags):
    for name, context in (("cpu", contextlib.nullcontext), ("mock", mock)):
        with context():
            call(train_ar, *AR, *flags, "--tokenizer", trained[0], "--results-dir", tmp_path / name)
    assert logged(tmp_path / "mock")[2] == pytest.approx(logged(tmp_path / "cpu")[2], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [
    (train_ar, [*AR[:-1], "--data-path", "runs/images", "--ten-crop"]),
    (sample, ["--num-images", 1]), (sample, ["--num-fid-samples", 5, "--cfg-schedule", "power"]),
    (sample, ["--keep", "runs/images/train/0/0.png", "--top-p", 0.9, "--top-k", 4]),
    (tokenizer, ["reconstruct", "runs/images/train", "--tile", 64]),
    (evaluate, ["reconstruction", "--metrics", "psnr", "usage", "rfid", "--max-samples", 4,
                 "--allow-random-weights"]),
    (evaluate, ["generation", "--metrics", "tokens", "--num-samples", 8])],
    ids=["ten-crop", "grid", "npz", "keep", "tiles", "reconstruction", "generation"])
def test_every_script_runs_on_its_device(tmp_path, mock, trained, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        path = tmp_path / f"runs/images/{('train', 'val')[i % 2]}/{i % 3}/{i}.png"
        sample.pictures.save_image(path, np.random.default_rng(i).integers(0, 256, (70, 66, 3), np.uint8))
    kind = {train_ar: "--tokenizer", sample: "--ckpt", tokenizer: "--ckpt", evaluate: "--ckpt"}[script]
    of_tokens = script in (train_ar, tokenizer) or flags[0] == "reconstruction"
    with mock():
        call(script, *flags, kind, trained[0 if of_tokens else 1])


def functions_of_metrics():
    """{name: (function, arguments)} of all that takes tensors."""
    images = torch.randint(256, (2, 8, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, y = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[3, 0, 1], [2, 2, 0]])
    moments = metrics.Moments

    def frechet(x, y):
        statistics = []
        for features in (x, y):
            sums = moments(6, x.device)
            sums.add(features)
            statistics += sums.mean_and_covariance()
        return metrics.frechet_distance(*statistics)
    return {"psnr": (metrics.psnr, images), "ssim": (metrics.ssim, images), "frechet": (frechet, (x, y)),
            "usage": (lambda c: list(metrics.codebook_usage(c).values()), (counts,)),
            "variation": (metrics.total_variation, counts), "kid": (metrics.kid, (x, y)),
            "official": (metrics.frechet_distance_official, (x, y)), "mind": (metrics.mind, (x, y)),
            "score": (metrics.inception_score, (x,)), "precision": (metrics.precision_recall, (x, y)),
            "half": (lambda x, y: metrics.precision_recall(x, y, half=True), (x, y))}


@pytest.mark.parametrize("name", functions_of_metrics())
def test_metrics_are_the_same_on_another_device(name):
    function, values = functions_of_metrics()[name]
    expected = function(*values)
    with Mock():
        found = function(*[value.to(MOCK) for value in values])
        found = found.cpu() if isinstance(found, torch.Tensor) else found
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_networks_of_metrics_stay_on_their_device():
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    clips = torch.zeros(1, 3, 9, 32, 32, dtype=torch.uint8)
    with Mock(), torch.no_grad():
        inception, i3d = metrics.FIDInception().eval().to(MOCK), metrics.I3D().eval().to(MOCK)
        for rule in ("tf1", "half-pixel", "half-pixel-antialiased"):
            outputs = inception(metrics.inception_input(images.to(MOCK), rule))
            assert all(isinstance(output, OnMock) for output in outputs)
        assert isinstance(i3d(metrics.i3d_input(clips.to(MOCK))), OnMock)


# ---- what becomes a CUDA graph ----------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("changes, values", [
    ({}, {"cfg_scale": 2.0, "top_k": 5, "top_p": 0.9, "temperature": (0.9, 0.0)}), ({"bits": (2, 3, 3)}, {}),
    ({"separate_heads": True}, {"cfg_scale": 3.0})], ids=str)
def test_replayed_graphs_draw_the_tokens_of_the_plain_sampler(monkeypatch, changes, values):
    for name, value in (("CUDAGraph", Graph), ("graph", Graph.graph), ("graph_pool_handle", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", lambda piece, **options: piece)
    monkeypatch.setattr(OnMock, "is_cuda", True, raising=False)
    torch.manual_seed(0)
    model = ar_model.ARModel(dataclasses.replace(SHAPE, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = ar_model.sampling_settings(len(model.config.bits), **values)
    batches = [([0, 3], [5, 6]), ([9, 1], [7, 8])]
    expected = []
    for labels, seeds in batches:
        noise = sample.image_noise(seeds, model.config.tokens, len(settings))
        expected.append(torch.stack(ar_model.sample(model, torch.tensor(labels), noise, settings)))
    kept = [ids[0, :5] for ids in expected[0]]
    with Mock():
        strength = torch.ones(model.config.tokens) if "cfg_scale" in values else None
        sampler = sample.Sampler(model.to(MOCK), 2, settings, compile=True, bucket=4, strength=strength)
        assert sorted(sampler.graphs) == [4, 8, 12] and all(graph.calls for graph in sampler.graphs.values())
        monkeypatch.setattr(sampler, "step", None)                         # from here on, graphs alone draw
        for (labels, seeds), tokens in zip(batches, expected):
            assert torch.equal(torch.stack(sampler(labels, seeds)).cpu(), tokens)
        drawn = sampler([0, 0], [5, 6], [ids.to(MOCK) for ids in kept])
        assert all(ids[:, :5].tolist() == [given.tolist()] * 2 for ids, given in zip(drawn, kept))


# ---- compiled regions -------------------------------------------------------------------------------------

def regions():
    """{name: (module or function, inputs)} of what --compile compiles."""
    toy = tokenizer.Tokenizer(tokenizer.PRESETS["toy"])
    clips = video.VideoTokenizer(dataclasses.replace(video.PRESETS["toy-video"], resolution=16))
    model = ar_model.ARModel(SHAPE)
    x, clip = torch.rand(2, 3, 32, 32), torch.rand(1, 3, 5, 16, 16)
    hidden = torch.rand(2, SHAPE.tokens, 32)
    return {"encoder": (toy.encoder, (x,)), "decoder": (toy.decoder, (torch.ones(2, 10, 8, 8),)),
            "clip encoder": (clips.encoder, (clip,)), "clip decoder": (clips.decoder, (torch.ones(1, 10, 2, 2, 2),)),
            "patchgan": (train_tokenizer.PatchGAN(), (x,)), "patchgan 3d": (train_tokenizer.PatchGAN3D(), (clip,)),
            "blurpool": (train_tokenizer.BlurPoolDiscriminator(), (x,)),
            "lpips": (metrics.LPIPS("alex"), (torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))),
            "inter block": (model.inter_blocks[0], (hidden, model.rope[:SHAPE.tokens], ar_model.attention)),
            "intra block": (model.intra_blocks[0], (hidden.unflatten(1, (-1, 2)), model.rope[:2],
                                                    ar_model.attention_within_token))}


@pytest.mark.slow
@pytest.mark.parametrize("name", regions())
def test_compiled_regions_are_one_graph_of_equal_gradients(name):
    region, (x, *more) = regions()[name]
    torch._dynamo.reset()
    results = []
    backend = "inductor" if name == "intra block" else "aot_eager"               # convolutions would take minutes
    for run in (region, torch.compile(region, fullgraph=True, dynamic=False, backend=backend)):
        region.zero_grad()
        leaf = x.clone().requires_grad_()
        out = run(leaf, *more)
        out.square().mean().backward()
        results.append([out.detach(), leaf.grad, *[p.grad for p in region.parameters() if p.grad is not None]])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


# ---- half precision ---------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script, flags, dtype", [
    (train_tokenizer, [*IMAGES, "--adaptive-gan-weight"], "bf16"), (train_tokenizer, IMAGES, "fp16"),
    (train_tokenizer, CLIPS, "bf16"), (train_ar, AR, "bf16"), (train_ar, AR, "fp16")],
    ids=["images-bf16", "images-fp16", "clips-bf16", "transformer-bf16", "transformer-fp16"])
def test_a_half_precision_step_is_close_to_float32(tmp_path, trained, script, flags, dtype):
    flags = [*flags, "--length", 1, "--lr", 1e-3]
    if script is train_ar:
        flags += ["--tokenizer", trained[0]]
    for precision in ("fp32", dtype):
        call(script, *flags, "--mixed-precision", precision, "--results-dir", tmp_path / precision)
    full, half = logged(tmp_path / "fp32")[1], logged(tmp_path / dtype)[1]
    assert half["skipped_steps"] == 0
    for name in full:
        if name.startswith("loss") and name != "loss/lecam" or name.endswith("_bits"):    # squares of logits
            assert half[name] == pytest.approx(full[name], rel=0.05, abs=0.03), name
    state = newest(tmp_path / dtype)["model"]
    for name, tensor in newest(tmp_path / "fp32")["model"].items():        # Adam's first step: lr at most, each
        assert state[name].dtype == tensor.dtype
        assert (state[name] - tensor).abs().max() <= 2.1e-3, name
