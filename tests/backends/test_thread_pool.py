"""The CPU backend's thread pool: every index once, on any number of threads, from any thread, also after a fork."""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding
from onnxc.backends.cpu.runtime import ENTRY_POINT, available_threads, cpu_quota, load_pool, pool_module

PATIENCE = 60.0  # seconds until a test that waits for another thread calls it missing

Range = tuple[int, int]
Body = Callable[[int, int], None]
C_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
C_PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
C_REPEAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64)

COUNTING_MODULE = """
declare void @onnxc_parallel_for(ptr, ptr, i64, i32)

define void @increment(ptr %counters, i64 %begin, i64 %end) {
entry:
  br label %check
check:
  %index = phi i64 [ %begin, %entry ], [ %next, %count ]
  %inside = icmp slt i64 %index, %end
  br i1 %inside, label %count, label %done
count:
  %place = getelementptr i32, ptr %counters, i64 %index
  %old = load i32, ptr %place
  %new = add i32 %old, 1
  store i32 %new, ptr %place
  %next = add i64 %index, 1
  br label %check
done:
  ret void
}

define void @repeat(ptr %counters, i64 %count, i32 %threads, i64 %rounds) {
entry:
  br label %again
again:
  %round = phi i64 [ 0, %entry ], [ %next, %again ]
  call void @onnxc_parallel_for(ptr @increment, ptr %counters, i64 %count, i32 %threads)
  %next = add i64 %round, 1
  %more = icmp slt i64 %next, %rounds
  br i1 %more, label %again, label %done
done:
  ret void
}
"""

linux = pytest.mark.skipif(
    not (sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")), reason="threads: 64-bit Linux only"
)


def host_machine() -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(opt=2)


class Counter:
    """Compiled code that calls the pool: `increment` adds 1 to each counter of its range."""

    def __init__(self) -> None:
        machine = host_machine()
        load_pool(machine)
        self.engine = binding.create_mcjit_compiler(binding.parse_assembly(COUNTING_MODULE), machine)
        self.repeat = C_REPEAT(self.engine.get_function_address("repeat"))

    def counts(self, count: int, threads: int, rounds: int = 1) -> np.ndarray:
        """The counters [count] after `rounds` jobs, and two on either side that no body may touch."""
        counters = np.zeros(count + 4, np.int32)
        self.repeat(counters.ctypes.data + 8, count, threads, rounds)
        assert not counters[:2].any() and not counters[-2:].any()
        return counters[2:-2]


@pytest.fixture(scope="module")
def counter() -> Counter:
    return Counter()


def parallel_for(body: Body, count: int, threads: int) -> None:
    """`onnxc_parallel_for` with a Python body; an exception in the body is raised here."""
    errors: list[BaseException] = []

    def guarded(context: int, begin: int, end: int) -> None:
        try:
            body(begin, end)
        except BaseException as error:
            errors.append(error)

    function = C_BODY(guarded)
    C_PARALLEL_FOR(load_pool(host_machine()))(ctypes.cast(function, ctypes.c_void_p), None, count, threads)
    if errors:
        raise errors[0]


def on_each_thread(threads: int, action: Callable[[], object], asked: int | None = None) -> list[object]:
    """What `action` returns on each of `threads` threads of one job (`asked` for more); fails where fewer take part."""
    together = threading.Barrier(threads)
    results: list[object] = []

    def body(begin: int, end: int) -> None:
        together.wait(PATIENCE)  # one index a thread: none can take a second before each has its first
        results.append(action())

    parallel_for(body, threads, asked or threads)
    return results


def pool_threads() -> list[int]:
    """The kernel's ids of the workers in this process; one that has not run yet is not known by its name."""
    tasks = Path("/proc/self/task")
    return [int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().strip() == "onnxc"]


def status(thread: int, field: str) -> str:
    text = Path(f"/proc/self/task/{thread}/status").read_text()
    return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(field + ":"))


def in_child(action: Callable[[], object]) -> None:
    """Runs `action` in a forked child; fails where it raises or hangs."""
    process = os.fork()
    if process == 0:
        signal.alarm(int(PATIENCE) * 2)
        try:
            action()
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


# --- the work


@pytest.mark.parametrize("threads", [-1, 0, 1, 2, 3, 8, 17])
def test_each_index_runs_once(counter: Counter, threads: int) -> None:
    for count in [0, 1, 2, 3, 7, 8, 9, 31, 64, 65, 1000, 100_003]:
        assert (counter.counts(count, threads) == 1).all(), count


def test_many_jobs_in_a_row(counter: Counter) -> None:
    for count, threads, rounds in [(2, 2, 20_000), (3, 3, 5_000), (40, 4, 5_000), (10_000, 2, 500)]:
        assert (counter.counts(count, threads, rounds) == rounds).all()


@pytest.mark.parametrize(("count", "threads"), [(0, 4), (1, 4), (10, 1), (10, 0), (10, -3)])
def test_work_that_cannot_be_split_is_one_call_on_the_calling_thread(count: int, threads: int) -> None:
    calls: list[tuple[int, int, int]] = []
    parallel_for(lambda begin, end: calls.append((begin, end, threading.get_native_id())), count, threads)
    assert calls == [(0, count, threading.get_native_id())]


@linux
@pytest.mark.parametrize("threads", [2, 3, 6])
def test_ranges_partition_the_count_in_order_of_claim(threads: int) -> None:
    ranges: list[Range] = []
    parallel_for(lambda begin, end: ranges.append((begin, end)), 1001, threads)
    ranges.sort()
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == 1001
    assert 4 * threads <= len(ranges) <= 8 * threads + 1
    assert all(begin < end for begin, end in ranges)


@linux
@pytest.mark.parametrize("threads", [2, 5])
def test_asked_for_threads_work_at_once(threads: int) -> None:
    found = on_each_thread(threads, threading.get_native_id)
    assert len(set(found)) == threads and threading.get_native_id() in found


@linux
def test_no_more_threads_than_asked() -> None:
    on_each_thread(6, threading.get_native_id)  # the pool now has more workers than the next job may use
    found: set[int] = set()

    def body(begin: int, end: int) -> None:
        found.add(threading.get_native_id())
        time.sleep(0.002)

    parallel_for(body, 60, 2)
    assert len(found) <= 2


@linux
def test_the_pool_grows_to_what_is_asked() -> None:
    def workers() -> int:
        return len(os.listdir("/proc/self/task")) - 1  # a forked child begins with one thread

    def child() -> None:
        assert workers() == 0
        on_each_thread(3, threading.get_native_id)
        assert workers() == 2
        on_each_thread(2, threading.get_native_id)
        assert workers() == 2
        parallel_for(lambda begin, end: None, 4, 100)  # four indices employ four threads
        assert workers() == 3

    in_child(child)


# --- several callers


def test_nested_call_runs_inline() -> None:
    inner: list[tuple[int, int, int]] = []
    outer: list[int] = []

    def body(begin: int, end: int) -> None:
        thread = threading.get_native_id()
        outer.extend([thread] * (end - begin))
        parallel_for(lambda low, high: inner.append((low, high, threading.get_native_id() - thread)), 50, 4)

    parallel_for(body, 3, 3)
    assert len(outer) == 3
    assert inner == [(0, 50, 0)] * len(inner) and inner


@linux
def test_a_caller_who_finds_the_pool_busy_works_alone() -> None:
    started, finish = threading.Event(), threading.Event()

    def occupy(begin: int, end: int) -> None:
        started.set()
        assert finish.wait(PATIENCE)

    occupant = threading.Thread(target=parallel_for, args=(occupy, 2, 2))
    occupant.start()
    try:
        assert started.wait(PATIENCE)
        calls: list[tuple[int, int, int]] = []
        parallel_for(lambda begin, end: calls.append((begin, end, threading.get_native_id())), 100, 2)
        assert calls == [(0, 100, threading.get_native_id())]
    finally:
        finish.set()
        occupant.join()
    assert len(set(on_each_thread(2, threading.get_native_id))) == 2  # and it is free again


@linux
def test_a_caller_who_works_alone_counts_as_a_thread() -> None:
    """Two threads asked for, and one runs elsewhere: the next job does without the worker."""
    events = {name: threading.Event() for name in ("first", "first may end", "second", "second may end")}

    def held(name: str) -> Body:
        def body(begin: int, end: int) -> None:
            events[name].set()
            assert events[f"{name} may end"].wait(PATIENCE)

        return body

    callers = [threading.Thread(target=parallel_for, args=(held(name), 2, 2)) for name in ("first", "second")]
    try:
        callers[0].start()
        assert events["first"].wait(PATIENCE)
        callers[1].start()  # the pool is busy: it works alone
        assert events["second"].wait(PATIENCE)
        events["first may end"].set()
        callers[0].join()
        calls: list[tuple[int, int, int]] = []
        parallel_for(lambda begin, end: calls.append((begin, end, threading.get_native_id())), 100, 2)
        assert calls == [(0, 100, threading.get_native_id())]
        assert len(set(on_each_thread(2, threading.get_native_id, asked=3))) == 2
    finally:
        for event in events.values():
            event.set()
        for caller in callers:
            if caller.ident is not None:
                caller.join()
    assert len(set(on_each_thread(2, threading.get_native_id))) == 2


def test_concurrent_callers(counter: Counter) -> None:
    results: dict[int, np.ndarray] = {}

    def call(caller: int) -> None:
        results[caller] = counter.counts(100 + caller, 2 + caller % 3, rounds=3_000)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert sorted(results) == list(range(6))
    assert all((counts == 3_000).all() for counts in results.values())


# --- fork


@linux
def test_after_fork_the_child_has_its_own_workers(counter: Counter) -> None:
    on_each_thread(3, threading.get_native_id)

    def child() -> None:
        assert pool_threads() == []
        assert (counter.counts(1000, 3, rounds=100) == 100).all()
        assert len(set(on_each_thread(3, threading.get_native_id))) == 3
        in_child(lambda: on_each_thread(2, threading.get_native_id))

    in_child(child)
    assert len(set(on_each_thread(3, threading.get_native_id))) == 3


@linux
def test_fork_while_another_thread_holds_the_pool(counter: Counter) -> None:
    started, finish = threading.Event(), threading.Event()

    def occupy(begin: int, end: int) -> None:
        started.set()
        assert finish.wait(PATIENCE)

    occupant = threading.Thread(target=parallel_for, args=(occupy, 3, 3))
    occupant.start()
    try:
        assert started.wait(PATIENCE)
        in_child(lambda: on_each_thread(3, threading.get_native_id))
    finally:
        finish.set()
        occupant.join()
    assert (counter.counts(1000, 3, rounds=100) == 100).all()


# --- workers as good citizens


@linux
def test_idle_workers_do_not_run(counter: Counter) -> None:
    on_each_thread(4, threading.get_native_id)
    counter.counts(1000, 4, rounds=100)
    workers = pool_threads()
    assert len(workers) >= 3

    def switches() -> list[tuple[str, str]]:
        return [(status(worker, "voluntary_ctxt_switches"), status(worker, "State")) for worker in workers]

    limit = time.monotonic() + PATIENCE
    while any(not state.startswith("S") for _, state in switches()):  # the spin before the sleep
        assert time.monotonic() < limit
        time.sleep(0.01)
    before, burnt = switches(), time.process_time()
    time.sleep(0.3)
    assert switches() == before
    assert time.process_time() - burnt < 0.1


@linux
def test_workers_take_faults_but_no_signals() -> None:
    on_each_thread(2, threading.get_native_id)
    for worker in pool_threads():
        blocked = int(status(worker, "SigBlk"), 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1):
            assert blocked >> (number - 1) & 1, number
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL):
            assert not blocked >> (number - 1) & 1, number
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()  # the caller's own mask is as before


@linux
def test_workers_round_as_their_caller_does() -> None:
    library = ctypes.CDLL(None)
    upward = {"x86_64": 0x800, "aarch64": 0x400000}[os.uname().machine]  # FE_UPWARD
    nearest = library.fegetround()
    operands = [1.0, 3.0]

    def third() -> float:
        return operands[0] / operands[1]

    rounded = third()
    assert on_each_thread(3, third) == [rounded] * 3
    assert library.fesetround(upward) == 0
    try:
        rounded_up, on_workers = third(), on_each_thread(3, third)
    finally:
        library.fesetround(nearest)
    assert rounded_up > rounded
    assert on_workers == [rounded_up] * 3
    assert on_each_thread(3, third) == [rounded] * 3


# --- loading


def test_one_pool_for_all_engines_and_threads() -> None:
    machine = host_machine()
    addresses: list[int] = []
    loaders = [threading.Thread(target=lambda: addresses.append(load_pool(machine))) for _ in range(4)]
    for thread in loaders:
        thread.start()
    for thread in loaders:
        thread.join()
    assert len(set(addresses)) == 1 and len(addresses) == 4
    assert binding.address_of_symbol(ENTRY_POINT) == addresses[0]
    assert machine.triple  # still ours

    first, second = Counter(), Counter()
    assert (first.counts(500, 2) == 1).all() and (second.counts(500, 2) == 1).all()


def test_an_orc_library_imports_the_pool() -> None:
    machine = host_machine()
    address = load_pool(machine)
    compiler = binding.create_lljit_compiler(machine)
    builder = binding.JITLibraryBuilder().add_ir(COUNTING_MODULE).export_symbol("repeat")
    library = builder.import_symbol(ENTRY_POINT, address).link(compiler, "model")
    counters = np.zeros(300, np.int32)
    C_REPEAT(library["repeat"])(counters.ctypes.data, 300, 3, 7)
    assert (counters == 7).all()


POSIX = {
    "getpid",
    "prctl",
    "sched_yield",
    "syscall",
    "pthread_create",
    "pthread_sigmask",
    "pthread_attr_init",
    "pthread_attr_destroy",
    "pthread_attr_setdetachstate",
    "pthread_attr_setstacksize",
}


@pytest.mark.parametrize(
    ("triple", "symbols"),
    [
        ("x86_64-unknown-linux-gnu", POSIX),
        ("x86_64-linux-musl", POSIX),
        ("aarch64-unknown-linux-gnu", POSIX),
        ("aarch64-linux-android", POSIX),
        ("x86_64-unknown-linux-gnux32", set()),
        ("riscv64-unknown-linux-gnu", set()),
        ("x86_64-pc-windows-msvc", set()),
        ("arm64-apple-macosx", set()),
        ("wasm32-unknown-unknown", set()),
    ],
)
def test_module_of_each_target_is_valid_and_needs_only_libc(triple: str, symbols: set[str]) -> None:
    module = binding.parse_assembly(pool_module(triple))
    module.verify()
    assert module.triple == triple
    external = {function.name for function in module.functions if function.is_declaration}
    assert {name for name in external if not name.startswith("llvm.")} == symbols
    assert [f.name for f in module.functions if not f.is_declaration and "internal" not in f.linkage.name] == [
        ENTRY_POINT
    ]

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(opt=2, reloc="pic", codemodel="default")
    assert len(machine.emit_object(module)) > 100


def test_aarch64_keeps_the_orders_that_weak_memory_needs() -> None:
    """Acquire, release and full fences survive to the machine code; each is named in the head of pool.ll."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu"
    machine = binding.Target.from_triple(triple).create_target_machine(opt=3, features="+lse")
    assembly = machine.emit_assembly(binding.parse_assembly(pool_module(triple)))
    code = dict(re.findall(r"^([\w.]+):\n(.*?)^\.Lfunc_end", assembly, re.MULTILINE | re.DOTALL))
    entry, worker = code["onnxc_parallel_for"], code["pool.worker"]
    assert "casa\t" in entry and entry.count("stlr\t") == 3  # owner taken; seats opened, owner left (twice)
    assert re.search(r"(ldaddl|staddl)\t", entry) and re.search(r"ldap?r\t", entry)  # opened; pending seen
    assert "casa\t" in worker and "ldaddl\t" in worker  # seat taken; pending left
    assert "dmb\tish\n" in code["pool.sleep"] and "dmb\tish\n" in code["pool.wake"]


# --- how many threads


def test_available_threads_are_within_the_machine() -> None:
    assert 1 <= available_threads() <= (os.cpu_count() or 1)


@linux
def test_available_threads_follow_the_affinity() -> None:
    def child() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        assert available_threads() == 1

    in_child(child)


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = """\
31 30 0:27 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /proc rw - proc proc rw"""


def fake_system(folder: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


def test_quota_of_cgroup_2_is_the_least_of_the_ancestors(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/cpu.max": "150000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "300000 100000",
        "sys/fs/cgroup/a/b/c/cpu.max": "max 100000",
    }
    assert cpu_quota(fake_system(tmp_path, V2_MOUNT, "0::/a/b/c", files)) == 1.5


@pytest.mark.parametrize(
    ("root", "path", "quota"),
    [("/", "/docker/x", 2.0), ("/docker/x", "/docker/x", 4.0), ("/docker/x", "/../y", 4.0), ("/", "/", 4.0)],
)
def test_quota_of_cgroup_1(tmp_path: Path, root: str, path: str, quota: float) -> None:
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "50000",
    }
    groups = f"5:memory:/m\n4:cpu,cpuacct:{path}\n0::/"
    assert cpu_quota(fake_system(tmp_path, V1_MOUNTS.format(root=root), groups, files)) == quota


def test_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == float("inf")  # no /proc
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    assert cpu_quota(fake_system(tmp_path, V1_MOUNTS.format(root="/"), "4:cpu,cpuacct:/", files)) == float("inf")
