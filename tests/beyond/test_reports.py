"""Reports: what a training run prints besides the assignment's lines, and its pages of text."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import markdown  # type: ignore[import-untyped]
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_llama
from beyond import pretraining, reports
from beyond.command_line import get_args
from beyond.reports import (
    describe_mistakes,
    escape_markdown,
    most_confident_mistakes,
    print_next_commands,
    show_seconds,
)
from beyond.run import TrainingRun
from beyond.runtime import Runtime
from run_llama import Evaluation, main
from tests.conftest import make_llama
from tests.test_run_llama import run
from tokenizer import Tokenizer
from utils import accuracy, confusion_matrix, f1_scores, macro_f1, mean_loss

FINETUNE = ["--option", "finetune", "--batch_size", "3", "--epochs", "3", "--lr", "1e-3"]
FINETUNE += ["--filepath", "out/a b.pt"]
PRETRAIN = ["--option", "pretrain", "--batch_size", "2", "--epochs", "2", "--dim", "32"]
PRETRAIN += [
    "--n_layers",
    "1",
    "--n_heads",
    "4",
    "--max_seq_len",
    "16",
    "--filepath",
    "lm/model.pt",
]
PRETRAIN += ["--tokenizer_path", "tokenizer.model"]


def evaluation(rows: list[tuple[int, int, float, str]], num_labels: int = 3) -> Evaluation:
    """Make a result of rows of gold label, prediction, its probability and sentence."""
    labels, predictions, probabilities, sentences = (list(x) for x in zip(*rows, strict=True))
    log_probs = [
        [math.log(p if label == predicted else (1 - p) / 2) for label in range(num_labels)]
        for predicted, p in zip(predictions, probabilities, strict=True)
    ]
    confusion = confusion_matrix(predictions, labels, num_labels)
    scores = accuracy(confusion), macro_f1(confusion)
    loss = mean_loss(log_probs, labels)
    return Evaluation(*scores, predictions, labels, sentences, confusion, log_probs, loss)


ROWS = [
    (0, 0, 0.99, "right"),
    (0, 2, 0.70, "wrong"),
    (-1, 1, 0.98, "no gold label"),
    (1, 2, 0.90, "very wrong"),
    (2, 0, 0.40, "hardly wrong"),
]


# ------------------------------------------------------------------------------------------ scores


def test_the_scores_of_each_label() -> None:
    """F1 is 2 TP / (2 TP + FP + FN); a label that never occurs has none."""
    confusion = [[3, 1, 0, 0], [2, 4, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    scores = f1_scores(confusion)
    assert scores[:3] == [6 / 9, 8 / 12, 0.0] and math.isnan(scores[3])
    assert macro_f1(confusion) == pytest.approx((6 / 9 + 8 / 12 + 0) / 3)


def test_the_loss_is_the_mean_over_sentences_with_a_gold_label() -> None:
    log_probs = [[-0.5, -1.0], [-2.0, -0.25], [-3.0, -0.125]]
    assert mean_loss(log_probs, [1, 0, -1]) == 1.5
    assert math.isnan(mean_loss(log_probs, [-1, -1, -1]))


def test_an_evaluation_has_the_log_probabilities_that_the_loss_is_made_of(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the training loss of the same model without dropout."""
    results: list[Evaluation] = []
    losses: list[float] = []

    def recording_eval(loader, model, device):  # type: ignore[no-untyped-def]
        results.append(evaluate(loader, model, device))
        model.eval()
        with torch.no_grad():
            parts = [
                run_llama.classification_loss(model(batch.tokens, batch.lengths), batch.labels)
                for batch in loader
            ]
        model.train()
        losses.append(float(sum(parts)) / len(loader.dataset))
        return results[-1]

    evaluate = run_llama.model_eval
    monkeypatch.setattr(run_llama, "model_eval", recording_eval)
    assert main([*FINETUNE, "--epochs", "1"]) == 0
    assert len(results) == 4  # train, dev; then dev and test
    for result, loss in zip(results, losses, strict=True):
        assert result.loss == pytest.approx(loss, rel=1e-5)
        rows = zip(result.log_probs, result.predictions, strict=True)
        for log_probs, prediction in rows:
            assert math.fsum(map(math.exp, log_probs)) == pytest.approx(1, abs=1e-5)
            assert log_probs[prediction] == max(log_probs)


# ---------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_sorted_by_confidence() -> None:
    result = evaluation(ROWS)
    mistakes = most_confident_mistakes(result)
    assert [mistake[1:] for mistake in mistakes] == [
        (1, 2, "very wrong"),
        (0, 2, "wrong"),
        (2, 0, "hardly wrong"),
    ]
    assert [mistake.probability for mistake in mistakes] == pytest.approx([0.9, 0.7, 0.4])
    assert len(most_confident_mistakes(result, number=2)) == 2


def test_the_page_of_mistakes_names_the_epoch_and_their_number() -> None:
    page = describe_mistakes(evaluation(ROWS * 7), ["bad", "so-so", "good"], epoch=4)
    title, blank, *lines = page.split("\n")
    assert title == "epoch 4: the 10 most confident of 21 mistakes on dev" and not blank
    assert lines[0] == "1. predicted **good** (0.900), gold **so\\-so**: very wrong"
    assert lines[7] == "1. predicted **good** (0.700), gold **bad**: wrong" and len(lines) == 10
    assert describe_mistakes(evaluation(ROWS[:1]), ["a", "b", "c"], 0).endswith(
        "no mistakes on dev"
    )


@pytest.mark.parametrize(
    "text",
    [
        "a *very* __bad__ `film` # 1",
        "<script>alert(1)</script> & [a link](http://x.org) | bar",
        "1. first - second + third! ~~no~~",
        r"back\slash \* end",
    ],
)
def test_a_sentence_is_shown_as_it_is(text: str) -> None:
    """TensorBoard turns the page into HTML with this library."""
    page = markdown.markdown(f"1. {escape_markdown(text)}", extensions=["tables", "fenced_code"])
    body = re.sub("</?(ol|li|p)>", "", page).strip()
    assert "<" not in body
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        body = body.replace(entity, character)
    assert body == text


def test_a_long_sentence_is_shortened_and_line_ends_are_spaces() -> None:
    assert escape_markdown("a\nb\r\n c\u2028d") == "a b c d"
    shown = escape_markdown("word " * 200)
    assert len(shown) < 420 and shown.endswith("...".replace(".", "\\."))


# ----------------------------------------------------------------------------------------- console


def test_each_epoch_line_is_followed_by_its_seconds_and_whether_it_is_best(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(FINETUNE, capsys)
    assert status == 0
    lines = out.splitlines()
    best = -1.0
    for number, line in enumerate(lines):
        if match := re.fullmatch(r"epoch \d: train loss :: .*, dev acc :: (.*)", line):
            is_best = float(match[1]) > best
            best = max(best, float(match[1]))
            words = ", the best epoch so far" if is_best else ""
            assert re.fullmatch(rf"  \d+\.\d s{words}", lines[number + 1])
    assert sum("best epoch so far" in line for line in lines) == out.count("save the model")


def test_a_run_ends_with_a_table_of_its_results(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(FINETUNE, capsys)
    assert status == 0
    accuracies = re.findall(r"epoch \d: .*dev acc :: (.*)", out)
    (curves,) = [path for path in Path("output/task_3").iterdir() if path.is_dir()]
    dev, test = (re.findall(rf"^{split} acc :: (.*)", out, re.M)[0] for split in ("dev", "test"))
    number = r"\d+\.\d{3}"
    assert re.search(
        rf"^test acc :: .*\n"
        rf"  best epoch  {accuracies.index(max(accuracies))} \(of 0 to 2\)\n"
        rf"  dev         accuracy {dev}, macro-F1 {number}, loss {number}\n"
        rf"  test        accuracy {test}, macro-F1 {number}, loss {number}\n"
        r"  time        \d+\.\d s\n"
        r"  files       output/task_3/cfimdb-dev-finetuning-output\.txt\n"
        r"              output/task_3/cfimdb-test-finetuning-output\.txt\n"
        r"              out/a b\.pt\n"
        r"              out/a b\.dev\.tsv\n"
        r"              out/a b\.test\.tsv\n"
        rf"  curves      {re.escape(str(curves))}\n\Z",
        out,
        re.M,
    ), out


def test_a_test_file_without_labels_has_no_score(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("data/cfimdb-test.txt")
    path.write_text(re.sub("^[01]", "-1", path.read_text(), flags=re.M))
    status, out, _ = run([*FINETUNE, "--epochs", "1"], capsys)
    assert status == 0
    assert "\n  test        accuracy n/a, macro-F1 n/a, loss n/a\n" in out
    (folder,) = Path("output/task_3").glob("*/dev")
    scalars = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert [tag for tag in scalars if tag.startswith("result/")] == ["result/dev_accuracy"]


def test_the_bar_shows_the_loss_that_was_read_last(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss is read every ten steps only, since that waits for the device."""
    shown: list[str] = []

    class Bar(list[Any]):
        def set_postfix_str(self, text: str, refresh: bool) -> None:
            assert not refresh
            shown.append(text)

    monkeypatch.setattr("beyond.run.progress", lambda batches, **_: Bar(batches))
    train = Path("data/cfimdb-train.txt")
    train.write_text(train.read_text() * 3)
    status, _, _ = run([*FINETUNE, "--batch_size", "1", "--epochs", "1"], capsys)
    assert status == 0
    (folder,) = Path("output/task_3").glob("*/train")
    losses = [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]
    means = [f"loss {sum(losses[i : i + 10]) / 10:.3f}" for i in (0, 10)]
    assert len(losses) == 24 and shown == [means[0]] * 10 + [means[1]] * 5


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            FINETUNE,
            "curves: uv run tensorboard --logdir output/task_3\n"
            "use it: uv run python run_llama.py --option classify --filepath 'out/a b.pt'\n",
        ),
        (
            [*FINETUNE, "--seeds", "5,6"],
            "curves: uv run tensorboard --logdir output/task_3\n"
            "use it: uv run python run_llama.py --option classify "
            "--filepath 'out/a b-seed-5.pt'\n",
        ),
        (
            PRETRAIN,
            "curves: uv run tensorboard --logdir lm\n"
            "use it: uv run python run_llama.py --option generate "
            "--pretrained-model-path lm/model.pt\n",
        ),
        (["--option", "prompt"], ""),
        (["--option", "generate"], ""),
    ],
)
def test_at_a_terminal_the_next_commands_are_printed(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    expected: str,
) -> None:
    options = get_args(argv)
    print_next_commands(options)
    assert capsys.readouterr().out == ""  # not a terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_next_commands(options)
    assert capsys.readouterr().out == expected


def test_the_program_ends_with_the_next_commands(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, also after several seeds; and not after an error."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, _ = run([*FINETUNE, "--epochs", "1", "--seeds", "5,6"], capsys)
    assert status == 0 and out.count("use it: ") == 1
    assert out.splitlines()[-1].startswith("use it: ")
    status, out, _ = run([*FINETUNE, "--lr", "1e30"], capsys)
    assert status == 2 and "use it: " not in out


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61.6, "1 min 2 s"), (3600, "1 h 0 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


# ------------------------------------------------------------------------------------- pretraining


def test_a_pretraining_ends_with_a_table_of_its_results(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(PRETRAIN, capsys)
    assert status == 0
    losses = re.findall(r"dev loss :: (.*), dev", out)
    best = min(losses)
    assert re.search(
        rf"  best epoch  {losses.index(best)} \(of 0 to 1\)\n"
        rf"  dev         loss {best}, perplexity .*, bits per byte \d\.\d{{3}}\n"
        r"  time        .*\n  files       lm/model\.pt\n  curves      lm/model-.*\n\Z",
        out,
    ), out


def test_bits_per_byte_are_all_nats_of_the_text_by_its_bytes(workplace: Path) -> None:
    """The dev text makes full blocks here, so nothing is left out."""
    tokenizer = Tokenizer(tokenizer_model="tokenizer.model")
    texts = ["A dull , lifeless story .", "Très naïf , 映画 !"]
    documents = [torch.tensor(tokenizer.encode(text, bos=True, eos=False)) for text in texts]
    num_tokens = sum(map(len, documents)) - 1
    ratio = pretraining.count_tokens_per_byte(documents, tokenizer)
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    assert ratio == pytest.approx(num_tokens / num_bytes)


def test_bits_per_byte_are_written_for_each_epoch(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios: list[float] = []

    def recording(documents, tokenizer):  # type: ignore[no-untyped-def]
        ratios.append(count(documents, tokenizer))
        return ratios[-1]

    count = pretraining.count_tokens_per_byte
    monkeypatch.setattr(pretraining, "count_tokens_per_byte", recording)
    assert main(PRETRAIN) == 0
    (folder,) = Path("lm").glob("*/dev")
    events = EventAccumulator(str(folder)).Reload()
    losses, bits = ([e.value for e in events.Scalars(x)] for x in ("loss", "bits_per_byte"))
    assert bits == pytest.approx([loss / math.log(2) * ratios[0] for loss in losses], rel=1e-6)


def test_a_sample_text_leaves_random_state_and_mode_as_they_are(workplace: Path) -> None:
    llama, tokenizer = make_llama(causal=True), Tokenizer(tokenizer_model="tokenizer.model")
    llama.train()
    runtime = Runtime(torch.device("cpu"), torch.float32, causal=True)
    before = torch.get_rng_state()
    texts = [pretraining.sample_text(llama, tokenizer, runtime, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before) and llama.training
    assert texts[0] == texts[1] != texts[2]


# ------------------------------------------------------------------------------------- TensorBoard


def test_the_gradient_norm_is_that_of_all_parameters_before_clipping(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[float] = []

    def recording(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        loss = backward(self, *args, **kwargs)
        gradients = [p.grad.flatten() for p in self.model.parameters()]
        expected.append(torch.cat(gradients).double().norm().item())
        return loss

    backward = TrainingRun.backward
    monkeypatch.setattr(TrainingRun, "backward", recording)
    for argv, folder in (
        ([*FINETUNE, "--epochs", "1", "--micro_batch_size", "2"], "output/task_3"),
        ([*PRETRAIN, "--lr", "0.3"], "lm"),
    ):
        expected.clear()
        assert main(argv) == 0
        (train,) = Path(folder).glob("*/train")
        points = EventAccumulator(str(train)).Reload().Scalars("gradient_norm")
        assert [point.value for point in points] == pytest.approx(expected, rel=1e-5)
    assert max(expected) > pretraining.MAX_GRAD_NORM  # of the pretraining: some were clipped


def test_the_page_of_mistakes_and_the_best_score_are_written_for_best_epochs(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(FINETUNE, capsys)
    assert status == 0
    accuracies = [float(x) for x in re.findall(r"epoch \d: .*dev acc :: (.*)", out)]
    best = [i for i, x in enumerate(accuracies) if x > max(accuracies[:i], default=-1)]
    (folder,) = Path("output/task_3").glob("*/dev")
    events = EventAccumulator(str(folder)).Reload()
    steps = [3 * (epoch + 1) for epoch in best]
    assert [point.step for point in events.Scalars("result/dev_accuracy")] == steps
    texts = events.Tensors("mistakes/text_summary")
    assert [text.step for text in texts] == steps
    for text, epoch in zip(texts, best, strict=True):
        content = text.tensor_proto.string_val[0].decode()
        assert content.startswith(f"epoch {epoch}: ")
    (test_point,) = events.Scalars("result/test_accuracy")
    assert test_point.step == steps[-1]


def test_too_many_labels_make_no_picture(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MAX_LABELS", 1)
    assert main([*FINETUNE, "--epochs", "1"]) == 0
    (folder,) = Path("output/task_3").glob("*/dev")
    assert EventAccumulator(str(folder)).Reload().Tags()["images"] == []
