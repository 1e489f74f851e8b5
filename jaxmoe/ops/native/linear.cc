// Matmuls with one matrix, [T, K] x [K, N] or [T, K] x [N, K], for ops/linear. The order of summation depends only
// on the shape of the matrix and the number of threads, not on the other rows.

#include "packed.h"

namespace jaxmoe {
namespace {

constexpr int64_t kLeastBytes = 1 << 16;   // of the matrix per thread: less is not worth waking a thread
constexpr int64_t kLeastColumns = 2048;    // of an item, if possible: longer pieces of rows are read faster
constexpr int64_t kMostSums = 4096;        // of all rows, so that they fit a core's L1 cache

// A work item is a range of columns. If there are too few ranges for all threads, the depth is split into parts, too,
// and the partial sums are added at the end. Many rows are cut into blocks, and each item computes all parts itself.
template <typename T, typename Out>
struct Product {
  const T *x, *w;
  Out* y;
  int64_t rows, depth, columns;
  bool transposed;

  void RunBlocks(const Threads& pool, int64_t parts) const {
    const int64_t threads = pool.Count(), blocks = (rows + kRowBlock - 1) / kRowBlock;
    const int64_t ranges = std::clamp<int64_t>((4 * threads + blocks - 1) / blocks, 1, (columns + 127) / 128);
    const int64_t step = ((columns + ranges - 1) / ranges + 63) / 64 * 64;
    ForEach(pool, blocks * ranges, threads, [&](int64_t item, int64_t) {
      static thread_local std::vector<float> scratch;
      const int64_t first = item / ranges * kRowBlock, tall = std::min(kRowBlock, rows - first);
      const int64_t low = item % ranges * step, range = std::min(columns, low + step) - low;
      if (range <= 0) return;
      scratch.resize(tall * (depth + 2 * range));
      float *wide = scratch.data(), *total = wide + tall * depth, *part = total + tall * range;
      WidenAll(x + first * depth, tall * depth, wide);
      for (int64_t index = 0; index < parts; ++index) {
        const int64_t from = PartStart(index, parts), to = PartStart(index + 1, parts);
        float* sums = index ? part : total;
        std::fill_n(sums, tall * range, 0.0f);
        jaxmoe::Add(tall, wide + from, depth, w + from * columns + low, columns, to - from, range, sums, range);
        if (index)
          for (int64_t i = 0; i < tall * range; ++i) total[i] += part[i];
      }
      for (int64_t r = 0; r < tall; ++r)
        for (int64_t c = 0; c < range; ++c) Narrow(total[r * range + c], y + (first + r) * columns + low + c);
    });
  }

  // Adds the partial sum over depth [from, to) of columns [low, high) to out, whose rows are `stride` apart.
  void Add(const float* wide, int64_t from, int64_t to, int64_t low, int64_t high, float* out, int64_t stride) const {
    if (transposed)
      DotProduct(rows, wide, depth, w + low * depth, depth, high - low, out, stride);
    else
      AddProduct(rows, wide + from, depth, w + from * columns + low, columns, to - from, high - low, out, stride);
  }

  // Returns the first depth index of part `index` of `parts`.
  int64_t PartStart(int64_t index, int64_t parts) const {
    return index == parts ? depth : depth * index / parts / kDepth * kDepth;
  }

  void RunAll(const Threads& pool) const {
    if (rows == 0 || columns == 0) return;
    const int64_t bytes = depth * columns * static_cast<int64_t>(sizeof(T));
    const int64_t threads = pool.Count();
    const int64_t wanted = bytes < 2 * kLeastBytes ? 1 : 2 * threads;
    const int64_t across = transposed ? wanted : std::clamp<int64_t>(columns / kLeastColumns, 1, wanted);
    const int64_t down = transposed ? 1 : std::clamp<int64_t>(wanted / across, 1, std::max<int64_t>(1, depth / 64));
    if (rows > kFewRows && !transposed) return RunBlocks(pool, down);
    std::vector<float> wide(rows * depth);
    WidenAll(x, rows * depth, wide.data());
    const int64_t strips = (columns + 63) / 64;  // so that two threads never write one cache line
    const int64_t step = std::max<int64_t>(256, kMostSums / rows / 64 * 64);
    std::vector<std::vector<float>> parts(down);
    if (down > 1)
      for (auto& part : parts) part.assign(rows * columns, 0.0f);
    ForEach(pool, across * down, threads, [&](int64_t item, int64_t) {
      const int64_t range = item / down, part = item % down;
      const int64_t low = strips * range / across * 64;
      const int64_t high = std::min(columns, strips * (range + 1) / across * 64);
      const int64_t from = PartStart(part, down), to = PartStart(part + 1, down);
      static thread_local std::vector<float> scratch;
      for (int64_t left = low; left < high; left += step) {
        const int64_t right = std::min(high, left + step);
        if (down > 1) {
          Add(wide.data(), from, to, left, right, parts[part].data() + left, columns);
          continue;
        }
        scratch.assign(rows * (right - left), 0.0f);
        Add(wide.data(), from, to, left, right, scratch.data(), right - left);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = left; c < right; ++c)
            Narrow(scratch[r * (right - left) + c - left], y + r * columns + c);
      }
    });
    if (down == 1) return;
    for (int64_t i = 0; i < rows * columns; ++i) {
      float total = parts[0][i];
      for (int64_t part = 1; part < down; ++part) total += parts[part][i];
      Narrow(total, y + i);
    }
  }
};

template <typename T, typename Out>
XLA_FFI_Error* RunLinear(const Call& call) {
  const Array x = call.Argument(0), w = call.Argument(1), y = call.Result();
  const T* layer = w.As<T>() + *call.Argument(2).As<int32_t>() * w.Stride(0);
  const int64_t num_valid = std::clamp<int64_t>(*call.Argument(3).As<int32_t>(), 0, x.Size(0));
  std::fill(y.As<Out>() + num_valid * y.Size(1), y.As<Out>() + x.Size(0) * y.Size(1), Out{});
  Product<T, Out>{x.As<T>(), layer, y.As<Out>(), num_valid, x.Size(1), y.Size(1), call.Attribute<bool>("transposed")}
      .RunAll(call.Pool());
  return nullptr;
}

XLA_FFI_Error* Linear(const Call& call) {
  const auto in = call.Argument(0).Kind(), out = call.Result().Kind();
  if (in == kFloat32 && out == kFloat32) return RunLinear<float, float>(call);
  if (in == kBfloat16 && out == kBfloat16) return RunLinear<uint16_t, uint16_t>(call);
  if (in == kBfloat16 && out == kFloat32) return RunLinear<uint16_t, float>(call);
  return call.Refuse("linear=native takes bfloat16 or float32");
}

}  // namespace
}  // namespace jaxmoe

JAXMOE_KERNEL(JaxmoeLinear, 4, 1, jaxmoe::Linear)
