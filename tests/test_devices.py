"""No tensor is made on the wrong device: fake tensors on a GPU, which need none, refuse to meet a CPU's.

Forward passes and losses; the backward pass asks for a real GPU.
"""
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ar_model
import metrics
import tokenizer
import train_tokenizer
import video

CLIPS = dataclasses.replace(video.PRESETS["toy-video"], resolution=16)


@pytest.mark.parametrize("changes", [
    {}, {"groups": 2}, {"upsampler": "nearest", "downsampler": "average", "adaptive_norm": False},
    *[{"quantizer": name} for name in tokenizer.QUANTIZERS if name != "lfq"], CLIPS], ids=str)
def test_a_step_of_stage_one_stays_on_the_gpu(changes):
    with FakeTensorMode():
        with torch.device("cuda"):
            if changes is CLIPS:
                model = video.VideoTokenizer(CLIPS)
                critic = train_tokenizer.PatchGAN3D()
                x = torch.rand(2, 3, 17, 16, 16)
            else:
                model = tokenizer.Tokenizer(dataclasses.replace(tokenizer.PRESETS["toy"], **changes))
                critic = train_tokenizer.BlurPoolDiscriminator()
                x = torch.rand(2, 3, 32, 32)
            perceptual = metrics.LPIPS("alex")
            lecam = torch.zeros(2)
        x_hat, z, q, _ = model(x)
        terms, report = model.quantizer.losses(z, q, 0.1, 0.0, None, "groups")
        loss = sum(terms.values()) + train_tokenizer.non_saturating_loss(critic(x_hat))
        if changes is not CLIPS:
            loss = loss + perceptual(torch.nn.functional.interpolate(x, (64, 64)),
                                     torch.nn.functional.interpolate(x_hat, (64, 64))).mean()
        real, fake = critic(x), critic(x_hat.detach())
        lecam = train_tokenizer.update_lecam(lecam, real, fake)
        judged = train_tokenizer.hinge_loss(real, fake) + train_tokenizer.lecam_loss(lecam, real, fake)
        assert all(tensor.is_cuda for tensor in (x_hat, z, q, lecam, loss, judged, *report.values()))


@pytest.mark.parametrize("changes", [{}, {"separate_heads": True}, {"bits": (4, 3, 3)}], ids=str)
def test_a_step_of_stage_two_stays_on_the_gpu(changes):
    config = dataclasses.replace(ar_model.PRESETS["toy"], **changes)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = ar_model.ARModel(config)
            ids = torch.zeros(2, config.tokens, dtype=torch.long)
            labels = torch.zeros(2, dtype=torch.long)
        loss, terms = model(ar_model.ids_to_subtokens(ids, config.bits), labels, return_loss=True)
        assert loss.is_cuda and terms.is_cuda


@pytest.mark.slow
def test_the_networks_of_the_metrics_stay_on_the_gpu():
    with FakeTensorMode():
        with torch.device("cuda"):
            inception, i3d = metrics.FIDInception().eval(), metrics.I3D().eval()
            images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
            clips = torch.zeros(1, 3, 9, 64, 64, dtype=torch.uint8)
        for rule in ("tf1", "half-pixel", "half-pixel-antialiased"):
            assert all(output.is_cuda for output in inception(metrics.inception_input(images, rule)))
        assert i3d(metrics.i3d_input(clips)).is_cuda
        assert metrics.psnr(images, images).is_cuda and metrics.ssim(images, images).is_cuda
