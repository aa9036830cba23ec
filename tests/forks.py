"""Runs command lines in forks of one process, and strikes each where it is told to.

    python -m tests.forks

reads jobs, one a line: {"argv": [...], "cwd": folder, "strike": [signal, place, count]}. The
strike, or null, is a signal that the process sends to itself at the count-th time that it comes to
the place. A fork saves the seconds that importing PyTorch takes; the process, the signal and what
they leave on the disk are real. Prints a line [exit status, standard output, standard error] for
each. The state of a run that has come to its end is kept, to be looked at.
"""

import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimizer's first step would import it, in each fork anew
import torch.utils.tensorboard  # likewise the run's start

import base_llama
import pretraining
import run_llama
import training
import utils


def strike_at(place: str, count: int, number: int) -> None:
    """Arrange for the signal.

    Places: "step" is after an optimizer's step, "eval" in the middle of an evaluation, "write" when
    half of a checkpoint or state is written, "replace" when it is to take its name, "replaced"
    when it has, and "time" wherever the run is after so many milliseconds.
    """
    if place == "time":
        timer = threading.Timer(count / 1000, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
        return
    left = [count]

    def come() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    def after(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            come()
            return result

        setattr(owner, name, wrapped)

    def write(content: object, file: Any, **_: Any) -> None:
        buffer = io.BytesIO()
        save(content, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        come()
        file.seek(0)
        file.write(buffer.getvalue())

    def replace(*args: Any) -> None:
        come()
        os_replace(*args)

    save, os_replace = torch.save, os.replace
    if place == "step":
        after(run_llama.AdamW, "step")
        assert pretraining.AdamW is run_llama.AdamW
    elif place == "eval":
        after(run_llama, "to_device")
        pretraining.to_device = run_llama.to_device
    elif place == "write":
        setattr(base_llama.torch, "save", write)  # noqa: B010
    elif place == "replace":
        utils.os.replace = replace  # type: ignore[assignment]
    elif place == "replaced":
        after(utils.os, "replace")
    else:
        raise ValueError(place)


def run(job: dict[str, Any]) -> int:
    """What the fork does."""
    os.chdir(job["cwd"])
    run_llama.remove_state = lambda args: None
    if job["strike"]:
        number, place, count = job["strike"]
        strike_at(place, count, number)
    return run_llama.main(job["argv"])


def main() -> int:
    assert not training.world_size() > 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            child = os.fork()
            if child == 0:
                for path, descriptor in ((out, 1), (err, 2)):
                    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
                status = 70
                try:
                    status = run(job)
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            _, code = os.waitpid(child, 0)
            texts = [path.read_bytes().decode(errors="replace") for path in (out, err)]
            print(json.dumps([os.waitstatus_to_exitcode(code), *texts]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
