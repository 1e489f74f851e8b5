// Attention over pages for ops/paged.py: one item is some tokens of one block and one key/value head.

#include "rows.h"

namespace ffi = xla::ffi;

namespace jaxmoe {
namespace {

constexpr int64_t kTile = 16;  // tokens of an item

template <typename T>
struct Paged {
  const T *q, *k_pages, *v_pages;
  const int32_t *table, *positions, *counts;
  T* out;
  int64_t blocks, tokens, heads, group, head_dim, pages_of_row, page_size, window;

  // Tokens [low, high) of a block over the keys they may see.
  void Run(int64_t block, int64_t head, int64_t low, int64_t high) const {
    static thread_local std::vector<float> scratch;
    const int64_t rows = (high - low) * group, position = positions[block];
    const int64_t first = window > 0 ? std::max<int64_t>(0, position + low - window + 1) / page_size : 0;
    const int64_t end = (position + high - 1) / page_size + 1, span = (end - first) * page_size;
    scratch.assign(rows * (2 * head_dim + span), 0.0f);
    float *in = scratch.data(), *mixed = in + rows * head_dim, *scores = mixed + rows * head_dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    auto place = [&](int64_t r) {  // of row r (token, then query head) in q and out
      return (((block * tokens + low + r / group) * heads + head) * group + r % group) * head_dim;
    };
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < head_dim; ++i) in[r * head_dim + i] = Widen(Rounded<T>(Widen(q[place(r) + i]) * scale));
    auto tile = [&](const T* pool, int64_t page) {
      return pool + (table[block * pages_of_row + page] * heads + head) * page_size * head_dim;
    };
    for (int64_t page = first; page < end; ++page)
      DotProduct(rows, in, head_dim, tile(k_pages, page), head_dim, page_size, scores + (page - first) * page_size, span);
    std::vector<float> totals(rows, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = position + low + r / group - first * page_size;  // its own place among the scores
      const int64_t from = window > 0 ? std::max<int64_t>(0, at - window + 1) : 0;
      float *row = scores + r * span, best = row[from];
      for (int64_t i = from; i <= at; ++i) best = std::max(best, row[i]);
      for (int64_t i = 0; i < span; ++i) {
        const float share = i < from || i > at ? 0.0f : std::exp(row[i] - best);
        totals[r] += share;
        row[i] = Widen(Rounded<T>(share));
      }
    }
    for (int64_t page = first; page < end; ++page) {
      const int64_t written = std::min(page_size, position + high - page * page_size);  // what lies beyond is anything
      AddProduct(rows, scores + (page - first) * page_size, span, tile(v_pages, page), head_dim, written, head_dim, mixed,
                 head_dim);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < head_dim; ++i) Narrow(mixed[r * head_dim + i] / totals[r], out + place(r) + i);
  }

  void RunAll(ffi::ThreadPool& pool) const {
    struct Item {
      int64_t block, head, low, high;
    };
    std::vector<Item> items;
    std::fill(out, out + blocks * tokens * heads * group * head_dim, T{});
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t low = 0; low < counts[block]; low += kTile)
        for (int64_t head = 0; head < heads; ++head)
          items.push_back({block, head, low, std::min<int64_t>(low + kTile, counts[block])});
    const int64_t count = static_cast<int64_t>(items.size());
    ForEach(pool, count, count < 4 ? 1 : NumThreads(pool), [&](int64_t item, int64_t) {
      Run(items[item].block, items[item].head, items[item].low, items[item].high);
    });
  }
};

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages,
                          ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> counts,
                          ffi::Result<ffi::AnyBuffer> out, int64_t window) {
  const auto of = q.dimensions();
  auto run = [&](auto kind) {
    using T = decltype(kind);
    Paged<T>{static_cast<const T*>(q.untyped_data()), static_cast<const T*>(k_pages.untyped_data()),
             static_cast<const T*>(v_pages.untyped_data()), table.typed_data(), positions.typed_data(),
             counts.typed_data(), static_cast<T*>(out->untyped_data()), of[0], of[1], of[2], of[3], of[4],
             table.dimensions()[1], k_pages.dimensions()[2], window}
        .RunAll(pool);
    return ffi::Error::Success();
  };
  if (q.element_type() == ffi::BF16) return run(uint16_t{});
  if (q.element_type() == ffi::F32) return run(float{});
  return ffi::Error::InvalidArgument("attention=native takes bfloat16 or float32");
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoePaged, jaxmoe::PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window"));
