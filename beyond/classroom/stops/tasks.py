"""Stops 7 to 9: two ways to classify, and one step of training."""

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from beyond.classroom.stops.walk import Places, Walk, quote, table, three
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from optimizer import AdamW

LEARNING_RATE = 2e-5  # the assignment's default


def ask(walk: Walk) -> Places:
    """Stop 7: zero-shot scores."""
    names = walk.label_names
    prompt = question(names)
    ids = torch.tensor([walk.tokenizer.encode(review(walk) + prompt, bos=True, eos=False)])
    config = ClassifierConfig(len(names), "", 0.0, "prompt")
    model = LlamaZeroShotClassifier(
        config, walk.tokenizer, names, deepcopy(walk.llama), prompt
    ).eval()
    scores = model(ids)[0]
    log_probs = walk.llama(ids)[0][0, -1].log_softmax(-1)
    assert_close(scores, torch.stack([log_probs[i].sum() for i in model.label_ids]))
    rows = [
        (name, ", ".join(quote(walk.piece(i)) for i in label_ids), score)
        for name, label_ids, score in zip(names, model.label_ids, scores.tolist(), strict=True)
    ]
    return {
        "prompt": (review(walk) + prompt).rstrip(),
        "prompt_seq": str(ids.shape[1]),
        "table_zero_shot": table(("label word", "pieces", "log-probability"), rows),
        "zero_shot": names[int(scores.argmax())],
    }


def question(label_names: Sequence[str]) -> str:
    """Return the question that follows a review; `run_llama.build_prompt_suffix` has it too."""
    words = ", ".join(label_names[:-1]) + ", or " + label_names[-1]
    return f" Is this movie {words}? This movie is "


def review(walk: Walk) -> str:
    """Return the sentence with its likeliest next token."""
    return walk.tokenizer.decode(walk.llama.generate(torch.tensor([walk.ids]), 1, 0.0)[0].tolist())


def train(walk: Walk) -> Places:
    """Stops 8 and 9: a new head, its loss and gradient, and one step of AdamW."""
    names = walk.label_names
    gold = len(names) - 1
    config = ClassifierConfig(len(names), "", 0.3, "finetune")
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = LlamaEmbeddingClassifier(config, deepcopy(walk.llama), names).eval()
        ids = torch.tensor([walk.tokenizer.encode(review(walk), bos=True, eos=False)])
        optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
        log_probs = model(ids)
        loss = F.nll_loss(log_probs, torch.tensor([gold]), reduction="sum")
        loss.backward()
        bias = model.classifier_head.bias
        before, gradient = bias.detach().clone(), bias.grad
        assert gradient is not None
        optimizer.step()
        loss_after = F.nll_loss(model(ids), torch.tensor([gold]), reduction="sum")
    probabilities = log_probs.detach()[0].exp()
    assert_close(gradient, probabilities - F.one_hot(torch.tensor(gold), len(names)))
    rows = zip(names, log_probs[0].tolist(), probabilities.tolist(), gradient.tolist(), strict=True)
    adamw = step_by_hand(before[gold].item(), gradient[gold].item(), bias[gold].item())
    return {
        "gold": names[gold],
        "guessing": three(math.log(len(names))),
        "loss": three(loss.item()),
        "loss_after": three(loss_after.item()),
        "table_head": table(
            ("label", "log-probability", "probability", "gradient of b"), list(rows)
        ),
        "table_adamw": adamw,
        "n_parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }


def step_by_hand(before: float, gradient: float, after: float) -> str:
    """Compute the first step of AdamW for one number; raises unless it leads to `after`."""
    beta1, beta2, eps = 0.9, 0.999, 1e-6  # AdamW's defaults
    m, v = (1 - beta1) * gradient, (1 - beta2) * gradient**2
    alpha = LEARNING_RATE * math.sqrt(1 - beta2) / (1 - beta1)
    change = -alpha * m / (math.sqrt(v) + eps)
    assert math.isclose(before + change, after, rel_tol=0, abs_tol=1e-8), (before + change, after)
    rows = [
        ("gradient g", "from stop 8", f"{gradient:.6f}"),
        ("average m", f"{beta1} * 0 + (1 - {beta1}) * g", f"{m:.6f}"),
        ("average of squares v", f"{beta2} * 0 + (1 - {beta2}) * g^2", f"{v:.6f}"),
        (
            "learning rate, corrected",
            f"alpha = {LEARNING_RATE:g} * sqrt(1 - {beta2}) / (1 - {beta1})",
            f"{alpha:.3e}",
        ),
        ("change", f"-alpha * m / (sqrt(v) + {eps:g})", f"{change:.3e}"),
        ("b before", "", f"{before:.6f}"),
        ("b after", "b before + change", f"{before + change:.6f}"),
    ]
    return table(("what", "how", "value"), rows)
