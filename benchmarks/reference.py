"""Compare reference mode with Hugging Face transformers, on a model of stories42M.pt's shape.

    uv run python -m benchmarks.reference [--use_gpu] [--rounds N]

Measures time and memory. Both sides get the same batches, in the file's order and with the same
padding. Without a causal mask nothing can be cached, so Hugging Face generates without its cache
too.
"""

import sys

from benchmarks.table import Row, main

ROWS = [
    Row("generate", "", "reference float32", "Hugging Face without cache float32"),
    *(
        Row(task, data, "reference float32", "Hugging Face float32")
        for task in ("prompt", "finetune")
        for data in ("sst", "cfimdb")
    ),
]

if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
