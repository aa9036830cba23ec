"""The parts of the assignment, in the order in which a student builds them."""

from beyond.classroom.part import Part
from beyond.classroom.parts import (
    adamw,
    attention,
    classifier,
    feed_forward,
    generate,
    layer,
    loading,
    model,
    norm,
    rope,
    scores,
    zero_shot,
)

PARTS: tuple[Part, ...] = (
    rope.PART,
    norm.PART,
    scores.PART,
    attention.PART,
    feed_forward.PART,
    layer.PART,
    model.PART,
    generate.PART,
    adamw.PART,
    zero_shot.PART,
    classifier.PART,
    loading.PART,
)
