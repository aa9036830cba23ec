"""Mistakes planted in `FeedForward`, `LlamaLayer` and `Llama.forward`."""

from collections.abc import Iterator

from tests.beyond.classroom.planting import Plant, Row, rows

# The same lines are in both dialects.
SWIGLU = "return F.silu(self.w1(x)) * self.w3(x)"
DOWN = "return self.dropout(self.w2(self.SwiGLU(x)))"
FEED_FORWARD: tuple[Row, ...] = (
    ("gate and up swapped", SWIGLU, "return F.silu(self.w3(x)) * self.w1(x)"),
    ("no activation", SWIGLU, "return self.w1(x) * self.w3(x)"),
    ("GELU instead of SiLU", SWIGLU, "return F.gelu(self.w1(x)) * self.w3(x)"),
    (
        "GELU instead of SiLU",
        SWIGLU,
        "return F.gelu(self.w1(x), approximate='tanh') * self.w3(x)",
    ),
    ("ReLU instead of SiLU", SWIGLU, "return F.relu(self.w1(x)) * self.w3(x)"),
    ("sigmoid instead of SiLU", SWIGLU, "return torch.sigmoid(self.w1(x)) * self.w3(x)"),
    ("tanh instead of SiLU", SWIGLU, "return torch.tanh(self.w1(x)) * self.w3(x)"),
    ("sum instead of product", SWIGLU, "return F.silu(self.w1(x)) + self.w3(x)"),
    ("SiLU of the product", SWIGLU, "return F.silu(self.w1(x) * self.w3(x))"),
    ("SiLU on both factors", SWIGLU, "return F.silu(self.w1(x)) * F.silu(self.w3(x))"),
    ("no up projection", SWIGLU, "return F.silu(self.w1(x))"),
    ("no down projection", DOWN, "return self.SwiGLU(x)"),
    (
        "input added inside the feed-forward network",
        DOWN,
        "return x + self.dropout(self.w2(self.SwiGLU(x)))",
    ),
    ("no dropout", DOWN, "return self.w2(self.SwiGLU(x))"),
    ("dropout while evaluating", DOWN, "return F.dropout(self.w2(self.SwiGLU(x)), self.dropout.p)"),
    (
        "no gradient for the input, or only a part of it",
        SWIGLU,
        "return F.silu(self.w1(x)).detach() * self.w3(x)",
    ),
    (
        "an in-place operation breaks the gradient",
        SWIGLU,
        "gate = self.w1(x)\n"
        "        share = gate.sigmoid()\n"
        "        share *= gate\n"
        "        return share * self.w3(x)",
    ),
    ("dropout on the hidden layer", DOWN, "return self.w2(self.dropout(self.SwiGLU(x)))"),
)

OURS_LAYER = """\
        h = select(x, positions) + self.attention(self.attention_norm(x), positions)
        return h + self.feed_forward(self.ffn_norm(h))
"""
COURSE_LAYER = """        attention_input = self.attention_norm(x)
        attention_output = self.attention(attention_input)
        h = x + attention_output
        ffn_input = self.ffn_norm(h)
        ffn_output = self.feed_forward(ffn_input)
        return h + ffn_output
"""
FIRST = "h = x + self.attention(self.attention_norm(x))"
SECOND = "return h + self.feed_forward(self.ffn_norm(h))"
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (  # entry, and the body
    (
        "norm after the residual connection (post-norm)",
        (
            "h = self.attention_norm(x + self.attention(x))",
            "return self.ffn_norm(h + self.feed_forward(h))",
        ),
    ),
    (
        "norms after attention and feed-forward network",
        (
            "h = x + self.attention_norm(self.attention(x))",
            "return h + self.ffn_norm(self.feed_forward(h))",
        ),
    ),
    ("no norms", ("h = x + self.attention(x)", "return h + self.feed_forward(h)")),
    ("no norm before the attention", ("h = x + self.attention(x)", SECOND)),
    ("no norm before the feed-forward network", (FIRST, "return h + self.feed_forward(h)")),
    ("attention_norm used twice", (FIRST, SECOND.replace("ffn_norm", "attention_norm"))),
    ("ffn_norm used twice", (FIRST.replace("attention_norm", "ffn_norm"), SECOND)),
    (
        "the two norms swapped",
        (
            FIRST.replace("attention_norm", "ffn_norm"),
            SECOND.replace("ffn_norm", "attention_norm"),
        ),
    ),
    (
        "no residual connection around the attention",
        ("h = self.attention(self.attention_norm(x))", SECOND),
    ),
    (
        "no residual connection around the feed-forward network",
        (FIRST, "return self.feed_forward(self.ffn_norm(h))"),
    ),
    (
        "no residual connections",
        (
            "h = self.attention(self.attention_norm(x))",
            "return self.feed_forward(self.ffn_norm(h))",
        ),
    ),
    (
        "second residual connection from the layer's input",
        (FIRST, "return x + self.feed_forward(self.ffn_norm(h))"),
    ),
    ("input added twice", (FIRST, "return x + h + self.feed_forward(self.ffn_norm(h))")),
    (
        "second residual connection from the attention's output",
        (
            "a = self.attention(self.attention_norm(x))",
            "return a + self.feed_forward(self.ffn_norm(x + a))",
        ),
    ),
    (
        "first residual connection from the normalized input",
        ("x = self.attention_norm(x)", "h = x + self.attention(x)", SECOND),
    ),
    (
        "second residual connection from the normalized input",
        (FIRST, "h = self.ffn_norm(h)", "return h + self.feed_forward(h)"),
    ),
    (
        "both residual connections from the normalized input",
        (
            "x = self.attention_norm(x)",
            "x = self.ffn_norm(x + self.attention(x))",
            "return x + self.feed_forward(x)",
        ),
    ),
    (
        "feed-forward network without the residual stream",
        (
            "a = self.attention(self.attention_norm(x))",
            "return x + a + self.feed_forward(self.ffn_norm(a))",
        ),
    ),
    (
        "ffn_norm applied to the layer's output, attention_norm to the rest",
        (
            "x = self.attention_norm(x)",
            "a = self.attention(x)",
            "a += x",
            "return self.ffn_norm(a + self.feed_forward(self.attention_norm(a)))",
        ),
    ),
    (
        "ffn_norm applied to the layer's output too",
        (FIRST, "return self.ffn_norm(h + self.feed_forward(self.ffn_norm(h)))"),
    ),
    (
        "attention and feed-forward network in parallel",
        (FIRST, "return h + self.feed_forward(self.ffn_norm(x))"),
    ),
    (
        "attention and feed-forward network in parallel, with one norm",
        (
            "n = self.attention_norm(x)",
            "return x + self.attention(n) + self.feed_forward(n)",
        ),
    ),
    (
        "feed-forward network before the attention",
        (
            "h = x + self.feed_forward(self.ffn_norm(x))",
            "return h + self.attention(self.attention_norm(h))",
        ),
    ),
    (
        "an in-place addition breaks the gradient",
        (
            "x += self.attention(self.attention_norm(x))",
            "x += self.feed_forward(self.ffn_norm(x))",
            "return x",
        ),
    ),
    (
        "an in-place addition breaks the gradient",
        (FIRST, "h += self.feed_forward(self.ffn_norm(h))", "return h"),
    ),
    (
        "no gradient for the input, or only a part of it",
        (
            "with torch.no_grad():",
            "    h = x + self.attention(self.attention_norm(x))",
            SECOND,
        ),
    ),
    ("no feed-forward network", ("return x + self.attention(self.attention_norm(x))",)),
    ("no attention", ("return x + self.feed_forward(self.ffn_norm(x))",)),
)

COURSE_LAST = "logits = self.output(h[:, [-1], :])"
COURSE_ALL = "logits = self.output(h)"
COURSE_NORM = "        h = self.norm(h)\n"
COURSE_RETURN = "        return logits, h\n"
COURSE_EMBED = "        h = self.tok_embeddings(tokens)\n"
COURSE_DROP = "        h = self.dropout(h)\n"
COURSE_TAIL = (
    COURSE_NORM
    + """        if targets is not None:
            logits = self.output(h)
        else:
            logits = self.output(h[:, [-1], :])
        return logits, h
"""
)
COURSE_LOOP = "        for layer in self.layers:\n            h = layer(h)\n"
COURSE_MODEL: tuple[Row, ...] = (
    ("logits of all columns", COURSE_LAST, COURSE_ALL),
    ("logits of the first column", COURSE_LAST, "logits = self.output(h[:, [0], :])"),
    ("logits of the column before the last", COURSE_LAST, "logits = self.output(h[:, [-2], :])"),
    ("logits without the axis of columns", COURSE_LAST, "logits = self.output(h[:, -1, :])"),
    ("logits of the last column only, with targets", COURSE_ALL + "\n", COURSE_LAST + "\n"),
    ("final norm left out", COURSE_NORM, ""),
    (
        "hidden states from before the final norm",
        COURSE_TAIL,
        COURSE_TAIL.replace("h = self.norm(h)", "before, h = h, self.norm(h)").replace(
            "return logits, h", "return logits, before"
        ),
    ),
    (
        "logits from before the final norm",
        COURSE_TAIL,
        COURSE_TAIL.replace(COURSE_NORM, "").replace(
            "return logits, h", "return logits, self.norm(h)"
        ),
    ),
    (
        "hidden states of the last column only, from before the final norm",
        COURSE_TAIL,
        COURSE_TAIL.replace("h = self.norm(h)", "before, h = h, self.norm(h)").replace(
            "return logits, h", "return logits, before if targets is not None else before[:, [-1]]"
        ),
    ),
    ("final norm applied twice", COURSE_NORM, COURSE_NORM * 2),
    ("final norm after every layer", COURSE_LOOP + COURSE_NORM, COURSE_LOOP + "    " + COURSE_NORM),
    (
        "embeddings multiplied by the root of dim",
        COURSE_EMBED,
        COURSE_EMBED + "        h = h * math.sqrt(h.shape[-1])\n",
    ),
    ("only the first layer", COURSE_LOOP, COURSE_LOOP + "            break\n"),
    (
        "every layer is fed the embeddings",
        COURSE_LOOP,
        "        for layer in self.layers:\n            out = layer(h)\n        h = out\n",
    ),
    ("no layers", COURSE_LOOP, "        for layer in self.layers:\n            layer(h)\n"),
    ("last layer left out", "for layer in self.layers:", "for layer in self.layers[:-1]:"),
    ("layers in reverse order", "for layer in self.layers:", "for layer in self.layers[::-1]:"),
    (
        "hidden states of the last column only",
        COURSE_RETURN,
        "        return logits, h[:, [-1], :]\n",
    ),
    (
        "hidden states and logits returned in the wrong order",
        COURSE_RETURN,
        "        return h, logits\n",
    ),
    ("probabilities instead of logits", COURSE_RETURN, "        return logits.softmax(-1), h\n"),
    (
        "log-probabilities instead of logits",
        COURSE_RETURN,
        "        return F.log_softmax(logits, dim=-1), h\n",
    ),
    ("no gradient for the embeddings", COURSE_DROP, COURSE_DROP + "        h = h.detach()\n"),
    (
        "no gradient for the hidden states",
        COURSE_RETURN,
        "        return logits, h.detach()\n",
    ),
    ("no gradient for the logits", COURSE_RETURN, "        return logits.data, h\n"),
    (
        "an in-place operation breaks the gradient",
        COURSE_NORM,
        COURSE_NORM + "        gate = h.exp()\n        h = h * gate / gate\n        gate += 1\n",
    ),
    ("no dropout on the embeddings", COURSE_DROP, ""),
    ("dropout while evaluating", COURSE_DROP, "        h = F.dropout(h, self.params.dropout)\n"),
    (
        "dropout after the layers instead of before",
        COURSE_DROP + COURSE_LOOP,
        COURSE_LOOP + COURSE_DROP,
    ),
)
OURS_LOGITS = "logits = self.output(hidden if targets is not None else hidden[:, -1:])"
OURS_EMBED = "h = self.dropout(self.tok_embeddings(tokens))"
OURS_RUN = """\
        for layer in self.layers[:-1]:
            h = layer(h)
        return self.norm(self.layers[-1](h, positions))
"""
LOOP = "        for layer in self.layers:\n            h = layer(h)\n"
NORM = "        return self.norm(h)\n"
OURS_MODEL: tuple[Row, ...] = (
    ("logits of all columns", OURS_LOGITS, "logits = self.output(hidden)"),
    ("logits of the first column", "else hidden[:, -1:])", "else hidden[:, :1])"),
    ("logits of the column before the last", "else hidden[:, -1:])", "else hidden[:, -2:-1])"),
    ("logits without the axis of columns", "else hidden[:, -1:])", "else hidden[:, -1])"),
    (
        "logits of the last column only, with targets",
        OURS_LOGITS,
        "logits = self.output(hidden[:, -1:])",
    ),
    ("final norm left out", OURS_RUN, LOOP + "        return h\n"),
    (
        "final norm applied twice for the logits",
        OURS_LOGITS,
        OURS_LOGITS.replace("hidden if", "self.norm(hidden) if").replace(
            "hidden[:, -1:]", "self.norm(hidden[:, -1:])"
        ),
    ),
    ("final norm applied twice", OURS_RUN, LOOP + "        return self.norm(self.norm(h))\n"),
    (
        "final norm after every layer",
        OURS_RUN,
        LOOP.replace("layer(h)", "self.norm(layer(h))") + "        return h\n",
    ),
    (
        "final norm after every layer, and at the end",
        OURS_RUN,
        LOOP.replace("layer(h)", "self.norm(layer(h))") + NORM,
    ),
    (
        "embeddings multiplied by the root of dim",
        OURS_EMBED,
        OURS_EMBED + " * self.config.dim**0.5",
    ),
    ("only the first layer", OURS_RUN, LOOP + "            break\n" + NORM),
    ("last layer left out", "self.norm(self.layers[-1](h, positions))", "self.norm(h)"),
    ("layers in reverse order", OURS_RUN, LOOP.replace("layers:", "layers[::-1]:") + NORM),
    ("no layers", OURS_RUN, NORM),
    (
        "hidden states of the last column only",
        "        return logits, hidden\n",
        "        return logits, hidden[:, -1:]\n",
    ),
    ("no gradient for the embeddings", OURS_EMBED, f"{OURS_EMBED}.detach()"),
    ("no dropout on the embeddings", OURS_EMBED, "h = self.tok_embeddings(tokens)"),
    (
        "dropout while evaluating",
        OURS_EMBED,
        "h = F.dropout(self.tok_embeddings(tokens), self.config.dropout)",
    ),
    (
        "dropout after the layers instead of before",
        f"        {OURS_EMBED}\n{OURS_RUN}",
        "        h = self.tok_embeddings(tokens)\n"
        f"{LOOP}        return self.norm(self.dropout(h))\n",
    ),
)


def layer_plants() -> Iterator[Plant]:
    for entry, lines in LAYERS:
        body = "".join(f"        {line}\n" for line in lines)
        yield Plant("ours", "layer", entry, "llama.py", OURS_LAYER, body)
        yield Plant("course", "layer", entry, "llama.py", COURSE_LAYER, body)


PLANTS: tuple[Plant, ...] = (
    *rows("ours", "SwiGLU", "llama.py", FEED_FORWARD),
    *rows("course", "SwiGLU", "llama.py", FEED_FORWARD),
    *layer_plants(),
    *rows("ours", "Llama.forward", "llama.py", OURS_MODEL),
    *rows("course", "Llama.forward", "llama.py", COURSE_MODEL),
)
