// Running the threads of a block as fibers.
#pragma once
#include "worker.h"

namespace emulator {

// Stacks for blocks of so many threads.
void prepare_fibers(Worker& worker, unsigned threads);
// Runs all threads of the worker's block; leaves by Worker::leave where that fails.
void run_fibers(Worker& worker, unsigned seed);
// The running lane comes to a collective, with its operands in its fiber; returns when all lanes have come and the
// results are there.
void arrive(Worker& worker, EmulatorCollective kind, int bytes, int line);

}  // namespace emulator
