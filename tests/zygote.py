"""Commands in separate processes that start at once: each is forked from one that has done the imports."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SERVER = Path(__file__)


@dataclass
class Command:
    """A running ``nslightning`` command; ``pid`` leads its process group."""

    zygote: "Zygote"
    pid: int
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text()

    def send(self, signum: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, signum)

    def wait(self, timeout: float = 300) -> int:
        """The exit status as a shell has it: 128 and the signal's number for a process that a signal ended."""
        end = time.monotonic() + timeout
        while (status := self.zygote.ask({"poll": self.pid})) is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(self.said)
            time.sleep(0.05)
        return status if status >= 0 else 128 - status

    def until(self, condition, timeout: float = 300) -> None:
        """Wait until something holds; it fails if the command ends before."""
        end = time.monotonic() + timeout
        while not condition():
            status = self.zygote.ask({"poll": self.pid})
            assert status is None, (status, self.said)
            assert time.monotonic() < end, self.said
            time.sleep(0.02)


class Zygote:
    """The process that the others are forked from."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *argv: str, cwd: Path, **environment: str) -> Command:
        output = Path(cwd) / f"said-{time.monotonic_ns()}.txt"
        variables = dict(os.environ) | environment
        pid = self.ask({"argv": argv, "cwd": str(cwd), "environment": variables, "output": str(output)})
        return Command(self, pid, output)

    def run(self, *argv: str, cwd: Path, **environment: str) -> tuple[int, str]:
        command = self.start(*argv, cwd=cwd, **environment)
        return command.wait(), command.said

    def close(self) -> None:
        with self.process:  # closes its pipes, and waits
            self.process.stdin.close()


def serve() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_pdf  # noqa: F401 # imported for the processes that fork off

    import nslightning.commands.lr_search
    import nslightning.commands.train
    import nslightning.commands.twins
    import nslightning.commands.zones
    import nslightning.experiments.training
    import nslightning.figures  # noqa: F401 # imported for the processes that fork off
    from nslightning.cli import main

    # What the first config costs a process, its parsers and their imports, is paid once.
    with contextlib.redirect_stdout(io.StringIO()):
        main(["fit", "--config", "configs/quickstart.yaml", "--print_config"])
    ended = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid not in ended:
                waited, status = os.waitpid(pid, os.WNOHANG)
                ended |= {pid: os.waitstatus_to_exitcode(status)} if waited else {}
            print(json.dumps(ended.get(pid)), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(json.dumps(pid), flush=True)
            continue
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        said = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["nslightning", *request["argv"]]
        sys.exit(main(request["argv"]))


if __name__ == "__main__":
    serve()
