"""The metrics' mathematics and networks against independent packages, with shared (random) weights."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import runtime
import train_tokenizer


def pictures(count, height, width, seed=0):
    """uint8 pictures (count, 3, height, width): smooth, noisy, and one that is almost flat and bright."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    images = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    images += torch.randn(images.shape, generator=generator) * 6
    images[0] = 250 + (torch.rand(3, height, width, generator=generator) < 0.02)
    return images.round().clamp(0, 255).to(torch.uint8)


def pair(count=3, height=40, width=53):
    """Pictures and noisy versions of them."""
    reference = pictures(count, height, width)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(9)) * 12
    return reference, (reference.float() + noise).round().clamp(0, 255).to(torch.uint8)


def randomised(network, seed=0):
    """`network` in eval mode with random weights and BatchNorm statistics, so that each of them matters."""
    evaluate.randomise(network, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A random FID Inception, and the path of a file with its weights."""
    network = randomised(evaluate.FIDInception())
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return network, path


# ------------------------------------------------------------------------------------------------------------
# Pixels and codes
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol, dtype, tolerance", [("clean", np.float64, 1e-6), ("seed", np.float32, 0)])
def test_psnr_and_ssim_are_those_of_scikit_image_and_seed_is_bit_exact(protocol, dtype, tolerance):
    skimage = pytest.importorskip("skimage.metrics")
    reference, images = pair()
    a, b = [x.permute(0, 2, 3, 1).numpy().astype(dtype) / dtype(255) for x in (reference, images)]
    ssim = [skimage.structural_similarity(y, x, data_range=1.0, channel_axis=-1) for x, y in zip(a, b)]
    psnr = [skimage.peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b)]
    assert np.abs(evaluate.ssim(reference, images, protocol).numpy() - ssim).max() <= tolerance
    assert np.abs(evaluate.psnr(reference, images, protocol).numpy() - psnr).max() <= 1e-9


def test_ssim_of_a_large_batch_is_that_of_its_pictures_one_by_one():
    reference, images = pair(7, 130, 140)                    # more than one chunk
    singles = [evaluate.ssim(x[None], y[None]) for x, y in zip(reference, images)]
    assert torch.equal(evaluate.ssim(reference, images), torch.cat(singles))


def test_a_picture_compared_with_itself_has_infinite_psnr_and_ssim_one():
    reference, _ = pair()
    for protocol in ("clean", "seed"):
        assert torch.isinf(evaluate.psnr(reference, reference, protocol)).all()
        assert evaluate.ssim(reference, reference, protocol).tolist() == pytest.approx([1, 1, 1])


def test_protocol_seed_darkens_exactly_the_levels_1_to_95_of_an_original_and_clean_none():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = evaluate.data.to_float(levels)
    changed = levels[evaluate.to_pixels(floats, "seed") != levels]
    assert changed.tolist() == list(range(1, 96))
    assert (levels.int() - evaluate.to_pixels(floats, "seed").int()).max() == 1
    assert torch.equal(evaluate.to_pixels(floats, "clean"), levels)


def test_pixel_metrics_refuse_other_dtypes_shapes_and_sizes():
    reference, images = pair()
    for bad, what in ((images.float(), "float32"), (images[:, :2], "2"), (images[..., :-1], "compared"),
                      (images.permute(0, 2, 3, 1), "40")):
        for metric in (evaluate.psnr, evaluate.ssim):
            with pytest.raises(runtime.UserError, match=what):
                metric(reference, bad)
    with pytest.raises(runtime.UserError, match="7 x 7"):
        evaluate.ssim(reference[..., :6], images[..., :6])


def test_codebook_metrics_of_known_distributions():
    uniform = evaluate.codebook_metrics(torch.full((64,), 5), 6, pixels=64 * 5 * 16)
    assert uniform == {"usage": 1.0, "perplexity": pytest.approx(64), "bits_per_pixel": pytest.approx(6 / 16)}
    counts = torch.tensor([0, 3, 1, 0])
    skewed = evaluate.codebook_metrics(counts, 2, pixels=8)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert skewed == {"usage": 0.5, "perplexity": pytest.approx(math.exp(entropy)), "bits_per_pixel": 1.0}


def test_the_seed_average_overweights_a_short_last_batch_and_the_clean_one_does_not():
    values = torch.tensor([1.0, 2, 3, 4, 10])
    assert evaluate.average(values) == 4.0
    assert evaluate.average(values, batch=4) == (2.5 + 10) / 2
    assert evaluate.average(values[:4], batch=4) == 2.5


# ------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------

def test_the_tf1_resize_is_that_of_torch_fidelity_exactly():
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    for shape in ((2, 3, 32, 32), (1, 3, 256, 256), (1, 3, 500, 301)):
        x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).float()
        expected = module.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
        assert torch.equal(evaluate.resize_tf1(x), expected)


def test_inception_features_are_those_of_pytorch_fid_exactly(inception, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    network, _ = inception
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: network.state_dict())
    theirs = module.InceptionV3([3], use_fid_inception=True).eval()
    images = pictures(2, 64, 80)
    with torch.no_grad():
        expected = theirs(images.float() / 255)[0].flatten(1)
    features, _, _ = network(evaluate.inception_input(images, "half-pixel"))
    assert torch.equal(features, expected) and features.std() > 0.1


def test_inception_features_and_logits_are_those_of_torch_fidelity_with_the_tf1_rule(inception):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network, path = inception
    theirs = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                feature_extractor_weights_path=str(path)).eval()
    images = pictures(2, 64, 80)
    with torch.no_grad():
        expected, expected_logits = theirs(images)
    features, _, logits = network(evaluate.inception_input(images, "tf1"))
    assert (features - expected).abs().max() <= 1e-5
    assert (logits - expected_logits).abs().max() <= 1e-5 * expected_logits.abs().max()


def test_spatial_features_are_the_first_seven_channels_of_mixed_6d_in_nhwc_order(inception):
    network, _ = inception
    seen = []
    branch = network.Mixed_6d.branch1x1
    handle = branch.register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, spatial, _ = network(evaluate.inception_input(pictures(1, 40, 40), "tf1"))
    handle.remove()
    assert spatial.shape == (1, 17 * 17 * 7)
    assert torch.equal(spatial.view(1, 17, 17, 7), seen[0].movedim(1, -1)[..., :7])


def test_the_resize_rules_differ_so_that_mixing_them_would_be_noticed():
    images = pictures(2, 64, 64, seed=3)[1:]                           # the first one is flat
    half_pixel, tf1 = [evaluate.inception_input(images, rule) for rule in ("half-pixel", "tf1")]
    assert (half_pixel - tf1).abs().max() > 0.05
    large = pictures(2, 640, 400, seed=4)[1:]
    shrunk, aliased = [evaluate.inception_input(large, r) for r in ("half-pixel-antialiased", "half-pixel")]
    assert shrunk.std() < aliased.std()                                # antialiasing removes the pixel noise
    with pytest.raises(runtime.UserError, match="uint8"):
        evaluate.inception_input(images.float(), "tf1")


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_is_that_of_the_lpips_package_with_its_real_linear_heads(net):
    package = pytest.importorskip("lpips")
    theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False).eval()          # random trunk, real heads
    ours = train_tokenizer.LPIPS(net)
    trunk = {}
    for name, tensor in theirs.net.state_dict().items():                       # slice3.8.weight -> 8.weight
        trunk[f"features.{name.split('.', 1)[1]}"] = tensor
    heads = {f"heads.{i}": getattr(theirs, f"lin{i}").model[1].weight for i in range(5)}
    assert all((head >= 0).all() for head in heads.values())
    runtime.load_state_strictly(ours, {**trunk, **heads}, "lpips")
    x, y = [evaluate.data.to_float(images) for images in pair(2, 64, 80)]
    with torch.no_grad():
        expected = theirs(x, y).flatten()
        assert (ours(x, y) - expected).abs().max() <= 1e-6 and expected.min() > 1e-3
        assert ours(x, x).abs().max() == 0


def test_i3d_has_the_published_parameters_and_pads_like_tensorflow():
    network = evaluate.I3D()
    assert sum(p.numel() for p in network.parameters()) == 12_697_264
    assert len(network.state_dict()) == 344
    assert {"Conv3d_1a_7x7.conv3d.weight", "Mixed_3b.b1a.bn.running_mean", "logits.conv3d.bias"} <= set(
        network.state_dict())
    padded = evaluate.same_pad(torch.ones(1, 1, 17, 224, 224), (7, 7, 7), (2, 2, 2))
    assert padded.shape[2:] == (23, 229, 229)                                      # 3 + 3, and 2 + 3
    assert padded[0, 0, 10, 2, 2] == 1 and padded[0, 0, 10, 1, 2] == 0 and padded[0, 0, 10, 225, 2] == 1


def test_i3d_is_the_network_of_an_independent_port():
    module = pytest.importorskip("cdfvd.third_party.i3d.pytorch_i3d")
    ours, theirs = randomised(evaluate.I3D(eps=1e-5)), module.InceptionI3d(400, in_channels=3).eval()
    theirs.load_state_dict(ours.state_dict())
    clips = torch.rand(1, 3, 10, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(ours(clips), theirs(clips), atol=1e-5)


def test_i3d_sees_every_frame_and_refuses_clips_that_are_too_short():
    network = randomised(evaluate.I3D())
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (1, 9, 3, 32, 40), dtype=torch.uint8, generator=generator)
    inputs = evaluate.i3d_input(clips)
    assert inputs.shape == (1, 3, 9, 224, 224) and -1 <= inputs.min() and inputs.max() <= 1
    changed = inputs.clone()
    changed[:, :, 8] = 0
    logits = network(inputs)
    assert logits.shape == (1, 400) and not torch.equal(logits, network(changed))
    with pytest.raises(runtime.UserError, match="9 frames"):
        network(inputs[:, :, :8])


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = evaluate.randomise(train_tokenizer.LPIPS("alex")).state_dict()
    torch.manual_seed(2)
    second = evaluate.randomise(train_tokenizer.LPIPS("alex")).state_dict()
    other = evaluate.randomise(train_tokenizer.LPIPS("alex"), seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


# ------------------------------------------------------------------------------------------------------------
# Statistics and distances
# ------------------------------------------------------------------------------------------------------------

def features(count, dim, seed, shift=0.0):
    """Correlated, non-negative features (count, dim) in float32, as Inception's are."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim ** 0.5
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift
    return (x @ mix + 0.3).relu()


def moments_of(x):
    """`evaluate.Moments` of x (N, D), fed in uneven batches."""
    moments = evaluate.Moments(x.shape[1])
    for batch in x.split(37):
        moments.add(batch)
    return moments


def test_streaming_moments_equal_numpy_cov():
    x = features(500, 24, 1) + 20                                      # a large mean: float32 sums would fail
    mean, covariance = moments_of(x).mean_and_covariance()
    assert np.abs(mean - x.double().numpy().mean(0)).max() < 1e-12
    # A difference of second moments of 430: their last bit is 6e-14, and a sum of 500 of them ends in other
    # bits in another order of addition (1.4e-12 was seen). In float32 the last bit is 3e-5.
    assert np.abs(covariance - np.cov(x.double().numpy(), rowvar=False)).max() < 1e-11
    with pytest.raises(runtime.UserError, match="two pictures"):
        moments_of(x[:1]).mean_and_covariance()


def frechet_by_sqrtm(x, y):
    """The textbook formula with scipy's general matrix square root."""
    linalg = pytest.importorskip("scipy.linalg")
    x, y = x.double().numpy(), y.double().numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(s1 @ s2).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root)


def frechet(x, y):
    """`evaluate.frechet_distance` of two sets of features."""
    statistics = [*moments_of(x).mean_and_covariance(), *moments_of(y).mean_and_covariance()]
    return evaluate.frechet_distance(*statistics, len(x), len(y))


def test_the_frechet_distance_equals_scipys_sqrtm():
    x, y = features(900, 64, 1), features(700, 64, 2, shift=0.1)
    assert frechet(x, y) == pytest.approx(frechet_by_sqrtm(x, y), rel=1e-8)
    assert frechet(y, x) == pytest.approx(frechet(x, y), rel=1e-10)


def test_the_frechet_distance_of_few_pictures_equals_scipys_sqrtm():
    x, y = features(40, 64, 1), features(30, 64, 2, shift=0.1)         # singular covariances
    assert frechet(x, y) == pytest.approx(frechet_by_sqrtm(x, y), rel=1e-4)


@pytest.mark.parametrize("count", [5, 40, 900])
def test_the_frechet_distance_of_a_set_to_itself_is_zero(count):
    x = features(count, 64, 1)
    assert abs(frechet(x, x)) < 1e-10
    assert abs(frechet(x, x.flip(0))) < 1e-10


def test_the_frechet_distance_refuses_different_features_and_damaged_statistics():
    x, y = [moments_of(features(50, dim, 1)).mean_and_covariance() for dim in (8, 9)]
    with pytest.raises(runtime.UserError, match="8 and 9 features"):
        evaluate.frechet_distance(*x, *y)
    with pytest.raises(runtime.UserError, match="negative eigenvalues"):
        evaluate.frechet_distance(x[0], -x[1], x[0], -x[1])


def test_the_official_float32_video_distance_is_near_the_exact_one():
    x, y = features(300, 16, 1), features(300, 16, 2, shift=0.2)
    assert evaluate.frechet_distance_float32(x, y) == pytest.approx(frechet(x, y), rel=1e-2)


def test_the_inception_score_is_that_of_torch_fidelity():
    module = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.randn(600, 1008, generator=torch.Generator().manual_seed(0)) * 3
    theirs = module.isc_features_to_metric(logits, splits=4, shuffle=False)
    mean, deviation, blocks = evaluate.inception_score(logits, split_size=150)
    assert blocks == 4
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-5)


def test_the_inception_score_of_certain_predictions_is_their_number_and_falls_when_sorted():
    logits = torch.eye(10).repeat_interleave(20, 0) * 1000.0           # no 0 * -inf
    assert evaluate.inception_score(logits)[0] == pytest.approx(10)
    assert evaluate.inception_score(logits, split_size=40)[0] == pytest.approx(2)
    shuffled = logits[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert evaluate.inception_score(shuffled, split_size=40)[0] > 8


@pytest.mark.parametrize("rows", [64, 10_000])
def test_precision_and_recall_are_those_of_prdc_and_torch_fidelity(rows):
    prdc, module = pytest.importorskip("prdc"), pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = features(300, 16, 1), features(400, 16, 2, shift=0.3)
    precision, recall = evaluate.precision_recall(real, fake, rows=rows)
    theirs = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=3)
    assert (precision, recall) == (pytest.approx(theirs["precision"], abs=1e-5),
                                   pytest.approx(theirs["recall"], abs=1e-5))
    theirs = module.prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=100,
                                           save_cpu_ram=False, verbose=False)
    assert (precision, recall) == (pytest.approx(theirs["precision"], abs=1e-5),
                                   pytest.approx(theirs["recall"], abs=1e-5))
    assert 0.2 < recall < 0.98 and 0.2 < precision < 0.98              # a case that can tell right from wrong


def test_precision_and_recall_in_float16_are_close_and_fall_back_where_it_overflows():
    real, fake = features(300, 16, 1), features(400, 16, 2, shift=0.3)
    full, half = evaluate.precision_recall(real, fake), evaluate.precision_recall(real, fake, half=True)
    assert np.abs(np.subtract(full, half)).max() < 0.02
    huge = [x * 1000 for x in (real, fake)]
    assert evaluate.precision_recall(*huge, half=True) == evaluate.precision_recall(*huge)


def test_precision_and_recall_of_a_set_with_itself_are_one_and_need_more_pictures_than_neighbours():
    real = features(50, 16, 1)
    assert evaluate.precision_recall(real, real) == (1.0, 1.0)
    with pytest.raises(runtime.UserError, match="more than 3 pictures"):
        evaluate.precision_recall(real, real[:3])
    with pytest.raises(runtime.UserError, match="cannot be compared"):
        evaluate.precision_recall(real, real[:, :8])
