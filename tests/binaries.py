"""What a compiled GPU kernel asks of a device, read from its binary: registers, spilled bytes and shared memory."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

REGISTERS, FRAME = 0x2F, 0x11  # attributes of .nv.info: registers a thread, and bytes of its frame in local memory
SIZED = 0x04  # the format of both: two bytes of size, then (symbol, value)


class Needs(NamedTuple):
    """Registers a thread, bytes a thread in local memory, and bytes of shared memory a block."""

    registers: int
    local: int
    shared: int


def needs(kernel: Any) -> Needs:
    """Return the needs of a kernel that Triton compiled, for NVIDIA from the cubin and for AMD from its metadata."""
    if "cubin" in kernel.asm:
        found = dict(_attributes(kernel.asm["cubin"]))
        return Needs(found[REGISTERS], found.get(FRAME, 0), kernel.metadata.shared)

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", kernel.asm["amdgcn"])[-1])

    local = number("private_segment_fixed_size") + 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return Needs(number("vgpr_count"), local, number("group_segment_fixed_size"))


def _attributes(elf: bytes) -> Iterator[tuple[int, int]]:
    """The (attribute, value) pairs of the section .nv.info of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        if elf[start : elf.index(b"\0", start)] != b".nv.info":
            continue
        at = offset
        while at < offset + length:
            form, attribute, number = struct.unpack_from("<BBH", elf, at)
            at += 4
            if form != SIZED:
                continue
            if attribute in (REGISTERS, FRAME):
                yield attribute, struct.unpack_from("<I", elf, at + 4)[0]
            at += number
