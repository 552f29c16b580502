"""The system calls that a boxed Python may make, as a classic BPF program for `bwrap --seccomp`.

An allow-list: whatever is not named here, known or yet to be invented, answers ENOSYS, which the C library takes as an
old kernel and works around (clone3 -> clone). Left out on purpose: fork and every other way to a second process,
sockets, namespaces, mounts, ptrace, bpf, perf, keys, io_uring, userfaultfd, inotify, and the shared memory that
RLIMIT_AS does not see (memfd, System V). A call of a foreign architecture (int 0x80, x32) ends the process, and so does
kill, with which a process in a box of its own could only end itself.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux.
"""

import errno
import platform
import struct

from mixlora.errors import SandboxError

# name, number on x86_64, number on aarch64 (- where that machine has none)
ALLOWED = """
    read 0 63; write 1 64; close 3 57; lseek 8 62; pread64 17 67; pwrite64 18 68; readv 19 65; writev 20 66; open 2 -;
    openat 257 56; stat 4 -; fstat 5 80; lstat 6 -; newfstatat 262 79; statx 332 291; access 21 -; faccessat 269 48;
    faccessat2 439 439; readlink 89 -; readlinkat 267 78; getdents64 217 61; getcwd 79 17; chdir 80 49; fchdir 81 50;
    mkdir 83 -; mkdirat 258 34; rmdir 84 -; unlink 87 -; unlinkat 263 35; rename 82 -; renameat 264 38;
    renameat2 316 276; link 86 -; linkat 265 37; symlink 88 -; symlinkat 266 36; chmod 90 -; fchmod 91 52;
    fchmodat 268 53; fsync 74 82; fdatasync 75 83; truncate 76 45; ftruncate 77 46; fallocate 285 47;
    fadvise64 221 223; utimensat 280 88; umask 95 166; flock 73 32; statfs 137 43; fstatfs 138 44; fcntl 72 25;
    dup 32 23; dup2 33 -; dup3 292 24; close_range 436 436; pipe 22 -; pipe2 293 59; poll 7 -; ppoll 271 73;
    select 23 -; pselect6 270 72; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -; epoll_pwait 281 22;
    copy_file_range 326 285; sendfile 40 71; sendto 44 206; recvfrom 45 207;

    mmap 9 222; munmap 11 215; mprotect 10 226; mremap 25 216; madvise 28 233; brk 12 214;

    clock_gettime 228 113; clock_getres 229 114; clock_nanosleep 230 115; nanosleep 35 101; gettimeofday 96 169;
    time 201 -; times 100 153; getitimer 36 102; setitimer 38 103; alarm 37 -;

    rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigpending 127 136; rt_sigsuspend 130 133;
    rt_sigtimedwait 128 137; sigaltstack 131 132; pause 34 -; restart_syscall 219 128;

    execve 59 221; exit 60 93; exit_group 231 94; wait4 61 260; waitid 247 95; getpid 39 172; getppid 110 173;
    gettid 186 178; getuid 102 174; geteuid 107 175; getgid 104 176; getegid 108 177; getgroups 115 158;
    getresuid 118 148; getresgid 120 150; getpgrp 111 -; getpgid 121 155; getsid 124 156; uname 63 160;
    sysinfo 99 179; getrlimit 97 163; setrlimit 160 164; prlimit64 302 261; getrusage 98 165; getpriority 140 141;
    sched_yield 24 124; sched_getaffinity 204 123; sched_getparam 143 121; sched_getscheduler 145 120;
    sched_get_priority_max 146 125; sched_get_priority_min 147 126; getcpu 309 168; futex 202 98;
    set_tid_address 218 96; set_robust_list 273 99; get_robust_list 274 100; rseq 334 293; membarrier 324 283;
    arch_prctl 158 -; getrandom 318 278
"""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of a number, AUDIT_ARCH of linux/audit.h
CLONE, IOCTL, SOCKETPAIR, FORKS = (56, 220), (16, 29), (53, 199), ((57, 58), ())  # numbers on either machine
KILLS = ((62, 200, 234), (129, 130, 131))  # kill, tkill, tgkill

CLONE_THREAD = 0x00010000
CLONE_NEW_NAMESPACE = 0x7E020080  # every CLONE_NEW* of linux/sched.h
TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x5450, 0x5451, 0x5421)  # TCGETS TIOCGWINSZ FIONCLEX FIOCLEX FIONBIO
AF_UNIX = 1  # a pair of connected ends within one process, which asyncio's loop wakes itself with

LOAD, EQUALS, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT_0, ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data; low words of arguments
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
X32 = 0x40000000

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def numbers(column: int) -> dict[str, int]:
    """Allowed name -> number for a column of the table: 0 x86_64, 1 aarch64."""
    rows = [row.split() for row in ALLOWED.split(";")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def allow_if(number: int, offset: int, tests: list[Instruction], refusal: int) -> list[Instruction]:
    """For one call: load the argument at `offset`, allow if `tests` fall through to allow, else answer `refusal`.

    A test jumps by 0 to the next instruction and by -1 (here only) to the refusal at the end.
    """
    body: list[Instruction] = [(LOAD, 0, 0, offset), *tests, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | refusal)]
    end = len(body) - 1
    resolved = [
        (code, *(end - at - 1 if jump == -1 else jump for jump in (true, false)), constant)
        for at, (code, true, false, constant) in enumerate(body)
    ]
    return [(EQUALS, 0, len(body), number), *resolved]  # type: ignore[list-item]


def one_of(values: tuple[int, ...]) -> list[Instruction]:
    """Fall through if the loaded word is one of `values`, refuse otherwise."""
    last = len(values) - 1
    return [(EQUALS, last - at, -1 if at == last else 0, value) for at, value in enumerate(values)]


def instructions(machine: str) -> list[Instruction]:
    """The filter of one machine, as it runs: architecture, plain calls, then calls with a look at an argument."""
    if machine not in MACHINES:
        raise SandboxError(
            f"the sandbox has a system call filter for {' and '.join(MACHINES)}, not for this machine ({machine}). "
            "Score the code on one of those."
        )
    column, architecture = MACHINES[machine]
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUALS, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for number in numbers(column).values():
        program += [(EQUALS, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for number in KILLS[column]:  # a pid 1 is deaf to its own signals: who sends one ends, as outside of a box
        program += [(EQUALS, 0, 1, number), (RETURN, 0, 0, KILL)]
    for number in FORKS[column]:
        program += [(EQUALS, 0, 1, number), (RETURN, 0, 0, ERRNO | errno.EPERM)]
    thread_only: list[Instruction] = [(ANY_BIT, 0, -1, CLONE_THREAD), (ANY_BIT, -1, 0, CLONE_NEW_NAMESPACE)]
    program += allow_if(CLONE[column], ARGUMENT_0, thread_only, errno.EPERM)
    program += allow_if(IOCTL[column], ARGUMENT_1, one_of(TERMINAL_QUESTIONS), errno.ENOTTY)
    program += allow_if(SOCKETPAIR[column], ARGUMENT_0, one_of((AF_UNIX,)), errno.EACCES)
    return [*program, (RETURN, 0, 0, ERRNO | errno.ENOSYS)]


def program_bytes(machine: str | None = None) -> bytes:
    """The filter as `struct sock_filter[]` in this machine's byte order, ready for `bwrap --seccomp`."""
    machine = machine or platform.machine()
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions(machine))
