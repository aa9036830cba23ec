"""Pooling: which hidden states represent a sentence, instead of its last token's.

With h_i (dim,) the hidden state of token i, after the final norm, of a sentence of n tokens:

- mean: sum_i h_i / n, and max: max_i h_i for each feature (Reimers & Gurevych 2019, Sentence-BERT,
  arXiv:1908.10084, section 3);
- attention: sum_i a_i h_i with a = softmax(q h_1, ..., q h_n) and a learned vector q (Lin et al.
  2017, arXiv:1703.03130, eq. 5, without its hidden layer). q starts as 0, which gives the mean, so
  that no random number is drawn;
- before_stop: h_{n-1} if the sentence ends with a full stop, else h_n. At the full stop, the model
  only has to predict how the next sentence begins. The stops are `.`, `!` and `?`, each as a token
  of its own; if a sentence ends with any other token, such as `...`, `?!` or a quotation mark, it
  is h_n.

The tokens are all of the row before its padding, with BOS if the tokenizer adds it. Unlike the
assignment's last column, none of these reads a padding token, in reference mode either; there
padding still changes the hidden states, since attention has no mask.

`cut_layers` pools after a chosen layer (`--pool_layer`): the layers above it are dropped before
training (Sajjad et al. 2020, arXiv:2004.03844, top-layer dropping), so they cost neither time nor
memory. The final norm stays, so that the head gets numbers of the same size after every layer, and
all layers give bit for bit the plain classifier. What is left is an ordinary, smaller model.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from beyond.methods.classifier import MethodClassifier
from classifier import LlamaEmbeddingClassifier
from llama import Llama
from tokenizer import Tokenizer

STOPS = ".!?"


def own_tokens(lengths: Tensor, seq: int) -> Tensor:
    """Return which columns are tokens of their row, not padding: (batch, seq), bool."""
    return torch.arange(seq, device=lengths.device) < lengths[:, None]


class MeanPooling(nn.Module):
    """The mean over a sentence's tokens."""

    def forward(self, hidden: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Map hidden states (batch, seq, dim) of tokens (batch, seq) to (batch, dim)."""
        mask = own_tokens(lengths, hidden.shape[1])
        return (hidden * mask[..., None]).sum(dim=1) / lengths[:, None]


class MaxPooling(nn.Module):
    """The maximum of each feature over a sentence's tokens."""

    def forward(self, hidden: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Map hidden states (batch, seq, dim) of tokens (batch, seq) to (batch, dim)."""
        mask = own_tokens(lengths, hidden.shape[1])
        return hidden.masked_fill(~mask[..., None], float("-inf")).amax(dim=1)


class AttentionPooling(nn.Module):
    """The mean over a sentence's tokens, weighted by the softmax of q h_i.

    Args:
        dim: of the hidden states.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))

    def forward(self, hidden: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Map hidden states (batch, seq, dim) of tokens (batch, seq) to (batch, dim)."""
        mask = own_tokens(lengths, hidden.shape[1])
        scores = (hidden @ self.query).masked_fill(~mask, float("-inf"))  # (batch, seq)
        return (scores.softmax(dim=-1)[:, None] @ hidden)[:, 0]


class BeforeStopPooling(nn.Module):
    """The hidden state of the token before the final full stop, or of the last token.

    Args:
        tokenizer: says which tokens are stops, and whether BOS comes first; a stop right after BOS
            has no token before it.

    Raises:
        ValueError: the tokenizer has no token for a stop.
    """

    stop_ids: Tensor

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        ids = stop_ids(tokenizer)
        if not ids:
            raise ValueError(
                f"pooling before_stop: none of {' '.join(STOPS)} is a token of the tokenizer"
            )
        self.register_buffer("stop_ids", torch.tensor(ids), persistent=False)
        self.num_special = len(tokenizer.encode("", bos=True, eos=False))

    def positions(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the position that is read in each row of tokens (batch, seq): (batch,)."""
        rows = torch.arange(len(tokens), device=tokens.device)
        ends_with_stop = torch.isin(tokens[rows, lengths - 1], self.stop_ids)
        has_token_before = lengths > self.num_special + 1
        return lengths - 1 - (ends_with_stop & has_token_before).long()


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the tokens that are a stop, with a space before it or not."""
    found = set()
    for stop in STOPS:
        for text in (f"a{stop}", f"a {stop}"):
            last = tokenizer.encode_text(text)[-1]
            if tokenizer.decode([last]).strip() == stop:
                found.add(last)
    return sorted(found)


def make_pooling(name: str, dim: int, tokenizer: Tokenizer | None) -> nn.Module:
    """Make a pooling by its name in `options.POOLINGS`, other than last.

    Args:
        name: of the pooling.
        dim: of the hidden states.
        tokenizer: the classifier's; only before_stop needs it.

    Raises:
        ValueError: there is no such pooling, or it needs a tokenizer.
    """
    if name == "mean":
        return MeanPooling()
    if name == "max":
        return MaxPooling()
    if name == "attention":
        return AttentionPooling(dim)
    if name != "before_stop":
        raise ValueError(f"there is no pooling {name}")
    if tokenizer is None:
        raise ValueError("pooling before_stop needs the tokenizer")
    return BeforeStopPooling(tokenizer)


class PooledClassifier(MethodClassifier):
    """The linear head on hidden states that are pooled in another way than the last token.

    Args:
        plain: the classifier whose parts it takes over.
        pooling: a name in `options.POOLINGS`, other than last.

    Raises:
        ValueError: there is no such pooling, or it does not fit the tokenizer.
    """

    def __init__(self, plain: LlamaEmbeddingClassifier, pooling: str) -> None:
        super().__init__(plain, {"pooling": pooling})
        self.pooling = make_pooling(pooling, plain.llama.config.dim, plain.tokenizer)

    def pool(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Compute the vector that represents each sentence, (batch, dim)."""
        if lengths is None:  # no padding
            lengths = input_ids.new_full((len(input_ids),), input_ids.shape[1])
        if isinstance(self.pooling, BeforeStopPooling):  # the others read all positions
            positions = self.pooling.positions(input_ids, lengths)
            return self.llama.compute_hidden(input_ids, positions=positions)[:, 0]
        hidden = self.llama.compute_hidden(input_ids)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.pooling(hidden.float(), input_ids, lengths)


def cut_layers(llama: Llama, n_layers: int) -> None:
    """Drop the layers above `n_layers`, in place.

    Raises:
        ValueError: the model does not have as many layers.
    """
    most = llama.config.n_layers
    if not 1 <= n_layers <= most:
        raise ValueError(
            f"--pool_layer {n_layers}: the model has {most} layers; choose one from 1 to {most}"
        )
    llama.layers = llama.layers[:n_layers]
    llama.config = replace(llama.config, n_layers=n_layers)
