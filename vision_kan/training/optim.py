"""Optimizer, learning rate schedule, and the state of a new training."""
import warnings
from argparse import Namespace
from importlib.util import find_spec
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn

from vision_kan.common.errors import UserError, one_line
from vision_kan.layers.function_layer import function_layers
from vision_kan.training.state import MovingAverage, TrainState


def freeze_all_but_attention(model: nn.Module) -> None:
    """--attn-only (arXiv:2203.09795): train attention, head and position embedding only."""
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise UserError("--attn-only: this model has no attention: leave the flag out")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".attn." in name or name.startswith(("head.", "head_dist.", "pos_embed"))


# ---------------------------------------------------------------- optimizer and schedule
def scaled_lr(args: Namespace, world_size: int) -> float:
    """The learning rate by linear scaling: --lr is for 512 images per update, unless --unscale-lr."""
    return args.lr if args.unscale_lr else args.lr * args.batch_size * world_size * args.grad_accum / 512


def schedule_warnings(args: Namespace, lr: float) -> list[str]:
    """Sentences about learning rates that are probably unintended. lr: from `scaled_lr`."""
    found = []
    if args.warmup_epochs >= args.epochs:
        found.append(f"the {args.warmup_epochs} epochs of --warmup-epochs fill all {args.epochs} of --epochs, so --lr "
                     "is never reached")
    scaled = "" if lr == args.lr else f" (--lr {args.lr:g} scaled to the images of an update)"
    remedy = "raise --lr or --batch-size, or add --unscale-lr" if scaled else "raise --lr"
    if args.min_lr > lr and args.sched in ("cosine", "tanh", "poly", "plateau"):       # timm's others ignore --min-lr
        outcome = "is never lowered" if args.sched == "plateau" else "rises through the run instead of falling"
        found.append(f"--min-lr {args.min_lr:g} lies above the learning rate {lr:.3g}{scaled}, which {outcome}: lower --min-lr, "
                     f"{remedy}")
    if args.warmup_lr > lr and args.warmup_epochs > 0:
        found.append(f"--warmup-lr {args.warmup_lr:g} lies above the learning rate {lr:.3g}{scaled}, so the warm-up goes down "
                     f"to it: lower --warmup-lr, {remedy}")
    return found


# Packages that some of timm's optimizers need: part of the name -> (module, how to install it).
_PACKAGES = {"kron": ("opt_einsum", "pip install opt_einsum"), "bnb": ("bitsandbytes", "pip install bitsandbytes"),
             "fused": ("apex", "build it as https://github.com/NVIDIA/apex says")}


def _check_packages(opt: str) -> None:
    """Raises UserError if an optimizer lacks a package or a GPU. Kron would run without its package, but take thousands of times
    the parameters' memory."""
    for part, (module, remedy) in _PACKAGES.items():
        if part in opt and find_spec(module) is None:
            raise UserError(f"--opt {opt} needs the package {module}, which is not installed: {remedy}")
    if ("bnb" in opt or "fused" in opt) and not torch.cuda.is_available():
        raise UserError(f"--opt {opt} computes on CUDA GPUs only, and PyTorch sees none: choose another")


def build_optimizer(args: Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the parameters that --attn-only leaves trainable. Raises UserError if it cannot be set up."""
    if args.attn_only:
        freeze_all_but_attention(model)
    _check_packages(args.opt.lower())
    kwargs: dict[str, Any] = {**optimizer_kwargs(args), "lr": lr}
    scaled = {id(p) for layer in function_layers(model).values() for p in layer.scaled_parameters()}
    info = get_optimizer_info(args.opt.lower().split("_")[-1])     # without the prefix lookahead_
    betas = info.num_betas if info.has_betas else 0
    # earlier versions ignored those of an optimizer without betas, and a checkpoint's flags cannot be changed
    if len(args.opt_betas or ()) not in (0, betas) and (betas or not args.resume):
        raise UserError(f"--opt {args.opt} takes {betas or 'no'} --opt-betas, not {len(args.opt_betas)}")
    if info.opt_class in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        # One kernel for the whole update: on a CPU 2-3 times as fast as a loop, and there foreach, timm's choice, is slower than
        # the loop. It also spares the loss scaler reading back whether a gradient was infinite.
        kwargs["fused"] = True
    if "muon" in info.name:     # Muon is for hidden matrices; AdamW updates the rest
        kwargs["fallback_list"] = ("head*", "patch_embed*", *(name for name, p in model.named_parameters() if id(p) in scaled))
    try:
        optimizer = create_optimizer_v2(model, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--opt {args.opt} cannot be set up ({one_line(error)}): check --opt-eps, "
                        "--opt-betas and --momentum") from error
    if getattr(optimizer, "is_second_order", False) and any(getattr(module, "fused_attn", False) for module in model.modules()):
        raise UserError(f"--opt {args.opt} needs second derivatives, which PyTorch's fused attention does not have: choose "
                        "another")
    _split_coefficients(args, scaled, optimizer)
    if type(optimizer) is torch.optim.SGD and args.momentum:
        # the fused kernel creates its buffers in the first update, and leaves them unset if that one is skipped
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _split_coefficients(args: Namespace, coefficients: set[int], optimizer: torch.optim.Optimizer) -> None:
    """Move the coefficients of learned functions, given by their ids, into groups of their own, with --kan-lr-mult and
    --kan-weight-decay."""
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
    """timm's schedule over exactly --epochs epochs; cooldown and patience apply to --sched plateau only."""
    kwargs = scheduler_kwargs(args)
    first = 0 if args.sched_on_updates else 1       # timm's multistep counts epochs from 1
    kwargs["decay_milestones"] = [epoch + first for epoch in
                                  range(int(args.decay_epochs), args.epochs, max(1, int(args.decay_epochs)))]
    with warnings.catch_warnings():     # timm deprecates plateau because its state was not saved; here it is
        warnings.simplefilter("ignore", FutureWarning)
        scheduler, _ = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    if args.sched == "plateau":
        scheduler.lr_scheduler.cooldown = args.cooldown_epochs
        # as the other schedules do, scale --min-lr by each group's factor
        scheduler.lr_scheduler.min_lrs = [args.min_lr * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    return scheduler


def build_state(args: Namespace, model: nn.Module, lr: float, updates_per_epoch: int, device: torch.device,
                amp_dtype: torch.dtype) -> TrainState:
    """Optimizer, schedule, loss scaler (float16 only) and moving average for a model that is already on its device."""
    optimizer = build_optimizer(args, model, lr)
    ema_device: Any = "cpu" if args.model_ema_force_cpu else None
    ema = None
    if args.model_ema:
        ema = MovingAverage(model, args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
    return TrainState(model, optimizer, build_scheduler(args, optimizer, updates_per_epoch),
                      torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16), ema,
                      epoch=args.start_epoch)
