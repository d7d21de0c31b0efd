"""What is checked of each kind before it is applied: fields that do not go together, and another machine's devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tools.payload_fixtures import filled, samples
from vmmigrate.devices import block, chipset, firmware, kinds, pci, virtio
from vmmigrate.devices.registry import KINDS, decode, encode
from vmmigrate.errors import PayloadError
from vmmigrate.memory import MIB, RamLayout

SAMPLE: dict[tuple[str, int], Any] = {(kind, version): state for kind, version, state in samples()}
PCI, VIRTIO, NVME = SAMPLE["pci-device", 1], SAMPLE["pci-virtio", 2], SAMPLE["nvme-ctrl", 1]
UART, RTC, FW_CFG = SAMPLE["uart-16550", 2], SAMPLE["bhyve-rtc", 2], SAMPLE["qemu-fwcfg", 2]
HYPERV = kinds.GuestHypervInterfaceV1(1, 0x1001, kinds.ReferenceTsc(0x2001, 10**9))
PM, MSRS, VIONA = SAMPLE["piix3-pm", 1], SAMPLE["bhyve-x86-cpu-msregs", 1], SAMPLE["pci-virtio-viona", 1]
LAYOUT = RamLayout.for_size(64 * MIB)
EMPTY = kinds.PciBar("Empty", 0, 0)

PROPOLIS_KINDS = """
    pci-device 1, i440fx-hb 1, piix3-lpc 1, bhyve-atpic 1, bhyve-atpit 1, bhyve-ioapic 1, bhyve-rtc 2, piix3-pm 1,
    bhyve-pmtimer 1, bhyve-hpet 1, uart-16550 1, ps2-ctrl 1, qemu-fwcfg 2, qemu-ramfb 1, guest-hyperv-interface 1,
    bhyve-x86-vcpu-runstate 1, bhyve-x86-vcpu-gpregs 1, bhyve-x86-vcpu-ctrlregs 1, bhyve-x86-vcpu-dbgregs 1,
    bhyve-x86-vcpu-segregs 1, bhyve-x86-cpu-msregs 1, bhyve-x86-cpu-fpu 1, bhyve-x86-lapic 1, bhyve-x86-pmu-amd 1,
    pci-virtio 1, pci-virtio-viona 1, nvme-ctrl 1, in-memory-block-backend 1, testdev-migration-failure 1
"""


def test_every_kind_of_propolis_is_known_in_its_version() -> None:
    """propolis.md 5.2, row by row."""
    named = [entry.split() for entry in PROPOLIS_KINDS.replace("\n", " ").split(",")]

    assert [name for name, version in named if int(version) not in KINDS[name].readable] == []
    assert set(KINDS) - {name for name, _ in named} == {"embedded-vcpu"}


def _bars(*bars: kinds.PciBar) -> tuple[kinds.PciBar, ...]:
    return (*bars, *[EMPTY] * (6 - len(bars)))


def _queue(**changes: Any) -> kinds.PciVirtioV2:
    first, *others = VIRTIO.queues.queues
    return replace(VIRTIO, queues=replace(VIRTIO.queues, queues=(replace(first, **changes), *others)))


def _cq(**changes: Any) -> kinds.NvmeCtrlV1:
    return replace(NVME, cqs=(replace(NVME.cqs[0], **changes),))


@pytest.mark.parametrize(
    ("kind", "state", "says"),
    [
        ("pci-device", replace(PCI, reg_command=0x0008), "reg_command: is 8, which has unknown bits"),
        ("pci-device", replace(PCI, msix=replace(PCI.msix, count=3)), "msix says 3 vectors and lists 2"),
        ("pci-device", replace(PCI, bars=_bars(kinds.PciBar("Pio", 0x201, 0))), "bars[0] has 0x201 bytes"),
        ("pci-device", replace(PCI, bars=_bars(kinds.PciBar("Pio", 1 << 17, 0))), "up to 0x10000 for Pio"),
        ("pci-device", replace(PCI, bars=_bars(kinds.PciBar("Mmio", 0, 0))), "bars[0] has 0x0 bytes"),
        ("pci-device", replace(PCI, bars=_bars(kinds.PciBar("Mmio", 0x1000, 0x10))), "lies at 0x10"),
        ("pci-device", replace(PCI, bars=_bars(kinds.PciBar("Empty", 4, 0))), "is Empty and has size"),
        (
            "pci-device",
            replace(PCI, bars=_bars(kinds.PciBar("Mmio64", 0x1000, 0), kinds.PciBar("Pio", 0x10, 0))),
            "bars[0] is Mmio64 and needs an Empty one after it",
        ),
        ("pci-device", replace(PCI, bars=(*[EMPTY] * 5, kinds.PciBar("Mmio64", 0x1000, 0))), "bars[5] is Mmio64"),
        ("piix3-pm", replace(PM, pm_status=1), "pm_status: is 1, which has unknown bits"),
        ("piix3-pm", replace(PM, pm_ena=0x8000), "pm_ena"),
        ("piix3-pm", replace(PM, pm_ctrl=2), "pm_ctrl"),
        ("uart-16550", replace(UART, line_status=0x60), "line_status says that there are none"),
        ("uart-16550", replace(UART, rx_fifo=b"short"), "pending_input holds bytes, and rx_fifo is not full"),
        ("uart-16550", replace(UART, rx_fifo=bytes(17)), "rx_fifo: is bytes of length 17"),
        ("bhyve-rtc", replace(RTC, cmos=bytes(128)), "cmos: no time of day"),
        ("bhyve-rtc", replace(RTC, cmos=b"\x0a" + RTC.cmos[1:]), "0xa is not BCD"),
        ("bhyve-rtc", replace(RTC, addr=128), "addr: is 128"),
        ("qemu-fwcfg", replace(FW_CFG, entries=FW_CFG.entries * 2), "stands there 2 times"),
        ("qemu-fwcfg", replace(FW_CFG, entries=(replace(FW_CFG.entries[2], contents=None),)), "has no contents"),
        ("qemu-fwcfg", replace(FW_CFG, selected=replace(FW_CFG.selected, selector=1)), "selector 0x1 is no entry"),
        ("guest-hyperv-interface", replace(HYPERV, msr_guest_os_id=0), "msr_guest_os_id is 0"),
        ("guest-hyperv-interface", replace(HYPERV, reference_tsc=kinds.ReferenceTsc(1, 0)), "guest_freq is 0"),
        ("bhyve-x86-cpu-msregs", replace(MSRS, msrs=MSRS.msrs[:1] * 2), "register 0x10 stands there 2 times"),
        ("pci-virtio", replace(VIRTIO, device=replace(VIRTIO.device, status=0x10)), "status: is 16, which has unknown"),
        ("pci-virtio", replace(VIRTIO, device=replace(VIRTIO.device, mode=3)), "device.mode: is 3"),
        ("pci-virtio", replace(VIRTIO, queues=replace(VIRTIO.queues, len=4)), "queues: len 4, peak 5, 3 listed"),
        ("pci-virtio", replace(VIRTIO, queues=replace(VIRTIO.queues, peak=2)), "peak 2"),
        ("pci-virtio", replace(VIRTIO, device=replace(VIRTIO.device, msix_queue_vec=(1,))), "1 entries for 3 queues"),
        ("pci-virtio", _queue(size=0), "queues[0].size is 0"),
        ("pci-virtio", _queue(size=96), "queues[0].size is 96"),
        ("pci-virtio-viona", replace(VIONA, multicast_macs=VIONA.unicast_macs), "an address of the other sort"),
        ("pci-virtio-viona", replace(VIONA, promisc="Some"), "promisc: is str of length 4, allowed is one of None"),
        ("nvme-ctrl", _cq(head=64), "queue 0: head or tail beyond its 64 entries"),
        ("nvme-ctrl", _cq(tail=64), "beyond its 64"),
        ("nvme-ctrl", _cq(size=1, head=0, tail=0), "size 1, allowed are 2 to"),
        ("nvme-ctrl", _cq(id=7), "no completion queue 0"),
        ("nvme-ctrl", replace(NVME, sqs=NVME.sqs * 2), "sqs: queue 0 stands there 2 times"),
        ("nvme-ctrl", replace(NVME, cc=0), "not enabled"),
        ("embedded-vcpu", replace(SAMPLE["embedded-vcpu", 1], heartbeats=0), "last_beat_ns without a heartbeat"),
    ],
)
def test_a_state_that_no_device_can_have_is_refused_with_the_device_and_the_reason(
    kind: str, state: Any, says: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        decode(encode("device-9", kind, state))

    assert says in caught.value.text
    assert "device device-9, payload " + kind in caught.value.text
    assert caught.value.code in {"payload_body", "payload_value"}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            pci.differences(replace(PCI, bars=_bars(kinds.PciBar("Pio", 0x100, 0))), PCI),
            "bars[0] is Pio of 0x100 bytes",
        ),
        (pci.differences(replace(PCI, msix=None), PCI), "msix has None vectors, here it has 2"),
        (
            virtio.virtio_differences(replace(VIRTIO, device=replace(VIRTIO.device, mode=0)), VIRTIO, LAYOUT),
            "mode is 0",
        ),
        (virtio.virtio_differences(_queue(is_control=True), _queue(is_control=False), LAYOUT), "is_control is True"),
        (virtio.virtio_differences(_queue(notify_data=9), VIRTIO, LAYOUT), "queues[0].notify_data is 9"),
        (virtio.virtio_differences(_queue(id=9), VIRTIO, LAYOUT), "queues[0].id is 9"),
        (virtio.virtio_differences(_queue(size=128), VIRTIO, LAYOUT), "queues[0].size is 128, here it is 64"),
        (virtio.virtio_differences(_queue(avail_gpa=1 << 40), VIRTIO, LAYOUT), "avail_gpa 0x10000000000 does not lie"),
        (block.nvme_differences(replace(NVME, cap=9), NVME), "nvme-ctrl cap 0x9"),
        (firmware.hyperv_differences(HYPERV, LAYOUT, has_reference_tsc=False), "the spec says otherwise"),
        (
            firmware.hyperv_differences(replace(HYPERV, msr_hypercall=(1 << 40) + 1), LAYOUT, has_reference_tsc=True),
            "msr_hypercall: its page 0x10000000000 does not lie in RAM",
        ),
    ],
)
def test_what_another_machine_has_is_told_with_what_is_here(found: Any, says: str) -> None:
    assert any(says in text for text in found)


def test_a_queue_may_be_smaller_than_here_unless_the_device_is_a_legacy_one() -> None:
    legacy = replace(VIRTIO, device=replace(VIRTIO.device, mode=virtio.LEGACY))
    smaller = replace(_queue(size=32), device=legacy.device)

    assert not list(virtio.virtio_differences(_unmapped(_queue(size=32)), VIRTIO, LAYOUT))
    assert list(virtio.virtio_differences(_unmapped(smaller), legacy, LAYOUT)) == [
        "pci-virtio queues[0].size is 32, here it is 64"
    ]


def test_queue_lists_of_different_length_are_never_zipped_in_silence() -> None:
    fewer = replace(VIRTIO, queues=kinds.VirtioQueues(2, 5, VIRTIO.queues.queues[:2]))

    assert "pci-virtio has 2 queues, here there are 3" in list(virtio.virtio_differences(fewer, VIRTIO, LAYOUT))


def test_a_nic_has_an_even_number_of_io_queues() -> None:
    assert list(virtio.viona_differences(VIRTIO)) == []
    assert list(virtio.viona_differences(_queue(is_control=True))) == [
        "pci-virtio has 1 I/O queues, a NIC has an even number"
    ]


def test_a_machine_like_this_one_has_no_differences() -> None:
    assert list(pci.differences(PCI, PCI)) == []
    assert list(virtio.virtio_differences(_unmapped(VIRTIO), VIRTIO, LAYOUT)) == []
    assert list(block.nvme_differences(NVME, NVME)) == []
    assert list(firmware.hyperv_differences(HYPERV, LAYOUT, has_reference_tsc=True)) == []


@pytest.mark.parametrize("coding", [0x02, 0x06, 0x00, 0x04], ids=["BCD 24", "binary 24", "BCD 12", "binary 12"])
@pytest.mark.parametrize("seconds", [0, 43_199, 43_200, 86_399, 1_709_247_599, 253_402_300_799])
def test_the_clock_reads_what_it_wrote_in_each_of_its_codings(coding: int, seconds: int) -> None:
    cmos = bytearray(128)
    cmos[0x0B] = coding

    chipset.write_time(cmos, seconds)

    assert chipset.read_time(cmos) == seconds


def test_the_hour_of_a_clock_of_12_hours_is_checked() -> None:
    cmos = bytearray(128)
    chipset.write_time(cmos, 0)
    cmos[4] = 0x13

    with pytest.raises(ValueError, match="hour 13"):
        chipset.read_time(cmos)


def _unmapped(state: kinds.PciVirtioV2) -> kinds.PciVirtioV2:
    queues = tuple(replace(queue, mapping_valid=False) for queue in state.queues.queues)
    return replace(state, queues=replace(state.queues, queues=queues))


def test_a_filled_sample_is_the_same_at_every_run() -> None:
    assert filled(kinds.VcpuLapicV1) == filled(kinds.VcpuLapicV1)
