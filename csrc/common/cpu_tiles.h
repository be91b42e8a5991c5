// Threads of CPU kernels that have a form for AMX, which serves bfloat16. Included after common/variants.h with
// XRAY_AMX_KERNEL_FILE.
#pragma once

#include <type_traits>

#include "common/cpu_threads.h"

namespace xray {

#if defined(__x86_64__)
template <class T>
bool uses_tiles() {
  return std::is_same_v<T, BFloat16> && capability() == 3;
}

// Runs a statement about namespace amx where tiles serve elements of type T; it is not compiled for other types.
#define XRAY_IF_TILES(T, ...)                \
  if constexpr (std::is_same_v<T, BFloat16>) \
    if (uses_tiles<T>()) {                   \
      __VA_ARGS__;                           \
    }
#else
template <class T>
bool uses_tiles() {
  return false;
}
#define XRAY_IF_TILES(T, ...)
#endif

// What a thread needs to itself: scratch, and the configuration of its tiles.
template <class T>
class Worker {
 public:
  explicit Worker(int64_t count) : scratch_(count) {
    XRAY_IF_TILES(T, amx::configure_tiles());
  }
  Worker(const Worker&) = delete;
  ~Worker() {
    XRAY_IF_TILES(T, amx::release_tiles());
  }
  WideScalar<T>* scratch() const {
    return scratch_.data();
  }

 private:
  Scratch<WideScalar<T>> scratch_;
};

}  // namespace xray
