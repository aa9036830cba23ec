"""Mistakes planted in `rope.py`."""

from tests.beyond.classroom.planting import Plant, Row, rows

OURS_ROPE_PAIRS = "torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)"
OURS_UNBIND = "even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)"
OURS_ANGLES = "angles = torch.outer(positions, frequencies)[:, None, :]"
OURS_FREQUENCIES = "frequencies = 1.0 / theta ** (even_indices / head_dim)"
OURS_RESULT = "return _rotate(query, cos, sin), _rotate(key, cos, sin)"
OURS_SIZES = "cos, sin = rotary_tables(head_dim, max_seq_len, theta, query.device)"
OURS_ROPE: tuple[Row, ...] = (
    (
        "features rotated in pairs, by angles in the order of halves",
        OURS_UNBIND,
        "cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)\n"
        "    other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)\n"
        "    return x * cos + other * sin",
    ),
    (
        "features rotated as halves, by angles in the order of pairs",
        OURS_UNBIND,
        "cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)\n"
        "    first, second = x.chunk(2, -1)\n"
        "    return x * cos + torch.cat((-second, first), -1) * sin",
    ),
    (
        "rotates halves instead of pairs",
        OURS_UNBIND,
        "even, odd = x.float().chunk(2, -1)\n"
        "    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), -1)",
    ),
    ("real and imaginary parts swapped", "    even, odd = x.float()", "    odd, even = x.float()"),
    (
        "rotated parts joined in the wrong order",
        OURS_ROPE_PAIRS,
        "torch.stack((even * sin + odd * cos, even * cos - odd * sin), dim=-1)",
    ),
    (
        "sines and cosines set to zero on alternate positions",
        "    rotated = torch",
        "    cos, sin = cos.clone(), sin.clone()\n"
        "    sin[1::2], cos[0::2] = 0, 0\n"
        "    rotated = torch",
    ),
    (
        "sines and cosines zeroed on alternate positions, and parts added",
        "    rotated = torch",
        "    cos, sin = cos.clone(), sin.clone()\n"
        "    sin[1::2], cos[0::2] = 0, 0\n"
        "    return even * cos - odd * sin + even * sin + odd * cos\n"
        "    rotated = torch",
    ),
    (
        "real and imaginary parts added instead of interleaved",
        "return rotated.flatten(-2).type_as(x)",
        "return rotated.sum(-1)",
    ),
    (
        "real and imaginary parts concatenated instead of interleaved",
        OURS_ROPE_PAIRS,
        "torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-2)",
    ),
    ("rotates by minus theta", "angles.cos(), angles.sin()", "angles.cos(), -angles.sin()"),
    ("no minus sign", "even * cos - odd * sin", "even * cos + odd * sin"),
    ("wrong sign in the imaginary part", "even * sin + odd * cos", "odd * cos - even * sin"),
    (
        "second line reads what the first has overwritten",
        OURS_UNBIND,
        "even, odd = x[..., ::2], x[..., 1::2]\n"
        "    x[..., ::2] = even * cos - odd * sin\n"
        "    x[..., 1::2] = even * sin + odd * cos\n"
        "    return x",
    ),
    (
        "pairs stacked but not flattened",
        "return rotated.flatten(-2).type_as(x)",
        "return rotated.type_as(x)",
    ),
    (
        "fixed base that is not 10000",
        "1.0 / theta ** (even_indices",
        "1.0 / 1000.0 ** (even_indices",
    ),
    (
        "no gradient for query and key",
        "return rotated.flatten(-2).type_as(x)",
        "return torch.tensor(rotated.flatten(-2).tolist())",
    ),
    (
        "no gradient for the query",
        OURS_RESULT,
        "return _rotate(query, cos, sin).detach(), _rotate(key, cos, sin)",
    ),
    (
        "no gradient for the key",
        OURS_RESULT,
        "return _rotate(query, cos, sin), _rotate(key.data, cos, sin)",
    ),
    (
        "an in-place operation breaks the gradient",
        "return rotated.flatten(-2).type_as(x)",
        "length = (x * x).sum(-1, keepdim=True).sqrt()\n"
        "    length += 1e-9\n"
        "    return rotated.flatten(-2) / length * length",
    ),
    ("sine and cosine swapped", "angles.cos(), angles.sin()", "angles.sin(), angles.cos()"),
    (
        "multiplies real by cosine and imaginary by sine only",
        OURS_ROPE_PAIRS,
        "torch.stack((even * cos, odd * sin), dim=-1)",
    ),
    (
        "positions counted along the heads",
        "cos, sin = cos[:seq_len], sin[:seq_len]",
        "cos, sin = (t[: query.shape[2], 0] for t in (cos, sin))",
    ),
    (
        "table of angles transposed, then reshaped",
        "cos, sin = cos[:seq_len], sin[:seq_len]",
        "cos, sin = (t[:seq_len, 0].T.reshape(seq_len, 1, -1) for t in (cos, sin))",
    ),
    ("positions start at 1", "torch.arange(max_seq_len,", "torch.arange(1, max_seq_len + 1,"),
    (
        "uses the last rows of the table",
        "cos[:seq_len], sin[:seq_len]",
        "cos[-seq_len:], sin[-seq_len:]",
    ),
    (
        "frequencies cast to integer",
        OURS_FREQUENCIES,
        "frequencies = (1.0 / theta ** (even_indices / head_dim)).long()",
    ),
    (
        "angles cast to integer",
        "return angles.cos(), angles.sin()",
        "angles = angles.long().float()\n        return angles.cos(), angles.sin()",
    ),
    ("ignores theta", OURS_SIZES, OURS_SIZES.replace("theta", "10000.0")),
    (
        "wrong exponent: the factor 2 is missing",
        OURS_FREQUENCIES,
        "frequencies = 1.0 / theta ** (even_indices / 2 / head_dim)",
    ),
    (
        "wrong exponent: the factor 2 is there twice",
        OURS_FREQUENCIES,
        "frequencies = 1.0 / theta ** (even_indices / (head_dim // 2))",
    ),
    (
        "wrong exponent: the minus sign is missing",
        OURS_FREQUENCIES,
        "frequencies = theta ** (even_indices / head_dim)",
    ),
    (
        "wrong exponent: pairs counted from 1",
        "torch.arange(0, head_dim, 2,",
        "torch.arange(2, head_dim + 2, 2,",
    ),
    (
        "wrong exponent: integer division",
        OURS_FREQUENCIES,
        "frequencies = 1.0 / theta ** (even_indices // head_dim)",
    ),
    ("key not rotated", OURS_RESULT, "return _rotate(query, cos, sin), key"),
    ("query not rotated", OURS_RESULT, "return query, _rotate(key, cos, sin)"),
    ("nothing rotated", OURS_RESULT, "return query, key"),
    (
        "rotated query returned as the key",
        OURS_RESULT,
        "return _rotate(query, cos, sin), _rotate(query, cos, sin)",
    ),
    (
        "heads and positions exchanged in the result",
        OURS_RESULT,
        OURS_RESULT.replace("sin)", "sin).transpose(1, 2)"),
    ),
    (
        "query and key returned in the wrong order",
        OURS_RESULT,
        "return _rotate(key, cos, sin), _rotate(query, cos, sin)",
    ),
    (
        "works only with as many key heads as query heads",
        OURS_RESULT,
        "return _rotate(query, cos, sin), _rotate(key, cos, sin).view(query.shape)",
    ),
)
COURSE_ROPE: tuple[Row, ...] = (
    (
        "rotates halves instead of pairs",
        "    query_out = torch.stack",
        "    query_real, query_imag = query.chunk(2, dim=-1)\n"
        "    key_real, key_imag = key.chunk(2, dim=-1)\n"
        "    query_out = torch.cat((query_real * cos - query_imag * sin,\n"
        "                           query_real * sin + query_imag * cos), dim=-1)\n"
        "    key_out = torch.cat((key_real * cos - key_imag * sin,\n"
        "                         key_real * sin + key_imag * cos), dim=-1)\n"
        "    return query_out, key_out\n"
        "    query_out = torch.stack",
    ),
    (
        "real and imaginary parts swapped",
        "    steps = ",
        "    query_real, query_imag = query_imag, query_real\n"
        "    key_real, key_imag = key_imag, key_real\n"
        "    steps = ",
    ),
    (
        "sines and cosines zeroed on alternate positions, and parts added",
        "    cos, sin = broadcastable(cos, query_real), broadcastable(sin, query_real)\n",
        "    sin[1::2], cos[::2] = 0, 0\n"
        "    cos, sin = broadcastable(cos, query_real), broadcastable(sin, query_real)\n"
        "    return (query_real * cos - query_imag * sin + query_real * sin + query_imag * cos,\n"
        "            key_real * cos - key_imag * sin + key_real * sin + key_imag * cos)\n",
    ),
    (
        "real and imaginary parts concatenated instead of interleaved",
        "    query_out = torch.stack",
        "    return (torch.cat((query_out_real, query_out_imag), dim=-1),\n"
        "            torch.cat((key_out_real, key_out_imag), dim=-1))\n"
        "    query_out = torch.stack",
    ),
    (
        "rotates by minus theta",
        "torch.outer(positions, inv_freq)",
        "-torch.outer(positions, inv_freq)",
    ),
    (
        "table of angles transposed, then reshaped",
        "torch.outer(positions, inv_freq)",
        "torch.outer(inv_freq, positions).view(seqlen, -1)",
    ),
    (
        "positions start at 1",
        "torch.arange(seqlen, device=device)",
        "torch.arange(1, seqlen + 1, device=device)",
    ),
    (
        "wrong exponent: the factor 2 is there twice",
        "(steps / head_dim)",
        "(2 * steps / head_dim)",
    ),
    ("wrong exponent: the minus sign is missing", "1.0 / (theta", "(theta"),
    (
        "frequencies cast to integer",
        "1.0 / (theta ** (steps / head_dim))",
        "(1.0 / (theta ** (steps / head_dim))).int()",
    ),
    ("wrong exponent: integer division", "(steps / head_dim)", "(steps // head_dim)"),
    ("key not rotated", "return query_out.type_as(query), key_out", "return query_out, key"),
    (
        "key computed from the query's parts too",
        "key_out_imag = key_real * sin + key_imag * cos",
        "key_out_imag = key_real * sin + query_imag * cos",
    ),
    (
        "wrong sign in the imaginary part",
        "query_out_imag = query_real * sin + query_imag * cos",
        "query_out_imag = query_imag * cos - query_real * sin",
    ),
    ("no gradient for the key", "key_out.type_as(key)", "torch.tensor(key_out.tolist())"),
    (
        "second line reads what the first has overwritten",
        "    query_out_real = query_real * cos - query_imag * sin\n",
        "    query[..., 0::2] = query_real * cos - query_imag * sin\n"
        "    query[..., 1::2] = query_real * sin + query_imag * cos\n"
        "    key[..., 0::2] = key_real * cos - key_imag * sin\n"
        "    key[..., 1::2] = key_real * sin + key_imag * cos\n"
        "    return query, key\n"
        "    query_out_real = query_real * cos - query_imag * sin\n",
    ),
    (
        "works only with as many key heads as query heads",
        "key_out_imag), dim=-1).reshape(key.shape)",
        "key_out_imag), dim=-1).reshape(query.shape)",
    ),
)

PLANTS: tuple[Plant, ...] = (
    *rows("ours", "rope", "rope.py", OURS_ROPE),
    *rows("course", "rope", "rope.py", COURSE_ROPE),
)
