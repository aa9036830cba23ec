"""A finished implementation in the course's dialect, as the text of its files.

The classes, signatures and parameter names are the course's; the code is not.
"""

CONFIG = '''
class LlamaConfig:
    """Takes whatever a checkpoint's model_args hold."""

    def __init__(self, vocab_size=32000, dim=512, dropout=0.0, n_layers=8, n_heads=8,
                 n_kv_heads=8, max_seq_len=1024, layer_norm_eps=1e-5, multiple_of=32,
                 hidden_dim=None, position_embedding_type="rotary", use_cache=True, **kwargs):
        values = dict(locals(), **kwargs)
        for name in ("self", "kwargs"):
            del values[name]
        vars(self).update(values)
'''

BASE_LLAMA = """
import torch.nn as nn
from config import LlamaConfig


class LlamaPreTrainedModel(nn.Module):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.n_layers = config.n_layers

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
"""

ROPE = '''
from typing import Tuple

import torch


def broadcastable(table, x):
    """Give a table (seq, head_dim / 2) the axes of x (batch, seq, heads, head_dim / 2)."""
    assert table.shape == (x.shape[1], x.shape[-1])
    return table.view(1, x.shape[1], 1, x.shape[-1])


def apply_rotary_emb(query: torch.Tensor, key: torch.Tensor, head_dim: int, max_seq_len: int,
                     theta: float = 10000.0) -> Tuple[torch.Tensor, torch.Tensor]:
    _, seqlen, _, _ = query.shape
    device = query.device

    query_real, query_imag = query.float().reshape(query.shape[:-1] + (-1, 2)).unbind(-1)
    key_real, key_imag = key.float().reshape(key.shape[:-1] + (-1, 2)).unbind(-1)

    steps = torch.arange(0, head_dim, 2, device=device).float()
    inv_freq = 1.0 / (theta ** (steps / head_dim))
    positions = torch.arange(seqlen, device=device).float()
    angles = torch.outer(positions, inv_freq)
    cos, sin = torch.cos(angles), torch.sin(angles)
    cos, sin = broadcastable(cos, query_real), broadcastable(sin, query_real)

    query_out_real = query_real * cos - query_imag * sin
    query_out_imag = query_real * sin + query_imag * cos
    key_out_real = key_real * cos - key_imag * sin
    key_out_imag = key_real * sin + key_imag * cos

    query_out = torch.stack((query_out_real, query_out_imag), dim=-1).reshape(query.shape)
    key_out = torch.stack((key_out_real, key_out_imag), dim=-1).reshape(key.shape)
    return query_out.type_as(query), key_out.type_as(key)
'''

LLAMA = """
import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from base_llama import LlamaConfig, LlamaPreTrainedModel
from rope import apply_rotary_emb


class RMSNorm(torch.nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        rms = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return x / rms

    def forward(self, x):
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.n_local_heads = config.n_heads
        self.n_local_kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = config.dim // config.n_heads
        self.max_seq_len = config.max_seq_len
        kv_dim = self.n_local_kv_heads * self.head_dim
        self.compute_query = nn.Linear(config.dim, config.dim, bias=False)
        self.compute_key = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_output = nn.Linear(config.dim, config.dim, bias=False)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout

    def compute_query_key_value_scores(self, query, key, value):
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.head_dim)
        weights = F.softmax(scores, dim=-1)
        weights = self.attn_dropout(weights)
        return torch.matmul(weights, value)

    def forward(self, x: torch.Tensor):
        batch_size, seqlen, _ = x.shape
        query = self.compute_query(x).view(batch_size, seqlen, self.n_local_heads, self.head_dim)
        key = self.compute_key(x).view(batch_size, seqlen, self.n_local_kv_heads, self.head_dim)
        value = self.compute_value(x)
        value = value.view(batch_size, seqlen, self.n_local_kv_heads, self.head_dim)

        query, key = apply_rotary_emb(query, key, self.head_dim, self.max_seq_len)

        key = torch.repeat_interleave(key, dim=2, repeats=self.n_rep)
        value = torch.repeat_interleave(value, dim=2, repeats=self.n_rep)

        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        output = self.compute_query_key_value_scores(query, key, value)

        output = output.transpose(1, 2).contiguous().view(batch_size, seqlen, -1)
        return self.resid_dropout(self.compute_output(output))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, multiple_of: int, dropout: float):
        super().__init__()
        if hidden_dim is None:
            hidden_dim = multiple_of * math.ceil(int(8 * dim / 3) / multiple_of)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def SwiGLU(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.w1(x)) * self.w3(x)

    def forward(self, x):
        return self.dropout(self.w2(self.SwiGLU(x)))


class LlamaLayer(nn.Module):
    def __init__(self, layer_id: int, config: LlamaConfig):
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(config)
        self.feed_forward = FeedForward(dim=config.dim, hidden_dim=config.hidden_dim,
                                        multiple_of=config.multiple_of, dropout=config.dropout)
        self.attention_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)

    def forward(self, x):
        attention_input = self.attention_norm(x)
        attention_output = self.attention(attention_input)
        h = x + attention_output
        ffn_input = self.ffn_norm(h)
        ffn_output = self.feed_forward(ffn_input)
        return h + ffn_output


class Llama(LlamaPreTrainedModel):
    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.params = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([LlamaLayer(i, config) for i in range(config.n_layers)])
        self.norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tok_embeddings.weight = self.output.weight
        self.apply(self._init_weights)

    def forward(self, tokens: torch.Tensor, targets: Optional[torch.Tensor] = None):
        h = self.tok_embeddings(tokens)
        h = self.dropout(h)
        for layer in self.layers:
            h = layer(h)
        h = self.norm(h)
        if targets is not None:
            logits = self.output(h)
        else:
            logits = self.output(h[:, [-1], :])
        return logits, h

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0):
        for _ in range(max_new_tokens):
            context = idx[:, -self.params.max_seq_len :]
            logits, _ = self(context)
            logits = logits[:, -1, :]
            if temperature == 0.0:
                idx_next = torch.argmax(logits, dim=-1, keepdim=True)
            else:
                probs = F.softmax(logits / temperature, dim=-1)
                idx_next = torch.multinomial(probs, num_samples=1)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx


def load_pretrained(checkpoint):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contents = torch.load(checkpoint, map_location=device)
    model = Llama(LlamaConfig(**contents["model_args"]))
    weights = contents["model"]
    for name in list(weights):
        if name.startswith("_orig_mod."):
            weights[name[len("_orig_mod.") :]] = weights.pop(name)
    model.load_state_dict(weights, strict=False)
    return model
"""

FILES = {"config.py": CONFIG, "base_llama.py": BASE_LLAMA, "rope.py": ROPE, "llama.py": LLAMA}
