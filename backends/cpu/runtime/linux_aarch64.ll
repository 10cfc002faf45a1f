; What the thread pool needs of AArch64 Linux.

declare i64 @syscall(i64, ...)
declare void @llvm.aarch64.isb(i32)
declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)

define internal i64 @pool.futex(ptr %word, i32 %operation, i32 %value) {
  %result = call i64 (i64, ...) @syscall(i64 98, ptr %word, i32 %operation, i32 %value, ptr null)
  ret i64 %result
}

; ISB empties the pipeline, some 10 ns; the architecture's YIELD costs a cycle and would make the spins too short.
define internal void @pool.pause() {
  call void @llvm.aarch64.isb(i32 15)
  ret void
}

; Rounding and flush to zero.
define internal i64 @pool.float_mode() {
  %mode = call i64 @llvm.aarch64.get.fpcr()
  ret i64 %mode
}

define internal void @pool.set_float_mode(i64 %mode) {
  call void @llvm.aarch64.set.fpcr(i64 %mode)
  ret void
}
