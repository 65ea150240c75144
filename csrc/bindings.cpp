// The host module sslfast._C: facts about the build, and computations without tensors. Importing it also runs the op
// registrations of library.cpp and the kernels. No torch header here: the pybind11 headers of torch and of pip may
// differ.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "permutations.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of sslfast; the ops are under torch.ops.sslfast and sslfast.ops.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = SSLFAST_VERSION;
        info["note"] = SSLFAST_BUILD_NOTE;
        info["cuda_architectures"] = SSLFAST_CUDA_ARCHS;
        info["compiler"] = std::string("g++ ") + __VERSION__;
        return info;
      },
      "Version, CUDA architectures (empty for a CPU build), compiler, and why this is a CPU or CUDA build.");
  m.def(
      "max_hamming_permutations",
      [](int64_t count, int64_t cells, int64_t seed) {
        std::vector<uint8_t> rows;
        {
          py::gil_scoped_release release;
          rows = sslfast::max_hamming_permutations(count, cells, seed);
        }
        return py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size());
      },
      py::arg("count"), py::arg("cells"), py::arg("seed"),
      "The rows of sslfast.methods.shared.permutations.max_hamming_permutations, one byte a cell; arguments are "
      "checked there.");
}
