"""A SLURM of one's own: munged, slurmctld and two slurmd on this machine, with everything they write in one folder.

Nothing outside the folder is read or written: the configuration comes from SLURM_CONF, munge has its own key and
socket, ports are free ones. A SLURM that is installed and running here is not touched. `python -m tests.slurm FOLDER`
keeps one running for trying things by hand.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = ("slurm-wlm", "munge")
INSTALL_TIMEOUT_S = 120
START_TIMEOUT_S = 30
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
_UNFINISHED = ("PENDING", "RUNNING", "COMPLETING")

CONF = """\
ClusterName=fvae
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType={proctrack}
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
JobRequeue=1
"""


class NoSlurm(Exception):
    """Why there is no SLURM here."""


def find_or_install() -> None:
    """Make sure the programs are there; install the packages where that is possible.

    Raises:
        NoSlurm: they are not, and why they cannot be.
    """
    wish = os.environ.get("FVAE_SLURM", "installed")
    if wish == "off":
        raise NoSlurm("FVAE_SLURM=off")
    missing = _missing()
    if not missing:
        return
    if wish == "installed":
        raise NoSlurm(f"{missing[0]} is not installed; FVAE_SLURM=install installs SLURM by apt-get (root)")
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NoSlurm(f"{missing[0]} is not installed; only root on a system with apt-get can install it")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    waits = ["-o", "Acquire::http::Timeout=10", "-o", "Acquire::Retries=0", "-o", "DPkg::Lock::Timeout=60"]
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            subprocess.run(
                ["apt-get", *waits, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                timeout=INSTALL_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise NoSlurm(f"apt-get {command[0]} took more than {INSTALL_TIMEOUT_S} s") from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or error.stdout).strip().splitlines()[-1:]
            raise NoSlurm(f"apt-get {command[0]} failed: {' '.join(reason)}") from None
    if missing := _missing():
        raise NoSlurm(f"{missing[0]} is missing after installing {' and '.join(PACKAGES)}")


@contextmanager
def cluster(folder: Path, proctrack: str = "proctrack/pgid") -> Iterator[Cluster]:
    """A running two-node cluster; when the block is left, everything started in it is gone.

    Raises:
        NoSlurm: a daemon does not start here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running = Cluster(folder)
    with ExitStack() as stack:
        stack.callback(running.stop)
        running.start(proctrack)
        yield running


class Cluster:
    """Two nodes, n1 and n2, and the commands to use them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
        }
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self._daemons: list[subprocess.Popen] = []

    def start(self, proctrack: str) -> None:
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)  # munged refuses a folder others can write to
        values = {"host": socket.gethostname().partition(".")[0], "ports": _free_ports(3), "user": getpass.getuser()}
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, proctrack=proctrack, **values))
        paths = {
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munge.seed",
        }
        options = [f"--{option}={self.folder / name}" for option, name in paths.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *options)
        self._wait("munge.socket", lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D", "-N", "n1")
        self._start("slurmd", "-D", "-N", "n2")
        self._wait(
            "both nodes idle", lambda: self.try_run("sinfo", "-h", "-o", "%T %D").stdout.split() == ["idle", "2"]
        )

    def run(self, *command: str, folder: Path | None = None) -> str:
        """Output of a command that has to succeed."""
        result = self.try_run(*command, folder=folder)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def try_run(self, *command: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            cwd=folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts, RunTime, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def wait_for_end(self, *numbers: str, timeout_s: float = 120) -> None:
        """Wait until no job given is pending, running or completing; a requeued one starts without SLURM's two minutes.

        Raises:
            TimeoutError: with the jobs that are left.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            states = {number: self.job(number)["JobState"] for number in numbers}
            left = {number: state for number, state in states.items() if state in _UNFINISHED}
            if not left:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs did not end: {left}")
            for number, state in left.items():
                if state == "PENDING":
                    self.try_run("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.5)

    def cancel_all(self) -> None:
        """End all jobs, at once."""
        self.try_run("scancel", "--full", "--signal=KILL", "--me")
        self.try_run("scancel", "--me")
        deadline = time.monotonic() + 30
        while self.try_run("squeue", "--noheader").stdout and time.monotonic() < deadline:
            time.sleep(0.5)

    def stop(self) -> None:
        """End jobs, then daemons, then what is left of either."""
        self.cancel_all()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # Jobs and their slurmstepd are no children of ours; SLURM_CONF in their environment names this folder.
        for pid in self.processes():
            with suppress(*_GONE):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Everything alive that this cluster started."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(*_GONE):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def _start(self, program: str, *arguments: str) -> None:
        log = self.folder / f"{'-'.join([program, *arguments[2:3]]) if program == 'slurmd' else program}.out"
        with log.open("w") as output:
            daemon = subprocess.Popen(
                [_which(program), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _wait(self, what: str, is_so) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_so():
            dead = next((daemon for daemon in self._daemons if daemon.poll() is not None), None)
            if dead is not None or time.monotonic() > deadline:
                name = Path(dead.args[0]).name if dead else None
                why = f"{name} ended with {dead.returncode}" if dead else f"not {what} after {START_TIMEOUT_S} s"
                raise NoSlurm(f"SLURM does not start here: {why}: {self._last_words(name)}")
            time.sleep(0.2)

    def _last_words(self, program: str | None) -> str:
        logs = self.folder.glob(f"{program or 'slurmctld'}*.out")
        return " / ".join(line for log in logs for line in log.read_text().strip().splitlines()[-2:])


def _missing() -> list[str]:
    return [program for program in PROGRAMS if _which(program) is None]


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with cluster(Path(sys.argv[1]).resolve(), *sys.argv[2:]) as started:
        print(f"export SLURM_CONF={started.environment['SLURM_CONF']}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
