"""The walls of a jail, as system calls: namespaces, a root of its own, Landlock, a call filter.

Standard library only, and cheap to import: it is loaded once for every program that is run.
"""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

# mount(2), mount_setattr(2), unshare(2), prctl(2)
_RDONLY, _NOSUID, _NODEV, _BIND, _REC, _PRIVATE, _DETACH = 1, 2, 4, 4096, 16384, 1 << 18, 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_NEWNS, _NEWALL = 0x00020000, 0x7E020000  # all: cgroup, ipc, mount, net, pid, user and uts
_PDEATHSIG, _SUBREAPER, _SECCOMP, _NO_NEW_PRIVS = 1, 36, 22, 38
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446

# (x86_64, aarch64); 0 where the call does not exist.
_PIVOT_ROOT = (155, 41)
_CLONE, _CLONE3, _X32 = (56, 220), 435, 0x40000000
_AUDIT = (0xC000003E, 0xC00000B7)
_NEVER = {
    # the network, and io_uring, which could open sockets past this filter
    "socket": (41, 198), "io_uring_setup": (425, 425),
    # namespaces and mounts: capabilities of its own, and the kernel code behind them
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": _PIVOT_ROOT, "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "mount_setattr": (442, 442),
    # other processes, and kernel interfaces with a history
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "bpf": (321, 280),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219),
    # memory that belongs to no process and no folder
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
# What Landlock leaves open: owners, modes, times and attributes of files; others' priorities.
_LEFT_OPEN = {
    "chmod": (90, 0), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, 0), "lchown": (94, 0), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, 0), "utimes": (235, 0), "futimesat": (261, 0), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "setpriority": (141, 140), "ioprio_set": (251, 30),
}  # fmt: skip
# Calls whose first argument names the process that they reach.
_OTHERS = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
}  # fmt: skip


_FCNTL = (72, 25)
_OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: any signal to anybody, by a pipe


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _call(name: str, *arguments: int | bytes | None) -> int:
    """A function of libc; every number is passed as a long, as the kernel takes it."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(name, getattr(_libc, name)(*wide))


def _system(what: str, number: int, *arguments: int | bytes | None) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(what, _libc.syscall(ctypes.c_long(number), *wide))


def _machine() -> int:
    """Column of the tables above. Raises OSError on other processors."""
    names = ("x86_64", "aarch64")
    machine = os.uname().machine
    if machine not in names:
        raise OSError(f"no table of system calls for {machine}")
    return names.index(machine)


def die_with_parent() -> None:
    """SIGKILL comes when the parent ends; lost where the user is changed afterwards."""
    _call("prctl", _PDEATHSIG, 9, 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process."""
    _call("prctl", _SUBREAPER, 1, 0, 0, 0)


def enter_namespaces(user: int) -> None:
    """New namespaces of every kind; children are in the PID namespace, the caller is not.

    Root keeps its number inside and `user` is there besides; anybody else is only itself. Raises
    OSError where the kernel or its policy does not allow it.
    """
    me, group = os.geteuid(), os.getegid()
    if me:
        _call("unshare", _NEWALL & ~_NEWNS)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/gid_map", f"{group} {group} 1")
        _write("/proc/self/uid_map", f"{me} {me} 1")
        return
    # Two users are mapped by somebody outside, who has the right to.
    ours, theirs = os.pipe()
    target, mapper = os.getpid(), os.fork()
    if mapper == 0:
        try:
            os.close(theirs)
            os.read(ours, 1)
            for kind in ("gid_map", "uid_map"):
                _write(f"/proc/{target}/{kind}", f"0 0 1\n{user} {user} 1")
        except OSError:
            os._exit(1)
        os._exit(0)
    os.close(ours)
    try:
        _call("unshare", _NEWALL & ~_NEWNS)
    finally:
        os.close(theirs)
        _, status = os.waitpid(mapper, 0)
    if status:
        raise PermissionError(f"users 0 and {user} cannot be mapped")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def own_root(visible: list[str], box: str, size: int) -> None:
    """A root that holds `visible`, read-only, and an empty folder `box` of at most `size` bytes.

    There is no /proc, so nothing of any other process is read either.
    """
    _call("unshare", _NEWNS)
    _call("mount", None, b"/", None, _REC | _PRIVATE, None)
    # Built over /proc: the one folder of every system that holds nothing worth seeing.
    _call("mount", b"tmpfs", b"/proc", b"tmpfs", _NOSUID | _NODEV, b"size=1m,mode=755")
    for path in visible:
        _show(path, f"/proc{path}")
    os.mkdir(f"/proc{box}")
    closed = struct.pack("QQQQ", _RDONLY | _NOSUID, 0, 0, 0)
    _system(
        "mount_setattr", _MOUNT_SETATTR, _AT_FDCWD, b"/proc", _AT_RECURSIVE, closed, len(closed)
    )
    options = f"size={size},mode=777,nr_inodes=10000".encode()
    _call("mount", b"tmpfs", os.fsencode(f"/proc{box}"), b"tmpfs", _NOSUID | _NODEV, options)
    os.chdir("/proc")
    _system("pivot_root", _PIVOT_ROOT[_machine()], b".", b".")
    _call("umount2", b".", _DETACH)


def _show(path: str, place: str) -> None:
    os.lstat(path)  # its error names what is missing
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
    _call("mount", os.fsencode(path), os.fsencode(place), None, _BIND | _REC, None)


def restrict_files(visible: list[str], box: str) -> None:
    """Landlock: reads and runs what lies below `visible`, writes below `box` and to devices.

    Raises OSError before version 3 (Linux 6.2), which could still truncate any file.
    """
    version = _system("landlock", _LANDLOCK_CREATE, None, 0, 1)
    if version < 3:
        raise OSError(f"Landlock version 3 is needed, this kernel has {version}")
    everything = (1 << (16 if version >= 5 else 15)) - 1
    execute, write, read, read_folder = 1, 2, 4, 8
    ruleset = struct.pack("Q", everything)
    rules = _system("landlock_create_ruleset", _LANDLOCK_CREATE, ruleset, len(ruleset), 0)
    for path in [*visible, box]:
        device = path.startswith("/dev/")
        allowed = read | (write if device else execute)
        if os.path.isdir(path):
            allowed |= read_folder
        if path == box:
            allowed = everything & ~(1 << 6 | 1 << 11)  # neither character nor block devices
        try:
            place = os.open(path, os.O_PATH)
        except PermissionError:  # closed to this user even without Landlock
            continue
        rule = struct.pack("=Qi", allowed, place)
        _system("landlock_add_rule", _LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(place)
    forbid_privileges()
    _system("landlock_restrict_self", _LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def forbid_privileges() -> None:
    """No program that is started gains rights from its file (setuid, capabilities)."""
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)


def filter_calls(only: int | None, metadata: bool) -> None:
    """Refuse the system calls above with EPERM, for good and for all descendants.

    Args:
        only: the one process that may be reached by signals and limits; None: any that is seen.
        metadata: whether owners, modes, times and attributes of files may be changed.
    """
    column = _machine()
    program = _instructions(column, only, metadata)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in program))
    head = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    forbid_privileges()
    _call("prctl", _SECCOMP, 2, head, 0, 0)


def _instructions(column: int, only: int | None, metadata: bool) -> list[tuple[int, int, int, int]]:
    """Classic BPF over (number, architecture, instruction pointer, arguments)."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS
    number, architecture, first, second = 0, 4, 16, 24  # byte offsets; low halves of arguments
    out = [(load, 0, 0, architecture), (equal, 1, 0, _AUDIT[column]), (give, 0, 0, kill),
           (load, 0, 0, number), (at_least, 0, 1, _X32), (give, 0, 0, refuse)]  # fmt: skip
    for numbers in (_NEVER | ({} if metadata else _LEFT_OPEN)).values():
        if numbers[column]:
            out += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    # Flags of clone3 lie in memory, out of sight; libc falls back to clone.
    out += [(equal, 0, 1, _CLONE3), (give, 0, 0, absent)]
    out += [(equal, 0, 4, _CLONE[column]), (load, 0, 0, first), (any_bit, 0, 1, _NEWALL),
            (give, 0, 0, refuse), (give, 0, 0, allow)]  # fmt: skip
    pid = only or 0
    for name, numbers in _OTHERS.items() if only else ():
        own = pid if "kill" in name else 0  # 0 is the caller itself, but in kill its whole group
        out += [(equal, 0, 5, numbers[column]), (load, 0, 0, first), (equal, 2, 0, pid),
                (equal, 1, 0, own), (give, 0, 0, refuse), (give, 0, 0, allow)]  # fmt: skip
    if only:
        out += [(equal, 0, 6, _FCNTL[column]), (load, 0, 0, second),
                *((equal, len(_OWNERS) - i, 0, c) for i, c in enumerate(_OWNERS)),
                (give, 0, 0, allow), (give, 0, 0, refuse)]  # fmt: skip
    return [*out, (give, 0, 0, allow)]
