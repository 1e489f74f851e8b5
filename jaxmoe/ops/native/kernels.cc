// All kernels form one translation unit, so that shared templates are compiled once.

#include "experts.cc"
#include "linear.cc"
#include "paged.cc"
#include "pointwise.cc"
#include "sample.cc"

// Returns whether the processor multiplies bfloat16 in hardware. XLA then uses it for many rows, faster than float32.
extern "C" int JaxmoeMultipliesBfloat16() {
#if defined(__AVX512BF16__) || defined(__AMX_BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return 1;
#else
  return 0;
#endif
}
