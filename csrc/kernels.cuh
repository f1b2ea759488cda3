// The CUDA kernels of kl.h: one idea for every case.
//
//     row n      |front|  cell  cell  cell  cell | cell  cell  cell  cell | ... |back|    cell: 16 bytes
//     block      '------ slice 0 of S -----------'------ slice 1 of S ----'
//     thread t             t    t+1   ...               every THREADS-th cell of its block's slice
//
// S blocks, a thread-block cluster, own a row. The at most 2 * 16 / sizeof(T) - 2 elements outside of whole
// cells, the row's two ends, are block 0's, one a thread: so any V, stride and storage offset take the same
// path. tests/cuda_on_host.h runs this source on a CPU; what it has to replace stands in the first section.
#pragma once
#include <cstring>
#include <type_traits>
#include "kl.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace t2t {
inline __device__ char* shared_memory() {
  extern __shared__ uint4 bytes[];
  return (char*)bytes;
}
inline __device__ float shuffle_xor(float a, int d) { return __shfl_xor_sync(~0u, a, d); }

// e^x for x <= 0: relative error below 2^-22 + |x| 2^-24, from ex2.approx and from the product. Below
// 2^-126 it is 0; e^-inf = 0, NaN stays NaN.
inline __device__ float exponent(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// The barrier of a cluster in two halves. `begun` says only that this block runs: it orders no memory, and
// costs no fence; `arrive` publishes what was written, `wait` sees what others published (see rows_kernel).
// peer: x in another block.
#if __CUDA_ARCH__ >= 900
#define CLUSTER(what) asm volatile("barrier.cluster." what ".aligned;" ::: "memory")
inline __device__ void cluster_begun() { CLUSTER("arrive.relaxed"); }
inline __device__ void cluster_arrive() { CLUSTER("arrive.release"); }
inline __device__ void cluster_wait() { CLUSTER("wait.acquire"); }
template <class X> __device__ X* peer(X* x, int block) {
  asm("mapa.u64 %0, %0, %1;" : "+l"(x) : "r"(block));
  return x;
}
#else                                                                  // the launcher keeps S at 1
inline __device__ void cluster_begun() {}
inline __device__ void cluster_arrive() {}
inline __device__ void cluster_wait() {}
template <class X> __device__ X* peer(X* x, int) { return x; }
#endif
}  // namespace t2t
#endif

namespace t2t {

// ------------------------------------------------------------------------------------------------- numbers
inline __device__ float number(float x) { return x; }
inline __device__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ float number(__half x) { return __half2float(x); }

template <class T> __device__ T rounded(float a) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(a);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(a);
  else return a;
}

inline __device__ float warp_sum(float a) {                        // the same bits in all lanes
  for (int d = 16; d; d /= 2) a += shuffle_xor(a, d);
  return a;
}

inline __device__ Stats<float> warp_join(Stats<float> a) {             // one exp instead of join's ten
  float m = a.m;
  for (int d = 16; d; d /= 2) m = fmax(m, shuffle_xor(m, d));
  return {m, warp_sum(a.s * shift(a.m, m))};
}

template <int WARPS> __device__ float block_sum(float a, float* sums) {
  a = warp_sum(a);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = a;
  __syncthreads();
  a = 0;
  for (int w = 0; w < WARPS; w++) a += sums[w];
  return a;
}

// --------------------------------------------------------------------------------------------------- cells
template <class T> struct alignas(16) Cell { T v[16 / sizeof(T)]; };

template <class T> __device__ Cell<T> load(const T* x) {
  uint4 bits = *(const uint4*)x;                                       // one instruction, whatever T is
  Cell<T> c;
  memcpy(&c, &bits, 16);
  return c;
}
template <class T> __device__ Cell<T> larger(Cell<T> a, Cell<T> b) {  // by place; NaN gives way
  if constexpr (sizeof(T) == 2) {                                      // two places an instruction
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair p[4], q[4];
    memcpy(p, &a, 16), memcpy(q, &b, 16);
    for (int i = 0; i < 4; i++) p[i] = __hmax2(p[i], q[i]);
    memcpy(&a, p, 16);
  } else {
    for (int e = 0; e < int(16 / sizeof(T)); e++) a.v[e] = fmax(a.v[e], b.v[e]);
  }
  return a;
}
template <class T> __device__ void store(T* x, const Cell<T>& c) {
  uint4 bits;
  memcpy(&bits, &c, 16);
  *(uint4*)x = bits;
}

// V elements = front, whole cells, back. End e of `ends` = front + back is element end(e). 64-bit indices
// within a row would cost registers: I is int but for scale.
template <class T, class I = int> struct Cut {
  static constexpr int E = 16 / sizeof(T);
  int front, ends;
  I whole;
  HD Cut(const T* x, I V) {
    front = (16 - (uintptr_t)x % 16) % 16 / sizeof(T);
    front = front < V ? front : int(V);
    whole = (V - front) / E;
    ends = int(V - whole * E);
  }
  HD I end(int e) const { return e < front ? e : e + whole * E; }
};

// Shared memory of a block: `tile` cells of its slice, the row's ends, (m, s) of all `pairs` warps of the
// row, a number for each of its own warps, and the row's targets: index, p, q, logit.
template <class T> struct Shared {
  Cell<T>* cells;
  Stats<float>* pairs;
  float *sums, *p, *q, *x;
  int32_t* i;
  T* ends;
  HD Shared(char* at, int tile, int pairs_, int warps, int K) {
    cells = (Cell<T>*)at;
    ends = (T*)(cells + tile);
    pairs = (Stats<float>*)(ends + 2 * Cut<T>::E);
    sums = (float*)(pairs + pairs_);
    p = sums + warps, q = p + K, x = q + K;
    i = (int32_t*)(x + K);
  }
  static size_t size(int64_t tile, int pairs, int warps, int K) {
    return (tile + 2) * 16 + pairs * sizeof(Stats<float>) + (warps + 4 * K) * 4;
  }
};

// What a block holds of its row at a time: cells [begin, end), and block 0, with its first tile, the ends.
template <class T> struct Tile {
  Cut<T> cut;
  int begin, end;
  bool has_ends;

  __device__ const T* find(int v, const Shared<T>& sh) const {     // element v, or null: not in this tile
    int in = v - cut.front - begin * Cut<T>::E;
    if (in >= 0 && in < (end - begin) * Cut<T>::E) return (const T*)sh.cells + in;
    if (has_ends && v < cut.front) return sh.ends + v;
    if (has_ends && v >= cut.front + cut.whole * Cut<T>::E) return sh.ends + (v - cut.whole * Cut<T>::E);
    return nullptr;
  }
};

// Read the tile: keep it in shared memory, or count it into this thread's (m, s), or both. Eight loads are
// under way at a time; their maximum is taken first: s is rescaled once, and an element costs one exp.
template <class T, bool HOLD, bool COUNT, int THREADS>
__device__ Stats<float> read(const T* x, const Tile<T>& tile, const Shared<T>& sh) {
  constexpr int U = 8, E = Cut<T>::E;
  const int t = threadIdx.x;
  Stats<float> r{-INFINITY, 0};
  for (int j = tile.begin + t; j < tile.end; j += U * THREADS) {
    Cell<T> c[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      int i = j + u * THREADS;               // past the end j again: a branch would come between the loads
      c[u] = load(x + tile.cut.front + (i < tile.end ? i : j) * E);
    }
    if (HOLD)
#pragma unroll
      for (int u = 0; u < U; u++)
        if (j + u * THREADS < tile.end) sh.cells[j + u * THREADS - tile.begin] = c[u];
    if (COUNT) {
      Cell<T> most = c[0];
#pragma unroll
      for (int u = 1; u < U; u++) most = larger(most, c[u]);           // NaN comes in by s
      float m = r.m;
      for (int e = 0; e < E; e++) m = fmax(m, number(most.v[e]));
      r = {m, r.s * shift(r.m, m)};
      m = reference(m);
#pragma unroll
      for (int u = 0; u < U; u++)
        if (j + u * THREADS < tile.end) {
          float s = 0;
          for (int e = 0; e < E; e++) s += exponent(number(c[u].v[e]) - m);
          r.s += s;
        }
    }
  }
  if (tile.has_ends && t < tile.cut.ends) {
    T end = x[tile.cut.end(t)];
    if (HOLD) sh.ends[t] = end;
    if (COUNT) {
      float m = fmax(r.m, number(end));
      r = {m, r.s * shift(r.m, m) + exponent(number(end) - reference(m))};
    }
  }
  return r;
}

// dx = f(x) for the tile in shared memory, or zeros (sh null). Each thread takes what it has itself put
// there: no barrier before. Where dx is not aligned as x is, elements are stored one by one.
template <class T, int THREADS, class F>
__device__ void write(T* dx, const Tile<T>& tile, const Shared<T>* sh, F f) {
  constexpr int E = Cut<T>::E;
  const int t = threadIdx.x;
  const bool aligned = (uintptr_t)(dx + tile.cut.front) % 16 == 0;
#pragma unroll 2
  for (int j = tile.begin + t; j < tile.end; j += THREADS) {
    Cell<T> c{};
    if (sh) {
      c = load((const T*)(sh->cells + (j - tile.begin)));
#pragma unroll
      for (int e = 0; e < E; e++) c.v[e] = f(c.v[e]);
    }
    T* to = dx + tile.cut.front + j * E;
    if (aligned) store(to, c);
    else for (int e = 0; e < E; e++) to[e] = c.v[e];
  }
  if (tile.has_ends && t < tile.cut.ends) dx[tile.cut.end(t)] = sh ? f(sh->ends[t]) : rounded<T>(0);
}

// ---------------------------------------------------------------------------------------------------- rows
//                                                   bytes of DRAM a row                       a GPU
//     LOSS     x streams through registers           V b                                       not run
//     KEEP     slices stay in shared memory          2 V b                                     not run
//     REREAD   tile by tile, x is read again         3 V b, less what the L2 cache kept        not run
//
// and K (index + p) bytes for each of the S blocks. b = sizeof(T). THREADS = 256 with 80 registers lets
// three blocks share an SM of 228 KB if each takes at most 75: while one waits for its peers, two keep
// loads under way. LOSS, without slices in shared memory, has 64 registers and four blocks.
//
// The blocks of a row meet twice. What each step guarantees:
//     begun, wait    all S blocks run: their shared memory is there, and takes this block's (m, s)
//     arrive         this block's (m, s) are out, and it has read the logits at targets, for the loss
//     wait           so have all others: the row's (m, s) are here, and dx may go over x
//     the end        no block touches another's shared memory since: each may leave when it is done
// No atomics: no result depends on timing.
enum Mode { LOSS, KEEP, REREAD };

inline __device__ Targets<float> row_targets(const Rows& r, int64_t n) {
  const char* i = (const char*)r.indices + n * r.K * (r.wide ? 8 : 4);
  return {i, (const float*)r.probs + n * r.K, r.K, r.V, r.wide, r.merged};
}

template <class T, Mode M, int THREADS>
__global__ void __launch_bounds__(THREADS, M == LOSS ? 4 : 3)
rows_kernel(const Rows r, const int S, const int tile_cells) {
  constexpr int WARPS = THREADS / 32;
  static_assert(THREADS % 32 == 0 && THREADS >= 2 * Cut<T>::E - 2);
  const int t = threadIdx.x, c = blockIdx.x % S, K = int(r.K);
  const int64_t n = blockIdx.x / S;
  const T* x = (const T*)r.x + n * r.x_stride;
  T* dx = (T*)r.dx + n * r.dx_stride;
  const Shared<T> sh(shared_memory(), tile_cells, S * WARPS, WARPS, K);
  const Cut<T> cut(x, int(r.V));
  const Slice slice = slice_of(cut.whole, S, c);
  Tile<T> tile{cut, slice.begin, slice.end, c == 0};

  // P, and the targets into shared memory
  Targets<float> q = row_targets(r, n);
  float P = 0;
#pragma unroll 1                                                    // K is small, and so should be the code
  for (int k = t; k < K; k += THREADS) {
    int v = int(q.index(k));
    float p = v < 0 ? 0 : q.p[k];
    P += p;
    sh.i[k] = v, sh.p[k] = p;
  }
  P = block_sum<WARPS>(P, sh.sums);
  if (P == 0) {                                                        // in all S blocks alike
    if (M != LOSS) write<T, THREADS>(dx, tile, (const Shared<T>*)nullptr, [](T v) { return v; });
    if (c == 0 && t == 0 && r.loss) ((float*)r.loss)[n] = 0;
    return;
  }
  if (S > 1) cluster_begun();

  // this thread's (m, s)
  Stats<float> row = warp_join(read<T, M == KEEP, true, THREADS>(x, tile, sh));

  // q from p, and for the loss the logits at targets
  q = {sh.i, sh.p, K, r.V, false, r.merged};
#pragma unroll 1
  for (int k = t; k < K; k += THREADS) {
    int v = sh.i[k];
    if (c == 0 && r.loss) sh.x[k] = v < 0 ? 0 : number(x[v]);
    sh.q[k] = q.mass(k);
  }

  // (m, s) of the row: every warp's pair to every block, and the same sum in the same order everywhere
  if (S > 1) cluster_wait();                                       // a block has shared memory once it runs
  if (t % 32 < S) *peer(sh.pairs + c * WARPS + t / 32, t % 32) = row;
  if (S > 1) cluster_arrive(), cluster_wait();
  else __syncthreads();
  row = {-INFINITY, 0};
  for (int i = t % 32; i < S * WARPS; i += 32) row = join(row, sh.pairs[i]);
  row = warp_join(row);

  if (c == 0 && r.loss) {
    float loss = 0;
#pragma unroll 1
    for (int k = t; k < K; k += THREADS)
      loss += target_loss(sh.q[k], sh.x[k], row);
    loss = block_sum<WARPS>(loss, sh.sums);
    if (t == 0) ((float*)r.loss)[n] = loss;
  }

  if (M == LOSS) return;
  const float g = ((const float*)r.g)[n * r.g_stride], f = g * P / row.s;
  do {
    if (M == REREAD) {
      tile.end = slice.end - tile.begin < tile_cells ? slice.end : tile.begin + tile_cells;
      read<T, true, false, THREADS>(x, tile, sh);
    }
    write<T, THREADS>(dx, tile, &sh, [=](T v) { return rounded<T>(f * exponent(number(v) - row.m)); });
    __syncthreads();
#pragma unroll 1
    for (int k = t; k < K; k += THREADS)
      if (int v = sh.i[k]; sh.q[k] != 0)
        if (const T* at = tile.find(v, sh))
          dx[v] = rounded<T>(target_grad(sh.q[k], number(*at), row, g, P));
    if (M == REREAD) __syncthreads();                                // before the next tile overwrites this
    tile.begin = tile.end, tile.has_ends = false;
  } while (M == REREAD && tile.begin < slice.end);
}

// dx (N,V) += alpha q: thread (n, k) owns target k of row n, and does nothing at the second of two
// duplicates. Moves N K (index + p) bytes and a sector of dx each way a target. On a GPU: not run.
template <class T> __global__ void scatter_kernel(const Rows r, const float alpha) {
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, n = i / r.K, k = i % r.K;
  if (n >= r.N) return;
  Targets<float> q = row_targets(r, n);
  if (float q_k = q.mass(k); q_k != 0) {
    T* at = (T*)r.dx + n * r.dx_stride + q.index(k);
    *at = rounded<T>(number(*at) + alpha * q_k);
  }
}

// x (n,) *= *g: a thread owns every (grid)-th cell, thread 0.. of block 0 the ends. Moves 2 n b bytes, or,
// if *g is 1 as in loss.backward(), none. On a GPU: not run.
template <class T> __global__ void scale_kernel(T* x, const int64_t n, const float* g) {
  const float f = *g;
  if (f == 1) return;
  const Cut<T, int64_t> cut(x, n);
  const int64_t t = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
#pragma unroll 4
  for (int64_t j = t; j < cut.whole; j += int64_t(gridDim.x) * blockDim.x) {
    T* at = x + cut.front + j * Cut<T>::E;
    Cell<T> c = load((const T*)at);
#pragma unroll
    for (int e = 0; e < Cut<T>::E; e++) c.v[e] = rounded<T>(f * number(c.v[e]));
    store(at, c);
  }
  if (t < cut.ends) x[cut.end(int(t))] = rounded<T>(f * number(x[cut.end(int(t))]));
}

}  // namespace t2t
