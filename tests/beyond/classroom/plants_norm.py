"""Mistakes planted in `RMSNorm`."""

from collections.abc import Iterator

from tests.beyond.classroom.planting import Plant

OURS_NORM_LINE = "return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)"
COURSE_NORM_LINE = "rms = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)"
# Each formula of x divides it by `rms`; `x` may be changed before.
NORMS: tuple[tuple[str, str], ...] = (
    (
        "subtracts the mean",
        "x = x - x.mean(-1, True); rms = (x.pow(2).mean(-1, True) + self.eps).sqrt()",
    ),
    (
        "subtracts the mean before dividing by the root mean square",
        "rms = (x.pow(2).mean(-1, True) + self.eps).sqrt(); x = x - x.mean(-1, True)",
    ),
    (
        "divides by the standard deviation",
        "rms = torch.sqrt(x.var(dim=-1, keepdim=True, unbiased=False) + self.eps)",
    ),
    (
        "divides by the standard deviation, over dim - 1",
        "rms = torch.sqrt(x.var(dim=-1, keepdim=True) + self.eps)",
    ),
    (
        "LayerNorm that divides by dim - 1",
        "rms = torch.sqrt(x.var(dim=-1, keepdim=True) + self.eps); x = x - x.mean(-1, True)",
    ),
    ("mean over the whole tensor", "rms = torch.sqrt(torch.mean(x**2) + self.eps)"),
    ("mean over the sequence", "rms = torch.sqrt(x.pow(2).mean(dim=1, keepdim=True) + self.eps)"),
    ("sum instead of mean", "rms = torch.sqrt((x * x).sum(dim=-1, keepdim=True) + self.eps)"),
    (
        "divides by the length and applies the gain twice",
        "rms = (x.norm(p=2, dim=-1, keepdim=True) + self.eps).clamp(min=self.eps) / self.weight",
    ),
    ("no square root", "rms = x.pow(2).mean(dim=-1, keepdim=True) + self.eps"),
    (
        "multiplies by the root instead of dividing",
        "rms = 1 / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)",
    ),
    (
        "mean of absolute values instead of the root mean square",
        "rms = x.abs().mean(dim=-1, keepdim=True) + self.eps",
    ),
    (
        "square of the mean instead of mean of the squares",
        "rms = torch.sqrt(x.mean(dim=-1, keepdim=True) ** 2 + self.eps)",
    ),
    ("eps outside the root", "rms = x.pow(2).mean(dim=-1, keepdim=True).sqrt() + self.eps"),
    ("no eps", "rms = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True))"),
    ("ignores the argument eps", "rms = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)"),
    ("ignores the argument eps", "rms = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-8)"),
    ("adds 1e-5 whatever eps is", "rms = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-5)"),
    (
        "square of the mean instead of mean of the squares",
        "rms = torch.sqrt(torch.mean(x) ** 2 + self.eps)",
    ),
    (
        "root rounded to half precision",
        "rms = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps).half()",
    ),
    (
        "no gradient for the input",
        "rms = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps).detach()",
    ),
    (
        "no gradient for the input",
        "with torch.no_grad():; "
        "    x = x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps); "
        "rms = 1",
    ),
    (
        "changes its input in place",
        "x *= torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps); rms = 1",
    ),
    (
        "an in-place operation breaks the gradient",
        "rms = (x.pow(2).mean(-1, keepdim=True) + self.eps).log().div_(2).exp(); "
        "rms.clamp_(min=1e-9)",
    ),
)
OURS_GAIN = "return self.norm(x.float()).type_as(x) * self.weight"
COURSE_GAIN = "return output * self.weight"
GAINS: tuple[tuple[str, str], ...] = (  # of `output`
    ("no gain", "return output"),
    ("gain applied twice", "return output * self.weight * self.weight"),
    ("gain of 1 + weight", "return output * (1 + self.weight)"),
    ("gain added instead of multiplied", "return output + self.weight"),
)


def norm_plants() -> Iterator[Plant]:
    for entry, line in NORMS:
        line = line.replace("; ", "\n        ")
        yield Plant("course", "RMSNorm", entry, "llama.py", COURSE_NORM_LINE, line)
        line += "\n        return x / rms"
        yield Plant("ours", "RMSNorm", entry, "llama.py", OURS_NORM_LINE, line)
    for entry, line in GAINS:
        yield Plant("course", "RMSNorm", entry, "llama.py", COURSE_GAIN, line)
        line = "output = self.norm(x.float()).type_as(x)\n        " + line
        yield Plant("ours", "RMSNorm", entry, "llama.py", OURS_GAIN, line)
    entry = "sums in half precision"
    yield Plant("ours", "RMSNorm", entry, "llama.py", "self.norm(x.float())", "self.norm(x)")
    yield Plant("course", "RMSNorm", entry, "llama.py", "self._norm(x.float())", "self._norm(x)")
    for dialect in ("ours", "course"):
        yield Plant(
            dialect,
            "RMSNorm",
            "LayerNorm instead of RMSNorm",
            "llama.py",
            "class Attention(",
            "class RMSNorm(nn.LayerNorm):\n"
            "    def __init__(self, dim, eps):\n"
            "        super().__init__(dim, eps)\n\n\n"
            "class Attention(",
        )


PLANTS: tuple[Plant, ...] = tuple(norm_plants())
