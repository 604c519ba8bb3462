"""Stage I: train the tokenizer, of images or of clips, on a laptop or with torchrun on many machines.

    python train_tokenizer.py                                            # the toy preset, generated images
    python train_tokenizer.py --data-path photos --image-size 64 --bits 14
    torchrun --nproc-per-node=8 train_tokenizer.py --preset in1k-256 --data-path imagenet --num-workers 8 \\
        --mixed-precision bf16 --channels-last --compile --resume        # the published recipe
    python train_tokenizer.py --init-from in1k-256 --preset in1k-256 --data-path photos    # fine-tuning
    python train_tokenizer.py --preset toy-video --init-from runs/video_start/step-00001200.pt     # clips

The objective (section 3.2 of the paper, figures from the published settings) is a sum of

    l1, l2          |x - x'|, and optionally (x - x')^2      what every pixel costs
    perceptual      LPIPS distance of x and x'               what a person would notice
    gan             softplus(-mean D(x'))                    what a discriminator still sees
    entropy         H(f(z)) mean - H(mean f(z)), eq. 3       be sure of each token, but use all ids
    commitment      (z - sg[q])^2                            keep z near the signs that it will become

while the discriminator D learns a hinge loss plus LeCAM. The gradient of the generator (encoder and decoder)
comes first, then that of the discriminator on the same reconstructions, then both steps. In reading order:
1. recipes and flags; 2. discriminators; 3. losses; 4. the loop, in `main`; 5. what it reports.
B batch, C channels, T frames of a clip, H W image, K bits; *S: H, W or T, H, W.
"""
import argparse
import copy
import math
from dataclasses import asdict, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import tokenizer
import video
from support import checkpoints, data, loops, metrics, pictures, runtime, sources
from support.runtime import require

# ---- 1. Recipes and flags, and what they describe ----------------------------------------------------------

# What `get_args` takes as defaults, beside the preset's model. Published settings: section 4.1 of the paper.
PUBLISHED_RECIPE = dict(
    data_path="generated", results_dir="runs/tokenizer", global_batch_size=256, lr=1e-4, warmup="0",
    lr_schedule="milestones", milestones=[], final_lr=0.0, betas=(0.5, 0.9), ema_decay=0.999,
    ema_warmup=False, l1_weight=1.0, l2_weight=0.0, perceptual_weight=1.0, gan_weight=0.1, lecam_weight=0.05,
    entropy_weight=0.1, commitment_weight=0.25, tau=0.01, entropy_eps=1e-5, discriminator="patchgan")
# Two minutes on two cores, found by trying: a large learning rate that decays to 0, squared error instead of
# LPIPS, a soft and light entropy term, no GAN. With --entropy-weight 0 the codebook collapses: try it.
TOY_RECIPE = dict(
    PUBLISHED_RECIPE, data_path="generated-plain", length="1200", global_batch_size=32, lr=4e-3,
    lr_schedule="linear", warmup="50", ema_warmup=True, l2_weight=4.0, tau=0.1, perceptual_weight=0.0,
    gan_weight=0.0, lecam_weight=0.0, entropy_weight=0.02, commitment_weight=0.03, entropy_eps=0.0)
# Epochs are of whole batches, 5,004 of ImageNet. The official ones have 5,005, the last of 143 images.
TOKENIZER_RECIPES = {
    "in1k-256": dict(PUBLISHED_RECIPE, length="270ep", milestones=["200ep", "250ep"]),
    "in1k-128": dict(PUBLISHED_RECIPE, length="350ep", milestones=["250ep", "300ep"], lecam_weight=0.01),
    # The official code lowers this rate one step before 800,000 and 1,000,000.
    "pt-256-2^18": dict(PUBLISHED_RECIPE, length="1500000", milestones=["799999", "999999"]),
    "pt-256-2^14": dict(PUBLISHED_RECIPE, length="1500000", lr_schedule="cosine", warmup="5000",
                        final_lr=0.01, discriminator="blurpool"),
    "ucf-128": dict(PUBLISHED_RECIPE, length="2000ep", global_batch_size=128, lr_schedule="cosine",
                    warmup="2ep", final_lr=0.01, gan_weight=0.3, discriminator="patchgan-3d",
                    results_dir="runs/video"),
    "toy": TOY_RECIPE,
    "toy-video": dict(TOY_RECIPE, data_path="generated", length="900", global_batch_size=8, lr=2e-3,
                      discriminator="patchgan-3d", results_dir="runs/video")}
TOKENIZER_PRESETS = {**tokenizer.PRESETS, **video.PRESETS}


def get_args(argv=None):
    """Parse the command line. The preset chooses the defaults of what its recipe and its model fix."""
    first = runtime.ArgumentParser("", add_help=False)
    first.add_argument("--preset", choices=TOKENIZER_PRESETS, default="toy", help="see below")
    preset = first.parse_known_args(argv)[0].preset
    recipe = TOKENIZER_RECIPES[preset]
    parser = runtime.ArgumentParser(__doc__)
    count = runtime.positive_int
    count0 = runtime.non_negative_int
    weight = runtime.non_negative_float
    group = parser.add_argument_group("data and preset")
    group.add_argument("--preset", choices=TOKENIZER_PRESETS, default="toy", help="model and recipe")
    group.add_argument("--data-path", help="folder, 'shards-{000..127}.tar', generated, generated-plain")
    group.add_argument("--val-data-path", help="held-out ones, if --data-path has no val/ or test/")
    group.add_argument("--split-list", help="of clips: official UCF-101 list of those to train on")
    group.add_argument("--val-split-list", help="of clips: official UCF-101 list of the held-out ones")
    group.add_argument("--resize", type=count, help="shorter side before the crop (--image-size)")
    group.add_argument("--frame-stride", type=count, default=1, help="of clips: every n-th frame of a video")
    group.add_argument("--flip", action="store_true", help="mirror half of them (published: no)")
    group.add_argument("--init-from", help="start from this tokenizer (and discriminator), ours or published")
    group.add_argument("--freeze", choices=("encoder",), help="train the decoder alone: the tokens stay")
    group.add_argument("--results-dir", help="for checkpoints, logs and pictures")
    runtime.add_config_flags(parser.add_argument_group("model"), TOKENIZER_PRESETS[preset])
    group = parser.add_argument_group("objective: weight 0 switches a term off")
    group.add_argument("--l1-weight", type=weight, help="absolute error")
    group.add_argument("--l2-weight", type=weight, help="squared error")
    group.add_argument("--perceptual-weight", type=weight, help="LPIPS (VGG); see --weights-dir")
    group.add_argument("--gan-weight", type=weight, help="GAN loss; 0 trains no discriminator at all")
    group.add_argument("--adaptive-gan-weight", action="store_true", help="balance it by gradients, as VQGAN")
    group.add_argument("--gan-start", type=count0, default=0, help="first step with a discriminator")
    group.add_argument("--discriminator", choices=DISCRIMINATORS, help="PatchGAN, or the anti-aliased one")
    group.add_argument("--lecam-weight", type=weight, help="LeCAM regularisation of the discriminator")
    group.add_argument("--entropy-weight", type=weight, help="entropy term, eq. 3")
    group.add_argument("--entropy", choices=tokenizer.JOINT_BITS, default="exact", help="of the codebook: "
                       "of all bits together, or of 9 bits or single ones as if these were independent")
    group.add_argument("--tau", type=runtime.bounded(float, 1e-6), help="temperature of eq. 3 (bsq: a K-th)")
    group.add_argument("--entropy-eps", type=weight, help="in the codebook's logarithm: rare ids pull less")
    group.add_argument("--entropy-anneal-steps", type=count0, default=0, help="from three times its weight")
    group.add_argument("--commitment-weight", type=weight, help="pull of z towards its q")
    group.add_argument("--weights-dir", help="where VGG's weights are (~/.cache/open-magvit2)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--length", type=loops.duration, help="steps, or epochs as in 270ep")
    group.add_argument("--global-batch-size", type=count, help="images or clips a step, over all ranks")
    group.add_argument("--accumulation", type=count, default=1, help="micro-batches; entropy, LeCAM see one")
    group.add_argument("--lr", type=weight, help="peak learning rate of both Adam optimizers")
    group.add_argument("--lr-schedule", choices=("constant", "milestones", "cosine", "linear"), help="shape")
    group.add_argument("--milestones", type=loops.duration, nargs="*", help="from each on, a tenth of --lr")
    group.add_argument("--final-lr", type=runtime.fraction, help="last learning rate, a fraction of the peak")
    group.add_argument("--warmup", type=loops.duration, help=f"steps or epochs in which the learning rate "
                       f"rises from 0 ({recipe['warmup']}; of another --length at most a twentieth)")
    group.add_argument("--betas", type=runtime.bounded(float, 0.0, 0.999999), nargs=2, help="of both Adams")
    group.add_argument("--max-grad-norm", type=weight, default=0.0, help="clip gradients (0: do not)")
    group.add_argument("--ema-decay", type=runtime.fraction, help="decay of the weights' EMA")
    group.add_argument("--ema-warmup", action=argparse.BooleanOptionalAction, help="follow faster at first")
    group = parser.add_argument_group("speed and memory")
    group.add_argument("--mixed-precision", choices=runtime.AUTOCAST_DTYPES, default="fp32", help="autocast")
    group.add_argument("--channels-last", action="store_true", help="NHWC memory layout, faster on GPUs")
    group.add_argument("--compile", action="store_true", help="torch.compile encoder, decoder, LPIPS and D")
    group.add_argument("--activation-checkpointing", action="store_true", help="recompute them in backward")
    group.add_argument("--num-workers", type=count0, default=0, help="data loading processes a rank")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    group = parser.add_argument_group("run")
    group.add_argument("--global-seed", type=count0, default=0, help="weights, order and crops")
    group.add_argument("--resume", nargs="?", const="latest", help="continue --results-dir, or this file")
    group.add_argument("--log-every", type=count, default=50, help="steps between status lines")
    group.add_argument("--checkpoint-every", type=count, default=500, help="steps between checkpoints")
    group.add_argument("--keep", type=count, default=3, help="newest checkpoints that stay, of all written")
    group.add_argument("--dry-run", action="store_true", help="check all this, print the plan and stop")
    parser.set_defaults(**{**recipe, "warmup": None})                    # the recipe's: see `print_plan`
    return parser.parse_args(argv)


def build_networks(args, device):
    """(tokenizer, discriminator or None, LPIPS or None) as the flags describe them, on `device`."""
    torch.manual_seed(args.global_seed)                                  # equal initial weights on every rank
    config = runtime.config_from_args(TOKENIZER_PRESETS[args.preset], args)
    clips = args.preset in video.PRESETS
    model = video.VideoTokenizer(config) if clips else tokenizer.Tokenizer(config)
    discriminator = None
    if args.gan_weight > 0:
        discriminator = DISCRIMINATORS[args.discriminator]()
        kind = f"--discriminator {args.discriminator}"
        require(clips == isinstance(discriminator, PatchGAN3D), f"{kind} does not fit --preset "
                f"{args.preset}: patchgan-3d judges clips, the others images")
        require(config.resolution >= discriminator.smallest, f"{kind} needs --image-size "
                f"{discriminator.smallest}; or use --discriminator blurpool, or --gan-weight 0")
    if args.init_from and not runtime.list_checkpoints(args.results_dir):
        start_from(args.init_from, model, discriminator)
    if args.freeze:                                                      # EMA and tokens then stay, too
        model.encoder.requires_grad_(False)
        model.quantizer.requires_grad_(False)
    perceptual = None
    if args.perceptual_weight > 0 and not args.dry_run:
        try:
            perceptual = checkpoints.load_network("lpips-vgg", args.weights_dir)[0].to(device)
        except runtime.UserError as error:
            raise runtime.UserError(f"no perceptual loss: {error}; or train without: --perceptual-weight 0")
    model.encoder.checkpointing = model.decoder.checkpointing = args.activation_checkpointing
    layout = torch.preserve_format
    if args.channels_last:                                               # convolutions pass it on from here
        layout = torch.channels_last_3d if clips else torch.channels_last
    for network in filter(None, (model, discriminator)):
        network.to(device=device, memory_format=layout)
    if args.compile:
        # Separate graphs with fixed shapes; the quantiser stays outside, it is small and needs fp32.
        for network in filter(None, (model.encoder, model.decoder, discriminator, perceptual)):
            network.compile(dynamic=False)
        # The adaptive weight takes gradients twice: the first time must not free the graph's buffers.
        torch._functorch.config.donated_buffer = not args.adaptive_gan_weight
    return model, discriminator, perceptual


def start_from(path, model, discriminator):
    """Give both networks the weights of any tokenizer, ours or published, as far as they fit. A tokenizer of
    clips takes one of images, inflated. Other ids need other layers around them."""
    source, info = checkpoints.load_tokenizer(path)
    state = source.state_dict()
    what = f"the {info['weights']} weights of {path} ({info['preset']})"
    if isinstance(model, video.VideoTokenizer) and not isinstance(source, video.VideoTokenizer):
        state = video.inflate(state, model)
        what += ", inflated"
    around_ids = ("quantizer.", "encoder.conv_out.", "decoder.conv_in.", "decoder.adaptive.")
    checkpoints.load_partly(model, state, around_ids, what, source.config)
    if discriminator:
        critic = checkpoints.opened(path)[1].get("discriminator") or {}
        fits = not checkpoints.differences(discriminator.state_dict(), critic)
        if fits:
            discriminator.load_state_dict(critic)
        runtime.print_main(f"         the discriminator {'of that file' if fits else 'starts anew'}")


def build_datasets(args):
    """(training set, held-out examples to look at: up to eight images or four clips, uint8 (N, 3, *S)). With
    --init-from, a set smaller than --global-batch-size lowers that. An example that cannot be read is left
    out; raises `UserError` where that leaves none."""
    require(bool(args.split_list) == bool(args.val_split_list), "--split-list and --val-split-list are a "
            "pair, such as trainlist01.txt and testlist01.txt; give both or neither")
    frames = args.frames if args.preset in video.PRESETS else None
    view = data.View(args.resolution, frames, "random", args.flip, args.resize,
                     frame_stride=args.frame_stride)
    dataset = sources.build_dataset(args.data_path, "train", view, args.split_list)
    loops.fit_batch(args, dataset)
    view = replace(view, crop="center", flip=False)
    held_out = sources.build_held_out(args, view)
    if runtime.on_main(data.same_samples, dataset, held_out):
        runtime.print_main(f"grid_psnr is of training {dataset.kind}s: all of {held_out.name} is trained on; "
                           f"see --val-data-path")
    items = [held_out[i] for i in data.evenly_spaced(4 if frames else 8, len(held_out))]
    if not any(items):
        held_out.raise_if_broken()
    return dataset, torch.stack([item[0] for item in items if item])


# ---- 2. Discriminators -------------------------------------------------------------------------------------

class PatchGAN(nn.Module):
    """PatchGAN (Isola et al., 2017): a map of logits, each of which judges one overlapping patch.

    BatchNorm's statistics are those of one rank and of one batch (all real or all fake), as in the published
    training. They are the one thing here that depends on how many ranks share a global batch."""
    smallest = 24                                  # pixels a side, below which no patch is left

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
        """Images or clips (B, 3, *S) in [-1, 1] to logits (B, 1, *S')."""
        return self.main(x)


class PatchGAN3D(PatchGAN):
    """PatchGAN for clips, of 3 x 3 x 3 kernels. Two convs halve T, H and W, the third H and W."""
    smallest = 1

    def __init__(self):
        super().__init__(nn.Conv3d, nn.BatchNorm3d, kernel=3, strides=(2, (2, 2, 2), (1, 2, 2), 1))


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
    smallest = 1

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
        """Images (B, 3, H, W) in [-1, 1] to logits (B, 1, H/8, W/8), rounded up."""
        h = self.block_in(x)
        for block in self.blocks:
            h = block(h)
        return self.to_logits(h)


DISCRIMINATORS = {"patchgan": PatchGAN, "patchgan-3d": PatchGAN3D, "blurpool": BlurPoolDiscriminator}

# ---- 3. Losses. Entropy and commitment are the quantiser's own: see tokenizer.py ---------------------------

def pixel_terms(x, x_hat, perceptual=None):
    """{name: scalar}: how far images or clips x, x_hat (B, 3, *S) are apart, the latter as single frames."""
    terms = {"l1": (x - x_hat).abs().mean(), "l2": (x - x_hat).square().mean()}
    if perceptual:
        terms["perceptual"] = perceptual(metrics.as_frames(x), metrics.as_frames(x_hat)).mean()
    return terms


def non_saturating_loss(fake_logits):
    """The generator's loss of logits (B, 1, *S): softplus(-mean logit), averaged over the batch."""
    return F.softplus(-fake_logits.float().flatten(1).mean(1)).mean()


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss: real logits should pass +1, fake ones -1; half of the sum of both means."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def lecam_loss(lecam, real_logits, fake_logits, decay=0.999):
    """LeCAM (Tseng et al., 2021): holds real logits near the moving average of the fakes, and vice versa.

    lecam (2,): both averages, over all ranks. The batch moves them, then they are used. Returns (loss, new).
    """
    means = torch.stack([real_logits.detach().float().mean(), fake_logits.detach().float().mean()])
    means = runtime.all_reduce_mean(means)
    lecam = torch.where(means.isfinite(), lecam.lerp(means, 1 - decay), lecam)   # or lost after an overflow
    loss = (F.relu(real_logits.float() - lecam[1]).square().mean()
            + F.relu(lecam[0] - fake_logits.float()).square().mean())
    return loss, lecam


def adaptive_gan_weight(reconstruction_loss, gan_loss, last_weight):
    """VQGAN's balance: |gradient of the reconstruction loss| / |gradient of the GAN loss| at the last layer.

    Gradients are averaged over ranks before their norms are taken, so the weight is that of the global batch.
    """
    norms = []
    for loss in (reconstruction_loss, gan_loss):
        gradient, = torch.autograd.grad(loss, last_weight, retain_graph=True)
        norms.append(runtime.all_reduce_mean(gradient).float().norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


def objective(terms, args, step, model):
    """Section 3.2, whole: the sum of all `terms`, each times its flag --NAME-weight (or as in own_terms).

    The entropy term of the original MAGVIT-v2 starts three times heavier, for a codebook that opens up before
    it settles (--entropy-anneal-steps); VQGAN balances the GAN by gradients at the decoder's last layer."""
    weights = {}
    for name in terms:
        weights[name] = model.quantizer.own_terms.get(name, getattr(args, f"{name}_weight", None))
        assert weights[name] is not None, f"the term {name!r} has no weight: add a flag --{name}-weight"
    if "entropy" in terms and step < args.entropy_anneal_steps:
        weights["entropy"] *= 1 + 2 * (1 - step / args.entropy_anneal_steps)
    if "gan" in terms and args.adaptive_gan_weight:
        pixels = sum(weights[name] * terms[name] for name in ("l1", "l2", "perceptual") if name in terms)
        weights["gan"] *= adaptive_gan_weight(pixels, terms["gan"], model.decoder.conv_out.weight)
    return sum(weights[name] * terms[name] for name in terms)


# ---- 4. The training loop ----------------------------------------------------------------------------------

# Flags that a resumed run cannot change.
MUST_STAY = ("global_batch_size", "global_seed", "discriminator", "mixed_precision", "freeze", "flip",
             "resize")


def learning_rate(step, length, warmup, milestones, args):
    """That of both networks in `step`, 0 .. length - 1. The last one's is --final-lr of the peak."""
    if step < warmup:
        return args.lr * (step / warmup)
    if args.lr_schedule == "constant":
        return args.lr
    if args.lr_schedule == "milestones":                                 # in1k-256, in1k-128, pt-256-2^18
        return args.lr * 0.1 ** sum(step >= milestone for milestone in milestones)
    done = (step - warmup) / max(1, length - 1 - warmup)
    left = 1 - done                                                      # linear: toy
    if args.lr_schedule == "cosine":                                     # pt-256-2^14, ucf-128
        left = 0.5 * (1 + math.cos(math.pi * done))
    return args.lr * (args.final_lr + (1 - args.final_lr) * left)


def adam(network, args):
    """The published optimizer: Adam with little momentum, as usual where a discriminator moves the goal."""
    on_gpu = next(network.parameters()).is_cuda
    return torch.optim.Adam(network.parameters(), args.lr, args.betas, fused=on_gpu)


def clip(network, optimizer, scaler, args):
    """The norm of the gradients of `network`, which are then clipped to --max-grad-norm (0: they are not)."""
    scaler.unscale_(optimizer)                                           # fp16: small gradients were enlarged
    return nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm or math.inf)


def main(args):
    """Train a tokenizer as `args` (from `get_args`) say."""
    device = runtime.setup_process_group(args.device)
    loops.check_results_dir(args.results_dir)
    dataset, examples = build_datasets(args)                             # a wrong path costs no download
    model, discriminator, perceptual = build_networks(args, device)
    length, warmup, milestones = print_plan(args, model, discriminator, dataset)
    # ---- everything that the loop changes, and that a checkpoint must therefore hold ----
    ema = copy.deepcopy(model).requires_grad_(False)          # follows the model slowly, and draws better
    optimizer = adam(model, args)
    disc_optimizer = adam(discriminator, args) if discriminator else None
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    if discriminator:
        parts.update(discriminator=discriminator, disc_optimizer=disc_optimizer)
    record = {"length": len(dataset),
              "fingerprint": runtime.on_main(data.fingerprint, dataset, range(len(dataset)))}
    lecam = torch.zeros(2, device=device)                                # EMAs of the real and fake logits
    saved = checkpoints.resume(args, {**parts, "lecam": lecam}, MUST_STAY, config=asdict(model.config),
                               dataset=record)
    step = saved.get("step", 0)
    skipped = saved.get("skipped", 0)                                    # steps that were not finite
    loader = data.train_loader(dataset, args.global_batch_size, args.global_seed, step, args.accumulation,
                               args.num_workers)   # its order is a function of (seed, step): no state to save
    if args.dry_run:
        return
    lock = runtime.lock(args.results_dir)                                # held until `main` ends
    networks = nn.ModuleList(filter(None, (model, discriminator)))
    ddp_model = loops.distributed(model, device)
    ddp_discriminator = loops.distributed(discriminator, device) if discriminator else None
    usage = model.quantizer.count(torch.zeros(0, dtype=torch.long, device=device))       # of each id
    logger = loops.Logger(args.results_dir, length, step)
    meters = loops.Meters()                                            # means since the last log line
    last_finite = step
    stop = runtime.StopRequest()
    while step < length and not stop.agreed:
        lr = learning_rate(step, length, warmup, milestones, args)
        for group in optimizer.param_groups + (disc_optimizer.param_groups if discriminator else []):
            group.update(lr=lr, betas=args.betas)                        # as the flags say, even if resumed
        gan = discriminator is not None and step >= args.gan_start       # from here on, two play
        before = {name: buffer.clone() for name, buffer in networks.named_buffers()}     # BatchNorm's means
        batches = []                                                     # (x, x_hat, ids) of each micro-batch
        logs = []                                                        # of this step, for the meters
        # ---- the gradient of the generator: encoder and decoder ----
        networks[1:].requires_grad_(False)                               # the judge stands still meanwhile
        for micro in range(args.accumulation):
            x = pictures.to_float(next(loader)[0].to(device, non_blocking=True))         # (B, 3, *S)
            ddp_model.require_backward_grad_sync = micro == args.accumulation - 1  # ranks average once a step
            with runtime.autocast(device, args.mixed_precision):
                x_hat, z, q, ids = ddp_model(x)               # (B, 3, *S), (B, K, *s) twice, (B, *s)
                # With the mean over ranks, use of the codebook is that by the global batch, not by a share.
                of_ids, report = model.quantizer.losses(z, q, args.tau, args.entropy_eps,
                                                        runtime.all_reduce_mean, args.entropy)
                terms = {**pixel_terms(x, x_hat, perceptual), **of_ids}  # a scalar each
                if gan:
                    terms["gan"] = non_saturating_loss(discriminator(x_hat))             # pass for real
                scaler.scale(objective(terms, args, step, model) / args.accumulation).backward()
            logs.append({**{f"loss/{name}": term for name, term in terms.items()}, **report})
            batches.append((x, x_hat.detach(), ids))                     # D must not teach the decoder
        # ---- the gradient of the discriminator, on the same reconstructions ----
        new_lecam = lecam
        if gan:
            discriminator.requires_grad_(True)                           # its turn to learn
            for micro, (real, fake, _) in enumerate(batches):
                ddp_discriminator.require_backward_grad_sync = micro == args.accumulation - 1
                with runtime.autocast(device, args.mixed_precision):
                    real_logits, fake_logits = ddp_discriminator(real), ddp_discriminator(fake)  # (B, 1, ...)
                    hinge = hinge_loss(real_logits, fake_logits)         # real above 1, fakes below -1
                    regulariser, new_lecam = lecam_loss(new_lecam, real_logits, fake_logits)     # even match
                    scaler.scale((hinge + args.lecam_weight * regulariser) / args.accumulation).backward()
                logs.append({"loss/discriminator": hinge, "loss/lecam": regulariser,
                             "D(real)": real_logits.mean(), "D(fake)": fake_logits.mean()})
        # ---- both steps or neither: what is reported as skipped has changed nothing ----
        norms = {"grad_norm/generator": clip(model, optimizer, scaler, args)}
        if gan:
            norms["grad_norm/discriminator"] = clip(discriminator, disc_optimizer, scaler, args)
        finite = all(norm.isfinite() for norm in norms.values())         # averaged by DDP: equal on all ranks
        step += 1
        if finite:
            scaler.step(optimizer)                                       # optimizer.step(), but for fp16
            if gan:
                scaler.step(disc_optimizer)
            lecam = new_lecam
            decay = min(args.ema_decay, step / (step + 9)) if args.ema_warmup else args.ema_decay
            torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
            usage += sum(model.quantizer.count(ids) for _, _, ids in batches)            # which are alive?
            meters.update(*logs, norms)
            last_finite = step
        else:
            networks.load_state_dict(before, strict=False)
            skipped += 1
            loops.report_skipped(step, step - last_finite, [*logs, norms], args.results_dir)   # ten: stop
        scaler.update()                                                  # fp16: smaller after an overflow
        networks.zero_grad(set_to_none=True)
        # ---- logs and checkpoints. A checkpoint's step is always logged, so that no mean is cut in two ----
        stopping = stop.requested(step)                                  # collective: every rank, every step
        saving = stopping or step == length or finite and step % args.checkpoint_every == 0
        if saving or step % args.log_every == 0:
            log = {**meters.pop(args.global_batch_size), **usage_report(usage, model.quantizer),
                   "lr": lr, "skipped_steps": skipped}
            if saving:
                grid, log["grid_psnr"] = reconstructed(examples, ema)
            logger.log(step, log, SHOWN)
        elif logger.early(step):                                         # a sign of life, on the screen alone
            logger.show(step, {**meters.means(args.global_batch_size), "lr": lr}, SHOWN)
        if saving:
            path = loops.save_checkpoint(args.results_dir, step, {
                "format": checkpoints.format_of(model),
                "step": step,
                **{name: part.state_dict() for name, part in parts.items()},     # with D's, if there is one
                "config": asdict(model.config),
                "dataset": record,
                "lecam": lecam,
                "skipped": skipped,
                "rng": loops.rng_states(),
                "args": vars(args)}, args.keep)
            stop.saved(path)                                             # says so, if a signal was the reason
            runtime.on_main(pictures.save_samples, f"{args.results_dir}/reconstructions-{step:08d}.png", grid,
                            len(examples))
    return stop.agreed                                                   # 0, or the signal


# ---- 5. What it reports ------------------------------------------------------------------------------------

# Of all that is logged, what the status line shows. "loss/": each term of the objective.
SHOWN = ("loss/", "D(real)", "D(fake)", "token_bits", "codebook_bits", "usage", "dead_bits", "grid_psnr",
         "lr", "samples/s")


def print_plan(args, model, discriminator, dataset):
    """Say what is about to happen, before anything takes time. Returns steps: length, warm-up, milestones."""
    batch = args.global_batch_size
    epoch = len(dataset) // batch                                        # steps
    require(epoch, f"--global-batch-size {batch} is more than the {len(dataset)} {dataset.kind}s of "
                   f"{dataset.name}; lower it")
    length = loops.to_steps(args.length, epoch)
    require(length, f"--length {args.length} is 0 steps of {batch} {dataset.kind}s; give at least 1")
    recipe = TOKENIZER_RECIPES[args.preset]
    warmup = loops.to_steps(args.warmup or recipe["warmup"], epoch)
    if args.warmup is None and args.length != recipe["length"]:          # or a short run would only warm up
        warmup = min(warmup, length // 20)
    milestones = [loops.to_steps(text, epoch) for text in args.milestones]
    networks = {"encoder": model.encoder, "decoder": model.decoder, args.discriminator: discriminator}
    sizes = [f"{name} {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"
             for name, network in networks.items() if network]
    axes = " x ".join(map(str, dataset.axes))
    grid = " x ".join(map(str, model.config.latent_grid(*dataset.axes)))
    runtime.print_facts(
        ("model", f"{args.preset}: parameters of {', '.join(sizes)}"),
        ("tokens", f"{grid} for {axes}, each one of {model.quantizer.vocabulary:,} ids, by {args.quantizer}"),
        ("data", f"{dataset.name}, {len(dataset):,} {dataset.kind}s of {axes}"),
        ("batch", f"{batch} = {runtime.world_size()} ranks x {args.accumulation} micro-batches x "
                  f"{loops.micro_batch_size(batch, args.accumulation)}"),
        ("length", f"{length:,} steps = {length * batch / len(dataset):.1f} epochs"),
        ("lr", f"{args.lr:g}, {args.lr_schedule}, warm-up {warmup:,} steps"),
        ("running", f"on {next(model.parameters()).device} in {args.mixed_precision} to {args.results_dir}"))
    return length, warmup, milestones


@torch.no_grad()
def reconstructed(examples, model):
    """uint8 (2 N, 3, *S), the `examples` and then what `model` makes of them; and the mean PSNR in dB."""
    device = next(model.parameters()).device
    x_hat = torch.cat([model.decode(model.encode(pictures.to_float(x[None].to(device)))) for x in examples])
    x_hat = pictures.to_uint8(x_hat).cpu()                              # one at a time: clips may be large
    psnr = metrics.psnr(metrics.as_frames(examples), metrics.as_frames(x_hat))
    return torch.cat([examples, x_hat]), float(psnr.clamp_max(100).mean())


def usage_report(usage, quantizer):
    """How evenly the ids are used, of `Quantizer.count`s on this rank; sets the counts to 0. A collective.

    usage and perplexity: see `metrics.codebook_usage`; bit_balance: for each bit, the fraction of tokens that
    have it set. A bit that is (almost) always or never set is dead: it halves the codebook."""
    counts = runtime.all_reduce_sum(usage)
    usage.zero_()
    if not counts.any():                                                 # all steps were skipped
        return {}
    report = metrics.codebook_usage(counts)
    if isinstance(quantizer, tokenizer.LFQ):
        group, ids = counts.nonzero().T                                                  # of the ids seen
        bits = tokenizer.ids_to_bits(ids, quantizer.channels // quantizer.groups)        # (ids seen, K / G)
        on = bits.new_zeros(len(counts), bits.shape[1])
        on.index_add_(0, group, bits * counts[group, ids, None])                         # (G, K / G) tokens
        balance = (on.double() / counts.sum(1, keepdim=True)).flatten()                  # (K,)
        report["bit_balance"] = [round(fraction, 4) for fraction in balance.tolist()]
        dead = [k for k, fraction in enumerate(report["bit_balance"]) if not 0.01 <= fraction <= 0.99]
        report["dead_bits"] = len(dead)
        if dead:
            runtime.print_main(f"warning: bits {dead} are dead (on in under 1 % or over 99 % of the tokens); "
                               f"if they stay so, raise --entropy-weight or lower --commitment-weight")
    return report


if __name__ == "__main__":
    runtime.run_script(main, get_args)
