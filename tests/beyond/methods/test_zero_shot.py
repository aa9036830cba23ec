"""Zero-shot prompts without their trailing space, and calibrated scores."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from beyond.methods import zero_shot
from beyond.methods.zero_shot import CalibratedClassifier, calibrate
from beyond.runtime import Runtime, prepare_model
from classifier import ClassifierConfig, LlamaZeroShotClassifier
from llama import load_pretrained
from run_llama import main
from tests.beyond.methods.conftest import PROMPT, WORDS
from tests.beyond.runs import Job, RunForks, copy_of
from tests.conftest import SENTENCES, make_llama, pad_rows, save_llama
from tests.test_run_llama import predicted, run
from tokenizer import Tokenizer

TEXTS = [line.split(" ||| ")[1] for line in SENTENCES]
ZERO_SHOT = ["--option", "prompt", "--batch_size", "3"]
DEV = "output/task_2/cfimdb-dev-prompting-output.txt"
CPU = torch.device("cpu")


def make_zero_shot(tokenizer: Tokenizer, causal: bool, words: list[str]) -> LlamaZeroShotClassifier:
    config = ClassifierConfig(len(words), "", 0.0, "prompt")
    return LlamaZeroShotClassifier(config, tokenizer, words, make_llama(causal), f"{PROMPT} ")


@pytest.mark.parametrize("causal", [False, True])
def test_calibration_is_the_equation(word_tokenizer: Tokenizer, causal: bool) -> None:
    """Against NumPy in float64: W p with W = diag(p_cf)^-1; one label is several tokens."""
    model = make_zero_shot(word_tokenizer, causal, ["bad", "good", "a film"])
    calibrated = calibrate(model, word_tokenizer, PROMPT, CPU)

    def probabilities(text: str) -> np.ndarray:
        tokens = word_tokenizer.encode(text + PROMPT, bos=True, eos=False)
        scores = np.exp(model(torch.tensor([tokens]))[0].double().numpy())
        return scores / scores.sum()

    p_cf = np.mean([probabilities(text) for text in ("N/A", "[MASK]", "")], axis=0)
    for text in TEXTS:
        tokens = word_tokenizer.encode(text + PROMPT, bos=True, eos=False)
        found = calibrated(torch.tensor([tokens]), torch.tensor([len(tokens)]))[0]
        expected = np.diag(1 / p_cf) @ probabilities(text)
        ours = found.double().softmax(dim=-1).numpy()
        np.testing.assert_allclose(ours, expected / expected.sum(), atol=1e-5)
        assert found.argmax() == expected.argmax()


class Fixed(nn.Module):
    """A classifier that gives every sentence the same scores."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        return self.scores.expand(len(input_ids), -1)


def test_small_numbers_do_not_underflow(word_tokenizer: Tokenizer) -> None:
    """Probabilities far below the smallest float32; scores that never change say nothing."""
    model = Fixed([-900.0, -300.0, -1000.0])
    calibrated = calibrate(model, word_tokenizer, PROMPT, CPU)  # type: ignore[arg-type]
    found = calibrated(torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 2]))
    assert found.isfinite().all()
    expected = torch.full((2, 3), -math.log(3))
    torch.testing.assert_close(found.log_softmax(dim=-1), expected, atol=1e-4, rtol=0)


def test_a_uniform_prior_changes_no_prediction(word_tokenizer: Tokenizer) -> None:
    model = make_zero_shot(word_tokenizer, True, WORDS)
    calibrated = CalibratedClassifier(model, torch.zeros(2))
    batch = pad_rows([word_tokenizer.encode(text, bos=True, eos=False) for text in TEXTS], 3)
    assert torch.equal(calibrated(*batch), model(*batch))


# ---------------------------------------------------------------------------------- command lines


def expected_scores(causal: bool, suffix: str, is_calibrated: bool) -> Tensor:
    """Score the sentences in batches of three, from the equations."""
    tokenizer, llama = Tokenizer(), load_pretrained("stories42M.pt", causal)
    config = ClassifierConfig(2, "", 0.0, "prompt")
    model = LlamaZeroShotClassifier(config, tokenizer, WORDS, llama)

    def score(texts: list[str]) -> Tensor:
        rows = [tokenizer.encode(text + suffix, bos=True, eos=False) for text in texts]
        return model(*pad_rows(rows, 3)).log_softmax(dim=-1)

    scores = torch.cat([score(TEXTS[start : start + 3]) for start in (0, 3, 6)])
    if not is_calibrated:
        return scores
    priors = torch.cat([score([text]) for text in ("N/A", "[MASK]", "")]).exp().mean(dim=0)
    return (scores.exp() / priors).log()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("calibration", [[], ["--calibrate"]])
@pytest.mark.parametrize("space", [[], ["--no_trailing_space"]])
def test_prompt_with_the_flags(
    word_workplace: Path, causal: bool, calibration: list[str], space: list[str]
) -> None:
    mode = "--causal" if causal else "--no-causal"
    assert main([*ZERO_SHOT, mode, *calibration, *space]) == 0
    scores = expected_scores(causal, PROMPT if space else f"{PROMPT} ", bool(calibration))
    assert predicted(DEV) == scores.argmax(dim=-1).tolist()


def test_the_space_is_a_token_of_its_own(word_workplace: Path) -> None:
    """So the tests here can tell the prompt with it from the one without."""
    tokenizer = Tokenizer()
    with_space, without = (
        tokenizer.encode(f"A film .{suffix}", bos=True, eos=False)
        for suffix in (f"{PROMPT} ", PROMPT)
    )
    assert with_space == [*without, tokenizer.sp_model.piece_to_id("▁")]
    both = [expected_scores(True, suffix, False) for suffix in (f"{PROMPT} ", PROMPT)]
    assert (both[0] - both[1]).abs().min() > 1e-3


def test_without_the_flag_nothing_is_calibrated(
    word_workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_shot, "calibrate", None)
    assert main(ZERO_SHOT) == 0
    with pytest.raises(TypeError):
        main([*ZERO_SHOT, "--calibrate"])


def test_a_prompt_without_content_that_is_too_long_is_one_line(
    word_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every sentence of the data fits."""
    tokenizer = Tokenizer()
    sizes = {
        text: len(tokenizer.encode(f"{text}{PROMPT} ", bos=True, eos=False))
        for text in ("N/A", "a")
    }
    assert sizes["a"] < sizes["N/A"]
    llama = make_llama(causal=True, max_seq_len=sizes["N/A"] - 1)
    save_llama(llama, Path("stories42M.pt"))
    for split in ("dev", "test"):
        Path(f"data/cfimdb-{split}.txt").write_text("0 ||| a\n")
    status, _, err = run(ZERO_SHOT, capsys)
    assert status == 0, err
    status, _, err = run([*ZERO_SHOT, "--calibrate"], capsys)
    assert (status, err) == (
        2,
        "run_llama.py: error: --calibrate: with 'N/A' as the sentence, a sequence of "
        f"{sizes['N/A']} tokens is longer than max_seq_len={sizes['N/A'] - 1}; leave --calibrate "
        "out\n",
    )


def test_calibration_in_several_processes(run_forks: RunForks, word_workplace: Path) -> None:
    argv = [*ZERO_SHOT, "--calibrate", "--causal"]
    folder = copy_of(word_workplace, "several")
    ((status, _, err),) = run_forks([Job(argv, folder, processes=2)])
    assert status == 0, err
    assert main(argv) == 0
    assert (folder / DEV).read_bytes() == Path(DEV).read_bytes()


def test_calibration_in_bfloat16(word_workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its prior is computed as the scores are."""
    tokenizer = Tokenizer()
    runtime = Runtime(CPU, torch.bfloat16, causal=True)
    model = prepare_model(make_zero_shot(tokenizer, True, WORDS), runtime, False)
    exact = calibrate(make_zero_shot(tokenizer, True, WORDS), tokenizer, PROMPT, CPU)
    half = calibrate(model, tokenizer, PROMPT, CPU)
    assert half.log_prior.dtype == torch.float32
    torch.testing.assert_close(half.log_prior, exact.log_prior, atol=0.2, rtol=0)
    assert not torch.equal(half.log_prior, exact.log_prior)
    status, out, err = run([*ZERO_SHOT, "--calibrate", "--dtype", "bfloat16"], capsys)
    assert (status, err) == (0, "") and "dev acc :: " in out
