// What CUDA C has by itself, for g++: keywords, where a thread is, mathematical functions.
// Includes no header of the system: with them a kernel compiles ten times slower.
#pragma once
#include "runtime.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx emulator_thread_index()
#define blockIdx emulator_here().block
#define blockDim emulator_here().block_size
#define gridDim emulator_here().grid_size

#ifdef __SANITIZE_THREAD__
// What a checked kernel asks of the emulator is no access of its own.
#define EMULATOR_OWN __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATOR_OWN inline
#endif
// Copies: what holds them is memory of the kernel's thread.
EMULATOR_OWN static EmulatorIndex emulator_thread_index() { return emulator_place->thread->index; }
EMULATOR_OWN static EmulatorPlace emulator_here() { return *emulator_place; }

extern "C" void* memcpy(void*, const void*, unsigned long);
#define MATH_OF_ONE(name)                                                                                            \
    extern "C" double name(double);                                                                                  \
    extern "C" float name##f(float);
#define MATH_OF_TWO(name)                                                                                            \
    extern "C" double name(double, double);                                                                          \
    extern "C" float name##f(float, float);
MATH_OF_ONE(exp) MATH_OF_ONE(exp2) MATH_OF_ONE(exp10) MATH_OF_ONE(expm1) MATH_OF_ONE(log) MATH_OF_ONE(log2)
MATH_OF_ONE(log10) MATH_OF_ONE(log1p) MATH_OF_ONE(sin) MATH_OF_ONE(cos) MATH_OF_ONE(tan) MATH_OF_ONE(asin)
MATH_OF_ONE(acos) MATH_OF_ONE(atan) MATH_OF_ONE(sinh) MATH_OF_ONE(cosh) MATH_OF_ONE(tanh) MATH_OF_ONE(asinh)
MATH_OF_ONE(acosh) MATH_OF_ONE(atanh) MATH_OF_ONE(erf) MATH_OF_ONE(erfc) MATH_OF_ONE(sqrt) MATH_OF_ONE(cbrt)
MATH_OF_ONE(floor) MATH_OF_ONE(ceil) MATH_OF_ONE(rint) MATH_OF_ONE(trunc) MATH_OF_ONE(round) MATH_OF_ONE(fabs)
MATH_OF_ONE(lgamma) MATH_OF_ONE(tgamma)
MATH_OF_TWO(pow) MATH_OF_TWO(fmod) MATH_OF_TWO(atan2) MATH_OF_TWO(fmin) MATH_OF_TWO(fmax) MATH_OF_TWO(copysign)
MATH_OF_TWO(hypot) MATH_OF_TWO(remainder) MATH_OF_TWO(nextafter) MATH_OF_TWO(fdim)
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
