// What cuda.cu offers to the bindings. Pointers are on the current device; work goes to `stream`, nothing
// waits.
#pragma once
#include <cuda_runtime_api.h>
#include "kl.h"

namespace t2t {
cudaError_t rows_cuda(const Rows& r, cudaStream_t stream);
cudaError_t scatter_cuda(const Rows& r, double alpha, cudaStream_t stream);   // dx += alpha q
// x (n,) *= *g; g: one A
cudaError_t scale_cuda(Type type, void* x, int64_t n, const void* g, cudaStream_t stream);
}  // namespace t2t
