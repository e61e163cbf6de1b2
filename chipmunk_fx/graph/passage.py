"""How caches that lie on the host reach the device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """The two lanes of one site.

    A lane is a buffer on the device and the stream that copies to and from it. Sites of one layout take turns on two lanes,
    `early`, so that one is filled while the other's site is at work. Lists, a fourth of what an attention keeps, are soon
    there: a layout has one lane for them, `late`, filled once the site before is done.
    """

    early: int
    late: int

    @classmethod
    def of(cls, layout: int, turn: int) -> "Passage":
        return cls(3 * layout + turn % 2, 3 * layout + 2)

    def lane(self, slot: str) -> int:
        return self.late if slot == "lists" else self.early
