"""What a run starts from: checkpoint, effective flags, model, optimizer, schedule, teacher."""
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import PatchEmbed, to_2tuple
from timm.models import get_pretrained_cfg, is_model_in_modules
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn

import conversion
import kernels
import models_kan
import vetting
from checkpoints import (
    check_entries,
    checkpoint_args,
    in_our_layout,
    load_file,
    one_line,
    plain,
    saved_checkpoints,
    weights_of,
)
from config import PREPARATION, Config, flag_name, get_args_parser, nearest, parse_args, resolve, validate
from datasets import VAL_SPLIT, ImageSet, Loaders, guess_data_set, looks_like_imagenet, needs_splitting
from downloads import HUB, LOCAL, fetch, is_url, quiet_hub
from engine import MovingAverage, TrainState
from group_kan import GroupActivation
from losses import Teacher, balanced
from models_kan import KAN_OPTIONS, FunctionLayer, ModelSpec
from run_folder import versions
from samplers import RASampler, SampleKey
from utils import Process, UserError, cores, one_or_two, printable, say, shown_size, world_size_of_launch


# ---------------------------------------------------------------- the checkpoint
@dataclass(frozen=True)
class Start:
    """purpose: "resume", "eval", "finetune" or None. spec: the checkpoint's model, where it decides on it."""
    purpose: str | None = None
    path: str = ""
    checkpoint: dict[str, Any] = field(default_factory=dict)
    spec: ModelSpec | None = None

    @property
    def class_names(self) -> list[str] | None:
        return self.checkpoint.get("class_names") if self.purpose in ("resume", "eval") else None


def read_start(config: Config) -> Start:
    """Read what --resume or --finetune names. Raises UserError where that is not possible."""
    args = config.args
    if args.resume == "auto":
        start = _newest(args.output_dir, args.eval)
        if start:
            return start
    elif args.resume:
        return _good(*_read(args.resume), config)
    if args.finetune:
        path, checkpoint = read_source(args.finetune)
        vetting.check_flags(checkpoint, path)
        return Start("finetune", path, checkpoint)
    if args.eval:
        raise UserError("--eval evaluates a checkpoint: name it with --resume FILE"
                        if args.resume != "auto" else f"--resume auto: {args.output_dir} holds no checkpoint yet")
    return Start()


def _read(location: str) -> tuple[str, dict[str, Any]]:
    return location, in_our_layout(load_file(fetch(location)), location)


def _good(path: str, checkpoint: dict[str, Any], config: Config, of_a_run: bool = False) -> Start:
    """What resumes or evaluates from this checkpoint. Raises UserError where that would fail later, or spoil the weights.

    of_a_run: it must have all that a run of this program writes, as --resume auto finds it."""
    check_entries(checkpoint, path, complete=of_a_run)
    vetting.check_flags(checkpoint, path)
    start = Start("eval" if config.args.eval else "resume", path, checkpoint, _spec(checkpoint, path, config))
    assert start.spec is not None
    model = vetting.check_weights(start.spec, checkpoint, path)
    if checkpoint.get("model_ema"):
        vetting.check_weights(start.spec, checkpoint, path, "model_ema")
    if start.purpose == "resume":
        _check_state(model.to_empty(device="cpu"), start, config)      # memory that nothing touches
    return start


def _check_state(model: nn.Module, start: Start, config: Config) -> None:
    args, epoch = settle(config, start, Process()).args, start.checkpoint.get("epoch", -1)
    planned = checkpoint_args(start.checkpoint).get("epochs")
    if type(planned) is int and epoch >= planned:
        raise UserError(f"checkpoint {start.path}: its epoch {epoch} lies beyond the {planned} that it was trained for: get it "
                        "from its source again, or start a new run from its weights with --finetune")
    validate(args, 1 if config.args.resume != start.path else world_size_of_launch())
    if args.attn_only:
        freeze_all_but_attention(model)
    optimizer = build_optimizer(args, model, 1.0)
    vetting.check_optimizer(optimizer, start.checkpoint.get("optimizer"))
    vetting.check_scaler(start.checkpoint.get("scaler"), start.path)
    if args.sched == "plateau":
        scheduler: Any = build_scheduler(args, optimizer, 1)
        stored = start.checkpoint.get("lr_scheduler") or {}
        own = {"plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": [1.0] * len(optimizer.param_groups)}
        if not own.keys() <= stored.keys() or not all(vetting.same_kind(own[key], stored[key]) for key in own):
            raise UserError(f"checkpoint {start.path}: its 'lr_scheduler' is not that of --sched plateau, which it was trained "
                            "with: get it from its source again, or start a new run from its weights with --finetune")


def _newest(output_dir: str, evaluate: bool) -> Start | None:
    """The newest good checkpoint of a run; None where the run has written none."""
    if not output_dir:
        raise UserError("--resume auto goes on with the run in --output_dir: give that folder")
    # by the checkpoint's own flags: one on the command line that contradicts them is another mistake, told by `settle`
    own = parse_args(["--eval"] if evaluate else [])
    failures = []
    for path in saved_checkpoints(Path(output_dir).expanduser()):
        try:
            start = _good(str(path), load_file(path), own, of_a_run=not evaluate)
        except UserError as error:
            say(f"warning: {error}", file=sys.stderr)
            failures.append(path.name)
            continue
        if failures:
            epoch, step = start.checkpoint.get("epoch", -1) + 1, start.checkpoint.get("step")
            say(f"warning: going on from the earlier {path}, epoch {epoch}{f', step {step}' if step else ''}", file=sys.stderr)
        return start
    if failures:
        raise UserError(f"--resume auto: {' and '.join(failures)} in {output_dir} cannot be read or used (see above): name "
                        "another file with --resume, or start a new run in another folder")
    say(f"--resume auto: {output_dir} holds no checkpoint yet, a new run begins")
    return None


def read_source(source: str) -> tuple[str, dict[str, Any]]:
    """--finetune: a file, a folder, a URL, a model on the Hub, or the name of a timm model with pretrained weights."""
    if is_url(source) or source.startswith((HUB, LOCAL)) or Path(source).expanduser().exists():
        return _read(source)
    if not timm.is_model(source.split(".")[0]):
        raise UserError(f"--finetune {source} is neither a file, a folder, a URL nor the name of a timm "
                        f"model{_meant(source)}: check it; a model on the Hub is written {HUB}OWNER/NAME")
    quiet_hub()
    say(f"fetching the weights of {source} from timm's hub")
    try:
        model: Any = timm.create_model(source, pretrained=True)
        return source, {"model": model.state_dict(), "args": preparation(source, model.pretrained_cfg)}
    except Exception as error:      # the hub's client raises many kinds
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise UserError(f"--finetune {source}: timm's weights cannot be had ({reason}): check the name and the "
                        "connection, or give a downloaded file") from error


def _spec(checkpoint: dict[str, Any], path: str, config: Config) -> ModelSpec:
    spec = vetting.described(checkpoint, path)
    if spec:
        return spec
    name = config.args.model if "model" in config.given else checkpoint_args(checkpoint).get("model")
    name = name if isinstance(name, str) else None
    if name and models_kan.split_name(name)[0] is None and timm.is_model(name):
        return ModelSpec(name)
    with vetting.strangers(f"checkpoint {path}"):
        told = config.args.input_size if "input_size" in config.given else checkpoint_args(checkpoint).get("input_size")
        return models_kan.infer_model(weights_of(checkpoint, path), {"model": name, "input_size": told})


# ---------------------------------------------------------------- the flags
def settle(config: Config, start: Start, process: Process) -> Config:
    """Effective flags: given < checkpoint's < the folder's, model's and machine's own < default (see `resolve`)."""
    stored = checkpoint_args(start.checkpoint)
    if start.spec:
        shape = {"model": start.spec.name, "input_size": start.spec.kwargs.get("img_size")}
        shape |= {key: start.spec.kwargs.get(key) for key in KAN_OPTIONS}
        stored |= {key: value for key, value in shape.items() if value is not None}
    found = None
    if start.purpose != "resume" and "data_set" not in config.given:
        found = guess_data_set(config.args.data_path)
    config = resolve(config, stored, purpose=start.purpose, models_own=models_kan.own_options(start.spec) if start.spec else None)
    if found:
        config = _with(config, data_set=found, source="data folder")
    if not config.args.eval and start.purpose != "resume" and config.args.val_split is None and needs_splitting(config.args):
        config = _with(config, val_split=VAL_SPLIT, source="data folder")       # where it is evaluated it comes from here
    if "exif_orientation" not in config.sources:
        if start.purpose in ("resume", "eval") and stored.get("data_set") == "FOLDER" and "exif_orientation" not in stored:
            config = _with(config, exif_orientation=False, source="checkpoint")     # of a version that turned nothing
        elif config.args.data_set == "FOLDER" and not looks_like_imagenet(config.args.data_path):
            config = _with(config, exif_orientation=True, source="data folder")
    config = with_own_preparation(with_own_input_size(config), stored)
    if "num_workers" not in config.given:
        config = _with(config, num_workers=min(config.args.num_workers, cores()), source="machine")
    return config


def _with(config: Config, source: str, **values) -> Config:
    return replace(config, args=Namespace(**{**vars(config.args), **values}),
                   sources={**config.sources, **dict.fromkeys(values, source)})


def with_own_input_size(config: Config) -> Config:
    """--input-size of the model where nothing else says it."""
    name = config.args.model
    cfg = get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    if cfg is None or "input_size" in config.sources:
        return config
    return _with(config, input_size=one_or_two(cfg.input_size[-2:]), source="model")


def preparation(name: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared for a model of timm's with a pretrained configuration: the flags `PREPARATION`. For this project's
    models and DeiT's as in DeiT's code, which are the flags' defaults."""
    name = name.split(".")[0]
    if models_kan.split_name(name)[0] or is_model_in_modules(name, ["deit"]):
        return {dest: get_args_parser().get_default(dest) for dest in sorted(PREPARATION)}
    own = resolve_data_config(pretrained_cfg=dict(cfg))
    return plain({"eval_crop_ratio": own["crop_pct"], "crop_mode": own["crop_mode"], "interpolation": own["interpolation"],
                  "mean": own["mean"], "std": own["std"]})


def with_own_preparation(config: Config, stored: Mapping[str, Any]) -> Config:
    """The flags `PREPARATION` of the model's own pretrained configuration where nothing else says them.

    stored: a checkpoint's flags; one that tells a part of it was trained with the defaults of the rest."""
    name = config.args.model
    cfg = get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    if cfg is None or any(stored.get(dest) for dest in PREPARATION):
        return config
    own = {dest: value for dest, value in preparation(name, cfg.to_dict()).items()
           if dest not in config.sources and value != getattr(config.args, dest)}
    return _with(config, "model", **own)


# ---------------------------------------------------------------- the model
def model_spec(config: Config, start: Start, num_classes: int) -> ModelSpec:
    """The architecture: the checkpoint's own to resume or evaluate it, else what the flags say."""
    args = config.args
    if start.spec:
        stored = start.spec.kwargs.get("num_classes", num_classes)
        if stored != num_classes:
            raise UserError(f"the checkpoint has {stored} classes, the data {num_classes}: check --data-path and "
                            "--data-set, or start from its weights with --finetune")
        return ModelSpec(start.spec.name, {"num_classes": num_classes, **start.spec.kwargs})
    kwargs = {"num_classes": num_classes, "img_size": args.input_size}
    for key in KAN_OPTIONS:
        if getattr(args, key) is not None:
            kwargs[key] = getattr(args, key)
    return ModelSpec(args.model, kwargs)


def build_model(spec: ModelSpec, config: Config) -> tuple[nn.Module, ModelSpec]:
    """The model with the flags' dropout and stochastic depth, and the spec without what it does not know.

    Any timm classification model; a flag that was given and that the model has no use for is an error."""
    args = config.args
    if not timm.is_model(spec.name.split(".")[0]):
        raise UserError(f"--model {spec.name} is unknown{_meant(spec.name)}: --list-models prints this project's models, "
                        "timm.list_models() all others")
    model: Any
    kwargs = {**_options_with_effect(spec, config), "drop_path_rate": args.drop_path}
    if args.drop:       # DeiT's --drop: after the position embedding, in projections and feed-forwards
        kwargs |= {"pos_drop_rate": args.drop, "proj_drop_rate": args.drop}
    flags = {"img_size": "input_size", "drop_path_rate": "drop_path", "drop_rate": "drop"}
    while True:
        try:
            model = timm.create_model(spec.name, **kwargs)
            break
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'", str(error))    # Python, timm
            if not unknown or unknown.group(1) not in kwargs:
                raise
            key = unknown.group(1)
            if key in ("pos_drop_rate", "proj_drop_rate"):      # no transformer: its one rate is the head's
                kwargs["drop_rate"] = args.drop
            elif key != "img_size" and _asked_for(flags.get(key, ""), config):
                raise _no_effect(flags[key], spec.name) from error
            del kwargs[key]
        except (ValueError, AssertionError) as error:
            raise UserError(f"--model {spec.name} cannot be built ({one_line(error)}): check --model, "
                            f"--input-size {shown_size(args.input_size)} and the KAN options") from error
    if not args.eval and not any(isinstance(module, GroupActivation) for module in model.modules()):
        for key in ("kan_lr_mult", "kan_weight_decay"):
            if _asked_for(key, config):
                raise _no_effect(key, spec.name, like="kan_groups")
    if args.log_kan and not args.eval and not any(isinstance(module, FunctionLayer) for module in model.modules()):
        raise _no_effect("log_kan", spec.name, like="kan_grid_points")
    embed, sides = getattr(model, "patch_embed", None), to_2tuple(args.input_size)
    if isinstance(embed, PatchEmbed) and any(side % patch for side, patch in zip(sides, embed.patch_size)):
        fitting = one_or_two([side // patch * patch or patch for side, patch in zip(sides, embed.patch_size)])
        raise UserError(f"--input-size {shown_size(args.input_size)} is not divisible by the model's patch size "
                        f"{embed.patch_size[0]}: take {shown_size(fitting)}")
    if not isinstance(args.input_size, int) and models_kan.split_name(spec.name)[0] is None:
        _try_oblong(model, spec.name, args.input_size)
    kept = {key: value for key, value in kwargs.items() if key in spec.kwargs}
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(f"--grad-checkpointing: --model {spec.name} does not support it, leave it out") from error
    if args.distillation_type != "none" and not args.eval:
        if not hasattr(model, "set_distilled_training"):
            raise UserError(f"--distillation-type {args.distillation_type} needs a model with a distillation token, "
                            f"such as deit_tiny_distilled_patch16_224_KAN, not --model {spec.name}")
        if not args.train_mode:
            raise UserError(f"--distillation-type {args.distillation_type} needs both tokens' outputs, which a model "
                            "gives in training mode only: leave out --no-train-mode")
        model.set_distilled_training(True)
    return model, ModelSpec(spec.name, kept)


def _try_oblong(model: nn.Module, name: str, size: Sequence[int]) -> None:
    """One empty image through the model: some of timm's can be built for an oblong one, and take square ones alone."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *size))
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--model {name} takes no images of --input-size {shown_size(size)} ({one_line(error)}): give one "
                        "number, the side of a square, or choose another model") from error
    model.train()


def _meant(name: str) -> str:
    """' (did you mean X?)' of a model's name that is none, or ''."""
    architecture, dot, tag = name.partition(".")
    close = nearest(architecture, [*timm.list_models(), *models_kan.registered_models()])
    return f" (did you mean {close}{dot}{tag}?)" if close else ""


def _options_with_effect(spec: ModelSpec, config: Config) -> dict[str, Any]:
    """The spec's arguments without the options that its model does not have: for one that was given, an error."""
    without = set(KAN_OPTIONS) - set(models_kan.options_of(spec.name))
    for key in KAN_OPTIONS:
        if key in without and key in config.given and getattr(config.args, key) is not None:
            raise _no_effect(key, spec.name)
    return {key: value for key, value in spec.kwargs.items() if key not in without}


def _asked_for(dest: str, config: Config) -> bool:
    """Whether the user wants something by a flag: on the command line, or in a recipe another value than the default, which
    stands in every run's args.yaml."""
    where = config.given.get(dest)
    return where == "command line" or where is not None and getattr(config.args, dest) != get_args_parser().get_default(dest)


def _no_effect(dest: str, name: str, like: str | None = None) -> UserError:
    """like: an option that the models have on which the flag has an effect."""
    others = models_kan.models_with(like or dest, name)
    return UserError(f"{flag_name(dest)} has no effect on --model {name}: leave it out"
                     + (f", or choose {' or '.join(others)}" if others else ""))


def freeze_all_but_attention(model: nn.Module) -> None:
    """--attn-only (arXiv:2203.09795): attention, head and position embedding are trained."""
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise UserError("--attn-only: this model has no attention, leave the flag out")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".attn." in name or name.startswith(("head.", "head_dist.", "pos_embed"))


def load_start(model: nn.Module, spec: ModelSpec, start: Start, loaders: Loaders, seed: int) -> str | None:
    """Weights of --finetune into the model; returns the table of what became of each tensor."""
    if start.purpose != "finetune":
        return None
    with vetting.strangers(f"checkpoint {start.path}"):
        state = weights_of(start.checkpoint, start.path)
        report, errors = conversion.load_converted(model, spec, state, lambda: _calibration_batch(loaders, seed),
                                                   models_kan.patch_grid(start.checkpoint, state))
    return report.table() + (f"\n{conversion.table(errors)}" if errors else "")


def _calibration_batch(loaders: Loaders, seed: int, size: int = 64) -> torch.Tensor:
    """Training images (with --eval: validation images), the same on every process."""
    if not loaders.train:
        return validation_images(loaders, size)
    data: Any = loaders.train.dataset
    return _readable(data, list(islice(RASampler(data, num_repeats=1, seed=seed), size)))


def validation_images(loaders: Loaders, size: int = 64) -> torch.Tensor:
    """[B, 3, S, S]: so many readable validation images, if there are, spread evenly over their order. Uses no random number
    and no loader process. Raises UserError where none can be read."""
    data: Any = loaders.val.dataset
    return _readable(data, range(0, len(data), max(1, len(data) // size))[:size])


def _readable(data: ImageSet, keys: Sequence[SampleKey | int]) -> torch.Tensor:
    readable = [image for image, target in map(data.__getitem__, keys) if target >= 0]
    if not readable:
        raise UserError("no image to calibrate with can be read: check the data folder")
    return torch.stack(readable)


def build_teacher(args: Namespace, num_classes: int, device: torch.device) -> nn.Module | None:
    """--teacher-model with the weights of --teacher-path, frozen, in evaluation mode. It takes the student's images, and sees
    them at its own size and normalisation: those that its checkpoint tells, else those of its timm configuration."""
    if args.distillation_type == "none":
        return None
    path, checkpoint = _read(args.teacher_path)
    if not timm.is_model(args.teacher_model.split(".")[0]):
        raise UserError(f"--teacher-model {args.teacher_model} is no timm model{_meant(args.teacher_model)}: check the name")
    described = vetting.described(checkpoint, path)
    kwargs = described.kwargs if described and described.name == args.teacher_model else {}
    spec = ModelSpec(args.teacher_model, {**kwargs, "num_classes": num_classes})
    vetting.check_weights(spec, checkpoint, path, what=f"--teacher-path {path}")
    teacher = timm.create_model(spec.name, **spec.kwargs)
    models_kan.load_exactly(teacher, weights_of(checkpoint, path), f"--teacher-path {path}")
    vetting.check_flags(checkpoint, path)
    told = settle(parse_args(["--eval", "--model", spec.name]), Start("eval", path, checkpoint, spec), Process()).args
    validate(told)
    if (told.input_size, told.mean, told.std) != (args.input_size, args.mean, args.std):
        say(f"the teacher {spec.name} sees the images at {shown_size(told.input_size, ' x ')} px, mean "
            f"{' '.join(map(str, told.mean))}, std {' '.join(map(str, told.std))}")
        teacher = Teacher(teacher, to_2tuple(told.input_size), told.mean, told.std, args.mean, args.std)
    return teacher.to(device).eval().requires_grad_(False)


def class_weights(args: Namespace, loaders: Loaders, device: torch.device) -> torch.Tensor | None:
    """--class-weights: float32 [K] by the training images that there are of each class, or None. Alike on all processes."""
    if args.class_weights == "none":
        return None
    data: Any = loaders.train.dataset
    if data.is_stream:
        raise UserError(f"--class-weights {args.class_weights} counts the images of each class, which the stream --data-set "
                        f"{args.data_set} does not tell: leave it out")
    counts = np.bincount(data.targets, minlength=loaders.nb_classes)
    weights = balanced(counts)
    few, many = counts.argmin(), counts.argmax()
    say("class weights: " + ", ".join(f"{weights[number]:.3g} for {printable(loaders.class_names[number], 40)} ({counts[number]} "
                                      "images)" for number in (few, many)) + (", others between" if len(counts) > 2 else ""))
    return torch.from_numpy(weights).to(device)


# ---------------------------------------------------------------- optimizer and schedule
def scaled_lr(args: Namespace, world_size: int) -> float:
    """Linear scaling: --lr is for 512 images an update, unless --unscale-lr."""
    return args.lr if args.unscale_lr else args.lr * args.batch_size * world_size * args.grad_accum / 512


def schedule_warnings(args: Namespace, lr: float) -> list[str]:
    """What is odd about the learning rate's way through the run, a sentence each. lr: of `scaled_lr`."""
    found = []
    if args.warmup_epochs >= args.epochs and args.sched != "plateau":
        found.append(f"the {args.warmup_epochs} epochs of --warmup-epochs fill all {args.epochs} of --epochs, so --lr "
                     "is never reached")
    scaled = "" if lr == args.lr else f" (--lr {args.lr:g} scaled to the images of an update)"
    remedy = "raise --lr or --batch-size, or add --unscale-lr" if scaled else "raise --lr"
    if args.min_lr > lr and args.sched in ("cosine", "tanh", "poly", "plateau"):       # timm's others know no lowest rate
        outcome = "is never lowered" if args.sched == "plateau" else "rises through the run instead of falling"
        found.append(f"--min-lr {args.min_lr:g} lies above the learning rate {lr:.3g}{scaled}, which {outcome}: lower --min-lr, "
                     f"{remedy}")
    if args.warmup_lr > lr and args.warmup_epochs > 0:
        found.append(f"--warmup-lr {args.warmup_lr:g} lies above the learning rate {lr:.3g}{scaled}, so the warm-up goes down "
                     f"to it: lower --warmup-lr, {remedy}")
    return found


def choose_backend(config: Config, spec: ModelSpec, model: nn.Module, device: torch.device) -> None:
    """Let --kan-backend compute the model's KAN layers, and say what that is. Raises UserError where it cannot."""
    name = config.args.kan_backend
    if models_kan.split_name(spec.name)[1] not in ("KAN", "GKAN"):
        if _asked_for("kan_backend", config):
            raise _no_effect("kan_backend", spec.name)
        return
    try:
        kernels.use(name)
    except ValueError as error:
        raise UserError(f"--kan-backend {name}: {error}") from error
    grids: list[Any] = [module.for_kernels for module in model.modules() if hasattr(module, "for_kernels")]
    say(f"KAN layers ({name}): {kernels.describe(device.type, grids)}")


# What some of timm's optimizers need beside it: part of the name -> (module, how to install it).
_PACKAGES = {"kron": ("opt_einsum", "pip install opt_einsum"), "bnb": ("bitsandbytes", "pip install bitsandbytes"),
             "fused": ("apex", "build it as https://github.com/NVIDIA/apex says")}


def _check_packages(opt: str) -> None:
    """Raises UserError where an optimizer lacks what it computes with. Kron works without, but takes thousands of times the
    parameters' memory."""
    for part, (module, remedy) in _PACKAGES.items():
        if part in opt and find_spec(module) is None:
            raise UserError(f"--opt {opt} needs the package {module}, which is not installed: {remedy}")
    if ("bnb" in opt or "fused" in opt) and not torch.cuda.is_available():
        raise UserError(f"--opt {opt} computes on CUDA GPUs only, and PyTorch sees none: choose another")


def build_optimizer(args: Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    _check_packages(args.opt.lower())
    kwargs: dict[str, Any] = {**optimizer_kwargs(args), "lr": lr}
    info = get_optimizer_info(args.opt.lower().split("_")[-1])     # what follows lookahead_
    if info.has_betas and len(args.opt_betas or ()) not in (0, info.num_betas):
        raise UserError(f"--opt {args.opt} takes {info.num_betas} --opt-betas, not {len(args.opt_betas)}")
    if info.opt_class in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        # one kernel for all of an update, on the CPU too (there 2-3 times as fast as a loop, and foreach slower than
        # that), and a loss scaler that need not read back whether a gradient was infinite; timm's own choose foreach
        kwargs["fused"] = True
    if "muon" in info.name:     # Muon is for hidden matrices: the rest by AdamW
        kwargs["fallback_list"] = ("head*", "patch_embed*", "*.coefficients")
    try:
        optimizer = create_optimizer_v2(model, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--opt {args.opt} cannot be set up ({str(error).splitlines()[0]}): check --opt-eps, "
                        "--opt-betas and --momentum") from error
    if getattr(optimizer, "is_second_order", False) and any(getattr(module, "fused_attn", False) for module in model.modules()):
        raise UserError(f"--opt {args.opt} needs second derivatives, which PyTorch's fused attention does not have: choose "
                        "another")
    _split_coefficients(args, model, optimizer)
    if type(optimizer) is torch.optim.SGD and args.momentum:
        # the fused kernel makes its buffers in the first update, and leaves them unset where that one is skipped
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _split_coefficients(args: Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the coefficients of learned activations groups of their own: --kan-lr-mult, --kan-weight-decay."""
    coefficients = {id(m.coefficients) for m in model.modules() if isinstance(m, GroupActivation)}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in coefficients]
        if not own:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in coefficients]
        settings = {**group, "params": own, "weight_decay": args.kan_weight_decay, "kan_multiple": args.kan_lr_mult}
        settings["lr_scale"] = group.get("lr_scale", 1.0) * args.kan_lr_mult
        optimizer.add_param_group(settings)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def build_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule over exactly --epochs epochs; cooldown and patience act with --sched plateau."""
    kwargs = scheduler_kwargs(args)
    first = 0 if args.sched_on_updates else 1       # timm's multistep counts epochs from 1
    kwargs["decay_milestones"] = [epoch + first for epoch in
                                  range(int(args.decay_epochs), args.epochs, max(1, int(args.decay_epochs)))]
    with warnings.catch_warnings():     # plateau is on its way out of timm, since its state was not saved; here it is
        warnings.simplefilter("ignore", FutureWarning)
        scheduler, _ = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    if args.sched == "plateau":
        scheduler.lr_scheduler.cooldown = args.cooldown_epochs
        # the other schedules scale --min-lr with the rest
        scheduler.lr_scheduler.min_lrs = [args.min_lr * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    return scheduler


def build_state(args: Namespace, model: nn.Module, lr: float, updates_per_epoch: int, device: torch.device,
                amp_dtype: torch.dtype) -> TrainState:
    """Optimizer, schedule, loss scaler (float16 only) and moving average for a model that is on its device."""
    optimizer = build_optimizer(args, model, lr)
    keep_on: Any = "cpu" if args.model_ema_force_cpu else None
    ema = MovingAverage(model, args.model_ema_decay, use_warmup=args.model_ema_warmup, device=keep_on) if args.model_ema else None
    return TrainState(model, optimizer, build_scheduler(args, optimizer, updates_per_epoch),
                      torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16), ema,
                      epoch=args.start_epoch)


def description(config: Config, spec: ModelSpec, loaders: Loaders) -> dict[str, Any]:
    """What a checkpoint says of itself beside the state: flags, architecture, classes, versions; plain types."""
    return {"args": plain({**vars(config.args), "nb_classes": loaders.nb_classes}),
            "model_args": plain({"name": spec.name, "kwargs": spec.kwargs}),
            "class_names": loaders.class_names, "versions": versions()}


def model_table() -> str:
    """--list-models: names, parameters and FLOPs of this project's models at their own size."""
    lines = [f"{'model':42}{'parameters':>14}{'matmul GFLOPs':>16}{'elementwise GFLOPs':>20}"]
    for name in models_kan.registered_models():
        model = timm.create_model(name, device="meta")
        flops = models_kan.count_flops(model)
        lines.append(f"{name:42}{models_kan.count_parameters(model):>14,}{flops.matmul / 1e9:>16.3f}"
                     f"{flops.elementwise / 1e9:>20.4f}")
    return "\n".join(lines)
