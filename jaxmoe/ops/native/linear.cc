// Products of few rows with one matrix, [T, K] x [K, N] or [T, K] x [N, K], for ops/linear.py.

#include "rows.h"

namespace ffi = xla::ffi;

namespace jaxmoe {
namespace {

constexpr int64_t kLeastBytes = 1 << 16;   // of the matrix, for a thread to be worth waking
constexpr int64_t kLeastColumns = 2048;    // of an item, where the matrix has them: long pieces of rows are read faster
constexpr int64_t kMostSums = 4096;        // of all rows together, so that they stay in a core's first cache

// One item is a range of columns, and where there are too few of those for all threads also a range of the depth, whose
// sums are added to those of the other ranges at the end.
template <typename T, typename Out>
struct Product {
  const T *x, *w;
  Out* y;
  int64_t rows, depth, columns;
  bool transposed;

  // out[r, 0:high-low] (rows `stride` apart) gains the part of the sum over depth [from, to).
  void Add(const float* wide, int64_t from, int64_t to, int64_t low, int64_t high, float* out, int64_t stride) const {
    if (transposed)
      DotProduct(rows, wide, depth, w + low * depth, depth, high - low, out, stride);
    else
      AddProduct(rows, wide + from, depth, w + from * columns + low, columns, to - from, high - low, out, stride);
  }

  void RunAll(ffi::ThreadPool& pool) const {
    if (rows == 0 || columns == 0) return;
    std::vector<float> wide(rows * depth);
    for (int64_t i = 0; i < rows * depth; ++i) wide[i] = Widen(x[i]);
    const int64_t bytes = depth * columns * static_cast<int64_t>(sizeof(T));
    const int64_t threads = NumThreads(pool);
    const int64_t wanted = bytes < 2 * kLeastBytes ? 1 : 2 * threads;
    const int64_t across = transposed ? wanted : std::clamp<int64_t>(columns / kLeastColumns, 1, wanted);
    const int64_t down = transposed ? 1 : std::clamp<int64_t>(wanted / across, 1, std::max<int64_t>(1, depth / 64));
    const int64_t strips = (columns + 63) / 64;  // whole ones, so that two threads never write one line of memory
    const int64_t step = std::max<int64_t>(256, kMostSums / rows / 64 * 64);
    std::vector<std::vector<float>> parts(down);
    if (down > 1)
      for (auto& part : parts) part.assign(rows * columns, 0.0f);
    ForEach(pool, across * down, threads, [&](int64_t item, int64_t) {
      const int64_t range = item / down, part = item % down;
      const int64_t low = strips * range / across * 64;
      const int64_t high = std::min(columns, strips * (range + 1) / across * 64);
      const int64_t from = depth * part / down / kDepth * kDepth;
      const int64_t to = part + 1 == down ? depth : depth * (part + 1) / down / kDepth * kDepth;
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
      float total = 0.0f;
      for (const auto& part : parts) total += part[i];
      Narrow(total, y + i);
    }
  }
};

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                  bool transposed) {
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], columns = y->dimensions()[1];
  auto run = [&](auto kind, auto out) {
    using T = decltype(kind);
    using Out = decltype(out);
    Product<T, Out>{static_cast<const T*>(x.untyped_data()), static_cast<const T*>(w.untyped_data()),
                    static_cast<Out*>(y->untyped_data()), rows, depth, columns, transposed}
        .RunAll(pool);
    return ffi::Error::Success();
  };
  const auto in = x.element_type(), out = y->element_type();
  if (in == ffi::F32 && out == ffi::F32) return run(float{}, float{});
  if (in == ffi::BF16 && out == ffi::BF16) return run(uint16_t{}, uint16_t{});
  if (in == ffi::BF16 && out == ffi::F32) return run(uint16_t{}, float{});
  return ffi::Error::InvalidArgument("linear=native takes bfloat16 or float32");
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeLinear, jaxmoe::Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed"));
