"""Prompt-based fine-tuning: the zero-shot prompt, with the label words' output rows as the head.

Gao et al. 2021, "Making Pre-trained Language Models Better Few-shot Learners" (LM-BFF),
arXiv:2012.15723, eq. 1: with h the hidden state where the model predicts the label word, and w_v
the row of the output projection of word v,

    p(y | sentence) = exp(w_y h) / sum over all labels y' of exp(w_y' h).

All weights train, and none is new: before training this is the zero-shot classifier for words of
one token each, with `--no_trailing_space`. Without tied embeddings the output projection trains
too, where the linear head leaves it out.

Differs from the paper in:
- the model predicts the next token instead of a masked one, so h is that of the prompt's last
  token. It is so in reference mode too, where the zero-shot classifier reads the last column, which
  may be padding;
- the prompt is the zero-shot one without its trailing space. With it, Llama's tokenizer makes the
  space a token of its own, and the token after that is not the label word, which has its own
  space before it;
- dropout (`--hidden_dropout_prob`) acts on h, as before the linear head. With some models it
  changes the scores so much that nothing is learned; SmolLM2-135M needs 0.
"""

import itertools
import reprlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.methods.classifier import MethodClassifier
from classifier import LlamaEmbeddingClassifier, last_positions
from tokenizer import Tokenizer


class LabelWordClassifier(MethodClassifier):
    """log_softmax over the labels of w_y dropout(h), with h that of the prompt's last token.

    Args:
        plain: the classifier whose parts it takes over; its head is not used.
        prompt: the end of every input; spaces at its end are dropped.

    Raises:
        ValueError: the label words or the tokenizer are not known, or `label_ids` refuses a word.
    """

    label_ids: Tensor

    def __init__(self, plain: LlamaEmbeddingClassifier, prompt: str) -> None:
        super().__init__(plain, {"head": "label_words", "prompt": prompt.rstrip(" ")})
        self.prompt = self.method["prompt"]
        if self.label_names is None or self.tokenizer is None:
            raise ValueError("head label_words needs the label words and the tokenizer")
        ids = label_ids(self.label_names, self.tokenizer, self.prompt)
        self.register_buffer("label_ids", torch.tensor(ids), persistent=False)
        del self.classifier_head
        self.llama.requires_grad_(True)  # also an output projection that is not tied

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute log-probabilities of the labels, (batch, num_labels).

        Args:
            input_ids: (batch, seq), sentences that end with the prompt, padded on the right.
            lengths: (batch,), as in `last_positions`.
        """
        pooled = self.pool(input_ids, lengths)  # (batch, dim)
        # In float32: in bfloat16 different labels could get equal scores.
        with torch.autocast(pooled.device.type, enabled=False):
            rows = self.llama.output.weight[self.label_ids]  # (num_labels, dim)
            return F.log_softmax(F.linear(self.dropout(pooled.float()), rows), dim=-1)

    def pool(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Compute the hidden state of each prompt's last token, (batch, dim)."""
        positions = last_positions(input_ids, lengths, causal=True)
        return self.llama.compute_hidden(input_ids, positions=positions)[:, 0]


def label_ids(label_names: Sequence[str], tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the token of each label word that follows a prompt.

    Args:
        label_names: the label words.
        tokenizer: of the model.
        prompt: without a space at its end; one stands between it and the word.

    Raises:
        ValueError: a word is unknown to the tokenizer, or is several tokens, or two words are the
            same token.
    """
    tokens = [tokenizer.label_tokens(name, f"{prompt} ") for name in label_names]
    if problem := problem_of_words(label_names, tokens, tokenizer):
        raise ValueError(
            f"--head label_words: {problem}; choose another word (--label-names) or --head linear"
        )
    return [token for (token,) in tokens]


def problem_of_words(
    label_names: Sequence[str], tokens: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> str:
    """Return what is wrong with the first label word that cannot be used; "" if all can.

    Args:
        label_names: the label words.
        tokens: of each of them.
        tokenizer: of the model.
    """
    for i, (name, own) in enumerate(zip(label_names, tokens, strict=True)):
        problem = ""
        # Some tokenizers ignore case; they know the word anyway.
        if tokenizer.decode(own).strip().casefold() != name.strip().casefold():
            problem = "is unknown to the tokenizer"
        elif len(own) != 1:
            problem = f"is {len(own)} tokens, not one"
        elif own in tokens[:i]:
            problem = "is the same token as another one"
        if problem:
            return f"the label word {reprlib.repr(name)} {problem}"
    return ""


class PromptTokenizer(Tokenizer):
    """A tokenizer that encodes each sentence together with the prompt that follows it.

    The maximum length is the sentence's; the prompt stays whole.

    Args:
        tokenizer: of the model.
        prompt: is added to each text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        vars(self).update(vars(tokenizer))  # pad_id and so on
        self.adds_bos = tokenizer.adds_bos
        self.max_len = None  # `encode` truncates nothing, since `encode_text` does
        self.tokenizer, self.prompt = tokenizer, prompt

    def encode_text(self, text: str) -> list[int]:
        """Convert a sentence and the prompt to token ids, without BOS and EOS."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Convert sentences, each with the prompt."""
        with_prompt = self.tokenizer.encode_texts([text + self.prompt for text in texts])
        max_len = self.tokenizer.max_len
        if max_len is None:
            return with_prompt
        alone, rows = self.tokenizer.encode_texts(texts), []
        for tokens, without_prompt in zip(with_prompt, alone, strict=True):
            # The sentence's own tokens are those that it also has without the prompt.
            pairs = zip(tokens, without_prompt, strict=False)
            n_own = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            rows.append(tokens[: min(n_own, max_len)] + tokens[n_own:])
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """Convert token ids to a text; BOS and EOS give no text."""
        return self.tokenizer.decode(ids)

    def label_tokens(self, label: str, prompt: str) -> list[int]:
        """Return the tokens of a label word that follows a prompt."""
        return self.tokenizer.label_tokens(label, prompt)

    def fits(self, vocab_size: int) -> bool:
        """Return whether the tokenizer can be that of a model with a vocabulary of this size."""
        return self.tokenizer.fits(vocab_size)

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, from which the model's tokenizer can be made again."""
        return self.tokenizer.files()
