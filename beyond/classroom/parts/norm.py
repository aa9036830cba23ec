"""The part `RMSNorm`: probes, and wrong variants."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.classroom.adapters import make_norm, refuse_unwritten
from beyond.classroom.part import Observations, Observed, Part, Variant, expect_tensor
from beyond.classroom.parts.probes import FAILED, attempt, entry, normal
from beyond.classroom.student import Student
from llama import RMSNorm

DIM = 8
Build = Callable[[RMSNorm], Callable[[Tensor], Tensor]]  # an implementation with this one's gain
where = "llama.py, RMSNorm"


def observe(build: Build) -> Observations:
    """Normalise (batch, seq, dim), as in the model."""

    def run(x: Tensor, eps: float = 1e-6, gain: Tensor | None = None) -> Tensor:
        ours = RMSNorm(DIM, eps)
        if gain is not None:
            ours.weight.data.copy_(gain)
        return expect_tensor(build(ours)(x.clone()), "the output of RMSNorm").float()

    # Rows of different size, so that a mean over several rows shows.
    x = normal(2, 5, DIM, seed=1) * torch.linspace(1, 3, 10).reshape(2, 5, 1)
    shifted = (run(x + 1) - run(x)).abs().max() < 1e-3
    built = build(RMSNorm(DIM, 1e-6))
    is_layer_norm = type(built).__name__ == "LayerNorm" or hasattr(built, "bias")
    half = (100 * x).half()  # its squares overflow in float16
    found = attempt(lambda: run(half), "the output")
    if found is FAILED:  # the model never computes in float16
        found = F.rms_norm(half.float(), (DIM,))
    return {
        "output": Observed(run(x), 1e-4),
        "output with a gain": Observed(run(x, gain=normal(DIM, seed=2)), 1e-4),
        "output of small inputs": Observed(run(0.1 * x, eps=0.05), 1e-4),
        "output of zeros": Observed(run(torch.zeros_like(x)), 1e-4),
        # A right implementation may round its result to float16: 1/1000 of at most 2.8.
        "output of float16 inputs": Observed(found, 5e-3),
        "LayerNorm": Observed(torch.tensor(float(shifted and is_layer_norm)), 1e-3),
    }


def adapt(student: Student) -> Build:
    def build(ours: RMSNorm) -> nn.Module:
        theirs = make_norm(student, ours)
        for name in ("_norm", "norm"):
            refuse_unwritten(getattr(theirs, name, None), torch.ones(1, 1, DIM))
        return theirs

    return build


# --------------------------------------------------------------------- wrong variants


def mean(x: Tensor) -> Tensor:
    return x.mean(dim=-1, keepdim=True)


def norm(formula: Callable[[Tensor, float], Tensor]) -> Build:
    """Make a norm of another formula of x, in float32, and eps; the gain is applied."""
    return lambda ours: lambda x: formula(x.float(), ours.eps).type_as(x) * ours.weight


def gain(formula: Callable[[Tensor, Tensor], Tensor]) -> Build:
    """Make a norm that applies the gain in another way."""
    return lambda ours: lambda x: formula(ours.norm(x.float()).type_as(x), ours.weight)


def half_sums(ours: RMSNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: ours.norm(x) * ours.weight


def length_and_gain_twice(ours: RMSNorm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        length = x.float().norm(dim=-1, keepdim=True)
        return (x.float() * ours.weight / (length + ours.eps)).type_as(x) * ours.weight

    return forward


def layer_norm(x: Tensor, eps: float) -> Tensor:
    return (x - mean(x)) / (x.var(dim=-1, keepdim=True, correction=0) + eps).sqrt()


class LayerNorm(nn.Module):
    """The norm of Fall 2025."""

    def __init__(self, ours: RMSNorm) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        return norm(layer_norm)(self.ours)(x)


def torch_layer_norm(ours: RMSNorm) -> nn.Module:
    theirs = nn.LayerNorm(DIM, ours.eps)
    theirs.weight = ours.weight
    return theirs


VARIANTS: tuple[Variant, ...] = (
    entry(
        LayerNorm,
        where,
        "LayerNorm instead of RMSNorm",
        "The mean is subtracted, as in the editions of Fall 2025 and Spring 2026, where the class "
        "is called LayerNorm. In the other editions the norm is RMSNorm: "
        "x / sqrt(mean(x^2) + eps) * weight.",
        "zhulenghan/anlp-fall2025-hw1, Alva789ro/Min-Llama2",
        is_edition=True,
        others=(torch_layer_norm,),
    ),
    entry(
        norm(layer_norm),
        where,
        "subtracts the mean",
        "RMSNorm does not center: it divides x itself by sqrt(mean(x^2) + eps). What subtracts the "
        "mean and divides by the standard deviation is LayerNorm.",
    ),
    entry(
        norm(lambda x, eps: (x - mean(x)) / (mean(x.pow(2)) + eps).sqrt()),
        where,
        "subtracts the mean before dividing by the root mean square",
        "RMSNorm divides x itself; nothing is subtracted.",
    ),
    entry(
        norm(lambda x, eps: x / (x.var(dim=-1, keepdim=True, correction=0) + eps).sqrt()),
        where,
        "divides by the standard deviation",
        "The variance subtracts the mean; the mean square does not. "
        "Use x.pow(2).mean(-1, keepdim=True).",
    ),
    entry(
        norm(lambda x, eps: x / (x.var(dim=-1, keepdim=True) + eps).sqrt()),
        where,
        "divides by the standard deviation, over dim - 1",
        "torch.var subtracts the mean and divides by dim - 1. Use x.pow(2).mean(-1, keepdim=True).",
    ),
    entry(
        norm(lambda x, eps: (x - mean(x)) / (x.var(dim=-1, keepdim=True) + eps).sqrt()),
        where,
        "LayerNorm that divides by dim - 1",
        "torch.var and torch.std divide by dim - 1 unless unbiased=False. RMSNorm needs neither: "
        "it divides x by sqrt(mean(x^2) + eps).",
    ),
    entry(
        norm(lambda x, eps: x / (x.pow(2).mean() + eps).sqrt()),
        where,
        "mean over the whole tensor",
        "The mean is taken over all tokens of the batch, so a token's value depends on the others "
        "and on the padding. Take it over the last axis: mean(-1, keepdim=True).",
        "madflytep/minllama-assignment: SST dev .359 instead of .414",
    ),
    entry(
        norm(lambda x, eps: x / (x.pow(2).mean(dim=1, keepdim=True) + eps).sqrt()),
        where,
        "mean over the sequence",
        "The mean is taken over the positions (axis 1). Take it over the features: "
        "mean(-1, keepdim=True).",
    ),
    entry(
        norm(lambda x, eps: x / (x.pow(2).sum(dim=-1, keepdim=True) + eps).sqrt()),
        where,
        "sum instead of mean",
        "The vector gets length 1 instead of a root mean square of 1, so it is too small by the "
        "root of dim. Take the mean of the squares.",
    ),
    entry(
        length_and_gain_twice,
        where,
        "divides by the length and applies the gain twice",
        "x is divided by the root of the sum of its squares instead of their mean, with eps added "
        "to the root, and _norm multiplies by the weight, which forward does again.",
        "alpotekhin/minllama-assignment",
    ),
    entry(
        norm(lambda x, eps: x / (mean(x.pow(2)) + eps)),
        where,
        "no square root",
        "x is divided by the mean square instead of its root.",
    ),
    entry(
        norm(lambda x, eps: x * (mean(x.pow(2)) + eps).sqrt()),
        where,
        "multiplies by the root instead of dividing",
        "The formula is x / sqrt(mean(x^2) + eps); torch.rsqrt gives the reciprocal of the root.",
    ),
    entry(
        norm(lambda x, eps: x / (mean(x.abs()) + eps)),
        where,
        "mean of absolute values instead of the root mean square",
        "Square, take the mean, then the root.",
    ),
    entry(
        norm(lambda x, eps: x / (mean(x).pow(2) + eps).sqrt()),
        where,
        "square of the mean instead of mean of the squares",
        "Square first, then take the mean.",
    ),
    entry(
        norm(lambda x, eps: x / (mean(x.pow(2)).sqrt() + eps)),
        where,
        "eps outside the root",
        "eps belongs inside the root: sqrt(mean(x^2) + eps). Outside it hardly counts, and the "
        "course's reference values differ where a vector is small.",
    ),
    entry(
        norm(lambda x, eps: x * mean(x.pow(2)).rsqrt()),
        where,
        "no eps",
        "A vector of zeros gives 0 / 0 = NaN. Add eps inside the root.",
    ),
    entry(
        norm(lambda x, eps: x * (mean(x.pow(2)) + 1e-6).rsqrt()),
        where,
        "ignores the argument eps",
        "A fixed small number takes its place. Use self.eps; the course's checkpoint has 1e-5.",
    ),
    entry(
        gain(lambda x, weight: x),
        where,
        "no gain",
        "The learned weight is not applied. It is all ones in a new model, so only a trained "
        "checkpoint shows it. Multiply by self.weight.",
    ),
    entry(
        gain(lambda x, weight: x * weight * weight),
        where,
        "gain applied twice",
        "_norm only normalises; forward multiplies by self.weight. One of the two is too many.",
    ),
    entry(
        gain(lambda x, weight: x * (1 + weight)),
        where,
        "gain of 1 + weight",
        "Gemma stores the gain minus one; Llama multiplies by the weight itself.",
    ),
    entry(
        gain(lambda x, weight: x + weight),
        where,
        "gain added instead of multiplied",
        "Multiply by self.weight.",
    ),
    entry(
        half_sums,
        where,
        "sums in half precision",
        "The squares are summed in the dtype of x. In float16 they overflow above 255, and the "
        "result is 0. Convert x to float32 first, and the result back.",
    ),
)

PART = Part("RMSNorm", where, lambda ours: ours, VARIANTS, observe, adapt)
