"""Ways to fine-tune a classifier that the assignment does not have.

A method is the plain recipe with ingredients added. `options.py` has their flags, `method.py` the
seam to the training loop: `build_method` puts together what the flags ask for. Each ingredient has
a file of its own with its paper and equation. Without a flag nothing is added, and every number is
bit for bit the plain recipe's.
"""
