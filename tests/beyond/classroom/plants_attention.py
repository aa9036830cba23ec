"""Mistakes planted in `Attention`."""

from collections.abc import Iterator

from tests.beyond.classroom.planting import Plant, Row, rows

SCORES = "attention scores"
# The course's body. Ours calls scaled_dot_product_attention, so a copy gets this body too.
LOGITS = "        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.head_dim)\n"
SOFTMAX = "        weights = F.softmax(scores, dim=-1)\n"
DROPOUT = "        weights = self.attn_dropout(weights)\n"
OUTPUT = "        return torch.matmul(weights, value)\n"
TRIANGLE = "torch.ones(query.shape[2], query.shape[2])"
FUTURE = f"{TRIANGLE}.triu(1).bool()"
# Entry, one of the four lines, and what takes its place; "{}" is the line itself.
BODIES: tuple[Row, ...] = (
    ("causal mask", LOGITS, f"{{}}        scores = scores.masked_fill({FUTURE}, float('-inf'))\n"),
    (
        "mask hides the past instead of the future",
        LOGITS,
        f"{{}}        scores = scores.masked_fill({TRIANGLE}.triu() == 0, float('-inf'))\n",
    ),
    (
        "mask hides the own position too",
        LOGITS,
        f"{{}}        scores = scores.masked_fill({TRIANGLE}.triu() == 1, float('-inf'))\n",
    ),
    (
        "mask sets scores to 0 instead of minus infinity",
        LOGITS,
        f"{{}}        scores = scores * {TRIANGLE}.tril()\n",
    ),
    ("mask after the softmax", SOFTMAX, f"{{}}        weights = weights * {TRIANGLE}.tril()\n"),
    ("scores not scaled", LOGITS, "        scores = query @ key.transpose(-2, -1)\n"),
    (
        "scores divided by head_dim instead of its root",
        LOGITS,
        "        scores = query @ key.transpose(-2, -1) / query.shape[-1]\n",
    ),
    (
        "scores multiplied by the root of head_dim",
        LOGITS,
        "        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** 0.5\n",
    ),
    (
        "scores divided by the root of dim",
        LOGITS,
        "        scores = query @ key.transpose(-2, -1) / self.compute_query.in_features ** 0.5\n",
    ),
    (
        "scores divided by dim",
        LOGITS,
        "        scores = query @ key.transpose(-2, -1) / self.compute_query.in_features\n",
    ),
    (
        "scores divided by the root of the number of heads",
        LOGITS,
        "        scores = query @ key.transpose(-2, -1) / query.size(1) ** 0.5\n",
    ),
    (
        "scores divided by the root of the sequence's length",
        LOGITS,
        "        scores = query @ key.transpose(-2, -1) / query.size(-2) ** 0.5\n",
    ),
    (
        "scaled after the softmax",
        SOFTMAX,
        "        weights = F.softmax(query @ key.transpose(-2, -1), dim=-1)\n"
        "        weights = weights / query.shape[-1] ** 0.5\n",
    ),
    ("softmax over the queries", SOFTMAX, "        weights = F.softmax(scores, dim=2)\n"),
    ("softmax over the heads", SOFTMAX, "        weights = F.softmax(scores, dim=1)\n"),
    ("softmax over the batch", SOFTMAX, "        weights = F.softmax(scores, dim=0)\n"),
    ("no softmax", SOFTMAX, "        weights = scores\n"),
    ("sigmoid instead of softmax", SOFTMAX, "        weights = torch.sigmoid(scores)\n"),
    ("no gradient for the weights", OUTPUT, "        return weights.data @ value\n"),
    ("no gradient for the values", OUTPUT, "        return weights @ value.detach()\n"),
    ("no gradient", OUTPUT, "        return (weights @ value).detach()\n"),
    (
        "an in-place operation breaks the gradient",
        SOFTMAX,
        "        weights = torch.exp(scores - scores.max())\n"
        "        weights /= weights.sum(dim=-1, keepdim=True)\n",
    ),
    ("values returned as they are", OUTPUT, "        return value\n"),
    ("log_softmax instead of softmax", SOFTMAX, "        weights = scores.log_softmax(-1)\n"),
    ("values not used", OUTPUT, "        return weights\n"),
    ("keys averaged instead of values", OUTPUT, "        return weights @ key\n"),
    ("weights transposed", OUTPUT, "        return weights.transpose(-2, -1) @ value\n"),
    (
        "query and key swapped",
        LOGITS,
        "        scores = key @ query.transpose(-2, -1) / query.shape[-1] ** 0.5\n",
    ),
    ("no dropout on the attention weights", DROPOUT, ""),
    (
        "dropout while evaluating",
        DROPOUT,
        "        weights = F.dropout(weights, self.resid_dropout.p)\n",
    ),
    (
        "dropout on the output instead of the weights",
        DROPOUT + OUTPUT,
        "        return self.resid_dropout(weights @ value)\n",
    ),
    (
        "dropout before the softmax",
        SOFTMAX + DROPOUT,
        "        weights = F.softmax(self.resid_dropout(scores), dim=-1)\n",
    ),
    (
        "dropout with the rate 1 - p",
        DROPOUT,
        "        if self.training and self.resid_dropout.p:\n"
        "            weights = F.dropout(weights, 1 - self.resid_dropout.p)\n",
    ),
    (
        "dropout without dividing by 1 - p",
        DROPOUT,
        "        if self.training:\n"
        "            weights = weights * (torch.rand_like(weights) >= self.resid_dropout.p)\n",
    ),
)
OURS_CALL = """        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, enable_gqa=config.n_rep > 1
        )
"""
OURS_REPEAT = "        key, value = (t.repeat_interleave(config.n_rep, 1) for t in (key, value))\n"
OURS_DIRECT: tuple[Row, ...] = (
    ("causal mask", "dropout, is_causal,", "dropout, True,"),
    ("no dropout on the attention weights", "dropout, is_causal,", "0.0, is_causal,"),
    ("dropout while evaluating", "dropout, is_causal,", "config.dropout, is_causal,"),
    ("scores not scaled", "enable_gqa=config.n_rep > 1", "scale=1.0, enable_gqa=config.n_rep > 1"),
    (
        "key/value heads tiled instead of repeated",
        OURS_CALL,
        "        key, value = (t.repeat(1, config.n_rep, 1, 1) for t in (key, value))\n"
        + OURS_CALL,
    ),
)


def score_plants() -> Iterator[Plant]:
    for entry, line, new in BODIES:
        new = new.format(line)
        yield Plant("course", SCORES, entry, "llama.py", line, new)
        body = (OURS_REPEAT + LOGITS + SOFTMAX + DROPOUT + OUTPUT).replace(line, new)
        body = body.replace("math.sqrt(self.head_dim)", "config.head_dim ** 0.5")
        body = body.replace("self.attn_dropout(weights)", "F.dropout(weights, dropout)")
        yield Plant("ours", SCORES, entry, "llama.py", OURS_CALL, body)
    yield from rows("ours", SCORES, "llama.py", OURS_DIRECT)


COURSE_ROTATED = "query, key = apply_rotary_emb(query, key, self.head_dim, self.max_seq_len)\n"
COURSE_MERGED = "output = output.transpose(1, 2).contiguous().view(batch_size, seqlen, -1)"
COURSE_MOVED = (
    "query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)\n"
)
COURSE_FINISH = "return self.resid_dropout(self.compute_output(output))"
COURSE_QUERY = (
    "query = self.compute_query(x).view(batch_size, seqlen, self.n_local_heads, self.head_dim)"
)
COURSE_REPEATED = """
        key = torch.repeat_interleave(key, dim=2, repeats=self.n_rep)
        value = torch.repeat_interleave(value, dim=2, repeats=self.n_rep)

"""
COURSE: tuple[Row, ...] = (
    ("RoPE without effect", "        " + COURSE_ROTATED, ""),
    ("RoPE without effect", COURSE_ROTATED, COURSE_ROTATED.replace("query, key = ", "")),
    (
        "RoPE without effect",
        COURSE_ROTATED,
        "query, key = apply_rotary_emb(query.transpose(1, 2), key.transpose(1, 2),\n"
        "                                      self.head_dim, self.max_seq_len)\n"
        "        query, key = query.transpose(1, 2), key.transpose(1, 2)\n",
    ),
    (
        "RoPE without effect",
        COURSE_ROTATED + COURSE_REPEATED + "        " + COURSE_MOVED,
        COURSE_REPEATED.lstrip() + "        " + COURSE_MOVED + "        " + COURSE_ROTATED,
    ),
    (
        "RoPE not applied to the key",
        COURSE_ROTATED,
        COURSE_ROTATED.replace("query, key =", "query, _ ="),
    ),
    (
        "RoPE not applied to the query",
        COURSE_ROTATED,
        COURSE_ROTATED.replace("query, key =", "_, key ="),
    ),
    (
        "RoPE applied to the value too",
        COURSE_ROTATED,
        COURSE_ROTATED
        + "        value, _ = apply_rotary_emb(value, value, self.head_dim, self.max_seq_len)\n",
    ),
    ("RoPE applied twice", COURSE_ROTATED, COURSE_ROTATED + "        " + COURSE_ROTATED),
    (
        "projections of query and key swapped",
        "query = self.compute_query(x)",
        "self.compute_query, self.compute_key = self.compute_key, self.compute_query\n"
        "        query = self.compute_query(x)",
    ),
    (
        "value computed by compute_key",
        "value = self.compute_value(x)",
        "value = self.compute_key(x)",
    ),
    ("key computed by compute_value", "key = self.compute_key(x)", "key = self.compute_value(x)"),
    (
        "projections of key and value swapped",
        "query = self.compute_query(x)",
        "self.compute_value, self.compute_key = self.compute_key, self.compute_value\n"
        "        query = self.compute_query(x)",
    ),
    (
        "key/value heads tiled instead of repeated",
        COURSE_REPEATED,
        "\n        key = key.repeat(1, 1, self.n_rep, 1)\n"
        "        value = value.repeat(1, 1, self.n_rep, 1)\n",
    ),
    (
        "heads moved by view instead of transpose",
        COURSE_MOVED,
        "query, key, value = (\n"
        "            t.reshape(batch_size, self.n_local_heads, seqlen, self.head_dim)\n"
        "            for t in (query, key, value)\n"
        "        )\n",
    ),
    (
        "heads not moved back before the output",
        COURSE_MERGED,
        "output = output.contiguous().view(batch_size, seqlen, -1)",
    ),
    (
        "heads and features merged in the wrong order",
        COURSE_MERGED,
        "output = output.permute(0, 2, 3, 1).reshape(batch_size, seqlen, -1)",
    ),
    (
        "no gradient for the input, or only a part of it",
        "query = self.compute_query(x)",
        "query = self.compute_query(x.detach())",
    ),
    (
        "an in-place operation breaks the gradient",
        COURSE_FINISH,
        "gate = output.sigmoid()\n"
        "        output = output * gate / gate\n"
        "        gate += 1\n"
        "        return self.resid_dropout(self.compute_output(output))",
    ),
    ("no output projection", COURSE_FINISH, "return self.resid_dropout(output)"),
    (
        "input added inside the attention",
        COURSE_FINISH,
        "return x + self.resid_dropout(self.compute_output(output))",
    ),
    ("no dropout on the output", COURSE_FINISH, "return self.compute_output(output)"),
    (
        "dropout while evaluating",
        COURSE_FINISH,
        "return F.dropout(self.compute_output(output), self.dropout)",
    ),
    (
        "dropout before the output projection",
        COURSE_FINISH,
        "return self.compute_output(self.resid_dropout(output))",
    ),
)
OURS_ROTATED = """\
        query, key = apply_rotary_emb(query, key, head_dim, config.max_seq_len, config.rope_theta)
"""
OURS_MOVED = """\
        query, key, value = (t.transpose(1, 2) for t in (select(query, positions), key, value))
"""
OURS_MERGED = "output = output.transpose(1, 2).flatten(-2)"
OURS_FINISH = "return self.resid_dropout(self.compute_output(output))"
OURS_SPLIT = "query = self.compute_query(select(x, positions)).unflatten(-1, (-1, head_dim))"
OURS: tuple[Row, ...] = (
    ("RoPE without effect", OURS_ROTATED, ""),
    ("RoPE without effect", OURS_ROTATED + OURS_MOVED, OURS_MOVED + OURS_ROTATED),
    (
        "RoPE not applied to the key",
        OURS_ROTATED,
        OURS_ROTATED.replace("query, key =", "query, _ ="),
    ),
    (
        "RoPE not applied to the query",
        OURS_ROTATED,
        OURS_ROTATED.replace("query, key =", "_, key ="),
    ),
    (
        "RoPE applied to the value too",
        OURS_ROTATED,
        OURS_ROTATED
        + OURS_ROTATED.replace("query, key", "value, _", 1).replace("query, key,", "value, value,"),
    ),
    ("RoPE applied twice", OURS_ROTATED, OURS_ROTATED * 2),
    (
        "value computed by compute_key",
        "value = self.compute_value(x)",
        "value = self.compute_key(x)",
    ),
    ("key computed by compute_value", "key = self.compute_key(x)", "key = self.compute_value(x)"),
    (
        "projections of key and value swapped",
        OURS_SPLIT,
        "self.compute_value, self.compute_key = self.compute_key, self.compute_value\n"
        "        " + OURS_SPLIT,
    ),
    (
        "projections of query and key swapped",
        OURS_SPLIT,
        "self.compute_query, self.compute_key = self.compute_key, self.compute_query\n"
        "        " + OURS_SPLIT,
    ),
    (
        "heads moved by view instead of transpose",
        OURS_MOVED,
        "        query, key, value = (\n"
        "            t.reshape(len(x), -1, x.shape[1], config.head_dim)\n"
        "            for t in (query, key, value)\n"
        "        )\n",
    ),
    (
        "heads not moved back before the output",
        OURS_MERGED,
        "output = output.reshape(x.shape)",
    ),
    (
        "heads and features merged in the wrong order",
        OURS_MERGED,
        "output = output.permute(0, 2, 3, 1).flatten(-2)",
    ),
    (
        "no gradient for the input, or only a part of it",
        "query = self.compute_query(select(x, positions))",
        "query = self.compute_query(select(x.detach(), positions))",
    ),
    (
        "an in-place operation breaks the gradient",
        OURS_FINISH,
        "gate = output.sigmoid()\n"
        "        output = output * gate / gate\n"
        "        gate += 1\n"
        "        return self.resid_dropout(self.compute_output(output))",
    ),
    ("no output projection", OURS_FINISH, "return self.resid_dropout(output)"),
    (
        "input added inside the attention",
        OURS_FINISH,
        "return x + self.resid_dropout(self.compute_output(output))",
    ),
    ("no dropout on the output", OURS_FINISH, "return self.compute_output(output)"),
    (
        "dropout while evaluating",
        OURS_FINISH,
        "return F.dropout(self.compute_output(output), config.dropout)",
    ),
    (
        "dropout before the output projection",
        OURS_FINISH,
        "return self.compute_output(self.resid_dropout(output))",
    ),
)

PLANTS: tuple[Plant, ...] = (
    *score_plants(),
    *rows("course", "attention", "llama.py", COURSE),
    *rows("ours", "attention", "llama.py", OURS),
)
