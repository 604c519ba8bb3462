"""What is in a file: our own checkpoints and those that the authors published, read safely and strictly.

    model, info = checkpoints.load_tokenizer("in1k-256")     # of images or clips: a file, or a published name
    model, tokenizer, info = checkpoints.load_ar("AR-B")
    python -m support.checkpoints runs/ar/step-00001800.pt toy.pt    # weights alone, in half precision

Safe: nothing that is stored in a file is ever run. Strict: a name too many or too few, or another shape, is
an error that lists them. A published name is downloaded once (see `runtime.fetch`). Our files
are literal dicts (see the ends of both training loops), published ones Lightning's, with a `state_dict` of

    encoder.* decoder.*      the raw weights of a tokenizer; in an AR file under first_stage_model.*
    loss.discriminator.*     not needed here; loss.perceptual_loss.*: a whole LPIPS
    model_ema.*              the EMA of all parameters above, their names without dots; decay; num_updates
    transformer.*            the transformer, under other names than ours, which are the paper's
"""
import sys

if not __package__:
    print("error: in the folder above, type: python -m support.checkpoints", file=sys.stderr)
    sys.exit(2)

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import pathlib
import re
import zipfile

import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

import ar_model
import tokenizer
import video
from support import metrics, runtime
from support.runtime import UserError, require

PUBLISHED = {                       # name: (repository of https://huggingface.co/TencentARC, file)
    "in1k-256": ("Open-MAGVIT2-Tokenizer-256-resolution", "imagenet_256_L.ckpt"),
    "in1k-128": ("Open-MAGVIT2-Tokenizer-128-resolution", "imagenet_128_L.ckpt"),
    "pt-256-2^18": ("Open-MAGVIT2-Tokenizer-262144-Pretrain", "pretrain256_262144.ckpt"),
    "pt-256-2^14": ("Open-MAGVIT2-Tokenizer-16384-Pretrain", "pretrain256_16384.ckpt"),
    "ucf-128": ("Open-MAGVIT2-Tokenizer-262144-Video", "video_128_262144.ckpt"),
    "AR-B": ("Open-MAGVIT2-AR-B-256-resolution", "AR_256_B.ckpt"),
    "AR-L": ("Open-MAGVIT2-AR-L-256-resolution", "AR_256_L.ckpt"),
    "AR-XL": ("Open-MAGVIT2-AR-XL-256-resolution", "AR_256_XL.ckpt")}
FORMATS = {                         # the mark of our own files: (model, config, presets)
    "open-magvit2-tokenizer": (tokenizer.Tokenizer, tokenizer.TokenizerConfig, tokenizer.PRESETS),
    "open-magvit2-video-tokenizer": (video.VideoTokenizer, video.VideoTokenizerConfig, video.PRESETS),
    "open-magvit2-ar": (ar_model.ARModel, ar_model.ARConfig, ar_model.PRESETS)}
*TOKENIZERS, AR = FORMATS
PUBLISHED_NAMES = ("encoder.", "decoder.", "loss.discriminator.", "loss.perceptual_loss.", "model_ema.",
                   "transformer.")
# The published names below transformer.* and ours. Inside a block they are the same.
AR_NAMES = {"pre_emb.": "token_embeddings.0.", "post_emb.": "token_embeddings.1.", "head.": "heads.",
            "class_emb.embedding_table.": "class_embedding.", "spatial_blocks.": "inter_blocks.",
            "factorized_blocks.": "intra_blocks.", "norm.": "norm."}
WRAPPER = ".conv_1."                # published causal convolutions are modules around one; ours are not
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "kernel")       # have no EMA
TRAINED_ON = ("data_path", "val_data_path", "resize", "split_list", "val_split_list")
# Plain containers that Lightning files hold beside the weights. None of them runs code when it is unpickled.
HARMLESS = [argparse.Namespace, collections.defaultdict, collections.Counter, dict, list, set,
            pathlib.PosixPath, pathlib.PurePosixPath]

# ---- 1. The border: files that may be anything -------------------------------------------------------------


@contextlib.contextmanager
def guard(path):
    """Within it, whatever a file makes go wrong that is not what it claims to be becomes one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, EOFError,
            zipfile.BadZipFile) as error:                 # the last two: npz files that were cut off
        raise UserError(f"{path} is damaged, of another version, or not what it claims to be "
                        f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None


def read(path, trust=False):
    """The dict in a checkpoint file, its tensors on the CPU, read from disk when they are first used.

    Raises `UserError` for a missing or truncated file, and for one that needs classes outside of PyTorch;
    those are unpickled only with trust=True, because unpickling can run any code its author wished.
    """
    path = pathlib.Path(path)
    require(path.exists(), f"checkpoint {path} does not exist; check the path, or name a published one of "
                           f"{', '.join(PUBLISHED)}")
    require(path.is_file(), f"checkpoint {path} is a folder; name the .pt or .ckpt file inside it")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            stored = torch.load(path, "cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path))
    except Exception as error:                            # unpickling damaged bytes raises almost anything
        foreign = re.search(r"(?:GLOBAL|global|class|type)\W+([A-Za-z_]\w*(?:\.\w+)+)", str(error))
        problem = (f"cannot be read: the file is truncated or is no PyTorch checkpoint "
                   f"({type(error).__name__}); copy or download it again, or use an earlier one")
        if isinstance(error, PermissionError):
            problem = "may not be read; change its permissions"
        elif trust and isinstance(error, (ImportError, NotImplementedError)):
            problem = f"holds objects that this machine cannot make ({error}); install what they need"
        elif foreign and "nsupported" in str(error):
            problem = (f"holds a pickled {foreign[1]}, which could run code when loaded; nothing was "
                       f"executed (if you trust its author, add --trust-checkpoint)")
        raise UserError(f"checkpoint {path} {problem}") from None
    require(isinstance(stored, dict), f"checkpoint {path} holds a {type(stored).__name__}, not a dictionary")
    return stored


@contextlib.contextmanager
def opened(path, trust=False):
    """Gives (path, dict) of a file or, under a published name, of that in the cache, downloaded first."""
    if not pathlib.Path(path).exists() and str(path) in PUBLISHED:
        repository, file = PUBLISHED[str(path)]
        path = runtime.fetch(f"https://huggingface.co/TencentARC/{repository}/resolve/main/{file}")
    stored = read(path, trust)
    with guard(path):
        for part in ("state_dict", "model", "ema"):
            for wrapper in ("module.", "_orig_mod.", "module."):           # of DDP, of torch.compile
                consume_prefix_in_state_dict_if_present(stored.get(part, {}), wrapper)
        yield path, stored


def differences(own, state):
    """What keeps `state` from fitting the tensors `own`, both {name: tensor}, in words; "" for nothing."""
    shapes = [f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
              for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    texts = {"missing": own.keys() - state.keys(), "not expected": state.keys() - own.keys(),
             "wrong shapes": shapes}
    return "; ".join(f"{what}: {listed(names)}" for what, names in texts.items() if names)


def listed(names):
    """The first ten of `names`, in order."""
    names = sorted(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def load_state(part, state, source):
    """Load a network, optimizer or scaler strictly, or raise one line that names `source`."""
    with guard(source):
        if isinstance(part, torch.nn.Module):
            problem = differences(part.state_dict(), state)
            require(not problem, f"{source} does not fit this model; {problem}")
        part.load_state_dict(state)
        if isinstance(part, torch.optim.Optimizer):       # which takes states of any shape, and fails later
            for parameter, values in part.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    require(values[name].shape == parameter.shape, f"{source} is of another network: {name} "
                            f"is {list(values[name].shape)}, expected {list(parameter.shape)}")


def load_partly(model, state, may_differ, source):
    """Load `state` into `model` strictly, except that modules whose names begin with one of the tuple
    `may_differ` keep their own start where any of their shapes differ. Says which, and that it was done."""
    own = model.state_dict()
    shapes, theirs = [{(name, tensor.shape) for name, tensor in each.items()} for each in (own, state)]
    anew = {name.rpartition(".")[0] for name, _ in shapes ^ theirs if name.startswith(may_differ)}
    state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in anew}
    state.update({name: tensor for name, tensor in own.items() if name.rpartition(".")[0] in anew})
    load_state(model, state, source)
    runtime.print_main(f"start    {source}; anew: {listed(anew) or 'nothing'}")


def below(prefix, state):
    """What has `prefix` before its name in {name: tensor}, without it."""
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def discriminator_in(path):
    """The weights of the discriminator in a file, ours or published: {name: tensor}, empty for none."""
    with opened(path) as (_, stored):
        return stored.get("discriminator") or below("loss.discriminator.", stored.get("state_dict", {}))


def resume(args, parts, flags, **records):
    """The checkpoint that --resume continues, restored into `parts`; an empty dict for a new run.

    parts: {name: network, optimizer or scaler}; the random generators are restored too. Raises `UserError`
    unless the file holds just these, and the `flags` and `records` ({name: dict}) of its run are those of
    this one. Where the newest file is damaged, the one before it is taken. No run is written over.
    """
    existing = runtime.list_checkpoints(args.results_dir)
    require(args.resume or not existing, f"{args.results_dir} already holds a run up to "
            f"{existing and existing[-1]}; continue it with --resume, or choose another --results-dir")
    candidates = existing if args.resume == "latest" else [args.resume]
    if not (args.resume and candidates):
        if args.resume:
            runtime.print_main(f"--resume: no checkpoint in {args.results_dir} yet, starting from scratch")
        return {}
    for path in reversed(candidates):
        try:
            saved = read(path)
            with guard(path):
                damaged = zipfile.ZipFile(path).testzip()  # or a flipped bit in a momentum passes unnoticed
            require(not damaged, f"checkpoint {path} is damaged, in {damaged}; use an earlier one")
            break
        except UserError as error:
            if path == candidates[0]:
                raise
            runtime.print_main(f"{error}; trying the one before")
    with guard(path):
        require(saved.get("format") == format_of(parts["model"]), f"--resume {path}: not a training "
                                                                  f"checkpoint of this script and preset")
        what = f"--resume {path}: a flag that must stay as it was"
        runtime.check_same(saved["args"], vars(args), what, flags)
        require(("discriminator" in saved) == ("discriminator" in parts), f"--resume {path}: --gan-weight "
                f"cannot be switched on or off in the middle of a run")
        newest = max([int(file.stem[5:]) for file in existing], default=0)
        require(args.resume == "latest" or newest <= saved["step"], f"--resume {path}: {args.results_dir} "
                f"holds newer ones, up to step {newest}; move them away, or use another --results-dir")
        for what, record in records.items():
            runtime.check_same(saved[what], record, f"--resume {path}: the {what}", record)
        for name, part in parts.items():
            load_state(part, saved[name], f"{name} of {path}")
        runtime.restore_rng_state(saved["rng"])
    runtime.print_main(f"resuming {path} at step {saved['step']}")
    return saved


# ---- 2. Tokenizers and transformers. Published files are first brought into the form of ours ---------------

def load_tokenizer(path, ema=True, trust=False):
    """(tokenizer of images or clips, info) of a checkpoint of ours, or a published one or AR file.

    ema: take the EMA weights where the file has them (published results are with EMA), else the raw ones.
    trust: see `read`. The model is in eval mode on the CPU; info says "path", "preset", "weights" ("EMA" or
    "raw"), "step", "source" ("ours" or "published") and "trained_on". Raises `UserError`, listing names.
    """
    with opened(path, trust) as (path, stored):
        if "state_dict" in stored:
            stored = published_tokenizer(path, stored, ema)
        elif stored.get("format") == AR:
            require(stored.get("first_stage"), f"{path} is an AR model without its tokenizer")
            stored = {**stored["first_stage"], "args": stored.get("args", {})}    # of data that both learned
        return build(path, stored, ema, TOKENIZERS)


def load_ar(path, ema=True, trust=False):
    """(ARModel, its tokenizer or None, info) of one of our checkpoints or a published file.

    As `load_tokenizer`; info also says "classes" (their names, None where the file has none) and "tokenizer",
    the record of the one that made the tokens.
    """
    with opened(path, trust) as (path, stored):
        if "state_dict" in stored:
            stored = published_ar(path, stored)
        model, info = build(path, stored, ema, [AR])
        info.update({name: stored[name] for name in ("classes", "tokenizer")})
        decoder = None
        if stored["first_stage"] is not None:
            decoder, _ = build(f"the tokenizer inside {path}", stored["first_stage"], False, TOKENIZERS)
        return model, decoder, info


def load_pair(ckpt=None, tokenizer_path=None, ema=True, trust=False):
    """(ARModel, its tokenizer, info of `load_ar`): all that drawing needs, on the CPU.

    ckpt: None is the newest of runs/ar. tokenizer_path: for published files that contain none; for our files
    it must be the one that made the tokens. Raises `UserError` where the two do not belong together.
    """
    ckpt = ckpt or runtime.latest_checkpoint("runs/ar", "AR model")
    model, decoder, info = load_ar(ckpt, ema, trust)
    if tokenizer_path:
        own = info["tokenizer"]
        decoder, its = load_tokenizer(tokenizer_path, ema, trust)
        info["tokenizer"] = {**its, "sha256": weights_hash(decoder)}
        require(info["source"] == "published" or own["sha256"] == info["tokenizer"]["sha256"],
                f"--tokenizer {tokenizer_path} is not the one that {ckpt} was trained with and contains, "
                f"{own and own['path']}; leave the flag out")
    require(decoder, f"{ckpt} contains no whole tokenizer; name the file of one with --tokenizer")
    codes = decoder.quantizer.vocabulary
    axes = 2 if getattr(decoder.config, "frames", None) is None else 3
    needed = 2 ** sum(model.config.bits)
    require(codes == needed and axes == len(model.config.grid), f"{ckpt} draws tokens of {needed} codes on a "
            f"grid {model.config.grid}, but {info['tokenizer']['path']}, its tokenizer, has {codes} codes on "
            f"{axes} axes; give the right one with --tokenizer")
    return model, decoder, info


def format_of(model):
    """The mark under "format" in our checkpoints of this kind of model."""
    return next(mark for mark, (kind, _, _) in FORMATS.items() if type(model) is kind)


def build(path, stored, ema, kinds):
    """(model in eval mode on the CPU, info) of a checkpoint in our form whose format is one of `kinds`."""
    mark = stored.get("format")
    what = "AR model" if kinds == [AR] else "tokenizer"
    require(mark, f"{path} is no {what} checkpoint: it has neither our format mark nor a state_dict")
    require(mark in kinds, f"{path} is no {what}, but marked {mark}")
    kind, config_kind, presets = FORMATS[mark]
    part = "ema" if ema and stored.get("ema") else "model"
    state = stored[part]
    values = stored["config"]
    fields = {field.name for field in dataclasses.fields(config_kind)}
    require(values.keys() == fields, f"{path} was written by another version of this project: its config "
                                     f"differs in {listed(values.keys() ^ fields)}")
    require(all(values[name] <= len(state) for name in fields if name.endswith("blocks")),
            f"{path} has a config of more blocks than it has weights")
    config = config_kind(**values)
    preset = stored["preset"] if mark == AR else next(    # an AR model may have any number of classes
        (name for name, known in presets.items() if known == config), "custom")
    with torch.device("meta"):                            # shapes first, without memory or random weights
        model = kind(config)
    problem = differences(model.state_dict(), state)
    guess = f", taken for {preset}," if "source" in stored else ""
    require(not problem, f"{path}{guess} does not fit this model; {problem}")
    model.to_empty(device="cpu")
    if mark == AR:                                        # a constant, and so in no checkpoint
        model.rope = ar_model.rope_table(config.grid, config.width // config.heads)
    model.load_state_dict(state)
    args = stored.get("args", {})
    return model.eval(), {"path": str(path), "preset": preset, "weights": "EMA" if part == "ema" else "raw",
                          "step": stored.get("step"), "source": stored.get("source", "ours"),
                          "trained_on": {name: args.get(name) for name in TRAINED_ON}}


def in_our_form(mark, state, published, **more):
    """A published file as a checkpoint of ours, with this state, of the preset with the most similar one."""
    found = {(name, tensor.shape) for name, tensor in state.items()}
    kind, _, presets = FORMATS[mark]

    def unlike(preset):
        with torch.device("meta"):
            own = kind(presets[preset]).state_dict()
        return len(found ^ {(name, tensor.shape) for name, tensor in own.items()})

    preset = min(presets, key=unlike)
    return {"format": mark, "source": "published", "step": published.get("global_step"), "preset": preset,
            "config": dataclasses.asdict(presets[preset]), "model": state, **more}


def published_tokenizer(path, published, ema):
    """A published tokenizer, or the one in a published AR file, in our form; `ema`: of its EMA weights."""
    state = {name.removeprefix("first_stage_model."): tensor
             for name, tensor in published["state_dict"].items()}
    extra = [name for name in state if not name.startswith(PUBLISHED_NAMES)]
    require(not extra, f"{path} holds names that no published tokenizer has: {listed(extra)}")
    averaged = below("model_ema.", state) if ema else {}
    if averaged:
        # One to one with the raw parameters, so that a weight too many or too few is found, also of D.
        dotless = {name.replace(".", ""): name for name in state
                   if name.startswith(PUBLISHED_NAMES[:3]) and not name.endswith(BUFFERS)}
        wrong = dotless.keys() ^ (averaged.keys() - {"decay", "num_updates"})
        require(not wrong, f"the EMA weights in {path} do not match its raw ones, in "
                           f"{listed(dotless.get(name, name) for name in wrong)}; --raw-weights does without")
    weights = {name: averaged.get(name.replace(".", ""), tensor) for name, tensor in state.items()
               if name.startswith(("encoder.", "decoder."))}
    require(weights, f"{path} holds no tokenizer: no encoder.* and no decoder.*")
    of_images, of_clips = TOKENIZERS
    mark = of_clips if any(WRAPPER in name for name in weights) else of_images
    weights = {name.replace(WRAPPER, "."): tensor for name, tensor in weights.items()}
    return in_our_form(mark, weights, published, ema=weights if averaged else {})


def our_ar_name(name):
    """Our name of what a published file calls `name`. A strange one is kept, and found to be too many."""
    for theirs, ours in AR_NAMES.items():
        if name.startswith(f"transformer.{theirs}"):
            return ours + name.removeprefix(f"transformer.{theirs}")
    return f"{name} (as published)"


def published_ar(path, published):
    """A published AR file in our form, and inside it the tokenizer that it may have."""
    own = {our_ar_name(name): tensor for name, tensor in published["state_dict"].items()
           if not name.startswith("first_stage_model.")}
    inner = None
    record = None
    if len(own) < len(published["state_dict"]):
        inner = published_tokenizer(path, published, False)
        record = {"path": str(path), "weights": "raw", "preset": inner["preset"], "sha256": None}
    return in_our_form(AR, own, published, first_stage=inner, classes=None, tokenizer=record)


def weights_hash(model):
    """sha256 of names and weights: which model it is, wherever its file lies and whatever else is in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


# ---- 3. The networks of the metrics ------------------------------------------------------------------------

RANDOM_LABEL = "NOT COMPARABLE (random weights)"
HEADS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
NETWORK_FILES = {                   # (URL, sha256 or its first digits) of each file
    "inception": [("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                   "pt_inception-2015-12-05-6726825d.pth",
                   "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")],
    "i3d": [("https://huggingface.co/spaces/LanguageBind/Open-Sora-Plan-v1.0.0/resolve/"
             "810fa8c4bdb3a4c8eec9bd57375c29bde6fb46de/opensora/eval/fvd/videogpt/i3d_pretrained_400.pt",
             "55095f049e706479d48e221adcdb145b2b9dc930ba28b081ed72367ffaa32343")],
    "lpips-vgg": [("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
                  (f"{HEADS}/vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")],
    "lpips-alex": [("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
                   (f"{HEADS}/alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0")]}


def load_network(name, weights_dir=None, random=False, eps=1e-3):
    """(network of a metric in eval mode on the CPU, what its weights are: their sha256, or `RANDOM_LABEL`).

    name: "inception", "i3d" (eps of its BatchNorms), "lpips-vgg" or "lpips-alex". weights_dir: see
    `runtime.fetch`. random: seeded random weights, without a download.
    """
    if name == "inception":
        network = metrics.FIDInception()
    else:
        network = metrics.I3D(eps) if name == "i3d" else metrics.LPIPS(name.removeprefix("lpips-"))
    if random:
        return metrics.randomise(network).eval().requires_grad_(False), RANDOM_LABEL
    paths = [runtime.fetch(url, weights_dir, sha) for url, sha in NETWORK_FILES[name]]
    own = network.state_dict()
    if len(paths) == 2:                                   # LPIPS: a classifier, of which the head is not used
        trunk, heads = map(read, paths)
        state = {key: tensor for key, tensor in trunk.items() if key in own}
        state.update({f"heads.{i}": heads[f"lin{i}.model.1.weight"] for i in range(5)})
    else:
        # Old files lack BatchNorm's counters of training steps, which nothing reads in eval mode.
        state = {**{key: tensor for key, tensor in own.items() if key.endswith("_tracked")}, **read(paths[0])}
    load_state(network, state, f"{name} of {paths[-1].parent}")
    return network.eval().requires_grad_(False), " ".join(sha for _, sha in NETWORK_FILES[name])


# ---- 4. Weights to pass on ---------------------------------------------------------------------------------

def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser("Keep of one of our checkpoints what drawing or encoding needs: the "
                                    "weights (EMA ones where there are any), in half precision.")
    parser.add_argument("checkpoint", help="of train_tokenizer.py or train_ar.py")
    parser.add_argument("output", help="file to write, some ten times smaller")
    return parser.parse_args(argv)


def main(args):
    """Write the smaller file."""
    def in_half(state):
        return {name: tensor.half() for name, tensor in state.items()}

    with opened(args.checkpoint) as (_, stored), runtime.atomic(args.output) as temporary:
        kept = {name: stored[name] for name in ("format", "preset", "step", "config", "classes", "tokenizer")
                if name in stored}
        kept["args"] = {name: stored["args"].get(name) for name in TRAINED_ON}
        kept.update(model=in_half(stored["ema"] or stored["model"]), ema={})
        if "first_stage" in stored:
            inner = stored["first_stage"]
            kept["first_stage"] = {**inner, "model": in_half(inner["model"])}
        torch.save(kept, temporary)
    print(f"wrote {args.output}, {pathlib.Path(args.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
