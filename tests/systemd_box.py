"""A real systemd for tests: the machine's own, booted as PID 1 of private namespaces in a fraction of a second.

Its root is an overlay of this machine's whose upper layer is in memory, /run, /tmp and /dev are fresh, and everything
is gone with its namespaces: nothing of this machine is written.  Needs root, util-linux, systemd, overlayfs and a
mounted cgroup2; `why_no_box` says what is missing.

    with SystemdBox([Bind(Path("/somewhere"), "/srv/inside")]) as box:
        box.run("systemctl", "start", "localaid")
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

BOOT_S = 60.0
STOP_S = 60.0
RUN_S = 120.0
PREFIX = "localaid-box"
NEEDS = ("unshare", "nsenter", "setpriv", "mount", "umount", "pivot_root", "mknod", "systemctl", "bash")
SYSTEMD = "/lib/systemd/systemd"
CLONE_NEWNET = 0x40000000  # setns(2)
PR_SET_PDEATHSIG = 1  # prctl(2)

# Capabilities that would reach past the namespaces into the one kernel.
DROPPED = "sys_time sys_module sys_rawio sys_pacct syslog mac_admin mac_override wake_alarm block_suspend"

# Runs inside the new namespaces: joins the box's cgroup, lays out the root, becomes systemd.
BOOT = r"""
set -eu
box=$1 root=$1/root
if [ -z "${BOX_IN_CGROUP-}" ]; then  # this process alone joins the cgroup, which becomes the root of a namespace
  echo 0 > "$BOX_CGROUP/cgroup.procs"
  BOX_IN_CGROUP=1 exec unshare --cgroup bash -c "$BOX_BOOT" box "$box"
fi
mnt() { mount -n "$@"; }
mnt -t tmpfs -o mode=755,size=2g box "$box"
mkdir -p "$box/upper/etc" "$box/work" "$root"
mnt -t overlay box -o "lowerdir=/,upperdir=$box/upper,workdir=$box/work" "$root"
: > "$root/etc/fstab"; echo box > "$root/etc/hostname"
mnt -t tmpfs -o mode=755 units "$root/etc/systemd/system"  # nothing that this machine has enabled
mnt -t tmpfs -o mode=755 none "$root/usr/lib/systemd/system-generators"
mkdir -p "$root/etc/systemd/journald.conf.d" "$root/etc/systemd/system.conf.d"
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0\n' \
  > "$root/etc/systemd/journald.conf.d/box.conf"
printf '[Manager]\nDefaultTimeoutStopSec=10s\nDefaultLimitCORE=0\nStatusUnitFormat=name\n' \
  > "$root/etc/systemd/system.conf.d/box.conf"
for unit in "$root"/usr/lib/systemd/system/{sysinit,local-fs,sockets,timers}.target.wants/*; do
  case ${unit##*/} in
    systemd-journald*.socket|systemd-journald.service|systemd-tmpfiles-setup*|dbus.socket|tmp.mount|'*') ;;
    *) ln -sfn /dev/null "$root/etc/systemd/system/${unit##*/}" ;;
  esac
done
printf '[Unit]\nRequires=basic.target dbus.socket\nAfter=basic.target dbus.socket\nAllowIsolate=yes\n' \
  > "$root/etc/systemd/system/box.target"
mnt -t proc -o nosuid,nodev,noexec proc "$root/proc"
mnt --bind "$root/proc/sys" "$root/proc/sys"; mnt -o remount,bind,ro "$root/proc/sys"
[ ! -e "$root/proc/sysrq-trigger" ] || mnt --bind /dev/null "$root/proc/sysrq-trigger"
mnt -t sysfs -o nosuid,nodev,noexec,ro sysfs "$root/sys"
mnt -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
mnt -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
for node in null:3 zero:5 full:7 random:8 urandom:9; do
  mknod -m 666 "$root/dev/${node%:*}" c 1 "${node#*:}"
done
mknod -m 666 "$root/dev/tty" c 5 0; ln -s /proc/self/fd "$root/dev/fd"
for link in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${link%:*}" "$root/dev/${link#*:}"; done
mkdir "$root/dev/pts" "$root/dev/shm"
mnt -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"; ln -s pts/ptmx "$root/dev/ptmx"
mnt -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
: > "$root/dev/console"; mnt --bind "$BOX_CONSOLE" "$root/dev/console"
mnt -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
mnt -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
printf '%s' "$BOX_BINDS" | while IFS='|' read -r source place; do
  mkdir -p "$root$place"
  mnt --bind "$source" "$root$place"; mnt -o remount,bind,ro "$root$place"
done
cd "$root"; pivot_root . .; umount -n -l .; cd /
mount -n --make-rshared /  # in a container systemd leaves this to others; LoadCredential= needs it
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin container=box LANG=C.UTF-8 \
  setpriv --bounding-set="$BOX_CAPABILITIES" --inh-caps=-all -- \
  /lib/systemd/systemd --system --unit=box.target --show-status=yes
"""


class BoxFailed(Exception):
    """The box did not boot, or a command in it failed; the message has what was printed."""


class Bind(NamedTuple):
    """A folder of this machine that is seen, read-only, inside the box."""

    source: Path
    place: str


def why_no_box() -> str | None:
    """Return why no box can be booted here; None: one can, as far as can be seen."""
    if os.geteuid():
        return "a box needs root"
    missing = [name for name in NEEDS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if missing or not Path(SYSTEMD).exists():
        return f"a box needs systemd and util-linux; not found: {', '.join(missing) or SYSTEMD}"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "a box needs a kernel with overlayfs"
    if find_cgroup2() is None:
        return "a box needs a mounted cgroup2"
    return None


def find_cgroup2() -> Path | None:
    """Return where cgroup2 is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return None


def _remove_cgroup(top: Path) -> None:
    """Remove a cgroup and those in it; its last processes may be going just now."""
    end = time.monotonic() + STOP_S
    while top.is_dir():
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):  # still in use
                Path(folder).rmdir()
        if time.monotonic() > end:
            raise BoxFailed(f"{top} is still in use")


class SystemdBox:
    """A systemd of its own, from `start` to `stop`; use it from the thread that started it, which it dies with."""

    def __init__(self, binds: Iterable[Bind] = (), env: Mapping[str, str] | None = None) -> None:
        """Prepare a box that sees `binds`; commands that `run` starts have `env`."""
        self._binds = tuple(binds)
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._console: list[bytes] = []
        self._folder: Path | None = None
        self._cgroup: Path | None = None
        self.pid = 0  # of its PID 1, as this machine counts

    # -- its life --

    def start(self) -> Self:
        """Boot; raises `BoxFailed`."""
        cgroups = find_cgroup2()
        assert cgroups is not None
        self._sweep(cgroups)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-"))
        self._cgroup = cgroups / self._folder.name
        self._cgroup.mkdir()
        ours, theirs = pty.openpty()
        env = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "BOX_BOOT": BOOT,
            "BOX_CONSOLE": os.ttyname(theirs),
            "BOX_CAPABILITIES": ",".join(f"-{name}" for name in DROPPED.split()),
            "BOX_CGROUP": str(self._cgroup),
            "BOX_BINDS": "".join(f"{bind.source}|{bind.place}\n" for bind in self._binds),
        }
        command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--uts"]
        command += ["--ipc", "--net", "bash", "-c", BOOT, "box", str(self._folder)]
        prctl = ctypes.CDLL(None).prctl
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 - calls one function of libc
        )
        os.close(theirs)
        threading.Thread(target=self._pump, args=(ours,), daemon=True).start()
        try:
            self._wait_until_booted()
        except BaseException as error:
            self.stop(force=True)
            raise BoxFailed(f"{error}; console:\n{self.console}") from error
        return self

    def _sweep(self, cgroups: Path) -> None:
        """Remove what a test run that was killed could not: empty folders."""
        for left in cgroups.glob(f"{PREFIX}-*"):
            if not Path("/proc", left.name.removeprefix(f"{PREFIX}-").split("-")[0]).exists():
                _remove_cgroup(left)
                with contextlib.suppress(OSError):
                    Path(tempfile.gettempdir(), left.name).rmdir()

    def _wait_until_booted(self) -> None:
        assert self._process is not None
        end = time.monotonic() + BOOT_S
        while True:
            if self._process.poll() is not None:
                raise BoxFailed("systemd ended while it booted")
            if time.monotonic() > end:
                raise BoxFailed("systemd did not boot in time")
            if not self.pid:
                self._find_init()
            elif self.run("systemctl", "is-system-running", check=False).strip() in {"running", "degraded"}:
                return
            time.sleep(0.02)  # nothing tells of it

    def _find_init(self) -> None:
        assert self._process is not None
        with contextlib.suppress(OSError):
            unshare = self._process.pid
            children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
                self.pid = int(children[0])

    def _pump(self, fd: int) -> None:
        """Keep what the box writes to its console."""
        with contextlib.suppress(OSError):  # EIO: the last who held the other end has gone
            while chunk := os.read(fd, 65536):
                self._console.append(chunk)
        os.close(fd)

    def stop(self, *, force: bool = False) -> bool:
        """End the box; return whether systemd shut down in order.  Raises `BoxFailed` where something is left."""
        in_order = False
        process = self._process
        if process is not None and process.poll() is None:
            if self.pid and not force:
                os.kill(self.pid, signal.SIGRTMIN + 4)  # systemctl poweroff
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
                    in_order = True
            if process.poll() is None:
                process.kill()  # --kill-child: PID 1 goes too, and with it all of its namespace
                process.wait()
        if self._cgroup is not None:
            _remove_cgroup(self._cgroup)
        if self._folder is not None:
            self._folder.rmdir()  # fails where a mount has leaked
        self._cgroup = self._folder = None
        return in_order

    def __enter__(self) -> Self:
        """Boot."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """End the box."""
        self.stop()

    # -- what is done in it --

    @property
    def console(self) -> str:
        """What the boot, and the shutdown, have printed."""
        return b"".join(self._console).decode(errors="replace").replace("\r", "")

    def run(self, *command: str, check: bool = True, user: str = "", timeout_s: float = RUN_S) -> str:
        """Run a command inside, as `user` if one is named; return what it prints.  Raises `BoxFailed`."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--net"]
        enter += ["--root", "--wd", "--", "env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        enter += ["LANG=C.UTF-8", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0", *(f"{k}={v}" for k, v in self._env.items())]
        if user:
            enter += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--inh-caps=-all"]
        done = subprocess.run(
            [*enter, *command],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise BoxFailed(f"{shlex.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def sh(self, script: str, *, check: bool = True, user: str = "", timeout_s: float = RUN_S) -> str:
        """Run a shell script inside; return what it prints."""
        return self.run("bash", "-ec", script, check=check, user=user, timeout_s=timeout_s)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).strip()

    def path(self, inside: str) -> Path:
        """Return this machine's way to a file inside, unix sockets too."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def write(self, inside: str, text: str) -> None:
        """Write a file inside, and the folders that it needs, as root."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def connect(self, address: tuple[str, int] | str) -> socket.socket:
        """Return a connection to a port, or to a unix socket's path, inside; raises `OSError`.

        A thread joins the box's network for as long as it takes to connect.
        """
        if isinstance(address, str):
            unix = socket.socket(socket.AF_UNIX)
            unix.connect(str(self.path(address)))
            return unix
        result: list[socket.socket | OSError] = []
        with Path(f"/proc/{self.pid}/ns/net").open("rb") as network:

            def join() -> None:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
                    result.append(OSError(ctypes.get_errno(), "setns"))
                    return
                try:
                    result.append(socket.create_connection(address, timeout=RUN_S))
                except OSError as error:
                    result.append(error)

            thread = threading.Thread(target=join)
            thread.start()
            thread.join()
        if isinstance(result[0], OSError):
            raise result[0]
        return result[0]

    def http(self, address: tuple[str, int] | str) -> http.client.HTTPConnection:
        """Return an HTTP connection to an address inside that is connected already; raises `OSError`."""
        connection = http.client.HTTPConnection("localhost", timeout=RUN_S)
        connection.sock = self.connect(address)
        return connection
