"""The instructions that a warp of a large, aligned update issues: one way through its machine code.

The kernels have no loops, so a warp's way is decided by the branches it takes. That of a large
update moves whole 16-byte words, draws noise where the kernel can, and calls no subroutine (the
slow path of a square root, for values that are tiny, huge or not numbers). Of the ways that do so
the shortest counts: the others divide a block among small samples. Instructions that a predicate
switches off are issued all the same, and count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)"
    r"(?:\s+(?P<operands>[^;]*))?\s*;"
)
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    conditional: bool
    target: str | None
    """The label that a branch goes to."""


@dataclass(frozen=True)
class Way:
    """One way from an instruction to the end."""

    opcodes: tuple[str, ...] = ()
    roots: int = 0
    """Approximate reciprocal square roots, from which those of the noise are made."""

    def after(self, opcode: str) -> Way:
        return Way((opcode, *self.opcodes), self.roots + (opcode == "MUFU.RSQ"))

    @property
    def worth(self) -> tuple[int, int]:
        return self.roots, -len(self.opcodes)


def main_path(section: str, words: int = 3) -> Counter[str]:
    """Instructions of a warp by opcode with its modifiers.

    Args:
        section: nvdisasm's listing of one kernel.
        words: loads and stores of 16 bytes by a thread; three are the state, the model output and
            the next state.

    Raises:
        ValueError: no way through the kernel has as many words and no call.
    """
    instructions, labels = _parsed(section)
    # By the number of words that are yet to come. From the end, so that what follows is known.
    ways: list[dict[int, Way]] = [{} for _ in instructions]
    for position in reversed(range(len(instructions))):
        opcode = instructions[position].opcode
        following = [ways[i] for i in _followers(instructions, labels, position)]
        if opcode == "EXIT":
            following.append({0: Way()})
        wide = opcode.startswith(("LDG", "STG")) and ".128" in opcode
        for n, way in (pair for after in following for pair in after.items()):
            longer = way.after(opcode)
            known = ways[position].get(n + wide)
            if known is None or longer.worth > known.worth:
                ways[position][n + wide] = longer
    if words not in ways[0]:
        raise ValueError(
            f"words: expected as many as some way without a call has, {sorted(ways[0])}, "
            f"got {words}"
        )
    return Counter(ways[0][words].opcodes)


def _parsed(section: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            target = TARGET.search(found["operands"] or "") if found["opcode"] == "BRA" else None
            conditional = found["predicate"] is not None
            # A branch may have its condition among its operands.
            conditional |= target is not None and "," in found["operands"]
            instructions.append(
                Instruction(found["opcode"], conditional, target[1] if target else None)
            )
    return instructions, labels


def _followers(
    instructions: list[Instruction], labels: dict[str, int], position: int
) -> Iterator[int]:
    """Where a warp may be next; backward branches, which are of no use here, are left out."""
    here = instructions[position]
    if here.opcode.startswith(("CALL", "RET")):
        return
    if here.target is not None and labels[here.target] > position:
        yield labels[here.target]
    ends = here.opcode in ("EXIT", "BRA") and not here.conditional
    if not ends and position + 1 < len(instructions):
        yield position + 1
