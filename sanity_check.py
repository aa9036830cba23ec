"""Check the whole model: compare the outputs of three models with recorded values.

Run as `uv run python sanity_check.py`; pytest collects it too.

- `stories42M.pt` is compared with the course's values. This check needs `stories42M.pt` and
  `sanity_check.data` (`uv run python data/download.py`) and is skipped without them.
- The other two need no download: a fixture, which is a small model whose weights come from a
  formula, and the demo's checkpoint. Their expected values were computed in float64 by Hugging Face
  transformers (for reference mode, its attention mask was switched off)
  (`tests/test_sanity_check.py` computes them again).

With `--of FOLDER` it examines another implementation of the assignment instead, and names its
mistakes (`beyond/classroom/`).
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from base_llama import TIED_NAMES, load_strictly
from config import LlamaConfig
from llama import Llama, load_pretrained

ROOT = Path(__file__).parent
CHECKPOINT = ROOT / "stories42M.pt"
EXPECTED = ROOT / "sanity_check.data"
DEMO = ROOT / "data" / "demo" / "model.pt"

# The input for which the course computed its expected values, padded with zeros.
COURSE_TOKENS = [
    [101, 7592, 2088, 102, 0, 0, 0, 0],
    [101, 7592, 15756, 2897, 2005, 17953, 2361, 102],
]

FIXTURE_SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 3,
    "max_seq_len": 16,
}
FIXTURE_TOKENS = [[1, 17, 42, 5, 3, 3, 3], [1, 17, 8, 33, 60, 29, 11]]
# [causal][row]: the first four logits of the last position.
FIXTURE_LOGITS = {
    False: [
        [-0.06994163, 0.01927613, 0.08887733, 0.11090051],
        [-0.06956289, 0.17932957, 0.08556286, -0.01982632],
    ],
    True: [
        [-0.1190341, 0.02081456, 0.1214492, 0.0578618],
        [-0.12631614, 0.10798161, 0.05284951, -0.03745925],
    ],
}
# [causal][row]: the first four hidden features of position 0, then those of position 3.
FIXTURE_HIDDEN = {
    False: [
        [
            [-0.0706862, 0.2379398, 1.0243219, 0.3199403],
            [1.7414636, -0.6934957, -0.7089294, -0.95122],
        ],
        [
            [-0.7768269, -0.8313452, 1.2265077, -0.0500813],
            [0.2183163, -1.8010262, 1.1540708, -1.4100864],
        ],
    ],
    True: [
        [
            [0.2775556, -0.0332101, 1.273598, 0.2987068],
            [0.898402, -0.2650512, -0.0497623, -1.0196066],
        ],
        [
            [0.2775556, -0.0332101, 1.273598, 0.2987068],
            [0.4772367, -0.3815128, 0.2683185, -0.1815111],
        ],
    ],
}
DEMO_TOKENS = [[1, 17, 2042, 85, 33, 3, 3], [1, 17, 8, 1033, 4060, 299, 11]]
# [causal][row], as FIXTURE_LOGITS.
DEMO_LOGITS = {
    False: [
        [-4.0678446, -1.2820901, -3.9554909, -4.0716313],
        [-2.9528095, -2.7995538, -2.9025954, -2.9228706],
    ],
    True: [
        [-4.1056921, -1.8665734, -3.9843141, -4.1335841],
        [-3.5443678, -3.6424676, -3.4366177, -3.5520457],
    ],
}
# [causal][row], as FIXTURE_HIDDEN.
DEMO_HIDDEN = {
    False: [
        [
            [2.8689742, -0.7154799, 0.7704188, -1.2080318],
            [0.935253, -1.3484704, -2.5592916, 0.8983001],
        ],
        [
            [2.5199684, -0.44288, 0.9868009, -1.098041],
            [3.9512028, -2.0281418, -2.5533222, 0.7887089],
        ],
    ],
    True: [
        [
            [1.9229106, -0.6757583, 0.9899981, -0.4731984],
            [0.6453616, -1.2597924, -1.7650149, 0.2918926],
        ],
        [
            [1.9229106, -0.6757583, 0.9899981, -0.4731984],
            [3.3776141, -3.2978565, -2.7987271, 1.0582597],
        ],
    ],
}


def fixture_weights(model: Llama) -> dict[str, Tensor]:
    """Compute weights for the model that look random and are the same on every machine."""
    weights = {}
    for seed, (name, tensor) in enumerate(sorted(model.state_dict().items()), start=1):
        index = torch.arange(1, tensor.numel() + 1)
        # A quadratic polynomial modulo a prime: integers, so it is exact on every machine.
        noise = ((index * index * 7919 + index * 10473 * seed) % 65521) / 32760.5 - 1  # in [-1, 1]
        # Embeddings are small, so that RMSNorm's eps matters; matrices neither shrink nor grow
        # their input much.
        scale = 0.02 if name in TIED_NAMES else 0.25
        weights[name] = (1 + noise / 4 if tensor.dim() == 1 else scale * noise).view(tensor.shape)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    return weights


def fixture_model(causal: bool) -> Llama:
    """Build the fixture, in eval mode."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(**FIXTURE_SHAPE, causal=causal))
    load_strictly(model, fixture_weights(model), "fixture")
    model.tie_weights()
    return model.eval()


def excerpt(logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part of a model's output that is compared: logits (2, 4), hidden (2, 2, 4)."""
    return logits[:, -1, :4], hidden[:, [0, 3], :4]


@torch.inference_mode()
def test_fixture() -> None:
    """Compare the fixture in both modes with the recorded values."""
    for causal in (False, True):
        model = fixture_model(causal)
        logits, hidden = excerpt(*model(torch.tensor(FIXTURE_TOKENS)))
        # float32 against float64: after two layers, hidden values of about 1 differ by less than
        # 2e-6, and logits of about 0.1 by less
        torch.testing.assert_close(hidden, torch.tensor(FIXTURE_HIDDEN[causal]), rtol=0, atol=5e-6)
        torch.testing.assert_close(logits, torch.tensor(FIXTURE_LOGITS[causal]), rtol=0, atol=1e-6)


@torch.inference_mode()
def test_demo() -> None:
    """Load the demo's checkpoint and compare it in both modes with the recorded values."""
    for causal in (False, True):
        model = load_pretrained(DEMO, causal)
        logits, hidden = excerpt(*model(torch.tensor(DEMO_TOKENS)))
        # float32 against float64: after six layers, values of up to 5 differ by less than 5e-6
        torch.testing.assert_close(hidden, torch.tensor(DEMO_HIDDEN[causal]), rtol=0, atol=2e-5)
        torch.testing.assert_close(logits, torch.tensor(DEMO_LOGITS[causal]), rtol=0, atol=2e-5)


def test_course_values() -> None:
    """Compare stories42M.pt in reference mode with sanity_check.data, at the course's tolerance."""
    missing = [path.name for path in (CHECKPOINT, EXPECTED) if not path.exists()]
    if missing:
        raise SkipTest(
            f"The course's values were not checked, because files are missing: "
            f"{', '.join(missing)}. Download them with `uv run python data/download.py`."
        )
    expected = torch.load(EXPECTED, map_location="cpu", weights_only=True)
    with torch.inference_mode():
        logits, hidden = load_pretrained(CHECKPOINT, causal=False)(torch.tensor(COURSE_TOKENS))
    torch.testing.assert_close(hidden, expected["hidden_states"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-3)


def main() -> None:
    test_fixture()
    print("The fixture's outputs match the values of Hugging Face transformers in both modes.")
    test_demo()
    print("The demo's outputs match the values of Hugging Face transformers in both modes.")
    try:
        test_course_values()
    except SkipTest as skipped:
        print(skipped)
    else:
        print(
            "The outputs of stories42M.pt match the course's sanity_check.data. "
            "Your Llama implementation is correct!"
        )


if __name__ == "__main__":
    if sys.argv[1:]:  # --of FOLDER, --help, or a mistake
        sys.exit(import_module("beyond.classroom.report").main())
    main()
