"""Runs command lines in forks of a warm process, and strikes each where it is told to.

The warm process has imported what takes seconds, and does nothing but fork. A fork, its signal, and
what they leave on the disk are as real as those of a process that starts from nothing. Several
processes of one job get the environment that torchrun would give them.
"""

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import resource
import selectors
import signal
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import base_llama
import beyond.decoding
import beyond.pretraining
import run_llama
import utils
from tests.beyond.runs import Job, Result, Strike, free_port
from tests.conftest import ROOT

LIMIT = 240.0  # seconds that a job may take
LAST = 30.0  # seconds that it may go on after one of its processes has ended
FAILED = 70  # status of a fork that did not come to its end as a program does
PIPES = (1, 2)  # file descriptors of standard output and standard error
# A run imports these at its first step or its first picture.
PICTURES = ("Bmp", "Gif", "Jpeg", "Png", "Ppm")
LATE_IMPORTS = (
    *("torch._dynamo", "torch.utils.tensorboard", "tensorboard.plugins.hparams.api_pb2"),
    *(f"PIL.{name}ImagePlugin" for name in PICTURES),
)
# Pretraining samples a text after each epoch. In the tests it is short, in this process and in the
# warm one, or it would take as long as the rest of a run.
beyond.pretraining.SAMPLE_TOKENS = 10


def warm_context() -> ForkServerContext:
    """Start the warm process unless it is there; does not wait until it is warm."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LATE_IMPORTS])
    with contextlib.chdir(ROOT):  # where the modules are found
        forkserver.ensure_running()
    return context


def run_jobs(jobs: Sequence[Job]) -> list[Result]:
    """Run jobs one after the other."""
    return [run_job(job) for job in jobs]


def run_job(job: Job) -> Result:
    """Run a job in forks of the warm process, and wait for its end."""
    port, stdin = free_port(), None
    if job.stdin is not None:
        stdin, writer = os.pipe()
        os.write(writer, job.stdin)
        os.close(writer)
    started = [start(job, rank, port, stdin) for rank in range(job.processes)]
    if stdin is not None:
        os.close(stdin)
    outs, errs = ([readers[i] for _, readers in started] for i in range(len(PIPES)))
    texts, in_time = read_all([reader.fileno() for reader in (*outs, *errs)], LIMIT)
    statuses = []
    for process, _ in started:
        if not in_time:
            process.kill()
        process.join()
        statuses.append(process.exitcode)
    out, err = (
        "".join(texts[reader.fileno()].decode(errors="replace") for reader in readers)
        for readers in (outs, errs)
    )
    for reader in (*outs, *errs):
        reader.close()
    if not in_time:
        return Result(FAILED, out, f"{err}killed: not all ended in time; statuses {statuses}\n")
    if len(set(statuses)) > 1:
        return Result(FAILED, out, f"{err}the processes ended differently: {statuses}\n")
    return Result(statuses[0] or 0, out, err)


def start(
    job: Job, rank: int = 0, port: int = 0, stdin: int | None = None
) -> tuple[ForkServerProcess, tuple[Connection, ...]]:
    """Start a process of a job; returns it, and where its output and errors can be read.

    If `stdin`, its standard input, is a terminal, then it is the one that controls the process.
    """
    context = warm_context()
    readers, writers = zip(*(context.Pipe(duplex=False) for _ in PIPES), strict=True)
    given = None if stdin is None else Connection(os.dup(stdin))  # which can be sent to a process
    process = context.Process(target=fork, args=(job, rank, port, writers, given))
    process.start()
    for end in (*writers, *([given] if given else [])):
        end.close()
    return process, readers


def read_all(descriptors: list[int], seconds: float) -> tuple[dict[int, bytes], bool]:
    """Read until all writers have ended, or for so many seconds; also returns whether all did.

    After the first one has ended, the others have `LAST` seconds, since they may wait for it.
    """
    texts = dict.fromkeys(descriptors, b"")
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(end - time.monotonic()):
                piece = os.read(key.fd, 1 << 16)
                texts[key.fd] += piece
                if not piece:
                    selector.unregister(key.fd)
                    end = min(end, time.monotonic() + LAST)
        return texts, not selector.get_map()


# ------------------------------------------------------------------------------------ in a fork


def fork(
    job: Job, rank: int, port: int, writers: Sequence[Connection], stdin: Connection | None
) -> None:
    """Run a process of a job, which this process is, to its end."""
    status = FAILED
    try:
        if stdin is not None:
            take_input(stdin)
        for writer, descriptor in zip(writers, PIPES, strict=True):
            os.dup2(writer.fileno(), descriptor)
            writer.close()
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # until the process ends
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
        tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaves
        status = run(job, rank, port)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def take_input(stdin: Connection) -> None:
    """Read standard input from here; a terminal also controls this process, as a shell's does."""
    os.dup2(stdin.fileno(), 0)
    stdin.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # until the process ends
    if os.isatty(0):
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def run(job: Job, rank: int, port: int) -> int:
    """Run a job's command line in this process, which is a fork; returns the exit status."""
    os.chdir(job.cwd)
    if job.processes > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_RUN_ID": "forks"}
    if job.keep:
        run_llama.remove_training_checkpoint = lambda path: None
        beyond.pretraining.remove_training_checkpoint = lambda path: None
    if job.strike and job.strike.rank == rank:
        arrange(job.strike)
    if job.memory is not None:
        lines = Path("/proc/self/status").read_text()
        has = int(lines.split("VmData:")[1].split()[0]) << 10  # the file counts in KiB
        resource.setrlimit(resource.RLIMIT_DATA, (has + job.memory, has + job.memory))
    if job.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_size, job.file_size))
    samples = watch() if job.watch else None
    status = run_llama.main(job.argv)
    if job.watch:
        Path("samples.json").write_text(json.dumps(samples))
    return status


def call_after(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Let each call of a function, an attribute of `owner`, be followed by an action."""
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action()
        return result

    setattr(owner, name, wrapped)


def arrange(strike: Strike) -> None:
    """Let this process send itself the signal when it comes to the place."""
    if strike.place == "time":
        kill = (os.getpid(), strike.signal)
        timer = threading.Timer(strike.nth / 1000, os.kill, kill)
        timer.daemon = True
        timer.start()
        return
    left = [strike.nth]

    def come() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), strike.signal)

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
    if strike.place == "step":
        call_after(run_llama.AdamW, "step", come)
        assert beyond.pretraining.AdamW is run_llama.AdamW
    elif strike.place == "eval":
        call_after(run_llama, "to_device", come)
        beyond.pretraining.to_device = run_llama.to_device
    elif strike.place == "write":
        setattr(base_llama.torch, "save", write)  # noqa: B010
    elif strike.place == "replace":
        utils.os.replace = replace  # type: ignore[assignment]
    elif strike.place == "replaced":
        call_after(utils.os, "replace", come)
    else:
        raise ValueError(strike.place)


def watch() -> list[tuple[int, int]]:
    """Let each training step and each sampled token add to a list: resident bytes, open files."""
    samples = []

    def take() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append((pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))))

    call_after(run_llama.AdamW, "step", take)
    call_after(beyond.decoding.Sampler, "__call__", take)
    return samples
