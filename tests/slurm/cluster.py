"""A SLURM of our own on this machine: munged, slurmctld and two slurmd on loopback, all state in one folder."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
GRACE = 180  # seconds that a preempted job is given
# Daemons and jobs live in a process namespace of their own: whatever ends this process, the kernel ends them all.
NAMESPACE = ("setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--mount-proc", "--kill-child")
DAEMONS = """\
cd {folder}
munged --foreground --force --socket=$PWD/munge.socket \\
    --key-file=$PWD/munge.key --pid-file=$PWD/munge.pid --log-file=$PWD/munge.log --seed-file=$PWD/munge.seed &
until [ -e munge.socket ]; do sleep 0.1; done
slurmctld -D &
for node in n0 n1; do slurmd -D -N $node & done
wait
"""
# Jobs of `high` preempt those of `low`. KillWait: from SIGTERM to SIGKILL. cred_expire: how long a requeued job waits.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
KillWait=20
MinJobAge=3600
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """`start` brings it up, `stop` ends it and every job. Jobs run in `work`, with this checkout and this Python."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir()
        (self.work / "launch").symlink_to(ROOT / "launch")
        config = folder / "slurm.conf"
        config.write_text(CONFIG.format(host=socket.gethostname(), folder=folder, grace=GRACE, ports=_free_ports(3)))
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
        }
        self.environment |= {
            "SLURM_CONF": str(config),
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.work}:{ROOT}",
            "OMP_NUM_THREADS": "1",
        }
        self.daemons: subprocess.Popen | None = None

    def start(self) -> None:
        with (self.folder / "daemons.out").open("w") as out:
            self.daemons = subprocess.Popen(
                [*NAMESPACE, "bash", "-c", DAEMONS.format(folder=self.folder)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        deadline = time.monotonic() + 250
        while self.run("sinfo", "-h", "-o", "%D %T", check=False) != "2 idle":
            assert time.monotonic() < deadline, (self.folder / "daemons.out").read_text()
            time.sleep(0.3)

    def stop(self) -> None:
        """Ends the daemons, and all that they have started."""
        if self.daemons:
            self.daemons.kill()
            self.daemons.wait()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """A SLURM command's output."""
        result = subprocess.run(
            command, cwd=self.work, env=self.environment | environment, capture_output=True, text=True, timeout=250
        )
        assert result.returncode == 0 or not check, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def sbatch(self, *arguments: object, **environment: str) -> str:
        """Submits and gives the job's id."""
        return self.run("sbatch", "--parsable", *map(str, arguments), **environment)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells, such as JobState and Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def log(self, job: str) -> str:
        path = self.work / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, happened: Callable[[], object], timeout: float = 1000) -> dict[str, str]:
        """The job as soon as something has happened; at the latest after its end, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not happened() and self.job(job)["JobState"] not in ENDS:
            assert time.monotonic() < deadline, f"{timeout} s: {self.job(job)}\n{self.log(job)}"
            time.sleep(0.3)
        return self.job(job)

    def finish(self, job: str, timeout: float = 1000) -> dict[str, str]:
        """The job after its end."""
        return self.wait(job, lambda: False, timeout)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def missing() -> str | None:
    """What this machine lacks for a cluster, if anything."""
    if os.geteuid() != 0 or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        return "needs root, and its right to make namespaces"
    if not all(shutil.which(daemon, path="/usr/sbin") for daemon in ("munged", "slurmctld", "slurmd")):
        return "needs slurm-wlm and munge: apt-get install -y --no-install-recommends slurm-wlm munge"
    return None
