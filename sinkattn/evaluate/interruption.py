"""Ctrl-C ends a measurement between two forwards, so that what was measured until then is complete and kept."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import TypeVar

from torch import nn

Item = TypeVar("Item")


class Interrupted(KeyboardInterrupt):
    """Raised before a forward. Measurements catch it and return what they have; if that is nothing, they raise it."""


@contextmanager
def noticed() -> Iterator[Event]:
    """Ctrl-C sets the event. A second Ctrl-C interrupts at once."""
    pressed = Event()
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible(model: nn.Module) -> Iterator[Event]:
    """As `noticed`; once the event is set, the forwards of the model and of copies made within raise `Interrupted`."""
    with noticed() as pressed:

        def check(module: nn.Module, args: object) -> None:
            if pressed.is_set():
                raise Interrupted

        hook = model.register_forward_pre_hook(check)
        try:
            yield pressed
        finally:
            hook.remove()


@contextmanager
def waiting(pressed: Event | None = None) -> Iterator[None]:
    """Within it, the first Ctrl-C raises `Interrupted` at once: who waits for input has nothing to complete.

    So does one that came before: ``pressed`` is what `interruptible` has given.
    """
    outer = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, outer)
        if callable(outer):
            outer(number, frame)
        raise Interrupted

    signal.signal(signal.SIGINT, press)
    try:
        if pressed is not None and pressed.is_set():
            raise Interrupted
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is press:
            signal.signal(signal.SIGINT, outer)


def awaited(items: Iterator[Item], pressed: Event) -> Iterator[Item]:
    """The same items. Ctrl-C, which sets ``pressed``, raises `Interrupted` instead of, or during, the wait for one."""
    while True:
        with waiting(pressed):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
