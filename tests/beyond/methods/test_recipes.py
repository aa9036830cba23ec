"""`--recipe`: which flags it stands for, what overrides it, its rule, and its results."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import run_llama
from base_llama import read_checkpoint
from beyond.command_line import get_args
from beyond.formats.huggingface import write_huggingface
from beyond.formats.llama2c import write_llama2c
from beyond.methods.recipes import RECIPES, RULED, epochs, layer_decay, learning_rate
from beyond.methods.rule import apply_rule, change_by_dropout
from beyond.options import FinetuneOptions, flags_of
from llama import Llama
from tests.beyond.runs import assert_equal, interrupt, run
from tests.conftest import SENTENCES, make_llama, save_llama
from tokenizer import Tokenizer

BETTER = ["--option", "finetune", "--recipe", "better"]
SHORT = [*BETTER, "--batch_size", "3", "--epochs", "2", "--filepath", "out/a.pt"]
SHORT += ["--dev_out", "out/dev-finetuning-output.txt"]
SHORT += ["--test_out", "out/test-finetuning-output.txt"]


@pytest.fixture
def workplace(workplace: Path) -> Path:
    """A folder of a run whose label words are a token each."""
    (workplace / "data/cfimdb-label-mapping.json").write_text('["a", "and"]')
    return workplace


def options_of(*flags: str) -> FinetuneOptions:
    options = get_args([*BETTER, *flags])
    assert isinstance(options, FinetuneOptions)
    return options


def resolve_rule(options: FinetuneOptions) -> FinetuneOptions:
    """Return options with what the rule decides."""
    return apply_rule(options, run_llama.build_prompt_suffix, lambda line: None)


def without(*names: str) -> tuple[str, ...]:
    """Return what is left to the rule if these flags are given."""
    return tuple(name for name in RULED if name not in names)


def texts_of(split: str) -> list[str]:
    """Return the sentences of a file of the data set."""
    lines = Path(f"data/cfimdb-{split}.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(" ||| ", 1)[1] for line in lines]


def printed_recipe(out: str) -> list[str]:
    """Return the words of the line that says which flags a recipe stands for."""
    (line,) = [line for line in out.splitlines() if line.startswith("recipe better: --causal")]
    return shlex.split(line.removeprefix("recipe better: "))


# ------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_flags_and_no_other(workplace: Path, name: str) -> None:
    options = get_args(["--option", "finetune", "--recipe", name])
    plain = get_args(["--option", "finetune"])
    assert isinstance(options, FinetuneOptions)
    different = {
        flag: getattr(options, flag)
        for flag in flags_of(FinetuneOptions)
        if getattr(options, flag) != getattr(plain, flag)
    }
    filepath = f"output/task_3/cfimdb-finetune-{name}.pt"
    assert different == {**RECIPES[name], "recipe": name, "filepath": filepath}
    assert options.left_to_rule == RULED and options.notes == ()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pooling", "last"], {"pooling": "last"}),
        (["--layer_decay", "1"], {"layer_decay": 1.0, "left_to_rule": without("layer_decay")}),
        (["--no-causal"], {"causal": False}),
        (["--no-linear-decay"], {"linear_decay": False}),
        (["--lr", "0.5"], {"lr": 0.5, "left_to_rule": without("lr")}),
        (["--epochs", "1"], {"epochs": 1, "left_to_rule": without("epochs")}),
        (["--head", "linear"], {"head": "linear", "left_to_rule": without("head")}),
        (["--epochs", "1", "--lr", "2e-5"], {"lr": 2e-5, "left_to_rule": without("epochs", "lr")}),
    ],
)
def test_given_flags_override_the_recipe(
    workplace: Path, flags: list[str], expected: dict[str, object]
) -> None:
    """Even with the value that the flag has by default; the recipe's other flags stay."""
    options = options_of(*flags)
    values = {**RECIPES["better"], **expected}
    assert {name: getattr(options, name) for name in values} == values


def test_every_switch_of_a_recipe_can_be_switched_off(workplace: Path) -> None:
    for name, recipe in RECIPES.items():
        for switch in [flag for flag, value in recipe.items() if value is True]:
            options = get_args(["--option", "finetune", "--recipe", name, f"--no-{switch}"])
            assert getattr(options, switch) is False


@pytest.mark.parametrize(
    ("flags", "without"),
    [
        (["--pooling", "mean"], ["head"]),
        (["--freeze_backbone"], ["head", "layer_decay"]),
        (["--lora_rank", "2"], ["layer_decay"]),
    ],
)
def test_a_flag_that_contradicts_a_given_one_is_left_out(
    workplace: Path, flags: list[str], without: list[str]
) -> None:
    options = options_of(*flags)
    assert options.notes == tuple(
        f"--recipe better: leaves out --{name}, as other flags contradict it" for name in without
    )
    for name in without:
        assert getattr(resolve_rule(options), name) == getattr(FinetuneOptions, name)
    for name in RECIPES["better"].keys() - set(without):
        assert getattr(options, name) == RECIPES["better"][name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "best"], "argument --recipe: invalid choice: 'best' (choose from 'better')"),
        (
            [*BETTER[2:], "--lora_rank", "2", "--mixout", "0.1"],
            "--mixout and --lora_rank: mixout is for weights that train; leave one out",
        ),
        (
            [*BETTER[2:], "--layer_decay", "0.8", "--freeze_backbone"],
            "--layer_decay and --freeze_backbone: the layers' own weights do not train; leave one "
            "out",
        ),
    ],
)
def test_bad_flags_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    """Also those that contradict each other without the recipe."""
    status, out, err = run(["--option", "finetune", *flags], capsys)
    assert (status, out, err) == (2, "", f"run_llama.py: error: {message}\n")


# ------------------------------------------------------------------------------------------- rule


def test_the_rate_falls_with_the_root_of_the_size() -> None:
    assert learning_rate(5_500_000) == 2e-4
    assert learning_rate(22_000_000) == 1e-4
    assert learning_rate(88_000_000) == 5e-5
    assert learning_rate(5_000_000) == 2.1e-4  # two digits
    assert (learning_rate(1), learning_rate(10**12)) == (3e-4, 1e-5)  # the limits


def test_the_lowest_layer_learns_at_a_quarter_of_the_rate() -> None:
    assert [layer_decay(layers) for layers in (1, 2, 6, 30)] == [0.25, 0.5, 0.79, 0.95]
    for layers in range(1, 20):
        assert layer_decay(layers) ** layers == pytest.approx(0.25, rel=0.15)
    assert layer_decay(10**6) == 0.99  # not 1, which would switch it off


def test_more_text_gets_fewer_epochs() -> None:
    assert epochs(0, True) == epochs(1, True) == epochs(500_000, True) == 10
    assert epochs(10**9, True) == 1
    for size, with_dropout, without_dropout in ((936_994, 5, 3), (1_629_241, 3, 2)):  # SST, CFIMDB
        assert (epochs(size, True), epochs(size, False)) == (with_dropout, without_dropout)


def test_label_words_of_several_tokens_are_not_the_head(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless they are asked for, which is an error then."""
    labels = Path("labels.json")
    for names, head in (["a", "and"], "label_words"), (["a", "bad"], "linear"):
        labels.write_text(json.dumps(names))
        flags = ["--label-names", str(labels)]
        assert resolve_rule(options_of(*flags)).head == head
        assert resolve_rule(options_of(*flags, "--head", "label_words")).head == "label_words"
        assert resolve_rule(options_of(*flags, "--head", "linear")).head == "linear"
        status, out, err = run([*SHORT, *flags, "--epochs", "1"], capsys)
        assert status == 0, err
        assert f"recipe better: --causal --head {head} --warmup" in out
        note = "recipe better: --head linear, since the label word 'bad' is 3 tokens, not one"
        assert out.count(note) == (head == "linear")
    status, _, err = run([*SHORT, *flags, "--head", "label_words"], capsys)
    assert status == 2 and "the label word 'bad' is 3 tokens" in err
    status, out, err = run([*SHORT, *flags, "--wise_ft", "0.5"], capsys)
    assert (status, out) == (2, "") and err.endswith(
        "run_llama.py: error: --wise_ft 0.5: needs --head label_words, but the label word 'bad' is "
        "3 tokens, not one; leave --wise_ft out\n"
    )


def test_sentences_that_do_not_fit_with_the_prompt_get_a_new_head(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the assignment's recipe would read them; the longest with the prompt is at the limit."""
    tokenizer = Tokenizer(None, "tokenizer.model")
    prompt = run_llama.build_prompt_suffix(["a", "and"]).rstrip(" ")
    asked = [tokenizer.encode(text + prompt, bos=True, eos=False) for text in texts_of("train")]
    longest = max(map(len, asked))
    number = 1 + [len(tokens) for tokens in asked].index(longest)
    flags = ["--pretrained-model-path", "short.pt", "--tokenizer_path", "tokenizer.model"]
    for context, head in (longest, "label_words"), (longest - 1, "linear"):
        save_llama(make_llama(causal=True, max_seq_len=context), Path("short.pt"))
        status, out, err = run([*SHORT, *flags, "--epochs", "1"], capsys)
        assert status == 0, err
        assert f"recipe better: --causal --head {head} --warmup" in out
        note = (
            f"recipe better: --head linear, since data/cfimdb-train.txt:{number}: with the prompt "
            f"it has {longest} tokens, more than the model's {context}"
        )
        assert out.count(note) == (head == "linear")
    with open("data/cfimdb-dev.txt", "a") as file:  # the lengths of dev and test count too
        file.write(f"0 ||| {texts_of('train')[number - 1]} and a film\n")
    save_llama(make_llama(causal=True, max_seq_len=longest), Path("short.pt"))
    assert resolve_rule(options_of(*flags)).head == "linear"
    # A sentence may be cut off; the prompt is not.
    assert resolve_rule(options_of(*flags, "--max_sentence_len", "1")).head == "label_words"


def save_sensitive() -> None:
    """Make a model in the default's place whose predictions change much by dropout."""
    llama = make_llama(causal=False)
    for parameter in llama.parameters():
        parameter.data *= 3
    save_llama(llama, Path("stories42M.pt"))


def test_a_model_that_dropout_changes_much_is_trained_without_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And without R-Drop, which compares forward passes with different dropout."""
    Path("many.txt").write_text("\n".join([SENTENCES[0]] * 30_000) + "\n")
    flags = ["--train", "many.txt"]
    tolerant = resolve_rule(options_of(*flags))
    save_sensitive()
    found = resolve_rule(options_of(*flags))
    assert (tolerant.dropout, tolerant.hidden_dropout_prob, tolerant.r_drop) == (0.1, 0.3, 1.0)
    assert (found.dropout, found.hidden_dropout_prob, found.r_drop) == (0.0, 0.0, 0.0)
    linear = resolve_rule(options_of(*flags, "--head", "linear"))
    assert (linear.dropout, linear.hidden_dropout_prob, linear.r_drop) == (0.0, 0.3, 0.0)
    size = Path("many.txt").stat().st_size
    assert found.epochs == epochs(size, False) < tolerant.epochs
    status, out, err = run([*SHORT, "--epochs", "1"], capsys)
    assert status == 0, err
    note = r"better: no dropout, since it would change the model's predictions by [\d.]+ nats"
    assert len(re.findall(note, out)) == 1
    assert " --dropout 0.0 --r_drop 0.0 --hidden_dropout_prob 0.0 " in out


def test_given_dropout_is_kept(workplace: Path) -> None:
    save_sensitive()
    for flags, expected in (
        (["--dropout", "0.2"], (0.2, 0.3, 1.0)),
        (["--r_drop", "0.5"], (0.0, 0.0, 0.5)),
        (["--dropout", "0"], (0.0, 0.3, 0.0)),
        (["--hidden_dropout_prob", "0.4"], (0.0, 0.4, 0.0)),
    ):
        options = resolve_rule(options_of(*flags))
        assert (options.dropout, options.hidden_dropout_prob, options.r_drop) == expected


def test_the_change_by_dropout_is_the_mean_divergence(workplace: Path) -> None:
    """KL(p || q) for each next token, worked out by another formula; no global state changes."""
    Path("two.txt").write_text("\n".join(SENTENCES[:2]) + "\n")
    llama = make_llama(causal=True)
    llama = Llama(replace(llama.config, dropout=0.3))
    llama.eval()
    before = torch.get_rng_state()
    found = change_by_dropout(llama, options_of("--train", "two.txt"))
    assert torch.equal(torch.get_rng_state(), before) and not llama.training
    tokenizer, divergences = Tokenizer(None, "tokenizer.model"), []
    torch.manual_seed(0)
    for line in SENTENCES[:2]:
        row = torch.tensor([tokenizer.encode(line.split(" ||| ")[1], True, False)])
        with torch.no_grad():
            p = llama.eval()(row, targets=row)[0].softmax(-1)
            q = llama.train()(row, targets=row)[0].softmax(-1)
        divergences += (p * (p / q).log()).sum(-1)[0].tolist()
    assert found == pytest.approx(sum(divergences) / len(divergences), rel=1e-4) and found > 0


def test_dropped_layers_do_not_count(workplace: Path) -> None:
    shape = {"dim": 480, "n_heads": 6, "n_kv_heads": 6}
    save_llama(make_llama(causal=False, n_layers=4, **shape), Path("large.pt"))
    flags = ["--pretrained-model-path", "large.pt", "--tokenizer_path", "tokenizer.model"]
    options = resolve_rule(options_of(*flags, "--head", "linear", "--pool_layer", "1"))
    kept = sum(p.numel() for p in make_llama(causal=False, n_layers=1, **shape).parameters())
    assert options.lr == learning_rate(kept) < 3e-4  # not the limit
    assert options.layer_decay == layer_decay(1)


def test_the_rule_counts_parameters_and_bytes(workplace: Path) -> None:
    """A matrix that is used twice counts once, in whichever dtype the file has it."""
    dim, layers, vocabulary, width = 48, 2, 320, 128  # `SHAPE`; the hidden size of SwiGLU
    attention = dim * dim * 2 + 2 * dim * dim // 2
    count = vocabulary * dim + dim + layers * (attention + 3 * dim * width + 2 * dim)
    llama = make_llama(causal=False)
    assert count == sum(p.numel() for p in llama.parameters())
    options = resolve_rule(options_of())
    assert (options.lr, options.epochs, options.left_to_rule) == (learning_rate(count), 10, ())
    assert options.layer_decay == 0.5  # of two layers
    larger = make_llama(causal=False, dim=480, vocab_size=320, n_heads=6, n_kv_heads=6)
    save_llama(larger.half(), Path("large.pt"))
    count = sum(p.numel() for p in larger.parameters())
    Path("many.txt").write_text("\n".join([SENTENCES[0]] * 30_000) + "\n")
    flags = ["--pretrained-model-path", "large.pt", "--tokenizer_path", "tokenizer.model"]
    options = resolve_rule(options_of(*flags, "--train", "many.txt", "--dropout", "0.1"))
    size = Path("many.txt").stat().st_size
    assert (options.lr, options.epochs) == (learning_rate(count), epochs(size, True)) and size > 6e5
    assert options.lr < 3e-4  # not the limit


def test_the_rule_reads_checkpoints_of_other_projects(workplace: Path) -> None:
    """A file of llama2.c and a folder of Hugging Face give what the .pt file gives."""
    llama, tokenizer = make_llama(causal=True, n_kv_heads=6), Tokenizer(None, "tokenizer.model")
    save_llama(llama, Path("model.pt"))
    write_llama2c("model.bin", llama, quantize=False)
    write_huggingface("hub", llama, tokenizer)
    found = [
        resolve_rule(
            options_of("--pretrained-model-path", path, "--tokenizer_path", "tokenizer.model")
        )
        for path in ("model.pt", "model.bin", "hub")
    ]
    count = sum(p.numel() for p in llama.parameters())
    assert [(options.lr, options.epochs) for options in found] == [(learning_rate(count), 10)] * 3


@pytest.mark.parametrize("parameters", [1, 10_000, 42_000_000, 135_000_000, 1_100_000_000, 10**11])
@pytest.mark.parametrize("size", [0, 1, 100, 10**5, 936_994, 10**7, 10**12])
def test_every_model_and_data_set_gets_a_usable_rate_and_epochs(parameters: int, size: int) -> None:
    assert 1e-5 <= learning_rate(parameters) <= 3e-4
    assert learning_rate(2 * parameters) <= learning_rate(parameters)
    for dropout in (True, False):
        assert 1 <= epochs(2 * size, dropout) <= epochs(size, dropout) <= 10
    assert epochs(size, False) <= epochs(size, True)


def test_given_values_are_kept(workplace: Path) -> None:
    """The checkpoint is not read then."""
    flags = ["--lr", "0.5", "--epochs", "7", "--layer_decay", "0.6", "--head", "linear"]
    options = options_of(*flags, "--dropout", "0.2")
    Path("stories42M.pt").unlink()
    assert resolve_rule(options) == replace(options, left_to_rule=())


def test_options_without_their_rule_start_no_run(workplace: Path) -> None:
    with pytest.raises(AssertionError, match="rule has not been applied"):
        options_of().run  # noqa: B018


# ---------------------------------------------------------------------------------------- results


def test_the_printed_flags_give_the_same_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(SHORT, capsys)
    assert status == 0, err
    flags = printed_recipe(out)
    expected = ["--causal", "--head", "label_words", "--warmup", "0.06", "--linear_decay"]
    expected += ["--layer_decay", "0.5", "--dropout", "0.1", "--r_drop", "1.0"]
    expected += ["--hidden_dropout_prob", "0.3", "--lr", "0.0003", "--epochs", "2"]
    assert flags == expected
    by_recipe = read_checkpoint("out/a.pt")
    plain = [word for word in SHORT if word not in ("--recipe", "better")]
    status, out, err = run([*plain, *flags], capsys)
    assert status == 0 and "recipe" not in out, err
    assert_equal(read_checkpoint("out/a.pt"), by_recipe)


def test_a_flag_may_need_one_of_the_recipe(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """WiSE-FT needs the label words. After one epoch it keeps a mixture with the pretrained
    weights, whatever the accuracies are."""
    kept = []
    for flags in ([], ["--wise_ft", "0.3"]):
        status, _, err = run([*SHORT, "--epochs", "1", *flags], capsys)
        assert status == 0, err
        kept.append(read_checkpoint("out/a.pt")["model"])
    pretrained = read_checkpoint("stories42M.pt")["model"]
    name = "layers.0.feed_forward.w1.weight"
    before, after, mixed = pretrained[name], kept[0][f"llama.{name}"], kept[1][f"llama.{name}"]
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(mixed, 0.3 * after + 0.7 * before)


def test_predictions_are_also_written_for_extra_work(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(SHORT, capsys)
    assert status == 0, err
    for split in ("dev", "test"):
        path, finetuning = (f"out/{split}-{w}-output.txt" for w in ("advanced", "finetuning"))
        assert Path(path).read_bytes() == Path(finetuning).read_bytes()
        records = [json.loads(Path(f"{name}.json").read_text()) for name in (path, finetuning)]
        assert records[0]["scores"] == records[1]["scores"]
        for record in records:
            assert record["recipe"] == "better"
            assert shlex.split(record["recipe flags"]) == printed_recipe(out)
        assert path in out
    assert list(options_of("--dataset", "sst").advanced_files.values()) == [
        "output/task_3/sst-dev-advanced-output.txt",
        "output/task_3/sst-test-advanced-output.txt",
    ]


def test_without_a_recipe_nothing_of_it_is_written(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [word for word in SHORT if word not in ("--recipe", "better")]
    status, out, err = run(plain, capsys)
    assert status == 0 and "recipe" not in out, err
    assert not list(Path("out").glob("*advanced*"))
    assert "recipe" not in json.loads(Path("out/a.pt.json").read_text())


def test_several_seeds_have_files_for_extra_work_of_their_own(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run([*SHORT, "--seeds", "1,2"], capsys)
    assert status == 0, err
    assert printed_recipe(out)  # once
    names = sorted(path.name for path in Path("out").glob("*advanced-output.txt"))
    splits = ("dev", "test")
    assert names == [f"seed-{n}-{split}-advanced-output.txt" for n in (1, 2) for split in splits]
    settings = json.loads(Path("out/a.seeds.json").read_text())["settings"]
    assert (settings["recipe"], settings["lr"]) == ("better", "0.0003")


def test_a_run_of_a_recipe_can_be_resumed(workplace: Path) -> None:
    assert run_llama.main(SHORT) == 0
    expected = read_checkpoint("out/a.pt")
    advanced = Path("out/dev-advanced-output.txt").read_bytes()
    for path in Path("out").glob("*.*"):
        if path.is_file():
            path.unlink()
    assert interrupt(SHORT, steps=4) == 130
    assert not Path("out/dev-advanced-output.txt").exists()
    assert run_llama.main([*SHORT, "--resume"]) == 0
    assert_equal(read_checkpoint("out/a.pt"), expected)
    assert Path("out/dev-advanced-output.txt").read_bytes() == advanced
