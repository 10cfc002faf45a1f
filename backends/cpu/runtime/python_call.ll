; Calls of compiled models from CPython without a line of Python between: builtin functions (METH_FASTCALL) over numpy's
; arrays. `python_call.py` describes a model to them, and tells when they can be used at all.
;   run(executable, {name: array}) -> {name: array}      call(executable, (array, ...)) -> array or (array, ...)
;   take() -> address of a workspace that is free, or 0   give(address)
; Whatever is not plain (an argument to be converted or refused, sizes not met before, no workspace of that size) is left
; to the Python function %model.slow, called with the same arguments, which makes of it an error or a result.
; All lists are touched under the interpreter's lock only; a workspace that was taken belongs to its taker alone. The lock
; is let go while a model runs for long (%setting.releases).

; numpy's PyArrayObject behind its head: the stable ABI that every extension module is compiled against.
%array = type { i64, ptr, ptr, i32, ptr, ptr, ptr, ptr, i32 }
;       count, type, data, axes, sizes, strides, base, descriptor, flags
%port = type { ptr, ptr, i64 } ; its name (str), numpy's one descriptor of its type, its rank
; A setting of the sizes: the next one; the sizes of all inputs, then of all outputs; the symbols' values and how many;
; bytes of the arena; whether the lock is let go.
%setting = type { ptr, ptr, ptr, i64, i64, i64 }
; What one call at a time needs: the next free one; the code's table of addresses; the symbols' memory; the arena's bytes;
; the words that checks write and how many; places for the objects of a call; threads.
%workspace = type { ptr, ptr, ptr, i64, ptr, i64, ptr, i64 }
; settings, free workspaces, ports (inputs, then outputs), how many inputs, how many outputs, code, numpy's array type,
; dict, the slow functions of `run` and of `call`
%model = type { ptr, ptr, ptr, i64, i64, ptr, ptr, ptr, ptr, ptr }

declare void @Py_IncRef(ptr)
declare void @Py_DecRef(ptr)
declare void @PyErr_Clear()
declare i32 @PyErr_BadArgument()
declare ptr @PyDict_New()
declare i64 @PyDict_Size(ptr)
declare ptr @PyDict_GetItemWithError(ptr, ptr)
declare i32 @PyDict_SetItem(ptr, ptr, ptr)
declare ptr @PyTuple_New(i64)
declare i64 @PyTuple_Size(ptr)
declare ptr @PyTuple_GetItem(ptr, i64)
declare i32 @PyTuple_SetItem(ptr, i64, ptr)
declare ptr @PyLong_FromVoidPtr(ptr)
declare ptr @PyLong_AsVoidPtr(ptr)
declare ptr @PyObject_CallFunctionObjArgs(ptr, ...)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare ptr @PyArray_Empty(i32, ptr, ptr, i32)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

; The model's description is the data of the numpy array that the function is bound to.
define internal ptr @model_of(ptr %self) alwaysinline {
  %place = getelementptr inbounds %array, ptr %self, i64 0, i32 2
  %model = load ptr, ptr %place
  ret ptr %model
}

define internal ptr @pop(ptr %model) alwaysinline {
entry:
  %place = getelementptr inbounds %model, ptr %model, i64 0, i32 1
  %workspace = load ptr, ptr %place
  %none = icmp eq ptr %workspace, null
  br i1 %none, label %done, label %unlink
unlink:
  %next = load ptr, ptr %workspace
  store ptr %next, ptr %place
  br label %done
done:
  ret ptr %workspace
}

define internal void @push(ptr %model, ptr %workspace) alwaysinline {
  %place = getelementptr inbounds %model, ptr %model, i64 0, i32 1
  %next = load ptr, ptr %place
  store ptr %next, ptr %workspace
  store ptr %workspace, ptr %place
  ret void
}

define internal void @release(ptr %objects, i64 %count) {
entry:
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %loop, label %done
loop:
  %i = phi i64 [ 0, %entry ], [ %following, %loop ]
  %place = getelementptr inbounds ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %place
  call void @Py_DecRef(ptr %object)
  %following = add i64 %i, 1
  %more = icmp slt i64 %following, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}

; Whether an object is an array of exactly this type and rank, C-contiguous and aligned.
define internal i1 @is_plain(ptr %object, ptr %type, ptr %port) alwaysinline {
entry:
  %type_place = getelementptr inbounds %array, ptr %object, i64 0, i32 1
  %object_type = load ptr, ptr %type_place
  %is_array = icmp eq ptr %object_type, %type
  br i1 %is_array, label %array, label %done
array:
  %descriptor_place = getelementptr inbounds %array, ptr %object, i64 0, i32 7
  %descriptor = load ptr, ptr %descriptor_place
  %wanted_place = getelementptr inbounds %port, ptr %port, i64 0, i32 1
  %wanted = load ptr, ptr %wanted_place
  %same_type = icmp eq ptr %descriptor, %wanted
  %axes_place = getelementptr inbounds %array, ptr %object, i64 0, i32 3
  %axes = load i32, ptr %axes_place
  %rank_place = getelementptr inbounds %port, ptr %port, i64 0, i32 2
  %rank = load i64, ptr %rank_place
  %wide_axes = sext i32 %axes to i64
  %same_rank = icmp eq i64 %wide_axes, %rank
  %flags_place = getelementptr inbounds %array, ptr %object, i64 0, i32 8
  %flags = load i32, ptr %flags_place
  %good_flags = and i32 %flags, 257 ; NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_ALIGNED
  %good = icmp eq i32 %good_flags, 257
  %fits = and i1 %same_type, %same_rank
  %all = and i1 %fits, %good
  br label %done
done:
  %result = phi i1 [ false, %entry ], [ %all, %array ]
  ret i1 %result
}

; The setting with the sizes of these inputs, or null.
define internal ptr @setting_of(ptr %model, ptr %objects, i64 %inputs) alwaysinline {
entry:
  %ports_place = getelementptr inbounds %model, ptr %model, i64 0, i32 2
  %ports = load ptr, ptr %ports_place
  %first = load ptr, ptr %model
  br label %try
try:
  %setting = phi ptr [ %first, %entry ], [ %next, %other ]
  %none = icmp eq ptr %setting, null
  br i1 %none, label %done, label %compare
compare:
  %sizes_place = getelementptr inbounds %setting, ptr %setting, i64 0, i32 1
  %sizes = load ptr, ptr %sizes_place
  br label %input
input:
  %i = phi i64 [ 0, %compare ], [ %following, %equal ]
  %at = phi ptr [ %sizes, %compare ], [ %behind, %equal ]
  %inside = icmp slt i64 %i, %inputs
  br i1 %inside, label %axes, label %done
axes:
  %rank_place = getelementptr inbounds %port, ptr %ports, i64 %i, i32 2
  %rank = load i64, ptr %rank_place
  %object_place = getelementptr inbounds ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %object_place
  %shape_place = getelementptr inbounds %array, ptr %object, i64 0, i32 4
  %shape = load ptr, ptr %shape_place
  br label %axis
axis:
  %d = phi i64 [ 0, %axes ], [ %next_axis, %size ]
  %left = icmp slt i64 %d, %rank
  br i1 %left, label %size, label %equal
size:
  %found_place = getelementptr inbounds i64, ptr %shape, i64 %d
  %found = load i64, ptr %found_place
  %known_place = getelementptr inbounds i64, ptr %at, i64 %d
  %known = load i64, ptr %known_place
  %next_axis = add i64 %d, 1
  %same = icmp eq i64 %found, %known
  br i1 %same, label %axis, label %other
equal:
  %behind = getelementptr inbounds i64, ptr %at, i64 %rank
  %following = add i64 %i, 1
  br label %input
other:
  %next = load ptr, ptr %setting
  br label %try
done:
  ret ptr %setting
}

define internal ptr @invoke(ptr %self, ptr %executable, ptr %argument, i1 %by_name) alwaysinline {
entry:
  %model = call ptr @model_of(ptr %self)
  %inputs_place = getelementptr inbounds %model, ptr %model, i64 0, i32 3
  %inputs = load i64, ptr %inputs_place
  %outputs_place = getelementptr inbounds %model, ptr %model, i64 0, i32 4
  %outputs = load i64, ptr %outputs_place
  %ports_place = getelementptr inbounds %model, ptr %model, i64 0, i32 2
  %ports = load ptr, ptr %ports_place
  %array_type_place = getelementptr inbounds %model, ptr %model, i64 0, i32 6
  %array_type = load ptr, ptr %array_type_place
  br i1 %by_name, label %named, label %listed
named:
  %dict_place = getelementptr inbounds %model, ptr %model, i64 0, i32 7
  %dict_type = load ptr, ptr %dict_place
  %argument_type_place = getelementptr inbounds %array, ptr %argument, i64 0, i32 1
  %argument_type = load ptr, ptr %argument_type_place
  %is_dict = icmp eq ptr %argument_type, %dict_type
  br i1 %is_dict, label %count_named, label %slow
count_named:
  %named_count = call i64 @PyDict_Size(ptr %argument)
  br label %counted
listed:
  %listed_count = call i64 @PyTuple_Size(ptr %argument)
  br label %counted
counted:
  %given = phi i64 [ %named_count, %count_named ], [ %listed_count, %listed ]
  %all_given = icmp eq i64 %given, %inputs
  br i1 %all_given, label %open, label %slow
open:
  %workspace = call ptr @pop(ptr %model)
  %none = icmp eq ptr %workspace, null
  br i1 %none, label %slow, label %begin
begin:
  %table_place = getelementptr inbounds %workspace, ptr %workspace, i64 0, i32 1
  %table = load ptr, ptr %table_place
  %objects_place = getelementptr inbounds %workspace, ptr %workspace, i64 0, i32 6
  %objects = load ptr, ptr %objects_place
  br label %input

input: ; the objects of inputs before i are held: another thread may take them out of the dict
  %i = phi i64 [ 0, %begin ], [ %next_input, %keep ]
  %more_inputs = icmp slt i64 %i, %inputs
  br i1 %more_inputs, label %get, label %sized
get:
  %port = getelementptr inbounds %port, ptr %ports, i64 %i
  br i1 %by_name, label %get_named, label %get_listed
get_named:
  %name = load ptr, ptr %port
  %named_object = call ptr @PyDict_GetItemWithError(ptr %argument, ptr %name)
  br label %got
get_listed:
  %listed_object = call ptr @PyTuple_GetItem(ptr %argument, i64 %i)
  br label %got
got:
  %object = phi ptr [ %named_object, %get_named ], [ %listed_object, %get_listed ]
  %missing = icmp eq ptr %object, null
  br i1 %missing, label %clear, label %check
clear:
  call void @PyErr_Clear()
  br label %back
check:
  %plain = call i1 @is_plain(ptr %object, ptr %array_type, ptr %port)
  br i1 %plain, label %keep, label %back
keep:
  call void @Py_IncRef(ptr %object)
  %object_place = getelementptr inbounds ptr, ptr %objects, i64 %i
  store ptr %object, ptr %object_place
  %data_place = getelementptr inbounds %array, ptr %object, i64 0, i32 2
  %data = load ptr, ptr %data_place
  %entry_place = getelementptr inbounds ptr, ptr %table, i64 %i
  store ptr %data, ptr %entry_place
  %next_input = add i64 %i, 1
  br label %input

sized:
  %setting = call ptr @setting_of(ptr %model, ptr %objects, i64 %inputs)
  %unknown = icmp eq ptr %setting, null
  br i1 %unknown, label %back, label %room
room:
  %needed_place = getelementptr inbounds %setting, ptr %setting, i64 0, i32 4
  %needed = load i64, ptr %needed_place
  %arena_place = getelementptr inbounds %workspace, ptr %workspace, i64 0, i32 3
  %arena = load i64, ptr %arena_place
  %fits = icmp sge i64 %arena, %needed
  br i1 %fits, label %bind, label %back
bind: ; the setting may be forgotten as soon as the lock is let go
  %releases_place = getelementptr inbounds %setting, ptr %setting, i64 0, i32 5
  %releases = load i64, ptr %releases_place
  %count_place = getelementptr inbounds %setting, ptr %setting, i64 0, i32 3
  %symbol_count = load i64, ptr %count_place
  %symbol_bytes = shl i64 %symbol_count, 3
  %values_place = getelementptr inbounds %setting, ptr %setting, i64 0, i32 2
  %values = load ptr, ptr %values_place
  %symbols_place = getelementptr inbounds %workspace, ptr %workspace, i64 0, i32 2
  %symbols = load ptr, ptr %symbols_place
  call void @llvm.memcpy.p0.p0.i64(ptr %symbols, ptr %values, i64 %symbol_bytes, i1 false)
  %sizes_place = getelementptr inbounds %setting, ptr %setting, i64 0, i32 1
  %sizes = load ptr, ptr %sizes_place
  %input_ranks = call i64 @ranks(ptr %ports, i64 %inputs)
  %output_sizes = getelementptr inbounds i64, ptr %sizes, i64 %input_ranks
  %objects_end = add i64 %inputs, %outputs
  br label %output

output:
  %j = phi i64 [ %inputs, %bind ], [ %next_output, %made ]
  %shape = phi ptr [ %output_sizes, %bind ], [ %next_shape, %made ]
  %more_outputs = icmp slt i64 %j, %objects_end
  br i1 %more_outputs, label %make, label %ready
make:
  %output_type_place = getelementptr inbounds %port, ptr %ports, i64 %j, i32 1
  %output_type = load ptr, ptr %output_type_place
  %output_rank_place = getelementptr inbounds %port, ptr %ports, i64 %j, i32 2
  %output_rank = load i64, ptr %output_rank_place
  %output_axes = trunc i64 %output_rank to i32
  call void @Py_IncRef(ptr %output_type) ; PyArray_Empty takes it over
  %result = call ptr @PyArray_Empty(i32 %output_axes, ptr %shape, ptr %output_type, i32 0)
  %refused = icmp eq ptr %result, null
  br i1 %refused, label %no_memory, label %made
made:
  %result_place = getelementptr inbounds ptr, ptr %objects, i64 %j
  store ptr %result, ptr %result_place
  %result_data_place = getelementptr inbounds %array, ptr %result, i64 0, i32 2
  %result_data = load ptr, ptr %result_data_place
  %result_entry = getelementptr inbounds ptr, ptr %table, i64 %j
  store ptr %result_data, ptr %result_entry
  %next_output = add i64 %j, 1
  %next_shape = getelementptr inbounds i64, ptr %shape, i64 %output_rank
  br label %output
no_memory:
  call void @release(ptr %objects, i64 %j)
  call void @push(ptr %model, ptr %workspace)
  ret ptr null

ready:
  %code_place = getelementptr inbounds %model, ptr %model, i64 0, i32 5
  %code = load ptr, ptr %code_place
  %threads_place = getelementptr inbounds %workspace, ptr %workspace, i64 0, i32 7
  %threads = load i64, ptr %threads_place
  %long = icmp ne i64 %releases, 0
  br i1 %long, label %unlocked, label %locked
unlocked:
  %state = call ptr @PyEval_SaveThread()
  call void %code(ptr %table, ptr %symbols, i64 %threads)
  call void @PyEval_RestoreThread(ptr %state)
  br label %ran
locked:
  call void %code(ptr %table, ptr %symbols, i64 %threads)
  br label %ran
ran:
  %words_place = getelementptr inbounds %workspace, ptr %workspace, i64 0, i32 5
  %words = load i64, ptr %words_place
  %checked = icmp ne i64 %words, 0
  br i1 %checked, label %look, label %finish
look:
  %faults_place = getelementptr inbounds %workspace, ptr %workspace, i64 0, i32 4
  %faults = load ptr, ptr %faults_place
  %fault = load i64, ptr %faults
  %faulty = icmp ne i64 %fault, 0
  br i1 %faulty, label %wipe, label %finish
wipe: ; the slow function finds the same, and tells it
  %fault_bytes = shl i64 %words, 3
  call void @llvm.memset.p0.i64(ptr %faults, i8 0, i64 %fault_bytes, i1 false)
  call void @release(ptr %objects, i64 %objects_end)
  call void @push(ptr %model, ptr %workspace)
  br label %slow

finish:
  call void @release(ptr %objects, i64 %inputs)
  %results = getelementptr inbounds ptr, ptr %objects, i64 %inputs
  %one = icmp eq i64 %outputs, 1
  br i1 %by_name, label %dict, label %positional
positional:
  br i1 %one, label %single, label %tuple
single:
  %only = load ptr, ptr %results
  call void @push(ptr %model, ptr %workspace)
  ret ptr %only
tuple:
  %tuple_result = call ptr @PyTuple_New(i64 %outputs)
  br label %fill
dict:
  %dict_result = call ptr @PyDict_New()
  br label %fill
fill:
  %collection = phi ptr [ %tuple_result, %tuple ], [ %dict_result, %dict ]
  %no_collection = icmp eq ptr %collection, null
  br i1 %no_collection, label %drop, label %item
item:
  %k = phi i64 [ 0, %fill ], [ %next_item, %stored ]
  %more_items = icmp slt i64 %k, %outputs
  br i1 %more_items, label %store, label %complete
store:
  %item_place = getelementptr inbounds ptr, ptr %results, i64 %k
  %item_object = load ptr, ptr %item_place
  br i1 %by_name, label %store_named, label %store_listed
store_named:
  %port_number = add i64 %inputs, %k
  %output_port = getelementptr inbounds %port, ptr %ports, i64 %port_number
  %output_name = load ptr, ptr %output_port
  %status = call i32 @PyDict_SetItem(ptr %collection, ptr %output_name, ptr %item_object)
  %failed = icmp ne i32 %status, 0
  br i1 %failed, label %drop_dict, label %stored_named
stored_named:
  call void @Py_DecRef(ptr %item_object)
  br label %stored
store_listed:
  %never = call i32 @PyTuple_SetItem(ptr %collection, i64 %k, ptr %item_object) ; takes the object over
  br label %stored
stored:
  %next_item = add i64 %k, 1
  br label %item
complete:
  call void @push(ptr %model, ptr %workspace)
  ret ptr %collection
drop_dict:
  call void @Py_DecRef(ptr %collection)
  %rest = getelementptr inbounds ptr, ptr %results, i64 %k
  %rest_count = sub i64 %outputs, %k
  call void @release(ptr %rest, i64 %rest_count)
  call void @push(ptr %model, ptr %workspace)
  ret ptr null
drop:
  call void @release(ptr %results, i64 %outputs)
  call void @push(ptr %model, ptr %workspace)
  ret ptr null

back:
  %held = phi i64 [ %i, %clear ], [ %i, %check ], [ %inputs, %sized ], [ %inputs, %room ]
  br label %unhold
unhold:
  call void @release(ptr %objects, i64 %held)
  call void @push(ptr %model, ptr %workspace)
  br label %slow
slow:
  %run_place = getelementptr inbounds %model, ptr %model, i64 0, i32 8
  %call_place = getelementptr inbounds %model, ptr %model, i64 0, i32 9
  %slow_place = select i1 %by_name, ptr %run_place, ptr %call_place
  %function = load ptr, ptr %slow_place
  %answer = call ptr (ptr, ...) @PyObject_CallFunctionObjArgs(ptr %function, ptr %executable, ptr %argument, ptr null)
  ret ptr %answer
}

; How many sizes these ports have.
define internal i64 @ranks(ptr %ports, i64 %count) alwaysinline {
entry:
  br label %test
test:
  %i = phi i64 [ 0, %entry ], [ %next, %add ]
  %sum = phi i64 [ 0, %entry ], [ %larger, %add ]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %add, label %done
add:
  %place = getelementptr inbounds %port, ptr %ports, i64 %i, i32 2
  %rank = load i64, ptr %place
  %larger = add i64 %sum, %rank
  %next = add i64 %i, 1
  br label %test
done:
  ret i64 %sum
}

define ptr @onnxc_python_run(ptr %self, ptr %arguments, i64 %count) {
entry:
  %two = icmp eq i64 %count, 2
  br i1 %two, label %good, label %bad
good:
  %executable = load ptr, ptr %arguments
  %place = getelementptr inbounds ptr, ptr %arguments, i64 1
  %argument = load ptr, ptr %place
  %result = call ptr @invoke(ptr %self, ptr %executable, ptr %argument, i1 true)
  ret ptr %result
bad:
  %error = call i32 @PyErr_BadArgument()
  ret ptr null
}

define ptr @onnxc_python_call(ptr %self, ptr %arguments, i64 %count) {
entry:
  %two = icmp eq i64 %count, 2
  br i1 %two, label %good, label %bad
good:
  %executable = load ptr, ptr %arguments
  %place = getelementptr inbounds ptr, ptr %arguments, i64 1
  %argument = load ptr, ptr %place
  %result = call ptr @invoke(ptr %self, ptr %executable, ptr %argument, i1 false)
  ret ptr %result
bad:
  %error = call i32 @PyErr_BadArgument()
  ret ptr null
}

define ptr @onnxc_python_take(ptr %self, ptr %arguments, i64 %count) {
  %model = call ptr @model_of(ptr %self)
  %workspace = call ptr @pop(ptr %model)
  %address = call ptr @PyLong_FromVoidPtr(ptr %workspace)
  ret ptr %address
}

define ptr @onnxc_python_give(ptr %self, ptr %arguments, i64 %count) {
entry:
  %one = icmp eq i64 %count, 1
  br i1 %one, label %good, label %bad
good:
  %number = load ptr, ptr %arguments
  %workspace = call ptr @PyLong_AsVoidPtr(ptr %number)
  %none = icmp eq ptr %workspace, null
  br i1 %none, label %bad, label %link
link:
  %model = call ptr @model_of(ptr %self)
  call void @push(ptr %model, ptr %workspace)
  call void @Py_IncRef(ptr %number)
  ret ptr %number
bad:
  %error = call i32 @PyErr_BadArgument()
  ret ptr null
}
