"""What a msgpack body would cost, before any of it is unpacked.

Problem: one byte of msgpack becomes 56 bytes of Python (an empty list), and an array's header alone makes the unpacker
allocate for as many entries as it announces; a body of the largest frame that we accept could so grow to gigabytes. A
limit on each array does not help, for arrays nest. So all objects of a body are counted first, by their headers,
without making one of them; a kind that carries few objects may have few, however many bytes it may have.

Source: the msgpack specification, table of formats.
"""

from __future__ import annotations

from typing import Final

# How a tag is followed: (bytes in all, objects inside) when the tag alone says so ...
_FIXED: Final[dict[int, tuple[int, int]]] = {
    **dict.fromkeys([*range(128), 192, 194, 195, *range(224, 256)], (1, 0)),
    **{tag: (1, 2 * (tag & 0x0F)) for tag in range(0x80, 0x90)},  # map
    **{tag: (1, tag & 0x0F) for tag in range(0x90, 0xA0)},  # array
    **{tag: (1 + (tag & 0x1F), 0) for tag in range(0xA0, 0xC0)},  # text
    **{tag: (size, 0) for size, tags in {2: (0xCC, 0xD0), 3: (0xCD, 0xD1)}.items() for tag in tags},
    **{tag: (size, 0) for size, tags in {5: (0xCA, 0xCE, 0xD2), 9: (0xCB, 0xCF, 0xD3)}.items() for tag in tags},
}
# ... else (bytes of its length field, bytes for each unit of the length, objects for each).
_COUNTED: Final[dict[int, tuple[int, int, int]]] = {
    **dict.fromkeys((0xC4, 0xD9), (1, 1, 0)),  # bytes and text
    **dict.fromkeys((0xC5, 0xDA), (2, 1, 0)),
    **dict.fromkeys((0xC6, 0xDB), (4, 1, 0)),
    0xDC: (2, 0, 1),  # array
    0xDD: (4, 0, 1),
    0xDE: (2, 0, 2),  # map
    0xDF: (4, 0, 2),
}


def check_shape(body: bytes, max_objects: int) -> None:
    """Raise ValueError unless *body* is whole msgpack objects, one outermost, of at most *max_objects* in all.

    Extension types count as malformed. An announced length is believed only as far as there are bytes for it.
    """
    position, seen, due, size = 0, 0, 1, len(body)
    while due:
        seen += 1
        if seen + due - 1 > max_objects:
            raise ValueError(f"more than {max_objects} objects")
        # Every object has a byte at least.
        if due > size - position:
            raise ValueError("cut off")
        # Nearly all objects are of those; a call for each would cost as much as all the rest.
        step, inside = _FIXED.get(body[position]) or _step(body, position)
        position += step
        due += inside - 1
    if position != size:
        raise ValueError("cut off" if position > size else "bytes after the end")


def _step(body: bytes, position: int) -> tuple[int, int]:
    """How long the object at *position*, none of the `_FIXED`, is without those inside it, and how many are inside."""
    tag = body[position]
    if tag not in _COUNTED:
        raise ValueError(f"format {tag:#x}, which is none of ours")
    width, bytes_each, objects_each = _COUNTED[tag]
    length = int.from_bytes(body[position + 1 : position + 1 + width], "big")
    return 1 + width + length * bytes_each, length * objects_each
