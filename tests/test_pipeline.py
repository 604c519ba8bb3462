"""Both stages together, at the scale of a test: pictures, tokens, transformer, pictures of a class."""
import numpy as np
import pytest
import torch

import data
import judge
import runtime
import sample
import train_ar
import train_tokenizer

SIDE = 16                                  # a quarter of the toy preset's pixels, so a quarter of its time


def run(script, *flags):
    """A script's main in this process, as its command line would call it."""
    script.main(script.get_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the toy tokenizer and, on its tokens, a toy transformer were trained for a minute."""
    folder = tmp_path_factory.mktemp("pipeline")
    run(train_tokenizer, "--image-size", SIDE, "--length", 500, "--results-dir", folder / "tokenizer")
    run(train_ar, "--tokenizer", runtime.latest_checkpoint(folder / "tokenizer"), "--length", 800,
        "--results-dir", folder / "ar", "--grid-size", 10)
    return folder


def test_samples_are_of_the_class_that_was_asked_for(trained):
    train = data.build_dataset("generated-plain", "train", SIDE)
    classify = judge.learn_classes(train, steps=250)
    held_out = data.build_dataset("generated-plain", "val", SIDE, length=200)
    images, labels, _ = next(iter(data.eval_loader(held_out, 200, 0, 1)))
    agreement = {"real pictures": judge.agreement(classify, images, labels)}
    for scale in (1, 2):
        output = trained / f"guided-{scale}.npz"
        run(sample, "--ckpt", runtime.latest_checkpoint(trained / "ar"), "--num-fid-samples", 200,
            "--cfg-scale", scale, "--output", output)
        with np.load(output) as file:
            images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
        agreement[f"guidance {scale}"] = judge.agreement(classify, images, torch.arange(200) % 10)
    print(f"classifier agrees with the asked class (chance 0.10): {agreement}")
    assert agreement["real pictures"] > 0.9
    assert agreement["guidance 2"] > 0.3, agreement         # measured: 0.46; after the demo's length: 0.99
