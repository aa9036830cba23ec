"""`--compile`: compiled layers compute the same, and without a compiler there is one line.

These tests are in one file since the first compilation of a process takes seconds.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from run_llama import main
from tests.beyond.methods.helpers import (
    finetune_and_load,
    make_classifier,
    make_rows,
    read_curve,
    train_steps,
)
from tests.beyond.methods.test_lora import make_lora
from tests.beyond.runs import FINETUNE as SHORT_RUN
from tests.conftest import make_llama, save_llama
from tests.test_run_llama import FINETUNE, PROMPT, run


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Forget what a test compiled: PyTorch compiles a function for a few kinds of input only."""
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(PROMPT, marks=pytest.mark.sweep),
        [*FINETUNE, "--hidden_dropout_prob", "0"],  # evaluates compiled layers too
    ],
)
def test_compiled_model_gives_the_same(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    """Traced by the real compiler; the C++ that it writes needs more than Python and pip."""
    save_llama(make_llama(causal=False, n_layers=1), workplace / "stories42M.pt")
    compile_model, calls = torch.compile, []

    def without_cpp(function, **options):  # type: ignore[no-untyped-def]
        calls.append(options)
        return compile_model(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", without_cpp)
    predictions = []
    for flags in ([], ["--compile"]):
        for path in (workplace / "output").rglob("*-dev-*.txt"):
            path.unlink()
        assert main([*argv, *flags]) == 0
        (path,) = (workplace / "output").rglob("*-dev-*.txt")
        predictions.append(path.read_text(encoding="utf-8"))
    # to finetune, the model that is trained and the best one, which is loaded to predict
    assert calls == [{"dynamic": True}] * (1 if argv is PROMPT else 2)
    assert predictions[0] == predictions[1]


@pytest.mark.sweep
# PyTorch's compiler asks SMART's embeddings for a gradient.
@pytest.mark.filterwarnings("error", "ignore:The .grad attribute")
@pytest.mark.parametrize(
    "flags",
    [["--no-causal", "--ema", "0.8", "--mixout", "0.5"], ["--causal", "--smart", "1"]],
)
def test_compiled_methods_train_alike(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """Traced by the real compiler, without the C++ that it writes."""
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_model(f, backend="eager", **kw))
    argv = [*SHORT_RUN, *flags, "--lr", "1e-4", "--dropout", "0", "--hidden_dropout_prob", "0"]
    runs = [(finetune_and_load([*argv, *more]), read_curve("loss")) for more in ([], ["--compile"])]
    for name, weight in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], weight, atol=1e-6, rtol=0)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-6)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*lru_cache")
def test_compiled_lora_gives_the_same() -> None:
    """Traced by the real compiler, in training and merged; without the C++ that it writes."""
    rows, outputs = make_rows(), []
    for is_compiled in (False, True):
        method = make_lora(make_classifier(n_layers=1))
        llama = method.classifier.llama
        if is_compiled:
            compiled = torch.compile(llama.compute_hidden, backend="eager", dynamic=True)
            llama.compute_hidden = compiled  # type: ignore[method-assign]
        train_steps(method)
        outputs.append(method.classifier(rows.tokens, rows.lengths))
        with method.kept_weights():
            outputs.append(method.classifier(rows.tokens, rows.lengths))
        outputs.append(method.classifier(rows.tokens, rows.lengths))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.sweep
def test_compile_without_a_compiler_is_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch._inductor.config  # here, since it takes a second

    save_llama(make_llama(causal=False, n_layers=1), Path("stories42M.pt"))
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        status, _, err = run([*PROMPT, "--compile"], capsys)
    assert status == 2 and err.count("\n") == 1
    assert re.match("run_llama.py: error: --compile: .*No working C\\+\\+ compiler", err)
    assert err.endswith("; install a C++ compiler such as g++, or leave --compile out\n")
