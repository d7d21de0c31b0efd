"""What an older spec version cannot say."""

from __future__ import annotations

from dataclasses import dataclass

from vmmigrate.spec.keys import SpecKey


@dataclass(frozen=True, slots=True)
class Loss:
    """One component, or one top-level field (then `component` is None), that a conversion down would drop."""

    component: SpecKey | None
    what: str

    def __str__(self) -> str:
        return self.what if self.component is None else f"{self.what} '{self.component}'"
