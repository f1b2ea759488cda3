// Launches: how many blocks share a row, and what to do without clusters or where a row does not fit.
#include "launch.h"
#include "kernels.cuh"
#include <tuple>

namespace t2t {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, S_MAX = 8;        // 8: the most that every device grants

struct Device { int id, sms, block_bytes, sm_bytes, S_max; };          // bytes of shared memory

// Of the current device. Each thread asks again when its device changes.
cudaError_t current_device(Device& out) {
  thread_local Device d{-1};
  int id;
  if (cudaError_t e = cudaGetDevice(&id)) return e;
  if (d.id != id) {
    Device a{id};
    cudaFuncAttributes code;
    const auto ask = [&](int& out, cudaDeviceAttr what) { return cudaDeviceGetAttribute(&out, what, id); };
    if (cudaError_t e = ask(a.sms, cudaDevAttrMultiProcessorCount)) return e;
    if (cudaError_t e = ask(a.block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return e;
    if (cudaError_t e = ask(a.sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor)) return e;
    if (cudaError_t e = cudaFuncGetAttributes(&code, rows_kernel<float, LOSS, THREADS>)) return e;
    a.S_max = code.ptxVersion >= 90 ? S_MAX : 1;                  // of the code: PTX of 8.0 has no clusters
    d = a;                                                             // on any device
  }
  out = d;
  return cudaSuccess;
}

template <class F> cudaError_t by_type(Type type, F f) {
  switch (type) {
    case F32: return f(float());
    case BF16: return f(__nv_bfloat16());
    case F16: return f(__half());
    default: return cudaErrorInvalidValue;
  }
}

template <class T> size_t bytes_of(const Rows& r, int64_t tile, int S) {
  return Shared<T>::size(tile, S * WARPS, WARPS, int(r.K));
}

template <class T, Mode M>
cudaError_t launch(const Rows& r, int S, int64_t tile, const Device& d, cudaStream_t stream) {
  auto kernel = rows_kernel<T, M, THREADS>;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = S, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(r.N * S)), config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes_of<T>(r, tile, S), config.stream = stream;
  config.attrs = &cluster, config.numAttrs = S > 1;
  thread_local std::tuple<int, int, size_t> checked{-1, 0, 0};
  const std::tuple<int, int, size_t> now{d.id, S, config.dynamicSmemBytes};
  if (checked != now) {
    int fit = 1;
    const auto what = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaError_t e = cudaFuncSetAttribute(kernel, what, d.block_bytes)) return e;
    if (S > 1)
      if (cudaError_t e = cudaOccupancyMaxActiveClusters(&fit, kernel, &config)) return e;
    if (!fit) return cudaErrorLaunchOutOfResources;
    checked = now;
  }
  return cudaLaunchKernelEx(&config, kernel, r, S, int(tile));
}

template <class T> cudaError_t rows(const Rows& r, const Device& d, cudaStream_t stream) {
  const int64_t cells = r.V / Cut<T>::E;
  const auto slice = [&](int S) { return (cells + S - 1) / S; };
  const auto spread = [&](int S) {                 // fill the device in one wave, and each thread with a cell
    while (S < d.S_max && 2 * r.N * S <= 3 * d.sms && slice(2 * S) >= THREADS) S *= 2;
    return S;
  };
  if (!r.dx) {
    const int S = spread(1);
    const cudaError_t e = launch<T, LOSS>(r, S, 0, d, stream);
    return e && S > 1 ? cudaGetLastError(), launch<T, LOSS>(r, 1, 0, d, stream) : e;
  }
  int S = 1;                                            // three blocks an SM, each with 1 KB of the system's
  while (S < d.S_max && bytes_of<T>(r, slice(S), S) > size_t(d.sm_bytes / 3 - 1024)) S *= 2;
  const int64_t tile = (48 * 1024 - bytes_of<T>(r, 0, S)) / 16;
  const bool fits = bytes_of<T>(r, slice(S), S) <= size_t(d.block_bytes);
  if (fits) S = spread(S);
  const cudaError_t e = fits ? launch<T, KEEP>(r, S, slice(S), d, stream)
                             : launch<T, REREAD>(r, S, tile, d, stream);
  return e && (fits || S > 1) ? cudaGetLastError(), launch<T, REREAD>(r, 1, tile, d, stream) : e;
}

}  // namespace

cudaError_t rows_cuda(const Rows& r, cudaStream_t stream) {
  if (r.N == 0 || r.V == 0) return cudaSuccess;
  if (r.N > INT32_MAX / S_MAX || r.V > INT32_MAX - 64 || r.K > K_CUDA) return cudaErrorInvalidValue;
  Device d;
  if (cudaError_t e = current_device(d)) return e;
  return by_type(r.type, [&](auto zero) { return rows<decltype(zero)>(r, d, stream); });
}

cudaError_t scatter_cuda(const Rows& r, double alpha, cudaStream_t stream) {
  const int64_t blocks = (r.N * r.K + THREADS - 1) / THREADS;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return by_type(r.type, [&](auto zero) {
    using T = decltype(zero);
    scatter_kernel<T><<<unsigned(blocks), THREADS, 0, stream>>>(r, float(alpha));
    return cudaGetLastError();
  });
}

cudaError_t scale_cuda(Type type, void* x, int64_t n, const float* g, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  Device d;
  if (cudaError_t e = current_device(d)) return e;
  return by_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = n / Cut<T>::E / (4 * THREADS) + 1, most = 8 * d.sms;
    const unsigned grid = unsigned(blocks < most ? blocks : most);
    scale_kernel<T><<<grid, THREADS, 0, stream>>>((T*)x, n, g);
    return cudaGetLastError();
  });
}

}  // namespace t2t
