"""`Llama.generate`: the next token at temperature 0 and above, the context, and the result.

The model's `forward` is replaced by fixed logits, so a batch of 10,000 equal rows shows the
distribution that a token is drawn from.

False alarms: a right implementation fails a probe by chance less than once in 1e9 checks.
- Frequencies are compared with those of another sample. Hoeffding: the share of a token among n
  rows is off by more than t with probability at most 2 exp(-2 n t^2). With n = 10,000 and t = 0.036
  that is 1.1e-11 for one share; 20 shares of two samples give 4.5e-10. The tolerance is 2 t.
- `drawn` says which tokens more than 1 % of the rows draw. The logits are such that a token's
  probability, in our part and in every variant, is below 0.4 % or above 2.5 %. Chernoff: the other
  side of 1 % has probability at most exp(-n KL(0.01, p)) < 1e-13.
- Of 250 tokens with probability about 1/500 each, 4,000 rows miss one with probability 4e-4, and
  8 of them, 3 %, with probability below 1e-12.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.classroom.adapters import find, make_config
from beyond.classroom.part import AdaptError, Observations, Observed, Part, expect_tensor
from beyond.classroom.parts.generate_mistakes import VARIANTS, WHERE, Forward, Make, make_with
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import Llama

ROWS = 10000
TAIL_ROWS, TAIL = 4000, 250
EXACT, FREQUENCY = 1e-3, 0.072  # tolerances of whole numbers and of frequencies
FLAT = torch.tensor([0.3, 0.26, 0.24, 0.2]).log() + 3  # above 0, as all logits here
# (temperature, logits): token 0 is far below the others, which have nearly equal logits. What is
# likely is so likely that no usual top-k or top-p cuts it off; these show in the last probe only.
UNLIKELY = {
    "temperature 1": (1.0, (20.0, 50.0, 50.2, 49.9)),
    "temperature 0.05": (0.05, (0.5, 2.0, 2.01, 1.99)),
    "temperature 0.2": (0.2, (0.05, 9.05, 9.08, 9.03)),
    "temperature 20": (20.0, (0.05, 9.05, 9.08, 9.03)),
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


class Generated:
    """One call of `generate` with fixed logits.

    Args:
        logits: (batch, vocab) for all steps, or a function of the tokens (batch, seq).
        is_training: the mode in which it is called.
    """

    def __init__(
        self,
        make: Make,
        logits: Tensor | Callable[[Tensor], Tensor],
        idx: Tensor,
        max_new_tokens: int,
        temperature: float,
        vocab_size: int,
        is_training: bool = False,
    ) -> None:
        config = LlamaConfig(vocab_size, 4, 1, 2, hidden_dim=4, max_seq_len=8)
        contexts: list[Tensor] = []

        def forward(
            tokens: Tensor, targets: Tensor | None = None, *args: object, **options: object
        ) -> tuple[Tensor, Tensor]:
            if any(value is not None for value in (*args, *options.values())):
                raise AdaptError(
                    "generate hands the model more than tokens (a cache or a mask?), which cannot "
                    "be checked"
                )
            contexts.append(F.pad(tokens, (0, max(0, 20 - tokens.shape[1])), value=NOT_MEASURED))
            last = logits(tokens) if callable(logits) else logits.clone()
            columns = 1 if targets is None else tokens.shape[1]
            hidden = torch.zeros(*tokens.shape, config.dim)
            return last[:, None].expand(-1, columns, -1).clone(), hidden

        model = make(forward, config).train(is_training)
        generate = cast(Any, model).generate
        try:
            result = generate(idx.clone(), max_new_tokens, temperature)
        except TypeError as error:
            if "but got NoneType" in str(error):  # torch.cat of a token that was not chosen
                raise NotImplementedError("the next token is None") from error
            raise
        self.tokens = expect_tensor(result, "the result of generate")
        self.contexts = torch.stack(contexts) if contexts else torch.zeros(0)
        self.is_training = model.training


def chained(tokens: Tensor) -> Tensor:
    """Compute logits of 7 tokens that make the row's number and the last token choose the next."""
    rows = torch.arange(len(tokens))
    chosen = (3 * tokens[:, -1] + rows + 1) % 7  # from 5 in row 0: 2, 0, 1, 4, 6, 5, 2, ...
    return F.one_hot(chosen, 7) * 30.0 + torch.arange(7) / 10


def draw(make: Make, logits: Tensor, temperature: float) -> Tensor:
    """Generate one token for each row of logits (rows, vocab), after a context of two."""
    context = torch.ones(len(logits), 2, dtype=torch.long)
    return Generated(make, logits, context, 1, temperature, logits.shape[1]).tokens[:, -1]


def observe(make: Make) -> Observations:
    """Generate from fixed logits: single rows, long contexts, and many rows at once."""
    context = torch.tensor([[4, 6, 5]])
    greedy = Generated(make, chained, context, 5, 0.0, 7, is_training=True)
    sampled = Generated(make, chained, context, 4, 1.0, 7)
    # 11 tokens, for a model with max_seq_len 8
    long = torch.randint(7, (1, 11), generator=torch.Generator().manual_seed(1))
    cropped = Generated(make, chained, long, 2, 0.0, 7)
    found = {
        "tokens at temperature 0": greedy.tokens,
        "shape of the result at temperature 1": torch.tensor(sampled.tokens.shape),
        "the contexts of a growing row": Generated(make, chained, long[:, :6], 4, 0.0, 7).contexts,
        "the contexts of a row longer than max_seq_len": cropped.contexts,
        "the result for a row longer than max_seq_len": cropped.tokens,
        "training mode afterwards, before and not before": torch.tensor(
            [greedy.is_training, sampled.is_training]
        ),
    }
    return {name: Observed(value, EXACT) for name, value in found.items()} | observe_rows(make)


def observe_rows(make: Make) -> dict[str, Observed]:
    """Generate for several rows at once; -1 stands for what cannot be measured."""
    try:
        rows = Generated(make, chained, torch.tensor([[5], [3], [6]]), 3, 0.0, 7).tokens
        two_kinds = torch.tensor([[50.0, 50.0, 20.0, 20.0], [20.0, 20.0, 50.0, 50.0]])
        first, second = draw(make, two_kinds.repeat(ROWS // 2, 1), 1.0).view(-1, 2).unbind(-1)
    except AdaptError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):  # such as sizes that do not match
        works, differ, own = False, False, False
        rows = torch.full((3, 4), NOT_MEASURED)
    else:
        works, differ = True, bool((first != first[0]).any())
        own = bool(((first < 2) & (second >= 2)).double().mean() > 0.99)
    found = {
        "several rows work": Observed(torch.tensor(works), EXACT),
        "tokens of several rows at temperature 0": Observed(rows, EXACT),
        "equal rows get different tokens at temperature 1": Observed(torch.tensor(differ), EXACT),
        "each row's tokens are its own": Observed(torch.tensor(own), EXACT),
    }
    for name, (temperature, logits) in {"temperature 0": (0.0, tuple(FLAT)), **UNLIKELY}.items():
        value = torch.full((4,), NOT_MEASURED)
        if works and (differ or temperature == 0):
            shares = share(draw(make, torch.tensor(logits).repeat(ROWS, 1), temperature), 4)
            value = shares > 0.01
            if temperature:
                found[f"frequencies at {name}"] = Observed(shares, FREQUENCY)
        elif temperature:
            found[f"frequencies at {name}"] = Observed(value, FREQUENCY)
        found[f"drawn at {name}"] = Observed(value, EXACT)
    flat, tail = torch.full((4,), NOT_MEASURED), torch.full((2,), NOT_MEASURED)
    if differ:
        flat = share(draw(make, FLAT.repeat(ROWS, 1), 1.0), 4)
        one_likely = 1 + torch.arange(TAIL + 1) * 1e-4  # no two equal, so that a top-k can cut
        one_likely[0] += torch.tensor(TAIL).log()  # half of the probability
        shares = share(draw(make, one_likely.repeat(TAIL_ROWS, 1), 1.0), TAIL + 1)[1:]
        tail = torch.stack([(shares > 0).any(), (shares > 0).double().mean() > 0.97])
    found["frequencies of likely tokens"] = Observed(flat, FREQUENCY)
    found["some and all of 250 unlikely tokens are drawn"] = Observed(tail, EXACT)
    return found


def share(tokens: Tensor, vocab_size: int) -> Tensor:
    """Compute the share of each token, (vocab_size,)."""
    return (tokens.view(-1, 1) == torch.arange(vocab_size)).double().mean(dim=0)


PART = Part("generate", WHERE, make_with(Llama), VARIANTS, observe, adapt)
