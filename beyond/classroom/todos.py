"""What the starter leaves to the student: the one list of it, and the words in its place.

`starter.py` applies this list to the project's own sources. A name that they do not have, or a text
that they do not have exactly once, is an error, so the list cannot fall behind them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Todo:
    """A function whose body the student writes.

    Attributes:
        file: where it is.
        name: of the function; in a class, with the class's name.
        task: what to write: equation, shapes and paper; lines of at most 90 characters.
        helpers: functions of ours that only this body uses, and that are taken out with it. The
            body is taken out from the first statement on that uses one of them; without helpers,
            all of it.
    """

    file: str
    name: str
    task: str
    helpers: tuple[str, ...] = ()


TODOS = (
    Todo(
        "rope.py",
        "apply_rotary_emb",
        """\
Rotate each pair of features (2i, 2i+1) of query and key, i = 0 ... head_dim / 2 - 1. At
position m, counted from 0, the angle of pair i is a = m * theta^(-2i / head_dim):

    x'[2i]   = x[2i] cos(a) - x[2i+1] sin(a)
    x'[2i+1] = x[2i] sin(a) + x[2i+1] cos(a)

Shapes: query (batch, seq, n_heads, head_dim), key (batch, seq, n_kv_heads, head_dim);
the angles are (seq, head_dim / 2), the same for all rows and heads. Compute in float32,
return the dtypes given, and put tensors that you make on the device of query.
Su et al. 2021, arXiv:2104.09864, section 3.4.2, eq. 34.""",
        helpers=("rotary_tables", "_rotate"),
    ),
    Todo(
        "llama.py",
        "RMSNorm.norm",
        """\
x / sqrt(mean(x^2) + eps), with the mean over the last axis: (..., dim) to (..., dim).
The gain is applied by `forward`.
Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4, with eps inside the root.""",
    ),
    Todo(
        "llama.py",
        "Attention.compute_query_key_value_scores",
        """\
softmax(query key^T / sqrt(head_dim)) value, for each row and head; the softmax is over
the positions of the keys.

Shapes: the scores are (batch, n_heads, seq, seq). Query head j uses key/value head
j // n_rep, where n_rep = n_heads / n_kv_heads is `self.config.n_rep`.
Dropout: while training, the weights after the softmax get dropout of probability
`self.config.dropout`; in eval mode they get none.
Mask: with `self.config.causal`, position i attends to positions <= i. Without it there is
no mask at all, not even on padding: the assignment's reference values depend on that.
Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023, arXiv:2305.13245.""",
    ),
    Todo(
        "llama.py",
        "LlamaLayer.forward",
        """\
h = x + attention(norm(x)), then h + feed_forward(norm(h)), each with its own norm.
Shapes: (batch, seq, dim) everywhere.
Touvron et al. 2023, arXiv:2307.09288, section 2.2 (pre-normalisation).""",
    ),
    Todo(
        "llama.py",
        "sample_next_token",
        """\
At temperature 0: in each row the token with the highest logit, without a random number.
Else: p = softmax(logits / temperature) over the vocabulary, then one draw from p per row;
`torch.multinomial` takes the generator.

Shapes: logits (batch, vocab) to tokens (batch, 1). `Llama.generate` calls this.
Temperature: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, eq. 1.""",
        helpers=("token_probabilities", "max_logits"),
    ),
    Todo(
        "optimizer.py",
        "AdamW.step",
        """\
For each parameter theta with a gradient g (a parameter without one is left as it is):

    t       <- t + 1
    m       <- beta1 m + (1 - beta1) g
    v       <- beta2 v + (1 - beta2) g^2
    alpha_t  = lr sqrt(1 - beta2^t) / (1 - beta1^t); without `correct_bias`, alpha_t = lr
    theta   <- theta - alpha_t m / (sqrt(v) + eps)
    theta   <- theta - lr weight_decay theta

`self.param_groups` holds the groups, dicts with "params" and the options of `__init__`.
`self.state[theta]` is a dict for t, m and v, which start at 0: call them "step",
"exp_avg" and "exp_avg_sq". m and v have the shape, the dtype and the device of theta.
Each parameter counts its own steps. Change theta in place.
Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1 and the end of section 2;
Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.""",
        helpers=("AdamW._update",),
    ),
    Todo(
        "classifier.py",
        "LlamaEmbeddingClassifier.forward",
        """\
log_softmax(W dropout(h) + b) over the labels, with `self.dropout` and
`self.classifier_head`; h is the hidden state that represents the sentence.

Shapes: `self.llama.compute_hidden` gives (batch, seq, dim), or with `positions=` (batch,)
that one of each row, (batch, 1, dim). `last_positions` says which one is h (batch, dim);
the mode is `self.llama.config.causal`. The result is (batch, num_labels).
Devlin et al. 2019, arXiv:1810.04805, section 4.1, with the state of another token.""",
        helpers=("LlamaEmbeddingClassifier.pool",),
    ),
)

# Checks that the starter keeps; these parts of them show an answer.
ANSWERS_IN_CHECKS = {
    "rope_test.py": ("complex_oracle", "test_complex_oracle"),
    "optimizer_test.py": ("scalar_recurrence", "test_scalar_recurrence"),
}

# Texts that are not true of the starter: the old one, then the new one.
EDITS: dict[str, tuple[tuple[str, str], ...]] = {
    "llama.py": (
        # The starter's layers compute all positions, so their parts have one argument less.
        (
            """\
    def compute_query_key_value_scores(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None = None
    ) -> Tensor:
""",
            """\
    def compute_query_key_value_scores(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
""",
        ),
        (
            "query: (batch, n_heads, seq, head_dim); with positions, seq is 1.",
            "query: (batch, n_heads, seq, head_dim).",
        ),
        ("            positions: as in `Llama.compute_hidden`.\n", ""),
        (
            """\
    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        \"""Compute self-attention over x (batch, seq, dim), at all positions or one per row.\"""
""",
            """\
    def forward(self, x: Tensor) -> Tensor:
        \"""Compute self-attention over x (batch, seq, dim); returns the same shape.\"""
""",
        ),
        ("self.compute_query(select(x, positions))", "self.compute_query(x)"),
        (
            """\
        # A single query is rotated for every position, which is cheap, and the right one is taken.
        query = query.expand(-1, x.shape[1], -1, -1)  # (batch, seq, n_heads, head_dim)
""",
            "",
        ),
        ("(select(query, positions), key, value))", "(query, key, value))"),
        ("scores(query, key, value, positions)", "scores(query, key, value)"),
        (
            """\
    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        \"""Map (batch, seq, dim) to the same shape, or with positions to (batch, 1, dim).\"""
""",
            """\
    def forward(self, x: Tensor) -> Tensor:
        \"""Map (batch, seq, dim) to (batch, seq, dim).\"""
""",
        ),
        (
            """\
 of each row, (batch, 1, dim): then the last layer
        computes nothing but keys and values for the others.
""",
            " of each row, (batch, 1, dim).\n",
        ),
        (
            """\
        for layer in self.layers[:-1]:
            h = layer(h)
        return self.norm(self.layers[-1](h, positions))
""",
            """\
        for layer in self.layers:
            h = layer(h)
        return self.norm(select(h, positions))
""",
        ),
        (
            "\n        For causal models `beyond/decoding.py` gives the same tokens with less "
            "work.",
            "",
        ),
    ),
    "optimizer.py": (
        (
            """\
    The `torch._foreach_*` functions update all parameters in a few calls, which is faster than a
    loop that makes these calls for one parameter after the other. Parameters are grouped by step
    count, because the bias correction depends on it and a parameter counts only the steps in which
    it had a gradient.

""",
            "",
        ),
    ),
    "rope_test.py": (
        ("course's published values, an independent oracle, and two", "course's values and two"),
        ("    test_complex_oracle()\n", ""),
        (
            "course's values and complex multiplication, keep norms, ",
            "course's values, keep norms, ",
        ),
    ),
    "optimizer_test.py": (
        (
            "course's published values and a scalar recurrence in float64",
            "course's published values",
        ),
        ("    test_scalar_recurrence()\n", ""),
        ("course's values and a scalar recurrence.", "course's values."),
    ),
    "sanity_check.py": (
        (
            """ switched off)
  (`tests/test_sanity_check.py` computes them again).

With `--of FOLDER` it examines another implementation of the assignment instead, and names its
mistakes (`beyond/classroom/`).
""",
            " switched off).\n",
        ),
        ("import sys\nfrom importlib import import_module\n", ""),
        (
            "from llama import Llama, load_pretrained\n",
            "from llama import Llama, load_pretrained\nfrom utils import refuse_arguments\n",
        ),
        (
            """\
    if sys.argv[1:]:  # --of FOLDER, --help, or a mistake
        sys.exit(import_module("beyond.classroom.report").main())
""",
            "    refuse_arguments(__doc__)\n",
        ),
    ),
    "beyond/options.py": (
        ("SentencePiece model, tokenizer.json or llama2.c's tokenizer.bin", "SentencePiece model"),
        (
            """\
        f"checkpoint: a .pt file, llama2.c's .bin, or a folder of Hugging Face or Meta (default: "
        f"{CHECKPOINT}; if""",
            """\
        f"checkpoint: a .pt file (default: {CHECKPOINT}; if""",
        ),
        (
            "; on for llama2.c's .bin and for folders; off if a .pt does not say",
            "; off if it does not say",
        ),
        ("(default: float32; with --quantize: bfloat16; ", "(default: float32; "),
    ),
    "beyond/command_line.py": (
        (
            "    parser = build_parser()\n",
            "    refuse_lacking(argv)\n    parser = build_parser()\n",
        ),
        (
            "from beyond.methods.options import MethodOptions\n",
            "from beyond.methods.options import MethodOptions, refuse_lacking\n",
        ),
        (
            '"Flags may be written with - or _ inside."',
            '"Flags may be written with - or _ inside; README.md lists those that are missing."',
        ),
    ),
    "pyproject.toml": (
        (
            "Llama 2 from its parts: a reference implementation of",
            "Llama 2 from its parts: the starter of",
        ),
    ),
}
