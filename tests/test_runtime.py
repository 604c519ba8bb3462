"""The plumbing: files are written whole or not at all, logs resume, downloads are verified."""
import json

import numpy as np
import pytest
import torch

import runtime
from helpers import run_script


def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    path = tmp_path / "step-00000001.pt"
    runtime.save_checkpoint(path, {"a": torch.ones(3)})
    with pytest.raises(Exception):
        runtime.save_checkpoint(path, {"a": torch.ones(3), "b": lambda: None})            # cannot be pickled
    assert torch.equal(runtime.load_checkpoint(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_old_checkpoints_are_pruned_oldest_first(tmp_path):
    for step in (5, 40, 300):
        runtime.save_checkpoint(runtime.checkpoint_path(tmp_path, step), {})
    runtime.prune_checkpoints(tmp_path, keep=2)
    assert [p.name for p in runtime.list_checkpoints(tmp_path)] == ["step-00000040.pt", "step-00000300.pt"]
    with pytest.raises(runtime.UserError, match="train one first"):
        runtime.latest_checkpoint(tmp_path / "none")


def test_log_drops_what_a_resumed_run_will_log_again(tmp_path):
    logger = runtime.Logger(tmp_path, total_steps=4)
    for step in (1, 2, 3):
        logger.log(step, {"loss": float(step)})
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')                                      # killed in the middle of a line
    runtime.Logger(tmp_path, total_steps=4, start_step=2).close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_downloads_are_verified_and_offline_is_one_clear_line(tmp_path):
    source = tmp_path / "weights.bin"
    source.write_bytes(b"weights")
    url, sha = source.as_uri(), runtime.sha256_of(source)
    path = runtime.fetch(url, tmp_path / "cache", sha)
    assert path.read_bytes() == b"weights"
    path.write_bytes(b"tampered")
    with pytest.raises(runtime.UserError, match="not the published file"):
        runtime.fetch(url, tmp_path / "cache", sha)
    with pytest.raises(runtime.UserError, match="cannot download"):
        runtime.fetch(url, tmp_path / "other", "0" * 64)
    assert not (tmp_path / "other" / "weights.bin").exists()
    with pytest.raises(runtime.UserError, match="put it at .*none.bin"):
        runtime.fetch((tmp_path / "none.bin").as_uri(), tmp_path / "cache")


def test_averaged_weights_come_and_go_bit_for_bit():
    model = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with runtime.averaged_weights(model, {name: torch.zeros_like(p) for name, p in before.items()}):
        assert all((p == 0).all() for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_image_grid_has_a_place_for_every_image_and_its_caption():
    images = torch.arange(6, dtype=torch.uint8).mul(40).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    grid = runtime.image_grid(images, columns=4, scale=2)
    assert grid.shape == (2 * (16 + 2) + 2, 4 * (16 + 2) + 2, 3) and grid.dtype == np.uint8
    assert grid[10, 10].tolist() == [0] * 3 and grid[2 + 18 + 5, 2 + 18 + 5].tolist() == [200] * 3
    assert runtime.image_grid(images, 4, labels=list("abcdef")).shape[0] == 2 * (8 + 2 + 14) + 2


def test_to_uint8_is_the_inverse_of_the_model_range():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(runtime.to_uint8(levels.float() / 127.5 - 1), levels)
    assert runtime.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_durations_are_steps_or_epochs():
    assert runtime.to_steps("50", 7) == 50 and runtime.to_steps("2.5ep", 10) == 25
    for text in ("ten", "-1", "5 ep", ""):
        with pytest.raises(Exception):
            runtime.duration(text)


def test_curves_are_drawn_and_unknown_names_are_listed(tmp_path):
    pytest.importorskip("matplotlib")
    logger = runtime.Logger(tmp_path / "run", total_steps=2)
    logger.log(1, {"loss/l1": 1.0}), logger.log(2, {"loss/l1": 0.5})
    logger.close()
    result = run_script("runtime.py", tmp_path / "run", "--output", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000, result.stdout
    result = run_script("runtime.py", tmp_path / "run", "--values", "lost", check=False)
    assert result.returncode == 2 and "loss/l1" in result.stderr and len(result.stderr.splitlines()) == 1
