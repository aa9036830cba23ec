"""Texts and `--option generate`: prompts and samples, streaming, stop tokens, standard input."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import run_llama
from beyond.decoding import Sampler, prepare_for_decoding
from beyond.generation import decode_stream, until_stop
from beyond.options import GenerateOptions
from llama import Llama, load_pretrained
from run_llama import get_args, main
from tests.conftest import make_llama, save_llama
from tests.test_run_llama import run
from tokenizer import Tokenizer

LOW, HIGH = (f"output/task_1/generated-sentence-temp-{t}.txt" for t in (0, 1))


# ----------------------------------------------------------------------------- streams of tokens


def test_until_stop_ends_each_row_at_its_own_stop_token() -> None:
    columns = [torch.tensor(column)[:, None] for column in ([5, 6], [2, 7], [8, 1], [9, 9])]
    taken = iter(columns)
    assert list(until_stop(taken, {1, 2})) == [(0, 5), (1, 6), (1, 7)]
    assert len(list(taken)) == 1  # the last column was not asked for
    assert len(list(until_stop(columns, set()))) == 8


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 399), max_size=40),
    text=st.text(max_size=20),
    cut=st.integers(0),
)
@example(ids=[0, 288, 269], text="", cut=0)  # <unk>, then two pieces that begin with spaces
def test_streamed_text_is_the_decoded_text(
    tokenizer_path: Path, ids: list[int], text: str, cut: int
) -> None:
    """For any ids, even bytes that form no character, and for real text cut anywhere."""
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    # One id in five becomes the piece that is a lone space, which is the hardest one.
    space = tokenizer.sp_model.piece_to_id("▁")
    ids = [token if token < tokenizer.n_words else space for token in ids]
    encoded = tokenizer.encode(text, bos=True, eos=False)
    for tokens in (ids, encoded, encoded[: cut % (len(encoded) + 1)], encoded + ids):
        assert "".join(decode_stream(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_streamed_parts_hold_whole_characters(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    ids = tokenizer.encode("a 映画 🎬 !", bos=True, eos=False)
    parts = list(decode_stream(tokenizer, ids))
    assert "".join(parts) == "a 映画 🎬 !" and "🎬" in parts and len(parts) < len(ids)


# --------------------------------------------------------- the assignment's loop, and the project's


def record_calls(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: list[str]
) -> None:
    """Let a function add its name to `calls` each time it is called."""
    function: Callable[..., object] = getattr(owner, name)

    def recording(*args: object, **options: object) -> object:
        calls.append(name)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, recording)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["generate_sentence", "generate"] * 2),  # at temperature 0 and at 1
        (["--seed", "3", "--dtype", "bfloat16"], ["generate_sentence", "generate"] * 2),
        (["--temperature", "2"], ["generate_sentence", "generate"]),
        (["--prompt", "Also"], ["generate_sentence", "generate"] * 4),
        (["--causal"], ["generate_texts"] * 2),
        (["--stream"], ["generate_texts"] * 2),
        (["--stop_at_eos"], ["generate_texts"] * 2),
        (["--num_samples", "2"], ["generate_texts"] * 2),
        (["--top_k", "5"], ["generate_texts"] * 2),
        (["--top_p", "0.9"], ["generate_texts"] * 2),
    ],
)
def test_the_assignments_own_loop_runs_in_reference_mode_without_further_flags(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: list[str]
) -> None:
    calls: list[str] = []
    record_calls(monkeypatch, run_llama, "generate_sentence", calls)
    record_calls(monkeypatch, run_llama, "generate_texts", calls)
    record_calls(monkeypatch, Llama, "generate", calls)
    assert main(["--prompt", "A warm film", "--max_new_tokens", "2", *flags]) == 0
    assert calls == expected


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"]])
def test_both_loops_give_the_same_texts(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
) -> None:
    """In reference mode: the same files and the same output, for each prompt and temperature."""
    argv = ["--prompt", "A warm film", "--prompt", "No", "--max_new_tokens", "12", *flags]
    results = []
    for exceeds_assignment in (False, True):
        monkeypatch.setattr(GenerateOptions, "exceeds_assignment", exceeds_assignment)
        status, out, err = run(argv, capsys)
        assert (status, err) == (0, "")
        results.append((out, Path(LOW).read_bytes(), Path(HIGH).read_bytes()))
    assert results[0] == results[1]
    assert results[0][1] != results[0][2]


# --------------------------------------------------------------------------------- command line


@pytest.fixture
def causal_workplace(workplace: Path) -> Path:
    """A workplace whose checkpoint is causal."""
    save_llama(make_llama(causal=True), Path("stories42M.pt"))
    return workplace


def generate(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the texts that a run prints, after checking that it writes the same ones."""
    status, out, err = run([*argv, "--max_new_tokens", "9"], capsys)
    assert (status, err) == (0, "")
    printed = re.search(
        r"Temperature is \S+\n(.*)\n---------------\nWrote .* to (\S+)\.\n", out, re.S
    )
    assert printed, out
    assert Path(printed[2]).read_text(encoding="utf-8") == printed[1]
    return printed[1].split("\n---------------\n")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--stream"],
        ["--causal"],
        ["--causal", "--batch_size", "2"],
        ["--causal", "--stream"],
        ["--causal", "--dtype", "bfloat16"],
        ["--causal", "--quantize", "int8"],
    ],
)
def test_a_text_depends_on_its_prompt_and_seed_alone(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """It is the same in any batch, streamed or not; sample i is the one of seed + i."""
    prompts = ["A", "Funny , warm and wonderfully acted", "No"]
    base = ["--temperature", "0.9", "--num_samples", "3", *flags]
    argv = [*base, *(word for prompt in prompts for word in ("--prompt", prompt))]
    texts = generate(argv, capsys)
    assert len(texts) == len(set(texts)) == 9
    assert all(text.startswith(prompts[i // 3]) for i, text in enumerate(texts))
    alone = [text for prompt in prompts for text in generate([*base, "--prompt", prompt], capsys)]
    assert alone == texts
    second = generate(["--temperature", "0.9", *flags, "--prompt", "No", "--seed", "1338"], capsys)
    assert second == texts[7:8]


def test_temperature_0_gives_one_text_per_prompt(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--temperature", "0", "--prompt", "A", "--prompt", "No"]
    assert generate([*argv, "--num_samples", "3"], capsys) == generate(argv, capsys)


def test_the_temperature_names_its_file(workplace: Path) -> None:
    folder = "output/task_1/generated-sentence-temp"

    def outfiles(*argv: str) -> dict[float, str]:
        options = get_args(argv)
        assert isinstance(options, GenerateOptions)
        return options.outfiles

    assert outfiles("--temperature", "0.25") == {0.25: f"{folder}-0.25.txt"}
    assert outfiles("--temperature", "0") == {0.0: f"{folder}-0.txt"}
    named = ["--generated_sentence_high_temp_out", "x.txt"]
    assert outfiles("--temperature", "2", *named) == {2.0: "x.txt"}
    assert outfiles(*named) == {0.0: f"{folder}-0.txt", 1.0: "x.txt"}


@pytest.mark.parametrize(
    "content",
    [
        "Été\nA warm film\n",
        "\ufeffÉté\nA warm film",  # a byte-order mark
        "Été\r\nA warm film\r\n",
        "\ufeffÉté\rA warm film\r",
    ],
)
def test_a_prompt_from_standard_input(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: str,
) -> None:
    """One text, whose line ends are those of any system."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    (text,) = generate(["--temperature", "0", "--prompt", "-"], capsys)
    (named,) = generate(["--temperature", "0", "--prompt", "Été\nA warm film"], capsys)
    assert text == named and len(text) > len("Été\nA warm film")


@pytest.mark.parametrize("stop", [1, 2])
def test_stop_at_eos_ends_the_text_at_bos_or_eos(
    causal_workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    """A scripted model: one row says " warm", the stop, and goes on; the other stops later."""
    tokenizer = Tokenizer()
    (warm,) = tokenizer.encode("warm", bos=False, eos=False)[:1]
    word = tokenizer.decode([warm, warm])[1:]
    steps = iter([[warm, warm], [stop, warm], [warm, 3 - stop], [warm, warm]] * 9)

    def scripted(sampler: Sampler, logits: Tensor) -> Tensor:
        return torch.tensor(next(steps))[: len(logits), None]

    monkeypatch.setattr(Sampler, "__call__", scripted)
    argv = ["--temperature", "0", "--prompt", "A film", "--prompt", "No", "--stop_at_eos"]
    assert generate(argv, capsys) == [f"A film{word}", f"No{word}{word}"]
    steps = iter([[warm], [stop]] * 9)
    assert generate([*argv, "--stream"], capsys) == [f"A film{word}", f"No{word}"]
    steps = iter([[warm, stop]] * 9)
    assert generate(argv[:-1], capsys)[0] == f"A film{word * 9}"


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--quantize", "int8"]])
def test_other_dtypes_generate(
    causal_workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    argv = ["--temperature", "0", "--prompt", "A film", "--max_new_tokens", "9", *flags]
    status, out, _ = run(argv, capsys)
    assert status == 0
    assert "computes in bfloat16 on cpu, in causal mode\n" in out
    assert ("int8 weights: the largest error of a weight is 0.0" in out) == ("int8" in flags)
    quantize = "int8" in flags
    model = prepare_for_decoding(load_pretrained("stories42M.pt"), torch.bfloat16, quantize)
    context = torch.tensor([Tokenizer().encode("A film", bos=True, eos=False)])
    text = Tokenizer().decode(model.generate(context, 9, 0.0)[0].tolist())
    assert Path(LOW).read_text("utf-8") == text


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["--temperature", "-0.1"], "--temperature: -0.1 is not between 0 and the largest float32"),
        (["--temperature", "nan"], "--temperature: nan is not between 0 and the largest float32"),
        (["--temperature", "inf"], "--temperature: inf is not between 0 and the largest float32"),
        (["--top_k", "-1"], "--top_k: -1 is below 0"),
        (["--top_p", "0"], "--top_p: 0.0 is not in (0, 1]"),
        (["--top_p", "nan"], "--top_p: nan is not in (0, 1]"),
        (["--num_samples", "0"], "--num_samples: 0 is below 1"),
        (["--prompt", "-", "--prompt", "-"], "standard input can be read only once"),
        (["--prompt", "-"], "--prompt -: standard input is empty"),
        (["--quantize", "int8"], "--quantize int8: only for a causal model"),
        (["--quantize", "int2"], "--quantize: invalid choice: 'int2'"),
        (["--compile"], "--compile: only for a causal model (--causal), on the CPU"),
        (["--quantize", "int8", "--dtype", "float32"], "--quantize int8 computes in bfloat16"),
        (["--option", "prompt", "--stream"], "--stream is for --option generate only"),
        (["--option", "finetune", "--top_k", "3"], "--top_k is for --option generate only"),
        (["--store_dtype", "float16"], "--store_dtype is for --option pretrain only"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    pattern: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    status, out, err = run(argv, capsys)
    assert status == 2
    assert re.fullmatch(rf"run_llama\.py: error: .*{re.escape(pattern)}.*\n", err), err
    assert "Temperature" not in out


def test_standard_input_that_is_not_utf8_is_an_error(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert main(["--prompt", "-"]) == 2
    error = "--prompt -: standard input is not UTF-8 text: unexpected end of data"
    assert capsys.readouterr().err == f"run_llama.py: error: {error}\n"
