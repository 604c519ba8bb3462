"""Both stages together, at the scale of a test: images, tokens, transformer, images of a class."""
import numpy as np
import pytest
import torch
from PIL import Image

import judge
import sample
import train_ar
import train_tokenizer
from support import data, runtime, sources
from helpers import ROOT, call

pytestmark = pytest.mark.slow


def test_samples_are_of_the_class_asked_for(tmp_path):
    for i in range(120):                                    # red, green and blue ones, lighter at one side
        pixels = np.full((16, 16, 3), 20, np.uint8)
        pixels[:, :, i % 3] = np.linspace(100 + i, 130 + i, 16)
        path = tmp_path / "images" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    call(train_tokenizer, "--data-path", tmp_path / "images", "--image-size", 16, "--length", 60,
         "--global-batch-size", 16, "--results-dir", tmp_path / "tokenizer")
    call(train_ar, "--tokenizer", runtime.latest_checkpoint(tmp_path / "tokenizer"), "--length", 60,
         "--global-batch-size", 16, "--results-dir", tmp_path / "ar")
    call(sample, "--ckpt", runtime.latest_checkpoint(tmp_path / "ar"), "--num-fid-samples", 90,
         "--cfg-scale", 2, "--output", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        brightest = file["arr_0"].mean((1, 2)).argmax(1)
        assert (brightest == file["arr_1"]).mean() > 0.8


def test_the_weights_beside_the_code_draw_what_is_asked_for(tmp_path):
    plain = sources.build_dataset("generated-plain", "train", data.View(32))
    classifier = judge.learn_classes(plain, steps=150)
    call(sample, "--ckpt", ROOT / "assets" / "toy.pt", "--num-fid-samples", 100, "--output",
         tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert judge.agreement(classifier, images, torch.arange(100) % 10) >= 0.9
