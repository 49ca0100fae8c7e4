from __future__ import annotations

import os
import signal
import threading

import pytest

from tinychat.terminal.interrupts import interruptible, quiet_keyboard


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_cancels_and_the_second_raises() -> None:
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt), interruptible(lambda: calls.append("cancelled")):
        press()
        assert calls == ["cancelled"]
        press()
    assert calls == ["cancelled"]


def test_the_handler_before_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible(lambda: None):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_has_no_signals_and_goes_on() -> None:
    entered: list[bool] = []

    def work() -> None:
        with interruptible(lambda: None):
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]


def test_without_a_keyboard_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with quiet_keyboard():
        pass


def test_the_keyboard_is_quiet_within_and_loud_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    termios = pytest.importorskip("termios")
    master, slave = os.openpty()
    with open(slave) as keyboard:  # noqa: PTH123 - a descriptor has no path
        monkeypatch.setattr("sys.stdin", keyboard)
        before = termios.tcgetattr(slave)
        with quiet_keyboard():
            assert not termios.tcgetattr(slave)[3] & termios.ECHO
            assert termios.tcgetattr(slave)[3] & termios.ISIG
        assert termios.tcgetattr(slave) == before
    os.close(master)
