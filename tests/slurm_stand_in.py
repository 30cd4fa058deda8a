"""SLURM's handling of a job, on one machine: ``sbatch`` with requeueing, ``srun`` and ``scontrol``, as commands.

The folder ``$SLURM_STAND_IN`` has the job's state: the process ids of its tasks, and two files that ask for something.
``event`` is a test's: "limit" (the time limit is near), "preempt" (the job has to make room) or "fail" (its machine
dies). ``requeue`` is ``scontrol``'s.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB = "77"
#: Seconds between SIGTERM and SIGKILL. SLURM's own are 30.
KILL_WAIT = 20


def install(folder: Path) -> None:
    """Write the three commands into a folder, to be put at the front of PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        file = folder / name
        # As pip does: a shell and Python read the first lines differently, and the path may hold a space.
        file.write_text(
            f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n"
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"from slurm_stand_in import {name}\nsys.exit({name}(sys.argv[1:]))\n"
        )
        file.chmod(0o755)


def state() -> Path:
    return Path(os.environ["SLURM_STAND_IN"])


def tasks() -> list[int]:
    return [int(file.read_text()) for file in state().glob("task*")]


def send(signum: int, processes: list[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signum)
        except ProcessLookupError:  # it has ended
            continue


def directives(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options of a job, its script's first and the command line's on top; and the script with its arguments."""
    split = next(i for i, word in enumerate(words) if not word.startswith("--"))
    written = re.findall(r"^#SBATCH (--.*)$", Path(words[split]).read_text(), re.MULTILINE)
    options = [word.split("#")[0].strip().partition("=") for word in [*written, *words[:split]]]
    return {name: value for name, _, value in options}, words[split:]


def sbatch(words: list[str]) -> int:
    """Run a job, and again as long as it is queued again; unlike the real one, wait for its end."""
    options, script = directives(words)
    nodes, per_node = options["--nodes"], options["--ntasks-per-node"]
    os.environ |= {
        "SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": options["--job-name"], "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": nodes, "SLURM_NNODES": nodes,
        "SLURM_NTASKS_PER_NODE": per_node, "SLURM_NTASKS": str(int(nodes) * int(per_node)),
        "SLURM_CPUS_PER_TASK": options["--cpus-per-task"],
    }  # fmt: skip
    early = getattr(signal, options["--signal"].partition("@")[0])
    requeue, event = state() / "requeue", state() / "event"
    for restarts in range(5):
        if restarts:
            os.environ["SLURM_RESTART_COUNT"] = str(restarts)
        for file in (requeue, *state().glob("task*")):
            file.unlink(missing_ok=True)
        job = subprocess.Popen(["bash", *script])
        killed_at = None
        again = False
        while job.poll() is None:
            asked = event.read_text() if event.exists() else ""
            event.unlink(missing_ok=True)
            if asked == "limit":
                send(early, tasks())
            if asked == "fail":
                again = True
                send(signal.SIGKILL, [job.pid, *tasks()])
            if killed_at is None and (asked == "preempt" or requeue.exists()):
                again = True
                send(signal.SIGTERM, tasks())
                killed_at = time.monotonic() + KILL_WAIT
            if killed_at is not None and time.monotonic() > killed_at:
                send(signal.SIGKILL, [job.pid, *tasks()])
            time.sleep(0.05)
        if not (again or requeue.exists()) or "--requeue" not in options:
            return job.returncode
    return 99


def srun(words: list[str]) -> int:
    """One process for each task, each with its number."""
    together = words[0] == "--kill-on-bad-exit=1"
    count, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    started = []
    for rank in range(count):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node}
        step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count)}
        environment = os.environ | step | {name: str(value) for name, value in place.items()}
        started.append(subprocess.Popen(words[together:], env=environment))
        (state() / f"task{rank}").write_text(str(started[-1].pid))
    while any(task.poll() is None for task in started):
        if together and any(task.poll() for task in started):
            send(signal.SIGTERM, [task.pid for task in started if task.poll() is None])
        time.sleep(0.05)
    return max(task.returncode % 256 for task in started)


def scontrol(words: list[str]) -> int:
    if words != ["requeue", JOB]:
        return 2
    (state() / "requeue").touch()
    return 0
