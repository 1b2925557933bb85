"""Which model a checkpoint holds, and loading its weights."""
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models_kan import FEED_FORWARDS, SIZE_NAMES, SIZES, ModelSpec
from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.checkpoints.layouts import rename_keys
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.text import one_or_two
from vision_kan.layers.feed_forward import MLP

_HEADS = {1280: 16, 1408: 16, 1664: 16}     # width -> heads of ViT-H, -g and -G, whose heads are wider than 64


def infer_model(state: dict[str, Tensor], args: dict[str, Any]) -> ModelSpec:
    """The model of a ViT checkpoint that has no description of it, inferred from the shapes of its weights.

    Args:
        state: parameters in any known key layout.
        args: the checkpoint's flags, if any: `model` names the size, `input_size` the size of oblong images.
    Raises: UserError if the keys are not those of a DeiT-like vision transformer.
    """
    released = any(".kan.layers." in key for key in state)
    state = rename_keys(state)
    missing = [key for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight",
                               "blocks.0.norm1.weight") if key not in state]
    if missing:
        raise UserError(f"the checkpoint holds no vision transformer of a known layout (its weights: {sample_keys(state)}; no "
                        f"key {missing[0]!r}): if it is another model of timm's, name its architecture with --model")
    dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    distilled, deit3 = "dist_token" in state, "blocks.0.ls1.gamma" in state
    prefix = 0 if deit3 else 2 if distilled else 1
    tokens = state["pos_embed"].shape[1]
    side = round((tokens - prefix) ** 0.5)
    rows, columns = (length // patch for length in two_sides(args.get("input_size")) or (side * patch, side * patch))
    if rows == columns or rows * columns != tokens - prefix:
        rows = columns = side
    if rows * columns != tokens - prefix:
        raise UserError(f"pos_embed of the checkpoint has {tokens} positions, which is not a square image: if its images are "
                        "oblong, give their --input-size, height and width")
    blocks = [{key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
              for start in (f"blocks.{number}.mlp." for number in range(depth))]
    suffix, options = _feed_forward(blocks, dim)
    size_name = SIZE_NAMES.get(args.get("model") or "")
    if size_name is None:
        shape = (dim, patch, depth, side * patch)      # the width comes first, because it sets the number of heads
        candidates = {n: (s.embed_dim, s.patch_size, s.depth, s.img_size) for n, s in SIZES.items()
                      if (s.distilled, s.deit3) == (distilled, deit3)}
        size_name = min(candidates, key=lambda n: [a != b for a, b in zip(candidates[n], shape)])
    size = SIZES[size_name]
    kwargs: dict[str, Any] = {"img_size": one_or_two([rows * patch, columns * patch]), "num_classes": _num_classes(state)}
    for key, value, own in (("embed_dim", dim, size.embed_dim), ("depth", depth, size.depth),
                            ("patch_size", patch, size.patch_size)):
        if value != own:
            kwargs[key] = value
    if dim != size.embed_dim:
        kwargs["num_heads"] = _HEADS.get(dim) or max(1, dim // 64)
    if "fc_norm.weight" in state:       # MAE's fine-tuned models normalise the mean of the patches
        kwargs["global_pool"] = "avg"
    if "blocks.0.attn.qkv.bias" not in state:
        kwargs["qkv_bias"] = False
    if released:
        kwargs["block_norm_eps"] = 1e-5
    return ModelSpec(f"{size_name}_{suffix}", kwargs | options)


def _feed_forward(blocks: Sequence[Mapping[str, Tensor]], dim: int) -> tuple[str, dict[str, Any]]:
    """Suffix and options of the first feed-forward in the table that recognises the weights. The MLP comes last, because other
    feed-forwards contain its linear maps too."""
    for suffix, kind in sorted(FEED_FORWARDS.items(), key=lambda item: item[1] is MLP):
        options = kind.read_options(blocks, dim)
        if options is not None:
            return suffix, options
    raise AssertionError("the MLP takes any weights")


def sample_keys(state: Mapping[str, Tensor]) -> str:
    """The first names of tensors, for a message: they show which program wrote them."""
    return ", ".join(map(ascii, list(state)[:3])) + (f" and {len(state) - 3} more" if len(state) > 3 else "")


def _num_classes(state: dict[str, Tensor]) -> int:
    return state["head.weight"].shape[0] if "head.weight" in state else 0


def load_exactly(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load every parameter of `model` from `state`. Raises UserError that names `what` and the first key that does not fit."""
    own = model.state_dict()
    state = rename_keys(state, own)
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    if missing or extra or wrong:
        key = (wrong or missing or extra)[0]
        reason = (f"has shape {tuple(state[key].shape)} where the model has {tuple(own[key].shape)}" if wrong
                  else "is missing" if missing else "has no place in the model")
        raise UserError(f"{what} does not fit the model: {key} {reason} "
                        f"({len(missing)} keys missing, {len(extra)} unknown, {len(wrong)} of another shape)")
    load_into(model, state, what)


def load_into(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load the keys of `state` that `model` has. Raises UserError if a module refuses its own, such as functions learned on
    another grid."""
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{what} does not fit the model: {one_line(error, 300, line=-1)}: check --kan-function, --kan-grid-range "
                        "and --kan-grid-points") from error


def patch_grid(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Rows and columns of the patches in a checkpoint's `pos_embed`, or None if its description lacks the image size."""
    stored, kernel = checkpoint.state.get("model_args"), checkpoint.weights().get("patch_embed.proj.weight")
    sizes = [(stored.get("kwargs") or {}).get("img_size") if isinstance(stored, Mapping) else None,
             checkpoint.flags.get("input_size")]
    size = two_sides(next((size for size in sizes if size), None))
    if kernel is None or kernel.ndim != 4 or size is None:
        return None
    rows, columns = (side // patch for side, patch in zip(size, kernel.shape[2:]))
    return rows, columns


def two_sides(size: Any) -> tuple[int, int] | None:
    """Height and width from a checkpoint's image size; None unless it is one integer or two."""
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    return (sides[0], sides[1]) if len(sides) == 2 and all(type(side) is int for side in sides) else None
