"""What is in a file: our own checkpoints and those that the authors published, read safely and strictly.

    model, info = checkpoints.load_tokenizer("in1k-256")     # of images or clips: a published name,
    model, tokenizer, info = checkpoints.load_ar("runs/ar")  # a folder (its newest step-*.pt), or a file
    python -m support.checkpoints runs/ar toy.pt             # the weights alone, in half precision

Safe: nothing in a file is run, see pickles.py. Strict: a name too many or too few, or another shape, is an
error that lists them. Ours are literal dicts (see both training loops), published ones Lightning's, whose
`state_dict` holds

    encoder.* decoder.*      the raw weights of a tokenizer; in an AR file under first_stage_model.*
    loss.discriminator.*     not needed here; loss.perceptual_loss.*: a whole LPIPS
    model_ema.*              the EMA of all parameters above, their names without dots; decay; num_updates
    transformer.*            the transformer, under other names than ours, which are the paper's
"""
import sys

if not __package__:
    print("error: in the folder above, type: python -m support.checkpoints", file=sys.stderr)
    sys.exit(2)

import dataclasses
import functools
import hashlib
import pathlib

import torch

import ar_model
import tokenizer
import video
from support import loops, metrics, runtime
from support.pickles import KINDS, PUBLISHED, guard, located, named_tensors, read
from support.runtime import UserError, require

FORMATS = {                         # the mark of our own files: (model, config, presets)
    "open-magvit2-tokenizer": (tokenizer.Tokenizer, tokenizer.TokenizerConfig, tokenizer.PRESETS),
    "open-magvit2-video-tokenizer": (video.VideoTokenizer, video.VideoTokenizerConfig, video.PRESETS),
    "open-magvit2-ar": (ar_model.ARModel, ar_model.ARConfig, ar_model.PRESETS)}
*TOKENIZERS, AR = FORMATS
TRAINED_ON = ("data_path", "val_data_path", "resize", "split_list", "val_split_list", "frame_stride")
PUBLISHED_NAMES = ("encoder.", "decoder.", "loss.discriminator.", "loss.perceptual_loss.", "model_ema.",
                   "transformer.")
# The published names below transformer.* and ours. Inside a block they are the same.
AR_NAMES = {"pre_emb.": "token_embeddings.0.", "post_emb.": "token_embeddings.1.", "head.": "heads.",
            "class_emb.embedding_table.": "class_embedding.", "spatial_blocks.": "inter_blocks.",
            "factorized_blocks.": "intra_blocks.", "norm.": "norm."}
WRAPPER = ".conv_1."                # published causal convolutions are modules around one; ours are not
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "kernel")       # have no EMA

# ---- 1. Weights, and the state of a training run -----------------------------------------------------------

def opened(path, ema=True):
    """(path, dict in the form of ours) of the file that `path` means (see `located`), whoever wrote it.
    ema: of a published tokenizer, the EMA weights."""
    path = located(path)
    stored = read(path)
    return path, from_lightning(path, stored, ema) if "state_dict" in stored else stored


def differences(own, state):
    """What keeps `state` from fitting the tensors `own`, both {name: tensor}, in words; "" for nothing."""
    wrong = [f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
             for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    texts = {"missing": own.keys() - state.keys(), "not expected": state.keys() - own.keys(),
             "wrong shapes": wrong}
    return "; ".join(f"{what}: {listed(names)}" for what, names in texts.items() if names)


def shapes(state):
    """{(name, shape)} of {name: tensor}."""
    return {(name, tensor.shape) for name, tensor in state.items()}


def listed(names):
    """The first ten of `names`, in order, on one line."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(sorted(ascii(name).strip("'") for name in names)[:10]) + more


def load_state(part, state, source):
    """Load a network, optimizer, scaler or tensor strictly, or raise one line that names `source`."""
    if isinstance(part, torch.nn.Module):
        problem = differences(part.state_dict(), state or {})
        require(not problem, f"{source} does not fit this model; {problem}")
        part.load_state_dict(state)
    elif isinstance(part, torch.Tensor):
        require(getattr(state, "shape", None) == part.shape, f"{source} is no tensor {list(part.shape)}")
        part.copy_(state)
    else:
        with guard(source):
            part.load_state_dict(state)
            for parameter, moments in getattr(part, "state", {}).items():      # Adam takes any, fails later
                found = [moments[name].shape for name in ("exp_avg", "exp_avg_sq")]
                require(found == [parameter.shape] * 2, f"{source} is of another network: its moments are "
                                                        f"{found}, expected {parameter.shape}")


def flags_for(config, own):
    """The flags that give a model the shape of `config` where that of `own` differs, as one types them."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        no_shape = field.name in ("resolution", "frames") or "dropout" in field.name
        if "help" in field.metadata and not no_shape and value != getattr(own, field.name, value):
            flag = field.metadata.get("flag", f"--{field.name.replace('_', '-')}")
            values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            words += [f"--no-{flag[2:]}" if value is False else flag, *map(str, values)]
    return " ".join(words)


def load_partly(model, state, may_differ, source, config):
    """Load `state`, of a model of this `config`, into `model` strictly, except that modules whose names begin
    with one of the tuple `may_differ` keep their own start where any shape differs. Says which, once done."""
    own = model.state_dict()
    anew = {name.rpartition(".")[0] for name, _ in shapes(own) ^ shapes(state) if name.startswith(may_differ)}
    state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in anew}
    state.update({name: tensor for name, tensor in own.items() if name.rpartition(".")[0] in anew})
    problem = differences(own, state)
    flags = flags_for(config, model.config)
    require(not problem, f"{source} do not fit this model; {f'give {flags}' if flags else problem}")
    model.load_state_dict(state)
    runtime.print_main(f"start    {source}; anew: {listed(anew) or 'nothing'}")


def resume(args, parts, flags, **records):
    """The checkpoint that --resume continues, restored into `parts`; an empty dict for a new run.

    parts: {name: network, optimizer, scaler or tensor}; the random generators are restored too. Raises
    `UserError` unless the file holds just these, and the `flags` and `records` ({name: dict}) of its run are
    those of this one. Where the newest file is damaged, the one before it is taken. No run is written over.
    """
    existing = runtime.list_checkpoints(args.results_dir)
    require(args.resume or not existing, f"{args.results_dir} already holds a run up to "
            f"{existing and existing[-1]}; continue it with --resume, or choose another --results-dir")
    candidates = existing
    if args.resume not in (None, "latest"):
        candidates = runtime.list_checkpoints(args.resume) or [args.resume]
    if not candidates:
        if args.resume:
            runtime.print_main(f"--resume: no checkpoint in {args.results_dir} yet, starting from scratch")
        return {}
    for path in reversed(candidates):
        try:
            saved = read(path, whole=True)
            break
        except UserError as error:
            if path == candidates[0]:
                raise
            runtime.print_main(f"{error}; trying the one before")
    where = f"--resume {path}"
    require(saved.get("format") == format_of(parts["model"]),
            f"{where}: not a training checkpoint of this script and preset")
    for name in ("args", "step", "rng", *records):
        require(saved.get(name) is not None, f"{where}: it holds no {name}")
    runtime.check_same(saved["args"], vars(args), f"{where}: a flag that must stay as it was", flags)
    require(("discriminator" in saved) == ("discriminator" in parts),
            f"{where}: --gan-weight cannot be switched on or off in the middle of a run")
    newest = max([int(file.stem[5:]) for file in existing], default=0)
    require(args.resume == "latest" or newest <= saved["step"], f"{where}: {args.results_dir} holds newer "
            f"ones, up to step {newest}; move them away, or use another --results-dir")
    for name, record in records.items():
        known = record.keys() & saved[name].keys()         # older files know less of a run
        runtime.check_same(saved[name], record, f"{where}: the {name}", known)
    for name, part in parts.items():
        load_state(part, saved.get(name), f"{name} of {path}")
    with guard(f"rng of {path}"):
        loops.restore_rng_state(saved["rng"])
    runtime.print_main(f"resuming {path} at step {saved['step']}")
    return saved


# ---- 2. Tokenizers and transformers ------------------------------------------------------------------------

def load_tokenizer(path, ema=True):
    """(tokenizer of images or clips, info) of a checkpoint of ours, or a published one, or of an AR model.

    ema: the EMA weights where the file has them, as for published results, else the raw ones. The model is in
    eval mode on the CPU; info says "path", "preset", "weights" ("EMA" or "raw"), "step", "source" ("ours" or
    "published") and "trained_on". Raises `UserError`, listing names.
    """
    path, stored = opened(path, ema)
    if stored.get("format") == AR:
        require(stored.get("first_stage"), f"{path} is an AR model without its tokenizer")
        stored = {**stored["first_stage"], "args": stored.get("args")}         # of data that both learned
    return build(path, stored, ema, TOKENIZERS)


def load_ar(path, ema=True):
    """(ARModel, its tokenizer or None, info) of one of our checkpoints or a published file. As
    `load_tokenizer`; info also says "classes" (their names, None where the file has none) and "tokenizer",
    the record of the one that made the tokens."""
    path, stored = opened(path)
    model, info = build(path, stored, ema, [AR])
    info.update(classes=stored.get("classes"), tokenizer=stored.get("tokenizer"))
    require(info["classes"] is None or len(info["classes"]) == model.config.num_classes
            and {str} >= set(map(type, info["classes"])), f"{path} names other classes than it has")
    decoder = None
    if stored.get("first_stage") is not None:
        decoder, _ = build(f"the tokenizer inside {path}", stored["first_stage"], False, TOKENIZERS)
    return model, decoder, info


def load_pair(ckpt=None, tokenizer_path=None, ema=True):
    """(ARModel, its tokenizer, info of `load_ar`): all that drawing needs, on the CPU.

    ckpt: None is the newest of runs/ar. tokenizer_path: for published files that contain none; for our files
    it must be the one that made the tokens. Raises `UserError` where the two do not belong together.
    """
    ckpt = ckpt or runtime.latest_checkpoint("runs/ar", "AR model")
    model, decoder, info = load_ar(ckpt, ema)
    made_with = info["tokenizer"] or {}
    if tokenizer_path:
        decoder, its = load_tokenizer(tokenizer_path, ema)
        info["tokenizer"] = {**its, "sha256": weights_hash(decoder)}
        require(info["source"] == "published" or made_with.get("sha256") == info["tokenizer"]["sha256"],
                f"--tokenizer {tokenizer_path} is not the one that {ckpt} was trained with and contains, "
                f"{made_with.get('path')}; leave the flag out")
    require(decoder, f"{ckpt} contains no whole tokenizer; name the file of one with --tokenizer")
    ids = decoder.quantizer.vocabulary
    axes = 2 if decoder.config.frames is None else 3
    needed = 2 ** sum(model.config.bits)
    require(ids == needed and axes == len(model.config.grid), f"{ckpt} draws {needed} ids on a grid "
            f"{model.config.grid}, but its tokenizer, {tokenizer_path or made_with.get('path')}, has {ids} "
            f"ids on {axes} axes; give the right one with --tokenizer")
    return model, decoder, info


def format_of(model):
    """The mark under "format" in our checkpoints of this kind of model."""
    return next(mark for mark, (kind, _, _) in FORMATS.items() if type(model) is kind)


def config_in(path, stored, kind, state):
    """The config in a file, a dataclass of this `kind`. Raises `UserError` where it cannot be one of `state`.
    Limits keep what is built of a damaged config small, and its sizes below 2^63."""
    values = stored.get("config") or {}
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    require(values.keys() == defaults.keys(), f"{path} was written by another version of this project: its "
                                              f"config differs in {listed(values.keys() ^ defaults)}")
    many = dict.fromkeys(("levels", "codebook_size", "num_classes"), 2 ** 24)
    for name, value in values.items():
        numbers = value if type(value) is tuple else [value] if type(value) is int else []
        most = many.get(name, 2 ** 9 if type(value) is tuple else 2 ** 16)
        if name.endswith("blocks"):
            most = len(state)
        small = len(numbers) <= 64 and all(type(number) is int and abs(number) <= most for number in numbers)
        require(type(value) is type(defaults[name]) and small, f"{path}: its config cannot be, in {name}")
    try:
        return kind(**values)
    except ValueError as error:
        require(runtime.in_one_line(error) is None, f"{path}: its config cannot be: {error}")
        raise


def build(path, stored, ema, kinds):
    """(model in eval mode on the CPU, info) of a checkpoint in our form whose format is one of `kinds`."""
    mark = stored.get("format")
    what = "AR model" if kinds == [AR] else "tokenizer"
    require(mark, f"{path} is no {what} checkpoint: it has neither our format mark nor a state_dict")
    require(mark in kinds, f"{path} is no {what}, but marked {listed([mark])}")
    kind, config_kind, presets = FORMATS[mark]
    part = "ema" if ema and stored.get("ema") else "model"
    state = stored.get(part) or {}
    config = config_in(path, stored, config_kind, state)
    preset = stored.get("preset") if mark == AR else next(     # an AR model may have any number of classes
        (name for name, known in presets.items() if known == config), "custom")
    with torch.device("meta"):                             # shapes first, without memory or random weights
        model = kind(config)
    problem = differences(model.state_dict(), state)
    guess = f", taken for {preset}," if "source" in stored else ""
    require(not problem, f"{path}{guess} does not fit this model; {problem}")
    model.to_empty(device="cpu")
    if mark == AR:                                         # a constant, and so in no checkpoint
        model.rope = ar_model.rope_table(config.grid, config.width // config.heads)
    model.load_state_dict(state)
    args = stored.get("args") or {}
    return model.eval(), {"path": str(path), "preset": preset, "weights": "EMA" if part == "ema" else "raw",
                          "step": stored.get("step"), "source": stored.get("source", "ours"),
                          "trained_on": {name: args.get(name) for name in TRAINED_ON}}


# ---- 3. Published files, brought into the form of ours -----------------------------------------------------

def below(prefix, state):
    """What has `prefix` before its name in {name: tensor}, without it."""
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def from_lightning(path, published, ema):
    """A published tokenizer, or transformer with the tokenizer inside it, as a checkpoint of ours."""
    state = published["state_dict"]
    if not below("transformer.", state):
        return published_tokenizer(path, state, published, ema)
    inner = below("first_stage_model.", state)
    own = {f"{name} (published)": tensor for name, tensor in state.items()
           if not name.startswith(("first_stage_model.", *[f"transformer.{theirs}" for theirs in AR_NAMES]))}
    for theirs, ours in AR_NAMES.items():
        own.update({ours + name: tensor for name, tensor in below(f"transformer.{theirs}", state).items()})
    record = None
    if inner:
        inner = published_tokenizer(path, inner, published, False)
        record = {"path": str(path), "weights": "raw", "preset": inner["preset"], "sha256": None}
    return in_our_form(AR, own, published, first_stage=inner or None, classes=None, tokenizer=record)


def published_tokenizer(path, state, published, ema):
    """The published tokenizer with these weights in our form; `ema`: its EMA weights must be whole."""
    extra = [name for name in state if not name.startswith(PUBLISHED_NAMES)]
    require(not extra, f"{path} holds names that no published tokenizer has: {listed(extra)}")
    averaged = below("model_ema.", state) if ema else {}
    if averaged:
        # One to one with the raw parameters, so that a weight too many or too few is found, also of D.
        dotless = {name.replace(".", ""): name for name in state
                   if name.startswith(PUBLISHED_NAMES[:3]) and not name.endswith(BUFFERS)}
        wrong = dotless.keys() ^ (averaged.keys() - {"decay", "num_updates"})
        require(not wrong, f"the EMA weights in {path} do not match its raw ones, in "
                f"{listed([dotless.get(name, name) for name in wrong])}; sample.py, evaluate.py and "
                f"tokenizer.py can do without: --raw-weights")
    own = {name: averaged.get(name.replace(".", ""), tensor) for name, tensor in state.items()
           if name.startswith(("encoder.", "decoder."))}
    require(own, f"{path} holds no tokenizer: no encoder.* and no decoder.*")
    of_images, of_clips = TOKENIZERS
    mark = of_clips if any(WRAPPER in name for name in own) else of_images
    own = {name.replace(WRAPPER, "."): tensor for name, tensor in own.items()}
    return in_our_form(mark, own, published, ema=own if averaged else {},
                       discriminator=below("loss.discriminator.", state))


@functools.cache
def shapes_of(kind, config):
    """`shapes` of the weights of a model."""
    with torch.device("meta"):                             # without memory or random weights
        return shapes(kind(config).state_dict())


def in_our_form(mark, state, published, **more):
    """A checkpoint of ours with the weights `state`, of the preset that has the most similar ones."""
    kind, _, presets = FORMATS[mark]
    preset = min(presets, key=lambda name: len(shapes(state) ^ shapes_of(kind, presets[name])))
    step = published.get("global_step")
    return {"format": mark, "source": "published", "step": step if isinstance(step, int) else None,
            "preset": preset, "config": dataclasses.asdict(presets[preset]), "model": state, **more}


def weights_hash(model):
    """sha256 of names and weights: which model it is, wherever its file lies and whatever else is in it."""
    digest = hashlib.sha256()
    for name, tensor in loops.watched(sorted(model.state_dict().items()), "hashing", unit="tensors"):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


# ---- 4. The networks of the metrics ------------------------------------------------------------------------

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
    states = [named_tensors(path, read(path)) for path in paths]
    own = network.state_dict()
    if len(paths) == 2:                                    # LPIPS: a classifier without its head, and weights
        state = {key: tensor for key, tensor in states[0].items() if key in own}
        state.update({f"heads.{key[:1]}": tensor for key, tensor in below("lin", states[1]).items()})
    else:
        # Old files lack BatchNorm's counters of training steps, which nothing reads in eval mode.
        state = {**{key: tensor for key, tensor in own.items() if key.endswith("_tracked")}, **states[0]}
    load_state(network, state, f"{name} of {paths[-1].parent}")
    return network.eval().requires_grad_(False), " ".join(sha for _, sha in NETWORK_FILES[name])


# ---- 5. Weights to pass on ---------------------------------------------------------------------------------

def get_args(argv=None):
    """Parse the command line."""
    parser = runtime.ArgumentParser("Keep of a checkpoint what drawing or encoding needs: the weights (EMA "
                                    "ones where there are any), in half precision.")
    parser.add_argument("checkpoint", help=f"file, folder of a run, or one of {', '.join(PUBLISHED)}")
    parser.add_argument("output", help="file to write, some ten times smaller")
    return parser.parse_args(argv)


def main(args):
    """Write the smaller file."""
    output = pathlib.Path(args.output)
    require(output.suffix in (".pt", ".pth", ".ckpt"), f"{output}: a checkpoint is called NAME.pt")
    path, stored = opened(args.checkpoint)
    training = output in runtime.list_checkpoints(output.parent)
    require(not training and not (output.exists() and output.samefile(path)),
            f"{output} holds what --resume needs, which would be lost; choose another name")
    _, info = build(path, stored, True, list(FORMATS))     # raises unless it is whole
    kept = KINDS.keys() - {"rng", "discriminator", "dataset"}
    smaller = {name: stored[name] for name in kept if name in stored}
    smaller["args"] = info["trained_on"]
    for part in filter(None, (smaller, smaller.get("first_stage"))):
        state = part.get("ema") or part["model"]
        part["ema"] = {}
        part["model"] = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    with runtime.atomic(output) as temporary:
        torch.save(smaller, temporary)
    print(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    runtime.run_script(main, get_args)
