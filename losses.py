"""What a training step minimises: `build_criterion` chooses it from the flags.

Every criterion is called as `criterion(images, outputs, targets)`. Targets are class indices int64 [B] or, after
mixup, probabilities float [B, K].
"""
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F


class ClassWeights(nn.Module):
    """What an image's loss counts in a batch's mean: float32 [B] by its class, for a mixed image by the shares of its classes.

    The image is weighted as a whole, with its smoothing and whatever it learns from a teacher: as if it were drawn so much more
    often, but with the order of the images as it is. To weight each class's term instead would raise the smoothing's share of
    rare classes, too, until they win on any image.

    Args:
        of_class: float32 [K]. smoothing: that targets [B, K] have in them.
    """

    def __init__(self, of_class: Tensor, smoothing: float):
        super().__init__()
        self.of_class, self.smoothing = of_class, smoothing

    def forward(self, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            return self.of_class[targets]
        return (targets - self.smoothing / len(self.of_class)) / (1 - self.smoothing) @ self.of_class


def balanced(counts: np.ndarray) -> np.ndarray:
    """A weight for each class, inverse to its number of images (scikit-learn's "balanced"): n / (classes * count), float32 [K],
    so that all classes count alike and an image counts 1 on average. 0 for a class without images."""
    present = counts > 0
    return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0).astype(np.float32)


class Criterion(nn.Module):
    """Called as criterion(images, outputs, targets)."""
    copies = 1      # how often the model sees each image of a batch

    def __init__(self, weights: ClassWeights | None = None):
        super().__init__()
        self.weights = weights
        self.reduction = "mean" if weights is None else "none"      # of the losses that `mean` is given

    def mean(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Over the batch. losses: their mean already, or, where images have weights, [B] or [B, K]."""
        if self.weights is None:
            return losses
        return (losses.reshape(len(losses), -1).mean(1) * self.weights(targets)).mean()


class ClassLoss(Criterion):
    """A loss of logits [B, K] and targets."""

    def __init__(self, loss: nn.Module, weights: ClassWeights | None = None):
        super().__init__(weights)
        self.loss = loss

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mean(self.loss(outputs, targets), targets)


class Teacher(nn.Module):
    """A teacher that gets its images at its own size and with its own mean and deviation.

    The batch itself is resized and scaled on its device, after mixup and erasing: so teacher and student see the same, nothing is
    drawn at random, and a resume or another number of processes changes nothing.

    Args:
        model: images float32 [B, 3, h, w] of `size` (height, width), normalised by mean and std, to logits.
        mean, std: of the teacher; students_mean, students_std: of what it is called with, [B, 3, H, W]."""
    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, size: tuple[int, int], mean: Sequence[float], std: Sequence[float],
                 students_mean: Sequence[float], students_std: Sequence[float]):
        super().__init__()
        self.model, self.size = model, size
        own, students = torch.tensor([list(mean), list(std)]), torch.tensor([list(students_mean), list(students_std)])
        self.same = bool((own == students).all())
        self.register_buffer("scale", (students[1] / own[1]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((students[0] - own[0]) / own[1]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images if self.same else images * self.scale + self.shift)


class DistillationLoss(Criterion):
    """(1 - alpha) * loss on the class token + alpha * loss of the distillation token against a teacher
    (arXiv:2012.12877, section 4).

    The soft loss is the Kullback-Leibler divergence at temperature tau, times tau^2, divided by the number of
    logits B*K as in DeiT's code (K times less than the batch mean: choose alpha for that).

    Args:
        base: loss of logits [B, K] and targets. teacher: gives logits [B, K], is never trained.
        kind: "soft" or "hard" (cross-entropy with the teacher's first choice).
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
    """Co-training of two submodels (arXiv:2212.04884): the model sees each image twice, its stochastic depth
    picks two submodels, and each learns from the targets and from the other's probabilities.

    outputs [2B, K]: the first half from one submodel, the second from the other."""
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
    """What a target must exceed to count as positive with --bce-loss: mixup spreads smoothing/K over all classes,
    and only what lies above it was in the image (DeiT's `> 0` makes every class positive)."""
    return args.smoothing / num_classes + 1e-4


def build_base_loss(args: Namespace, num_classes: int, mixup_active: bool, reduction: str = "mean") -> nn.Module:
    """The loss of logits and targets without teacher or second submodel. reduction: "none" gives it for each image."""
    if args.bce_loss:
        threshold = positive_threshold(args, num_classes) if mixup_active else None
        return BinaryCrossEntropy(smoothing=args.smoothing, target_threshold=threshold, reduction=reduction)
    if reduction == "none":     # timm's have the mean only
        return nn.CrossEntropyLoss(reduction="none", label_smoothing=0. if mixup_active else args.smoothing)
    if mixup_active:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def build_criterion(args: Namespace, num_classes: int, mixup_active: bool, teacher: Callable | None = None,
                    class_weights: Tensor | None = None) -> Criterion:
    """The criterion that the flags ask for; `teacher` where --distillation-type is soft or hard.

    class_weights: float32 [K], on the outputs' device (`ClassWeights`)."""
    weights = None if class_weights is None else ClassWeights(class_weights, args.smoothing)
    if args.cosub:
        return CosubLoss(num_classes, args.smoothing, positive_threshold(args, num_classes) if args.bce_loss else None, weights)
    base = build_base_loss(args, num_classes, mixup_active, "mean" if weights is None else "none")
    if args.distillation_type != "none":
        assert teacher is not None
        return DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau, weights)
    return ClassLoss(base, weights)


def loss_of(net: nn.Module, criterion: Criterion, images: Tensor, targets: Tensor) -> Tensor:
    """The criterion's loss of a batch, scalar. It sees logits in float32: one tensor, or the class and distillation tokens'
    pair."""
    outputs = net(images if criterion.copies == 1 else torch.cat([images] * criterion.copies))
    outputs = outputs.float() if isinstance(outputs, Tensor) else tuple(output.float() for output in outputs)
    return criterion(images, outputs, targets)
