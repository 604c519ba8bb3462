"""Every metric as a lecture: what it sees, what it misses, what has caught people, what others print for it.

Pure functions on tensors, and the networks behind some of them, with random weights: checkpoints.py fills in
the published ones. B images, T frames of a clip, N of a set, H W their size, D features.
"""
import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from support.runtime import require

# ---- 1. Pixels and ids: what one image and its reconstruction, or one bag of tokens, can tell --------------

def as_frames(x):
    """Clips (B, 3, T, H, W) to their frames (B * T, 3, H, W); images (B, 3, H, W) stay what they are."""
    require(x.dim() in (4, 5) and x.shape[1] == 3, f"{list(x.shape)}: no images or clips (B, 3, [T,] H, W)")
    return x.transpose(1, 2).flatten(0, 1) if x.dim() == 5 else x


def check_pair(reference, images):
    """Raise `UserError` unless both are uint8 (B, 3, H, W) of the same shape."""
    require(reference.dtype == images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3,
            f"pixel metrics take uint8 images (B, 3, H, W), not {str(images.dtype)[6:]} {list(images.shape)}")
    require(reference.shape == images.shape,
            f"images of {list(images.shape)} cannot be compared with images of {list(reference.shape)}")


def psnr(reference, images):
    """Peak signal-to-noise ratio in dB of uint8 images (B, 3, H, W) against `reference`: (B,), float64.

    Sees: the mean squared error, on a log scale; 6 dB more are half the distance. Misses: structure. A
    blurred lawn beats a crisp one whose blades are shifted by a pixel, so a tokenizer trained without a GAN
    wins here and looks worse. Traps: average the dB of images, not, as torchmetrics, their errors, or a few
    hard images decide (27.75 for 28.63). A file compared with itself has infinite PSNR (piq: 80)."""
    check_pair(reference, images)
    error = (reference.int() - images.int()).square().double()           # exact
    return 10 * (255 ** 2 / error.mean((1, 2, 3))).log10()


def window_sums(x):
    """Sums over 7 x 7 windows: (.., H, W) to (.., H - 6, W - 6). As 4 + 2 + 1: 6 times faster than pools."""
    for dim in (-1, -2):
        n = x.shape[dim]
        twos = x.narrow(dim, 0, n - 1) + x.narrow(dim, 1, n - 1)
        fours = twos.narrow(dim, 0, n - 3) + twos.narrow(dim, 2, n - 3)
        x = fours.narrow(dim, 0, n - 6) + twos.narrow(dim, 4, n - 6) + x.narrow(dim, 6, n - 6)
    return x


def ssim(reference, images):
    """Structural similarity (Wang et al., 2004) of uint8 images (B, 3, H, W) to `reference`: (B,), float64.

    scikit-image's version, as in the paper: uniform 7 x 7 windows, unbiased variances, channel by channel.
    Sees: in each window, whether brightness, contrast and pattern agree. Misses: what lies outside the
    window, and colour as such. Trap: there are many SSIMs. For 0.8966 here, an 11 x 11 Gaussian window gives
    0.8890, torchmetrics since 1.4.2 0.8899 (it counts a reflected border); piq halves images of 384 pixels
    and more (0.955 for 0.892); too large a data_range flatters (LlamaGen's 2 for [0, 1]: 0.675 for 0.54)."""
    check_pair(reference, images)
    require(min(images.shape[2:]) >= 7, f"SSIM needs images of 7 x 7 or more, not {list(images.shape[2:])}")
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    # A few channels at a time keep the intermediate maps in a CPU's cache, which doubles the speed.
    size = max(1, 2 ** (16 if images.device.type == "cpu" else 24) // images[0, 0].numel())
    means = []
    for x, y in zip(reference.flatten(0, 1).split(size), images.flatten(0, 1).split(size)):
        x = x.int()                                                      # (channels, H, W), sums are exact
        y = y.int()
        mean_x = window_sums(x).double() / 49                            # (channels, H - 6, W - 6)
        mean_y = window_sums(y).double() / 49
        squares = mean_x * mean_x + mean_y * mean_y
        product = mean_x * mean_y
        variances = (window_sums(x * x + y * y).double() / 49 - squares) * (49 / 48)          # x's plus y's
        covariance = (window_sums(x * y).double() / 49 - product) * (49 / 48)
        similarity = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
        means.append(similarity.mean((1, 2)))
    return torch.cat(means).unflatten(0, images.shape[:2]).mean(1)


def codebook_usage(counts):
    """How well ids are used. counts ([G,] V): how often each occurred; figures of G groups are averaged.

    usage: the fraction that occurred at all. Sees dead ids, but one used once counts as much as one used a
    million times. Trap: it grows with the images: 2^18 ids need all 50,000 of ImageNet val.
    perplexity: 2^entropy of the frequencies: an evenly used codebook of this size would carry as much."""
    p = counts.double() / counts.sum(-1, keepdim=True)
    perplexity = (-torch.xlogy(p, p).sum(-1)).exp()
    return {"usage": float((counts > 0).double().mean()), "perplexity": float(perplexity.mean())}


def total_variation(counts, others):
    """Half the sum of |p - q| over the ids of two bags of tokens, given as counts ([G,] V): in 0 .. 1.

    Sees: ids, and so colours and textures, that one bag has more often; 1 says that it shares none. Misses:
    where they stand, and which go together: tokens of real images, shuffled, have distance 0. Trap: two bags
    of one distribution are at a distance, too, a large one where ids are many and tokens few: read it beside
    that of two equal sets of real images."""
    p, q = [each.double() / each.sum(-1, keepdim=True) for each in (counts, others)]
    return float((p - q).abs().sum(-1).mean() / 2)


# ---- 2. LPIPS ----------------------------------------------------------------------------------------------

# Which ReLU layers in torchvision's .features are looked at, and their channels.
LPIPS_TAPS = {"vgg": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
              "alex": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}}


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al., 2018), version 0.1, of images in [-1, 1].

    Five feature maps of a frozen classifier, each position normalised to unit length; squared differences,
    weighted by one learned weight a channel, are averaged. Trap: in [0, 1] images seem far too similar."""

    def __init__(self, net="vgg"):
        super().__init__()
        build = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[net]
        self.taps = LPIPS_TAPS[net]
        self.features = build(weights=None).features[:max(self.taps) + 1]
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False                            # or it would overwrite what the tap has kept
        self.heads = nn.ParameterList(torch.rand(1, width, 1, 1) for width in self.taps.values())
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def taps_of(self, x):
        """x (B, 3, H, W) in [-1, 1] to five unit-length feature maps (B, C_l, H_l, W_l) in fp32."""
        h = (x - self.shift) / self.scale
        maps = []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                f = h.float()
                maps.append(f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps

    def forward(self, x, y):
        """Distances (B,) of two batches of images (B, 3, H, W) in [-1, 1], differentiable in both."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            maps_x = self.taps_of(x)                             # a target needs no graph: half of the memory
        return sum((w * (fx - fy).square()).sum(1).mean((1, 2))
                   for w, fx, fy in zip(self.heads, maps_x, self.taps_of(y)))


# ---- 3. Networks: "similar" as a classifier sees it --------------------------------------------------------

def resize_tf1(images, size=299):
    """Bilinear resize as TensorFlow 1 did it: float (B, C, H, W) to (B, C, size, size).

    Output pixel i reads from i * in / out, without the half-pixel shift that makes the grids' centres meet,
    and without antialiasing: wrong by up to half a pixel, and part of FIDs like ADM's."""
    for dim in (-1, -2):                                               # x first: the order of roundings
        n = images.shape[dim]
        position = torch.arange(size, device=images.device) * torch.tensor(n / size, device=images.device)
        low = position.long()
        weight = position - low if dim == -1 else (position - low)[:, None]
        below = images.index_select(dim, low)
        above = images.index_select(dim, (low + 1).clamp(max=n - 1))
        images = below + (above - below) * weight
    return images


def inception_input(images, rule):
    """uint8, or float in [0, 1], (B, 3, H, W) to what Inception takes: (B, 3, 299, 299) in about [-1, 1].

    rule "half-pixel"              pytorch-fid, the official rFID: bilinear, no antialiasing, 2x - 1
         "half-pixel-antialiased"  the same, but a side of more than 299 pixels is shrunk without aliasing
         "tf1"                     ADM, torch-fidelity: TensorFlow's old rule on 0..255, (k - 128) / 128
    Statistics of two rules do not compare: 256 x 256 images differ by up to 18 levels. Aspect is ignored."""
    if rule == "tf1":
        require(images.dtype == torch.uint8, f"rule tf1 takes uint8 images, not {str(images.dtype)[6:]}")
        return (resize_tf1(images.float()) - 128) / 128
    if images.dtype == torch.uint8:                    # by a tensor: a GPU turns a number into its inverse
        images = images.float() / torch.full((), 255.0, device=images.device)
    return 2 * F.interpolate(images, (299, 299), mode="bilinear", align_corners=False,
                             antialias=rule == "half-pixel-antialiased") - 1


class FIDInception(torchvision.models.Inception3):
    """The Inception-v3 of 2015 that FID is defined by: 1008 outputs, averages that do not count the padding,
    a maximum in the very last block. Accidents of one TensorFlow file, but part of the metric: torchvision's
    own weights and pooling give another number that is sometimes published as FID."""

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)

    def mix(self, x, *names):
        """x through these blocks, with the right pooling branch, which is the last of each."""
        for name in names:
            block = getattr(self, name)
            if name == "Mixed_7c":
                pooled = F.max_pool2d(x, 3, stride=1, padding=1)
            else:
                pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            x = torch.cat([*block._forward(x)[:-1], block.branch_pool(pooled)], 1)
        return x

    def forward(self, x):
        """x (B, 3, 299, 299) in [-1, 1] to features (B, 2048), spatial ones (B, 2023), logits (B, 1008)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))             # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))                  # (B, 192, 71, 71)
        x = self.mix(self.maxpool2(x), "Mixed_5b", "Mixed_5c", "Mixed_5d")            # (B, 288, 35, 35)
        x = self.mix(self.Mixed_6a(x), "Mixed_6b", "Mixed_6c")                        # (B, 768, 17, 17)
        # sFID: 7 channels of a branch, position by position (H, W, C), as stored statistics have them
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)    # (B, 17 * 17 * 7)
        x = self.mix(x, "Mixed_6d", "Mixed_6e")                                       # (B, 768, 17, 17)
        x = self.mix(self.Mixed_7a(x), "Mixed_7b", "Mixed_7c")                        # (B, 2048, 8, 8)
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
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=eps)

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C', T / s, H / s, W / s), rounded up."""
        return F.relu(self.bn(self.conv3d(same_pad(x, self.conv3d.kernel_size, self.conv3d.stride))))


def max_pool(x, kernel, stride):
    """SAME max-pooling. Padding with 0 is as good as with -inf: everything here comes out of a ReLU."""
    return F.max_pool3d(same_pad(x, kernel, stride), kernel, stride)


class Mixed3D(nn.Module):
    """Inception block: 1x1x1 | 1x1x1 - 3x3x3 | 1x1x1 - 3x3x3 | max-pool - 1x1x1, of these six widths."""

    def __init__(self, in_channels, widths, eps):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit3D(in_channels, b0, 1, eps)
        self.b1a = Unit3D(in_channels, b1a, 1, eps)
        self.b1b = Unit3D(b1a, b1b, 3, eps)
        self.b2a = Unit3D(in_channels, b2a, 1, eps)
        self.b2b = Unit3D(b2a, b2b, 3, eps)
        self.b3b = Unit3D(in_channels, b3b, 1, eps)

    def forward(self, x):
        """x (B, C, T, H, W) to (B, b0 + b1b + b2b + b3b, T, H, W)."""
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """Inflated Inception, trained on Kinetics-400 (Carreira and Zisserman, 2017): FVD's eye. eps of its
    BatchNorms: 1e-3 in the TensorFlow graph that defines FVD and in StyleGAN-V's port, 1e-5 in the official
    script's and cd-fvd's. Clips matter more: StyleGAN-V takes 2,048 of 16 frames, of train and test."""
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
            self.add_module(f"Mixed_{name}", Mixed3D(channels, widths, eps))
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
    """uint8 clips (B, 3, T, H, W) to (B, 3, T, 224, 224) in [-1, 1]: bilinear, not antialiased."""
    require(clips.dtype == torch.uint8 and clips.dim() == 5,
            f"I3D looks at uint8 clips (B, 3, T, H, W), not {str(clips.dtype)[6:]} {list(clips.shape)}")
    frames = F.interpolate(as_frames(clips).float(), (224, 224), mode="bilinear", align_corners=False)
    return (2 * frames / 255 - 1).unflatten(0, (len(clips), -1)).transpose(1, 2)


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


# ---- 4. Sets: what a set of images as a whole can tell -----------------------------------------------------

def check_finite(*sets):
    """Raise `UserError` where features are NaN or infinite: comparisons, clamps and `max` would hide it."""
    for i, features in enumerate(sets, 1):
        wrong = torch.as_tensor(features).isfinite().logical_not().nonzero().tolist()
        require(not wrong, f"features of set {i} are not finite, first at {wrong[:1]}; an image or a weight "
                           f"is damaged, or half precision overflowed")


def check_sets(x, y, least=2):
    """Raise `UserError` unless both are finite features (N, D), (M, D) of `least` images or more."""
    require(x.dim() == y.dim() == 2 and x.shape[1] == y.shape[1],
            f"features of {list(x.shape)} and {list(y.shape)} cannot be compared")
    require(min(len(x), len(y)) >= least, f"sets of {len(x)} and {len(y)}: use more than {least - 1} images")
    check_finite(x, y)


class Moments:
    """Mean and covariance of a stream of features (.., D): n, sum of f, sum of f f^T, which merge over ranks.
    In float64, as a covariance is a small difference of large numbers."""

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

    def mean_and_covariance(self):
        """numpy mean (D,) and unbiased covariance (D, D)."""
        require(self.n >= 2, f"a covariance needs two images or more, there is {self.n}")
        mean = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


def root_of(mean, covariance):
    """R (D, rank) with R R^T = `covariance` (D, D), by a pivoted Cholesky decomposition; numpy float64.

    A covariance of n vectors has rank n - 1 at most; further eigenvalues are rounding errors, and must go
    before a square root makes 1e-8 of 1e-16."""
    size = len(mean)
    rounding = size * np.finfo(np.float64).eps * (covariance.diagonal() + mean ** 2).max()
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance.T, tol=rounding, lower=1)
    root = np.zeros((size, rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    require(np.isclose(np.square(root).sum(), np.trace(covariance)), "a covariance has negative eigenvalues")
    return root


def frechet_distance(mean1, covariance1, mean2, covariance2):
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2).

    FID with Inception's features, sFID with its spatial ones, FVD with I3D's logits. numpy float64.
    Sees: whether two SETS have the same distribution of features, up to mean and covariance: blur and
    artefacts as well as missing classes; sFID, whose features keep positions, layout. Misses: everything
    about single images (a reconstruction may show another dog), and higher moments. Traps: it falls with N
    (of 2,500 images a perfect model reads 2 % of the features' variance): compare equal N. Reconstructions of
    ImageNet val belong beside val, not train (LlamaGen's: 2.19 and 4.28). Others resize otherwise (clean-fid,
    torchmetrics since 1.8), or skip .JPEG and subfolders (pytorch-fid).

    With S1 = R1 R1^T and S2 = R2 R2^T, the eigenvalues of S1 S2 that are not 0 are those of A A^T with
    A = R1^T R2: real by construction, without the complex residues of a general square root. The root of
    lower rank stands first, so that A A^T has no eigenvalues of rounding errors."""
    require(mean1.shape == mean2.shape and covariance1.shape == covariance2.shape == mean1.shape * 2,
            f"statistics of {mean1.shape[0]} and {mean2.shape[0]} features cannot be compared")
    check_finite(np.vstack([mean1, covariance1]), np.vstack([mean2, covariance2]))
    roots = [root_of(mean1, covariance1), root_of(mean2, covariance2)]
    low, high = sorted(roots, key=lambda root: root.shape[1])
    product = low.T @ high                                                 # (rank, rank')
    trace = np.sqrt(np.linalg.eigvalsh(product @ product.T).clip(0)).sum()
    distance = ((mean1 - mean2) ** 2).sum() + np.trace(covariance1) + np.trace(covariance2) - 2 * trace
    return max(float(distance), 0.0)                                       # -1e-13 is a rounding error of 0


def frechet_distance_official(x, y):
    """The official video script's Frechet distance of features (N, D), (M, D): two square roots by SVD in
    float32, singular values under 1e-10 not rooted. The rounding is no detail: 10,000 clips had a distance of
    2.82 from themselves, and 16.38 for a true 16.19."""
    def root(matrix):
        u, s, vh = torch.linalg.svd(matrix)
        return u @ torch.diag(torch.where(s < 1e-10, s, s.sqrt())) @ vh

    check_sets(x, y)
    x, y = [features.float().cpu() for features in (x, y)]
    covariance_x, covariance_y = [torch.cov(features.T) for features in (x, y)]
    root_x = root(covariance_x)
    trace = torch.trace(root(root_x @ covariance_y @ root_x))
    shift = x.mean(0) - y.mean(0)
    return float(shift.square().sum() + torch.trace(covariance_x + covariance_y) - 2 * trace)


def kid(reference, samples, subsets=100, seed=2020):
    """Kernel Inception Distance (Binkowski et al., 2018) of features (N, D), (M, D): its mean and std.

    How much more alike, by the kernel (x y / D + 1)^3, two images of one set are than two of both: a squared
    maximum mean discrepancy, over random subsets of 1,000 images: torch-fidelity's, which raises for fewer.
    Sees: what FID sees, and third moments. It does not fall with N: 5,000 samples can stand beside 50,000.
    Misses: differences that 1,000 images at a time do not show. Traps: papers print it times 1,000, or not;
    and as an unbiased estimate of 0 it may be negative. The std is that of subsets of one set."""
    check_sets(reference, samples)
    size = min(1000, len(reference), len(samples))
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = [features[rng.choice(len(features), size, replace=False)].double()
                for features in (samples, reference)]                      # (size, D)
        kxx, kyy, kxy = [(u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]
        alike = kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()          # without images and themselves
        values.append(float(alike / (size * (size - 1)) - 2 * kxy.mean()))
    return np.mean(values), np.std(values)


def mind(reference, samples, directions=1000, seed=2020):
    """Monge Inception Distance (Berthet et al., 2026) of features (N, D), (M, D): sliced Wasserstein.

    On a line, optimal transport is sorting. So: features projected onto random unit vectors u, and the mean
    squared gap of the sorted numbers, times 3 D. A shift of all features by d gives 3 |d|^2 (on average).
    Sees: any difference of two distributions, as each shows along some u; without a covariance to estimate,
    5,000 samples rank models as 50,000 do by FID. Misses: what FID misses of single images. Trap: it falls
    with N, too. The larger set is cut down to the smaller one; compare equal N only."""
    check_sets(reference, samples)
    generator = torch.Generator().manual_seed(seed)                        # of torch-fidelity's directions
    n = min(len(reference), len(samples))
    sets = [f if len(f) == n else f[torch.randperm(len(f), generator=generator)[:n]]
            for f in (samples, reference)]
    u = F.normalize(torch.randn(directions, samples.shape[1], generator=generator)).to(samples.device)
    x, y = [(f.float() @ u.T).sort(0).values for f in sets]                # (n, directions)
    return 3 * samples.shape[1] * float((x - y).square().mean())


def inception_score(logits, equal_parts=True, size=5000):
    """Inception Score of logits (N, 1008): mean and std over consecutive blocks, and the number of blocks.

    exp of the mean KL(p(class | image) || p(class)) in a block. Blocks: equal parts of about `size`, or of
    `size` with the rest as one more, as in ADM's evaluator, where one image more than 5,000 halves the score.
    Sees: sharp predictions (recognisable) that differ from image to image (diverse). Misses: the real data,
    which never enter, and all inside a class: one perfect image of each gets the best score. Traps: blocks of
    images sorted by class hold a few classes only (62 for what is 298), so shuffle first. Small blocks score
    lower: torch-fidelity and torchmetrics make ten of any number."""
    check_finite(logits)
    blocks = logits.tensor_split(max(1, round(len(logits) / size))) if equal_parts else logits.split(size)
    scores = []
    for block in blocks:
        log_p = block.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(block))
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return np.mean(scores), np.std(scores), len(scores)


def squared_distances(u, v, half=False):
    """Squared Euclidean distances of the rows of u (n, D) and v (m, D): (n, m) in float32. `half`: in float16
    unless that overflows, as in ADM's evaluator: steps of 0.25, which move the third digit of precision."""
    a, b = [x.half() if half else x.float() for x in (u, v)]
    distances = a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
    if half and not distances.isfinite().all():
        return squared_distances(u, v)
    return distances.float().clamp_min(0)


def precision_recall(reference, samples, k=3, half=False, rows=2048):
    """Improved precision and recall (Kynkaanniemi et al., 2019) of features (N, D) and (M, D).

    Each set is taken as the union of balls around its points, reaching to the k-th neighbour. Precision: how
    many samples lie in the reference's union (fidelity); recall: how many of the reference in the samples'
    (coverage). Misses: how regions are weighted; one outlier covers a lot. Traps: VGG's features (the
    original, torch-fidelity's default) or Inception's (ADM, the paper); set sizes (ADM: 10,000 real, 50,000
    generated). In blocks of `rows`: all distances at once would take 2 GB."""
    check_sets(reference, samples, k + 1)

    def radii(points):                                                 # + 1: the nearest is the point itself
        return torch.cat([squared_distances(block, points, half).kthvalue(k + 1, dim=1).values
                          for block in points.split(rows)])

    reference_radii = radii(reference)
    precise = 0
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for block, radius in zip(samples.split(rows), radii(samples).split(rows)):
        distances = squared_distances(block, reference, half)          # (rows, N)
        precise += int((distances <= reference_radii).any(1).sum())
        recalled |= (distances <= radius[:, None]).any(0)
    return precise / len(samples), float(recalled.double().mean())
