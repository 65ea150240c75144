// Included before a source of csrc: its ops register as sslfast_emulated::<op> for CPU tensors, and tensors that they
// make are guarded.
#pragma once

#include <guarded.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(sslfast_emulated, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(sslfast_emulated, CPU, m, C10_UID)

namespace torch::stable {
using cuda_emulation::new_guarded;
}
#define new_empty new_guarded
