// Lazily negated tensors (z.conj().imag) as arguments of ops that write their arguments, on every device.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "common/check.h"

namespace sslfast {
namespace {

// torch's fallback takes the results of an op for the tensors that it wrote. These ops have no results: it would read
// past the end of its stack.
[[noreturn]] void refuse_negated(const char* op) {
  throw std::runtime_error(std::string(op) + ": a tensor is lazily negated; pass a copy, tensor.resolve_neg()");
}
void negated_bank_update(const Tensor&, const Tensor&, const Tensor&, double) {
  refuse_negated("bank_update_");
}
void negated_bank_enqueue(const Tensor&, const Tensor&, const Tensor&) {
  refuse_negated("bank_enqueue_");
}
void negated_ema_update(const std::vector<Tensor>&, const std::vector<Tensor>&, const std::optional<Tensor>&, double) {
  refuse_negated("ema_update_");
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, Negative, m) {
  m.impl("bank_update_", TORCH_BOX(&sslfast::negated_bank_update));
  m.impl("bank_enqueue_", TORCH_BOX(&sslfast::negated_bank_enqueue));
  m.impl("ema_update_", TORCH_BOX(&sslfast::negated_ema_update));
}
