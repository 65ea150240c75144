"""Registers of warpgroup products in flight, in machine code: nothing else may touch them before they are waited for.

``wgmma`` reads its left factor from registers and adds to registers while the warp goes on (PTX ISA 8.0, 9.7.15.7).
The source waits for both, but the compiler may move register arithmetic past an ``asm volatile``: only the machine code
shows that it did not. Neither the emulation nor a compiler warning does.
"""

import re

from benchmarks.sass import Instruction, blocks_of

Group = frozenset[tuple[int, bool]]
"""(register, whether products write it) of the products committed together."""
_REGISTER = re.compile(r"\bR(\d+)(?:\.(?:64|128))?\b")
_SHAPE = re.compile(r"HGMMA\.64x(\d+)x16")


def early_accesses(code: list[Instruction]) -> list[str]:
    """Instructions that touch sums of pending products, or write their left factor, on any way through a kernel.

    Only the first register of a wider operand is looked at.
    """
    blocks = blocks_of(code)
    start: tuple[int, tuple[Group, ...], Group] = (code[0].address, (), frozenset())
    ways, seen, found = [start], {start}, dict[int, str]()
    while ways:
        address, pending, opened = ways.pop()
        for instruction in blocks[address].instructions:
            if instruction.family == "HGMMA":
                opened |= _registers_of(instruction)
                if "gsb0" in instruction.text:
                    pending, opened = (*pending, opened), frozenset()
            elif instruction.name.startswith("WARPGROUP.DEPBAR"):
                most = int(instruction.text.rsplit(",", 1)[1], 16)
                pending = pending[len(pending) - most :] if most < len(pending) else pending
            else:
                busy = opened.union(*pending)
                for position, match in enumerate(_REGISTER.finditer(instruction.text)):
                    register = int(match[1])
                    writes = position == 0 and not instruction.family.startswith(("ST", "RED", "SYNCS", "BAR"))
                    if (register, True) in busy or (writes and (register, False) in busy):
                        found[instruction.address] = f"{instruction.address:#x} {instruction.text}"
        for follower in blocks[address].followers:
            way = (follower, pending, opened)
            if way not in seen:
                seen.add(way)
                ways.append(way)
    return [found[address] for address in sorted(found)]


def _registers_of(product: Instruction) -> Group:
    shape = _SHAPE.search(product.name)
    operands = [word.strip() for word in product.text.partition(product.name)[2].split(",")]
    assert shape is not None, product.text
    first = int(operands[0].removeprefix("R"))
    sums = {(register, True) for register in range(first, first + int(shape[1]) // 2)}
    left = re.fullmatch(r"R(\d+)", operands[1])
    return frozenset(sums | ({(int(left[1]) + i, False) for i in range(4)} if left else set()))
