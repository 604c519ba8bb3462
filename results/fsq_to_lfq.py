"""An FSQ tokenizer becomes one of LFQ with as many ids: each digit is written as bits, in Gray code.

    python results/fsq_to_lfq.py runs/photo_2 photo_set_160 runs/photo_lfq.pt --image-size 128 --resize 160

Why: where a token has to tell brightness finely, LFQ must find out by itself that the signs of several channels
should count together, as 1, 2, 4 do. Its straight-through gradient sees one sign at a time, and ends with bits
that each tell a little. FSQ's 8 levels count from the start. So FSQ learns first, then its digits are taught to
signs. In Gray code neighbouring digits differ in one bit, and each bit is the sign of a wave that is continuous
in FSQ's z. For 8 levels, where t is z in units of a level, so that |t| is at most 3.5:

    digit            0    1    2    3    4    5    6    7
    t                -    -    -    -    +    +    +    +
    2 - |t|          -    -    +    +    +    +    -    -
    1 - |2 - |t||    -    +    +    -    -    +    +    -

Both halves get one block more, next to the code: in the encoder it learns these waves, in the decoder to turn
their signs into what FSQ's decoder makes of its digits. What comes out is a start for train_tokenizer.py
--init-from, which then trains all of it as usual (eq. 1 to 3).
"""
import dataclasses
import math
import pathlib
import re
import sys

import torch

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent)]

import tokenizer                                                           # noqa: E402
from support import checkpoints, data, pictures, runtime, sources          # noqa: E402
from support.runtime import require                                        # noqa: E402


def waves(z, levels):
    """FSQ's z (B, C, h, w) in -1 .. 1 to (B, C log2(levels), h, w) in [-1, 1]: positive where the bit is 1."""
    t = z * (levels - 1) / 2                               # a level is 1 wide now, and half of them are positive
    found = [t]
    while levels > 2:
        levels //= 2
        found.append(levels / 2 - found[-1].abs())
    return torch.stack(found, 2).flatten(1, 2).clamp(-1, 1)


def inherit(student, teacher):
    """Give `student` all layers of `teacher` but those next to the code, where it has one block more."""
    state = student.state_dict()
    for name, weight in teacher.state_dict().items():
        later = re.sub(r"(?<=decoder\.up\.0\.block\.)\d+", lambda number: str(int(number[0]) + 1), name)
        if later in state and state[later].shape == weight.shape:
            state[later] = weight
    student.load_state_dict(state)
    # To begin with, the encoder's new block lets through what the ones before make of the image.
    torch.nn.init.zeros_(student.encoder.down[0].block[-1].conv2.weight)


def behind_code(decoder, q, blocks):
    """What the `decoder` knows of q (B, K, h, w) after so many of its blocks: (B, C, h, w)."""
    x = decoder.adaptive[0](decoder.conv_in(q), q)
    for block in list(decoder.up[0].block)[:blocks]:
        x = block(x)
    return x


def main(args):
    """Train the LFQ tokenizer, and write it."""
    require(args.output.suffix == ".pt", f"{args.output}: a checkpoint is called NAME.pt")
    args.output.parent.mkdir(parents=True, exist_ok=True)                  # to fail now, if at all
    teacher, info = checkpoints.load_tokenizer(args.fsq)
    config = teacher.config
    levels = max(config.levels)
    require(config.quantizer == "fsq" and set(config.levels) == {levels} and math.log2(levels) % 1 == 0,
            f"{args.fsq} has {config.quantizer} {config.levels}; give one of fsq, whose --levels are equal and a "
            f"power of two")
    require(len(config.channel_multipliers) == 1 and config.mid_blocks == 0 and config.adaptive_norm,
            f"{args.fsq}: this is written for --channel-multipliers 1 and --adaptive-norm")
    bits = len(config.levels) * int(math.log2(levels))
    student = tokenizer.Tokenizer(dataclasses.replace(config, quantizer="lfq", bits=bits,
                                                      blocks=config.blocks + 1))
    inherit(student, teacher)
    dataset = sources.build_dataset(args.data_path, "train", data.View(args.image_size, crop="random", flip=True,
                                                                       resize=args.resize))
    loader = data.train_loader(dataset, args.global_batch_size, seed=0)
    optimizer = torch.optim.Adam(student.parameters(), args.lr, (0.9, 0.99))
    for step in range(1, args.length + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.length))
        x = pictures.to_float(next(loader)[0])                             # (B, 3, H, W)
        with torch.no_grad():
            digits = teacher.quantizer.bound(teacher.encoder(x))           # (B, C, h, w) in -1 .. 1
            wanted = behind_code(teacher.decoder, teacher.quantizer(digits)[0], 0)       # (B, width, h, w)
            target = waves(digits, levels)                                 # (B, K, h, w)
            q = torch.where(target > 0, 1.0, -1.0)
        z = student.encoder(x)                                             # (B, K, h, w)
        wave = (z - target).square().mean()
        front = (behind_code(student.decoder, q, 1) - wanted).square().mean() / wanted.square().mean()
        (wave + front).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 10) or step % 100 == 0:
            wrong = ((z > 0) != (target > 0)).float().mean((0, 2, 3)).view(len(config.levels), -1).mean(0)
            with torch.no_grad():
                psnr = -10 * (student(x)[0].clamp(-1, 1) - x).div(2).square().mean().log10()
            print(f"step {step}/{args.length} | waves {wave:.4f} | wrong bits "
                  f"{', '.join(f'{100 * share:.1f} %' for share in wrong)} | behind the code {front:.4f} | "
                  f"all together {psnr:.2f} dB", flush=True)
    with runtime.atomic(args.output) as temporary:
        torch.save({"format": checkpoints.format_of(student), "step": args.length, "model": student.state_dict(),
                    "config": dataclasses.asdict(student.config), "args": info["trained_on"]}, temporary)
    print(f"wrote {args.output}")


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("fsq", help="tokenizer of FSQ: a file, or the folder of a run")
    parser.add_argument("data_path", help="images to learn from, as of train_tokenizer.py")
    parser.add_argument("output", type=pathlib.Path, help="file to write")
    parser.add_argument("--image-size", type=int, default=32, help="side of the crops")
    parser.add_argument("--resize", type=int, help="shorter side before the crop")
    parser.add_argument("--global-batch-size", type=int, default=1, help="crops a step")
    parser.add_argument("--length", type=int, default=4000, help="steps")
    parser.add_argument("--lr", type=float, default=4e-4, help="the highest, of Adam")
    return parser.parse_args(argv)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
