"""The optimizer and the classifiers in the course's dialect, as the text of their files.

The classes, signatures and attribute names are the course's; the code is not.
"""

OPTIMIZER = """
import math
from typing import Callable, Iterable, Tuple

import torch
from torch.optim import Optimizer


class AdamW(Optimizer):
    def __init__(self, params: Iterable[torch.nn.parameter.Parameter], lr: float = 1e-3,
                 betas: Tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.0, correct_bias: bool = True):
        if lr < 0.0 or eps < 0.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError("bad options")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                        correct_bias=correct_bias)
        super().__init__(params, defaults)

    def step(self, closure: Callable = None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.data
                state = self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["m"] = torch.zeros_like(p.data)
                    state["v"] = torch.zeros_like(p.data)
                beta1, beta2 = group["betas"]
                state["step"] += 1
                t = state["step"]
                state["m"] = beta1 * state["m"] + (1 - beta1) * grad
                state["v"] = beta2 * state["v"] + (1 - beta2) * grad * grad
                alpha = group["lr"]
                if group["correct_bias"]:
                    alpha = alpha * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                p.data = p.data - alpha * state["m"] / (torch.sqrt(state["v"]) + group["eps"])
                p.data = p.data - group["lr"] * group["weight_decay"] * p.data
        return loss
"""

CLASSIFIER = """
import torch
import torch.nn.functional as F

from config import LlamaConfig
from llama import load_pretrained


class LlamaZeroShotClassifier(torch.nn.Module):
    def __init__(self, config: LlamaConfig, tokenizer, label_names: list[str]):
        super().__init__()
        self.num_labels = config.num_labels
        self.llama = load_pretrained(config.pretrained_model_path)
        for param in self.llama.parameters():
            param.requires_grad = False
        assert len(label_names) == self.num_labels
        self.tokenizer = tokenizer
        self.label_name_ids = [
            tokenizer.encode(label, bos=False, eos=False) for label in label_names
        ]

    def forward(self, input_ids):
        logits, _ = self.llama(input_ids)
        log_probabilities = F.log_softmax(logits, dim=-1)
        scores = torch.zeros((len(logits), self.num_labels), device=logits.device)
        for i, ids in enumerate(self.label_name_ids):
            scores[:, i] = torch.sum(log_probabilities[:, 0, ids], axis=-1)
        return scores


class LlamaEmbeddingClassifier(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_labels = config.num_labels
        self.llama = load_pretrained(config.pretrained_model_path)
        for param in self.llama.parameters():
            if config.option == "pretrain":
                param.requires_grad = False
            elif config.option == "finetune":
                param.requires_grad = True
        self.dropout = torch.nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = torch.nn.Linear(self.llama.config.dim, self.num_labels)

    def forward(self, input_ids):
        _, hidden_states = self.llama(input_ids)
        final_hidden = hidden_states[:, -1, :]
        final_hidden = self.dropout(final_hidden)
        logits = self.classifier_head(final_hidden)
        return F.log_softmax(logits, dim=-1)
"""

FILES = {"optimizer.py": OPTIMIZER, "classifier.py": CLASSIFIER}
