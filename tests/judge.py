"""Are samples of the classes that were asked for? A small classifier, trained on generated data, is asked.

    python sample.py --num-fid-samples 200 --cfg-scale 2 --output runs/judged.npz        # after make demo
    python tests/judge.py runs/judged.npz                  # images, or clips of make demo-video

It learns the ten shapes of `generated-plain`, or for an npz of clips the ten motions of the generated clips,
in under two minutes, and says how many of the samples it agrees on: number n should be of class n mod 10. How
good it is itself, on held-out data, is printed beside. `test_pipeline.py` asks it too.
"""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np                                                         # noqa: E402
import torch                                                               # noqa: E402
import torch.nn as nn                                                      # noqa: E402
import torch.nn.functional as F                                            # noqa: E402

import data                                                                # noqa: E402
import pictures                                                            # noqa: E402
import runtime                                                             # noqa: E402


def learn_classes(dataset, steps):
    """A small network that learns the ten classes of `dataset`; returns a function of uint8 samples (B, ...).

    The frames of a clip are channels to it, so its first layer sees motion as it sees colour.
    """
    torch.manual_seed(0)
    channels = 3 * int(np.prod(dataset.axes[:-2], dtype=int))
    net = nn.Sequential(nn.Conv2d(channels, 32 if channels == 3 else 128, 3, 2, 1), nn.ReLU(),
                        nn.LazyConv2d(64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
                        nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
                        nn.Flatten(), nn.Linear(128 * (dataset.axes[-1] // 8) ** 2, 10))

    def logits(samples):
        return net(pictures.to_float(samples).flatten(1, -3))

    loader = iter(data.train_loader(dataset, 64, seed=0))
    logits(next(loader)[0])                                                # lazy layers look at their input
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        samples, labels, _ = next(loader)
        loss = F.cross_entropy(logits(samples), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    return torch.no_grad()(lambda samples: torch.cat([logits(part).argmax(1) for part in samples.split(200)]))


def agreement(classify, samples, labels):
    """The fraction of `samples` that the classifier takes for what their `labels` say."""
    return (classify(samples) == labels).float().mean().item()


def main(args):
    """Train the classifier that suits the npz, and print how often it agrees."""
    with np.load(args.samples) as file:
        samples = torch.from_numpy(file["arr_0"]).movedim(-1, 1)           # (N, 3, [T,] H, W)
    clips = samples.dim() == 5
    size = samples.shape[-1]
    runtime.require(size % 8 == 0, f"{args.samples}: sides must be multiples of 8, not {size}")
    view = data.View(size, samples.shape[2] if clips else None)
    path = "generated" if clips else "generated-plain"
    train = data.build_dataset(path, "train", view)
    classify = learn_classes(train, args.steps)
    val = data.build_dataset(path, "val", view)
    held_out, labels, _ = next(iter(data.eval_batches(val, range(500), 500)))
    print(f"held-out {train.kind}s: {agreement(classify, held_out, labels):.0%}")
    wanted = torch.arange(len(samples)) % 10
    print(f"samples: {agreement(classify, samples, wanted):.0%} of {len(samples)} are of the class asked for "
          f"(chance 10 %)")
    right = classify(samples) == wanted
    print(", ".join(f"{name} {right[i::10].float().mean():.0%}" for i, name in enumerate(train.classes)))


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("samples", help="npz of sample.py --num-fid-samples, of a model of generated data")
    parser.add_argument("--steps", type=runtime.positive_int, default=400, help="to train the classifier")
    return parser.parse_args(argv)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
