"""Are samples of the classes that were asked for? A small classifier, trained on generated data, is asked.

    python sample.py --num-fid-samples 200 --cfg-scale 2 --output runs/judged.npz        # after make demo
    python tests/judge.py runs/judged.npz                  # images, or clips of make demo-video
    python tests/judge.py runs/tokenizer/step-00001200.pt  # what a tokenizer leaves of held-out samples

It learns the ten shapes of `generated-plain`, or for clips the ten motions of the generated clips, in under
two minutes, and says how many of the samples it agrees on: number n should be of class n mod 10. How good it
is itself, on held-out data, is printed beside. Its last features (128 a sample) also serve where others take
Inception's: distances of sets without a download, which compare with nothing but themselves.
"""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np                                                         # noqa: E402
import torch                                                               # noqa: E402
import torch.nn as nn                                                      # noqa: E402
import torch.nn.functional as F                                            # noqa: E402

from support import checkpoints, data, metrics, pictures, runtime, sources  # noqa: E402


class Classifier(nn.Module):
    """Three convolutions and a linear layer, for samples of `dataset`'s axes.

    The frames of a clip are channels to it, so its first layer sees motion as it sees colour.
    """

    def __init__(self, dataset):
        super().__init__()
        channels = 3 * int(np.prod(dataset.axes[:-2], dtype=int))
        width = 32 if channels == 3 else 128
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU(),
                                  nn.Conv2d(width, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
                                  nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU())
        self.head = nn.Linear(128 * (dataset.axes[-1] // 8) ** 2, 10)

    def forward(self, samples):
        """uint8 samples (B, 3, [T,] H, W) to logits (B, 10)."""
        return self.head(self.body(pictures.to_float(samples).flatten(1, -3)).flatten(1))

    @torch.no_grad()
    def classes(self, samples):
        """The likeliest class of each of any number of samples, (N,)."""
        return torch.cat([self(part).argmax(1) for part in samples.split(200)])

    @torch.no_grad()
    def features(self, samples):
        """The last convolution's mean over positions, (N, 128)."""
        return torch.cat([self.body(pictures.to_float(part).flatten(1, -3)).mean((2, 3))
                          for part in samples.split(200)])


def learn_classes(dataset, steps):
    """A `Classifier` that has learned the ten classes of `dataset`."""
    torch.manual_seed(0)
    net = Classifier(dataset)
    loader = iter(data.train_loader(dataset, 64, seed=0))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        samples, labels, _ = next(loader)
        loss = F.cross_entropy(net(samples), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def agreement(classifier, samples, labels):
    """The fraction of `samples` that the classifier takes for what their `labels` say."""
    return (classifier.classes(samples) == labels).float().mean().item()


def compare(net, real, labels, samples, wanted):
    """{figure: value} of uint8 samples that should be of the classes `wanted`, against as many real ones."""
    sets = [net.features(real), net.features(samples)]
    moments = []
    for features in sets:
        moments.append(metrics.Moments(features.shape[1]))
        moments[-1].add(features)
    precision, recall = metrics.precision_recall(*sets)
    edges = [pictures.to_float(images).diff(dim=-1).abs().mean() for images in (real, samples)]
    return {"classifier": agreement(net, real, labels), "agreement": agreement(net, samples, wanted),
            "frechet": metrics.frechet_distance(*moments[0].mean_and_covariance(),
                                                *moments[1].mean_and_covariance()),
            "mind": metrics.mind(*sets), "precision": precision, "recall": recall,
            "sharpness": float(edges[1] / edges[0])}              # steps between neighbours: 1 is as sharp


def trained(args, dataset):
    """The classifier in the file --classifier, or one that has learned `dataset`, to be kept there."""
    path = pathlib.Path(args.classifier or "")
    if not path.is_file():
        net = learn_classes(dataset, args.steps)
        if args.classifier:
            with runtime.atomic(path) as temporary:
                torch.save(net.state_dict(), temporary)
        return net
    net = Classifier(dataset).eval()
    net.load_state_dict(torch.load(path))
    return net


def main(args):
    """Print, and store, what the classifier that suits the samples sees in them."""
    if args.samples.endswith(".npz"):
        with np.load(args.samples) as file:
            samples = torch.from_numpy(file["arr_0"]).movedim(-1, 1)       # (N, 3, [T,] H, W)
        frames = samples.shape[2] if samples.dim() == 5 else None
        size = samples.shape[-1]
    else:
        model, _ = checkpoints.load_tokenizer(args.samples)
        frames = model.config.frames
        size = model.config.resolution
    runtime.require(size % 8 == 0, f"{args.samples}: sides must be multiples of 8, not {size}")
    view = data.View(size, frames)
    path = "generated" if frames else "generated-plain"
    net = trained(args, sources.build_dataset(path, "train", view))
    val = sources.build_dataset(path, "val", view)
    count = min(args.num_samples, len(samples) if args.samples.endswith(".npz") else len(val))
    real, labels, _ = next(iter(data.eval_batches(val, range(count), count)))
    if args.samples.endswith(".npz"):
        samples = samples[:count]
        wanted = torch.arange(count) % 10
    else:
        wanted = labels
        with torch.no_grad():
            samples = torch.cat([pictures.to_uint8(model.decode(model.encode(pictures.to_float(part))))
                                 for part in real.split(50)])
    found = compare(net, real, labels, samples, wanted)
    print(f"held-out {val.kind}s: {found['classifier']:.0%}")
    print(f"samples: {found['agreement']:.0%} of {count} are of the class asked for (chance 10 %)")
    right = (net.classes(samples) == wanted).float()
    print(", ".join(f"{name} {right[wanted == label].mean():.0%}" for label, name in enumerate(val.classes)))
    print(f"in its features, against as many held-out {val.kind}s: "
          f"Frechet distance {found['frechet']:.3f}, MIND {found['mind']:.3f}, "
          f"precision {found['precision']:.2f}, recall {found['recall']:.2f}")
    if args.output:
        runtime.write_json(args.output, found)


def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser(__doc__)
    parser.add_argument("samples", help="npz of sample.py --num-fid-samples, or a tokenizer")
    parser.add_argument("--num-samples", type=runtime.positive_int, default=500, help="of both sets, at most")
    parser.add_argument("--steps", type=runtime.positive_int, default=400, help="to train the classifier")
    parser.add_argument("--classifier", help="file to keep the classifier in, or to take it from")
    parser.add_argument("--output", help="JSON to write the figures to")
    return parser.parse_args(argv)


if __name__ == "__main__":
    runtime.run_script(main, get_args)
