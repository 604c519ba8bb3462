"""tokenizer.py is the published function, its codes round-trip, its entropy is exact, and its loader is
strict."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import runtime
import tokenizer as tok
from helpers import ROOT, fill_module, golden, run_script

CHECKPOINTS = ROOT.parent / "shared" / "spec" / "checkpoints.json"
PUBLISHED_FILES = {"in1k-256": "imagenet_256_L.ckpt", "in1k-128": "imagenet_128_L.ckpt",
                   "pt-256-2^18": "pretrain256_262144.ckpt", "pt-256-2^14": "pretrain256_16384.ckpt"}
TINY = tok.TokenizerConfig(
    resolution=16, channels=32, channel_multipliers=(1, 2), blocks=1, mid_blocks=1, bits=6
)


def golden_tokenizer():
    return fill_module(
        tok.Tokenizer(tok.TokenizerConfig(resolution=32, channels=32, blocks=1, mid_blocks=1)), ""
    )


# ---- the published function -------------------------------------------------------------------------------

def test_encoder_codes_and_decoder_equal_the_official_ones():
    expected, model = golden("image_tokenizer"), golden_tokenizer()
    with torch.no_grad():
        reconstruction, z, q, ids = model(expected["x"])
    torch.testing.assert_close(z, expected["encoder_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(reconstruction, expected["reconstruction"], atol=1e-5, rtol=0)
    assert torch.equal(ids.flatten(1), expected["index"])
    first, second = tok.ids_to_subtokens(ids.flatten(1), (6, 12))
    assert torch.equal(first, expected["sub_index_6"]) and torch.equal(second, expected["sub_index_12"])
    assert torch.equal(torch.where(q > 0, 1, -1), torch.where(z > 0, 1, -1))


def test_entropy_terms_and_gradient_equal_the_official_ones():
    expected = golden("lfq_losses")
    z = expected["z"].requires_grad_()
    per_token, codebook = tok.lfq_entropies(z.movedim(1, -1).reshape(-1, 12), eps=1e-5)
    (per_token - codebook).backward()
    for value, name in ((per_token, "per_sample_entropy"), (codebook, "codebook_entropy"),
                        (per_token - codebook, "entropy_loss")):
        assert math.isclose(value.item(), expected[name].item(), rel_tol=1e-6)
    largest = expected["entropy_grad"].abs().max()
    assert (z.grad - expected["entropy_grad"]).abs().max() <= 2e-5 * largest
    q, ids = tok.LFQ(12)(expected["z"].detach())
    assert torch.equal(ids.flatten(), expected["index"])
    assert math.isclose(
        (expected["z"] - q).square().mean().item(), expected["commitment"].item(), rel_tol=1e-6
    )


@pytest.mark.parametrize("preset", PUBLISHED_FILES)
@pytest.mark.skipif(not CHECKPOINTS.exists(), reason="the list of published names is not here")
def test_presets_have_the_published_names_and_shapes(preset):
    with torch.device("meta"):
        model = tok.Tokenizer(tok.PRESETS[preset])
    published = json.loads(CHECKPOINTS.read_text())[PUBLISHED_FILES[preset]]["state_dict"]
    published = {
        name: shape for name, shape in published.items() if name.startswith(("encoder.", "decoder."))
    }
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published


def test_parameter_counts_are_the_published_ones():
    for preset, counts in (
        ("in1k-256", (49.75, 65.38)),
        ("in1k-128", (48.42, 63.60)),
        ("pt-256-2^14", (49.75, 65.34)),
    ):
        with torch.device("meta"):
            model = tok.Tokenizer(tok.PRESETS[preset])
        for part, millions in zip((model.encoder, model.decoder), counts):
            assert round(sum(p.numel() for p in part.parameters()) / 1e6, 2) == millions


# ---- codes ------------------------------------------------------------------------------------------------

def test_all_2_to_the_18_ids_survive_bits_and_every_split():
    ids = torch.arange(2 ** 18)
    assert torch.equal(tok.bits_to_ids(tok.ids_to_bits(ids, 18)), ids)
    for split in ((6, 12), (9, 9), (6, 6, 6), (18,), (1, 17), (3, 4, 5, 6)):
        parts = tok.ids_to_subtokens(ids, split)
        assert [int(p.max()) + 1 for p in parts] == [2 ** width for width in split]
        assert torch.equal(tok.subtokens_to_ids(parts, split), ids)


def test_id_is_the_sum_of_powers_of_two_of_positive_channels():
    z = torch.tensor([0.5, -0.1, 0.0, 2.0]).view(1, 4, 1, 1)
    q, ids = tok.LFQ(4)(z)
    assert q.flatten().tolist() == [1, -1, -1, 1] and ids.item() == 1 + 8               # 0 counts as negative


def test_decode_of_encode_is_the_forward_reconstruction():
    torch.manual_seed(0)
    for changes in ({}, {"quantizer": "vq", "codebook_size": 37, "codebook_channels": 5}, {"patch": 2}):
        model = tok.Tokenizer(tok.TokenizerConfig(**{**vars(TINY), **changes}))
        x = torch.rand(2, 3, 16, 24) * 2 - 1
        assert torch.equal(model.decode(model.encode(x)), model(x)[0])


def test_straight_through_gradient_reaches_the_encoder_as_if_quantisation_were_the_identity():
    torch.manual_seed(0)
    model = tok.Tokenizer(TINY)
    reconstruction, z, q, _ = model(torch.rand(1, 3, 16, 16))
    z.retain_grad()
    q_leaf = q.clone().requires_grad_()
    reconstruction.square().sum().backward()
    model.decoder(q_leaf).square().sum().backward()
    torch.testing.assert_close(z.grad, q_leaf.grad)


# ---- the entropy term -------------------------------------------------------------------------------------

def dense_entropies(z, tau, eps):
    """Eq. 3 as written, with the whole N x 2^K table."""
    codes = tok.ids_to_bits(torch.arange(2 ** z.shape[1]), z.shape[1]).to(z.dtype) * 2 - 1
    p = torch.softmax(2 * z @ codes.T / tau, dim=1)
    mean = p.mean(0)
    return -torch.xlogy(p, p).sum(1).mean(), -(mean * (mean + eps).log()).sum()


@pytest.mark.parametrize("bits", [1, 2, 7, 10])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_entropy_equals_the_dense_softmax_over_all_codes(bits, eps):
    z = torch.randn(40, bits, generator=torch.Generator().manual_seed(bits)) * 0.02
    z64, z32 = z.double().requires_grad_(), z.clone().requires_grad_()
    dense, exact = dense_entropies(z64, 0.05, eps + 1e-300), tok.lfq_entropies(z32, 0.05, eps)
    for a, b in zip(dense, exact):
        torch.testing.assert_close(b.double(), a, atol=1e-5, rtol=1e-5)
    (dense[0] - dense[1]).backward(), (exact[0] - exact[1]).backward()
    assert (z32.grad - z64.grad).abs().max() < 1e-4 * z64.grad.abs().max()


def test_entropy_bounds_are_met_at_their_extremes():
    assert tok.lfq_entropies(torch.zeros(8, 18))[0].item() == pytest.approx(18 * math.log(2))
    every_code = tok.ids_to_bits(torch.arange(2 ** 10), 10) * 2.0 - 1
    per_token, codebook = tok.lfq_entropies(every_code)
    assert per_token.item() < 1e-6 and codebook.item() == pytest.approx(10 * math.log(2), rel=1e-6)


def test_entropy_stays_finite_and_in_fp32_under_autocast_and_for_large_z():
    z = torch.randn(64, 18, generator=torch.Generator().manual_seed(0))
    plain = [v.item() for v in tok.lfq_entropies(z)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tok.lfq_entropies(z)
        assert all(v.dtype == torch.float32 for v in mixed) and [v.item() for v in mixed] == plain
    huge = (z * 50).requires_grad_()
    per_token, codebook = tok.lfq_entropies(huge)
    (per_token - codebook).backward()
    assert torch.isfinite(per_token - codebook) and torch.isfinite(huge.grad).all()


# ---- layers and switches ----------------------------------------------------------------------------------

def test_depth_to_space_is_in_dcr_order_and_space_to_depth_undoes_it():
    x = torch.arange(8.0).view(1, 8, 1, 1)                                # C = 2: channel (2 dy + dx) * 2 + c
    y = tok.depth_to_space(x, (2, 2))
    assert y[0, 0].tolist() == [[0, 2], [4, 6]] and y[0, 1].tolist() == [[1, 3], [5, 7]]
    assert not torch.equal(y, F.pixel_shuffle(x, 2))
    for block, shape in (
        ((2, 2), (2, 12, 3, 5)),
        ((2, 2, 2), (1, 16, 2, 3, 4)),
        ((1, 2, 2), (1, 8, 2, 3, 4)),
    ):
        x = torch.randn(shape)
        assert torch.equal(tok.space_to_depth(tok.depth_to_space(x, block), block), x)


def test_group_norms_have_the_published_eps():
    norms = [m for m in tok.Tokenizer(TINY).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms and all(m.eps == 1e-6 and m.num_groups == 32 for m in norms)


@pytest.mark.parametrize("changes", [
    {"quantizer": "vq", "codebook_size": 100}, {"adaptive_norm": False}, {"upsampler": "nearest"},
    {"downsampler": "average"}, {"blocks": 2}, {"patch": 2}, {"mid_blocks": 0}, {"bits": 11}])
def test_each_switch_of_table_3_changes_the_model_and_still_trains(changes):
    torch.manual_seed(0)
    model, plain = tok.Tokenizer(tok.TokenizerConfig(**{**vars(TINY), **changes})), tok.Tokenizer(TINY)
    assert {n: p.shape for n, p in model.state_dict().items()} != {
        n: p.shape for n, p in plain.state_dict().items()
    }
    reconstruction, z, q, ids = model(torch.rand(2, 3, 16, 16))
    assert reconstruction.shape == (2, 3, 16, 16) and int(ids.max()) < model.config.vocabulary
    (reconstruction.square().mean() + (q - z).square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_vq_assigns_the_nearest_entry():
    vq, z = tok.VQ(50, 4), torch.randn(2, 4, 3, 5)
    q, ids = vq(z)
    distances = torch.cdist(z.movedim(1, -1).reshape(-1, 4), vq.codebook.weight)
    assert torch.equal(ids.flatten(), distances.argmin(1))
    assert torch.equal(q[1, :, 2, 4], vq.codebook.weight[ids[1, 2, 4]])


def test_activation_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model, x, grads = tok.Tokenizer(TINY), torch.rand(1, 3, 16, 16), []
    for checkpointing in (False, True):
        model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
        model.zero_grad()
        model(x)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_wrong_shapes_and_foreign_ids_are_clear_errors():
    model = tok.Tokenizer(TINY)
    for images in (
        torch.rand(1, 3, 15, 16),
        torch.rand(1, 1, 16, 16),
        torch.rand(3, 16, 16),
        torch.rand(1, 3, 2, 2),
    ):
        with pytest.raises(runtime.UserError):
            model.encode(images)
    with pytest.raises(runtime.UserError, match="0 .. 63"):
        model.decode(torch.full((1, 2, 2), 64))
    with pytest.raises(runtime.UserError, match="32 groups"):
        tok.TokenizerConfig(channels=48)


# ---- loading ----------------------------------------------------------------------------------------------

def lightning_file(path, config=TINY, prefix="", change=lambda state: None, extras=None):
    """A file as PyTorch Lightning writes it, with raw weights of seed 0 and averages of seed 1."""
    from train_tokenizer import PatchGAN
    torch.manual_seed(0)
    model, averages, critic = tok.Tokenizer(config), tok.Tokenizer(config), PatchGAN()
    state = {prefix + name: t for name, t in model.state_dict().items()}
    if not prefix:
        state.update({"loss.discriminator." + name: t for name, t in critic.state_dict().items()})
        state["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
        parameters = [*averages.named_parameters(),
                      *(("loss.discriminator." + name, p) for name, p in critic.named_parameters())]
        state.update({"model_ema." + name.replace(".", ""): p.detach() for name, p in parameters})
        state.update({"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)})
    else:
        state["transformer.norm.weight"] = torch.ones(4)
    change(state)
    torch.save(
        {
            "state_dict": state,
            "epoch": 3,
            "global_step": 1234,
            "pytorch-lightning_version": "2.1.0",
            "optimizer_states": [],
            "loops": {},
            "callbacks": {},
            "hyper_parameters": {},
            **(extras or {}),
        },
        path,
    )
    return model.eval(), averages.eval()


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_published_file_loads_ema_by_default_and_raw_on_request(tmp_path):
    raw, averages = lightning_file(tmp_path / "a.ckpt")
    model, info = tok.load_tokenizer(tmp_path / "a.ckpt")
    assert same_weights(model, averages) and not model.training
    assert info["weights"] == "EMA" and info["step"] == 1234 and info["source"] == "published"
    model, info = tok.load_tokenizer(tmp_path / "a.ckpt", ema=False)
    assert same_weights(model, raw) and info["weights"] == "raw"


def test_tokenizer_comes_out_of_an_ar_file(tmp_path):
    raw, _ = lightning_file(tmp_path / "ar.ckpt", prefix="first_stage_model.")
    model, info = tok.load_tokenizer(tmp_path / "ar.ckpt")
    assert same_weights(model, raw) and info["weights"] == "raw"


@pytest.mark.parametrize(
    "name",
    [
        "encoder.norm_out.weight",
        "decoder.adaptive.1.beta.bias",
        "encoder.conv_out.weight",
        "loss.discriminator.main.5.weight",
        "decoder.norm_out.bias",
    ],
)
def test_a_missing_name_is_an_error_that_lists_it(tmp_path, name):
    lightning_file(tmp_path / "a.ckpt", change=lambda state: state.pop(name))
    with pytest.raises(
        runtime.UserError, match=name.split(".", 2)[-1] if name.startswith("loss") else name.split(".", 1)[-1]
    ):
        tok.load_tokenizer(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["encoder.norm_out.extra", "something.else", "model_ema.more",
                                  "loss.discriminator.main.12.weight", "transformer.norm.weight"])
def test_an_unexpected_name_is_an_error_that_lists_it(tmp_path, name):
    lightning_file(tmp_path / "a.ckpt", change=lambda state: state.update({name: torch.zeros(1)}))
    with pytest.raises(runtime.UserError, match=name.split(".", 1)[-1].removeprefix("discriminator.")):
        tok.load_tokenizer(tmp_path / "a.ckpt")


def test_a_wrong_shape_is_an_error_that_names_it(tmp_path):
    def change(state):
        state["model_ema.encodernorm_outbias"] = torch.zeros(3)
    lightning_file(tmp_path / "a.ckpt", change=change)
    with pytest.raises(runtime.UserError, match=r"encoder.norm_out.bias is \[3\]"):
        tok.load_tokenizer(tmp_path / "a.ckpt")


class Trap:
    """A class that would run code when unpickled."""

    def __reduce__(self):
        return (open, (Trap.path, "w"))


def test_unknown_pickled_class_is_refused_and_not_executed(tmp_path):
    Trap.path = str(tmp_path / "executed")
    lightning_file(tmp_path / "a.ckpt", extras={"callbacks": Trap()})
    with pytest.raises(runtime.UserError, match="--trust-checkpoint"):
        tok.load_tokenizer(tmp_path / "a.ckpt")
    assert not (tmp_path / "executed").exists()


def test_truncated_missing_and_foreign_files_are_clear_errors(tmp_path):
    lightning_file(tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.ckpt").write_bytes(whole[:size])
        with pytest.raises(runtime.UserError, match="cannot be read"):
            tok.load_tokenizer(tmp_path / "cut.ckpt")
    with pytest.raises(runtime.UserError, match="does not exist"):
        tok.load_tokenizer(tmp_path / "none.ckpt")
    torch.save({"format": "something"}, tmp_path / "b.pt")
    with pytest.raises(runtime.UserError, match="no tokenizer checkpoint"):
        tok.load_tokenizer(tmp_path / "b.pt")


@pytest.mark.skipif(not CHECKPOINTS.exists(), reason="the list of published names is not here")
def test_a_file_with_every_published_name_loads_strictly(tmp_path):
    for file, preset in (("pretrain256_16384.ckpt", "pt-256-2^14"), ("imagenet_128_L.ckpt", "in1k-128")):
        groups = json.loads(CHECKPOINTS.read_text())[file]
        # Expanded zeros take no memory; the file is small, because torch.save writes each storage once.
        zero = torch.zeros(())
        state = {name: zero.expand(shape) for group in groups.values() for name, shape in group.items()}
        torch.save({"state_dict": state, "global_step": 1}, tmp_path / file)
        model, info = tok.load_tokenizer(tmp_path / file)
        assert (info["preset"], info["weights"]) == (preset, "EMA")
        assert model.config == tok.PRESETS[preset]


def test_our_checkpoint_round_trips_with_ema_and_raw(tmp_path):
    torch.manual_seed(0)
    raw, averages = tok.Tokenizer(TINY), tok.Tokenizer(TINY)
    runtime.save_checkpoint(tmp_path / "a.pt", {
        "format": tok.Tokenizer.format, "config": tok.config_to_dict(TINY), "step": 5,
        "model": raw.state_dict(), "ema": {name: p.detach() for name, p in averages.named_parameters()}})
    model, info = tok.load_tokenizer(tmp_path / "a.pt")
    assert same_weights(model, averages) and (info["weights"], info["step"], info["source"]) == (
        "EMA",
        5,
        "ours",
    )
    assert same_weights(tok.load_tokenizer(tmp_path / "a.pt", ema=False)[0], raw)


def test_unreadable_resume_leaves_the_run_alone_and_exits_with_2(tmp_path):
    (tmp_path / "step-00000001.pt").write_bytes(b"not a checkpoint")
    result = run_script(
        "train_tokenizer.py", "--resume", "--length", 1, "--results-dir", tmp_path, check=False
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr and "cannot be read" in result.stderr
    assert (tmp_path / "step-00000001.pt").read_bytes() == b"not a checkpoint"
