"""What cards could do at most: dense matrix products, as their makers state it. MFU is measured against this.

Sparse figures (twice these) and boost clocks are left out. Half precision accumulates in float32, as training does: on
GeForce cards that is half of the figure in the advertisement. Sources: NVIDIA's data sheets and architecture white
papers; for Ascend 910B the figures in common use, as no data sheet is public.
"""

from typing import NamedTuple


class Peak(NamedTuple):
    """TFLOP/s of one card, dense; None where there is no unit for it or no figure."""

    name: str
    half: float | None
    """bfloat16 and float16."""
    tf32: float | None
    float32: float | None


# By a part of the name the driver gives; the longest that occurs in it counts.
_PEAKS = {
    "B200": Peak("B200", 2250, 1125, 75),
    "GH200": Peak("GH200", 989, 495, 67),
    "H200": Peak("H200 SXM", 989, 495, 67),
    "H200 NVL": Peak("H200 NVL", 835, 418, 60),
    "H100": Peak("H100 SXM", 989, 495, 67),
    "H100 PCIe": Peak("H100 PCIe", 756, 378, 51),
    "H100 NVL": Peak("H100 NVL", 835, 418, 60),
    "H800": Peak("H800 SXM", 989, 495, 67),
    "H800 PCIe": Peak("H800 PCIe", 756, 378, 51),
    "H20": Peak("H20", 148, 74, 44),
    "A100": Peak("A100", 312, 156, 19.5),
    "A800": Peak("A800", 312, 156, 19.5),
    "A40": Peak("A40", 150, 75, 37.4),
    "A30": Peak("A30", 165, 82, 10.3),
    "L40S": Peak("L40S", 362, 183, 91.6),
    "L40": Peak("L40", 181, 90.5, 90.5),
    "L4": Peak("L4", 121, 60, 30.3),
    "RTX 6000 Ada": Peak("RTX 6000 Ada", 364, 182, 91.1),
    "RTX A6000": Peak("RTX A6000", 155, 77.4, 38.7),
    "RTX 5090": Peak("RTX 5090", 210, 105, 105),
    "RTX 4090": Peak("RTX 4090", 165, 82.6, 82.6),
    "RTX 3090": Peak("RTX 3090", 71, 35.6, 35.6),
    "V100": Peak("V100 SXM", 125, None, 15.7),
    "Ascend910B2": Peak("Ascend 910B2", 376, None, None),
    "Ascend910B3": Peak("Ascend 910B3", 313, None, None),
    "Ascend910B4": Peak("Ascend 910B4", 280, None, None),
}


def find_peak(device_name: str) -> Peak | None:
    """Return what the card that its driver calls `device_name` could do, or None where nothing is known of it."""
    words = device_name.replace("_", " ").replace("-", " ").split()
    if not {"Laptop", "Max", "Mobile"}.isdisjoint(words):  # of the same name, with less power
        return None
    found = [key for key in _PEAKS if _follow(words, key.split())]
    return _PEAKS[max(found, key=len)] if found else None


def _follow(words: list[str], key: list[str]) -> bool:
    """Whether `key` stands in `words`, whole words in a row: an A10 is no A100, an L4 no L40."""
    return any(words[i : i + len(key)] == key for i in range(len(words)))
