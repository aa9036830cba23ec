"""Ways of fine-tuning that go beyond the assignment.

A method is the plain recipe with ingredients added. `options.py` has their flags, `method.py` the
interface to the training loop: `build_method` puts together what the flags ask for. The other files
have the ingredients, each with its paper and equation. Without a flag nothing is added, and every
number is bit for bit the plain recipe's.
"""
