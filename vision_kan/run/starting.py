"""The start of a run: its checkpoint and its effective flags."""
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model_in_modules
from torch import nn

import models_kan
from models_kan import KAN_OPTIONS, ModelSpec
from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.checkpoints.downloads import HUB, LOCAL, is_url, quiet_hub
from vision_kan.checkpoints.read import are_names
from vision_kan.checkpoints.shipped import shipped
from vision_kan.checkpoints.write import saved_checkpoints
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.launch import world_size_of_launch
from vision_kan.common.process import cores
from vision_kan.common.text import one_or_two, say, to_builtin_types, warn
from vision_kan.config.checks import validate
from vision_kan.config.flags import FFN_SUFFIXES, PREPARATION, get_args_parser
from vision_kan.config.parser import nearest
from vision_kan.config.resolve import Config, parse_args, resolve
from vision_kan.data.class_folders import VAL_SPLIT
from vision_kan.data.names import guess_data_set, looks_like_imagenet, needs_splitting
from vision_kan.models import vetting
from vision_kan.models.infer import infer_model
from vision_kan.training.optim import build_optimizer, build_scheduler


# ---------------------------------------------------------------- the checkpoint
@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, if any."""
    purpose: str | None = None                                      # "resume", "eval", "finetune" or None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    spec: ModelSpec | None = None                                   # the checkpoint's model, to resume or evaluate it

    def class_names(self, evaluate: bool) -> list[str] | None:
        """The checkpoint's, if its head is used. evaluate: --eval."""
        names = self.checkpoint.state.get("class_names") if self.purpose != "finetune" or evaluate else None
        return names if are_names(names) else None


def read_start(config: Config) -> Start:
    """Open the checkpoint of --resume or --finetune. Raises UserError if it cannot be used."""
    if "model" in config.given:
        config = _with_feed_forward(config, {})
    args = config.args
    if args.resume == "auto":
        start = newest_start(args.output_dir, args.eval)
        if start:
            return start
    elif args.resume:
        return checked_start(Checkpoint.open(args.resume), config)
    if args.finetune:
        return Start("finetune", open_source(args.finetune))
    if args.eval:
        raise UserError("--eval evaluates a checkpoint: name it with --resume FILE"
                        if args.resume != "auto" else f"--resume auto: {args.output_dir} holds no checkpoint yet")
    return Start()


def checked_start(checkpoint: Checkpoint, config: Config, of_a_run: bool = False) -> Start:
    """The start of a resume or an evaluation. Raises UserError if it would fail later, or spoil the weights.

    of_a_run: require every entry that a run of this program writes, as --resume auto does."""
    checkpoint.check_entries(complete=of_a_run)
    start = Start("eval" if config.args.eval else "resume", checkpoint, _spec(checkpoint, config))
    assert start.spec is not None
    model = vetting.check_weights(start.spec, checkpoint)
    if checkpoint.state.get("model_ema"):
        vetting.check_weights(start.spec, checkpoint, "model_ema")
    if start.purpose == "resume":
        _check_state(model.to_empty(device="cpu"), start, config)      # allocated, but its memory is never touched
    return start


def _check_state(model: nn.Module, start: Start, config: Config) -> None:
    args, checkpoint = effective_config(config, start).args, start.checkpoint
    planned = checkpoint.flags.get("epochs")
    if type(planned) is int and checkpoint.epoch >= planned:
        raise UserError(f"checkpoint {checkpoint.path}: its epoch {checkpoint.epoch} lies beyond the {planned} that it was "
                        "trained for: get it from its source again, or start a new run from its weights with --finetune")
    validate(args, 1 if config.args.resume != checkpoint.path else world_size_of_launch())
    optimizer = build_optimizer(args, model, 1.0)
    vetting.check_optimizer(optimizer, checkpoint.state.get("optimizer"))
    vetting.check_scaler(checkpoint)
    if args.sched == "plateau":
        scheduler: Any = build_scheduler(args, optimizer, 1)
        stored = checkpoint.state.get("lr_scheduler") or {}
        own = {"plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": [1.0] * len(optimizer.param_groups)}
        if not own.keys() <= stored.keys() or not all(vetting.same_kind(own[key], stored[key]) for key in own):
            raise UserError(f"checkpoint {checkpoint.path}: its 'lr_scheduler' is not that of --sched plateau, which it was "
                            "trained with: get it from its source again, or start a new run from its weights with --finetune")


def newest_start(output_dir: str, evaluate: bool) -> Start | None:
    """--resume auto: the newest usable checkpoint of a run; None if the run has not written any. Raises UserError if it has, and
    none is usable."""
    if not output_dir:
        raise UserError("--resume auto goes on with the run in --output_dir: give that folder")
    # only the checkpoint's flags: `effective_config` reports a flag on the command line that contradicts them
    own = parse_args(["--eval"] if evaluate else [])
    failures = []
    for path in saved_checkpoints(Path(output_dir).expanduser()):
        try:
            start = checked_start(Checkpoint.open(path), own, of_a_run=not evaluate)
        except UserError as error:
            warn(str(error))
            failures.append(path.name)
            continue
        if failures:
            epoch, step = start.checkpoint.epoch + 1, start.checkpoint.state.get("step")
            say(f"warning: going on from the earlier {path}, epoch {epoch}{f', step {step}' if step else ''}", file=sys.stderr)
        return start
    if failures:
        raise UserError(f"--resume auto: {' and '.join(failures)} in {output_dir} cannot be read or used (see above): name "
                        "another file with --resume, or start a new run in another folder")
    say(f"--resume auto: {output_dir} holds no checkpoint yet, a new run begins")
    return None


def open_source(source: str) -> Checkpoint:
    """--finetune: a file, a folder, a URL, a model on the Hub, or the name of a model with pretrained weights, this project's or
    timm's. Raises UserError if it cannot be read or downloaded."""
    if is_url(source) or source.startswith((HUB, LOCAL)) or Path(source).expanduser().exists() or source in shipped():
        return Checkpoint.open(source)
    if not models_kan.register(source):
        raise UserError(f"--finetune {source} is neither a file, a folder, a URL nor the name of a timm "
                        f"model{suggest_model(source)}: check it; a model on the Hub is written {HUB}OWNER/NAME")
    quiet_hub()
    say(f"fetching the weights of {source} from timm's hub")
    try:
        model: Any = timm.create_model(source, pretrained=True)
        return Checkpoint(source, {"model": model.state_dict(), "args": preparation(source, model.pretrained_cfg)})
    except models_kan.NoWeights as error:
        raise UserError(f"--finetune {source}: {error}") from error
    except Exception as error:      # the hub's client raises many kinds
        raise UserError(f"--finetune {source}: timm's weights cannot be downloaded ({one_line(error).split('. ')[0]}): check the "
                        "name and the connection, or give a downloaded file") from error


def _spec(checkpoint: Checkpoint, config: Config) -> ModelSpec:
    spec, flags = vetting.spec_from_model_args(checkpoint), checkpoint.flags
    if spec:
        return spec
    name = config.args.model if "model" in config.given else flags.get("model")
    name = name if isinstance(name, str) else None
    if name and models_kan.split_name(name)[0] is None and models_kan.register(name):
        return ModelSpec(name)
    with vetting.as_user_error(f"checkpoint {checkpoint.path}"):
        size = config.args.input_size if "input_size" in config.given else flags.get("input_size")
        return infer_model(checkpoint.weights(), {"model": name, "input_size": size})


def _inferred_flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """--model and its options, from weights with learned functions whose file names no model that is known here."""
    name = checkpoint.flags.get("model")
    if isinstance(name, str) and models_kan.register(name):
        return {}
    spec = vetting.kan_of_weights(checkpoint)       # None: of another architecture, which --model must name
    return {} if spec is None else {
        "model": spec.name, **{key: value for key, value in spec.kwargs.items() if key in KAN_OPTIONS}}


# ---------------------------------------------------------------- the flags
def _with_feed_forward(config: Config, stored: Mapping[str, Any]) -> Config:
    """--ffn: --model, or the checkpoint's, becomes the model with that feed-forward. Raises UserError where it contradicts."""
    ffn, name = config.args.ffn, config.args.model
    if ffn is None:
        return config
    if "model" not in config.given:
        name = stored.get("model") or name
    other = models_kan.with_feed_forward(name, FFN_SUFFIXES[ffn])
    if config.given.get("model") == "command line" and models_kan.split_name(name)[1] and other != name:
        raise UserError(f"--ffn {ffn} contradicts --model {name}: name one of them")
    return replace(config, args=Namespace(**{**vars(config.args), "model": other, "ffn": None}),
                   given={**config.given, "model": f"--ffn {ffn}"})


def effective_config(config: Config, start: Start) -> Config:
    """The flags in effect. A flag that was not given takes the value of the checkpoint, else of the data folder, the model or the
    machine, else its default (see `resolve`)."""
    stored = start.checkpoint.flags
    if start.spec:
        shape = {"model": start.spec.name, "input_size": start.spec.kwargs.get("img_size")}
        shape |= {key: start.spec.kwargs.get(key) for key in KAN_OPTIONS}
        stored |= {key: value for key, value in shape.items() if value is not None}
    if start.purpose == "finetune":
        stored |= _inferred_flags(start.checkpoint)
    config = _with_feed_forward(config, stored)
    found = None
    if start.purpose != "resume" and "data_set" not in config.given:
        found = guess_data_set(config.args.data_path)
    config = resolve(config, stored, purpose=start.purpose, models_own=models_kan.own_options(start.spec) if start.spec else None)
    if found:
        config = _with(config, data_set=found, source="data folder")
    if not config.args.eval and start.purpose != "resume" and config.args.val_split is None and needs_splitting(
            config.args.data_set, config.args.data_path):
        config = _with(config, val_split=VAL_SPLIT, source="data folder")       # an evaluation has it from the checkpoint
    if "exif_orientation" not in config.sources:
        if start.purpose in ("resume", "eval") and stored.get("data_set") == "FOLDER" and "exif_orientation" not in stored:
            config = _with(config, exif_orientation=False, source="checkpoint")     # older than the flag
        elif config.args.data_set == "FOLDER" and not looks_like_imagenet(config.args.data_path):
            config = _with(config, exif_orientation=True, source="data folder")
    config = with_own_preparation(with_own_input_size(config), stored)
    own = {} if config.args.eval else models_kan.own_flags(config.args.model)
    config = _with(config, "model", **{dest: value for dest, value in own.items() if dest not in config.sources})
    if not config.args.eval and start.purpose != "resume" and config.args.start_epoch >= config.args.epochs:
        raise UserError(f"--start_epoch {config.args.start_epoch} leaves nothing to train of --epochs {config.args.epochs}: "
                        "lower it")
    if "num_workers" not in config.given:
        config = _with(config, num_workers=min(config.args.num_workers, cores()), source="machine")
    return config


def _with(config: Config, source: str, **values) -> Config:
    return replace(config, args=Namespace(**{**vars(config.args), **values}),
                   sources={**config.sources, **dict.fromkeys(values, source)})


def with_own_input_size(config: Config) -> Config:
    """--input-size from the model, if neither the user nor the checkpoint sets it."""
    name = config.args.model
    cfg = get_pretrained_cfg(name) if models_kan.register(name) else None
    if cfg is None or "input_size" in config.sources:
        return config
    return _with(config, input_size=one_or_two(cfg.input_size[-2:]), source="model")


def preparation(name: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The flags `PREPARATION` for a timm model with this pretrained configuration: how its images are prepared. This project's
    models and DeiT's use the flags' defaults, as DeiT's code does."""
    name = name.split(".")[0]
    if models_kan.split_name(name)[0] or is_model_in_modules(name, ["deit"]):
        return {dest: get_args_parser().get_default(dest) for dest in sorted(PREPARATION)}
    own = resolve_data_config(pretrained_cfg=dict(cfg))
    return to_builtin_types({"eval_crop_ratio": own["crop_pct"],
                             **{key: own[key] for key in ("crop_mode", "interpolation", "mean", "std")}})


def with_own_preparation(config: Config, stored: Mapping[str, Any]) -> Config:
    """The flags `PREPARATION` from the model's pretrained configuration, if neither the user nor the checkpoint sets them.

    stored: the checkpoint's flags. One that has some of these was trained with the defaults of the others."""
    name = config.args.model
    cfg = get_pretrained_cfg(name) if models_kan.register(name) else None
    if cfg is None or any(stored.get(dest) for dest in PREPARATION):
        return config
    own = {dest: value for dest, value in preparation(name, cfg.to_dict()).items()
           if dest not in config.sources and value != getattr(config.args, dest)}
    return _with(config, "model", **own)


def suggest_model(name: str) -> str:
    """' (did you mean X?)' for the name of an unknown model, or ''."""
    architecture, dot, tag = name.partition(".")
    close = nearest(architecture, [*timm.list_models(), *models_kan.registered_models()])
    if close == architecture:       # then the tag is unknown
        return f" (its tags: {', '.join(tags[:5])})" if (tags := timm.list_pretrained(f"{close}.*")) else " (it has no tags)"
    return f" (did you mean {close}{dot}{tag}?)" if close else ""
