"""The table of accelerators, their lookup by exact name, and the roofline."""

import pytest

from attnbench.errors import UsageError
from attnbench.harness import devices
from attnbench.harness.devices import hardware, match, name_of, resolve, roofline_us, table


@pytest.mark.parametrize("device", table().values(), ids=lambda device: device.name)
def test_a_row_is_complete_and_plausible(device):
    assert device.title
    assert device.torch_names
    assert device.source.startswith("https://")
    assert {"fp32", "tf32", "fp16", "bf16"} <= set(device.tflops) <= {"fp32", "tf32", "fp16", "bf16", "fp8"}
    assert device.tflops["fp32"] <= device.tflops["tf32"] <= device.tflops["fp16"] == device.tflops["bf16"]
    if "fp8" in device.tflops:  # twice the rate of fp16, as sparse figures taken for dense would not be
        assert device.tflops["fp8"] / device.tflops["fp16"] == pytest.approx(2.0, rel=0.02)
    assert 100 < device.bandwidth_gbps < 20_000
    assert 16 <= device.memory_gb <= 512
    assert device.last_level_bytes >= 16 << 20
    assert 50 < device.sms < 400


def test_every_name_means_one_device():
    names = [name for device in table().values() for name in device.torch_names]
    assert len(names) == len(set(names))
    families = {device.family for device in table().values()}
    assert not families & {name for name, d in table().items() if d.family != name}


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H100 NVL", "nvidia-h100-nvl"),  # not in the table, and no H100 of it
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "nvidia-a100-sxm4-80gb-mig-1g-10gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "nvidia-geforce-rtx-4090-laptop-gpu"),
    ],
)
def test_names_are_matched_whole(torch_name, name):
    assert name_of(torch_name) == name
    assert (hardware(name) is None) == name.startswith("nvidia-")


@pytest.mark.parametrize(
    ("asked", "torch_name", "expected"),
    [
        ("auto", None, "cpu"),
        ("cpu", "NVIDIA H200", "cpu"),
        ("auto", "NVIDIA H200", "h200"),
        ("h200", "NVIDIA H200", "h200"),
        ("a100", "NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("A100-PCIe", "NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("auto", "Tesla T4", "tesla-t4"),
        ("tesla-t4", "Tesla T4", "tesla-t4"),
    ],
)
def test_match(asked, torch_name, expected):
    assert match(asked, torch_name) == expected


@pytest.mark.parametrize(
    ("asked", "torch_name", "words"),
    [
        ("h100", None, ["--gpu h100", "no GPU that torch can use", "--gpu cpu"]),
        ("a100-sxm", "NVIDIA A100 80GB PCIe", ["NVIDIA A100 80GB PCIe (a100-pcie)", "expected a100-sxm"]),
        ("h100", "Tesla T4", ["Tesla T4 (tesla-t4)", "--gpu tesla-t4"]),
        ("h1000", None, ["unknown device 'h1000'", "h100"]),
    ],
)
def test_hardware_that_is_not_here_is_a_usage_error(asked, torch_name, words):
    with pytest.raises(UsageError) as error:
        match(asked, torch_name)
    assert all(word in str(error.value) for word in words)


def test_resolve_looks_at_this_machine(monkeypatch):
    monkeypatch.setattr(devices, "_torch_name", lambda: "NVIDIA B200")
    assert resolve("auto") == "b200"


def test_roofline_is_the_longer_of_computing_and_moving():
    # H200 bf16: 989.4 TFLOP/s and 4.8 TB/s
    assert roofline_us(989_400_000_000, 1, "bfloat16", "h200") == pytest.approx(1000.0)
    assert roofline_us(1, 4_800_000_000, "bfloat16", "h200") == pytest.approx(1000.0)


def test_float32_may_be_three_products_of_tf32_but_not_one():
    flops = 10**12
    assert roofline_us(flops, 1, "float32", "a100-sxm") == pytest.approx(1e6 / 52.0)
    assert roofline_us(flops, 1, "float32", "rtx-4090") == pytest.approx(1e6 / 82.6)
    assert roofline_us(flops, 1, "tf32", "a100-sxm") == pytest.approx(1e6 / 156.0)


@pytest.mark.parametrize(
    ("dtype", "device"), [("float32", "cpu"), ("bfloat16", "tesla-t4"), ("float8_e4m3fn", "a100-sxm")]
)
def test_unknown_peaks_give_no_roofline(dtype, device):
    assert roofline_us(1, 1, dtype, device) is None
