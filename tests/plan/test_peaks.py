import pytest

from cogvideox_factory.plan.peaks import find_peak


@pytest.mark.parametrize(
    ("device", "name", "half"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H200", "H200 SXM", 989),
        ("NVIDIA A100-SXM4-80GB", "A100", 312),
        ("NVIDIA A800-SXM4-80GB", "A800", 312),
        ("NVIDIA L40S", "L40S", 362),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 364),
        ("Ascend910B2", "Ascend 910B2", 376),
    ],
)
def test_cards_are_known_by_what_drivers_call_them(device, name, half):
    peak = find_peak(device)
    assert peak is not None
    assert (peak.name, peak.half) == (name, half)


@pytest.mark.parametrize("device", ["cpu", "NVIDIA A10", "NVIDIA L400", "NVIDIA GeForce RTX 4090 Laptop GPU", "H100X"])
def test_what_is_not_known_is_not_guessed(device):
    assert find_peak(device) is None
