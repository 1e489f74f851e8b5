// Paged attention for ops/paged_attention. One work item is a range of tokens of one query block and one key/value head.

#include "rows.h"

namespace jaxmoe {
namespace {

constexpr int64_t kTile = 16, kMostRows = 256;  // maximum tokens of an item, approximate maximum of its rows

// A number type: its size in bytes, its conversion to float and, for queries and results, from float.
struct Numbers {
  int64_t bytes;
  void (*widen)(const void* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, void* to);
};

template <typename T>
void WidenFrom(const void* from, int64_t count, float* to) {
  WidenAll(static_cast<const T*>(from), count, to);
}

template <typename T>
void NarrowTo(const float* from, int64_t count, void* to) {
  for (int64_t i = 0; i < count; ++i) Narrow(from[i], static_cast<T*>(to) + i);
}

template <typename T>
Numbers NumbersOf() {
  if constexpr (sizeof(T) == 1)
    return {1, WidenFrom<T>, nullptr};
  else
    return {sizeof(T), WidenFrom<T>, NarrowTo<T>};
}

// row[i] = e^(row[i] - best).
void Shares(float* row, int64_t count, float best) {
  for (int64_t i = 0; i < count; i += kLanes) {
    float strip[kLanes] = {};
    const int64_t some = std::min(kLanes, count - i);
    std::copy_n(row + i, some, strip);
    Store(Exp(Load(strip) - best), strip);
    std::copy_n(strip, some, row + i);
  }
}

struct Paged {
  Numbers numbers, cache;  // types of queries and results, and of pages
  const void *q, *k_pages, *v_pages;
  const float *k_scales, *v_scales;  // null if pages are not quantized
  const float* sinks;                // per query head; null without sinks
  const int32_t *block_table, *positions, *query_lens;
  void* out;
  int64_t blocks, tokens, heads, group, head_dim, value_dim, value_stride, pages_of_row, page_size, window, chunk;
  float scale;

  // Returns the first position that a query sees.
  int64_t First(int64_t at) const {
    const int64_t first = window > 0 ? std::max<int64_t>(0, at - window + 1) : 0;
    return chunk > 0 ? std::max(first, at / chunk * chunk) : first;
  }

  // Computes attention of tokens [low, high) of a block over the keys that they see.
  void Run(int64_t block, int64_t head, int64_t low, int64_t high) const {
    static thread_local std::vector<float> scratch;
    const int64_t rows = (high - low) * group, position = positions[block];
    const int64_t first = First(position + low) / page_size;
    const int64_t end = (position + high - 1) / page_size + 1, span = (end - first) * page_size;
    scratch.assign(rows * (head_dim + value_dim + span), 0.0f);
    float *in = scratch.data(), *mixed = in + rows * head_dim, *scores = mixed + rows * value_dim;
    auto place = [&](int64_t r) {  // index in q and out of row r, ordered by token, then query head
      return ((block * tokens + low + r / group) * heads + head) * group + r % group;
    };
    static thread_local std::vector<float> widened, rounding;
    widened.resize(page_size * std::max(head_dim, value_stride));
    rounding.resize(std::max(head_dim, span));
    auto rounded = [&](float* values, int64_t count) {  // rounds to the dtype of q, as the other backends do
      if (numbers.bytes == 4) return;
      numbers.narrow(values, count, rounding.data());
      numbers.widen(rounding.data(), count, values);
    };
    for (int64_t r = 0; r < rows; ++r) {
      numbers.widen(static_cast<const char*>(q) + place(r) * head_dim * numbers.bytes, head_dim, in + r * head_dim);
      for (int64_t i = 0; i < head_dim; ++i) in[r * head_dim + i] *= scale;
      rounded(in + r * head_dim, head_dim);
    }
    auto first_token = [&](int64_t page) { return (block_table[block * pages_of_row + page] * heads + head) * page_size; };
    auto wide = [&](const void* pool, int64_t page, int64_t stride) {
      const char* from = static_cast<const char*>(pool) + first_token(page) * stride * cache.bytes;
      if (cache.bytes == 4) return reinterpret_cast<const float*>(from);
      cache.widen(from, page_size * stride, widened.data());
      return static_cast<const float*>(widened.data());
    };
    for (int64_t page = first; page < end; ++page)
      DotProduct(rows, in, head_dim, wide(k_pages, page, head_dim), head_dim, page_size,
                 scores + (page - first) * page_size, span);
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
      const int64_t at = position + low + r / group - first * page_size;  // index of its own score
      const int64_t from = std::max<int64_t>(0, First(at + first * page_size) - first * page_size);
      float *row = scores + r * span, best = sinks != nullptr ? sinks[head * group + r % group] : row[from];
      const float sink = best;
      for (int64_t i = from; i <= at; ++i) best = std::max(best, row[i]);
      std::fill(row, row + from, 0.0f);
      std::fill(row + at + 1, row + span, 0.0f);
      Shares(row + from, at + 1 - from, best);
      for (int64_t i = from; i <= at; ++i) totals[r] += row[i];
      if (sinks != nullptr) totals[r] += std::exp(sink - best);
      if (!value_scale.empty())
        for (int64_t i = from; i <= at; ++i) row[i] *= value_scale[i];
      rounded(row, span);
    }
    for (int64_t page = first; page < end; ++page) {
      const int64_t written = std::min(page_size, position + high - page * page_size);  // the rest is undefined
      AddProduct(rows, scores + (page - first) * page_size, span, wide(v_pages, page, value_stride), value_stride,
                 written, value_dim, mixed, value_dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < value_dim; ++i) mixed[r * value_dim + i] /= totals[r];
      numbers.narrow(mixed + r * value_dim, value_dim, static_cast<char*>(out) + place(r) * value_dim * numbers.bytes);
    }
  }

  void RunAll(const Threads& pool) const {
    struct Item {
      int64_t block, head, low, high;
    };
    std::vector<Item> items;
    std::memset(out, 0, blocks * tokens * heads * group * value_dim * numbers.bytes);
    const int64_t tile = std::clamp<int64_t>(kMostRows / group, 1, kTile);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t low = 0; low < query_lens[block]; low += tile)
        for (int64_t head = 0; head < heads; ++head)
          items.push_back({block, head, low, std::min<int64_t>(low + tile, query_lens[block])});
    const int64_t count = static_cast<int64_t>(items.size());
    ForEach(pool, count, count < 4 ? 1 : pool.Count(), [&](int64_t item, int64_t) {
      Run(items[item].block, items[item].head, items[item].low, items[item].high);
    });
  }
};

XLA_FFI_Error* PagedAttention(const Call& call) {
  const Array q = call.Argument(0), k_pages = call.Argument(1), v_pages = call.Argument(2), block_table = call.Argument(5);
  const Array sinks = call.Argument(9);
  if (q.Kind() != kBfloat16 && q.Kind() != kFloat32) return call.Refuse("attention=native takes bfloat16 or float32");
  Numbers cache;
  switch (k_pages.Kind()) {
    case XLA_FFI_DataType_BF16: cache = NumbersOf<uint16_t>(); break;
    case XLA_FFI_DataType_F32: cache = NumbersOf<float>(); break;
    case XLA_FFI_DataType_S8: cache = NumbersOf<int8_t>(); break;
    case XLA_FFI_DataType_F8E4M3FN: cache = NumbersOf<Float8>(); break;
    default: return call.Refuse("attention=native takes pages of bfloat16, float32, int8 or float8_e4m3fn");
  }
  const int64_t layer = *call.Argument(8).As<int32_t>();
  auto pages = [&](const Array& all) { return all.As<const char>() + layer * all.Stride(0) * cache.bytes; };
  auto scales = [&](int64_t index) -> const float* {
    const Array all = call.Argument(index);
    return cache.bytes == 1 ? all.As<const float>() + layer * all.Stride(0) : nullptr;
  };
  Paged{q.Kind() == kBfloat16 ? NumbersOf<uint16_t>() : NumbersOf<float>(), cache, q.As<void>(), pages(k_pages),
        pages(v_pages), scales(3), scales(4), sinks.Size(0) > 0 ? sinks.As<float>() : nullptr, block_table.As<int32_t>(),
        call.Argument(6).As<int32_t>(), call.Argument(7).As<int32_t>(), call.Result().As<void>(), q.Size(0), q.Size(1),
        q.Size(2), q.Size(3), q.Size(4), call.Attribute<int64_t>("value_dim"), v_pages.Size(4), block_table.Size(1),
        k_pages.Size(3), call.Attribute<int64_t>("window"), call.Attribute<int64_t>("chunk"),
        call.Attribute<float>("scale")}
      .RunAll(call.Pool());
  return nullptr;
}

}  // namespace
}  // namespace jaxmoe

JAXMOE_KERNEL(JaxmoePaged, 10, 1, jaxmoe::PagedAttention)
