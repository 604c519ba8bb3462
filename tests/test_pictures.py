"""What a person looks at: grids, videos and curves show what they are given."""
import numpy as np
import pytest
import torch
from PIL import Image

from support import curves, loops, pictures, reading, sources
from helpers import call, error_line, refused


def test_image_grid_has_a_place_for_every_image_and_caption():
    images = torch.arange(6, dtype=torch.uint8).mul(40).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    grid = pictures.image_grid(images, columns=4, scale=2)
    assert grid.shape == (2 * (16 + 2) + 2, 4 * (16 + 2) + 2, 3) and grid.dtype == np.uint8
    assert grid[10, 10].tolist() == [0] * 3 and grid[2 + 18 + 5, 2 + 18 + 5].tolist() == [200] * 3
    assert pictures.image_grid(images, 4, labels=list("abcdef")).shape[0] == 2 * (8 + 2 + 14) + 2
    assert pictures.image_grid(images[:1], 1).shape == (12, 12, 3)


def test_to_uint8_inverts_to_float():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pictures.to_uint8(pictures.to_float(levels)), levels)
    assert torch.equal(pictures.to_float(levels), (levels.double() / 127.5 - 1).float())
    assert pictures.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert pictures.to_uint8(torch.tensor([0.999]), truncate=True).tolist() == [254]


@pytest.mark.parametrize("suffix", pictures.VIDEO_FORMATS)
def test_written_videos_come_back(tmp_path, suffix):
    frames = np.linspace(0, 250, 5).astype(np.uint8)[:, None, None, None] + np.zeros((5, 17, 31, 3), np.uint8)
    pictures.write_video(tmp_path / f"a{suffix}", frames, fps=10)
    back = np.stack([np.asarray(frame()) for frame in sources.video_frames(tmp_path / f"a{suffix}")])
    assert back.shape[0] == 5 and abs(back[:, :17, :31].astype(int) - frames).max() <= 12
    assert reading.frame_rate(tmp_path / f"a{suffix}") == pytest.approx(10, rel=0.05)
    refused("mp5", pictures.write_video, tmp_path / "a.mp5", frames)


# ---- curves -----------------------------------------------------------------------------------------------

def log(folder, **values):
    """A run that has logged these values, each of two steps."""
    logger = loops.Logger(folder, 2)
    for step in (1, 2):
        logger.log(step, {name: both[step - 1] for name, both in values.items()})
    return curves.read_metrics(folder)


@pytest.fixture
def runs(tmp_path):
    """A tokenizer's and a transformer's."""
    tok = {"loss/commitment": (0.1, 0.3), "loss/l1": (1.0, 0.5), "usage": (0, 1), "grid_psnr": (9.0, 20.0),
           "dead_bits": (0, 0), "lr": (0.1, 0.0)}
    ar = {"loss": (6.0, 5.0), "val_loss": (6.5, 5.5), "loss/1": (3.0, 2.0)}
    return {"tok": log(tmp_path / "tok", **tok), "ar": log(tmp_path / "ar", **ar)}


def test_the_curves_that_matter_are_drawn_and_constant_ones_left_out(runs):
    panels = curves.panels_of(runs)
    assert list(panels) == ["grid_psnr", "loss/l1", "usage", "loss"]
    assert panels["loss"] == [("ar", "C1-", {1: 6.0, 2: 5.0}), ("ar, held out", "C1--", {1: 6.5, 2: 5.5})]
    assert list(curves.panels_of(runs, ["dead_bits", "loss/commitment"])) == ["dead_bits", "loss/commitment"]


def test_runs_of_the_same_name_are_told_apart(tmp_path, monkeypatch, runs):
    for name in ("a", "b"):
        log(tmp_path / name / "tokenizer", usage=(0, 1))
    drawn = []
    original = curves.panels_of
    monkeypatch.setattr(curves, "panels_of", lambda runs, wanted: drawn.append(list(runs)) or original(runs))
    for names in (["a/tokenizer", "b/tokenizer"], ["a/tokenizer"]):
        call(pictures, *[tmp_path / name for name in names], "--output", tmp_path / "c.png")
    assert drawn == [["a/tokenizer", "b/tokenizer"], ["tokenizer"]]


@pytest.mark.slow
@pytest.mark.parametrize("suffix, first", [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_curves_are_written_in_the_format_of_the_suffix(tmp_path, runs, suffix, first):
    call(pictures, tmp_path / "tok", tmp_path / "ar", "--output", tmp_path / f"c{suffix}")
    assert (tmp_path / f"c{suffix}").read_bytes().startswith(first)


def test_a_value_logged_once_is_drawn_as_a_point(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "usage": 0.5}\n')
    call(pictures, tmp_path, "--output", tmp_path / "c.png")
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    blue = (abs(picture - [31, 119, 180]).sum(-1) < 30).any(1)      # rows: the legend, and the point
    assert blue[len(blue) // 3:].any()


def test_mistakes_with_curves_are_one_line(tmp_path, runs):
    assert "loss/l1" in error_line(pictures, tmp_path / "tok", "--values", "lost")
    assert ".png, .pdf, .svg" in error_line(pictures, "no-run", "--output", "c.jpeg")       # before it reads
    with open(tmp_path / "tok" / "metrics.jsonl", "ab") as file:             # what others wrote beside ours
        file.write(b'\xff\xfe\n{"step": [1], "usage": 1}\n{"step": null, "usage": 1}\n[3]\n')
    call(pictures, tmp_path / "tok", "--output", tmp_path / "c.png")
    (tmp_path / "tok" / "metrics.jsonl").write_text("")
    assert "nothing is logged" in error_line(pictures, tmp_path / "tok")
