// Lets Python see and limit the instruction set that the CPU kernels use.

#include "common/capability.h"

#include "common/tensor.h"

namespace {

int64_t cpu_capability_available() {
  return xray::available_capability();
}

// Sets the level and returns the one before.
int64_t cpu_capability_set(int64_t level) {
  STD_TORCH_CHECK(
      0 <= level && level <= xray::available_capability(), "level must be from 0 to ", xray::available_capability(),
      ", got ", level);
  const int64_t before = xray::capability();
  xray::capability() = level;
  return before;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(xray_kernels, m) {
  m.def("cpu_capability_available() -> int");
  m.def("cpu_capability_set(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability_available", TORCH_BOX(&cpu_capability_available));
  m.impl("cpu_capability_set", TORCH_BOX(&cpu_capability_set));
}
