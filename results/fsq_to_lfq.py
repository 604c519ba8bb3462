"""An FSQ tokenizer becomes one of LFQ with as many ids: each digit is written as bits, in Gray code.

    python results/fsq_to_lfq.py runs/photo_1 photo_set runs/photo_lfq.pt --image-size 64 --resize 96

Why: where a token has to tell brightness finely, LFQ must find out by itself that several signs should count
together, as 1, 2, 4 do. Its straight-through gradient sees one sign at a time, and ends with bits that each
tell a little. FSQ's channel of 8 levels counts from the start. So FSQ learns first, then its digits are
taught to signs. In Gray code neighbouring digits differ in one bit, and each bit is the sign of a wave that
is continuous in FSQ's z. For 8 levels, where t is z in units of a level, so that |t| is at most 3.5:

    digit         0    1    2    3    4    5    6    7
    t             -    -    -    -    +    +    +    +
    2 - |t|       -    -    +    +    +    +    -    -
    1 - |2 - |t|| -    +    +    -    -    +    +    -

The encoder learns these waves from FSQ's encoder, the decoder to paint from their signs. What comes out is a
start for train_tokenizer.py --init-from, which then trains both together as usual (eq. 1 to 3).
"""
import dataclasses
import math
import pathlib
import sys

import torch

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent)]

import tokenizer                                                           # noqa: E402
import train_tokenizer                                                     # noqa: E402
from support import checkpoints, data, pictures, runtime, sources          # noqa: E402
from support.runtime import require                                        # noqa: E402


def waves(z, levels):
    """FSQ's z (B, C, h, w) in -1 .. 1 to (B, C log2(levels), h, w) in [-1, 1], positive where a bit is 1."""
    t = z * (levels - 1) / 2                               # a level is 1 wide now, and half are positive
    found = [t]
    while levels > 2:
        levels //= 2
        found.append(levels / 2 - found[-1].abs())
    return torch.stack(found, 2).flatten(1, 2).clamp(-1, 1)


def main(args):
    """Train the LFQ tokenizer, and write it."""
    require(args.output.suffix == ".pt", f"{args.output}: a checkpoint is called NAME.pt")
    args.output.parent.mkdir(parents=True, exist_ok=True)                  # to fail now, if at all
    teacher, info = checkpoints.load_tokenizer(args.fsq)
    config = teacher.config
    levels = max(config.levels)
    require(config.quantizer == "fsq" and set(config.levels) == {levels} and math.log2(levels) % 1 == 0,
            f"{args.fsq} has {config.quantizer} {config.levels}; give one of fsq, whose --levels are all "
            f"equal and a power of two")
    bits = len(config.levels) * int(math.log2(levels))
    torch.manual_seed(0)
    student = tokenizer.Tokenizer(dataclasses.replace(config, quantizer="lfq", bits=bits))
    train_tokenizer.start_from(args.fsq, student, None)
    view = data.View(args.image_size, crop="random", flip=True, resize=args.resize)
    dataset = sources.build_dataset(args.data_path, "train", view)
    loader = data.train_loader(dataset, args.global_batch_size, 0)
    optimizer = torch.optim.Adam(student.parameters(), args.lr, (0.9, 0.99))
    for step in range(1, args.length + 1):
        lr = args.lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.length))
        for group in optimizer.param_groups:
            group["lr"] = lr
        x = pictures.to_float(next(loader)[0])                             # (B, 3, H, W)
        with torch.no_grad():
            target = waves(teacher.quantizer.bound(teacher.encoder(x)), levels)          # (B, K, h, w)
            q = torch.where(target > 0, 1.0, -1.0)
        z = student.encoder(x)                                             # (B, K, h, w)
        x_hat = student.decoder(q)
        wave = (z - target).square().mean()
        terms = train_tokenizer.pixel_terms(x, x_hat)
        pixels = terms["l1"] + 4 * terms["l2"]
        (wave + pixels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 10) or step % 100 == 0:
            wrong = ((z > 0) != (target > 0)).float().mean((0, 2, 3)).view(-1, bits // len(config.levels))
            share = ", ".join(f"{100 * x:.1f} %" for x in wrong.mean(0))
            with torch.no_grad():
                psnr = -10 * (student(x)[0].clamp(-1, 1) - x).div(2).square().mean().log10()
            print(f"step {step}/{args.length} | waves {wave:.4f} | wrong bits {share} | "
                  f"pixels {pixels:.4f} | all together {psnr:.2f} dB", flush=True)
    with runtime.atomic(args.output) as temporary:
        torch.save({"format": checkpoints.format_of(student), "step": args.length, "args": info["trained_on"],
                    "model": student.state_dict(), "config": dataclasses.asdict(student.config)}, temporary)
    print(f"wrote {args.output}")


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("fsq", help="tokenizer of FSQ: a file, or the folder of a run")
    parser.add_argument("data_path", help="images to learn from, as of train_tokenizer.py")
    parser.add_argument("output", type=pathlib.Path, help="file to write")
    parser.add_argument("--image-size", type=int, default=32, help="side of the crops")
    parser.add_argument("--resize", type=int, help="shorter side before the crop")
    parser.add_argument("--global-batch-size", type=int, default=8, help="crops a step")
    parser.add_argument("--length", type=int, default=4000, help="steps")
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest, of Adam")
    return parser.parse_args(argv)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
