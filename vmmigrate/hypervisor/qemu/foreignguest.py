"""A guest in a QEMU that something else started: the same as any other, but for names, RAM that may be QEMU's own, and
its beginning and end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import trio

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.qemu import takeover
from vmmigrate.hypervisor.qemu.foreign import Foreign
from vmmigrate.hypervisor.qemu.guest import QemuGuest
from vmmigrate.hypervisor.qemu.qmp import QmpError
from vmmigrate.hypervisor.qemu.remembered import Remembered
from vmmigrate.hypervisor.qemu.tracker import RamIdentity, foreign_writers
from vmmigrate.hypervisor.rammap import CopiedRam

_QUIT_S: Final = 2.0


class ForeignGuest(QemuGuest):
    """Implements `base.Guest`.

    Attributes:
        foreign: What is known of its QEMU.
    """

    def __init__(self, foreign: Foreign, **options: Any) -> None:
        super().__init__(**options)
        self.foreign = foreign

    async def claim(self, memory: Remembered) -> None:
        """Be the only one to take it over. Raises: SpecCreatableError `not_that_machine`: somebody else has it."""
        await self._with_files(self.foreign.save, self._files)
        await takeover.stamp(self.ask, memory.to_text())
        self._memory = memory

    async def take_over(self) -> None:
        """Complete a guest that was recognised. Raises: HypervisorError: `give_back` undoes it."""
        self.foreign = replace(self.foreign, before=await takeover.settings_of(self.ask))
        await self._with_files(self.foreign.save, self._files)
        await takeover.take(self.ask, self.plan, self._files, self.foreign.before)
        self.foreign = replace(self.foreign, has_consoles=True)
        await self._with_files(self.foreign.save, self._files)
        await self._listen(True)

    async def is_in_a_journal(self) -> bool:
        """Whether the process was told of a record. If not, it is as good as never taken over."""
        try:
            memory = await self.recall()
        except QmpError:  # it remembers nothing at all
            return False
        return bool(memory.last_record) and self.foreign.is_owned_by(memory.stamp)

    async def give_back(self) -> None:
        """Let the QEMU be, as it was before; but nothing is behind its serial ports then.

        When it does not answer its directory stays, and the next daemon tries again: until then nobody may end it.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._files.given_back.touch)
            undone = await takeover.give_back(self.ask, self.foreign, self._files)
            self.detach()
            if undone:
                await trio.to_thread.run_sync(self._files.remove)

    async def destroy(self) -> bool:
        """QEMU is first asked to end: who watches it may start it again when it fails."""
        if not self._gone:
            with trio.CancelScope(shield=True), trio.move_on_after(_QUIT_S):
                with contextlib.suppress(OSError, EOFError, HypervisorError):
                    await self.qmp.execute("quit")
                await self._wait_gone()
        return await super().destroy()

    # -- seams -----------------------------------------------------------------------------------------------------

    async def _save_now(self, *, was_running: bool) -> None:
        """RAM that is QEMU's own is always in what it saves; what nobody wants to have of it is dropped."""
        if self.foreign.has_own_ram:
            self.pages = self.pages or self.page_stream()
            if not self.pages.is_naming:
                await self._in_time(self.pages.start, "migrate")
        await super()._save_now(was_running=was_running)

    async def _foreign_writers(self) -> Sequence[int]:
        if self.foreign.has_own_ram:
            return ()
        shared = self.ram.shared if isinstance(self.ram, CopiedRam) else None
        return await self.in_thread(foreign_writers, self.process.pid, RamIdentity(*(shared or self.ram.file)))

    def _node(self, number: int) -> str:
        return self.foreign.nodes[number]

    def _port(self, num: str) -> str:
        return self.foreign.ports[num]

    @property
    def _ram_bytes(self) -> int:
        return self.foreign.ram_bytes
