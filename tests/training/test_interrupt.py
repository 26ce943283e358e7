"""Asked to end: by Ctrl-C or by a queue, politely the first time."""

import os
import signal

import pytest

from imgshared.training.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_are_heard_and_what_handled_them_before_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupt = Interrupt()
    with interrupt.heard():
        assert not interrupt.asked
        os.kill(os.getpid(), number)
        assert interrupt.asked
    assert signal.getsignal(number) is before


def test_ctrl_c_again_ends_at_once_and_a_queue_that_asks_twice_does_not() -> None:
    interrupt = Interrupt()
    with interrupt.heard():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
