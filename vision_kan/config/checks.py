"""Values of flags that are refused."""
import math
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from timm.layers import to_2tuple
from timm.optim import list_optimizers

from vision_kan.common.errors import UserError
from vision_kan.common.text import shown_size
from vision_kan.config.flags import flag_name
from vision_kan.config.parser import did_you_mean, show_value

PATHS = {"data_path", "output_dir", "finetune", "resume", "teacher_path"}


def impossible_path(path: str) -> str:
    """Why no file or URL can have this name, or ''."""
    try:
        urlparse(path)
        whole = os.fsencode(Path(path).expanduser())
    except ValueError as error:
        return str(error)
    except RuntimeError:
        return "there is no such user"
    if len(whole) > 4095 or any(len(part) > 255 for part in whole.split(b"/")):
        return "it is too long"
    return ""


# ---------------------------------------------------------------- values
def _at_least(low):
    return lambda v: v >= low, f"at least {low}"


def _between(low, high):
    return lambda v: low <= v <= high, f"from {low} to {high}"


LARGEST = 10 ** 9           # of any number but the seed: beyond it nothing means anything, and arithmetic overflows
_MOST_EPOCHS = 10 ** 6
_POSITIVE = (lambda v: v > 0, "greater than 0")
_SHARE = (lambda v: 0 < v <= 1, "greater than 0 and at most 1")
_BELOW_1 = (lambda v: 0 <= v < 1, "at least 0 and less than 1")
# dest -> (test of one number, what the number must be); None, where it is the default, needs no test
_RANGES = {
    **dict.fromkeys(("batch_size", "grad_accum", "hdim_kan", "print_freq", "world_size"), _at_least(1)),
    **dict.fromkeys(("start_epoch", "patience", "warmup_epochs", "cooldown_epochs", "patience_epochs", "log_kan"),
                    _between(0, _MOST_EPOCHS)),
    **dict.fromkeys(("weight_decay", "kan_groups", "kan_lr_mult", "kan_weight_decay", "warmup_lr", "min_lr",
                     "color_jitter", "crop_padding", "mixup", "cutmix", "save_interval_steps", "save_interval_minutes"),
                    _at_least(0)),
    **dict.fromkeys(("lr", "opt_eps", "clip_grad", "decay_epochs", "decay_rate", "lr_noise_std", "kan_h",
                     "distillation_tau", "dist_timeout"), _POSITIVE),
    **dict.fromkeys(("drop", "drop_path", "smoothing", "model_ema_decay", "momentum", "opt_betas"), _BELOW_1),
    **dict.fromkeys(("reprob", "hflip", "mixup_prob", "mixup_switch_prob", "distillation_alpha", "cutmix_minmax",
                     "lr_noise", "max_unreadable"), _between(0, 1)),
    # these limits keep one image, one loader or timm's search for a noise below lr_noise_pct from taking all memory or forever
    "lr_noise_pct": _between(0.01, 1), "keep": _between(1, 1000),
    "epochs": _between(1, _MOST_EPOCHS), "input_size": _between(1, 16384), "recount": _between(1, 1000),
    "num_workers": _between(0, 1024), "layer_decay": _SHARE, "mean": _between(0, 1), "std": _between(0.001, 1),
    "eval_crop_ratio": _between(0.1, 1.15),     # above 1 a border is added: timm's volo_d4_448
    "val_split": _SHARE, "num_classes": _between(1, 10 ** 6),
    "kan_grid_points": _between(2, 1024), "seed": _between(0, 2 ** 63 - 1),
}
_NAMES = {
    "sched": ["cosine", "tanh", "step", "multistep", "plateau", "poly"],
    "remode": ["const", "rand", "pixel"],
    "mixup_mode": ["batch", "pair", "elem"],
    "train_interpolation": ["random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"],
}
# timm skips a section of the policy that it doesn't know when it has no digit ("rand-strong"), so all are
# spelled out here
_COUNT, _NUMBER = "[1-9][0-9]?", r"[0-9]{1,3}(\.[0-9]{1,9})?"
_POSITIVE_NUMBER = rf"(?!0+(\.0+)?(-|$)){_NUMBER}"
_AA = re.compile(rf"rand(-(m[0-9]{{1,2}}|n{_COUNT}|p{_NUMBER}|mstd{_NUMBER}|mmax{_COUNT}|inc[01]|tweights|t3aw?)){{0,20}}"
                 rf"|augmix(-(m[0-9]{{1,2}}|w{_COUNT}|d{_COUNT}|a{_POSITIVE_NUMBER}|b[01]|mstd{_NUMBER})){{0,20}}"
                 rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?|none|")


def validate(args: Namespace, world_size: int = 1) -> None:
    """Raise `UserError`, one sentence that names the flag, for a value that no run could use.

    world_size is the number of processes that were really started. What only training reads may still be odd
    when `args.eval` is set.
    """
    for dest, value in vars(args).items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                _refuse(args, dest, "must be a finite number")
            if isinstance(number, (int, float)) and dest != "seed" and abs(number) > LARGEST:
                _refuse(args, dest, f"must be no larger than {LARGEST:,}".replace(",", " "))
            if dest in _RANGES and number is not None and not _RANGES[dest][0](number):
                _refuse(args, dest, f"must be {_RANGES[dest][1]}")
    known_names: dict[str, Any] = {**_NAMES, "opt": list_optimizers()}
    for dest, names in known_names.items():
        name = getattr(args, dest)
        if dest == "opt":
            name = name.lower().removeprefix("lookahead_")
        if name not in names:
            known = "timm's optimizers" if dest == "opt" else ", ".join(names)
            _refuse(args, dest, f"is not one of {known}{did_you_mean(name, names)}")
    if not _AA.fullmatch(args.aa):
        _refuse(args, "aa", "is no policy: write one like rand-m9-mstd0.5-inc1, augmix-m3, original, "
                            "v0, 3a or none")
    try:
        torch.device("cpu" if args.device == "auto" else args.device)
    except RuntimeError:
        _refuse(args, "device", "is no device: use auto, cpu, cuda, cuda:N or mps")
    if not re.match(r"(env|tcp|file)://", args.dist_url):
        _refuse(args, "dist_url", "must begin with env://, tcp:// or file://")
    if args.kan_grid_range is not None and not args.kan_grid_range[0] < args.kan_grid_range[1]:
        _refuse(args, "kan_grid_range", "must go upwards: MIN below MAX")
    if args.cutmix_minmax is not None and (len(args.cutmix_minmax) != 2
                                           or args.cutmix_minmax[0] >= args.cutmix_minmax[1]):
        _refuse(args, "cutmix_minmax", "must be two shares, the smaller one first")
    if args.sched == "plateau" and args.sched_on_updates:
        raise UserError("--sched-on-updates: --sched plateau reacts to each epoch's accuracy, leave one of them out")
    if args.lr_noise is not None and len(args.lr_noise) > 2:
        _refuse(args, "lr_noise", "must be one or two shares of the epochs")
    if args.track and args.eval:
        raise UserError("--track sends the epochs of a training, and --eval has none: leave one of them out")
    _validate_launch(args, world_size)
    if not args.eval:
        _validate_training(args)
    elif args.profile:
        raise UserError("--profile traces training steps, and --eval has none: leave one of them out")
    elif args.log_kan:
        raise UserError("--log-kan looks at a training, and --eval is none: leave one of them out")


def _validate_training(args: Namespace) -> None:
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixing and args.batch_size % 2:
        _refuse(args, "batch_size", "must be even because mixup pairs the images "
                                    "(or switch it off: --mixup 0 --cutmix 0)")
    if args.cutmix_minmax is not None:
        if any(len({int(side * share) for share in args.cutmix_minmax}) == 1 for side in to_2tuple(args.input_size)):
            _refuse(args, "cutmix_minmax", f"leave no box to choose from at --input-size {shown_size(args.input_size)}")
    geometric = not args.ThreeAugment and args.aa not in ("", "none", "3a")
    if geometric and args.train_interpolation in ("box", "hamming", "lanczos"):
        _refuse(args, "train_interpolation", f"is for resizing only, and the rotations of --aa {args.aa} need nearest, "
                                             "bilinear or bicubic: choose one of them, or --aa none")
    if args.crop_padding > min(to_2tuple(args.input_size)):
        _refuse(args, "crop_padding", f"must be at most --input-size {shown_size(args.input_size)}")
    if args.sched == "plateau" and args.decay_rate >= 1:
        _refuse(args, "decay_rate", "must be less than 1 with --sched plateau, which lowers the rate by it")
    if args.sched in ("step", "multistep") and args.decay_rate > 1:
        _refuse(args, "decay_rate", f"must be at most 1 with --sched {args.sched}, which lowers the rate by it")
    if args.resplit and not args.repeated_aug:
        raise UserError("--resplit spares the first repeat of each image and needs --repeated-aug")
    if args.profile and not args.output_dir:
        raise UserError("--profile writes its trace into --output_dir: give that folder")
    if args.log_kan and not args.output_dir:
        raise UserError("--log-kan writes to TensorBoard in --output_dir: give that folder")
    if args.debug_nan and not args.output_dir:
        raise UserError("--debug-nan keeps the batch in --output_dir: give that folder")
    if args.track and not args.output_dir:
        raise UserError("--track keeps in --output_dir what the run is known by: give that folder")
    if args.distillation_type != "none":
        if not args.teacher_path:
            raise UserError(f"--distillation-type {args.distillation_type} needs the teacher's weights: "
                            "give --teacher-path FILE")
        if args.cosub:
            raise UserError("--cosub cannot be combined with --distillation-type: leave one of them out")


def _validate_launch(args: Namespace, world_size: int) -> None:
    expected = args.world_size if args.world_size > 1 else 2
    launch = f"torchrun --nproc_per_node={expected} main.py ..."
    if args.world_size not in (1, world_size):              # 1 is the default and says nothing
        raise UserError(f"--world_size {args.world_size} does not match the {world_size} process(es) that "
                        f"were started: start them with '{launch}', or leave the flag out")
    if args.distributed and world_size == 1:
        raise UserError(f"--distributed needs several processes, but this is a single one: start them with "
                        f"'{launch}', or leave the flag out")


def _refuse(args: Namespace, dest: str, why: str):
    raise UserError(f"{flag_name(dest)} {show_value(getattr(args, dest))} {why}")


# ---------------------------------------------------------------- recipes
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
