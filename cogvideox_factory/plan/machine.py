"""The machine a run is planned for: cards, what each holds, what each can do."""

from dataclasses import dataclass

from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.plan.peaks import Peak, find_peak

_GIB = {
    "B200": 180, "GH200": 96, "H200": 141, "H100": 80, "H100 PCIe": 80, "H100 NVL": 94, "H800": 80, "H20": 96,
    "A100": 80, "A800": 80, "A40": 48, "A30": 24, "L40S": 48, "L40": 48, "L4": 24, "RTX 6000 Ada": 48, "RTX A6000": 48,
    "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24, "V100": 32, "Ascend910B2": 64, "Ascend910B3": 64,
    "Ascend910B4": 32,
}  # fmt: skip
"""Memory of a card as it is sold, the larger where there are two."""

_KEPT = 0.06
"""Share of a card's memory that drivers, communication and the allocator's gaps keep: an assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Cards of one kind."""

    card: str
    cards: int
    memory: int
    """Bytes of one card that a run may fill."""
    peak: Peak | None

    @classmethod
    def of(cls, card: str, *, cards: int = 1, memory_gib: float | None = None) -> "Machine":
        """Return `cards` cards called `card`, with the memory they are sold with unless it is given.

        Raises:
            FactoryError: a card that is not known, without its memory.
        """
        known = next((name for name in _GIB if name.lower() == card.lower()), None)
        if known is None and memory_gib is None:
            raise FactoryError(
                f"card {card!r} is not known{nearest(card, list(_GIB))}; give its memory as well (--memory-gib), or "
                f"one of: {', '.join(_GIB)}"
            )
        name = known or card
        gib = memory_gib if memory_gib is not None else _GIB[name]
        return cls(card=name, cards=cards, memory=int(gib * (1 - _KEPT) * 2**30), peak=find_peak(name))
