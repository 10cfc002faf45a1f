; The thread pool of the CPU backend: one per process, shared by all compiled models.
;   void onnxc_parallel_for(void (*body)(void *context, int64_t begin, int64_t end),
;                           void *context, int64_t count, int32_t threads)
; calls body on disjoint ranges that cover [0, count) and returns when all have finished. At most `threads` threads take
; part, the caller among them. Where ranges begin depends on `threads`, so the body must treat each index on its own:
; then the result does not. Appended is the architecture's file: @pool.pause, futex, float_mode, set_float_mode.
; Each participant has a range of its own, the same part of [0, count) in every job, so that a kernel finds in its
; core's cache what the kernel before it left there (another core's cache gives a quarter of the bytes in a second). It
; claims chunks of that range, then of the others' ranges, until none is left. The caller then closes the job, and waits
; only for workers that had joined it. So one that could not be created, wakes late, or died in a fork costs speed,
; never progress; and a busy pool (another caller's job, or a body that calls again) needs no queue: the second job runs
; on its own caller's thread, and as long as it does, other callers take one worker less: where the threads asked for are
; the processors, no more threads than those want to run.
; Happens-before, for weakly ordered machines; the numbers stand at the instructions below:
;   (1) owner:   release by the caller who leaves -> acquire by the next. Orders the plain pool state between callers.
;   (2) seats:   release store that opens a job -> acquire by the worker who takes a seat: it sees the job, the reset
;                counters, and all that the caller wrote before. Other workers' updates continue the release sequence.
;   (3) pending: release by each leaving worker -> acquire by the caller: it sees what the bodies wrote, and rewrites
;                the job only after every worker has read it. Only read-modify-writes stand between here too.
;   (4) sleep:   "announce oneself, look at the word" against "change the word, look for sleepers": each side stores,
;                then loads another address. Full fences on both sides keep one of the loads from being too early.

%pool.range = type { i64, i64, [6 x i64] } ; the next index to claim, the end; a cache line
%pool.event = type { i32, i32 } ; a futex word, and how many threads sleep on it or are about to
; On separate cache lines by who writes them and when.
@pool.owner = internal global i32 0, align 64   ; process id of the caller whose job runs; 0 when free
@pool.alone = internal global i32 0             ; callers that run a job on their own for want of the pool
@pool.process = internal global i32 0           ; the process in which the workers were started
@pool.workers = internal global i32 0           ; how many were
@pool.body = internal global ptr null, align 64 ; the job; written by its caller before the seats open
@pool.context = internal global ptr null
@pool.chunk = internal global i64 0             ; indices claimed at a time
@pool.mode = internal global i64 0              ; the caller's floating-point mode
@pool.parts = internal global i64 0             ; how many ranges
@pool.ranges = internal global [64 x %pool.range] zeroinitializer, align 64
@pool.seats = internal global i32 0, align 64   ; how many workers may still join; 0 when no job is open
@pool.opened = internal global %pool.event zeroinitializer, align 64  ; counts jobs; idle workers sleep on it
@pool.pending = internal global %pool.event zeroinitializer, align 64 ; workers that left, less (once closed) the joined
@pool.name = internal constant [6 x i8] c"onnxc\00"
; Workers block all signals, so that handlers run on the program's own threads, but those a fault in a body raises in
; place (SIGILL, TRAP, ABRT, BUS, FPE, SEGV, SYS): a crash handler must still report them.
@pool.blocked_signals = internal constant { i64, [15 x i64] } { i64 -1073743097, [15 x i64] zeroinitializer }

declare i32 @getpid()
declare i32 @prctl(i32, ...)
declare i32 @sched_yield()
declare i32 @pthread_attr_init(ptr)
declare i32 @pthread_attr_setdetachstate(ptr, i32)
declare i32 @pthread_attr_setstacksize(ptr, i64)
declare i32 @pthread_attr_destroy(ptr)
declare i32 @pthread_sigmask(i32, ptr, ptr)
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @llvm.smax.i32(i32, i32)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)

; Weak, so that objects of several models link into one program with one pool.
define weak_odr void @onnxc_parallel_for(ptr %body, ptr %context, i64 %count, i32 %threads) {
entry:
  %wide_threads = sext i32 %threads to i64
  %participants = call i64 @llvm.smin.i64(i64 %count, i64 %wide_threads)
  %several = icmp sgt i64 %participants, 1
  br i1 %several, label %check, label %inline
inline:
  call void %body(ptr %context, i64 0, i64 %count)
  ret void
check: ; a holder of another process is a thread that a fork left in the parent: the pool is free here
  %process = call i32 @getpid()
  %holder = load atomic i32, ptr @pool.owner monotonic, align 4
  %busy = icmp eq i32 %holder, %process
  br i1 %busy, label %alone, label %claim
claim:
  %exchange = cmpxchg ptr @pool.owner, i32 %holder, i32 %process acquire monotonic, align 4 ; (1)
  %claimed = extractvalue { i32, i1 } %exchange, 1
  br i1 %claimed, label %own, label %alone
alone:
  %joining = atomicrmw add ptr @pool.alone, i32 1 monotonic, align 4
  call void %body(ptr %context, i64 0, i64 %count)
  %parting = atomicrmw sub ptr @pool.alone, i32 1 monotonic, align 4
  ret void
own:
  %started_in = load i32, ptr @pool.process, align 4
  %current = icmp eq i32 %started_in, %process
  br i1 %current, label %staff, label %reset
reset: ; first use in this process: no worker exists here, whatever the parent's counters say
  store i32 %process, ptr @pool.process, align 4
  store i32 0, ptr @pool.workers, align 4
  store atomic i32 0, ptr @pool.alone monotonic, align 4
  store i32 0, ptr @pool.seats, align 4
  store %pool.event zeroinitializer, ptr @pool.opened, align 4
  store %pool.event zeroinitializer, ptr @pool.pending, align 4
  br label %staff
staff: ; the number is a hint: fewer than 0 where a fork came in the middle of a job
  %others = load atomic i32, ptr @pool.alone monotonic, align 4
  %some_others = call i32 @llvm.smax.i32(i32 %others, i32 0)
  %wide_others = zext i32 %some_others to i64
  %left = sub i64 %wide_threads, %wide_others
  %free_threads = call i64 @llvm.smax.i64(i64 %left, i64 1)
  %parties = call i64 @llvm.smin.i64(i64 %count, i64 %free_threads)
  %all = trunc i64 %parties to i32
  %helpers = sub i32 %all, 1
  %lonely = icmp eq i32 %helpers, 0
  br i1 %lonely, label %leave, label %employ
leave: ; another caller may have the pool
  store atomic i32 0, ptr @pool.owner release, align 4 ; (1)
  br label %alone
employ:
  %workers = call i32 @pool.start_workers(i32 %helpers)
  ; Four to eight chunks a range: a participant that is late (preempted, a slower core) delays by a quarter of its share.
  %parts = call i64 @llvm.smin.i64(i64 %parties, i64 64)
  %shares = mul i64 %parties, 4
  %quotient = udiv i64 %count, %shares
  %chunk = call i64 @llvm.smax.i64(i64 %quotient, i64 1)
  %mode = call i64 @pool.float_mode()
  store ptr %body, ptr @pool.body, align 8
  store ptr %context, ptr @pool.context, align 8
  store i64 %chunk, ptr @pool.chunk, align 8
  store i64 %mode, ptr @pool.mode, align 8
  store i64 %parts, ptr @pool.parts, align 8
  %share = udiv i64 %count, %parts
  %odd = urem i64 %count, %parts
  br label %divide
divide: ; the first ranges have one index more where the division is not even
  %part = phi i64 [ 0, %employ ], [ %next_part, %divide ]
  %begin = phi i64 [ 0, %employ ], [ %end, %divide ]
  %larger = icmp slt i64 %part, %odd
  %one = zext i1 %larger to i64
  %length = add i64 %share, %one
  %end = add i64 %begin, %length
  %next_slot = getelementptr %pool.range, ptr @pool.ranges, i64 %part, i32 0
  %end_slot = getelementptr %pool.range, ptr @pool.ranges, i64 %part, i32 1
  store atomic i64 %begin, ptr %next_slot monotonic, align 8
  store i64 %end, ptr %end_slot, align 8
  %next_part = add i64 %part, 1
  %divided = icmp eq i64 %next_part, %parts
  br i1 %divided, label %open, label %divide
open:
  store atomic i32 0, ptr @pool.pending monotonic, align 4
  store atomic i32 %helpers, ptr @pool.seats release, align 4 ; (2)
  ; Release: a worker that reads the new count sees the open seats, so it cannot sleep through the job on that count.
  %opening = atomicrmw add ptr @pool.opened, i32 1 release, align 4
  %surplus = sub i32 %workers, %helpers
  call void @pool.wake(ptr @pool.opened, i32 %surplus)
  call void @pool.work(i64 0)
  ; No worker joins from here on. Relaxed: closing a little early or late decides only who joins.
  %vacant = atomicrmw xchg ptr @pool.seats, i32 0 monotonic, align 4
  %joined = sub i32 %helpers, %vacant
  %closing = atomicrmw sub ptr @pool.pending, i32 %joined monotonic, align 4
  br label %wait
wait:
  %spins = phi i32 [ 0, %open ], [ %more_spins, %spin ], [ 0, %doze ]
  %pending = load atomic i32, ptr @pool.pending acquire, align 4 ; (3)
  %complete = icmp eq i32 %pending, 0
  br i1 %complete, label %done, label %spin
spin:
  %tired = call i1 @pool.relax(i32 %spins)
  %more_spins = add i32 %spins, 1
  br i1 %tired, label %doze, label %wait
doze:
  call void @pool.sleep(ptr @pool.pending, i32 %pending)
  br label %wait
done:
  store atomic i32 0, ptr @pool.owner release, align 4 ; (1)
  ret void
}

; Claims and runs chunks of the open job until none is left: of this participant's range first, then of the others'.
define internal void @pool.work(i64 %participant) {
entry:
  %body = load ptr, ptr @pool.body, align 8
  %context = load ptr, ptr @pool.context, align 8
  %chunk = load i64, ptr @pool.chunk, align 8
  %parts = load i64, ptr @pool.parts, align 8
  br label %range
range:
  %visited = phi i64 [ 0, %entry ], [ %visits, %leave ]
  %place = add i64 %participant, %visited
  %part = urem i64 %place, %parts
  %next_slot = getelementptr %pool.range, ptr @pool.ranges, i64 %part, i32 0
  %end_slot = getelementptr %pool.range, ptr @pool.ranges, i64 %part, i32 1
  %last = load i64, ptr %end_slot, align 8
  br label %claim
claim:
  %begin = atomicrmw add ptr %next_slot, i64 %chunk monotonic, align 8 ; atomic is enough to claim each index once
  %available = icmp slt i64 %begin, %last
  br i1 %available, label %run, label %leave
run:
  %next = add i64 %begin, %chunk
  %end = call i64 @llvm.smin.i64(i64 %next, i64 %last)
  call void %body(ptr %context, i64 %begin, i64 %end)
  br label %claim
leave:
  %visits = add i64 %visited, 1
  %more = icmp slt i64 %visits, %parts
  br i1 %more, label %range, label %done
done:
  ret void
}

; The life of a worker: awake for the next kernel of the same model, asleep in an idle process.
define internal ptr @pool.worker(ptr %argument) {
entry:
  %number = ptrtoint ptr %argument to i64 ; from 1 on; the caller is participant 0
  %named = call i32 (i32, ...) @prctl(i32 15, ptr @pool.name) ; PR_SET_NAME
  br label %idle
idle: ; the count first, then the seats: a job opened after this look changes the count, and the sleep returns at once
  %opened = load atomic i32, ptr @pool.opened acquire, align 4
  br label %look
look:
  %spins = phi i32 [ 0, %idle ], [ %more_spins, %spin ], [ %spins, %join ]
  %seats = load atomic i32, ptr @pool.seats monotonic, align 4
  %open = icmp sgt i32 %seats, 0
  br i1 %open, label %join, label %spin
spin:
  %tired = call i1 @pool.relax(i32 %spins)
  %more_spins = add i32 %spins, 1
  br i1 %tired, label %doze, label %look
doze:
  call void @pool.sleep(ptr @pool.opened, i32 %opened)
  br label %idle
join: ; success joins the job that is open at that moment, also where the seats were seen in an earlier one
  %fewer = sub i32 %seats, 1
  %exchange = cmpxchg weak ptr @pool.seats, i32 %seats, i32 %fewer acquire monotonic, align 4 ; (2)
  %joined = extractvalue { i32, i1 } %exchange, 1
  br i1 %joined, label %work, label %look
work: ; with the caller's rounding and flushing of denormals: who runs a chunk does not change its bits
  %mode = load i64, ptr @pool.mode, align 8
  call void @pool.set_float_mode(i64 %mode)
  call void @pool.work(i64 %number)
  %pending = atomicrmw add ptr @pool.pending, i32 1 release, align 4 ; (3)
  %last = icmp eq i32 %pending, -1 ; the caller has closed the job, and all others have left
  br i1 %last, label %wake, label %idle
wake:
  call void @pool.wake(ptr @pool.pending, i32 0)
  br label %idle
}

; Starts workers until there are `wanted` or the system refuses; returns how many there are. Called by the owner only.
define internal i32 @pool.start_workers(i32 %wanted) {
entry:
  %thread = alloca i64, align 16
  %attributes = alloca [16 x i64], align 16 ; glibc and musl need 64 bytes at most
  %signals = alloca [16 x i64], align 16    ; the C library's set of 1024, of which Linux has 64
  br label %check
check:
  %workers = load i32, ptr @pool.workers, align 4
  %short = icmp slt i32 %workers, %wanted
  br i1 %short, label %start, label %done
start:
  %initialised = call i32 @pthread_attr_init(ptr %attributes)
  %detached = call i32 @pthread_attr_setdetachstate(ptr %attributes, i32 1) ; PTHREAD_CREATE_DETACHED
  %sized = call i32 @pthread_attr_setstacksize(ptr %attributes, i64 1048576)
  %masked = call i32 @pthread_sigmask(i32 2, ptr @pool.blocked_signals, ptr %signals) ; SIG_SETMASK
  %number = add i32 %workers, 1
  %wide_number = zext i32 %number to i64
  %argument = inttoptr i64 %wide_number to ptr
  %failure = call i32 @pthread_create(ptr %thread, ptr %attributes, ptr @pool.worker, ptr %argument)
  %restored = call i32 @pthread_sigmask(i32 2, ptr %signals, ptr null)
  %destroyed = call i32 @pthread_attr_destroy(ptr %attributes)
  %failed = icmp ne i32 %failure, 0
  br i1 %failed, label %done, label %count
count:
  store i32 %number, ptr @pool.workers, align 4
  br label %check
done:
  ret i32 %workers
}

; One turn of a spin; true when it is time to sleep: after 100 to 200 us (a wake-up costs 30 to 50). Every 64th turn
; yields: whom we wait for may queue for this very CPU (a job of 125 us took 180 us so, with one of two CPUs busy).
define internal i1 @pool.relax(i32 %spins) {
  %phase = and i32 %spins, 63
  %polite = icmp eq i32 %phase, 63
  br i1 %polite, label %yield, label %pause
yield:
  %yielded = call i32 @sched_yield()
  br label %pause
pause:
  call void @pool.pause()
  %tired = icmp sge i32 %spins, 4000
  ret i1 %tired
}

; Sleeps while the event's word is `seen`; may return at any time.
define internal void @pool.sleep(ptr %event, i32 %seen) {
  %sleepers = getelementptr %pool.event, ptr %event, i32 0, i32 1
  %entering = atomicrmw add ptr %sleepers, i32 1 monotonic, align 4
  fence seq_cst ; (4)
  %result = call i64 @pool.futex(ptr %event, i32 128, i32 %seen) ; FUTEX_WAIT | FUTEX_PRIVATE_FLAG
  %leaving = atomicrmw sub ptr %sleepers, i32 1 monotonic, align 4
  ret void
}

; After the event's word has changed: wakes its sleepers but `surplus` of them. No system call where nobody sleeps.
define internal void @pool.wake(ptr %event, i32 %surplus) {
  fence seq_cst ; (4)
  %sleepers = getelementptr %pool.event, ptr %event, i32 0, i32 1
  %asleep = load atomic i32, ptr %sleepers monotonic, align 4
  %number = sub i32 %asleep, %surplus
  %any = icmp sgt i32 %number, 0
  br i1 %any, label %call, label %done
call:
  %result = call i64 @pool.futex(ptr %event, i32 129, i32 %number) ; FUTEX_WAKE | FUTEX_PRIVATE_FLAG
  br label %done
done:
  ret void
}
