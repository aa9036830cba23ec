"""Wrong variants of `Llama.generate`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.classroom.part import Mistake, Variant
from config import LlamaConfig
from llama import Llama

WHERE = "llama.py, Llama.generate"
BOS, EOS = 1, 2
# Of the steps that these methods are, two mistakes are looked for together.
COMBINED = {"is_finished", "ends", "crop", "keep", "greedy", "result"}

Forward = Callable[..., tuple[Tensor, Tensor]]
Make = Callable[[Forward, LlamaConfig], nn.Module]  # a model with this `forward`


def make_with(cls: type[Llama]) -> Make:
    """Return a function that makes a model of a class, with another `forward`."""

    def make(forward: Forward, config: LlamaConfig) -> nn.Module:
        model = cls(config)
        vars(model)["forward"] = forward
        return model

    return make


class Steps(Llama):
    """`generate` in small steps, each of which a variant replaces; as it stands it is right."""

    def generate(  # type: ignore[override]
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0
    ) -> Tensor:
        start = idx
        self.number = 0  # of the step
        self.wanted = max_new_tokens
        while not self.is_finished(start, idx, max_new_tokens):
            self.number += 1
            logits = self(self.crop(idx))[0][:, -1]  # (batch, vocab)
            next_token = self.greedy(logits) if temperature == 0 else self.draw(logits, temperature)
            if self.ends(next_token):
                break
            idx = torch.cat((self.keep(idx), next_token), dim=1)
        return self.result(start, idx)

    def is_finished(self, start: Tensor, idx: Tensor, max_new_tokens: int) -> bool:
        return idx.shape[1] - start.shape[1] >= max_new_tokens

    def crop(self, idx: Tensor) -> Tensor:
        return idx[:, -self.config.max_seq_len :]

    def greedy(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1, keepdim=True)

    def draw(self, logits: Tensor, temperature: float) -> Tensor:
        return torch.multinomial(self.weigh(logits, temperature), 1)

    def weigh(self, logits: Tensor, temperature: float) -> Tensor:
        return F.softmax(logits / temperature, dim=-1)

    def ends(self, next_token: Tensor) -> bool:
        return False

    def keep(self, idx: Tensor) -> Tensor:
        return idx

    def result(self, start: Tensor, idx: Tensor) -> Tensor:
        return idx


def _end_at(token: int) -> Callable[..., bool]:
    """Return an `ends` that stops before a token."""
    return lambda model, next_token: bool((next_token == token).all())


def _stop_at(token: int) -> Callable[..., bool]:
    """Return an `is_finished` that also stops after a token."""

    def is_finished(model: Steps, start: Tensor, idx: Tensor, max_new_tokens: int) -> bool:
        is_new = idx.shape[1] > start.shape[1]
        stops = is_new and bool((idx[:, -1] == token).all())
        return stops or Steps.is_finished(model, start, idx, max_new_tokens)

    return is_finished


def _draw_first_row(model: Steps, logits: Tensor, temperature: float) -> Tensor:
    """Draw a token as code does that was written for a batch of one row."""
    return torch.multinomial(model.weigh(logits[0], temperature), 1).view(1, 1)


def _draw_one(model: Steps, logits: Tensor, temperature: float) -> Tensor:
    one = torch.multinomial(model.weigh(logits[0], temperature), 1)
    return one.expand(len(logits), 1)


def _keep_top_k(model: Steps, logits: Tensor, temperature: float) -> Tensor:
    values, tokens = (logits / temperature).topk(min(50, logits.shape[1]))
    return torch.zeros_like(logits).scatter(1, tokens, F.softmax(values, dim=-1))


def _keep_top_p(p: float, is_strict: bool) -> Callable[[Steps, Tensor, float], Tensor]:
    """Return a `weigh` that keeps the likeliest tokens, strictly below a probability p or not."""

    def weigh(model: Steps, logits: Tensor, temperature: float) -> Tensor:
        ranked, tokens = F.softmax(logits / temperature, dim=-1).sort(descending=True)
        before = ranked.cumsum(dim=-1) - ranked
        is_kept = (before + ranked < p) | (before == 0) if is_strict else before < p
        return torch.zeros_like(logits).scatter(1, tokens, ranked * is_kept)

    return weigh


def _drop_below_epsilon(model: Steps, logits: Tensor, temperature: float) -> Tensor:
    probabilities = F.softmax(logits / temperature, dim=-1)
    return probabilities * (probabilities >= 0.05)


def _stay_in_eval(model: Steps, start: Tensor, idx: Tensor) -> Tensor:
    model.eval()
    return idx


def _entry(
    name: str,
    why: str,
    seen: str = "",
    kind: str = "",
    others: Sequence[dict[str, Any]] = (),
    **methods: Any,
) -> Variant:
    """Make an entry whose variants have other methods than `Steps`; kind: "edition" or "note"."""
    mistake = Mistake(name, WHERE, why, seen, kind == "edition", kind == "note")
    subjects = [combine(**changes) for changes in (methods, *others)]
    return Variant(mistake, subjects[0], tuple(subjects[1:]))


def combine(**methods: Any) -> Make:
    """Return a function that makes a model with other methods than `Steps`."""
    make: Any = make_with(type("Variant", (Steps,), methods))
    if methods.keys() <= COMBINED:
        make.changes = methods
    return make


VARIANTS = (
    _entry(
        "temperature multiplied",
        "The logits are multiplied by the temperature, so a low temperature gives random text and "
        "a high one repeats itself. Divide: softmax(logits / temperature).",
        weigh=lambda _, logits, temperature: F.softmax(logits * temperature, dim=-1),
    ),
    _entry(
        "temperature has no effect",
        "The tokens are drawn from softmax(logits) at every temperature. Dividing the "
        "probabilities has no effect either, because multinomial normalises them again. Divide "
        "the logits, before the softmax.",
        weigh=lambda _, logits, temperature: F.softmax(logits, dim=-1),
    ),
    _entry(
        "softmax before and after the temperature",
        "Probabilities instead of logits are divided by the temperature and go through a second "
        "softmax, so unlikely tokens become likely. Divide the logits and apply one softmax.",
        weigh=lambda _, logits, t: F.softmax(F.softmax(logits, dim=-1) / t, dim=-1),
    ),
    _entry(
        "softmax applied twice",
        "A second softmax of probabilities is nearly uniform, so the text is noise. One softmax, "
        "then draw; Categorical(logits=...) applies its own.",
        weigh=lambda _, logits, t: F.softmax(F.softmax(logits / t, dim=-1), dim=-1),
    ),
    _entry(
        "softmax left out",
        "Tokens are drawn in proportion to the logits, which are no probabilities; a negative one "
        "is an error. Apply softmax to logits / temperature first.",
        weigh=lambda _, logits, temperature: (logits / temperature).abs(),
    ),
    _entry(
        "softmax over the batch",
        "The softmax runs over the rows, so with one row every token has probability 1 and the "
        "text is uniform noise. Use dim=-1, the vocabulary.",
        weigh=lambda _, logits, temperature: F.softmax(logits / temperature, dim=0),
    ),
    _entry(
        "always the argmax",
        "The most likely token is taken at every temperature, so nothing is random. Above "
        "temperature 0 draw from the probabilities, with torch.multinomial.",
        draw=lambda model, logits, temperature: model.greedy(logits),
    ),
    _entry(
        "random at temperature 0",
        "Tokens are drawn at temperature 0 too, so the greedy text changes from run to run. "
        "At temperature 0 take the argmax of the logits.",
        greedy=lambda model, logits: model.draw(logits, 1.0),
    ),
    _entry(
        "no case for temperature 0",
        "The logits are divided by 0, which ends in an error about inf or nan. At temperature 0 "
        "take the argmax of the logits.",
        greedy=lambda model, logits: model.draw(logits, 0.0),
    ),
    _entry(
        "least likely token at temperature 0",
        "argmin takes the token that the model thinks least of. Take the argmax of the logits.",
        greedy=lambda _, logits: logits.argmin(dim=-1, keepdim=True),
    ),
    _entry(
        "argmax over the whole tensor",
        "argmax without dim numbers the elements of all rows, so with several rows the result is "
        "not a token. Use argmax(dim=-1, keepdim=True).",
        greedy=lambda _, logits: logits.argmax().expand(len(logits), 1),
    ),
    _entry(
        "works for one row only at temperature 0",
        "Several rows end in an error, though idx is (batch, seq); the course's own programs "
        "generate one row at a time. Choose one token per row: argmax(dim=-1, keepdim=True).",
        "chernovssss",
        "note",
        greedy=lambda model, logits: logits[0].argmax().view(1, 1),
    ),
    _entry(
        "works for one row only above temperature 0",
        "Several rows end in an error, though idx is (batch, seq); the course's own programs "
        "generate one row at a time. multinomial of (batch, vocab) gives (batch, 1).",
        kind="note",
        draw=_draw_first_row,
    ),
    _entry(
        "one draw for all rows",
        "One token is drawn and given to all rows, so their samples are not independent. "
        "multinomial of (batch, vocab) draws one token per row.",
        draw=_draw_one,
    ),
    _entry(
        "unlikely tokens cut off (top-k)",
        "Only the most likely tokens can be drawn. The assignment wants the whole distribution, "
        "and says so: no top-k sampling.",
        weigh=_keep_top_k,
    ),
    _entry(
        "nucleus sampling (top-p)",
        "The least likely tokens, a few percent of the probability together, are cut off. That is "
        "the task of later editions; that of 2024 draws from the whole distribution.",
        "the course's edition of Spring 2026 (Alva789ro), and seanxuxx",
        "edition",
        [
            {"weigh": _keep_top_p(p, strict)}
            for p, strict in ((0.95, True), (0.9, True), (0.8, False))
        ],
        weigh=_keep_top_p(0.95, False),
    ),
    _entry(
        "epsilon sampling",
        "Tokens with a probability below 0.05 are cut off. That is the task of Fall 2025; the "
        "edition of 2024 draws from the whole distribution.",
        "the course's edition of Fall 2025 (cyprienn967, zhulenghan)",
        "edition",
        weigh=_drop_below_epsilon,
    ),
    _entry(
        "cropped from the wrong end",
        "A context longer than max_seq_len keeps its first tokens, so the newest ones are never "
        "seen and the text repeats. Keep the last: idx[:, -max_seq_len:].",
        crop=lambda model, idx: idx[:, : model.config.max_seq_len],
    ),
    _entry(
        "not cropped",
        "The model is given more than max_seq_len tokens: positions that it was never trained on. "
        "Give it the last ones: idx[:, -max_seq_len:].",
        crop=lambda model, idx: idx,
    ),
    _entry(
        "cropped to one token too few",
        "The context has max_seq_len - 1 tokens at most. Give it the last max_seq_len tokens.",
        crop=lambda model, idx: idx[:, 1 - model.config.max_seq_len :],
    ),
    _entry(
        "the result loses its beginning",
        "Not only the model's input but the result itself is cropped to max_seq_len. Crop a copy, "
        "and append the new token to the whole sequence.",
        keep=lambda model, idx: idx[:, -model.config.max_seq_len :],
        is_finished=lambda model, start, idx, n: model.number >= n,
    ),
    _entry(
        "only the newest token is fed back",
        "From the second step on the model sees one token without what came before. Without a "
        "cache of keys and values every step needs the whole context.",
        crop=lambda model, idx: idx[:, -1:] if model.number > 1 else Steps.crop(model, idx),
    ),
    _entry(
        "stops early, at EOS",
        "Generation ends at the end-of-sequence token. The assignment generates exactly "
        "max_new_tokens, and its reference texts go on.",
        others=[{"ends": _end_at(EOS)}],
        is_finished=_stop_at(EOS),
    ),
    _entry(
        "stops early, at BOS",
        "Generation ends at the begin-of-sequence token. That is sensible for TinyStories models, "
        "but the assignment generates exactly max_new_tokens.",
        others=[{"ends": _end_at(BOS)}],
        is_finished=_stop_at(BOS),
    ),
    _entry(
        "only one token is generated",
        "The result is returned after the first step: `return idx` is inside the loop.",
        "madflytep",
        is_finished=lambda model, start, idx, n: idx.shape[1] > start.shape[1],
    ),
    _entry(
        "the context counts as new tokens",
        "Generation ends when context and new tokens together are max_new_tokens. Append "
        "max_new_tokens to the context.",
        is_finished=lambda model, start, idx, n: idx.shape[1] >= n,
    ),
    _entry(
        "only the new tokens are returned",
        "The context is missing in the result. Return the context and its continuation.",
        others=[{"result": lambda model, start, idx: idx[:, -model.wanted :]}],
        result=lambda model, start, idx: idx[:, start.shape[1] :],
    ),
    _entry(
        "leaves the model in eval mode",
        "A model that was in training mode has no dropout afterwards. Restore the mode, or leave "
        "it to the caller, as the course does.",
        "PRESIDENT810",
        "note",
        result=_stay_in_eval,
    ),
)
