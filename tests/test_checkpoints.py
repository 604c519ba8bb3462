"""Files are read safely and strictly, the published ones and ours; anything else is one line."""
import argparse
import collections
import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import pickle
import random
import sys
import textwrap
import types
import zipfile

import numpy as np
import pytest
import torch

import ar_model
import tokenizer
import train_ar
import train_tokenizer
import video
from support import checkpoints, codec, loops, pickles, runtime
from helpers import (GOLDEN, ROOT, assert_same, error_line, published_ar_name, published_video_name, refused,
                     stored)

SHAPE = dict(resolution=16, channels=32, channel_multipliers=(1, 2), blocks=1, mid_blocks=1, bits=6)
TINY = tokenizer.TokenizerConfig(**SHAPE)
TINY_CLIPS = video.VideoTokenizerConfig(**SHAPE, frames=5)
TINY_AR = ar_model.ARConfig(width=32, heads=2, inter_blocks=2, intra_blocks=1, bits=(3, 3), grid=(8, 8),
                            num_classes=3)
PUBLISHED = json.loads((ROOT / "tests" / "published.json").read_text())     # file: sha256 of names and shapes


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    """Published files are recognised by their shapes; here a tiny one of each kind is known, too."""
    monkeypatch.setitem(tokenizer.PRESETS, "tiny", TINY)
    monkeypatch.setitem(video.PRESETS, "tiny", TINY_CLIPS)
    monkeypatch.setitem(ar_model.PRESETS, "tiny", TINY_AR)


def lightning(config, discriminator=train_tokenizer.PatchGAN):
    """(state_dict of a published tokenizer file, raw model, EMA model), on the current default device."""
    kind = video.VideoTokenizer if config.frames else tokenizer.Tokenizer
    rename = published_video_name if config.frames else str
    torch.manual_seed(0)
    raw, ema, critic = kind(config), kind(config), discriminator()
    state = {rename(name): tensor for name, tensor in raw.state_dict().items()}
    state.update({f"loss.discriminator.{name}": tensor for name, tensor in critic.state_dict().items()})
    parameters = [*[(rename(name), p) for name, p in ema.named_parameters()],
                  *[(f"loss.discriminator.{name}", p) for name, p in critic.named_parameters()]]
    state.update({f"model_ema.{name.replace('.', '')}": p.detach() for name, p in parameters})
    state.update({"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)})
    return state, raw.eval(), ema.eval()


def same(a, b):
    """Whether two models have the same names and weights."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def refuses(words, path, saved, load=checkpoints.load_tokenizer, *args):
    """Assert that a file of these contents is refused in one line that matches `words`."""
    torch.save(saved, path)
    refused(words, load, path, *args)


# ---- the published files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", checkpoints.PUBLISHED)
def test_names_and_shapes_are_published_and_tell_the_preset(name):
    with torch.device("meta"):
        if name.startswith("AR"):
            config = ar_model.PRESETS[name]
            model = ar_model.ARModel(config)
            state = {published_ar_name(ours): tensor for ours, tensor in model.state_dict().items()}
        else:
            args = train_tokenizer.get_args(["--preset", name])
            config = train_tokenizer.TOKENIZER_PRESETS[name]
            state, model, _ = lightning(config, train_tokenizer.DISCRIMINATORS[args.discriminator])
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == PUBLISHED[checkpoints.PUBLISHED[name][1]]
    found = checkpoints.in_our_form(checkpoints.format_of(model), model.state_dict(), {})
    assert found["preset"] == ("in1k-256" if name == "pt-256-2^18" else name)            # the first of two
    assert found["config"] == dataclasses.asdict(config)


def ours(config):
    """A checkpoint of a tokenizer as its trainer leaves it, as far as loading goes, and its two models."""
    _, raw, ema = lightning(config)
    return stored(raw, step=5, ema=ema.state_dict(), args={"data_path": "x"}), raw, ema


def published(config):
    """A tokenizer file as the authors published theirs, and its two models."""
    state, raw, ema = lightning(config)
    return {"state_dict": state, "global_step": 5, "callbacks": {}}, raw, ema


@pytest.mark.parametrize("config", [TINY, TINY_CLIPS], ids=["images", "clips"])
@pytest.mark.parametrize("source, make", [("ours", ours), ("published", published)])
def test_tokenizers_load_ema_or_raw_weights(tmp_path, config, source, make):
    saved, raw, ema = make(config)
    torch.save(saved, tmp_path / "a.pt")
    model, info = checkpoints.load_tokenizer(tmp_path / "a.pt")
    assert type(model) is type(raw) and same(model, ema) and not model.training and model.config == config
    assert (info["weights"], info["step"], info["source"]) == ("EMA", 5, source)
    assert info["preset"] == "tiny" if source == "published" else info["trained_on"]["data_path"] == "x"
    assert checkpoints.weights_hash(model) == checkpoints.weights_hash(ema) != checkpoints.weights_hash(raw)
    model, info = checkpoints.load_tokenizer(tmp_path / "a.pt", ema=False)
    assert same(model, raw) and info["weights"] == "raw"


@pytest.mark.parametrize("change, names", [
    (None, ("encoder.norm_out.weight", "decoder.adaptive.1.beta.bias", "encoder.conv_out.weight",
            "loss.discriminator.main.5.weight", "model_ema.decodernorm_outbias")),
    (torch.zeros(3), ("encoder.norm_out.extra", "something.else", "model_ema.more",
                      "loss.discriminator.main.12.weight", "model_ema.encodernorm_outbias"))])
def test_missing_unexpected_and_misshapen_names_are_listed(tmp_path, change, names):
    for name in names:
        state, _, _ = lightning(TINY)
        state[name] = change
        if change is None:
            del state[name]
        letters = name.removeprefix("model_ema.").removeprefix("loss.discriminator.").replace(".", "")
        refuses(r"\.?".join(letters), tmp_path / "a.ckpt", {"state_dict": state})


def test_published_names_are_downloaded_from_the_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("OPEN_MAGVIT2_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", (tmp_path / "mirror").as_uri())
    monkeypatch.chdir(tmp_path)
    refused("cannot download .*imagenet_128_L.ckpt", checkpoints.load_tokenizer, "in1k-128")
    repository, file = checkpoints.PUBLISHED["in1k-128"]
    path = tmp_path / "mirror" / "TencentARC" / repository / "resolve" / "main" / file
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": lightning(TINY)[0]}, path)
    assert checkpoints.load_tokenizer("in1k-128")[1]["preset"] == "tiny"
    assert (tmp_path / "cache" / file).exists()


# ---- our files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ema", [True, False], ids=["EMA", "raw"])
def test_our_transformer_brings_its_tokenizer(tmp_path, ema):
    torch.manual_seed(0)
    inner, raw, averaged = tokenizer.Tokenizer(TINY), ar_model.ARModel(TINY_AR), ar_model.ARModel(TINY_AR)
    saved = stored(raw, preset="AR-B", ema=averaged.state_dict(), classes=["a", "b", "c"],
                   tokenizer={"path": "x"}, first_stage=stored(inner), args={"data_path": "x"})
    torch.save(saved, tmp_path / "ar.pt")
    model, decoder, info = checkpoints.load_ar(tmp_path / "ar.pt", ema)
    assert same(model, averaged if ema else raw) and same(decoder, inner)
    again, about = checkpoints.load_tokenizer(tmp_path / "ar.pt")
    assert same(again, inner) and about["trained_on"]["data_path"] == "x"     # so evaluate.py finds its data
    assert torch.equal(model.rope, raw.rope)
    assert (info["weights"], info["step"], info["preset"]) == ("EMA" if ema else "raw", 3, "AR-B")
    assert (info["classes"], info["tokenizer"]) == (["a", "b", "c"], {"path": "x"})
    for changes in ({"first_stage": {}}, {"first_stage": saved}, {"classes": 3, "model": {}, "ema": {}}):
        refuses("bad.pt", tmp_path / "bad.pt", {**saved, **changes}, checkpoints.load_ar, ema)


def test_models_of_the_wrong_kind_are_refused_by_name(tmp_path):
    path = tmp_path / "a.pt"
    refuses("marked open-magvit2-tokenizer", path, ours(TINY)[0], checkpoints.load_ar)
    refuses("without its tokenizer", path, {"format": "open-magvit2-ar"})
    refuses("without its tokenizer", path, {"state_dict": {"transformer.norm.weight": torch.zeros(1)}})
    refuses("EMA weights .* do not match", path, {"state_dict": {"model_ema.x": torch.zeros(1)}})
    refused("holds no tokenizer", checkpoints.load_tokenizer, path, False)


CONFIG = dataclasses.asdict(TINY)
ODD = [                             # changes of a tokenizer's file
    *[{name: value} for name in ("config", "model", "args", "preset", "step", "format")
      for value in (3.5, [1], "x", b"x") if type(value) is not checkpoints.KINDS[name]],
    {"config": None}, {"config": {"bits": 3}}, {"model": {"a": 1}}, {"model": {3: torch.zeros(1)}},
    {"model": None}, {"format": "something"}, {"format": None}, {"ema": "x"}, {"ema": {"a": torch.zeros(1)}},
    *[{"config": {**CONFIG, name: value}} for name, value in (
        ("channels", "wide"), ("channels", 48), ("channels", 2 ** 20), ("channels", 2 ** 70), ("bits", True),
        ("channels", 32.0), ("channels", -32), ("channel_multipliers", [1, 2]), ("channel_multipliers", ()),
        ("channel_multipliers", (1, 2 ** 40)), ("channel_multipliers", (1, "2")), ("quantizer", "none"),
        ("channel_multipliers", (1,) * 10 ** 5), ("blocks", 10 ** 9), ("patch", 2 ** 60), ("quantizer", None),
        ("extra", 1))]]


def test_tokenizers_that_are_not_what_they_claim_are_one_line(tmp_path):
    saved = ours(TINY)[0]
    for changes in ODD:
        for ema in {"model" not in changes, "ema" in changes}:             # that takes what was changed
            refuses("a.pt", tmp_path / "a.pt", {**saved, **changes}, checkpoints.load_tokenizer, ema)
        for load in (checkpoints.load_tokenizer, checkpoints.load_ar) if "model" in changes else ():
            refuses("a.pt", tmp_path / "a.pt", {"state_dict": changes["model"]}, load)


def test_transformers_that_are_not_what_they_claim_are_one_line(tmp_path):
    inner = stored(tokenizer.Tokenizer(TINY))
    saved = stored(ar_model.ARModel(TINY_AR), classes=["a", "b", "c"], first_stage=inner)
    torch.save(saved, tmp_path / "a.pt")
    checkpoints.load_ar(tmp_path / "a.pt")
    for changes in ({"classes": ["a", "b"]}, {"classes": [1, 2, 3]}, {"tokenizer": 3}, {"first_stage": 3},
                    {"first_stage": {}}, {"first_stage": {**inner, "model": 3}},
                    *[{"config": {**saved["config"], name: value}} for name, value in (
                        ("grid", (2 ** 15, 2 ** 15)), ("grid", (0, 8)), ("heads", 3), ("token_dropout", 1),
                        ("bits", (3, 30)))]):
        refuses("a.pt", tmp_path / "a.pt", {**saved, **changes}, checkpoints.load_ar)


def test_truncated_and_missing_files_are_clear_errors(tmp_path):
    torch.save({"state_dict": lightning(TINY)[0]}, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    cuts = [whole[:size] for size in (0, 100, len(whole) // 2, len(whole) - 100)]
    for content in (*cuts, b"no checkpoint", pickle.dumps([1])):
        (tmp_path / "cut.ckpt").write_bytes(content)
        refused("cut.ckpt is damaged", checkpoints.load_tokenizer, tmp_path / "cut.ckpt")
    refused("none.ckpt does not exist.* AR-XL", checkpoints.load_tokenizer, tmp_path / "none.ckpt")
    refused("no checkpoint .*in", checkpoints.load_tokenizer, tmp_path)
    refuses("no dictionary of weights, but a pickled list", tmp_path / "a.pt", [1])
    refuses("but a pickled tokenizer.Tokenizer", tmp_path / "a.pt", tokenizer.Tokenizer(TINY))
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "a.pt")
    refused("no dictionary of weights", checkpoints.load_tokenizer, tmp_path / "a.pt")


def test_flipped_bytes_are_never_a_traceback(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(ours(TINY)[0], path)
    whole = path.read_bytes()
    start = whole.index(b"data.pkl")                       # of a pickle of some 9 kB
    for seed in range(100):
        chance = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(start, start + 9000)] = chance.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(runtime.UserError):
            checkpoints.load_tokenizer(path)


def test_folders_name_their_newest_checkpoint_and_strangers_in_them_are_let_alone(tmp_path):
    refused("there are in1k-256", checkpoints.load_tokenizer, tmp_path / "step-00000001.pt")
    for step in (1, 20, 3):
        torch.save({**ours(TINY)[0], "step": step}, tmp_path / f"step-{step:08d}.pt")
    for stranger in ("step-best.pt", "step-.pt", "step-1e3.pt"):
        (tmp_path / stranger).write_bytes(b"none of ours")
    assert checkpoints.load_tokenizer(tmp_path)[1]["step"] == 20
    refused("2.pt does not exist; there are step-00000001.pt, step-00000003.pt, step-00000020.pt$",
            checkpoints.load_tokenizer, tmp_path / "step-00000002.pt")


def test_a_run_resumes_from_a_folder_or_file_that_holds_all_of_it(tmp_path):
    def run():
        model = tokenizer.Tokenizer(TINY)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.rand(2, 3, 16, 16))[0].sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer, "lecam": torch.rand(2)}

    def resume(path, parts):
        args = argparse.Namespace(resume=str(path), results_dir=tmp_path, tau=1.0)
        return checkpoints.resume(args, parts, ["tau"], config=CONFIG)

    done = run()
    saved = {**stored(done["model"]), "optimizer": done["optimizer"].state_dict(), "lecam": done["lecam"],
             "rng": loops.rng_states(), "args": {"tau": 1.0}}
    path = tmp_path / "step-00000003.pt"
    torch.save(saved, path)
    (tmp_path / "step-best.pt").write_bytes(b"the user's")
    for start in ("latest", tmp_path, path):
        fresh = run()
        assert resume(start, fresh)["step"] == 3
        assert same(fresh["model"], done["model"]) and torch.equal(fresh["lecam"], done["lecam"])
        assert_same(fresh["optimizer"].state_dict(), done["optimizer"].state_dict())
    refused("9.pt does not exist; there are step-00000003.pt$", resume, tmp_path / "step-00000009.pt", done)
    moments = saved["optimizer"]["state"]
    foreign = {key: {**moments[key], "exp_avg": torch.zeros(3)} for key in moments}
    odd = [(name, value) for name in saved.keys() - {"preset", "ema"} for value in (None, [1], {"a": 1})]
    odd += [("optimizer", {**saved["optimizer"], "state": state})
            for state in (foreign, {**moments, 0: 3}, {**moments, 999: moments[0]})]
    for name, value in [*odd, ("lecam", torch.zeros(3))]:
        torch.save({**saved, name: value}, path)
        refused(str(path), resume, "latest", done)


# ---- bugs of ours are no damage ---------------------------------------------------------------------------

def plant(monkeypatch, owner, name, old, new):
    """Change the source of a method as its modifier would: same file, same lines."""
    method = getattr(owner, name)
    lines, first = inspect.getsourcelines(method)
    source = textwrap.dedent("".join(lines))
    assert old in source
    source = source.replace(old, new, 1).replace("super()", f"super({owner.__name__}, self)")
    source = "\n" * (first - 1) + source
    made = {}
    exec(compile(source, inspect.getfile(method), "exec"), sys.modules[owner.__module__].__dict__, made)
    monkeypatch.setattr(owner, name, made[name])


@pytest.mark.parametrize("owner, name, old, new, kind", [
    (tokenizer.Encoder, "__init__", "group_norm(width)", "group_norm(widht)", NameError),
    (tokenizer.Quantizer, "__init__", "super().__init__()", "super().__init__(self.bits)", AttributeError),
    (ar_model.ARModel, "__init__", "self.config = config", "self.config, b = [config]", ValueError),
    (ar_model.ARConfig, "__post_init__", "max(self.bits)", "max(*self.bits, ())", TypeError),
    (pickles.Unpickler, "find_class", "self.MADE.get", "self.MAD.get", AttributeError)])
def test_a_bug_of_ours_is_not_taken_for_damage(monkeypatch, owner, name, old, new, kind):
    plant(monkeypatch, owner, name, old, new)
    with pytest.raises(kind) as caught:
        checkpoints.load_tokenizer(ROOT / "assets" / "toy.pt")
        checkpoints.load_ar(ROOT / "assets" / "toy.pt")
    assert not isinstance(caught.value, runtime.UserError) and runtime.in_one_line(caught.value) is None


@pytest.mark.parametrize("script, flags", [
    (codec, ["reconstruct", "--ckpt", ROOT / "assets/toy.pt"]),
    (train_tokenizer, ["--length", 1, "--global-batch-size", 2, "--num-workers", 0]),
    (train_ar, ["--length", 1, "--tokenizer", ROOT / "assets/toy.pt", "--num-workers", 0, "--online"])])
def test_a_bug_in_a_layer_keeps_its_traceback(tmp_path, monkeypatch, script, flags):
    plant(monkeypatch, tokenizer.ResBlock, "forward", "y = self.conv1(", "y, w, c = self.conv1(")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unpack") as caught:
        runtime.run_script(script.main, lambda: script.get_args([str(flag) for flag in flags]))
    assert not isinstance(caught.value, runtime.UserError)


# ---- files of others: Lightning's, and what else may be pickled -------------------------------------------

class Call:
    """Pickles as the call of any function, which may not be there when it is read."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """Whatever: only what can be called may be pickled as called."""


def stranger(patch, name, kind=object):
    """A class that only its pickle will know, under the full `name`, once `patch` is undone."""
    module, _, name = name.rpartition(".")
    made = type(name, (kind,), {"__module__": module})
    if not hasattr(sys.modules.get(module), "of_strangers"):
        patch.setitem(sys.modules, module, types.SimpleNamespace(of_strangers=True))
    setattr(sys.modules[module], name, made)
    return made


def foreign_objects(patch):
    """What Lightning files were seen to hold, or could, beside weights."""
    kinds = (object, list, dict, set, tuple)
    plain, items, names, members, point = [stranger(patch, f"gone.{kind.__name__}", kind) for kind in kinds]
    filled = plain()
    filled.own = filled                                    # a circle
    scalar, dtype = [stranger(patch, f"numpy.core.multiarray.{name}") for name in ("scalar", "dtype")]
    return [np.float64(0.5), np.dtype("float32"), np.arange(3), np.array(["a", None], dtype=object), plain,
            filled, items([1, 2]), names(a=1), members({1}), pathlib.Path("x"), argparse.Namespace(a=1), b"x",
            collections.deque([1], 3), collections.defaultdict(list, a=1), point((1, 2)), {1, 2}, type(None),
            Call(Call(getattr, plain, "Inner"), 1), len, frozenset({1}), torch.device("cuda:3"),
            torch.bfloat16, Call(torch.device, "npu", 0), torch.nn.Linear(2, 2), 2 ** 3000,
            Call(Call(plain, 1), 2), Call(scalar, dtype, b"8")]          # the last: numpy 1's scalars


@pytest.mark.parametrize("load", [checkpoints.load_tokenizer, checkpoints.load_ar])
def test_what_weights_do_not_need_does_not_decide(tmp_path, load):
    path = tmp_path / "a.ckpt"
    state, raw, model = lightning(TINY)
    if load is checkpoints.load_ar:
        inner = {f"first_stage_model.{name}": tensor for name, tensor in raw.state_dict().items()}
        model = ar_model.ARModel(TINY_AR)
        state = {published_ar_name(name): torch.nn.Parameter(x) for name, x in model.state_dict().items()}
        refuses("missing: heads", path, {"state_dict": dict(list(state.items())[:-1])}, load)
        torch.save({"state_dict": state}, path)
        assert load(path)[1] is None
        state.update(inner)
    locations = itertools.cycle(["cpu", "npu:0", "xpu:1", "mps", "cuda:3", "hpu", "xla:0"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: next(locations))
        torch.save({"state_dict": state, "hyper_parameters": foreign_objects(patch),
                    "lr_schedulers": [{"_last_lr": [np.float64(1e-4)]}]}, path)
    loaded, *decoder, info = load(path)
    assert same(loaded, model) and (info["source"], info["preset"]) == ("published", "tiny")
    if decoder:
        assert same(decoder[0], raw) and same(checkpoints.load_tokenizer(path)[0], raw)
        assert torch.equal(loaded.rope, model.rope)
    checkpoints.main(checkpoints.get_args([str(path), str(tmp_path / "half.pt")]))
    smaller, *_, about = load(tmp_path / "half.pt")
    assert same(smaller, model.half()) and (about["source"], about["preset"]) == ("published", "tiny")


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("trap", [
    lambda path: Call(open, path, "w"), lambda path: Call(os.system, f"touch {path}"),
    lambda path: Call(exec, f"open({path!r}, 'w')"),
    lambda path: Call(Call(getattr, pathlib.Path(path), "touch"))], ids=["open", "system", "exec", "getattr"])
def test_nothing_that_a_file_asks_for_is_run(tmp_path, trap, needed):
    state = lightning(TINY)[0]
    trap = trap(str(tmp_path / "executed"))
    if needed:
        state["encoder.conv_in.weight"] = trap
    torch.save({"state_dict": state, "callbacks": trap}, tmp_path / "a.ckpt")
    if needed:
        refused("state_dict of .*a.ckpt holds a .* in place", checkpoints.load_tokenizer, tmp_path / "a.ckpt")
    else:
        checkpoints.load_tokenizer(tmp_path / "a.ckpt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists(), "the trap does not work"


def test_a_file_that_lightning_wrote_is_read():
    """By LightningCLI 2.6.6: two optimizers by hand, a schedule in numpy, hyper-parameters of OmegaConf."""
    path = GOLDEN / "lightning.ckpt"
    foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert foreign >= {"omegaconf.dictconfig.DictConfig", "pathlib.PosixPath", "numpy.dtype"}
    assert checkpoints.read(path)["state_dict"]["nets.1.weight"].shape == (3, 3)


# ---- weights to pass on -----------------------------------------------------------------------------------

def test_smaller_files_hold_the_weights_and_replace_no_training_state(tmp_path):
    config = dataclasses.replace(TINY, quantizer="fsq", levels=(7,) * 6)   # whose buffers are no half numbers
    saved, _, ema = ours(config)
    for path in ("run/step-00000005.pt", "run/step-00000004.pt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        torch.save({**saved, "optimizer": {}}, tmp_path / path)
    (tmp_path / "link.pt").symlink_to(tmp_path / "run/step-00000005.pt")
    before = (tmp_path / "run/step-00000005.pt").read_bytes()

    def smaller(source, target):
        return error_line(checkpoints, tmp_path / source, tmp_path / target)

    for target in ("run/step-00000005.pt", "run/step-00000004.pt", "link.pt"):
        assert "--resume needs" in smaller("run", target)
    assert "NAME.pt" in smaller("run", "half") and "NAME.pt" in smaller("run", "half.safetensors")
    torch.save({**saved, "config": {}}, tmp_path / "bad.pt")
    assert "bad.pt" in smaller("bad.pt", "half.pt") and not (tmp_path / "half.pt").exists()
    checkpoints.main(checkpoints.get_args([str(tmp_path / "run"), str(tmp_path / "half.pt")]))
    model, info = checkpoints.load_tokenizer(tmp_path / "half.pt")
    assert same(model, ema.half()) and (info["step"], info["trained_on"]["data_path"]) == (5, "x")
    assert (tmp_path / "run/step-00000005.pt").read_bytes() == before
    with zipfile.ZipFile(tmp_path / "half.pt") as file:
        assert file.testzip() is None
