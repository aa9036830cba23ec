"""`--option classify`: a classifier on new sentences, from files, pipes and terminals."""

import io
import json
import os
import pty
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from base_llama import write_checkpoint
from beyond import classify
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, load_classifier
from run_llama import main
from tests.beyond import forks
from tests.beyond.runs import Job, RunForks
from tests.conftest import ROOT, SENTENCES, make_llama
from tests.test_run_llama import FINETUNE, run
from tokenizer import Tokenizer

WORDS = ["bad", "so so", "good"]
TEXTS = [line.split(" ||| ")[1] for line in SENTENCES]
CLASSIFY = ["--option", "classify", "--filepath", "best.pt"]
NOTE = (
    "run_llama.py: note: in reference mode a prediction depends on its batch, so each sentence is "
    "classified alone and may get another label than within a batch\n"
)


def make_classifier(
    tokenizer_path: Path,
    causal: bool = True,
    max_len: int | None = None,
    words: list[str] = WORDS,
    path: str = "best.pt",
) -> LlamaEmbeddingClassifier:
    """Write a random classifier to `path`, and return it."""
    config = ClassifierConfig(len(words), "", 0.3, "finetune")
    tokenizer = Tokenizer(max_len, tokenizer_path)
    model = LlamaEmbeddingClassifier(config, make_llama(causal), words, tokenizer)
    torch.nn.init.normal_(model.classifier_head.weight, std=0.5)
    write_checkpoint(path, model.to_checkpoint())
    return model.eval()


@pytest.fixture
def model(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LlamaEmbeddingClassifier:
    """Make `best.pt`, a causal classifier, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return make_classifier(tokenizer_path)


def probabilities(
    model: LlamaEmbeddingClassifier, texts: Sequence[str] = TEXTS, max_len: int | None = None
) -> list[list[float]]:
    """Compute the probabilities of all labels, one sentence at a time."""
    assert model.tokenizer is not None
    tokenizer = Tokenizer(max_len, model.tokenizer.content)
    rows = [torch.tensor([tokenizer.encode(text, bos=True, eos=False)]) for text in texts]
    with torch.inference_mode():
        return [model(row)[0].exp().tolist() for row in rows]


def expected_labels(model: LlamaEmbeddingClassifier) -> list[int]:
    return [row.index(max(row)) for row in probabilities(model)]


def write(text: str | bytes, path: str = "in.txt") -> list[str]:
    """Write an input file; returns the words that name it."""
    Path(path).write_bytes(text.encode() if isinstance(text, str) else text)
    return ["--input", path]


def read_rows(output: str) -> list[list[str]]:
    """Read lines of TSV, which end with LF."""
    assert output.endswith("\n")
    return [line.split("\t") for line in output[:-1].split("\n")]


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let standard input hold these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# -------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_each_line_is_label_probability_and_sentence(
    model: LlamaEmbeddingClassifier,
    tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
    causal: bool,
    batch_size: str,
) -> None:
    """In the input's order, as each sentence alone gives it, and nothing else on stdout."""
    model = make_classifier(tokenizer_path, causal)
    rows = probabilities(model)
    assert len({row.index(max(row)) for row in rows}) > 1
    status, out, err = run(
        [*CLASSIFY, *write("\n".join(TEXTS)), "--batch_size", batch_size], capsys
    )
    assert status == 0
    for (label, probability, text), row, expected in zip(read_rows(out), rows, TEXTS, strict=True):
        assert (label, text) == (WORDS[row.index(max(row))], expected)
        assert re.fullmatch(r"\d\.\d{4}", probability)
        assert float(probability) == pytest.approx(max(row), abs=6e-5)
    mode = "causal mode" if causal else "reference mode (attention without a mask)"
    assert err == (
        f"load model from best.pt\ncomputes in float32 on cpu, in {mode}\n{'' if causal else NOTE}"
    )


def test_json_lines_hold_all_probabilities(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run([*CLASSIFY, *write("\n".join([*TEXTS, "映画"])), "--json"], capsys)
    assert status == 0 and "映画" in out
    results = [json.loads(line) for line in out.splitlines()]
    expected = probabilities(model, [*TEXTS, "映画"])
    for result, row, text in zip(results, expected, [*TEXTS, "映画"], strict=True):
        assert list(result) == ["label", "probability", "probabilities", "sentence"]
        assert result["sentence"] == text and list(result["probabilities"]) == WORDS
        assert list(result["probabilities"].values()) == pytest.approx(row, abs=1e-5)
        assert result["probability"] == max(result["probabilities"].values())
        assert result["probabilities"][result["label"]] == result["probability"]


def test_tsv_escapes_what_would_break_a_line(
    tmp_path: Path,
    tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["a\tb", "c\\n\r\n"]
    make_classifier(tokenizer_path, words=words)
    texts = ["one\ttab", "back\\slash \\t", "line\u2028separator\x0c\x85 end"]
    status, out, _ = run([*CLASSIFY, *write("\n".join(texts))], capsys)
    assert status == 0
    rows = read_rows(out)
    assert [row[2] for row in rows] == ["one\\ttab", "back\\\\slash \\\\t", texts[2]]
    assert {row[0] for row in rows} <= {"a\\tb", "c\\\\n\\r\\n"}
    characters = {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}
    for row, text in zip(rows, texts, strict=True):
        label, _, sentence = (re.sub(r"\\(.)", lambda m: characters[m[1]], cell) for cell in row)
        assert sentence == text and label in words


@pytest.mark.parametrize("source", ["file", "standard input", "-"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_lines_are_read_alike_wherever_they_come_from(
    model: LlamaEmbeddingClassifier,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    line_end: str,
) -> None:
    content = b"\xef\xbb\xbf" + line_end.join(TEXTS).encode()
    feed(monkeypatch, b"" if source == "file" else content)
    names = {"file": write(content), "-": ["--input", "-", "--output", "-"]}.get(source, [])
    status, out, _ = run([*CLASSIFY, *names], capsys)
    assert status == 0 and [row[2] for row in read_rows(out)] == TEXTS


def test_a_named_pipe_is_read_once(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checks before the work leave its content alone."""
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_text("\n".join(TEXTS)))
    writer.daemon = True
    writer.start()
    status, out, _ = run([*CLASSIFY, "--input", "pipe"], capsys)
    writer.join(10)
    assert status == 0 and [row[2] for row in read_rows(out)] == TEXTS


def test_labels_are_taken_off_line_by_line(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `read_documents`; labels of some lines only are not used, and a note says so."""
    lines = ["7 ||| A warm film", "A dull film", " -1 |||  x ||| y ", "good ||| A film"]
    status, out, err = run([*CLASSIFY, *write("\n".join(lines))], capsys)
    assert status == 0
    texts = [row[2] for row in read_rows(out)]
    assert texts == ["A warm film", "A dull film", "x ||| y", "good ||| A film"]
    assert "note: only 2 of 4 lines have a label, so none is used\n" in err and "acc" not in err


def test_results_are_utf_8_wherever_they_go(
    model: LlamaEmbeddingClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main([*CLASSIFY, *write("映画 naïve")]) == 0
    assert stdout.buffer.getvalue().decode().endswith("\t映画 naïve\n")


def test_output_is_a_file(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same lines, in a new folder; standard output stays empty."""
    argv = [*CLASSIFY, *write("\n".join(SENTENCES))]
    _, expected, _ = run(argv, capsys)
    status, out, err = run([*argv, "--output", "new/out.tsv"], capsys)
    assert (status, out) == (0, "") and err.endswith("Wrote the results to new/out.tsv.\n")
    assert Path("new/out.tsv").read_bytes() == expected.encode()
    assert sorted(path.name for path in Path("new").iterdir()) == ["out.tsv", "out.tsv.json"]


def test_failed_run_leaves_the_old_output(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out.tsv").write_text("old")
    status, out, _ = run([*CLASSIFY, *write("A film\n\n"), "--output", "out.tsv"], capsys)
    assert (status, out) == (2, "") and Path("out.tsv").read_text() == "old"
    assert {path.name for path in Path().iterdir()} == {"best.pt", "in.txt", "out.tsv"}


def test_a_reader_that_has_gone_is_no_error(
    model: LlamaEmbeddingClassifier,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in `classify | head -1`; the report still comes."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    assert main([*CLASSIFY, *write("\n".join(f"1 ||| {text}" for text in TEXTS))]) == 0
    sys.stdout.close()  # raises if something is left that cannot be written
    assert "acc :: " in capsys.readouterr().err


def test_a_full_standard_output_is_an_error(
    model: LlamaEmbeddingClassifier,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert main([*CLASSIFY, *write("A film")]) == 2
    sys.stdout.close()
    err = capsys.readouterr().err
    assert err.endswith("run_llama.py: error: standard output: No space left on device\n")


# --------------------------------------------------------------------------------- gold labels


def test_gold_labels_are_reported(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores, confusion matrix, and the mistakes with the most confident first."""
    predicted, rows = expected_labels(model), probabilities(model)
    gold = [*predicted[:4], *((label + 1) % 3 for label in predicted[4:7]), -1]
    lines = "\n".join(f"{label} ||| {text}" for label, text in zip(gold, TEXTS, strict=True))
    status, out, err = run([*CLASSIFY, *write(lines)], capsys)
    assert status == 0 and [row[2] for row in read_rows(out)] == TEXTS
    counts = [[0] * 3 for _ in WORDS]
    for label, prediction in zip(gold[:7], predicted, strict=False):
        counts[label][prediction] += 1
    f1 = []
    for k in range(3):
        occurrences = sum(counts[k]) + sum(row[k] for row in counts)
        f1 += [2 * counts[k][k] / occurrences] if occurrences else []
    mistakes = sorted((-max(rows[i]), i) for i in (4, 5, 6))
    expected = [
        f"acc :: {4 / 7:.3f}, macro F1 :: {sum(f1) / len(f1):.3f}, on 7 labels",
        "confusion matrix (rows: gold label, columns: predicted label)",
        "       bad  so so  good",
        *(
            f"{word:5}  {row[0]:3}  {row[1]:5}  {row[2]:4}"
            for word, row in zip(WORDS, counts, strict=True)
        ),
        "wrong predictions: 3; the most confident ones:",
        *(
            f"{max(rows[i]):.4f} predicted {WORDS[predicted[i]]}, gold {WORDS[gold[i]]}, "
            f"in.txt:{i + 1}: {TEXTS[i]}"
            for _, i in mistakes
        ),
    ]
    assert err.splitlines()[-len(expected) :] == expected


def test_the_report_shows_ten_mistakes(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = TEXTS + [text.upper() for text in TEXTS]
    wrong = [(row.index(max(row)) + 1) % 3 for row in probabilities(model, texts)]
    lines = "\n".join(f"{label} ||| {text}" for label, text in zip(wrong, texts, strict=True))
    status, _, err = run([*CLASSIFY, *write(lines)], capsys)
    assert status == 0 and "acc :: 0.000" in err and "wrong predictions: 16;" in err
    shown = [float(number) for number in re.findall(r"^(\d\.\d{4}) predicted", err, re.M)]
    most = sorted((max(row) for row in probabilities(model, texts)), reverse=True)[:10]
    assert shown == pytest.approx(most, abs=6e-5)


def test_no_mistakes_and_no_labels(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted = expected_labels(model)
    lines = "\n".join(f"{k} ||| {text}" for k, text in zip(predicted, TEXTS, strict=True))
    _, _, err = run([*CLASSIFY, *write(lines)], capsys)
    assert "acc :: 1.000, macro F1 :: 1.000, on 8 labels" in err and "wrong" not in err
    lines = "\n".join(f"-1 ||| {text}" for text in TEXTS)
    status, out, err = run([*CLASSIFY, *write(lines)], capsys)
    assert status == 0 and out.count("\n") == 8 and "acc" not in err


def test_placeholder_labels_are_noted(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in CFIMDB's test file."""
    lines = "\n".join(f"0 ||| {text}" for text in TEXTS)
    _, _, err = run([*CLASSIFY, *write(lines)], capsys)
    assert "note: every label of in.txt is 0, perhaps a placeholder\n" in err


# ------------------------------------------------------------------- what the checkpoint holds


@pytest.mark.parametrize("flags", [["--causal"], ["--no-causal", "--batch_size", "1"]])
@pytest.mark.parametrize("max_len", [[], ["--max_sentence_len", "4"]])
def test_a_finetuned_classifier_is_one_file(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str], max_len: list[str]
) -> None:
    """Alone in another folder it predicts what fine-tuning has written for dev."""
    assert main([*FINETUNE, *flags, *max_len, "--filepath", "out/a.pt"]) == 0
    table = read_rows(Path("out/a.dev.tsv").read_text(encoding="utf-8"))
    dev = (workplace / "data/cfimdb-dev.txt").read_bytes()
    Path("other").mkdir()
    Path("out/a.pt").rename("other/best.pt")
    for path in ("stories42M.pt", "tokenizer.model", "data/cfimdb-label-mapping.json"):
        Path(path).unlink()
    os.chdir("other")
    status, out, err = run([*CLASSIFY, *write(dev)], capsys)
    assert status == 0 and "acc :: " in err
    assert table[0] == ["gold", "predicted", "probability", "sentence"]
    for (_, *cells), (label, probability, sentence) in zip(table[1:], read_rows(out), strict=True):
        assert (cells[0], cells[2]) == (label, sentence)
        assert float(cells[1]) == pytest.approx(float(probability), abs=1.01e-4)


def old_checkpoint(model: LlamaEmbeddingClassifier, *removed: str) -> None:
    """Write `best.pt` as the version before did, without some of the parts."""
    checkpoint = model.to_checkpoint()
    for name in removed:
        del checkpoint["classifier"][name]
    write_checkpoint("best.pt", checkpoint)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["label_names"], "without its label words; add --label-names FILE"),
        (["tokenizer", "max_sentence_len"], "without its tokenizer; add --tokenizer_path FILE"),
        (
            ["label_names", "tokenizer", "max_sentence_len"],
            "without its label words and tokenizer; add --label-names FILE and --tokenizer_path "
            "FILE",
        ),
    ],
)
def test_a_checkpoint_of_the_version_before_needs_two_flags(
    model: LlamaEmbeddingClassifier,
    tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
    removed: list[str],
    message: str,
) -> None:
    argv = [*CLASSIFY, *write("\n".join(TEXTS))]
    _, expected, _ = run(argv, capsys)
    old_checkpoint(model, *removed)
    status, out, err = run(argv, capsys)
    assert (status, out) == (2, "")
    assert err == (
        f"run_llama.py: error: best.pt: an earlier version wrote this classifier, {message}\n"
    )
    Path("words.json").write_text(json.dumps(WORDS))
    flags = {"label_names": ["--label-names", "words.json"]}
    flags["tokenizer"] = ["--tokenizer_path", str(tokenizer_path)]
    given = [word for name in removed for word in flags.get(name, [])]
    status, out, _ = run([*argv, *given], capsys)
    assert (status, out) == (0, expected)


def test_flags_override_what_the_checkpoint_holds(
    model: LlamaEmbeddingClassifier, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("words.json").write_text('["schlecht", "naja", "gut"]')
    names = ["--label-names", "words.json", "--tokenizer_path", str(tokenizer_path)]
    argv = [*CLASSIFY, *write("\n".join(TEXTS))]
    status, out, _ = run([*argv, *names], capsys)
    assert status == 0
    found = [["schlecht", "naja", "gut"].index(row[0]) for row in read_rows(out)]
    assert found == expected_labels(model)


def test_sentences_are_truncated_as_in_fine_tuning(
    model: LlamaEmbeddingClassifier, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*CLASSIFY, *write("\n".join(TEXTS)), "--json"]
    make_classifier(tokenizer_path, max_len=4)
    own_tokenizer = ["--tokenizer_path", str(tokenizer_path)]
    flag = ["--max_sentence_len", "6"]
    for given, max_len in ([], 4), (own_tokenizer, 4), (flag, 6), ([*flag, *own_tokenizer], 6):
        status, out, _ = run([*argv, *given], capsys)
        assert status == 0
        found = [[*json.loads(line)["probabilities"].values()] for line in out.splitlines()]
        for row, expected in zip(found, probabilities(model, TEXTS, max_len), strict=True):
            assert row == pytest.approx(expected, abs=1e-5)


def test_bfloat16(model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]) -> None:
    """Near float32, but not equal."""
    argv = [*CLASSIFY, *write(TEXTS[0]), "--json"]
    status, out, err = run([*argv, "--dtype", "bfloat16"], capsys)
    assert status == 0 and "computes in bfloat16 on cpu" in err
    found, (exact,) = json.loads(out)["probabilities"], probabilities(model, TEXTS[:1])
    differences = [abs(a - b) for a, b in zip(found.values(), exact, strict=True)]
    assert 1e-5 < max(differences) < 0.1


# ------------------------------------------------------------------------------- bad input


def mistakes() -> dict[str, tuple[list[str], bytes, str]]:
    """Name -> further arguments, the content of in.txt, and the error."""
    long = "film " * 150
    return {
        "no sentences": ([], b"", "in.txt: is empty"),
        "empty line": (
            [],
            b"A film\n\nA film\n",
            "in.txt:2: the line has no sentence; write one or delete it",
        ),
        "only spaces": ([], "A\n \t\u3000\n".encode(), "in.txt:2: the line has no sentence.*"),
        "label alone": ([], b"1 ||| A\n1 ||| \n", "in.txt:2: the line has no sentence.*"),
        "not UTF-8": ([], b"A film\ncaf\xe9\n", "in.txt:2: not UTF-8 text: .*"),
        "label too high": (
            [],
            b"2 ||| A\n3 ||| B\n",
            r"in.txt:2: label 3 is not among 0 to 2, the labels of the classifier \(-1: not "
            r"known\)",
        ),
        "label too low": ([], b"-2 ||| A\n", "in.txt:1: label -2 is not among 0 to 2.*"),
        "vast label": ([], b"9" * 9999 + b" ||| A", r"in.txt:1: label 9{20}\.\.\. is not among.*"),
        "too long": (
            [],
            f"A film\n{long}\n".encode(),
            r"in.txt:2: \d+ tokens are more than the classifier's 128; shorten the sentence or "
            "use --max_sentence_len 127",
        ),
        "missing input": (["--input", "no.txt"], b"", "no.txt: No such file or directory"),
        "nameless input": (["--input", ""], b"", ".*No such file or directory"),
        "folder as input": (["--input", "."], b"", ".: Is a directory"),
        "missing classifier": (["--filepath", "no.pt"], b"A", "no.pt: No such file or directory"),
        "text as classifier": (["--filepath", "in.txt"], b"A", "in.txt: expected tensors and .*"),
        "no classifier": (
            ["--filepath", "plain.pt"],
            b"A",
            "plain.pt: does not hold a fine-tuned classifier",
        ),
        "missing label words": (["--label-names", "no.json"], b"A", "no.json: No such file.*"),
        "label words that are no list": (
            ["--label-names", "in.txt"],
            b"{}",
            "in.txt: expected a JSON list of words.*",
        ),
        "too few label words": (
            ["--label-names", "two.json"],
            b"A",
            "two.json: has 2 label words, but best.pt has 3 labels; use the label words of its "
            "training data",
        ),
        "text as tokenizer": (
            ["--tokenizer_path", "in.txt"],
            b"A",
            "in.txt: not a SentencePiece model",
        ),
        "folder as output": (["--output", "."], b"A", r"\.: cannot be written: .*"),
        "nameless output": (["--output", ""], b"A", r"\.: cannot be written: .*"),
        "input as output": (
            ["--output", "./in.txt"],
            b"A",
            r"--output \./in.txt: is also an input; choose another name",
        ),
        "classifier as output": (
            ["--output", "best.pt"],
            b"A",
            "--output best.pt: is also an input; choose another name",
        ),
        "input as record": (
            ["--input", "in.json", "--output", "in"],
            b"A",
            "in.json: the record of in would replace this file; choose another name for the result",
        ),
        "data flag": (["--dev", "in.txt"], b"A", "--dev is for .* only"),
        "seed": (["--seed", "1"], b"A", "--seed is for .* only"),
        "model": (["--pretrained-model-path", "best.pt"], b"A", "--pretrained_model_path is for.*"),
        "mode": (["--causal"], b"A", "--causal is for .* only"),
        "batch size": (["--batch_size", "0"], b"A", "argument --batch_size: 0 is below 1"),
        "value for a switch": (["--json=1"], b"A", "argument --json: ignored explicit.*"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_is_one_line_and_status_2(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    argv, content, pattern = mistakes()[name]
    write(content, "in.json")
    Path("two.json").write_text('["bad", "good"]')
    write_checkpoint(
        "plain.pt", {k: v for k, v in model.to_checkpoint().items() if k != "classifier"}
    )
    files = {path.name for path in Path().iterdir()} | {"in.txt"}
    status, out, err = run([*CLASSIFY, *write(content), *argv], capsys)
    assert (status, out) == (2, "")
    loaded = "load model from best.pt\ncomputes in float32 on cpu, in causal mode\n"
    (error,) = err.removeprefix(loaded).splitlines()
    assert re.fullmatch(f"run_llama.py: error: {pattern}", error)
    assert {path.name for path in Path().iterdir()} == files


def test_a_classifier_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(["--option", "classify"], capsys)
    assert (status, out) == (2, "") and err == (
        "run_llama.py: error: --option classify needs a classifier; name one with --filepath, such "
        "as the checkpoint that --option finetune has written to output/task_3/\n"
    )


def test_bad_standard_input_is_named(
    model: LlamaEmbeddingClassifier,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for content, error in ((b"", " is empty"), (b"A\n\n", "2: the line has no sentence; .*")):
        feed(monkeypatch, content)
        status, out, err = run(CLASSIFY, capsys)
        assert (status, out) == (2, "")
        assert re.search(rf"error: standard input:{error}\n$", err)


def test_advice_on_a_long_sentence_works(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*CLASSIFY, *write("film " * 150), "--max_sentence_len", "127"]
    status, out, _ = run(argv, capsys)
    assert status == 0 and out.count("\n") == 1


def test_a_tokenizer_of_another_vocabulary_is_refused(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ROOT / "data" / "demo" / "tokenizer.model"
    argv = [*CLASSIFY, *write("A"), "--tokenizer_path", str(other)]
    status, out, err = run(argv, capsys)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "tokenizer.model: has a vocabulary of" in err and "that of best.pt is 320" in err


def test_infinite_scores_are_an_error(
    model: LlamaEmbeddingClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    model.llama.norm.weight.data.fill_(3e37)
    model.classifier_head.weight.data.fill_(3e37)
    write_checkpoint("best.pt", model.to_checkpoint())
    status, out, err = run([*CLASSIFY, *write("A film")], capsys)
    assert (status, out) == (2, "")
    assert err.endswith("error: the classifier's scores are infinite or NaN; train it again\n")


# ------------------------------------------------------------------------------ at a terminal


def test_a_conversation(
    model: LlamaEmbeddingClassifier,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a terminal each line is answered; a bad one gets a note, an empty one nothing."""
    master, slave = pty.openpty()
    lines = [TEXTS[0], "", "  ", f"1 ||| {TEXTS[1]}", "film " * 150, "caf\udce9", TEXTS[2]]
    with open(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
        os.write(master, b"\x04")  # Ctrl-D
        status, out, err = run(CLASSIFY, capsys)
    os.close(master)
    expected = [WORDS[label] for label in expected_labels(model)[:3]]
    assert status == 0
    assert [[row[0], row[2]] for row in read_rows(out)] == [
        list(pair) for pair in zip(expected, TEXTS, strict=False)
    ]
    assert err.count("sentence> ") == len(lines) + 1  # and once before Ctrl-D
    assert err.count("note: ") == 2 and err.endswith("sentence> \n")
    assert "note: standard input: " in err and "shorten the sentence or use" in err
    assert "note: standard input:1: not UTF-8 text" in err


def test_a_conversation_with_an_output_file(
    model: LlamaEmbeddingClassifier,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answers are shown too."""
    master, slave = pty.openpty()
    with open(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, f"{TEXTS[0]}\n{TEXTS[1]}\n\x04".encode())
        status, out, err = run([*CLASSIFY, "--output", "out.tsv"], capsys)
    os.close(master)
    assert (status, out) == (0, "")
    results = Path("out.tsv").read_text().splitlines()
    assert len(results) == 2 and all(f"sentence> {line}\n" in err for line in results)


def read_until(stream: io.FileIO, ending: bytes) -> bytes:
    content = b""
    while not content.endswith(ending):
        part = stream.read(1)
        assert part, content
        content += part
    return content


class Conversation(NamedTuple):
    """The program in a process of its own, at a pseudo-terminal."""

    process: ForkServerProcess
    terminal: int
    out: io.FileIO
    err: io.FileIO


@pytest.fixture
def conversation(model: LlamaEmbeddingClassifier) -> Iterator[Conversation]:
    """Start a conversation whose answers also go to a file; it has asked for a sentence."""
    master, slave = pty.openpty()
    job = Job([*CLASSIFY, "--output", "out.tsv"], Path.cwd())
    process, readers = forks.start(job, stdin=slave)
    os.close(slave)
    out, err = (io.FileIO(reader.fileno(), closefd=False) for reader in readers)
    try:
        read_until(err, b"sentence> ")
        yield Conversation(process, master, out, err)
    finally:
        process.kill()
        process.join()
        os.close(master)


def test_ctrl_c_ends_a_conversation(conversation: Conversation) -> None:
    """At a real pseudo-terminal; standard output holds the answers alone."""
    process, terminal, out, err = conversation
    os.write(terminal, f"{TEXTS[0]}\n".encode())
    answer = read_until(err, b"sentence> ")
    os.write(terminal, b"\x03")  # Ctrl-C, which the terminal turns into SIGINT
    rest = err.read()
    process.join(30)
    assert process.exitcode == 0
    assert out.read() == b"" and rest == b"\nWrote the results to out.tsv.\n"
    assert Path("out.tsv").read_bytes() + b"sentence> " == answer


def test_other_signals_are_not_an_end_of_input(conversation: Conversation) -> None:
    """SIGTERM ends the program with its own status, and no result is written."""
    conversation.process.terminate()
    rest = conversation.err.read()
    conversation.process.join(30)
    assert conversation.process.exitcode == 128 + signal.SIGTERM
    assert b"interrupted" in rest and b"Traceback" not in rest
    assert not Path("out.tsv").exists()


# ----------------------------------------------------------------------------------- processes


def test_as_a_process(model: LlamaEmbeddingClassifier, run_forks: RunForks) -> None:
    """A pipe through a process: results to stdout, all else to stderr, status 0."""
    job = Job(CLASSIFY, Path.cwd(), stdin="\n".join(SENTENCES).encode())
    ((status, out, err),) = run_forks([job])
    assert status == 0, err
    assert [row[2] for row in read_rows(out)] == TEXTS
    assert "load model from best.pt\n" in err and "acc :: " in err


def test_a_loaded_classifier_knows_its_words_and_its_tokenizer(
    model: LlamaEmbeddingClassifier,
) -> None:
    loaded = load_classifier("best.pt")
    assert loaded.label_names == WORDS and model.tokenizer and loaded.tokenizer
    assert loaded.tokenizer.content == model.tokenizer.content
    assert loaded.tokenizer.max_len is None


def test_formatted_tables_line_up() -> None:
    lines = classify.format_table(["", "a", "long"], [[1, 20], [300, 4]], ["a", "long"])
    assert lines == ["        a  long", "a       1    20", "long  300     4"]
