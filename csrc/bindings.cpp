// The host module sslfast._C: facts about the build. Importing it also runs the op registrations of library.cpp and
// the kernels. No torch header here: the pybind11 headers of torch and of pip may differ.
#include <pybind11/pybind11.h>

#include <string>

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
}
