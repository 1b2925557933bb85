"""Refuses values of flags: first by each flag's own rule (its row in `flags`), then by rules for several flags."""
import os
from argparse import Namespace
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlparse

from vision_kan.common.errors import UserError
from vision_kan.common.text import height_and_width, shown_size
from vision_kan.config.flags import FLAGS, flag_name
from vision_kan.config.parser import did_you_mean, show_value


def impossible_path(path: str) -> str:
    """Why this cannot be the name of a file or URL, or ''."""
    try:
        urlparse(path)
        encoded = os.fsencode(Path(path).expanduser())
    except ValueError as error:
        return str(error)
    except RuntimeError:
        return "there is no such user"
    if "://" not in path and (len(encoded) > 4095 or any(len(part) > 255 for part in encoded.split(b"/"))):
        return "it is too long"
    return ""


def validate(args: Namespace, world_size: int = 1, complete: bool = True) -> None:
    """Raise `UserError`, one sentence that names the flag, for a value that no run could use.

    world_size: the number of processes that were started. complete: False if a checkpoint may still fill in flags that were not
    given; then they are not checked together. With `args.eval`, values that only training reads are not.
    """
    check_flags(args, world_size, complete)
    _check_optimizer(args)


def check_flags(args: Namespace, world_size: int = 1, complete: bool = True) -> None:
    """`validate` without the checks that need timm, which takes seconds to import."""
    for dest, value in vars(args).items():
        if dest in FLAGS and (objection := FLAGS[dest].objection(value)):
            _refuse(args, dest, objection)
    if args.sched == "plateau" and args.sched_on_updates:
        raise UserError("--sched-on-updates does not work with --sched plateau, which follows each epoch's accuracy: "
                        "leave one of them out")
    if args.track and args.eval:
        raise UserError("--track sends the epochs of a training, and --eval has none: leave one of them out")
    _check_launch(args, world_size)
    if not complete:
        return
    if not args.eval:
        _check_training(args)
    elif args.profile:
        raise UserError("--profile traces training steps, and --eval has none: leave one of them out")
    elif args.log_kan:
        raise UserError("--log-kan needs training, and --eval does not train: leave one of them out")


def _check_optimizer(args: Namespace) -> None:
    from timm.optim import list_optimizers  # the one import of torch in this package: see `check_flags`
    name, known = args.opt.lower().removeprefix("lookahead_"), list(map(str, list_optimizers()))
    if name not in known:
        _refuse(args, "opt", f"is not one of timm's optimizers{did_you_mean(name, known)}")


def _check_training(args: Namespace) -> None:
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixing and args.batch_size % 2:
        _refuse(args, "batch_size", "must be even because mixup pairs the images "
                                    "(or switch it off: --mixup 0 --cutmix 0)")
    sides, shown = height_and_width(args.input_size), shown_size(args.input_size)
    if args.cutmix_minmax is not None:
        if any(len({int(side * share) for share in args.cutmix_minmax}) == 1 for side in sides):
            _refuse(args, "cutmix_minmax", f"leave no box to choose from at --input-size {shown}")
    geometric = not args.ThreeAugment and args.aa not in ("", "none", "3a")
    if geometric and args.train_interpolation in ("box", "hamming", "lanczos"):
        _refuse(args, "train_interpolation", f"can only resize, and the rotations of --aa {args.aa} need nearest, "
                                             "bilinear or bicubic: choose one of them, or --aa none")
    if geometric and args.augment_on == "device" and args.aa.startswith("augmix"):
        _refuse(args, "augment_on", f"does not know --aa {args.aa}, which PIL alone computes: take --augment-on loader, or "
                                    "a policy such as rand-m9-mstd0.5-inc1")
    if args.crop_padding > min(sides):
        _refuse(args, "crop_padding", f"must be at most --input-size {shown}")
    if args.sched == "plateau" and args.decay_rate >= 1:
        _refuse(args, "decay_rate", "must be less than 1 with --sched plateau, which multiplies the rate by it")
    if args.sched in ("step", "multistep") and args.decay_rate > 1:
        _refuse(args, "decay_rate", f"must be at most 1 with --sched {args.sched}, which multiplies the rate by it")
    if not args.resume:     # earlier versions took these, and a checkpoint's flags cannot be changed
        _check_effect(args)
    if args.resplit and not args.repeated_aug:
        raise UserError("--resplit leaves the first repeat of each image unerased and needs --repeated-aug, which is off: "
                        "leave out --resplit or --no-repeated-aug")
    for given, flag, why in ((args.profile, "--profile", "writes its trace into"),
                             (args.log_kan, "--log-kan", "writes to TensorBoard in"),
                             (args.debug_nan, "--debug-nan", "saves the batch in"),
                             (args.track, "--track", "saves the tracker's id of the run in")):
        if given and not args.output_dir:
            raise UserError(f"{flag} {why} --output_dir: give that folder")
    if args.distillation_type != "none":
        if not args.teacher_path:
            raise UserError(f"--distillation-type {args.distillation_type} needs the teacher's weights: "
                            "give --teacher-path FILE")
        if args.cosub:
            raise UserError("--cosub cannot be combined with --distillation-type: leave one of them out")


def _check_effect(args: Namespace) -> None:
    if args.sched == "multistep" and (args.decay_epochs < 1 or args.decay_epochs % 1):
        _refuse(args, "decay_epochs", "must be a whole number with --sched multistep, which decays after whole epochs")
    if args.lr_noise and len(args.lr_noise) == 2 and args.lr_noise[0] >= args.lr_noise[1]:
        _refuse(args, "lr_noise", "must begin before it ends")
    if args.cosub and not ((args.drop_path or args.drop) and args.train_mode):
        raise UserError("--cosub trains two submodels that --drop-path or --drop makes different, and here they are equal: give "
                        "--drop-path, and not --no-train-mode, or leave out --cosub")


def _check_launch(args: Namespace, world_size: int) -> None:
    expected = args.world_size if args.world_size > 1 else 2
    launch = f"torchrun --nproc_per_node={expected} main.py ..."
    if args.world_size not in (1, world_size):              # 1, the default, means any number
        raise UserError(f"--world_size {args.world_size} does not match the {world_size} process(es) that "
                        f"were started: start them with '{launch}', or leave the flag out")
    if args.distributed and world_size == 1:
        raise UserError(f"--distributed needs several processes, but this is a single one: start them with "
                        f"'{launch}', or leave the flag out")


def _refuse(args: Namespace, dest: str, why: str) -> NoReturn:
    raise UserError(f"{flag_name(dest)} {show_value(getattr(args, dest))} {why}")
