"""The losses of training: `build_criterion` chooses one by the flags.

Every criterion is called as `criterion(images, outputs, targets)`. Targets are class indices int64 [B] or, after mixup,
probabilities float [B, K].
"""
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from vision_kan.training.criterion import ClassWeights, Criterion


class ClassLoss(Criterion):
    """A loss of logits [B, K] and targets, with weights of classes if given."""

    def __init__(self, loss: nn.Module, weights: ClassWeights | None = None):
        super().__init__(weights)
        self.loss = loss

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mean(self.loss(outputs, targets), targets)


class DistillationLoss(Criterion):
    """(1 - alpha) * loss on the class token + alpha * loss of the distillation token against a teacher
    (arXiv:2012.12877, section 4).

    The soft loss is the Kullback-Leibler divergence at temperature tau, times tau^2, divided by the number of
    logits B*K as in DeiT's code (K times less than the batch mean: choose alpha for that).

    Args:
        base: loss of logits [B, K] and targets.
        teacher: maps images to logits [B, K]; it is never trained.
        kind: "soft", or "hard" (cross-entropy with the teacher's first choice).
    """

    def __init__(self, base: nn.Module, teacher: Callable, kind: str, alpha: float, tau: float,
                 weights: ClassWeights | None = None):
        super().__init__(weights)
        self.base, self.teacher, self.kind, self.alpha, self.tau = base, teacher, kind, alpha, tau

    def forward(self, images: Tensor, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        by_class, by_distillation = (output.float() for output in outputs)
        with torch.no_grad():
            teacher = self.teacher(images).float()
        if self.kind == "soft":
            tau = self.tau
            divergence = F.kl_div(F.log_softmax(by_distillation / tau, dim=1), F.log_softmax(teacher / tau, dim=1),
                                  reduction="none", log_target=True)
            if self.weights is not None:
                divergence = divergence * self.weights(targets)[:, None]
            distillation = divergence.sum() * tau ** 2 / by_distillation.numel()
        else:
            distillation = self.mean(F.cross_entropy(by_distillation, teacher.argmax(dim=1), reduction=self.reduction), targets)
        return (1 - self.alpha) * self.mean(self.base(by_class, targets), targets) + self.alpha * distillation


class CosubLoss(Criterion):
    """Co-training of two submodels (arXiv:2212.04884): the model gets each image twice, stochastic depth picks two submodels, and
    each learns from the targets and from the other's probabilities.

    outputs: [2B, K], the first half from one submodel, the second from the other."""
    copies = 2

    def __init__(self, num_classes: int, smoothing: float, threshold: float | None = None,
                 weights: ClassWeights | None = None):
        super().__init__(weights)
        self.num_classes, self.smoothing, self.threshold = num_classes, smoothing, threshold

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        a, b = outputs.float().chunk(2)
        labels = targets
        if targets.ndim == 1:
            off = self.smoothing / self.num_classes
            targets = F.one_hot(targets, self.num_classes).to(a.dtype) * (1 - self.smoothing) + off
        if self.threshold is not None:
            targets = (targets > self.threshold).to(a.dtype)
        loss = partial(F.binary_cross_entropy_with_logits, reduction=self.reduction)
        return self.mean((loss(a, targets) + loss(b, targets)
                          + loss(a, b.detach().sigmoid()) + loss(b, a.detach().sigmoid())) / 4, labels)


def positive_threshold(args: Namespace, num_classes: int) -> float:
    """The threshold above which a target is positive with --bce-loss: mixup adds smoothing/K to all classes, so only classes in
    the image lie above it (with DeiT's `> 0` every class is positive)."""
    return args.smoothing / num_classes + 1e-4


def build_base_loss(args: Namespace, num_classes: int, mixup_active: bool, reduction: str = "mean") -> nn.Module:
    """The loss of logits and targets, without teacher or second submodel. reduction: "none" returns a loss per image."""
    if args.bce_loss:
        threshold = positive_threshold(args, num_classes) if mixup_active else None
        return BinaryCrossEntropy(smoothing=args.smoothing, target_threshold=threshold, reduction=reduction)
    if reduction == "none":     # timm's losses return the mean only
        return nn.CrossEntropyLoss(reduction="none", label_smoothing=0. if mixup_active else args.smoothing)
    if mixup_active:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def build_criterion(args: Namespace, num_classes: int, mixup_active: bool, teacher: Callable | None = None,
                    class_weights: Tensor | None = None) -> Criterion:
    """The criterion that the flags ask for.

    teacher: required if --distillation-type is soft or hard.
    class_weights: float32 [K], on the outputs' device (`ClassWeights`)."""
    weights = None if class_weights is None else ClassWeights(class_weights, args.smoothing)
    if args.cosub:
        return CosubLoss(num_classes, args.smoothing, positive_threshold(args, num_classes) if args.bce_loss else None, weights)
    base = build_base_loss(args, num_classes, mixup_active, "mean" if weights is None else "none")
    if args.distillation_type != "none":
        assert teacher is not None
        return DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau, weights)
    return ClassLoss(base, weights)
