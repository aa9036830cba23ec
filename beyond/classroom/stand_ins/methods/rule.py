"""The rule of a recipe; there are no recipes in this starter."""

from collections.abc import Callable, Sequence

from beyond.options import FinetuneOptions

BuildPrompt = Callable[[Sequence[str]], str]  # from the label words


def apply_rule(options: FinetuneOptions, build_prompt: BuildPrompt) -> FinetuneOptions:
    """Return the options as they are."""
    return options
