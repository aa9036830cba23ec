"""The parts of the assignment, in the order in which a student builds them."""

from beyond.classroom.part import Part
from beyond.classroom.parts import attention, feed_forward, layer, model, norm, rope, scores

PARTS: tuple[Part, ...] = (
    rope.PART,
    norm.PART,
    scores.PART,
    attention.PART,
    feed_forward.PART,
    layer.PART,
    model.PART,
)
