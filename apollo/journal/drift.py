"""How far a generation's weights are from its parent's, as far as its segment's headers tell.

segment's index -> the first bytes of each delta -> how many elements changed, of how many
"""

from typing import NamedTuple

from apollo.journal import codec
from apollo.journal.journal import Journal


class Changes(NamedTuple):
    """Of all elements."""

    num_elements: int
    num_changed: int
    """Of a chunk of which most changed, all are counted."""
    num_tensors: int
    """Tensors of which something changed."""


def changes(journal: Journal, generation: int) -> Changes:
    """What changed from the generation's parent to it. Raises SegmentDamaged, CorruptDelta.

    Reads a few bytes for every chunk that changed.
    """
    segment, chunks = journal.values.segment(generation), journal.image.chunks
    num_changed = sum(
        codec.num_changed(journal.disk.read(segment.path, delta.offset, codec.HEADER_BYTES))
        for delta in segment.deltas.values()
    )
    num_elements = sum(chunk.num_words for chunk in chunks)
    return Changes(num_elements, num_changed, len({chunks[at].tensor for at in segment.deltas}))
