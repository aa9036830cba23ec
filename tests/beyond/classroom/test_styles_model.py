"""Right solutions of the model's parts that are written in other ways are `ok`."""

from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

import pytest

from beyond.classroom.part import examine
from beyond.classroom.parts import PARTS
from beyond.classroom.student import Student
from tests.beyond.classroom import course
from tests.beyond.classroom.planting import MODEL, sources, write

BY_NAME = {part.name: part for part in PARTS}
# The body of a function of the course's implementation, from its signature to its last line.
ROPE_BODY = course.ROPE[course.ROPE.index("    _, seqlen, _, _ = query.shape") :]
SCORES_BODY = course.LLAMA[
    course.LLAMA.index("        scores = torch.matmul(query") : course.LLAMA.index(
        "\n    def forward(self, x: torch.Tensor):"
    )
]
NORM_BODY = course.LLAMA[
    course.LLAMA.index("        rms = torch.sqrt(") : course.LLAMA.index(
        "\n    def forward(self, x):"
    )
]
NORM_FORWARD = """        output = self._norm(x.float()).type_as(x)
        return output * self.weight
"""
ATTENTION_BODY = course.LLAMA[
    course.LLAMA.index("        batch_size, seqlen, _ = x.shape") : course.LLAMA.index(
        "\n\nclass FeedForward"
    )
]
LAYER_BODY = course.LLAMA[
    course.LLAMA.index("        attention_input = ") : course.LLAMA.index("\n\nclass Llama(")
]
FEED_BODY = "        return self.dropout(self.w2(self.SwiGLU(x)))\n"
MODEL_BODY = course.LLAMA[
    course.LLAMA.index("        h = self.tok_embeddings(tokens)") : course.LLAMA.index(
        "\n    @torch.inference_mode()"
    )
]

ROPES = {
    "complex numbers": """
    seqlen = query.shape[1]
    freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2)[: (head_dim // 2)].float() / head_dim))
    freqs = torch.outer(torch.arange(seqlen, device=freqs.device), freqs).float()
    freqs_cis = torch.polar(torch.ones_like(freqs), freqs).view(1, seqlen, 1, -1)
    q = torch.view_as_complex(query.float().reshape(*query.shape[:-1], -1, 2))
    k = torch.view_as_complex(key.float().reshape(*key.shape[:-1], -1, 2))
    q, k = (torch.view_as_real(t * freqs_cis).flatten(3) for t in (q, k))
    return q.type_as(query), k.type_as(key)
""",
    "a table of max_seq_len rows, and exp of the logarithm": """
    import math
    i = torch.arange(head_dim // 2, dtype=torch.float64)
    table = torch.arange(max_seq_len)[:, None] * torch.exp(-2 * i / head_dim * math.log(theta))
    table = table[: query.size(1)].float()
    cos, sin = table.cos()[None, :, None], table.sin()[None, :, None]
    def rotate(x):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out
    return rotate(query), rotate(key)
""",
    "interleaved tables and a rotated copy": """
    freqs = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.einsum("i,j->ij", torch.arange(query.shape[1]).float(), freqs)
    angle = angle.repeat_interleave(2, dim=-1)[None, :, None, :]
    def rotate_every_two(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)
    return (query * angle.cos() + rotate_every_two(query) * angle.sin(),
            key * angle.cos() + rotate_every_two(key) * angle.sin())
""",
    "rotation matrices, one position and pair at a time": """
    import math
    query, key = query.clone(), key.clone()
    for m in range(query.shape[1]):
        for i in range(head_dim // 2):
            angle = m * theta ** (-2 * i / head_dim)
            c, s = math.cos(angle), math.sin(angle)
            matrix = torch.tensor([[c, -s], [s, c]])
            for x in (query, key):
                x[:, m, :, 2 * i : 2 * i + 2] = x[:, m, :, 2 * i : 2 * i + 2] @ matrix.T
    return [query, key]
""",
    "in place, on copies": """
    wavelengths = theta ** (torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(query.shape[1])[:, None] / wavelengths
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    outputs = []
    for x in (query, key):
        out = x.clone()
        out[..., ::2].mul_(cos).sub_(x[..., 1::2] * sin)
        out[..., 1::2].mul_(cos).add_(x[..., ::2] * sin)
        outputs.append(out)
    return tuple(outputs)
""",
    "in place": """
    wavelengths = theta ** (torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(query.shape[1])[:, None] / wavelengths
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    for x in (query, key):
        real, imag = x[..., ::2].clone(), x[..., 1::2].clone()
        x[..., ::2] = real * cos - imag * sin
        x[..., 1::2] = real * sin + imag * cos
    return query, key
""",
}
NORMS = {
    "rsqrt": "        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)\n",
    "square": "        return x / (x.square().mean(-1)[..., None] + self.eps)**0.5\n",
    "power": "        return x * torch.pow(torch.mean(x**2, -1, True) + self.eps, -1 / 2)\n",
    "norm of a vector": "        n = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5\n"
    "        return x / torch.sqrt(n**2 + self.eps)\n",
    "three axes": "        b, s, d = x.shape\n"
    "        rms = torch.sqrt(torch.einsum('bsd,bsd->bs', x, x) / d + self.eps)\n"
    "        assert rms.shape == (b, s)\n"
    "        return x / rms.unsqueeze(2)\n",
    "in place, on its own numbers": "        x = x.clone()\n"
    "        scale = x.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()\n"
    "        return (x * scale).mul_(1.0)\n",
    "double precision": "        x = x.double()\n"
    "        return F.rms_norm(x, (x.shape[-1],), None, self.eps).float()\n",
}
NORM_FORWARDS = {
    "gain before the cast": "        output = self._norm(x.float()) * self.weight.float()\n"
    "        return output.to(x.dtype)\n",
    "F.rms_norm": "        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)\n",
}
SCORES = {
    "scaled_dot_product_attention": """
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0)
""",
    "einsum": """
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * self.head_dim ** -0.5
        weights = self.attn_dropout(scores.softmax(-1))
        return torch.einsum("bhqk,bhkd->bhqd", weights, value)
""",
    "a loop over the heads": """
        outputs = []
        for head in range(query.shape[1]):
            scores = query[:, head] @ key[:, head].mT / self.head_dim ** 0.5
            weights = torch.softmax(scores, dim=2)
            outputs.append(self.attn_dropout(weights) @ value[:, head])
        return torch.stack(outputs, dim=1)
""",
    "bmm and a softmax of its own": """
        b, h, s, d = query.shape
        q, k, v = (t.reshape(b * h, s, d) for t in (query / math.sqrt(d), key, value))
        scores = torch.bmm(q, k.transpose(1, 2))
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return torch.bmm(self.attn_dropout(weights), v).view(b, h, s, d)
""",
    "a dropout of its own": """
        weights = F.softmax(query @ key.transpose(2, 3) / math.sqrt(query.size(-1)), dim=3)
        if self.training:
            keep = torch.empty_like(weights).bernoulli_(1 - self.dropout)
            weights = weights * keep / (1 - self.dropout)
        return weights @ value
""",
    "functional dropout, and weights in float32": """
        scores = torch.matmul(query, key.swapaxes(-1, -2)) / torch.sqrt(torch.tensor(self.head_dim))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = F.dropout(weights, p=self.dropout, training=self.training)
        return (weights @ value).contiguous()
""",
    "in place": """
        query *= self.head_dim ** -0.5
        scores = query @ key.transpose(2, 3)
        scores -= scores.detach().amax(dim=-1, keepdim=True)
        weights = scores.exp_()
        weights = self.attn_dropout(weights / weights.sum(dim=-1, keepdim=True))
        out = torch.zeros_like(query)
        out += weights @ value
        return out
""",
    "an empty mask": """
        mask = torch.zeros(query.shape[2], key.shape[2])
        scores = query @ key.transpose(-2, -1) / math.sqrt(self.head_dim) + mask
        return self.attn_dropout(F.softmax(scores, dim=-1)) @ value
""",
}
ATTENTIONS = {
    "loops and concatenation": """
        b, s, _ = x.shape
        q = self.compute_query(x).reshape(b, s, -1, self.head_dim)
        k = self.compute_key(x).reshape(b, s, -1, self.head_dim)
        v = self.compute_value(x).reshape(b, s, -1, self.head_dim)
        sizes = {"head_dim": self.head_dim, "max_seq_len": self.max_seq_len}
        q, k = apply_rotary_emb(query=q, key=k, **sizes)
        k = k[:, :, :, None].expand(b, s, k.shape[2], self.n_rep, self.head_dim).flatten(2, 3)
        v = v[:, :, :, None].expand(b, s, v.shape[2], self.n_rep, self.head_dim).flatten(2, 3)
        q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
        out = self.compute_query_key_value_scores(q, k, v)
        out = torch.cat([out[:, h] for h in range(out.shape[1])], dim=-1)
        return F.dropout(self.compute_output(out), self.dropout, training=self.training)
""",
    "keys and values not repeated, scores handed a mask": """
        b, s, _ = x.shape
        q = self.compute_query(x).view(b, s, self.n_local_heads, -1)
        k = self.compute_key(x).view(b, s, self.n_local_kv_heads, -1)
        v = self.compute_value(x).view(b, s, self.n_local_kv_heads, -1)
        q, k = apply_rotary_emb(q, k, self.head_dim, self.max_seq_len, 10000.0)
        out = self.compute_query_key_value_scores(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.resid_dropout(self.compute_output(out.transpose(1, 2).reshape(b, s, -1)))
""",
}
LAYERS = {
    "one expression": """
        h = x + self.attention.forward(self.attention_norm.forward(x))
        return self.feed_forward(self.ffn_norm(h)) + h
""",
    "in place": """
        out = self.attention(self.attention_norm(x))
        out += x
        ffn = self.feed_forward(self.ffn_norm(out))
        ffn += out
        return ffn
""",
    "checkpoints": """
        from torch.utils.checkpoint import checkpoint
        h = x + checkpoint(self.attention, self.attention_norm(x), use_reentrant=True)
        return h + checkpoint(lambda h: self.feed_forward(self.ffn_norm(h)), h, use_reentrant=False)
""",
    "gradients only in training, and a changed copy": """
        with torch.set_grad_enabled(self.training):
            h = x.clone()
            h += self.attention(self.attention_norm(x))
            return h + self.feed_forward(self.ffn_norm(h))
""",
    "x assigned again, and extra arguments": """
        mask = None
        x = x + self.attention(self.attention_norm(x), mask)
        x = torch.add(x, self.feed_forward(self.ffn_norm(x)))
        return x.contiguous()
""",
}
FEEDS = {
    "x * sigmoid(x)": """
        gate = self.w1(x)
        return self.dropout(self.w2(gate * torch.sigmoid(gate) * self.w3(x)))
""",
    "in place": """
        hidden = F.silu(self.w1(x))
        hidden *= self.w3(x)
        return self.dropout(self.w2(hidden))
""",
    "functional": """
        hidden = nn.SiLU()(F.linear(x, self.w1.weight)).mul(F.linear(x, self.w3.weight))
        return F.dropout(F.linear(hidden, self.w2.weight), self.dropout.p, self.training)
""",
}
MODELS = {
    "other names": """
        x = self.dropout(F.embedding(tokens, self.tok_embeddings.weight))
        for i in range(len(self.layers)):
            x = self.layers[i](x, None)
        x = self.norm(x)
        last = x if targets is not None else x[:, -1].unsqueeze(1)
        return F.linear(last, self.output.weight), x
""",
    "checkpoints, and gradients only in training": """
        from torch.utils.checkpoint import checkpoint
        with torch.set_grad_enabled(self.training):
            h = self.dropout(self.tok_embeddings(tokens))
            for layer in self.layers:
                h = checkpoint(layer, h, use_reentrant=False) if self.training else layer(h)
            h = self.norm(h)
            last = h if targets is not None else h[:, -1:]
            return self.output(last), h
""",
    "three results": """
        states = [self.dropout(self.tok_embeddings(tokens))]
        for layer in self.layers:
            states.append(layer(states[-1]))
        h = self.norm(states[-1])
        logits = self.output(h)
        return (logits if targets is not None else logits[:, -1:]), h, states
""",
}
Style = tuple[str, str, str, str, str]  # part, name, file, old, new
STYLES: list[Style] = [
    *(("rope", name, "rope.py", ROPE_BODY, new) for name, new in ROPES.items()),
    *(("RMSNorm", name, "llama.py", NORM_BODY, new) for name, new in NORMS.items()),
    *(("RMSNorm", name, "llama.py", NORM_FORWARD, new) for name, new in NORM_FORWARDS.items()),
    *(("attention scores", name, "llama.py", SCORES_BODY, new) for name, new in SCORES.items()),
    *(("attention", name, "llama.py", ATTENTION_BODY, new) for name, new in ATTENTIONS.items()),
    *(("SwiGLU", name, "llama.py", FEED_BODY, new) for name, new in FEEDS.items()),
    *(("layer", name, "llama.py", LAYER_BODY, new) for name, new in LAYERS.items()),
    *(("Llama.forward", name, "llama.py", MODEL_BODY, new) for name, new in MODELS.items()),
]


def examine_files(part: str, folder: Path, files: dict[str, str]) -> tuple[str, str]:
    finding = examine(BY_NAME[part], Student(write(folder, files)))
    return finding.status, finding.text


def rounds() -> list[tuple[Style, ...]]:
    """Take one style of each part at a time: each part is examined with our parts inside."""
    by_part = defaultdict(list)
    for style in STYLES:
        # An attention hands its keys to the scores, so the two are changed one at a time.
        by_part[style[0].removesuffix(" scores")].append(style)
    return [tuple(style for style in styles if style) for styles in zip_longest(*by_part.values())]


@pytest.mark.parametrize("styles", rounds(), ids=lambda styles: "; ".join(s[1] for s in styles))
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of F.rms_norm, in float16
def test_another_style_is_ok(styles: tuple[Style, ...], tmp_path: Path) -> None:
    files = dict(course.FILES)
    for _, _, file, old, new in styles:
        assert files[file].count(old) == 1
        files[file] = files[file].replace(old, new.lstrip("\n"))
    student = Student(write(tmp_path, files))
    found = [examine(BY_NAME[part], student) for part, *_ in styles]
    assert [(finding.part, finding.status, finding.text) for finding in found] == [
        (part, "ok", "") for part, *_ in styles
    ]


def test_a_config_that_is_causal_by_default_is_found_in_the_scores(tmp_path: Path) -> None:
    files = sources("ours")
    assert files["config.py"].count("causal: bool = False") == 1
    files["config.py"] = files["config.py"].replace("causal: bool = False", "causal: bool = True")
    student = Student(write(tmp_path, files))
    found = {name: examine(part, student) for name, part in BY_NAME.items() if name in MODEL}
    assert found.pop("attention scores").mistake == "causal mask"
    assert {finding.status for finding in found.values()} == {"ok"}


@pytest.mark.parametrize(
    "signature", ["base: float = 10000.0", "offset=0, base=10000", "*, base=1e4", "base"]
)
def test_theta_under_another_name(signature: str, tmp_path: Path) -> None:
    text = course.ROPE.replace("theta: float = 10000.0", signature).replace("theta", "base")
    assert text.count("base") == 2
    status, text = examine_files("rope", tmp_path, {**course.FILES, "rope.py": text})
    assert (status, text) == ("ok", "") if "=" in signature else status == "error"


MASK = "mask = torch.full((tokens.shape[1], tokens.shape[1]), float('-inf')).triu(1)"
SCORES_LINE = "scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.head_dim)"
LOOP = "        for layer in self.layers:"
CALL = "        output = self.compute_query"
LAYER_START = "        attention_input = "


@pytest.mark.parametrize("signature", ["mask", "mask=None"])
@pytest.mark.parametrize("is_made_in_model", [True, False])
def test_a_mask_that_is_handed_down_belongs_to_the_scores(
    is_made_in_model: bool, signature: str, tmp_path: Path
) -> None:
    edits = [
        ("scores(self, query, key, value)", f"scores(self, query, key, value, {signature})"),
        ("scores(query, key, value)", "scores(query, key, value, mask)"),
        (SCORES_LINE, SCORES_LINE + " + mask"),
    ]
    if is_made_in_model:
        forward = "def forward(self, x):\n" + LAYER_START
        edits += [
            (LOOP, f"        {MASK}\n{LOOP}"),
            ("h = layer(h)", "h = layer(h, mask)"),
            (forward, forward.replace("x", f"x, {signature}")),
            ("self.attention(attention_input)", "self.attention(attention_input, mask)"),
            ("def forward(self, x: torch.Tensor):", f"def forward(self, x, {signature}):"),
        ]
    else:
        edits.append((CALL, f"        {MASK.replace('tokens', 'x')}\n{CALL}"))
    text = course.LLAMA
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    student = Student(write(tmp_path, {**course.FILES, "llama.py": text}))
    found = {name: examine(part, student) for name, part in BY_NAME.items() if name in MODEL}
    assert found.pop("attention scores").mistake == "causal mask"
    assert {finding.status for finding in found.values()} == {"ok"}


def test_an_unused_argument_is_ok(tmp_path: Path) -> None:
    text = course.LLAMA.replace("def forward(self, x)", "def forward(self, x, mask)")
    text = text.replace("def forward(self, x: torch.Tensor)", "def forward(self, x, mask)")
    text = text.replace("self.attention(attention_input)", "self.attention(attention_input, mask)")
    files = {**course.FILES, "llama.py": text.replace("h = layer(h)", "h = layer(h, None)")}
    for part in ("attention scores", "attention", "layer", "Llama.forward"):
        assert examine_files(part, tmp_path, files) == ("ok", "")


def test_parameters_named_as_in_meta_are_ok(tmp_path: Path) -> None:
    text = course.LLAMA
    for other, name in {"wq": "query", "wk": "key", "wv": "value", "wo": "output"}.items():
        text = text.replace(f"compute_{name} =", f"{other} =").replace(
            f"self.compute_{name}(", f"self.{other}("
        )
    assert "self.wq(x)" in text and "self.wo = " in text
    files = {**course.FILES, "llama.py": text}
    for part in ("attention scores", "attention", "layer", "Llama.forward"):
        assert examine_files(part, tmp_path, files) == ("ok", "")


@pytest.mark.parametrize("body", ["pass", "...", "return None", "raise NotImplementedError"])
def test_a_body_that_is_not_written_is_todo(body: str, tmp_path: Path) -> None:
    places = {
        "rope": ("rope.py", ROPE_BODY, "    "),
        "RMSNorm": ("llama.py", NORM_BODY, "        "),
        "attention scores": ("llama.py", SCORES_BODY, "        "),
        "attention": ("llama.py", ATTENTION_BODY, "        "),
        "SwiGLU": ("llama.py", FEED_BODY, "        "),
        "layer": ("llama.py", LAYER_BODY, "        "),
        "Llama.forward": ("llama.py", MODEL_BODY, "        "),
    }
    files = dict(course.FILES)
    for file, old, indent in places.values():
        files[file] = files[file].replace(old, f"{indent}{body}\n")
    student = Student(write(tmp_path, files))
    assert {examine(BY_NAME[name], student).status for name in places} == {"todo"}


@pytest.mark.parametrize("body", ["pass", "raise NotImplementedError"])
def test_an_activation_that_is_not_written_is_todo(body: str, tmp_path: Path) -> None:
    old = "return F.silu(self.w1(x)) * self.w3(x)"
    files = {**course.FILES, "llama.py": course.LLAMA.replace(old, body)}
    assert examine_files("SwiGLU", tmp_path, files)[0] == "todo"


def test_a_crash_names_the_line_and_other_parts_are_examined(tmp_path: Path) -> None:
    text = course.LLAMA.replace("rms = torch.sqrt(", "rms = torch.squareroot(")
    files = {**course.FILES, "llama.py": text}
    line = text[: text.index("rms = ")].count("\n") + 1
    status, text = examine_files("RMSNorm", tmp_path, files)
    assert status == "error"
    assert text.startswith(f"llama.py:{line}: AttributeError: module 'torch' has no attribute")
    assert examine_files("layer", tmp_path, files) == ("ok", "")


@pytest.mark.parametrize("text", ["def (", None, "import no_such_package_1", "1 / 0"])
def test_a_rope_that_cannot_be_imported_spoils_no_other_part(
    text: str | None, tmp_path: Path
) -> None:
    files = dict(course.FILES)
    del files["rope.py"]
    if text is not None:
        files["rope.py"] = text
    student = Student(write(tmp_path, files))
    found = {name: examine(part, student) for name, part in BY_NAME.items() if name in MODEL}
    assert found.pop("rope").status == "error"
    assert {finding.status for finding in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("part", "old", "new", "expected"),
    [
        ("RMSNorm", "class RMSNorm(", "class Norm(", "llama.py defines no RMSNorm or LayerNorm"),
        ("layer", "self.ffn_norm =", "self.norm2 =", "there is no parameter LlamaLayer.ffn_norm.w"),
        (
            "SwiGLU",
            "w3 = nn.Linear(dim, hidden_dim",
            "w3 = nn.Linear(dim, dim",
            "has shape (16, 16)",
        ),
        ("Llama.forward", "return logits, h", "return logits", "does not return a pair"),
    ],
)
def test_a_missing_interface_is_an_error(
    part: str, old: str, new: str, expected: str, tmp_path: Path
) -> None:
    assert course.LLAMA.count(old) == 1
    files = {**course.FILES, "llama.py": course.LLAMA.replace(old, new)}
    status, text = examine_files(part, tmp_path, files)
    assert status == "error" and expected in text
