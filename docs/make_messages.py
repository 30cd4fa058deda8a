"""Writes docs/reference/messages.md: mistakes that a person makes, and what the command answers.

    python docs/make_messages.py

The mistakes are the tests' own table (tests/mistakes.py), and each is typed while the page is written. A test fails
where an answer is another one than on the page.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from mistakes import MISTAKES, answer, prepare, row  # noqa: E402 # the tests are no package

INTRODUCTION = """\
# Messages

The commands' answers to mistakes, with the exit status: 0 done, 1 something outside the call is at fault (data,
disk, network, your own model), 2 the call is, 3 an audit's limit is exceeded, 129 after the end of the terminal
(SIGHUP), 130 after Ctrl-C, 141 where the program that reads the output has ended, and 143 after SIGTERM. A traceback is
a bug: please report it.

Made by `docs/make_messages.py` from the table that the tests use.
"""


def page() -> str:
    """The page, as the installed versions answer."""
    lines = [INTRODUCTION]
    for section, mistakes in MISTAKES.items():
        lines += [f"## {section}", "", "| typed | answer | status |", "|---|---|---|"]
        lines += [row(mistake, *answer(mistake.typed)) for mistake in mistakes]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    # As the tests have it: no account, no data, a line as long as it comes.
    for name in [n for n in os.environ if n.startswith(("WANDB_", "SLURM_")) or n == "COLUMNS"]:
        del os.environ[name]
    os.environ |= {"WANDB_MODE": "offline", "NSLIGHTNING_DATA_DIR": "data"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        text = page()
        os.chdir(HERE)
    (HERE / "reference" / "messages.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
