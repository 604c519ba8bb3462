"""What a GPU would do, proven without one: places of tensors, graphs, compiled regions, half precision.

tests/gpu.py asks a real one.
"""
import dataclasses

import pytest
import torch
import torch._dynamo.testing
from helpers import call, error_line, logged, newest, run_script

import ar_model
import bench
import gpu
import sample
import tokenizer
import train_ar
import train_tokenizer
from support import runtime

IMAGES = ["--image-size", 16, "--blocks", 1, "--bits", 6, "--global-batch-size", 4, "--warmup", 0,
          "--log-every", 1, "--length", 2, "--lr", 1e-4, "--gan-weight", 0.1, "--discriminator", "blurpool",
          "--lecam-weight", 0.05, "--entropy-weight", 0.1]
# 9 frames: of 5 the discriminator makes 2, of which oneDNN (torch 2.14) makes garbage for gradients in bf16.
CLIPS = ["--preset", "toy-video", *IMAGES, "--frames", 9, "--discriminator", "patchgan-3d"]
AR = ["--split", 3, 3, "--width", 32, "--heads", 2, "--inter-blocks", 2, "--global-batch-size", 4,
      "--val-size", 4, "--length", 2, "--log-every", 1, "--warmup", 0, "--token-dropout", 0.1, "--online"]
SHAPE = dataclasses.replace(ar_model.PRESETS["toy"], width=32, heads=2, inter_blocks=2, bits=(3, 4),
                            grid=(3, 4))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer and a transformer of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    call(train_tokenizer, *IMAGES, "--results-dir", folder / "tokenizer")
    tokens = str(runtime.latest_checkpoint(folder / "tokenizer"))
    call(train_ar, *AR, "--tokenizer", tokens, "--results-dir", folder / "ar")
    return tokens, str(runtime.latest_checkpoint(folder / "ar"))


# ---- no tensor is made on the wrong device, and graphs draw the same -------------------------------------

@pytest.mark.slow
def test_everything_runs_on_a_mock_of_a_gpu():
    run_script("tests/mock_devices.py")


# ---- compiled regions, beside those that tests/gpu.py compares -------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("region, shape, backend", [
    (tokenizer.ResBlock(32, 32, torch.nn.Conv2d), (2, 32, 8, 8), "inductor"),    # others would take minutes
    (train_tokenizer.PatchGAN(), (2, 3, 32, 32), "aot_eager")], ids=["residual block", "patchgan"])
def test_compiled_regions_are_one_graph_of_equal_gradients(region, shape, backend):
    torch._dynamo.reset()
    x = torch.rand(shape)
    results = []
    for run in (region, torch.compile(region, fullgraph=True, dynamic=False, backend=backend)):
        region.zero_grad()
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.square().mean().backward()
        results.append([out.detach(), leaf.grad, *[p.grad for p in region.parameters()]])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_pieces_of_the_sampler_are_compiled_once_for_all_layers():
    torch._dynamo.reset()
    model = ar_model.ARModel(SHAPE).eval()
    torch.nn.init.normal_(model.heads[0].weight)
    settings = ar_model.sampling_settings(2, cfg_scale=2.0)
    plain, compiled = [sample.Sampler(model, 2, settings) for _ in range(2)]
    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled.pieces = [torch.compile(piece, fullgraph=True, dynamic=False, backend=compiler)
                       for piece in plain.pieces]
    drawn = torch.stack(compiled([0, 3], [5, 6]))
    assert torch.equal(drawn, torch.stack(plain([0, 3], [5, 6])))
    assert compiler.frame_count == 4       # store, finish, and step_within for each of the two sub-tokens


# ---- half precision ---------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [
    (train_tokenizer, [*IMAGES, "--adaptive-gan-weight"]), (train_tokenizer, CLIPS), (train_ar, AR)],
    ids=["images", "clips", "transformer"])
def test_a_half_precision_step_is_close_to_float32(tmp_path, trained, script, flags):
    flags = [*flags, "--length", 1, "--lr", 1e-3, "--global-batch-size", 2]
    if script is train_ar:
        flags += ["--tokenizer", trained[0]]
    for precision in ("fp32", "bf16", "fp16"):
        call(script, *flags, "--mixed-precision", precision, "--results-dir", tmp_path / precision)
    full, model = logged(tmp_path / "fp32")[1], newest(tmp_path / "fp32")["model"]
    for dtype in ("bf16", "fp16"):
        half, state = logged(tmp_path / dtype)[1], newest(tmp_path / dtype)["model"]
        assert half["skipped_steps"] == 0
        for name in full:
            if name.startswith("loss") and name != "loss/lecam" or name.endswith("_bits"):    # not squares
                assert half[name] == pytest.approx(full[name], rel=0.05, abs=0.03), name
        for name, tensor in model.items():                             # Adam's first step: lr at most
            assert state[name].dtype == tensor.dtype
            assert (state[name] - tensor).abs().max() <= 2.1e-3, name


# ---- what is counted, and tests/gpu.py --------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_counted_activations_are_those_that_autograd_keeps(stage):
    networks, gradients, batch = getattr(bench, stage)([], torch.device("cpu"))
    own = {p.data_ptr() for network in filter(None, networks) for p in network.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = list(gradients.losses(networks, batch))
    real = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)
    assert losses and bench.counted(stage, [])[2] * 2 ** 30 == pytest.approx(real, rel=0.05)


@pytest.mark.slow
def test_operations_are_those_of_the_formula():
    _, tflop, _ = bench.counted("stage_two", ["--global-batch-size", "2", "--mixed-precision", "bf16"])
    assert tflop * 1e12 == pytest.approx(2 * train_ar.flops_per_image(ar_model.PRESETS["toy"]), rel=0.05)


@pytest.mark.slow
def test_the_script_for_gpus_finds_the_cpu_equal_to_itself():
    done = run_script("tests/gpu.py", "--device", "cpu", "--tiny", "--skip-figures")
    assert done.stdout.count("equal") == 15
    if not torch.cuda.is_available():
        assert error_line(gpu, "--device", "cuda").startswith("error: no CUDA GPU is visible")
