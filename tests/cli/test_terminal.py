"""`chat` at a real terminal: prompt, commands, and Ctrl-C that stops an answer and not the talk."""

import os
import re
import select
import subprocess
import sys
import time

import pytest

pty = pytest.importorskip("pty")


class Terminal:
    """A child process that believes it talks to a person."""

    def __init__(self, environment, *arguments):
        self.master, slave = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, "-m", "lowbit.cli", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=environment(TERM="dumb", NO_COLOR="1"),
        )
        os.close(slave)
        self.seen = ""

    def expect(self, pattern, seconds=30):
        """Read until `pattern` is seen; what came before it is returned."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.master], [], [], left)[0]:
                pytest.fail(f"{pattern!r} did not appear in {self.seen!r}")
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:
                pytest.fail(f"the child ended before {pattern!r}: {self.seen!r}")
        before, self.seen = self.seen[: match.start()], self.seen[match.end() :]
        return before

    def type(self, text):
        os.write(self.master, text.encode())

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self.master)


@pytest.fixture
def terminal(environment):
    opened = []

    def start(*arguments):
        opened.append(Terminal(environment, *arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_chat(terminal, tiny_model):
    chat = terminal("chat", tiny_model, "--seed", "1", "-n", "5")
    chat.expect("bits per weight, context 128 tokens")
    chat.expect("> ")
    chat.type("hello\n")
    chat.expect(r"tokens/s, \d+ of 128 tokens\]")
    chat.type("/reset\n")
    chat.expect(r"\[forgotten\]")
    chat.type("/nonsense\n")
    chat.expect("/nonsense is no command")
    chat.type("x" * 200 + "\n")
    chat.expect("the context holds 128.*or /reset")
    chat.type("/exit\n")
    assert chat.child.wait(20) == 0


def test_end_of_input_ends_the_chat(terminal, tiny_model):
    chat = terminal("chat", tiny_model)
    chat.expect("> ")
    chat.type("\x04")
    assert chat.child.wait(20) == 0


def test_run_at_a_terminal_does_not_wait_for_a_prompt(terminal, tiny_model):
    run = terminal("run", tiny_model)
    run.expect("no prompt")  # stdin is a terminal: say so and do not wait
    assert run.child.wait(20) == 2
