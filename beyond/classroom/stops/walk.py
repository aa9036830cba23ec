"""The sentence of a tour and its model, and how the tour writes numbers and tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llama import Llama, LlamaLayer
from tokenizer import Tokenizer

Places = dict[str, str]  # texts for the places of the page, by the name of the place


@dataclass(frozen=True)
class Walk:
    """A sentence and the model that it is sent through."""

    llama: Llama  # in causal mode
    unmasked: Llama  # the same in reference mode
    tokenizer: Tokenizer
    label_names: list[str]
    sentence: str
    pictures: dict[str, str] = field(default_factory=dict)  # SVG by file name

    @property
    def ids(self) -> list[int]:
        """The token ids of the sentence."""
        return self.tokenizer.encode(self.sentence, bos=True, eos=False)

    @property
    def pieces(self) -> list[str]:
        """The pieces of the sentence."""
        return [self.piece(number) for number in self.ids]

    def piece(self, number: int) -> str:
        """Return the piece of an id."""
        return self.tokenizer.sp_model.id_to_piece(number)


def layers_of(llama: Llama) -> list[LlamaLayer]:
    """Return the layers of a model."""
    return [layer for layer in llama.layers if isinstance(layer, LlamaLayer)]


def quote(piece: str) -> str:
    """Write a piece as code."""
    return f"`{piece.replace('|', chr(92) + '|')}`"


def numbers(row: Tensor, count: int = 4) -> str:
    """Write the first numbers of a row."""
    return ", ".join(f"{value:.3f}" for value in row[:count].tolist()) + ", ..."


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table; a float has three decimals."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    lines = [list(header), ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def root_mean_square(row: Tensor) -> float:
    """Return the root of the mean of the squares."""
    return row.pow(2).mean().sqrt().item()


def three(value: float) -> str:
    """Write a number with three decimals."""
    return f"{value:.3f}"
