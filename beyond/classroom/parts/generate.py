"""`Llama.generate`: the next token at temperature 0 and above, the context, and the result.

The model's `forward` is replaced by fixed logits, so a batch of 10,000 equal rows shows the
distribution that a token is drawn from. If several rows end in an error, 2,000 single rows do.

False alarms: a right implementation fails a probe by chance less than once in 1e9 checks.
- Frequencies are compared with those of our part. Hoeffding: the share of a token among n rows is
  off by more than t with probability at most 2 exp(-2 n t^2). That is below 2e-11 for our 10,000
  rows with t = 0.036 and for 2,000 rows with t = 0.08, and there are 20 shares on each side. The
  tolerance is the sum of both t.
- `drawn` says which tokens more than 1 % of the rows draw. The logits are such that a token's
  probability, in our part and in every variant, is below 0.4 % or above 2.5 %; in our part below
  1e-5 or above 15 %. Chernoff: the other side of 1 % has probability at most exp(-n KL(0.01, p)):
  1e-13 for 10,000 rows, and for 2,000 rows of a right part 1e-100.
- Of 250 tokens with probability 1/500 each, 4,000 rows miss 8 (3 %) with probability 1e-12.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.classroom.adapters import find, make_config
from beyond.classroom.part import AdaptError, Observations, Observed, Part, expect_tensor
from beyond.classroom.parts.generate_mistakes import (
    VARIANTS,
    WHERE,
    Forward,
    Make,
    combine,
    make_with,
)
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import Llama

ROWS, ALONE = 10000, 2000
TAIL = 250  # tokens
EXACT, FREQUENCY = 1e-3, 0.116  # tolerances of whole numbers and of frequencies
FLAT = torch.tensor([0.3, 0.26, 0.24, 0.2]).log() + 3  # above 0, as all logits here
# (temperature, logits): token 0 is far below the others, which have nearly equal logits. What is
# likely is so likely that no usual top-k or top-p cuts it off; these show in the last probe only.
UNLIKELY = {
    "temperature 1": (1.0, torch.tensor([20.0, 50.0, 50.2, 49.9])),
    "temperature 0.05": (0.05, torch.tensor([0.5, 2.0, 2.01, 1.99])),
    "temperature 0.2": (0.2, torch.tensor([0.05, 9.05, 9.08, 9.03])),
    "temperature 20": (20.0, torch.tensor([0.05, 9.05, 9.08, 9.03])),
}
NOT_MEASURED = -1.0


def adapt(student: Student) -> Make:
    """Return a function that makes the student's model with another `forward`."""
    cls = find(student, "llama", "Llama")

    def make(forward: Forward, config: LlamaConfig) -> nn.Module:
        model = cls(make_config(student, config))
        vars(model)["forward"] = forward
        return model

    return make


class Fixed:
    """A model with fixed logits.

    Args:
        logits: (vocab,) for all steps and rows, or a function from the tokens (batch, seq) to
            (batch, vocab).
    """

    def __init__(
        self, make: Make, logits: Tensor | Callable[[Tensor], Tensor], vocab_size: int
    ) -> None:
        self.logits = logits
        self.contexts: list[Tensor] = []  # what the model was given
        self.config = LlamaConfig(vocab_size, 4, 1, 2, hidden_dim=4, max_seq_len=8)
        self.model = make(self._forward, self.config)

    def _forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *args: object,
        positions: object = None,  # our own names the last column
        **options: object,
    ) -> tuple[Tensor, Tensor]:
        if any(value is not None for value in (*args, *options.values())):
            raise AdaptError(
                "generate hands the model more than tokens (a cache or a mask?), which cannot be "
                "checked"
            )
        self.contexts.append(F.pad(tokens, (0, max(0, 20 - tokens.shape[1])), value=NOT_MEASURED))
        last = self.logits(tokens) if callable(self.logits) else self.logits.expand(len(tokens), -1)
        columns = 1 if targets is None else tokens.shape[1]
        hidden = torch.zeros(*tokens.shape, self.config.dim)
        return last[:, None].expand(-1, columns, -1).clone(), hidden

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float) -> Tensor:
        """Generate from a context; returns what the model returns."""
        try:
            result = cast(Any, self.model).generate(idx.clone(), max_new_tokens, temperature)
        except TypeError as error:
            if "but got NoneType" in str(error):  # torch.cat of a token that was not chosen
                raise NotImplementedError("the next token is None") from error
            raise
        return expect_tensor(result, "the result of generate")

    def divides_by_zero(self) -> bool:
        """Say whether generating at temperature 0 ends in an error for want of a case for it."""
        try:
            self.generate(torch.tensor([[4, 6, 5]]), 1, 0.0)
        except ZeroDivisionError:
            return True
        except (RuntimeError, ValueError) as error:  # of torch.multinomial, of Categorical
            text = str(error)
            return "probability tensor contains" in text or "nan" in text and "to satisfy" in text
        return False

    def draw(self, temperature: float, rows: int, is_batch: bool) -> Tensor:
        """Generate one token for each of many rows, (rows,), at once or one row at a time."""
        context = torch.ones(rows, 2, dtype=torch.long)
        parts = [context] if is_batch else context.split(1)
        return torch.cat([self.generate(part, 1, temperature)[:, -1] for part in parts])

    def try_rows(self, idx: Tensor, max_new_tokens: int, temperature: float) -> Tensor | None:
        """Generate for several rows; returns None if that ends in an error."""
        try:
            return self.generate(idx, max_new_tokens, temperature)
        except (RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError):
            return None


def chained(tokens: Tensor) -> Tensor:
    """Compute logits of 7 tokens that make the row's number and the last token choose the next."""
    rows = torch.arange(len(tokens))
    chosen = (3 * tokens[:, -1] + rows + 1) % 7  # from 5 in row 0: 2, 0, 1, 4, 6, 5, 2, ...
    return F.one_hot(chosen, 7) * 30.0 + torch.arange(7) / 10


def observe(make: Make) -> Observations:
    """Generate from fixed logits: single rows, long contexts, and many rows at once."""
    short = Fixed(make, chained, 7)
    short.model.train()
    # At a temperature of 1, nearly always the same tokens are drawn as at 0.
    cold = 1.0 if Fixed(make, chained, 7).divides_by_zero() else 0.0
    greedy = short.generate(torch.tensor([[4, 6, 5]]), 5, cold)
    modes = [short.model.training]
    short.model.eval()
    sampled = short.generate(torch.tensor([[4, 6, 5]]), 4, 1.0)
    modes.append(short.model.training)
    # 11 tokens, for a model with max_seq_len 8
    long = torch.randint(7, (1, 11), generator=torch.Generator().manual_seed(1))
    growing, cropped = Fixed(make, chained, 7), Fixed(make, chained, 7)
    growing.generate(long[:, :6], 4, cold)
    found = {
        "temperature 0 is possible": torch.tensor(cold == 0),
        "tokens at temperature 0": greedy,
        "shape of the result at temperature 1": torch.tensor(sampled.shape),
        "the contexts of a growing row": stack(growing.contexts),
        "the result for a row longer than max_seq_len": cropped.generate(long, 2, cold),
        "the contexts of a row longer than max_seq_len": stack(cropped.contexts),
        "training mode afterwards, before and not before": torch.tensor(modes),
    }
    exact = {name: Observed(value, EXACT) for name, value in found.items()}
    return exact | observe_rows(make, cold)


def stack(contexts: list[Tensor]) -> Tensor:
    """Stack what a model was given in each step, (steps, batch, 20)."""
    return torch.stack(contexts) if contexts else torch.zeros(0)


def observe_rows(make: Make, cold: float) -> dict[str, Observed]:
    """Generate for several rows; -1 stands for what cannot be measured.

    Args:
        make: makes the model.
        cold: 0, or the temperature that is used instead if 0 is an error.
    """
    rows = Fixed(make, chained, 7).try_rows(torch.tensor([[5], [3], [6]]), 3, cold)
    kinds = torch.tensor([[50.0] * 4 + [20.0] * 4, [20.0] * 4 + [50.0] * 4])
    mixed = Fixed(make, lambda tokens: kinds[tokens[:, 0]], 8)
    result = mixed.try_rows(torch.arange(2).repeat(ROWS // 2)[:, None], 1, 1.0)
    if result is None:
        first, second = (Fixed(make, kind, 8).draw(1.0, ALONE, False) for kind in kinds)
    else:
        first, second = result[:, -1].view(-1, 2).unbind(-1)
    differ = bool((first != first[0]).any())
    own = bool(((first < 4) & (second >= 4)).double().mean() > 0.99)
    missing = torch.full((3, 4), NOT_MEASURED)
    exact = {
        "tokens of several rows at temperature 0": missing if rows is None else rows,
        "several rows work at temperature 1": torch.tensor(result is not None),
        "equal rows get different tokens at temperature 1": torch.tensor(differ),
        "each row's tokens are its own": torch.tensor(own),
    }
    found = {name: Observed(value, EXACT) for name, value in exact.items()}
    settings = {"temperature 0": (0.0, FLAT), "likely tokens": (1.0, FLAT), **UNLIKELY}
    for name, (temperature, logits) in settings.items():
        shares = torch.full((4,), NOT_MEASURED)
        if differ if temperature else cold == 0:
            is_batch = result is not None if temperature else rows is not None
            fixed = Fixed(make, logits, 4)
            shares = share(fixed.draw(temperature, ROWS if is_batch else ALONE, is_batch), 4)
        if temperature:
            found[f"frequencies at {name}"] = Observed(shares, FREQUENCY)
        found[f"drawn at {name}"] = Observed(
            torch.where(shares < 0, shares, (shares > 0.01).double()), EXACT
        )
    value = observe_tail(make, result is not None) if differ else torch.full((3,), NOT_MEASURED)
    found["unlikely tokens: some drawn, all drawn, fewer if less likely"] = Observed(value, EXACT)
    return found


def observe_tail(make: Make, is_batch: bool) -> Tensor:
    """Say whether 250 unlikely tokens are drawn that together have 1/2, or 1/10, of a draw.

    Returns:
        (3,): some of them are; all are; top-p keeps a smaller share of them in the second case,
        and top-k does not.
    """
    shares = []
    for ratio, rows in ((1, 4000), (9, 12000)):  # between the likely token and all others
        logits = 1 + torch.arange(TAIL + 1) * 1e-4  # no two equal, so that a top-k can cut
        logits[0] += torch.tensor(TAIL * ratio).log()
        tokens = Fixed(make, logits, TAIL + 1).draw(1.0, rows, is_batch)
        shares.append(float((share(tokens, TAIL + 1)[1:] > 0).double().mean()))
        if shares[0] > 0.97:
            return torch.tensor([1.0, 1.0, 0.0])
    return torch.tensor([shares[0] > 0, 0.0, shares[1] < 0.9 * shares[0]])


def share(tokens: Tensor, vocab_size: int) -> Tensor:
    """Compute the share of each token, (vocab_size,)."""
    return (tokens.view(-1, 1) == torch.arange(vocab_size)).double().mean(dim=0)


PART = Part("generate", WHERE, make_with(Llama), VARIANTS, observe, adapt, combine)
