"""Turn a vision transformer's MLPs into KANs without training, and write the model as .safetensors.

    python tools/convert.py SOURCE TARGET.safetensors --model deit_tiny_patch16_224_GKAN [--check IMAGES]
    python tools/convert.py SOURCE TARGET.safetensors --model deit_tiny_patch16_224_KAN --hdim_kan 768 \
        --kan-basis covering --kan-second-norm static --kan-grid-range -4 4 --calibrate IMAGES [--check IMAGES]

SOURCE is a DeiT checkpoint, one of ours, a .safetensors file, an exported folder, a URL, hf-hub:OWNER/NAME, or the name of a
pretrained model, ours or timm's. A group KAN computes what the MLP did; a full-edge KAN is fitted to it on images of
--calibrate. Further flags are main.py's (--input-size, --kan-...). The target loads with `main.py --eval --resume` or
`--finetune`.
"""
import argparse
import sys
from argparse import Namespace
from itertools import chain, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import timm
import torch
from torch import Tensor, nn

import models_kan
from models_kan import ModelSpec
from tools.common import check_not_source, chooses_images, command, tool_parser
from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.checkpoints.write import save_safetensors
from vision_kan.common.errors import TrainingFailed, UserError
from vision_kan.common.text import say, to_builtin_types
from vision_kan.config.checks import validate
from vision_kan.config.flags import FFN_SUFFIXES, FLAGS, PREPARATION
from vision_kan.config.parser import Parser
from vision_kan.config.resolve import parse_args, resolve
from vision_kan.data.loaders import evenly_spaced
from vision_kan.layers.feed_forward import FeedForward
from vision_kan.models import conversion, vetting
from vision_kan.models.cost import count_parameters
from vision_kan.models.finetune import LoadReport, load_finetune
from vision_kan.models.infer import infer_model, patch_grid
from vision_kan.run.build import build_model, model_spec
from vision_kan.run.starting import Start, open_source, with_own_input_size
from vision_kan.run.trained import Pictures, image_files

# Of a source: without them a model computes something else.
PARTS = ("blocks.", "cls_token", "dist_token", "reg_token", "norm_pre.", "norm.", "fc_norm.", "attn_pool.")
EXACT = 1e-4        # without a fit: allowed difference of logits, relative to the largest logit
AGREEMENT = 0.98    # with a fit: required share of images whose first choice stays


def images_in(folder: Path, args: Namespace, limit: int | None = None) -> Tensor:
    """[B, 3, H, W]: images of a folder and its subfolders, prepared as main.py evaluates them. limit: take this number at most,
    evenly spaced."""
    files = image_files([folder])
    pictures = Pictures(evenly_spaced(files, limit or len(files)), args, workers=0)
    images = list(islice(chain.from_iterable(batch for batch, _ in pictures), limit))
    if not images:
        raise UserError(f"none of the {len(pictures)} images in {folder} can be read: name another folder")
    return torch.stack(images)


def source_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The source's model: the one that its file describes, if it is one of this project's, else that of its weights."""
    spec = checkpoint.spec
    if spec is None or models_kan.split_name(spec.name)[0] is None:
        spec = infer_model(checkpoint.weights(), checkpoint.flags)
    return spec


def check_whole(report: LoadReport, model: str) -> None:
    """Raises UserError if the target would compute something else than the source."""
    wrong = [*(f"{key} is left as initialised" for key in report.initial),
             *(f"{key} is dropped" for key in report.dropped if key.startswith(PARTS))]
    if wrong:
        others = f", and {len(wrong) - 1} more (see the table above)" if len(wrong) > 1 else ""
        raise UserError(f"--model {model} cannot compute what the source does, and nothing was written: {wrong[0]}{others}: "
                        "choose one of the source's size and architecture")


def alike(source: nn.Module, model: nn.Module, images: Tensor, exact: bool) -> bool:
    """Print how far the logits of the two differ. Returns whether that is little enough."""
    with torch.inference_mode():
        ours, theirs = (torch.cat([net.eval()(batch) for batch in images.split(32)]) for net in (model, source))
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    same = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
    say(f"logits of {len(images)} images: largest difference {(ours - theirs).abs().max():.3g}, {error:.2e} of the largest "
        f"logit; the first choice is the same for {same:.1%}")
    return error <= EXACT if exact else same >= AGREEMENT


def arguments() -> Parser:
    parser = tool_parser("convert.py", __doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET", type=Path)
    parser.add_argument("--model", required=True, metavar="NAME", help="the model to convert to")
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="images on which a full-edge KAN is fitted")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="images on which to compare the logits of the two")
    return parser


def run(own: argparse.Namespace, flags: list[str]) -> int:
    if own.target.suffix != ".safetensors":
        raise UserError(f"TARGET {own.target} must end in .safetensors")
    config = parse_args(["--model", own.model, "--drop-path", "0", *flags])
    if config.args.ffn:
        raise UserError(f"--ffn {config.args.ffn}: name the model with its feed-forward in --model, such as "
                        f"{own.model.split('.')[0].removesuffix('_ViT')}_{FFN_SUFFIXES[config.args.ffn]}")
    checkpoint = open_source(own.source)
    check_not_source(own.target, checkpoint.path)
    state, stored, what = checkpoint.weights(), checkpoint.flags, f"checkpoint {checkpoint.path}"
    preparation = {key: value for key, value in stored.items() if key in PREPARATION}
    config = resolve(with_own_input_size(config), preparation, purpose="finetune")
    validate(config.args)
    with vetting.as_user_error(what):
        found = source_spec(checkpoint)
        checkpoint.state["model_args"] = {"name": found.name, "kwargs": found.kwargs}       # for the target's architecture
        classes: Any = vetting.meta_model(found, len(state), what).num_classes
    model, spec = build_model(model_spec(config, Start("finetune", checkpoint), classes), config)

    def calibration() -> Tensor:
        if not own.calibrate:
            raise UserError(f"{own.model} is fitted to the MLPs on images: give --calibrate FOLDER")
        return images_in(own.calibrate, config.args, 64)

    with vetting.as_user_error(what):
        grid = patch_grid(checkpoint)
        report, errors = conversion.load_converted(model, spec, state, calibration, grid)
    say(report.table())
    if errors:
        say(conversion.table(errors))
    if not report.converted:
        raise UserError(f"nothing was converted: {own.source} holds no MLP that fits {own.model}; see the table above")
    check_whole(report, own.model)
    if own.check:
        with vetting.as_user_error(what):
            source = timm.create_model(found.name, **{**found.kwargs, "img_size": config.args.input_size})
            load_finetune(source, state, grid)
        exact = not errors and set(report.converted.values()) == {FeedForward.AS_MLP}
        if not alike(source, model, images_in(own.check, config.args), exact):
            raise TrainingFailed(f"{own.target} was not written: the converted model differs from its source by more than it "
                                 "should" + (": take a wider --kan-grid-range, more --kan-grid-points or more images in "
                                             "--calibrate" if errors else ""))
    kept = {key: value for key, value in stored.items() if key in FLAGS and chooses_images(key)}
    kept |= {key: getattr(config.args, key) for key in sorted(PREPARATION & config.sources.keys())}
    about = {"model_args": to_builtin_types({"name": spec.name, "kwargs": spec.kwargs}),
             "args": to_builtin_types({**kept, "input_size": config.args.input_size})}
    if checkpoint.state.get("class_names"):
        about["class_names"] = checkpoint.state["class_names"]
    save_safetensors(model.state_dict(), about, own.target)
    say(f"{own.target}: {spec.name}, {count_parameters(model):,} parameters")
    return 0


main = command(arguments, run, with_main=True)

if __name__ == "__main__":
    sys.exit(main())
