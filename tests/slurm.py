"""Run results/slurm.sh under a real Slurm of two nodes, on this machine alone: make test-slurm (ten minutes).

For root on Debian or Ubuntu; asks apt for Slurm and munge. Everything runs from a temporary folder, with its
own configuration, on loopback, and is stopped at the end. A Slurm that is there already is not touched.

What must come out: a job of two minutes saves before its limit, is requeued by its own script, resumes, and
ends as a run that nobody interrupts, bit for bit; so does one that scancel ends and that is submitted again.
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import helpers                                             # noqa: E402
from support import runtime                                # noqa: E402

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
# Two nodes of one machine. linuxproc hands a signal to every process of a step, which is the harder case.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=16818 CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=16819 CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "GONE")
TRAIN = ["train_tokenizer.py", "--preset", "toy", "--global-batch-size", 16, "--log-every", 5,
         "--checkpoint-every", 10 ** 6]


def install():
    """Ask apt for what is missing; its packages must not start services."""
    if all(map(shutil.which, PROGRAMS)):
        return
    policy = pathlib.Path("/usr/sbin/policy-rc.d")        # Debian's way to say so
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        subprocess.run(["apt-get", "-qq", "install", "--yes", "--no-install-recommends", *PACKAGES],
                       check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    finally:
        if ours:
            policy.unlink()


def start(folder, processes):
    """Append to `processes` a munge and a Slurm that live in `folder`; sets $SLURM_CONF for its commands."""
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=os.uname().nodename))
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    for command in (["munged", "--force", "--foreground", f"--socket={folder / 'munge.socket'}", *files],
                    ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
        with open(folder / "daemons.log", "a") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        time.sleep(2)
        assert processes[-1].poll() is None, (folder / "daemons.log").read_text()


def submit(folder, results, length, minutes):
    """The number of a new job of results/slurm.sh."""
    flags = ["--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--time={minutes}",
             "--signal=B:USR1@30", f"--output={folder}/slurm-%j.out"]
    command = ["sbatch", *flags, "results/slurm.sh", *TRAIN, "--length", length, "--results-dir", results]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.strip()


def state(job):
    """Its state, as RUNNING."""
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    found = re.search(r"JobState=(\w+)", shown)
    return found[1] if found else "GONE"


def wait_for(ready, minutes=10):
    """Wait until `ready()`; False if it takes longer."""
    end = time.monotonic() + 60 * minutes
    while not ready() and time.monotonic() < end:
        time.sleep(0.5)
    return ready()


def say(text):
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def tell(folder, job):
    """Print what the job has said, but for most of its steps and what is torchrun's."""
    lines = (folder / f"slurm-{job}.out").read_text().splitlines()
    kept = [line for line in lines if re.match(r"signal|resuming|removed|--resume|warning|error", line)]
    steps = [line for line in lines if line.startswith("step ")]
    for line in [*kept, steps[-1].split(" |")[0]]:
        print(f"          {line.replace(f'{folder}/', '')}", flush=True)


def steps_done(results):
    """The last step that the run has logged."""
    return max(helpers.logged(results), default=0) if (results / "metrics.jsonl").exists() else 0


def try_requeue(folder, length):
    """A job that meets its limit; its folder of results."""
    results = folder / "requeued"
    job = submit(folder, results, length, minutes=2)
    say(f"job {job} of 2 minutes submitted")
    seen = []

    def ended():
        now = state(job)
        if now not in seen[-1:]:
            seen.append(now)
            say(f"job {job}: {now.lower()}, {steps_done(results)} of {length} steps done")
        return seen[-1] in ENDED

    assert wait_for(ended, 20) and seen[-1] == "COMPLETED" and seen.count("PENDING") > 1, seen
    tell(folder, job)
    return results


def try_cancel(folder, length):
    """A job that is cancelled and submitted again; its folder of results."""
    results = folder / "cancelled"
    job = submit(folder, results, length, minutes=20)
    assert wait_for(lambda: steps_done(results) > 20)
    subprocess.run(["scancel", job], check=True)
    assert wait_for(lambda: state(job) in ENDED) and state(job) == "CANCELLED", state(job)
    assert wait_for(lambda: runtime.list_checkpoints(results), 1), "nothing was saved"
    say(f"job {job}: cancelled at step {steps_done(results)}")
    tell(folder, job)
    job = submit(folder, results, length, minutes=20)
    say(f"job {job}: the same once more")
    assert wait_for(lambda: state(job) in ENDED) and state(job) == "COMPLETED", state(job)
    tell(folder, job)
    return results


def main(args):
    """Try both, and compare with a run that is left alone."""
    runtime.require(sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get"),
                    "this installs and starts Slurm, which takes root on Debian or Ubuntu; use a container")
    running = {path.read_text().strip() for path in pathlib.Path("/proc").glob("[0-9]*/comm")}
    runtime.require(not running & {"slurmctld", "slurmd", "slurmdbd"} and not any(map(os.path.exists, (
        "/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf"))),
        "there is a Slurm on this machine already, which is left alone; use another machine")
    install()
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.update(OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        run(folder / "first", 30)
        speed = json.loads((folder / "first" / "metrics.jsonl").read_text().splitlines()[-1])["samples/s"]
        length = round(100 * speed / 16)                  # 100 s: more than what the limit leaves to one turn
        say(f"a run of {length} steps that nobody interrupts")
        run(folder / "whole", length)
        processes = []
        try:
            start(folder, processes)
            for attempt in (try_requeue, try_cancel):
                results = attempt(folder, length)
                helpers.assert_same(helpers.newest(folder / "whole"), helpers.newest(results))
                say("its last checkpoint equals that of the run that nobody interrupts, bit for bit")
        finally:
            subprocess.run(["scancel", "--user=root"], check=False)
            time.sleep(2)
            for process in reversed(processes):
                process.terminate()
                process.wait()


def run(results, length):
    """The same training under torchrun alone, with as many ranks."""
    command = ["torchrun", "--nproc-per-node=2", *TRAIN, "--results-dir", results, "--length", length]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    runtime.run_script(main, lambda: None)
