// One tile of stick-breaking attention: logits to weights and, for gradients, slopes of weights to
// slopes of logits, in place and in one pass over memory.
//
// A tile is [rows][keys][columns], a column being one query. Neighbouring columns are neighbours in
// memory, so a step from one key to the next is done for a strip of queries at once. What is left
// of a stick is a product over all keys: small shares are subtracted, since thousands of factors
// next to 1, each rounded and perhaps all alike, would show. Plain C++ (GNU vector types, OpenMP),
// without PyTorch's headers.

#include <algorithm>
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

}  // extern "C"
