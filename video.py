"""Open-MAGVIT2-V: the tokenizer of clips. 17 frames of 128 x 128 become 5 x 16 x 16 codes, and codes become
frames.

It is the image tokenizer of tokenizer.py with a third axis (the design is MAGVIT-v2's): the same blocks, LFQ
and entropy (eq. 1-3), built from causal 3D convolutions. Causal means that a frame sees itself and earlier
frames only, so the first frame of a clip is a picture by itself, a picture is a clip of one frame, and the
weights of an image tokenizer are a start for this one. To be honest: only the convolutions are causal.
GroupNorm and adaptive GroupNorm take their statistics over T x H x W, and through them every frame has a
say, faintly, in all others. The published model is like that too.

    1. layers          causal convolution, down- and upsampling in time
    2. model           VideoTokenizer, presets, loading, inflation of an image tokenizer
    3. pictures        clips as frames of an animation, and as strips
    4. training        recipes, flags; objective and loop are those of train_tokenizer.py
    5. reconstruction  clips of any length through a trained tokenizer

    python video.py train                                              # the toy preset on generated clips
    python video.py train --data-path clips --inflate-from runs/image/step-00002000.pt
    torchrun --nproc-per-node=8 video.py train --preset ucf-128 --data-path ucf101 --num-workers 8 \\
        --mixed-precision bf16 --activation-checkpointing --channels-last --resume \\
        --inflate-from imagenet_128_L.ckpt                             # the published recipe
    python video.py reconstruct                                        # held-out clips, beside the originals
    python video.py reconstruct --ckpt video_128_262144.ckpt --input clip.avi --output clip.mp4

To see one clip through it:

    import torch, video
    model, info = video.load_video_tokenizer("video_128_262144.ckpt")  # or one of our own checkpoints
    ids = model.encode(torch.zeros(1, 3, 17, 128, 128))                # (1, 5, 16, 16), each 0 .. 2^18 - 1
    clips = model.decode(ids)                                          # (1, 3, 17, 128, 128) in about [-1, 1]

Axis letters: B clips, C channels, T frames, H W height and width, t h w of the code map, K bits of a code.
"""
import math
import pathlib
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import runtime
import tokenizer as tok
import train_tokenizer as stage1

# ------------------------------------------------------------------------------------------------------------
# 1. Layers
# ------------------------------------------------------------------------------------------------------------


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that never looks ahead: in time it is padded in front only, by kernel - 1 frames of
    zeros.

    Space is padded inside the convolution, at no cost. Padding time costs a copy (none with --compile, where
    the activation before it writes into the padded tensor), which the two cases that need none avoid: 1x1x1
    kernels, and clips of one frame. The backward pass keeps the copy instead of the original, not both.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, (0, padding, padding), bias=bias)

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C', T', H', W'), T' = T / stride rounded up."""
        past = self.kernel_size[0] - 1
        if past and x.shape[2] == 1:
            # All slices of the kernel but the last would meet zeros: a picture needs a third of the work.
            return F.conv3d(x, self.weight[:, :, -1:], self.bias, self.stride, self.padding)
        return super().forward(F.pad(x, (0, 0, 0, 0, past, 0)) if past else x)


class CausalAvgPool(nn.AvgPool3d):
    """Average pooling with the first frame repeated in front, so that 1 + 2k frames become 1 + k."""

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C, T', H', W'), T' = T / stride rounded up."""
        past = self.kernel_size[0] - 1
        return super().forward(F.pad(x, (0, 0, 0, 0, past, 0), mode="replicate") if past else x)


def drop_second_frame(x):
    """x (B, C, 2T, H, W) to frames 0, 2, 3, ...: (B, C, 2T - 1, H, W).

    On the way down the first frame was alone under its kernel, so on the way up it becomes one frame, not
    two.
    """
    return torch.cat([x[:, :, :1], x[:, :, 2:]], dim=2)


class CausalUpsample(tok.Upsample):
    """A causal conv, depth-to-space in the order (dt, dy, dx), and one frame less where time was doubled."""

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C, 2T - 1 or T, 2H, 2W)."""
        x = super().forward(x)
        return drop_second_frame(x) if self.block[0] == 2 else x


class CausalNearestUpsample(tok.NearestUpsample):
    """The baseline of table 3 for clips: repeat, drop the first frame's repetition, then a causal conv."""

    def forward(self, x):
        """x (B, C, T, H, W) to (B, C, 2T - 1 or T, 2H, 2W)."""
        x = F.interpolate(x, scale_factor=tuple(map(float, self.block)), mode="nearest")
        return self.conv1(drop_second_frame(x) if self.block[0] == 2 else x)


UPSAMPLERS = {"depth-to-space": CausalUpsample, "nearest": CausalNearestUpsample}


# ------------------------------------------------------------------------------------------------------------
# 2. The model
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VideoTokenizerConfig(tok.TokenizerConfig):
    """The shape of a video tokenizer. Defaults: Open-MAGVIT2-V on UCF-101; the rest as for pictures."""
    resolution: int = 128
    channel_multipliers: tuple = (1, 2, 2, 4)
    frames: int = 17                         # of the training clips; any 1 + k * time_stride works
    time_strides: tuple = ()                 # in time, between levels; (): 2 where the multiplier is above 1

    def __post_init__(self):
        super().__post_init__()
        between = len(self.channel_multipliers) - 1
        runtime.require(
            len(self.strides) == between and set(self.time_strides) <= {1, 2},
            f"--time-strides {' '.join(map(str, self.time_strides))}: give a 1 or 2 for each of the "
            f"{between} steps between the levels of --channel-multipliers",
        )
        runtime.require(
            self.frames >= 1 and (self.frames - 1) % self.time_stride == 0,
            f"--frames {self.frames}: must be 1 + a multiple of {self.time_stride}, the stride in time",
        )

    @property
    def time_stride(self):
        """Frames that one step of the code map stands for; the first step stands for one frame alone."""
        return math.prod(stride[0] for stride in self.strides)

    @property
    def token_size(self):
        """What one token stands for, in words."""
        return f"{self.time_stride} frames of {super().token_size}"

    @property
    def strides(self):
        """The factor between neighbouring levels along T, H and W, shallowest first."""
        by_rule = [1 if multiplier == 1 else 2 for multiplier in self.channel_multipliers[:-1]]
        return [(stride, 2, 2) for stride in self.time_strides or by_rule]

    @property
    def folds(self):
        """How many samples along each axis `patch` folds into channels: pixels, but not frames."""
        return 1, self.patch, self.patch

    def grid(self, frames, height, width):
        """The axes (t, h, w) of the code map of a clip of 1 + k * time_stride frames."""
        return 1 + (frames - 1) // self.time_stride, *super().grid(height, width)


PRESETS = {
    "ucf-128": VideoTokenizerConfig(),
    # For a laptop: 17 frames of 32 x 32, 5 x 4 x 4 tokens. With --channel-multipliers 1 1 2 the toy image
    # tokenizer has the same names and shapes, and can be inflated.
    "toy": VideoTokenizerConfig(resolution=32, channels=32, channel_multipliers=(1, 1, 2), blocks=1,
                                mid_blocks=0, patch=2, bits=10, time_strides=(2, 2)),
}


class VideoTokenizer(tok.Tokenizer):
    """Encoder, quantiser and decoder of clips. A picture is a clip of one frame: `images[:, :, None]`.

    Everything but shapes is inherited: `forward`, `encode` (clips to ids (B, t, h, w)) and `decode`.
    """

    format = tok.VIDEO_FORMAT
    config_type, presets = VideoTokenizerConfig, PRESETS
    unit = "clips"
    code_map = "(B, t, h, w)"

    def __init__(self, config):
        super().__init__(config, tok.Encoder(config, CausalConv3d, CausalAvgPool),
                         tok.Decoder(config, CausalConv3d, UPSAMPLERS))

    def check_images(self, clips):
        """Raise `UserError` unless `clips` is (B, 3, 1 + k * time_stride, H, W) with sides that the stride
        divides, of 2 tokens or more."""
        stride, time_stride = self.config.downsampling, self.config.time_stride
        runtime.require(
            clips.dim() == 5 and clips.shape[1] == 3,
            f"the video tokenizer takes RGB clips (B, 3, T, H, W), not a tensor of {list(clips.shape)}; "
            f"pictures are clips of one frame, images[:, :, None]",
        )
        frames, height, width = clips.shape[2:]
        runtime.require(
            (frames - 1) % time_stride == 0 and frames > 0,
            f"a clip of {frames} frames does not divide into tokens; use 1 + a multiple of {time_stride}",
        )
        runtime.require(
            height % stride == 0 and width % stride == 0 and frames * height * width > stride ** 2,
            f"frames of {height} x {width} do not divide into tokens of {stride} x {stride}; "
            f"use multiples of {stride} that make at least two tokens",
        )


def load_video_tokenizer(path, ema=True, trust=False):
    """Load a video tokenizer from one of our checkpoints or from the published file.

    Arguments, results and errors are those of `tokenizer.load_tokenizer`, the model a `VideoTokenizer`.
    """
    return tok.load_tokenizer(path, ema, trust, VideoTokenizer)


def load_any_tokenizer(path, ema=True, trust=False):
    """`tokenizer.load_tokenizer` or `load_video_tokenizer`, as the file demands: stage II works on both."""
    clips = tok.is_video(runtime.load_checkpoint(path, trust, mmap=True))
    return (load_video_tokenizer if clips else tok.load_tokenizer)(path, ema, trust)


def inflate(image_state, video_model):
    """Start a `VideoTokenizer` from the weights of an image tokenizer of the same levels and widths.

    image_state: its state_dict, raw or averaged, ours or published (`tokenizer.load_tokenizer`). A 2D kernel
    becomes the last slice in time of the 3D one, the slice that meets the present frame, and the past starts
    at zero. An upsampler that doubles time has twice the channels, as (dt, dy, dx, C): both of its
    frames start as the image's. All else is copied. On one frame the result is the image tokenizer; of a
    clip, it sees each frame by itself (but for the norms). Raises `UserError` listing what does not fit.
    """
    own, state = video_model.state_dict(), {}
    for name, tensor in image_state.items():
        target = own.get(name, tensor)
        if ".upsample." in name and len(target) == 2 * len(tensor):
            tensor = torch.cat([tensor, tensor])
        if target.dim() == 5 and tensor.dim() == 4:
            tensor = F.pad(tensor[:, :, None], (0, 0, 0, 0, target.shape[2] - 1, 0))
        state[name] = tensor
    runtime.load_state_strictly(video_model, state, "the image tokenizer, inflated,")


# ------------------------------------------------------------------------------------------------------------
# 3. Pictures of clips
# ------------------------------------------------------------------------------------------------------------

FORMATS = ("webp", "gif", "mp4", "avi", "mkv")   # what data.write_video writes
PREVIEW_FPS = 10                             # of pictures to look at: half the speed of most videos


def as_frames(clip):
    """A clip uint8 (3, T, H, W) as what `data.write_video` takes: uint8 array (T, H, W, 3)."""
    return clip.permute(1, 2, 3, 0).numpy()


def animated_grid(clips, columns, labels=None, scale=1):
    """`runtime.image_grid` of clips uint8 (N, 3, T, H, W), in motion: frames uint8 (T, h, w, 3)."""
    return np.stack([runtime.image_grid(clips[:, :, t], columns, labels, scale)
                     for t in range(clips.shape[2])])


def strip(clips, columns=6, labels=None, scale=1):
    """A uint8 picture (h, w, 3): a row for each of N clips uint8 (N, 3, T, H, W), of up to `columns` of its
    frames, the first and the last among them. labels: a caption for each clip."""
    frames = clips.shape[2]
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    captions = [label for label in labels for _ in shown] if labels else None
    pictures = clips[:, :, shown].transpose(1, 2).flatten(0, 1)                      # (N * F, 3, H, W)
    return runtime.image_grid(pictures, len(shown), captions, scale)


def save_animation(path, frames):
    """Write frames uint8 (T, h, w, 3), slow enough to see what became of a clip of 17 frames, on rank 0."""
    if runtime.is_main():
        data.write_video(path, frames, PREVIEW_FPS)


def above_each_other(clips, reconstructions):
    """Each of N clips (N, 3, T, H, W), followed by its reconstruction: (2N, 3, T, H, W)."""
    return torch.stack([clips, reconstructions], 1).flatten(0, 1)


# ------------------------------------------------------------------------------------------------------------
# 4. Training
# ------------------------------------------------------------------------------------------------------------

RECIPES = {                                                            # what get_args takes as defaults
    "ucf-128": dict(stage1.PUBLISHED, length="2000ep", global_batch_size=128, lr_schedule="cosine",
                    warmup="2ep", milestones=[], final_lr=0.01, gan_weight=0.3, lecam_weight=0.05),
    "toy": dict(stage1.RECIPES["toy"], data_path="generated", length="900", global_batch_size=8, lr=2e-3),
}


def patchgan_3d():
    """The discriminator of clips: PatchGAN of 3 x 3 x 3 kernels. Its first two convs halve T, H and W, the
    third H and W. BatchNorm's statistics are those of one rank, as for pictures."""
    return stage1.PatchGAN(nn.Conv3d, nn.BatchNorm3d, kernel=3, strides=(2, (2, 2, 2), (1, 2, 2), 1))


def train(args):
    """Train a video tokenizer: L1 and LPIPS frame by frame, 3D PatchGAN with LeCAM, entropy, commitment."""
    device = runtime.setup_process_group(args.device)
    torch.manual_seed(args.global_seed)                                  # equal initial weights on every rank
    config = stage1.config_from_args(args, VideoTokenizerConfig)
    model = VideoTokenizer(config)
    resumes = args.resume and (args.resume != "latest" or runtime.list_checkpoints(args.results_dir))
    if args.inflate_from and not resumes:
        image, info = tok.load_tokenizer(args.inflate_from, not args.raw_weights, args.trust_checkpoint)
        inflate(image.state_dict(), model)
        runtime.print_main(f"inflated the {info['weights']} weights of {args.inflate_from}")
    discriminator = patchgan_3d() if args.gan_weight > 0 else None
    check_split_lists(args)
    size, frames = config.resolution, config.frames
    dataset = data.build_clips(args.data_path, "train", size, frames, args.crop, args.flip,
                               resize=args.resize, split_list=args.split_list)
    held_out = data.build_clips(args.val_data_path or args.data_path, "val", size, frames,
                                resize=args.resize, split_list=args.val_split_list)
    fixed = next(iter(data.eval_loader(held_out, args.grid_size, rank=0, world_size=1)))[0]

    def preview(step, logger):
        """Log held-out clips over their reconstructions, as a strip and an animation, and their mean PSNR."""
        with torch.no_grad():                                            # one clip at a time: it may be large
            reconstruction = torch.cat([runtime.to_uint8(model.decode(model.encode(x[None].to(device)))).cpu()
                                        for x in data.to_float(fixed)])
        scale = max(1, 64 // size)
        logger.image(step, "reconstructions", strip(above_each_other(fixed, reconstruction), scale=scale))
        save_animation(pathlib.Path(args.results_dir) / f"reconstructions-{step:08d}.{args.animation}",
                       animated_grid(torch.cat([fixed, reconstruction]), len(fixed), scale=scale))
        logger.log(step, {"grid_psnr": psnr(fixed, reconstruction)}, show=("grid_psnr",))

    stage1.train(args, device, config, model, discriminator, dataset, preview)


def check_split_lists(args):
    """Raise `UserError` unless both split lists are given or neither."""
    runtime.require(bool(args.split_list) == bool(args.val_split_list), "--split-list and --val-split-list "
                    "are a pair, such as trainlist01.txt and testlist01.txt; give both or neither")


def psnr(clips, reconstructions):
    """Mean over clips of the PSNR in dB of uint8 (N, 3, T, H, W), over all pixels of all frames of a clip."""
    parts = zip(clips.split(64, dim=2), reconstructions.split(64, dim=2))     # a long clip is large in floats
    error = sum((a.float() - b.float()).square().sum((1, 2, 3, 4)) for a, b in parts) / clips[0].numel()
    return (10 * torch.log10(255 ** 2 / error.clamp_min(1e-6))).mean().item()


def add_train_flags(parser, preset):
    """The flags of `train`: those of stage I, and what only clips have. `preset` decides the defaults."""
    group = parser.add_argument_group("data and preset")
    group.add_argument("--preset", choices=PRESETS, default="toy", help="model and recipe: other defaults")
    group.add_argument("--data-path", default="generated", help="folder of clips, train|test/CLASS/*.avi, or "
                                                                "the built-in set generated")
    group.add_argument("--val-data-path", help="held-out clips, if --data-path has no val/ or test/")
    group.add_argument("--frames", type=runtime.positive_int, help="of a clip: 1 + k x the stride in time")
    group.add_argument("--image-size", dest="resolution", type=runtime.positive_int, help="side of the crops")
    group.add_argument("--split-list", help="official UCF-101 list of the training clips in --data-path")
    group.add_argument("--val-split-list", help="official UCF-101 list of the held-out clips")
    group.add_argument("--resize", type=runtime.positive_int,
                       help="shorter side before the crop, for small crops of large frames (--image-size)")
    group.add_argument("--crop", choices=("random", "center"), default="random",
                       help="where and when a training clip is cut out of its video")
    group.add_argument("--flip", action="store_true", help="mirror half of the clips (published: no)")
    group.add_argument("--inflate-from", help="start from this image tokenizer, ours or published, of the "
                                              "same channels, levels and blocks")
    group.add_argument("--raw-weights", action="store_true",
                       help="of --inflate-from take the raw weights, not their average (EMA)")
    group.add_argument("--results-dir", default="runs/video", help="for checkpoints, logs and pictures")
    group.add_argument("--animation", choices=("webp", "gif"), default="webp", help="format of the previews")
    stage1.add_model_flags(parser)
    parser.add_argument("--time-strides", type=int, nargs="*", default=[],
                        help="1 or 2 for each step between levels; none: 2 where the multiplier is above 1")
    stage1.add_training_flags(parser)
    parser.set_defaults(**RECIPES[preset], **tok.config_to_dict(PRESETS[preset]))
    parser.set_defaults(discriminator="patchgan-3d", grid_size=4)


# ------------------------------------------------------------------------------------------------------------
# 5. Reconstruction
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def reconstruct_clip(model, clip, mixed_precision="fp32"):
    """A clip uint8 (3, T, H, W) of any length through `model`, window by window: uint8 (3, T, H, W).

    Windows have the length that the model was trained with. The last one is filled up with its last frame to
    the next 1 + k * time_stride, and cut again. H and W must be multiples of the model's stride.
    """
    device, frames, parts = next(model.parameters()).device, model.config.frames, []
    for window in clip.split(frames, dim=1):
        missing = -(window.shape[1] - 1) % model.config.time_stride
        filled = torch.cat([window, window[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        with runtime.autocast(device, mixed_precision):
            x = model.decode(model.encode(data.to_float(filled[None].to(device))))
        parts.append(runtime.to_uint8(x)[0, :, :window.shape[1]].cpu())
    return torch.cat(parts, dim=1)


def reconstruct(args):
    """Send clips of any length through a trained tokenizer; write each beside its original."""
    device = runtime.setup_process_group(args.device)
    ckpt = args.ckpt or runtime.latest_checkpoint("runs/video", "video tokenizer")
    model, info = load_video_tokenizer(ckpt, not args.raw_weights, args.trust_checkpoint)
    size, stride = args.image_size or model.config.resolution, model.config.downsampling
    runtime.require(size % stride == 0,
                    f"--image-size {size} is no multiple of the tokenizer's stride {stride}")
    runtime.print_main(f"{ckpt}: {info['weights']} weights of step {info['step']}, preset {info['preset']}")
    model.to(device)
    rows, scores, broken = [], [], 0
    for name, output, load in clips_to_reconstruct(args, size, model.config):
        try:
            clip, fps = load()
        except runtime.UserError:
            raise
        except Exception as error:                           # decoders raise anything on damaged bytes
            broken += 1
            print(f"broken clip skipped: {name} ({error})", file=sys.stderr, flush=True)
            continue
        start = time.perf_counter()
        reconstruction = reconstruct_clip(model, clip, args.mixed_precision)
        seconds = time.perf_counter() - start
        gap = torch.full_like(clip[..., :4], 255)
        data.write_video(output, as_frames(torch.cat([clip, gap, reconstruction], dim=-1)), fps)
        scores.append(psnr(clip[None], reconstruction[None]))
        rows.append([name, " x ".join(map(str, clip.shape[1:])), f"{scores[-1]:.2f}",
                     f"{clip.shape[1] / seconds:.1f}", output])
    runtime.require(rows, f"--input {args.input}: none of the clips there can be read ({broken} broken)")
    runtime.print_table(rows, ["clip", "frames x height x width", "PSNR dB", "frames/s", "written"])
    mean = sum(scores) / len(scores)
    runtime.print_main(f"mean PSNR {mean:.2f} dB over {len(rows)} clips, {broken} broken")


def clips_to_reconstruct(args, size, config):
    """(name, file to write, function that loads (clip uint8 (3, T, H, W), frames a second)) of each clip."""
    output = pathlib.Path(args.output)
    if args.input is None:
        held_out = data.build_clips("generated", "val", size, config.frames)
        return [(f"generated, {name}", output / f"{name}.{args.format}",
                 lambda i=i: (held_out[i][0], PREVIEW_FPS)) for i, name in enumerate(held_out.classes)]
    source = pathlib.Path(args.input)
    runtime.require(source.exists(), f"--input {source} does not exist; check the path")
    if source.is_dir():
        files = sorted(p for p in source.rglob("*")
                       if p.suffix.lower() in data.VIDEO_SUFFIXES and not p.name.startswith("."))
        runtime.require(files, f"--input {source} holds no clips ({' '.join(data.VIDEO_SUFFIXES)})")
        runtime.require(not output.suffix, f"--output {output} is one file, but --input is a folder; name a "
                                           f"folder, and choose the kind of files with --format")
        # The whole old name stays in the new one: a.avi and a.mp4 are two clips.
        outputs = [output / path.relative_to(source).with_name(f"{path.name}.{args.format}")
                   for path in files]
    else:
        files = [source]
        outputs = [output if output.suffix else output / f"{source.name}.{args.format}"]
    for path, target in zip(files, outputs):
        runtime.require(target.suffix[1:].lower() in FORMATS,
                        f"--output {target}: clips are written as {', '.join(FORMATS)}")
        runtime.require(target.resolve() != path.resolve(), f"--output {target} would overwrite --input")
    return [(str(path), target, lambda path=path: load_clip(path, size, config.downsampling))
            for path, target in zip(files, outputs)]


def load_clip(path, size, stride):
    """A video file or animated picture, its shorter side at `size`: uint8 (3, T, H, W), and frames a second.

    The longer side is cut in the middle to a multiple of `stride`. Frames are made small as they are decoded,
    so a long video needs no more memory than what is written of it. Raises what the decoder raises.
    """
    frames = []
    for convert in data.video_frames(path):
        picture = data.resize_shorter_side(convert(), size)
        width, height = (side // stride * stride for side in picture.size)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        frames.append(data.image_to_tensor(picture.crop((left, top, left + width, top + height))))
    return torch.stack(frames, dim=1), data.frame_rate(path)


def get_args(argv=None):
    """Parse the command line; no command at all means "train"."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    first = runtime.ArgumentParser("", add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="toy", help="see below")
    preset = first.parse_known_args(argv)[0].preset

    parser = runtime.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", help="train a video tokenizer", description=train.__doc__)
    add_train_flags(p, preset)
    p = commands.add_parser("reconstruct", help="see clips through one", description=reconstruct.__doc__)
    p.add_argument("--ckpt", help="video tokenizer checkpoint, ours or published; the newest of runs/video")
    p.add_argument("--input", help=f"clip ({' '.join(data.VIDEO_SUFFIXES)}) or folder; ten generated clips")
    p.add_argument("--output", default="runs/reconstructions", help="file to write, or folder")
    p.add_argument("--format", choices=FORMATS, default="webp",
                   help="of the files in a folder --output")
    p.add_argument("--image-size", type=runtime.positive_int, help="shorter side (the tokenizer's)")
    p.add_argument("--raw-weights", action="store_true", help="the raw weights, not their average (EMA)")
    p.add_argument("--trust-checkpoint", action="store_true", help="unpickle foreign classes in --ckpt")
    p.add_argument("--mixed-precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                   help="autocast dtype")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return parser.parse_args(argv or ["train"])


def main(args):
    """Run the command that `args` (from `get_args`) name."""
    {"train": train, "reconstruct": reconstruct}[args.command](args)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
