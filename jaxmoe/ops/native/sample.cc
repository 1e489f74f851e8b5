// Sampling of one token per row, for ops/sampling. SamplingArrays in arrays.py there documents the parameters.

#include "rows.h"

#include <limits>
#include <numeric>

namespace jaxmoe {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

inline uint32_t TurnLeft(uint32_t x, int by) { return (x << by) | (x >> (32 - by)); }

// Threefry-2x32 of 20 rounds. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
inline void Threefry(uint32_t key0, uint32_t key1, uint32_t* x0, uint32_t* x1) {
  static constexpr int kTurns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
  *x0 += keys[0];
  *x1 += keys[1];
  for (uint32_t group = 0; group < 5; ++group) {
    for (int turn : kTurns[group % 2]) {
      *x0 += *x1;
      *x1 = TurnLeft(*x1, turn) ^ *x0;
    }
    *x0 += keys[(group + 1) % 3];
    *x1 += keys[(group + 2) % 3] + group + 1;
  }
}

inline float Gumbel(uint32_t bits) {
  bits = (bits >> 9) | 0x3f800000u;
  float uniform;
  std::memcpy(&uniform, &bits, 4);
  return -std::log(-std::log(uniform - 1.0f + 0x1p-24f));
}

struct Rows {
  const float* logits;
  const int32_t *token_pages, *block_table, *positions;
  const bool* features;  // random, adjusted, top, masked: see SamplingFeatures
  const float *temperature, *top_p, *min_p, *repetition, *presence, *frequency, *bias;
  const int32_t *top_k, *prompt_length, *bias_token_ids, *num_stop_ids, *min_tokens_until, *token_bitmask;
  const uint32_t *seed, *seed_high;
  int64_t vocab, page_size, pages_of_row, num_bias_ids, num_top, num_words;
  int32_t *tokens, *top_tokens;
  float *logprobs, *top_logprobs;

  // Applies penalties, biases and token bans to the row's logits in out.
  void Adjust(int64_t row, float* out) const {
    if (repetition[row] != 1.0f || presence[row] != 0.0f || frequency[row] != 0.0f) {
      std::vector<int32_t> seen(vocab, 0), answered(vocab, 0);
      const int64_t known = std::min<int64_t>(positions[row], pages_of_row * page_size);
      for (int64_t place = 0; place < known; ++place) {
        const int64_t page = block_table[row * pages_of_row + place / page_size];
        const int32_t token = token_pages[page * page_size + place % page_size];
        if (token < 0 || token >= vocab) continue;
        seen[token] = 1;
        if (place >= prompt_length[row]) ++answered[token];
      }
      for (int64_t token = 0; token < vocab; ++token) {
        if (!seen[token]) continue;
        out[token] = out[token] > 0 ? out[token] / repetition[row] : out[token] * repetition[row];
        if (answered[token]) out[token] -= presence[row] + frequency[row] * static_cast<float>(answered[token]);
      }
    }
    for (int64_t i = 0; i < num_bias_ids; ++i) {
      const int32_t token = bias_token_ids[row * num_bias_ids + i];
      if (token >= 0 && token < vocab) out[token] += bias[row * num_bias_ids + i];
    }
    for (int64_t i = 0; i < num_stop_ids[row] && positions[row] < min_tokens_until[row]; ++i) {
      const int32_t token = bias_token_ids[row * num_bias_ids + i];
      if (token >= 0 && token < vocab) out[token] = kNever;
    }
  }

  // Sets the logits in out of tokens that the row's bitmask excludes to minus infinity. Returns whether the row lost its
  // last token that way.
  bool Mask(int64_t row, float* out) const {
    bool left = false, lost = false;
    for (int64_t token = 0; token < vocab; ++token) {
      const uint32_t word = static_cast<uint32_t>(token_bitmask[row * num_words + token / 32]);
      const bool allowed = (word >> (token % 32)) & 1u;
      (allowed ? left : lost) |= out[token] > kNever;
      if (!allowed) out[token] = kNever;
    }
    return lost && !left;
  }

  // Returns the smallest entry of `scaled` (maximum 0) that remains after top-k, top-p and min-p.
  float Lowest(int64_t row, const float* scaled) const {
    std::vector<float> falling(scaled, scaled + vocab);
    falling.erase(std::remove_if(falling.begin(), falling.end(), [](float x) { return x != x; }), falling.end());
    if (falling.empty()) return kNever;
    const int64_t most = top_k[row] > 0 ? std::min<int64_t>(top_k[row], vocab) : vocab;
    float lowest = kNever;
    if (most < static_cast<int64_t>(falling.size())) {
      std::nth_element(falling.begin(), falling.begin() + most - 1, falling.end(), std::greater<float>());
      lowest = falling[most - 1];
      falling.erase(std::remove_if(falling.begin(), falling.end(), [&](float x) { return !(x >= lowest); }),
                    falling.end());
    }
    if (min_p[row] > 0.0f) lowest = std::max(lowest, std::min(0.0f, std::log(min_p[row])));
    if (top_p[row] < 1.0f) {
      std::sort(falling.begin(), falling.end(), std::greater<float>());
      float total = 0.0f, before = 0.0f, last = 0.0f;  // last: lowest score within the top-p set
      for (float x : falling) total += std::exp(x);
      for (float x : falling) {
        if (before > 0.0f && before / total >= top_p[row]) break;
        last = x;
        before += std::exp(x);
      }
      lowest = std::max(lowest, last);
    }
    return lowest;
  }

  int32_t Draw(int64_t row, const float* adjusted, float best) const {
    std::vector<float> scaled(vocab);
    for (int64_t token = 0; token < vocab; ++token) scaled[token] = (adjusted[token] - best) / temperature[row];
    const bool filters = top_k[row] > 0 || top_p[row] < 1.0f || min_p[row] > 0.0f;
    const float lowest = filters ? Lowest(row, scaled.data()) : kNever;
    const int64_t half = (vocab + 1) / 2;
    uint32_t key0 = seed[row], key1 = static_cast<uint32_t>(positions[row]);
    if (seed_high[row] != 0) {  // 64-bit seed
      uint32_t x0 = key1, x1 = 0;
      Threefry(seed[row], seed_high[row], &x0, &x1);
      key0 = x0, key1 = x1;
    }
    int64_t sampled = -1;
    float highest = kNever;
    auto offer = [&](int64_t token, uint32_t bits) {
      if (!(scaled[token] >= lowest) || scaled[token] == kNever) return;
      const float value = scaled[token] + Gumbel(bits);
      if (sampled < 0 || value > highest || (value == highest && token < sampled)) highest = value, sampled = token;
    };
    for (int64_t token = 0; token < half; ++token) {
      const int64_t second = token + half;
      if (!(scaled[token] >= lowest) && (second >= vocab || !(scaled[second] >= lowest))) continue;
      uint32_t x0 = static_cast<uint32_t>(token), x1 = second < vocab ? static_cast<uint32_t>(second) : 0;
      Threefry(key0, key1, &x0, &x1);
      offer(token, x0);
      if (second < vocab) offer(second, x1);
    }
    return static_cast<int32_t>(sampled < 0 ? 0 : sampled);
  }

  // Returns the log-sum-exp of the logits, with the maximum subtracted first. Strips are added in order. NaN if a logit
  // is NaN or plus infinity, or if all are minus infinity.
  float LogSum(const float* from, float best) const {
    Floats sums = {};
    int64_t i = 0;
    for (; i + kLanes <= vocab; i += kLanes) sums += Exp(Load(from + i) - best);
    float total = Sum(sums);
    for (; i < vocab; ++i) total += std::exp(from[i] - best);
    return std::log(total) + best;
  }

  void Run(int64_t row) const {
    static thread_local std::vector<float> room;
    const float* raw = logits + row * vocab;
    const float* adjusted = raw;
    bool lost = false;
    if (features[1] || features[3]) {
      room.assign(raw, raw + vocab);
      if (features[1]) Adjust(row, room.data());
      if (features[3]) lost = Mask(row, room.data());
      adjusted = room.data();
    }
    const int64_t best = std::max_element(adjusted, adjusted + vocab) - adjusted;
    tokens[row] = static_cast<int32_t>(best);
    if (features[0] && temperature[row] > 0.0f) tokens[row] = Draw(row, adjusted, adjusted[best]);
    const float total = LogSum(raw, adjusted == raw ? raw[best] : *std::max_element(raw, raw + vocab));
    logprobs[row] = lost ? std::numeric_limits<float>::quiet_NaN() : raw[tokens[row]] - total;
    if (!features[2]) {
      std::fill_n(top_tokens + row * num_top, num_top, 0);
      std::fill_n(top_logprobs + row * num_top, num_top, 0.0f);
      return;
    }
    std::vector<int32_t> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + num_top, order.end(), [&](int32_t a, int32_t b) {
      return raw[a] > raw[b] || (raw[a] == raw[b] && a < b);
    });
    for (int64_t i = 0; i < num_top; ++i) {
      top_tokens[row * num_top + i] = order[i];
      top_logprobs[row * num_top + i] = raw[order[i]] - total;
    }
  }
};

XLA_FFI_Error* Sample(const Call& call) {
  const Array logits = call.Argument(0), pages = call.Argument(1), block_table = call.Argument(2);
  if (logits.Kind() != kFloat32) return call.Refuse("sampling=native takes logits of float32");
  int64_t next = 5;
  auto floats = [&] { return call.Argument(next++).As<const float>(); };
  auto ints = [&] { return call.Argument(next++).As<const int32_t>(); };
  Rows rows;
  rows.logits = logits.As<float>();
  rows.token_pages = pages.As<int32_t>();
  rows.block_table = block_table.As<int32_t>();
  rows.positions = call.Argument(3).As<int32_t>();
  rows.features = call.Argument(4).As<bool>();
  rows.temperature = floats();
  rows.top_k = ints();
  rows.top_p = floats();
  rows.min_p = floats();
  rows.seed = call.Argument(next++).As<uint32_t>();
  rows.seed_high = call.Argument(next++).As<uint32_t>();
  rows.repetition = floats();
  rows.presence = floats();
  rows.frequency = floats();
  rows.prompt_length = ints();
  rows.num_bias_ids = call.Argument(next).Size(1);
  rows.bias_token_ids = ints();
  rows.bias = floats();
  rows.num_stop_ids = ints();
  rows.min_tokens_until = ints();
  rows.num_words = call.Argument(next).Size(1);
  rows.token_bitmask = ints();
  rows.vocab = logits.Size(1);
  rows.page_size = pages.Size(1);
  rows.pages_of_row = block_table.Size(1);
  rows.num_top = call.Result(2).Size(1);
  rows.tokens = call.Result(0).As<int32_t>();
  rows.logprobs = call.Result(1).As<float>();
  rows.top_tokens = call.Result(2).As<int32_t>();
  rows.top_logprobs = call.Result(3).As<float>();
  const int64_t count = logits.Size(0);
  const Threads pool = call.Pool();
  ForEach(pool, count, count * rows.vocab < (1 << 15) ? 1 : pool.Count(), [&](int64_t row, int64_t) { rows.Run(row); });
  return nullptr;
}

}  // namespace
}  // namespace jaxmoe

JAXMOE_KERNEL(JaxmoeSample, 20, 4, jaxmoe::Sample)
