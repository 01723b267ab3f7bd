"""What an operation allocates for a moment: the value that all workspaces are told in."""

from typing import NamedTuple


class Transient(NamedTuple):
    """Bytes that live only for a moment of an operation, when some of its outputs exist already."""

    outputs_made: int
    size_bytes: int


class Ledger:
    """The allocations and frees of one kernel in order, boiled down to the most it holds beside each output.

    A kernel that copies its input, makes its output, frees the copy and then takes scratch:

    >>> kernel = Ledger()
    >>> kernel.take(100)
    >>> kernel.make()
    >>> kernel.give(100)
    >>> kernel.take(30)
    >>> kernel.transients()
    [Transient(outputs_made=0, size_bytes=100), Transient(outputs_made=1, size_bytes=100)]
    """

    def __init__(self) -> None:
        self._held = 0
        self._most = [0]

    def take(self, *sizes_bytes: int) -> None:
        """Allocate."""
        self._held += sum(sizes_bytes)
        self._most[-1] = max(self._most[-1], self._held)

    def give(self, *sizes_bytes: int) -> None:
        """Free what was taken."""
        self._held -= sum(sizes_bytes)

    def pass_by(self, *sizes_bytes: int) -> None:
        """Allocate and free at once."""
        self.take(*sizes_bytes)
        self.give(*sizes_bytes)

    def make(self) -> None:
        """Allocate the next output."""
        self._most.append(self._held)

    def transients(self) -> list[Transient]:
        """What is held at the most beside each number of outputs, where it is anything."""
        return [Transient(made, most) for made, most in enumerate(self._most) if most]
