"""Stops 1 to 6: from the text to the next token."""

import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from beyond.classroom.stops.layer import OpenedLayer, open_layer, rotate
from beyond.classroom.stops.pictures import draw_angles, draw_silu, draw_weights
from beyond.classroom.stops.walk import (
    Places,
    Walk,
    layers_of,
    numbers,
    quote,
    root_mean_square,
    table,
    three,
)
from llama import token_probabilities

TEMPERATURES = (0.5, 1.0, 2.0)
NEW_TOKENS = 8  # that are generated
DOTS = 60  # gates in the picture of silu
# Positions of a query and a key: three times the same distance, then two other distances.
DISTANCES = ((3, 1), (13, 11), (43, 41), (3, 0), (3, 3))


def describe_model(walk: Walk) -> Places:
    """Fill in the sentence and the sizes of the model."""
    c = walk.llama.config
    sizes = [
        ("`vocab_size`", c.vocab_size, "pieces that the tokenizer knows"),
        ("`dim`", c.dim, "numbers that stand for one token"),
        ("`n_layers`", c.n_layers, "layers, one after the other"),
        ("`n_heads`", c.n_heads, "attention heads (of the queries) in a layer"),
        ("`n_kv_heads`", c.n_kv_heads, "heads of keys and values"),
        ("`head_dim`", c.head_dim, "numbers in a head: dim / n_heads"),
        ("`hidden_dim`", c.hidden_dim, "units of the feed-forward network"),
        ("`max_seq_len`", c.max_seq_len, "tokens that the model can see at once"),
    ]
    names = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim")
    return {
        **{name: str(getattr(c, name)) for name in (*names, "n_rep")},
        "table_sizes": table(("name in the code", "value", "what it counts"), sizes),
        "sentence": walk.sentence,
        "sentence_code": quote(walk.sentence),
        "seq": str(len(walk.ids)),
        "last": quote(walk.pieces[-1]),
        "last_position": str(len(walk.ids) - 1),
        "eps": f"{c.layer_norm_eps:g}",
        "theta": f"{c.rope_theta:g}",
        "n_labels": str(len(walk.label_names)),
    }


def embed(walk: Walk) -> Places:
    """Stops 1 and 2: pieces, ids and embeddings."""
    matrix = walk.llama.tok_embeddings.weight
    last = walk.ids[-1]
    likeness = F.cosine_similarity(matrix, matrix[last : last + 1])
    nearest = [number for number in likeness.topk(7).indices.tolist() if number != last][:6]
    rows = [
        (position, quote(walk.piece(number)), numbers(matrix[number], 6))
        for position, number in enumerate(walk.ids)
    ]
    is_bos = walk.ids[0] == walk.tokenizer.bos_id
    return {
        "table_pieces": table(
            ("position", "piece", "id"),
            [(i, quote(walk.piece(number)), number) for i, number in enumerate(walk.ids)],
        ),
        "note_bos": f"{quote(walk.pieces[0])} (BOS) marks where a text begins." if is_bos else "",
        "table_embeddings": table(("position", "piece", "its row begins with"), rows),
        "neighbours": ", ".join(quote(walk.piece(number)) for number in nearest),
    }


def turn(walk: Walk, opened: OpenedLayer) -> Places:
    """Stops 3.1 to 3.3: RMSNorm, queries, and their rotation."""
    layer, config, last = layers_of(walk.llama)[0], walk.llama.config, len(walk.ids) - 1
    x = walk.llama.tok_embeddings.weight[walk.ids[-1]]
    plain = layer.attention_norm.norm(x)
    n_pairs = config.head_dim // 2
    pairs = sorted({0, n_pairs // 8, n_pairs // 4, n_pairs // 2})
    query, rotated = (t[-1, 0].unflatten(0, (-1, 2)) for t in (opened.query, opened.rotated_query))
    rows = [
        (
            pair,
            last * config.rope_theta ** (-2 * pair / config.head_dim),
            *(f"({a:.3f}, {b:.3f})" for a, b in (query[pair].tolist(), rotated[pair].tolist())),
            query[pair].norm().item(),
            rotated[pair].norm().item(),
        )
        for pair in pairs
    ]
    length = 1 + max(map(max, DISTANCES))
    everywhere = [t[i, :1].expand(length, 1, -1) for t, i in ((opened.query, -1), (opened.key, 1))]
    queries, keys = rotate(layer, *everywhere)
    products = [(m, n, m - n, (queries[m, 0] @ keys[n, 0]).item()) for m, n in DISTANCES]
    turned = queries[: last + 1, 0].unflatten(-1, (-1, 2))[:, pairs]
    walk.pictures["angles.svg"] = draw_angles(pairs, turned)
    values = {"rms_x": x, "rms_norm": plain, "rms_normed": opened.normed[-1]}
    header = ("pair", "angle in radians", "before", "after", "length before", "length after")
    return {
        **{name: three(root_mean_square(row)) for name, row in values.items()},
        **{name.replace("rms", "row"): numbers(row) for name, row in values.items()},
        "n_pairs": str(n_pairs),
        "table_rotation": table(header, rows),
        "other": quote(walk.pieces[1]),
        "table_distance": table(
            ("position of the query", "position of the key", "distance", "product"), products
        ),
    }


def attend(walk: Walk, opened: OpenedLayer, unmasked: OpenedLayer) -> Places:
    """Stops 3.4 and 3.5: scores, weights, and what is collected."""
    root = math.sqrt(walk.llama.config.head_dim)
    rows = [
        (j, quote(piece), score * root, score, weight)
        for j, (piece, score, weight) in enumerate(
            zip(
                walk.pieces,
                opened.scores[0, -1].tolist(),
                opened.weights[0, -1].tolist(),
                strict=True,
            )
        )
    ]
    walk.pictures["attention.svg"] = draw_weights(
        walk.pieces, unmasked.weights[0], opened.weights[0]
    )
    header = ("position", "key of", "query · key", "score", "weight")
    return {
        "root": three(root),
        "table_scores": table(header, rows),
        "row_head": numbers(opened.averages[-1, 0]),
        "row_attended": numbers(opened.attended[-1]),
        "row_middle": numbers(opened.middle[-1]),
    }


def feed(walk: Walk, opened: OpenedLayer) -> Places:
    """Stop 3.6: SwiGLU."""
    gate, up = opened.gate[-1], opened.up[-1]
    silu = gate * torch.sigmoid(gate)
    columns = (t[:5].tolist() for t in (gate, silu, up, silu * up))
    walk.pictures["silu.svg"] = draw_silu(gate[:DOTS].tolist())
    rows = [(unit, *values) for unit, values in enumerate(zip(*columns, strict=True))]
    header = ("unit", "gate: w1 x", "silu(gate)", "up: w3 x", "silu(gate) * up")
    return {
        "n_dots": str(min(DOTS, len(gate))),
        "table_swiglu": table(header, rows),
        "row_feed_forward": numbers(opened.fed[-1]),
        "row_result": numbers(opened.result[-1]),
    }


def predict(walk: Walk) -> Places:
    """Stops 4 to 6: all layers, logits, and the next token."""
    llama, ids = walk.llama, torch.tensor([walk.ids])
    stream = [llama.tok_embeddings(ids)[0]]
    for layer in layers_of(llama):
        stream.append(open_layer(layer, stream[-1]).result)
    guesses = [llama.output(llama.norm(h[-1])) for h in stream]
    logits = llama(ids)[0][:, -1]  # (1, vocab)
    assert_close(guesses[-1], logits[0])
    chosen = logits.argmax().item()
    rows = []
    for i, (h, guess) in enumerate(zip(stream, guesses, strict=True)):
        place = f"layer {i - 1}" if i else "the embedding"
        best, chance = quote(walk.piece(int(guess.argmax()))), guess.softmax(-1)[chosen].item()
        rows.append((place, root_mean_square(h[-1]), best, chance))
    best_five = logits[0].topk(5).indices.tolist()
    chances = [token_probabilities(logits, temperature)[0] for temperature in TEMPERATURES]
    next_rows = [
        (quote(walk.piece(i)), logits[0, i].item(), *(p[i].item() for p in chances))
        for i in best_five
    ]
    generated = llama.generate(ids, NEW_TOKENS, temperature=0.0)[0].tolist()
    assert generated[len(walk.ids)] == chosen
    next_piece = quote(walk.piece(chosen))
    tied = llama.config.tie_embeddings
    header = ("after", "root mean square", "likeliest next piece", f"probability of {next_piece}")
    return {
        "table_stream": table(header, rows),
        "note_tied": (
            "These rows are the embeddings of stop 2: both uses share one matrix."
            if tied
            else "The rows for this are a matrix of their own, `output`."
        ),
        "table_next": table(
            ("piece", "logit", *(f"p at temperature {t:g}" for t in TEMPERATURES)), next_rows
        ),
        "next": next_piece,
        "n_generated": str(NEW_TOKENS),
        "generated": walk.tokenizer.decode(generated),
    }
