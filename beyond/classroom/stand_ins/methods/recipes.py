"""Recipes are not in this starter."""

from collections.abc import Mapping
from typing import Any

RECIPES: Mapping[str, Mapping[str, Any]] = {}
RULED: tuple[str, ...] = ()
