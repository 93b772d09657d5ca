"""A service with state, for tests."""

from typing import Any

from bfcl_eval.eval_checker.multi_turn_eval.func_source_code.long_context import (  # type: ignore
    MORE_TICKETS,
)


class TicketAPI:
    """Opens and closes tickets."""

    def __init__(self) -> None:
        self.open: list[int] = []
        self.titles: dict[int, tuple[str, int]] = {}
        self._next_number = 0

    def _load_scenario(self, scenario: dict[str, Any], long_context: bool = False) -> None:
        self.open = scenario["open"] + (MORE_TICKETS if long_context else [])
        self._next_number = scenario["next_number"]

    def open_ticket(self, title: str, urgency: int = 1) -> dict[str, int]:
        """Opens a ticket; returns its number."""
        number = self._next_number
        self._next_number += 1
        self.open.append(number)
        self.titles[number] = (title, urgency)
        return {"number": number}

    def close_ticket(self, number: int) -> str:
        """Closes an open ticket."""
        self.open.remove(number)
        return f"{number} is closed"

    def list_tickets(self) -> list[int]:
        """The open ones."""
        return list(self.open)

    def wait_for_ever(self) -> None:
        """Never returns; no document offers it."""
        while True:
            pass
