; What the thread pool needs of x86-64 Linux.

declare i64 @syscall(i64, ...)
declare void @llvm.x86.sse2.pause()
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)

define internal i64 @pool.futex(ptr %word, i32 %operation, i32 %value) {
  %result = call i64 (i64, ...) @syscall(i64 202, ptr %word, i32 %operation, i32 %value, ptr null)
  ret i64 %result
}

define internal void @pool.pause() {
  call void @llvm.x86.sse2.pause()
  ret void
}

; Rounding, flush to zero, denormals are zero.
define internal i64 @pool.float_mode() {
  %slot = alloca i32, align 4
  call void @llvm.x86.sse.stmxcsr(ptr %slot)
  %word = load i32, ptr %slot, align 4
  %mode = zext i32 %word to i64
  ret i64 %mode
}

define internal void @pool.set_float_mode(i64 %mode) {
  %slot = alloca i32, align 4
  %word = trunc i64 %mode to i32
  store i32 %word, ptr %slot, align 4
  call void @llvm.x86.sse.ldmxcsr(ptr %slot)
  ret void
}
