"""`AdamW` of the catalogue: right solutions in all styles, and the probes' own claims."""

from pathlib import Path

import numpy as np
import pytest
import torch

from beyond.classroom.part import difference, expected_of, observe_seeded
from beyond.classroom.parts.adamw import PART, parameters, trajectory
from beyond.classroom.parts.adamw_loop import Loop
from beyond.classroom.parts.probes import normal
from optimizer import AdamW
from tests.beyond.classroom.course_training import OPTIMIZER
from tests.beyond.classroom.styles import examine_with

LINE = "\n                "
MOMENTS = """\
state["m"] = beta1 * state["m"] + (1 - beta1) * grad
                state["v"] = beta2 * state["v"] + (1 - beta2) * grad * grad
"""
ALPHA = "alpha = alpha * math.sqrt(1 - beta2**t) / (1 - beta1**t)"
CHANGE = 'p.data = p.data - alpha * state["m"] / (torch.sqrt(state["v"]) + group["eps"])'
DECAY = 'p.data = p.data - group["lr"] * group["weight_decay"] * p.data'
ZEROS = 'state["m"] = torch.zeros_like(p.data)'
STYLES = {
    "in place, addcdiv": (
        CHANGE,
        'p.data.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-alpha)',
    ),
    "in place moments": (
        MOMENTS,
        f'state["m"].mul_(beta1).add_(grad, alpha=1.0 - beta1){LINE}'
        'state["v"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)\n',
    ),
    "lerp and pow": (
        MOMENTS,
        f'state["m"].lerp_(grad, 1 - beta1){LINE}'
        'state["v"] = torch.lerp(state["v"], torch.pow(grad, 2), 1 - beta2)\n',
    ),
    "zeros with device and dtype": (
        ZEROS,
        'state["m"] = torch.zeros(p.shape, dtype=p.dtype, device=p.device)',
    ),
    "zeros moved to the gradient": (ZEROS, 'state["m"] = torch.zeros(p.shape).to(grad)'),
    "gradient times 0": (ZEROS, 'state["m"] = 0 * grad'),
    "decay of the whole parameter": (
        DECAY,
        'p.data.mul_(1 - group["lr"] * group["weight_decay"])',
    ),
    "decay by add": (
        DECAY,
        'if group["weight_decay"] > 0:'
        f'{LINE}    p.data.add_(p.data, alpha=-group["lr"] * group["weight_decay"])',
    ),
    "no_grad": (CHANGE, f"with torch.no_grad():{LINE}    p -= {CHANGE.partition(' - ')[2]}"),
    "the step as a tensor": (
        ALPHA,
        f"t = torch.tensor(float(t)){LINE}"
        "    alpha = alpha * (torch.sqrt(1 - beta2**t) / (1 - beta1**t)).item()",
    ),
    "powers kept in the state": (
        ALPHA,
        f'state["b1"] = state.get("b1", 1.0) * beta1{LINE}    '
        f'state["b2"] = state.get("b2", 1.0) * beta2{LINE}    '
        'alpha = alpha * (1 - state["b2"]) ** 0.5 / (1 - state["b1"])',
    ),
    "corrected moments with a corrected eps": (
        f"{ALPHA}\n                {CHANGE}",
        f"factor = (1 - beta2**t) ** 0.5{LINE}    "
        f'm, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t){LINE}    '
        f'p.data.sub_(alpha * m / (v.sqrt() + group["eps"] / factor)){LINE}'
        f"else:{LINE}    {CHANGE}",
    ),
}


@pytest.mark.parametrize("name", STYLES)
def test_a_right_solution_is_ok_in_every_style(name: str, tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "optimizer.py", *STYLES[name])
    assert (finding.status, finding.text) == ("ok", "")


def test_the_forms_of_torch_are_named_but_only_the_decay_is_a_mistake(tmp_path: Path) -> None:
    plain = (
        f'if group["correct_bias"]:\n                    {ALPHA}\n                {CHANGE}',
        f'm, v = state["m"], state["v"]{LINE}if group["correct_bias"]:'
        f"{LINE}    m, v = m / (1 - beta1**t), v / (1 - beta2**t){LINE}"
        'p.data = p.data - alpha * m / (v.sqrt() + group["eps"])',
    )
    finding = examine_with(PART, tmp_path, "optimizer.py", *plain)
    assert (finding.status, finding.mistake) == ("ok", "eps added after the bias correction")
    old = f"{plain[0]}\n                {DECAY}\n"
    new = f'{LINE}p.data.mul_(1 - group["lr"] * group["weight_decay"]){LINE}{plain[1]}\n'
    finding = examine_with(PART, tmp_path, "optimizer.py", old, new)
    assert (finding.status, finding.mistake) == ("mistake", "weight decay before the update")
    assert " Also: eps added after the bias correction" in finding.text
    new = new.replace('if group["correct_bias"]:', "if True:")
    finding = examine_with(PART, tmp_path, "optimizer.py", old, new)
    assert (finding.status, finding.mistake) == ("mistake", "weight decay before the update")
    assert " Also: eps added after the bias correction" in finding.text
    assert " Also: correct_bias=False has no effect" in finding.text


def test_two_mistakes_that_show_in_the_same_probes_are_both_named(tmp_path: Path) -> None:
    """The decay in the gradient goes through moments whose bias is corrected twice."""
    old = OPTIMIZER[OPTIMIZER.index(MOMENTS) : OPTIMIZER.index("        return loss")]
    lines = (
        'grad = grad + group["weight_decay"] * p.data',
        MOMENTS.strip(),
        'm, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)',
        'alpha = group["lr"]',
        f'if group["correct_bias"]:{LINE}    {ALPHA}',
        'p.data = p.data - alpha * m / (torch.sqrt(v) + group["eps"])',
    )
    finding = examine_with(PART, tmp_path, "optimizer.py", old, LINE.join(lines) + "\n")
    assert finding.status == "mistake"
    assert "bias corrected twice (both forms mixed)" in finding.text
    assert "weight decay inside the gradient (L2)" in finding.text


def test_moments_in_variables_and_an_option_that_is_not_read_are_both_named(
    tmp_path: Path,
) -> None:
    old = OPTIMIZER[OPTIMIZER.index(MOMENTS) : OPTIMIZER.index(DECAY)]
    lines = (
        'm = beta1 * state["m"] + (1 - beta1) * grad',
        'v = beta2 * state["v"] + (1 - beta2) * grad * grad',
        'alpha = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)',
        'p.data = p.data - alpha * m / (torch.sqrt(v) + group["eps"])',
    )
    new = "".join(f"{line}{LINE}" for line in lines)
    finding = examine_with(PART, tmp_path, "optimizer.py", old, new)
    assert (finding.status, finding.mistake) == ("mistake", "moments not kept between steps")
    assert "correct_bias=False has no effect" in finding.text


def test_the_course_s_own_test_accepts_the_plain_form() -> None:
    """The remark says so: 1,000 steps of the course's test stay within its tolerance."""

    def train(cls: type[torch.optim.Optimizer]) -> torch.Tensor:
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2, bias=False)
        optimizer = cls(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-6)  # type: ignore[call-arg]
        for _ in range(1000):
            optimizer.zero_grad()
            x = torch.from_numpy(rng.uniform(size=3)).float()
            (model(x) - torch.stack([x[0] + x[1], -x[2]])).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    assert torch.allclose(train(AdamW), train(torch.optim.AdamW), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("body", ["raise NotImplementedError()", "pass", "..."])
def test_what_is_not_written_is_todo(body: str, tmp_path: Path) -> None:
    start = OPTIMIZER.index("        for group in self.param_groups:")
    old = OPTIMIZER[start : OPTIMIZER.index("        return loss")]
    finding = examine_with(PART, tmp_path, "optimizer.py", old, f"        {body}\n")
    assert finding.status == "todo"


def test_the_loop_of_the_variants_is_right_as_it_stands() -> None:
    outcome = observe_seeded(PART, Loop)
    assert difference(outcome, expected_of(PART))[0] <= 1


def test_a_trajectory_is_the_recurrence_of_the_paper() -> None:
    """In float64 numbers, one element after the other."""
    found = trajectory(AdamW, steps=3, weight_decay=0.5)  # lr 0.1, betas (0.8, 0.9), eps 1e-6
    start = parameters(1)[0].detach().double().flatten()
    for index, value in enumerate(start.tolist()):
        m = v = 0.0
        for step in range(1, 4):
            gradient = normal(2, 3, seed=90 + 10 * step).flatten()[index].item()
            gradient += 0.5 if gradient > 0 else -0.5
            m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
            value -= 0.1 * (1 - 0.9**step) ** 0.5 / (1 - 0.8**step) * m / (v**0.5 + 1e-6)
            value -= 0.1 * 0.5 * value
            assert found[step - 1, 0].flatten()[index].item() == pytest.approx(value, abs=1e-6)
