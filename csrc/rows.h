// The CPU kernel: one row of vocab_kl in vectors of L floats. cpu.cpp includes this file once for each
// instruction set, with L, ISA and MAX defined; the compiler maps the vectors to the registers it has.
//
// Two threads on AVX2 take about as long to compute as to load, so instructions count: exp is taken once. The
// first pass leaves e = exp(x - r), r the maximum so far, in a buffer (for float32 in dx itself), and the
// second only multiplies. exp(r - m) makes up for the later maximum, block by block.
//
//     bytes of memory a row: loss V b; loss and gradient 2 V b
//
// A float32 row of 128k words just fits a second-level cache of 512 KB, and so does a bfloat16 row's buffer.

namespace t2t { namespace ISA {

typedef float F __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));

static inline F all(float a) { return a - F{}; }
static inline F get(const float* x) { F v; std::memcpy(&v, x, sizeof v); return v; }
static inline void put(float* x, F v) { std::memcpy(x, &v, sizeof v); }
static inline float sum(F a) { float s = 0; for (int l = 0; l < L; l++) s += a[l]; return s; }
static inline float max(F a) {
  float m = a[0];
  for (int l = 1; l < L; l++) m = a[l] > m ? a[l] : m;
  return m;
}

// All loops go by 2 L elements. Which of the two vectors an element lands in does not matter, as long as load
// and store agree: bfloat16, the upper half of a float, splits into even and odd places by one instruction
// each.
struct Pair { F a, b; };

static inline Pair load(const float* x) { return {get(x), get(x + L)}; }
static inline void store(float* x, Pair y) { put(x, y.a), put(x + L, y.b); }

static inline Pair load(const BFloat16* x) {
  U u;
  std::memcpy(&u, x, sizeof u);
  return {(F)(u << 16), (F)(u & 0xffff0000u)};
}
static inline U rounded(F y) { U u = (U)y; return u + 0x7fff + ((u >> 16) & 1); }  // to nearest, ties to even
static inline void store(BFloat16* x, Pair y) {
  U u = (rounded(y.a) >> 16) | (rounded(y.b) & 0xffff0000u);
  std::memcpy(x, &u, sizeof u);
}

static inline Pair load(const Half* x) {
  float y[2 * L];
#ifdef F16C
  for (int l = 0; l < 2 * L; l += 8)
    _mm256_storeu_ps(y + l, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + l))));
#else
  for (int l = 0; l < 2 * L; l++) y[l] = x[l];
#endif
  return load(y);
}
static inline void store(Half* x, Pair v) {
  float y[2 * L];
  store(y, v);
#ifdef F16C
  for (int l = 0; l < 2 * L; l += 8)
    _mm_storeu_si128((__m128i*)(x + l), _mm256_cvtps_ph(_mm256_loadu_ps(y + l), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int l = 0; l < 2 * L; l++) x[l] = y[l];
#endif
}

template <class T> static inline Pair load_some(const T* x, int64_t n) {                // n < 2 L; then -inf
  T some[2 * L];
  for (int64_t l = n; l < 2 * L; l++) some[l] = T(-INFINITY);
  std::memcpy((void*)some, x, n * sizeof(T));
  return load(some);
}
template <class T> static inline void store_some(T* x, int64_t n, Pair y) {
  T some[2 * L];
  store(some, y);
  std::memcpy((void*)x, some, n * sizeof(T));
}

// e^x for x <= 40, off by 3e-7 of itself for x > -8 and by 1.4e-6 for x > -87.3 (6e-7 and 6e-6 on a machine
// that does not fuse; tested); below that 0; NaN for NaN.
//   x log2 e = n + f,  |f| <= 1/2,  e^x = 2^n 2^f;    2^f = 1 + f c(f), c minimax of degree 4
static inline F exp(F x) {
  const float big = 12582912 + 127;  // adding 1.5 * 2^23 rounds to an integer, in the low bits; 127: the bias
  x = MAX(all(-88), x);                                       // MAX gives its second argument if one is NaN
  F t = x * 1.44269504f + big, n = t - big;
  F f = x * 1.44269504f - n;                                  // fused: no digit of the product is lost
  F y = ((1.32646586e-3f * f + 9.67156608e-3f) * f + 5.55073433e-2f) * f + 0.240222409f;
  y = (y * f + 0.693147004f) * f + 1;
  return y * (F)((I)t << 23);                                 // n = -127: the bits of 0
}

// (m, s) of x (V,), each logit read once: a block takes its exps from the maximum before it, r, and looks for
// a larger one on the way; only if that is beyond r + 40 is the block (8 KB, still in the first-level cache)
// done again.
// KEEP: e = exp(x - r), r of each block. e is x, dx, or a buffer in the order of Pair, up to 2 L longer than
// V.
template <bool KEEP, class T> static Stats<float> stats_of(const T* x, int64_t V, float* e, float* r) {
  Stats<float> row{-INFINITY, 0};
  for (int64_t begin = 0; begin < V; begin += BLOCK) {
    int64_t end = std::min(V, begin + BLOCK), v;
    F m0, m1, s0, s1, ref;
    auto larger = [&](Pair p) __attribute__((always_inline)) { m0 = MAX(p.a, m0), m1 = MAX(p.b, m1); };
    auto exps = [&](Pair p) __attribute__((always_inline)) {
      larger(p);
      p = {exp(p.a - ref), exp(p.b - ref)};
      s0 += p.a, s1 += p.b;
      return p;
    };
    float from = row.m, m;
    // nothing to start from, or e may lie over x
    if (row.m == -INFINITY || (KEEP && std::is_same_v<T, float>)) {
      m0 = m1 = all(row.m);
      for (v = begin; v + 2 * L <= end; v += 2 * L) larger(load(x + v));
      if (v < end) larger(load_some(x + v, end - v));
      from = max(MAX(m0, m1));
    }
    for (;;) {
      m0 = m1 = all(from), ref = all(reference(from)), s0 = s1 = all(0);
      for (v = begin; v + 2 * L <= end; v += 2 * L) {
        for (size_t line = 0; line < 2 * L * sizeof(T); line += 64)    // memory works meanwhile
          __builtin_prefetch((const char*)(x + v + BLOCK) + line);
        Pair p = exps(load(x + v));
        if (KEEP) store(e + v, p);
      }
      if (v < end) {
        Pair p = exps(load_some(x + v, end - v));
        if (KEEP) std::is_same_v<T, float> ? store_some(e + v, end - v, p) : store(e + v, p);
      }
      m = max(MAX(m0, m1));
      if (!(m > from + 40)) break;
      from = m;
    }
    if (KEEP) r[begin / BLOCK] = from;                         // -inf: its e are 0, and so is exp(-inf - m)
    row = join(join(row, {from, sum(s0 + s1)}), {m, 0});
  }
  return row;
}

// dx_v = factor exp(x_v - m), factor = g P / s: the gradient where no token is a target. dx may be e.
template <class T>
static void write_kept(const float* e, const float* r, T* dx, int64_t V, Stats<float> row, float factor) {
  for (int64_t begin = 0; begin < V; begin += BLOCK) {
    int64_t end = std::min(V, begin + BLOCK), v;
    F a = all(factor * shift(r[begin / BLOCK], row.m));
    auto scaled = [&](Pair p) __attribute__((always_inline)) { return Pair{a * p.a, a * p.b}; };
    for (v = begin; v + 2 * L <= end; v += 2 * L) store(dx + v, scaled(load(e + v)));
    if (v < end)
      store_some(dx + v, end - v, scaled(std::is_same_v<T, float> ? load_some(e + v, end - v) : load(e + v)));
  }
}

// (m, s), and, if dx is not null, dx_v = gP softmax(x)_v: the caller then patches the targets.
template <class T>
static Stats<float> one_row(const T* x, T* dx, int64_t V, float gP, float* e, float* r) {
  if (!dx) return stats_of<false>(x, V, e, r);
  if constexpr (std::is_same_v<T, float>) e = dx;
  Stats<float> row = stats_of<true>(x, V, e, r);
  write_kept(e, r, dx, V, row, gP / row.s);
  return row;
}

static void exp_all(const float* x, float* y, int64_t n) {                        // for the test of its error
  int64_t i = 0;
  for (; i + L <= n; i += L) put(y + i, exp(get(x + i)));
  for (; i < n; i++) y[i] = exp(all(x[i]))[0];
}

static const Isa table = {NAME, one_row<float>, one_row<BFloat16>, one_row<Half>, exp_all};
}}  // namespace t2t::ISA
