"""Independent implementations of the model: NumPy in float64, and Hugging Face transformers."""

import numpy as np
import torch
import transformers
from torch import Tensor

from config import LlamaConfig
from llama import Llama


def numpy_forward(llama: Llama, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all columns and final hidden states, in float64, head by head and row by row."""
    config = llama.config
    weights = {name: t.double().numpy() for name, t in llama.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.layer_norm_eps)
        return x / root * weights[f"{name}.weight"]

    def rotation(position: int) -> np.ndarray:
        """The block-diagonal matrix of RoFormer's eq. 15."""
        d = config.head_dim
        matrix = np.zeros((d, d))
        for i in range(d // 2):
            angle = position * config.rope_theta ** (-2 * i / d)
            block = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
        return matrix

    def attention(x: np.ndarray, layer: str) -> np.ndarray:
        seq, d = len(x), config.head_dim
        query, key, value = (
            x @ weights[f"{layer}.attention.compute_{part}.weight"].T
            for part in ("query", "key", "value")
        )
        heads = []
        for head in range(config.n_heads):
            group = head * config.n_kv_heads // config.n_heads
            q = np.stack([rotation(m) @ query[m, head * d : head * d + d] for m in range(seq)])
            k = np.stack([rotation(m) @ key[m, group * d : group * d + d] for m in range(seq)])
            scores = q @ k.T / np.sqrt(d)
            if config.causal:
                scores[np.triu_indices(seq, 1)] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            shares = scores / scores.sum(axis=-1, keepdims=True)
            heads.append(shares @ value[:, group * d : group * d + d])
        return (
            np.concatenate(heads, axis=-1) @ weights[f"{layer}.attention.compute_output.weight"].T
        )

    def feed_forward(x: np.ndarray, layer: str) -> np.ndarray:
        w1, w2, w3 = (weights[f"{layer}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
        gate = x @ w1.T
        return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T

    rows = []
    for row in tokens.numpy():
        h = weights["tok_embeddings.weight"][row]
        for i in range(config.n_layers):
            layer = f"layers.{i}"
            h = h + attention(norm(h, f"{layer}.attention_norm"), layer)
            h = h + feed_forward(norm(h, f"{layer}.ffn_norm"), layer)
        rows.append(norm(h, "norm"))
    hidden = np.stack(rows)
    return hidden @ weights["output.weight"].T, hidden


def hugging_face_config(config: LlamaConfig) -> "transformers.LlamaConfig":
    """The config of the same model in transformers."""
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.layer_norm_eps,
        rope_theta=config.rope_theta,  # type: ignore[call-arg]  # version 5 converts it
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )


def to_hugging_face(llama: Llama) -> "transformers.LlamaForCausalLM":
    """The same weights in transformers, whose model is causal."""
    config = llama.config
    model = transformers.LlamaForCausalLM(hugging_face_config(config))
    names = {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "norm": "model.norm",
        "layers": "model.layers",
        "attention": "self_attn",
        "feed_forward": "mlp",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "compute_query": "q_proj",
        "compute_key": "k_proj",
        "compute_value": "v_proj",
        "compute_output": "o_proj",
        "w1": "gate_proj",
        "w2": "down_proj",
        "w3": "up_proj",
    }
    state_dict = {}
    for name, tensor in llama.state_dict().items():
        if name.endswith(("compute_query.weight", "compute_key.weight")):
            # It rotates features i and i + head_dim / 2 where we rotate 2i and 2i + 1.
            tensor = (
                tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            )
        state_dict[".".join(names.get(part, part) for part in name.split("."))] = tensor
    model.load_state_dict(state_dict)
    return model.eval()


@torch.inference_mode()
def hugging_face_forward(llama: Llama, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all columns and final hidden states; without a mask unless the config is causal."""
    model = to_hugging_face(llama).type(next(llama.parameters()).dtype)
    batch, seq = tokens.shape
    # An additive mask of zeros lets every position see every other one.
    mask = None if llama.config.causal else torch.zeros(batch, 1, seq, seq, dtype=model.dtype)
    output = model(tokens, attention_mask=mask, output_hidden_states=True)
    return output.logits, output.hidden_states[-1]
