"""Modules of the starter that take the place of rooms of `beyond/` that show the answers.

`stand_ins/decoding.py` is the starter's `beyond/decoding.py`, and so on. Each has the names that
the rest of the starter imports, and does the plain case only.
"""
