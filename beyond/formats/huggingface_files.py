"""The files of a Hugging Face folder, found without PyTorch."""

import reprlib
from pathlib import Path

from beyond.formats.json_file import read_json
from beyond.formats.sentencepiece_model import count_pieces

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SENTENCEPIECE, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
MAX_TOKENIZER = 2**26  # bytes; larger than real ones


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a Hugging Face folder: one, or those that its index names.

    Raises:
        FileNotFoundError: the folder has no such file, or lacks one that its index names.
        ValueError: the index is not a JSON object that maps tensors to files of the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; weights in other files are not read"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is not an object that maps tensors to files")
    files = []
    for name in sorted(set(map(str, weight_map.values()))):
        # Nothing outside the folder is read, except what a link in it, such as the Hub's, names.
        if not name.endswith(".safetensors") or not name.isprintable() or set(name) & set("/\\:"):
            raise ValueError(
                f"{index}: weight_map: expected the name of a .safetensors file in the same folder,"
                f" found {reprlib.repr(name)}"
            )
        if len(name.encode()) > 255 or not (folder / name).is_file():
            raise FileNotFoundError(f"{index}: weight_map names {name}, but there is no such file")
        files.append(folder / name)
    return files


def find_tokenizer(folder: Path) -> Path:
    """Return the tokenizer's file of a Hugging Face folder.

    It is `tokenizer.model` if that is a SentencePiece model with as many pieces as the checkpoint's
    vocabulary, since then the assignment's rules hold. Otherwise (tokens were added to it, or it is
    a file of tiktoken) it is `tokenizer.json` if there is one.

    Raises:
        FileNotFoundError: the folder has neither.
        ValueError: config.json, which gives the size of the vocabulary, cannot be read.
    """
    model, tokenizer_json = folder / SENTENCEPIECE, folder / TOKENIZER_JSON
    if not tokenizer_json.is_file():
        if not model.is_file():
            raise FileNotFoundError(f"{folder}: has neither {SENTENCEPIECE} nor {TOKENIZER_JSON}")
        return model
    if model.is_file() and model.stat().st_size <= MAX_TOKENIZER:
        n_pieces = count_pieces(model.read_bytes())
        if n_pieces and n_pieces == read_json(folder / CONFIG).get("vocab_size"):
            return model
    return tokenizer_json
