"""Write a checkpoint's model in another format, and check that it computes the same.

    python tools/export.py CHECKPOINT TARGET.safetensors    weights and description: main.py, timm.create_model
    python tools/export.py CHECKPOINT FOLDER                timm's layout with a model card: timm.create_model, the Hub
    python tools/export.py CHECKPOINT TARGET.pt2            a program for PyTorch (torch.export)
    python tools/export.py CHECKPOINT TARGET.onnx           a program for onnxruntime and others

Programs map any number of normalised images, float32 [B, 3, H, W], to logits [B, classes]; they contain PyTorch's or ONNX's own
operations only. If the check fails, nothing is written (exit code 1). --check adds images to it. Further flags are main.py's:
with --data-path DIR the model is evaluated, and description and model card give the result.
"""
import argparse
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from timm.layers import to_2tuple
from timm.models import save_for_hf
from torch import Tensor, nn

import models_kan
from engine import evaluate
from tools.common import PLACE, check_not_source, command, model_parser
from tools.images import loaders_of
from vision_kan.checkpoints.untrusted import SAFETENSORS_KEY
from vision_kan.checkpoints.write import save_safetensors
from vision_kan.common.errors import TrainingFailed, UserError
from vision_kan.common.files import atomic_write
from vision_kan.common.process import Process
from vision_kan.common.text import printable, say, shown_size, to_builtin_types, to_json
from vision_kan.config.flags import FLAGS, PREPARATION
from vision_kan.config.parser import Parser
from vision_kan.models.cost import count_flops, count_parameters, measure_flops
from vision_kan.run.folder import versions
from vision_kan.run.trained import Pictures, Trained, describe_result, image_files, load_trained
from vision_kan.training.state import result_of

Logits = Callable[[Tensor], Tensor]

# The allowed difference of a program's logits, relative to the largest logit. Another order of rounding moves them about as far
# as PyTorch's float32 is from its float64, which depends on the model: OWN_ERRORS times that is allowed, at least CLOSE, at most
# FAR.
CLOSE, OWN_ERRORS, FAR = 1e-4, 10, 0.5
NOISE_BATCHES = (1, 2, 5)       # sizes of the batches of noise to compare
ONNX_BYTES = 2 ** 31            # protobuf's limit for one file


# ---------------------------------------------------------------- metadata
def about(trained: Trained) -> dict[str, Any]:
    """A checkpoint's metadata in built-in types: architecture, classes, results, versions, and the flags of its training without
    those that name places on this machine."""
    flags = {key: value for key, value in trained.about.get("args", {}).items() if key in FLAGS and FLAGS[key].scope != "run"}
    flags |= {key: getattr(trained.args, key) for key in sorted(PREPARATION & trained.config.sources.keys())}
    kept = {key: trained.about[key] for key in ("class_names", "epoch", "versions") if trained.about.get(key) is not None}
    if trained.results:
        kept["results"] = {"model": trained.results}        # exported weights are always "model", averaged ones too
    return to_builtin_types({"model_args": {"name": trained.spec.name, "kwargs": trained.spec.kwargs}, "args": flags, **kept})


def bare_model(trained: Trained) -> nn.Module:
    """The model from its description and weights only, on the CPU: without the training's dropout, which timm would save."""
    model = timm.create_model(trained.spec.name, **trained.spec.kwargs)
    model.load_state_dict(trained.model.state_dict())
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- formats; `export` gives them a temporary target
def write_safetensors(trained: Trained, target: Path) -> None:
    save_safetensors(trained.model.state_dict(), about(trained), target)


def read_safetensors(path: Path, trained: Trained) -> Logits:
    with quiet():
        return load_trained(str(path), device=str(trained.device)).model


def write_folder(trained: Trained, target: Path) -> None:
    """timm's layout, `config.json` and `model.safetensors`, and a model card, `README.md`."""
    model = bare_model(trained)
    names = trained.about.get("class_names")
    save_for_hf(model, str(target), safe_serialization=True, data_config=trained.data_config,
                model_config={"label_names": names} if names else None)
    config = target / "config.json"     # written anew, because the Hub's client escapes letters
    config.write_text(to_json(json.loads(config.read_text(encoding="utf-8")), indent=2), encoding="utf-8")
    save_safetensors(model.state_dict(), about(trained), target / "model.safetensors")      # again, with the metadata
    (target / "README.md").write_text(model_card(trained), encoding="utf-8")


def read_folder(path: Path, trained: Trained) -> Logits:
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval().to(trained.device)


def write_pt2(trained: Trained, target: Path) -> None:
    with quiet():
        torch.export.save(exported(trained), target, extra_files={f"{SAFETENSORS_KEY}.json": metadata_json(trained)})


def read_pt2(path: Path, trained: Trained) -> Logits:
    return torch.export.load(path).module()


def write_onnx(trained: Trained, target: Path) -> None:
    nbytes = sum(value.nbytes for value in trained.model.state_dict().values())
    if nbytes >= ONNX_BYTES:
        raise UserError(f"an ONNX file holds less than 2 GiB, and the model has {nbytes / 2 ** 30:.1f}: write a .pt2 or a "
                        ".safetensors file")
    with quiet():
        program: Any = torch.onnx.export(exported(trained), input_names=["images"], output_names=["logits"], dynamo=True,
                                         dynamic_shapes=({0: "batch"},), verbose=False)     # only names the axis
        program.model.metadata_props[SAFETENSORS_KEY] = metadata_json(trained)
        program.save(str(target), external_data=False)


def read_onnx(path: Path, trained: Trained) -> Logits:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])


def exported(trained: Trained) -> torch.export.ExportedProgram:
    """The model's graph for any batch size, in PyTorch's own operations."""
    images = torch.zeros(2, 3, *to_2tuple(trained.args.input_size), device=trained.device)
    return torch.export.export(trained.model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def metadata_json(trained: Trained) -> str:
    """JSON for a program's metadata: `about`, and the preparation of images."""
    return to_json({**about(trained), "data_config": trained.data_config})


class Format(NamedTuple):
    write: Callable[[Trained, Path], None]
    read: Callable[[Path, Trained], Logits]
    exact: bool                                 # the logits stay bit for bit the same
    packages: tuple[str, ...] = ()              # needed to write and to check


FORMATS = {".safetensors": Format(write_safetensors, read_safetensors, exact=True),
           "": Format(write_folder, read_folder, exact=True),
           ".pt2": Format(write_pt2, read_pt2, exact=False),
           ".onnx": Format(write_onnx, read_onnx, exact=False, packages=("onnx", "onnxscript", "onnxruntime"))}


def format_of(target: Path) -> Format:
    """The format of TARGET's ending. Raises UserError for an unknown one, and if packages are missing."""
    chosen = FORMATS.get(target.suffix)
    if chosen is None:
        raise UserError(f"TARGET {target}: {target.suffix} is not a format to export to: let it end in "
                        f"{', '.join(filter(None, FORMATS))}, or give a folder, which gets timm's layout")
    missing = [name for name in chosen.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{target.suffix} files are written and checked with packages that are not installed: "
                        f"pip install {' '.join(missing)}")
    return chosen


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log lines, warnings and prints of exporters and loaders."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# ---------------------------------------------------------------- the check
class Difference(NamedTuple):
    images: int     # compared
    error: float    # largest difference of logits, relative to the largest logit
    own: float      # the same between PyTorch's float32 and float64

    def fits(self, exact: bool) -> bool:
        return self.error == 0 if exact else self.error <= min(FAR, max(CLOSE, OWN_ERRORS * self.own))


@torch.inference_mode()
def compare(model: nn.Module, other: Logits, batches: Iterable[Tensor], exact: bool = False) -> Difference:
    """Compare the logits of `model` and `other` batch by batch. exact: don't compute `own`."""
    device = next(model.parameters()).device
    double = None if exact or device.type == "mps" else deepcopy(model).double()
    images, error, own = 0, 0.0, 0.0
    for batch in batches:
        batch = batch.to(device)
        expected, got = model(batch), other(batch).to(device)
        if got.shape != expected.shape or not got.isfinite().all():
            return Difference(images + len(batch), float("inf"), own)
        largest = expected.abs().max().clamp_min(1e-30)
        error = max(error, ((got - expected).abs().max() / largest).item())
        if double is not None:
            own = max(own, ((double(batch.double()) - expected).abs().max() / largest).item())
        images += len(batch)
    return Difference(images, error, own)


def check_batches(trained: Trained, files: list[Path]) -> Iterator[Tensor]:
    """Batches of noise of several sizes, then the images of `files`."""
    size, generator = to_2tuple(trained.args.input_size), torch.Generator().manual_seed(0)
    for count in NOISE_BATCHES:
        yield torch.randn(count, 3, *size, generator=generator)
    pictures = Pictures(files, trained.args, batch_size=16)
    for images, _ in pictures:
        yield images
    if files and len(pictures.unreadable) == len(files):
        raise UserError(f"none of the {len(files)} images of --check can be read: name others")


def export(trained: Trained, target: Path, check: list[Path] | None = None) -> Difference:
    """Write the model to `target` in the format of its ending, if the result passes the check.

    check: image files to compare on, besides noise.
    Raises: UserError if the format cannot hold it, TrainingFailed if the check fails; nothing is written then."""
    chosen = format_of(target)
    with atomic_write(target) as temporary:
        chosen.write(trained, temporary)
        found = compare(trained.model, chosen.read(temporary, trained), check_batches(trained, check or []), chosen.exact)
        if not found.fits(chosen.exact):
            raise TrainingFailed(f"{target} was not written: its logits of {found.images} images differ from the checkpoint's by "
                                 f"{found.error:.1e} of the largest logit, PyTorch's float32 from float64 by {found.own:.1e}")
    return found


# ---------------------------------------------------------------- the model card
WEIGHTS_TITLES = {"model": "trained weights", "model_ema": "moving average"}


def model_card(trained: Trained) -> str:
    """The `README.md` of a model on the Hub."""
    name, evaluated = trained.spec.name, None
    if measured := trained.results:
        on = _one_word(measured["data_set"])
        evaluated = [EvalResult(task_type="image-classification", dataset_type=on.lower(), dataset_name=on,
                                dataset_split=measured["split"] or None, metric_type="accuracy", metric_name=f"top-{k}",
                                metric_value=round(measured[f"acc{k}"], 2)) for k in (1, 5)]
    header = ModelCardData(license="apache-2.0", library_name="timm", pipeline_tag="image-classification", model_name=name,
                           tags=["image-classification", "timm", "kolmogorov-arnold-network", "vision-kan"],
                           eval_results=evaluated)
    return f"---\n{header.to_yaml()}\n---\n\n" + markdown(name, card_parts(trained))


def markdown(title: str, parts: dict[str, str]) -> str:
    """A page of paragraphs under their headings."""
    paragraphs = [f"## {heading}\n\n{text}" if heading else text for heading, text in parts.items()]
    return "\n\n".join([f"# {title}", *paragraphs]) + "\n"


def card_parts(trained: Trained) -> dict[str, str]:
    """The paragraphs of a model card by their headings: results, model, data, recipe, versions, licence, use; first, under "",
    what the model is."""
    metadata = about(trained)
    flags, names = metadata["args"], metadata.get("class_names") or []
    name, (size, suffix) = trained.spec.name, models_kan.split_name(trained.spec.name)
    data = _one_word(str(flags.get("data_set") or "unknown"))
    recipe = {key: value for key, value in flags.items()
              if FLAGS[key].scope != "model" and value != to_builtin_types(FLAGS[key].default)}
    finetuned_from = trained.about.get("args", {}).get("finetune")
    title = WEIGHTS_TITLES[trained.weights]
    parts = {}
    if suffix:
        flops = count_flops(trained.model) if size else measure_flops(trained.model, to_2tuple(trained.args.input_size))
        architecture = "A vision transformer" if size else f"`{models_kan.architecture_of(name)}` of timm"
        parts[""] = (f"{architecture} with the feed-forward {models_kan.FEED_FORWARDS[suffix].TITLE}. "
                     f"{count_parameters(trained.model):,} parameters, {flops.matmul / 1e6:,.1f} M matrix-product "
                     f"FLOPs an image of {shown_size(trained.args.input_size, ' x ')} px.")
    parts["Results"] = f"The {title}: {_one_word(describe_result(trained.results))}." if trained.results else _NOT_EVALUATED
    parts["Model"] = f"It holds the {title}.\n\n" + _block("yaml", _yaml({"name": name, **metadata["model_args"]["kwargs"]}))
    parts["Data"] = f"`{data}`, {trained.model.num_classes} classes{_few(names)}."
    parts["Recipe"] = _recipe(recipe, metadata, finetuned_from)
    parts["Versions"] = _block("yaml", _yaml({**metadata.get("versions", {}), "exported with": versions()}))
    parts["Licence"] = "Apache-2.0."
    parts["Use"] = _USE.format(
        place=PLACE, register="" if size or not suffix else f"\nmodels_kan.register({name.split('.')[0]!r})\n")
    return parts


_USE = """With the code of Vision-KAN on the path (its `models_kan` registers the models):

```python
import timm
import models_kan
{register}
model = timm.create_model("hf-hub:{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

or, from its folder, `python main.py --eval --resume model.safetensors --data-path DIR`."""


_NOT_EVALUATED = """These weights have not been evaluated. `python tools/export.py CHECKPOINT FOLDER --data-path DIR` does that
and writes the result here."""


def _recipe(recipe: dict[str, Any], metadata: dict[str, Any], finetuned_from: Any) -> str:
    if not recipe and "epoch" not in metadata:
        return "The checkpoint has none."
    title = "Flags of `main.py` that are not the defaults:"
    lines = [f"{metadata['epoch'] + 1} epochs done. {title}" if "epoch" in metadata else title, _block("yaml", _yaml(recipe))]
    return "\n\n".join(lines + ([f"Fine-tuned from `{_one_word(Path(str(finetuned_from)).name)}`."] if finetuned_from else []))


def _few(names: list[str], most: int = 20) -> str:
    shown = ", ".join(f"`{_one_word(name)}`" for name in names[:most])
    return f": {shown}{', …' if len(names) > most else ''}" if shown else ""


def _one_word(text: str) -> str:
    return printable(text.replace("`", "'").replace("\n", " "))


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(to_builtin_types(content), sort_keys=False, allow_unicode=True, width=120)


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.replace('```', chr(39) * 3).rstrip()}\n```"


# ---------------------------------------------------------------- the command
def measure(trained: Trained) -> None:
    """Evaluate the model on the validation images of --data-path, print `trained.results` and keep them."""
    loaders = loaders_of(trained)
    measured = evaluate(trained.model, loaders.val, Process(device=trained.device))
    loaders.check_unreadable(gather=True)
    trained.results = result_of(measured, trained.args)
    say(f"{trained.weights}: {describe_result(trained.results)}")


def arguments() -> Parser:
    parser = model_parser("export.py", __doc__)
    parser.set_defaults(device="cpu")       # a program keeps the device on which it was exported
    parser.add_argument("target", type=Path, metavar="TARGET", help="its ending chooses the format")
    parser.add_argument("--check", nargs="+", type=Path, metavar="IMAGE|FOLDER",
                        help="images on which to compare logits, besides noise")
    return parser


def run(own: argparse.Namespace, flags: list[str]) -> int:
    chosen = format_of(own.target)          # first, because the rest takes time
    files = image_files(own.check) if own.check else []
    trained = load_trained(own.checkpoint, weights=own.weights, device=own.device, flags=flags)
    check_not_source(own.target, trained.path)
    if trained.args.data_path:
        measure(trained)
    found = export(trained, own.target, files)
    same = "equal bit for bit" if chosen.exact else \
        f"equal up to {found.error:.1e} of the largest logit (PyTorch's float32 from its float64: {found.own:.1e})"
    say(f"{own.target}: {trained.spec.name}, {count_parameters(trained.model):,} parameters; logits of {found.images} "
        f"images in batches of several sizes are {same}")
    return 0


main = command(arguments, run, with_main=True)

if __name__ == "__main__":
    sys.exit(main())
