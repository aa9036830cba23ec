"""The mistakes that are known of `Llama.forward`."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from beyond.classroom.part import Variant
from beyond.classroom.parts.probes import BROKEN, NO_GRADIENT, broken, entry, keep_changes
from llama import Llama

WHERE = "llama.py, Llama.forward"
Forward = Callable[..., Any]  # of tokens and targets; returns logits and hidden states
Build = Callable[[Llama], Forward]  # an implementation with this one's modules and mode

Step = Callable[[Llama, Tensor], Tensor]


def embed(model: Llama, tokens: Tensor) -> Tensor:
    return model.dropout(model.tok_embeddings(tokens))


def run_layers(model: Llama, h: Tensor) -> Tensor:
    for layer in model.layers:
        h = layer(h)
    return h


@keep_changes
def variant(
    embed: Step = embed,
    run_layers: Step = run_layers,
    normalize: Step = lambda model, h: model.norm(h),
    column: Callable[[Tensor], Tensor] = lambda x: x[:, -1:],
    all_columns: Callable[[Tensor], Tensor] = lambda x: x,
    project: Step = lambda model, h: model.output(h),
    finish: Callable[[Llama, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda *args: args[
        1:3
    ],
) -> Build:
    """Make a model with one step changed; by default it is right."""

    def build(model: Llama) -> Forward:
        def forward(tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
            before = run_layers(model, embed(model, tokens))
            hidden = normalize(model, before)
            choose = column if targets is None else all_columns
            return finish(model, project(model, choose(hidden)), hidden, before)

        return forward

    return build


def drop_always(model: Llama, tokens: Tensor) -> Tensor:
    return F.dropout(model.tok_embeddings(tokens), model.config.dropout)


def drop_after(model: Llama, h: Tensor) -> Tensor:
    return model.dropout(run_layers(model, h))


def feed_embeddings(model: Llama, h: Tensor) -> Tensor:
    return model.layers[-1](h)


def normalize_each(model: Llama, h: Tensor) -> Tensor:
    for layer in model.layers:
        h = model.norm(layer(h))
    return h


def last_before_norm(
    model: Llama, logits: Tensor, hidden: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    return logits, before if logits.shape[1] > 1 else before[:, -1:]


def without_norm(model: Llama, h: Tensor) -> Tensor:
    return h


VARIANTS: tuple[Variant, ...] = tuple(
    entry(subject, WHERE, name, why)
    for subject, name, why in (
        (
            variant(column=lambda x: x[:, :1]),
            "logits of the first column",
            "The next token follows the last column: hidden[:, [-1], :].",
        ),
        (
            variant(column=lambda x: x[:, -2:-1]),
            "logits of the column before the last",
            "The next token follows the last column: hidden[:, [-1], :].",
        ),
        (
            variant(column=lambda x: x[:, -1]),
            "logits without the axis of columns",
            "Without targets the shape is (batch, 1, vocab). hidden[:, -1] removes the axis; "
            "hidden[:, [-1], :] keeps it.",
        ),
        (
            variant(all_columns=lambda x: x[:, -1:]),
            "logits of the last column only, with targets",
            "If targets are given, the logits of all columns are wanted, (batch, seq, vocab).",
        ),
        (
            variant(normalize=without_norm),
            "final norm left out",
            "The last layer's output goes through self.norm before the projection to the "
            "vocabulary.",
        ),
        (
            variant(finish=lambda model, logits, hidden, before: (logits, before)),
            "hidden states from before the final norm",
            "The logits are right, but the hidden states that the classifier uses are not "
            "normalized. Return norm(h).",
        ),
        (
            variant(
                normalize=without_norm,
                finish=lambda model, logits, hidden, before: (logits, model.norm(before)),
            ),
            "logits from before the final norm",
            "The logits are computed from what goes into the norm, instead of what comes out.",
        ),
        (
            variant(normalize=lambda model, h: model.norm(model.norm(h))),
            "final norm applied twice",
            "One self.norm, after the last layer.",
        ),
        (
            variant(project=lambda model, h: model.output(model.norm(h))),
            "final norm applied twice for the logits",
            "The hidden states are normalized already.",
        ),
        (
            variant(run_layers=normalize_each, normalize=without_norm),
            "final norm after every layer",
            "self.norm is applied once, after the last layer. It may stand inside the loop.",
        ),
        (
            variant(run_layers=normalize_each),
            "final norm after every layer, and at the end",
            "self.norm is applied once, after the last layer.",
        ),
        (
            variant(embed=lambda model, tokens: embed(model, tokens) * model.config.dim**0.5),
            "embeddings multiplied by the root of dim",
            "The original Transformer and Gemma do that; Llama uses the embeddings as they are.",
        ),
        (
            variant(run_layers=lambda model, h: model.layers[0](h)),
            "only the first layer",
            "Each layer's output is the next layer's input. A return or an assignment may be "
            "inside the loop.",
        ),
        (
            variant(run_layers=feed_embeddings),
            "every layer is fed the embeddings",
            "Only the last layer counts. A layer's output is the next one's input: h = layer(h).",
        ),
        (
            variant(run_layers=lambda model, h: h),
            "no layers",
            "The layers' output is not used. Each layer's output is the next one's input: "
            "h = layer(h).",
        ),
        (
            variant(run_layers=lambda model, h: model.layers[1](model.layers[0](h))),
            "last layer left out",
            "All layers are run, in order.",
        ),
        (
            variant(
                run_layers=lambda model, h: model.layers[0](model.layers[1](model.layers[2](h)))
            ),
            "layers in reverse order",
            "Layer 0 comes first.",
        ),
        (
            variant(project=lambda model, h: model.output(h).softmax(dim=-1)),
            "probabilities instead of logits",
            "Loss and generate apply the softmax. Return what self.output gives.",
        ),
        (
            variant(project=lambda model, h: model.output(h).log_softmax(dim=-1)),
            "log-probabilities instead of logits",
            "The text is the same, but sanity_check.data holds the logits. Return what self.output "
            "gives.",
        ),
        (
            variant(finish=lambda model, logits, hidden, before: (logits, hidden[:, -1:])),
            "hidden states of the last column only",
            "Return the hidden states of all columns, (batch, seq, dim).",
        ),
        (
            variant(finish=lambda model, logits, hidden, before: (hidden, logits)),
            "hidden states and logits returned in the wrong order",
            "The logits come first.",
        ),
        (
            variant(embed=lambda model, tokens: model.tok_embeddings(tokens)),
            "no dropout on the embeddings",
            "Apply self.dropout to the embeddings.",
        ),
        (
            variant(embed=lambda model, tokens: embed(model, tokens).detach()),
            "no gradient for the embeddings",
            NO_GRADIENT,
        ),
        (
            variant(finish=lambda model, logits, hidden, before: (logits, hidden.detach())),
            "no gradient for the hidden states",
            NO_GRADIENT + " The classifiers train on the hidden states.",
        ),
        (
            variant(finish=lambda model, logits, hidden, before: (logits.detach(), hidden)),
            "no gradient for the logits",
            NO_GRADIENT,
        ),
        (
            variant(embed=lambda model, tokens: broken(embed(model, tokens))),
            "an in-place operation breaks the gradient",
            BROKEN,
        ),
        (
            variant(embed=drop_always),
            "dropout while evaluating",
            "F.dropout is active unless it is given training=self.training, so results are random. "
            "An nn.Dropout follows train() and eval() by itself.",
        ),
        (
            variant(
                embed=lambda model, tokens: model.tok_embeddings(tokens), run_layers=drop_after
            ),
            "dropout after the layers instead of before",
            "Apply self.dropout to the embeddings.",
        ),
    )
) + (
    entry(
        variant(column=lambda x: x),
        WHERE,
        "logits of all columns",
        "Without targets only the last column's logits are wanted, (batch, 1, vocab). All of them "
        "take much time and memory, and generate and the classifiers expect one column.",
        seen="Alva789ro/Min-Llama2",
    ),
    entry(
        variant(finish=last_before_norm),
        WHERE,
        "hidden states of the last column only, from before the final norm",
        "Return the normalized hidden states of all columns, (batch, seq, dim).",
        seen="ggrantrichards/minllama-assignment",
    ),
)
