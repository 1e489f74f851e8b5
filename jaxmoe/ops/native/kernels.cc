// All kernels in one unit: shared templates are compiled once.

#include "experts.cc"
#include "linear.cc"
#include "paged.cc"
#include "pointwise.cc"
#include "sample.cc"

// Whether the processor multiplies bfloat16 numbers itself: XLA then does so for many rows, faster than float32 can be.
extern "C" int JaxmoeMultipliesBfloat16() {
#if defined(__AVX512BF16__) || defined(__AMX_BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return 1;
#else
  return 0;
#endif
}
