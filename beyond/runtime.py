"""What is known only once PyTorch and the checkpoint are there: device, dtype and mode.

Also what follows from them: how fast and how exactly matrix products are computed.
"""

import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from beyond.command_line import environment, say
from beyond.formats.files import hashing
from beyond.formats.load import load_llama, load_tokenizer
from beyond.options import EvaluationOptions, ModelOptions, TaskOptions
from beyond.records import describe_run
from llama import Llama
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Runtime:
    """The device, the dtype of matrix products, and the attention mode of a run.

    Attributes:
        record: what is written beside each result, see `records.py`.
    """

    device: torch.device
    dtype: torch.dtype  # float32 or bfloat16
    causal: bool  # else reference mode
    record: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        values = self.hyperparameters()
        mode = "causal mode" if self.causal else "reference mode (attention without a mask)"
        return f"computes in {values['dtype']} on {values['device']}, in {mode}"

    def hyperparameters(self) -> dict[str, str]:
        """Return names and values, to be recorded with the options."""
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "mode": "causal" if self.causal else "reference",
        }

    def autocast(self) -> torch.autocast:
        """Return a scope for forward passes whose matrix products are computed in `dtype`.

        Parameters, the residual stream and RMSNorm stay in float32.
        """
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def resolve_runtime(options: TaskOptions, causal: bool) -> Runtime:
    """Find the device and dtype that the options ask for, and print the result.

    Without a dtype in the options, it is bfloat16 if the hardware has it.
    """
    device = resolve_device(options.use_gpu)
    dtype = options.dtype or ("bfloat16" if has_bfloat16(device) else "float32")
    runtime = Runtime(device, getattr(torch, dtype), causal)
    print(runtime)
    if dtype == "bfloat16" and not has_bfloat16(device) and environment("RANK") == 0:
        say(
            "note: this processor has no units for bfloat16, so matrix products are up to 100 "
            "times slower than in float32; use --dtype float32"
        )
    return replace(runtime, record=describe_run(options, runtime.hyperparameters()))


def load_model(
    options: ModelOptions, dropout: float | None = None, max_seq_len: int | None = None
) -> tuple[Llama, Tokenizer, Runtime]:
    """Load the pretrained model, on the CPU, and its tokenizer; choose device, dtype and mode.

    Args:
        options: say which checkpoint and tokenizer.
        dropout, max_seq_len: override the checkpoint's own values unless None.

    Raises:
        FileNotFoundError, ValueError: a file cannot be used, or the vocabularies differ.
    """
    path = options.pretrained_model_path
    assert path is not None, "the options ask for a new model"
    tokenizer = load_tokenizer(options.max_sentence_len, options.tokenizer_path)
    with hashing(path):  # for the records of the results
        llama = load_llama(path, options.causal, dropout, max_seq_len)
    check_vocabulary(tokenizer, options.tokenizer_path, llama, path)
    print(f"load model from {path}")
    runtime = resolve_runtime(options, llama.config.causal)
    if isinstance(options, EvaluationOptions) and not runtime.causal:
        # In causal mode padding changes no result.
        print(f"pads with {tokenizer.pad_piece} (id {tokenizer.pad_id})")
    return llama, tokenizer, runtime


def check_vocabulary(tokenizer: Tokenizer, tokenizer_path: str, llama: Llama, path: str) -> None:
    """Raise ValueError unless a tokenizer fits a checkpoint's vocabulary."""
    if not tokenizer.fits(llama.config.vocab_size):
        raise ValueError(
            f"{tokenizer_path}: has a vocabulary of {tokenizer.n_words}, but that of {path} is "
            f"{llama.config.vocab_size}; use the checkpoint's own tokenizer (--tokenizer_path)"
        )


def resolve_device(use_gpu: bool) -> torch.device:
    """Return the device of this process; under torchrun, process i of a machine gets GPU i.

    Raises:
        ValueError: a GPU is asked for and PyTorch finds none, or fewer than there are processes.
    """
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "--use_gpu: PyTorch finds no CUDA device; leave the flag out to use the CPU"
        )
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"--use_gpu: PyTorch finds {torch.cuda.device_count()} CUDA devices on this machine, "
            "fewer than processes; start fewer (--nproc_per_node)"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes matrix products of bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def require_determinism() -> None:
    """Make PyTorch refuse operations whose results differ between runs on one machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    torch.use_deterministic_algorithms(True)
    print("uses deterministic operations only")


class ThreadWatch:
    """Compares, once per training run, the process's CPU time with its number of threads.

    Two programs with two threads each on two cores are many times slower than one after the other.

    Args:
        enabled: False on a GPU, and in all processes but the main one.
    """

    SECONDS = 5.0  # of training before the comparison
    SHARES = (0.6, 1.5)  # CPU time / (wall time * threads): a note outside these limits

    def __init__(self, enabled: bool) -> None:
        self.done = not enabled
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self.start = time.perf_counter(), time.process_time()

    def step(self) -> None:
        """Compare if it is time; called after each step."""
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        if self.done or wall < self.SECONDS:
            return
        self.done = True
        if advice := thread_advice(cpu / wall, torch.get_num_threads()):
            say(f"note: {advice}")


def thread_advice(busy: float, threads: int) -> str | None:
    """Return advice on `--threads`, or None.

    Args:
        busy: CPU seconds per second of this process.
        threads: CPU threads of PyTorch.
    """
    low, high = ThreadWatch.SHARES
    if threads > 1 and busy < low * threads:
        return (
            f"{threads} threads of PyTorch get only the CPU time of {busy:.1f}; if other programs "
            "use this machine, or the model is small, --threads 1 may be much faster"
        )
    if busy > high * threads:
        return (
            f"{threads} threads of PyTorch use the CPU time of {busy:.1f}; another number of "
            "--threads may be faster"
        )
    return None


def allow_tf32(runtime: Runtime) -> None:
    """On CUDA, let float32 matrix products of a causal model use TF32, for the whole process."""
    # Faithful: reference mode has to give float32 numbers, so only causal mode gets TF32.
    if runtime.device.type == "cuda" and runtime.causal:
        torch.set_float32_matmul_precision("high")
        print("float32 matrix products use TF32")


def prepare_model[M: nn.Module](model: M, runtime: Runtime, compile_layers: bool) -> M:
    """Move a model to its device and let its forward pass use what is fast there.

    That is: matrix products in the runtime's dtype (or TF32), and compiled layers if asked for.

    Args:
        model: a `Llama` is in its attribute `llama`; changed in place.
        runtime: device, dtype and mode.
        compile_layers: whether to compile them, for sequences of any length.

    Returns:
        The model.
    """
    allow_tf32(runtime)
    if compile_layers:
        # The rotary tables are cached; the compiler would warn that it ignores the cache.
        warnings.filterwarnings("ignore", message=".*functools.lru_cache")
        llama = cast(Llama, model.llama)
        llama.compute_hidden = torch.compile(  # type: ignore[method-assign]
            llama.compute_hidden, dynamic=True
        )
    model.forward = runtime.autocast()(model.forward)
    return model.to(runtime.device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move a batch's tensor to the device; the copy to a GPU runs in parallel with computation."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x


def is_compiler_error(error: BaseException) -> bool:
    """Return whether an error comes from the code generator of `torch.compile`."""
    module = sys.modules.get("torch._inductor.exc")  # not imported unless something is compiled
    return module is not None and isinstance(error, module.InductorError)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU or the machine has no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
