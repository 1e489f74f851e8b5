// Row-wise operations between matmuls: norms, rotary embedding, routing, gates. Each row is computed by itself in a
// fixed order. The compiler's own vector code may round a row differently depending on the number of rows.

#include "rows.h"

namespace jaxmoe {
namespace {

constexpr int64_t kLeastNumbers = 1 << 15;  // per thread: less work is not worth waking a thread

// Calls work(row) for every row of `numbers` elements. Large inputs are split among several threads.
template <typename Work>
void ForEachRow(const Threads& pool, int64_t rows, int64_t numbers, const Work& work) {
  const int64_t runs = std::clamp<int64_t>(rows * numbers / kLeastNumbers, 1, std::max<int64_t>(1, rows));
  const int64_t parts = std::min(runs, 2 * pool.Count());
  ForEach(pool, parts, parts > 1 ? pool.Count() : 1, [&](int64_t part, int64_t) {
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) work(row);
  });
}

// LoadSome and StoreSome access a strip of numbers from index `i` of `count`. LoadSome pads it with zeros.
template <typename T>
Floats LoadSome(const T* from, int64_t i, int64_t count) {
  if (i + kLanes <= count) return Load(from + i);
  float strip[kLanes] = {};
  for (int64_t j = i; j < count; ++j) strip[j - i] = Widen(from[j]);
  return Load(strip);
}
template <typename T>
void StoreSome(Floats values, T* to, int64_t i, int64_t count) {
  for (int64_t j = i; j < std::min(count, i + kLanes); ++j) Narrow(values[j - i], to + j);
}

template <typename T>
Floats RoundedStrip(Floats values) {
  if (sizeof(T) == 4) return values;
  for (int64_t j = 0; j < kLanes; ++j) values[j] = Widen(Rounded<T>(values[j]));
  return values;
}

inline Floats Sigmoid(Floats x) { return 1.0f / (1.0f + Exp(-x)); }

// Returns the sum of the squares of `width` numbers.
template <typename T>
float SquaresOf(const T* from, int64_t width) {
  Floats sums[2] = {};
  for (int64_t i = 0, s = 0; i < width; i += kLanes, s ^= 1) {
    const Floats strip = LoadSome(from, i, width);
    sums[s] = MultiplyAdd(strip, strip, sums[s]);
  }
  return Sum(sums[0] + sums[1]);
}

// Divides `width` numbers by the root of a mean square and multiplies them by weight.
template <typename T>
void Scale(const T* from, const T* weight, float mean, float eps, T* to, int64_t width) {
  const Floats factor = Spread(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < width; i += kLanes)
    StoreSome(LoadSome(weight, i, width) * RoundedStrip<T>(LoadSome(from, i, width) * factor), to, i, width);
}

// Divides rows of x by their root mean square and multiplies them by weight.
template <typename T>
void Norm(const Call& call) {
  const Array x = call.Argument(0), weight = call.Argument(1);
  const int64_t width = x.Size(1);
  const float eps = call.Attribute<float>("eps");
  const T *in = x.As<T>(), *scale = weight.As<T>();
  T* out = call.Result().As<T>();
  ForEachRow(call.Pool(), x.Size(0), width, [&](int64_t row) {
    const float mean = SquaresOf(in + row * width, width) / static_cast<float>(width);
    Scale(in + row * width, scale, mean, eps, out + row * width, width);
  });
}

// Computes the sum of the squares of every row of x.
template <typename T>
void Squares(const Call& call) {
  const Array x = call.Argument(0);
  const int64_t width = x.Size(1);
  float* out = call.Result().As<float>();
  ForEachRow(call.Pool(), x.Size(0), width,
             [&](int64_t row) { out[row] = SquaresOf(x.As<T>() + row * width, width); });
}

// Divides rows of x by the roots of the given mean squares and multiplies them by weight.
template <typename T>
void Scaled(const Call& call) {
  const Array x = call.Argument(0), weight = call.Argument(1), means = call.Argument(2);
  const int64_t width = x.Size(1);
  const float eps = call.Attribute<float>("eps");
  T* out = call.Result().As<T>();
  ForEachRow(call.Pool(), x.Size(0), width, [&](int64_t row) {
    Scale(x.As<T>() + row * width, weight.As<T>(), means.As<float>()[row], eps, out + row * width, width);
  });
}

// Rotates each pair (i, i + half) of x [tokens, heads, 2 * half] by angle i of its token.
template <typename T>
void Rotate(const Call& call) {
  const Array x = call.Argument(0), cosines = call.Argument(1), sines = call.Argument(2);
  const int64_t heads = x.Size(1), half = cosines.Size(1);
  const T* in = x.As<T>();
  T* out = call.Result().As<T>();
  ForEachRow(call.Pool(), x.Size(0) * heads, 2 * half, [&](int64_t row) {
    const float *cos = cosines.As<float>() + row / heads * half, *sin = sines.As<float>() + row / heads * half;
    const T *left = in + row * 2 * half, *right = left + half;
    T *low = out + row * 2 * half, *high = low + half;
    for (int64_t i = 0; i < half; i += kLanes) {
      const Floats c = LoadSome(cos, i, half), s = LoadSome(sin, i, half);
      const Floats l = LoadSome(left, i, half), r = LoadSome(right, i, half);
      StoreSome(l * c - r * s, low, i, half);
      StoreSome(r * c + l * s, high, i, half);
    }
  });
}

// Computes silu(gate) * up of gate and up [rows, columns].
template <typename T>
void GatedUnit(const Call& call) {
  const Array gates = call.Argument(0);
  const int64_t columns = gates.Size(1);
  T* out = call.Result().As<T>();
  ForEachRow(call.Pool(), gates.Size(0), 2 * columns, [&](int64_t row) {
    const T *gate = gates.As<T>() + row * columns, *up = call.Argument(1).As<T>() + row * columns;
    for (int64_t i = 0; i < columns; i += kLanes) {
      const Floats g = LoadSome(gate, i, columns);
      StoreSome(g * Sigmoid(g) * LoadSome(up, i, columns), out + row * columns, i, columns);
    }
  });
}

// Multiplies rows of x [rows, columns] by the sigmoid of their gate [rows, 1].
template <typename T>
void GatedRows(const Call& call) {
  const Array x = call.Argument(0), gates = call.Argument(1);
  const int64_t columns = x.Size(1);
  const T* in = x.As<T>();
  T* out = call.Result().As<T>();
  ForEachRow(call.Pool(), x.Size(0), columns, [&](int64_t row) {
    const Floats share = Sigmoid(Spread(Widen(gates.As<T>()[row])));
    for (int64_t i = 0; i < columns; i += kLanes)
      StoreSome(LoadSome(in + row * columns, i, columns) * share, out + row * columns, i, columns);
  });
}

// Maps a float to an integer that sorts as XLA's top-k does: NaN above all, minus zero below zero.
inline int32_t OrderOf(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}

// Returns the indices of the `top` largest of `count` values, largest first. Ties go to the lower index. The result is
// valid until the next call on this thread.
inline const int32_t* TopOf(const float* values, int64_t count, int64_t top) {
  static thread_local std::vector<int32_t> order;
  order.resize(count);
  for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
  std::partial_sort(order.begin(), order.begin() + top, order.end(), [&](int32_t a, int32_t b) {
    const int32_t x = OrderOf(values[a]), y = OrderOf(values[b]);
    return x > y || (x == y && a < b);
  });
  return order.data();
}

// Group-limited routing: the experts that a token may choose.
struct Limit {
  int64_t groups, top, best;

  // Copies the choice of the best groups to kept [experts]; the other experts get minus infinity.
  void Keep(const float* choice, int64_t experts, float* kept) const {
    const int64_t size = experts / groups, best_few = std::min(best, size);
    std::fill_n(kept, experts, -INFINITY);
    std::vector<float> scores(groups, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t* few = TopOf(choice + g * size, size, best_few);
      for (int64_t i = 0; i < best_few; ++i) scores[g] += choice[g * size + few[i]];
    }
    const int32_t* among = TopOf(scores.data(), groups, top);
    for (int64_t k = 0; k < top; ++k) std::copy_n(choice + among[k] * size, size, kept + among[k] * size);
  }
};

constexpr float kTiny = 1e-20f;  // as in DeepSeek-V3: keeps the sum of sigmoids above zero

// Computes the scores of logits [tokens, experts] and the combine weights of each token's best experts, chosen by score
// (or logit) plus bias. Weights are zero for other experts and for tokens that are not valid.
void RouteAll(const Call& call) {
  const Array logits = call.Argument(0), valid = call.Argument(1), bias = call.Argument(2);
  const int64_t experts = logits.Size(1), chosen = std::min<int64_t>(call.Attribute<int64_t>("top_k"), experts);
  const bool normalize = call.Attribute<int64_t>("normalize") != 0, sigmoid = call.Attribute<int64_t>("sigmoid") != 0;
  const bool by_logits = call.Attribute<int64_t>("by_logits") != 0;
  const float scaling = call.Attribute<float>("scaling");
  const Limit limit{call.Attribute<int64_t>("num_groups"), call.Attribute<int64_t>("top_groups"),
                    call.Attribute<int64_t>("best")};
  ForEachRow(call.Pool(), logits.Size(0), experts * (4 + chosen), [&](int64_t row) {
    const float* from = logits.As<float>() + row * experts;
    float *weights = call.Result(0).As<float>() + row * experts, *shares = call.Result(1).As<float>() + row * experts;
    if (sigmoid) {
      for (int64_t i = 0; i < experts; i += kLanes) StoreSome(Sigmoid(LoadSome(from, i, experts)), shares, i, experts);
    } else {
      float best = from[0], total = 0.0f;
      for (int64_t e = 1; e < experts; ++e) best = std::max(best, from[e]);
      for (int64_t i = 0; i < experts; i += kLanes) StoreSome(Exp(LoadSome(from, i, experts) - best), shares, i, experts);
      for (int64_t e = 0; e < experts; ++e) total += shares[e];
      for (int64_t e = 0; e < experts; ++e) shares[e] /= total;
    }
    std::fill_n(weights, experts, 0.0f);
    if (!valid.As<const bool>()[row]) return;
    const float* compared = by_logits ? from : shares;
    std::vector<float> choice(compared, compared + experts), kept(experts);
    if (bias.Size(0) > 0)
      for (int64_t e = 0; e < experts; ++e) choice[e] += bias.As<float>()[e];
    if (limit.groups > 1) {
      limit.Keep(choice.data(), experts, kept.data());
      choice.swap(kept);
    }
    const int32_t* top = TopOf(choice.data(), experts, chosen);
    float divisor = 1.0f;
    if (normalize) {
      divisor = 0.0f;
      for (int64_t k = 0; k < chosen; ++k) divisor += shares[top[k]];
      if (sigmoid) divisor += kTiny;
    }
    for (int64_t k = 0; k < chosen; ++k) weights[top[k]] = shares[top[k]] / divisor * scaling;
  });
}

template <void (*Half)(const Call&), void (*Full)(const Call&)>
XLA_FFI_Error* ByKind(const Call& call) {
  const auto kind = call.Argument(0).Kind();
  if (kind != kBfloat16 && kind != kFloat32) return call.Refuse("pointwise=native takes bfloat16 or float32");
  kind == kBfloat16 ? Half(call) : Full(call);
  return nullptr;
}

XLA_FFI_Error* Route(const Call& call) {
  RouteAll(call);
  return nullptr;
}

}  // namespace
}  // namespace jaxmoe

JAXMOE_KERNEL(JaxmoeNorm, 2, 1, (jaxmoe::ByKind<jaxmoe::Norm<uint16_t>, jaxmoe::Norm<float>>))
JAXMOE_KERNEL(JaxmoeSquares, 1, 1, (jaxmoe::ByKind<jaxmoe::Squares<uint16_t>, jaxmoe::Squares<float>>))
JAXMOE_KERNEL(JaxmoeScaled, 3, 1, (jaxmoe::ByKind<jaxmoe::Scaled<uint16_t>, jaxmoe::Scaled<float>>))
JAXMOE_KERNEL(JaxmoeRotate, 3, 1, (jaxmoe::ByKind<jaxmoe::Rotate<uint16_t>, jaxmoe::Rotate<float>>))
JAXMOE_KERNEL(JaxmoeGatedUnit, 2, 1, (jaxmoe::ByKind<jaxmoe::GatedUnit<uint16_t>, jaxmoe::GatedUnit<float>>))
JAXMOE_KERNEL(JaxmoeGatedRows, 2, 1, (jaxmoe::ByKind<jaxmoe::GatedRows<uint16_t>, jaxmoe::GatedRows<float>>))
JAXMOE_KERNEL(JaxmoeRoute, 3, 2, jaxmoe::Route)
