"""Calibration of zero-shot scores by inputs without content.

Zhao et al. 2021, "Calibrate Before Use", arXiv:2102.09690, section 5 (contextual calibration). A
model prefers some label words whatever the sentence says. With p the probabilities of the labels,
normalised to a sum of 1, and p_cf their mean over prompts whose sentence is free of content ("N/A",
"[MASK]" and an empty one, as in the paper), the label is the one with the highest

    q = W p + b, with W = diag(p_cf)^-1 and b = 0.

Computed here as log q = log p - log p_cf, so that no small probability underflows. The paper takes
a softmax of q, which changes no prediction. The prompts without content are scored one by one, so
they have no padding, which in reference mode the prompts of a batch may have.

`--no_trailing_space`, which is not from the paper, leaves out the space at the end of the prompt:
Llama's tokenizer makes it a token of its own, although each label word has its own space before it.
"""

import math

import torch
from torch import Tensor, nn

from beyond.methods.options import ZeroShotOptions
from classifier import LlamaZeroShotClassifier
from tokenizer import Tokenizer

CONTENT_FREE = ("N/A", "[MASK]", "")


def prompt_suffix(options: ZeroShotOptions, prompt: str) -> str:
    """Return what follows each sentence: the prompt, without its last space if the options say so.

    Args:
        options: of the run.
        prompt: the assignment's, which ends with a space.
    """
    return prompt.rstrip(" ") if options.no_trailing_space else prompt


def build_scorer(
    options: ZeroShotOptions,
    classifier: LlamaZeroShotClassifier,
    tokenizer: Tokenizer,
    suffix: str,
    device: torch.device,
) -> nn.Module:
    """Return what scores the labels: the classifier, calibrated if the options say so.

    Args:
        options: of the run.
        classifier, tokenizer, suffix, device: as in `calibrate`.
    """
    if options.calibrate:
        return calibrate(classifier, tokenizer, suffix, device)
    return classifier


class CalibratedClassifier(nn.Module):
    """A zero-shot classifier whose scores are compared with those of inputs without content.

    Args:
        classifier: maps tokens and lengths to scores (batch, num_labels), logarithms.
        log_prior: (num_labels,), log p_cf; is subtracted from the scores.
    """

    log_prior: Tensor

    def __init__(self, classifier: nn.Module, log_prior: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("log_prior", log_prior)

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute scores (batch, num_labels): log p - log p_cf, up to a constant of each row."""
        return self.classifier(input_ids, lengths) - self.log_prior


@torch.no_grad()
def calibrate(
    classifier: LlamaZeroShotClassifier, tokenizer: Tokenizer, suffix: str, device: torch.device
) -> CalibratedClassifier:
    """Calibrate a zero-shot classifier.

    Args:
        classifier: on its device, in eval mode.
        tokenizer: of the model.
        suffix: the prompt that follows a sentence.
        device: of the classifier.

    Raises:
        ValueError: an input without content and the prompt together are too long for the model.
    """
    log_probs = []
    for text in CONTENT_FREE:
        tokens = torch.tensor([tokenizer.encode(text + suffix, bos=True, eos=False)])
        try:
            scores = classifier(tokens.to(device), torch.tensor([tokens.shape[1]], device=device))
        except ValueError as error:
            raise ValueError(
                f"--calibrate: with {text!r} as the sentence, {error}; leave --calibrate out"
            ) from None
        log_probs.append(scores[0].log_softmax(dim=-1))
    log_prior = torch.stack(log_probs).logsumexp(dim=0) - math.log(len(CONTENT_FREE))
    return CalibratedClassifier(classifier, log_prior)
