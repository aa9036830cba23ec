"""The interface of training loop and methods: what a step computes, and what is kept.

`build_method` returns a `Method`, the module that is trained. It holds the classifier and the
`Ingredient`s that the flags ask for. The training loop calls, in this order for each batch,
`begin_step`, `forward` (through `run.backward`), `before_update`, the optimizer's `step`, and
`after_update`. After each epoch the classifier is evaluated and saved within `kept_weights`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from beyond.methods.averaging import MovingAverage
from beyond.methods.checkpoints import change_classifier
from beyond.methods.frozen_backbone import FrozenBackbone
from beyond.methods.ingredient import Ingredient, LossFn, Rows
from beyond.methods.label_smoothing import smooth_labels
from beyond.methods.lora import Lora
from beyond.methods.mixout import Mixout
from beyond.methods.proximal_point import ProximalPoint
from beyond.methods.r_drop import RDrop
from beyond.methods.schedules import GradientClipping, LearningRates, WeightDecay
from beyond.methods.smart import Smart
from beyond.methods.weights import trained
from beyond.methods.wise_ft import WiseFt
from beyond.options import FinetuneOptions
from classifier import LlamaEmbeddingClassifier


class Method(nn.Module):
    """The module that is trained: a classifier and the ingredients of the recipe.

    Args:
        classifier: the model.
        loss_fn: the plain loss.
        ingredients: in the order in which they apply.
    """

    def __init__(
        self,
        classifier: LlamaEmbeddingClassifier,
        loss_fn: LossFn,
        ingredients: Sequence[Ingredient] = (),
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.loss_fn = loss_fn
        self.modules_of_ingredients = nn.ModuleList(ingredients)  # so that they are saved
        self.ingredients = tuple(ingredients)

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor, lines: Tensor) -> Tensor:
        """Return the loss of some rows, summed; the arguments are those of `Rows`."""
        rows = Rows(tokens, lengths, labels, lines)
        for ingredient in self.ingredients:
            ingredient.before_forward(rows)
        log_probs = self.classifier(tokens, lengths)
        loss = self.loss_fn(log_probs, labels)
        for ingredient in self.ingredients:
            loss = ingredient.loss(loss, self.classifier, rows, log_probs)
        return loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer."""
        groups: list[dict[str, Any]] = [{"params": list(self.classifier.parameters())}]
        for ingredient in self.ingredients:
            groups = ingredient.parameter_groups(groups)
        return groups

    def begin_step(self, step: int, total_steps: int) -> None:
        """Prepare for a step, from 0 to total_steps - 1."""
        for ingredient in self.ingredients:
            ingredient.begin_step(step, total_steps)

    def before_update(self, optimizer: Optimizer) -> Tensor | None:
        """Change gradients or learning rates before the optimizer's step.

        Returns:
            The norm of all gradients before they were changed, if an ingredient computed it.
        """
        norms = [ingredient.before_update(optimizer) for ingredient in self.ingredients]
        return next((norm for norm in norms if norm is not None), None)

    def after_update(self) -> None:
        """Follow the weights after the optimizer's step."""
        for ingredient in self.ingredients:
            ingredient.after_update()

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Let the classifier have the weights that are evaluated and saved, in the block."""
        with ExitStack() as stack:
            for ingredient in self.ingredients:
                stack.enter_context(ingredient.kept_weights())
            yield


def sum_of_losses(method: nn.Module, *tensors: Tensor) -> Tensor:
    """Return the loss of some rows, summed; `tensors` are those of `Rows`."""
    return method(*tensors)


def build_method(
    options: FinetuneOptions,
    classifier: LlamaEmbeddingClassifier,
    loss_fn: LossFn,
    prompt: str = "",
) -> Method:
    """Put together what the options ask for.

    The order of the ingredients matters in three places. What chooses the parameters that train
    (a frozen backbone, LoRA) comes before what averages them or sorts them into groups. The
    weights that are kept are first averaged (EMA), then merged (LoRA), then mixed with the
    pretrained ones (WiSE-FT). Mixout turns the gradients into the weights' own before the update,
    so what reads gradients then, such as clipping, comes after it.

    Args:
        options: of the run.
        classifier: the plain one, not yet on its device.
        loss_fn: the plain loss, of log-probabilities and labels, summed over rows.
        prompt: the zero-shot prompt that follows a sentence, for methods that need it.

    Raises:
        ValueError: an option does not fit the model.
    """
    classifier = change_classifier(options, classifier, prompt)
    ingredients: list[Ingredient] = []
    if options.label_smoothing:
        loss_fn = smooth_labels(loss_fn, options.label_smoothing)
    if options.freeze_backbone:
        ingredients.append(FrozenBackbone(classifier))
    if options.lora_rank:
        rank, alpha, matrices = options.lora_rank, options.lora_alpha, options.lora_matrices
        ingredients.append(Lora(classifier, rank, alpha, matrices, options.seed))
    if options.smart:
        ingredients.append(Smart(classifier, options.smart, options.seed))
    if options.bregman:
        parameters = trained([classifier, *ingredients])
        ingredients.append(ProximalPoint(classifier, parameters, options.bregman))
    if options.r_drop:
        ingredients.append(RDrop(loss_fn, options.r_drop, options.seed))
    if options.mixout:
        ingredients.append(Mixout(classifier, options.mixout, options.seed))
    if options.ema:
        average = MovingAverage(trained([classifier, *ingredients]), options.ema)
        ingredients.insert(0, average)
    if options.wise_ft != 1:
        ingredients.append(WiseFt(classifier, options.wise_ft))
    if options.weight_decay:
        ingredients.append(WeightDecay(options.weight_decay))
    if options.warmup or options.linear_decay or options.layer_decay != 1:
        rates = options.warmup, options.linear_decay, options.layer_decay
        ingredients.append(LearningRates(classifier, *rates))
    if options.max_grad_norm:
        ingredients.append(GradientClipping(options.max_grad_norm))
    return Method(classifier, loss_fn, ingredients)
