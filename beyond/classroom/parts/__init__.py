"""The parts of the assignment, in the order in which a student builds them."""

from beyond.classroom.part import Part

PARTS: tuple[Part, ...] = ()
