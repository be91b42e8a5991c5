// Python module _host: what this build and this processor can do, and the plans that the kernels make.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/capability.h"
#include "common/plan.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler",
#if defined(__clang__)
       "clang " __clang_version__
#else
       "gcc " __VERSION__
#endif
      },
      {"c++", std::to_string(__cplusplus)},
      {"stable ABI", "torch 2.10"},
#if defined(XRAY_CUDA_VERSION)
      {"cuda", XRAY_CUDA_VERSION},
      {"cuda architectures", XRAY_CUDA_ARCHITECTURES},
#else
      {"cuda", "not built"},
#endif
  };
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts, processor capability and planning heuristics of xray_kernels.";
  m.def("build_info", &build_info, "Facts of this build: compiler, language level, ABI, CUDA.");
  m.def(
      "cpu_capability",
      [] {
        const char* names[] = {"baseline", "avx2", "avx512"};
        return std::string(names[xray::available_capability()]);
      },
      "The best instruction set of this processor that kernels are compiled for.");
  m.def(
      "plan_channel_pieces", &xray::plan_channel_pieces,
      "Pieces into which token_reorganize splits the channels of each batch row.", pybind11::arg("batch"),
      pybind11::arg("channels"), pybind11::arg("element_size"), pybind11::arg("threads"));
}
