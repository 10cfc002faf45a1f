"""Occupancy, by numbers that NVIDIA's own calculator (cuda_occupancy.h of CUDA 13.0) gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxc.ir.cuda_devices import DEVICES, Device


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_bytes", "blocks", "limit"),
    [
        ("sm_80", 256, 32, 0, 8, "threads"),
        ("sm_80", 256, 128, 65536, 2, "registers"),
        ("sm_80", 128, 168, 0, 3, "registers"),
        ("sm_86", 256, 64, 0, 4, "registers"),
        ("sm_86", 32, 16, 0, 16, "blocks"),
        ("sm_89", 32, 24, 0, 24, "blocks"),
        ("sm_90", 256, 255, 0, 1, "registers"),
        ("sm_90", 256, 90, 232448, 1, "shared memory"),
        ("sm_90", 256, 90, 232449, 0, "shared memory"),
        ("sm_90", 1024, 64, 0, 1, "registers"),
        ("sm_90", 1024, 65, 0, 0, "registers"),
        ("sm_90", 384, 168, 73728, 1, "registers"),
        ("sm_90", 1056, 16, 0, 0, "threads"),
        ("sm_120", 128, 40, 16384, 5, "shared memory"),
    ],
)
def test_known_occupancies(
    architecture: str, threads: int, registers: int, shared_bytes: int, blocks: int, limit: str
) -> None:
    device = DEVICES[architecture]
    found = device.occupancy(threads, registers, shared_bytes)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * -(-threads // 32)
    assert found.share == found.warps * 32 / device.threads_per_sm


@given(
    st.sampled_from(list(DEVICES.values())),
    st.integers(1, 1024),
    st.integers(0, 255),
    st.integers(0, 240_000),
)
def test_what_is_resident_fits(device: Device, threads: int, registers: int, shared_bytes: int) -> None:
    found = device.occupancy(threads, registers, shared_bytes)
    assert 0 <= found.share <= 1
    assert found.blocks * threads <= device.threads_per_sm
    assert found.blocks * threads * registers <= device.registers_per_sm
    assert found.blocks * shared_bytes <= device.shared_per_sm
    assert device.occupancy(threads, registers + 1, shared_bytes + 1).blocks <= found.blocks


def test_names_are_the_capabilities() -> None:
    for name, device in DEVICES.items():
        assert name == device.name == f"sm_{device.capability}{'a' * device.is_specific}"
    assert DEVICES["sm_90"].shared_per_block == 232448
