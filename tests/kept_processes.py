"""Processes that a server starts, kept from one test to the next.

Every application over the same files starts the same reader of long requests and the same trial of
grammars. A server has them for months; a test would start them, most of a second of a processor,
for one request. So those of one setting are started once. Tests of the processes themselves, and
of servers that are processes, have their own.
"""

import contextlib
import copy
from collections.abc import Iterator

import pytest

from halfbyte.chat.grammar_trial import GrammarTrials
from halfbyte.server.api.aside import Aside

_READERS: dict[bytes, Aside] = {}
_TRIALS: dict[bytes, GrammarTrials] = {}
_start_reader = Aside.start
_start_trials = GrammarTrials.start


@contextlib.contextmanager
def kept_processes() -> Iterator[None]:
    """While the body runs, what is started belongs to nobody who could end it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Aside, "start", _take_reader)
        patch.setattr(GrammarTrials, "start", _take_trials)
        yield


def _take_reader(self: Aside) -> None:
    owner = _READERS.setdefault(self._setting, copy.copy(self))
    _start_reader(owner)
    self._process, self._controls = owner._process, owner._controls


def _take_trials(self: GrammarTrials) -> None:
    owner = _TRIALS.setdefault(self._setting, copy.copy(self))
    if self is owner:
        _start_trials(self)
        return
    # Its word that it is ready comes once.
    owner.wait()
    self._process, self._control, self._is_ready = owner._process, owner._control, True
