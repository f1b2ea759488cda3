// What tests/test_cuda.py calls: the kernels of csrc/kernels.cuh with small blocks.
#include "cuda_on_host.h"

#include "../csrc/kernels.cuh"

using namespace t2t;
constexpr int THREADS = 32;                                           // of scatter and scale

template <class F> void by_type(int type, F f) {
  if (type == F32) f(float());
  if (type == BF16) f(__nv_bfloat16());
  if (type == F16) f(__half());
}

template <int THREADS> void rows_of(const Rows& r, int mode, int C, int64_t tile) {
  by_type(r.type, [&](auto zero) {
    using T = decltype(zero);
    if (!tile) tile = (r.V / Cut<T>::E + C - 1) / C;                   // the slice, as KEEP needs it
    auto kernel = mode == LOSS ? rows_kernel<T, LOSS, THREADS>
                : mode == KEEP ? rows_kernel<T, KEEP, THREADS> : rows_kernel<T, REREAD, THREADS>;
    size_t bytes = Shared<T>::size(tile, C * (THREADS / 32), THREADS / 32, int(r.K));
    on_host(int(r.N), C, THREADS, bytes, [&] { kernel(r, C, int(tile)); });
  });
}
extern "C" void rows(const Rows* r, int mode, int C, int64_t tile) {   // of one warp, and of two
  C > 2 ? rows_of<32>(*r, mode, C, tile) : rows_of<64>(*r, mode, C, tile);
}

extern "C" void scatter(const Rows* r, double alpha) {
  by_type(r->type, [&](auto zero) {
    using T = decltype(zero);
    const int blocks = int((r->N * r->K + THREADS - 1) / THREADS);
    on_host(blocks, 1, THREADS, 0, [&] { scatter_kernel<T>(*r, float(alpha)); });
  });
}

extern "C" void scale(int type, void* x, int64_t n, const float* g) {
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    on_host(3, 1, THREADS, 0, [&] { scale_kernel<T>((T*)x, n, g); });
  });
}
