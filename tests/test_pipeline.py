"""Both stages together, at the scale of a test: images, tokens, transformer, images of a class."""
import numpy as np
import pytest
import torch

import data
import judge
import runtime
import sample
import train_ar
import train_tokenizer
from helpers import ROOT, call

pytestmark = pytest.mark.slow
SIDE = 16                                  # a quarter of the toy preset's pixels, so a quarter of its time


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the toy tokenizer and, on its tokens, a toy transformer were trained briefly."""
    folder = tmp_path_factory.mktemp("pipeline")
    call(train_tokenizer, "--image-size", SIDE, "--length", 300, "--results-dir", folder / "tokenizer")
    call(train_ar, "--tokenizer", runtime.latest_checkpoint(folder / "tokenizer"), "--length", 400,
         "--results-dir", folder / "ar")
    return folder


def test_samples_are_of_the_class_asked_for(trained):
    classify = judge.learn_classes(data.build_dataset("generated-plain", "train", data.View(SIDE)), steps=250)
    held_out = data.build_dataset("generated-plain", "val", data.View(SIDE))
    images, labels, _ = next(iter(data.eval_batches(held_out, range(200), 200)))
    agreement = {"real images": judge.agreement(classify, images, labels)}
    for scale in (1, 2):
        output = trained / f"guided-{scale}.npz"
        call(sample, "--ckpt", runtime.latest_checkpoint(trained / "ar"), "--num-fid-samples", 200,
             "--cfg-scale", scale, "--output", output)
        with np.load(output) as file:
            images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
        agreement[f"guidance {scale}"] = judge.agreement(classify, images, torch.arange(200) % 10)
    print(f"classifier agrees with the asked class (chance 0.10): {agreement}")
    assert agreement["real images"] > 0.9
    assert agreement["guidance 2"] > 0.25, agreement


def test_the_weights_beside_the_code_draw_what_is_asked_for(tmp_path):
    ckpt = ROOT / "assets" / "toy.pt"
    call(sample, "--ckpt", ckpt, "--num-fid-samples", 100, "--output", tmp_path / "a.npz")
    classify = judge.learn_classes(data.build_dataset("generated-plain", "train", data.View(32)), steps=150)
    with np.load(tmp_path / "a.npz") as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert judge.agreement(classify, images, torch.arange(100) % 10) >= 0.9
