// Attention over pages for ops/paged.py: one item is some tokens of one block and one key/value head.

#include "rows.h"

namespace ffi = xla::ffi;

namespace jaxmoe {
namespace {

constexpr int64_t kTile = 16;  // tokens of an item

// T: numbers of queries and results; P: of pages, each token and head with a scale where there are scales.
template <typename T, typename P>
struct Paged {
  const T* q;
  const P *k_pages, *v_pages;
  const float *k_scales, *v_scales;
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
    auto first_token = [&](int64_t page) { return (table[block * pages_of_row + page] * heads + head) * page_size; };
    auto tile = [&](const P* pool, int64_t page) { return pool + first_token(page) * head_dim; };
    for (int64_t page = first; page < end; ++page)
      DotProduct(rows, in, head_dim, tile(k_pages, page), head_dim, page_size, scores + (page - first) * page_size, span);
    std::vector<float> key_scale, value_scale;
    if (k_scales != nullptr) {
      key_scale.resize(span);
      value_scale.resize(span);
      for (int64_t page = first; page < end; ++page)
        for (int64_t i = 0; i < page_size; ++i) {
          key_scale[(page - first) * page_size + i] = k_scales[first_token(page) + i];
          value_scale[(page - first) * page_size + i] = v_scales[first_token(page) + i];
        }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < span; ++i) scores[r * span + i] *= key_scale[i];
    }
    std::vector<float> totals(rows, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = position + low + r / group - first * page_size;  // its own place among the scores
      const int64_t from = window > 0 ? std::max<int64_t>(0, at - window + 1) : 0;
      float *row = scores + r * span, best = row[from];
      for (int64_t i = from; i <= at; ++i) best = std::max(best, row[i]);
      for (int64_t i = 0; i < span; ++i) {
        const float share = i < from || i > at ? 0.0f : std::exp(row[i] - best);
        totals[r] += share;
        row[i] = Widen(Rounded<T>(value_scale.empty() || share == 0.0f ? share : share * value_scale[i]));
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
                          ffi::AnyBuffer k_scales, ffi::AnyBuffer v_scales, ffi::Buffer<ffi::S32> table,
                          ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> counts, ffi::Result<ffi::AnyBuffer> out,
                          int64_t window) {
  const auto of = q.dimensions();
  auto run = [&](auto kind, auto kept) {
    using T = decltype(kind);
    using P = decltype(kept);
    const bool scaled = sizeof(P) == 1;
    auto scales = [&](ffi::AnyBuffer& buffer) { return scaled ? static_cast<const float*>(buffer.untyped_data()) : nullptr; };
    Paged<T, P>{static_cast<const T*>(q.untyped_data()), static_cast<const P*>(k_pages.untyped_data()),
                static_cast<const P*>(v_pages.untyped_data()), scales(k_scales), scales(v_scales), table.typed_data(),
                positions.typed_data(), counts.typed_data(), static_cast<T*>(out->untyped_data()), of[0], of[1], of[2],
                of[3], of[4], table.dimensions()[1], k_pages.dimensions()[2], window}
        .RunAll(pool);
    return ffi::Error::Success();
  };
  auto by_pages = [&](auto kind) {
    switch (k_pages.element_type()) {
      case ffi::BF16: return run(kind, uint16_t{});
      case ffi::F32: return run(kind, float{});
      case ffi::S8: return run(kind, int8_t{});
      case ffi::F8E4M3FN: return run(kind, Float8{});
      default: return ffi::Error::InvalidArgument("attention=native takes pages of bfloat16, float32, int8 or float8_e4m3fn");
    }
  };
  if (q.element_type() == ffi::BF16) return by_pages(uint16_t{});
  if (q.element_type() == ffi::F32) return by_pages(float{});
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
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window"));
