"""Checkpoints of other projects: reading them, and writing them.

| kind | what a user names | module |
|---|---|---|
| the assignment's, this project's, llama2.c's `.pt` | a file | `base_llama.py` |
| llama2.c's `.bin` | a file | `llama2c.py`, `llama2c_tokenizer.py` |
| Meta's | a folder with `params.json` | `meta.py` |
| Hugging Face's | a folder with `config.json` | `huggingface.py`, `huggingface_tokenizer.py` |

`files.py` tells the kinds apart, `load.py` makes models and tokenizers of any kind, and
`python -m beyond.formats SOURCE TARGET` turns one kind into another.
"""
