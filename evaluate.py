"""Every metric and every table of the paper: how faithful is a tokenizer, how good are generated pictures?

A number without its protocol is no result. Most disputes over "your FID" are about the resize rule, the
reference set, the rounding or the number of pictures, so all of these are printed beside each number and
stored in a JSON, with the sha256 of the checkpoint and of the networks. Two protocols, wherever the official
scripts have a quirk:

    clean   what one would do today: pixels rounded to uint8 as an image file holds them, means over pictures
    seed    what produced the published numbers, quirks included (SEED-Voken's scripts, hence the name)

In reading order: 1. pixel metrics and codebook usage; 2. the networks behind the other metrics and the rules
by which pictures are resized for them; 3. statistics and distances of feature distributions (FID, sFID, FVD,
IS, precision and recall); 4. the loops that measure; 5. the paper's tables; 6. commands.

    python evaluate.py                                       # what the earlier stages left in runs/
    python evaluate.py reconstruction --ckpt imagenet_256_L.ckpt --data-path imagenet --metrics all
    python evaluate.py reconstruction --ckpt pretrain256_262144.ckpt --data-path coco --original-resolution
    python evaluate.py make-reference --data-path imagenet --split train --image-size 256
    python evaluate.py generation --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py generation --ckpt AR_256_B.ckpt --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py video --ckpt video_128_262144.ckpt --data-path ucf101 --metrics all --protocol seed
    python evaluate.py video-generation --samples clips.npz --data-path ucf101
    python evaluate.py table 4 --imagenet imagenet --download

Any of them under torchrun (`torchrun --nproc-per-node 8 evaluate.py ...`) shards the pictures over the ranks,
without padding or repetition, and gives the same numbers. Metrics of the image networks need a download;
where there is no connection, --allow-random-weights tries the machinery out and marks what it prints as not
comparable.

Axis letters: B pictures (or clips of T frames) of a batch, N of a set, H W their size, h w that of the code
map, D features.
"""
import datetime
import hashlib
import json
import math
import os
import pathlib
import struct
import sys
import time
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm

import ar_model
import data
import runtime
import sample
import tokenizer
import train_tokenizer
import video
from runtime import require

# ------------------------------------------------------------------------------------------------------------
# 1. Pixel metrics and codebook usage: what one picture and its reconstruction, or one bag of tokens, can tell
# ------------------------------------------------------------------------------------------------------------


def to_pixels(images, protocol):
    """Float pictures in [-1, 1], any shape, to the uint8 pixels that PSNR and SSIM compare.

    clean: rounded, as an image file would hold them. seed: truncated, like the official scripts. Those also
    send the ORIGINAL through this line. In float32 its levels 1 to 95 come back as 0.9999.. of themselves, so
    that the "ground truth" is a level too dark in the shadows. This costs up to 0.04 dB, and it takes the
    same mistake to meet the published PSNR.
    """
    if protocol == "seed":
        return ((images.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
    return runtime.to_uint8(images)


def unit_range(images):
    """uint8 to float32 k / 255 in [0, 1].

    The divisor is a tensor: a GPU would turn a plain number into a product with its inverse, one bit off.
    """
    return images.float() / torch.full((), 255.0, device=images.device)


def check_pair(reference, images):
    """Raise `UserError` unless both are uint8 (B, 3, H, W) of the same shape."""
    for pictures in (reference, images):
        require(pictures.dtype == torch.uint8 and pictures.dim() == 4 and pictures.shape[1] == 3,
                f"pixel metrics compare uint8 pictures (B, 3, H, W), not {str(pictures.dtype)[6:]} "
                f"{list(pictures.shape)}")
    require(reference.shape == images.shape,
            f"pictures of {list(images.shape)} cannot be compared with pictures of {list(reference.shape)}")


def psnr(reference, images, protocol="clean"):
    """Peak signal-to-noise ratio in dB of uint8 pictures (B, 3, H, W) against `reference`: (B,), float64.

    Sees: the mean squared error of a picture, on a log scale; 6 dB more are half the distance.
    Misses: structure. A blurred lawn beats a crisp one whose blades are shifted by a pixel, so a tokenizer
    trained without a GAN wins here and looks worse.
    Trap: average the dB of pictures, not their errors, or a few hard pictures decide. And a picture that
    comes back exactly has infinite PSNR, which makes the mean infinite: that is a hint of comparing a file
    with itself.
    """
    check_pair(reference, images)
    if protocol == "seed":                                             # scikit-image's roundings on float32
        error = (unit_range(reference) - unit_range(images)).square().double() * 255 ** 2
    else:
        error = (reference.int() - images.int()).square().double()     # exact
    return 10 * (255 ** 2 / error.mean((1, 2, 3))).log10()


def window_sums(x, dim):
    """Sums over windows of 7 along `dim`, which shrinks by 6. As 4 + 2 + 1 they take four additions."""
    n = x.shape[dim]
    twos = x.narrow(dim, 0, n - 1) + x.narrow(dim, 1, n - 1)
    fours = twos.narrow(dim, 0, n - 3) + twos.narrow(dim, 2, n - 3)
    return fours.narrow(dim, 0, n - 6) + twos.narrow(dim, 4, n - 6) + x.narrow(dim, 6, n - 6)


def ssim(reference, images, protocol="clean"):
    """Structural similarity (Wang et al., 2004) of uint8 pictures (B, 3, H, W) to `reference`: (B,), float64.

    scikit-image's version, as in the paper: uniform 7 x 7 windows, unbiased variances, colour channels one by
    one.
    Sees: in each window, whether brightness, contrast and pattern agree. Misses: what lies outside the
    window, and colour as such. Trap: there are many SSIMs. An 11 x 11 Gaussian window (torchmetrics, piq), or
    data_range=2 for pictures in [0, 1] (LlamaGen: 0.675 for what is 0.54 here) gives other numbers.
    """
    check_pair(reference, images)
    require(min(images.shape[2:]) >= 7, f"SSIM needs pictures of 7 x 7 or more, not {list(images.shape[2:])}")
    one_chunk = ssim_float32 if protocol == "seed" else ssim_exact
    # A few pictures at a time keep the intermediate maps in a CPU's cache, which doubles the speed.
    size = max(1, 2 ** (18 if images.device.type == "cpu" else 24) // images[0].numel())
    return torch.cat([one_chunk(x, y) for x, y in zip(reference.split(size), images.split(size))])


def ssim_exact(x, y):
    """SSIM of uint8 (B, 3, H, W): (B,). In integers, E[x^2] - E[x]^2 loses no digits."""
    x, y = x.int(), y.int()
    sums = torch.stack((x, y, x * x + y * y, x * y))                   # (4, B, 3, H, W)
    sum_x, sum_y, sum_squares, sum_xy = window_sums(window_sums(sums, -1), -2)     # (B, 3, H - 6, W - 6) each
    product, squares = sum_x * sum_y, sum_x * sum_x + sum_y * sum_y
    covariance, variances = 49 * sum_xy - product, 49 * sum_squares - squares     # times 49 * 48, exact int32
    c1, c2 = (0.01 * 255 * 49) ** 2, (0.03 * 255) ** 2 * 49 * 48
    similarity = (2 * product.float() + c1) * (2 * covariance.float() + c2) / (
        (squares.float() + c1) * (variances.float() + c2))
    return similarity.mean((1, 2, 3), dtype=torch.float64)


def ssim_float32(x, y):
    """SSIM of uint8 (B, 3, H, W): (B,), with scikit-image's roundings of float32 pictures, bit for bit."""
    def box_mean(image):                                               # scipy adds in float64, keeps float32
        for dim in (-2, -1):
            image = (window_sums(image.double(), dim) / 7).float()
        return image

    x, y = unit_range(x), unit_range(y)
    mean_x, mean_y = box_mean(x), box_mean(y)
    var_x = 49 / 48 * (box_mean(x * x) - mean_x * mean_x)
    var_y = 49 / 48 * (box_mean(y * y) - mean_y * mean_y)
    covariance = 49 / 48 * (box_mean(x * y) - mean_x * mean_y)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / (
        (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2))
    return similarity.mean((2, 3), dtype=torch.float64).float().mean(1).double()


def codebook_metrics(counts, bits, pixels):
    """How well the codes are used. counts (V,): how often each occurred; pixels: how many they stand for.

    usage: the part of the codebook that occurred at all. Sees dead codes, but a code used once counts as much
    as one used a million times. Trap: it grows with the number of pictures. 2^18 codes need all 50,000 of
    ImageNet val to reach 100 %.
    perplexity: 2^entropy of the code frequencies: the evenly used codebook of this size would carry as much.
    bits per pixel: what storing ids takes. (Coded by frequency, an id takes log2(perplexity) bits.)
    """
    counts = counts.double()
    p = counts[counts > 0] / counts.sum()
    return {"usage": float((counts > 0).double().mean()), "perplexity": float(2 ** -(p * p.log2()).sum()),
            "bits_per_pixel": float(bits * counts.sum() / pixels)}


# ------------------------------------------------------------------------------------------------------------
# 2. Networks: "similar" as a classifier sees it. Verified weights, eval mode, fp32 without TF32 or autocast
# ------------------------------------------------------------------------------------------------------------

INCEPTION_FILE = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
I3D_FILE = ("https://huggingface.co/spaces/LanguageBind/Open-Sora-Plan-v1.0.0/resolve/"
            "810fa8c4bdb3a4c8eec9bd57375c29bde6fb46de/opensora/eval/fvd/videogpt/i3d_pretrained_400.pt",
            "55095f049e706479d48e221adcdb145b2b9dc930ba28b081ed72367ffaa32343")
RANDOM_LABEL = "NOT COMPARABLE (random weights)"


def resize_tf1(images, size=299):
    """Bilinear resize as TensorFlow 1 did it: float (B, C, H, W) to (B, C, size, size).

    Output pixel i reads from i * in / out, without the half-pixel shift that makes the grid's centres meet,
    and without antialiasing. The picture moves by up to half a pixel: wrong, and part of every FID of the ADM
    family.
    """
    for dim in (-1, -2):                                               # x first: the order of roundings
        n = images.shape[dim]
        position = torch.arange(size, device=images.device) * torch.tensor(n / size, device=images.device)
        low = position.long()
        weight = position - low
        weight = weight if dim == -1 else weight.unsqueeze(1)
        below, above = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=n - 1))
        images = below + (above - below) * weight
    return images


def inception_input(images, rule):
    """uint8, or float in [0, 1], (B, 3, H, W) to what Inception takes: (B, 3, 299, 299) in about [-1, 1].

    rule "half-pixel"              pytorch-fid, the official rFID: bilinear, no antialiasing, 2x - 1
         "half-pixel-antialiased"  the same, but a side of more than 299 pixels is shrunk without aliasing
         "tf1"                     ADM, torch-fidelity: TensorFlow's old rule on 0..255, (k - 128) / 128
    Statistics of one rule mean nothing beside those of another: on 256 x 256 pictures the inputs differ by up
    to 18 levels. The aspect ratio is ignored by all of them.
    """
    if rule == "tf1":
        require(images.dtype == torch.uint8, f"rule tf1 takes uint8 pictures, not {str(images.dtype)[6:]}")
        return (resize_tf1(images.float()) - 128) / 128
    x = unit_range(images) if images.dtype == torch.uint8 else images
    antialias = rule == "half-pixel-antialiased"
    return 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False, antialias=antialias) - 1


class FIDInception(torchvision.models.Inception3):
    """The Inception-v3 of 2015 that FID is defined by: torchvision's network with other pooling branches.

    It has 1008 outputs, averages without counting the padding, and takes a maximum instead of an average in
    the very last block: accidents of one TensorFlow file, and part of the metric. torchvision's own weights
    and pooling give another number that is sometimes published as FID.
    """

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)

    def mix(self, name, x):
        """Block `name` with the right pooling branch: its output, and its first (1 x 1) branch."""
        block = getattr(self, name)
        *branches, _ = block._forward(x)                               # the pooling branch is the last
        if name == "Mixed_7c":
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat([*branches, block.branch_pool(pooled)], 1), branches[0]

    def forward(self, x):
        """x (B, 3, 299, 299) in [-1, 1] to features (B, 2048), spatial ones (B, 2023), logits (B, 1008)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))             # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))                  # (B, 192, 71, 71)
        x = self.maxpool2(x)                                                          # (B, 192, 35, 35)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x, _ = self.mix(name, x)                                                  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)                                                          # (B, 768, 17, 17)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x, branch = self.mix(name, x)                                             # (B, 768, 17, 17)
            if name == "Mixed_6d":
                # sFID: 7 channels, position by position (H, W, C). Channels first would not fit stored
                # statistics.
                spatial = branch[:, :7].permute(0, 2, 3, 1).flatten(1)                # (B, 17 * 17 * 7)
        x = self.Mixed_7a(x)                                                          # (B, 1280, 8, 8)
        for name in ("Mixed_7b", "Mixed_7c"):
            x, _ = self.mix(name, x)                                                  # (B, 2048, 8, 8)
        features = x.mean((2, 3))                                                     # (B, 2048)
        # The Inception Score of TensorFlow and ADM leaves out the bias; with it, scores are a sixth lower.
        return features, spatial, features @ self.fc.weight.T


def same_pad(x, kernel, stride):
    """TensorFlow's SAME padding of (B, C, T, H, W) by zeros: the odd one goes behind, unlike padding=k//2."""
    pads = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride)):
        total = max(k - s if size % s == 0 else k - size % s, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit3D(nn.Module):
    """SAME-padded 3D convolution - BatchNorm - ReLU."""

    def __init__(self, in_channels, out_channels, kernel, eps, stride=1):
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=eps)

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C', T / s, H / s, W / s), rounded up."""
        return F.relu(self.bn(self.conv3d(same_pad(x, self.kernel, self.stride))))


def max_pool(x, kernel, stride):
    """SAME max-pooling. Padding with 0 is as good as with -inf: everything here comes out of a ReLU."""
    return F.max_pool3d(same_pad(x, kernel, stride), kernel, stride)


class Mixed3D(nn.Module):
    """Inception block: 1x1x1 | 1x1x1 - 3x3x3 | 1x1x1 - 3x3x3 | max-pool - 1x1x1, side by side."""

    def __init__(self, in_channels, b0, b1a, b1b, b2a, b2b, b3b, eps):
        super().__init__()
        self.b0 = Unit3D(in_channels, b0, 1, eps)
        self.b1a, self.b1b = Unit3D(in_channels, b1a, 1, eps), Unit3D(b1a, b1b, 3, eps)
        self.b2a, self.b2b = Unit3D(in_channels, b2a, 1, eps), Unit3D(b2a, b2b, 3, eps)
        self.b3b = Unit3D(in_channels, b3b, 1, eps)

    def forward(self, x):
        """x (B, C, T, H, W) to (B, b0 + b1b + b2b + b3b, T, H, W)."""
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """Inflated Inception, trained on Kinetics-400 (Carreira and Zisserman, 2017): FVD's eye.

    eps of its BatchNorms: 1e-3 in the TensorFlow graph that defines FVD, 1e-5 in the port that the official
    script uses (protocol seed). The weights are the same.
    """
    WIDTHS = {"3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64),
              "4b": (192, 96, 208, 16, 48, 64), "4c": (160, 112, 224, 24, 64, 64),
              "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
              "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128),
              "5c": (384, 192, 384, 48, 128, 128)}

    def __init__(self, eps=1e-3):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, eps, stride=2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64, 1, eps)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3, eps)
        channels = 192
        for name, widths in self.WIDTHS.items():
            self.add_module(f"Mixed_{name}", Mixed3D(channels, *widths, eps))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(channels, 400, 1)

    def forward(self, x):
        """Clips x (B, 3, T, 224, 224) in [-1, 1], T of 9 or more, to logits (B, 400): FVD's features."""
        require(x.shape[2] >= 9, f"I3D needs clips of 9 frames or more, not {x.shape[2]}")
        x = max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))                    # (B, 64, T/2, 56, 56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))                                # (B, 192, T/2, 56, 56)
        x = max_pool(x, (1, 3, 3), (1, 2, 2))                                        # (B, 192, T/2, 28, 28)
        for name in self.WIDTHS:
            x = getattr(self, f"Mixed_{name}")(x)
            if name == "3c":
                x = max_pool(x, (3, 3, 3), (2, 2, 2))                                # (B, 480, T/4, 14, 14)
            if name == "4f":
                x = max_pool(x, (2, 2, 2), (2, 2, 2))                                # (B, 832, T/8, 7, 7)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)                                    # (B, 1024, T/8 - 1, 1, 1)
        return self.logits.conv3d(x).mean((2, 3, 4))                                 # (B, 400)


def i3d_input(clips):
    """uint8 clips (B, T, 3, H, W) to (B, 3, T, 224, 224) in [-1, 1]: bilinear, not antialiased."""
    frames = F.interpolate(clips.flatten(0, 1).float(), (224, 224), mode="bilinear", align_corners=False)
    return (2 * frames / 255 - 1).unflatten(0, clips.shape[:2]).transpose(1, 2)


def randomise(network, seed=0):
    """Fill `network` with seeded random weights that keep activations at a useful scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name.startswith("heads."):                                  # LPIPS's channel weights: not negative
            nn.init.uniform_(parameter, generator=generator)
        elif parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)                                  # the default is of global randomness
    return network


def load_network(name, args, device):
    """A network with verified weights, and what to call them: a sha256, or `RANDOM_LABEL`.

    `name`: "inception", "lpips-vgg", "lpips-alex", "i3d" (eps of the protocol). Raises `UserError` offline.
    """
    builders = {"inception": FIDInception, "i3d": lambda: I3D(1e-5 if args.protocol == "seed" else 1e-3),
                "lpips-vgg": lambda: train_tokenizer.LPIPS("vgg"),
                "lpips-alex": lambda: train_tokenizer.LPIPS("alex")}
    if args.allow_random_weights:
        network, source = randomise(builders[name]()), RANDOM_LABEL
    elif name.startswith("lpips"):
        network = train_tokenizer.load_lpips(name.removeprefix("lpips-"), args.weights_dir)
        source = " ".join(sha for _, sha in train_tokenizer.LPIPS_FILES[name.removeprefix("lpips-")])
    else:
        url, source = INCEPTION_FILE if name == "inception" else I3D_FILE
        path = runtime.fetch(url, args.weights_dir, source)
        network, state = builders[name](), runtime.load_checkpoint(path)
        # Old files lack BatchNorm's counters of training steps, which nothing reads in eval mode.
        counters = {key: value for key, value in network.state_dict().items() if key.endswith("_tracked")}
        runtime.load_state_strictly(network, {**counters, **state}, str(path))
    return network.to(device).eval().requires_grad_(False), source


# ------------------------------------------------------------------------------------------------------------
# 3. Statistics and distances of feature distributions: what a set of pictures as a whole can tell
# ------------------------------------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of a stream of feature vectors (.., D): n, sum of f, sum of f f^T, all in float64.

    Sums merge over ranks exactly, whatever the order. In float32 they would not do: the covariance is a small
    difference of large numbers.
    """

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features):
        """Count in features (B, D)."""
        features = features.double()
        self.n += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def reduce(self):
        """Sum over all ranks (33.6 MB for D = 2048, once)."""
        self.n = int(runtime.all_reduce_sum(torch.tensor(self.n)))
        self.total, self.outer = runtime.all_reduce_sum(self.total), runtime.all_reduce_sum(self.outer)

    def mean_and_covariance(self):
        """numpy mean (D,) and unbiased covariance (D, D). Raises `UserError` for fewer than two vectors."""
        require(self.n >= 2, f"a covariance needs two pictures or more, there is {self.n}")
        mean = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


def frechet_distance(mean1, covariance1, mean2, covariance2, n1=None, n2=None):
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2).

    FID with Inception's features, sFID with its spatial ones, FVD with I3D's logits. numpy float64; n1, n2:
    of how many vectors the covariances are, where known.
    Sees: whether two SETS of pictures have the same distribution of features, up to mean and covariance: blur
    and artefacts as well as missing classes. sFID's features keep positions, so it sees layout better.
    Misses: everything about single pictures (a reconstruction may show another dog), and higher moments.
    Traps: FID falls with N: with 2,500 pictures a perfect model already reads 2 % of the features' variance,
    so compare equal N only. And the reference counts: reconstructions of ImageNet val against val, not train
    (LlamaGen's tokenizer: 2.19 against val, 4.28 against train); generated pictures against train.

    With S1 = R R^T, (S1 S2)^(1/2) has the eigenvalues of (R^T S2 R)^(1/2), which is symmetric: real by
    construction, without the complex residues of a general matrix square root. R comes from a pivoted
    Cholesky decomposition. A covariance of n vectors has rank n - 1 at most; all further eigenvalues are
    rounding errors, and must go before their square root makes 1e-8 out of 1e-16.
    """
    require(mean1.shape == mean2.shape and covariance1.shape == covariance2.shape == mean1.shape * 2,
            f"statistics of {mean1.shape[0]} and {mean2.shape[0]} features cannot be compared")
    ranks = [len(mean1) if n is None else min(len(mean1), n - 1) for n in (n1, n2)]
    first, second = (covariance1, covariance2) if ranks[0] <= ranks[1] else (covariance2, covariance1)
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(first, lower=1)
    rank = min(rank, *ranks)
    root = np.zeros((len(mean1), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]                       # (D, rank): first = root root^T
    require(np.isclose(np.square(root).sum(), np.trace(first)), "a covariance has negative eigenvalues")
    trace = np.sqrt(np.linalg.eigvalsh(root.T @ second @ root).clip(0)).sum() if rank else 0.0
    return float(((mean1 - mean2) ** 2).sum() + np.trace(covariance1) + np.trace(covariance2) - 2 * trace)


def frechet_distance_float32(x, y):
    """The official video script's Frechet distance of features (N, D), (M, D), for protocol seed.

    Two square roots by SVD in float32, singular values under 1e-10 not rooted. The rounding is no detail: the
    distance of a set of 10,000 clips to itself was measured as 2.82, and a true 16.19 as 16.38.
    """
    def root(matrix):
        u, s, vh = torch.linalg.svd(matrix)
        return u @ torch.diag(torch.where(s < 1e-10, s, s.sqrt())) @ vh

    x, y = x.float().cpu(), y.float().cpu()
    covariance_x, covariance_y = torch.cov(x.T), torch.cov(y.T)
    trace = torch.trace(root(root(covariance_x) @ covariance_y @ root(covariance_x)))
    distance = (x.mean(0) - y.mean(0)).square().sum() + torch.trace(covariance_x + covariance_y) - 2 * trace
    return float(distance)


def inception_score(logits, split_size=5000):
    """Inception Score of logits (N, 1008): mean and std over consecutive blocks, and the number of blocks.

    exp of the mean KL(p(class | picture) || p(class)) in a block.
    Sees: sharp predictions (recognisable) that differ from picture to picture (diverse). Misses: the real
    data, which never enter, and everything inside a class: one perfect picture a class gets the best score.
    Trap: order. Pictures sorted by class make each block a few classes only, and the score collapses (real
    samples of one model: 62 instead of 298); shuffle first. One block scores higher than ten.
    """
    require(logits.dim() == 2 and len(logits) >= 1, f"logits must be (N, classes), not {list(logits.shape)}")
    scores = []
    for block in logits.split(split_size):
        log_p = block.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(block))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0)), len(scores)


def squared_distances(u, v, half=False):
    """Squared Euclidean distances of the rows of u (n, D) and v (m, D): (n, m) in float32.

    half: computed in float16 unless that overflows, as the TensorFlow evaluator does. Its steps of 0.25 at
    the usual size of these distances move precision and recall in the third digit.
    """
    for dtype in ((torch.float16,) if half else ()) + (torch.float32,):
        a, b = u.to(dtype), v.to(dtype)
        distances = a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
        if dtype == torch.float32 or distances.isfinite().all():
            return distances.float().clamp_min(0)


def precision_recall(reference, samples, k=3, half=False, rows=2048):
    """Improved precision and recall (Kynkaanniemi et al., 2019) of features (N, D) and (M, D).

    Each set is taken as the union of balls around its points, reaching to the k-th neighbour. Precision: how
    many samples lie in the reference's union (fidelity). Recall: how many reference pictures lie in the
    samples' (coverage). Misses: how well regions are weighted, and one outlier can cover a lot of space.
    Traps: the original uses VGG features, ADM and the paper Inception's; and set sizes matter (ADM: 10,000
    real and 50,000 generated). Works on blocks of `rows`: the whole 10,000 x 50,000 table would take 2 GB.
    """
    require(reference.dim() == samples.dim() == 2 and reference.shape[1] == samples.shape[1],
            f"features of {list(reference.shape)} and {list(samples.shape)} cannot be compared")
    require(min(len(reference), len(samples)) > k, f"precision and recall need more than {k} pictures a set, "
            f"there are {len(samples)} samples and {len(reference)} reference pictures")

    def radii(points):                                                 # + 1: the nearest is the point itself
        return torch.cat([squared_distances(block, points, half).kthvalue(k + 1, dim=1).values
                          for block in points.split(rows)])

    reference_radii, sample_radii = radii(reference), radii(samples)
    precise, recalled = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for block, radius in zip(samples.split(rows), sample_radii.split(rows)):
        distances = squared_distances(block, reference, half)          # (rows, N)
        precise += int((distances <= reference_radii).any(1).sum())
        recalled |= (distances <= radius[:, None]).any(0)
    return precise / len(samples), float(recalled.double().mean())


# ------------------------------------------------------------------------------------------------------------
# 4. Measuring: one pass over the pictures, sharded over the ranks, computes everything
# ------------------------------------------------------------------------------------------------------------

KEPT_IMAGES = 10_000            # pictures of a reference for precision and recall, as in ADM's files


def gather_rows(rows, indices):
    """The `rows` (n, ...) of all ranks, sorted by `indices` (n,): (N, ...) on rank 0's CPU, elsewhere None.

    Sorting by the pictures' numbers is what makes every result independent of the number of ranks.
    """
    rows, indices = rows.cpu(), indices.cpu()
    if runtime.world_size() > 1:
        counts = runtime.gather_objects(len(rows))
        gathered = []
        for tensor in (rows, indices):                                 # gather wants equal sizes: pad, cut
            padded = torch.cat([tensor, tensor.new_zeros(max(counts) - len(tensor), *tensor.shape[1:])])
            parts = [torch.empty_like(padded) for _ in counts] if runtime.is_main() else None
            dist.gather(padded, parts)
            gathered.append(torch.cat([part[:n] for part, n in zip(parts, counts)]) if parts else None)
        rows, indices = gathered
        if indices is None:
            return None
    assert len(indices.unique()) == len(indices), "a picture was counted twice"
    return rows[indices.argsort()]


class FeatureStream:
    """Sends pictures of any size through Inception and keeps what the metrics need.

    Every forward has exactly `batch_size` pictures, the last one filled up with zeros, because convolutions
    add in another order at another batch size: features move by up to 1e-3 on a GPU, enough to change a small
    FID. kept: of which pictures (a bool tensor by index) to keep features and logits; None is for FID alone.
    """

    def __init__(self, network, rule, batch_size, kept=None):
        self.network, self.rule, self.batch_size, self.kept = network, rule, batch_size, kept
        self.device = next(network.parameters()).device
        self.moments = Moments(2048, self.device)
        self.spatial_moments = None if kept is None else Moments(2023, self.device)
        self.inputs, self.waiting = [], []                             # resized pictures and their indices
        self.features, self.logits, self.indices = [torch.empty(0, 2048)], [torch.empty(0, 1008)], []

    def add(self, images, indices):
        """Count in pictures (B, 3, H, W), uint8 or float in [0, 1], with their numbers `indices` (B,)."""
        self.inputs += inception_input(images, self.rule)
        self.waiting += indices.tolist()
        while len(self.inputs) >= self.batch_size:
            self.run(self.batch_size)

    def run(self, n):
        """Send the first n waiting pictures through the network."""
        batch, indices = torch.stack(self.inputs[:n]), torch.tensor(self.waiting[:n])
        del self.inputs[:n], self.waiting[:n]
        batch = torch.cat([batch, batch.new_zeros(self.batch_size - n, *batch.shape[1:])])
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features, spatial, logits = [output[:n] for output in self.network(batch)]
        self.moments.add(features)
        if self.kept is not None:
            self.spatial_moments.add(spatial)
            keep = self.kept[indices]
            self.features.append(features.cpu()[keep])
            self.logits.append(logits.cpu()[keep])
            self.indices += indices[keep].tolist()

    def finish(self):
        """Run what is left and merge the ranks; kept features and logits then lie on rank 0, in order."""
        if self.inputs:
            self.run(len(self.inputs))
        self.moments.reduce()
        if self.kept is not None:
            self.spatial_moments.reduce()
            indices = torch.tensor(self.indices, dtype=torch.long)
            self.features = gather_rows(torch.cat(self.features), indices)
            self.logits = gather_rows(torch.cat(self.logits), indices)
        return self


def evenly_spaced(count, length):
    """`count` indices spread over 0 .. length - 1 (None: all), so that a sorted set keeps every class."""
    count = min(count or length, length)
    return [i * length // count for i in range(count)]


class OriginalImages(torch.utils.data.Dataset):
    """The pictures of a data set as they are stored, at their own size."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            return data.image_to_tensor(self.dataset.load(index)), 0, index
        except Exception as error:                                     # as in data.py: counted and skipped
            self.dataset.report_broken(index, error)
            return None


class SampleArray(data.Images):
    """The uint8 (N, H, W, 3) array `arr_0` of an npz file, ADM's format for samples, read picture by picture.

    axes: "(N, T, H, W, 3)" for the same of clips. 50,000 pictures of 256 x 256 are 9.8 GB, so the array is
    mapped into memory, not read. Raises `UserError` for files of any other form.
    """

    def __init__(self, path, axes="(N, H, W, 3)"):
        self.images = map_npz(path, "arr_0")
        shape = list(self.images.shape)
        require(self.images.dtype == np.uint8, f"{path}: arr_0 is {self.images.dtype}, expected uint8; "
                f"convert floats in [0, 1] with (x * 255).round().astype('uint8')")
        require(len(shape) == axes.count(",") + 1 and shape[-1] == 3,
                f"{path}: arr_0 has the shape {shape}, not {axes}"
                + ("; use arr_0.transpose(0, 2, 3, 1)" if len(shape) == 4 and shape[1] == 3 else "")
                + ("; judge clips with video-generation" if len(shape) == 5 else ""))
        self.size = tuple(shape[-3:-1])                                # (H, W)
        super().__init__(str(path), [], len(self.images), shape[-3], "center", False, 0)

    def read(self, index, seed):
        """(image uint8 (3, H, W), or clip (3, T, H, W), label 0, index)."""
        return torch.from_numpy(self.images[index].copy()).movedim(-1, 0), 0, index


def map_npz(path, key):
    """Array `key` of an npz file: a memory map if it is stored uncompressed, as np.savez does, else read."""
    require(pathlib.Path(path).is_file(), f"{path} does not exist; check the path")
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            require(key in names, f"{path} holds no array {key}, only {', '.join(names)}")
            entry = archive.getinfo(f"{key}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                return np.load(path)[key]
            file.seek(entry.header_offset + 26)                        # lengths of name and extra field
            file.seek(sum(struct.unpack("<2H", file.read(4))), os.SEEK_CUR)
            newer = np.lib.format.read_magic(file) != (1, 0)
            header = np.lib.format.read_array_header_2_0 if newer else np.lib.format.read_array_header_1_0
            shape, fortran, dtype = header(file)
            require(not dtype.hasobject, f"{path}: {key} holds pickled objects, which are never loaded")
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error) as error:
        raise runtime.UserError(f"{path} is truncated or no npz file ({error}); copy it again") from None


def open_samples(path):
    """Generated pictures in an npz file or a folder of equally sized ones: (data set, what to read it by).

    Raises `UserError` for a wrong format, or for sizes that differ. The data set's `size` is (H, W).
    """
    if not pathlib.Path(path).is_dir():
        samples = SampleArray(path)
        return samples, samples
    folder = data.ImageFolder(path, image_size=1)
    sizes = [Image.open(folder.path(i)).size[::-1] for i in range(len(folder))]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), 0)
    require(not other, f"--samples {path} mixes sizes: {folder.path(0)} has {sizes[0]}, {folder.path(other)} "
            f"has {sizes[other]}; the pictures of a set must have one size")
    folder.size = sizes[0]
    return folder, OriginalImages(folder)


def loader_of(dataset, indices, args, title, source=None):
    """This rank's share of `dataset[indices]` in batches, unpadded, unrepeated; a progress bar on rank 0.

    Ranks share out whole batches, the same ones on any number of ranks. So an item always has the same
    neighbours, and its numbers the same last bits: a row of a matrix product may depend on its place.
    """
    requests = [indices[i:i + args.batch_size] for i in range(0, len(indices), args.batch_size)]
    requests = requests[runtime.rank()::runtime.world_size()]
    batches = data.batches(dataset, source or dataset, requests, args.num_workers)
    return tqdm(batches, title, len(requests), unit="batch", disable=None if runtime.is_main() else True)


def pad_to_multiple(images, multiple):
    """Pad both sides of float pictures (B, 3, H, W) with 0, mid-grey, and the slices that undo it."""
    height, width = images.shape[2:]
    spare_y, spare_x = -height % multiple, -width % multiple
    top, left = spare_y // 2, spare_x // 2
    padded = F.pad(images, (left, spare_x - left, top, spare_y - top))
    return padded, (..., slice(top, top + height), slice(left, left + width))


class ReconstructionFID:
    """rFID: the Frechet distance between pictures and their own reconstructions, in one pass.

    The originals' statistics are kept in the file `cache`: they are the same for every tokenizer, and half of
    the work.
    """

    def __init__(self, network, rule, batch_size, cache):
        self.cache, self.originals = pathlib.Path(cache), None
        self.reconstructions = FeatureStream(network, rule, batch_size)
        if not on_main(self.cache.exists):
            self.originals = FeatureStream(network, rule, batch_size)

    def add(self, originals, reconstructions, indices):
        """Count in a batch of pairs, uint8 or float in [0, 1]."""
        if self.originals:
            self.originals.add(originals, indices)
        self.reconstructions.add(reconstructions, indices)

    def distance(self):
        """The rFID on rank 0, elsewhere None. A collective."""
        moments = self.reconstructions.finish().moments
        originals = self.originals and self.originals.finish().moments
        if not runtime.is_main():
            return None
        if originals:
            mean, covariance = originals.mean_and_covariance()
            save_npz(self.cache, mu=mean, sigma=covariance, n=np.array(originals.n))
        with np.load(self.cache) as file:
            n, statistics = int(file["n"]), (file["mu"], file["sigma"], *moments.mean_and_covariance())
        require(n == moments.n, f"{self.cache} is of {n} pictures, there are {moments.n} reconstructions; "
                f"delete it, so that it is made again")
        return frechet_distance(*statistics, n, n)


def measure_reconstruction(model, loader, networks, rfid, args, examples):
    """The measuring loop: every picture goes through the tokenizer once and is seen by every metric.

    networks: LPIPS by metric. rfid: a `ReconstructionFID` or None. examples: numbers of the pictures for the
    grid. Returns values of each picture by metric and "index", the code counts (V,), the number of pixels,
    and {index: (original, reconstruction)} in uint8; all of this rank.
    """
    device, stride, seed = next(model.parameters()).device, model.config.downsampling, args.protocol == "seed"
    values = {name: [torch.empty(0)] for name in ("psnr", "ssim", *networks) if name in args.metrics}
    values["index"], pixels, grid = [torch.empty(0, dtype=torch.long)], 0, {}
    counts = torch.zeros(model.config.vocabulary, dtype=torch.long, device=device)
    for images, _, indices in loader:
        n = len(images)
        if not args.original_resolution:
            # All batches have one shape, the last filled up by repetition, so that a picture's numbers do not
            # depend on how the set was divided into batches and ranks.
            images = torch.cat([images, images[-1:].expand(args.batch_size - n, -1, -1, -1)])
        images = images.to(device)                                                # (B, 3, H, W) uint8
        require(not networks or min(images.shape[2:]) >= 32, f"LPIPS needs pictures of 32 x 32 or more, not "
                f"{list(images.shape[2:])}; leave it out of --metrics")
        x, inside = data.to_float(images), ...                                    # (B, 3, H, W)
        if args.original_resolution:                                   # officially 16 whatever the stride is
            x, inside = pad_to_multiple(x, math.lcm(16, stride) if seed else stride)
        with torch.no_grad(), runtime.autocast(device, args.mixed_precision):
            ids = model.encode(x)                                                 # (B, h, w)
            y = model.decode(ids)[inside].float()                                 # (B, 3, H, W)
        require(bool(y[:n].isfinite().all()), f"the tokenizer's output is not finite with --mixed-precision "
                f"{args.mixed_precision}; use bf16 or fp32")
        x, y = x[inside], y.clamp(-1, 1)
        # clean: every metric sees the pixels that an image file would hold. seed: PSNR and SSIM see truncated
        # pixels, the networks see floats.
        original, pixels_y = to_pixels(x, "seed") if seed else images, to_pixels(y, args.protocol)
        y = y if seed else data.to_float(pixels_y)
        values["index"].append(indices)
        for name, metric in (("psnr", psnr), ("ssim", ssim)):
            if name in values:
                values[name].append(metric(original, pixels_y, args.protocol)[:n].cpu())
        for name, network in networks.items():
            values[name].append(network(x, y)[:n].double().cpu())
        if rfid:
            pair = ((x + 1) / 2, (y + 1) / 2) if seed else (images, pixels_y)
            rfid.add(pair[0][:n], pair[1][:n], indices)
        counts += ids[:n].flatten().bincount(minlength=len(counts))
        pixels += n * images[0, 0].numel()
        grid.update({i: (images[j].cpu(), pixels_y[j].cpu()) for j, i in enumerate(indices.tolist())
                     if i in examples})
    return {name: torch.cat(parts) for name, parts in values.items()}, counts, pixels, grid


def average(values, batch=None):
    """Mean of values (N,); with `batch`, the mean of the means of batches, the last of which may be short."""
    if batch and len(values) % batch:
        whole = len(values) // batch * batch
        values = torch.cat([values[:whole].view(-1, batch).mean(1), values[whole:].mean()[None]])
    return float(values.mean())


def fingerprint(dataset, indices):
    """A sha256 of what decides the pixels of `dataset[indices]`.

    That is: names, sizes and dates of the files, the preprocessing, and, to notice a new version of the
    generated set, 16 of the pictures themselves.
    """
    settings = [dataset.image_size, dataset.resize, dataset.crop, len(dataset), indices]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for index in indices:
        path = dataset.path(index)
        file = path if os.path.exists(path) else path.rpartition(":")[0]         # shard.tar:member of a shard
        state = os.stat(file) if os.path.exists(file) else None
        digest.update(f"{path} {state and (state.st_size, state.st_mtime_ns)}\n".encode())
    for i in evenly_spaced(16, len(indices)):
        item = dataset[indices[i]]
        digest.update(b"broken" if item is None else item[0].numpy().tobytes())
    return digest.hexdigest()


def compute_reference(dataset, indices, key, network, path, args, keep_images=True):
    """ADM's statistics of `dataset[indices]`, with the resize rule of its family, on rank 0. A collective.

    key: everything that the numbers depend on. It is stored in the file `path`; if that file exists, it is
    used. The arrays: mu, sigma (2048), mu_s, sigma_s (2023), n, `features` of up to 10,000 pictures, and
    (keep_images) these pictures as arr_0 uint8 (N, H, W, 3), so that ADM's own evaluator can read the file.
    """
    path = pathlib.Path(path)
    if on_main(path.exists):
        with np.load(path) as file:
            require("settings" in file.files, f"{path} is of another program; choose another --reference")
            runtime.check_same(json.loads(str(file["settings"])), key, f"{path} exists already and")
            runtime.print_main(f"reference   {path} (cached)")
            return {name: file[name] for name in file.files if name != "arr_0"}
    require(len(indices) > 3, f"{dataset.name} has {len(indices)} pictures; a reference needs four or more")
    chosen = [indices[i] for i in evenly_spaced(KEPT_IMAGES, len(indices))]
    kept = torch.zeros(len(dataset), dtype=torch.bool)
    kept[chosen] = True
    stream = FeatureStream(network, "tf1", args.feature_batch_size, kept)
    side = key["image_size"] if keep_images else 0
    pictures, numbers = [torch.empty(0, 3, side, side, dtype=torch.uint8)], [torch.empty(0, dtype=torch.long)]
    for images, _, batch in loader_of(dataset, indices, args, "reference"):
        stream.add(images.to(stream.device), batch)
        if keep_images:
            pictures.append(images[kept[batch]])
            numbers.append(batch[kept[batch]])
    dataset.raise_if_broken(all_ranks=True)
    stream.finish()
    pictures = gather_rows(torch.cat(pictures), torch.cat(numbers))
    if not runtime.is_main():
        return None
    mu, sigma = stream.moments.mean_and_covariance()
    mu_s, sigma_s = stream.spatial_moments.mean_and_covariance()
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "n": np.array(stream.moments.n),
              "features": stream.features.numpy(), "settings": np.array(json.dumps(key))}
    save_npz(path, **({"arr_0": pictures.permute(0, 2, 3, 1).numpy()} if keep_images else {}), **arrays)
    print(f"reference   {path} ({stream.moments.n} pictures)")
    return arrays


# ------------------------------------------------------------------------------------------------------------
# 5. Commands: reconstruction, video, generation, make-reference
# ------------------------------------------------------------------------------------------------------------

METRICS = {                     # key in the JSON files: (name, format)
    "rfvd": ("rFVD", "{:.2f}"), "rfvd-float32": ("rFVD in float32", "{:.2f}"),
    "fvd": ("FVD", "{:.2f}"), "fvd-float32": ("FVD in float32", "{:.2f}"),
    "rfid": ("rFID", "{:.3f}"), "fid": ("FID", "{:.3f}"), "sfid": ("sFID", "{:.3f}"),
    "inception_score": ("Inception Score", "{:.2f}"), "precision": ("precision", "{:.4f}"),
    "recall": ("recall", "{:.4f}"), "psnr": ("PSNR (dB)", "{:.2f}"), "ssim": ("SSIM", "{:.4f}"),
    "lpips-vgg": ("LPIPS (VGG)", "{:.4f}"), "lpips-alex": ("LPIPS (Alex)", "{:.4f}"),
    "usage": ("codebook usage", "{:.2%}"), "perplexity": ("perplexity", "{:.1f}"),
    "bits_per_pixel": ("bits per pixel", "{:.4f}"),
}
# Flags of `generation` that only make sense where it draws the pictures itself.
DRAWING = ("ckpt", "num_samples", "tokenizer", "raw_weights", "trust_checkpoint", "cfg_scale",
           "temperature", "top_k", "top_p", "rounding", "compile")
VIDEO_METRICS = ("rfvd", "lpips-vgg", "lpips-alex")
LOCAL_METRICS, NETWORK_METRICS = ("psnr", "ssim", "usage"), ("rfid", "lpips-vgg", "lpips-alex")


def start(args):
    """Set up the processes and exact fp32 (TF32 keeps 10 bits of each factor); returns the device."""
    device = runtime.setup_process_group(args.device)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    args.feature_batch_size = args.feature_batch_size or (64 if device.type == "cuda" else 8)
    return device


def on_main(function, *values):
    """`function(*values)`, computed on rank 0 for all ranks."""
    return runtime.gather_objects(function(*values) if runtime.is_main() else None)[0]


def save_npz(path, **arrays):
    """np.savez, atomically."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def short_hash(value):
    """Eight hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def stem_of(path):
    """The last two parts of a path, without its suffix, as a part of a file name."""
    name = "-".join(pathlib.Path(path).with_suffix("").parts[-2:])
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-")


def warn_if_few(n, features, name, items="pictures"):
    """Say so where a Frechet distance of `n` pictures is mostly bias."""
    if n < 2 * features:
        runtime.print_main(f"warning: {name} of {n} {items} is biased upwards ({features} features want "
                           f"{2 * features} or more); compare it only with that of equally many pictures")


def report(stem, metrics, notes, labels, settings, began, args):
    """Print a table of `metrics` {key: value}, and write it with `settings` to a JSON file. Rank 0 only.

    notes: what each number was measured on; labels: why it must not be compared. The file name carries a hash
    of what distinguishes the run, so that another protocol, checkpoint or data set does not overwrite it.
    """
    print()
    runtime.print_table([(METRICS[key][0], METRICS[key][1].format(value), notes[key], labels.get(key, ""))
                         for key, value in metrics.items()], ("metric", "value", "measured on", ""))
    entries = {key: {"value": value if np.isfinite(value) else str(value), "measured_on": notes[key],
                     **({"label": labels[key]} if key in labels else {})} for key, value in metrics.items()}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                "torchvision": torchvision.__version__}
    record = {"metrics": entries, **settings, "seconds": round(time.time() - began, 1), "versions": versions,
              "date": datetime.datetime.now().isoformat(timespec="seconds"), "arguments": vars(args)}
    path = pathlib.Path(args.output) / f"{stem}-{short_hash([settings, sorted(metrics)])}.json"
    runtime.write_json(path, record)
    items = "clips" if settings["command"].startswith("video") else "pictures"
    print(f"\n{settings['n']} {items} in {runtime.format_seconds(time.time() - began)}, written to {path}")
    return path


def reconstruction(args):
    """`reconstruction`: how much of a picture survives its way through the tokens (tables 3, 4 and 6)."""
    began, device = time.time(), start(args)
    checkpoint = args.ckpt or runtime.latest_checkpoint("runs/tokenizer", "tokenizer checkpoint")
    model, info = tokenizer.load_tokenizer(checkpoint, not args.raw_weights, args.trust_checkpoint)
    model = model.to(device)
    if args.data_path is None:                     # held-out pictures of what the tokenizer was trained on
        args.data_path = info["val_data_path"] or info["data_path"]
        args.resize = args.resize or info["resize"]
    dataset = data.build_dataset(args.data_path, args.split, args.image_size or model.config.resolution,
                                 resize=args.resize)
    indices = evenly_spaced(args.max_images, len(dataset))
    require(len(indices) >= 2 or "rfid" not in args.metrics, "--metrics rfid needs two pictures or more")
    args.batch_size = 1 if args.original_resolution else args.batch_size
    size = "original" if args.original_resolution else dataset.image_size
    # Clean departs from the official resize rule only where a side exceeds Inception's 299 pixels.
    aliased = args.protocol == "seed" or not args.original_resolution and size <= 299
    rule = "half-pixel" if aliased else "half-pixel-antialiased"
    runtime.print_main(
        f"tokenizer   {checkpoint} ({info['preset']}, {info['weights']} weights, step {info['step']}, sha256 "
        f"{info['sha256'][:8]})\n"
        f"data        {dataset.name}, {len(indices)} of {len(dataset)} pictures, size {size}\n"
        f"protocol    {args.protocol}, tokenizer in {args.mixed_precision}, metrics in fp32, "
        f"{runtime.world_size()} x {device.type}")
    if left_out := [name for name in NETWORK_METRICS if name not in args.metrics]:
        runtime.print_main(f"left out    {', '.join(left_out)} (networks to download); add --metrics all")

    networks, sources = {}, {}
    for name in NETWORK_METRICS:
        if name in args.metrics:
            networks[name], sources[name] = load_network(name.replace("rfid", "inception"), args, device)
    settings = {"command": "reconstruction", "n": len(indices), "protocol": args.protocol,
                "resize_rule": rule,
                "data": {"path": args.data_path, "name": dataset.name, "split": args.split, "size": size,
                         "resize": args.resize, "fingerprint": on_main(fingerprint, dataset, indices)},
                "checkpoint": {"path": str(checkpoint), "name": pathlib.Path(checkpoint).name, **info},
                "precision": {"tokenizer": args.mixed_precision, "metrics": "fp32", "statistics": "fp64"},
                "networks": sources, "random_weights_seed": 0 if args.allow_random_weights else None,
                "device": device.type, "feature_batch_size": args.feature_batch_size}
    rfid = None
    if "rfid" in networks:
        key = [settings[name] for name in ("data", "n", "protocol", "resize_rule", "device",
                                           "feature_batch_size")] + [sources["rfid"]]
        cache = pathlib.Path(args.output) / "references" / f"originals-{short_hash(key)}.npz"
        rfid = ReconstructionFID(networks.pop("rfid"), rule, args.feature_batch_size, cache)
    loader = loader_of(dataset, indices, args, "reconstruction",
                       OriginalImages(dataset) if args.original_resolution else None)
    measured = measure_reconstruction(model, loader, networks, rfid, args, set(indices[:8]))
    dataset.raise_if_broken(all_ranks=True)
    settings["skipped"] = int(dataset.broken[indices].sum())
    settings["n"] = len(indices) - settings["skipped"]
    summarise_reconstruction(model.config.vocabulary, *measured, rfid, settings, began, args)


def summarise_reconstruction(vocabulary, values, counts, pixels, grid, rfid, settings, began, args):
    """Merge what the ranks have measured; report it and paint the grid. A collective."""
    numbers, seed = values.pop("index"), args.protocol == "seed"
    n = int(runtime.all_reduce_sum(torch.tensor(len(numbers))))
    assert n == settings["n"], f"{n} pictures were measured, expected {settings['n']}"
    values = {name: gather_rows(rows, numbers) for name, rows in values.items()}
    counts, pixels = runtime.all_reduce_sum(counts), int(runtime.all_reduce_sum(torch.tensor(pixels)))
    grid = {i: pair for part in runtime.gather_objects(grid) for i, pair in part.items()}
    metrics = {"rfid": rfid.distance()} if rfid else {}
    if not runtime.is_main():
        return
    # The official script averages PSNR and SSIM over its batches, of four pictures or of one.
    batch = (1 if args.original_resolution else 4) if seed else None
    pair, floats = ("truncated uint8", "floats") if seed else ("rounded uint8", "rounded uint8")
    mean = f"mean over batches of {batch}" if seed else "mean over pictures"
    for name in values:
        metrics[name] = average(values[name], batch if name in ("psnr", "ssim") else None)
    notes = {"rfid": f"{floats}, {settings['resize_rule']} to 299, {n} pictures", "psnr": f"{pair}, {mean}",
             "ssim": f"{pair}, {mean}, 7 x 7 windows", "lpips-vgg": f"{floats}, mean over pictures",
             "lpips-alex": f"{floats}, mean over pictures"}
    if "usage" in args.metrics:
        metrics |= codebook_metrics(counts, np.log2(vocabulary), pixels)
        notes |= {"usage": f"{int(counts.sum())} tokens of {vocabulary} codes",
                  "perplexity": f"at most {vocabulary}",
                  "bits_per_pixel": f"{np.log2(vocabulary):g} bits a token"}
    labels = {name: RANDOM_LABEL for name, source in settings["networks"].items() if source == RANDOM_LABEL}
    if rfid:
        warn_if_few(n, 2048, "rFID")
    stem = f"reconstruction-{stem_of(settings['checkpoint']['name'])}-{stem_of(settings['data']['name'])}"
    path = report(stem, metrics, notes, labels, settings, began, args)
    height, width = [min(min(pair[0].shape[axis] for pair in grid.values()), 256) for axis in (1, 2)]
    crop = torchvision.transforms.CenterCrop((height, width))          # originals may differ in size
    pictures = torch.stack([crop(grid[i][k]) for k in (0, 1) for i in sorted(grid)])
    picture = runtime.image_grid(pictures, len(grid), scale=max(1, 96 // width))
    runtime.save_png(path.with_suffix(".png"), picture)
    print(f"originals above reconstructions: {path.with_suffix('.png')}")


class ChosenClips:
    """Item number k is clip `order[k]`, its crop drawn for k, so that a clip taken twice is cropped anew."""

    def __init__(self, dataset, order):
        self.dataset, self.order = dataset, order

    def __getitems__(self, numbers):
        requests = [(self.order[k], data.hash64(self.dataset.seed, k)[0]) for k in numbers]
        items = self.dataset.__getitems__(requests)
        return [item and (*item[:2], k) for item, k in zip(items, numbers)]


def choose_clips(length, args):
    """The clips to measure, some perhaps twice.

    seed: the official script fills up its clips to 10,000 with a random sample of the same clips (463 of
    UCF-101's 9,537), drawn anew at each run; here the sample is that of --global-seed.
    """
    order = list(range(length))
    if args.protocol == "seed":
        order = evenly_spaced(10_000, length)
        shuffled = torch.randperm(length, generator=torch.Generator().manual_seed(args.global_seed))
        order += shuffled[:10_000 - len(order)].tolist()
    return [order[k] for k in evenly_spaced(args.max_clips, len(order))]


def video_reconstruction(args):
    """`video`: how much of a clip survives its way through the tokens. rFVD sees motion, the rest frames.

    clean: the test split, centre crops. seed: the training split, some clips twice, random crops, truncated
    pixels, as in the official script; with them came the published rFVD of 16. Both: central frames.
    """
    began, device, seed = time.time(), start(args), args.protocol == "seed"
    checkpoint = args.ckpt or runtime.latest_checkpoint("runs/video", "video tokenizer")
    model, info = video.load_video_tokenizer(checkpoint, not args.raw_weights, args.trust_checkpoint)
    model, T, size = model.to(device), model.config.frames, model.config.resolution
    require("rfvd" not in args.metrics or T >= 9, f"--metrics rfvd: I3D needs clips of 9 frames or more, "
            f"those of {checkpoint} have {T}; leave it out")
    if args.data_path is None and not args.split_list:                 # what the tokenizer was trained on
        args.data_path = info["data_path"] if seed else info["val_data_path"] or info["data_path"]
        args.resize = args.resize or info["resize"]
        args.split_list = info["split_list" if seed else "val_split_list"]
    args.split = args.split or ("train" if seed else "test")
    dataset = data.build_clips(args.data_path, args.split, size, T, "random" if seed else "center",
                               seed=args.global_seed, resize=args.resize, start="center",
                               split_list=args.split_list)
    order = choose_clips(len(dataset), args)
    require(len(order) >= 2 or "rfvd" not in args.metrics, "--metrics rfvd needs two clips or more")
    runtime.print_main(
        f"tokenizer   {checkpoint} ({info['preset']}, {info['weights']} weights, step {info['step']}, sha256 "
        f"{info['sha256'][:8]})\n"
        f"data        {dataset.name}, {args.split} split, {len(order)} clips of {T} x {size} x {size}, "
        f"{len(order) - len(set(order))} of them twice, {dataset.crop} crop\n"
        f"protocol    {args.protocol}, tokenizer in {args.mixed_precision}, metrics in fp32, "
        f"{runtime.world_size()} x {device.type}")
    if left_out := [name for name in VIDEO_METRICS if name not in args.metrics]:
        runtime.print_main(f"left out    {', '.join(left_out)} (networks to download); add --metrics all")
    loaded = {name: load_network(name.replace("rfvd", "i3d"), args, device)
              for name in VIDEO_METRICS if name in args.metrics}
    networks = {name: network for name, (network, _) in loaded.items()}
    loader = loader_of(dataset, list(range(len(order))), args, "clips", ChosenClips(dataset, order))
    values, counts, grid = measure_clips(model, loader, networks, args)
    dataset.raise_if_broken(all_ranks=True)
    skipped = int(dataset.broken[order].sum())
    settings = {"command": "video", "n": len(order) - skipped, "skipped": skipped, "protocol": args.protocol,
                "repeated": len(order) - len(set(order)), "resize_rule": "half-pixel",
                "data": {"path": args.data_path, "name": dataset.name, "split": args.split, "size": size,
                         "frames": T, "crop": dataset.crop, "start": "center", "split_list": args.split_list,
                         "resize": args.resize, "fingerprint": on_main(fingerprint, dataset, order)},
                "checkpoint": {"path": str(checkpoint), "name": pathlib.Path(checkpoint).name, **info},
                "precision": {"tokenizer": args.mixed_precision, "metrics": "fp32", "statistics": "fp64"},
                "networks": {name: source for name, (_, source) in loaded.items()},
                "random_weights_seed": 0 if args.allow_random_weights else None,
                "global_seed": args.global_seed, "device": device.type, "batch_size": args.batch_size}
    summarise_video(model.config, values, counts, grid, settings, began, args)


def measure_clips(model, loader, networks, args):
    """Send every clip through the tokenizer once, and through every metric.

    Returns values of each clip by metric (means over its frames), "number", and for rFVD the features of both
    clips; the code counts (V,); and {number: (original, reconstruction)} of four clips. All of this rank.
    """
    device, seed = next(model.parameters()).device, args.protocol == "seed"
    values = {name: [torch.empty(0)] for name in ("psnr", "ssim", *networks) if name in args.metrics}
    if "rfvd" in values:
        values["rfvd"] = [torch.empty(0, 2, 400)]
    values["number"], grid = [torch.empty(0, dtype=torch.long)], {}
    counts = torch.zeros(model.config.vocabulary, dtype=torch.long, device=device)
    for clips, _, numbers in loader:
        n = len(clips)                                       # all batches have one shape, as for pictures
        clips = torch.cat([clips, clips[-1:].expand(args.batch_size - n, -1, -1, -1, -1)]).to(device)
        x = data.to_float(clips)                                                  # (B, 3, T, H, W)
        with torch.no_grad(), runtime.autocast(device, args.mixed_precision):
            ids = model.encode(x)                                                 # (B, t, h, w)
            y = model.decode(ids).float()                                         # (B, 3, T, H, W)
        require(bool(y[:n].isfinite().all()), f"the tokenizer's output is not finite with --mixed-precision "
                f"{args.mixed_precision}; use bf16 or fp32")
        y = y.clamp(-1, 1)
        original, pixels_y = to_pixels(x, "seed") if seed else clips, to_pixels(y, args.protocol)
        y = y if seed else data.to_float(pixels_y)
        frames = [clip.transpose(1, 2).flatten(0, 1) for clip in (x, y, original, pixels_y)]  # (BT, 3, H, W)
        values["number"].append(numbers)
        for name in values.keys() - {"number", "rfvd"}:
            if name in networks:
                each = networks[name](*frames[:2])                                # (BT,)
            else:
                each = {"psnr": psnr, "ssim": ssim}[name](*frames[2:], args.protocol)
            values[name].append(each.double().unflatten(0, (len(clips), -1)).mean(1)[:n].cpu())
        if "rfvd" in networks:
            features = [networks["rfvd"](i3d_input(clip.transpose(1, 2))) for clip in (original, pixels_y)]
            values["rfvd"].append(torch.stack(features, 1)[:n].cpu())             # (n, 2, 400)
        counts += ids[:n].flatten().bincount(minlength=len(counts))
        grid.update({k: (clips[j].cpu(), pixels_y[j].cpu()) for j, k in enumerate(numbers.tolist()) if k < 4})
    return {name: torch.cat(parts) for name, parts in values.items()}, counts, grid


def summarise_video(config, values, counts, grid, settings, began, args):
    """Merge what the ranks have measured; report it and paint a strip of frames. A collective."""
    numbers, seed = values.pop("number"), args.protocol == "seed"
    values = {name: gather_rows(rows, numbers) for name, rows in values.items()}
    n, counts = int(runtime.all_reduce_sum(torch.tensor(len(numbers)))), runtime.all_reduce_sum(counts)
    assert n == settings["n"], f"{n} clips were measured, expected {settings['n']}"
    grid = {k: pair for part in runtime.gather_objects(grid) for k, pair in part.items()}
    if not runtime.is_main():
        return
    pair = "truncated uint8" if seed else "rounded uint8"
    metrics, notes = {}, {name: f"{pair}, mean over frames" for name in ("psnr", "ssim")}
    notes |= {name: f"{'floats' if seed else pair}, mean over frames" for name in ("lpips-vgg", "lpips-alex")}
    if "rfvd" in values:
        real, made = values.pop("rfvd").unbind(1)                                 # (N, 400) each
        metrics["rfvd"] = frechet_of_features(real, made)
        notes["rfvd"] = f"{pair}, {n} clips of {config.frames} frames, float64"
        if seed:
            metrics["rfvd-float32"] = frechet_distance_float32(real, made)
            notes["rfvd-float32"] = "the same features with the official script's roundings"
        warn_if_few(n, 400, "rFVD", "clips")
    metrics |= {name: average(rows) for name, rows in values.items()}
    if "usage" in args.metrics:
        bits = np.log2(config.vocabulary)
        metrics |= codebook_metrics(counts, bits, n * config.frames * config.resolution ** 2)
        notes |= {"usage": f"{int(counts.sum())} tokens of {config.vocabulary} codes",
                  "perplexity": f"at most {config.vocabulary}", "bits_per_pixel": f"{bits:g} bits a token"}
    labels = {name: RANDOM_LABEL for name in metrics
              if settings["networks"].get(name.removesuffix("-float32")) == RANDOM_LABEL}
    stem = f"video-{stem_of(settings['checkpoint']['name'])}-{stem_of(settings['data']['name'])}"
    path = report(stem, metrics, notes, labels, settings, began, args)
    clips = [torch.stack([grid[k][i] for k in sorted(grid)]) for i in (0, 1)]
    rows = video.above_each_other(*clips)
    runtime.save_png(path.with_suffix(".png"), video.strip(rows, scale=max(1, 96 // config.resolution)))
    print(f"originals above reconstructions: {path.with_suffix('.png')}")


def video_generation(args):
    """`video-generation`: do generated clips look and move like real ones, and like all of them?

    FVD: the Frechet distance of I3D's logits on generated and on as many real clips. It sees motion and
    looks, but not whether a clip shows the class that was asked for. protocol seed: I3D as in the official
    script (eps 1e-5), its distance in float32 beside.
    """
    began, device = time.time(), start(args)
    path = args.samples or on_main(newest_samples)
    require(path, "no samples (*.npz) in runs/samples; draw some with sample.py --num-fid-samples, or name "
                  "some with --samples")
    samples = SampleArray(path, "(N, T, H, W, 3)")
    n, T, (height, width) = len(samples), samples.images.shape[1], samples.size
    require(height == width, f"{path} holds clips of {height} x {width}, those of --data-path are cropped to "
                             f"squares; make square ones")
    require(T >= 9, f"{path}: I3D needs clips of 9 frames or more, these have {T}")
    dataset = data.build_clips(args.data_path, args.split, width, T, seed=args.global_seed, start="center",
                               resize=args.resize, split_list=args.split_list)
    order = evenly_spaced(args.max_clips or n, len(dataset))
    require(min(n, len(order)) >= 2, f"FVD needs two clips or more of each kind, not {n} and {len(order)}")
    network, source = load_network("i3d", args, device)
    runtime.print_main(f"samples     {path}, {n} clips of {T} x {height} x {width}\n"
                       f"reference   {dataset.name}, {args.split} split, {len(order)} clips\n"
                       f"protocol    {args.protocol}, {runtime.world_size()} x {device.type}")
    generated = clip_features(network, samples, list(range(n)), args, "samples")
    real = clip_features(network, dataset, order, args, "reference")
    dataset.raise_if_broken(all_ranks=True)
    if not runtime.is_main():
        return
    metrics = {"fvd": frechet_of_features(real, generated)}
    notes = {"fvd": f"{len(generated)} samples, {len(real)} reference clips, {T} frames, float64"}
    if args.protocol == "seed":
        metrics["fvd-float32"] = frechet_distance_float32(real, generated)
        notes["fvd-float32"] = "the same features with the official script's roundings"
    warn_if_few(min(len(real), len(generated)), 400, "FVD", "clips")
    made_by = pathlib.Path(path).with_suffix(".json")
    settings = {"command": "video-generation", "n": n, "protocol": args.protocol,
                "samples": {"path": str(path), "size": [T, height, width], "sha256": runtime.sha256_of(path)},
                "sampling": json.loads(made_by.read_text()) if made_by.is_file() else None,
                "data": {"path": args.data_path, "name": dataset.name, "split": args.split, "n": len(real),
                         "split_list": args.split_list, "resize": args.resize,
                         "fingerprint": fingerprint(dataset, order)},
                "networks": {"fvd": source}, "precision": {"metrics": "fp32", "statistics": "fp64"},
                "random_weights_seed": 0 if args.allow_random_weights else None,
                "global_seed": args.global_seed, "device": device.type, "batch_size": args.batch_size}
    labels = dict.fromkeys(metrics, RANDOM_LABEL) if source == RANDOM_LABEL else {}
    report(f"video-generation-{stem_of(path)}", metrics, notes, labels, settings, began, args)


def clip_features(network, dataset, indices, args, title):
    """I3D's features (N, 400) of `dataset[indices]`, on rank 0, without broken clips. A collective."""
    device = next(network.parameters()).device
    features, numbers = [torch.empty(0, 400)], [torch.empty(0, dtype=torch.long)]
    for clips, _, batch in loader_of(dataset, indices, args, title):
        n = len(clips)                                       # all batches have one shape, as for pictures
        clips = torch.cat([clips, clips[-1:].expand(args.batch_size - n, -1, -1, -1, -1)]).to(device)
        with torch.no_grad():
            features.append(network(i3d_input(clips.transpose(1, 2)))[:n].cpu())
        numbers.append(batch)
    return gather_rows(torch.cat(features), torch.cat(numbers))


def frechet_of_features(x, y):
    """The Frechet distance of features (N, D) and (M, D), in float64."""
    statistics = [array for f in (x, y) for array in (f.double().mean(0), f.double().T.cov())]
    return frechet_distance(*(array.numpy() for array in statistics), len(x), len(y))


def read_reference(path, network, source, size, args):
    """Reference statistics out of an npz file, ours or ADM's: a dict on rank 0. A collective.

    ADM's files bring statistics of ImageNet's training set by the TensorFlow network, and 10,000 pictures,
    whose features precision and recall need; these are computed once, and cached beside the results. Raises
    `UserError` where statistics are of another network, or of pictures of another size.
    """
    require(pathlib.Path(path).is_file(), f"--reference {path} does not exist; download it, or make one with "
            f"`python evaluate.py make-reference`")
    known = ("mu", "sigma", "mu_s", "sigma_s", "n", "features")
    try:
        with np.load(path) as file:
            names = file.files
            stored = {name: file[name] for name in names if name in known}
            settings = json.loads(str(file["settings"])) if "settings" in names else None
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise runtime.UserError(f"--reference {path} is truncated or no npz ({error})") from None
    if settings:
        require(settings["inception"] == source, f"--reference {path} was made with other Inception weights "
                f"({settings['inception'][:16]}, now {source[:16]}); make it again")
        made_of = (settings["image_size"],) * 2
    else:
        require("arr_0" in names, f"--reference {path} holds {', '.join(names)} but no pictures (arr_0), so "
                f"it is not ADM's: statistics do not tell by which network and resize rule they were made")
        pictures = SampleArray(path)
        made_of = pictures.size
    require(made_of == size, f"--reference {path} is of pictures of {made_of}, the samples have {size}; "
            f"compare sets of one size (make-reference has --image-size)")
    if settings:
        return stored
    key = {"npz": on_main(runtime.sha256_of, path), "image_size": size[0], "inception": source,
           "resize_rule": "tf1", "feature_batch_size": args.feature_batch_size,
           "device": next(network.parameters()).device.type}
    cache = pathlib.Path(args.output) / "references" / f"npz-{short_hash(key)}.npz"
    everything = list(range(len(pictures)))
    computed = compute_reference(pictures, everything, key, network, cache, args, keep_images=False)
    # ADM's statistics belong to the published network. Where there are none, it takes those of arr_0; so do
    # we.
    if computed and source != RANDOM_LABEL and {"mu", "sigma", "mu_s", "sigma_s"} <= set(names):
        return {"features": computed["features"], **stored}
    return computed


def reference_of_data(args, image_size, count, network, source, device, path=None):
    """Statistics of `count` pictures of --data-path, cached under a key of everything that matters."""
    dataset = data.build_dataset(args.data_path, args.split, image_size, resize=args.resize)
    indices = evenly_spaced(count, len(dataset))
    key = {"name": dataset.name, "split": args.split, "image_size": image_size, "n": len(indices),
           "preprocessing": "shorter side by PIL's antialiased bilinear resize, centre crop",
           "resize_rule": "tf1", "data": on_main(fingerprint, dataset, indices), "inception": source,
           "device": device.type, "feature_batch_size": args.feature_batch_size}
    file = f"reference-{stem_of(dataset.name)}-{image_size}-{short_hash(key)}.npz"
    path = path or pathlib.Path(args.output) / "references" / file
    return compute_reference(dataset, indices, key, network, path, args)


def make_reference(args):
    """`make-reference`: the statistics of real pictures that `generation` compares with, in ADM's format."""
    device = start(args)
    network, source = load_network("inception", args, device)
    if source == RANDOM_LABEL:
        runtime.print_main(f"this reference is {RANDOM_LABEL}")
    reference_of_data(args, args.image_size, args.max_images, network, source, device, args.reference)


def newest_samples(folder="runs/samples"):
    """The newest npz file in `folder`, None where there is none."""
    paths = pathlib.Path(folder).glob("**/*.npz")
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def stored_samples(path, args):
    """Pictures in a file or folder: (their number, (H, W), batches (images, indices) of this rank, record).

    record: what the JSON says about them, with what sample.py has written beside its file. A collective.
    """
    samples, source = open_samples(path)
    n = len(samples)
    def digest():
        is_file = pathlib.Path(path).is_file()
        return runtime.sha256_of(path) if is_file else fingerprint(samples, list(range(n)))
    record = {"samples": {"path": str(path), "size": list(samples.size), "sha256": on_main(digest)}}
    made_by = pathlib.Path(path).with_suffix(".json")
    if made_by.is_file():
        record["sampling"] = json.loads(made_by.read_text())
    batches = ((images, indices) for images, _, indices in
               loader_of(samples, list(range(n)), args, "samples", source))
    return n, samples.size, batches, record


def drawn_samples(path, args, device):
    """The pictures that sample.py would write to an npz, drawn from checkpoint `path` and never stored.

    Returns the same as `stored_samples`. Numbers, seeds, defaults and batches are those of sample.py, every
    rank draws every R-th batch, and so the set depends neither on the ranks nor on --batch-size. (On a GPU a
    pixel may differ from sample.py's by a level, because convolutions here do without TF32.)
    """
    model, decoder, info = sample.load(path, args.tokenizer, args.raw_weights, args.trust_checkpoint)
    n = args.num_fid_samples = args.num_samples or (50_000 if info["source"] == "published" else 5_000)
    how, record = sample.plan(args, model, info, n, args.sampling_batch_size, device)
    size = how["batch_size"]
    runtime.print_main(f"drawing     {', '.join(f'{name} {value}' for name, value in how.items())}")
    dtype = runtime.AUTOCAST_DTYPES[args.mixed_precision] or torch.float32
    ar_model.prepare_for_sampling(model.to(device), dtype)
    parts = [list(range(first, min(first + size, n))) for first in range(0, n, size)]
    parts = parts[runtime.rank()::runtime.world_size()]
    numbers, classes = [number for part in parts for number in part], max(1, len(info["classes"]))
    images = sample.generate(model, decoder.to(device), [number % classes for number in numbers],
                             [(args.global_seed, number) for number in numbers], **how)
    bar = tqdm(images, "drawing", len(parts), unit="batch", disable=None if runtime.is_main() else True)
    require(decoder.unit == "images", f"{path} draws clips; draw them with sample.py --num-fid-samples, and "
                                      f"judge the npz with video-generation")
    sides = [side * decoder.config.downsampling for side in model.config.grid]
    record = {"samples": {"path": str(path), "size": sides, "sha256": info["sha256"]}, "sampling": record}
    return n, tuple(sides), ((batch, torch.tensor(part)) for batch, part in zip(bar, parts)), record


def generation(args):
    """`generation`: do generated pictures look like real ones, and like all of them (table 5)."""
    began, device = time.time(), start(args)
    given = [f"--{name.replace('_', '-')}" for name in DRAWING if getattr(args, name)]
    path = args.samples or (None if given else on_main(newest_samples))      # None: there is nothing drawn
    if path is None:
        path = args.ckpt or runtime.latest_checkpoint("runs/ar", "samples (*.npz) in runs/samples and no AR "
                                                                 "model")
        n, size, batches, made = drawn_samples(path, args, device)
    else:
        require(not given, f"--samples {path} is drawn already; --ckpt and the flags on how to draw (here "
                f"{', '.join(given)}) do not go with it")
        n, size, batches, made = stored_samples(path, args)
    require(n > 3, f"{path}: {n} pictures; generation metrics need four or more")
    require(args.reference or size[0] == size[1], f"{path} holds pictures of {size[0]} x {size[1]}, those of "
            f"--data-path are cropped to squares; give an npz with --reference")
    network, source = load_network("inception", args, device)
    runtime.print_main(f"samples     {path}, {n} pictures of {size[0]} x {size[1]}\n"
                       f"protocol    {args.protocol}, resize tf1, {runtime.world_size()} x {device.type}")
    if args.reference:
        reference = read_reference(args.reference, network, source, size, args)
    else:                                                              # as many real pictures as samples
        reference = reference_of_data(args, size[0], args.max_images or n, network, source, device)
    stream = FeatureStream(network, "tf1", args.feature_batch_size, torch.ones(n, dtype=torch.bool))
    for images, indices in batches:
        stream.add(images.to(device), indices)
    stream.finish()
    require(stream.moments.n == n, f"{n - stream.moments.n} pictures of {path} are broken; make them again")
    if not runtime.is_main():
        return
    settings = {"command": "generation", "n": n, "protocol": args.protocol, "resize_rule": "tf1", **made,
                "reference": {"path": args.reference or args.data_path, "n": int(reference.get("n", 0))},
                "networks": {"inception": source}, "precision": {"metrics": "fp32", "statistics": "fp64"},
                "random_weights_seed": 0 if args.allow_random_weights else None,
                "global_seed": args.global_seed,
                "device": device.type, "feature_batch_size": args.feature_batch_size}
    metrics, notes = generation_metrics(stream, reference, args)
    labels = dict.fromkeys(metrics, RANDOM_LABEL) if source == RANDOM_LABEL else {}
    report(f"generation-{stem_of(path)}", metrics, notes, labels, settings, began, args)


def generation_metrics(stream, reference, args):
    """FID, sFID, Inception Score, precision, recall, and notes on each, from the features of both sets."""
    n, real = stream.moments.n, int(reference["n"]) if "n" in reference else None
    warn_if_few(min(n, real or n), 2048, "FID")
    if n != 50_000:
        print(f"warning: published numbers are of 50,000 samples, these are of {n}")
    if real and real != n:
        print(f"warning: {n} samples are compared with {real} reference pictures; FID, precision and recall "
              f"depend on both numbers")
    logits, order = stream.logits, "file order"
    if args.protocol == "clean":
        order = f"shuffled with seed {args.global_seed}"
        logits = logits[torch.randperm(n, generator=torch.Generator().manual_seed(args.global_seed))]
    score, deviation, blocks = inception_score(logits)
    half = args.adm_fp16 or args.protocol == "seed"
    features = torch.as_tensor(reference["features"]).to(stream.device)
    precision, recall = precision_recall(features, stream.features.to(stream.device), half=half)
    mean, covariance = stream.moments.mean_and_covariance()
    mean_s, covariance_s = stream.spatial_moments.mean_and_covariance()
    fid = frechet_distance(reference["mu"], reference["sigma"], mean, covariance, real, n)
    sfid = frechet_distance(reference["mu_s"], reference["sigma_s"], mean_s, covariance_s, real, n)
    metrics = {"fid": fid, "sfid": sfid, "inception_score": score, "precision": precision, "recall": recall}
    sets = f"{n} samples, {real or 'stored statistics of the'} reference{' pictures' if real else ''}"
    balls = f"{n} samples, {len(features)} reference pictures, k = 3, {'fp16' if half else 'fp32'} distances"
    return metrics, {"fid": sets, "sfid": sets, "precision": balls, "recall": balls,
                     "inception_score": f"blocks of 5,000: {blocks}, std {deviation:.2f}, {order}"}


# ------------------------------------------------------------------------------------------------------------
# 6. The paper's tables. A row of ours ends with "@recipe", which says how to measure it
# ------------------------------------------------------------------------------------------------------------

TABLES = {
    1: ("Configurations of visual tokenizers in the Open-MAGVIT2 series",
        "Tokenizer | Training data | Codebook | Resolution | Temporal | Spatial ratio | in this code", """
        Open-MAGVIT2-I-In1k | ImageNet1k | 262144 | 256x256 | - | 16x16 | @in1k-256
        Open-MAGVIT2-I-In1k | ImageNet1k | 262144 | 128x128 | - | 8x8 | @in1k-128
        Open-MAGVIT2-I-PT | Image-text data | 16384 | 256x256 | - | 16x16 | @pt-256-2^14
        Open-MAGVIT2-I-PT | Image-text data | 262144 | 256x256 | - | 16x16 | @pt-256-2^18
        Open-MAGVIT2-V-UCF | UCF-101 | 262144 | 128x128 | 4 | 8x8 | -"""),
    2: ("Configurations of auto-regressive image generation models in the Open-MAGVIT2 series",
        "Model | Parameters | Inter-blocks | Intra-blocks | Width | Heads | in this code", """
        Open-MAGVIT2-AR-B | 343M | 24 | 2 | 1024 | 16 | @AR-B
        Open-MAGVIT2-AR-L | 804M | 36 | 3 | 1280 | 20 | @AR-L
        Open-MAGVIT2-AR-XL | 1.5B | 48 | 4 | 1536 | 24 | @AR-XL"""),
    3: ("Model designs and reconstruction performance, ImageNet 128 x 128 val (rFID) and UCF-101 (rFVD)",
        "Method | Tokens | Train resolution | LFQ | Large codebook | Up/down sampler | Deeper model | "
        "Adaptive GroupNorm | rFID | rFVD | measured here: rFID", """
        Open-MAGVIT2 | 16x16 | 128x128 | yes | yes | yes | yes | yes | 1.18 | 16.0 | @128
        MAGVIT2 | 16x16 | 128x128 | yes | yes | yes | yes | yes | 1.15 | 8.6 | -"""),
    4: ("Reconstruction performance of tokenizers on ImageNet 50k val and UCF-101 (+ trained on OpenImages, "
        "* 128 x 128 model used at 256 x 256, ++ without token compression)",
        "Method | Token type | Tokens | Ratio | Train resolution | Codebook | rFI(V)D | PSNR | Usage"
        " | measured here: rFID / PSNR / usage", """
        VQGAN | 2D | 16x16 | 16 | 256x256 | 1024 | 7.94 | 19.4 | - | -
        SD-VQGAN | 2D | 16x16 | 16 | 256x256 | 16384 | 5.15 | - | - | -
        MaskGIT | 2D | 16x16 | 16 | 256x256 | 1024 | 2.28 | - | - | -
        LlamaGen | 2D | 16x16 | 16 | 256x256 | 16384 | 2.19 | 20.79 | 97% | -
        Open-MAGVIT2-I-In1k | 2D | 16x16 | 16 | 256x256 | 262144 | 1.17 | 22.64 | 100% | @256
        ViT-VQGAN | 2D | 32x32 | 8 | 256x256 | 8192 | 1.28 | - | - | -
        VQGAN+ | 2D | 32x32 | 8 | 256x256 | 16384 | 1.19 | 23.38 | - | -
        SD-VQGAN+ | 2D | 32x32 | 8 | 256x256 | 16384 | 1.14 | - | - | -
        OmniTokenizer-VQ | 2D | 32x32 | 8 | 256x256 | 8192 | 1.11 | - | - | -
        LlamaGen | 2D | 32x32 | 8 | 256x256 | 16384 | 0.59 | 24.45 | - | -
        Open-MAGVIT2-I-In1k* | 2D | 32x32 | 8 | 128x128 | 262144 | 0.34 | 27.02 | 100% | @128at256
        TiTok-L | 1D | 32 | - | 256x256 | 4096 | 2.21 | - | - | -
        TiTok-B | 1D | 64 | - | 256x256 | 4096 | 1.70 | - | - | -
        TiTok-S | 1D | 128 | - | 256x256 | 4096 | 1.71 | - | - | -
        TATS (video) | 2D | 4x16x16 | 8 | 128x128 | 16384 | 162 | - | - | -
        MAGVIT (video) | 2D | 4x16x16 | 8 | 128x128 | 1024 | 25 | - | - | -
        SweetTokenizer (video) | 1D | 256+1024 | - | 256x256 | 10481+11139 | 44 | - | - | -
        LARP-L (video) | 1D | 1024 | - | 128x128 | 8192 | 24 | - | - | -
        LARP-L-Long (video) | 1D | 1024 | - | 128x128 | 8192 | 20 | - | - | -
        SweetTokenizer++ (video) | 1D | 5120 | - | 256x256 | 10481+11139 | 18 | - | - | -
        Open-MAGVIT2-V-UCF (video) | 2D | 5x16x16 | 8 | 128x128 | 262144 | 16 | - | 100% | -"""),
    5: ("Class-conditional generation on ImageNet 256 x 256 (* generated at 384 x 384, then resized)",
        "Type | Model | Parameters | FID | IS | Precision | Recall | "
        "measured here: FID / IS / precision / recall", """
        Diffusion | ADM | 554M | 10.94 | 101.0 | 0.69 | 0.63 | -
        Diffusion | CDM | - | 4.88 | 158.7 | - | - | -
        Diffusion | LDM-4 | 400M | 3.60 | 247.7 | - | - | -
        Diffusion | DiT-XL/2 | 675M | 2.27 | 278.2 | 0.83 | 0.57 | -
        AR | VQGAN | 227M | 18.65 | 80.4 | 0.78 | 0.26 | -
        AR | VQGAN | 1.4B | 15.78 | 74.3 | - | - | -
        AR | VQGAN-re | 1.4B | 5.20 | 280.3 | - | - | -
        AR | ViT-VQGAN | 1.7B | 4.17 | 175.1 | - | - | -
        AR | ViT-VQGAN-re | 1.7B | 3.04 | 227.4 | - | - | -
        AR | RQTran. | 3.8B | 7.55 | 134.0 | - | - | -
        AR | RQTran.-re | 3.8B | 3.80 | 323.7 | - | - | -
        VAR | VAR-d16 | 310M | 3.30 | 274.4 | 0.84 | 0.51 | -
        VAR | VAR-d20 | 600M | 2.57 | 302.6 | 0.83 | 0.56 | -
        VAR | VAR-d24 | 1.0B | 2.09 | 312.9 | 0.82 | 0.59 | -
        VAR | VAR-d30 | 2.0B | 1.92 | 323.1 | 0.82 | 0.59 | -
        AR | LlamaGen-L* | 343M | 3.07 | 256.06 | 0.83 | 0.52 | -
        AR | LlamaGen-XL* | 775M | 2.62 | 244.08 | 0.80 | 0.57 | -
        AR | LlamaGen-XXL* | 1.4B | 2.34 | 253.90 | 0.80 | 0.59 | -
        AR | LlamaGen-L | 343M | 3.80 | 248.28 | 0.83 | 0.51 | -
        AR | LlamaGen-XL | 775M | 3.39 | 227.08 | 0.81 | 0.54 | -
        AR | LlamaGen-XXL | 1.4B | 3.09 | 253.61 | 0.83 | 0.53 | -
        AR | Open-MAGVIT2-AR-B | 343M | 3.08 | 258.26 | 0.85 | 0.51 | @arB
        AR | Open-MAGVIT2-AR-L | 804M | 2.51 | 271.70 | 0.84 | 0.54 | @arL
        AR | Open-MAGVIT2-AR-XL | 1.5B | 2.33 | 271.77 | 0.84 | 0.54 | @arXL"""),
    6: ("Zero-shot reconstruction on MS-COCO val2017 and ImageNet 50k val (+ started from an ImageNet model)",
        "Size | Method | Quant. | Data | Ratio | Codebook | COCO rFID | PSNR | SSIM | IN rFID | PSNR | SSIM |"
        " measured here: rFID / PSNR / SSIM", """
        256 | LlamaGen+ | VQ | 70M | 16 | 16384 | 8.40 | 20.28 | 0.55 | 2.47 | 20.65 | 0.54 | -
        256 | Show-o | LFQ | 35M | 16 | 8192 | 9.26 | 20.90 | 0.59 | 3.50 | 21.34 | 0.59 | -
        256 | Cosmos | FSQ | - | 16 | 64000 | 11.97 | 19.22 | 0.48 | 4.57 | 19.93 | 0.49 | -
        256 | Open-MAGVIT2-I-PT | LFQ | 100M | 16 | 16384 | 7.93 | 22.21 | 0.62 | 2.55 | 22.21 | 0.62 | @14
        256 | Open-MAGVIT2-I-PT | LFQ | 100M | 16 | 262144 | 6.76 | 22.31 | 0.65 | 1.67 | 22.70 | 0.64 | @18
        orig | Cosmos | FSQ | - | 16 | 64000 | 7.51 | 20.45 | 0.52 | 1.93 | 20.56 | 0.51 | -
        orig | Cosmos | FSQ | - | 16 | 64000 | 7.23 | 20.45 | 0.53 | 2.52 | 20.49 | 0.52 | -
        orig | Open-MAGVIT2-I-PT | LFQ | 100M | 16 | 16384 | 6.65 | 21.61 | 0.57 | 1.39 | 21.74 | 0.56 | @14o
        orig | Open-MAGVIT2-I-PT | LFQ | 100M | 16 | 262144 | 5.10 | 22.18 | 0.60 | 0.78 | 22.24 | 0.59 | @18o
        """),
}
TABLE_METRICS = {3: ("rfid",), 4: ("rfid", "psnr", "usage"), 6: ("rfid", "psnr", "ssim"),
                 5: ("fid", "inception_score", "precision", "recall")}
TABLE_NOTES = {4: "The authors' repository lists PSNR 21.90 and 26.19 for its released 16x and 8x "
                  "checkpoints, where the paper has 22.64 and 27.02."}
PUBLISHED = {                   # file: its repository, and our preset that trains the same
    "imagenet_256_L.ckpt": ("Open-MAGVIT2-Tokenizer-256-resolution", "in1k-256"),
    "imagenet_128_L.ckpt": ("Open-MAGVIT2-Tokenizer-128-resolution", "in1k-128"),
    "pretrain256_262144.ckpt": ("Open-MAGVIT2-Tokenizer-262144-Pretrain", "pt-256-2^18"),
    "pretrain256_16384.ckpt": ("Open-MAGVIT2-Tokenizer-16384-Pretrain", "pt-256-2^14"),
    "AR_256_B.ckpt": ("Open-MAGVIT2-AR-B-256-resolution", "AR-B"),
    "AR_256_L.ckpt": ("Open-MAGVIT2-AR-L-256-resolution", "AR-L"),
    "AR_256_XL.ckpt": ("Open-MAGVIT2-AR-XL-256-resolution", "AR-XL"),
}
RECIPES = {                     # recipe: published file, flags that name the data, picture size
    "128": ("imagenet_128_L.ckpt", ("imagenet",), 128),
    "128at256": ("imagenet_128_L.ckpt", ("imagenet",), 256),
    "256": ("imagenet_256_L.ckpt", ("imagenet",), 256),
    "14": ("pretrain256_16384.ckpt", ("coco", "imagenet"), 256),
    "18": ("pretrain256_262144.ckpt", ("coco", "imagenet"), 256),
    "14o": ("pretrain256_16384.ckpt", ("coco", "imagenet"), "original"),
    "18o": ("pretrain256_262144.ckpt", ("coco", "imagenet"), "original"),
    "arB": ("AR_256_B.ckpt", ("reference",), 256),
    "arL": ("AR_256_L.ckpt", ("reference",), 256),
    "arXL": ("AR_256_XL.ckpt", ("reference",), 256),
}


def configuration_cell(name):
    """What a preset of this code has, for tables 1 and 2: computed, not copied."""
    if name in tokenizer.PRESETS:
        config = tokenizer.PRESETS[name]
        return f"{config.vocabulary} codes, {config.resolution}x{config.resolution}, {config.downsampling}x"
    config = ar_model.PRESETS[name]
    with torch.device("meta"):                                         # shapes without memory
        parameters = sum(p.numel() for p in ar_model.ARModel(config).parameters())
    shape = (config.inter_blocks, config.intra_blocks, config.width, config.heads)
    return f"{parameters / 1e6:.2f}M, {', '.join(map(str, shape))}"


def find_result(results, file, path, size, protocol):
    """The newest result of this checkpoint, or of our training of its preset, on these data at this size."""
    def fits(result):
        made = result.get("checkpoint") or result.get("sampling", {}).get("checkpoint", {})
        ours = made.get("name") not in PUBLISHED and made.get("preset") == PUBLISHED[file][1]
        measured_on = result.get("data") or result.get("reference")
        return ((ours or made.get("name") == file) and result.get("protocol") == protocol
                and measured_on["path"] and os.path.abspath(measured_on["path"]) == os.path.abspath(path)
                and measured_on.get("size", size) == size and RANDOM_LABEL not in result["networks"].values())
    return max(filter(fits, results), key=lambda result: result["date"], default=None)


def measuring_command(file, path, size, args):
    """The command that measures a row, as one would type it."""
    checkpoint = pathlib.Path(args.weights_dir).expanduser() / file
    protocol = "" if args.protocol == "clean" else f" --protocol {args.protocol}"
    if file.startswith("AR"):
        return (f"python sample.py --ckpt {checkpoint} --num-fid-samples 50000 && "
                f"python evaluate.py generation --reference {path}{protocol}")
    size = "--original-resolution" if size == "original" else f"--image-size {size}"
    return (f"python evaluate.py reconstruction --ckpt {checkpoint} --data-path {path} {size} "
            f"--metrics rfid psnr ssim usage{protocol}")


def measured_cell(number, recipe, results, args):
    """The cell of a row of ours, and the commands for what has not been measured yet."""
    file, flags, size = RECIPES[recipe]
    cells, commands = [], []
    for flag in flags:
        path = getattr(args, flag)
        result = find_result(results, file, path, size, args.protocol)
        entries = result["metrics"] if result else {}
        if not all(metric in entries for metric in TABLE_METRICS[number]):
            commands.append(measuring_command(file, path, size, args))
        if result:
            values = [METRICS[metric][1].format(float(entries[metric]["value"])) if metric in entries else "-"
                      for metric in TABLE_METRICS[number]]
            prefix = f"{flag} " if len(flags) > 1 else ""
            cells.append(f"{prefix}{' / '.join(values)} ({result['n']} pictures, {args.protocol})")
    return "; ".join(cells) or "not yet", commands


def table(args):
    """`table N`: the paper's table, and beside our rows what was measured here, or how to measure it."""
    runtime.setup_process_group("cpu")
    title, header, text = TABLES[args.number]
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    recipes = [row[-1].removeprefix("@") if row[-1].startswith("@") else None for row in rows]
    if args.download:
        for file in dict.fromkeys(RECIPES[recipe][0] for recipe in recipes if recipe in RECIPES):
            url = f"https://huggingface.co/TencentARC/{PUBLISHED[file][0]}/resolve/main/{file}"
            runtime.print_main(f"checkpoint  {runtime.fetch(url, args.weights_dir)}")
    results = [json.loads(path.read_text()) for path in pathlib.Path(args.output).glob("*.json")]
    commands = []
    for row, recipe in zip(rows, recipes):
        if recipe in RECIPES:
            row[-1], missing = measured_cell(args.number, recipe, results, args)
            commands += missing
        elif recipe:
            row[-1] = configuration_cell(recipe)
    runtime.print_main(f"Table {args.number}. {title}\n")
    runtime.print_table(rows, [cell.strip() for cell in header.split("|")])
    if args.number in TABLE_NOTES:
        runtime.print_main(f"\n{TABLE_NOTES[args.number]}")
    if commands:
        hint = "" if args.download else " (--download fetches the checkpoints)"
        runtime.print_main(f"\nTo measure what is missing{hint}:\n  " + "\n  ".join(commands))


def everything(args):
    """No command: judge what the earlier stages have left in runs/, as far as that needs no download."""
    reconstruction(args)
    if any(pathlib.Path("runs/samples").glob("**/*.npz")):
        runtime.print_main("\nruns/samples holds generated pictures too. FID and the like need a download of "
                           "96 MB: python evaluate.py generation")


def add_common_flags(parser):
    """Flags of every command that looks at pictures."""
    group = parser.add_argument_group("computing")
    group.add_argument("--weights-dir", default=runtime.default_weights_dir(), help="where downloads go")
    group.add_argument("--allow-random-weights", action="store_true",
                       help="seeded random weights in the metrics' networks; marks numbers as not comparable")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    group.add_argument("--batch-size", type=runtime.positive_int, default=16, help="pictures a batch")
    group.add_argument("--feature-batch-size", type=runtime.positive_int,
                       help="pictures an Inception batch (64 on a GPU, 8 on a CPU)")
    group.add_argument("--num-workers", type=runtime.non_negative_int, default=0, help="reading processes")
    group.add_argument("--output", default="runs/evaluation", help="folder for JSON, grid and statistics")


def add_data_flags(parser, split, path, count):
    """Flags that choose real pictures. path, count: what they are if the flag is not given, in words."""
    group = parser.add_argument_group("real pictures")
    group.add_argument("--data-path", help=f"folder, tar shards, generated or generated-plain ({path})")
    group.add_argument("--split", choices=data.SPLITS, default=split, help="part of the data set")
    group.add_argument("--max-images", type=runtime.positive_int, help=f"how many, evenly spaced ({count})")
    group.add_argument("--resize", type=runtime.positive_int,
                       help="shorter side before the crop, for small crops of large pictures")
    return group


def add_clip_flags(parser, path, split, split_text, count):
    """Flags that choose real clips, and the common ones. The texts: what each is if the flag is not given."""
    group = parser.add_argument_group("real clips")
    group.add_argument("--data-path", help=f"folder of videos, or generated ({path})")
    group.add_argument("--split", choices=data.SPLITS, default=split, help=f"part of the data ({split_text})")
    group.add_argument("--split-list", help="official UCF-101 list of the clips to use, as testlist01.txt")
    group.add_argument("--max-clips", type=runtime.positive_int, help=f"how many, evenly spaced ({count})")
    group.add_argument("--resize", type=runtime.positive_int,
                       help="shorter side before the crop, for small crops of large videos")
    add_common_flags(parser)
    parser.set_defaults(batch_size=4)                                  # clips are larger than pictures


def add_protocol_flag(parser):
    """The flag that decides how numbers are to be read."""
    parser.add_argument("--protocol", choices=("clean", "seed"), default="clean",
                        help="clean, or what the published numbers were made with, quirks included")


def get_args(argv=None):
    """Parse the command line; no command at all means "judge what is in runs/"."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = runtime.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("reconstruction", help="judge a tokenizer", description=reconstruction.__doc__)
    p.add_argument("--ckpt", help="tokenizer checkpoint, ours or published; the newest of runs/tokenizer")
    p.add_argument("--raw-weights", action="store_true", help="the raw weights, not their average (EMA)")
    p.add_argument("--trust-checkpoint", action="store_true", help="unpickle foreign classes in --ckpt")
    p.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="fp32",
                   help="precision of the tokenizer; that of the metrics is always fp32")
    p.add_argument("--metrics", nargs="+", choices=(*LOCAL_METRICS, *NETWORK_METRICS, "all"),
                   default=LOCAL_METRICS, help="what to measure; usage brings perplexity and bits per pixel")
    add_protocol_flag(p)
    group = add_data_flags(p, "val", "that of --ckpt, if it is ours, else generated", "all")
    group.add_argument("--image-size", type=runtime.positive_int, help="side of the crops (the tokenizer's)")
    group.add_argument("--original-resolution", action="store_true", help="no resizing; pads to whole tokens")
    add_common_flags(p)

    p = commands.add_parser("video", help="judge a tokenizer of clips",
                            description=video_reconstruction.__doc__)
    p.add_argument("--ckpt", help="video tokenizer checkpoint, ours or published; the newest of runs/video")
    p.add_argument("--raw-weights", action="store_true", help="the raw weights, not their average (EMA)")
    p.add_argument("--trust-checkpoint", action="store_true", help="unpickle foreign classes in --ckpt")
    p.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="fp32",
                   help="precision of the tokenizer; that of the metrics is always fp32")
    p.add_argument("--metrics", nargs="+", choices=(*LOCAL_METRICS, *VIDEO_METRICS, "all"),
                   default=LOCAL_METRICS, help="what to measure; usage brings perplexity and bits per pixel")
    p.add_argument("--global-seed", type=runtime.non_negative_int, default=0,
                   help="for random crops and repeated clips of protocol seed, and generated clips")
    add_protocol_flag(p)
    add_clip_flags(p, "that of --ckpt, if it is ours", None, "clean: test, seed: train", "all")

    p = commands.add_parser("video-generation", help="judge generated clips",
                            description=video_generation.__doc__)
    p.add_argument("--samples", help="npz with arr_0 (N, T, H, W, 3); the newest of runs/samples")
    p.add_argument("--global-seed", type=runtime.non_negative_int, default=0, help="of generated real clips")
    add_protocol_flag(p)
    add_clip_flags(p, "generated", "train", "train, as for pictures", "as many as samples")

    p = commands.add_parser("generation", help="judge generated pictures", description=generation.__doc__)
    p.add_argument("--samples", help="npz with arr_0, or folder; not given: drawn from --ckpt, or else the "
                                     "newest npz of runs/samples, or else drawn from the newest of runs/ar")
    p.add_argument("--reference", help="npz, ADM's or of make-reference; made of --data-path if not given")
    p.add_argument("--global-seed", type=runtime.non_negative_int, default=0,
                   help="for drawing and for shuffling")
    p.add_argument("--adm-fp16", action="store_true",
                   help="float16 distances for precision and recall, like ADM and protocol seed")
    add_protocol_flag(p)
    p.add_argument("--num-samples", type=runtime.positive_int,
                   help="how many to draw (50,000 of a published checkpoint, 5,000 of ours)")
    sample.add_drawing_flags(p, "--sampling-batch-size")
    add_data_flags(p, "train", "generated", "as many as samples")
    add_common_flags(p)

    p = commands.add_parser("make-reference", help="real statistics", description=make_reference.__doc__)
    p.add_argument("--reference", help="npz file to write; named after its content if not given")
    group = add_data_flags(p, "train", "generated", "all")
    group.add_argument("--image-size", type=runtime.positive_int, default=256, help="side of the crops")
    add_common_flags(p)

    p = commands.add_parser("table", help="one of the paper's tables", description=table.__doc__)
    p.add_argument("number", type=int, choices=TABLES, help="1 to 6")
    p.add_argument("--imagenet", default="data/imagenet", help="folder of ImageNet, with val/")
    p.add_argument("--coco", default="data/coco/val2017", help="folder of MS-COCO val2017")
    p.add_argument("--reference", default="VIRTUAL_imagenet256_labeled.npz", help="ADM's npz, for table 5")
    p.add_argument("--download", action="store_true", help="fetch the table's published checkpoints first")
    p.add_argument("--weights-dir", default=runtime.default_weights_dir(), help="where downloads are kept")
    p.add_argument("--output", default="runs/evaluation", help="folder with the JSON files of earlier runs")
    add_protocol_flag(p)

    args = parser.parse_args(argv or ["reconstruction"])
    args.command = args.command if argv else "everything"
    if "all" in getattr(args, "metrics", ()):
        networks = VIDEO_METRICS if args.command == "video" else NETWORK_METRICS
        args.metrics = (*LOCAL_METRICS, *networks)
    return args


def main(args):
    """Run the command."""
    {"everything": everything, "reconstruction": reconstruction, "generation": generation,
     "video": video_reconstruction, "video-generation": video_generation,
     "make-reference": make_reference, "table": table}[args.command](args)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
