// Sparse-target vocabulary KL: the arithmetic that the CPU and the CUDA kernels share, for host and device.
//
//     N rows   V vocabulary   K sparse targets a row   S slices of a row   b bytes a logit
//     g the gradient from above
//     T type of the logits   A type of losses, targets and sums: double if T is double, else float
//
//     q_v    = sum of p_k over the targets k whose index is v      (-1 and anything outside 0..V-1: ignored)
//     m, s   = max_v x_v,  sum_v exp(x_v - m)
//     loss   = sum_v q_v (log q_v + log s - (x_v - m))             only q_v > 0
//     dx_v   = g (P exp(x_v - m) / s - q_v)                        P = sum_v q_v
//
// Bytes are the floor: the loss reads V logits, loss and gradient read V and write V; K is small. So a row is
// read once, in slices; each slice gives (m, s); slices are joined; the gradient is written as if no token
// were a target; then at most K places are patched. log s - (x - m), never lse - x: a common offset of 1e4
// costs no digits. At a target the difference P softmax - q is formed in full precision and rounded once:
// where q ~ softmax it cancels.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline
#endif

namespace t2t {
using std::exp, std::log;                                     // of float for float

template <class A> struct Stats { A m, s; };                  // of any part of a row: max, sum exp(x - m)

// What exp subtracts: the maximum, but 0 where all logits are -inf: exp(-inf - 0) = 0, exp(-inf + inf) = NaN.
template <class A> HD A reference(A m) { return m == -INFINITY ? A(0) : m; }

template <class A> HD A shift(A from, A to) { return from == to ? A(1) : exp(from - to); }

// (m, s) of two parts -> of both. NaN in a logit reaches s, and so the loss and the whole row's gradient.
template <class A> HD Stats<A> join(Stats<A> a, Stats<A> b) {
  A m = a.m > b.m ? a.m : b.m;
  return {m, a.s * shift(a.m, m) + b.s * shift(b.m, m)};
}

// Slice c of S owns cells [begin, end) of `cells`: all but the last non-empty one equally long.
struct Slice { int begin, end; };
HD Slice slice_of(int cells, int S, int c) {
  int each = (cells + S - 1) / S, begin = c * each, end = begin + each;
  return {begin < cells ? begin : cells, end < cells ? end : cells};
}

// The targets of one row. Indices are int32 or int64, as they came.
template <class A> struct Targets {
  const void* i;
  const A* p;
  int64_t K, V;
  bool wide, merged;

  HD int64_t index(int64_t k) const {                         // -1: ignore
    int64_t v = wide ? ((const int64_t*)i)[k] : ((const int32_t*)i)[k];
    return v >= 0 && v < V ? v : -1;
  }
  // q at target k, all of it at the first of its duplicates: O(K), so a row is O(K^2). For large K, merge
  // before.
  HD A mass(int64_t k) const {
    int64_t v = index(k);
    if (v < 0) return 0;
    if (merged) return p[k];
    A q = 0;
    bool first = true;
    for (int64_t j = 0; j < K; j++) {                         // no way out early: no load waits for another
      bool same = index(j) == v;
      first &= !same || j >= k;
      q += same ? p[j] : A(0);
    }
    return first ? q : A(0);
  }
};
constexpr int64_t K_MERGED = 256;      // above this the bindings sort the targets and add up duplicates first

// x: the logit at a target of mass q
template <class A> HD A target_loss(A q, A x, Stats<A> row) {
  return q != 0 ? q * (log(q) + log(row.s) - (x - row.m)) : A(0);
}
template <class A> HD A target_grad(A q, A x, Stats<A> row, A g, A P) {
  return g * (P * (exp(x - row.m) / row.s) - q);
}

// One call, as the bindings hand it to rows_cpu or rows_cuda. A is double if x is double, else float.
enum Type { F64, F32, BF16, F16 };
struct Rows {
  Type type;                    // of x and dx
  int64_t N, V, K;
  const void* x;                // (N,V), x_stride elements from row to row
  void* dx;                     // (N,V), may be x; null: the loss alone
  int64_t x_stride, dx_stride;
  const void* indices;        // (N,K) contiguous, int32 or (wide) int64; K <= K_MERGED, or without duplicates
  bool wide, merged;            // merged: no index stands twice in a row
  const void* probs;            // (N,K) A, contiguous
  const void* g;                // A, g_stride (0 or 1) elements from row to row; read only if dx
  int64_t g_stride;
  void* loss;                   // (N,) A, written; may be null
};

}  // namespace t2t
