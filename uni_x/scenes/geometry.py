"""Which side of a box another one lies on, by the rule of GenEval."""

from math import hypot

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def directions(box: Box, other: Box) -> tuple[str, ...]:
    """The relations in which `box` stands to `other`: none, one or two of left of, right of, above, below.

    The distance of the centres counts from a margin of a tenth of both sizes on, and a direction holds where
    it makes up more than half of the raw distance (`relative_position` of djghosh13/geneval).
    """
    offsets, revised = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box[low] + box[high] - other[low] - other[high]) / 2
        margin = 0.1 * (abs(box[high] - box[low]) + abs(other[high] - other[low]))
        offsets.append(offset)
        revised.append(max(abs(offset) - margin, 0.0) * (1 if offset > 0 else -1))
    if max(map(abs, revised)) < 1e-3:
        return ()
    x, y = (part / hypot(*offsets) for part in revised)
    held = (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
    return tuple(relation for relation, holds in held if holds)
