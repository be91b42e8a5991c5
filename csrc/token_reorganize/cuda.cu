// CUDA kernels of token reorganisation.
//
// select: one block a row sorts 64-bit words (ordered score, complement of the index) in shared memory, bitonic; the
//   order is total, so the result does not depend on the number of threads, and of equal scores the lower index wins.
// reorganize: one block for each output row copies it; one block for each (row, 128 channels) sums the fused token in
//   index order, four sub-sums joined in a fixed order. No atomics: two runs give the same bits.
// backward: one block a candidate writes its gradient row and, when dropped, reduces <dFused, token> over channels.
// Bytes: each token row once in, each result row once out; FLOPs: 2 C a dropped token forward, 3 C backward.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "token_reorganize/cuda.h"

namespace xray {
namespace {

template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

__device__ float widen(float v) {
  return v;
}
__device__ double widen(double v) {
  return v;
}
__device__ float widen(__half v) {
  return __half2float(v);
}
__device__ float widen(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ void narrow(float v, float* to) {
  *to = v;
}
__device__ void narrow(double v, double* to) {
  *to = v;
}
__device__ void narrow(double v, float* to) {
  *to = float(v);
}
__device__ void narrow(float v, __half* to) {
  *to = __float2half_rn(v);
}
__device__ void narrow(float v, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(v);
}

// Unsigned order = score order: -0 equals 0, NaN of either sign is highest. Scores of float64 tokens are compared as
// float64 in two steps by the caller, so 32 bits are enough here.
__device__ uint32_t ordered_key(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <class S>
__global__ void select_kernel(const S* scores, int64_t* indices, int32_t* place, ReorganizeShape shape, int padded) {
  extern __shared__ uint64_t keys[];
  const int candidates = int(shape.length - shape.prefix);
  const S* row = scores + blockIdx.x * shape.score_batch_stride;
  for (int i = threadIdx.x; i < padded; i += blockDim.x)
    keys[i] =
        i < candidates ? uint64_t(ordered_key(float(widen(row[i * shape.score_stride])))) << 32 | uint32_t(~i) : 0;
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < padded / 2; pair += blockDim.x) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const bool descending = (low & size) == 0;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == descending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < candidates; k += blockDim.x) {
    const int index = int(uint32_t(~keys[k]));
    if (k < shape.keep) indices[blockIdx.x * shape.keep + k] = index;
    place[int64_t(blockIdx.x) * candidates + index] = k < shape.keep ? k : -1;
  }
}

template <class T>
__global__ void copy_rows_kernel(const T* tokens, const int64_t* indices, T* out, ReorganizeShape shape) {
  const int64_t row = blockIdx.x, b = blockIdx.y;
  const int64_t from = row < shape.prefix ? row : shape.prefix + indices[b * shape.keep + row - shape.prefix];
  const T* source = tokens + b * shape.token_batch_stride + from * shape.token_stride;
  T* to = out + (b * (shape.prefix + shape.keep + shape.fuse) + row) * shape.channels;
  for (int64_t c = threadIdx.x; c < shape.channels; c += blockDim.x) to[c] = source[c];
}

// Block of 128 channels x 4 sub-sums over the dropped tokens.
template <class T, class S>
__global__ void fuse_kernel(const T* tokens, const S* scores, const int32_t* place, T* out, ReorganizeShape shape) {
  using W = typename Wide<T>::type;
  __shared__ W part[4][128];
  const int64_t b = blockIdx.y, candidates = shape.length - shape.prefix;
  const int64_t c = int64_t(blockIdx.x) * 128 + threadIdx.x;
  const T* column = tokens + b * shape.token_batch_stride + shape.prefix * shape.token_stride + c;
  W sum = 0;
  if (c < shape.channels) {
    for (int64_t i = threadIdx.y; i < candidates; i += 4) {
      if (place[b * candidates + i] < 0)
        sum += W(widen(scores[b * shape.score_batch_stride + i * shape.score_stride])) *
               widen(column[i * shape.token_stride]);
    }
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < shape.channels) {
    const int x = threadIdx.x;
    const int64_t row = b * (shape.prefix + shape.keep + 1) + shape.prefix + shape.keep;
    narrow((part[0][x] + part[1][x]) + (part[2][x] + part[3][x]), out + row * shape.channels + c);
  }
}

__global__ void place_kernel(const int64_t* indices, int32_t* place, ReorganizeShape shape) {
  const int64_t b = blockIdx.x, candidates = shape.length - shape.prefix;
  for (int64_t i = threadIdx.x; i < candidates; i += blockDim.x) place[b * candidates + i] = -1;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < shape.keep; k += blockDim.x)
    place[b * candidates + indices[b * shape.keep + k]] = int32_t(k);
}

template <class T, class S>
__global__ void backward_kernel(
    const T* grad, const T* tokens, const S* scores, const int32_t* place, T* grad_tokens, S* grad_scores,
    ReorganizeShape shape) {
  using W = typename Wide<T>::type;
  __shared__ W part[128];
  const int64_t row = blockIdx.x, b = blockIdx.y, candidates = shape.length - shape.prefix;
  const int64_t rows = shape.prefix + shape.keep + shape.fuse, i = row - shape.prefix;
  T* to = grad_tokens + (b * shape.length + row) * shape.channels;
  const int32_t at = row < shape.prefix ? 0 : place[b * candidates + i];
  const T* source = nullptr;
  if (row < shape.prefix)
    source = grad + (b * rows + row) * shape.channels;
  else if (at >= 0)
    source = grad + (b * rows + shape.prefix + at) * shape.channels;
  W dot = 0;
  if (source) {
    for (int64_t c = threadIdx.x; c < shape.channels; c += blockDim.x) to[c] = source[c];
  } else if (shape.fuse) {
    const T* fused = grad + (b * rows + rows - 1) * shape.channels;
    const T* token = tokens + b * shape.token_batch_stride + row * shape.token_stride;
    const W weight = widen(scores[b * shape.score_batch_stride + i * shape.score_stride]);
    for (int64_t c = threadIdx.x; c < shape.channels; c += blockDim.x) {
      const W g = widen(fused[c]);
      narrow(weight * g, to + c);
      dot += g * W(widen(token[c]));
    }
  } else {
    for (int64_t c = threadIdx.x; c < shape.channels; c += blockDim.x) narrow(W(0), to + c);
  }
  if (row < shape.prefix) return;
  part[threadIdx.x] = dot;
  for (int step = 64; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
  }
  if (threadIdx.x == 0) narrow(part[0], grad_scores + b * candidates + i);
}

// Calls f with a null pointer of the element type.
template <class F>
cudaError_t for_element(Element type, F&& f) {
  switch (type) {
    case Element::kFloat:
      return f(static_cast<const float*>(nullptr));
    case Element::kHalf:
      return f(static_cast<const __half*>(nullptr));
    case Element::kBFloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    default:
      return f(static_cast<const double*>(nullptr));
  }
}

}  // namespace

cudaError_t launch_select(
    const void* scores, Element score_type, int64_t* indices, int32_t* place, const ReorganizeShape& shape,
    cudaStream_t stream) {
  int padded = 2;
  while (padded < shape.length - shape.prefix) padded *= 2;
  const int threads = padded / 2 < 1024 ? (padded / 2 < 32 ? 32 : padded / 2) : 1024;
  const int bytes = padded * int(sizeof(uint64_t));
  return for_element(score_type, [&](auto null) -> cudaError_t {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
    if (bytes > 48 * 1024) {
      const cudaError_t error =
          cudaFuncSetAttribute(select_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (error != cudaSuccess) return error;
    }
    select_kernel<S><<<unsigned(shape.batch), threads, bytes, stream>>>(
        static_cast<const S*>(scores), indices, place, shape, padded);
    return cudaGetLastError();
  });
}

cudaError_t launch_reorganize(
    const void* tokens, Element type, const void* scores, Element score_type, const int64_t* indices,
    const int32_t* place, void* out, const ReorganizeShape& shape, cudaStream_t stream) {
  return for_element(type, [&](auto token_null) -> cudaError_t {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(token_null)>>;
    const dim3 rows(unsigned(shape.prefix + shape.keep), unsigned(shape.batch));
    copy_rows_kernel<T><<<rows, 128, 0, stream>>>(static_cast<const T*>(tokens), indices, static_cast<T*>(out), shape);
    if (!shape.fuse) return cudaGetLastError();
    return for_element(score_type, [&](auto score_null) -> cudaError_t {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(score_null)>>;
      const dim3 columns(unsigned((shape.channels + 127) / 128), unsigned(shape.batch));
      fuse_kernel<T, S><<<columns, dim3(128, 4), 0, stream>>>(
          static_cast<const T*>(tokens), static_cast<const S*>(scores), place, static_cast<T*>(out), shape);
      return cudaGetLastError();
    });
  });
}

cudaError_t launch_reorganize_backward(
    const void* grad, const void* tokens, Element type, const void* scores, Element score_type, const int64_t* indices,
    int32_t* place, void* grad_tokens, void* grad_scores, const ReorganizeShape& shape, cudaStream_t stream) {
  place_kernel<<<unsigned(shape.batch), 256, 0, stream>>>(indices, place, shape);
  return for_element(type, [&](auto token_null) -> cudaError_t {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(token_null)>>;
    return for_element(score_type, [&](auto score_null) -> cudaError_t {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(score_null)>>;
      const dim3 rows(unsigned(shape.length), unsigned(shape.batch));
      backward_kernel<T, S><<<rows, 128, 0, stream>>>(
          static_cast<const T*>(grad), static_cast<const T*>(tokens), static_cast<const S*>(scores), place,
          static_cast<T*>(grad_tokens), static_cast<S*>(grad_scores), shape);
      return cudaGetLastError();
    });
  });
}

}  // namespace xray
