"""Compare causal mode with Hugging Face transformers, on a model of stories42M.pt's shape.

    uv run python -m benchmarks.causal [--use_gpu] [--rounds N]

Measures time and memory. Hugging Face gets batches in the file's order, as its users make them;
this project makes batches of sentences of similar length. So speeds are per sentence.
"""

import sys

from benchmarks.table import Row, main

ROWS = [
    Row("generate", "", "causal float32", "Hugging Face float32", 2.0),
    Row("generate", "", "causal bfloat16", "Hugging Face float32"),
    Row("generate", "", "causal int8", "Hugging Face float32", 5.0),
    Row("generate", "", "causal bfloat16", "Hugging Face bfloat16", 1.6),
    Row("generate", "", "causal float32", "reference float32", 4.0),
    Row("prompt", "sst", "causal float32", "Hugging Face float32"),
    Row("prompt", "sst", "causal bfloat16", "Hugging Face float32", 3.0),
    Row("prompt", "cfimdb", "causal float32", "Hugging Face float32"),
    Row("prompt", "cfimdb", "causal bfloat16", "Hugging Face float32"),
    Row("finetune", "sst", "causal float32", "Hugging Face float32", 1.9),
    Row("finetune", "sst", "causal bfloat16", "Hugging Face float32", 3.0),
    Row("finetune", "cfimdb", "causal float32", "Hugging Face float32"),
    Row("finetune", "cfimdb", "causal bfloat16", "Hugging Face float32", 3.0),
]

if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
