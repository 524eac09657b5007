// Experts of an FFN, fused: gather, first product, activation, second product, weighted add.
//
// No buffer of [slots, width] exists: rows of x are read where they lie, and outputs are added to
// their token's row of y from registers. Plain C++ (GNU vector types, OpenMP), without PyTorch's
// headers, so that it compiles in seconds and depends on no version of them.
//
// Letters: T tokens, D width, E experts, e neurons of an expert, R rows of its first matrices (e,
// or 2e of gated experts), K experts per token, S active slots.
//
// A product C[m, n] = sum_p A[m, p] B[p, n] is computed in register tiles of MR rows and NV
// vectors of columns. B is packed once per call, in panels of NV vectors, [p][NV * VL]; rows of A
// are given by pointers, which is how the gather costs nothing. Types shorter than float32 are
// packed in pairs along p, as their instruction multiplies them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, MAXV = 4;
#elif defined(__AVX__)
constexpr int VL = 8, MAXV = 2;
#else
constexpr int VL = 4, MAXV = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
using std::min;
using std::max;
typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float* p) { vf v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE vf splat(float s) { return s - vf{}; }
INLINE vi bits(vf v) { vi r; __builtin_memcpy(&r, &v, sizeof r); return r; }
INLINE vf unbits(vi v) { vf r; __builtin_memcpy(&r, &v, sizeof r); return r; }
INLINE vf pick(vi mask, vf a, vf b) { return unbits((mask & bits(a)) | (~mask & bits(b))); }
INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return pick(a < b, a, b); }

INLINE float wide(float x) { return x; }
INLINE float wide(bf16 x) { uint32_t u = uint32_t(x) << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE void narrow(float x, float& out) { out = x; }
INLINE void narrow(float x, bf16& out) {  // round to nearest even, NaN stays NaN
  uint32_t u; memcpy(&u, &x, 4);
  out = x != x ? 0x7fc0 : bf16((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE vf load(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(VL * 2)));
  half h; __builtin_memcpy(&h, p, sizeof h);
  return unbits(__builtin_convertvector(h, vi) << 16);
}
INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, 32);
#else
  for (int i = 0; i < VL; i++) narrow(v[i], p[i]);
#endif
}
template <class T> INLINE vf load_part(const T* p, int n) {
  if (n >= VL) return load(p);
  T t[VL] = {}; memcpy(t, p, n * sizeof(T)); return load(t);
}
template <class T> INLINE void store_part(T* p, vf v, int n) {
  if (n >= VL) { store(p, v); return; }
  T t[VL]; store(t, v); memcpy(p, t, n * sizeof(T));
}

// ---- activations -------------------------------------------------------------------------------

INLINE vf vexp(vf x) {  // 2 ulp, on [-87, 88]
  x = vmin(vmax(x, splat(-87.f)), splat(88.f));
  vf t = x * 1.44269504088896341f + 12582912.f;  // nearest integer by the magic constant
  vf n = t - 12582912.f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  vi k = __builtin_convertvector(n, vi);
  return unbits(bits(p) + (k << 23));
}
INLINE vf sigmoid(vf x) { return 1.f / (1.f + vexp(-x)); }
INLINE vf normal_cdf(vf x) {  // Abramowitz and Stegun 7.1.26, absolute error 1e-7
  vf s = x * 0.70710678118654752f;
  vf a = unbits(bits(s) & 0x7fffffff);
  vf t = 1.f / (1.f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vf tail = 0.5f * p * t * vexp(-a * a);
  return pick(s < 0.f, tail, 1.f - tail);
}

enum Activation { GELU, GELU_TANH, QUICK_GELU, SILU, RELU, RELU_SQUARED };

// The activation, and if `d` is given its derivative.
template <int ACT> INLINE vf activate(vf x, vf* d) {
  if (ACT == GELU) {
    vf c = normal_cdf(x);
    if (d) *d = c + x * 0.39894228040143268f * vexp(-0.5f * x * x);
    return x * c;
  } else if (ACT == GELU_TANH) {
    vf in = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2 * sqrt(2 / pi) * (...)
    vf s = sigmoid(in);
    if (d) *d = s + x * s * (1.f - s) * 1.5957691216057308f * (1.f + 0.134145f * x * x);
    return x * s;
  } else if (ACT == QUICK_GELU || ACT == SILU) {
    const float a = ACT == SILU ? 1.f : 1.702f;
    vf s = sigmoid(a * x);
    if (d) *d = s + a * x * s * (1.f - s);
    return x * s;
  } else {
    vf r = pick(x < 0.f, vf{}, x);  // NaN stays NaN
    if (ACT == RELU) {
      if (d) *d = pick(x <= 0.f, vf{}, splat(1.f));
      return r;
    }
    if (d) *d = 2.f * r;
    return r * r;
  }
}

// ---- packing -----------------------------------------------------------------------------------

// How columns are cut into panels of up to MAXV vectors, as evenly as possible.
struct Panels {
  int n, count, each, more;  // vectors of every panel, and panels that have one more
  explicit Panels(int n) : n(n) {
    const int total = (n + VL - 1) / VL;
    count = (total + MAXV - 1) / MAXV;
    each = count ? total / count : 0;
    more = count ? total % count : 0;
  }
  int start(int panel) const { return (panel * each + min(panel, more)) * VL; }
  int vectors(int panel) const { return each + (panel < more); }
  int padded() const { return start(count); }
};

template <class T> constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;
template <class T> INLINE int64_t packed_size(int k, int padded) {
  return int64_t((k + PAIR<T> - 1) / PAIR<T>) * PAIR<T> * padded;
}

// dst[p][j] = src[p * rs + j * cs] for p < k, j < n, in panels; zeros beyond.
template <class T>
static void pack(const T* src, int64_t rs, int64_t cs, int k, const Panels& to, T* dst) {
  constexpr int P = PAIR<T>;
  const int kp = (k + P - 1) / P;
  for (int panel = 0; panel < to.count; panel++) {
    const int j0 = to.start(panel), w = to.vectors(panel) * VL, n = min(w, to.n - j0);
    T* d = dst + int64_t(kp) * P * j0;
    int p0 = 0;
#if defined(__AVX512F__)
    if (rs == 1) {  // transpose 16 x 16 words: a float, or a pair of shorter numbers
      for (; p0 + 16 <= k / P; p0 += 16)
        for (int j = 0; j < w; j += 16) {
          __m512i r[16], t[16];
          for (int i = 0; i < 16; i++)
            r[i] = j + i < n ? _mm512_loadu_si512(src + (j0 + j + i) * cs + int64_t(p0) * P)
                             : _mm512_setzero_si512();
          for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
          }
          for (int i = 0; i < 4; i++) {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
          }
          for (int i = 0; i < 4; i++) {
            t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
            t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
          }
          for (int i = 0; i < 8; i++) {
            r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
            r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
          }
          for (int i = 0; i < 16; i++)
            _mm512_storeu_si512(d + (int64_t(p0 + i) * w + j) * P, r[i]);
        }
    }
#endif
    for (; p0 < kp; p0++)
      for (int j = 0; j < w; j++)
        for (int q = 0; q < P; q++) {
          const int p = p0 * P + q;
          d[(int64_t(p0) * w + j) * P + q] = j < n && p < k ? src[p * rs + (j0 + j) * cs] : T(0);
        }
  }
}

// ---- register tiles ----------------------------------------------------------------------------

template <int MR, int NV>
INLINE void product(const float* const* a, const float* b, int k, vf (&acc)[MR][NV]) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = vf{};
  for (int p = 0; p < k; p++, b += NV * VL) {
    vf v[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) v[j] = load(b + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const vf s = splat(a[i][p]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] += s * v[j];
    }
  }
}

template <int MR, int NV>
INLINE void product(const bf16* const* a, const bf16* b, int k, vf (&acc)[MR][NV]) {
#if defined(__AVX512BF16__)
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = vf{};
  for (int p = 0; p < k; p += 2, b += 2 * NV * VL) {
    __m512bh v[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) v[j] = (__m512bh)_mm512_loadu_si512(b + 2 * j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      int32_t pair; __builtin_memcpy(&pair, a[i] + p, 4);
      const __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++)
        acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], s, v[j]);
    }
  }
#endif
}

// Rows of a tile: as many as leave the accumulators in registers.
template <int NV> constexpr int ROWS = MAXV == 2 ? (NV == 1 ? 10 : 6)
                                                 : (NV == 1 ? 14 : NV == 2 ? 12 : NV == 3 ? 8 : 6);

// Calls out(row, acc[NV]) for every row of A @ panel.
template <int MR, int NV, class T, class Out>
INLINE void tile(const T* const* a, int row, const T* b, int k, const Out& out) {
  vf acc[MR][NV];
  product<MR, NV>(a + row, b, k, acc);
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) out(row + i, acc[i]);
}
template <int NV, class T, class Out>
static void panel_rows(const T* const* a, int rows, const T* b, int k, const Out& out) {
  int i = 0;
  for (; i + ROWS<NV> <= rows; i += ROWS<NV>) tile<ROWS<NV>, NV>(a, i, b, k, out);
  for (; i + 4 <= rows; i += 4) tile<4, NV>(a, i, b, k, out);
  for (; i + 2 <= rows; i += 2) tile<2, NV>(a, i, b, k, out);
  for (; i < rows; i++) tile<1, NV>(a, i, b, k, out);
}
template <class T, class Make>
static void each_panel(const T* const* a, int rows, const T* packed, int k, const Panels& to,
                       const Make& make) {
  const int64_t kp = int64_t((k + PAIR<T> - 1) / PAIR<T>) * PAIR<T>;
  for (int panel = 0; panel < to.count; panel++) {
    const int j0 = to.start(panel), n = to.n - j0;
    const T* b = packed + kp * j0;
    switch (to.vectors(panel)) {
      case 1: panel_rows<1>(a, rows, b, k, make(j0, n, std::integral_constant<int, 1>())); break;
      case 2: panel_rows<2>(a, rows, b, k, make(j0, n, std::integral_constant<int, 2>())); break;
      case 3: if constexpr (MAXV > 2) panel_rows<3>(a, rows, b, k, make(j0, n, std::integral_constant<int, 3>())); break;
      default: if constexpr (MAXV > 2) panel_rows<4>(a, rows, b, k, make(j0, n, std::integral_constant<int, 4>())); break;
    }
  }
}

// ---- the layer ---------------------------------------------------------------------------------

}  // namespace

extern "C" {

// A stacked matrix: row r, column c of expert i at data[at(i) + r * row + c * col].
struct Matrix {
  void* data;
  int64_t row, col;
  int64_t stride;  // between experts; -1: packed one after the other
};

struct Layer {
  int64_t tokens, width, experts, top_k;
  int64_t neurons;       // of every expert, or 0 if they differ
  const int64_t* sizes;  // then these
  int64_t gate;          // 0 plain, 1 concatenated, 2 interleaved, 3 gate and up apart
  int64_t threads;
  const void* x;         // [T, D]
  const int64_t* index;  // [T, K]
  const float* weights;  // [T, K]
  const uint8_t* active; // [T, K] or null
  Matrix first, up, second;
  const void *first_bias, *up_bias, *out_bias;  // contiguous, or null
  void* z;               // [S, R], what backward needs; or null
};

struct Gradients {
  const void* dy;                            // [T, D]
  void* dx;                                  // [T, D]; these may be null
  float* dweights;                           // [T, K]
  Matrix first, up, second;
  float *first_bias, *up_bias;               // contiguous
};

}

namespace {

template <class T> T* scratch(int which, int64_t size) {
  static thread_local std::vector<char> buffers[12];
  auto& b = buffers[which];
  const size_t bytes = size * sizeof(T) + 128;
  if (b.size() < bytes) { b.clear(); b.shrink_to_fit(); b.resize(bytes); }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(b.data()) + 63) & ~uintptr_t(63));
}
enum Scratch { PACK, PLAN, ROWS_Z, ROWS_H, ROWS_Y, KEPT_DZ, KEPT_H, PARTIAL, POINTERS, COLUMNS, BIAS, SUMS };

struct Expert {
  int size, rows;                // e, R
  int64_t neuron;                // neurons before it
  int64_t first, up, second;     // offsets of its blocks
  int64_t begin, end;            // its slots
  int64_t z;                     // where its pre-activations begin
};

// Slots sorted by expert, within an expert by token.
struct Plan {
  std::vector<Expert> experts;
  int64_t slots = 0;
  int32_t *token, *slot;
  int most = 0;  // neurons of the largest expert

  explicit Plan(const Layer& l) : experts(l.experts) {
    const int64_t n = l.tokens * l.top_k;
    token = scratch<int32_t>(PLAN, 2 * n);
    slot = token + n;
    std::vector<int64_t> count(l.experts + 1, 0);
    for (int64_t s = 0; s < n; s++) if (!l.active || l.active[s]) count[l.index[s] + 1]++;
    int64_t neuron = 0, z = 0;
    for (int64_t i = 0; i < l.experts; i++) {
      Expert& e = experts[i];
      count[i + 1] += count[i];
      e.begin = count[i]; e.end = count[i + 1];
      e.size = l.neurons ? l.neurons : l.sizes[i];
      e.rows = l.gate ? 2 * e.size : e.size;
      e.neuron = neuron;
      const int in_first = l.gate == 1 || l.gate == 2 ? 2 : 1;
      e.first = l.first.stride < 0 ? in_first * neuron * l.first.row : i * l.first.stride;
      e.up = l.up.stride < 0 ? neuron * l.up.row : i * l.up.stride;
      e.second = l.second.stride < 0 ? neuron * l.second.row : i * l.second.stride;
      e.z = z;
      z += (e.end - e.begin) * e.rows;
      neuron += e.size;
      most = max(most, e.size);
    }
    slots = count[l.experts];
    for (int64_t s = 0; s < n; s++) if (!l.active || l.active[s]) {
      const int64_t at = count[l.index[s]]++;
      token[at] = s / l.top_k;
      slot[at] = s;
    }
  }
};

// The two halves of a gated expert's first matrices, or its only one.
template <class T> struct Half { const T* data; int64_t row, col; const T* bias; int64_t bias_step; };
template <class T> static Half<T> half(const Layer& l, const Expert& e, int which) {
  const T* first = (const T*)l.first.data + e.first;
  const T* bias = (const T*)l.first_bias;
  if (which && l.gate == 3)
    return {(const T*)l.up.data + e.up, l.up.row, l.up.col,
            l.up_bias ? (const T*)l.up_bias + e.neuron : nullptr, 1};
  const int step = l.gate == 2 ? 2 : 1;
  const int64_t skip = which ? (l.gate == 2 ? 1 : e.size) : 0;
  if (bias) bias += (l.gate == 1 || l.gate == 2 ? 2 : 1) * e.neuron + skip;
  return {first + skip * l.first.row, l.first.row * step, l.first.col, bias, step};
}

constexpr int BLOCK = 192;  // rows of an expert that pass through all steps together

template <class T> static const T** rows_of(const T* base, int64_t ld, const int32_t* token, int n) {
  const T** p = scratch<const T*>(POINTERS, BLOCK + 16);
  for (int i = 0; i < n; i++) p[i] = base + int64_t(token ? token[i] : i) * ld;
  return p;
}

static int64_t even(int64_t n) { return (n + 1) & ~int64_t(1); }

// h = act(z), or act(gate) * up, of n rows [R] of an expert; odd rows of h end in a zero.
template <class T, int ACT>
static void activate_rows(const T* z, int64_t ldz, int e, bool gated, T* h, int64_t ldh, int n) {
  for (int row = 0; row < n; row++, z += ldz, h += ldh) {
    for (int j = 0; j < e; j += VL) {
      vf v = activate<ACT>(load_part(z + j, e - j), nullptr);
      if (gated) v *= load_part(z + e + j, e - j);
      store_part(h + j, v, e - j);
    }
    if (ldh > e) h[e] = T(0);
  }
}
template <class T> using ActivateRows = void (*)(const T*, int64_t, int, bool, T*, int64_t, int);
template <class T> static ActivateRows<T> activation_of(int act) {
  static constexpr ActivateRows<T> table[] = {
      activate_rows<T, GELU>, activate_rows<T, GELU_TANH>, activate_rows<T, QUICK_GELU>,
      activate_rows<T, SILU>, activate_rows<T, RELU>, activate_rows<T, RELU_SQUARED>};
  return table[act];
}

INLINE float lanes_sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int u = 0; u < VL; u++) sum += v[u];
  return sum;
#endif
}

// Products of N rows of length k with x, U vectors of each at a time; the rows that lie `ahead`
// elements further on will be read next.
template <int N, int U, class T>
static void dots(const T* const* row, const float* x, int64_t k, int64_t ahead, int n, float* out) {
  vf a[N][U];
#pragma GCC unroll 8
  for (int i = 0; i < N; i++)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) a[i][u] = vf{};
  int64_t p = 0;
  for (; p + U * VL <= k; p += U * VL) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) {
        if (u % 2 == 0 || sizeof(T) == 4) __builtin_prefetch(row[i] + ahead + p + u * VL);
        a[i][u] += load(row[i] + p + u * VL) * load(x + p + u * VL);
      }
  }
  for (; p < k; p += VL) {
    const vf x0 = load_part(x + p, k - p);
    for (int i = 0; i < N; i++) a[i][0] += load_part(row[i] + p, k - p) * x0;
  }
  for (int i = 0; i < n; i++) {
    for (int u = 1; u < U; u++) a[i][0] += a[i][u];
    out[i] = lanes_sum(a[i][0]);
  }
}

// Few tokens: every weight is read once, in the order in which it lies, and nothing is packed.
template <class T> static void forward_few(const Layer& l, ActivateRows<float> act, T* y) {
  const Plan plan(l);
  const int64_t D = l.width, S = plan.slots;
  const int sides = l.gate ? 2 : 1;
  const int64_t hp = plan.most;
  float* h = scratch<float>(ROWS_H, S * hp + VL);
  float* z = scratch<float>(ROWS_Y, S * hp * sides + VL);
  float* xs = scratch<float>(ROWS_Z, l.tokens * D + VL);
  for (int64_t i = 0; i < l.tokens * D; i++) xs[i] = wide(((const T*)l.x)[i]);
  std::vector<const Expert*> owner(S);
  for (const Expert& e : plan.experts)
    for (int64_t s = e.begin; s < e.end; s++) owner[s] = &e;
  // Slots of every token, for the second product.
  std::vector<std::vector<int32_t>> of(l.tokens);
  for (int64_t s = 0; s < S; s++) of[plan.token[s]].push_back(s);
  constexpr int AT_ONCE = 4;  // short rows read side by side, so that several lines are under way
  const int64_t blocks = (hp + AT_ONCE - 1) / AT_ONCE;
#pragma omp parallel num_threads(l.threads) if (l.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < S * blocks; item++) {
      const int64_t s = item / blocks, j0 = item % blocks * AT_ONCE;
      const Expert& e = *owner[s];
      const int n = min<int64_t>(AT_ONCE, e.size - j0);
      if (n <= 0) continue;
      const float* x = xs + int64_t(plan.token[s]) * D;
      for (int side = 0; side < sides; side++) {
        const Half<T> w = half<T>(l, e, side);
        float* to = z + s * hp * sides + side * e.size + j0;
        if (w.col == 1) {
          for (int i = 0; i < n; i++) {  // one stream of whole rows: several would share its rate
            const T* row = w.data + (j0 + i) * w.row;
            dots<1, 4>(&row, x, D, AT_ONCE * w.row, 1, to + i);
          }
        } else {
          for (int i = 0; i < n; i++) {
            float sum = 0;
            for (int64_t d = 0; d < D; d++) sum += wide(w.data[(j0 + i) * w.row + d * w.col]) * x[d];
            to[i] = sum;
          }
        }
        if (w.bias) for (int i = 0; i < n; i++) to[i] += wide(w.bias[(j0 + i) * w.bias_step]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t s = 0; s < S; s++) {
      const int e = owner[s]->size;
      act(z + s * hp * sides, e * sides, e, sides == 2, h + s * hp, e, 1);
      if (l.z) {
        T* keep = (T*)l.z + owner[s]->z + (s - owner[s]->begin) * owner[s]->rows;
        for (int j = 0; j < e * sides; j++) narrow(z[s * hp * sides + j], keep[j]);
      }
      for (int j = 0; j < e; j++) h[s * hp + j] *= l.weights[plan.slot[s]];
    }
    if (l.second.row == 1) {  // a column of the second matrix after the other
#pragma omp for schedule(static)
      for (int64_t d0 = 0; d0 < D; d0 += AT_ONCE)
        for (int64_t t = 0; t < l.tokens; t++) {
          const int n = min<int64_t>(AT_ONCE, D - d0);
          float total[AT_ONCE] = {};
          for (int32_t s : of[t]) {
            const Expert& e = *owner[s];
            const T* row[AT_ONCE];
            for (int i = 0; i < AT_ONCE; i++)
              row[i] = (const T*)l.second.data + e.second + (d0 + min(i, n - 1)) * l.second.col;
            float part[AT_ONCE];
            dots<AT_ONCE, 2>(row, h + s * hp, e.size, AT_ONCE * l.second.col, n, part);
            const T* bias = l.out_bias ? (const T*)l.out_bias + (&e - plan.experts.data()) * D + d0 : nullptr;
            for (int i = 0; i < n; i++)
              total[i] += part[i] + (bias ? l.weights[plan.slot[s]] * wide(bias[i]) : 0.f);
          }
          for (int i = 0; i < n; i++) narrow(total[i], y[t * D + d0 + i]);
        }
    } else {
      constexpr int64_t CHUNK = 4 * VL;
#pragma omp for schedule(static)
      for (int64_t c = 0; c < (D + CHUNK - 1) / CHUNK; c++)
        for (int64_t t = 0; t < l.tokens; t++) {
          const int64_t d0 = c * CHUNK, n = min(CHUNK, D - d0);
          float sum[CHUNK] = {};
          for (int32_t s : of[t]) {
            const Expert& e = *owner[s];
            const float* hs = h + s * hp;
            const T* v = (const T*)l.second.data + e.second + d0 * l.second.col;
            if (l.second.col == 1 && n == CHUNK) {
              vf a[4];
              for (int u = 0; u < 4; u++) a[u] = load(sum + u * VL);
              for (int64_t j = 0; j < e.size; j++)
                for (int u = 0; u < 4; u++) a[u] += hs[j] * load(v + j * l.second.row + u * VL);
              for (int u = 0; u < 4; u++) store(sum + u * VL, a[u]);
            } else {
              for (int64_t j = 0; j < e.size; j++)
                for (int64_t d = 0; d < n; d++) sum[d] += hs[j] * wide(v[j * l.second.row + d * l.second.col]);
            }
            if (l.out_bias)
              for (int64_t d = 0; d < n; d++)
                sum[d] += l.weights[plan.slot[s]] * wide(((const T*)l.out_bias)[(owner[s] - plan.experts.data()) * D + d0 + d]);
          }
          for (int64_t d = 0; d < n; d++) narrow(sum[d], y[t * D + d0 + d]);
        }
    }
  }
}

// Slots of an expert whose tokens lie in [from, to).
static void within(const Plan& plan, const Expert& e, int64_t from, int64_t to, int64_t& a, int64_t& b) {
  const int32_t* begin = plan.token + e.begin, *end = plan.token + e.end;
  a = std::lower_bound(begin, end, from) - plan.token;
  b = std::lower_bound(begin, end, to) - plan.token;
}

// Tokens of one tile: its rows of y are one thread's own.
static int64_t tile_size(const Layer& l) {
  const int64_t each = (l.tokens + l.threads - 1) / l.threads;
  const int64_t tiles = max<int64_t>(1, (each + 2047) / 2048);
  return max<int64_t>(1, (each + tiles - 1) / tiles);
}

// y[token] += weight * (A @ packed), rows of A given by pointers.
template <class T>
static void add_to_tokens(const T* const* a, int n, const T* packed, int k, const Panels& columns,
                          const int32_t* token, const float* weight, const T* bias, float* y, int64_t D) {
  each_panel(a, n, packed, k, columns, [&](int j0, int left, auto nv) {
    return [=](int row, const vf* acc) __attribute__((always_inline)) {
      float* out = y + int64_t(token[row]) * D + j0;
      const vf w = splat(weight ? weight[row] : 1.f);
      for (int v = 0; v < nv; v++) {
        const int m = left - v * VL;
        if (m <= 0) continue;
        vf add = acc[v];
        if (bias) add += load_part(bias + j0 + v * VL, m);
        if (m >= VL) store(out + v * VL, load(out + v * VL) + w * add);
        else store_part(out + v * VL, load_part(out + v * VL, m) + w * add, m);
      }
    };
  });
}

// Experts are packed a group at a time, so that what is packed stays in the cache and small.
constexpr int64_t GROUP_BYTES = 8 << 20;

struct Groups {
  std::vector<int64_t> at;      // where an expert's packed weights begin in its group's buffer
  std::vector<int64_t> begin;   // first expert of every group, and E
  int64_t size = 0;             // of the buffer
  int64_t slots = 0;            // most slots of a group

  template <class Size> Groups(const Plan& plan, int64_t bytes, const Size& size_of) : begin{0} {
    const int64_t E = plan.experts.size();
    int64_t used = 0;
    for (int64_t i = 0; i < E; i++) {
      const Expert& e = plan.experts[i];
      const int64_t own = e.begin == e.end ? 0 : (size_of(e) + 31) / 32 * 32;
      if (used && (used + own) * bytes > GROUP_BYTES) { begin.push_back(i); used = 0; }
      at.push_back(used);
      used += own;
      size = max(size, used);
    }
    begin.push_back(E);
    for (size_t g = 0; g + 1 < begin.size(); g++)
      slots = max(slots, last_slot(plan, g) - first_slot(plan, g));
  }
  int64_t first_slot(const Plan& plan, int64_t g) const { return plan.experts[begin[g]].begin; }
  int64_t last_slot(const Plan& plan, int64_t g) const { return plan.experts[begin[g + 1] - 1].end; }
  int64_t count() const { return begin.size() - 1; }
};

// Sums of all tokens in float32: the output itself, or a buffer that is rounded at the end.
template <class T> static float* sums_for(T* y, int64_t size) {
  return sizeof(T) == 4 ? (float*)y : scratch<float>(SUMS, size);
}
template <class T> static void round_to(T* y, const float* sums, int64_t from, int64_t to) {
  if (sizeof(T) != 4)
    for (int64_t k = from; k < to; k += VL) store_part(y + k, load_part(sums + k, to - k), to - k);
}

template <class T> static void forward_many(const Layer& l, ActivateRows<T> act, T* y) {
  const Plan plan(l);
  const int64_t D = l.width;
  const int sides = l.gate ? 2 : 1;
  const Panels columns(D);
  const Groups groups(plan, sizeof(T), [&](const Expert& e) {
    return sides * packed_size<T>(D, Panels(e.size).padded()) + packed_size<T>(e.size, columns.padded());
  });
  T* packs = scratch<T>(PACK, groups.size);
  float* sums = sums_for(y, l.tokens * D);
  const int64_t size = tile_size(l), tiles = (l.tokens + size - 1) / size;
#pragma omp parallel num_threads(l.threads) if (l.threads > 1)
  for (int64_t group = 0; group < groups.count(); group++) {
    const int64_t first = groups.begin[group], last = groups.begin[group + 1];
#pragma omp for schedule(dynamic)
    for (int64_t i = first; i < last; i++) {
      const Expert& e = plan.experts[i];
      if (e.begin == e.end) continue;
      const Panels own(e.size);
      T* to = packs + groups.at[i];
      for (int side = 0; side < sides; side++, to += packed_size<T>(D, own.padded())) {
        const Half<T> w = half<T>(l, e, side);
        pack(w.data, w.col, w.row, D, own, to);
      }
      pack((const T*)l.second.data + e.second, l.second.row, l.second.col, e.size, columns, to);
    }
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t from = tile * size, to = min(from + size, l.tokens);
      float* out = sums + from * D;
      if (group == 0) memset(out, 0, (to - from) * D * 4);
      for (int64_t i = first; i < last; i++) {
        const Expert& e = plan.experts[i];
        int64_t a, b;
        within(plan, e, from, to, a, b);
        if (a == b) continue;
        const Panels own(e.size);
        const T* pack_first = packs + groups.at[i];
        const T* pack_second = pack_first + sides * packed_size<T>(D, own.padded());
        const int hp = even(e.size);
        for (int64_t s = a; s < b; s += BLOCK) {
          const int n = min<int64_t>(BLOCK, b - s);
          T* z = l.z ? (T*)l.z + e.z + (s - e.begin) * e.rows : scratch<T>(ROWS_Z, BLOCK * e.rows + VL);
          const T** xs = rows_of((const T*)l.x, D, plan.token + s, n);
          for (int side = 0; side < sides; side++) {
            const Half<T> w = half<T>(l, e, side);
            float* bias = w.bias ? scratch<float>(BIAS, own.padded()) : nullptr;
            if (bias) for (int j = 0; j < own.padded(); j++) bias[j] = j < e.size ? wide(w.bias[j * w.bias_step]) : 0.f;
            each_panel(xs, n, pack_first + side * packed_size<T>(D, own.padded()), D, own,
                       [&](int j0, int left, auto nv) {
              T* to = z + side * e.size + j0;
              const float* b = bias ? bias + j0 : nullptr;
              const int64_t ld = e.rows;
              return [=](int row, const vf* acc) __attribute__((always_inline)) {
                for (int v = 0; v < nv; v++) {
                  const int m = left - v * VL;
                  if (m > 0) store_part(to + row * ld + v * VL, b ? acc[v] + load(b + v * VL) : acc[v], m);
                }
              };
            });
          }
          T* h = scratch<T>(ROWS_H, BLOCK * hp + VL);
          act(z, e.rows, e.size, sides == 2, h, hp, n);
          float weight[BLOCK];
          int32_t token[BLOCK];
          for (int row = 0; row < n; row++) {
            weight[row] = l.weights[plan.slot[s + row]];
            token[row] = plan.token[s + row] - from;
          }
          const T* bias = l.out_bias ? (const T*)l.out_bias + i * D : nullptr;
          add_to_tokens<T>(rows_of<T>(h, hp, nullptr, n), n, pack_second, e.size, columns, token,
                           weight, bias, out, D);
        }
      }
      if (group + 1 == groups.count()) round_to(y, sums, from * D, to * D);
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------

static int64_t first_at(const Layer& l, const Gradients& g, const Expert& e, int64_t i) {
  return g.first.stride < 0 ? (l.gate == 1 || l.gate == 2 ? 2 : 1) * e.neuron * g.first.row : i * g.first.stride;
}
static int64_t up_at(const Gradients& g, const Expert& e, int64_t i) {
  return g.up.stride < 0 ? e.neuron * g.up.row : i * g.up.stride;
}
static int64_t second_at(const Gradients& g, const Expert& e, int64_t i) {
  return g.second.stride < 0 ? e.neuron * g.second.row : i * g.second.stride;
}

// From z, the gradient dh [n, e] of activations at weight 1, and combine weights:
// h * weight for the second matrix, dz for the first ones, and dh . h, the gradient of the weight.
template <class T, int ACT>
static void differentiate_rows(const T* z, int64_t ldz, int e, bool gated, const float* dh, int64_t ldd,
                               const float* weight, T* h, int64_t ldh, T* dz, int64_t ldk, float* own,
                               int n) {
  const int64_t up = even(e);
  for (int row = 0; row < n; row++, z += ldz, dh += ldd, h += ldh, dz += ldk) {
    vf sum = vf{};
    const vf w = splat(weight[row]);
    for (int j = 0; j < e; j += VL) {
      const int m = e - j;
      vf d, a = activate<ACT>(load_part(z + j, m), &d);
      vf g = load_part(dh + j, m), hidden = a;
      if (gated) {
        const vf u = load_part(z + e + j, m);
        hidden = a * u;
        store_part(dz + up + j, g * w * a, m);
        d *= u;
      }
      sum += g * hidden;
      store_part(h + j, hidden * w, m);
      store_part(dz + j, g * w * d, m);
    }
    if (up > e) {
      h[e] = dz[e] = T(0);
      if (gated) dz[up + e] = T(0);
    }
    float total = 0;
    for (int u = 0; u < VL; u++) total += sum[u];
    own[row] = total;
  }
}
template <class T>
using DifferentiateRows = void (*)(const T*, int64_t, int, bool, const float*, int64_t, const float*, T*,
                                   int64_t, T*, int64_t, float*, int);
template <class T> static DifferentiateRows<T> derivative_of(int act) {
  static constexpr DifferentiateRows<T> table[] = {
      differentiate_rows<T, GELU>, differentiate_rows<T, GELU_TANH>, differentiate_rows<T, QUICK_GELU>,
      differentiate_rows<T, SILU>, differentiate_rows<T, RELU>, differentiate_rows<T, RELU_SQUARED>};
  return table[act];
}

// out[i, d] += sum_p a[p, i] b[p][d]: rows of both operands are summed over.
template <int MR, int NV>
INLINE void outer_tile(const float* a, int64_t lda, const float* const* b, int d, int k, float* out, int64_t ldo) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = load(out + i * ldo + j * VL);
  for (int p = 0; p < k; p++, a += lda) {
    vf v[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) v[j] = load(b[p] + d + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const vf s = splat(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] += s * v[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(out + i * ldo + j * VL, acc[i][j]);
}
// The same of pairs: a [p / 2, i, 2], b [p / 2][d, 2].
template <int MR, int NV>
INLINE void outer_tile(const bf16* a, int64_t lda, const bf16* const* b, int d, int k, float* out, int64_t ldo) {
#if defined(__AVX512BF16__)
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = load(out + i * ldo + j * VL);
  for (int p = 0; p < k; p++, a += lda) {
    __m512bh v[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) v[j] = (__m512bh)_mm512_loadu_si512(b[p] + 2 * (d + j * VL));
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      int32_t pair; __builtin_memcpy(&pair, a + 2 * i, 4);
      const __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], s, v[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(out + i * ldo + j * VL, acc[i][j]);
#endif
}
template <int NV, class T>
static void outer_panel(const T* a, int64_t lda, int rows, const T* const* b, int d, int k, float* out, int64_t ldo) {
  constexpr int P = PAIR<T>;
  int i = 0;
  for (; i + ROWS<NV> <= rows; i += ROWS<NV>) outer_tile<ROWS<NV>, NV>(a + P * i, lda, b, d, k, out + i * ldo, ldo);
  for (; i + 4 <= rows; i += 4) outer_tile<4, NV>(a + P * i, lda, b, d, k, out + i * ldo, ldo);
  for (; i + 2 <= rows; i += 2) outer_tile<2, NV>(a + P * i, lda, b, d, k, out + i * ldo, ldo);
  for (; i < rows; i++) outer_tile<1, NV>(a + P * i, lda, b, d, k, out + i * ldo, ldo);
}

// Rows of one operand of an outer product, [p] -> row; pairs are interleaved into `to`.
static const float* const* summed_rows(const float* const* rows, int n, int64_t, float*) { return rows; }
static const bf16* const* summed_rows(const bf16* const* rows, int n, int64_t width, bf16* to) {
  static thread_local const bf16* pairs[BLOCK];
  for (int p = 0; p < n; p += 2) {
    const bf16* a = rows[p], *b = p + 1 < n ? rows[p + 1] : nullptr;
    bf16* out = to + int64_t(p) * width;
    for (int64_t d = 0; d < width; d++) {
      out[2 * d] = a[d];
      out[2 * d + 1] = b ? b[d] : bf16(0);
    }
    pairs[p / 2] = out;
  }
  return pairs;
}

// grad[j, d] = sum over an expert's slots of kept[slot, j] * source[token of slot, d], columns from
// d0 to d1; `sum` holds [e, d1 - d0].
template <class T>
static void weight_gradient(const Plan& plan, const Expert& e, const T* kept, int64_t ldk, const T* source,
                            int64_t D, int64_t d0, int64_t d1, T* grad, int64_t rs, int64_t cs, float* sum) {
  constexpr int P = PAIR<T>;
  const int64_t width = d1 - d0;
  const Panels columns(width);
  const int64_t ld = columns.padded();
  memset(sum, 0, e.size * ld * 4);
  for (int64_t s = e.begin; s < e.end; s += BLOCK) {
    const int n = min<int64_t>(BLOCK, e.end - s);
    const T** rows = scratch<const T*>(POINTERS, BLOCK + 16);
    // A tail narrower than a vector is read from a copy that ends in zeros.
    T* copy = nullptr;
    if (P == 1 && ld != width) copy = scratch<T>(COLUMNS, BLOCK * ld);
    for (int i = 0; i < n; i++) {
      rows[i] = source + int64_t(plan.token[s + i]) * D + d0;
      if (copy) {
        memcpy(copy + i * ld, rows[i], width * sizeof(T));
        memset(copy + i * ld + width, 0, (ld - width) * sizeof(T));
        rows[i] = copy + i * ld;
      }
    }
    const T* a = kept + s * ldk;
    int64_t lda = ldk;
    const T* const* b = rows;
    int k = n;
    if (P == 2) {
      T* packed = scratch<T>(COLUMNS, 2 * (BLOCK + 2) * ld);
      b = summed_rows(rows, n, width, packed);
      T* pairs = scratch<T>(PARTIAL, (BLOCK + 2) * e.size);
      for (int p = 0; p < n; p += 2)
        for (int j = 0; j < e.size; j++) {
          pairs[(int64_t(p / 2) * e.size + j) * 2] = a[p * ldk + j];
          pairs[(int64_t(p / 2) * e.size + j) * 2 + 1] = p + 1 < n ? a[(p + 1) * ldk + j] : T(0);
        }
      a = pairs; lda = 2 * e.size; k = (n + 1) / 2;
    }
    for (int panel = 0; panel < columns.count; panel++) {
      const int d = columns.start(panel);
      switch (columns.vectors(panel)) {
        case 1: outer_panel<1>(a, lda, e.size, b, d, k, sum + d, ld); break;
        case 2: outer_panel<2>(a, lda, e.size, b, d, k, sum + d, ld); break;
        case 3: if constexpr (MAXV > 2) outer_panel<3>(a, lda, e.size, b, d, k, sum + d, ld); break;
        default: if constexpr (MAXV > 2) outer_panel<4>(a, lda, e.size, b, d, k, sum + d, ld);
      }
    }
  }
  if (cs == 1) {
    for (int j = 0; j < e.size; j++)
      for (int64_t d = 0; d < width; d += VL) store_part(grad + j * rs + d0 + d, load(sum + j * ld + d), width - d);
    return;
  }
  for (int64_t dd = 0; dd < width; dd += VL)
    for (int64_t d = dd; d < min(dd + VL, width); d++)
      for (int j = 0; j < e.size; j++) narrow(sum[j * ld + d], grad[j * rs + (d0 + d) * cs]);
}

template <class T> static void backward(const Layer& l, const Gradients& g, DifferentiateRows<T> act) {
  const Plan plan(l);
  const int64_t D = l.width;
  const int sides = l.gate ? 2 : 1;
  const Panels columns(D);
  const int64_t ldh = even(plan.most), ldk = sides * ldh;
  const Groups groups(plan, sizeof(T), [&](const Expert& e) {
    return packed_size<T>(D, Panels(e.size).padded()) + sides * packed_size<T>(e.size, columns.padded());
  });
  T* packs = scratch<T>(PACK, groups.size);
  T* buffer_h = scratch<T>(KEPT_H, (groups.slots + 1) * ldh + VL);
  T* buffer_dz = scratch<T>(KEPT_DZ, (groups.slots + 1) * ldk + VL);
  float* sums = g.dx ? sums_for((T*)g.dx, l.tokens * D) : nullptr;
  const int64_t size = tile_size(l), tiles = (l.tokens + size - 1) / size;
  const int64_t chunk = l.threads > 1 ? min<int64_t>(D, 128) : D, chunks = (D + chunk - 1) / chunk;
#pragma omp parallel num_threads(l.threads) if (l.threads > 1)
  for (int64_t group = 0; group < groups.count(); group++) {
    const int64_t first = groups.begin[group], last = groups.begin[group + 1];
    // Indexed by slot, though only those of the group are there.
    T* kept_h = buffer_h - groups.first_slot(plan, group) * ldh;
    T* kept_dz = buffer_dz - groups.first_slot(plan, group) * ldk;
#pragma omp for schedule(dynamic)
    for (int64_t i = first; i < last; i++) {
      const Expert& e = plan.experts[i];
      if (e.begin == e.end) continue;
      const Panels own(e.size);
      T* to = packs + groups.at[i];
      pack((const T*)l.second.data + e.second, l.second.col, l.second.row, D, own, to);
      to += packed_size<T>(D, own.padded());
      for (int side = 0; g.dx && side < sides; side++, to += packed_size<T>(e.size, columns.padded())) {
        const Half<T> w = half<T>(l, e, side);
        pack(w.data, w.row, w.col, e.size, columns, to);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t from = tile * size, to = min(from + size, l.tokens);
      float* out = sums ? sums + from * D : nullptr;
      if (out && group == 0) memset(out, 0, (to - from) * D * 4);
      for (int64_t i = first; i < last; i++) {
        const Expert& e = plan.experts[i];
        int64_t a, b;
        within(plan, e, from, to, a, b);
        const Panels own(e.size);
        const T* pack_second = packs + groups.at[i];
        const T* pack_first = pack_second + packed_size<T>(D, own.padded());
        for (int64_t s = a; s < b; s += BLOCK) {
          const int n = min<int64_t>(BLOCK, b - s);
          const T** dys = rows_of((const T*)g.dy, D, plan.token + s, n);
          float* dh = scratch<float>(ROWS_H, BLOCK * own.padded());
          const int64_t ldd = own.padded();
          each_panel(dys, n, pack_second, D, own, [&](int j0, int, auto nv) {
            return [=](int row, const vf* acc) __attribute__((always_inline)) {
              for (int v = 0; v < nv; v++) store(dh + row * ldd + j0 + v * VL, acc[v]);
            };
          });
          float weight[BLOCK], own_weight[BLOCK];
          int32_t token[BLOCK];
          for (int row = 0; row < n; row++) {
            weight[row] = l.weights[plan.slot[s + row]];
            token[row] = plan.token[s + row] - from;
          }
          const T* z = (const T*)l.z + e.z + (s - e.begin) * e.rows;
          // Halves of dz lie `even(e)` apart.
          T* dz = kept_dz + s * ldk;
          act(z, e.rows, e.size, sides == 2, dh, ldd, weight, kept_h + s * ldh, ldh, dz, ldk, own_weight, n);
          if (g.dweights)
            for (int row = 0; row < n; row++) {
              float extra = 0;
              if (l.out_bias)
                for (int64_t d = 0; d < D; d++)
                  extra += wide(dys[row][d]) * wide(((const T*)l.out_bias)[i * D + d]);
              g.dweights[plan.slot[s + row]] = own_weight[row] + extra;
            }
          for (int side = 0; out && side < sides; side++)
            add_to_tokens<T>(rows_of<T>(dz + side * even(e.size), ldk, nullptr, n), n,
                             pack_first + side * packed_size<T>(e.size, columns.padded()), e.size,
                             columns, token, nullptr, nullptr, out, D);
        }
      }
      if (out && group + 1 == groups.count()) round_to((T*)g.dx, sums, from * D, to * D);
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = first * chunks; item < last * chunks; item++) {
      const int64_t i = item / chunks, d0 = item % chunks * chunk, d1 = min(d0 + chunk, D);
      const Expert& e = plan.experts[i];
      float* sum = scratch<float>(ROWS_Y, int64_t(e.size) * (chunk + VL * MAXV));
      for (int side = 0; side < sides; side++) {
        const bool apart = side && l.gate == 3;
        const Matrix& m = apart ? g.up : g.first;
        const int64_t step = l.gate == 2 ? 2 : 1;
        const int64_t skip = !side || apart ? 0 : l.gate == 2 ? 1 : e.size;
        const T* dz = kept_dz + side * even(e.size);
        if (m.data)
          weight_gradient<T>(plan, e, dz, ldk, (const T*)l.x, D, d0, d1,
                             (T*)m.data + (apart ? up_at(g, e, i) : first_at(l, g, e, i)) + skip * m.row, m.row * step,
                             m.col, sum);
        float* bias = apart ? g.up_bias : g.first_bias;
        if (bias && d0 == 0) {
          bias += apart ? e.neuron : (l.gate == 1 || l.gate == 2 ? 2 : 1) * e.neuron + skip;
          for (int j = 0; j < e.size; j++) bias[j * step] = 0;
          for (int64_t s = e.begin; s < e.end; s++)
            for (int j = 0; j < e.size; j++) bias[j * step] += wide(dz[s * ldk + j]);
        }
      }
      if (g.second.data)
        weight_gradient<T>(plan, e, kept_h, ldh, (const T*)g.dy, D, d0, d1,
                           (T*)g.second.data + second_at(g, e, i), g.second.row, g.second.col, sum);
    }
  }
}

}  // namespace

extern "C" int moduli_lanes() { return VL; }
extern "C" int moduli_has_bf16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

template <class T> static void run(const Layer& l, int act, int few, void* y) {
  if (few) forward_few<T>(l, activation_of<float>(act), (T*)y);
  else forward_many<T>(l, activation_of<T>(act), (T*)y);
}
// Indices are used as such, so that a wrong one would be a write to anywhere.
static bool sound(const Layer& l) {
  bool ok = true;
  for (int64_t s = 0; s < l.tokens * l.top_k; s++)
    ok &= (l.active && !l.active[s]) || uint64_t(l.index[s]) < uint64_t(l.experts);
  return ok;
}
// Both return 0, or 1 for a routing to experts that are not there.
extern "C" int moduli_forward(const Layer* l, int dtype, int act, int few, void* y) {
  if (!sound(*l)) return 1;
  if (dtype == 0) run<float>(*l, act, few, y); else run<bf16>(*l, act, few, y);
  return 0;
}
extern "C" int moduli_backward(const Layer* l, const Gradients* g, int dtype, int act) {
  if (!sound(*l)) return 1;
  if (dtype == 0) backward<float>(*l, *g, derivative_of<float>(act));
  else backward<bf16>(*l, *g, derivative_of<bf16>(act));
  return 0;
}
