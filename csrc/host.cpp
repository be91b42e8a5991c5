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
        const char* names[] = {"baseline", "avx2", "avx512", "amx"};
        return std::string(names[xray::available_capability()]);
      },
      "The best instruction set of this processor that kernels are compiled for.");
  m.def(
      "plan_channel_pieces", &xray::plan_channel_pieces,
      "Pieces into which token_reorganize splits the channels of each batch row.", pybind11::arg("batch"),
      pybind11::arg("channels"), pybind11::arg("element_size"), pybind11::arg("threads"));
  m.def(
      "plan_reorganize",
      [](int64_t batch, int64_t length, int64_t keep, int64_t channels, int64_t element_size, bool norm,
         int64_t processors) {
        const int64_t lanes = 16 / element_size;
        const xray::ReorganizePlan plan =
            xray::plan_reorganize(batch, length, 1, keep, channels / lanes, 16, lanes, /*fuse=*/true, norm, processors);
        return std::map<std::string, int64_t>{
            {"rows", plan.rows},
            {"copy_blocks", plan.copy_blocks},
            {"fuse_vectors", plan.fuse_vectors},
            {"fuse_blocks", plan.fuse_blocks},
            {"select_bytes", plan.select_bytes},
            {"held_bytes", plan.held_bytes}};
      },
      "How the CUDA forward of token_reorganize splits one prefix token and 16-byte vectors over the processors.",
      pybind11::arg("batch"), pybind11::arg("length"), pybind11::arg("keep"), pybind11::arg("channels"),
      pybind11::arg("element_size"), pybind11::arg("norm"), pybind11::arg("processors"));
  m.def(
      "plan_reorganize_backward",
      [](int64_t batch, int64_t length, int64_t keep, int64_t channels, int64_t element_size, bool norm,
         int64_t processors) {
        const xray::ReorganizeBackwardPlan plan =
            xray::plan_reorganize_backward(batch, length, keep, channels * element_size / 16, 16, norm, processors);
        return std::map<std::string, int64_t>{{"threads", plan.threads}, {"rows", plan.rows}, {"blocks", plan.blocks}};
      },
      "The same for the CUDA backward.", pybind11::arg("batch"), pybind11::arg("length"), pybind11::arg("keep"),
      pybind11::arg("channels"), pybind11::arg("element_size"), pybind11::arg("norm"), pybind11::arg("processors"));
  m.def(
      "plan_class_row",
      [](int64_t length, int64_t sequences, bool packed) {
        const xray::ClassRowPlan plan = xray::plan_class_row(length, sequences, packed);
        return std::map<std::string, int64_t>{{"tiles", plan.tiles}, {"chunks", plan.chunks}, {"slices", plan.slices}};
      },
      "How the CUDA kernels of class_scores and its backward split the keys of a batch row, for each head.",
      pybind11::arg("length"), pybind11::arg("sequences") = 1, pybind11::arg("packed") = false);
}
