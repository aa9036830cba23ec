"""Checkpoints: the starter reads the `.pt` files of `base_llama.py` and SentencePiece models."""
