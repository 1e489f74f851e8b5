// SwiGLU of routed experts for few tokens, on the CPU: weights stream from memory once, at memory's speed.
//
// Rows are (token, expert) pairs sorted by expert, as ops/grouped.py plans them. Work is cut into items of one expert's
// rows and a range of its width F: gate and up of that range, then the matching rows of down. Items are independent, so
// threads take them in turn and add to sums of their own, which are added together at the end.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kDepth = 8;       // rows of a matrix read side by side
constexpr int64_t kMostRows = 8;    // rows of tokens that share one reading of the weights
constexpr int64_t kLeastRange = 64; // columns of an item, at least

inline float Widen(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float Widen(float value) { return value; }

inline void Narrow(float value, float* out) { *out = value; }
inline void Narrow(float value, uint16_t* out) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *out = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A strip of kLanes numbers in registers; compilers split it to what the processor has.
constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Floats Load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
inline Floats Load(const uint16_t* from) {
#ifdef __AVX512F__  // one instruction where the general form below becomes four
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
#endif
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

// out[r, 0:columns] += x[r, 0:depth] * w[0:depth, 0:columns] for R rows; w's rows lie `stride` apart.
template <int R, typename T>
void AddProduct(const float* __restrict__ x, int64_t x_stride, const T* __restrict__ w, int64_t stride, int64_t depth,
                int64_t columns, float* __restrict__ out, int64_t out_stride) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t deep = std::min(kDepth, depth - k);
    const T* __restrict__ rows = w + k * stride;
    int64_t j = 0;
    if (deep == kDepth) {
      for (; j + kLanes <= columns; j += kLanes) {
        Floats sums[R];
        for (int r = 0; r < R; ++r) sums[r] = Load(out + r * out_stride + j);
#pragma GCC unroll 8
        for (int d = 0; d < kDepth; ++d) {
          const Floats strip = Load(rows + d * stride + j);
          for (int r = 0; r < R; ++r) sums[r] += x[r * x_stride + k + d] * strip;
        }
        for (int r = 0; r < R; ++r) std::memcpy(out + r * out_stride + j, &sums[r], sizeof(Floats));
      }
    }
    for (; j < columns; ++j)
      for (int64_t d = 0; d < deep; ++d) {
        const float wide = Widen(rows[d * stride + j]);
        for (int r = 0; r < R; ++r) out[r * out_stride + j] += x[r * x_stride + k + d] * wide;
      }
  }
}

template <typename T>
void AddProductRows(int64_t rows, const float* x, int64_t x_stride, const T* w, int64_t stride, int64_t depth,
                    int64_t columns, float* out, int64_t out_stride) {
  switch (rows) {
#define CASE(R) \
  case R:       \
    return AddProduct<R>(x, x_stride, w, stride, depth, columns, out, out_stride);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
}

struct Item {
  int64_t expert, first, rows, low, high;
};

template <typename T>
struct Problem {
  const T *x, *gate_up, *down;
  const int32_t* tokens;
  const float* weights;
  int64_t num_tokens, width, ffn;

  void Run(const Item& item, float* sums, std::vector<float>& scratch) const {
    const int64_t range = item.high - item.low, rows = item.rows;
    scratch.assign(rows * (width + 2 * range + width), 0.0f);
    float* in = scratch.data();
    float* both = in + rows * width;  // [rows, gate or up, range]
    float* y = both + rows * 2 * range;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < width; ++k) in[r * width + k] = Widen(x[tokens[item.first + r] * width + k]);
    const T* matrix = gate_up + item.expert * width * 2 * ffn;
    if (range == ffn) {  // gate and up lie side by side: one sweep over whole rows
      AddProductRows(rows, in, width, matrix, 2 * ffn, width, 2 * ffn, both, 2 * range);
    } else {
      AddProductRows(rows, in, width, matrix + item.low, 2 * ffn, width, range, both, 2 * range);
      AddProductRows(rows, in, width, matrix + ffn + item.low, 2 * ffn, width, range, both + range, 2 * range);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float *gate = both + r * 2 * range, *up = gate + range;
      for (int64_t i = 0; i < range; ++i) {
        T rounded;  // as the other implementations round between the two products
        Narrow(gate[i] / (1.0f + std::exp(-gate[i])) * up[i], &rounded);
        gate[i] = Widen(rounded);
      }
    }
    const T* out = down + (item.expert * ffn + item.low) * width;
    AddProductRows(rows, both, 2 * range, out, width, range, width, y, width);
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = weights[item.first + r];
      float* sum = sums + tokens[item.first + r] * width;
      for (int64_t k = 0; k < width; ++k) sum[k] += scale * y[r * width + k];
    }
  }
};

std::vector<Item> Cut(const int32_t* ends, int64_t num_experts, int64_t ffn, int64_t threads) {
  int64_t active = 0;
  for (int64_t e = 0; e < num_experts; ++e) active += ends[e] > (e ? ends[e - 1] : 0);
  if (active == 0) return {};
  // Enough items for threads to end together, and no more: long rows are read faster.
  const int64_t wanted = (2 * threads + active - 1) / active;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, ffn / kLeastRange));
  std::vector<Item> items;
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t first = e ? ends[e - 1] : 0; first < ends[e]; first += kMostRows)
      for (int64_t part = 0; part < parts; ++part)
        items.push_back({e, first, std::min<int64_t>(kMostRows, ends[e] - first), ffn * part / parts,
                         ffn * (part + 1) / parts});
  }
  return items;
}

// Shared with helpers that may start late, after the last item is done: it must outlive the call, and nothing else may.
template <typename T>
struct Shared {
  Problem<T> problem;
  std::vector<Item> items;
  std::vector<std::vector<float>> sums;
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::condition_variable ended;
  size_t done = 0;

  void Work(int64_t worker) {
    std::vector<float> scratch;
    size_t mine = 0;
    for (size_t i; (i = next.fetch_add(1)) < items.size(); ++mine) {
      if (sums[worker].empty()) sums[worker].assign(problem.num_tokens * problem.width, 0.0f);
      problem.Run(items[i], sums[worker].data(), scratch);
    }
    std::lock_guard<std::mutex> lock(mutex);
    done += mine;
    if (done == items.size()) ended.notify_one();
  }
};

template <typename T>
void RunAll(ffi::ThreadPool& pool, Problem<T> problem, const int32_t* ends, int64_t num_experts, T* out) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto shared = std::make_shared<Shared<T>>();
  shared->problem = problem;
  shared->items = Cut(ends, num_experts, problem.ffn, threads);
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, shared->items.size()));
  shared->sums.resize(workers);
  for (int64_t worker = 1; worker < workers; ++worker) pool.Schedule([shared, worker] { shared->Work(worker); });
  shared->Work(0);
  {
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->ended.wait(lock, [&] { return shared->done == shared->items.size(); });
  }
  for (int64_t i = 0; i < problem.num_tokens * problem.width; ++i) {
    float total = 0.0f;
    for (const auto& sum : shared->sums)
      if (!sum.empty()) total += sum[i];
    Narrow(total, out + i);
  }
}

ffi::Error Experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> tokens, ffi::Buffer<ffi::F32> weights,
                   ffi::Buffer<ffi::S32> ends, ffi::AnyBuffer gate_up, ffi::AnyBuffer down,
                   ffi::Result<ffi::AnyBuffer> y) {
  const int64_t num_tokens = x.dimensions()[0], width = x.dimensions()[1], ffn = down.dimensions()[1];
  const int64_t num_experts = ends.element_count();
  auto run = [&](auto kind) {
    using T = decltype(kind);
    Problem<T> problem{static_cast<const T*>(x.untyped_data()), static_cast<const T*>(gate_up.untyped_data()),
                       static_cast<const T*>(down.untyped_data()), tokens.typed_data(), weights.typed_data(),
                       num_tokens, width, ffn};
    RunAll<T>(pool, problem, ends.typed_data(), num_experts, static_cast<T*>(y->untyped_data()));
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::BF16) return run(uint16_t{});
  if (x.element_type() == ffi::F32) return run(float{});
  return ffi::Error::InvalidArgument("grouped=native takes bfloat16 or float32");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExperts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
