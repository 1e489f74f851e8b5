// SwiGLU of routed experts for few tokens: weights stream from memory once, those of experts nobody chose never.
//
// Rows are (token, expert) pairs with a weight other than zero, by expert. Work is cut into items of one expert's rows
// and a range of its width F: gate and up of that range, then the matching rows of down. Items are independent, so
// threads take them in turn and add to sums of their own, which are added together at the end.

#include "rows.h"

namespace ffi = xla::ffi;

namespace jaxmoe {
namespace {

constexpr int64_t kLeastRange = 64;  // columns of an item, at least

struct Item {
  int64_t expert, first, rows, low, high;
};

template <typename T>
struct Problem {
  const T *x, *gate_up, *down;
  const float* weights;  // [tokens, experts]
  int64_t num_tokens, num_experts, width, ffn;
  std::vector<int32_t> tokens;  // of every row
  std::vector<Item> items;

  void Plan(int64_t threads) {
    std::vector<int64_t> ends;
    int64_t visited = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
      const size_t before = tokens.size();
      for (int64_t t = 0; t < num_tokens; ++t)
        if (weights[t * num_experts + e] != 0.0f) tokens.push_back(static_cast<int32_t>(t));
      visited += tokens.size() > before;
      ends.push_back(static_cast<int64_t>(tokens.size()));
    }
    if (visited == 0) return;
    // Enough items for threads to end together, and no more: long rows are read faster.
    const int64_t wanted = (2 * threads + visited - 1) / visited;
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, ffn / kLeastRange));
    for (int64_t e = 0; e < num_experts; ++e)
      for (int64_t part = 0, first = e ? ends[e - 1] : 0; first < ends[e] && part < parts; ++part)
        items.push_back({e, first, ends[e] - first, ffn * part / parts, ffn * (part + 1) / parts});
  }

  void Run(const Item& item, float* sums) const {
    static thread_local std::vector<float> scratch;
    const int64_t range = item.high - item.low, rows = item.rows;
    scratch.assign(rows * (width + 2 * range + width), 0.0f);
    float* in = scratch.data();
    float* both = in + rows * width;  // [rows, gate or up, range]
    float* y = both + rows * 2 * range;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < width; ++k) in[r * width + k] = Widen(x[tokens[item.first + r] * width + k]);
    const T* matrix = gate_up + item.expert * width * 2 * ffn;
    if (range == ffn) {  // gate and up lie side by side: one sweep over whole rows
      AddProduct(rows, in, width, matrix, 2 * ffn, width, 2 * ffn, both, 2 * range);
    } else {
      AddProduct(rows, in, width, matrix + item.low, 2 * ffn, width, range, both, 2 * range);
      AddProduct(rows, in, width, matrix + ffn + item.low, 2 * ffn, width, range, both + range, 2 * range);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float *gate = both + r * 2 * range, *up = gate + range;
      for (int64_t i = 0; i < range; ++i)  // rounded as the other implementations round between the two products
        gate[i] = Widen(Rounded<T>(gate[i] / (1.0f + std::exp(-gate[i])) * up[i]));
    }
    const T* out = down + (item.expert * ffn + item.low) * width;
    AddProduct(rows, both, 2 * range, out, width, range, width, y, width);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = tokens[item.first + r];
      const float scale = weights[token * num_experts + item.expert];
      float* sum = sums + token * width;
      for (int64_t k = 0; k < width; ++k) sum[k] += scale * y[r * width + k];
    }
  }

  void RunAll(ffi::ThreadPool& pool, T* out) {
    const int64_t threads = NumThreads(pool), size = num_tokens * width;
    Plan(threads);
    std::vector<std::vector<float>> sums(threads);
    ForEach(pool, static_cast<int64_t>(items.size()), threads, [&](int64_t item, int64_t worker) {
      if (sums[worker].empty()) sums[worker].assign(size, 0.0f);
      Run(items[item], sums[worker].data());
    });
    for (int64_t i = 0; i < size; ++i) {
      float total = 0.0f;
      for (const auto& sum : sums)
        if (!sum.empty()) total += sum[i];
      Narrow(total, out + i);
    }
  }
};

ffi::Error Experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> weights, ffi::AnyBuffer gate_up,
                   ffi::AnyBuffer down, ffi::Result<ffi::AnyBuffer> y) {
  auto run = [&](auto kind) {
    using T = decltype(kind);
    Problem<T> problem{static_cast<const T*>(x.untyped_data()), static_cast<const T*>(gate_up.untyped_data()),
                       static_cast<const T*>(down.untyped_data()), weights.typed_data(), x.dimensions()[0],
                       weights.dimensions()[1], x.dimensions()[1], down.dimensions()[1], {}, {}};
    problem.RunAll(pool, static_cast<T*>(y->untyped_data()));
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::BF16) return run(uint16_t{});
  if (x.element_type() == ffi::F32) return run(float{});
  return ffi::Error::InvalidArgument("grouped=native takes bfloat16 or float32");
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExperts, jaxmoe::Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
