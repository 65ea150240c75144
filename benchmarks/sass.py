"""Reads what the assembler made of a CUDA kernel: instructions with their control words, loops, and the cheapest way
through a loop.

The control word of an instruction (volta and later, 128-bit encoding) holds the cycles that the scheduler must wait
after it before the same warp issues again; memory, matrix and special-function results are waited for by barriers
instead. The sum of these *stall cycles* over a loop is the least time in which a lone warp can run it.
Source of the encoding: Jia et al. 2018, "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", section
2.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_HIGH = re.compile(r"/\* 0x([0-9a-f]{16}) \*/\s*$")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_CALL_COST = 200
"""Instructions that a call counts for when a way is chosen: calls are slow paths, of divisions for example."""

MATRIX = ("HGMMA", "HMMA", "QGMMA", "UTCHMMA")
GLOBAL = ("LDG", "LDGSTS", "STG", "UTMALDG", "UBLKCP", "RED", "ATOM", "ATOMG")
SHARED = ("LDS", "LDSM", "STS", "STSM", "ATOMS")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction of a kernel."""

    address: int
    text: str
    """With its predicate."""
    name: str
    """``LDG.E.64``."""
    stall: int
    """Cycles before the warp's next instruction, 0 to 15."""

    @property
    def family(self) -> str:
        """``LDG``."""
        return self.name.split(".")[0]

    @property
    def is_predicated(self) -> bool:
        """Whether some or all threads may skip it."""
        return self.text.startswith("@") and not self.text.startswith(("@PT", "@UPT"))

    @property
    def bytes(self) -> int:
        """Of a thread's access to memory."""
        return next((_WIDTH[part] for part in self.name.split(".")[1:] if part in _WIDTH), 4)


def disassemble(cuobjdump: str, cubin: Path) -> dict[str, list[Instruction]]:
    """Mangled name -> instructions of every kernel of a cubin."""
    text = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {name: parse(body) for name, body in functions(text)}


def functions(text: str) -> Iterable[tuple[str, str]]:
    """(name, body) of every function in the output of ``cuobjdump -sass``."""
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), body


def parse(body: str) -> list[Instruction]:
    """The instructions of one function: two lines each, the second one with the upper half of the encoding."""
    found = []
    lines = body.splitlines()
    for line, after in pairwise(lines):
        match, high = _LINE.match(line), _HIGH.search(after)
        if match is None or high is None:
            continue
        text = match[2]
        name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        stall = int(high[1], 16) >> 41 & 15
        found.append(Instruction(address=int(match[1], 16), text=text, name=name, stall=stall))
    return found


@dataclass(kw_only=True)
class Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    followers: list[int] = field(default_factory=list)
    """Addresses of the blocks that may run next."""

    @property
    def address(self) -> int:
        return self.instructions[0].address


def blocks_of(code: list[Instruction]) -> dict[int, Block]:
    """The control-flow graph; a call returns to the next instruction."""
    targets = {code[0].address} if code else set()
    for instruction, after in zip(code, [*code[1:], None], strict=True):
        if is_jump(instruction):
            targets |= {target for target in [target_of(instruction)] if target is not None}
            if after is not None:
                targets.add(after.address)
    blocks: dict[int, Block] = {}
    current: list[Instruction] = []
    for instruction in code:
        if instruction.address in targets and current:
            blocks[current[0].address] = Block(instructions=current)
            current = []
        current.append(instruction)
    if current:
        blocks[current[0].address] = Block(instructions=current)
    order = list(blocks.values())
    for block, after in zip(order, [*order[1:], None], strict=True):
        last = block.instructions[-1]
        target = target_of(last) if is_jump(last) else None
        ends = last.family in ("EXIT", "RET", "BRX", "BPT") or (last.family == "BRA" and not is_conditional(last))
        if not (ends and not last.is_predicated) and after is not None:
            block.followers.append(after.address)
        if target is not None and target in blocks:
            block.followers.append(target)
    return blocks


def is_jump(instruction: Instruction) -> bool:
    return instruction.family in ("BRA", "EXIT", "RET", "BRX", "BPT")


def is_conditional(instruction: Instruction) -> bool:
    """Whether a branch may fall through: by its predicate, or by one among its operands (``BRA P1, 0x40``)."""
    return instruction.is_predicated or bool(re.search(r"BRA\S*\s+(!?U?P\d|~?URZ|UR\d|R\d)", instruction.text))


def target_of(instruction: Instruction) -> int | None:
    """Where a branch goes."""
    match = _TARGET.search(instruction.text.replace("`", "")) if instruction.family == "BRA" else None
    return int(match[1], 16) if match else None


@dataclass(kw_only=True)
class Loop:
    """A loop of a kernel."""

    head: int
    """Address of the block that every round starts with."""
    members: set[int]
    """Addresses of its blocks, inner loops included."""
    depth: int
    """1 for an outermost loop."""
    has_inner: bool = False

    def code(self, blocks: dict[int, Block]) -> list[Instruction]:
        """All instructions of its blocks."""
        return [i for address in sorted(self.members) for i in blocks[address].instructions]


def loops_of(blocks: dict[int, Block]) -> list[Loop]:
    """All loops, outer ones first: strongly connected parts, then those that are left without the edges to the head."""
    found: list[Loop] = []

    def search(members: set[int], cut: set[tuple[int, int]], depth: int, parent: Loop | None) -> None:
        for part in _components(blocks, members, cut):
            entered = {b for a, block in blocks.items() if a not in part for b in block.followers if b in part}
            head = min(entered or part)
            loop = Loop(head=head, members=part, depth=depth)
            found.append(loop)
            if parent is not None:
                parent.has_inner = True
            inner_cut = cut | {(a, head) for a in part if head in blocks[a].followers}
            search(part, inner_cut, depth + 1, loop)

    search(set(blocks), set(), 1, None)
    return found


def _components(blocks: dict[int, Block], members: set[int], cut: set[tuple[int, int]]) -> list[set[int]]:
    """Strongly connected parts that hold a cycle (Tarjan 1972, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    parts: list[set[int]] = []

    def followers(a: int) -> list[int]:
        return [b for b in blocks[a].followers if b in members and (a, b) not in cut]

    for root in sorted(members):
        if root in index:
            continue
        work = [(root, iter(followers(root)))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for b in rest:
                if b not in index:
                    index[b] = low[b] = len(index)
                    stack.append(b)
                    on_stack.add(b)
                    work.append((b, iter(followers(b))))
                    break
                if b in on_stack:
                    low[node] = min(low[node], index[b])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part: set[int] = set()
                    while node not in part:
                        part.add(stack.pop())
                    on_stack -= part
                    if len(part) > 1 or node in followers(node):
                        parts.append(part)
    return parts


def way_through(
    blocks: dict[int, Block],
    loop: Loop,
    loops: list[Loop],
    *,
    needs: Mapping[str, int] | None = None,
    avoids: str | None = None,
) -> list[Instruction]:
    """The instructions of one round of a loop: of the ways from its head back to it that do most of what is needed, and
    among these access global memory and matrix units most, the one with the fewest instructions. Inner loops run once.

    Rare work, such as rescaling, waiting, the last tile's mask or the slow path of a division, lies beside that way.

    Args:
        needs: regular expression of an instruction's text -> how many a round needs; more count for nothing.
        avoids: regular expression of instructions that are on no such way: those of another case of the kernel.

    Returns:
        The instructions, none where every way has one to avoid.
    """
    refused = {
        address
        for address in loop.members
        if avoids is not None and any(re.search(avoids, i.text) for i in blocks[address].instructions)
    }
    patterns = [(re.compile(pattern), most) for pattern, most in (needs or {}).items()]
    cut = {
        (a, inner.head)
        for inner in loops
        if inner.members <= loop.members
        for a in inner.members
        if inner.head in blocks[a].followers
    }

    def add(way: _Way, address: int, known: frozenset[tuple[str, bool]]) -> _Way:
        code = blocks[address].instructions
        written = {predicate for i in code for predicate in predicates_written(i)}
        done = tuple(
            min(most, had + sum(bool(pattern.search(i.text)) for i in code))
            for had, (pattern, most) in zip(way.done, patterns, strict=True)
        )
        return _Way(
            marks=way.marks + sum(i.family in MATRIX or i.family in GLOBAL for i in code),
            done=done,
            known=frozenset(pair for pair in known if pair[0] not in written),
            cost=way.cost + sum(_CALL_COST if i.family == "CALL" else 1 for i in code),
            last=address,
            before=way,
        )

    nothing: frozenset[tuple[str, bool]] = frozenset()
    start = _Way(marks=0, done=(0,) * len(patterns), known=nothing, cost=0, last=-1, before=None)
    first = add(start, loop.head, nothing)
    ways: dict[int, dict[Any, _Way]] = {loop.head: {(first.done, first.known): first}}
    ends: list[_Way] = []
    for a in _topological(blocks, loop, cut):
        for way in list(ways.get(a, {}).values()):
            for b in blocks[a].followers:
                known = _after_branch(blocks[a], b, way.known)
                if known is None:
                    continue
                if b == loop.head:
                    ends.append(way)
                elif b in loop.members and b not in refused and (a, b) not in cut:
                    longer = add(way, b, known)
                    rival = ways.setdefault(b, {}).get((longer.done, longer.known))
                    if rival is None or longer.rank() > rival.rank():
                        ways[b][longer.done, longer.known] = longer
    best: _Way | None = max(ends, key=_Way.rank, default=None)
    addresses = []
    while best is not None and best.last >= 0:
        addresses.append(best.last)
        best = best.before
    return [instruction for address in reversed(addresses) for instruction in blocks[address].instructions]


@dataclass(kw_only=True)
class _Way:
    """A way from the head of a loop to the end of a block."""

    marks: int
    done: tuple[int, ...]
    known: frozenset[tuple[str, bool]]
    """Values of predicates that branches on the way have settled: two branches on one predicate agree."""
    cost: int
    last: int
    before: "_Way | None"

    def rank(self) -> tuple[int, int, int]:
        return sum(self.done), self.marks, -self.cost


def _after_branch(
    block: Block, follower: int, known: frozenset[tuple[str, bool]]
) -> frozenset[tuple[str, bool]] | None:
    """What is known of predicates once ``follower`` runs after ``block``; None where that contradicts what was."""
    last = block.instructions[-1]
    guard = re.match(r"@(!?)(U?P\d)\s", last.text)
    if guard is None or last.family != "BRA" or len(set(block.followers)) < 2:
        return known
    value = (follower == target_of(last)) == (guard[1] == "")
    return None if (guard[2], not value) in known else known | {(guard[2], value)}


def predicates_written(instruction: Instruction) -> list[str]:
    """``P0`` of ``ISETP.EQ P0, PT, R1, R2, PT`` and of ``IADD3 R3, P0, R1, R2, RZ``: the first operands, or those after
    the first register."""
    words = re.sub(r"^@!?U?P\w+\s+", "", instruction.text).split(None, 1)
    operands = [operand.strip() for operand in words[1].split(",")] if len(words) > 1 else []
    if instruction.family in ("R2P", "R2UP"):
        return [f"{kind}P{n}" for kind in ("", "U") for n in range(8)]
    if instruction.family == "BRA":
        return []
    if operands and re.fullmatch(r"U?R(\d+|Z)(\.\w+)*", operands[0]):
        operands = operands[1:]
    return list(takewhile(lambda operand: re.fullmatch(r"U?P[\dT]", operand), operands))


def _topological(blocks: dict[int, Block], loop: Loop, cut: set[tuple[int, int]]) -> list[int]:
    """Blocks of a loop in an order in which every edge that is not cut goes forward."""
    done: set[int] = set()
    order: list[int] = []
    work: list[tuple[int, bool]] = [(loop.head, False)]
    while work:
        a, finished = work.pop()
        if finished:
            order.append(a)
        elif a not in done:
            done.add(a)
            work.append((a, True))
            work += [
                (b, False) for b in blocks[a].followers if b in loop.members and (a, b) not in cut and b not in done
            ]
    return order[::-1]


@dataclass(kw_only=True)
class Cost:
    """What instructions cost a warp."""

    instructions: int
    stall_cycles: int
    mufu: int
    """Exponentials, logarithms, reciprocals: 16 lanes a cycle and multiprocessor."""
    matrix: int
    shared: int
    global_: int
    loaded_bytes: int
    """Of a thread, from global memory; predicated accesses count."""
    stored_bytes: int
    families: dict[str, int]

    @property
    def global_bytes(self) -> int:
        return self.loaded_bytes + self.stored_bytes

    def counts(self) -> dict[str, int]:
        """What reports list."""
        return {
            "instructions": self.instructions,
            "stall_cycles": self.stall_cycles,
            "mufu": self.mufu,
            "matrix": self.matrix,
            "shared": self.shared,
            "global": self.global_,
        }

    @classmethod
    def of(cls, code: list[Instruction]) -> "Cost":
        families = Counter(i.family for i in code)
        return cls(
            instructions=len(code),
            stall_cycles=sum(i.stall for i in code),
            mufu=families["MUFU"],
            matrix=sum(families[name] for name in MATRIX),
            shared=sum(families[name] for name in SHARED),
            global_=sum(families[name] for name in GLOBAL),
            loaded_bytes=sum(i.bytes for i in code if i.family in ("LDG", "LDGSTS")),
            stored_bytes=sum(i.bytes for i in code if i.family == "STG"),
            families=dict(families.most_common()),
        )
