"""Building the model of a run, its kernels, its teacher."""
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import PatchEmbed, to_2tuple
from torch import nn

import models_kan
from models_kan import KAN_OPTIONS, ModelSpec
from vision_kan import kernels
from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.checkpoints.shipped import shipped
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.text import one_or_two, printable, say, shown_size, to_builtin_types
from vision_kan.config.checks import validate
from vision_kan.config.flags import flag_name, get_args_parser
from vision_kan.config.resolve import Config, parse_args
from vision_kan.data.images import ImageSet
from vision_kan.data.loaders import Loaders
from vision_kan.layers.function_layer import function_layers
from vision_kan.layers.replacement import other_mlps
from vision_kan.models import conversion, vetting
from vision_kan.models.cost import count_flops, count_parameters
from vision_kan.models.infer import load_exactly, patch_grid
from vision_kan.models.weight_init import init_mimetic
from vision_kan.run.folder import versions
from vision_kan.run.starting import Start, effective_config, suggest_model
from vision_kan.training.criterion import Teacher, balanced
from vision_kan.training.speed import compile_model

COEFFICIENT_FLAGS = ("kan_lr_mult", "kan_weight_decay")     # without effect on models without `scaled_parameters`


def model_spec(config: Config, start: Start, num_classes: int) -> ModelSpec:
    """The architecture: the checkpoint's to resume or evaluate it, else that of the flags. Raises UserError if the number of
    classes differs from the checkpoint's."""
    args = config.args
    if start.spec:
        stored = start.spec.kwargs.get("num_classes", num_classes)
        if stored != num_classes:
            raise UserError(f"the checkpoint has {stored} classes, the data {num_classes}: check --data-path and "
                            "--data-set, or start from its weights with --finetune")
        return ModelSpec(start.spec.name, {"num_classes": num_classes, **start.spec.kwargs})
    kwargs = {**_source_kwargs(args.model, start), "num_classes": num_classes, "img_size": args.input_size}
    for key in KAN_OPTIONS:
        if getattr(args, key) is not None:
            kwargs[key] = getattr(args, key)
    return ModelSpec(args.model, kwargs)


def _source_kwargs(name: str, start: Start) -> dict[str, Any]:
    """What the checkpoint of --finetune says of its architecture, for a model of the same size; without a feed-forward's options
    for another feed-forward."""
    source = start.checkpoint.spec if start.purpose == "finetune" else None
    if source is None:
        return {}
    theirs, ours = source.name.split(".")[0], name.split(".")[0]
    if models_kan.with_feed_forward(theirs, "ViT") != models_kan.with_feed_forward(ours, "ViT"):
        return {}
    own = models_kan.options_of(ours) if theirs == ours else ()
    return {key: value for key, value in source.kwargs.items() if key in own or key not in KAN_OPTIONS}


def model_of_run(config: Config, start: Start, num_classes: int, device: torch.device,
                 images: Callable[[], torch.Tensor]) -> tuple[nn.Module, ModelSpec]:
    """The run's model on its device, with --finetune's weights, --kan-backend and --compile applied, and its spec.

    images: returns a batch to calibrate on. Raises UserError for flags that do not fit the model."""
    model, spec = build_model(model_spec(config, start, num_classes), config)
    if models_kan.architecture_of(spec.name) and (others := other_mlps(model)):
        say(f"left as they are in {spec.name}: {', '.join(others)}")
    choose_backend(config, spec, model, device)
    if config.args.weight_init == "mimetic" and start.purpose in (None, "finetune") and not init_mimetic(model):
        raise UserError(f"--weight-init mimetic has no effect on --model {spec.name}, which has no attention "
                        "with queries, keys and values in one map: leave it out")
    if table := load_start(model, spec, start, images, whole=config.args.eval):
        say(f"weights from {start.checkpoint.path}:\n{table}")
    if config.args.compile:
        compile_model(model, device, mode=config.args.compile)
    return model.to(device), spec


def build_model(spec: ModelSpec, config: Config) -> tuple[nn.Module, ModelSpec]:
    """The model with the flags' dropout and stochastic depth, and the spec without arguments that it does not take.

    Any timm classification model can be built. Raises UserError for a given flag that has no effect on the model."""
    args = config.args
    if not models_kan.register(spec.name):
        raise UserError(f"--model {spec.name} is unknown{suggest_model(spec.name)}: --list-models prints this project's models, "
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
            if key in ("pos_drop_rate", "proj_drop_rate"):      # not a transformer: its only rate is the head's
                kwargs["drop_rate"] = args.drop
            elif key != "img_size" and asked_for(flags.get(key, ""), config):
                raise _no_effect(flags[key], spec.name) from error
            del kwargs[key]
        except (ValueError, AssertionError) as error:
            raise UserError(f"--model {spec.name} cannot be built ({one_line(error)}): check --model, "
                            f"--input-size {shown_size(args.input_size)} and the KAN options") from error
    if args.cosub and not args.eval and "drop_path_rate" not in kwargs and not args.drop:
        raise _no_effect("cosub", spec.name)
    if not args.eval and not any(layer.scaled_parameters() for layer in function_layers(model).values()):
        for key in COEFFICIENT_FLAGS:
            if asked_for(key, config):
                raise _no_effect(key, spec.name, like="kan_groups")
    if args.log_kan and not args.eval and not function_layers(model):
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
    """Pass an empty image through the model: some of timm's can be built for oblong images but take square ones only."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *size))
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--model {name} takes no images of --input-size {shown_size(size)} ({one_line(error)}): give one "
                        "number, the side of a square, or choose another model") from error
    model.train()


def _options_with_effect(spec: ModelSpec, config: Config) -> dict[str, Any]:
    """The spec's arguments without options that its model lacks. Raises UserError if such an option was given."""
    without = set(KAN_OPTIONS) - set(models_kan.options_of(spec.name))
    for key in KAN_OPTIONS:
        if key in without and key in config.given and getattr(config.args, key) is not None:
            raise _no_effect(key, spec.name)
    return {key: value for key, value in spec.kwargs.items() if key not in without}


def asked_for(dest: str, config: Config) -> bool:
    """Whether the user set a flag: on the command line, or in a recipe to another value than the default (every run's args.yaml
    contains the defaults, too)."""
    where = config.given.get(dest)
    return where == "command line" or where is not None and getattr(config.args, dest) != get_args_parser().get_default(dest)


def _no_effect(dest: str, name: str, like: str | None = None) -> UserError:
    """The error for a flag without effect. like: an option of the models on which the flag has an effect."""
    others = models_kan.models_with(like or dest, name)
    return UserError(f"{flag_name(dest)} has no effect on --model {name}: leave it out"
                     + (f", or choose {' or '.join(others)}" if others else ""))


def load_start(model: nn.Module, spec: ModelSpec, start: Start, images: Callable[[], torch.Tensor], whole: bool = False
               ) -> str | None:
    """Load --finetune's weights into the model and free the checkpoint. Returns the table of what became of each tensor, or None
    without --finetune. images: returns a batch to calibrate on.

    whole: raise UserError if the checkpoint lacks weights of the model."""
    if start.purpose != "finetune":
        return None
    with vetting.as_user_error(f"checkpoint {start.checkpoint.path}"):
        report, errors = conversion.load_converted(model, spec, start.checkpoint.weights(), images,
                                                   patch_grid(start.checkpoint))
    random = [key for key in report.initial if not key.endswith(".num_batches_tracked")]      # which an evaluation does not use
    if whole and random:
        raise UserError(f"--eval --finetune: checkpoint {start.checkpoint.path} has no {random[0]} of the model's shape, so "
                        f"{len(random)} tensors would be evaluated as initialised: train first, or give the --model it holds")
    start.checkpoint.free()
    return report.table() + (f"\n{conversion.table(errors)}" if errors else "")


def build_teacher(args: Namespace, class_names: Sequence[str], device: torch.device) -> nn.Module | None:
    """--teacher-model with the weights of --teacher-path, frozen, in evaluation mode. It takes the student's images and converts
    them to its own size and normalisation: its checkpoint's, else those of its timm configuration. Raises UserError if it does
    not fit, or knows other classes than the data."""
    if args.distillation_type == "none":
        return None
    checkpoint = Checkpoint.open(args.teacher_path)
    if not models_kan.register(args.teacher_model):
        raise UserError(f"--teacher-model {args.teacher_model} is not a timm model{suggest_model(args.teacher_model)}: check the "
                        "name")
    stored = vetting.spec_from_model_args(checkpoint)
    kwargs = stored.kwargs if stored and stored.name == args.teacher_model else {}
    spec, what = ModelSpec(args.teacher_model, {**kwargs, "num_classes": len(class_names)}), f"--teacher-path {args.teacher_path}"
    vetting.check_weights(spec, checkpoint, what=what)
    known = checkpoint.state.get("class_names") or class_names
    if known != class_names and not all(map(str.isdigit, known)) and not all(map(str.isdigit, class_names)):
        raise UserError(f"{what}: its classes, or their order, are not those of the data, so it would teach wrong ones: give a "
                        "teacher that was trained on the same classes")
    teacher = timm.create_model(spec.name, **spec.kwargs)
    load_exactly(teacher, checkpoint.weights(), what)
    own = effective_config(parse_args(["--eval", "--model", spec.name]), Start("eval", checkpoint, spec)).args
    validate(own)
    if (own.input_size, own.mean, own.std) != (args.input_size, args.mean, args.std):
        say(f"the teacher {spec.name} sees the images at {shown_size(own.input_size, ' x ')} px, mean "
            f"{' '.join(map(str, own.mean))}, std {' '.join(map(str, own.std))}")
        teacher = Teacher(teacher, to_2tuple(own.input_size), own.mean, own.std, args.mean, args.std)
    return teacher.to(device).eval().requires_grad_(False)


def class_weights(args: Namespace, loaders: Loaders, device: torch.device) -> torch.Tensor | None:
    """--class-weights: float32 [K] by the number of training images of each class, the same on all processes, or None."""
    if args.class_weights == "none":
        return None
    data: ImageSet = loaders.train.dataset
    if data.is_stream:
        raise UserError(f"--class-weights {args.class_weights} counts the images of each class, which the stream --data-set "
                        f"{args.data_set} does not declare: leave it out")
    counts = np.bincount(data.targets, minlength=loaders.nb_classes)
    weights = balanced(counts)
    few, many = counts.argmin(), counts.argmax()
    shown = [f"{weights[number]:.3g} for {printable(loaders.class_names[number], 40)} ({counts[number]} images)"
             for number in (few, many)]
    say(f"class weights: all 1, each class has {counts[few]} images" if counts[few] == counts[many] else
        f"class weights: {', '.join(shown)}" + (", others between" if len(counts) > 2 else ""))
    return torch.from_numpy(weights).to(device)


def choose_backend(config: Config, spec: ModelSpec, model: nn.Module, device: torch.device) -> None:
    """Choose --kan-backend for the model's KAN layers and print what runs. Raises UserError if it cannot run here."""
    name = config.args.kan_backend
    grids: list[Any] = [layer.for_kernels for layer in function_layers(model).values() if layer.for_kernels is not None]
    if not grids:
        if asked_for("kan_backend", config):
            raise _no_effect("kan_backend", spec.name)
        return
    try:
        kernels.use(name)
    except ValueError as error:
        raise UserError(f"--kan-backend {name}: {error}") from error
    say(f"KAN layers ({name}): {kernels.describe(device.type, list(filter(None, grids)))}")


def description(config: Config, spec: ModelSpec, loaders: Loaders) -> dict[str, Any]:
    """The entries of a checkpoint besides the state: flags, architecture, classes, versions; in built-in types."""
    return {"args": to_builtin_types({**vars(config.args), "nb_classes": loaders.nb_classes}),
            "model_args": to_builtin_types({"name": spec.name, "kwargs": spec.kwargs}),
            "class_names": loaders.class_names, "versions": versions()}


def model_table() -> str:
    """--list-models: names, parameters and FLOPs of this project's models at their default sizes; and the names with trained
    weights."""
    lines = [f"{'model':42}{'parameters':>14}{'matmul GFLOPs':>16}{'elementwise GFLOPs':>20}"]
    for name in models_kan.registered_models():
        model = timm.create_model(name, device="meta", weight_init="skip")      # a quarter of the time
        flops = count_flops(model)
        lines.append(f"{name:42}{count_parameters(model):>14,}{flops.matmul / 1e9:>16.3f}"
                     f"{flops.elementwise / 1e9:>20.4f}")
    if names := ", ".join(shipped()):
        lines.append(f"with trained weights, for --resume, --finetune and every tool: {names}")
    return "\n".join(lines)
