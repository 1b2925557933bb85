"""What a run is: a setting, a variant with its recipe, a seed, a device."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import models_kan
from models_kan import ModelSpec
from vision_kan.common.errors import UserError
from vision_kan.config.flag import BELOW_1, POSITIVE, Flag, at_least
from vision_kan.config.flags import FLAGS

TRAIN_IMAGES = 45_000       # of CIFAR-10's, the others are for validation
SIZES = {"nano": "vit_nano_patch8_32", "micro": "vit_micro_patch4_32"}
# name -> (model suffix, options). For `act`, `frozen` and other options that models do not have, see `models.build`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("ViT", {}),
    "relu": ("ViT", {"act": "relu"}),
    "relu2": ("ViT", {"act": "relu2"}),
    "silu": ("ViT", {"act": "silu"}),
    "swiglu": ("ViT", {"gated": True}),
    "gkan": ("GKAN", {}),
    "mean-shape": ("GKAN", {"frozen": "mean", "kan_groups": 1, "kan_input_phi": False}),
    "frozen": ("GKAN", {"frozen": "own"}),
    "kat": ("KAT", {}),
    "kan-original": ("KAN", {}),
    "kan": ("KAN", {"kan_basis": "covering"}),
    "ekan": ("EKAN", {}),
}
# kan_lr_end: the multiple of C's rate in the last epoch; 0: kan_lr_mult throughout. smooth: weight of `training.Smooth`.
RECIPE: dict[str, Any] = {
    "epochs": 4, "batch_size": 128, "lr": 1e-3, "min_lr": 1e-5, "weight_decay": 0.05, "smoothing": 0.1, "clip_grad": 1.0,
    "warmup_steps": 200, "ema_decay": 0.99, "kan_lr_mult": 20.0, "kan_lr_end": 0.0, "kan_weight_decay": 0.0, "mixup": 0.0,
    "cutmix": 0.0, "drop_path": 0.0, "smooth": 0.0}
LONG: dict[str, Any] = {"ema_decay": 0.998, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1}
LONG_WARMUP = 1 / 20        # of the run's steps, unless a variant says warmup_steps=
LONG_EPOCHS = {"cpu": 50, "cuda": 100}
TRANSFERS = {"transfer": 4, "transfer-long": 20}        # setting -> epochs of pretraining
SETTINGS = ("scratch", *TRANSFERS, "long")
# What only trials have, beside main.py's flags. For those of scope "model" see `models.build`.
OWN = {flag.dest: flag for flag in (
    Flag("--size", "nano", "model", "", choices=list(SIZES)),
    Flag("--act", None, "model", "", choices=["relu", "relu2", "silu"]),
    Flag("--gated", False, "model", "", type=bool),
    Flag("--frozen", None, "model", "", choices=["mean", "own"]),
    Flag("--phi-qkv", False, "model", "", type=bool),
    Flag("--phi-out", False, "model", "", type=bool),
    Flag("--phi2-scale", None, "model", "", choices=["calibrated", "learned"]),
    Flag("--gain", None, "model", "", type=float, rule=POSITIVE),
    Flag("--whiten", None, "model", "", choices=["zca", "pca"]),
    Flag("--weight-init", "reset", "model", "", choices=["reset", "mimetic"]),
    Flag("--mlp-ratio", None, "model", "", type=float, rule=at_least(0.1)),
    Flag("--ema-decay", None, "training", "", type=float, rule=BELOW_1),
    Flag("--warmup-steps", None, "training", "", type=int, rule=at_least(0)),
    Flag("--kan-lr-end", None, "training", "", type=float, rule=at_least(0)),
    Flag("--smooth", None, "training", "", type=float, rule=at_least(0)))}
OPTIONS = [key for key, flag in OWN.items() if flag.scope == "model" and key != "size"]
# option -> the model suffixes that can have it, where it is not all of them
ONLY_FOR = {"act": ("ViT",), "gated": ("ViT",), "frozen": ("GKAN",), "phi2_scale": ("GKAN",), "phi_out": ("ViT", "GKAN", "KAT"),
            "gain": ("KAN",), "whiten": ("KAN",)}
SHORT = {"grid": "kan_grid_range"}


@dataclass(frozen=True)
class Variant:
    """text: its name and what it changes, without size and epochs; the same for every way to write it."""
    text: str
    name: str
    suffix: str
    options: dict[str, Any]
    recipe: dict[str, Any]
    size: str

    @property
    def model(self) -> str:
        return f"{SIZES[self.size]}_{self.suffix}"


@dataclass(frozen=True)
class Run:
    setting: str
    variant: Variant
    seed: int
    device: str = "cpu"     # or "cuda"

    @property
    def key(self) -> tuple:
        """What tells finished runs apart."""
        return self.setting, self.variant.size, self.variant.text, self.variant.recipe["epochs"], self.seed, self.device

    @property
    def words(self) -> str:
        """The variant as --variants takes it, with size and epochs."""
        return f"{self.variant.text},size={self.variant.size},epochs={self.variant.recipe['epochs']}"

    def siblings(self, work: Path) -> Path:
        """The folder of the runs of the same setting, size and device."""
        return work / self.setting / f"{self.variant.size}-{self.device}"

    def folder(self, work: Path) -> Path:
        return self.siblings(work) / run_name(self.variant.text, self.variant.recipe["epochs"], self.seed)

    def __str__(self) -> str:
        return f"{self.variant.text} seed {self.seed}"


def run_name(variant: str, epochs: int, seed: int | str) -> str:
    return f"{variant}-{epochs}epochs-seed{seed}"


def parse_variant(text: str, setting: str = "scratch", size: str = "nano", epochs: int | None = None,
                  device: str = "cpu") -> Variant:
    """`gkan,kan_groups=16,lr=2e-3`. size, epochs: where the variant says nothing. Raises UserError if it is wrong."""
    where = f"variant {text}"
    name, *changes = text.split(",")
    if name not in VARIANTS:
        raise UserError(f"{where}: {name} is not one of {', '.join(VARIANTS)}")
    suffix, options = VARIANTS[name]
    recipe = {**RECIPE, **(LONG if setting == "long" else {}), **models_kan.own_flags(f"{SIZES['nano']}_{suffix}")}
    recipe["epochs"] = epochs or (LONG_EPOCHS[device] if setting == "long" else recipe["epochs"])
    allowed = (*recipe, "size", *OPTIONS, *SHORT, *models_kan.options_of(f"{SIZES['nano']}_{suffix}"))
    found: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"{where}: write {key}=VALUE")
        if key not in allowed:
            raise UserError(f"{where}: {key} is none of {', '.join(allowed)}")
        if suffix not in ONLY_FOR.get(key, (suffix,)):
            able = [other for other, (its, _) in VARIANTS.items() if its in ONLY_FOR[key]]
            raise UserError(f"{where}: {name} cannot have {key}, which is for {', '.join(able)}")
        key = SHORT.get(key, key)
        flag = OWN.get(key) or FLAGS[key]
        try:
            found[key] = flag.typed(value if flag.type is None else _value(value))
            objection = flag.objection(found[key])
        except ValueError as error:
            objection = str(error)
        if objection:
            raise UserError(f"{where}: {key} {objection}")
    size = found.pop("size", size)
    recipe["epochs"] = found.pop("epochs", recipe["epochs"])
    if found.get("gated", options.get("gated")) and "act" in {**options, **found}:
        raise UserError(f"{where}: {name} cannot have both act and gated: SwiGLU has its own activation")
    batch_size = found.get("batch_size", recipe["batch_size"])
    if batch_size > TRAIN_IMAGES // 2:      # transfer has half of the images
        raise UserError(f"{where}: batch_size must be at most {TRAIN_IMAGES // 2}")
    if batch_size % 2 and any({**recipe, **found}[key] for key in ("mixup", "cutmix")):
        raise UserError(f"{where}: batch_size must be even, because mixup and cutmix mix pairs")
    if setting == "long":
        recipe["warmup_steps"] = int(LONG_WARMUP * recipe["epochs"] * (TRAIN_IMAGES // batch_size))
    usual = {**{key: OWN[key].default for key in OPTIONS}, **models_kan.own_options(ModelSpec(f"{SIZES[size]}_{suffix}")),
             **options, **recipe}
    changed = {key: found[key] for key in sorted(found) if _shown(found[key]) != _shown(usual.get(key))}
    return Variant(",".join([name, *(f"{key}={_shown(value)}" for key, value in changed.items())]), name, suffix,
                   {**options, **{key: value for key, value in changed.items() if key not in recipe}},
                   {**recipe, **{key: value for key, value in changed.items() if key in recipe}}, size)


def _value(text: str) -> Any:
    """A number, true/false, a name, or `a:b` for two numbers."""
    try:
        if ":" in text:
            return [float(part) for part in text.split(":")]
        return float(text) if "e" in text.lower() and text.lower() not in ("true", "false") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ":".join(f"{number:g}" for number in value)
    return str(value).lower() if isinstance(value, bool) else f"{value:.12g}" if isinstance(value, (int, float)) else str(value)
