"""The process that stands between generated code and the machine; standard library only.

`sandbox.run_program` starts this file with a bare interpreter. It takes new namespaces, builds a
file system that holds nothing but the interpreter and one writable folder, gives up every right,
limits what is left, and becomes process 1 of its own world: when the program ends, so does all it
started. It never imports the package: what runs here should be readable in one sitting.

    launcher --unshare, fork--> init (pid 1) --fork, limits, filter, exec--> the program

Source: unshare(2), pivot_root(2), user_namespaces(7), seccomp(2), prctl(2).
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = (
    1024, 2048, 4096, 16384, 1 << 18, 1 << 21,
)  # fmt: skip
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2

BOX = "/box"  # the one writable folder, also the working folder
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/localtime")

# Numbers of the calls that the filter denies: x86-64, then AArch64; -1 where it has none.
DENIED_CALLS = {
    "ptrace": (101, 117), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "perf_event_open": (298, 241), "init_module": (175, 105), "finit_module": (313, 273),
    "kexec_load": (246, 104), "userfaultfd": (323, 282), "open_by_handle_at": (304, 265),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "io_uring_setup": (425, 425),
    "swapon": (167, 224), "reboot": (169, 142), "settimeofday": (164, 170), "acct": (163, 89),
    "socket": (41, 198), "socketpair": (53, 199), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "process_madvise": (440, 440),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def take_namespaces(program_uid: int) -> list[str]:
    """New mount, process, network, IPC and host-name spaces; a user space where one is needed.

    In a user space root has `program_uid` as well, so that the program can be someone else; a plain
    user has only itself.
    """
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    taken = ["mount", "pid", "network", "ipc", "uts"]
    is_root = os.geteuid() == 0
    if is_root:
        try:
            _call("unshare", spaces)
            return taken
        except OSError:
            pass  # root without CAP_SYS_ADMIN, as in most containers: in a user space then
    mapper = _start_mapper(program_uid) if is_root else None
    uid, gid = os.geteuid(), os.getegid()
    try:
        _call("unshare", spaces | CLONE_NEWUSER)
    finally:
        if mapper is not None:
            mapper.finish()
    if not is_root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    elif mapper is not None and not mapper.has_mapped():
        raise OSError(
            1,
            "root without CAP_SYS_ADMIN needs CAP_SETUID and CAP_SETGID to give the program a user "
            "of its own; add them, or run as a plain user",
        )
    return ["user", *taken]


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


class _Mapper:
    """A child that stays outside a new user space and gives it two users.

    Only a process outside, with the right to change its user, may map more than one.
    """

    def __init__(self, pid: int, start: int) -> None:
        self._pid, self._start = pid, start
        self._status = 1

    def finish(self) -> None:
        """Let it map, now that the space is there (or is not to be), and wait for it."""
        os.write(self._start, b"1")
        os.close(self._start)
        self._status = os.waitpid(self._pid, 0)[1]

    def has_mapped(self) -> bool:
        return self._status == 0


def _start_mapper(program_uid: int) -> _Mapper:
    launcher = os.getpid()
    ready, start = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(start)
        os.read(ready, 1)
        try:
            for kind in ("uid_map", "gid_map"):
                _write(f"/proc/{launcher}/{kind}", f"0 0 1\n{program_uid} {program_uid} 1\n")
        except OSError:
            os._exit(1)
        os._exit(0)
    os.close(ready)
    return _Mapper(pid, start)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())


def _bind_read_only(source: str, root: str) -> None:
    """Show a file or folder of the machine at the same place below root, read-only."""
    if not os.path.exists(source):
        return
    target = root + source
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        _bind_read_only(os.path.realpath(source), root)  # what it leads to, where nothing shows it
        return
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, "none", MS_BIND)
    # Flags that the original mount has may not be dropped in a user namespace: name them again.
    has = os.statvfs(target).f_flag
    kept = has & (MS_NOSUID | MS_NODEV | MS_NOATIME | MS_NODIRATIME | MS_RELATIME | 8)
    _mount("none", target, "none", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)


def build_root(visible: list[str], disk_bytes: int, files: dict[str, str], uid: int) -> None:
    """Replace the file system: system libraries and `visible` read-only, one bounded folder."""
    _mount("none", "/", "none", MS_REC | MS_PRIVATE)
    # Mounted over /proc, which exists everywhere and holds nothing that could be asked to be shown.
    root = "/proc"
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    os.chdir(root)
    for source in (*SYSTEM, *DEVICES, *visible):
        _bind_read_only(source, root)
    os.mkdir(root + BOX)
    _mount("tmpfs", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV,
           f"size={disk_bytes},nr_inodes=10000,mode=700")  # fmt: skip
    for name, text in files.items():
        path = os.path.join(root + BOX, name)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        os.chown(path, uid, -1)
    os.chown(root + BOX, uid, -1)
    if not os.path.lexists(root + "/tmp"):
        os.symlink(BOX, root + "/tmp")
    os.mkdir(root + "/old")
    _call("syscall", {"x86_64": 155, "aarch64": 41}[platform.machine()], b".", b"old")
    os.chdir("/")
    _call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    _mount("none", "/", "none", MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(BOX)


def set_limits(limits: dict[str, int]) -> None:
    """What one process may use; the supervisor outside watches wall time and memory in all."""
    # One second more until the kill, so that the end by SIGXCPU tells the reason.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        resource.setrlimit(kind, (value, value))


def _filter_program() -> bytes | None:
    """Classic BPF: wrong architecture dies, denied calls get EPERM, clone3 ENOSYS, rest pass."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        return None
    column = 0 if machine == "x86_64" else 1
    load, jump_equal, jump_set, jump_above, ret = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, deny, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, AUDIT_ARCH[machine]), (ret, 0, 0, kill),
               (load, 0, 0, 0)]  # fmt: skip
    if machine == "x86_64":  # the x32 calls have the same effect under other numbers
        program += [(jump_above, 0, 1, 0x40000000), (ret, 0, 0, kill)]
    for numbers in DENIED_CALLS.values():
        program += [(jump_equal, 0, 1, numbers[column]), (ret, 0, 0, deny)]
    # clone3 hides its flags behind a pointer; libraries fall back to clone when it is absent.
    program += [(jump_equal, 0, 1, CLONE3[column]), (ret, 0, 0, absent)]
    spaces = (CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID
              | CLONE_NEWNET)  # fmt: skip
    program += [(jump_equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (jump_set, 0, 1, spaces),
                (ret, 0, 0, deny)]  # fmt: skip
    program.append((ret, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def filter_calls() -> bool:
    """Install the seccomp filter; False where the architecture has no table or the kernel none."""
    program = _filter_program()
    if program is None:
        return False
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    block = ctypes.create_string_buffer(header, len(header))
    return bool(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(block), 0, 0) == 0)


def run_as_program(config: dict[str, Any], report: int) -> None:
    """Drop the user's identity in the child of init, then become the program; never returns."""
    os.setsid()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    set_limits(config["limits"])
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.write(report, json.dumps({"seccomp": filter_calls()}).encode() + b"\n")
    for descriptor in config["channel"]:
        os.set_inheritable(descriptor, True)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.execve(config["argv"][0], config["argv"], config["environment"])


def be_init(config: dict[str, Any], report: int) -> int:
    """Process 1: build the world, start the program, reap, and end with the program."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The kernel keeps from process 1 every signal of its own world that it has no handler for; and
    # the one that Python handles is sent by programs that have the same user.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    build_root(config["visible"], config["limits"]["disk_bytes"], config["files"],
               config["uid"] if os.geteuid() == 0 else -1)  # fmt: skip
    program = os.fork()
    if program == 0:
        try:
            run_as_program(config, report)
        except BaseException as failure:
            os.write(report, json.dumps({"failure": f"program: {failure}"}).encode() + b"\n")
        os._exit(127)
    while True:
        pid, status = os.wait()
        if pid == program:
            os.write(report, json.dumps({"status": status}).encode() + b"\n")
            return 0


def main() -> int:
    """Read the configuration from standard input; report one JSON object per line on fd argv[1]."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    config = json.load(sys.stdin)
    try:
        spaces = take_namespaces(config["uid"])
        os.write(report, json.dumps({"namespaces": spaces}).encode() + b"\n")
        init = os.fork()
        if init == 0:
            try:
                os._exit(be_init(config, report))
            except BaseException as failure:
                os.write(report, json.dumps({"failure": f"init: {failure}"}).encode() + b"\n")
            os._exit(126)
        os.write(report, json.dumps({"init": init}).encode() + b"\n")
        os.waitpid(init, 0)
    except OSError as failure:
        os.write(report, json.dumps({"failure": f"launcher: {failure}"}).encode() + b"\n")
        return 125
    return 0


if __name__ == "__main__":
    sys.exit(main())
