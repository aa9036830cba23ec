"""The report: a Markdown file with a table for each checkpoint and data set, and pictures."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from benchmarks.quality.intervals import Difference, deviation
from benchmarks.quality.picture import draw
from benchmarks.quality.plan import Plan, Stage
from benchmarks.quality.results import Result
from benchmarks.quality.tables import Row, Table, median_of_known
from utils import open_atomically

HEAD = """\
# Which ways of fine-tuning help

Measured by `{command}`, which also writes this file. Each run is one
`run_llama.py --option finetune`; every result is a line of `{results}`, with its commit, machine
and checkpoint. Choices between methods are never made on test.

- *dev*, *test*: mean accuracy of the best epoch on dev, and the standard deviation over the seeds.
- *vs. ...*: the mean difference from that method or checkpoint, with its 95% interval in brackets.
  Runs with the same seed are compared (paired t interval); fewer than three seeds give none. Only
  seeds that both have count, so the difference may not be that of the means. The interval says what
  other seeds would give. Other sentences would differ too: the standard error of an accuracy
  of .4 is .015 on the 1,101 dev sentences of SST.
- *plain* has no flags: the assignment's head, learning rate (2e-5), epochs (five) and optimizer, 8
  sentences per batch, and the mode that the checkpoint says. (A `.pt` file that says none, such as
  the assignment's own, is read in reference mode.) With `--no-causal` it is the assignment's recipe
  in its attention too: without a mask, and with the last column as the sentence's hidden state.
- *seeds*: how many are measured; *n of m* if the plan has more.
- *time*, *memory*: seconds of a whole run, and its peak resident memory: the median, and for other
  rows than the baseline the median ratio to its run with the same seed on the same machine. Other
  programs used the machine at times, so the times are rough.
"""
MISSING = "not measured"


def write_report(
    plan: Plan, tables: Sequence[Table], used: Sequence[Result], report: Path, results: Path
) -> None:
    """Write the report and a picture for each stage, each file completely or not at all.

    Args:
        plan: that of the tables.
        tables: in their order.
        used: the results that are in the tables.
        report: the Markdown file; for QUALITY.md the pictures are in quality-pictures/.
        results: the CSV file, to be named.
    """
    folder = report.with_name(f"{report.stem.lower()}-pictures")
    pictures = {}
    for stage in plan.stages:
        if picture := draw([table for table in tables if table.stage is stage]):
            folder.mkdir(exist_ok=True)
            with open_atomically(folder / f"{stage.name}.svg") as file:
                file.write(picture)
            pictures[stage.name] = f"{folder.name}/{stage.name}.svg"
    with open_atomically(report) as file:
        file.writelines(f"{line}\n" for line in lines(plan, tables, used, pictures, results))


def lines(
    plan: Plan,
    tables: Sequence[Table],
    used: Sequence[Result],
    pictures: Mapping[str, str],
    results: Path,
) -> Iterator[str]:
    """Yield the lines of the report, given the pictures' paths by stage."""
    command = "uv run python -m benchmarks.quality"
    default = Path(__file__).with_name("plan.toml")
    if plan.path.resolve() != default:
        command += f" --plan {plan.path}"
    yield from HEAD.format(command=command, results=results.name).split("\n")
    yield describe_origin(used)
    for stage in plan.stages:
        yield from ("", f"## {stage.name}", "", describe_stage(stage))
        for table in tables:
            if table.stage is stage:
                yield from ("", f"### {table.title}", "", *table_lines(table))
        if stage.name in pictures:
            text = f"{stage.name}: differences from {stage.baseline}, by seed"
            yield from ("", f"![{text}]({quote(pictures[stage.name])})")
    methods = {method: flags_as_code(plan, method) for method in plan.methods}
    yield from ("", "## The methods", "", "| method | flags |", "|---|---|")
    yield from (f"| {name} | {flags} |" for name, flags in methods.items())
    yield from ("", "Flags of all runs with a checkpoint, and of all runs on a data set:", "")
    yield from ("| checkpoint or data | path | flags |", "|---|---|---|")
    for name, checkpoint in plan.checkpoints.items():
        yield f"| {name} | `{checkpoint.path}` | {as_code(checkpoint.flags)} |"
    yield from (f"| {name} |  | {as_code(flags)} |" for name, flags in plan.data.items() if flags)


def flags_as_code(plan: Plan, method: str) -> str:
    """Return the flags of a method as code, or a word that there are none."""
    return as_code(plan.methods[method]) or "none"


def as_code(flags: Sequence[str]) -> str:
    """Return flags as code; "" if there are none."""
    return f"`{' '.join(flags)}`" if flags else ""


def describe_origin(used: Sequence[Result]) -> str:
    """Say on which machines and at which commits the results were measured."""
    if not used:
        return "No run of this plan is complete yet."
    threads = {n: f"{n} thread{'s' if n > 1 else ''}" for n in {r.threads for r in used}}
    machines = sorted({f"{result.machine}, {threads[result.threads]}" for result in used})
    commits = sorted({commit for result in used for commit in result.commit.split()})
    days = sorted(result.date[:10] for result in used)
    return (
        f"{len(used)} runs, from {days[0]} to {days[-1]}; {'; '.join(machines)}; "
        f"commits {', '.join(commits)}."
    )


def describe_stage(stage: Stage) -> str:
    """Say in a sentence what the runs of a stage have in common."""
    if stage.train_lines is None:
        lines = "All training lines"
    elif stage.subset_seed is None:
        lines = f"The first {stage.train_lines} training lines"
    else:
        lines = f"{stage.train_lines} training lines, drawn by seed {stage.subset_seed}"
    splits = "dev and test" if "test" in stage.splits else "dev only, test is left unread"
    seeds = "seeds " if len(stage.seeds) > 1 else "seed "
    seeds += ", ".join(map(str, stage.seeds))
    return f"{lines}; {splits}; {seeds}; the baseline is *{stage.baseline}*."


def table_lines(table: Table) -> Iterator[str]:
    """Yield the lines of a table."""
    heads = ["checkpoint" if table.stage.compares_checkpoints else "method", "seeds"]
    for split in table.splits:
        heads += [split, *(f"vs. {name}" for name in compared(table))]
    heads += ["time", "memory"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in table.rows:
        yield f"| {' | '.join(cells(row, table))} |"
    if "test" in table.stage.splits and "test" not in table.splits:
        yield ""
        yield f"The test labels of {table.data} are placeholders, so test is left unread."


def compared(table: Table) -> list[str]:
    """Return the rows that the others are compared with: the baseline, and the plain recipe."""
    baseline, plain = table.stage.baseline, table.plain
    return [baseline] if plain is None or plain == baseline else [baseline, plain]


def cells(row: Row, table: Table) -> Iterator[str]:
    """Yield the cells of a row."""
    done = len(row.results)
    yield row.name
    yield f"{done}" if done == row.planned else f"{done} of {row.planned}"
    is_baseline = row.name == table.stage.baseline
    for split in table.splits:
        yield show_scores(row.scores(split))
        for name in compared(table):
            difference = row.difference(split, to_plain=name == table.plain)
            yield "" if row.name == name or not done else show_difference(difference)
    ratios = (row.ratio(lambda r: r.seconds), row.ratio(lambda r: r.memory_mib))
    if is_baseline and done:
        results = row.results.values()
        memory = median_of_known(result.memory_mib for result in results)
        yield f"{statistics.median(result.seconds for result in results):.0f} s"
        yield "" if memory is None else f"{memory:.0f} MiB"
    else:
        yield from ("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)


def show_scores(scores: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    if not scores:
        return MISSING
    mean, spread = sum(scores) / len(scores), deviation(scores)
    return decimals(mean) + ("" if spread is None else f" ± {decimals(spread)}")


def show_difference(difference: Difference | None) -> str:
    """Return a difference with its interval."""
    if difference is None:
        return "n/a"  # the baseline is not measured with these seeds
    text = signed(difference.mean)
    if difference.interval is None:
        return text
    low, high = difference.interval
    return f"{text} [{signed(low)}, {signed(high)}]"


def decimals(value: float) -> str:
    """Return an accuracy with three decimals and no zero before the point."""
    return f"{value:.3f}".removeprefix("0")


def signed(value: float) -> str:
    """Return a difference with a sign, as `decimals` does."""
    return ("-" if round(value, 3) < 0 else "+") + decimals(abs(value))
