"""What people read: the report of their runs, and README files whose commands, links and numbers hold."""
import base64
import contextlib
import html
import importlib
import io
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
import report
from support import checkpoints, data, metrics, pictures, runtime, sources
from helpers import ROOT, call, chromium, error_line

DOCUMENTS = [ROOT / name for name in ("README.md", "results/README.md", "results/EXERCISES.md")]
README = (ROOT / "README.md").read_text()


# ---- the report -------------------------------------------------------------------------------------------

def make_report(folder):
    """(source, text) of the page on what lies in `folder`, whose tags are balanced."""
    call(report, folder, "--output", folder / "report.html")
    source = (folder / "report.html").read_text()
    inside = []
    for end, tag, alone in re.findall(r"<(/?)([a-z]\w*)[^>]*?(/?)>", source):
        if end:
            assert inside.pop() == tag
        elif not alone and tag not in ("meta", "img"):
            inside.append(tag)
    assert not inside
    return source, html.unescape(re.sub("<[^>]*>", "", source))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What a demo leaves, as far as a report reads it: images, clips, an unfinished run, a torn line."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("tokenizer", "video", "ar", "evaluation", "samples"):
        (folder / name).mkdir()
    images = torch.full((6, 3, 8, 8), 100, dtype=torch.uint8)
    images[3:] += 10                                                   # the error of a reconstruction
    values = {"loss/l1": 0.0625, "usage": 1.0, "bit_balance": [0.5, 0.999, 0.4, 0.0], "dead_bits": 2}
    lines = [{"step": 50, **values, "loss/l1": 0.5}, {"step": 100, **values, "val_loss/l1": float("nan")}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 150, "loss'
    for name in ("tokenizer", "video"):
        (folder / name / "metrics.jsonl").write_text(text)
    (folder / "ar" / "metrics.jsonl").write_text("")
    pictures.save_samples(folder / "tokenizer" / "reconstructions-00000100.png", images, 3)
    pictures.save_samples(folder / "video" / "reconstructions-00000100.png",
                          images[:, :, None].repeat(1, 1, 4, 1, 1) + torch.arange(4)[:, None, None].byte(), 3)
    pictures.save_samples(folder / "samples" / "grid.png", images, 3, ["<ball>"] * 6)
    runtime.write_json(folder / "evaluation" / "a.json", {"n": 10, "metrics": {
        "psnr": {"value": 26.4117, "measured_on": "<all>", "label": ""}}})
    pictures.save_samples(folder / "evaluation" / "a.png", images, 3)
    torch.save({"args": {"lr": 0.00123}}, folder / "tokenizer" / "step-00000100.pt")
    np.array([[7, 7, 7, 9], [0] * 4], "<u4").tofile(folder / "ar" / "tokens.bin")
    (folder / "ar" / "tokens.bin.done").write_bytes(b"\1\0")            # the second row is not encoded yet
    runtime.write_json(folder / "ar" / "tokens.json", {"shape": [2, 1, 4], "missing": None})
    return folder


def test_a_report_tells_all_that_runs_left_and_needs_no_other_file(runs):
    source, text = make_report(runs)
    for told in ("0.0625", "26.412", "<all>", "Dead bits: 1, 3", '"lr": 0.00123', "2 ids in 4 tokens"):
        assert told in text, told
    assert source.count('class="bit dead"') == 4                       # two in each of two runs
    images = re.findall('<img [^>]*src="([^"]*)"', source)
    assert [re.match("data:image/(png|webp);base64,", image)[1] for image in images].count("webp") == 2
    assert not re.search("<script|https?:|<link|url\\(", source)


@pytest.mark.parametrize("folder, suffix", [("tokenizer", ".png"), ("video", ".webp")])
def test_errors_are_four_times_the_difference(runs, folder, suffix):
    path = runs / folder / f"reconstructions-00000100{suffix}"
    files = re.findall('base64,([^"]+)', report.embed(path, errors=True))
    with Image.open(io.BytesIO(base64.b64decode(files[1]))) as image:
        assert set(np.unique(image.convert("RGB"))) == {0, 40}


@pytest.mark.parametrize("kept", [(), ("tokenizer",), ("ar",), ("samples",), ("evaluation",)])
def test_a_report_of_unfinished_runs(runs, tmp_path, kept):
    for name in kept:
        shutil.copytree(runs / name, tmp_path / name)
    assert ("nothing" in make_report(tmp_path)[1]) == (not kept)
    assert "no-runs is no folder" in error_line(report, "no-runs", "--output", tmp_path / "a.html")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_a_report_fits_the_window(runs, width):
    make_report(runs)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto((runs / "report.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(each => each.naturalWidth > 0)")


# ---- commands, flags, links -------------------------------------------------------------------------------

@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def path(request):
    """Each document."""
    return request.param


def commands(text):
    """Every command of one of our scripts, in fenced blocks and inline code: [(script, words after it)]."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in lines:
        words = shlex.split(line.replace("$(", "(").replace("...", ""), comments=True)
        at = [k for k, word in enumerate(words)
              if re.fullmatch(r"((tests|results)/)?[a-z_]+\.py|support\.[a-z]+", word)]
        if at and (at[0] > 0 or len(words) > 1):                       # not a file's name alone
            found.append((words[at[0]], words[at[0] + 1:]))
    return found


def parser_of(script):
    """The module with the flags of a script such as tests/bench.py, or of support.data behind python -m."""
    if str(script) == "tokenizer.py":
        script = "support.codec"
    return importlib.import_module(re.sub(r"^.*/|\.py$", "", str(script)))


def test_commands_in_documents_are_understood(path):
    found = commands(path.read_text())
    assert len(found) > 5
    for script, words in found:                                        # raises what the script would say
        parser_of(script).get_args(words)


@pytest.fixture
def known(monkeypatch):
    """The flags of all scripts, as their parsers know them."""
    parsers = []
    made = runtime.ArgumentParser.__init__

    def make(parser, *values, **options):
        parsers.append(parser)
        made(parser, *values, **options)
    monkeypatch.setattr(runtime.ArgumentParser, "__init__", make)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if "\ndef get_args(" in path.read_text():
            with contextlib.suppress(SystemExit):
                name = f"support.{path.stem}" if path.parent.name == "support" else str(path)
                parser_of(name).get_args(["--help"])
    return {flag for parser in parsers for flag in parser._option_string_actions}


def test_flags_in_documents_exist(path, known):
    inline = " ".join(re.findall(r"`([^`\n]+)`", path.read_text()))
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", inline))
    assert "--ckpt" in known and flags
    of_torchrun = {"--nproc-per-node", "--nnodes", "--max-restarts", "--shutdown-timeout"}
    assert flags - known - of_torchrun == set()


def test_links_in_documents_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    assert len(links) > 0
    for link in links:                                                 # the badge is a page of the host's
        if not re.match("https?:|#|\\.\\./\\.\\./actions/", link):
            assert (path.parent / link.split("#")[0]).exists(), link


def test_targets_in_documents_are_in_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    for path in [*DOCUMENTS, ROOT / "Makefile", ROOT / ".ci/run", *workflows]:
        text = path.read_text()
        named = re.findall(r"(?:`|^# |^ *- run: |^)make ([\w-]+)", text, re.M)
        assert set(named) <= targets, path


def test_the_readme_is_read_in_one_go():
    assert len(README.splitlines()) <= 225


@pytest.mark.slow
def test_numbers_in_the_readme_are_those_of_the_demo():
    said = {name: float(re.search(pattern, README)[1]) for name, pattern in {
        "psnr": r"PSNR ([\d.]+) dB, SSIM", "ssim": r"SSIM ([\d.]+), usage",
        "usage": r"usage ([\d.]+) %, [\d.]+ bits", "l1": r"\| L1 ([\d.]+),",
        "nats": r"([\d.]+) nats a token held out",
        "perplexity": r"perplexity ([\d.]+);", "bits": r"([\d.]+) bits a pixel; seconds"}.items()}
    model, tokenizer, _ = checkpoints.load_ar(ROOT / "assets" / "toy.pt")    # the demo's, in half precision
    held_out = sources.build_dataset("generated-plain", "val", data.View(32))
    x, labels, _ = next(iter(data.eval_batches(held_out, range(300), 300)))
    with torch.no_grad():
        ids = tokenizer.encode(pictures.to_float(x))
        made = tokenizer.decode(ids)
        subtokens = ar_model.ids_to_subtokens(ids.flatten(1), model.config.bits)
        _, terms = model(subtokens, labels, return_loss=True)
    nats = float(terms.sum())
    usage = metrics.codebook_usage(tokenizer.quantizer.count(ids))["usage"]
    assert metrics.psnr(x, pictures.to_uint8(made)).mean() == pytest.approx(said["psnr"], abs=0.5)
    assert metrics.ssim(x, pictures.to_uint8(made)).mean() == pytest.approx(said["ssim"], abs=0.02)
    assert (made - pictures.to_float(x)).abs().mean() == pytest.approx(said["l1"], abs=0.01)
    assert 100 * usage == pytest.approx(said["usage"], abs=2)                   # of a third as many images
    assert nats == pytest.approx(said["nats"], abs=0.05)
    assert np.log(said["perplexity"]) == pytest.approx(said["nats"], abs=0.01)
    assert 10 * ids[0].numel() / 32 ** 2 == pytest.approx(said["bits"], abs=0.0005)
