"""The claims: their commands exist, a CSV is continued where it ends, and figures need nothing but it."""
import importlib
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import claims
import claims_figures
from support import runtime
from helpers import ROOT, call


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_commands_of_claims_are_understood(name, monkeypatch):
    monkeypatch.setattr(claims.Done, "__str__", lambda done: "a.pt")
    for setting in claims.CLAIMS[name].settings:
        for command in claims.CLAIMS[name].commands(setting):
            script, *words = command.format(*[claims.Done(ROOT)] * 5).split()
            words += claims.OUTPUT[script].format("a").split()
            importlib.import_module(pathlib.Path(script).stem).get_args(words)


@pytest.mark.slow
def test_an_interrupted_csv_is_continued(tmp_path, monkeypatch):
    measured = []

    def measure(name, setting, seed, *_):
        measured.append((setting["size"], seed))
        return {**setting, "seed": seed, "psnr": "20.5", "seconds": 1, "version": "1"}

    monkeypatch.setattr(claims, "measure", measure)
    flags = ("resolution", "--seeds", 2, "--jobs", 1, "--csv-dir", tmp_path, "--figures-dir", tmp_path)
    call(claims, *flags)
    path = tmp_path / "resolution.csv"
    path.write_text(path.read_text()[:-7])                                # the last line, cut off
    call(claims, *flags)
    assert measured[6:] == [("64, trained there", 1)] and len(path.read_text().splitlines()) == 7


@pytest.mark.slow
def test_figures_come_from_the_stored_csvs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "measure", None)
    for name in claims.CLAIMS:
        shutil.copy(ROOT / "results" / f"{name}.csv", tmp_path)
    call(claims, "draw", "--csv-dir", tmp_path, "--figures-dir", tmp_path)
    stored = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in claims.CLAIMS}
    for name, pixels in stored.items():
        assert pixels.std() > 10 and f"## {name}" in (tmp_path / "claims.md").read_text(), name
        if name not in ("memory", "resolution"):
            (tmp_path / f"{name}.csv").unlink()
    call(claims, "draw", "--csv-dir", tmp_path, "--figures-dir", tmp_path, "--add", tmp_path / "memory.csv")
    for name in ("memory", "resolution"):
        again = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert np.array_equal(again, stored[name]) == (name != "memory"), name


def test_a_foreign_csv_is_refused_and_kept(tmp_path):
    (tmp_path / "codebook.csv").write_text("a,b\n1,2\n")
    with pytest.raises(runtime.UserError, match="codebook.csv: its columns are not"):
        call(claims, "draw", "--csv-dir", tmp_path, "--figures-dir", tmp_path)
    assert (tmp_path / "codebook.csv").read_text() == "a,b\n1,2\n"


def test_prefixes_tell_images_apart(tmp_path):
    ids = np.zeros((1003, 16), "<u4")
    ids[1, 3:] = 1                                                        # tokens 0, 1, 2 are shared
    ids[2] = 2
    ids[3:, 5:] = 7                                                       # new ones share five with the first
    ids.tofile(tmp_path / "tokens.bin")
    runtime.write_json(tmp_path / "tokens.json", {"shape": [1003, 1, 16]})
    found = claims_figures.prefixes({"bits": 10, "images": 3}, [None, claims.Done(tmp_path)])
    assert found["tokens needed"] == pytest.approx((4 + 4 + 1) / 3) and found["tokens shared"] == 5


def test_power_laws_are_found_again():
    rows = [{"steps": steps, "val_bits": 3 * 2 ** seed * size ** -0.1, "parameters": size, "flops": size * 10,
             "seed": seed} for seed in (-1, 1) for steps in ("300", "600") for size in (1e5, 1e6, 1e7)]
    laws = claims_figures.power_laws(claims.CLAIMS["scaling"], rows)
    assert list(laws) == [("parameters", "300"), ("flops", "all"), ("parameters", "600")]
    for (factor, exponent, error), expected in zip(laws.values(), (3, 3 * 10 ** 0.1, 3)):
        assert (factor, exponent) == pytest.approx((expected, -0.1)) and error < 1e-6


def test_reconstructions_of_losses_stand_side_by_side(tmp_path):
    for i, loss in enumerate(("L1", "and GAN")):
        done = [None, claims.Done(tmp_path / str(i))]
        done[1].folder.mkdir()
        grid = np.full((20, 64, 3), 100 * (i + 1), np.uint8)
        Image.fromarray(grid).save(done[1].folder / "reconstruction-a.png")
        assert claims_figures.keep_images({"loss": loss}, done) == {}
    claims_figures.side_by_side(["L1", "not run", "and GAN"], tmp_path, tmp_path / "beside.png")
    drawn = np.asarray(Image.open(tmp_path / "beside.png").convert("L"))
    assert (drawn == 100).mean() > 0.2 and (drawn == 200).mean() > 0.1     # original and L1; GAN


@pytest.mark.slow
def test_a_claim_runs_from_commands_to_a_row(tmp_path, monkeypatch):
    claim = claims.CLAIMS["resolution"]
    monkeypatch.setitem(claims.CLAIMS, "resolution", claim._replace(settings=claim.settings[:1]))
    flags = ("resolution", "--seeds", 1, "--scale", 0.02, "--runs-dir", tmp_path, "--csv-dir", tmp_path,
             "--figures-dir", tmp_path)
    call(claims, *flags)
    (row,) = claims_figures.read_rows(claim, tmp_path / "resolution.csv")
    assert row["size"] == "32, as trained" and 3 < float(row["psnr"]) < 30 and float(row["seconds"]) > 1
    (tmp_path / "resolution.csv").unlink()
    monkeypatch.setattr(claims.subprocess, "run", None)                   # runs are not done again
    call(claims, *flags)
    assert claims_figures.read_rows(claim, tmp_path / "resolution.csv")[0]["psnr"] == row["psnr"]


@pytest.mark.parametrize("path", ["README.md", "results/README.md"])
def test_sentences_quote_the_means_of_the_csvs(path):
    quoted = re.findall(r"([\d.]+)[^\d<]*<!-- ([\w-]+): ([^;]+); ([^>]+) -->", (ROOT / path).read_text())
    assert quoted
    for number, name, setting, figure in quoted:
        claim = claims.CLAIMS[name]
        means = claims_figures.means(claim, claims_figures.read_rows(claim, ROOT / "results" / f"{name}.csv"))
        digits = len(number.partition(".")[2])
        assert round(means[tuple(setting.split(" / "))][figure][0], digits) == float(number), (name, setting)
