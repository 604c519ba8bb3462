"""Stage I: train the image tokenizer, on a laptop or with torchrun on many machines.

    python train_tokenizer.py                                            # the toy preset, generated pictures
    python train_tokenizer.py --data-path photos --preset toy --image-size 64 --bits 14
    torchrun --nproc-per-node=8 train_tokenizer.py --preset in1k-256 --data-path imagenet --num-workers 8 \\
        --mixed-precision bf16 --channels-last --compile --resume        # the published recipe

The objective (section 3.2 of the paper, figures from the published settings) is a sum of

    reconstruction  |x - x'|, and optionally (x - x')^2      what every pixel costs
    perceptual      LPIPS distance of x and x'               what a person would notice
    gan             softplus(-mean D(x'))                    what a discriminator still sees
    entropy         H(f(z)) mean - H(mean f(z)), eq. 3       be sure of each code, but use all of them
    commitment      (z - sg[q])^2                            keep z near the signs that it will become

while the discriminator D learns a hinge loss plus LeCAM. Each step updates the generator (encoder and
decoder) first and then the discriminator on the same reconstructions. The file reads top to bottom: LPIPS,
discriminators, losses, recipes, flags, the loop. Axis letters as in tokenizer.py: B batch, C channels, H W
picture, h w code map, K bits.
"""
import argparse
import dataclasses
import math
import re
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import data
import runtime
import tokenizer as tok

# ------------------------------------------------------------------------------------------------------------
# 1. LPIPS: distance in the feature space of a classifier
# ------------------------------------------------------------------------------------------------------------

LPIPS_TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}    # ReLU layers in torchvision's .features
LPIPS_WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
LPIPS_HEADS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
LPIPS_FILES = {                                                        # (URL, sha256 or its first digits)
    "vgg": (("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
            (f"{LPIPS_HEADS}/vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")),
    "alex": (("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
             (f"{LPIPS_HEADS}/alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0")),
}


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al., 2018), version 0.1, of pictures in [-1, 1].

    Five feature maps of a frozen classifier, each position normalised to unit length; squared differences are
    weighted by learned non-negative weights, one a channel, and averaged over positions. Built with random
    weights: `load_lpips` fills in the real ones. Feeding pictures in [0, 1] is the classical mistake:
    distances come out far too small.
    """

    def __init__(self, net="vgg"):
        super().__init__()
        build = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[net]
        trunk = build(weights=None)
        self.taps = LPIPS_TAPS[net]
        self.features = trunk.features[:self.taps[-1] + 1]
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False                            # or it would overwrite what the tap has kept
        self.heads = nn.ParameterList(torch.rand(1, width, 1, 1) for width in LPIPS_WIDTHS[net])
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def taps_of(self, x):
        """x (B, 3, H, W) in [-1, 1] to five unit-length feature maps (B, C_l, H_l, W_l) in fp32."""
        h, maps = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                f = h.float()
                maps.append(f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps

    def forward(self, x, y):
        """Distances (B,) of two batches of pictures (B, 3, H, W) in [-1, 1], differentiable in both."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            maps_x = self.taps_of(x)                             # a target needs no graph: half of the memory
        return sum((w * (fx - fy).square()).sum(1).mean((1, 2))
                   for w, fx, fy in zip(self.heads, maps_x, self.taps_of(y)))


def load_lpips(net="vgg", weights_dir=None, path=None):
    """`LPIPS(net)` with its published weights.

    They come from the cache `weights_dir` (downloaded on first use, checked by sha256), or, for "vgg", from
    `path`: a published tokenizer checkpoint, which contains the whole network. Raises `UserError` where
    neither can be had.
    """
    model = LPIPS(net)
    if path:
        stored = runtime.load_checkpoint(path, mmap=True).get("state_dict", {})
        prefix = "loss.perceptual_loss."
        state = {}
        for name, tensor in stored.items():
            if match := re.fullmatch(prefix + r"net\.slice\d\.(\d+)\.(weight|bias)", name):
                state[f"features.{match[1]}.{match[2]}"] = tensor
            elif match := re.fullmatch(prefix + r"lin(\d)\.model\.1\.weight", name):
                state[f"heads.{match[1]}"] = tensor
        runtime.require(
            state, f"--lpips-checkpoint {path} holds no {prefix}*; use a published tokenizer checkpoint"
        )
        runtime.load_state_strictly(model, state, f"the LPIPS inside {path}")
        return model
    trunk, heads = [
        runtime.load_checkpoint(runtime.fetch(url, weights_dir or runtime.default_weights_dir(), sha))
        for url, sha in LPIPS_FILES[net]
    ]
    state = {name: tensor for name, tensor in trunk.items() if name in model.state_dict()}
    state.update({f"heads.{i}": heads[f"lin{i}.model.1.weight"] for i in range(5)})
    runtime.load_state_strictly(model, state, f"LPIPS ({net})")
    return model


# ------------------------------------------------------------------------------------------------------------
# 2. Discriminators
# ------------------------------------------------------------------------------------------------------------

class PatchGAN(nn.Module):
    """PatchGAN (Isola et al., 2017): a map of logits, each of which judges one overlapping patch.

    BatchNorm's statistics are those of one rank and of one batch (all real or all fake), as in the published
    training. They are the one thing here that depends on how many ranks share a global batch. 3D: see
    video.py.
    """

    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d, kernel=4, strides=(2, 2, 2, 1)):
        super().__init__()
        layers = [conv(3, 64, kernel, strides[0], padding=1), nn.LeakyReLU(0.2)]
        for i, stride in enumerate(strides[1:]):
            # BatchNorm subtracts any bias, so the convs before one have none.
            layers += [conv(64 << i, 128 << i, kernel, stride, padding=1, bias=False), norm(128 << i),
                       nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, conv(512, 1, kernel, 1, padding=1))
        for layer in self.main:
            if isinstance(layer, conv):
                nn.init.normal_(layer.weight, 0.0, 0.02)                   # DCGAN's start, kept by its heirs
            elif isinstance(layer, norm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x):
        """Pictures (B, 3, H, W) in [-1, 1], of at least 24 pixels a side, to logits (B, 1, h', w')."""
        return self.main(x)


class BlurPool(nn.Module):
    """Halve the resolution after a binomial blur, so that no detail aliases (Zhang, 2019). SAME padding."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / taps.sum() ** 2)[None, None])   # (1, 1, 4, 4)

    def forward(self, x):
        """x (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        channels, height, width = x.shape[1:]
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, 1, 4, 4), stride=2, groups=channels)


class BlurPoolDiscriminator(nn.Module):
    """The discriminator of pt-256-2^14: anti-aliased, and with GroupNorm, so no batch statistics."""

    def __init__(self):
        super().__init__()
        self.block_in = nn.Sequential(nn.Conv2d(3, 128, 5, padding="same"), nn.LeakyReLU(0.1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_width, width, 3, padding="same"), BlurPool(), nn.GroupNorm(32, width),
                          nn.LeakyReLU(0.1))
            for in_width, width in ((128, 128), (128, 256), (256, 512)))
        self.to_logits = nn.Sequential(nn.Conv2d(512, 512, 1), nn.LeakyReLU(0.1),
                                       nn.Conv2d(512, 1, 5, padding="same"))

    def forward(self, x):
        """Pictures (B, 3, H, W) in [-1, 1] to logits (B, 1, H/8, W/8), rounded up."""
        h = self.block_in(x)
        for block in self.blocks:
            h = block(h)
        return self.to_logits(h)


DISCRIMINATORS = {"patchgan": PatchGAN, "blurpool": BlurPoolDiscriminator}


# ------------------------------------------------------------------------------------------------------------
# 3. Losses
# ------------------------------------------------------------------------------------------------------------

def non_saturating_loss(fake_logits):
    """The generator's loss of logits (B, 1, ...): softplus(-mean logit), averaged over pictures."""
    return F.softplus(-fake_logits.float().flatten(1).mean(1)).mean()


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss: real logits should pass +1, fake ones -1; half of the sum of both means."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def update_lecam(averages, real_logits, fake_logits, decay=0.999):
    """Moving averages (2,) of the mean real and mean fake logit, over all ranks. Call it before `lecam_loss`.

    A batch with NaNs leaves them as they were: one bad step must not poison the anchor for ever.
    """
    means = runtime.all_reduce_mean(torch.stack([real_logits.float().mean(), fake_logits.float().mean()]))
    return torch.where(means.isfinite(), averages.lerp(means, 1 - decay), averages)


def lecam_loss(averages, real_logits, fake_logits):
    """LeCAM (Tseng et al., 2021): holds real logits near the average of the fakes, and vice versa."""
    real_average, fake_average = averages
    return (F.relu(real_logits.float() - fake_average).square().mean()
            + F.relu(real_average - fake_logits.float()).square().mean())


def adaptive_gan_weight(reconstruction_loss, gan_loss, last_weight):
    """VQGAN's balance: |gradient of the reconstruction loss| / |gradient of the GAN loss| at the last layer.

    Gradients are averaged over ranks before their norms are taken, so the weight is that of the global batch.
    """
    norms = [
        runtime.all_reduce_mean(torch.autograd.grad(loss, last_weight, retain_graph=True)[0]).float().norm()
        for loss in (reconstruction_loss, gan_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


def generator_terms(args, x, outputs, perceptual, step):
    """All terms of the generator's objective but the GAN's: name -> (unscaled scalar, weight).

    x: (B, 3, ...) targets in [-1, 1]; outputs: what the tokenizer returns for them. The entropies are
    reported too, with weight 0, because they are the best sign of a codebook's health. Clips (B, 3, T, H, W)
    are judged frame by frame.
    """
    reconstruction, z, q, _ = outputs
    reconstruction = reconstruction.float()
    terms = {"l1": ((x - reconstruction).abs().mean(), args.l1_weight),
             "l2": ((x - reconstruction).square().mean(), args.l2_weight)}
    if args.perceptual_weight > 0 and step >= args.perceptual_start:
        frames = [t if t.dim() == 4 else t.transpose(1, 2).flatten(0, 1) for t in (x, reconstruction)]
        terms["perceptual"] = perceptual(*frames).mean(), args.perceptual_weight
    terms["commitment"] = (z - q.detach()).square().mean(), args.commitment_weight
    if args.quantizer == "vq":
        # The entries of a learned codebook move to the vectors that chose them; nothing else is trained here.
        terms["codebook"] = (q - z.detach()).square().mean(), args.codebook_weight
    else:
        flat = z.movedim(1, -1).flatten(0, -2)                             # (N, K)
        per_token, codebook = tok.lfq_entropies(flat, args.tau, args.entropy_eps)
        # The original MAGVIT-v2 starts with a larger weight, for a codebook that opens up before it settles.
        boost = max(0.0, 1 - step / args.entropy_anneal_steps) if args.entropy_anneal_steps else 0.0
        weight = args.entropy_weight * (1 + args.entropy_anneal_factor * boost)
        terms["entropy"] = per_token - codebook, weight
        terms["token_entropy"] = per_token.detach(), 0.0
        terms["codebook_entropy"] = codebook.detach(), 0.0
    return terms


# ------------------------------------------------------------------------------------------------------------
# 4. Recipes and flags
# ------------------------------------------------------------------------------------------------------------

PUBLISHED = dict(l1_weight=1.0, l2_weight=0.0, perceptual_weight=1.0, gan_weight=0.1, entropy_weight=0.1,
                 commitment_weight=0.25, lecam_weight=0.05, tau=0.01, lr=1e-4, lr_schedule="milestones",
                 warmup="0", final_lr=0.0, global_batch_size=256, ema_decay=0.999, ema_warmup=False,
                 discriminator="patchgan")
RECIPES = {                                                            # what get_args takes as defaults
    "in1k-256": dict(PUBLISHED, length="270ep", milestones=["200ep", "250ep"]),
    "in1k-128": dict(PUBLISHED, length="350ep", milestones=["250ep", "300ep"], lecam_weight=0.01),
    "pt-256-2^18": dict(PUBLISHED, length="1500000", milestones=["800000", "1000000"]),
    "pt-256-2^14": dict(PUBLISHED, length="1500000", milestones=[], lr_schedule="cosine", warmup="5000",
                        final_lr=0.01, discriminator="blurpool"),
    # Two minutes on two cores, found by trying: a large learning rate that decays to 0, squared error instead
    # of LPIPS, a soft and light entropy term, no GAN. With --entropy-weight 0 the codebook collapses: try it.
    # The plainer generated pictures leave enough of the minutes for stage II to learn its shapes.
    "toy": dict(PUBLISHED, data_path="generated-plain", length="1200", global_batch_size=32, lr=4e-3,
                lr_schedule="linear", warmup="50", milestones=[], ema_warmup=True, l2_weight=4.0, tau=0.1,
                perceptual_weight=0.0, gan_weight=0.0, lecam_weight=0.0, entropy_weight=0.02,
                commitment_weight=0.03),
}


def learning_rate_factor(step, length, schedule, warmup=0, milestones=(), final=0.0):
    """What the peak learning rate is multiplied with in `step` (from 0) of `length` steps.

    A linear warm-up from 0 over `warmup` steps, then one of four schedules: "constant"; "milestones" (x 0.1
    from each one on); "cosine" or "linear" from 1 to `final` over the remaining steps.
    """
    if step < warmup:
        return step / warmup
    if schedule == "milestones":
        return 0.1 ** sum(step >= milestone for milestone in milestones)
    done = (step - warmup) / max(1, length - warmup)
    if schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return final + (1 - final) * (1 - done)
    return 1.0


def add_model_flags(parser):
    """The switches of table 3, and the sizes. Each is a field of `TokenizerConfig`."""
    group = parser.add_argument_group("model: sizes, and the switches of table 3")
    group.add_argument("--bits", type=int, help="bits K of an LFQ code")
    group.add_argument("--channels", type=int, help="width of the first level")
    group.add_argument("--blocks", type=int, help="residual blocks a level")
    group.add_argument("--mid-blocks", type=int, help="residual blocks at the code map's resolution")
    group.add_argument("--patch", type=int, help="fold patch x patch pixels into channels first: cheap")
    group.add_argument("--codebook-size", type=int, help="entries of the VQ codebook")
    group.add_argument("--codebook-channels", type=int, help="length of a VQ codebook entry")
    group.add_argument(
        "--channel-multipliers",
        type=int,
        nargs="+",
        help="width of each level over the first; each level but the last halves the resolution",
    )
    group.add_argument("--quantizer", choices=("lfq", "vq"), help="lookup-free, or a learned codebook")
    group.add_argument("--upsampler", choices=("depth-to-space", "nearest"),
                       help="conv + depth-to-space, or nearest neighbour + conv")
    group.add_argument(
        "--downsampler", choices=("strided", "average"), help="strided conv, or average pooling"
    )
    group.add_argument("--adaptive-norm", action=argparse.BooleanOptionalAction, help="adaptive GroupNorm")


def add_training_flags(parser):
    """What every tokenizer training has, of pictures here and of clips in video.py."""
    group = parser.add_argument_group("objective: weight 0 switches a term off")
    weight = runtime.non_negative_float
    group.add_argument("--l1-weight", type=weight, help="absolute error")
    group.add_argument("--l2-weight", type=weight, help="squared error")
    group.add_argument("--perceptual-weight", type=weight, help="LPIPS (VGG); needs its weights, see below")
    group.add_argument(
        "--gan-weight", type=weight, help="generator's GAN loss; 0 trains no discriminator at all"
    )
    group.add_argument("--adaptive-gan-weight", action="store_true",
                       help="multiply --gan-weight by VQGAN's ratio of gradient norms at the last layer")
    group.add_argument("--entropy-weight", type=weight, help="entropy term, eq. 3")
    group.add_argument("--tau", type=weight, help="temperature of the entropy term's softmax over codes")
    group.add_argument("--entropy-eps", type=weight, default=0.0,
                       help="eps inside the codebook entropy's logarithm (official code: 1e-5)")
    group.add_argument("--entropy-anneal-factor", type=weight, default=2.0,
                       help="r: the entropy weight starts (1 + r) times larger ...")
    group.add_argument(
        "--entropy-anneal-steps",
        type=runtime.non_negative_int,
        default=0,
        help="... and falls linearly to itself over so many steps (0: no annealing, as published)",
    )
    group.add_argument("--commitment-weight", type=weight, help="pull of z towards its code")
    group.add_argument(
        "--codebook-weight", type=weight, default=1.0, help="VQ only: pull of the entries towards z"
    )
    group.add_argument("--lecam-weight", type=weight, help="LeCAM regularisation of the discriminator")
    group.add_argument("--perceptual-start", type=runtime.non_negative_int, default=0,
                       help="first step with the perceptual term")
    group.add_argument("--disc-start", type=runtime.non_negative_int, default=0,
                       help="first step that trains the discriminator")
    group.add_argument(
        "--gan-start",
        type=runtime.non_negative_int,
        default=0,
        help="first step in which the generator listens to the discriminator (at least --disc-start)",
    )
    group.add_argument(
        "--lecam-start", type=runtime.non_negative_int, default=0, help="first step with LeCAM"
    )
    group.add_argument("--weights-dir", default=runtime.default_weights_dir(),
                       help="where VGG's weights are, or are downloaded to")
    group.add_argument(
        "--lpips-checkpoint", help="take VGG's weights out of this published tokenizer checkpoint"
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--length", type=runtime.duration, help="training length: steps, or epochs as in 270ep"
    )
    group.add_argument(
        "--global-batch-size", type=runtime.positive_int, help="samples a step, over all ranks"
    )
    group.add_argument("--accumulation", type=runtime.positive_int, default=1,
                       help="micro-batches a step; entropy and LeCAM then see one micro-batch at a time")
    group.add_argument("--lr", type=weight, help="peak learning rate of both Adam optimizers")
    group.add_argument("--lr-schedule", choices=("constant", "milestones", "cosine", "linear"),
                       help="shape of the learning rate after the warm-up")
    group.add_argument(
        "--warmup", type=runtime.duration, help="linear warm-up from 0: steps, or epochs as in 2ep"
    )
    group.add_argument(
        "--milestones",
        type=runtime.duration,
        nargs="*",
        help="where the rate drops to a tenth: steps or epochs",
    )
    group.add_argument(
        "--final-lr", type=runtime.probability, help="end of cosine and linear, as a part of the peak"
    )
    group.add_argument("--beta1", type=runtime.probability, default=0.5, help="Adam's beta1")
    group.add_argument("--beta2", type=runtime.probability, default=0.9, help="Adam's beta2")
    group.add_argument(
        "--max-grad-norm", type=weight, default=0.0, help="clip gradients to this norm (0: do not)"
    )
    group.add_argument("--ema-decay", type=runtime.probability, help="decay of the weights' moving average")
    group.add_argument(
        "--ema-warmup",
        action=argparse.BooleanOptionalAction,
        help="let the average follow faster in the first steps",
    )

    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--mixed-precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="autocast dtype"
    )
    group.add_argument("--channels-last", action="store_true", help="NHWC memory layout, faster on GPUs")
    group.add_argument(
        "--compile", action="store_true", help="torch.compile encoder, decoder, LPIPS and discriminator"
    )
    group.add_argument(
        "--activation-checkpointing", action="store_true", help="recompute activations in backward"
    )
    group.add_argument(
        "--num-workers", type=runtime.non_negative_int, default=0, help="data loading processes a rank"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--global-seed", type=runtime.non_negative_int, default=0, help="weights, order and crops"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        help="continue the newest checkpoint of --results-dir, if it has one, or the file named here",
    )
    group.add_argument(
        "--trust-checkpoint", action="store_true", help="let --resume unpickle classes (can run code)"
    )
    group.add_argument(
        "--log-every", type=runtime.positive_int, default=50, help="steps between status lines"
    )
    group.add_argument("--grid-every", type=runtime.positive_int, default=500, help="steps between pictures")
    group.add_argument("--grid-size", type=runtime.positive_int, default=10, help="samples in the picture")
    group.add_argument(
        "--checkpoint-every", type=runtime.positive_int, default=500, help="steps between checkpoints"
    )
    group.add_argument("--keep", type=runtime.positive_int, default=3, help="checkpoints kept")
    group.add_argument("--usage-window", type=runtime.positive_int, default=500,
                       help="steps over which codebook usage is counted (at least the last half of it)")
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def get_args(argv=None):
    """Parse the command line. The preset chooses the defaults of what its recipe and its model fix."""
    first = runtime.ArgumentParser("", add_help=False)
    first.add_argument("--preset", choices=tok.PRESETS, default="toy", help="see below")
    preset = first.parse_known_args(argv)[0].preset

    parser = runtime.ArgumentParser(__doc__)
    group = parser.add_argument_group("data and preset")
    group.add_argument(
        "--preset", choices=tok.PRESETS, default="toy", help="model and recipe: other defaults"
    )
    group.add_argument("--data-path", default="generated",
                       help="folder of pictures, tar shards as in 'shards-{000..127}.tar', or a built-in "
                            "set: generated, generated-plain")
    group.add_argument("--val-data-path", help="held-out pictures for the grid, if --data-path has no val/")
    group.add_argument("--image-size", dest="resolution", type=runtime.positive_int, help="side of the crops")
    group.add_argument("--resize", type=runtime.positive_int,
                       help="shorter side before the crop, for small crops of large pictures (--image-size)")
    group.add_argument("--crop", choices=("random", "center"), default="random", help="training crops")
    group.add_argument("--flip", action="store_true", help="mirror half of the pictures (published: no)")
    group.add_argument("--results-dir", default="runs/tokenizer", help="for checkpoints, logs and pictures")
    group.add_argument("--discriminator", choices=DISCRIMINATORS, help="PatchGAN, or the anti-aliased one")
    add_model_flags(parser)
    add_training_flags(parser)
    model = tok.config_to_dict(tok.PRESETS[preset])
    parser.set_defaults(**RECIPES[preset], **model)
    return parser.parse_args(argv)


def config_from_args(args, kind=tok.TokenizerConfig):
    """The config, of this kind, that the flags describe."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


# ------------------------------------------------------------------------------------------------------------
# 5. The training loop
# ------------------------------------------------------------------------------------------------------------

def main(args):
    """Train an image tokenizer as `args` (from `get_args`) say."""
    device = runtime.setup_process_group(args.device)
    torch.manual_seed(args.global_seed)                                  # equal initial weights on every rank
    config = config_from_args(args)
    model = tok.Tokenizer(config)
    discriminator = DISCRIMINATORS[args.discriminator]() if args.gan_weight > 0 else None
    runtime.require(discriminator is None or args.discriminator == "blurpool" or config.resolution >= 24,
                    f"--image-size {config.resolution} is too small for PatchGAN, which needs 24 pixels; use "
                    f"--discriminator blurpool or --gan-weight 0")
    dataset = data.build_dataset(args.data_path, "train", config.resolution, args.crop, args.flip,
                                 resize=args.resize)
    held_out = data.build_dataset(args.val_data_path or args.data_path, "val", config.resolution, "center",
                                  resize=args.resize)
    fixed = next(iter(data.eval_loader(held_out, args.grid_size, rank=0, world_size=1)))[0]

    def preview(step, logger):
        """Log a grid of held-out inputs (upper rows) over their reconstructions, and its mean PSNR."""
        x = data.to_float(fixed.to(device))
        with torch.no_grad():
            reconstruction = runtime.to_uint8(model.decode(model.encode(x)))
        error = (reconstruction.float() - fixed.to(device).float()).square().flatten(1).mean(1)
        psnr = (10 * torch.log10(255 ** 2 / error.clamp_min(1e-6))).mean().item()
        rows = [part[i:i + 10] for i in range(0, len(fixed), 10) for part in (fixed, reconstruction.cpu())]
        logger.image(step, "reconstructions", runtime.image_grid(torch.cat(rows), min(10, len(fixed))))
        logger.log(step, {"grid_psnr": psnr}, show=("grid_psnr",))

    train(args, device, config, model, discriminator, dataset, preview)


def train(args, device, config, model, discriminator, dataset, preview):
    """The loop of stage I, for pictures and (from video.py) clips.

    model: maps a batch (B, 3, ...) to (reconstruction, z, q, ids). discriminator: None trains without a GAN.
    dataset: see data.py. preview(step, logger): draws something fixed; here it sees the averaged weights.
    """
    world, rank = runtime.world_size(), runtime.rank()
    gan = discriminator is not None
    micro_batch = runtime.micro_batch_size(args)
    steps_per_epoch = len(dataset) // args.global_batch_size
    runtime.require(
        steps_per_epoch > 0,
        f"--global-batch-size {args.global_batch_size} is larger than the data "
        f"set ({len(dataset)} {dataset.kind}s in {dataset.name}); lower it",
    )
    runtime.require(args.gan_start >= args.disc_start, "--gan-start must not come before --disc-start: the "
                                                       "generator would listen to an untrained discriminator")
    runtime.require(args.tau > 0, "--tau must be positive")
    length, warmup, *milestones = (runtime.to_steps(d, steps_per_epoch)
                                   for d in (args.length, args.warmup, *args.milestones))
    resume_from = runtime.resume_path(args)
    print_plan(args, config, model, discriminator, dataset, length, micro_batch, device)
    if args.dry_run:
        return

    # ---- modules ----
    perceptual = load_perceptual(args).to(device) if args.perceptual_weight > 0 else None
    layout = torch.preserve_format
    if args.channels_last:
        layout = (
            torch.channels_last_3d if isinstance(model.decoder.conv_out, nn.Conv3d) else torch.channels_last
        )
    for module in filter(None, (model, discriminator)):
        module.to(device=device, memory_format=layout)
    model.encoder.checkpointing = model.decoder.checkpointing = args.activation_checkpointing
    if args.compile:
        # Separate graphs with fixed shapes; quantiser and entropy stay outside, they are small and need fp32.
        for module in filter(None, (model.encoder, model.decoder, discriminator, perceptual)):
            module.compile(dynamic=False)
        if args.adaptive_gan_weight:
            torch._functorch.config.donated_buffer = False             # its gradients need the graph kept
    ddp_model = runtime.distributed(model, device)
    ddp_discriminator = runtime.distributed(discriminator, device) if gan else None

    # ---- everything that the loop changes, and that a checkpoint must therefore hold ----
    def adam(network):
        return torch.optim.Adam(network.parameters(), args.lr, (args.beta1, args.beta2),
                                fused=device.type == "cuda")
    optimizer, disc_optimizer = adam(model), adam(discriminator) if gan else None
    scaler, disc_scaler = (
        torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16") for _ in "gd"
    )
    averages = {name: p.detach().clone() for name, p in averaged_parameters(model, discriminator)}
    lecam = torch.zeros(2, device=device)  # averages of real and fake logits
    usage = torch.zeros(
        2, config.vocabulary, dtype=torch.long, device=device
    )  # counts: this half window, the last
    meters, skipped, in_a_row, step = runtime.Meters(), 0, 0, 0

    if resume_from:
        saved = runtime.load_checkpoint(resume_from, args.trust_checkpoint)
        check_resumable(saved, args, model, dataset, resume_from)
        step, skipped, in_a_row = saved["step"], saved["skipped"], saved["in_a_row"]
        runtime.load_state_strictly(model, saved["model"], resume_from)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        if gan:
            runtime.load_state_strictly(discriminator, saved["discriminator"], resume_from)
            disc_optimizer.load_state_dict(saved["disc_optimizer"])
            disc_scaler.load_state_dict(saved["disc_scaler"])
        for name, average in averages.items():
            average.copy_({**saved["ema"], **saved["discriminator_ema"]}[name])
        lecam = saved["lecam"].to(device)
        if rank == 0:
            usage.copy_(saved["usage"])                                # a sum over ranks
        if len(saved["meters"]) == world:
            meters.sums = saved["meters"][rank]
        runtime.restore_rng_state(saved["rng"])
        runtime.print_main(f"resumed {resume_from} at step {step}")
        del saved

    loader = iter(data.train_loader(dataset, args.global_batch_size, args.global_seed, step, rank, world,
                                    args.accumulation, args.num_workers))
    logger = runtime.Logger(args.results_dir, length, step)
    stop, window_start = runtime.StopRequest(), (time.perf_counter(), step)

    while step < length:
        lr = args.lr * learning_rate_factor(step, length, args.lr_schedule, warmup, milestones, args.final_lr)
        for group in optimizer.param_groups + (disc_optimizer.param_groups if gan else []):
            group["lr"] = lr

        # ---- generator: encoder and decoder ----
        if gan:
            discriminator.requires_grad_(False)                        # no gradients that nobody will use
        pairs, values = [], {}                                         # (real, fake) for the discriminator
        for micro in range(args.accumulation):
            x = data.to_float(next(loader)[0].to(device, non_blocking=True)).contiguous(memory_format=layout)
            with runtime.last_sync(ddp_model, micro, args), runtime.autocast(device, args.mixed_precision):
                outputs = ddp_model(x)                                 # reconstruction, z, q, ids
                terms = generator_terms(args, x, outputs, perceptual, step)
                if gan and step >= args.gan_start:
                    gan_loss, weight = non_saturating_loss(discriminator(outputs[0])), args.gan_weight
                    if args.adaptive_gan_weight:
                        pixels = sum(terms[name][0] * terms[name][1]
                                     for name in ("l1", "l2", "perceptual") if name in terms)
                        weight = weight * adaptive_gan_weight(pixels, gan_loss, model.decoder.conv_out.weight)
                    terms["gan"] = gan_loss, weight
                loss = sum(term * weight for term, weight in terms.values())
                scaler.scale(loss / args.accumulation).backward()
            pairs.append((x, outputs[0].detach()))
            usage[0] += torch.bincount(outputs[3].flatten(), minlength=config.vocabulary)
            for name, (term, weight) in terms.items():
                runtime.add(values, f"loss/{name}", term, 1 / args.accumulation)
                if not name.endswith("_entropy"):                      # those two are reported, not minimised
                    runtime.add(values, f"scaled/{name}", term * weight, 1 / args.accumulation)
        guilty, numbers = runtime.apply_gradients(
            "generator", values, list(model.parameters()), optimizer, scaler, args.max_grad_norm
        )

        # ---- discriminator, on the same reconstructions ----
        if gan and step >= args.disc_start and not guilty:
            discriminator.requires_grad_(True)
            lecam_weight = args.lecam_weight if step >= args.lecam_start else 0.0
            values = {}
            for micro, (real, fake) in enumerate(pairs):
                with (runtime.last_sync(ddp_discriminator, micro, args),
                      runtime.autocast(device, args.mixed_precision)):
                    real_logits, fake_logits = ddp_discriminator(real), ddp_discriminator(fake)
                    lecam = update_lecam(lecam, real_logits.detach(), fake_logits.detach())
                    hinge = hinge_loss(real_logits, fake_logits)
                    regulariser = lecam_loss(lecam, real_logits, fake_logits)
                    loss = hinge + lecam_weight * regulariser
                    disc_scaler.scale(loss / args.accumulation).backward()
                for name, value in (("loss/discriminator", hinge), ("scaled/discriminator", hinge),
                                    ("loss/lecam", regulariser), ("scaled/lecam", lecam_weight * regulariser),
                                    ("D(real)", real_logits.mean()), ("D(fake)", fake_logits.mean())):
                    runtime.add(values, name, value, 1 / args.accumulation)
            guilty, more = runtime.apply_gradients("discriminator", values, list(discriminator.parameters()),
                                                   disc_optimizer, disc_scaler, args.max_grad_norm)
            numbers.update(more)

        # ---- averages and counters; a step that was not finite has changed nothing ----
        step += 1
        if guilty:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            runtime.skip_or_stop(step, guilty, in_a_row, args.results_dir)
        else:
            in_a_row = 0
            meters.update(numbers)
            decay = min(args.ema_decay, step / (step + 9)) if args.ema_warmup else args.ema_decay
            parameters = [p.detach() for _, p in averaged_parameters(model, discriminator)]
            torch._foreach_lerp_(list(averages.values()), parameters, 1 - decay)
        if step % max(1, args.usage_window // 2) == 0:
            usage = torch.stack([torch.zeros_like(usage[0]), usage[0]])

        # ---- logs, pictures, checkpoints ----
        signal, last = stop.agreed(), step == length
        if step % args.log_every == 0 or last:
            seconds, steps = time.perf_counter() - window_start[0], step - window_start[1]
            window_start = time.perf_counter(), step
            log = {**meters.pop(), **codebook_report(runtime.all_reduce_sum(usage).sum(0), config), "lr": lr,
                   "skipped_steps": skipped, f"{model.unit}/s": args.global_batch_size * steps / seconds}
            add_entropy_bits(log, config, outputs[3].numel() * world)
            logger.log(
                step,
                log,
                show=(
                    "loss/l1",
                    "loss/perceptual",
                    "loss/gan",
                    "D(real)",
                    "D(fake)",
                    "token_bits",
                    "codebook_bits",
                    "usage",
                    "dead_bits",
                    "lr",
                    f"{model.unit}/s",
                ),
            )
        if step % args.grid_every == 0 or last:
            with runtime.averaged_weights(model, averages):
                preview(step, logger)
        if step % args.checkpoint_every == 0 or last or signal:
            state = {
                "format": model.format,
                "preset": args.preset,
                "config": tok.config_to_dict(config),
                "step": step,
                "model": model.state_dict(),
                "ema": {name: averages[name] for name, _ in model.named_parameters()},
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "discriminator": discriminator.state_dict() if gan else {},
                "discriminator_ema": {n: a for n, a in averages.items() if n.startswith("discriminator.")},
                "disc_optimizer": disc_optimizer.state_dict() if gan else {},
                "disc_scaler": disc_scaler.state_dict(),
                "lecam": lecam,
                "usage": runtime.all_reduce_sum(usage),
                "meters": runtime.gather_objects(meters.sums),
                "skipped": skipped,
                "in_a_row": in_a_row,
                "rng": runtime.rng_states(),
                "dataset": {"name": dataset.name, "length": len(dataset)},
                "args": vars(args),
            }
            if runtime.is_main():
                runtime.save_checkpoint(runtime.checkpoint_path(args.results_dir, step), state)
                runtime.prune_checkpoints(args.results_dir, args.keep)
            runtime.barrier()
        if signal:
            runtime.print_main(f"stopped by signal {signal} after step {step}; --resume continues from here")
            break
    stop.close()
    logger.close()
    runtime.print_main(f"tokenizer at step {step}: {runtime.checkpoint_path(args.results_dir, step)}")


def load_perceptual(args):
    """LPIPS for the objective. Without its weights, raises `UserError` that names every way out."""
    try:
        return load_lpips("vgg", args.weights_dir, args.lpips_checkpoint)
    except runtime.UserError as error:
        raise runtime.UserError(
            f"no perceptual loss: {error}; or take it out of a published tokenizer with "
            f"--lpips-checkpoint, or train without it with --perceptual-weight 0"
        ) from None


def print_plan(args, config, model, discriminator, dataset, length, micro_batch, device):
    """Say what is about to happen, before anything takes time."""
    encoder, decoder = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.encoder, model.decoder))
    critic = "no GAN"
    if discriminator is not None:
        critic = f"{args.discriminator} {sum(p.numel() for p in discriminator.parameters()) / 1e6:.2f} M"
    world, batch = runtime.world_size(), args.global_batch_size
    runtime.print_facts(
        ("model", f"{args.preset}: encoder {encoder:.2f} M, decoder {decoder:.2f} M parameters, {critic}"),
        ("codes", f"{config.quantizer}, {config.vocabulary:,} codes, one for {config.token_size}"),
        ("data", f"{dataset.name}, {len(dataset):,} {dataset.kind}s of {' x '.join(map(str, dataset.axes))}"),
        ("batch", f"{batch} = {world} ranks x {args.accumulation} micro-batches x {micro_batch}"),
        ("length", f"{length:,} steps = {length * batch / len(dataset):.1f} epochs"),
        ("lr", f"{args.lr:g}, {args.lr_schedule}"),
        ("running", f"{device}, {args.mixed_precision}{', compiled' * args.compile}"),
        ("results", args.results_dir),
    )


def check_resumable(saved, args, model, dataset, source):
    """Raise `UserError` unless the checkpoint `saved` belongs to this model, data and order of samples."""
    runtime.require(saved.get("format") == model.format and "optimizer" in saved,
                    f"--resume {source}: not a training checkpoint of this script")
    runtime.check_same(saved["config"], tok.config_to_dict(model.config), f"--resume {source}: the model")
    runtime.check_same(saved["dataset"], {"name": dataset.name, "length": len(dataset)},
                       f"--resume {source}: the data set", ignore=("name",))
    fixed = ("global_batch_size", "global_seed", "discriminator", "mixed_precision")
    runtime.check_flags(saved["args"], args, fixed, source)
    runtime.require(bool(saved["discriminator"]) == (args.gan_weight > 0),
                    f"--resume {source}: --gan-weight cannot be switched on or off in the middle of a run")


def averaged_parameters(model, discriminator):
    """(name, parameter) of all that the moving average covers: both networks, parameters but not buffers."""
    yield from model.named_parameters()
    if discriminator is not None:
        yield from ((f"discriminator.{name}", p) for name, p in discriminator.named_parameters())


def codebook_report(counts, config):
    """How evenly the codes are used: `counts` (vocabulary,) to a dict for the log.

    usage: part of all codes seen in the window; perplexity: the number of equally used codes of the same
    entropy; bit_balance: for each bit, the part of tokens that have it set. A bit that is (almost) always or
    never set is dead: it halves the codebook.
    """
    total = counts.sum().clamp_min(1)
    p = counts[counts > 0].double() / total
    report = {"usage": (counts > 0).double().mean().item(), "perplexity": (-(p * p.log()).sum()).exp().item()}
    if config.quantizer == "lfq":
        ids = counts.nonzero().squeeze(1)
        share = counts[ids].double() / total
        balance = (tok.ids_to_bits(ids, config.bits).double() * share[:, None]).sum(0)
        report["bit_balance"] = [round(b, 4) for b in balance.tolist()]
        dead = [k for k, b in enumerate(report["bit_balance"]) if not 0.01 <= b <= 0.99]
        report["dead_bits"] = len(dead)
        if dead:
            runtime.print_main(
                f"warning: bits {dead} are dead (on in under 1 % or over 99 % of the tokens); if they "
                f"stay so, raise --entropy-weight or lower --commitment-weight"
            )
    return report


def add_entropy_bits(log, config, tokens):
    """Add both entropies in bits beside their bounds: no token can have more than K bits, nor can the
    codebook, which is also bound by log2 of the number of `tokens` in the batch plus the mean entropy of one
    token."""
    if "loss/token_entropy" in log:
        log["token_bits"] = log["loss/token_entropy"] / math.log(2)
        log["token_bits_bound"] = float(config.bits)
        log["codebook_bits"] = log["loss/codebook_entropy"] / math.log(2)
        log["codebook_bits_bound"] = min(config.bits, math.log2(tokens) + log["token_bits"])


if __name__ == "__main__":
    runtime.run_script(main, get_args)
