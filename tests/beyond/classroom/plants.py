"""All mistakes that are planted in copies; the evidence for what the checker finds."""

from tests.beyond.classroom import plants_attention, plants_llama, plants_norm, plants_rope
from tests.beyond.classroom.planting import Plant

PLANTS: tuple[Plant, ...] = (
    *plants_rope.PLANTS,
    *plants_norm.PLANTS,
    *plants_attention.PLANTS,
    *plants_llama.PLANTS,
)
