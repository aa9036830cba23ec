"""The part `RMSNorm`: probes, and wrong variants."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.classroom.adapters import make_norm, refuse_unwritten
from beyond.classroom.part import Observations, Observed, Part, Variant, expect_tensor
from beyond.classroom.parts.probes import (
    BROKEN,
    FAILED,
    NO_GRADIENT,
    attempt,
    broken,
    entry,
    gradients,
    keep_changes,
    normal,
)
from beyond.classroom.student import Student
from llama import RMSNorm

DIM = 8
Build = Callable[[RMSNorm], Callable[[Tensor], Tensor]]  # an implementation with this one's gain
WHERE = "llama.py, RMSNorm"


def observe(build: Build) -> Observations:
    """Normalise (batch, seq, dim), as in the model."""

    def run(x: Tensor, eps: float = 1e-6, gain: Tensor | None = None) -> Tensor:
        ours = RMSNorm(DIM, eps)
        if gain is not None:
            ours.weight.data.copy_(gain)
        return expect_tensor(build(ours)(x.clone()), "the output of RMSNorm").float()

    def changes_input() -> bool:
        given = x.clone()
        build(RMSNorm(DIM, 1e-6))(given)
        return not torch.equal(given, x)

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
        "output of tiny inputs, eps of 1e-5": Observed(run(1e-3 * x, eps=1e-5), 1e-4),
        "output of large inputs": Observed(run(1e7 * x), 1e-4),
        "output of zeros": Observed(run(torch.zeros_like(x)), 1e-4),
        # A right implementation may round its result to float16: 1/1000 of at most 2.8.
        "output of float16 inputs": Observed(found, 5e-3),
        "the input is changed": Observed(torch.tensor(float(changes_input())), 1e-3),
        **gradients(lambda x: (build(RMSNorm(DIM, 1e-6).train())(x),), {"the input": x}),
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


def variance(x: Tensor, correction: int = 0) -> Tensor:
    return x.var(dim=-1, keepdim=True, correction=correction)


@keep_changes
def variant(
    center: Callable[[Tensor], Tensor] = lambda x: x,
    moment: Callable[[Tensor], Tensor] = lambda x: mean(x.pow(2)),
    root: Callable[[Tensor, float], Tensor] = lambda moment, eps: (moment + eps).sqrt(),
    gain: Callable[[Tensor, Tensor], Tensor] = lambda x, weight: x * weight,
    cast: Callable[[Tensor], Tensor] = lambda x: x.float(),
) -> Build:
    """Make gain(center(x) / root(moment(x))) with one step changed; by default it is right."""

    def build(ours: RMSNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = cast(x)
            return gain((center(y) / root(moment(y), ours.eps)).type_as(x), ours.weight)

        return forward

    return build


def subtract_mean(x: Tensor) -> Tensor:
    return x - mean(x)


class LayerNorm(nn.Module):
    """The norm of Fall 2025."""

    def __init__(self, ours: RMSNorm) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        return variant(subtract_mean, variance)(self.ours)(x)


def torch_layer_norm(ours: RMSNorm) -> nn.Module:
    theirs = nn.LayerNorm(DIM, ours.eps)
    theirs.weight = ours.weight
    return theirs


def fixed_eps(eps: float) -> Build:
    return variant(root=lambda moment, _: (moment + eps).sqrt())


def without_gradient(ours: RMSNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: ours.norm(x).detach() * ours.weight


def in_place(ours: RMSNorm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = x.float()  # x itself if it is float32
        y *= torch.rsqrt(mean(y.pow(2)) + ours.eps)
        return y.type_as(x) * ours.weight

    return forward


def in_place_unseen_by_autograd(ours: RMSNorm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = ours(x.clone())
        x.data.copy_(y)
        return y

    return forward


VARIANTS: tuple[Variant, ...] = (
    entry(
        LayerNorm,
        WHERE,
        "LayerNorm instead of RMSNorm",
        "The mean is subtracted, as in the editions of Fall 2025 and Spring 2026, where the class "
        "is called LayerNorm. In the other editions the norm is RMSNorm: "
        "x / sqrt(mean(x^2) + eps) * weight.",
        "zhulenghan/anlp-fall2025-hw1, Alva789ro/Min-Llama2",
        is_edition=True,
        others=(torch_layer_norm,),
    ),
    entry(
        variant(subtract_mean, variance),
        WHERE,
        "subtracts the mean",
        "RMSNorm does not center: it divides x itself by sqrt(mean(x^2) + eps). What subtracts the "
        "mean and divides by the standard deviation is LayerNorm.",
    ),
    entry(
        variant(center=subtract_mean),
        WHERE,
        "subtracts the mean before dividing by the root mean square",
        "RMSNorm divides x itself; nothing is subtracted.",
    ),
    entry(
        variant(moment=variance),
        WHERE,
        "divides by the standard deviation",
        "The variance subtracts the mean; the mean square does not. "
        "Use x.pow(2).mean(-1, keepdim=True).",
    ),
    entry(
        variant(moment=lambda x: variance(x, 1)),
        WHERE,
        "divides by the standard deviation, over dim - 1",
        "torch.var subtracts the mean and divides by dim - 1. Use x.pow(2).mean(-1, keepdim=True).",
    ),
    entry(
        variant(subtract_mean, lambda x: variance(x, 1)),
        WHERE,
        "LayerNorm that divides by dim - 1",
        "torch.var and torch.std divide by dim - 1 unless unbiased=False. RMSNorm needs neither: "
        "it divides x by sqrt(mean(x^2) + eps).",
    ),
    entry(
        variant(moment=lambda x: x.pow(2).mean()),
        WHERE,
        "mean over the whole tensor",
        "The mean is taken over all tokens of the batch, so a token's value depends on the others "
        "and on the padding. Take it over the last axis: mean(-1, keepdim=True).",
        "madflytep/minllama-assignment: SST dev .359 instead of .414",
    ),
    entry(
        variant(moment=lambda x: x.pow(2).mean(dim=1, keepdim=True)),
        WHERE,
        "mean over the sequence",
        "The mean is taken over the positions (axis 1). Take it over the features: "
        "mean(-1, keepdim=True).",
    ),
    entry(
        variant(moment=lambda x: x.pow(2).sum(dim=-1, keepdim=True)),
        WHERE,
        "sum instead of mean",
        "The vector gets length 1 instead of a root mean square of 1, so it is too small by the "
        "root of dim. Take the mean of the squares.",
    ),
    entry(
        variant(
            moment=lambda x: x.pow(2).sum(dim=-1, keepdim=True),
            root=lambda moment, eps: moment.sqrt() + eps,
            gain=lambda x, weight: x * weight * weight,
        ),
        WHERE,
        "divides by the length and applies the gain twice",
        "x is divided by the root of the sum of its squares instead of their mean, with eps added "
        "to the root, and _norm multiplies by the weight, which forward does again.",
        "alpotekhin/minllama-assignment",
    ),
    entry(
        variant(root=lambda moment, eps: moment + eps),
        WHERE,
        "no square root",
        "x is divided by the mean square instead of its root.",
    ),
    entry(
        variant(root=lambda moment, eps: 1 / (moment + eps).sqrt()),
        WHERE,
        "multiplies by the root instead of dividing",
        "The formula is x / sqrt(mean(x^2) + eps); torch.rsqrt gives the reciprocal of the root.",
    ),
    entry(
        variant(moment=lambda x: mean(x.abs()), root=lambda moment, eps: moment + eps),
        WHERE,
        "mean of absolute values instead of the root mean square",
        "Square, take the mean, then the root.",
    ),
    entry(
        variant(moment=lambda x: mean(x).pow(2)),
        WHERE,
        "square of the mean instead of mean of the squares",
        "Square first, then take the mean: x.pow(2).mean(-1, keepdim=True).",
        others=(variant(moment=lambda x: x.mean().pow(2)),),
    ),
    entry(
        variant(root=lambda moment, eps: moment.sqrt() + eps),
        WHERE,
        "eps outside the root",
        "eps belongs inside the root: sqrt(mean(x^2) + eps). Outside it hardly counts, and the "
        "course's reference values differ where a vector is small.",
        "vktrbr/minllama-assignment",
    ),
    entry(
        variant(root=lambda moment, eps: moment.sqrt()),
        WHERE,
        "no eps",
        "A vector of zeros gives 0 / 0 = NaN. Add eps inside the root.",
    ),
    entry(
        fixed_eps(1e-6),
        WHERE,
        "ignores the argument eps",
        "A fixed small number takes its place. Use self.eps; the course's checkpoint has 1e-5.",
        others=tuple(fixed_eps(eps) for eps in (1e-8, 1e-12, 1e-10, 1e-7, 1e-4, 1e-3)),
    ),
    entry(
        fixed_eps(1e-5),
        WHERE,
        "adds 1e-5 whatever eps is",
        "The course's model uses this value, but others do not; use self.eps.",
        is_note=True,
    ),
    entry(
        variant(gain=lambda x, weight: x),
        WHERE,
        "no gain",
        "The learned weight is not applied. It is all ones in a new model, so only a trained "
        "checkpoint shows it. Multiply by self.weight.",
    ),
    entry(
        variant(gain=lambda x, weight: x * weight * weight),
        WHERE,
        "gain applied twice",
        "_norm only normalises; forward multiplies by self.weight. One of the two is too many.",
    ),
    entry(
        variant(gain=lambda x, weight: x * (1 + weight)),
        WHERE,
        "gain of 1 + weight",
        "Gemma stores the gain minus one; Llama multiplies by the weight itself.",
    ),
    entry(
        variant(gain=lambda x, weight: x + weight),
        WHERE,
        "gain added instead of multiplied",
        "Multiply by self.weight.",
    ),
    entry(
        variant(cast=lambda x: x),
        WHERE,
        "sums in half precision",
        "The squares are summed in the dtype of x. In float16 they overflow above 255, and the "
        "result is 0. Convert x to float32 first, and the result back.",
        "PRESIDENT810/minllama-assignment",
    ),
    entry(
        variant(root=lambda moment, eps: (moment + eps).sqrt().half().float()),
        WHERE,
        "root rounded to half precision",
        "Only three digits of the root are left, and small or large ones become 0 or infinite. "
        "Compute in float32, and convert the result back at the end.",
        others=(variant(root=lambda moment, eps: 1 / (moment + eps).rsqrt().half().float()),),
    ),
    entry(
        without_gradient,
        WHERE,
        "no gradient for the input",
        NO_GRADIENT,
        others=(variant(root=lambda moment, eps: (moment + eps).sqrt().detach()),),
    ),
    entry(
        lambda ours: lambda x: broken(ours(x)),
        WHERE,
        "an in-place operation breaks the gradient",
        BROKEN,
    ),
    entry(
        in_place,
        WHERE,
        "changes its input in place",
        "x *= ... or x.div_(...) changes the tensor that the layer adds later, so the residual "
        "stream is normalised too, and the backward pass fails. x.float() makes no copy of a "
        "float32 tensor. Return a new tensor: x * torch.rsqrt(...).",
        others=(in_place_unseen_by_autograd,),
    ),
)

PART = Part("RMSNorm", WHERE, lambda ours: ours, VARIANTS, observe, adapt, variant)
