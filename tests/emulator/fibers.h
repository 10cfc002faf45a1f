// Running the threads of a block as fibers.
#pragma once
#include "worker.h"

namespace emulator {

// Stacks for blocks of so many threads.
void prepare_fibers(Worker& worker, unsigned threads);
// Runs all threads of the worker's block; leaves by Worker::leave where that fails.
void run_fibers(Worker& worker, unsigned seed);
// The running lane comes to a collective, its operands being with the warp; returns when all lanes have come and
// `complete` has run.
void arrive(Worker& worker, EmulatorCollective kind, int width, int line);

}  // namespace emulator
