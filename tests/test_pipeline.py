"""Both stages together, at the scale of a test: images, tokens, transformer, images of a class."""
import numpy as np
import pytest
import torch

import judge
import sample
import train_ar
import train_tokenizer
from support import data, runtime, sources
from helpers import ROOT, call

pytestmark = pytest.mark.slow
SIDE = 16                                  # a quarter of the toy preset's pixels, so a quarter of its time


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A toy transformer that was trained briefly on the tokens of a toy tokenizer that was, too."""
    folder = tmp_path_factory.mktemp("pipeline")
    call(train_tokenizer, "--image-size", SIDE, "--length", 300, "--results-dir", folder / "tokenizer")
    call(train_ar, "--tokenizer", runtime.latest_checkpoint(folder / "tokenizer"), "--length", 400,
         "--results-dir", folder / "ar")
    return runtime.latest_checkpoint(folder / "ar")


def judged(classifier, path, count, *flags):
    """How often the classifier agrees with `count` samples of the transformer at `path`."""
    call(sample, "--ckpt", path, "--num-fid-samples", count, *flags)
    with np.load(flags[-1]) as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    return judge.agreement(classifier, images, torch.arange(count) % 10)


def test_samples_are_of_the_class_asked_for(trained, tmp_path):
    dataset = sources.build_dataset("generated-plain", "train", data.View(SIDE))
    classifier = judge.learn_classes(dataset, steps=250)
    held_out = sources.build_dataset("generated-plain", "val", data.View(SIDE))
    images, labels, _ = next(iter(data.eval_batches(held_out, range(200), 200)))
    assert judge.agreement(classifier, images, labels) > 0.9
    assert judged(classifier, trained, 200, "--cfg-scale", 2, "--output", tmp_path / "a.npz") > 0.25


def test_the_weights_beside_the_code_draw_what_is_asked_for(tmp_path):
    plain = sources.build_dataset("generated-plain", "train", data.View(32))
    classifier = judge.learn_classes(plain, steps=150)
    assert judged(classifier, ROOT / "assets" / "toy.pt", 100, "--output", tmp_path / "a.npz") >= 0.9
