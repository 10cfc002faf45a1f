; The same interface where the thread pool is not available: all indices on the caller's thread.
define weak_odr void @onnxc_parallel_for(ptr %body, ptr %context, i64 %count, i32 %threads) {
  call void %body(ptr %context, i64 0, i64 %count)
  ret void
}
