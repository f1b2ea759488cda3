// vocab_kl on a CPU: rows are shared out among the threads, each row goes to the kernel of rows.h that the
// machine can run. No -march: the file is compiled for every instruction set at once, and the choice is made
// when it runs.
#include "kl.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "cpu.h"

using c10::BFloat16;
using c10::Half;

namespace t2t {
constexpr int64_t BLOCK = 2048, LANES = 16;               // of rows.h: elements a block (8 KB), lanes at most
template <class T>
using OneRow = Stats<float> (*)(const T*, T*, int64_t, float, float*, float*);
struct Isa {
  const char* name;
  OneRow<float> f32;
  OneRow<BFloat16> bf16;
  OneRow<Half> f16;
  void (*exp)(const float*, float*, int64_t);
};
}  // namespace t2t

// Sixteen lanes on any machine: the compiler splits them. It is also how the 16 lanes of AVX-512 are tested
// without it.
#define L 16
#define ISA portable
#define NAME "portable"
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#include "rows.h"
#undef L
#undef ISA
#undef NAME
#undef MAX

#ifdef __x86_64__
#define F16C
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define L 8
#define ISA avx2
#define NAME "avx2"
#define MAX _mm256_max_ps
#include "rows.h"
#undef L
#undef ISA
#undef NAME
#undef MAX
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define L 16
#define ISA avx512
#define NAME "avx512"
#define MAX _mm512_max_ps
#include "rows.h"
#pragma GCC pop_options
#endif

namespace t2t {

static std::vector<const Isa*> usable() {                     // the last is the best
  std::vector<const Isa*> list{&portable::table};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    list.push_back(&avx2::table);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      list.push_back(&avx512::table);
  }
#endif
  return list;
}
static std::atomic<const Isa*> chosen{usable().back()};

const char* isa() { return chosen.load()->name; }
bool use_isa(const std::string& name) {
  for (const Isa* i : usable())
    if (name == i->name) return chosen = i, true;
  return false;
}
void exp_f32(const float* x, float* y, int64_t n) { chosen.load()->exp(x, y, n); }

// The targets of row n, each index once: v, q, and the logit there, read before a gradient may overwrite it.
template <class A> struct Target { int64_t v; A q, x; };
template <class T, class A> static A gather(const Rows& j, int64_t n, std::vector<Target<A>>& out) {
  const char* indices = (const char*)j.indices + n * j.K * (j.wide ? 8 : 4);
  Targets<A> row{indices, (const A*)j.probs + n * j.K, j.K, j.V, j.wide, j.merged};
  const T* x = j.x ? (const T*)j.x + n * j.x_stride : nullptr;
  uint64_t seen[16] = {};                                // a hash of 1,024 bits: most indices are plainly new
  A P = 0;
  out.clear();
  for (int64_t k = 0; k < j.K; k++) {
    int64_t v = row.index(k);
    if (v < 0) continue;
    uint32_t h = uint32_t(v) * 2654435769u >> 22;
    bool old = !j.merged && (seen[h >> 6] >> (h & 63) & 1);
    seen[h >> 6] |= uint64_t(1) << (h & 63);
    auto same = old ? std::find_if(out.begin(), out.end(), [&](auto& t) { return t.v == v; }) : out.end();
    if (same != out.end()) same->q += row.p[k];
    else out.push_back({v, row.p[k], x ? A(x[v]) : A(0)});
    P += row.p[k];
  }
  return P;
}

// float64: the same steps in plain loops, for gradcheck
static Stats<double> one_row(const double* x, double* dx, int64_t V, double gP, float*, float*) {
  Stats<double> row{*std::max_element(x, x + V), 0};
  for (int64_t v = 0; v < V; v++) row.s += std::exp(x[v] - reference(row.m));
  for (int64_t v = 0; dx && v < V; v++) dx[v] = gP * (std::exp(x[v] - row.m) / row.s);
  return row;
}

template <class T, class A, class One> static void rows(const Rows& j, One one) {
  at::parallel_for(0, j.N, std::max<int64_t>(1, 32768 / j.V), [&](int64_t first, int64_t last) {
    bool buffer = j.dx && sizeof(T) < 4;                      // see rows.h; float32 keeps its exps in dx
    std::unique_ptr<float[]> e(buffer ? new float[j.V + 2 * LANES] : nullptr), r(new float[j.V / BLOCK + 1]);
    std::vector<Target<A>> targets;
    for (int64_t n = first; n < last; n++) {
      const T* x = (const T*)j.x + n * j.x_stride;
      T* dx = j.dx ? (T*)j.dx + n * j.dx_stride : nullptr;
      A P = gather<T, A>(j, n, targets), g = j.g ? ((const A*)j.g)[n * j.g_stride] : A(0), loss = 0;
      if (P == 0) {                                           // no target: nothing to read
        if (dx) std::fill(dx, dx + j.V, T(0));
      } else {
        Stats<A> row = one(x, dx, j.V, g * P, e.get(), r.get());
        for (auto& t : targets) {
          loss += target_loss(t.q, t.x, row);
          if (dx) dx[t.v] = T(target_grad(t.q, t.x, row, g, P));
        }
      }
      if (j.loss) ((A*)j.loss)[n] = loss;
    }
  });
}

void rows_cpu(const Rows& j) {
  const Isa* i = chosen;
  if (j.type == F32) rows<float, float>(j, i->f32);
  if (j.type == BF16) rows<BFloat16, float>(j, i->bf16);
  if (j.type == F16) rows<Half, float>(j, i->f16);
  if (j.type == F64) rows<double, double>(j, one_row);
}

// dx_n,i += alpha q: the sum over duplicates first, so that a half-precision buffer is rounded once
template <class T, class A> static void scatter(const Rows& j, A alpha) {
  at::parallel_for(0, j.N, std::max<int64_t>(1, 32768 / j.K), [&](int64_t first, int64_t last) {
    std::vector<Target<A>> targets;
    for (int64_t n = first; n < last; n++) {
      gather<T, A>(j, n, targets);
      T* dx = (T*)j.dx + n * j.dx_stride;
      for (auto& t : targets) dx[t.v] = T(A(dx[t.v]) + alpha * t.q);
    }
  });
}
void scatter_cpu(const Rows& j, double alpha) {
  if (j.type == F64) scatter<double, double>(j, alpha);
  if (j.type == F32) scatter<float, float>(j, alpha);
  if (j.type == BF16) scatter<BFloat16, float>(j, alpha);
  if (j.type == F16) scatter<Half, float>(j, alpha);
}
}  // namespace t2t
