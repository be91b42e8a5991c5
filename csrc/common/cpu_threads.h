// What CPU kernels need around their loops: the dtype of sums, single numbers, scratch of a thread, tasks. Included
// after common/variants.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "common/tensor.h"

namespace xray {

// Sums of elements of type T are kept in float32, those of float64 in float64.
template <class T>
using WideScalar = typename baseline::Wide<T>::Scalar;

template <class T>
WideScalar<T> widen(T value) {
  const T padded[baseline::lanes<T>] = {value};
  return baseline::load(padded)[0];
}

template <class T>
T narrow(WideScalar<T> value) {
  T padded[baseline::lanes<T>];
  baseline::store(padded, typename baseline::Wide<T>::Vector{value});
  return padded[0];
}

// The dtype that such sums have in tensors.
inline ScalarType wide_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Uninitialised scratch of one thread, at a cache line's start.
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(new char[count * sizeof(S) + 64]) {
  }
  S* data() const {
    return reinterpret_cast<S*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Runs work(task) for all tasks. `make_work` is called once a thread, for what it needs to itself; then each takes the
// next task that is left, so that neither unequal sequences nor a busy core leave the others waiting.
template <class F>
void for_each_task(int64_t tasks, F&& make_work, int64_t most_threads = INT64_MAX) {
  std::atomic<int64_t> next{0};
  const auto threads = std::min({tasks, most_threads, int64_t(torch::stable::get_num_threads())});
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      int64_t task = next++;
      if (task >= tasks) return;
      auto work = make_work();
      for (; task < tasks; task = next++) work(task);
    }
  });
}

}  // namespace xray
