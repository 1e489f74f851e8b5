// Grouped SwiGLU of routed experts. For few tokens, weights are read from memory once. Weights of experts without
// tokens are never read.
//
// Rows are (token, expert) pairs with a nonzero weight, sorted by expert and then by token. A work item is a block of
// rows of one expert. If there are too few items for all threads, each is split along the expert width F. Items are
// independent, and threads fetch them in turn. Row results are stored, and a token's rows are added in the order of the
// experts. The order of every sum depends on the shapes alone, so a token's result is bitwise independent of other
// tokens and of the threads.

#include "packed.h"

namespace jaxmoe {
namespace {

constexpr int64_t kRange = 256;  // columns of F per partial sum of the matmul with `down`

constexpr int64_t kMostTokens = 2048;  // per pass; the results of their rows are buffered

struct Item {
  int64_t expert, first, rows, low, high;  // rows [first, first + rows), ranges [low, high)
};

template <typename T>
struct Problem {
  const T *x, *gate_up, *down, *bias;  // bias [experts, gate or up, ffn]: null without bias
  float limit, alpha;                  // of the clamped SwiGLU; limit 0 selects the plain one
  const float* weights;  // [tokens, experts]
  int64_t num_tokens, num_experts, width, ffn;
  std::vector<int32_t> tokens;   // token of every row
  std::vector<int32_t> experts;  // expert of every row
  std::vector<int32_t> rows_of;  // rows sorted by token, then expert
  std::vector<int32_t> ends;     // end of every token's rows in rows_of
  std::vector<Item> items;
  bool split = false;  // whether items are split along F; each range then stores its own result

  int64_t NumRanges() const { return (ffn + kRange - 1) / kRange; }
  int64_t NumRows() const { return static_cast<int64_t>(tokens.size()); }

  void Plan(int64_t threads) {
    std::vector<int64_t> starts;
    for (int64_t e = 0; e < num_experts; ++e) {
      starts.push_back(NumRows());
      for (int64_t t = 0; t < num_tokens; ++t)
        if (weights[t * num_experts + e] != 0.0f) {
          tokens.push_back(static_cast<int32_t>(t));
          experts.push_back(static_cast<int32_t>(e));
        }
    }
    starts.push_back(NumRows());
    for (int64_t e = 0; e < num_experts; ++e)
      for (int64_t first = starts[e]; first < starts[e + 1]; first += kRowBlock)
        items.push_back({e, first, std::min(kRowBlock, starts[e + 1] - first), 0, NumRanges()});
    const int64_t whole = static_cast<int64_t>(items.size());
    const int64_t parts = whole ? std::min((2 * threads + whole - 1) / whole, NumRanges()) : 1;
    if (parts > 1) {  // only with few items: longer rows of the matrix are read faster
      split = true;
      const std::vector<Item> wholes = std::move(items);
      items.clear();
      for (const Item& item : wholes)
        for (int64_t part = 0; part < parts; ++part)
          items.push_back({item.expert, item.first, item.rows, NumRanges() * part / parts,
                           NumRanges() * (part + 1) / parts});
    }
    ends.assign(num_tokens, 0);
    for (int32_t token : tokens) ++ends[token];
    for (int64_t t = 1; t < num_tokens; ++t) ends[t] += ends[t - 1];
    rows_of.resize(tokens.size());
    std::vector<int32_t> at(num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) at[t] = t ? ends[t - 1] : 0;
    for (int64_t row = 0; row < NumRows(); ++row) rows_of[at[tokens[row]]++] = static_cast<int32_t>(row);
  }

  // Computes one item. y: [ranges, rows, width] if split, else [rows, width].
  void Run(const Item& item, float* y) const {
    static thread_local std::vector<float> scratch;
    const int64_t rows = item.rows, from = item.low * kRange, to = std::min(ffn, item.high * kRange), range = to - from;
    scratch.resize(rows * (2 * width + 2 * range));
    float *in = scratch.data(), *both = in + rows * width, *part = both + rows * 2 * range;
    for (int64_t r = 0; r < rows; ++r) WidenAll(x + tokens[item.first + r] * width, width, in + r * width);
    std::fill(both, part, 0.0f);  // [rows, gate or up, range]
    const T* matrix = gate_up + item.expert * width * 2 * ffn;
    Add(rows, in, width, matrix + from, ffn, width, range, both, 2 * range);
    Add(rows, in, width, matrix + width * ffn + from, ffn, width, range, both + range, 2 * range);
    for (int64_t r = 0; r < rows; ++r) {
      float *gate = both + r * 2 * range, *up = gate + range;
      if (bias != nullptr) {
        const T* own = bias + item.expert * 2 * ffn + from;
        for (int64_t i = 0; i < range; ++i) gate[i] += Widen(own[i]), up[i] += Widen(own[ffn + i]);
      }
      if (limit > 0.0f)
        for (int64_t i = 0; i < range; ++i) {
          gate[i] = std::min(gate[i], limit);
          up[i] = std::clamp(up[i], -limit, limit) + 1.0f;
        }
      for (int64_t i = 0; i < range; i += kLanes) {  // rounded between the matmuls, as in the other backends
        float strip[2][kLanes] = {};
        const int64_t count = std::min(kLanes, range - i);
        std::copy_n(gate + i, count, strip[0]);
        std::copy_n(up + i, count, strip[1]);
        const Floats value = Load(strip[0]);
        Store(value / (1.0f + Exp(-alpha * value)) * Load(strip[1]), strip[0]);
        for (int64_t j = 0; j < count; ++j) gate[i + j] = Widen(Rounded<T>(strip[0][j]));
      }
    }
    for (int64_t index = item.low; index < item.high; ++index) {
      const int64_t low = index * kRange, deep = std::min(ffn, low + kRange) - low;
      const T* out = down + (item.expert * ffn + low) * width;
      const bool own = split || index == 0;
      float* result = y + ((split ? index * NumRows() : 0) + item.first) * width;
      float* sums = own ? result : part;
      std::fill_n(sums, rows * width, 0.0f);
      Add(rows, both + low - from, 2 * range, out, width, deep, width, sums, width);
      if (!own)
        for (int64_t i = 0; i < rows * width; ++i) result[i] += part[i];
    }
  }

  // Writes the weighted sum of a token's rows to out.
  void Collect(int64_t token, const float* y, T* out) const {
    static thread_local std::vector<float> sums, row_sums;
    sums.assign(width, 0.0f);
    for (int64_t at = token ? ends[token - 1] : 0; at < ends[token]; ++at) {
      const int64_t row = rows_of[at];
      const float scale = weights[token * num_experts + experts[row]];
      const float* value = y + row * width;
      if (split && NumRanges() > 1) {
        row_sums.assign(value, value + width);
        for (int64_t range = 1; range < NumRanges(); ++range)
          for (int64_t k = 0; k < width; ++k) row_sums[k] += value[range * NumRows() * width + k];
        value = row_sums.data();
      }
      for (int64_t k = 0; k < width; ++k) sums[k] = MultiplyAdd(scale, value[k], sums[k]);
    }
    for (int64_t k = 0; k < width; ++k) Narrow(sums[k], out + token * width + k);
  }

  void RunAll(const Threads& pool, T* out) {
    constexpr int64_t kTokens = 64;  // tokens per work item of Collect
    const int64_t threads = pool.Count();
    Plan(threads);
    const std::unique_ptr<float[]> results(new float[NumRows() * width * (split ? NumRanges() : 1)]);
    float* y = results.get();
    ForEach(pool, static_cast<int64_t>(items.size()), threads, [&](int64_t item, int64_t) { Run(items[item], y); });
    ForEach(pool, (num_tokens + kTokens - 1) / kTokens, threads, [&](int64_t group, int64_t) {
      for (int64_t t = group * kTokens; t < std::min(num_tokens, (group + 1) * kTokens); ++t) Collect(t, y, out);
    });
  }
};

template <typename T>
void RunExperts(const Call& call) {
  const Array x = call.Argument(0), weights = call.Argument(1), gate_up = call.Argument(2), down = call.Argument(3);
  const Array bias = call.Argument(4);
  const int64_t width = x.Size(1), num_experts = weights.Size(1), layer = *call.Argument(5).As<int32_t>();
  for (int64_t first = 0; first < x.Size(0); first += kMostTokens) {
    Problem<T> problem;
    problem.x = x.As<T>() + first * width;
    problem.gate_up = gate_up.As<T>() + layer * gate_up.Stride(0);
    problem.down = down.As<T>() + layer * down.Stride(0);
    problem.bias = bias.Size(0) > 0 ? bias.As<T>() + layer * bias.Stride(0) : nullptr;
    problem.limit = call.Attribute<float>("limit");
    problem.alpha = call.Attribute<float>("alpha");
    problem.weights = weights.As<float>() + first * num_experts;
    problem.num_tokens = std::min(kMostTokens, x.Size(0) - first);
    problem.num_experts = num_experts;
    problem.width = width;
    problem.ffn = down.Size(2);
    problem.RunAll(call.Pool(), call.Result().As<T>() + first * width);
  }
}

XLA_FFI_Error* Experts(const Call& call) {
  const auto kind = call.Argument(0).Kind();
  if (kind != kBfloat16 && kind != kFloat32) return call.Refuse("grouped=native takes bfloat16 or float32");
  kind == kBfloat16 ? RunExperts<uint16_t>(call) : RunExperts<float>(call);
  return nullptr;
}

}  // namespace
}  // namespace jaxmoe

JAXMOE_KERNEL(JaxmoeExperts, 6, 1, jaxmoe::Experts)
