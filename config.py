"""DeiT's flags and ours, recipes (`--config file.yaml`), value checks, and how a checkpoint fills in
what was not given. Order of precedence: default < model's own < checkpoint < recipe < command line."""
import argparse
import difflib
import math
import os
import re
import reprlib
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import yaml
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.optim import list_optimizers

from kernels import BACKENDS, BASES
from speed import COMPILE_MODES
from tracking import TRACKERS
from utils import UserError, one_or_two, shown_size

# Where a default differs from DeiT's: dest -> (DeiT's, ours, why).
CHANGED_DEFAULTS = {
    "model": ("deit_base_patch16_224", "deit_tiny_patch16_224_GKAN",
              "the model that this project is about; its _ViT twin is the baseline"),
    "data_path": ("a path on its authors' cluster", "", "there is no folder to guess"),
    "device": ("cuda", "auto", "CUDA where there is a GPU, else MPS, else the CPU"),
}
# Values that a flag of DeiT's accepts here in addition.
ADDED_CHOICES = {"data_set": ["CIFAR10", "TinyIMNET", "FOLDER", "DIGITS", "torch/NAME", "hfds/NAME", "hfids/NAME", "wds/NAME"]}


class DataSets(list):
    """The values of --data-set. One that ends in /NAME stands for all names of `timm.data.create_dataset` that begin so."""

    def __contains__(self, name: object) -> bool:
        kind, _, rest = str(name).partition("/")
        return super().__contains__(f"{kind}/NAME" if rest else name)


# What each flag says something about, which decides what a checkpoint may fill in (see `resolve`):
#   model  what the network is            data   which images, which classes, at which size
#   train  how it is trained              place  where and how this one run happens: never from a checkpoint
_SCOPES = {
    "model": "model hdim_kan kan_groups kan_base kan_input_phi kan_trainable_base kan_grid_range kan_grid_points kan_h "
             "kan_trainable_grid kan_trainable_h kan_basis kan_base_branch kan_second_norm",
    "data": "data_set inat_category data_split val_split input_key target_key num_classes input_size eval_crop_ratio "
            "exif_orientation crop_mode interpolation mean std",
    "train": "batch_size epochs grad_accum bce_loss class_weights unscale_lr drop drop_path grad_checkpointing amp_dtype "
             "patience model_ema model_ema_decay model_ema_warmup model_ema_force_cpu opt opt_eps opt_betas clip_grad momentum "
             "weight_decay layer_decay kan_lr_mult kan_weight_decay sched lr lr_noise lr_noise_pct lr_noise_std warmup_lr min_lr "
             "decay_epochs warmup_epochs sched_on_updates cooldown_epochs patience_epochs decay_rate color_jitter aa "
             "hflip crop_padding "
             "smoothing train_interpolation data_on_device repeated_aug train_mode ThreeAugment src reprob remode recount "
             "resplit mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode teacher_model "
             "distillation_type distillation_alpha distillation_tau cosub attn_only seed",
    "place": "track track_project "
             "config list_models data_path download output_dir device finetune resume start_epoch eval compile profile "
             "kan_backend cuda_graph "
             "dist_eval num_workers pin_mem distributed world_size dist_url dist_timeout print_freq log_kan teacher_path "
             "save_interval_steps save_interval_minutes keep debug_nan deterministic strict_data max_unreadable",
}
SCOPE = {dest: scope for scope, dests in _SCOPES.items() for dest in dests.split()}
# How a resumed run may differ from the one that wrote the checkpoint: length, batch, memory and arithmetic.
# The first four change the run on purpose; the others are what a different machine or a NaN asks for.
MAY_CHANGE_ON_RESUME = {"epochs", "patience", "batch_size", "grad_accum",
                        "amp_dtype", "grad_checkpointing", "model_ema_force_cpu"}
# How an image is prepared for a model beside its size: of timm's pretrained configurations, too.
PREPARATION = {"eval_crop_ratio", "crop_mode", "interpolation", "mean", "std"}
# To evaluate on other images or with another crop is an ordinary wish; the input size is in the weights.
MAY_CHANGE_ON_EVAL = {"data_set", "inat_category", "data_split", "val_split", "input_key", "target_key", "exif_orientation",
                      *PREPARATION}
_TAKEN = {None: (), "finetune": ("model",), "eval": ("model", "data"), "resume": ("model", "data", "train")}

_ONE_SHOT = {"config", "list_models"}       # neither in a recipe nor in args.yaml
_ONE_OR_EACH = {"hdim_kan"}                 # in a recipe or a checkpoint (of a pruned model) also a list, one for each block


@dataclass(frozen=True)
class Config:
    """Effective flags and where they come from.

    args: every flag's value. given: dest -> "command line" | "recipe FILE" for what the user said.
    sources: the same plus "checkpoint" | "model" after `resolve`; a dest that is missing has its default.
    notes: sentences about checkpoint values that were overridden or could not be understood.
    """
    args: Namespace
    given: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------- parser
class SwitchOrMode(argparse.Action):
    """`--X [MODE]` and `--no-X`: the mode, the first of the choices without one, None where it is off. In a recipe also true or
    false, as a switch has them."""

    def __init__(self, option_strings, dest, choices, **kwargs):
        options = [*option_strings, *("--no-" + option.removeprefix("--") for option in option_strings)]
        super().__init__(options, dest, nargs="?", choices=choices, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        off = (option_string or "").startswith("--no-")
        if off and values is not None:
            parser.error(f"{option_string} takes no value: leave out {values}")
        setattr(namespace, self.dest, self.mode(values or not off))

    def mode(self, value: str | bool) -> str | None:
        """The mode that the value of a recipe means."""
        return value if isinstance(value, str) else next(iter(self.choices or ())) if value else None


class HeightAndWidth(argparse.Action):
    """`--X PIXELS [WIDTH]`: one number, the side of a square, or two; kept as `one_or_two` has them."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs="+", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, _typed(self, values))
        except ValueError as error:
            parser.error(f"{option_string} {error}")


class _HelpFormatter(argparse.HelpFormatter):
    """Shows defaults that say something (not None, "" or off; 0 does), as they are typed."""

    def _get_help_string(self, action):
        help_text = (action.help or "").replace(" (default: %(default)s)", "")
        if action.default is None or action.default is False or action.default in ("", argparse.SUPPRESS):
            return help_text
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{help_text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes dashes and underscores alike, knows no abbreviations, and raises
    `UserError` with one sentence (and the nearest flag) in place of a usage dump."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _HelpFormatter, **kwargs})
        # argparse knows -3 and -0.5 as numbers, but takes -1e3 for a flag
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def parse_known_args(self, args=None, namespace=None):
        spelled = {_plain(option): option for option in self._option_string_actions}
        respelled = []
        for token in sys.argv[1:] if args is None else args:
            name, equals, value = token.partition("=")
            if name.startswith("--") and name not in self._option_string_actions:
                name = spelled.get(_plain(name), name)
            respelled.append(name + equals + value)
        return super().parse_known_args(respelled, namespace)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        self._refuse_flags(unknown, self._option_string_actions)
        if unknown:
            hint = "there is no place for it" if self._get_positional_actions() else "every option here is a --flag"
            self.error(f"unexpected argument '{_on_one_line(unknown[0])}': {hint}")
        return parsed

    def parse_beside_main(self, args: list[str]) -> tuple[Namespace, list[str]]:
        """A tool's own arguments, and the words that are left for main.py's parser; a flag that neither knows is refused here,
        where the flags of both are known."""
        own, rest = self.parse_known_args(args)
        theirs = get_args_parser()._option_string_actions
        known = {_plain(option) for option in theirs}
        self._refuse_flags([word for word in rest if _plain(word.partition("=")[0]) not in known],
                           [*self._option_string_actions, *theirs])
        return own, rest

    def _refuse_flags(self, words: Iterable[str], known: Iterable[str]) -> None:
        for word in words:
            if word.startswith("-") and not self._negative_number_matcher.match(word):
                name = word.partition("=")[0]
                self.error(f"unknown flag {_on_one_line(name)}{_nearest(name, known)}")

    def error(self, message):
        message = re.sub(r"^argument ", "", _on_one_line(message, 500))
        choice = re.match(r"(--\S+): invalid choice: '(.*?)' \(choose from", message)
        if choice:
            flag, value = choice.groups()
            choices = list(self._option_string_actions[flag.split("/")[0]].choices or ())
            message = f"{flag}: '{value}' is not one of {', '.join(choices)}{_nearest(value, choices)}"
        raise UserError(message)


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _on_one_line(text: str, most: int = 200) -> str:
    """The text without line breaks and other characters that have no picture, and its middle left out if it is long."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 4:]}"


def _nearest(word: str, words: Iterable[str]) -> str:
    """': did you mean X?', or '' where nothing is near."""
    close = nearest(word, words)
    return f": did you mean {close}?" if close else ""


def nearest(word: str, words: Iterable[str]) -> str:
    """That of the words which `word` was probably meant to be, or ''. Dashes say nothing, and most short words have two letters
    in common."""
    folded = {_plain(w).strip("_").lower(): w for w in words}
    close = difflib.get_close_matches(_plain(word).strip("_").lower(), folded, n=1, cutoff=0.7)
    return folded[close[0]] if close else ""


def get_args_parser(add_help: bool = False) -> Parser:
    """DeiT's 71 flags with its defaults (except `CHANGED_DEFAULTS`), and ours.

    Without help by default, as DeiT's, so that it can be a parent of another parser.
    """
    parser = Parser("main.py", usage="%(prog)s [--config RECIPE] [--flag value ...]", add_help=add_help,
                    description="Train and evaluate vision transformers with KAN feed-forwards.")
    on_off = argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="RECIPE", help="YAML file of flags; the command line overrides it")
    add("--list-models", action="store_true", help="print this project's models and stop")
    add("--batch-size", default=64, type=int, metavar="N", help="images per process and step")
    add("--epochs", default=300, type=int, metavar="N", help="length of the training, exactly")
    add("--patience", default=0, type=int, metavar="N",
        help="end the training after N epochs in a row without a new best top-1, of the model or its moving average; 0: never")
    add("--grad-accum", default=1, type=int, metavar="N", help="steps whose gradients are summed before an update")
    add("--bce-loss", action=on_off, default=False, help="binary cross-entropy on every class")
    add("--class-weights", default="none", choices=["none", "balanced"],
        help="balanced: an image's loss counts inversely to the number of images that its class has")
    add("--unscale-lr", action=on_off, default=False,
        help="take --lr as it is instead of per 512 images of the global batch")

    add = parser.add_argument_group("model", "A KAN option that is not given is the model's own.").add_argument
    add("--model", default="deit_tiny_patch16_224_GKAN", type=str, metavar="NAME",
        help="one of --list-models, or any other classification model of timm's")
    add("--input-size", action=HeightAndWidth, default=224, type=int, metavar=("PIXELS", "WIDTH"),
        help="side of the square input image, or its height and width; if not given, the model's own")
    add("--drop", type=float, default=0.0, metavar="P",
        help="dropout after the position embedding, in projections and feed-forwards; 0: none")
    add("--drop-path", type=float, default=0.1, metavar="P", help="rate of stochastic depth in the last block; 0: none")
    add("--hdim_kan", type=int, metavar="WIDTH", help="hidden width of the KAN feed-forward")
    add("--kan-grid-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="first and last grid point")
    add("--kan-grid-points", type=int, metavar="N", help="basis functions per input")
    add("--kan-h", type=float, metavar="H", help="width of a basis function")
    add("--kan-basis", choices=["original", "covering"],
        help="the released models' grid, h and initialisation, or ones that cover the inputs and begin as an MLP (_KAN)")
    add("--kan-base-branch", action=on_off, help="add a linear map of silu(u) to each layer (_KAN)")
    add("--kan-second-norm", choices=["layer", "static", "none"],
        help="what normalises the hidden units: a LayerNorm, a learned scale and shift of each, nothing (_KAN)")
    add("--kan-groups", type=int, metavar="N", help="learned activations a layer; 0: one for each channel (_GKAN)")
    add("--kan-base", choices=list(BASES), help="activation that the learned one begins as (_GKAN)")
    add("--kan-input-phi", action=on_off, help="a learned activation before the first linear map too (_GKAN)")
    add("--kan-trainable-base", action=on_off, help="learn the scale of the base function (_GKAN)")
    add("--kan-trainable-grid", action=on_off, help="learn where the grid points are (_KAN)")
    add("--kan-trainable-h", action=on_off, help="learn the width of the basis functions (_KAN)")
    add("--kan-backend", default="auto", choices=list(BACKENDS),
        help="what computes the KAN layers: C++ on a CPU and Triton on a GPU (auto), plain PyTorch (reference), that through "
             "torch.compile (compile)")
    add("--grad-checkpointing", action=on_off, default=False,
        help="recompute activations in the backward pass: less memory, more time")
    add("--amp-dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="arithmetic of the forward pass; auto: what the device is good at")

    add = parser.add_argument_group("moving average of the weights").add_argument
    add("--model-ema", action=on_off, default=True, help="keep (and evaluate) a moving average")
    add("--model-ema-decay", type=float, default=0.99996, metavar="D", help="share kept at each step")
    add("--model-ema-warmup", action=on_off, default=False,
        help="keep less at first, 1 - n^(-2/3) at the n-th update, up to --model-ema-decay: for short runs")
    add("--model-ema-force-cpu", action=on_off, default=False, help="keep it in the CPU's memory")

    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", type=str, metavar="NAME", help="any of timm's optimizers")
    add("--opt-eps", default=1e-8, type=float, metavar="EPS", help="the optimizer's epsilon")
    add("--opt-betas", type=float, nargs="+", metavar="B", help="the optimizer's betas, if not its own")
    add("--clip-grad", type=float, metavar="NORM", help="largest gradient norm; no clipping if left out")
    add("--momentum", type=float, default=0.9, metavar="M", help="for optimizers that have one")
    add("--weight-decay", type=float, default=0.05, metavar="W", help="decay of matrices, not of biases")
    add("--kan-lr-mult", type=float, default=20.0, metavar="M",
        help="learning rate of the learned activations' coefficients relative to the others' (_GKAN)")
    add("--kan-weight-decay", type=float, default=0.0, metavar="W", help="decay of those coefficients; 0: none (_GKAN)")
    add("--layer-decay", type=float, metavar="D", help="learning rate of a block relative to the next one's")

    add = parser.add_argument_group("learning rate").add_argument
    add("--sched", default="cosine", type=str, metavar="NAME",
        help="cosine, tanh, step, multistep, plateau or poly")
    add("--sched-on-updates", action=on_off, default=False,
        help="follow the schedule at every update instead of every epoch: for runs of a few epochs")
    add("--lr", type=float, default=5e-4, help="learning rate per 512 images of the global batch (see --unscale-lr)")
    add("--lr-noise", type=float, nargs="+", metavar="F", help="noise on the rate from this share of the "
        "epochs on (a second value: up to that one)")
    add("--lr-noise-pct", type=float, default=0.67, metavar="SHARE", help="largest relative noise")
    add("--lr-noise-std", type=float, default=1.0, metavar="S", help="deviation of the noise")
    add("--warmup-lr", type=float, default=1e-6, metavar="LR", help="where the warm-up begins")
    add("--min-lr", type=float, default=1e-5, metavar="LR", help="where the schedule ends")
    add("--decay-epochs", type=float, default=30.0, metavar="N", help="epochs between decays (step)")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="epochs of linear warm-up")
    add("--cooldown-epochs", type=int, default=10, metavar="N", help="epochs of rest after a decay (plateau)")
    add("--patience-epochs", type=int, default=10, metavar="N", help="epochs without progress (plateau)")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="R", help="factor of a decay")

    add = parser.add_argument_group("augmentation").add_argument
    add("--color-jitter", type=float, default=0.3, metavar="J", help="strength; unused where --aa is a policy other than 3a")
    add("--crop-padding", type=int, default=4, metavar="PIXELS",
        help="around the image before its random crop, at inputs of 32 pixels and below and with --src")
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a mirrored image")
    add("--aa", type=str, default="rand-m9-mstd0.5-inc1", metavar="POLICY",
        help="AutoAugment policy: rand-..., augmix-..., original, v0, 3a or none")
    add("--smoothing", type=float, default=0.1, metavar="S", help="label smoothing")
    add("--train-interpolation", type=str, default="bicubic", metavar="KIND",
        help="random, nearest, bilinear, bicubic, box, hamming or lanczos")
    add("--repeated-aug", action=on_off, default=True, help="each drawn image three times in a batch")
    add("--train-mode", action=on_off, default=True,
        help="dropout and stochastic depth while training (off: as in evaluation)")
    add("--ThreeAugment", action=on_off, default=False, help="DeiT III's three augmentations")
    add("--src", action=on_off, default=False, help="simple random crop (DeiT III)")

    add = parser.add_argument_group("random erasing").add_argument
    add("--reprob", type=float, default=0.25, metavar="P", help="probability per image; 0: none")
    add("--remode", type=str, default="pixel", metavar="KIND", help="const, rand or pixel")
    add("--recount", type=int, default=1, metavar="N", help="rectangles per image")
    add("--resplit", action=on_off, default=False, help="spare the first repeat of each image")

    add = parser.add_argument_group("mixup and cutmix").add_argument
    add("--mixup", type=float, default=0.8, metavar="ALPHA", help="alpha of mixup's Beta distribution; 0: none")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA", help="the same for cutmix; 0: none")
    add("--cutmix-minmax", type=float, nargs="+", metavar="SHARE",
        help="smallest and largest side of the pasted box; turns cutmix on")
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability of applying mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P",
        help="probability of cutmix in place of mixup where both are on")
    add("--mixup-mode", type=str, default="batch", metavar="KIND", help="batch, pair or elem")

    add = parser.add_argument_group("distillation and co-training").add_argument
    add("--teacher-model", default="regnety_160", type=str, metavar="NAME", help="timm name of the teacher")
    add("--teacher-path", type=str, default="", metavar="FILE",
        help="its weights: a file, a folder, a URL or hf-hub:OWNER/NAME")
    add("--distillation-type", default="none", choices=["none", "soft", "hard"], type=str,
        help="learn from the teacher's probabilities or from its first choice")
    add("--distillation-alpha", default=0.5, type=float, metavar="A", help="weight of the teacher's loss")
    add("--distillation-tau", default=1.0, type=float, metavar="T", help="temperature (soft)")
    add("--cosub", action=on_off, default=False, help="co-training of two submodels")

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--finetune", default="", metavar="FILE",
        help="weights to start from: a file, a folder, a URL, hf-hub:OWNER/NAME or the name of a pretrained timm model")
    add("--attn-only", action=on_off, default=False, help="train the attention, head and positions alone")

    add = parser.add_argument_group("data").add_argument
    add("--data-path", default="", type=str, metavar="DIR", help="folder of the data set")
    choices = DataSets(["CIFAR", "IMNET", "INAT", "INAT19"] + ADDED_CHOICES["data_set"])
    add("--data-set", default="IMNET", type=str, choices=choices, metavar="NAME",
        help=f"{', '.join(choices)}. CIFAR is CIFAR-100; IMNET and FOLDER are train/ and val/ with a folder per class, FOLDER "
             "also class folders alone; the last four are names of timm.data.create_dataset. If not given: what --data-path "
             "looks like")
    add("--val-split", type=float, metavar="SHARE",
        help="share of each class that is held out where the data has no validation images of its own (FOLDER: 0.2)")
    add("--data-split", nargs=2, metavar=("TRAIN", "VAL"), help="names of the two parts of a data set of timm's; for one that "
        "does not tell its length with the number of images: 'train-{000..009}.tar|5000'")
    add("--input-key", metavar="NAME", help="column that holds the image in hfds/, hfids/ and wds/, if there are several")
    add("--target-key", metavar="NAME", help="column that holds the label in them, if there are several")
    add("--num-classes", type=int, metavar="N", help="classes of a data set of timm's that does not tell them (wds/)")
    add("--inat-category", default="name", type=str, help="which label of iNaturalist to learn",
        choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"])
    add("--download", action=on_off, default=False, help="fetch a data set that torchvision can fetch")
    add("--eval-crop-ratio", default=0.875, type=float, metavar="SHARE",
        help="side of the centre crop relative to the resized image")
    add("--crop-mode", default="center", choices=["center", "squash", "border"],
        help="how an evaluation image is resized before the crop: by its shorter side, both sides (squash), or its longer side "
             "with a border")
    add("--interpolation", default="bicubic", choices=["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"],
        help="filter of that resizing (see --train-interpolation for training images)")
    add("--mean", type=float, nargs=3, default=list(IMAGENET_DEFAULT_MEAN), metavar=("R", "G", "B"),
        help="mean of each channel (values 0 to 1), which is subtracted from an image. If not given, this flag, --std and the "
             "three before come from the timm configuration of the model or of --finetune, if there is one")
    add("--std", type=float, nargs=3, default=list(IMAGENET_DEFAULT_STD), metavar=("R", "G", "B"),
        help="deviation of each channel, by which it is then divided")
    add("--exif-orientation", action=on_off, help="turn photos upright as their EXIF orientation says; on by default with "
        "FOLDER only, unless its classes are ImageNet's")
    add("--strict-data", action=on_off, default=False, help="stop at the first image that cannot be read")
    add("--max-unreadable", default=0.01, type=float, metavar="SHARE",
        help="stop when more than this share of the images, and more than 3, cannot be read; 0: at the first")
    add("--data-on-device", default="auto", choices=["auto", "on", "off"],
        help="keep small images in the device's memory and augment them there; auto: on a GPU, where they fit and --aa is "
             "none or 3a")
    add("--num_workers", default=10, type=int, metavar="N",
        help="loader processes per training process; if not given, at most the cores that there are for each")
    add("--pin-mem", action=on_off, default=True, help="page-locked batches for faster copies to a GPU")

    add = parser.add_argument_group("output and state").add_argument
    add("--output_dir", default="", metavar="DIR", help="checkpoints and logs; nothing is saved without it")
    add("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto: CUDA where there is a GPU, else MPS, else the CPU")
    add("--seed", default=0, type=int, metavar="N", help="random seed for weights, order and augmentation")
    add("--resume", default="", metavar="FILE",
        help="checkpoint to go on from, or to evaluate: a file, a folder, a URL or hf-hub:OWNER/NAME; auto: the newest in "
             "--output_dir, if any")
    add("--save-interval-steps", default=0, type=int, metavar="N",
        help="also save every N steps within an epoch, so that a killed run loses no more; 0: off")
    add("--save-interval-minutes", default=10.0, type=float, metavar="MINUTES",
        help="also save when so much time has passed since the last checkpoint; 0: off")
    add("--keep", default=2, type=int, metavar="N", help="checkpoints to keep, besides the best ones")
    add("--track", nargs="+", choices=list(TRACKERS), metavar="TRACKER",
        help=f"also send each epoch's numbers and the flags to {' or '.join(TRACKERS)}, where installed")
    add("--track-project", default="vision-kan", metavar="NAME", help="project (wandb) or experiment (mlflow) to send them to")
    add("--start_epoch", default=0, type=int, metavar="N",
        help="number of the first epoch, counted from 0, where the checkpoint doesn't say")
    add("--eval", action=on_off, default=False, help="evaluate --resume or --finetune and stop")
    add("--deterministic", action=on_off, default=False,
        help="deterministic kernels on a GPU too (slower; a CPU is deterministic as it is)")
    add("--debug-nan", action=on_off, default=False,
        help="when the loss or a gradient is not finite: keep the batch in --output_dir, replay it, name the layer")
    add("--print-freq", default=10, type=int, metavar="N", help="batches between log lines")
    add("--log-kan", default=0, type=int, metavar="N",
        help="every N epochs the learned functions, what arrives at them and the dead ones to TensorBoard; 0: off")
    add("--compile", action=SwitchOrMode, choices=list(COMPILE_MODES), metavar="MODE",
        help=f"torch.compile the model: minutes at the start, then faster steps; MODE is torch's, {', '.join(COMPILE_MODES)}, "
             "the first where none is named")
    add("--cuda-graph", default="auto", choices=["auto", "on", "off"],
        help="replay recorded training steps on a GPU, without the host's cost of each kernel: wherever that can be done (auto), "
             "always or else refuse to train (on), never (off)")
    add("--profile", action=on_off, default=False,
        help="write a trace of a few training steps to profile/ in --output_dir and print what takes the time")

    add = parser.add_argument_group("several processes (torchrun starts them)").add_argument
    add("--dist-eval", action=on_off, default=False, help="share the evaluation out; the result is the same")
    add("--distributed", action=on_off, default=False, help="refuse to run as a single process")
    add("--world_size", default=1, type=int, metavar="N", help="processes to expect, if more than 1")
    add("--dist_url", default="env://", metavar="URL", help="rendezvous URL")
    add("--dist-timeout", default=600.0, type=float, metavar="SECONDS",
        help="how long a process waits for the others before it ends and names who is missing")
    return parser


@cache
def _flags() -> dict[str, argparse.Action]:
    """dest -> action, one for each flag."""
    return {action.dest: action for action in get_args_parser()._actions}


def flag_name(dest: str) -> str:
    """The flag as the user writes it: 'batch_size' -> '--batch-size'."""
    return _flags()[dest].option_strings[0]


def parse_args(argv: list[str] | None = None) -> Config:
    """Defaults < the recipe named by --config < the command line (`argv`, or the process's).

    Raises `UserError` for an unknown flag or key, a value of the wrong type or outside the choices, and a
    recipe that can't be read. `validate` checks values, later: a checkpoint may still fill some in.
    """
    parser = get_args_parser(add_help=True)
    unset = object()
    parsed = vars(parser.parse_args(argv, Namespace(**{dest: unset for dest in SCOPE})))
    values = {dest: action.default for dest, action in _flags().items()}
    given = {}
    for dest, value in parsed.items():
        if value is not unset:
            try:
                _typed(_flags()[dest], value)
            except ValueError as e:
                raise UserError(f"{flag_name(dest)} {e}") from None
    if parsed["config"] is not unset:
        recipe = load_recipe(parsed["config"])
        values.update(recipe)
        given.update(dict.fromkeys(recipe, f"recipe {parsed['config']}"))
    for dest, value in parsed.items():
        if value is not unset:
            values[dest] = value
            given[dest] = "command line"
    for dest in _PATHS & given.keys():
        if reason := _impossible(values[dest]):
            raise UserError(f"{flag_name(dest)} {_show(values[dest])} ({given[dest]}) can be no path: {reason}")
    return Config(Namespace(**values), given, dict(given))


_PATHS = {"data_path", "output_dir", "finetune", "resume", "teacher_path"}


def _impossible(path: str) -> str:
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
            _refuse(args, dest, f"is not one of {known}{_nearest(name, names)}")
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
    raise UserError(f"{flag_name(dest)} {_show(getattr(args, dest))} {why}")


# ---------------------------------------------------------------- recipes
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Plain data only (no tags that run code), duplicate and merge keys (`<<`) refused, and numbers as anyone reads them:
    PyYAML follows YAML 1.1, where 5e-4 and 1e5 are texts, 010 is 8 and 1:30 is 90. Here the first two are numbers, the
    others texts."""
    yaml_implicit_resolvers = {first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
                               for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > 20:
            raise yaml.composer.ComposerError(None, None, "a recipe is not nested so deep", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node):
        # ten lines of merge keys can stand for a billion entries
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "a recipe has no merge keys", key_node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader`, and any other reader, reads back as the same value (the texts '5e-4' and '1:30' in quotes)."""


_DECIMAL = re.compile(r"^[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
                      r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, _DECIMAL, list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        key = _plain(key_node.value)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key} appears twice",
                                                    key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


MOST_RECIPE_BYTES = 64 * 1024       # PyYAML reads so much in a few seconds


def load_recipe(path: str) -> dict:
    """Flags in a YAML file as dest -> value, each of its flag's type and choices.

    Keys may have dashes or underscores. Raises `UserError` naming the file and the key.
    """
    named = f"--config {_on_one_line(path)}"
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_RECIPE_BYTES + 1)
    except FileNotFoundError:
        beside = [str(p) for p in Path(path).parent.glob("*.yaml")]
        raise UserError(f"{named}: there is no such file{_nearest(path, beside)}") from None
    except OSError as e:
        raise UserError(f"{named}: the file cannot be read ({e.strerror})") from None
    if len(text) > MOST_RECIPE_BYTES:
        raise UserError(f"{named}: a file of more than {MOST_RECIPE_BYTES // 1024} KiB is no recipe")
    try:
        recipe = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as e:
        where = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise UserError(f"{named}{where}: not a recipe in plain YAML ({_on_one_line(str(e.problem))})") from None
    # the last four: what PyYAML meets after a tag on a value of another kind, such as !!int ''
    except (yaml.YAMLError, ValueError, RecursionError, IndexError, KeyError, AttributeError, TypeError) as e:
        first_line = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{named}: not a recipe in plain YAML ({_on_one_line(first_line)})") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{named}: a recipe is a list of 'flag: value' lines, not {_describe(recipe)}")
    flags = _flags()
    values = {}
    for key, value in recipe.items():
        dest = _plain(key) if isinstance(key, str) else None
        if dest in _ONE_SHOT:
            raise UserError(f"{named}: the key {_show(key)} belongs on the command line, not in a recipe")
        if dest not in flags:
            keys = flags.keys() - _ONE_SHOT
            raise UserError(f"{named}: unknown key {_show(key)}{_nearest(str(key).strip('-'), keys)}")
        try:
            values[dest] = _typed(flags[dest], value)
        except ValueError as e:
            raise UserError(f"{named}: {_show(key)} {e}") from None
    return values


def _describe(value) -> str:
    if value is None:
        return "empty"
    kinds = {bool: "the switch", int: "the number", float: "the number", str: "the text", list: "the list",
             dict: "the mapping"}
    text = str(value).lower() if isinstance(value, bool) else _short.repr(value)
    return f"{kinds.get(type(value), 'the ' + type(value).__name__)} {text[:80]}"


# repr() of a few lines of YAML whose lists hold each other is endless
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


def _typed(action: argparse.Action, value):
    """A recipe's or checkpoint's `value` as the flag's type. ValueError: 'must be ..., not ...'."""
    if value is None:
        if action.default is None:
            return None
        raise ValueError("has no value")
    if action.dest in _ONE_OR_EACH and isinstance(value, (list, tuple)) and value:
        return [_typed_one(action, item) for item in value]
    if isinstance(action, HeightAndWidth):
        sides = value if isinstance(value, (list, tuple)) else [value]
        if len(sides) not in (1, 2):
            raise ValueError(f"must be a whole number, or two (height and width), not {_describe(value)}")
        return one_or_two([_typed_one(action, side) for side in sides])
    if action.nargs in ("+", 2, 3):
        if not isinstance(value, (list, tuple)) or not value or action.nargs not in ("+", len(value)):
            kind = "numbers" if action.type else "names"
            many = f"{ {'+': 'one or more', 2: 'two', 3: 'three'}[action.nargs]} {kind}"
            raise ValueError(f"must be a list of {many}, not {_describe(value)}")
        return [_typed_one(action, item) for item in value]
    return _typed_one(action, value)


def _typed_one(action: argparse.Action, value):
    if isinstance(action, SwitchOrMode) and isinstance(value, bool):
        return action.mode(value)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {_describe(value)}")
    elif action.type is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"must be a whole number, not {_describe(value)}")
    elif action.type is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"must be a number, not {_describe(value)}")
        try:
            return float(value)
        except OverflowError:
            raise ValueError("must be a number of ordinary size") from None
    elif not isinstance(value, str):
        raise ValueError(f"must be a text, not {_describe(value)} (put it in quotes)")
    elif "\0" in value or re.search("[\ud800-\udfff]", value):     # on the command line: bytes that are no UTF-8
        raise ValueError(f"has a character that can be in no UTF-8 name: {_describe(value)}")
    if action.choices is not None and value not in action.choices:
        near = _nearest(value, action.choices)
        raise ValueError(f"must be one of {', '.join(action.choices)}, not '{_show(value)}'{near}")
    return value


def dump_yaml(args: Namespace) -> str:
    """The flags as YAML that --config reads back to the same values."""
    plain = {dest: list(value) if isinstance(value, tuple) else value
             for dest, value in vars(args).items() if dest in SCOPE and dest not in _ONE_SHOT}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)


# ---------------------------------------------------------------- checkpoint and model fill in the rest
def resolve(config: Config, checkpoint_args: dict | Namespace | None = None,
            model_defaults: dict | None = None, purpose: str | None = None, models_own: dict | None = None) -> Config:
    """A flag that was not given takes the checkpoint's value, else the model's own, else its default.

    checkpoint_args: the `args` that a checkpoint holds (ours, DeiT's or the original Vision-KAN's: keys that
    are no flags are ignored). model_defaults: dest -> value that suits the model, e.g. {"input_size": 32}.
    models_own: dest -> what the checkpoint's model has where the checkpoint's flags say nothing.
    purpose decides what is taken (see `SCOPE`): "resume" everything but places, "eval" model and data,
    "finetune" the model unless --model names another one, and how images are prepared, None nothing.
    Returns a new Config and changes nothing. Raises `UserError` when a given flag contradicts the checkpoint
    that is resumed or evaluated, except `MAY_CHANGE_ON_RESUME` and `MAY_CHANGE_ON_EVAL`, which are noted.
    """
    model_defaults = model_defaults or {}
    stored, notes = _understood(checkpoint_args)
    taken = _TAKEN[purpose]
    if purpose == "finetune" and "model" in config.given and config.args.model != stored.get("model"):
        taken = ()
    may_change = {"resume": MAY_CHANGE_ON_RESUME, "eval": MAY_CHANGE_ON_EVAL,
                  "finetune": {*_SCOPES["model"].split(), *PREPARATION}}.get(purpose or "", set())
    values, sources = dict(vars(config.args)), dict(config.given)
    for dest, value in model_defaults.items():
        if dest not in config.given:
            values[dest], sources[dest] = value, "model"
    if purpose == "resume":
        besides = {"teacher_path"}
    elif purpose == "finetune":     # weights go on with images as they know them; runs of before did not tell
        besides = PREPARATION if "mean" in stored else set()
    else:       # the images that were held out are chosen by the seed
        besides = {"seed"} if purpose == "eval" and stored.get("val_split") else set()
    for dest, value in stored.items():
        if SCOPE[dest] not in taken and dest not in besides:
            continue
        if dest not in config.given:
            if value is not None:
                values[dest], sources[dest] = value, "checkpoint"
            continue
        if value is None and values[dest] is not None:  # it was trained with the model's own value, as args.yaml says by null
            value = (models_own or {}).get(dest, model_defaults.get(dest))
        if values[dest] != value and SCOPE[dest] != "place":
            flag, where = flag_name(dest), config.given[dest]
            theirs = "none" if value is None else _show(value)
            if dest not in may_change:
                remedy = ("leave it out, or start a new run from these weights with --finetune"
                          if purpose == "resume" else "leave it out")
                raise UserError(f"{flag} {_show(values[dest])} ({where}) contradicts the checkpoint, "
                                f"which has {theirs}: {remedy}")
            notes.append(f"{flag} is {_show(values[dest])} ({where}); the checkpoint has {theirs}")
    return replace(config, args=Namespace(**values), sources=sources, notes=(*config.notes, *notes))


def _understood(checkpoint_args) -> tuple[dict, list[str]]:
    """Those of a checkpoint's args that are flags other than places, typed; and a note on each bad one."""
    if isinstance(checkpoint_args, Namespace):
        checkpoint_args = vars(checkpoint_args)
    stored, notes = {}, []
    flags = _flags()
    for dest, value in (checkpoint_args or {}).items():
        if dest not in flags or (SCOPE[dest] == "place" and dest != "teacher_path"):
            continue
        try:
            stored[dest] = _typed(flags[dest], value)
        except ValueError as e:
            notes.append(f"the checkpoint's {dest} {e}; it is ignored")
    return stored, notes


def _show(value) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_show, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    try:
        return _on_one_line(str(value)) or "''"
    except ValueError:      # Python writes no more than 4300 digits
        return "a number of thousands of digits"


def describe_sources(config: Config) -> str:
    """What came from the checkpoint, the model and the recipe, one line for each, then the notes; or ''.

    How the model is trained is listed only where it differs from the defaults."""
    flags = _flags()
    groups: dict[str, list[str]] = {}
    for dest, source in config.sources.items():
        value = getattr(config.args, dest)
        plain = (SCOPE[dest] in ("train", "place") or dest in PREPARATION - {"eval_crop_ratio"}) and value == flags[dest].default
        if source == "command line" or value is None or plain:
            continue
        groups.setdefault(source, []).append(f"{dest} {_show(value)}")
    lines = [f"from the {source}: {', '.join(sorted(words))}" for source, words in groups.items()]
    return "\n".join([*lines, *config.notes])
