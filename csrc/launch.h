// What cuda.cu offers to bind.cpp. Pointers are on the current device; work goes to `stream`, nothing waits.
// float32 and the half types: float64, which gradcheck wants, is the CPU's.
#pragma once
#include <cuda_runtime_api.h>
#include "kl.h"

namespace t2t {
constexpr int64_t K_CUDA = 1024;      // so many targets a row fit into shared memory beside a slice
cudaError_t rows_cuda(const Rows& r, cudaStream_t stream);
cudaError_t scatter_cuda(const Rows& r, double alpha, cudaStream_t stream);   // dx += alpha q
// x (n,) *= *g
cudaError_t scale_cuda(Type type, void* x, int64_t n, const float* g, cudaStream_t stream);
}  // namespace t2t
