"""The parts of the assignment, in the order in which a student builds them."""

from beyond.classroom.part import Part
from beyond.classroom.parts import norm, rope

PARTS: tuple[Part, ...] = (rope.PART, norm.PART)
