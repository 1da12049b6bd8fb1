"""Which blocks of a pool are in use, by how many rows, and what full ones hold.

Kwon et al. 2023 (PagedAttention), https://arxiv.org/abs/2309.06180: a row's tokens lie in blocks
anywhere in the pool; rows that begin alike read the same full blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

Content = tuple[int, tuple[int, ...]]  # the block before it (-1: none), and its own tokens


class BlockPool:
    """Blocks 0 to `blocks` - 1 of one part of the batch, by number alone: no array.

    Attributes:
      block: tokens of a block.
    """

    def __init__(self, blocks: int, block: int) -> None:
        self.block, self.blocks = block, blocks
        self._free = list(range(blocks))[::-1]
        self._users: dict[int, int] = {}
        self._holding: dict[Content, int] = {}
        self._content: dict[int, Content] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that somebody uses."""
        return len(self._users)

    def users(self, number: int) -> int:
        """How many use a block."""
        return self._users.get(number, 0)

    def needed(self, tokens: int) -> int:
        """Blocks of a row of so many tokens."""
        return -(-tokens // self.block)

    def take(self) -> int:
        """A block of one's own; there must be a free one."""
        number = self._free.pop()
        self._users[number] = 1
        return number

    def release(self, number: int) -> None:
        """One user less; without any, the block is free."""
        self._users[number] -= 1
        if not self._users[number]:
            del self._users[number]
            content = self._content.pop(number, None)
            if content is not None:
                del self._holding[content]
            self._free.append(number)

    def use(self, number: int) -> None:
        """One user more of a block."""
        self._users[number] += 1

    def holding(self, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the beginning of these tokens.

        The last token is never in them: what follows it must be computed.
        """
        found: list[int] = []
        for start in range(0, len(tokens) - self.block, self.block):
            before = found[-1] if found else -1
            number = self._holding.get((before, tuple(tokens[start : start + self.block])))
            if number is None:
                break
            found.append(number)
        return found

    def hold(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        """Says what a row's full blocks hold, for rows that begin alike."""
        before = -1
        for number, start in zip(numbers, range(0, len(tokens), self.block), strict=False):
            content = (before, tuple(tokens[start : start + self.block]))
            if len(content[1]) < self.block:
                return
            other = self._holding.setdefault(content, number)
            if other != number:
                return  # the same text twice: who begins so shares the first one's
            self._content[number] = content
            before = number
