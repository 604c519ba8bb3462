"""The metrics' mathematics and networks against independent packages, with shared (random) weights."""
import lpips
import numpy as np
import prdc
import pytest
import pytorch_fid.inception
import scipy.linalg
import scipy.optimize
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from support import metrics
from helpers import refused


def images_of(count, height, width, seed=0):
    """uint8 images: smooth with noise, the first almost flat and bright."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 4, 4, generator=generator) * 255
    images = F.interpolate(images, (height, width), mode="bicubic").clamp(0, 255)
    images += torch.randn(images.shape, generator=generator) * 6
    images[0] = 250 + (torch.rand(3, height, width, generator=generator) < 0.02)
    return images.round().clamp(0, 255).to(torch.uint8)


def pair(count=3, height=40, width=53):
    """Images and noisy versions of them."""
    reference = images_of(count, height, width)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(9)) * 12
    return reference, (reference.float() + noise).round().clamp(0, 255).to(torch.uint8)


def randomised(network, seed=0):
    """`network` in eval mode with random weights and BatchNorm statistics, so that each of them matters."""
    metrics.randomise(network, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inception():
    return randomised(metrics.FIDInception())


# ---- pixels and ids ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(40, 53), (7, 300), (300, 260)])
def test_psnr_and_ssim_are_those_of_scikit_image(height, width):
    reference, images = pair(3, height, width)
    a, b = [x.permute(0, 2, 3, 1).numpy() / 255.0 for x in (reference, images)]
    ssim = [structural_similarity(y, x, data_range=1.0, channel_axis=-1) for x, y in zip(a, b)]
    psnr = [peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b)]
    assert np.abs(metrics.ssim(reference, images).numpy() - ssim).max() <= 1e-11
    assert np.abs(metrics.psnr(reference, images).numpy() - psnr).max() <= 1e-9
    assert metrics.psnr(reference, reference).isinf().all()
    assert metrics.ssim(reference, reference).tolist() == pytest.approx([1, 1, 1])


def test_pixel_metrics_refuse_other_dtypes_shapes_and_sizes():
    reference, images = pair()
    for bad, what in ((images.float(), "float32"), (images[:, :2], "2"), (images.mT, "compared"),
                      (images.permute(0, 2, 3, 1), "40")):
        for metric in (metrics.psnr, metrics.ssim):
            refused(what, metric, reference, bad)
    refused("7 x 7", metrics.ssim, reference[..., :6], images[..., :6])


def test_frames_of_clips_stand_in_order():
    clips = torch.arange(2 * 3 * 5 * 4 * 4).view(2, 3, 5, 4, 4)
    frames = metrics.as_frames(clips)
    assert torch.equal(frames.unflatten(0, (2, 5)).transpose(1, 2), clips)
    assert torch.equal(metrics.as_frames(frames), frames)
    refused("clips", metrics.as_frames, clips.transpose(1, 2))


def test_usage_and_perplexity_of_known_distributions():
    skewed = 0.75 ** -0.75 * 0.25 ** -0.25
    for counts, usage, perplexity in (([5] * 64, 1.0, 64), ([0, 3, 1, 0], 0.5, skewed),
                                      ([[5, 5, 5, 5], [0, 3, 1, 0]], 0.75, (4 + skewed) / 2)):   # the mean
        report = metrics.codebook_usage(torch.tensor(counts))
        assert report == {"usage": usage, "perplexity": pytest.approx(perplexity)}


def test_total_variation_is_0_of_the_same_frequencies_and_1_of_disjoint_ids():
    counts = torch.tensor([3, 1, 0, 0])
    groups = torch.tensor([[3, 1, 0, 0], [1, 1, 2, 0]])
    for p, q, expected in ((counts, 2 * counts, 0), (counts, torch.tensor([0, 0, 7, 0]), 1),
                           (*groups, 0.5), (groups, groups[[0, 0]], 0.25)):                # the mean of both
        assert metrics.total_variation(p, q) == pytest.approx(expected)


# ---- networks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("net", [pytest.param("vgg", marks=pytest.mark.slow), "alex"])
def test_lpips_is_the_lpips_package_with_its_heads(net):
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()          # random trunk, real heads
    state = {f"heads.{i}": getattr(theirs, f"lin{i}").model[1].weight for i in range(5)}
    assert all((head >= 0).all() for head in state.values())
    for name, tensor in theirs.net.state_dict().items():               # slice3.8.weight -> features.8.weight
        state[f"features.{name.split('.', 1)[1]}"] = tensor
    ours = metrics.LPIPS(net)
    ours.load_state_dict(state)
    x, y = [images[1:] / 127.5 - 1 for images in pair(3, 64, 80)]      # the first one is flat
    with torch.no_grad():
        expected = theirs(x, y).flatten()
        assert (ours(x, y) - expected).abs().max() <= 1e-6 and expected.min() > 1e-3
        assert ours(x, x).abs().max() == 0


def test_the_tf1_resize_is_torch_fidelitys_exactly():
    for shape in ((2, 3, 32, 32), (1, 3, 256, 256), (1, 3, 500, 301)):
        x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).float()
        expected = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
        assert torch.equal(metrics.resize_tf1(x), expected)


@pytest.mark.slow
def test_inception_features_are_pytorch_fids_exactly(inception, monkeypatch):
    state = inception.state_dict()
    monkeypatch.setattr("pytorch_fid.inception.load_state_dict_from_url", lambda *args, **kwargs: state)
    theirs = pytorch_fid.inception.InceptionV3([3], use_fid_inception=True).eval()
    images = images_of(2, 64, 80)
    with torch.no_grad():
        expected = theirs(images.float() / 255)[0].flatten(1)
    features, _, _ = inception(metrics.inception_input(images, "half-pixel"))
    assert torch.equal(features, expected) and features.std() > 0.1


@pytest.mark.slow
def test_inception_is_torch_fidelitys_with_the_tf1_rule(inception, tmp_path):
    torch.save(inception.state_dict(), tmp_path / "a.pth")
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                         feature_extractor_weights_path=str(tmp_path / "a.pth")).eval()
    seen = []
    inception.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, output: seen.append(output))
    images = images_of(2, 64, 80)
    with torch.no_grad():
        expected, expected_logits = theirs(images)
    features, spatial, logits = inception(metrics.inception_input(images, "tf1"))
    assert (features - expected).abs().max() <= 1e-5
    assert (logits - expected_logits).abs().max() <= 1e-5 * expected_logits.abs().max()
    assert torch.equal(spatial.view(2, 17, 17, 7), seen[0].movedim(1, -1)[..., :7])      # NHWC order


def test_the_resize_rules_differ_enough_to_be_noticed():
    images = images_of(2, 640, 400, seed=4)[1:]                        # the first one is flat
    aliased, tf1 = [metrics.inception_input(images, rule) for rule in ("half-pixel", "tf1")]
    shrunk = metrics.inception_input(images, "half-pixel-antialiased")
    assert (aliased - tf1).abs().max() > 0.05
    assert shrunk.std() < aliased.std()                                # antialiasing removes the pixel noise
    refused("uint8", metrics.inception_input, images.float(), "tf1")


def test_i3d_has_the_published_parameters_and_tensorflows_padding():
    network = metrics.I3D()
    names = network.state_dict().keys()
    assert {"Conv3d_1a_7x7.conv3d.weight", "Mixed_3b.b1a.bn.running_mean", "logits.conv3d.bias"} <= names
    assert len(names) == 344 and sum(p.numel() for p in network.parameters()) == 12_697_264
    padded = metrics.same_pad(torch.ones(1, 1, 17, 224, 224), (7, 7, 7), (2, 2, 2))
    assert padded.shape[2:] == (23, 229, 229)                                      # 3 + 3, and 2 + 3
    assert padded[0, 0, 10, 2, 2] == 1 and padded[0, 0, 10, 1, 2] == 0 and padded[0, 0, 10, 225, 2] == 1


@pytest.mark.slow
@pytest.mark.parametrize("eps, same", [(1e-5, True), (1e-3, False)])
def test_i3d_computes_what_an_independent_port_computed(eps, same):    # cd-fvd 0.1.1, whose eps is 1e-5
    clips = torch.rand(1, 3, 10, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = torch.tensor([1.4052, 2.8500, -6.6350, 3.9117, 3.9041])
    assert torch.allclose(randomised(metrics.I3D(eps))(clips)[0, :5], expected, atol=1e-3) == same


@pytest.mark.slow
def test_i3d_sees_every_frame_and_refuses_short_clips():
    clips = torch.randint(0, 256, (1, 3, 9, 32, 40), generator=torch.Generator().manual_seed(0)).byte()
    inputs = metrics.i3d_input(clips)
    resized = F.interpolate(clips[:, :, 4].float(), (224, 224), mode="bilinear")
    assert torch.allclose(inputs[:, :, 4], resized / 127.5 - 1, atol=1e-6)
    changed = inputs.index_fill(2, torch.tensor(8), 0)
    network = randomised(metrics.I3D())
    assert not torch.equal(network(inputs), network(changed))
    refused("9 frames", network, inputs[:, :, :8])
    for bad in (clips.float(), clips.transpose(1, 2), clips[:, :, 0]):
        refused("clips", metrics.i3d_input, bad)


@pytest.mark.slow
def test_random_weights_depend_on_the_seed_alone():
    first, second, other = [metrics.randomise(metrics.LPIPS("alex"), seed) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.features[0].weight, other.features[0].weight)


# ---- sets --------------------------------------------------------------------------------------------------

def features_of(count, dim, seed, shift=0.0):
    """Correlated, non-negative features (count, dim) in float32, as Inception's are."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim ** 0.5
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift
    return (x @ mix + 0.3).relu()


def moments_of(x):
    """Mean and covariance of x (N, D), fed to `metrics.Moments` in uneven batches."""
    moments = metrics.Moments(x.shape[1])
    for batch in x.split(37):
        moments.add(batch)
    return moments.mean_and_covariance()


def frechet(x, y):
    return metrics.frechet_distance(*moments_of(x), *moments_of(y))


def test_streaming_moments_equal_numpy_cov():
    x = features_of(500, 24, 1) + 20                                   # a large mean: float32 sums would fail
    mean, covariance = moments_of(x)
    assert np.abs(mean - x.double().mean(0).numpy()).max() < 1e-12
    # A difference of second moments of 430, whose last bit is 6e-14 (1.4e-12 was seen), in float32 3e-5.
    assert np.abs(covariance - np.cov(x.double().numpy().T)).max() < 1e-11
    refused("two images", moments_of, x[:1])


@pytest.mark.parametrize("n1, n2, tolerance", [(900, 700, 1e-8), (40, 30, 1e-4), (900, 30, 1e-4)])
def test_the_frechet_distance_is_that_of_scipys_sqrtm(n1, n2, tolerance):
    x, y = features_of(n1, 64, 1), features_of(n2, 64, 2, shift=0.1)   # 40 of 64 features: singular
    (m1, s1), (m2, s2) = moments_of(x), moments_of(y)
    root = scipy.linalg.sqrtm(s1 @ s2).real                            # as pytorch-fid does
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root)
    assert frechet(x, y) == pytest.approx(expected, rel=tolerance)
    assert frechet(y, x) == pytest.approx(frechet(x, y), rel=1e-10)


def test_the_official_float32_distance_is_near_the_exact_one():
    x, y = features_of(300, 16, 1), features_of(300, 16, 2, shift=0.2)
    assert metrics.frechet_distance_official(x, y) == pytest.approx(frechet(x, y), rel=1e-2)


@pytest.mark.parametrize("count", [5, 40, 900])
@pytest.mark.parametrize("mean", [0, 20])                              # 20: rounding errors of a large mean
def test_the_frechet_distance_of_a_set_to_itself_is_zero(count, mean):
    x = features_of(count, 64, 1) + mean
    assert 0 <= frechet(x, x) < 1e-10                                  # and never prints as -0.000
    assert 0 <= frechet(x, x.flip(0)) < 1e-10 * (1 + mean ** 2)


def test_the_frechet_distance_refuses_other_features_and_damage():
    x, y = [moments_of(features_of(50, dim, 1)) for dim in (8, 9)]
    refused("8 and 9 features", metrics.frechet_distance, *x, *y)
    refused("negative eigenvalues", metrics.frechet_distance, x[0], -x[1], x[0], -x[1])


@pytest.mark.parametrize("n1, n2", [(300, 300), (1300, 1100)])         # one whole set; subsets of 1,000
def test_kid_is_torch_fidelitys(n1, n2):
    real, fake = features_of(n1, 16, 1).double(), features_of(n2, 16, 2, shift=0.2).double()
    size = min(1000, n1, n2)
    theirs = kid_features_to_metric(fake, real, kid_subset_size=size, kid_subsets=5, verbose=False)
    expected = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert metrics.kid(real, fake, subsets=5) == pytest.approx(expected, rel=1e-10, abs=1e-14)
    assert expected[0] > 0.01 and (size < 1000 or expected[1] > 1e-5)


def test_mind_is_the_mean_of_optimal_transport_over_directions():
    real, fake = features_of(80, 6, 1), features_of(80, 6, 2, shift=0.3)
    generator = torch.Generator().manual_seed(2020)                    # torch-fidelity's, as for its KID
    directions = torch.randn(1000, 6, generator=generator).double().numpy()
    costs = []
    for u in directions / np.linalg.norm(directions, axis=1, keepdims=True):
        a, b = real.double().numpy() @ u, fake.double().numpy() @ u
        rows, columns = scipy.optimize.linear_sum_assignment((a[:, None] - b) ** 2)      # without sorting
        costs.append(((a[rows] - b[columns]) ** 2).mean())
    assert metrics.mind(real, fake) == pytest.approx(3 * 6 * np.mean(costs), rel=1e-5)
    assert metrics.mind(real, real.flip(0)) == pytest.approx(0, abs=1e-10)


def test_mind_of_a_shift_is_three_times_its_square_and_larger_sets_are_cut():
    x = features_of(500, 64, 1)
    shift = torch.randn(64, generator=torch.Generator().manual_seed(3))
    assert metrics.mind(x, x + shift) == pytest.approx(3 * float(shift.square().sum()), rel=0.1)
    other = features_of(900, 64, 2)
    chosen = torch.randperm(900, generator=torch.Generator().manual_seed(2020))[:500]
    assert metrics.mind(other, x) == pytest.approx(metrics.mind(other[chosen], x), rel=0.05)


@pytest.mark.parametrize("equal_parts", [True, False])
def test_the_inception_score_is_torch_fidelitys(equal_parts):
    logits = torch.randn(600, 1008, generator=torch.Generator().manual_seed(0)) * 3
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"], 4)
    assert metrics.inception_score(logits, equal_parts, 150) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [200, 400, 2000])
def test_one_image_more_does_not_change_the_inception_score_but_adms(count):
    logits = torch.randn(count + 1, 50, generator=torch.Generator().manual_seed(0)) * 3
    exact, more, less = [metrics.inception_score(logits[:count + change], size=200) for change in (0, 1, -1)]
    assert exact[2] == more[2] == less[2] == count / 200
    assert (more[0], less[0]) == (pytest.approx(exact[0], rel=5e-3),) * 2
    assert metrics.inception_score(logits[:count], False, 200) == exact
    assert [metrics.inception_score(torch.zeros(50_001, 2)[:n], parts)[2] for n in (5_001, 50_000, 50_001)
            for parts in (True, False)] == [1, 2, 10, 10, 10, 11]      # of 5,000 by default
    quirk = (count / 200 * exact[0] + 1) / (count / 200 + 1)           # the last block, one image, scores 1
    assert metrics.inception_score(logits, False, 200)[0] == pytest.approx(quirk)


def test_the_inception_score_counts_classes_and_falls_when_sorted():
    logits = torch.eye(10).repeat_interleave(20, 0) * 1000.0           # no 0 * -inf
    assert metrics.inception_score(logits)[0] == pytest.approx(10)
    assert metrics.inception_score(logits, size=40)[0] == pytest.approx(2)
    shuffled = logits.view(10, 20, 10).transpose(0, 1).reshape(200, 10)
    assert metrics.inception_score(shuffled, size=40)[0] == pytest.approx(10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_is_an_error_that_says_where_it_is(bad, which):
    sets = [features_of(50, 16, 1), features_of(60, 16, 2)]
    statistics = [*moments_of(sets[0]), *moments_of(sets[1])]
    sets[which][7, 3] = bad
    where = rf"features of set {which + 1} are not finite, first at \[\[7, 3\]\]"
    for metric in (metrics.kid, metrics.mind, metrics.precision_recall, metrics.frechet_distance_official):
        refused(where, metric, *sets)
    refused(where.replace(f"set {which + 1}", "set 1"), metrics.inception_score, sets[which])
    refused(f"features of set {which + 1}", frechet, *sets)
    for place in (2 * which, 2 * which + 1):               # a mean, a covariance
        damaged = [array.copy() for array in statistics]
        damaged[place].flat[5] = bad
        refused(f"features of set {which + 1}", metrics.frechet_distance, *damaged)


def test_pixels_and_networks_pass_a_nan_on():
    x = torch.zeros(2, 3, 64, 64)
    x[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        assert metrics.LPIPS("alex")(x, torch.zeros_like(x)).isnan().tolist() == [False, True]
    assert metrics.inception_input(x, "half-pixel").isnan().flatten(1).any(1).tolist() == [False, True]
    assert np.isnan(metrics.total_variation(torch.zeros(4), torch.ones(4)))            # no token at all
    assert np.isnan(metrics.codebook_usage(torch.zeros(4))["perplexity"])


@pytest.mark.parametrize("rows", [64, 10_000])
def test_precision_and_recall_are_prdcs_and_torch_fidelitys(rows):
    real, fake = features_of(300, 16, 1), features_of(400, 16, 2, shift=0.3)
    ours = metrics.precision_recall(real, fake, rows=rows)
    prdcs = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=3)
    fidelitys = prc_features_to_metric(fake, real, prc_neighborhood=3, save_cpu_ram=False, verbose=False)
    for theirs in (prdcs, fidelitys):
        assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-5)
    assert all(0.2 < value < 0.98 for value in ours)                   # a case that can tell right from wrong


def test_a_set_has_precision_and_recall_one_with_itself():
    real = features_of(50, 16, 1)
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    refused("more than 3 images", metrics.precision_recall, real, real[:3])
    for metric in (metrics.precision_recall, metrics.kid, metrics.mind, metrics.frechet_distance_official):
        refused("cannot be compared", metric, real, real[:, :8])


def test_float16_precision_and_recall_are_close_unless_it_overflows():
    real, fake = features_of(300, 16, 1), features_of(400, 16, 2, shift=0.3)
    for scale, tolerance in ((1, 0.02), (1000, 0)):
        full, half = [metrics.precision_recall(real * scale, fake * scale, half=how) for how in (False, True)]
        assert np.abs(np.subtract(full, half)).max() <= tolerance
