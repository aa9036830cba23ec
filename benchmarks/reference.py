"""Reference mode beside Hugging Face transformers: time and memory, on the shape of stories42M.pt.

    uv run python -m benchmarks.reference [--use_gpu] [--rounds N]

Both sides take the same batches, in the file's order and padded alike. Without a mask nothing can
be cached, so Hugging Face generates without its cache too.
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
