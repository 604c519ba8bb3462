"""Runs are exact: over ranks, over kill -9, over any share of the work. One launcher, all scripts."""
import pytest
import torch

import train_ar
import train_tokenizer
from support import runtime
from helpers import assert_same, call, kill_when, logged, newest, run_script, save_images

pytestmark = pytest.mark.slow
TINY = ["--blocks", 1, "--image-size", 16, "--bits", 6]
IMAGES = [*TINY, "--gan-weight", 0.1, "--discriminator", "blurpool", "--lecam-weight", 0.05,
          "--entropy-weight", 0.1, "--adaptive-gan-weight", "--global-batch-size", 4, "--warmup", 2]
CLIPS = ["--preset", "toy-video", "--image-size", 16, "--bits", 6, "--frames", 5, "--global-batch-size", 2,
         "--gan-weight", 0.1, "--lecam-weight", 0.05]
AR = ["--split", 3, 3, "--width", 32, "--heads", 2, "--inter-blocks", 2, "--global-batch-size", 4,
      "--val-size", 8, "--token-dropout", 0.1]


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    """120 of them."""
    return save_images(tmp_path_factory.mktemp("images"), 120)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory, folder_of_images):
    """A tokenizer that was trained for two steps on those images."""
    folder = tmp_path_factory.mktemp("tokenizer")
    call(train_tokenizer, *TINY, "--global-batch-size", 4, "--length", 2, "--results-dir", folder,
         "--data-path", folder_of_images)
    return runtime.latest_checkpoint(folder)


@pytest.fixture(scope="module")
def ar_path(tmp_path_factory, tokenizer_path):
    """A transformer that was trained for two steps on its tokens."""
    folder = tmp_path_factory.mktemp("ar")
    call(train_ar, *AR, "--tokenizer", tokenizer_path, "--length", 2, "--results-dir", folder)
    return runtime.latest_checkpoint(folder)


# ---- training: kill -9 and resume -------------------------------------------------------------------------

def assert_resumes_exactly(script, folder, flags, ranks):
    """A run that is killed after the checkpoint of step 3 ends as an uninterrupted one, bit for bit."""
    # Lines of four steps: the means must not notice that a checkpoint stands between two of them.
    flags = [*flags, "--log-every", 4, "--checkpoint-every", 3, "--length", 8]
    run_script(script, "--results-dir", folder / "whole", *flags, ranks=ranks)
    killed = folder / "killed"
    saved = killed / "step-00000003.pt"
    kill_when(script, "--results-dir", killed, *flags, until=saved.exists, ranks=ranks)
    assert not (killed / "step-00000008.pt").exists(), "killed too late to prove anything"
    run_script(script, "--results-dir", killed, *flags, "--resume", ranks=ranks)
    assert_same(newest(folder / "whole"), newest(killed))
    assert logged(folder / "whole") == logged(killed)


@pytest.mark.parametrize("flags, ranks", [
    (IMAGES, 1), ([*IMAGES, "--num-workers", 1], 2), (CLIPS, 1)], ids=["gan", "two-ranks-workers", "clips"])
def test_tokenizer_resumes_bit_for_bit_after_kill(tmp_path, flags, ranks, folder_of_images):
    if flags[0] != "--preset":
        flags = [*flags, "--data-path", folder_of_images]
    assert_resumes_exactly("train_tokenizer.py", tmp_path, flags, ranks)


@pytest.mark.parametrize("flags, ranks", [
    (["--ema-decay", 0.9], 1), (["--mixed-precision", "bf16", "--accumulation", 2], 2),
    (["--online", "--flip", "--num-workers", 1], 1)], ids=["stored", "two-ranks-bf16", "online"])
def test_transformer_resumes_bit_for_bit_after_kill(tmp_path, flags, ranks, tokenizer_path):
    flags = [*AR, "--tokenizer", tokenizer_path, *flags, "--val-every", 4]
    assert_resumes_exactly("train_ar.py", tmp_path, flags, ranks)


# ---- training: two ranks are one with the double batch ----------------------------------------------------

def assert_two_ranks_equal_one(folder, script, flags):
    """Logs and weights of two ranks, and of one with the double batch, agree to rounding."""
    one, two = folder / "1", folder / "2"
    for ranks, results in ((1, one), (2, two)):
        run_script(script, *flags, "--length", 3, "--log-every", 1, "--results-dir", results, ranks=ranks)
    a, b = logged(one), logged(two)
    assert a.keys() == b.keys()
    for step in a:
        assert a[step].keys() == b[step].keys()
        for name, value in a[step].items():
            assert b[step][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, name)
    a, b = newest(one), newest(two)
    for part in ("model", "ema"):
        for name, tensor in a[part].items():
            torch.testing.assert_close(b[part][name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("flags", [IMAGES, [*CLIPS[:-4], "--global-batch-size", 4, "--warmup", 50]],
                         ids=["images", "clips"])
def test_two_tokenizer_ranks_equal_the_double_batch(tmp_path, flags):
    assert_two_ranks_equal_one(tmp_path, "train_tokenizer.py", [*flags, "--lr", 1e-4])


def test_two_transformer_ranks_equal_the_double_batch(tmp_path, tokenizer_path):
    flags = [*AR[:-2], "--label-dropout", 0, "--tokenizer", tokenizer_path]
    assert_two_ranks_equal_one(tmp_path, "train_ar.py", flags)


# ---- tokens and samples: any number of ranks, any interruption ---------------------------------------------

def test_stored_tokens_are_the_same_for_any_ranks(tmp_path, tokenizer_path):
    files = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        run_script("train_ar.py", *AR, "--global-batch-size", 6, "--ten-crop", "--length", 1, "--tokenizer",
                   tokenizer_path, "--results-dir", folder, ranks=ranks)
        files.append((folder / "tokens.bin").read_bytes())
    assert files[0] == files[1] == files[2] and len(set(files[0])) > 8


def test_encoding_survives_a_kill(tmp_path, tokenizer_path):
    save_images(tmp_path / "many", 2000)
    flags = [*AR, "--tokenizer", tokenizer_path, "--length", 1, "--data-path", tmp_path / "many"]
    tokens = [tmp_path / name / "tokens.bin" for name in ("whole", "killed")]
    run_script("train_ar.py", *flags, "--results-dir", tokens[0].parent)
    done = tokens[1].with_name("tokens.bin.done")                       # a byte for each row
    kill_when("train_ar.py", *flags, "--results-dir", tokens[1].parent,
              until=lambda: done.exists() and any(done.read_bytes()))
    assert not all(done.read_bytes()), "killed too late to prove anything"
    run_script("train_ar.py", *flags, "--results-dir", tokens[1].parent, ranks=2)
    assert tokens[0].read_bytes() == tokens[1].read_bytes() and not done.exists()


def test_samples_are_the_same_for_any_ranks_and_kills(tmp_path, ar_path):
    flags = ["--ckpt", ar_path, "--num-fid-samples", 44, "--batch-size", 4]
    files = []
    for ranks in (1, 2, 3):
        output = tmp_path / f"{ranks}.npz"
        run_script("sample.py", *flags, "--output", output, ranks=ranks)
        files.append(output.read_bytes())
    output = tmp_path / "killed.npz"
    kill_when("sample.py", *flags, "--output", output,
              until=lambda: len(list(tmp_path.rglob("killed.npz*/*.npy"))) > 2)
    assert not output.exists()
    run_script("sample.py", *flags, "--output", output, ranks=2)
    assert all(file == files[0] for file in [*files, output.read_bytes()])
