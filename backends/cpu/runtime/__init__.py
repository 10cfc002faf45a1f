"""The native runtime of compiled models: a thread pool in LLVM IR, and how many threads this process may use.

Kernels call `void onnxc_parallel_for(ptr body, ptr context, i64 count, i32 threads)`; its contract heads `pool.ll`.
A shared library that contains the pool must stay loaded (link it with `-z nodelete`): idle workers sleep in its code.
"""

import os
import sys
import threading
from importlib import resources
from math import inf
from pathlib import Path, PurePosixPath

from llvmlite import binding

ENTRY_POINT = "onnxc_parallel_for"

_LINUX_FILES = {
    "x86_64": "linux_x86_64.ll",
    "amd64": "linux_x86_64.ll",
    "aarch64": "linux_aarch64.ll",
    "arm64": "linux_aarch64.ll",
}
_LOADING = threading.Lock()


def pool_module(triple: str) -> str:
    """The LLVM IR text of the thread pool for a target triple.

    64-bit x86 and Arm Linux have threads (POSIX threads and futexes); elsewhere `onnxc_parallel_for` runs the whole
    range on its caller's thread and the module declares no external symbol.
    """
    architecture, *system = triple.split("-")
    linux = any(part.startswith("linux") for part in system) and not system[-1].endswith(
        "32"
    )  # gnux32: 32-bit pointers
    platform = _LINUX_FILES.get(architecture) if linux else None
    texts = resources.files(__name__)
    parts = ["serial.ll"] if platform is None else ["pool.ll", platform]
    return f'target triple = "{triple}"\n\n' + "\n".join((texts / part).read_text(encoding="utf-8") for part in parts)


def load_pool(target_machine: binding.TargetMachine) -> int:
    """Address of this process's `onnxc_parallel_for`, compiled at the first call; `target_machine` must be the host's.

    The address is registered with LLVM under its name, so every MCJIT engine resolves a declaration of it by itself;
    an ORC library imports it with `JITLibraryBuilder.import_symbol(ENTRY_POINT, address)`. May be called by several
    threads at once. Raises RuntimeError where LLVM refuses the module.
    """
    with _LOADING:
        # LLVM's table of symbols is the one record of the pool, so that there cannot be two.
        registered: int | None = binding.address_of_symbol(ENTRY_POINT)
        if registered is not None:
            return registered
        triple: str = target_machine.triple
        module = binding.parse_assembly(pool_module(triple))
        module.verify()
        # A machine of our own: an engine takes its machine over, and the caller still needs theirs.
        machine = binding.Target.from_triple(triple).create_target_machine(opt=2)
        engine = binding.create_mcjit_compiler(module, machine)
        address: int = engine.get_function_address(ENTRY_POINT)
        engine.detach()  # never freed: workers run in its code until the process ends, also while the interpreter exits
        binding.add_symbol(ENTRY_POINT, address)
        return address


def available_threads() -> int:
    """The number of threads that can run at once: the CPUs of the affinity mask, or fewer by the CPU quota; at least 1.

    A fractional quota rounds down: a thread beyond it would halt the others at the end of each scheduling period.
    """
    if sys.platform == "linux":
        return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota())))
    return os.cpu_count() or 1


def cpu_quota(system: Path = Path("/")) -> float:
    """CPUs that the control groups of this process (versions 1 and 2, each with its ancestors) grant it; else infinity.

    `system` is where `/proc` and the mount points are found. The files are those of the kernel's cgroup-v2.rst
    (`cpu.max`) and sched-bwc.rst (`cpu.cfs_quota_us`, `cpu.cfs_period_us`).
    """
    try:
        groups = (system / "proc/self/cgroup").read_text().splitlines()
        mounts = (system / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return inf
    entries = (line.split(":", 2) for line in groups)  # hierarchy:controllers:path; version 2 names no controller
    paths = {name: PurePosixPath(path) for _, names, path in entries for name in names.split(",")}
    quota = inf
    for line in mounts:
        place, _, source = line.partition(" - ")
        root, mount_point = place.split()[3:5]
        kind, _, options = source.split(" ", 2)
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        path = paths.get("" if kind == "cgroup2" else "cpu", PurePosixPath("/"))
        # In a container the path may lie outside of what is mounted; then the mount point is the container's group.
        inside = path.is_relative_to(root) and ".." not in path.parts
        relative = path.relative_to(root) if inside else PurePosixPath()
        top = system / mount_point.lstrip("/")
        for group in [top / relative, *(top / parent for parent in relative.parents)]:
            quota = min(quota, _group_quota(group))
    return quota


def _group_quota(group: Path) -> float:
    """The CPU quota of one control group's folder, infinity without one."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            limit, period = " ".join((group / name).read_text() for name in names).split()
        except OSError:
            continue
        return inf if limit in ("max", "-1") else int(limit) / int(period)
    return inf
