"""tokenizer.py is the published function, its ids round-trip, and its entropy is exact."""
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F

import ar_model
import fsq_to_lfq
import tokenizer
import video
from support import checkpoints
from helpers import fill_module, golden, refused, save_images

SHAPE = dict(resolution=16, channels=32, channel_multipliers=(1, 2), blocks=1, bits=6)
TINY = tokenizer.TokenizerConfig(**SHAPE, mid_blocks=1)
CLIPS = video.VideoTokenizerConfig(**SHAPE, mid_blocks=0, frames=5, time_strides=(2,))


# The other quantisers, with 37 to 64 ids.
OTHERS = [{"quantizer": "bsq"}, {"quantizer": "bsq", "groups": 3}, {"quantizer": "lfq", "groups": 2},
          {"quantizer": "fsq", "levels": (4, 3, 5)},
          {"quantizer": "vq", "codebook_size": 37, "codebook_channels": 5},
          {"quantizer": "simvq", "codebook_size": 37, "codebook_channels": 5}]


def tiny(**changes):
    """A tiny tokenizer."""
    torch.manual_seed(0)
    return tokenizer.Tokenizer(dataclasses.replace(TINY, **changes))


# ---- the published function -------------------------------------------------------------------------------

def test_encoder_ids_and_decoder_equal_the_official_ones():
    expected = golden("image_tokenizer")
    config = tokenizer.TokenizerConfig(resolution=32, channels=32, blocks=1, mid_blocks=1)
    with torch.no_grad():
        reconstruction, z, q, ids = fill_module(tokenizer.Tokenizer(config), "")(expected["x"])
    torch.testing.assert_close(z, expected["encoder_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(reconstruction, expected["reconstruction"], atol=1e-5, rtol=0)
    assert torch.equal(ids.flatten(1), expected["index"])
    first, second = ar_model.ids_to_subtokens(ids.flatten(1), (6, 12))
    assert torch.equal(first, expected["sub_index_6"]) and torch.equal(second, expected["sub_index_12"])
    assert torch.equal(torch.where(q > 0, 1, -1), torch.where(z > 0, 1, -1))


def test_entropy_terms_and_gradient_equal_the_official_ones():
    expected = golden("lfq_losses")
    z = expected["z"].requires_grad_()
    per_token, codebook = tokenizer.lfq_entropies(z.movedim(1, -1).reshape(-1, 12), eps=1e-5)
    (per_token - codebook).backward()
    q, ids = tokenizer.LFQ(tokenizer.TokenizerConfig(bits=12))(expected["z"].detach())
    for value, name in ((per_token, "per_sample_entropy"), (codebook, "codebook_entropy"),
                        (per_token - codebook, "entropy_loss"), ((z - q).square().mean(), "commitment")):
        assert math.isclose(value.item(), expected[name].item(), rel_tol=1e-6)
    largest = expected["entropy_grad"].abs().max()
    assert (z.grad - expected["entropy_grad"]).abs().max() <= 2e-5 * largest
    assert torch.equal(ids.flatten(), expected["index"])


# ---- ids and q --------------------------------------------------------------------------------------------

def test_id_is_the_sum_of_powers_of_two_of_positive_channels():
    z = torch.tensor([0.5, -0.1, 0.0, 2.0]).view(1, 4, 1, 1)
    q, ids = tokenizer.LFQ(tokenizer.TokenizerConfig(bits=4))(z)
    assert q.flatten().tolist() == [1, -1, -1, 1] and ids.item() == 1 + 8               # 0 counts as negative
    every = torch.randperm(2 ** 18)
    assert torch.equal(tokenizer.bits_to_ids(tokenizer.ids_to_bits(every, 18)), every)
    assert tokenizer.reverse_bits(torch.tensor([0, 1, 6, 8, 15]), 4).tolist() == [0, 8, 6, 1, 15]
    assert torch.equal(tokenizer.reverse_bits(tokenizer.reverse_bits(every, 18), 18), every)


@pytest.mark.parametrize("changes", [{"bits": 6}, {"bits": 7, "quantizer": "bsq"},
                                     {"quantizer": "fsq", "levels": (8, 5, 7)}])
def test_values_and_ids_are_those_of_vector_quantize_pytorch(changes):
    others = pytest.importorskip("vector_quantize_pytorch")
    quantizer = tiny(**changes).quantizer
    z = torch.randn(2, quantizer.channels, 9, 9)
    if "levels" in changes:                        # without preserve_symmetry, an even number is shifted
        theirs = others.FSQ(list(changes["levels"]), channel_first=True, preserve_symmetry=True)
        order = torch.Tensor.clone
    else:
        theirs = others.LFQ(codebook_size=quantizer.vocabulary, spherical="quantizer" in changes)
        order = functools.partial(tokenizer.reverse_bits, bits=changes["bits"])
    q, ids = quantizer(quantizer.bound(z))
    their_q, their_ids = theirs.eval()(z)[:2]
    torch.testing.assert_close(their_q, q, atol=1e-6, rtol=0)
    assert torch.equal(their_ids, order(ids))
    torch.testing.assert_close(theirs.indices_to_codes(order(ids)), q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", [{}, *OTHERS])
def test_the_gradient_passes_quantisation_as_the_identity(changes):
    model = tiny(**changes)
    reconstruction, z, q, _ = model(torch.rand(1, 3, 16, 16))
    z.retain_grad()
    q_leaf = q.detach().clone().requires_grad_()
    reconstruction.square().sum().backward()
    model.decoder(q_leaf).square().sum().backward()
    torch.testing.assert_close(z.grad, q_leaf.grad)


def test_the_gradient_goes_on_through_the_sphere_and_the_tanh():
    z = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    for changes in ({"quantizer": "bsq"}, {"quantizer": "fsq"}):
        assert torch.autograd.gradcheck(tiny(**changes).quantizer.bound, z)
    u = tiny(quantizer="bsq").quantizer.bound(z)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(2, 3, 3, dtype=torch.float64))
    gradient, = torch.autograd.grad((u * torch.randn_like(u)).sum(), z)
    assert (gradient * z).sum(1).abs().max() < 1e-12                       # no longer or shorter z


@pytest.mark.parametrize("changes", [{}, *OTHERS, {"bits": 32, "groups": 4}])
def test_all_ids_survive_q_and_are_counted_by_group(changes):
    quantizer = tiny(**changes).quantizer
    ids = torch.randint(quantizer.vocabulary, (1, 3, 999))
    ids[0, 0, :2] = torch.tensor([0, quantizer.vocabulary - 1])
    q = quantizer.ids_to_q(ids)
    assert torch.equal(quantizer(q)[0], q) and torch.equal(quantizer(q)[1], ids)
    assert q.shape[1] == quantizer.channels
    counts = quantizer.count(ids)
    for g, group in enumerate(counts):
        own = ids // len(group) ** g % len(group)
        assert torch.equal(group, own.flatten().bincount(minlength=len(group)))
    assert counts.shape == (quantizer.groups, round(quantizer.vocabulary ** (1 / quantizer.groups)))


def test_levels_are_even_and_the_nearest_is_taken():
    fsq = tiny(quantizer="fsq", levels=(3, 4)).quantizer
    z = fsq.bound(torch.randn(1, 2, 40, 40))
    q, ids = fsq(z)
    for k, levels in enumerate((torch.tensor([-1, 0, 1.0]), torch.tensor([-1, -1 / 3, 1 / 3, 1]))):
        nearest = levels[(z[0, k, ..., None] - levels).abs().argmin(-1)]
        torch.testing.assert_close(q[0, k], nearest)
    assert torch.equal(ids.unique(), torch.arange(12))
    assert fsq(torch.full((1, 2, 1, 1), math.nan))[1].item() in range(12)  # such a step is skipped later


@pytest.mark.parametrize("levels", [2, 4, 8, 16])
def test_digits_of_fsq_are_written_in_gray_code(levels):
    fsq = tiny(quantizer="fsq", levels=(levels, levels)).quantizer
    z = fsq.bound(torch.randn(1, 2, 40, 40))
    assert torch.equal(fsq_to_lfq.waves(z, levels) > 0, fsq_to_lfq.waves(fsq(z)[0], levels) > 0)
    every = torch.linspace(-1, 1, levels)[:, None, None, None]
    code = fsq_to_lfq.waves(every, levels).flatten(1) > 0                  # (levels, bits)
    assert len(code.unique(dim=0)) == levels == 2 ** code.shape[1]
    assert ((code[1:] != code[:-1]).sum(1) == 1).all()                     # one bit from digit to digit


def test_an_fsq_tokenizer_becomes_one_of_lfq(tmp_path, capsys):
    for name, levels in (("even", (4, 4)), ("uneven", (8, 5))):
        first = tiny(quantizer="fsq", levels=levels)
        torch.save({"format": checkpoints.format_of(first), "step": 1, "model": first.state_dict(),
                    "config": dataclasses.asdict(first.config), "args": {}}, tmp_path / f"{name}.pt")
    save_images(tmp_path / "images", 8)
    words = [str(tmp_path / "images"), str(tmp_path / "new" / "lfq.pt"), "--image-size", "16", "--length",
             "2"]
    fsq_to_lfq.main(fsq_to_lfq.get_args([str(tmp_path / "even.pt"), *words]))
    config = checkpoints.load_tokenizer(tmp_path / "new" / "lfq.pt")[0].config
    assert config == dataclasses.replace(TINY, quantizer="lfq", bits=4, levels=(4, 4))
    assert "step 1/2 | waves " in capsys.readouterr().out
    refused("equal and a power of two", fsq_to_lfq.main,
            fsq_to_lfq.get_args([str(tmp_path / "uneven.pt"), *words]))


def test_one_matrix_moves_the_whole_codebook_of_simvq():
    simvq = tiny(quantizer="simvq").quantizer
    before = simvq.entries().detach()
    z = torch.randn(1, simvq.channels, 1, 1)
    simvq.losses(z, simvq(z)[0], 0.1, 0, None)[0]["codebook"].backward()   # of a single entry
    assert [name for name, p in simvq.named_parameters() if p.grad is not None] == ["linear.weight"]
    torch.optim.SGD(simvq.parameters(), lr=1).step()
    assert ((simvq.entries() - before).norm(dim=1) > 0).all()


# ---- the entropy term -------------------------------------------------------------------------------------

def dense_entropies(z, tau, eps):
    """Eq. 3 as written, with the whole N x 2^K table."""
    codebook = tokenizer.ids_to_bits(torch.arange(2 ** z.shape[1]), z.shape[1]).to(z.dtype) * 2 - 1
    p = torch.softmax(2 * z @ codebook.T / tau, dim=1)
    mean = p.mean(0)
    return -torch.xlogy(p, p).sum(1).mean(), -(mean * (mean + eps).log()).sum()


@pytest.mark.parametrize("bits", [1, 2, 7, 10])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_entropy_equals_the_dense_softmax_over_the_whole_codebook(bits, eps):
    z = torch.randn(40, bits, generator=torch.Generator().manual_seed(bits)) * 0.02
    z64, z32 = z.double().requires_grad_(), z.clone().requires_grad_()
    dense, exact = dense_entropies(z64, 0.05, eps + 1e-300), tokenizer.lfq_entropies(z32, 0.05, eps)
    for a, b in zip(dense, exact):
        torch.testing.assert_close(b.double(), a, atol=1e-5, rtol=1e-5)
    (dense[0] - dense[1]).backward(), (exact[0] - exact[1]).backward()
    assert (z32.grad - z64.grad).abs().max() < 1e-4 * z64.grad.abs().max()


def test_the_mean_over_tokens_is_that_of_the_whole_table():
    p1 = torch.rand(50, 7, dtype=torch.float64)
    table = torch.stack([torch.where(tokenizer.ids_to_bits(torch.tensor(i), 7).bool(), p1, 1 - p1).prod(1)
                         for i in range(2 ** 7)], dim=1)                   # (50, 2^7)
    torch.testing.assert_close(tokenizer.mean_over_tokens(p1, 1 - p1), table.mean(0), atol=1e-14, rtol=0)


@pytest.mark.parametrize("bits", [3, 10])
def test_entropy_on_the_sphere_equals_the_dense_softmax(bits):
    bsq = tokenizer.BSQ(tokenizer.TokenizerConfig(bits=bits))
    z = bsq.bound(torch.randn(1, bits, 40, generator=torch.Generator().manual_seed(bits)))
    codebook = bsq.ids_to_q(torch.arange(2 ** bits)[None])[0].double()     # (K, 2^K)
    p = torch.softmax(-torch.cdist(z[0].T.double(), codebook.T).square() / 0.05, dim=1)
    expected = torch.stack([torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()])
    _, report = bsq.losses(z, bsq(z)[0], 0.05, 0.0, None)
    found = torch.stack(list(report.values())).double()
    torch.testing.assert_close(found, expected / math.log(2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("quantizer", ["lfq", "bsq"])
def test_one_group_is_no_groups_and_several_are_separate_codebooks(quantizer):
    z = torch.randn(2, 12, 5, 5)
    alone = {}
    for groups in (1, 3):
        model = tiny(quantizer=quantizer, bits=12, groups=groups).quantizer
        u = model.bound(z).requires_grad_()
        terms, report = model.losses(u, model(u)[0], 0.3, 0.0, None)
        gradient, = torch.autograd.grad(terms["entropy"], u)
        flat = u.detach().movedim(1, -1).flatten(0, -2).requires_grad_()
        parts = [tokenizer.lfq_entropies(part, 0.3 / model.amplitude) for part in flat.chunk(groups, dim=1)]
        per_token, codebook = [sum(values) for values in zip(*parts)]
        expected, = torch.autograd.grad(per_token - codebook, flat)
        exact = {} if groups > 1 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(terms["entropy"], per_token - codebook, **exact)
        torch.testing.assert_close(gradient.movedim(1, -1).flatten(0, -2), expected, **exact)
        alone[groups] = report["codebook_bits"]
    assert alone[1] < alone[3] <= 12


def test_parts_taken_for_independent_bound_the_entropy_and_meet_it_where_they_are():
    lfq = tiny(bits=12).quantizer
    base = torch.randn(300, 4)
    for z, dependent in ((base @ torch.randn(4, 12), True),                # four numbers make twelve bits
                         (tokenizer.ids_to_bits(torch.arange(4096), 12) * 2.0 - 1, False)):
        z = z.T[None, :, :, None]
        found = {name: lfq.losses(z, lfq(z)[0], 1.0, 0.0, None, name)[1] for name in tokenizer.JOINT_BITS}
        exact, groups, bits = [found[name]["codebook_bits"].item() for name in ("exact", "groups", "bits")]
        assert len({report["token_bits"].item() for report in found.values()}) == 1
        if dependent:
            assert bits > groups + 0.01 > exact + 0.02
        else:
            assert bits == pytest.approx(exact, rel=1e-5) == groups


def test_entropy_bounds_are_met_at_their_extremes():
    uniform = [value.item() for value in tokenizer.lfq_entropies(torch.zeros(8, 18))]
    assert uniform == pytest.approx([18 * math.log(2)] * 2)                # all ids are equally likely
    assert tokenizer.lfq_entropies(torch.zeros(8, 18), eps=1e-5)[1].item() == pytest.approx(11.19, abs=0.005)
    every_q = tokenizer.ids_to_bits(torch.arange(2 ** 10), 10) * 2.0 - 1
    per_token, codebook = tokenizer.lfq_entropies(every_q)
    assert per_token.item() < 1e-6 and codebook.item() == pytest.approx(10 * math.log(2), rel=1e-6)


def test_entropy_is_fp32_under_autocast_and_finite():
    z = torch.randn(64, 18, generator=torch.Generator().manual_seed(0))
    plain = tokenizer.lfq_entropies(z)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tokenizer.lfq_entropies(z)
    assert plain == mixed and all(value.dtype == torch.float32 for value in mixed)
    huge = (z * 50).requires_grad_()
    per_token, codebook = tokenizer.lfq_entropies(huge)
    (per_token - codebook).backward()
    assert torch.isfinite(per_token - codebook) and torch.isfinite(huge.grad).all()


# ---- layers and switches ----------------------------------------------------------------------------------

def test_depth_to_space_is_dcr_and_invertible():
    x = torch.arange(8.0).view(1, 8, 1, 1)                                # C = 2: channel (2 dy + dx) * 2 + c
    y = tokenizer.depth_to_space(x, (2, 2))
    assert y[0, 0].tolist() == [[0, 2], [4, 6]] and y[0, 1].tolist() == [[1, 3], [5, 7]]
    assert not torch.equal(y, F.pixel_shuffle(x, 2))
    for block, shape in (((2, 2), (2, 12, 3, 5)), ((2, 2, 2), (1, 16, 2, 3, 4)),
                         ((1, 2, 2), (1, 8, 2, 3, 4))):
        x = torch.randn(shape)
        assert torch.equal(tokenizer.space_to_depth(tokenizer.depth_to_space(x, block), block), x)


@pytest.mark.parametrize("changes", [
    {"quantizer": "vq", "codebook_size": 100}, {"quantizer": "simvq"}, {"quantizer": "fsq"},
    {"adaptive_norm": False}, {"upsampler": "nearest"},
    {"downsampler": "average"}, {"blocks": 2}, {"patch": 2}, {"mid_blocks": 0}, {"bits": 11}])
def test_each_switch_of_table_3_changes_the_model(changes):
    model = tiny(**changes)
    shapes = [{name: p.shape for name, p in each.state_dict().items()} for each in (model, tiny())]
    assert shapes[0] != shapes[1]
    reconstruction, z, q, ids = model(torch.rand(2, 3, 16, 16))
    assert reconstruction.shape == (2, 3, 16, 16) and int(ids.max()) < model.quantizer.vocabulary
    (reconstruction.square().mean() + (q - z).square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_vq_assigns_the_nearest_entry():
    vq = tokenizer.VQ(tokenizer.TokenizerConfig(codebook_size=50, codebook_channels=4))
    z = torch.randn(2, 4, 3, 5)
    q, ids = vq(z)
    distances = torch.cdist(z.movedim(1, -1).reshape(-1, 4), vq.codebook.weight)
    assert torch.equal(ids.flatten(), distances.argmin(1))
    assert torch.equal(q[1, :, 2, 4], vq.codebook.weight[ids[1, 2, 4]])


@pytest.mark.parametrize("clips", [False, True])
def test_activation_checkpointing_changes_no_gradient(clips):
    torch.manual_seed(0)
    model = video.VideoTokenizer(CLIPS) if clips else tokenizer.Tokenizer(TINY)
    x = torch.rand(1, 3, *[5] * clips, 16, 16)
    grads = []
    for checkpointing in (False, True):
        model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
        model.zero_grad()
        model(x)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("images, problem", [
    (torch.rand(1, 3, 15, 16), "15 x 16"), (torch.rand(1, 1, 16, 16), "1, 1, 16"),
    (torch.rand(3, 16, 16), "3, 16"), (torch.rand(1, 3, 2, 2), "2 x 2.* at least two"),
    (torch.rand(1, 3, 16, 16) * 255, r"floats in \[-1, 1\]"),
    (torch.ones(1, 3, 16, 16, dtype=torch.uint8), r"floats in \[-1, 1\]")])
def test_what_is_no_image_is_a_clear_error(images, problem):
    refused(problem, tiny().encode, images, kind=ValueError)


def test_foreign_ids_and_what_overflows_are_clear_errors():
    model = tiny()
    refused("0 .. 63", model.decode, torch.full((1, 2, 2), 64), kind=ValueError)
    for broken in (math.nan, math.inf):
        model.encoder.conv_out.bias.data[0] = broken
        refused("not finite.* bf16 or fp32", model.encode, torch.rand(1, 3, 16, 16), kind=ValueError)


@pytest.mark.parametrize("changes, problem", [
    ({"channels": 48}, "32 groups"), ({"groups": 4}, "groups 4 .* bits 6"),
    ({"bits": 33, "groups": 3}, "1 to 32"), ({"bits": 32}, "24"), ({"bits": 0}, "bits 0"),
    ({"levels": ()}, "levels"), ({"levels": (1, 2)}, "levels")])
def test_impossible_configs_are_clear_errors(changes, problem):
    refused(problem, dataclasses.replace, TINY, **changes, kind=ValueError)


@pytest.mark.parametrize("changes", [{}, {"patch": 2}, *OTHERS])
def test_ids_of_any_integer_dtype_are_decoded_in_the_models_own_dtype(changes):
    model = tiny(**changes)
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    ids = model.encode(x)
    expected = model(x)[0]
    for dtype in (torch.uint8, torch.int32, torch.uint32, torch.int64):
        assert torch.equal(model.decode(ids.to(dtype)), expected)
    refused("integers", model.decode, ids.float(), kind=ValueError)
    half = model.bfloat16()
    assert half.decode(ids).dtype == torch.bfloat16
    assert half.encode(x.bfloat16()).shape == ids.shape


def test_mean_over_ranks_changes_the_value_but_not_the_gradient():
    z = torch.randn(20, 6)
    grads = []
    for mean_over_ranks in (None, lambda mean: mean.detach().clone()):
        leaf = z.clone().requires_grad_()
        tokenizer.lfq_entropies(leaf, 0.5, 0.0, mean_over_ranks)[1].backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    other = tokenizer.lfq_entropies(z, 0.5, 0.0, lambda mean: torch.full_like(mean, 1 / 64))[1]
    assert other.item() == pytest.approx(6 * math.log(2))
