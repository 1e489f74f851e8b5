// Matmuls of few rows with a matrix that is read from memory once, and the distribution of work among threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "call.h"

namespace jaxmoe {

constexpr int64_t kDepth = 8;  // rows of a matrix that are read together

inline float Widen(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float Widen(float value) { return value; }

inline float Widen(int8_t value) { return value; }

struct Float8 {  // float8_e4m3fn
  uint8_t bits;
};
inline float Widen(Float8 value) {
  const uint32_t rest = value.bits & 0x7f, sign = static_cast<uint32_t>(value.bits & 0x80) << 24;
  uint32_t wide = (rest << 20) + (120u << 23);
  const float small = static_cast<float>(rest) * 0x1p-9f;  // subnormal
  if (rest < 8) std::memcpy(&wide, &small, 4);
  if (rest == 0x7f) wide = 0x7fc00000u;  // NaN
  wide |= sign;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

inline void Narrow(float value, float* out) { *out = value; }
inline void Narrow(float value, uint16_t* out) {  // round to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *out = value == value ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

template <typename T>
T Rounded(float value) {
  T narrow;
  Narrow(value, &narrow);
  return narrow;
}

// A strip of kLanes numbers in one register.
#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Signed __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(kLanes)));

inline Floats Load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
inline Floats Load(const uint16_t* from) {
#if defined(__AVX512F__)  // one instruction; the generic form below compiles to several
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
#elif defined(__AVX2__)
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
#endif
}
inline Floats Load(const int8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Floats);
}
inline Floats Load(const Float8* from) {
  UnsignedBytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  const Words bits = __builtin_convertvector(bytes, Words), rest = bits & 0x7f;
  const Words small = reinterpret_cast<Words>(__builtin_convertvector(rest, Floats) * 0x1p-9f);
  const Words normal = (rest << 20) + (120u << 23);
  const Words number = rest < 8 ? small : normal, nan = Words{} + 0x7fc00000u;
  return reinterpret_cast<Floats>((rest == 0x7f ? nan : number) | ((bits & 0x80) << 24));
}
inline void Store(Floats values, float* to) { std::memcpy(to, &values, sizeof(values)); }

// wide[i] = x[i] as a float.
template <typename T>
void WidenAll(const T* x, int64_t count, float* wide) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(Load(x + i), wide + i);
  for (; i < count; ++i) wide[i] = Widen(x[i]);
}

// Fused x * y + sum, rounded once, so that the grouping of rows never changes a result.
inline float MultiplyAdd(float x, float y, float sum) { return __builtin_fmaf(x, y, sum); }
inline Floats MultiplyAdd(Floats x, Floats y, Floats sum) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(x, y, sum);
#else
  for (int64_t i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(x[i], y[i], sum[i]);
  return sum;
#endif
}
inline Floats Spread(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  Floats all;
  for (int64_t i = 0; i < kLanes; ++i) all[i] = x;
  return all;
#endif
}
inline Floats MultiplyAdd(float x, Floats y, Floats sum) { return MultiplyAdd(Spread(x), y, sum); }

// Computes e^x with an error of two units in the last place over the whole range of float32: 0 below -104, infinite
// above 88.7228. Source: the polynomial of Cephes' expf (Moshier).
inline Floats Exp(Floats x) {
  const Floats zero = {}, low = zero - 104.0f, high = zero + 88.72283f, shift = zero + 12582912.0f;  // 1.5 * 2^23: rounds
  const auto small = x < low, large = x > high;
  const Floats whole = (x * 1.44269504f + shift) - shift;
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats y = zero + 1.9875691500e-4f;
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const auto power = __builtin_convertvector(small || large ? zero : whole, Signed);
  const auto half = power >> 1;  // 2^power as two factors, since it may be outside the normal range
  y = y * reinterpret_cast<Floats>((half + 127) << 23) * reinterpret_cast<Floats>((power - half + 127) << 23);
  return small ? zero : large ? zero + __builtin_inff() : y;
}

inline float Sum(Floats values) {
  float total = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) total += values[i];
  return total;
}

// Returns S such that the sums of R rows and S strips fill the registers. Each number of x is read once for S strips.
template <int R>
constexpr int StripsOf() {
#ifdef __AVX512F__
  return R <= 4 ? 4 : 2;
#else
  return R == 1 ? 4 : R <= 6 ? 2 : 1;
#endif
}

// out[r, 0:columns] += x[r, 0:deep] * w[0:deep, 0:columns] for R rows and deep <= kDepth; w's rows are `stride` apart.
template <int R, typename T>
void AddBlock(const float* __restrict__ x, int64_t x_stride, const T* __restrict__ w, int64_t stride, int64_t deep,
              int64_t columns, float* __restrict__ out, int64_t out_stride) {
  constexpr int S = StripsOf<R>();
  int64_t j = 0;
  if (deep == kDepth) {
    for (; j + S * kLanes <= columns; j += S * kLanes) {
      Floats sums[R][S];
      for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) sums[r][s] = Load(out + r * out_stride + j + s * kLanes);
#pragma GCC unroll 8
      for (int d = 0; d < kDepth; ++d) {
        Floats strips[S];
        for (int s = 0; s < S; ++s) strips[s] = Load(w + d * stride + j + s * kLanes);
        for (int r = 0; r < R; ++r)
          for (int s = 0; s < S; ++s) sums[r][s] = MultiplyAdd(x[r * x_stride + d], strips[s], sums[r][s]);
      }
      for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) Store(sums[r][s], out + r * out_stride + j + s * kLanes);
    }
  }
  for (; j < columns; ++j)
    for (int64_t d = 0; d < deep; ++d) {
      const float wide = Widen(w[d * stride + j]);
      for (int r = 0; r < R; ++r) {
        float* sum = out + r * out_stride + j;
        *sum = MultiplyAdd(x[r * x_stride + d], wide, *sum);
      }
    }
}

// out[r] = x[r, 0:depth] . w[0:depth] for R rows. The order of the sums is the same for every R.
template <int R, typename T>
void DotColumn(const float* __restrict__ x, int64_t x_stride, const T* __restrict__ w, int64_t depth,
               float* __restrict__ out, int64_t out_stride) {
  constexpr int S = 4;
  Floats sums[R][S] = {};
  int64_t k = 0;
  for (; k + S * kLanes <= depth; k += S * kLanes)
    for (int s = 0; s < S; ++s) {
      const Floats strip = Load(w + k + s * kLanes);
      for (int r = 0; r < R; ++r) sums[r][s] = MultiplyAdd(Load(x + r * x_stride + k + s * kLanes), strip, sums[r][s]);
    }
  for (int r = 0; r < R; ++r) {
    Floats sum = sums[r][0];
    for (int s = 1; s < S; ++s) sum += sums[r][s];
    float total = Sum(sum);
    for (int64_t rest = k; rest < depth; ++rest) total = MultiplyAdd(x[r * x_stride + rest], Widen(w[rest]), total);
    out[r * out_stride] = total;
  }
}

// out[r, 0:columns] += x[r, 0:depth] * w[0:depth, 0:columns] for any number of rows; w is read once.
template <typename T>
__attribute__((noinline)) void AddProduct(int64_t rows, const float* x, int64_t x_stride, const T* w, int64_t stride, int64_t depth,
                int64_t columns, float* out, int64_t out_stride) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t deep = std::min(kDepth, depth - k);
    int64_t first = 0;
    auto add = [&](auto count) {  // rows that share one load of a strip; later rows find it in the L1 cache
      for (; rows - first >= count(); first += count())
        AddBlock<count()>(x + first * x_stride + k, x_stride, w + k * stride, stride, deep, columns,
                          out + first * out_stride, out_stride);
    };
    add(std::integral_constant<int, 6>());
    add(std::integral_constant<int, 4>());
    add(std::integral_constant<int, 2>());
    add(std::integral_constant<int, 1>());
  }
}

// out[r, c] = x[r, 0:depth] . w[c, 0:depth] for any number of rows; w's rows are contiguous.
template <typename T>
__attribute__((noinline)) void DotProduct(int64_t rows, const float* x, int64_t x_stride, const T* w, int64_t depth, int64_t columns, float* out,
                int64_t out_stride) {
  constexpr int64_t kMostRows = 3;
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t first = 0; first < rows; first += kMostRows) {
      auto dot = [&](auto count) {
        DotColumn<count()>(x + first * x_stride, x_stride, w + c * depth, depth, out + first * out_stride + c, out_stride);
      };
      switch (rows - first) {
        case 1: dot(std::integral_constant<int, 1>()); break;
        case 2: dot(std::integral_constant<int, 2>()); break;
        default: dot(std::integral_constant<int, 3>());
      }
    }
}

// Calls work(item, worker) for every item in [0, items) on up to `workers` threads, including this one. Returns when
// all items are done. A helper thread may start after the last item; it shares ownership of the state that it reads.
inline void ForEach(const Threads& pool, int64_t items, int64_t workers,
                    const std::function<void(int64_t, int64_t)>& work) {
  workers = std::min(workers, items);
  if (workers <= 1) {
    for (int64_t item = 0; item < items; ++item) work(item, 0);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable ended;
    const std::function<void(int64_t, int64_t)>* work;  // valid while items remain
    int64_t items;

    std::atomic<bool> failed{false};

    void Run(int64_t worker) {
      for (int64_t item; (item = next.fetch_add(1)) < items;) {
        try {
          (*work)(item, worker);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
        if (done.fetch_add(1) + 1 == items) {
          std::lock_guard<std::mutex> lock(mutex);
          ended.notify_one();
        }
      }
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->work = &work;
  shared->items = items;
  for (int64_t worker = 1; worker < workers; ++worker) pool.Schedule([shared, worker] { shared->Run(worker); });
  shared->Run(0);
  for (int64_t spin = 0; spin < 2000 && shared->done.load() < items; ++spin) {
#if defined(__AVX512F__) || defined(__AVX2__)
    _mm_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->ended.wait(lock, [&] { return shared->done.load() == items; });
  if (shared->failed) throw std::bad_alloc();
}

}  // namespace jaxmoe
