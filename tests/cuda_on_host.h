// Runs csrc/kernels.cuh on a CPU: one OS thread for each CUDA thread, all blocks of a cluster at once,
// clusters one after the other. Slow, and blind to timing, but the indices, barriers and exchanges are
// those of the GPU, and -fsanitize=thread sees a missing barrier. Only what the kernels use is here.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Dim { unsigned x; };
inline thread_local Dim threadIdx, blockIdx;
inline Dim blockDim, gridDim;

// ------------------------------------------------------------------------------------------ half precision
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float a) {                                    // to nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &a, 4);
    bits = std::isnan(a) ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
};
inline float __bfloat162float(__nv_bfloat16 a) {
  uint32_t u = uint32_t(a.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return __nv_bfloat16(a); }
using __half = _Float16;                                              // the compiler rounds it the same way
inline float __half2float(__half a) { return a; }
inline __half __float2half_rn(float a) { return __half(a); }

struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half2 { __half x, y; };
inline __nv_bfloat16 larger_of(__nv_bfloat16 a, __nv_bfloat16 b) {     // fmax: NaN gives way to a number
  return __nv_bfloat16(std::fmax(__bfloat162float(a), __bfloat162float(b)));
}
inline __half larger_of(__half a, __half b) { return __half(std::fmax(float(a), float(b))); }
template <class P> P __hmax2(P a, P b) { return {larger_of(a.x, b.x), larger_of(a.y, b.y)}; }

// ----------------------------------------------------------------------- blocks, warps, clusters, barriers
struct Warp {
  std::barrier<> barrier{32};
  float slots[2][32];                                           // in turns: one barrier a shuffle is enough
};
struct Block {
  std::barrier<> barrier;
  std::vector<uint4> shared;                                           // 16-byte aligned, as on the device
  std::vector<std::unique_ptr<Warp>> warps;
  Block(int threads, size_t bytes) : barrier(threads), shared((bytes + 15) / 16) {
    for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<Warp>());
  }
};
inline std::vector<std::unique_ptr<Block>> cluster;
inline std::unique_ptr<std::barrier<>> cluster_barrier;
inline thread_local Block* block;
inline thread_local int turn;
inline thread_local std::unique_ptr<std::barrier<>::arrival_token> arrived;

inline void __syncthreads() { block->barrier.arrive_and_wait(); }

namespace t2t {
inline char* shared_memory() { return (char*)block->shared.data(); }
inline float exponent(float x) { return std::exp2(x * 1.4426950408889634f); }
inline float shuffle_xor(float a, int d) {
  Warp& warp = *block->warps[threadIdx.x / 32];
  float* slots = warp.slots[turn ^= 1];
  slots[threadIdx.x % 32] = a;
  warp.barrier.arrive_and_wait();
  return slots[threadIdx.x % 32 ^ d];
}
inline void cluster_arrive() {
  arrived = std::make_unique<std::barrier<>::arrival_token>(cluster_barrier->arrive());
}
inline void cluster_begun() { cluster_arrive(); }
inline void cluster_wait() { cluster_barrier->wait(std::move(*arrived)); }
template <class X> X* peer(X* x, int rank) {
  return (X*)((char*)cluster[rank]->shared.data() + ((char*)x - shared_memory()));
}
}  // namespace t2t

// kernel() with `clusters` clusters of C blocks of `threads` threads, `bytes` of shared memory full of NaN
// each.
template <class F> void on_host(int clusters, int C, int threads, size_t bytes, F kernel) {
  std::barrier all(C * threads);
  cluster.clear();
  for (int c = 0; c < C; c++) cluster.push_back(std::make_unique<Block>(threads, bytes));
  cluster_barrier = std::make_unique<std::barrier<>>(C * threads);
  blockDim.x = threads, gridDim.x = clusters * C;
  auto thread = [&](int c, int t) {
    threadIdx.x = t, block = cluster[c].get();
    for (int n = 0; n < clusters; n++) {
      if (t == 0) std::memset((void*)block->shared.data(), 0xff, block->shared.size() * 16);
      all.arrive_and_wait();
      blockIdx.x = n * C + c;
      kernel();
      all.arrive_and_wait();
    }
  };
  std::vector<std::thread> threads_;
  for (int i = 0; i < C * threads; i++) threads_.emplace_back(thread, i / threads, i % threads);
  for (auto& t : threads_) t.join();
}
