// One tile of stick-breaking attention: logits to weights and, for gradients, slopes of weights to
// slopes of logits, in place and in one pass over memory. At the end, all of it for one query per
// sequence, as in decoding: one pass over keys and values.
//
// A tile is [rows][keys][columns], a column being one query. Neighbouring columns are neighbours in
// memory, so a step from one key to the next is done for a strip of queries at once. What is left
// of a stick is a product over all keys: small shares are subtracted, since thousands of factors
// next to 1, each rounded and perhaps all alike, would show. Plain C++ (GNU vector types, OpenMP),
// without PyTorch's headers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // columns of a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int STRIP = 4 * W;  // columns that are carried together
constexpr float NOTHING = 1e-30f;  // less of a stick is taken for none; denormals would be slow

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf load(const float* p, int n) {
  if (n >= W) return load(p);
  float t[W] = {}; memcpy(t, p, n * sizeof(float)); return load(t);
}
INLINE void store(float* p, vf v, int n) {
  if (n >= W) { store(p, v); return; }
  float t[W]; store(t, v); memcpy(p, t, n * sizeof(float));
}
INLINE vi bits(vf v) { vi r; memcpy(&r, &v, sizeof r); return r; }
INLINE vf unbits(vi v) { vf r; memcpy(&r, &v, sizeof r); return r; }

// exp(x) within 2 ulp, on [-87, 87]; anything elsewhere.
INLINE vf vexp(vf x) {
  vf t = x * 1.44269504088896341f + 12582912.f;  // nearest integer by the magic constant
  vf n = t - 12582912.f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return unbits(bits(p) + (bits(t) << 23));  // the integer stands in the low bits of t
}

// sigma(z) and sigma(-z), each to its own last digits; exactly 0 and 1 below -87 (-inf: not seen).
INLINE void shares(vf z, vf& share, vf& rest) {
  vf u = vexp(z > 87.f ? vf{} - 87.f : -z);
  share = 1.f / (1.f + u);
  rest = u * share;
  share = z < -87.f ? vf{} : share;
  rest = z < -87.f ? vf{} + 1.f : rest;
}

// What is left after a share is taken.
INLINE vf after(vf left, vf share, vf rest) {
  vf next = share < 0.5f ? left - left * share : left * rest;
  return next < NOTHING ? vf{} : next;
}

struct Strip { int64_t first; int count; };  // columns

template <class Body> void for_strips(int64_t rows, int64_t columns, int threads, Body body) {
  int64_t strips = (columns + STRIP - 1) / STRIP, tasks = rows * strips;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && tasks > 1)
  for (int64_t t = 0; t < tasks; t++) {
    int64_t first = t % strips * STRIP;
    body(t / strips, Strip{first, int(std::min<int64_t>(STRIP, columns - first))});
  }
}

// Body of a strip for a count of vectors that the compiler knows; all full but perhaps the last.
template <int V> void spend_strip(float* z, float* left, int64_t keys, int64_t columns, int last) {
  vf r[V];
  for (int v = 0; v < V; v++) r[v] = load(left + v * W, v + 1 < V ? W : last);
  for (int64_t j = keys - 1; j >= 0; j--) {
    float* row = z + j * columns;
    for (int v = 0; v < V; v++) {
      int n = v + 1 < V ? W : last;
      vf share, rest;
      shares(load(row + v * W, n), share, rest);
      store(row + v * W, share * r[v], n);
      r[v] = after(r[v], share, rest);
    }
  }
  for (int v = 0; v < V; v++) store(left + v * W, r[v], v + 1 < V ? W : last);
}

template <int V>
void differentiate_strip(float* z, float* slope, const float* left, float* before, int64_t keys,
                         int64_t columns, int last, vf* scratch) {
  vf r[V], p[V];
  for (int v = 0; v < V; v++) {
    int n = v + 1 < V ? W : last;
    r[v] = load(left + v * W, n);
    p[v] = load(before + v * W, n);
  }
  for (int64_t j = keys - 1; j >= 0; j--) {
    float* row = z + j * columns;
    vf* own = scratch + j * 2 * V;
    for (int v = 0; v < V; v++) {
      int n = v + 1 < V ? W : last;
      vf share, rest;
      shares(load(row + v * W, n), share, rest);
      store(row + v * W, share * r[v], n);
      own[2 * v] = share;
      own[2 * v + 1] = rest;
      r[v] = after(r[v], share, rest);
    }
  }
  for (int64_t j = 0; j < keys; j++) {
    const vf* own = scratch + j * 2 * V;
    for (int v = 0; v < V; v++) {
      int n = v + 1 < V ? W : last;
      float* at = slope + j * columns + v * W;
      vf gain = load(z + j * columns + v * W, n) * load(at, n);
      store(at, own[2 * v + 1] * gain - own[2 * v] * p[v], n);
      p[v] += gain;
    }
  }
  for (int v = 0; v < V; v++) store(before + v * W, p[v], v + 1 < V ? W : last);
}

typedef uint16_t bf16;
typedef uint16_t vh __attribute__((vector_size(W * 2)));

INLINE vf widened(const float* p, int n) { return load(p, n); }
INLINE vf widened(const bf16* p, int n) {
  vh v = {};
  if (n >= W) memcpy(&v, p, sizeof v);
  else memcpy(&v, p, n * sizeof(bf16));
  return unbits(__builtin_convertvector(v, vi) << 16);
}

constexpr int AT_ONCE = W < 8 ? W : 8;  // keys whose logits are formed together
constexpr int FEWEST = 64, MOST = 512;  // keys that are read before their values are
constexpr int64_t IN_CACHE = 1 << 18;   // bytes of those keys and values

// Sums of halves of a and of b, in turns.
INLINE vf folded(vf a, vf b) {
  vi low, high;
  for (int i = 0; i < W; i++) low[i] = i / 2 + i % 2 * W, high[i] = low[i] + W / 2;
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// A matrix of one head's keys or values, newest last.
template <class E> struct Rows {
  const E* first;
  int64_t step, width;
  const E* at(int64_t i) const { return first + i * step; }
};

// Logits of n keys from `from` on for one query of floats, with zeros up to whole vectors.
template <class E> void logits(const float* q, Rows<E> k, int64_t from, int n, float* z) {
  for (int j = 0; j < n; j += AT_ONCE) {
    const E* row[AT_ONCE];
    vf sum[AT_ONCE] = {};
    for (int u = 0; u < AT_ONCE; u++) row[u] = k.at(from + std::min(j + u, n - 1));
    int64_t d = 0;
    for (; d + STRIP <= k.width; d += STRIP)  // rows one after the other, as memory foresees
      for (int u = 0; u < AT_ONCE; u++)
        for (int i = 0; i < STRIP; i += W) sum[u] += load(q + d + i) * widened(row[u] + d + i, W);
    for (; d < k.width; d += W)
      for (int u = 0; u < AT_ONCE; u++)
        sum[u] += load(q + d) * widened(row[u] + d, int(std::min<int64_t>(W, k.width - d)));
    for (int m = AT_ONCE / 2; m; m /= 2)
      for (int u = 0; u < m; u++) sum[u] = folded(sum[u], sum[u + m]);
    for (int u = 0; u < AT_ONCE; u++) z[j + u] = sum[0][u] + (W > AT_ONCE ? sum[0][W / 2 + u] : 0.f);
  }
}

// Turns logits into weights as `spend_strip` does, for one stick; what is left of it.
inline float serve(float* z, int n, float left) {
  float taken[MOST], other[MOST];
  for (int j = 0; j < n; j += W) {
    vf share, rest;
    shares(load(z + j), share, rest);
    store(taken + j, share);
    store(other + j, rest);
  }
  for (int j = n - 1; j >= 0; j--) {
    z[j] = taken[j] * left;
    left = taken[j] < 0.5f ? left - left * taken[j] : left * other[j];
    left = left < NOTHING ? 0.f : left;
  }
  return left;
}

// y += sum of n weighted values, V vectors of columns at a time.
template <int V, class E>
void gather(const float* weights, Rows<E> v, int64_t from, int n, int64_t column, int last,
            float* y) {
  vf sum[V];
  for (int i = 0; i < V; i++) sum[i] = load(y + column + i * W, i + 1 < V ? W : last);
  for (int j = 0; j < n; j++) {
    const E* row = v.at(from + j) + column;
    for (int i = 0; i < V; i++) sum[i] += weights[j] * widened(row + i * W, i + 1 < V ? W : last);
  }
  for (int i = 0; i < V; i++) store(y + column + i * W, sum[i], i + 1 < V ? W : last);
}

#define WITH_VECTORS(count, call)                                  \
  do {                                                             \
    int last = ((count) - 1) % W + 1;                              \
    switch (((count) + W - 1) / W) {                               \
      case 1: { constexpr int V = 1; call; break; }                \
      case 2: { constexpr int V = 2; call; break; }                \
      case 3: { constexpr int V = 3; call; break; }                \
      default: { constexpr int V = 4; call; }                      \
    }                                                              \
  } while (0)

// The group of queries that share the keys of a head; see below.
template <class E>
void decode_head(const float* q, Rows<E> k, Rows<E> v, const uint8_t* seen, int64_t group,
                 int64_t keys, float least, float* y, float* rest) {
  int64_t padded = (k.width + W - 1) / W * W;
  float z[MOST];
  std::fill(y, y + group * v.width, 0.f);
  std::fill(rest, rest + group, 1.f);
  // Few keys at first, since a stick may be used up soon; then more, since memory is read faster
  // the longer it is read in its order.
  int64_t row = (k.width + v.width) * sizeof(E);
  int64_t most_keys = std::clamp<int64_t>(IN_CACHE / row & -FEWEST, FEWEST, MOST), block = FEWEST;
  for (int64_t end = keys, from; end > 0; end = from, block = std::min(2 * block, most_keys)) {
    from = std::max<int64_t>(0, end - block);
    int n = int(end - from);
    float most = 0;
    for (int64_t g = 0; g < group; g++) {
      logits(q + g * padded, k, from, n, z);
      for (int j = 0; seen && j < n; j++)
        if (!seen[from + j]) z[j] = -INFINITY;
      rest[g] = serve(z, n, rest[g]);
      for (int64_t column = 0; column < v.width; column += STRIP) {
        int count = int(std::min<int64_t>(STRIP, v.width - column));
        WITH_VECTORS(count, (gather<V>(z, v, from, n, column, last, y + g * v.width)));
      }
      most = rest[g] <= most ? most : rest[g];  // NaN stays
    }
    if (most <= least) break;
  }
}

template <class E>
void decode(const E* q, const E* k, const E* v, const uint8_t* seen, float* y, float* rest,
            const int64_t* sizes, float scale, float least, int threads) {
  int64_t heads = sizes[1], group = sizes[2], keys = sizes[3], width = sizes[4], values = sizes[5];
  const int64_t *own = sizes + 6, *theirs = sizes + 9, seen_step = sizes[12];
  int64_t rows = sizes[0] * heads, padded = (width + W - 1) / W * W;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && rows > 1)
  for (int64_t r = 0; r < rows; r++) {
    static thread_local std::vector<float> scaled;
    scaled.assign(group * padded, 0.f);
    for (int64_t i = 0; i < group * width; i++)
      scaled[i / width * padded + i % width] = scale * widened(q + r * group * width + i, 1)[0];
    int64_t b = r / heads, h = r % heads;
    decode_head(scaled.data(), Rows<E>{k + b * own[0] + h * own[1], own[2], width},
                Rows<E>{v + b * theirs[0] + h * theirs[1], theirs[2], values},
                seen ? seen + b * seen_step : nullptr, group, keys, least,
                y + r * group * values, rest + r * group);
  }
}

}  // namespace

extern "C" {

// z [rows, keys, columns]: logits in, weights out; left [rows, columns]: of the sticks, before and
// after this tile.
void moduli_stick_spend(float* z, float* left, int64_t rows, int64_t keys, int64_t columns,
                        int threads) {
  for_strips(rows, columns, threads, [=](int64_t row, Strip s) {
    float* tile = z + row * keys * columns + s.first;
    float* own = left + row * columns + s.first;
    WITH_VECTORS(s.count, spend_strip<V>(tile, own, keys, columns, last));
  });
}

// The same, and slope [rows, keys, columns]: of weights in, of logits out; `left` stays, `before`
// [rows, columns] is the sum of weight x slope over all keys to the left, before and after.
void moduli_stick_differentiate(float* z, float* slope, const float* left, float* before,
                                int64_t rows, int64_t keys, int64_t columns, int threads) {
  for_strips(rows, columns, threads, [=](int64_t row, Strip s) {
    static thread_local std::vector<vf> scratch;
    scratch.resize(keys * 2 * (STRIP / W));
    int64_t tile = row * keys * columns + s.first, own = row * columns + s.first;
    WITH_VECTORS(s.count, differentiate_strip<V>(z + tile, slope + tile, left + own, before + own,
                                                 keys, columns, last, scratch.data()));
  });
}

// One query per sequence: q [batch, heads, group, width] without gaps, y [.., values] and rest of
// the stick [batch, heads, group] written. sizes: batch, heads, group, keys, width, values; steps
// of k from one batch row, head and key to the next, those of v, and that of seen, whose bytes are
// 0 where a key is not (null: all are).
void moduli_stick_decode(const void* q, const void* k, const void* v, const uint8_t* seen, float* y,
                         float* rest, const int64_t* sizes, float scale, float least, int is_bf16,
                         int threads) {
  auto run = [=](auto* as) {
    using P = decltype(as);
    decode(static_cast<P>(q), static_cast<P>(k), static_cast<P>(v), seen, y, rest, sizes, scale,
           least, threads);
  };
  if (is_bf16) run(static_cast<const bf16*>(nullptr));
  else run(static_cast<const float*>(nullptr));
}

}  // extern "C"
