"""The three tasks, end to end: results, and one line with status 2 for every bad file."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_llama
from base_llama import read_checkpoint, write_checkpoint
from beyond.runtime import Runtime, prepare_model
from classifier import load_classifier
from llama import load_pretrained
from run_llama import main
from tests.conftest import ROOT, SENTENCES, make_llama, pad_rows, save_llama
from tokenizer import Tokenizer

PROMPT = ["--option", "prompt", "--batch_size", "3"]
COMPUTES = {
    False: "computes in float32 on cpu, in reference mode (attention without a mask)",
    True: "computes in float32 on cpu, in causal mode",
}
FINETUNE = ["--option", "finetune", "--batch_size", "3", "--epochs", "2", "--lr", "1e-3"]


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line in this process; returns its status, standard output and error."""
    capsys.readouterr()
    status = main(argv)
    out, err = capsys.readouterr()
    err = re.sub(r"[^\n]*\r", "", err)  # without progress bars
    # Tests often repeat a run; what is replaced is test_program.py's affair.
    return status, out, re.sub(r"run_llama\.py: note: replaces .*\n", "", err)


def predicted(path: str) -> list[int]:
    """Read the labels of a prediction file of the sentences."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    assert [line.split(" ||| ")[1] for line in lines] == [s.split(" ||| ")[1] for s in SENTENCES]
    return [int(line.split(" ||| ")[0]) for line in lines]


def expected_predictions(model: torch.nn.Module, suffix: str = "", size: int = 3) -> list[int]:
    """Predict the sentences with a model, batch by batch in the file's order."""
    tokenizer = Tokenizer()
    texts = [line.split(" ||| ")[1] + suffix for line in SENTENCES]
    tokens = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    predictions: list[int] = []
    for start in range(0, len(tokens), size):
        predictions += model(*pad_rows(tokens[start : start + size], 3)).argmax(dim=-1).tolist()
    return predictions


def test_generate(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(["--prompt", "A warm film", "--max_new_tokens", "9"], capsys)
    assert (status, err) == (0, "")
    low = Path("output/task_1/generated-sentence-temp-0.txt").read_text(encoding="utf-8")
    high = Path("output/task_1/generated-sentence-temp-1.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer()
    context = torch.tensor([tokenizer.encode("A warm film", bos=True, eos=False)])
    llama = load_pretrained("stories42M.pt")
    assert low == tokenizer.decode(llama.generate(context, 9, 0.0)[0].tolist())
    generator = torch.Generator().manual_seed(1337)
    assert high == tokenizer.decode(llama.generate(context, 9, 1.0, generator)[0].tolist())
    assert out == (
        f"load model from stories42M.pt\n{COMPUTES[False]}\n"
        f"Temperature is 0.0\n{low}\n---------------\n"
        "Wrote generated sentence to output/task_1/generated-sentence-temp-0.txt.\n"
        f"Temperature is 1.0\n{high}\n---------------\n"
        "Wrote generated sentence to output/task_1/generated-sentence-temp-1.txt.\n"
    )


def test_generate_depends_on_the_seed_only_when_sampling(workplace: Path) -> None:
    texts = {}
    for run_name, seed in (("a", 1), ("b", 1), ("c", 2)):
        outputs = [f"{run_name}-0.txt", f"{run_name}-1.txt"]
        flags = ["--generated_sentence_low_temp_out", "--generated_sentence_high_temp_out"]
        argv = [word for pair in zip(flags, outputs, strict=True) for word in pair]
        assert main([*argv, "--seed", str(seed), "--max_new_tokens", "9"]) == 0
        texts[run_name] = [Path(path).read_text(encoding="utf-8") for path in outputs]
    assert texts["a"] == texts["b"]
    assert texts["a"][0] == texts["c"][0] and texts["a"][1] != texts["c"][1]


@pytest.mark.parametrize("causal", [False, True])
def test_prompt(workplace: Path, capsys: pytest.CaptureFixture[str], causal: bool) -> None:
    status, out, err = run([*PROMPT, *(["--causal"] if causal else [])], capsys)
    assert (status, err) == (0, "")
    predictions = predicted("output/task_2/cfimdb-dev-prompting-output.txt")
    assert predictions == predicted("output/task_2/cfimdb-test-prompting-output.txt")
    correct = sum(p == int(line[0]) for p, line in zip(predictions, SENTENCES, strict=True)) / 8
    padding = "pads with <0x00> (id 3)\n"
    assert out == (
        f"load model from stories42M.pt\n{COMPUTES[causal]}\n"
        f"{'' if causal else padding}load 8 data from data/cfimdb-dev.txt\n"
        "load 8 data from data/cfimdb-test.txt\n"
        f"dev acc :: {correct:.3f}\ntest acc :: {correct:.3f}\n"
    )
    tokenizer, llama = Tokenizer(), load_pretrained("stories42M.pt", causal)
    config = run_llama.ClassifierConfig(2, "", 0.0, "prompt")
    model = run_llama.LlamaZeroShotClassifier(config, tokenizer, ["bad", "good"], llama)
    suffix = " Is this movie bad or good? This movie is "
    assert predictions == expected_predictions(model, suffix)


def test_finetune(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(FINETUNE, capsys)
    assert (status, err) == (0, "")
    path = "output/task_3/cfimdb-finetune-2-0.001.pt"
    model = load_classifier(path)
    predictions = expected_predictions(model)
    assert predictions == predicted("output/task_3/cfimdb-dev-finetuning-output.txt")
    assert predictions == predicted("output/task_3/cfimdb-test-finetuning-output.txt")

    epochs = re.findall(
        r"^epoch (\d): train loss :: \d\.\d{3}, train acc :: \d\.\d{3}, dev acc :: (\d\.\d{3})$",
        out,
        re.MULTILINE,
    )
    assert [epoch for epoch, _ in epochs] == ["0", "1"]
    best = max(accuracy for _, accuracy in epochs)
    assert f"load model from {path}\ndev acc :: {best}\ntest acc :: {best}\n" in out
    for split in ("train", "dev", "test"):
        assert out.count(f"load 8 data from data/cfimdb-{split}.txt\n") == 1

    start = load_pretrained("stories42M.pt")
    for name, parameter in model.llama.named_parameters():
        assert not torch.equal(parameter, start.get_parameter(name)), f"{name} did not train"


def test_finetune_keeps_the_best_epoch(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of dev accuracies 0, 0.5, 0.5, 0.25 the first 0.5 is kept; a first of 0 is kept too."""
    evaluate, dev_accuracies = run_llama.model_eval, iter([0.0, 0.5, 0.5, 0.25])
    kept: list[torch.Tensor] = []

    def scripted(loader, model, device):  # type: ignore[no-untyped-def]
        result = evaluate(loader, model, device)
        if len(kept) % 2:  # every second evaluation is of dev
            result = result._replace(accuracy=next(dev_accuracies, result.accuracy))
        kept.append(model.classifier_head.weight.detach().clone())
        return result

    monkeypatch.setattr(run_llama, "model_eval", scripted)
    status, out, _ = run([*FINETUNE, "--epochs", "4"], capsys)
    assert status == 0 and out.count("save the model to") == 2
    saved = load_classifier("output/task_3/cfimdb-finetune-4-0.001.pt").classifier_head.weight
    assert torch.equal(saved, kept[3]) and not torch.equal(saved, kept[5])


def test_finetune_memorises_eight_sentences(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode in ("--no-causal", "--causal"):
        argv = ["--option", "finetune", "--epochs", "25", "--lr", "1e-3", "--batch_size", "8", mode]
        status, out, _ = run([*argv, "--hidden_dropout_prob", "0"], capsys)
        assert status == 0 and "train acc :: 1.000" in out and "dev acc :: 1.000" in out
        assert predicted("output/task_3/cfimdb-test-finetuning-output.txt") == [0, 1] * 4


@pytest.mark.parametrize("flags", [[], ["--causal"]])
def test_a_loss_of_nan_stops_and_keeps_the_old_classifier(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    Path("old.pt").write_bytes(b"old")
    argv = [*FINETUNE, *flags, "--filepath", "old.pt", "--lr", "1e38"]
    status, out, err = run(argv, capsys)
    assert status == 2 and "epoch" not in out
    pattern = (
        r"run_llama\.py: error: step [1-5]: the loss is (nan|inf) at a learning rate of 1e\+38 "
        r"in lines \d(, \d)* of data/cfimdb-train\.txt; try a lower --lr\n"
    )
    assert re.match(pattern, err) and err.count("\n") == 1
    assert Path("old.pt").read_bytes() == b"old"


def test_loss_divides_a_short_last_batch_by_the_nominal_size(workplace: Path) -> None:
    """Faithful: the gradient of two examples in a batch of eight is a quarter of their mean's."""
    lines = (workplace / "data/cfimdb-train.txt").read_text().splitlines()[:2]
    (workplace / "data/cfimdb-train.txt").write_text("\n".join(lines) + "\n")
    gradients = []

    class Recorder(run_llama.AdamW):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            gradients.append(self.param_groups[0]["params"][-1].grad.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_llama, "AdamW", Recorder)
        for batch_size in ("2", "8"):
            argv = ["--option", "finetune", "--epochs", "1", "--hidden_dropout_prob", "0"]
            assert main([*argv, "--batch_size", batch_size]) == 0
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0] / 4)


def test_reported_loss_weighs_each_example_alike(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of 3, 3 and 2: the mean over eight examples, whatever the loss was divided by."""
    argv = ["--option", "finetune", "--causal", "--batch_size", "3", "--epochs", "1", "--lr", "0"]
    status, out, _ = run([*argv, "--hidden_dropout_prob", "0"], capsys)
    assert status == 0
    model = load_classifier("output/task_3/cfimdb-finetune-1-0.0.pt")
    tokenizer = Tokenizer()
    texts = [line.split(" ||| ")[1] for line in SENTENCES]
    batch = pad_rows([tokenizer.encode(text, bos=True, eos=False) for text in texts], 3)
    expected = torch.nn.functional.nll_loss(model(*batch), torch.tensor([0, 1] * 4)).item()
    (reported,) = re.findall(r"train loss :: (\d\.\d{3})", out)
    assert float(reported) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("flags", [[], ["--causal"]])
def test_finetune_is_determined_by_the_seed(workplace: Path, flags: list[str]) -> None:
    weights = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main([*FINETUNE, *flags, "--seed", seed, "--filepath", f"{name}.pt"]) == 0
        weights.append(read_checkpoint(f"{name}.pt")["model"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    key = "classifier_head.weight"
    assert not torch.equal(weights[0][key], weights[2][key])


@pytest.mark.parametrize("flags", [[], ["--causal"]])
def test_bfloat16_trains_float32_parameters(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """It learns nearly the same, and its checkpoint is float32."""
    weights = []
    for dtype in ("float32", "bfloat16"):
        argv = [*FINETUNE, *flags, "--dtype", dtype, "--filepath", f"{dtype}.pt"]
        assert main([*argv, "--hidden_dropout_prob", "0"]) == 0
        weights.append(read_checkpoint(f"{dtype}.pt")["model"])
        assert main([*PROMPT, *flags, "--dtype", dtype]) == 0
    assert all(tensor.dtype == torch.float32 for tensor in weights[1].values())
    differences = [(weights[0][name] - weights[1][name]).abs().max() for name in weights[0]]
    config = run_llama.ClassifierConfig(2, "", 0.0, "finetune")
    llama = load_pretrained("stories42M.pt", causal=bool(flags))
    runtime = Runtime(torch.device("cpu"), torch.bfloat16, causal=bool(flags))
    model = prepare_model(run_llama.LlamaEmbeddingClassifier(config, llama), runtime, False)
    scores = model(torch.tensor([[1, 5, 9]]))
    assert scores.dtype == torch.float32  # in bfloat16 labels would tie
    assert 0 < max(differences) <= 2 * 6 * 1e-3 + 1e-6  # six steps of 1e-3, the other way at worst


def test_finetune_writes_tensorboard_events(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(FINETUNE, capsys)
    (folder,) = [path for path in Path("output/task_3").iterdir() if path.is_dir()]
    assert re.fullmatch(r"cfimdb-finetune-2-0\.001-\d{8}-\d{6}", folder.name)
    train, dev = (EventAccumulator(str(folder / name)).Reload() for name in ("train", "dev"))
    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "peak_memory"):
        points = train.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]  # 2 epochs of 3 batches
        assert all(point.value > 0 for point in points)
    for split, events in (("train", train), ("dev", dev)):
        points = events.Scalars("accuracy")
        assert [point.step for point in points] == [3, 6]
        logged = [f"{point.value:.3f}" for point in points]
        assert logged == re.findall(rf"{split} acc :: (.{{5}})", out)[: len(logged)]
        assert [point.step for point in events.Scalars("macro_f1")] == [3, 6]
    curves = set(dev.Tags()["scalars"]) - {"accuracy", "macro_f1"}
    results = {f"result/{name}" for name in ("dev_accuracy", "test_accuracy", "test_macro_f1")}
    assert curves == {"loss", "f1/bad", "f1/good", *results}
    assert [point.step for point in dev.Scalars("loss")] == [3, 6]
    assert all(0.1 < point.value < 5 for point in dev.Scalars("loss"))
    best = max(re.findall(r"train acc :: .{5}, dev acc :: (.{5})", out))
    assert f"{dev.Scalars('result/dev_accuracy')[-1].value:.3f}" == best
    (test_accuracy,) = dev.Scalars("result/test_accuracy")
    assert f"test acc :: {test_accuracy.value:.3f}\n" in out
    settings = train.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lr | `0.001` |" in settings
    pictures = dev.Images("confusion")
    assert [picture.step for picture in pictures] == [3, 6]
    assert pictures[0].width > 100 and pictures[0].encoded_image_string.startswith(b"\x89PNG")


def test_test_file_without_labels(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace / "data/cfimdb-test.txt"
    path.write_text("".join(f"-1 ||| {line.split(' ||| ')[1]}\n" for line in SENTENCES))
    status, out, _ = run(PROMPT, capsys)
    assert status == 0 and out.endswith("test acc :: n/a\n")
    assert set(predicted("output/task_2/cfimdb-test-prompting-output.txt")) <= {0, 1}


def test_unknown_labels_are_left_out_of_the_accuracy(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(PROMPT) == 0
    predictions = predicted("output/task_2/cfimdb-test-prompting-output.txt")
    lines = [f"-1 ||| {line.split(' ||| ')[1]}" for line in SENTENCES]
    right, wrong = predictions[0], 1 - predictions[1]
    lines[0], lines[1] = f"{right}{lines[0][2:]}", f"{wrong}{lines[1][2:]}"
    (workplace / "data/cfimdb-test.txt").write_text("\n".join(lines) + "\n")
    _, out, _ = run(PROMPT, capsys)
    assert "test acc :: 0.500\n" in out


def test_placeholder_labels_are_noted(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace / "data/cfimdb-test.txt"
    path.write_text("".join(f"0 ||| {line.split(' ||| ')[1]}\n" for line in SENTENCES))
    _, out, _ = run(PROMPT, capsys)
    assert out.endswith("is 0, a placeholder; its accuracy means nothing\n")


def bad_files() -> dict[str, tuple[list[str], str]]:
    """Name -> arguments and a pattern of the error; `prepare` makes the files."""
    return {
        "no separator": ([*PROMPT, "--dev", "separator.txt"], 'separator.txt:2: expected "<label>'),
        "label no integer": ([*PROMPT, "--dev", "word.txt"], "word.txt:2: expected a whole number"),
        "label outside": ([*FINETUNE, "--train", "range.txt"], "range.txt:2: label 2 is not among"),
        "unknown label in dev": (
            [*PROMPT, "--dev", "unknown.txt"],
            "unknown.txt:1: label -1 is not among",
        ),
        "not UTF-8": ([*PROMPT, "--test", "latin1.txt"], "latin1.txt:2: not UTF-8"),
        "empty data": ([*PROMPT, "--dev", "empty.txt"], "empty.txt: is empty"),
        "label words no JSON": (
            [*PROMPT, "--label-names", "word.txt"],
            "word.txt: not a JSON file",
        ),
        "label words no list": ([*PROMPT, "--label-names", "dict.json"], "expected a JSON list"),
        "truncated checkpoint": (["--pretrained-model-path", "cut.pt"], "cut.pt: cannot be read"),
        "HTML checkpoint": (["--pretrained-model-path", "page.pt"], "page.pt: .*an HTML page"),
        "code in checkpoint": (["--pretrained-model-path", "code.pt"], "nothing in it was run"),
        "incomplete checkpoint": (["--pretrained-model-path", "lack.pt"], "missing layers.1"),
        "misshapen checkpoint": (
            ["--pretrained-model-path", "shape.pt"],
            "wrong shape: norm.weight",
        ),
        "other vocabulary": (
            ["--pretrained-model-path", "vocab.pt"],
            "a vocabulary of 320, but .* 99",
        ),
        "broken tokenizer": (["--tokenizer_path", "page.pt"], "page.pt: not a SentencePiece model"),
        "too long a sentence": (
            [*PROMPT, "--dev", "long.txt"],
            "long.txt:1: .* than the model's 128",
        ),
    }


class RunsCode:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, ("was-run",)


def prepare(folder: Path) -> None:
    """Write the files that `bad_files` names."""
    model = make_llama(causal=False)
    whole = (folder / "stories42M.pt").read_bytes()
    lines = {
        "separator.txt": b"0 ||| fine\n1 || not\n",
        "word.txt": b"0 ||| fine\ngood ||| not\n",
        "range.txt": b"0 ||| fine\n2 ||| not\n",
        "unknown.txt": b"-1 ||| not\n",
        "latin1.txt": b"0 ||| fine\n1 ||| caf\xe9\n",
        "empty.txt": b"",
        "dict.json": b'{"bad": 0, "good": 1}',
        "cut.pt": whole[: len(whole) // 2],
        "page.pt": b"<html><title>404</title></html>",
        "long.txt": b"0 ||| " + b"word " * 99,
    }
    for name, content in lines.items():
        (folder / name).write_bytes(content)
    torch.save({"model": RunsCode(), "model_args": {}}, folder / "code.pt")
    args = model.config.to_model_args()
    weights = dict(model.state_dict())
    misshapen = {**weights, "norm.weight": torch.ones(47)}
    write_checkpoint(folder / "shape.pt", {"model": misshapen, "model_args": args})
    del weights["layers.1.ffn_norm.weight"]
    write_checkpoint(folder / "lack.pt", {"model": weights, "model_args": args})
    save_llama(make_llama(causal=False, vocab_size=99), folder / "vocab.pt")


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_one_line_and_status_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    prepare(workplace)
    argv, pattern = bad_files()[name]
    status, out, err = run(argv, capsys)
    assert status == 2
    assert re.fullmatch(rf"run_llama\.py: error: .*{pattern}.*\n", err), err
    results = [p for p in (workplace / "output").rglob("*") if p.is_file()]
    assert results == [] and not Path("was-run").exists()
    assert "acc ::" not in out and "Temperature" not in out


def test_failed_run_leaves_old_results(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PROMPT) == 0
    path = Path("output/task_2/cfimdb-dev-prompting-output.txt")
    before = path.read_bytes()
    (workplace / "data/cfimdb-test.txt").write_text("broken\n")
    assert main(PROMPT) == 2
    assert path.read_bytes() == before


def test_as_a_process(workplace: Path) -> None:
    """A real process, in another folder: results to stdout, progress to stderr, status 0."""
    command = [sys.executable, str(ROOT / "run_llama.py"), *PROMPT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "dev acc ::" in done.stdout and "eval" not in done.stdout and "eval" in done.stderr


def test_a_terminal_of_few_characters_is_no_error(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["--prompt", "映画", "--max_new_tokens", "1"]) == 0
    assert b"\\u6620\\u753b" in screen.buffer.getvalue()
    path = Path("output/task_1/generated-sentence-temp-0.txt")
    assert path.read_text(encoding="utf-8").startswith("映画")
