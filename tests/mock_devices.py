"""Tests on the device of mock_gpu.py. test_devices.py runs them in a process of their own: a mock cannot be
undone, and where there is one, torch's fake tensors cannot be of a GPU."""
import contextlib
import dataclasses
import sys

import numpy as np
import pytest
import torch
from helpers import call, logged
from mock_gpu import MOCK, Graph, Mock, OnMock, Undistributed
from test_devices import AR, CLIPS, IMAGES, SHAPE, trained                 # noqa: F401

import ar_model
import evaluate
import sample
import train_ar
import train_tokenizer
from support import checkpoints, codec, loops, metrics, runtime


@pytest.fixture
def mock(monkeypatch):
    """A function that lets all scripts run on the device "mock" from then on, in its context."""
    on_cpu = runtime.setup_process_group

    def use():
        monkeypatch.setattr(runtime, "setup_process_group", lambda device: on_cpu("cpu") and MOCK)
        monkeypatch.setattr(loops, "distributed", Undistributed)
        return Mock()
    return use


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
        for forbidden in (lambda: x.sum().item(), lambda: bool(x.max() > 0), lambda: x.tolist(),
                          lambda: x.detach().copy_(torch.ones(3)), lambda: torch.ones(3).to(MOCK),
                          lambda: torch.tensor([1.0], device=MOCK), lambda: x * torch.tensor(2.0),
                          lambda: x[x > 0], lambda: x.nonzero(), lambda: x.unique(),
                          lambda: x.repeat_interleave(x.long()), lambda: torch.rand(3, device=MOCK)):
            with pytest.raises(AssertionError, match="in a graph"), Graph.graph(Graph()):
                forbidden()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--image-size", 32, "--patch", 4, "--perceptual-weight", 1, "--adaptive-gan-weight",
     "--global-batch-size", 2, "--accumulation", 2],
    ["--quantizer", "bsq", "--groups", 2, "--upsampler", "nearest", "--downsampler", "average"],
    ["--quantizer", "vq", "--no-adaptive-norm"], ["--quantizer", "fsq"],
    ["--quantizer", "simvq", "--activation-checkpointing"], CLIPS],
    ids=["all", "bsq", "vq", "fsq", "simvq", "clips"])
def test_stage_one_stays_on_its_device(tmp_path, mock, monkeypatch, flags):
    monkeypatch.setattr(checkpoints, "load_network",
                        lambda *names: (metrics.randomise(metrics.LPIPS("alex")), None))
    with mock():
        call(train_tokenizer, *IMAGES, *flags, "--length", 1, "--results-dir", tmp_path)
        if "bsq" in flags:
            call(train_tokenizer, *IMAGES, *flags, "--resume", "--results-dir", tmp_path)          # step 2
    assert logged(tmp_path)[2 if "bsq" in flags else 1]["skipped_steps"] == 0


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
    (sample, ["--num-images", 1]), (sample, ["--num-fid-samples", 5]),
    (sample, ["--keep", "runs/images/train/0/0.png", "--top-p", 0.9, "--top-k", 4]),
    (codec, ["reconstruct", "runs/images/train", "--tile", 64]),
    (evaluate, ["reconstruction", "--metrics", "psnr", "usage", "rfid", "--num-samples", 2, "--batch-size", 2,
                 "--allow-random-weights"]),
    (evaluate, ["generation", "--metrics", "tokens", "--num-samples", 8])],
    ids=["ten-crop", "grid", "npz", "keep", "tiles", "reconstruction", "generation"])
def test_every_script_runs_on_its_device(tmp_path, mock, trained, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        path = tmp_path / f"runs/images/{('train', 'val')[i % 2]}/{i % 3}/{i}.png"
        sample.pictures.save_image(path, np.random.default_rng(i).integers(0, 256, (70, 66, 3), np.uint8))
    kind = "--tokenizer" if script is train_ar else "--ckpt"
    of_tokens = script in (train_ar, codec) or flags[0] == "reconstruction"
    with mock():
        call(script, *flags, kind, trained[0 if of_tokens else 1])


def functions_of_metrics():
    """{name: (function, arguments)} of all that takes tensors."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 8, 3, 12, 12), dtype=torch.uint8, generator=generator)
    x, y = torch.randn(2, 40, 6, generator=generator)
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
            x = metrics.inception_input(images.to(MOCK), rule)
            assert isinstance(x, OnMock)
        assert all(isinstance(output, OnMock) for output in inception(x))
        assert isinstance(i3d(metrics.i3d_input(clips.to(MOCK))), OnMock)


# ---- what becomes a CUDA graph ----------------------------------------------------------------------------

@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's graphs are those of the mock, and nothing is compiled."""
    for name, value in (("CUDAGraph", Graph), ("graph", Graph.graph), ("graph_pool_handle", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", lambda piece, **options: piece)
    monkeypatch.setattr(OnMock, "is_cuda", True, raising=False)


@pytest.mark.parametrize("bug", [
    lambda logits: logits / logits.max().item(), lambda logits: logits + torch.ones(8).to(MOCK),
    lambda logits: logits.masked_select(logits == logits).view(2, 8)], ids=["waits", "copies", "allocates"])
def test_what_a_graph_cannot_hold_is_found_in_the_samplers_step(graphs, monkeypatch, bug):
    draw = ar_model.draw_subtoken
    monkeypatch.setattr(ar_model, "draw_subtoken", lambda logits, *rest: draw(bug(logits), *rest))
    with Mock():
        model = ar_model.ARModel(dataclasses.replace(SHAPE, bits=(3, 3))).eval().to(MOCK)
        with pytest.raises(AssertionError, match="in a graph"):
            sample.Sampler(model, 2, ar_model.sampling_settings(2), compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("changes, values", [
    ({}, {"cfg_scale": 2.0, "top_k": 5, "top_p": 0.9, "temperature": (0.9, 0.0)}),
    ({"bits": (2, 3, 3), "separate_heads": True}, {})], ids=str)
def test_replayed_graphs_draw_the_tokens_of_the_plain_sampler(graphs, monkeypatch, changes, values):
    torch.manual_seed(0)
    model = ar_model.ARModel(dataclasses.replace(SHAPE, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = ar_model.sampling_settings(len(model.config.bits), **values)
    batches = [([0, 3], [5, 6]), ([9, 1], [7, 8])]
    expected = []
    for labels, seeds in batches:
        noise = sample.noise_of(seeds, model.config.tokens, len(settings))
        expected.append(torch.stack(ar_model.sample(model, torch.tensor(labels), noise, settings)))
    kept = [ids[0, :5] for ids in expected[0]]
    with Mock():
        sampler = sample.Sampler(model.to(MOCK), 2, settings, compile=True, bucket=4)
        assert sorted(sampler.graphs) == [4, 8, 12] and all(graph.calls for graph in sampler.graphs.values())
        monkeypatch.setattr(sampler, "step", None)                         # from here on, graphs alone draw
        for (labels, seeds), tokens in zip(batches, expected):
            assert torch.equal(torch.stack(sampler(labels, seeds)).cpu(), tokens)
        drawn = sampler([0, 0], [5, 6], [ids.to(MOCK) for ids in kept])
        assert all(ids[:, :5].tolist() == [given.tolist()] * 2 for ids, given in zip(drawn, kept))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider"]))
