"""The rule of a recipe; there are no recipes in this starter."""

from beyond.options import FinetuneOptions


def apply_rule(options: FinetuneOptions) -> FinetuneOptions:
    """Return the options as they are."""
    return options
